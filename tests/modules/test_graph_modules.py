"""`torch.fx` graphs: units where nothing else reads what is between, and what keeps them apart."""

from __future__ import annotations

import copy
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
    small_resnet,
)
from torch import fx, nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

import fused_resnet
from fused_resnet import forms
from fused_resnet.modules import traced as traced_modules
from fused_resnet.testing import assert_error_rule, randomize_


class Net(nn.Module):
    """Two convolutions with norms, and a forward pass that is given."""

    def __init__(self, run):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.relu, self.relu_ = nn.ReLU(), nn.ReLU(inplace=True)
        self.pool, self.dropout = nn.MaxPool2d(3, 2, 1), nn.Dropout(0.5)
        self.silu, self.mish = nn.SiLU(), nn.Mish()
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def first(m, x):
    return m.relu(m.bn1(m.conv1(x)))


def changed(x):
    x.add_(1)
    return x


# What is called, with how many units, adds and activations in one.
RUNS = {
    "a unit": (first, (1, 0, 1)),
    "without activation": (lambda m, x: m.bn1(m.conv1(x)), (1, 0, 0)),
    "F.relu": (lambda m, x: F.relu(m.bn1(m.conv1(x))), (1, 0, 1)),
    "F.relu in place": (lambda m, x: F.relu(m.bn1(m.conv1(x)), inplace=True), (1, 0, 1)),
    "torch.relu": (lambda m, x: torch.relu(m.bn1(m.conv1(x))), (1, 0, 1)),
    "relu()": (lambda m, x: m.bn1(m.conv1(x)).relu(), (1, 0, 1)),
    "F.silu": (lambda m, x: F.silu(m.bn1(m.conv1(x))), (1, 0, 1)),
    "F.silu in place": (lambda m, x: F.silu(m.bn1(m.conv1(x)), inplace=True), (1, 0, 1)),
    "F.hardswish": (lambda m, x: F.hardswish(m.bn1(m.conv1(x)), True), (1, 0, 1)),
    "F.relu6": (lambda m, x: F.relu6(m.bn1(m.conv1(x))), (1, 0, 1)),
    "F.hardtanh": (lambda m, x: F.hardtanh(m.bn1(m.conv1(x))), (1, 0, 1)),
    "F.hardtanh with limits": (
        lambda m, x: F.hardtanh(m.bn1(m.conv1(x)), -0.25, max_val=0.75),
        (1, 0, 1),
    ),
    "F.leaky_relu": (lambda m, x: F.leaky_relu(m.bn1(m.conv1(x))), (1, 0, 1)),
    "F.leaky_relu with a slope": (lambda m, x: F.leaky_relu(m.bn1(m.conv1(x)), 0.3), (1, 0, 1)),
    "F.gelu": (lambda m, x: F.gelu(m.bn1(m.conv1(x))), (1, 0, 1)),
    "F.gelu of tanh": (lambda m, x: F.gelu(m.bn1(m.conv1(x)), approximate="tanh"), (1, 0, 1)),
    "F.silu behind a residual": (
        lambda m, x: (y := first(m, x), F.silu(m.bn2(m.conv2(y)) + y))[1],
        (2, 1, 2),
    ),
    "F.silu and max-pool": (lambda m, x: m.pool(F.silu(m.bn1(m.conv1(x)))), (1, 0, 1)),
    "F.softplus": (lambda m, x: F.softplus(m.bn1(m.conv1(x))), (1, 0, 0)),
    "a slope that is computed": (
        lambda m, x: F.leaky_relu(m.bn1(m.conv1(x)), x.shape[3] / 100),
        (1, 0, 0),
    ),
    "another activation": (lambda m, x: m.silu(m.bn1(m.conv1(x))), (1, 0, 1)),
    "an activation that no kernel has": (lambda m, x: m.mish(m.bn1(m.conv1(x))), (1, 0, 0)),
    "max-pool": (lambda m, x: m.pool(m.relu_(m.bn1(m.conv1(x)))), (1, 0, 1)),
    "residual": (lambda m, x: (y := first(m, x), m.relu(m.bn2(m.conv2(y)) + y))[1], (2, 1, 2)),
    "residual first": (
        lambda m, x: (y := first(m, x), m.relu(torch.add(y, m.bn2(m.conv2(y)))))[1],
        (2, 1, 2),
    ),
    "residual without ReLU": (
        lambda m, x: (y := first(m, x), m.bn2(m.conv2(y)) + y)[1],
        (2, 1, 1),
    ),
    "the convolution is read twice": (
        lambda m, x: (y := m.conv1(x), m.relu(m.bn1(y)) + y)[1],
        (0, 0, 0),
    ),
    "the norm is read twice": (
        lambda m, x: (y := m.bn1(m.conv1(x)), m.relu(y) + y)[1],
        (1, 0, 0),
    ),
    "added twice": (lambda m, x: (y := m.bn1(m.conv1(x)), m.relu(y + y))[1], (1, 0, 0)),
    "a number is added": (lambda m, x: m.relu(m.bn1(m.conv1(x)) + 1), (1, 0, 0)),
    "with a factor": (
        lambda m, x: (y := first(m, x), torch.add(m.bn2(m.conv2(y)), y, alpha=2))[1],
        (2, 0, 1),
    ),
    "the input is written to in between": (
        lambda m, x: (y := m.conv1(x), z := changed(x), m.bn1(y).sum() + z.sum())[2],
        (0, 0, 0),
    ),
    "the input is rectified in place in between": (
        lambda m, x: (y := m.conv1(x), z := m.relu_(x), m.bn1(y).sum() + z.sum())[2],
        (0, 0, 0),
    ),
    "a norm of other channels": (lambda m, x: m.bn2(m.conv1(x)), (1, 0, 0)),
}


