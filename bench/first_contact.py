"""The first minutes on a GPU that never ran these kernels: are they right, how fast, what to do.

    python bench/first_contact.py FOLDER [--wheel FILE] [--total 530] [--only REGEX] [--again]
    python bench/first_contact.py FOLDER --device cpu        # rehearses it without a GPU

Steps run in order of value, each in a process of its own under a limit of seconds, so that neither
a crash nor an endless loop costs more than its step. FOLDER gets at most eight flat files, and what
was found so far is always in them:

    findings.jsonl   a line for each thing found: {"step": ..., "what": ..., "state": "ok" | "wrong"
                     | "slow" | "skipped" | "failed" | "note", "badness": 0.0, ...}
    verdict.txt      the table of steps, and the three findings to act on first
    log.txt          what every step printed
    kernels.json     `fused-resnet bench kernels` of ResNet-50
    ncu.txt          Nsight Compute's counters of the kernels that matter

The same command goes on where an interrupted one stopped: a step that ended is not run again
(`--again` starts over). Nothing outside FOLDER changes but for `--wheel`, which is installed into
FOLDER/site, removed at the end. Exit code: 0 if every step ended and nothing is wrong, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STATES = ("wrong", "failed", "slow", "ok", "note", "skipped")
# The error rule's factor: fused against eager, both against float64.
FACTOR = 1.5
REPEATS = 200


@dataclass(frozen=True)
class Step:
    """A step: what it is called, how long it may take, and whether a CPU can rehearse it."""

    name: str
    seconds: int
    on_cpu: bool = True


STEPS = (
    Step("device", 15),
    Step("compile", 45, on_cpu=False),
    Step("right", 60),
    Step("self-check", 20),
    Step("same-bits", 30, on_cpu=False),
    Step("memcheck", 40, on_cpu=False),
    Step("tests", 45, on_cpu=False),
    Step("speed", 100),
    Step("kernels", 120),
    Step("ncu", 55, on_cpu=False),
)


# Runs a file or a module with this process's path: -I keeps the current folder off it.
START = """import json, runpy, sys
sys.path[:] = json.loads(sys.argv[1])
run, name = sys.argv[2:4]
del sys.argv[:3]
getattr(runpy, run)(name, run_name="__main__")"""


def python(run: str, name: object, *arguments: object, site: Path | None = None) -> list[str]:
    """The command of a child process.

    Args:
        run: "run_path" or "run_module".
        name: of the file or module.
        arguments: of the command.
        site: a folder to look for packages in before all others.
    """
    here = str(Path(__file__).parent)
    paths = [path for path in sys.path if path and path != here]
    if site is not None:
        paths.insert(0, str(site))
    return [
        sys.executable, "-I", "-c", START, json.dumps(paths), run, str(name), *map(str, arguments)
    ]  # fmt: skip


class Findings:
    """Lines of `findings.jsonl`, each on disk when the call that adds it returns."""

    def __init__(self, folder: Path, step: str) -> None:
        self.path, self.step = folder / "findings.jsonl", step

    def add(self, what: str, state: str, badness: float = 0.0, **fields: Any) -> None:
        """Adds one.

        Args:
            what: one line.
            state: one of `STATES`.
            badness: how much it matters among those of the same state.
            fields: figures, as JSON has them.
        """
        line = {"step": self.step, "what": what, "state": state, "badness": badness, **fields}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"{state:8} {what}", flush=True)


def read_findings(folder: Path) -> list[dict[str, Any]]:
    """All lines that are whole; the last one may not be."""
    path = folder / "findings.jsonl"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


# --- steps -----------------------------------------------------------------------------------


def device(found: Findings, where: str) -> None:
    """What this is: device, driver, versions, and what the package says of itself."""
    import torch

    import fused_resnet
    from fused_resnet import backends

    fields: dict[str, Any] = {"torch": torch.__version__, "package": fused_resnet.__version__}
    with contextlib.suppress(ImportError):
        import triton

        fields["triton"] = triton.__version__
    name = "CPU"
    if where == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name = properties.name
        fields |= {
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cudnn": torch.backends.cudnn.version(),
        }
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError):
            fields["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    with contextlib.suppress(OSError):
        fields["commit"] = subprocess.run(commit, capture_output=True, text=True).stdout.strip()
    fields["date"] = time.strftime("%Y-%m-%d")
    found.add(f"{name}, torch {torch.__version__}", "note", **fields)
    for backend, state in backends.available().items():
        wanted = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}[where]
        bad = backend in wanted and state != "yes"
        found.add(f"backend {backend}: {state}", "failed" if bad else "ok", 10.0)


def models(where: str) -> list[tuple[str, int, int]]:
    """Networks to try, with batch and image size."""
    if where == "cpu":
        return [("resnet18", 2, 64)]
    return [("resnet50", 8, 224), ("resnet18", 8, 224), ("resnext50_32x4d", 4, 224)]


def make_model(name: str, dtype: Any, where: str) -> Any:
    """Seeded weights, and batch-norm statistics that are nobody's defaults."""
    import torch
    import torchvision

    torch.manual_seed(0)
    model = torchvision.models.get_model(name).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.normal_(module.bias, 0.0, 0.1)
            torch.nn.init.normal_(module.running_mean, 0.0, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.to(where, dtype, memory_format=torch.channels_last)


def make_input(batch: int, size: int, dtype: Any, where: str) -> Any:
    """Images of noise, channels_last."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, size, size, generator=generator)
    return x.to(where, dtype, memory_format=torch.channels_last)


def poison(where: str) -> None:
    """NaN in the memory that the allocator hands out next: what a kernel leaves unwritten shows."""
    import torch

    if where == "cuda":
        blocks = [torch.full((1 << power,), float("nan"), device=where) for power in range(8, 27)]
        torch.cuda.synchronize()
        del blocks


def right(found: Findings, where: str) -> None:
    """Whole models against float64, in every dtype and backend: the error rule."""
    import torch

    import fused_resnet
    from fused_resnet import backends
    from fused_resnet.testing import relative_error

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    names = ["triton", "cuda"] if where == "cuda" else ["cpu"]
    names = [name for name in names if backends.available()[name] == "yes"]
    dtypes = [torch.float16, torch.bfloat16, torch.float32] if where == "cuda" else [torch.float32]
    for name, batch, size in models(where):
        x = make_input(batch, size, torch.float32, where)
        for dtype in dtypes:
            # What is judged is arithmetic, so float64 gets the rounded weights and input.
            model, cast = make_model(name, dtype, where), x.to(dtype)
            exact_model = make_model(name, torch.float32, where).double()
            exact_model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
            with torch.inference_mode():
                exact, eager = exact_model(cast.double()), model(cast)
            limit = FACTOR * relative_error(eager, exact)
            fused_resnet.fuse(model)
            for backend in [None, *names]:
                what = f"{name} b{batch} {dtype} {backend or 'default'}"
                choose = fused_resnet.use_backend(backend) if backend else contextlib.nullcontext()
                try:
                    with torch.inference_mode(), choose:
                        poison(where)
                        out = model(cast)
                    error = relative_error(out, exact)
                except Exception as reason:
                    found.add(f"{what}: {type(reason).__name__}: {reason}"[:500], "failed", 100.0)
                    continue
                # The norm of a thousand logits is steady; the floor is where eager is near exact.
                state = "ok" if error <= max(limit, 1e-6) else "wrong"
                ratio = error / (limit / FACTOR) if limit else float("inf")
                found.add(f"{what}: error {ratio:.2f} of eager's", state, ratio, error=error)


def self_check(found: Findings, where: str) -> None:
    """What the package's own check says of each family of kernels, as users would have it."""
    import torch

    import fused_resnet
    from fused_resnet.backends import self_check as checks

    checks.use("1")
    name, batch, size = models(where)[0]
    x = make_input(batch, size, torch.float16 if where == "cuda" else torch.float32, where)
    model = fused_resnet.fuse(make_model(name, x.dtype, where))
    start = time.monotonic()
    with torch.inference_mode():
        model(x)
    model.float().train()
    with torch.autocast(where, torch.float16, enabled=where == "cuda"):
        model(x.float()).sum().backward()
    seconds = time.monotonic() - start
    for family, verdict in checks.failed(x.device).items():
        found.add(f"not used, {family}: {verdict}"[:500], "wrong", 50.0)
    summary = checks.summary(x.device)
    found.add(f"first passes with the self-check: {summary}", "note", took=seconds)


def same_bits(found: Findings, where: str) -> None:
    """Launches that overlap and that do not, graph replays, and call after call: the same bits."""
    import torch

    import fused_resnet
    from fused_resnet.tuning import chain

    x = make_input(8, 224, torch.float16, where)
    model = fused_resnet.fuse(make_model("resnet50", torch.float16, where))
    overlapping = chain.OVERLAPPING
    with torch.inference_mode(), fused_resnet.use_backend("triton"):
        expected = model(x).clone()
        for what, allowed in (("overlapping launches", overlapping), ("launches in a row", ())):
            chain.OVERLAPPING = allowed
            differing = 0
            for _ in range(REPEATS):
                poison(where)
                differing += not torch.equal(model(x), expected)
            state = "wrong" if differing else "ok"
            found.add(f"{what}: {differing} of {REPEATS} calls differ", state, differing)
        chain.OVERLAPPING = overlapping
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        for _ in range(3):
            captured.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            same = torch.equal(captured, expected)
            found.add("a graph's replay: the same bits", "ok" if same else "wrong", 50.0)
        # In place of what the graph was captured with: parameters are read anew.
        model.layer1[0].conv1.weight.mul_(-1)
        graph.replay()
        torch.cuda.synchronize()
        same = torch.equal(captured, model(x))
        found.add("a graph's replay after an update in place", "ok" if same else "wrong", 50.0)


def small_pass(where: str) -> None:
    """One forward and backward pass of a small network, for tools that watch."""
    import torch

    import fused_resnet

    model = fused_resnet.fuse(make_model("resnet18", torch.float16, where))
    x = make_input(1, 64, torch.float16, where)
    for backend in ("triton", "cuda"):
        with fused_resnet.use_backend(backend):
            with torch.inference_mode():
                model(x)
            model.train()(x.repeat(2, 1, 1, 1)).float().sum().backward()
            model.eval()
    torch.cuda.synchronize()


def under_tool(
    found: Findings, command: list[str], seconds: int, output: Path | None
) -> str | None:
    """What a tool prints of this file's `small_pass`; None, with a finding, without the tool."""
    if shutil.which(command[0]) is None:
        found.add(f"{command[0]} is not there", "skipped")
        return None
    one_pass = python("run_path", __file__, "--pass", found.path.parent)
    try:
        process = subprocess.run(
            [*command, *one_pass], capture_output=True, text=True, timeout=seconds,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip
        text = process.stdout + process.stderr
    except subprocess.TimeoutExpired as reason:
        text = (reason.stdout or b"").decode(errors="replace")
        found.add(f"{command[0]}: not done after {seconds} s", "failed", 1.0)
    if output is not None:
        output.write_text(text)
    print(text[-4000:])
    return text


def memcheck(found: Findings, where: str) -> None:
    """Accesses out of bounds, in a small forward and backward pass."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"]
    text = under_tool(found, command, 36)
    if text is not None and (total := re.search(r"ERROR SUMMARY: (\d+) error", text)):
        errors = int(total[1])
        found.add(f"memcheck: {errors} errors", "wrong" if errors else "ok", 1000.0)


def ncu(found: Findings, where: str) -> None:
    """Counters of the kernels that matter."""
    command = [
        "ncu", "--clock-control", "none", "--set", "full", "--launch-count", "24",
        "--kernel-name", "regex:stem|bottleneck|conv", "--page", "details",
    ]  # fmt: skip
    text = under_tool(found, command, 60, found.path.parent / "ncu.txt")
    if text is not None:
        rates = re.findall(r"DRAM Throughput\s+%\s+([\d.]+)", text)
        found.add(f"ncu: counters of {len(rates)} launches", "ok" if rates else "failed", 0.5)


def compile_kernels(found: Findings, where: str) -> None:
    """Fills Triton's cache from eight processes, so that later steps do not wait for compilers."""
    cases = [(name, batch) for batch in (1, 8, 32, 256) for name in ("resnet50", "resnet18")]
    since = time.monotonic()
    running = []
    for case in cases:
        command = python("run_path", __file__, found.path.parent, "--compile", *case)
        running.append((case, subprocess.Popen(command)))
    for (name, batch), process in running:
        code = process.wait()
        if code:
            found.add(f"{name} b{batch}: exit code {code}", "failed", 100.0)
    found.add(f"compiled in {time.monotonic() - since:.0f} s", "note")


def compile_network(name: str, batch: int) -> None:
    """What a network's forward pass needs, by tuning's choice and in Triton's kernels alone."""
    import torch

    import fused_resnet

    model = fused_resnet.fuse(make_model(name, torch.float16, "cuda"))
    x = make_input(batch, 224, torch.float16, "cuda")
    with torch.inference_mode():
        model(x)
        with fused_resnet.use_backend("triton"):
            model(x)
    torch.cuda.synchronize()


def tests(found: Findings, where: str) -> None:
    """Hopper's instructions one by one, the suite's exact convolutions, and Triton's kernels."""
    names = ("test_hopper_on_host", "test_hopper_conv", "test_cuda_stem", "test_cuda_conv_exact")
    names += ("test_hopper_bottleneck", "test_triton")
    files = [file for name in names for file in ROOT.glob(f"tests/**/{name}.py")]
    process = subprocess.Popen(
        python(
            "run_module", "pytest", "-v", "--maxfail=20", "-p", "no:cacheprovider",
            "-k", "hopper or cuda or triton", *files,
        ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    counts = {"PASSED": 0, "FAILED": 0}
    deadline = time.monotonic() + 40
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="")
        if match := re.match(r"(\S+::\S+) (PASSED|FAILED)", line):
            counts[match[2]] += 1
            if match[2] == "FAILED":
                found.add(match[1], "wrong", 20.0)
        if time.monotonic() > deadline:
            process.send_signal(signal.SIGINT)
            break
    process.wait()
    passed, failed = counts.values()
    state = "ok" if passed and not failed else "failed"
    found.add(f"tests: {passed} passed, {failed} failed in the time there was", state, 30.0)


def milliseconds(call: Callable[[], object], where: str, seconds: float = 2.0) -> float:
    """Median time of a call in a row of calls, by the device's clock."""
    import torch

    for _ in range(3):
        call()
    times = []
    end = time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < end and len(times) < 100):
        if where == "cuda":
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 5)
        else:
            since = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - since))
    return statistics.median(times)


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """A CUDA graph of a call."""
    import torch

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def speed(found: Findings, where: str) -> None:
    """A network's forward pass, the ways one could run it, against eager."""
    import torch

    import fused_resnet

    torch.backends.cudnn.benchmark = True
    gpu = where == "cuda"
    dtype = torch.float16 if gpu else torch.float32
    name, size = ("resnet50", 224) if gpu else ("resnet18", 64)
    eager = make_model(name, dtype, where)
    fused = fused_resnet.fuse(make_model(name, dtype, where))
    for batch in (1, 32, 256) if gpu else (1,):
        x = make_input(batch, size, dtype, where)
        ways: dict[str, Callable[[], object]] = {
            "eager": lambda x=x: eager(x), "fused": lambda x=x: fused(x)
        }  # fmt: skip
        if gpu:
            ways |= {
                "eager, graph": lambda x=x: eager(x),
                "fused, graph": lambda x=x: fused(x),
                "fused, library": lambda x=x: fused(x),
            }
        times: dict[str, float] = {}
        for way, call in ways.items():
            library = fused_resnet.use_backend("reference") if "library" in way else None
            try:
                with torch.inference_mode(), library or contextlib.nullcontext():
                    run = graphed(call) if way.endswith("graph") else call
                    times[way] = milliseconds(run, where, 2.0 if gpu else 0.3)
            except Exception as reason:
                found.add(f"{name} b{batch} {way}: {reason}"[:500], "failed", 40.0)
        pairs = [("fused", "eager"), ("fused, graph", "eager, graph")]
        for mine, theirs in pairs:
            if mine in times and theirs in times:
                ratio = times[mine] / times[theirs]
                text = f"{name} b{batch} {mine}: {times[mine]:.3f} ms, {ratio:.2f} of {theirs}"
                state = "slow" if ratio > 1 else "ok"
                found.add(text, state, ratio, milliseconds=times, batch=batch)
    if gpu:
        x = make_input(32, size, dtype, where)
        with torch.inference_mode():
            compiled = torch.compile(eager, mode="reduce-overhead")
            time_of = milliseconds(lambda: compiled(x), where)
        found.add(f"{name} b32 torch.compile, reduce-overhead: {time_of:.3f} ms", "note")


