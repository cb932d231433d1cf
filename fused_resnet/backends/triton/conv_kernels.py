"""The Triton kernels: convolution, batch norm, shortcut and ReLU in one pass.

All read `input` as rows of pixels (`channels_last`: the channel's stride is 1) and the weight as
`[K, R, S, C / groups]`, which is how a `channels_last` weight lies in memory, accumulate in float32
and write `[N, P, Q, K]` once. In what follows a row `m` is an output pixel, `m = (n P + p) Q + q`.

DEPENDENT, for compute capabilities 9 and 10, is for launches in a row (`launch.in_a_row`), each
of which may begin before the one before it has ended (programmatic dependent launch). Such a kernel

1. asks for its weights to be brought into the L2 cache, a share of them each program;
2. lets the next launch begin, once all of its own programs have come this far;
3. waits until the launch before it has ended and all that it wrote can be seen;
4. only then loads or stores anything.

Every program of every such kernel waits, so a launch that has ended knows that the one before it
has, and so on back to the first, which begins when all that came before it has ended: what a wait
makes visible is everything that any earlier launch wrote, and nobody still reads what is about to
be overwritten. What comes before the wait loads no value. L2 is where a GPU's multiprocessors agree
on what memory holds, so that a line brought there early is as new as one brought there late, even
of a weight that a launch just before changes or copies. A launch that is not dependent begins when
all before it have ended, as ever.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tile_of(program, tiles_m, tiles_n, BAND: tl.constexpr):
    """(tile_m, tile_n) of a program.

    Neighbouring programs go down a band of BAND tiles, then right: what runs at the same time
    shares BAND tiles of input and a few of weights in L2.
    """
    band = program // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    place = program - band * BAND * tiles_n
    return band * BAND + place % height, place // height


@triton.jit
def _prefetch(ptr, length, program, programs):
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
def _affine(k, exists, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps):
    """`scale, shift` in float32 with `batch_norm(v + bias) = v scale + shift`.

    `scale = weight / sqrt(var + eps)`, `shift = bn_bias + (bias - mean) scale`.
    """
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
def _relu(value):
    """`max(value, 0)` that keeps NaN."""
    return tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _normalized(centred, scale, bias):
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
    RELU: tl.constexpr,
):
    """`output = relu(acc scale + shift + residual)`, rounded once and stored."""
    j = tl.arange(0, acc.shape[1])
    k = first_k + j
    k_exists = j < channels
    scale, shift = _affine(
        k, k_exists, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps
    )
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
    if RELU:
        acc = _relu(acc)
    tl.store(output_ptr + offsets, acc.to(output_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _finish(
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
    RELU: tl.constexpr,
):
    """The epilogue of a tile of rows `m` and `channels` channels from `first_k` on.

    64 channels at a time: the residual of all of a tile and the addresses, beside the sums, would
    take more registers than there are.
    """
    if acc.shape[1] <= 64:
        _finish_part(
            acc, m, row_exists, first_k, channels, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr,
            bias_ptr, eps, residual_ptr, residual_stride_n, residual_stride_c, residual_stride_h,
            residual_stride_w, output_ptr, P, Q, K, RESIDUAL_CHANNELS, RELU,
        )  # fmt: skip
    elif acc.shape[1] == 128:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, 64)), (0, 2, 1)))
        for j in tl.static_range(2):
            _finish_part(
                left if j == 0 else right, m, row_exists, first_k + 64 * j, channels - 64 * j,
                mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps, residual_ptr,
                residual_stride_n, residual_stride_c, residual_stride_h, residual_stride_w,
                output_ptr, P, Q, K, RESIDUAL_CHANNELS, RELU,
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
                    output_ptr, P, Q, K, RESIDUAL_CHANNELS, RELU,
                )  # fmt: skip


@triton.jit
def _pixels(
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
def _conv_sum(
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
                value = _relu(_normalized(a.to(tl.float32) - mean[None, :], scale, offset))
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
def conv_kernel(
    input_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    partial_ptr,
    table_ptr,
    eps,
    M,
    H,
    W,
    P,
    Q,
    C,
    K,
    groups,
    input_stride_n,
    input_stride_h,
    input_stride_w,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
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
    RESIDUAL_CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BAND: tl.constexpr,
    PROLOGUE: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """Implicit GEMM, with batch norm, residual and ReLU in its epilogue.

    `output[m, k] = relu(bn(sum_{r,s,c} input[pixel(m, r, s), c] weight[k, r, s, c]) + residual)`,
    `pixel(m, r, s) = (n, p stride - padding + r dilation, q stride - padding + s dilation)`.
    With `groups` > 1, `C` and `K` are those of one group, and a tile of channels lies within one.
    With SPLIT_K > 1 a program adds up its share of the (r, s, c) and writes the float32 sum to
    `partial[z, m, k]`; `sum_partials_kernel` does the rest.

    Reads the input, the weight and the residual once from memory (again from L2: the input
    `K / BLOCK_N` times for each of the `R S` taps, the weight `M / BLOCK_M` times), writes the
    output once (split: `SPLIT_K` times 4 bytes an element).

    Args, where the name does not say it:
        DENSE_ROWS: row m of the input is `m input_stride_w` (1x1, stride 1, dense images).
        EVEN_C: BLOCK_K divides C, so the depth needs no mask.
        RESIDUAL_CHANNELS: how many channels the residual has, which lie in the middle of the
            output's, or None where it lies in memory as the output does.
        WIDE: some offset does not fit into 31 bits.
        PROLOGUE: "none" or, of one group, "norm": see `_conv_sum`, as for `table_ptr`. What every
            program loads is normalised by it, `R S K / BLOCK_N` times in all.
    """
    # Which tile, of which group, and which share of its sum.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = tl.cdiv(K, BLOCK_N)
    program = tl.program_id(0)
    tile_m, tile_n = _tile_of(program, tiles_m, tiles_in_group * groups, BAND)
    group = tile_n // tiles_in_group
    first_local_k = (tile_n - group * tiles_in_group) * BLOCK_N
    local_k = first_local_k + tl.arange(0, BLOCK_N)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
        group = group.to(tl.int64)
    first_k = group * K + first_local_k
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = m < M

    # Rows and columns past the edge compute the last one again, which needs no mask.
    row = tl.minimum(m, M - 1)
    column = group * K + tl.minimum(local_k, K - 1)
    rows, h, w = _pixels(
        row, P, Q, input_stride_n, input_stride_h, input_stride_w, STRIDE_H, STRIDE_W, PADDING_H,
        PADDING_W, DENSE_ROWS,
    )  # fmt: skip
    rows += group * C
    columns = column * (R * S * C)

    if DEPENDENT:
        programs = tl.num_programs(0) * tl.num_programs(1)
        place = tl.program_id(1) * tl.num_programs(0) + program
        _prefetch(weight_ptr, K * groups * R * S * C, place, programs)
        gdc_launch_dependents()
        gdc_wait()

    # The sum over (r, s, c), c fastest.
    c_blocks = tl.cdiv(C, BLOCK_K)
    first = 0
    last = R * S * c_blocks
    if SPLIT_K > 1:
        share = tl.cdiv(last, SPLIT_K)
        first = tl.program_id(1) * share
        last = tl.minimum(first + share, last)
    acc = _conv_sum(
        input_ptr, None, weight_ptr, table_ptr, None, rows, h, w, columns, first, last, c_blocks, H,
        W, C, K, input_stride_h, input_stride_w, tile_n, R, S, DILATION_H, DILATION_W,
        PADDING_H + PADDING_W > 0, EVEN_C, PROLOGUE, False, PRECISION, BLOCK_M, BLOCK_N,
        BLOCK_K,
    )  # fmt: skip

    if SPLIT_K > 1:
        z = tl.program_id(1)
        if WIDE:
            z = z.to(tl.int64)
        k = group * K + local_k
        offsets = (z * M + m)[:, None] * (K * groups) + k[None, :]
        tl.store(partial_ptr + offsets, acc, mask=row_exists[:, None] & (local_k < K)[None, :])
    else:
        _finish(
            acc,
            m,
            row_exists,
            first_k,
            K - first_local_k,
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
            K * groups,
            RESIDUAL_CHANNELS,
            RELU,
        )


@triton.jit
def sum_partials_kernel(
    partial_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    eps,
    M,
    P,
    Q,
    K,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    RESIDUAL_CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The second pass of split-K: `output = relu(bn(sum_z partial[z, m, k]))`, z in order.

    Reads `4 SPLIT_K` bytes and the residual and writes the output, once for each element.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    tile_m = tl.program_id(0)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tl.program_id(1) * BLOCK_N
    k = first_k + tl.arange(0, BLOCK_N)
    row_exists = m < M
    exists = row_exists[:, None] & (k < K)[None, :]
    ptrs = partial_ptr + m[:, None] * K + k[None, :]
    image = M * K
    if WIDE:
        image = image.to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for z in tl.static_range(SPLIT_K):
        acc += tl.load(ptrs + z * image, mask=exists, other=0.0)
    _finish(
        acc,
        m,
        row_exists,
        first_k,
        K - first_k,
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
        RESIDUAL_CHANNELS,
        RELU,
    )


@triton.jit
def _packed_sum(
    input_ptr,
    weight_ptr,
    rows,
    h,
    w,
    columns,
    own_row,
    own_column,
    c,
    c_exists,
    group,
    H,
    W,
    input_stride_h,
    input_stride_w,
    R: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUP_C: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The block-diagonal sum over taps; with ONE_GROUP the other groups' inputs are zeros."""
    diagonal = (own_row[:, None] == own_column[None, :]) & c_exists[:, None]
    wanted = c_exists
    if ONE_GROUP:
        wanted = wanted & (own_row == group)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for tap in range(R * S):
        r = tap // S
        s = tap - r * S
        inside = (h + r * DILATION_H >= 0) & (h + r * DILATION_H < H)
        inside &= (w + s * DILATION_W >= 0) & (w + s * DILATION_W < W)
        shift = r * DILATION_H * input_stride_h + s * DILATION_W * input_stride_w
        a_ptrs = input_ptr + (rows + shift)[:, None] + c[None, :]
        if EVEN and not ONE_GROUP:
            a = tl.load(a_ptrs, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(a_ptrs, mask=inside[:, None] & wanted[None, :], other=0.0)
        b = tl.load(
            weight_ptr + columns[None, :] + (tap * GROUP_C + c)[:, None],
            mask=diagonal,
            other=0.0,
        )
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def packed_conv_kernel(
    input_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    eps,
    M,
    H,
    W,
    P,
    Q,
    groups,
    input_stride_n,
    input_stride_h,
    input_stride_w,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    GROUP_C: tl.constexpr,
    GROUP_K: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    EVEN: tl.constexpr,
    RESIDUAL_CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """Narrow groups, several to a tile: implicit GEMM with a block-diagonal weight.

    The formula is `conv_kernel`'s with each channel's sum over its own group. A tile holds
    `BLOCK_N // GROUP_K` whole groups and their `GROUP_C` input channels each, one block deep; what
    lies off the diagonal is zero, so that a group of four channels still uses the tensor cores
    (at `GROUP_C / BLOCK_K` of their rate: there is bandwidth to wait for).

    An infinity times a zero off the diagonal would be a NaN in a channel that never saw it. A tile
    that has any NaN is therefore computed again group by group.

    EVEN: every tile is full of groups, and they fill BLOCK_N and BLOCK_K.

    Reads the input, the weight's diagonal and the residual once, writes the output once (the input
    again from L2 for each of the `R S` taps).
    """
    IN_TILE: tl.constexpr = BLOCK_N // GROUP_K
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = _tile_of(tl.program_id(0), tiles_m, tl.cdiv(groups, IN_TILE), BAND)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = m < M
    row = tl.minimum(m, M - 1)
    image_row = row // Q
    h = (image_row % P) * STRIDE_H - PADDING_H
    w = (row % Q) * STRIDE_W - PADDING_W
    first = tile_n * IN_TILE
    rows = (image_row // P) * input_stride_n + h * input_stride_h + w * input_stride_w
    rows += first * GROUP_C

    # Groups are counted within the tile.
    left = tl.minimum(groups - first, IN_TILE)
    local_k = tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_K)
    own_column = local_k // GROUP_K
    own_row = c // GROUP_C
    k = first * GROUP_K + local_k
    # On the diagonal, own_row is own_column: the weight's own c is c - own_column GROUP_C.
    columns = k * (R * S * GROUP_C) - own_column * GROUP_C
    acc = _packed_sum(
        input_ptr, weight_ptr, rows, h, w, columns, own_row, own_column, c, own_row < left, 0, H, W,
        input_stride_h, input_stride_w, R, S, DILATION_H, DILATION_W, GROUP_C, False, EVEN,
        PRECISION, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if tl.max((acc != acc).to(tl.int32)) > 0:
        exact = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for group in range(left):
            alone = _packed_sum(
                input_ptr, weight_ptr, rows, h, w, columns, own_row, own_column, c, own_row < left,
                group, H, W, input_stride_h, input_stride_w, R, S, DILATION_H, DILATION_W, GROUP_C,
                True, EVEN, PRECISION, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            exact = tl.where((own_column == group)[None, :], alone, exact)
        acc = exact
    _finish(
        acc,
        m,
        row_exists,
        first * GROUP_K,
        BLOCK_N if EVEN else left * GROUP_K,
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
        groups * GROUP_K,
        RESIDUAL_CHANNELS,
        RELU,
    )


@triton.jit
def _row_sum(
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


@triton.jit
def row_conv_kernel(
    input_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    residual_ptr,
    output_ptr,
    eps,
    M,
    H,
    W,
    P,
    Q,
    K,
    input_stride_n,
    input_stride_h,
    residual_stride_n,
    residual_stride_c,
    residual_stride_h,
    residual_stride_w,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    SKEW: tl.constexpr,
    RESIDUAL_CHANNELS: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
):
    """Few input channels (an image's 3): one filter row is one block of the sum.

    The formula is `conv_kernel`'s. What a filter row meets, `S C` values, lies in a row in memory
    (dilation 1 along w, dense pixels), so the 7x7 stem is 7 blocks of 21 values padded to 32
    instead of 49 of 3 padded to 16.

    SKEW = 1 starts a block one value early, where that puts 16-bit values on 4-byte boundaries
    (with the stem's stride of 2 pixels, 12 bytes, and padding of 3). That value meets a zero; since
    an infinity would make a NaN of it, a tile that has a NaN is computed again without.

    Reads the input, the weight and the residual once from memory, writes the output once.
    """
    tiles_m = tl.cdiv(M, BLOCK_M)
    tile_m, tile_n = _tile_of(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_N), BAND)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_k = tile_n * BLOCK_N
    k = first_k + tl.arange(0, BLOCK_N)
    row = tl.minimum(m, M - 1)
    image_row = row // Q
    h = (image_row % P) * STRIDE_H - PADDING_H
    first = (row % Q) * (STRIDE_W * C) - (PADDING_W * C + SKEW)
    rows = (image_row // P) * input_stride_n + h * input_stride_h + first
    columns = tl.minimum(k, K - 1) * (R * S * C)
    between = first[:, None] + tl.arange(0, BLOCK_K)[None, :]
    acc = _row_sum(
        input_ptr, weight_ptr, rows, h, between, columns, H, W * C, input_stride_h, S * C, R,
        DILATION_H, SKEW, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SKEW > 0 and tl.max((acc != acc).to(tl.int32)) > 0:
        acc = _row_sum(
            input_ptr, weight_ptr, rows, h, between, columns, H, W * C, input_stride_h, S * C, R,
            DILATION_H, SKEW, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    _finish(
        acc,
        m,
        m < M,
        first_k,
        K - first_k,
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
        RESIDUAL_CHANNELS,
        RELU,
    )


@triton.jit
def _widest(
    input_ptr,
    weight_ptr,
    images,
    p,
    between,
    columns,
    k,
    k_exists,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    eps,
    pooled_q,
    H,
    row_length,
    P,
    Q,
    input_stride_h,
    LENGTH: tl.constexpr,
    R: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STEP: tl.constexpr,
    PADDING_H: tl.constexpr,
    DILATION_H: tl.constexpr,
    SKEW: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`max over q in 2 pooled_q + (-1, 0, 1) of bn(conv(p, q))`, -inf outside: see `_row_sum`.

    STEP is how many values lie from one convolution column's first to the next one's.
    """
    j = tl.arange(0, BLOCK_K)
    j_exists = (j >= SKEW) & (j < SKEW + LENGTH)
    loaded = (j < SKEW + LENGTH)[None, :]
    if EXACT:
        loaded = j_exists[None, :]
    left_inside = (between >= STEP) & (between < row_length + STEP) & loaded
    middle_inside = (between >= 0) & (between < row_length) & loaded
    right_inside = (between >= -STEP) & (between < row_length - STEP) & loaded
    # As vectors, since the interpreter turns a scalar mask into a number when it broadcasts it.
    row = tl.zeros_like(pooled_q) + p
    top = row * STRIDE_H - PADDING_H
    left = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    middle = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    right = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for r in range(R):
        h = top + r * DILATION_H
        inside = ((h >= 0) & (h < H))[:, None]
        ptrs = input_ptr + (images + h * input_stride_h)[:, None] + j[None, :]
        b = tl.load(
            weight_ptr + columns[None, :] + (r * LENGTH + j - SKEW)[:, None],
            mask=j_exists[:, None],
            other=0.0,
        )
        a = tl.load(ptrs - STEP, mask=left_inside & inside, other=0.0)
        left = tl.dot(a, b, left, input_precision=PRECISION)
        a = tl.load(ptrs, mask=middle_inside & inside, other=0.0)
        middle = tl.dot(a, b, middle, input_precision=PRECISION)
        a = tl.load(ptrs + STEP, mask=right_inside & inside, other=0.0)
        right = tl.dot(a, b, right, input_precision=PRECISION)
    # Loaded here, so that they take no registers while the sums do.
    scale, shift = _affine(
        k, k_exists, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps
    )
    outside = float("-inf")
    left = left * scale[None, :] + shift[None, :]
    right = right * scale[None, :] + shift[None, :]
    value = middle * scale[None, :] + shift[None, :]
    left = tl.where((pooled_q > 0)[:, None], left, outside)
    right = tl.where((2 * pooled_q + 1 < Q)[:, None], right, outside)
    value = tl.maximum(value, left, propagate_nan=tl.PropagateNan.ALL)
    value = tl.maximum(value, right, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(((row >= 0) & (row < P))[:, None], value, outside)


@triton.jit
def stem_pool_kernel(
    input_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    output_ptr,
    eps,
    N,
    H,
    W,
    P,
    Q,
    K,
    pooled_P,
    pooled_Q,
    rows_each,
    input_stride_n,
    input_stride_h,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    SKEW: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The stem with its pool: `max over 3x3, stride 2, padding 1, of relu(bn(conv(input)))`.

    A program takes BLOCK_M pooled columns (of all images in a row) and walks down `rows_each`
    pooled rows. Convolution row by convolution row, it computes the columns 2q - 1, 2q and 2q + 1
    as three accumulators with one weight block (`row_conv_kernel`'s), so that pooling is an
    elementwise maximum; the row that two pooled rows share is kept in registers. Of the four
    convolution outputs a pooled one stands for, this computes `3 (2 + 1 / rows_each)`: half again
    as many products, where writing and reading the unpooled output would have moved five times
    the bytes. ReLU and rounding are monotone and so come after the maximum.

    Reads the input (rows shared by programs again from L2) and the weight once, writes the pooled
    output once.
    """
    image_columns = N * pooled_Q
    tile_m = tl.program_id(0)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_exists = m < image_columns
    column = tl.minimum(m, image_columns - 1)
    n = column // pooled_Q
    pooled_q = column % pooled_Q
    k = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    k_exists = k < K
    columns = tl.minimum(k, K - 1) * (R * S * C)
    # Of the middle column, 2q.
    first = pooled_q * (2 * STRIDE_W * C) - (PADDING_W * C + SKEW)
    images = n * input_stride_n + first
    between = first[:, None] + tl.arange(0, BLOCK_K)[None, :]

    first_row = tl.program_id(1) * rows_each
    last_row = tl.minimum(first_row + rows_each, pooled_P)
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    for p in range(2 * first_row - 1, 2 * last_row):
        value = _widest(
            input_ptr, weight_ptr, images, p, between, columns, k, k_exists, mean_ptr, var_ptr,
            bn_weight_ptr, bn_bias_ptr, bias_ptr, eps, pooled_q, H, W * C, P, Q, input_stride_h,
            S * C, R, STRIDE_H, STRIDE_W * C, PADDING_H, DILATION_H, SKEW, False, PRECISION,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if SKEW > 0 and tl.max((value != value).to(tl.int32)) > 0:
            value = _widest(
                input_ptr, weight_ptr, images, p, between, columns, k, k_exists, mean_ptr, var_ptr,
                bn_weight_ptr, bn_bias_ptr, bias_ptr, eps, pooled_q, H, W * C, P, Q, input_stride_h,
                S * C, R, STRIDE_H, STRIDE_W * C, PADDING_H, DILATION_H, SKEW, True, PRECISION,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        best = tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)
        if p % 2 != 0:
            if p > 2 * first_row:
                pixel = (n * pooled_P + p // 2) * pooled_Q + pooled_q
                out = best
                if RELU:
                    out = _relu(out)
                tl.store(
                    output_ptr + pixel[:, None] * K + k[None, :],
                    out.to(output_ptr.dtype.element_ty),
                    mask=m_exists[:, None] & k_exists[None, :],
                )
            best = value
