"""Files from elsewhere, full disks, processes side by side, folders with strangers' modules in."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import multiprocessing
import os
import random
import re
import resource
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import PIL.Image
import pytest
import torch
import torchvision
from rich.console import Console
from support import Run, run_python
from support.results import models_document, provenance

from fused_resnet import backends, files
from fused_resnet.cli import bench as bench_cli
from fused_resnet.measure import (
    clock,
    compare,
    documents,
    environment,
    inputs,
    page_plots,
    plot,
    predict,
    resources,
    schemas,
)
from fused_resnet.measure import page as report
from fused_resnet.measure.case import Accuracy, Candidate, Case, Result
from fused_resnet.measure.text import plain, visible

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = "[/red] [bold]:smile: $\\frac{$ \\"


def one_line(result: tuple[int, str, str], code: int = 2) -> str:
    """The message of a command that ended with `code` and said why in one line, nothing else."""
    found, _, err = result
    assert (found, err.count("\n")) == (code, 1), result
    assert err.startswith("fused-resnet: ")
    return err


def kernels_document() -> dict[str, Any]:
    times = {"median": 9.0, "p10": 8.0, "p90": 11.0, "samples": [8.0, 9.0, 11.0]}
    timed = {
        "name": "eager", "status": "timed", "reason": None, "error": 1e-7, "keeps_nan": True,
        "microseconds": times, "gigabytes_per_second": 3.0, "teraflops_per_second": 0.5,
        "roofline": 0.4, "ratio_to_eager": 1.0,
    }  # fmt: skip
    failed = dict.fromkeys(timed) | {"name": "fused, cpu", "status": "failed", "reason": "Why: so"}
    layer = {
        "problem": "float32 1x64x56x56 k64 1x1 s1x1 p0x0 d1x1 g1", "label": "64x56x56 to 64, 1x1",
        "count": 2, "bytes": 10**6, "flops": 10**7, "least_microseconds": 3.0,
        "candidates": [timed, failed],
    }  # fmt: skip
    case = {
        "model": "resnet50", "batch": 1, "dtype": "float32", "device": "cpu", "threads": 2,
        "rounds": 3, "interrupted": False, "telemetry": None, "layers": [layer],
        "mode": "inference",
        "ceilings": {"copy_gigabytes_per_second": 50.0, "teraflops_per_second": 0.3},
    }  # fmt: skip
    return {**provenance(documents.KERNELS, "2026-01-02T00:00:00+00:00"), "cases": [case]}


def unit_document() -> dict[str, Any]:
    """A case of one layer that was measured beside a matrix unit of 6 TFLOP/s."""
    content = kernels_document()
    (case,) = content["cases"]
    unit = {"name": "amx", "teraops_per_second": {"bfloat16": 6.0, "int8": 12.0}, "products": 6}
    case["ceilings"]["matrix_unit"] = unit
    (layer,) = case["layers"]
    layer["unit_microseconds"] = 1e-6 * layer["flops"] / (6.0 / 6)
    for one in layer["candidates"]:
        taken = one["microseconds"]
        one["unit_share"] = layer["unit_microseconds"] / taken["median"] if taken else None
    return content


def test_the_matrix_unit_is_in_tables_pages_and_plots() -> None:
    for content, has_unit in ((unit_document(), True), (kernels_document(), False)):
        (case,) = content["cases"]
        assert schemas.error(content, schemas.KERNELS) is None
        share = 100 * 10 / 9.0  # 10 MFLOP at 1 TFLOP/s, measured in 9 us
        console = Console(width=200, record=True)
        bench_cli._print_layers(console, content, case)
        table = console.export_text()
        assert ("6 TFLOP/s of bfloat16 and 12 TOP/s of int8, 6 products for one of float32"
                in table) == has_unit  # fmt: skip
        assert (f"{share:.0f} %" in table) == has_unit
        tables = report._layer_table(case) + report._summary_table(case)
        assert (f"<td>{share:.0f} %</td>" in tables) == has_unit
        for part in tables.split("<thead>")[1:]:
            head, *rows = part.split("<tr")[1:]
            assert {row.count("<td") for row in rows} == {head.count("<th")}
        figure = page_plots.roofline(case, "title", "caption")
        labels = [line.get_label() for line in figure.axes[0].get_lines()]
        assert any(label.endswith("first-level cache 1000 GFLOP/s") for label in labels) == has_unit
    case["ceilings"]["matrix_unit"] = {"name": "amx", "teraops_per_second": {}, "products": 6}
    assert "bfloat16 is missing" in schemas.error(content, schemas.KERNELS)


def predicted_document() -> dict[str, Any]:
    content = json.loads((ROOT / "bench" / "results" / "static" / "predicted.json").read_text())
    return {**content, "networks": content["networks"][:2], "training": content["training"][:1]}


DOCUMENTS = {
    "models": models_document, "kernels": kernels_document, "predicted": predicted_document,
}  # fmt: skip


# Child processes.


def peak_memory_among_strangers(start: str) -> tuple[int, str]:
    """What `compare` measures in a folder of modules, and what these wrote when they ran."""
    with tempfile.TemporaryDirectory() as folder:
        here, mark = Path(folder) / "here", Path(folder) / "mark"
        here.mkdir()
        for name in ("json", "importlib", "fused_resnet", "sitecustomize", "copy"):
            (here / f"{name}.py").write_text(f"open({str(mark)!r}, 'a').write('{name} ran')\n")
        peak = peak_memory_in(here, start)
        return peak, mark.read_text() if mark.exists() else ""


def peak_memory_in(here: Path, start: str) -> int:
    where = {
        "script": None,
        "module": "sys.path.insert(0, '')",
        "PYTHONPATH": "sys.path.insert(0, os.getcwd())",
    }[start]
    program = f"""
        import os, sys, torch
        from fused_resnet.measure import compare
        from fused_resnet.measure.case import Case
        {where or ""}
        torch.set_num_threads(1)
        os.chdir({str(here)!r})
        case = Case("resnet18", threads=1)
        print(compare._peak_memory("fused", case))
    """
    return int(run_python(program))


@pytest.mark.parametrize("start", ["script", "module", "PYTHONPATH"])
@pytest.mark.ahead(lambda start: peak_memory_among_strangers(start))
def test_no_child_imports_from_the_current_folder(
    ahead: Callable[[], tuple[int, str]], start: str
) -> None:
    """`compare` measures memory in a child; a json.py, say, in the folder it runs in is not run."""
    peak, ran = ahead()
    assert not ran
    assert 2**20 < peak < 2**30


def peak_memory_of_a_link() -> int:
    """What `compare` measures where the current folder has the package."""
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "fused_resnet"
        link.symlink_to(Path(compare.__file__).parents[1])
        program = f"""
            import os, sys
            os.chdir({folder!r})
            sys.path.insert(0, os.getcwd())
            import fused_resnet
            from fused_resnet.measure import compare
            from fused_resnet.measure.case import Case
            assert os.path.dirname(fused_resnet.__file__) == {str(link)!r}
            print(compare._peak_memory("eager", Case("resnet18", threads=1)))
        """
        return int(run_python(program))


@pytest.mark.ahead(lambda: peak_memory_of_a_link())
def test_the_child_finds_the_package_in_the_current_folder(ahead: Callable[[], int]) -> None:
    """As where one works in a checkout: there, or by PYTHONPATH or an importer, is the package."""
    assert ahead() > 2**20


@pytest.mark.parametrize("path", ["fused_resnet", "bench", "examples", "build_support", "setup.py"])
def test_every_python_child_is_isolated(path: str) -> None:
    """Whatever starts an interpreter gives it -I."""
    where = ROOT / path
    for source in [where] if where.is_file() else sorted(where.rglob("*.py")):
        for command in re.findall(r"\[\s*sys\.executable\s*,[^\]]*", source.read_text()):
            assert '"-I"' in command, (source, command)


def test_git_runs_nothing_of_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its configuration may name a program that `git status` runs; results name the commit."""
    (tmp_path / "csrc").mkdir()
    mark = tmp_path / "mark"
    hook = tmp_path / "hook.sh"
    hook.write_text(f"#!/bin/sh\ntouch {mark}\n")
    hook.chmod(0o755)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "a"]):
        subprocess.run([*git, *command], check=True)
    subprocess.run([*git, "config", "core.fsmonitor", str(hook)], check=True)
    assert environment.commit(tmp_path)
    assert not mark.exists()


