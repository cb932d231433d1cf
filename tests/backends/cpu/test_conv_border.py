"""Weights that are not finite at the border of the image, where padding takes no part.

Padding is zeros in the kernels' memory, and zero times infinity is NaN.
"""

import dataclasses
import math

import pytest
import torch
from support import (
    STEM,
    STEM_POOL,
    ConvShape,
    assert_same_nonfinite,
    conv_of_taps,
    dtype_id,
    image_batch,
    make_conv_case,
    make_norm_conv_case,
    rerun_on_instruction_set,
    small_resnet,
)
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import backends
from fused_resnet.testing import FACTOR, assert_error_rule, relative_error

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(
        not torch.ops.fused_resnet.conv_isa(), reason="the library's convolution runs everything"
    ),
]
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id
)
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"]
)
# Whole tiles and vectors and not, dense taps, strides, dilation, groups wide and narrow, a filter
# of one tap that is padded, outputs that see nothing of the image.
SHAPES = [
    ConvShape(64, 64, (3, 3), padding=(1, 1)),
    ConvShape(40, 33, (3, 2), (3, 2), (1, 1)),
    ConvShape(5, 48, (3, 3), (1, 2), (1, 1)),
    ConvShape(33, 40, (3, 3), (1, 1), (2, 3), (2, 3)),
    ConvShape(24, 24, (3, 3), padding=(1, 1), groups=24),
    ConvShape(32, 64, (3, 3), padding=(1, 1), groups=8),
    ConvShape(64, 64, (3, 3), padding=(1, 1), groups=2),
    ConvShape(8, 16, (1, 1), (2, 1), (1, 2)),
    ConvShape(8, 16, (3, 3), padding=(9, 4)),
]


def spoil(weight, value):
    """Puts `value` at the first tap of one output channel and the opposite at another's last."""
    weight.data[0, 0, 0, 0] = value
    weight.data[-1, -1, -1, -1] = -value
    weight.data[5, 1 % weight.size(1), -1, 0] = value


def assert_right(ours, exact, dtype):
    """Not finite where `exact` is not, and otherwise close to it."""
    assert_same_nonfinite(ours, exact)
    assert exact.isfinite().any()
    finite = exact.isfinite()
    # Two values are rounded, the convolution's input after a norm and the result.
    unit = torch.finfo(dtype).eps
    assert relative_error(ours[finite], exact[finite]) <= FACTOR * unit + 8 * 2**-24


@DTYPES
@FORMATS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_convolutions(shape, dtype, memory_format):
    for value in (math.inf, math.nan):
        for make in (make_conv_case, make_norm_conv_case):
            case = make(shape, size=(7, 6), dtype=dtype, memory_format=memory_format, bias=True)
            spoil(case.weight, value)
            exact = case.double().eager(conv_of_taps)
            assert not exact.isfinite().all()
            if make is make_norm_conv_case and dtype is not torch.float32:
                # The ReLU inside makes zeros of some values, and zero times infinity is NaN: the
                # convolution's input has to be the rounded one.
                rounded = case.double().normalised().to(dtype)
                exact = case.convolution(rounded).double().eager(conv_of_taps)
            assert_right(case.fused(), exact, dtype)


@DTYPES
@FORMATS
def test_stem_and_pool(dtype, memory_format):
    for value in (math.inf, -math.inf, math.nan):
        case = make_conv_case(
            STEM, size=(19, 22), dtype=dtype, memory_format=memory_format, pool=STEM_POOL
        )
        case.input = case.input.abs() + 0.25
        spoil(case.weight, value)
        assert_right(case.fused(), case.double().eager(conv_of_taps), dtype)


def test_narrow_residuals_and_no_activation():
    case = make_conv_case(ConvShape(16, 24, (3, 3), padding=(1, 1)), activation="none")
    case.residual = case.residual[:, 4:-4]
    spoil(case.weight, math.inf)
    wide = case.double()
    wide.residual = torch.nn.functional.pad(wide.residual, (0, 0, 0, 0, 4, 4))
    assert_right(case.fused(), wide.eager(conv_of_taps), torch.float32)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:4], ids=str)
