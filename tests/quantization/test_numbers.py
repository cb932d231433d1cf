"""Quantized blocks against integers worked out in NumPy, and blocks joined against single ones."""

import copy
import itertools

import numpy as np
import pytest
import torch
from support import assert_same_bits
from torch import nn
from torchvision.models import resnet

import fused_resnet
from fused_resnet import backends
from fused_resnet.models import cifar_resnet
from fused_resnet.modules import quantized
from fused_resnet.testing import randomize_, relative_error

pytestmark = pytest.mark.quick


def projection(channels, out, stride):
    return nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))


BLOCKS = {
    "basic": lambda: resnet.BasicBlock(6, 6),
    "basic, projection": lambda: resnet.BasicBlock(6, 8, 2, projection(6, 8, 2)),
    "bottleneck": lambda: resnet.Bottleneck(12, 3),
    "bottleneck, projection, groups": lambda: resnet.Bottleneck(
        12, 4, 2, projection(12, 16, 2), groups=2, base_width=64
    ),
    "bottleneck, dilation": lambda: resnet.Bottleneck(12, 3, dilation=2),
}


def make_block(name, seed=0):
    torch.manual_seed(seed)
    block = nn.Sequential(BLOCKS[name]())  # so that its norms are known as a branch's
    return randomize_(block, seed)[0].eval()


def channels_of(block):
    return block.conv1.in_channels


def steps_of(values, stored):
    """What a float32 array is stored as: NumPy's own rounding and clipping."""
    step, zero_point = stored
    inverse = np.float32(1 / step)
    return np.clip(np.rint(values * inverse), -zero_point, 255 - zero_point).astype(np.int64)


def integer_conv(values, weight, conv):
    """`conv2d` of integers, one product at a time of the filter's places."""
    N, _, H, W = values.shape
    K, group_c, R, S = weight.shape
    (p, q), (s, t), (d, e) = conv.padding, conv.stride, conv.dilation
    padded = np.pad(values, ((0, 0), (0, 0), (p, p), (q, q)))
    P = (H + 2 * p - d * (R - 1) - 1) // s + 1
    Q = (W + 2 * q - e * (S - 1) - 1) // t + 1
    out = np.zeros((N, K, P, Q), np.int64)
    group_k = K // conv.groups
    for k in range(K):
        first = k // group_k * group_c
        for r in range(R):
            for c in range(S):
                rows = slice(r * d, r * d + (P - 1) * s + 1, s)
                columns = slice(c * e, c * e + (Q - 1) * t + 1, t)
                taken = padded[:, first : first + group_c, rows, columns]
                out[:, k] += (taken * weight[k, :, r, c].reshape(1, -1, 1, 1)).sum(1)
    return out


