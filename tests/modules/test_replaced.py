"""Classes, methods and functions of torch that somebody else has put others in the place of."""

from __future__ import annotations

import ast
import copy
import pathlib

import pytest
import torch
import torch.nn.functional as F
import torchvision.models.resnet as torchvision_resnet
from support import image_batch, run_python
from torch import nn

from fused_resnet import fuse, originals, quantize, report
from fused_resnet.models import cifar_resnet


def _network():
    torch.manual_seed(0)
    model = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(128, 5)
    return model.eval()


def _halved(function):
    return lambda *args, **kwargs: function(*args, **kwargs) / 2


PLACES = [
    (nn.Conv2d, "forward"),
    (nn.Conv2d, "_conv_forward"),
    (nn.BatchNorm2d, "forward"),
    (nn.modules.batchnorm._BatchNorm, "forward"),
    (nn.ReLU, "forward"),
    (nn.MaxPool2d, "forward"),
    (F, "conv2d"),
    (F, "batch_norm"),
    (F, "relu"),
    (F, "max_pool2d"),
    (torchvision_resnet.BasicBlock, "forward"),
    (torchvision_resnet.ResNet, "_forward_impl"),
]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("before", [False, True], ids=["after fuse", "before fuse"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0].__name__}.{place[1]}")
def test_replaced_and_put_back(place, before, training, monkeypatch):
    """The replacement runs, the report names it, and afterwards everything runs fused."""
    owner, name = place
    eager = _network().train(training)
    x = image_batch(size=16)
    plain = copy.deepcopy(eager)(x)
    fused = copy.deepcopy(eager)
    if not before:
        fused = fuse(fused)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, _halved(getattr(owner, name)))
        expected = copy.deepcopy(eager)(x)
        assert not torch.allclose(expected, plain)
        if before:
            fused = fuse(fused)
        torch.testing.assert_close(copy.deepcopy(fused)(x), expected)
        reasons = [record.reason for record in report(fused) if not record.fused]
        assert any(f".{name} has been replaced" in reason for reason in reasons)
    assert all(record.fused for record in report(fused))
    torch.testing.assert_close(fused(x), plain)


CLASSES = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d", "Sequential", "Identity"]


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_in_the_place_of_torchs(name, monkeypatch):
    """Models built with it have its layers; those built before are torch's own and run fused."""
    before = _network()

    class Fake(getattr(nn, name)):
        def forward(self, x):
            return super().forward(x) * 0.5

    monkeypatch.setattr(nn, name, Fake)
    model, x = _network(), image_batch(size=16)
    expected = model(x)
    fused = fuse(copy.deepcopy(model))
    torch.testing.assert_close(fused(x), expected)
    if name not in ("Sequential", "Identity"):
        assert any("Fake" in record.reason for record in report(fused))
    expected = before(x)
    assert all(record.fused for record in report(fuse(before)))
    torch.testing.assert_close(before(x), expected)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.single
def test_eight_bits_with_a_class_in_the_place_of_torchs(name, monkeypatch):
    """What was built before is quantized as without the replacement, stem and projections too."""
    torch.manual_seed(0)
    model = torchvision_resnet.ResNet(torchvision_resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.eval()
    batches = [image_batch(size=32)]
    expected = quantize(copy.deepcopy(model), batches, stem="int8")(batches[0])
    monkeypatch.setattr(nn, name, type("Fake", (getattr(nn, name),), {}))
    assert torch.equal(quantize(model, batches, stem="int8")(batches[0]), expected)
    assert all(record.fused for record in report(model))


def test_nobody_asks_for_what_torch_has_under_the_name_now():
    """Functions know modules by `originals`, not by what `torch.nn` holds when they run."""
    package = pathlib.Path(originals.__file__).parent
    names = {name for name in vars(originals) if hasattr(nn, name)}
    assert {*CLASSES, "Linear", "AdaptiveAvgPool2d", "SyncBatchNorm"} <= names
    asked = []
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] in ("models", "measure"):  # these build networks
            continue
        for call in ast.walk(ast.parse(path.read_text())):
            values = []
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "isinstance":
                values = call.args[1:]
            elif isinstance(call, ast.Compare):
                values = call.comparators
            for value in (node for argument in values for node in ast.walk(argument)):
                if isinstance(value, ast.Attribute) and value.attr in names:
                    looked_up = ast.unparse(value.value) in ("nn", "torch.nn")
                    asked += [f"{path.name}:{value.lineno}"] if looked_up else []
    assert asked == []


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_methods_of_an_instance(name):
    model, x = fuse(cifar_resnet(8).eval()), image_batch(size=8)
    plain = model(x)
    conv = model.layer2[0].conv2
    setattr(conv, name, lambda *args: 0 * getattr(nn.Conv2d, name)(conv, *args))
    replaced = model(x)
    assert not torch.allclose(plain, replaced)
    assert "conv2 has a forward of its own" in [record.reason for record in report(model)]
    delattr(conv, name)
    assert torch.equal(model(x), plain)


@pytest.mark.ahead(
    lambda: run_python(
        """
        import torch, torch.nn.functional as F
        original, conv2d = torch.nn.ReLU, F.conv2d
        class Half(original):
            def forward(self, x):
                return super().forward(x) / 2
        torch.nn.ReLU = torch.nn.modules.activation.ReLU = Half
        F.conv2d = lambda *args: conv2d(*args) * 2
        import fused_resnet
        from fused_resnet.models import cifar_resnet
        torch.manual_seed(0)
        x, model = torch.randn(2, 3, 8, 8), cifar_resnet(8).eval()
        expected = model(x)
        fused_resnet.fuse(model)
        assert torch.equal(model(x), expected)
        assert "relu is a Half" in str(fused_resnet.report(model))
        F.conv2d = conv2d
        torch.nn.ReLU = torch.nn.modules.activation.ReLU = original
        model = cifar_resnet(8).eval()
        expected = model(x)
        fused_resnet.fuse(model)
        torch.testing.assert_close(model(x), expected)
        print(all(record.fused for record in fused_resnet.report(model)))
        """
    )
)
def test_before_the_import(ahead):
    """What is replaced when this package is imported is no original either."""
    assert ahead().strip() == "True"


def test_nothing_is_replaced():
    """Every place holds torch's own function, by the file that it is defined in."""
    assert originals.replaced() is None
    for (owner, name), function in zip(originals._WHERE, originals._now(), strict=True):
        assert getattr(owner, name) is function
        assert originals.is_own(owner, name, function)
        assert not originals.is_own(owner, name, lambda *args: None)
