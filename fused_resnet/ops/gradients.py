"""The pieces the operators' backward formulas share, all of them differentiable themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backends
from ..layers.activation import PLAIN, derived
from ..layers.convolution import conv2d, conv2d_backward
from ..layers.description import ConvNorm, Norm
from ..layers.memory import contiguous_like_eager, unpacked
from .registration import has_foreign, is_plain, transforms_active

aten = torch.ops.aten


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which tensors of `dtype` are computed with."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def act_backward(
    grad: Tensor, output: Tensor | None, activation: str, like: Tensor | None = None
) -> Tensor:
    """The gradient before the activation; NaN in the output lets the gradient pass, as in torch.

    Of other activations than ReLU `output` is what they were applied to. It may be its mask as
    bits, of values that lie in memory as those of `like`, else `grad`.
    """
    if activation == "none":
        return grad
    assert output is not None
    if activation not in PLAIN:
        return derived(grad, output, activation)
    if output.dtype is torch.uint8:
        return torch.where(unpacked(output, grad if like is None else like).bool(), grad, 0)
    return aten.threshold_backward(grad, output.detach(), 0)


def trains_activation(input: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Whether the backend of an input's device trains an activation other than ReLU and none.

    See `Backend.trains_activation`. Not in compilers' graphs and transforms: they know torch's own.
    """
    return (
        not torch.compiler.is_compiling()
        and not transforms_active()
        and not has_foreign(input, residual)
        and (residual is None or residual.size(1) == input.size(1))
        and backends.choose(input.device.type).trains_activation(activation, input.dtype)
    )


