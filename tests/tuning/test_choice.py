"""What is chosen: what was measured here, what was shipped, else the estimate."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path

import pytest
from support.threads import run_in_threads
from support.tuning import CPU, CUDA, GPU, LIBRARY_ENTRY, SMALL, model_problems

from fused_resnet import tuning
from fused_resnet.tuning import (
    Choice,
    Tile,
    architecture,
    estimate,
    table,
)
from fused_resnet.tuning.choice import (
    ESTIMATE,
    MEASURED,
    SHIPPED,
)

pytestmark = pytest.mark.quick


def test_choice_prefers_what_was_measured_here(
    an_h100: architecture.Architecture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem = model_problems()[2]
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(table, "_SHIPPED", shipped)
    best = estimate.best(problem, an_h100)
    assert tuning.choose(problem, CUDA) == Choice("triton", best, ESTIMATE)

    fitting = Tile(64, 32, 64, 1, 4, 4)
    entry = table.Entry("triton", fitting, 1.0)
    table.merge(table.shipped_path(GPU), GPU, {problem: entry})
    assert tuning.choose(problem, CUDA).source == ESTIMATE  # remembered
    tuning.reload()
    assert tuning.choose(problem, CUDA) == Choice("triton", fitting, SHIPPED)

    table.merge(table.user_path(GPU), GPU, {problem: LIBRARY_ENTRY})
    tuning.reload()
    assert tuning.choose(problem, CUDA) == Choice("library", None, MEASURED)
    other = dataclasses.replace(problem, N=7)
    assert tuning.choose(other, CUDA).source == ESTIMATE
    assert tuning.choose(problem, CPU).source == ESTIMATE


def test_interpreted_kernels_are_never_left_to_the_library() -> None:
    for problem in model_problems():
        exact = dataclasses.replace(problem, N=256, dtype="float32")
        assert tuning.choose(exact, CPU).kernel == "triton"


def test_tables_cannot_ask_for_what_does_not_fit(an_h100: architecture.Architecture) -> None:
    problem = model_problems()[2]
    too_large = table.Entry("triton", Tile(256, 256, 128, 1, 4, 8), 1.0)
    table.merge(table.user_path(GPU), GPU, {problem: too_large})
    assert tuning.choose(problem, CUDA).source == ESTIMATE


def test_choice_is_cheap_and_reads_tables_once(
    an_h100: architecture.Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    original = table.read
    monkeypatch.setattr(table, "read", lambda path: reads.append(path) or original(path))
    for problem in model_problems():
        tuning.choose(problem, CUDA)
    assert len(reads) == 2
    problem = model_problems()[0]
    times = []
    for _ in range(200):
        start = time.perf_counter()
        tuning.choose(problem, CUDA)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 50e-6


def test_choice_from_many_threads(an_h100: architecture.Architecture) -> None:
    table.merge(table.user_path(GPU), GPU, dict.fromkeys(model_problems()[::2], LIBRARY_ENTRY))

    def work(_: int) -> list[Choice]:
        return [tuning.choose(problem, CUDA) for problem in model_problems()]

    found = run_in_threads(work, 8)
    assert all(choices == found[0] for choices in found)
    assert {choice.source for choice in found[0]} == {MEASURED, ESTIMATE}


def test_a_damaged_table_does_not_stop_anyone(an_h100: architecture.Architecture) -> None:
    path = table.user_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert tuning.choose(SMALL, CUDA).source == ESTIMATE
    assert len(caught) == 1
