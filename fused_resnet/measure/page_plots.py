"""Plots of benchmark results, as matplotlib figures; matplotlib is imported here and nowhere else.

Colours are those of Okabe and Ito, which colour-blind readers can tell apart; markers differ too.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import InvalidArgumentError
from .kernels import flop_unit, unit_rate

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    from .plot import PLAIN
except ImportError:
    raise InvalidArgumentError(
        'plots need matplotlib, which is not installed: pip install "fused_resnet[bench]"'
    ) from None

INK = "#333333"
FAINT = "#dddddd"
_PREFERRED = {
    "eager": "#8c8c8c",
    "torch.compile": "#E69F00",
    "oneDNN, fused": "#D55E00",
    "cuDNN, fused": "#D55E00",
    "OpenVINO": "#009E73",
    "ONNX Runtime": "#CC79A7",
    "CUDA graph": "#009E73",
    "torch.compile, frozen": "#D55E00",
    "compiled": "#E69F00",
    "chain": "#009E73",
}
_FUSED = ("#0072B2", "#56B4E9", "#000000")
_REST = ("#F0E442", "#a6761d", "#CC79A7", "#009E73", "#D55E00")
_MARKERS = "oDs^vPX*<>"
_DPI = 150


def png(figure: Figure) -> bytes:
    """The figure as a PNG, the same bytes for the same data."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png", metadata={"Software": None})
    return buffer.getvalue()


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each candidate; blue is ours."""
    free = [colour for colour in _REST if colour not in {_PREFERRED.get(name) for name in names}]
    ours = list(_FUSED)
    found = {}
    for at, name in enumerate(names):
        colour = _PREFERRED.get(name)
        if colour is None and name.startswith("fused"):
            colour = ours.pop(0) if ours else None
        colour = colour or (free.pop(0) if free else "#444444")
        found[name] = (colour, _MARKERS[at % len(_MARKERS)])
    return found


def roofline(case: Mapping[str, Any], title: str, caption: str) -> Figure:
    """The classic picture: every timed layer below the ceilings of copy and matrix product."""
    figure, axes = _figure(8.5, 5.6, title, caption)
    limits = case["ceilings"]
    unit, scale = flop_unit(case)
    rate = scale * limits["teraflops_per_second"]
    bandwidth = scale * limits["copy_gigabytes_per_second"] / 1e3
    names = _names(layer["candidates"] for layer in case["layers"])
    style = styles(names)
    intensities: list[float] = []
    rates = [rate]
    for name in names:
        points = [
            (layer["flops"] / layer["bytes"], scale * one["teraflops_per_second"])
            for layer in case["layers"]
            for one in layer["candidates"]
            if one["name"] == name and one["microseconds"]
        ]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        intensities += x
        rates += y
        colour, marker = style[name]
        axes.plot(
            x, y, marker, color=colour, markersize=6, alpha=0.8, label=name, mec="white", mew=0.5
        )
    corner = rate / bandwidth
    low, high = min([*intensities, corner]) / 2, max([*intensities, corner]) * 1.5
    copy = limits["copy_gigabytes_per_second"]
    ceiling = f"copy {copy:.3g} GB/s, matrix product {rate:.3g} {unit}"
    axes.plot(
        [low, corner, high], [low * bandwidth, rate, rate], color=INK, linewidth=1.4, label=ceiling
    )
    if (of_unit := unit_rate(case)) is not None:
        tiles = scale * of_unit
        rates.append(tiles)
        label = f"matrix unit, from the first-level cache {tiles:.4g} {unit}"
        axes.axhline(tiles, color=INK, linewidth=1.0, linestyle=":", label=label)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(min([*rates, low * bandwidth]) / 1.5, max(rates) * 1.7)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    axes.set_xlabel("FLOP per byte, each tensor moved once")
    axes.set_ylabel(unit)
    axes.grid(True, which="both", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    _legend(axes)
    return figure


def layer_shares(case: Mapping[str, Any], title: str, caption: str) -> Figure:
    """Every layer's share of the roofline, candidate by candidate."""
    return _dots(
        case, title, caption, "share of the roofline measured in this run, %",
        lambda one: 100 * one["roofline"], mark=100,
    )  # fmt: skip


