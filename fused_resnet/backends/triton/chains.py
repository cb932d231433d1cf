"""How residual blocks become launches: chains where `tuning` chose them, else convolutions."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from ... import tuning
from ...layers.memory import lies_channels_last
from ...tuning import chain
from ...tuning.choice import (
    CHAIN,
    CHAIN_WITHOUT_NEXT,
    CHAINED,
    HOPPER_CHAINS,
    PAIR,
    Choice,
    Tile,
)
from ...tuning.problem import ChainProblem
from .. import hopper_chains
from ..self_check import settled
from . import bottleneck, checks, folded, launch
from .inference import conv_bn_act
from .problem import run_chosen

if TYPE_CHECKING:
    from ...layers.description import Block, ConvNorm

# For the interpreter, whose time goes by the number of operations.
_INTERPRETED_TILE = Tile(128, 256, 256, 1, 4, 1)


def residual_blocks(input: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """Residual blocks in as few launches as `tuning` finds fastest; see `ops.residual_blocks`.

    A chain begins at a Bottleneck's 3x3 and ends behind the next block's first 1x1, in the next
    stage too; see `tuning.chain.problems_of` for what it takes. All else runs convolution by
    convolution.

    Returns:
        None where there is no chain at all and nothing to share, or something does not fit
        together: convolution by convolution the reason comes out.
    """
    has_chain = any(chain.has_chain(block) for block in blocks)
    if not has_chain and len(blocks) == 1:
        return None
    problems = chain.problems_of(input, blocks)
    if problems is None:
        return None
    choices = [None if one is None else choose(one, input.device) for one in problems]
    kernels = CHAINED + HOPPER_CHAINS
    chained = any(choice is not None and choice.kernel in kernels for choice in choices)
    overlaps = has_chain and _overlaps(input)
    if not chained and not overlaps and len(blocks) == 1:
        return None
    with row(input) if overlaps else contextlib.nullcontext(), together(input, blocks):
        return _run_all(input, blocks, problems, choices)


def together(input: Tensor, blocks: Sequence[Block]) -> AbstractContextManager[None]:
    """What launches of several blocks share; of a single one it would not pay."""
    if len(blocks) == 1 or input.numel() == 0:
        return contextlib.nullcontext()
    if not checks.trusts_folding(blocks[0].layers[0].norm.mean):
        return contextlib.nullcontext()
    return folded.shared(input, [layer for block in blocks for layer in block.layers])


def row(input: Tensor) -> AbstractContextManager[None]:
    """What launches of blocks run in: a row, where there are so few images that it pays."""
    return launch.in_a_row() if _overlaps(input) else contextlib.nullcontext()


def _overlaps(input: Tensor) -> bool:
    return input.size(0) <= chain.OVERLAPPED_IMAGES


def _run_all(
    input: Tensor,
    blocks: Sequence[Block],
    problems: Sequence[ChainProblem | None],
    choices: Sequence[Choice | None],
) -> Tensor:
    """All blocks, each as chosen; the output in the format that convolutions would hand on."""
    x, reduced = input, None
    for index, block in enumerate(blocks):
        main, projection = block.main, block.projection
        if reduced is None:
            reduced = conv_bn_act(x, main[0], None, "relu")
        problem, choice = problems[index], choices[index]
        if problem is None or choice is None:
            x, reduced = _convolutions(reduced, x, main[1:], projection), None
            continue
        following = blocks[index + 1].layers[0] if problem.next_width else None
        rest = (*main[1:], projection, following)
        chained = functools.partial(run, reduced, x, rest, problem)
        x, reduced = run_chosen(problem, input.device, choice, chained)
    return x if lies_channels_last(input, blocks) else x.contiguous()


def run(
    reduced: Tensor,
    x: Tensor,
    layers: Sequence[ConvNorm | None],
    problem: ChainProblem,
    choice: Choice,
) -> tuple[Tensor, Tensor | None]:
    """A block from its second convolution on, as chosen.

    Args:
        reduced: the output of its first convolution.
        x: its input.
        layers: its 3x3, its last 1x1, its projection or None, and the next block's first
            convolution or None.
        problem: what `tuning` calls it.
        choice: how to run it.

    Returns:
        Its output, and where the choice is a chain with the next block's convolution, that one's.
    """
    wide, expand, projection, following = layers
    assert wide is not None
    assert expand is not None
    if choice.kernel in HOPPER_CHAINS:
        chained = hopper_chains.run(reduced, x, layers, problem, choice, conv_bn_act)
        if chained is not None:
            return chained
    where = (launch.open_row.get() is None, folded.current.get() is None)
    if choice.kernel not in CHAINED or not (
        settled.get((problem, choice, where, reduced.device))
        or checks.trusts_chain(problem, reduced, choice, sys.modules[__name__])
    ):
        return _convolutions(reduced, x, (wide, expand), projection), None
    if choice.kernel == CHAIN_WITHOUT_NEXT:
        following = None
    assert choice.tile is not None
    tile = tile_for(problem, choice.tile)
    if choice.kernel == PAIR:
        hidden = conv_bn_act(reduced, wide, None, "relu")
        return bottleneck.bottleneck(hidden, x, None, expand, projection, following, tile)
    return bottleneck.bottleneck(reduced, x, wide, expand, projection, following, tile)


def _convolutions(
    out: Tensor, x: Tensor, layers: Sequence[ConvNorm], projection: ConvNorm | None
) -> Tensor:
    """A block behind its first convolution, one convolution after the other."""
    shortcut = x if projection is None else conv_bn_act(x, projection, None, "none")
    for layer in layers[:-1]:
        out = conv_bn_act(out, layer, None, "relu")
    return conv_bn_act(out, layers[-1], shortcut, "relu")


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
