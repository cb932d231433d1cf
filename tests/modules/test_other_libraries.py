"""Other libraries' residual networks: forms by class name and structure, sequences, foreign norms.

`tests/support/lookalikes.py` has classes of the same names and structure; the libraries' own are
tested where they are installed. Graphs are in `test_graph_modules.py`.
"""

from __future__ import annotations

import copy
import importlib
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import (
    assert_gradients_by_error_rule,
    assert_same_bits,
    double_copy,
    image_batch,
    lookalikes,
)
from torch import nn
from torchvision.ops.misc import Conv2dNormActivation

import fused_resnet
from fused_resnet import forms, recipes
from fused_resnet.testing import assert_error_rule, randomize_

TORCHVISION = {
    "regnet_y_400mf": lambda: torchvision.models.regnet_y_400mf(num_classes=10),
    "regnet_x_400mf": lambda: torchvision.models.regnet_x_400mf(num_classes=10),
    "googlenet": lambda: torchvision.models.googlenet(
        num_classes=10, aux_logits=False, init_weights=False
    ),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10),
    "quantization.resnet18": lambda: torchvision.models.quantization.resnet18(num_classes=10),
    "quantization.resnet50": lambda: torchvision.models.quantization.resnet50(num_classes=10),
    "vgg11_bn": lambda: torchvision.models.vgg11_bn(num_classes=10).features,
}
SEQUENCES = {
    "convolution, norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
    ),
    "convolution, norm, another activation": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
        nn.LeakyReLU(0.1),
    ),
    "Conv2dNormActivation": lambda: Conv2dNormActivation(3, 16, 3, 2),
    "the norm in a Sequential of its own": lambda: lookalikes.Convolution(3, 8),
    "the ReLU outside": lambda: nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), nn.ReLU()
    ),
    "dropout before the ReLU": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.0), nn.ReLU(), nn.Conv2d(8, 3, 1)
    ),
    "a network taken apart": lambda: nn.Sequential(
        *list(torchvision.models.resnet18(num_classes=10).children())[:-2]
    ),
}  # fmt: skip
EVERY = {**lookalikes.NETWORKS, **TORCHVISION, **SEQUENCES}


def build(name):
    torch.manual_seed(1)
    return randomize_(EVERY[name](), seed=2).eval()


def not_fused(model):
    return [record for record in fused_resnet.report(model) if not record.fused]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_in_evaluation(name, memory_format):
    """By the error rule, and back to the same bits."""
    eager = build(name)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert len(fused_resnet.report(fused)) >= 1
    assert not_fused(fused) == []
    assert fused_resnet.report(fused).unproven == ()
    x = image_batch(2, 64).to(memory_format=memory_format)
    with torch.inference_mode():
        expected = eager(x)
        assert_error_rule(fused(x), expected, double_copy(eager)(x.double()))
        assert_same_bits(fused_resnet.unfuse(fused)(x), expected)
    assert [type(m) for m in fused.modules()] == [type(m) for m in eager.modules()]


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("name", [*lookalikes.NETWORKS, *SEQUENCES, "regnet_y_400mf"])
@pytest.mark.single
def test_gradients_and_statistics(name, memory_format):
    eager = build(name).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert not_fused(fused) == []
    x = image_batch(4, 64).to(memory_format=memory_format)
    assert_gradients_by_error_rule(copy.deepcopy(fused), copy.deepcopy(eager), x)
    exact = double_copy(eager)
    for model, values in ((eager, x), (fused, x), (exact, x.double())):
        model(values)
    buffers = zip(fused.named_buffers(), eager.buffers(), exact.buffers(), strict=True)
    for (key, mine), its, reference in buffers:
        if mine.is_floating_point():
            assert_error_rule(mine, its, reference, what=key)
        else:
            assert torch.equal(mine, its), key


def fused_convolutions(model):
    """Those that a record's units have, and its shortcut's."""
    found = set()
    for path, module in model.named_modules():
        form = forms.of_fused(type(module))
        if form is not None:
            found |= {f"{path}.{unit.conv}" for unit in form.units_of(module)}
            shortcut = getattr(module, form.shortcut or "", None)
            found |= {
                f"{path}.{form.shortcut}.{name}".rstrip(".")
                for name, child in (shortcut.named_modules() if shortcut is not None else ())
                if isinstance(child, nn.Conv2d)
            }
    return found


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "transformers RT-DETR's encoder": 3,
        "pytorchcv": 8,
        "lightly, pretrainedmodels": 9,
        "timm DLA": 13,
        "timm DenseNet": 3,
    }.items(),
)
def test_how_many_convolutions(name, expected):
    """All that have a norm behind them, in blocks whose forward pass is not just of a tensor."""
    assert len(fused_convolutions(fused_resnet.fuse(build(name)))) == expected


