"""Activations of operators: which a backend applies itself, and how all are differentiated.

Backends apply ReLU. Others are applied by those that say so (`Backend.has_activation`) and, in
place, behind the others. Where gradients are recorded, operators of inference have ReLU alone: its
gradient can be told from the output, that of others from what they are applied to, which torch's
own operators then keep. Batch norm with the batch's statistics has those that the backend trains
(`Backend.trains_activation`), and computes again what they were applied to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..layers.activation import PLAIN, applied, apply_
from ..layers.description import ConvNorm, Norm, Pool


def conv_bn_act(
    backend: Backend, input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str
) -> Tensor:
    """`Backend.conv_bn_act`, with any activation."""
    if activation in PLAIN or backend.has_activation(activation):
        return backend.conv_bn_act(input, layer, residual, activation)
    return apply_(backend.conv_bn_act(input, layer, residual, "none"), activation)


def norm_conv_bn_act(
    backend: Backend,
    input: Tensor,
    before: Norm,
    layer: ConvNorm,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`Backend.norm_conv_bn_act`, with any activation."""
    if activation in PLAIN or backend.has_activation(activation):
        return backend.norm_conv_bn_act(input, before, layer, residual, activation)
    return apply_(backend.norm_conv_bn_act(input, before, layer, residual, "none"), activation)


def conv_bn_act_max_pool(
    backend: Backend, input: Tensor, layer: ConvNorm, activation: str, pool: Pool
) -> Tensor:
    """`Backend.conv_bn_act_max_pool`, with any activation."""
    if activation in PLAIN or backend.has_activation(activation):
        return backend.conv_bn_act_max_pool(input, layer, activation, pool)
    return torch.max_pool2d(conv_bn_act(backend, input, layer, None, activation), *pool)


def batch_norm_act_inference(
    backend: Backend, input: Tensor, norm: Norm, residual: Tensor | None, activation: str
) -> Tensor:
    """`Backend.batch_norm_act_inference`, with any activation."""
    if activation in PLAIN or backend.has_activation(activation):
        return backend.batch_norm_act_inference(input, norm, residual, activation)
    return apply_(backend.batch_norm_act_inference(input, norm, residual, "none"), activation)


def differentiable(apply: Callable[..., Tensor], index: int) -> Callable[..., Tensor]:
    """`apply` of an autograd function that knows ReLU, for any activation.

    `index` is the activation's among its arguments.
    """

    def run(*arguments: Any) -> Tensor:
        activation = arguments[index]
        if activation in PLAIN:
            return apply(*arguments)
        return applied(apply(*arguments[:index], "none", *arguments[index + 1 :]), activation)

    return run
