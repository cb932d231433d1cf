"""The command `fused-resnet`: parses arguments and prints; `compare.py` does the measuring."""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import _native, backends, environment
from . import compare as comparison
from .inputs import InvalidArgumentError, first_line

app = typer.Typer(
    help="Residual networks with fewer passes over memory: compare them, and see what works here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _callback() -> None:
    """Keeps `compare` and `doctor` subcommands."""


def _whole_number(help: str) -> Any:
    """An integer option; typer's own names the option but not always the value it was given."""

    def parse(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise typer.BadParameter(f"{text!r} is not an integer") from None

    return typer.Option(help=help, parser=parse, metavar="N")


@app.command()
def compare(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A torchvision residual network, e.g. resnet50.")
    ],
    batch: Annotated[
        int | None, _whole_number("Images in the input; by default as many as --image names.")
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
    threads: Annotated[
        int | None, _whole_number("CPU threads of torch; its own choice by default.")
    ] = None,
    rounds: Annotated[int, _whole_number("How often each candidate is timed.")] = 30,
    weights: Annotated[
        str | None,
        typer.Option(help="torchvision's name or a checkpoint's path; else seeded random."),
    ] = None,
    seed: Annotated[int, _whole_number("Of random weights, labels and crops.")] = 0,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    json: Annotated[Path | None, typer.Option(help="Write the results here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the results here, as PNG.")] = None,
) -> None:
    """Runs a torchvision model eager and fused, side by side on the same input."""
    _check_output("json", json)
    _check_output("plot", plot)
    if plot is not None:
        if plot.suffix.lower() != ".png":
            raise InvalidArgumentError(f"--plot is {str(plot)!r}, must end in .png")
        if importlib.util.find_spec("matplotlib") is None:
            raise InvalidArgumentError(
                f"--plot is {str(plot)!r}, which needs matplotlib: pip install matplotlib"
            )
    case = comparison.Case(
        model=model, batch=batch, dtype=dtype, device=device, images=tuple(image or ()),
        backend=backend, train=train, compile=compile, threads=threads, rounds=rounds,
        weights=weights, seed=seed, memory=memory,
    )  # fmt: skip

    console, bar_console = Console(), Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
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
                    task, description=escape(stage), completed=done, total=total
                ),
            )
    except KeyboardInterrupt:
        raise typer.Exit(_fail("interrupted before anything was timed", 130)) from None
    _print_result(console, result)
    if json is not None:
        command = shlex.join(["fused-resnet", *sys.argv[1:]])
        comparison.write_json(comparison.document([result], command), json)
    if plot is not None:
        from .plot import draw

        draw(comparison.document([result], ""), plot)
    if result.interrupted:
        raise typer.Exit(130)


