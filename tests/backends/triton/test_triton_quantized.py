"""The Triton kernels of eight bits against the integers of `reference.py`, bit for bit."""

import gc
import importlib.util

import pytest
import torch
from support import assert_same_bits
from support.quantized_blocks import SHAPES, conv, images, laid_out_images

import fused_resnet
from fused_resnet import backends, reference
from fused_resnet.layers.quantized import Quantization, QuantizedBlock, QuantizedConv

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


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


@pytest.mark.parametrize("zero_point", [0, 1, 77, 255])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.single
def test_the_same_bits(name, zero_point):
    rng = torch.Generator().manual_seed(len(name))
    blocks, shape = SHAPES[name](rng)
    check(images(rng, *shape), blocks, Quantization(0.05, zero_point), device())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "every other", "expanded"])
@pytest.mark.single
def test_inputs_of_all_kinds(dtype, layout):
    rng = torch.Generator().manual_seed(3)
    blocks, _ = SHAPES["one block on the other"](rng)
    input = laid_out_images(rng, layout, dtype)
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
