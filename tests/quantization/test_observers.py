"""Observers: the ranges they propose, against NumPy and exhaustive search."""

import math

import numpy as np
import pytest
import torch

from fused_resnet import reference
from fused_resnet.layers.quantized import Quantization
from fused_resnet.layers.ranges import quantization_of
from fused_resnet.quantization import observers

pytestmark = pytest.mark.quick


def activations(seed, sign=True, size=20000):
    generator = np.random.default_rng(seed)
    values = generator.standard_normal(size).astype(np.float32) ** 3
    return values if sign else np.maximum(values, 0)


def observed(name, *batches):
    observer = observers.OBSERVERS[name]()
    for batch in batches:
        observer.update(torch.from_numpy(batch))
    return observer


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 255.0, (1.0, 0)),
        (3.0, 510.0, (2.0, 0)),  # zero is always among them
        (-255.0, -1.0, (1.0, 255)),
        (-1.0, 1.0, (2 / 255, 127)),  # the float32 step is a little longer
        (-1.0, 254.0, (1.0, 1)),
        (0.0, 0.0, None),
        (-1e-40, 1e-40, None),
    ],
)
def test_quantization_of_a_range(low, high, expected):
    stored = quantization_of(low, high)
    if expected is None:
        assert stored is None
    else:
        assert stored == (float(np.float32(expected[0])), expected[1])


def test_minmax_over_batches():
    batches = [activations(seed) for seed in range(3)]
    observer = observed("minmax", *batches)
    everything = np.concatenate(batches)
    assert observer.ends() == (everything.min(), everything.max())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", observers.OBSERVERS)
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_not_finite_stays_noticed(name, bad, at):
    batches = [activations(seed) for seed in range(3)]
    batches[at][7] = bad
    assert not observed(name, *batches).is_finite
    assert observed(name, *batches[:at]).is_finite


@pytest.mark.parametrize("sign", [True, False])
def test_histogram_counts_all_values_in_bins_of_the_last_width(sign):
    """Against NumPy's, on the same edges, however the values come."""
    batches = [activations(seed, sign) * scale for seed, scale in enumerate((1e-3, 7.0, 0.2))]
    everything = np.concatenate(batches)
    for order in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        histogram = observed("mse", *(batches[i] for i in order)).histogram
        largest = np.abs(everything).max() / histogram.width
        assert observers.BINS / 2 <= largest < observers.BINS
        assert math.frexp(histogram.width)[0] == 0.5
        counts, _ = np.histogram(everything[everything != 0], histogram.edges().numpy())
        assert histogram.counts.numpy().tolist() == counts.tolist()
        assert histogram.zeros == (everything == 0).sum()


@pytest.mark.parametrize("name", observers.OBSERVERS)
def test_merged_is_as_if_it_had_seen_both(name):
    batches = [activations(seed) * scale for seed, scale in enumerate((1e-3, 7.0, 0.2))]
    expected = observed(name, *batches)
    for split in range(4):
        merged = observed(name, *batches[:split])
        merged.merge(observed(name, *batches[split:]))
        assert (merged.ends(), merged.count) == (expected.ends(), expected.count)


def test_channels_last_and_sixteen_bits_are_counted_too():
    values = torch.randn(2, 5, 4, 3).bfloat16()
    last = observers.MSEObserver()
    last.update(values.to(memory_format=torch.channels_last)[:, :, :3])
    plain = observers.MSEObserver()
    plain.update(values[:, :, :3].float())
    assert torch.equal(last.histogram.counts, plain.histogram.counts)
    assert last.histogram.counts.sum() == 2 * 5 * 3 * 3


@pytest.mark.parametrize("percentile", [90.0, 99.9, 100.0])
@pytest.mark.parametrize("sign", [True, False])
def test_percentile_is_numpys_within_a_bin(sign, percentile):
    values = activations(3, sign)
    observer = observers.PercentileObserver(percentile)
    for part in np.split(values, 4):
        observer.update(torch.from_numpy(part))
    low, high = observer.ends()
    width = observer.histogram.width
    expected = np.percentile(values, percentile, method="inverted_cdf")
    assert expected - width <= high <= expected + width
    assert (values <= high).mean() >= percentile / 100
    expected = np.percentile(values, 100 - percentile, method="inverted_cdf")
    assert expected - 2 * width <= low <= expected + 2 * width
    assert (values >= low).mean() >= percentile / 100


