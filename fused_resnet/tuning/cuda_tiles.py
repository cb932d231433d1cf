"""The tiles of the CUDA convolutions: their instances, as csrc/cuda/conv_tiles.h lists them.

They are a `Tile` here, as Triton's are; which of them can run a problem, and the order they are
likely to be fast in, is csrc/cuda/conv_heuristics.cpp's to say.

Those of the convolution for Hopper (csrc/cuda/hopper/tiles.h) are tiles too, told from the others
by their warps: `block_m` pixels are a cluster's. Those of its Bottleneck chain
(csrc/cuda/hopper/bottleneck_tiles.h) are each for some channels. No GPU has measured any of them,
so nothing but a table that `tune` wrote on such a GPU names one.
"""

from __future__ import annotations

import functools

import torch

from .. import _native
from .architecture import Architecture
from .choice import HOPPER_CHAIN, HOPPER_CHAIN_WITHOUT_NEXT, MEASURED, Choice, Tile
from .problem import ChainProblem, ConvProblem

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
        _numbers_of(architecture),
    )
    shapes = {index: shape for shape, index in instances(products).items()}
    found = []
    for index, split in zip(numbers[::2], numbers[1::2], strict=True):
        m, n, k, warps, stages = shapes[index]
        found.append(Tile(m, n, k, split, warps, stages))
    return found


def _numbers_of(architecture: Architecture) -> list[int]:
    """A GPU as csrc/cuda/conv_heuristics.h knows one."""
    return [
        architecture.multiprocessors,
        architecture.shared_per_block,
        architecture.shared_per_multiprocessor,
        max(1, int(architecture.copy_bandwidth / architecture.clock)),
    ]


def predicted_stem(problem: ConvProblem, architecture: Architecture) -> float:
    """Seconds that csrc/cuda/conv_heuristics.cpp predicts for the usual stem and its pool."""
    assert _native.cuda_operators is not None
    size = [problem.N, problem.H, problem.W, problem.K]
    _, cycles = _native.cuda_operators.stem_rows_each(size, _numbers_of(architecture))
    return cycles / architecture.clock


# What TMA's maps and the kernel's shared memory allow (csrc/cuda/hopper/hopper_conv.cu).
_HOPPER = (9, 0)
_HOPPER_M, _HOPPER_ROW_BYTES, _HOPPER_WARPS = 128, 128, 12
_HOPPER_DTYPES = ("float16", "bfloat16", "tfloat32")
_MOST_FILTERS, _MOST_STRIDE, _MOST_OFFSET, _FARTHEST_CORNER = 2048, 8, 255, 127
_MOST_CHAIN_OUTPUTS, _MOST_PIXELS = 1024, 2**31 - 2**16


def hopper_candidates(problem: ConvProblem, architecture: Architecture) -> list[Tile]:
    """The tiles of the convolution for Hopper that can run a problem, the least wasteful first.

    None on another GPU, in float32 proper, and for what TMA cannot address.
    """
    if (
        _native.cuda_operators is None
        or architecture.capability != _HOPPER
        or problem.pool is not None
        or problem.dtype not in _HOPPER_DTYPES
        or problem.groups != 1
        or problem.C * problem.element_size % 16
        or problem.K * problem.element_size % 16
        or problem.K > _MOST_FILTERS
        or not _has_windows(problem)
    ):
        return []
    pixels = problem.N * problem.P * problem.Q

    def computed(tile: Tile) -> int:
        rows, columns = -(-pixels // tile.block_m), -(-problem.K // tile.block_n)
        return rows * tile.block_m * columns * tile.block_n

    depth = _HOPPER_ROW_BYTES // problem.element_size
    return sorted((t for t in hopper_instances() if t.block_k == depth), key=computed)


def _has_windows(problem: ConvProblem) -> bool:
    """Whether TMA can address what a convolution's filters see."""
    offsets = [
        dilation * (taps - 1)
        for dilation, taps in zip(problem.dilation, (problem.R, problem.S), strict=True)
    ]
    corners = zip(problem.padding, offsets, strict=True)
    return (
        max(problem.stride) <= _MOST_STRIDE
        and max(offsets) <= _MOST_OFFSET
        and all(max(pad, offset - pad - 1) <= _FARTHEST_CORNER for pad, offset in corners)
    )


def hopper_chains(problem: ChainProblem, architecture: Architecture) -> list[Choice]:
    """Every way to run a block by the Bottleneck chain for Hopper, with what follows it first."""
    kernels = [(HOPPER_CHAIN, problem)]
    if problem.next_width:
        kernels.append((HOPPER_CHAIN_WITHOUT_NEXT, problem.without_next()))
    return [
        Choice(kernel, tile, MEASURED)
        for kernel, part in kernels
        for tile in hopper_chain_tiles(part, architecture)
    ]


def hopper_chain_tiles(problem: ChainProblem, architecture: Architecture) -> list[Tile]:
    """The chain's tiles for a block; none on another GPU and for what TMA cannot address."""
    if (
        _native.cuda_operators is None
        or architecture.capability != _HOPPER
        or problem.K > _MOST_CHAIN_OUTPUTS
        or problem.N * problem.P * problem.Q > _MOST_PIXELS
        or not _has_windows(problem.convolution)
    ):
        return []
    tiles = hopper_chain_instances(problem.width, problem.next_width)
    return [tile for tile in tiles if problem.K % tile.block_n == 0]


@functools.cache
def hopper_chain_instances(width: int, next_width: int) -> dict[Tile, int]:
    """Indices of the instances in csrc/cuda/hopper/bottleneck_tiles.h for a block's channels.

    Of those that differ in nothing but the most channels that may follow, the one with the fewest.
    """
    assert _native.cuda_operators is not None
    numbers = _native.cuda_operators.hopper_bottleneck_tiles()
    found: dict[Tile, tuple[int, int]] = {}
    for place, at in enumerate(range(0, len(numbers), 6)):
        channels, most, columns, stages, cluster = numbers[at : at + 5]
        if channels != width or most < next_width:
            continue
        tile = Tile(_HOPPER_M * cluster, columns, _HOPPER_ROW_BYTES // 2, 1, _HOPPER_WARPS, stages)
        found[tile] = min(found.get(tile, (most, place)), (most, place))
    return {tile: place for tile, (_, place) in found.items()}


def is_hopper(tile: Tile | None) -> bool:
    """Whether a tile is one of the convolution for Hopper."""
    return tile is not None and tile.num_warps == _HOPPER_WARPS


@functools.cache
def hopper_instances() -> dict[Tile, int]:
    """Indices of the instances in csrc/cuda/hopper/tiles.h."""
    assert _native.cuda_operators is not None
    numbers = _native.cuda_operators.hopper_conv_tiles()
    found = {}
    for place, at in enumerate(range(0, len(numbers), 6)):
        size, n, stages, cluster = numbers[at : at + 4]
        depth = _HOPPER_ROW_BYTES // size
        tile = Tile(_HOPPER_M * cluster, n, depth, 1, _HOPPER_WARPS, stages)
        found[tile] = place
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