def traced(run):
    torch.manual_seed(0)
    return fx.symbolic_trace(randomize_(Net(run))).eval()


@pytest.mark.quick
@pytest.mark.parametrize("name", RUNS)
def test_units(name):
    run, (units, adds, relus) = RUNS[name]
    eager = traced(run)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    found = traced_modules.find(eager.graph, eager)
    assert len(found) == units
    assert sum(one.residual is not None for one in found) == adds
    assert sum(one.unit.act is not None for one in found) == relus
    assert (forms.of_fused(type(fused)) is not None) == (units > 0)
    x = image_batch(2, 16)
    with torch.no_grad():
        expected = eager(x.clone())
        assert_error_rule(fused(x.clone()), expected, double_copy(eager)(x.double()))
        assert_same_bits(fused_resnet.unfuse(fused)(x.clone()), expected)
    # Of the latter the bias's gradient, which is rounding alone, is larger than eager's by chance.
    if name not in ("added twice", "F.gelu of tanh"):
        fused_resnet.fuse(fused)
        x = image_batch(4, 16)
        if "in between" not in name:
            assert_gradients_by_error_rule(fused.train(), eager.train(), x)


@pytest.mark.parametrize("name", ["F.silu", "F.leaky_relu with a slope", "F.gelu of tanh"])
def test_functions_are_fused_as_modules(name):
    """The same bits as those of a module with the same numbers."""
    acts = {
        "F.silu": nn.SiLU(),
        "F.leaky_relu with a slope": nn.LeakyReLU(0.3),
        "F.gelu of tanh": nn.GELU("tanh"),
    }
    of_function = fused_resnet.fuse(traced(RUNS[name][0]))
    of_module = traced(lambda m, x: m.silu(m.bn1(m.conv1(x))))
    of_module.silu = acts[name]
    of_module = fused_resnet.fuse(of_module)
    assert all(record.fused for record in fused_resnet.report(of_function))
    x = image_batch(2, 16)
    with torch.no_grad():
        assert_same_bits(of_function(x), of_module(x))


def extractor(name, nodes):
    model = randomize_(getattr(torchvision.models, name)(num_classes=10), seed=1)
    return create_feature_extractor(model, nodes).eval()


@pytest.mark.parametrize(
    ("name", "nodes", "convolutions"),
    [
        ("resnet18", {"layer2": "a", "layer4": "b"}, 20),
        pytest.param("resnet50", ["layer4"], 53, marks=pytest.mark.whole),
        ("regnet_y_400mf", ["trunk_output"], 53),
    ],
)
def test_feature_extractors(name, nodes, convolutions):
    eager = extractor(name, nodes)
    # A copy of such a module is in training mode.
    fused = fused_resnet.fuse(copy.deepcopy(eager).eval())
    records = fused_resnet.report(fused)
    assert all(record.fused for record in records)
    # Torchvision's tracer calls its own layer classes as modules, which are fused by themselves.
    form = forms.of_fused(type(fused))
    in_graph = 0 if form is None else len(form.units_of(fused))
    others = [record for record in records if record.path]
    assert in_graph + len(others) == convolutions
    x = image_batch(2, 64)
    with torch.no_grad():
        results = [m(v) for m, v in ((fused, x), (eager, x), (double_copy(eager), x.double()))]
    for key, mine in results[0].items():
        assert_error_rule(mine, results[1][key], results[2][key], what=key)


