"""Whether a device's kernels compute what the library does: asked once, before they are used.

Kernels that were tested on one GPU, or on none, may still be wrong on another: its compiler, its
driver or the kernels themselves are. So each family of kernels (of a backend, of one kind, shape
and tile, of one dtype) is run once on small inputs of the layout that it is wanted for, twice, and
compared with the library, before its first use on a device. What was found is kept in a file beside
the tuning tables, by package, driver, device and Triton. A family that differs is not used there: a
warning says so, `report` and `fused-resnet doctor` name it, and the library runs in its place.

A check computes on the current stream and waits for the result. Nothing is checked while a graph is
captured, or where kernels are only traced: that happens at a later call.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import Context, ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .. import _native, files
from ..tuning import table

VARIABLE = "FUSED_RESNET_SELF_CHECK"
FORMAT = "fused_resnet.self_check/1"

# How much larger than the library's an error may be. Tests have it at 1.5; what is wrong on a
# device is wrong by far more, and a kernel that is right must not be left out.
FACTOR = 4.0
_FLOOR = 256 * torch.finfo(torch.float32).eps
_LOCK_TIMEOUT = 5.0
_LARGEST = 2**20


class Family(NamedTuple):
    """Kernels that are checked together.

    Attributes:
        backend: whose they are.
        kernel: what they are, as "convolution 3x3, stride 2, residual, 128x64x64, 4 warps".
        dtype: of the tensors, or "tfloat32".
    """

    backend: str
    kernel: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.backend}: {self.kernel} ({self.dtype})"


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        passed: whether the family may be used.
        error: the relative error of what was furthest from its limit, against float64; None where
            there are none to compare.
        limit: of that error.
        reason: why it failed where that was not the error; "" otherwise.
        part: which part of the family that was, where it has several.
        seconds: that the check took, compilation included.
    """

    passed: bool
    error: float | None = None
    limit: float | None = None
    reason: str = ""
    part: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        start = f"{self.part}: " if self.part else ""
        if self.reason:
            return start + self.reason
        return f"{start}relative error {self.error:.2g}, at most {self.limit:.2g} is right"


class Case(NamedTuple):
    """Something to compute by a kernel and by the library.

    Attributes:
        kernel: the kernel's results.
        library: the library's, of inputs that have gone through the function it is given.
        floors: the least limits of the results, in order; 0 for those that have none.
        names: what each result is, where that is worth saying.
    """

    kernel: Callable[[], Sequence[Tensor]]
    library: Callable[[Callable[[Any], Any]], Sequence[Tensor]]
    floors: tuple[float, ...] = ()
    names: tuple[str, ...] = ()


settled: dict[tuple[Any, ...], bool] = {}
"""What `trusts` has said, by its `call`; who looks here first calls nothing once that is known."""

_MOST_SETTLED = 16384
_lock = threading.RLock()
_known: dict[tuple[torch.device, Family], Verdict] = {}
_warned: set[tuple[torch.device, str, str]] = set()
_unwritable: str | None = None
_checking: ContextVar[bool] = ContextVar("fused_resnet_checking", default=False)
_postponed: ContextVar[bool] = ContextVar("fused_resnet_check_postponed", default=False)
# None until the first use, as in `layers/watch.py`.
_from_environment: str | None = None

everywhere = os.environ.get(VARIABLE) == "1"
"""Whether kernels are checked on CPUs as well, where they are interpreted or run on the host."""


def setting() -> str:
    """FUSED_RESNET_SELF_CHECK as it was at the first use: "0", "1", or "" where it is not set.

    Raises:
        ValueError: it is something else.
    """
    global _from_environment
    if _from_environment is None:
        value = os.environ.get(VARIABLE, "")
        if value not in ("", "0", "1"):
            raise ValueError(f"{VARIABLE} is {value!r}, must be one of 0, 1")
        _from_environment = value
    return _from_environment


def use(value: str) -> None:
    """Sets what FUSED_RESNET_SELF_CHECK is taken to be from now on, in this process.

    Args:
        value: "0", "1", or "" for its default.
    """
    global _from_environment, everywhere
    with _lock:
        _from_environment, everywhere = value, value == "1"
        _known.clear()
        settled.clear()


def described() -> str:
    """What FUSED_RESNET_SELF_CHECK comes to.

    Raises:
        ValueError: see `setting`.
    """
    return {
        "": "kernels are checked against the library before their first use on a GPU",
        "0": "kernels are used unchecked",
        "1": "kernels are checked against the library before their first use, wherever they run",
    }[setting()]


def applies(device: torch.device) -> bool:
    """Whether kernels on a device are to be checked."""
    chosen = setting()
    return chosen == "1" or (chosen == "" and device.type == "cuda")


