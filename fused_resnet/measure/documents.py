"""Benchmark results as data: where files lie, how they are read, checked and added to.

A file has one of three schemas, named in its `schema`:

- "fused_resnet.results/2", whole models: documented at `document`.
- "fused_resnet.kernels/1", layers: documented at `fused_resnet.measure.kernels.document`.
- "fused_resnet.predicted/3", predictions: documented in `fused_resnet/measure/predict.py`.

All are strict JSON, start with what `environment.provenance` gives (predictions, which no device
made, with "kind": "prediction") and hold a list: `cases`, or `networks` for predictions. A schema's
number changes when a field changes its meaning or goes; `load` reads the older
"fused_resnet.results/1", whose files lack telemetry and energy, as the newer one.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from . import environment, schemas
from .case import Candidate, Result
from .errors import InvalidArgumentError, first_line

MODELS = "fused_resnet.results/2"
KERNELS = "fused_resnet.kernels/1"
PREDICTED = "fused_resnet.predicted/3"
_OLD_MODELS = "fused_resnet.results/1"
# What tells one case of a file from another.
_KEYS = ("model", "batch", "dtype", "device", "mode", "threads")

# How long a process that adds results waits for others that do.
_LOCK_TIMEOUT = 60.0
_SPECS = {MODELS: schemas.MODELS, KERNELS: schemas.KERNELS, PREDICTED: schemas.PREDICTED}


def load(path: Path, wanted: Iterable[str] = (MODELS, KERNELS, PREDICTED)) -> dict[str, Any]:
    """A result file's content, which has all fields that are read here, of the documented types.

    Raises:
        InvalidArgumentError: it cannot be read, is no JSON, has none of the schemas, or says that
            it has one and does not follow it.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{path} is no result file: its JSON is not an object")
    schema = content.get("schema")
    if schema == _OLD_MODELS:
        schema = MODELS
        _upgrade(content)
    wanted = tuple(wanted)
    if schema not in wanted:
        known = " or ".join(map(repr, wanted))
        raise InvalidArgumentError(f"{path}: schema is {schema!r}, must be {known}")
    if not content.get("networks" if schema == PREDICTED else "cases"):
        raise InvalidArgumentError(f"{path} has no results in it")
    if (error := schemas.error(content, _SPECS[schema])) is not None:
        raise InvalidArgumentError(f"{path} is damaged: {error}")
    return content


def read_json(path: Path) -> Any:
    """What a file of strict JSON holds.

    Raises:
        InvalidArgumentError: it cannot be read or is no JSON.
    """
    try:
        return json.loads(path.read_bytes().decode(), parse_constant=_refuse)
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InvalidArgumentError(f"{path} cannot be read: {reason}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path} is no JSON: {first_line(error)}") from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _upgrade(content: dict[str, Any]) -> None:
    content["schema"] = MODELS
    # Whatever else is there, `schemas.error` sees next.
    with contextlib.suppress(TypeError, AttributeError, KeyError):
        for case in content["cases"]:
            case["telemetry"] = None
            for candidate in case["candidates"]:
                candidate["energy_joules"] = None


def repository() -> Path | None:
    """The checkout that this runs in, if any: the current folder, or the package's own."""
    for folder in (Path.cwd(), environment.ROOT):
        if (folder / ".git").exists() and (folder / "csrc").is_dir():
            return folder
    return None


def default_path(content: dict[str, Any], root: Path) -> Path:
    """`bench/results/<device>/<date>-<commit>.json` under `root`; kernels end in "-kernels"."""
    device = re.sub(r"\W+", "-", str(content["device"]["name"])).strip("-").lower()
    kind = "-kernels" if content["schema"] == KERNELS else ""
    name = f"{content['date'][:10]}-{content['commit'] or 'unknown'}{kind}.json"
    return root / "bench" / "results" / device / name


def save(content: dict[str, Any], path: Path) -> None:
    """Writes a file, complete or not at all, making its folder.

    Raises:
        InvalidArgumentError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(content, path)


def add(content: dict[str, Any], path: Path) -> tuple[Path, str | None]:
    """Writes `content`, and keeps what the file has of other cases of the same software.

    So several runs of one day, commit and device become one file, also where they end at the same
    time. A case that was measured again is replaced. A file of other versions is overwritten. One
    that is damaged or of another kind stays as it is, and the results go into one beside it.

    Returns:
        The file with the results, and why it is not `path` (None where it is).

    Raises:
        InvalidArgumentError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # The folder's: a lock beside each file would litter the repository.
        with files.locked(path.parent / ".lock", _LOCK_TIMEOUT):
            why = None
            for place in _places(path):
                try:
                    old = load(place, [content["schema"]]) if place.exists() else None
                    break
                except InvalidArgumentError as error:
                    why = why or str(error)
            save(content if old is None else _merged(old, content), place)
            return place, why


def _places(path: Path) -> Iterator[Path]:
    """A file and those beside it: a.json, a-2.json, a-3.json, ..."""
    yield path
    for number in itertools.count(2):
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    if any(old.get(key) != new[key] for key in ("schema", "commit", "versions", "device")):
        return new
    cases = {_key(case): case for case in [*old["cases"], *new["cases"]]}
    commands = dict.fromkeys([*old["command"].split(" && "), new["command"]])
    return {**new, "cases": list(cases.values()), "command": " && ".join(commands)}


