"""The CPU backend's backward: a convolution's gradient in its input, and the stem's pooling."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision

import fused_resnet.testing
from fused_resnet.backends import cpu
from fused_resnet.layers.description import Norm
from fused_resnet.ops.batch_norm_act_inference import batch_norm_act_inference

aten = torch.ops.aten

pytestmark = pytest.mark.skipif(
    not torch.ops.fused_resnet.conv_isa(), reason="this processor has neither AVX2 nor AVX-512"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# N, C, H, W, K, R, stride, padding, dilation
CONVOLUTIONS = [
    (2, 64, 28, 28, 64, 3, 1, 1, 1),
    (2, 256, 14, 14, 64, 1, 1, 0, 1),
    (2, 64, 14, 14, 256, 1, 1, 0, 1),
    (3, 64, 15, 13, 48, 1, 2, 0, 1),  # a projection
    (2, 64, 16, 16, 128, 1, 3, 0, 1),
    (2, 37, 9, 7, 50, 3, 1, 1, 1),
    (2, 16, 12, 11, 32, 3, 1, 2, 2),
    (1, 5, 8, 8, 3, 5, 1, 2, 1),
    (3, 33, 10, 10, 40, 2, 1, 0, 1),
    (2, 1, 6, 6, 4, 3, 1, 1, 1),
    (2, 16, 1, 1, 8, 1, 1, 0, 1),
    (0, 16, 4, 4, 8, 3, 1, 1, 1),
]


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def make_convolution(shape, dtype=torch.float32):
    N, C, H, W, K, R, stride, padding, dilation = shape
    torch.manual_seed(0)
    x, weight = channels_last(N, C, H, W, dtype=dtype), channels_last(K, C, R, R, dtype=dtype)
    geometry = ((stride,) * 2, (padding,) * 2, (dilation,) * 2)
    grad = torch.randn_like(torch.conv2d(x, weight, None, *geometry))
    return grad, x, weight, geometry


def library_gradient(grad, x, weight, geometry):
    return aten.convolution_backward(
        grad, x, weight, [len(weight)], *geometry, False, (0, 0), 1, (True, False, False)
    )[0]


def error(result, exact):
    return float((result.double() - exact).norm() / exact.norm()) if exact.numel() else 0.0


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_the_gradient_in_the_input(shape, dtype, monkeypatch):
    # Also where the library's would be chosen, as it is in bfloat16 with AMX.
    monkeypatch.setattr(cpu.isa, "on_tiles", lambda *_: False)
    arguments = grad, x, weight, geometry = make_convolution(shape, dtype)
    exact = library_gradient(grad.double(), x.double(), weight.double(), geometry)
    bound = 1.5 * error(library_gradient(*arguments), exact)
    ours = cpu.conv_input_gradient(grad, x, weight, (*geometry, 1))
    assert ours.stride() == x.stride()
    assert error(ours, exact) <= bound
    there = torch.randn_like(x)
    before = there.clone()
    assert cpu.conv_input_gradient(grad, x, weight, (*geometry, 1), there) is there
    # One rounding: of the sum.
    eager = before + library_gradient(*arguments)
    assert error(there, before.double() + exact) <= 1.5 * error(eager, before.double() + exact)


@pytest.mark.quick
def test_gradients_of_any_layout():
    """`grad` may have any strides; a contiguous input's gradient is contiguous."""
    grad, x, weight, geometry = make_convolution(CONVOLUTIONS[0])
    expected = cpu.conv_input_gradient(grad, x, weight, (*geometry, 1))
    for other in (grad.contiguous(), grad.repeat(1, 1, 1, 2)[..., : grad.size(3)]):
        torch.testing.assert_close(
            cpu.conv_input_gradient(other, x, weight, (*geometry, 1)), expected, rtol=0, atol=0
        )
    ours = cpu.conv_input_gradient(grad, x.contiguous(), weight, (*geometry, 1))
    assert ours.is_contiguous()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.quick
