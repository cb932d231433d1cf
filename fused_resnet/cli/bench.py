"""The commands `fused-resnet bench ...`: they parse and print, the modules beside this measure."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import files
from ..measure import comparison, documents, kernels, models
from ..measure.candidates import for_blocks, for_device, for_norms
from ..measure.case import Case, check_device
from ..measure.engines import ENGINES
from ..measure.errors import InvalidArgumentError
from ..measure.text import error_text, heading, kept_text, plain
from ..tuning.problem import DTYPES
from .console import batch_size, check_model, check_output, fail, progress_bar, whole_number

app = typer.Typer(
    help="Benchmarks: layers, whole models, predictions for GPUs; compare and draw their results.",
    no_args_is_help=True,
)

_MODELS = typer.Option(metavar="NAME,...", help="torchvision residual networks.")
_BATCHES = typer.Option(metavar="N,...", help="Images in a batch, e.g. 1,32,256.")
_DEVICE = typer.Option(help="cpu, cuda or cuda:N; the GPU where there is one.")
_WITHOUT = typer.Option(help="A candidate to leave out; may be given more than once.")
_THREADS = whole_number("CPU threads of torch; its own choice by default.")
_JSON = typer.Option(
    "--json",
    help="Write the results here; in the repository, bench/results/ by default.",
)


@app.command("kernels")
def kernels_command(
    model: Annotated[str, _MODELS] = "resnet50",
    batch: Annotated[str, _BATCHES] = "1",
    dtype: Annotated[
        str, typer.Option(metavar="NAME,...", help=f"{', '.join(DTYPES)}; by device.")
    ] = "",
    device: Annotated[str, _DEVICE] = "",
    backend: Annotated[
        str, typer.Option(metavar="NAME,...", help="Of this package's; those of the device.")
    ] = "",
    layers: Annotated[
        str, typer.Option(metavar="TEXT", help="Only layers with this in their name, e.g. 3x3.")
    ] = "",
    mode: Annotated[
        str,
        typer.Option(
            metavar="NAME,...", help="inference: convolutions; training: norms, both directions."
        ),
    ] = "inference",
    without: Annotated[list[str] | None, _WITHOUT] = None,
    rounds: Annotated[int, whole_number("How often each candidate is timed.")] = 25,
    threads: Annotated[int | None, _THREADS] = None,
    json: Annotated[Path | None, _JSON] = None,
) -> None:
    """Times every distinct layer of a model, all candidates side by side."""
    check_output("json", json)
    device = _device(device)
    _at_least_one(rounds=rounds, threads=threads)
    kind = torch.device(device).type
    dtypes = dtype.split(",") if dtype else ["float32" if kind == "cpu" else "float16"]
    known = [name for name in DTYPES if kind == "cuda" or name != "tfloat32"]
    for name in dtypes:
        if name not in known:
            raise InvalidArgumentError(f"--dtype is {name!r}, must be one of {', '.join(known)}")
    cases = [
        kernels.Case(network, count, name, device, kind_of)
        for network in _models(model)
        for kind_of in dict.fromkeys(_modes(mode))
        for name in dict.fromkeys(dtypes)
        for count in _batches(batch)
    ]
    wanted = backend.split(",") if backend else []
    candidates = for_device(torch.device(device), wanted, without or ())
    blocks = for_blocks(candidates, without or ())
    in_training = for_norms(candidates)

    def problems_of(case: kernels.Case, selected: str = "") -> Mapping[Any, int]:
        if case.mode == "training":
            return case.norms(selected)
        return case.problems(selected) | case.blocks(selected)

    found = {case: problems_of(case, layers) for case in cases}
    if not all(found.values()):
        every = (p for case in cases for p in problems_of(case))
        names = ", ".join(dict.fromkeys(map(str, every)))
        raise InvalidArgumentError(f"--layers is {layers!r}, which none has in its name: {names}")

    console, results, done = _console(), [], 0
    total = sum(map(len, found.values()))
    try:
        with progress_bar() as bar:
            task = bar.add_task("start", total=total)
            for case, problems in found.items():
                label = f"{case.model}, batch {case.batch}, {case.dtype}"

                def tell(problem: Any, at: float, label: str = label, done: int = done) -> None:
                    text = f"{label}: {problem or 'ceilings'}"
                    bar.update(task, description=text, completed=done + at)

                ways = in_training if case.mode == "training" else candidates
                result = kernels.measure(
                    case, problems, ways, blocks, rounds=rounds, thread_count=threads,
                    progress=tell,
                )  # fmt: skip
                results.append(result)
                done += len(problems)
                if result.interrupted:
                    break
    except KeyboardInterrupt:
        if not any(result.layers or result.blocks for result in results):
            raise
        results[-1].interrupted = True
    results = [result for result in results if result.layers or result.blocks]
    if not results:
        raise typer.Exit(fail("interrupted before anything was timed", 130))
    content = kernels.document(results, _command(), documents.repository() or Path())
    for case in content["cases"]:
        _print_layers(console, content, case)
    # Part of a model is not what the file of the repository is for.
    _keep(console, content, json, default=not layers)
    if content["cases"][-1]["interrupted"]:
        timed = sum(len(r.layers) + len(r.blocks) for r in results)
        console.print(f"interrupted after {timed} of {total} layers")
        raise typer.Exit(130)


@app.command("models")
def models_command(
    model: Annotated[str, _MODELS] = "resnet50",
    batch: Annotated[str, _BATCHES] = "1",
    dtype: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="float32, bfloat16, float16, int8 (of a float32 model); float32 or, on a GPU, "
            "float16 by default.",
        ),
    ] = "",
    device: Annotated[str, _DEVICE] = "",
    mode: Annotated[
        str, typer.Option(metavar="NAME,...", help="inference, training or both.")
    ] = "inference",
    backend: Annotated[
        str | None, typer.Option(help="The fused model's backend; see doctor.")
    ] = None,
    without: Annotated[list[str] | None, _WITHOUT] = None,
    rounds: Annotated[int, whole_number("How often each candidate is timed.")] = 30,
    threads: Annotated[int | None, _THREADS] = None,
    memory: Annotated[bool, typer.Option(help="Measure peak memory.")] = True,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Of int8: folder of images to find ranges on; else crops of the input."),
    ] = None,
    json: Annotated[Path | None, _JSON] = None,
) -> None:
    """Times whole models: eager, compiled, fused, as CUDA graphs, and in other engines."""
    check_output("json", json)
    device = _device(device)
    _at_least_one(rounds=rounds, threads=threads)
    modes = _modes(mode)
    for name in without or ():
        if name not in ENGINES or name == "eager":
            known = ", ".join(engine for engine in ENGINES if engine != "eager")
            raise InvalidArgumentError(f"--without is {name!r}, must be one of {known}")
    usual = "float32" if torch.device(device).type == "cpu" else "float16"
    dtypes = dict.fromkeys((dtype or usual).split(","))
    if calibrate is not None and "int8" not in dtypes:
        raise InvalidArgumentError(f"--calibrate is {calibrate!r}, which needs --dtype int8")
    cases = [
        Case(
            network,
            count,
            "float32" if name == "int8" else name,
            device,
            (),
            backend,
            kind == "training",
            threads=threads,
            rounds=rounds,
            memory=memory,
            quantize="int8" if name == "int8" else None,
            calibrate=calibrate if name == "int8" else None,
        )
        for network in _models(model)
        for name in dtypes
        for kind in dict.fromkeys(modes)
        for count in _batches(batch)
    ]
    console = _console()
    try:
        with progress_bar() as bar:
            task = bar.add_task("start", total=len(cases))
            results = models.measure(
                cases,
                without=without or (),
                progress=lambda case, stage, done: bar.update(
                    task,
                    description=f"{case.model}, batch {case.batch_size}: {stage}",
                    completed=done,
                ),
            )
    except KeyboardInterrupt:
        raise typer.Exit(fail("interrupted before anything was timed", 130)) from None
    content = documents.document(results, _command(), documents.repository() or Path())
    for case in content["cases"]:
        _print_model(console, case)
    _keep(console, content, json)
    if len(results) < len(cases) or results[-1].interrupted:
        console.print(f"interrupted in case {len(results)} of {len(cases)}")
        raise typer.Exit(130)


@app.command("compare")
def compare_command(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="The older results.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The newer ones.")],
    candidate: Annotated[
        str, typer.Option(metavar="TEXT", help="Only candidates with this in their name.")
    ] = "",
    threshold: Annotated[
        float, typer.Option(help="Changes of the median up to this share are noise.")
    ] = comparison.THRESHOLD,
) -> None:
    """Shows what got faster or slower beyond the noise.

    Exit code: 0 if nothing got slower, 1 if something did or does not run any more, 2 if the files
    cannot be compared.
    """
    if not 0 <= threshold < 1:
        raise InvalidArgumentError(f"--threshold is {threshold}, must be at least 0 and below 1")
    found = comparison.changes(documents.load(before), documents.load(after), threshold)
    found = [change for change in found if candidate in change.name]
    if not found:
        raise InvalidArgumentError(f"--candidate is {candidate!r}, which no name has in it")
    console = _console()
    shown = [change for change in found if change.kind != comparison.SAME]
    if shown:
        table = Table(header_style="bold")
        for column in ("case", "candidate", ""):
            table.add_column(column)
        for column in ("A, ms", "B, ms", "B / A"):
            table.add_column(column, justify="right")
        colours = {comparison.SLOWER: "red", comparison.BROKEN: "red", comparison.FASTER: "green"}
        for change in shown:
            times = ["-" if t is None else f"{t:.4g}" for t in (change.before, change.after)]
            was, now = change.before, change.after
            ratio = f"{now / was:.2f}" if was and now else ""
            colour = colours.get(change.kind, "none")
            kind = plain(change.kind, colour)
            table.add_row(plain(change.what), plain(change.name), kind, *times, ratio)
        console.print(table)
    for change in found:
        if change.kind == comparison.BROKEN:
            console.print(plain(f"{change.name}, {change.what}: {change.reason or 'not timed'}"))
    counts = {
        kind: sum(c.kind == kind for c in found) for kind in dict.fromkeys(c.kind for c in found)
    }
    console.print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if any(change.is_slower for change in found):
        raise typer.Exit(1)


@app.command("static")
def static_command(
    model: Annotated[str, _MODELS] = "resnet50,resnext50_32x4d",
    batch: Annotated[str, _BATCHES] = "1,32,256",
    gpu: Annotated[str | None, typer.Option(help="Also show this GPU's layers, e.g. H100.")] = None,
    resources: Annotated[
        Path | None,
        typer.Option(
            help="What bench/triton_resources.py wrote; by default the repository's newest."
        ),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the predictions here.")] = None,
) -> None:
    """Shows what is known of GPUs without one: predicted times, the compiler's resources."""
    from ..measure import predict
    from ..measure import resources as static

    check_output("json", json)
    if gpu is not None and gpu not in predict.GPUS:
        raise InvalidArgumentError(f"--gpu is {gpu!r}, must be one of {', '.join(predict.GPUS)}")
    content = predict.document(tuple(_models(model)), tuple(_batches(batch)))
    console = _console()
    static.print_networks(console, content)
    static.print_training(console, content)
    if gpu is not None:
        for network in content["networks"]:
            if network["gpu"] == gpu:
                static.print_layers(console, network)
    static.print_resources(console, resources)
    if json is not None:
        with documents.writing(json):
            files.replace(json, predict.text(content).encode())


@app.command("report")
def report_command(
    results: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE.json]...", help="Result files; the repository's newest by default."
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="The page to write.")] = Path("report.html"),
    plots: Annotated[
        Path | None, typer.Option(help="Also write the plots into this folder, as PNG.")
    ] = None,
) -> None:
    """Draws result files: one self-contained HTML page that opens offline, and PNG plots."""
    from ..measure import page

    check_output("output", output)
    if plots is not None and plots.exists() and not plots.is_dir():
        raise InvalidArgumentError(f"--plots is {str(plots)!r}, which is not a folder")
    paths = results or page.default_files()
    if not paths:
        raise InvalidArgumentError("FILE is not given, and there is no bench/results/ here")
    documents_read = [(path, documents.load(path)) for path in paths]
    written = page.write(documents_read, output, plots)
    _console().print(plain(f"wrote {', '.join(map(str, written))}"))


def _device(name: str) -> str:
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    return device


def _models(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        check_model(name)
    return names


def _modes(text: str) -> list[str]:
    modes = text.split(",")
    for name in modes:
        if name not in ("inference", "training"):
            raise InvalidArgumentError(
                f"--mode is {name!r}, must be inference, training or inference,training"
            )
    return modes


def _batches(text: str) -> list[int]:
    return list(dict.fromkeys(batch_size(part) for part in text.split(",")))


def _at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise InvalidArgumentError(f"--{name} is {value}, must be at least 1")


def _command() -> str:
    return shlex.join(["fused-resnet", *sys.argv[1:]])


def _console() -> Console:
    """Wide enough for the tables where the output is a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def _keep(
    console: Console, content: dict[str, Any], path: Path | None, default: bool = True
) -> None:
    """Writes a result file where the user said, or where the repository has them."""
    if path is not None:
        documents.save(content, path)
    elif default and (root := documents.repository()) is not None:
        path, elsewhere = documents.add(content, documents.default_path(content, root))
        if elsewhere is not None:
            console.print(plain(f"{elsewhere}; it stays as it is"))
    else:
        return
    console.print(plain(f"wrote {path}"))


def _title(case: Mapping[str, Any]) -> str:
    threads = f", {case['threads']} threads" if case["device"] == "cpu" else ""
    return f"{case['model']}, batch {case['batch']}, {case['dtype']}{threads}"


def _print_layers(console: Console, content: Mapping[str, Any], case: Mapping[str, Any]) -> None:
    unit, scale = kernels.flop_unit(case)
    training = ", norms in training" if case.get("mode") == "training" else ""
    table = Table(title=heading(_title(case) + training), header_style="bold")
    table.add_column("layer", max_width=40)
    table.add_column("runs", justify="right")
    table.add_column("candidate")
    columns = ["median\nus", "p10 to p90\nus", "GB/s", unit, "of the\nroofline"]
    has_unit = kernels.unit_rate(case) is not None
    for column in columns + ["of the\nunit"] * has_unit:
        table.add_column(column, justify="right")
    for column in ("time /\neager", "error vs\nfloat64"):
        table.add_column(column, justify="right")
    every = [*case["layers"], *case.get("blocks", ())]
    for layer in every:
        first = (plain(layer["label"]), str(layer["count"]))
        for at, one in enumerate(layer["candidates"]):
            table.add_row(*(("", "") if at else first), *_layer_cells(one, scale, has_unit))
        table.add_section()
    console.print(table)
    limits = case["ceilings"]
    rates = (
        f"{content['device']['name']}: roofline of {limits['copy_gigabytes_per_second']:.4g} GB/s "
        f"(copy) and {scale * limits['teraflops_per_second']:.3g} {unit} (matrix product), "
        "measured in this run"
    )
    unit_rates = kernels.unit_text(case)
    for line in (rates, *([unit_rates] if unit_rates else []), *_summary(case)):
        console.print(plain(line))
    reasons = dict.fromkeys(
        f"{one['name']}: {one['status']}, {one['reason']}"
        for layer in every
        for one in layer["candidates"]
        if one["reason"]
    )
    for reason in reasons:
        console.print(plain(reason, "red"))
    lost = dict.fromkeys(
        one["name"] for layer in every for one in layer["candidates"] if one["keeps_nan"] is False
    )
    if lost:
        console.print(plain(f"loses NaN: {', '.join(lost)}"))


def _layer_cells(one: Mapping[str, Any], scale: float, has_unit: bool) -> list[str | Text]:
    taken = one["microseconds"]
    if taken is None:
        return [
            plain(one["name"]),
            plain(one["status"], "red"),
            *[""] * (5 + has_unit),
            error_text(one["error"]),
        ]
    return [
        plain(one["name"]),
        f"{taken['median']:.1f}",
        f"{taken['p10']:.1f} to {taken['p90']:.1f}",
        f"{one['gigabytes_per_second']:.4g}",
        f"{scale * one['teraflops_per_second']:.3g}",
        f"{100 * one['roofline']:.0f} %",
        *([f"{100 * one['unit_share']:.0f} %"] if has_unit else []),
        "-" if one["ratio_to_eager"] is None else f"{one['ratio_to_eager']:.2f}",
        error_text(one["error"]),
    ]


def _summary(case: Mapping[str, Any]) -> list[str]:
    """Each candidate's layers together, as often as the model has them."""
    totals = kernels.totals(case)
    eager = totals.get("eager")
    lines = []
    for name, total in totals.items():
        if total is None:
            lines.append(f"all layers, {name}: not all were timed")
            continue
        ratio = f", {total.milliseconds / eager.milliseconds:.2f} of eager" if eager else ""
        lines.append(
            f"all layers, {name}: {total.milliseconds:.3f} ms{ratio}, "
            f"{100 * total.roofline:.0f} % of the roofline"
            + ("" if total.unit is None else f", {100 * total.unit:.0f} % of the matrix unit")
        )
    return lines


def _print_model(console: Console, case: Mapping[str, Any]) -> None:
    table = Table(title=heading(f"{_title(case)}, {case['mode']}"), header_style="bold")
    table.add_column("candidate")
    for column in ("median\nms", "p10 to p90\nms", "images/s", "time /\neager", "peak\nMiB"):
        table.add_column(column, justify="right")
    energy = any(one["energy_joules"] for one in case["candidates"])
    kept = any(one.get("kept_bytes") for one in case["candidates"])
    columns = ["kept\nMiB / image"] * kept + ["J /\nimage"] * energy
    for column in (*columns, "error vs\nfloat64"):
        table.add_column(column, justify="right")
    for one in case["candidates"]:
        table.add_row(*_model_cells(one, case, kept, energy))
    console.print(table)
    for one in case["candidates"]:
        if one["skipped"]:
            console.print(plain(f"{one['name']}: not run, {one['skipped']}"))


def _model_cells(
    one: Mapping[str, Any], case: Mapping[str, Any], kept: bool, energy: bool
) -> Sequence[str | Text]:
    taken = one["latency_ms"]
    error = error_text(one["gradient_error" if case["mode"] == "training" else "error"])
    if taken is None:
        status = plain("-") if one["skipped"] else plain("wrong", "red")
        return [plain(one["name"]), status, *[""] * (4 + kept + energy), error]
    peak, joules = one["peak_memory_bytes"], one["energy_joules"]
    cells: list[str | Text] = [
        plain(one["name"]),
        f"{taken['median']:.2f}",
        f"{taken['p10']:.2f} to {taken['p90']:.2f}",
        f"{one['images_per_second']:.1f}",
        f"{one['ratio_to_eager']:.2f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
    ]
    if kept:
        cells.append(kept_text(one, case))
    if energy:
        cells.append("-" if joules is None else f"{joules / case['batch']:.3g}")
    return [*cells, error]
