"""Writes the README's results between its markers, from the data under bench/results/.

    python bench/report.py           # rewrite README.md
    python bench/report.py --check   # exit 1 when README.md is not what the data says

Each device's folder contributes its newest file, and bench/predict.py what it predicts for GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "bench" / "results"
SCHEMA = "fused_resnet.results/1"
BEGIN = "<!-- results: written by bench/report.py from bench/results/ -->"
END = "<!-- end of results -->"


def newest_files(results: Path = RESULTS) -> list[Path]:
    """The newest result file of every device, by the date inside it."""
    # What bench/static.py found without running anything is no device's.
    folders = sorted(f for f in results.glob("*") if f.is_dir() and f.name != "static")
    files = [max(folder.glob("*.json"), key=_date, default=None) for folder in folders]
    return [file for file in files if file is not None]


def section(path: Path, root: Path = ROOT) -> str:
    """One device's results as Markdown: where they are from, times, errors."""
    document = _load(path)
    device, versions, cases = document["device"], document["versions"], document["cases"]
    threads = sorted({case["threads"] for case in cases})
    where = [device["name"]]
    if device["type"] == "cpu":
        where.append(f"{' and '.join(map(str, threads))} threads")
    where += [f"torch {versions['torch']}", f"commit {document['commit'] or 'unknown'}"]
    where.append(document["date"][:10])
    lines = [
        f"**{', '.join(where)}.** Median latency in ms, in brackets the time divided by eager's.",
        "",
        *_table(cases, _time),
        "",
        "Relative error of the logits against float64:",
        "",
        *_table(cases, _error),
        "",
    ]
    for reason in dict.fromkeys(
        f"{one['name']}, {case['dtype']}: not run ({one['skipped']})."
        for case in cases
        for one in case["candidates"]
        if one["skipped"]
    ):
        lines += [reason, ""]
    source = path.relative_to(root)
    lines += [f"Data: [{source}]({source}), made by `{document['command']}`."]
    return "\n".join(lines)


def predicted_section(path: Path, root: Path = ROOT) -> str:
    """What bench/predict.py predicts for GPUs, as Markdown that says so."""
    networks = json.loads(path.read_text())["networks"]
    batches = sorted({network["batch"] for network in networks})
    dtype = networks[0]["dtype"]
    lines = [
        f"**GPUs: predicted, not measured**, {dtype}, channels_last. Time per batch in us, in "
        "brackets how many times as long eager and `torch.compile` are predicted to take.",
        "",
        "| | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "| --- |" + " ---: |" * len(batches),
    ]
    rows: dict[str, list[str]] = {}
    for network in sorted(networks, key=lambda network: network["batch"]):
        times = network["microseconds"]
        eager, compiled = (times[how] / times["fused"] for how in ("eager", "compiled"))
        label = f"{network['gpu']}, {network['model']}"
        rows.setdefault(label, []).append(f"{times['fused']:.0f} ({eager:.2f}, {compiled:.2f})")
    lines += [f"| {label} | " + " | ".join(cells) + " |" for label, cells in rows.items()]
    source = path.relative_to(root)
    lines += [
        "",
        "A roofline model with published figures, in which the library's convolutions are as good "
        "as these kernels, so that the ratios are what fusing saves. Layer by layer: "
        f"[{source}]({source}), made by `python bench/predict.py`.",
    ]
    return "\n".join(lines)


def report(results: Path = RESULTS, root: Path = ROOT) -> str:
    """Everything that belongs between the markers."""
    sections = [section(path, root) for path in newest_files(results)]
    predicted = results / "static" / "predicted.json"
    if predicted.exists():
        sections.append(predicted_section(predicted, root))
    return "\n\n".join(sections) or "There are no results yet."


def rewritten(readme: str, text: str) -> str:
    """The README with `text` between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"README.md must have {BEGIN!r} and then {END!r}, once each")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def _load(path: Path) -> dict[str, Any]:
    document = json.loads(path.read_text())
    if document.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema is {document.get('schema')!r}, must be {SCHEMA!r}")
    return document


def _date(path: Path) -> str:
    return _load(path)["date"]


def _table(cases: list[dict[str, Any]], cell: Any) -> list[str]:
    names = list(dict.fromkeys(one["name"] for case in cases for one in case["candidates"]))
    lines = [
        "| | " + " | ".join(names) + " |",
        "| --- |" + " ---: |" * len(names),
    ]
    for case in cases:
        candidates = {one["name"]: one for one in case["candidates"]}
        cells = [cell(candidates.get(name)) for name in names]
        label = f"{case['model']}, batch {case['batch']}, {case['dtype']}"
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def _time(candidate: Mapping[str, Any] | None) -> str:
    if candidate is None or candidate["skipped"]:
        return "-"
    if candidate["wrong"]:
        return "wrong result"
    text = f"{candidate['latency_ms']['median']:.1f} ({candidate['ratio_to_eager']:.2f})"
    return f"**{text}**" if candidate["name"] == "fused" else text


def _error(candidate: Mapping[str, Any] | None) -> str:
    if candidate is None or candidate["skipped"]:
        return "-"
    if candidate["error"] is None:
        return "not finite"
    return f"{candidate['error']:.1e}" + (" (wrong)" if candidate["wrong"] else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing, exit 1 on a difference"
    )
    arguments = parser.parse_args()
    current = README.read_text()
    wanted = rewritten(current, report())
    if not arguments.check:
        README.write_text(wanted)
    elif current != wanted:
        sys.exit("README.md differs from bench/results/: run `python bench/report.py`")


if __name__ == "__main__":
    main()
