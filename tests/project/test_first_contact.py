"""`bench/first_contact.py`, rehearsed without a GPU."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import load_script, processes

import fused_resnet

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
SCRIPT = ROOT / "bench" / "first_contact.py"
# Where the package that is under test lies: a script's own folder comes first on its path.
PACKAGE = str(Path(fused_resnet.__file__).parents[1])


first_contact = load_script(SCRIPT)


def run(folder: Path, *arguments: str, script: Path = SCRIPT) -> tuple[int, str, str]:
    """Exit status, output and errors of a rehearsal."""
    environment = {**processes.current_environment(), "PYTHONPATH": PACKAGE}
    command = [sys.executable, script, str(folder), "--device", "cpu", *arguments]
    return processes.run_command(command, 300, environment, Path.cwd())


Runs = tuple[tempfile.TemporaryDirectory[str], list[tuple[int, str, str]]]


def rehearsed() -> Runs:
    """How two runs ended, in folders of their own: the second goes on after the first."""
    folder = tempfile.TemporaryDirectory()
    first, second = Path(folder.name) / "first", Path(folder.name) / "second"
    only = ("--only", "device|right|self-check|memcheck")
    ended = [run(first, *only)]
    if first.exists():
        shutil.copytree(first, second)
    return folder, [*ended, run(second, *only)]


@pytest.mark.ahead(lambda: rehearsed())
def test_a_rehearsal_and_its_resumption(ahead: Callable[[], Runs]) -> None:
    folder, ((status, out, err), (status_again, *_)) = ahead()
    first, second = Path(folder.name) / "first", Path(folder.name) / "second"
    assert status == 0, out + err
    found = first_contact.read_findings(first)
    assert {(line["step"], line["state"]) for line in found} >= {
        ("device", "note"), ("right", "ok"), ("self-check", "note"), ("memcheck", "skipped"),
    }  # fmt: skip
    judged = [line for line in found if line["step"] == "right" and "error" in line]
    assert len(judged) == 2
    assert all(0 < line["error"] < 1e-5 for line in judged)
    assert "resnet18" in (first / "log.txt").read_text()
    assert len(list(first.iterdir())) <= 8
    assert all(path.is_file() for path in first.iterdir())
    # The same again runs nothing that has ended.
    assert status_again == 0
    after = first_contact.read_findings(second)
    assert after[: len(found)] == found
    steps = [line["step"] for line in after[len(found) :]]
    assert steps == ["memcheck"]


def test_steps_that_crash_hang_or_find_a_fault(tmp_path: Path) -> None:
    """Each costs its own time alone, and what it had found is there."""
    script = tmp_path / "planted.py"
    planted = """
def hangs(found, where):
    found.add("before", "ok")
    time.sleep(600)


def crashes(found, where):
    found.add("wrong", "wrong", 3.0)
    os.kill(os.getpid(), signal.SIGSEGV)


STEPS = (Step("hangs", 1), Step("crashes", 20), Step("right", 20))
RUN = {"hangs": hangs, "crashes": crashes, "right": lambda found, where: found.add("a", "slow", 2)}


if __name__ == "__main__":"""
    script.write_text(SCRIPT.read_text().replace('if __name__ == "__main__":', planted.lstrip()))
    folder = tmp_path / "results"
    status, out, _ = run(folder, script=script)
    assert status == 1
    lines = [(line["step"], line["state"]) for line in first_contact.read_findings(folder)]
    assert lines == [
        ("hangs", "ok"), ("hangs", "failed"), ("crashes", "wrong"), ("crashes", "failed"),
        ("right", "slow"), ("right", "note"),
    ]  # fmt: skip
    text = (folder / "verdict.txt").read_text()
    assert text in out
    first, second, third = text.splitlines()[-3:]
    assert first == "1. wrong: [crashes] wrong"
    assert second.startswith("2. failed: [crashes] ended with exit code -11")
    assert third.startswith("3. failed: [hangs] not done after")


def test_no_time_left(tmp_path: Path) -> None:
    status, out, _ = run(tmp_path, "--total", "1")
    assert status == 1
    assert "device: no time left" in out


def test_half_a_line_is_no_finding(tmp_path: Path) -> None:
    """What a process that was killed left of its last one."""
    first_contact.Findings(tmp_path, "right").add("whole", "ok")
    with (tmp_path / "findings.jsonl").open("a") as file:
        file.write(json.dumps({"step": "right"})[:9])
    assert [line["what"] for line in first_contact.read_findings(tmp_path)] == ["whole"]


def test_steps_fit_the_time_there_is() -> None:
    assert sum(step.seconds for step in first_contact.STEPS) <= 530
    assert {step.name for step in first_contact.STEPS} == first_contact.RUN.keys()


def test_wheels_are_unpacked_without_pip(tmp_path: Path) -> None:
    """What of a wheel is not a package would have to be moved: that is refused."""
    wheel, site = tmp_path / "one-1-py3-none-any.whl", tmp_path / "site"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one/__init__.py", "number = 7\n")
        archive.writestr("one-1.dist-info/METADATA", "Name: one\n")
    first_contact.unpack(wheel, site)
    assert (site / "one" / "__init__.py").read_text() == "number = 7\n"
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("one-1.data/scripts/one", "#!python\n")
    with pytest.raises(ValueError, match=r"has one-1.data/scripts/one, must have nothing but"):
        first_contact.unpack(wheel, site)