def interrupted(command: list[str], seconds: float, folder: Path) -> int | None:
    """The exit code of a command, or None if it took too long: then it keeps what it has."""
    process = subprocess.Popen(command, cwd=folder, preexec_fn=_default_interrupt)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
        process.kill()
        return None


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def kernels(found: Findings, where: str) -> None:
    """Every layer of a network against the library, with the roofline of this device."""
    path = found.path.parent / "kernels.json"
    gpu = where == "cuda"
    batches = (256, 1) if gpu else (1,)
    for batch in batches:
        command = python(
            "run_module", "fused_resnet.cli", "bench", "kernels",
            "--model", "resnet50" if gpu else "resnet18", "--batch", batch,
            "--dtype", "float16" if gpu else "float32", "--device", where,
            "--rounds", 10 if gpu else 1, "--without", "torch.compile", "--json", path,
        )  # fmt: skip
        code = interrupted(command, 60 if gpu else 30, found.path.parent)
        if code not in (0, None):
            found.add(f"bench kernels, batch {batch}: exit code {code}", "failed", 30.0)
    if not path.exists():
        found.add("bench kernels wrote nothing", "failed", 60.0)
        return
    for case in json.loads(path.read_text())["cases"]:
        for layer in case["layers"]:
            timed = [one for one in layer["candidates"] if one["status"] == "timed"]
            ours = [one for one in timed if one["name"].startswith("fused")]
            theirs = [one for one in timed if one not in ours]
            if not ours or not theirs:
                continue
            best, other = (min(part, key=lambda one: one["microseconds"]["median"])
                           for part in (ours, theirs))  # fmt: skip
            time_of, time_of_other = (one["microseconds"]["median"] for one in (best, other))
            ratio = time_of / time_of_other
            what = (
                f"b{case['batch']} {layer['label']}: {best['name']} {time_of:.1f} us, "
                f"{100 * best['roofline']:.0f} % of the roofline, {ratio:.2f} of {other['name']}"
            )
            # Of the network's time, what being as fast as the other would save.
            lost = layer["count"] * (time_of - time_of_other)
            found.add(what, "slow" if ratio > 1 else "ok", max(lost, 0.0))


