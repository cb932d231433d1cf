"""`conv_bn_act_max_pool`: convolution, batch norm, activation and max-pool: the stem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, reference
from ..layers.activation import PLAIN
from ..layers.description import ConvNorm, Norm, Pool, conv_norm_of
from . import activations, operator_checks
from .conv_bn_act import conv_bn_act
from .gradients import act_backward, aten, conv_norm_backward
from .registration import (
    Operator,
    autocast_tensor,
    library,
    needs_grad,
    register_autocast,
    register_autograd,
    register_fake,
    register_in_graphs,
    register_kernel,
    transforms_active,
)

library.define(
    "conv_bn_act_max_pool(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, int[2] stride, int[2] padding, "
    "int[2] dilation, int groups, str activation, int[2] pool_kernel_size, int[2] pool_stride, "
    "int[2] pool_padding) -> Tensor"
)


def conv_bn_act_max_pool(input: Tensor, layer: ConvNorm, activation: str, pool: Pool) -> Tensor:
    """Calls the operator. See `reference.conv_bn_act_max_pool` for what it computes."""
    return _call(input, *layer.flat(), activation, *pool)


def _kernel(input: Tensor, *arguments: Any) -> Tensor:
    layer, activation, pool = conv_norm_of(arguments[:11]), arguments[11], Pool(*arguments[12:])
    backend = backends.choose(input.device.type)
    return activations.conv_bn_act_max_pool(backend, input, layer, activation, pool)


register_kernel("conv_bn_act_max_pool", _kernel, operator_checks.conv_bn_act_max_pool)
register_in_graphs("conv_bn_act_max_pool", _kernel)


@register_fake("conv_bn_act_max_pool", operator_checks.conv_bn_act_max_pool)
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
    activation: str,
    pool_kernel_size: list[int],
    pool_stride: list[int],
    pool_padding: list[int],
) -> Tensor:
    out = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return F.max_pool2d(out, pool_kernel_size, pool_stride, pool_padding)


class _ConvBnActMaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _call(*arguments)
        *tensors, ctx.eps, bias = arguments[:8]
        ctx.convolution = arguments[8:12]
        ctx.activation = arguments[12]
        ctx.pool = arguments[13:]
        ctx.save_for_backward(*tensors, bias)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Neither what is pooled nor where its maxima are is kept, so both are computed again.
        input, weight, running_mean, running_var, bn_weight, bn_bias, bias = ctx.saved_tensors
        norm = Norm(running_mean, running_var, bn_weight, bn_bias, ctx.eps)
        layer = ConvNorm(weight, norm, bias, *ctx.convolution)
        with torch.no_grad():
            arguments = (*layer.flat(), None, ctx.activation)
            pooled = reference.conv_bn_act(input, *arguments)
            _, indices = aten.max_pool2d_with_indices(pooled, *ctx.pool)
        grad = aten.max_pool2d_with_indices_backward(
            grad, pooled, *ctx.pool, (1, 1), False, indices
        )
        grad = act_backward(grad, pooled, ctx.activation)
        bn_bias_dtype = None if bn_bias is None else bn_bias.dtype
        gradients = conv_norm_backward(grad, input, layer, bn_bias_dtype, ctx.needs_input_grad[:8])
        return *gradients, *(None,) * 8


def _apply(*arguments: Any) -> Tensor:
    activation, pool = arguments[12], arguments[13:]
    if activation in PLAIN:
        return _ConvBnActMaxPool.apply(*arguments)
    return F.max_pool2d(
        conv_bn_act(arguments[0], conv_norm_of(arguments[1:12]), None, activation), *pool
    )


_call = Operator("conv_bn_act_max_pool", (0, 1, 2, 3, 4, 5, 7), _kernel, _apply)
register_autograd("conv_bn_act_max_pool", _apply, operator_checks.conv_bn_act_max_pool)


def _cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        autocast_tensor(argument, dtype, device_type) if index in (0, 1, 7) else argument
        for index, argument in enumerate(arguments)
    )


register_autocast("conv_bn_act_max_pool", _cast)


def run_conv_bn_act_max_pool(input: Tensor, layer: ConvNorm, activation: str, pool: Pool) -> Tensor:
    """`conv_bn_act_max_pool` with its arguments checked."""
    if transforms_active():
        arguments = (*layer.flat(), activation, *pool)
        return reference.conv_bn_act_max_pool(input, *arguments)
    if needs_grad(input, layer.weight, *layer.norm[2:4], layer.bias):
        # What the pooling's backward needs is then kept, not computed again.
        return F.max_pool2d(conv_bn_act(input, layer, None, activation), *pool)
    return conv_bn_act_max_pool(input, layer, activation, pool)
