"""No warning is printed twice, whatever is fused, reported, run, trained, compiled or unfused."""

from collections import Counter

import pytest
from support import processes

SCRIPT = """
import copy
import sys
import warnings

import torch
import torchvision
from torch import nn

import fused_resnet
from fused_resnet import models

family = sys.argv[1]


def make():
    if family == "cifar":
        return models.cifar_resnet(8)
    if family == "densenet":
        return torchvision.models.DenseNet(8, (2, 2), 16)
    if family == "timm":
        import timm

        return timm.create_model("resnet10t", num_classes=4)
    if family == "frozen":
        norm, block = torchvision.ops.FrozenBatchNorm2d, torchvision.models.resnet.BasicBlock
        return torchvision.models.ResNet(block, [1] * 4, norm_layer=norm)
    return torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1] * 4)


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        model = fused_resnet.fuse(make())
        fused_resnet.fuse(model)
        str(fused_resnet.report(model))
        x = torch.randn(2, 3, 64, 64)
        for _ in range(2):
            model.train()(x).sum().backward()
            with torch.no_grad():
                model.eval()(x)
            with torch.autocast("cpu", torch.bfloat16):
                model.train()(x).sum().backward()
        with torch.no_grad():
            torch.compile(copy.deepcopy(model).eval(), backend="eager")(x)
        fused_resnet.unfuse(copy.deepcopy(model))
    print("ran", file=sys.stdout)
for warning in caught:
    print(f"{warning.filename}:{warning.lineno}: {warning.message}", file=sys.stderr)
"""


def run(family):
    code = f"import sys; sys.argv = ['', {family!r}]\n{SCRIPT}"
    return processes.run_code(code, 300, processes.current_environment())


@pytest.mark.parametrize(
    "family",
    [
        "torchvision",
        "timm",
        "densenet",
        pytest.param("cifar", marks=pytest.mark.whole),
        pytest.param("frozen", marks=pytest.mark.whole),
    ],
)
@pytest.mark.ahead(lambda family: run(family))
def test_no_warning_is_printed_twice(ahead, family):
    """With every filter open: neither Python's warnings nor what torch writes by itself."""
    if family == "timm":
        pytest.importorskip("timm")
    status, out, err = ahead()
    assert status == 0, err
    assert out.strip() == "ran"
    counts = Counter(line for line in err.splitlines() if line.strip())
    assert [line for line, count in counts.items() if count > 1] == []
