"""The Triton kernels of eight bits against the integers of `reference.py`, bit for bit."""

import gc
import importlib.util

import pytest
import torch
from support import assert_same_bits

import fused_resnet
from fused_resnet import backends, reference
from fused_resnet.layers.quantized import Quantization, QuantizedBlock, QuantizedConv

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def conv(rng, filters, channels, size=3, stride=1, padding=None, dilation=1, groups=1):
    """A convolution whose outputs fill the 256 steps and go beyond both ends."""
    (R, S), (p, q) = (size, size) if isinstance(size, int) else size, (0, 0)
    p, q = (dilation * (R // 2), dilation * (S // 2)) if padding is None else padding
    shape = (filters, channels // groups, R, S)
    weight = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)
    depth = weight[0].numel()
    scale = (torch.rand(filters, generator=rng) + 0.5) / (depth**0.5 * 80)
    shift = 80 * torch.randn(filters, generator=rng) + 60
    step = (stride, stride) if isinstance(stride, int) else stride
    return QuantizedConv(weight, scale, shift, step, (p, q), (dilation, dilation), groups)


def check(input, blocks, stored, device="cpu"):
    output = Quantization(0.03)
    expected = reference.quantized_residual_blocks(input, blocks, stored, output)
    on = lambda layer: layer._replace(  # noqa: E731
        weight=layer.weight.to(device), scale=layer.scale.to(device), shift=layer.shift.to(device)
    )
    blocks = [block._replace(convs=tuple(map(on, block.convs))) for block in blocks]
    with fused_resnet.use_backend("triton"):
        backend = backends.choose(device)
        out = backend.quantized_residual_blocks(input.to(device), blocks, stored, output)
    assert out.dtype is input.dtype
    if expected.numel() > 0 and expected.shape[2:].numel() > 1:
        assert out.stride() == expected.stride()
    assert_same_bits(out.cpu(), expected)
    if expected.numel() > 100:
        assert expected.unique().numel() > 30


def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def images(rng, *shape, dtype=torch.float32):
    return (4 * torch.randn(shape, generator=rng)).to(dtype)


SHAPES = {
    "more channels than a step": lambda g: (
        [QuantizedBlock((conv(g, 150, 140, 1), conv(g, 140, 150, 1)), False, 0.7)],
        (2, 140, 3, 3),
    ),
    "more pixels than a tile": lambda g: (
        [QuantizedBlock((conv(g, 5, 3), conv(g, 3, 5)), False, 1.3)],
        (3, 3, 13, 11),
    ),
    "bottleneck with a projection": lambda g: (
        [
            QuantizedBlock(
                (conv(g, 8, 20, 1), conv(g, 8, 8, 3, 2), conv(g, 24, 8, 1), conv(g, 24, 20, 1, 2)),
                True,
                1.0,
            )
        ],
        (2, 20, 7, 9),
    ),
    "groups that fill no tile": lambda g: (
        [QuantizedBlock((conv(g, 12, 18, 3, groups=6), conv(g, 18, 12, 1)), False, 0.4)],
        (1, 18, 6, 5),
    ),
    "filters that are not square, dilation, uneven steps": lambda g: (
        [
            QuantizedBlock(
                (
                    conv(g, 6, 6, (1, 5), (1, 1), (0, 4), 2),
                    conv(g, 9, 6, (5, 2), (3, 2), (2, 1)),
                    conv(g, 9, 6, 1, (3, 2)),
                ),
                True,
                1.0,
            )
        ],
        (2, 6, 8, 9),
    ),
    "one block on the other": lambda g: (
        [
            QuantizedBlock((conv(g, 6, 6), conv(g, 6, 6)), False, 0.9),
            QuantizedBlock((conv(g, 8, 6, 3, 2), conv(g, 8, 8), conv(g, 8, 6, 1, 2)), True, 1.0),
            QuantizedBlock((conv(g, 8, 8),), False, 1.1),
        ],
        (2, 6, 7, 7),
    ),
}


@pytest.mark.parametrize("zero_point", [0, 1, 77, 255])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits(name, zero_point):
    rng = torch.Generator().manual_seed(len(name))
    blocks, shape = SHAPES[name](rng)
    check(images(rng, *shape), blocks, Quantization(0.05, zero_point), device())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "every other", "expanded"])
def test_inputs_of_all_kinds(dtype, layout):
    rng = torch.Generator().manual_seed(3)
    blocks, shape = SHAPES["one block on the other"](rng)
    input = images(rng, *shape, dtype=dtype)
    if layout == "channels_last":
        input = input.to(memory_format=torch.channels_last)
    elif layout == "every other":
        input = images(rng, 2, 12, 7, 14, dtype=dtype)[:, ::2, :, ::2]
    else:
        input = input[:1].expand(2, -1, -1, -1)
    check(input, blocks, Quantization(0.06, 120), device())


def test_what_is_not_finite_or_large():
    """NaN becomes the smallest byte, infinities the ends."""
    rng = torch.Generator().manual_seed(4)
    blocks, shape = SHAPES["one block on the other"](rng)
    input = images(rng, *shape)
    input[0, 0, 0] = torch.nan
    input[0, 1, 2, 3] = torch.inf
    input[1, 2, 3, 3] = -torch.inf
    input[1, 3, 1] = 1e30
    check(input, blocks, Quantization(0.05, 33), device())


def test_halves_are_rounded_to_even():
    """Sums of exact halves, in the input's rounding and in the epilogue's."""
    weight = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    layer = QuantizedConv(weight, torch.tensor([0.5]), torch.zeros(1), (1, 1), (0, 0), (1, 1), 1)
    input = torch.arange(64.0).view(1, 1, 8, 8) / 4
    blocks = [QuantizedBlock((layer,), False, 0.0)]
    output = Quantization(1.0)
    with fused_resnet.use_backend("triton"):
        backend = backends.choose(device())
        moved = layer._replace(**{k: getattr(layer, k).to(device()) for k in layer._fields[:3]})
        blocks = [QuantizedBlock((moved,), False, 0.0)]
        out = backend.quantized_residual_blocks(
            input.to(device()), blocks, Quantization(0.5, 0), output
        )
    steps = (input / 0.5).round()  # torch's round is to even
    assert_same_bits(out.cpu(), (steps * 0.5).round())


@pytest.mark.parametrize("shape", [(0, 6, 7, 7), (2, 6, 1, 1)])
def test_no_images_and_single_pixels(shape):
    rng = torch.Generator().manual_seed(5)
    blocks, _ = SHAPES["one block on the other"](rng)
    check(images(rng, *shape), blocks, Quantization(0.05, 9), device())


def test_copies_of_weights_go_with_them():
    from fused_resnet.backends.triton import quantized

    rng = torch.Generator().manual_seed(6)
    gc.collect()
    before = len(quantized._cache)
    blocks, shape = SHAPES["more pixels than a tile"](rng)
    check(images(rng, *shape), blocks, Quantization(0.05, 9))
    assert len(quantized._cache) == before + 2
    del blocks
    gc.collect()
    assert len(quantized._cache) == before


def test_a_wide_projection_is_left_to_the_reference():
    rng = torch.Generator().manual_seed(7)
    block = QuantizedBlock((conv(rng, 8, 6, 3, 2), conv(rng, 8, 6, 3, 2)), True, 1.0)
    check(images(rng, 1, 6, 6, 6), [block], Quantization(0.05, 9), device())
