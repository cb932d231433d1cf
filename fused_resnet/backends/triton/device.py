"""What the kernels share on the device: tiles' places, sums of products, and what follows a sum."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, tiles_m, tiles_n, BAND: tl.constexpr):
    """(tile_m, tile_n) of a program.

    Neighbouring programs go down a band of BAND tiles, then right: what runs at the same time
    shares BAND tiles of input and a few of weights in L2.
    """
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    place = program - band * BAND * tiles_n
    return band * BAND + place % height, place // height


@triton.jit
def prefetch(ptr, length, program, programs):
    """Asks for a program's share of `length` neighbouring elements to be brought into L2.

    In whole pieces of 16 bytes, none of which lies beyond the last element's; one thread asks.
    """
    size: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    total = tl.cast(length, tl.int64) * size // 16 * 16
    share = tl.cdiv(tl.cdiv(total, programs), 16) * 16
    start = program * share
    bytes = tl.minimum(share, total - start).to(tl.int32)
    address = ((ptr.to(tl.int64) + start) >> 4) << 4
    tl.inline_asm_elementwise(
        """{
            .reg .pred mine, some;
            .reg .u32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 mine, thread, 0;
            setp.gt.and.s32 some, $2, 0, mine;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [address, bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def affine(k, exists, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps):
    """`scale, shift` in float32 with `batch_norm(v + bias) = v scale + shift`.

    `scale = weight / sqrt(var + eps)`, `shift = bn_bias + (bias - mean) scale`. Without a variance
    they have been folded: `mean` is the scale, `bn_bias` the shift; see `folded.py`.
    """
    if var_ptr is None:
        scale = tl.load(mean_ptr + k, mask=exists, other=0.0)
        shift = tl.load(bn_bias_ptr + k, mask=exists, other=0.0)
    else:
        # Inductor passes a Python number as float64, which would make everything after it float64.
        var = tl.load(var_ptr + k, mask=exists, other=1.0).to(tl.float32)
        scale = tl.rsqrt(var + tl.cast(eps, tl.float32))
        if bn_weight_ptr is not None:
            scale = scale * tl.load(bn_weight_ptr + k, mask=exists, other=0.0).to(tl.float32)
        shift = -tl.load(mean_ptr + k, mask=exists, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            shift += tl.load(bias_ptr + k, mask=exists, other=0.0).to(tl.float32)
        shift = shift * scale
        if bn_bias_ptr is not None:
            shift += tl.load(bn_bias_ptr + k, mask=exists, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def is_last(ticket_ptr, tile, sharing: tl.constexpr):
    """Whether this program is the last to come of those that share a tile's sum.

    What all of them stored before can be read then: the barrier puts the stores of a program's
    threads before its ticket, which releases them and acquires those before the others' tickets.
    """
    # Triton 3.8 puts one before a release of its own accord, which nothing promises.
    tl.debug_barrier()
    return tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel", scope="gpu") == sharing - 1


@triton.jit
def relu(value):
    """`max(value, 0)` that keeps NaN."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _clamped(value, LEAST: tl.constexpr, MOST: tl.constexpr):
    """Between two numbers, or NaN."""
    value = tl.where(value < LEAST, LEAST, value)
    return tl.where(value > MOST, MOST, value)


@triton.jit
def activated(value, ACT: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """The activation of float32 that has this number and these parameters.

    Formulas and numbers are those of csrc/cpu/activation.h.
    """
    if ACT == 1:
        value = relu(value)
    elif ACT == 2:
        value = _clamped(value, FIRST, SECOND)
    elif ACT == 3:
        value = tl.where(value > 0.0, value, value * FIRST)
    elif ACT == 4:
        value = tl.div_rn(value, 1.0 + tl.exp(-value))
    elif ACT == 5:
        value = value * (_clamped(value + 3.0, 0.0, 6.0) * (1.0 / 6.0))
    elif ACT == 6:
        value = value * (0.5 + 0.5 * tl.erf(value * 0.7071067811865476))
    elif ACT == 7:
        inner = value * (1.5957691216057308 + 0.07135481282553 * (value * value))
        value = tl.div_rn(value, 1.0 + tl.exp(-inner))
    return value


@triton.jit
def normalized(centred, scale, bias):
    """What forward rounds and backward takes the sign of: the same operations, the same bits."""
    scale = tl.broadcast_to(scale[None, :], centred.shape)
    return tl.fma(centred, scale, tl.broadcast_to(bias[None, :], centred.shape))


@triton.jit
def _finish_part(
    acc,
    m,
    row_exists,
    first_k,
    channels,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    eps,
    residual_ptr,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    output_ptr,
    P,
    Q,
    K,
    RESIDUAL_CHANNELS: tl.constexpr,
    ACT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """`output = activated(acc scale + shift + residual)`, rounded once and stored."""
    j = tl.arange(0, acc.shape[1])
    k = first_k + j
    k_exists = j < channels
    scale, shift = affine(k, k_exists, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps)
    acc = acc * scale[None, :] + shift[None, :]
    offsets = m[:, None] * K + k[None, :]
    exists = row_exists[:, None] & k_exists[None, :]
    if residual_ptr is not None:
        if RESIDUAL_CHANNELS is None:
            residual = tl.load(residual_ptr + offsets, mask=exists, other=0.0)
        else:
            q = m % Q
            image_row = m // Q
            rows = (
                (image_row // P) * residual_stride_n
                + (image_row % P) * residual_stride_h
                + q * residual_stride_w
            )
            c = k - (K - RESIDUAL_CHANNELS) // 2
            there = exists & ((c >= 0) & (c < RESIDUAL_CHANNELS))[None, :]
            residual = tl.load(
                residual_ptr + rows[:, None] + c[None, :] * residual_stride_c,
                mask=there,
                other=0.0,
            )
        acc += residual.to(tl.float32)
    acc = activated(acc, ACT, FIRST, SECOND)
    tl.store(output_ptr + offsets, acc.to(output_ptr.dtype.element_ty), mask=exists)


@triton.jit
def finish(
    acc,
    m,
    row_exists,
    first_k,
    channels,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    eps,
    residual_ptr,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    output_ptr,
    P,
    Q,
    K,
    RESIDUAL_CHANNELS: tl.constexpr,
    ACT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):
    """The epilogue of a tile of rows `m` and `channels` channels from `first_k` on.

    64 channels at a time: the residual of all of a tile and the addresses, beside the sums, would
    take more registers than there are.
    """
    if acc.shape[1] <= 64:
        _finish_part(
            acc, m, row_exists, first_k, channels, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr,
            bias_ptr, eps, residual_ptr, residual_stride_n, residual_stride_c, residual_stride_h,
            residual_stride_w, output_ptr, P, Q, K, RESIDUAL_CHANNELS, ACT, FIRST, SECOND,
        )  # fmt: skip
    elif acc.shape[1] == 128:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, 64)), (0, 2, 1)))
        for j in tl.static_range(2):
            _finish_part(
                left if j == 0 else right, m, row_exists, first_k + 64 * j, channels - 64 * j,
                mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps, residual_ptr,
                residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w,
                output_ptr, P, Q, K, RESIDUAL_CHANNELS, ACT, FIRST, SECOND,
            )  # fmt: skip
    else:
        tl.static_assert(acc.shape[1] == 256)
        quarters = tl.reshape(acc, (acc.shape[0], 2, 2, 64))
        first, second = tl.split(tl.permute(quarters, (0, 2, 3, 1)))
        for i in tl.static_range(2):
            left, right = tl.split(tl.permute(first if i == 0 else second, (0, 2, 1)))
            for j in tl.static_range(2):
                at = 64 * (2 * i + j)
                _finish_part(
                    left if j == 0 else right, m, row_exists, first_k + at, channels - at,
                    mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps, residual_ptr,
                    residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w,
                    output_ptr, P, Q, K, RESIDUAL_CHANNELS, ACT, FIRST, SECOND,
                )  # fmt: skip


@triton.jit
def pixels(
    row,
    P,
    Q,
    input_stride_n,
    input_stride_h,
    input_stride_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DENSE_ROWS: tl.constexpr,
):
    """`offset, h, w` of what the first tap of output pixels `row` meets."""
    if DENSE_ROWS:
        return row * input_stride_w, 0, 0
    else:
        image_row = row // Q
        h = (image_row % P) * STRIDE_H - PADDING_H
        w = (row % Q) * STRIDE_W - PADDING_W
        return (image_row // P) * input_stride_n + h * input_stride_h + w * input_stride_w, h, w


@triton.jit
def conv_sum(
    input_ptr,
    raw_ptr,
    weight_ptr,
    table_ptr,
    side_ptr,
    rows,
    h,
    w,
    columns,
    first,
    last,
    c_blocks,
    H,
    W,
    C,
    K,
    input_stride_h,
    input_stride_w,
    tile_n,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN_C: tl.constexpr,
    PROLOGUE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over blocks `first` to `last` of (r, s, c), c fastest.

    Args, where the name does not say it:
        raw_ptr: lies as the input; see PROLOGUE.
        table_ptr: float32, C values a row; see PROLOGUE.
        side_ptr: where what PROLOGUE makes of the input goes, lying as the input; or None.
        rows: offsets of the pixels' first values, as from `_pixels`.
        columns: offsets of the filters' first values.
        tile_n: programs of which it is zero write `side`.
        PROLOGUE: "norm": the input becomes `relu((input - table[0]) table[1] + table[2])`, rounded,
            padding zero as ever. "gradient": it becomes
            `table[1] (input - table[2] - (raw - table[0]) table[3])`, rounded.
        TRANSPOSED: the weight is `[C, R, S, K]`, its taps in reverse order: the convolution whose
            transpose this is has C filters.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    tap = first // c_blocks
    start = (first - tap * c_blocks) * BLOCK_K
    for _ in range(first, last):
        c = start + tl.arange(0, BLOCK_K)
        # A pointwise filter has one tap, 0, which the compiler could not know.
        r = tap // S if R * S > 1 else 0
        s = tap - r * S if R * S > 1 else 0
        shift = r * DILATION_H * input_stride_h + s * DILATION_W * input_stride_w
        depth = tap * C + c if R * S > 1 else c
        a_ptrs = input_ptr + (rows + shift)[:, None] + c[None, :]
        if TRANSPOSED:
            b_ptrs = weight_ptr + ((R * S - 1 - tap) * K + columns)[None, :]
            b_ptrs += c[:, None] * (R * S * K)
        else:
            b_ptrs = weight_ptr + columns[None, :] + depth[:, None]
        if PADDED:
            inside = (h + r * DILATION_H >= 0) & (h + r * DILATION_H < H)
            inside &= (w + s * DILATION_W >= 0) & (w + s * DILATION_W < W)
            if EVEN_C:
                a = tl.load(a_ptrs, mask=inside[:, None], other=0.0)
            else:
                a = tl.load(a_ptrs, mask=inside[:, None] & (c < C)[None, :], other=0.0)
        elif EVEN_C:
            a = tl.load(a_ptrs)
        else:
            a = tl.load(a_ptrs, mask=(c < C)[None, :], other=0.0)
        b = tl.load(b_ptrs) if EVEN_C else tl.load(b_ptrs, mask=(c < C)[:, None], other=0.0)
        if PROLOGUE != "none":
            # Past the last channel a scale of zero makes zeros.
            entry = table_ptr + c
            exists = c < C
            mean = tl.load(entry) if EVEN_C else tl.load(entry, mask=exists, other=0.0)
            entry += C
            scale = tl.load(entry) if EVEN_C else tl.load(entry, mask=exists, other=0.0)
            entry += C
            offset = tl.load(entry) if EVEN_C else tl.load(entry, mask=exists, other=0.0)
            if PROLOGUE == "norm":
                value = relu(normalized(a.to(tl.float32) - mean[None, :], scale, offset))
                if PADDED:
                    value = tl.where(inside[:, None], value, 0.0)
                a = value.to(input_ptr.dtype.element_ty)
            else:
                entry += C
                slope = tl.load(entry) if EVEN_C else tl.load(entry, mask=exists, other=0.0)
                raw_ptrs = raw_ptr + (rows + shift)[:, None] + c[None, :]
                if EVEN_C:
                    raw = tl.load(raw_ptrs)
                else:
                    raw = tl.load(raw_ptrs, mask=exists[None, :], other=0.0)
                centred = raw.to(tl.float32) - mean[None, :]
                value = a.to(tl.float32) - offset[None, :] - centred * slope[None, :]
                a = (value * scale[None, :]).to(input_ptr.dtype.element_ty)
                if side_ptr is not None:
                    # As vectors: of a scalar the interpreter makes a number.
                    written = exists & (tl.zeros_like(c) + tile_n == 0)
                    side_ptrs = side_ptr + (rows + shift)[:, None] + c[None, :]
                    tl.store(side_ptrs, a, mask=written[None, :])
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        # The next block, counted up: a division by c_blocks a step costs more.
        start += BLOCK_K
        if R * S > 1:
            done = start >= C
            tap += done.to(tl.int32)
            start = tl.where(done, 0, start)
    return acc


@triton.jit
def row_sum(
    input_ptr,
    weight_ptr,
    rows,
    h,
    between,
    columns,
    H,
    row_length,
    input_stride_h,
    LENGTH: tl.constexpr,
    R: tl.constexpr,
    DILATION_H: tl.constexpr,
    SKEW: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The sum over filter rows of LENGTH values each, at the pixels whose first ones lie at `rows`.

    Without EXACT, the SKEW values before the first are read too, and multiplied by zero.
    """
    j = tl.arange(0, BLOCK_K)
    j_exists = (j >= SKEW) & (j < SKEW + LENGTH)
    inside = (between >= 0) & (between < row_length) & (j < SKEW + LENGTH)[None, :]
    if EXACT:
        inside &= j_exists[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(R):
        inside_h = (h + r * DILATION_H >= 0) & (h + r * DILATION_H < H)
        a = tl.load(
            input_ptr + (rows + r * DILATION_H * input_stride_h)[:, None] + j[None, :],
            mask=inside & inside_h[:, None],
            other=0.0,
        )
        b = tl.load(
            weight_ptr + columns[None, :] + (r * LENGTH + j - SKEW)[:, None],
            mask=j_exists[:, None],
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc
