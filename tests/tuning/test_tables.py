"""Tables on disk: round trips, many writers at once, damage, what cannot be read or written."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.threads import run_in_threads
from support.tuning import GPU, LIBRARY_ENTRY, SMALL, STEM, document, model_problems, problems

from fused_resnet import tuning
from fused_resnet.tuning import (
    ConvProblem,
    Tile,
    architecture,
    table,
)
from fused_resnet.tuning.problem import parse_problem

pytestmark = pytest.mark.quick


ENTRY = table.Entry(
    "triton", Tile(128, 64, 64, 2, 4, 3), 12.5, 14.0, 20.25, "2026-11-23", "torch 2"
)


def quiet(call: Callable[[], object]) -> object:
    """The call's result; fails if it warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


def test_table_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "gpu.json"
    assert quiet(lambda: table.read(path)) == {}
    table.merge(path, GPU, {STEM: LIBRARY_ENTRY})
    table.merge(path, GPU, {SMALL: ENTRY})
    assert quiet(lambda: table.read(path)) == {SMALL: ENTRY, STEM: LIBRARY_ENTRY}
    changed = dataclasses.replace(ENTRY, microseconds=11.0)
    table.merge(path, GPU, {SMALL: changed})
    assert table.read(path) == {SMALL: changed, STEM: LIBRARY_ENTRY}
    assert json.loads(path.read_text())["gpu"] == GPU
    assert {file.name for file in path.parent.iterdir()} == {"gpu.json", "gpu.json.lock"}


