"""The gradients of a residual block and of a stem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...backends.backend import NormSums
from ...layers.description import PARAMETERS, Layer, TrainedBlock
from ..gradients import act_backward, aten, middle_channels
from ..registration import gradients_batched
from .passes import Pass, kernels_for, passes_of, run_block


def block_backward(
    block: TrainedBlock, kept: Sequence[Any], need: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a block's input and of its layers' parameters, None where not needed.

    Args:
        block: what forward ran.
        kept: the input, the output or its mask as bits, the parameters, and what `Pass.saved` says
            of each layer.
        need: which gradients to compute, in the order in which they are returned.
        grad: of the output.
    """
    backward = _BlockBackward(block, kept, need, grad)
    for index in range(block.main - 1, backward.plan.first - 1, -1):
        backward.layer(index)
    return backward.results()


class Plan(NamedTuple):
    """What is settled before the first step.

    Attributes:
        first: the first main convolution, in forward's order, behind which a gradient is needed.
        need_shortcut: whether the gradient of the shortcut is.
        masked: whether whoever takes the shortcut's gradient applies the output's mask to it, so
            that no masked one is written; else it is the last norm's to mask.
        joined: whether one kernel may go behind both norms, the last one's and the projection's.
        adds: whether the shortcut's gradient is part of the first convolution's.
    """

    first: int
    need_shortcut: bool
    masked: bool
    joined: bool
    adds: bool


