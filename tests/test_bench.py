"""The benchmarks: they count the right work and check it, and the README says what they found."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchvision
from results_schema import check_document
from torch.utils.flop_counter import FlopCounterMode

from fused_resnet import compare

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of bench/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def candidate(name: str, median: float, **changes: Any) -> dict[str, Any]:
    latency = {"median": median, "p10": median, "p90": median, "samples": [median]}
    fields = {
        "name": name, "skipped": None, "latency_ms": latency, "images_per_second": 1e3 / median,
        "ratio_to_eager": median / 100, "peak_memory_bytes": 1, "error": 2e-7,
        "gradient_error": None, "top5_agreement": 1.0, "wrong": False,
    }  # fmt: skip
    return fields | changes


def document(date: str, fused_ms: float) -> dict[str, Any]:
    absent = dict.fromkeys(candidate("", 1.0), None)
    case = {
        "model": "resnet50", "batch": 1, "dtype": "float32", "device": "cpu",
        "mode": "inference", "memory_format": "channels_last", "weights": "random", "seed": 0,
        "images": [], "backend": None, "threads": 2, "rounds": 1, "interrupted": False,
        "fused": [],
        "candidates": [
            candidate("eager", 100.0),
            candidate("fused", fused_ms),
            candidate("cheat", 1.0, wrong=True, error=3e-3),
            {**absent, "name": "absent", "skipped": "ImportError: nothing there"},
        ],
    }  # fmt: skip
    return {
        "schema": compare.SCHEMA, "date": date, "command": "python bench/models.py",
        "commit": "abc",
        "versions": {
            "python": "3", "fused_resnet": "0", "torch": "2", "torchvision": "0", "triton": None
        },
        "device": {"type": "cpu", "name": "Some CPU"}, "cases": [case],
    }  # fmt: skip


def test_readme_matches_the_data(bench: Any) -> None:
    report = bench("report")
    readme = report.README.read_text()
    assert report.rewritten(readme, report.report()) == readme


def test_predictions_are_those_of_the_estimate(bench: Any) -> None:
    """`python bench/predict.py` would write the file that is there."""
    predict = bench("predict")
    assert predict.PATH.read_text() == predict.text(predict.document())


def test_predictions_count_what_networks_move(bench: Any) -> None:
    """Megabytes of a half-precision ResNet-50 and image, the weights spread over the batch."""
    predict = bench("predict")
    content = json.loads(predict.PATH.read_text())
    (network,) = (
        network
        for network in content["networks"]
        if (network["gpu"], network["model"], network["batch"]) == ("H100", "resnet50", 256)
    )
    moved = network["megabytes_per_image"]
    assert 150 < moved["eager"] < 170
    assert 50 < moved["fused"] < 55
    assert sum(layer["count"] for layer in network["layers"]) == 53
    for layer in network["layers"]:
        assert 0 < layer["share_of_copy_bandwidth"] < 1
        assert 0 < layer["share_of_matrix_rate"] < 1


def test_result_files_follow_the_schema(bench: Any) -> None:
    for path in bench("report").RESULTS.glob("*/*.json"):
        if path.parent.name == "static":  # see test_triton_static.py
            continue
        content = json.loads(path.read_text())
        check_document(content)
        assert path == bench("models").result_path(content)
        for case in content["cases"]:
            assert not any(c["wrong"] for c in case["candidates"] if c["name"] == "fused"), path


def test_report_is_made_from_the_newest_file(bench: Any, tmp_path: Path) -> None:
    report = bench("report")
    results = tmp_path / "bench" / "results"
    (results / "some-cpu").mkdir(parents=True)
    for name, date, fused_ms in (
        ("b", "2026-01-02T00:00:00+00:00", 60.0),
        ("a", "2026-02-01T00:00:00+00:00", 50.0),
    ):
        content = document(date, fused_ms)
        check_document(content)
        (results / "some-cpu" / f"{name}.json").write_text(json.dumps(content))
    text = report.report(results, tmp_path)
    assert (
        "| resnet50, batch 1, float32 | 100.0 (1.00) | **50.0 (0.50)** | wrong result | - |" in text
    )
    assert "3.0e-03 (wrong)" in text
    assert "absent, float32: not run (ImportError: nothing there)." in text
    assert "Some CPU, 2 threads, torch 2, commit abc, 2026-02-01" in text
    assert "bench/results/some-cpu/a.json" in text
    assert "60.0" not in text


def test_report_refuses_a_readme_without_markers(bench: Any) -> None:
    report = bench("report")
    text = f"before {report.BEGIN} old {report.END} after"
    assert report.rewritten(text, "new") == f"before {report.BEGIN}\n\nnew\n\n{report.END} after"
    for readme in ("", report.BEGIN, f"{report.END} {report.BEGIN}", text + text):
        with pytest.raises(ValueError, match="README"):
            report.rewritten(readme, "new")


def test_report_refuses_another_schema(bench: Any, tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "a.json").write_text('{"schema": "other/1"}')
    with pytest.raises(ValueError, match="other/1"):
        bench("report").report(tmp_path, tmp_path)


def test_report_check_exits_on_a_difference(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = bench("report")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN} stale {report.END}")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match="differs"):
        report.main()
    monkeypatch.setattr(sys, "argv", ["report.py"])
    report.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    report.main()


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_layers_do_all_the_models_work(bench: Any, name: str) -> None:
    layers = bench("cpu_layers").layers_of(name, 224)
    model = torchvision.models.get_model(name).eval()
    convolutions = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert sorted(n for names in layers.values() for n in names) == sorted(convolutions)

    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, 3, 224, 224))
    expected = counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert sum(layer.flop(1) * len(names) for layer, names in layers.items()) == expected

    adds = sum(len(names) for layer, names in layers.items() if layer.residual)
    blocks = sum(
        isinstance(m, (torchvision.models.resnet.BasicBlock, torchvision.models.resnet.Bottleneck))
        for m in model.modules()
    )
    assert adds == blocks
    linear = sum(len(names) for layer, names in layers.items() if layer.activation == "none")
    assert linear == sum("downsample" in n for n in convolutions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_ways_agree(bench: Any, dtype: torch.dtype) -> None:
    cpu_layers = bench("cpu_layers")
    layers = cpu_layers.layers_of("resnext50_32x4d", 64)
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    with torch.inference_mode():
        for layer in list(layers)[:6]:
            case = cpu_layers.Case(layer, 2, dtype)
            measured = cpu_layers.measure(case, rounds=1, seconds_per_turn=1e-4)
            assert set(measured) == {"eager", "oneDNN", "ours"}
            for way, one in measured.items():
                assert one.error < limit, (layer.label, way)
                assert one.ms > 0
            assert measured["ours"].error <= 1.5 * measured["eager"].error + 5e-7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"), [("OpenVINO", "openvino"), ("ONNX Runtime", "onnxruntime")]
)
def test_other_engines_compute_the_same(bench: Any, name: str, package: str) -> None:
    pytest.importorskip(package, reason='needs pip install ".[bench]"')
    engines = bench("engines")
    case = compare.Case("resnet18", rounds=1, memory=False)
    result = compare.compare(case, {"eager": compare.eager, name: engines.ENGINES[name]})
    _, other = result.candidates
    assert other.skipped is None
    assert not other.wrong
    assert other.accuracy.error < 1e-5


def test_engines_refuse_what_they_cannot_run(bench: Any) -> None:
    engines = bench("engines")
    model, input = torch.nn.Identity(), torch.zeros(1)
    case = compare.Case("resnet18", train=True)
    for engine in engines.ENGINES.values():
        with pytest.raises((NotImplementedError, ImportError)):
            engine(model, input, case)
