"""The estimate: every tile it names fits, and its predictions are plausible."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tuning import GPUS, H100, model_problems, problems

from fused_resnet.tuning import (
    ConvProblem,
    Tile,
    architecture,
    compiler,
    estimate,
)
from fused_resnet.tuning.problem import DTYPES

pytestmark = pytest.mark.quick


def everywhere() -> Iterator[tuple[ConvProblem, architecture.Architecture]]:
    """Those on each kind of GPU: the H100's kin have its limits, and the RTX 5090 the 4090's."""
    kinds = [architecture.ARCHITECTURES[name] for name in ("A100", "H100", "B200", "RTX 4090")]
    for problem, batch, dtype in itertools.product(model_problems(), (1, 32, 256), DTYPES):
        changed = dataclasses.replace(problem, N=batch, dtype=dtype)
        for gpu in kinds:
            yield changed, gpu


def test_every_tile_of_every_layer_fits_everywhere() -> None:
    for problem, gpu in everywhere():
        tiles = estimate.candidates(problem, gpu)
        assert 1 <= len(tiles) == len(set(tiles)) <= 128, problem.key
        assert estimate.best(problem, gpu) in tiles
        for tile in tiles:
            assert estimate.shared_bytes(problem, gpu, tile) <= gpu.shared_per_block
            assert estimate.registers(problem, gpu, tile) <= 255
            assert 32 * tile.num_warps * estimate.registers(problem, gpu, tile) <= 65536
            assert tile.block_m >= 64
            assert tile.block_n >= 16
            assert tile.block_k >= 16
            assert tile.num_warps in (4, 8)
            assert all(
                size & (size - 1) == 0 for size in (tile.block_m, tile.block_n, tile.block_k)
            )
            if estimate.kernel_for(problem) != "conv":
                assert tile.split_k == 1


def test_kernels_of_the_models() -> None:
    kernels = {problem.groups: set() for problem in model_problems()}
    for problem in model_problems():
        kernel = estimate.kernel_for(problem)
        assert (kernel == "stem_pool") == (problem.C == 3)
        kernels[problem.groups].add(kernel)
        if kernel == "packed":
            assert problem.K // problem.groups < 32
            assert estimate.PACKED.block_n % (problem.K // problem.groups) == 0
    assert kernels == {
        1: {"conv", "stem_pool"},
        32: {"conv", "packed"},
        64: {"conv", "packed"},
    }


def test_shares_of_a_sum_are_not_empty() -> None:
    for problem in model_problems():
        for tile in estimate.candidates(problem, H100):
            if tile.split_k > 1:
                channels = problem.C // problem.groups
                steps = problem.R * problem.S * math.ceil(channels / tile.block_k)
                each = math.ceil(steps / tile.split_k)
                assert each >= 2
                assert (tile.split_k - 1) * each < steps


@given(problems(), st.sampled_from(GPUS))
def test_any_problem_has_a_tile(problem: ConvProblem, gpu: architecture.Architecture) -> None:
    tile = estimate.best(problem, gpu)
    assert estimate.fits(problem, gpu, tile)
    assert 0 < estimate.predicted(problem, gpu, tile) < math.inf


def test_small_batches_fill_the_gpu() -> None:
    """Where tiles are fewer than half the multiprocessors and sums are long, sums are shared."""
    shared = 0
    for problem in model_problems():
        tile = estimate.best(problem, H100)
        pixels = problem.P * problem.Q
        filters = problem.K // problem.groups
        tiles = math.ceil(pixels / 64) * problem.groups * math.ceil(filters / 64)
        depth = problem.C // problem.groups * problem.R * problem.S
        if estimate.kernel_for(problem) == "conv" and tiles < H100.multiprocessors / 2:
            programs = (
                math.ceil(pixels / tile.block_m)
                * problem.groups
                * math.ceil(filters / tile.block_n)
                * tile.split_k
            )
            assert programs > tiles or depth <= 1024, problem.key
            if depth >= 2048:
                assert tile.split_k > 1, problem.key
                assert programs >= H100.multiprocessors / 2, problem.key
                shared += 1
    assert shared >= 10


def test_full_gpus_do_not_share_sums() -> None:
    for problem in model_problems():
        large = dataclasses.replace(problem, N=256)
        assert estimate.best(large, H100).split_k == 1, problem.key


def test_l2_gives_what_was_measured() -> None:
    """5.5 to 6 TB/s of an H100 in all; one program by itself gets more than its share of that."""
    assert 5.5e12 <= estimate.l2_bandwidth(H100, 10**6) <= 6e12
    alone = estimate.l2_bandwidth(H100, 1)
    assert alone > estimate.l2_bandwidth(H100, 10**6) / H100.multiprocessors
    assert estimate.l2_bandwidth(H100, 7) == 7 * alone


def test_issuing_takes_time() -> None:
    """Four warps' instructions a cycle: each `mma.sync` is one, a warp group's are few."""
    arguments = ("float16", 8, 10, 0, 128 * 128 * 640, 0)
    hopper = estimate.instructions(H100, *arguments)
    assert estimate.instructions(H100, *arguments, mma=True) - hopper > 128 * 128 * 640 / 2048
    ampere = estimate.instructions(architecture.named("A100"), *arguments)
    assert ampere == estimate.instructions(H100, *arguments, mma=True)
    # 133 programs: one multiprocessor has two.
    assert estimate.issue_time(H100, 133, 4e6) == pytest.approx(2 * 1e6 / H100.clock)
    assert estimate.issue_time(H100, 132, 4e6) == pytest.approx(1e6 / H100.clock)


def test_a_program_alone_hides_nothing() -> None:
    """The same tile where a multiprocessor has room for one: each wave fills, and stores, alone."""
    problem = ConvProblem(256, 64, 56, 56, 256, 1, 1, (1, 1), (0, 0), (1, 1), 1, "float16", True)
    tile = Tile(128, 64, 64, 1, 4, 3)
    shared = estimate.shared_bytes(problem, H100, tile)
    lone = dataclasses.replace(H100, shared_per_multiprocessor=shared + 2048)
    assert estimate._resident(problem, lone, tile) == 1 < estimate._resident(problem, H100, tile)
    waves = 4 * 6272 // 132
    stores = 2 * 2 * 128 * 64 / (32 * H100.clock)
    slower = estimate.predicted(problem, lone, tile) - estimate.predicted(problem, H100, tile)
    assert slower > waves * (estimate.LATENCY + stores)


def test_large_layers_are_predicted_near_their_bounds() -> None:
    """Not slower than 4 times what bytes and FLOPs allow, and never faster."""
    for problem in model_problems():
        large = dataclasses.replace(problem, N=256)
        if estimate.kernel_for(large) != "conv":
            continue
        bound = max(large.bytes_once / H100.copy_bandwidth, large.flops / H100.rate(large.dtype))
        seconds = estimate.predicted(large, H100, estimate.best(large, H100))
        assert bound < seconds < 4 * bound, problem.key


@given(problems(), st.sampled_from(GPUS), st.sampled_from(["N", "C", "K"]))
def test_more_work_is_not_predicted_faster(
    problem: ConvProblem, gpu: architecture.Architecture, what: str
) -> None:
    larger = dataclasses.replace(problem, **{what: 2 * getattr(problem, what)})
    tile = estimate.best(problem, gpu)
    if estimate.kernel_for(larger) != estimate.kernel_for(
        problem
    ) or tile not in estimate.candidates(larger, gpu):
        return
    before = estimate.predicted(problem, gpu, tile)
    assert estimate.predicted(larger, gpu, tile) >= before * (1 - 1e-9)


def test_larger_batches_of_the_models_are_not_predicted_faster() -> None:
    for problem, gpu in itertools.product(model_problems(), GPUS):
        times = [
            estimate.predicted(p, gpu, estimate.best(p, gpu))
            for p in (dataclasses.replace(problem, N=batch) for batch in (1, 8, 32, 256))
        ]
        assert times == sorted(times), (problem.key, gpu.name, times)


def test_faster_gpus_are_predicted_faster() -> None:
    """With the tiles of one version: another may spill more of them on one GPU than on the next."""
    order = [architecture.named(name) for name in ("RTX 4090", "A100", "H100", "B200")]
    for problem in model_problems():
        large = dataclasses.replace(problem, N=256)
        with compiler.as_of(compiler.PREDICTED):
            times = [estimate.predicted(large, gpu, estimate.best(large, gpu)) for gpu in order]
        assert times == sorted(times, reverse=True), problem.key


def test_library_is_preferred_for_exact_float32_alone() -> None:
    heavy = ConvProblem(256, 256, 14, 14, 256, 3, 3, (1, 1), (1, 1), (1, 1), 1, "float32", False)
    assert estimate.prefers_library(heavy, H100)
    assert not estimate.prefers_library(dataclasses.replace(heavy, dtype="tfloat32"), H100)
    light = dataclasses.replace(heavy, C=64, R=1, S=1, padding=(0, 0), residual=True)
    assert not estimate.prefers_library(light, H100)


def test_sharing_costs_what_is_moved_and_no_launch() -> None:
    """But in float32, where no tickets are drawn; and as few read as there are tiles."""
    outputs, shares = 2**18, 8
    drawn = [estimate.predicted_sharing((outputs, tiles, shares), H100) for tiles in (8, 64, 132)]
    assert drawn == sorted(drawn, reverse=True)
    parts = 4 * outputs * shares
    alone = parts / (8 * estimate.L2_BYTES_PER_CYCLE * H100.clock)  # of eight multiprocessors
    assert alone < drawn[0] < 2 * alone + 2 * estimate.CACHE_LATENCY
    launched = estimate.predicted_sharing((outputs, 132, shares), H100, draws=False)
    apart = estimate.LAUNCH + 2 * (estimate.LATENCY - estimate.CACHE_LATENCY)
    assert launched - drawn[2] == pytest.approx(apart)
