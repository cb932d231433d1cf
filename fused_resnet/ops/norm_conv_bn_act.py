"""`norm_conv_bn_act`: batch norm and ReLU before a convolution, and `conv_bn_act` behind them.

On a backend with such a kernel the normalised input exists in registers and caches alone; elsewhere
the operator is `batch_norm_act_inference` and `conv_bn_act`, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..layers.description import ConvNorm, Norm, conv_norm_of
from . import activations, operator_checks
from .batch_norm_act_inference import batch_norm_act_inference
from .conv_bn_act import conv_bn_act
from .gradients import act_backward, conv_norm_backward, norm_act_backward
from .registration import (
    Operator,
    autocast_tensor,
    library,
    register_autocast,
    register_autograd,
    register_fake,
    register_in_graphs,
    register_kernel,
)

library.define(
    "norm_conv_bn_act(Tensor input, Tensor in_mean, Tensor in_var, Tensor? in_weight, "
    "Tensor? in_bias, float in_eps, Tensor weight, Tensor running_mean, Tensor running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, Tensor? residual, str activation) -> Tensor"
)


def norm_conv_bn_act(
    input: Tensor, before: Norm, layer: ConvNorm, residual: Tensor | None, activation: str
) -> Tensor:
    """Calls the operator. See `reference.norm_conv_bn_act` for what it computes."""
    return _call(input, *before, *layer.flat(), residual, activation)


def _kernel(input: Tensor, *arguments: Any) -> Tensor:
    backend = backends.choose(input.device.type)
    before, layer = Norm(*arguments[:5]), conv_norm_of(arguments[5:-2])
    return activations.norm_conv_bn_act(backend, input, before, layer, *arguments[-2:])


def _in_two(input: Tensor, *arguments: Any) -> Tensor:
    layer, (residual, activation) = conv_norm_of(arguments[5:-2]), arguments[-2:]
    normalised = batch_norm_act_inference(input, Norm(*arguments[:5]), None, "relu")
    return conv_bn_act(normalised, layer, residual, activation)


register_kernel("norm_conv_bn_act", _kernel, operator_checks.norm_conv_bn_act)
register_in_graphs("norm_conv_bn_act", _kernel)


@register_fake("norm_conv_bn_act", operator_checks.norm_conv_bn_act)
def _fake(
    input: Tensor,
    in_mean: Tensor,
    in_var: Tensor,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
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
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


class _NormConvBnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _call(*arguments)
        *norm, ctx.in_eps, weight, running_mean, running_var, bn_weight, bn_bias = arguments[:11]
        ctx.eps, bias, *ctx.geometry, residual, ctx.activation = arguments[11:]
        ctx.residual_channels = None if residual is None else residual.size(1)
        ctx.bn_bias_dtype = None if bn_bias is None else bn_bias.dtype
        ctx.backend = backends.chosen()
        ctx.save_for_backward(
            *norm,
            weight,
            running_mean,
            running_var,
            bn_weight,
            bias if ctx.needs_input_grad[9] else None,
            output if ctx.activation == "relu" else None,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # What the convolution reads is not kept, so it is computed again.
        input, in_mean, in_var, in_weight, in_bias, *convolved = ctx.saved_tensors
        weight, running_mean, running_var, bn_weight, bias, output = convolved
        need = ctx.needs_input_grad
        need_norm = (need[0], need[3], need[4])
        before = Norm(in_mean, in_var, in_weight, in_bias, ctx.in_eps)
        norm = Norm(running_mean, running_var, bn_weight, None, ctx.eps)
        layer = ConvNorm(weight, norm, bias, *ctx.geometry)
        need_conv = (any(need_norm), need[6], False, False, need[9], need[10], False, need[12])
        with backends.as_chosen(ctx.backend):
            grad = act_backward(grad, output, ctx.activation)
            normalised = batch_norm_act_inference(input, before, None, "relu")
            grad_normalised, *gradients = conv_norm_backward(
                grad, normalised, layer, ctx.bn_bias_dtype, need_conv
            )
            grad_input = grad_in_weight = grad_in_bias = None
            if any(need_norm):
                assert grad_normalised is not None
                grad_input, grad_in_weight, grad_in_bias, _ = norm_act_backward(
                    grad_normalised, input, normalised, before, "relu", False, (*need_norm, False)
                )
        grad_residual = None
        if need[17]:
            channels = ctx.residual_channels
            grad_residual = grad.narrow(1, (grad.size(1) - channels) // 2, channels)
        ours = (grad_input, None, None, grad_in_weight, grad_in_bias, None)
        return *ours, *gradients, None, None, None, None, grad_residual, None


_apply = activations.differentiable(_NormConvBnAct.apply, 18)
_call = Operator("norm_conv_bn_act", (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 17), _kernel, _apply)
register_autograd("norm_conv_bn_act", _apply, operator_checks.norm_conv_bn_act)


def _cast(
    dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    # The norm runs in its input's dtype and the convolution in autocast's. Where these differ, the
    # operator has no way to say so.
    if autocast_tensor(arguments[0], dtype, device_type) is not arguments[0]:
        return None
    return tuple(
        autocast_tensor(argument, dtype, device_type) if index in (6, 12, 17) else argument
        for index, argument in enumerate(arguments)
    )


register_autocast("norm_conv_bn_act", _cast, otherwise=_in_two)
