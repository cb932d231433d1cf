"""The command `fused-resnet`: parses and prints; `compare.py` and `tuning/` do the measuring."""

from __future__ import annotations

import importlib.util
import math
import os
import shlex
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .. import _native, backends, tuning
from ..layers import watch
from ..measure import compare as comparison
from ..measure import environment, networks
from ..measure.inputs import InvalidArgumentError, first_line
from ..measure.tune import tuner
from ..tuning import architecture, basic_block, chain, estimate
from ..tuning import table as tables
from ..tuning.architecture import Architecture
from ..tuning.problem import DTYPES, BasicBlockProblem, ChainProblem, ConvProblem, Problem
from .bench import app as bench
from .console import (
    batch_size,
    check_model,
    check_output,
    error_text,
    fail,
    heading,
    plain,
    whole_number,
)

app = typer.Typer(
    help="Residual networks with fewer passes over memory: compare, tune, bench, see what works.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.add_typer(bench, name="bench")


@app.callback()
def _callback() -> None:
    """Keeps `compare` and `doctor` subcommands."""


@app.command()
def compare(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A torchvision residual network, e.g. resnet50.")
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
    """Runs a torchvision model eager and fused, side by side on the same input."""
    check_output("json", json)
    check_output("plot", plot)
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
        with comparison.writing(json):
            comparison.write_json(comparison.document([result], command), json)
    if plot is not None:
        from ..measure.plot import draw

        with comparison.writing(plot):
            draw(comparison.document([result], ""), plot)
    if result.interrupted:
        raise typer.Exit(130)


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
    console.print(plain(f"{where}{threads}; torch {torch.__version__}; {rounds} rounds"))
    weights = case.weights or "random, batch-norm statistics too"
    images = ", ".join(case.images) or "sample photograph"
    console.print(plain(f"weights: {weights}; input: {images}"))
    if case.memory:
        console.print("peak memory: above the model and its input")
    for line in result.fused:
        console.print(plain(f"fused: {line}"))
    for candidate in result.candidates:
        if candidate.skipped:
            console.print(plain(f"{candidate.name}: skipped, {candidate.skipped}"))
        elif candidate.wrong:
            reason = "wrong, not timed: its error is out of bounds"
            console.print(plain(f"{candidate.name}: {reason}", "red"))
    if result.interrupted:
        console.print(f"interrupted after {rounds} of {case.rounds} rounds")


def _row(result: comparison.Result, candidate: comparison.Candidate) -> list[str | Text]:
    name = plain(candidate.name)
    case, latency, accuracy = result.case, candidate.latency, candidate.accuracy
    if accuracy is None:
        return [name, "skipped"]
    if latency is None:
        blank = [""] * (3 + case.memory)
        errors = [accuracy.error, accuracy.gradient_error] if case.train else [accuracy.error]
        cells = [*blank, *map(error_text, errors), f"{100 * accuracy.top5:.0f} %"]
        return [name, plain("wrong", "red"), *cells]
    row = [
        name,
        f"{latency.median:.2f}",
        f"{latency.quantile(0.1):.2f} to {latency.quantile(0.9):.2f}",
        f"{result.images_per_second(candidate):.1f}",
        f"{candidate.ratio_to_eager:.2f}",
    ]
    if case.memory:
        peak = candidate.peak_memory
        row.append("-" if peak is None else f"{peak / 2**20:.0f} MiB")
    row.append(error_text(accuracy.error))
    if case.train:
        row.append(error_text(accuracy.gradient_error))
    row.append(f"{100 * accuracy.top5:.0f} %")
    return row


@app.command()
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
        comparison.check_device(device)
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
            chains = _chains(model, count, name, size)
            _print_chains(f"{model}, batch {count}, {name}", chains, predicted_for)
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
    found: list[dict[tuple[str, int], Counter[Problem]]],
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
            tuner.EventTimer(device, flush_bytes=8 * here.l2_bytes),
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
    console: Console, title: str, layers: Counter[Problem], results: list[tuner.Result]
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
            grid.add_row(plain(f"  {name}"), plain("not found" if value is None else value))

    versions = environment.versions()
    versions["commit"] = environment.commit() or "not a checkout"
    section("versions", {**versions, **environment.compilers()})
    cpu = environment.describe_device(torch.device("cpu"))
    cpu["flags"] = " ".join(cpu["flags"]) or "none of those that matter"
    cpu["threads"] = torch.get_num_threads()
    vectors, tiles = torch.ops.fused_resnet.conv_isa(), torch.ops.fused_resnet.conv_tile_isa()
    cpu["convolutions"] = (vectors or "the library's") + (f", bfloat16 {tiles}" if tiles else "")
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
    section("backends", backends.available())
    section("environment", _settings())
    section("compiled parts", _compiled_parts())
    console.print(grid)


def _settings() -> dict[str, object]:
    """The environment variables that are read, and what each comes to."""
    settings: dict[str, object] = {}
    for name, result in (
        ("FUSED_RESNET_BACKEND", lambda: backends.check_environment()),
        ("FUSED_RESNET_CPU_ISA", lambda: f"the CPU's kernels use {backends.cpu_isa()}"),
        (watch.VARIABLE, watch.described),
        ("FUSED_RESNET_CACHE", lambda: f"tuning tables are in {tables.cache_folder()}"),
    ):
        value = os.environ.get(name)
        text = "not set" if not value else f"{value}, forced" if "CACHE" not in name else value
        try:
            found = result()
        except (ValueError, OSError) as error:
            found = f"error: {error}"
        settings[name] = text if found is None else f"{text}; {found}"
    return settings


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
        sys.exit(fail(text, 2))
    except (MemoryError, torch.OutOfMemoryError) as error:
        sys.exit(fail(f"out of memory: {first_line(error)}", 1))
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(fail("interrupted", 130))
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
