"""`scale_shift_act`: per-channel scale and shift, residual add and activation.

The schema and the kernels are native: `csrc/ops.cpp`, `csrc/cpu/` and `csrc/cuda/`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .gradients import accumulation_dtype, act_backward, channel_sum, middle_channels
from .registration import library, needs_grad, transforms_active

_operator = torch.ops.fused_resnet.scale_shift_act.default


def scale_shift_act(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """Calls the operator. See `reference.scale_shift_act` for what it computes."""
    return _operator(input, scale, shift, residual, activation)


@torch.library.register_fake("fused_resnet::scale_shift_act", lib=library)
def _fake(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    return torch.empty_like(input)


class _ScaleShiftAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output = _operator(*arguments)
        input, scale, _, residual, ctx.activation = arguments
        ctx.residual_channels = None if residual is None else residual.size(1)
        ctx.save_for_backward(
            input if ctx.needs_input_grad[1] else None,
            scale if ctx.needs_input_grad[0] else None,
            output if ctx.activation == "relu" else None,
        )
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, scale, output = ctx.saved_tensors
        need = ctx.needs_input_grad
        grad = act_backward(grad, output, ctx.activation)
        grad_input = grad_scale = None
        if need[0]:
            per_channel = (1, -1) + (1,) * (grad.dim() - 2)
            grad_input = (grad * scale.view(per_channel)).to(grad.dtype)
        if need[1]:
            grad_scale = channel_sum(grad.to(accumulation_dtype(input.dtype)) * input)
        return (
            grad_input,
            grad_scale,
            channel_sum(grad) if need[2] else None,
            middle_channels(grad, ctx.residual_channels) if need[3] else None,
            None,
        )


# The schema has defaults, and the dispatcher leaves out arguments equal to them.
def _autograd(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    if transforms_active():
        return reference.scale_shift_act(input, scale, shift, residual, activation)
    if needs_grad(input, scale, shift, residual):
        return _ScaleShiftAct.apply(input, scale, shift, residual, activation)
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(input, scale, shift, residual, activation)


library.impl("scale_shift_act", _autograd, "Autograd")
