"""The Triton kernels of a stem's norm, ReLU and pool in training; interpreted without a GPU."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import RUNNERS
from ops.test_training import kept_by
from support import assert_same_bits, dtype_id, image_batch, small_resnet
from torch import nn

import fused_resnet
from fused_resnet import backends
from fused_resnet.layers.description import ConvNorm, Norm
from fused_resnet.ops.training.nodes import stem_training
from fused_resnet.testing import FACTOR, assert_error_rule, relative_error

aten = torch.ops.aten

RUNNER = next((runner for runner in RUNNERS if runner.name == "triton"), None)

pytestmark = pytest.mark.skipif(RUNNER is None, reason=backends.available()["triton"])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Square ones; gaps between windows; sides that differ; more pixels than are unrolled; one pixel.
POOLS = [
    ((3, 3), (2, 2), (1, 1)),
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (1, 1), (1, 1)),
    ((2, 2), (3, 3), (1, 1)),
    ((3, 2), (1, 3), (1, 0)),
    ((2, 5), (2, 3), (0, 2)),
    ((5, 5), (2, 2), (2, 2)),
    ((1, 1), (1, 1), (0, 0)),
]
# Sizes that windows fill and sizes with a rest; fewer channels than a tile has, more, two.
SHAPES = [(2, 20, 11, 7), (1, 70, 4, 6), (3, 2, 5, 6)]


@pytest.fixture
def stem(monkeypatch):
    """`stem.py`, going through tensors with tiles as a GPU's."""
    module = backends.triton.lazy.stems()
    original = module.layout_of

    def as_on_a_gpu(input):
        layout = original(input)
        block_c = min(layout.block_c, 32)
        return dataclasses.replace(layout, block_r=2048 // block_c, block_c=block_c)

    if RUNNER.device != "cuda":
        monkeypatch.setattr(module, "layout_of", as_on_a_gpu)
    with fused_resnet.use_backend("triton"):
        yield module


def drawn(shape, dtype, ties=False):
    x = torch.randn(shape)
    x = (2 * x).round() if ties else x
    return x.to(RUNNER.device, dtype).contiguous(memory_format=torch.channels_last)


def norm_of(C):
    weight, bias = torch.randn(2, C).to(RUNNER.device).unbind(0)
    return weight, bias


def unfused(x, weight, bias, pool):
    """The pooled tensor, the 64-bit indices and the unpooled tensor, pass by pass."""
    y, mean, var = backends.triton.batch_norm_act_training(x, weight, bias, 1e-5, None, "relu")
    return *aten.max_pool2d_with_indices(y, *pool), y, mean, var


def offsets_of(indices, W, pool):
    """Positions in their windows of pixels of an image."""
    (_, S), stride, padding = pool
    P, Q = indices.shape[2:]
    p, q = (torch.arange(n, device=indices.device) for n in (P, Q))
    r = indices // W - (p * stride[0] - padding[0])[:, None]
    return (r * S + indices % W - (q * stride[1] - padding[1])).to(torch.uint8)


def assert_as_unfused(x, pool):
    """Values, places and statistics to the bit; the gradient as exactly as it can be written."""
    weight, bias = norm_of(x.size(1))
    ours, offsets, *statistics = backends.triton.batch_norm_relu_max_pool(
        x, weight, bias, 1e-5, pool
    )
    pooled, indices, y, *expected = unfused(x, weight, bias, pool)
    assert_same_bits(ours, pooled)
    assert ours.stride() == pooled.stride()
    assert_same_bits(offsets, offsets_of(indices, x.size(3), pool))
    for a, b in zip(statistics, expected, strict=True):
        assert_same_bits(a, b)
    grad = torch.randn_like(ours)
    result = backends.triton.max_pool_backward_from_offsets(grad, offsets, x.shape[2:], pool)
    assert result.stride() == x.stride()
    exact = aten.max_pool2d_with_indices_backward(
        grad.double(), y.double(), *pool, (1, 1), False, indices
    )
    theirs = aten.max_pool2d_with_indices_backward(grad, y, *pool, (1, 1), False, indices)
    assert_error_rule(result, theirs, exact)
    if x.dtype is torch.float32:
        assert_same_bits(result + 0.0, theirs + 0.0)
    else:  # a sum in float32 of so few is exact but for its last bits, and rounded once
        torch.testing.assert_close(result, exact.float().to(x.dtype), rtol=0, atol=0)
    return ours, offsets, result


@pytest.mark.pairs
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_as_the_unfused_passes(stem, pool, shape, dtype):
    if shape == SHAPES[0]:
        assert_as_unfused(drawn(shape, dtype), pool)
    assert_as_unfused(drawn(shape, dtype, ties=True), pool)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pool", POOLS[:4], ids=str)
def test_by_the_error_rule(stem, pool, dtype):
    """Against torch in float64, with the norm."""
    x = drawn((2, 24, 11, 9), dtype)
    weight, bias = norm_of(24)
    ours, *_ = backends.triton.batch_norm_relu_max_pool(x, weight, bias, 1e-5, pool)

    def eager(x, weight, bias):
        return F.max_pool2d(F.relu(F.batch_norm(x, None, None, weight, bias, True)), *pool)

    exact = eager(x.double(), weight.double(), bias.double())
    assert_error_rule(ours, eager(x, weight, bias), exact)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:invalid value", "ignore:overflow")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.single
def test_nonfinite(stem, dtype):
    """The norm of constants: single values may be NaN and infinite; the last NaN is taken."""
    x = drawn((2, 6, 11, 9), dtype)
    x[0, 1, 3, 2] = x[0, 1, 3, 4] = x[0, 1, 4, 3] = math.nan
    x[0, 2, 0, 0] = x[1, 2, 10, 8] = math.nan
    x[0, 3, 5, 5] = x[0, 3, 5, 6] = math.inf
    x[0, 4, 5, 5] = x[1, 4, 0, 0] = -math.inf
    x[1, 5] = -math.inf
    x[1, 0] = math.nan
    norm = Norm(*(t.to(x.device) for t in (torch.zeros(6), torch.ones(6), *norm_of(6))), 1e-5)
    for pool in POOLS:
        y = backends.triton.batch_norm_act_inference(x, norm, None, "relu")
        pooled, indices = aten.max_pool2d_with_indices(y, *pool)
        ours, offsets = stem.norm_relu_max_pool(x, norm, pool)
        assert_same_bits(ours, pooled)
        assert_same_bits(offsets, offsets_of(indices, 9, pool))
        grad = torch.randn_like(ours)
        grad[0, 0, 0, 0], grad[1, 3, 1, 1], grad[1, 2, 1, 1] = math.nan, math.inf, -math.inf
        result = stem.max_pool_backward(grad, offsets, (11, 9), pool)
        expected = aten.max_pool2d_with_indices_backward(
            grad.float(), y.float(), *pool, (1, 1), False, indices
        )
        assert_same_bits(result + 0.0, expected.to(dtype) + 0.0)


@pytest.mark.quick
def test_the_largest_window(stem):
    """255 positions; one more is left to others, as is what the pool itself refuses."""
    x = drawn((1, 2, 18, 20), torch.float16)
    x[0, 0, 16, 16] = 100.0
    _, offsets, _ = assert_as_unfused(x, ((15, 17), (3, 3), (7, 8)))
    assert_as_unfused(x, ((1, 17), (2, 2), (0, 8)))
    assert int(offsets.max()) > 128
    run = backends.triton.batch_norm_relu_max_pool
    usual = POOLS[0]
    for pool in [
        ((16, 16), (1, 1), (0, 0)),
        ((3, 3), (2, 2), (2, 1)),
        ((19, 3), (2, 2), (0, 0)),
        ((3, 3), (2, 2), (-1, 0)),
    ]:
        assert run(x, None, None, 1e-5, pool) is None, pool
    for other in (x.double(), x.contiguous(), x[:, :, ::2], x[:0], x[0]):
        assert run(other, None, None, 1e-5, usual) is None, other.shape


@pytest.mark.quick
def test_wide_offsets_give_the_same_bits(stem, monkeypatch):
    x = drawn((3, 7, 9, 7), torch.float16)
    layout_of = stem.layout_of

    def wide(tensor):
        return dataclasses.replace(layout_of(tensor), wide=True)

    for pool in POOLS[:4]:
        torch.manual_seed(1)
        narrow = assert_as_unfused(x, pool)
        with monkeypatch.context() as patch:
            patch.setattr(stem, "layout_of", wide)
            torch.manual_seed(1)
            for a, b in zip(narrow, assert_as_unfused(x, pool), strict=True):
                assert_same_bits(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_what_the_launches_move(stem, dtype):
    """In passes over the unpooled tensor: one and the pooled quarter with its offsets each way."""
    from fused_resnet.backends.triton import launch as launches

    x = torch.empty(64, 64, 112, 112, dtype=dtype, device=RUNNER.device)
    x = x.to(memory_format=torch.channels_last)
    pool = POOLS[0]
    with launches.logged(run=False) as log:
        pooled, offsets, _, _ = stem.batch_norm_relu_max_pool(x, None, None, 1e-5, pool)
        forward = sum(launch.bytes for launch in log) / x.nbytes
        log.clear()
        stem.max_pool_backward(pooled, offsets, (112, 112), pool)
        backward = sum(launch.bytes for launch in log) / x.nbytes
    quarter = (1 + 1 / x.element_size()) / 4
    assert 2 + quarter <= forward < 2.02 + quarter
    assert backward == 1 + quarter


def stem_of(dtype, pool, bias=True):
    """A convolution's arguments as `stem_training` takes them, the leaves, and eager's formula."""
    x = drawn((2, 3, 16, 14), dtype).requires_grad_()
    weight = (torch.randn(8, 3, 3, 3) / 3).to(RUNNER.device, dtype)
    weight = weight.to(memory_format=torch.channels_last).requires_grad_()
    conv_bias = torch.randn(8).to(RUNNER.device, dtype).requires_grad_() if bias else None
    norm = [t.requires_grad_() for t in norm_of(8)]
    leaves = [x, weight, *norm] + ([conv_bias] if bias else [])
    geometry = ((1, 1), (1, 1), (1, 1))

    def fused(x, weight, bn_weight, bn_bias, bias=None, group=None):
        layer = ConvNorm(weight, Norm(None, None, bn_weight, bn_bias, 1e-5), bias, *geometry, 1)
        return stem_training(x, layer, group, pool, lambda statistics: None)

    def eager(x, weight, bn_weight, bn_bias, bias=None):
        raw = torch.conv2d(x, weight, bias, *geometry, 1)
        return F.max_pool2d(F.relu(F.batch_norm(raw, None, None, bn_weight, bn_bias, True)), *pool)

    return leaves, fused, eager


def exact_stem(leaves, pool, grad):
    """The stem and its gradients in float64, with the maxima where those of this dtype are."""
    x, weight, bn_weight, bn_bias, bias = leaves
    with torch.no_grad():
        raw = torch.conv2d(x, weight, bias, 1, 1)
        _, indices, *_ = unfused(raw, bn_weight, bn_bias, pool)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    h = torch.conv2d(doubles[0], doubles[1], doubles[4], 1, 1)
    h = raw.double() + (h - h.detach())
    y = F.relu(F.batch_norm(h, None, None, *doubles[2:4], True))
    out = y.flatten(2).gather(2, indices.flatten(2)).view(grad.shape)
    return [out, *torch.autograd.grad(out, doubles, grad.double())]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pool", POOLS[:4], ids=str)
@pytest.mark.single
def test_the_gradients_of_a_stem(stem, monkeypatch, pool, dtype):
    """At least as exact as the passes it replaces; the output to their bits."""
    leaves, fused, _ = stem_of(dtype, pool)
    calls = []
    gather = backends.triton.max_pool_backward_from_offsets

    def counted(*arguments):
        calls.append(arguments[1].dtype)
        return gather(*arguments)

    name = "max_pool_backward_from_offsets"
    monkeypatch.setattr(backends.triton.Triton, name, staticmethod(counted))
    out = fused(*leaves)
    grad = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, leaves, grad)]
    assert calls == [torch.uint8]
    with monkeypatch.context() as patch:
        patch.delattr(backends.triton.Triton, "batch_norm_relu_max_pool")
        out = fused(*leaves)
        passes = [out, *torch.autograd.grad(out, leaves, grad)]
    assert calls == [torch.uint8]
    assert_same_bits(ours[0], passes[0])
    exact = exact_stem(leaves, pool, grad)
    # The bias before a norm has no gradient but what rounding leaves.
    for a, b, c in list(zip(ours, passes, exact, strict=True))[:-1]:
        assert a.dtype is b.dtype
        assert relative_error(a, c) <= FACTOR * relative_error(b, c) + 1e-6


