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
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from .. import backends, swap
from ..testing import FACTOR, relative_error
from . import telemetry
from .case import (
    ENERGY_SECONDS,
    FACTOR_OF_OTHERS,
    LARGEST_INT8_ERROR,
    Accuracy,
    Call,
    Candidate,
    Case,
    Engine,
    Progress,
    Result,
)
from .clock import PeakMemory, interleave, kept_bytes, synchronize, threads
from .engines import CALIBRATION_BATCH, ENGINES, FLOAT8, IN_EIGHT_BITS, INT8, eager
from .errors import first_line
from .inputs import build_input, build_model, calibration_images


def engines_of(case: Case) -> dict[str, Engine]:
    """The candidates a case asks for."""
    names = ("eager", "torch.compile", "fused") if case.compile else ("eager", "fused")
    names = (*names, f"fused, {case.quantize}") if case.quantize else names
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
        settle: see `clock.interleave`.
        required: engines whose errors are the caller's to handle, "eager" among them.
        progress: told the stage's name, the steps done and the steps in all.

    Raises:
        InvalidArgumentError: the case cannot be run.
        KeyboardInterrupt: interrupted before a full round was timed. Later, the result says so.
    """
    case.check()
    if case.calibrate is not None:  # so that a bad folder is an error before anything runs
        calibration_images(case.model, case.calibrate, case.images, case.seed)
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
        in_eight_bits: tuple[str, ...] = ()
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
            is_wrong = _is_wrong(accuracy[name], accuracy["eager"], factor)
            if name in IN_EIGHT_BITS:
                is_wrong = not accuracy[name].error <= LARGEST_INT8_ERROR
            if name in (INT8, FLOAT8):
                in_eight_bits = _quantized(model, own, case)
            if name != "eager" and is_wrong:
                wrong.add(name)
                del calls[name]
            if name == "fused":
                with backends.use_backend(case.backend) if case.backend else _nothing():
                    what_is_fused = _summary(swap.report(own, None if case.train else input))

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
    return Result(
        case, used_threads, tuple(candidates), what_is_fused, interrupted, states, in_eight_bits
    )


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
    device, nhwc = case.torch_device, torch.channels_last
    model = build_model(case.model, case.weights, case.seed).to(device, dtype)
    input = build_input(case.model, case.images, case.batch_size, case.seed).to(device, dtype)
    return model.to(memory_format=nhwc).train(case.train), input.to(memory_format=nhwc)


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
        if error is None or base is None or not math.isfinite(base):
            continue
        if not error <= max(factor * base, floor):
            return True
    return False


def _quantized(model: torch.nn.Module, own: torch.nn.Module, case: Case) -> tuple[str, ...]:
    """How a quantized model runs, and how often it agrees with the one it was made from."""
    records = [record for record in swap.report(own) if record.kind not in ("stem", "classifier")]
    ratios = [r.sqnr_db for r in records if r.precision == case.quantize and r.sqnr_db is not None]
    lines = [f"{len(ratios)} of {len(records)} blocks"]
    if ratios:
        lines[0] += f", signal to quantization noise {min(ratios):.1f} to {max(ratios):.1f} dB"
    left = Counter(record.reason for record in records if record.precision != case.quantize)
    lines += [f"{count} x {reason}" for reason, count in left.most_common()]
    images = calibration_images(case.model, case.calibrate, case.images, case.seed)
    device = case.torch_device
    equal, error = 0, []
    with torch.inference_mode():
        for part in images.split(CALIBRATION_BATCH):
            part = part.to(device, case.torch_dtype, memory_format=torch.channels_last)
            logits, expected = own(part), model(part)
            equal += int((logits.argmax(1) == expected.argmax(1)).sum())
            error.append(relative_error(logits, expected))
    kind = "calibration images" if case.calibrate else "crops it was calibrated on"
    mean = sum(error) / len(error)
    lines.append(
        f"top-1 as eager's on {equal} of {len(images)} {kind}, error relative to eager {mean:.2g}"
    )
    return tuple(lines)


def _summary(report: Sequence[swap.Record]) -> tuple[str, ...]:
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
from fused_resnet.measure import case as cases, compare
case = cases.Case(**request["case"])
print(compare._peak_memory_here(request["name"], case))
"""


def _peak_memory_here(name: str, case: Case) -> int:
    """What the model's passes add to the memory that holds the model and the input.

    Counted: activations, gradients and optimizer state, prepacked weights and kept buffers, a
    library's scratch memory. Not counted: what only the first pass needs, and what the library or
    the compiler loads once for any model (a tiny one runs before counting starts).
    """
    with threads(case.threads):
        model, input = _prepare(case)
        tiny = torch.nn.Sequential(
            torch.nn.Conv2d(3, 16, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        )
        ENGINES[name](tiny.to(input.device, input.dtype), input[:1, :, :16, :16], case)()
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
