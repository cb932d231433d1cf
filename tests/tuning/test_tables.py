"""Tuning without a GPU: problems, the estimate, tables on disk, the tuner's decisions, the command.

Times come from fake timers here, kernels from the library; what is under test is everything around
them.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODELS, Run
from torch import Tensor, nn

import fused_resnet
from fused_resnet import backends, tuning
from fused_resnet.backends import cudnn, library
from fused_resnet.measure import case as comparison
from fused_resnet.measure import networks
from fused_resnet.measure.tune import cases, race, tuner
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
    SHIPPED,
)
from fused_resnet.tuning.problem import DTYPES, ChainProblem, parse_problem

pytestmark = pytest.mark.quick

H100 = architecture.ARCHITECTURES["H100"]
GPUS = list(architecture.ARCHITECTURES.values())
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SMALL = ConvProblem(2, 8, 6, 6, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1, "float32", True)
STEM = ConvProblem(
    2, 3, 20, 20, 8, 7, 7, (2, 2), (3, 3), (1, 1), 1, "float32", False, (3, 3, 2, 2, 1, 1)
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the user's tables, or what another test chose."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path / "cache"))
    tuning.reload()
    yield
    tuning.reload()


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    groups = draw(st.sampled_from([1, 1, 1, 2, 8, 32]))
    R, S = draw(pairs(1, 7))
    dilation, padding = draw(pairs(1, 2)), draw(pairs(0, 3))
    problem = ConvProblem(
        draw(st.integers(1, 300)),
        groups * draw(st.integers(1, 300)),
        draw(st.integers(dilation[0] * (R - 1) + 1, 300)),
        draw(st.integers(dilation[1] * (S - 1) + 1, 300)),
        groups * draw(st.integers(1, 300)),
        R,
        S,
        draw(pairs(1, 3)),
        padding,
        dilation,
        groups,
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(st.sampled_from([None, None, (3, 3, 2, 2, 1, 1), (2, 3, 1, 2, 0, 1)])),
    )
    fits = min(problem.output_size) >= 1
    return problem if fits else dataclasses.replace(problem, pool=None)


@cache
def model_problems() -> tuple[ConvProblem, ...]:
    """Every distinct layer of the supported models at batch 1, in float16."""
    found: dict[ConvProblem, None] = {}
    for name in MODELS:
        found.update(dict.fromkeys(networks.of_model(name, 1, "float16")))
    return tuple(found)


def everywhere() -> Iterator[tuple[ConvProblem, architecture.Architecture]]:
    """Those on each kind of GPU: the H100's kin have its limits, and the RTX 5090 the 4090's."""
    kinds = [architecture.ARCHITECTURES[name] for name in ("A100", "H100", "B200", "RTX 4090")]
    for problem, batch, dtype in itertools.product(model_problems(), (1, 32, 256), DTYPES):
        changed = dataclasses.replace(problem, N=batch, dtype=dtype)
        for gpu in kinds:
            yield changed, gpu


# Problems


@given(problems())
def test_key_round_trip(problem: ConvProblem) -> None:
    assert parse_problem(problem.key) == problem
    assert "\n" not in problem.key


def test_key_is_stable() -> None:
    """What is on users' disks has to stay readable."""
    assert SMALL.key == "float32 2x8x6x6 k16 3x3 s1x1 p1x1 d1x1 g1 residual"
    assert STEM.key == "float32 2x3x20x20 k8 7x7 s2x2 p3x3 d1x1 g1 pool3x3,2x2,1x1"
    assert str(STEM) == "3x20x20 to 8, 7x7, stride 2, pool"


@pytest.mark.parametrize(
    "key", ["", "float32", SMALL.key + " ", SMALL.key.replace("float32", "float64"), "x" + STEM.key]
)
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="key is"):
        parse_problem(key)


