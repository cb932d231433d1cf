"""The PEP 517 build backend: setuptools, plus torch only where the environment has none.

A build needs torch's headers and libraries. Under build isolation the usual way to get them is to
download a second torch of several gigabytes; here the torch that the outer environment already has
is used instead (`toolchain.find_torch`), and one is required only if there is none.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from toolchain import OLDEST_TORCH, find_torch

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]


def torch_requirement() -> list[str]:
    """What to download before a build: nothing if there is a torch to build against."""
    return [] if find_torch() else [f"torch>={OLDEST_TORCH}"]


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """PEP 517 hook."""
    return build_meta.get_requires_for_build_wheel(config_settings) + torch_requirement()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """PEP 660 hook."""
    return build_meta.get_requires_for_build_editable(config_settings) + torch_requirement()
