"""The native operator `scale_shift_act`, on the CPU and on a GPU or what stands in for one."""

from __future__ import annotations

import itertools
import math
import os
import sys

import pytest
import torch
import torch.nn.functional as F
from support import (
    assert_same_nonfinite,
    cuda_on_host,
    dtype_id,
    rerun_on_instruction_set,
    unchanged,
    unwritten_zeros,
)

from fused_resnet import _native, reference
from fused_resnet.testing import assert_error_rule

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu"]
if torch.cuda.is_available() and _native.cuda_status == "yes":
    DEVICES.append("cuda")
elif cuda_on_host.is_needed():
    DEVICES.append("on_host")

operator = torch.ops.fused_resnet.scale_shift_act


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Where tensors are for the operator under test, which is `operator`."""
    if request.param != "on_host":
        yield request.param
        return
    kernel = torch.ops.fused_resnet_on_host.scale_shift_act
    monkeypatch.setattr(sys.modules[__name__], "operator", kernel)
    with cuda_on_host.drawn_from(request.node.nodeid):
        yield "cpu"


def make(shape, dtype, device="cpu"):
    """Seeded input, scale, shift and residual."""
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x, z = torch.randn(2, *shape).to(device, dtype).unbind(0)
    scale, shift = torch.randn(2, shape[1], dtype=parameter_dtype).to(device).unbind(0)
    return x, scale, shift, z


def eager(x, scale, shift, residual, activation):
    """The same as torch's separate operators, each rounding to the input's dtype."""
    zeros, ones = torch.zeros_like(shift), torch.ones_like(scale)
    no_eps = 1e-30  # lost when added to one; torch 2.11 refuses zero
    out = F.batch_norm(x, zeros, ones, scale, shift, False, 0.0, no_eps)
    if residual is not None:
        out = out + residual
    return out.relu() if activation == "relu" else out


def exact(x, scale, shift, residual, activation):
    tensors = (None if t is None else t.double() for t in (x, scale, shift, residual))
    return eager(*tensors, activation)


def check(x, scale, shift, residual, activation):
    named = {"input": x, "scale": scale, "shift": shift, "residual": residual}
    with unchanged(**{name: t for name, t in named.items() if t is not None}):
        out = operator(x, scale, shift, residual, activation)
    assert out.shape == x.shape
    assert out.stride() == torch.empty_like(x).stride()
    arguments = (x, scale, shift, residual, activation)
    assert_error_rule(out, eager(*arguments), exact(*arguments))


# Odd sizes leave partial vectors, sizes of one leave dimensions out, few channels make short rows,
# and thousands of them more than the threads of a block take at once.
SHAPES = [
    (2, 64, 7, 7),
    (3, 5, 9, 11),
    (1, 1, 1, 1),
    (1, 7, 1, 1),
    (4, 1, 3, 5),
    (5, 19),
    (2, 3, 17),
    (2, 6, 3, 4, 5),
    (2, 1000, 1, 3),
    (1, 130, 2, 2),
    (2, 2056, 1, 2),
    (2, 64, 33, 32),
]


def with_layout(tensor, layout):
    """The same values in another arrangement, or None where the shape does not have it."""
    match layout:
        case "contiguous":
            return tensor.contiguous()
        case "channels_last":
            order = [0, *range(2, tensor.dim()), 1]
            inverse = [order.index(i) for i in range(tensor.dim())]
            return tensor.permute(order).contiguous().permute(inverse)
        case "reversed":  # dense, in an order that neither format has
            order = tuple(reversed(range(tensor.dim())))
            return tensor.permute(order).contiguous().permute(order)
        case "strided":
            wide = tensor.new_full([2 * size for size in tensor.shape], math.nan)
            part = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
            return part.copy_(tensor)
        case "channel_slice":  # channels_last, rows with gaps
            wide = tensor.new_full(
                (tensor.shape[0], *tensor.shape[2:], tensor.shape[1] + 3), math.nan
            )
            return wide.narrow(-1, 2, tensor.shape[1]).movedim(-1, 1).copy_(tensor)
        case "misaligned":  # dense, one element off every vector boundary
            flat = tensor.new_full((tensor.numel() + 1,), math.nan)[1:]
            return flat.view(tensor.shape).copy_(tensor)
    raise KeyError(layout)


LAYOUTS = ["contiguous", "channels_last", "reversed", "strided", "channel_slice", "misaligned"]


@pytest.mark.quick
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.single
def test_error_rule(device, dtype, activation):
    for shape, layout in itertools.product(SHAPES, LAYOUTS):
        x, scale, shift, z = make(shape, dtype, device)
        x = with_layout(x, layout)
        check(x, scale, shift, None, activation)
        check(x, scale, shift, with_layout(z, layout), activation)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_residual_of_any_strides(device, dtype):
    for shape, layout, other in itertools.product(SHAPES[:2] + SHAPES[5:8], LAYOUTS, LAYOUTS):
        x, scale, shift, z = make(shape, dtype, device)
        check(with_layout(x, layout), scale, shift, with_layout(z, other), "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_expanded_tensors(device, dtype):
    """Strides of zero: several elements of the shape share one in memory."""
    x, scale, shift, z = make((3, 8, 5, 6), dtype, device)
    check(x[:1].expand(3, -1, -1, -1), scale, shift, z, "relu")
    check(x[:, :1].expand(-1, 8, -1, -1), scale, shift, z, "relu")
    check(x, scale, shift, z[..., :1].expand(-1, -1, -1, 6), "relu")
    check(x, scale[:1].expand(8), shift[::1].flip(0), z, "relu")
    check(x, scale.repeat_interleave(2)[::2], shift, x, "relu")  # the input is its own residual


# Shapes and a residual's channels: accesses of every width, odd numbers of channels before, more
# vectors than a block has threads, other numbers of dimensions.
NARROW = [
    ((2, 32, 8, 8), 16), ((3, 64, 5, 7), 56), ((2, 40, 7, 5), 36), ((1, 24, 9, 1), 22),
    ((2, 48, 1, 9), 45), ((5, 32, 3, 2), 1), ((2, 33, 4, 3), 16), ((2, 2056, 1, 2), 2040),
    ((9, 24), 16), ((2, 24, 5), 11), ((2, 16, 3, 4, 5), 8), ((37, 64, 9, 9), 32),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(("shape", "channels"), NARROW, ids=str)
def test_narrow_residual(device, dtype, shape, channels):
    """One of fewer channels, in any strides, gives the bits that it gives between zeros."""
    x, scale, shift, _ = make(shape, dtype, device)
    x = with_layout(x, "channels_last")
    z = torch.randn(shape[0], channels, *shape[2:]).to(device, dtype)
    padded = reference.pad_channels(z, shape[1])
    arguments = (x, scale, shift, padded, "relu")
    expected = operator(*arguments)
    assert_error_rule(expected, eager(*arguments), exact(*arguments))
    for layout in LAYOUTS:
        narrow = with_layout(z, layout)
        with unchanged(input=x, residual=narrow):
            assert torch.equal(operator(x, scale, shift, narrow, "relu"), expected), layout
    for layout in ("contiguous", "reversed", "misaligned"):
        other = with_layout(x, layout)
        assert torch.equal(operator(other, scale, shift, z, "relu"), expected), layout


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nonfinite_values_of_a_narrow_residual(device, dtype):
    x, scale, shift, _ = make((2, 32, 3, 5), dtype, device)
    x = with_layout(x, "channels_last")
    for channels in (16, 13):
        z = torch.zeros(2, channels, 3, 5, device=device, dtype=dtype)
        z[0, 0, 1, 2], z[1, -1, 2, 4], z[1, 3, 0, 0] = math.nan, math.inf, -math.inf
        padded = reference.pad_channels(z, 32)
        expected = exact(x, scale, shift, padded, "relu")
        z = with_layout(z, "channels_last")
        assert_same_nonfinite(operator(x, scale, shift, z, "relu"), expected)


def test_many_dimensions(device):
    """More dimensions than a kernel's argument holds, none of which can be joined."""
    shape = (2, 3) + (2,) * 9
    x, scale, shift, z = make(shape, torch.float32, device)
    check(with_layout(x, "strided"), scale, shift, with_layout(z, "reversed"), "relu")


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5), (0, 3)])
def test_empty(device, shape):
    for layout in ("contiguous", "channels_last"):
        x, scale, shift, z = make(shape, torch.float32, device)
        x = with_layout(x, layout)
        out = operator(x, scale, shift, z)
        assert out.shape == x.shape
        assert out.stride() == torch.empty_like(x).stride()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nonfinite_values_propagate(device, dtype):
    nonfinite = [math.nan, math.inf, -math.inf]
    x, scale, shift, z = make((2, 37, 5, 7), dtype, device)
    for tensor in (x, z):
        picked = torch.randint(tensor.numel(), (60,))
        values = torch.tensor(nonfinite * 20, dtype=dtype)
        tensor.view(-1)[picked.to(device)] = values.to(device)
    scale[3], shift[5], scale[7] = math.nan, math.nan, math.inf
    for layout, residual, activation in itertools.product(
        ["contiguous", "channels_last", "strided"], [z, None], ["relu", "none"]
    ):
        expected = x.double() * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        expected = expected if residual is None else expected + residual
        expected = expected.relu() if activation == "relu" else expected
        out = operator(with_layout(x, layout), scale, shift, residual, activation)
        assert_same_nonfinite(out, expected)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_every_16_bit_value_survives(device, dtype):
    """Identity parameters return every bit pattern, subnormals included; NaNs stay NaNs."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x.view(16, 64, 8, 8).to(device)
    out = operator(x, torch.ones(64, device=device), torch.zeros(64, device=device), None, "none")
    number = ~x.isnan()
    assert out[~number].isnan().all()
    # -0 * 1 + 0 is +0.
    assert torch.equal(out[number] + 0, x[number] + 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
def test_rounds_once_to_nearest_even(device, dtype):
    """What torch's conversion makes of the float32 result, ties and overflow included."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = torch.where(x.isfinite(), x, torch.zeros_like(x)).view(16, 64, 8, 8).to(device)
    # Powers of two keep the product exact in float32, so that only the final rounding can differ.
    scale = torch.tensor([2.0 ** -(i % 9) for i in range(64)], device=device)
    shift = torch.zeros(64, device=device)
    expected = (x.float() * scale.view(-1, 1, 1)).to(dtype)
    assert torch.equal(operator(x, scale, shift, None, "none"), expected)


