"""Prints what is known of GPUs without one. Every table says that it is a prediction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import documents, schemas
from .errors import InvalidArgumentError
from .text import heading, plain

SCHEMA = "fused_resnet.static/1"
WAYS = ("eager", "compiled", "fused", "chain")


def print_networks(console: Console, content: Mapping[str, Any]) -> None:
    """Predicted time of whole networks."""
    table = Table(
        title="PREDICTED, nothing was measured: us per batch, in brackets MB per image",
        header_style="bold",
    )
    for column in ("GPU", "network"):
        table.add_column(column)
    table.add_column("batch", justify="right")
    for way in ("eager", "torch.compile", "fused", "one kernel per Bottleneck"):
        table.add_column(way, justify="right")
    table.add_column("eager /\nfused", justify="right")
    for network in content["networks"]:
        times, moved = network["microseconds"], network["megabytes_per_image"]
        cells = [
            f"{times[way]:.0f}" + (f" ({moved[way]:.0f})" if way in moved else "") for way in WAYS
        ]
        ratio = f"{times['eager'] / times['fused']:.2f}"
        table.add_row(network["gpu"], network["model"], str(network["batch"]), *cells, ratio)
    console.print(table)
    console.print(
        "A roofline model of published figures (fused_resnet/tuning/architecture.py cites them); "
        "the library's convolutions are taken to be as good as these kernels. One kernel per "
        "Bottleneck where that is predicted to be faster."
    )


def print_training(console: Console, content: Mapping[str, Any]) -> None:
    """Predicted time of training steps, and what their norms, adds and ReLUs move."""
    table = Table(
        title="PREDICTED, nothing was measured: training steps in ms, in brackets MB per image "
        "beside the convolutions",
        header_style="bold",
    )
    for column in ("GPU", "network"):
        table.add_column(column)
    table.add_column("batch", justify="right")
    for column in (
        "eager", "torch.compile", "fused", "norms at\nconvolutions' ends", "eager /\nthese",
        "torch.compile /\nthese",
        "least of copy,\nforward", "backward",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for step in content["training"]:
        times, moved = step["microseconds"], step["megabytes_per_image"]
        cells = [f"{times[how] / 1e3:.1f} ({moved[how]:.0f})" for how in moved]
        cells.append(f"{times['with_ends'] / 1e3:.1f}")
        cells += [f"{times[how] / times['with_ends']:.2f}" for how in ("eager", "compile")]
        for direction in ("forward", "backward"):
            least = min(n[f"{direction}_share_of_copy_bandwidth"] for n in step["norms"])
            cells.append(f"{100 * least:.0f} %")
        table.add_row(step["gpu"], step["model"], str(step["batch"]), *cells)
    console.print(table)
    console.print(
        "By byte counts (fused_resnet/measure/predict_training.py): the same convolutions for all. "
        "The last columns are of the norm that is furthest from it."
    )


def print_layers(console: Console, network: Mapping[str, Any]) -> None:
    """Predicted time of a network's layers on one GPU."""
    title = f"PREDICTED: {network['gpu']}, {network['model']}, batch {network['batch']}"
    table = Table(title=f"{title}, {network['dtype']}", header_style="bold")
    table.add_column("layer")
    for column in ("runs", "MB", "GFLOP", "eager\nus", "fused\nus", "of copy", "of matrix"):
        table.add_column(column, justify="right")
    for layer in network["layers"]:
        table.add_row(
            layer["problem"].partition(" ")[2], str(layer["count"]), f"{layer['megabytes']:.2f}",
            f"{layer['gigaflops']:.2f}", f"{layer['eager_microseconds']:.1f}",
            f"{layer['microseconds']:.1f}", f"{100 * layer['share_of_copy_bandwidth']:.0f} %",
            f"{100 * layer['share_of_matrix_rate']:.0f} %",
        )  # fmt: skip
    for block in network["chains"]:
        table.add_row(
            f"{block['problem'].partition(' ')[2]}: {block['choice']}", str(block["count"]),
            f"{block['megabytes']:.2f}", f"{block['gigaflops']:.2f}", "",
            f"{block['microseconds']:.1f}", "", "",
        )  # fmt: skip
    console.print(table)


def print_resources(console: Console, path: Path | None) -> None:
    """What the compiler made of every kernel: ranges over its tiles, per architecture."""
    paths = [path] if path is not None else resource_files()
    if not paths:
        console.print(
            "compiler's resources: not here; `python bench/triton_resources.py` of the repository"
        )
    for one in paths:
        content = load_resources(one)
        table = Table(title=heading(f"The compiler's resources: {one.name}"), header_style="bold")
        for column in ("kernel", "architecture", "dtype"):
            table.add_column(column)
        for column in ("tiles", "registers", "spilled\nbytes", "shared\nKiB", "occupancy\n%"):
            table.add_column(column, justify="right")
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
        for entry in content["entries"]:
            groups[entry["kernel"], entry["architecture"], entry["dtype"]].append(entry)
        for key, entries in groups.items():
            table.add_row(
                *map(plain, key), str(len(entries)), _range(entries, "registers"),
                _range(entries, "spilled_bytes"), _range(entries, "shared_bytes", 1 / 1024),
                _range(entries, "occupancy", 100),
            )  # fmt: skip
        console.print(table)


def resource_files() -> list[Path]:
    """The repository's reports of what its kernels compile to."""
    root = documents.repository()
    if root is None:
        return []
    found = sorted((root / "bench" / "results" / "static").glob("*.json"))
    return [path for path in found if _schema(documents.read_json(path)) == SCHEMA]


def load_resources(path: Path) -> dict[str, Any]:
    """A report of compiled kernels.

    Raises:
        InvalidArgumentError: it cannot be read, or is none.
    """
    content = documents.read_json(path)
    error = None
    if _schema(content) == SCHEMA and (error := schemas.error(content, schemas.RESOURCES)) is None:
        return content
    reason = f"is no file of {SCHEMA!r}" if error is None else f"is damaged: {error}"
    raise InvalidArgumentError(f"--resources is {str(path)!r}, which {reason}")


def _schema(content: Any) -> Any:
    return content.get("schema") if isinstance(content, dict) else None


def _range(entries: list[dict[str, Any]], key: str, scale: float = 1) -> str:
    values = [scale * entry[key] for entry in entries if key in entry]
    if not values:
        return "-"
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low} to {high}"
