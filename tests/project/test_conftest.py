"""Which tests run without `--whole`."""

from __future__ import annotations

import itertools
import os
import subprocess
import tempfile
import textwrap
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Runner
from support import processes
from support.selection import one_of_each

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
    sizes, dtypes = range(5), ["float32", "bfloat16", "float16"]
    backends = [Runner("cpu", "cpu", "on the CPU"), Runner("triton", "cuda", "on a GPU")]
    marks = (pytest.mark.parametrize("size", sizes), pytest.mark.parametrize("dtype", dtypes))
    items = [
        item("test_a", marks, size=size, dtype=dtype, backend=backend)
        for size, dtype, backend in itertools.product(sizes, dtypes, backends)
    ]
    found = kept(representatives, items)
    for backend in backends:
        mine = [one for one in found if one["backend"] == backend]
        assert len(mine) == len(sizes)
        assert {one["size"] for one in mine} == set(sizes)
        assert {one["dtype"] for one in mine} == set(dtypes)


def test_stand_ins_for_a_gpu_share_the_values(representatives: Any) -> None:
    """And the reference has one, where another backend has them all."""
    reference = Runner("reference", "cpu", "on the CPU")
    cpu = Runner("cpu", "cpu", "on the CPU")
    stand_ins = [Runner("triton", "cpu", "interpreted"), Runner("cuda", "cpu", "on the host")]
    sizes = [f"size {i}" for i in range(6)]
    marks = (pytest.mark.parametrize("size", sizes),)

    def sizes_of(backends: list[Runner]) -> dict[str, list[str]]:
        items = [
            item("test_a", marks, size=size, backend=backend)
            for backend, size in itertools.product(backends, sizes)
        ]
        found = kept(representatives, items)
        return {
            one.name: [test["size"] for test in found if test["backend"] is one] for one in backends
        }

    found = sizes_of([reference, cpu, *stand_ins])
    assert found["cpu"] == sizes
    assert len(found["reference"]) == 1
    assert len(found["triton"]) == len(found["cuda"]) == 3
    assert sorted(found["triton"] + found["cuda"]) == sizes
    assert sizes_of([reference]) == {"reference": sizes}


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


def test_cases_of_a_kind_again_are_marked_whole() -> None:
    """Every kind is there without them; ids and marks that the cases have already stay."""
    cases = [(a, b) for a in range(3) for b in "xy"]
    marked = one_of_each(
        [pytest.param(a, b, id=f"{a}{b}", marks=pytest.mark.quick) for a, b in cases],
        lambda a, b: a,
        lambda a, b: b,
    )
    assert [one.values for one in marked] == cases
    assert [one.id for one in marked] == [f"{a}{b}" for a, b in cases]
    names = [[mark.name for mark in one.marks] for one in marked]
    assert all(name[0] == "quick" for name in names)
    without = [one.values for one, name in zip(marked, names, strict=True) if "whole" not in name]
    assert without == [(0, "x"), (1, "y"), (2, "x")]

    lengths = one_of_each(["a", "bb", "b", "aa"], len)
    assert [one.values for one in lengths] == [("a",), ("bb",), ("b",), ("aa",)]
    assert [len(one.marks) for one in lengths] == [0, 0, 1, 1]


def test_every_two_values_meet_in_the_whole_suite(request: pytest.FixtureRequest) -> None:
    """Of a function marked `pairs`, on each backend; of others everything."""
    plugins = request.config.pluginmanager.get_plugins()
    of_pairs = next(one.of_pairs for one in plugins if hasattr(one, "of_pairs"))
    values = {"size": range(5), "dtype": ["float32", "float16"], "layout": ["first", "last"]}
    marks = tuple(pytest.mark.parametrize(name, list(of)) for name, of in values.items())
    backends = [Runner("cpu", "cpu", "on the CPU"), Runner("triton", "cpu", "interpreted")]

    def items_of(name: str, marks: tuple[pytest.MarkDecorator, ...]) -> list[Any]:
        return [
            item(name, marks, backend=backend, **dict(zip(values, case, strict=True)))
            for backend, case in itertools.product(backends, itertools.product(*values.values()))
        ]

    others = [*items_of("test_a", marks), item("test_b", (pytest.mark.pairs,))]
    others += [item("test_c", (pytest.mark.pairs, marks[0]), size=size) for size in range(5)]
    found = of_pairs([*others, *items_of("test_d", (pytest.mark.pairs, *marks))])
    assert found[: len(others)] == others
    for backend in backends:
        mine = [one.params for one in found[len(others) :] if one.params["backend"] is backend]
        assert len(mine) == 10
        for a, b in itertools.combinations(values, 2):
            pairs = itertools.product(values[a], values[b])
            assert {(one[a], one[b]) for one in mine} == set(pairs)


def test_strict_exports_are_let_go(request: pytest.FixtureRequest) -> None:
    """With the weights of the model, which torch keeps otherwise."""
    plugins = request.config.pluginmanager.get_plugins()
    give_back = next(one.give_back_memory for one in plugins if hasattr(one, "give_back_memory"))
    model = torch.nn.Linear(3, 3)
    weight = weakref.ref(model.weight)
    torch.export.export(model, (torch.ones(1, 3),), strict=True)
    del model
    give_back()
    assert weight() is None


