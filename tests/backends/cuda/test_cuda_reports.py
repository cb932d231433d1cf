"""What `bench/results/static` says of the CUDA kernels is about these kernels, and is good."""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from backends.cuda import mutate_cuda
from support import cuda_on_host, load_script, processes

from fused_resnet import _native, backends
from fused_resnet.tuning import basic_block

ROOT = Path(__file__).parents[3]
cuda_resources = load_script(ROOT / "bench" / "cuda_resources.py")

STATIC = json.loads((ROOT / "bench" / "results" / "static" / "cuda.json").read_text())
MUTANTS = mutate_cuda.read_report()

on_host = pytest.mark.skipif(not backends.cuda.on_host(), reason="for the kernels on the host")


def test_nothing_is_spilled_and_a_block_fits():
    for entry in STATIC["entries"]:
        what = {k: v for k, v in entry.items() if not isinstance(v, dict)}
        assert entry["stack_bytes"] == 0, what
        # Tiles of whole blocks are for the shared memory of one architecture or another.
        if entry["kernel"] != "basic_block":
            assert entry["blocks_per_multiprocessor"] >= 1, what


def test_a_kernel_has_the_same_shared_memory_everywhere():
    """What the driver takes of every block is no kernel's, counted by the compiler or not."""
    found = {}
    for entry in STATIC["entries"]:
        kernel = cuda_resources.identity(entry)
        del kernel["architecture"]
        found.setdefault(tuple(kernel.items()), set()).add(entry["shared_bytes"])
    assert all(len(sizes) == 1 for sizes in found.values()), found
    assert max(len(kernel) for kernel in found) > 3


def test_blocks_of_a_multiprocessor():
    """By shared memory: 228 KiB of compute capability 9.0, of which the driver takes 1 a block."""
    limits = cuda_resources.LIMITS["sm_90"]
    assert limits.shared_bytes == 228 * 1024
    for kib, blocks in ((75, 3), (113, 2)):
        assert cuda_resources.resident(limits, 128, 32, kib << 10) == blocks
        assert cuda_resources.resident(limits, 128, 32, (kib << 10) + 1) == blocks - 1


def test_every_tile_of_a_basic_block_is_listed():
    """In both dtypes, on tensor cores, in whole accesses; what the model takes of them is so."""
    entries = [entry for entry in STATIC["entries"] if entry["kernel"] == "basic_block"]
    assert len(entries) == 2 * len(basic_block.SHAPES) * len(STATIC["architectures"])
    by_tile = {shape.tile.block_m + shape.warps: shape for shape in basic_block.SHAPES}
    assert len(by_tile) == len(basic_block.SHAPES)
    fitting = set()
    for entry in entries:
        shape = by_tile[entry["block_m"] + entry["num_warps"]]
        assert entry["num_stages"] == shape.stages
        assert entry["shared_bytes"] == shape.shared_bytes, entry
        assert entry["registers"] <= shape.registers, entry
        assert entry["global_stores"].keys() == {"STG.128"}, entry
        # The rest are the norms' parameters and the weights' addresses.
        assert entry["global_loads"]["LDGSTS.128"] >= 3, entry
        if entry["blocks_per_multiprocessor"]:
            fitting.add((entry["architecture"], entry["block_m"]))
    smallest = min(shape.tile.block_m for shape in basic_block.SHAPES)
    for architecture in {entry["architecture"] for entry in entries}:
        assert {(architecture, smallest), (architecture, 196)} <= fitting


