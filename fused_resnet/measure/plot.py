"""Draws a comparison; needs matplotlib."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.figure

from .. import files

# Of all text that is not ours: a dollar sign in a name is no formula.
PLAIN = {"parse_math": False, "usetex": False}
INK = "#333333"
COLOURS = {"eager": "#9a9a9a", "fused": "#1f6fb4"}
OTHER_COLOUR = "#d9a441"


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Draws latency bars with their p10-to-p90 range, and the errors beside them, as a PNG.

    `document` is what `documents.document` returns; its cases are drawn below one another.

    Raises:
        OSError: the file cannot be written; it stays as it was.
    """
    cases = document["cases"]
    rows = [[c for c in case["candidates"] if c["latency_ms"]] for case in cases]
    heights = [1.3 + 0.55 * len(row) for row in rows]
    # Figure without pyplot: no backend is chosen and no global state changes.
    figure = matplotlib.figure.Figure(figsize=(9, sum(heights) + 0.6), layout="constrained")
    panels = figure.subplots(
        len(cases), 2, squeeze=False, width_ratios=(2, 1), height_ratios=heights
    )
    for case, row, (left, right) in zip(cases, rows, panels, strict=True):
        _latencies(left, case, row)
        _errors(right, case, row)
    device, versions = document["device"], document["versions"]
    threads = f", {cases[0]['threads']} threads" if device["type"] == "cpu" else ""
    figure.suptitle(
        f"{device['name']}{threads}, torch {versions['torch']}",
        fontsize=9,
        color=INK,
        x=0.01,
        ha="left",
        **PLAIN,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    files.replace(path, buffer.getvalue())


def _latencies(axes: Any, case: Mapping[str, Any], row: list[Mapping[str, Any]]) -> None:
    mode = "training step" if case["mode"] == "training" else "inference"
    axes.set_title(
        f"{case['model']}, batch {case['batch']}, {case['dtype']}, {mode}",
        fontsize=11,
        loc="left",
        **PLAIN,
    )
    longest = max(max(c["latency_ms"]["p90"], c["latency_ms"]["median"]) for c in row)
    for y, candidate in enumerate(row):
        latency = candidate["latency_ms"]
        median = latency["median"]
        axes.barh(y, median, height=0.6, color=COLOURS.get(candidate["name"], OTHER_COLOUR))
        axes.errorbar(
            median, y, xerr=[[median - latency["p10"]], [latency["p90"] - median]],
            color=INK, capsize=3, linewidth=1,
        )  # fmt: skip
        text = f"{median:.1f} ms   {candidate['ratio_to_eager']:.2f}"
        end = max(median, latency["p90"]) + 0.02 * longest
        axes.text(end, y, text, va="center", fontsize=9, color=INK)
    axes.set_xlim(0, 1.35 * longest)
    axes.set_xlabel("median latency in ms, p10 to p90; time / eager", fontsize=9)
    _finish(axes, [candidate["name"] for candidate in row])


def _errors(axes: Any, case: Mapping[str, Any], row: list[Mapping[str, Any]]) -> None:
    key = "gradient_error" if case["mode"] == "training" else "error"
    finite = [c[key] for c in row if c[key]]
    for y, candidate in enumerate(row):
        error = candidate[key]
        if error:
            colour = COLOURS.get(candidate["name"], OTHER_COLOUR)
            axes.plot(error, y, "o", color=colour, markersize=8)
            axes.annotate(
                f"{error:.1e}",
                (error, y),
                (0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=INK,
            )
    axes.set_xscale("log")
    if finite:
        axes.set_xlim(min(finite) / 10, max(finite) * 10)
    what = "gradient error" if key == "gradient_error" else "error"
    axes.set_xlabel(f"relative {what} against float64", fontsize=9)
    _finish(axes, [""] * len(row))


def _finish(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=10, **PLAIN)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8, colors=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
