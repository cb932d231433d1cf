"""What earlier versions of the package have written to disk loads and runs in this one.

tests/modules/data/model.pt.gz and state_dict.pt.gz were written by commit 4d590e4 with torch 2.11:
a network of four kinds of blocks, fused with memory="low", with an input and the unfused network's
output; and the state of the same network fused with memory="normal".
"""

import copy
import gzip
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet

import fused_resnet
from fused_resnet.models import cifar

DATA = Path(__file__).parent / "data"

pytestmark = pytest.mark.quick


def fresh_model():
    torch.manual_seed(1)
    projections = [
        nn.Sequential(resnet.conv1x1(4, 8, 2), nn.BatchNorm2d(8)),
        nn.Sequential(resnet.conv1x1(8, 16, 1), nn.BatchNorm2d(16)),
    ]
    return nn.Sequential(
        resnet.BasicBlock(4, 8, 2, projections[0]),
        resnet.Bottleneck(8, 4, 1, projections[1]),
        cifar.PlainBlock(16, 4),
        resnet.BasicBlock(4, 6, 2, cifar.PaddedShortcut(4, 6, 2)),
    )


def unpacked(name):
    return io.BytesIO(gzip.decompress((DATA / name).read_bytes()))


def old_file():
    return torch.load(unpacked("model.pt.gz"), weights_only=False)


def output_of(model, x):
    with torch.no_grad():
        return model.eval()(x)


def gradients_of(model, x):
    return torch.autograd.grad(model.train()(x).square().sum(), list(model.parameters()))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_fused_model():
    """Outputs, gradients and the way back are those of the network it was."""
    file = old_file()
    model, x = file["model"], file["input"]
    assert all(record.fused for record in fused_resnet.report(model))
    assert all(block.memory == "low" for block in model)
    assert_close(output_of(model, x), file["output"])
    plain = fused_resnet.unfuse(copy.deepcopy(model))
    assert {type(block) for block in plain} == {
        resnet.BasicBlock,
        resnet.Bottleneck,
        cifar.PlainBlock,
    }
    assert_close(output_of(plain, x), file["output"])
    for ours, theirs in zip(gradients_of(model, x), gradients_of(plain, x), strict=True):
        assert_close(ours, theirs)
    again = fused_resnet.fuse(plain)
    assert_close(output_of(again, x), output_of(model, x))


def test_a_model_from_before_there_was_memory():
    """Pickled blocks need not have the attribute."""
    file = old_file()
    for block in file["model"]:
        vars(block).pop("memory", None)
        assert block.memory == "normal"
    model = pickle.loads(pickle.dumps(file["model"]))
    assert all("memory" not in vars(block) for block in model)
    assert_close(output_of(model, file["input"]), file["output"])
    assert all(g.isfinite().all() for g in gradients_of(model, file["input"]))


@pytest.mark.parametrize("fused", [True, False])
def test_a_checkpoint(fused):
    """It fits the fused and the plain network, and needs nothing but weights to load."""
    state = torch.load(unpacked("state_dict.pt.gz"), weights_only=True)
    file = old_file()
    model = fresh_model().eval()
    if fused:
        fused_resnet.fuse(model)
        output_of(model, file["input"])  # what is made of the first weights must be dropped
    assert model.load_state_dict(state).missing_keys == []
    assert_close(output_of(model, file["input"]), file["output"])
    assert list(model.state_dict()) == list(state)


def test_checkpoints_of_this_version(tmp_path):
    """Fused and plain networks write the same keys and values, loaded as weights only."""
    model = fresh_model()
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    torch.save(fused_resnet.fuse(model).state_dict(), tmp_path / "fused.pt")
    plain, fused = (
        torch.load(tmp_path / name, weights_only=True) for name in ("plain.pt", "fused.pt")
    )
    assert list(plain) == list(fused)
    assert all(torch.equal(plain[key], fused[key]) for key in plain)
