"""What calibration leaves with a block: how its activations are stored in eight bits."""

from __future__ import annotations

import math
from typing import NamedTuple

from .quantized import (
    LARGEST,
    LARGEST_FLOAT8,
    LARGEST_WORD,
    WORD_ZERO_POINT,
    Quantization,
    float32,
)

SMALLEST_STEP = 2.0**-120
"""The smallest step: its inverse, and a weight's step times it, are ordinary float32 numbers."""


class BlockRanges(NamedTuple):
    """A residual block's ranges, as plain data.

    Attributes:
        path: the block's in the model that was calibrated, for messages.
        shapes: of the weights of its convolutions, then that of a projection.
        ranges: of its input, of what each convolution but the last writes, of its output; empty
            where it was not calibrated.
        sqnr_db: signal-to-quantization-noise ratio of its output in decibels, as calibration saw
            it; None where it was not measured or there was no noise.
        reason: why the block stays in floating point; "" where it runs in eight bits.
        dtype: of these: "int8" or "float8_e4m3fn".
    """

    path: str
    shapes: tuple[tuple[int, ...], ...]
    ranges: tuple[Quantization, ...]
    sqnr_db: float | None
    reason: str
    dtype: str = "int8"


class StemRanges(NamedTuple):
    """How a network's first convolution runs in eight or sixteen bits, as plain data.

    Attributes:
        path: the network's in the model that was calibrated, for messages.
        shape: of the convolution's weight.
        bits: 8 or 16, of its input and weight.
        ranges: of its input and its output; empty where it was not calibrated.
        sqnr_db: see `BlockRanges`.
        reason: see `BlockRanges`.
    """

    path: str
    shape: tuple[int, ...]
    bits: int
    ranges: tuple[Quantization, ...]
    sqnr_db: float | None
    reason: str


class HeadRanges(NamedTuple):
    """How a network's classifier runs in eight bits, as plain data.

    Attributes:
        path: the network's in the model that was calibrated, for messages.
        shape: of the linear layer's weight.
        ranges: of its input and of the mean over an image's pixels; empty where it was not
            calibrated.
        sqnr_db: see `BlockRanges`.
        reason: see `BlockRanges`.
    """

    path: str
    shape: tuple[int, ...]
    ranges: tuple[Quantization, ...]
    sqnr_db: float | None
    reason: str


def words_of(low: float, high: float) -> Quantization | None:
    """Sixteen bits for numbers between two finite ones: `max(-low, high) / 32639` is the step.

    Returns:
        How they are stored; None where all is zero, or nearly.
    """
    step = float32(max(-low, high, 0.0) / LARGEST_WORD)
    return Quantization(step, WORD_ZERO_POINT) if SMALLEST_STEP <= step < math.inf else None


def quantization_of(low: float, high: float) -> Quantization | None:
    """The bytes for numbers between two finite ones, zero among them.

    With `low` and `high` moved to zero where it lies outside, the step is `(high - low) / 255`,
    rounded to float32, and the zero point `round(-low / step)`, to nearest even: 0 of what is never
    negative.

    Returns:
        How they are stored; None where all is zero, or nearly.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    step = float32((high - low) / LARGEST)
    if not SMALLEST_STEP <= step < math.inf:
        return None
    return Quantization(step, min(max(round(-low / step), 0), LARGEST))


def float8_of(low: float, high: float) -> Quantization | None:
    """float8_e4m3fn for numbers between two finite ones: `max(-low, high) / 448` is the step.

    Returns:
        How they are stored; None where all is zero, or nearly.
    """
    step = float32(max(-low, high, 0.0) / LARGEST_FLOAT8)
    return Quantization(step) if SMALLEST_STEP <= step < math.inf else None
