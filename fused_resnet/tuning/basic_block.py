"""Whether one kernel should run both convolutions of a BasicBlock, with which tile.

The kernel is csrc/cuda/basic_block.cuh; docs/basic_block_chain.md says what it saves and costs. The
model of its time is that of `estimate.py`, but for what is particular to `mma.sync`, which is how
it multiplies:

- arithmetic: the tensor cores' rate for `mma.sync`, which on Hopper and datacenter Blackwell is
  less than what their own instructions reach (`_mma_rate`). Warps have whole rows of 16 pixels, the
  border's included, so the rows of the busiest warp count;
- shared memory: what `ldmatrix` loads for these products, 128 bytes a cycle: every row of pixels
  once a tap, the weights once a warp; and filling and emptying the tiles;
- L2: what the blocks load, weights and borders with repetition;
- memory: input and output once. A block loads its input before it multiplies, so where a
  multiprocessor holds one block alone this hides behind nothing;
- latency: a tap cannot take less than the way to the L2 cache, divided by the taps in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import _native
from ..layers import checks
from . import estimate
from .architecture import MATRIX_EFFICIENCY, Architecture
from .choice import BASIC_BLOCK, CONVOLUTIONS, ESTIMATE, MEASURED, Choice, Tile
from .problem import BasicBlockProblem

if TYPE_CHECKING:
    from ..layers.description import Block

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# csrc/cuda/basic_block.h, as is `Shape`.
CHANNELS, COLUMNS = 64, 14
_STAGE_CHANNELS = 64  # of a tap, that a stage of the ring of weights has
# Bytes a cycle that shared memory hands to a multiprocessor: 32 banks of 4.
_SHARED_BYTES_PER_CYCLE = 128
# The part of the tensor cores' published rate that mma.sync reaches, by compute capability; all
# of it on others, whose own instruction it is. 9: Luo et al., "Benchmarking and Dissecting the
# Nvidia Hopper GPU Architecture via Microbenchmarking", arXiv:2402.13499. 10: nothing is published;
# taken to be Ampere's products a cycle.
_MMA_SHARE = {9: 0.629, 10: 0.25}
# Seconds from asking for a tap's weights, which L2 has, to having them in shared memory.
_CACHE_LATENCY = 0.3e-6
_MOST_BLOCKS = 2**31 - 1


@dataclass(frozen=True)
class Shape:
    """An instance of the kernel.

    Attributes:
        rows: of output pixels in a block's tile, by `COLUMNS` columns.
        warps: of a block.
        stages: taps whose weights are in shared memory, or 64 channels of these.
        registers: of a thread, the most that any architecture takes.
        channels: of everything; others than `CHANNELS` are not built, only thought about.
    """

    rows: int
    warps: int
    stages: int
    registers: int
    channels: int = CHANNELS

    @property
    def input_bytes(self) -> int:
        """Of the input's tile, with a border of two."""
        return 2 * self.channels * (self.rows + 4) * (COLUMNS + 4)

    @property
    def middle_bytes(self) -> int:
        """Of the tile between the convolutions, with a border of one."""
        return 2 * self.channels * (self.rows + 2) * (COLUMNS + 2)

    @property
    def output_bytes(self) -> int:
        """Of the output's tile."""
        return 2 * self.channels * self.rows * COLUMNS

    @property
    def weight_bytes(self) -> int:
        """Of both convolutions."""
        return 2 * 2 * 9 * self.channels**2

    @property
    def shared_bytes(self) -> int:
        """Of a block: the input's tile, the one between, stages, scales and shifts."""
        ring = self.stages * 2 * self.channels * _STAGE_CHANNELS
        return self.input_bytes + self.middle_bytes + ring + 4 * self.channels * 4

    @property
    def tile(self) -> Tile:
        """As tables have it."""
        return Tile(self.rows * COLUMNS, CHANNELS, CHANNELS, 1, self.warps, self.stages)


# In the order of csrc/cuda/basic_block.h.
SHAPES = (
    Shape(14, 4, 4, 227),
    Shape(14, 8, 2, 156),
    Shape(28, 8, 3, 188),
    Shape(6, 4, 3, 160),
)
_BY_TILE = {shape.tile: shape for shape in SHAPES}


