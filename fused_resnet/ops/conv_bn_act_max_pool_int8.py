"""`conv_bn_act_max_pool_int8`: a network's stem in eight or sixteen bits, from its parameters.

Inference only: its output has no gradient. It computes `reference.quantized_stem` of what
`layers/quantized.py` makes of the parameters, in copies that are kept and made anew when a
parameter changes; see `layers/quantized_copies.py`. Compilers see one operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backends, reference
from ..layers.description import Pool, Stem, conv_norm_of
from ..layers.quantized import Quantization
from ..layers.quantized_copies import StemCopy, copy_of_stem
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
    "conv_bn_act_max_pool_int8(Tensor input, Tensor weight, Tensor running_mean, "
    "Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, "
    "int[2] stride, int[2] padding, int[2] dilation, int groups, int[2] pool_kernel_size, "
    "int[2] pool_stride, int[2] pool_padding, int bits, float step, int zero_point, "
    "float output_step) -> Tensor"
)
_operator = torch.ops.fused_resnet.conv_bn_act_max_pool_int8.default

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def conv_bn_act_max_pool_int8(
    input: Tensor, stem: Stem, stored: Quantization, output: Quantization
) -> Tensor | None:
    """A stem that fits its input.

    Args:
        input: (N, C, H, W).
        stem: see `Stem`; it has one group.
        stored: how the input is quantized; see `layers.quantized.quantized_stem`.
        output: how the output is, with zero point 0.

    Returns:
        (N, K, P, Q) in the dtype of `input` (under autocast, in autocast's), or None where the stem
        has to be run in floating point: the dtype does not fit, a tensor is of another library, or
        a parameter is not finite.
    """
    (layer,), pool, bits = stem
    weight, norm, bias, *_ = layer
    if not nothing_intercepts(input, weight, *norm[:4], bias):
        if has_foreign(input, weight, *norm[:4], bias) or input.dtype not in DTYPES:
            return None
        return _operator(input, *layer.flat(), *pool, bits, *stored, output.step)
    if input.dtype not in DTYPES:
        return None
    copy = copy_of_stem(stem, stored, output)
    return _run(input, copy, stored, output) if copy.is_finite else None


def _run(input: Tensor, copy: StemCopy, stored: Quantization, output: Quantization) -> Tensor:
    input = input.detach()
    if has_foreign(input):
        return reference.quantized_stem(input, copy.block, stored, output)
    with torch.no_grad():
        backend = backends.choose(input.device.type)
        return backend.quantized_stem(input, copy.block, stored, output)


def _kernel(input: Tensor, *arguments: Any) -> Tensor:
    stem = Stem((conv_norm_of(arguments[:11]),), Pool(*arguments[11:14]), arguments[14])
    step, zero_point, output_step = arguments[15:]
    stored, output = Quantization(step, zero_point), Quantization(output_step)
    copy = copy_of_stem(stem, stored, output)
    if not copy.is_finite:
        raise ValueError("conv_bn_act_max_pool_int8: a parameter is not finite")
    return _run(input, copy, stored, output)


register_kernel("conv_bn_act_max_pool_int8", _kernel, operator_checks.conv_bn_act_max_pool_int8)


@register_fake("conv_bn_act_max_pool_int8", operator_checks.conv_bn_act_max_pool_int8)
def _fake(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
    *quantization: float,
) -> Tensor:
    out = torch.conv2d(input, weight.to(input.dtype), None, stride, padding, dilation, groups)
    return F.max_pool2d(out, list(pool_kernel_size), list(pool_stride), list(pool_padding))


def _autograd(*arguments: Any) -> Tensor:
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(*arguments)


library.impl("conv_bn_act_max_pool_int8", _autograd, "Autograd")


def _cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    input, *rest = arguments
    return autocast_tensor(input, dtype, device_type), *rest


register_autocast("conv_bn_act_max_pool_int8", _cast)
