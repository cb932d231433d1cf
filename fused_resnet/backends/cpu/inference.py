"""Convolutions with everything after them in their epilogue, whole blocks, and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers import counting
from ...layers.activation import numbers_of
from ...layers.convolution import conv2d
from ...layers.description import GATES, Block, ConvNorm, Norm, Pool, SqueezeExcitation
from ...layers.memory import memory_format_of
from ..backend import Convolution
from . import operators, precision, weights
from .isa import (
    ISA,
    LARGEST_POOL,
    NATIVE_DTYPES,
    TILE_ISA,
    is_native,
    prefers_library,
)
from .norm import batch_norm_act_inference, batch_norm_act_inference_

# The images for which `pool_linear` is faster than torch's operators.
MOST_IMAGES = 16
# And their pixels, kMostPooledPixels in csrc/cpu/pool_linear.h.
_MOST_PIXELS = 2**24
# Stands for a tensor that is not there, in a list of tensors.
_ABSENT = torch.empty(0, device="cpu")


def conv_bn_act(input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str) -> Tensor:
    """One pass: see csrc/cpu/conv.h for the formula and the memory traffic."""
    weight, norm, bias, stride, padding, dilation, groups = layer
    if not is_native(input.dtype, weight.shape, groups):
        out = conv2d(input, weight, bias, stride, padding, dilation, groups)
        return batch_norm_act_inference(out, norm, residual, activation)
    if _leaves_to_library(input, layer):
        out = conv2d(input, weight, bias, stride, padding, dilation, groups)
        return batch_norm_act_inference_(out, norm, residual, activation)
    act = numbers_of(activation)
    return _convolve(operators.conv_bn_act_packed, (input,), layer, residual, *act, ())


def _leaves_to_library(input: Tensor, layer: ConvNorm) -> bool:
    """Whether torch's convolution is faster for a layer that the native kernel could run, too."""
    weight, groups = layer.weight, layer.groups
    return prefers_library(input.dtype, weight.shape, groups) and not _is_last(input, weight)


def _is_last(*tensors: Tensor) -> bool:
    return torch.channels_last in map(memory_format_of, tensors)


_preferred: dict[tuple[Any, ...], bool] = {}
_MOST_PREFERRED = 4096
# Products of one convolution, and of several, that take no longer than to find out that they can be
# fused.
_FEW_OF_ONE, _FEW_OF_SEVERAL = 2_000_000, 5_000_000
_FEW_PIXELS = 64
# Channels of images, and of the outputs of narrow networks' first convolutions.
_COLOURS, _NARROW = 4, 32


def prefers_modules(input: Tensor, convolutions: Sequence[Convolution], activated: bool) -> bool:
    """See `Backend.prefers_modules`: in NCHW small convolutions, and those of the library."""
    if input.is_contiguous(memory_format=torch.channels_last) and not input.is_contiguous():
        return False
    layers = tuple(
        (weight.shape, weight.stride(), stride, groups) for weight, stride, groups in convolutions
    )
    key = (input.shape, input.stride(), input.dtype, layers, activated)
    found = _preferred.get(key)
    if found is None:
        if len(_preferred) >= _MOST_PREFERRED:
            _preferred.clear()
        found = _preferred[key] = _are_better_left(input, convolutions, activated)
    return found


def _are_better_left(input: Tensor, convolutions: Sequence[Convolution], activated: bool) -> bool:
    if input.dtype is not torch.float32 or TILE_ISA:
        return False
    if _is_last(input, *(weight for weight, _, _ in convolutions)):
        return False
    pixels, products = input.size(2) * input.size(3), 0
    for weight, stride, _ in convolutions:
        pixels //= stride[0] * stride[1]
        products += input.size(0) * pixels * weight.numel()
    if len(convolutions) == 1:
        K, C, _, _ = weight.shape
        ((_, _, groups),) = convolutions
        is_stem = groups == 1 and C <= _COLOURS and K <= _NARROW
        is_left = is_stem or prefers_library(input.dtype, weight.shape, groups)
        return is_left or (products < _FEW_OF_ONE and not activated)
    # Of a filter for each channel and what is around it, images of few pixels are not left.
    strided = pixels > _FEW_PIXELS and any(groups > 1 for *_, groups in convolutions)
    return products < _FEW_OF_SEVERAL or strided


def norm_conv_bn_act(
    input: Tensor, before: Norm, layer: ConvNorm, residual: Tensor | None, activation: str
) -> Tensor:
    """One pass: what the convolution reads is normalised on its way into the cache."""
    if not is_native(input.dtype, layer.weight.shape, layer.groups):
        normalised = batch_norm_act_inference(input, before, None, "relu")
        return conv_bn_act(normalised, layer, residual, activation)
    act = numbers_of(activation)
    return _convolve(operators.norm_conv_bn_act_packed, (input, *before), layer, residual, *act)


def conv_bn_act_max_pool(input: Tensor, layer: ConvNorm, activation: str, pool: Pool) -> Tensor:
    """One pass: the convolution's rows are pooled while they are in the cache."""
    native = is_native(input.dtype, layer.weight.shape, layer.groups)
    if layer.groups > 1 or max(pool.kernel_size) > LARGEST_POOL or not native:
        return F.max_pool2d(conv_bn_act(input, layer, None, activation), *pool)
    kernel_size, stride, padding = pool
    numbers = (*kernel_size, *stride, *padding)
    act = numbers_of(activation)
    return _convolve(operators.conv_bn_act_packed, (input,), layer, None, *act, numbers)