class _BlockBackward:
    """The steps of `block_backward`, from the last layer to the first, and what they hand on.

    `grad` is that behind the layer at hand, `shortcut` that of the shortcut as soon as it is known.
    """

    input: Tensor
    output: Tensor
    grad: Tensor | None

    def __init__(
        self,
        block: TrainedBlock,
        kept: Sequence[Any],
        need: Sequence[bool],
        grad: Tensor,
    ) -> None:
        count = PARAMETERS * len(block.layers)
        self.block, self.grad = block, grad
        self.input, self.output, *saved = kept
        kernels = kernels_for(grad)
        self.passes = passes_of(block.layers, saved[:count], kernels, saved[count:])
        self.need_input = need[0]
        # Of each layer the weight and bias of the convolution, then of the norm.
        self.needs = [need[i + 1 : i + 1 + PARAMETERS] for i in range(0, count, PARAMETERS)]
        self.hidden: list[Tensor] = []
        # To be differentiated again, what was kept is not enough: it has no history.
        self.again = torch.is_grad_enabled()
        if self.again:
            self.output, _ = run_block(block, self.passes, self.input, self.hidden)
        self.plan = self._planned()
        if self.plan.masked:
            self.grad = grad.contiguous(memory_format=torch.channels_last)
        self.grads: list[Tensor | None] = [None] * count
        self.shortcut: Tensor | None = None
        # Of `grad`, where the convolution behind found them.
        self.sums: NormSums | None = None
        # The gradients of the projection's norm's weight and bias, if already known.
        self.joined: list[Tensor] | None = None
        self.is_projected = not (block.has_projection and self.plan.need_shortcut)

    def _planned(self) -> Plan:
        block, input, grad = self.block, self.input, self.grad
        first = 0
        if not self.need_input:
            while first < block.main - 1 and not any(self.needs[first]):
                first += 1
        projection = self.needs[-1] if block.has_projection else None
        need_shortcut = self.need_input or (projection is not None and any(projection))
        masked = False
        if need_shortcut and self.output.dtype is torch.uint8 and not self.again:
            takes_mask = block.shortcut_is_input(input, grad) and block.main > 1
            if not gradients_batched():
                masked = projection is not None or (
                    takes_mask
                    and self.passes[0].adds_to_input_gradient(
                        self.passes[0].raw, input.shape[2:], input
                    )
                )
        joined = False
        if masked and projection is not None:
            joined = self.need_input or projection[0] or projection[1]
        adds = need_shortcut and block.shortcut_is_input(input, grad)
        return Plan(first, need_shortcut, masked, joined, adds)

    def _hidden_before(self, index: int) -> Tensor:
        if self.again:
            return self.hidden[index]
        return self.passes[index - 1].normalized() if index > 0 else self.input

    def layer(self, index: int) -> None:
        """Behind its norm, then behind its convolution."""
        assert self.grad is not None  # or this layer would not be gone behind
        step, is_last = self.passes[index], index == self.block.main - 1
        below = self.need_input or index > self.plan.first
        need_weight, need_bias, *need_norm = self.needs[index]
        need_conv = below or need_weight or need_bias
        h = self._hidden_before(index) if need_conv or step.raw is None else None
        if step.raw is None:
            step.convolve(h)
        # The gradient of its input and the sums below, if a kernel has both.
        found: tuple[Tensor, NormSums | None] | None = None
        norm_grads: Sequence[Tensor | None]
        if is_last:
            found, norm_grads = self._last_norm(index, need_conv, need_norm)
        elif self.sums is not None:
            need = (need_conv, *need_norm)
            self.grad, *norm_grads = step.norm_backward_from(self.grad, self.sums, need)
        else:
            need = (need_conv, *need_norm, False)
            self.grad, *norm_grads, _ = step.norm_backward(
                self.grad, None, "relu", need, overwrite=not self.again
            )
        self.sums = None
        del step.raw
        add_to = self.shortcut if index == 0 and self.plan.adds else None
        if below and found is None:
            assert h is not None
            found, add_to = self._input_gradient(index, h, add_to)
        conv_grads: tuple[Tensor | None, ...] = (None, None, None)
        if need_weight or need_bias or (below and found is None):
            assert self.grad is not None
            assert h is not None
            need = (below and found is None, need_weight, need_bias)
            conv_grads = step.conv_backward(self.grad, h, need, add_to)
        self.grad = conv_grads[0]
        if found is not None:
            self.grad, self.sums = found
        self.grads[PARAMETERS * index : PARAMETERS * (index + 1)] = (*conv_grads[1:], *norm_grads)

    def _last_norm(
        self, index: int, need_conv: bool, need_norm: Sequence[bool]
    ) -> tuple[tuple[Tensor, NormSums] | None, Sequence[Tensor | None]]:
        """Behind the norm before the add, its shortcut; the convolution in front may go along.

        Returns:
            The gradient of the convolution's input and the sums below, or None; the gradients of
            the norm's weight and bias.
        """
        step, grad, plan = self.passes[index], self.grad, self.plan
        assert grad is not None
        masks = plan.need_shortcut and not plan.masked
        need = (need_conv, *need_norm, masks)
        both = found = None
        if plan.joined and need_conv:
            projection = self.passes[-1]
            if projection.raw is None:
                projection.convolve(self.input)
            both = step.add_relu_backward(grad, self.output, projection)
        if index > 0 and (self.need_input or index > plan.first) and not plan.masked:
            found = step.last_backward(grad, self.output, self.passes[index - 1])
        if both is not None:
            self.grad, grad_weight, grad_bias = both[0]
            self.shortcut, *self.joined = both[1]
            del self.passes[-1].raw
            return None, step.norm_gradients(grad_weight, grad_bias, need)
        if found is not None:
            grad_input, sums, self.grad, self.shortcut, (grad_weight, grad_bias) = found
            return (grad_input, sums), step.norm_gradients(grad_weight, grad_bias, need)
        self.grad, *norm_grads, residual_grad = step.norm_backward(grad, self.output, "relu", need)
        self.shortcut = grad if plan.masked else residual_grad
        return None, norm_grads

    def _input_gradient(
        self, index: int, h: Tensor, add_to: Tensor | None
    ) -> tuple[tuple[Tensor, NormSums | None] | None, Tensor | None]:
        """The gradient of a convolution's input by a kernel that does more than that, or None.

        And what is still to be added to it otherwise.
        """
        assert self.grad is not None
        step, size = self.passes[index], h.shape[2:]
        if index > 0:
            return step.input_backward(self.grad, size, None, self.passes[index - 1]), add_to
        if self.plan.adds:
            mask = self.output if self.plan.masked else None
            found = step.input_backward(self.grad, size, add_to, None, mask)
            if found is None and mask is not None:
                assert add_to is not None
                add_to = act_backward(add_to, mask, "relu")
            return found, add_to
        if not self.is_projected and step.adds_to_input_gradient(self.grad, size, self.input):
            # The projection's goes first: the sum of both is part of this convolution then.
            add_to, self.is_projected = self._behind_projection(None), True
            return step.input_backward(self.grad, size, add_to, None), add_to
        return None, add_to

    def _behind_projection(self, add_to: Tensor | None) -> Tensor | None:
        """The gradient in the input, plus `add_to`; keeps those of the parameters."""
        step, behind = self.passes[-1], self.shortcut
        assert behind is not None  # or the projection would not be gone behind
        need_conv = (self.need_input, *self.needs[-1][:2])
        need_norm = (any(need_conv), *self.needs[-1][2:], False)
        norm_grads: Sequence[Tensor | None]
        if self.joined is not None:
            norm_grads = step.norm_gradients(self.joined[0], self.joined[1], need_norm)
        else:
            if step.raw is None:
                step.convolve(self.input)
            if self.plan.masked:
                found = step.norm_backward(behind, self.output, "relu", need_norm)
            else:
                found = step.norm_backward(behind, None, "none", need_norm, not self.again)
            behind, *norm_grads, _ = found
        conv_grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(need_conv):
            assert behind is not None
            conv_grads = step.conv_backward(behind, self.input, need_conv, add_to)
        self.grads[-PARAMETERS:] = (*conv_grads[1:], *norm_grads)
        return conv_grads[0]

    def results(self) -> tuple[Tensor | None, ...]:
        """The gradients, once those behind the shortcut are among them."""
        block, grad = self.block, self.grad
        if block.has_projection:
            if not self.is_projected:
                grad = self._behind_projection(grad if self.need_input else None)
        elif self.need_input and not self.plan.adds:
            assert grad is not None
            assert self.shortcut is not None
            grad = grad.clone() if self.again else grad
            shortcut = middle_channels(self.shortcut, self.input.size(1))
            block.subsampled(grad).add_(shortcut)
        return grad if self.need_input else None, *self.grads


