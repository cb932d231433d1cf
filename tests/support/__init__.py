"""Inputs, expectations and checks that several test files use.

The measure of error is the library's own (`fused_resnet.testing`). Where a tensor is too small for
a norm to mean anything (a drawn one-pixel image), `ConvCase.rounding_bound` bounds every element's
error a priori instead.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import itertools
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import functional
from fused_resnet.testing import FACTOR, assert_error_rule, relative_error

from .processes import current_environment, run_code

TESTS = Path(__file__).resolve().parents[1]
MODELS = [
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
]

# A model of each kind; the others have more of the same layers, or more channels.
_REPRESENTATIVE = {"resnet18", "resnet50"}
EVERY_MODEL = [
    name if name in _REPRESENTATIVE else pytest.param(name, marks=pytest.mark.whole)
    for name in MODELS
]

# What the fixture `run` is: the command's exit code, output and error output for its arguments.
Run = Callable[..., tuple[int, str, str]]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def dtype_id(value: Any) -> str | None:
    """Short parameter ids for dtypes: `float32`, not `torch.float32`."""
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class ConvShape:
    """A convolution's geometry, without the image it is applied to."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __str__(self) -> str:
        r, s = self.kernel_size
        text = f"{self.in_channels}to{self.out_channels}_{r}x{s}"
        for name, value in (("s", self.stride), ("p", self.padding), ("d", self.dilation)):
            if value not in ((1, 1), (0, 0)):
                text += f"_{name}{value[0]}" if value[0] == value[1] else f"_{name}{value}"
        return text + (f"_g{self.groups}" if self.groups > 1 else "")


# What each of the operators' activations is in torch.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "hardtanh(-0.25, 0.75)": lambda x: F.hardtanh(x, -0.25, 0.75),
    "leaky_relu": F.leaky_relu,
    "leaky_relu(0.2)": lambda x: F.leaky_relu(x, 0.2),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}
OTHER_ACTIVATIONS = [text for text in ACTIVATIONS if text not in ("none", "relu")]

STEM = ConvShape(3, 64, (7, 7), (2, 2), (3, 3))
STEM_POOL = {"kernel_size": 3, "stride": 2, "padding": 1}

# One shape a kernel kind: pointwise, strided pointwise, 3x3, strided, dilated, grouped, depthwise,
# the stem's 3 channels, and counts no vector length divides.
SAMPLE_SHAPES = [
    ConvShape(64, 96, (1, 1)),
    ConvShape(64, 128, (1, 1), (2, 2)),
    ConvShape(32, 48, (3, 3), (1, 1), (1, 1)),
    ConvShape(32, 32, (3, 3), (2, 2), (1, 1)),
    ConvShape(32, 32, (3, 3), (1, 1), (2, 2), (2, 2)),
    ConvShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 8),
    ConvShape(24, 24, (3, 3), (1, 1), (1, 1), (1, 1), 24),
    ConvShape(3, 64, (7, 7), (2, 2), (3, 3)),
    ConvShape(13, 29, (3, 2), (2, 1), (0, 1), (1, 2)),
]
QUICK_SHAPES = [SAMPLE_SHAPES[0], SAMPLE_SHAPES[2], SAMPLE_SHAPES[5], SAMPLE_SHAPES[8]]


@cache
def model_conv_shapes() -> tuple[ConvShape, ...]:
    """Every distinct convolution of the supported torchvision models, dilated variants included."""
    shapes: dict[ConvShape, None] = {}
    with torch.device("meta"):
        models = [getattr(torchvision.models, name)() for name in MODELS]
        models.append(torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True]))
    for model in models:
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d):
                shape = ConvShape(
                    conv.in_channels,
                    conv.out_channels,
                    conv.kernel_size,
                    conv.stride,
                    conv.padding,
                    conv.dilation,
                    conv.groups,
                )
                shapes[shape] = None
    return tuple(shapes)


def every_model_conv_shape() -> list[Any]:
    """`model_conv_shapes()` as parameters: without `--whole`, one a kind.

    A kind is the filter, stride, dilation, whether there are groups, of how many channels, and
    whether the channels become more, fewer or neither.
    """
    found, kinds = [], set()
    for shape in model_conv_shapes():
        each = shape.in_channels // shape.groups if shape.groups > 1 else 0
        growth = (shape.out_channels > shape.in_channels) - (shape.out_channels < shape.in_channels)
        kind = (shape.kernel_size, shape.stride, shape.dilation, each, growth)
        found.append(pytest.param(shape, marks=pytest.mark.whole) if kind in kinds else shape)
        kinds.add(kind)
    return found


