"""The schema "fused_resnet.results/1" of `fused_resnet.compare.document`, as assertions."""

from __future__ import annotations

import datetime
import statistics
from typing import Any

import pytest

TOP = {"schema", "date", "command", "commit", "versions", "device", "cases"}
CASE = {
    "model", "batch", "dtype", "device", "mode", "memory_format", "weights", "seed", "images",
    "backend", "threads", "rounds", "interrupted", "fused", "candidates",
}  # fmt: skip
CANDIDATE = {
    "name", "skipped", "latency_ms", "images_per_second", "ratio_to_eager", "peak_memory_bytes",
    "error", "gradient_error", "top5_agreement", "wrong",
}  # fmt: skip


def check_document(document: dict[str, Any]) -> None:
    """Asserts that keys, types and the arithmetic between the fields are as documented."""
    assert set(document) == TOP
    assert document["schema"] == "fused_resnet.results/1"
    assert datetime.datetime.fromisoformat(document["date"]).utcoffset() == datetime.timedelta(0)
    assert {"python", "fused_resnet", "torch", "torchvision", "triton"} <= set(document["versions"])
    assert document["device"]["type"] in ("cpu", "cuda")
    assert document["device"]["name"]
    assert document["cases"]
    for case in document["cases"]:
        assert set(case) == CASE
        assert case["mode"] in ("inference", "training")
        assert case["candidates"][0]["name"] == "eager"
        for candidate in case["candidates"]:
            check_candidate(candidate, case)


def check_candidate(candidate: dict[str, Any], case: dict[str, Any]) -> None:
    """Asserts the same of one candidate of a case."""
    assert set(candidate) == CANDIDATE
    if candidate["skipped"]:
        assert all(candidate[key] is None for key in CANDIDATE - {"name", "skipped"})
        return
    latency = candidate["latency_ms"]
    assert set(latency) == {"median", "p10", "p90", "samples"}
    assert len(latency["samples"]) == case["rounds"]
    assert latency["median"] == pytest.approx(statistics.median(latency["samples"]))
    assert 0 < latency["p10"] <= latency["median"] <= latency["p90"]
    per_second = 1e3 * case["batch"] / latency["median"]
    assert candidate["images_per_second"] == pytest.approx(per_second)
    eager = case["candidates"][0]["latency_ms"]["median"]
    assert candidate["ratio_to_eager"] == pytest.approx(latency["median"] / eager)
    assert candidate["peak_memory_bytes"] is None or candidate["peak_memory_bytes"] >= 0
    assert (candidate["gradient_error"] is None) == (case["mode"] == "inference")
    assert 0 <= candidate["top5_agreement"] <= 1
    assert isinstance(candidate["wrong"], bool)
