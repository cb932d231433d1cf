"""Which kernel and tile runs a convolution: the choice per problem and GPU.

`choose` looks, in this order, into the user's table (`fused-resnet tune` writes it), the table that
ships with the package, and the model in `estimate.py`. No table ships before its GPU has been
measured: an estimate is as quickly computed as read, and says that it is one.
"""

from __future__ import annotations

import threading
import warnings

import torch

from . import architecture, basic_block, chain, cuda_tiles, estimate, table
from .choice import ESTIMATE, MEASURED, SHIPPED, Choice, Tile
from .problem import BasicBlockProblem, ChainProblem, ConvProblem, Problem

__all__ = [
    "BasicBlockProblem",
    "ChainProblem",
    "Choice",
    "ConvProblem",
    "Tile",
    "choose",
    "generation",
    "reload",
]

_lock = threading.Lock()
_generation = 0
_choices: dict[tuple[Problem, torch.device], Choice] = {}
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
        return chain.can_run(problem, gpu, entry.kernel, entry.tile)
    if isinstance(problem, BasicBlockProblem):
        return basic_block.can_run(problem, gpu, entry.kernel, entry.tile)
    if entry.tile is None:
        return True
    if entry.kernel == "cuda":
        return entry.tile in cuda_tiles.candidates(problem, gpu)
    return estimate.fits(problem, gpu, entry.tile)
