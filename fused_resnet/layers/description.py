"""A layer, and a block of them, as data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        mean: (C,); None, as `var`, of a batch whose statistics are still to be found.
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

    kernel_size: tuple[int, ...] | list[int]
    stride: tuple[int, ...] | list[int]
    padding: tuple[int, ...] | list[int]


class SqueezeExcitation(NamedTuple):
    """Factors for an image's channels: `gate(expand(activation(reduce(mean of the pixels))))`.

    Hu et al., "Squeeze-and-Excitation Networks", section 3.

    Attributes:
        reduce: (R, C, 1, 1), a convolution's weight.
        reduce_bias: (R,) or None.
        expand: (C, R, 1, 1), likewise.
        expand_bias: (C,) or None.
        activation: see `layers/activation.py`.
        gate: one of `GATES`.
    """

    reduce: Tensor
    reduce_bias: Tensor | None
    expand: Tensor
    expand_bias: Tensor | None
    activation: str
    gate: str


GATES = ("sigmoid", "hardsigmoid")
"""In the order of csrc/cpu/squeeze_excitation.cpp."""


class Sums(NamedTuple):
    """What batch norm's backward needs of a batch, g its gradient behind the activation.

    Attributes:
        total: (C,), the sum of g.
        dot: (C,), the sum of g * (input - mean).
        count: how many values a channel has; of shape () where it is a tensor.
    """

    total: Tensor
    dot: Tensor
    count: float | Tensor  # type: ignore[assignment]  # hides the method of tuples


Geometry: TypeAlias = tuple[Sequence[int], Sequence[int], Sequence[int], int]
"""A convolution's stride, padding and dilation, two numbers each, and groups."""

TENSORS = 6  # a layer's: weight, running_mean, running_var, bn_weight, bn_bias, bias
NUMBERS = 7  # stride, padding and dilation, two each, and groups


class Layer(NamedTuple):
    """What is not a tensor of a convolution and its norm in training.

    Attributes:
        geometry: of the convolution.
        eps: of the norm.
        group: the processes whose batches make the statistics; None for this process's own.
    """

    geometry: Geometry
    eps: float
    group: dist.ProcessGroup | None


class Block(NamedTuple):
    """A residual block: `relu(... relu(layer(input)) ... + shortcut)`.

    Attributes:
        layers: its convolutions, then that of a projection.
        has_projection: whether the last layer makes the shortcut from the block's input.
        step: 0 where the shortcut is the input or its projection; else it has the input's pixels at
            such steps, its channels in the middle of zeros.
        low_memory: whether training computes 1x1 convolutions twice rather than keep their outputs.
    """

    layers: Sequence[ConvNorm]
    has_projection: bool
    step: int = 0
    low_memory: bool = False

    @property
    def main(self) -> Sequence[ConvNorm]:
        """The layers that are not the projection."""
        return self.layers[:-1] if self.has_projection else self.layers

    @property
    def projection(self) -> ConvNorm | None:
        """The layer that makes the shortcut, if one does."""
        return self.layers[-1] if self.has_projection else None


class Stem(NamedTuple):
    """A network's first convolution in eight or sixteen bits, with what follows it.

    Attributes:
        layers: it alone.
        pool: the max-pool behind its ReLU.
        bits: 8 or 16, of the input and the weight.
    """

    layers: tuple[ConvNorm]
    pool: Pool
    bits: int


class Head(NamedTuple):
    """A network's classifier, a linear layer behind the mean over an image's pixels.

    Attributes:
        weight: (K, C).
        bias: (K,) or None.
    """

    weight: Tensor
    bias: Tensor | None


class TrainedBlock(NamedTuple):
    """A `Block` in training, where tensors go by themselves: see there."""

    layers: tuple[Layer, ...]
    has_projection: bool
    step: int
    low_memory: bool

    def subsampled(self, tensor: Tensor) -> Tensor:
        """Of the input or its gradient, a view of what is the shortcut."""
        return tensor if self.step <= 1 else tensor[:, :, :: self.step, :: self.step]

    def shortcut_is_input(self, input: Tensor, shortcut: Tensor | None) -> bool:
        """Whether the shortcut, or its gradient, is like the block's input; false for None."""
        return not self.has_projection and shortcut is not None and shortcut.shape == input.shape

    @property
    def main(self) -> int:
        """How many convolutions are not the projection."""
        return len(self.layers) - self.has_projection


def tensors_of(blocks: Sequence[Block]) -> list[Tensor | None]:
    """All tensors of these blocks, `TENSORS` a convolution, as `residual_blocks` takes them."""
    tensors: list[Tensor | None] = []
    for layers, _, _, _ in blocks:
        for weight, norm, bias, _, _, _, _ in layers:
            mean, var, bn_weight, bn_bias, _ = norm
            tensors += (weight, mean, var, bn_weight, bn_bias, bias)
    return tensors


def flattened_blocks(
    blocks: Sequence[Block],
) -> tuple[list[Tensor | None], list[int], list[float], list[int], list[int]]:
    """Blocks as the operator `residual_blocks` takes them, behind its input.

    Of each convolution six tensors, seven numbers and eps; of each block how many convolutions it
    has, and `has_projection`, or below zero its `step`.
    """
    numbers: list[int] = []
    eps: list[float] = []
    layer_counts: list[int] = []
    projections: list[int] = []
    for layers, has_projection, step, _ in blocks:
        for _, norm, _, stride, padding, dilation, groups in layers:
            numbers += (*stride, *padding, *dilation, groups)
            eps.append(norm.eps)
        layer_counts.append(len(layers))
        projections.append(-step if step else has_projection)
    return tensors_of(blocks), numbers, eps, layer_counts, projections


def described_blocks(
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[int],
) -> Iterator[Block]:
    """The blocks that have these for their `flattened_blocks`."""
    layer = 0
    for count, projection in zip(layer_counts, projections, strict=True):
        layers = []
        for i in range(layer, layer + count):
            weight, mean, var, bn_weight, bn_bias, bias = tensors[TENSORS * i : TENSORS * (i + 1)]
            assert weight is not None
            assert mean is not None
            assert var is not None
            n = numbers[NUMBERS * i : NUMBERS * (i + 1)]
            norm = Norm(mean, var, bn_weight, bn_bias, eps[i])
            layers.append(ConvNorm(weight, norm, bias, n[0:2], n[2:4], n[4:6], n[6]))
        yield Block(layers, projection > 0, max(-projection, 0))
        layer += count


PARAMETERS = 4  # a trained layer's: the weight and bias of the convolution, and those of the norm
SAVED = 4  # of a trained layer: raw, mean, var and count
