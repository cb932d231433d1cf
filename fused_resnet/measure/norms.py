"""Batch norm, add and ReLU in training, as layers of `bench kernels --mode training`.

A layer is a batch norm with batch statistics and what follows it, forward and backward: the output
and running statistics, then the gradients of input, weight, bias and shortcut. Tensors are random,
channels_last.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import functional
from ..testing import FACTOR
from .predict_training import norms_of
from .tune import cases

Call = Callable[[], Any]
Prepare = Callable[[tuple[Any, ...], "NormProblem"], Call]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_MOMENTUM, _EPS = 0.1, 1e-5


@dataclass(frozen=True)
class NormProblem:
    """A norm of N images of C channels and H x W pixels, and what follows it."""

    N: int
    C: int
    H: int
    W: int
    dtype: str
    residual: bool
    relu: bool

    def __str__(self) -> str:
        add, relu = " + shortcut" if self.residual else "", " + ReLU" if self.relu else ""
        return f"norm{add}{relu} of {self.C}x{self.H}x{self.W}"

    @property
    def key(self) -> str:
        """What tells it from others, as one string."""
        return f"{self.dtype} {self.N} images, {self}"

    @property
    def bytes_once(self) -> int:
        """Each tensor once: input, output, shortcut; both gradients, input, shortcut's gradient."""
        size = 2 if self.dtype in _DTYPES else 4
        return (5 + 2 * self.residual) * size * self.N * self.C * self.H * self.W

    @property
    def flops(self) -> int:
        """None that a matrix unit could do."""
        return 0


@dataclass(frozen=True)
class NormCase:
    """The tensors of a norm, with the references for its results.

    Attributes:
        problem: what they are of.
        arguments: input, running mean and variance, weight, bias, shortcut or None, and the
            output's gradient; what gets a gradient requires one.
        expected: the output and the gradients of input, weight, bias and shortcut, in float64.
        allowed_errors: of these, relative, `testing.FACTOR` times eager's.
    """

    problem: NormProblem
    arguments: tuple[Tensor | None, ...]
    expected: tuple[Tensor, ...]
    allowed_errors: tuple[float, ...]

    def error(self, results: tuple[Tensor, ...], factor: float) -> tuple[float, str | None]:
        """The largest relative error, and what is wrong beyond `factor` times what is allowed."""
        errors, reason = [], None
        names = ("output", "input's gradient", "weight's", "bias's", "shortcut's")
        for name, out, expected, allowed in zip(
            names, results, self.expected, self.allowed_errors, strict=False
        ):
            if out.shape != expected.shape:
                return (
                    math.nan,
                    f"{name}: shape {tuple(out.shape)}, must be {tuple(expected.shape)}",
                )
            errors.append(cases.relative_error(out, expected))
            if not errors[-1] <= factor * allowed:
                reason = reason or f"{name}: error {errors[-1]:.1e}, at most {factor * allowed:.1e}"
        if len(results) != len(self.expected):
            return math.nan, f"{len(results)} results, must be {len(self.expected)}"
        return max(errors, key=lambda one: one if math.isfinite(one) else math.inf), reason


def of_model(name: str, batch: int, dtype: str) -> Counter[NormProblem]:
    """The distinct norms of a torchvision network in training, and how often it has each."""
    return Counter(
        NormProblem(*norm.shape, dtype, norm.kind in ("last", "joined"), norm.kind != "projection")
        for norm in norms_of(name, batch)
    )


def make_case(problem: NormProblem, device: torch.device, seed: int = 0) -> NormCase:
    """Random tensors for a problem, and its results in float64."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = _DTYPES.get(problem.dtype, torch.float32)
    shape = (problem.N, problem.C, problem.H, problem.W)

    def images() -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(dtype, memory_format=torch.channels_last)

    def vector(low: float) -> Tensor:
        return torch.rand(problem.C, generator=generator, device=device) + low

    arguments = copied(
        (
            images(), vector(-0.5), vector(0.5), vector(0.5), vector(-0.5),
            images() if problem.residual else None, images(),
        )
    )  # fmt: skip
    exact = tuple(None if t is None else t.detach().double() for t in arguments)
    expected = step(operators, copied(exact), problem)
    floor = 4 * torch.finfo(torch.float32).eps
    eager = step(operators, copied(arguments), problem)
    allowed = [
        max(FACTOR * cases.relative_error(out, reference), floor)
        for out, reference in zip(eager, expected, strict=True)
    ]
    return NormCase(problem, arguments, expected, tuple(allowed))


def copied(arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """A case's arguments once more, leaves like the first."""
    copies = [None if t is None else t.detach().clone() for t in arguments]
    for index in (0, 3, 4, 5):
        if (copied := copies[index]) is not None:
            copied.requires_grad_()
    return tuple(copies)


def operators(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    relu: bool,
) -> Tensor:
    """Batch norm, add and ReLU, both in place, as torchvision's blocks run them."""
    statistics = (running_mean, running_var)
    out = F.batch_norm(input, *statistics, weight, bias, True, _MOMENTUM, _EPS)
    if residual is not None:
        out += residual
    return F.relu_(out) if relu else out


def step(
    forward: Callable[..., Tensor], arguments: tuple[Any, ...], problem: NormProblem
) -> tuple[Tensor, ...]:
    """The output, and the gradients of input, weight, bias and shortcut."""
    *tensors, grad = arguments
    leaves = [t for t in arguments if t is not None and t.requires_grad]
    with torch.enable_grad():
        out = forward(*tensors, problem.relu)
        return out, *torch.autograd.grad(out, leaves, grad)


def eager(arguments: tuple[Any, ...], problem: NormProblem) -> Call:
    """The three operators."""
    return lambda: step(operators, arguments, problem)


def compiled() -> Prepare:
    """The same under `torch.compile`; one program for all tensors of a layer."""
    current: NormProblem | None = None
    program: Any = None

    def prepare(arguments: tuple[Any, ...], problem: NormProblem) -> Call:
        nonlocal current, program
        if problem != current:
            torch._dynamo.reset()
            current, program = problem, torch.compile(operators, dynamic=False)
        return lambda: step(program, arguments, problem)

    return prepare


def fused(on_backend: Callable[[torch.device, Call], Call]) -> Prepare:
    """`functional.batch_norm_act`, on the backend that `on_backend` makes a call run on."""

    def forward(
        input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor, bias: Tensor,
        residual: Tensor | None, relu: bool,
    ) -> Tensor:  # fmt: skip
        return functional.batch_norm_act(
            input, running_mean, running_var, weight, bias, True, _MOMENTUM, _EPS,
            residual=residual, activation="relu" if relu else "none",
        )  # fmt: skip

    def prepare(arguments: tuple[Any, ...], problem: NormProblem) -> Call:
        return on_backend(arguments[0].device, lambda: step(forward, arguments, problem))

    return prepare
