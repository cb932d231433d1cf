"""The page and the README: made from the newest files, and nothing typed by hand."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support import Run
from support.results import ROOT, STATIC, measured, models_document
from support.results_schema import check_document

from fused_resnet.measure import (
    candidates,
    documents,
    predict,
)
from fused_resnet.measure import page as report


@pytest.fixture
def readme_report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script bench/write_readme.py."""
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("write_readme")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """A file of each kind, with names that HTML must escape."""
    sample = {"eager": candidates.eager, "<b>&": candidates.eager, "fused, cpu": _fails}
    contents = {
        "kernels": measured(sample),
        "models": models_document(),
        "predicted": predict.document(("resnet50",), (32,)),
    }
    paths = []
    for name, content in contents.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(content))
    return paths


def _fails(*arguments: object) -> candidates.Call:
    raise RuntimeError("<no kernel>")


@pytest.mark.usefixtures("small")
def test_report_is_one_page_that_needs_nothing_else(
    run: Run, files: list[Path], tmp_path: Path
) -> None:
    page, plots = tmp_path / "report.html", tmp_path / "plots"
    code, _, err = run("bench", "report", *files, "--output", page, "--plots", plots)
    assert code == 0, err
    text = page.read_text()
    assert not re.search(r"https?:|//|url\(|<script|<link|@import", _without_images(text))
    assert re.findall(r'src="([a-z:/]+)', text) == ["data:image/png"] * text.count("<img")
    assert "<b>" not in text
    assert "&lt;no kernel&gt;" in text
    assert "wrong, not timed" in text
    assert "fused takes 50 ms, 2.00 times as fast as eager." in text
    assert "ImportError: nothing there" in text
    assert text.count("These are predictions") == 1
    for content in map(documents.load, files):
        if "device" in content:
            assert content["device"]["name"] in text
            assert content["date"][:10] in text
    drawn = sorted(path.name for path in plots.iterdir())
    kinds = ("roofline", "shares", "speed-up")
    layers = [f"kernels-resnet50-batch-1-float32-{kind}.png" for kind in kinds]
    assert drawn == [*layers, "models-memory.png", "models-speed-up.png", "predicted-resnet50.png"]
    assert text.count("<img") == len(drawn)

    # The same data gives the same bytes.
    again = tmp_path / "again.html"
    assert run("bench", "report", *files, "--output", again)[0] == 0
    assert again.read_text() == text


def _without_images(text: str) -> str:
    return re.sub(r'src="data:[^"]*"', "", text)


@pytest.mark.usefixtures("small")
def test_report_without_matplotlib_says_what_to_install(
    run: Run, files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "fused_resnet.measure.page_plots", raising=False)
    monkeypatch.delattr(
        importlib.import_module("fused_resnet.measure"), "page_plots", raising=False
    )
    page = tmp_path / "report.html"
    code, _, err = run("bench", "report", files[1], "--output", page)
    assert (code, err.count("\n")) == (2, 1)
    assert 'pip install "fused_resnet[bench]"' in err
    assert not page.exists()


def test_report_finds_the_repositorys_newest_files() -> None:
    found = report.default_files()
    assert STATIC / "predicted.json" in found
    assert any(path.parent.name != "static" for path in found)


def test_documents_match_the_data(readme_report: Any) -> None:
    for path, text in readme_report.written().items():
        document = path.read_text()
        assert readme_report.rewritten(document, text()) == document, path


def test_readme_is_short_and_links_to_what_is_there(readme_report: Any) -> None:
    readme = readme_report.README.read_text()
    assert len(readme.splitlines()) <= 130
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme)
    assert "docs/how_it_works.md" in links
    for path in links:
        assert (readme_report.ROOT / path).exists(), path


