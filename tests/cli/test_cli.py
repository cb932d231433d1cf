"""The command line: what it measures and prints, what it writes, and how it refuses."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from rich.console import Console
from support import Run, processes
from support.results_schema import check_document

from fused_resnet import backends
from fused_resnet.cli import compare as compare_command
from fused_resnet.measure import clock, compare, engines, inputs
from fused_resnet.measure.case import Accuracy, Call, Candidate, Case, Result


def quick(*arguments: object) -> tuple[object, ...]:
    # One thread: with two, each waits for the other whenever something else runs on this machine.
    return ("compare", "resnet18", "--rounds", 2, "--threads", 1, "--no-memory", *arguments)


def picture(path: Path, size: tuple[int, int] = (90, 60)) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return path


@pytest.mark.quick
def test_compare_prints_and_writes_the_same(run: Run, tmp_path: Path) -> None:
    written, drawn = tmp_path / "results.json", tmp_path / "results.png"
    code, out, err = run(
        "compare", "resnet18", "--batch", 2, "--rounds", 3, "--json", written, "--plot", drawn
    )
    assert code == 0, err
    document = json.loads(written.read_text())
    check_document(document)
    assert document["command"].startswith("fused-resnet compare resnet18 --batch 2")
    (case,) = document["cases"]
    assert (case["model"], case["batch"], case["rounds"]) == ("resnet18", 2, 3)
    assert any("BasicBlock: cpu" in line for line in case["fused"])

    eager, fused = case["candidates"]
    for candidate in (eager, fused):
        assert candidate["top5_agreement"] == 1
        assert not candidate["wrong"]
        assert f"{candidate['latency_ms']['median']:.2f}" in out
        assert f"{candidate['error']:.1e}" in out
        # The stem's output alone is 2 x 64 x 112 x 112 floats; the whole model is 45 MiB.
        assert 2 * 64 * 112 * 112 * 4 < candidate["peak_memory_bytes"] < 400 * 2**20
    assert 0 < fused["error"] <= max(1.5 * eager["error"], 5e-7)

    with PIL.Image.open(drawn) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] > 800
    bar = (np.abs(pixels.astype(int) - (0x1F, 0x6F, 0xB4)).sum(axis=2) < 30).mean()
    # Its length depends on the machine's other work; the marker of its error is a tenth of this.
    assert 0.002 < bar < 0.6, "the fused model's bar is missing"


def test_train_reports_gradients(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "results.json"
    code, out, err = run(*quick("--train", "--batch", 2, "--json", written))
    assert code == 0, err
    document = json.loads(written.read_text())
    check_document(document)
    eager, fused = document["cases"][0]["candidates"]
    assert 0 < fused["gradient_error"] <= 1.5 * eager["gradient_error"]
    assert "training step" in out


def test_bfloat16_error_is_that_of_bfloat16(run: Run, tmp_path: Path) -> None:
    written = tmp_path / "results.json"
    assert run(*quick("--dtype", "bfloat16", "--json", written))[0] == 0
    for candidate in json.loads(written.read_text())["cases"][0]["candidates"]:
        assert 1e-4 < candidate["error"] < 0.1


@pytest.mark.slow
def test_compile_adds_a_candidate(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    written = tmp_path / "results.json"
    rest = ("--rounds", 2, "--threads", 1, "--no-memory", "--json", written)
    code, out, err = run("compare", "own_model:one_block", "--compile", *rest)
    assert code == 0, err
    candidates = json.loads(written.read_text())["cases"][0]["candidates"]
    assert [one["name"] for one in candidates] == ["eager", "torch.compile", "fused"]
    assert "torch.compile" in out
    if candidates[1]["skipped"] is None:
        assert not candidates[1]["wrong"]


@pytest.mark.parametrize("precision", ["int8", "float8_e4m3fn"])
@pytest.mark.single
def test_quantize_adds_a_candidate(run: Run, tmp_path: Path, precision: str) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.PNG"):
        picture(folder / name)
    (folder / "notes.txt").write_text("no image")
    written = tmp_path / "results.json"
    chosen = () if precision == "int8" else ("--quantize-dtype", precision)
    code, out, err = run(
        *quick("--quantize", *chosen, "--calibrate", tmp_path / "images", "--json", written)
    )
    assert code == 0, err
    document = json.loads(written.read_text())
    check_document(document)
    eager, fused, own = document["cases"][0]["candidates"]
    assert (eager["name"], fused["name"], own["name"]) == ("eager", "fused", f"fused, {precision}")
    largest = {"int8": 0.1, "float8_e4m3fn": compare.LARGEST_INT8_ERROR}[precision]
    assert 1e-3 < own["error"] < largest
    assert own["latency_ms"]["median"] > 0
    out = " ".join(out.split())
    assert f"{precision}: 8 of 8 blocks, signal to quantization noise" in out
    assert re.search(rf"{precision}: top-1 as eager's on [12] of 2 calibration images, error", out)


def test_eight_bits_that_are_wrong_are_not_timed(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(compare, "LARGEST_INT8_ERROR", 1e-4)
    written = tmp_path / "results.json"
    code, out, err = run(*quick("--quantize", "--json", written))
    assert code == 0, err
    assert "fused, int8: wrong, not timed" in " ".join(out.split())
    *_, int8 = json.loads(written.read_text())["cases"][0]["candidates"]
    assert int8["wrong"]
    assert int8["latency_ms"] is None


def test_backend_is_used(run: Run) -> None:
    code, out, _ = run(*quick("--backend", "reference"))
    assert code == 0
    assert "BasicBlock: reference" in out


def test_threads_are_restored(run: Run) -> None:
    code, out, _ = run(*quick())
    assert code == 0
    assert "1 thread;" in out
    assert torch.get_num_threads() == 2


def test_own_images_and_checkpoint(run: Run, tmp_path: Path) -> None:
    image = picture(tmp_path / "own.png")
    model = torchvision.models.resnet18(num_classes=7)
    checkpoint = tmp_path / "own.pt"
    torch.save({"state_dict": model.state_dict()}, checkpoint)
    code, out, err = run(*quick("--image", image, "--weights", checkpoint))
    assert code == 0, err
    assert "own.pt" in out
    assert "own.png" in out

    loaded = inputs.build_model("resnet18", str(checkpoint), seed=0)
    for (name, mine), theirs in zip(
        loaded.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs), name


def test_random_model_depends_on_the_seed_alone() -> None:
    first, again, other = (inputs.build_model("resnet18", None, seed) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.conv1.weight, other.conv1.weight)
    assert not torch.equal(first.bn1.running_mean, other.bn1.running_mean)


@pytest.mark.quick
def test_input_is_what_torchvision_makes_of_the_images(tmp_path: Path) -> None:
    image = picture(tmp_path / "own.png", (300, 200))
    transforms = torchvision.models.ResNet50_Weights.DEFAULT.transforms()
    batch = inputs.build_input("resnet50", [str(image)], 3, seed=0)
    assert batch.shape == (3, 3, 224, 224)
    with PIL.Image.open(image) as opened:
        assert torch.equal(batch[0], transforms(opened.convert("RGB")))
    assert not torch.equal(batch[0], batch[1])
    assert not torch.equal(batch[1], batch[2])
    assert torch.equal(batch, inputs.build_input("resnet50", [str(image)], 3, seed=0))


def test_default_photograph_is_one() -> None:
    with PIL.Image.open(inputs.sample_photograph()) as image:
        assert image.format == "JPEG"
        assert min(image.size) >= 224


def bad_arguments(tmp_path: Path) -> list[tuple[tuple[object, ...], tuple[str, ...]]]:
    """Arguments of `compare`, and what the message must contain."""
    text = tmp_path / "text.jpg"
    text.write_text("no image")
    truncated = tmp_path / "truncated.png"
    truncated.write_bytes(picture(tmp_path / "whole.png").read_bytes()[:600])
    empty = tmp_path / "empty.png"
    empty.touch()
    vgg = tmp_path / "vgg.pt"
    torch.save({"features.0.weight": torch.zeros(1)}, vgg)
    small = tmp_path / "small.pt"
    torch.save(torchvision.models.resnet18().state_dict(), small)
    own = picture(tmp_path / "own.png")
    empty_folder, bad_folder = tmp_path / "nothing", tmp_path / "bad"
    for folder in (empty_folder, bad_folder):
        folder.mkdir()
    (bad_folder / "bad.jpg").write_text("no image")
    return [
        (("resnet19",), ("MODEL", "'resnet19'", "resnet18")),
        (("vgg16",), ("MODEL", "'vgg16'", "resnet18")),
        (("resnet18", "--dtype", "float8"), ("--dtype", "'float8'", "bfloat16")),
        (("resnet18", "--dtype", "float64"), ("--dtype", "'float64'", "bfloat16")),
        (("resnet18", "--device", "tpu"), ("--device", "'tpu'", "cuda")),
        (("resnet18", "--device", "cuda:x"), ("--device", "'cuda:x'", "cuda:N")),
        (("resnet18", "--backend", "magic"), ("--backend", "'magic'", "reference")),
        (("resnet18", "--batch", "-3"), ("--batch", "-3", "at least 1")),
        (("resnet18", "--batch", "0"), ("--batch", "0", "at least 1")),
        (("resnet18", "--batch", "two"), ("--batch", "'two'", "integer")),
        (("resnet18", "--rounds", "0"), ("--rounds", "0", "at least 1")),
        (("resnet18", "--threads", "-1"), ("--threads", "-1", "at least 1")),
        (("resnet18", "--image", "absent.jpg"), ("--image", "'absent.jpg'", "not exist")),
        (("resnet18", "--image", tmp_path), ("--image", str(tmp_path), "directory")),
        (("resnet18", "--image", text), ("--image", "text.jpg", "not an image")),
        (("resnet18", "--image", truncated), ("--image", "truncated.png")),
        (("resnet18", "--image", empty), ("--image", "empty.png", "not an image")),
        (
            ("resnet18", "--batch", 1, "--image", own, "--image", own),
            ("--batch", "1", "2 images"),
        ),
        (("resnet18", "--weights", "NOPE"), ("--weights", "'NOPE'", "IMAGENET1K_V1")),
        (("resnet18", "--weights", text), ("--weights", "text.jpg", "torch.load")),
        (("resnet18", "--weights", vgg), ("--weights", "vgg.pt", "resnet18")),
        (("resnet50", "--weights", small), ("--weights", "small.pt", "resnet50")),
        (("resnet18", "--json", tmp_path), ("--json", str(tmp_path), "file")),
        (("resnet18", "--json", tmp_path / "no" / "a.json"), ("--json", "no folder")),
        (("resnet18", "--plot", tmp_path / "a.gif"), ("--plot", "a.gif", ".png")),
        (("resnet18", "--quantize", "--train"), ("--quantize", "--train", "inference")),
        (
            ("resnet18", "--quantize", "--quantize-dtype", "int4"),
            ("--quantize-dtype", "'int4'", "float8_e4m3fn"),
        ),
        (("resnet18", "--calibrate", tmp_path), ("--calibrate", str(tmp_path), "--quantize")),
        (
            ("resnet18", "--quantize", "--calibrate", tmp_path / "no"),
            ("--calibrate", "no", "not a folder"),
        ),
        (
            ("resnet18", "--quantize", "--calibrate", empty_folder),
            ("--calibrate", "nothing", "no image", ".jpg"),
        ),
        (
            ("resnet18", "--quantize", "--calibrate", bad_folder),
            ("--calibrate", "bad.jpg", "not an image"),
        ),
        (("timm:resnet19",), ("MODEL", "'timm:resnet19'", "does not have", "resnet18")),
        (("hf:resnet-19",), ("MODEL", "'hf:resnet-19'", "transformers")),
        (("nowhere:make",), ("MODEL", "'nowhere:make'", "importing nowhere", "No module")),
        (
            ("json:nothing",),
            ("MODEL", "'json:nothing'", "no function 'nothing'", "module:function"),
        ),
        (("json:dumps",), ("MODEL", "'json:dumps'", "calling it without arguments")),
        (("collections:Counter",), ("MODEL", "a Counter", "torch.nn.Module")),
        ((":make",), ("MODEL", "':make'", "module:function")),
        (("timm:resnet18", "--weights", small), ("--weights", "small.pt", "module:function")),
        (("resnet18", "--bogus"), ("--bogus",)),
        ((), ("MODEL",)),
    ]


@pytest.mark.quick
def test_bad_arguments_get_one_line(run: Run, tmp_path: Path) -> None:
    for arguments, parts in bad_arguments(tmp_path):
        code, out, err = run("compare", *arguments)
        assert code == 2, (arguments, out, err)
        assert out == "", arguments
        assert err.count("\n") == 1, (arguments, err)
        assert err.startswith("fused-resnet: ")
        for part in parts:
            assert part in err, (arguments, err)


OWN_MODEL = """
import torch
from torchvision.models import resnet

