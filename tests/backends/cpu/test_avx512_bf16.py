"""The convolution of pairs of bfloat16: on AVX512_BF16 where there is one, and emulated."""

import math
import os
from pathlib import Path

import pytest
import torch
from support import (
    STEM,
    ConvShape,
    assert_same_nonfinite,
    conv_digests,
    conv_units,
    make_conv_case,
    relative_error,
    rerun_on_instruction_set,
)

import fused_resnet
from fused_resnet.measure.environment import describe_device

PAIRS = torch.ops.fused_resnet.conv_pair_isa()
needs_pairs = pytest.mark.skipif(
    not PAIRS, reason="no AVX512_BF16, or AMX; run again with the instruction emulated"
)
HAS_INSTRUCTION = "avx512_bf16" in describe_device(torch.device("cpu"))["flags"]
needs_avx512bf16 = pytest.mark.skipif(
    not HAS_INSTRUCTION, reason="this processor has no AVX512_BF16"
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
    conv_units.check_layouts(shape, size, BF16)


@needs_pairs
def test_many_tasks():
    conv_units.check_many_tasks(BF16)


@needs_pairs
@pytest.mark.parametrize("channels_last", [True, False])
def test_stem_with_its_pool(channels_last):
    conv_units.check_stem_with_its_pool(channels_last, BF16)


@needs_pairs
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (0, 3, 6, 7, 8, 9, 14, 15)], ids=str)
def test_prologue(shape):
    conv_units.check_prologue(shape, BF16)


@needs_pairs
@pytest.mark.parametrize("add", [False, True])
def test_gradient_in_the_input(add):
    conv_units.check_gradient_in_the_input(add, BF16)


@needs_pairs
def test_forward_in_training():
    conv_units.check_forward_in_training(BF16, 2, (13, 11))


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
    conv_units.check_explanation(PAIRS)
    explain = fused_resnet.backends.explain
    for dtype in (torch.float32, torch.float16):
        where = {"device": torch.device("cpu"), "dtype": dtype, "weight_shape": (64, 64, 3, 3)}
        assert PAIRS not in explain("conv_bn_act", **where)


@pytest.mark.skipif(
    not HAS_INSTRUCTION or bool(os.environ.get("FUSED_RESNET_CPU_ISA")),
    reason="this processor has no AVX512_BF16, or what it has is not what is used",
)
def test_where_the_instruction_is_slow():
    """Intel's issue it every second cycle: there bfloat16 is multiplied as float32."""
    is_intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    on_tiles = torch.ops.fused_resnet.conv_tile_isa() != ""
    assert ("" if is_intel or on_tiles else "avx512bf16") == PAIRS


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


@needs_avx512bf16
@pytest.mark.skipif(PAIRS == "avx512bf16", reason="they have just run on it")
@pytest.mark.ahead(lambda: rerun_on_instruction_set("avx512bf16", __file__, "not emulat"))
def test_with_the_instruction_not_emulated(ahead):
    """This file's cases again, where the instruction is not used unless it is asked for."""
    ahead()
