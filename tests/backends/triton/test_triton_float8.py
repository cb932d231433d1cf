"""The Triton kernels of float8_e4m3fn against what `reference.float8_residual_blocks` allows."""

import importlib.util

import pytest
import torch
from support.float8 import bounds
from support.quantized_blocks import SHAPES, conv, images, laid_out_images

import fused_resnet
from fused_resnet import backends, reference
from fused_resnet.layers.quantized import Quantization, QuantizedBlock
from fused_resnet.testing import relative_error

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STORED, OUTPUT = Quantization(0.05), Quantization(0.25)
# A layer, its projection or None for a shortcut that is the input, and the input's shape.
LAYERS = {
    "many channels": lambda g: (conv(g, 140, 140, 1), None, (2, 140, 5, 4)),
    "more pixels than a tile": lambda g: (conv(g, 5, 5), None, (3, 5, 13, 11)),
    "stride, dilation": lambda g: (
        conv(g, 24, 20, 3, 2, (2, 2), 2),
        conv(g, 24, 20, 1, 2),
        (1, 20, 11, 9),
    ),
    "groups": lambda g: (conv(g, 18, 18, groups=6), None, (2, 18, 6, 5)),
    "a projection": lambda g: (conv(g, 40, 33, 3, 2), conv(g, 40, 33, 1, 2), (1, 33, 9, 7)),
    "a wide tile": lambda g: (conv(g, 128, 128, 1), None, (1, 128, 8, 8)),
}


def moved(layer, device):
    tensors = {name: getattr(layer, name).to(device) for name in ("weight", "scale", "shift")}
    return layer._replace(**tensors)


def in_float8(block):
    """On the device, weights of a block in int8 as the nearest numbers."""
    layers = (c._replace(weight=c.weight.float().to(torch.float8_e4m3fn)) for c in block.convs)
    return block._replace(convs=tuple(moved(layer, DEVICE) for layer in layers))


def run(input, blocks, output=OUTPUT):
    with fused_resnet.use_backend("triton"):
        backend = backends.choose(DEVICE)
        assert backend.name == "triton"
        out = backend.float8_residual_blocks(input.to(DEVICE), blocks, STORED, output)
    assert out.dtype is input.dtype
    return out.cpu()


@pytest.fixture(autouse=True)
def without_the_reference(monkeypatch):
    """What runs is a kernel; some GPUs have none."""

    def refuse(*arguments):
        raise AssertionError("the library ran")

    if DEVICE == "cpu":
        monkeypatch.setattr(backends.backend.Backend, "float8_residual_blocks", refuse)


@pytest.mark.parametrize("name", LAYERS)
def test_every_number_is_within_the_bound(name):
    rng = torch.Generator().manual_seed(len(name))
    layer, projection, shape = LAYERS[name](rng)
    layers = (layer,) if projection is None else (layer, projection)
    block = in_float8(QuantizedBlock(layers, projection is not None, 0.75))
    x = images(rng, *shape)
    found = (run(x, [block]) / OUTPUT.step).double().numpy()
    on_cpu = block._replace(convs=tuple(moved(each, "cpu") for each in block.convs))
    low, high = bounds(x, on_cpu, STORED.step)
    assert ((low <= found) & (found <= high)).all()
    assert (low == high).mean() > 0.9
    assert len(set(found.ravel().tolist())) > 30


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.single
def test_blocks_are_nearly_the_reference(name):
    """A number that sums in another order round to its neighbour changes some behind it."""
    rng = torch.Generator().manual_seed(len(name))
    blocks, shape = SHAPES[name](rng)
    blocks = [in_float8(block) for block in blocks]
    x = images(rng, *shape)
    out = run(x, blocks)
    expected = reference.float8_residual_blocks(x.to(DEVICE), blocks, STORED, OUTPUT).cpu()
    assert (out != expected).double().mean() < 0.02
    assert relative_error(out, expected) < 2**-7
    assert out.stride() == expected.stride()
    assert expected.unique().numel() > 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels_last", "every other", "expanded"])
@pytest.mark.single
def test_inputs_of_all_kinds(dtype, layout):
    rng = torch.Generator().manual_seed(3)
    blocks = [in_float8(QuantizedBlock((conv(rng, 6, 6), conv(rng, 6, 6)), False, 0.9))]
    input = laid_out_images(rng, layout, dtype)
    expected = reference.float8_residual_blocks(input.to(DEVICE), blocks, STORED, OUTPUT).cpu()
    out = run(input, blocks)
    assert (out != expected).double().mean() < 0.02
    assert relative_error(out, expected) < 2**-7


def test_what_is_not_finite_or_large():
    """NaN stays NaN, where it is read and nowhere else; infinities become the ends."""
    rng = torch.Generator().manual_seed(4)
    block = in_float8(QuantizedBlock((conv(rng, 8, 8), conv(rng, 8, 8)), False, 0.9))
    input = images(rng, 2, 8, 9, 9)
    input[0, 0, 0, 0] = torch.nan
    input[0, 1, 8, 8] = torch.inf
    input[1, 2, 3, 3] = -torch.inf
    input[1, 3, 1] = 1e30
    expected = reference.float8_residual_blocks(input.to(DEVICE), [block], STORED, OUTPUT).cpu()
    out = run(input, [block])
    assert torch.equal(out.isnan(), expected.isnan())
    assert 0 < out.isnan().sum() <= 8 * 25
    assert (out.nan_to_num() != expected.nan_to_num()).double().mean() < 0.02
    assert out.nan_to_num().max() == 448 * OUTPUT.step


@pytest.mark.parametrize("shape", [(0, 6, 7, 7), (2, 6, 1, 1)])
def test_no_images_and_single_pixels(shape):
    rng = torch.Generator().manual_seed(5)
    blocks = [in_float8(QuantizedBlock((conv(rng, 6, 6), conv(rng, 6, 6)), False, 0.9))]
    x = images(rng, *shape)
    expected = reference.float8_residual_blocks(x.to(DEVICE), blocks, STORED, OUTPUT).cpu()
    assert run(x, blocks).shape == expected.shape
    torch.testing.assert_close(run(x, blocks), expected, rtol=2**-3, atol=0)


def test_gpus_that_do_not_know_the_numbers(monkeypatch):
    """Below compute capability 8.9 the library runs, and `explain` says so."""
    rng = torch.Generator().manual_seed(6)
    blocks = [in_float8(QuantizedBlock((conv(rng, 6, 6), conv(rng, 6, 6)), False, 0.9))]
    name = "float8_residual_blocks"
    assert "float8_e4m3fn activations" in backends.triton.explain(name, dtype=torch.float16)
    monkeypatch.setattr(backends.triton, "_knows_float8", lambda device=None: False)
    assert "torch's operators" in backends.triton.explain(name, dtype=torch.float16)
    with pytest.raises(AssertionError, match="the library ran"):
        run(images(rng, 1, 6, 5, 5), blocks)
