"""What the tests of measuring share: documents of results, made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fused_resnet.measure import (
    candidates,
    documents,
    kernels,
)
from fused_resnet.measure.case import Call, Case

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "bench" / "results" / "static"
CPU = torch.device("cpu")
LAYER = "2048x7x7 to 512, 1x1"


def candidate(name: str, median: float, **changes: Any) -> dict[str, Any]:
    samples = [median] * 9
    latency = {"median": median, "p10": median, "p90": median, "samples": samples}
    fields = {
        "name": name, "skipped": None, "latency_ms": latency, "images_per_second": 1e3 / median,
        "ratio_to_eager": median / 100, "peak_memory_bytes": 2**20, "energy_joules": None,
        "error": 2e-7, "gradient_error": None, "top5_agreement": 1.0, "wrong": False,
    }  # fmt: skip
    return fields | changes


def provenance(schema: str, date: str) -> dict[str, Any]:
    return {
        "schema": schema, "date": date, "command": "fused-resnet bench <models>", "commit": "abc",
        "versions": {
            "python": "3", "fused_resnet": "0", "torch": "2", "torchvision": "0", "triton": None
        },
        "device": {"type": "cpu", "name": "Some CPU"},
    }  # fmt: skip


def models_document(
    date: str = "2026-01-02T00:00:00+00:00", fused_ms: float = 50.0
) -> dict[str, Any]:
    absent = dict.fromkeys(candidate("", 1.0), None)
    untimed = dict.fromkeys(
        ("latency_ms", "images_per_second", "ratio_to_eager", "peak_memory_bytes")
    )
    case = {
        "model": "resnet50", "batch": 1, "dtype": "float32", "device": "cpu",
        "mode": "inference", "memory_format": "channels_last", "weights": "random", "seed": 0,
        "images": [], "backend": None, "threads": 2, "rounds": 9, "interrupted": False,
        "fused": [], "telemetry": None,
        "candidates": [
            candidate("eager", 100.0),
            candidate("fused", fused_ms),
            candidate("cheat", 1.0, wrong=True, error=3e-3, **untimed),
            {**absent, "name": "absent", "skipped": "ImportError: nothing there"},
        ],
    }  # fmt: skip
    return {**provenance(documents.MODELS, date), "cases": [case]}


def measured(found: dict[str, candidates.Prepare], rounds: int = 3) -> dict[str, Any]:
    """The document of one layer."""
    case = kernels.Case("resnet50", 1, "float32", "cpu")
    result = kernels.measure(
        case, case.problems(LAYER), found, rounds=rounds, thread_count=1, scale=0.02
    )
    return kernels.document([result], "command")


def failing(model: Any, input: Any, case: Case) -> Call:
    raise torch.OutOfMemoryError("too large")
