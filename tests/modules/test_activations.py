"""Networks whose activations are no ReLU: fused with the convolution before them, in inference."""

from __future__ import annotations

import copy
import pickle
from collections import Counter

import pytest
import timm
import torch
import torchvision
from support import assert_gradients_by_error_rule, assert_same_bits, double_copy, image_batch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet.backends.cpu import Cpu
from fused_resnet.testing import assert_error_rule, randomize_

# The first is the one that meets every structure: it is far from a ReLU everywhere.
ACTIVATIONS = {
    "silu": nn.SiLU,
    "relu6": nn.ReLU6,
    "relu6 in place": lambda: nn.ReLU6(inplace=True),
    "hardtanh": lambda: nn.Hardtanh(-0.5, 1.5),
    "leaky relu": lambda: nn.LeakyReLU(0.1),
    "leaky relu in place": lambda: nn.LeakyReLU(0.3, inplace=True),
    "silu in place": lambda: nn.SiLU(inplace=True),
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "gelu of tanh": lambda: nn.GELU(approximate="tanh"),
}
ACTIVATION = pytest.mark.parametrize("act", ACTIVATIONS)


@pytest.fixture(autouse=True)
def fused_however_small(monkeypatch):
    """Convolutions of few products run fused too, whichever is faster."""
    monkeypatch.setattr(Cpu, "prefers_modules", staticmethod(lambda *arguments: False))


def basic_block(act):
    block = BasicBlock(16, 16)
    block.relu = ACTIVATIONS[act]()
    first = nn.Sequential(nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), ACTIVATIONS[act]())
    return nn.Sequential(first, block)


def resnet(act):
    """Torchvision's network: its stem with the pool, a block with a projection."""
    model = torchvision.models.ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(128, 10)
    for module in list(model.modules()):
        if isinstance(module, (BasicBlock, torchvision.models.ResNet)):
            module.relu = ACTIVATIONS[act]()
    return model


STRUCTURES = {
    "sequence": lambda act: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), ACTIVATIONS[act](),
        nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.Identity(), ACTIVATIONS[act](),
        nn.MaxPool2d(2),
    ),
    "graph": lambda act: torch.fx.symbolic_trace(nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), ACTIVATIONS[act](), nn.MaxPool2d(2),
    )),
    "norm with its activation": lambda act: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), BatchNormAct2d(8, act_layer=ACTIVATIONS[act])
    ),
    "block": basic_block,
    "network": resnet,
}  # fmt: skip


def build(structure, act):
    torch.manual_seed(0)
    return randomize_(STRUCTURES[structure](act), seed=1).eval()


class Called(TorchDispatchMode):
    """Counts what of torch's operators runs."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func.overloadpacket.__name__.rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def activations_called(model, x):
    """How often torch's own activations run."""
    with Called() as called, torch.no_grad():
        model(x)
    names = ("relu", "hardtanh", "leaky_relu", "silu", "hardswish", "gelu", "clamp_min")
    return sum(called.counts[name] for name in names)


@pytest.mark.quick
@ACTIVATION
@pytest.mark.parametrize("structure", STRUCTURES)
def test_in_evaluation(structure, act):
    """By the error rule, in three dtypes, with nothing left of torch's own activations."""
    eager = build(structure, act)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    report = fused_resnet.report(fused)
    assert len(report) >= 1
    assert all(record.fused and not record.reason for record in report), report
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = image_batch(8, 33, dtype)  # of twenty outputs the error is a matter of luck
            mine, its = fused.to(dtype), eager.to(dtype)
            out, expected = mine(x), its(x)
            assert_error_rule(out, expected, double_copy(its)(x.double()))
    fused, eager = fused.float(), eager.float()
    assert activations_called(eager, image_batch(1, 33)) > 0
    if torch.ops.fused_resnet.conv_isa():
        assert no_activation_is_left(fused)
    x = image_batch(2, 33)
    with torch.no_grad():
        assert_same_bits(fused_resnet.unfuse(fused)(x), eager(x))


def no_activation_is_left(fused):
    """Operators decompose into nothing here: what runs of torch's own is what is not fused."""
    return activations_called(fused, image_batch(1, 33)) == 0


@ACTIVATION
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_and_statistics(structure, act):
    """In training the activation is applied with its norm."""
    eager = build(structure, act).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    report = fused_resnet.report(fused)
    assert all(record.fused for record in report), report
    assert not any(record.reason for record in report), report
    x = image_batch(4, 33)
    assert activations_called(copy.deepcopy(fused), x) == 0
    assert_gradients_by_error_rule(copy.deepcopy(fused), copy.deepcopy(eager), x)
    exact = double_copy(eager)
    for model, values in ((eager, x), (fused, x), (exact, x.double())):
        model(values)
    for (key, mine), its, reference in zip(
        fused.named_buffers(), eager.buffers(), exact.buffers(), strict=True
    ):
        if mine.is_floating_point():
            assert_error_rule(mine, its, reference, what=key)