def test_training():
    eager = fx.symbolic_trace(small_resnet(stages=2)).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert_gradients_by_error_rule(copy.deepcopy(fused), copy.deepcopy(eager), image_batch(4, 64))
    x = image_batch(4, 64)
    exact = double_copy(eager)
    for model, values in ((eager, x), (fused, x), (exact, x.double())):
        model(values)
    for (key, mine), its, reference in zip(
        fused.named_buffers(), eager.buffers(), exact.buffers(), strict=True
    ):
        if mine.is_floating_point():
            assert_error_rule(mine, its, reference, what=key)


def test_copies_and_pickles():
    model = fused_resnet.fuse(fx.symbolic_trace(small_resnet(stages=2)).eval())
    x = image_batch(2, 32)
    with torch.no_grad():
        expected = model(x)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert forms.of_fused(type(other)) is not None
            assert_same_bits(other(x), expected)
        assert forms.of_fused(type(model)) is not None
        assert_same_bits(model(x), expected)


def to_silu(model):
    (relu,) = [node for node in model.graph.nodes if node.target == "relu"]
    relu.op, relu.target = "call_function", F.silu


def test_a_changed_graph():
    """After `recompile` the graph is another, and fused again; without it, it is not looked at."""
    model = fused_resnet.fuse(traced(first))
    to_silu(model)
    x = image_batch(1, 8)
    with torch.no_grad():
        before = model(x)
        assert (before >= 0).all()
        model.recompile()
        after = model(x)
        expected = F.silu(model.bn1(model.conv1(x)))
    torch.testing.assert_close(after, expected)
    assert forms.of_fused(type(model)) is not None


def test_a_graph_that_is_not_what_runs():
    model = traced(first)
    to_silu(model)
    assert type(fused_resnet.fuse(model)) is type(model)
    assert forms.of_fused(type(model)) is None


def test_a_hook_keeps_one_unit():
    model = fused_resnet.fuse(fx.symbolic_trace(small_resnet(stages=2)).eval())
    seen = []
    model.get_submodule("layer1.0.conv2").register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        model(image_batch(1, 32))
    assert seen == [1]
    (record,) = fused_resnet.report(model)
    assert record.fused
    assert record.reason == "layer1.0.conv2 carries hooks"


@pytest.mark.parametrize("residual", ["wider", "another dtype", "broadcast"])
def test_residuals_that_do_not_fit(residual):
    """What eager PyTorch promotes or broadcasts is added by eager PyTorch."""

    class Add(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x, y):
            return self.relu(self.bn(self.conv(x)) + y)

    eager = fx.symbolic_trace(randomize_(Add()).eval())
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 8)
    y = {
        "wider": torch.randn(3, 2, 8, 8, 8),
        "another dtype": torch.randn(2, 8, 8, 8, dtype=torch.float64),
        "broadcast": torch.randn(8, 1, 1),
    }[residual]
    with torch.no_grad():
        expected = eager(x, y)
        found = fused(x, y)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected)


def test_autocast():
    eager = fx.symbolic_trace(small_resnet(stages=2)).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine, its = fused(x), eager(x)
    assert_error_rule(mine, its, double_copy(eager)(x.double()))


def test_intermediate_layers():
    """A backbone whose stem somebody took apart."""
    model = randomize_(torchvision.models.resnet18(num_classes=10))
    eager = IntermediateLayerGetter(model, {"layer1": "a", "layer2": "b"}).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    records = fused_resnet.report(fused)
    assert records[0].kind == "IntermediateLayerGetter"
    assert all(record.fused for record in records)
    x = image_batch(2, 64)
    with torch.no_grad():
        results = [m(v) for m, v in ((fused, x), (eager, x), (double_copy(eager), x.double()))]
    for key, mine in results[0].items():
        assert_error_rule(mine, results[1][key], results[2][key], what=key)
    fused.return_layers = {"layer1": "a"}
    assert "attributes" in fused_resnet.report(fused)[0].reason
    with torch.no_grad():
        assert list(fused(x)) == ["a"]
