"""How residual blocks become launches: chains where `tuning` chose them, else convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ... import checks, tuning
from ...tuning.problem import CHAIN, CHAINED, ChainProblem, Choice, Tile
from . import bottleneck, conv_bn_act

if TYPE_CHECKING:
    from ...ops.residual_blocks import BlockLayers

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# For the interpreter, whose time goes by the number of operations.
_INTERPRETED_TILE = Tile(128, 256, 256, 1, 4, 1)
# The tensor cores' least depth, and the widest that fits into registers.
_LEAST_CHANNELS, _WIDEST, _WIDEST_NEXT = 16, 512, 256


def residual_blocks(input: Tensor, blocks: Sequence[BlockLayers]) -> Tensor | None:
    """Residual blocks in as few launches as `tuning` finds fastest; see `ops.residual_blocks`.

    A chain begins at a Bottleneck's 3x3 and ends behind the next block's first 1x1, in the next
    stage too. It takes float16 and bfloat16, dense 3x3 convolutions of a power of two of channels
    from 16 to 512, and a next width of up to 256; all else runs convolution by convolution.

    Returns:
        None where there is no chain at all, or something does not fit together: convolution by
        convolution the reason comes out.
    """
    if input.dtype not in _DTYPES or not any(_has_chain(*block) for block in blocks):
        return None
    channels_last = suggest_memory_format(input) is torch.channels_last
    x, reduced = input, None
    for index, (layers, has_projection) in enumerate(blocks):
        main = layers[:-1] if has_projection else layers
        projection = layers[-1] if has_projection else None
        # The format eager convolutions would hand on.
        channels_last |= any(
            suggest_memory_format(layer[0]) is torch.channels_last for layer in main
        )
        if reduced is None:
            reduced = _convolution(x, main[0])
        if reduced is None:
            return None
        following = blocks[index + 1][0][0] if index + 1 < len(blocks) else None
        problem = chain_problem(reduced, x, main, projection, following)
        choice = None if problem is None else choose(problem, input.device)
        if choice is None or choice.kernel not in CHAINED:
            x, reduced = _convolutions(reduced, x, main[1:], projection), None
            if x is None:
                return None
            continue
        ends_next = choice.kernel == CHAIN and problem.next_width > 0
        x, reduced = bottleneck.bottleneck(
            reduced, x, main[1], main[2], projection, following if ends_next else None,
            tile_for(problem, choice.tile),
        )  # fmt: skip
    return x if channels_last else x.contiguous()


def choose(problem: ChainProblem, device: torch.device) -> Choice:
    """How a block runs: what `tuning` says, on a GPU; chained, where kernels are interpreted."""
    if device.type != "cuda":
        pixels = problem.N * problem.P * problem.Q
        block_m = min(_INTERPRETED_TILE.block_m, max(16, triton.next_power_of_2(pixels)))
        return Choice(CHAIN, replace(_INTERPRETED_TILE, block_m=block_m), "interpreted")
    return tuning.choose(problem, device)


def tile_for(problem: ChainProblem, tile: Tile) -> Tile:
    """`tile` with blocks that divide the problem's channels."""
    depth = problem.width
    if problem.projection is not None:
        depth |= problem.projection[0]
    return replace(
        tile,
        block_n=min(tile.block_n, _power_in(problem.K)),
        block_k=min(tile.block_k, _power_in(depth)),
    )


def chain_problem(
    reduced: Tensor,
    x: Tensor,
    main: Sequence[tuple],
    projection: tuple | None,
    following: tuple | None,
) -> ChainProblem | None:
    """A block from its second convolution on as `tuning` sees it, or None if it is no chain.

    Args:
        reduced: (N, width, H, W), the output of its first convolution.
        x: its input.
        main: its convolutions.
        projection: its shortcut's, or None.
        following: the next block's first convolution, or None.
    """
    if not _has_chain(main, False):
        return None
    _, convolution, expand = main
    N, width, H, W = reduced.shape
    stride, padding, dilation = convolution[7:10]
    K = expand[0].size(0)
    if convolution[0].size(0) != width or not _fits(reduced, reduced.shape, convolution):
        return None
    problem = ChainProblem(
        N, width, H, W, K, tuple(stride), tuple(padding), tuple(dilation), _DTYPES[reduced.dtype]
    )
    size = (problem.P, problem.Q)
    if not _fits(reduced, (N, width, *size), expand):
        return None
    if projection is None:
        if x.shape != (N, K, *size):
            return None
    else:
        C = x.size(1)
        if not (
            _is_pointwise(projection)
            and projection[0].size(0) == K
            and _power_in(C) >= _LEAST_CHANNELS
            and _fits(reduced, x.shape, projection)
        ):
            return None
        problem = replace(problem, projection=(C, *x.shape[2:], *projection[7]))
        if size != (problem.project.P, problem.project.Q) or x.size(0) != N:
            return None
    if following is None or not _is_pointwise(following) or max(following[7]) > 1:
        return problem
    next_width = following[0].size(0)
    if (
        not _is_power(next_width)
        or next_width > _WIDEST_NEXT
        or not _fits(reduced, (N, K, *size), following)
    ):
        return problem
    return replace(problem, next_width=next_width)


def _has_chain(layers: Sequence[tuple], has_projection: bool) -> bool:
    """Whether a block's weights are those of a Bottleneck that the kernel takes."""
    if len(layers) - has_projection != 3:
        return False
    _, convolution, expand = layers[:3]
    weight = convolution[0]
    width, group_width, *taps = weight.shape
    return (
        taps == [3, 3]
        and convolution[10] == 1
        and group_width == width
        and _is_power(width)
        and width <= _WIDEST
        and _is_pointwise(expand)
        and max(expand[7]) == 1
        and _power_in(expand[0].size(0)) >= _LEAST_CHANNELS
    )


def _is_pointwise(layer: tuple) -> bool:
    """Whether a convolution is a 1x1 without padding or groups."""
    *_, padding, _, groups = layer
    return layer[0].shape[2:] == (1, 1) and max(padding) == 0 and groups == 1


def _is_power(channels: int) -> bool:
    return channels >= _LEAST_CHANNELS and channels & (channels - 1) == 0


def _power_in(channels: int) -> int:
    """The largest power of two that divides a number of channels."""
    return channels & -channels


def _fits(like: Tensor, shape: Sequence[int], layer: tuple) -> bool:
    """Whether a layer takes an input of a shape, with the dtype and device of `like`."""
    input = like.new_empty(()).expand(shape)
    return checks.conv_error("conv_bn_act", input, *layer, None, "relu") is None


def _convolution(
    x: Tensor, layer: tuple, residual: Tensor | None = None, activation: str = "relu"
) -> Tensor | None:
    """`conv_bn_act` of this backend, or None where the arguments do not go together."""
    if checks.conv_error("conv_bn_act", x, *layer, residual, activation) is not None:
        return None
    return conv_bn_act(x, *layer, residual, activation)


def _convolutions(
    out: Tensor, x: Tensor, layers: Sequence[tuple], projection: tuple | None
) -> Tensor | None:
    """The rest of a block, behind its first convolution, one convolution after the other."""
    shortcut = x if projection is None else _convolution(x, projection, None, "none")
    if shortcut is None:
        return None
    for layer in layers[:-1]:
        out = _convolution(out, layer)
        if out is None:
            return None
    return _convolution(out, layers[-1], shortcut)
