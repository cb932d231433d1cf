"""Batch norm with the statistics of several processes, residual add and activation.

    mean, var, count = of all processes' batches together            one all_gather
    output           = activation(batch_norm(input, mean, var) + residual)
    total, dot       = sum(g), sum(g (input - mean)) of all processes    one all_reduce
    grad_input       = scale (g - total / count - (input - mean) dot / (count (var + eps)))

g is the gradient before the activation. Gradients of weight and bias are of this process's batch
alone, as `nn.SyncBatchNorm`'s are: data-parallel training averages them with all the others. A
batch may be empty; its process takes part in both collectives.

What is exchanged is float64, so that counts are exact and the order of additions, which is the
processes' in forward, leaves nothing that a float32 would show. No process waits for a value from
a GPU.

It is no operator: a collective cannot be traced, and compilers see the module's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import backends, reference
from ..layers.activation import PLAIN, applied
from ..layers.description import Norm, Sums
from ..layers.memory import contiguous_like_eager
from .batch_norm_act_inference import batch_norm_act_inference
from .gradients import in_dtype_of, middle_channels
from .registration import is_plain

Shared = tuple[Tensor, Tensor, Tensor]
"""Mean (C,) and biased variance (C,) in the accumulation dtype, and count () in float64."""


def sync_batch_norm_act(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    group: dist.ProcessGroup,
    keep: Callable[[Tensor, Tensor, Tensor], None],
) -> Tensor:
    """The output of this process's batch, which can be differentiated once.

    `keep` takes the statistics of all processes' batches before autograd saves anything.
    """
    if activation not in PLAIN:
        arguments = (input, weight, bias, eps, residual, "none", group, keep)
        return applied(sync_batch_norm_act(*arguments), activation)
    if residual is not None:
        residual = residual.to(input.dtype)  # which under autocast may differ
    shared = shared_statistics(input, group)
    keep(*shared)
    return _SyncBatchNormAct.apply(input, weight, bias, eps, residual, activation, group, shared)


def shared_statistics(input: Tensor, group: dist.ProcessGroup) -> Shared:
    """The statistics of all processes' `input` together, the same bits in each."""
    channels = input.size(1)
    with torch.no_grad():
        dense = contiguous_like_eager(input)
        backend = _backend(dense)
        run = reference.batch_statistics if backend is None else backend.batch_statistics
        mean, var = run(dense)
        own = input.new_empty(2 * channels + 1, dtype=torch.float64)
        own[:channels], own[channels:-1] = mean, var
        own[-1] = input.numel() // max(channels, 1)
        gathered = own.new_empty(dist.get_world_size(group), own.numel())
        dist.all_gather(list(gathered.unbind(0)), own, group)
        means, variances, counts = gathered.split((channels, channels, 1), 1)
        mean_, var_, count = reference.combine_statistics(means, variances, counts.squeeze(1))
        return mean_.to(mean.dtype), var_.to(var.dtype), count


def normalize(
    input: Tensor,
    shared: Shared,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`activation(batch_norm(input) + residual)` with these statistics."""
    mean, var, _ = shared
    # All four in the statistics' dtype: a 16-bit module's weight would else have to be theirs.
    weight, bias = (t if t is None else t.to(mean.dtype) for t in (weight, bias))
    norm = Norm(mean, var, weight, bias, eps)
    return batch_norm_act_inference(input, norm, residual, activation)


class Processes(NamedTuple):
    """Whose batches the statistics are of.

    Attributes:
        group: the processes.
        count: how many values a channel their batches have, (), in float64.
    """

    group: dist.ProcessGroup
    count: Tensor  # type: ignore[assignment]  # hides the method of tuples


def shared_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    processes: Processes,
    activation: str,
    need: Sequence[bool],
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in the input, weight, bias and residual; see `gradients.norm_act_backward`.

    Every one of the `processes` has to ask for the input's gradient, or none.

    Raises:
        RuntimeError: the gradients are to be differentiated again.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "batch norm with statistics of several processes can be differentiated only once: "
            "run backward without create_graph"
        )
    mean, var, weight, bias, eps = norm
    group, count = processes
    input = contiguous_like_eager(input)
    backend = _backend(grad)
    if grad.numel() == 0:
        total = dot = mean.new_zeros(input.size(1))
    elif backend is None:
        total, dot = reference.batch_norm_act_backward_sums(grad, input, output, *norm, activation)
    else:
        total, dot = backend.batch_norm_act_backward_sums(grad, input, output, norm, activation)
    invstd = (var + eps).rsqrt()
    # Of an infinite variance: nothing comes of the sum, which may be infinite too.
    dot = dot.masked_fill(invstd == 0, 0)
    grad_weight = in_dtype_of(weight, dot * invstd) if need[1] else None
    grad_bias = in_dtype_of(bias, total) if need[2] else None
    grad_input: Tensor | None = None
    grad_residual: Tensor | None = grad
    if need[0]:
        joint = torch.cat((total, dot)).double()
        dist.all_reduce(joint, group=group)
        total, dot = joint.to(total.dtype).chunk(2)
    if grad.numel() == 0:
        grad_input = torch.empty_like(input) if need[0] else None
    elif need[0] or need[3]:
        sums = Sums(total, dot, count)
        if backend is None:
            grad_input, grad_residual = reference.batch_norm_act_backward_input(
                grad, input, output, *norm, activation, *sums, need[3], overwrite
            )
        else:
            grad_input, grad_residual = backend.batch_norm_act_backward_input(
                grad, input, output, norm, activation, sums, need[3], overwrite
            )
    return (
        grad_input if need[0] else None,
        grad_weight,
        grad_bias,
        grad_residual if need[3] else None,
    )


def needs_output(input: Tensor, residual: Tensor | None, activation: str) -> bool:
    """Whether `shared_backward` needs the output.

    With a residual it is kept, for whatever takes it keeps it too. Without one the ReLU's mask is
    computed again from the input, by kernels that come to the same bits as forward's.
    """
    return activation == "relu" and (residual is not None or not _has_kernels(input))


def _has_kernels(input: Tensor) -> bool:
    return is_plain(input) and backends.choose(input.device.type).has_norm_kernels


def _backend(first: Tensor) -> backends.Backend | None:
    """The backend with kernels for the batch of `first`, or None where the reference runs."""
    if first.numel() > 0 and _has_kernels(first):
        return backends.choose(first.device.type)
    return None


class _SyncBatchNormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        activation: str,
        group: dist.ProcessGroup,
        shared: Shared,
    ) -> Tensor:
        output = normalize(input, shared, weight, bias, eps, residual, activation)
        ctx.eps, ctx.activation, ctx.group = eps, activation, group
        ctx.residual_channels = None if residual is None else residual.size(1)
        keep = needs_output(input, residual, activation)
        ctx.save_for_backward(input, weight, bias, *shared, output if keep else None)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, mean, var, count, output = ctx.saved_tensors
        need = ctx.needs_input_grad
        norm, processes = Norm(mean, var, weight, bias, ctx.eps), Processes(ctx.group, count)
        *gradients, grad_residual = shared_backward(
            grad, input, output, norm, processes, ctx.activation, (*need[:3], need[4])
        )
        if grad_residual is not None:
            grad_residual = middle_channels(grad_residual, ctx.residual_channels)
        return *gradients, None, grad_residual, None, None, None