RUN = {
    "device": device, "compile": compile_kernels, "right": right, "self-check": self_check,
    "same-bits": same_bits, "memcheck": memcheck, "tests": tests, "speed": speed,
    "kernels": kernels, "ncu": ncu,
}  # fmt: skip


# --- the frame -------------------------------------------------------------------------------


def verdict(folder: Path) -> str:
    """The table of steps and the three findings to act on, as `verdict.txt` has them."""
    found = read_findings(folder)
    lines = [f"{'step':10} {'seconds':>7}  " + "  ".join(f"{state:>7}" for state in STATES)]
    for step in STEPS:
        mine = [line for line in found if line["step"] == step.name]
        ended = [line for line in mine if "seconds" in line]
        seconds = f"{ended[-1]['seconds']:.0f}" if ended else "-"
        counts = [sum(line["state"] == state for line in mine) for state in STATES]
        lines.append(
            f"{step.name:10} {seconds:>7}  " + "  ".join(f"{count or '':>7}" for count in counts)
        )
    order = {state: place for place, state in enumerate(STATES)}
    bad = [line for line in found if line["state"] in ("wrong", "failed", "slow")]
    bad.sort(key=lambda line: (order[line["state"]], -line["badness"]))
    lines.append("")
    lines += [f"{i}. {line['state']}: [{line['step']}] {line['what']}"
              for i, line in enumerate(bad[:3], 1)] or ["nothing to act on"]  # fmt: skip
    return "\n".join(lines) + "\n"


