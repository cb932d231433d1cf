"""3x3 convolutions of stride 1 with fewer products, by Winograd's filtering."""

import math
import os

import pytest
import torch
from support import (
    ConvShape,
    assert_same_nonfinite,
    assert_within_bound,
    conv_layouts,
    conv_of_taps,
    make_conv_case,
    make_norm_conv_case,
    relative_error,
    rerun_on_instruction_set,
    run_python,
)
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet.backends import explain
from fused_resnet.functional import conv_bn_act
from fused_resnet.testing import assert_error_rule

ISA = torch.ops.fused_resnet.conv_isa()
ON_VECTORS = bool(ISA) and torch.ops.fused_resnet.conv_tile_isa() == ""
needs_vectors = pytest.mark.skipif(
    not ON_VECTORS or os.environ.get("FUSED_RESNET_CPU_WINOGRAD") == "0",
    reason="no convolution runs on vectors here, or FUSED_RESNET_CPU_WINOGRAD=0",
)


def shape_of(c, k, padding=(1, 1)):
    return ConvShape(c, k, (3, 3), padding=padding)


# Whole blocks of output channels and parts of one and of a vector, channels that end inside a
# vector, sums of more than one chunk, padding of none, of one axis and beyond the filter.
SHAPES = [
    shape_of(64, 64),
    shape_of(33, 70, (0, 0)),
    shape_of(48, 48, (2, 1)),
    shape_of(131, 41, (0, 5)),
    shape_of(256, 32),
]


def explained(case):
    return explain(
        "conv_bn_act",
        device=torch.device("cpu"),
        dtype=case.input.dtype,
        weight_shape=case.weight.shape,
        input_shape=case.input.shape,
        stride=case.stride,
        padding=case.padding,
        dilation=case.dilation,
        groups=case.groups,
    )


