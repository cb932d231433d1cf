"""Observers: which range of an activation eight bits should cover.

Each sees an activation's values batch by batch and proposes two ends of a range. The names are
those of torchao's and torch.ao's observers; the formulas are at each class. All but
`MinMaxObserver` keep a `Histogram`, whose size does not depend on the number of batches. What is
found does not depend on the order of the batches.
"""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

from ..layers.quantized import LARGEST, Quantization
from ..layers.ranges import float8_of, quantization_of

BINS = 4096
_CHUNK = 1 << 22


class MinMaxObserver:
    """From the smallest to the largest value seen: torch.ao's `MinMaxObserver`.

    Attributes:
        low: the smallest value; 0 while none was seen.
        high: the largest; NaN or infinite where there was such a value.
        count: how many values were seen.
    """

    def __init__(self) -> None:
        self.low = 0.0
        self.high = 0.0
        self.count = 0

    def update(self, values: Tensor) -> None:
        """Sees a tensor of any shape and floating-point dtype."""
        if values.numel() == 0:
            return
        low, high = (end.item() for end in torch.aminmax(values.detach()))
        if self.count == 0:
            self.low, self.high = low, high
        # min() and max() of Python would drop a NaN in one of their two arguments.
        elif math.isfinite(self.low + self.high):
            is_finite = math.isfinite(low + high)
            self.low = min(self.low, low) if is_finite else low
            self.high = max(self.high, high) if is_finite else high
        self.count += values.numel()

    def merge(self, other: MinMaxObserver) -> None:
        """Sees what another observer of the same class has seen."""
        if other.count == 0:
            return
        ends = [other.low, other.high]
        if self.count and self.is_finite and other.is_finite:
            ends = [min(self.low, other.low), max(self.high, other.high)]
        if self.count == 0 or self.is_finite:
            self.low, self.high = ends
        self.count += other.count

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite numbers."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def ends(self) -> tuple[float, float]:
        """Both ends of the range to cover, of values that were all finite."""
        return self.low, self.high

    def quantization(self) -> Quantization | None:
        """How the activation is to be stored; None where all values were zero, or nearly."""
        return quantization_of(*self.ends()) or quantization_of(self.low, self.high)

    def float8_quantization(self) -> Quantization | None:
        """`quantization` in float8_e4m3fn."""
        return float8_of(*self.ends()) or float8_of(self.low, self.high)


