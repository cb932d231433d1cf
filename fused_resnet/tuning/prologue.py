"""Whether a norm and ReLU pay in the loads of the convolution behind them, and with which tile.

The convolution's time is `estimate.predicted`'s. What the norm computes of every value that a
program loads is taken to overlap with nothing: each value is loaded by `ceil(K / block_n)` columns
of programs, once for every tap of the filter. Against it stands a pass of its own, which reads and
writes the whole input, and the convolution with its best tile.
"""

from __future__ import annotations

from . import compiler, estimate
from .architecture import Architecture
from .choice import Tile
from .problem import ConvProblem

DTYPES = ("float16", "bfloat16")
TILES = (Tile(64, 64, 64, 1, 4, 3), Tile(128, 64, 64, 1, 4, 3), Tile(128, 128, 64, 1, 8, 3))
# Instructions for each value loaded: two conversions, the norm, ReLU, padding.
_INSTRUCTIONS = 6
_LANES = 128  # of a multiprocessor


def takes(problem: ConvProblem) -> bool:
    """Whether there is a kernel: "conv", of one group, on 16-bit values."""
    return (
        problem.dtype in DTYPES
        and problem.groups == 1
        and problem.pool is None
        and estimate.kernel_for(problem) == "conv"
    )


def tiles(gpu: Architecture) -> list[Tile]:
    """Those of `TILES` that do not spill on a GPU."""
    major = gpu.capability[0]
    spilled = compiler.current("conv", major).prologue
    return [
        tile
        for tile in TILES
        if (major, tile.block_m, tile.block_n, tile.block_k, tile.num_warps) not in spilled
    ]


@compiler.cached(maxsize=4096)
def choose(problem: ConvProblem, gpu: Architecture) -> tuple[Tile | None, float]:
    """The tile for a convolution with the norm in its loads, and the seconds that this saves.

    Args:
        problem: the convolution.
        gpu: where it runs.

    Returns:
        None and 0 where a pass of its own is predicted to be as fast, or there is no kernel.
    """
    if not takes(problem) or problem.N * problem.P * problem.Q == 0:
        return None, 0.0
    best = estimate.best(problem, gpu)
    apart = estimate.predicted(problem, gpu, best) + estimate.LAUNCH
    apart += 2 * problem.input_bytes / gpu.copy_bandwidth
    fitting = [tile for tile in tiles(gpu) if estimate.fits(problem, gpu, tile)]
    if not fitting:
        return None, 0.0
    tile = min(fitting, key=lambda one: predicted(problem, gpu, one))
    fused = predicted(problem, gpu, tile)
    return (tile, apart - fused) if fused < apart else (None, 0.0)


def predicted(problem: ConvProblem, gpu: Architecture, tile: Tile) -> float:
    """Seconds for the convolution with the norm, and for the launch that makes its table."""
    pixels = problem.N * problem.P * problem.Q
    loaded = pixels * problem.R * problem.S * problem.C * -(-problem.K // tile.block_n)
    computed = _INSTRUCTIONS * loaded / (_LANES * gpu.multiprocessors * gpu.clock)
    return estimate.predicted(problem, gpu, tile) + computed + estimate.LAUNCH