def test_gradients_left_to_the_library():
    """Strides with more than one tap, groups, float64, weights that would be packed slowly."""
    grad, x, weight, geometry = make_convolution((2, 8, 9, 9, 8, 3, 2, 1, 1))
    assert cpu.conv_input_gradient(grad, x, weight, (*geometry, 1)) is None
    grad, x, weight, geometry = make_convolution((2, 8, 9, 9, 8, 3, 1, 1, 1))
    assert cpu.conv_input_gradient(grad, x, weight, (*geometry, 1)) is not None
    assert cpu.conv_input_gradient(grad, x, weight.contiguous(), (*geometry, 1)) is None
    assert cpu.conv_input_gradient(grad, x, weight[:, :4], (*geometry, 2)) is None
    double = (t.double() for t in (grad, x, weight))
    assert cpu.conv_input_gradient(*double, (*geometry, 1)) is None
    # More padding than the filter is wide leaves gradients for padding alone.
    grad, x, weight, geometry = make_convolution((2, 8, 9, 9, 8, 1, 1, 1, 1))
    assert cpu.conv_input_gradient(grad, x, weight, (*geometry, 1)) is None


@pytest.mark.quick
def test_a_gradient_of_another_size():
    grad, x, weight, geometry = make_convolution(CONVOLUTIONS[0])
    with pytest.raises(ValueError, match="size of the convolution's output"):
        cpu.conv_input_gradient(grad[:, :, 1:], x, weight, (*geometry, 1))


POOLS = [((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((3, 2), (1, 3), (1, 0)),
         ((2, 2), (3, 3), (0, 0))]  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("shape", [(2, 20, 17, 13), (1, 64, 40, 9)], ids=str)
def test_the_gradient_of_pooling(shape, pool, dtype):
    """Places of the maxima are torch's, ties and NaN included; sums are rounded once."""
    torch.manual_seed(0)
    # Few distinct values: many ties.
    x = (channels_last(*shape) * 2).round().to(dtype)
    x[0, 1, 3, 2] = x[0, 1, 3, 4] = float("nan")
    C = shape[1]
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    norm = (torch.rand(C) + 0.5, torch.randn(C), torch.randn(C), torch.rand(C) + 0.5)
    weight, bias, mean, var = (t.to(accumulate) for t in norm)
    norm = Norm(mean, var, weight, bias, 1e-5)
    y = batch_norm_act_inference(x, norm, None, "relu")
    pooled, indices = aten.max_pool2d_with_indices(y, *pool)
    grad = torch.randn_like(pooled)
    ours = cpu.max_pool_backward(grad, x, norm, pool)
    exact = aten.max_pool2d_with_indices_backward(
        grad.double(), y.double(), *pool, (1, 1), False, indices
    )
    if dtype in (torch.float32, torch.float64):
        torch.testing.assert_close(ours, exact.to(dtype), rtol=1e-6, atol=1e-6)
    else:
        torch.testing.assert_close(ours, exact.float().to(dtype), rtol=0, atol=0)
    contiguous = cpu.max_pool_backward(grad, x.contiguous(), norm, pool)
    assert contiguous is None


def test_what_a_training_step_calls(monkeypatch):
    """Every convolution that the kernels cover, and the stem; and the gradients are eager's."""
    torch.manual_seed(0)
    eager = torchvision.models.resnet50(num_classes=10).train()
    eager = eager.to(memory_format=torch.channels_last)
    fused_resnet.testing.randomize_(eager)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = channels_last(4, 3, 64, 64)
    calls = {"native": 0, "added": 0, "declined": 0, "pools": 0}

    def gradient(*arguments):
        out = conv_input_gradient(*arguments)
        calls["declined" if out is None else "native"] += 1
        calls["added"] += out is not None and arguments[-1] is not None
        return out

    def pool(*arguments):
        out = max_pool_backward(*arguments)
        calls["pools"] += out is not None
        return out

    conv_input_gradient, max_pool_backward = cpu.conv_input_gradient, cpu.max_pool_backward
    monkeypatch.setattr(cpu.Cpu, "conv_input_gradient", staticmethod(gradient))
    monkeypatch.setattr(cpu.Cpu, "max_pool_backward", staticmethod(pool))
    gradients = []
    for model in (eager, fused):
        torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        gradients.append([p.grad for p in model.parameters()])
    # 52 convolutions of blocks, of which three are 3x3 with a stride; 16 shortcuts.
    assert calls == {"native": 49, "added": 16, "declined": 3, "pools": 1}
    exact = copy.deepcopy(eager).double()
    exact.zero_grad()
    torch.nn.functional.cross_entropy(exact(x.double()), torch.arange(4)).backward()
    for theirs, ours, p in zip(*gradients, exact.parameters(), strict=True):
        assert error(ours, p.grad) <= 1.5 * error(theirs, p.grad) + 1e-6
