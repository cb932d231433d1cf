"""A residual block, or a stem, with batch statistics as one node of the autograd graph.

    raw[i] = conv[i](h[i - 1]),  h[-1] = input
    h[i]   = relu(batch_norm[i](raw[i]))                      for all convolutions but the last
    output = relu(batch_norm[n](raw[n]) + shortcut),  shortcut = input or batch_norm(conv(input))

or, of fewer channels than the output, every `step`-th pixel of the input, between zeros.

Kept for backward are the input, the output (whatever follows keeps it as its input) or, where the
backend has kernels for it, its ReLU's mask as bits, `raw` and vectors of one value a channel. Each
`h` is computed again from `raw` just before the convolution behind it needs it; with `low_memory`
so are the `raw` of the last convolution and of the projection, where these are 1x1. The stem,
`max_pool(relu(batch_norm(conv(input))))`, keeps its input and `raw` only, and where the backend
pools in the same pass the place of each maximum in its window, 8 bits. A norm's statistics are this
process's, or those of all processes of the layer's group; then backward can run once only.

What wants the statistics gets them before autograd saves anything: a checkpointed region that is
computed again is left by an exception as soon as the last tensor that it needs has been saved.

To compilers and to whatever else looks at single operators a block is its convolutions and
`batch_norm_act_training`; these functions then decline.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import backends
from ...layers.description import PARAMETERS, ConvNorm, Layer, Pool, TrainedBlock
from ..registration import autocast_tensor, gradients_batched, is_plain, needs_grad
from .backward import block_backward, stem_backward
from .passes import Pass, Statistics, is_computed_again, passes_of, run_block

Keep = Callable[[list[Statistics]], None]
"""Called in forward with each norm's statistics."""


def residual_block_training(
    input: Tensor, block: TrainedBlock, parameters: list[Tensor | None], keep: Keep
) -> Tensor | None:
    """`relu(... + shortcut)` as above.

    Args:
        input: (N, C, H, W).
        block: what to compute.
        parameters: of each layer weight and bias of the convolution, then of the norm.
        keep: takes the layers' statistics.

    Returns:
        The output, or None where the block has to run operator by operator.
    """
    kernels = _kernels(input, parameters)
    if kernels is None:
        return None
    if not torch.is_autocast_enabled(input.device.type):
        return _ResidualBlock.apply(input, block, keep, kernels, *parameters)
    input, parameters = as_autocast_casts(input, parameters)
    with torch.autocast(input.device.type, enabled=False):
        return _ResidualBlock.apply(input, block, keep, kernels, *parameters)


def stem_training(
    input: Tensor,
    layer: ConvNorm,
    group: dist.ProcessGroup | None,
    pool: Pool,
    keep: Keep,
) -> Tensor | None:
    """`max_pool2d(relu(batch_norm(conv(input))), *pool)`; see `residual_block_training`."""
    weight, norm, bias, stride, padding, dilation, groups = layer
    parameters: list[Tensor | None] = [weight, bias, norm.weight, norm.bias]
    kernels = _kernels(input, parameters)
    if kernels is None:
        return None
    described = Layer((stride, padding, dilation, groups), norm.eps, group)
    input, parameters = as_autocast_casts(input, parameters)
    with torch.autocast(input.device.type, enabled=False):
        return _Stem.apply(input, described, pool, keep, kernels, *parameters)


def _kernels(input: Tensor, parameters: Sequence[Tensor | None]) -> backends.Backend | None:
    """The backend whose kernels train it, or None where operators or nobody records it."""
    if not is_plain(input, *parameters) or not needs_grad(input, *parameters):
        return None
    backend = backends.choose(input.device.type)
    return backend if backend.has_norm_kernels else None


def as_autocast_casts(
    input: Tensor, parameters: list[Tensor | None]
) -> tuple[Tensor, list[Tensor | None]]:
    """The convolutions' tensors as autocast, if enabled, would hand them to `conv2d`."""
    device_type = input.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        input = autocast_tensor(input, dtype, device_type)
        parameters = [
            autocast_tensor(p, dtype, device_type) if index % PARAMETERS < 2 else p
            for index, p in enumerate(parameters)
        ]
    return input, parameters


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        block: TrainedBlock,
        keep: Keep,
        kernels: backends.Backend,
        *parameters: Tensor | None,
    ) -> Tensor:
        passes = passes_of(block.layers, parameters, (kernels, True))
        with torch._C._AutoDispatchBelowAutograd():
            output, mask = run_block(block, passes, input, [])
        statistics: list[Statistics] = []
        saved: list[Tensor | None] = []
        for index, step in enumerate(passes):
            kept = step.saved(not (block.low_memory and is_computed_again(block, passes, index)))
            statistics.append(kept[1:])
            saved += kept
        keep(statistics)
        ctx.block, ctx.backend = block, backends.chosen()
        ctx.save_for_backward(input, output if mask is None else mask, *parameters, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_input, _, _, _, *need_parameters = ctx.needs_input_grad
        arguments = (ctx.block, ctx.saved_tensors, (need_input, *need_parameters), grad)
        # Kernels of several cotangents at once, and of gradients with a history, are autograd's.
        if torch.is_grad_enabled() or gradients_batched() or not _is_as_in_forward(ctx, grad):
            with backends.as_chosen(ctx.backend), torch.autocast(grad.device.type, enabled=False):
                grad_input, *grads = block_backward(*arguments)
        else:
            with torch._C._AutoDispatchBelowAutograd():
                grad_input, *grads = block_backward(*arguments)
        return grad_input, None, None, None, *grads


def _is_as_in_forward(ctx: Any, grad: Tensor) -> bool:
    """Whether backward runs under forward's choice of a backend, and without autocast."""
    return backends.chosen() == ctx.backend and not torch.is_autocast_enabled(grad.device.type)


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        layer: Layer,
        pool: Pool,
        keep: Keep,
        kernels: backends.Backend,
        *parameters: Tensor | None,
    ) -> Tensor:
        step = Pass(layer, parameters, kernels, True)
        out, offsets = step.pool(step.convolve(input), pool)
        keep([step.saved()[1:]])
        ctx.layer, ctx.pool, ctx.backend = layer, pool, backends.chosen()
        ctx.save_for_backward(input, *parameters, *step.saved(), offsets)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with backends.as_chosen(ctx.backend), torch.autocast(grad.device.type, enabled=False):
            need = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
            grad_input, *grads = stem_backward(ctx.layer, ctx.pool, ctx.saved_tensors, need, grad)
            return grad_input, None, None, None, None, *grads
