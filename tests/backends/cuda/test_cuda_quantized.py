"""The CUDA kernels of eight bits against the integers of `reference.py`, bit for bit.

On the host where there is no GPU.
"""

from __future__ import annotations

import gc
import math

import pytest
import torch
from support import assert_same_bits, unchanged
from support.quantized_blocks import SHAPES, conv, images
from torch import Tensor
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import _native, backends, reference
from fused_resnet.backends import cuda_quantized
from fused_resnet.layers.description import Pool
from fused_resnet.layers.quantized import (
    LARGEST_WORD,
    WORD_ZERO_POINT,
    Quantization,
    QuantizedBlock,
    QuantizedConv,
    QuantizedStem,
    interleaved,
    word_parts,
)
from fused_resnet.testing import randomize_

ON_HOST = backends.cuda.on_host()
if backends.cuda.available() != "yes":
    pytest.skip(f"cuda: {backends.cuda.available()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("guarded_tensors")

DEVICE = "cpu" if ON_HOST else "cuda"
OUTPUT = Quantization(0.03)
TILES = cuda_quantized.tiles()
TILE_IDS = ["{}-byte pieces, {}x{}x{}".format(*tile) for tile in TILES]


def moved(layer: QuantizedConv) -> QuantizedConv:
    weight, scale, shift = (tensor.to(DEVICE) for tensor in layer[:3])
    return layer._replace(weight=weight, scale=scale, shift=shift)


def on_device(blocks: list[QuantizedBlock]) -> list[QuantizedBlock]:
    return [block._replace(convs=tuple(map(moved, block.convs))) for block in blocks]


def assert_alike(out: Tensor, expected: Tensor, input: Tensor) -> None:
    """The same bits, in the order in memory that the input's tells, if it does."""
    assert_same_bits(out.cpu(), expected)
    if expected.numel() > 0 and expected.shape[2:].numel() > 1 and input.shape[1] > 1:
        assert out.stride() == expected.stride()


def check(
    input: Tensor,
    blocks: list[QuantizedBlock],
    stored: Quantization,
    tile: int | None = None,
    output: Quantization = OUTPUT,
) -> Tensor:
    expected = reference.quantized_residual_blocks(input, blocks, stored, output)
    blocks, given = on_device(blocks), input.to(DEVICE)
    with unchanged(input=given):
        if tile is None:
            backend = backends.named("cuda")
            out = backend.quantized_residual_blocks(given, blocks, stored, output)
        else:
            out = cuda_quantized.residual_blocks(given, blocks, stored, output, tile)
    assert out.dtype is input.dtype
    assert_alike(out, expected, input)
    return expected


@pytest.fixture
def no_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend may not fall back."""

    def refuse(*arguments: object) -> Tensor:
        raise AssertionError("the reference ran")

    monkeypatch.setattr(backends.backend.Backend, "quantized_residual_blocks", refuse)
    monkeypatch.setattr(backends.backend.Backend, "quantized_stem", refuse)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("zero_point", [0, 1, 77, 255])
@pytest.mark.parametrize("name", SHAPES)
def test_the_same_bits(name: str, zero_point: int) -> None:
    rng = torch.Generator().manual_seed(len(name))
    blocks, shape = SHAPES[name](rng)
    expected = check(images(rng, *shape), blocks, Quantization(0.05, zero_point))
    assert expected.unique().numel() > 30


def problems(tile: tuple[int, ...], rng: torch.Generator) -> list[tuple[list[QuantizedBlock], int]]:
    """Blocks at the borders of a tile, and the channels of their inputs.

    The first convolution of each is the one that the tile runs, and its output's pixels, filters
    and products are a few more than one tile and than the ring holds.
    """
    piece, _, n, depth, _, stages, projects = tile
    odd = {16: 48, 4: 20, 1: 13}[piece]
    beyond = depth * (stages + 1) // piece * piece + piece  # round the ring

    def layer(filters: int, channels: int, *rest: object, **more: object) -> QuantizedConv:
        return conv(rng, filters, channels, *rest, **more)

    found = [
        # One by itself: bytes become numbers at once.
        ([QuantizedBlock((layer(odd, odd),), False, 0.9)], odd),
        ([QuantizedBlock((layer(n + 3, odd, 1), layer(odd, n + 3, 1)), False, 0.8)], odd),
        (
            [QuantizedBlock((layer(5, beyond, 1), layer(beyond, 5, 1)), False, 0.8)],
            beyond,
        ),
        (
            [
                QuantizedBlock(
                    (
                        layer(3 * (n // 2 + 1), 3 * odd, 3, groups=3),
                        layer(3 * odd, 3 * (n // 2 + 1), 1),
                    ),
                    False,
                    0.8,
                )
            ],
            3 * odd,
        ),
        # A dilated window, most of which is padding.
        ([QuantizedBlock((layer(odd, odd, (5, 3), 1, (4, 2), 2),), False, 1.1)], odd),
    ]
    if projects:
        both = (layer(n + 16, odd, 3, 2), layer(n + 16, odd, 1, 2))
        found.append(([QuantizedBlock(both, True, 1.0)], odd))
        own_window = (layer(n + 5, odd, 1, 2), layer(n + 5, odd, 3, 2))
        found.append(([QuantizedBlock(own_window, True, 1.0)], odd))
        grouped = (layer(3 * 16, 3 * odd, groups=3), layer(3 * 16, 3 * odd, 1, groups=3))
        found.append(([QuantizedBlock(grouped, True, 1.0)], 3 * odd))
    return found


@pytest.mark.parametrize("tile", range(len(TILES)), ids=TILE_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_tile(tile: int, dtype: torch.dtype, set_seed: object) -> None:
    rng = torch.Generator().manual_seed(tile)
    m = TILES[tile][1]
    for i, (blocks, channels) in enumerate(problems(TILES[tile], rng)):
        set_seed(100 * tile + i)
        height = -(-(m + 3) // 10) if channels < 100 else 3
        x = images(rng, 1 if height > 3 else 2, channels, height, 10, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last) if i % 2 else x
        check(x, blocks, Quantization(0.05, (0, 99)[i % 2]), tile)


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "every other", "expanded", "aligned"])
def test_inputs_of_all_kinds(dtype: torch.dtype, layout: str) -> None:
    rng = torch.Generator().manual_seed(3)
    blocks, shape = SHAPES["one block on the other"](rng)
    input = images(rng, *shape, dtype=dtype)
    if layout == "channels_last":
        input = input.to(memory_format=torch.channels_last)
    elif layout == "every other":
        input = images(rng, 2, 12, 7, 14, dtype=dtype)[:, ::2, :, ::2]
    elif layout == "aligned":  # whole accesses of 16 bytes
        blocks = [QuantizedBlock((conv(rng, 16, 16), conv(rng, 16, 16)), False, 0.9)]
        input = images(rng, 2, 16, 5, 7, dtype=dtype).to(memory_format=torch.channels_last)
    else:
        input = input[:1].expand(2, -1, -1, -1)
    check(input, blocks, Quantization(0.06, 120))


@pytest.mark.parametrize("channels", [6, 16])
def test_what_is_not_finite_or_large(channels: int) -> None:
    """NaN becomes the smallest byte, infinities the ends."""
    rng = torch.Generator().manual_seed(4)
    layers = (conv(rng, channels, channels), conv(rng, channels, channels))
    blocks = [QuantizedBlock(layers, False, 0.9)]
    for format in (torch.contiguous_format, torch.channels_last):
        input = images(rng, 2, channels, 7, 7).contiguous(memory_format=format)
        input[0, 0, 0] = math.nan
        input[0, 1, 2, 3] = math.inf
        input[1, 2, 3, 3] = -math.inf
        input[1, 3, 1] = 1e30
        check(input, blocks, Quantization(0.05, 33))


def test_scales_that_are_not_finite() -> None:
    """Infinities saturate, NaN, of an infinity and a zero or of two infinities, becomes 0."""
    rng = torch.Generator().manual_seed(5)
    layer = conv(rng, 6, 6)
    layer.scale[0], layer.scale[1], layer.shift[2] = math.inf, math.nan, -math.inf
    layer.weight[0, :, :, :2] = 0
    input = images(rng, 1, 6, 5, 5)
    input[:, :, 1:3] = 0
    check(input, [QuantizedBlock((layer,), False, 0.9)], Quantization(0.05, 0))


def test_the_largest_sums() -> None:
    """Every byte 255 and every weight -127 or 127, as many as 32 bits hold."""
    depth = cuda_quantized.LARGEST_REDUCTION // 16 * 16
    weight = torch.full((2, depth, 1, 1), 127, dtype=torch.int8)
    weight[1] = -127
    up = QuantizedConv(
        weight, torch.full((2,), 1e-7), torch.full((2,), 200.0), (1, 1), (0, 0), (1, 1), 1
    )
    across = conv(torch.Generator().manual_seed(0), 2, depth, 1)
    input = torch.full((1, depth, 1, 1), 1e9)
    for zero_point in (0, 255):
        block = QuantizedBlock((up, up._replace(weight=across.weight)), True, 1.0)
        check(input, [block], Quantization(1.0, zero_point))


def test_halves_are_rounded_to_even() -> None:
    """Sums of exact halves, in the input's rounding and in the epilogue's."""
    weight = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    layer = QuantizedConv(weight, torch.tensor([0.5]), torch.zeros(1), (1, 1), (0, 0), (1, 1), 1)
    input = torch.arange(64.0).view(1, 1, 8, 8) / 4
    block = QuantizedBlock((layer,), False, 0.0)
    expected = check(input, [block], Quantization(0.5, 0), output=Quantization(1.0))
    assert_same_bits(expected, ((input / 0.5).round() * 0.5).round())


@pytest.mark.parametrize("shape", [(0, 6, 7, 7), (2, 6, 1, 1)])
def test_no_images_and_single_pixels(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(5)
    blocks, _ = SHAPES["one block on the other"](rng)
    check(images(rng, *shape), blocks, Quantization(0.05, 9))


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("groups", [(2, 1), (1, 3), (3, 2)])
def test_a_projection_in_groups_of_its_own(groups: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(6)
    main, own = groups
    layers = (conv(rng, 12, 6), conv(rng, 18, 12, groups=main), conv(rng, 18, 6, 3, groups=own))
    blocks = [QuantizedBlock(layers, True, 1.0)]
    check(images(rng, 1, 6, 6, 5), blocks, Quantization(0.05, 9))


def test_many_filters_and_pixels_choose_other_tiles() -> None:
    """Whatever is chosen, for a GPU of many multiprocessors and of few."""
    rng = torch.Generator().manual_seed(7)
    layers = (conv(rng, 128, 32, 1), conv(rng, 32, 128, 1))
    blocks = [QuantizedBlock(layers, False, 0.8)]
    if not ON_HOST:
        check(images(rng, 3, 32, 40, 40), blocks, Quantization(0.05, 9))
        return
    from support import cuda_on_host

    module = cuda_on_host.load()
    counts = set()
    for processors in (1, 200):
        module.set_processors(processors)
        before = module.statistics()["blocks"]
        check(images(rng, 1, 32, 20, 14), blocks, Quantization(0.05, 9))
        counts.add(module.statistics()["blocks"] - before)
    module.set_processors(132)
    assert len(counts) == 2


def test_copies_of_weights_go_with_them() -> None:
    rng = torch.Generator().manual_seed(6)
    gc.collect()
    before = len(cuda_quantized._cache)
    blocks, shape = SHAPES["more pixels than a tile"](rng)
    blocks = on_device(blocks)
    input = images(rng, *shape).to(DEVICE)
    for _ in range(2):
        cuda_quantized.residual_blocks(input, blocks, Quantization(0.05, 9), OUTPUT)
        assert len(cuda_quantized._cache) == before + 2
    del blocks
    gc.collect()
    assert len(cuda_quantized._cache) == before


# Stems.


def stem_of(rng: torch.Generator, bits: int, channels: int, filters: int, pool: Pool, **geometry):
    layer = conv(rng, filters, channels, **geometry)
    if bits == 8:
        return QuantizedStem(layer, None, pool), Quantization(0.05, 119)
    words = torch.randint(-LARGEST_WORD, LARGEST_WORD + 1, layer.weight.shape, generator=rng)
    upper, lower = (part.to(torch.int8) for part in word_parts(words.double()))
    zero = torch.zeros_like(upper)
    main = layer._replace(weight=interleaved(zero, upper))
    low = layer._replace(
        weight=interleaved(upper, lower), scale=layer.scale / 256, shift=torch.zeros(filters)
    )
    return QuantizedStem(main, low, pool), Quantization(2e-4, WORD_ZERO_POINT)


def check_stem(input: Tensor, stem: QuantizedStem, stored: Quantization, tile: int = -1) -> Tensor:
    expected = reference.quantized_stem(input, stem, stored, OUTPUT)
    low = None if stem.low is None else moved(stem.low)
    given = stem._replace(conv=moved(stem.conv), low=low)
    if tile < 0:
        out = backends.named("cuda").quantized_stem(input.to(DEVICE), given, stored, OUTPUT)
    else:
        out = cuda_quantized.stem(input.to(DEVICE), given, stored, OUTPUT, tile)
    assert_alike(out, expected, input)
    return expected


@pytest.mark.usefixtures("no_reference")
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("channels", "filters", "pool", "size"),
    [
        (3, 24, Pool((3, 3), (2, 2), (1, 1)), 7),
        (1, 13, Pool((1, 1), (1, 1), (0, 0)), 3),
        (5, 17, Pool((3, 2), (1, 3), (1, 0)), 4),
    ],
)
def test_stems(bits: int, dtype: torch.dtype, channels: int, filters: int, pool: Pool, size: int):
    rng = torch.Generator().manual_seed(8)
    stride = 2 if size == 7 else 1
    stem, stored = stem_of(rng, bits, channels, filters, pool, size=size, stride=stride)
    x = images(rng, 2, channels, 13, 15, dtype=dtype)
    x[0, 0, 3] = math.nan
    x[1, -1, 5, 2:] = torch.tensor(math.inf)
    for format in (torch.contiguous_format, torch.channels_last):
        expected = check_stem(x.contiguous(memory_format=format), stem, stored)
    assert expected.unique().numel() > 100
    check_stem(x[:0], stem, stored)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_stem_on_every_tile_that_takes_it(bits: int) -> None:
    rng = torch.Generator().manual_seed(9)
    pool = Pool((2, 2), (2, 2), (0, 0))
    for tile, (piece, *_) in enumerate(TILES):
        stem, stored = stem_of(rng, bits, 16 if piece == 16 else 3, 70, pool)
        x = images(rng, 1, stem.conv.weight.shape[1] // (bits // 8), 13, 12)
        check_stem(x, stem, stored, tile)


# Whole modules.


@pytest.mark.parametrize("block_class", [BasicBlock, Bottleneck])
def test_a_quantized_block_runs_here(block_class: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """`quantize`, `report` and the module: the reference's bits, by the kernels."""
    torch.manual_seed(0)
    shortcut = torch.nn.Sequential(
        torch.nn.Conv2d(24, 8 * block_class.expansion, 1, 2, bias=False),
        torch.nn.BatchNorm2d(8 * block_class.expansion),
    )
    model = torch.nn.Sequential(
        block_class(24, 8, 2, shortcut), block_class(8 * block_class.expansion, 8)
    )
    model = randomize_(model, 0).eval().to(DEVICE)
    x = torch.randn(2, 24, 9, 7).to(DEVICE)
    with fused_resnet.use_backend("cuda"), torch.no_grad():
        fused_resnet.quantize(model, [x], stem="float", min_sqnr_db=-math.inf)
        for record in fused_resnet.report(model):
            host = " (on the host)" if ON_HOST else ""
            assert record.backend == f"cuda{host}: implicit GEMM in eight bits"
        calls = []
        run = cuda_quantized.residual_blocks
        monkeypatch.setattr(
            cuda_quantized, "residual_blocks", lambda *args: calls.append(0) or run(*args)
        )
        out = model(x)
    assert calls
    with fused_resnet.use_backend("reference"), torch.no_grad():
        assert_same_bits(out, model(x))


# What operators are called with past their callers.


def arguments_of_blocks() -> list[object]:
    layer = conv(torch.Generator().manual_seed(0), 16, 16)
    weight = layer.weight.permute(0, 2, 3, 1).reshape(16, -1).contiguous()
    sums = layer.weight.sum((1, 2, 3), dtype=torch.int32)
    tensors = [t.to(DEVICE) for t in (weight, sums, layer.scale, layer.shift)]
    numbers = [16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1]
    x = torch.randn(1, 16, 5, 5).to(DEVICE)
    return [x, tensors, numbers, [1], [0], [0.5], 0.1, 3, 0.1, -1]


@pytest.mark.parametrize(
    ("index", "change", "match"),
    [
        (0, lambda x: x.double(), "input is float64"),
        (0, lambda x: x[0], "input has 3 dimensions"),
        (0, lambda x: x[:, :8], "16 channels and 16 filters, its input has 8"),
        (0, lambda x: x[:, :, :, :0], "spans 3 pixels"),
        (1, lambda ts: ts[:3], "3 tensors and 11 numbers"),
        (1, lambda ts: [ts[0][:, :-16].contiguous(), *ts[1:]], "a packed weight has shape"),
        (1, lambda ts: [ts[0].int(), *ts[1:]], "a packed weight is Int"),
        (1, lambda ts: [ts[0], ts[1].float(), *ts[2:]], "the sums of filters is float32"),
        (1, lambda ts: [*ts[:2], ts[2][:3], ts[3]], "scale has shape"),
        (1, lambda ts: [*ts[:3], ts[3][:, None]], "shift has shape"),
        (2, lambda n: [*n[:4], 0, *n[5:]], "stride is 0"),
        (2, lambda n: [*n[:6], -1, *n[7:]], "padding is -1"),
        (2, lambda n: [*n[:6], 2**31 - 1, *n[7:]], "a size is over"),
        (2, lambda n: [*n[:10], 3], "16 filters, its input has 16 channels"),
        (2, lambda n: [16, 40000, *n[2:]], "has 40000 channels|more than"),
        (3, lambda counts: [2], "block 0 has 2 convolutions, 1 are left"),
        (3, lambda counts: [], "0 layer counts"),
        (4, lambda projections: [1], "block 0 has 1 convolutions"),
        (6, lambda step: math.nan, "a step is nan"),
        (7, lambda zero_point: 256, "zero_point is 256"),
        (9, lambda tile: len(TILES), "tile is"),
    ],
)
def test_operators_refuse_what_does_not_fit(index: int, change: object, match: str) -> None:
    operator = _native.cuda_operators.byte_blocks
    arguments = arguments_of_blocks()
    operator(*arguments)
    arguments[index] = change(arguments[index])
    with pytest.raises(ValueError, match=match):
        operator(*arguments)


def test_shortcuts_of_another_size_are_refused() -> None:
    arguments = arguments_of_blocks()
    arguments[2] = [16, 16, 3, 3, 2, 2, 1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="the shortcut of block 0 is not of its output's size"):
        _native.cuda_operators.byte_blocks(*arguments)


def test_the_stem_refuses_what_does_not_fit() -> None:
    layer = conv(torch.Generator().manual_seed(0), 16, 4)
    tensors = list(cuda_quantized._packed(moved(layer), 4))
    x = torch.randn(1, 3, 9, 9).to(DEVICE)
    numbers = [16, 4, 3, 3, 1, 1, 1, 1, 1, 1, 1]
    operator = _native.cuda_operators.byte_stem
    pool = [3, 3, 2, 2, 1, 1]
    operator(x, tensors, numbers, pool, 0.1, 3, 0.1, -1)
    for changed, match in (
        ((x, tensors[:2], numbers, pool, 0.1, 3, 0.1, -1), "2 tensors"),
        ((x, tensors * 2, numbers, pool, 0.1, 3, 0.1, -1), "must be 128 in sixteen bits"),
        ((x, tensors, numbers, [3, 3, 2, 2, 2, 1], 0.1, 3, 0.1, -1), "the pool's padding is 2"),
        ((x, tensors, numbers, [9, 3, 2, 2, 4, 1], 0.1, 3, 0.1, -1), None),
        ((x, tensors, numbers, [19, 3, 2, 2, 4, 1], 0.1, 3, 0.1, -1), "spans 19 pixels"),
        ((x, tensors, numbers, [3, 3, 0, 2, 1, 1], 0.1, 3, 0.1, -1), "stride is 0"),
        ((x[:, :2], tensors, numbers, pool, 0.1, 300, 0.1, -1), "zero_point is 300"),
    ):
        if match is None:
            operator(*changed)
            continue
        with pytest.raises(ValueError, match=match):
            operator(*changed)