class Output:
    def __init__(self, logits):
        self.logits = logits

class Wrapped(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)

    def forward(self, x):
        return Output(self.body(x))

def build():
    return Wrapped()

def one_block():
    head = torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 3)
    stem = torch.nn.Conv2d(3, 8, 7, 4)
    return torch.nn.Sequential(stem, resnet.BasicBlock(8, 8), *head)
"""


@pytest.mark.quick
def test_compare_of_models_from_elsewhere(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A function beside which the command runs, and timm; one process measures memory."""
    (tmp_path / "own_model.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    written = tmp_path / "results.json"
    rest = ("--rounds", 2, "--threads", 1, "--json", written)
    code, out, err = run("compare", "own_model:build", *rest)
    assert code == 0, err
    # A line for each way in which blocks run.
    assert sum(map(int, re.findall(r"(\d+) x BasicBlock: cpu", out))) == 4
    (case,) = json.loads(written.read_text())["cases"]
    check_document(json.loads(written.read_text()))
    assert case["model"] == "own_model:build"
    assert all(candidate["peak_memory_bytes"] > 0 for candidate in case["candidates"])
    pytest.importorskip("timm")
    code, out, err = run("compare", "timm:resnet18d", "--no-memory", *rest[:-2])
    assert code == 0, err
    assert "x BasicBlock: cpu: native" in out or "x BasicBlock: cpu: library" in out


def test_compare_of_transformers(run: Run) -> None:
    pytest.importorskip("transformers")
    for name in ("hf:resnet-18", "hf:ResNetConfig"):
        code, out, err = run("compare", name, "--rounds", 1, "--threads", 1, "--no-memory")
        assert code == 0, err
        assert name in out


def test_compare_needs_what_it_is_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    for name, package in (("timm:resnet18", "timm"), ("hf:resnet-18", "transformers")):
        code, _, err = run(*quick()[:1], name)
        assert (code, err.count("\n")) == (2, 1)
        assert f"needs {package}: pip install {package}" in err


@pytest.mark.parametrize("train", [False, True])
def test_the_table_fits_a_terminal(train: bool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns, every candidate there can be, large figures: no cell is cut or broken."""
    samples = [123456.78, 123457.78]

    def candidate(name: str, **changes: Any) -> Candidate:
        values: dict[str, Any] = {
            "latency": clock.Latency(samples),
            "accuracy": Accuracy(1.2e-7, 3.4e-7 if train else None, 1.0),
            "peak_memory": 12345 * 2**20,
            "ratio_to_eager": 1.0,
        }
        return Candidate(name, **{**values, **changes})

    candidates = [candidate("eager"), candidate("torch.compile"), candidate("fused")]
    candidates.append(candidate("fused, int8", latency=None, wrong=True))
    result = Result(Case("timm:resnet26d", train=train), 1, tuple(candidates), (), False, {})
    monkeypatch.setenv("COLUMNS", "80")
    console = Console(width=80, file=io.StringIO())
    compare_command._print_result(console, result)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("torch.compile", "fused, int8", "123457.28", "12345 MiB", "1.2e-07", "wrong"):
        assert part in text
    assert "…" not in text
    assert text.count("latency ms, median") == 1
    assert ("gradient error" in text) == train


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = staticmethod(lambda: "torch finds no CUDA device")
    monkeypatch.setattr(backends.cuda.Cuda, "available", missing)
    for arguments in (("--device", "cuda"), ("--backend", "cuda")):
        code, _, err = run(*quick(*arguments))
        assert code == 2
        assert err.count("\n") == 1
        assert f"{arguments[0]} is 'cuda'" in err


def test_unavailable_backend_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "available", lambda: {"cpu": "yes", "triton": "no such luck"})
    code, _, err = run(*quick("--backend", "triton"))
    assert code == 2
    assert "--backend is 'triton', which cannot run: no such luck" in err


def test_plot_without_matplotlib_fails_first(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "matplotlib" else find_spec(name, *rest),
    )
    code, _, err = run(*quick("--plot", tmp_path / "a.png"))
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install matplotlib" in err
    code, _, err = run(*quick())
    assert (code, err.count("\n")) == (2, 1)
    assert "pip install matplotlib" in err


@pytest.mark.quick
def test_doctor(run: Run) -> None:
    code, out, err = run("doctor")
    assert code == 0, err
    torchvision_version = torchvision.__version__.partition("+")[0]
    isa = torch.backends.cpu.get_cpu_capability()
    for part in (torch.__version__, torchvision_version, isa):
        assert part in out
    for name, state in backends.available().items():
        assert name in out
        assert state.split(":")[0] in out
    assert "_C" in out


def test_no_arguments_print_help(run: Run) -> None:
    code, out, err = run()
    assert "compare" in out + err
    assert "doctor" in out + err
    assert "Traceback" not in err
    code, out, _ = run("compare", "--help")
    assert code == 0
    assert "--backend" in out


@pytest.mark.usefixtures("interruptible")
def test_interrupt_prints_what_was_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = clock.interleave

    def interrupted(*arguments: object, on_round: Callable[[int], None], **named: object) -> object:
        def stop(done: int) -> None:
            on_round(done)
            if done == 3:
                signal.raise_signal(signal.SIGINT)

        return original(*arguments, on_round=stop, **named)

    monkeypatch.setattr(compare, "interleave", interrupted)
    written = tmp_path / "results.json"
    code, out, err = run("compare", "resnet18", "--rounds", 50, "--no-memory", "--json", written)
    assert code == 130
    assert "interrupted after 3 of 50 rounds" in out
    assert "Traceback" not in err
    document = json.loads(written.read_text())
    check_document(document)
    assert document["cases"][0]["interrupted"]
    assert document["cases"][0]["rounds"] == 3


@pytest.mark.usefixtures("interruptible")
def test_interrupt_before_timing_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compare, "build_input", lambda *arguments: signal.raise_signal(signal.SIGINT)
    )
    code, out, err = run(*quick())
    assert (code, out) == (130, "")
    assert err.strip().splitlines()[-1] == "fused-resnet: interrupted before anything was timed"
    assert "Traceback" not in err


def with_a_wrong_backend() -> tuple[int, str, str]:
    command = [sys.executable, "-m", "fused_resnet.cli", *map(str, quick())]
    environment = {**processes.current_environment(), "FUSED_RESNET_BACKEND": "magic"}
    with tempfile.TemporaryDirectory() as folder:
        return processes.run_command(command, 120, environment, Path(folder))


@pytest.mark.ahead(lambda: with_a_wrong_backend())
def test_environment_variable_naming_no_backend(
    ahead: Callable[[], tuple[int, str, str]],
) -> None:
    status, _, errors = ahead()
    assert status == 2
    assert errors.count("\n") == 1
    assert "FUSED_RESNET_BACKEND is 'magic'" in errors


def test_wrong_and_failing_engines_are_shown() -> None:
    case = Case("resnet18", rounds=1, memory=False)

    def wrong(*arguments: object) -> Call:
        call = engines.eager(*arguments)
        return lambda: call() * (1 + 1e-3)

    def failing(*arguments: object) -> Call:
        raise RuntimeError("no such engine\nand more")

    candidates = {"eager": engines.eager, "wrong": wrong, "failing": failing}
    eager, off, failed = compare.compare(case, candidates).candidates
    assert not eager.wrong
    assert off.wrong
    assert off.accuracy.error == pytest.approx(1e-3, rel=1e-2)
    assert failed.skipped == "RuntimeError: no such engine"
    assert failed.latency is None


def test_interleave_takes_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    latencies, interrupted = clock.interleave(calls, 3, torch.device("cpu"), warmup=1)
    assert not interrupted
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert all(len(latency.samples) == 3 for latency in latencies.values())


def test_quantiles_are_numpys() -> None:
    samples = tuple(np.random.default_rng(0).random(11))
    latency = clock.Latency(samples)
    assert latency.median == pytest.approx(np.median(samples))
    for q in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert latency.quantile(q) == pytest.approx(np.quantile(samples, q))
    assert clock.Latency((2.0,)).quantile(0.9) == 2.0


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_peak_memory_sees_what_was_freed(tmp_path: Path) -> None:
    program = """
import torch
from fused_resnet.measure import PeakMemory
memory = PeakMemory(torch.device("cpu"))
memory.restart()
block = torch.ones(16, 2**20)
del block
print(memory.bytes())
memory.restart()
print(memory.bytes())
"""
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    peak, after = (int(line) / 2**20 for line in process.stdout.split())
    assert 60 < peak < 80
    assert after < 10
