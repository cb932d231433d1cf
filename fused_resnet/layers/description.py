"""A layer, and a block of them, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch.distributed as dist
from torch import Tensor


def output_size(
    size: Sequence[int],
    filter: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
) -> tuple[int, int]:
    """(P, Q) of a convolution or a pool on (H, W) `size`, any of which may be symbolic.

    Below 1 where the filter does not fit.
    """
    (H, W), (R, S) = size, filter
    return (
        (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1,
        (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1,
    )


class Norm(NamedTuple):
    """A batch norm of C channels, in the one order there is.

    Attributes:
        mean: (C,).
        var: (C,), biased where it is a batch's.
        weight: (C,) or None for ones.
        bias: (C,) or None for zeros.
        eps: added to `var`.
    """

    mean: Tensor
    var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


class ConvNorm(NamedTuple):
    """A convolution and the batch norm behind it.

    Attributes:
        weight: (K, C / groups, R, S).
        norm: of K channels.
        bias: (K,), the convolution's own, or None.
        stride: two numbers, as are `padding` and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: how many groups the channels are in.
    """

    weight: Tensor
    norm: Norm
    bias: Tensor | None
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    def flat(self) -> tuple[Any, ...]:
        """The arguments of the operator `conv_bn_act` from `weight` to `groups`."""
        weight, norm, *rest = self
        return (weight, *norm, *rest)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, int, int, int]:
        """(N, K, P, Q) where `shape` is the input's."""
        N, _, *size = shape
        K, _, *filter = self.weight.shape
        return N, K, *output_size(size, filter, self.stride, self.padding, self.dilation)


def conv_norm_of(arguments: Sequence[Any]) -> ConvNorm:
    """The layer that has these for its `flat()`."""
    weight, mean, var, bn_weight, bn_bias, eps, *rest = arguments
    return ConvNorm(weight, Norm(mean, var, bn_weight, bn_bias, eps), *rest)


class Pool(NamedTuple):
    """A max-pool: two numbers each."""

    kernel_size: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]


class Sums(NamedTuple):
    """What batch norm's backward needs of a batch, g its gradient behind the activation.

    Attributes:
        total: (C,), the sum of g.
        dot: (C,), the sum of g * (input - mean).
        count: how many values a channel has; of shape () where it is a tensor.
    """

    total: Tensor
    dot: Tensor
    count: float | Tensor


BlockLayers: TypeAlias = tuple[Sequence[ConvNorm], int]
"""The convolutions of a block, and whether the last of them makes the shortcut from the block's
input. Where `pads_shortcuts`, a number
below zero stands for a shortcut that has the input's pixels at such steps, its channels in the
middle of zeros."""

TENSORS = 6  # a layer's: weight, running_mean, running_var, bn_weight, bn_bias, bias
_NUMBERS = 7  # stride, padding and dilation, two each, and groups


def described_blocks(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
) -> Iterator[BlockLayers]:
    """The blocks that the operator's arguments describe."""
    layer = 0
    for count, has_projection in zip(layer_counts, projections, strict=True):
        layers = []
        for i in range(layer, layer + count):
            weight, mean, var, bn_weight, bn_bias, bias = tensors[TENSORS * i : TENSORS * (i + 1)]
            n = numbers[_NUMBERS * i : _NUMBERS * (i + 1)]
            geometry = (n[0:2], n[2:4], n[4:6], n[6])
            norm = Norm(mean, var, bn_weight, bn_bias, eps[i])
            layers.append(ConvNorm(weight, norm, bias, *geometry))
        yield layers, has_projection
        layer += count


PARAMETERS = 4  # a layer's: the weight and bias of the convolution, and those of the norm
SAVED = 4  # of a layer: raw, mean, var and count


@dataclass(frozen=True)
class Layer:
    """What is not a tensor of a convolution and its norm."""

    geometry: tuple
    eps: float
    group: dist.ProcessGroup | None


@dataclass(frozen=True)
class Block:
    """A residual block without its tensors: its convolutions, then that of a projection."""

    layers: tuple[Layer, ...]
    has_projection: bool
    low_memory: bool
    step: int = 1  # between the pixels of the input that are the shortcut

    def subsampled(self, tensor: Tensor) -> Tensor:
        """Of the input or its gradient, a view of what is the shortcut."""
        return tensor if self.step == 1 else tensor[:, :, :: self.step, :: self.step]

    def shortcut_is_input(self, input: Tensor, shortcut: Tensor | None) -> bool:
        """Whether the shortcut, or its gradient, is like the block's input; false for None."""
        return not self.has_projection and shortcut is not None and shortcut.shape == input.shape

    @property
    def main(self) -> int:
        """How many convolutions are not the projection."""
        return len(self.layers) - self.has_projection
