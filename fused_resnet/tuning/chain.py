"""Which blocks of a network one kernel can run, with which tile, and whether that is faster.

The model of a chain's time is that of `estimate.py`: a program computes all channels of `block_m`
pixels, so there are `ceil(N P Q / block_m)` of them. What it has to wait for are the steps of the
3x3, `9 width / block_k`, and those of the `K / block_n` slices of the block's output; the latter
find their weights in the L2 cache, and each walks through all channels of a projected shortcut. The
same walks are what the program loads through L2.

A pair is the same without the 3x3, which then is a launch of its own with a tile of its own: the
sums of more pixels fit into registers, so that weights are loaded less often, and `split_k`
programs can share the slices of a tile, where there are few pixels.

Launches of few pixels run in a row (`overlaps`, docs/small_batches.md), which shortens what a
launch costs and what its steps wait for.

Registers and shared memory are what the compiler gave each tile (`compiler.py`); a tile that spills
is not there, and where none is there is no chain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..layers import checks
from . import compiler, estimate
from .architecture import Architecture
from .choice import CHAIN, CHAIN_WITHOUT_NEXT, CONVOLUTIONS, ESTIMATE, MEASURED, PAIR, Choice, Tile
from .problem import ChainProblem, ConvProblem

if TYPE_CHECKING:
    from ..layers.description import Block, ConvNorm

DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# The tensor cores' least depth, and the most channels whose sums fit into registers.
LEAST_CHANNELS, WIDEST, WIDEST_NEXT = 16, 512, 256
# Tiles worth compiling by width: block_m, block_n, block_k, num_warps, num_stages. The smaller
# ones are for what spills, and for little shared memory.
SHAPES = {
    64: ((128, 64, 64, 8, 4), (128, 32, 64, 8, 4), (64, 32, 64, 4, 4)),
    128: ((128, 64, 64, 8, 4), (128, 32, 64, 8, 3), (64, 64, 64, 8, 4), (64, 32, 64, 8, 3)),
    256: ((64, 64, 64, 8, 4), (64, 32, 64, 8, 4), (64, 32, 32, 8, 3), (32, 32, 32, 4, 2)),
    512: ((64, 64, 64, 8, 3), (64, 32, 32, 8, 3)),
}
# The same of pairs, whose 3x3 is a launch of its own: wider ones fit, with more pixels.
PAIR_SHAPES = {
    128: ((128, 64, 64, 8, 3), (64, 64, 64, 8, 3), (64, 32, 64, 4, 2)),
    256: ((128, 64, 64, 8, 3), (128, 32, 64, 8, 3), (64, 64, 64, 8, 3), (64, 32, 64, 4, 2)),
}
# Next widths that some network of torchvision's has behind a width, after a shortcut that is the
# input and after a projected one, and none.
NEXT_WIDTHS = {
    (64, False): (0, 64, 128),
    (64, True): (0, 64),
    (128, False): (0, 128, 256),
    (128, True): (0, 128),
    (256, False): (0, 256),
    (256, True): (0, 256),
    (512, False): (0,),
    (512, True): (0,),
}
# Slices in flight: their weights, as many as the width and the next one have rows, are larger than
# the 3x3's blocks.
_SLICE_STAGES = {64: 3, 128: 3, 256: 2, 512: 2}
# Programs that may share the slices of a pair's tile.
_SPLITS = (1, 2, 4, 8, 16)
# Images up to which a network's launches overlap: of longer launches it is a percent.
OVERLAPPED_IMAGES = 8
# Major compute capabilities of GPUs on which they do. From 9 on all could, but compiled for 12 some
# tiles spill that do not by themselves.
OVERLAPPING = (9, 10)


def problems_of(input: Tensor, blocks: Sequence[Block]) -> list[ChainProblem | None] | None:
    """What a chain would do of each of a network's blocks.

    A chain takes float16 and bfloat16, Bottlenecks with dense 3x3 convolutions of a power of two of
    channels from 16 to 512, projections of a multiple of 16 channels, and a next width of a power
    of two up to 256. Only shapes, dtypes and devices are looked at.

    Args:
        input: (N, C, H, W), of the first block.
        blocks: see `ops.residual_blocks`.

    Returns:
        For each block its problem, or None where it has to run convolution by convolution; None for
        all if the arguments of some convolution do not go together.
    """

    def holds(shape: Sequence[int]) -> Tensor:
        """A tensor of a shape without its memory."""
        return input.new_empty(()).expand(tuple(shape))

    found: list[ChainProblem | None] = []
    x = input
    for index, block in enumerate(blocks):
        main, projection = block.main, block.projection
        outs = [x]
        for layer in main[:-1]:
            if not _goes_with(outs[-1], layer):
                return None
            outs.append(holds(layer.output_shape(outs[-1].shape)))
        shortcut = x
        if projection is not None:
            if not _goes_with(x, projection):
                return None
            shortcut = holds(projection.output_shape(x.shape))
        if not _goes_with(outs[-1], main[-1], shortcut):
            return None
        following = blocks[index + 1].layers[0] if index + 1 < len(blocks) else None
        problem = _problem_of(outs[1], x, block)
        if (
            problem is not None
            and following is not None
            and _can_follow(following)
            and _goes_with(shortcut, following)
        ):
            problem = replace(problem, next_width=following.weight.size(0))
        found.append(problem)
        x = shortcut
    return found


def slice_stages(width: int, tile: Tile) -> int:
    """Slices of the output that a chain's program has in flight, itself included."""
    return min(tile.num_stages, _SLICE_STAGES.get(width, 2))


