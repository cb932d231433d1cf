"""Batch norm as modules call it: the operator, and then the update of the running statistics."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import reference
from ..layers.description import Norm
from .batch_norm_act_inference import batch_norm_act_inference
from .batch_norm_act_training import batch_norm_act_training
from .registration import has_foreign, transforms_active
from .sync_batch_norm_act import sync_batch_norm_act


def run_batch_norm_act(
    input: Tensor,
    norm: Norm,
    training: bool,
    momentum: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`batch_norm_act` with its arguments checked; `norm` is of the running statistics or None."""
    running_mean, running_var, weight, bias, eps = norm
    if transforms_active() or (training and has_foreign(input, *norm[:4], residual)):
        return reference.batch_norm_act(
            input,
            *norm[:4],
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
        )
    if not training:
        return batch_norm_act_inference(input, norm, residual, activation)
    count = input.numel() // max(input.size(1), 1)

    def keep(mean: Tensor, var: Tensor) -> None:
        update_running_statistics(running_mean, running_var, mean, var, count, momentum)

    arguments = (input, weight, bias, eps, residual, activation)
    if torch.compiler.is_compiling():  # which does not look into what an operator calls
        output, *statistics = batch_norm_act_training(*arguments)
        keep(*statistics)
        return output
    return batch_norm_act_training(*arguments, keep)[0]


def run_sync_batch_norm_act(
    input: Tensor,
    norm: Norm,
    momentum: float,
    group: dist.ProcessGroup,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`sync_batch_norm_act` with its arguments checked."""
    running_mean, running_var, weight, bias, eps = norm

    def keep(mean: Tensor, var: Tensor, count: Tensor) -> None:
        update_running_statistics(running_mean, running_var, mean, var, count, momentum)

    return sync_batch_norm_act(input, weight, bias, eps, residual, activation, group, keep)


def update_running_statistics(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int | Tensor,
    momentum: float,
) -> None:
    """What `F.batch_norm` does to them, given the biased statistics of `count` values a channel.

    A count that is a tensor, of shape (), stays on its device; a single value, of which there is no
    unbiased variance, then has the biased one, zero.
    """
    if isinstance(count, Tensor):
        factor = count / (count - 1).clamp(min=1)
        weight: float | Tensor = momentum * (count > 0).to(mean.dtype)
    elif count == 0:
        return
    else:
        factor, weight = count / (count - 1), momentum
    with torch.no_grad():
        if running_mean is not None:
            _update(running_mean, mean, weight)
        if running_var is not None:
            _update(running_var, var * factor, weight)


def _update(running: Tensor, batch: Tensor, weight: float | Tensor) -> None:
    """`running = (1 - weight) running + weight batch`, rounded to `running`'s dtype at the end.

    Not `lerp`, whose difference of the two is not a number where both, or one of weight 0, are
    infinite.
    """
    if running.dtype is batch.dtype:
        running.mul_(1 - weight).add_(batch * weight)
    else:
        running.copy_(running.to(batch.dtype).mul_(1 - weight).add_(batch * weight))
