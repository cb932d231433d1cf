"""One kernel per Bottleneck: from its 3x3 convolution to the next block's first 1x1.

What lies between the convolutions stays in registers. No halo is computed twice, since the launch
begins at the only convolution that has one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...layers.description import ConvNorm, output_size
from ...tuning.chain import slice_stages
from ...tuning.choice import Tile
from . import conv, device, folded, launch
from .problem import ceil_div


@triton.jit
def _convolution(
    input_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    eps,
    n,
    p,
    q,
    H,
    W,
    input_stride_n,
    input_stride_h,
    input_stride_w,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`relu(bn(conv(input)))` at the pixels (n, p, q), all channels."""
    h = p * STRIDE_H - PADDING_H
    w = q * STRIDE_W - PADDING_W
    rows = n * input_stride_n + h * input_stride_h + w * input_stride_w
    inner = tl.arange(0, WIDTH)
    columns = inner * (R * S * WIDTH)
    acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    tap, start = 0, 0
    for _ in range(R * S * (WIDTH // BLOCK_K)):
        c = start + tl.arange(0, BLOCK_K)
        r = tap // S
        s = tap - r * S
        shift = r * DILATION_H * input_stride_h + s * DILATION_W * input_stride_w
        ptrs = input_ptr + (rows + shift)[:, None] + c[None, :]
        if PADDING_H + PADDING_W > 0:
            inside = (h + r * DILATION_H >= 0) & (h + r * DILATION_H < H)
            inside &= (w + s * DILATION_W >= 0) & (w + s * DILATION_W < W)
            a = tl.load(ptrs, mask=inside[:, None], other=0.0)
        else:
            a = tl.load(ptrs)
        b = tl.load(weight_ptr + columns[None, :] + (tap * WIDTH + c)[:, None])
        acc = tl.dot(a, b, acc)
        start += BLOCK_K
        done = start >= WIDTH
        tap += done.to(tl.int32)
        start = tl.where(done, 0, start)
    scale, offset = device.affine(
        inner, inner < WIDTH, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps
    )
    return device.relu(acc * scale[None, :] + offset[None, :]).to(DTYPE)


@triton.jit
def bottleneck_kernel(
    input_ptr,
    weight_ptr,
    mean_ptr,
    var_ptr,
    bn_weight_ptr,
    bn_bias_ptr,
    bias_ptr,
    eps,
    expand_ptr,
    expand_mean_ptr,
    expand_var_ptr,
    expand_bn_weight_ptr,
    expand_bn_bias_ptr,
    expand_bias_ptr,
    expand_eps,
    shortcut_ptr,
    project_ptr,
    project_mean_ptr,
    project_var_ptr,
    project_bn_weight_ptr,
    project_bn_bias_ptr,
    project_bias_ptr,
    project_eps,
    reduce_ptr,
    reduce_mean_ptr,
    reduce_var_ptr,
    reduce_bn_weight_ptr,
    reduce_bn_bias_ptr,
    reduce_bias_ptr,
    reduce_eps,
    output_ptr,
    next_ptr,
    partial_ptr,
    ticket_ptr,
    M,
    H,
    W,
    P,
    Q,
    K,
    input_stride_n,
    input_stride_h,
    input_stride_w,
    shortcut_stride_n,
    shortcut_stride_h,
    shortcut_stride_w,
    WIDTH: tl.constexpr,
    NEXT: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SHORTCUT_C: tl.constexpr,
    PROJECT_STRIDE_H: tl.constexpr,
    PROJECT_STRIDE_W: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
    SLICE_STAGES: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """A Bottleneck from `input`, its first 1x1's output, on; all of a pixel's channels at a time.

    Per tile of BLOCK_M output pixels:

        h = relu(bn(conv3x3(input)))                         in 16 bits, in registers
        for each slice of BLOCK_O of the K output channels:
            o = relu(bn(h @ expand[slice]) + shortcut[slice])
            store o;  sum += o @ reduce[:, slice]            o in 16 bits, as stored
        store relu(bn(sum)) to `next`

    `shortcut[slice]` is the block's input itself or, where `project_ptr` is given, a second sum,
    `bn(shortcut[pixel(m)] @ project[slice])` of its pixels `(n, p stride, q stride)`, that is
    rounded nowhere. NEXT is the next block's width, 0 where its first 1x1 is not in this launch.

    With R = 0 the 3x3 has a launch of its own, and `input` is `h`. With SPLIT > 1 (then R = 0) that
    many programs share a tile's slices, and each writes its part of `sum`, in float32, to
    `partial[z, m]`; the last one to draw from `ticket`, zero at first, adds them up in order, or
    without tickets `conv_kernels.sum_partials_kernel`.

    DEPENDENT is explained at the top of `conv_kernels.py`.

    Reads `input`, the shortcut (where strided, the pixels used) and the weights once from memory
    (again from L2: `input` for each of the R S taps, a projected shortcut for each slice, the
    weights for each tile of pixels), writes the output and `next` once.
    """
    dtype: tl.constexpr = output_ptr.dtype.element_ty
    tile_m = tl.program_id(0)
    if WIDE:
        tile_m = tile_m.to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row_exists = m < M
    # Rows past the last one compute it again, which needs no mask.
    row = tl.minimum(m, M - 1)
    image_row = row // Q
    n, p, q = image_row // P, image_row % P, row % Q

    if DEPENDENT:
        programs = tl.num_programs(0) * tl.num_programs(1)
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if R > 0:
            device.prefetch(weight_ptr, WIDTH * R * S * WIDTH, program, programs)
        device.prefetch(expand_ptr, K * WIDTH, program, programs)
        if project_ptr is not None:
            device.prefetch(project_ptr, K * SHORTCUT_C, program, programs)
        if NEXT > 0:
            device.prefetch(reduce_ptr, K * NEXT, program, programs)
        gdc_launch_dependents()
        gdc_wait()

    inner = tl.arange(0, WIDTH)
    if R == 0:
        hidden = tl.load(input_ptr + (row * WIDTH)[:, None] + inner[None, :])
    else:
        hidden = _convolution(
            input_ptr, weight_ptr, mean_ptr, var_ptr, bn_weight_ptr, bn_bias_ptr, bias_ptr, eps, n,
            p, q, H, W, input_stride_n, input_stride_h, input_stride_w, WIDTH, R, S, STRIDE_H,
            STRIDE_W, PADDING_H, PADDING_W, DILATION_H, DILATION_W, BLOCK_M, BLOCK_K, dtype,
        )  # fmt: skip

    if project_ptr is not None:
        shortcut_rows = (
            n * shortcut_stride_n
            + p * PROJECT_STRIDE_H * shortcut_stride_h
            + q * PROJECT_STRIDE_W * shortcut_stride_w
        )
        shortcut_ptrs = shortcut_ptr + shortcut_rows[:, None] + tl.arange(0, BLOCK_K)[None, :]
        # One block deep, it is loaded once; and a loop without a loop inside is pipelined.
        if SHORTCUT_C == BLOCK_K:
            x = tl.load(shortcut_ptrs)
    if NEXT > 0:
        following = tl.arange(0, NEXT)
        sum = tl.zeros((BLOCK_M, NEXT), dtype=tl.float32)
    first_k, end_k = 0, K
    if SPLIT > 1:
        first_k = tl.program_id(1) * (K // SPLIT)
        end_k = first_k + K // SPLIT
    for first in tl.range(first_k, end_k, BLOCK_O, num_stages=SLICE_STAGES):
        k = first + tl.arange(0, BLOCK_O)
        exists = k < K
        offsets = m[:, None] * K + k[None, :]
        if project_ptr is not None:
            project_ptrs = project_ptr + (k * SHORTCUT_C)[None, :] + tl.arange(0, BLOCK_K)[:, None]
            if SHORTCUT_C == BLOCK_K:
                out = tl.dot(x, tl.load(project_ptrs))
            else:
                out = tl.zeros((BLOCK_M, BLOCK_O), dtype=tl.float32)
                for start in range(0, SHORTCUT_C, BLOCK_K):
                    a = tl.load(shortcut_ptrs + start)
                    b = tl.load(project_ptrs + start)
                    out = tl.dot(a, b, out)
            factor, term = device.affine(
                k, exists, project_mean_ptr, project_var_ptr, project_bn_weight_ptr,
                project_bn_bias_ptr, project_bias_ptr, project_eps,
            )  # fmt: skip
            out = out * factor[None, :] + term[None, :]
        else:
            shortcut = tl.load(shortcut_ptr + offsets, mask=row_exists[:, None], other=0.0)
            out = shortcut.to(tl.float32)
        expand = tl.load(expand_ptr + (k * WIDTH)[None, :] + inner[:, None])
        branch = tl.dot(hidden, expand)
        factor, term = device.affine(
            k, exists, expand_mean_ptr, expand_var_ptr, expand_bn_weight_ptr, expand_bn_bias_ptr,
            expand_bias_ptr, expand_eps,
        )  # fmt: skip
        out += branch * factor[None, :] + term[None, :]
        out = device.relu(out).to(dtype)
        tl.store(output_ptr + offsets, out, mask=row_exists[:, None])
        if NEXT > 0:
            reduce = tl.load(reduce_ptr + (following * K)[None, :] + k[:, None])
            sum = tl.dot(out, reduce, sum)
    if NEXT > 0 and SPLIT > 1:
        part = tl.program_id(1)
        if WIDE:
            part = part.to(tl.int64)
        offsets = (part * M + m)[:, None] * NEXT + following[None, :]
        tl.store(partial_ptr + offsets, sum, mask=row_exists[:, None])
        if ticket_ptr is not None:  # noqa: SIM102  (this one is decided at compile time)
            if device.is_last(ticket_ptr, tl.program_id(0), SPLIT):
                part_ptrs = partial_ptr + m.to(tl.int64)[:, None] * NEXT + following[None, :]
                sum = tl.zeros((BLOCK_M, NEXT), dtype=tl.float32)
                for _ in range(SPLIT):
                    sum += tl.load(part_ptrs, mask=row_exists[:, None], other=0.0)
                    part_ptrs += tl.cast(M, tl.int64) * NEXT
                device.finish(
                    sum, m, row_exists, 0, NEXT, reduce_mean_ptr, reduce_var_ptr,
                    reduce_bn_weight_ptr, reduce_bn_bias_ptr, reduce_bias_ptr, reduce_eps, None, 0,
                    0, 0, 0, next_ptr, P, Q, NEXT, False, 1, 0.0, 0.0,
                )  # fmt: skip
    elif NEXT > 0:
        device.finish(
            sum, m, row_exists, 0, NEXT, reduce_mean_ptr, reduce_var_ptr, reduce_bn_weight_ptr,
            reduce_bn_bias_ptr, reduce_bias_ptr, reduce_eps, None, 0, 0, 0, 0, next_ptr, P, Q, NEXT,
            False, 1, 0.0, 0.0,
        )  # fmt: skip


"""The arguments of `conv_bn_act` from `weight` to `groups`."""


def bottleneck(
    input: Tensor,
    shortcut: Tensor,
    convolution: ConvNorm | None,
    expand: ConvNorm,
    project: ConvNorm | None,
    reduce: ConvNorm | None,
    tile: Tile,
) -> tuple[Tensor, Tensor | None]:
    """Launches the kernel; see `bottleneck_kernel` for what it computes, `chains.py` for when.

    The weights need not be arranged for it: a slice of `expand`, (K, width), is as good an operand
    as its transpose is to the tensor cores, as is one of `reduce`, (next width, K), of which each
    row has BLOCK_O neighbouring values. Those of the 3x3 lie as in `conv.conv_bn_act`, channels
    last; `launch.kept_rows` copies them where they do not.

    Args:
        input: (N, width, H, W), float16 or bfloat16: the output of the block's first convolution,
            or without `convolution` that of its 3x3.
        shortcut: the block's input: (N, K, P, Q), or with `project` (N, C, any size).
        convolution: the 3x3, of `width` channels to as many, or None.
        expand: the 1x1 behind it, to K channels.
        project: the shortcut's 1x1 of any stride, or None.
        reduce: the next block's first 1x1, or None.
        tile: `block_m` pixels, slices of `block_n` channels, products `block_k` deep; without
            `convolution`, `split_k` programs share the slices, which takes a second launch.

    Returns:
        The block's output, (N, K, P, Q), and `reduce`'s, (N, next width, P, Q) or None, both
        channels_last.
    """
    N, width, H, W = input.shape
    stride: Sequence[int] = (1, 1)
    padding: Sequence[int] = (0, 0)
    dilation: Sequence[int] = (1, 1)
    R = S = 0
    P, Q = H, W
    if convolution is not None:
        weight, _, _, stride, padding, dilation, _ = convolution
        R, S = weight.shape[2:]
        P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    K = expand[0].size(0)
    M = N * P * Q
    following = 0 if reduce is None else reduce[0].size(0)
    output = input.new_empty((N, P, Q, K))
    next_input = None if reduce is None else input.new_empty((N, P, Q, following))
    if M > 0:
        pixels = launch.channels_last(input)
        if convolution is None:  # found where the output's pixels are
            pixels = input.contiguous(memory_format=torch.channels_last)
        # The kernel finds an unprojected shortcut's pixels where it finds the output's.
        identity = shortcut.contiguous(memory_format=torch.channels_last)
        source = identity if project is None else launch.channels_last(shortcut)
        weights = [
            None if layer is None else launch.kept_rows(layer[0])
            for layer in (convolution, expand, project, reduce)
        ]
        project_stride = (1, 1) if project is None else project.stride
        split = tile.split_k if convolution is None and reduce is not None else 1
        partial = tickets = None
        tiles = ceil_div(M, tile.block_m)
        if split > 1:
            partial = input.new_empty((split, M, following), dtype=torch.float32)
            tickets = folded.take_tickets(tiles)
        finishes = partial is None or tickets is not None
        wide = launch.is_wide(pixels, source, output, *weights, partial)
        partly = {
            "shortcut_ptr": functools.partial(
                launch.addressed, shortcut.shape, (P, Q), (1, 1), project_stride, (0, 0), (1, 1)
            )
        }
        if convolution is not None:
            partly["input_ptr"] = functools.partial(
                launch.addressed, input.shape, (P, Q), (R, S), stride, padding, dilation
            )
        launch.launch_kernel(
            input,
            bottleneck_kernel,
            (tiles, split),
            (
                pixels, weights[0], *_norm(convolution), weights[1], *_norm(expand), source,
                weights[2], *_norm(project), weights[3],
                *_norm(reduce if finishes else None), output, next_input if finishes else None,
                partial, tickets, M, H, W, P, Q, K,
                *_strides(pixels), *_strides(source),
            ),
            writes=("output_ptr", "next_ptr", "partial_ptr"),
            partly=partly,
            WIDTH=width,
            NEXT=following,
            R=R,
            S=S,
            STRIDE_H=stride[0],
            STRIDE_W=stride[1],
            PADDING_H=padding[0],
            PADDING_W=padding[1],
            DILATION_H=dilation[0],
            DILATION_W=dilation[1],
            SHORTCUT_C=source.size(1),
            PROJECT_STRIDE_H=project_stride[0],
            PROJECT_STRIDE_W=project_stride[1],
            WIDE=wide,
            BLOCK_M=tile.block_m,
            BLOCK_O=tile.block_n,
            BLOCK_K=tile.block_k,
            SPLIT=split,
            SLICE_STAGES=slice_stages(width, tile),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )  # fmt: skip
        if not finishes and partial is not None and reduce is not None and next_input is not None:
            conv.sum_partials(input, partial, reduce.norm, reduce.bias, next_input, wide)
    reduced = None if next_input is None else next_input.permute(0, 3, 1, 2)
    return output.permute(0, 3, 1, 2), reduced


def _norm(layer: ConvNorm | None) -> tuple[Any, ...]:
    """Mean, variance, weight, bias, the convolution's bias and eps of a layer."""
    if layer is None:
        return (None, None, None, None, None, 0.0)
    parameters, eps = folded.parameters_of(layer.norm, layer.bias)
    return *parameters, eps


def _strides(pixels: Tensor) -> tuple[int, int, int]:
    """Of image, row and column."""
    return pixels.stride(0), pixels.stride(2), pixels.stride(3)
