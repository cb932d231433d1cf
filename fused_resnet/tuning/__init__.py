"""Which kernel and tile runs a convolution: the choice per problem and GPU.

`choose` looks, in this order, into the user's table (`fused-resnet tune` writes it), the table that
ships with the package, and the model in `estimate.py`. No table ships before its GPU has been
measured: an estimate is as quickly computed as read, and says that it is one.
"""

from __future__ import annotations

import threading
import warnings
from dataclasses import replace

import torch

from . import architecture, basic_block, chain, cuda_tiles, estimate, table
from .choice import CONVOLUTIONS, ESTIMATE, HOPPER_CHAINS, MEASURED, SHIPPED, Choice, Tile
from .problem import BasicBlockProblem, ChainProblem, ConvProblem, Problem

__all__ = [
    "BasicBlockProblem",
    "ChainProblem",
    "Choice",
    "ConvProblem",
    "Tile",
    "choose",
    "generation",
    "is_left_out",
    "leave_out",
    "left_out",
    "reload",
]

_lock = threading.Lock()
_generation = 0
_choices: dict[tuple[Problem, torch.device], Choice] = {}
_left_out: dict[tuple[Problem, torch.device], set[tuple[str, Tile | None]]] = {}
_warned = False
_tables: dict[str, tuple[dict[Problem, table.Entry], dict[Problem, table.Entry]]] = {}


def choose(problem: Problem, device: torch.device) -> Choice:
    """The kernel and tile that run a problem on a device.

    The first call for a problem reads tables or computes the estimate, under a millisecond in all
    but the very first; later ones are a dictionary's. Safe to call from any thread.

    Args:
        problem: what is to be computed.
        device: with its index, where there are several of its type; on the CPU, where kernels are
            interpreted, the choice is always an H100's tile.
    """
    choice = _choices.get((problem, device))
    return _decide(problem, device) if choice is None else choice


def generation() -> int:
    """How often `reload` was called: until the next time, choices stay as they are."""
    return _generation


def reload() -> None:
    """Forgets every choice, so that the next ones are read from the tables as they are then."""
    global _generation
    with _lock:
        _generation += 1
        _choices.clear()
        _tables.clear()


def leave_out(problem: Problem, device: torch.device, choice: Choice, reason: str) -> None:
    """Takes back a choice that turned out not to run on a device: the next best takes its place.

    Resources are what the compiler gave each tile when the package was made, or what an edited
    table says; the compiler that is installed may give it more. The first time is a warning.
    """
    global _warned
    with _lock:
        _left_out.setdefault((problem, device), set()).add((choice.kernel, choice.tile))
        _choices.pop((problem, device), None)
        first, _warned = not _warned, True
    if first:
        warnings.warn(
            f"{choice} cannot run {problem.key} on this GPU, the next best runs instead, here and "
            f"where else that should be so: {reason}",
            stacklevel=2,
        )


def left_out(problem: Problem, device: torch.device, kernel: str) -> frozenset[Tile | None]:
    """The tiles of a kernel that `leave_out` was told of for a problem."""
    found = _left_out.get((problem, device))
    return frozenset(tile for name, tile in found if name == kernel) if found else frozenset()


def is_left_out(problem: Problem, device: torch.device, kernel: str, tile: Tile | None) -> bool:
    """Whether `leave_out` was told of a kernel and tile for a problem."""
    return (kernel, tile) in _left_out.get((problem, device), ())


def _alternatives(problem: Problem, gpu: architecture.Architecture) -> list[Choice]:
    """Whatever may run a problem, the fastest first as far as the models know."""
    if isinstance(problem, ChainProblem):
        ways = chain.candidates(problem, gpu)
        ways = sorted(ways, key=lambda choice: chain.predicted(problem, gpu, choice))
        return [replace(choice, source=ESTIMATE) for choice in ways]
    if isinstance(problem, BasicBlockProblem):
        return [Choice(CONVOLUTIONS, None, ESTIMATE)]
    tiles = estimate.ranked(problem, gpu)
    return [
        *(Choice("triton", tile, ESTIMATE) for tile in tiles),
        Choice("library", None, ESTIMATE),
    ]


def untuned(problem: Problem, gpu: architecture.Architecture) -> Choice:
    """What runs a problem that no table has."""
    if isinstance(problem, ChainProblem):
        return chain.untuned(problem, gpu)
    if isinstance(problem, BasicBlockProblem):
        return basic_block.untuned(problem, gpu)
    if estimate.prefers_library(problem, gpu):
        return Choice("library", None, ESTIMATE)
    return Choice("triton", estimate.best(problem, gpu), ESTIMATE)


def untuned_tile(problem: ConvProblem, device: torch.device) -> Tile:
    """The Triton tile that the estimate thinks most of."""
    return estimate.best(problem, architecture.of_device(device))


def _decide(problem: Problem, device: torch.device) -> Choice:
    gpu = architecture.of_device(device)
    with _lock:
        if device.type == "cuda":
            choice = _from_tables(problem, gpu) or untuned(problem, gpu)
            if left_out := _left_out.get((problem, device)):
                ways = [choice, *_alternatives(problem, gpu)]
                choice = next(way for way in ways if (way.kernel, way.tile) not in left_out)
        elif isinstance(problem, ChainProblem | BasicBlockProblem):
            choice = untuned(problem, gpu)
        else:
            choice = Choice("triton", estimate.best(problem, gpu), ESTIMATE)
        if device.type != "cuda" or device.index is not None:  # else it is the current one's
            _choices[problem, device] = choice
    return choice


def _from_tables(problem: Problem, gpu: architecture.Architecture) -> Choice | None:
    if gpu.name not in _tables:
        _tables[gpu.name] = (_measured(gpu.name), table.read(table.shipped_path(gpu.name)))
    for entries, source in zip(_tables[gpu.name], (MEASURED, SHIPPED), strict=True):
        entry = entries.get(problem)
        # A file anyone can edit must not make a kernel ask for more than there is.
        if entry is not None and _can_run(problem, gpu, entry):
            return Choice(entry.kernel, entry.tile, source)
    return None


def _measured(gpu: str) -> dict[Problem, table.Entry]:
    """The user's table; none, and a warning, where there can be no such file."""
    try:
        return table.read(table.user_path(gpu))
    except table.TableError as error:
        warnings.warn(f"no tuning table is read: {error}", stacklevel=2)
        return {}


def _can_run(problem: Problem, gpu: architecture.Architecture, entry: table.Entry) -> bool:
    if isinstance(problem, ChainProblem):
        if entry.kernel in HOPPER_CHAINS:
            choice = Choice(entry.kernel, entry.tile, MEASURED)
            return choice in cuda_tiles.hopper_chains(problem, gpu)
        return chain.can_run(problem, gpu, entry.kernel, entry.tile)
    if isinstance(problem, BasicBlockProblem):
        return basic_block.can_run(problem, gpu, entry.kernel, entry.tile)
    if entry.tile is None:
        return True
    if entry.kernel == "cuda":
        if cuda_tiles.is_hopper(entry.tile):
            return entry.tile in cuda_tiles.hopper_candidates(problem, gpu)
        return entry.tile in cuda_tiles.candidates(problem, gpu)
    return estimate.fits(problem, gpu, entry.tile)
