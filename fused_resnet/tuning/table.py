"""Tables on disk: what tuning chose, one line a problem, one file a GPU.

A table is JSON:

    {
    "format": "fused_resnet.tuning/1",
    "gpu": "NVIDIA H100 80GB HBM3",
    "choices": {
    "float16 256x64x56x56 k256 1x1 s1x1 p0x0 d1x1 g1 residual": {"kernel": "triton", ...},
    ...
    }
    }

A line's fields are those of `Entry`. Any number of processes may write to one table: each takes
the lock beside it (`<table>.lock`), reads what is there now, adds its own lines and replaces the
file in one step, so no line is lost and no reader ever sees half a file.

A damaged table is reported and set aside (`<table>.damaged-1`); what of it can be read is kept. One
of another format is reported and left alone. Nothing here raises because a disk is full or
read-only, except `merge`, whose caller has results to lose.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import files
from .choice import (
    BASIC_BLOCK,
    BASIC_BLOCK_KERNELS,
    CHAIN_KERNELS,
    CHAINED,
    HOPPER_CHAINS,
    KERNELS,
    TILED,
    Tile,
)
from .problem import BasicBlockProblem, ChainProblem, Problem, parse_problem

FORMAT = "fused_resnet.tuning/1"
LOCK_TIMEOUT = 60.0
# A line has 300 bytes, a network some 30 of them for each batch size and dtype: room for a thousand
# times that, and no more than half a second to read.
LARGEST = 8 * 2**20

_SHIPPED = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Entry:
    """What was chosen for a problem, and how it was measured.

    Attributes:
        kernel: see `Choice`.
        tile: see `Choice`.
        microseconds: median time of what was chosen.
        estimate_microseconds: of what runs without tuning; None if that was wrong.
        library_microseconds: of the library's convolution and `scale_shift_act`, or of a block's
            convolutions one by one; None likewise.
        date: of the measurement, as 2026-11-23.
        versions: of torch and Triton, as "torch 2.15.0, triton 3.9.0".
    """

    kernel: str
    tile: Tile | None
    microseconds: float
    estimate_microseconds: float | None = None
    library_microseconds: float | None = None
    date: str = ""
    versions: str = ""


Entries = Mapping[Problem, Entry]


class TableError(OSError):
    """A table that cannot be written to, for a reason of its own."""


def user_path(gpu: str) -> Path:
    """Where the user's table of a GPU is kept, whether it exists or not.

    Raises:
        TableError: see `cache_folder`.
    """
    return cache_folder() / "tuning" / file_name(gpu)


def shipped_path(gpu: str) -> Path:
    """Where the table of a GPU is that comes with the package, if one does."""
    return _SHIPPED / file_name(gpu)


def file_name(gpu: str) -> str:
    """The name of a GPU's table: "nvidia-h100-80gb-hbm3.json"."""
    return re.sub(r"\W+", "-", gpu, flags=re.ASCII).strip("-").lower() + ".json"


def cache_folder() -> Path:
    """$FUSED_RESNET_CACHE, or `fused_resnet` in the platform's folder for caches.

    Raises:
        TableError: that is in the home folder of a user who does not exist or has none.
    """
    if chosen := os.environ.get("FUSED_RESNET_CACHE"):
        return _expanded(chosen, "FUSED_RESNET_CACHE")
    if base := os.environ.get("XDG_CACHE_HOME"):
        # Relative ones are to be ignored (XDG Base Directory Specification).
        if os.path.isabs(base):
            return Path(base) / "fused_resnet"
    elif sys.platform == "darwin":
        return _expanded("~/Library/Caches/fused_resnet")
    elif sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "fused_resnet"
    return _expanded("~/.cache/fused_resnet")


def _expanded(path: str, variable: str = "") -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        if variable:
            raise TableError(f"{variable} is {path!r}: {error}") from None
        raise TableError(f"{error}: set FUSED_RESNET_CACHE to a folder for tuning tables") from None


def read(path: Path) -> dict[Problem, Entry]:
    """The choices in a table; none where there is no such file or it cannot be read.

    Warns of a file that is damaged, which is set aside, or of another format, which stays.
    """
    path = _target(path)
    content = _content(path)
    if content.damage is not None:
        with contextlib.suppress(OSError), _locked(path):
            content = _content(path)  # another process may have been here first
            if content.damage is not None:
                _set_aside(path, content.damage)
                if content.gpu is not None and content.entries:
                    _replace(path, content.gpu, content.entries)
                return dict(content.entries)
        if content.damage is not None:
            warnings.warn(f"tuning table {path} is damaged ({content.damage})", stacklevel=2)
    elif content.foreign is not None:
        warnings.warn(f"tuning table {path} is not used: {content.foreign}", stacklevel=2)
    elif content.unreadable is not None:
        warnings.warn(f"tuning table {path} cannot be read: {content.unreadable}", stacklevel=2)
    return dict(content.entries)


def merge(path: Path, gpu: str, entries: Entries) -> None:
    """Adds choices to a table, in place of earlier ones for the same problems; makes its folder.

    Raises:
        TableError: the table has another format or is of another GPU; it stays as it was.
        OSError: the file cannot be written; it stays as it was.
    """
    path = _target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        content = _content(path)
        if content.damage is not None:
            _set_aside(path, content.damage)
        reason = content.foreign or content.unreadable
        if reason is None and content.gpu not in (None, gpu):
            reason = f"it is of {content.gpu!r}, this is {gpu!r}"
        if reason is not None:
            raise TableError(f"tuning table {path} is not written to: {reason}")
        _replace(path, gpu, {**content.entries, **entries})


