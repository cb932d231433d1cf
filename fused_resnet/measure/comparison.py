"""What got faster or slower from one result file to another, beyond the noise.

Each file has the samples of every candidate. The median of `n` samples lies between two of them
with 95 % confidence, the k-th smallest and the k-th largest, `k = (n - 1.96 sqrt(n)) / 2`,
whatever their distribution (David and Nagaraja, Order Statistics, 7.1). A candidate is slower if
the two files' intervals do not meet and its median is more than a threshold larger, and faster
likewise. What was timed in the old file and fails or is wrong in the new one counts as slower.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from . import documents
from .errors import InvalidArgumentError

FASTER, SLOWER, SAME, ADDED, GONE, BROKEN, MENDED = (
    "faster", "slower", "same", "added", "gone", "broken", "mended",
)  # fmt: skip
# Clocks, placement in memory and neighbours change between runs; the samples of one don't show it.
THRESHOLD = 0.03


@dataclasses.dataclass(frozen=True)
class Change:
    """A candidate in both files.

    Attributes:
        what: the case or layer.
        name: the candidate's.
        kind: one of the words above.
        before: median in milliseconds, None if not timed.
        after: likewise.
        reason: why it is not timed any more, if it is "broken".
    """

    what: str
    name: str
    kind: str
    before: float | None
    after: float | None
    reason: str | None = None

    @property
    def is_slower(self) -> bool:
        """Whether it counts against the newer file."""
        return self.kind in (SLOWER, BROKEN)


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any], threshold: float = THRESHOLD
) -> list[Change]:
    """Every candidate of either file, in the newer file's order.

    Raises:
        InvalidArgumentError: the files are of different kinds or devices, or have nothing in
            common.
    """
    if before["schema"] != after["schema"]:
        raise InvalidArgumentError(
            f"the files are {before['schema']!r} and {after['schema']!r}, must be the same"
        )
    if before["schema"] == documents.PREDICTED:
        raise InvalidArgumentError("the files are predictions: only measurements have noise")
    names = [document["device"]["name"] for document in (before, after)]
    if names[0] != names[1]:
        raise InvalidArgumentError(f"the files are of different devices: {' and '.join(names)}")
    old, new = dict(_entries(before)), dict(_entries(after))
    if not old.keys() & new.keys():
        raise InvalidArgumentError("the files have no candidate of any case in common")
    return [_change(key, old.get(key), new.get(key), threshold) for key in {**new, **old}]


def interval(samples: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence; see this module's docstring."""
    ordered = sorted(samples)
    rank = max(0, math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
    return ordered[rank], ordered[-1 - rank]


def _entries(document: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], dict[str, Any]]]:
    """Every candidate, by its case or layer and its name: timing, in ms, or why there is none."""
    for case in document["cases"]:
        what = [case["model"], f"batch {case['batch']}", case["dtype"]]
        what += [f"{case['threads']} threads"] if case["device"] == "cpu" else []
        if document["schema"] == documents.MODELS:
            what += ["training"] if case["mode"] == "training" else []
            for one in case["candidates"]:
                latency = one["latency_ms"] or {}
                reason = one["skipped"] or ("wrong" if one["wrong"] else None)
                yield (
                    (", ".join(what), one["name"]),
                    {"samples": latency.get("samples"), "reason": reason},
                )
            continue
        what += ["training"] if case.get("mode") == "training" else []
        for layer in [*case["layers"], *case.get("blocks", ())]:
            for one in layer["candidates"]:
                taken = (one["microseconds"] or {}).get("samples")
                samples = taken and [1e-3 * sample for sample in taken]
                yield (
                    (", ".join([*what, layer["label"]]), one["name"]),
                    {"samples": samples, "reason": one["reason"]},
                )


def _change(
    key: tuple[str, str],
    old: Mapping[str, Any] | None,
    new: Mapping[str, Any] | None,
    threshold: float,
) -> Change:
    medians = []
    for one in (old, new):
        samples = sorted(one["samples"]) if one and one["samples"] else None
        middle = len(samples) // 2 if samples else 0
        medians.append((samples[middle] + samples[~middle]) / 2 if samples else None)
    before, after = medians
    if old is None or new is None:
        return Change(*key, ADDED if old is None else GONE, before, after)
    if before is None or after is None:
        kind = SAME if before is after else MENDED if before is None else BROKEN
        return Change(*key, kind, before, after, new["reason"])
    (old_low, old_high), (new_low, new_high) = interval(old["samples"]), interval(new["samples"])
    kind = SAME
    if new_low > old_high and after > before * (1 + threshold):
        kind = SLOWER
    elif new_high < old_low and after < before / (1 + threshold):
        kind = FASTER
    return Change(*key, kind, before, after)
