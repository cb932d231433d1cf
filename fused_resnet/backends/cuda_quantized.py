"""Residual blocks and stems in eight bits on the CUDA backend: csrc/cuda/byte_conv.cuh."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from .. import _native
from ..layers.description import output_size
from ..layers.prepared import WeightCache, version_of
from ..layers.quantized import (
    LARGEST_REDUCTION,
    Quantization,
    QuantizedBlock,
    QuantizedConv,
    QuantizedStem,
)
from . import check_cases, self_check
from .self_check import Case, Family

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Limits of csrc/cuda/byte_conv.cu.
_MOST_GROUPS = 65535
_MOST_PIXELS = 2**31 - 2**16
# What rows of packed weights, and what pixels of a stem's input, are a multiple of, in bytes.
_ROW = 16
_STEM_PIXEL = 4

_cache = WeightCache()


def covers(input: Tensor, blocks: Sequence[QuantizedBlock]) -> bool:
    """Whether the kernels take an input of these blocks, by its size and their groups."""
    N, _, *size = input.shape
    for block in blocks:
        dense = _is_dense(block)
        after = size
        for i, conv in enumerate(block.convs):
            is_projection = block.has_projection and i == len(block.convs) - 1
            if not _fits(N, size if is_projection else after, conv):
                return False
            if dense and conv.weight.shape[1:].numel() * conv.groups > LARGEST_REDUCTION:
                return False
            if not is_projection:
                after = [*output_size(after, conv.weight.shape[2:], *conv[3:6])]
        size = after
    return True


def _fits(N: int, size: Sequence[int], conv: QuantizedConv) -> bool:
    """Whether a convolution's pixels and groups are as many as the kernels count."""
    H, W = (s + 2 * p for s, p in zip(size, conv.padding, strict=True))
    return conv.groups <= _MOST_GROUPS and N * H * W <= _MOST_PIXELS  # or more than output


def residual_blocks(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
    tile: int = -1,
) -> Tensor:
    """Launches a kernel for the input and one for each convolution; a projection is its last's.

    Args:
        input: see `reference.quantized_residual_blocks`, whose bits these are; `covers`ed.
        blocks: see `input`, as for the others.
        stored: see `input`.
        output: see `input`.
        tile: an index into `tiles()` for the convolutions that it can run; -1 leaves the choice to
            csrc/cuda/byte_conv.cu.
    """
    tensors: list[Tensor] = []
    numbers: list[int] = []
    for block in blocks:
        dense = _is_dense(block)
        first = len(block.convs) - 1 - block.has_projection
        for i, conv in enumerate(block.convs):
            whole = dense and i >= first
            tensors += _packed(conv, dense=whole)
            numbers += _numbers(conv, conv.groups if whole else 1)
    counts = [len(block.convs) for block in blocks]
    projections = [int(block.has_projection) for block in blocks]
    scales = [block.shortcut_scale for block in blocks]
    return _operator("byte_blocks")(
        input, tensors, numbers, counts, projections, scales, *stored, output.step, tile
    )


def stem(
    input: Tensor,
    given: QuantizedStem,
    stored: Quantization,
    output: Quantization,
    tile: int = -1,
) -> Tensor:
    """Launches a kernel for the input, one for the convolution and one for the pool.

    In sixteen bits the products with lower parts are what a projection is in a block: a second sum
    of the same program.

    Args:
        input: see `reference.quantized_stem`, whose bits these are.
        given: see `input`, as for the others; of one group.
        stored: see `input`.
        output: see `input`.
        tile: see `residual_blocks`.
    """
    conv, low, pool = given
    K, _, R, S = conv.weight.shape
    channels = _stem_channels(conv)
    tensors = list(_packed(conv, channels))
    if low is not None:
        tensors += _packed(low, channels)
    numbers = [K, channels, R, S, *conv.stride, *conv.padding, *conv.dilation, 1]
    pooling = [*pool.kernel_size, *pool.stride, *pool.padding]
    return _operator("byte_stem")(input, tensors, numbers, pooling, *stored, output.step, tile)


def covers_stem(input: Tensor, given: QuantizedStem) -> bool:
    """Whether the kernels take a stem of this input."""
    N, _, H, W = input.shape
    channels = _stem_channels(given.conv)
    return (
        given.conv.groups == 1
        and channels * given.conv.weight.shape[2:].numel() <= LARGEST_REDUCTION
        and _fits(N, (H, W), given.conv)
    )


