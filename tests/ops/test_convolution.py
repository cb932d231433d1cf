"""The library's convolution where it is wrong by itself: crashes, and memory nobody has written."""

import math

import pytest
import torch
from support import (
    ConvShape,
    assert_within_bound,
    conv_of_taps,
    dtype_id,
    make_conv_case,
)
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet
from fused_resnet import functional
from fused_resnet.layers import convolution
from fused_resnet.testing import FACTOR, relative_error

aten = torch.ops.aten

# With the input's height and width: shapes that oneDNN 3.12 fails for. Where an output sees no
# column, or no row, of the image, in every dtype:
UNSEEN = [
    (ConvShape(16, 17, (1, 1), (3, 3), (11, 11), (2, 2)), (7, 1)),
    (ConvShape(24, 16, (1, 1), (1, 3), (1, 5), (2, 2)), (14, 1)),
    (ConvShape(32, 48, (5, 5), (2, 2), (5, 2), (2, 1)), (1, 16)),
    (ConvShape(3, 7, (3, 1), (4, 4), (2, 5), (2, 2)), (7, 2)),
    (ConvShape(24, 24, (3, 3), (2, 2), (11, 11), (2, 2)), (8, 1)),
    (ConvShape(48, 48, (1, 1), (3, 3), (5, 2), (2, 2), 48), (16, 1)),
    (ConvShape(51, 9, (3, 1), (5, 2), (0, 5), (2, 2), 3), (7, 1)),
]
# One column with a stride, or a stride beyond the filter's height, in 16 bits with AMX:
NARROW = [
    (ConvShape(4, 2, (1, 2), (2, 2)), (12, 3)),
    (ConvShape(17, 16, (3, 2), (5, 5), (1, 1)), (33, 2)),
    (ConvShape(72, 24, (3, 3), (2, 2), (1, 0), (1, 1), 3), (17, 3)),
    (ConvShape(48, 24, (2, 3), (1, 2), (1, 1)), (16, 1)),
    (ConvShape(17, 32, (3, 2), (4, 4), (1, 1)), (2, 3)),
    (ConvShape(32, 48, (2, 2), (3, 1)), (67, 5)),
]
# Few channels, one tap and a stride, the weight's gradient:
SAMPLED = [
    (ConvShape(3, 17, (1, 1), (2, 2)), (13, 9)),
    (ConvShape(12, 8, (1, 1), (3, 2), (1, 0), (1, 1), 4), (8, 9)),
]
# Some outputs see no row, or no column, and some do.
PARTLY = [
    (ConvShape(4, 6, (3, 3), (1, 1), (4, 3)), (5, 6)),
    (ConvShape(4, 6, (2, 3), (2, 1), (6, 1)), (4, 3)),
    (ConvShape(4, 6, (2, 1), (1, 1), (3, 0), (3, 1)), (1, 5)),
    (ConvShape(6, 4, (3, 3), (2, 3), (4, 9), (5, 2), 2), (4, 3)),
    (ConvShape(5, 20, (1, 1), (3, 2), (7, 1)), (9, 4)),
    # In float64 gradients of parts whose strides are channels_last's and not, of several groups.
    (ConvShape(8, 32, (2, 1), (2, 1), (2, 11), (1, 1), 4), (1, 2)),
    (ConvShape(24, 32, (1, 3), (1, 3), (0, 11), (1, 1), 8), (4, 1)),
]
SHAPES = UNSEEN + PARTLY + NARROW + SAMPLED
# One row high or one column wide, and channels_last but for the stride in that dimension.
FLAT = [
    (ConvShape(24, 8, (1, 2), (3, 1), (2, 2), (1, 2), 8), (14, 4)),
    (ConvShape(64, 40, (3, 1), (1, 1), (0, 2), (1, 1), 8), (7, 9)),
    (ConvShape(12, 4, (2, 1), (1, 2), (1, 0), (1, 1), 4), (7, 7)),
    (ConvShape(16, 32, (2, 1), (1, 1), (0, 0), (1, 1), 1), (7, 3)),
]
# What the library gets right, and is to have as it is.
SOUND = [
    (ConvShape(64, 128, (1, 1), (2, 2)), (14, 14)),
    (ConvShape(32, 32, (3, 3), (2, 2), (1, 1)), (14, 14)),
    (ConvShape(3, 64, (7, 7), (2, 2), (3, 3)), (32, 32)),
    (ConvShape(32, 32, (3, 3), (1, 1), (2, 2), (2, 2)), (8, 8)),
    (ConvShape(32, 32, (3, 3), (1, 1), (1, 1)), (1, 1)),
]
FORMATS = pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id
)
EVERY_SHAPE = pytest.mark.parametrize(("shape", "size"), SHAPES, ids=str)


def geometry(shape):
    return shape.stride, shape.padding, shape.dilation, shape.groups


