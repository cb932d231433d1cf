"""The package says that it has types, and what mypy passes over is named module by module."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fused_resnet

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fused_resnet.__file__).parent
IGNORED = re.compile(r"module = \[\n([^\]]*)\]\nignore_errors = true")

pytestmark = pytest.mark.quick


def test_package_says_that_it_has_types() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_modules_that_are_not_clean_are_named_one_by_one() -> None:
    (listed,) = IGNORED.findall((ROOT / "pyproject.toml").read_text())
    names = re.findall(r'"([^"]+)"', listed)
    assert names == sorted(set(names))
    for name in names:
        path = PACKAGE.joinpath(*name.split(".")[1:])
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), name


def test_exceptions_from_types_have_a_code() -> None:
    for path in PACKAGE.rglob("*.py"):
        for line in re.findall(r"#\s*type:\s*ignore.*|#\s*mypy:.*", path.read_text()):
            assert re.match(r"# type: ignore\[[a-z-]+\]", line), f"{path}: {line}"
