"""Fixtures of the tests of tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tuning import GPU, H100

from fused_resnet import tuning
from fused_resnet.tuning import architecture


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the user's tables, or what another test chose."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "cache"))
    tuning.reload()
    yield
    tuning.reload()


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch) -> architecture.Architecture:
    """`cuda:0` is an H100."""
    gpu = dataclasses.replace(H100, name=GPU)
    monkeypatch.setattr(architecture, "of_device", lambda device: gpu)
    return gpu
