"""Chains: which blocks are some, their tiles, tables, predictions and what versions compile."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from support import Run
from support.tuning import (
    CPU,
    CUDA,
    GPU,
    H100,
    LIBRARY_ENTRY,
    SMALL,
    TRITON,
    FakeTimer,
    document,
)
from torch import Tensor

import fused_resnet
from fused_resnet import tuning
from fused_resnet.measure import networks
from fused_resnet.measure.tune import cases, tuner
from fused_resnet.tuning import (
    Choice,
    ConvProblem,
    Tile,
    architecture,
    chain,
    compiler,
    estimate,
    table,
)
from fused_resnet.tuning.choice import (
    CHAIN,
    CHAIN_KERNELS,
    CHAIN_WITHOUT_NEXT,
    ESTIMATE,
    MEASURED,
    PAIR,
)
from fused_resnet.tuning.problem import ChainProblem, parse_problem

pytestmark = pytest.mark.quick


BLOCK = ChainProblem(
    1, 64, 3, 3, 128, (1, 1), (1, 1), (1, 1), "float16", (64, 3, 3, 1, 1), next_width=64
)
LAST_BLOCK = dataclasses.replace(
    BLOCK, N=256, H=56, W=56, K=256, projection=None, next_width=0, dtype="bfloat16"
)


def test_chains_have_keys() -> None:
    for model in ("resnet50", "wide_resnet50_2"):
        for problem in networks.chains_of_model(model, 32, "float16"):
            if problem is not None:
                assert parse_problem(problem.key) == problem
    for key in (BLOCK.key.replace("float16", "float32"), BLOCK.key + " ", "chain float16 1x2"):
        with pytest.raises(ValueError, match="key is"):
            parse_problem(key)
    assert str(BLOCK) == "block 64x3x3 to 128, projection of 64, next 64"


def test_which_blocks_are_chains() -> None:
    found = networks.chains_of_model("resnet50", 2, "float16")
    assert [problem.width for problem in found] == [64] * 3 + [128] * 4 + [256] * 6 + [512] * 3
    # Across stages, up to a width of 256; the last stage's blocks end with themselves.
    assert [problem.next_width for problem in found] == [
        *(64, 64, 128), *(128, 128, 128, 256), *(256, 256, 256, 256, 256, 0), *(0, 0, 0),
    ]  # fmt: skip
    assert [index for index, one in enumerate(found) if one.projection] == [0, 3, 7, 13]
    assert found[3].projection == (256, 56, 56, 2, 2)
    wide = networks.chains_of_model("wide_resnet50_2", 2, "bfloat16")
    assert [one and (one.width, one.K) for one in wide][-4:] == [(512, 1024), None, None, None]
    for model, dtype in (("resnext50_32x4d", "float16"), ("resnet18", "float16")):
        assert set(networks.chains_of_model(model, 2, dtype)) == {None}
    assert set(networks.chains_of_model("resnet50", 2, "tfloat32")) == {None}


@pytest.mark.parametrize("gpu", architecture.ARCHITECTURES.values(), ids=lambda gpu: gpu.name)
def test_chain_candidates_fit(gpu: architecture.Architecture) -> None:
    """In shared memory and registers, by what was compiled; where nothing was, there is none."""
    compiled = {kind[0] for kind in compiler.current(CHAIN, gpu.capability[0]).chain}
    for problem in networks.chains_of_model("resnet50", 32, "float16"):
        first, *others = chain.candidates(problem, gpu)
        assert first.kernel == "convolutions"
        for choice in others:
            measured = problem.without_next() if choice.kernel == CHAIN_WITHOUT_NEXT else problem
            kernel = PAIR if choice.kernel == PAIR else CHAIN
            assert chain.programs_at_once(measured, gpu, choice.tile, kernel) >= 1
            assert chain.predicted(problem, gpu, choice) > problem.bytes_once / gpu.bandwidth
            assert chain.can_run(problem, gpu, choice.kernel, choice.tile)
            assert not chain.can_run(
                problem, gpu, choice.kernel, dataclasses.replace(choice.tile, num_stages=7)
            )
        assert bool(others) <= (gpu.capability[0] in compiled)
        best = tuning.untuned(problem, gpu)
        predicted = {str(one): chain.predicted(problem, gpu, one) for one in (first, *others)}
        assert predicted[str(best)] == min(predicted.values())


def test_a_chain_pays_where_bytes_bound() -> None:
    """On an H100: the first stage of a large batch, not a few pixels of many channels."""
    assert tuning.untuned(LAST_BLOCK, H100).kernel == "chain"
    few = dataclasses.replace(LAST_BLOCK, N=1, H=7, W=7, width=512, K=2048)
    assert tuning.untuned(few, H100).kernel == "convolutions"
    assert chain.predicted(BLOCK, H100, tuning.untuned(BLOCK, H100)) < 1e-3
    empty = dataclasses.replace(LAST_BLOCK, N=0)
    assert chain.predicted(empty, H100, chain.candidates(empty, H100)[1]) == estimate.LAUNCH


@pytest.mark.parametrize("gpu", architecture.ARCHITECTURES.values(), ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("batch", [1, 2, 8, 32, 256])
def test_the_fastest_candidate_runs_each_block(gpu: architecture.Architecture, batch: int) -> None:
    """From one image to many, on every GPU; overlapped only where a GPU can and it matters."""
    for problem in networks.chains_of_model("resnet50", batch, "float16"):
        choice = tuning.untuned(problem, gpu)
        every = chain.candidates(problem, gpu)
        least = min(chain.predicted(problem, gpu, one) for one in every)
        assert chain.predicted(problem, gpu, choice) == least
        assert chain.overlaps(problem, gpu) == (
            gpu.capability[0] in chain.OVERLAPPING and batch <= chain.OVERLAPPED_IMAGES
        )
        apart = chain.predicted_convolutions(problem, gpu, in_row=False)
        assert least <= apart
        if chain.overlaps(problem, gpu):
            assert chain.predicted_convolutions(problem, gpu, in_row=True) < apart


def test_a_pair_pays_between_chains_and_convolutions() -> None:
    """On an H100: for many pixels of the third stage, whose chain reads its weights too often.

    With its slices shared, for a few pixels too.
    """
    stage_3 = dataclasses.replace(LAST_BLOCK, H=14, W=14, width=256, K=1024, next_width=256)
    kinds = {one.kernel for one in chain.candidates(stage_3, H100)}
    assert kinds == set(CHAIN_KERNELS)
    assert tuning.untuned(stage_3, H100).kernel == PAIR
    few = dataclasses.replace(stage_3, N=1)
    shared = [one.tile.split_k for one in chain.candidates(few, H100) if one.kernel == PAIR]
    assert max(shared) > 1
    alone, *_, split = sorted(
        (one for one in chain.candidates(few, H100) if one.kernel == PAIR),
        key=lambda one: one.tile.split_k,
    )
    assert chain.predicted(few, H100, split) < chain.predicted(few, H100, alone)
    moved = stage_3.convolution.bytes_once + stage_3.bytes_of_pair
    assert moved == stage_3.bytes_once + 2 * stage_3.convolution.output_bytes


def test_chains_in_tables(tmp_path: Path, an_h100: architecture.Architecture) -> None:
    """Written, read and followed; a kernel or tile that a chain cannot have is not."""
    path = table.user_path(GPU)
    tile = chain.tiles(BLOCK, H100)[-1]
    table.merge(path, GPU, {BLOCK: table.Entry("chain", tile, 5.0), SMALL: LIBRARY_ENTRY})
    table.merge(path, GPU, {LAST_BLOCK: table.Entry("convolutions", None, 7.0)})
    assert table.read(path)[BLOCK] == table.Entry("chain", tile, 5.0)
    assert table.read(path)[LAST_BLOCK].kernel == "convolutions"
    tuning.reload()
    assert tuning.choose(BLOCK, CUDA) == Choice("chain", tile, MEASURED)
    assert tuning.choose(LAST_BLOCK, CUDA) == Choice("convolutions", None, MEASURED)
    too_large = dataclasses.replace(tile, block_m=512)
    table.merge(path, GPU, {BLOCK: table.Entry("chain", too_large, 5.0)})
    tuning.reload()
    assert tuning.choose(BLOCK, CUDA).source == ESTIMATE
    for fields in ({"kernel": "triton", "tile": None}, {"kernel": "chain", "tile": None}):
        text = document(choices={BLOCK.key: {"microseconds": 1.0, **fields}})
        path.write_text(text)
        with pytest.warns(UserWarning, match="damaged"):
            assert not table.read(path)


def test_a_chains_reference_is_float64() -> None:
    problem = dataclasses.replace(BLOCK, N=3)
    case = cases.make_chain_case(problem, CPU)
    assert [tuple(one.shape) for one in case.expected] == [(3, 128, 3, 3), (3, 64, 3, 3)]
    assert {one.dtype for one in case.expected} == {torch.float64}

    def eager(arguments: tuple, problem: ChainProblem) -> tuple[Tensor, ...]:
        return cases.eager_chain(arguments)

    assert cases.check(eager, case) is None
    for spoil, part in (
        (lambda out, after: (out, after * 1.01), "next: error"),
        (lambda out, after: (out * 1.01, after), "output: error"),
        (lambda out, after: (out[:2], after), "output: shape"),
        (lambda out, after: (out,), "1 outputs"),
        (lambda out, after: (out.nan_to_num(0.0), after), "NaN lost"),
    ):
        assert part in cases.check(lambda *both, spoil=spoil: spoil(*eager(*both)), case)


@pytest.mark.skipif(TRITON != "yes", reason=f"triton: {TRITON}")
def test_chains_pass_the_tuners_check() -> None:
    """Each kind of candidate, as the backend runs it; the fastest is written down."""
    device = CUDA if torch.cuda.is_available() else CPU
    gpu = architecture.of_device(device)
    tried = tuner.candidates(BLOCK, gpu, device)
    # Pairs are for wider blocks; any width can be run as one.
    tried.append(Choice(PAIR, Tile(32, 32, 32, 4, 4, 2), ESTIMATE))
    assert {choice.kernel for choice in tried} == set(CHAIN_KERNELS)
    choices = [next(one for one in tried if one.kernel == kernel) for kernel in CHAIN_KERNELS]
    seconds = {str(choices[1]): 2e-6}
    with fused_resnet.use_backend("triton"):
        result = tuner.tune(
            BLOCK, gpu, device, FakeTimer(lambda name: seconds.get(name, 1e-5)), choices=choices
        )
    assert not result.failures
    assert result.choice.kernel == "chain without next"
    assert result.entry().library_microseconds == 10.0


def test_dry_run_lists_blocks(run: Run) -> None:
    code, out, err = run("tune", "resnet50", "--dry-run", "--gpu", "h100", "--batch", "256")
    assert (code, err) == (0, "")
    assert "resnet50, batch 256, float16: blocks, predicted for H100, nothing was timed" in out
    assert "block 64x56x56 to 256" in out
    assert "chain 128x" in out


def test_tiles_are_those_of_the_version_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its record for the GPU's architecture, or by the nearest version that has one."""
    none: dict = {}
    recorded = {
        version: compiler.Compiled(
            version, {"conv": frozenset(majors), "chain": frozenset(), "pair": frozenset()},
            none, none, frozenset(spilled),
        )
        for version, majors, spilled in (
            ("3.6", {8}, set()),
            ("3.8", {8, 10}, {(10, "16 bits", False, 128, 128, 64, 4)}),
            ("3.10", {8, 10}, set()),
        )
    }  # fmt: skip
    monkeypatch.setattr(compiler, "known", lambda: tuple(recorded))
    monkeypatch.setattr(compiler, "recorded", recorded.__getitem__)
    monkeypatch.setattr(compiler, "nearest", compiler.nearest.__wrapped__)
    assert compiler.nearest("3.8", "conv", 10) == "3.8"
    assert compiler.nearest("3.7", "conv", 8) == "3.8"
    assert compiler.nearest("3.6", "conv", 10) == "3.8"
    assert compiler.nearest("3.9", "conv", 10) == "3.10"
    assert compiler.nearest("4.0", "conv", 8) == "3.10"
    assert compiler.nearest("3.5", "pair", 9) == "3.6"
    assert compiler.nearest(None, "conv", 9) == "3.10"

    blackwell = architecture.ARCHITECTURES["B200"]
    problem = ConvProblem(
        32, 512, 7, 7, 2048, 1, 1, (1, 1), (0, 0), (1, 1), 1, "float16", True, None
    )
    tile = Tile(128, 128, 64, 1, 4, 3)
    chosen = {}
    for version in ("3.8", "3.10"):
        monkeypatch.setattr(compiler, "running", lambda version=version: version)
        chosen[version] = tile in estimate.candidates(problem, blackwell)
    assert chosen == {"3.8": False, "3.10": True}