def test_what_has_no_kernel_in_training_is_reported():
    model = fused_resnet.fuse(build("sequence", "silu")).train()
    with fused_resnet.use_backend("reference"):
        (record,) = fused_resnet.report(model)
    assert "2 is a SiLU, which runs by itself in training" in record.reason


@pytest.mark.parametrize("act", ["silu in place", "leaky relu"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_gradients_under_frozen_statistics(structure, act):
    eager = build(structure, act)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert_gradients_by_error_rule(fused, eager, image_batch(2, 33))


@pytest.mark.parametrize("act", ["silu", "leaky relu", "relu6 in place"])
@pytest.mark.parametrize("structure", ["sequence", "norm with its activation", "block", "network"])
@pytest.mark.single
def test_compilers(structure, act):
    """`torch.compile` and `torch.export` see one graph, of our operators."""
    model = fused_resnet.fuse(build(structure, act))
    x = image_batch(2, 33)
    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        program = torch.export.export(model, (x,))
        names = [str(node.target) for node in program.graph.nodes]
        assert any("fused_resnet.conv_bn_act" in name for name in names), names
        kinds = ("silu", "leaky_relu", "hardtanh", "relu")
        assert not any(f"aten.{kind}" in name for name in names for kind in kinds), names
        torch.testing.assert_close(program.module()(x), expected)
        table = fused_resnet.decompositions()
        decomposed = program.run_decompositions(table)
        assert not any("fused_resnet" in str(node.target) for node in decomposed.graph.nodes)
        torch.testing.assert_close(decomposed.module()(x), expected, rtol=1e-4, atol=1e-5)


def test_parameters_are_looked_at_in_every_pass():
    """A slope that is changed later, and hooks."""
    eager = build("sequence", "leaky relu")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 33)
    with torch.no_grad():
        for slope in (0.1, 0.5, -2.0, 1):
            for model in (eager, fused):
                model[2].negative_slope = slope
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
        seen = []
        fused[2].register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    assert seen == [1]
    assert "hooks" in fused_resnet.report(fused)[0].reason


@pytest.mark.parametrize("where", [nn.SiLU, torch.nn.functional])
def test_what_has_been_replaced_runs(monkeypatch, where):
    """A class's forward pass, or the function it calls."""
    eager = build("sequence", "silu")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 33)
    with torch.no_grad():
        before = fused(x)
        if where is nn.SiLU:
            monkeypatch.setattr(nn.SiLU, "forward", lambda self, input: input * 2)
        else:
            monkeypatch.setattr(where, "silu", lambda input, inplace=False: input * 2)
        out = fused(x)
        assert not torch.allclose(out, before)
        torch.testing.assert_close(out, eager(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "leaky relu"])
@pytest.mark.parametrize("structure", ["sequence", "block", "network"])
def test_copies_and_pickles(structure, act):
    fused = fused_resnet.fuse(build(structure, act))
    x = image_batch(2, 33)
    with torch.no_grad():
        expected = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert [*map(type, other.modules())] == [*map(type, fused.modules())]
            assert_same_bits(other(x), expected)


def test_no_block_of_these_runs_in_eight_bits():
    """Eight bits know ReLU alone: other blocks and stems stay in floating point, and say so."""
    model = fused_resnet.fuse(build("network", "silu"))
    images = image_batch(4, 64)
    with pytest.raises(ValueError, match="has more to it than convolutions and norms"):
        fused_resnet.quantize(model, [images], stem="int8")
    model.layer1[0].relu = nn.ReLU()
    fused_resnet.quantize(model, [images], stem="int8")
    report = {record.path: record for record in fused_resnet.report(model)}
    assert report["layer1.0"].precision == "int8"
    for path, what in (
        ("", "a convolution of one group, a norm"),
        ("layer2.0", "convolutions and"),
    ):
        assert f"in floating point: it has more to it than {what}" in report[path].reason


def tv(name):
    return lambda: getattr(torchvision.models, name)(num_classes=10)


