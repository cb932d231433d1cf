"""The tiles a convolution may run with, and the one to take without measurements."""

from __future__ import annotations

import functools

from .problem import ConvProblem, Tile

# block_m, block_n, block_k, num_warps, num_stages of 16-bit operands.
_SHAPES_16 = (
    (64, 32, 64, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 128, 64, 4, 3),
    (128, 32, 64, 4, 4),
    (128, 64, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 256, 64, 8, 3),
    (64, 64, 32, 4, 4),
    (128, 64, 32, 4, 4),
)
_SHAPES_32 = tuple((m, n, max(16, k // 2), w, s) for m, n, k, w, s in _SHAPES_16)
_SHAPES_PLAIN = ((64, 32, 16, 4, 3), (64, 64, 16, 4, 3), (64, 64, 16, 8, 3))
_SPLITS = (1, 2, 4, 8, 16)
_MULTIPROCESSORS = 132


def candidates(problem: ConvProblem) -> list[Tile]:
    """Every tile `best` may pick for a problem."""
    shapes = {"float32": _SHAPES_PLAIN, "tfloat32": _SHAPES_32}.get(problem.dtype, _SHAPES_16)
    return [Tile(m, n, k, s, w, g) for m, n, k, w, g in shapes for s in _SPLITS]


@functools.lru_cache(maxsize=4096)
def best(problem: ConvProblem) -> Tile:
    """The candidate with the least work on the busiest multiprocessor, larger tiles first."""
    M = problem.N * problem.P * problem.Q
    group_c, group_k = problem.C // problem.groups, problem.K // problem.groups

    def cost(tile: Tile) -> tuple[float, int]:
        steps = problem.R * problem.S * -(-group_c // tile.block_k)
        programs = -(-M // tile.block_m) * -(-group_k // tile.block_n) * problem.groups
        waves = -(-programs * tile.split_k // _MULTIPROCESSORS)
        work = (tile.block_m + tile.block_n) * tile.block_k * -(-steps // tile.split_k)
        again = tile.block_m * tile.block_n * (1 if tile.split_k == 1 else 8)
        return waves * (work + again), -tile.block_m * tile.block_n

    return min(candidates(problem), key=cost)
