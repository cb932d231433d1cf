"""The CUDA backend."""

from __future__ import annotations

import torch

from .. import _native
from . import library
from .library import (
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
    """Whether the CUDA kernels can run here: "yes" or the reason why not."""
    if _native.cuda_status != "yes":
        return _native.cuda_status
    return "yes" if torch.cuda.is_available() else "torch finds no CUDA device"


def explain(operator: str, **arguments: object) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    return "cuda: " + library.explain(operator)