def unpack(wheel: Path, site: Path) -> None:
    """Puts a wheel's packages into a folder, without pip, which not every Python has.

    Raises:
        ValueError: the wheel has more than packages: what installs it would have to move files.
    """
    with zipfile.ZipFile(wheel) as archive:
        moved = [name for name in archive.namelist() if ".data/" in name]
        if moved:
            raise ValueError(f"{wheel.name} has {moved[0]}, must have nothing but packages")
        archive.extractall(site)


@contextlib.contextmanager
def installed(wheel: Path | None, folder: Path) -> Iterator[dict[str, str]]:
    """The environment of the steps' processes, with a wheel of this package if there is one."""
    environment = os.environ | {
        "FUSED_RESNET_CACHE": str(folder / "cache"), "TRITON_CACHE_DIR": str(folder / "triton"),
        "PYTHONUNBUFFERED": "1",
        # What is wrong is to be seen, not left out; the step of that name asks for it.
        "FUSED_RESNET_SELF_CHECK": "0",
    }  # fmt: skip
    site = folder / "site"
    if wheel is not None:
        unpack(wheel, site)
    try:
        yield environment
    finally:
        for part in ("site", "cache", "triton"):
            shutil.rmtree(folder / part, ignore_errors=True)


def run_step(step: Step, folder: Path, where: str, seconds: float, environment: dict) -> None:
    """One step in a process group of its own, which ends with its time."""
    found = Findings(folder, step.name)
    since = time.monotonic()
    with (folder / "log.txt").open("a") as log:
        log.write(f"\n=== {step.name}\n")
        log.flush()
        process = subprocess.Popen(
            python(
                "run_path", __file__, folder, "--device", where, "--step", step.name,
                site=folder / "site",
            ),
            stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(timeout=seconds)
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as reason:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(reason, KeyboardInterrupt):
                raise
            code = None
    took = time.monotonic() - since
    if code is None:
        found.add(f"not done after {took:.0f} s", "failed", 5.0, seconds=took)
    elif code:
        found.add(f"ended with exit code {code}: see log.txt", "failed", 80.0, seconds=took)
    else:
        found.add(f"done in {took:.0f} s", "note", seconds=took)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheel", type=Path, help="of this package, to install first")
    parser.add_argument("--total", type=float, default=530, help="seconds for everything")
    parser.add_argument("--only", default="", help="a regular expression of steps' names")
    parser.add_argument("--again", action="store_true", help="forget what was found before")
    parser.add_argument("--step", choices=RUN, help=argparse.SUPPRESS)
    parser.add_argument("--compile", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--pass", dest="one_pass", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder, where = arguments.folder.resolve(), arguments.device
    if arguments.one_pass:
        small_pass(where)
        return 0
    if arguments.compile:
        name, batch = arguments.compile
        compile_network(name, int(batch))
        return 0
    if arguments.step:
        RUN[arguments.step](Findings(folder, arguments.step), where)
        return 0
    end = time.monotonic() + arguments.total
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.again:
        for name in ("findings.jsonl", "verdict.txt", "log.txt", "kernels.json", "ncu.txt"):
            (folder / name).unlink(missing_ok=True)
    done = {line["step"] for line in read_findings(folder) if "seconds" in line}
    complete = True
    with installed(arguments.wheel, folder) as environment:
        for step in STEPS:
            if step.name in done or not re.search(arguments.only, step.name):
                continue
            left = end - time.monotonic()
            if where == "cpu" and not step.on_cpu:
                Findings(folder, step.name).add("needs a GPU", "skipped")
            elif left < 5:
                print(f"{step.name}: no time left")
                complete = False
            else:
                # A rehearsal is of this script, on machines that may be slow.
                limit = min(step.seconds if where == "cuda" else 10 * step.seconds, left)
                run_step(step, folder, where, limit, environment)
            (folder / "verdict.txt").write_text(verdict(folder))
    print("\n" + verdict(folder))
    bad = any(line["state"] in ("wrong", "failed") for line in read_findings(folder))
    return 1 if bad or not complete else 0


if __name__ == "__main__":
    sys.exit(main())
