"""The tile a problem runs with before anything has been timed, and the tiles worth timing.

A model of a kernel's time on a GPU. A program computes `block_m` pixels by `block_n` channels, so
there are `programs = ceil(M / block_m) * columns * split_k` of them (`M = N P Q`), each walking
`steps` blocks of the sum's depth, and a multiprocessor holds as many at once (`resident`) as shared
memory, registers and threads allow. A block is `block_k` channels of one tap, one tap of as many
narrow groups as a tile has, or one row of a filter with few channels, by the kernel (`kernel_for`).
The kernel takes as long as the slowest of

- arithmetic: the products of the programs on the busiest multiprocessor, padding included, at the
  tensor cores' rate for this tile (see `_efficiency`). Programs come in whole numbers, so this is
  where a last wave that is nearly empty costs;
- memory: each tensor once, at copy bandwidth (neighbouring programs share input and weight tiles
  through the L2 cache, so these come from memory once);
- L2: what the programs load, with repetition, at L2 bandwidth (`l2_bandwidth`);
- issue: the instructions of the programs on the busiest multiprocessor, at four a cycle: copies and
  their addresses, tensor-core instructions and the loads of their operands where each warp issues
  its own, a step's waiting and counting, and what the epilogue does to each output;
- latency: a program that has `num_stages - 1` blocks in flight cannot take a step more often than
  every `latency / (num_stages - 1)`; this is what a GPU that is not full waits for,

plus a tenth of the others (nothing overlaps perfectly), plus filling the pipeline and storing, once
a wave, plus a launch. Where a multiprocessor holds one program at a time, nothing runs while that
fills its pipeline, and while it stores: both are added in every wave. Sharing a sum among `split_k`
programs shortens the walk and fills more multiprocessors, and costs float32 partial sums, which all
programs write and the last one of each tile reads (`predicted_sharing`).

This is the roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009) with Little's law for
latency and wave quantisation (NVIDIA, Matrix Multiplication Background User's Guide). Its constants
are round figures for Ampere to Blackwell, not fitted: the tuner is what measures.
"""

from __future__ import annotations

import dataclasses

from . import compiler
from .architecture import Architecture
from .choice import Choice, Tile
from .problem import ConvProblem

# Seconds from asking for a block to having it in shared memory: DRAM's latency and the way back.
LATENCY = 0.8e-6
# Seconds from asking for a block that L2 has to having it in shared memory.
CACHE_LATENCY = 0.3e-6
# Seconds between two dependent launches on one stream, as in a CUDA graph.
LAUNCH = 1.5e-6
# The same where the second has begun before the first ends: signalling its end and waking up.
DEPENDENT_LAUNCH = 0.7e-6
# What a multiprocessor gets out of the L2 cache, bytes a cycle: by itself, and, where that is known
# to be less, when all ask at once, by major compute capability. On an H100 that is 5.8 TB/s, of
# which 5.5 to 6 have been measured; of Blackwell nothing is known here, it is taken to be the same.
L2_BYTES_PER_CYCLE = 32
_SHARED_L2_BYTES_PER_CYCLE = {9: 24, 10: 24}
# Warps' instructions that a multiprocessor issues in a cycle, and counts of them, as compiled code
# has about: of a step, of a copy to shared memory with its address and bounds, and of the epilogue
# for each 32 outputs.
_ISSUED_PER_CYCLE = 4
_STEP_INSTRUCTIONS = 24
_COPY_INSTRUCTIONS = 4
_OUTPUT_INSTRUCTIONS = 5
# Products of an `mma.sync`, and instructions of one with its share of `ldmatrix`.
_MMA_PRODUCTS = {False: 16 * 8 * 16, True: 16 * 8 * 8}  # of 16 bits, of TF32
_MMA_INSTRUCTIONS = 1.5
# Bytes of a thread's copy; of a row's few channels, which begin anywhere.
COPY_BYTES = 16
_ROW_COPY_BYTES = 4
# Registers of a thread by how many elements of the accumulator it holds, and whether the epilogue
# has several parts (over 64 channels): the most that ptxas gave any tile here, with warp-group
# instructions (compute capability 9 and 10) and without. It spilled some of them all the same, by
# the version of Triton: `compiler.py`.
_REGISTERS = {
    (True, "16 bits"): {16: (72, 72), 32: (184, 184), 64: (200, 200), 128: (256, 242)},
    (True, "tfloat32"): {16: (96, 96), 32: (168, 168), 64: (255, 192), 128: (256, 255)},
    (True, "float32"): {8: (80, 80), 16: (160, 160), 32: (168, 168)},
    (False, "16 bits"): {16: (80, 80), 32: (168, 168), 64: (218, 192), 128: (256, 253)},
    (False, "tfloat32"): {16: (80, 80), 32: (168, 168), 64: (224, 184), 128: (256, 254)},
    (False, "float32"): {8: (80, 80), 16: (204, 204), 32: (168, 168)},
}
_MOST_REGISTERS = 255
# Major compute capabilities whose tensor cores read operands from shared memory themselves.
_WARP_GROUPS = (9, 10)
_SHARED_PER_PROGRAM = 1024  # what the driver takes of every program
# Which part of what should hide behind the slowest term does not.
IMPERFECT = 0.1
_SPLITS = (1, 2, 4, 8, 16)
# Of the tensor cores' rate, float32 products outside them: what a compiled kernel gets out of plain
# multiply-adds, and what the library's hand-written ones do.
_PLAIN_EFFICIENCY = 0.5
_LIBRARY_EFFICIENCY = 0.8

