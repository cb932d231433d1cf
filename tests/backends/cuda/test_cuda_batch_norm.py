"""The CUDA kernels of batch norm by themselves: every shape, layout, order and mask they meet.

What any backend promises of `batch_norm_act` is in test_batch_norm_act.py and test_gradients.py,
which run over this one too. Here every single value has a bound, of rounding alone: gradients are
compared with those of a float64 run whose ReLUs go the same way.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from ops.test_training import kept_by
from support import (
    assert_same_bits,
    assert_same_nonfinite,
    assert_within_bound,
    dtype_id,
    unchanged,
)
from torch import Tensor
from torchvision.models import resnet

import fused_resnet
from fused_resnet import _native, backends, reference
from fused_resnet.backends import cuda
from fused_resnet.layers.description import Norm, Sums
from fused_resnet.testing import randomize_
from fused_resnet.tuning import architecture, cluster_norm

ON_HOST = backends.cuda.on_host()
if backends.cuda.available() != "yes":
    pytest.skip(f"cuda: {backends.cuda.available()}", allow_module_level=True)
if ON_HOST:
    from support import cuda_on_host

DEVICE = "cpu" if ON_HOST else "cuda"

pytestmark = pytest.mark.usefixtures("guarded_tensors")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
EPS = 1e-5
UNIT = torch.finfo(torch.float32).eps

# Rows and channels: of one block and of many, of whole rounds of loads and not, in one slab and in
# several, with and without threads to spare, in 16-byte accesses and element by element.
SHAPES = [
    (2, 1), (1009, 1), (4099, 1), (1021, 3), (1, 8), (97, 24), (409, 40), (521, 64), (67, 33),
    (131, 264), (75, 2048), (1, 132),
]  # fmt: skip


@pytest.fixture(params=[False, True], ids=["launches", "cluster"])
def in_clusters(request, monkeypatch):
    """With a launch for each pass, and in one launch wherever that is possible."""
    if not request.param:
        monkeypatch.setattr(cuda, "_fits_cluster", lambda *_: False)
    elif DEVICE == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no clusters")
    return request.param


@pytest.fixture(autouse=True)
def in_launches(request, monkeypatch):
    """Tests that say nothing of clusters are of the kernels without."""
    if "in_clusters" not in request.fixturenames:
        monkeypatch.setattr(cuda, "_fits_cluster", lambda *_: False)


@dataclass
class Case:
    """What `batch_norm_act` is called with, and a gradient of its output."""

    input: Tensor
    grad: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    activation: str

    def tensors(self) -> dict[str, Tensor]:
        return {n: t for n, t in vars(self).items() if isinstance(t, Tensor)}

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        return cuda.batch_norm_act_training(
            self.input, self.weight, self.bias, EPS, self.residual, self.activation
        )

    def backward(self, output, mean, var, training=True, need=None, overwrite=False):
        need = need or (True, True, True, self.residual is not None)
        return cuda.batch_norm_act_backward(
            self.grad, self.input, output, self.norm(mean, var), self.activation, training, need,
            overwrite,
        )  # fmt: skip

    def norm(self, mean: Tensor | None = None, var: Tensor | None = None) -> Norm:
        """With these statistics, or with those that are still to be found."""
        return Norm(mean, var, self.weight, self.bias, EPS)


def as_image(rows: Tensor) -> Tensor:
    """(rows, C) as an image of that many pixels, channels_last."""
    return rows.unsqueeze(0).unsqueeze(0).permute(0, 3, 1, 2)


def make_case(
    rows: int,
    channels: int,
    dtype: torch.dtype,
    residual: bool = False,
    activation: str = "relu",
    affine: bool = True,
    mean: float = 0.5,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    def image(values):
        return as_image(values.to(dtype)).to(DEVICE)

    x = normal(rows, channels) * (1 + torch.arange(channels) % 3) + mean * normal(channels)
    return Case(
        image(x),
        image(normal(rows, channels)),
        image(normal(rows, channels)) if residual else None,
        (normal(channels) * 0.3 + 1).to(DEVICE) if affine else None,
        normal(channels).to(DEVICE) if affine else None,
        activation,
    )


class Exact:
    """Everything in float64, with a bound on each value's rounding.

    A sum of n rounded terms in any tree of additions is off by far less than n units of the sum of
    their magnitudes; 64 units are less still than what one forgotten row makes.
    """

    def __init__(self, case: Case, mask: Tensor | None, statistics=None) -> None:
        def wide(t):
            return None if t is None else t.double()

        x, z, g = wide(case.input), wide(case.residual), wide(case.grad)
        channels = (1, -1, 1, 1)
        one = torch.ones(x.size(1), dtype=torch.float64, device=x.device)
        weight = one if case.weight is None else wide(case.weight)
        bias = 0 * one if case.bias is None else wide(case.bias)
        dims, n = (0, 2, 3), x.numel() // x.size(1)
        half = torch.finfo(case.input.dtype).eps / 2
        tiny = torch.finfo(case.input.dtype).smallest_normal * half

        self.mean, self.var = x.mean(dims), x.var(dims, unbiased=False)
        self.mean_bound = 8 * UNIT * x.abs().mean(dims)
        # Deviations are of numbers rounded to units of their own size.
        self.var_bound = 64 * UNIT * self.var + (4 * UNIT * x.abs().amax(dims)) ** 2
        mean, var = statistics or (self.mean, self.var)
        invstd = (var + EPS).rsqrt()
        scale = (weight * invstd).view(channels)
        # A relative error of the variance is half as large in the scale.
        relative = 64 * UNIT + (self.var_bound / (self.var + EPS)).view(channels)
        d = x - mean.view(channels)
        d_size = d.abs() + 8 * UNIT * (x.abs() + mean.view(channels).abs())
        y = d * scale + bias.view(channels)
        size = (d.abs() + x.abs() + mean.view(channels).abs()) * scale.abs()
        size = size + bias.abs().view(channels)
        if z is not None:
            y, size = y + z, size + z.abs()
        self.output = y.relu() if case.activation == "relu" else y
        self.output_bound = relative * size + 1.01 * half * self.output.abs() + tiny
        if mask is not None:
            g = torch.where(mask, g, 0.0)
        self.grad_residual = g
        self.total, self.dot = g.sum(dims), (g * d).sum(dims)
        total_size, dot_size = g.abs().sum(dims), (g.abs() * d_size).sum(dims)
        self.total_bound = 64 * UNIT * total_size
        self.dot_bound = 64 * UNIT * dot_size + 8 * UNIT * total_size * mean.abs()
        self.grad_weight = self.dot * invstd
        self.grad_weight_bound = invstd * (self.dot_bound + relative.flatten() * dot_size)
        self.grad_input, size = g * scale, g.abs() * scale.abs()
        if statistics is None:
            invstd2 = (invstd**2).view(channels)
            dot, dot_size = self.dot.view(channels), dot_size.view(channels)
            through = self.total.view(channels) / n + d * invstd2 * dot / n
            self.grad_input = self.grad_input - through * scale
            through = total_size.view(channels) / n + d_size * invstd2 * dot_size / n
            size = size + through * scale.abs()
        self.grad_input_bound = 3 * relative * size + 1.01 * half * self.grad_input.abs() + tiny

    def check(self, **actual: Tensor | None) -> None:
        for name, tensor in actual.items():
            expected = getattr(self, name)
            bound = getattr(self, f"{name}_bound", torch.zeros_like(expected))
            try:
                assert_within_bound(tensor, expected, bound)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from None


def check(case: Case, output_to_backward: bool) -> list[Tensor]:
    """Forward and backward of a case, every value of it; returns all results."""
    with unchanged(**case.tensors()):
        output, mean, var = case.forward()
        keep = output_to_backward or case.residual is not None
        grads = case.backward(output if keep else None, mean, var)
    exact = Exact(case, output > 0 if case.activation == "relu" else None)
    assert output.stride() == case.input.stride()
    assert mean.dtype == var.dtype == grads[1].dtype == grads[2].dtype == torch.float32
    exact.check(
        mean=mean, var=var, output=output, grad_input=grads[0], grad_weight=grads[1],
        total=grads[2],
    )  # fmt: skip
    if case.residual is not None:
        exact.check(grad_residual=grads[3])
    return [output, mean, var, *(g for g in grads if g is not None)]


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.single
def test_every_value(dtype, shape, set_seed):
    """With and without residual, activation and parameters; the mask read and computed again."""
    set_seed(shape[0])
    check(make_case(*shape, dtype), output_to_backward=False)
    check(make_case(*shape, dtype, residual=True), output_to_backward=True)
    if shape[0] * shape[1] < 10_000:
        check(make_case(*shape, dtype, affine=False), output_to_backward=True)
        check(make_case(*shape, dtype, True, "none", affine=False), output_to_backward=False)
        check(make_case(*shape, dtype, False, "none"), output_to_backward=False)


# Images, rows, columns and channels of an output, and channels of its residual: those of CIFAR's
# networks, every width of an access, odd numbers of channels before, and one channel.
NARROW = [
    (2, 16, 16, 32, 16), (1, 8, 8, 64, 32), (3, 5, 7, 64, 56), (2, 7, 5, 40, 36), (1, 9, 1, 24, 22),
    (2, 1, 9, 48, 45), (5, 3, 2, 32, 1), (2, 4, 3, 33, 16), (3, 2, 5, 29, 13), (1, 3, 3, 264, 248),
]  # fmt: skip


def narrow_case(sizes, dtype, activation, layout) -> tuple[Case, Tensor]:
    """A case with a padded residual, and the residual as it was, between NaNs."""
    N, P, Q, C, channels = sizes
    case = make_case(N * P * Q, C, dtype, True, activation)
    for name in ("input", "grad", "residual"):
        rows = getattr(case, name).permute(0, 2, 3, 1).reshape(N, P, Q, C)
        setattr(case, name, rows.permute(0, 3, 1, 2))
    values = case.residual[:, :channels]
    options = {"dtype": dtype, "device": DEVICE}
    if layout == "subsampled":
        narrow = torch.full((N, 2 * P, 2 * Q, channels), math.nan, **options)[:, 1::2, 1::2]
    elif layout == "gaps":
        narrow = torch.full((N, P, Q, channels + 3), math.nan, **options)[..., 3:]
    else:
        narrow = torch.full((N, channels, P, Q), math.nan, **options).permute(0, 2, 3, 1)
    narrow = narrow.permute(0, 3, 1, 2).copy_(values)
    case.residual = reference.pad_channels(narrow, C)
    return case, narrow


@pytest.mark.quick
@pytest.mark.parametrize("sizes", NARROW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_narrow_residual(dtype, sizes, set_seed):
    """One of fewer channels is read where it lies, and gives what it gives between zeros."""
    for seed, layout in enumerate(("subsampled", "gaps", "contiguous")):
        set_seed(seed)
        activation = ("relu", "none")[seed % 2]
        case, narrow = narrow_case(sizes, dtype, activation, layout)
        padded = check(case, output_to_backward=True)
        case.residual = narrow
        with unchanged(**case.tensors()):
            for again, before in zip(case.forward(), padded[:3], strict=True):
                assert_same_bits(again, before)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nonfinite_values_of_a_narrow_residual(dtype):
    for sizes in ((2, 3, 5, 32, 16), (2, 3, 5, 33, 18)):
        case, narrow = narrow_case(sizes, dtype, "relu", "subsampled")
        narrow[0, 0, 0, 1], narrow[1, -1, 2, 4], narrow[1, 3, 1, 1] = math.nan, math.inf, -math.inf
        norm = (case.input.double(), None, None, case.weight.double(), case.bias.double(), True)
        padded = reference.pad_channels(narrow, sizes[3])
        expected = (F.batch_norm(*norm) + padded.double()).relu()
        case.residual = narrow
        assert_same_nonfinite(case.forward()[0], expected.to(dtype))


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(7, 24), (3, 24, 5), (2, 24, 3, 4, 5)], ids=str)
def test_narrow_residuals_of_other_dimensions(shape):
    """Up to four by the same kernel; more by the one for any strides."""
    x, z = torch.randn(2, *shape, device=DEVICE).movedim(2, -1).contiguous().movedim(-1, 2)
    z = z[:, :17]
    statistics = [torch.rand(24, device=DEVICE) + 0.5 for _ in range(4)]
    with unchanged(x=x, z=z):
        narrow = cuda.batch_norm_act_inference(x, Norm(*statistics, EPS), z, "relu")
    padded = reference.pad_channels(z, 24)
    expected = reference.batch_norm_act_inference(
        x.double(), *(t.double() for t in statistics), EPS, padded.double(), "relu"
    )
    torch.testing.assert_close(narrow.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not ON_HOST, reason="counts what the host's kernels load")
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_widths_of_accesses_to_a_narrow_residual(dtype):
    """The widest that channels, strides and address allow, by both kernels that add one."""
    module, size = cuda_on_host.load(), dtype.itemsize
    ones = torch.ones(64)

    def loads(function, *arguments):
        before = module.loads()
        function(*arguments)
        return Counter({b: n - before[b] for b, n in module.loads().items()})

    def normalize(x, z):
        return cuda.batch_norm_act_inference(x, Norm(ones, ones, None, None, EPS), z, "relu")

    def add(x, z):
        return _native.cuda_operators.scale_shift_act(x, ones, ones, z, "relu")

    for function in (normalize, add):
        width = 16 // size
        while width:
            channels = 64 - 2 * width
            case, narrow = narrow_case((2, 3, 5, 64, channels), dtype, "relu", "subsampled")
            expected = loads(function, case.input, None)
            expected += Counter({width * size: 30 * channels // width})
            assert loads(function, case.input, narrow) == expected, (function, width)
            width //= 2
        for layout in ("gaps", "contiguous"):
            case, narrow = narrow_case((2, 3, 5, 64, 48), dtype, "relu", layout)
            expected = loads(function, case.input, None)
            assert loads(function, case.input, narrow)[size] == expected[size] + 30 * 48


@pytest.mark.quick
def test_bad_narrow_residuals():
    x, ones = as_image(torch.randn(6, 8)).to(DEVICE), torch.ones(8, device=DEVICE)
    normalize = _native.cuda_operators.batch_norm_normalize
    for shape in ((1, 9, 1, 6), (1, 0, 1, 6), (1, 4, 2, 6), (2, 4, 1, 6), (1, 4, 6)):
        with pytest.raises(ValueError, match=r"residual (has|is) "):
            normalize(x, ones, ones, None, None, EPS, torch.ones(shape, device=DEVICE), True)
    half = torch.ones(1, 4, 1, 6, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"residual (has|is) "):
        normalize(x, ones, ones, None, None, EPS, half, True)
    # Dense, with channels innermost, but not in the order in which pixels are numbered.
    x = torch.randn(3, 5, 2, 8, device=DEVICE).permute(2, 3, 1, 0)
    residual = torch.ones(2, 4, 5, 3, device=DEVICE)
    with pytest.raises(ValueError, match="input must be channels_last"):
        normalize(x, ones, ones, None, None, EPS, residual, True)


# Of a cluster's kernels: rows for some of its blocks only, rounds for some of their stages, as many
# rounds as are loaded at once and more, slabs of four lanes, and of two with one to spare.
CLUSTERED = [(2, 16), (7, 24), (1600, 8), (14339, 16), (2603, 512)]


@pytest.mark.quick
@pytest.mark.parametrize("in_clusters", [True], indirect=True, ids=["cluster"])
@pytest.mark.parametrize("shape", CLUSTERED, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.single
def test_every_value_in_a_cluster(dtype, shape, set_seed, in_clusters):
    set_seed(shape[0])
    large = shape[0] * shape[1] > 500_000
    if not large or dtype == torch.float16:
        check(make_case(*shape, dtype), output_to_backward=False)
    if not large:
        check(make_case(*shape, dtype, True, "none", affine=False), output_to_backward=False)
    if not large or dtype == torch.bfloat16:
        check(make_case(*shape, dtype, residual=True), output_to_backward=True)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("in_clusters", [True], indirect=True, ids=["cluster"])
def test_far_from_zero_in_a_cluster(dtype, in_clusters):
    """Statistics as precise as those of the kernel that has a launch of its own for them."""
    mean = 1e4 if dtype == torch.float32 else 1e2
    for rows, blank in ((2, 0), (7, 3), (300, 100), (5003, 0), (5003, 1), (5003, 300)):
        x = torch.randn(rows, 16) + mean
        x[:blank] = 0
        x = as_image(x.to(dtype)).to(DEVICE)
        _, actual_mean, var = cuda.batch_norm_act_training(x, None, None, EPS, None, "none")
        expected_var, expected_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
        torch.testing.assert_close(actual_mean.double(), expected_mean, rtol=4 * UNIT, atol=0)
        torch.testing.assert_close(
            var.double(), expected_var, rtol=64 * UNIT, atol=(2 * UNIT * mean) ** 2
        )


@pytest.mark.quick
@pytest.mark.parametrize("in_clusters", [True], indirect=True, ids=["cluster"])
def test_what_runs_in_clusters(monkeypatch, in_clusters):
    """All that fits, and nothing whose accesses would not be of 16 bytes."""
    ran, original = [], cuda._batch_norm

    def recorded(name):
        if name != "fits_cluster":
            ran.append(name)
        return original(name)

    def names(case, forward=None, need=(True, True, True, True)):
        ran.clear()
        output, mean, var = forward() if forward else case.forward()
        of_forward = tuple(ran)
        ran.clear()
        case.backward(output, mean, var, need=need)
        return of_forward, tuple(ran)

    monkeypatch.setattr(cuda, "_batch_norm", recorded)
    once = ("in_one_launch",), ("backward_in_one_launch",)
    apart = ("statistics", "normalize"), ("gradient_sums", "input_gradient")
    for dtype in DTYPES:
        assert names(make_case(97, 24, dtype, True)) == once
        assert names(make_case(97, 20 if dtype == torch.float32 else 24, dtype)) == once
        assert names(make_case(97, 18, dtype)) == apart
        case = make_case(97, 24, dtype, True)
        case.residual = misaligned(case.residual)
        assert names(case) == (apart[0], once[1])
        case.grad = misaligned(case.grad)
        assert names(case) == apart
        case = make_case(97, 24, dtype, True)

        def keeping_mask(case=case):
            arguments = (case.input, case.norm(), case.residual, None)
            _, mask, statistics, _ = cuda.batch_norm_add_relu(*arguments)
            return mask, *statistics

        assert names(case, keeping_mask) == once
        case.residual = case.residual[:, :16]
        assert names(case)[0] == apart[0]
    case = make_case(97, 24, torch.float16)
    assert names(case, need=(False, True, True, False))[1] == ("gradient_sums",)


@pytest.mark.quick
def test_what_fits_clusters():
    """As many rows of two accesses as a cluster's shared memory holds; see `cluster_norm.py`."""
    fits = _native.cuda_operators.batch_norm_fits_cluster
    gpu = architecture.of_device(torch.device(DEVICE))
    shapes = itertools.product((1, 12544, 28672, 28673, 57344, 57345), (8, 64, 2048))
    for (rows, channels), tensors in itertools.product(shapes, (1, 2)):
        for dtype in (torch.float16, torch.float32):
            x = torch.empty(1, dtype=dtype, device=DEVICE).expand(rows, channels)
            expected = cluster_norm.fits(rows, channels, dtype.itemsize, tensors, gpu)
            assert fits(x, tensors) == expected, (rows, channels, tensors, dtype)
    if ON_HOST:
        x = as_image(torch.empty(57345, 8, dtype=torch.float16))
        with pytest.raises(ValueError, match="does not fit in a cluster's shared memory"):
            _native.cuda_operators.batch_norm_in_one_launch(x, None, None, EPS, None, True, None)
    x = as_image(torch.empty(6, 12, dtype=torch.float16, device=DEVICE))
    if fits(x, 1):
        with pytest.raises(ValueError, match=r"does not fit|channels must fill accesses"):
            _native.cuda_operators.batch_norm_in_one_launch(x, None, None, EPS, None, True, None)