def test_percentile_of_hardly_anything_but_zeros_is_the_whole_range():
    values = np.zeros(100000, np.float32)
    values[:3] = (1.0, 2.0, 5.0)
    observer = observed("percentile", values)
    assert observer.ends() == (0.0, 0.0)
    assert observer.quantization() == quantization_of(0.0, 5.0)


def with_an_outlier(sign):
    """Values and how many there are of each: bell-shaped, two million, and a single outlier."""
    values = np.linspace(-4 if sign == 0 else 0, 4, 2001) + 1e-4
    counts = np.rint(2e6 * np.exp(-(values**2) / 2) / np.exp(-(values**2) / 2).sum())
    values = np.append(values, 40.0).astype(np.float32)
    return values * (sign or 1), np.append(counts, 1).astype(np.int64)


def squared_error(values, counts, ends):
    stored = quantization_of(*ends)
    values = values.astype(np.float64)
    bytes = np.clip(np.rint(values / stored.step) + stored.zero_point, 0, 255)
    return (counts * (values - (bytes - stored.zero_point) * stored.step) ** 2).sum()


@pytest.mark.parametrize("sign", [1, -1, 0])
@pytest.mark.parametrize("name", ["mse", "histogram"])
def test_searches_leave_an_outlier_out(name, sign):
    """Near the best of a hundred ranges, by the error of the values themselves."""
    values, counts = with_an_outlier(sign)
    observer = observed(name, *np.array_split(np.repeat(values, counts), 3))
    whole = (observer.low, observer.high)
    candidates = [(whole[0] * i / 100, whole[1] * i / 100) for i in range(1, 101)]
    if sign == 0:  # "histogram" moves its ends apart from each other, "mse" does not
        candidates += [] if name == "mse" else [(whole[0], end) for _, end in candidates]
    least = min(squared_error(values, counts, ends) for ends in candidates)
    low, high = observer.ends()
    found = squared_error(values, counts, (low, high))
    assert observer.low <= low <= 0 <= high <= observer.high or sign
    # The search goes on only while it gets better, so it may stop early.
    assert found <= (1.1 if name == "mse" else 1.25) * least
    assert found < 0.75 * squared_error(values, counts, whole)
    if name == "mse":
        assert any((low, high) == ends for ends in candidates)


def test_histogram_search_keeps_what_has_no_tails():
    values = np.linspace(0, 1, 5000, dtype=np.float32)
    for name in ("histogram", "mse"):
        low, high = observed(name, values).ends()
        assert low == 0
        assert 0.98 <= high <= 1


@pytest.mark.parametrize("name", observers.OBSERVERS)
def test_nothing_but_zeros(name):
    assert observed(name, np.zeros(10, np.float32)).quantization() is None
    assert observed(name).quantization() is None
    assert observed(name, np.zeros(0, np.float32)).quantization() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_read_and_stored_again_is_the_same_byte(dtype):
    """All bytes, in many steps: so blocks may be called one by one or in one call.

    Bfloat16 has eight bits for 255 steps: there a large byte may become its neighbour.
    """
    generator = np.random.default_rng(0)
    least, most = (-22.5, 7.9) if dtype is torch.float16 else (-118, 118)
    bytes = torch.arange(256, dtype=torch.uint8)
    moved = 0
    for i, exponent in enumerate(generator.uniform(least, most, 2000)):
        step = float(np.float32(2.0**exponent))
        for zero_point in {0, 255, int(generator.integers(256))} if i % 10 == 0 else {0}:
            stored = Quantization(step, zero_point)
            again = reference.quantize(reference.dequantize(bytes, stored, dtype), stored)
            difference = (again.short() - bytes.short()).abs()
            moved = max(moved, int(difference.max()))
            assert not difference[(bytes.short() - zero_point).abs() <= 128].any(), stored
    assert moved == (1 if dtype is torch.bfloat16 else 0)
