"""The running statistics of norms that were trained, kept as their forward passes keep them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import running_statistics


def count_batches(
    norms: list[nn.BatchNorm2d],
    counts: list[int],
    statistics: list[tuple[Tensor, Tensor, Tensor | None]],
) -> None:
    """Updates the norms' buffers as their forward passes would have."""
    if _count_together(norms, statistics, counts):
        return
    for norm, (mean, var, shared), own in zip(norms, statistics, counts, strict=True):
        momentum = momentum_of(norm)
        if norm.training and norm.track_running_stats:
            count = own if shared is None else shared
            running_statistics.update_running_statistics(
                norm.running_mean, norm.running_var, mean, var, count, momentum
            )


def _count_together(
    norms: list[nn.BatchNorm2d],
    statistics: list[tuple[Tensor, Tensor, Tensor | None]],
    counts: list[int],
) -> bool:
    """Whether it has done what `count_batches` does, in five calls (launches) for all norms.

    Where these are alike, and no compiler looks on, which would rather see single operators.
    """
    momentum = norms[0].momentum
    if torch.compiler.is_compiling() or momentum is None or not all(counts):
        return False
    batches, means, variances, batch_means, batch_variances = [], [], [], [], []
    for norm, (mean, var, shared) in zip(norms, statistics, strict=True):
        # Looked up where modules keep them: an attribute takes ten times as long.
        buffers = norm._buffers
        running_mean, running_var = buffers.get("running_mean"), buffers.get("running_var")
        tracked = buffers.get("num_batches_tracked")
        if (
            not (norm.training and norm.track_running_stats)
            or norm.momentum != momentum
            or tracked is None
            or running_mean is None
            or running_var is None
            or not running_mean.dtype is running_var.dtype is mean.dtype
            or shared is not None
        ):
            return False
        batches.append(tracked)
        means.append(running_mean)
        variances.append(running_var)
        batch_means.append(mean)
        batch_variances.append(var)
    factors = [count / (count - 1) for count in counts]
    with torch.no_grad():
        torch._foreach_add_(batches, 1)
        unbiased = torch._foreach_mul(batch_variances, factors)
        running = means + variances
        torch._foreach_mul_(running, 1 - momentum)
        # Not with `alpha`, whose product is not rounded as that of `F.batch_norm` is.
        batch = [*batch_means, *unbiased]
        torch._foreach_add_(running, torch._foreach_mul(batch, momentum))
    return True


def momentum_of(norm: nn.BatchNorm2d) -> float:
    """The weight of this batch in the running statistics, as `BatchNorm2d.forward` finds it."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum
