"""`fused-resnet tune`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .. import backends, tuning
from ..measure import case, networks
from ..measure.errors import InvalidArgumentError
from ..measure.text import heading, plain
from ..measure.tune import race, tuner
from ..tuning import architecture, basic_block, chain, estimate
from ..tuning import table as tables
from ..tuning.architecture import Architecture
from ..tuning.problem import DTYPES, BasicBlockProblem, ChainProblem, ConvProblem
from .console import batch_size, check_model, fail, whole_number


def tune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A torchvision residual network, e.g. resnet50.")
    ],
    batch: Annotated[
        str, typer.Option(metavar="N,...", help="Batch sizes to tune for, e.g. 1,32,256.")
    ] = "1,32,256",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="float16, bfloat16, tfloat32 (torch's default for float32) or float32 (exact).",
        ),
    ] = "float16",
    size: Annotated[int, whole_number("Rows and columns of an image.")] = 224,
    device: Annotated[str, typer.Option(help="cuda or cuda:N.")] = "cuda",
    table: Annotated[
        Path | None, typer.Option(help="Write the choices here, not to the user's table.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Also time what the table has already.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Time nothing: list the layers and the prediction.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help="With --dry-run: predict for this GPU, e.g. H100.")
    ] = None,
) -> None:
    """Times the ways to run a model's layers on this GPU and remembers the fastest."""
    check_model(model)
    batches = [batch_size(text) for text in batch.split(",")]
    dtypes = dtype.split(",")
    for name in dtypes:
        if name not in DTYPES:
            raise InvalidArgumentError(f"--dtype is {name!r}, must be one of {', '.join(DTYPES)}")
    if size < 32:
        raise InvalidArgumentError(f"--size is {size}, must be at least 32")
    if gpu is not None and not dry_run:
        raise InvalidArgumentError(f"--gpu is {gpu!r}, which only --dry-run can predict for")
    predicted_for = _architecture(gpu) if dry_run else None
    if not dry_run:
        if not device.startswith("cuda"):
            raise InvalidArgumentError(f"--device is {device!r}, must be cuda or cuda:N")
        case.check_device(device)
        if (status := backends.available()["triton"]) != "yes":
            raise InvalidArgumentError(f"tune needs the triton backend, which cannot run: {status}")
    found = {
        (name, count): networks.of_model(model, count, name, size)
        for name in dict.fromkeys(dtypes)
        for count in dict.fromkeys(batches)
    }
    if predicted_for is not None:
        for (name, count), problems in found.items():
            _print_prediction(f"{model}, batch {count}, {name}", problems, predicted_for)
            blocks = _chains(model, count, name, size)
            _print_chains(f"{model}, batch {count}, {name}", blocks, predicted_for)
        return
    # Behind their convolutions, with which they are compared.
    chains = {(name, count): _chains(model, count, name, size) for name, count in found}
    _tune(model, [found, chains], torch.device(device), table, again)


def _chains(
    model: str, batch: int, dtype: str, size: int
) -> Counter[ChainProblem | BasicBlockProblem]:
    """The blocks that one kernel can run, and how often the model has each."""
    chains = networks.chains_of_model(model, batch, dtype, size)
    found = Counter(problem for problem in chains or () if problem is not None)
    return found + networks.basic_blocks_of_model(model, batch, dtype, size)


def _architecture(name: str | None) -> Architecture:
    """The GPU a dry run is for: the one named, the one here, or the H100."""
    if name is None:
        return architecture.of_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        return architecture.named(name)
    except ValueError as error:
        raise InvalidArgumentError(f"--{str(error).replace('GPU', 'gpu', 1)}") from None


def _tune(
    model: str,
    found: Sequence[Mapping[tuple[str, int], Mapping[Any, int]]],
    device: torch.device,
    path: Path | None,
    again: bool,
) -> None:
    here = architecture.of_device(device)
    try:
        path = path or tables.user_path(here.name)
        tables.merge(path, here.name, {})  # fails before the measuring, not after it
    except OSError as error:
        raise InvalidArgumentError(f"--table cannot be written: {error}") from None
    problems = list(
        dict.fromkeys(problem for kind in found for layers in kind.values() for problem in layers)
    )
    known = set() if again else tables.read(path).keys()
    wanted = [problem for problem in problems if problem not in known]

    console, bar_console = Console(), Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=bar_console,
        transient=True,
        disable=not bar_console.is_terminal,
    )
    with progress as bar:
        task = bar.add_task("start", total=len(wanted))
        session = tuner.tune_all(
            wanted,
            here,
            device,
            race.EventTimer(device, flush_bytes=8 * here.l2_bytes),
            path,
            progress=lambda problem, done: bar.update(
                task, description=f"batch {problem.N}, {problem}", completed=done
            ),
        )
    for kind in found:
        for (name, count), layers_found in kind.items():
            _print_tuned(console, f"{model}, batch {count}, {name}", layers_found, session.results)
    _print_session(console, session, len(problems) - len(wanted), len(wanted), path)
    if session.interrupted:
        raise typer.Exit(130)
    if session.unsaved is not None:
        raise typer.Exit(fail(f"not everything was kept: {session.unsaved}", 1))


def _print_tuned(
    console: Console, title: str, layers: Mapping[Any, int], results: list[tuner.Result]
) -> None:
    rows = [result for result in results if result.problem in layers and result.microseconds]
    if not rows:
        return
    table = Table(title=heading(title), header_style="bold")
    table.add_column("layer")
    table.add_column("runs", justify="right")
    table.add_column("chosen")
    others = "the library's" if tuner.baseline(rows[0].problem) is tuner.LIBRARY else "one by one"
    for column in ("median\nus", "time / the\nestimate's", f"time /\n{others}"):
        table.add_column(column, justify="right")
    totals = {"chosen": 0.0, "the estimate's": 0.0, others: 0.0}
    for result in rows:
        names = (result.choice, result.untuned, tuner.baseline(result.problem))
        times = [result.microseconds.get(str(name), math.inf) for name in names]
        runs = layers[result.problem]
        for name, time in zip(totals, times, strict=True):
            totals[name] += runs * time
        ratios = ("wrong" if time == math.inf else f"{times[0] / time:.2f}" for time in times[1:])
        table.add_row(
            str(result.problem), str(runs), str(result.choice), f"{times[0]:.1f}", *ratios
        )
    console.print(table)
    sums = (f"{name} {time:.0f} us" for name, time in totals.items() if time != math.inf)
    console.print(f"together, times runs: {', '.join(sums)}")


def _print_session(
    console: Console, session: tuner.Session, known: int, wanted: int, path: Path
) -> None:
    failures: dict[str, list[str]] = {}
    for result in session.results:
        for name, reason in result.failures.items():
            failures.setdefault(name, []).append(f"{result.problem.key}: {reason}")
    for name, reasons in failures.items():
        more = f" and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        console.print(plain(f"not used: {name} for {reasons[0]}{more}"))
    for problem, reason in session.skipped.items():
        console.print(plain(f"not tuned: {problem.key}: {reason}", "red"))
    if known:
        console.print(f"{known} layers were in the table already; --again times them anew")
    if session.interrupted:
        console.print(f"interrupted after {len(session.results)} of {wanted} layers")
    console.print(plain(f"table: {path}"))


def _print_prediction(title: str, layers: Counter[ConvProblem], gpu: Architecture) -> None:
    title = f"{title}: predicted for {gpu.name}, nothing was timed"
    table = Table(title=heading(title), header_style="bold")
    table.add_column("layer")
    for column in ("runs", "candidates"):
        table.add_column(column, justify="right")
    table.add_column("the estimate's choice")
    for column in ("predicted\nus", "bytes and FLOPs\nalone, us"):
        table.add_column(column, justify="right")
    total = 0.0
    for problem, runs in layers.items():
        choice = tuning.untuned(problem, gpu)
        seconds = estimate.predicted_choice(problem, gpu, choice)
        bound = max(
            problem.bytes_once / gpu.copy_bandwidth, problem.flops / gpu.rate(problem.dtype)
        )
        tiles = len(estimate.candidates(problem, gpu))
        table.add_row(
            str(problem), str(runs), str(tiles), str(choice), f"{1e6 * seconds:.1f}",
            f"{1e6 * bound:.1f}",
        )  # fmt: skip
        total += runs * seconds
    console = Console()
    console.print(table)
    console.print(f"predicted, all of them: {1e6 * total:.0f} us")


def _print_chains(
    title: str, chains: Counter[ChainProblem | BasicBlockProblem], gpu: Architecture
) -> None:
    if not chains:
        return
    title = f"{title}: blocks, predicted for {gpu.name}, nothing was timed"
    table = Table(title=heading(title), header_style="bold")
    table.add_column("block, from its first 3x3 on")
    for column in ("runs", "candidates"):
        table.add_column(column, justify="right")
    table.add_column("the estimate's choice")
    for column in ("predicted\nus", "one by one,\nus", "bytes and FLOPs\nalone, us"):
        table.add_column(column, justify="right")
    saved = 0.0
    for problem, runs in chains.items():
        kind = basic_block if isinstance(problem, BasicBlockProblem) else chain
        choice = tuning.untuned(problem, gpu)
        seconds = kind.predicted(problem, gpu, choice)
        apart = kind.predicted(problem, gpu, tuner.baseline(problem))
        bound = max(
            problem.bytes_once / gpu.copy_bandwidth, problem.flops / gpu.rate(problem.dtype)
        )
        table.add_row(
            str(problem), str(runs), str(len(kind.candidates(problem, gpu))), str(choice),
            f"{1e6 * seconds:.1f}", f"{1e6 * apart:.1f}", f"{1e6 * bound:.1f}",
        )  # fmt: skip
        saved += runs * (apart - seconds)
    console = Console()
    console.print(table)
    console.print(f"predicted, of all of the above less: {1e6 * saved:.0f} us")
