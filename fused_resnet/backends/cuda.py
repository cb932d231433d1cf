"""The CUDA backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import library

__all__ = [
    "available",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "explain",
    "on_host",
    "run_on_host",
]

_operators: Any = torch.ops.fused_resnet


def available() -> str:
    """Whether the CUDA kernels can run here: "yes" or the reason why not."""
    if on_host():
        return "yes"
    if _native.cuda_status != "yes":
        return _native.cuda_status
    return "yes" if torch.cuda.is_available() else "torch finds no CUDA device"


def on_host() -> bool:
    """Whether the kernels run on the CPU, on CPU tensors."""
    return _operators is not torch.ops.fused_resnet


def run_on_host() -> None:
    """Runs the kernels on the CPU from now on, to test them.

    The tests have loaded `torch.ops.fused_resnet_on_host`, the same kernels compiled for the CPU.
    """
    global _operators
    _operators = torch.ops.fused_resnet_on_host


def explain(operator: str, **arguments: object) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    return ("cuda (on the host): " if on_host() else "cuda: ") + library.explain(operator)


def conv_bn_act(*arguments: Any) -> Tensor:
    """See `library.conv_bn_act`."""
    return library.conv_bn_act(*arguments, finish=_operators.scale_shift_act)


def conv_bn_act_max_pool(*arguments: Any) -> Tensor:
    """See `library.conv_bn_act_max_pool`."""
    return library.conv_bn_act_max_pool(*arguments, finish=_operators.scale_shift_act)


def batch_norm_act_inference(*arguments: Any) -> Tensor:
    """See `library.batch_norm_act_inference`."""
    return library.batch_norm_act_inference(*arguments, finish=_operators.scale_shift_act)


def batch_norm_act_training(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `library.batch_norm_act_training`."""
    return library.batch_norm_act_training(*arguments, finish=_operators.scale_shift_act)