def norm_backward(
    grad: Tensor,
    input: Tensor | None,
    norm: Norm,
    training: bool,
    mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of batch norm in its input, weight and bias, each where `mask` asks for it.

    Args:
        grad: of the output.
        input: the normalised tensor; may be None where neither `training` nor `mask[1]` is set.
        norm: its statistics those of the batch when training.
        training: whether the statistics are functions of the input.
        mask: which gradients to compute.

    Returns:
        The gradients; those of the weight and bias in the accumulation dtype.
    """
    mean, var, weight, _, eps = norm
    accumulate = accumulation_dtype(grad.dtype)
    # aten's kernels read expanded vectors as if they were dense.
    mean, var = mean.to(accumulate).contiguous(), var.to(accumulate).contiguous()
    weight = None if weight is None else weight.to(accumulate).contiguous()
    if grad.numel() == 0:  # aten's kernel divides by the number of values
        zeros = mean.new_zeros(grad.size(1))
        return torch.empty_like(grad), zeros, zeros
    if training or mask[1]:
        invstd = (var + eps).rsqrt()
        statistics = (None, None, mean, invstd) if training else (mean, var, None, None)
        return aten.native_batch_norm_backward(
            grad, input, weight, *statistics, training, eps, mask
        )
    per_channel = (1, -1) + (1,) * (grad.dim() - 2)
    grad_input = grad_bias = None
    if mask[0]:
        scale = (var + eps).rsqrt()
        scale = scale if weight is None else scale * weight
        grad_input = (grad * scale.view(per_channel)).to(grad.dtype)
    if mask[2]:
        grad_bias = channel_sum(grad)
    return grad_input, None, grad_bias


def has_norm_kernel(*tensors: Tensor | None) -> bool:
    """Whether these tensors' backend, found by the first, has gradients of `batch_norm_act`."""
    first = tensors[0]
    assert first is not None
    return is_plain(*tensors) and backends.choose(first.device.type).has_norm_kernels


def norm_act_backward(
    grad: Tensor,
    input: Tensor | None,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    training: bool,
    need: Sequence[bool],
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of batch norm, residual add and activation in input, weight, bias and residual.

    By the backend's kernel where it has one, or, to be differentiated again, by torch's operators.

    Args:
        grad: of the output.
        input: the normalised tensor; may be None where neither `training` nor `need[1]` is set and
            `output` is given.
        output: may be None where there was no residual, and is then computed again where needed;
            or the bits that a backend kept in its place, in the memory order of `input`. Of other
            activations than these, what was added to the norm, or None.
        norm: its statistics those of the batch when training.
        activation: "relu", "none", or, in training, what the backend trains.
        training: whether the statistics are functions of the input.
        need: which gradients to compute.
        overwrite: whether `grad` may be overwritten.

    Returns:
        The gradients, None where not needed.
    """
    if (
        not torch.is_grad_enabled()
        and grad.numel() > 0
        and has_norm_kernel(grad, input, output, *norm[:4])
    ):
        if input is None:  # any tensor like it will do
            input = grad if output is None else output
        backend = backends.choose(grad.device.type)
        grad_input, grad_weight, grad_bias, grad_residual = backend.batch_norm_act_backward(
            grad, input, output, norm, activation, training, need, overwrite
        )
    else:
        if activation not in PLAIN:
            assert input is not None
            weight, bias, eps = norm[2:]
            # Of the batch's own statistics, so that it can be differentiated again.
            added = torch.batch_norm(input, weight, bias, None, None, True, 0.0, eps, False)
            output = added if output is None else added + output
        if activation == "relu" and output is None:
            assert input is not None
            output = torch.ops.fused_resnet.batch_norm_act_inference(
                input.detach(), *norm, None, activation
            )
        like = None
        if output is not None and output.dtype is torch.uint8:
            assert input is not None
            like = contiguous_like_eager(input)
        grad_residual = act_backward(grad, output, activation, like)
        grad_input, grad_weight, grad_bias = norm_backward(
            grad_residual, input, norm, training, need[:3]
        )
    return (
        grad_input if need[0] else None,
        in_dtype_of(norm.weight, grad_weight) if need[1] else None,
        in_dtype_of(norm.bias, grad_bias) if need[2] else None,
        grad_residual if need[3] else None,
    )


def in_dtype_of(parameter: Tensor | None, grad: Tensor | None) -> Tensor | None:
    """The gradient of a parameter, in its dtype."""
    return None if parameter is None or grad is None else grad.to(parameter.dtype)


def middle_channels(grad: Tensor, channels: int) -> Tensor:
    """The gradient of `residual` given that of `reference.pad_channels(residual)`, a view."""
    return grad.narrow(1, (grad.size(1) - channels) // 2, channels)


def channel_sum(grad: Tensor) -> Tensor:
    """Sum over all dimensions but the second, in the accumulation dtype."""
    return grad.sum((0, *range(2, grad.dim())), dtype=accumulation_dtype(grad.dtype))


def like(grad: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    """`grad` in the dtype of what it is the gradient of."""
    return None if grad is None else grad.to(dtype)


def conv_norm_backward(
    grad: Tensor,
    input: Tensor,
    layer: ConvNorm,
    bn_bias_dtype: torch.dtype | None,
    need: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Gradients of `batch_norm(conv2d(input, weight, bias), ...)` with running statistics.

    The convolution's output is computed again, and only where the norm's weight needs a gradient.

    Args:
        grad: of the batch norm's output.
        input: what `ops.conv_bn_act` was called with.
        layer: likewise; the norm's bias is not looked at, and that of the convolution only where
            the norm's weight needs a gradient.
        bn_bias_dtype: the dtype of the norm's bias.
        need: whether the gradient is needed, for the operator's first eight arguments.

    Returns:
        The gradients of the operator's first eight arguments, None where not needed.
    """
    weight, norm, bias, stride, padding, dilation, groups = layer
    geometry = (stride, padding, dilation, groups)
    conv_mask = (need[0], need[1], need[7])
    conv = conv2d(input, weight, bias, *geometry) if need[4] else None
    grad_conv, grad_bn_weight, grad_bn_bias = norm_backward(
        grad, conv, norm, False, (any(conv_mask), need[4], need[5])
    )
    grad_input = grad_weight = grad_bias = None
    if any(conv_mask):
        assert grad_conv is not None
        grad_input, grad_weight, grad_bias = conv2d_backward(
            grad_conv, input, weight, *geometry, conv_mask
        )
    return (
        grad_input,
        grad_weight,
        None,
        None,
        in_dtype_of(norm.weight, grad_bn_weight) if need[4] else None,
        like(grad_bn_bias, bn_bias_dtype) if need[5] else None,
        None,
        grad_bias,
    )
