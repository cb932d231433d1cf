"""Activation modules, as the operators' texts: see `layers/activation.py`."""

from __future__ import annotations

from typing import Any

from torch import nn

from .. import originals
from ..originals import ReLU


def text_of(act: nn.Module | None) -> str | None:
    """The text of an activation that convolutions can have in their epilogue, or None.

    "none" where there is no module.
    """
    if act is None:
        return "none"
    cls: Any = type(act)
    if cls is ReLU:
        return "relu"
    if cls not in _CLASSES or originals.replaced_activation() is not None:
        return None
    return _parameterised(act) if cls in _PARAMETERISED else _without_parameters(act)


def is_relu(act: nn.Module | None) -> bool:
    """Whether an activation is what blocks are made of that run, or train, as one."""
    return type(act) is ReLU


def _without_parameters(act: Any) -> str | None:
    if type(act) is originals.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(act.approximate)
    return _NAMES[type(act)]


def _parameterised(act: Any) -> str | None:
    """With the numbers that the module has now."""
    if type(act) is originals.LeakyReLU:
        slope = act.negative_slope
        return f"leaky_relu({float(slope)!r})" if isinstance(slope, (int, float)) else None
    least, most = act.min_val, act.max_val
    if not (isinstance(least, (int, float)) and isinstance(most, (int, float)) and least <= most):
        return None
    return f"hardtanh({float(least)!r}, {float(most)!r})"


_PARAMETERISED = (originals.LeakyReLU, originals.Hardtanh, originals.ReLU6)
_NAMES: dict[type[nn.Module], str] = {originals.SiLU: "silu", originals.Hardswish: "hardswish"}
_CLASSES = (*_PARAMETERISED, *_NAMES, originals.GELU)
