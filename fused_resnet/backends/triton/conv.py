"""How a convolution becomes launches of the kernels in `conv_kernels.py`.

Eager calls launch them directly. Under `torch.compile` they go through `wrap_triton`, so that the
compiler sees kernels and not an opaque operator; every size may be symbolic there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import Parameter

from ... import tuning
from ...tuning import chain
from ...tuning.choice import Choice, Tile
from ...tuning.estimate import USUAL_POOL, kernel_for, pooled_rows_each, special_tiles
from ...tuning.problem import ConvProblem
from ..library import precision
from . import conv_kernels
from . import launch as launches

# Tiles in a column before the next column starts: see `conv_kernels._tile_of`.
_BAND = 8
# For the interpreter, whose time goes by the number of operations.
_INTERPRETED_TILE = Tile(128, 256, 256, 1, 4, 1)
# What the first pass of split-K is given and leaves to the second.
_UNTOUCHED = dict.fromkeys(
    ("mean_ptr", "var_ptr", "bn_weight_ptr", "bn_bias_ptr", "bias_ptr", "residual_ptr",
     "output_ptr"),
    lambda: 0,
)  # fmt: skip
# The second pass of split-K: elements a program and warps.
_SUM_BLOCK = (16, 64)
_SUM_WARPS = 4


def choose(problem: ConvProblem, device: torch.device) -> Choice:
    """Which kernel and tile run a problem: what `tuning` says, on a GPU."""
    if device.type != "cuda":
        return Choice("triton", _INTERPRETED_TILE, "interpreted")
    return tuning.choose(problem, device)


def _chosen_tile(problem: ConvProblem, device: torch.device) -> Tile:
    """The chosen tile; the estimate's where the choice is a kernel that graphs cannot hold."""
    choice = choose(problem, device)
    return choice.tile if choice.kernel == "triton" else tuning.untuned_tile(problem, device)


def tile_for(problem: ConvProblem, tile: Tile) -> Tile:
    """`tile` as the problem's kernel takes it: no wider than a group, or one of its own."""
    if special := special_tiles(problem):
        return tile if tile in special else special[0]
    if problem.groups == 1:
        return tile
    group_k = problem.K // problem.groups
    block_n = min(tile.block_n, max(16, triton.next_power_of_2(group_k)))
    return replace(tile, block_n=block_n)


