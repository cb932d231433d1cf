"""The arguments that a kernel is tuned on, what is expected of it, and whether it is right."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers.description import ConvNorm, conv_norm_of
from ...testing import FACTOR
from ...tuning.problem import BasicBlockProblem, ChainProblem, ConvProblem, Problem
from ..errors import first_line

# Images whose float64 reference is computed at a time.
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class Case:
    """The tensors of a problem, as `backends` take them, with the reference for their result.

    Attributes:
        problem: what they are of.
        arguments: those of `conv_bn_act` from `input` to `activation`.
        expected: (N, K, P, Q) in float64, pooled if the problem is.
        allowed_error: relative to `expected`.
    """

    problem: ConvProblem
    arguments: tuple[Any, ...]
    expected: Tensor
    allowed_error: float

    @property
    def residual(self) -> Tensor | None:
        """The argument of that name."""
        return self.arguments[12]


@dataclass(frozen=True)
class ChainCase:
    """The tensors of a chain or of a BasicBlock, with the references for its results.

    Attributes:
        problem: what they are of.
        arguments: the output of the block's first convolution, its input, and as `ConvNorm` the
            3x3, the 1x1, the projection and the next block's first convolution, where there are
            these, else None. Of a BasicBlock its input and its two convolutions.
        expected: the block's output and the next one's 3x3 input, if it has one, in float64.
        allowed_errors: of these, relative.
    """

    problem: ChainProblem | BasicBlockProblem
    arguments: tuple[Any, ...]
    expected: tuple[Tensor, ...]
    allowed_errors: tuple[float, ...]

    @property
    def images(self) -> int:
        """How many of the arguments, the first ones, are images."""
        return 1 if isinstance(self.problem, BasicBlockProblem) else 2


Run = Callable[[tuple[Any, ...], Any], Any]
"""Runs a candidate on a case's arguments, given its problem, of the kind that the candidate is for.

Returns a tensor, pooled where the problem has a pool; of a chain a tuple, as `ChainCase.expected`.
"""


def case_of(problem: Problem, device: torch.device) -> Case | ChainCase:
    """Random tensors for a problem, channels_last, and their float64 results."""
    if isinstance(problem, ChainProblem):
        return make_chain_case(problem, device)
    if isinstance(problem, BasicBlockProblem):
        return make_basic_block_case(problem, device)
    return make_case(problem, device)


def make_basic_block_case(
    problem: BasicBlockProblem, device: torch.device, seed: int = 0
) -> ChainCase:
    """As `make_chain_case`, for a BasicBlock."""
    parts = [
        _random_arguments(part, device, seed + index) for index, part in enumerate(problem.parts)
    ]
    return _block_case(problem, (parts[0][0], *(described(one)[1] for one in parts)), 1)


def make_chain_case(problem: ChainProblem, device: torch.device, seed: int = 0) -> ChainCase:
    """Random tensors for a chain, channels_last, and their float64 results."""
    convolution = _random_arguments(problem.convolution, device, seed)
    expand = _random_arguments(problem.expand, device, seed + 1)
    projection = following = None
    reduced, shortcut = convolution[0], expand[12]
    if problem.project is not None:
        projection = _random_arguments(problem.project, device, seed + 2)
        shortcut = projection[0]
    if problem.reduce is not None:
        following = _random_arguments(problem.reduce, device, seed + 3)
    cases = (convolution, expand, projection, following)
    layers = (None if one is None else described(one)[1] for one in cases)
    return _block_case(problem, (reduced, shortcut, *layers), 2)


def _block_case(
    problem: ChainProblem | BasicBlockProblem, arguments: tuple[Any, ...], images: int
) -> ChainCase:
    expected = _expected_block(arguments, images)
    floor = 4 * torch.finfo(torch.float32).eps
    allowed = (
        max(FACTOR * relative_error(eager, exact), floor)
        for eager, exact in zip(_eager_block(arguments, images), expected, strict=True)
    )
    return ChainCase(problem, arguments, expected, tuple(allowed))


def _eager_block(arguments: tuple[Any, ...], images: int) -> tuple[Tensor, ...]:
    return eager_chain(arguments) if images == 2 else eager_basic_block(arguments)


def eager_basic_block(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """A BasicBlock by operators of their own, in the dtype of its arguments."""
    x, first, second = arguments
    out = _eager_layer(_eager_layer(x, first, None, True), second, x, True)
    return (out,)


def eager_chain(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """A chain by operators of their own, in the dtype of its arguments."""
    reduced, x, convolution, expand, project, reduce = arguments

    shortcut = x if project is None else _eager_layer(x, project, None, False)
    out = _eager_layer(_eager_layer(reduced, convolution, None, True), expand, shortcut, True)
    return (out,) if reduce is None else (out, _eager_layer(out, reduce, None, True))


def _eager_layer(input: Tensor, layer: ConvNorm, residual: Tensor | None, relu: bool) -> Tensor:
    weight, norm, bias, stride, padding, dilation, groups = layer
    out = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    mean, var, bn_weight, bn_bias, eps = norm
    out = F.batch_norm(out, mean, var, bn_weight, bn_bias, False, 0.0, eps)
    if residual is not None:
        out += residual
    return F.relu(out) if relu else out


def _expected_block(arguments: tuple[Any, ...], images: int) -> tuple[Tensor, ...]:
    """`_eager_block` in float64, some images at a time."""
    layers = tuple(None if layer is None else _doubled(layer) for layer in arguments[images:])
    parts = [
        _eager_block((*(part.double() for part in group), *layers), images)
        for group in zip(*(one.split(_IMAGES_AT_ONCE) for one in arguments[:images]), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def described(arguments: tuple[Any, ...]) -> tuple[Tensor, ConvNorm, Tensor | None, str]:
    """A `Case`'s arguments as backends take them."""
    return arguments[0], conv_norm_of(arguments[1:12]), arguments[12], arguments[13]