@pytest.mark.quick
def test_a_stem_differentiated_twice(stem):
    leaves, fused, eager = stem_of(torch.float32, POOLS[0], bias=False)
    results = []
    for evaluate in (fused, eager):
        out = evaluate(*leaves)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append([*first, *second])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


@pytest.mark.quick
def test_which_stems_keep_offsets(stem, monkeypatch):
    """Not those in float64, nor those whose images lie channel by channel."""
    ran = []
    kernel = stem.batch_norm_relu_max_pool
    monkeypatch.setattr(stem, "batch_norm_relu_max_pool", lambda *a: ran.append(1) or kernel(*a))
    for change, count in [
        (lambda t: t, 1),
        (lambda t: t.double(), 0),
        (lambda t: t.contiguous(), 0),
    ]:
        leaves, fused, eager = stem_of(torch.float32, POOLS[0], bias=False)
        leaves = [change(t.detach()).requires_grad_() for t in leaves]
        out = fused(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert len(ran) == count
        for a, b in zip(grads, torch.autograd.grad(eager(*leaves).sum(), leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        ran.clear()


@pytest.mark.quick
def test_statistics_of_several_processes(stem, monkeypatch):
    """A group's are not the kernel's to find: the passes it replaces run, with these gradients."""
    leaves, fused, eager = stem_of(torch.float32, POOLS[0], bias=False)
    backend = "nccl" if RUNNER.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        monkeypatch.delattr(stem, "batch_norm_relu_max_pool")
        grads = torch.autograd.grad(fused(*leaves, group=dist.group.WORLD).sum(), leaves)
    finally:
        dist.destroy_process_group()
    for a, b in zip(grads, torch.autograd.grad(eager(*leaves).sum(), leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_an_empty_batch(stem):
    """Like eager's, whatever that is."""
    leaves, fused, eager = stem_of(torch.float32, POOLS[0], bias=False)
    leaves[0] = leaves[0].detach()[:0].requires_grad_()
    results = []
    for evaluate in (fused, eager):
        out = evaluate(*leaves)
        results.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert_same_bits(a, b)


@pytest.mark.quick
def test_what_a_stem_keeps(stem):
    """The raw output, and a byte for each pooled value; the pooled ones belong to what follows."""
    model = fused_resnet.fuse(small_resnet()).train()
    model.layer1 = model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.avgpool = model.fc = nn.Identity()
    model = model.to(RUNNER.device)
    x = image_batch(2, 32).to(RUNNER.device)
    kept = kept_by(model, x)
    raw = 2 * 64 * 16 * 16 * 4
    assert raw * 17 // 16 <= kept < 1.02 * raw * 17 / 16


def test_a_network_trains(stem):
    """A whole fused stem, with and without autocast: gradients close to eager's."""
    eager = small_resnet().train()
    eager.layer1 = eager.layer2 = eager.layer3 = eager.layer4 = nn.Identity()
    eager.fc = nn.Linear(64, 5)
    eager = eager.to(RUNNER.device, memory_format=torch.channels_last)
    x = image_batch(2, 32).to(RUNNER.device)
    for dtype in (None, torch.bfloat16):
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        found = []
        for model, backend in ((copy.deepcopy(eager), "cpu"), (fused, "triton")):
            with (
                fused_resnet.use_backend(backend),
                torch.autocast(RUNNER.device, dtype=dtype, enabled=dtype is not None),
            ):
                out = model(x)
            out.float().square().sum().backward()
            found.append([out.detach(), *(p.grad for p in model.parameters())])
        tolerance = 1e-4 if dtype is None else 0.1
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype
            assert (a - b).norm() <= tolerance * b.norm()
        if dtype is None:
            for a, b in zip(fused.buffers(), model.buffers(), strict=True):
                torch.testing.assert_close(a, b)