def _convolve(
    operator: Callable[..., Tensor | None], before: tuple[Any, ...], layer: ConvNorm, *behind: Any
) -> Tensor:
    """A native operator, whose arguments come before and behind the layer."""
    weight, norm, bias, stride, padding, dilation, groups = layer
    if TILE_ISA and precision.current() != precision.followed:
        precision.follow()
    behind = (*norm, bias, *stride, *padding, *dilation, groups, *behind)
    out = operator(*before, weight, weights.packed(weight, groups), *behind)
    if out is None:
        out = operator(*before, weight, weights.packed_anew(weight, groups), *behind)
    if out is None:
        out = operator(*before, *weights.packed_copy(weight, groups), *behind)
        assert out is not None
    if counting.is_wanted():
        counting.mark_convolution(before[0], layer)
    return out


def residual_blocks(input: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """Whole blocks in one call: see csrc/cpu/residual_blocks.cpp, and `ops.residual_blocks`."""
    native: list[Tensor] = []
    numbers: list[int] = []
    eps: list[float] = []
    layer_counts: list[int] = []
    projections: list[int] = []
    dtype = input.dtype
    is_float32 = dtype is torch.float32
    if TILE_ISA and precision.current() != precision.followed:
        precision.follow()
    for layers, has_projection, step, _ in blocks:
        for weight, norm, bias, stride, padding, dilation, groups in layers:
            entry = weights.cache.find(weight) if is_float32 else None
            if entry is not None and not entry.whole:
                # Of this dtype all that is packed is native, if it lies as it did: the kernel says.
                packed = entry.copy
            elif is_native(dtype, weight.shape, groups):
                packed = weights.packed(weight, groups)
            else:
                return None
            mean, var, bn_weight, bn_bias, bn_eps = norm
            native += (
                weight,
                packed,
                mean,
                var,
                _ABSENT if bn_weight is None else bn_weight,
                _ABSENT if bn_bias is None else bn_bias,
                _ABSENT if bias is None else bias,
            )
            numbers += (*stride, *padding, *dilation, groups)
            eps.append(bn_eps)
        layer_counts.append(len(layers))
        projections.append(-step if step else has_projection)
    described = (numbers, eps, layer_counts, projections)
    try:
        out = operators.residual_blocks_packed(input, native, *described)
        for pack in (weights.as_packed_anew, weights.packed_copy):
            if out is not None:
                break
            for i, groups in zip(range(0, len(native), 7), numbers[6::7], strict=True):
                if not is_native(dtype, native[i].shape, groups):
                    return None
                native[i : i + 2] = pack(native[i], groups)
            out = operators.residual_blocks_packed(input, native, *described)
        if counting.is_wanted():
            counting.mark_blocks(input, blocks)
        return out
    except ValueError:
        # Shapes, dtypes or devices that do not go together: step by step the reason comes out.
        return None


def pool_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A network's head: see csrc/cpu/pool_linear.cpp, and `ops.pool_linear`."""
    if not ISA or input.dtype not in NATIVE_DTYPES or not 0 < input.size(0) <= MOST_IMAGES:
        return None
    _, C, H, W = input.shape
    # What does not go together is left to torch's operators, which say what.
    if (
        weight.dtype is not input.dtype
        or weight.device != input.device
        or not 0 < H * W <= _MOST_PIXELS
    ):
        return None
    if weight.dim() != 2 or weight.size(1) != C:
        return None
    if bias is not None and (bias.dtype is not input.dtype or bias.shape != weight.shape[:1]):
        return None
    side_by_side = input.stride(1) == 1 or input.stride(3) == 1
    dense = weight.stride(1) == 1 and (bias is None or bias.stride(0) == 1)
    if not (side_by_side and dense):
        return None
    if counting.is_wanted():
        counting.mark_linear(input, weight)
    return operators.pool_linear(input, weight, bias)


def squeeze_excitation(input: Tensor, layers: SqueezeExcitation) -> Tensor | None:
    """See csrc/cpu/squeeze_excitation.cpp, and `ops.squeeze_excitation`."""
    if not ISA or input.dtype not in NATIVE_DTYPES or not input.numel():
        return None
    N, C, H, W = input.shape
    reduce, reduce_bias, expand, expand_bias, activation, gate = layers
    R = reduce.size(0)
    # What does not go together is left to torch's operators, which say what.
    if (
        reduce.shape != (R, C, 1, 1)
        or expand.shape != (C, R, 1, 1)
        or R == 0
        or H * W > _MOST_PIXELS
        or (C > 1 and reduce.stride(1) != 1)
        or (R > 1 and expand.stride(1) != 1)
        or not (input.is_contiguous() or _is_last(input))
    ):
        return None
    for bias, channels in ((reduce_bias, R), (expand_bias, C)):
        if bias is not None and not (bias.shape == (channels,) and bias.is_contiguous()):
            return None
    for tensor in (reduce, expand, reduce_bias, expand_bias):
        if tensor is not None and (
            tensor.dtype is not input.dtype or tensor.device != input.device
        ):
            return None
    if counting.is_wanted():
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        reduced = counting.convolution((N, C, 1, 1), reduce.shape, *geometry)
        expanded = counting.convolution((N, R, 1, 1), expand.shape, *geometry)
        counting.mark([reduced, expanded])
    act = numbers_of(activation)
    return operators.squeeze_excitation(
        input, reduce, reduce_bias, expand, expand_bias, *act, GATES.index(gate)
    )


def runs_chains(input: Tensor) -> bool:
    """See `Backend.runs_chains`: of NCHW where that has been measured."""
    if not ISA or input.dtype not in NATIVE_DTYPES:
        return False
    return _is_last(input) or (input.dtype is torch.float32 and not TILE_ISA)
