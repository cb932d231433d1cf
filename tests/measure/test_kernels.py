"""The benchmarks: they count the right work and check it, and the README says what they found."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support import Run
from support.results_schema import check_document, check_kernels_document

from fused_resnet import backends
from fused_resnet.measure import (
    candidates,
    ceilings,
    compare,
    comparison,
    documents,
    engines,
    environment,
    kernels,
    models,
    norms,
    predict,
    predict_training,
    resources,
    telemetry,
)
from fused_resnet.measure import page as report
from fused_resnet.measure import step as timed
from fused_resnet.measure.case import Call, Case
from fused_resnet.measure.inputs import InvalidArgumentError
from fused_resnet.testing import relative_error
from fused_resnet.tuning.architecture import ARCHITECTURES
from fused_resnet.tuning.choice import CHAIN_KERNELS, Choice

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "bench" / "results" / "static"
CPU = torch.device("cpu")
LAYER = "2048x7x7 to 512, 1x1"
needs_amx = pytest.mark.skipif(
    torch.ops.fused_resnet.conv_tile_isa() != "amx", reason="this processor has no AMX"
)


@pytest.fixture
def readme_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script bench/write_readme.py."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("write_readme")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings that take no time to measure, and one set of tensors a layer."""
    monkeypatch.setattr(ceilings, "COLD_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "_MATRIX_SIZE", {"cpu": 64})
    return


def candidate(name: str, median: float, **changes: Any) -> dict[str, Any]:
    samples = [median] * 9
    latency = {"median": median, "p10": median, "p90": median, "samples": samples}
    fields = {
        "name": name, "skipped": None, "latency_ms": latency, "images_per_second": 1e3 / median,
        "ratio_to_eager": median / 100, "peak_memory_bytes": 2**20, "energy_joules": None,
        "error": 2e-7, "gradient_error": None, "top5_agreement": 1.0, "wrong": False,
    }  # fmt: skip
    return fields | changes


def provenance(schema: str, date: str) -> dict[str, Any]:
    return {
        "schema": schema, "date": date, "command": "fused-resnet bench <models>", "commit": "abc",
        "versions": {
            "python": "3", "fused_resnet": "0", "torch": "2", "torchvision": "0", "triton": None
        },
        "device": {"type": "cpu", "name": "Some CPU"},
    }  # fmt: skip


def models_document(
    date: str = "2026-01-02T00:00:00+00:00", fused_ms: float = 50.0
) -> dict[str, Any]:
    absent = dict.fromkeys(candidate("", 1.0), None)
    untimed = dict.fromkeys(
        ("latency_ms", "images_per_second", "ratio_to_eager", "peak_memory_bytes")
    )
    case = {
        "model": "resnet50", "batch": 1, "dtype": "float32", "device": "cpu",
        "mode": "inference", "memory_format": "channels_last", "weights": "random", "seed": 0,
        "images": [], "backend": None, "threads": 2, "rounds": 9, "interrupted": False,
        "fused": [], "telemetry": None,
        "candidates": [
            candidate("eager", 100.0),
            candidate("fused", fused_ms),
            candidate("cheat", 1.0, wrong=True, error=3e-3, **untimed),
            {**absent, "name": "absent", "skipped": "ImportError: nothing there"},
        ],
    }  # fmt: skip
    return {**provenance(documents.MODELS, date), "cases": [case]}


def measured(found: dict[str, candidates.Prepare], rounds: int = 3) -> dict[str, Any]:
    """The document of one layer."""
    case = kernels.Case("resnet50", 1, "float32", "cpu")
    result = kernels.measure(
        case, case.problems(LAYER), found, rounds=rounds, thread_count=1, scale=0.02
    )
    return kernels.document([result], "command")


# Kernels.


@pytest.mark.usefixtures("small")
def test_layers_are_timed_side_by_side() -> None:
    content = measured(candidates.for_device(CPU, without=["torch.compile"]))
    check_kernels_document(content)
    json.dumps(content, allow_nan=False)
    ((layer,),) = (case["layers"] for case in content["cases"])
    assert (layer["label"], layer["count"]) == (LAYER, 2)
    assert layer["flops"] == 2 * 2048 * 512 * 49
    assert [one["name"] for one in layer["candidates"]] == ["eager", "oneDNN, fused", "fused, cpu"]
    assert all(one["status"] == "timed" for one in layer["candidates"])
    assert all(0 < one["error"] < 2e-6 for one in layer["candidates"])
    assert layer["candidates"][2]["keeps_nan"]
    totals = kernels.totals(content["cases"][0])
    median = layer["candidates"][0]["microseconds"]["median"]
    assert totals["eager"].milliseconds == pytest.approx(2e-3 * median)
    assert totals["eager"].roofline == pytest.approx(layer["candidates"][0]["roofline"])


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("model", ["resnet18", "resnext50_32x4d"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_candidates_agree_on_every_kind_of_layer(model: str, dtype: str) -> None:
    """The stem with its pool, shortcuts, strides and groups, on small images."""
    found = kernels.networks.of_model(model, 1, dtype, 32)
    ways = candidates.for_device(CPU, without=["torch.compile"])
    case = kernels.Case(model, 1, dtype, "cpu")
    chosen = dict(list(found.items())[:6])
    result = kernels.measure(case, chosen, ways, rounds=1, thread_count=1, scale=0.02)
    assert {True, False} == {layer.problem.residual for layer in result.layers}
    for layer in result.layers:
        for row in layer.rows:
            assert (row.status, row.reason) == ("timed", None), (str(layer.problem), row)


def norms_in_training(found: dict[str, Any], rounds: int = 2) -> dict[str, Any]:
    """The document of resnet50's norms of one shape, two of three with a shortcut."""
    case = kernels.Case("resnet50", 1, "float32", "cpu", "training")
    chosen = case.norms("2048x7x7")
    result = kernels.measure(case, chosen, found, rounds=rounds, thread_count=1, scale=0.02)
    return kernels.document([result], "command")


@pytest.mark.usefixtures("small")
def test_norms_of_a_training_step_are_timed() -> None:
    content = norms_in_training(candidates.for_norms(candidates.for_device(CPU)))
    check_kernels_document(content)
    json.dumps(content, allow_nan=False)
    found = {layer["label"]: layer for layer in content["cases"][0]["layers"]}
    assert {label: layer["count"] for label, layer in found.items()} == {
        "norm + shortcut + ReLU of 2048x7x7": 3,
        "norm of 2048x7x7": 1,
    }
    for layer in found.values():
        names = [one["name"] for one in layer["candidates"]]
        assert names == ["eager", "torch.compile", "fused, cpu"]
        assert all(one["status"] == "timed" for one in layer["candidates"])
        assert all(0 < one["error"] < 2e-6 for one in layer["candidates"])
    medians = [layer["candidates"][0]["microseconds"]["median"] for layer in found.values()]
    total = kernels.totals(content["cases"][0])["eager"]
    counts = [layer["count"] for layer in found.values()]
    expected = 1e-3 * sum(m * c for m, c in zip(medians, counts, strict=True))
    assert total.milliseconds == pytest.approx(expected)


def test_norms_of_a_network() -> None:
    """Each once, and what follows it; in resnet18 the second of a block has the shortcut."""
    for model, every, adds, projections in (("resnet50", 53, 16, 4), ("resnet18", 20, 8, 3)):
        found = kernels.Case(model, 2, "bfloat16", "cpu", "training").norms()
        assert sum(found.values()) == every
        assert sum(count for p, count in found.items() if p.residual) == adds
        assert sum(count for p, count in found.items() if not p.relu) == projections
        assert len({p.key for p in found}) == len(found)
        assert all(p.N == 2 for p in found)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("broken", "named"),
    [(0, "output"), (1, "input's gradient"), (2, "weight's"), (3, "bias's"), (4, "shortcut's")],
)
def test_wrong_norms_are_rows_and_not_timed(broken: int, named: str) -> None:
    """Wherever the error is; `fused` may err less than what is not ours."""

    def wrong(by: float) -> norms.Prepare:
        def prepare(arguments: tuple, problem: Any) -> norms.Call:
            def call() -> tuple[torch.Tensor, ...]:
                results = list(norms.step(norms.operators, arguments, problem))
                if broken < len(results):
                    results[broken] = results[broken] * (1 + by)
                return tuple(results)

            return call

        return prepare

    def short(arguments: tuple, problem: Any) -> norms.Call:
        return lambda: norms.step(norms.operators, arguments, problem)[:-1]

    found = {
        "eager": norms.eager, "others": wrong(2e-6), "fused, bad": wrong(1e-5),
        "others, bad": wrong(1e-3), "fused, short": short,
    }  # fmt: skip
    content = norms_in_training(found, rounds=1)
    check_kernels_document(content)
    (with_shortcut,) = (x for x in content["cases"][0]["layers"] if "shortcut" in x["label"])
    rows = {one["name"]: one for one in with_shortcut["candidates"]}
    status = {name: row["status"] for name, row in rows.items()}
    assert status == {
        "eager": "timed", "others": "timed", "fused, bad": "wrong", "others, bad": "wrong",
        "fused, short": "wrong",
    }  # fmt: skip
    assert rows["fused, bad"]["reason"].startswith(f"{named}: error 1.0e-05, at most")
    assert rows["fused, short"]["reason"] == "4 results, must be 5"


@pytest.mark.usefixtures("small")
def test_wrong_and_failing_candidates_are_rows_and_not_timed() -> None:
    calls: list[str] = []

    def wrong(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        return lambda: calls.append("wrong") or run() * (1 + 1e-3)

    def loses_nan(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        return lambda: run().nan_to_num(0.0)

    def failing(arguments: tuple, problem: Any) -> candidates.Call:
        raise RuntimeError("no kernel\nand more")

    def misshapen(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        return lambda: run()[:, 1:]

    def late(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)

        def call() -> torch.Tensor:
            calls.append("late")
            if calls.count("late") > 4:
                raise RuntimeError("gave up")
            return run()

        return call

    ways = {
        "eager": candidates.eager, "wrong": wrong, "library": loses_nan, "fused, lossy": loses_nan,
        "failing": failing, "misshapen": misshapen,
    }  # fmt: skip
    content = measured(ways)
    check_kernels_document(content)
    rows = {one["name"]: one for one in content["cases"][0]["layers"][0]["candidates"]}
    assert list(rows) == list(ways)
    assert rows["eager"]["status"] == "timed"
    assert rows["wrong"]["status"] == "wrong"
    assert rows["wrong"]["error"] == pytest.approx(1e-3, rel=1e-2)
    assert calls == ["wrong"]  # checked, not timed
    # Of others' kernels losing NaN is worth a note; ours must not.
    assert (rows["library"]["status"], rows["library"]["keeps_nan"]) == ("timed", False)
    assert rows["fused, lossy"]["status"] == "wrong"
    assert "NaN" in rows["fused, lossy"]["reason"]
    assert rows["failing"]["reason"] == "RuntimeError: no kernel"
    assert "shape" in rows["misshapen"]["reason"]

    content = measured({"eager": candidates.eager, "late": late})
    check_kernels_document(content)
    assert all(
        (one["status"], one["reason"]) == ("failed", "RuntimeError: gave up")
        for one in content["cases"][0]["layers"][0]["candidates"]
    )


@pytest.mark.usefixtures("small")
def test_a_layer_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(kernels.cases, "make_case", no_memory)
    content = measured({"eager": candidates.eager})
    check_kernels_document(content)
    assert "too large" in content["cases"][0]["layers"][0]["candidates"][0]["reason"]
    assert kernels.totals(content["cases"][0]) == {"eager": None}


@pytest.mark.usefixtures("small")
def test_inputs_rotate_where_the_cache_would_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = kernels.Case("resnet50", 1, "float32", "cpu").problems(LAYER)
    monkeypatch.setattr(ceilings, "COLD_BYTES", 3 * problem.bytes_once - 1)
    seen: list[int] = []

    def spy(arguments: tuple, problem: Any) -> candidates.Call:
        run = candidates.eager(arguments, problem)
        # A model's weights are no inference tensors: those would be prepared for each call anew.
        assert not arguments[1].is_inference()
        return lambda: seen.append(arguments[0].data_ptr()) or run()

    measured({"eager": candidates.eager, "spy": spy}, rounds=6)
    timed = seen[-6:]
    assert len(set(timed)) == 3
    assert timed[:3] == timed[3:]


@pytest.mark.usefixtures("small", "interruptible")
def test_interrupted_kernels_keep_the_layers_that_are_done(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original, done = kernels._rows, []

    def stop(*arguments: Any) -> Any:
        if len(done) == 1:
            signal.raise_signal(signal.SIGINT)
        done.append(original(*arguments))
        return done[-1]

    monkeypatch.setattr(kernels, "_rows", stop)
    written = tmp_path / "kernels.json"
    code, out, err = run(
        "bench", "kernels", "--layers", "7x7", "--rounds", 2, "--threads", 1, "--without",
        "torch.compile", "--json", written,
    )  # fmt: skip
    assert code == 130, err
    assert "interrupted after 1 of 4 layers" in out
    content = json.loads(written.read_text())
    check_kernels_document(content)
    assert content["cases"][0]["interrupted"]
    assert len(content["cases"][0]["layers"]) == 1


@pytest.mark.usefixtures("small")
def test_bottlenecks_are_timed_as_one_kernel_and_by_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs interpreted here; without that it is a row with its reason."""
    found = kernels.networks.chains_of_model("resnet50", 1, "bfloat16", 32)
    chosen = {problem: 2 for problem in found if problem and problem.width == 64}
    assert [bool(problem.projection) for problem in chosen] == [True, False, False]
    layers = candidates.for_device(CPU, without=["torch.compile"])
    blocks = candidates.for_blocks(layers)
    assert list(blocks) == ["eager", "fused, cpu", "fused, one kernel"]
    case = kernels.Case("resnet50", 1, "bfloat16", "cpu")

    def rows_of(chosen: dict[Any, int]) -> list[dict[str, Any]]:
        result = kernels.measure(case, chosen, layers, blocks, rounds=1, thread_count=1, scale=0.02)
        content = kernels.document([result], "command")
        check_kernels_document(content)
        assert not content["cases"][0]["layers"]
        assert kernels.totals(content["cases"][0]) == {}
        return [one for block in content["cases"][0]["blocks"] for one in block["candidates"]]

    if backends.triton.interpreted():
        assert [one["status"] for one in rows_of(chosen)] == ["timed"] * 9
    monkeypatch.setattr(candidates.eligible, "interpreted", lambda: False)
    *timed, last = rows_of(dict(list(chosen.items())[:1]))
    assert [one["status"] for one in timed] == ["timed"] * 2
    assert last["reason"] == "NotImplementedError: runs on a GPU only"
    monkeypatch.setitem(
        blocks, "fused, cpu", lambda *both: lambda: [1.1 * o for o in blocks["eager"](*both)()]
    )
    _, wrong, _ = rows_of(dict(list(chosen.items())[:1]))
    assert wrong["status"] == "wrong"
    assert "output: error" in wrong["reason"]


@pytest.mark.usefixtures("small")
def test_kernels_prints_what_it_writes(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "kernels.json"
    code, out, err = run(
        "bench", "kernels", "--layers", LAYER, "--rounds", 2, "--threads", 1, "--backend",
        "cpu,reference", "--without", "torch.compile", "--batch", "1,2", "--json", written,
    )  # fmt: skip
    assert code == 0, err
    content = json.loads(written.read_text())
    check_kernels_document(content)
    assert [case["batch"] for case in content["cases"]] == [1, 2]
    for case in content["cases"]:
        names = [one["name"] for one in case["layers"][0]["candidates"]]
        assert names == ["eager", "oneDNN, fused", "fused, cpu", "fused, reference"]
        for one in case["layers"][0]["candidates"]:
            assert one["status"] == "failed" or f"{one['microseconds']['median']:.1f}" in out
    assert "all layers, fused, cpu" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.usefixtures("small")
def test_a_backend_that_cannot_run_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        candidates.backends, "available", lambda: {"cpu": "yes", "triton": "no such luck"}
    )
    monkeypatch.setattr(backends.named("triton"), "available", lambda: "no such luck")
    rows = measured(candidates.for_device(CPU, ["triton"], ["torch.compile"]))
    row = rows["cases"][0]["layers"][0]["candidates"][-1]
    assert (row["name"], row["status"]) == ("fused, triton", "failed")
    assert "no such luck" in row["reason"]


def test_each_layer_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """One program for all would pass the limit of recompilations and run eager in silence."""
    compiled: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: compiled.append(run) or run)
    prepare = candidates.compiled()
    first, second, *_ = kernels.networks.of_model("resnet18", 1, "float32", 32)
    for problem in (first, first, second, second):
        prepare((), problem)
    assert len(compiled) == 2


def test_the_roofline_is_the_larger_of_two_times() -> None:
    (problem,) = kernels.Case("resnet50", 1, "float32", "cpu").problems(LAYER)
    slow_memory = ceilings.Ceilings(1.0, 1e30, 1, 1)
    slow_products = ceilings.Ceilings(1e30, 1.0, 1, 1)
    assert slow_memory.least_seconds(problem) == problem.bytes_once
    assert slow_products.least_seconds(problem) == problem.flops
    both = slow_memory.better_of(slow_products)
    assert (both.copy_bandwidth, both.matrix_rate) == (1e30, 1e30)
    for dtype in ("float32", "bfloat16"):
        found = ceilings.measure(CPU, dtype, scale=0.02)
        assert found.copy_bandwidth > 1e6
        assert found.matrix_rate > 1e6


@needs_amx
@pytest.mark.usefixtures("small")
def test_the_rate_of_the_matrix_unit_is_measured() -> None:
    """A float32 product is six of bfloat16, or as many as torch's setting says."""
    (problem,) = kernels.Case("resnet50", 1, "float32", "cpu").problems(LAYER)
    assert problem.flops == 2 * 2048 * 512 * 49
    found = {d: ceilings.measure(CPU, d, scale=0.02) for d in ("float32", "bfloat16", "float16")}
    assert found["float16"].unit_seconds(problem) is None
    for dtype, products in (("bfloat16", 1), ("float32", 6)):
        unit = found[dtype].unit
        assert unit is not None
        assert (unit.name, unit.products) == ("amx", products)
        assert unit.rate == unit.rates["bfloat16"] / products
        assert found[dtype].unit_seconds(problem) == problem.flops / unit.rate
        # A core does 1024 multiply-adds a cycle, and no vector unit does an eighth of that.
        assert 0.2e12 < unit.rates["bfloat16"] < 2 * 1024 * 6e9 * torch.get_num_threads()
    before = torch.backends.mkldnn.conv.fp32_precision
    try:
        torch.backends.mkldnn.conv.fp32_precision = "tf32"
        unit = ceilings.measure(CPU, "float32", scale=0.02).unit
        assert unit is not None
        assert unit.products == 3
    finally:
        torch.backends.mkldnn.conv.fp32_precision = before
    content = measured(candidates.for_device(CPU, without=["torch.compile"]))
    check_kernels_document(content)
    (case,) = content["cases"]
    assert case["ceilings"]["matrix_unit"]["products"] == 6
    (layer,) = case["layers"]
    timed = layer["candidates"][0]
    median = timed["microseconds"]["median"]
    assert timed["unit_share"] == pytest.approx(layer["unit_microseconds"] / median)
    assert kernels.totals(case)["eager"].unit == pytest.approx(timed["unit_share"])


# Models.


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


def failing(model: Any, input: Any, case: Case) -> Call:
    raise torch.OutOfMemoryError("too large")


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


# Telemetry.


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


# Result files.


def test_result_files_follow_the_schema() -> None:
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        if path.parent.name == "static":  # see test_triton_static.py
            continue
        content = documents.load(path)
        assert path == documents.default_path(content, ROOT)
        if content["schema"] == documents.KERNELS:
            check_kernels_document(content)
            continue
        check_document(content)
        for case in content["cases"]:
            assert not any(c["wrong"] for c in case["candidates"] if c["name"] == "fused"), path


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        documents.load(path)
    for text, what in (
        ("{", "no JSON"),
        ("[]", "not an object"),
        ('{"schema": "other/1"}', "other/1"),
        (f'{{"schema": "{documents.MODELS}", "cases": []}}', "no results"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidArgumentError, match=what):
            documents.load(path)


def test_runs_of_one_day_and_commit_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.json"
    first, second, third = (models_document(fused_ms=ms) for ms in (50.0, 40.0, 30.0))
    second["cases"][0]["batch"] = 8
    second["command"] = "another"
    documents.add(first, path)
    documents.add(second, path)
    content = documents.load(path)
    assert [case["batch"] for case in content["cases"]] == [1, 8]
    assert content["command"] == f"{first['command']} && another"
    documents.add(third, path)
    content = documents.load(path)
    assert content["cases"][0] == third["cases"][0]
    assert len(content["cases"]) == 2
    third["versions"] = {**third["versions"], "torch": "3"}
    documents.add(third, path)
    assert len(documents.load(path)["cases"]) == 1


def test_repository_is_found_by_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert documents.repository() is None
    for name in (".git", "csrc"):
        (tmp_path / name).mkdir()
    assert documents.repository() == tmp_path
    name = documents.default_path(models_document(), tmp_path).relative_to(tmp_path)
    assert str(name) == "bench/results/some-cpu/2026-01-02-abc.json"


# Comparing files.


def with_samples(scale: float, spread: float, count: int = 15) -> dict[str, Any]:
    content = models_document()
    for one in content["cases"][0]["candidates"][:2]:
        middle = scale * one["latency_ms"]["median"]
        steps = [middle * (1 + spread * (2 * i / (count - 1) - 1)) for i in range(count)]
        one["latency_ms"] = {**one["latency_ms"], "samples": steps}
    return content


@pytest.mark.parametrize(
    ("scale", "spread", "kind"),
    [
        (1.0, 0.0, "same"),
        (1.02, 0.0, "same"),  # below the threshold
        (1.10, 0.01, "slower"),
        (1.10, 0.30, "same"),  # within the noise
        (0.90, 0.01, "faster"),
        (0.90, 0.30, "same"),
    ],
)
def test_only_what_is_beyond_the_noise_is_a_change(scale: float, spread: float, kind: str) -> None:
    found = comparison.changes(with_samples(1.0, spread), with_samples(scale, spread))
    assert {change.kind for change in found[:2]} == {kind}
    assert {change.kind for change in found[2:]} == {"same"}  # never timed


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        low, high = comparison.interval(torch.randn(25, generator=generator).exp().tolist())
        hits += low <= 1.0 <= high
    assert 930 <= hits <= 990
    assert comparison.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_compare_exit_codes(run: Run, tmp_path: Path) -> None:
    def write(name: str, content: dict[str, Any]) -> Path:
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    old = write("old.json", with_samples(1.0, 0.01))
    slow = write("slow.json", with_samples(1.2, 0.01))
    broken_content = with_samples(1.0, 0.01)
    broken_content["cases"][0]["candidates"][1] |= {"wrong": True, "latency_ms": None}
    broken = write("broken.json", broken_content)
    other = with_samples(1.0, 0.01)
    other["device"]["name"] = "Another CPU"
    elsewhere = write("elsewhere.json", other)

    code, out, _ = run("bench", "compare", old, old)
    assert (code, out.strip()) == (0, "4 same")
    code, out, _ = run("bench", "compare", old, slow)
    assert code == 1
    assert "2 slower" in out
    assert "1.20" in out
    assert run("bench", "compare", slow, old)[0] == 0
    assert run("bench", "compare", old, slow, "--threshold", 0.25)[0] == 0
    assert run("bench", "compare", old, slow, "--candidate", "absent")[0] == 0
    code, out, _ = run("bench", "compare", old, broken)
    assert code == 1
    assert "fused, resnet50, batch 1, float32, 2 threads: wrong" in out
    assert run("bench", "compare", broken, old)[0] == 0
    predicted = STATIC / "predicted.json"
    for arguments, part in (
        ((old, tmp_path / "none.json"), "none.json cannot be read"),
        ((old, elsewhere), "different devices"),
        ((old, predicted), "must be the same"),
        ((predicted, predicted), "predictions"),
        ((old, old, "--candidate", "nobody"), "nobody"),
        ((old, old, "--threshold", 2), "--threshold"),
    ):
        code, out, err = run("bench", "compare", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert part in err


@pytest.mark.usefixtures("small")
def test_layers_are_compared_too(run: Run, tmp_path: Path) -> None:
    content = measured({"eager": candidates.eager})
    slower = copy.deepcopy(content)
    (one,) = slower["cases"][0]["layers"][0]["candidates"]
    one["microseconds"]["samples"] = [9 * max(one["microseconds"]["samples"])] * 3
    for name, data in (("a.json", content), ("b.json", slower)):
        (tmp_path / name).write_text(json.dumps(data))
    code, out, _ = run("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 1
    assert LAYER in out


# Predictions.


def test_predictions_are_those_of_the_estimate() -> None:
    """`fused-resnet bench static --json` would write the file that is there."""
    assert (STATIC / "predicted.json").read_text() == predict.text(predict.document())


def test_predictions_count_what_networks_move() -> None:
    """Megabytes of a half-precision ResNet-50 and image, the weights spread over the batch."""
    content = documents.load(STATIC / "predicted.json")
    (network,) = (
        network
        for network in content["networks"]
        if (network["gpu"], network["model"], network["batch"]) == ("H100", "resnet50", 256)
    )
    moved = network["megabytes_per_image"]
    assert 150 < moved["eager"] < 170
    assert 50 < moved["fused"] < 55
    assert moved["chained"] <= 31
    assert moved["chained"] < moved["chain"] < moved["fused"]
    assert sum(layer["count"] for layer in network["layers"]) == 53
    for layer in network["layers"]:
        assert 0 < layer["share_of_copy_bandwidth"] < 1
        assert 0 < layer["share_of_matrix_rate"] < 1
        assert layer["microseconds"] < layer["eager_microseconds"]
    assert sum(block["count"] for block in network["chains"]) == 16
    assert {block["choice"].split(" ")[0] for block in network["chains"]} == {
        "chain",
        "pair",
        "convolutions",
    }
    for block in network["chains"]:
        assert block["microseconds"] <= block["fused_microseconds"]
    times = network["microseconds"]
    assert times["chain"] < times["fused"] < times["compiled"] < times["eager"]


def test_a_chain_moves_ten_units_for_sixteen() -> None:
    """A unit is the bottleneck width's activations; of a block with another after it."""
    blocks = predict.chains_of("resnet50", 256, "float16")
    assert sum(blocks.values()) == 16
    (block,) = (
        one for one in blocks if (one.width, one.projection, one.next_width) == (64, None, 64)
    )
    unit = 2 * 256 * 64 * 56 * 56
    small = sum(16 * part.K + part.weight_bytes for part in block.parts)
    moved = {
        kernel: predict.bytes_chosen(block, Choice(kernel, None, "")) for kernel in CHAIN_KERNELS
    }
    assert moved == {
        "chain": 10 * unit + small,
        "chain without next": 9 * unit + 5 * unit + small,
        "pair": 2 * unit + 10 * unit + small,
        "convolutions": 16 * unit + small,
    }
    assert not predict.chains_of("resnet18", 1, "float16")
    assert not predict.chains_of("resnext50_32x4d", 1, "float16")


def test_what_is_written_of_small_batches_is_computed() -> None:
    """docs/small_batches.md: its table; and what is asked of batch 1 and 256, as predicted."""
    text = (ROOT / "docs" / "small_batches.md").read_text()
    gpu = ARCHITECTURES["H100"]
    assert predict.small_batch_table(gpu) in text
    one = predict.predicted_network("resnet50", 1, gpu)["microseconds"]
    assert one["chain"] < 0.7 * one["fused"]
    many = predict.predicted_network("resnet50", 256, gpu)["microseconds"]
    # The chains' weights come through L2, and its bandwidth bounds what they gain.
    assert many["fused"] / many["chain"] >= 1.15


def test_what_is_written_of_basic_blocks_is_computed() -> None:
    """docs/basic_block_chain.md: its table, and what it says that follows from it."""
    blocks = predict.basic_blocks(ARCHITECTURES["H100"])
    text = (ROOT / "docs" / "basic_block_chain.md").read_text()
    assert predict.basic_block_table(blocks) in text
    assert predict.first_stage_table(list(ARCHITECTURES)) in text
    for one in blocks:
        pays = one.width == 64 or (one.width == 128 and one.batch > 1)
        assert (one.chained < one.apart) == pays, one
        if one.rows:
            assert one.recomputed == (one.rows + 2) * 16 / (one.rows * 14)
            assert one.fewer_bytes == 0.6 * 5 * one.map_bytes
        assert (one.rows == 0) == (one.width == 512)
    for name, gpu in ARCHITECTURES.items():
        ratios = [one.chained / one.apart for one in predict.basic_blocks(gpu, (256,))]
        # What the text says of Hopper, of the A100 and of desktops, with many images.
        assert (ratios[0] < 0.6) == (gpu.capability == (9, 0)), name
        assert (ratios[0] > 1) == (gpu.capability in ((8, 0), (8, 9), (12, 0))), name


def test_what_a_training_step_moves() -> None:
    """The norms, and a Bottleneck by hand: at 56 x 56, 64 (128) channels twice, then 256."""
    content = documents.load(STATIC / "predicted.json")
    for step in content["training"]:
        times, terms = step["microseconds"], step["terms"]
        assert times["with_ends"] < times["fused"] < times["eager"]
        assert times["compile"] < times["eager"]
        for how, parts in terms.items():
            assert sum(parts.values()) == pytest.approx(times[how], abs=0.5)
            assert parts["convolutions"] == terms["eager"]["convolutions"] > 0
            assert parts["parameters"] == terms["eager"]["parameters"] > 0
        assert sum(norm["count"] for norm in step["norms"]) == 53
        assert len(step["blocks"]) == 17
        block = next(block for block in step["blocks"] if block["block"] == "layer1.1")
        unit = 2 * step["batch"] * 64 * 56 * 56 / 1e6
        inner = 2 if step["model"] == "resnet50" else 4  # of the two convolutions, in units
        assert block["eager_megabytes"] == pytest.approx((inner * 13 + 4 * 16) * unit, abs=0.1)
        assert block["fused_megabytes"] == pytest.approx((inner * 10 + 4 * 10.125) * unit, abs=0.1)
        for norm in step["norms"]:
            assert 0 < norm["forward_share_of_copy_bandwidth"] < 1
            assert 0 < norm["backward_share_of_copy_bandwidth"] < 1


def test_what_is_written_of_training_steps_is_computed() -> None:
    """docs/training.md: its tables."""
    text = (ROOT / "docs" / "training.md").read_text()
    for batch in predict_training.BATCHES:
        assert predict_training.terms_table(batch, ARCHITECTURES["H100"]) in text
    gpu = ARCHITECTURES["H100"]
    assert predict_training.if_free_table(predict_training.BATCHES, gpu) in text
    assert predict_training.one_launch_table(64, gpu) in text
    norms = predict_training.norms_of("resnet50", 64)
    least = [
        min(predict_training.share_of_a_copy(norm, backward, gpu) for norm in norms)
        for backward in (False, True)
    ]
    assert "is {:.0%} forward and {:.0%} backward".format(*least).replace("%", " %") in text
    smallest = predict_training.Norm("", "inner", (64, 512, 7, 7))
    share = predict_training.share_of_copy_bandwidth(smallest, False, gpu)
    assert f"no more than {100 * share:.0f} % of copy bandwidth forward" in text
    seconds = predict_training.copy_seconds(smallest, False, gpu)
    alone = 3 * smallest.bytes_once / gpu.copy_bandwidth / seconds
    assert f"one launch would get {100 * alone:.0f} %" in text
    for batch in predict_training.BATCHES:
        step = predict_training.terms("resnet50", batch, gpu)["with_ends"]
        saved = predict_training.if_free("resnet50", batch, gpu)
        everything = saved.pop("all but the convolutions")
        assert sum(step.values()) - everything == pytest.approx(step["convolutions"])
        assert all(0 <= seconds < everything for seconds in saved.values())


def test_static_says_that_it_predicts(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "p.json"
    code, out, err = run(
        "bench", "static", "--model", "resnet50", "--batch", 32, "--gpu", "H100", "--json", written
    )
    assert code == 0, err
    assert out.count("PREDICTED") == 3
    for gpu in predict.GPUS:
        assert gpu in out
    assert "conv_kernel" in out  # what the compiler said, from the repository
    assert documents.load(written)["kind"] == "prediction"
    for arguments, part in (
        (("--gpu", "H9000"), "H9000"),
        (("--resources", written), "--resources"),
        (("--model", "vgg16"), "vgg16"),
    ):
        code, _, err = run("bench", "static", "--batch", 1, *arguments)
        assert code == 2
        assert part in err


def test_resource_files_are_found() -> None:
    for path in resources.resource_files():
        assert resources.load_resources(path)["entries"]


# The report.


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A file of each kind, with names that HTML must escape."""
    sample = {"eager": candidates.eager, "<b>&": candidates.eager, "fused, cpu": _fails}
    contents = {
        "kernels": measured(sample),
        "models": models_document(),
        "predicted": predict.document(("resnet50",), (32,)),
    }
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    return paths


def _fails(*arguments: object) -> candidates.Call:
    raise RuntimeError("<no kernel>")


@pytest.mark.usefixtures("small")
def test_report_is_one_page_that_needs_nothing_else(
    run: Run, files: list[Path], tmp_path: Path
) -> None:
    page, plots = tmp_path / "report.html", tmp_path / "plots"
    code, _, err = run("bench", "report", *files, "--output", page, "--plots", plots)
    assert code == 0, err
    text = page.read_text()
    assert not re.search(r"https?:|//|url\(|<script|<link|@import", _without_images(text))
    assert re.findall(r'src="([a-z:/]+)', text) == ["data:image/png"] * text.count("<img")
    assert "<b>" not in text
    assert "&lt;no kernel&gt;" in text
    assert "wrong, not timed" in text
    assert "fused takes 50 ms, 2.00 times as fast as eager." in text
    assert "ImportError: nothing there" in text
    assert text.count("These are predictions") == 1
    for content in map(documents.load, files):
        if "device" in content:
            assert content["device"]["name"] in text
            assert content["date"][:10] in text
    drawn = sorted(path.name for path in plots.iterdir())
    kinds = ("roofline", "shares", "speed-up")
    layers = [f"kernels-resnet50-batch-1-float32-{kind}.png" for kind in kinds]
    assert drawn == [*layers, "models-memory.png", "models-speed-up.png", "predicted-resnet50.png"]
    assert text.count("<img") == len(drawn)

    # The same data gives the same bytes.
    again = tmp_path / "again.html"
    assert run("bench", "report", *files, "--output", again)[0] == 0
    assert again.read_text() == text


def _without_images(text: str) -> str:
    return re.sub(r'src="data:[^"]*"', "", text)


@pytest.mark.usefixtures("small")
def test_report_without_matplotlib_says_what_to_install(
    run: Run, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fused_resnet.measure.page_plots", raising=False)
    monkeypatch.delattr(
        importlib.import_module("fused_resnet.measure"), "page_plots", raising=False
    )
    page = tmp_path / "report.html"
    code, _, err = run("bench", "report", files[1], "--output", page)
    assert (code, err.count("\n")) == (2, 1)
    assert 'pip install "fused_resnet[bench]"' in err
    assert not page.exists()


def test_report_finds_the_repositorys_newest_files() -> None:
    found = report.default_files()
    assert STATIC / "predicted.json" in found
    assert any(path.parent.name != "static" for path in found)


# The README.


def test_documents_match_the_data(readme_report: Any) -> None:
    for path, text in readme_report.written().items():
        document = path.read_text()
        assert readme_report.rewritten(document, text()) == document, path


def test_readme_is_short_and_links_to_what_is_there(readme_report: Any) -> None:
    readme = readme_report.README.read_text()
    assert len(readme.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme)
    assert "docs/how_it_works.md" in links
    for path in links:
        assert (readme_report.ROOT / path).exists(), path


@pytest.mark.usefixtures("small")
def test_readme_is_made_from_the_newest_files(readme_report: Any, tmp_path: Path) -> None:
    results = tmp_path / "bench" / "results"
    (results / "some-cpu").mkdir(parents=True)
    for name, date, fused_ms in (
        ("b", "2026-01-02T00:00:00+00:00", 60.0),
        ("a", "2026-02-01T00:00:00+00:00", 50.0),
    ):
        content = models_document(date, fused_ms)
        check_document(content)
        (results / "some-cpu" / f"{name}.json").write_text(json.dumps(content))
    # The newest with training, though another file is newer.
    trained = models_document("2026-01-03T00:00:00+00:00", 70.0)
    trained["cases"][0]["mode"] = "training"
    for one in trained["cases"][0]["candidates"]:
        if not one["skipped"]:
            one |= {"gradient_error": 4e-6, "kept_bytes": None if one["wrong"] else 9 * 2**20}
    check_document(trained)
    (results / "some-cpu" / "c.json").write_text(json.dumps(trained))
    layers = measured({"eager": candidates.eager, "fused, cpu": _fails})
    (results / "some-cpu" / "a-kernels.json").write_text(json.dumps(layers))
    headline = readme_report.headline(results)
    assert "Some CPU, 2 threads, torch 2, commit abc, 2026-02-01" in headline
    assert "| resnet50, batch 1, float32 | 100.0 (1.00) | **50.0 (0.50)** |" in headline
    assert "training step" not in headline
    assert "60.0" not in headline
    figure = tmp_path / "figure.png"
    readme_report.draw_headline(figure, results)
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = readme_report.measured(results, tmp_path)
    assert (
        "| resnet50, batch 1, float32 | 100.0 (1.00) | **50.0 (0.50)** | wrong result | - |" in text
    )
    assert "3.0e-03 (wrong)" in text
    assert "absent, float32: not run (ImportError: nothing there)." in text
    assert "Some CPU, 2 threads, torch 2, commit abc, 2026-02-01" in text
    assert "bench/results/some-cpu/a.json" in text
    assert "60.0" not in text
    assert "float32, training step | 100.0 (1.00) | **70.0 (0.70)** | wrong result | - |" in text
    assert "| resnet50, batch 1, float32, training step | 9.0 | 9.0 | - | - |" in text
    assert "Relative error of the gradients" in text
    assert "4.0e-06" in text
    assert "Layer by layer" in text
    assert "not all ran" in text


def test_readme_without_markers_is_refused(readme_report: Any) -> None:
    text = f"before {readme_report.BEGIN} old {readme_report.END} after"
    wanted = f"before {readme_report.BEGIN}\n\nnew\n\n{readme_report.END} after"
    assert readme_report.rewritten(text, "new") == wanted
    for readme in ("", readme_report.BEGIN, f"{readme_report.END} {readme_report.BEGIN}", 2 * text):
        with pytest.raises(ValueError, match="README"):
            readme_report.rewritten(readme, "new")


def test_readme_check_exits_on_a_difference(
    readme_report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(readme_report, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme_report, "FIGURE", tmp_path / "docs" / "latency.png")
    for document in readme_report.written():
        document.write_text(f"{readme_report.BEGIN} stale {readme_report.END}")
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match="differs"):
        readme_report.main()
    monkeypatch.setattr(sys, "argv", ["report.py"])
    readme_report.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    readme_report.main()


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("kernels", "--model", "vgg16"), ("vgg16", "resnet50")),
        (("kernels", "--batch", "1,x"), ("--batch", "'x'")),
        (("kernels", "--dtype", "float64"), ("--dtype", "float64", "bfloat16")),
        (("kernels", "--device", "tpu"), ("--device", "tpu")),
        (("kernels", "--backend", "magic"), ("--backend", "magic", "triton")),
        (("kernels", "--layers", "11x11"), ("--layers", "11x11", "3x3")),
        (("kernels", "--without", "magic"), ("--without", "magic", "oneDNN, fused")),
        (("kernels", "--rounds", "0"), ("--rounds", "0")),
        (("kernels", "--json", "no/such/a.json"), ("--json", "no folder")),
        (("models", "--mode", "guessing"), ("--mode", "guessing", "training")),
        (("models", "--dtype", "int8"), ("--dtype", "int8")),
        (("models", "--without", "eager"), ("--without", "eager")),
        (("report", "--output", "no/such/a.html"), ("--output", "no folder")),
        (("report", "nothing.json"), ("nothing.json", "cannot be read")),
        (("magic",), ("magic",)),
    ],
)
def test_bad_arguments_get_one_line(
    run: Run, tmp_path: Path, arguments: tuple[str, ...], parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    extra = ("--device", "cpu") if arguments[0] in ("kernels", "models") else ()
    code, out, err = run("bench", arguments[0], *extra, *arguments[1:])
    assert (code, out, err.count("\n")) == (2, "", 1), (out, err)
    for part in parts:
        assert part in err


# bench/on_gpu.sh.

STUB = """#!/bin/bash
# Stands in for python: writes down what it was asked, and fails where it is told to.
echo "${@:3}" >> "$STUB_LOG"
sleep "${STUB_SLEEPS:-0}"
if [[ -n ${STUB_FAILS:-} && "${@:3}" =~ $STUB_FAILS ]]; then exit 3; fi
if [[ "${@:3}" =~ --json\\ ([^ ]+) ]]; then echo '{}' > "${BASH_REMATCH[1]}"; fi
"""


def on_gpu(tmp_path: Path, **settings: str) -> tuple[int, str, list[str]]:
    """Runs the script with a stub for python: exit code, output, commands."""
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB)
    stub.chmod(0o755)
    log.write_text("")
    process = subprocess.run(
        ["bash", str(ROOT / "bench" / "on_gpu.sh"), str(tmp_path / "results")],
        capture_output=True, text=True, timeout=120,
        env={
            **os.environ, "PYTHON": str(stub), "WHEEL": "none", "DEVICE": "cpu",
            "STUB_LOG": str(log), "MODELS": "resnet50,resnet18", "BATCHES": "1,8", **settings,
        },
    )  # fmt: skip
    return process.returncode, process.stdout, log.read_text().splitlines()


def test_on_gpu_runs_in_order_of_value_and_resumes(tmp_path: Path) -> None:
    code, out, commands = on_gpu(tmp_path, STUB_FAILS="^pytest|tune resnet18")
    assert code == 1
    order = ["doctor", "compare resnet18", "bench kernels", "pytest", "bench models", "tune",
             "bench kernels", "bench models", "--mode training", "--mode training",
             "bench report"]  # fmt: skip
    at = -1
    for part in order:
        at = next(i for i, line in enumerate(commands) if i > at and part in line)
    assert re.search(r"FAILED \(3\) +\d+ s  tests\n", out)
    assert re.search(r"ok +\d+ s  kernels-resnet50-float32\n", out)
    # Again: only what failed, and the report.
    code, out, commands = on_gpu(tmp_path)
    assert code == 0
    assert [line.split()[1:3] for line in commands if not line.startswith("pytest")] == [
        ["tune", "resnet18"],
        ["bench", "report"],
    ]
    assert any(line.startswith("pytest") for line in commands)
    assert re.search(r"done before +\d+ s  doctor\n", out)
    # No time left: nothing starts, and it says so.
    code, out, commands = on_gpu(tmp_path, AGAIN="1", TOTAL="-1")
    assert (code, commands) == (1, [])
    assert "no time left" in out


def test_on_gpu_ends_a_step_that_takes_too_long(tmp_path: Path) -> None:
    code, out, commands = on_gpu(tmp_path, ONLY="^smoke$", LIMIT="1", STUB_SLEEPS="30")
    assert code == 1
    assert len(commands) == 1
    assert "out of time" in out


@pytest.mark.slow
def test_on_gpu_rehearses_with_the_real_commands(tmp_path: Path) -> None:
    process = subprocess.run(
        ["bash", str(ROOT / "bench" / "on_gpu.sh"), str(tmp_path)],
        capture_output=True, text=True, timeout=600,
        env={
            **os.environ, "PYTHON": sys.executable, "WHEEL": "none", "DEVICE": "cpu",
            "MODELS": "resnet18", "BATCHES": "1", "ROUNDS": "1", "ONLY": "kernels-first|report",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
    )  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    check_kernels_document(json.loads((tmp_path / "kernels-first.json").read_text()))
    assert "<img" in (tmp_path / "report.html").read_text()