@pytest.mark.parametrize("adds", [False, True], ids=["", "added"])
def test_input_gradients(shape, dtype, adds):
    """Outside of the image there are no outputs whose gradient could meet the weight."""
    shape = dataclasses.replace(shape, stride=(1, 1))
    case = make_conv_case(shape, size=(7, 6), dtype=dtype, residual=False)
    weight = case.weight.contiguous(memory_format=torch.channels_last)
    spoil(weight, math.inf)
    geometry = (shape.stride, shape.padding, shape.dilation, 1)
    x = case.input.double().requires_grad_()
    exact = conv_of_taps(x, weight.double(), None, *geometry)
    grad = torch.randn(exact.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    (exact,) = torch.autograd.grad(exact, x, grad.double())
    before = case.input.clone() if adds else None
    found = backends.cpu.conv_input_gradient(grad, case.input, weight, geometry, before)
    assert found is not None
    assert_right(found, exact + case.input.double() if adds else exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_forward_pass_in_training(dtype):
    """Outputs, and the statistics of channels whose weights are finite."""
    if dtype not in backends.cpu.isa.TRAINED_ON_UNIT:
        pytest.skip("this processor has no unit for it; run again on an emulated one")
    case = make_conv_case(SHAPES[0], size=(7, 6), dtype=dtype)
    case.weight = case.weight.contiguous(memory_format=torch.channels_last)
    spoil(case.weight, math.inf)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    exact = conv_of_taps(case.input.double(), case.weight.double(), None, *geometry)
    out, mean, var = backends.cpu.conv_batch_norm_statistics(
        case.input, case.weight, None, geometry, None
    )
    assert_right(out, exact, dtype)
    finite = [k for k in range(case.weight.size(0)) if case.weight[k].isfinite().all()]
    exact_var, exact_mean = torch.var_mean(out[:, finite].double(), (0, 2, 3), unbiased=False)
    assert relative_error(mean[finite], exact_mean) < 1e-5
    assert relative_error(var[finite], exact_var) < 1e-5
    assert not mean[[0, 5, -1]].isfinite().any()


class _ConvOfTaps(nn.Conv2d):
    """Computes in float64 or float32, and leaves padding out."""

    def forward(self, x):
        kept = x.dtype if x.dtype is torch.float64 else torch.float32
        bias = None if self.bias is None else self.bias.to(kept)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return conv_of_taps(x.to(kept), self.weight.to(kept), bias, *geometry).to(x.dtype)


@DTYPES
@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@torch.no_grad()
def test_networks(block, dtype):
    """Of minus infinity ReLU makes zero, and of what the border's outputs are something else.

    A single NaN at the border of an inner activation would make NaN of all logits.
    """
    model = small_resnet(block)
    images = (image_batch(2, 32).abs() + 0.25).to(dtype)
    stage = model.layer1[0]
    assert stage.conv2.padding == (1, 1)
    model.conv1.weight[3, 0, 0, 0] = -math.inf
    model.bn1.weight.abs_()
    # Above zero everywhere, what layer1's padded convolution reads there.
    before = model.bn1 if block is BasicBlock else stage.bn1
    first = stage.conv1 if block is BasicBlock else stage.conv2
    norm = stage.bn1 if block is BasicBlock else stage.bn2
    before.bias[7] = 20
    first.weight[5, 7, -1, 0] = -math.inf
    norm.weight.abs_()
    model = model.to(dtype=dtype, memory_format=torch.channels_last)

    def by_taps(kept):
        copy = fused_resnet.unfuse(small_resnet(block))
        copy.load_state_dict(model.state_dict())
        for module in copy.modules():
            if isinstance(module, nn.Conv2d):
                module.__class__ = _ConvOfTaps
        return copy.to(dtype=kept)(images.to(kept))

    exact, eager = by_taps(torch.float64), by_taps(dtype)
    assert exact.isfinite().all()
    assert_error_rule(fused_resnet.fuse(model)(images), eager, exact)


def test_other_channels_are_as_exact_as_ever():
    """On tiles one channel that is not finite has all of its block computed in another way."""
    shape = ConvShape(2048, 64, (3, 3), padding=(1, 1))
    case = make_conv_case(shape, size=(6, 6), residual=False, activation="none")
    spoil(case.weight, math.inf)
    kept = slice(6, -1)
    exact = case.double().eager(conv_of_taps)
    finite = case.map(lambda t: t.nan_to_num(0, 0, 0))
    assert_error_rule(case.fused()[:, kept], finite.eager()[:, kept], exact[:, kept])


def test_weights_that_change():
    """Finite, not, and finite again, by writes that torch sees and by one it does not see."""
    case = make_conv_case(ConvShape(16, 24, (3, 3), padding=(1, 1)), residual=False)
    kept = case.weight.clone()
    finite = case.fused()
    case.weight[5, 0, 0, 0] = math.inf
    assert_right(case.fused(), case.double().eager(conv_of_taps), torch.float32)
    case.weight.copy_(kept)
    assert torch.equal(case.fused(), finite)
    case.weight.data[:, :, 0, 0] = math.inf
    assert_right(case.fused(), case.double().eager(conv_of_taps), torch.float32)


@pytest.mark.parametrize(
    "isa",
    [
        "avx2",
        "amx_emulated",
        pytest.param("avx512", marks=pytest.mark.whole),
        pytest.param("avx512bf16_emulated", marks=pytest.mark.whole),
    ],
)
@pytest.mark.ahead(lambda isa: rerun_on_instruction_set(isa, __file__, "not other_processors"))
def test_other_processors(isa, ahead):
    ahead()
