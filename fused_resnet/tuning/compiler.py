"""What each version of Triton makes of the tiles that may be chosen, and whose tiles count here.

A tile that spills is no candidate, and which tiles spill depends on the compiler. What one version
makes of them is in `compiled/triton-<version>.json`, written by
`python bench/triton_resources.py --tiles`:

    {"schema": "fused_resnet.tiles/1", "triton": "3.9",
     "compiled": {"chain": [8, 9, 10, 12], "pair": [9], "conv": [8, 9, 10, 12]},
     "chain": [[9, 64, false, 128, [128, 64, 64, 8, 4], 223, 124928], ...], "pair": [...],
     "spilled": [[8, "16 bits", true, 128, 128, 64, 4], ...], "prologue": [[10, 128, 128, 64, 8]]}

`compiled` are the major compute capabilities that a list was made for. A row of `chain` or `pair`
is a tile that in float16 and bfloat16 spills nothing and fits: the major number of a GPU's compute
capability, the chain's width, whether its shortcut is projected, the next width; (block_m, block_n,
block_k, num_warps, num_stages); the registers of a thread and the bytes of shared memory, in
float16. `spilled` are the convolutions' tiles that spill although `estimate.registers` thinks that
they do not: compute capability, products, whether the sum is shared, block_m, block_n, block_k and
num_warps. `prologue` are tiles of convolutions with a norm in their loads that spill: compute
capability, block_m, block_n, block_k and num_warps.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

SCHEMA = "fused_resnet.tiles/1"
FOLDER = Path(__file__).parent / "compiled"
# Whose tiles the predictions in the repository are of, whichever version runs.
PREDICTED = "3.9"

Kind = tuple[int, int, bool, int]
Shape = tuple[int, int, int, int, int]
Tiles = dict[Kind, dict[Shape, tuple[int, int]]]
Spilled = tuple[int, str, bool, int, int, int, int]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Compiled:
    """What one version of Triton makes of the tiles.

    Attributes:
        version: of Triton, as "3.9".
        majors: by "chain", "pair" and "conv", the major compute capabilities recorded.
        chain: registers and shared memory of the tiles of chains that spill nothing.
        pair: the same of the pair of 1x1s behind a 3x3 that is a launch of its own.
        spilled: tiles of convolutions that spill.
        prologue: those of convolutions with a norm in their loads.
    """

    version: str
    majors: dict[str, frozenset[int]]
    chain: Tiles
    pair: Tiles
    spilled: frozenset[Spilled]
    prologue: frozenset[tuple[int, int, int, int, int]] = frozenset()


@functools.cache
def known() -> tuple[str, ...]:
    """The versions that are recorded, oldest first."""
    names = (path.stem.removeprefix("triton-") for path in FOLDER.glob("triton-*.json"))
    return tuple(sorted(names, key=_number))


@functools.cache
def running() -> str | None:
    """The version of Triton that is installed, as "3.9"; None without one."""
    for name in ("triton", "pytorch-triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return ".".join(importlib.metadata.version(name).split(".")[:2])
    return None


@functools.cache
def nearest(version: str | None, kernel: str, capability: int) -> str:
    """The recorded version that is closest, the newer of two; without a version, the newest.

    Args:
        version: as "3.8".
        kernel: "chain", "pair" or "conv".
        capability: the major compute capability of the GPU. Of the versions recorded for both one
            is chosen, or of all if there is none.
    """
    versions = [one for one in known() if capability in recorded(one).majors[kernel]] or known()
    if version is None:
        return versions[-1]
    here = _number(version)
    return min(versions, key=lambda one: (abs(_number(one) - here), -_number(one)))


# A record of nothing: no chains, and every tile of a convolution is as the estimate has it.
NOTHING = Compiled("none", {}, {}, {}, frozenset())


def current(kernel: str, capability: int) -> Compiled:
    """The record to choose tiles by: of the version that runs, or of the nearest there is.

    Args:
        kernel: see `nearest`.
        capability: likewise.
    """
    return _as_of.get() or recorded(nearest(running(), kernel, capability))


@contextlib.contextmanager
def as_of(record: Compiled | str) -> Iterator[None]:
    """Tiles are chosen by a record, or a version's, whichever runs: predictions are of one."""
    token = _as_of.set(recorded(record) if isinstance(record, str) else record)
    try:
        yield
    finally:
        _as_of.reset(token)


_as_of: ContextVar[Compiled | None] = ContextVar("as_of", default=None)


def cached(maxsize: int) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """Like `functools.lru_cache`, for what depends on the record that is current."""

    def decorate(function: Callable[..., _Result]) -> Callable[..., _Result]:
        @functools.lru_cache(maxsize=maxsize)
        def of_version(_: str, *arguments: Any) -> _Result:
            return function(*arguments)

        @functools.wraps(function)
        def call(*arguments: Any) -> _Result:
            chosen = _as_of.get()
            return of_version("" if chosen is None else chosen.version, *arguments)

        return call

    return decorate


@functools.cache
def recorded(version: str) -> Compiled:
    """A version's record.

    Raises:
        FileNotFoundError: there is none.
    """
    content = json.loads((FOLDER / f"triton-{version}.json").read_text())
    return Compiled(
        version,
        {kernel: frozenset(majors) for kernel, majors in content["compiled"].items()},
        _tiles(content["chain"]),
        _tiles(content["pair"]),
        frozenset(tuple(row) for row in content["spilled"]),
        frozenset(tuple(row) for row in content.get("prologue", ())),
    )


def text(record: Compiled) -> str:
    """A record as it is kept, a row a line."""
    rows = {
        name: [
            [*kind, list(shape), *made]
            for kind, shapes in sorted(tiles.items())
            for shape, made in shapes.items()
        ]
        for name, tiles in (("chain", record.chain), ("pair", record.pair))
    }
    rows["spilled"] = [list(row) for row in sorted(record.spilled)]
    rows["prologue"] = [list(row) for row in sorted(record.prologue)]
    head = {
        "schema": SCHEMA,
        "triton": record.version,
        "compiled": {kernel: sorted(majors) for kernel, majors in record.majors.items()},
    }
    parts = [json.dumps(head)[1:-1]]
    for name, found in rows.items():
        lines = ",\n".join(f"  {json.dumps(row)}" for row in found)
        parts.append(f'"{name}": [\n{lines}\n]' if found else f'"{name}": []')
    return "{" + ",\n".join(parts) + "}\n"


def _number(version: str) -> int:
    major, minor, *_ = version.split(".")
    return 1000 * int(major) + int(minor)


def _tiles(rows: list[list[Any]]) -> Tiles:
    found: Tiles = {}
    for *kind, shape, registers, shared in rows:
        found.setdefault(tuple(kind), {})[tuple(shape)] = (registers, shared)
    return found
