"""Convolutions with norms at their ends, interpreted where there is no GPU, and blocks of them."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import RUNNERS
from ops.test_training import block_results
from support import assert_same_bits
from torchvision.models import resnet

import fused_resnet
from fused_resnet import backends
from fused_resnet.layers.description import Norm, Sums
from fused_resnet.measure import networks
from fused_resnet.testing import assert_error_rule, randomize_
from fused_resnet.tuning import estimate, training
from fused_resnet.tuning.architecture import ARCHITECTURES
from fused_resnet.tuning.choice import Tile

RUNNER = next((runner for runner in RUNNERS if runner.name == "triton"), None)

pytestmark = pytest.mark.skipif(RUNNER is None, reason=backends.available()["triton"])

TILES = [Tile(64, 64, 32, 1, 4, 1), Tile(64, 128, 64, 1, 8, 1)]
# Filter, stride, padding, dilation.
GEOMETRIES = [(1, 1, 0, 1), (1, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 2)]
N, C, H, W, K = 2, 40, 9, 7, 72


@pytest.fixture
def convs():
    backends.triton.lazy.norms()
    return backends.triton.lazy.training_convolutions()


def drawn(*shape, dtype=torch.float32, scale=1.0):
    made = torch.randn(shape) * scale
    if len(shape) == 4:
        made = made.to(memory_format=torch.channels_last)
    return made.to(RUNNER.device, dtype)


def norm_of(convs, channels):
    var = drawn(channels).abs() + 0.5
    return Norm(drawn(channels), var, drawn(channels), drawn(channels), 1e-5)


def doubles(norm):
    return [t.double() for t in (norm.mean, norm.var, norm.weight, norm.bias)]


def normalized(x, norm, dtype):
    """As a pass of its own would store it."""
    return F.batch_norm(x.to(dtype), *(t.to(dtype) for t in doubles(norm)), False, 0, 1e-5).relu()


@pytest.mark.pairs
@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=["small", "large"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.single
def test_forward(convs, geometry, tile, dtype):
    """The output by the error rule; the statistics are of what is stored; the same bits twice."""
    R, stride, padding, dilation = geometry
    pairs = tuple((n, n) for n in (stride, padding, dilation))
    x, weight = drawn(N, C, H, W, dtype=dtype), drawn(K, C, R, R, dtype=dtype, scale=0.2)
    norm = norm_of(convs, C)
    for prologue in (None, norm):
        h = x if prologue is None else normalized(x.float(), norm, torch.float32).to(dtype)
        wide = x.double() if prologue is None else normalized(x, norm, torch.float64)
        eager = F.conv2d(h, weight, None, *pairs)
        exact = F.conv2d(wide, weight.double(), None, *pairs)
        raw, mean, var = convs.forward(x, weight, None, (*pairs, 1), prologue, tile)
        assert_error_rule(raw, eager, exact)
        true_var, true_mean = torch.var_mean(raw.double(), (0, 2, 3), unbiased=False)
        torch.testing.assert_close(mean.double(), true_mean, rtol=2e-7, atol=1e-6)
        torch.testing.assert_close(var.double(), true_var, rtol=4e-6, atol=0)
        again = convs.forward(x, weight, None, (*pairs, 1), prologue, tile)
        for a, b in zip((raw, mean, var), again, strict=True):
            assert_same_bits(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("slabs", [1, 1024])
def test_statistics_far_from_zero(convs, monkeypatch, slabs):
    """A mean of 1e4 beside a deviation of 1 costs no digits, over one tile and folded ones."""
    monkeypatch.setattr(convs, "MOST_SLABS", slabs if slabs > 1 else 2)
    monkeypatch.setattr(convs, "_FOLDED_SLABS", 4)
    x = drawn(3, 16, 13, 11)
    weight = torch.eye(16, device=x.device)[:, :, None, None].contiguous()
    bias = torch.full((16,), 1e4, device=x.device)
    one = ((1, 1), (0, 0), (1, 1))
    raw, mean, var = convs.forward(x, weight, bias, (*one, 1), None, Tile(32, 64, 16, 1, 4, 1))
    true_var, true_mean = torch.var_mean(raw.double(), (0, 2, 3), unbiased=False)
    unit = torch.finfo(torch.float32).eps
    torch.testing.assert_close(mean.double(), true_mean, rtol=unit, atol=0)
    torch.testing.assert_close(var.double(), true_var, rtol=32 * unit, atol=0)


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=["small", "large"])
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g[1] == 1 and g[2] <= 1], ids=str)
@pytest.mark.single
def test_backward_input(convs, geometry, tile, dtype):
    """With every end and with none, by the error rule; the sums are of what is stored."""
    R, _, padding, dilation = geometry
    pairs = ((1, 1), (padding, padding), (dilation, dilation))
    x, weight = drawn(N, C, H, W, dtype=dtype), drawn(K, C, R, R, dtype=dtype, scale=0.2)
    size = F.conv2d(x.float(), weight.float(), None, *pairs).shape
    grad, raw = drawn(*size, dtype=dtype), drawn(*size, dtype=dtype)
    residual = drawn(N, C, H, W, dtype=dtype)
    low, high = norm_of(convs, C), norm_of(convs, K)
    sums = Sums(drawn(K, scale=9.0), drawn(K, scale=9.0), grad.numel() // K)

    def behind(wide):
        g, v = grad.to(wide), lambda t: t.to(wide)[:, None, None] / sums.count
        invstd = (high.var.to(wide) + 1e-5).rsqrt()
        centred = raw.to(wide) - high.mean.to(wide)[:, None, None]
        g = g - v(sums.total) - centred * v(sums.dot * invstd**2)
        return g * (high.weight * invstd)[:, None, None].to(wide)

    alive = normalized(x, low, torch.float64) > 0
    for above in (False, True) if R == 1 else (False,):
        for add, below in ((False, False), (True, False), (False, True), (True, True)):
            exact = behind(torch.float64) if above else grad.double()
            eager = behind(torch.float32).to(dtype) if above else grad
            given = [torch.nn.grad.conv2d_input(x.shape, weight.to(g.dtype), g, *pairs)
                     for g in (eager, exact)]  # fmt: skip
            given = [g + residual.to(g.dtype) if add else g for g in given]
            given = [torch.where(alive, g, 0) if below else g for g in given]
            out, side, found = convs.backward_input(
                grad, weight, (H, W), (*pairs, 1), convs.Ends(
                    residual=residual if add else None,
                    above=(raw, high, sums) if above else None,
                    below=(x, low) if below else None,
                ), tile,
            )  # fmt: skip
            assert_error_rule(out, *given)
            if above:
                assert_error_rule(side, eager, exact)
            if below:
                wide = out.double()
                dot = (wide * (x.double() - low.mean.double()[:, None, None])).sum((0, 2, 3))
                invstd = (low.var.double() + 1e-5).rsqrt()
                expected = (wide.sum((0, 2, 3)), dot, dot * invstd)
                for ours, true in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-3)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nonfinite(convs, value):
    """Reaches the pixels it should, through the prologue too, and the statistics."""
    x, weight = drawn(1, 16, 9, 9), drawn(32, 16, 3, 3)
    x[0, 3, 4, 4] = value
    norm = norm_of(convs, 16)
    norm.weight[3] = 1
    for prologue in (None, norm):
        h = x if prologue is None else normalized(x, norm, torch.float32)
        geometry = ((1, 1), (1, 1), (1, 1), 1)
        raw, mean, var = convs.forward(x, weight, None, geometry, prologue, TILES[0])
        expected = F.conv2d(h, weight, None, 1, 1).isfinite()
        assert torch.equal(raw.isfinite(), expected)
        assert expected.any()
        assert not mean.isfinite().any()
        assert not var.isfinite().any()


@pytest.mark.parametrize("projection", [True, False], ids=["projection", "identity"])
@pytest.mark.parametrize("name", ["basic", "bottleneck"])
@pytest.mark.single
def test_blocks_use_them(convs, monkeypatch, name, projection):
    """All of a block's gradients by the error rule, and which functions of the backend ran."""
    block = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[name]
    width = {"basic": 8, "bottleneck": 4}[name]
    channels = 8 if projection else width * block.expansion
    shortcut = None
    if projection:
        conv = resnet.conv1x1(channels, width * block.expansion, 2)
        shortcut = torch.nn.Sequential(conv, torch.nn.BatchNorm2d(width * block.expansion))
    eager = randomize_(block(channels, width, 2 if projection else 1, shortcut).train())
    eager, x = eager.to(RUNNER.device), drawn(2, channels, 6, 5)
    eager = eager.to(memory_format=torch.channels_last)
    ran, added, masked = [], [], []

    def recorded(function):
        run = getattr(backends.triton, function)

        def call(*arguments):
            found = run(*arguments)
            ran.append((function, found is not None))
            if function == "conv_backward_input":
                residual, _, mask = arguments[4:]
                added.append(found is not None and residual is not None)
                masked.append(added[-1] and mask is not None)
            return found

        monkeypatch.setattr(backends.triton.Triton, function, staticmethod(call))

    recorded("conv_batch_norm_statistics")
    recorded("conv_backward_input")
    recorded("norm_conv_backward_input")
    recorded("batch_norm_add_relu_backward")
    theirs = block_results(copy.deepcopy(eager), x)
    exact = block_results(copy.deepcopy(eager).double(), x.double())
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with fused_resnet.use_backend("triton"):
        ours = block_results(fused, x)
    count = 3 if name == "bottleneck" else 2
    if RUNNER.device != "cuda":
        assert ran.count(("conv_batch_norm_statistics", True)) == count + projection
        # Whoever takes the shortcut's gradient applies the mask, so that none is written for this.
        assert ran.count(("norm_conv_backward_input", True)) == 0
        # With a projection one convolution is of stride 2; the shortcut's gradient is added where
        # the first is not that one.
        assert ran.count(("conv_backward_input", True)) == count - projection
        assert added.count(True) == (name == "bottleneck" or not projection)
        assert masked.count(True) == (not projection)
        assert ran.count(("batch_norm_add_relu_backward", True)) == projection
    assert_error_rule(ours[0], theirs[0], exact[0])
    for a, c in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "identity"])
