"""`batch_norm_act_inference`: batch norm with running statistics, residual add and activation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..layers.description import Norm
from ..layers.memory import contiguous_like_eager
from . import activations, operator_checks
from .gradients import has_norm_kernel, middle_channels, norm_act_backward
from .registration import (
    Operator,
    autocast_residual,
    library,
    register_autocast,
    register_autograd,
    register_fake,
    register_kernel,
)

library.define(
    "batch_norm_act_inference(Tensor input, Tensor running_mean, Tensor running_var, "
    "Tensor? weight, Tensor? bias, float eps, Tensor? residual, str activation) -> Tensor"
)


def batch_norm_act_inference(
    input: Tensor, norm: Norm, residual: Tensor | None, activation: str
) -> Tensor:
    """Calls the operator. See `reference.batch_norm_act_inference` for what it computes."""
    if _call.is_direct(input, *norm[:4], residual):
        with torch._C._AutoDispatchBelowAutograd():
            backend = backends.choose(input.device.type)
            return activations.batch_norm_act_inference(backend, input, norm, residual, activation)
    return _call(input, *norm, residual, activation)


def _kernel(input: Tensor, *arguments: Any) -> Tensor:
    backend = backends.choose(input.device.type)
    *norm, residual, activation = arguments
    return activations.batch_norm_act_inference(backend, input, Norm(*norm), residual, activation)


register_kernel("batch_norm_act_inference", _kernel, operator_checks.batch_norm_act_inference)


@register_fake("batch_norm_act_inference", operator_checks.batch_norm_act_inference)
def _fake(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    return torch.empty_like(contiguous_like_eager(input))


class _BatchNormActInference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _call(*arguments)
        (
            input,
            running_mean,
            running_var,
            weight,
            bias,
            ctx.eps,
            residual,
            ctx.activation,
        ) = arguments
        ctx.backend = backends.chosen()
        ctx.residual_channels = None if residual is None else residual.size(1)
        # With a residual the output is kept, for whatever takes it keeps it too.
        from_input = (
            residual is None
            and ctx.needs_input_grad[3]
            and has_norm_kernel(input, running_mean, running_var, weight, bias)
        )
        keep = ctx.activation == "relu" and not from_input
        ctx.save_for_backward(
            input if ctx.needs_input_grad[3] else None,
            running_mean,
            running_var,
            weight,
            bias,
            output if keep else None,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, running_mean, running_var, weight, bias, output = ctx.saved_tensors
        need = ctx.needs_input_grad
        with backends.as_chosen(ctx.backend):
            grad_input, grad_weight, grad_bias, grad_residual = norm_act_backward(
                grad,
                input,
                output,
                Norm(running_mean, running_var, weight, bias, ctx.eps),
                ctx.activation,
                False,
                (need[0], need[3], need[4], need[6]),
            )
        if grad_residual is not None:
            grad_residual = middle_channels(grad_residual, ctx.residual_channels)
        return grad_input, None, None, grad_weight, grad_bias, None, grad_residual, None


_apply = activations.differentiable(_BatchNormActInference.apply, 7)
_call = Operator("batch_norm_act_inference", (0, 1, 2, 3, 4, 6), _kernel, _apply)
register_autograd("batch_norm_act_inference", _apply, operator_checks.batch_norm_act_inference)
register_autocast("batch_norm_act_inference", autocast_residual(6))