def _doubled(layer: ConvNorm) -> ConvNorm:
    return conv_norm_of([one.double() if isinstance(one, Tensor) else one for one in layer.flat()])


def make_case(problem: ConvProblem, device: torch.device, seed: int = 0) -> Case:
    """Random tensors for a problem, channels_last, and their float64 result."""
    arguments = _random_arguments(problem, device, seed)
    expected = _expected(arguments, problem)
    eager = relative_error(eager_conv(arguments, problem), expected)
    floor = 4 * torch.finfo(torch.float32).eps
    return Case(problem, arguments, expected, max(FACTOR * eager, floor))


def _random_arguments(problem: ConvProblem, device: torch.device, seed: int) -> tuple[Any, ...]:
    """Those of `conv_bn_act`."""
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(problem.dtype, torch.float32)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(problem.K, generator=generator, device=device) * (high - low) + low

    def laid(tensor: Tensor) -> Tensor:
        return tensor.to(dtype=dtype, memory_format=torch.channels_last)

    channels = problem.C // problem.groups
    weight = normal(problem.K, channels, problem.R, problem.S)
    weight /= (channels * problem.R * problem.S) ** 0.5
    residual = None
    if problem.residual:
        residual = laid(normal(problem.N, problem.K, problem.P, problem.Q))
    return (
        laid(normal(problem.N, problem.C, problem.H, problem.W)),
        laid(weight),
        normal(problem.K).mul_(0.3),
        uniform(0.5, 2.0),
        uniform(0.5, 1.5),
        normal(problem.K).mul_(0.3),
        1e-5,
        None,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        residual,
        "relu",
    )


