"""Convolutions whose sums are exact in every dtype.

The result has to be the exact one rounded once: one element out of place, or counted twice, shows.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_resnet.testing import relative_error

from . import ConvCase, ConvShape, make_conv_case


@dataclass(frozen=True)
class Problem:
    """A convolution and the images it is applied to."""

    name: str
    shape: ConvShape
    size: tuple[int, int]
    batch: int = 2


def small_integers(problem: Problem, dtype: torch.dtype, **options: Any) -> ConvCase:
    """A case whose every sum is exact, in tf32 too: small integers, scales that are powers of two.

    `options` are of `make_conv_case`.
    """
    case = make_conv_case(
        problem.shape, batch=problem.batch, size=problem.size, dtype=dtype, **options
    )
    K = problem.shape.out_channels
    weight = torch.randint(-3, 4, case.weight.shape).to(dtype)
    changes = {
        "input": (case.input * 2).round(),
        "weight": weight.to(memory_format=torch.channels_last),
        "running_mean": torch.randint(-3, 4, (K,)).to(case.running_mean.dtype),
        # With eps, the squares of 1/2, 1, 2 and 4.
        "running_var": torch.tensor([0.0, 0.75, 3.75, 15.75])[torch.randint(4, (K,))],
        "eps": 0.25,
    }
    if case.bn_weight is not None:
        changes["bn_weight"] = torch.tensor([-1, -0.5, 0.5, 1, 2])[torch.randint(5, (K,))]
        changes["bn_bias"] = torch.randint(-3, 4, (K,)).float()
    if case.bias is not None:
        changes["bias"] = torch.randint(-3, 4, (K,)).to(dtype)
    if case.residual is not None:
        changes["residual"] = (case.residual * 2).round()
    return dataclasses.replace(case, **changes)


def assert_rounded_once(out: Tensor, case: ConvCase) -> None:
    """The error is that of one rounding, and of what float32 comes to before it.

    For activations that nobody computes exactly.
    """
    expected = case.double().eager()
    once = relative_error(expected.to(out.dtype), expected)
    error, limit = relative_error(out, expected), 1.1 * once + 2.0**-23
    assert error <= limit, (
        f"{case.activation}: relative error {error:.3g}, the limit is {limit:.3g}"
    )


def assert_exact(out: Tensor, case: ConvCase, what: object = "") -> None:
    """The exact result, rounded once."""
    exact = case.double().eager().to(out.dtype)
    torch.testing.assert_close(
        out, exact, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
