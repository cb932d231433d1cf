"""The Triton kernels of residual blocks in eight bits.

An activation lies in memory as `[N, H, W, C]` of signed bytes: 128 less than what
`layers/quantized.py` calls its bytes, since tensor cores multiply bytes of the same kind. With z
the zero point and s the signed byte,

    sum (q - z) w = sum s w + (128 - z) sum w,

if what lies outside of the image counts as z - 128. The second sum is one integer a filter, worked
out beside the weight, so both are exact. What follows are float32 operations, each rounded by
itself, in the order of `reference.quantized_residual_blocks`: the kernels are compiled with
`enable_fp_fusion=False`, so that there is no multiply-add among them.

In float8_e4m3fn (`reference.float8_residual_blocks`) an activation lies there as these numbers, and
a weight as the same numbers in float16. Both are multiplied in float16, which holds them exactly,
with sums in float32: tensor cores for float8 keep too few bits of a sum on compute capability 9 for
what the reference promises. What is saved is memory traffic: a byte an activation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .device import pixels, tile_of


@triton.jit
def _rounded(steps, least, largest):
    """To the nearest integer, to even, of values clamped to no more than 2^22; NaN to `least`."""
    # Without `propagate_nan` a maximum is the operand that is a number.
    steps = tl.minimum(tl.maximum(steps, least), largest)
    # From 2^23 on float32 numbers are integers, and the addition rounds to them.
    return (steps + 12582912.0) - 12582912.0


@triton.jit
def _float8(steps, least):
    """e4m3 of numbers clamped to `least` and 448, nearest even; NaN stays NaN."""
    ALL: tl.constexpr = tl.PropagateNan.ALL
    steps = tl.minimum(tl.maximum(steps, least, propagate_nan=ALL), 448.0, propagate_nan=ALL)
    return steps.to(tl.float8e4nv)


@triton.jit
def store_bytes_kernel(
    input_ptr,
    output_ptr,
    inverse,
    zero_point,
    pixel_count,
    H,
    W,
    C,
    input_stride_n,
    input_stride_c,
    input_stride_h,
    input_stride_w,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`output[m, c] = clamp(round(input * inverse) + zero_point, 0, 255) - 128`, m a pixel.

    In float8 it is `e4m3(clamp(input * inverse, -448, 448))`. Reads the input and writes a byte for
    each of its elements, once. NaN becomes 0 - 128, or stays NaN.
    """
    tile = tl.program_id(0)
    if WIDE:
        tile = tile.to(tl.int64)
    m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = (m < pixel_count)[:, None] & (c < C)[None, :]
    row = m // W
    offsets = (row // H) * input_stride_n + (row % H) * input_stride_h + (m % W) * input_stride_w
    ptrs = input_ptr + offsets[:, None] + c[None, :] * input_stride_c
    steps = tl.load(ptrs, mask=exists, other=0.0).to(tl.float32) * inverse
    if output_ptr.dtype.element_ty == tl.int8:
        least = -tl.cast(zero_point, tl.float32)
        values = _rounded(steps, least, 255.0 + least).to(tl.int32) + (zero_point - 128)
        values = values.to(tl.int8)
    else:
        values = _float8(steps, -448.0)
    tl.store(output_ptr + m[:, None] * C + c[None, :], values, mask=exists)


@triton.jit
def _byte_sum(
    input_ptr,
    weight_ptr,
    rows,
    h,
    w,
    columns,
    outside,
    H,
    W,
    C,
    input_stride_h,
    input_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_C: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over (r, s, c), c fastest, of signed bytes; `outside` is what padding counts as.

    It is exact, in int32; with a float16 weight it is one of float8 numbers, in float32.
    """
    EXACT: tl.constexpr = weight_ptr.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if EXACT else tl.float32)
    tap = 0
    start = 0
    for _ in range(R * S * tl.cdiv(C, BLOCK_K)):
        c = start + tl.arange(0, BLOCK_K)
        # A pointwise filter has one tap, 0, which the compiler could not know.
        r = tap // S if R * S > 1 else 0
        s = tap - r * S if R * S > 1 else 0
        shift = r * DILATION_H * input_stride_h + s * DILATION_W * input_stride_w
        depth = tap * C + c if R * S > 1 else c
        a_ptrs = input_ptr + (rows + shift)[:, None] + c[None, :]
        b_ptrs = weight_ptr + columns[None, :] + depth[:, None]
        # Past the last channel the weight's zeros are enough.
        if PADDED:
            inside = (h + r * DILATION_H >= 0) & (h + r * DILATION_H < H)
            inside &= (w + s * DILATION_W >= 0) & (w + s * DILATION_W < W)
            if EVEN_C:
                a = tl.load(a_ptrs, mask=inside[:, None], other=outside)
            else:
                a = tl.load(a_ptrs, mask=inside[:, None] & (c < C)[None, :], other=outside)
        elif EVEN_C:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(c < C)[None, :], other=outside)
        b = tl.load(b_ptrs) if EVEN_C else tl.load(b_ptrs, mask=(c < C)[:, None], other=0)
        a = a if EXACT else a.to(tl.float16)
        acc = tl.dot(a, b, acc, out_dtype=acc.dtype)
        start += BLOCK_K
        if R * S > 1:
            done = start >= C
            tap += done.to(tl.int32)
            start = tl.where(done, 0, start)
    return acc


@triton.jit
def _finish_part(
    acc,
    shortcut,
    m,
    row_exists,
    columns,
    k,
    k_exists,
    weight_sum_ptr,
    scale_ptr,
    shift_ptr,
    block_ptr,
    projection_sum_ptr,
    projection_scale_ptr,
    output_ptr,
    zero_point,
    block_zero_point,
    shortcut_scale,
    output_step,
    channels,
    PROJECTED: tl.constexpr,
):
    """Scale, shift, shortcut, ReLU and rounding of sums of `k`; `columns` are `k` that exist."""
    EXACT: tl.constexpr = weight_sum_ptr is not None
    if EXACT:
        acc += (tl.load(weight_sum_ptr + columns) * (128 - zero_point))[None, :]
    steps = acc.to(tl.float32) * tl.load(scale_ptr + columns)[None, :]
    steps = steps + tl.load(shift_ptr + columns)[None, :]
    exists = row_exists[:, None] & k_exists[None, :]
    offsets = m[:, None] * channels + k[None, :]
    if PROJECTED:
        if EXACT:
            shortcut += (tl.load(projection_sum_ptr + columns) * (128 - block_zero_point))[None, :]
        scale = tl.load(projection_scale_ptr + columns)
        steps = steps + shortcut.to(tl.float32) * scale[None, :]
    elif block_ptr is not None:
        if EXACT:
            block = tl.load(block_ptr + offsets, mask=exists, other=0).to(tl.int32)
            steps = steps + (block + (128 - block_zero_point)).to(tl.float32) * shortcut_scale
        else:
            block = tl.load(block_ptr + offsets, mask=exists, other=0.0).to(tl.float32)
            steps = steps + block * shortcut_scale
    values = _rounded(steps, 0.0, 255.0) if EXACT else _float8(steps, 0.0)
    if output_ptr.dtype.element_ty == tl.int8:
        tl.store(output_ptr + offsets, (values - 128.0).to(tl.int8), mask=exists)
    elif output_ptr.dtype.element_ty == tl.float8e4nv:
        tl.store(output_ptr + offsets, values, mask=exists)
    else:
        read = (values.to(tl.float32) * output_step).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + offsets, read, mask=exists)


@triton.jit
def byte_conv_kernel(
    input_ptr,
    weight_ptr,
    weight_sum_ptr,
    scale_ptr,
    shift_ptr,
    block_ptr,
    projection_ptr,
    projection_sum_ptr,
    projection_scale_ptr,
    output_ptr,
    zero_point,
    block_zero_point,
    shortcut_scale,
    output_step,
    M,
    H,
    W,
    P,
    Q,
    C,
    K,
    groups,
    block_h,
    block_w,
    block_c,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PROJECTION_STRIDE_H: tl.constexpr,
    PROJECTION_STRIDE_W: tl.constexpr,
    EVEN_C: tl.constexpr,
    EVEN_BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """A convolution of bytes, with scale, shift, shortcut and ReLU in its epilogue.

    With a row m of the output a pixel, m = (n P + p) Q + q, and k its channel,

        steps[m, k] = float(sum) scale[k] + shift[k] (+ shortcut[m, k]),
        output[m, k] = clamp(round(steps), 0, 255) - 128, or, of a floating-point output, that of a
            network's last block, clamp(round(steps), 0, 255) output_step.

    The shortcut is `(block + 128 - block_zero_point) shortcut_scale`, `block` being the block's
    input and lying as the output does, or of a projection its own sum times `projection_scale`: a
    1x1 of one group, over `block`, summed by the same program. With `groups` > 1, `C` and `K` are
    those of one group, and a tile of channels lies within one.

    In float8, without zero points, it is `e4m3(clamp(steps, 0, 448))` and that times `output_step`.

    Reads the input, the weight and the block's input once from memory (again from L2, as
    `conv_kernel` does), writes the output once: a byte an element (two of a weight in float8).

    Args, where the name does not say it:
        weight_sum_ptr: of each filter the sum of its weights, int32, see above; None in float8.
        block_h, block_w, block_c: sizes of a projection's input.
        EVEN_C: BLOCK_K divides C, so the depth needs no mask; EVEN_BLOCK_C likewise.
        WIDE: some offset does not fit into 31 bits.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = tl.cdiv(K, BLOCK_N)
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tiles_in_group * groups, BAND)
    group = tile_n // tiles_in_group
    first_local_k = (tile_n - group * tiles_in_group) * BLOCK_N
    local_k = first_local_k + tl.arange(0, BLOCK_N)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
        group = group.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = group * K + local_k

    # Rows and columns past the edge compute the last one again, which needs no mask.
    row = tl.minimum(m, M - 1)
    column = group * K + tl.minimum(local_k, K - 1)
    pixel = C * groups
    DENSE_ROWS: tl.constexpr = (
        R * S * STRIDE_H * STRIDE_W == 1 and PADDING_H == 0 and PADDING_W == 0
    )
    EXACT: tl.constexpr = weight_sum_ptr is not None
    outside = tl.cast(zero_point - 128, tl.int8) if EXACT else tl.cast(0.0, tl.float8e4nv)
    rows, h, w = pixels(
        row, P, Q, H * W * pixel, W * pixel, pixel, STRIDE_H, STRIDE_W, PADDING_H, PADDING_W,
        DENSE_ROWS,
    )  # fmt: skip
    acc = _byte_sum(
        input_ptr, weight_ptr, rows + group * C, h, w, column * (R * S * C),
        outside, H, W, C, W * pixel, pixel, R, S, DILATION_H, DILATION_W,
        PADDING_H + PADDING_W > 0, EVEN_C, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    shortcut = acc
    if projection_ptr is not None:
        rows, h, w = pixels(
            row, P, Q, block_h * block_w * block_c, block_w * block_c, block_c,
            PROJECTION_STRIDE_H, PROJECTION_STRIDE_W, 0, 0,
            PROJECTION_STRIDE_H * PROJECTION_STRIDE_W == 1,
        )  # fmt: skip
        shortcut = _byte_sum(
            block_ptr, projection_ptr, rows, h, w, column * block_c, outside,
            block_h, block_w, block_c, block_w * block_c, block_c, 1, 1, 1, 1, False, EVEN_BLOCK_C,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    # At most 64 channels at a time: all of a wide tile's vectors are more than the registers hold.
    if BLOCK_N <= 64:
        _finish_part(
            acc, shortcut, m, m < M, column, k, local_k < K, weight_sum_ptr, scale_ptr, shift_ptr,
            block_ptr, projection_sum_ptr, projection_scale_ptr, output_ptr, zero_point,
            block_zero_point, shortcut_scale, output_step, K * groups, projection_ptr is not None,
        )  # fmt: skip
    else:
        tl.static_assert(BLOCK_N == 128 and projection_ptr is None)
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, 64)), (0, 2, 1)))
        for j in tl.static_range(2):
            local_k = first_local_k + 64 * j + tl.arange(0, 64)
            column = group * K + tl.minimum(local_k, K - 1)
            part = left if j == 0 else right
            _finish_part(
                part, part, m, m < M, column, group * K + local_k, local_k < K, weight_sum_ptr,
                scale_ptr, shift_ptr, block_ptr, None, None, output_ptr, zero_point,
                block_zero_point, shortcut_scale, output_step, K * groups, False,
            )  # fmt: skip