@given(problems())
@settings(max_examples=50)
def test_sizes_are_torchs(problem: ConvProblem) -> None:
    with torch.device("meta"):
        input = torch.empty(problem.N, problem.C, problem.H, problem.W)
        weight = torch.empty(problem.K, problem.C // problem.groups, problem.R, problem.S)
        convolution = (problem.stride, problem.padding, problem.dilation, problem.groups)
        out = F.conv2d(input, weight, None, *convolution)
    assert out.shape[2:] == (problem.P, problem.Q)
    pool = problem.pool
    if pool is not None and min(problem.P, problem.Q) >= 3:
        pooled = F.max_pool2d(out, pool[0:2], pool[2:4], pool[4:6])
        assert pooled.shape[2:] == problem.output_size


def test_bytes_and_flops() -> None:
    problem = ConvProblem(2, 4, 8, 8, 6, 1, 1, (2, 2), (0, 0), (1, 1), 2, "float16", True)
    assert problem.flops == 2 * 2 * 6 * 4 * 4 * 2
    # A quarter of the pixels, the filters, shortcut and output, four float32 parameters a channel.
    assert problem.bytes_once == 2 * (2 * 4 * 16 + 6 * 2 + 2 * (2 * 6 * 16)) + 4 * 4 * 6


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_the_models_convolutions(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    found = networks.of_model(name, 4, "bfloat16")
    assert sum(found.values()) == len(convolutions)
    assert {(p.C, p.K, p.R, p.groups) for p in found} == {
        (c.in_channels, c.out_channels, c.kernel_size[0], c.groups) for c in convolutions
    }
    assert {(p.N, p.dtype) for p in found} == {(4, "bfloat16")}
    assert [p.output_size for p in found if p.pool is not None] == [(56, 56)]
    blocks = sum(type(m).__name__ in ("BasicBlock", "Bottleneck") for m in model.modules())
    assert sum(runs for p, runs in found.items() if p.residual) == blocks


# GPUs


def properties(name: str, **changed: object) -> SimpleNamespace:
    """As `torch.cuda.get_device_properties` of an H100 has them."""
    values = {
        "name": name,
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "clock_rate": 1980000,
        "memory_clock_rate": 2619000,
        "memory_bus_width": 5120,
        "shared_memory_per_block_optin": 227 * 1024,
        "shared_memory_per_multiprocessor": 228 * 1024,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "L2_cache_size": 50 * 2**20,
    }
    return SimpleNamespace(**{**values, **changed})


def test_known_gpus_have_their_published_figures() -> None:
    found = architecture.of_properties(properties("NVIDIA H100 80GB HBM3"))
    assert found.name == "NVIDIA H100 80GB HBM3"
    assert found.bandwidth == pytest.approx(H100.bandwidth, rel=1e-3)
    unnamed = dataclasses.replace(found, name="H100", bandwidth=H100.bandwidth)
    assert unnamed == H100
    # A slice has its share of the arithmetic; the driver here tells no memory clock.
    slice = properties(
        "NVIDIA H100 80GB HBM3 MIG 3g", multi_processor_count=66, memory_clock_rate=0
    )
    assert architecture.of_properties(slice).float16 == H100.float16 / 2
    pcie = architecture.of_properties(properties("NVIDIA H100 PCIe", multi_processor_count=114))
    assert pcie.float16 == 756e12


def test_unknown_gpus_are_like_their_kin() -> None:
    server = architecture.of_properties(properties("NVIDIA X", major=10, minor=3))
    assert server.float16 > H100.float16
    desktop = properties(
        "NVIDIA GeForce RTX 3090",
        major=8,
        minor=6,
        multi_processor_count=82,
        clock_rate=1695000,
        shared_memory_per_block_optin=99 * 1024,
    )
    # NVIDIA's Ampere GA102 whitepaper says 71 TFLOP/s.
    assert architecture.of_properties(desktop).float16 == pytest.approx(71e12, rel=0.05)


def test_names_of_gpus() -> None:
    assert architecture.named("h100") is H100
    assert architecture.named("rtx4090").name == "RTX 4090"
    assert architecture.named("H100-PCIe").multiprocessors == 114
    with pytest.raises(ValueError, match=r"'V100'.*A100"):
        architecture.named("V100")
    assert architecture.of_device(CPU) is H100


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_figures_are_plausible(gpu: architecture.Architecture) -> None:
    assert gpu.float16 >= 1.9 * gpu.tfloat32 >= 1.9 * gpu.float32
    assert gpu.shared_per_block < gpu.shared_per_multiprocessor <= 228 * 1024
    # Tensor cores do 512 to 8192 multiply-adds' worth of FLOP a cycle, always a power of two.
    a_cycle = gpu.float16 / gpu.multiprocessors / gpu.clock
    assert math.log2(a_cycle) == pytest.approx(round(math.log2(a_cycle)), abs=0.03)


# The estimate


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


# Tables


ENTRY = table.Entry(
    "triton", Tile(128, 64, 64, 2, 4, 3), 12.5, 14.0, 20.25, "2026-11-23", "torch 2"
)
LIBRARY_ENTRY = table.Entry("library", None, 3.0)
GPU = "NVIDIA H100 80GB HBM3"


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
    threads = [
        threading.Thread(target=_write_many, args=(path, 1 + 5 * index, 5)) for index in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
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


def document(**changed: object) -> str:
    fields = {"kernel": "library", "microseconds": 3.0}
    values = {"format": table.FORMAT, "gpu": GPU, "choices": {STEM.key: fields}}
    return json.dumps({**values, **changed})


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


# The choice


@pytest.fixture
def an_h100(monkeypatch: pytest.MonkeyPatch) -> architecture.Architecture:
    """`cuda:0` is an H100."""
    gpu = dataclasses.replace(H100, name=GPU)
    monkeypatch.setattr(architecture, "of_device", lambda device: gpu)
    return gpu


def test_choice_prefers_what_was_measured_here(
    an_h100: architecture.Architecture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    problem = model_problems()[2]
    shipped = tmp_path / "shipped"
    monkeypatch.setattr(table, "_SHIPPED", shipped)
    best = estimate.best(problem, an_h100)
    assert tuning.choose(problem, CUDA) == Choice("triton", best, ESTIMATE)

    fitting = Tile(64, 32, 64, 1, 4, 4)
    entry = table.Entry("triton", fitting, 1.0)
    table.merge(table.shipped_path(GPU), GPU, {problem: entry})
    assert tuning.choose(problem, CUDA).source == ESTIMATE  # remembered
    tuning.reload()
    assert tuning.choose(problem, CUDA) == Choice("triton", fitting, SHIPPED)

    table.merge(table.user_path(GPU), GPU, {problem: LIBRARY_ENTRY})
    tuning.reload()
    assert tuning.choose(problem, CUDA) == Choice("library", None, MEASURED)
    other = dataclasses.replace(problem, N=7)
    assert tuning.choose(other, CUDA).source == ESTIMATE
    assert tuning.choose(problem, CPU).source == ESTIMATE


def test_interpreted_kernels_are_never_left_to_the_library() -> None:
    for problem in model_problems():
        exact = dataclasses.replace(problem, N=256, dtype="float32")
        assert tuning.choose(exact, CPU).kernel == "triton"


def test_tables_cannot_ask_for_what_does_not_fit(an_h100: architecture.Architecture) -> None:
    problem = model_problems()[2]
    too_large = table.Entry("triton", Tile(256, 256, 128, 1, 4, 8), 1.0)
    table.merge(table.user_path(GPU), GPU, {problem: too_large})
    assert tuning.choose(problem, CUDA).source == ESTIMATE


def test_choice_is_cheap_and_reads_tables_once(
    an_h100: architecture.Architecture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Path] = []
    original = table.read
    monkeypatch.setattr(table, "read", lambda path: reads.append(path) or original(path))
    for problem in model_problems():
        tuning.choose(problem, CUDA)
    assert len(reads) == 2
    problem = model_problems()[0]
    times = []
    for _ in range(200):
        start = time.perf_counter()
        tuning.choose(problem, CUDA)
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 50e-6


def test_choice_from_many_threads(an_h100: architecture.Architecture) -> None:
    table.merge(table.user_path(GPU), GPU, dict.fromkeys(model_problems()[::2], LIBRARY_ENTRY))
    found: list[list[Choice]] = []

    def work() -> None:
        found.append([tuning.choose(problem, CUDA) for problem in model_problems()])

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert all(choices == found[0] for choices in found)
    assert {choice.source for choice in found[0]} == {MEASURED, ESTIMATE}


def test_a_damaged_table_does_not_stop_anyone(an_h100: architecture.Architecture) -> None:
    path = table.user_path(GPU)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert tuning.choose(SMALL, CUDA).source == ESTIMATE
    assert len(caught) == 1


# The tuner


class FakeTimer:
    """Answers with given seconds by candidate, and counts what it was asked."""

    def __init__(self, seconds: Callable[[str], float], stop_after: int | None = None) -> None:
        self.seconds = seconds
        self.rounds: dict[str, int] = {}
        self.asked: list[set[str]] = []
        self.stop_after = stop_after

    def __call__(
        self, calls: Mapping[str, Callable[[], object]], rounds: int
    ) -> dict[str, list[float]]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(set(calls))
        for name in calls:
            self.rounds[name] = self.rounds.get(name, 0) + rounds
        return {name: [self.seconds(name)] * rounds for name in calls}


def run_pooled(arguments: tuple, problem: ConvProblem) -> Tensor:
    return tuner._run_library(arguments, problem)


def fake_runner(**changes: Callable[[Tensor], Tensor]) -> Callable[[Choice], cases.Run]:
    """Every candidate computes what the library does, those named otherwise changed afterwards.

    A name is the start of a candidate's, with _ for what cannot be in a Python name.
    """

    def runner(choice: Choice) -> cases.Run:
        name = "".join(c if c.isalnum() else "_" for c in str(choice))
        for start, change in changes.items():
            if name.startswith(start):
                return lambda arguments, problem: change(run_pooled(arguments, problem))
        return run_pooled

    return runner


def tune(
    problem: ConvProblem = SMALL, timer: FakeTimer | None = None, **named: object
) -> tuner.Result:
    named = {"runner": fake_runner(), **named}
    return tuner.tune(problem, H100, CPU, timer or FakeTimer(lambda name: 1e-5), **named)


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


def drops_nan(out: Tensor) -> Tensor:
    return out.nan_to_num(0.0)


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
    """The whole way with `measure.interleave` as the timer; a slow candidate is not chosen."""

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


TRITON = backends.available()["triton"]


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


# The command


def test_dry_run_is_a_prediction(run: Run) -> None:
    code, out, err = run("tune", "resnet18", "--dry-run", "--gpu", "h200", "--batch", "1,32")
    assert (code, err) == (0, "")
    assert "resnet18, batch 1, float16: predicted for H200, nothing was timed" in out
    assert "resnet18, batch 32, float16: predicted for H200, nothing was timed" in out
    assert out.count("3x224x224 to 64, 7x7, stride 2, pool") == 2
    problem = dataclasses.replace(model_problems()[1], N=32)
    assert str(estimate.best(problem, architecture.named("H200"))) in out
    assert not Path(os.environ["FUSED_RESNET_CACHE"]).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_tuning_without_a_gpu_is_one_line(run: Run) -> None:
    code, out, err = run("tune", "resnet18")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("fused-resnet: --device is 'cuda', but torch")


def test_bad_arguments_of_tune(run: Run) -> None:
    for arguments, parts in (
        (("resnet19",), ("MODEL", "'resnet19'", "resnet18")),
        (("resnet18", "--batch", "1,x"), ("--batch", "'x'", "integer")),
        (("resnet18", "--batch", "0"), ("--batch", "0", "at least 1")),
        (("resnet18", "--batch", ""), ("--batch", "''")),
        (("resnet18", "--dtype", "float16,float64"), ("--dtype", "'float64'", "tfloat32")),
        (("resnet18", "--size", "8"), ("--size", "8", "32")),
        (("resnet18", "--device", "cpu"), ("--device", "'cpu'", "cuda:N")),
        (("resnet18", "--gpu", "H100"), ("--gpu", "'H100'", "--dry-run")),
        (("resnet18", "--dry-run", "--gpu", "V100"), ("--gpu", "'V100'", "A100")),
        ((), ("MODEL",)),
    ):
        code, out, err = run("tune", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1), (arguments, out, err)
        for part in parts:
            assert part in err, (arguments, err)


@pytest.fixture
def pretend_gpu(
    an_h100: architecture.Architecture, monkeypatch: pytest.MonkeyPatch
) -> Callable[[FakeTimer], None]:
    """Makes the command tune "on a GPU": tensors on the CPU, the library as every kernel."""
    monkeypatch.setattr(comparison, "check_device", lambda device: None)
    monkeypatch.setattr(backends, "available", lambda: {"triton": "yes"})
    original = cases.make_case
    monkeypatch.setattr(cases, "make_case", lambda problem, device: original(problem, CPU))
    wrong = {"cudnn": drops_nan}
    monkeypatch.setattr(tuner, "run_of", fake_runner(**wrong))

    def use(timer: FakeTimer) -> None:
        monkeypatch.setattr(race, "EventTimer", lambda device, flush_bytes: timer)

    return use


ON_SMALL_IMAGES = ("resnet18", "--size", 32, "--batch", 1, "--dtype", "tfloat32")


def test_tune_chooses_and_remembers(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], tmp_path: Path
) -> None:
    path = tmp_path / "table.json"
    favourite = "triton 64x32x32, 4 warps, 4 stages"
    seconds = {favourite: 4e-6, "library": 20e-6}
    timer = FakeTimer(lambda name: seconds.get(name, 10e-6))
    pretend_gpu(timer)
    code, out, err = run("tune", *ON_SMALL_IMAGES, "--table", path)
    assert code == 0, err
    assert "resnet18, batch 1, tfloat32" in out
    assert favourite in out
    assert "0.20" in out
    assert f"the library's {20 * 20} us" in out
    assert str(path) in out.replace("\n", "")
    kept = table.read(path)
    found = networks.of_model("resnet18", 1, "tfloat32", 32)
    assert set(kept) == set(found)
    chosen = {problem for problem, entry in kept.items() if entry.microseconds == 4.0}
    assert {str(kept[p].tile) for p in chosen} == {favourite.removeprefix("triton ")}
    assert len(chosen) >= 5
    if torch.backends.cudnn.is_available():
        assert "not used: cudnn_convolution_relu for" in out
        assert "NaN lost" in out

    asked = len(timer.asked)
    code, out, _ = run("tune", *ON_SMALL_IMAGES, "--table", path)
    assert code == 0
    assert f"{len(found)} layers were in the table already" in out
    assert len(timer.asked) == asked


def test_tune_interrupted(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], tmp_path: Path
) -> None:
    pretend_gpu(FakeTimer(lambda name: 1e-5, stop_after=9))
    code, out, err = run("tune", *ON_SMALL_IMAGES)
    assert (code, err) == (130, "")
    kept = table.read(table.user_path(GPU))
    assert f"interrupted after {len(kept)} of" in out
    assert 1 <= len(kept) < len(networks.of_model("resnet18", 1, "tfloat32", 32))


def test_tune_checks_its_table_first(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], tmp_path: Path
) -> None:
    timer = FakeTimer(lambda name: 1e-5)
    pretend_gpu(timer)
    foreign = tmp_path / "foreign.json"
    foreign.write_text(document(format="fused_resnet.tuning/9"))
    (tmp_path / "file").touch()
    for path in (foreign, tmp_path / "file" / "t.json"):
        code, out, err = run("tune", *ON_SMALL_IMAGES, "--table", path)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert "--table cannot be written" in err
    assert not timer.asked


def test_tune_needs_triton(
    run: Run, pretend_gpu: Callable[[FakeTimer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "available", lambda: {"triton": "no such luck"})
    code, _, err = run("tune", "resnet18")
    assert (code, err.count("\n")) == (2, 1)
    assert "cannot run: no such luck" in err


# Chains

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
