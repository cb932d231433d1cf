"""Writes what the documents say of speed and error, from the data under bench/results/.

    python bench/write_readme.py           # rewrite README.md, docs/results.md, docs/predictions.md
    python bench/write_readme.py --check   # exit 1 when one of them is not what the data says

Between their markers the README has one device's table and the other devices' ratios,
docs/results.md everything measured and docs/predictions.md what is predicted for GPUs. Each
device's folder contributes its newest files of models and of kernels, and
`bench/results/static/predicted.json` (written by `fused-resnet bench static`) the predictions.
docs/latency.png draws the README's table. The page with all plots is `fused-resnet bench
report`'s.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fused_resnet.measure import documents, kernels
from fused_resnet.measure.page import where
from fused_resnet.measure.text import kept_text

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FIGURE = ROOT / "docs" / "latency.png"
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- results: written by bench/write_readme.py from bench/results/ -->"
END = "<!-- end of results -->"

# The engines of the README's table; docs/results.md has the others too.
HEADLINE = ("eager", "torch.compile", "OpenVINO", "ONNX Runtime", "fused")


def headline(results: Path = RESULTS) -> str:
    """Latencies of whole models in inference: one device's as a table, the others' in short."""
    table, others = "There are no results yet.", []
    for index, document in enumerate(_headline_documents(results)):
        cases = _headline_cases(document)
        if index == 0:
            table = "\n".join([f"**{where(document)}**, ms:", "", *_table(cases, _time)])
        else:
            of_each = "; ".join(map(_ratios, cases))
            others.append(f"- **{where(document)}**, divided by eager's: {of_each}.")
    return "\n\n".join(part for part in (table, "\n".join(others)) if part)


def _ratios(case: Mapping[str, Any]) -> str:
    ran = [one for one in case["candidates"] if not one["skipped"] and not one["wrong"]]
    of_each = ", ".join(
        f"{one['name']} {one['ratio_to_eager']:.2f}" for one in ran if one["name"] != "eager"
    )
    return f"{case['model']}, batch {case['batch']}, {case['dtype']}: {of_each}"


def draw_headline(path: Path, results: Path = RESULTS) -> None:
    """The README's table as bars; nothing where there are no results."""
    from fused_resnet.measure import page_plots

    for document in _headline_documents(results)[:1]:
        title = "Inference, times as fast as eager"
        figure = page_plots.model_speedups(_headline_cases(document), title, where(document))
        path.write_bytes(page_plots.png(figure))


def _headline_documents(results: Path) -> list[dict[str, Any]]:
    """Each device's newest; first the one with most cases for the README, of these the newest."""
    found = sorted(_newest_inference(results), key=lambda one: -len(_headline_cases(one)))
    return [document for document in found if _headline_cases(document)]