@pytest.mark.usefixtures("small")
def test_readme_is_made_from_the_newest_files(readme_report: Any, tmp_path: Path) -> None:
    results = tmp_path / "bench" / "results"
    (results / "some-cpu").mkdir(parents=True)
    for name, date, fused_ms in (
        ("b", "2026-01-02T00:00:00+00:00", 60.0),
        ("a", "2026-02-01T00:00:00+00:00", 50.0),
    ):
        content = models_document(date, fused_ms)
        check_document(content)
        (results / "some-cpu" / f"{name}.json").write_text(json.dumps(content))
    # The newest with training, though another file is newer.
    trained = models_document("2026-01-03T00:00:00+00:00", 70.0)
    trained["cases"][0]["mode"] = "training"
    for one in trained["cases"][0]["candidates"]:
        if not one["skipped"]:
            one |= {"gradient_error": 4e-6, "kept_bytes": None if one["wrong"] else 9 * 2**20}
    check_document(trained)
    (results / "some-cpu" / "c.json").write_text(json.dumps(trained))
    layers = measured({"eager": candidates.eager, "fused, cpu": _fails})
    (results / "some-cpu" / "a-kernels.json").write_text(json.dumps(layers))
    headline = readme_report.headline(results)
    assert "Some CPU, 2 threads, torch 2, commit abc, 2026-02-01" in headline
    assert "| resnet50, batch 1, float32 | 100.0 (1.00) | **50.0 (0.50)** |" in headline
    assert "training step" not in headline
    assert "60.0" not in headline
    assert "divided by eager's" not in headline
    # A device that more was measured on has the table, though it is older.
    other = models_document("2026-01-01T00:00:00+00:00", 40.0)
    other["device"]["name"] = "Other CPU"
    other["cases"].append({**other["cases"][0], "batch": 8})
    (results / "other-cpu").mkdir()
    (results / "other-cpu" / "a.json").write_text(json.dumps(other))
    headline = readme_report.headline(results)
    assert headline.startswith("**Other CPU, 2 threads")
    assert "| resnet50, batch 8, float32 | 100.0 (1.00) | **40.0 (0.40)** |" in headline
    assert "2026-02-01**, divided by eager's: resnet50, batch 1, float32: fused 0.50." in headline
    assert "batch 1, float32 | 100.0 (1.00) | **50.0 (0.50)** |" not in headline
    figure = tmp_path / "figure.png"
    readme_report.draw_headline(figure, results)
    assert figure.read_bytes().startswith(b"\x89PNG")
    text = readme_report.measured(results, tmp_path)
    assert (
        "| resnet50, batch 1, float32 | 100.0 (1.00) | **50.0 (0.50)** | wrong result | - |" in text
    )
    assert "3.0e-03 (wrong)" in text
    assert "absent, float32: not run (ImportError: nothing there)." in text
    assert "Some CPU, 2 threads, torch 2, commit abc, 2026-02-01" in text
    assert "bench/results/some-cpu/a.json" in text
    assert "60.0" not in text
    assert "float32, training step | 100.0 (1.00) | **70.0 (0.70)** | wrong result | - |" in text
    assert "| resnet50, batch 1, float32, training step | 9.0 | 9.0 | - | - |" in text
    assert "Relative error of the gradients" in text
    assert "4.0e-06" in text
    assert "Layer by layer" in text
    assert "not all ran" in text


def test_readme_without_markers_is_refused(readme_report: Any) -> None:
    text = f"before {readme_report.BEGIN} old {readme_report.END} after"
    wanted = f"before {readme_report.BEGIN}\n\nnew\n\n{readme_report.END} after"
    assert readme_report.rewritten(text, "new") == wanted
    for readme in ("", readme_report.BEGIN, f"{readme_report.END} {readme_report.BEGIN}", 2 * text):
        with pytest.raises(ValueError, match="README"):
            readme_report.rewritten(readme, "new")


def test_readme_check_exits_on_a_difference(
    readme_report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(readme_report, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme_report, "FIGURE", tmp_path / "docs" / "latency.png")
    for document in readme_report.written():
        document.write_text(f"{readme_report.BEGIN} stale {readme_report.END}")
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    with pytest.raises(SystemExit, match="differs"):
        readme_report.main()
    monkeypatch.setattr(sys, "argv", ["report.py"])
    readme_report.main()
    monkeypatch.setattr(sys, "argv", ["report.py", "--check"])
    readme_report.main()
