"""The experiments of examples/look_inside.py: what they measure."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fused_resnet

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def look_inside(monkeypatch):
    """The script as a module."""
    pytest.importorskip("sklearn", reason="scikit-learn, which has the images, is not installed")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import look_inside

    yield look_inside
    sys.modules.pop("look_inside")


def test_gradient_norms(look_inside):
    """Of every block's output, found once more by running the network block by block."""
    data = look_inside.digits()
    images, labels = data.train_images[:8], data.train_labels[:8]
    model = look_inside.build(14, plain=False, seed=0).train()
    norms = look_inside.gradient_norms(model, images, labels)
    x, outputs = model.relu(model.bn1(model.conv1(images))), []
    for stage, index in look_inside.blocks_of(model):
        x = stage[index](x)
        outputs.append(x)
    logits = model.fc(torch.flatten(model.avgpool(x), 1))
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), outputs)
    assert norms == pytest.approx([gradient.norm().item() for gradient in gradients], rel=1e-3)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.single
def test_leaving_out_blocks(look_inside, plain):
    """One at a time, where shapes allow, and the network is whole again afterwards."""
    data = look_inside.digits()
    model = look_inside.build(14, plain, seed=0)
    assert all(record.fused for record in fused_resnet.report(model))
    modules = list(model.modules())
    loss = look_inside.train(model, data, 1, 0, lambda: None)
    assert loss < 2.3  # that of guessing, log 10
    accuracies = look_inside.accuracy_without(model, data)
    assert list(model.modules()) == modules
    assert [value is None for value in accuracies] == [False, False, True, False, True, False]
    model.layer2[1] = torch.nn.Identity()
    assert look_inside.accuracy(model, data) == accuracies[3]


@pytest.mark.parametrize(
    "arguments",
    [
        ["depth", "--depths", "8", "--epochs", "1"],
        ["gradients", "--depth", "8", "--seeds", "1"],
        ["drop", "--depth", "14", "--epochs", "1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_commands(look_inside, tmp_path, arguments):
    """A plot and its numbers."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(
        look_inside.app, [*arguments, "--output", str(tmp_path / "result")], catch_exceptions=False
    )
    assert result.exit_code == 0
    assert (tmp_path / "result.png").stat().st_size > 1000
    assert (tmp_path / "result.json").stat().st_size > 10
