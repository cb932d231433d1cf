"""Each example of the gallery runs, in small, and prints what it is about."""

import re
import socket
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import processes, run_python

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def printed(name, **options):
    """What an example prints, called with these options; the others are its own."""
    code = f"""
        import sys
        sys.path.insert(0, {str(EXAMPLES)!r})
        import {name}, torch
        torch.set_num_threads(2)
        {name}.main(**{options!r})
    """
    return run_python(code)


def figures(text, pattern):
    """Every number in front of which, or behind which, the pattern says something."""
    return [float(found) for found in re.findall(pattern, text)]


@pytest.mark.ahead(
    lambda: printed("detection_backbone", backbone="resnet18", height=64, width=96, rounds=1)
)
def test_detection_backbone(ahead):
    out = ahead()
    assert re.search(r"[1-9]\d* of \d+ modules run fused", out)
    own, theirs = figures(out, r": error ([\d.e+-]+),"), figures(out, r"eager's ([\d.e+-]+)")
    assert len(own) == 5
    assert all(mine <= 1.5 * eager for mine, eager in zip(own, theirs, strict=True))
    assert len(figures(out, r": (\d+) ms an image")) == 2


@pytest.mark.ahead(lambda: printed("segmentation_encoder", steps=25, batch=4, size=64))
def test_segmentation_encoder(ahead):
    out = ahead()
    (before,), (after,) = figures(out, r"before: ([\d.]+)"), figures(out, r"after:  ([\d.]+)")
    assert after > before + 0.2


@pytest.mark.ahead(
    lambda: printed("fine_tune_frozen_statistics", depth=8, steps=60, small_steps=100)
)
def test_fine_tuning_with_frozen_statistics(ahead):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    out = ahead()
    accuracies = figures(out, r": ([\d.]+)%")
    assert len(accuracies) == 3
    assert accuracies[0] > 90
    assert min(accuracies) > 60
    assert out.index("statistics changed") < out.index("statistics kept")


@pytest.mark.ahead(lambda: printed("feature_extraction", batch=1, size=64, rounds=1))
def test_feature_extraction(ahead):
    out = ahead()
    assert "9 of 9 modules run fused" in out
    own, theirs = figures(out, r", error ([\d.e+-]+),"), figures(out, r"eager's ([\d.e+-]+)")
    assert len(own) == 4
    assert all(mine <= 1.5 * eager for mine, eager in zip(own, theirs, strict=True))


@pytest.mark.ahead(lambda: printed("deploy_aot_inductor", model="cifar", batch=3))
def test_deployment_by_aot_inductor(ahead):
    out = ahead()
    (difference,) = figures(out, r"difference ([\d.e+-]+)")
    assert difference < 1e-5
    assert figures(out, r"package: ([\d.]+) MiB")[0] > 0


@pytest.mark.ahead(lambda: printed("embedding_service", clients=4, seconds=1.0, most=4, size=64))
def test_embedding_service(ahead):
    out = ahead()
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
    """Exit status, output and errors of an example that torchrun started."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / f"{name}.py"), *options]
    environment = {**processes.current_environment(), "OMP_NUM_THREADS": "1"}
    return processes.run_command(command, 240, environment, Path.cwd())


def forked(name, *options):
    """The same without torchrun, in processes that share an import of torch."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = f"""
        import os, runpy, sys
        os.environ |= {{"MASTER_ADDR": "localhost", "MASTER_PORT": "{port}", "WORLD_SIZE": "2",
                       "RANK": "%d", "LOCAL_RANK": "%d"}}
        sys.path.insert(0, {str(EXAMPLES)!r})
        sys.argv = [{name!r}, *{options!r}]
        runpy.run_path({str(EXAMPLES / f"{name}.py")!r}, run_name="__main__")
    """
    codes = [textwrap.dedent(code) % (rank, rank) for rank in range(2)]
    environment = processes.current_environment()
    with ThreadPoolExecutor(2) as pool:
        ended = list(pool.map(lambda code: processes.run_code(code, 240, environment), codes))
    return max(status for status, _, _ in ended), ended[0][1], ended[0][2] + ended[1][2]


@pytest.mark.parametrize(
    ("run", "options"),
    [
        pytest.param(forked, (), id="sharded"),
        pytest.param(in_two_processes, (), id="torchrun", marks=pytest.mark.whole),
        pytest.param(
            in_two_processes, ("--data-parallel",), id="data parallel", marks=pytest.mark.whole
        ),
    ],
)
@pytest.mark.ahead(lambda run, options: run("train_sharded", "--steps", "25", *options))
def test_sharded_training(ahead, run, options):
    """In two processes, torchrun's or not."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    status, out, err = ahead()
    assert status == 0, err[-3000:]
    assert "4 of 4 modules run fused" in out
    assert "statistics of 2 processes" in out
    (first, last) = re.search(r"loss ([\d.]+) at first, ([\d.]+) at last", out).groups()
    assert float(last) < 0.5 * float(first)
    (kept,) = figures(out, r"(\d+) KiB of parameters")
    whole = 4 * 78_000 / 2**10  # of a ResNet-8
    assert kept == pytest.approx(whole if options else whole / 2, rel=0.1)


@pytest.mark.ahead(lambda: in_two_processes("train_accelerate", "--epochs", "2"))
def test_training_with_accelerate(ahead):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    pytest.importorskip("accelerate", reason="Accelerate is not installed")
    status, out, err = ahead()
    assert status == 0, err[-3000:]
    assert "4 of 4 modules run fused" in out
    first, last, right = re.search(
        r"2 processes, bf16: loss ([\d.]+) at first, ([\d.]+) at last; ([\d.]+)% right", out
    ).groups()
    assert float(last) < 0.5 * float(first)
    assert float(right) > 60
    (unfused,) = figures(out, r"not fused: ([\d.]+)% right")
    assert unfused == pytest.approx(float(right), abs=2)  # without autocast
