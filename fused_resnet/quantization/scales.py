"""Ranges out of graphs that others quantized: what such graphs have in common."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from .. import forms
from ..layers.quantized import LARGEST, Quantization, float32
from ..layers.ranges import SMALLEST_STEP, BlockRanges
from ..modules import quantized


def stored_as(step: float, zero_point: int) -> Quantization | None:
    """How 256 steps from the smallest one on are stored, if eight bits can be.

    Args:
        step: between neighbours.
        zero_point: which of them stands for zero, from 0 on.
    """
    if not SMALLEST_STEP <= float32(step) < math.inf:
        return None
    return Quantization(float32(step), min(max(zero_point, 0), LARGEST))


def block_ranges(
    path: str,
    block: nn.Module,
    input_of: Callable[[str], Quantization | None],
    output_of: Callable[[str], Quantization | None],
) -> BlockRanges:
    """A block's ranges, or why it has none.

    Args:
        path: of the block.
        block: fused.
        input_of: how the input of the convolution with a path is stored, if it is.
        output_of: how the output of the block that ends with that convolution is.
    """
    shapes = quantized.shapes_of(block)
    reason = quantized.float_reason(block)
    form = forms.of(block)
    names = [f"{path}.{unit.conv}" if path else unit.conv for unit in form.units_of(block)]
    ranges = [*map(input_of, names), output_of(names[-1])]
    kept = []
    for index, what in enumerate(quantized.names_of_activations(block)):
        one = ranges[index]
        if one is None:
            reason = reason or f"scales has none for {what}"
        else:
            # Behind a ReLU the same multiples of the step, counted from zero.
            kept.append(one if index == 0 else one._replace(zero_point=0))
    return BlockRanges(path, shapes, () if reason else tuple(kept), None, reason or "")
