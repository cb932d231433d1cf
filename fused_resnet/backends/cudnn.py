"""cuDNN's fused operators: convolution, bias, residual and ReLU in one call.

Batch norm has to be in the weight and the bias for that. It is put there on every call, so nothing
can go stale; this costs a pass over the weight. Only tuning chooses these operators, where it found
that they keep NaN and are the fastest: PyTorch asks cuDNN for a ReLU without
`CUDNN_PROPAGATE_NAN` (aten/src/ATen/native/cudnn/Conv_v8.cpp), which may turn NaN into zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layers.description import ConvNorm
from . import library


def conv_bn_act(input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str) -> Tensor:
    """`cudnn_convolution_relu` or `cudnn_convolution_add_relu`; without a ReLU, the library."""
    if activation != "relu":
        return library.conv_bn_act(input, layer, residual, activation)
    weight, norm, bias, *geometry = layer
    scale, shift = library.scale_and_shift(norm, weight.dtype)
    if bias is not None:
        shift = torch.addcmul(shift, bias, scale)
    folded = (weight * scale[:, None, None, None]).to(weight.dtype)
    shift = shift.to(weight.dtype)
    arguments = (shift, *geometry)
    if residual is None:
        return torch.ops.aten.cudnn_convolution_relu(input, folded, *arguments)
    return torch.ops.aten.cudnn_convolution_add_relu(input, folded, residual, 1.0, *arguments)