@needs_vectors
@pytest.mark.quick
@pytest.mark.parametrize("size", [(9, 14), (14, 9), (3, 37)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_and_sizes(shape, size):
    for residual, activation, bias in ((True, "none", True), (False, "relu", False)):
        case = make_conv_case(
            shape, batch=3, size=size, residual=residual, activation=activation, bias=bias
        )
        if size[0] > 3:
            assert f"({ISA}, Winograd)" in explained(case)
        expected, eager, bound = case.double().eager(), case.eager(), case.rounding_bound()
        for x in conv_layouts(case.input):
            case.input = x
            assert_within_bound(case.fused(), expected, bound)
            assert_error_rule(case.fused(), eager, expected)
        if residual:
            case.residual = case.residual.contiguous()
            assert_within_bound(case.fused(), expected, bound)


@needs_vectors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bits(dtype):
    for shape in SHAPES[:4]:
        case = make_conv_case(shape, size=(12, 11), dtype=dtype)
        assert_error_rule(case.fused(), case.eager(), case.double().eager())


@needs_vectors
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_prologue(shape):
    case = make_norm_conv_case(shape, size=(11, 10))
    expected, bound = case.double().eager(), case.rounding_bound()
    for x in conv_layouts(case.input):
        case.input = x
        assert_within_bound(case.fused(), expected, bound)


@needs_vectors
def test_narrow_residuals():
    """Channels in the middle have a residual, blocks at both ends of them have it in part."""
    case = make_conv_case(shape_of(40, 72), size=(11, 12))
    whole = case.residual
    for channels in (40, 8):
        case.residual = whole[:, :channels].contiguous(memory_format=torch.channels_last)
        found = case.fused()
        padded = torch.zeros_like(whole)
        padded[:, (72 - channels) // 2 :][:, :channels] = case.residual
        case.residual = padded
        assert_within_bound(found, case.double().eager(), case.rounding_bound())


@needs_vectors
def test_any_threads_and_images():
    """More tiles than a task takes, and channels that threads divide: the same bits."""
    threads = torch.get_num_threads()
    for shape, size, batch in (
        (shape_of(64, 64), (40, 41), 4),
        (shape_of(300, 512), (7, 7), 4),
        (shape_of(640, 96), (13, 6), 3),
    ):
        case = make_conv_case(shape, batch=batch, size=size)
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(case.fused())
        torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert_error_rule(found[0], case.eager(), case.double().eager())
        # A residual block takes some images at a time.
        case.input, case.residual = case.input[1:], case.residual[1:]
        if "Winograd" in explained(case):
            assert torch.equal(case.fused(), found[0][1:])


@needs_vectors
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_values_that_are_not_finite(shape):
    """Each stays with the outputs that read it, though it is in sums of all of a tile's."""
    for value in (math.inf, -math.inf, math.nan, 3e38, 1e25):
        case = make_conv_case(shape, size=(13, 11), activation="none")
        case.input.permute(0, 2, 3, 1)[:, 2, 1::9, -1] = value
        case.input.permute(0, 2, 3, 1)[:, 9, 3, 0] = value
        expected = case.double().eager()
        actual = case.fused()
        assert_same_nonfinite(actual, case.eager())
        usual = expected.abs() < 1e6
        assert usual.any()
        assert not usual.all()
        assert relative_error(actual[usual], expected[usual]) <= 1e-6


@needs_vectors
@pytest.mark.parametrize("channels", [256, 512])
def test_long_sums_are_taken_in_parts(channels):
    """Of many inputs, all positive: parts of 64 channels have 2.4e-7 and more, of 128 3.2e-7."""
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(2, channels, 14, 14, generator=generator).relu()
    weight = torch.randn(64, channels, 3, 3, generator=generator) / (9 * channels) ** 0.5
    with torch.no_grad():
        out = conv_bn_act(
            x, weight, torch.zeros(64), torch.ones(64), eps=0.0, padding=1, activation="none"
        )
    exact = torch.conv2d(x.double(), weight.double(), padding=1)
    assert relative_error(out, exact) < 2.35e-7


@needs_vectors
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
@pytest.mark.parametrize("value", [10.0, 100.0, 1e4, 1e8], ids=str)
def test_values_that_differ(value, shape):
    """An output that a large input is not in is as exact as where there is none."""
    case = make_conv_case(shape, size=(13, 11), residual=False, activation="none", bias=False)
    case.input.permute(0, 2, 3, 1)[:, 2, 1::9, -1] = value
    case.input.permute(0, 2, 3, 1)[:, 9, 3, 0] = value
    one = torch.ones(1, 1, 3, 3)
    large = (case.input.abs() >= value).any(1, keepdim=True).float()
    apart = torch.nn.functional.conv2d(large, one, padding=shape.padding) == 0
    assert apart.any()
    assert not apart.all()
    # What the norm would add is none of the convolution's.
    case.running_mean.zero_()
    case.bn_bias.zero_()
    expected, actual = case.double().eager(), case.fused()
    apart = apart.expand_as(expected)
    assert relative_error(actual[apart], expected[apart]) <= 1e-6
    assert relative_error(actual, expected) <= 1e-6


@needs_vectors
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_weights_that_are_not_finite(value):
    """Beyond the image they meet nothing, and other channels are as ever."""
    case = make_conv_case(shape_of(40, 48), size=(13, 11), residual=False, activation="none")
    before = case.fused()
    case.weight[5, 3, 0, 1] = value
    exact = case.double()
    actual = case.fused()
    assert_same_nonfinite(actual, exact.eager(conv_of_taps))
    others = [k for k in range(48) if k != 5]
    assert relative_error(actual[:, others], before[:, others]) <= 1e-6


@needs_vectors
def test_blocks():
    """In one call, with few images at a time: as exact as eager, and the same bits one by one."""
    blocks = torch.nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64)).eval()
    fused_resnet.testing.randomize_(blocks)
    x = torch.randn(5, 64, 33, 30).relu().contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        eager = blocks(x)
        expected = blocks.double()(x.double())
        fused_resnet.fuse(blocks.float())
        actual = blocks(x)
        assert_error_rule(actual, eager, expected)
        assert torch.equal(actual, blocks[1](blocks[0](x)))


_BITS = """
import hashlib, torch
from support import ConvShape, make_conv_case
case = make_conv_case(ConvShape(64, 64, (3, 3), padding=(1, 1)), size=(9, 14))
print(hashlib.sha256(case.fused().numpy().tobytes()).hexdigest())
"""


def bits_and_explanations():
    """With it, as ever, without it, and with a choice that there is not."""
    code = (
        _BITS
        + "import fused_resnet\nprint(fused_resnet.backends.explain('conv_bn_act', \
        device=torch.device('cpu'), dtype=torch.float32, weight_shape=case.weight.shape))"
    )
    wrong = "import torch, fused_resnet\ntry:\n    torch.ops.fused_resnet.tiles_for_winograd(\
[64, 64, 3, 3], [1, 1], [1, 1], 1, False)\nexcept RuntimeError as error:\n    print(error)"
    return [
        run_python(what, FUSED_RESNET_CPU_WINOGRAD=choice).split("\n")
        for what, choice in ((code, "1"), (code, ""), (code, "0"), (wrong, "no"))
    ]


@pytest.mark.skipif(not ON_VECTORS, reason="no convolution runs on vectors here")
@pytest.mark.ahead(lambda: bits_and_explanations())
def test_it_can_be_left_out(ahead):
    """With FUSED_RESNET_CPU_WINOGRAD=0 other bits, and nothing says that it runs."""
    with_it, as_ever, without, message = ahead()
    assert with_it[0] != without[0]
    assert with_it == as_ever
    assert "Winograd from" in with_it[1]
    assert "Winograd" not in without[1]
    assert "FUSED_RESNET_CPU_WINOGRAD is 'no', must be 0 or 1" in message[0]


@pytest.mark.parametrize("isa", ["avx512", "avx2"])
@pytest.mark.ahead(
    lambda isa: rerun_on_instruction_set(
        isa, __file__, "not processors and not left_out", FUSED_RESNET_CPU_WINOGRAD="1"
    )
)
def test_processors(isa, ahead):
    """This file's cases, on as much and on less than this processor has."""
    ahead()
