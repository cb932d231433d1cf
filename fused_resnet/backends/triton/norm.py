"""Batch norm with batch statistics, shortcut and ReLU, forward and backward: kernels, launchers.

    output = relu((input - mean) scale + bias + residual),  scale = weight / sqrt(var + eps)
    g = grad where output > 0,  total = sum(g),  dot = sum(g (input - mean))
    grad_input = scale (g - total / count - (input - mean) dot / (count (var + eps)))

(Ioffe and Szegedy, 2015, section 3.) A tensor is `rows` of C channels: with `channels_last` element
(row, c) is at `row C + c`, else at `(row // S) C S + c S + row % S` with S the pixels of an image.
Reductions are over rows. A slab of rows is added up by one program, the slabs in a second kernel in
one order; how many there are depends on the shape alone, so that the bits do not depend on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from ...layers.description import Norm, Sums
from ...layers.memory import contiguous_like_eager, memory_format_of
from ..backend import Gradients
from .device import _normalized, relu
from .launch import is_wide, launch_kernel
from .problem import ceil_div

# Elements that a program has in hand at a time: two accesses of 16 bytes for each of 128 threads.
_STEP = 2048
_WARPS = 4
# A row's bytes that a program reads: a cache line.
_LINE = 128
# Enough to fill a GPU; and the least steps of a program where that makes more of them.
_PROGRAMS = 1024
_LEAST_STEPS = 16
# The second kernel's, which loads all slabs of its channels at once.
_MOST_SLABS = 1024
_COMBINED_CHANNELS = 4
_COMBINE_WARPS = 8
# Steps of a program that does not reduce: they share its per-channel vectors.
_ELEMENTWISE_STEPS = 4
# For the interpreter, whose time goes by the number of operations.
_INTERPRETED_STEP = 2**14
_INTERPRETED_CHANNELS = 128


@triton.jit
def _place(C, steps, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(slab, first row, channels) of a program; neighbours share rows."""
    tiles_c = tl.cdiv(C, BLOCK_C)
    program = tl.program_id(0)
    slab = program // tiles_c
    c = (program - slab * tiles_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        return slab, slab.to(tl.int64) * (steps * BLOCK_R), c.to(tl.int64)
    return slab, slab * (steps * BLOCK_R), c


@triton.jit
def _offsets(row, c, C, S, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        return row[:, None] * C + c[None, :]
    return (row + row // S * S * (C - 1))[:, None] + (c * S)[None, :]


@triton.jit
def _norm(c, exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps):
    """`mean, invstd, scale, bias` in float32."""
    mean = tl.load(mean_ptr + c, mask=exists, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + c, mask=exists, other=1.0).to(tl.float32)
    invstd = tl.rsqrt(var + eps)
    scale = invstd
    if weight_ptr is not None:
        scale = scale * tl.load(weight_ptr + c, mask=exists, other=0.0).to(tl.float32)
    bias = tl.zeros_like(scale)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + c, mask=exists, other=0.0).to(tl.float32)
    return mean, invstd, scale, bias


@triton.jit
def _times_invstd(x, invstd):
    """`x invstd`, zero where a variance is infinite, and with it perhaps `x`."""
    return tl.where(invstd == 0.0, 0.0, x * invstd)


@triton.jit
def _bytes_of(row, row_exists, first_c, C, BLOCK_C: tl.constexpr):
    """Where the bits of BLOCK_C channels lie in a mask, a bit a value in memory order."""
    byte = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    return row[:, None] * (C // 8) + byte[None, :], row_exists[:, None] & (byte < C // 8)[None, :]


@triton.jit
def _unmasked(g, mask_ptr, row, row_exists, first_c, C):
    """`g`, zero where the mask has no bit; of channels from `first_c` on, a multiple of 8."""
    offsets, exists = _bytes_of(row, row_exists, first_c, C, g.shape[1])
    packed = tl.load(mask_ptr + offsets, mask=exists, other=0).to(tl.int32)
    bits = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.where(tl.reshape(bits, g.shape) == 0, 0.0, g)


@triton.jit
def _store_mask(out, mask_ptr, row, row_exists, first_c, C):
    """A bit a value: whether ReLU lets its gradient pass, as it does behind NaN."""
    offsets, exists = _bytes_of(row, row_exists, first_c, C, out.shape[1])
    passed = tl.where(out <= 0.0, 0, 1)
    bits = tl.reshape(passed, (out.shape[0], out.shape[1] // 8, 8))
    packed = tl.sum(bits << tl.arange(0, 8)[None, None, :], axis=2)
    tl.store(mask_ptr + offsets, packed.to(tl.uint8), mask=exists)


@triton.jit
def _first_channel(C, BLOCK_C: tl.constexpr):
    return tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C


@triton.jit
def _behind(
    grad_ptr, output_ptr, offsets, exists, row, rows, C, centred, scale, bias, RELU: tl.constexpr
):  # fmt: skip
    """The gradient behind the activation, which NaN lets pass."""
    g = tl.load(grad_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    if RELU:
        if output_ptr is None:
            g = tl.where(_normalized(centred, scale, bias) <= 0.0, 0.0, g)
        elif output_ptr.dtype.element_ty == tl.uint8:
            g = _unmasked(g, output_ptr, row, row < rows, _first_channel(C, g.shape[1]), C)
        else:
            value = tl.load(output_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
            g = tl.where(value <= 0.0, 0.0, g)
    return g


@triton.jit
def _sum_rows(x):
    """The sum over rows, a power of two up to 1024, by fours: none of many is lost beside one."""
    for _ in tl.static_range(4):
        if x.shape[0] > 4:
            x = tl.sum(tl.reshape(x, (4, x.shape[0] // 4, x.shape[1])), axis=0)
    return tl.sum(x, axis=0)


@triton.jit
def _shift_of(first, second, third):
    """What to take values less of, by three of them: zero, or a number near most of them.

    The median, since one of the three may be an outlier. A small shift would cost the sum digits,
    and so would one of more digits than the values have: both would round all values of a binade to
    the same side.
    """
    low, high = tl.minimum(first, second), tl.maximum(first, second)
    median = tl.maximum(low, tl.minimum(high, third))
    apart = tl.maximum(high, third) - tl.minimum(low, third)
    # Rounds to a multiple of a quarter to a half of what is apart.
    large = apart * 4194304.0
    shift = (median + large) - large
    shift = tl.where(tl.abs(median) > 2.0 * apart, shift, 0.0)
    # That of infinite values would make NaN of the mean, which is infinite.
    return tl.where(tl.abs(shift) < float("inf"), shift, 0.0)


@triton.jit
def _weights(n, of_most, count):
    """What parts of `n` values weigh, and the factor that a sum by these weights is to be taken by.

    Exact where all but one have `of_most`: what all values have in common, as an outlier's square,
    is rounded few times. A 32nd, so that neither the largest numbers nor the least are left.
    """
    return n / of_most * 0.03125, of_most / count * 32.0


@triton.jit
def _combine(weight, factor, base, mean, var):
    """`rounded, rest, var` of all rows, from those of parts, by `_weights`.

    A part's mean is `base + mean`, its `var` that of its values (Chan, Golub and LeVeque, 1983).
    The mean of all, `rounded + rest`, is taken in two steps, so that neither it nor the distances
    to it suffer from rounding; variances, unlike sums of squares, overflow only if they have to.
    """
    about = base + mean
    rounded = _sum_rows(weight * about) * factor
    # Of parts that agree, what they agree on: distances to it are nothing.
    least = tl.min(tl.where(weight > 0.0, about, float("inf")), axis=0)
    most = tl.max(tl.where(weight > 0.0, about, float("-inf")), axis=0)
    rounded = tl.minimum(tl.maximum(rounded, least), most)
    # With a thousandth of their digits no distance to it is rounded, all to the same side at worst.
    large = (most - least) * 8192.0
    rounded = (rounded + large) - large
    # An infinite one would make NaN of the mean, which is infinite.
    rounded = tl.where(tl.abs(rounded) < float("inf"), rounded, 0.0)
    mean = tl.where(weight > 0.0, (base - rounded[None, :]) + mean, 0.0)
    rest = _sum_rows(weight * mean) * factor
    apart = tl.where(weight > 0.0, mean - rest[None, :], 0.0)
    return rounded, rest, _sum_rows(weight * (var + apart * apart)) * factor


@triton.jit
def statistics_kernel(
    input_ptr,
    partial_ptr,
    rows,
    C,
    S,
    steps,
    slabs,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`partial[:, slab, c] = rounded, rest, var` of a slab, where `mean = rounded + rest`.

    BLOCK_R sums of `steps` values each are taken of the values less `_shift_of` three of the
    slab's: of the first, the middle and the last row.

    Reads the input once, writes 12 bytes a slab and channel.
    """
    slab, first, c = _place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    lane = tl.arange(0, BLOCK_R)
    row = first + lane
    exists = (row < rows)[:, None] & c_exists[None, :]
    offsets = _offsets(row, c, C, S, CHANNELS_LAST)
    x = tl.load(input_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
    last = tl.minimum(first + steps * BLOCK_R, rows) - 1
    sampled = c_exists[None, :]
    places = _offsets(first + tl.zeros((1,), tl.int32), c, C, S, CHANNELS_LAST)
    a = tl.load(input_ptr + places, mask=sampled, other=0.0).to(tl.float32)
    places = _offsets(
        first + (last - first) // 2 + tl.zeros((1,), tl.int32), c, C, S, CHANNELS_LAST
    )
    b = tl.load(input_ptr + places, mask=sampled, other=0.0).to(tl.float32)
    places = _offsets(last + tl.zeros((1,), tl.int32), c, C, S, CHANNELS_LAST)
    z = tl.load(input_ptr + places, mask=sampled, other=0.0).to(tl.float32)
    shift = _shift_of(a, b, z)
    total = tl.where(exists, x - shift, 0.0)
    square = total * total
    for step in tl.range(1, steps, loop_unroll_factor=2):
        row = first + step * BLOCK_R + lane
        exists = (row < rows)[:, None] & c_exists[None, :]
        offsets = _offsets(row, c, C, S, CHANNELS_LAST)
        x = tl.load(input_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        d = tl.where(exists, x - shift, 0.0)
        total += d
        square += d * d

    left = tl.minimum(rows - first, steps * BLOCK_R).to(tl.int32)
    n = tl.maximum((left - lane + (BLOCK_R - 1)) // BLOCK_R, 0).to(tl.float32)[:, None]
    per_value = 1.0 / tl.maximum(n, 1.0)
    mean = total * per_value
    # Of one value, and of squares that overflow, as they are: infinite.
    within = tl.where(square < float("inf"), square - total * mean, square)
    var = tl.where(n > 1.0, relu(within) * per_value, 0.0)
    weight, factor = _weights(n, 1.0, left.to(tl.float32))
    rounded, rest, var = _combine(weight, factor, shift + tl.zeros_like(mean), mean, var)
    place = partial_ptr + slab * C + c
    tl.store(place, rounded, mask=c_exists)
    tl.store(place + slabs * C, rest, mask=c_exists)
    tl.store(place + 2 * slabs * C, var, mask=c_exists)


@triton.jit
def combine_statistics_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    rows,
    C,
    slab_rows,
    slabs,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`mean[c]` and `var[c]`, biased, from the slabs'.

    Reads `12 slabs C` bytes, writes `8 C`.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    slab = tl.arange(0, BLOCK_S)
    exists = (slab < slabs)[:, None] & (c < C)[None, :]
    before = slab.to(tl.int64) * slab_rows
    n = tl.maximum(tl.minimum(rows - before, slab_rows), 0).to(tl.float32)[:, None]
    count = tl.cast(rows, tl.float32)
    places = partial_ptr + slab[:, None] * C + c[None, :]
    base = tl.load(places, mask=exists, other=0.0)
    mean = tl.load(places + slabs * C, mask=exists, other=0.0)
    var = tl.load(places + 2 * slabs * C, mask=exists, other=0.0)
    weight, factor = _weights(n, tl.cast(slab_rows, tl.float32), count)
    rounded, rest, var = _combine(weight, factor, base, mean, var)
    tl.store(mean_ptr + c, rounded + rest, mask=c < C)
    tl.store(var_ptr + c, var, mask=c < C)


@triton.jit
def normalize_kernel(
    input_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    mask_ptr,
    eps,
    rows,
    C,
    S,
    steps,
    P,
    Q,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    residual_mean_ptr,
    residual_var_ptr,
    residual_weight_ptr,
    residual_bias_ptr,
    residual_eps,
    RESIDUAL_CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`output = relu((input - mean) scale + bias + residual)`, rounded once.

    Reads the input and the residual once, writes the output once. The residual lies as the input
    does, or has RESIDUAL_CHANNELS channels, in the middle of the input's, of P x Q pixels. With
    `residual_mean` a norm of its own comes first, rounded as if it had been written. With `mask`
    writes a bit a value too: whether the stored output lets the gradient pass.
    """
    _, first, c = _place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, _, scale, bias = _norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
    if residual_mean_ptr is not None:
        residual_mean, _, residual_scale, residual_bias = _norm(
            c, c_exists, residual_mean_ptr, residual_var_ptr, residual_weight_ptr,
            residual_bias_ptr, residual_eps,
        )  # fmt: skip
    for step in range(steps):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        exists = (row < rows)[:, None] & c_exists[None, :]
        offsets = _offsets(row, c, C, S, CHANNELS_LAST)
        x = tl.load(input_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        out = _normalized(x - mean[None, :], scale, bias)
        if residual_ptr is not None:
            there = exists
            if RESIDUAL_CHANNELS is not None:
                k = c - (C - RESIDUAL_CHANNELS) // 2
                there = exists & ((k >= 0) & (k < RESIDUAL_CHANNELS))[None, :]
                pixels = (
                    (row // (P * Q)) * residual_stride_n
                    + (row // Q % P) * residual_stride_h
                    + (row % Q) * residual_stride_w
                )
                offsets_there = pixels[:, None] + k[None, :] * residual_stride_c
            else:
                offsets_there = offsets
            residual = tl.load(residual_ptr + offsets_there, mask=there, other=0.0)
            if residual_mean_ptr is not None:
                centred = residual.to(tl.float32) - residual_mean[None, :]
                residual = _normalized(centred, residual_scale, residual_bias)
                residual = residual.to(output_ptr.dtype.element_ty)
            out += residual.to(tl.float32)
        if RELU:
            out = relu(out)
        stored = out.to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + offsets, stored, mask=exists)
        if mask_ptr is not None:
            first_c = _first_channel(C, BLOCK_C)
            _store_mask(stored.to(tl.float32), mask_ptr, row, row < rows, first_c, C)


@triton.jit
def backward_sums_kernel(
    grad_ptr,
    input_ptr,
    output_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    masked_ptr,
    partial_ptr,
    eps,
    rows,
    C,
    S,
    steps,
    slabs,
    residual_ptr,
    residual_mean_ptr,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`partial[0, slab, c] = sum(g)`, `partial[1, slab, c] = sum(g (input - mean))` of a slab.

    `masked` is g, if it is wanted: the gradient of the residual. With a residual that has a norm of
    its own, `partial[2, slab, c] = sum(g (residual - residual_mean))`. The output may be its mask,
    see `normalize_kernel`.

    Reads grad, the input, the residual and the output (where there is none, its sign comes from the
    input) once, writes `masked` once and 8 bytes a slab and channel, 12 with a residual.
    """
    slab, first, c = _place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, _, scale, bias = _norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    dot = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    if residual_ptr is not None:
        residual_mean = tl.load(residual_mean_ptr + c, mask=c_exists, other=0.0).to(tl.float32)
        residual_dot = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for step in range(steps):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        exists = (row < rows)[:, None] & c_exists[None, :]
        offsets = _offsets(row, c, C, S, CHANNELS_LAST)
        x = tl.load(input_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        centred = x - mean[None, :]
        g = _behind(
            grad_ptr, output_ptr, offsets, exists, row, rows, C, centred, scale, bias, RELU
        )  # fmt: skip
        if masked_ptr is not None:
            tl.store(masked_ptr + offsets, g.to(masked_ptr.dtype.element_ty), mask=exists)
        total += g
        dot += tl.where(exists, g * centred, 0.0)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
            residual_dot += tl.where(exists, g * (residual - residual_mean[None, :]), 0.0)
    place = partial_ptr + slab * C + c
    tl.store(place, _sum_rows(total), mask=c_exists)
    tl.store(place + slabs * C, _sum_rows(dot), mask=c_exists)
    if residual_ptr is not None:
        tl.store(place + 2 * slabs * C, _sum_rows(residual_dot), mask=c_exists)


@triton.jit
def combine_sums_kernel(
    partial_ptr,
    var_ptr,
    total_ptr,
    dot_ptr,
    grad_weight_ptr,
    eps,
    C,
    slabs,
    residual_var_ptr,
    residual_total_ptr,
    residual_dot_ptr,
    residual_grad_weight_ptr,
    residual_eps,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`total[c]`, `dot[c]` from the slabs', and `grad_weight = dot / sqrt(var + eps)`.

    With a residual the same of its norm, whose total is the same.

    Reads `8 slabs C` bytes, writes `12 C`; with a residual `12 slabs C` and `24 C`.
    """
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    c_exists = c < C
    slab = tl.arange(0, BLOCK_S)
    exists = (slab < slabs)[:, None] & c_exists[None, :]
    places = partial_ptr + slab[:, None] * C + c[None, :]
    total = _sum_rows(tl.load(places, mask=exists, other=0.0))
    dot = _sum_rows(tl.load(places + slabs * C, mask=exists, other=0.0))
    tl.store(total_ptr + c, total, mask=c_exists)
    tl.store(dot_ptr + c, dot, mask=c_exists)
    var = tl.load(var_ptr + c, mask=c_exists, other=1.0).to(tl.float32)
    tl.store(grad_weight_ptr + c, _times_invstd(dot, tl.rsqrt(var + eps)), mask=c_exists)
    if residual_var_ptr is not None:
        dot = _sum_rows(tl.load(places + 2 * slabs * C, mask=exists, other=0.0))
        tl.store(residual_total_ptr + c, total, mask=c_exists)
        tl.store(residual_dot_ptr + c, dot, mask=c_exists)
        var = tl.load(residual_var_ptr + c, mask=c_exists, other=1.0).to(tl.float32)
        invstd = tl.rsqrt(var + residual_eps)
        tl.store(residual_grad_weight_ptr + c, _times_invstd(dot, invstd), mask=c_exists)


@triton.jit
def backward_input_kernel(
    grad_ptr,
    input_ptr,
    output_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    dot_ptr,
    grad_input_ptr,
    masked_ptr,
    eps,
    share,
    rows,
    C,
    S,
    steps,
    residual_ptr,
    residual_mean_ptr,
    residual_var_ptr,
    residual_weight_ptr,
    residual_dot_ptr,
    grad_residual_ptr,
    residual_eps,
    RELU: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`grad_input = scale (g - share total - (input - mean) share dot / (var + eps))`.

    `share` is one over the number of values. Without `total` the statistics are constants:
    `grad_input = scale g`. `masked` is g, if it is wanted. `grad_input` may be grad itself. A
    residual with a norm of its own gets its gradient by the same formula, from the same g.

    Reads grad, the input, the residual and the output once (where there is none, its sign comes
    from the input; the input is not read where nothing depends on it), writes each result once.
    """
    _, first, c = _place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, invstd, scale, bias = _norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
    if total_ptr is not None:
        offset = share * tl.load(total_ptr + c, mask=c_exists, other=0.0)
        slope = share * tl.load(dot_ptr + c, mask=c_exists, other=0.0)
        slope = _times_invstd(slope, invstd) * invstd
    if residual_ptr is not None:
        residual_mean, invstd, residual_scale, _ = _norm(
            c, c_exists, residual_mean_ptr, residual_var_ptr, residual_weight_ptr, None,
            residual_eps,
        )  # fmt: skip
        residual_slope = tl.load(residual_dot_ptr + c, mask=c_exists, other=0.0)
        residual_slope = _times_invstd(share * residual_slope, invstd) * invstd
    for step in range(steps):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        exists = (row < rows)[:, None] & c_exists[None, :]
        offsets = _offsets(row, c, C, S, CHANNELS_LAST)
        centred = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        if total_ptr is not None or (RELU and output_ptr is None):
            x = tl.load(input_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
            centred = x - mean[None, :]
        g = _behind(
            grad_ptr, output_ptr, offsets, exists, row, rows, C, centred, scale, bias, RELU
        )  # fmt: skip
        if masked_ptr is not None:
            tl.store(masked_ptr + offsets, g.to(masked_ptr.dtype.element_ty), mask=exists)
        if residual_ptr is not None:
            residual = tl.load(residual_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
            centred_residual = residual - residual_mean[None, :]
            h = g - offset[None, :] - centred_residual * residual_slope[None, :]
            h = (h * residual_scale[None, :]).to(grad_residual_ptr.dtype.element_ty)
            tl.store(grad_residual_ptr + offsets, h, mask=exists)
        if grad_input_ptr is not None:
            if total_ptr is not None:
                g = g - offset[None, :] - centred * slope[None, :]
            g = g * scale[None, :]
            tl.store(grad_input_ptr + offsets, g.to(grad_input_ptr.dtype.element_ty), mask=exists)


@dataclass(frozen=True)
class _Layout:
    """A dense tensor as rows of channels, and the tile that programs go through it with."""

    rows: int
    C: int
    S: int
    wide: bool
    block_r: int
    block_c: int

    @property
    def tiles_c(self) -> int:
        return ceil_div(self.C, self.block_c)

    @property
    def tiles_r(self) -> int:
        return ceil_div(self.rows, self.block_r)

    def constants(self) -> dict[str, Any]:
        """What all kernels that go through a tensor are compiled for."""
        return {
            "CHANNELS_LAST": self.S == 1,
            "WIDE": self.wide,
            "BLOCK_R": self.block_r,
            "BLOCK_C": self.block_c,
            "num_warps": _WARPS,
        }

    def reduction(self) -> tuple[int, int]:
        """(steps of a program, slabs): a function of shape and dtype."""
        # Without `ceil_div`, here and below: these are asked for every launch.
        tiles_c, tiles_r = -(-self.C // self.block_c), -(-self.rows // self.block_r)
        wanted = max(-(-_PROGRAMS // tiles_c), tiles_r // _LEAST_STEPS)
        steps = -(-tiles_r // min(wanted, _MOST_SLABS))
        return steps, -(-tiles_r // steps)

    def elementwise(self) -> tuple[int, int]:
        """(steps of a program, programs), where every element goes by itself."""
        tiles_c, tiles_r = -(-self.C // self.block_c), -(-self.rows // self.block_r)
        many = tiles_r * tiles_c >= _ELEMENTWISE_STEPS * _PROGRAMS
        steps = _ELEMENTWISE_STEPS if many else 1
        return steps, -(-tiles_r // steps) * tiles_c


def _layout_of(input: Tensor) -> _Layout:
    """Of a tensor from `contiguous_like_eager`, with at least one element."""
    C = input.size(1)
    rows = input.numel() // C
    pixels = rows // input.size(0)
    S = pixels if input.is_contiguous() and C > 1 else 1
    step, channels = _STEP, _LINE // input.element_size() if S == 1 else 1
    if input.device.type != "cuda":
        step, channels = _INTERPRETED_STEP, _INTERPRETED_CHANNELS
    # `triton.next_power_of_2` takes three calls for it.
    block_c = min(1 << (C - 1).bit_length(), channels)
    # Rows of the last step, which need not exist, are counted on.
    wide = input.numel() + _ELEMENTWISE_STEPS * step * C >= 2**31
    return _Layout(rows, C, S, wide, step // block_c, block_c)


def _lying_like(tensor: Tensor, input: Tensor) -> Tensor:
    """`tensor`, copied if it does not lie in memory as `input` does."""
    channels_last = not input.is_contiguous()
    memory_format = memory_format_of(input) if channels_last else torch.contiguous_format
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return torch.empty_like(input).copy_(tensor)


def _sign_source(output: Tensor | None, input: Tensor, relu: bool) -> Tensor | None:
    """What kernels take for the output: lying as the input, or a mask, which does."""
    if output is None or not relu or output.dtype is torch.uint8:
        return output if relu else None
    return _lying_like(output, input)


def _is_image(tensor: Tensor) -> bool:
    """Whether it has pixels (H, W), whose offsets 32 bits hold."""
    return tensor.dim() == 4 and not is_wide(tensor)


def _vectors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    found = []
    for tensor in tensors:
        found.append(tensor if tensor is None else tensor.contiguous())
    return tuple(found)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all dimensions but the second.

    Args:
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.

    Returns:
        (C,) and (C,), float32.
    """
    input = contiguous_like_eager(input)
    layout = _layout_of(input)
    steps, slabs = layout.reduction()
    partial, mean, var = _partial(input, 3, slabs), *_results(input, 2)
    block_c = _combined(input)
    launch_kernel(
        input,
        statistics_kernel,
        (slabs * layout.tiles_c,),
        (input, partial, layout.rows, layout.C, layout.S, steps, slabs),
        writes=("partial_ptr",),
        **layout.constants(),
    )
    launch_kernel(
        input,
        combine_statistics_kernel,
        (-(-layout.C // block_c),),
        (partial, mean, var, layout.rows, layout.C, steps * layout.block_r, slabs),
        writes=("mean_ptr", "var_ptr"),
        BLOCK_S=_MOST_SLABS,
        BLOCK_C=block_c,
        num_warps=_COMBINE_WARPS,
    )
    return mean, var


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches: see `reference.batch_norm_act_training` for what they compute.

    Args:
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        weight: (C,) of any floating dtype, or None.
        bias: see `weight`.
        eps: added to the variance.
        residual: of the input's shape and dtype, with any strides, or with fewer channels, see
            `reference.pad_channels`, or None.
        activation: "relu" or "none".

    Returns:
        The output, in the memory format `F.batch_norm` would give it, the batch's mean and biased
        variance.
    """
    input = contiguous_like_eager(input)
    mean, var = batch_statistics(input)
    norm = Norm(mean, var, weight, bias, eps)
    return batch_norm_act_inference(input, norm, residual, activation), mean, var


def batch_norm_act_inference(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None,
    activation: str,
    residual_norm: Norm | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One launch; the arguments are those of `batch_norm_act_training`.

    With `residual_norm` the residual, of the input's shape, is normalized first and rounded, to the
    bits that a launch for it would write. `mask` is where to write the activation's, see
    `mask_for`.
    """
    input = contiguous_like_eager(input)
    layout = _layout_of(input)
    steps, programs = layout.elementwise()
    output = torch.empty_like(input)
    channels, size, strides = None, (1, 1), (0, 0, 0, 0)
    if residual is not None and residual.size(1) != layout.C and _is_image(residual):
        channels, size, strides = residual.size(1), residual.shape[2:], residual.stride()
    elif residual is not None:
        residual = _lying_like(reference.pad_channels(residual, layout.C), input)
    vectors = _vectors(*norm[:4])
    launch_kernel(
        input,
        normalize_kernel,
        (programs,),
        (
            input,
            *vectors,
            residual,
            output,
            mask,
            norm.eps,
            layout.rows,
            layout.C,
            layout.S,
            steps,
            *size,
            *strides,
            *_vectors(*(residual_norm or (None,) * 5)[:4]),
            None if residual_norm is None else residual_norm.eps,
        ),
        writes=("output_ptr", "mask_ptr"),
        RESIDUAL_CHANNELS=channels,
        RELU=activation == "relu",
        **layout.constants(),
    )
    return output


def mask_for(input: Tensor) -> Tensor | None:
    """Room for a bit a value in the memory order of `input`; None where kernels keep no mask."""
    if _layout_of(input).S > 1 or input.size(1) % 8 > 0:
        return None
    return torch.empty(input.numel() // 8, dtype=torch.uint8, device=input.device)


def batch_norm_add_relu(
    input: Tensor, norm: Norm, residual: Tensor, residual_norm: Norm | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """`relu(batch_norm(input) + batch_norm(residual))`, and what its backward wants to know.

    Args:
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        norm: mean and biased variance, or None twice where they are still to be found, weight,
            bias and eps.
        residual: see `batch_norm_act_training`.
        residual_norm: as `norm`, or None where the residual is added as it is.

    Returns:
        The output; its mask, see `mask_for`; mean and variance of the input; and of the residual,
        if it has a norm.
    """
    input = contiguous_like_eager(input)
    if norm[0] is None:
        norm = Norm(*batch_statistics(input), *norm[2:])
    if residual_norm is not None and residual_norm[0] is None:
        residual_norm = Norm(*batch_statistics(residual), *residual_norm[2:])
    mask = mask_for(input)
    output = batch_norm_act_inference(input, norm, residual, "relu", residual_norm, mask)
    return output, mask, norm[:2], None if residual_norm is None else residual_norm[:2]


def batch_norm_act_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    masked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradients of weight, bias and input need of all rows: two launches.

    Args:
        grad: of the output, with any strides.
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        output: what the activation returned, or its mask, see `mask_for`; or None where there was
            no residual.
        norm: its tensors of any floating dtype.
        activation: "relu" or "none".
        masked: where to write the gradient behind the activation, lying as the input; or None.

    Returns:
        Its sum, its sum with `input - mean`, and that over `sqrt(var + eps)`: (C,), float32.
    """
    input = contiguous_like_eager(input)
    grad = _lying_like(grad, input)
    total, dot, grad_weight = _sums_pass(grad, input, output, norm, activation == "relu", masked)
    return total, dot, grad_weight


_NO_NORM = Norm(None, None, None, None, 0.0)  # type: ignore[arg-type]


def _sums_pass(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    relu: bool,
    masked: Tensor | None,
    residual: Tensor | None = None,
    residual_norm: Norm = _NO_NORM,
) -> tuple[Tensor, ...]:
    """Launches `backward_sums_kernel` and what combines; all tensors lie as the input does.

    Returns:
        What `batch_norm_act_backward_sums` does, of the norm and of the residual's, if there.
    """
    output = _sign_source(output, input, relu)
    layout = _layout_of(input)
    steps, slabs = layout.reduction()
    second = residual is not None
    partial, found = _partial(input, 2 + second, slabs), _results(input, 3 + 3 * second)
    block_c = _combined(input)
    mean, var, weight, bias = _vectors(*norm[:4])
    residual_mean, residual_var = _vectors(*residual_norm[:2])
    launch_kernel(
        input,
        backward_sums_kernel,
        (slabs * layout.tiles_c,),
        (
            grad, input, output, mean, var, weight, bias, masked, partial, norm.eps, layout.rows,
            layout.C, layout.S, steps, slabs, residual, residual_mean,
        ),
        writes=("masked_ptr", "partial_ptr"),
        RELU=relu,
        **layout.constants(),
    )  # fmt: skip
    launch_kernel(
        input,
        combine_sums_kernel,
        (-(-layout.C // block_c),),
        (
            partial, var, *found[:3], norm.eps, layout.C, slabs,
            residual_var, *(found[3:] or (None,) * 3), residual_norm.eps,
        ),
        writes=(
            "total_ptr", "dot_ptr", "grad_weight_ptr",
            "residual_total_ptr", "residual_dot_ptr", "residual_grad_weight_ptr",
        ),
        BLOCK_S=_MOST_SLABS,
        BLOCK_C=block_c,
        num_warps=_COMBINE_WARPS,
    )  # fmt: skip
    return found


def batch_norm_act_backward_input(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    sums: Sums,
    need_residual: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradients that are as large as the input: one launch.

    Args:
        grad: see `batch_norm_act_backward_sums`, as are the arguments up to `activation`.
        input: see `grad`.
        output: see `grad`.
        norm: see `grad`.
        activation: see `grad`.
        sums: of the whole batch.
        need_residual: whether the residual's gradient is wanted.
        overwrite: whether `grad` may be overwritten, by the input's gradient.

    Returns:
        The gradients of the input and of the residual, None where not wanted.
    """
    input = contiguous_like_eager(input)
    relu = activation == "relu"
    given, grad = grad, _lying_like(grad, input)
    overwrite = (overwrite or grad is not given) and (relu or not need_residual)
    masked = torch.empty_like(input) if need_residual and relu else None
    grad_input = grad if overwrite else torch.empty_like(input)
    total, dot, count = sums
    if isinstance(count, Tensor):
        sums = Sums((total / count).float(), (dot / count).float(), 1)
    _input_pass(grad, input, output, norm, relu, sums, (grad_input, masked))
    return grad_input, (masked if relu else grad) if need_residual else None


def _input_pass(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    relu: bool,
    sums: Sums | None,
    results: tuple[Tensor | None, Tensor | None],
    second: Sequence[Any] = (None,) * 7,
) -> None:
    """Launches `backward_input_kernel`; `grad` and the results lie in memory as the input does.

    `sums` are None where the statistics are constants. `results` are the input's gradient and the
    residual's.
    `second` is the residual, its mean, variance, weight and dot, its gradient, and its norm's eps.
    """
    layout = _layout_of(input)
    steps, programs = layout.elementwise()
    output = _sign_source(output, input, relu)
    total, dot, count = (None, None, 1) if sums is None else sums
    vectors = _vectors(*norm[:4], total, dot)
    launch_kernel(
        input,
        backward_input_kernel,
        (programs,),
        (
            grad, input, output, *vectors, *results, norm.eps, 1.0 / count, layout.rows, layout.C,
            layout.S, steps, *second,
        ),
        writes=("grad_input_ptr", "masked_ptr", "grad_residual_ptr"),
        RELU=relu,
        **layout.constants(),
    )  # fmt: skip


def batch_norm_act_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    training: bool,
    need: Sequence[bool],
    overwrite: bool = False,
) -> Gradients:
    """Gradients of `batch_norm_act` in input, weight, bias and residual: three launches.

    Where the residual's is wanted, the pass that adds up writes it, and the last pass reads it in
    place of `grad` and `output`. For the arguments see `Backend.batch_norm_act_backward`.
    """
    input = contiguous_like_eager(input)
    relu = activation == "relu"
    need_input, need_weight, need_bias, need_residual = need
    given, grad = grad, _lying_like(grad, input)
    overwrite = (overwrite or grad is not given) and (relu or not need_residual)
    grad_residual = None
    if need_residual:
        grad_residual = torch.empty_like(input) if relu else grad
    grad_input = None
    if need_input:
        grad_input = grad if overwrite else torch.empty_like(input)
    masked = grad_residual if relu else None
    total = dot = grad_weight = None
    if need_weight or need_bias or (training and need_input):
        total, dot, grad_weight = batch_norm_act_backward_sums(
            grad, input, output, norm, activation, masked
        )
        if masked is not None:
            grad, masked, relu = masked, None, False
    if grad_input is not None or masked is not None:
        sums = Sums(total, dot, input.numel() // input.size(1)) if training else None
        _input_pass(grad, input, output, norm, relu, sums, (grad_input, masked))
    return (
        grad_input,
        grad_weight if need_weight else None,
        total if need_bias else None,
        grad_residual,
    )


def batch_norm_add_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    norm: Norm,
    residual: Tensor,
    residual_norm: Norm,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Gradients of `batch_norm_add_relu` where both sides have a norm: three launches.

    What two calls of `batch_norm_act_backward` return, to the bits, for one reading of `grad` less
    in both passes.

    Args:
        grad: of the output, with any strides.
        output: what `batch_norm_add_relu` returned, or its mask.
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        norm: the batch's mean and biased variance, weight, bias and eps.
        residual: of the input's shape and dtype, with any strides.
        residual_norm: as `norm`.

    Returns:
        For the input, and for the residual, its gradient and those of weight and bias, float32.
    """
    input = contiguous_like_eager(input)
    grad, residual = _lying_like(grad, input), _lying_like(residual, input)
    total, dot, grad_weight, residual_total, residual_dot, residual_grad_weight = _sums_pass(
        grad, input, output, norm, True, None, residual, residual_norm
    )
    grad_input, grad_residual = torch.empty_like(input), torch.empty_like(input)
    residual_vectors = _vectors(*residual_norm[:3])
    _input_pass(
        grad, input, output, norm, True, Sums(total, dot, input.numel() // input.size(1)),
        (grad_input, None),
        (residual, *residual_vectors, residual_dot, grad_residual, residual_norm.eps),
    )  # fmt: skip
    of_residual = (grad_residual, residual_grad_weight, residual_total)
    return (grad_input, grad_weight, total), of_residual


def _partial(input: Tensor, values: int, slabs: int) -> Tensor:
    return torch.empty((values, slabs, input.size(1)), dtype=torch.float32, device=input.device)


def _results(input: Tensor, count: int) -> tuple[Tensor, ...]:
    channels = input.size(1)
    found = []
    for _ in range(count):
        found.append(torch.empty(channels, dtype=torch.float32, device=input.device))
    return tuple(found)


def _combined(input: Tensor) -> int:
    """Channels of a program that combines."""
    return _COMBINED_CHANNELS if input.device.type == "cuda" else _INTERPRETED_CHANNELS
