"""The schemas of result files as assertions: `documents.document` and `kernels.document`."""

from __future__ import annotations

import datetime
import statistics
from typing import Any

import pytest

from fused_resnet.tuning.problem import parse_problem

TOP = {"schema", "date", "command", "commit", "versions", "device", "cases"}
CASE = {
    "model", "batch", "dtype", "device", "mode", "memory_format", "weights", "seed", "images",
    "backend", "threads", "rounds", "interrupted", "fused", "telemetry", "candidates",
}  # fmt: skip
CANDIDATE = {
    "name", "skipped", "latency_ms", "images_per_second", "ratio_to_eager", "peak_memory_bytes",
    "kept_bytes", "energy_joules", "error", "gradient_error", "top5_agreement", "wrong",
}  # fmt: skip
KERNELS_CASE = {
    "model", "batch", "dtype", "device", "threads", "rounds", "interrupted", "ceilings",
    "telemetry", "layers", "blocks", "mode",
}  # fmt: skip
LAYER = {
    "problem", "label", "count", "bytes", "flops", "least_microseconds", "unit_microseconds",
    "candidates",
}  # fmt: skip
LAYER_CANDIDATE = {
    "name", "status", "reason", "error", "keeps_nan", "microseconds", "gigabytes_per_second",
    "teraflops_per_second", "roofline", "unit_share", "ratio_to_eager",
}  # fmt: skip


def check_document(document: dict[str, Any]) -> None:
    """Asserts that keys, types and the arithmetic between the fields are as documented."""
    check_provenance(document, "fused_resnet.results/2")
    for case in document["cases"]:
        assert set(case) == CASE
        assert case["mode"] in ("inference", "training")
        assert case["candidates"][0]["name"] == "eager"
        for candidate in case["candidates"]:
            check_candidate(candidate, case)


def check_provenance(document: dict[str, Any], schema: str) -> None:
    """Asserts what all measured files start with."""
    assert set(document) == TOP
    assert document["schema"] == schema
    assert datetime.datetime.fromisoformat(document["date"]).utcoffset() == datetime.timedelta(0)
    assert {"python", "fused_resnet", "torch", "torchvision", "triton"} <= set(document["versions"])
    assert document["device"]["type"] in ("cpu", "cuda")
    assert document["device"]["name"]
    assert document["cases"]


def check_candidate(candidate: dict[str, Any], case: dict[str, Any]) -> None:
    """Asserts the same of one candidate of a case."""
    # Files from before there was such a field lack it.
    candidate = {"kept_bytes": None, **candidate}
    assert set(candidate) == CANDIDATE
    if candidate["skipped"]:
        assert all(candidate[key] is None for key in CANDIDATE - {"name", "skipped"})
        return
    assert isinstance(candidate["wrong"], bool)
    assert (candidate["gradient_error"] is None) == (case["mode"] == "inference")
    assert 0 <= candidate["top5_agreement"] <= 1
    if candidate["wrong"]:
        assert candidate["latency_ms"] is None
        return
    latency = candidate["latency_ms"]
    check_times(latency, case["rounds"])
    per_second = 1e3 * case["batch"] / latency["median"]
    assert candidate["images_per_second"] == pytest.approx(per_second)
    eager = case["candidates"][0]["latency_ms"]["median"]
    assert candidate["ratio_to_eager"] == pytest.approx(latency["median"] / eager)
    assert candidate["peak_memory_bytes"] is None or candidate["peak_memory_bytes"] >= 0
    assert candidate["kept_bytes"] is None or case["mode"] == "training"


def check_times(times: dict[str, Any], rounds: int) -> None:
    """Asserts that the quantiles are those of the samples."""
    assert set(times) == {"median", "p10", "p90", "samples"}
    assert len(times["samples"]) == rounds
    assert times["median"] == pytest.approx(statistics.median(times["samples"]))
    assert 0 < times["p10"] <= times["median"] <= times["p90"]


def check_kernels_document(document: dict[str, Any]) -> None:
    """Asserts the same of a file of layers."""
    check_provenance(document, "fused_resnet.kernels/1")
    for case in document["cases"]:
        # Files from before there was such a field lack it.
        case = {"blocks": [], "mode": "inference", **case}
        assert set(case) == KERNELS_CASE
        assert set(case["telemetry"]) == {"before", "after"}
        for layer in [*case["layers"], *case["blocks"]]:
            if "matrix_unit" not in case["ceilings"]:
                layer = {"unit_microseconds": None, **layer}
                layer["candidates"] = [{"unit_share": None, **one} for one in layer["candidates"]]
            assert set(layer) == LAYER
            if case["mode"] == "training":
                check_norm(layer, case)
            else:
                problem = parse_problem(layer["problem"])
                assert (layer["bytes"], layer["flops"]) == (problem.bytes_once, problem.flops)
            check_layer(layer, case)


def check_norm(layer: dict[str, Any], case: dict[str, Any]) -> None:
    """Asserts that a norm's text and bytes belong together."""
    assert layer["problem"] == f"{case['dtype']} {case['batch']} images, {layer['label']}"
    what, _, shape = layer["label"].partition(" of ")
    assert set(what.split(" + ")) <= {"norm", "shortcut", "ReLU"}
    C, H, W = map(int, shape.split("x"))
    tensors = 7 if "shortcut" in what else 5
    size = 2 if case["dtype"] in ("float16", "bfloat16") else 4
    assert (layer["bytes"], layer["flops"]) == (tensors * size * case["batch"] * C * H * W, 0)


def check_layer(layer: dict[str, Any], case: dict[str, Any]) -> None:
    """Asserts that a layer's figures follow from its times and the ceilings."""
    limits = case["ceilings"]
    least = max(
        1e-3 * layer["bytes"] / limits["copy_gigabytes_per_second"],
        1e-6 * layer["flops"] / limits["teraflops_per_second"],
    )
    assert layer["least_microseconds"] == pytest.approx(least)
    unit = limits.get("matrix_unit")
    if unit is None or unit["products"] is None:
        assert layer["unit_microseconds"] is None
    else:
        rate = unit["teraops_per_second"]["bfloat16"] / unit["products"]
        assert layer["unit_microseconds"] == pytest.approx(1e-6 * layer["flops"] / rate)
    for one in layer["candidates"]:
        assert set(one) == LAYER_CANDIDATE
        if one["status"] != "timed":
            assert one["status"] in ("wrong", "failed")
            assert one["reason"]
            timed = ("microseconds", "gigabytes_per_second", "roofline", "ratio_to_eager")
            timed = (*timed, "unit_share")
            assert all(one[key] is None for key in timed)
            continue
        assert one["reason"] is None
        check_times(one["microseconds"], case["rounds"])
        median = one["microseconds"]["median"]
        assert one["gigabytes_per_second"] == pytest.approx(1e-3 * layer["bytes"] / median)
        assert one["teraflops_per_second"] == pytest.approx(1e-6 * layer["flops"] / median)
        assert one["roofline"] == pytest.approx(least / median)
        if layer["unit_microseconds"] is None:
            assert one["unit_share"] is None
        else:
            assert one["unit_share"] == pytest.approx(layer["unit_microseconds"] / median)
