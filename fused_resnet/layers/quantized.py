"""Eight-bit blocks as data, and how they are made of float ones.

A real number x is stored as an unsigned byte q, x = (q - zero point) * step. What follows a ReLU
has zero point 0. Weights are signed bytes, one step a filter, no zero point. All steps are float32
numbers; they are worked out in float64 from correctly rounded operations only, so that every
machine gets the same.

In `float8_e4m3fn` a number x is stored as one of those with four significant bits, x = q * step, an
activation as a weight, and there is no zero point.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .description import ConvNorm, Pool

LARGEST = 255
"""The largest byte."""

LARGEST_WEIGHT = 127
"""The largest magnitude of an eight-bit weight: without -128 both signs reach alike."""

LARGEST_WORD = 127 * 256 + 127
"""The largest magnitude of sixteen bits in a stem: both parts of it are signed bytes then."""

WORD_ZERO_POINT = 128
"""The byte that stands for zero in either part of sixteen bits."""

LARGEST_REDUCTION = (2**31 - 1) // (LARGEST * 128)
"""Products in a sum that cannot leave 32 bits."""

LARGEST_POOL = (2**31 - 1) // LARGEST
"""Bytes in a sum that cannot."""


FLOAT8 = "float8_e4m3fn"
"""The other dtype beside "int8": one sign, four exponent and three mantissa bits, no infinity."""

EIGHT_BITS = ("int8", FLOAT8)
"""What a block's precision is called where it runs in eight bits."""

LARGEST_FLOAT8 = 448.0
"""The largest such number."""

SMALLEST_WEIGHT_STEP = 2.0**-120
"""The smallest step of a weight in `FLOAT8`, whose filter is then as good as zero."""


def float32(value: float) -> float:
    """The nearest float32 number, to even; an infinity beyond the largest."""
    return ctypes.c_float(value).value


class Quantization(NamedTuple):
    """How an activation is stored in bytes.

    Attributes:
        step: between neighbouring values, a float32 number above zero; in `FLOAT8` what a stored 1
            stands for.
        zero_point: the byte that stands for zero, 0 to 255; 0 in `FLOAT8`.
    """

    step: float
    zero_point: int = 0


class QuantizedConv(NamedTuple):
    """A convolution in eight bits and the norm behind it.

    Attributes:
        weight: (K, C / groups, R, S), int8 or, of a block in that, float8_e4m3fn.
        scale: (K,), float32: from a sum of products to steps of the output.
        shift: (K,), float32, in steps of the output.
        stride: two numbers, as are `padding` and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: how many groups the channels are in.
    """

    weight: Tensor
    scale: Tensor
    shift: Tensor
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class QuantizedBlock(NamedTuple):
    """A residual block in eight bits.

    Attributes:
        convs: its convolutions, then that of a projection, which writes in steps of the output too.
        has_projection: whether the last of them makes the shortcut from the block's input.
        shortcut_scale: from steps of the input to steps of the output, a float32 number; unused
            where there is a projection.
    """

    convs: tuple[QuantizedConv, ...]
    has_projection: bool
    shortcut_scale: float


class QuantizedStem(NamedTuple):
    """A network's first convolution in eight or sixteen bits, its norm, ReLU and max-pool.

    In sixteen bits a number n is `256 * upper + lower`, both from -128 to 127. The products of two
    lower parts are left out: in all, 2^-16 of the largest product each at most.

    Attributes:
        conv: in sixteen bits its weight is (K, 2 C, R, S): the weight's upper part for each input
            channel's upper part, which comes behind the channel's lower part.
        low: None in eight bits; the products of an upper and a lower part.
        pool: the max-pool.
    """

    conv: QuantizedConv
    low: QuantizedConv | None
    pool: Pool

    @property
    def convs(self) -> tuple[QuantizedConv, ...]:
        """What there is of both."""
        return (self.conv,) if self.low is None else (self.conv, self.low)


