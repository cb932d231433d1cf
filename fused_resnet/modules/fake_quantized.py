"""Blocks in training for eight bits: in floating point, rounded wherever eight bits will round.

A block carries a `FakeQuantization` in `block.quantization`. Activations are rounded to the 256
steps of a range that follows the batches, weights to the 255 of each filter, by torch's
`fake_quantize` operators, whose gradient is that of the identity where nothing was clipped and zero
elsewhere (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018). The places are those of `layers/quantized.py`: a block's
input, what each convolution and its ReLU leave, its output, and every weight. A projection's output
is never stored, so it is not rounded.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from .. import forms
from ..layers.quantized import LARGEST, LARGEST_WEIGHT, Quantization
from ..layers.ranges import SMALLEST_STEP, BlockRanges, quantization_of
from . import quantized, read
from .conv_norm_act import conv_norm_act


class MovingRange:
    """A range of an activation that follows the batches it sees.

    Both ends are `end + averaging_constant * (batch's end - end)`, torch.ao's
    `MovingAverageMinMaxObserver`; the first batch's are taken as they are, and those of a batch
    with NaN or infinity not at all. Nothing waits for the device.

    Attributes:
        ends: (3,), float64: the lower end, the upper one, and 1 where they are known; on the device
            of the activations.
        has_seen: whether there was a batch, or the range was given.
    """

    def __init__(self, ends: tuple[float, float] | None = None) -> None:
        low, high = ends or (0.0, 0.0)
        self.ends = torch.tensor([low, high, float(ends is not None)], dtype=torch.float64)
        self.has_seen = ends is not None

    def update(self, values: Tensor, averaging_constant: float) -> Tensor:
        """Sees a batch of values, at least one; whether all of them are finite, ()."""
        ends = self.ends.to(values.device)
        now = torch.stack(torch.aminmax(values.detach())).double()
        is_finite = now.isfinite().all()
        step = torch.where(ends[2] > 0, averaging_constant, 1.0)
        moved = torch.lerp(ends, torch.cat([now, now.new_ones(1)]), step)
        self.ends = torch.where(is_finite, moved, ends)
        self.has_seen = True
        return is_finite

    def rounded(self, values: Tensor, is_finite: Tensor | None = None) -> Tensor:
        """The values as they would be read from bytes; all NaN unless `is_finite`, if it is given.

        As they are before there was a batch.
        """
        if not self.has_seen:
            return values
        low, high, _ = self.ends.to(values.device)
        low = low.clamp(max=0)
        step = ((high.clamp(min=0) - low) / LARGEST).clamp(min=SMALLEST_STEP).float()
        zero_point = (-low / step.double()).round().clamp(0, LARGEST).int()
        if is_finite is not None:
            step = torch.where(is_finite, step, torch.nan)
        return torch.fake_quantize_per_tensor_affine(values, step, zero_point, 0, LARGEST)

    def quantization(self) -> Quantization | None:
        """How the activation is to be stored; None without a batch, or where all of it was zero."""
        low, high, _ = self.ends.tolist()
        return quantization_of(low, high)


class FakeQuantization:
    """How a block is trained for eight bits, and the ranges it has come to.

    Args:
        path: the block's in its model.
        shapes: of its weights, see `BlockRanges`.
        reason: why it is trained in floating point alone, or "".
        ranges: of its input, of what each convolution but the last leaves, of its output.
        averaging_constant: how far a range moves to a batch's, 0 to 1.
        together: the others of the model, this one among them.

    Attributes:
        source: whose output its input is, or None.
    """

    def __init__(
        self,
        path: str,
        shapes: tuple[tuple[int, ...], ...],
        reason: str,
        ranges: list[MovingRange],
        averaging_constant: float,
        together: list[FakeQuantization],
    ) -> None:
        self.path = path
        self.shapes = shapes
        self.reason = reason
        self.ranges = ranges
        self.averaging_constant = averaging_constant
        self.source: FakeQuantization | None = None
        self._has_run = False
        self._together = together
        self._written: tuple[weakref.ref[Tensor], int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_written": None}

    @torch.compiler.disable
    def __call__(self, block: nn.Module, x: Tensor) -> Tensor | None:
        """What the block computes of x; None where it has to run as without ranges."""
        if self.reason or read.obstacle(block) is not None or read.input_obstacle(x) is not None:
            return None
        form = forms.of(block)
        found = read.block_layers(block)
        if found is None:
            return None
        pairs, has_projection = found
        x = self._read(block, x)
        *main, (conv, norm) = pairs[:-1] if has_projection else pairs
        shortcut, out = x, x
        if has_projection:
            before, projection = read.split_downsample(getattr(block, form.shortcut or ""))
            for module in before:
                shortcut = module(shortcut)
            shortcut = _unit(*projection, shortcut, None, None)
        relus = [forms.part(block, unit.act) for unit in form.units_of(block)]
        for i, (inner, inner_norm) in enumerate(main):
            out = self._stored(i + 1, block, _unit(inner, inner_norm, out, None, relus[i]))
        out = self._stored(len(main) + 1, block, _unit(conv, norm, out, shortcut, relus[-1]))
        self._written = (weakref.ref(out), out._version)
        return out

    def _read(self, block: nn.Module, x: Tensor) -> Tensor:
        """The block's input in its steps: as it is if it is another block's output."""
        source = next((one for one in reversed(self._together) if one._has_returned(x)), None)
        if not self._has_run:
            self._has_run, self.source = True, source
        elif source is not self.source and self.source is not None:
            # It has read what another block wrote, and so far that is all it has read.
            self.ranges[0] = copy.copy(self.source.ranges[-1])
            self.source = None
        return x if self.source is not None else self._stored(0, block, x)

    def _has_returned(self, x: Tensor) -> bool:
        if self._written is None or self._written[0]() is not x:
            return False
        return self._written[1] == x._version

    def _stored(self, index: int, block: nn.Module, values: Tensor) -> Tensor:
        own, is_finite = self.ranges[index], None
        if block.training and self.averaging_constant > 0 and values.numel() > 0:
            is_finite = own.update(values, self.averaging_constant)
        return own.rounded(values, is_finite)

    def ranges_read(self) -> list[MovingRange]:
        """The ranges, that of the input being the one it is read with."""
        first = self.ranges[0] if self.source is None else self.source.ranges[-1]
        return [copy.copy(one) for one in (first, *self.ranges[1:])]

    def found(self, block: nn.Module) -> BlockRanges:
        """The ranges as they are now, or why the block has none."""
        names = quantized.names_of_activations(block)
        reason = self.reason
        if not all(one.has_seen for one in self.ranges[1:]):
            reason = reason or "no batch was trained with it"
        ranges: list[Quantization] = []
        for what, one in zip(names, self.ranges_read(), strict=True):
            stored = one.quantization()
            if stored is None:
                reason = reason or f"{what} is zero in all batches"
            else:
                ranges.append(stored)
        return BlockRanges(self.path, self.shapes, () if reason else tuple(ranges), None, reason)


def of(block: nn.Module) -> FakeQuantization | None:
    """How a block is trained for eight bits, if it is."""
    kept = block.quantization if quantized.is_quantizable(block) else None
    return kept if isinstance(kept, FakeQuantization) else None


def rounded_weight(weight: Tensor) -> Tensor:
    """A weight (K, C, R, S) as it would be read from bytes, one step a filter."""
    step = weight.detach().abs().flatten(1).amax(1).float() / LARGEST_WEIGHT
    step = torch.where(step > 0, step, 1.0)
    zeros = torch.zeros_like(step, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(
        weight, step, zeros, 0, -LARGEST_WEIGHT, LARGEST_WEIGHT
    )


def _unit(
    conv: nn.Conv2d, norm: nn.Module, x: Tensor, residual: Tensor | None, relu: Any
) -> Tensor:
    return conv_norm_act(conv, norm, x, residual, relu, weight=rounded_weight(conv.weight))
