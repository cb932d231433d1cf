"""`pool_linear_int8`: a network's classifier in eight bits, from its parameters.

Inference only: its output has no gradient. It computes `reference.quantized_pool_linear` of what
`layers/quantized.py` makes of the parameters, in copies that are kept and made anew when a
parameter changes; see `layers/quantized_copies.py`. Compilers see one operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import backends, reference
from ..layers.description import Head
from ..layers.quantized import Quantization, QuantizedLinear
from ..layers.quantized_copies import Copy, copy_of_head
from . import operator_checks
from .registration import (
    autocast_tensor,
    has_foreign,
    library,
    nothing_intercepts,
    register_autocast,
    register_fake,
    register_kernel,
)

library.define(
    "pool_linear_int8(Tensor input, Tensor weight, Tensor? bias, float step, float pooled_step) "
    "-> Tensor"
)
_operator = torch.ops.fused_resnet.pool_linear_int8.default


def pool_linear_int8(
    input: Tensor, head: Head, stored: Quantization, pooled: Quantization
) -> Tensor | None:
    """A classifier, `linear(flatten(adaptive_avg_pool2d(input, 1), 1), weight, bias)`.

    Args:
        input: (N, C, H, W).
        head: its parameters, which fit.
        stored: how the input is quantized, with zero point 0.
        pooled: how the mean over an image's pixels is, with zero point 0.

    Returns:
        (N, K) in the dtype of `input` (under autocast, in autocast's), or None where it has to be
        run in floating point: the shape or dtype does not fit, a tensor is of another library, or a
        parameter is not finite.
    """
    arguments = (input, *head, stored.step, pooled.step)
    if operator_checks.pool_linear_int8(*arguments) is not None or has_foreign(input, *head):
        return None
    if not nothing_intercepts(input, *head):
        return _operator(*arguments)
    copy = copy_of_head(head, pooled)
    return _run(input, copy, stored, pooled) if copy.is_finite else None


def _run(
    input: Tensor, copy: Copy[QuantizedLinear], stored: Quantization, pooled: Quantization
) -> Tensor:
    input = input.detach()
    if has_foreign(input):
        return reference.quantized_pool_linear(input, copy.block, stored, pooled)
    with torch.no_grad():
        backend = backends.choose(input.device.type)
        return backend.quantized_pool_linear(input, copy.block, stored, pooled)


def _kernel(
    input: Tensor, weight: Tensor, bias: Tensor | None, step: float, pooled_step: float
) -> Tensor:
    stored, pooled = Quantization(step), Quantization(pooled_step)
    copy = copy_of_head(Head(weight, bias), pooled)
    if not copy.is_finite:
        raise ValueError("pool_linear_int8: a parameter is not finite")
    return _run(input, copy, stored, pooled)


register_kernel("pool_linear_int8", _kernel, operator_checks.pool_linear_int8)


@register_fake("pool_linear_int8", operator_checks.pool_linear_int8)
def _fake(input: Tensor, weight: Tensor, bias: Tensor | None, *steps: float) -> Tensor:
    return input.new_empty(input.shape[0], weight.shape[0])


def _autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(*arguments)


library.impl("pool_linear_int8", _autograd, "Autograd")


def _cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    input, *rest = arguments
    return autocast_tensor(input, dtype, device_type), *rest


register_autocast("pool_linear_int8", _cast)