# block_m, block_n, block_k, num_warps, num_stages of 16-bit operands. block_m is at least 64 and
# there are at least four warps, since Hopper's warp-group instructions need both.
_GENERAL = (
    (64, 32, 64, 4, 4),
    (64, 64, 64, 4, 3),
    (64, 64, 64, 4, 5),
    (64, 64, 128, 4, 3),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (64, 256, 64, 8, 3),
    (128, 32, 64, 4, 4),
    (128, 64, 64, 4, 3),
    (128, 64, 64, 4, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (128, 256, 64, 8, 4),
    (256, 64, 64, 8, 3),
    (64, 32, 32, 4, 4),
    (64, 64, 32, 4, 4),
    (128, 32, 32, 4, 4),
    (128, 64, 32, 4, 4),
    (128, 128, 32, 4, 4),
    (128, 128, 32, 8, 4),
)
# Without tensor cores the operands pass through registers, so tiles are small.
_PLAIN = (
    (64, 32, 32, 8, 3),
    (64, 64, 16, 4, 3),
    (64, 64, 32, 8, 3),
)
# What the kernels for special shapes run with; their blocks are as deep as the shape says.
PACKED = Tile(64, 32, 32, 1, 4, 4)
ROW = Tile(128, 64, 32, 1, 8, 4)
STEM_POOL = Tile(64, 32, 32, 1, 4, 3)
# All of a stem's channels, so that its input is read once.
_WIDE_STEM_POOL = Tile(64, 64, 32, 1, 8, 4)
_PLAIN_STEM_POOL = Tile(64, 32, 32, 1, 8, 3)
# With wider elements, what leaves the packed kernel no spilled register on any architecture.
_PACKED_STAGES = {"tfloat32": 2, "float32": 3}
USUAL_POOL = (3, 3, 2, 2, 1, 1)
# What they take at most, by an element's bytes; their tiles were chosen not to spill.
_SPECIAL_REGISTERS = {
    ("packed", 2): 168,
    ("packed", 4): 168,
    ("row", 2): 168,
    ("row", 4): 255,
    ("stem_pool", 2): 192,
    ("stem_pool", 4): 255,
}
_WIDE_STEM_REGISTERS = 240
# The pooling kernel computes three columns at once.
_POOL_COLUMNS = 3
# Pooled rows one of its programs walks down, while that leaves this many programs.
_POOLED_ROWS = (8, 4, 2, 1)
_POOL_PROGRAMS = 512


def kernel_for(problem: ConvProblem) -> str:
    """Which Triton kernel runs a problem.

    "packed": groups too narrow for a tile of their own, several side by side. "row": so few
    channels that a row of the filter is one block. "stem_pool": the same with the stem's max-pool.
    "conv": everything else. A pool that is not the stem's runs by itself.
    """
    channels, filters = problem.C // problem.groups, problem.K // problem.groups
    if problem.groups > 1:
        span = max(1, PACKED.block_n // filters) * channels
        return "packed" if filters < PACKED.block_n and span <= 2 * PACKED.block_k else "conv"
    if problem.C < 16 and problem.S * problem.C < 64 and problem.dilation[1] == 1:
        if problem.R * problem.S == 1:
            return "conv"
        return "stem_pool" if problem.pool == USUAL_POOL else "row"
    return "conv"


def pooled_rows_each(programs: int) -> int:
    """Pooled rows a program of the stem walks down, of so many programs if each took one."""
    return next(n for n in _POOLED_ROWS if n == 1 or programs // n >= _POOL_PROGRAMS)


def special_tiles(problem: ConvProblem) -> tuple[Tile, ...]:
    """The only tiles of a kernel for special shapes, the usual one first; none for "conv"."""
    kernel = kernel_for(problem)
    if kernel == "packed":
        stages = _PACKED_STAGES.get(problem.dtype, PACKED.num_stages)
        return (dataclasses.replace(PACKED, num_stages=stages),)
    if kernel == "row":
        return (ROW,)
    if kernel == "stem_pool":
        plain = problem.dtype == "float32"
        return (_PLAIN_STEM_POOL,) if plain else (STEM_POOL, _WIDE_STEM_POOL)
    return ()


def candidates(problem: ConvProblem, architecture: Architecture) -> list[Tile]:
    """Every tile that may run a problem on a GPU: it fits, and is not larger than it need be.

    Args:
        problem: any.
        architecture: the GPU.

    Returns:
        At least one tile, always in the same order; all of them fit (see `fits`). Sums are shared
        only where one program a tile would leave multiprocessors idle.
    """
    return [tile for tile, _ in _timed(problem, architecture)]


def ranked(problem: ConvProblem, architecture: Architecture) -> list[Tile]:
    """`candidates`, the one that the model predicts to be fastest first."""
    return [tile for tile, _ in sorted(_timed(problem, architecture), key=lambda pair: pair[1])]


def best(problem: ConvProblem, architecture: Architecture) -> Tile:
    """The candidate that the model predicts to be fastest; the first of equals."""
    return _best(problem, architecture)[0]


@compiler.cached(maxsize=4096)
def _best(problem: ConvProblem, architecture: Architecture) -> tuple[Tile, float]:
    return min(_timed(problem, architecture), key=lambda pair: pair[1])


def launch(in_row: bool) -> float:
    """Seconds that a launch costs beside what its programs do."""
    return DEPENDENT_LAUNCH if in_row else LAUNCH


def predicted(
    problem: ConvProblem, architecture: Architecture, tile: Tile, in_row: bool = False
) -> float:
    """Seconds the model predicts; see this module's docstring.

    With `in_row` the launch has begun before the one before it ended, and has asked for its
    weights: what it then waits for comes from L2.
    """
    M = problem.N * problem.P * problem.Q
    if M == 0:
        return LAUNCH
    tiles, depth = _tiles_and_steps(problem, tile)
    steps = _ceil(depth, tile.split_k)
    programs = tiles * tile.split_k
    resident = _resident(problem, architecture, tile)
    at_once = architecture.multiprocessors * resident
    waves = _ceil(programs, at_once)

    rate = architecture.rate(problem.dtype) / architecture.multiprocessors
    products = tile.block_m * tile.block_n * tile.block_k * steps
    if kernel_for(problem) == "stem_pool":
        products *= _POOL_COLUMNS
    busiest = _ceil(programs, architecture.multiprocessors)
    arithmetic = busiest * 2 * products / (rate * _efficiency(problem, tile))

    memory = problem.bytes_once / architecture.copy_bandwidth
    loaded = programs * steps * _stage_bytes(problem, tile)
    stored = problem.output_bytes * (2 if problem.residual else 1)
    cache = (loaded + stored) / l2_bandwidth(architecture, programs)
    copy = COPY_BYTES if kernel_for(problem) in ("conv", "packed") else _ROW_COPY_BYTES
    each_issues = instructions(
        architecture, problem.dtype, tile.num_warps, steps,
        steps * _stage_bytes(problem, tile) / copy, products, tile.block_m * tile.block_n,
    )  # fmt: skip
    issue = issue_time(architecture, programs, each_issues)
    in_row = in_row and kernel_for(problem) == "conv"
    each = CACHE_LATENCY if in_row else LATENCY
    latency = waves * steps * each / max(1, tile.num_stages - 1)

    # Filling the pipeline and storing: hidden by another program's steps where there is one.
    exposed = each * min(waves, 2)
    if resident == 1:
        exposed = waves * (2 * each + stored / tiles / (L2_BYTES_PER_CYCLE * architecture.clock))
    terms = (arithmetic, memory, cache, issue, latency)
    seconds = max(terms) + IMPERFECT * (sum(terms) - max(terms)) + exposed + launch(in_row)
    if tile.split_k > 1:
        draws = problem.element_size == 2
        shared = (M * problem.K, tiles, tile.split_k)
        seconds += predicted_sharing(shared, architecture, in_row, draws)
    return seconds


def l2_bandwidth(architecture: Architecture, programs: int) -> float:
    """Bytes/s that so many programs get out of the L2 cache."""
    major, count = architecture.capability[0], architecture.multiprocessors
    together = _SHARED_L2_BYTES_PER_CYCLE.get(major, L2_BYTES_PER_CYCLE) * count
    return architecture.clock * min(L2_BYTES_PER_CYCLE * min(count, programs), together)


def instructions(
    gpu: Architecture, dtype: str, warps: int, steps: float, copies: float, products: float,
    outputs: float, mma: bool = False,
) -> float:  # fmt: skip
    """Warps' instructions of one program.

    Args:
        gpu: where it runs.
        dtype: a problem's.
        warps: of the program.
        steps: that each of them takes.
        copies: of threads, to shared memory.
        products: padding included.
        outputs: that go through an epilogue.
        mma: whether warps multiply by `mma.sync` where they could by groups.
    """
    found = _STEP_INSTRUCTIONS * warps * steps + _COPY_INSTRUCTIONS * copies / 32
    if dtype == "float32":
        found += products / 32
    elif mma or gpu.capability[0] not in _WARP_GROUPS:
        found += _MMA_INSTRUCTIONS * products / _MMA_PRODUCTS[dtype == "tfloat32"]
    return found + _OUTPUT_INSTRUCTIONS * outputs / 32


def issue_time(gpu: Architecture, programs: int, each: float) -> float:
    """Seconds to issue so many instructions of each program, on the busiest multiprocessor."""
    return _ceil(programs, gpu.multiprocessors) * each / (_ISSUED_PER_CYCLE * gpu.clock)


def predicted_sharing(
    sums: tuple[int, int, int],
    architecture: Architecture,
    in_row: bool = False,
    draws: bool = True,
) -> float:
    """Seconds that it costs to share sums.

    All programs write their parts. Of those that share a tile the last, which a ticket tells so,
    reads all of these and goes on alone: as few multiprocessors read as there are tiles, after two
    ways through L2, to draw and to have the first part. Where no tickets are drawn, as in float32,
    a launch of its own reads them.

    Args:
        sums: how many outputs there are, in how many tiles, and how many programs share one.
        architecture: the GPU.
        in_row: see `predicted`.
        draws: whether tickets are drawn, as all launches of a network in 16 bits do.
    """
    outputs, tiles, shares = sums
    partial = 4 * outputs * shares
    readers = tiles if draws else architecture.multiprocessors
    if 2 * partial <= architecture.l2_bytes / 2:
        written = partial / l2_bandwidth(architecture, tiles * shares)
        moved = written + partial / l2_bandwidth(architecture, readers)
    else:
        moved = 2 * partial / architecture.copy_bandwidth
    if draws:
        return moved + 2 * CACHE_LATENCY
    return moved + launch(in_row) + 2 * (CACHE_LATENCY if in_row else LATENCY)


def predicted_library(problem: ConvProblem, architecture: Architecture) -> float:
    """Seconds for the library's convolution and one pass of `scale_shift_act` over its output."""
    # Five launches for scale and shift, and as many waits for what is not yet there.
    return predicted_compiled(problem, architecture) + 5 * LAUNCH + 2 * LATENCY


def predicted_compiled(problem: ConvProblem, architecture: Architecture) -> float:
    """Seconds for the library's convolution and one generated kernel for all that follows."""
    unpooled = problem.element_size * problem.N * problem.K * problem.P * problem.Q
    after = (3 if problem.residual else 2) * unpooled
    launches = 1
    if problem.pool is not None:
        after += unpooled + problem.output_bytes
        launches += 1
    latency = launches * (LAUNCH + LATENCY)
    return (
        predicted_convolution(problem, architecture) + after / architecture.copy_bandwidth + latency
    )


def predicted_convolution(problem: ConvProblem, architecture: Architecture) -> float:
    """Seconds for the library's convolution alone.

    On tensor cores it is taken to be as good as the best tile here: the difference between the two
    is then what fusing saves. Without them it is bound by arithmetic or by memory.
    """
    alone = dataclasses.replace(problem, residual=False, pool=None)
    if problem.dtype != "float32":
        return _best(alone, architecture)[1]
    arithmetic = problem.flops / (_LIBRARY_EFFICIENCY * architecture.rate(problem.dtype))
    memory = alone.bytes_once / architecture.copy_bandwidth
    return max(arithmetic, memory) + LAUNCH + LATENCY


def predicted_choice(problem: ConvProblem, architecture: Architecture, choice: Choice) -> float:
    """Seconds the model predicts for a choice."""
    if choice.tile is None:
        return predicted_library(problem, architecture)
    return predicted(problem, architecture, choice.tile)


def prefers_library(problem: ConvProblem, architecture: Architecture) -> bool:
    """Whether a problem that nobody has timed should be left to the library.

    Only float32 without TF32 is: bound by plain multiply-adds, of which the library's kernels get
    more out of a GPU than compiled ones do.
    """
    if problem.dtype != "float32":
        return False
    return predicted_library(problem, architecture) < _best(problem, architecture)[1]


def fits(problem: ConvProblem, architecture: Architecture, tile: Tile) -> bool:
    """Whether a multiprocessor can hold one program, in shared memory and without spilling."""
    return _resident(problem, architecture, tile) >= 1


def shared_bytes(problem: ConvProblem, architecture: Architecture, tile: Tile) -> int:
    """Shared memory of one program.

    Its blocks in flight, of which one is already in registers where no warp-group instruction
    reads it from shared memory, or the output on its way, if that is larger.
    """
    blocks = tile.num_stages if _warp_groups(problem, architecture) else tile.num_stages - 1
    output = problem.element_size * tile.block_m * tile.block_n
    # A few words are for the barriers that compute capability 10 waits on.
    return 64 + max(blocks * _stage_bytes(problem, tile), output)


def registers(problem: ConvProblem, architecture: Architecture, tile: Tile) -> int:
    """Registers of one thread, more than 255 where it would spill some."""
    if tile == _WIDE_STEM_POOL and kernel_for(problem) == "stem_pool":
        # Without warp groups, sums and operands of so many channels do not fit.
        hopper = _warp_groups(problem, architecture)
        return _WIDE_STEM_REGISTERS if hopper else _MOST_REGISTERS + 1
    if (kernel := kernel_for(problem)) != "conv":
        return _SPECIAL_REGISTERS[kernel, problem.element_size]
    products = "16 bits" if problem.element_size == 2 else problem.dtype
    major = architecture.capability[0]
    if spilling_key(problem, architecture, tile) in compiler.current("conv", major).spilled:
        return _MOST_REGISTERS + 1
    known = _REGISTERS[major in _WARP_GROUPS, products]
    accumulator = tile.block_m * tile.block_n // (32 * tile.num_warps)
    most = min((size for size in known if size >= accumulator), default=None)
    return _MOST_REGISTERS + 1 if most is None else known[most][tile.block_n > 64]


def spilling_key(problem: ConvProblem, architecture: Architecture, tile: Tile) -> compiler.Spilled:
    """How the record of a compiler names a convolution's tile: see `compiler.py`."""
    products = "16 bits" if problem.element_size == 2 else problem.dtype
    sizes = (tile.block_m, tile.block_n, tile.block_k, tile.num_warps)
    return (architecture.capability[0], products, tile.split_k > 1, *sizes)


def _warp_groups(problem: ConvProblem, architecture: Architecture) -> bool:
    return architecture.capability[0] in _WARP_GROUPS and problem.dtype != "float32"


def _timed(problem: ConvProblem, architecture: Architecture) -> list[tuple[Tile, float]]:
    found: dict[Tile, float] = {}
    for tile in _shapes(problem):
        tiles, steps = _tiles_and_steps(problem, tile)
        for split in _SPLITS if kernel_for(problem) == "conv" else (1,):
            if split > 1 and (
                tiles * split > 4 * architecture.multiprocessors or steps < 2 * split
            ):
                break
            # As many shares as there are, all of them but the last equally long.
            shared = dataclasses.replace(tile, split_k=_ceil(steps, _ceil(steps, split)))
            if fits(problem, architecture, shared):
                found[shared] = predicted(problem, architecture, shared)
    if not found:
        raise ValueError(f"no tile for {problem.key} fits a {architecture.name}")
    return list(found.items())


def _shapes(problem: ConvProblem) -> list[Tile]:
    """The tiles of the problem's kernel, on any GPU, that are not larger than they need be."""
    if special := special_tiles(problem):
        return list(special)
    shapes: tuple[tuple[int, int, int, int, int], ...]
    if problem.dtype == "float32":
        shapes = _PLAIN
    else:
        # Of operands with twice the bytes the same blocks are half as deep.
        half = problem.element_size // 2
        shapes = tuple(dict.fromkeys((m, n, k // half, w, s) for m, n, k, w, s in _GENERAL))
    pixels = problem.N * problem.P * problem.Q
    channels, filters = problem.C // problem.groups, problem.K // problem.groups
    # Where half of such a tile would do, there is one of half its size.
    return [
        Tile(m, n, k, 1, warps, stages)
        for m, n, k, warps, stages in shapes
        if (m == 64 or m // 2 < pixels)
        and (n == 32 or n // 2 < filters)
        and (k <= 32 or k // 2 < channels)
    ]


def _tiles_and_steps(problem: ConvProblem, tile: Tile) -> tuple[int, int]:
    """How many tiles there are, and the blocks of the sum in one of them."""
    P, Q = problem.P, problem.Q
    channels, filters = problem.C // problem.groups, problem.K // problem.groups
    rows = _ceil(problem.N * P * Q, tile.block_m)
    which = kernel_for(problem)
    if which == "packed":
        return rows * _ceil(problem.groups, tile.block_n // filters), problem.R * problem.S
    if which == "row":
        return rows * _ceil(filters, tile.block_n), problem.R
    if which == "stem_pool":
        pooled_rows, pooled_columns = problem.output_size
        strips = _ceil(problem.N * pooled_columns, tile.block_m) * _ceil(filters, tile.block_n)
        each = pooled_rows_each(strips * pooled_rows)
        return strips * _ceil(pooled_rows, each), (2 * each + 1) * problem.R
    steps = problem.R * problem.S * _ceil(channels, tile.block_k)
    return rows * problem.groups * _ceil(filters, tile.block_n), steps


def _efficiency(problem: ConvProblem, tile: Tile) -> float:
    """Which part of the matrix rate a tile reaches.

    Tensor cores read their operands from shared memory, `block_m + block_n` of them for
    `block_m block_n` products, so a tile whose sides are short waits for that memory.
    """
    if problem.dtype == "float32":
        return _PLAIN_EFFICIENCY
    return 1 / (1 + 16 / tile.block_m + 16 / tile.block_n)


def _resident(problem: ConvProblem, architecture: Architecture, tile: Tile) -> int:
    """Programs that a multiprocessor holds at once; 0 where not even one fits."""
    shared = shared_bytes(problem, architecture, tile)
    per_thread = registers(problem, architecture, tile)
    if shared > architecture.shared_per_block or per_thread > _MOST_REGISTERS:
        return 0
    return resident(architecture, tile.num_warps, per_thread, shared)


def resident(architecture: Architecture, num_warps: int, registers: int, shared: int) -> int:
    """Programs of so many warps, registers a thread and shared bytes that one SM holds at once."""
    threads = 32 * num_warps
    by_shared = architecture.shared_per_multiprocessor // (shared + _SHARED_PER_PROGRAM)
    allocated = 8 * _ceil(registers, 8)  # registers come in eights
    by_registers = architecture.registers_per_multiprocessor // (allocated * threads)
    by_threads = architecture.threads_per_multiprocessor // threads
    return min(by_shared, by_registers, by_threads)


def _stage_bytes(problem: ConvProblem, tile: Tile) -> int:
    rows = tile.block_m * (_POOL_COLUMNS if kernel_for(problem) == "stem_pool" else 1)
    return problem.element_size * tile.block_k * (rows + tile.block_n)


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