def _key(case: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(case.get(name) for name in _KEYS)


def newest(results: Path, schema: str) -> list[Path]:
    """The newest files of a schema in every device's folder, by the date inside them.

    Of whole models that may be two: the newest with inference, and the newest with training.
    """
    found = []
    folders = sorted(f for f in results.glob("*") if f.is_dir() and f.name != "static")
    for folder in folders:
        files = [(load(path), path) for path in sorted(folder.glob("*.json"))]
        latest: dict[str, tuple[str, Path]] = {}
        for content, path in files:
            for case in content["cases"] if content["schema"] == schema else ():
                mode, dated = case.get("mode", "inference"), (content["date"], path)
                latest[mode] = max(latest.get(mode, dated), dated)
        found += [path for _, path in sorted(set(latest.values()))]
    return found


def document(
    results: Sequence[Result], command: str, root: Path = environment.ROOT
) -> dict[str, Any]:
    """The results as JSON, schema "fused_resnet.results/2".

    Top level: what `environment.provenance` gives, and `cases`.

    A case: `model`, `batch`, `dtype` ("int8" where eight bits are compared, with what is float32
    beside them), `device`, `mode` ("inference" or "training"),
    `memory_format`, `weights` ("random" or what was given), `seed`, `images` (paths; empty for
    the default photograph), `backend` (null for the library's choice), `threads`, `rounds` (those
    timed), `interrupted`, `fused` (lines that say what ran how), `telemetry` (`before` and
    `after` the timing, see `telemetry.snapshot`; null in older files), `candidates`.

    A candidate: `name`, `skipped` (null, or why it did not run; then the rest is null), `wrong`
    (error above `testing.FACTOR` times eager's if fused, `FACTOR_OF_OTHERS` times otherwise, and
    above `LARGEST_INT8_ERROR` in eight bits; then
    only the errors and `top5_agreement` are not null, since what is wrong is not timed),
    `latency_ms` (`median`, `p10`, `p90`, `samples`), `images_per_second`, `ratio_to_eager` (of
    the median latencies), `peak_memory_bytes` (above model and input, null when not measured),
    `kept_bytes` (for the backward pass, each storage once, without parameters, buffers and
    the input; null in inference, absent in older files),
    `energy_joules` (of one call, null where the device does not tell),
    `error` and `gradient_error` (relative to float64, `Accuracy`; null when not finite or, for
    the gradient, in inference), `top5_agreement` (0 to 1).

    `root` is the folder whose commit is recorded.
    """
    device = results[0].case.torch_device
    cases = [_case_document(result) for result in results]
    return {**environment.provenance(MODELS, command, device, root), "cases": cases}


def _case_document(result: Result) -> dict[str, object]:
    case, eager = result.case, result.candidates[0].latency
    return {
        "model": case.model,
        "batch": case.batch_size,
        "dtype": case.precision,
        "device": case.device,
        "mode": "training" if case.train else "inference",
        "memory_format": "channels_last",
        "weights": case.weights or "random",
        "seed": case.seed,
        "images": list(case.images),
        "backend": case.backend,
        "threads": result.threads,
        "rounds": len(eager.samples) if eager else 0,
        "interrupted": result.interrupted,
        "fused": list(result.fused),
        "telemetry": {when: dict(state) for when, state in result.telemetry.items()},
        "candidates": [_candidate_document(result, one) for one in result.candidates],
    }


def _candidate_document(result: Result, candidate: Candidate) -> dict[str, object]:
    latency, accuracy = candidate.latency, candidate.accuracy
    timing = (
        "latency_ms",
        "images_per_second",
        "ratio_to_eager",
        "peak_memory_bytes",
        "kept_bytes",
    )
    fields: dict[str, object] = {"name": candidate.name, "skipped": candidate.skipped}
    fields |= dict.fromkeys((*timing, "energy_joules", *_ACCURACY, "wrong"))
    if accuracy is None:
        return fields
    errors = (_finite(accuracy.error), _finite(accuracy.gradient_error), accuracy.top5)
    fields |= {**dict(zip(_ACCURACY, errors, strict=True)), "wrong": candidate.wrong}
    if latency is None:
        return fields
    return fields | {
        "latency_ms": {
            "median": latency.median,
            "p10": latency.quantile(0.1),
            "p90": latency.quantile(0.9),
            "samples": list(latency.samples),
        },
        "images_per_second": result.images_per_second(candidate),
        "ratio_to_eager": candidate.ratio_to_eager,
        "peak_memory_bytes": candidate.peak_memory,
        "kept_bytes": candidate.kept,
        "energy_joules": candidate.energy,
    }


_ACCURACY = ("error", "gradient_error", "top5_agreement")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def write_json(document: Mapping[str, object], path: Path) -> None:
    """Writes strict JSON, complete or not at all.

    Raises:
        OSError: the file cannot be written; it stays as it was.
    """
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    files.replace(path, text.encode())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes of what the system says of a file that cannot be written an InvalidArgumentError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InvalidArgumentError(f"{path} cannot be written: {reason}") from None