def test_no_grad_for_inputs_that_need_none():
    x, scale, shift, z = make((2, 3, 4, 4), torch.float32)
    assert not operator(x, scale, shift, z).requires_grad


def test_same_bits_every_time(device):
    x, scale, shift, z = make((8, 64, 28, 28), torch.float32, device)
    first = operator(x, scale, shift, z)
    for _ in range(5):
        assert torch.equal(operator(x, scale, shift, z), first)


def test_threads_do_not_change_bits():
    x, scale, shift, z = make((4, 67, 41, 43), torch.float32)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for layout in LAYOUTS:
            results.append(operator(with_layout(x, layout), scale, shift, z).contiguous())
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_images_further_apart_than_32_bits_count(layout):
    image, apart = (64, 16, 16), 2**31 + 2**15
    memory = unwritten_zeros(apart + math.prod(image), torch.bfloat16)
    x, scale, shift, _ = make((2, *image), torch.bfloat16)
    x = with_layout(x, layout)
    distant = memory.as_strided(x.shape, (apart, *x.stride()[1:])).copy_(x)
    assert torch.equal(operator(distant, scale, shift), operator(x, scale, shift))


@pytest.mark.slow
@pytest.mark.whole
def test_more_elements_than_32_bits_count():
    """The batch repeats one image through a stride of zero; the output is really that large."""
    image, count = (64, 64, 64), 2**31 // 64**3 + 2
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pages < 3 * count * math.prod(image):
        pytest.skip(f"needs {3 * count * math.prod(image) / 1e9:.1f} GB of free memory")
    x, scale, shift, _ = make((1, *image), torch.bfloat16)
    out = operator(x.expand(count, *image), scale, shift)
    assert out.numel() > 2**31
    expected = operator(x, scale, shift)[0]
    for i in (0, count // 2, count - 1):
        assert torch.equal(out[i], expected)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["avx2", "none"])
