"""The tuner's decisions, with times from fake timers and kernels from the library."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tuning import (
    CPU,
    CUDA,
    H100,
    SMALL,
    STEM,
    TRITON,
    FakeTimer,
    drops_nan,
    fake_runner,
    model_problems,
    run_pooled,
    tune,
)
from torch import Tensor

from fused_resnet import tuning
from fused_resnet.backends import cudnn, library
from fused_resnet.measure.tune import cases, race, tuner
from fused_resnet.tuning import (
    Choice,
    ConvProblem,
    architecture,
    estimate,
    table,
)
from fused_resnet.tuning.choice import MEASURED
from fused_resnet.tuning.problem import DTYPES

pytestmark = pytest.mark.quick


def test_what_is_tried() -> None:
    problem = dataclasses.replace(model_problems()[5], N=32)
    tried = tuner.candidates(problem, H100, CPU)
    assert str(tried[0]) == str(tuning.untuned(problem, H100))
    assert [choice.kernel for choice in tried].count("library") == 1
    assert len(tried) == len({str(choice) for choice in tried}) <= tuner.MOST_TILES + 2
    if torch.backends.cudnn.is_available():
        extra = set(map(str, tuner.candidates(problem, H100, CUDA))) - set(map(str, tried))
        extra = {name for name in extra if not name.startswith("cuda ")}  # see test_cuda_conv.py
        fused = "cudnn_convolution_add_relu" if problem.residual else "cudnn_convolution_relu"
        assert extra == {fused}


@pytest.mark.parametrize("problem", [SMALL, STEM], ids=str)
def test_fastest_is_chosen(problem: ConvProblem) -> None:
    for fastest in tuner.candidates(problem, H100, CPU):
        timer = FakeTimer(lambda name, best=str(fastest): 1e-6 if name == best else 1e-5)
        result = tune(problem, timer)
        assert str(result.choice) == str(fastest)
        assert result.choice.source == MEASURED
        assert not result.failures
        entry = result.entry()
        assert (entry.kernel, entry.tile) == (fastest.kernel, fastest.tile)
        assert entry.microseconds == pytest.approx(1.0)
        assert entry.library_microseconds == pytest.approx(1.0 if fastest.tile is None else 10.0)
        assert "torch" in entry.versions


def test_default_stays_where_nothing_is_clearly_faster() -> None:
    default = str(tuning.untuned(SMALL, H100))
    result = tune(timer=FakeTimer(lambda name: 1e-5 if name == default else 0.995e-5))
    assert str(result.choice) == default


@given(st.data())
@settings(max_examples=30)
def test_never_slower_than_not_tuning(data: st.DataObject) -> None:
    """Whatever the times, noise included, up to the margin."""
    names = [str(choice) for choice in tuner.candidates(SMALL, H100, CPU)]
    true = {name: data.draw(st.floats(1e-6, 1e-4)) for name in names}
    noise = iter(data.draw(st.lists(st.floats(0.8, 1.25), min_size=20, max_size=20)) * 1000)

    def noisy(calls: Mapping[str, object], rounds: int) -> dict[str, list[float]]:
        return {name: [true[name] * next(noise) for _ in range(rounds)] for name in calls}

    default, kept = str(tuning.untuned(SMALL, H100)), str(tuner.LIBRARY)
    calls = dict.fromkeys(names, lambda: None)
    medians = race.race(calls, {default, kept}, noisy)
    assert {default, kept} <= set(medians)
    fastest = min(medians.values())
    assert fastest <= min(medians[default], medians[kept])


def test_halving_spares_the_slow() -> None:
    names = [f"candidate {index}" for index in range(40)]
    timer = FakeTimer(lambda name: 1e-6 * (1 + int(name.split()[1])))
    shares: list[float] = []
    medians = race.race(dict.fromkeys(names, lambda: None), {"candidate 39"}, timer, shares.append)
    assert min(medians, key=medians.__getitem__) == "candidate 0"
    assert "candidate 39" in medians
    assert timer.rounds["candidate 30"] == 3
    assert timer.rounds["candidate 0"] > 40
    assert sum(timer.rounds.values()) < 40 * 16
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert race.race({}, set(), timer) == {}


def raises(out: Tensor) -> Tensor:
    raise RuntimeError("out of resource: shared memory\nand more")


WRONG = {
    "a little off": lambda out: out + 1e-3,
    "no number at all": lambda out: out * float("nan"),
    "NaN dropped": drops_nan,
    "NaN in another image": lambda out: torch.where(out.isnan().any(), out * torch.nan, out),
    "transposed": lambda out: out.transpose(2, 3)[:, :, :-1],
    "another dtype": lambda out: out.double(),
    "raises": raises,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("problem", [SMALL, STEM], ids=str)
def test_wrong_is_never_chosen(problem: ConvProblem, wrong: str) -> None:
    """However fast it is, and even where nothing that is right can be had from Triton."""
    timer = FakeTimer(lambda name: 1e-9 if name.startswith("triton") else 1e-5)
    result = tune(problem, timer, runner=fake_runner(triton=WRONG[wrong]))
    assert result.choice.kernel == "library"
    tried = tuner.candidates(problem, H100, CPU)
    assert set(result.failures) == {str(choice) for choice in tried if choice.tile}
    assert not any(name.startswith("triton") for asked in timer.asked for name in asked)
    if wrong == "raises":
        assert set(result.failures.values()) == {"RuntimeError: out of resource: shared memory"}
    if wrong == "NaN dropped":
        assert all("NaN lost" in reason for reason in result.failures.values())


def test_nothing_right_is_nothing_remembered(tmp_path: Path) -> None:
    runner = fake_runner(triton=raises, library=raises)
    session = tuner.tune_all(
        [SMALL], H100, CPU, FakeTimer(lambda name: 1e-5), tmp_path / "t.json", runner=runner
    )
    assert session.skipped == {SMALL: "no candidate is right"}
    assert not (tmp_path / "t.json").exists()


def test_out_of_memory_skips_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = cases.make_case

    def case(problem: ConvProblem, device: torch.device) -> cases.Case:
        if problem is STEM:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(problem, device)

    monkeypatch.setattr(cases, "make_case", case)
    path = tmp_path / "t.json"
    timer = FakeTimer(lambda name: 1e-5)
    session = tuner.tune_all([STEM, SMALL], H100, CPU, timer, path, runner=fake_runner())
    assert session.skipped == {STEM: "out of memory: CUDA out of memory"}
    assert set(table.read(path)) == {SMALL}


def test_interrupt_keeps_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    several = [dataclasses.replace(SMALL, N=N) for N in (1, 2, 3)]
    per_problem = FakeTimer(lambda name: 1e-5)
    tune(several[0], per_problem)
    timer = FakeTimer(lambda name: 1e-5, stop_after=len(per_problem.asked))
    session = tuner.tune_all(several, H100, CPU, timer, path, runner=fake_runner())
    assert session.interrupted
    assert [result.problem for result in session.results] == several[:1]
    assert set(table.read(path)) == set(several[:1])


def test_a_table_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    timer = FakeTimer(lambda name: 1e-5)
    session = tuner.tune_all(
        [SMALL], H100, CPU, timer, tmp_path / "file" / "t.json", runner=fake_runner()
    )
    assert len(session.results) == 1
    assert "file" in session.unsaved


def test_progress_ends_at_one() -> None:
    shares: list[float] = []
    tune(progress=shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_timed_for_real_on_the_cpu() -> None:
    """The whole way with `clock.interleave` as the timer; a slow candidate is not chosen."""

    def slow(out: Tensor) -> Tensor:
        time.sleep(0.01)
        return out

    result = tuner.tune(
        SMALL,
        H100,
        CPU,
        race.host_timer,
        choices=[tuning.untuned(dataclasses.replace(SMALL, dtype="float16"), H100), tuner.LIBRARY],
        runner=fake_runner(triton=slow),
    )
    assert result.choice.kernel == "library"
    assert max(result.microseconds.values()) > 1e4


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_float64(dtype: str) -> None:
    problem = dataclasses.replace(SMALL, N=5, dtype=dtype)
    case = cases.make_case(problem, CPU)
    assert case.expected.dtype == torch.float64
    assert case.expected.shape == (5, 16, 6, 6)
    in_parts = cases._expected(case.arguments, problem, images=2)
    torch.testing.assert_close(in_parts, case.expected, rtol=1e-12, atol=1e-12)
    assert case.arguments[0].is_contiguous(memory_format=torch.channels_last)
    assert cases.check(run_pooled, case) is None
    again = cases.make_case(problem, CPU)
    assert torch.equal(again.arguments[0], case.arguments[0])


def test_precision_is_restored() -> None:
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    with cases.precision("float32"):
        assert settings.fp32_precision == "ieee"
    with cases.precision("tfloat32"):
        assert settings.fp32_precision == "tf32"
    assert settings.fp32_precision == before


@pytest.fixture
def cudnn_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """cuDNN's operators as their schemas and `CUDNN_NOT_PROPAGATE_NAN` have them; counts calls."""
    calls = {"relu": 0, "add_relu": 0}

    def relu(input: Tensor, weight: Tensor, bias: Tensor, *convolution: object) -> Tensor:
        calls["relu"] += 1
        return F.relu(F.conv2d(input, weight, bias, *convolution)).nan_to_num(0.0)

    def add_relu(
        input: Tensor, weight: Tensor, z: Tensor, alpha: float, bias: Tensor, *convolution: object
    ) -> Tensor:
        calls["add_relu"] += 1
        out = F.conv2d(input, weight, bias, *convolution) + alpha * z
        return F.relu(out).nan_to_num(0.0)

    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch.ops.aten, "cudnn_convolution_add_relu", add_relu)
    return calls