@dataclass
class ConvCase:
    """The arguments of one `conv_bn_act` call, with the ways to evaluate it.

    `eager` is what torchvision's blocks do, `fused` is the function under test. Converting the case
    to float64 gives the reference: the inputs are the same values, exactly.
    """

    input: Tensor
    weight: Tensor
    running_mean: Tensor
    running_var: Tensor
    bn_weight: Tensor | None = None
    bn_bias: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    eps: float = 1e-5
    stride: tuple[int, int] | int = 1
    padding: tuple[int, int] | int = 0
    dilation: tuple[int, int] | int = 1
    groups: int = 1
    activation: str = "relu"
    pool: dict[str, Any] | None = field(default=None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments by name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> ConvCase:
        """The same case with `change` applied to every tensor."""
        return dataclasses.replace(self, **{n: change(t) for n, t in self.tensors().items()})

    def double(self) -> ConvCase:
        return self.map(lambda t: t.detach().double())

    def eager(self, convolve: Callable[..., Tensor] = F.conv2d) -> Tensor:
        """Convolution, batch norm, add, activation and pooling as torch's separate operators.

        `convolve` is called as `F.conv2d` is.
        """
        out = convolve(
            self.input,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        # The operator behind `F.batch_norm`, which in torch 2.11 refuses an eps of 0.
        parameters = (self.bn_weight, self.bn_bias, self.running_mean, self.running_var)
        cudnn = torch.backends.cudnn.enabled
        out = torch.batch_norm(out, *parameters, False, 0.0, self.eps, cudnn)
        if self.residual is not None:
            out += self.residual
        out = ACTIVATIONS[self.activation](out)
        if self.pool is not None:
            out = F.max_pool2d(out, **self.pool)
        return out

    def fused(self) -> Tensor:
        """The function under test on the same arguments."""
        arguments: dict[str, Any] = {
            "bias": self.bias,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
            "activation": self.activation,
        }
        leading = (
            self.input,
            self.weight,
            self.running_mean,
            self.running_var,
            self.bn_weight,
            self.bn_bias,
            self.eps,
        )
        if self.pool is None:
            return functional.conv_bn_act(
                *leading, residual=self.residual, pad_residual=True, **arguments
            )
        pool = {f"pool_{name}": value for name, value in self.pool.items()}
        return functional.conv_bn_act_max_pool(*leading, **arguments, **pool)

    def rounding_bound(self) -> Tensor:
        """An upper bound, element by element, of any correct implementation's distance from exact.

        A sum of n products accumulated in precision u errs by at most n u sum|x||w| (Higham,
        Accuracy and Stability of Numerical Algorithms, 3.1). Each value eager stores in the
        tensors' own dtype (convolution, batch norm, sum, scale and shift if they are rounded too)
        adds half an ulp of a magnitude that the same sum of absolute values bounds.
        """
        exact = self.double().map(torch.abs)
        scale = (self.running_var.double() + self.eps).rsqrt()
        if exact.bn_weight is not None:
            scale = scale * exact.bn_weight
        scale, mean = scale[:, None, None], exact.running_mean[:, None, None]
        magnitude = F.conv2d(
            exact.input,
            exact.weight,
            exact.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )
        magnitude = scale * (magnitude + mean)
        if exact.bn_bias is not None:
            magnitude = magnitude + exact.bn_bias[:, None, None]
        if exact.residual is not None:
            magnitude = magnitude + exact.residual
        if self.pool is not None:
            magnitude = F.max_pool2d(magnitude, **self.pool)
        dtype = self.input.dtype
        terms = self.weight[0].numel()
        unit = torch.finfo(dtype).eps / 2
        unit_accumulated = torch.finfo(accumulation_dtype(dtype)).eps / 2
        bound = ((terms + 16) * unit_accumulated + 6 * unit) * magnitude
        return bound + 6 * torch.finfo(dtype).smallest_normal


def make_conv_case(
    shape: ConvShape,
    *,
    batch: int = 2,
    size: tuple[int, int] = (8, 8),
    dtype: torch.dtype = torch.float32,
    bn_dtype: torch.dtype | None = None,
    device: str = "cpu",
    memory_format: torch.memory_format = torch.channels_last,
    residual: bool = True,
    bias: bool = False,
    affine: bool = True,
    activation: str = "relu",
    pool: dict[str, Any] | None = None,
    seed: int = 0,
) -> ConvCase:
    """A seeded case whose batch-norm statistics are far from the initial zeros and ones."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(shape.out_channels, generator=generator) * (high - low) + low

    bn_dtype = bn_dtype or accumulation_dtype(dtype)
    r, s = shape.kernel_size
    fan_in = shape.in_channels // shape.groups * r * s
    case = ConvCase(
        input=normal(batch, shape.in_channels, *size).to(dtype),
        weight=(
            normal(shape.out_channels, shape.in_channels // shape.groups, r, s) / fan_in**0.5
        ).to(dtype),
        running_mean=normal(shape.out_channels).mul(0.3).to(bn_dtype),
        running_var=uniform(0.5, 2.0).to(bn_dtype),
        bn_weight=uniform(-0.5, 1.5).to(bn_dtype) if affine else None,
        bn_bias=normal(shape.out_channels).mul(0.3).to(bn_dtype) if affine else None,
        bias=normal(shape.out_channels).mul(0.3).to(dtype) if bias else None,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=shape.groups,
        activation=activation,
        pool=pool,
    )
    case.input = case.input.to(memory_format=memory_format)
    if residual and pool is None:
        with torch.device("meta"):
            out = F.conv2d(
                torch.empty(case.input.shape),
                torch.empty(case.weight.shape),
                None,
                shape.stride,
                shape.padding,
                shape.dilation,
                shape.groups,
            )
        case.residual = normal(*out.shape).to(dtype).to(memory_format=memory_format)
    return case.map(lambda t: t.to(device))


@dataclass
class NormConvCase(ConvCase):
    """The arguments of one `norm_conv_bn_act` call: those of `conv_bn_act` and the norm before."""

    in_mean: Tensor | None = None
    in_var: Tensor | None = None
    in_weight: Tensor | None = None
    in_bias: Tensor | None = None
    in_eps: float = 1e-5

    def convolution(self, input: Tensor) -> ConvCase:
        """The convolution alone, on another input."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(ConvCase)}
        return ConvCase(**{**fields, "input": input})

    def normalised(self) -> Tensor:
        """What the convolution reads, as torch's separate operators make it."""
        norm = (self.in_mean, self.in_var, self.in_weight, self.in_bias)
        if self.in_eps == 0:
            return F.relu(self._normalised_without_eps())
        return F.relu(F.batch_norm(self.input, *norm, False, 0.0, self.in_eps))

    def _normalised_without_eps(self) -> Tensor:
        """The definition itself: some versions of torch's own norm refuse an eps of zero."""
        kept = torch.promote_types(self.input.dtype, torch.float32)
        mean, scale = (t.to(kept)[:, None, None] for t in (self.in_mean, self.in_var.rsqrt()))
        out = (self.input.to(kept) - mean) * scale
        if self.in_weight is not None:
            out = out * self.in_weight.to(kept)[:, None, None]
        if self.in_bias is not None:
            out = out + self.in_bias.to(kept)[:, None, None]
        return out.to(self.input.dtype)

    def eager(self, convolve: Callable[..., Tensor] = F.conv2d) -> Tensor:
        return self.convolution(self.normalised()).eager(convolve)

    def fused(self) -> Tensor:
        return functional.norm_conv_bn_act(
            self.input,
            self.in_mean,
            self.in_var,
            self.in_weight,
            self.in_bias,
            self.in_eps,
            self.weight,
            self.running_mean,
            self.running_var,
            self.bn_weight,
            self.bn_bias,
            self.eps,
            bias=self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            residual=self.residual,
            pad_residual=True,
            activation=self.activation,
        )

    def rounding_bound(self) -> Tensor:
        """Twice `ConvCase.rounding_bound`, for the convolution's input has rounding errors too.

        They are eight of the accumulation's and one of the dtype's, relative to the sum of the
        norm's absolute terms. The ReLU magnifies none, nor the convolution beyond the sum of its
        absolute products, of which `ConvCase.rounding_bound` counts more errors than these.
        """
        exact = self.double().map(torch.abs)
        per_channel = lambda t: t[:, None, None]  # noqa: E731
        scale = (exact.in_var + self.in_eps).rsqrt()
        scale = scale if exact.in_weight is None else scale * exact.in_weight
        magnitude = (exact.input + per_channel(exact.in_mean)) * per_channel(scale)
        if exact.in_bias is not None:
            magnitude = magnitude + per_channel(exact.in_bias)
        return 2 * self.convolution(magnitude.to(self.input.dtype)).rounding_bound()


def make_norm_conv_case(shape: ConvShape, *, in_affine: bool = True, **arguments: Any):
    """`make_conv_case` with a norm before the convolution, whose ReLU stops about half of it."""
    case = make_conv_case(shape, **arguments)
    generator = torch.Generator().manual_seed(arguments.get("seed", 0) + 1)
    C = shape.in_channels
    like = case.running_mean
    normal, uniform = (f(C, generator=generator) for f in (torch.randn, torch.rand))
    fields = {f.name: getattr(case, f.name) for f in dataclasses.fields(ConvCase)}
    return NormConvCase(
        **fields,
        in_mean=(0.3 * normal).to(like),
        in_var=(0.5 + 1.5 * uniform).to(like),
        in_weight=(1.5 - 2 * uniform).to(like) if in_affine else None,
        # Padding before the norm, not after it, would put values of this size beside the image.
        in_bias=(0.5 + normal).to(like) if in_affine else None,
    )


def conv_bn_exact(case: ConvCase) -> np.ndarray:
    """`case.eager()` without pooling in extended precision: what float64 is measured by."""
    x, w = (t.detach().cpu().numpy().astype(np.longdouble) for t in (case.input, case.weight))
    stride, padding, dilation = case.stride, case.padding, case.dilation
    assert isinstance(stride, tuple)
    assert isinstance(padding, tuple)
    assert isinstance(dilation, tuple)
    n, _, h, width = x.shape
    k, c, r, s = w.shape
    x = np.pad(x, ((0, 0), (0, 0), (padding[0],) * 2, (padding[1],) * 2))
    p = (h + 2 * padding[0] - dilation[0] * (r - 1) - 1) // stride[0] + 1
    q = (width + 2 * padding[1] - dilation[1] * (s - 1) - 1) // stride[1] + 1
    out = np.zeros((n, k, p, q), np.longdouble)
    k_group = k // case.groups
    for group in range(case.groups):
        filters = slice(group * k_group, (group + 1) * k_group)
        for i in range(r):
            for j in range(s):
                top, left = i * dilation[0], j * dilation[1]
                window = x[
                    :,
                    group * c : (group + 1) * c,
                    top : top + (p - 1) * stride[0] + 1 : stride[0],
                    left : left + (q - 1) * stride[1] + 1 : stride[1],
                ]
                out[:, filters] += np.einsum("kc,ncpq->nkpq", w[filters, :, i, j], window)

    def per_channel(t: Tensor) -> np.ndarray:
        return t.detach().cpu().numpy().astype(np.longdouble)[:, None, None]

    if case.bias is not None:
        out += per_channel(case.bias)
    out = (out - per_channel(case.running_mean)) / np.sqrt(
        per_channel(case.running_var) + np.longdouble(case.eps)
    )
    if case.bn_weight is not None:
        out *= per_channel(case.bn_weight)
    if case.bn_bias is not None:
        out += per_channel(case.bn_bias)
    if case.residual is not None:
        out += case.residual.detach().cpu().numpy().astype(np.longdouble)
    return np.maximum(out, 0) if case.activation == "relu" else out


# What `conv_bn_act` can be differentiated in.
DIFFERENTIABLE = ["input", "weight", "bias", "bn_weight", "bn_bias", "residual"]


def conv_gradients(case, evaluate, names):
    """The output of `evaluate(case)` and the gradients of a fixed projection of it."""
    leaves = {n: t.detach().clone().requires_grad_(n in names) for n, t in case.tensors().items()}
    for name, leaf in leaves.items():
        setattr(case, name, leaf)
    out = evaluate(case)
    generator = torch.Generator().manual_seed(7)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    out.backward(cotangent)
    return out.detach(), {n: leaves[n].grad for n in leaves if n in names}


def assert_conv_gradients_by_error_rule(make, names):
    """Those of a case that `make()` gives in these tensors; in float64 to rounding."""
    _, ours = conv_gradients(make(), lambda c: c.fused(), names)
    _, theirs = conv_gradients(make(), lambda c: c.eager(), names)
    _, exact = conv_gradients(make().double(), lambda c: c.eager(), names)
    assert set(ours) == set(names)
    for name in names:
        assert ours[name].dtype == theirs[name].dtype, name
        assert exact[name].abs().max() > 0, name
        if make().input.dtype == torch.float64:
            assert relative_error(ours[name], exact[name]) < 1e-13, name
        else:
            assert_error_rule(ours[name], theirs[name], exact[name], what=name)


def bits(tensor: Tensor) -> bytes:
    """The tensor's elements as bytes, in logical order: NaN payloads and signed zeros count."""
    flat = tensor.detach().cpu().clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "tensor") -> None:
    """Same shape, dtype and bits."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} instead of {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} instead of {expected.shape}"
    if bits(actual) != bits(expected):
        differing = (actual != expected) & ~(actual.isnan() & expected.isnan())
        raise AssertionError(f"{what}: {int(differing.sum())} of {actual.numel()} elements differ")


@contextlib.contextmanager
def unchanged(**tensors: Tensor) -> Iterator[None]:
    """Fails if the body changes a bit, the strides or the version of any of the tensors."""
    before = {n: (bits(t), t.stride(), t.data_ptr(), t._version) for n, t in tensors.items()}
    yield
    for name, tensor in tensors.items():
        elements, stride, pointer, version = before[name]
        assert bits(tensor) == elements, f"{name} was written to"
        assert (tensor.stride(), tensor.data_ptr()) == (stride, pointer), f"{name} was moved"
        assert tensor._version == version, f"{name} was changed in place"


def assert_within_bound(actual: Tensor, exact: Tensor, bound: Tensor) -> None:
    """Every element of `actual` is within `bound` of `exact` (all of one shape)."""
    assert actual.shape == exact.shape == bound.shape
    excess = (actual.double() - exact).abs() - bound
    assert not actual.isnan().any(), "NaN in the output"
    assert (excess <= 0).all(), f"an element is {excess.max().item():.3e} over its rounding bound"


def assert_same_nonfinite(actual: Tensor, *expected: Tensor) -> None:
    """NaN, inf and -inf sit where they do in one of the expected tensors, position by position."""

    def kinds(tensor: Tensor) -> Tensor:
        return tensor.isnan() + 2 * tensor.isposinf() + 3 * tensor.isneginf()

    assert all(actual.shape == one.shape for one in expected)
    allowed = torch.stack([kinds(one) for one in expected])
    wrong = (kinds(actual) != allowed).all(0)
    assert not wrong.any(), (
        f"{int(wrong.sum())} non-finite or finite values where there should be none, the first at "
        f"{wrong.nonzero()[0].tolist()}: {actual[wrong][0]} instead of {expected[0][wrong][0]}"
    )


def conv_of_taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> Tensor:
    """A convolution as `torch.conv2d` has it, tap by tap, each where it is in the image.

    So padding takes no part, where zeros in its place would make NaN of an infinite weight.
    """
    (N, _, H, W), (K, C, R, S) = x.shape, weight.shape

    def seen(size: int, outputs: int, tap: int, dim: int) -> tuple[slice, slice]:
        """For which of the outputs a tap is in the image, and the pixels it is there."""
        first = tap * dilation[dim] - padding[dim]
        begin = -(min(first, 0) // stride[dim])
        end = min(outputs, max(begin, (size - 1 - first) // stride[dim] + 1))
        place = first + begin * stride[dim]
        steps = slice(place, place + (end - begin - 1) * stride[dim] + 1, stride[dim])
        return slice(begin, end), steps if end > begin else slice(0, 0)

    sizes = zip((H, W), (R, S), stride, padding, dilation, strict=True)
    P, Q = ((size + 2 * p - d * (taps - 1) - 1) // s + 1 for size, taps, s, p, d in sizes)
    out = torch.zeros(N, groups, K // groups, P, Q, dtype=x.dtype)
    pixels, filters = x.unflatten(1, (groups, C)), weight.unflatten(0, (groups, K // groups))
    for r, s in itertools.product(range(R), range(S)):
        (rows, h), (columns, w) = seen(H, P, r, 0), seen(W, Q, s, 1)
        sums = torch.einsum("ngchw,gkc->ngkhw", pixels[..., h, w], filters[..., r, s])
        out[..., rows, columns] += sums
    out = out.flatten(1, 2)
    return out if bias is None else out + bias.view(1, -1, 1, 1)


def load_script(path: Path) -> ModuleType:
    """A script of the repository as a module of its name, which can be pickled and inspected."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def run_python(code: str, timeout: float = 300, **environment: str) -> str:
    """Runs `code` in another process and returns what it printed; a crash fails the test.

    The process has imported torch, but nothing of ours: see `processes.run_code`.
    """
    status, out, err = run_code(
        textwrap.dedent(code), timeout, {**current_environment(), **environment}
    )
    assert status == 0, f"exit status {status}\n{out[-2000:]}\n{err[-4000:]}"
    return out


def conv_layouts(x: Tensor) -> Iterator[Tensor]:
    """The same values in other places: channels first, and channels and pixels that lie apart."""
    yield x.contiguous(memory_format=torch.channels_last)
    yield x.contiguous()
    n, c, h, w = x.shape
    for before, behind in ((8, 32), (9, 32), (0, 1)):
        channels = torch.full((n, h, w, before + c + behind), torch.nan, dtype=x.dtype)
        channels = channels.permute(0, 3, 1, 2)
        channels[:, before : before + c] = x
        yield channels[:, before : before + c]
    pixels = torch.full((n, h + 1, w + 2, c), torch.nan, dtype=x.dtype).permute(0, 3, 1, 2)
    pixels[:, :, 1:, 1:-1] = x
    yield pixels[:, :, 1:, 1:-1]


_DIGEST = """
import hashlib
import torch
from support import STEM, ConvShape, make_conv_case

digest = hashlib.sha256()
for shape in (ConvShape(64, 64, (3, 3), padding=(1, 1)), ConvShape(256, 40, (1, 1)), STEM):
    for scale in (1.0, 1e-19, 1e-21, 1e-38, 1e19, 3e19, "special"):
        name, torch.backends.mkldnn.conv.fp32_precision = sys.argv[1:]
        dtype = getattr(torch, name)
        case = make_conv_case(shape, size=(9, 7), dtype=dtype, activation="none",
                              affine=False, residual=False)
        case.running_mean.zero_()
        if scale == "special":
            values = case.input.permute(0, 2, 3, 1).reshape(-1)
            for i, value in enumerate((torch.inf, -torch.inf, torch.nan, 1e-40, -0.0, 3e38)):
                values[37 * i + 5 :: 997] = value
            case.input.copy_(values.view(case.input.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2))
        else:
            case.input *= scale
            case.weight *= scale
        case.running_var.fill_(1.0)
        out = case.fused().contiguous()
        out[out.isnan()] = torch.nan
        digest.update(out.view(torch.int16).numpy().tobytes())
print(digest.hexdigest())
"""


def conv_digests(sets: Sequence[str], dtype: str, precision: str = "none") -> list[str]:
    """What the kernels of each instruction set compute of some convolutions, as a digest.

    Among the values are such as overflow or become subnormal in a product or a sum.
    """
    code = _DIGEST.replace("sys.argv[1:]", repr((dtype, precision)))
    return [run_python(code, FUSED_RESNET_CPU_ISA=isa) for isa in sets]


def rerun_on_instruction_set(isa: str, file: str, selected: str, **environment: str) -> None:
    """Runs the tests of `file` that `-k selected` picks on the kernels for other processors."""
    if os.environ.get("FUSED_RESNET_CPU_ISA"):
        pytest.skip("already running with FUSED_RESNET_CPU_ISA")
    arguments = ["-q", "-p", "no:cacheprovider", file, "-k", selected]
    # With --whole, the environment says so: conftest.py.
    code = f"import sys, pytest; sys.exit(pytest.main({arguments!r}))"
    environment = {**current_environment(), "FUSED_RESNET_CPU_ISA": isa, **environment}
    status, out, err = run_code(code, 600, environment)
    assert status == 0, out + err


def unwritten_zeros(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory as long as nobody writes there."""
    return torch.from_numpy(np.zeros(elements * dtype.itemsize, np.uint8)).view(dtype)


def small_resnet(
    block: type[nn.Module] = Bottleneck, layers: int = 1, stages: int = 4, **arguments: Any
) -> ResNet:
    """A randomised torchvision ResNet, `layers` blocks a stage and 100 classes, in eval mode.

    With two stages it has every kind of layer, for what takes long over each.
    """
    model = ResNet(block, [layers] * 4, num_classes=100, **arguments)
    if stages < 4:
        for number in range(stages + 1, 5):
            setattr(model, f"layer{number}", nn.Sequential())
        model.fc = nn.Linear(64 * 2 ** (stages - 1) * block.expansion, 100)
    fused_resnet.testing.randomize_(model, seed=1)
    return model.eval()


def image_batch(
    batch: int = 2, size: int = 32, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """A seeded channels_last batch."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    return images.to(dtype).to(memory_format=torch.channels_last)


def double_copy(model: nn.Module) -> nn.Module:
    """A float64 deep copy of an unfused model: the reference."""
    return fused_resnet.unfuse(copy.deepcopy(model)).double()


BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}


def parameter_gradients(model, x):
    """Output, input gradient and parameter gradients of a fixed projection of the logits."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    out.backward(cotangent.to(out))
    return out.detach(), {
        "input": x.grad,
        **{n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    }


def assert_step_in_float64(fused, eager, x, outputs=1e-10, gradients=1e-9, buffers=1e-11):
    """Output, gradients and buffers of two models that draw from the same seed.

    Args:
        fused: in float64, where a wrong formula shows.
        eager: its twin.
        x: their input.
        outputs: how far an element may be off, relatively and absolutely; so are `buffers`.
        gradients: the same, of the largest of a gradient and, in part, of all.
        buffers: see `outputs`.
    """
    torch.manual_seed(3)
    out, ours = parameter_gradients(fused, x)
    torch.manual_seed(3)
    expected, theirs = parameter_gradients(eager, x)
    torch.testing.assert_close(out, expected, rtol=outputs, atol=outputs)
    assert ours.keys() == theirs.keys()
    # That of a convolution's bias before batch statistics is zero but for rounding.
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    for name, gradient in theirs.items():
        limit = gradients * (gradient.abs().max().item() + 1e-3 * largest)
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=limit, msg=name)
    for (name, buffer), expected in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=buffers, atol=buffers, msg=name)


class Decisions(TorchDispatchMode):
    """Records which way every ReLU and max-pool of a run went, or makes a run go the recorded way.

    A gradient is not continuous in the activations: one rounding more or less turns a ReLU whose
    input is next to zero, and in float32 a single turned ReLU is worth a thousand rounding errors.
    Errors of gradients are therefore measured against the float64 run that decides as the run under
    test did, which leaves rounding alone to be compared.

    Args:
        recorded: the `record` of another run to follow, or None to record.
    """

    RELUS = (torch.ops.aten.relu.default, torch.ops.aten.relu_.default)

    def __init__(self, recorded: list[Tensor] | None = None) -> None:
        super().__init__()
        self.record: list[Tensor] = []
        self._left = None if recorded is None else list(recorded)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        is_relu = operator in self.RELUS or (
            operator.namespace == "fused_resnet" and "relu" in args
        )
        is_pool = operator is torch.ops.aten.max_pool2d_with_indices.default
        if self._left is None:
            if is_relu:
                self.record.append((out[0] if isinstance(out, tuple) else out) > 0)
            elif is_pool:
                self.record.append(out[1])
        elif is_relu:
            positive = self._left.pop(0)
            # Positive enough for relu's backward, which looks at the output.
            out.copy_(torch.where(positive, out.clamp(min=1e-300), 0.0))
        elif is_pool:
            indices = self._left.pop(0)
            values = args[0].flatten(2).gather(2, indices.flatten(2)).view(indices.shape)
            return values, indices
        return out

    @property
    def exhausted(self) -> bool:
        """Whether every recorded decision was followed."""
        return self._left == []


def gradient_errors(model: nn.Module, x: Tensor) -> dict[str, tuple[torch.dtype, int, float]]:
    """Of the output and of each gradient: dtype, elements, and error against float64.

    The largest model has 127 million parameters: a float64 gradient is compared and dropped as soon
    as it is there, and nothing outlives the call.
    """
    exact = double_copy(model)
    with Decisions() as decisions:
        out, gradients = parameter_gradients(model, x)
    model.zero_grad()
    errors: dict[str, tuple[torch.dtype, int, float]] = {}

    def compare(name: str, tensor: Tensor, exact: Tensor) -> None:
        errors[name] = (tensor.dtype, tensor.numel(), relative_error(tensor, exact))

    def compare_and_drop(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert name in gradients, f"{name} has a gradient in float64 only"
            compare(name, gradients.pop(name), parameter.grad)
            parameter.grad = None

        return hook

    for name, parameter in exact.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter.register_post_accumulate_grad_hook(compare_and_drop(name))
    with Decisions(decisions.record) as followed:
        exact_out, exact_gradients = parameter_gradients(exact, x.double())
    assert followed.exhausted, "the runs did not have the same ReLUs"
    compare("output", out, exact_out)
    compare("input", gradients.pop("input"), exact_gradients.pop("input"))
    assert not gradients, f"no float64 gradient of {sorted(gradients)}"
    return errors


def assert_gradients_by_error_rule(fused: nn.Module, eager: nn.Module, x: Tensor) -> None:
    """The error rule for the output and for the gradients of every parameter and of the input.

    What comes back from an average over pixels is the same number at all of them and is rounded the
    same way, and strides leave it at few: the error of one weight's gradient is the luck of a few
    roundings, now and then half as large again as that of the next. The rule's factor is therefore
    that of root mean squares over each weight and the nearest ones, and a single one may have twice
    what eager has for it or for those.
    The norm of a vector of 64 elements is less steady still: those under 1024 are judged together,
    by the root mean square of their errors.

    Args:
        fused: the model under test.
        eager: the same model unfused, in the same mode.
        x: the input, in the models' dtype.
    """
    assert_errors_by_rule(gradient_errors(fused, x), gradient_errors(eager, x))


def assert_errors_by_rule(
    ours: dict[str, tuple[torch.dtype, int, float]],
    theirs: dict[str, tuple[torch.dtype, int, float]],
) -> None:
    """`assert_gradients_by_error_rule` of what `gradient_errors` returned."""
    assert ours.keys() == theirs.keys()
    floor = 4 * torch.finfo(torch.float32).eps
    short: dict[str, list[float]] = {"fused": [], "eager": []}
    long: dict[str, tuple[float, float]] = {}  # in the order of the backward pass
    for name, (dtype, elements, error) in ours.items():
        eager_dtype, _, eager_error = theirs[name]
        assert dtype == eager_dtype, f"{name}: {dtype}, eager has {eager_dtype}"
        if name == "output":
            assert error <= max(FACTOR * eager_error, floor), (
                f"output: relative error {error:.3g}, eager has {eager_error:.3g}"
            )
        elif elements < 1024:
            short["fused"].append(error)
            short["eager"].append(eager_error)
        else:
            long[name] = (error, eager_error)
    near = [list(long.values())[max(0, i - NEAREST) : i + NEAREST + 1] for i in range(len(long))]
    means = [[_root_mean_square(errors) for errors in zip(*pairs, strict=True)] for pairs in near]
    for (name, (error, eager_error)), (_, eager_mean) in zip(long.items(), means, strict=True):
        assert error <= max(2 * eager_error, 2 * eager_mean, floor), (
            f"{name}: relative error {error:.3g}, eager has {eager_error:.3g}"
        )
    for name, (mean, eager_mean) in zip(long, means, strict=True):
        assert mean <= max(FACTOR * eager_mean, floor), (
            f"{name} and the nearest: relative error {mean:.3g}, eager has {eager_mean:.3g}"
        )
    error, eager_error = (_root_mean_square(short[n]) for n in ("fused", "eager"))
    assert error <= max(FACTOR * eager_error, floor), (
        f"short vectors together: relative error {error:.3g}, eager has {eager_error:.3g}"
    )


# How many weights before and behind one have errors of the same size.
NEAREST = 3


def _root_mean_square(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