def problem_of(input: Tensor, blocks: Sequence[Block]) -> BasicBlockProblem | None:
    """What the kernel would do of a block, or None where it cannot: see `ops.residual_blocks`.

    It takes one block at a time, float16 and bfloat16, 64 channels, channels_last, two 3x3 of
    stride 1 and padding 1 without groups, and the input as the shortcut.
    """
    if len(blocks) != 1 or input.dtype not in DTYPES or input.dim() != 4:
        return None
    layers, has_projection, step, _ = blocks[0]
    N, C, H, W = input.shape
    if has_projection or step or len(layers) != 2 or C != CHANNELS or input.numel() == 0:
        return None
    least = SHAPES[-1]
    if N * -(-H // least.rows) * -(-W // COLUMNS) > _MOST_BLOCKS:
        return None
    for weight, norm, bias, stride, padding, dilation, groups in layers:
        if (
            weight.shape != (CHANNELS, CHANNELS, 3, 3)
            or any(tuple(pair) != (1, 1) for pair in (stride, padding, dilation))
            or groups != 1
            or any(t is not None and t.device != input.device for t in (weight, *norm[:4], bias))
        ):
            return None
    if suggest_memory_format(input) is not torch.channels_last:
        return None
    for layer, residual in zip(layers, (None, input), strict=True):
        if checks.conv_error("conv_bn_act", input, layer, residual, "relu") is not None:
            return None
    return BasicBlockProblem(N, C, H, W, DTYPES[input.dtype])


def index(tile: Tile) -> int:
    """Where a tile is in csrc/cuda/basic_block.h."""
    return SHAPES.index(_BY_TILE[tile])


def untuned(problem: BasicBlockProblem, gpu: Architecture) -> Choice:
    """What runs a block that no table has: the candidate that the model thinks fastest."""
    best = min(candidates(problem, gpu), key=lambda choice: predicted(problem, gpu, choice))
    return replace(best, source=ESTIMATE)


def candidates(problem: BasicBlockProblem, gpu: Architecture) -> list[Choice]:
    """Every way to run a block on a GPU, convolution by convolution first.

    That is the only one where the kernel is not loaded.
    """
    found = [Choice(CONVOLUTIONS, None, MEASURED)]
    if _native.cuda_operators is not None:
        found += [Choice(BASIC_BLOCK, tile, MEASURED) for tile in tiles(problem, gpu)]
    return found


def tiles(problem: BasicBlockProblem, gpu: Architecture) -> list[Tile]:
    """The tiles whose blocks fit on a GPU, the likely fastest first."""
    if problem.C != CHANNELS or gpu.capability < (8, 0):
        return []
    fitting = [shape.tile for shape in SHAPES if shape.shared_bytes <= gpu.shared_per_block]
    return sorted(fitting, key=lambda tile: predicted_launch(problem, gpu, tile))


def can_run(problem: BasicBlockProblem, gpu: Architecture, kernel: str, tile: Tile | None) -> bool:
    """Whether a choice is one of the candidates."""
    return Choice(kernel, tile, MEASURED) in candidates(problem, gpu)


def predicted(problem: BasicBlockProblem, gpu: Architecture, choice: Choice) -> float:
    """Seconds for a block by one choice.

    Its convolutions one by one are Triton's, which on Hopper are faster than CUDA's.
    """
    if choice.kernel == CONVOLUTIONS:
        return sum(
            estimate.predicted(part, gpu, estimate.best(part, gpu)) for part in problem.parts
        )
    assert choice.tile is not None
    return predicted_launch(problem, gpu, choice.tile)


def predicted_launch(problem: BasicBlockProblem, gpu: Architecture, tile: Tile) -> float:
    """Seconds for one launch of the kernel; see this module's docstring."""
    return predicted_shape(problem, gpu, _BY_TILE[tile])


def predicted_shape(problem: BasicBlockProblem, gpu: Architecture, shape: Shape) -> float:
    """Seconds for one launch, also of instances that are not built."""
    blocks = problem.N * -(-problem.H // shape.rows) * -(-problem.W // COLUMNS)
    if blocks == 0:
        return estimate.LAUNCH
    busiest = -(-blocks // gpu.multiprocessors)
    at_once = resident(shape, gpu)
    waves = -(-blocks // (gpu.multiprocessors * at_once))

    depth = 9 * shape.channels
    rows = sum(-(-rows // shape.warps) * shape.warps for rows in (shape.rows + 2, shape.rows))
    products = rows * (COLUMNS + 2) * shape.channels * depth
    matrix_loads = rows * (COLUMNS + 2) * 2 * depth + shape.warps * shape.weight_bytes
    filling = shape.input_bytes + shape.weight_bytes + shape.middle_bytes
    emptying = 3 * shape.output_bytes  # the residual is read, the output written and read
    shared = matrix_loads + filling + emptying

    memory = problem.bytes_once / gpu.copy_bandwidth
    each_loads = shape.input_bytes + shape.weight_bytes + shape.output_bytes
    loaded = blocks * each_loads
    steps = 18 * shape.channels // _STAGE_CHANNELS
    # `mma.sync` on every architecture, with warp groups or without.
    issued = estimate.instructions(
        gpu, problem.dtype, shape.warps, steps, each_loads / estimate.COPY_BYTES, products,
        (shape.middle_bytes + shape.output_bytes) / 2, mma=True,
    )  # fmt: skip
    terms = [
        busiest * 2 * products / _mma_rate(gpu),
        busiest * shared / (_SHARED_BYTES_PER_CYCLE * gpu.clock),
        loaded / estimate.l2_bandwidth(gpu, blocks),
        estimate.issue_time(gpu, blocks, issued),
        waves * steps * _CACHE_LATENCY / (shape.stages - 1),
    ]
    if at_once > 1:
        terms.append(memory)
    hidden = estimate.IMPERFECT * (sum(terms) - max(terms))
    alone = 0.0 if at_once > 1 else memory
    exposed = 2 * estimate.LATENCY * (waves if at_once == 1 else min(waves, 2))
    return max(terms) + hidden + alone + exposed + estimate.LAUNCH


def resident(shape: Shape, gpu: Architecture) -> int:
    """Blocks that a multiprocessor holds at once."""
    return estimate.resident(gpu, shape.warps, shape.registers, shape.shared_bytes)


def _mma_rate(gpu: Architecture) -> float:
    """FLOP/s of one multiprocessor's tensor cores by mma.sync."""
    share = min(MATRIX_EFFICIENCY, _MMA_SHARE.get(gpu.capability[0], 1.0))
    return share * gpu.float16 / gpu.multiprocessors