def _stem_channels(conv: QuantizedConv) -> int:
    """Bytes of a pixel of its input, as many of each tap."""
    return -(-conv.weight.shape[1] // _STEM_PIXEL) * _STEM_PIXEL


def _is_dense(block: QuantizedBlock) -> bool:
    """Whether a projection and what it is added to have groups of their own.

    One program sums both, and the filters of a program are of one group: they are given the zeros
    that make them convolutions of one group.
    """
    return block.has_projection and block.convs[-1].groups != block.convs[-2].groups


def _numbers(conv: QuantizedConv, joined: int) -> list[int]:
    """What the operators take of a convolution whose groups are joined by so many."""
    K, group_c, R, S = conv.weight.shape
    geometry = (*conv.stride, *conv.padding, *conv.dilation)
    return [K, group_c * joined, R, S, *geometry, conv.groups // joined]


def _packed(
    conv: QuantizedConv, channels: int | None = None, dense: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, sums of filters, scale and shift, as the operators take a convolution.

    Args:
        conv: it.
        channels: of a tap, zeros behind its own; None for its own.
        dense: whether it is to be one of one group.
    """
    entry = _cache.get(id(conv.weight))
    layout = (channels, dense)
    # Eight-bit copies are never written to, so who they are says what they hold.
    if (
        entry is not None
        and entry.owner is not None
        and entry.owner() is conv.weight
        and entry.layout == layout
    ):
        weight, sums = entry.copy
    else:
        weight, sums = _arranged(conv, channels, dense)
        # What is made while a graph is captured lies in that graph's memory.
        if not (weight.is_cuda and torch.cuda.is_current_stream_capturing()):
            _cache.put(conv.weight, version_of(conv.weight), (weight, sums), layout)
    return weight, sums, conv.scale.contiguous(), conv.shift.contiguous()


def _arranged(conv: QuantizedConv, channels: int | None, dense: bool) -> tuple[Tensor, Tensor]:
    """(K, bytes of a row): a filter's taps, channels inside, then zeros; and (K,), int32."""
    weight = conv.weight
    K, group_c, R, S = weight.shape
    if dense:
        whole = weight.new_zeros((conv.groups, K // conv.groups, conv.groups, group_c, R, S))
        for group, own in enumerate(weight.view(conv.groups, K // conv.groups, group_c, R, S)):
            whole[group, :, group] = own
        weight = whole.view(K, conv.groups * group_c, R, S)
    taps = weight.permute(0, 2, 3, 1)
    if channels is not None:
        taps = F.pad(taps, (0, channels - taps.shape[-1]))
    rows = taps.reshape(K, -1)
    rows = F.pad(rows, (0, -rows.shape[1] % _ROW)).contiguous()
    return rows, weight.sum((1, 2, 3), dtype=torch.int32)


def tiles() -> list[tuple[int, ...]]:
    """Of each instance: piece, m, n, depth, warps, stages, and whether it projects."""
    assert _native.cuda_operators is not None
    numbers = _native.cuda_operators.byte_conv_tiles()
    return [tuple(numbers[at : at + 7]) for at in range(0, len(numbers), 7)]


def trusts(
    backend: str, input: Tensor, run: Callable[..., Tensor], run_stem: Callable[..., Tensor] | None
) -> bool:
    """Whether the kernels of eight bits may run: see `self_check`.

    Args:
        backend: its name.
        input: of the call.
        run: `residual_blocks`.
        run_stem: `stem`, if that is what is to run.
    """
    device, dtype = input.device, input.dtype
    if type(input) not in (Tensor, Parameter):
        return True
    what = "eight bits" if run_stem is None else "stem in eight and sixteen bits"

    def family() -> Family:
        return Family(backend, f"{what}, every tile", str(dtype).removeprefix("torch."))

    def case() -> Case:
        if run_stem is not None:
            return check_cases.quantized_stems(dtype, device, run_stem)
        runs = [functools.partial(run, tile=i) for i in range(len(tiles()))]
        cases = [check_cases.quantized_blocks_of_all_kinds(dtype, device, each) for each in runs]
        return check_cases.several(cases, [f"tile {i}" for i in range(len(runs))])

    return self_check.trusts((backend, what, dtype, device), device, family, case)


@functools.cache
def _operator(name: str) -> Any:
    assert _native.cuda_operators is not None
    return getattr(_native.cuda_operators, name).default


def forget_operators() -> None:
    """Lets go of the operators, for `run_on_host`."""
    _operator.cache_clear()
