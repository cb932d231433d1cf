"""The library's convolution and statistics, finished in one pass by `scale_shift_act`.

What the CPU and CUDA backends share, and fall back on where they have no kernel of their own.
`finish` is what makes that pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, reference  # noqa: F401  (registers the operators)
from ..layers.activation import PLAIN, apply_
from ..layers.convolution import conv2d
from ..layers.description import ConvNorm, Norm, Pool, Sums
from ..layers.memory import contiguous_like_eager, unpacked

scale_shift_act = torch.ops.fused_resnet.scale_shift_act.default


def scale_and_shift(norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Batch norm as one multiply-add.

    `scale = weight / sqrt(var + eps)`, `shift = bias - mean scale`.

    Args:
        norm: of C channels.
        dtype: the dtype of the normalised tensor; the result is float64 for float64, else float32.
    """
    mean, var, weight, bias, eps = norm
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    scale = (var.to(accumulate) + eps).rsqrt_()
    if weight is not None:
        scale = scale * weight
    shift = mean * scale
    shift = shift.neg_() if bias is None else bias - shift
    return scale.to(accumulate), shift.to(accumulate)


def precision(input: Tensor) -> str:
    """What the products of float32 tensors may be rounded to: "tf32" or "ieee".

    On a GPU that is torch's setting for its own convolutions (`torch.backends.cudnn.allow_tf32`, or
    `torch.backends.cudnn.conv.fp32_precision`). Convolutions of CPU tensors, on which the tests run
    kernels for GPUs, have no TF32.
    """
    if input.dtype is torch.float32 and input.device.type == "cuda":
        settings = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at import
        return "tf32" if settings.fp32_precision == "tf32" else "ieee"
    return "ieee"


def conv_bn_act(
    input: Tensor,
    layer: ConvNorm,
    residual: Tensor | None,
    activation: str,
    finish: Callable[..., Tensor] = scale_shift_act,
) -> Tensor:
    """The library's convolution, then batch norm, residual and activation in one pass."""
    weight, norm, bias, stride, padding, dilation, groups = layer
    out = conv2d(input, weight, bias, stride, padding, dilation, groups)
    scale, shift = scale_and_shift(norm, out.dtype)
    return _finished(finish, out, scale, shift, residual, activation)


def _finished(
    finish: Callable[..., Tensor],
    out: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`finish`, which has ReLU, and other activations behind it, in place."""
    if activation in PLAIN:
        return finish(out, scale, shift, residual, activation)
    return apply_(finish(out, scale, shift, residual, "none"), activation)


def conv_bn_act_max_pool(
    input: Tensor,
    layer: ConvNorm,
    activation: str,
    pool: Pool,
    finish: Callable[..., Tensor] = scale_shift_act,
) -> Tensor:
    """`conv_bn_act`, then the library's pooling."""
    return F.max_pool2d(conv_bn_act(input, layer, None, activation, finish), *pool)


def batch_norm_act_inference(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None,
    activation: str,
    finish: Callable[..., Tensor] = scale_shift_act,
) -> Tensor:
    """Batch norm with the running statistics, residual and activation in one pass."""
    scale, shift = scale_and_shift(norm, input.dtype)
    return _finished(finish, contiguous_like_eager(input), scale, shift, residual, activation)


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    finish: Callable[..., Tensor] = scale_shift_act,
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's batch statistics, then normalise, residual and activation in one pass.

    Returns:
        The output, and the mean (C,) and biased variance (C,) of the batch, float64 for a float64
        input and float32 for any other.
    """
    input = contiguous_like_eager(input)
    mean, var = batch_statistics(input)
    scale, shift = scale_and_shift(Norm(mean, var, weight, bias, eps), input.dtype)
    return finish(input, scale, shift, residual, activation), mean, var


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all dimensions but the second, in float32 (float64)."""
    accumulate = torch.float64 if input.dtype is torch.float64 else torch.float32
    channels = input.size(1)
    if input.numel() == 0:
        zeros = torch.zeros(channels, dtype=accumulate, device=input.device)
        return zeros, zeros.clone()
    if input.device.type == "cuda":
        # cuDNN-free and single-pass (Welford); float32 results for any input.
        return torch.batch_norm_update_stats(input, None, None, 0.0)
    # With float32 running statistics a half-precision input gets float32 results.
    scratch = torch.zeros(2, channels, dtype=accumulate, device=input.device)
    return torch.batch_norm_update_stats(input, scratch[0], scratch[1], 0.0)


def batch_norm_act_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    training: bool,
    need: Sequence[bool],
    finish: Callable[..., Tensor] = scale_shift_act,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The library's gradients; see `Backend.batch_norm_act_backward` for what they are of."""
    if activation == "relu":
        output = _output(input, output, norm, activation, finish)
        grad = torch.ops.aten.threshold_backward(grad, output, 0)
    mean, var, weight, _, eps = norm
    accumulate = torch.float64 if input.dtype is torch.float64 else torch.float32
    # aten's kernel reads expanded vectors as if they were dense.
    mean, var = mean.to(accumulate).contiguous(), var.to(accumulate).contiguous()
    weight = None if weight is None else weight.to(accumulate).contiguous()
    statistics = (None, None, mean, (var + eps).rsqrt_()) if training else (mean, var, None, None)
    grad_input, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
        grad, input, weight, *statistics, training, eps, tuple(need[:3])
    )
    return (
        grad_input if need[0] else None,
        grad_weight if need[1] else None,
        grad_bias if need[2] else None,
        grad if need[3] else None,
    )


def batch_norm_act_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    finish: Callable[..., Tensor] = scale_shift_act,
) -> tuple[Tensor, Tensor]:
    """See `reference.batch_norm_act_backward_sums`."""
    output = _output(input, output, norm, activation, finish)
    return reference.batch_norm_act_backward_sums(grad, input, output, *norm, activation)


def batch_norm_act_backward_input(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    sums: Sums,
    need_residual: bool,
    finish: Callable[..., Tensor] = scale_shift_act,
) -> tuple[Tensor, Tensor | None]:
    """See `reference.batch_norm_act_backward_input`."""
    output = _output(input, output, norm, activation, finish)
    return reference.batch_norm_act_backward_input(
        grad, input, output, *norm, activation, *sums, need_residual
    )


def _output(
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    finish: Callable[..., Tensor],
) -> Tensor | None:
    """The output where the activation's mask needs it, to the bits that forward came to.

    Of a mask as bits, ones where that lets the gradient pass.
    """
    if activation == "none":
        return output
    if output is not None:
        return unpacked(output, input) if output.dtype is torch.uint8 else output
    return batch_norm_act_inference(input, norm, None, activation, finish)


def explain(operator: str) -> str:
    """The kernels that run an operator, without the backend's name."""
    return {
        "conv_bn_act": "library convolution + scale_shift_act",
        "norm_conv_bn_act": "scale_shift_act + library convolution + scale_shift_act",
        "conv_bn_act_max_pool": "library convolution + scale_shift_act + library pooling",
        "batch_norm_act_inference": "scale_shift_act",
        "batch_norm_act_training": "library statistics + scale_shift_act",
        "quantized_residual_blocks": "int8 by torch's operators",
        "float8_residual_blocks": "float8_e4m3fn by torch's operators",
        "quantized_stem": "integers by torch's operators",
        "quantized_pool_linear": "int8 by torch's operators",
    }[operator]