@pytest.mark.quick
def test_a_block_of_several_arguments():
    """Whichever are given, by name too; those with which it was not tried run unfused."""
    torch.manual_seed(0)
    for inside, stride in ((16, 1), (8, 2)):
        block = randomize_(lookalikes.DlaBasic(inside, 16, stride), seed=1).eval()
        fused = fused_resnet.fuse(copy.deepcopy(block))
        exact = double_copy(block)
        x, shortcut = torch.randn(2, inside, 8, 8), torch.randn(2, 16, 8 // stride, 8 // stride)
        calls = [(x, shortcut), (x, shortcut, [x])] + [(x,), (x, None, [x])] * (stride == 1)
        with torch.no_grad():
            for given in calls:
                wide = [t.double() if isinstance(t, torch.Tensor) else None for t in given]
                assert_error_rule(fused(*given), block(*given), exact(*wide))
            assert_same_bits(fused(x, shortcut=shortcut), fused(x, shortcut))
            with pytest.raises(TypeError):
                fused(x, shortcut, None, None)
            if stride == 2:
                with pytest.raises(RuntimeError, match="must match the size"):
                    fused(x)
            scripted = torch.jit.script(fused)
            torch.testing.assert_close(scripted(x, shortcut), block(x, shortcut))
        assert isinstance(pickle.loads(pickle.dumps(fused)), type(fused))


@pytest.mark.quick
def test_a_block_of_a_list():
    """What runs fused for a list, with which it was tried, runs as it is for a tensor."""
    layer = randomize_(lookalikes.DenseLayer(16), seed=1).eval()
    fused = fused_resnet.fuse(copy.deepcopy(layer))
    assert type(fused) is not type(layer)
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        exact = double_copy(layer)(x.double())
        for given in (x, [x], [x[:, :5], x[:, 5:]], (x[:, :5], x[:, 5:])):
            assert_error_rule(fused(given), layer(given), exact)


@pytest.mark.quick
@pytest.mark.parametrize("name", [*lookalikes.NETWORKS, *SEQUENCES, "mobilenet_v2"])
def test_what_stays(name):
    """Parameters, keys, `isinstance`; copies and pickles are fused as the model is."""
    eager = build(name)
    fused = copy.deepcopy(eager)
    tensors = [*fused.parameters(), *fused.buffers()]
    assert fused_resnet.fuse(fused) is fused
    assert all(
        a is b for a, b in zip(tensors, [*fused.parameters(), *fused.buffers()], strict=True)
    )
    assert list(fused.state_dict()) == list(eager.state_dict())
    for mine, its in zip(fused.modules(), eager.modules(), strict=True):
        assert isinstance(mine, type(its))
        assert type(mine).__name__ == type(its).__name__
    x = image_batch(2, 64)
    with torch.inference_mode():
        expected = fused(x)
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert [*map(type, other.modules())] == [*map(type, fused.modules())]
            assert_same_bits(other(x), expected)
    first = [*map(type, fused.modules())]
    fused_resnet.fuse(fused_resnet.unfuse(fused))
    assert [*map(type, fused.modules())] == first


@pytest.mark.parametrize("name", ["googlenet", "fastai", "open_clip", "Conv2dNormActivation"])
def test_torchscript(name):
    model = build(name)
    x = image_batch(1, 64)
    with torch.no_grad():
        expected = model(x)
        scripted = torch.jit.script(fused_resnet.fuse(copy.deepcopy(model)))
        found = scripted(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)


@pytest.mark.parametrize("name", ["transformers ResNet", "fastai", "open_clip", "the ReLU outside"])
@pytest.mark.single
def test_compiled(name):
    """In one graph, which holds our operators."""
    model = fused_resnet.fuse(build(name))
    x = image_batch(2, 32)
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    with torch.no_grad():
        expected = model(x)
        torch._dynamo.reset()
        found = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    ours = [target for target in seen if str(target).startswith("fused_resnet")]
    assert ours, seen


def calls(model, x):
    """The results of a model's convolutions called as modules."""
    count = []
    handles = [
        module.register_forward_hook(lambda *_: count.append(1))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return len(count)


@pytest.mark.quick
def test_obstacles_are_found_in_every_pass():
    """Hooks, forward passes of their own, containers with other children: all runs as it is."""
    eager = build("transformers ResNet")
    model = fused_resnet.fuse(copy.deepcopy(eager))
    block = model[1]
    x = image_batch(2, 64)
    seen = []
    handle = block.layer[0].register_forward_hook(lambda *arguments: seen.append(arguments))
    with torch.no_grad():
        assert fused_resnet.report(model)[1].reason == "layer.0 carries hooks"
        model(x)
        assert len(seen) == 1
        handle.remove()
        assert fused_resnet.report(model)[1].fused
        block.layer[0].forward = lambda hidden_state: seen.append(hidden_state) or hidden_state
        assert "layer.0 has a forward of its own" in fused_resnet.report(model)[1].reason
        del block.layer[0].forward
        block.layer.append(nn.Sigmoid())
        eager[1].layer.append(nn.Sigmoid())
        assert "layer has the children" in fused_resnet.report(model)[1].reason
        assert_error_rule(model(x), eager(x), double_copy(eager)(x.double()))
        assert calls(model, x) == calls(eager, x)


@pytest.mark.quick
def test_a_hook_keeps_one_unit_of_a_sequence():
    model = fused_resnet.fuse(build("fastai"))
    x = image_batch(2, 32)
    sequence = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    ).eval()
    fused_resnet.fuse(sequence)
    seen = []
    sequence[3].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        sequence(x)
    (record,) = fused_resnet.report(sequence)
    assert seen == [1]
    assert record.fused
    assert record.reason == "3 carries hooks"
    assert not_fused(model) == []


def test_a_replaced_forward_pass(monkeypatch):
    model = fused_resnet.fuse(build("transformers ResNet"))
    x = image_batch(1, 64)

    def forward(self, input):
        return self.convolution(input)

    monkeypatch.setattr(lookalikes.ResNetConvLayer, "forward", forward)
    reasons = {record.reason for record in fused_resnet.report(model)}
    assert "ResNetConvLayer.forward has been replaced" in reasons
    with torch.no_grad():
        expected = fused_resnet.unfuse(copy.deepcopy(model))(x)
        torch.testing.assert_close(model(x), expected)


class Same(nn.Module):
    """Blocks of a known name that compute something else."""


def other_block(change):
    """A class called ResNetBottleneck whose forward pass is MONAI's but for `change`."""

    def forward(self, x):
        residual = x if self.downsample is None else self.downsample(x)
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        return change(self, self.bn3(self.conv3(out)), residual)

    return type("ResNetBottleneck", (lookalikes.ResNetBottleneck,), {"forward": forward})


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda self, out, x: self.act(out + x), ""),
        (lambda self, out, x: self.act(out) + x, "in evaluation outputs differ by"),
        (lambda self, out, x: self.act(out - x), "in evaluation outputs differ by"),
        (
            lambda self, out, x: self.act(out + x * (2 if self.training else 1)),
            "in training outputs differ by",
        ),
        (lambda self, out, x: self.act(self.gone(out)), "could not be tried: AttributeError"),
    ],
    ids=["the same", "no ReLU behind the add", "a difference", "in training", "an error"],
)
def test_a_form_that_does_not_fit(change, reason):
    """The block is left alone, by name, and computes what it did."""
    cls = other_block(change)
    torch.manual_seed(0)
    block = randomize_(cls(16, 8)).eval()
    fused_resnet.fuse(block)
    record = fused_resnet.report(block)[0]
    assert record.fused is (not reason)
    assert reason in record.reason
    assert (type(block) is cls) is bool(reason)


