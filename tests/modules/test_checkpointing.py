"""`torch.utils.checkpoint`: the buffers and gradients that unfused modules have.

A norm counts a batch, and moves its running statistics, each time its forward pass runs: once, and
once more for each time that a checkpointed region around it is computed again, as far as that goes.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torchvision.models.resnet as torchvision_resnet
from torch import nn
from torch.utils.checkpoint import (
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from fused_resnet import functional, fuse, report
from fused_resnet.models import cifar_resnet

MODES = {
    "reentrant": {"use_reentrant": True},
    "early stop": {"use_reentrant": False},
    "no early stop": {"use_reentrant": False, "early_stop": False},
    "unchecked": {"use_reentrant": False, "determinism_check": "none"},
    "debug": {"use_reentrant": False, "debug": True},
    "selective": {
        "use_reentrant": False,
        "context_fn": functools.partial(
            create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default]
        ),
    },
}


def _begin(model, x):
    x = model.relu(model.bn1(model.conv1(x)))
    return model.maxpool(x) if hasattr(model, "maxpool") else x


def _stages(model):
    return [child for child in model.children() if isinstance(child, nn.Sequential)]


def _end(model, x):
    return model.fc(torch.flatten(model.avgpool(x), 1))


def whole_model(model, x, around, mode):
    return around(model, x)


def each_stage(model, x, around, mode):
    x = _begin(model, x)
    for stage in _stages(model):
        x = around(stage, x)
    return _end(model, x)


def each_block(model, x, around, mode):
    x = _begin(model, x)
    for stage in _stages(model):
        for block in stage:
            x = around(block, x)
    return _end(model, x)


def nested(model, x, around, mode):
    first, second, *others = _stages(model)

    def inner(x):
        return around(second, around(first, _begin(model, x)))

    x = around(inner, x)
    for stage in others:
        x = stage(x)
    return _end(model, x)


def sequential(model, x, around, mode):
    stages = nn.Sequential(*(block for stage in _stages(model) for block in stage))
    x = checkpoint_sequential(stages, 2, _begin(model, x), use_reentrant=mode["use_reentrant"])
    return _end(model, x)


REGIONS = [whole_model, each_stage, each_block, nested, sequential]


def _train(model, region, mode, steps=2, autocast=False):
    """Buffers and gradients after some steps of training without an optimizer."""
    mode = dict(mode)
    early_stop = mode.pop("early_stop", True)
    around = functools.partial(checkpoint, **mode)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(4, 3, 17, 17, generator=generator).requires_grad_()
        autocasting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with autocasting, set_checkpoint_early_stop(early_stop):
            out = region(model, x, around, mode)
        out.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {"input": x.grad}
    return {name: b.clone() for name, b in model.named_buffers()}, gradients


def _assert_same(actual, expected, tolerance=1e-4):
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        if wanted.is_floating_point():
            scale = wanted.abs().max().item()
            torch.testing.assert_close(actual[name], wanted, rtol=0, atol=tolerance * scale)
        else:
            assert torch.equal(actual[name], wanted), f"{name}: {actual[name]}, not {wanted}"


def _models(make):
    torch.manual_seed(0)
    eager = make().train()
    return eager, fuse(copy.deepcopy(eager))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "debug"])  # which is slow
@pytest.mark.parametrize("region", REGIONS, ids=lambda region: region.__name__)
def test_buffers_and_gradients(region, mode):
    """Of every region, in every mode: counts to the bit, all else up to rounding."""
    eager, fused = _models(lambda: cifar_resnet(8))
    buffers, gradients = _train(eager, region, MODES[mode])
    fused_buffers, fused_gradients = _train(fused, region, MODES[mode])
    _assert_same(fused_buffers, buffers)
    _assert_same(fused_gradients, gradients, 1e-3)


def _bottlenecks():
    model = torchvision_resnet.ResNet(torchvision_resnet.Bottleneck, [1, 1, 1, 1], num_classes=3)
    model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(512, 3)
    return model


@pytest.mark.parametrize("memory", ["normal", "low"])
@pytest.mark.parametrize("mode", ["reentrant", "early stop", "no early stop"])
@pytest.mark.parametrize("region", [whole_model, each_stage], ids=["whole_model", "each_stage"])
def test_projections_and_a_pooled_stem(region, mode, memory):
    """What has a node of its own in the graph: the stem with its pooling, projections."""
    eager, fused = _models(_bottlenecks)
    buffers, _ = _train(eager, region, MODES[mode], 1)
    fused_buffers, _ = _train(fuse(fused, memory=memory), region, MODES[mode], 1)
    _assert_same(fused_buffers, buffers)


@pytest.mark.parametrize("mode", ["reentrant", "early stop", "no early stop"])
def test_under_autocast(mode):
    """Operators then go through the dispatcher; values differ by bfloat16's rounding."""
    eager, fused = _models(lambda: cifar_resnet(8, shortcut="B"))
    buffers, _ = _train(eager, each_block, MODES[mode], autocast=True)
    fused_buffers, _ = _train(fused, each_block, MODES[mode], autocast=True)
    _assert_same(fused_buffers, buffers, 0.02)


