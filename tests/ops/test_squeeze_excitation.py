"""`ops.squeeze_excitation`: values, and what keeps it from running as one."""

import pytest
import torch
from support import dtype_id

from fused_resnet import backends, reference
from fused_resnet.layers.description import GATES, SqueezeExcitation
from fused_resnet.ops.squeeze_excitation import squeeze_excitation
from fused_resnet.testing import assert_error_rule

NATIVE = pytest.mark.skipif(
    not torch.ops.fused_resnet.conv_isa(),
    reason="no native kernels, or left out by FUSED_RESNET_CPU_ISA",
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, C, R, H, W: rows that fill vectors and that don't, more images than are multiplied at once.
SHAPES = [
    (1, 72, 24, 7, 7),
    (6, 16, 9, 5, 3),
    (2, 3, 1, 4, 4),
    (9, 200, 50, 1, 1),
    (1, 96, 8, 1, 6),
]


def layers(C, R, dtype=torch.float32, activation="relu", gate="sigmoid"):
    torch.manual_seed(3)
    reduce, expand = torch.randn(R, C, 1, 1) / C**0.5, torch.randn(C, R, 1, 1) / R**0.5
    tensors = (reduce, torch.randn(R), expand, torch.randn(C))
    return SqueezeExcitation(*(tensor.to(dtype) for tensor in tensors), activation, gate)


def double(described):
    tensors = [None if t is None else t.double() for t in described[:4]]
    return SqueezeExcitation(*tensors, *described[4:])


@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["relu", "silu", "hardswish", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error(shape, activation, gate, dtype):
    """In both formats, with and without biases; the output lies as eager's does."""
    N, C, R, H, W = shape
    x = (2 * torch.randn(N, C, H, W)).to(dtype)
    described = layers(C, R, dtype, activation, gate)
    with torch.inference_mode():
        for input in (x, x.to(memory_format=torch.channels_last)):
            for one in (described, described._replace(reduce_bias=None, expand_bias=None)):
                out = squeeze_excitation(input, one)
                expected = reference.squeeze_excitation(input, one)
                assert out.dtype is dtype
                assert out.stride() == expected.stride()
                exact = reference.squeeze_excitation(input.double(), double(one))
                assert_error_rule(out, expected, exact)


@NATIVE
@pytest.mark.parametrize("gate", GATES)
def test_nan_and_infinity(gate):
    """They reach the images and channels that they reach in torch."""
    described = layers(40, 8, gate=gate)
    x = torch.randn(3, 40, 4, 4)
    x[1, 5, 2, 3] = float("nan")
    x[2, 7, 0, 0] = float("inf")
    described.reduce[:, 7] = 0
    with torch.inference_mode():
        out, expected = squeeze_excitation(x, described), reference.squeeze_excitation(x, described)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.flatten(1).isnan().all(1).tolist() == [False, True, True]


@NATIVE
def test_what_it_leaves_alone():
    """Nothing where torch's operators are to run, or to complain."""
    described, x = layers(40, 8), torch.randn(2, 40, 4, 4)
    described.expand.requires_grad_()
    assert squeeze_excitation(x, described) is None
    with torch.inference_mode():
        described = described._replace(expand=described.expand.detach())
        assert squeeze_excitation(x, described) is not None
        for input in (x[0], x[:0], x.double(), x[:, 1:], x[..., ::2], x.half()):
            assert squeeze_excitation(input, described) is None
        reduce, bias = described.reduce, described.expand_bias
        for change in (
            {"reduce": reduce.half()},
            {"reduce": reduce[:7]},
            {"reduce": reduce[..., 0]},
            {"reduce": reduce.transpose(0, 1).contiguous().transpose(0, 1)},
            {"expand_bias": bias[1:]},
            {"expand_bias": bias[:, None]},
            {"expand_bias": torch.stack([bias, bias], 1)[:, 0]},
            {"reduce_bias": bias},
        ):
            assert squeeze_excitation(x, described._replace(**change)) is None, change
        with torch.autocast("cpu", torch.bfloat16):
            assert squeeze_excitation(x, described) is None
        with backends.use_backend("reference"):
            out = squeeze_excitation(x, described)
    assert torch.equal(out, reference.squeeze_excitation(x, described))
