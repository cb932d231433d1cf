"""`residual_blocks_float8`: residual blocks in float8_e4m3fn, from their parameters.

Inference only: its output has no gradient. It computes `reference.float8_residual_blocks` of what
`layers/quantized.py` makes of the parameters, as `residual_blocks_int8` does in integers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..layers.description import Block, described_blocks, flattened_blocks, tensors_of
from ..layers.quantized import FLOAT8, Quantization
from ..layers.quantized_copies import BlockCopy, copies_of
from . import operator_checks
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
from .residual_blocks_int8 import DTYPES, are_covered, are_short, fit, ranges_of

library.define(
    "residual_blocks_float8(Tensor input, Tensor?[] tensors, int[] numbers, float[] eps, "
    "int[] layer_counts, bool[] projections, float[] steps) -> Tensor"
)
_operator = torch.ops.fused_resnet.residual_blocks_float8.default


def residual_blocks_float8(
    input: Tensor, blocks: Sequence[Block], ranges: Sequence[Sequence[Quantization]]
) -> Tensor | None:
    """Each block on the output of the last, in float8_e4m3fn between.

    Args:
        input: (N, C, H, W), of the first block.
        blocks: see `Block`; none pads its shortcut.
        ranges: see `residual_blocks_int8`; without zero points.

    Returns:
        (N, K, P, Q) in the dtype of `input` (under autocast, in autocast's), or None where
        `residual_blocks_int8` returns that.
    """
    if not are_short(blocks):
        return None
    tensors = tensors_of(blocks)
    if not nothing_intercepts(input, *tensors):
        if has_foreign(input, *tensors) or not are_covered(input, blocks):
            return None
        steps = [one.step for own in ranges for one in own]
        return _operator(input, *flattened_blocks(blocks), steps)
    if input.dtype not in DTYPES:
        return None
    copies = copies_of(blocks, ranges, FLOAT8)
    if not all(copy.is_finite for copy in copies) or not fit(input, blocks, copies):
        return None
    return _run(input.detach(), copies, ranges)


def _run(
    input: Tensor, copies: Sequence[BlockCopy], ranges: Sequence[Sequence[Quantization]]
) -> Tensor:
    arguments = (input, [copy.block for copy in copies], ranges[0][0], ranges[-1][-1])
    if has_foreign(input):
        return reference.float8_residual_blocks(*arguments)
    with torch.no_grad():
        return backends.choose(input.device.type).float8_residual_blocks(*arguments)


def _kernel(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
) -> Tensor:
    blocks = list(described_blocks(tensors, numbers, eps, layer_counts, projections))
    ranges = ranges_of(layer_counts, projections, steps, [0] * len(steps))
    copies = copies_of(blocks, ranges, FLOAT8)
    for i, copy in enumerate(copies):
        if not copy.is_finite:
            raise ValueError(f"residual_blocks_float8: a parameter of block {i} is not finite")
    return _run(input.detach(), copies, ranges)


register_kernel("residual_blocks_float8", _kernel, operator_checks.residual_blocks_float8)


@register_fake("residual_blocks_float8", operator_checks.residual_blocks_float8)
def _fake(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
) -> Tensor:
    with torch.no_grad():
        return blocks_output(input, tensors, numbers, eps, layer_counts, projections)


def _autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(*arguments)


library.impl("residual_blocks_float8", _autograd, "Autograd")


def _cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    input, *rest = arguments
    return autocast_tensor(input, dtype, device_type), *rest


register_autocast("residual_blocks_float8", _cast)