def test_table_is_for_people(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    table.merge(path, GPU, {STEM: LIBRARY_ENTRY, SMALL: ENTRY})
    lines = path.read_text().splitlines()
    assert lines[1:3] == ['"format": "fused_resnet.tuning/1",', f'"gpu": "{GPU}",']
    (line,) = (line for line in lines if SMALL.key in line)
    assert '"kernel": "triton"' in line
    assert '"block_m": 128' in line
    assert '"microseconds": 12.5' in line
    # Whatever the order of writing, the same file.
    other = tmp_path / "other.json"
    table.merge(other, GPU, {SMALL: ENTRY})
    table.merge(other, GPU, {STEM: LIBRARY_ENTRY})
    assert other.read_text() == path.read_text()


@given(found=st.lists(problems(), max_size=5))
@settings(max_examples=20)
def test_any_problems_can_be_kept(found: list[ConvProblem], tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.unlink(missing_ok=True)
    table.merge(path, GPU, dict.fromkeys(found, ENTRY))
    assert table.read(path) == dict.fromkeys(found, ENTRY)


def _write_many(path: Path, first: int, count: int) -> None:
    for N in range(first, first + count):
        table.merge(path, GPU, {dataclasses.replace(SMALL, N=N): ENTRY})


def test_many_processes_write_at_once(tmp_path: Path) -> None:
    path, processes, each = tmp_path / "gpu.json", 8, 12
    fork = multiprocessing.get_context("fork")
    children = [
        fork.Process(target=_write_many, args=(path, 1 + index * each, each))
        for index in range(processes)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads
        for child in children:
            child.start()
    seen = 0
    while any(child.is_alive() for child in children):
        now = len(quiet(lambda: table.read(path)))  # never damaged, never fewer
        assert now >= seen
        seen = now
        time.sleep(0.01)
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert {problem.N for problem in table.read(path)} == set(range(1, 1 + processes * each))
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.json.lock"}


def test_many_threads_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    run_in_threads(lambda index: _write_many(path, 1 + 5 * index, 5), 6)
    assert {problem.N for problem in table.read(path)} == set(range(1, 31))


def _hold_lock(path: Path, ready: object) -> None:
    with table._locked(path):
        ready.set()
        time.sleep(60)


def test_a_killed_process_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    fork = multiprocessing.get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=_hold_lock, args=(path, ready))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        child.start()
    assert ready.wait(30)
    monkeypatch.setattr(table, "LOCK_TIMEOUT", 0.05)
    with pytest.raises(table.TableError, match="its lock was taken"):
        table.merge(path, GPU, {SMALL: ENTRY})
    monkeypatch.undo()
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    table.merge(path, GPU, {SMALL: ENTRY})
    assert table.read(path) == {SMALL: ENTRY}


def bad_lines() -> list[object]:
    good = {"kernel": "triton", "tile": dataclasses.asdict(ENTRY.tile), "microseconds": 1.0}
    tile = good["tile"]
    return [
        None,
        [],
        {},
        {**good, "kernel": "magic"},
        {**good, "kernel": "library"},
        {**good, "tile": None},
        {**good, "tile": [1, 2]},
        {**good, "tile": {**tile, "block_m": -128}},
        {**good, "tile": {**tile, "block_m": 1.5}},
        {**good, "tile": {**tile, "split_k": True}},
        {**good, "tile": {**tile, "more": 1}},
        {**good, "microseconds": "fast"},
        {**good, "microseconds": 0},
        {**good, "microseconds": math.nan},
        {**good, "surprise": 1},
    ]


DAMAGED = [
    b"",
    b"\x00\xff\xfe",
    b"[1, 2]",
    b"null",
    document().encode()[:-20],
    document(format=7).encode(),
    document(gpu=None).encode(),
    document(choices=[]).encode(),
    document(choices={"nonsense": {"kernel": "library", "microseconds": 3.0}}).encode(),
    b"[" * 100_000,
]


@pytest.mark.parametrize("content", DAMAGED, ids=range(len(DAMAGED)))
def test_damage_is_reported_once_and_set_aside(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_bytes(content)
    with pytest.warns(UserWarning, match=f"{path} is damaged .*gpu.json.damaged-1") as caught:
        assert table.read(path) == {}
    assert len(caught) == 1
    assert (tmp_path / "gpu.json.damaged-1").read_bytes() == content
    assert quiet(lambda: table.read(path)) == {}
    quiet(lambda: table.merge(path, GPU, {SMALL: ENTRY}))
    assert table.read(path) == {SMALL: ENTRY}
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged-2"):
        table.merge(path, GPU, {STEM: ENTRY})
    assert table.read(path) == {STEM: ENTRY}
    assert (tmp_path / "gpu.json.damaged-2").read_bytes() == content


@pytest.mark.parametrize("line", bad_lines(), ids=range(len(bad_lines())))
def test_one_bad_line_costs_no_other(line: object, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    good = {STEM.key: {"kernel": "library", "microseconds": 3.0}}
    path.write_text(document(choices={SMALL.key: line, **good}))
    with pytest.warns(UserWarning, match="is damaged"):
        assert table.read(path) == {STEM: LIBRARY_ENTRY}
    assert quiet(lambda: table.read(path)) == {STEM: LIBRARY_ENTRY}


def test_another_format_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    text = document(format="fused_resnet.tuning/2")
    path.write_text(text)
    with pytest.warns(UserWarning, match="'fused_resnet.tuning/2'.*'fused_resnet.tuning/1'"):
        assert table.read(path) == {}
    with pytest.raises(table.TableError, match="is not written to: its format"):
        table.merge(path, GPU, {SMALL: ENTRY})
    assert path.read_text() == text
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.json.lock"}


def test_another_gpus_table_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    table.merge(path, GPU, {SMALL: ENTRY})
    with pytest.raises(table.TableError, match=f"'{GPU}'.*'NVIDIA B200'"):
        table.merge(path, "NVIDIA B200", {STEM: ENTRY})
    assert table.read(path) == {SMALL: ENTRY}


def test_a_full_disk_leaves_what_there_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    table.merge(path, GPU, {SMALL: ENTRY})

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(table.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        table.merge(path, GPU, {STEM: ENTRY})
    monkeypatch.undo()
    assert table.read(path) == {SMALL: ENTRY}
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.json.lock"}


def test_an_interrupted_write_leaves_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gpu.json"
    table.merge(path, GPU, {SMALL: ENTRY})

    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(table.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        table.merge(path, GPU, {STEM: ENTRY})
    monkeypatch.undo()
    assert table.read(path) == {SMALL: ENTRY}
    assert {file.name for file in tmp_path.iterdir()} == {"gpu.json", "gpu.json.lock"}


def read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be opened for writing or renamed. Modes would not stop tests run as root."""
    original = open

    def refuse(*arguments: object, **named: object) -> object:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def reading(file: object, mode: str = "r", *rest: object, **named: object) -> object:
        return refuse() if set(mode) & set("wax+") else original(file, mode, *rest, **named)

    monkeypatch.setattr("builtins.open", reading)
    monkeypatch.setattr(table.os, "replace", refuse)


def test_read_only_folders_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, damaged = tmp_path / "gpu.json", tmp_path / "damaged.json"
    table.merge(path, GPU, {SMALL: ENTRY})
    damaged.write_text(
        document(choices={SMALL.key: 1, STEM.key: json.loads(document())["choices"][STEM.key]})
    )
    read_only(monkeypatch)
    assert quiet(lambda: table.read(path)) == {SMALL: ENTRY}
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert table.read(damaged) == {STEM: LIBRARY_ENTRY}
    assert len(caught) == 1
    with pytest.raises(OSError, match="Read-only"):
        table.merge(path, GPU, {STEM: ENTRY})


def test_what_cannot_be_read_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.json").mkdir()
    for path in (tmp_path / "file" / "gpu.json", tmp_path / "folder.json"):
        with pytest.warns(UserWarning, match="cannot be read"):
            assert table.read(path) == {}
        with pytest.raises(OSError):
            table.merge(path, GPU, {SMALL: ENTRY})


CHAIN_KEY = "chain float16 1x64x56x56 k256 s1x1 p1x1 d1x1 project64x56x56,1x1 next64"
IMPOSSIBLE = [
    "float16 1x64x56x56 k64 3x3 s0x1 p1x1 d1x1 g1",
    "float16 1x64x56x56 k64 3x3 s1x0 p1x1 d1x1 g1",
    "float16 1x64x56x56 k64 3x3 s1x1 p1x1 d0x1 g1",
    "float16 1x64x56x56 k64 3x3 s1x1 p1x1 d1x1 g0",
    "float16 1x64x56x56 k64 3x3 s1x1 p1x1 d1x1 g3",
    "float16 1x64x56x56 k65 3x3 s1x1 p1x1 d1x1 g2",
    "float16 0x64x56x56 k64 3x3 s1x1 p1x1 d1x1 g1",
    "float16 1x0x56x56 k64 3x3 s1x1 p1x1 d1x1 g1",
    "float16 1x64x56x56 k64 0x3 s1x1 p1x1 d1x1 g1",
    "float16 1x64x2x56 k64 3x3 s1x1 p0x0 d1x1 g1",
    "float16 1x64x56x56 k64 3x3 s1x1 p9999999999x1 d1x1 g1",
    "float16 1x64x56x56 k64 3x3 s1x1 p1x1 d1x1 g1 pool3x3,0x2,1x1",
    "float16 1x64x56x56 k64 3x3 s1x1 p1x1 d1x1 g1 pool99x3,2x2,1x1",
    CHAIN_KEY.replace("s1x1", "s0x1"),
    CHAIN_KEY.replace("56,1x1", "56,0x1"),
    CHAIN_KEY.replace("k256", "k0"),
    "basic float16 1x0x56x56",
]


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_problems_that_cannot_be_are_refused(key: str, tmp_path: Path) -> None:
    assert parse_problem(CHAIN_KEY).key == CHAIN_KEY
    with pytest.raises(ValueError, match="key is"):
        parse_problem(key)
    path = tmp_path / "gpu.json"
    fields = {"kernel": "library", "microseconds": 3.0}
    path.write_text(document(choices={key: fields, STEM.key: fields}))
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert table.read(path) == {STEM: LIBRARY_ENTRY}
    assert len(caught) == 1


def test_a_table_is_not_read_without_end(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(document().ljust(table.LARGEST))  # spaces
    assert quiet(lambda: table.read(path)) == {STEM: LIBRARY_ENTRY}
    path.write_text(text := document().ljust(table.LARGEST + 1))
    with pytest.warns(UserWarning, match="cannot be read: it has .* at most") as caught:
        assert table.read(path) == {}
    assert len(caught) == 1
    with pytest.raises(table.TableError, match="at most"):
        table.merge(path, GPU, {SMALL: ENTRY})
    assert path.read_text() == text
    path.unlink()
    os.mkfifo(path)
    with pytest.warns(UserWarning, match="no regular file"):
        assert table.read(path) == {}


def test_a_link_to_a_table_stays_one(tmp_path: Path) -> None:
    real, link = tmp_path / "real" / "gpu.json", tmp_path / "gpu.json"
    real.parent.mkdir()
    link.symlink_to(real)
    table.merge(link, GPU, {STEM: LIBRARY_ENTRY})  # makes the file
    table.merge(link, GPU, {SMALL: ENTRY})
    table.merge(real, GPU, {STEM: LIBRARY_ENTRY})
    assert link.is_symlink()
    assert table.read(link) == table.read(real) == {SMALL: ENTRY, STEM: LIBRARY_ENTRY}
    assert {file.name for file in real.parent.iterdir()} == {"gpu.json", "gpu.json.lock"}
    real.write_text("{")
    with pytest.warns(UserWarning, match="damaged-1"):
        assert table.read(link) == {}
    table.merge(link, GPU, {SMALL: ENTRY})
    assert link.is_symlink()
    assert table.read(real) == {SMALL: ENTRY}


UNUSABLE = ["no such user", "no home", "a lock that is a folder", "read-only"]


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_cache_that_cannot_be_used_is_one_warning(
    what: str,
    an_h100: architecture.Architecture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    problem, expected = model_problems()[2], "is damaged"
    if what in ("no such user", "no home"):
        named = what == "no such user"
        monkeypatch.setenv("FUSED_RESNET_CACHE", "~nosuchuser/tables" if named else "")
        for variable in ("HOME", "XDG_CACHE_HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # KeyError: no entry of this user
        reason = (
            "FUSED_RESNET_CACHE is '~nosuchuser/tables'" if named else ".*set FUSED_RESNET_CACHE"
        )
        expected = f"no tuning table is read: {reason}"
    else:
        path = table.user_path(GPU)
        path.parent.mkdir(parents=True)
        path.write_text("{")
        if what == "read-only":
            read_only(monkeypatch)
        else:
            path.with_name(path.name + ".lock").mkdir()
    tuning.reload()
    with pytest.warns(UserWarning, match=expected) as caught:
        choice = tuning.choose(problem, torch.device("cuda", 0))
    assert len(caught) == 1
    assert choice.source == "estimate"
    assert quiet(lambda: tuning.choose(model_problems()[3], torch.device("cuda", 0)))
    tuning.reload()


def test_where_tables_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = "nvidia-h100-80gb-hbm3.json"
    assert table.user_path(GPU) == tmp_path / "cache" / "tuning" / name
    assert table.shipped_path(GPU) == Path(table.__file__).parent / "tables" / name
    monkeypatch.delenv("FUSED_RESNET_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table.cache_folder() == tmp_path / "fused_resnet"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(table.sys, "platform", "linux")
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert table.cache_folder() == tmp_path / "home" / ".cache" / "fused_resnet"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(table.sys, "platform", "darwin")
    assert table.cache_folder() == tmp_path / "home" / "Library" / "Caches" / "fused_resnet"


def test_shipped_tables_are_sound() -> None:
    """There may be none; one that is there can be read and fits its GPU's name."""
    for path in Path(table.__file__).parent.glob("tables/*.json"):
        assert quiet(lambda path=path: table.read(path))
        assert path.name == table.file_name(json.loads(path.read_text())["gpu"])
