"""The kernels of eight bits: every instruction set gives the reference's bits."""

import math

import pytest
import torch
from support import assert_same_bits
from support.threads import with_threads

from fused_resnet import reference
from fused_resnet.backends import cpu
from fused_resnet.layers.description import ConvNorm, Norm, Pool
from fused_resnet.layers.quantized import (
    LARGEST_REDUCTION,
    Quantization,
    QuantizedBlock,
    QuantizedConv,
    quantized_linear,
    quantized_stem,
)
from fused_resnet.layers.ranges import float32

KERNELS = torch.ops.fused_resnet.quantized_kernels().split(",")
OUTPUT = Quantization(torch.tensor(0.1).item())


def conv(K, C, R, S, stride=1, padding=0, dilation=1, groups=1):
    """A convolution whose outputs fill the range of a byte, for inputs that do."""
    reduction = C // groups * R * S
    pair = lambda n: (n, n) if isinstance(n, int) else n  # noqa: E731
    return QuantizedConv(
        torch.randint(-127, 128, (K, C // groups, R, S), dtype=torch.int8),
        torch.rand(K) * 2 / (math.sqrt(reduction) * 73 * 2),
        torch.randn(K) * 30,
        pair(stride),
        pair(padding),
        pair(dilation),
        groups,
    )


def bottleneck(C, mid, K, stride=1, groups=1, dilation=1):
    convs = [
        conv(mid, C, 1, 1),
        conv(mid, mid, 3, 3, stride, dilation, dilation, groups),
        conv(K, mid, 1, 1),
    ]
    return with_shortcut(convs, C, K, stride)


def basic(C, K, stride=1):
    return with_shortcut([conv(K, C, 3, 3, stride, 1), conv(K, K, 3, 3, 1, 1)], C, K, stride)


def with_shortcut(convs, C, K, stride):
    projects = C != K or stride != 1
    if projects:
        convs.append(conv(K, C, 1, 1, stride))
    return QuantizedBlock(tuple(convs), projects, 0.37)


def batch(C, H, W, zero_point=0, N=2, dtype=torch.float32, memory_format=torch.channels_last):
    x = torch.randn(N, C, H, W) * 3
    x = x if zero_point else x.abs()
    return x.to(dtype).contiguous(memory_format=memory_format)


def stored(zero_point=0):
    return Quantization(torch.tensor(0.04).item(), zero_point)


def assert_right(x, blocks, zero_point, kernels):
    expected = reference.quantized_residual_blocks(x, blocks, stored(zero_point), OUTPUT)
    out = cpu.run_quantized_blocks(x, blocks, stored(zero_point), OUTPUT, kernels)
    assert out is not None
    assert_same_bits(out, expected)
    assert out.stride() == expected.stride()
    return out


def test_there_are_kernels_for_any_processor():
    assert {"baseline", "amx_emulated"} <= set(KERNELS)


SHAPES = {
    "64 channels": (lambda: [bottleneck(64, 64, 64)], (64, 8, 8), 0),
    "a projection": (lambda: [bottleneck(64, 64, 256)], (64, 9, 7), 0),
    "a signed input": (lambda: [bottleneck(256, 64, 256)], (256, 7, 7), 128),
    "a strided projection": (lambda: [bottleneck(64, 32, 128, 2)], (64, 9, 8), 7),
    "tails": (lambda: [bottleneck(20, 12, 20), basic(20, 35)], (20, 6, 7), 3),
    "lines longer than a tile": (lambda: [bottleneck(16, 8, 32, 2)], (16, 5, 39), 0),
    "groups of 4": (lambda: [bottleneck(64, 64, 64, groups=16)], (64, 7, 7), 5),
    "groups across blocks": (lambda: [bottleneck(48, 60, 48, groups=5)], (48, 7, 9), 0),
    "groups of 3, strided": (lambda: [bottleneck(96, 96, 160, 2, groups=32)], (96, 5, 6), 9),
    "dilation": (lambda: [bottleneck(32, 32, 32, dilation=2)], (32, 11, 9), 0),
    "one pixel": (lambda: [basic(16, 16), basic(16, 24, 2)], (16, 1, 1), 200),
    "512 channels": (lambda: [bottleneck(512, 512, 512)], (512, 7, 7), 0),
    "a stage": (lambda: [basic(16, 32, 2), basic(32, 32), basic(32, 32)], (16, 12, 10), 255),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits(shape, kernels):
    make, size, zero_point = SHAPES[shape]
    torch.manual_seed(0)
    out = assert_right(batch(*size, zero_point), make(), zero_point, kernels)
    assert out.unique().numel() > min(90, out.numel() // 4)  # a byte's range is in use


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_ends(memory_format, dtype, kernels):
    torch.manual_seed(1)
    x = batch(20, 5, 6, 11, dtype=dtype, memory_format=memory_format)
    x[0, :4, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf, -0.0], dtype=dtype)
    assert_right(x, [basic(20, 20)], 11, kernels)
    sliced = torch.cat([x, x], dim=1)[:, ::2]
    assert_right(sliced, [basic(20, 20)], 11, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_unlike_padding_and_filters(kernels):
    torch.manual_seed(2)
    convs = (conv(32, 32, 5, 3, padding=(3, 0)), conv(32, 32, 1, 3, padding=(0, 2)))
    convs = (convs[0], convs[1], conv(32, 32, 3, 1, dilation=(1, 3)))
    assert_right(batch(32, 6, 7, 3), [QuantizedBlock(convs, False, 0.4)], 3, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_padding_beyond_the_filter(kernels):
    """Lines have more outputs than pixels: what is under them is no even sequence any more."""
    torch.manual_seed(2)
    for first in (conv(32, 32, 1, 1, padding=1), conv(32, 32, 1, 3, padding=(1, 2))):
        block = QuantizedBlock((first, conv(32, 32, 3, 3)), False, 0.4)
        assert_right(batch(32, 6, 7, 3), [block], 3, kernels)


@pytest.mark.parametrize("kernels", KERNELS)
def test_largest_sums(kernels):
    """255 * 127 in all products: what saturates in 16 bits does so here."""
    C = 2048
    one = QuantizedConv(
        torch.full((32, C, 1, 1), 127, dtype=torch.int8),
        torch.full((32,), 254 / (255 * 127 * C)),
        torch.zeros(32),
        *((1, 1), (0, 0), (1, 1)),
        1,
    )
    other = one._replace(weight=torch.full((C, 32, 1, 1), -127, dtype=torch.int8))
    other = other._replace(scale=torch.full((C,), -1e-4), shift=torch.zeros(C))
    x = torch.full((1, C, 3, 3), 255 * stored().step)
    out = assert_right(x, [QuantizedBlock((one, other), False, 0.1)], 0, kernels)
    # 254 * 32 * -127 * -1e-4 + 255 * 0.1 = 128.7
    assert out.unique().tolist() == [pytest.approx(OUTPUT.step * 129)]


EDGES = {
    "two or three weights reach 128": (-127, -65, -64, -63, -1, 0, 1, 63, 64, 65, 127),
    "four weights reach 128": (-33, -32, -31, 0, 31, 32, 33),
    "mostly zero": (0, 0, 0, 0, 0, 0, 0, 0, 127, -127),
    "the least byte": (-128, -1, 0, 1, 127),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_at_the_edge_of_words(sign, edge, kernels):
    """Pixel p has 255 where filter p's weight has a sign, else 0: no pixel gives a larger sum."""
    torch.manual_seed(3)
    edges = torch.tensor(EDGES[edge], dtype=torch.int8)
    weight = edges[torch.randint(len(edges), (64, 64, 1, 3))]
    pixels = torch.where(weight * sign > 0, 255, 0)
    # Each filter sees its own three pixels' worth of bytes, with nothing between them and the next.
    x = torch.zeros(1, 64, 1, 64, 4)
    x[0, :, 0, :, :3] = pixels[:, :, 0].permute(1, 0, 2)
    x = (x.flatten(3) * stored().step).contiguous(memory_format=torch.channels_last)
    # The sum is what decides: it gives 100, and one that is off by one 101 or 99.
    sums = (pixels * weight.int()).sum((1, 2, 3)).float()
    scale, shift = torch.full((64,), float(sign)), 100 - sign * sums
    # Then a convolution that passes bytes on, and a projection that gives zero.
    one = QuantizedConv(weight, scale, shift, (1, 4), (0, 0), (1, 1), 1)
    passes = one._replace(
        weight=torch.eye(64, dtype=torch.int8).view(64, 64, 1, 1),
        scale=torch.ones(64),
        shift=torch.zeros(64),
        stride=(1, 1),
    )
    nothing = passes._replace(scale=torch.zeros(64), stride=(1, 4))
    block = QuantizedBlock((one, passes, nothing), True, 1.0)
    out = assert_right(x, [block], 0, kernels)
    own = out[0, :, 0].diagonal() / OUTPUT.step
    assert own.round().unique().tolist() == [100]


@pytest.mark.parametrize("kernels", KERNELS)
def test_values_beyond_integers(kernels):
    """Sums far outside of what 32 bits hold as steps of the output."""
    torch.manual_seed(3)
    block = basic(16, 16)
    convs = tuple(c._replace(scale=c.scale * 1e12) for c in block.convs)
    out = assert_right(batch(16, 4, 4), [block._replace(convs=convs)], 0, kernels)
    assert out.unique().tolist() == pytest.approx([0, OUTPUT.step * 255])


@pytest.mark.parametrize("kernels", KERNELS)
def test_no_images(kernels):
    x = batch(16, 4, 4, N=0)
    out = cpu.run_quantized_blocks(x, [basic(16, 24, 2)], stored(), OUTPUT, kernels)
    assert out.shape == (0, 24, 2, 2)


def test_threads():
    torch.manual_seed(4)
    x, blocks = batch(64, 9, 9, N=5), [bottleneck(64, 64, 256), bottleneck(256, 64, 256)]
    run = lambda: cpu.run_quantized_blocks(x, blocks, stored(), OUTPUT)  # noqa: E731
    first, *others = with_threads(run, 1, 2, 7)
    for out in others:
        assert_same_bits(out, first)


@pytest.mark.parametrize("make", [lambda: bottleneck(64, 64, 256), lambda: basic(64, 64)])
def test_images_by_themselves(make):
    """A batch is cut into groups of images where its activations exceed the cache."""
    torch.manual_seed(5)
    x, blocks = batch(64, 60, 60, N=9), [make()]
    out = cpu.run_quantized_blocks(x, blocks, stored(), OUTPUT)
    for n in range(9):
        one = cpu.run_quantized_blocks(x[n : n + 1], blocks, stored(), OUTPUT)
        assert_same_bits(one, out[n : n + 1])


def test_what_the_kernels_leave_to_the_reference():
    """A projection with a larger filter."""
    torch.manual_seed(6)
    convs = (conv(16, 16, 3, 3, 2, 1), conv(16, 16, 3, 3, 1, 1), conv(16, 16, 3, 3, 2, 1))
    x, blocks = batch(16, 6, 6), [QuantizedBlock(convs, True, 0.0)]
    assert cpu.run_quantized_blocks(x, blocks, stored(), OUTPUT) is None
    expected = reference.quantized_residual_blocks(x, blocks, stored(), OUTPUT)
    out = cpu.Cpu().quantized_residual_blocks(x, blocks, stored(), OUTPUT)
    assert_same_bits(out, expected)


def stem(K, C, filter, pool, bits, stride=1, padding=0, dilation=1):
    """A stem whose outputs fill the range of a byte, and how its input and output are stored."""
    weight, vectors = torch.randn(K, C, *filter), torch.rand(4, K)
    norm = Norm(vectors[0] - 0.5, vectors[1] + 0.5, vectors[2] + 0.5, vectors[3] - 0.5, 1e-5)
    geometry = ((stride, stride), (padding, padding), (dilation, dilation), 1)
    high = 3 * (C * filter[0] * filter[1]) ** 0.5
    output = Quantization(float32(high / 255))
    input = Quantization(float32(4 / 32639), 128) if bits == 16 else Quantization(0.03125, 117)
    layer = ConvNorm(weight, norm, None, *geometry)
    return quantized_stem(layer, Pool(*pool), bits, input, output), input, output


NO_POOL, POOL = ((1, 1), (1, 1), (0, 0)), ((3, 3), (2, 2), (1, 1))
STEMS = {
    "7x7": (64, 3, (7, 7), POOL, 2, 3, 1, (2, 3, 31, 45)),
    "one channel": (16, 1, (3, 3), NO_POOL, 1, 1, 1, (3, 1, 8, 8)),
    "tails": (20, 5, (5, 3), ((2, 4), (1, 3), (1, 2)), 1, 2, 1, (1, 5, 9, 20)),
    "many channels": (36, 12, (3, 3), POOL, 2, 1, 1, (1, 12, 12, 40)),
    "dilation": (16, 3, (3, 3), POOL, 1, 2, 2, (1, 3, 10, 11)),
    "one pixel": (16, 3, (1, 1), NO_POOL, 3, 0, 1, (2, 3, 1, 1)),
    "padding beyond the columns": (20, 3, (3, 1), NO_POOL, 1, 1, 1, (2, 3, 5, 5)),
    "padding beyond both": (20, 3, (1, 1), NO_POOL, 1, 2, 1, (3, 3, 6, 20)),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shape", STEMS)
def test_stem_bits(shape, bits, kernels):
    torch.manual_seed(7)
    K, C, filter, pool, stride, padding, dilation, size = STEMS[shape]
    made, input, output = stem(K, C, filter, pool, bits, stride, padding, dilation)
    x = torch.randn(size)
    expected = reference.quantized_stem(x, made, input, output)
    assert expected.unique().numel() > min(100, expected.numel() // 8)
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)
    for laid in (x, x.contiguous(memory_format=torch.channels_last), swapped):
        out = cpu.run_quantized_stem(laid, made, input, output, kernels)
        assert_same_bits(out, expected)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ends_of_a_stem(dtype, bits, kernels):
    torch.manual_seed(8)
    made, input, output = stem(32, 3, (7, 7), POOL, bits, 2, 3)
    x = (torch.randn(2, 3, 20, 21) * 3).to(dtype)  # beyond the range, too
    x[0, :, 3, 3] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        laid = x.contiguous(memory_format=memory_format)
        expected = reference.quantized_stem(laid, made, input, output)
        out = cpu.run_quantized_stem(laid, made, input, output, kernels)
        assert_same_bits(out, expected)
        assert out.stride() == expected.stride()


def test_a_stem_takes_images_in_groups():
    """As many at a time as fit the cache, by any number of threads."""
    torch.manual_seed(9)
    made, input, output = stem(64, 3, (7, 7), POOL, 16, 2, 3)
    x = torch.randn(7, 3, 160, 160)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out = cpu.run_quantized_stem(x, made, input, output)
        torch.set_num_threads(3)
        for n in range(7):
            one = cpu.run_quantized_stem(x[n : n + 1], made, input, output)
            assert_same_bits(one, out[n : n + 1])
    finally:
        torch.set_num_threads(before)
    assert cpu.run_quantized_stem(x[:0], made, input, output).shape == (0, 64, 40, 40)


HEADS = {
    "one chunk": (64, 20, (2, 64, 7, 7)),
    "resnet's": (2048, 33, (1, 2048, 7, 7)),
    "tails": (293, 5, (3, 293, 3, 5)),
    "many images": (100, 17, (19, 100, 2, 2)),
    "one pixel": (5, 1, (2, 5, 1, 1)),
    "many pixels": (3, 2, (1, 3, 300, 300)),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", HEADS)
def test_head_bits(shape, dtype, kernels):
    torch.manual_seed(10)
    C, K, size = HEADS[shape]
    x = (torch.randn(size) * 3).to(dtype)  # beyond the range, too
    x[0, :, 0, 0] = torch.tensor([math.nan, math.inf, -math.inf]).to(dtype)[torch.arange(C) % 3]
    stored, pooled = Quantization(0.03125), Quantization(float32(1.1 / 255))
    made = quantized_linear(torch.randn(K, C), torch.randn(K) if K > 1 else None, pooled)
    expected = reference.quantized_pool_linear(x, made, stored, pooled)
    assert expected.isfinite().all()
    swapped = x.transpose(2, 3).contiguous().transpose(2, 3)
    apart = torch.stack([x, x], -1)[..., 0]
    for laid in (x, x.contiguous(memory_format=torch.channels_last), swapped, apart):
        out = cpu.run_quantized_head(laid, made, stored, pooled, kernels)
        assert out.dtype is dtype
        assert_same_bits(out, expected)


def head(**changes):
    vector = torch.zeros(4)
    arguments = {
        "input": torch.zeros(1, 3, 5, 5),
        "weight": torch.zeros(4, 3, dtype=torch.int8),
        "scale": vector,
        "bias": vector,
        "step": 0.1,
        "pooled_step": 0.1,
        "kernels": "",
    } | changes
    return torch.ops.fused_resnet.quantized_pool_linear(*arguments.values())


BAD_HEADS = {
    "input has": {"input": torch.zeros(2, 3, 5)},
    "float32, float16 or bfloat16": {"input": torch.zeros(1, 3, 5, 5, dtype=torch.float64)},
    "input features, input has 4": {"input": torch.zeros(1, 4, 5, 5)},
    "must have 1 to": {"input": torch.zeros(1, 3, 0, 5)},
    "weight must be int8 and contiguous": {"weight": torch.zeros(4, 3)},
    "weight must be int8 and": {"weight": torch.zeros(3, 4, dtype=torch.int8).t()},
    "scale has shape": {"scale": torch.zeros(3)},
    "bias must be dense": {"bias": torch.zeros(4, 2)[:, 0]},
    "a step is": {"pooled_step": math.inf},
    "there are no kernels": {"kernels": "abacus"},
}


@pytest.mark.parametrize("match", BAD_HEADS)
def test_bad_heads(match):
    assert head().shape == (1, 4)
    assert head(input=torch.zeros(0, 3, 5, 5)).shape == (0, 4)
    with pytest.raises((ValueError, RuntimeError), match=match):
        head(**BAD_HEADS[match])


def packed_stem(**changes):
    weight, vector = torch.zeros(16, 6, 3, 3, dtype=torch.int8), torch.zeros(16)
    packed = torch.ops.fused_resnet.pack_quantized_conv(weight, vector, vector, 1, 1, 6)
    arguments = {
        "input": torch.zeros(1, 3, 5, 5),
        "packed": packed,
        "low": packed,
        "numbers": [16, 6, 3, 3, 1, 1, 1, 1, 1, 1, 1],
        "pool": [3, 3, 2, 2, 1, 1],
        "step": 0.1,
        "zero_point": 128,
        "output_step": 0.1,
        "kernels": "",
    } | changes
    return torch.ops.fused_resnet.quantized_stem_packed(*arguments.values())


BAD_STEMS = {
    "input has": {"input": torch.zeros(2, 3, 5)},
    "float32, float16 or bfloat16": {"input": torch.zeros(1, 3, 5, 5, dtype=torch.float64)},
    "input channels": {"input": torch.zeros(1, 4, 5, 5)},
    "packed has": {"packed": torch.zeros(16, dtype=torch.int8)},
    "the lower weight": {"low": torch.zeros(16, dtype=torch.int8)},
    "10 numbers": {"numbers": [16, 6, 3, 3, 1, 1, 1, 1, 1, 1]},
    "6": {"pool": [3, 3, 2, 2, 1]},
    "pool": {"pool": [3, 3, 0, 2, 1, 1]},
    "zero_point": {"zero_point": 256},
    "a step is": {"output_step": math.inf},
    "no kernels 'sse9'": {"kernels": "sse9"},
}


@pytest.mark.parametrize("match", BAD_STEMS)
def test_bad_stems(match):
    assert packed_stem().shape == (1, 16, 3, 3)
    with pytest.raises((RuntimeError, ValueError), match=match):
        packed_stem(**BAD_STEMS[match])


def packed_call(**changes):
    one = conv(16, 16, 3, 3, 1, 1)
    packed = torch.ops.fused_resnet.pack_quantized_conv(one.weight, one.scale, one.shift, 1, 1)
    arguments = {
        "input": batch(16, 4, 4),
        "packed": [packed],
        "numbers": [16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1],
        "layer_counts": [1],
        "projections": [0],
        "shortcut_scales": [1.0],
        "step": 0.1,
        "zero_point": 0,
        "output_step": 0.1,
        "kernels": "",
    } | changes
    return torch.ops.fused_resnet.quantized_residual_blocks_packed(*arguments.values())


BAD = {
    "input has": {"input": torch.zeros(2, 16, 4)},
    "float32, float16 or bfloat16": {"input": torch.zeros(2, 16, 4, 4, dtype=torch.float64)},
    "input channels": {"input": torch.zeros(2, 8, 4, 4)},
    "packed has": {"packed": [torch.zeros(16, dtype=torch.int8)]},
    "1 weights and 10 numbers": {"numbers": [16, 16, 3, 3, 1, 1, 1, 1, 1, 1]},
    "stride": {"numbers": [16, 16, 3, 3, 0, 1, 1, 1, 1, 1, 1]},
    "groups": {"numbers": [16, 16, 3, 3, 1, 1, 1, 1, 1, 1, 0]},
    "padding": {"numbers": [16, 16, 3, 3, 1, 1, 2**62, 1, 1, 1, 1]},
    "weight's size": {"numbers": [2**60, 16, 3, 3, 1, 1, 1, 1, 1, 1, 1]},
    "32 bits": {"numbers": [16, 2**20, 3, 3, 1, 1, 1, 1, 1, 1, 1]},
    "block 0 has 2 convolutions": {"layer_counts": [2]},
    "0 layer counts": {"layer_counts": [], "projections": [0]},
    "the shortcut is": {"numbers": [16, 16, 3, 3, 2, 2, 1, 1, 1, 1, 1]},
    "zero_point": {"zero_point": 256},
    "a step is": {"step": math.nan},
    "no kernels 'sse9'": {"kernels": "sse9"},
}


@pytest.mark.parametrize("match", BAD)
def test_bad_calls(match):
    assert packed_call() is not None
    with pytest.raises((RuntimeError, ValueError), match=match):
        packed_call(**BAD[match])


@pytest.mark.skipif("avx2" not in KERNELS, reason="no kernels here take weights as lists")
def test_bad_lists():
    """Of lists that are none of this weight's, nothing is read beyond the tensor."""
    one = conv(16, 16, 3, 3, 1, 1)
    pack = torch.ops.fused_resnet.pack_quantized_conv
    packed = pack(one.weight, one.scale, one.shift, 1, 1, 16, "avx2")
    assert packed_call(packed=[packed], kernels="avx2") is not None
    lists = 3 * 4 * 32  # behind scale, shift and sums of a block of 32 output channels
    places = lists + 4 * 8 * 4  # behind four lists of four numbers
    words = packed.view(torch.int64)
    for at, value in (
        (lists, 1 << 40),  # where places begin
        (lists + 8, -64),  # where weights begin
        (lists + 16, 1 << 61),  # pairs
        (lists + 16, -1),
        (lists + 24, int(words[lists // 8 + 3]) + 1),  # singles
        (places, 3),  # a segment, of a filter of three rows
        (places, (3 * 16) << 16),  # a byte
    ):
        bad = packed.clone()
        bad.view(torch.int64)[at // 8] = value
        with pytest.raises((RuntimeError, ValueError), match="not this weight's lists"):
            packed_call(packed=[bad], kernels="avx2")
    tiles = pack(one.weight, one.scale, one.shift, 1, 1, 16, "baseline")
    with pytest.raises((RuntimeError, ValueError), match="packed has"):
        packed_call(packed=[tiles], kernels="avx2")
    with pytest.raises((RuntimeError, ValueError), match="packed has"):
        packed_call(packed=[packed], kernels="baseline")


def test_bad_weights():
    pack = torch.ops.fused_resnet.pack_quantized_conv
    weight, vector = torch.zeros(4, 4, 1, 1, dtype=torch.int8), torch.zeros(4)
    with pytest.raises((RuntimeError, ValueError), match="int8"):
        pack(weight.float(), vector, vector, 1, 1)
    with pytest.raises((RuntimeError, ValueError), match="scale must be float32"):
        pack(weight, vector.double(), vector, 1, 1)
    with pytest.raises((RuntimeError, ValueError), match="shift must be float32"):
        pack(weight, vector, vector[:3], 1, 1)
    with pytest.raises((RuntimeError, ValueError), match="groups"):
        pack(weight, vector, vector, 1, 3)
    with pytest.raises((RuntimeError, ValueError), match="no kernels 'sse9'"):
        pack(weight, vector, vector, 1, 1, 16, "sse9")
    large = torch.zeros(1, LARGEST_REDUCTION + 1, 1, 1, dtype=torch.int8)
    with pytest.raises((RuntimeError, ValueError), match="too many for sums of 32 bits"):
        pack(large, vector[:1], vector[:1], 1, 1)
