"""Convolutions in training: forward on tiles or in pairs, the gradients in input and weight."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers import counting
from ...layers.description import Norm
from . import operators, precision
from .isa import GRADIENTS_ON_TILES, LEAST_ON_TILES, MOST_TAPS, TILE_ISA, TRAINED_ON_UNIT, is_native
from .norm import in_accumulation_dtype


def conv_batch_norm_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[Any],
    prologue: Norm | None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """In one pass, where a unit multiplies such values: see csrc/cpu/conv_training.cpp."""
    stride, padding, dilation, groups = geometry
    if (
        input.dtype not in TRAINED_ON_UNIT
        or not _trains(input.dtype, weight.shape, weight.stride(1), groups)
        or weight.dtype is not input.dtype
        or input.numel() == 0
        or not input.is_contiguous(memory_format=torch.channels_last)
        or (input.is_contiguous() and weight.is_contiguous())
    ):
        return None
    if input.dtype is torch.float32 and precision.current() != precision.followed:
        precision.follow()
    if bias is not None:
        (bias,) = in_accumulation_dtype(input, bias)
    norm = (None, None, None, None, 0.0) if prologue is None else prologue
    if counting.is_wanted():
        counting.mark([counting.convolution(input.shape, weight.shape, *geometry)])
    return operators.conv_training(
        input, weight, bias, *stride, *padding, *dilation, groups, *norm, statistics
    )


def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any]
) -> Tensor | None:
    """The first of `conv_batch_norm_statistics`, to the same bits, or None where that is."""
    found = conv_batch_norm_statistics(input, weight, bias, geometry, None, False)
    return None if found is None else found[0]


@functools.lru_cache(maxsize=1024)
def _trains(dtype: torch.dtype, weight_shape: torch.Size, c_stride: int, groups: int) -> bool:
    """Whether the native kernel, rather than the library's, is a convolution's forward pass."""
    K, C = weight_shape[:2]
    return (
        dtype in GRADIENTS_ON_TILES
        and (groups == 1 or (C >= LEAST_ON_TILES and K // groups >= LEAST_ON_TILES))
        and is_native(dtype, tuple(weight_shape), groups)
        # Packing a weight whose input channels do not lie together takes longer.
        and (c_stride == 1 or C == 1)
    )


def conv_input_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[Any],
    add_to: Tensor | None = None,
) -> Tensor | None:
    """The gradient of a convolution in its input, by the forward's own kernel.

    Args:
        grad: of the output, (N, K, P, Q).
        input: (N, C, H, W), of which only the shape, dtype and layout matter.
        weight: (K, C, R, S).
        geometry: stride, padding and dilation, two numbers each, and groups.
        add_to: a tensor like `input` to add the gradient to, in place; may be None.

    Returns:
        The gradient, `add_to` itself if there is one; None, with nothing done, where the kernel
        does not cover the convolution: with a stride it has to be 1x1 without padding.
    """
    stride, padding, dilation, groups = geometry
    _, C, R, S = weight.shape
    pointwise = R == S == 1
    if (
        groups != 1
        or not is_native(input.dtype, weight.shape, 1)
        or not grad.dtype is weight.dtype is input.dtype
        or not (input.is_contiguous(memory_format=torch.channels_last) or input.is_contiguous())
        # Packing a weight whose input channels do not lie together takes longer than it saves.
        or (weight.stride(1) != 1 and C > 1)
    ):
        return None
    if tuple(stride) == (1, 1):
        covered = 0 <= padding[0] <= dilation[0] * (R - 1) and 0 <= padding[1] <= dilation[1] * (
            S - 1
        )
    else:
        covered = pointwise and not any(padding)
    if not covered or (add_to is not None and add_to.shape != input.shape):
        return None
    out = operators.pool_empty_like(input) if add_to is None else add_to
    if TILE_ISA and precision.current() != precision.followed:
        precision.follow()
    operators.conv_input_gradient(
        grad, weight, *stride, *padding, *dilation, out, add_to is not None
    )
    return out


def conv_weight_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[Any]
) -> Tensor | None:
    """The gradient of a convolution in its weight, on tiles or pairs (csrc/cpu/weight_gradient.h).

    Sums are float32, in an order that the shapes alone decide.

    Args:
        grad: of the output, (N, K, P, Q).
        input: (N, C, H, W).
        weight: (K, C / groups, R, S), of which only the shape, dtype and layout matter.
        geometry: stride, padding and dilation, two numbers each, and groups.

    Returns:
        The gradient, in the weight's layout; None where no unit multiplies such values, or groups
        have so few channels that the library is faster.
    """
    stride, padding, dilation, groups = geometry
    K, C, R, S = weight.shape
    if (
        input.dtype not in TRAINED_ON_UNIT
        or not grad.dtype is weight.dtype is input.dtype
        or C < LEAST_ON_TILES
        or K // groups < LEAST_ON_TILES
        or R * S > MOST_TAPS
        or not _is_dense(weight)
    ):
        return None
    out = operators.pool_empty_like(weight)
    operators.conv_weight_gradient(grad, input, *stride, *padding, *dilation, groups, out)
    return out


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