def trusts(
    call: tuple[Any, ...],
    device: torch.device,
    family: Callable[[], Family],
    case: Callable[[], Case],
    let_through: Callable[[], tuple[type[Exception], ...]] = tuple,
) -> bool:
    """Whether kernels may be used on a device.

    Args:
        call: what tells calls apart that may want other families, the device among it.
        device: where they run.
        family: which they are.
        case: what they are checked with.
        let_through: the exceptions of `case().kernel` that are not for this to judge.

    Returns:
        True also where a check is not possible now, or the library could not run it.
    """
    found = settled.get(call)
    if found is not None:
        return found
    if _checking.get():
        return True
    if _postponed.get():
        return family().backend == "triton"
    if len(settled) >= _MOST_SETTLED:
        settled.clear()
    if not applies(device):
        settled[call] = True
        return True
    return _decided(call, device, family(), case, let_through)


@contextlib.contextmanager
def postponed() -> Iterator[None]:
    """Checks nothing in a pass whose kernels of Triton are not launched; others are not used."""
    token = _postponed.set(True)
    try:
        yield
    finally:
        _postponed.reset(token)


def _decided(
    call: tuple[Any, ...],
    device: torch.device,
    family: Family,
    case: Callable[[], Case],
    let_through: Callable[[], tuple[type[Exception], ...]],
) -> bool:
    with _lock:
        verdict = _known.get((device, family))
        if verdict is None:
            verdict = _read(_path(device)).get(str(family))
        if verdict is None:
            if _cannot_run_now(device):
                return True
            verdict = Context().run(_judged, device, case, let_through)
            if verdict is None:
                return True
            _write(device, family, verdict)
        _known[device, family] = verdict
        settled[call] = verdict.passed
    if not verdict.passed:
        _warn(device, family, verdict)
    return verdict.passed


def _cannot_run_now(device: torch.device) -> bool:
    if torch.compiler.is_compiling():
        return True
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _warn(device: torch.device, family: Family, verdict: Verdict) -> None:
    kind = (device, family.backend, family.kernel.partition(",")[0])
    if kind in _warned:
        return
    _warned.add(kind)
    warnings.warn(
        f"fused_resnet: kernels differ from the library on {_name(device)} and are not used there: "
        f"{family}: {verdict}. The library runs in their place. `fused-resnet doctor` names all, "
        "with --recheck they are checked again. Please report this",
        stacklevel=2,
    )


def _judged(
    device: torch.device,
    make: Callable[[], Case],
    let_through: Callable[[], tuple[type[Exception], ...]],
) -> Verdict | None:
    """The verdict on a case, in a context of its own; None where there can be none."""
    _checking.set(True)
    start = time.perf_counter()
    with _undisturbed(device):
        try:
            case = make()
            exact = case.library(_to_double)
        except (RuntimeError, NotImplementedError):
            return None
        try:
            results = [_poisoned(case, exact) for _ in range(2)]
        except torch.OutOfMemoryError:
            return None
        except Exception as error:
            if isinstance(error, let_through()):
                raise
            text = f"{type(error).__name__}: {error}".partition("\n")[0][:200]
            return Verdict(False, reason=text, seconds=time.perf_counter() - start)
        try:
            library = case.library(lambda value: value)
        except (RuntimeError, NotImplementedError):
            return None
        verdict = _compared(case, results[0], results[1], exact, library)
    return replace(verdict, seconds=round(time.perf_counter() - start, 4))


@contextlib.contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Nothing of the caller's changes what is computed here, or sees it."""
    cudnn = torch.backends.cudnn
    benchmark, cudnn.benchmark = cudnn.benchmark, False
    try:
        with (
            _disable_current_modes(),
            torch._C.DisableTorchFunction(),
            torch._C._DisableFuncTorch(),
            torch.no_grad(),
            torch.autocast(device.type, enabled=False),
            torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext(),
        ):
            yield
    finally:
        cudnn.benchmark = benchmark