def layer_speedups(case: Mapping[str, Any], title: str, caption: str) -> Figure:
    """How many times as fast as eager every layer is."""
    return _dots(
        case, title, caption, "times as fast as eager",
        lambda one: one["ratio_to_eager"] and 1 / one["ratio_to_eager"], mark=1, without=("eager",),
    )  # fmt: skip


def model_speedups(cases: Sequence[Mapping[str, Any]], title: str, caption: str) -> Figure:
    """Bars: how many times as fast as eager, by case and candidate."""
    return _bars(
        cases, title, caption, "times as fast as eager (medians; eager is 1)",
        lambda one: 1 / one["ratio_to_eager"] if one["ratio_to_eager"] else None,
        lambda value, one: f"{value:.2f}   {_milliseconds(one['latency_ms']['median'])}",
        mark=1,
    )  # fmt: skip


def model_memory(cases: Sequence[Mapping[str, Any]], title: str, caption: str) -> Figure | None:
    """Bars: peak memory above model and input; None where none was measured."""
    measured = [
        case for case in cases if any(one["peak_memory_bytes"] for one in case["candidates"])
    ]
    if not measured:
        return None
    return _bars(
        measured, title, caption, "peak memory above model and input, MiB",
        lambda one: None if one["peak_memory_bytes"] is None else one["peak_memory_bytes"] / 2**20,
        lambda value, one: f"{value:.0f} MiB",
    )  # fmt: skip


def predicted_speedups(networks: Sequence[Mapping[str, Any]], title: str, caption: str) -> Figure:
    """Bars: predicted times as fast as eager, by GPU and way; one panel a batch size."""
    batches = sorted({network["batch"] for network in networks})
    gpus = list(dict.fromkeys(network["gpu"] for network in networks))
    ways = {"compiled": "torch.compile", "fused": "fused", "chain": "one kernel per Bottleneck"}
    figure = Figure(figsize=(10.5, 1.7 + 0.62 * len(gpus)), layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, sharex=True, squeeze=False)[0]
    style = styles(list(ways))
    for panel, batch in zip(panels, batches, strict=True):
        found = {n["gpu"]: n["microseconds"] for n in networks if n["batch"] == batch}
        for at, way in enumerate(ways):
            for row, gpu in enumerate(gpus):
                if gpu not in found:
                    continue
                value = found[gpu]["eager"] / found[gpu][way]
                y = row + 0.27 * (at - 1)
                panel.barh(
                    y, value, height=0.25, color=style[way][0],
                    label=ways[way] if row == 0 else None, hatch="//", edgecolor="white",
                )  # fmt: skip
                panel.text(value + 0.03, y, f"{value:.2f}", va="center", fontsize=8, color=INK)
        panel.axvline(1, color=INK, linewidth=0.8)
        panel.set_title(f"batch {batch}", fontsize=10, loc="left", color=INK, **PLAIN)
        _finish(panel, gpus)
    longest = max(n["microseconds"]["eager"] / n["microseconds"][w] for n in networks for w in ways)
    panels[0].set_xlim(0, 1.15 * longest)
    panels[len(panels) // 2].set_xlabel("predicted times as fast as eager", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=3, fontsize=9, frameon=False)
    _head(figure, title, caption)
    return figure


def _figure(width: float, height: float, title: str, caption: str) -> tuple[Figure, Any]:
    # Figure without pyplot: no backend is chosen and no global state changes.
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    _head(figure, title, caption)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9, colors=INK)
    return figure, axes


def _head(figure: Figure, title: str, caption: str) -> None:
    figure.suptitle(title, fontsize=11.5, color=INK, x=0.01, ha="left", **PLAIN)
    figure.supxlabel(caption, fontsize=8, color="#666666", x=0.01, ha="left", **PLAIN)


def _legend(axes: Any) -> None:
    """Above the axes, below the title."""
    if axes.get_legend_handles_labels()[0]:
        legend = axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=9, frameon=False,
            handletextpad=0.4, columnspacing=1.5,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set(**PLAIN)