@pytest.mark.skipif(_native.cuda_operators is None, reason="nothing to read conv_tiles.h with")
def test_every_instance_is_listed():
    numbers = _native.cuda_operators.conv_tiles()
    tiles = Counter()
    for at in range(0, len(numbers), 7):
        row = tuple(numbers[at : at + 7])
        dtypes, has_two_instances = 1 if row[0] else 2, row[0] > 0 or row[3] < 64
        tiles[row] += dtypes * (1 + has_two_instances)
    kinds = (
        ("tensor cores", "tensor cores, tf32", "multiply-adds"),
        ("vectors", "elements", "diagonal"),
    )
    fields = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    architectures = {entry["architecture"] for entry in STATIC["entries"]}
    architectures.remove(cuda_resources.HOPPER_ARCHITECTURE)
    named = {f"sm_{name.removesuffix('+PTX').replace('.', '')}" for name in STATIC["architectures"]}
    assert architectures == named
    assert len(architectures) >= 5
    for architecture in architectures:
        listed = Counter(
            (
                kinds[0].index(entry["products"]),
                kinds[1].index(entry["loads"]),
                *(entry[field] for field in fields),
            )
            for entry in STATIC["entries"]
            if entry["architecture"] == architecture and entry["kernel"] == "conv_bn_act"
        )
        assert listed == tiles, architecture


@pytest.mark.skipif(_native.cuda_operators is None, reason="no CUDA kernels to list tiles")
def test_every_instance_for_hopper_is_listed():
    """In both 16-bit dtypes or in float32, for compute capability 9.0a alone, within its budget."""
    numbers = _native.cuda_operators.hopper_conv_tiles()
    expected = Counter()
    for at in range(0, len(numbers), 6):
        size, n, stages, cluster, turns, shared = numbers[at : at + 6]
        for dtype in ("float16", "bfloat16") if size == 2 else ("float32",):
            schedule = cuda_resources.SCHEDULES[turns]
            expected[dtype, n, stages, cluster, schedule, shared] += 2  # plain activations, others
    listed = Counter()
    for entry in STATIC["entries"]:
        if entry["kernel"] != cuda_resources.HOPPER:
            continue
        assert entry["architecture"] == "sm_90a"
        names = ("dtype", "block_n", "num_stages", "cluster", "schedule", "shared_bytes")
        listed[tuple(entry[name] for name in names)] += 1
        assert entry["blocks_per_multiprocessor"] == 1
        assert (entry["registers"], entry["threads"]) == (168, 384)
        # Of 128 bytes of channels: four products for each 64 rows of a consumer.
        rows = 128 if entry["schedule"] == "turns" else 64
        assert sum(entry["tensor_core"].values()) == 4 * rows // 64
        assert entry["loop_instructions"] < entry["instructions"]
    assert listed == expected


@pytest.mark.skipif(_native.cuda_operators is None, reason="no CUDA kernels to list tiles")
def test_every_instance_of_hoppers_chain_is_listed():
    """In both 16-bit dtypes, for compute capability 9.0a alone, within its budget."""
    expected = Counter()
    for row in cuda_resources.chain_tiles():
        expected.update((dtype, *row) for dtype in ("float16", "bfloat16"))
    listed = Counter()
    for entry in STATIC["entries"]:
        if entry["kernel"] != cuda_resources.HOPPER_CHAIN:
            continue
        assert entry["architecture"] == "sm_90a"
        names = ("width", "next_width", "block_n", "num_stages", "cluster", "shared_bytes")
        listed[(entry["dtype"], *(entry[name] for name in names))] += 1
        assert entry["blocks_per_multiprocessor"] == 1
        assert (entry["registers"], entry["threads"]) == (168, 384)
        # Of 128 bytes of depth of a window, of a slice and of what follows, for 64 rows.
        assert sum(entry["tensor_core"].values()) == 3 * 4
        assert len(entry["loop_instructions"]) == 3
    assert listed == expected


def test_what_the_page_of_hopper_says():
    """The tables of the machine code, and the model's instructions of a step."""
    page = cuda_resources.HOPPER_PAGE.read_text()
    _, _, rest = page.partition(cuda_resources.HOPPER_BEGIN)
    table, _, _ = rest.partition(cuda_resources.HOPPER_END)
    assert table.strip().splitlines() == cuda_resources.hopper_table(STATIC["entries"])
    table = page.partition(cuda_resources.CHAIN_BEGIN)[2].partition(cuda_resources.CHAIN_END)[0]
    assert table.strip().splitlines() == cuda_resources.chain_table(STATIC["entries"])
    loops = {
        entry["cluster"]: entry["loop_instructions"]
        for entry in STATIC["entries"]
        if entry["kernel"] == cuda_resources.HOPPER
        and (entry["block_n"], entry["dtype"]) == (256, "float16")
        and entry["activations"] == "plain"
    }
    alone, both = loops[1], loops[2]
    (row,) = [line for line in page.splitlines() if line.startswith("| instructions, of 4 a cycle")]
    assert row.split("|")[3:5] == [f" {8 * alone // 4} ", f" {8 * both // 4} "]
    assert f"{alone} ({both}) in the loop of each of eight warps" in page


