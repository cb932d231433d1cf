"""A stem's batch norm with batch statistics, its ReLU and its max-pool: kernels, launchers.

    output[n, p, q]     = max over r, s of relu((input[n, h, w] - mean) scale + bias)
    offset[n, p, q]     = r S + s of that maximum,  h = p stride - padding + r,  w likewise
    grad_input[n, h, w] = sum of grad[n, p, q] over the windows whose offset says (h, w)

The windows have R x S pixels. Of equal values a window takes what `max_pool2d` takes: the first,
row by row, but the last NaN where there is one. Tensors are rows of C channels, `channels_last`;
programs go through them as in `norm.py`. Backward gathers, for each pixel in the windows'
order, so that its bits are the same each time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...layers.description import ConvNorm, Norm, output_size
from ...tuning.choice import Tile
from ...tuning.estimate import USUAL_POOL, pooled_rows_each
from ..library import precision
from . import launch
from .device import affine, normalized, relu
from .launch import (
    as_conv2d_would,
    channels_last,
    kept_rows,
    row_block,
    skew,
)
from .norm import Layout, batch_statistics, contiguous_vectors, layout_of
from .norm_kernels import load_norm, program_place
from .problem import ceil_div, chosen_tile, hint_of, problem_of, tile_for

MOST_POSITIONS = 255
"""Pixels of the largest window: offsets have 8 bits, and backward needs one that no pixel has."""

# Pixels of a window, or windows of a pixel, that are loaded before the first is looked at.
_UNROLLED = 9
# Twice `norm.py`'s: registers hold best values and offsets beside what is being loaded.
_WARPS = 8


@triton.jit
def norm_pool_kernel(
    input_ptr,
    mean_ptr,
    var_ptr,
    weight_ptr,
    bias_ptr,
    output_ptr,
    offset_ptr,
    eps,
    rows,
    C,
    H,
    W,
    P,
    Q,
    steps,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`output = max relu((input - mean) scale + bias)` of a window, and where it was found.

    A row is a pooled pixel. Values are rounded before they are compared, as they would be in
    memory: what rounding makes equal is a tie.

    Reads the input (pixels shared by windows again from the caches) once, writes the output and
    the offsets once.
    """
    _, first, c = program_place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, _, scale, bias = load_norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
    for step in range(steps):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        row_exists = row < rows
        image_row = row // Q
        top = image_row % P * STRIDE_H - PADDING_H
        left = (row - image_row * Q) * STRIDE_W - PADDING_W
        corner = (image_row // P * H + top) * W + left
        best = tl.full((BLOCK_R, BLOCK_C), float("-inf"), dtype=tl.float32)
        offset = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.int32)
        for position in tl.range(0, R * S, loop_unroll_factor=UNROLL):
            r = position // S
            s = position - r * S
            h = top + r
            w = left + s
            there = row_exists & (h >= 0) & (h < H) & (w >= 0) & (w < W)
            exists = there[:, None] & c_exists[None, :]
            pixel = corner + r * W + s
            x = tl.load(input_ptr + (pixel * C)[:, None] + c[None, :], mask=exists, other=0.0)
            value = relu(normalized(x.to(tl.float32) - mean[None, :], scale, bias))
            value = value.to(output_ptr.dtype.element_ty).to(tl.float32)
            # NaN is greater than nothing and not equal to itself.
            better = exists & ((value > best) | (value != value))
            best = tl.where(better, value, best)
            offset = tl.where(better, position, offset)
        places = (row * C)[:, None] + c[None, :]
        exists = row_exists[:, None] & c_exists[None, :]
        tl.store(output_ptr + places, best.to(output_ptr.dtype.element_ty), mask=exists)
        tl.store(offset_ptr + places, offset.to(tl.uint8), mask=exists)


