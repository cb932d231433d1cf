"""What the suite shares: its backends, threads, seeds, which tests run, and the closing summary.

`pytest` runs a part of the suite and `pytest --whole` all of it. The part has every test function,
each on every backend, and every value of every parameter; what it leaves out are combinations of
values (`representatives`), and what is marked `whole`: further cases of a kind that it has already.
Of a function marked `single` the part has one test, since each takes long. So does each of one
marked `pairs`: the whole suite has every two values of its parameters together, not every three.

A test that takes the `backend` fixture runs once for every backend that `backends.available()` says
"yes" to, on the device that backend computes on here: a new backend joins the suite by becoming
available. Interpreted kernels take a thousand times as long as compiled ones, so over these run the
tests marked `interpreted`, and test_triton.py. CUDA kernels on the host (cuda_on_host.py) run
everything but whole models, on tensors that end at guard pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import inspect
import itertools
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Read when torch is imported: threads that wait give up the core, which others may need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What is wrong is to be seen, not left out.
os.environ.setdefault("FUSED_RESNET_SELF_CHECK", "0")

import torch

# Read when Triton is first imported, which is later than this.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import fused_resnet
from fused_resnet import backends

# The suite imports the installed package, so its own directory is not on the path by itself.
sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("support")

from support import cuda_on_host, processes  # noqa: E402  (found through the lines above)
from support.selection import covering  # noqa: E402

if cuda_on_host.is_needed():
    cuda_on_host.load()
    backends.cuda.run_on_host()

torch.set_num_threads(2)

hypothesis.settings.register_profile(
    "suite",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=False,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("suite")


@dataclass(frozen=True)
class Runner:
    """A backend as this machine runs it: on tensors of `device`, `how` the summary says."""

    name: str
    device: str
    how: str

    @property
    def is_for_use(self) -> bool:
        """Whether users of this machine compute with it: it is no definition and no stand-in."""
        return self.name != "reference" and self.how in ("on the CPU", "on a GPU")


def usable_runners() -> list[Runner]:
    """The backends to run over, in the order `backends.available()` lists them."""
    gpu = torch.cuda.is_available()
    how_without_gpu = {"triton": "interpreted", "cuda": "on the host"}
    runners = []
    for name, state in backends.available().items():
        if state != "yes":
            continue
        if name in how_without_gpu and gpu:
            runners.append(Runner(name, "cuda", "on a GPU"))
        else:
            runners.append(Runner(name, "cpu", how_without_gpu.get(name, "on the CPU")))
    return runners


RUNNERS = usable_runners()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole", action="store_true", help="run the whole suite, not one of each kind of case"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "single: run by `pytest` with one of its tests, on a backend that is for use"
    )
    config.addinivalue_line(
        "markers", "pairs: run by `pytest --whole` with every two values of its parameters, not all"
    )
    # Tests that run tests do as they were told: support.rerun_on_instruction_set.
    if config.option.whole:
        os.environ["FUSED_RESNET_WHOLE_SUITE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what `representatives` and `of_pairs` do, unless a test is named: `file.py::test`.

    What is done ahead of tests has the time of all others.
    """
    items.sort(key=lambda item: item.get_closest_marker("ahead") is not None)
    named = any("::" in argument for argument in config.args)
    if named:
        return
    whole = of_pairs(items)
    kept = set(whole)
    if not (config.option.whole or os.environ.get("FUSED_RESNET_WHOLE_SUITE")):
        kept = representatives(whole)
        config.stash[NOT_RUN] = (len(whole) - len(kept), len(whole))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]


def pytest_collection_finish(session: pytest.Session) -> None:
    # What is imported and collected by now lives as long as the process: no collection of garbage
    # has to go through it again.
    gc.collect()
    gc.freeze()
    if not session.config.option.collectonly and "PYTEST_XDIST_WORKER" not in os.environ:
        tasks = {item.nodeid: task_of(item) for item in session.items}
        processes.start_ahead({key: task for key, task in tasks.items() if task is not None})


