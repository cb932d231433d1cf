"""When one kernel runs both convolutions of a BasicBlock: the model, tables and the route."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import Run
from torch import Tensor

from fused_resnet import _native, backends, tuning
from fused_resnet.backends import cuda, triton
from fused_resnet.layers.description import Block
from fused_resnet.measure import networks
from fused_resnet.measure.tune import cases, tuner
from fused_resnet.tuning import (
    BasicBlockProblem,
    Choice,
    Tile,
    architecture,
    basic_block,
    estimate,
    table,
)
from fused_resnet.tuning.choice import (
    BASIC_BLOCK,
    BASIC_BLOCK_KERNELS,
    CONVOLUTIONS,
    ESTIMATE,
    MEASURED,
)
from fused_resnet.tuning.problem import parse_problem

pytestmark = pytest.mark.quick

GPU = "NVIDIA H100 80GB HBM3"
H100 = architecture.named("H100")
A100 = architecture.named("A100")
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
PROBLEM = BasicBlockProblem(256, 64, 56, 56, "float16")


@pytest.fixture(autouse=True)
def loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel is there, whatever this machine has, and tables are read anew."""
    if _native.cuda_operators is None:
        monkeypatch.setattr(_native, "cuda_operators", object())
    tuning.reload()
    yield
    tuning.reload()


def test_keys() -> None:
    assert PROBLEM.key == "basic float16 256x64x56x56"
    assert parse_problem(PROBLEM.key) == PROBLEM
    for key in ("basic float32 1x64x56x56", "basic float16 1x64x56", PROBLEM.key + " "):
        with pytest.raises(ValueError, match="key is"):
            parse_problem(key)
    assert str(PROBLEM) == "64x56x56, two 3x3"


def test_bytes_and_products() -> None:
    """By hand: two of five tensors, the weights and norms of two convolutions."""
    image = 2 * 256 * 64 * 56 * 56
    weights = 2 * (2 * 9 * 64 * 64 + 16 * 64)
    assert PROBLEM.bytes_once == 2 * image + weights
    assert sum(part.bytes_once for part in PROBLEM.parts) == 5 * image + weights
    assert PROBLEM.flops == 2 * 2 * 256 * 56 * 56 * 64 * 9 * 64


def test_models_have_them() -> None:
    """Of the first stage, in 16 bits; the others' channels are too many."""
    small = BasicBlockProblem(2, 64, 56, 56, "float16")
    assert networks.basic_blocks_of_model("resnet18", 2, "float16") == {small: 2}
    assert networks.basic_blocks_of_model("resnet34", 2, "float16") == {small: 3}
    assert not networks.basic_blocks_of_model("resnet50", 2, "float16")
    assert not networks.basic_blocks_of_model("resnet18", 2, "float32")


@pytest.mark.parametrize("gpu", architecture.ARCHITECTURES.values(), ids=lambda gpu: gpu.name)
def test_candidates_fit(gpu: architecture.Architecture) -> None:
    first, *others = basic_block.candidates(PROBLEM, gpu)
    assert first == Choice(CONVOLUTIONS, None, MEASURED)
    assert others
    for choice in others:
        shape = basic_block.SHAPES[basic_block.index(choice.tile)]
        assert shape.shared_bytes <= gpu.shared_per_block
        assert basic_block.resident(shape, gpu) >= 1
        assert basic_block.can_run(PROBLEM, gpu, choice.kernel, choice.tile)
        seconds = basic_block.predicted(PROBLEM, gpu, choice)
        assert seconds > max(
            PROBLEM.bytes_once / gpu.bandwidth, PROBLEM.flops / gpu.rate("float16")
        )
    predicted = [basic_block.predicted(PROBLEM, gpu, choice) for choice in others]
    assert predicted == sorted(predicted)
    best = tuning.untuned(PROBLEM, gpu)
    apart = basic_block.predicted(PROBLEM, gpu, first)
    assert best.kernel == (BASIC_BLOCK if predicted[0] < apart else CONVOLUTIONS)
    assert best.source == ESTIMATE


def test_it_pays_on_hopper_only_where_products_bound_an_ampere() -> None:
    assert tuning.untuned(PROBLEM, H100).kernel == BASIC_BLOCK
    assert tuning.untuned(PROBLEM, A100).kernel == CONVOLUTIONS


def test_no_candidates() -> None:
    """An old GPU, other channels, no image."""
    old = dataclasses.replace(H100, capability=(7, 5))
    assert basic_block.tiles(PROBLEM, old) == []
    assert basic_block.tiles(dataclasses.replace(PROBLEM, C=128), H100) == []
    empty = dataclasses.replace(PROBLEM, N=0)
    tile = basic_block.SHAPES[0].tile
    assert basic_block.predicted_launch(empty, H100, tile) == estimate.LAUNCH