@pytest.mark.quick
def test_a_block_of_another_structure_is_listed():
    """The report says which convolutions it could not prove anything of, and what to do."""

    class Bottleneck(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn1(self.conv1(x)).mul(2)

    model = fused_resnet.fuse(nn.Sequential(Bottleneck(), nn.ReLU()))
    report = fused_resnet.report(model)
    assert len(report) == 0
    assert report.unproven == ("Bottleneck (0): conv1 and bn1",)
    assert "register_form: Bottleneck (0): conv1 and bn1" in str(report)


@pytest.mark.quick
def test_other_norms_are_listed():
    """The report names norms over groups of channels, once a class, where nothing else does."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4)

        def forward(self, x):
            return self.norm(self.conv(x))

    report = fused_resnet.report(fused_resnet.fuse(nn.Sequential(Layer(), Layer())))
    assert report.other_norms == ("GroupNorm (0.norm and 1 more)",)
    assert "not fused, for it is no batch norm: GroupNorm (0.norm and 1 more)" in str(report)
    assert fused_resnet.report(build("fastai")).other_norms == ()


def test_trials_leave_nothing_behind():
    """Neither random numbers nor modes, hooks, buffers nor the model's memory are touched."""
    model = build("transformers ResNet").train()
    seen = []
    model[1].layer[0].convolution.register_forward_hook(lambda *_: seen.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipes._tried.clear()
    state = torch.get_rng_state()
    with torch.device("meta"):
        fused_resnet.fuse(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert seen == []
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_models_without_memory():
    """What a block computes is tried on other numbers than its own."""
    with torch.device("meta"):
        model = lookalikes.NETWORKS["fastai"]()
    recipes._tried.clear()
    fused_resnet.fuse(model)
    assert not_fused(model) == []


def test_settings():
    model = fused_resnet.fuse(build("open_clip"), memory="low", watch="full")
    assert model.layer1[0].memory == "low"
    other = pickle.loads(pickle.dumps(model))
    assert other.layer1[0].memory == "low"
    assert other.layer1[0].watch == "full"
    fused_resnet.unfuse(other)
    assert "memory" not in vars(other.layer1[0])


# Norms --------------------------------------------------------------------------------------------


def with_norms(cls, model):
    """A model whose batch norms are of another class, with the same values."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                norm = cls(child.num_features)
                norm.load_state_dict(
                    {key: t for key, t in child.state_dict().items() if key in norm.state_dict()}
                )
                setattr(module, name, norm)
    return model


class OwnEps(lookalikes.DetrFrozenBatchNorm2d):
    """As detectron2's: an attribute, and the library's function where no gradient is needed."""

    def __init__(self, channels, eps=1e-3):
        super().__init__(channels)
        self.num_features, self.eps = channels, eps

    def forward(self, x):
        if x.requires_grad:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            bias = self.bias - self.running_mean * scale
            return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, eps=self.eps
        )


class NoEps(lookalikes.DetrFrozenBatchNorm2d):
    def forward(self, x):
        scale = self.weight * self.running_var.rsqrt()
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


class Marked(lookalikes.DetrFrozenBatchNorm2d):
    """In a model of transformers, which leaves a mark on every module."""

    def __init__(self, channels):
        super().__init__(channels)
        self._is_hf_initialized = True


@pytest.mark.quick
@pytest.mark.parametrize("cls", [lookalikes.DetrFrozenBatchNorm2d, OwnEps, NoEps, Marked])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.single
def test_frozen_norms_of_other_libraries(cls, training):
    eager = with_norms(cls, randomize_(torchvision.models.resnet18(num_classes=10)))
    eager.train(training)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert not_fused(fused) == []
    x = image_batch(2, 64)
    if training:
        assert_gradients_by_error_rule(fused, eager, x)
    else:
        with torch.no_grad():
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


class Shifted(lookalikes.DetrFrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x) + 1


class Attribute(lookalikes.DetrFrozenBatchNorm2d):
    """Its instances may differ in more than what is looked at."""

    def __init__(self, channels):
        super().__init__(channels)
        self.activation = "identity"


class Learns(lookalikes.DetrFrozenBatchNorm2d):
    def forward(self, x):
        if self.training:
            self.running_mean += 1
        return super().forward(x)


@pytest.mark.quick
@pytest.mark.parametrize("cls", [Shifted, Attribute, Learns, nn.InstanceNorm2d])
def test_norms_that_compute_something_else(cls):
    model = (
        with_norms(cls, torchvision.models.resnet18(num_classes=10))
        if cls is not (nn.InstanceNorm2d)
        else torchvision.models.resnet18(num_classes=10, norm_layer=cls)
    )
    fused_resnet.fuse(model)
    records = fused_resnet.report(model)
    assert not any(record.fused for record in records)
    assert cls.__name__ in records[0].reason


def test_a_norm_whose_forward_pass_is_replaced(monkeypatch):
    model = with_norms(NoEps, torchvision.models.resnet18(num_classes=10)).eval()
    fused_resnet.fuse(model)
    assert not_fused(model) == []
    monkeypatch.setattr(NoEps, "forward", lambda self, x: x)
    assert len(not_fused(model)) == 9


# Users' forms -------------------------------------------------------------------------------------


def user_block():
    class Block(nn.Module):
        def __init__(self, channels=8):
            super().__init__()
            self.first = nn.Conv2d(channels, channels, 3, padding=1)
            self.first_norm = nn.BatchNorm2d(channels)
            self.second = nn.Conv2d(channels, channels, 3, padding=1)
            self.second_norm = nn.BatchNorm2d(channels)
            self.relu = nn.ReLU()
            self.down = None

        def forward(self, x):
            out = self.relu(self.first_norm(self.first(x)))
            return self.relu(self.second_norm(self.second(out)) + x)

    return Block


BRANCH = ("first", "first_norm", "relu", "second", "second_norm")


@pytest.mark.quick
def test_register_form():
    Block = user_block()
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *(Block() for _ in range(2))).eval()
    eager = copy.deepcopy(randomize_(model))
    assert len(fused_resnet.report(fused_resnet.fuse(model))) == 0
    assert len(fused_resnet.report(model).unproven) == 1
    assert (
        fused_resnet.register_form(branch=BRANCH, shortcut="down", act="relu", example=Block())(
            Block
        )
        is Block
    )
    fused_resnet.fuse(model)
    assert [record.kind for record in fused_resnet.report(model)] == ["Block", "Block"]
    assert not_fused(model) == []
    x = image_batch(2, 16)
    with torch.no_grad():
        assert_error_rule(model(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.quick
@pytest.mark.parametrize("is_traced", [False, True])
@pytest.mark.parametrize(
    ("name", "function"),
    [("F.silu", F.silu), ("F.leaky_relu(0.2)", lambda x: F.leaky_relu(x, 0.2))],
)
def test_forms_whose_activation_is_a_function(name, function, is_traced):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x):
            return function(self.norm(self.conv(x)))

    fused_resnet.register_form(Layer, branch=() if is_traced else ("conv", "norm", name))
    eager = randomize_(Layer()).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    (record,) = fused_resnet.report(fused)
    assert record.fused
    assert name not in record.reason
    (unit,) = forms.of(fused).units_of(fused)
    assert unit.act == name
    x = image_batch(2, 16)
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.quick
def test_register_a_traced_form():
    Block = fused_resnet.register_form(user_block())
    model = fused_resnet.fuse(randomize_(Block()).eval())
    (record,) = fused_resnet.report(model)
    assert record.fused
    assert not record.reason


@pytest.mark.quick
def test_a_wrong_form():
    Block = user_block()
    wrong = (*BRANCH[:2], *BRANCH[3:])
    with pytest.raises(ValueError, match=r"Block: its form computes something else: .* by \d"):
        fused_resnet.register_form(
            Block, branch=wrong, shortcut="down", act="relu", example=Block()
        )
    fused_resnet.register_form(Block, branch=wrong, shortcut="down", act="relu")
    block = fused_resnet.fuse(Block())
    (record,) = fused_resnet.report(block)
    assert not record.fused
    assert "its form computes something else: in evaluation outputs differ by" in record.reason
    fused_resnet.register_form(Block, branch=("absent", *BRANCH), shortcut="down", act="relu")
    assert fused_resnet.report(block)[0].reason == ("its form names absent, which it does not have")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"cls": 3}, TypeError, "cls is 3, must be a class of modules"),
        ({"cls": nn.ReLU, "branch": "conv"}, TypeError, "must be sequences of names"),
        ({"cls": nn.ReLU, "branch": (3,)}, TypeError, "must be sequences of names"),
        ({"cls": nn.ReLU, "branch": ("a",), "act": "relu"}, ValueError, "has both"),
        ({"cls": nn.ReLU, "branch": ("a",), "shortcut": "b"}, ValueError, "has both"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fused_resnet.register_form(**arguments)


# The libraries' own -------------------------------------------------------------------------------


def transformers_resnet(layer_type, first=False):
    from transformers import ResNetConfig, ResNetModel

    return ResNetModel(
        ResNetConfig(
            embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[2, 2, 1, 1],
            layer_type=layer_type, downsample_in_bottleneck=first,
        )
    )  # fmt: skip


def transformers_model(name, config, **arguments):
    transformers = importlib.import_module("transformers")
    return getattr(transformers, name)(getattr(transformers, config)(**arguments))


SMALL = {"embedding_size": 16, "hidden_sizes": [16, 32, 64, 64], "depths": [2, 2, 1, 1]}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "decoder_layers": 1}
HEADS |= {"encoder_layers": 1, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}


def transformers_detr(kind):
    """With a ResNet of transformers', whose norms it replaces by frozen ones of its own."""
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(out_features=["stage4"], **SMALL)
    return transformers_model(
        f"{kind}Model", f"{kind}Config", backbone_config=backbone, use_timm_backbone=False,
        use_pretrained_backbone=False, backbone=None, **HEADS,
    )  # fmt: skip


def transformers_rtdetr():
    transformers = pytest.importorskip("transformers")
    stages = ["stage2", "stage3", "stage4"]
    heads = {name: value for name, value in HEADS.items() if name != "encoder_layers"}
    return transformers_model(
        "RTDetrV2Model", "RTDetrV2Config", encoder_in_channels=[32, 64, 64], encoder_hidden_dim=32,
        backbone_config=transformers.RTDetrResNetConfig(out_features=stages, **SMALL),
        decoder_in_channels=[32, 32, 32], num_queries=10, num_labels=5, **heads,
    )  # fmt: skip


def transformers_maskformer():
    transformers = pytest.importorskip("transformers")
    stages = ["stage1", "stage2", "stage3", "stage4"]
    return transformers_model(
        "MaskFormerModel", "MaskFormerConfig", fpn_feature_size=32, mask_feature_size=32,
        backbone_config=transformers.ResNetConfig(out_features=stages, **SMALL),
        decoder_config=transformers.DetrConfig(num_queries=5, **HEADS),
    )  # fmt: skip


def pytorchcv_model(name, **arguments):
    provider = importlib.import_module("pytorchcv.model_provider")
    return provider.get_model(name, **arguments)


INSTALLED = {
    "transformers bottleneck": ("transformers", lambda: transformers_resnet("bottleneck")),
    "transformers v1": ("transformers", lambda: transformers_resnet("bottleneck", True)),
    "transformers basic": ("transformers", lambda: transformers_resnet("basic")),
    "transformers RegNet": (
        "transformers",
        lambda: transformers_model(
            "RegNetModel", "RegNetConfig", embedding_size=16, hidden_sizes=[16, 32, 32, 32],
            depths=[1, 2, 1, 1], groups_width=8,
        ),
    ),
    "transformers RT-DETR": (
        "transformers",
        lambda: importlib.import_module("transformers").RTDetrResNetBackbone(
            importlib.import_module("transformers").RTDetrResNetConfig(
                embedding_size=16, hidden_sizes=[32, 32, 64, 64], depths=[2, 1, 1, 1]
            )
        ),
    ),
    "transformers RT-DETRv2": ("transformers", transformers_rtdetr),
    "transformers DETR": ("transformers", lambda: transformers_detr("Detr")),
    "transformers Table Transformer": (
        "transformers", lambda: transformers_detr("TableTransformer"),
    ),
    "transformers MaskFormer": ("transformers", transformers_maskformer),
    "open_clip": (
        "open_clip",
        lambda: importlib.import_module("open_clip.modified_resnet").ModifiedResNet(
            (1, 2, 1, 1), 64, 4, image_size=64, width=16
        ),
    ),
    "monai resnet18": (
        "monai",
        lambda: importlib.import_module("monai.networks.nets").resnet18(
            spatial_dims=2, n_input_channels=3, num_classes=10
        ),
    ),
    "monai resnet50": (
        "monai",
        lambda: importlib.import_module("monai.networks.nets").resnet50(
            spatial_dims=2, n_input_channels=3, num_classes=10
        ),
    ),
    "monai SEResNet50": (
        "monai",
        lambda: importlib.import_module("monai.networks.nets").SEResNet50(
            spatial_dims=2, in_channels=3, num_classes=10
        ),
    ),
    "fastai xresnet18": (
        "fastai",
        lambda: importlib.import_module("fastai.vision.models.xresnet").xresnet18(n_out=10),
    ),
    "monai DenseNet121": (
        "monai",
        lambda: importlib.import_module("monai.networks.nets").DenseNet121(
            spatial_dims=2, in_channels=3, out_channels=10
        ),
    ),
    "pytorchcv resnet20": ("pytorchcv", lambda: pytorchcv_model("resnet20_cifar10")),
    "pytorchcv seresnet20": ("pytorchcv", lambda: pytorchcv_model("seresnet20_cifar10")),
    "lightly": (
        "lightly",
        lambda: importlib.import_module("lightly.models").ResNetGenerator("resnet-18"),
    ),
    "pretrainedmodels": (
        "pretrainedmodels",
        lambda: importlib.import_module("pretrainedmodels").se_resnet50(pretrained=None).layer0,
    ),
    "segmentation_models_pytorch": (
        "segmentation_models_pytorch",
        lambda: importlib.import_module("segmentation_models_pytorch").Unet(
            "resnet18", encoder_weights=None
        ),
    ),
    "timm regnety_002": ("timm", lambda: timm_model("regnety_002")),
    "timm gernet_s": ("timm", lambda: timm_model("gernet_s")),
    "timm cspresnet50": ("timm", lambda: timm_model("cspresnet50")),
    "timm resnest14d": ("timm", lambda: timm_model("resnest14d")),
    "timm res2net50_26w_4s": ("timm", lambda: timm_model("res2net50_26w_4s")),
    "timm skresnet18": ("timm", lambda: timm_model("skresnet18")),
    "timm dla34": ("timm", lambda: timm_model("dla34")),
    "timm densenet121": ("timm", lambda: timm_model("densenet121")),
    "timm resnetv2_50": ("timm", lambda: timm_model("resnetv2_50")),
    "timm resnet18 features": ("timm", lambda: timm_model("resnet18", features_only=True)),
}  # fmt: skip


def timm_model(name, **arguments):
    timm = importlib.import_module("timm")
    return timm.create_model(name, **arguments)


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [t for one in values for t in tensors(one)] if not isinstance(value, (str, int)) else []


# Forward passes that take what is no image.
UNPROVEN = {
    "timm skresnet18": {"SelectiveKernelAttn"},
}


POOLED_NORMS = {"timm skresnet18", "timm resnest14d"}
SMALL_IMAGES = {"pytorchcv resnet20", "pytorchcv seresnet20", "lightly"}


@pytest.mark.whole_model
@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.single
def test_installed_libraries(name):
    """In evaluation and in training by the error rule; gradients in float64."""
    library, make = INSTALLED[name]
    pytest.importorskip(library)
    torch.manual_seed(1)
    eager = randomize_(make(), seed=2).eval()
    for module in eager.modules():
        for chance in ("p", "drop_prob", "dropout"):
            if isinstance(getattr(module, chance, None), float):
                setattr(module, chance, 0.0)
    fused = fused_resnet.fuse(copy.deepcopy(eager).eval())
    report = fused_resnet.report(fused)
    assert any(record.fused for record in report), report
    assert {text.partition(" ")[0] for text in report.unproven} == UNPROVEN.get(name, set())
    # Of two values a norm behind a global pool makes a sign.
    x = image_batch(2 + 6 * (name in POOLED_NORMS), 32 if name in SMALL_IMAGES else 64)
    exact = double_copy(eager)
    for training in (False, True):
        results = []
        for model, values in ((fused, x), (eager, x), (exact, x.double())):
            torch.manual_seed(3)
            with torch.no_grad():
                results.append([*tensors(model.train(training)(values)), *model.buffers()])
        for mine, its, reference in zip(*results, strict=True):
            if mine.is_floating_point():
                assert_error_rule(mine, its, reference)
    gradients = []
    for model in (fused_resnet.fuse(copy.deepcopy(exact).train()), exact):
        torch.manual_seed(3)
        sum((out * out).sum() for out in tensors(model(x.double())) if out.requires_grad).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    assert gradients[0]


@pytest.mark.quick
def test_recipes_name_no_class_twice():
    """A recipe that says the same of a class again would be tried again."""
    for recipes_of in recipes._by_name.values():
        assert len(set(recipes_of)) == len(recipes_of)


@pytest.mark.quick
def test_forms_of_structures_are_shared():
    """Two models of the same structure have the same classes."""
    one, other = (fused_resnet.fuse(build("fastai")) for _ in range(2))
    assert [*map(type, one.modules())] == [*map(type, other.modules())]
    assert forms.of_fused(type(one[3])) is forms.of_fused(type(other[3]))
