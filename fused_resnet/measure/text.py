"""Figures as tables and pages print them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def error_text(value: float | None) -> str:
    """A relative error as the tables show it."""
    return "-" if value is None else f"{value:.1e}" if math.isfinite(value) else "not finite"


def kept_text(candidate: Mapping[str, Any] | None, case: Mapping[str, Any]) -> str:
    """What a candidate of a result file keeps for the backward pass, in MiB an image."""
    kept = candidate and candidate.get("kept_bytes")
    return f"{kept / case['batch'] / 2**20:.1f}" if kept else "-"
