"""The CIFAR networks of the paper: their definition, and that fusing changes nothing."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import (
    assert_gradients_by_error_rule,
    assert_same_bits,
    double_copy,
    image_batch,
)
from torch import nn

import fused_resnet
from fused_resnet import blocks
from fused_resnet.models import cifar, cifar_resnet
from fused_resnet.testing import assert_error_rule, randomize_

pytestmark = pytest.mark.quick

# Depth, parameters, and what Table 6 of the paper says in millions.
SIZES = [
    (20, 269722, 0.27),
    (32, 464154, 0.46),
    (44, 658586, 0.66),
    (56, 853018, 0.85),
    (110, 1727962, 1.7),
    (1202, 19421274, 19.4),
]
VARIANTS = {
    "A": {"shortcut": "A"},
    "B": {"shortcut": "B"},
    "C": {"shortcut": "C"},
    "plain": {"plain": True},
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def make(variant, depth=8, **arguments):
    return randomize_(cifar_resnet(depth, **VARIANTS[variant], **arguments), seed=2)


@pytest.mark.parametrize(("depth", "expected", "table"), SIZES)
def test_parameter_counts(depth, expected, table):
    """Convolutions, two values a channel of each norm, and the last layer."""
    with torch.device("meta"):
        model = cifar_resnet(depth)
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2)
    for width in (32, 64):
        convolutions += 9 * (width // 2 * width + (2 * n - 1) * width**2)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert parameters(model) == expected == convolutions + norms + 65 * 10
    assert round(expected / 1e6, 2 if table < 1 else 1) == table
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_parameter_counts_of_the_options():
    """A projection has a weight for each pair of channels and two values a channel of its norm."""
    a, b, c, plain = (parameters(cifar_resnet(20, **v)) for v in VARIANTS.values())
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    others = 16 * 16 + 2 * 16 + 2 * sum(w * w + 2 * w for w in (16, 32, 64))
    assert (b, c, plain) == (a + projections, a + projections + others, a)


@pytest.mark.parametrize("depth", [2, 7, 18, 51, -4])
def test_other_depths(depth):
    with pytest.raises(ValueError, match=rf"depth is {depth}, must be 6n \+ 2"):
        cifar_resnet(depth)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"depth is 20\.0, must be an int"):
        cifar_resnet(20.0)
    with pytest.raises(ValueError, match="shortcut is 'D', must be one of A, B, C"):
        cifar_resnet(20, shortcut="D")
    with pytest.raises(ValueError, match="out_channels is 33, must be in_channels, 16, and"):
        cifar.PaddedShortcut(16, 33, 2)


def test_shapes_of_the_stages():
    """32 x 32 with 16 channels, 16 x 16 with 32, 8 x 8 with 64, as the paper's table says."""
    model = make("A", num_classes=7).eval()
    x = model.relu(model.bn1(model.conv1(image_batch(2, 32))))
    shapes = [tuple(x.shape[1:])]
    for stage in (model.layer1, model.layer2, model.layer3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert model(image_batch(2, 32)).shape == (2, 7)
    assert make("A", in_channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_option_a_keeps_every_second_pixel():
    x = torch.randn(2, 4, 5, 6)
    out = cifar.PaddedShortcut(4, 10, 2)(x)
    assert out.shape == (2, 10, 3, 3)
    for k in range(10):
        expected = x[:, k - 3, ::2, ::2] if 3 <= k < 7 else torch.zeros(2, 3, 3)
        assert_same_bits(out[:, k], expected)


def test_which_blocks_have_which_shortcut():
    """Option A where the shape changes, B a projection there, C everywhere, plain nowhere."""
    kinds = {}
    for name, arguments in VARIANTS.items():
        model = cifar_resnet(14, **arguments)
        kinds[name] = [
            type(getattr(block, "downsample", None)).__name__
            for stage in (model.layer1, model.layer2, model.layer3)
            for block in stage
        ]
    none, pad, projection = "NoneType", "PaddedShortcut", "Sequential"
    assert kinds == {
        "A": [none, none, pad, none, pad, none],
        "B": [none, none, projection, none, projection, none],
        "C": [projection] * 6,
        "plain": [none] * 6,
    }
    assert not any(isinstance(m, cifar.PlainBlock) for m in cifar_resnet(14).modules())
    plain = cifar_resnet(14, plain=True)
    assert sum(isinstance(m, cifar.PlainBlock) for m in plain.modules()) == 6


def test_initialisation():
    """Variance 2 / fan_in, which the last stage's 36864 weights show to a few percent."""
    model = cifar_resnet(20)
    weight = model.layer3[1].conv1.weight
    assert abs(weight.var().item() * (64 * 9) / 2 - 1) < 0.05
    assert abs(weight.mean().item()) < 4 * (2 / (64 * 9) / weight.numel()) ** 0.5
    assert not model.fc.bias.any()
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_by_the_error_rule(variant):
    eager = make(variant, 14).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image_batch(3, 17).contiguous(memory_format=memory_format)
        with torch.no_grad():
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_float64(variant, training):
    eager = make(variant).double().train(training)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    results = []
    for model in (eager, fused):
        x = image_batch(3, 12, torch.float64).requires_grad_()
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["A", "plain"])
def test_training_by_the_error_rule(variant):
    eager = make(variant).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert_gradients_by_error_rule(fused, eager, image_batch(8, 16))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse_and_unfuse(variant):
    model = make(variant).eval()
    types = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    fused_resnet.fuse(model)
    block = blocks.PlainBlock if variant == "plain" else blocks.BasicBlock
    assert type(model) is blocks.CifarResNet
    assert [type(b) for stage in (model.layer1, model.layer2, model.layer3) for b in stage] == [
        block
    ] * 3
    assert list(model.state_dict()) == keys
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is blocks.CifarResNet
    x = image_batch(2, 16)
    with torch.no_grad():
        assert_same_bits(again(x), model(x))
        assert_same_bits(torch.jit.script(model)(x), torch.jit.script(copy.deepcopy(model))(x))
    fused_resnet.unfuse(model)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_report(variant):
    model = make(variant).eval()
    assert not any(record.fused for record in fused_resnet.report(model))
    report = fused_resnet.report(fused_resnet.fuse(model))
    kinds = ["stem"] + ["PlainBlock" if variant == "plain" else "BasicBlock"] * 3
    assert [record.kind for record in report] == kinds
    assert all(record.fused for record in report)


def test_hooks_keep_a_block_from_fusing():
    model = fused_resnet.fuse(make("plain")).eval()
    seen = []
    model.layer1[0].bn2.register_forward_hook(lambda *_: seen.append("norm"))
    model.conv1.register_forward_hook(lambda *_: seen.append("stem"))
    with torch.no_grad():
        model(image_batch(1, 16))
    assert seen == ["stem", "norm"]
    reasons = {r.path: r.reason for r in fused_resnet.report(model) if not r.fused}
    assert reasons == {"": "conv1 carries hooks", "layer1.0": "bn2 carries hooks"}


@pytest.mark.parametrize("variant", ["A", "plain"])
def test_no_graph_breaks(variant):
    model = fused_resnet.fuse(make(variant)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = image_batch(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_network_by_hand():
    """Option A's network written down with functions, from the paper's text."""
    model = make("A", 14).double().eval()
    x = image_batch(2, 12, torch.float64)

    def conv_bn(conv, norm, x):
        x = F.conv2d(x, conv.weight, None, conv.stride, 1)
        x = (x - norm.running_mean[:, None, None]) / (
            norm.running_var[:, None, None] + norm.eps
        ).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    h = conv_bn(model.conv1, model.bn1, x).relu()
    for index, stage in enumerate((model.layer1, model.layer2, model.layer3)):
        for number, block in enumerate(stage):
            inner = conv_bn(block.conv1, block.bn1, h).relu()
            shortcut = h
            if index > 0 and number == 0:
                zeros = torch.zeros_like(h[:, : h.size(1) // 2, ::2, ::2])
                shortcut = torch.cat([zeros, h[:, :, ::2, ::2], zeros], 1)
            h = (conv_bn(block.conv2, block.bn2, inner) + shortcut).relu()
    expected = F.linear(h.mean((2, 3)), model.fc.weight, model.fc.bias)
    for network in (model, fused_resnet.fuse(model)):
        with torch.no_grad():
            torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)