def _to_double(value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_real else value


def _poisoned(case: Case, exact: Sequence[Tensor]) -> Sequence[Tensor]:
    """The kernel's results, in memory that most likely had NaN in it before."""
    for dtype in (torch.float16, torch.float32):
        rubbish = [torch.full_like(one, math.nan, dtype=dtype) for one in exact]
        del rubbish
    return case.kernel()


def _compared(
    case: Case,
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    exact: Sequence[Tensor],
    library: Sequence[Tensor],
) -> Verdict:
    errors = []
    for one, other, right, usual in zip(first, second, exact, library, strict=True):
        if one.shape != right.shape:
            shapes = f"{tuple(one.shape)}, must be {tuple(right.shape)}"
            return Verdict(False, reason=f"a result has the shape {shapes}")
        size = right.norm().clamp(min=1e-30)
        changes = (one != other).double().sum()  # NaN, too: it is not equal to itself
        errors += [(one.double() - right).norm() / size, (usual.double() - right).norm() / size]
        errors.append(changes)
    values = torch.stack(errors).tolist()  # waits once
    worst, worst_share = Verdict(True, 0.0, _FLOOR), -1.0
    for index, at in enumerate(range(0, len(values), 3)):
        error, usual, changes = values[at : at + 3]
        limit = max(FACTOR * usual, _FLOOR, case.floors[index] if case.floors else 0.0)
        what = case.names[index] if case.names else ""
        if not math.isfinite(error):
            return Verdict(False, None, limit, "a result has NaN or infinity", what)
        if error > limit:
            return Verdict(False, error, limit, part=what)
        if changes:
            reason = "the same inputs gave other bits the second time"
            return Verdict(False, error, limit, reason, what)
        if error / limit > worst_share:
            worst, worst_share = Verdict(True, error, limit), error / limit
    return worst


# What is kept.


def failed(device: torch.device) -> dict[str, Verdict]:
    """The families that are known to be wrong on a device, by their description."""
    if setting() == "0":
        return {}
    found = {name: verdict for name, verdict in _read(_path(device)).items() if not verdict.passed}
    for (where, family), verdict in list(_known.items()):
        if where == device and not verdict.passed:
            found[str(family)] = verdict
    return found


def summary(device: torch.device) -> str:
    """What `doctor` says of a device in one line."""
    found = _read(_path(device))
    wrong = sum(not verdict.passed for verdict in found.values())
    seconds = sum(verdict.seconds for verdict in found.values())
    text = "nothing is checked yet"
    if found:
        text = f"{len(found) - wrong} families of kernels agree with the library, {wrong} do not"
        text += f" ({seconds:.1f} s with compilation)"
    return text if _unwritable is None else f"{text}; verdicts cannot be kept: {_unwritable}"


def forget() -> int:
    """Forgets all verdicts, in this process and on disk, so that kernels are checked again.

    Returns:
        How many families there was a verdict on, on disk.

    Raises:
        OSError: a file of verdicts cannot be removed.
    """
    count = 0
    with _lock:
        _known.clear()
        settled.clear()
        _warned.clear()
        folder = table.cache_folder() / "self_check"
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            count += len(_read(path))
            path.unlink(missing_ok=True)
    return count


def _path(device: torch.device) -> Path | None:
    """The file of a device's verdicts; None where there can be none."""
    index = device.index
    if device.type == "cuda" and index is None:
        index = torch.cuda.current_device()
    try:
        return table.cache_folder() / "self_check" / _file_name(device.type, index)
    except table.TableError as error:
        _say_unwritable(str(error))
        return None


@functools.cache
def _file_name(kind: str, index: int | None) -> str:
    """Of what verdicts depend on: device, driver, Triton, and the package's version and files."""
    name = _name(torch.device(kind) if index is None else torch.device(kind, index))
    return table.file_name(f"{name} {_driver()} triton {_version('triton')} {_package()}")


def _name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"this machine's {device.type}"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} sm_{properties.major}{properties.minor}"


def _driver() -> str:
    """The GPU driver's version; where the kernel does not tell, that of CUDA it can run."""
    with contextlib.suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text()
        if match := re.search(r"\b(\d+\.\d+(?:\.\d+)?)\b", text):
            return f"driver {match[1]}"
    with contextlib.suppress(AttributeError, RuntimeError):
        return f"driver {torch._C._cuda_getDriverVersion()}"  # type: ignore[attr-defined]
    return "no driver"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _package() -> str:
    """The version, and a digest of the files that make up kernels and their launches."""
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for path in sorted([*folder.glob("*.py"), *folder.glob("triton/*.py")]):
        digest.update(path.read_bytes())
    if _native.cuda_status == "yes":
        stat = (folder.parent / "_cuda.abi3.so").stat()
        digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return f"fused_resnet {_version('fused_resnet')} {digest.hexdigest()[:12]}"


def _read(path: Path | None) -> dict[str, Verdict]:
    """The verdicts in a file; none of one that is not there or damaged: they are found again."""
    if path is None:
        return {}
    try:
        with open(path, "rb") as file:
            document = json.loads(file.read(_LARGEST))
        if document["format"] != FORMAT:
            return {}
        return {str(name): _verdict(fields) for name, fields in document["verdicts"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _verdict(fields: dict[str, Any]) -> Verdict:
    verdict = Verdict(**fields)
    numbers = (verdict.error, verdict.limit, verdict.seconds)
    texts = (verdict.reason, verdict.part)
    if type(verdict.passed) is not bool or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"no verdict: {fields}")
    if any(type(number) not in (int, float, type(None)) for number in numbers):
        raise TypeError(f"no verdict: {fields}")
    return verdict


def _write(device: torch.device, family: Family, verdict: Verdict) -> None:
    """Adds a verdict to a device's file, which other processes add to as well."""
    path = _path(device)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(path.with_name(f"{path.name}.lock"), _LOCK_TIMEOUT):
            verdicts = _read(path) | {str(family): verdict}
            fields = {name: asdict(one) for name, one in sorted(verdicts.items())}
            document = {"format": FORMAT, "verdicts": fields}
            files.replace(path, (json.dumps(document, indent=0) + "\n").encode())
    except OSError as error:  # a lock that was taken too long is one
        _say_unwritable(str(error))


def _say_unwritable(reason: str) -> None:
    global _unwritable
    _unwritable = reason
