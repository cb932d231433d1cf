"""Figures and text as tables and pages print them."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from rich.text import Text


def error_text(value: float | None) -> str:
    """A relative error as the tables show it."""
    return "-" if value is None else f"{value:.1e}" if math.isfinite(value) else "not finite"


def kept_text(candidate: Mapping[str, Any] | None, case: Mapping[str, Any]) -> str:
    """What a candidate of a result file keeps for the backward pass, in MiB an image."""
    kept = candidate and candidate.get("kept_bytes")
    return f"{kept / case['batch'] / 2**20:.1f}" if kept else "-"


def visible(text: object) -> str:
    """The text in one line, control characters, lone surrogates and the like as escapes."""
    return "".join(
        repr(c)[1:-1] if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c
        for c in str(text)
    )


def plain(text: object, style: str = "") -> Text:
    """Text for rich that is no markup and no emoji, and cannot move a terminal's cursor.

    For all that comes from a file, from the user or from another library.
    """
    return Text(visible(text), style)


def heading(text: object) -> Text:
    """The same as a table's title."""
    return plain(text, "table.title")