def _headline_cases(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    cases = []
    for case in document["cases"]:
        # In eight bits the model of these columns is float32: docs/results.md has them all.
        if case["mode"] == "inference" and case["dtype"] != "int8":
            known = {one["name"]: one for one in case["candidates"]}
            kept = [known[name] for name in HEADLINE if name in known]
            cases.append({**case, "candidates": kept})
    return cases


def _newest_inference(results: Path) -> list[dict[str, Any]]:
    found = (documents.load(p) for p in documents.newest(results, documents.MODELS))
    kept = [d for d in found if any(case["mode"] == "inference" for case in d["cases"])]
    kept.sort(key=lambda document: document["date"])
    devices = {document["device"]["name"]: document for document in kept}
    return sorted(devices.values(), key=lambda document: document["date"], reverse=True)


def models_section(path: Path, root: Path = ROOT) -> str:
    """One device's whole models as Markdown: where they are from, times, memory, errors."""
    document = documents.load(path, [documents.MODELS])
    cases = document["cases"]
    modes = [
        [c for c in cases if c["mode"] == "inference" and c["dtype"] != "int8"],
        [c for c in cases if c["mode"] == "inference" and c["dtype"] == "int8"],
        [c for c in cases if c["mode"] == "training"],
    ]
    times = f"**{where(document)}.** Median latency in ms, in brackets the time divided by eager's."
    lines = [times, ""]
    for alike in filter(None, modes):
        lines += [*_table(alike, _time), ""]
    kept = [c for c in cases if any(one.get("kept_bytes") for one in c["candidates"])]
    if kept:
        lines += ["Kept for the backward pass, MiB an image:", "", *_table(kept, kept_text), ""]
    weighed = [c for c in cases if any(one["peak_memory_bytes"] for one in c["candidates"])]
    if weighed:
        lines += ["Peak memory above the model and its input, MiB:", ""]
        lines += [*_table(weighed, _memory), ""]
    for alike, what in zip(modes, ("logits", "logits", "gradients"), strict=True):
        if alike:
            lines += [f"Relative error of the {what} against float64:", "", *_table(alike, _error)]
            lines += [""]
    for reason in dict.fromkeys(
        f"{one['name']}, {case['dtype']}: not run ({one['skipped']})."
        for case in cases
        for one in case["candidates"]
        if one["skipped"]
    ):
        lines += [reason, ""]
    return "\n".join([*lines, _source(path, root, document["command"])])


def kernels_section(path: Path, root: Path = ROOT) -> str:
    """One device's layers as Markdown, summed over the network."""
    document = documents.load(path, [documents.KERNELS])
    parts = []
    for mode, title, what in (
        (
            "inference",
            "Layer by layer",
            "All convolution layers of the network, each with what follows it, timed one by one "
            "and summed, in ms; in brackets the share of the roofline measured in the same run.",
        ),
        (
            "training",
            "Batch norms in training",
            "All batch norms of the network with their adds and ReLUs, forward and backward, timed "
            "one by one and summed, in ms; in brackets the time divided by eager's.",
        ),
    ):
        cases = [case for case in document["cases"] if case.get("mode", "inference") == mode]
        if not cases:
            continue
        rows, ceilings = {}, []
        for case in cases:
            label = f"{case['model']}, batch {case['batch']}, {case['dtype']}"
            rows[label] = kernels.totals(case)
            limits = case["ceilings"]
            unit, scale = kernels.flop_unit(case)
            text = f"{limits['copy_gigabytes_per_second']:.1f} GB/s"
            if mode == "inference":
                text += f" and {scale * limits['teraflops_per_second']:.0f} {unit}"
                if (rate := kernels.unit_rate(case)) is not None:
                    text += f", matrix unit {scale * rate:.0f} {unit}"
            ceilings.append(f"{text} ({label})")
        names = list(dict.fromkeys(name for totals in rows.values() for name in totals))
        parts += [
            f"**{title}, {where(document)}.** {what}",
            "",
            "| | " + " | ".join(names) + " |",
            "| --- |" + " ---: |" * len(names),
        ]
        for label, totals in rows.items():
            cells = [_total(name, totals, mode) for name in names]
            parts.append(f"| {label} | " + " | ".join(cells) + " |")
        ceiling = "Roofline" if mode == "inference" else "Copy bandwidth"
        parts += ["", f"{ceiling}: {'; '.join(ceilings)}.", ""]
    return "\n".join([*parts, _source(path, root, document["command"])])


def predicted_section(path: Path, root: Path = ROOT) -> str:
    """What is predicted for GPUs, as Markdown that says so."""
    networks = documents.load(path, [documents.PREDICTED])["networks"]
    batches = sorted({network["batch"] for network in networks})
    dtype = networks[0]["dtype"]
    lines = [
        f"**GPUs: predicted, not measured**, {dtype}, channels_last. Time per batch in us, in "
        "brackets how many times as long eager and `torch.compile` are predicted to take, and how "
        "many times as long with Bottlenecks in one launch each, where that is predicted to pay.",
        "",
        "| | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "| --- |" + " ---: |" * len(batches),
    ]
    rows: dict[str, list[str]] = {}
    for network in sorted(networks, key=lambda network: network["batch"]):
        times = network["microseconds"]
        others = (f"{times[how] / times['fused']:.2f}" for how in ("eager", "compiled", "chain"))
        label = f"{network['gpu']}, {network['model']}"
        rows.setdefault(label, []).append(f"{times['fused']:.0f} ({', '.join(others)})")
    lines += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    source = path.relative_to(root)
    lines += [
        "",
        "A roofline model with published figures, in which the library's convolutions are as good "
        "as these kernels, so that the ratios are what fusing saves. Layer by layer: "
        f"{_link(path, root)}, made by `fused-resnet bench static --json {source}`.",
    ]
    return "\n".join(lines)


def training_section(path: Path) -> str:
    """What is predicted for training steps on GPUs, as Markdown that says so."""
    steps = documents.load(path, [documents.PREDICTED])["training"]
    batches = sorted({step["batch"] for step in steps})
    lines = [
        f"**Training on GPUs: predicted, not measured**, {steps[0]['dtype']} autocast, forward, "
        "backward and SGD. How many times as long eager and `torch.compile` are predicted to take, "
        "with the same convolutions in all; in brackets the least share of copy bandwidth that a "
        "norm of the network is predicted to reach, forward and backward, in Triton's three "
        "launches. Term by term, and what the CUDA backend's norms reach in one launch: "
        "[training.md](training.md).",
        "",
        "| | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "| --- |" + " ---: |" * len(batches),
    ]
    rows: dict[str, list[str]] = {}
    for step in sorted(steps, key=lambda step: step["batch"]):
        times = step["microseconds"]
        ours = min(times["fused"], times["with_ends"])
        least = (
            f"{100 * min(norm[f'{way}_share_of_copy_bandwidth'] for norm in step['norms']):.0f} %"
            for way in ("forward", "backward")
        )
        ratios = ", ".join(f"{times[how] / ours:.2f}" for how in ("eager", "compile"))
        cell = f"{ratios} ({', '.join(least)})"
        rows.setdefault(f"{step['gpu']}, {step['model']}", []).append(cell)
    lines += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    return "\n".join(lines)


def measured(results: Path = RESULTS, root: Path = ROOT) -> str:
    """Everything that devices measured."""
    sections = [models_section(p, root) for p in documents.newest(results, documents.MODELS)]
    sections += [kernels_section(p, root) for p in documents.newest(results, documents.KERNELS)]
    return "\n\n".join(sections) or "There are no results yet."


def predicted(results: Path = RESULTS, root: Path = ROOT) -> str:
    """Everything that a model of GPUs says."""
    path = results / "static" / "predicted.json"
    if not path.exists():
        return "There are no predictions yet."
    return f"{predicted_section(path, root)}\n\n{training_section(path)}"


def rewritten(document: str, text: str, name: str = "README.md") -> str:
    """The document with `text` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"{name} must have {BEGIN!r} and then {END!r}, once each")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def written() -> dict[Path, Callable[[], str]]:
    """The documents, each with what makes the part between its markers."""
    docs = README.parent / "docs"
    return {README: headline, docs / "results.md": measured, docs / "predictions.md": predicted}


def _link(path: Path, root: Path) -> str:
    source = path.relative_to(root)
    return f"[{source}](../{source})"  # from a page under docs/


def _source(path: Path, root: Path, command: str) -> str:
    return f"Data: {_link(path, root)}, made by `{command}`."


def _table(cases: Sequence[Mapping[str, Any]], cell: Any) -> list[str]:
    names = list(dict.fromkeys(one["name"] for case in cases for one in case["candidates"]))
    lines = [
        "| | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for case in cases:
        candidates = {one["name"]: one for one in case["candidates"]}
        cells = [cell(candidates.get(name), case) for name in names]
        training = ", training step" if case["mode"] == "training" else ""
        label = f"{case['model']}, batch {case['batch']}, {case['dtype']}{training}"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _time(candidate: Mapping[str, Any] | None, case: Mapping[str, Any]) -> str:
    if candidate is None or candidate["skipped"]:
        return "-"
    if candidate["wrong"]:
        return "wrong result"
    text = f"{candidate['latency_ms']['median']:.1f} ({candidate['ratio_to_eager']:.2f})"
    return f"**{text}**" if candidate["name"] in ("fused", "fused, low memory") else text


def _memory(candidate: Mapping[str, Any] | None, case: Mapping[str, Any]) -> str:
    if candidate is None or candidate["peak_memory_bytes"] is None:
        return "-"
    return f"{candidate['peak_memory_bytes'] / 2**20:.0f}"


def _error(candidate: Mapping[str, Any] | None, case: Mapping[str, Any]) -> str:
    if candidate is None or candidate["skipped"]:
        return "-"
    error = candidate["gradient_error" if case["mode"] == "training" else "error"]
    if error is None:
        return "not finite"
    return f"{error:.1e}" + (" (wrong)" if candidate["wrong"] else "")


def _total(name: str, totals: Mapping[str, kernels.Total | None], mode: str) -> str:
    total = totals.get(name)
    if total is None:
        return "not all ran" if name in totals else "-"
    text = f"{total.milliseconds:.1f} ({100 * total.roofline:.0f} %)"
    if mode == "training":
        eager = totals.get("eager")
        ratio = f"{total.milliseconds / eager.milliseconds:.2f}" if eager else "-"
        text = f"{total.milliseconds:.1f} ({ratio})"
    return f"**{text}**" if name.startswith("fused") else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 on a difference"
    )
    arguments = parser.parse_args()
    different = []
    for path, text in written().items():
        current = path.read_text()
        wanted = rewritten(current, text(), path.name)
        if current != wanted:
            different.append(path.name)
            if not arguments.check:
                path.write_text(wanted)
    if not arguments.check:
        draw_headline(FIGURE)
    elif different:
        names = ", ".join(different)
        sys.exit(f"{names} differs from bench/results/: run `python bench/write_readme.py`")


if __name__ == "__main__":
    main()
