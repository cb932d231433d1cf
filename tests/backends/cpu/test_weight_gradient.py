"""A convolution's gradient in its weight, on tiles or in pairs, or with either emulated."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from support import rerun_on_instruction_set
from support.threads import with_threads

from fused_resnet.backends import cpu


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def dtype(request):
    """What some processors have a unit for."""
    if request.param not in cpu.isa.TRAINED_ON_UNIT:
        pytest.skip("this processor has no unit for it; run again on an emulated one")
    return request.param


# C, K, taps, stride, padding, dilation, groups, size: channels that end inside a block or a tile,
# the input transposed instead of the gradient (K > C), planes of strided inputs, images of several
# chunks, chunks of several images, rows that share their padding and rows that may not.
SHAPES = [
    (64, 96, (3, 3), (1, 1), (1, 1), (1, 1), 1, (11, 9)),
    (33, 20, (2, 3), (1, 1), (1, 3), (2, 2), 1, (11, 9)),
    (40, 80, (1, 1), (1, 1), (0, 0), (1, 1), 1, (13, 31)),
    (96, 40, (1, 1), (1, 1), (0, 0), (1, 1), 1, (11, 9)),
    (32, 128, (1, 1), (2, 2), (0, 0), (1, 1), 1, (11, 9)),
    (64, 32, (1, 1), (1, 1), (2, 3), (1, 1), 1, (5, 4)),
    (64, 64, (3, 3), (2, 2), (1, 1), (1, 1), 2, (14, 14)),
    (16, 16, (3, 2), (1, 1), (1, 1), (1, 1), 1, (30, 33)),
    (32, 16, (2, 5), (2, 2), (3, 4), (4, 2), 1, (14, 14)),
]


def draw(shape, batch, dtype, layout=torch.channels_last):
    """The gradient of the output, the input, the weight, and the geometry."""
    C, K, taps, *geometry, groups, size = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, C, *size, generator=generator).to(dtype)
    weight = torch.zeros(K, C // groups, *taps, dtype=dtype)
    sizes = F.conv2d(x[:1].float(), weight.float(), None, *geometry, groups).shape[1:]
    grad = torch.randn(batch, *sizes, generator=generator).to(dtype)
    tensors = (t.contiguous(memory_format=layout) for t in (grad, x, weight))
    return *tensors, (*geometry, groups)


def library(grad, x, weight, geometry):
    *geometry, groups = geometry
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, *geometry, False, [0, 0], groups, (False, True, False)
    )[1]


def without_padding(grad, x, weight, geometry):
    """The sums of the products there are, in float64: im2col multiplies padding, too."""
    (stride, padding, dilation, groups), (H, W) = geometry, x.shape[2:]
    exact = torch.zeros(weight.shape, dtype=torch.float64)
    kept_k, kept_c = grad.size(1) // groups, x.size(1) // groups
    for r in range(weight.size(2)):
        for s in range(weight.size(3)):
            h = torch.arange(grad.size(2)) * stride[0] + r * dilation[0] - padding[0]
            w = torch.arange(grad.size(3)) * stride[1] + s * dilation[1] - padding[1]
            rows, columns = (h >= 0) & (h < H), (w >= 0) & (w < W)
            out = grad.double()[:, :, rows][..., columns].transpose(0, 1).flatten(1)
            seen = x.double()[:, :, h[rows]][..., w[columns]].transpose(0, 1).flatten(1)
            for g in range(groups):
                k, c = slice(g * kept_k, (g + 1) * kept_k), slice(g * kept_c, (g + 1) * kept_c)
                exact[k, :, r, s] = out[k] @ seen[c].T
    return exact


def error(actual, exact):
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, dtype):
    for batch, layout in ((1, torch.channels_last), (3, torch.contiguous_format)):
        grad, x, weight, geometry = draw(shape, batch, dtype, layout)
        exact = library(grad.double(), x.double(), weight.double(), geometry)
        actual = cpu.conv_weight_gradient(grad, x, weight, geometry)
        assert actual.stride() == weight.stride()
        bound = 1.5 * error(library(grad, x, weight, geometry), exact)
        assert error(actual, exact) <= bound


def test_values_that_are_not_finite(dtype):
    """An infinity that only padding's zeros, or no output, meets stays where it belongs.

    And the sums beside it, computed again, are as exact as any: of many pixels, too.
    """
    many = (32, 32, (1, 1), (1, 1), (0, 0), (1, 1), 1, (60, 60))
    for shape in (SHAPES[0], SHAPES[2], SHAPES[3], SHAPES[6], many):
        for value in (torch.inf, torch.nan):
            grad, x, weight, geometry = draw(shape, 2, dtype)
            x[1, 3, 0, -1] = value
            grad[0, 5, -1, 0] = -value
            exact = without_padding(grad, x, weight, geometry)
            actual = cpu.conv_weight_gradient(grad, x, weight, geometry).double()
            finite = exact.isfinite()
            assert not finite.all()
            assert finite.any()
            assert torch.equal(actual.isnan(), exact.isnan())
            assert torch.equal(actual.isinf(), exact.isinf())
            assert torch.equal(actual[exact.isinf()], exact[exact.isinf()])
            # What is not finite is in none of these sums.
            clean = [torch.where(t.isfinite(), t, 0) for t in (grad, x)]
            by_library = library(*clean, weight, geometry)[finite]
            bound = 1.5 * error(by_library, exact[finite])
            assert error(actual[finite], exact[finite]) <= bound


def test_any_number_of_threads_gives_the_same_bits(dtype):
    for shape in SHAPES:
        call = functools.partial(cpu.conv_weight_gradient, *draw(shape, 3, dtype))
        first, *others = with_threads(call, 1, 2, 5)
        assert all(torch.equal(first, other) for other in others)


def test_empty_batches_and_what_is_left_to_the_library(dtype):
    grad, x, weight, geometry = draw(SHAPES[0], 2, dtype)
    assert not cpu.conv_weight_gradient(grad[:0], x[:0], weight, geometry).any()
    double = grad.double(), x.double(), weight.double()
    assert cpu.conv_weight_gradient(*double, geometry) is None
    assert cpu.conv_weight_gradient(grad, x[:, :3], weight[:, :3], geometry) is None
    with pytest.raises(ValueError, match="do not go together"):
        cpu.conv_weight_gradient(grad[:, :, 1:], x, weight, geometry)
    out = torch.empty_like(weight)
    with pytest.raises(ValueError, match="groups is 0"):
        torch.ops.fused_resnet.conv_weight_gradient(grad, x, 1, 1, 1, 1, 1, 1, 0, out)


@pytest.mark.parametrize("isa", ["amx_emulated", "avx512bf16_emulated"])
@pytest.mark.ahead(lambda isa: rerun_on_instruction_set(isa, __file__, "not emulated"))
def test_on_emulated_units(isa, ahead):
    """This file's cases again, on any processor."""
    ahead()