def pytest_sessionfinish() -> None:
    processes.stop()


def task_of(item: pytest.Item) -> Callable[[], Any] | None:
    """What the marker `ahead` of a test calls, unless the test is skipped."""
    marker = item.get_closest_marker("ahead")
    if marker is None or any(True in skip.args for skip in item.iter_markers("skipif")):
        return None
    (function,) = marker.args
    callspec = getattr(item, "callspec", None)
    names = inspect.signature(function).parameters
    return functools.partial(function, **{name: callspec.params[name] for name in names})


@pytest.fixture
def ahead(request: pytest.FixtureRequest) -> Callable[[], Any]:
    """Returns what the function of the marker `ahead` does, which was called before or is now.

    That takes parameters of the test by their names, and only waits for processes: it runs while
    other tests do, in another thread.
    """
    task = task_of(request.node)
    assert task is not None
    return functools.partial(processes.result_of, request.node.nodeid, task)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        give_back_memory()
    elif resident_bytes() > _resident_after[0] + KEPT_BYTES:
        give_back_heap()
    return result


KEPT_BYTES = 2**27  # more than that between tests of one file is worth the time of giving it back
_resident_after = [0]


def give_back_memory() -> None:
    """Lets go of what one file's tests have left and the next one's do not look for.

    Graphs of compilers, which hold the models they were made of, packed weights and scratch memory.
    """
    torch._dynamo.reset()
    # A strict export leaves its graph, with the model's weights, among this module's variables.
    if exports := sys.modules.get("torch._dynamo.functional_export"):
        for name in [name for name in vars(exports) if name.startswith("__compiled_fn")]:
            delattr(exports, name)
    backends.cpu.empty_cache()
    give_back_heap()


def give_back_heap() -> None:
    """What nothing refers to, and what the C library keeps of freed memory, of large tensors too.

    It stays the process's own where something later in the heap is in use.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)
    _resident_after[0] = resident_bytes()


def resident_bytes() -> int:
    """The process's memory now, or 0 where that is not told so."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


NOT_RUN = pytest.StashKey[tuple[int, int]]()


def representatives(items: list[pytest.Item]) -> set[pytest.Item]:
    """The tests to run without `--whole`: of each function, on all its backends, few combinations.

    They have every value of every parameter, or every case of parameters whose values are given
    together: of a product of parameters about as many tests as the longest one has values, of a
    function with one parameter all. So has each backend that is for use. Those that stand in for a
    GPU's, and take long, have every value between them; the reference, which is torch's operators,
    has a test of every function. A function marked `single` has one test, on one backend.
    """
    kept = set()
    for_use = {
        item.nodeid.partition("[")[0]
        for item in items
        if (runner := runner_of(item)) is not None and runner.is_for_use
    }
    functions: dict[tuple, dict[pytest.Item, set[tuple]]] = {}
    for item in items:
        if item.get_closest_marker("whole") is not None:
            continue
        runner, name = runner_of(item), item.nodeid.partition("[")[0]
        if item.get_closest_marker("single") is not None:
            kinds = {("single", 0)} | ({("for use", 0)} if runner and runner.is_for_use else set())
            functions.setdefault((name, None), {})[item] = kinds
            continue
        apart = runner is not None and runner.is_for_use
        function = (name, runner if apart else None)
        cases = values_of(item)
        if runner is not None and not apart:
            if runner.name == "reference" and name in for_use:
                cases.clear()
            cases.add(("backend", id(runner)))
        if cases:
            functions.setdefault(function, {})[item] = cases
        else:
            kept.add(item)
    for tests in functions.values():
        kept.update(covering(tests))
    return kept


