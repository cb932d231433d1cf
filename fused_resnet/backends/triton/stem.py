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

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .conv import _launch, problem_size
from .conv_kernels import _normalized, _relu
from .norm import _Layout, _layout_of, _norm, _place, _vectors, batch_statistics

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
    _, first, c = _place(C, steps, WIDE, BLOCK_R, BLOCK_C)
    c_exists = c < C
    mean, _, scale, bias = _norm(c, c_exists, mean_ptr, var_ptr, weight_ptr, bias_ptr, eps)
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
            value = _relu(_normalized(x.to(tl.float32) - mean[None, :], scale, bias))
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
    _, first, c = _place(C, steps, WIDE, BLOCK_R, BLOCK_C)
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
    """`max_pool2d(relu(batch_norm(input)), *pool)` with the batch's statistics: three launches.

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
    return *norm_relu_max_pool(input, mean, var, weight, bias, eps, pool), mean, var


def norm_relu_max_pool(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pool: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor]:
    """`batch_norm_relu_max_pool` with statistics that are known, (C,) each: one launch."""
    N, C, H, W = input.shape
    P, Q = pooled_size((H, W), pool)
    output, offsets = (
        torch.empty(
            (N, C, P, Q), dtype=dtype, device=input.device, memory_format=torch.channels_last
        )
        for dtype in (input.dtype, torch.uint8)
    )
    layout = _layout_of(output)
    steps, programs = layout.elementwise()
    (R, S), _, _ = pool
    _launch(
        input,
        norm_pool_kernel,
        (programs,),
        (
            input, *_vectors(mean, var, weight, bias), output, offsets, eps, layout.rows, C, H, W,
            P, Q, steps,
        ),
        writes=("output_ptr", "offset_ptr"),
        **_constants(layout, _layout_of(input), pool, R * S),
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
    layout = _layout_of(result)
    steps, programs = layout.elementwise()
    (R, S), stride, _ = pool
    windows = triton.cdiv(R, stride[0]) * triton.cdiv(S, stride[1])
    _launch(
        grad,
        pool_backward_kernel,
        (programs,),
        (grad, offsets, result, layout.rows, C, *size, P, Q, steps),
        writes=("grad_input_ptr",),
        **_constants(layout, _layout_of(grad), pool, windows),
    )
    return result


def pooled_size(size: Sequence[int], pool: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(P, Q) of a max-pool's output."""
    (R, S), stride, padding = pool
    return problem_size(*size, R, S, stride, padding, (1, 1))


def _constants(
    layout: _Layout, other: _Layout, pool: Sequence[Sequence[int]], turns: int
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
