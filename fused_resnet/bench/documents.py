"""Benchmark results as data: where files lie, how they are read, checked and added to.

A file has one of three schemas, named in its `schema`:

- "fused_resnet.results/2", whole models: documented at `fused_resnet.compare.document`.
- "fused_resnet.kernels/1", layers: documented at `fused_resnet.bench.kernels.document`.
- "fused_resnet.predicted/3", predictions: documented in `fused_resnet/bench/predict.py`.

All are strict JSON, start with what `environment.provenance` gives (predictions, which no device
made, with "kind": "prediction") and hold a list: `cases`, or `networks` for predictions. A schema's
number changes when a field changes its meaning or goes; `load` reads the older
"fused_resnet.results/1", whose files lack telemetry and energy, as the newer one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import compare, environment
from ..inputs import InvalidArgumentError

MODELS = compare.SCHEMA
KERNELS = "fused_resnet.kernels/1"
PREDICTED = "fused_resnet.predicted/3"
_OLD_MODELS = "fused_resnet.results/1"
# What tells one case of a file from another.
_KEYS = ("model", "batch", "dtype", "device", "mode", "threads")


def load(path: Path, schemas: Iterable[str] = (MODELS, KERNELS, PREDICTED)) -> dict[str, Any]:
    """A result file's content.

    Raises:
        InvalidArgumentError: it cannot be read, is no JSON, or has none of the schemas.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise InvalidArgumentError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise InvalidArgumentError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict):
        raise InvalidArgumentError(f"{path} is no result file: its JSON is not an object")
    if content.get("schema") == _OLD_MODELS:
        _upgrade(content)
    wanted = tuple(schemas)
    schema = content.get("schema")
    if schema not in wanted:
        known = " or ".join(map(repr, wanted))
        raise InvalidArgumentError(f"{path}: schema is {schema!r}, must be {known}")
    if not content.get("networks" if schema == PREDICTED else "cases"):
        raise InvalidArgumentError(f"{path} has no results in it")
    return content


def _upgrade(content: dict[str, Any]) -> None:
    content["schema"] = MODELS
    for case in content.get("cases", ()):
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
    """Writes a file, complete or not at all, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    compare.write_json(content, path)


def add(content: dict[str, Any], path: Path) -> None:
    """Writes `content`, and keeps what the file has of other cases of the same software.

    So several runs of one day, commit and device become one file. A case that was measured again
    is replaced. A file of other versions is overwritten.
    """
    old = None
    if path.exists():
        old = load(path)
    same = ("schema", "commit", "versions", "device")
    if old is not None and all(old[key] == content[key] for key in same):
        cases = {_key(case): case for case in [*old["cases"], *content["cases"]]}
        commands = dict.fromkeys([*old["command"].split(" && "), content["command"]])
        content = {**content, "cases": list(cases.values()), "command": " && ".join(commands)}
    save(content, path)


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