@pytest.mark.ahead(
    lambda isa: rerun_on_instruction_set(
        isa, __file__, "error_rule and relu or nonfinite or 16_bit or nearest_even"
    )
)
def test_other_instruction_sets(isa, ahead):
    """This file again, on the kernels for processors without AVX-512 and without AVX2."""
    ahead()


def good():
    x, scale, shift, z = make((2, 3, 4, 5), torch.float32)
    return {"input": x, "scale": scale, "shift": shift, "residual": z, "activation": "relu"}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(3)}, r"input has shape \(3,\), must be \(N, C, \*\)"),
        ({"input": torch.zeros(())}, r"input has shape \(\), must be \(N, C, \*\)"),
        (
            {"input": torch.zeros(2, 3, 4, 5, dtype=torch.int64)},
            "input is Long, must be float16, bfloat16, float32 or float64",
        ),
        ({"input": torch.zeros(2, 3, 4, 5, dtype=torch.complex64)}, "input is ComplexFloat, must"),
        ({"scale": torch.ones(4)}, r"scale has shape \(4,\), input has 3 channels"),
        ({"scale": torch.ones(3, 1)}, r"scale has shape \(3, 1\), input has 3 channels"),
        ({"shift": torch.ones(())}, r"shift has shape \(\), input has 3 channels"),
        (
            {"scale": torch.ones(3).double()},
            "scale is float64, must be float32 for float32 input",
        ),
        (
            {"input": torch.zeros(2, 3, 4, 5).double()},
            "scale is float32, must be float64 for float64 input",
        ),
        ({"shift": torch.ones(3).half()}, "shift is float16, must be float32 for float32 input"),
        (
            {"residual": torch.zeros(2, 3, 4, 4)},
            r"residual has shape \(2, 3, 4, 4\), input has shape \(2, 3, 4, 5\)",
        ),
        ({"residual": torch.zeros(3, 1, 1)}, r"residual has shape \(3, 1, 1\), input has shape"),
        (
            {"residual": torch.zeros(2, 3, 4, 5).bfloat16()},
            "residual is bfloat16, input is float32",
        ),
        ({"activation": "gelu"}, 'activation is "gelu", must be "relu" or "none"'),
    ],
)
def test_bad_input(change, message):
    with pytest.raises((RuntimeError, ValueError), match=message):
        operator(**(good() | change))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_input_is_refused(layout):
    arguments = good()
    arguments["input"] = torch.zeros(2, 3).to_sparse(layout=layout)
    with pytest.raises((NotImplementedError, RuntimeError)):
        operator(*list(arguments.values())[:3])


@pytest.mark.skipif("cuda" not in DEVICES, reason="no GPU")
def test_mixed_devices_are_refused():
    arguments = good()
    for name in ("scale", "shift", "residual"):
        mixed = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        mixed[name] = arguments[name]
        with pytest.raises((RuntimeError, ValueError), match=f"{name} is on cpu, input is on cuda"):
            operator(**mixed)
