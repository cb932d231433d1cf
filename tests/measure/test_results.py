"""Files of results: their schema, where they lie, and what of two files is a change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import Run
from support.results import LAYER, ROOT, STATIC, measured, models_document
from support.results_schema import check_document, check_kernels_document

from fused_resnet.measure import (
    candidates,
    comparison,
    documents,
    environment,
)
from fused_resnet.measure.errors import InvalidArgumentError


def test_result_files_follow_the_schema() -> None:
    for path in (ROOT / "bench" / "results").glob("*/*.json"):
        if path.parent.name == "static":  # see test_triton_static.py
            continue
        content = documents.load(path)
        assert path == documents.default_path(content, ROOT)
        if content["schema"] == documents.KERNELS:
            check_kernels_document(content)
            continue
        check_document(content)
        for case in content["cases"]:
            assert not any(c["wrong"] for c in case["candidates"] if c["name"] == "fused"), path


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        documents.load(path)
    for text, what in (
        ("{", "no JSON"),
        ("[]", "not an object"),
        ('{"schema": "other/1"}', "other/1"),
        (f'{{"schema": "{documents.MODELS}", "cases": []}}', "no results"),
    ):
        path.write_text(text)
        with pytest.raises(InvalidArgumentError, match=what):
            documents.load(path)


def test_runs_of_one_day_and_commit_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.json"
    first, second, third = (models_document(fused_ms=ms) for ms in (50.0, 40.0, 30.0))
    second["cases"][0]["batch"] = 8
    second["command"] = "another"
    documents.add(first, path)
    documents.add(second, path)
    content = documents.load(path)
    assert [case["batch"] for case in content["cases"]] == [1, 8]
    assert content["command"] == f"{first['command']} && another"
    documents.add(third, path)
    content = documents.load(path)
    assert content["cases"][0] == third["cases"][0]
    assert len(content["cases"]) == 2
    third["versions"] = {**third["versions"], "torch": "3"}
    documents.add(third, path)
    assert len(documents.load(path)["cases"]) == 1


def test_repository_is_found_by_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "ROOT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    assert documents.repository() is None
    for name in (".git", "csrc"):
        (tmp_path / name).mkdir()
    assert documents.repository() == tmp_path
    name = documents.default_path(models_document(), tmp_path).relative_to(tmp_path)
    assert str(name) == "bench/results/some-cpu/2026-01-02-abc.json"


def with_samples(scale: float, spread: float, count: int = 15) -> dict[str, Any]:
    content = models_document()
    for one in content["cases"][0]["candidates"][:2]:
        middle = scale * one["latency_ms"]["median"]
        steps = [middle * (1 + spread * (2 * i / (count - 1) - 1)) for i in range(count)]
        one["latency_ms"] = {**one["latency_ms"], "samples": steps}
    return content


@pytest.mark.parametrize(
    ("scale", "spread", "kind"),
    [
        (1.0, 0.0, "same"),
        (1.02, 0.0, "same"),  # below the threshold
        (1.10, 0.01, "slower"),
        (1.10, 0.30, "same"),  # within the noise
        (0.90, 0.01, "faster"),
        (0.90, 0.30, "same"),
    ],
)
def test_only_what_is_beyond_the_noise_is_a_change(scale: float, spread: float, kind: str) -> None:
    found = comparison.changes(with_samples(1.0, spread), with_samples(scale, spread))
    assert {change.kind for change in found[:2]} == {kind}
    assert {change.kind for change in found[2:]} == {"same"}  # never timed


def test_the_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    hits = 0
    for _ in range(1000):
        low, high = comparison.interval(torch.randn(25, generator=generator).exp().tolist())
        hits += low <= 1.0 <= high
    assert 930 <= hits <= 990
    assert comparison.interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_compare_exit_codes(run: Run, tmp_path: Path) -> None:
    def write(name: str, content: dict[str, Any]) -> Path:
        (tmp_path / name).write_text(json.dumps(content))
        return tmp_path / name

    old = write("old.json", with_samples(1.0, 0.01))
    slow = write("slow.json", with_samples(1.2, 0.01))
    broken_content = with_samples(1.0, 0.01)
    broken_content["cases"][0]["candidates"][1] |= {"wrong": True, "latency_ms": None}
    broken = write("broken.json", broken_content)
    other = with_samples(1.0, 0.01)
    other["device"]["name"] = "Another CPU"
    elsewhere = write("elsewhere.json", other)

    code, out, _ = run("bench", "compare", old, old)
    assert (code, out.strip()) == (0, "4 same")
    code, out, _ = run("bench", "compare", old, slow)
    assert code == 1
    assert "2 slower" in out
    assert "1.20" in out
    assert run("bench", "compare", slow, old)[0] == 0
    assert run("bench", "compare", old, slow, "--threshold", 0.25)[0] == 0
    assert run("bench", "compare", old, slow, "--candidate", "absent")[0] == 0
    code, out, _ = run("bench", "compare", old, broken)
    assert code == 1
    assert "fused, resnet50, batch 1, float32, 2 threads: wrong" in out
    assert run("bench", "compare", broken, old)[0] == 0
    predicted = STATIC / "predicted.json"
    for arguments, part in (
        ((old, tmp_path / "none.json"), "none.json cannot be read"),
        ((old, elsewhere), "different devices"),
        ((old, predicted), "must be the same"),
        ((predicted, predicted), "predictions"),
        ((old, old, "--candidate", "nobody"), "nobody"),
        ((old, old, "--threshold", 2), "--threshold"),
    ):
        code, out, err = run("bench", "compare", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), arguments
        assert part in err


@pytest.mark.usefixtures("small")
def test_layers_are_compared_too(run: Run, tmp_path: Path) -> None:
    content = measured({"eager": candidates.eager})
    slower = copy.deepcopy(content)
    (one,) = slower["cases"][0]["layers"][0]["candidates"]
    one["microseconds"]["samples"] = [9 * max(one["microseconds"]["samples"])] * 3
    for name, data in (("a.json", content), ("b.json", slower)):
        (tmp_path / name).write_text(json.dumps(data))
    code, out, _ = run("bench", "compare", tmp_path / "a.json", tmp_path / "b.json")
    assert code == 1
    assert LAYER in out