@pytest.mark.parametrize("version", compiler.known())
def test_records_of_tiles(version: str) -> None:
    """Each is written as it is read, and its tiles fit the GPUs they are for."""
    record = compiler.recorded(version)
    assert (compiler.FOLDER / f"triton-{version}.json").read_text() == compiler.text(record)
    largest = {
        major: max(
            gpu.shared_per_block
            for gpu in architecture.ARCHITECTURES.values()
            if gpu.capability[0] == major
        )
        for major in (8, 9, 10, 12)
    }
    for kernel, tiles, shapes in (
        ("chain", record.chain, chain.SHAPES),
        ("pair", record.pair, chain.PAIR_SHAPES),
    ):
        assert {kind[0] for kind in tiles} <= record.majors[kernel]
        for (major, width, *_), made in tiles.items():
            assert set(made) <= set(shapes[width])
            for registers, shared in made.values():
                assert 0 < registers <= 255
                assert 0 < shared <= largest[major]
    assert {key[0] for key in record.spilled} <= record.majors["conv"]


def test_predictions_do_not_depend_on_the_version_that_runs() -> None:
    """They are of one version's tiles: see `compiler.PREDICTED`."""
    assert compiler.PREDICTED in compiler.known()
    with compiler.as_of(compiler.NOTHING):
        inside = compiler.current(CHAIN, 9)
        with compiler.as_of(compiler.PREDICTED):
            assert compiler.current(CHAIN, 9).version == compiler.PREDICTED
        assert compiler.current(CHAIN, 9) is inside is compiler.NOTHING
        assert [one.kernel for one in chain.candidates(LAST_BLOCK, H100)] == ["convolutions"]
    assert compiler.current(CHAIN, 9) is not compiler.NOTHING
