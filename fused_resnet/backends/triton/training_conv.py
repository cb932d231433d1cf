"""Convolutions of a training step with the neighbouring batch norms in them: kernels, launchers.

    forward    raw = conv(relu(batch_norm(input))), and the mean and variance of raw
    backward   g   = conv_transposed(scale (grad - total / count - ...)) + residual,
               where relu(batch_norm(below)) > 0, and sum(g), sum(g (below - mean))

Each part may be missing: see `forward` and `backward_input`. The sums are of what is stored, so of
the same rounded values as a pass of its own would see, and are added up per tile of pixels, then
over the tiles in one order: the bits depend on the tile, not on the GPU's schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layers.description import Norm, Sums, output_size
from ...tuning.choice import Tile
from ..library import precision
from . import launch
from .device import conv_sum, normalized, pixels, tile_of
from .norm import (
    COMBINE_WARPS,
    MOST_SLABS,
    combined_channels,
    contiguous_vectors,
    new_partials,
    new_vectors,
)
from .norm_kernels import (
    combine,
    combine_statistics_kernel,
    combine_sums_kernel,
    load_norm,
    shares_of,
    sum_rows,
    times_invstd,
    unmasked,
)
from .problem import ceil_div

# For the interpreter, whose time goes by the number of operations.
INTERPRETED_TILE = Tile(128, 128, 128, 1, 4, 1)
# Of the kernel that adds up tiles before the last one does.
_FOLDED_SLABS = 64
_FOLDED_CHANNELS = 32
_FOLD_WARPS = 4
_TABLE_BLOCK = 128


@triton.jit
def table_kernel(
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    dot_ptr,
    table_ptr,
    eps,
    share,
    C,
    BLOCK_C: tl.constexpr,
):
    """A norm as a prologue wants it: `table = mean, scale, bias`, C values a row.

    With the sums of its gradient `mean, scale, share total, share dot / (var + eps)`.

    Reads up to `24 C` bytes, writes 12 or 16 C.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < C
    mean, invstd, scale, bias = load_norm(c, exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
    tl.store(table_ptr + c, mean, mask=exists)
    tl.store(table_ptr + C + c, scale, mask=exists)
    if total_ptr is None:
        tl.store(table_ptr + 2 * C + c, bias, mask=exists)
    else:
        total = share * tl.load(total_ptr + c, mask=exists, other=0.0)
        slope = share * tl.load(dot_ptr + c, mask=exists, other=0.0)
        slope = times_invstd(slope, invstd) * invstd
        tl.store(table_ptr + 2 * C + c, total, mask=exists)
        tl.store(table_ptr + 3 * C + c, slope, mask=exists)


@triton.jit
def _store_part(
    acc,
    m,
    row_exists,
    rows_in_tile,
    first_k,
    channels,
    slab,
    slabs,
    bias_ptr,
    residual_ptr,
    residual_mask_ptr,
    below_ptr,
    below_table_ptr,
    output_ptr,
    partial_ptr,
    K,
    STATISTICS: tl.constexpr,
):
    """Stores `channels` channels from `first_k` on of a tile, and their share of the sums."""
    j = tl.arange(0, acc.shape[1])
    k = first_k + j
    k_exists = j < channels
    offsets = m[:, None] * K + k[None, :]
    exists = row_exists[:, None] & k_exists[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + k, mask=k_exists, other=0.0).to(tl.float32)[None, :]
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        if residual_mask_ptr is not None:
            residual = unmasked(residual, residual_mask_ptr, m, row_exists, first_k, K)
        acc += residual
    if below_ptr is not None:
        mean = tl.load(below_table_ptr + k, mask=k_exists, other=0.0)
        scale = tl.load(below_table_ptr + K + k, mask=k_exists, other=0.0)
        bias = tl.load(below_table_ptr + 2 * K + k, mask=k_exists, other=0.0)
        below = tl.load(below_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        centred = below - mean[None, :]
        # NaN lets the gradient pass.
        acc = tl.where(normalized(centred, scale, bias) <= 0.0, 0.0, acc)
    stored = acc.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + offsets, stored, mask=exists)
    value = stored.to(tl.float32)
    if below_ptr is not None:
        place = partial_ptr + slab * K + k
        total = tl.sum(tl.where(exists, value, 0.0), axis=0)
        dot = tl.sum(tl.where(exists, value * centred, 0.0), axis=0)
        tl.store(place, total, mask=k_exists)
        tl.store(place + slabs * K, dot, mask=k_exists)
    elif STATISTICS:
        place = partial_ptr + slab * K + k
        # The mean first, then the distances to it: what it lost to rounding they find again. With
        # half of its digits no distance is rounded, all to the same side at worst.
        rounded = tl.sum(tl.where(exists, value, 0.0), axis=0) / rows_in_tile
        rounded = (rounded.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        # An infinite one would make NaN of the mean, which is infinite.
        rounded = tl.where(tl.abs(rounded) < float("inf"), rounded, 0.0)
        distance = tl.where(exists, value - rounded[None, :], 0.0)
        rest = tl.div_rn(tl.sum(distance, axis=0), rows_in_tile)
        apart = tl.where(exists, distance - rest[None, :], 0.0)
        var = tl.sum(apart * apart, axis=0) / rows_in_tile
        tl.store(place, rounded, mask=k_exists)
        tl.store(place + slabs * K, rest, mask=k_exists)
        tl.store(place + 2 * slabs * K, var, mask=k_exists)


@triton.jit
def training_conv_kernel(
    input_ptr,
    above_ptr,
    weight_ptr,
    table_ptr,
    side_ptr,
    bias_ptr,
    residual_ptr,
    residual_mask_ptr,
    below_ptr,
    below_table_ptr,
    output_ptr,
    partial_ptr,
    M,
    H,
    W,
    P,
    Q,
    C,
    K,
    input_stride_n,
    input_stride_h,
    input_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    DENSE_ROWS: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_K: tl.constexpr,
    PROLOGUE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """`conv_kernels.conv_kernel`'s sum between other ends.

    Its input passes through a norm or a norm's backward on its way (PROLOGUE, TRANSPOSED: see
    `device.conv_sum`). Then, each if it is there:

        output  = sum + bias + residual, zero where relu(batch_norm(below)) is
        partial = of every tile of rows and channel: with STATISTICS `rounded, rest, var`, as
                  `norm_kernels.statistics_kernel` has them; with `below` `sum(output)` and
                  `sum(output (below - mean))`

    The residual may come with a mask, see `norm_kernels.normalize_kernel`.

    Reads the input, `above` and the weight as `conv_kernel` does, the residual and `below` once;
    writes the output and `side` once and 12 (with `below` 8) bytes a tile of rows and channel.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_N), BAND)
    first_k = tile_n * BLOCK_N
    slab = tile_m
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = m < M
    # Rows and columns past the edge compute the last one again, which needs no mask. Where there
    # are no such columns, their neighbours in a transposed weight are loaded together.
    rows, h, w = pixels(
        tl.minimum(m, M - 1), P, Q, input_stride_n, input_stride_h, input_stride_w, STRIDE_H,
        STRIDE_W, PADDING_H, PADDING_W, DENSE_ROWS,
    )  # fmt: skip
    column = first_k + tl.arange(0, BLOCK_N)
    if not EVEN_K:
        column = tl.minimum(column, K - 1)
    columns = column if TRANSPOSED else column * (R * S * C)
    c_blocks = tl.cdiv(C, BLOCK_K)
    acc = conv_sum(
        input_ptr, above_ptr, weight_ptr, table_ptr, side_ptr, rows, h, w, columns, 0,
        R * S * c_blocks, c_blocks, H, W, C, K, input_stride_h, input_stride_w, tile_n, R, S,
        DILATION_H, DILATION_W, PADDING_H + PADDING_W > 0, EVEN_C, PROLOGUE, TRANSPOSED, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    rows_in_tile = tl.minimum(M - tile_m * BLOCK_M, BLOCK_M).to(tl.float32)
    if BLOCK_N <= 64:
        _store_part(
            acc, m, row_exists, rows_in_tile, first_k, K - first_k, slab, tiles_m, bias_ptr,
            residual_ptr, residual_mask_ptr, below_ptr, below_table_ptr, output_ptr, partial_ptr,
            K, STATISTICS,
        )  # fmt: skip
    else:
        tl.static_assert(BLOCK_N == 128)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, 64)), (0, 2, 1)))
        for i in tl.static_range(2):
            _store_part(
                left if i == 0 else right, m, row_exists, rows_in_tile, first_k + 64 * i,
                K - first_k - 64 * i, slab, tiles_m, bias_ptr, residual_ptr,
                residual_mask_ptr, below_ptr, below_table_ptr, output_ptr, partial_ptr, K,
                STATISTICS,
            )  # fmt: skip


@triton.jit
def fold_kernel(
    partial_ptr,
    folded_ptr,
    rows,
    C,
    slab_rows,
    slabs,
    folded_slabs,
    STATISTICS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums of BLOCK_S slabs as those of one, so that few are left for the last kernel.

    Reads 12 (without STATISTICS 8) bytes a slab and channel, writes a BLOCK_S-th of that.
    """
    tiles_c = tl.cdiv(C, BLOCK_C)
    folded = tl.program_id(0) // tiles_c
    c = (tl.program_id(0) - folded * tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    slab = folded * BLOCK_S + tl.arange(0, BLOCK_S)
    exists = (slab < slabs)[:, None] & (c < C)[None, :]
    places = partial_ptr + slab[:, None] * C + c[None, :]
    place = folded_ptr + folded * C + c
    first = tl.load(places, mask=exists, other=0.0)
    second = tl.load(places + slabs * C, mask=exists, other=0.0)
    if STATISTICS:
        var = tl.load(places + 2 * slabs * C, mask=exists, other=0.0)
        before = slab.to(tl.int64) * slab_rows
        n = tl.maximum(tl.minimum(rows - before, slab_rows), 0).to(tl.float32)[:, None]
        weight, factor = shares_of(n, tl.cast(slab_rows, tl.float32), tl.sum(n))
        rounded, rest, var = combine(weight, factor, first, second, var)
        tl.store(place, rounded, mask=c < C)
        tl.store(place + folded_slabs * C, rest, mask=c < C)
        tl.store(place + 2 * folded_slabs * C, var, mask=c < C)
    else:
        tl.store(place, sum_rows(first), mask=c < C)
        tl.store(place + folded_slabs * C, sum_rows(second), mask=c < C)


class Ends(NamedTuple):
    """What is done to a gradient before and behind a convolution's sum, where it is there.

    Attributes:
        residual: (N, C, H, W), added to the result.
        residual_mask: where it counts, a bit a value, see `norm.mask_for`; None for everywhere.
        above: the convolution's output, its norm and the sums of that norm's gradient, where what
            is given is the gradient behind it; for 1x1 filters.
        below: the tensor that went through a norm and a ReLU to become the convolution's input, and
            that norm.
    """

    residual: Tensor | None = None
    residual_mask: Tensor | None = None
    above: tuple[Tensor, Norm, Sums] | None = None
    below: tuple[Tensor, Norm] | None = None


class _Operands(NamedTuple):
    """Of `training_conv_kernel`, those that need not be there."""

    table: Tensor | None = None
    above: Tensor | None = None
    side: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    residual_mask: Tensor | None = None
    below: Tensor | None = None
    below_table: Tensor | None = None


def table_of(norm: Norm, sums: Sums | None = None) -> Tensor:
    """`table_kernel`'s result for a norm: (3, C), or (4, C) with sums, float32."""
    C = norm.mean.numel()
    table = norm.mean.new_empty((3 if sums is None else 4, C), dtype=torch.float32)
    total, dot, count = (None, None, 1) if sums is None else sums
    vectors = contiguous_vectors(*norm[:4], total, dot)
    launch.launch_kernel(
        norm.mean,
        table_kernel,
        (-(-C // _TABLE_BLOCK),),
        (*vectors, table, norm.eps, 1.0 / count, C),
        writes=("table_ptr",),
        BLOCK_C=_TABLE_BLOCK,
        num_warps=_FOLD_WARPS,
    )
    return table


def forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[Any],
    prologue: Norm | None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor]:
    """`conv2d` of the input, or of `relu(batch_norm(input))`, and its statistics.

    Args:
        input: (N, C, H, W), float16, bfloat16 or float32, with at least one element. Copied to
            channels_last if it is not.
        weight: (K, C, R, S), the input's dtype. Copied likewise.
        bias: (K,) or None.
        geometry: stride, padding and dilation, two numbers each, and groups, of which there is one.
        prologue: the norm of the input, if there is one.
        tile: how to cut the problem up; sums are not shared.

    Returns:
        (N, K, P, Q), channels_last, the mean (K,) and biased variance (K,) of what was stored.
    """
    stride, padding, dilation, _ = geometry
    size = output_size(input.shape[2:], weight.shape[2:], stride, padding, dilation)
    operands = _Operands(table=None if prologue is None else table_of(prologue), bias=bias)
    filters = launch.filter_rows(weight)
    output, partial = _launch(input, filters, size, geometry, tile, operands, values=3)
    mean, var = new_vectors(output, 2)
    block_c = combined_channels(input)
    rows = output.numel() // output.size(1)
    assert partial is not None
    partial, slab_rows = _folded(output, partial, tile.block_m)
    launch.launch_kernel(
        input,
        combine_statistics_kernel,
        (-(-output.size(1) // block_c),),
        (partial, mean, var, rows, output.size(1), slab_rows, partial.size(1)),
        writes=("mean_ptr", "var_ptr"),
        BLOCK_S=MOST_SLABS,
        BLOCK_C=block_c,
        num_warps=COMBINE_WARPS,
    )
    return output, mean, var


def backward_input(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    geometry: Sequence[Any],
    ends: Ends,
    tile: Tile,
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor, Tensor] | None]:
    """The gradient of a convolution of stride 1 in its input, on its way through the norms.

    Args:
        grad: (N, K, P, Q): of the convolution's output or, with `ends.above`, behind the norm that
            follows it.
        weight: (K, C, R, S), grad's dtype.
        size: (H, W) of the convolution's input.
        geometry: see `forward`; the padding is at most `dilation (R - 1)`.
        ends: what comes before and behind it.
        tile: see `forward`.

    Returns:
        (N, C, H, W), channels_last: of the input, with `below` behind its norm; with `above`, the
        gradient of the convolution's output; and with `below` `norm.py`'s sums for it: of the
        gradient, of its product with `below - mean`, and that over `sqrt(var + eps)`.
    """
    residual, residual_mask, above, below = ends
    _, padding, dilation, groups = geometry
    _, C, R, S = weight.shape
    around = (dilation[0] * (R - 1) - padding[0], dilation[1] * (S - 1) - padding[1])
    # One tap has no inside: what pads a transposed 1x1 convolution would have to be cut off.
    assert min(around) >= 0, (padding, dilation)
    table = side = raw = None
    grad = launch.channels_last(grad)
    if above is not None:
        raw, norm, sums = above
        grad = grad.contiguous(memory_format=torch.channels_last)
        raw = raw.contiguous(memory_format=torch.channels_last)
        side = torch.empty_like(grad)
        table = table_of(norm, sums)
    below_raw = below_table = None
    if below is not None:
        below_raw = below[0].contiguous(memory_format=torch.channels_last)
        below_table = table_of(below[1])
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    operands = _Operands(table, raw, side, None, residual, residual_mask, below_raw, below_table)
    output, partial = _launch(
        grad, launch.filter_rows(weight), size, ((1, 1), around, dilation, groups), tile, operands,
        values=0 if below is None else 2, transposed=True,
    )  # fmt: skip
    if below is None:
        return output, side, None
    total, dot, grad_weight = new_vectors(output, 3)
    block_c = combined_channels(grad)
    assert partial is not None
    partial, _ = _folded(output, partial, tile.block_m)
    launch.launch_kernel(
        grad,
        combine_sums_kernel,
        (-(-C // block_c),),
        (
            partial, below[1].var.contiguous(), total, dot, grad_weight, below[1].eps, C,
            partial.size(1), None, None, None, None, 0.0,
        ),
        writes=("total_ptr", "dot_ptr", "grad_weight_ptr"),
        BLOCK_S=MOST_SLABS,
        BLOCK_C=block_c,
        num_warps=COMBINE_WARPS,
    )  # fmt: skip
    return output, side, (total, dot, grad_weight)


def _launch(
    input: Tensor,
    filters: Tensor,
    size: Sequence[int],
    geometry: Sequence[Any],
    tile: Tile,
    operands: _Operands,
    values: int,
    transposed: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Launches `training_conv_kernel`; returns its output and `values` partial sums a slab."""
    table, above, side, bias, residual, residual_mask, below, below_table = operands
    stride, padding, dilation, _ = geometry
    K = filters.size(3 if transposed else 0)
    pixels = launch.channels_last(input)
    N, C, H, W = pixels.shape
    P, Q = size
    R, S = filters.shape[1:3]
    M = N * P * Q
    output = input.new_empty((N, P, Q, K)).permute(0, 3, 1, 2)
    slabs = -(-M // tile.block_m)
    partial = new_partials(output, values, slabs) if values else None
    pointwise = R * S == 1 and max(padding) == 0 and max(stride) == 1
    prologue = "none"
    if table is not None:
        prologue = "norm" if above is None else "gradient"
    launch.launch_kernel(
        input,
        training_conv_kernel,
        (slabs * -(-K // tile.block_n),),
        (
            pixels, above, filters, table, side, bias, residual, residual_mask, below,
            below_table, output, partial, M, H, W, P, Q, C, K, pixels.stride(0), pixels.stride(2),
            pixels.stride(3),
        ),
        writes=("output_ptr", "side_ptr", "partial_ptr"),
        R=R,
        S=S,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        PADDING_H=padding[0],
        PADDING_W=padding[1],
        DILATION_H=dilation[0],
        DILATION_W=dilation[1],
        DENSE_ROWS=pointwise and launch.has_dense_rows(pixels),
        EVEN_C=C % tile.block_k == 0,
        EVEN_K=K % tile.block_n == 0,
        PROLOGUE=prologue,
        TRANSPOSED=transposed,
        STATISTICS=values == 3,
        PRECISION=precision(input),
        WIDE=launch.is_wide(pixels, filters, output),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BAND=launch.BAND,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return output, partial


def _folded(output: Tensor, partial: Tensor, slab_rows: int) -> tuple[Tensor, int]:
    """Partial sums of at most as many slabs as the last kernel takes, and the rows of one."""
    C = output.size(1)
    rows = output.numel() // C
    while partial.size(1) > MOST_SLABS:
        slabs = ceil_div(partial.size(1), _FOLDED_SLABS)
        folded = new_partials(output, partial.size(0), slabs)
        launch.launch_kernel(
            output,
            fold_kernel,
            (slabs * ceil_div(C, _FOLDED_CHANNELS),),
            (partial, folded, rows, C, slab_rows, partial.size(1), slabs),
            writes=("folded_ptr",),
            STATISTICS=partial.size(0) == 3,
            BLOCK_S=_FOLDED_SLABS,
            BLOCK_C=_FOLDED_CHANNELS,
            num_warps=_FOLD_WARPS,
        )
        partial, slab_rows = folded, slab_rows * _FOLDED_SLABS
    return partial, slab_rows
