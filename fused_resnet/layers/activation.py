"""Activations: the text that names one with its numbers, and what it is in torch and in kernels.

Keywords, operators and modules all say an activation as a text, so that it is an argument like any
other of a dispatcher's schema: its name, and behind it in brackets its numbers where it has some.

    none                    x
    relu                    x where x > 0 or NaN, else 0
    relu6                   hardtanh(0, 6)
    hardtanh(least, most)   least where x < least, most where x > most, else x
    leaky_relu(slope)       x where x > 0, else slope x
    silu                    x / (1 + exp(-x))
    hardswish               x relu6(x + 3) / 6
    gelu                    x (1 + erf(x / sqrt(2))) / 2
    gelu_tanh               x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2

Without brackets `hardtanh` has -1 and 1 and `leaky_relu` 0.01, as torch's modules. NaN stays NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PLAIN = ("relu", "none")
"""What every kernel has, and what a block's activations are where one kernel runs all of it."""


class Activation(NamedTuple):
    """An activation, read from its text.

    Attributes:
        name: one of `NAMES`, but for "relu6", which is a "hardtanh".
        number: that kernels know it by.
        parameters: its two numbers, 0 where it has fewer.
    """

    name: str
    number: int
    parameters: tuple[float, float]


# By name: the number in csrc/activations.h, and the parameters where none are given.
_KINDS: dict[str, tuple[int, tuple[float, ...]]] = {
    "none": (0, ()),
    "relu": (1, ()),
    "hardtanh": (2, (-1.0, 1.0)),
    "leaky_relu": (3, (0.01,)),
    "silu": (4, ()),
    "hardswish": (5, ()),
    "gelu": (6, ()),
    "gelu_tanh": (7, ()),
}
_ALIASES = {"relu6": "hardtanh(0.0, 6.0)"}

NAMES = (
    "none",
    "relu",
    "relu6",
    "hardtanh",
    "leaky_relu",
    "silu",
    "hardswish",
    "gelu",
    "gelu_tanh",
)
"""Of all activations."""

_TEXT = re.compile(r"(\w+)(?:\(([^()]*)\))?")
_read: dict[str, Activation] = {}


def read(text: str) -> Activation:
    """The activation that a text names.

    Raises:
        ValueError: it names none; the error's text says what it must be.
    """
    found = _read.get(text)
    if found is None:
        found = _parsed(text)
        if len(_read) >= _MOST_TEXTS:
            _read.clear()
        _read[text] = found
    return found


_MOST_TEXTS = 1024


def _parsed(text: str) -> Activation:
    match = _TEXT.fullmatch(_ALIASES.get(text, text))
    if match is None or match[1] not in _KINDS:
        raise ValueError(f"must be one of {', '.join(NAMES)}")
    name, given = match.groups()
    number, defaults = _KINDS[name]
    if given is None:
        numbers = list(defaults)
    else:
        try:
            numbers = [float(part) for part in given.split(",")]
        except ValueError:
            raise ValueError(f"must have numbers in its brackets, not {given!r}") from None
        if len(numbers) != len(defaults):
            raise ValueError(f"must have {len(defaults) or 'no'} numbers, {name} has as many")
    if not all(map(math.isfinite, numbers)):
        raise ValueError("must have finite numbers")
    if name == "hardtanh" and numbers[0] > numbers[1]:
        raise ValueError("must have the smaller number first")
    first, second = (*numbers, 0.0, 0.0)[:2]
    return Activation(name, number, (first, second))


def numbers_of(text: str) -> tuple[int, float, float]:
    """The number that kernels know an activation by, and its two parameters."""
    _, number, parameters = read(text)
    return (number, *parameters)


def error(text: object) -> str | None:
    """What a text must be to name an activation, or None where it does."""
    if not isinstance(text, str):
        return f"must be one of {', '.join(NAMES)}"
    try:
        read(text)
    except ValueError as found:
        return str(found)
    return None


# Compilers take the answer as it is: it depends on the text alone.
error._dynamo_marked_constant = True  # type: ignore[attr-defined]


def applied(input: Tensor, text: str) -> Tensor:
    """The activation of a tensor, by torch's own operators.

    Raises:
        ValueError: the text names none.
    """
    if text == "relu":
        return torch.relu(input)
    if text == "none":
        return input
    name, _, (first, second) = _checked(text)
    if name == "hardtanh":
        return F.hardtanh(input, first, second)
    if name == "leaky_relu":
        return F.leaky_relu(input, first)
    return _FUNCTIONS[name](input)


def apply_(input: Tensor, text: str) -> Tensor:
    """`applied` to a tensor of the caller's own, in place; returns it."""
    name, _, (first, second) = _checked(text)
    if name == "hardtanh":
        return torch.ops.aten.hardtanh_(input, first, second)
    if name == "leaky_relu":
        return torch.ops.aten.leaky_relu_(input, first)
    return _IN_PLACE[name](input)


def derived(grad: Tensor, input: Tensor, text: str) -> Tensor:
    """`grad` times the derivative at `input`, by torch's operators, to be differentiated again."""
    if torch.is_grad_enabled():  # not all of these operators can be
        at = input if input.requires_grad else input.detach().requires_grad_()
        (derived,) = torch.autograd.grad(applied(at, text), at, grad, create_graph=True)
        return derived
    name, _, (first, second) = _checked(text)
    aten = torch.ops.aten
    if name == "hardtanh":
        return aten.hardtanh_backward(grad, input, first, second)
    if name == "leaky_relu":
        return aten.leaky_relu_backward(grad, input, first, False)
    if name == "gelu_tanh":
        return aten.gelu_backward(grad, input, approximate="tanh")
    return _DERIVATIVES[name](grad, input)


def _checked(text: str) -> Activation:
    try:
        return read(text)
    except ValueError as found:
        raise ValueError(f"activation is {text!r}, {found}") from None


def _unchanged(input: Tensor) -> Tensor:
    return input


def _gelu_tanh(input: Tensor) -> Tensor:
    return F.gelu(input, approximate="tanh")


def _gelu_tanh_(input: Tensor) -> Tensor:
    return torch.ops.aten.gelu_(input, approximate="tanh")


_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _unchanged,
    "relu": torch.relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
}
_DERIVATIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "hardswish": torch.ops.aten.hardswish_backward,
    "gelu": torch.ops.aten.gelu_backward,
}
_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": _unchanged,
    "relu": torch.relu_,
    "silu": torch.ops.aten.silu_,
    "hardswish": torch.ops.aten.hardswish_,
    "gelu": torch.ops.aten.gelu_,
    "gelu_tanh": _gelu_tanh_,
}
