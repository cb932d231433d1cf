"""The package says that it has types, and mypy passes over none of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fused_resnet

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fused_resnet.__file__).parent

pytestmark = pytest.mark.quick


def test_package_says_that_it_has_types() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_no_module_is_passed_over() -> None:
    assert "ignore_errors" not in (ROOT / "pyproject.toml").read_text()


def test_exceptions_from_types_have_a_code() -> None:
    for path in PACKAGE.rglob("*.py"):
        for line in re.findall(r"#\s*type:\s*ignore.*|#\s*mypy:.*", path.read_text()):
            assert re.match(r"# type: ignore\[[a-z-]+\]", line), f"{path}: {line}"
