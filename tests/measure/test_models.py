"""`bench models` and telemetry: engines, both modes, failures as rows."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Run
from support.results import CPU, failing
from support.results_schema import check_document

from fused_resnet.measure import (
    compare,
    documents,
    engines,
    models,
    telemetry,
)
from fused_resnet.measure import step as timed
from fused_resnet.measure.case import Call, Case
from fused_resnet.testing import relative_error


def test_models_command_writes_both_modes(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "models.json"
    without = [part for name in engines.ENGINES if name not in ("eager", "fused")
               for part in ("--without", name)]  # fmt: skip
    code, out, err = run(
        "bench", "models", "--model", "resnet18", "--mode", "inference,training", "--rounds", 2,
        "--threads", 1, "--no-memory", "--json", written, *without,
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(written.read_text())
    check_document(content)
    assert [case["mode"] for case in content["cases"]] == ["inference", "training"]
    for case in content["cases"]:
        assert case["telemetry"]["before"].keys() == {"clock_mhz", "load_average"}
        for one in case["candidates"]:
            assert f"{one['latency_ms']['median']:.2f}" in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_in_16_bits_is_mixed_precision(dtype: str) -> None:
    """Parameters and gradients stay float32, unscaled; convolutions compute in the case's dtype."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 8, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    model, input = torch.nn.Sequential(*layers), torch.randn(4, 3, 6, 6)
    before = model[0].weight.detach().clone()
    gradients = {}
    for name in (dtype, "float32"):
        case = Case("resnet18", dtype=name, train=True)
        logits = timed.step(model, model, input, case)()
        assert logits.dtype is getattr(torch, name)
        gradients[name] = model[0].weight.grad
    assert gradients[dtype].dtype is torch.float32
    # 16 bits, not float32's millionths; and not a scale of a thousand.
    assert 1e-5 < relative_error(gradients[dtype], gradients["float32"]) < 0.1
    assert not torch.equal(model[0].weight, before)
    prepared, _ = compare._prepare(dataclasses.replace(case, dtype=dtype, batch=1))
    assert {p.dtype for p in prepared.parameters()} == {torch.float32}