def gradients(grad, x, weight, geometry):
    *numbers, groups = geometry
    return aten.convolution_backward(
        grad, x, weight, [len(weight)], *numbers, False, (0, 0), groups, (True, True, True)
    )


@pytest.mark.quick
@pytest.mark.parametrize("name", ["cpu", "reference"])
@EVERY_SHAPE
@DTYPES
@FORMATS
def test_conv_bn_act(name, shape, size, dtype, memory_format):
    case = make_conv_case(shape, size=size, dtype=dtype, memory_format=memory_format, bias=True)
    with fused_resnet.use_backend(name):
        fused = case.fused()
    assert_within_bound(fused, case.double().eager(), case.rounding_bound())


@pytest.mark.quick
@EVERY_SHAPE
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=dtype_id
)
@FORMATS
def test_gradients(shape, size, dtype, memory_format):
    case = make_conv_case(shape, size=size, dtype=dtype, memory_format=memory_format)
    x, weight, numbers = case.input, case.weight, geometry(shape)
    out = convolution.conv2d(x, weight, None, *numbers)
    assert out.is_contiguous(memory_format=memory_format)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad = grad.to(memory_format=memory_format)
    found = convolution.conv2d_backward(grad, x, weight, *numbers, (True, True, True))
    exact = gradients(grad.double(), x.double(), weight.double(), numbers)
    for ours, right, like in zip(found, exact, (x, weight, None), strict=True):
        assert ours.dtype is dtype
        assert like is None or ours.shape == like.shape
        # One rounding of what float32 sums up.
        bound = torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
        assert relative_error(ours, right) <= FACTOR * bound
    recorded_x, recorded_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    convolution.conv2d(recorded_x, recorded_weight, None, *numbers).backward(grad)
    for ours, right in ((recorded_x.grad, exact[0]), (recorded_weight.grad, exact[1])):
        assert relative_error(ours, right) <= FACTOR * bound


@pytest.mark.quick
@pytest.mark.parametrize("stride", ["0", "1", "C", "2^20"])
@pytest.mark.parametrize(("shape", "size"), FLAT, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=dtype_id
)
def test_strides_that_address_nothing(shape, size, dtype, stride):
    case = make_conv_case(shape, size=size, dtype=dtype, batch=1)
    numbers = geometry(shape)

    def unusual(tensor):
        tensor = tensor.contiguous(memory_format=torch.channels_last)
        other = {"0": 0, "1": 1, "C": tensor.size(1), "2^20": 2**20}[stride]
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        return tensor.as_strided(tensor.shape, [other if n == 1 else s for n, s in strides])

    x, weight = unusual(case.input), unusual(case.weight)
    out = convolution.conv2d(x, weight, None, *numbers)
    exact_x, exact_weight = (
        t.double().contiguous().requires_grad_() for t in (case.input, case.weight)
    )
    exact = torch.conv2d(exact_x, exact_weight, None, *numbers)
    bound = FACTOR * torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps
    assert out.dtype is dtype
    assert relative_error(out, exact) <= bound
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rights = torch.autograd.grad(exact, (exact_x, exact_weight), grad.double())
    found = convolution.conv2d_backward(grad, x, weight, *numbers, (True, True, False))
    for ours, right in zip(found[:2], rights, strict=True):
        assert relative_error(ours, right) <= bound
    with fused_resnet.use_backend("reference"):
        # Not eps = 0, which torch's batch norm did not always take.
        statistics = (
            torch.zeros(shape.out_channels),
            torch.full((shape.out_channels,), 1 - 2**-16),
        )
        statistics = statistics if dtype is not torch.float64 else [t.double() for t in statistics]
        whole = functional.conv_bn_act(
            x, weight, *statistics, eps=2**-16, stride=shape.stride, padding=shape.padding,
            dilation=shape.dilation, groups=shape.groups, activation="none",
        )  # fmt: skip
    assert relative_error(whole, exact) <= 2 * bound


@pytest.mark.quick
@pytest.mark.parametrize(("shape", "size"), [*UNSEEN[:1], *PARTLY[:5]], ids=str)
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=str)
@DTYPES
@FORMATS
def test_padding_takes_no_part(shape, size, value, dtype, memory_format):
    """Zeros in its place make NaN of an infinite weight, and of an infinite gradient."""
    case = make_conv_case(shape, size=size, dtype=dtype, memory_format=memory_format)
    numbers = geometry(shape)
    x, bias = case.input, torch.ones(shape.out_channels, dtype=dtype)
    weight = case.weight.clone()
    weight[0, 0, 0, 0] = value
    weight[-1, -1, -1, -1] = -value
    out = convolution.conv2d(x, weight, bias, *numbers)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    exact = conv_of_taps(*leaves, *numbers)
    bound = FACTOR * (torch.finfo(dtype).eps / 2 + 4 * torch.finfo(torch.float32).eps)

    def assert_alike(ours, right):
        for special in (torch.isnan, torch.isposinf, torch.isneginf):
            assert torch.equal(special(ours), special(right))
        finite = torch.isfinite(right)
        assert relative_error(ours[finite], right[finite]) <= bound

    assert exact.isfinite().any()
    assert_alike(out, exact.detach())
    # Zero at the outputs that are not finite, whose gradients say nothing; infinite at one.
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    grad[:, 0, 0, 0] = value
    grad[:, -1, -1, -1] = -value
    leaves[1].data.nan_to_num_(1, 1, 1)
    weight = weight.nan_to_num(1, 1, 1)
    exact = conv_of_taps(*leaves, *numbers)
    rights = torch.autograd.grad(exact, leaves, grad.double(), materialize_grads=True)
    explicit = convolution.conv2d_backward(grad, x, weight, *numbers, (True, True, True))
    recorded = [t.clone().requires_grad_() for t in (x, weight, bias)]
    convolution.conv2d(*recorded, *numbers).backward(grad)
    for ours, leaf, right in zip(explicit, recorded, rights, strict=True):
        assert_alike(ours, right)
        assert_alike(leaf.grad, right)