class Histogram:
    """Counts of values in bins of one width, `BINS` on either side of zero, and of zeros.

    The width is the smallest power of two with which the values fit. For a larger value it doubles,
    and neighbouring bins become one: the counts are those of all values in bins of the last width.

    Attributes:
        width: of a bin; 0 while all values were zero.
        counts: (2 * BINS,), int64, on the CPU; bin i holds values from `(i - BINS) * width` up to
            the next one's.
        zeros: how many values were zero; they are in no bin.
    """

    def __init__(self) -> None:
        self.width = 0.0
        self.counts = torch.zeros(2 * BINS, dtype=torch.int64)
        self.zeros = 0

    def update(self, values: Tensor, largest: float) -> None:
        """Counts finite values, the largest magnitude among which is `largest`."""
        if largest > 0:
            self._widen(largest)
        for chunk in _flat(values.detach()).split(_CHUNK):
            zeros = int((chunk == 0).sum())
            self.zeros += zeros
            if zeros < chunk.numel():
                bins = (chunk.float() * (1 / self.width)).floor_().clamp_(-BINS, BINS - 1)
                counts = torch.bincount(bins.long() + BINS, minlength=2 * BINS).cpu()
                counts[BINS] -= zeros
                self.counts += counts

    def _widen(self, largest: float) -> None:
        # `largest / BINS` is below 2**exponent.
        _, exponent = math.frexp(largest / BINS)
        self._widen_to(2.0 ** max(exponent, -126))

    def _widen_to(self, needed: float) -> None:
        if self.width == 0.0:
            self.width = needed
        while self.width < needed:
            below, above = (half.view(-1, 2).sum(1) for half in self.counts.split(BINS))
            self.counts.zero_()
            self.counts[BINS // 2 : BINS] = below
            self.counts[BINS : BINS + BINS // 2] = above
            self.width *= 2

    def merge(self, other: Histogram) -> None:
        """Counts what another one has counted."""
        own = Histogram()
        own.width, own.counts = other.width, other.counts.clone()
        width = max(self.width, own.width)
        for one in (self, own):
            one._widen_to(width)
        self.counts += own.counts
        self.zeros += other.zeros

    def edges(self) -> Tensor:
        """(2 * BINS + 1,), float64: where the bins begin and the last one ends."""
        return torch.arange(-BINS, BINS + 1, dtype=torch.float64) * self.width

    def centres(self) -> Tensor:
        """(2 * BINS,), float64."""
        return (self.edges()[:-1] + self.edges()[1:]) / 2


def _flat(values: Tensor) -> Tensor:
    """The values in any order, without a copy where they are dense."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.reshape(-1)


class _HistogramBased(MinMaxObserver):
    def __init__(self) -> None:
        super().__init__()
        self.histogram = Histogram()

    def update(self, values: Tensor) -> None:
        """Sees a tensor of any shape and floating-point dtype."""
        own = MinMaxObserver()
        own.update(values)
        super().update(values)
        if own.count and self.is_finite:
            self.histogram.update(values, max(-own.low, own.high))

    def merge(self, other: MinMaxObserver) -> None:
        """Sees what another observer of the same class has seen."""
        super().merge(other)
        assert isinstance(other, _HistogramBased)
        self.histogram.merge(other.histogram)


class PercentileObserver(_HistogramBased):
    """All but a share of the values at either end.

    With p = `percentile` / 100, the upper end is the smallest edge of a bin with at least `p count`
    values below it, zeros included, the lower end the largest with as many above; neither is beyond
    what was seen. The whole range where these leave nothing.

    Args:
        percentile: above 50, at most 100.
    """

    def __init__(self, percentile: float = 99.99) -> None:
        super().__init__()
        self.percentile = percentile

    def ends(self) -> tuple[float, float]:
        """See `MinMaxObserver.ends`."""
        histogram = self.histogram
        counts, zeros = histogram.counts, histogram.zeros
        # The values below each edge; zero is an edge, and counts as below it.
        below = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        below[BINS:] += zeros
        above = torch.cat([counts.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.int64)])
        above[: BINS + 1] += zeros
        needed = math.ceil(self.percentile / 100 * self.count)
        edges = histogram.edges()
        high = edges[int((below >= needed).nonzero()[0])].item()
        low = edges[int((above >= needed).nonzero()[-1])].item()
        return max(low, self.low), min(high, self.high)


class MSEObserver(_HistogramBased):
    """The range, of `STEPS` that are the whole one made shorter, with the least squared error.

    As torchao's `AffineQuantizedMSEObserver`: of `(low i / 100, high i / 100)`, i = 1 ... 100, the
    one with the smallest sum of `(x - dequantize(quantize(x)))^2`, each value standing at its bin's
    centre; of equal ones the longest.
    """

    STEPS = 100

    def ends(self) -> tuple[float, float]:
        """See `MinMaxObserver.ends`."""
        centres, counts = self.histogram.centres(), self.histogram.counts.double()
        used = counts > 0
        centres, counts = centres[used], counts[used]
        best, least = (self.low, self.high), math.inf
        for i in range(self.STEPS, 0, -1):
            ends = (self.low * i / self.STEPS, self.high * i / self.STEPS)
            stored = quantization_of(*ends)
            if stored is None:
                break
            error = (counts * (centres - _rounded(centres, stored)).square()).sum().item()
            if error < least:
                best, least = ends, error
        return best


def _rounded(values: Tensor, stored: Quantization) -> Tensor:
    """What is read of values that were stored."""
    bytes = (values / stored.step).round() + stored.zero_point
    return (bytes.clamp(0, LARGEST) - stored.zero_point) * stored.step


class HistogramObserver(_HistogramBased):
    """The range that torch.ao's `HistogramObserver` searches for.

    From the whole range on, the end behind which more bins lie until the next quantile, in steps of
    `QUANTILE`, moves inwards to it, as long as the squared error becomes no larger. The error of a
    bin is that of values spread evenly over it (here at eight places), and zeros, which are stored
    exactly, have none. An end at zero stays there.
    """

    QUANTILE = 1e-5

    def ends(self) -> tuple[float, float]:
        """See `MinMaxObserver.ends`."""
        counts = self.histogram.counts
        used = counts.nonzero()
        if used.numel() == 0:
            return self.low, self.high
        first, last = int(used[0]), int(used[-1])
        if self.low >= 0:
            first = BINS
        if self.high <= 0:
            last = BINS - 1
        edges = self.histogram.edges()
        density = counts[first : last + 1].double()
        places = (torch.arange(8, dtype=torch.float64) + 0.5) / 8 * self.histogram.width
        values = edges[first : last + 1, None] + places

        def error(low: float, high: float) -> float:
            stored = quantization_of(low, high)
            if stored is None:
                return math.inf
            return (density * (values - _rounded(values, stored)).square().mean(1)).sum().item()

        cumulative = (density.cumsum(0) / density.sum()).tolist()
        least, ends = error(self.low, self.high), (self.low, self.high)
        start, end = 0, len(cumulative) - 1
        below, above = 0.0, 1.0
        while below < above:
            left, right = start, end
            if self.low < 0:
                left = max(start, bisect.bisect_left(cumulative, below + self.QUANTILE))
            if self.high > 0:
                right = min(end, bisect.bisect_right(cumulative, above - self.QUANTILE) - 1)
            if left - start > end - right or self.high <= 0:
                below, new = below + self.QUANTILE, (left, end)
            else:
                above, new = above - self.QUANTILE, (start, right)
            if new[0] >= new[1]:
                break
            if new == (start, end):
                # On to the next quantile with a bin of its own.
                if self.high > 0:
                    above = min(above, cumulative[end])
                else:
                    below = max(below, cumulative[start] - self.QUANTILE)
                continue
            low = max(self.low, edges[first + new[0]].item())
            high = min(self.high, edges[first + new[1] + 1].item())
            now = error(low, high)
            if now > least:
                break
            least, ends, (start, end) = now, (low, high), new
        return ends


OBSERVERS: dict[str, type[MinMaxObserver]] = {
    "minmax": MinMaxObserver,
    "percentile": PercentileObserver,
    "mse": MSEObserver,
    "histogram": HistogramObserver,
}
