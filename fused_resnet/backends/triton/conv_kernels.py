"""The Triton kernels: convolution, batch norm, shortcut and activation in one pass.

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

from .device import conv_sum, finish, is_last, pixels, prefetch, row_sum, tile_of


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
    ticket_ptr,
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
    ACT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
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
    """Implicit GEMM, with batch norm, residual and activation in its epilogue.

    `output[m, k] = act(bn(sum_{r,s,c} input[pixel(m, r, s), c] weight[k, r, s, c]) + residual)`,
    `pixel(m, r, s) = (n, p stride - padding + r dilation, q stride - padding + s dilation)`.
    With `groups` > 1, `C` and `K` are those of one group, and a tile of channels lies within one.
    With SPLIT_K > 1 a program adds up its share of the (r, s, c) and writes the float32 sum to
    `partial[z, m, k]`; the last program of a tile to draw from `ticket`, zero at first, does the
    rest, with z in order, or without tickets `sum_partials_kernel`.

    Reads the input, the weight and the residual once from memory (again from L2: the input
    `K / BLOCK_N` times for each of the `R S` taps, the weight `M / BLOCK_M` times), writes the
    output once (split: `SPLIT_K` times 4 bytes an element).

    Args, where the name does not say it:
        DENSE_ROWS: row m of the input is `m input_stride_w` (1x1, stride 1, dense images).
        EVEN_C: BLOCK_K divides C, so the depth needs no mask.
        RESIDUAL_CHANNELS: how many channels the residual has, which lie in the middle of the
            output's, or None where it lies in memory as the output does.
        WIDE: some offset does not fit into 31 bits.
        ACT: the number of the activation, FIRST and SECOND its parameters: see `activated`.
        PROLOGUE: "none" or, of one group, "norm": see `_conv_sum`, as for `table_ptr`. What every
            program loads is normalised by it, `R S K / BLOCK_N` times in all.
    """
    # Which tile, of which group, and which share of its sum.
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_in_group = tl.cdiv(K, BLOCK_N)
    program = tl.program_id(0)
    tile_m, tile_n = tile_of(program, tiles_m, tiles_in_group * groups, BAND)
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
    rows, h, w = pixels(
        row, P, Q, input_stride_n, input_stride_h, input_stride_w, STRIDE_H, STRIDE_W, PADDING_H,
        PADDING_W, DENSE_ROWS,
    )  # fmt: skip
    rows += group * C
    columns = column * (R * S * C)

    if DEPENDENT:
        programs = tl.num_programs(0) * tl.num_programs(1)
        place = tl.program_id(1) * tl.num_programs(0) + program
        prefetch(weight_ptr, K * groups * R * S * C, place, programs)
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
    acc = conv_sum(
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
        exists = row_exists[:, None] & (local_k < K)[None, :]
        tl.store(partial_ptr + offsets, acc, mask=exists)
        if ticket_ptr is not None:  # noqa: SIM102  (this one is decided at compile time)
            if is_last(ticket_ptr, program, SPLIT_K):
                part_ptrs = partial_ptr + m.to(tl.int64)[:, None] * (K * groups) + k[None, :]
                sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
                for _ in range(SPLIT_K):
                    sum += tl.load(part_ptrs, mask=exists, other=0.0)
                    part_ptrs += tl.cast(M, tl.int64) * (K * groups)
                finish(
                    sum, m, row_exists, first_k, K - first_local_k, mean_ptr, var_ptr,
                    bn_weight_ptr, bn_bias_ptr, bias_ptr, eps, residual_ptr, residual_stride_n,
                    residual_stride_c, residual_stride_h, residual_stride_w, output_ptr, P, Q,
                    K * groups, RESIDUAL_CHANNELS, ACT, FIRST, SECOND,
                )  # fmt: skip
    else:
        finish(
            acc, m, row_exists, first_k, K - first_local_k, mean_ptr, var_ptr, bn_weight_ptr,
            bn_bias_ptr, bias_ptr, eps, residual_ptr, residual_stride_n, residual_stride_c,
            residual_stride_h, residual_stride_w, output_ptr, P, Q, K * groups, RESIDUAL_CHANNELS,
            ACT, FIRST, SECOND,
        )  # fmt: skip


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
    ACT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT_K: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """The second pass of split-K: `output = act(bn(sum_z partial[z, m, k]))`, z in order.

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
    finish(
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
        ACT,
        FIRST,
        SECOND,
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
    ACT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
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
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(groups, IN_TILE), BAND)
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
    finish(
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
        ACT,
        FIRST,
        SECOND,
    )


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
    ACT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
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
    tile_m, tile_n = tile_of(tl.program_id(0), tiles_m, tl.cdiv(K, BLOCK_N), BAND)
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
    acc = row_sum(
        input_ptr, weight_ptr, rows, h, between, columns, H, W * C, input_stride_h, S * C, R,
        DILATION_H, SKEW, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SKEW > 0 and tl.max((acc != acc).to(tl.int32)) > 0:
        acc = row_sum(
            input_ptr, weight_ptr, rows, h, between, columns, H, W * C, input_stride_h, S * C, R,
            DILATION_H, SKEW, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    finish(
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
        ACT,
        FIRST,
        SECOND,
    )