class Wrapped(nn.Module):
    """A block, which has a norm or a dropped path that keeps it from being one node."""

    def __init__(self, change):
        super().__init__()
        self.block = torchvision_resnet.BasicBlock(8, 8)
        change(self.block)

    def forward(self, x):
        return self.block(x[:, :1].expand(-1, 8, -1, -1))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.bn2.eval(),
        lambda block: block.bn1.requires_grad_(False).eval(),
        lambda block: setattr(block.bn1, "momentum", None),
        lambda block: block.requires_grad_(False),
        lambda block: setattr(block.bn2, "track_running_stats", False),
    ],
    ids=["last frozen", "first frozen", "cumulative", "no gradients", "not tracked"],
)
def test_blocks_of_several_nodes(change, autocast):
    """Where each norm is a node, the last thing saved is saved by one of them."""
    eager, fused = _models(lambda: Wrapped(lambda block: None))
    for model in (eager, fused):
        change(model.block)
    for mode in ("early stop", "no early stop"):
        buffers, _ = _train(eager, whole_model, MODES[mode], autocast=autocast)
        fused_buffers, _ = _train(fused, whole_model, MODES[mode], autocast=autocast)
        _assert_same(fused_buffers, buffers, 0.02 if autocast else 1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_function(mode, autocast):
    """`functional.batch_norm_act` as the last thing in a region."""

    def eager(x, mean, var):
        return torch.nn.functional.batch_norm(x, mean, var, training=True).relu()

    def fused(x, mean, var):
        return functional.batch_norm_act(x, mean, var, training=True)

    x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(0)) + 1
    results = []
    options = dict(MODES[mode])
    early_stop = options.pop("early_stop", True)
    for function in (eager, fused):
        statistics = torch.zeros(6), torch.ones(6)
        region = functools.partial(function, mean=statistics[0], var=statistics[1])
        leaf = x.clone().requires_grad_()
        autocasting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
        with autocasting, set_checkpoint_early_stop(early_stop):
            out = checkpoint(region, leaf, **options)
        out.square().sum().backward()
        results.append({"mean": statistics[0], "var": statistics[1], "grad": leaf.grad})
    # Twice a tenth of the way to the batch's.
    torch.testing.assert_close(results[0]["mean"], 0.19 * x.mean((0, 2, 3)))
    _assert_same(*reversed(results))


def test_timm():
    """`set_grad_checkpointing`, which puts each stage's blocks into one region."""
    resnet = pytest.importorskip("timm.models.resnet")
    eager, fused = _models(lambda: resnet.ResNet(resnet.BasicBlock, (1, 1, 1, 1), num_classes=3))
    for model in (eager, fused):
        model.set_grad_checkpointing()
    buffers, gradients = _train(eager, lambda model, x, *_: model(x), MODES["early stop"])
    fused_buffers, fused_gradients = _train(
        fused, lambda model, x, *_: model(x), MODES["early stop"]
    )
    assert buffers["layer1.0.bn1.num_batches_tracked"] == 4
    _assert_same(fused_buffers, buffers)
    _assert_same(fused_gradients, gradients, 1e-3)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.single
def test_compiled(inside):
    """A compiled region, and a compiled function that has one."""
    eager, fused = _models(lambda: cifar_resnet(8, shortcut="B"))

    def region(model, x, around, mode):
        if inside:
            run = torch.compile(model, backend="aot_eager")
            return around(run, x)
        run = lambda x: around(model, x)  # noqa: E731
        return torch.compile(run, backend="aot_eager")(x)

    results = []
    for model in (eager, fused):
        torch._dynamo.reset()
        results.append(_train(model, region, MODES["early stop"], 1))
    assert all(record.fused for record in report(fused))
    _assert_same(results[1][0], results[0][0])
    _assert_same(results[1][1], results[0][1], 1e-3)
