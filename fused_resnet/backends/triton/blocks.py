"""How residual blocks become launches: chains where `tuning` chose them, else convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor
from torch._prims_common import suggest_memory_format

from ... import tuning
from ...tuning import chain
from ...tuning.problem import CHAIN, CHAINED, ChainProblem, Choice, Tile
from . import bottleneck, conv_bn_act

if TYPE_CHECKING:
    from ...ops.residual_blocks import BlockLayers

# For the interpreter, whose time goes by the number of operations.
_INTERPRETED_TILE = Tile(128, 256, 256, 1, 4, 1)


def residual_blocks(input: Tensor, blocks: Sequence[BlockLayers]) -> Tensor | None:
    """Residual blocks in as few launches as `tuning` finds fastest; see `ops.residual_blocks`.

    A chain begins at a Bottleneck's 3x3 and ends behind the next block's first 1x1, in the next
    stage too; see `tuning.chain.problems_of` for what it takes. All else runs convolution by
    convolution.

    Returns:
        None where there is no chain at all, or something does not fit together: convolution by
        convolution the reason comes out.
    """
    if not any(chain.has_chain(*block) for block in blocks):
        return None
    problems = chain.problems_of(input, blocks)
    if problems is None:
        return None
    choices = [None if one is None else choose(one, input.device) for one in problems]
    if not any(choice is not None and choice.kernel in CHAINED for choice in choices):
        return None
    channels_last = suggest_memory_format(input) is torch.channels_last
    x, reduced = input, None
    for index, (layers, has_projection) in enumerate(blocks):
        main = layers[:-1] if has_projection else layers
        projection = layers[-1] if has_projection else None
        # The format that convolutions would hand on.
        channels_last |= any(
            suggest_memory_format(layer[0]) is torch.channels_last for layer in main
        )
        if reduced is None:
            reduced = conv_bn_act(x, *main[0], None, "relu")
        problem, choice = problems[index], choices[index]
        if choice is None or choice.kernel not in CHAINED:
            shortcut = x
            if projection is not None:
                shortcut = conv_bn_act(x, *projection, None, "none")
            for layer in main[1:-1]:
                reduced = conv_bn_act(reduced, *layer, None, "relu")
            x, reduced = conv_bn_act(reduced, *main[-1], shortcut, "relu"), None
            continue
        following = None
        if choice.kernel == CHAIN and problem.next_width > 0:
            following = blocks[index + 1][0][0]
        x, reduced = bottleneck.bottleneck(
            reduced, x, main[1], main[2], projection, following, tile_for(problem, choice.tile)
        )
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
        block_n=min(tile.block_n, chain.power_in(problem.K)),
        block_k=min(tile.block_k, chain.power_in(depth)),
    )
