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
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ... import backends
from ...layers.convolution import conv2d, conv2d_backward
from ..batch_norm_act_inference import batch_norm_act_inference
from ..batch_norm_act_training import batch_norm_act_training
from ..gradients import act_backward, aten, has_norm_kernel, middle_channels, norm_act_backward
from ..registration import autocast_tensor, gradients_batched, is_plain, needs_grad
from ..sync_batch_norm_act import normalize, shared_backward, shared_statistics

Statistics = tuple[Tensor, Tensor, Tensor | None]
"""A batch's mean and biased variance, (C,) each, and how many values a channel (): None stands for
this process's own."""

Keep = Callable[[list[Statistics]], None]
"""Called in forward with each norm's statistics."""

_PARAMETERS = 4  # a layer's: the weight and bias of the convolution, and those of the norm
_SAVED = 4  # of a layer: raw, mean, var and count


@dataclass(frozen=True)
class _Layer:
    """What is not a tensor of a convolution and its norm."""

    geometry: tuple
    eps: float
    group: dist.ProcessGroup | None


@dataclass(frozen=True)
class _Block:
    layers: tuple[_Layer, ...]
    has_projection: bool
    low_memory: bool
    step: int = 1  # between the pixels of the input that are the shortcut

    def subsampled(self, tensor: Tensor) -> Tensor:
        """Of the input or its gradient, a view of what is the shortcut."""
        return tensor if self.step == 1 else tensor[:, :, :: self.step, :: self.step]

    def shortcut_is_input(self, input: Tensor, shortcut: Tensor | None) -> bool:
        """Whether the shortcut, or its gradient, is like the block's input; false for None."""
        return not self.has_projection and shortcut is not None and shortcut.shape == input.shape

    @property
    def main(self) -> int:
        """How many convolutions are not the projection."""
        return len(self.layers) - self.has_projection