@pytest.mark.parametrize("whole", [False, True])
def test_the_summary_says_how_many_did_not_run(whole: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "FUSED_RESNET_WHOLE_SUITE"}
    file = Path(__file__).parents[1] / "ops" / "test_scale_shift_act.py"
    arguments = ["-q", "-p", "no:cacheprovider", "--collect-only", str(file)]
    arguments += ["--whole"] if whole else []
    code = f"import pytest; pytest.main({arguments!r})"
    _, out, _ = processes.run_code(code, 300, environment)
    assert ("not run: pytest --whole" in out) == (not whole), out


@pytest.mark.parametrize("turn", range(2))
def test_float32_is_not_tf32(turn: int) -> None:
    """Neither by torch's default nor because the test before wanted it."""
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(1, device="cuda")
    assert library.precision(x) == "ieee"
    torch.backends.cudnn.allow_tf32 = True
    assert library.precision(x) == "tf32"


@pytest.mark.parametrize("environment", [{}, {"OMP_NUM_THREADS": "1"}], ids=["forked", "started"])
def test_code_in_another_process(environment: dict[str, str]) -> None:
    """Its own `__main__`, environment, exit status and errors, and nothing of ours imported."""
    everything = {**os.environ, **environment, "FUSED_RESNET_TEST": "yes"}
    code = """
        import atexit, os, sys
        assert not [name for name in sys.modules if name.startswith("fused_resnet")]
        assert __name__ == "__main__" and sys.stdin.read() == ""
        atexit.register(print, "ended", os.environ["FUSED_RESNET_TEST"])
        print(os.path.basename(os.getcwd()), flush=True)
        sys.exit("why")
    """
    for _ in range(2):
        status, out, err = processes.run_code(textwrap.dedent(code), 60, everything)
        assert (status, out, err) == (1, "tests\nended yes\n", "why\n")
    assert "FUSED_RESNET_TEST" not in os.environ
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run_code("while True: pass", 1, everything)
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    assert processes.run_code(crash, 60, everything)[0] == -11
    assert processes.run_code("print(1)", 60, everything) == (0, "1\n", "")


def test_one_process_forks_for_all_threads(tmp_path: Path) -> None:
    """Two at once, each with its own output, of the one that has imported torch.

    Also where something has been compiled meanwhile.
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    code = """
        import os, time
        open({own!r}, "w").close()
        while not os.path.exists({other!r}):
            time.sleep(0.01)
        waits = os.getppid()
        print(open(f"/proc/{{waits}}/stat").read().rpartition(")")[2].split()[1])
    """
    paths = [str(tmp_path / name) for name in ("a", "b")]
    codes = [
        textwrap.dedent(code).format(own=own, other=other)
        for own, other in (paths, reversed(paths))
    ]
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda code: processes.run_code(code, 60, environment), codes))
    server = processes._servers[environment.get("TRITON_INTERPRET")].process.pid
    assert results == [(0, f"{server}\n", "")] * 2


def test_tasks_are_done_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread, in the environment of the start; who comes too early does it himself."""
    begun, let_go = threading.Event(), threading.Event()

    def first() -> tuple[int, str | None]:
        begun.set()
        assert let_go.wait(60)
        environment = processes.current_environment()
        return threading.get_ident(), environment.get("FUSED_RESNET_TEST")

    def fails() -> None:
        raise ValueError(threading.get_ident())

    for state in ("_at_start", "_ahead"):
        monkeypatch.setattr(processes, state, {})
    monkeypatch.setattr(processes, "_pool", [])
    monkeypatch.setenv("FUSED_RESNET_TEST", "at the start")
    own = threading.get_ident()
    processes.start_ahead({"first": first, "fails": fails, "later": threading.get_ident})
    assert begun.wait(60)
    monkeypatch.setenv("FUSED_RESNET_TEST", "since")
    assert processes.result_of("later", threading.get_ident) == own
    assert processes.result_of("unknown", threading.get_ident) == own
    let_go.set()
    thread, variable = processes.result_of("first", first)
    assert thread != own
    assert variable == "at the start"
    with pytest.raises(ValueError, match=str(thread)):
        processes.result_of("fails", fails)
    processes._pool[0].shutdown()


def test_what_nobody_asked_for_is_ended() -> None:
    """A session that ends early waits for no process that it has started ahead."""
    code = """
        import os, sys, time
        from support import processes
        environment = dict(os.environ)
        code = "print('on', flush=True); open({path!r}, 'w').close(); import time; time.sleep(600)"
        path = sys.argv[1]
        for run in (
            lambda: processes.run_code(code.format(path=path), 600, environment),
            lambda: processes.run_command(
                [sys.executable, "-c", code.format(path=path)], 600, environment, os.getcwd()
            ),
        ):
            processes.start_ahead({1: run, 2: lambda: open(path, "w").close()})
            while not os.path.exists(path):
                time.sleep(0.05)
            os.remove(path)
            processes.stop()
            assert not os.path.exists(path)
        print("ended")
    """
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "running")
        code = f"import sys; sys.argv = ['', {path!r}]\n" + textwrap.dedent(code)
        status, out, err = processes.run_code(code, 120, processes.current_environment())
    assert (status, out) == (0, "ended\n"), err