def test_without_the_kernel_there_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "cuda_operators", None)
    assert basic_block.candidates(PROBLEM, H100) == [Choice(CONVOLUTIONS, None, MEASURED)]
    assert tuning.untuned(PROBLEM, H100) == Choice(CONVOLUTIONS, None, ESTIMATE)


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`cuda:0` is an H100, whose tables are in a folder of the test's own."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    gpu = dataclasses.replace(H100, name=GPU)
    monkeypatch.setattr(architecture, "of_device", lambda device: gpu)


def test_tables(an_h100: None) -> None:
    """Written, read and followed; a kernel or tile that a block cannot have is not."""
    path = table.user_path(GPU)
    tile = basic_block.SHAPES[1].tile
    other = dataclasses.replace(PROBLEM, N=1)
    table.merge(path, GPU, {PROBLEM: table.Entry(BASIC_BLOCK, tile, 5.0)})
    table.merge(path, GPU, {other: table.Entry(CONVOLUTIONS, None, 7.0)})
    assert table.read(path)[PROBLEM] == table.Entry(BASIC_BLOCK, tile, 5.0)
    tuning.reload()
    assert tuning.choose(PROBLEM, CUDA) == Choice(BASIC_BLOCK, tile, MEASURED)
    assert tuning.choose(other, CUDA) == Choice(CONVOLUTIONS, None, MEASURED)
    table.merge(path, GPU, {PROBLEM: table.Entry(BASIC_BLOCK, Tile(1, 2, 3, 1, 4, 5), 5.0)})
    tuning.reload()
    assert tuning.choose(PROBLEM, CUDA).source == ESTIMATE
    for kernel in ("triton", "chain", BASIC_BLOCK):
        text = path.read_text().replace(f'"{CONVOLUTIONS}"', f'"{kernel}"')
        path.write_text(text)
        with pytest.warns(UserWarning, match="damaged"):
            assert other not in table.read(path)
        table.merge(path, GPU, {other: table.Entry(CONVOLUTIONS, None, 7.0)})


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_who_runs_it(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """CUDA as chosen, also by estimate; Triton where it was measured, here or before shipping."""
    tile = basic_block.SHAPES[0].tile
    chosen = []
    x = SimpleNamespace(dtype=torch.float16, device=CUDA)
    blocks = [Block([("first",), ("second",)], False)]
    backend = getattr(backends, name)
    monkeypatch.setattr(basic_block, "problem_of", lambda input, blocks: PROBLEM)
    monkeypatch.setattr(cuda, "on_host", lambda: False)
    monkeypatch.setattr(cuda, "run_basic_block", lambda *arguments: arguments)
    monkeypatch.setattr(tuning, "choose", lambda problem, device: chosen[-1])
    run = backend.residual_blocks
    launched = (x, ("first",), ("second",), tile)
    for choice, expected in (
        (Choice(BASIC_BLOCK, tile, MEASURED), launched),
        (Choice(BASIC_BLOCK, tile, ESTIMATE), launched if name == "cuda" else None),
        (Choice(CONVOLUTIONS, None, MEASURED), None),
    ):
        chosen.append(choice)
        assert run(x, blocks) == expected, choice
    if name == "triton":
        x.device = CPU  # interpreted
        chosen.append(Choice(BASIC_BLOCK, tile, MEASURED))
        assert run(x, blocks) is None


def test_the_reference_is_float64() -> None:
    problem = BasicBlockProblem(3, 64, 4, 5, "float16")
    case = cases.case_of(problem, CPU)
    assert [tuple(one.shape) for one in case.expected] == [(3, 64, 4, 5)]
    assert case.expected[0].dtype is torch.float64
    assert tuner.baseline(problem) == Choice(CONVOLUTIONS, None, MEASURED)

    def eager(arguments: tuple, problem: BasicBlockProblem) -> tuple[Tensor, ...]:
        return cases.eager_basic_block(arguments)

    assert cases.check(eager, case) is None
    for spoil, part in (
        (lambda out: out * 1.01, "output: error"),
        (lambda out: out[:2], "output: shape"),
        (lambda out: out.nan_to_num(0.0), "NaN lost"),
    ):
        assert part in cases.check(lambda *both, spoil=spoil: (spoil(eager(*both)[0]),), case)


def test_one_by_one_is_a_candidate() -> None:
    """By two of the default backend's convolutions."""
    problem = BasicBlockProblem(1, 64, 3, 4, "float16")
    tried = tuner.candidates(problem, H100, CUDA)
    assert {choice.kernel for choice in tried} == set(BASIC_BLOCK_KERNELS)
    assert str(tried[0]) == str(tuning.untuned(problem, H100))
    assert len({str(choice) for choice in tried}) == len(tried) == 1 + len(basic_block.SHAPES)
    if triton.available() != "yes":
        pytest.skip(f"triton: {triton.available()}")
    case = cases.case_of(problem, CPU)
    assert cases.check(tuner.run_of(Choice(CONVOLUTIONS, None, MEASURED)), case) is None


def test_dry_run_lists_them(run: Run) -> None:
    code, out, err = run("tune", "resnet18", "--dry-run", "--gpu", "h100", "--batch", "256")
    assert (code, err) == (0, "")
    assert "64x56x56, two 3x3" in out
    assert "basic block 196x64x64" in out