def test_tensor_cores_and_wide_accesses():
    for entry in STATIC["entries"]:
        if entry["kernel"] != "conv_bn_act":
            continue
        what = {k: v for k, v in entry.items() if not isinstance(v, dict)}
        assert bool(entry["tensor_core"]) == (entry["products"] != "multiply-adds"), what
        assert entry["global_stores"]["STG.128"] > 0, what
        assert (entry["global_loads"].get("LDGSTS.128", 0) > 0) == (
            entry["loads"] != "elements" or "LDGSTS.128" in entry["global_loads"]
        ), what


def test_every_kernel_of_batch_norm_is_listed():
    """Six kernels, four in every dtype, whole and by elements; for kinds of residual and mask."""
    listed = Counter()
    for entry in STATIC["entries"]:
        if entry["kernel"].startswith("batch_norm") and "cluster" not in entry:
            listed[entry["architecture"]] += 1
            if entry.get("elements", 1) > 1:
                masks = entry["kernel"] == "batch_norm_normalize" and entry.get("mask") == "bits"
                bits = {"STG.U8"} if masks else set()
                assert entry["global_stores"].keys() == {"STG.128"} | bits, entry
                assert entry["global_loads"]["LDG.128"] >= 2, entry
                if entry.get("narrow"):
                    assert {"LDG", "LDG.64"} <= entry["global_loads"].keys(), entry
    assert len(listed) == len(STATIC["architectures"])
    assert set(listed.values()) == {3 * 2 * (1 + 4 + 2 * 4) + 2}


def test_kernels_of_clusters_are_listed():
    """Forward with and without a mask, backward with four kinds, in every dtype, without spills."""
    listed = Counter()
    for entry in STATIC["entries"]:
        if "cluster" in entry and entry["kernel"].startswith("batch_norm"):
            listed[entry["architecture"]] += 1
            assert entry["stack_bytes"] == 0, entry
            assert entry["blocks_per_multiprocessor"] >= 2, entry
            assert entry["global_loads"]["LDGSTS.128"] >= 1, entry
    assert listed == {"sm_90": 18, "sm_100": 18, "sm_120": 18}


def test_mutants_are_caught():
    entries = MUTANTS["entries"]
    outcomes = Counter(entry["outcome"] for entry in entries)
    assert outcomes["caught"] + outcomes["survived"] >= 100
    for entry in entries:
        if entry["outcome"] == "survived":
            assert entry.get("why"), f"not explained: {entry}"
    assert mutate_cuda.share_caught(entries) >= 0.95
    for file, least in (
        (mutate_cuda.BATCH_NORM, 40),
        (mutate_cuda.BATCH_NORM_ARITHMETIC, 30),
        (mutate_cuda.BATCH_NORM_CLUSTER, 70),
    ):
        outcomes = [e["outcome"] for e in entries if e["file"] == file]
        assert outcomes.count("caught") + outcomes.count("survived") >= least
    of_basic_blocks = [e["outcome"] for e in entries if e["file"] == mutate_cuda.BASIC_BLOCK]
    assert of_basic_blocks.count("caught") >= 20


def test_mutants_are_of_these_kernels():
    """Lines may have changed since, but not most of them."""
    current = {mutant.key for mutant in mutate_cuda.sample(MUTANTS["seed"])}
    known = [mutate_cuda.key_of(entry) in current for entry in MUTANTS["entries"]]
    assert sum(known) >= 0.8 * len(known)