def folded(conv, norm, step_in, step_out):
    """Integer weights, and scale and shift as float64."""
    weight = conv.weight.detach().numpy().astype(np.float64)
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    steps = largest / 127
    integers = np.rint(weight / steps.reshape(-1, 1, 1, 1)).astype(np.int64)
    mean, var, gamma, beta = (
        t.detach().numpy().astype(np.float64)
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = gamma / np.sqrt(var + norm.eps)
    shift = beta - mean * scale
    return integers, steps * scale * step_in / step_out, shift / step_out


def by_hand(block, x, ranges):
    """The block's output as float32, from the definition in docs/quantization.md."""
    f32 = np.float32
    column = lambda vector: vector.astype(f32).reshape(1, -1, 1, 1)  # noqa: E731
    values = first = steps_of(x.numpy().astype(f32), ranges[0])
    names = [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
    for index, i in enumerate(names):
        conv, norm = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
        step_in, step_out = ranges[index][0], ranges[index + 1][0]
        weight, scale, shift = folded(conv, norm, step_in, step_out)
        sums = integer_conv(values, weight, conv).astype(f32) * column(scale)
        if i != names[-1]:
            values = np.clip(np.rint(sums + column(shift)), 0, 255).astype(np.int64)
            continue
        if block.downsample is None:
            shortcut = first.astype(f32) * f32(ranges[0][0] / step_out)
        else:
            weight, scale, more = folded(*block.downsample, ranges[0][0], step_out)
            shortcut = integer_conv(first, weight, block.downsample[0]).astype(f32) * column(scale)
            shift = shift + more
        total = sums + column(shift) + shortcut
        return np.clip(np.rint(total), 0, 255).astype(np.int64).astype(f32) * f32(step_out)


@pytest.mark.interpreted
@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_what_the_integers_say(backend, name, observer):
    block = make_block(name)
    x = torch.randn(3, channels_of(block), 7, 6)
    fused_resnet.quantize(block, [x[:2], x[2:]], observer=observer)
    (state,) = fused_resnet.quantization_state(block)["blocks"].values()
    assert state["ranges"][0][1] > 0  # the input has both signs
    with torch.no_grad():
        out = block(x.to(backend.device)) if backend.device == "cpu" else block.cuda()(x.cuda())
    expected = torch.from_numpy(by_hand(block.cpu(), x, state["ranges"]))
    assert_same_bits(out.cpu(), expected)
    assert 0 < (expected > 0).float().mean() < 1


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_close_to_float64(name):
    """Within the noise of rounding activations and weights to one in 255 of their range."""
    block = make_block(name)
    x = torch.randn(16, channels_of(block), 9, 9)
    with torch.no_grad():
        expected = copy.deepcopy(block).double()(x.double())
        fused_resnet.quantize(block, [x])
        error = relative_error(block(x), expected)
    assert 1e-4 < error < 0.03
    (record,) = fused_resnet.report(block)
    assert record.sqnr_db == pytest.approx(-20 * np.log10(error), abs=0.5)


def network(shortcut="B", depth=14, seed=1):
    torch.manual_seed(seed)
    model = randomize_(cifar_resnet(depth, shortcut=shortcut, in_channels=1), seed)
    return model.eval()


def calls_of(monkeypatch):
    calls = []
    run = quantized.residual_blocks_int8

    def counted(x, blocks, ranges):
        calls.append(len(blocks))
        return run(x, blocks, ranges)

    monkeypatch.setattr(quantized, "residual_blocks_int8", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_joined_blocks_give_the_bits_of_single_ones(monkeypatch, dtype):
    """In bfloat16, whose eight bits do not hold all steps, they are as near as its numbers are."""
    model = network().to(dtype)
    x = torch.randn(2, 1, 12, 12).to(dtype)
    fused_resnet.quantize(model, [x, 2 * x])
    calls = calls_of(monkeypatch)
    seen = []
    model.avgpool.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0]))
    with torch.no_grad():
        model(x)
        assert calls == [6]
        calls.clear()
        model.layer2[1].register_forward_hook(lambda module, inputs, out: None)
        model(x)
        assert calls == [3, 1, 2]  # a block with a hook is called by itself
        calls.clear()
        for block in (block for layer in (1, 2, 3) for block in getattr(model, f"layer{layer}")):
            block.register_forward_pre_hook(lambda module, inputs: None)
        model(x)
        assert calls == [1] * 6
    joined, *others = seen
    assert joined.dtype == dtype
    for other in others:
        if dtype is torch.bfloat16:
            assert relative_error(other, joined) < 2**-8
        else:
            assert_same_bits(other, joined)


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
def test_padded_shortcuts_stay_in_float(monkeypatch, shortcut):
    model = network(shortcut)
    x = torch.randn(2, 1, 12, 12)
    fused_resnet.quantize(model, [x])
    calls = calls_of(monkeypatch)
    with torch.no_grad():
        model(x)
    assert calls == ([2, 1, 1] if shortcut == "A" else [6])
    report = {record.path: record for record in fused_resnet.report(model)}
    padded = [
        path for path, record in report.items() if "downsample pads channels" in record.reason
    ]
    assert padded == (["layer2.0", "layer3.0"] if shortcut == "A" else [])
    for path, record in report.items():
        expected = "int16" if path == "" else "float32" if path in padded else "int8"
        assert record.precision == expected


def test_neighbours_share_the_range_between_them():
    model = network()
    fused_resnet.quantize(model, [torch.randn(2, 1, 12, 12)])
    blocks = list(fused_resnet.quantization_state(model)["blocks"].values())
    assert len(blocks) == 6
    for before, after in itertools.pairwise(blocks):
        assert before["ranges"][-1] == after["ranges"][0]
    assert len({tuple(block["ranges"][0]) for block in blocks}) == 6
    assert all(zero == 0 for block in blocks for _, zero in block["ranges"])