def _target(path: Path) -> Path:
    """The table itself where `path` is a link to it, so that links stay and share a lock."""
    return Path(os.path.realpath(path))


@dataclass(frozen=True)
class _Content:
    """A file as found: its choices and GPU, and what is wrong with it, if anything."""

    entries: dict[Problem, Entry]
    gpu: str | None = None
    damage: str | None = None
    foreign: str | None = None
    unreadable: str | None = None


def _content(path: Path) -> _Content:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return _Content({}, unreadable="it is no regular file")
        with open(path, "rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            most = f"must have at most {LARGEST // 2**20} MiB"
            return _Content({}, unreadable=f"it has {path.stat().st_size} bytes, {most}")
        text = data.decode()
    except FileNotFoundError:
        return _Content({})
    except OSError as error:
        return _Content({}, unreadable=error.strerror or str(error))
    except UnicodeDecodeError as error:
        return _Content({}, damage=str(error))
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Content({}, damage=str(error))
    if not isinstance(document, dict) or not isinstance(document.get("format"), str):
        return _Content({}, damage='it has no "format"')
    if document["format"] != FORMAT:
        return _Content({}, foreign=f"its format is {document['format']!r}, must be {FORMAT!r}")
    gpu, choices = document.get("gpu"), document.get("choices")
    if not isinstance(gpu, str) or not isinstance(choices, dict):
        return _Content({}, damage='it has no "gpu" or no "choices"')
    entries, damage = {}, None
    for key, fields in choices.items():
        try:
            problem = parse_problem(key)
            entries[problem] = _entry(fields, problem)
        except (ValueError, TypeError) as error:
            damage = f"{key}: {error}"
    return _Content(entries, gpu, damage)


def _entry(fields: Any, problem: Problem) -> Entry:
    """The entry a line describes.

    Raises:
        TypeError: it describes none.
        ValueError: likewise.
    """
    if not isinstance(fields, dict):
        raise TypeError(f"is {fields!r}, must be an object")
    if isinstance(fields.get("tile"), dict):
        fields = {**fields, "tile": Tile(**fields["tile"])}
    entry = Entry(**{"tile": None, **fields})
    kernels: tuple[str, ...] = KERNELS
    tiled: tuple[str, ...] = TILED
    if isinstance(problem, ChainProblem):
        kernels, tiled = CHAIN_KERNELS + HOPPER_CHAINS, CHAINED + HOPPER_CHAINS
    elif isinstance(problem, BasicBlockProblem):
        kernels, tiled = BASIC_BLOCK_KERNELS, (BASIC_BLOCK,)
    if entry.kernel not in kernels:
        raise ValueError(f"kernel is {entry.kernel!r}, must be one of {', '.join(kernels)}")
    if (entry.kernel in tiled) != isinstance(entry.tile, Tile):
        raise ValueError(f"kernel is {entry.kernel!r}, tile is {entry.tile!r}")
    if entry.tile is not None:
        for name, value in asdict(entry.tile).items():
            if type(value) is not int or not 1 <= value <= 4096:
                raise ValueError(f"{name} is {value!r}, must be a positive int")
    for name in ("microseconds", "estimate_microseconds", "library_microseconds"):
        value = getattr(entry, name)
        if value is None and name != "microseconds":
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}, must be a positive number")
    return entry


def _set_aside(path: Path, damage: str) -> None:
    """Renames a damaged table and says so; the lock is held."""
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    os.replace(path, aside)
    warnings.warn(
        f"tuning table {path} is damaged ({damage}); it is now {aside.name}", stacklevel=3
    )


def _replace(path: Path, gpu: str, entries: Entries) -> None:
    """Writes a whole table in one step; the lock is held."""
    lines = [
        f"{json.dumps(problem.key)}: {json.dumps(_fields(entry))}"
        for problem, entry in sorted(entries.items(), key=lambda item: _order(item[0]))
    ]
    head = f'"format": {json.dumps(FORMAT)},\n"gpu": {json.dumps(gpu)},\n"choices": {{\n'
    text = "{\n" + head + ",\n".join(lines) + "\n}\n}\n"
    files.replace(path, text.encode())


def _fields(entry: Entry) -> dict[str, Any]:
    return {name: value for name, value in asdict(entry).items() if value not in (None, "")}


def _order(problem: Problem) -> tuple[Any, ...]:
    if isinstance(problem, ChainProblem):
        last = problem.convolution
        return problem.dtype, problem.N, -last.H, last.C, problem.K, last.R, problem.key
    if isinstance(problem, BasicBlockProblem):
        problem, key = problem.parts[1], problem.key
    else:
        key = problem.key
    return problem.dtype, problem.N, -problem.H, problem.C, problem.K, problem.R, key


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the table's lock, which ends with the process that has it.

    Raises:
        OSError: the lock cannot be made, or another process kept it for `LOCK_TIMEOUT` seconds.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path.with_name(path.name + ".lock"), LOCK_TIMEOUT))
        except TimeoutError:
            raise TableError(
                f"tuning table {path} is not written to: its lock was taken for "
                f"{LOCK_TIMEOUT:.0f} seconds"
            ) from None
        yield
