"""Whole-model inference on the CPU: eager, torch.compile, fused, OpenVINO, ONNX Runtime.

    python bench/models.py                            # the table of the README, into bench/results/
    python bench/models.py --filter resnet18 --rounds 5 --output /tmp/try.json

Needs `pip install ".[bench]"` for the last two; a candidate that cannot run is recorded with the
reason. Every candidate runs the same seeded random weights (batch-norm statistics random too) on
the same photograph and its crops, channels_last, in eval mode, and its logits are checked against
float64 first. Times are taken in one process, interleaved round by round; see engines.py for what
that takes with three thread pools. The file written follows the schema documented at
`fused_resnet.compare.document`.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from engines import ENGINES, SETTLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fused_resnet import compare
from fused_resnet.inputs import InvalidArgumentError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
# Model, batch, dtype: the cases the project has promised a ratio for.
CASES = (
    ("resnet50", 1, "float32"),
    ("resnet50", 8, "float32"),
    ("resnet50", 8, "bfloat16"),
    ("resnet18", 1, "float32"),
)


def result_path(document: dict[str, object]) -> Path:
    """`bench/results/<device>/<date>-<commit>.json` for a document of `compare.document`."""
    device = re.sub(r"\W+", "-", str(document["device"]["name"])).strip("-").lower()
    return RESULTS / device / f"{document['date'][:10]}-{document['commit'] or 'unknown'}.json"


def table_of(results: list[compare.Result]) -> Table:
    """Median, range, ratio and error of every candidate of every case."""
    table = Table(header_style="bold")
    table.add_column("case")
    for column in ("candidate", "median ms", "p10 to p90", "time / eager", "error vs float64"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for result in results:
        case = result.case
        label = f"{case.model}, batch {case.batch_size}, {case.dtype}"
        for candidate in result.candidates:
            latency = candidate.latency
            if latency is None:
                cells = [candidate.name, "skipped", "", "", ""]
            else:
                cells = [
                    candidate.name,
                    f"{latency.median:.2f}",
                    f"{latency.quantile(0.1):.2f} to {latency.quantile(0.9):.2f}",
                    f"{candidate.ratio_to_eager:.2f}",
                    f"{candidate.accuracy.error:.1e}" + (" WRONG" if candidate.wrong else ""),
                ]
            table.add_row(label, *cells)
            label = ""
        table.add_section()
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--filter", default="", help="only cases whose name has this substring")
    parser.add_argument("--without", nargs="*", default=[], help="candidates to leave out")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    parser.add_argument("--output", type=Path, help="the file to write, in place of bench/results/")
    arguments = parser.parse_args()

    console = Console()
    engines = {**compare.ENGINES, **ENGINES}
    engines = {name: one for name, one in engines.items() if name not in arguments.without}
    results = []
    for model, batch, dtype in CASES:
        name = f"{model}, batch {batch}, {dtype}"
        if arguments.filter not in name:
            continue
        case = compare.Case(
            model=model,
            batch=batch,
            dtype=dtype,
            threads=arguments.threads,
            rounds=arguments.rounds,
            memory=not arguments.no_memory,
        )
        with Progress(
            TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
        ) as bar:
            task = bar.add_task(name, total=None)
            result = compare.compare(
                case,
                engines,
                settle=SETTLE,
                progress=lambda stage, done, total, bar=bar, task=task, name=name: bar.update(
                    task, description=escape(f"{name}: {stage}"), completed=done, total=total
                ),
            )
        results.append(result)
        if result.interrupted:
            break
    if not results:
        sys.exit(f"--filter is {arguments.filter!r}, which no case of {CASES} has")
    console.print(table_of(results))
    for result in results:
        for candidate in result.candidates:
            if candidate.skipped:
                console.print(f"{candidate.name}: {escape(candidate.skipped)}")

    command = shlex.join(["python", "bench/models.py", *sys.argv[1:]])
    document = compare.document(results, command, root=ROOT)
    path = arguments.output or result_path(document)
    path.parent.mkdir(parents=True, exist_ok=True)
    compare.write_json(document, path)
    console.print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except InvalidArgumentError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