@pytest.mark.parametrize(
    ("selected", "outcome"),
    [("passes", "survived"), ("fails", "caught"), ("dies", "caught"), ("not passes", "caught")],
)
def test_a_library_is_judged_by_tests_that_ran(selected, outcome, tmp_path, monkeypatch):
    suite = suite_of_its_own(tmp_path, selected)
    monkeypatch.setattr(cuda_on_host, "load_library", lambda library: None)
    found, noticed = mutate_cuda.run_suite(suite, tmp_path / "library.so")
    assert found == outcome
    how = {"fails": "AssertionError: because", "dies": "SIGABRT"}
    if selected in how:
        assert noticed["by"] == f"test_{selected}"
        assert noticed["how"].startswith(how[selected])


@pytest.mark.parametrize(("selected", "outcome"), [("computes", "survived"), ("sleeps", "caught")])
def test_only_what_does_not_compute_is_never_done(selected, outcome, tmp_path, monkeypatch):
    """However long it takes: other processes may have the processor."""
    suite = suite_of_its_own(tmp_path, selected)
    monkeypatch.setattr(cuda_on_host, "load_library", lambda library: None)
    monkeypatch.setattr(mutate_cuda, "PATIENCE", 1)
    begin = time.monotonic()
    found, noticed = mutate_cuda.run_suite(suite, tmp_path / "library.so")
    assert time.monotonic() - begin > 2
    assert found == outcome
    assert noticed.get("how") == ("time limit" if outcome == "caught" else None)


@pytest.mark.parametrize("selected", ["skips", "no test of this name", "not judged"])
def test_no_verdict_where_no_test_ran(selected, tmp_path, monkeypatch):
    """A folder's name too is a word that selects: "judged" leaves no test here."""
    suite = suite_of_its_own(tmp_path / "judged", selected)
    monkeypatch.setattr(cuda_on_host, "load_library", lambda library: None)
    with pytest.raises(mutate_cuda.VerdictError):
        mutate_cuda.run_suite(suite, tmp_path / "library.so")


def test_a_library_that_does_not_load_is_not_caught(tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(b"no library")
    suite = suite_of_its_own(tmp_path, "passes")
    assert mutate_cuda.run_suite(suite, library) == ("does not load", {})


@pytest.mark.parametrize(
    ("file", "only", "survivors", "gone"),
    [
        ("", "", False, [2]),
        ("", "", True, [0, 2, 3]),
        ("a.cuh", "", True, [0, 2]),
        ("a.cuh", "fence", True, [0]),
        ("", "wait", True, [2, 3]),
        ("", "wait", False, [2]),
    ],
)
def test_which_mutants_are_judged_again(file, only, survivors, gone):
    rows = [
        ("a.cuh", "fence();", "survived"),
        ("a.cuh", "fence();", "caught"),
        ("a.cuh", "wait(old);", "caught"),
        ("b.cuh", "wait(0);", "survived"),
    ]
    entries = [
        {"file": name, "line": line, "occurrence": i, "mutant": ";", "outcome": outcome}
        for i, (name, line, outcome) in enumerate(rows)
    ]
    current = {mutate_cuda.key_of(entry) for entry in entries if entry["line"] != "wait(old);"}
    kept = mutate_cuda.still_true(entries, current, file, only, survivors)
    assert [i for i, entry in enumerate(entries) if entry not in kept] == gone


def suite_of_its_own(folder, selected):
    folder.mkdir(exist_ok=True)
    (folder / "test_own.py").write_text(
        "import os, time, pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False, 'because'\n"
        "def test_dies(): os.abort()\n"
        "def test_skips(): pytest.skip('no')\n"
        "def test_computes():\n"
        "    while time.process_time() < 3: pass\n"
        "def test_sleeps(): time.sleep(600)\n"
    )
    return mutate_cuda.Suite("none.cu", str(folder / "test_own.py"), selected)


@on_host
@pytest.mark.slow
@pytest.mark.ahead(
    lambda: processes.run_command(
        [sys.executable, mutate_cuda.__file__, "--check", "2"],
        600,
        processes.current_environment(),
        processes.TESTS,
    )
)
def test_some_mutants_again(ahead):
    status, out, err = ahead()
    assert status == 0, out + err
    assert len(re.findall("^caught: ", out, re.MULTILINE)) == 2