def test_models_that_fail_are_rows() -> None:
    case = Case("resnet18", rounds=1, threads=1, memory=False)
    (result,) = models.measure([case], engines={"eager": engines.eager, "fused": failing})
    eager, fused = result.candidates
    assert eager.latency is not None
    assert fused.skipped == "OutOfMemoryError: too large"
    (result,) = models.measure([case], engines={"eager": failing, "fused": engines.fused})
    assert [one.skipped for one in result.candidates] == 2 * ["OutOfMemoryError: too large"]
    content = documents.document([result], "")
    check_document(content)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_models_keep_the_cases_that_are_done() -> None:
    first = Case("resnet18", rounds=1, threads=1, memory=False)
    second = Case("resnet18", batch=2, rounds=1, threads=1, memory=False)

    def engine(model: Any, input: torch.Tensor, case: Case) -> Call:
        if case.batch == 2:
            signal.raise_signal(signal.SIGINT)
        return engines.eager(model, input, case)

    (result,) = models.measure([first, second], engines={"eager": engine})
    assert result.case is first
    with pytest.raises(KeyboardInterrupt):
        models.measure([second], engines={"eager": engine})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"), [("OpenVINO", "openvino"), ("ONNX Runtime", "onnxruntime")]
)
def test_other_engines_compute_the_same(name: str, package: str) -> None:
    pytest.importorskip(package, reason='needs pip install ".[bench]"')
    case = Case("resnet18", rounds=1, memory=False)
    result = compare.compare(case, {"eager": engines.eager, name: engines.ENGINES[name]})
    _, other = result.candidates
    assert other.skipped is None
    assert not other.wrong
    assert other.accuracy.error < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"), [("OpenVINO, int8", "nncf"), ("ONNX Runtime, int8", "onnxruntime")]
)
def test_other_engines_in_eight_bits(name: str, package: str) -> None:
    pytest.importorskip(package, reason='needs pip install ".[bench]"')
    case = Case("resnet18", rounds=1, memory=False, quantize="int8")
    result = compare.compare(case, {"eager": engines.eager, name: engines.ENGINES[name]})
    _, other = result.candidates
    assert other.skipped is None
    assert not other.wrong
    assert 1e-4 < other.accuracy.error < 0.05


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes_of_the_compiler(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They time what `torch.compile` makes of the model in that mode; on a GPU only."""
    case, seen = Case("resnet18"), []

    def compile_(model: torch.nn.Module, **options: str) -> torch.nn.Module:
        seen.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile_)
    model, input = torch.nn.Linear(3, 2), torch.randn(4, 3)
    engine = engines.compiled_mode(mode)
    with pytest.raises(NotImplementedError, match="on a GPU only"):
        engine(model, input, case)
    on_gpu: Any = types.SimpleNamespace(device=torch.device("cuda"))
    call = engine(lambda _: model(input), on_gpu, case)
    torch.testing.assert_close(call(), model(input))
    assert seen == [{"mode": mode}]


def test_candidates_in_eight_bits() -> None:
    found = engines.engines_for("cpu", False, (), True)
    assert list(found)[:3] == ["eager", "fused", engines.INT8]
    assert {"OpenVINO, int8", "ONNX Runtime, int8"} < set(found)
    assert {*found} - {"eager", "fused"} == {*found} & engines.IN_EIGHT_BITS
    assert {
        name for name in engines.ENGINES if "int8" in name or "float8" in name
    } == engines.IN_EIGHT_BITS
    assert not engines.IN_EIGHT_BITS & set(engines.engines_for("cpu", False))
    assert engines.settle_for(["OpenVINO, int8"]) > 0
    assert engines.settle_for([engines.INT8]) == 0


def test_models_in_eight_bits() -> None:
    """The file has their dtype as int8, beside float32's, and what is too far off is not timed."""
    seen: list[Case] = []

    def engine(model: Any, input: torch.Tensor, case: Case) -> Call:
        seen.append(case)
        return engines.eager(model, input, case)

    def off(model: Any, input: torch.Tensor, case: Case) -> Call:
        return lambda: 2 * engines.eager(model, input, case)()

    cases = [
        Case("resnet18", rounds=1, threads=1, memory=False, quantize=quantize)
        for quantize in (None, "int8")
    ]
    chosen = {"eager": engine, "fused, int8 with its stem": off}
    content = documents.document(models.measure(cases, engines=chosen), "")
    check_document(content)
    assert [case["dtype"] for case in content["cases"]] == ["float32", "int8"]
    assert seen == cases
    for case in content["cases"]:
        assert [one["wrong"] for one in case["candidates"]] == [False, True]


def test_engines_refuse_what_they_cannot_run() -> None:
    model, input = torch.nn.Identity(), torch.zeros(1)
    case = Case("resnet18", train=True)
    for name in ("torch.compile, frozen", "OpenVINO", "ONNX Runtime", "CUDA graph"):
        with pytest.raises((NotImplementedError, ImportError)):
            engines.ENGINES[name](model, input, case)
    for device in ("cpu", "cuda"):
        for train in (False, True):
            found = engines.engines_for(device, train, without=["eager", "torch.compile"])
            assert next(iter(found)) == "eager"
            assert "fused" in found
            assert "torch.compile" not in found


def test_telemetry_reads_nvml_and_survives_its_absence(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2")
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert set(telemetry.snapshot(gpu).values()) == {None}
    assert telemetry.joules(lambda: None, gpu, 0.01) is None
    counter = iter(range(0, 10**9, 5000))
    nvml = types.SimpleNamespace(
        NVMLError=OSError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda gpu, which: 1000 * which,
        nvmlDeviceGetTemperature=lambda gpu, which: 40,
        nvmlDeviceGetPowerUsage=lambda gpu: 250_000,
        nvmlDeviceGetTotalEnergyConsumption=lambda gpu: next(counter),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    state = telemetry.snapshot(gpu)
    assert state["clock_mhz"], state["memory_clock_mhz"] == (1000, 2000)
    assert (state["temperature_celsius"], state["power_watts"]) == (40, 250)
    assert state["throttled"] is None  # this NVML does not tell
    calls: list[int] = []
    per_call = telemetry.joules(lambda: calls.append(1), gpu, 0.01)
    assert per_call == pytest.approx(5 / len(calls))
    assert telemetry.joules(lambda: None, CPU, 0.01) is None
