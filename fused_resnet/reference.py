"""What every operator means, in plain PyTorch.

These functions are the specification the backends are tested against, and what runs where no kernel
does. They are as differentiable, traceable and transformable as the torch functions they call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def add_act(input: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """`activation(input + residual)`; `activation` is "relu" or "none"."""
    if residual is not None:
        input = input + residual
    if activation == "relu":
        return torch.relu(input)
    if activation == "none":
        return input
    raise ValueError(f"activation is {activation!r}, must be one of relu, none")


def scale_shift_act(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """`activation(input * scale[c] + shift[c] + residual)` with one rounding.

    Args:
        input: (N, C, *).
        scale: (C,), float64 for a float64 input and float32 for any other.
        shift: as `scale`.
        residual: as `input`, or None.
        activation: "relu" or "none".

    Returns:
        As `input`.
    """
    per_channel = (1, -1) + (1,) * (input.dim() - 2)
    out = input.to(scale.dtype) * scale.view(per_channel) + shift.view(per_channel)
    return add_act(out, residual, activation).to(input.dtype)


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """`activation(batch_norm(conv2d(input, weight, bias)) + residual)`, running statistics.

    Shapes and dtypes are those of `functional.conv_bn_act`.
    """
    out = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    out = F.batch_norm(out, running_mean, running_var, bn_weight, bn_bias, eps=eps)
    return add_act(out, residual, activation)


def conv_bn_act_max_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """`max_pool2d(conv_bn_act(...))`: a residual network's stem."""
    out = conv_bn_act(
        input,
        weight,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        eps,
        bias,
        stride,
        padding,
        dilation,
        groups,
        None,
        activation,
    )
    return F.max_pool2d(out, pool_kernel_size, pool_stride, pool_padding)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
) -> Tensor:
    """`activation(F.batch_norm(input, ...) + residual)`; updates the statistics when training."""
    out = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    return add_act(out, residual, activation)


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
    """`batch_norm_act` with the running statistics."""
    return batch_norm_act(
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
    """`batch_norm_act` when training, and the batch's mean and biased variance.

    The statistics are float64 for a float64 input and float32 for any other.
    """
    dims = (0, *range(2, input.dim()))
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    values = input.to(dtype)
    mean = values.mean(dims, keepdim=True)
    var = (values - mean).square().mean(dims)
    # Without any, a 16-bit input's statistics would be rounded to 16 bits.
    affine = weight if weight is not None else bias
    scratch = input.new_zeros(input.size(1), dtype=dtype if affine is None else affine.dtype)
    out = F.batch_norm(input, scratch, scratch.clone(), weight, bias, True, 0.0, eps)
    return add_act(out, residual, activation), mean.flatten(), var
