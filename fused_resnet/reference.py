"""What every operator means, in plain PyTorch.

These functions are the specification the backends are tested against, and what runs where no kernel
does. They are as differentiable, traceable and transformable as the torch functions they call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layers.activation import applied
from .layers.convolution import conv2d
from .layers.description import GATES, SqueezeExcitation
from .layers.quantized import (
    LARGEST,
    LARGEST_FLOAT8,
    LARGEST_WORD,
    Quantization,
    QuantizedBlock,
    QuantizedConv,
    QuantizedLinear,
    QuantizedStem,
    float32,
    interleaved,
    pool_factor,
    word_parts,
)


def pad_channels(residual: Tensor, channels: int) -> Tensor:
    """`residual` (N, C, *) between zeros, half of the added channels before it, rounded down."""
    added = channels - residual.size(1)
    if added == 0:
        return residual
    return F.pad(residual, (*[0, 0] * (residual.dim() - 2), added // 2, added - added // 2))


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`, and the operator behind it with an eps of 0, which torch 2.11 refuses."""
    if eps > 0:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    parameters = (weight, bias, running_mean, running_var)
    return torch.batch_norm(input, *parameters, training, momentum, eps, False)


def add_act(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """`activation(input + pad_channels(residual))`; see `layers/activation.py` for what there are.

    Kernels compute both in float32 (float64 for float64) and round once, at the end.
    """
    if residual is not None:
        input = input + pad_channels(residual, input.size(1))
    return applied(input, activation)


def scale_shift_act(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """`activation(input * scale[c] + shift[c] + residual)` with one rounding.

    Args:
        input: (N, C, *).
        scale: (C,), float64 for a float64 input and float32 for any other.
        shift: as `scale`.
        residual: as `input`, or with fewer channels, see `pad_channels`, or None.
        activation: "relu" or "none".

    Returns:
        As `input`.
    """
    per_channel = (1, -1) + (1,) * (input.dim() - 2)
    out = input.to(scale.dtype) * scale.view(per_channel) + shift.view(per_channel)
    return add_act(out, residual, activation).to(input.dtype)


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """`activation(batch_norm(conv2d(input, weight, bias)) + residual)`, running statistics.

    Shapes and dtypes are those of `functional.conv_bn_act`.
    """
    out = conv2d(input, weight, bias, stride, padding, dilation, groups)
    out = batch_norm(out, running_mean, running_var, bn_weight, bn_bias, eps=eps)
    return add_act(out, residual, activation)


def norm_conv_bn_act(
    input: Tensor,
    in_mean: Tensor,
    in_var: Tensor,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
    *arguments: Any,
) -> Tensor:
    """`conv_bn_act(relu(batch_norm(input)), ...)`, running statistics in both.

    Args:
        input: (N, C, H, W).
        in_mean: (C,), of the norm before the convolution, as are the next four.
        in_var: (C,).
        in_weight: (C,) or None.
        in_bias: (C,) or None.
        in_eps: added to `in_var`.
        *arguments: those of `conv_bn_act` from `weight` on.

    Returns:
        What `conv_bn_act` does. The normalised input is rounded to the dtype of `input`, and the
        zeros of the convolution's padding are beside it, not beside `input`.
    """
    norm = (in_mean, in_var, in_weight, in_bias)
    normalised = torch.relu(batch_norm(input, *norm, eps=in_eps))
    return conv_bn_act(normalised, *arguments)


def conv_bn_act_max_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """`max_pool2d(conv_bn_act(...))`: a residual network's stem."""
    out = conv_bn_act(
        input,
        weight,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        eps,
        bias,
        stride,
        padding,
        dilation,
        groups,
        None,
        activation,
    )
    return F.max_pool2d(out, tuple(pool_kernel_size), tuple(pool_stride), tuple(pool_padding))


def squeeze_excitation(input: Tensor, layers: SqueezeExcitation) -> Tensor:
    """The input (N, C, H, W) with each image's channels times their factors: see the layers."""
    factors = F.conv2d(input.mean((2, 3), keepdim=True), layers.reduce, layers.reduce_bias)
    factors = applied(factors, layers.activation)
    factors = F.conv2d(factors, layers.expand, layers.expand_bias)
    gate = torch.sigmoid if layers.gate == GATES[0] else F.hardsigmoid
    return input * gate(factors)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """`activation(F.batch_norm(input, ...) + residual)`; updates the statistics when training."""
    out = batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return add_act(out, residual, activation)


def batch_norm_act_inference(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`batch_norm_act` with the running statistics."""
    return batch_norm_act(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        eps=eps,
        residual=residual,
        activation=activation,
    )


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`batch_norm_act` when training, and the batch's mean and biased variance.

    The statistics are float64 for a float64 input and float32 for any other.
    """
    dims = (0, *range(2, input.dim()))
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    values = input.to(dtype)
    mean = values.mean(dims, keepdim=True)
    var = (values - mean).square().mean(dims)
    # Without any, a 16-bit input's statistics would be rounded to 16 bits.
    affine = weight if weight is not None else bias
    scratch = input.new_zeros(input.size(1), dtype=dtype if affine is None else affine.dtype)
    out = batch_norm(input, scratch, scratch.clone(), weight, bias, True, 0.0, eps)
    return add_act(out, residual, activation), mean.flatten(), var


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel.

    They are (C,), float64 for a float64 input and float32 for any other, and zero of no values.
    """
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    if input.numel() == 0:
        return tuple(input.new_zeros(2, input.size(1), dtype=dtype))
    dims = (0, *range(2, input.dim()))
    values = input.to(dtype)
    mean = values.mean(dims, keepdim=True)
    return mean.flatten(), (values - mean).square().mean(dims)


def combine_statistics(mean: Tensor, var: Tensor, count: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of all parts of a batch from those of each.

    Chan, Golub and LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", for more than two parts: deviations are taken from the common mean, and no square of
    a mean is subtracted from another.

    Args:
        mean: (parts, C), float64.
        var: (parts, C), biased, float64.
        count: (parts,), values a channel, float64; where it is 0 the rest is 0 too.

    Returns:
        Mean (C,), biased variance (C,) and count (); zeros if no part has a value.
    """
    total = count.sum()
    share = (count / total.clamp(min=1)).unsqueeze(1)
    common = (share * mean).sum(0)
    return common, (share * (var + (mean - common).square())).sum(0), total


def batch_norm_act_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`sum(g)` and `sum(g (input - mean))` of each channel.

    g is the gradient before the activation. It passes where `output`, which may be None if there
    was no residual and is then computed again, is above zero or NaN.
    """
    g = _before_act(grad, input, output, mean, var, weight, bias, eps, activation).to(mean.dtype)
    dims = (0, *range(2, input.dim()))
    centred = input.to(mean.dtype) - _per_channel(mean, input)
    return g.sum(dims), (g * centred).sum(dims)


def batch_norm_act_backward_input(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
    total: Tensor,
    dot: Tensor,
    count: Tensor | float,
    need_residual: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gradients in the input and the residual, given the sums over all `count` values a channel.

    `scale (g - total / count - (input - mean) dot / (count (var + eps)))` with
    `scale = weight / sqrt(var + eps)`, and g, see `batch_norm_act_backward_sums`.
    """
    g = _before_act(grad, input, output, mean, var, weight, bias, eps, activation)
    invstd = (var + eps).rsqrt()
    scale = invstd if weight is None else invstd * weight.to(mean.dtype)
    slope = dot / count * invstd.square()
    centred = input.to(mean.dtype) - _per_channel(mean, input)
    grad_input = g.to(mean.dtype) - _per_channel(total / count, input)
    grad_input = (grad_input - centred * _per_channel(slope, input)) * _per_channel(scale, input)
    return grad_input.to(grad.dtype), g if need_residual else None


def _before_act(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    if activation == "none":
        return grad
    if output is None:
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else scale * weight.to(mean.dtype)
        shift = -mean * scale if bias is None else bias.to(mean.dtype) - mean * scale
        output = scale_shift_act(input, scale, shift, None, activation)
    return torch.ops.aten.threshold_backward(grad, output, 0)


def _per_channel(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(1, -1, *[1] * (like.dim() - 2))


def quantize(input: Tensor, stored: Quantization) -> Tensor:
    """`clamp(round(input / step) + zero_point, 0, 255)`, to nearest even, as bytes.

    The quotient is the float32 product with the float32 inverse of the step. NaN becomes 0.

    Args:
        input: any floating-point tensor.
        stored: how.

    Returns:
        As `input`, uint8.
    """
    inverse = float32(1 / stored.step)
    steps = input.float() * inverse
    return _bytes(torch.where(steps.isnan(), -torch.inf, steps), -stored.zero_point, stored)


def dequantize(input: Tensor, stored: Quantization, dtype: torch.dtype) -> Tensor:
    """`(input - zero_point) * step`, a float32 product, in `dtype`."""
    return ((input.float() - stored.zero_point) * stored.step).to(dtype)


def _bytes(steps: Tensor, least: float, stored: Quantization) -> Tensor:
    steps = steps.clamp(least, LARGEST - stored.zero_point).round()
    return (steps + stored.zero_point).to(torch.uint8)


def quantized_sums(input: Tensor, zero_point: int, conv: QuantizedConv) -> Tensor:
    """`conv2d(input - zero_point, weight)`, exact.

    Args:
        input: (N, C, H, W), uint8.
        zero_point: of `input`; the padding is zeros behind the subtraction.
        conv: the convolution. Its sums are below 2^31 in magnitude.

    Returns:
        (N, K, P, Q), the integers rounded to float32.
    """
    # Integers and all their partial sums are exact in float64, in any order.
    values = input.double() - zero_point
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.conv2d(values, conv.weight.double(), None, *geometry).float()


def quantized_residual_blocks(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
) -> Tensor:
    """Residual blocks in eight bits, one on the output of the other.

    Of a block, h[0] its input, each product and each sum a float32 rounded on its own:

        h[i] = clamp(round(sums(h[i-1]) * scale + shift), 0, 255)  for all but the last,
        out  = clamp(round(sums(h) * scale + shift + shortcut), 0, 255),
        shortcut = (h[0] - zero_point) * shortcut_scale, or sums(h[0]) * scale of a projection.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16.
        blocks: see `layers/quantized.py`.
        stored: how `input` is quantized.
        output: how the last block's output is to be read; its zero point is 0.

    Returns:
        (N, K, P, Q) in the dtype of `input`.
    """
    values, zero_point = quantize(input, stored), stored.zero_point
    per_channel = (1, -1, 1, 1)

    def scaled(values: Tensor, conv: QuantizedConv) -> Tensor:
        return quantized_sums(values, zero_point, conv) * conv.scale.view(per_channel)

    for block in blocks:
        *convs, last = block.convs[:-1] if block.has_projection else block.convs
        if block.has_projection:
            shortcut = scaled(values, block.convs[-1])
        else:
            shortcut = (values.float() - zero_point) * block.shortcut_scale
        for conv in convs:
            steps = scaled(values, conv) + conv.shift.view(per_channel)
            values, zero_point = _bytes(steps, 0, output), 0
        steps = scaled(values, last) + last.shift.view(per_channel) + shortcut
        values, zero_point = _bytes(steps, 0, output), 0
    return dequantize(values, output, input.dtype)


def quantized_pool_linear(
    input: Tensor, linear: QuantizedLinear, stored: Quantization, pooled: Quantization
) -> Tensor:
    """A network's classifier in eight bits.

    With q the input's bytes, all sums exact, each float32 operation rounded on its own:

        means = clamp(round(sum over pixels of q * pool_factor), 0, 255),
        out   = (sum over channels of means * weight) * scale + bias.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16, of 1 to `LARGEST_POOL` pixels an image.
        linear: see `layers/quantized.py`.
        stored: how `input` is quantized; its zero point is 0.
        pooled: how the means are; its zero point is 0.

    Returns:
        (N, K) in the dtype of `input`.
    """
    pixels = input.shape[2] * input.shape[3]
    sums = quantize(input, stored).sum((2, 3), dtype=torch.int64).float()
    means = (sums * pool_factor(stored, pooled, pixels)).round().clamp(0, LARGEST)
    products = means.double() @ linear.weight.double().t()  # exact: below 2^53
    return (products.float() * linear.scale + linear.bias).to(input.dtype)


def float8_residual_blocks(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
) -> Tensor:
    """Residual blocks in float8_e4m3fn, one on the output of the other.

    Of a block, h[0] its input as stored, with `e4m3(x)` x, at most 448 in magnitude, rounded to the
    nearest of these numbers, to even:

        h[i] = e4m3(max(sums(h[i-1]) * scale + shift, 0))  for all but the last,
        out  = e4m3(max(sums(h) * scale + shift + shortcut, 0)),
        shortcut = h[0] * shortcut_scale, or sums(h[0]) * scale of a projection.

    `sums` is the convolution of stored numbers. Products of two of them are exact in float32; their
    sums are not, and depend on the order, which is not said. So what is promised is an error and
    not the bits: a sum of n products differs from the exact one by at most `n 2^-23` times the sum
    of their magnitudes, as float32 sums in any order do, and each later operation rounds to
    float32 once. `h[i]` is then `e4m3` of a number that is as near to the exact one. NaN stays NaN.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16.
        blocks: see `layers/quantized.py`; their weights are float8_e4m3fn.
        stored: how `input` is stored.
        output: how the last block's output is to be read.

    Returns:
        (N, K, P, Q) in the dtype of `input`.
    """
    inverse = float32(1 / stored.step)
    values = _float8(input.float() * inverse)
    per_channel = (1, -1, 1, 1)

    def scaled(values: Tensor, conv: QuantizedConv) -> Tensor:
        geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
        sums = F.conv2d(values.float(), conv.weight.float(), None, *geometry)
        return sums * conv.scale.view(per_channel)

    for block in blocks:
        *convs, last = block.convs[:-1] if block.has_projection else block.convs
        if block.has_projection:
            shortcut = scaled(values, block.convs[-1])
        else:
            shortcut = values.float() * block.shortcut_scale
        for conv in convs:
            values = _float8(scaled(values, conv) + conv.shift.view(per_channel), 0.0)
        steps = scaled(values, last) + last.shift.view(per_channel) + shortcut
        values = _float8(steps, 0.0)
    return (values.float() * output.step).to(input.dtype)


def _float8(values: Tensor, least: float = -LARGEST_FLOAT8) -> Tensor:
    # A conversion would make NaN of what is beyond the largest number.
    return values.clamp(least, LARGEST_FLOAT8).to(torch.float8_e4m3fn)


def quantized_stem(
    input: Tensor, stem: QuantizedStem, stored: Quantization, output: Quantization
) -> Tensor:
    """A network's first convolution in eight or sixteen bits, its norm, ReLU and max-pool.

    Each product and each sum a float32 rounded on its own, in eight bits without the last term:

        steps = sums(input) * scale + shift + low_sums(input) * low_scale,
        out   = max_pool(clamp(round(steps), 0, 255)).

    Sixteen bits of the input are `clamp(round(input / step), -32639, 32639)`, the quotient as in
    `quantize`; NaN becomes the least.

    Args:
        input: (N, C, H, W), float32, float16 or bfloat16.
        stem: see `layers/quantized.py`.
        stored: how `input` is quantized.
        output: how the output is to be read; its zero point is 0.

    Returns:
        (N, K, P, Q) in the dtype of `input`.
    """
    per_channel = (1, -1, 1, 1)
    if stem.low is None:
        values, zero_point = quantize(input, stored), stored.zero_point
    else:
        inverse = float32(1 / stored.step)
        words = input.float() * inverse
        words = torch.where(words.isnan(), -torch.inf, words).clamp(-LARGEST_WORD, LARGEST_WORD)
        upper, lower = word_parts(words.round())
        values, zero_point = interleaved(lower, upper), 0
        if input.is_contiguous(memory_format=torch.channels_last):  # the output lies as the input
            values = values.contiguous(memory_format=torch.channels_last)
    sums = quantized_sums(values, zero_point, stem.conv)
    steps = sums * stem.conv.scale.view(per_channel) + stem.conv.shift.view(per_channel)
    if stem.low is not None:
        sums = quantized_sums(values, zero_point, stem.low)
        steps = steps + sums * stem.low.scale.view(per_channel)
    kernel_size, stride, padding = map(list, stem.pool)
    pooled = F.max_pool2d(_bytes(steps, 0, output).float(), kernel_size, stride, padding)
    return dequantize(pooled, output, input.dtype)
