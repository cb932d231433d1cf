"""Blocks and stems in eight bits, and their weights as these kernels read them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch import Tensor

from ...layers.prepared import WeightCache, version_of
from ...layers.quantized import (
    Quantization,
    QuantizedBlock,
    QuantizedConv,
    QuantizedLinear,
    QuantizedStem,
)
from . import operators

# What a pixel's bytes are a multiple of, kBytePixel in csrc/cpu/quantized/conv.h.
_PIXEL = 16
# Up to so many channels of a stem a pixel has no other bytes, kMostNarrow in stem.cpp.
_NARROW = 8
_cache = WeightCache()


def run_quantized_blocks(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
    kernels: str = "",
) -> Tensor | None:
    """`reference.quantized_residual_blocks`, or None where a projection is more than a 1x1.

    Args:
        input: see there.
        blocks: see there.
        stored: see there.
        output: see there.
        kernels: one of `torch.ops.fused_resnet.quantized_kernels()`; "" for the fastest.
    """
    packed: list[Tensor] = []
    numbers: list[int] = []
    for block in blocks:
        for conv in block.convs:
            packed.append(_packed(conv, _PIXEL, kernels))
            numbers += (*conv.weight.shape, *conv.stride, *conv.padding, *conv.dilation)
            numbers.append(conv.groups)
    counts = [len(block.convs) for block in blocks]
    projections = [int(block.has_projection) for block in blocks]
    scales = [block.shortcut_scale for block in blocks]
    return operators.quantized_residual_blocks_packed(
        input, packed, numbers, counts, projections, scales, *stored, output.step, kernels
    )


def run_quantized_stem(
    input: Tensor,
    stem: QuantizedStem,
    stored: Quantization,
    output: Quantization,
    kernels: str = "",
) -> Tensor:
    """`reference.quantized_stem`.

    Args:
        input: see there.
        stem: see there; it has one group.
        stored: see there.
        output: see there.
        kernels: see `run_quantized_blocks`.
    """
    conv, low, pool = stem
    channels = conv.weight.shape[1]
    unit = channels if channels <= _NARROW else _PIXEL
    packed = _packed(conv, unit, kernels)
    packed_low = None if low is None else _packed(low, unit, kernels)
    numbers = (*conv.weight.shape, *conv.stride, *conv.padding, *conv.dilation, conv.groups)
    pooling = (*pool.kernel_size, *pool.stride, *pool.padding)
    return operators.quantized_stem_packed(
        input, packed, packed_low, numbers, pooling, *stored, output.step, kernels
    )


def run_quantized_head(
    input: Tensor,
    linear: QuantizedLinear,
    stored: Quantization,
    pooled: Quantization,
    kernels: str = "",
) -> Tensor:
    """`reference.quantized_pool_linear`.

    Args:
        input: see there.
        linear: see there.
        stored: see there.
        pooled: see there.
        kernels: see `run_quantized_blocks`.
    """
    return operators.quantized_pool_linear(input, *linear, stored.step, pooled.step, kernels)


def _packed(conv: QuantizedConv, unit: int, kernels: str) -> Tensor:
    layout = (conv.scale, conv.shift, conv.dilation[1], conv.groups, unit, sys.intern(kernels))
    entry = _cache.get(id(conv.weight))
    # Eight-bit copies are never written to, so who they are says what they hold.
    if (
        entry is not None
        and entry.owner is not None
        and entry.owner() is conv.weight
        and all(a is b for a, b in zip(entry.layout, layout, strict=True))
    ):
        return entry.copy
    packed = operators.pack_quantized_conv(conv.weight, *layout)
    _cache.put(conv.weight, version_of(conv.weight), packed, layout)
    return packed
