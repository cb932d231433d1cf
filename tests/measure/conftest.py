"""Fixtures of the tests of measuring."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fused_resnet.measure import ceilings


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ceilings that take no time to measure, and one set of tensors a layer."""
    monkeypatch.setattr(ceilings, "COLD_BYTES", 2**16)
    monkeypatch.setattr(ceilings, "_MATRIX_SIZE", {"cpu": 64})
    return