def check(run: Run, case: Case | ChainCase) -> str | None:
    """What is wrong with a candidate's results, or None."""
    try:
        out = run(case.arguments, case.problem)
        if isinstance(case, ChainCase):
            return chain_error(out, case) or chain_nan_error(run, case)
        reason = _error(out, case) or nan_error(run, case)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return reason


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Lets float32 convolutions use TF32, or not, as a problem's dtype says."""
    # Both, since torch refuses to say whether cuDNN may use TF32 where they differ.
    cudnn: Any = torch.backends.cudnn
    settings = (cudnn.conv, cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if dtype == "tfloat32" else "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def eager_conv(arguments: tuple[Any, ...], problem: ConvProblem) -> Tensor:
    """Convolution, batch norm, add, ReLU and pooling as operators of their own."""
    input, weight, mean, var, bn_weight, bn_bias, eps, bias, *convolution, residual, _ = arguments
    out = F.conv2d(input, weight, bias, *convolution)
    out = F.batch_norm(out, mean, var, bn_weight, bn_bias, False, 0.0, eps)
    if residual is not None:
        out += residual
    return pooled(F.relu_(out), problem)


def _expected(
    arguments: tuple[Any, ...], problem: ConvProblem, images: int = _IMAGES_AT_ONCE
) -> Tensor:
    """`eager_conv` in float64, some images at a time, since those need much memory."""
    doubled = [
        value.double() if isinstance(value, Tensor) and value.dim() != 4 else value
        for value in arguments
    ]
    doubled[1] = arguments[1].double()
    parts = []
    for first in range(0, problem.N, images):
        doubled[0] = arguments[0][first : first + images].double()
        if arguments[12] is not None:
            doubled[12] = arguments[12][first : first + images].double()
        parts.append(eager_conv(tuple(doubled), problem))
    return torch.cat(parts)


def pooled(out: Tensor, problem: ConvProblem) -> Tensor:
    """Behind the max-pool that the problem ends in, if it has one."""
    pool = problem.pool
    return out if pool is None else F.max_pool2d(out, pool[0:2], pool[2:4], pool[4:6])


def _error(out: Tensor, case: Case) -> str | None:
    if out.shape != case.expected.shape:
        return f"shape {tuple(out.shape)}, must be {tuple(case.expected.shape)}"
    if out.dtype is not case.arguments[0].dtype:
        return f"dtype {out.dtype}, must be {case.arguments[0].dtype}"
    error = relative_error(out, case.expected)
    if not error <= case.allowed_error:
        return f"error {error:.1e}, must be at most {case.allowed_error:.1e}"
    return None


def relative_error(out: Tensor, expected: Tensor) -> float:
    """`testing.relative_error` where the tensors are; NaN if there is any.

    Bringing every candidate's output to the host, as that does, would take minutes.
    """
    difference = torch.linalg.vector_norm(out.double() - expected)
    return (difference / torch.linalg.vector_norm(expected)).item()


def nan_error(run: Run, case: Case) -> str | None:
    """Whether NaN in one pixel of the last image, and in its shortcut, comes out where it should.

    Convolutions through transforms (Winograd, FFT) spread it further, within the image.
    """
    input, residual = case.arguments[0].clone(), case.residual
    input[-1, :, case.problem.H // 2, case.problem.W // 2] = float("nan")
    if residual is not None:
        residual = residual.clone()
        residual[-1, 0, 0, 0] = float("nan")
    arguments = (input, *case.arguments[1:12], residual, case.arguments[13])
    last = (input[-1:], *arguments[1:12], None if residual is None else residual[-1:], "relu")
    wanted = _expected(last, replace(case.problem, N=1)).isnan()
    found = run(arguments, case.problem).isnan()
    lost = int((wanted & ~found[-1:]).sum())
    if lost:
        return f"{lost} of {int(wanted.sum())} NaN lost"
    if found[:-1].any():
        return "NaN in an image that has none"
    return None


def chain_error(outputs: Sequence[Tensor], case: ChainCase) -> str | None:
    """What is wrong with a chain's outputs, but for NaN, or None."""
    for name, out, expected, allowed in zip(
        ("output", "next"), outputs, case.expected, case.allowed_errors, strict=False
    ):
        if out.shape != expected.shape:
            return f"{name}: shape {tuple(out.shape)}, must be {tuple(expected.shape)}"
        error = relative_error(out, expected)
        if not error <= allowed:
            return f"{name}: error {error:.1e}, must be at most {allowed:.1e}"
    if len(outputs) != len(case.expected):
        return f"{len(outputs)} outputs, must be {len(case.expected)}"
    return None


def chain_nan_error(run: Run, case: ChainCase) -> str | None:
    """As `nan_error`: NaN in a pixel of the last image, and in another of its shortcut."""
    images = [one.clone() for one in case.arguments[: case.images]]
    images[0][-1, :, images[0].size(2) // 2, images[0].size(3) // 2] = float("nan")
    for shortcut in images[1:]:
        shortcut[-1, 0, 0, 0] = float("nan")
    layers = case.arguments[case.images :]
    arguments = (*images, *layers)
    wanted = _expected_block((*(one[-1:] for one in images), *layers), case.images)
    for out, expected in zip(run(arguments, case.problem), wanted, strict=True):
        found = out.isnan()
        if lost := int((expected.isnan() & ~found[-1:]).sum()):
            return f"{lost} of {int(expected.isnan().sum())} NaN lost"
        if found[:-1].any():
            return "NaN in an image that has none"
    return None
