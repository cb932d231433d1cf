"""`conv_bn_act`: convolution, batch norm with running statistics, residual add and activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..layers.activation import PLAIN
from ..layers.description import ConvNorm, Norm, conv_norm_of
from . import activations, operator_checks
from .gradients import act_backward, conv_norm_backward, middle_channels
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
    "conv_bn_act(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, Tensor? residual, str activation) -> Tensor"
)


def conv_bn_act(input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str) -> Tensor:
    """Calls the operator. See `reference.conv_bn_act` for what it computes."""
    if _call.is_direct(input, layer.weight, *layer.norm[:4], layer.bias, residual):
        with torch._C._AutoDispatchBelowAutograd():
            backend = backends.choose(input.device.type)
            if activation in PLAIN:
                return backend.conv_bn_act(input, layer, residual, activation)
            return activations.conv_bn_act(backend, input, layer, residual, activation)
    return _call(input, *layer.flat(), residual, activation)


def _kernel(input: Tensor, *arguments: Any) -> Tensor:
    *layer, residual, activation = arguments
    backend = backends.choose(input.device.type)
    return activations.conv_bn_act(backend, input, conv_norm_of(layer), residual, activation)


register_kernel("conv_bn_act", _kernel, operator_checks.conv_bn_act)
register_in_graphs("conv_bn_act", _kernel)


@register_fake("conv_bn_act", operator_checks.conv_bn_act)
def _fake(
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
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


class _ConvBnAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _call(*arguments)
        (
            input,
            weight,
            running_mean,
            running_var,
            bn_weight,
            bn_bias,
            ctx.eps,
            bias,
            *ctx.geometry,
            residual,
            ctx.activation,
        ) = arguments
        ctx.residual_channels = None if residual is None else residual.size(1)
        ctx.bn_bias_dtype = None if bn_bias is None else bn_bias.dtype
        ctx.save_for_backward(
            input,
            weight,
            running_mean,
            running_var,
            bn_weight,
            bias if ctx.needs_input_grad[4] else None,
            output if ctx.activation == "relu" else None,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, running_mean, running_var, bn_weight, bias, output = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad = act_backward(grad, output, ctx.activation)
        norm = Norm(running_mean, running_var, bn_weight, None, ctx.eps)
        layer = ConvNorm(weight, norm, bias, *ctx.geometry)
        gradients = conv_norm_backward(grad, input, layer, ctx.bn_bias_dtype, need[:8])
        grad_residual = None
        if need[12]:
            grad_residual = middle_channels(grad, ctx.residual_channels)
        return *gradients, None, None, None, None, grad_residual, None


_apply = activations.differentiable(_ConvBnAct.apply, 13)
_call = Operator("conv_bn_act", (0, 1, 2, 3, 4, 5, 7, 12), _kernel, _apply)
register_autograd("conv_bn_act", _apply, operator_checks.conv_bn_act)


def _cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        autocast_tensor(argument, dtype, device_type) if index in (0, 1, 7, 12) else argument
        for index, argument in enumerate(arguments)
    )


register_autocast("conv_bn_act", _cast)
