"""The examples run, and the results kept beside them say what they should."""

import json
import re
import statistics
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch
import typer
from support import load_script
from typer.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def train_digits():
    module = load_script(EXAMPLES / "train_digits.py")
    yield module
    del sys.modules[module.__name__]


def call(module, *arguments):
    app = typer.Typer()
    app.command()(module.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.quick
def test_training_on_digits(train_digits, tmp_path):
    """From the same seed both learn, and at first the same: rounding has had no time to grow."""
    output = tmp_path / "curves"
    result = call(
        train_digits, "--seeds", 1, "--epochs", 3, "--depth", 8, "--output", output, "--threads", 1
    )
    assert result.exit_code == 0, result.output
    document = json.loads(output.with_suffix(".json").read_text())
    assert document["schema"] == "fused_resnet.digits/1"
    assert document["arguments"] == {"epochs": 3, "depth": 8, "threads": 1}
    assert document["summary"]["same_within_spread"] is None
    eager, fused = document["runs"]
    assert (eager["model"], fused["model"]) == ("eager", "fused")
    for run in (eager, fused):
        for curve in ("train_loss", "test_loss", "test_accuracy"):
            assert len(run[curve]) == 3
        assert run["train_loss"][2] < 0.5 * run["train_loss"][0]
    assert fused["train_loss"][0] == pytest.approx(eager["train_loss"][0], rel=1e-3)
    assert fused["train_loss"][2] == pytest.approx(eager["train_loss"][2], rel=0.1)
    assert fused["train_loss"] != eager["train_loss"], "both ran the same kernels"
    assert f"{100 * fused['test_accuracy'][-1]:.2f} %" in result.output
    pixels = matplotlib.image.imread(output.with_suffix(".png"))
    assert pixels.shape[0] > 300
    assert pixels[..., :3].std() > 0.01


@pytest.mark.quick
def test_its_arguments(train_digits, tmp_path):
    for arguments, message in (
        (("--depth", 9), "must be 6n + 2"),
        (("--seeds", 0), "seeds"),
        (("--output", tmp_path / "none" / "curves"), "there is no folder"),
    ):
        result = call(train_digits, *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.quick
def test_shifts(train_digits):
    """Every image is one of the nine shifts of itself, and all nine occur."""
    images = torch.randn(200, 1, 8, 8)
    shifted = train_digits.shifted(images, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1), value=images.min().item())
    choices = torch.stack([padded[:, :, i : i + 8, j : j + 8] for i in range(3) for j in range(3)])
    matches = (choices == shifted).flatten(2).all(2)
    assert (matches.sum(0) == 1).all()
    assert matches.any(1).all()


@pytest.mark.quick
def test_the_curves_that_are_kept(train_digits):
    """Five seeds, each above 98 %, and fused as close to eager as the seeds to each other."""
    document = json.loads((EXAMPLES / "train_digits.json").read_text())
    runs = [train_digits.Run(**run) for run in document["runs"]]
    assert sorted((run.model, run.seed) for run in runs) == [
        (name, seed) for name in ("eager", "fused") for seed in range(5)
    ]
    assert document["summary"] == train_digits.summary(runs)
    assert document["summary"]["same_within_spread"] is True
    assert all(run.test_accuracy[-1] > 0.98 for run in runs)
    means = [
        statistics.mean(run.test_accuracy[-1] for run in runs if run.model == name)
        for name in ("eager", "fused")
    ]
    assert abs(means[0] - means[1]) < 0.01


@pytest.fixture
def quantize_digits(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import quantize_digits

    yield quantize_digits
    sys.modules.pop("quantize_digits")


@pytest.mark.quick
def test_quantizing_on_digits(quantize_digits):
    """Each network is right about most images, and the eight-bit ones mostly as float32 is."""
    arguments = ("--epochs", 3, "--more-epochs", 1, "--depth", 8, "--threads", 1)
    result = call(quantize_digits, *arguments)
    assert result.exit_code == 0, result.output
    rows = re.findall(r"│ ([a-z0-9, ]+?) +│ +([0-9.]+) % │ +([0-9.]+) %", result.output)
    names = ["float32", "eight bits", "classifier too", "trained on"]
    assert [name for name, *_ in rows] == names
    for _, top_1, agreement in rows:
        assert float(top_1) > 90
        assert float(agreement) > 95
    assert float(rows[0][2]) == 100


@pytest.mark.quick
def test_arguments_of_quantizing(quantize_digits):
    for arguments, message in (
        (("--depth", 9), "must be 6n + 2"),
        (("--observer", "median"), "observer"),
    ):
        result = call(quantize_digits, *arguments)
        assert result.exit_code == 2
        assert message in " ".join(result.output.replace("│", " ").split())
