"""cuDNN's fused operators: convolution, bias, residual and ReLU in one call.

Batch norm has to be in the weight and the bias for that. It is put there on every call, so nothing
can go stale; this costs a pass over the weight. Only tuning chooses these operators, where it found
that they keep NaN and are the fastest: PyTorch asks cuDNN for a ReLU without
`CUDNN_PROPAGATE_NAN` (aten/src/ATen/native/cudnn/Conv_v8.cpp), which may turn NaN into zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import library


def conv_bn_act(
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
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`cudnn_convolution_relu` or `cudnn_convolution_add_relu`; without a ReLU, the library."""
    if activation != "relu":
        return library.conv_bn_act(
            input, weight, running_mean, running_var, bn_weight, bn_bias, eps, bias, stride,
            padding, dilation, groups, residual, activation,
        )  # fmt: skip
    scale, shift = library.scale_and_shift(
        running_mean, running_var, bn_weight, bn_bias, eps, weight.dtype
    )
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    folded = (weight * scale[:, None, None, None]).to(weight.dtype)
    shift = shift.to(weight.dtype)
    arguments = (shift, stride, padding, dilation, groups)
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(input, folded, *arguments)
    return torch.ops.aten.cudnn_convolution_add_relu(input, folded, residual, 1.0, *arguments)