@pytest.mark.quick
def test_more_blocks_than_are_combined_at_once():
    """So many blocks of rows that the kernels between the passes loop over them."""
    rows, channels = 64 * 290 + 5, 31  # eight rows side by side, loaded eight times
    check(make_case(rows, channels, torch.float32, mean=30), output_to_backward=False)


@pytest.mark.quick
@pytest.mark.parametrize("channels", [1, 20, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_statistics_far_from_zero(dtype, channels):
    """A mean of 1e4 beside a deviation of 1 costs no digits of the variance."""
    mean = 1e4 if dtype == torch.float32 else 1e2
    for rows, blank in ((7, 0), (7, 3), (300, 0), (300, 100), (5003, 0), (5003, 1), (5003, 300)):
        x = torch.randn(rows, channels) + mean
        x[:blank] = 0  # as if the first image were
        x = as_image(x.to(dtype)).to(DEVICE)
        actual_mean, var = cuda.batch_statistics(x)
        expected_var, expected_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
        torch.testing.assert_close(actual_mean.double(), expected_mean, rtol=4 * UNIT, atol=0)
        torch.testing.assert_close(
            var.double(), expected_var, rtol=64 * UNIT, atol=(2 * UNIT * mean) ** 2
        )


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("origin", ["of zero", "far from most"])
def test_means_are_rounded_once(origin):
    """What every merge's rounding takes of a mean is kept in a second number.

    Half a unit in the last place is the last rounding's. A mean that is rounded with every merge is
    off by more in some of the channels, and one of its origin and two numbers in some where the
    two are a tie.
    """
    rows, channels = 64 * 40 + 5, 96
    if origin == "of zero":
        x = torch.rand(rows, channels) + 1
        x[-1] = 9  # of the three rows that an origin is made of, for it to be none
    else:
        x = 60 + 30 * torch.rand(rows, channels)
        x[[0, rows // 2, -1]] = 30 + torch.rand(3, channels)
    image = as_image(x).to(DEVICE)
    _, mean, _ = cuda.batch_norm_act_training(image, None, None, EPS, None, "none")
    exact = x.double().mean(0)
    unit = torch.nextafter(mean.cpu(), torch.tensor(math.inf)).double() - mean.double().cpu()
    assert ((mean.double().cpu() - exact).abs() / unit).max() < 0.6


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_constant_channel(dtype):
    """Its variance is nothing, and its gradient finite."""
    case = make_case(1301, 8, dtype)
    case.input[:, 2:5] = 3.7
    _, mean, var = case.forward()
    assert (var[2:5] <= (2 * UNIT * 3.7) ** 2).all()
    assert (var[:2] > 0.1).all()
    for tensor in case.backward(None, mean, var)[:3]:
        assert tensor.isfinite().all()


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [(1301, 24), (67, 264)], ids=lambda shape: "{}x{}".format(*shape))
def test_the_same_bits_in_any_order(shape, dtype, residual, set_seed):
    """Threads and blocks come in another order with each seed, on GPUs of any size."""
    case = make_case(*shape, dtype, residual)

    def run():
        output, mean, var = case.forward()
        grads = case.backward(output if residual else None, mean, var)
        return [output, mean, var, *(g for g in grads if g is not None)]

    first = run()
    for seed in range(1, 5):
        set_seed(seed)
        if ON_HOST:
            cuda_on_host.load().set_processors([1, 4, 132, 1000][seed - 1])
        for again, before in zip(run(), first, strict=True):
            assert_same_bits(again, before)
    if ON_HOST:
        cuda_on_host.load().set_processors(4)


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nonfinite_values(dtype, value):
    """They stay in their channel, and mean and variance are what they are in eager."""
    rows, channels = 1301, 24
    for row, place in itertools.product((0, 700, rows - 1), ("input", "residual", "grad")):
        case = make_case(rows, channels, dtype, residual=True)
        getattr(case, place)[0, 5, 0, row] = value
        if place == "input" and row == 700:
            case.input[0, 7, 0, [3, 900]] = value  # twice
            case.input[0, 9, 0, [3, 900]] = torch.tensor([value, -value], dtype=dtype).to(DEVICE)
        output, mean, var = case.forward()
        expected = F.batch_norm(
            case.input.double(), None, None, case.weight.double(), case.bias.double(), True
        )
        expected = (expected + case.residual.double()).relu()
        assert_same_nonfinite(output, expected.to(dtype))
        assert_same_nonfinite(mean, case.input.double().mean((0, 2, 3)))
        assert_same_nonfinite(var, case.input.double().var((0, 2, 3)))
        grads = case.backward(output, mean, var)
        masked = torch.ops.aten.threshold_backward(case.grad, output, 0)
        torch.testing.assert_close(grads[3], masked, rtol=0, atol=0, equal_nan=True)
        touched = {5, 7, 9} if place == "input" and row == 700 else {5}
        for grad in grads[:3]:
            finite = (
                grad.isfinite().transpose(0, 1).flatten(1)
                if grad.dim() > 1
                else (grad.isfinite()[:, None])
            )
            for channel in set(range(channels)) - touched:
                assert finite[channel].all(), (place, channel)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_nan_lets_the_gradient_pass(dtype):
    """As in torch, whichever way the mask is found."""
    case = make_case(40, 16, dtype)
    case.input[0, 3, 0, 7] = math.nan
    mean, var = torch.zeros(2, 16, device=DEVICE).add(1).unbind(0)
    output = cuda.batch_norm_act_inference(case.input, case.norm(mean, var), None, "relu")
    assert output[0, 3, 0, 7].isnan()
    for kept in (output, None):
        grad_input = case.backward(kept, mean, var, False, (True, False, False, False))[0]
        assert_within_bound(
            grad_input[:, 3, 0, 7],
            (case.grad[:, 3, 0, 7] * case.weight[3] * (1 + EPS) ** -0.5).double(),
            0.01 * case.grad[:, 3, 0, 7].double().abs(),
        )


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_the_mask_computed_again_is_the_outputs(dtype):
    """To the bit: also where an output is positive but stored as zero."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for scale, bias in ((1.0, None), (smallest, 0.0)):
        case = make_case(1301, 24, dtype)
        if bias is not None:
            case.weight.fill_(scale)
            case.bias.zero_()
        output, mean, var = case.forward()
        if bias is not None and dtype != torch.float32:
            positive = case.input.double() > mean.double().view(1, -1, 1, 1) + 1e-3
            assert (positive & (output == 0)).any()
        for training in (True, False):
            again = case.backward(None, mean, var, training)
            for ours, theirs in zip(again, case.backward(output, mean, var, training), strict=True):
                if theirs is not None:
                    assert_same_bits(ours, theirs)


# Of a multiple of 8 channels, whose threads share the bytes of a mask in every way: in one slab and
# in several, whose lanes would not be of such a number by themselves.
MASKED = [(1, 8), (97, 24), (409, 40), (521, 64), (61, 136), (131, 264), (75, 2048)]


def misaligned(tensor: Tensor) -> Tensor:
    """The same, beginning an element behind a 16-byte boundary."""
    room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)[1:]
    rows = tensor.permute(0, 2, 3, 1)
    return room.view(rows.shape).copy_(rows).permute(0, 3, 1, 2)


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("shape", MASKED, ids=lambda shape: "{}x{}".format(*shape))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_masks(dtype, shape, aligned, set_seed):
    """A bit for each output that is not <= 0; with it, gradients to the bits of the output's."""
    set_seed(shape[0])
    case = make_case(*shape, dtype, residual=True)
    case.input[0, 1, 0, -1], case.residual[0, -1, 0, 0] = math.nan, math.inf
    if not aligned:
        case.input, case.residual = misaligned(case.input), misaligned(case.residual)
    expected = case.forward()
    with unchanged(**case.tensors()):
        output, mask, (mean, var), _ = cuda.batch_norm_add_relu(
            case.input, case.norm(), case.residual, None
        )
    for ours, theirs in zip((output, mean, var), expected, strict=True):
        assert_same_bits(ours, theirs)
    passed = ~(output <= 0).permute(0, 2, 3, 1).reshape(-1, 8)
    bits = passed << torch.arange(8, device=DEVICE)
    assert torch.equal(mask, bits.sum(1).to(torch.uint8))
    assert 0 < passed.sum() < passed.numel()
    again = cuda.batch_norm_add_relu(case.input, case.norm(mean, var), case.residual, None)
    assert_same_bits(again[0], output)
    assert torch.equal(again[1], mask)
    for training, *need in itertools.product((True, False), repeat=5):
        if all(need) or (any(need) and shape == MASKED[1]):
            from_bits = case.backward(mask, mean, var, training, need)
            from_output = case.backward(output, mean, var, training, need)
            for ours, theirs in zip(from_bits, from_output, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    assert_same_bits(ours, theirs)


@pytest.mark.quick
def test_a_mask_beside_a_narrow_residual():
    for sizes in NARROW:
        case, narrow = narrow_case(sizes, torch.float32, "relu", "gaps")
        expected = cuda.batch_norm_add_relu(case.input, case.norm(), case.residual, None)
        found = cuda.batch_norm_add_relu(case.input, case.norm(), narrow, None)
        assert (found is None) == (expected is None) == (sizes[3] % 8 > 0)
        if found is not None:
            assert_same_bits(found[0], expected[0])
            assert torch.equal(found[1], expected[1])


@pytest.mark.skipif(not ON_HOST, reason="counts what the host's kernels load")
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_a_mask_is_all_that_is_read_of_the_output(dtype):
    """A byte for each access that reads the output where there is no mask."""
    case = make_case(97, 64, dtype, residual=True)
    output, mask, (mean, var), _ = cuda.batch_norm_add_relu(
        case.input, case.norm(), case.residual, None
    )
    module, loads = cuda_on_host.load(), {}
    for kept in (output, mask):
        for need in ((False, True, True, False), (True, False, False, False)):
            before = module.loads()
            case.backward(kept, mean, var, False, need)
            found = Counter({b: n - before[b] for b, n in module.loads().items()})
            loads[kept.dtype is torch.uint8, need] = found
    for (is_mask, need), found in loads.items():
        if is_mask:
            saved = loads[False, need] - found
            assert saved == {16: 97 * 64 * dtype.itemsize // 16}, need
            assert found - loads[False, need] == {1: saved[16]}, need


@pytest.mark.quick
def test_bad_masks():
    x, ones = as_image(torch.randn(6, 8)).to(DEVICE), torch.ones(12, device=DEVICE)
    operators, vector = _native.cuda_operators, ones[:8]
    arguments = (vector, vector, None, None, EPS)
    room = torch.ones(48, dtype=torch.uint8, device=DEVICE)
    for mask in (room[:5], room[:12:2], room, room[:6].bool()):
        with pytest.raises(ValueError, match="a mask must have a bit for each value"):
            operators.batch_norm_normalize(x, *arguments, x, True, mask)
    for mask in (room[:5], room[:12:2], room):
        with pytest.raises(ValueError, match="a mask must have a bit for each value"):
            operators.batch_norm_gradient_sums(x, x, mask, *arguments, True, None)
    x = as_image(torch.randn(6, 12)).to(DEVICE)
    mask = torch.ones(9, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="a multiple of 8 channels, not 12"):
        operators.batch_norm_normalize(x, ones, ones, None, None, EPS, x, True, mask)


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("projection", [True, False], ids=["projection", "identity"])
def test_blocks_keep_masks(monkeypatch, projection):
    """As bits instead of their outputs, for the same gradients to the bit."""
    channels = 8 if projection else 32
    shortcut = None
    if projection:
        shortcut = torch.nn.Sequential(resnet.conv1x1(8, 32, 2), torch.nn.BatchNorm2d(32))
    eager = resnet.Bottleneck(channels, 8, 2 if projection else 1, shortcut).train()
    eager = randomize_(eager).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(2, channels, 6, 5, device=DEVICE).to(memory_format=torch.channels_last)
    results, kept = [], []
    with fused_resnet.use_backend("cuda"):
        for keep in (True, False):
            if not keep:
                monkeypatch.delattr(cuda.Cuda, "batch_norm_add_relu")
            fused = fused_resnet.fuse(copy.deepcopy(eager))
            leaf = x.clone().requires_grad_()
            kept.append(kept_by(fused, leaf))
            out = fused(leaf)
            grads = torch.autograd.grad(out.square().sum(), [leaf, *fused.parameters()])
            results.append([out.detach(), *grads])
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)
    elements = results[0][0].numel()
    assert kept[1] - kept[0] == 4 * elements - elements // 8


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_what_is_asked_for(dtype):
    """Any gradients alone, through the batch's statistics and with given ones."""
    for training, residual in itertools.product((True, False), (True, False)):
        case = make_case(409, 40, dtype, residual)
        statistics = None
        output, mean, var = case.forward()
        if not training:
            mean, var = mean + 0.25, var * 1.5
            output = cuda.batch_norm_act_inference(
                case.input, case.norm(mean, var), case.residual, "relu"
            )
            statistics = (mean.double(), var.double())
        exact = Exact(case, output > 0, statistics)
        exact.check(output=output)
        names = ("grad_input", "grad_weight", "total", "grad_residual")
        for need in itertools.product((True, False), repeat=4):
            if (need[3] and not residual) or not any(need):
                continue
            with unchanged(**case.tensors()):
                grads = case.backward(output, mean, var, training, need)
            assert [g is not None for g in grads] == list(need)
            exact.check(**{n: g for n, g in zip(names, grads, strict=True) if g is not None})


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("residual", [True, False])
def test_overwriting_the_gradient(residual, activation):
    case = make_case(409, 40, torch.float32, residual, activation)
    output, mean, var = case.forward()
    expected = case.backward(output, mean, var)
    before = case.grad.clone()
    grads = case.backward(output, mean, var, overwrite=True)
    for ours, theirs in zip(grads, expected, strict=True):
        if theirs is not None:
            assert_same_bits(ours, theirs if theirs is not case.grad else before)
    # Unless it is the gradient of the residual at the same time.
    kept = residual and activation == "none"
    assert (grads[0].data_ptr() == case.grad.data_ptr()) == (not kept)


@pytest.mark.quick
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_sums_of_a_batch_in_two_parts(activation, residual):
    """What processes that share their statistics do: the joint batch's gradients."""
    case = make_case(409, 40, torch.float32, residual, activation)
    output, mean, var = case.forward()
    exact = Exact(case, output > 0 if activation == "relu" else None)
    parts = [slice(0, 150), slice(150, 409)]
    norm = (case.norm(mean, var), activation)
    arguments = []
    for part in parts:
        kept = output[..., part] if residual else None
        arguments.append((case.grad[..., part], case.input[..., part], kept, *norm))
    sums = [cuda.batch_norm_act_backward_sums(*a) for a in arguments]
    total, dot = sum(s[0] for s in sums), sum(s[1] for s in sums)
    exact.check(total=total, dot=dot)
    for count in (409, torch.tensor(409.0, device=DEVICE)):
        grads = [
            cuda.batch_norm_act_backward_input(*a, Sums(total, dot, count), residual)
            for a in arguments
        ]
        exact.check(grad_input=torch.cat([g[0] for g in grads], 3))
        if residual:
            exact.check(grad_residual=torch.cat([g[1] for g in grads], 3))
        else:
            assert grads[0][1] is None
    # Of a batch that is whole, to the bit.
    whole = (case.grad, case.input, output if residual else None, *norm)
    total, dot = cuda.batch_norm_act_backward_sums(*whole)
    grad = case.grad.clone(memory_format=torch.preserve_format)
    grad_input, grad_residual = cuda.batch_norm_act_backward_input(
        grad, *whole[1:], Sums(total, dot, 409), residual, overwrite=True
    )
    expected = case.backward(output, mean, var)
    assert_same_bits(grad_input, expected[0])
    assert_same_bits(total, expected[2])
    if residual:
        assert_same_bits(grad_residual, expected[3])


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_misaligned_tensors(dtype):
    """One of them is enough to have all loaded element by element."""
    for name in ("input", "grad", "residual"):
        case = make_case(97, 24, dtype, residual=True)
        tensor = getattr(case, name)
        apart = torch.full((tensor.numel() + 1,), math.nan, dtype=dtype, device=DEVICE)[1:]
        setattr(case, name, apart.as_strided(tensor.shape, tensor.stride()).copy_(tensor))
        check(case, output_to_backward=True)


@pytest.mark.usefixtures("in_clusters")
@pytest.mark.quick
@pytest.mark.parametrize("layout", ["contiguous", "expanded", "sliced", "2d", "3d"])
def test_layouts(layout):
    """Gradient, residual and output in other strides than the input's; inputs of any shape."""
    shape = {"2d": (60, 24), "3d": (4, 24, 15)}.get(layout, (4, 24, 5, 3))
    x, z, grad = torch.randn(3, *shape, device=DEVICE).unbind(0)
    if layout == "expanded":
        grad, z = grad[:, :1].expand(shape), z[:, :, :1].expand(shape)
    elif layout == "sliced":
        x, z, grad = (t.repeat_interleave(2, 3)[..., ::2] for t in (x, z, grad))
    if layout in ("expanded", "contiguous"):
        x = x.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 24, device=DEVICE).unbind(0)
    case = Case(x, grad, z, weight, bias, "relu")
    output, mean, var = case.forward()
    grads = case.backward(output, mean, var)
    leaves = [t.detach().double().requires_grad_() for t in (x, weight, bias, z)]
    expected = F.batch_norm(leaves[0], None, None, *leaves[1:3], True) + leaves[3]
    torch.testing.assert_close(output.double(), expected.relu().detach(), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(expected, leaves, torch.where(output > 0, grad, 0).double())
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    total, dot = cuda.batch_norm_act_backward_sums(grad, x, output, case.norm(mean, var), "relu")
    torch.testing.assert_close(total.double(), expected[2], rtol=1e-4, atol=1e-4)
    for count in (60, torch.tensor(60.0, device=DEVICE)):
        again = cuda.batch_norm_act_backward_input(
            grad, x, output, case.norm(mean, var), "relu", Sums(total, dot, count), True
        )
        for ours, theirs in zip(again, (expected[0], expected[3]), strict=True):
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
@pytest.mark.parametrize("parameter_dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_any_dtype_and_stride(parameter_dtype):
    case = make_case(97, 24, torch.float16, residual=True)
    for name in ("weight", "bias"):
        vector = getattr(case, name).to(parameter_dtype)
        setattr(case, name, vector.repeat_interleave(2)[::2])
    check(case, output_to_backward=True)


def test_host_path_converts_nothing():
    """No operator of torch's runs but for what allocates, in either direction."""
    for residual in (True, False):
        case = make_case(97, 24, torch.float16, residual)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            output, mean, var = case.forward()
            case.backward(output if residual else None, mean, var)
        names = {event.name for event in profile.events() if event.name.startswith("aten::")}
        assert names <= {"aten::empty_like", "aten::empty_strided", "aten::empty"}


@pytest.mark.quick
def test_the_operators_keep_to_their_schemas(monkeypatch):
    """They write to and alias nothing they should not."""
    calls = []

    def recorded(name):
        operator = getattr(_native.cuda_operators, f"batch_norm_{name}").default

        def record(*arguments):
            calls.append((operator, arguments))
            return operator(*arguments)

        return record

    monkeypatch.setattr(cuda, "_batch_norm", recorded)
    for residual in (True, False):
        case = make_case(97, 24, torch.float16, residual)
        output, mean, var = case.forward()
        case.backward(output if residual else None, mean, var)
    assert len({operator for operator, _ in calls}) == 4
    for operator, arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=["test_schema"])


@pytest.mark.quick
def test_bad_input():
    """The operators check what would otherwise be read beyond its end."""
    operators = _native.cuda_operators
    x = make_case(97, 24, torch.float16).input
    vector = torch.ones(24, device=DEVICE)
    norm = (vector, vector, None, None, EPS)
    sums = operators.batch_norm_gradient_sums
    with pytest.raises(ValueError, match="channels innermost"):
        operators.batch_norm_statistics(x.reshape(1, 24, 97, 1).contiguous())
    with pytest.raises(ValueError, match="must be float16, bfloat16 or float32"):
        operators.batch_norm_statistics(x.double())
    with pytest.raises(ValueError, match="input is empty"):
        operators.batch_norm_statistics(x[:0])
    with pytest.raises(ValueError, match="grad has shape"):
        sums(x[..., :96], x, None, *norm, True, None)
    with pytest.raises(ValueError, match="residual is float32, must be float16"):
        operators.batch_norm_normalize(x, *norm, x.float(), True)
    with pytest.raises(ValueError, match="grad has other strides"):
        sums(x.contiguous(), x, None, *norm, True, None)
    with pytest.raises(ValueError, match="mean is float64, must be float32"):
        sums(x, x, None, vector.double(), *norm[1:], True, None)
    with pytest.raises(ValueError, match=r"mean has shape \(23,\), must have \(24,\)"):
        sums(x, x, None, vector[:23], *norm[1:], True, None)
    with pytest.raises(ValueError, match="both there or neither"):
        operators.batch_norm_input_gradient(
            x, x, None, *norm, True, vector, None, 97, None, torch.empty_like(x)
        )


def test_explained():
    for operator in ("batch_norm_act_training", "batch_norm_act_inference"):
        said = {dtype: cuda.explain(operator, dtype=dtype) for dtype in (*DTYPES, torch.float64)}
        assert "normalize" in said[torch.float16]
        assert "normalize" not in said[torch.float64]