def residual_block_training(
    input: Tensor,
    layers: Sequence[tuple],
    groups: Sequence[dist.ProcessGroup | None],
    has_projection: bool,
    low_memory: bool,
    keep: Keep,
    step: int = 1,
) -> Tensor | None:
    """`relu(... + shortcut)` as above.

    Args:
        input: (N, C, H, W).
        layers: the arguments of `conv_bn_act` from `weight` to `groups`, for each convolution; the
            running statistics are not used.
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
    block = _Block(described, has_projection, low_memory, step)
    with torch.autocast(input.device.type, enabled=False):
        return _ResidualBlock.apply(input, block, keep, *parameters)


def stem_training(
    input: Tensor,
    layer: tuple,
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
    input: Tensor, layers: Sequence[tuple], groups: Sequence[dist.ProcessGroup | None]
) -> tuple[Tensor, tuple[_Layer, ...], list[Tensor | None]] | None:
    """The input, layers and parameters, as autocast has them, or None to run them one by one."""
    described, parameters = [], []
    for (weight, _, _, bn_weight, bn_bias, eps, bias, *geometry), group in zip(
        layers, groups, strict=True
    ):
        described.append(_Layer(tuple(geometry), eps, group))
        parameters += (weight, bias, bn_weight, bn_bias)
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
            autocast_tensor(p, dtype, device_type) if index % _PARAMETERS < 2 else p
            for index, p in enumerate(parameters)
        ]
    return input, parameters


class _Pass:
    """One layer's tensors, and its steps in both directions."""

    def __init__(self, layer: _Layer, parameters: Sequence[Tensor | None]) -> None:
        self.layer = layer
        self.weight, self.bias, self.bn_weight, self.bn_bias = parameters
        self.raw: Tensor | None = None
        self.mean: Tensor | None = None
        self.var: Tensor | None = None
        self.count: Tensor | None = None

    @property
    def norm(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
        """The norm's statistics, weight, bias and eps, as backends take them."""
        return self.mean, self.var, self.bn_weight, self.bn_bias, self.layer.eps

    def _own(self, name: str, tensor: Tensor) -> Any:
        """The backend's function of this name, where it has one and the statistics are our own."""
        if self.layer.group is not None or torch.is_grad_enabled() or gradients_batched():
            return None
        return getattr(backends.choose(tensor.device.type), name, None)

    def convolve_with_statistics(self, input: Tensor, before: _Pass | None) -> bool:
        """In one, where the backend does; `before` is the layer whose norm the input lacks."""
        run = self._own("conv_batch_norm_statistics", input)
        prologue = None if before is None else before.norm
        geometry = self.layer.geometry
        found = run and run(input, self.weight, self.bias, *geometry, prologue)
        if found is not None:
            self.raw, self.mean, self.var = found
        return found is not None

    def finish(self, residual: Tensor | None, activation: str) -> Tensor:
        """`normalize`, with the statistics that the convolution may have found."""
        if self.mean is None:
            return self.normalize(self.raw, residual, activation)
        return batch_norm_act_inference(self.raw, *self.norm, residual, activation)

    def add_relu(
        self, shortcut: Tensor, projection: _Pass | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """The block's output and its mask, if the backend has one kernel for both norms."""
        run = self._own("batch_norm_add_relu", self.raw)
        norm = None
        if projection is not None:
            run, norm = run and projection._own("batch_norm_add_relu", shortcut), projection.norm
        found = run and run(self.raw, self.norm, shortcut, norm)
        if found is None:
            return None
        output, mask, (self.mean, self.var), statistics = found
        if projection is not None:
            projection.mean, projection.var = statistics
        return output, mask

    def add_relu_backward(
        self, grad: Tensor, mask: Tensor, projection: _Pass
    ) -> tuple[tuple, tuple] | None:
        """The gradients of both norms behind `add_relu`, from one kernel; or None."""
        run = self._own("batch_norm_add_relu_backward", grad)
        run = run and projection._own("batch_norm_add_relu_backward", grad)
        return run and run(grad, mask, self.raw, self.norm, projection.raw, projection.norm)

    def input_backward(
        self,
        grad: Tensor,
        size: Sequence[int],
        residual: Tensor | None,
        below: _Pass | None,
        residual_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple | None] | None:
        """The backend's `conv_backward_input`, where it has one that runs this."""
        run = (self if below is None else below)._own("conv_backward_input", grad)
        behind = None if below is None else (below.raw, *below.norm)
        geometry = self.layer.geometry
        masked = () if residual_mask is None else (residual_mask,)
        return run and run(grad, self.weight, size, *geometry, residual, behind, *masked)

    def adds_to_input_gradient(self, grad: Tensor, size: Sequence[int], residual: Tensor) -> bool:
        """Whether `input_backward` runs a tensor like `residual` along."""
        run = self._own("conv_backward_input_runs", grad)
        return bool(run and run(grad, self.weight, size, *self.layer.geometry, residual, None))

    def last_backward(self, grad: Tensor, output: Tensor, below: _Pass) -> tuple | None:
        """The backend's `norm_conv_backward_input`, likewise."""
        run = self._own("norm_conv_backward_input", grad)
        if run is None or below.layer.group is not None:
            return None
        behind = (below.raw, *below.norm)
        size, geometry = below.raw.shape[2:], self.layer.geometry
        return run(grad, output, self.raw, self.norm, self.weight, size, *geometry, behind)

    def norm_backward_from(
        self, grad: Tensor, sums: tuple[Tensor, Tensor, Tensor], need: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The norm's gradients from that behind it, which it may overwrite, and its sums."""
        total, dot, grad_weight = sums
        grad_input = None
        if need[0]:
            grad_input, _ = backends.choose(grad.device.type).batch_norm_act_backward_input(
                grad, self.raw, None, self.bn_weight, self.bn_bias, self.mean, self.var,
                self.layer.eps, "none", total, dot, grad.numel() // grad.size(1), False, True,
            )  # fmt: skip
        return (grad_input, *self.norm_gradients(grad_weight, total, need))

    def norm_gradients(
        self, grad_weight: Tensor, grad_bias: Tensor, need: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of the weight and the bias, in their dtypes, where `need[1:]` asks for them."""
        return (
            grad_weight.to(self.bn_weight.dtype) if need[1] else None,
            grad_bias.to(self.bn_bias.dtype) if need[2] else None,
        )

    def convolve(self, input: Tensor) -> Tensor:
        self.raw = conv2d(input, self.weight, self.bias, *self.layer.geometry)
        return self.raw

    def normalize(self, raw: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """With the batch's statistics, which it keeps."""
        group = self.layer.group
        if group is not None:
            shared = self.mean, self.var, self.count = shared_statistics(raw, group)
            return normalize(
                raw, shared, self.bn_weight, self.bn_bias, self.layer.eps, residual, activation
            )
        out, self.mean, self.var = batch_norm_act_training(
            raw, self.bn_weight, self.bn_bias, self.layer.eps, residual, activation
        )
        return out

    def pool(self, raw: Tensor, pool: tuple) -> tuple[Tensor, Tensor | None]:
        """`max_pool2d(normalize(raw, None, "relu"), *pool)`.

        And the maxima's places in their windows, where the backend keeps them.
        """
        run = self._own("batch_norm_relu_max_pool", raw)
        found = run and run(raw, self.bn_weight, self.bn_bias, self.layer.eps, pool)
        if found is None:
            return torch.max_pool2d(self.normalize(raw, None, "relu"), *pool), None
        out, offsets, self.mean, self.var = found
        return out, offsets

    def normalized(self) -> Tensor:
        """`relu(batch_norm(raw))` once more, to the same bits."""
        return batch_norm_act_inference(
            self.raw,
            self.mean,
            self.var,
            self.bn_weight,
            self.bn_bias,
            self.layer.eps,
            None,
            "relu",
        )

    def saved(self, keep_raw: bool = True) -> tuple[Tensor | None, ...]:
        return (self.raw if keep_raw else None, self.mean, self.var, self.count)

    def restore(self, saved: Sequence[Tensor | None]) -> None:
        self.raw, self.mean, self.var, self.count = saved

    def norm_backward(
        self,
        grad: Tensor,
        output: Tensor | None,
        activation: str,
        need: Sequence[bool],
        overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        group = self.layer.group
        if group is not None:
            shared = self.mean, self.var, self.count
            return shared_backward(
                grad, self.raw, output, self.bn_weight, self.bn_bias, shared,
                self.layer.eps, activation, group, need, overwrite,
            )  # fmt: skip
        return norm_act_backward(
            grad, self.raw, output, self.bn_weight, self.bn_bias, self.mean, self.var,
            self.layer.eps, activation, True, tuple(need), overwrite,
        )  # fmt: skip

    def conv_backward(
        self,
        grad: Tensor,
        input: Tensor,
        need: Sequence[bool],
        add_to: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias; the first is added to `add_to`, maybe in place."""
        grad_input = grad_weight = grad_bias = None
        need_input, *need_parameters = need
        kernel = _backend_function("conv_input_gradient", grad)
        if need_input and kernel is not None:
            grad_input = kernel(grad, input, self.weight, *self.layer.geometry, add_to)
            if grad_input is not None:
                need_input, add_to = False, None
        if need_input or any(need_parameters):
            by_library, grad_weight, grad_bias = conv2d_backward(
                grad, input, self.weight, *self.layer.geometry, (need_input, *need_parameters)
            )
            grad_input = by_library if need_input else grad_input
        if add_to is not None and grad_input is not None:
            again = torch.is_grad_enabled()
            grad_input = grad_input + add_to if again else grad_input.add_(add_to)
        return grad_input, grad_weight, grad_bias


def _backend_function(name: str, grad: Tensor) -> Callable[..., Any] | None:
    """What the backend has for the backward pass, unless that is to be differentiated again."""
    if torch.is_grad_enabled() or not is_plain(grad):
        return None
    return getattr(backends.choose(grad.device.type), name, None)


def _passes(layers: Sequence[_Layer], parameters: Sequence[Tensor | None]) -> list[_Pass]:
    return [
        _Pass(layer, parameters[_PARAMETERS * i : _PARAMETERS * (i + 1)])
        for i, layer in enumerate(layers)
    ]


class _ResidualBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, block: _Block, keep: Keep, *parameters: Tensor | None
    ) -> Tensor:
        passes = _passes(block.layers, parameters)
        output, mask = _run_block(block, passes, input, [])
        keep([(step.mean, step.var, step.count) for step in passes])
        ctx.block, ctx.backend = block, backends.chosen()
        saved = []
        for index, step in enumerate(passes):
            saved += step.saved(not _is_computed_again(block, passes, index))
        ctx.save_for_backward(input, output if mask is None else mask, *parameters, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with backends.as_chosen(ctx.backend), torch.autocast(grad.device.type, enabled=False):
            return _block_backward(ctx, grad)


def _is_computed_again(block: _Block, passes: Sequence[_Pass], index: int) -> bool:
    return (
        block.low_memory and index >= block.main - 1 and passes[index].weight.shape[2:].numel() == 1
    )


def _run_block(
    block: _Block, passes: Sequence[_Pass], input: Tensor, hidden: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The block's output, and its mask as bits if the backend kept that.

    Appends the main convolutions' inputs to `hidden` if autograd records.
    """
    h, before = input, None
    for step in passes[: block.main]:
        if torch.is_grad_enabled():
            hidden.append(h)
        if not step.convolve_with_statistics(h, before):
            if before is not None:
                h, before = before.normalized(), None
            if not step.convolve_with_statistics(h, None):
                step.convolve(h)
                if step is not passes[block.main - 1]:
                    h = step.normalize(step.raw, None, "relu")
                continue
        h, before = step.raw, step
    del h
    if block.has_projection:
        projection = passes[-1]
        if not projection.convolve_with_statistics(input, None):
            projection.convolve(input)
        shortcut = projection.raw
    else:
        projection, shortcut = None, block.subsampled(input)
    last = passes[block.main - 1]
    found = last.add_relu(shortcut, projection)
    if found is None and projection is not None:
        shortcut = projection.finish(None, "none")
        found = last.add_relu(shortcut, None)
    return found or (last.finish(shortcut, "relu"), None)


def _block_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    block: _Block = ctx.block
    count = _PARAMETERS * len(block.layers)
    input, output, *saved = ctx.saved_tensors
    passes = _passes(block.layers, saved[:count])
    for step, index in zip(passes, range(count, len(saved), _SAVED), strict=True):
        step.restore(saved[index : index + _SAVED])
    need_input, need = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
    needs = [need[_PARAMETERS * i : _PARAMETERS * (i + 1)] for i in range(len(passes))]
    hidden: list[Tensor] = []
    # To be differentiated again, what was kept is not enough: it has no history.
    again = torch.is_grad_enabled()
    if again:
        output, _ = _run_block(block, passes, input, hidden)

    def hidden_before(index: int) -> Tensor:
        if again:
            return hidden[index]
        return passes[index - 1].normalized() if index > 0 else input

    grads: list[Tensor | None] = [None] * count
    shortcut_grad: Tensor | None = None
    sums: tuple | None = None  # of grad, where the convolution behind found them
    joined: tuple | None = None  # the projection's norm's weight's and bias's, if already known
    need_shortcut = need_input or (block.has_projection and any(needs[-1]))
    projected = not (block.has_projection and need_shortcut)
    # Whoever takes the shortcut's gradient applies the mask, so that none is written.
    mask = None
    if need_shortcut and output.dtype is torch.uint8 and not (again or gradients_batched()):
        first, size = passes[0], input.shape[2:]
        takes_mask = block.shortcut_is_input(input, grad) and block.main > 1
        takes_mask = takes_mask and first.adds_to_input_gradient(first.raw, size, input)
        if block.has_projection or takes_mask:
            mask, grad = output, grad.contiguous(memory_format=torch.channels_last)

    def join_backward(last: _Pass) -> tuple | None:
        """Gradients behind the norms of both sides at once, if convolutions need them."""
        step, need_conv = passes[-1], (need_input, *needs[-1][:2])
        if mask is None or not block.has_projection or not any(need_conv):
            return None
        if step.raw is None:
            step.convolve(input)
        return last.add_relu_backward(grad, mask, step)

    def projection_backward(add_to: Tensor | None) -> Tensor | None:
        """The gradient in the input, plus `add_to`; keeps those of the parameters."""
        step, behind = passes[-1], shortcut_grad
        need_conv = (need_input, *needs[-1][:2])
        need_norm = (any(need_conv), *needs[-1][2:], False)
        if joined is not None:
            norm_grads = step.norm_gradients(*joined, need_norm)
        else:
            if step.raw is None:
                step.convolve(input)
            masked = (
                (None, "none", need_norm, not again) if mask is None else (mask, "relu", need_norm)
            )
            behind, *norm_grads, _ = step.norm_backward(behind, *masked)
        conv_grads = (None, None, None)
        if any(need_conv):
            conv_grads = step.conv_backward(behind, input, need_conv, add_to)
        grads[-_PARAMETERS:] = (*conv_grads[1:], *norm_grads)
        return conv_grads[0]

    for index in reversed(range(block.main)):
        step, last = passes[index], index == block.main - 1
        before = need_input or any(map(any, needs[:index]))
        need_conv = (before, needs[index][0], needs[index][1])
        h = hidden_before(index) if any(need_conv) or step.raw is None else None
        if step.raw is None:
            step.convolve(h)
        masks = last and need_shortcut and mask is None
        need_norm = (any(need_conv), *needs[index][2:], masks)
        input_grads, behind = None, grad
        both = join_backward(step) if last and any(need_conv) else None
        if last and before and index > 0 and mask is None:
            input_grads = step.last_backward(grad, output, passes[index - 1])
        if both is not None:
            (grad, *norm_grads), (behind, *joined) = both
            norm_grads = step.norm_gradients(*norm_grads, need_norm)
            both = passes[-1].raw = None
        elif input_grads is not None:
            *input_grads, grad, residual_grad, norm_grads = input_grads
            norm_grads = step.norm_gradients(*norm_grads, need_norm)
        elif sums is not None:
            grad, *norm_grads = step.norm_backward_from(grad, sums, need_norm)
        else:
            grad, *norm_grads, residual_grad = step.norm_backward(
                grad, output if last else None, "relu", need_norm, overwrite=not last and not again
            )
        step.raw = None
        if last:
            shortcut_grad = residual_grad if mask is None else behind
        # The shortcut's gradient, once masked, is the block's own, to be overwritten.
        adds = index == 0 and block.shortcut_is_input(input, shortcut_grad)
        add_to = shortcut_grad if adds else None
        if before and input_grads is None:
            if index > 0:
                below = passes[index - 1]
                input_grads = step.input_backward(grad, h.shape[2:], None, below)
            elif adds:
                input_grads = step.input_backward(grad, h.shape[2:], add_to, None, mask)
                if input_grads is None and mask is not None:
                    add_to = act_backward(add_to, mask, "relu")
            elif not projected and step.adds_to_input_gradient(grad, h.shape[2:], input):
                # The projection's goes first: the sum of both is part of this convolution then.
                add_to, projected = projection_backward(None), True
                input_grads = step.input_backward(grad, h.shape[2:], add_to, None)
        sums = None
        conv_grads = (None, None, None)
        if input_grads is not None:
            need_conv = (False, *need_conv[1:])
        if any(need_conv):
            conv_grads = step.conv_backward(grad, h, need_conv, add_to)
        if input_grads is not None:
            conv_grads = (input_grads[0], *conv_grads[1:])
            sums = input_grads[1]
        del h
        grad = conv_grads[0]
        grads[_PARAMETERS * index : _PARAMETERS * (index + 1)] = (*conv_grads[1:], *norm_grads)
        if not before:
            break
    if block.has_projection:
        if not projected:
            grad = projection_backward(grad if need_input else None)
    elif need_input and not block.shortcut_is_input(input, shortcut_grad):
        grad = grad.clone() if again else grad
        shortcut_grad = middle_channels(shortcut_grad, input.size(1))
        block.subsampled(grad).add_(shortcut_grad)
    return grad if need_input else None, None, None, *grads


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        layer: _Layer,
        pool: tuple,
        keep: Keep,
        *parameters: Tensor | None,
    ) -> Tensor:
        step = _Pass(layer, parameters)
        out, offsets = step.pool(step.convolve(input), pool)
        keep([(step.mean, step.var, step.count)])
        ctx.layer, ctx.pool, ctx.backend = layer, pool, backends.chosen()
        ctx.save_for_backward(input, *parameters, *step.saved(), offsets)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with backends.as_chosen(ctx.backend), torch.autocast(grad.device.type, enabled=False):
            return _stem_backward(ctx, grad)


def _stem_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, *saved = ctx.saved_tensors
    step = _Pass(ctx.layer, saved[:_PARAMETERS])
    *kept, offsets = saved[_PARAMETERS:]
    step.restore(kept)
    again = torch.is_grad_enabled()
    out = pool_grad = None
    name = "max_pool_backward" if offsets is None else "max_pool_backward_from_offsets"
    kernel = _backend_function(name, grad)
    if kernel is not None and offsets is not None:
        pool_grad = kernel(grad, offsets, step.raw.shape[2:], ctx.pool)
    elif kernel is not None and grad.numel() > 0:
        pool_grad = kernel(
            *(grad, step.raw, step.bn_weight, step.bn_bias, step.mean, step.var, ctx.layer.eps),
            ctx.pool,
        )
    if pool_grad is not None:
        grad = pool_grad
    else:
        out = step.normalize(step.convolve(input), None, "relu") if again else step.normalized()
        with torch.no_grad():
            _, indices = aten.max_pool2d_with_indices(out, *ctx.pool)
        grad = aten.max_pool2d_with_indices_backward(grad, out, *ctx.pool, (1, 1), False, indices)
        del indices
    need = ctx.needs_input_grad
    need_conv = (need[0], need[4], need[5])
    mask_from = out if again else None
    del out
    grad, grad_bn_weight, grad_bn_bias, _ = step.norm_backward(
        grad, mask_from, "relu", (any(need_conv), need[6], need[7], False), not again
    )
    conv_grads: tuple = (None, None, None)
    if any(need_conv):
        conv_grads = step.conv_backward(grad, input, need_conv)
    return conv_grads[0], None, None, None, *conv_grads[1:], grad_bn_weight, grad_bn_bias
