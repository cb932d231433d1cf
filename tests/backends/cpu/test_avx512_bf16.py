"""The convolution of pairs of bfloat16: on AVX512_BF16 where there is one, and emulated."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import (
    STEM,
    STEM_POOL,
    ConvShape,
    assert_same_nonfinite,
    assert_within_bound,
    conv_digests,
    conv_layouts,
    make_conv_case,
    make_norm_conv_case,
    relative_error,
    rerun_on_instruction_set,
)

import fused_resnet
from fused_resnet.layers.description import Norm

PAIRS = torch.ops.fused_resnet.conv_pair_isa()
needs_pairs = pytest.mark.skipif(
    not PAIRS, reason="no AVX512_BF16, or AMX; run again with the instruction emulated"
)
needs_avx512bf16 = pytest.mark.skipif(
    PAIRS != "avx512bf16", reason="this processor has no AVX512_BF16, or AMX"
)
BF16 = torch.bfloat16

# What each part of the kernel has to get right: pixels in place and gathered, channels that end in
# the middle of a pair, one vector of output channels and two, sums of more than one chunk, dilated
# taps, groups that fill vectors, and such as share one, of channels even, odd and one.
SHAPES = [
    ConvShape(64, 64, (3, 3), padding=(1, 1)),
    ConvShape(64, 96, (3, 3), (2, 2), (1, 1)),
    ConvShape(41, 33, (3, 2), (3, 2), (1, 0)),
    ConvShape(33, 70, (3, 3), (3, 2), (2, 3), (2, 3)),
    ConvShape(32, 16, (2, 5), (2, 2), (3, 4), (4, 2)),
    ConvShape(64, 40, (1, 1), padding=(2, 3)),
    ConvShape(96, 64, (1, 1), (2, 3)),
    ConvShape(600, 24, (1, 1)),
    ConvShape(131, 7, (1, 1)),
    ConvShape(5, 48, (3, 3), (1, 2), (1, 1)),
    ConvShape(1, 32, (5, 5), padding=(2, 2), dilation=(1, 2)),
    ConvShape(96, 64, (3, 3), padding=(1, 1), groups=2),
    ConvShape(66, 64, (1, 1), groups=2),
    ConvShape(78, 96, (1, 1), groups=6),
    ConvShape(48, 64, (3, 3), (2, 1), (1, 1), groups=16),
    ConvShape(64, 64, (3, 3), padding=(1, 1), groups=16),
    ConvShape(40, 40, (3, 3), padding=(1, 1), groups=40),
    STEM,
]


@needs_pairs
@pytest.mark.quick
@pytest.mark.parametrize("size", [(7, 7), (14, 9), (1, 37)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_and_sizes(shape, size):
    reach = [d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel_size, strict=True)]
    size = tuple(map(max, size, reach))
    for batch, residual, activation in ((1, True, "none"), (3, False, "relu")):
        case = make_conv_case(
            shape, batch=batch, size=size, dtype=BF16, residual=residual, activation=activation
        )
        expected, bound = case.double().eager(), case.rounding_bound()
        for x in conv_layouts(case.input):
            case.input = x
            assert_within_bound(case.fused(), expected, bound)
        if residual:
            case.residual = case.residual.contiguous()
            assert_within_bound(case.fused(), expected, bound)


@needs_pairs
def test_many_tasks():
    """More rows than a task takes, weights that do not stay in the cache, on any threads."""
    threads = torch.get_num_threads()
    for shape, size, batch in (
        (ConvShape(64, 64, (3, 3), padding=(1, 1)), (40, 41), 4),
        (ConvShape(512, 1040, (3, 3), padding=(1, 1)), (3, 5), 2),
        (ConvShape(64, 256, (1, 1)), (40, 41), 3),
        (ConvShape(288, 64, (1, 1), (2, 2)), (21, 19), 5),
    ):
        case = make_conv_case(shape, batch=batch, size=size, dtype=BF16)
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(case.fused())
        torch.set_num_threads(threads)
        assert torch.equal(*found)
        assert_within_bound(found[0], case.double().eager(), case.rounding_bound())


@needs_pairs
@pytest.mark.parametrize("channels_last", [True, False])
def test_stem_with_its_pool(channels_last):
    for size in ((33, 70), (20, 9)):
        case = make_conv_case(STEM, size=size, batch=3, dtype=BF16, pool=STEM_POOL)
        if not channels_last:
            case.input = case.input.contiguous()
        # The pool takes the maximum of what was rounded, and rounding is monotonic.
        pool = case.pool
        case.pool = None
        expected, bound = case.double().eager(), case.rounding_bound()
        case.pool = pool
        most = F.max_pool2d(bound, **pool)
        assert_within_bound(case.fused(), F.max_pool2d(expected, **pool), most)


@needs_pairs
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 3, 6, 7, 8, 9, 14, 15)], ids=str)
def test_prologue(shape):
    case = make_norm_conv_case(shape, size=(11, 10), dtype=BF16)
    expected, bound = case.double().eager(), case.rounding_bound()
    for x in conv_layouts(case.input):
        case.input = x
        assert_within_bound(case.fused(), expected, bound)


@needs_pairs
@pytest.mark.parametrize("add", [False, True])
def test_gradient_in_the_input(add):
    """The forward's kernel with transposed weights, whose taps run backwards."""
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator).to(BF16)

    for c, k, taps, stride, padding, dilation in (
        (64, 96, (3, 3), 1, (1, 1), 1),
        (33, 21, (2, 3), 1, (1, 3), 2),
        (40, 64, (1, 1), 1, (0, 0), 1),
        (96, 32, (1, 1), 2, (0, 0), 1),
        (5, 7, (5, 1), 1, (2, 0), 1),
    ):
        weight = draw(k, c, *taps).to(memory_format=torch.channels_last)
        x = draw(2, c, 11, 9).to(memory_format=torch.channels_last)
        wide = x.double().requires_grad_()
        out = F.conv2d(wide, weight.double(), None, stride, padding, dilation)
        grad = draw(*out.shape).to(memory_format=torch.channels_last)
        out.backward(grad.double())
        before = draw(*x.shape).to(memory_format=torch.channels_last) if add else None
        expected = wide.grad + (before.double() if add else 0)
        actual = fused_resnet.backends.cpu.conv_input_gradient(
            grad, x, weight, ((stride,) * 2, padding, (dilation,) * 2, 1), before
        )
        # Sums in float32, rounded once.
        error = (actual.double() - expected).abs()
        limit = expected.abs() * torch.finfo(BF16).eps + 2e-6 * expected.abs().max()
        assert (error <= limit).all()


