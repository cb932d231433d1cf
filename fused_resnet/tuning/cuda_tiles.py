"""The tiles of the CUDA convolution: its instances, as csrc/cuda/conv_tiles.h lists them.

They are a `Tile` here, as Triton's are; which of them can run a problem, and the order they are
likely to be fast in, is csrc/cuda/conv_heuristics.cpp's to say.
"""

from __future__ import annotations

import functools

import torch

from .. import _native
from .architecture import Architecture
from .choice import Tile
from .problem import ConvProblem

# In the order of Products in csrc/cuda/conv_tiles.h.
_PRODUCTS = {"float16": 0, "bfloat16": 0, "tfloat32": 1, "float32": 2}


def candidates(problem: ConvProblem, architecture: Architecture) -> list[Tile]:
    """The tiles that can run a problem on a GPU, the likely fastest first.

    None where the kernels are not loaded, or not for this problem (a pool runs by itself).
    """
    if _native.cuda_operators is None or problem.pool is not None:
        return []
    products = _PRODUCTS[problem.dtype]
    pixels = problem.N * problem.P * problem.Q
    taps = problem.R * problem.S
    numbers = _native.cuda_operators.conv_tiles_for(
        [pixels, problem.C, problem.K, taps, problem.groups, products],
        [
            architecture.multiprocessors,
            architecture.shared_per_block,
            architecture.shared_per_multiprocessor,
            max(1, int(architecture.copy_bandwidth / architecture.clock)),
        ],
    )
    shapes = {index: shape for shape, index in instances(products).items()}
    found = []
    for index, split in zip(numbers[::2], numbers[1::2], strict=True):
        m, n, k, warps, stages = shapes[index]
        found.append(Tile(m, n, k, split, warps, stages))
    return found


def index(tile: Tile, dtype: torch.dtype, tf32: bool) -> int:
    """Where a tile is in csrc/cuda/conv_tiles.h."""
    name = "tfloat32" if tf32 else str(dtype).removeprefix("torch.")
    shape = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)
    return instances(_PRODUCTS[name])[shape]


@functools.cache
def instances(products: int) -> dict[tuple[int, ...], int]:
    """Indices of the instances for one kind of products, by sizes, warps and stages."""
    assert _native.cuda_operators is not None
    numbers = _native.cuda_operators.conv_tiles()
    rows = [numbers[at : at + 7] for at in range(0, len(numbers), 7)]
    return {tuple(row[2:]): index for index, row in enumerate(rows) if row[0] == products}
