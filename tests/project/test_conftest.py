"""Which tests run without `--whole`."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_resnet.backends import library


@pytest.fixture
def representatives(request: pytest.FixtureRequest) -> Any:
    """The function of conftest.py."""
    plugins = request.config.pluginmanager.get_plugins()
    return next(one.representatives for one in plugins if hasattr(one, "representatives"))


class Item(SimpleNamespace):
    """Found by identity, as pytest's are."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


def item(name: str, markers: tuple[pytest.Mark, ...] = (), **params: object) -> Any:
    """What stands for a collected test."""
    markers = tuple(one.mark for one in markers)
    return Item(
        nodeid=f"test_x.py::{name}[{'-'.join(map(str, params.values()))}]",
        get_closest_marker=lambda name: next((m for m in markers if m.name == name), None),
        iter_markers=lambda name: (m for m in markers if m.name == name),
        **({"callspec": SimpleNamespace(params=params)} if params else {}),
        params=params,
    )


def kept(representatives: Any, items: list[Any]) -> list[Any]:
    chosen = representatives(items)
    return [one.params for one in items if one in chosen]


def test_products_are_thinned_and_every_value_kept(representatives: Any) -> None:
    sizes, dtypes, backends = range(5), ["float32", "bfloat16", "float16"], ["cpu", "triton"]
    marks = (pytest.mark.parametrize("size", sizes), pytest.mark.parametrize("dtype", dtypes))
    items = [
        item("test_a", marks, size=size, dtype=dtype, backend=backend)
        for size, dtype, backend in itertools.product(sizes, dtypes, backends)
    ]
    found = kept(representatives, items)
    assert len(found) < len(items)
    for backend in backends:
        mine = [one for one in found if one["backend"] == backend]
        assert len(mine) <= len(sizes) + len(dtypes) - 1
        assert {one["size"] for one in mine} == set(sizes)
        assert {one["dtype"] for one in mine} == set(dtypes)


def test_lists_of_cases_are_kept_whole(representatives: Any) -> None:
    """Values that are given together are one case, whatever each of them is."""
    cases = [(0, 0), (0, 1), (1, 0), (1, 1)]
    marks = (pytest.mark.parametrize(("a", "b"), cases),)
    items = [item("test_a", marks, a=a, b=b) for a, b in cases]
    assert [tuple(one.values()) for one in kept(representatives, items)] == cases
    assert len(kept(representatives, [item("test_b"), item("test_c")])) == 2


def test_what_is_marked_whole_is_left_out_and_stands_for_nothing(representatives: Any) -> None:
    marks = (pytest.mark.parametrize("size", ["large", "small"]),)
    items = [
        item("test_a", (*marks, pytest.mark.whole), size="large"),
        item("test_a", marks, size="small"),
    ]
    assert kept(representatives, items) == [{"size": "small"}]


@pytest.mark.parametrize("whole", [False, True])
def test_the_summary_says_how_many_did_not_run(whole: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FUSED_RESNET_WHOLE_SUITE"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    file = Path(__file__).parents[1] / "ops" / "test_scale_shift_act.py"
    out = subprocess.run(
        [*command, "--collect-only", str(file), *(["--whole"] if whole else [])],
        capture_output=True, text=True, env=environment, cwd=file.parent,
    ).stdout  # fmt: skip
    assert ("not run: pytest --whole" in out) == (not whole), out


@pytest.mark.parametrize("turn", range(2))
def test_float32_is_not_tf32(turn: int) -> None:
    """Neither by torch's default nor because the test before wanted it."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(1, device="cuda")
    assert library.precision(x) == "ieee"
    torch.backends.cudnn.allow_tf32 = True
    assert library.precision(x) == "tf32"