# Writing.


def _add_many(path: Path, first: int, count: int) -> None:
    for batch in range(first, first + count):
        content = models_document()
        content["cases"][0]["batch"] = batch
        content["command"] = f"command {batch}"
        documents.add(content, path)


def test_processes_that_add_to_one_file_keep_every_case(tmp_path: Path) -> None:
    path, processes, each = tmp_path / "new" / "a.json", 4, 10
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_add_many, args=(path, 1 + index * each, each))
        for index in range(processes)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        for child in children:
            child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    content = documents.load(path)
    wanted = range(1, 1 + processes * each)
    assert sorted(case["batch"] for case in content["cases"]) == list(wanted)
    assert sorted(content["command"].split(" && ")) == sorted(f"command {b}" for b in wanted)
    assert {file.name for file in path.parent.iterdir()} == {"a.json", ".lock"}


def _without(content: dict[str, Any], *keys: Any) -> str:
    content = copy.deepcopy(content)
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return json.dumps(content)


UNUSABLE = {
    "empty": "",
    "truncated": json.dumps(models_document())[:-40],
    "of another schema": '{"schema": "other/1", "cases": [1]}',
    "of layers": json.dumps(kernels_document()),
    "without a commit": _without(models_document(), "commit"),
    "without candidates": _without(models_document(), "cases", 0, "candidates"),
    "not finite": json.dumps(models_document(fused_ms=math.inf)),
    "of bytes": b"\xff\xfe",
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_results_are_kept_beside_a_file_that_cannot_be_added_to(what: str, tmp_path: Path) -> None:
    path, text = tmp_path / "a.json", UNUSABLE[what]
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(data)
    for batch in (1, 8):
        content = models_document()
        content["cases"][0]["batch"] = batch
        place, why = documents.add(content, path)
        assert place == tmp_path / "a-2.json"
        assert str(path) in why
        assert "\n" not in why
    assert path.read_bytes() == data
    kept = documents.load(tmp_path / "a-2.json")
    assert [case["batch"] for case in kept["cases"]] == [1, 8]


def test_the_command_says_where_its_results_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = models_document()
    path = documents.default_path(content, tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    monkeypatch.setattr(documents, "repository", lambda: tmp_path)
    out = io.StringIO()
    bench_cli._keep(Console(file=out, width=10_000), content, None)
    damaged, wrote = out.getvalue().splitlines()
    assert damaged.startswith(f"{path} is no JSON")
    assert wrote == f"wrote {path.with_name(path.stem + '-2.json')}"


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Every file ends after some bytes, as where a disk is full; EFBIG stands for ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_compare_on_a_full_disk(
    option: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case("resnet18", threads=1)
    latency = clock.Latency((1.0, 2.0, 3.0))
    row = Candidate(
        "eager", latency=latency, accuracy=Accuracy(1e-7, None, 1.0), ratio_to_eager=1.0
    )
    result = Result(case, 1, (row,), (), False, {})
    monkeypatch.setattr(compare, "compare", lambda case, progress: result)
    path = tmp_path / ("a.json" if option == "--json" else "a.png")
    path.write_text("old")
    arguments = ("compare", "resnet18", option, path)
    assert run(*arguments)[0] == 0
    path.write_text("old")
    with full_disk():
        found = run(*arguments)
    assert f"{path} cannot be written: File too large" in one_line(found)
    assert "resnet18, batch 1" in found[1]  # what was measured is shown
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("what", ["page", "plots", "static"])
def test_bench_on_a_full_disk(
    what: str,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, output = tmp_path / "a.json", tmp_path / "out" / "report.html"
    output.parent.mkdir()
    source.write_text(json.dumps(models_document()))
    monkeypatch.setattr(report, "figures", lambda content: [("plot", b"0" * 1000)])
    arguments: tuple[object, ...] = ("report", source, "--output", output)
    if what == "plots":
        arguments = (*arguments, "--plots", tmp_path / "out")
        monkeypatch.setattr(report, "_page", lambda body: "")
    if what == "static":
        monkeypatch.setattr(predict, "document", lambda models, batches: predicted_document())
        arguments = ("static", "--model", "resnet18", "--batch", 1, "--json", output)
    with full_disk():
        found = run("bench", *arguments)
    assert "cannot be written: File too large" in one_line(found)
    left = ["report.html"] if what == "plots" else []
    assert [file.name for file in output.parent.iterdir()] == left


def test_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    link.symlink_to(path)
    files.replace(link, b"one")
    assert (link.is_symlink(), path.read_bytes()) == (True, b"one")
    for error in (OSError(28, os.strerror(28)), KeyboardInterrupt()):

        def fail(handle: int, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(files.os, "fsync", fail)
        with pytest.raises(type(error)):
            files.replace(path, b"two")
        monkeypatch.undo()
    assert path.read_bytes() == b"one"
    assert {file.name for file in tmp_path.iterdir()} == {"a", "link"}
    # What is no file is written to, not replaced.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    files.replace(pipe, b"three")
    assert os.read(reader, 10) == b"three"
    os.close(reader)
    assert pipe.is_fifo()


# Reading.


def _mutated(content: Any, draw: random.Random) -> Any:
    """The same content with one to three values replaced, removed, moved or nested."""
    content = copy.deepcopy(content)
    for _ in range(draw.randint(1, 3)):
        places = list(_places(content))
        holder, key = draw.choice(places)
        nested: Any = 1
        for _ in range(draw.choice([2, 40, 200])):
            nested = [nested]
        value = draw.choice(
            [
                None, True, 0, -1, 1, 2**70, 10**400, 1e308, 5e-324, 1.5, math.nan, -math.inf, "",
                "x", HOSTILE, "\x1b[31m", "\ud800", "a\nb", "x" * 5000, [], {}, [[]], [None],
                {"name": 1}, nested, holder[key], draw.choice(places)[0],
            ]
        )  # fmt: skip
        if isinstance(holder, dict) and draw.random() < 0.3:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(value)
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from _places(inner)


@pytest.mark.parametrize("kind", DOCUMENTS)
@pytest.mark.single
def test_mutated_files_are_read_or_refused_in_one_line(
    kind: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drawing takes a second a picture; below, some pictures of hostile names are drawn.
    monkeypatch.setattr(report, "figures", lambda content: [(report.where(content), b"")])
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    content = DOCUMENTS[kind]()
    good.write_text(json.dumps(content))
    draw, refused = random.Random(kind), 0
    for _ in range(40):
        text = json.dumps(_mutated(content, draw))
        if draw.random() < 0.1:
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice(["", "[" * 10_000, "}", "\x00"]) + text[at + 1 :]
        bad.write_text(text, errors="surrogatepass")
        result = run("bench", "report", bad, "--output", tmp_path / "a.html")
        refused += result[0] != 0
        for found in (
            result,
            run("bench", "compare", good, bad),
            run("bench", "compare", bad, good),
        ):
            assert found[0] in (0, 1, 2), found
            if found[0] == 2:
                one_line(found)
            else:
                assert found[2] == "", found
    assert 10 < refused < 40


def test_what_a_file_must_hold_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    content = models_document()
    content["cases"][0]["batch"] = 0
    for text, what in (
        (json.dumps(content), "cases[0].batch is 0, must be a whole number of at least 1"),
        (_without(models_document(), "device", "name"), "device.name is missing"),
        (json.dumps({**models_document(), "more": float("nan")}), "NaN is no number"),
        (
            json.dumps({**models_document(), "more": 0}).replace('"more": 0', '"more": 1e999'),
            "finite",
        ),
        (json.dumps({**models_document(), "more": json.loads("[" * 60 + "]" * 60)}), "deeper than"),
        ("[" * 100_000, "no JSON"),
        ("9" * 5000, "no JSON"),
    ):
        path.write_text(text)
        with pytest.raises(inputs.InvalidArgumentError, match=re.escape(what)) as caught:
            documents.load(path)
        assert str(path) in str(caught.value)


def test_every_result_file_of_the_repository_is_read() -> None:
    for path in sorted((ROOT / "bench" / "results").glob("*/*.json")):
        content = json.loads(path.read_text())
        if content.get("schema") in (documents.MODELS, documents.KERNELS, documents.PREDICTED):
            assert documents.load(path)["schema"] == content["schema"]
        elif content.get("schema") == resources.SCHEMA:
            assert resources.load_resources(path) == content


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": "fused_resnet.static/1"}', "[" * 9999])
def test_resources_that_are_none_get_one_line(
    text: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(predict, "document", lambda models, batches: predicted_document())
    path = tmp_path / "a.json"
    path.write_text(text)
    arguments = ("--model", "resnet18", "--batch", 1, "--resources", path)
    assert "a.json" in one_line(run("bench", "static", *arguments))
    entries = [{"kernel": HOSTILE, "architecture": "[/]", "dtype": "[red]"}]
    path.write_text(json.dumps({"schema": resources.SCHEMA, "entries": entries}))
    code, out, _ = run("bench", "static", *arguments)
    assert code == 0
    assert "[/red]" in out


# Names that are no markup, no formulas, and no commands to a terminal.


def hostile(content: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(content)
    escaped = json.dumps(HOSTILE)[1:-1]
    for name in (
        "resnet50",
        "fused",
        "eager",
        "Some CPU",
        "Why: so",
        "64x56x56 to 64, 1x1",
        "A100",
    ):
        text = text.replace(f'"{name}', f'"{escaped}{name}')
    text = text.replace(escaped + "fused_resnet.", "fused_resnet.")
    renamed = json.loads(text)
    for network in renamed.get("networks", []) + renamed.get("training", []):
        for field in ("microseconds", "megabytes_per_image"):
            network[field] = {key.replace(HOSTILE, ""): v for key, v in network[field].items()}
    return renamed


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_names_are_shown_as_they_are(kind: str, run: Run, tmp_path: Path) -> None:
    path, slower = tmp_path / "a.json", tmp_path / "b.json"
    content = hostile(DOCUMENTS[kind]())
    path.write_text(json.dumps(content))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code, _, err = run("bench", "report", path, "--output", tmp_path / "a.html")
    assert (code, err) == (0, "")
    page = (tmp_path / "a.html").read_text()
    assert "[/red] [bold]:smile: $\\frac{$" in page
    if kind == "predicted":
        return
    for case in content["cases"]:
        for one in [
            *case.get("candidates", ()),
            *(layer["candidates"] for layer in case.get("layers", ())),
        ]:
            for timed in one if isinstance(one, list) else [one]:
                times = timed.get("latency_ms") or timed.get("microseconds")
                if times:
                    times["samples"] = [9 * sample for sample in times["samples"]]
    slower.write_text(json.dumps(content))
    code, out, _ = run("bench", "compare", path, slower)
    assert code == 1
    assert "[/red]" in out
    assert ":smile:" in out


def test_tables_show_names_as_they_are() -> None:
    out = io.StringIO()
    wide = Console(file=out, width=500)
    content = hostile(kernels_document())
    for case in content["cases"]:
        bench_cli._print_layers(wide, content, case)
    for case in hostile(models_document())["cases"]:
        case["candidates"][-1]["skipped"] = "\x1b[2J" + HOSTILE
        bench_cli._print_model(wide, case)
    text = out.getvalue()
    assert text.count("[/red] [bold]:smile: $\\frac{$ \\eager") == 3  # twice layers, once models
    assert "\x1b" not in text
    assert "\\x1b[2J[/red]" in text


def test_text_in_one_line() -> None:
    assert visible("a\nb\x1b[0m\ud800\u2028é漢") == "a\\nb\\x1b[0m\\ud800\\u2028é漢"
    assert plain(HOSTILE).plain == HOSTILE


def test_the_plot_of_a_comparison_takes_any_name(tmp_path: Path) -> None:
    content = hostile(models_document())
    plot.draw(content, tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG"
    for figure in (
        page_plots.model_speedups(content["cases"], HOSTILE, HOSTILE),
        page_plots.roofline(hostile(kernels_document())["cases"][0], HOSTILE, HOSTILE),
        page_plots.layer_shares(hostile(kernels_document())["cases"][0], HOSTILE, HOSTILE),
    ):
        assert page_plots.png(figure)
        for text in figure.findobj(matplotlib.text.Text):
            assert not (text.get_parse_math() and "frac" in text.get_text())


def test_what_cannot_be_drawn_is_one_line(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(figure: object) -> bytes:
        raise ValueError("Image size of 1350x990180 pixels is too large.")

    monkeypatch.setattr(page_plots, "png", too_large)
    path = tmp_path / "a.json"
    path.write_text(json.dumps(models_document()))
    found = run("bench", "report", path, "--output", tmp_path / "a.html")
    assert "a.json cannot be drawn: Image size" in one_line(found)
    assert not (tmp_path / "a.html").exists()


# Images and checkpoints.


def test_images_that_would_fill_the_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    for size in ((1, 20_000), (20_000, 1), (101, 1)):
        PIL.Image.new("L", size).save(path)
        with pytest.raises(inputs.InvalidArgumentError, match=f"{size[0]}x{size[1]} pixels, must"):
            inputs.load_image(path)
    PIL.Image.new("L", (100, 1)).save(path)
    assert inputs.build_input("resnet18", [str(path)], 2, 0).shape == (2, 3, 224, 224)
    # Warned of, and refused, by Pillow.
    for most in (5000, 9999):
        monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", most)
        PIL.Image.new("L", (100, 150 if most == 5000 else 100)).save(path)
        with pytest.raises(inputs.InvalidArgumentError, match="not readable: Image size"):
            inputs.load_image(path)


def bad_checkpoints() -> dict[str, tuple[Any, str]]:
    state = torchvision.models.resnet18(num_classes=3).state_dict()
    weight = state["fc.weight"]
    return {
        "a scalar": ({**state, "fc.weight": torch.tensor(1.0)}, "fc.weight has shape ()"),
        "an expanded one": ({**state, "fc.weight": weight[:1].expand(2**40, 512)}, "not all in"),
        "no column": ({**state, "fc.weight": torch.empty(2**40, 0)}, "fc.weight has shape"),
        "no row": ({**state, "fc.weight": weight[:0]}, "fc.weight has shape (0, 512)"),
        "a sparse one": ({**state, "fc.weight": weight.to_sparse()}, "not all in"),
        "a number as key": ({**state, 7: weight}, "the key 7"),
        "a tuple as key": ({"state_dict": {**state, (1, 2): weight}}, "the key (1, 2)"),
        "text as value": ({**state, "conv1.weight": "text"}, "conv1.weight"),
        "another shape": ({**state, "conv1.weight": weight}, "conv1.weight"),
    }


def test_checkpoints_that_cannot_be_loaded_get_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for what, (state, part) in bad_checkpoints().items():
        torch.save(state, path)
        with pytest.raises(inputs.InvalidArgumentError) as caught:
            inputs.build_model("resnet18", str(path), 0)
        assert part in str(caught.value), what
        assert "\n" not in str(caught.value)
    good = torchvision.models.resnet18(num_classes=3).state_dict()
    torch.save(good, path)
    model = inputs.build_model("resnet18", str(path), 0)
    assert torch.equal(model.fc.weight, good["fc.weight"])


# The environment.


@pytest.mark.parametrize("value", ["avx2", "AVX2", "None", "avx512", ""])
@pytest.mark.ahead(
    lambda value: run_python(
        "from fused_resnet import backends; print(backends.cpu_isa())", FUSED_RESNET_CPU_ISA=value
    )
)
def test_the_instruction_set_in_any_case(ahead: Callable[[], str], value: str) -> None:
    """It is at most what is asked for: "baseline" processors have less."""
    out = ahead().strip()
    order = ["none", "avx2", "avx512"]
    best = out if value in ("", "avx512") else backends.cpu_isa()
    wanted = min(order.index(value.lower() or "avx512"), order.index(best))
    if not os.environ.get("FUSED_RESNET_CPU_ISA"):
        assert out == order[wanted]


def test_an_unknown_instruction_set_is_an_error() -> None:
    out = run_python(
        """
        import torch, fused_resnet, support
        from fused_resnet import backends, cli
        for backend in (None, "cpu"):
            try:
                with backends.use_backend(backend) if backend else torch.no_grad():
                    support.make_conv_case(support.ConvShape(4, 4, (1, 1))).fused()
            except (ValueError, RuntimeError) as error:
                print("raised", error)
        for arguments in (["doctor"], ["compare", "resnet18"]):
            cli.sys.argv[1:] = arguments
            try:
                cli.main()
            except SystemExit as end:
                print("ended", end.code)
        """,
        FUSED_RESNET_CPU_ISA="avx3",
    )
    message = (
        "FUSED_RESNET_CPU_ISA is 'avx3', must be one of none, avx2, avx512, avx512bf16, "
        "avx512bf16_emulated, amx, amx_emulated"
    )
    assert out.count(f"raised {message}") == 2
    assert message in " ".join(out.split())
    assert re.findall(r"ended (\d+)", out) == ["0", "2"]


def test_backends_in_any_case() -> None:
    out = run_python("from fused_resnet import backends; print(backends.choose('cpu').name)",
                     FUSED_RESNET_BACKEND="Reference")  # fmt: skip
    assert out.strip() == "reference"


def test_every_environment_variable_is_documented() -> None:
    table = (ROOT / "docs" / "environment.md").read_text()
    sources = [*ROOT.glob("fused_resnet/**/*.py"), *ROOT.glob("csrc/**/*.cpp")]
    sources += ROOT.glob("build_support/*.py")
    found = set()
    for source in sources:
        text = source.read_text()
        found |= set(re.findall(r"(?:environ\.get\(|environ\[|getenv\()\s*\"(\w+)\"", text))
    assert {"FUSED_RESNET_BACKEND", "FUSED_RESNET_CPU_ISA", "FUSED_RESNET_CUDA"} <= found
    for name in sorted(found - {"PATH"}):
        assert f"`{name}" in table, name