def has_chain(block: Block) -> bool:
    """Whether the weights of a block are those of a Bottleneck that a chain can take."""
    layers = block.layers
    if len(block.main) != 3:
        return False
    K, width, *taps = layers[1].weight.shape
    channels = layers[2].weight.size(0)
    return (
        taps == [3, 3]
        and layers[1].groups == 1
        and width == K
        and _is_power(width)
        and width <= WIDEST
        and _is_pointwise(layers[2])
        and max(layers[2].stride) == 1
        and power_in(channels) >= LEAST_CHANNELS
        and (
            not block.has_projection
            or (_is_pointwise(layers[3]) and power_in(layers[3].weight.size(1)) >= LEAST_CHANNELS)
        )
    )


def power_in(channels: int) -> int:
    """The largest power of two that divides a number of channels."""
    return channels & -channels


def _problem_of(reduced: Tensor, x: Tensor, block: Block) -> ChainProblem | None:
    if x.dtype not in DTYPES or not has_chain(block):
        return None
    main, projection = block.main, block.projection
    N, width, H, W = reduced.shape
    _, middle, last = main
    stride, padding, dilation = middle.stride, middle.padding, middle.dilation
    problem = ChainProblem(
        N, width, H, W, last.weight.size(0),
        (stride[0], stride[1]), (padding[0], padding[1]), (dilation[0], dilation[1]),
        DTYPES[x.dtype],
    )  # fmt: skip
    if projection is not None:
        C, first_h, first_w = x.shape[1:]
        steps = projection.stride
        problem = replace(problem, projection=(C, first_h, first_w, steps[0], steps[1]))
    return problem


def _can_follow(layer: ConvNorm) -> bool:
    """Whether a block's first convolution can be in the launch of the block before."""
    width = layer.weight.size(0)
    reducing = _is_power(width) and width <= WIDEST_NEXT
    return reducing and _is_pointwise(layer) and max(layer.stride) == 1


def _goes_with(input: Tensor, layer: ConvNorm, residual: Tensor | None = None) -> bool:
    return checks.conv_error("conv_bn_act", input, layer, residual, "relu") is None


def _is_pointwise(layer: ConvNorm) -> bool:
    """Whether a convolution is a 1x1 without padding or groups."""
    one = layer.weight.shape[2:] == (1, 1)
    return one and max(layer.padding) == 0 and layer.groups == 1


def _is_power(channels: int) -> bool:
    return channels >= LEAST_CHANNELS and channels & (channels - 1) == 0


def untuned(problem: ChainProblem, gpu: Architecture) -> Choice:
    """What runs a block that no table has: the candidate that the model thinks fastest."""
    return replace(_untuned(problem, gpu)[0], source=ESTIMATE)


@compiler.cached(maxsize=1024)
def _untuned(problem: ChainProblem, gpu: Architecture) -> tuple[Choice, float]:
    timed = ((choice, predicted(problem, gpu, choice)) for choice in candidates(problem, gpu))
    return min(timed, key=lambda pair: pair[1])