def _dots(
    case: Mapping[str, Any], title: str, caption: str, axis: str, value: Any, mark: float,
    without: Sequence[str] = (),
) -> Figure:  # fmt: skip
    """A line a layer, a marker a candidate."""
    layers = case["layers"]
    names = _names(layer["candidates"] for layer in layers)
    style = styles(names)
    figure, axes = _figure(9, 1.9 + 0.3 * len(layers), title, caption)
    highest, lowest = float(mark), float(mark)
    for name in names:
        if name in without:
            continue
        points = [
            (value(one), row)
            for row, layer in enumerate(layers)
            for one in layer["candidates"]
            if one["name"] == name and one["microseconds"] and value(one)
        ]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        highest, lowest = max(highest, *x), min(lowest, *x)
        colour, marker = style[name]
        axes.plot(
            x, y, marker, color=colour, markersize=7, alpha=0.9, label=name, mec="white", mew=0.6
        )
    for row, layer in enumerate(layers):
        failed = [one for one in layer["candidates"] if not one["microseconds"]]
        text = "\n".join(f"{one['name']}: {one['status']}" for one in failed)
        axes.text(
            1.01, row, text, transform=axes.get_yaxis_transform(), fontsize=7.5, color="#b00020",
            va="center", **PLAIN,
        )  # fmt: skip
    labels = [
        f"{layer['label']}" + (f"  ({layer['count']} of them)" if layer["count"] > 1 else "")
        for layer in layers
    ]
    axes.axvline(mark, color=INK, linewidth=1)
    axes.hlines(
        range(len(layers)),
        0,
        1,
        transform=axes.get_yaxis_transform(),
        color=FAINT,
        lw=0.7,
        zorder=0,
    )
    axes.set_xlim(0, 1.05 * highest)
    axes.set_xlabel(axis, fontsize=9.5, color=INK)
    _finish(axes, labels)
    _legend(axes)
    return figure


def _bars(
    cases: Sequence[Mapping[str, Any]], title: str, caption: str, axis: str, value: Any, text: Any,
    mark: float | None = None,
) -> Figure:  # fmt: skip
    """A panel a case, a bar a candidate."""
    names = _names(case["candidates"] for case in cases)
    style = styles(names)
    rows = [[one for one in case["candidates"] if not one["skipped"]] for case in cases]
    rows = [row or case["candidates"][:1] for row, case in zip(rows, cases, strict=True)]
    heights = [0.55 + 0.34 * len(row) for row in rows]
    figure = Figure(figsize=(9, 1.1 + sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(cases), 1, squeeze=False, sharex=True, gridspec_kw={"height_ratios": heights}
    )[:, 0]
    longest = max([value(one) or 0 for row in rows for one in row] + [mark or 0]) or 1
    for axes, case, row in zip(panels, cases, rows, strict=True):
        mode = ", training step" if case["mode"] == "training" else ""
        label = f"{case['model']}, batch {case['batch']}, {case['dtype']}{mode}"
        axes.set_title(label, fontsize=10, loc="left", color=INK, **PLAIN)
        for y, one in enumerate(row):
            length = value(one)
            if length is None:
                missing = "wrong, not timed" if one["wrong"] else "not measured"
                axes.text(0.01 * longest, y, missing, va="center", fontsize=9, color="#b00020")
                continue
            axes.barh(y, length, height=0.68, color=style[one["name"]][0])
            label = text(length, one)
            axes.text(length + 0.012 * longest, y, label, va="center", fontsize=9, color=INK)
        if mark is not None:
            axes.axvline(mark, color=INK, linewidth=0.8)
        _finish(axes, [one["name"] for one in row])
    panels[0].set_xlim(0, 1.22 * longest)
    panels[-1].set_xlabel(axis, fontsize=9.5, color=INK)
    _head(figure, title, caption)
    return figure


def _finish(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names, fontsize=9, color=INK, **PLAIN)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="x", labelsize=8.5, colors=INK)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _names(lists: Any) -> list[str]:
    """Candidates in order of first appearance."""
    return list(dict.fromkeys(one["name"] for candidates in lists for one in candidates))


def _milliseconds(value: float) -> str:
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
