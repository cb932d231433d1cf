"""The backend for everything no kernel covers: plain PyTorch, on any device."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import reference
from ..layers.description import ConvNorm, Norm, Pool, SqueezeExcitation
from .backend import Backend


class Reference(Backend):
    """The operators as `reference.py` defines them."""

    name = "reference"

    def explain(self, operator: str, **arguments: Any) -> str:
        """See `backends.explain`."""
        return "reference"

    def has_activation(self, activation: str) -> bool:
        """See `Backend.has_activation`."""
        return True

    def conv_bn_act(
        self, input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str
    ) -> Tensor:
        """See `reference.conv_bn_act`."""
        arguments = (*layer.flat(), residual, activation)
        return reference.conv_bn_act(input, *arguments)

    def conv_bn_act_max_pool(
        self, input: Tensor, layer: ConvNorm, activation: str, pool: Pool
    ) -> Tensor:
        """See `reference.conv_bn_act_max_pool`."""
        arguments = (*layer.flat(), activation, *pool)
        return reference.conv_bn_act_max_pool(input, *arguments)

    def squeeze_excitation(self, input: Tensor, layers: SqueezeExcitation) -> Tensor:
        """See `reference.squeeze_excitation`."""
        return reference.squeeze_excitation(input, layers)

    def batch_norm_act_inference(
        self, input: Tensor, norm: Norm, residual: Tensor | None, activation: str
    ) -> Tensor:
        """See `reference.batch_norm_act_inference`."""
        return reference.batch_norm_act_inference(input, *norm, residual, activation)

    def batch_norm_act_training(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.batch_norm_act_training`."""
        return reference.batch_norm_act_training(input, weight, bias, eps, residual, activation)