def stem_backward(
    layer: Layer,
    pool: Sequence[Sequence[int]],
    kept: Sequence[Any],
    need: Sequence[bool],
    grad: Tensor,
) -> tuple[Tensor | None, ...]:
    """The gradients of a stem's input and parameters, None where not needed.

    Args:
        layer: what forward ran.
        pool: its max-pool's kernel size, stride and padding.
        kept: the input, the parameters, what `Pass.saved` says, and the maxima's places or None.
        need: see `block_backward`.
        grad: of the output.
    """
    input, *saved = kept
    kernels = kernels_for(grad)
    *of_layer, offsets = saved[PARAMETERS:]
    step = Pass(layer, saved[:PARAMETERS], *kernels, of_layer)
    again = torch.is_grad_enabled()
    out = pool_grad = None
    backend, is_direct = kernels
    if not is_direct:
        backend = None
    if backend is not None and offsets is not None:
        pool_grad = backend.max_pool_backward_from_offsets(grad, offsets, step.raw.shape[2:], pool)
    elif backend is not None and grad.numel() > 0:
        pool_grad = backend.max_pool_backward(grad, step.raw, step.norm, pool)
    if pool_grad is not None:
        grad = pool_grad
    else:
        out = step.normalize(step.convolve(input), None, "relu") if again else step.normalized()
        with torch.no_grad():
            _, indices = aten.max_pool2d_with_indices(out, *pool)
        grad = aten.max_pool2d_with_indices_backward(grad, out, *pool, (1, 1), False, indices)
        del indices
    need_conv = tuple(need[:3])
    mask_from = out if again else None
    del out
    grad_conv, grad_bn_weight, grad_bn_bias, _ = step.norm_backward(
        grad, mask_from, "relu", (any(need_conv), need[3], need[4], False), not again
    )
    del grad
    conv_grads: tuple[Tensor | None, ...] = (None, None, None)
    if any(need_conv):
        assert grad_conv is not None
        conv_grads = step.conv_backward(grad_conv, input, need_conv)
    return *conv_grads, grad_bn_weight, grad_bn_bias
