"""The operators in torch's own: a table for exported programs that go where nobody knows ours.

    program = torch.export.export(model, (x,)).run_decompositions(fused_resnet.decompositions())

A convolution with what is fused into it becomes `conv2d`, `batch_norm`, `add` and `relu` again, as
the model before `fuse` has them, so that converters find the patterns they look for. Nothing is
left of the detours of `layers/convolution.py`, which are for torch's own kernels.

In eight bits a block becomes what PT2E makes of one: `quantize_per_tensor` and
`dequantize_per_tensor` of the library `quantized_decomposed` wherever an activation is stored,
`dequantize_per_channel` of weights with their norm's scale folded into the step, and convolutions
in float32 between. Runtimes turn these into integer kernels, whose sums are exact; as written, a
sum in float32 that lies at half a step may be rounded to the other side of it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..layers.description import ConvNorm, Norm, conv_norm_of, described_blocks
from ..layers.quantized import (
    FLOAT8,
    LARGEST,
    LARGEST_WEIGHT,
    LARGEST_WORD,
    Quantization,
    blocks_of,
    norm_vectors,
    quantized_block,
    quantized_weight,
)
from .registration import library
from .residual_blocks_int8 import ranges_of


def decompositions() -> dict[torch._ops.OpOverload, Callable[..., Any]]:
    """What each operator is in torch's own, for `ExportedProgram.run_decompositions`.

    With this table alone `conv2d`, `max_pool2d` and the like stay. With torch's own as well the
    program is one of core operators:

        table = torch.export.default_decompositions()
        table.update(fused_resnet.decompositions())

    Returns:
        A new table of all operators that exported programs may hold.
    """
    operators = getattr(torch.ops, library.ns)
    return {getattr(operators, name).default: function for name, function in _TABLE.items()}


def _norm(out: Tensor, norm: Norm) -> Tensor:
    """The core operator that `batch_norm` in eval mode decomposes to; a momentum has no effect."""
    mean, var, weight, bias, eps = norm
    operator = torch.ops.aten._native_batch_norm_legit_no_training.default
    return operator(out, weight, bias, mean, var, 0.1, eps)[0]


def _conv_norm(input: Tensor, layer: ConvNorm) -> Tensor:
    weight, norm, bias, stride, padding, dilation, groups = layer
    return _norm(torch.conv2d(input, weight, bias, stride, padding, dilation, groups), norm)


def _max_pool(out: Tensor, pool: Sequence[Sequence[int]]) -> Tensor:
    kernel_size, stride, padding = map(list, pool)
    return F.max_pool2d(out, kernel_size, stride, padding)


def _conv_bn_act(input: Tensor, *arguments: Any) -> Tensor:
    *layer, residual, activation = arguments
    out = _conv_norm(input, conv_norm_of(layer))
    return reference.add_act(out, residual, activation)


def _conv_bn_act_max_pool(input: Tensor, *arguments: Any) -> Tensor:
    layer, activation, pool = arguments[:11], arguments[11], arguments[12:]
    out = _conv_bn_act(input, *layer, None, activation)
    return _max_pool(out, pool)


def _norm_conv_bn_act(input: Tensor, *arguments: Any) -> Tensor:
    before, rest = Norm(*arguments[:5]), arguments[5:]
    return _conv_bn_act(torch.relu(_norm(input, before)), *rest)


def _batch_norm_act_inference(input: Tensor, *arguments: Any) -> Tensor:
    *norm, residual, activation = arguments
    return reference.add_act(_norm(input, Norm(*norm)), residual, activation)


def _residual_blocks(input: Tensor, *flat: Any) -> Tensor:
    for block in described_blocks(*flat):
        shortcut = input
        if block.projection is not None:
            shortcut = _conv_norm(input, block.projection)
        *first, last = block.main
        for layer in first:
            input = torch.relu(_conv_norm(input, layer))
        input = torch.relu(_conv_norm(input, last) + shortcut)
    return input


def _batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    values = input.to(torch.float64 if input.dtype is torch.float64 else torch.float32)
    var, mean = torch.var_mean(values, [0, *range(2, input.dim())], correction=0)
    out = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
    return reference.add_act(out, residual, activation), mean, var


class _Stored:
    """Activations as PT2E stores them, with the operators that `torch.ao` defines."""

    def __init__(self) -> None:
        importlib.import_module("torch.ao.quantization.fx._decomposed")
        self._operators = torch.ops.quantized_decomposed

    def activation(self, values: Tensor, stored: Quantization) -> Tensor:
        """float32 values, in the 256 steps of a range."""
        how = (stored.step, stored.zero_point, 0, LARGEST, torch.uint8)
        stored_values = self._operators.quantize_per_tensor.default(values.float(), *how)
        return self._operators.dequantize_per_tensor.default(stored_values, *how)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Of such values by a weight in eight bits."""
        values, step = quantized_weight(weight)
        bias = None if bias is None else bias.float()
        return F.linear(input, self._weight(values, step), bias)

    def conv_norm(self, input: Tensor, layer: ConvNorm) -> Tensor:
        """The convolution of such values by a weight in eight bits, and its norm.

        A step times the norm's scale is a step again, once the scale's sign is the weight's.
        """
        weight, step = quantized_weight(layer.weight)
        scale, shift = norm_vectors(layer)
        weight = weight * scale.sign().view(-1, 1, 1, 1).to(torch.int8)
        step = torch.where(scale == 0, step, step * scale.abs())
        return torch.conv2d(input, self._weight(weight, step), shift.float(), *layer[3:])

    def _weight(self, values: Tensor, step: Tensor) -> Tensor:
        zero_points = torch.zeros_like(step, dtype=torch.int64)
        how = (0, -LARGEST_WEIGHT, LARGEST_WEIGHT, torch.int8)
        return self._operators.dequantize_per_channel.default(
            values, step.float(), zero_points, *how
        )


