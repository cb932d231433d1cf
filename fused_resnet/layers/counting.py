"""What profilers count: each convolution in a native call, marked as one of torch's.

`torch.profiler.profile(with_flops=True)` has formulas for operators of torch's, by their names, and
none for ours. So while a profiler runs, a native call is accompanied by an event `aten::conv2d` for
each convolution in it, or `aten::addmm` for a head, of no duration, with shapes for arguments.
A plan, which is one call for a whole network, is by those that were marked while it was recorded.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._profiler import _RecordFunctionFast
from torch.autograd import profiler
from torch.utils._python_dispatch import _disable_current_modes

from .description import Block, ConvNorm


class Marked(NamedTuple):
    """An operator of torch's that a native call stands for.

    Attributes:
        name: the operator's.
        arguments: what it would take, a shape in the place of a tensor.
    """

    name: str
    arguments: tuple[Any, ...]


_local = threading.local()


def is_wanted() -> bool:
    """Whether there is anybody to mark native calls for."""
    return profiler._is_profiler_enabled or getattr(_local, "collected", None) is not None


@contextlib.contextmanager
def collected() -> Iterator[list[Marked]]:
    """What is marked in this thread meanwhile."""
    before = getattr(_local, "collected", None)
    _local.collected = []
    try:
        yield _local.collected
    finally:
        _local.collected = before


def mark(operators: Sequence[Marked]) -> None:
    """Marks these, in a profile and for who collects them."""
    if getattr(_local, "collected", None) is not None:
        _local.collected += operators
    if profiler._is_profiler_enabled:
        for name, arguments in operators:
            with _RecordFunctionFast(name, tuple(map(_argument, arguments))):
                pass


def _argument(value: Any) -> Any:
    return _of_shape(value) if isinstance(value, torch.Size) else value


@functools.lru_cache(maxsize=1024)
def _of_shape(shape: torch.Size) -> Tensor:
    """A tensor without memory; nobody sees it being made."""
    with _disable_current_modes():
        return torch.empty(shape, device="meta")


def convolution(shape: Sequence[int], weight: Sequence[int], *geometry: Any) -> Marked:
    """A convolution of such an input by such a weight; `geometry` as of a `ConvNorm`."""
    stride, padding, dilation, groups = geometry
    numbers = (list(stride), list(padding), list(dilation), groups)
    return Marked("aten::conv2d", (torch.Size(shape), torch.Size(weight), None, *numbers))


def mark_convolution(input: Tensor, layer: ConvNorm) -> None:
    """Marks a layer's."""
    weight, _, _, *geometry = layer
    mark([convolution(input.shape, weight.shape, *geometry)])


def mark_blocks(input: Tensor, blocks: Sequence[Block]) -> None:
    """Marks all convolutions of blocks, one on the output of the other."""
    shape: Sequence[int] = input.shape
    operators = []
    for block in blocks:
        first = shape
        for index, layer in enumerate(block.layers):
            read = first if block.has_projection and index == len(block.main) else shape
            weight, _, _, *geometry = layer
            operators.append(convolution(read, weight.shape, *geometry))
            if index < len(block.main):
                shape = layer.output_shape(shape)
    mark(operators)


def mark_linear(input: Tensor, weight: Tensor) -> None:
    """Marks what `linear` is of (N, C) means of an input (N, C, H, W), weight (K, C)."""
    N, C = input.shape[:2]
    K = weight.size(0)
    shapes = (torch.Size((K,)), torch.Size((N, C)), torch.Size((C, K)))
    mark([Marked("aten::addmm", (*shapes, 1, 1))])
