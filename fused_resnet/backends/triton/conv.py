"""How a convolution becomes launches of the kernels in `conv_kernels.py`.

Eager calls launch them directly. Under `torch.compile` they go through `wrap_triton`, so that the
compiler sees kernels and not an opaque operator; every size may be symbolic there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ...layers.description import ConvNorm, Norm, output_size
from ...tuning.choice import Tile
from ...tuning.estimate import kernel_for
from ...tuning.problem import ConvProblem
from ..library import precision
from . import conv_kernels, folded, launch
from .launch import (
    BAND,
    as_conv2d_would,
    channels_last,
    has_dense_rows,
    kept_rows,
    residual_channels,
    row_block,
    skew,
)
from .problem import ceil_div, chosen_tile, problem_of, tile_for

# What the first pass of split-K is given and leaves to the second.
_UNTOUCHED = dict.fromkeys(
    ("mean_ptr", "var_ptr", "bn_weight_ptr", "bn_bias_ptr", "bias_ptr", "residual_ptr",
     "output_ptr"),
    lambda: 0,
)  # fmt: skip
# The second pass of split-K: elements a program and warps.
_SUM_BLOCK = (16, 64)
_SUM_WARPS = 4


def conv_bn_act(
    input: Tensor,
    layer: ConvNorm,
    residual: Tensor | None,
    activation: str,
    tile: Tile | None = None,
    table: Tensor | None = None,
    problem: ConvProblem | None = None,
) -> Tensor:
    """Launches the kernel for a convolution; see `reference.conv_bn_act` for what it computes.

    Args:
        input: (N, C, H, W), float16, bfloat16 or float32. Copied to channels_last if it is not.
        layer: its weight of the input's dtype, copied likewise, its other tensors of any floating
            dtype.
        residual: (N, K, P, Q) with any strides, or with fewer channels: see
            `reference.pad_channels`.
        activation: see `layers/activation.py`.
        tile: how to cut the problem up; None asks `tuning`.
        table: (3, C) as `training_conv.table_of` makes it, of a batch norm that the input, and
            then through a ReLU, goes through first; for the kernel "conv" of one group.
        problem: `problem_of` all this, where the caller has it.

    Returns:
        (N, K, P, Q) in the memory format `conv2d` would give it.
    """
    weight, norm, bias, stride, padding, dilation, groups = layer
    if problem is None:
        problem = problem_of(input, weight, stride, padding, dilation, groups, residual is not None)
    tile = chosen_tile(problem, input.device) if tile is None else tile
    kernel = kernel_for(problem)
    if kernel != "conv" or groups > 1:
        tile = tile_for(problem, tile)
    N, C, H, W = input.shape
    K, group_c, R, S = weight.shape
    P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    output = input.new_empty((N, P, Q, K))
    M = N * P * Q
    if M == 0:
        return as_conv2d_would(output, input, weight)
    pixels, filters = channels_last(input), kept_rows(weight)
    if kernel == "row" and pixels.stride(3) != C:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    common = {
        "RESIDUAL_CHANNELS": None if residual is None else residual_channels(residual, output),
        **launch.acts[activation],
    }
    tiled: dict[str, Any] = {
        **common,
        "R": R,
        "S": S,
        "STRIDE_H": stride[0],
        "STRIDE_W": stride[1],
        "PADDING_H": padding[0],
        "PADDING_W": padding[1],
        "DILATION_H": dilation[0],
        "PRECISION": precision(input),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BAND": BAND,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    parameters, eps = (*norm[:4], bias), norm.eps
    if folded.current.get() is not None:
        parameters, eps = folded.parameters_of(norm, bias)
    wide = launch.is_wide(pixels, filters, output, residual)
    rows = (M + tile.block_m - 1) // tile.block_m
    geometry = ((P, Q), (R, S), stride, padding, dilation)
    partly = {"input_ptr": functools.partial(launch.addressed, input.shape, *geometry)}
    run = functools.partial(launch.launch_kernel, input)

    if kernel == "packed":
        in_tile = tile.block_n // (K // groups)
        block_k = max(16, triton.next_power_of_2(in_tile * group_c))
        run(
            conv_kernels.packed_conv_kernel,
            (rows * ceil_div(groups, in_tile),),
            (
                pixels, filters, *parameters, residual, output, eps, M, H, W, P, Q, groups,
                pixels.stride(0), pixels.stride(2), pixels.stride(3), *residual_strides,
            ),
            partly=partly,
            GROUP_C=group_c,
            GROUP_K=K // groups,
            DILATION_W=dilation[1],
            EVEN=groups % in_tile == 0
            and in_tile * (K // groups) == tile.block_n
            and in_tile * group_c == block_k,
            WIDE=wide,
            BLOCK_K=block_k,
            **tiled,
        )  # fmt: skip
    elif kernel == "row":
        run(
            conv_kernels.row_conv_kernel,
            (rows * ceil_div(K, tile.block_n),),
            (
                pixels, filters, *parameters, residual, output, eps, M, H, W, P, Q, K,
                pixels.stride(0), pixels.stride(2), *residual_strides,
            ),
            partly=partly,
            C=C,
            SKEW=skew(input, stride, padding),
            WIDE=wide,
            BLOCK_K=row_block(S * C),
            **tiled,
        )  # fmt: skip
    else:
        split_k = 1
        if tile.split_k > 1:
            split_k = _shares(tile, R * S * ceil_div(group_c, tile.block_k))
        partial = tickets = None
        group_k = K // groups
        tiles = rows * groups * ceil_div(group_k, tile.block_n)
        if split_k > 1:
            partial = input.new_empty((split_k, M, K), dtype=torch.float32)
            wide = wide or partial.numel() >= 2**31
            tickets = folded.take_tickets(tiles)
        writes: tuple[str, ...] = ("output_ptr",)
        untouched: dict[str, Any] = {}
        if tickets is not None:
            writes = ("output_ptr", "partial_ptr")
        elif partial is not None:
            writes, untouched = ("partial_ptr",), _UNTOUCHED
        pointwise = R * S == 1 and max(padding) == 0
        run(
            conv_kernels.conv_kernel,
            (tiles, split_k),
            (
                pixels, filters, *parameters, residual, output, partial, tickets, table, eps, M, H,
                W, P, Q, group_c, group_k, groups, pixels.stride(0), pixels.stride(2),
                pixels.stride(3), *residual_strides,
            ),
            writes=writes,
            partly=partly | untouched,
            DILATION_W=dilation[1],
            DENSE_ROWS=pointwise and max(stride) == 1 and has_dense_rows(pixels),
            EVEN_C=group_c % tile.block_k == 0,
            WIDE=wide,
            BLOCK_K=tile.block_k,
            SPLIT_K=split_k,
            PROLOGUE="none" if table is None else "norm",
            **tiled,
        )  # fmt: skip
        if partial is not None and tickets is None:
            sum_partials(input, partial, norm, bias, output, wide, residual, activation)
    return as_conv2d_would(output, input, weight)


def sum_partials(
    input: Tensor,
    partial: Tensor,
    norm: Norm,
    bias: Tensor | None,
    output: Tensor,
    wide: bool,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> None:
    """Launches the second pass of a sum that several programs shared.

    Args:
        input: any tensor of the first pass.
        partial: (shares, N P Q, K), float32.
        norm: behind the convolution.
        bias: the convolution's.
        output: (N, P, Q, K), which this writes.
        wide: whether some offset does not fit into 31 bits.
        residual: (N, K, P, Q) with any strides, or None.
        activation: see `conv_bn_act`.
    """
    split_k, M, K = partial.shape
    _, P, Q, _ = output.shape
    parameters, eps = folded.parameters_of(norm, bias)
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    launch.launch_kernel(
        input,
        conv_kernels.sum_partials_kernel,
        (ceil_div(M, _SUM_BLOCK[0]), ceil_div(K, _SUM_BLOCK[1])),
        (partial, *parameters, residual, output, eps, M, P, Q, K, *residual_strides),
        RESIDUAL_CHANNELS=None if residual is None else residual_channels(residual, output),
        **launch.acts[activation],
        WIDE=wide,
        BLOCK_M=_SUM_BLOCK[0],
        BLOCK_N=_SUM_BLOCK[1],
        SPLIT_K=split_k,
        num_warps=_SUM_WARPS,
    )


def _shares(tile: Tile, steps: int) -> int:
    """`split_k` without shares that would have no step of the sum."""
    if tile.split_k == 1:
        return 1
    return ceil_div(steps, ceil_div(steps, min(tile.split_k, steps)))
