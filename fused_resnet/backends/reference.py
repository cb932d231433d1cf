"""The backend for everything no kernel covers: plain PyTorch, on any device."""

from __future__ import annotations

from ..reference import (
    batch_norm_act_inference,
    batch_norm_act_training,
    conv_bn_act,
    conv_bn_act_max_pool,
)

__all__ = [
    "available",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "explain",
]


def available() -> str:
    """Always "yes"."""
    return "yes"


def explain(operator: str, **_: object) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    return "reference"
