"""Batch norm with batch statistics, shortcut and ReLU, forward and backward: kernels.

    output = relu((input - mean) scale + bias + residual),  scale = weight / sqrt(var + eps)
    g = grad where output > 0,  total = sum(g),  dot = sum(g (input - mean))
    grad_input = scale (g - total / count - (input - mean) dot / (count (var + eps)))

(Ioffe and Szegedy, 2015, section 3.) A tensor is `rows` of C channels: with `channels_last` element
(row, c) is at `row C + c`, else at `(row // S) C S + c S + row % S` with S the pixels of an image.
Reductions are over rows. A slab of rows is added up by one program, the slabs in a second kernel in
one order; how many there are depends on the shape alone, so that the bits do not depend on the GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import activated, normalized, relu


@triton.jit
def program_place(C, steps, WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
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
def load_norm(c, exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps):
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
def times_invstd(x, invstd):
    """`x invstd`, zero where a variance is infinite, and with it perhaps `x`."""
    return tl.where(invstd == 0.0, 0.0, x * invstd)


@triton.jit
def _bytes_of(row, row_exists, first_c, C, BLOCK_C: tl.constexpr):
    """Where the bits of BLOCK_C channels lie in a mask, a bit a value in memory order."""
    byte = first_c // 8 + tl.arange(0, BLOCK_C // 8)
    return row[:, None] * (C // 8) + byte[None, :], row_exists[:, None] & (byte < C // 8)[None, :]


@triton.jit
def unmasked(g, mask_ptr, row, row_exists, first_c, C):
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
            g = tl.where(normalized(centred, scale, bias) <= 0.0, 0.0, g)
        elif output_ptr.dtype.element_ty == tl.uint8:
            g = unmasked(g, output_ptr, row, row < rows, _first_channel(C, g.shape[1]), C)
        else:
            value = tl.load(output_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
            g = tl.where(value <= 0.0, 0.0, g)
    return g


@triton.jit
def sum_rows(x):
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
def shares_of(n, of_most, count):
    """What parts of `n` values weigh, and the factor that a sum by these weights is to be taken by.

    Exact where all but one have `of_most`: what all values have in common, as an outlier's square,
    is rounded few times. A 32nd, so that neither the largest numbers nor the least are left.
    """
    return n / of_most * 0.03125, of_most / count * 32.0


@triton.jit
def combine(weight, factor, base, mean, var):
    """`rounded, rest, var` of all rows, from those of parts, by `shares_of`.

    A part's mean is `base + mean`, its `var` that of its values (Chan, Golub and LeVeque, 1983).
    The mean of all, `rounded + rest`, is taken in two steps, so that neither it nor the distances
    to it suffer from rounding; variances, unlike sums of squares, overflow only if they have to.
    """
    about = base + mean
    rounded = sum_rows(weight * about) * factor
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
    rest = sum_rows(weight * mean) * factor
    apart = tl.where(weight > 0.0, mean - rest[None, :], 0.0)
    return rounded, rest, sum_rows(weight * (var + apart * apart)) * factor


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
    slab, first, c = program_place(C, steps, WIDE, BLOCK_R, BLOCK_C)
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
    weight, factor = shares_of(n, 1.0, left.to(tl.float32))
    rounded, rest, var = combine(weight, factor, shift + tl.zeros_like(mean), mean, var)
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
    weight, factor = shares_of(n, tl.cast(slab_rows, tl.float32), count)
    rounded, rest, var = combine(weight, factor, base, mean, var)
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
    ACT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`output = activated((input - mean) scale + bias + residual)`, rounded once.

    Reads the input and the residual once, writes the output once. The residual lies as the input
    does, or has RESIDUAL_CHANNELS channels, in the middle of the input's, of P x Q pixels. With
    `residual_mean` a norm of its own comes first, rounded as if it had been written. With `mask`
    writes a bit a value too: whether the stored output lets the gradient pass.
    """
    _, first, c = program_place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, _, scale, bias = load_norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
    if residual_mean_ptr is not None:
        residual_mean, _, residual_scale, residual_bias = load_norm(
            c, c_exists, residual_mean_ptr, residual_var_ptr, residual_weight_ptr,
            residual_bias_ptr, residual_eps,
        )  # fmt: skip
    for step in range(steps):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        exists = (row < rows)[:, None] & c_exists[None, :]
        offsets = _offsets(row, c, C, S, CHANNELS_LAST)
        x = tl.load(input_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
        out = normalized(x - mean[None, :], scale, bias)
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
                residual = normalized(centred, residual_scale, residual_bias)
                residual = residual.to(output_ptr.dtype.element_ty)
            out += residual.to(tl.float32)
        out = activated(out, ACT, FIRST, SECOND)
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
    slab, first, c = program_place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, _, scale, bias = load_norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
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
    tl.store(place, sum_rows(total), mask=c_exists)
    tl.store(place + slabs * C, sum_rows(dot), mask=c_exists)
    if residual_ptr is not None:
        tl.store(place + 2 * slabs * C, sum_rows(residual_dot), mask=c_exists)


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
    total = sum_rows(tl.load(places, mask=exists, other=0.0))
    dot = sum_rows(tl.load(places + slabs * C, mask=exists, other=0.0))
    tl.store(total_ptr + c, total, mask=c_exists)
    tl.store(dot_ptr + c, dot, mask=c_exists)
    var = tl.load(var_ptr + c, mask=c_exists, other=1.0).to(tl.float32)
    tl.store(grad_weight_ptr + c, times_invstd(dot, tl.rsqrt(var + eps)), mask=c_exists)
    if residual_var_ptr is not None:
        dot = sum_rows(tl.load(places + 2 * slabs * C, mask=exists, other=0.0))
        tl.store(residual_total_ptr + c, total, mask=c_exists)
        tl.store(residual_dot_ptr + c, dot, mask=c_exists)
        var = tl.load(residual_var_ptr + c, mask=c_exists, other=1.0).to(tl.float32)
        invstd = tl.rsqrt(var + residual_eps)
        tl.store(residual_grad_weight_ptr + c, times_invstd(dot, invstd), mask=c_exists)


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
    _, first, c = program_place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, invstd, scale, bias = load_norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
    if total_ptr is not None:
        offset = share * tl.load(total_ptr + c, mask=c_exists, other=0.0)
        slope = share * tl.load(dot_ptr + c, mask=c_exists, other=0.0)
        slope = times_invstd(slope, invstd) * invstd
    if residual_ptr is not None:
        residual_mean, invstd, residual_scale, _ = load_norm(
            c, c_exists, residual_mean_ptr, residual_var_ptr, residual_weight_ptr, None,
            residual_eps,
        )  # fmt: skip
        residual_slope = tl.load(residual_dot_ptr + c, mask=c_exists, other=0.0)
        residual_slope = times_invstd(share * residual_slope, invstd) * invstd
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
