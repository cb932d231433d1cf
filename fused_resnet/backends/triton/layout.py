"""Activations of models that are not channels_last: copied to it once, at the network's beginning.

A copy by torch would keep a pass from becoming a plan, whose launches are all this backend's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .problem import ceil_div

_BLOCK_M = 64
_WIDEST = 64
_WARPS = 4


@triton.jit
def channels_last_kernel(
    input_ptr,
    output_ptr,
    M,
    H,
    W,
    C,
    input_stride_n,
    input_stride_c,
    input_stride_h,
    input_stride_w,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`output[n, h, w, c] = input[n, c, h, w]`, a row `m = (n H + h) W + w` a pixel.

    Reads the input and writes the output once. Along pixels, as they lie, it is loaded, along
    channels stored; between the two the tile goes through shared memory.
    """
    tile_m = tl.program_id(0)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = (m < M)[:, None] & (c < C)[None, :]
    image_row = m // W
    pixels = (
        (image_row // H) * input_stride_n
        + (image_row % H) * input_stride_h
        + (m % W) * input_stride_w
    )
    channels = c.to(tl.int64) if WIDE else c
    values = tl.load(
        input_ptr + pixels[:, None] + (channels * input_stride_c)[None, :], mask=exists, other=0.0
    )
    tl.store(output_ptr + m[:, None] * C + c[None, :], values, mask=exists)


def channels_last(input: Tensor) -> Tensor:
    """A dense channels_last copy: one launch.

    Args:
        input: (N, C, H, W), with at least one element, of any strides.

    Returns:
        The same values, (N, C, H, W).
    """
    N, C, H, W = input.shape
    output = input.new_empty((N, H, W, C))
    block_c = min(_WIDEST, triton.next_power_of_2(C))
    launch.launch_kernel(
        input,
        channels_last_kernel,
        (ceil_div(N * H * W, _BLOCK_M), ceil_div(C, block_c)),
        (input, output, N * H * W, H, W, C, *input.stride()),
        WIDE=launch.is_wide(input, output),
        BLOCK_M=_BLOCK_M,
        BLOCK_C=block_c,
        num_warps=_WARPS,
    )
    return output.permute(0, 3, 1, 2)