@triton.jit
def pool_backward_kernel(
    grad_ptr,
    offset_ptr,
    grad_input_ptr,
    rows,
    C,
    H,
    W,
    P,
    Q,
    steps,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    UNROLL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`grad_input = sum of grad where the offset is this pixel's`, in float32, rounded once.

    A row is a pixel of the unpooled tensor, which at most `ceil(R / stride) ceil(S / stride)`
    windows have in them; they are added up row by row.

    Reads the pooled gradient and the offsets (windows shared by pixels again from the caches) once,
    writes the result once.
    """
    WINDOWS_H: tl.constexpr = (R + STRIDE_H - 1) // STRIDE_H
    WINDOWS_W: tl.constexpr = (S + STRIDE_W - 1) // STRIDE_W
    _, first, c = program_place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    for step in range(steps):
        row = first + step * BLOCK_R + tl.arange(0, BLOCK_R)
        row_exists = row < rows
        image_row = row // W
        n = image_row // H
        # From the first window's top left corner.
        below = image_row - n * H + PADDING_H
        right = row - image_row * W + PADDING_W
        first_p = below // STRIDE_H - (WINDOWS_H - 1)
        first_q = right // STRIDE_W - (WINDOWS_W - 1)
        total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for window in tl.range(0, WINDOWS_H * WINDOWS_W, loop_unroll_factor=UNROLL):
            i = window // WINDOWS_W
            p = first_p + i
            q = first_q + (window - i * WINDOWS_W)
            r = below - p * STRIDE_H
            s = right - q * STRIDE_W
            there = row_exists & (p >= 0) & (p < P) & (q >= 0) & (q < Q) & (r < R) & (s < S)
            exists = there[:, None] & c_exists[None, :]
            places = (((n * P + p) * Q + q) * C)[:, None] + c[None, :]
            offset = tl.load(offset_ptr + places, mask=exists, other=255).to(tl.int32)
            grad = tl.load(grad_ptr + places, mask=exists, other=0.0).to(tl.float32)
            total += tl.where(exists & (offset == (r * S + s)[:, None]), grad, 0.0)
        tl.store(
            grad_input_ptr + (row * C)[:, None] + c[None, :],
            total.to(grad_input_ptr.dtype.element_ty),
            mask=row_exists[:, None] & c_exists[None, :],
        )


def batch_norm_relu_max_pool(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pool: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`max_pool2d(relu(batch_norm(input)), *pool)` with the batch's statistics: three launch.

    Args:
        input: (N, C, H, W), dense and channels_last, float16, bfloat16 or float32, with at least
            one element.
        weight: (C,) of any floating dtype, or None.
        bias: see `weight`.
        eps: added to the variance.
        pool: kernel size, stride and padding, two numbers each, as `max_pool2d` takes them; at most
            MOST_POSITIONS pixels a window.

    Returns:
        The pooled tensor (N, C, P, Q) and its offsets in their windows, uint8, both channels_last;
        the batch's mean and biased variance (C,), float32.
    """
    mean, var = batch_statistics(input)
    return *norm_relu_max_pool(input, Norm(mean, var, weight, bias, eps), pool), mean, var


def norm_relu_max_pool(
    input: Tensor, norm: Norm, pool: Sequence[Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """`batch_norm_relu_max_pool` with statistics that are known: one launch."""
    N, C, H, W = input.shape
    P, Q = pooled_size((H, W), pool)
    output, offsets = (
        torch.empty(
            (N, C, P, Q), dtype=dtype, device=input.device, memory_format=torch.channels_last
        )
        for dtype in (input.dtype, torch.uint8)
    )
    layout = layout_of(output)
    steps, programs = layout.elementwise()
    (R, S), _, _ = pool
    launch.launch_kernel(
        input,
        norm_pool_kernel,
        (programs,),
        (
            input, *contiguous_vectors(*norm[:4]), output, offsets, norm.eps, layout.rows,
            C, H, W, P, Q, steps,
        ),
        writes=("output_ptr", "offset_ptr"),
        **_constants(layout, layout_of(input), pool, R * S),
    )  # fmt: skip
    return output, offsets


def max_pool_backward(
    grad: Tensor, offsets: Tensor, size: Sequence[int], pool: Sequence[Sequence[int]]
) -> Tensor:
    """The gradient that `max_pool2d` passes to its input: one launch.

    Args:
        grad: of the pooled tensor, (N, C, P, Q), float16, bfloat16 or float32, with any strides.
        offsets: from `batch_norm_relu_max_pool`.
        size: (H, W) of the input.
        pool: see `batch_norm_relu_max_pool`.

    Returns:
        (N, C, H, W), channels_last, in the dtype of `grad`.
    """
    grad = grad.contiguous(memory_format=torch.channels_last)
    N, C, P, Q = grad.shape
    result = torch.empty(
        (N, C, *size), dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last
    )
    layout = layout_of(result)
    steps, programs = layout.elementwise()
    (R, S), stride, _ = pool
    windows = ceil_div(R, stride[0]) * ceil_div(S, stride[1])
    launch.launch_kernel(
        grad,
        pool_backward_kernel,
        (programs,),
        (grad, offsets, result, layout.rows, C, *size, P, Q, steps),
        writes=("grad_input_ptr",),
        **_constants(layout, layout_of(grad), pool, windows),
    )
    return result


def pooled_size(size: Sequence[int], pool: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(P, Q) of a max-pool's output."""
    return output_size(size, *pool)


def _constants(
    layout: Layout, other: Layout, pool: Sequence[Sequence[int]], turns: int
) -> dict[str, Any]:
    """What the kernels are compiled for, of the tensor gone through and of the one looked into."""
    (R, S), stride, padding = pool
    return {
        "R": R,
        "S": S,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PADDING_H": padding[0],
        "PADDING_W": padding[1],
        "UNROLL": turns if turns <= _UNROLLED else 1,
        "WIDE": layout.wide or other.wide,
        "BLOCK_R": layout.block_r,
        "BLOCK_C": layout.block_c,
        "num_warps": _WARPS,
    }


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
    scale, shift = affine(k, k_exists, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps)
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
                    out = relu(out)
                tl.store(
                    output_ptr + pixel[:, None] * K + k[None, :],
                    out.to(output_ptr.dtype.element_ty),
                    mask=m_exists[:, None] & k_exists[None, :],
                )
            best = value


def conv_bn_act_max_pool(
    input: Tensor, layer: ConvNorm, activation: str, tile: Tile | None = None
) -> Tensor:
    """A stem and its 3x3 max-pool of stride 2 and padding 1 in one launch.

    `kernel_for` says "stem_pool" of what it takes; its arguments are those of `conv.conv_bn_act`.

    Returns:
        (N, K, pooled P, pooled Q) in the memory format `conv2d` would give it.
    """
    weight, norm, bias, stride, padding, dilation, groups = layer
    problem = problem_of(input, weight, stride, padding, dilation, groups, False, USUAL_POOL)
    tile = tile_for(problem, chosen_tile(problem, input.device) if tile is None else tile)
    N, C, H, W = input.shape
    K, _, R, S = weight.shape
    P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    pooled_P, pooled_Q = (P - 1) // 2 + 1, (Q - 1) // 2 + 1
    output = input.new_empty((N, pooled_P, pooled_Q, K))
    columns = N * pooled_Q
    if columns == 0:
        return as_conv2d_would(output, input, weight)
    pixels, filters = channels_last(input), kept_rows(weight)
    if pixels.stride(3) != C:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    strips = ceil_div(columns, tile.block_m)
    channel_tiles = ceil_div(K, tile.block_n)
    programs = hint_of(strips) * channel_tiles * hint_of(pooled_P)
    rows_each = pooled_rows_each(programs)
    launch.launch_kernel(
        input,
        stem_pool_kernel,
        (strips, ceil_div(pooled_P, rows_each), channel_tiles),
        (
            pixels, filters, *norm[:4], bias, output, norm.eps, N, H, W, P, Q, K, pooled_P,
            pooled_Q, rows_each, pixels.stride(0), pixels.stride(2),
        ),
        partly={
            "input_ptr": functools.partial(
                launch.addressed, input.shape, (P, Q), (R, S), stride, padding, dilation
            )
        },
        C=C,
        R=R,
        S=S,
        STRIDE_H=stride[0],
        STRIDE_W=stride[1],
        PADDING_H=padding[0],
        PADDING_W=padding[1],
        DILATION_H=dilation[0],
        SKEW=skew(input, stride, padding),
        RELU=activation == "relu",
        PRECISION=precision(input),
        WIDE=launch.is_wide(pixels, filters, output, None),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=row_block(S * C),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return as_conv2d_would(output, input, weight)