class QuantizedLinear(NamedTuple):
    """A classifier in eight bits: a linear layer behind a mean over pixels.

    Attributes:
        weight: (K, C), int8, contiguous.
        scale: (K,), float32: from a sum of products to a logit.
        bias: (K,), float32, added to that.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (K, C, R, S) or (K, C) in eight bits, and each filter's step (K,), float64.

    A filter of zeros has step 1; one with a value that is not finite has a step that is not.
    """
    values = weight.detach().double()
    largest = values.abs().flatten(1).amax(1)
    step = torch.where(largest == 0, 1.0, largest / LARGEST_WEIGHT)
    steps = values / step.view(-1, *[1] * (weight.dim() - 1))
    return steps.round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT).to(torch.int8), step


def float8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (K, C, R, S) in float8_e4m3fn, and each filter's step (K,), float64.

    The quotient by the step is rounded to float32 and then, to nearest even, to four bits. What
    `quantized_weight` says of zeros and of what is not finite holds here.
    """
    values = weight.detach().double()
    largest = values.abs().flatten(1).amax(1)
    step = torch.where(largest < SMALLEST_WEIGHT_STEP, 1.0, largest / LARGEST_FLOAT8)
    steps = (values / step.view(-1, 1, 1, 1)).float()
    return steps.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn), step


def quantized_conv(
    layer: ConvNorm,
    input: Quantization,
    output: Quantization,
    other_shift: Tensor | None = None,
    dtype: str = "int8",
) -> QuantizedConv:
    """A layer in eight bits.

    Its sums are `sum (q - zero point) * weight`, exact integers; a sum times `scale` plus `shift`
    is the norm's output in steps of `output`.

    Args:
        layer: with finite parameters.
        input: how it reads.
        output: how what follows it is stored.
        other_shift: (K,), float64, real numbers to be added: a projection's.
        dtype: "int8" or `FLOAT8`.

    Returns:
        The layer; its tensors are on the weight's device.
    """
    weight, step = (float8_weight if dtype == FLOAT8 else quantized_weight)(layer.weight)
    norm_scale, norm_shift = norm_vectors(layer)
    if other_shift is not None:
        norm_shift = norm_shift + other_shift
    scale = step * input.step * norm_scale / output.step
    shift = norm_shift / output.step
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
    return QuantizedConv(weight, scale.float(), shift.float(), *geometry)


def quantized_stem(
    layer: ConvNorm, pool: Pool, bits: int, input: Quantization, output: Quantization
) -> QuantizedStem:
    """A stem in eight or sixteen bits.

    Args:
        layer: with finite parameters and one group.
        pool: behind its ReLU.
        bits: 8 or 16, of the input and the weight.
        input: how it reads; in sixteen bits with `WORD_ZERO_POINT`.
        output: how what it writes is stored.
    """
    if bits == 8:
        return QuantizedStem(quantized_conv(layer, input, output), None, pool)
    values = layer.weight.detach().double()
    largest = values.abs().flatten(1).amax(1)
    step = torch.where(largest == 0, 1.0, largest / LARGEST_WORD)
    words = (values / step.view(-1, 1, 1, 1)).round().clamp(-LARGEST_WORD, LARGEST_WORD)
    upper, lower = word_parts(words)
    norm_scale, norm_shift = norm_vectors(layer)
    scale = step * input.step * norm_scale / output.step
    shift = norm_shift / output.step
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def conv(of_lower: Tensor, of_upper: Tensor, unit: int, shift: Tensor) -> QuantizedConv:
        weight = interleaved(of_lower, of_upper).to(torch.int8)
        return QuantizedConv(weight, (scale * unit).float(), shift.float(), *geometry)

    zero = torch.zeros_like(upper)
    return QuantizedStem(
        conv(zero, upper, 256 * 256, shift),
        conv(upper, lower, 256, torch.zeros_like(shift)),
        pool,
    )


def quantized_linear(weight: Tensor, bias: Tensor | None, pooled: Quantization) -> QuantizedLinear:
    """A classifier in eight bits.

    Args:
        weight: (K, C), finite.
        bias: (K,), finite, or None.
        pooled: how it reads the means over an image's pixels; its zero point is 0.
    """
    values, step = quantized_weight(weight)
    scale = (step * pooled.step).float()
    added = torch.zeros_like(scale) if bias is None else bias.detach().float()
    return QuantizedLinear(values.contiguous(), scale, added)


def pool_factor(stored: Quantization, pooled: Quantization, pixels: int) -> float:
    """From the sum of an image's bytes to steps of their mean, a float32 number."""
    return float32(stored.step / (pixels * pooled.step))


