"""Runs one torchvision model eager, compiled and fused on the same input, side by side."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from .. import backends, files, swap
from ..testing import FACTOR, relative_error
from . import environment, telemetry
from .clock import Latency, PeakMemory, interleave, kept_bytes, synchronize, threads
from .inputs import InvalidArgumentError, build_input, build_model, first_line

SCHEMA = "fused_resnet.results/2"
DTYPES = ("float32", "bfloat16", "float16")
# `FACTOR` times eager's error is what this library promises. Of somebody else's engine we only ask
# that it computes the same thing at the precision it was told to.
FACTOR_OF_OTHERS = 10.0
# So small that thousands of timed steps leave the weights, and with them the work, as they were.
LEARNING_RATE = 1e-6
# Of a mixed-precision step's loss: no gradient of a first step overflows float16.
GRADIENT_SCALE = 1024.0
# How long a candidate runs for its energy to be read.
ENERGY_SECONDS = 1.0

Call = Callable[[], torch.Tensor]
Engine = Callable[[torch.nn.Module, torch.Tensor, "Case"], Call]
Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compared, on which input, and how it is measured.

    Attributes:
        model: name of a torchvision residual network.
        batch: images in the input; None for as many as `images` has, or one.
        dtype: "float32", "bfloat16" or "float16", of parameters, buffers and input alike. Training
            in 16 bits is what people call mixed precision: float32 parameters and input, the
            forward pass under `torch.autocast`, and for float16 a `GradScaler`.
        device: "cpu", "cuda" or "cuda:N".
        images: paths of the user's images; the photograph that ships with matplotlib when empty.
        backend: the fused model's backend; None for the library's own choice.
        train: time a training step (forward, backward, SGD) in place of an inference pass.
        compile: also run the eager model under `torch.compile`.
        threads: torch's CPU threads; None for torch's default.
        rounds: how often each candidate is timed.
        weights: see `inputs.build_model`.
        seed: of weights, labels and crops.
        memory: measure the peak memory as well.
    """

    model: str
    batch: int | None = None
    dtype: str = "float32"
    device: str = "cpu"
    images: tuple[str, ...] = ()
    backend: str | None = None
    train: bool = False
    compile: bool = False
    threads: int | None = None
    rounds: int = 30
    weights: str | None = None
    seed: int = 0
    memory: bool = True

    def check(self) -> None:
        """Raises InvalidArgumentError for the first argument that cannot be used."""
        if self.dtype not in DTYPES:
            raise InvalidArgumentError(
                f"--dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}"
            )
        for name in ("batch", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidArgumentError(f"--{name} is {value}, must be at least 1")
        if len(self.images) > self.batch_size:
            raise InvalidArgumentError(
                f"--batch is {self.batch}, must be at least the {len(self.images)} images given"
            )
        check_device(self.device)
        self._check_backend()

    def _check_backend(self) -> None:
        try:
            backends.check_environment()
        except ValueError as error:
            raise InvalidArgumentError(str(error)) from None
        if self.backend is None:
            return
        available = backends.available()
        if self.backend not in available:
            known = ", ".join(available)
            raise InvalidArgumentError(f"--backend is {self.backend!r}, must be one of {known}")
        if available[self.backend] != "yes":
            reason = available[self.backend]
            raise InvalidArgumentError(f"--backend is {self.backend!r}, which cannot run: {reason}")

    @property
    def batch_size(self) -> int:
        """Images in the input."""
        return self.batch if self.batch is not None else max(1, len(self.images))

    @property
    def torch_device(self) -> torch.device:
        """The device of model and input."""
        return torch.device(self.device)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in which convolutions compute."""
        return getattr(torch, self.dtype)

    @property
    def is_mixed(self) -> bool:
        """Whether the case trains in 16 bits, which leaves model and input in float32."""
        return self.train and self.dtype != "float32"


def check_device(device: str) -> None:
    """Raises InvalidArgumentError if torch has no such device here."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise InvalidArgumentError(f"--device is {device!r}, must be cpu, cuda or cuda:N")
    if kind == "cuda":
        if not torch.cuda.is_available():
            why = "is built without CUDA" if torch.version.cuda is None else "finds no GPU"
            raise InvalidArgumentError(
                f"--device is {device!r}, but torch {torch.__version__} {why}"
            )
        if index and int(index) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InvalidArgumentError(f"--device is {device!r}, but torch finds {count} GPU(s)")


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """A candidate's first result against float64's.

    Attributes:
        error: norm of the logits' difference over the norm of float64's logits.
        gradient_error: the same of all parameters' gradients as one vector; None in inference.
        top5: share of float64's five highest classes that are among the candidate's, mean over
            the batch.
    """

    error: float
    gradient_error: float | None
    top5: float


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One row of the table.

    All fields are None when it was `skipped`, for the reason it holds. A candidate that is `wrong`
    has an accuracy and nothing else: it was not timed.
    """

    name: str
    skipped: str | None = None
    latency: Latency | None = None
    accuracy: Accuracy | None = None
    peak_memory: int | None = None
    kept: int | None = None
    energy: float | None = None
    ratio_to_eager: float | None = None
    wrong: bool = False


@dataclasses.dataclass(frozen=True)
class Result:
    """What `compare` found: the case, its candidates, eager first, and what was fused."""

    case: Case
    threads: int
    candidates: tuple[Candidate, ...]
    fused: tuple[str, ...]
    interrupted: bool
    telemetry: Mapping[str, Mapping[str, float | None]]

    def images_per_second(self, candidate: Candidate) -> float:
        """Throughput at the candidate's median latency."""
        return 1e3 * self.case.batch_size / candidate.latency.median


def eager(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
    """The model as torchvision has it."""
    return step(model, model, input, case)


def compiled(model: torch.nn.Module, input: torch.Tensor, case: Case) -> Call:
    """The model under `torch.compile` with its default options."""
    return step(model, torch.compile(model), input, case)


def fused(
    model: torch.nn.Module,
    input: torch.Tensor,
    case: Case,
    wrap: Callable[[torch.nn.Module], Callable[..., torch.Tensor]] = lambda model: model,
    memory: str = "normal",
) -> Call:
    """The model after `fuse`, on the case's backend; `wrap` makes what is called of it."""
    call = step(model, wrap(swap.fuse(model, memory=memory)), input, case)
    if case.backend is None:
        return call

    def on_backend() -> torch.Tensor:
        with backends.use_backend(case.backend):
            return call()

    return on_backend


ENGINES: dict[str, Engine] = {"eager": eager, "torch.compile": compiled, "fused": fused}


def engines_of(case: Case) -> dict[str, Engine]:
    """The candidates a case asks for."""
    names = ENGINES if case.compile else [name for name in ENGINES if name != "torch.compile"]
    return {name: ENGINES[name] for name in names}


def compare(
    case: Case,
    engines: Mapping[str, Engine] | None = None,
    *,
    settle: float = 0.0,
    required: Collection[str] = ("eager", "fused"),
    progress: Progress = lambda stage, done, total: None,
) -> Result:
    """Checks every engine's output against float64, then times them interleaved.

    Weights and input are rounded to the case's dtype before float64 sees them, so the errors are
    those of the computation alone. Inference runs in eval mode under `torch.inference_mode`;
    input and weights are channels_last.

    Args:
        case: what to run.
        engines: name to engine, "eager" among them; `engines_of(case)` when None. An engine takes
            a model of its own and the input and returns the call to time. One that raises is
            skipped; one that is wrong is not timed.
        settle: see `measure.interleave`.
        required: engines whose errors are the caller's to handle, "eager" among them.
        progress: told the stage's name, the steps done and the steps in all.

    Raises:
        InvalidArgumentError: the case cannot be run.
        KeyboardInterrupt: interrupted before a full round was timed. Later, the result says so.
    """
    case.check()
    engines = dict(engines or engines_of(case))
    stages = 2 + len(engines) * (2 if case.memory else 1)
    total, done = stages + case.rounds, 0

    def stage(name: str) -> None:
        nonlocal done
        progress(name, done, total)
        done += 1

    with threads(case.threads), _programs(engines):
        stage("model and input")
        model, input = _prepare(case)
        stage("float64 reference")
        truth = _truth(model, input, case)

        calls: dict[str, Call] = {}
        accuracy: dict[str, Accuracy] = {}
        kept: dict[str, int] = {}
        skipped: dict[str, str] = {}
        wrong: set[str] = set()
        what_is_fused: tuple[str, ...] = ()
        for name, engine in engines.items():
            stage(f"{name}: build and check")
            own = copy.deepcopy(model)
            try:
                calls[name] = engine(own, input, case)
                accuracy[name] = _accuracy(calls[name], own, truth, case)
                if case.train:
                    apart = (*own.parameters(), *own.buffers(), input)
                    kept[name] = kept_bytes(calls[name], apart)
            except Exception as error:
                if name in required:
                    raise
                skipped[name] = f"{type(error).__name__}: {first_line(error)}"
                calls.pop(name, None)
                continue
            factor = FACTOR if name.startswith("fused") else FACTOR_OF_OTHERS
            if name != "eager" and _is_wrong(accuracy[name], accuracy["eager"], factor):
                wrong.add(name)
                del calls[name]
            if name == "fused":
                with backends.use_backend(case.backend) if case.backend else _nothing():
                    what_is_fused = _summary(swap.report(own))

        memory: dict[str, int | None] = {}
        for name in engines if case.memory else ():
            stage(f"{name}: peak memory")
            if name in calls:
                memory[name] = _peak_memory(name, case)

        def on_round(finished: int) -> None:
            progress("timing", stages + finished, total)

        before = telemetry.snapshot(case.torch_device)
        latencies, interrupted = interleave(
            calls, case.rounds, case.torch_device, settle=settle, on_round=on_round
        )
        after = telemetry.snapshot(case.torch_device)
        energy: dict[str, float | None] = {}
        try:
            for name, call in calls.items() if not interrupted else ():
                energy[name] = telemetry.joules(call, case.torch_device, ENERGY_SECONDS)
        except KeyboardInterrupt:
            interrupted = True
        used_threads = torch.get_num_threads()

    candidates = []
    for name in engines:
        if name in skipped:
            candidates.append(Candidate(name, skipped=skipped[name]))
            continue
        if name in wrong:
            candidates.append(Candidate(name, accuracy=accuracy[name], wrong=True))
            continue
        candidates.append(
            Candidate(
                name,
                latency=latencies[name],
                accuracy=accuracy[name],
                peak_memory=memory.get(name),
                kept=kept.get(name),
                energy=energy.get(name),
                ratio_to_eager=latencies[name].median / latencies["eager"].median,
            )
        )
    states = {"before": before, "after": after}
    return Result(case, used_threads, tuple(candidates), what_is_fused, interrupted, states)


_nothing = contextlib.nullcontext


@contextlib.contextmanager
def _programs(names: Collection[str]) -> Iterator[None]:
    """Room for every engine's compiled program: models of one class share a cache and its limit.

    Past the limit a model would run eager, in silence.
    """
    if not any("torch.compile" in name for name in names):
        yield
        return
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield


def _prepare(case: Case) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model in the case's mode, and the input; in its dtype, on its device, channels_last."""
    dtype = torch.float32 if case.is_mixed else case.torch_dtype
    where = {"device": case.torch_device, "dtype": dtype}
    nhwc = {"memory_format": torch.channels_last}
    model = build_model(case.model, case.weights, case.seed).to(**where, **nhwc).train(case.train)
    input = build_input(case.model, case.images, case.batch_size, case.seed).to(**where, **nhwc)
    return model, input


def _labels(logits: torch.Tensor, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(logits.shape[1], (logits.shape[0],), generator=generator)
    return labels.to(logits.device)


def step(
    owner: torch.nn.Module, forward: Callable[..., torch.Tensor], input: torch.Tensor, case: Case
) -> Call:
    """The timed call: an inference pass, or a training step on `owner`'s parameters."""
    if not case.train:
        inference = torch.inference_mode()(forward)
        return lambda: inference(input)

    optimizer = torch.optim.SGD(owner.parameters(), lr=LEARNING_RATE, momentum=0.9)
    device_type = case.torch_device.type
    mixed = {"dtype": case.torch_dtype} if case.is_mixed else {"enabled": False}
    scaled = case.is_mixed and case.torch_dtype is torch.float16
    scaler = torch.amp.GradScaler(device_type, GRADIENT_SCALE, enabled=scaled)
    labels: torch.Tensor | None = None

    def training_step() -> torch.Tensor:
        nonlocal labels
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device_type, **mixed):
            logits = forward(input)
        if labels is None:
            labels = _labels(logits, case.seed)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        scaler.scale(F.cross_entropy(wide, labels)).backward()
        scaler.step(optimizer)
        scaler.update()
        return logits.detach()

    return training_step


@dataclasses.dataclass(frozen=True)
class _Truth:
    logits: torch.Tensor
    gradients: torch.Tensor | None


def _truth(model: torch.nn.Module, input: torch.Tensor, case: Case) -> _Truth:
    """Logits, and in training the gradients as one vector, of the same model in float64."""
    wide = copy.deepcopy(model).double()
    if case.train:
        logits = eager(wide, input.double(), dataclasses.replace(case, dtype="float32"))()
        return _Truth(logits, _gradients(wide))
    # Image by image: eval mode mixes none, and float64 activations of a batch are large.
    logits = torch.cat([eager(wide, image.double(), case)() for image in input.split(1)])
    return _Truth(logits, None)


def _gradients(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _accuracy(call: Call, own: torch.nn.Module, truth: _Truth, case: Case) -> Accuracy:
    logits = call().detach().double().to(truth.logits.device)
    classes = min(5, logits.shape[1])
    top = logits.topk(classes).indices
    expected = truth.logits.topk(classes).indices
    shared = (top[:, :, None] == expected[:, None, :]).any(dim=2).double().mean().item()
    gradient_error = None
    if truth.gradients is not None:
        gradient_error = relative_error(_gradients(own), truth.gradients)
    return Accuracy(relative_error(logits, truth.logits), gradient_error, shared)


def _is_wrong(own: Accuracy, eager: Accuracy, factor: float) -> bool:
    """Whether an error breaks the rule of `testing.assert_error_rule` with this factor."""
    floor = 4 * torch.finfo(torch.float32).eps
    for error, base in ((own.error, eager.error), (own.gradient_error, eager.gradient_error)):
        if error is None or not math.isfinite(base):
            continue
        if not error <= max(factor * base, floor):
            return True
    return False


def _summary(report: Sequence[object]) -> tuple[str, ...]:
    """One line for each way in which the report's modules run, most frequent first."""
    ways = Counter(
        (record.kind, record.backend if record.fused else f"left alone: {record.reason}")
        for record in report
    )
    return tuple(f"{count} x {kind}: {way}" for (kind, way), count in ways.most_common())


def _peak_memory(name: str, case: Case) -> int | None:
    """Peak memory of an engine; on the CPU in a process of its own, None if that died.

    None as well for an engine that such a process would not know.
    """
    from .engines import ENGINES

    if name not in ENGINES:
        return None
    if case.torch_device.type == "cuda":
        with torch.cuda.device(case.torch_device):
            return _peak_memory_here(name, case)
    request = {
        "path": _path_without(os.getcwd()),
        "package": str(Path(__file__).resolve().parents[1]),
        "name": name,
        "case": dataclasses.asdict(case),
    }
    # -I: neither the current folder nor what PYTHONPATH names is on the path while Python starts.
    child = subprocess.run(
        [sys.executable, "-I", "-c", _CHILD],
        input=json.dumps(request),
        capture_output=True,
        text=True,
    )
    return int(child.stdout.split()[-1]) if child.returncode == 0 else None


def _path_without(folder: str) -> list[str]:
    """`sys.path` but for a folder, however it is written there."""
    real = os.path.realpath(folder)
    return [entry for entry in sys.path if entry and os.path.realpath(entry) != real]


# The package is the one that runs here, though it be in the current folder or found by an
# importer.
_CHILD = """
import importlib.util, json, sys
request = json.load(sys.stdin)
sys.path[:] = request["path"] + [own for own in sys.path if own not in request["path"]]
spec = importlib.util.spec_from_file_location(
    "fused_resnet", request["package"] + "/__init__.py",
    submodule_search_locations=[request["package"]],
)
sys.modules["fused_resnet"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["fused_resnet"])
from fused_resnet.measure import compare
case = compare.Case(**request["case"])
print(compare._peak_memory_here(request["name"], case))
"""


def _peak_memory_here(name: str, case: Case) -> int:
    """What the model's passes add to the memory that holds the model and the input.

    Counted: activations, gradients and optimizer state, prepacked weights and kept buffers, a
    library's scratch memory. Not counted: what only the first pass needs, and what the library or
    the compiler loads once for any model (a tiny one runs before counting starts).
    """
    from .engines import ENGINES

    with threads(case.threads):
        model, input = _prepare(case)
        tiny = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        where = {"device": input.device, "dtype": input.dtype}
        ENGINES[name](tiny.to(**where), input[:1, :, :16, :16], case)()
        synchronize(input.device)
        memory = PeakMemory(input.device)
        call = ENGINES[name](model, input, case)
        call()
        synchronize(input.device)
        memory.restart()
        for _ in range(3):
            call()
        synchronize(input.device)
        return memory.bytes()


def document(
    results: Sequence[Result], command: str, root: Path = environment.ROOT
) -> dict[str, object]:
    """The results as JSON, schema "fused_resnet.results/2".

    Top level: what `environment.provenance` gives, and `cases`.

    A case: `model`, `batch`, `dtype`, `device`, `mode` ("inference" or "training"),
    `memory_format`, `weights` ("random" or what was given), `seed`, `images` (paths; empty for
    the default photograph), `backend` (null for the library's choice), `threads`, `rounds` (those
    timed), `interrupted`, `fused` (lines that say what ran how), `telemetry` (`before` and
    `after` the timing, see `telemetry.snapshot`; null in older files), `candidates`.

    A candidate: `name`, `skipped` (null, or why it did not run; then the rest is null), `wrong`
    (error above `testing.FACTOR` times eager's if fused, `FACTOR_OF_OTHERS` times otherwise; then
    only the errors and `top5_agreement` are not null, since what is wrong is not timed),
    `latency_ms` (`median`, `p10`, `p90`, `samples`), `images_per_second`, `ratio_to_eager` (of
    the median latencies), `peak_memory_bytes` (above model and input, null when not measured),
    `kept_bytes` (for the backward pass, each storage once, without parameters, buffers and
    the input; null in inference, absent in older files),
    `energy_joules` (of one call, null where the device does not tell),
    `error` and `gradient_error` (relative to float64, `Accuracy`; null when not finite or, for
    the gradient, in inference), `top5_agreement` (0 to 1).

    `root` is the folder whose commit is recorded.
    """
    device = results[0].case.torch_device
    cases = [_case_document(result) for result in results]
    return {**environment.provenance(SCHEMA, command, device, root), "cases": cases}


def _case_document(result: Result) -> dict[str, object]:
    case, eager = result.case, result.candidates[0].latency
    return {
        "model": case.model,
        "batch": case.batch_size,
        "dtype": case.dtype,
        "device": case.device,
        "mode": "training" if case.train else "inference",
        "memory_format": "channels_last",
        "weights": case.weights or "random",
        "seed": case.seed,
        "images": list(case.images),
        "backend": case.backend,
        "threads": result.threads,
        "rounds": len(eager.samples) if eager else 0,
        "interrupted": result.interrupted,
        "fused": list(result.fused),
        "telemetry": {when: dict(state) for when, state in result.telemetry.items()},
        "candidates": [_candidate_document(result, one) for one in result.candidates],
    }


def _candidate_document(result: Result, candidate: Candidate) -> dict[str, object]:
    latency, accuracy = candidate.latency, candidate.accuracy
    timing = (
        "latency_ms",
        "images_per_second",
        "ratio_to_eager",
        "peak_memory_bytes",
        "kept_bytes",
    )
    fields: dict[str, object] = {"name": candidate.name, "skipped": candidate.skipped}
    fields |= dict.fromkeys((*timing, "energy_joules", *_ACCURACY, "wrong"))
    if accuracy is None:
        return fields
    errors = (_finite(accuracy.error), _finite(accuracy.gradient_error), accuracy.top5)
    fields |= {**dict(zip(_ACCURACY, errors, strict=True)), "wrong": candidate.wrong}
    if latency is None:
        return fields
    return fields | {
        "latency_ms": {
            "median": latency.median,
            "p10": latency.quantile(0.1),
            "p90": latency.quantile(0.9),
            "samples": list(latency.samples),
        },
        "images_per_second": result.images_per_second(candidate),
        "ratio_to_eager": candidate.ratio_to_eager,
        "peak_memory_bytes": candidate.peak_memory,
        "kept_bytes": candidate.kept,
        "energy_joules": candidate.energy,
    }


_ACCURACY = ("error", "gradient_error", "top5_agreement")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def write_json(document: Mapping[str, object], path: Path) -> None:
    """Writes strict JSON, complete or not at all.

    Raises:
        OSError: the file cannot be written; it stays as it was.
    """
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    files.replace(path, text.encode())


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Makes of what the system says of a file that cannot be written an InvalidArgumentError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise InvalidArgumentError(f"{path} cannot be written: {reason}") from None
