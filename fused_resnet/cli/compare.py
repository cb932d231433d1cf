"""`fused-resnet compare`."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..measure import compare as comparison
from ..measure import documents, environment
from ..measure.case import Candidate, Case, Result
from ..measure.errors import InvalidArgumentError
from ..measure.text import error_text, plain
from .console import check_output, fail, whole_number


def compare(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A torchvision residual network, e.g. resnet50; timm:NAME; hf:resnet-50 or "
            "another hf:...Config of transformers; or module:function of yours, which returns a "
            "model.",
        ),
    ],
    batch: Annotated[
        int | None, whole_number("Images in the input; by default as many as --image names.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    image: Annotated[
        list[str] | None, typer.Option(help="Your image; may be given more than once.")
    ] = None,
    backend: Annotated[
        str | None, typer.Option(help="The fused model's backend; see doctor.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Time a training step: forward, backward, SGD.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also run the model under torch.compile.")
    ] = False,
    quantize: Annotated[
        bool, typer.Option("--quantize", help="Also run the fused model in eight bits.")
    ] = False,
    quantize_dtype: Annotated[
        str, typer.Option(help="Of --quantize: int8 or float8_e4m3fn.")
    ] = "int8",
    calibrate: Annotated[
        str | None,
        typer.Option(help="Folder of images to find its ranges on; else crops of the input's."),
    ] = None,
    threads: Annotated[
        int | None, whole_number("CPU threads of torch; its own choice by default.")
    ] = None,
    rounds: Annotated[int, whole_number("How often each candidate is timed.")] = 30,
    weights: Annotated[
        str | None,
        typer.Option(help="torchvision's name or a checkpoint's path; else seeded random."),
    ] = None,
    seed: Annotated[int, whole_number("Of random weights, labels and crops.")] = 0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results here, as PNG.")] = None,
) -> None:
    """Runs a model eager and fused, side by side on the same input."""
    check_output("json", json)
    check_output("plot", plot)
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise InvalidArgumentError(f"--plot is {str(plot)!r}, must end in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise InvalidArgumentError(
                f"--plot is {str(plot)!r}, which needs matplotlib: pip install matplotlib"
            )
    case = Case(
        model=model, batch=batch, dtype=dtype, device=device, images=tuple(image or ()),
        backend=backend, train=train, compile=compile, threads=threads, rounds=rounds,
        weights=weights, seed=seed, memory=memory, quantize=quantize_dtype if quantize else None,
        calibrate=calibrate,
    )  # fmt: skip

    console, bar_console = Console(), Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TimeElapsedColumn(),
        console=bar_console,
        transient=True,
        disable=not bar_console.is_terminal,
    )
    try:
        with progress as bar:
            task = bar.add_task("start", total=None)
            result = comparison.compare(
                case,
                progress=lambda stage, done, total: bar.update(
                    task, description=stage, completed=done, total=total
                ),
            )
    except KeyboardInterrupt:
        raise typer.Exit(fail("interrupted before anything was timed", 130)) from None
    _print_result(console, result)
    if json is not None:
        command = shlex.join(["fused-resnet", *sys.argv[1:]])
        with documents.writing(json):
            documents.write_json(documents.document([result], command), json)
    if plot is not None:
        from ..measure.plot import draw

        with documents.writing(plot):
            draw(documents.document([result], ""), plot)
    if result.interrupted:
        raise typer.Exit(130)


def _print_result(console: Console, result: Result) -> None:
    case = result.case
    mode = "training step" if case.train else "inference"
    where = environment.describe_device(case.torch_device)["name"]
    plural = "s" if result.threads > 1 else ""
    threads = f", {result.threads} thread{plural}" if case.torch_device.type == "cpu" else ""
    latency = result.candidates[0].latency
    rounds = 0 if latency is None else len(latency.samples)

    table = Table(
        title=plain(f"{case.model}, batch {case.batch_size}, {case.dtype}, {mode}"),
        header_style="bold",
    )
    table.add_column("", no_wrap=True)
    columns = [_column(result, candidate) for candidate in result.candidates]
    for candidate in result.candidates:
        table.add_column(plain(candidate.name), justify="right", no_wrap=True)
    for name in _ROWS:
        cells = [column.get(name, "") for column in columns]
        if any(cells):
            table.add_row(name, *cells)
    console.print(table)
    console.print(plain(f"{where}{threads}; torch {torch.__version__}; {rounds} rounds"))
    weights = case.weights or "random, batch-norm statistics too"
    images = ", ".join(case.images) or "sample photograph"
    console.print(plain(f"weights: {weights}; input: {images}"))
    if case.memory:
        console.print("peak memory: above the model and its input")
    for line in result.fused:
        console.print(plain(f"fused: {line}"))
    for line in result.quantized:
        console.print(plain(f"{case.quantize}: {line}"))
    for candidate in result.candidates:
        if candidate.skipped:
            console.print(plain(f"{candidate.name}: skipped, {candidate.skipped}"))
        elif candidate.wrong:
            reason = "wrong, not timed: its error is out of bounds"
            console.print(plain(f"{candidate.name}: {reason}", "red"))
    if result.interrupted:
        console.print(f"interrupted after {rounds} of {case.rounds} rounds")


_ROWS = (
    *("latency ms, median", "10th percentile", "90th percentile", "images/s", "time / eager"),
    *("peak memory", "error vs float64", "gradient error", "top-5 vs float64"),
)


def _column(result: Result, candidate: Candidate) -> dict[str, str | Text]:
    """A candidate's figures by their names in `_ROWS`."""
    case, latency, accuracy = result.case, candidate.latency, candidate.accuracy
    if accuracy is None:
        return {"latency ms, median": "skipped"}
    column: dict[str, str | Text] = {
        "error vs float64": error_text(accuracy.error),
        "top-5 vs float64": f"{100 * accuracy.top5:.0f} %",
    }
    if case.train:
        column["gradient error"] = error_text(accuracy.gradient_error)
    if latency is None:
        return {**column, "latency ms, median": plain("wrong", "red")}
    if case.memory:
        peak = candidate.peak_memory
        column["peak memory"] = "-" if peak is None else f"{peak / 2**20:.0f} MiB"
    return {
        **column,
        "latency ms, median": f"{latency.median:.2f}",
        "10th percentile": f"{latency.quantile(0.1):.2f}",
        "90th percentile": f"{latency.quantile(0.9):.2f}",
        "images/s": f"{result.images_per_second(candidate):.1f}",
        "time / eager": f"{candidate.ratio_to_eager:.2f}",
    }