def _residual_blocks_int8(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
    zero_points: Sequence[int],
) -> Tensor:
    blocks = described_blocks(tensors, numbers, eps, layer_counts, projections)
    ranges = ranges_of(layer_counts, projections, steps, zero_points)
    stored = _Stored()
    out = stored.activation(input, ranges[0][0])
    for block, own in zip(blocks, ranges, strict=True):
        shortcut = out
        if block.projection is not None:
            shortcut = stored.conv_norm(out, block.projection)
        *first, last = block.main
        for layer, behind in zip(first, own[1:-1], strict=True):
            out = stored.activation(torch.relu(stored.conv_norm(out, layer)), behind)
        out = stored.activation(torch.relu(stored.conv_norm(out, last) + shortcut), own[-1])
    return out.to(input.dtype)


def _conv_bn_act_max_pool_int8(input: Tensor, *arguments: Any) -> Tensor:
    layer, pool = conv_norm_of(arguments[:11]), arguments[11:14]
    bits, step, zero_point, output_step = arguments[14:]
    stored = _Stored()
    if bits == 8:
        out = stored.conv_norm(stored.activation(input, Quantization(step, zero_point)), layer)
    else:
        values = layer.weight.double()
        largest = values.abs().flatten(1).amax(1).view(-1, 1, 1, 1)
        steps = torch.where(largest == 0, 1.0, largest / LARGEST_WORD)
        scale, shift = norm_vectors(layer)
        weight = (values / steps).round() * steps * scale.view(-1, 1, 1, 1)
        words = (input.float() / step).round().clamp(-LARGEST_WORD, LARGEST_WORD) * step
        out = torch.conv2d(words, weight.float(), shift.float(), *layer[3:])
    out = stored.activation(torch.relu(out), Quantization(output_step))
    return _max_pool(out, pool).to(input.dtype)


def _pool_linear_int8(
    input: Tensor, weight: Tensor, bias: Tensor | None, step: float, pooled_step: float
) -> Tensor:
    stored = _Stored()
    means = F.adaptive_avg_pool2d(stored.activation(input, Quantization(step)), 1).flatten(1)
    means = stored.activation(means, Quantization(pooled_step))
    return stored.linear(means, weight, bias).to(input.dtype)


def _residual_blocks_float8(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
) -> Tensor:
    blocks = described_blocks(tensors, numbers, eps, layer_counts, projections)
    ranges = ranges_of(layer_counts, projections, steps, [0] * len(steps))
    made = [
        quantized_block(block.layers, block.projection is not None, own, FLOAT8)
        for block, own in zip(blocks, ranges, strict=True)
    ]
    return reference.float8_residual_blocks(input, made, ranges[0][0], ranges[-1][-1])


def _quantized_residual_blocks(input: Tensor, *arguments: Any) -> Tensor:
    blocks = blocks_of(*arguments[:5])
    step, zero_point, output_step = arguments[5:]
    stored, output = Quantization(step, zero_point), Quantization(output_step)
    return reference.quantized_residual_blocks(input, blocks, stored, output)


_TABLE: dict[str, Callable[..., Any]] = {
    "batch_norm_act_inference": _batch_norm_act_inference,
    "batch_norm_act_training": _batch_norm_act_training,
    "conv_bn_act": _conv_bn_act,
    "conv_bn_act_max_pool": _conv_bn_act_max_pool,
    "conv_bn_act_max_pool_int8": _conv_bn_act_max_pool_int8,
    "norm_conv_bn_act": _norm_conv_bn_act,
    "pool_linear_int8": _pool_linear_int8,
    "quantized_residual_blocks": _quantized_residual_blocks,
    "residual_blocks": _residual_blocks,
    "residual_blocks_float8": _residual_blocks_float8,
    "residual_blocks_int8": _residual_blocks_int8,
    "scale_shift_act": reference.scale_shift_act,
}
