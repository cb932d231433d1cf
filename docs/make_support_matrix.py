"""Writes support.md from the test suite's own parametrisation: what is not tested is not in it.

    python docs/make_support_matrix.py

Nothing is run: the test files are imported, and the marks of their functions read.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
SUPPORT = DOCS / "support.md"
MEASURED = DOCS.parent / "bench" / "other_libraries.json"

NETWORKS = {
    "torchvision's networks": ("modules.test_models", "name", ["test_inference", "test_gradients"]),
    "Variants of torchvision's blocks and stem": (
        "modules.test_models",
        "variant",
        ["test_variants", "test_gradients_of_variants"],
    ),
    "timm's networks": (
        "modules.test_timm",
        "name",
        ["test_models_in_evaluation", "test_models_in_training"],
    ),
    "Variants of timm's blocks and stem": ("modules.test_timm", "variant", ["test_variants"]),
    "CIFAR networks": (
        "modules.test_cifar",
        "variant",
        ["test_inference_by_the_error_rule", "test_gradients_in_float64"],
    ),
    "Pre-activation blocks, other residual blocks, DenseNet": (
        "modules.test_families",
        "network",
        ["test_in_evaluation", "test_gradients_and_statistics", "test_tracers"],
    ),
    "Activations besides ReLU": (
        "modules.test_activations",
        "act",
        ["test_in_evaluation", "test_gradients_and_statistics"],
    ),
    "Networks of such activations": (
        "modules.test_activations",
        "name",
        ["test_networks", "test_networks_in_training"],
    ),
    "Detection and segmentation": (
        "modules.test_detection",
        "name",
        ["test_backbones_of_detectors", "test_segmentation"],
    ),
}
"""Of each section: a file, the parameter that names a network, and the tests that have it."""

EAGER = {
    "modules.test_timm": "test_the_report_names_what_stays_eager",
    "modules.test_families": "test_the_report_names_what_stays_eager",
}
UNFUSED = ("modules.test_surgery", "test_the_report_explains_what_runs_unfused")
TOOLS = ["modules.test_tracing", "modules.test_compiled"]


def main() -> None:
    """Writes the file."""
    SUPPORT.write_text(text())


def text() -> str:
    """The whole file."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    parts = [
        "# What is supported\n\n"
        "Written by `docs/make_support_matrix.py` from the parametrisation of the test suite: each "
        "entry is a test\nthat compares the fused network with the unfused one.\n"
    ]
    for title, (file, argument, tests) in NETWORKS.items():
        parts.append(f"## {title}\n\n{_network_table(file, argument, tests)}")
    parts.append(f"## Other libraries' networks\n\n{_other_libraries()}")
    parts.append(
        "## Parts of a fused block that stay eager\n\n"
        "The rest of the block is fused. The reason is the one `report` gives.\n\n"
        + _table(["network", "mode", "reason"], _eager_rows())
    )
    parts.append(
        "## What keeps a block from being fused\n\n"
        "It then runs as before; `report` names the part, with the word given here.\n\n"
        + _table(["change", "word"], [(row[0], row[2]) for row in _cases(*UNFUSED)])
    )
    rows = [(_words(name), _first_line(test)) for f in TOOLS for name, test in _tests(f)]
    parts.append("## Compilers, tracers and transforms\n\n" + _table(["", ""], rows))
    return "\n".join(parts)


def _other_libraries() -> str:
    """What `bench/other_libraries.py` measured."""
    measured = json.loads(MEASURED.read_text())
    size = measured["size"]
    rows = [
        (
            row["library"],
            row["model"],
            f"{row['fused']} of {row['convolutions']}",
            f"{row['fused_ms'] / row['eager_ms']:.2f}",
        )
        for row in measured["networks"]
    ]
    return (
        "Convolutions that run with the norm behind them, of all, and the time of an inference "
        f"pass by eager's:\nfloat32, batch 1, {size} x {size} pixels, one thread of an "
        f"{measured['processor']}, torch {measured['torch']}, commit {measured['commit']},\n"
        f"{measured['date']}, by `bench/other_libraries.py`, the last of the runs, which "
        "other work may have disturbed.\n"
        "How these are known is in [other_networks.md](other_networks.md).\n\n"
        + _table(["library", "model", "fused", "time"], rows)
    )


def _network_table(file: str, argument: str, tests: list[str]) -> str:
    found = {test: _parameters(file, test) for test in tests}
    found = {test: parameters for test, parameters in found.items() if argument in parameters}
    rows: dict[str, list[str]] = {}
    for parameters in found.values():
        for network in parameters[argument]:
            rows.setdefault(network, [])
    for parameters in found.values():
        others = [v for name, v in parameters.items() if name != argument]
        cell = "; ".join(", ".join(values) for values in others) or "yes"
        for network, cells in rows.items():
            cells.append(cell if network in parameters[argument] else "")
    return _table(["", *map(_words, found)], [(network, *cells) for network, cells in rows.items()])


def _eager_rows() -> Iterator[tuple[str, str, str]]:
    for file, test in EAGER.items():
        library = "timm, " if file == "modules.test_timm" else ""
        for network, mode, _, reason in _cases(file, test):
            if reason:
                yield library + network, mode, reason


def _parameters(file: str, test: str) -> dict[str, list[str]]:
    """The values of each parameter of a test, as text, outermost first."""
    parameters = {}
    for mark in _marks(file, test):
        names, values = mark.args[:2]
        if isinstance(names, str) and "," not in names:
            ids = mark.kwargs.get("ids")
            parameters[names] = [_text(_plain(value), ids, i) for i, value in enumerate(values)]
    return parameters


def _cases(file: str, test: str) -> list[tuple]:
    """The rows of a test whose parameters come together."""
    (mark,) = _marks(file, test)
    return [_plain(row) for row in mark.args[1]]


def _plain(value: Any) -> Any:
    """What `pytest.param` holds, without its marks: a value, or a row of them."""
    values = getattr(value, "values", None)
    if not isinstance(values, tuple):
        return value
    return values[0] if len(values) == 1 else values


def _marks(file: str, test: str) -> list[Any]:
    function = getattr(importlib.import_module(file), test)
    return [mark for mark in function.pytestmark if mark.name == "parametrize"]


def _tests(file: str) -> Iterator[tuple[str, Callable]]:
    for name, value in vars(importlib.import_module(file)).items():
        if name.startswith("test_") and callable(value):
            yield name, value


def _text(value: object, ids: object, index: int) -> str:
    if isinstance(ids, list | tuple):
        return str(ids[index])
    name = ids(value) if callable(ids) else None
    return str(getattr(value, "__name__", value) if name is None else name)


def _first_line(test: Callable) -> str:
    return (test.__doc__ or "").strip().partition("\n")[0]


def _words(name: str) -> str:
    return name.removeprefix("test_").replace("_", " ")


def _table(head: list[str], rows: Any) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
