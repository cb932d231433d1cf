"""The report: one HTML page without references to anything outside it, and its plots as PNG.

The same data gives the same bytes.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import files
from . import documents, kernels
from .documents import writing
from .errors import InvalidArgumentError, first_line
from .text import error_text, kept_text

_STYLE = """
:root { color: #222; background: #fff; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 3rem; border-bottom: 1px solid #ccc; }
h3 { margin-top: 2rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; }
td { white-space: nowrap; } th.text, td.text { text-align: left; }
thead th { border-bottom: 2px solid #999; vertical-align: bottom; }
tr.ours td { font-weight: 600; } .bad { color: #b00020; }
.caption { color: #555; font-size: .9rem; }
.prediction { border: 2px dashed #b00020; padding: .3rem 1rem; }
summary { cursor: pointer; margin: 1rem 0; } code { font-size: .85em; overflow-wrap: anywhere; }
"""
# Columns of words, which are set to the left.
_TEXTS = ("candidate", "layer", "all layers", "GPU", "network")
_TITLES = {
    documents.MODELS: "Whole models",
    documents.KERNELS: "Layer by layer",
    documents.PREDICTED: "GPUs: predicted, not measured",
}


def default_files() -> list[Path]:
    """The repository's newest results of every device, and its predictions."""
    root = documents.repository()
    if root is None:
        return []
    results = root / "bench" / "results"
    found = documents.newest(results, documents.MODELS)
    found += documents.newest(results, documents.KERNELS)
    predicted = results / "static" / "predicted.json"
    return [*found, *([predicted] if predicted.exists() else [])]


def write(
    documents_read: Sequence[tuple[Path, Mapping[str, Any]]],
    page: Path,
    folder: Path | None = None,
) -> list[Path]:
    """Writes the page, and the plots into a folder if one is given.

    Args:
        documents_read: paths and what `documents.load` made of them.
        page: the HTML file.
        folder: for the PNG files; made if it is not there.

    Returns:
        What was written.

    Raises:
        InvalidArgumentError: matplotlib is not installed, it cannot draw what a file holds, or
            something cannot be written.
    """
    sections, plots = [], {}
    for path, content in documents_read:
        try:
            drawn = dict(figures(content))
        except InvalidArgumentError:
            raise
        except (ValueError, ArithmeticError, MemoryError, RuntimeError) as error:
            # More rows than a picture can have, say.
            raise InvalidArgumentError(f"{path} cannot be drawn: {first_line(error)}") from None
        sections.append(_section(path, content, drawn))
        for name, data in drawn.items():
            plots[f"{_slug(path.stem)}-{name}.png"] = data
    outputs = {page: _page("\n".join(sections)).encode()}
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        outputs |= {folder / name: data for name, data in plots.items()}
    for path, data in outputs.items():
        with writing(path):
            files.replace(path, data)
    return list(outputs)


def figures(content: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """Every plot of a file, as a name and a PNG."""
    from . import page_plots

    caption = where(content)
    if content["schema"] == documents.MODELS:
        cases = [c for c in content["cases"] if any(one["latency_ms"] for one in c["candidates"])]
        if cases:
            yield (
                "speed-up",
                page_plots.png(page_plots.model_speedups(cases, "Speed-up over eager", caption)),
            )
        memory = page_plots.model_memory(cases, "Peak memory", caption) if cases else None
        if memory is not None:
            yield "memory", page_plots.png(memory)
    elif content["schema"] == documents.KERNELS:
        for case in content["cases"]:
            what, name = _case_title(case), _slug(_case_title(case))
            for kind, title, draw in (
                ("roofline", "Roofline", page_plots.roofline),
                ("shares", "How far from the hardware", page_plots.layer_shares),
                ("speed-up", "Speed-up over eager", page_plots.layer_speedups),
            ):
                if kind == "roofline" and case.get("mode") == "training":
                    continue  # norms have no products to draw a rate of
                yield f"{name}-{kind}", page_plots.png(draw(case, f"{title}: {what}", caption))
    else:
        for model in dict.fromkeys(network["model"] for network in content["networks"]):
            networks = [network for network in content["networks"] if network["model"] == model]
            title = f"PREDICTED, not measured: {model}, {networks[0]['dtype']}"
            yield (
                _slug(model),
                page_plots.png(page_plots.predicted_speedups(networks, title, caption)),
            )


def where(content: Mapping[str, Any]) -> str:
    """Device, versions, commit and date of a file, in one line."""
    if content["schema"] == documents.PREDICTED:
        return (
            "predicted from published figures by fused_resnet/tuning/estimate.py; nothing was run"
        )
    device = content["device"]
    parts = [device["name"]]
    if device["type"] == "cpu":
        threads = sorted({case["threads"] for case in content["cases"]})
        plural = "" if threads == [1] else "s"
        parts.append(f"{' and '.join(map(str, threads))} thread{plural}")
    elif device.get("driver"):
        parts.append(f"driver {device['driver']}")
    parts += [f"torch {content['versions']['torch']}", f"commit {content['commit'] or 'unknown'}"]
    return ", ".join([*parts, content["date"][:10]])


def answer(case: Mapping[str, Any]) -> str:
    """Whether the fused model is faster, in a sentence."""
    training = ", training step" if case["mode"] == "training" else ""
    what = f"{_case_title(case)}{training}"
    times = {
        one["name"]: one["latency_ms"]["median"] for one in case["candidates"] if one["latency_ms"]
    }
    ours = {name: time for name, time in times.items() if name.startswith("fused")}
    others = {name: time for name, time in times.items() if name not in ours}
    if not ours or not others:
        return f"{what}: not measured."
    own, other = min(ours, key=ours.__getitem__), min(others, key=others.__getitem__)
    text = f"{what}: {own} takes {ours[own]:.3g} ms"
    if "eager" in others:
        text += f", {others['eager'] / ours[own]:.2f} times as fast as eager"
    if other != "eager":
        text += f"; the fastest other, {other}, takes {others[other]:.3g} ms"
    return text + "."


def _page(body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fused_resnet: benchmarks</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        "<h1>fused_resnet: benchmarks</h1>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _section(path: Path, content: Mapping[str, Any], drawn: Mapping[str, bytes]) -> str:
    parts = [f"<h2>{_TITLES[content['schema']]}</h2>"]
    caption = html.escape(where(content))
    if content["schema"] == documents.PREDICTED:
        parts.append(
            f'<p class="prediction">These are predictions: {caption}. The library\'s convolutions '
            "are taken to be as good as these kernels, so the ratios show what fusing saves. The "
            "kernel per Bottleneck does not exist yet.</p>"
        )
        parts += [_image(name, data) for name, data in drawn.items()]
        parts.append(_predicted_table(content))
        return "\n".join(parts)
    source = f"{html.escape(path.name)}, by <code>{html.escape(content['command'])}</code>"
    parts.append(f'<p class="caption">{caption}. Data: {source}.</p>')
    if content["schema"] == documents.MODELS:
        parts.append(
            "<p>Candidates take turns in one process, on the same weights and images. Medians; "
            "p10 to p90 is the spread. Errors are relative to float64; what is wrong is not timed."
            "</p>"
        )
        answers = "".join(f"<li>{html.escape(answer(case))}</li>" for case in content["cases"])
        parts.append(f"<ul>{answers}</ul>")
        parts += [_image(name, data) for name, data in drawn.items()]
        parts += [_model_table(case) for case in content["cases"]]
        return "\n".join(parts)
    parts.append(
        "<p>The roofline is the time that moving each tensor once, and the products, would take at "
        "the speed of a copy and of a matrix product measured in the same run. A candidate may "
        "exceed it where a cache or a faster algorithm (Winograd) helps. Where the CPU has a "
        "matrix unit, a layer's share of it is the time its products alone would take there.</p>"
    )
    for case in content["cases"]:
        title = _case_title(case)
        parts.append(f"<h3>{html.escape(title)}</h3>")
        if unit := kernels.unit_text(case):
            parts.append(f'<p class="caption">{html.escape(unit)}.</p>')
        parts.append(_summary_table(case))
        mine = _slug(title) + "-"
        parts += [_image(name, data) for name, data in drawn.items() if name.startswith(mine)]
        parts.append(_layer_table(case))
    return "\n".join(parts)


def _image(name: str, data: bytes) -> str:
    encoded = base64.b64encode(data).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/png;base64,{encoded}">'


def _table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table; each row has a CSS class and its cells."""
    kinds = [' class="text"' if cell in _TEXTS else "" for cell in head]
    cells = "".join(
        f"<th{kind}>{html.escape(cell)}</th>" for kind, cell in zip(kinds, head, strict=True)
    )
    lines = [f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>']
    for style, row in rows:
        cells = "".join(
            f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True)
        )
        lines.append(f'<tr class="{style}">{cells}</tr>')
    return "\n".join([*lines, "</tbody></table></div>"])


def _model_table(case: Mapping[str, Any]) -> str:
    rows = []
    for one in case["candidates"]:
        taken, peak, joules = one["latency_ms"], one["peak_memory_bytes"], one["energy_joules"]
        error = one["gradient_error" if case["mode"] == "training" else "error"]
        if taken is None:
            reason = one["skipped"] or "wrong, not timed"
            rows.append(("bad", [one["name"], reason, *[""] * 6, error_text(error)]))
            continue
        cells = [
            one["name"], f"{taken['median']:.2f}", f"{taken['p10']:.2f} to {taken['p90']:.2f}",
            f"{one['images_per_second']:.1f}", f"{one['ratio_to_eager']:.2f}",
            "-" if peak is None else f"{peak / 2**20:.0f}", kept_text(one, case),
            "-" if joules is None else f"{joules / case['batch']:.3g}", error_text(error),
        ]  # fmt: skip
        rows.append(("ours" if one["name"].startswith("fused") else "", cells))
    head = (
        "candidate", "median, ms", "p10 to p90, ms", "images/s", "time / eager", "peak memory, MiB",
        "kept for backward, MiB per image", "J per image", "error",
    )  # fmt: skip
    training = ", training step" if case["mode"] == "training" else ""
    return f"<h3>{html.escape(_case_title(case))}{training}</h3>\n{_table(head, rows)}"


def _summary_table(case: Mapping[str, Any]) -> str:
    rows = []
    totals = kernels.totals(case)
    has_unit = kernels.unit_rate(case) is not None
    for name, total in totals.items():
        if total is None:
            rows.append(("bad", [name, "not all layers were timed", *[""] * (2 + has_unit)]))
            continue
        eager = totals.get("eager")
        ratio = f"{total.milliseconds / eager.milliseconds:.2f}" if eager else "-"
        cells = [name, f"{total.milliseconds:.2f}", ratio, f"{100 * total.roofline:.0f} %"]
        cells += [f"{100 * (total.unit or 0):.0f} %"] * has_unit
        rows.append(("ours" if name.startswith("fused") else "", cells))
    head = ["all layers", "sum of medians, ms", "time / eager", "of the roofline"]
    return _table(head + ["of the matrix unit"] * has_unit, rows)


def _layer_table(case: Mapping[str, Any]) -> str:
    rows = []
    unit, scale = kernels.flop_unit(case)
    has_unit = kernels.unit_rate(case) is not None
    for layer in [*case["layers"], *case.get("blocks", ())]:
        label, runs = layer["label"], str(layer["count"])
        for one in layer["candidates"]:
            taken = one["microseconds"]
            if taken is None:
                reason = f"{one['status']}: {one['reason']}"
                empty = [""] * (4 + has_unit)
                cells = [label, runs, one["name"], reason, *empty, error_text(one["error"])]
                rows.append(("bad", cells))
            else:
                cells = [
                    label, runs, one["name"], f"{taken['median']:.1f}",
                    f"{taken['p10']:.1f} to {taken['p90']:.1f}",
                    f"{one['gigabytes_per_second']:.4g}",
                    f"{scale * one['teraflops_per_second']:.3g}",
                    f"{100 * one['roofline']:.0f} %",
                    *([f"{100 * one['unit_share']:.0f} %"] if has_unit else []),
                    error_text(one["error"]),
                ]  # fmt: skip
                rows.append(("ours" if one["name"].startswith("fused") else "", cells))
            label = runs = ""
    head = (
        "layer", "runs", "candidate", "median, us", "p10 to p90, us", "GB/s", unit,
        "of the roofline", *["of the matrix unit"] * has_unit, "error",
    )  # fmt: skip
    return f"<details><summary>Every layer as a table</summary>\n{_table(head, rows)}\n</details>"


def _predicted_table(content: Mapping[str, Any]) -> str:
    rows = []
    for network in content["networks"]:
        times, moved = network["microseconds"], network["megabytes_per_image"]
        ways = ("eager", "compiled", "fused", "chain")
        cells = [network["gpu"], network["model"], str(network["batch"])]
        cells += [f"{times[way]:.0f}" for way in ways]
        cells += [f"{moved[way]:.0f}" for way in ("eager", "fused", "chain")]
        rows.append(("", cells))
    head = (
        "GPU", "network", "batch", "eager, us", "torch.compile, us", "fused, us",
        "per Bottleneck, us", "eager, MB per image", "fused, MB", "per Bottleneck, MB",
    )  # fmt: skip
    table = _table(head, rows)
    return f"<details open><summary>Predicted times as a table</summary>\n{table}\n</details>"


def _case_title(case: Mapping[str, Any]) -> str:
    training = ", norms in training" if case.get("mode") == "training" else ""
    return f"{case['model']}, batch {case['batch']}, {case['dtype']}{training}"


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text).strip("-").lower()
