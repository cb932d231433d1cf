"""`fused-resnet tune`, on a GPU that is pretended."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import Run
from support.tuning import (
    CPU,
    GPU,
    FakeTimer,
    document,
    drops_nan,
    fake_runner,
    model_problems,
)

from fused_resnet import backends
from fused_resnet.measure import case as comparison
from fused_resnet.measure import networks
from fused_resnet.measure.tune import cases, race, tuner
from fused_resnet.tuning import (
    architecture,
    estimate,
    table,
)

pytestmark = pytest.mark.quick


def test_dry_run_is_a_prediction(run: Run) -> None:
    code, out, err = run("tune", "resnet18", "--dry-run", "--gpu", "h200", "--batch", "1,32")
    assert (code, err) == (0, "")
    assert "resnet18, batch 1, float16: predicted for H200, nothing was timed" in out
    assert "resnet18, batch 32, float16: predicted for H200, nothing was timed" in out
    assert out.count("3x224x224 to 64, 7x7, stride 2, pool") == 2
    problem = dataclasses.replace(model_problems()[1], N=32)
    assert str(estimate.best(problem, architecture.named("H200"))) in out
    assert not Path(os.environ["FUSED_RESNET_CACHE"]).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tuning_without_a_gpu_is_one_line(run: Run) -> None:
    code, out, err = run("tune", "resnet18")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fused-resnet: --device is 'cuda', but torch")


def test_bad_arguments_of_tune(run: Run) -> None:
    for arguments, parts in (
        (("resnet19",), ("MODEL", "'resnet19'", "resnet18")),
        (("resnet18", "--batch", "1,x"), ("--batch", "'x'", "integer")),
        (("resnet18", "--batch", "0"), ("--batch", "0", "at least 1")),
        (("resnet18", "--batch", ""), ("--batch", "''")),
        (("resnet18", "--dtype", "float16,float64"), ("--dtype", "'float64'", "tfloat32")),
        (("resnet18", "--size", "8"), ("--size", "8", "32")),
        (("resnet18", "--device", "cpu"), ("--device", "'cpu'", "cuda:N")),
        (("resnet18", "--gpu", "H100"), ("--gpu", "'H100'", "--dry-run")),
        (("resnet18", "--dry-run", "--gpu", "V100"), ("--gpu", "'V100'", "A100")),
        ((), ("MODEL",)),
    ):
        code, out, err = run("tune", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, out, err)
        for part in parts:
            assert part in err, (arguments, err)


@pytest.fixture
def pretend_gpu(
    an_h100: architecture.Architecture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[FakeTimer], None]:
    """Makes the command tune "on a GPU": tensors on the CPU, the library as every kernel."""
    monkeypatch.setattr(comparison, "check_device", lambda device: None)
    monkeypatch.setattr(backends, "available", lambda: {"triton": "yes"})
    original = cases.make_case
    monkeypatch.setattr(cases, "make_case", lambda problem, device: original(problem, CPU))
    wrong = {"cudnn": drops_nan}
    monkeypatch.setattr(tuner, "run_of", fake_runner(**wrong))

    def use(timer: FakeTimer) -> None:
        monkeypatch.setattr(race, "EventTimer", lambda device, flush_bytes: timer)

    return use


ON_SMALL_IMAGES = ("resnet18", "--size", 32, "--batch", 1, "--dtype", "tfloat32")


def test_tune_chooses_and_remembers(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    favourite = "triton 64x32x32, 4 warps, 4 stages"
    seconds = {favourite: 4e-6, "library": 20e-6}
    timer = FakeTimer(lambda name: seconds.get(name, 10e-6))
    pretend_gpu(timer)
    code, out, err = run("tune", *ON_SMALL_IMAGES, "--table", path)
    assert code == 0, err
    assert "resnet18, batch 1, tfloat32" in out
    assert favourite in out
    assert "0.20" in out
    assert f"the library's {20 * 20} us" in out
    assert str(path) in out.replace("\n", "")
    kept = table.read(path)
    found = networks.of_model("resnet18", 1, "tfloat32", 32)
    assert set(kept) == set(found)
    chosen = {problem for problem, entry in kept.items() if entry.microseconds == 4.0}
    assert {str(kept[p].tile) for p in chosen} == {favourite.removeprefix("triton ")}
    assert len(chosen) >= 5
    if torch.backends.cudnn.is_available():
        assert "not used: cudnn_convolution_relu for" in out
        assert "NaN lost" in out

    asked = len(timer.asked)
    code, out, _ = run("tune", *ON_SMALL_IMAGES, "--table", path)
    assert code == 0
    assert f"{len(found)} layers were in the table already" in out
    assert len(timer.asked) == asked


def test_tune_interrupted(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], tmp_path: Path
) -> None:
    pretend_gpu(FakeTimer(lambda name: 1e-5, stop_after=9))
    code, out, err = run("tune", *ON_SMALL_IMAGES)
    assert (code, err) == (130, "")
    kept = table.read(table.user_path(GPU))
    assert f"interrupted after {len(kept)} of" in out
    assert 1 <= len(kept) < len(networks.of_model("resnet18", 1, "tfloat32", 32))


def test_tune_checks_its_table_first(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], tmp_path: Path
) -> None:
    timer = FakeTimer(lambda name: 1e-5)
    pretend_gpu(timer)
    foreign = tmp_path / "foreign.json"
    foreign.write_text(document(format="fused_resnet.tuning/9"))
    (tmp_path / "file").touch()
    for path in (foreign, tmp_path / "file" / "t.json"):
        code, out, err = run("tune", *ON_SMALL_IMAGES, "--table", path)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "--table cannot be written" in err
    assert not timer.asked


def test_tune_needs_triton(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "available", lambda: {"triton": "no such luck"})
    code, _, err = run("tune", "resnet18")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot run: no such luck" in err