def _check_output(name: str, path: Path | None) -> None:
    """Fails before the measuring, not after it."""
    if path is None:
        return
    folder = path.parent
    if not folder.is_dir():
        raise InvalidArgumentError(
            f"--{name} is {str(path)!r}, but there is no folder {str(folder)!r}"
        )
    if path.is_dir():
        raise InvalidArgumentError(f"--{name} is {str(path)!r}, which is a folder, must be a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InvalidArgumentError(f"--{name} is {str(path)!r}, which cannot be written")


def _print_result(console: Console, result: comparison.Result) -> None:
    case = result.case
    mode = "training step" if case.train else "inference"
    where = environment.describe_device(case.torch_device)["name"]
    plural = "s" if result.threads > 1 else ""
    threads = f", {result.threads} thread{plural}" if case.torch_device.type == "cpu" else ""
    rounds = len(result.candidates[0].latency.samples)

    table = Table(
        title=f"{case.model}, batch {case.batch_size}, {case.dtype}, {mode}", header_style="bold"
    )
    table.add_column("")
    columns = ["latency ms\nmedian", "\np10 to p90", "images/s", "time /\neager"]
    columns += ["peak\nmemory"] if case.memory else []
    columns += ["error vs\nfloat64"]
    columns += ["gradient\nerror"] if case.train else []
    columns += ["top-5 vs\nfloat64"]
    for column in columns:
        table.add_column(column, justify="right")
    for candidate in result.candidates:
        table.add_row(*_row(result, candidate))
    console.print(table)
    console.print(f"{escape(str(where))}{threads}; torch {torch.__version__}; {rounds} rounds")
    weights = case.weights or "random, batch-norm statistics too"
    images = ", ".join(case.images) or "sample photograph"
    console.print(f"weights: {escape(weights)}; input: {escape(images)}")
    if case.memory:
        console.print("peak memory: above the model and its input")
    for line in result.fused:
        console.print(f"fused: {escape(line)}", highlight=False)
    for candidate in result.candidates:
        if candidate.skipped:
            console.print(f"{candidate.name}: skipped, {escape(candidate.skipped)}")
        elif candidate.wrong:
            console.print(f"[red]{candidate.name}: wrong, its error is out of bounds[/red]")
    if result.interrupted:
        console.print(f"interrupted after {rounds} of {case.rounds} rounds")


def _row(result: comparison.Result, candidate: comparison.Candidate) -> list[str]:
    case, latency, accuracy = result.case, candidate.latency, candidate.accuracy
    if latency is None or accuracy is None:
        return [candidate.name, "skipped"]
    style = "red" if candidate.wrong else "none"
    row = [
        candidate.name,
        f"{latency.median:.2f}",
        f"{latency.quantile(0.1):.2f} to {latency.quantile(0.9):.2f}",
        f"{result.images_per_second(candidate):.1f}",
        f"{candidate.ratio_to_eager:.2f}",
    ]
    if case.memory:
        peak = candidate.peak_memory
        row.append("-" if peak is None else f"{peak / 2**20:.0f} MiB")
    row.append(f"[{style}]{_error(accuracy.error)}[/]")
    if case.train:
        row.append(f"[{style}]{_error(accuracy.gradient_error)}[/]")
    row.append(f"{100 * accuracy.top5:.0f} %")
    return row


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}" if math.isfinite(value) else "not finite"


@app.command()
def doctor() -> None:
    """Shows versions, devices, and which backends work and why the others do not."""
    console = Console()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")

    def section(title: str, rows: dict[str, object]) -> None:
        grid.add_row(title, "")
        for name, value in rows.items():
            grid.add_row(f"  {name}", escape("not found" if value is None else str(value)))

    versions = environment.versions()
    versions["commit"] = environment.commit() or "not a checkout"
    section("versions", {**versions, **environment.compilers()})
    cpu = environment.describe_device(torch.device("cpu"))
    cpu["flags"] = " ".join(cpu["flags"]) or "none of those that matter"
    cpu["threads"] = torch.get_num_threads()
    del cpu["type"]
    section("CPU", cpu)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = environment.describe_device(torch.device("cuda", index))
        del gpu["type"]
        section(f"cuda:{index}", gpu)
    if not count:
        built = torch.version.cuda
        reason = f"built for CUDA {built}, finds no GPU" if built else "built without CUDA"
        section("GPU", {"none": f"torch is {reason}"})
    choice = {"FUSED_RESNET_BACKEND": os.environ.get("FUSED_RESNET_BACKEND", "not set")}
    section("backends", {**backends.available(), **choice})
    section("compiled parts", _compiled_parts())
    console.print(grid)


def _compiled_parts() -> dict[str, object]:
    info = _native.build_info()
    cuda = info["cuda"]
    parts = {"_C": f"for {info['machine']}, by {info['compiler']}, against torch {info['torch']}"}
    if cuda is None:
        parts["_cuda"] = f"not built: {info['no_cuda_reason']}"
    else:
        parts["_cuda"] = f"for {', '.join(cuda['architectures'])}, by nvcc {cuda['nvcc']}"
    parts["_cuda loaded"] = _native.cuda_status
    return parts


# click's class, wherever this version of typer keeps it.
_UsageError = typer.BadParameter.__base__


def main() -> None:
    """Runs the command; bad arguments end it with one line and exit code 2, Ctrl-C with 130."""
    try:
        code = app(standalone_mode=False)
    except (InvalidArgumentError, _UsageError) as error:
        text = error.format_message() if isinstance(error, _UsageError) else str(error)
        sys.exit(_fail(text, 2))
    except (MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(_fail(f"out of memory: {first_line(error)}", 1))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(_fail("interrupted", 130))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> int:
    print(f"fused-resnet: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