def inverted(name):
    """One block of a network of torchvision's or timm's, with its shortcut, of 24 channels."""
    if name == "mobilenet_v2":
        return InvertedResidual(24, 24, 1, 4)
    if name == "mnasnet":
        return torchvision.models.mnasnet._InvertedResidual(24, 24, 3, 1, 4)
    if name == "efficientnet":
        config = MBConvConfig(4, 3, 1, 24, 24, 1)
        return MBConv(config, 0.5, nn.BatchNorm2d)
    if name == "quantization":
        return torchvision.models.quantization.mobilenetv2.QuantizableInvertedResidual(24, 24, 1, 4)
    block = timm.models._efficientnet_blocks.InvertedResidual
    return block(24, 24, exp_ratio=4.0, drop_path_rate=0.5 if name == "timm drop path" else 0.0)


INVERTED = ["mobilenet_v2", "mnasnet", "efficientnet", "quantization", "timm", "timm drop path"]


def adds_called(model, x):
    with Called() as called, torch.no_grad():
        model(x)
    return called.counts["add"]


@pytest.mark.quick
@pytest.mark.parametrize("name", INVERTED)
def test_a_shortcut_without_activation_is_added_by_the_convolution(name):
    torch.manual_seed(0)
    eager = randomize_(inverted(name), seed=1).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    report = fused_resnet.report(fused)
    assert [record.path for record in report if record.fused] == [""], report
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = torch.randn(2, 24, 9, 9).to(memory_format=memory_format)
        assert adds_called(eager, x) == 1
        assert adds_called(fused, x) == 0
        with torch.no_grad():
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))
    assert_gradients_by_error_rule(copy.deepcopy(fused), copy.deepcopy(eager), x)
    results = []
    for model in (fused.train(), eager.train(), double_copy(eager).train()):
        torch.manual_seed(4)  # for the images that stochastic depth drops
        with torch.no_grad():
            results.append([model(x.to(next(model.parameters()).dtype)), *model.buffers()])
    for mine, its, exact in zip(*results, strict=True):
        if mine.is_floating_point():
            assert_error_rule(mine, its, exact)


@pytest.mark.quick
def test_hooks_and_changes_inside_a_block_that_was_gone_into():
    """Sequentials that the fused pass goes around, and what may be idle in front of the add."""
    torch.manual_seed(0)
    eager = randomize_(inverted("mobilenet_v2"), seed=1).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x, seen = torch.randn(1, 24, 9, 9), []
    with torch.no_grad():
        for path in ("conv", "conv.0", "conv.0.1", "conv.3"):
            handle = fused.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
            torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
            handle.remove()
        assert len(seen) == 4
        for model in (fused, eager):
            model.conv.append(nn.Sigmoid())
        assert "conv has the children" in fused_resnet.report(fused)[0].reason
        assert_same_bits(fused(x), eager(x))
        block = randomize_(inverted("timm"), seed=1).eval()
        fused = fused_resnet.fuse(copy.deepcopy(block))
        block.drop_path = nn.Sigmoid()
        fused.drop_path = nn.Sigmoid()
        torch.testing.assert_close(fused(x), block(x), rtol=1e-4, atol=1e-5)


def of_timm(name, **arguments):
    return lambda: timm.create_model(name, num_classes=10, **arguments)


# How many activations of torch's own are left in a pass: those in squeeze and excitation, in the
# classifier, and those behind an attention or an add that no convolution's epilogue has.
NETWORKS = {
    "mobilenet_v2": (tv("mobilenet_v2"), 0),
    "mobilenet_v3_small": (tv("mobilenet_v3_small"), 9 + 1),
    "timm test_efficientnet": (of_timm("test_efficientnet"), 2),
    "timm mobilenetv3_small_050": (of_timm("mobilenetv3_small_050"), 9 + 1),
    "timm resnet32ts": (of_timm("resnet32ts"), 0),
    "timm gernet_s": (of_timm("gernet_s", act_layer=nn.LeakyReLU), 0),
    "timm regnetz_005": (of_timm("regnetz_005"), 21),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.single
def test_networks(name):
    make, left = NETWORKS[name]
    torch.manual_seed(1)
    eager = randomize_(make(), seed=2).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    report = fused_resnet.report(fused)
    assert all(record.fused for record in report), report
    x = image_batch(2, 64)
    with torch.no_grad():
        expected = eager(x)
        assert_error_rule(fused(x), expected, double_copy(eager)(x.double()))
        if torch.ops.fused_resnet.conv_isa():
            assert activations_called(fused, x) == left
        assert activations_called(eager, x) > left
        assert_same_bits(fused_resnet.unfuse(fused)(x), expected)


@pytest.mark.parametrize(
    "name", ["timm test_efficientnet", pytest.param("mobilenet_v2", marks=pytest.mark.whole)]
)
def test_networks_in_training(name):
    make, _ = NETWORKS[name]
    torch.manual_seed(1)
    eager = randomize_(make(), seed=2).train()
    for module in eager.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert_gradients_by_error_rule(fused, eager, image_batch(4, 64))