def candidates(problem: ChainProblem, gpu: Architecture) -> list[Choice]:
    """Every way to run a block on a GPU, convolution by convolution first."""
    found = [Choice(CONVOLUTIONS, None, MEASURED)]
    found += [Choice(CHAIN, tile, MEASURED) for tile in tiles(problem, gpu)]
    if problem.next_width:
        alone = tiles(problem.without_next(), gpu)
        found += [Choice(CHAIN_WITHOUT_NEXT, tile, MEASURED) for tile in alone]
        found += [Choice(PAIR, tile, MEASURED) for tile in pair_tiles(problem, gpu)]
    return found


def pair_tiles(problem: ChainProblem, gpu: Architecture) -> list[Tile]:
    """The tiles of the pair of 1x1s; slices are shared where that leaves multiprocessors idle."""
    found = []
    for tile in tiles(problem, gpu, PAIR):
        programs = -(-problem.N * problem.P * problem.Q // tile.block_m)
        slices = problem.K // tile.block_n
        for split in _SPLITS:
            if split > 1 and (programs * split > 2 * gpu.multiprocessors or slices % split):
                break
            found.append(replace(tile, split_k=split))
    return found


def tiles(problem: ChainProblem, gpu: Architecture, kernel: str = CHAIN) -> list[Tile]:
    """The tiles a chain can have on a GPU, as compiled; none for what was not compiled."""
    return [
        Tile(block_m, block_n, block_k, 1, warps, stages)
        for (block_m, block_n, block_k, warps, stages), (_, shared) in _compiled(
            problem, gpu, kernel
        ).items()
        if shared <= gpu.shared_per_block
        and problem.K % block_n == 0
        and problem.width % block_k == 0
        and (problem.projection is None or problem.projection[0] % block_k == 0)
    ]


def can_run(problem: ChainProblem, gpu: Architecture, kernel: str, tile: Tile | None) -> bool:
    """Whether a choice is one of the candidates."""
    return Choice(kernel, tile, MEASURED) in candidates(problem, gpu)


def predicted(problem: ChainProblem, gpu: Architecture, choice: Choice) -> float:
    """Seconds for all that a problem consists of, by one choice."""
    in_row = overlaps(problem, gpu)
    if choice.kernel == CONVOLUTIONS:
        return predicted_convolutions(problem, gpu, in_row)
    tile = choice.tile
    assert tile is not None
    if choice.kernel == CHAIN_WITHOUT_NEXT:
        alone, following = predicted_launch(problem.without_next(), gpu, tile), problem.reduce
        assert following is not None
        return alone + _predicted_part(following, gpu, in_row)
    if choice.kernel == PAIR:
        pair = predicted_launch(problem, gpu, tile, PAIR)
        return _predicted_part(problem.convolution, gpu, in_row) + pair
    return predicted_launch(problem, gpu, tile)


def predicted_convolutions(problem: ChainProblem, gpu: Architecture, in_row: bool) -> float:
    """Seconds for the convolutions one by one, each after the last has ended or in a row."""
    return sum(_predicted_part(part, gpu, in_row) for part in problem.parts)


def overlaps(problem: ChainProblem, gpu: Architecture) -> bool:
    """Whether a block's launches begin before those before them have ended.

    Where the GPU can do that, and launches are so short that it matters.
    """
    return gpu.capability[0] in OVERLAPPING and problem.N <= OVERLAPPED_IMAGES


def _predicted_part(part: ConvProblem, gpu: Architecture, in_row: bool) -> float:
    return estimate.predicted(part, gpu, estimate.best(part, gpu), in_row)


def predicted_launch(
    problem: ChainProblem, gpu: Architecture, tile: Tile, kernel: str = CHAIN
) -> float:
    """Seconds for one launch of the kernel; see this module's docstring.

    Of a pair, for what follows its 3x3, with the adding up of slices that are shared.
    """
    pixels = problem.N * problem.P * problem.Q
    if pixels == 0:
        return estimate.LAUNCH
    in_row = overlaps(problem, gpu)
    latency = estimate.CACHE_LATENCY if in_row else estimate.LATENCY
    split = tile.split_k
    programs = split * -(-pixels // tile.block_m)
    resident = programs_at_once(problem, gpu, tile, kernel)
    waves = -(-programs // (gpu.multiprocessors * resident))
    slices = problem.K // tile.block_n // split
    depth = 0 if problem.projection is None else problem.projection[0]
    # One block deep, a projected shortcut is loaded before the slices.
    walked = slices if depth > tile.block_k else 1
    taps = 0 if kernel == PAIR else 9

    # A pixel's products in the 3x3, and in tiles of a slice's width.
    in_3x3, in_slices = taps * problem.width**2, (problem.width + depth) * problem.K
    in_next = problem.K * problem.next_width
    wide = in_3x3 / _efficiency(tile.block_m, problem.width)
    narrow = in_slices / _efficiency(tile.block_m, tile.block_n)
    last = in_next / _efficiency(tile.block_m, max(1, problem.next_width))
    busiest = -(-programs // gpu.multiprocessors)
    rate = gpu.rate(problem.dtype) / gpu.multiprocessors
    arithmetic = busiest * tile.block_m * 2 * (wide + (narrow + last) / split) / rate

    weights = taps * problem.width**2
    weights += problem.K // split * (problem.width + depth + problem.next_width)
    rows = max(1, taps) * problem.width + walked * depth + (0 if depth else problem.K // split)
    rows += problem.K // split + (2 if split > 1 else 1) * problem.next_width
    loaded = 2 * programs * (weights + tile.block_m * rows)
    cache = loaded / estimate.l2_bandwidth(gpu, programs)

    walks = taps * (problem.width // tile.block_k) + slices * max(1, depth // tile.block_k)
    issued = estimate.instructions(
        gpu, problem.dtype, tile.num_warps, walks, loaded / programs / estimate.COPY_BYTES,
        tile.block_m * (in_3x3 + (in_slices + in_next) / split),
        tile.block_m * ((problem.width if taps else 0) + problem.K // split + problem.next_width),
    )  # fmt: skip

    in_flight = max(1, tile.num_stages - 1)
    steps = taps * (problem.width // tile.block_k) * latency / in_flight
    if walked > 1:
        # The loop over a projection's channels is what is pipelined, and ends with every slice.
        each = depth // tile.block_k / in_flight + 2
        steps += slices * each * estimate.CACHE_LATENCY
    else:
        steps += slices * latency / max(1, slice_stages(problem.width, tile) - 1)
    moved = problem.bytes_of_pair if kernel == PAIR else problem.bytes_once
    terms = (
        arithmetic,
        moved / gpu.copy_bandwidth,
        cache,
        estimate.issue_time(gpu, programs, issued),
        waves * steps,
    )
    hidden = estimate.IMPERFECT * (sum(terms) - max(terms))
    exposed = latency * min(waves, 2)
    if resident == 1:
        stored = 2 * tile.block_m * (tile.block_n + problem.next_width)  # of the last slice
        exposed = waves * (2 * latency + stored / (estimate.L2_BYTES_PER_CYCLE * gpu.clock))
    seconds = max(terms) + hidden + exposed + estimate.launch(in_row)
    if split > 1:
        sums = (pixels * problem.next_width, programs // split, split)
        seconds += estimate.predicted_sharing(sums, gpu, in_row)
    return seconds


def programs_at_once(
    problem: ChainProblem, gpu: Architecture, tile: Tile, kernel: str = CHAIN
) -> int:
    """Programs that a multiprocessor holds at once.

    Raises:
        KeyError: the tile is none of `tiles`.
    """
    key = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps, tile.num_stages)
    registers, shared = _compiled(problem, gpu, kernel)[key]
    return estimate.resident(gpu, tile.num_warps, registers, shared)


def _compiled(
    problem: ChainProblem, gpu: Architecture, kernel: str = CHAIN
) -> Mapping[tuple[int, int, int, int, int], tuple[int, int]]:
    kind = (
        gpu.capability[0], problem.width, problem.projection is not None, problem.next_width,
    )  # fmt: skip
    record = compiler.current(PAIR if kernel == PAIR else CHAIN, gpu.capability[0])
    return (record.pair if kernel == PAIR else record.chain).get(kind, {})


def _efficiency(rows: int, columns: int) -> float:
    """See `estimate._efficiency`."""
    return 1 / (1 + 16 / rows + 16 / columns)
