"""Whether norms of a training step pay at a convolution's ends, and with which tile.

The convolution's time is `estimate.predicted`'s. What a prologue computes of every value that a
program loads is taken to overlap with nothing; what the epilogue saves are passes over whole
tensors at copy bandwidth, each with its launch. Against it stands the library's convolution, as
fast as the best tile, with passes of their own around it.
"""

from __future__ import annotations

import math

from . import compiler, estimate
from .architecture import Architecture
from .choice import Tile
from .problem import ConvProblem

DTYPES = ("float16", "bfloat16")
# None of these spills with the ends it is for, but for what `backward` leaves out.
TILES = {
    "none": (Tile(64, 64, 64, 1, 4, 3), Tile(128, 64, 64, 1, 4, 3), Tile(128, 128, 64, 1, 8, 3)),
    "norm": (Tile(64, 64, 64, 1, 4, 3), Tile(128, 64, 64, 1, 4, 3), Tile(128, 128, 64, 1, 8, 3)),
    "gradient": (Tile(64, 64, 64, 1, 4, 3),),
}
# Instructions for each value loaded: conversions, the norm (its gradient), ReLU.
_PROLOGUE_INSTRUCTIONS = {"none": 0, "norm": 6, "gradient": 8}
_LANES = 128  # of a multiprocessor
# Partial sums of a tile and channel, bytes, written and read.
_STATISTICS_BYTES, _SUMS_BYTES = 2 * 12, 2 * 8


@compiler.cached(maxsize=4096)
def forward(
    problem: ConvProblem,
    prologue: bool,
    gpu: Architecture,
    left_out: frozenset[Tile | None] = frozenset(),
) -> tuple[Tile | None, float]:
    """The tile for a convolution and its output's statistics, and the seconds that saves.

    Args:
        problem: the convolution.
        prologue: whether its input has still to be normalised and rectified.
        gpu: where it runs.
        left_out: tiles that turned out not to run.

    Returns:
        None and 0 where passes of their own are as fast.
    """
    kind = "norm" if prologue else "none"
    tile, fused = _fastest(problem, kind, _STATISTICS_BYTES, gpu, left_out)
    apart = estimate.predicted_convolution(problem, gpu) + _passes(problem.output_bytes, 1, gpu)
    if prologue:
        apart = min(apart, _fastest(problem, "none", _STATISTICS_BYTES, gpu)[1])
        apart += _passes(problem.input_bytes, 2, gpu)
        fused += estimate.LAUNCH
    return (tile, apart - fused) if fused < apart else (None, 0.0)


@compiler.cached(maxsize=4096)
def backward(
    problem: ConvProblem,
    above: bool,
    below: bool,
    gpu: Architecture,
    left_out: frozenset[Tile | None] = frozenset(),
) -> tuple[Tile | None, float]:
    """The tile for a transposed convolution of stride 1, and the seconds that its ends save.

    Args:
        problem: the convolution that it is, with `residual` where its result is added to something.
        above: whether the last pass of the norm before it is its prologue.
        below: whether a ReLU's mask and the sums of a norm's gradient are in its epilogue.
        gpu: where it runs.
        left_out: tiles that turned out not to run.

    Returns:
        None and 0 where passes of their own are as fast.
    """
    if above and gpu.capability[0] == 12 and problem.dtype == "bfloat16":
        return None, 0.0  # whose tile spills 8 bytes there
    of_input, of_output = problem.input_bytes, problem.output_bytes
    tile, fused = _fastest(
        problem, "gradient" if above else "none", _SUMS_BYTES if below else 0, gpu, left_out
    )
    apart = estimate.predicted_convolution(problem, gpu)
    if problem.residual:
        apart += _passes(of_output, 3, gpu)
    if above:
        apart += _passes(of_input, 3, gpu)
        fused += _passes(of_input, 2, gpu)
    if below:
        apart += _passes(of_output, 2, gpu)
        fused += _passes(of_output, 1, gpu)
    return (tile, apart - fused) if fused < apart else (None, 0.0)


def _fastest(
    problem: ConvProblem,
    prologue: str,
    partial_bytes: int,
    gpu: Architecture,
    left_out: frozenset[Tile | None] = frozenset(),
) -> tuple[Tile | None, float]:
    """The best tile and its seconds; None and infinity where all are left out."""
    timed = (
        (tile, _seconds(problem, prologue, partial_bytes, gpu, tile))
        for tile in TILES[prologue]
        if tile not in left_out
    )
    return min(timed, key=lambda pair: pair[1], default=(None, math.inf))


def _seconds(
    problem: ConvProblem, prologue: str, partial_bytes: int, gpu: Architecture, tile: Tile
) -> float:
    pixels = problem.N * problem.P * problem.Q
    partial = partial_bytes * problem.K * -(-pixels // tile.block_m)
    loaded = pixels * problem.R * problem.S * problem.C * -(-problem.K // tile.block_n)
    instructions = _PROLOGUE_INSTRUCTIONS[prologue] * loaded
    return (
        estimate.predicted(problem, gpu, tile)
        + partial / gpu.copy_bandwidth
        + instructions / (_LANES * gpu.multiprocessors * gpu.clock)
    )


def _passes(size: int, count: int, gpu: Architecture) -> float:
    """One launch that goes `count` times through a tensor."""
    return count * size / gpu.copy_bandwidth + estimate.LAUNCH