def of_pairs(items: list[pytest.Item]) -> list[pytest.Item]:
    """The whole suite: all tests, but of a function marked `pairs` some with every two values.

    On each backend. Of a product of three parameters they are about as many as the two longest ones
    have pairs.
    """
    functions: dict[tuple, dict[pytest.Item, set[frozenset]]] = {}
    for item in items:
        if item.get_closest_marker("pairs") is not None:
            values = values_of(item)
            pairs = set(map(frozenset, itertools.combinations(values, 2)))
            function = (item.nodeid.partition("[")[0], runner_of(item))
            functions.setdefault(function, {})[item] = pairs or {frozenset(values)}
    left_out = {item for tests in functions.values() for item in tests.keys() - covering(tests)}
    return [item for item in items if item not in left_out]


def values_of(item: pytest.Item) -> set[tuple]:
    """The values of a test's parameters but its backend's, or cases where they come together."""
    callspec = getattr(item, "callspec", None)
    values = {} if callspec is None else dict(callspec.params)
    values.pop("backend", None)
    cases = set()
    for marker in item.iter_markers("parametrize"):
        names = marker.args[0]
        names = names.split(",") if isinstance(names, str) else names
        # The objects are those of the list of parameters, which all tests of a function share.
        cases.add(tuple((one.strip(), id(values.pop(one.strip(), None))) for one in names))
    return cases | {(one, id(value)) for one, value in values.items()}


def runner_of(item: pytest.Item) -> Runner | None:
    """The backend that a test runs on, if it takes one."""
    callspec = getattr(item, "callspec", None)
    return None if callspec is None else callspec.params.get("backend")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        left_out = set()
        if metafunc.definition.get_closest_marker("interpreted") is None:
            left_out.add("interpreted")
        if metafunc.definition.get_closest_marker("whole_model") is not None:
            left_out.add("on the host")
        runners = [runner for runner in RUNNERS if runner.how not in left_out]
        if metafunc.definition.get_closest_marker("lays_channels_last") is not None:
            runners = [one for one in runners if backends.named(one.name).lays_channels_last]
        metafunc.parametrize("backend", runners, ids=lambda runner: runner.name, indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Runner]:
    """The backend under test, chosen for the duration of the test."""
    runner: Runner = request.param
    request.node.user_properties.append(("backend", runner.name))
    with contextlib.ExitStack() as stack:
        stack.enter_context(fused_resnet.use_backend(runner.name))
        if runner.how == "on the host":
            stack.enter_context(cuda_on_host.drawn_from(request.node.nodeid))
        yield runner


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Every test starts from the same seed, thread count and modes, whatever ran before.

    On a GPU torch's own convolutions would be in TF32 and may differ from run to run: a test that
    wants that says so.
    """
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    torch.set_num_threads(2)
    yield
    assert torch.is_grad_enabled(), "the test left gradients disabled"


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process; returns its exit code, output and error output."""
    from fused_resnet import cli

    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fused-resnet", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        output = capsys.readouterr()
        return exit.value.code or 0, output.out, output.err

    return run


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt even where the shell started this process ignoring it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    outcomes: dict[str, Counter[str]] = {}
    for outcome in ("passed", "failed", "skipped", "xfailed", "xpassed"):
        for report in terminalreporter.stats.get(outcome, []):
            for key, name in getattr(report, "user_properties", []):
                if key == "backend":
                    outcomes.setdefault(name, Counter())[outcome] += 1

    not_run, of = terminalreporter.config.stash.get(NOT_RUN, (0, 0))
    if not_run:
        terminalreporter.section("not the whole suite")
        terminalreporter.write_line(f"{not_run} of the whole suite's {of} not run: pytest --whole")
    terminalreporter.section("backends")
    terminalreporter.write_line(
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} threads"
    )
    how = {runner.name: runner.how for runner in RUNNERS}
    for name, state in backends.available().items():
        if name in how:
            counts = outcomes.get(name, Counter())
            ran = ", ".join(f"{n} {outcome}" for outcome, n in counts.items()) or "no test selected"
            terminalreporter.write_line(f"{name:<10} ran {how[name]}: {ran}")
        else:
            terminalreporter.write_line(f"{name:<10} did not run: {state}")
    if chosen := os.environ.get("FUSED_RESNET_BACKEND"):
        terminalreporter.write_line(f"FUSED_RESNET_BACKEND={chosen}")
