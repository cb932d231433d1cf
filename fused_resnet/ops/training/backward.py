"""The gradients of a residual block and of a stem."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...layers.description import PARAMETERS, SAVED, Block, Layer
from ..gradients import act_backward, aten, middle_channels
from ..registration import gradients_batched
from .passes import Pass, backend_of, passes_of, run_block


def block_backward(
    block: Block, kept: Sequence[Tensor | None], need: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of a block's input and of its layers' parameters, None where not needed.

    Args:
        block: what forward ran.
        kept: the input, the output or its mask as bits, the parameters, and what `Pass.saved` says
            of each layer.
        need: which gradients to compute, in the order in which they are returned.
        grad: of the output.
    """
    count = PARAMETERS * len(block.layers)
    input, output, *saved = kept
    passes = passes_of(block.layers, saved[:count])
    for step, index in zip(passes, range(count, len(saved), SAVED), strict=True):
        step.restore(saved[index : index + SAVED])
    need_input, *need = need
    needs = [need[PARAMETERS * i : PARAMETERS * (i + 1)] for i in range(len(passes))]
    hidden: list[Tensor] = []
    # To be differentiated again, what was kept is not enough: it has no history.
    again = torch.is_grad_enabled()
    if again:
        output, _ = run_block(block, passes, input, hidden)

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

    def join_backward(last: Pass) -> tuple | None:
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
        grads[-PARAMETERS:] = (*conv_grads[1:], *norm_grads)
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
        grads[PARAMETERS * index : PARAMETERS * (index + 1)] = (*conv_grads[1:], *norm_grads)
        if not before:
            break
    if block.has_projection:
        if not projected:
            grad = projection_backward(grad if need_input else None)
    elif need_input and not block.shortcut_is_input(input, shortcut_grad):
        grad = grad.clone() if again else grad
        shortcut_grad = middle_channels(shortcut_grad, input.size(1))
        block.subsampled(grad).add_(shortcut_grad)
    return grad if need_input else None, *grads


def stem_backward(
    layer: Layer,
    pool: Sequence[Sequence[int]],
    kept: Sequence[Tensor | None],
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
    step = Pass(layer, saved[:PARAMETERS])
    *of_layer, offsets = saved[PARAMETERS:]
    step.restore(of_layer)
    again = torch.is_grad_enabled()
    out = pool_grad = None
    backend = backend_of(grad)
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
    grad, grad_bn_weight, grad_bn_bias, _ = step.norm_backward(
        grad, mask_from, "relu", (any(need_conv), need[3], need[4], False), not again
    )
    conv_grads: tuple = (None, None, None)
    if any(need_conv):
        conv_grads = step.conv_backward(grad, input, need_conv)
    return *conv_grads, grad_bn_weight, grad_bn_bias
