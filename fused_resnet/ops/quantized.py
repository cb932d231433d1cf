"""`quantized_residual_blocks`: residual blocks in eight bits, in one call.

Inference only: its output has no gradient. See `reference.quantized_residual_blocks` for what it
computes; every backend computes the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends, reference
from ..layers.quantized import Quantization, QuantizedBlock, blocks_of, flat_blocks
from . import operator_checks
from .registration import has_foreign, library, nothing_intercepts, register_fake, register_kernel

library.define(
    "quantized_residual_blocks(Tensor input, Tensor[] tensors, int[] numbers, int[] layer_counts, "
    "bool[] projections, float[] shortcut_scales, float step, int zero_point, float output_step) "
    "-> Tensor"
)
_operator = torch.ops.fused_resnet.quantized_residual_blocks.default


def quantized_residual_blocks(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
) -> Tensor:
    """The operator. See `reference.quantized_residual_blocks`; the blocks fit each other.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16.
        blocks: see `layers/quantized.py`.
        stored: how the input is quantized.
        output: how the last block's output is read; its zero point is 0.

    Returns:
        (N, K, P, Q) in the dtype of `input`.
    """
    if has_foreign(input):
        return reference.quantized_residual_blocks(input, blocks, stored, output)
    if nothing_intercepts(input):
        with torch.no_grad():
            backend = backends.choose(input.device.type)
            return backend.quantized_residual_blocks(input, blocks, stored, output)
    return _operator(input, *flat_blocks(blocks), *stored, output.step)


def _kernel(
    input: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    shortcut_scales: Sequence[float],
    step: float,
    zero_point: int,
    output_step: float,
) -> Tensor:
    blocks = blocks_of(tensors, numbers, layer_counts, projections, shortcut_scales)
    backend = backends.choose(input.device.type)
    stored, output = Quantization(step, zero_point), Quantization(output_step)
    return backend.quantized_residual_blocks(input, blocks, stored, output)


register_kernel("quantized_residual_blocks", _kernel, operator_checks.quantized_residual_blocks)


@register_fake("quantized_residual_blocks", operator_checks.quantized_residual_blocks)
def _fake(
    input: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    shortcut_scales: Sequence[float],
    step: float,
    zero_point: int,
    output_step: float,
) -> Tensor:
    blocks = blocks_of(tensors, numbers, layer_counts, projections, shortcut_scales)
    out = input
    for block in blocks:
        for conv in block.convs[:-1] if block.has_projection else block.convs:
            weight = conv.weight.to(input.dtype)
            geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
            out = torch.conv2d(out, weight, None, *geometry)
    return out
