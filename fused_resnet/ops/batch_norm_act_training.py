"""`batch_norm_act_training`: batch norm with batch statistics, residual add and activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..layers.activation import PLAIN, applied, apply_
from ..layers.description import Norm
from ..layers.memory import contiguous_like_eager
from . import operator_checks
from .gradients import (
    accumulation_dtype,
    has_norm_kernel,
    middle_channels,
    norm_act_backward,
    trains_activation,
)
from .registration import (
    Operator,
    autocast_residual,
    has_foreign,
    library,
    needs_grad,
    nothing_intercepts,
    register_autocast,
    register_autograd,
    register_fake,
    register_kernel,
)

library.define(
    "batch_norm_act_training(Tensor input, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? residual, str activation) -> (Tensor output, Tensor mean, Tensor var)"
)
_cast = autocast_residual(4)
_operator: Callable[..., Any] = torch.ops.fused_resnet.batch_norm_act_training


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    keep: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Calls the operator. See `reference.batch_norm_act_training` for what it computes.

    `keep`, which compilers do not see called, takes mean and variance before autograd saves
    anything: see `training/nodes.py`.

    Returns:
        The output, and the batch's mean (C,) and biased variance (C,), which are not
        differentiable: float64 for a float64 input, float32 for any other.
    """
    if activation not in PLAIN and not trains_activation(input, residual, activation):
        arguments = (input, weight, bias, eps, residual, "none")
        output, mean, var = batch_norm_act_training(*arguments, keep)
        return applied(output, activation), mean, var
    arguments = (input, weight, bias, eps, residual, activation)
    if keep is None:
        return _call(*arguments)
    tensors = (input, weight, bias, residual)
    if needs_grad(*tensors) and not has_foreign(*tensors):
        device = input.device.type
        if torch.is_autocast_enabled(device):
            arguments = _cast(torch.get_autocast_dtype(device), device, arguments)
        return _BatchNormActTraining.apply(*arguments, keep)
    output, mean, var = _call(*arguments)
    keep(mean, var)
    return output, mean, var


def _kernel(input: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    backend = backends.choose(input.device.type)
    weight, bias, eps, residual, activation = arguments
    if activation in PLAIN or trains_activation(input, residual, activation):
        return backend.batch_norm_act_training(input, *arguments)
    output, mean, var = backend.batch_norm_act_training(input, weight, bias, eps, residual, "none")
    return apply_(output, activation), mean, var


register_kernel("batch_norm_act_training", _kernel, operator_checks.batch_norm_act_training)


@register_fake("batch_norm_act_training", operator_checks.batch_norm_act_training)
def _fake(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean = input.new_empty(input.size(1), dtype=accumulation_dtype(input.dtype))
    return torch.empty_like(contiguous_like_eager(input)), mean, torch.empty_like(mean)


def forward_keeping_mask(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`batch_norm_act_training`, below autograd, and what its backward takes for the output.

    Returns:
        The output, mean and variance, and the activation's mask as `norm_act_backward` wants it:
        None where it is computed again; bits where the backend has a kernel that keeps them; else
        the output, which whatever takes it keeps too. Of other activations than ReLU the residual.
    """
    arguments = (input, weight, bias, eps, residual, activation)
    if activation not in PLAIN:
        plain = nothing_intercepts(input, weight, bias, residual)
        output, mean, var = (_kernel if plain else _operator)(*arguments)
        return output, mean, var, residual
    if not nothing_intercepts(input, weight, bias, residual):
        output, mean, var = batch_norm_act_training(*arguments)
        return output, mean, var, output if activation == "relu" else None
    backend = backends.choose(input.device.type)
    mask = None
    if activation == "relu" and residual is not None:
        found = backend.batch_norm_act_training_keeping_mask(input, weight, bias, eps, residual)
        if found is not None:
            output, mean, var, mask = found
            return output, mean, var, output if mask is None else mask
    output, mean, var = _kernel(*arguments)
    if activation == "relu" and not (residual is None and has_norm_kernel(input)):
        mask = output
    return output, mean, var, mask


class _BatchNormActTraining(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments_and_keep: Any) -> tuple[Tensor, Tensor, Tensor]:
        *arguments, keep = arguments_and_keep
        input, weight, bias, ctx.eps, residual, ctx.activation = arguments
        with torch._C._AutoDispatchBelowAutograd():
            output, mean, var, mask = forward_keeping_mask(*arguments)
        if keep is not None:
            keep(mean, var)
        ctx.mark_non_differentiable(mean, var)
        ctx.backend = backends.chosen()
        ctx.residual_channels = None if residual is None else residual.size(1)
        ctx.save_for_backward(input, weight, bias, mean, var, mask)
        return output, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, var, mask = ctx.saved_tensors
        need = ctx.needs_input_grad
        with backends.as_chosen(ctx.backend):
            *gradients, grad_residual = norm_act_backward(
                grad,
                input,
                mask,
                Norm(mean, var, weight, bias, ctx.eps),
                ctx.activation,
                True,
                (*need[:3], need[4]),
            )
        if grad_residual is not None:
            grad_residual = middle_channels(grad_residual, ctx.residual_channels)
        return *gradients, None, grad_residual, None, None


def _without_keep(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, activation = arguments
    if activation in PLAIN or trains_activation(others[0], others[4], activation):
        return _BatchNormActTraining.apply(*arguments, None)
    output, mean, var = _BatchNormActTraining.apply(*others, "none", None)
    return applied(output, activation), mean, var


_call = Operator("batch_norm_act_training", (0, 1, 2, 4), _kernel, _without_keep)
register_autograd("batch_norm_act_training", _without_keep, operator_checks.batch_norm_act_training)
register_autocast("batch_norm_act_training", _cast)
