"""Each example of the gallery runs, in small, and prints what it is about."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import load_script

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(capsys, monkeypatch, name, **options):
    """What an example prints, called with these options; the others are its own."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    load_script(EXAMPLES / f"{name}.py").main(**options)
    return capsys.readouterr().out


@pytest.fixture
def example(capsys, monkeypatch):
    return lambda name, **options: run(capsys, monkeypatch, name, **options)


def figures(text, pattern):
    """Every number in front of which, or behind which, the pattern says something."""
    return [float(found) for found in re.findall(pattern, text)]


def test_detection_backbone(example):
    out = example("detection_backbone", backbone="resnet18", height=64, width=96, rounds=1)
    assert re.search(r"[1-9]\d* of \d+ modules run fused", out)
    own, theirs = figures(out, r": error ([\d.e+-]+),"), figures(out, r"eager's ([\d.e+-]+)")
    assert len(own) == 5
    assert all(mine <= 1.5 * eager for mine, eager in zip(own, theirs, strict=True))
    assert len(figures(out, r": (\d+) ms an image")) == 2


def test_segmentation_encoder(example):
    out = example("segmentation_encoder", steps=25, batch=4, size=64)
    (before,), (after,) = figures(out, r"before: ([\d.]+)"), figures(out, r"after:  ([\d.]+)")
    assert after > before + 0.2


def test_fine_tuning_with_frozen_statistics(example):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    out = example("fine_tune_frozen_statistics", depth=8, steps=60, small_steps=100)
    accuracies = figures(out, r": ([\d.]+)%")
    assert len(accuracies) == 3
    assert accuracies[0] > 90
    assert min(accuracies) > 60
    assert out.index("statistics changed") < out.index("statistics kept")


def test_feature_extraction(example):
    out = example("feature_extraction", batch=1, size=64, rounds=1)
    assert "9 of 9 modules run fused" in out
    own, theirs = figures(out, r", error ([\d.e+-]+),"), figures(out, r"eager's ([\d.e+-]+)")
    assert len(own) == 4
    assert all(mine <= 1.5 * eager for mine, eager in zip(own, theirs, strict=True))


def test_deployment_by_aot_inductor(example):
    out = example("deploy_aot_inductor", model="cifar", batch=3)
    (difference,) = figures(out, r"difference ([\d.e+-]+)")
    assert difference < 1e-5
    assert figures(out, r"package: ([\d.]+) MiB")[0] > 0


def test_embedding_service(example):
    out = example("embedding_service", clients=4, seconds=1.0, most=4, size=64)
    assert [line.split(":")[0] for line in out.splitlines()] == ["eager", "fused"]
    assert all(rate > 0 for rate in figures(out, r"([\d.]+) images/s"))
    assert all(1 <= images <= 4 for images in figures(out, r"([\d.]+) images a batch"))


def test_a_failing_model_fails_its_requests(monkeypatch):
    """The service goes on."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import embedding_service
    import torch

    service = embedding_service.Service(torch.nn.Linear(3, 2), 4)
    try:
        with pytest.raises(RuntimeError):
            service.embed(torch.randn(2, 4, 4)).result(30)
    finally:
        service.stop()
        sys.modules.pop("embedding_service")


def in_two_processes(name, *options):
    """What has become of an example that torchrun started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / f"{name}.py"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.parametrize("data_parallel", [False, True])
def test_sharded_training(data_parallel):
    """By torchrun, in two processes."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    options = ["--data-parallel"] if data_parallel else []
    done = in_two_processes("train_sharded", "--steps", "25", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 of 4 modules run fused" in done.stdout
    assert "statistics of 2 processes" in done.stdout
    (first, last) = re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", done.stdout).groups()
    assert float(last) < 0.5 * float(first)
    (kept,) = figures(done.stdout, r"(\d+) KiB of parameters")
    whole = 4 * 78_000 / 2**10  # of a ResNet-8
    assert kept == pytest.approx(whole if data_parallel else whole / 2, rel=0.1)


def test_training_with_accelerate():
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    done = in_two_processes("train_accelerate", "--epochs", "2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "4 of 4 modules run fused" in done.stdout
    first, last, right = re.search(
        r"2 processes, bf16: loss ([\d.]+) at first, ([\d.]+) at last; ([\d.]+)% right", done.stdout
    ).groups()
    assert float(last) < 0.5 * float(first)
    assert float(right) > 60
    (unfused,) = figures(done.stdout, r"not fused: ([\d.]+)% right")
    assert unfused == pytest.approx(float(right), abs=2)  # without autocast
