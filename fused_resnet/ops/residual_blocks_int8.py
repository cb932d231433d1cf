"""`residual_blocks_int8`: residual blocks in eight bits, from their float32 or 16-bit parameters.

Inference only: its output has no gradient. It computes `reference.quantized_residual_blocks` of
what `layers/quantized.py` makes of the parameters, in copies that are kept and made anew when a
parameter changes; see `layers/quantized_copies.py`. Compilers see one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers import checks
from ..layers.description import Block, described_blocks, flattened_blocks, tensors_of
from ..layers.quantized import LARGEST_REDUCTION, Quantization
from ..layers.quantized_copies import BlockCopy, copies_of
from . import operator_checks
from .quantized import quantized_residual_blocks
from .registration import (
    autocast_tensor,
    has_foreign,
    library,
    nothing_intercepts,
    register_autocast,
    register_fake,
    register_kernel,
)
from .residual_blocks import blocks_output

library.define(
    "residual_blocks_int8(Tensor input, Tensor?[] tensors, int[] numbers, float[] eps, "
    "int[] layer_counts, bool[] projections, float[] steps, int[] zero_points) -> Tensor"
)
_operator = torch.ops.fused_resnet.residual_blocks_int8.default

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Copies that fit each other and inputs of a shape and dtype, by their serials.
_fitting: set[tuple[Any, ...]] = set()
_MOST_FITTING = 4096


def residual_blocks_int8(
    input: Tensor, blocks: Sequence[Block], ranges: Sequence[Sequence[Quantization]]
) -> Tensor | None:
    """Each block on the output of the last, in eight bits between.

    Args:
        input: (N, C, H, W), of the first block.
        blocks: see `Block`; none pads its shortcut.
        ranges: of each block: its input, what each convolution but the last writes, its output.
            What one block writes the next one reads.

    Returns:
        (N, K, P, Q) in the dtype of `input` (under autocast, in autocast's), or None where the
        blocks have to be run in floating point: dtypes or shapes do not fit, a tensor is of
        another library, or a parameter is not finite.
    """
    if not are_short(blocks):
        return None
    tensors = tensors_of(blocks)
    if not nothing_intercepts(input, *tensors):
        if has_foreign(input, *tensors) or not are_covered(input, blocks):
            return None
        stored = [one for own in ranges for one in own]
        steps, zero_points = [one.step for one in stored], [one.zero_point for one in stored]
        return _operator(input, *flattened_blocks(blocks), steps, zero_points)
    if input.dtype not in DTYPES:
        return None
    copies = copies_of(blocks, ranges)
    if not all(copy.is_finite for copy in copies) or not fit(input, blocks, copies):
        return None
    return _run(input.detach(), copies, ranges)


def are_short(blocks: Sequence[Block]) -> bool:
    """Whether no sum is of more products than 32 bits hold."""
    weights = (layer.weight for block in blocks for layer in block.layers)
    return all(weight.shape[1:].numel() <= LARGEST_REDUCTION for weight in weights)


def are_covered(input: Tensor, blocks: Sequence[Block]) -> bool:
    """Whether the operator takes these, from an input as it gets it, under autocast or not."""
    device, read = input.device.type, input
    if torch.is_autocast_enabled(device):
        cast = autocast_tensor(input, torch.get_autocast_dtype(device), device)
        assert cast is not None
        read = cast
    return read.dtype in DTYPES and checks.blocks_fit(read, blocks)


def fit(input: Tensor, blocks: Sequence[Block], copies: Sequence[BlockCopy]) -> bool:
    """`checks.blocks_fit`, remembered by the copies' serials."""
    key = (input.shape, input.dtype, input.device, *(copy.serial for copy in copies))
    if key in _fitting:
        return True
    if not checks.blocks_fit(input, blocks):
        return False
    if len(_fitting) >= _MOST_FITTING:
        _fitting.clear()
    _fitting.add(key)
    return True


def _run(
    input: Tensor, copies: Sequence[BlockCopy], ranges: Sequence[Sequence[Quantization]]
) -> Tensor:
    made = [copy.block for copy in copies]
    return quantized_residual_blocks(input, made, ranges[0][0], ranges[-1][-1])


def ranges_of(
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
    zero_points: Sequence[int],
) -> list[list[Quantization]]:
    """Of each block the ranges that the operator is called with, as it takes them."""
    stored = [Quantization(*one) for one in zip(steps, zero_points, strict=True)]
    ranges, first = [], 0
    for count, projection in zip(layer_counts, projections, strict=True):
        after = first + count - projection + 1
        ranges.append(stored[first:after])
        first = after
    return ranges


def _kernel(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
    zero_points: Sequence[int],
) -> Tensor:
    blocks = list(described_blocks(tensors, numbers, eps, layer_counts, projections))
    ranges = ranges_of(layer_counts, projections, steps, zero_points)
    copies = copies_of(blocks, ranges)
    for i, copy in enumerate(copies):
        if not copy.is_finite:
            raise ValueError(f"residual_blocks_int8: a parameter of block {i} is not finite")
    return _run(input.detach(), copies, ranges)


register_kernel("residual_blocks_int8", _kernel, operator_checks.residual_blocks_int8)


@register_fake("residual_blocks_int8", operator_checks.residual_blocks_int8)
def _fake(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
    zero_points: Sequence[int],
) -> Tensor:
    with torch.no_grad():
        return blocks_output(input, tensors, numbers, eps, layer_counts, projections)


def _autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(*arguments)


library.impl("residual_blocks_int8", _autograd, "Autograd")


def _cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    input, *rest = arguments
    return autocast_tensor(input, dtype, device_type), *rest


register_autocast("residual_blocks_int8", _cast)
