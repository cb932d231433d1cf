"""The native convolution's tiles of pixels: whole ones, what is left of them, and few in all."""

import pytest
import torch
from support import ConvShape, make_conv_case

from fused_resnet.testing import assert_error_rule

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(
        not torch.ops.fused_resnet.conv_isa(), reason="the library's convolution runs everything"
    ),
]

# Output channels, of all groups: of less than a vector, a vector, two, and a vector behind two; of
# groups that share a vector, and that have one each.
CHANNELS = [(5, 1), (8, 1), (16, 1), (24, 1), (32, 8), (32, 4)]


@pytest.mark.parametrize(("channels", "groups"), CHANNELS)
@pytest.mark.parametrize("kernel_size", [1, 3])
def test_every_number_of_pixels(kernel_size, channels, groups):
    shape = ConvShape(
        in_channels=4 * groups,
        out_channels=channels,
        kernel_size=(kernel_size, kernel_size),
        padding=(kernel_size // 2, kernel_size // 2),
        groups=groups,
    )
    for width in range(1, 30):
        for height in (1, 3):
            case = make_conv_case(shape, size=(height, width), residual=True, device="cpu")
            assert_error_rule(case.fused(), case.eager(), case.double().eager())


# Pixels, or every other one, that are 4096 bytes apart: those of a tile share a set of the cache,
# and are gathered with a gap behind each. In float32 and, the last two, in bfloat16.
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (ConvShape(1024, 40, (1, 1)), torch.float32),
        (ConvShape(1024, 40, (1, 1), stride=(1, 2)), torch.float32),
        (ConvShape(2048, 66, (1, 1), groups=2), torch.float32),
        (ConvShape(512, 40, (3, 3), stride=(2, 2), padding=(1, 1)), torch.float32),
        (ConvShape(512, 40, (1, 3), stride=(1, 2), padding=(0, 2), dilation=(1, 2)), torch.float32),
        (ConvShape(2048, 40, (1, 1)), torch.bfloat16),
        (ConvShape(1024, 40, (2, 3), stride=(1, 2), padding=(0, 1)), torch.bfloat16),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=str)
def test_pixels_that_share_a_set_of_the_cache(shape, dtype, memory_format):
    case = make_conv_case(
        shape, size=(5, 9), residual=True, device="cpu", dtype=dtype, memory_format=memory_format
    )
    assert_error_rule(case.fused(), case.eager(), case.double().eager())


# Groups that share a vector, by filters three taps wide: every one of their tiles' columns is under
# the taps of up to three outputs. Of 2, 4 and 8 output channels, and of fewer input channels.
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize(
    ("in_channels", "out_channels", "groups"), [(40, 40, 20), (24, 48, 12), (40, 40, 5)]
)
def test_groups_that_share_a_vector(in_channels, out_channels, groups, stride):
    shape = ConvShape(
        in_channels, out_channels, (2, 3), stride, padding=(1, 1), dilation=(2, 1), groups=groups
    )
    for width in (1, 2, 7, 13, 14, 15, 29):
        case = make_conv_case(shape, size=(5, width), residual=width % 2 == 0, device="cpu")
        assert_error_rule(case.fused(), case.eager(), case.double().eager())
