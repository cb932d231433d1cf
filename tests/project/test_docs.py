"""The documentation says what the code does."""

import inspect
import re
from pathlib import Path

import pytest
from support import load_script

import fused_resnet
from fused_resnet import functional

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_the_support_matrix_is_current():
    """Committed as `python docs/make_support_matrix.py` writes it."""
    pytest.importorskip("timm", reason="timm is not installed, whose networks are in the matrix")
    matrix = load_script(DOCS / "make_support_matrix.py")
    assert matrix.SUPPORT.read_text() == matrix.text(), "run python docs/make_support_matrix.py"


def test_the_reference_is_current():
    """Committed as `python docs/make_reference.py` writes it, and nothing public is missing."""
    reference = load_script(DOCS / "make_reference.py")
    text = reference.REFERENCE.read_text()
    assert text == reference.text(), "run python docs/make_reference.py"
    public = [name for name in fused_resnet.__all__ if callable(getattr(fused_resnet, name))]
    functions = inspect.getmembers(functional, inspect.isfunction)
    own = [name for name, function in functions if function.__module__ == functional.__name__]
    public += [name for name in own if not name.startswith("_")]
    for name in public:
        assert f"### `{name}`" in text, name


@pytest.mark.quick
@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_files_that_a_page_names_exist(page):
    """Paths in backquotes that have a slash and an ending, and links."""
    text = (DOCS / page).read_text()
    named = re.findall(r"`([\w./]+/[\w.]+\.\w+)`", text)
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    for path in named:
        assert (ROOT / path).exists(), path
    for path in linked:
        assert (DOCS / path).exists(), path