class _Handed(TorchDispatchMode):
    """What reaches torch's convolution and its backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is aten.convolution.default:
            self.calls.append((*args[:2], *args[3:6]))
        elif function is aten.convolution_backward.default:
            self.calls.append((*args[1:3], *args[4:7]))
        return function(*args, **(kwargs or {}))


@pytest.mark.quick
@EVERY_SHAPE
def test_what_the_library_gets_is_sound(shape, size):
    """By the rules themselves, so on every processor."""
    case = make_conv_case(shape, size=size, dtype=torch.bfloat16)
    x, weight, numbers = case.input, case.weight, geometry(shape)
    assert not convolution.is_sound(x, weight, *numbers[:3])
    with _Handed() as handed:
        out = convolution.conv2d(x, weight, None, *numbers)
        convolution.conv2d_backward(torch.ones_like(out), x, weight, *numbers, (False, True, False))
    assert len(handed.calls) >= (0 if (shape, size) in UNSEEN else 2)
    for call in handed.calls:
        assert convolution.is_sound(*call)


@pytest.mark.quick
@pytest.mark.parametrize(("shape", "size"), SOUND, ids=str)
def test_ordinary_convolutions_are_the_librarys(shape, size):
    case = make_conv_case(shape, size=size, dtype=torch.bfloat16)
    x, weight, numbers = case.input, case.weight, geometry(shape)
    with _Handed() as handed:
        out = convolution.conv2d(x, weight, None, *numbers)
    (call,) = handed.calls
    assert call[0].shape == x.shape
    assert call[0].dtype is x.dtype
    assert torch.equal(out, torch.conv2d(x, weight, None, *numbers))


@pytest.mark.quick
def test_bad_geometry_is_refused_as_by_torch():
    x, weight = torch.ones(1, 2, 4, 4), torch.ones(3, 2, 1, 1)
    for numbers in (((2, 2), (9, -1), (1, 1), 1), ((0, 2), (9, 9), (1, 1), 1)):
        with pytest.raises(RuntimeError):
            convolution.conv2d(x, weight, None, *numbers)


@pytest.mark.quick
@FORMATS
def test_long_sums(memory_format):
    """One chain of 512 products after another had 1.9 times the error of the library's sums."""
    case = make_conv_case(
        ConvShape(512, 512, (3, 3), padding=(1, 1)), size=(5, 5), memory_format=memory_format
    )
    exact = case.double().eager()
    bound = FACTOR * relative_error(case.eager(), exact)
    assert relative_error(case.fused(), exact) <= bound


@pytest.mark.quick
@pytest.mark.parametrize("name", ["cpu", "reference"])
@FORMATS
def test_expanded_statistics(name, memory_format):
    """A view of one number for all channels gives the gradients that a dense vector gives."""
    x = torch.randn(2, 8, 5, 5, generator=torch.Generator().manual_seed(0))
    x = x.to(memory_format=memory_format)
    weight = torch.randn(16, 8, 3, 3, generator=torch.Generator().manual_seed(1))

    def run(dense):
        vectors = [torch.full((1,), value).expand(16) for value in (0.5, 2.0, 1.5, 0.25)]
        if dense:
            vectors = [vector.contiguous() for vector in vectors]
        mean, var, scale, shift = vectors
        leaves = [t.detach().requires_grad_() for t in (x, weight, scale, shift)]
        inputs = [*leaves[:2], mean, var, *leaves[2:]]
        with fused_resnet.use_backend(name):
            out = functional.conv_bn_act(*inputs, padding=1)
            norm = functional.batch_norm_act(out, mean, var, *leaves[2:])
            (out.square().sum() + norm.square().sum()).backward()
        return [out, norm, *(leaf.grad for leaf in leaves)]

    for ours, right in zip(run(dense=False), run(dense=True), strict=True):
        assert relative_error(ours, right.double()) < 1e-5