@pytest.mark.parametrize("residual", [False, True])
def test_cudnn_computes_the_same_but_for_nan(
    cudnn_on_the_cpu: dict[str, int], residual: bool
) -> None:
    case = cases.make_case(dataclasses.replace(SMALL, residual=residual), CPU)
    bias = torch.randn(16)
    flat = (*case.arguments[:7], bias, *case.arguments[8:])
    arguments = cases.described(flat)
    out = cudnn.conv_bn_act(*arguments)
    torch.testing.assert_close(out, library.conv_bn_act(*arguments), rtol=1e-5, atol=1e-5)
    assert cudnn_on_the_cpu == {"relu": 1 - residual, "add_relu": int(residual)}
    without = (*arguments[:3], "none")
    torch.testing.assert_close(cudnn.conv_bn_act(*without), library.conv_bn_act(*without))
    assert sum(cudnn_on_the_cpu.values()) == 1

    name = "cudnn_convolution_add_relu" if residual else "cudnn_convolution_relu"
    reason = cases.check(tuner.run_of(Choice(name, None, MEASURED)), case)
    assert "NaN lost" in reason


@pytest.mark.skipif(TRITON != "yes", reason=f"triton: {TRITON}")
@pytest.mark.parametrize(
    "problem",
    [
        dataclasses.replace(SMALL, dtype="float16"),
        dataclasses.replace(SMALL, C=64, N=1, H=3, W=3, dtype="float16"),
        ConvProblem(2, 32, 5, 5, 32, 1, 1, (2, 2), (0, 0), (1, 1), 1, "bfloat16", False),
        ConvProblem(1, 32, 5, 5, 32, 3, 3, (1, 1), (1, 1), (1, 1), 8, "float32", False),
        ConvProblem(1, 3, 10, 10, 32, 7, 7, (2, 2), (3, 3), (1, 1), 1, "float16", False),
        ConvProblem(1, 3, 10, 10, 32, 7, 7, (2, 2), (3, 3), (1, 1), 1, "float16", False, STEM.pool),
    ],
    ids=lambda problem: problem.key,
)
@pytest.mark.single
def test_triton_kernels_pass_the_tuners_check(problem: ConvProblem) -> None:
    device = CUDA if torch.cuda.is_available() else CPU
    gpu = architecture.of_device(device)
    tiles = estimate.candidates(problem, gpu)
    choices = [Choice("triton", tile, MEASURED) for tile in {tiles[0], tiles[-1]}]
    result = tuner.tune(
        problem, gpu, device, FakeTimer(lambda name: 1e-5), choices=[*choices, tuner.LIBRARY]
    )
    assert not result.failures


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_events_time_the_gpu() -> None:
    small, large = (torch.randn(size, size, device=CUDA) for size in (256, 4096))
    timer = race.EventTimer(CUDA, flush_bytes=2**28)
    times = timer({"small": lambda: small @ small, "large": lambda: large @ large}, 10)
    assert len(times["small"]) == len(times["large"]) == 10
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    # Of 137 GFLOP: no less than a petaflop a second takes, and not what queueing takes.
    assert 1e-4 < medians["large"] < 1
    assert 0 < medians["small"] < 0.2 * medians["large"]
