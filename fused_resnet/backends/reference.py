"""The backend for everything no kernel covers: plain PyTorch, on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import conv_bn_act, conv_bn_act_max_pool

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


def batch_norm_act_inference(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`reference.batch_norm_act` with the running statistics."""
    return reference.batch_norm_act(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        eps=eps,
        residual=residual,
        activation=activation,
    )


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.batch_norm_act` when training, and the batch's mean and biased variance."""
    dims = (0, *range(2, input.dim()))
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    var, mean = torch.var_mean(input.to(dtype), dims, correction=0)
    out = F.batch_norm(input, None, None, weight, bias, True, 0.0, eps)
    return reference.add_act(out, residual, activation), mean, var


def explain(operator: str, **_: object) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    return "reference"
