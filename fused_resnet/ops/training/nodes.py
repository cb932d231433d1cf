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
from ...layers.description import PARAMETERS, Block, ConvNorm, Layer
from ..gradients import has_norm_kernel
from ..registration import autocast_tensor, needs_grad
from .backward import block_backward, stem_backward
from .passes import Pass, Statistics, is_computed_again, passes_of, run_block

Keep = Callable[[list[Statistics]], None]
"""Called in forward with each norm's statistics."""


def residual_block_training(
    input: Tensor,
    layers: Sequence[ConvNorm],
    groups: Sequence[dist.ProcessGroup | None],
    has_projection: bool,
    low_memory: bool,
    keep: Keep,
    step: int = 1,
) -> Tensor | None:
    """`relu(... + shortcut)` as above.

    Args:
        input: (N, C, H, W).
        layers: the convolutions; the running statistics are not used.
        groups: for each of them the processes whose batches make the statistics, or None.
        has_projection: whether the last layer makes the shortcut.
        low_memory: whether 1x1 convolutions are computed twice rather than kept.
        keep: takes the layers' statistics.
        step: without a projection, between the pixels of the input that make the shortcut, which
            may have fewer channels than the output: see `reference.pad_channels`.

    Returns:
        The output, or None where the block has to run operator by operator.
    """
    arguments = _prepare(input, layers, groups)
    if arguments is None:
        return None
    input, described, parameters = arguments
    block = Block(described, has_projection, low_memory, step)
    with torch.autocast(input.device.type, enabled=False):
        return _ResidualBlock.apply(input, block, keep, *parameters)


def stem_training(
    input: Tensor,
    layer: ConvNorm,
    group: dist.ProcessGroup | None,
    pool: Sequence[Sequence[int]],
    keep: Keep,
) -> Tensor | None:
    """`max_pool2d(relu(batch_norm(conv(input))), *pool)`; see `residual_block_training`."""
    arguments = _prepare(input, [layer], [group])
    if arguments is None:
        return None
    input, (described,), parameters = arguments
    with torch.autocast(input.device.type, enabled=False):
        return _Stem.apply(input, described, tuple(pool), keep, *parameters)


def _prepare(
    input: Tensor, layers: Sequence[ConvNorm], groups: Sequence[dist.ProcessGroup | None]
) -> tuple[Tensor, tuple[Layer, ...], list[Tensor | None]] | None:
    """The input, layers and parameters, as autocast has them, or None to run them one by one."""
    described, parameters = [], []
    for (weight, norm, bias, *geometry), group in zip(layers, groups, strict=True):
        described.append(Layer(tuple(geometry), norm.eps, group))
        parameters += (weight, bias, norm.weight, norm.bias)
    if not has_norm_kernel(input, *parameters) or not needs_grad(input, *parameters):
        return None
    input, parameters = _as_autocast_casts(input, parameters)
    return input, tuple(described), parameters


def _as_autocast_casts(
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
        ctx: Any, input: Tensor, block: Block, keep: Keep, *parameters: Tensor | None
    ) -> Tensor:
        passes = passes_of(block.layers, parameters)
        output, mask = run_block(block, passes, input, [])
        keep([(step.mean, step.var, step.count) for step in passes])
        ctx.block, ctx.backend = block, backends.chosen()
        saved = []
        for index, step in enumerate(passes):
            saved += step.saved(not is_computed_again(block, passes, index))
        ctx.save_for_backward(input, output if mask is None else mask, *parameters, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with backends.as_chosen(ctx.backend), torch.autocast(grad.device.type, enabled=False):
            need = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
            grad_input, *grads = block_backward(ctx.block, ctx.saved_tensors, need, grad)
            return grad_input, None, None, *grads


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        layer: Layer,
        pool: tuple,
        keep: Keep,
        *parameters: Tensor | None,
    ) -> Tensor:
        step = Pass(layer, parameters)
        out, offsets = step.pool(step.convolve(input), pool)
        keep([(step.mean, step.var, step.count)])
        ctx.layer, ctx.pool, ctx.backend = layer, pool, backends.chosen()
        ctx.save_for_backward(input, *parameters, *step.saved(), offsets)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with backends.as_chosen(ctx.backend), torch.autocast(grad.device.type, enabled=False):
            need = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
            grad_input, *grads = stem_backward(ctx.layer, ctx.pool, ctx.saved_tensors, need, grad)
            return grad_input, None, None, None, *grads
