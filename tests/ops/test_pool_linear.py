"""`ops.pool_linear`, a network's head: values, and what keeps it from running as one."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import dtype_id
from torch import nn

import fused_resnet
from fused_resnet.backends import cpu
from fused_resnet.ops.pool_linear import pool_linear
from fused_resnet.testing import assert_error_rule

NATIVE = pytest.mark.skipif(
    not torch.ops.fused_resnet.conv_isa(), reason="no native kernels on this processor"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 2048, 7, 7, 100), (3, 70, 5, 3, 11), (6, 512, 7, 7, 40), (2, 1, 1, 1, 1)]


def eager_head(x, weight, bias):
    return F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)


def head(shape, dtype=torch.float32):
    N, C, H, W, K = shape
    torch.manual_seed(3)
    x = torch.randn(N, C, H, W).relu().to(dtype)
    return x, (torch.randn(K, C) / C**0.5).to(dtype), torch.randn(K).to(dtype)


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(shape, dtype):
    """In both formats, with and without a bias; rows that do not fill vectors."""
    x, weight, bias = head(shape, dtype)
    with torch.inference_mode():
        for input in (x, x.to(memory_format=torch.channels_last)):
            for b in (bias, None):
                # A slice of a wider weight: rows that do not follow each other.
                wide = torch.cat([weight, weight], 1)[:, : weight.size(1)]
                exact = F.linear(input.double().mean((2, 3)), weight.double())
                exact = exact if b is None else exact + b.double()
                for w in (weight, wide):
                    out = pool_linear(input, w, b)
                    assert out.dtype is dtype
                    assert_error_rule(out, eager_head(input, weight, b), exact)


@NATIVE
def test_nan_and_infinity():
    """They reach the images and outputs that they reach in torch."""
    x, weight, bias = head((3, 40, 4, 4, 9))
    x[1, 5, 2, 3] = float("nan")
    x[2, 7, 0, 0] = float("inf")
    weight[:, 7] = 0
    with torch.inference_mode():
        out, expected = pool_linear(x, weight, bias), eager_head(x, weight, bias)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().all(1).tolist() == [False, True, True]


def test_what_it_leaves_alone():
    """Nothing where torch's operators are to run, or to complain."""
    x, weight, bias = head((2, 40, 4, 4, 9))
    assert pool_linear(x, weight.requires_grad_(), bias) is None
    with torch.inference_mode():
        weight = weight.detach()
        assert pool_linear(x[0], weight, bias) is None
        assert pool_linear(x[:0], weight, bias) is None
        assert pool_linear(x.double(), weight.double(), bias.double()) is None
        assert pool_linear(x, weight.half(), bias) is None
        assert pool_linear(x, weight[:, 1:], bias) is None
        assert pool_linear(x, weight, bias[1:]) is None
        assert pool_linear(x[:, :, :, :0], weight, bias) is None
        assert pool_linear(x, weight.t().contiguous().t(), bias) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert pool_linear(x, weight, bias) is None


@pytest.fixture
def network(monkeypatch):
    """A fused ResNet on the CPU backend, and the calls of the kernel in a list."""
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return kernel(*arguments)

    kernel = cpu.operators.pool_linear
    monkeypatch.setattr(cpu.operators, "pool_linear", counted)
    torch.manual_seed(0)
    block = torchvision.models.resnet.BasicBlock
    model = torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=5).eval()
    with fused_resnet.use_backend("cpu"):
        yield fused_resnet.fuse(model), calls


@NATIVE
def test_in_a_network(network):
    """It runs once a call, on the parameters as they are at the time."""
    model, calls = network
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        before = model(x)
        model.fc.weight.data.mul_(2)
        model.fc.bias.data.mul_(2)
        torch.testing.assert_close(model(x), 2 * before)
    assert len(calls) == 2


CHANGES = {
    "hook on fc": lambda m: m.fc.register_forward_hook(lambda *a: a[2] * 2),
    "hook on avgpool": lambda m: m.avgpool.register_forward_pre_hook(lambda _, a: (a[0] * 2,)),
    "own forward": lambda m: setattr(m.fc, "forward", lambda x: x[:, :5] * 2),
    "another fc": lambda m: setattr(m, "fc", nn.Sequential(nn.Identity(), m.fc)),
    "another pool": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "no bias": lambda m: setattr(m, "fc", nn.Linear(512, 5, bias=False)),
}


@NATIVE
@pytest.mark.parametrize("change", CHANGES)
def test_changed_heads(network, change):
    """A head that is more than the two modules runs as what it is."""
    model, calls = network
    CHANGES[change](model)
    x = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        out = model(x)
        expected = fused_resnet.unfuse(model)(x)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (change == "no bias")


@NATIVE
@pytest.mark.parametrize(("owner", "name"), [(nn.Linear, "forward"), (F, "adaptive_avg_pool2d")])
def test_replaced(network, owner, name, monkeypatch):
    """What somebody put in the place of torch's own runs, and nothing afterwards."""
    model, calls = network
    x = torch.randn(2, 3, 32, 32)
    original = getattr(owner, name)
    with torch.inference_mode():
        before = model(x)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *a, **k: original(*a, **k) * 0)
            assert not torch.equal(model(x), before)
        assert torch.equal(model(x), before)
    assert len(calls) == 2


@torch.no_grad()
def test_what_is_left_to_torch():
    """Strides the kernel does not take, and what does not go together: an answer, not an error."""
    head = cpu.pool_linear
    x = torch.randn(2, 8, 4, 6)
    weight, bias = torch.randn(5, 8), torch.randn(5)
    assert head(x, weight, bias) is not None
    assert head(x, torch.randn(8, 5).t(), bias) is None
    assert head(x, weight, torch.randn(10)[::2]) is None
    assert head(torch.randn(2, 16, 4, 12)[:, ::2, :, ::2], weight, bias) is None
    assert head(x, torch.randn(5, 9), bias) is None
    assert head(x, weight.flatten(), bias) is None
    assert head(x, weight, torch.randn(6)) is None
    assert head(x, weight.double(), bias.double()) is None
    assert head(x, weight, bias.bfloat16()) is None
    assert head(x[:, :, :0], weight, bias) is None
    assert head(x[:0], weight, bias) is None
    assert head(x[:1, :, :1, :1].expand(1, 8, 2**20, 17), weight, bias) is None


@NATIVE
@torch.no_grad()
def test_images_of_endless_pixels():
    """Expanded they take no memory, and would be summed up for days, past Ctrl-C."""
    x = torch.ones(1, 8, 1, 5).expand(2, 8, 2**31, 5)
    with pytest.raises(ValueError, match=r"input has shape .* at most 16777216 pixels an image"):
        torch.ops.fused_resnet.pool_linear(x, torch.ones(5, 8), None)
