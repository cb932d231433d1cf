"""What launches the kernels of `quantized_kernels.py`: residual blocks in int8, float8_e4m3fn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...layers.description import output_size
from ...layers.prepared import WeightCache, version_of
from ...layers.quantized import Quantization, QuantizedBlock, QuantizedConv, float32
from . import launch
from .launch import BAND, as_conv2d_would
from .problem import ceil_div
from .quantized_kernels import byte_conv_kernel, store_bytes_kernel

# Programs that keep every GPU of compute capability 8 and later busy: its multiprocessors.
_BUSY = 132


class Tile(NamedTuple):
    """How a convolution of bytes is cut up.

    Attributes:
        block_m: output pixels of a program.
        block_n: its output channels.
        block_k: products of a step.
        num_warps: of a program.
        num_stages: steps whose operands are on their way.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Stored(NamedTuple):
    """An activation in memory.

    Attributes:
        values: (N, H, W, C), int8, 128 less than its bytes, or float8_e4m3fn.
        zero_point: of the bytes; 0 in float8_e4m3fn.
    """

    values: Tensor
    zero_point: int


def covers(blocks: Sequence[QuantizedBlock]) -> bool:
    """Whether the projections are 1x1, of one group and without padding."""
    return all(
        tuple(block.convs[-1].weight.shape[2:]) == (1, 1)
        and block.convs[-1].groups == 1
        and max(block.convs[-1].padding) == 0
        for block in blocks
        if block.has_projection
    )


def residual_blocks(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
) -> Tensor:
    """Launches a kernel for the input and one for each convolution; a projection is its last's.

    See `reference.quantized_residual_blocks`, whose bits these are, or, of blocks with weights in
    that dtype, `reference.float8_residual_blocks`. The blocks are `covers`ed.
    """
    first = input
    x = store(input, stored, blocks[0].convs[0].weight.dtype)
    for i, block in enumerate(blocks):
        *inner, last = block.convs[:-1] if block.has_projection else block.convs
        values = x
        for layer in inner:
            values = Stored(_conv(values, layer, None, x, None), 0)
        is_end = i + 1 == len(blocks)
        out = _conv(values, last, block, x, (output.step, input.dtype) if is_end else None)
        x = Stored(out, 0)
        if is_end:
            return as_conv2d_would(out, first, first)
    raise AssertionError("there is at least one block")


def store(input: Tensor, stored: Quantization, dtype: torch.dtype) -> Stored:
    """(N, C, H, W) of any strides in bytes, int8 or float8_e4m3fn."""
    N, C, H, W = input.shape
    values = input.new_empty((N, H, W, C), dtype=dtype)
    pixels = N * H * W
    if values.numel() > 0:
        block_n = min(64, triton.next_power_of_2(C))
        block_m = 2048 // block_n
        launch.launch_kernel(
            input,
            store_bytes_kernel,
            (ceil_div(pixels, block_m), ceil_div(C, block_n)),
            (
                input, values, float32(1 / stored.step), stored.zero_point, pixels, H, W, C,
                input.stride(0), input.stride(1), input.stride(2), input.stride(3),
            ),
            WIDE=launch.is_wide(input, values),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return Stored(values, stored.zero_point)


def tile_for(M: int, C: int, K: int, groups: int, has_projection: bool) -> Tile:
    """How to cut up a convolution with M output pixels, C and K channels of a group.

    The largest tile of which there are enough programs for a GPU, none wider than a group. No GPU
    has measured it yet.
    """
    block_n = min(128, max(16, triton.next_power_of_2(K)))
    block_k = min(128, max(32, triton.next_power_of_2(C)))
    block_m = 128
    # Two sums beside each other take the registers of a tile of twice the size.
    if has_projection and block_n == 128:
        block_n = 64
    for _ in range(3):
        programs = ceil_div(M, block_m) * ceil_div(K, block_n) * groups
        if programs >= _BUSY:
            break
        if block_n > 64:
            block_n //= 2
        elif block_m > 32:
            block_m //= 2
    num_warps = 8 if block_m * block_n * (1 + has_projection) >= 128 * 128 else 4
    return Tile(block_m, block_n, block_k, num_warps, 3)


def _conv(
    read: Stored,
    layer: QuantizedConv,
    block: QuantizedBlock | None,
    block_input: Stored,
    end: tuple[float, torch.dtype] | None,
) -> Tensor:
    """A convolution: as bytes, or of `end` a step and a dtype as numbers, (N, P, Q, K).

    Args:
        read: its input.
        layer: what to compute.
        block: the block that it is the last convolution of, or None.
        block_input: what the shortcut is made of.
        end: see above.
    """
    N, H, W, _ = read.values.shape
    K, group_c, R, S = layer.weight.shape
    stride, padding, dilation, groups = layer[3:]
    P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    step, dtype = end or (1.0, read.values.dtype)
    output = read.values.new_empty((N, P, Q, K), dtype=dtype)
    M = N * P * Q
    if M == 0:
        return output
    projection = block.convs[-1] if block is not None and block.has_projection else None
    filters, sums = _arranged(layer)
    projected: tuple[Tensor | None, ...] = (None, None, None)
    if projection is not None:
        projected = (*_arranged(projection), projection.scale)
    shortcut = None if block is None else block_input.values
    _, block_h, block_w, block_c = block_input.values.shape
    tile = tile_for(M, group_c, K // groups, groups, projection is not None)
    even_c = group_c % tile.block_k == 0
    launch.launch_kernel(
        read.values,
        byte_conv_kernel,
        (ceil_div(M, tile.block_m) * groups * ceil_div(K // groups, tile.block_n),),
        (
            read.values, filters, sums, layer.scale, layer.shift, shortcut, *projected, output,
            read.zero_point, block_input.zero_point,
            1.0 if block is None else block.shortcut_scale, step, M, H, W, P, Q, group_c,
            K // groups, groups, block_h, block_w, block_c,
        ),
        R=R,
        S=S,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        PADDING_H=padding[0],
        PADDING_W=padding[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        PROJECTION_STRIDE_H=1 if projection is None else projection.stride[0],
        PROJECTION_STRIDE_W=1 if projection is None else projection.stride[1],
        EVEN_C=even_c,
        EVEN_BLOCK_C=block_c % tile.block_k == 0,
        WIDE=launch.is_wide(read.values, output, filters, shortcut),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BAND=BAND,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    return output


_cache = WeightCache()


def _arranged(layer: QuantizedConv) -> tuple[Tensor, Tensor | None]:
    """A weight as (K, R, S, C / groups), and the sum of each filter, int32.

    One in float8_e4m3fn is so many numbers in float16, and has None.
    """
    entry = _cache.get(id(layer.weight))
    # Eight-bit copies are never written to, so who they are says what they hold.
    if entry is not None and entry.owner is not None and entry.owner() is layer.weight:
        arranged: tuple[Tensor, Tensor | None] = entry.copy
        return arranged
    weight, sums = layer.weight, None
    if weight.dtype == torch.int8:
        sums = weight.sum((1, 2, 3), dtype=torch.int32)
    else:
        weight = weight.half()
    made = weight.permute(0, 2, 3, 1).contiguous(), sums
    _cache.put(layer.weight, version_of(layer.weight), made)
    return made