def test_a_tensor_changed_in_between_has_a_range_of_its_own():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = make_block("basic", 1), make_block("basic", 2)

        def forward(self, x):
            return self.second(self.first(x).mul_(0.5))

    model = Halved().eval()
    fused_resnet.quantize(model, [torch.randn(4, 6, 5, 5)])
    first, second = fused_resnet.quantization_state(model)["blocks"].values()
    assert second["ranges"][0][0] == pytest.approx(first["ranges"][-1][0] / 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layouts_and_batch_sizes(layout):
    """Images do not touch each other: a batch is its images, in any layout; none is none."""
    model = network()
    x = torch.randn(5, 1, 12, 12)
    fused_resnet.quantize(model, [x])
    h = torch.randn(5, 16, 12, 12).relu()
    with torch.no_grad():
        expected = torch.cat([model.layer1[0](image) for image in h.split(1)])
        given = h.contiguous(memory_format=layout)
        out = model.layer1[0](given)
        assert_same_bits(out.contiguous(), expected)
        assert out.is_contiguous(memory_format=layout)
        assert model.layer1(h[:0]).shape == (0, 16, 12, 12)
        assert model(x[:0]).shape == (0, 10)


def test_autocast():
    """Under autocast a block reads and returns 16 bits, its weights quantized from float32."""
    model = network()
    x = torch.randn(4, 1, 12, 12)
    fused_resnet.quantize(model, [x])
    h = torch.randn(4, 16, 12, 12).relu()
    with torch.no_grad():
        plain = model(x)
        expected = model.layer1[1](h.bfloat16().float()).bfloat16()
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(model.layer1[1](h), expected)
            out = model(x)
    assert relative_error(out, plain) < 0.03


def test_compiled_and_exported_graphs_hold_one_operator():
    model = network()
    x = torch.randn(2, 1, 12, 12)
    fused_resnet.quantize(model, [x])
    model.fc = nn.Identity()  # outside of graphs the pool and the linear layer round as one
    operator = torch.ops.fused_resnet.residual_blocks_int8.default
    with torch.no_grad():
        expected = model(x)
        graphs = []

        def look(graph, inputs):
            graphs.append([node.target for node in graph.graph.nodes])
            return graph.forward

        compiled = torch.compile(model, backend=look, fullgraph=True)
        assert_same_bits(compiled(x), expected)
        assert sum(target is operator for target in graphs[0]) == 1
        model.layer2[0].conv1.weight.mul_(1.5)
        changed = model(x)
        assert not torch.equal(changed, expected)
        assert_same_bits(compiled(x), changed)
        exported = torch.export.export(model, (x,))
        assert sum(node.target is operator for node in exported.graph.nodes) == 1
        assert_same_bits(exported.module()(x), changed)


def tensors_of(layers):
    return [t for layer in layers for t in (layer.weight, *layer.norm[:4], layer.bias)]


def numbers_of(layers):
    numbers = []
    for layer in layers:
        numbers += [*layer.stride, *layer.padding, *layer.dilation, layer.groups]
    return numbers


def test_operator(backend):
    """As a dispatcher calls it: schema, fake kernel, no gradient."""
    block = make_block("basic, projection").to(backend.device)
    x = torch.randn(2, 6, 5, 5, device=backend.device)
    fused_resnet.quantize(block, [x])
    part = quantized.part_of(block, x)
    layers, has_projection, *_ = part[1]
    tensors = tensors_of(layers)
    numbers = numbers_of(layers)
    ranges = part[0].ranges
    arguments = (
        *(x, tensors, numbers, [layer.norm.eps for layer in layers], [3], [has_projection]),
        *([one.step for one in ranges], [one.zero_point for one in ranges]),
    )
    operator = torch.ops.fused_resnet.residual_blocks_int8.default
    torch.library.opcheck(operator, arguments, test_utils=["test_schema", "test_faketensor"])
    assert not operator(x.requires_grad_(), *arguments[1:]).requires_grad
    assert_same_bits(operator(*arguments), block(x))

    def refused(match, **changes):
        names = ("input", "tensors", "numbers", "eps", "counts", "projections", "steps", "zeros")
        given = dict(zip(names, arguments, strict=True)) | changes
        with pytest.raises((ValueError, TypeError), match=match):
            operator(*given.values())

    refused("input has dtype torch.float64", input=x.double())
    refused("2 steps and 3 zero points", steps=[1.0, 1.0])
    refused("a step is nan, must be finite", steps=[1.0, float("nan"), 1.0])
    refused("a zero point is 256, must be 0 to 255", zeros=[256, 0, 0])
    refused("block 0 has a zero point behind a ReLU", zeros=[0, 1, 0])


def test_operator_of_blocks_that_do_not_meet():
    block = make_block("basic")
    x = torch.randn(2, 6, 5, 5)
    fused_resnet.quantize(block, [x])
    kept, described = quantized.part_of(block, x)
    layers = described.layers
    tensors = tensors_of(layers) * 2
    numbers = numbers_of(layers) * 2
    eps = [layer.norm.eps for layer in layers] * 2
    operator = torch.ops.fused_resnet.residual_blocks_int8.default
    steps, zeros = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0] * 6
    with pytest.raises(ValueError, match=r"block 0 writes in steps of 3\.0, block 1 reads"):
        operator(x, tensors, numbers, eps, [2, 2], [False, False], steps, zeros)
    # In Python they run in two calls.
    with torch.no_grad():
        twice = quantized.run_parts([(kept, described)] * 2, x)
        assert_same_bits(twice, block(block(x)))


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_backends_give_the_same_bits(backend_name):
    model = network()
    fused_resnet.quantize(model, [torch.randn(2, 1, 12, 12)])
    h = torch.randn(2, 16, 11, 13)
    with torch.no_grad():
        with backends.use_backend("reference"):
            expected = model.layer1(h)
        with backends.use_backend(backend_name):
            assert_same_bits(model.layer1(h), expected)