@pytest.mark.single
def test_blocks_without_the_first_convolution(convs, monkeypatch, projection):
    """Where it is not ours, or declines after all, the gradients are the same."""
    channels = 8 if projection else 16
    shortcut = None
    if projection:
        shortcut = torch.nn.Sequential(resnet.conv1x1(8, 16), torch.nn.BatchNorm2d(16))
    eager = randomize_(resnet.Bottleneck(channels, 4, 1, shortcut).train()).to(RUNNER.device)
    eager, x = eager.to(memory_format=torch.channels_last), drawn(2, channels, 6, 5)
    run, ran, first = backends.triton.conv_backward_input, [], []
    last = backends.triton.norm_conv_backward_input

    def backward_input(grad, weight, *arguments):
        declines = first and weight.size(1) == channels
        ran.append(not declines)
        return None if declines else run(grad, weight, *arguments)

    def last_backward(*arguments):
        ran.append("last")
        return last(*arguments)

    triton = backends.triton.Triton
    monkeypatch.setattr(triton, "conv_backward_input", staticmethod(backward_input))
    monkeypatch.setattr(triton, "norm_conv_backward_input", staticmethod(last_backward))
    results = []
    with fused_resnet.use_backend("triton"):
        results.append(block_results(fused_resnet.fuse(copy.deepcopy(eager)), x))
        first.append(True)
        results.append(block_results(fused_resnet.fuse(copy.deepcopy(eager)), x))
        assert ran.count(False) == (RUNNER.device != "cuda")
        assert "last" not in ran
        never = staticmethod(lambda *_: False)
        monkeypatch.setattr(triton, "conv_backward_input_runs", never)
        results.append(block_results(fused_resnet.fuse(copy.deepcopy(eager)), x))
    # A projection takes the mask itself; without one it is written for whoever adds.
    assert ran.count("last") == (not projection)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_masked_residual(convs, dtype):
    """To the bits of a residual that was masked before; what is masked may be NaN."""
    grad, weight = drawn(2, 24, 5, 7, dtype=dtype), drawn(24, 72, 1, 1, dtype=dtype, scale=0.2)
    residual = drawn(2, 72, 5, 7, dtype=dtype)
    alive = drawn(2, 72, 5, 7) > 0
    residual[0, :8, 2, 3] = math.nan
    alive[0, :8, 2, 3] = False
    bits = alive.permute(0, 2, 3, 1).reshape(-1, 8) << torch.arange(8, device=alive.device)
    mask = bits.sum(1).to(torch.uint8)
    one = ((5, 7), ((1, 1), (0, 0), (1, 1), 1))
    for tile in TILES:
        masked = torch.where(alive, residual, 0)
        expected, _, _ = convs.backward_input(grad, weight, *one, convs.Ends(masked), tile)
        ours, _, _ = convs.backward_input(grad, weight, *one, convs.Ends(residual, mask), tile)
        assert_same_bits(ours, expected)
        assert not expected.isnan().any()


@pytest.mark.quick
def test_what_pays():
    """On an H100, float16: what is chosen is predicted to save something, and fits."""
    gpu = ARCHITECTURES["H100"]
    chosen = 0
    for problem in networks.of_model("resnet50", 256, "float16"):
        if problem.pool is not None:
            continue
        for prologue in (False, True):
            tile, saved = training.forward(problem, prologue, gpu)
            assert (tile is not None) == (saved > 0)
            if tile is not None:
                assert estimate.fits(problem, gpu, tile)
                chosen += 1
    assert chosen > 0