def word_parts(words: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower part of whole numbers: `256 * upper + lower`."""
    upper = ((words + 128) / 256).floor()
    return upper, words - 256 * upper


def interleaved(lower: Tensor, upper: Tensor) -> Tensor:
    """(N, 2 C, H, W) of two tensors (N, C, H, W): each channel's lower part, then its upper."""
    return torch.stack([lower, upper], 2).flatten(1, 2)


def norm_vectors(layer: ConvNorm) -> tuple[Tensor, Tensor]:
    """What a layer's norm multiplies the convolution's sum by, and adds: (K,) each, float64."""
    mean, var, weight, bias, eps = layer.norm
    scale = 1 / (var.detach().double() + eps).sqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean.detach().double()
    if layer.bias is not None:
        shift = shift + layer.bias.detach().double()
    shift = shift * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    return scale, shift


def quantized_block(
    layers: Sequence[ConvNorm],
    has_projection: bool,
    ranges: Sequence[Quantization],
    dtype: str = "int8",
) -> QuantizedBlock:
    """A block in eight bits.

    Args:
        layers: its convolutions, then that of a projection.
        has_projection: whether there is one.
        ranges: of its input, of what each convolution but the last writes, of its output.
        dtype: see `quantized_conv`.
    """
    main = layers[:-1] if has_projection else layers
    input, output = ranges[0], ranges[-1]
    other_shift = norm_vectors(layers[-1])[1] if has_projection else None
    convs = []
    for i, layer in enumerate(main):
        shift = other_shift if i == len(main) - 1 else None
        convs.append(quantized_conv(layer, ranges[i], ranges[i + 1], shift, dtype))
    if has_projection:
        projection = quantized_conv(layers[-1], input, output, dtype=dtype)
        convs.append(projection._replace(shift=torch.zeros_like(projection.shift)))
    return QuantizedBlock(tuple(convs), has_projection, float32(input.step / output.step))


TENSORS = 3  # a convolution's: weight, scale, shift
NUMBERS = 7  # stride, padding and dilation, two each, and groups


def flat_blocks(
    blocks: Sequence[QuantizedBlock],
) -> tuple[list[Tensor], list[int], list[int], list[bool], list[float]]:
    """Tensors, numbers, layer counts, projections and shortcut scales, as the operator has them."""
    tensors: list[Tensor] = []
    numbers: list[int] = []
    for block in blocks:
        for weight, scale, shift, stride, padding, dilation, groups in block.convs:
            tensors += (weight, scale, shift)
            numbers += (*stride, *padding, *dilation, groups)
    counts = [len(block.convs) for block in blocks]
    projections = [block.has_projection for block in blocks]
    return tensors, numbers, counts, projections, [block.shortcut_scale for block in blocks]


def blocks_of(
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    shortcut_scales: Sequence[float],
) -> list[QuantizedBlock]:
    """The blocks that have these for their `flat_blocks`."""
    convs = []
    for i in range(sum(layer_counts)):
        weight, scale, shift = tensors[TENSORS * i : TENSORS * (i + 1)]
        n = numbers[NUMBERS * i : NUMBERS * (i + 1)]
        convs.append(QuantizedConv(weight, scale, shift, n[0:2], n[2:4], n[4:6], n[6]))
    blocks, first = [], 0
    for count, projection, shortcut in zip(layer_counts, projections, shortcut_scales, strict=True):
        blocks.append(
            QuantizedBlock(tuple(convs[first : first + count]), bool(projection), shortcut)
        )
        first += count
    return blocks


def blocks_error(
    name: str,
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
) -> ValueError | TypeError | None:
    """What is wrong with the arguments of `quantized_residual_blocks`, or None."""
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return TypeError(
            f"{name}: input has dtype {input.dtype}, must be one of float32, float16, bfloat16"
        )
    if input.dim() != 4:
        return ValueError(f"{name}: input has shape {tuple(input.shape)}, must be (N, C, H, W)")
    if not blocks:
        return ValueError(f"{name}: there is no block")
    for what, one in (("step", stored), ("output_step", output)):
        if not (math.isfinite(one.step) and one.step > 0):
            return ValueError(f"{name}: {what} is {one.step}, must be finite and above zero")
    if not 0 <= stored.zero_point <= LARGEST:
        return ValueError(f"{name}: zero_point is {stored.zero_point}, must be 0 to {LARGEST}")
    shape = tuple(input.shape)
    for i, block in enumerate(blocks):
        main = len(block.convs) - block.has_projection
        if main < 1:
            return ValueError(f"{name}: block {i} has no convolution beside the shortcut's")
        if not math.isfinite(block.shortcut_scale):
            return ValueError(f"{name}: block {i} has shortcut_scale {block.shortcut_scale}")
        first, shortcut = shape, shape
        for j, conv in enumerate(block.convs):
            before = first if j in (0, main) else shape
            error, after = _conv_error(f"{name}: block {i}, convolution {j}", input, before, conv)
            if error is not None:
                return error
            if j < main:
                shape = after
            else:
                shortcut = after
        if shape != shortcut:
            return ValueError(
                f"{name}: block {i}: the shortcut has shape {shortcut}, the last convolution's "
                f"output {shape}"
            )
    return None


def _conv_error(
    name: str, input: Tensor, shape: tuple[int, ...], conv: QuantizedConv
) -> tuple[ValueError | TypeError | None, tuple[int, ...]]:
    """What is wrong with a convolution of an input of this shape, and its output's shape."""
    weight = conv.weight
    if weight.dtype is not torch.int8 or weight.dim() != 4 or weight.numel() == 0:
        got = f"{weight.dtype} of shape {tuple(weight.shape)}"
        return TypeError(f"{name}: weight is {got}, must be int8 (K, C / groups, R, S)"), ()
    K, C, R, S = weight.shape
    if conv.groups < 1 or K % conv.groups != 0 or shape[1] != C * conv.groups:
        return ValueError(
            f"{name}: weight has {C} input channels and {K} filters, input has {shape[1]} "
            f"channels (groups={conv.groups})"
        ), ()
    if C * R * S > LARGEST_REDUCTION:
        return ValueError(
            f"{name}: weight has {C * R * S} values a filter, must have at most "
            f"{LARGEST_REDUCTION} for sums of 32 bits"
        ), ()
    for what, vector in (("scale", conv.scale), ("shift", conv.shift)):
        if vector.dtype is not torch.float32 or tuple(vector.shape) != (K,):
            got = f"{vector.dtype} of shape {tuple(vector.shape)}"
            return TypeError(f"{name}: {what} is {got}, must be float32 ({K},)"), ()
    for tensor in (weight, conv.scale, conv.shift):
        if tensor.device != input.device:
            return ValueError(
                f"{name}: a parameter is on {tensor.device}, input is on {input.device}"
            ), ()
    sizes = []
    for size, r, s, p, d in zip(
        shape[2:], (R, S), conv.stride, conv.padding, conv.dilation, strict=True
    ):
        if s < 1 or d < 1 or p < 0 or max(s, p, d) >= 2**31:
            return ValueError(f"{name}: stride {s}, padding {p} or dilation {d} out of range"), ()
        covered = size + 2 * p - d * (r - 1)
        if covered < 1:
            return ValueError(
                f"{name}: a filter of {r} (dilation {d}) is larger than the padded input, "
                f"{size + 2 * p}"
            ), ()
        sizes.append((covered - 1) // s + 1)
    return None, (shape[0], K, *sizes)