@needs_pairs
def test_forward_in_training():
    """The convolution, with a norm before it, and its output's statistics, on any threads."""
    cpu = fused_resnet.backends.cpu
    generator = torch.Generator().manual_seed(0)
    threads = torch.get_num_threads()
    for c, k, taps, stride, padding, groups in (
        (64, 96, 3, 1, 1, 1),
        (33, 70, 3, 2, 1, 1),
        (64, 160, 1, 1, 0, 1),
        (3, 40, 7, 2, 3, 1),
        (64, 96, 3, 1, 1, 2),
    ):
        x = torch.randn(2, c, 13, 11, generator=generator) + 1
        weight = torch.randn(k, c // groups, taps, taps, generator=generator)
        x, weight = (t.to(BF16).contiguous(memory_format=torch.channels_last) for t in (x, weight))
        bias = torch.randn(k, generator=generator).to(BF16) * 30  # a mean that is not near zero
        geometry = ((stride,) * 2, (padding,) * 2, (1, 1), groups)
        mean, bn_weight, bn_bias = torch.randn(3, c, generator=generator)
        norm = Norm(mean, torch.rand(c, generator=generator) + 0.5, bn_weight, bn_bias, 1e-5)
        for before in (None, norm):
            found = []
            for count in (1, 3):
                torch.set_num_threads(count)
                found.append(cpu.conv_batch_norm_statistics(x, weight, bias, geometry, before))
            torch.set_num_threads(threads)
            assert all(map(torch.equal, *found))
            out, mean, variance = found[0]
            h = x if before is None else cpu.batch_norm_act_inference(x, norm, None, "relu")
            exact = F.conv2d(h.double(), weight.double(), bias.double(), stride, padding, 1, groups)
            error = (out.double() - exact).abs()
            limit = exact.abs() * torch.finfo(BF16).eps + 2e-6 * exact.abs().max()
            assert (error <= limit).all()
            values = out.double().transpose(0, 1).flatten(1)
            torch.testing.assert_close(mean.double(), values.mean(1), rtol=2e-7, atol=1e-6)
            expected = values.var(1, unbiased=False)
            torch.testing.assert_close(variance.double(), expected, rtol=1e-6, atol=0)
            if before is None:
                assert torch.equal(cpu.convolution(x, weight, bias, geometry), out)


@needs_pairs
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 2, 7, 8, 14, 16, 17)], ids=str)
def test_values_that_are_not_finite(shape):
    """Each stays with the outputs that read it: what completes a pair is no value."""
    for value in (math.inf, -math.inf, math.nan):
        case = make_conv_case(shape, size=(13, 11), dtype=BF16, activation="none")
        case.input.permute(0, 2, 3, 1)[:, 2, 1::9, -1] = value
        case.input.permute(0, 2, 3, 1)[:, 9, 3, 0] = value
        expected = case.double().eager()
        actual = case.fused()
        assert_same_nonfinite(actual, expected)
        finite = expected.isfinite()
        assert finite.any()
        assert not finite.all()
        error = relative_error(actual[finite], expected[finite])
        assert error <= 1.5 * torch.finfo(BF16).eps


@needs_pairs
@pytest.mark.quick
def test_explain_names_the_unit():
    explain = fused_resnet.backends.explain
    arguments = {"device": torch.device("cpu"), "weight_shape": (64, 64, 3, 3)}
    text = explain("conv_bn_act", dtype=BF16, **arguments)
    assert text == f"cpu: native convolution ({PAIRS})"
    text = explain("norm_conv_bn_act", dtype=BF16, **arguments)
    assert text == f"cpu: native norm + convolution ({PAIRS})"
    for dtype in (torch.float32, torch.float16):
        assert PAIRS not in explain("conv_bn_act", dtype=dtype, **arguments)


# Their digests are compared.
SETS = ("avx512bf16", "avx512bf16_emulated", "avx512")


@needs_avx512bf16
@pytest.mark.ahead(lambda: conv_digests(SETS, "bfloat16"))
def test_the_emulation_has_the_instructions_bits(ahead):
    """Rounding, subnormals and the order of sums: what the emulation says is what is done."""
    unit, emulated, vectors = ahead()
    assert unit == emulated
    # And the comparison can fail: the products of float32 are not summed in pairs.
    assert unit != vectors


@pytest.mark.ahead(lambda: rerun_on_instruction_set("avx512bf16_emulated", __file__, "not emulat"))
def test_with_the_instruction_emulated(ahead):
    """This file's cases again, on any processor."""
    ahead()