def problem_of(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: bool,
    pool: Sequence[int] | None = None,
) -> ConvProblem:
    """A call as `tuning` sees it; symbolic sizes stand for the values they were traced with."""
    N, C, H, W = map(_hint, input.shape)
    K, _, R, S = weight.shape
    dtype = str(input.dtype).removeprefix("torch.")
    if precision(input) == "tf32":
        dtype = "tfloat32"
    return ConvProblem(
        N, C, H, W, K, R, S, tuple(stride), tuple(padding), tuple(dilation), groups, dtype,
        residual, None if pool is None else tuple(pool),
    )  # fmt: skip


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    activation: str,
    tile: Tile | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """Launches the kernel for a convolution; see `reference.conv_bn_act` for what it computes.

    Args:
        input: (N, C, H, W), float16, bfloat16 or float32. Copied to channels_last if it is not.
        weight: (K, C / groups, R, S), the input's dtype. Copied likewise.
        running_mean: (K,), any floating dtype, as are the other parameters.
        running_var: see `running_mean`.
        bn_weight: see `running_mean`.
        bn_bias: see `running_mean`.
        eps: added to `running_var`.
        bias: see `running_mean`.
        stride: of the convolution, as are `padding`, `dilation` and `groups`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: see `stride`.
        residual: (N, K, P, Q) with any strides, or with fewer channels: see
            `reference.pad_channels`.
        activation: "relu" or "none".
        tile: how to cut the problem up; None asks `tuning`.
        table: (3, C) as `training_conv.table_of` makes it, of a batch norm that the input, and
            then through a ReLU, goes through first; for the kernel "conv" of one group.

    Returns:
        (N, K, P, Q) in the memory format `conv2d` would give it.
    """
    problem = problem_of(input, weight, stride, padding, dilation, groups, residual is not None)
    tile = tile_for(problem, _chosen_tile(problem, input.device) if tile is None else tile)
    N, C, H, W = input.shape
    K, group_c, R, S = weight.shape
    P, Q = problem_size(H, W, R, S, stride, padding, dilation)
    output = input.new_empty((N, P, Q, K))
    M = N * P * Q
    if M == 0:
        return _as_conv2d_would(output, input, weight)
    pixels, filters = _channels_last(input), _filters(weight)
    kernel = kernel_for(problem)
    if kernel == "row" and pixels.stride(3) != C:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    common = {
        "RESIDUAL_CHANNELS": None if residual is None else _residual_channels(residual, output),
        "RELU": activation == "relu",
    }
    tiled = {
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
        "BAND": _BAND,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    parameters = (running_mean, running_var, bn_weight, bn_bias, bias)
    wide = _is_wide(pixels, filters, output, residual)
    rows = triton.cdiv(M, tile.block_m)
    geometry = ((P, Q), (R, S), stride, padding, dilation)
    partly = {"input_ptr": functools.partial(launches.addressed, input.shape, *geometry)}
    launch = functools.partial(_launch, input)

    if kernel == "packed":
        in_tile = tile.block_n // (K // groups)
        block_k = max(16, triton.next_power_of_2(in_tile * group_c))
        launch(
            conv_kernels.packed_conv_kernel,
            (rows * triton.cdiv(groups, in_tile),),
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
        launch(
            conv_kernels.row_conv_kernel,
            (rows * triton.cdiv(K, tile.block_n),),
            (
                pixels, filters, *parameters, residual, output, eps, M, H, W, P, Q, K,
                pixels.stride(0), pixels.stride(2), *residual_strides,
            ),
            partly=partly,
            C=C,
            SKEW=_skew(input, stride, padding),
            WIDE=wide,
            BLOCK_K=_row_block(S * C),
            **tiled,
        )  # fmt: skip
    else:
        split_k = _shares(tile, R * S * triton.cdiv(group_c, tile.block_k))
        partial = None
        if split_k > 1:
            partial = input.new_empty((split_k, M, K), dtype=torch.float32)
            wide = wide or partial.numel() >= 2**31
        group_k = K // groups
        pointwise = R * S == 1 and max(padding) == 0
        launch(
            conv_kernels.conv_kernel,
            (rows * groups * triton.cdiv(group_k, tile.block_n), split_k),
            (
                pixels, filters, *parameters, residual, output, partial, table, eps, M, H, W, P, Q,
                group_c, group_k, groups, pixels.stride(0), pixels.stride(2), pixels.stride(3),
                *residual_strides,
            ),
            writes=("output_ptr",) if partial is None else ("partial_ptr",),
            partly=partly if partial is None else partly | _UNTOUCHED,
            DILATION_W=dilation[1],
            DENSE_ROWS=pointwise and max(stride) == 1 and _has_dense_rows(pixels),
            EVEN_C=group_c % tile.block_k == 0,
            WIDE=wide,
            BLOCK_K=tile.block_k,
            SPLIT_K=split_k,
            PROLOGUE="none" if table is None else "norm",
            **tiled,
        )  # fmt: skip
        if partial is not None:
            sum_partials(
                input, partial, parameters[:4], bias, eps, output, wide, residual,
                activation == "relu",
            )  # fmt: skip
    return _as_conv2d_would(output, input, weight)


def sum_partials(
    input: Tensor,
    partial: Tensor,
    norm: Sequence[Tensor | None],
    bias: Tensor | None,
    eps: float,
    output: Tensor,
    wide: bool,
    residual: Tensor | None = None,
    relu: bool = True,
) -> None:
    """Launches the second pass of a sum that several programs shared.

    Args:
        input: any tensor of the first pass.
        partial: (shares, N P Q, K), float32.
        norm: mean, variance, weight and bias.
        bias: the convolution's.
        eps: of the norm.
        output: (N, P, Q, K), which this writes.
        wide: whether some offset does not fit into 31 bits.
        residual: (N, K, P, Q) with any strides, or None.
        relu: whether there is one.
    """
    split_k, M, K = partial.shape
    _, P, Q, _ = output.shape
    residual_strides = (0, 0, 0, 0) if residual is None else residual.stride()
    _launch(
        input,
        conv_kernels.sum_partials_kernel,
        (triton.cdiv(M, _SUM_BLOCK[0]), triton.cdiv(K, _SUM_BLOCK[1])),
        (partial, *norm, bias, residual, output, eps, M, P, Q, K, *residual_strides),
        RESIDUAL_CHANNELS=None if residual is None else _residual_channels(residual, output),
        RELU=relu,
        WIDE=wide,
        BLOCK_M=_SUM_BLOCK[0],
        BLOCK_N=_SUM_BLOCK[1],
        SPLIT_K=split_k,
        num_warps=_SUM_WARPS,
    )


def conv_bn_act_max_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    tile: Tile | None = None,
) -> Tensor:
    """A stem and its 3x3 max-pool of stride 2 and padding 1 in one launch.

    `kernel_for` says "stem_pool" of what it takes; its arguments are those of `conv_bn_act`.

    Returns:
        (N, K, pooled P, pooled Q) in the memory format `conv2d` would give it.
    """
    problem = problem_of(input, weight, stride, padding, dilation, 1, False, USUAL_POOL)
    tile = tile_for(problem, _chosen_tile(problem, input.device) if tile is None else tile)
    N, C, H, W = input.shape
    K, _, R, S = weight.shape
    P, Q = problem_size(H, W, R, S, stride, padding, dilation)
    pooled_P, pooled_Q = (P - 1) // 2 + 1, (Q - 1) // 2 + 1
    output = input.new_empty((N, pooled_P, pooled_Q, K))
    columns = N * pooled_Q
    if columns == 0:
        return _as_conv2d_would(output, input, weight)
    pixels, filters = _channels_last(input), _filters(weight)
    if pixels.stride(3) != C:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    strips = triton.cdiv(columns, tile.block_m)
    channel_tiles = triton.cdiv(K, tile.block_n)
    programs = _hint(strips) * channel_tiles * _hint(pooled_P)
    rows_each = pooled_rows_each(programs)
    _launch(
        input,
        conv_kernels.stem_pool_kernel,
        (strips, triton.cdiv(pooled_P, rows_each), channel_tiles),
        (
            pixels, filters, running_mean, running_var, bn_weight, bn_bias, bias, output, eps, N, H,
            W, P, Q, K, pooled_P, pooled_Q, rows_each, pixels.stride(0), pixels.stride(2),
        ),
        partly={
            "input_ptr": functools.partial(
                launches.addressed, input.shape, (P, Q), (R, S), stride, padding, dilation
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
        SKEW=_skew(input, stride, padding),
        RELU=activation == "relu",
        PRECISION=precision(input),
        WIDE=_is_wide(pixels, filters, output, None),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=_row_block(S * C),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return _as_conv2d_would(output, input, weight)


def problem_size(
    H: int,
    W: int,
    R: int,
    S: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(P, Q) of a convolution; unlike `ConvProblem`'s they may be symbolic."""
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    return P, Q


def _launch(
    input: Tensor,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    writes: Sequence[str] = ("output_ptr",),
    partly: Mapping[str, Callable[[], int]] = MappingProxyType({}),
    **constants: Any,
) -> None:
    """Launches a kernel on the input's device and that device's current stream.

    Args:
        input: any of its tensors.
        kernel: what to launch.
        grid: how many programs.
        arguments: those that are no constants, in order.
        writes: the names of those that the kernel writes to; see `launch.report`.
        partly: see `launch.report`.
        constants: arguments that are compiled in, and the number of warps and stages.
    """
    if not launches.report(
        kernel.fn.__name__, dict(zip(kernel.arg_names, arguments, strict=False)), writes, partly
    ):
        return
    constants |= _dependence(input, kernel)
    if type(input) not in (Tensor, Parameter):
        # In graphs a kernel is called with all of its arguments.
        for name, parameter in inspect.signature(kernel.fn).parameters.items():
            if parameter.default is not parameter.empty:
                constants.setdefault(name, parameter.default)
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
    elif input.device.type == "cuda" and input.device.index != torch.cuda.current_device():
        with torch.cuda.device(input.device):
            kernel[grid](*arguments, **constants)
    else:
        kernel[grid](*arguments, **constants)


def _dependence(input: Tensor, kernel: Any) -> dict[str, bool]:
    """The constants of a launch in a row, with which it may begin before the one before ends.

    The first of a row waits for all before it, as any launch does, but lets the next one begin.
    See `conv_kernels.py` for what the kernels do about it.
    """
    place = launches.next_in_row()
    if place is None or not _can_depend(input) or "DEPENDENT" not in kernel.arg_names:
        return {}
    return {"DEPENDENT": True, "launch_pdl": place > 0}


def _can_depend(input: Tensor) -> bool:
    """Whether a device's launches may overlap."""
    if input.device.type != "cuda":
        return False
    major, _ = _capability(input.device.index)
    return major in chain.OVERLAPPING


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _hint(size: int | torch.SymInt) -> int:
    """A size as a number; of a symbolic one, an example, on which nothing may depend but speed."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return 1 if hint is None else int(hint)
    return size


def _shares(tile: Tile, steps: int) -> int:
    """`split_k` without shares that would have no step of the sum."""
    if tile.split_k == 1:
        return 1
    return triton.cdiv(steps, triton.cdiv(steps, min(tile.split_k, steps)))


def _skew(input: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    """See `row_conv_kernel`: 1 where that makes the offsets of 16-bit values even."""
    C = input.size(1)
    return int(input.element_size() == 2 and stride[1] * C % 2 == 0 and padding[1] * C % 2 == 1)


def _row_block(length: int) -> int:
    return max(16, triton.next_power_of_2(length + 1))


def _channels_last(input: Tensor) -> Tensor:
    """`input` with channels next to each other, copied if need be."""
    if input.stride(1) == 1 or input.size(1) == 1:
        return input
    return input.contiguous(memory_format=torch.channels_last)


def _filters(weight: Tensor) -> Tensor:
    """`weight` as (K, R, S, C / groups) without gaps, copied if need be."""
    return weight.permute(0, 2, 3, 1).contiguous()


def _residual_channels(residual: Tensor, output: Tensor) -> int | None:
    """How many channels it has, None if it has the strides and channels of the output.

    That is (N, P, Q, K) and dense, the residual (N, K, P, Q).
    """
    alike = residual.size(1) == output.size(3) and residual.permute(0, 2, 3, 1).is_contiguous()
    return None if alike else residual.size(1)


def _has_dense_rows(pixels: Tensor) -> bool:
    """Whether pixel after pixel, row after row and image after image is one stride apart."""
    N, _, H, W = pixels.shape
    return (H == 1 or pixels.stride(2) == W * pixels.stride(3)) and (
        N == 1 or pixels.stride(0) == H * W * pixels.stride(3)
    )


def _is_wide(*tensors: Tensor | None) -> bool:
    """Whether some element is 2^31 or more elements away from its tensor's first."""
    for tensor in tensors:
        if tensor is None:
            continue
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        # Rows above an image and past the last tile are counted on, though not read.
        if last + 2**24 >= 2**31:
            return True
    return False


def _as_conv2d_would(output: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """(N, P, Q, K) as (N, K, P, Q) in the memory format of `conv2d`'s output."""
    output = output.permute(0, 3, 1, 2)
    if any(suggest_memory_format(t) is torch.channels_last for t in (input, weight)):
        return output
    return output.contiguous()
