"""What can be known of the Triton kernels without a GPU: the machine code of every architecture.

`bench/triton_resources.py` compiles all that may be chosen, which takes half an hour; its report is
in the repository. Here some of it is compiled again, and all of the report is judged.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import math
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from support import run_python

from fused_resnet.tuning import compiler

BENCH = Path(__file__).parents[3] / "bench"
REPORTS = sorted((BENCH / "results" / "static").glob("triton-*.json"))
ARCHITECTURES = ["sm_80", "sm_90", "sm_100", "sm_120"]
# Compiled without --whole; of the others there are the reports.
COMPILED = "sm_90"
# In which dtypes what has no products is compiled: registers and accesses go by an element's size.
DTYPES = dict.fromkeys(ARCHITECTURES, ("float16",)) | {
    COMPILED: ("float16", "bfloat16", "float32"),
    "sm_100": ("float32",),
}
EVERY_ARCHITECTURE = [
    name if name == COMPILED else pytest.param(name, marks=pytest.mark.whole)
    for name in ARCHITECTURES
]
BYTE_CORES = {"sm_80": {"IMMA"}, "sm_90": {"IGMMA", "IMMA"}, "sm_100": {"UTCIMMA", "IMMA"}}
BYTE_CORES["sm_120"] = {"IMMA"}
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA"}
TILE = ["block_m", "block_n", "block_k", "num_warps", "num_stages"]
# What one program may have, bytes: CUDA C++ Programming Guide, technical specifications.
SHARED_LIMIT = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99}

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


NORM_KERNELS = ["statistics_kernel", "normalize_kernel", "backward_sums_kernel"]
NORM_KERNELS += ["backward_input_kernel", "combine_statistics_kernel", "combine_sums_kernel"]


def most_spilled() -> float:
    """Bytes of a thread that what is compiled now may spill.

    None where the running Triton's report is in the repository, and so was judged; eight, two
    registers, where it is not. By a Triton whose tiles are not all recorded, any number: the
    compiler is not what is tested.
    """
    if f"triton-{importlib.metadata.version('triton')}" in {path.stem for path in REPORTS}:
        return 0
    return 8 if is_recorded(compiler.running()) else math.inf


def is_recorded(version: str | None) -> bool:
    """Whether there is a record of a version's chains and convolutions on every architecture."""
    majors = {int(name.removeprefix("sm_")) // 10 for name in ARCHITECTURES}
    return version in compiler.known() and all(
        majors <= compiler.recorded(version).majors[kernel] for kernel in ("chain", "conv")
    )


def least_warps(allowed: float) -> int:
    """Warps that programs without products have on a multiprocessor, by the bytes that may spill.

    Another Triton takes a few registers more, after which there is room for a program less.
    """
    return 16 if allowed == 0 else 1


def test_records_that_are_whole() -> None:
    assert is_recorded("3.9")
    assert not is_recorded("1.0")
    assert not is_recorded(None)


def judge_norm(entry: dict, allowed: float = 0) -> None:
    """No spills, room for many programs, 16-byte accesses to whatever is as large as the input."""
    what = {k: v for k, v in entry.items() if not isinstance(v, dict)}
    loads, stores = dict(entry["global_loads"]), entry["global_stores"]
    assert entry["spilled_bytes"] <= allowed, what
    warps = entry["programs_per_multiprocessor"] * entry["num_warps"]
    assert warps >= least_warps(allowed), what
    assert not entry["tensor_core"], what
    kernel, add = entry["kernel"], entry["layer"] == "norm, add"
    # A thread's share of a step; what is left are per-channel vectors and a base of a slab.
    share = entry["block_m"] * entry["block_n"] // (32 * entry["num_warps"])
    share = share * (4 if entry["dtype"] == "float32" else 2) // 16
    tensors = {
        "statistics_kernel": (1, 0),
        "normalize_kernel": (1 + add, 1),
        "backward_sums_kernel": (2 + add, int(add)),
        "backward_input_kernel": (2, 1),
    }
    if kernel in tensors:
        read, written = tensors[kernel]
        assert loads["LDG.128"] >= read * share, (what, loads)
        # Statistics begin with three values of every channel.
        sampled = loads.pop("LDG.U16", 0) if kernel == "statistics_kernel" else 0
        assert sampled <= 3, (what, loads)
        assert set(loads) <= {"LDG.128", "LDG"}, (what, loads)
        assert stores.get("STG.128", 0) == written * share, (what, stores)
        if kernel in ("normalize_kernel", "backward_input_kernel"):
            assert stores.keys() == {"STG.128"}, (what, stores)
    else:
        assert kernel.startswith("combine_"), what
        assert loads["LDG.128"] >= share // 4, (what, loads)


def judge(entry: dict, allowed: float = 0) -> None:
    """No spills, within shared memory, tensor cores, 16-byte accesses."""
    what = {k: v for k, v in entry.items() if not isinstance(v, dict)}
    kernel, dtype = entry["kernel"], entry["dtype"]
    loads, stores = entry["global_loads"], entry["global_stores"]
    assert entry["spilled_bytes"] <= allowed, what
    assert entry["shared_bytes"] <= 1024 * SHARED_LIMIT[entry["architecture"]], what
    assert entry["programs_per_multiprocessor"] >= 1, what
    # A pair's partial sums leave as the tensor cores hold them, two float32 side by side.
    partial = {"STG.64"} if kernel == "bottleneck_kernel" and entry.get("split") else set()
    assert stores.keys() - partial == {"STG.128"}, (what, stores)
    if kernel == "sum_partials_kernel":
        assert loads["LDG.128"] > 0, (what, loads)
        return
    if dtype == "float32":
        assert not entry["tensor_core"], what
    else:
        assert any(
            name.startswith(TENSOR_CORES[entry["architecture"]][:4])
            for name in entry["tensor_core"]
        ), (what, entry["tensor_core"])
        if entry["architecture"] == "sm_90":
            assert entry["tensor_core"].keys() == {"HGMMA"}, what
    if kernel == "conv_kernel":
        copies = {name for name in loads if name.startswith("LDGSTS")}
        assert copies == {"LDGSTS.128"}, (what, loads)


def found_by(code: str) -> Any:
    """What code prints as JSON, in a process that compiles; `static` is the report's script."""
    head = f"""
import json, sys
sys.path.insert(0, {str(BENCH)!r})
import triton_resources as static
"""
    out = run_python(head + textwrap.dedent(code), TRITON_INTERPRET="0")
    return json.loads(out.splitlines()[-1])


@cache
def compiled(architecture: str) -> list[dict]:
    """The launches of some layers, compiled now."""
    return found_by(
        f"""
        from fused_resnet.tuning.estimate import best
        gpu = static.ARCHITECTURES[static.GPUS[{architecture!r}]]
        found = []
        for name in ("1x1", "3x3", "groups of 4", "stem and pool"):
            problem = static.LAYERS[name][-1].problem(32 if name != "3x3" else 1, "float16")
            tile = static.tile_for(problem, best(problem, gpu))
            for launch in static.launches(problem, tile):
                entry = static.compiled(launch, {architecture!r})
                entry |= dict(kernel=launch.kernel.fn.__name__, layer=name, dtype="float16")
                found.append(entry | dict(architecture={architecture!r}))
        print(json.dumps(found))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: compiled(architecture))
def test_what_compiles_now(architecture, ahead):
    entries = ahead()
    assert {entry["kernel"] for entry in entries} >= {
        "conv_kernel",
        "packed_conv_kernel",
        "stem_pool_kernel",
    }
    for entry in entries:
        judge(entry, most_spilled())


@cache
def chains_compiled(architecture: str) -> list[dict]:
    """A chain and a pair whose slices are shared, compiled now, apart and in a row."""
    return found_by(
        f"""
        gpu = static.ARCHITECTURES[static.GPUS[{architecture!r}]]
        rows = gpu.capability[0] in static.chain.OVERLAPPING
        found = []
        for kernel, kind in (("chain", (64, False, 64)), ("pair", (128, False, 128))):
            problem = static.chain_problem(*kind, 1, "float16")
            tile = static.Tile(64, 32, 64, 4, 4, 2)
            if kernel == "chain":
                tile = static.chain.tiles(problem, gpu)[-1]
            for dependent in (False, True) if rows else (False,):
                for launch in static.launches(problem, tile, kernel, dependent):
                    entry = static.compiled(launch, {architecture!r}, order=True)
                    entry |= dict(kernel=launch.kernel.fn.__name__, layer=kernel, dtype="float16")
                    entry |= dict(split=tile.split_k > 1)
                    found.append(entry | dict(architecture={architecture!r}, row=dependent))
        if rows:
            for name in ("1x1", "3x3"):
                problem = static.LAYERS[name][-1].problem(1, "float16")
                tile = static.best(problem, gpu)
                for launch in static.launches(problem, tile, dependent=True):
                    entry = static.compiled(launch, {architecture!r}, order=True)
                    entry |= dict(kernel=launch.kernel.fn.__name__, layer=name, dtype="float16")
                    found.append(entry | dict(architecture={architecture!r}, row=True))
        print(json.dumps(found))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: chains_compiled(architecture))
def test_chains_compile_now(architecture, ahead):
    entries = ahead()
    for entry in entries:
        judge(entry, most_spilled())
    apart = {(e["layer"], e["kernel"]) for e in entries if not e["row"]}
    assert apart >= {("chain", "bottleneck_kernel"), ("pair", "bottleneck_kernel")}


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("sm_100", marks=pytest.mark.whole)])
@pytest.mark.ahead(lambda architecture: chains_compiled(architecture))
def test_where_launches_in_a_row_wait(architecture, ahead):
    """In the machine code: weights are asked for, then the next launch let go, then the wait.

    And only behind it does anything load from memory or store there.
    """
    entries = ahead()
    kernels = {entry["kernel"] for entry in entries if entry["row"]}
    assert kernels == {"bottleneck_kernel", "conv_kernel", "sum_partials_kernel"}
    for entry in entries:
        order = entry["order"]
        if not entry["row"]:
            assert not {"prefetch", "trigger", "wait"} & set(order), entry["kernel"]
            continue
        wait = order.index("wait")
        before = order[:wait]
        assert before.count("trigger") == 1, order
        assert order.count("wait") == 1, order
        assert not {"load", "store"} & set(before), (entry["kernel"], order)
        assert {"load", "store"} <= set(order[wait:]), order
        asked = {"sum_partials_kernel": 0, "conv_kernel": 1}.get(entry["kernel"])
        asked = {"chain": 3, "pair": 2}[entry["layer"]] if asked is None else asked
        assert before.index("trigger") == before.count("prefetch") == asked, order


def norms_compiled(architecture: str) -> list:
    return found_by(
        f"""
        wanted = lambda layer: layer == "norm, add"
        print(json.dumps(list(static.norm_entries({architecture!r}, "float16", wanted))))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: norms_compiled(architecture))
def test_norms_compile_now(architecture, ahead):
    entries = ahead()
    assert {entry["kernel"] for entry in entries} == set(NORM_KERNELS)
    for entry in entries:
        judge_norm(entry, most_spilled())


def together_compiled(architecture: str) -> list:
    """Kernels of ResNet-50's rows: [layer, launches, entry] alone and within `folded.shared`."""
    out = run_python(
        f"""
        import json, sys
        sys.path.insert(0, {str(BENCH)!r})
        import triton_resources as static
        from fused_resnet.tuning.architecture import ARCHITECTURES
        gpu = ARCHITECTURES[static.GPUS[{architecture!r}]]
        found, entries = {{}}, []
        for (layer, tile), problem in static.row_configurations("float16", gpu).items():
            name = layer.split(", ")[1] + (" split" if tile.split_k > 1 else "")
            found.setdefault(name, (layer, tile, problem))
        wanted = ["chain 64", "3x3 split", "1x1 split", "pair 256 split", "pair 512 split", "1x1"]
        for name in wanted:
            if name not in found:
                continue
            layer, tile, problem = found[name]
            kernel = static.PAIR if "pair" in name else static.CHAIN
            for together in (False, True):
                launches = static.launches(problem, tile, kernel, True, False, together)
                entry = static.compiled(launches[0], {architecture!r})
                entries.append([name, len(launches), entry])
        print(json.dumps(entries))
        """,
        TRITON_INTERPRET="0",
    )
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("architecture", [COMPILED])
@pytest.mark.ahead(lambda architecture: together_compiled(architecture))
def test_what_launches_share_saves_instructions(architecture, ahead):
    """Norms that are folded take fewer, and no second launch adds up what is shared."""
    entries = ahead()
    assert {"chain 64", "3x3 split", "1x1"} <= {name for name, *_ in entries}
    pairs = zip(entries[::2], entries[1::2], strict=True)
    for (name, alone_count, alone), (_, count, together) in pairs:
        what = (name, alone, together)
        assert together["spilled_bytes"] <= most_spilled(), what
        assert together["tensor_core"] == alone["tensor_core"], what
        assert together["shared_bytes"] <= 1024 * SHARED_LIMIT[architecture], what
        assert count == 1, what
        if name.endswith("split"):
            assert alone_count == 2, what
        else:
            assert alone_count == 1, what
            assert together["instructions"] <= 0.92 * alone["instructions"], what
            loads = [entry["global_loads"].get("LDG.64", 0) for entry in (alone, together)]
            assert 2 * loads[1] <= loads[0], what


# What a program whose sum is shared does to memory around its ticket, in order: its threads' part,
# a barrier, the ticket by one thread, a barrier, and only then another's part.
_TICKET_PTX = ["st.global", "bar.sync", "atom.global.gpu.acq_rel.add", "bar.sync", "ld.global"]
_TICKET_SASS = ["STG", "BAR", "MEMBAR.GPU", "ATOMG", "CCTL.IVALL", "BAR", "LDG"]


def tickets_compiled(architecture: str) -> list:
    """Of a convolution and a pair whose sums are shared, all that `_TICKET_PTX` names; and SASS."""
    out = run_python(
        f"""
        import json, re, sys
        from dataclasses import replace
        sys.path.insert(0, {str(BENCH)!r})
        import triton_resources as static
        from fused_resnet.tuning.choice import Tile
        convolution = static.LAYERS["3x3"][1].problem(1, "float16")
        pair = static.chain_problem(256, False, 256, 1, "float16")
        entries = []
        for problem, tile, kernel in (
            (convolution, Tile(64, 64, 64, 4, 4, 3), static.CHAIN),
            (pair, Tile(32, 64, 64, 4, 8, 2), static.PAIR),
        ):
            (launch,) = static.launches(problem, tile, kernel, together=True)
            built, _, _ = static._built(launch, {architecture!r})
            words = r"st\\.global|bar\\.sync|atom\\.[\\w.]*add|ld\\.global(?:\\.nc)?"
            ptx = re.findall(words, built.asm["ptx"])
            words = r"\\b(STG|BAR|MEMBAR|ATOMG|CCTL\\.IVALL|LDG)([\\w.]*)"
            found = re.findall(words, static._cuobjdump(built, "-sass"))
            # Fences of a program of its own come besides.
            kept = [pair for pair in found if pair[0] != "MEMBAR" or ".GPU" in pair[1]]
            sass = [f"{{name}}.GPU" if name == "MEMBAR" else name for name, _ in kept]
            entries.append([ptx, sass])
        print(json.dumps(entries))
        """,
        TRITON_INTERPRET="0",
    )
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: tickets_compiled(architecture))
def test_a_ticket_is_fenced_on_both_sides(architecture, ahead):
    """In what Triton hands on, and in what is made of that."""
    for ptx, sass in ahead():
        tickets = [index for index, name in enumerate(ptx) if name.startswith("atom.")]
        assert len(tickets) == 1, ptx
        assert ptx[tickets[0] - 2 : tickets[0] + 2] == _TICKET_PTX[:4], ptx
        # What is known of the parts before the ticket must not be used behind it.
        assert "ld.global" in ptx[tickets[0] :], ptx
        assert "ld.global.nc" not in ptx[tickets[0] :], ptx
        assert sass.count("ATOMG") == 1, sass
        ticket = sass.index("ATOMG")
        assert sass[ticket - 3 : ticket + 4] == _TICKET_SASS, sass


EPILOGUES = ["silu", "hardswish", "gelu", "gelu_tanh"]


def epilogues_compiled(architecture: str) -> list:
    """The tile of which a warp has most, behind ReLU and behind what takes more registers."""
    out = run_python(
        f"""
        import json, sys
        sys.path.insert(0, {str(BENCH)!r})
        import triton_resources as static
        from fused_resnet.tuning.architecture import ARCHITECTURES
        gpu = ARCHITECTURES[static.GPUS[{architecture!r}]]
        problem = static.LAYERS["3x3"][1].problem(256, "float16")
        alone = [tile for tile in static.candidates(problem, gpu) if tile.split_k == 1]
        tile = max(alone, key=lambda tile: tile.block_m * tile.block_n // tile.num_warps)
        entries = []
        for activation in {["relu", *EPILOGUES]!r}:
            (launch,) = static.launches(problem, tile, activation=activation)
            entries.append([activation, str(tile), static.compiled(launch, {architecture!r})])
        print(json.dumps(entries))
        """,
        TRITON_INTERPRET="0",
    )
    return json.loads(out.splitlines()[-1])


@pytest.mark.whole
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.ahead(lambda architecture: epilogues_compiled(architecture))
def test_epilogues_spill_nothing(architecture, ahead):
    """Whatever the activation, a tile's sum stays in registers."""
    entries = ahead()
    instructions = {activation: entry["instructions"] for activation, _, entry in entries}
    assert instructions.keys() == {"relu", *EPILOGUES}
    for activation, tile, entry in entries:
        what = (activation, tile, entry)
        assert entry["spilled_bytes"] <= most_spilled(), what
        assert entry["programs_per_multiprocessor"] >= 1, what
        # It is there, else this would show nothing.
        assert (instructions[activation] > instructions["relu"]) == (activation != "relu"), what


def eight_bits_compiled(architecture: str) -> list:
    return found_by(
        f"""
        launches = [l for batch in (1, 256) for l in static.byte_launches(batch)]
        print(json.dumps([
            [launch.kernel.fn.__name__, dict(launch.constants).get("BLOCK_M"),
             static.compiled(launch, {architecture!r})]
            for launch in list(dict.fromkeys(launches))[::5]
        ]))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: eight_bits_compiled(architecture))
def test_eight_bits_compile_now(architecture, ahead):
    """No spills, tensor cores, wide accesses, and no multiply-add, which would round otherwise."""
    entries = ahead()
    judge_eight_bits(entries, architecture, BYTE_CORES[architecture])
    for name, block_m, entry in entries:
        what = (name, block_m, entry)
        assert entry["multiply_adds"] == 0, what
        if name == "byte_conv_kernel" and architecture == "sm_90" and block_m >= 64:
            assert entry["tensor_core"].keys() == {"IGMMA"}, what


def judge_eight_bits(entries, architecture, cores):
    """No spills, tensor cores and wide accesses."""
    assert {name for name, _, _ in entries} == {"store_bytes_kernel", "byte_conv_kernel"}
    for name, block_m, entry in entries:
        what = (name, block_m, entry)
        assert entry["spilled_bytes"] <= most_spilled(), what
        assert entry["shared_bytes"] <= 1024 * SHARED_LIMIT[architecture], what
        assert entry["global_stores"].keys() == {"STG.128"}, what
        if name == "byte_conv_kernel":
            assert entry["global_loads"]["LDGSTS.128"] >= 6, what
            assert entry["tensor_core"].keys() <= cores, what
            assert entry["tensor_core"], what


def float8_compiled(architecture: str) -> list:
    return found_by(
        f"""
        import torch
        dtype = torch.float8_e4m3fn
        launches = [l for batch in (1, 256) for l in static.byte_launches(batch, dtype)]
        print(json.dumps([
            [launch.kernel.fn.__name__, dict(launch.constants).get("BLOCK_M"),
             static.compiled(launch, {architecture!r})]
            for launch in list(dict.fromkeys(launches))[::5]
        ]))
        """
    )


# Triton knows these numbers from compute capability 8.9 on.
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE[1:])
@pytest.mark.ahead(lambda architecture: float8_compiled(architecture))
def test_float8_compiles_now(architecture, ahead):
    """As in int8, on tensor cores for float16; its sums may have multiply-adds behind them."""
    entries = ahead()
    judge_eight_bits(entries, architecture, {"HMMA", TENSOR_CORES[architecture]})
    for name, block_m, entry in entries:
        if name == "byte_conv_kernel" and architecture == "sm_90" and block_m >= 64:
            assert entry["tensor_core"].keys() == {"HGMMA"}, (name, block_m, entry)


def masks_compiled(architecture: str) -> list:
    return found_by(
        f"""
        dtypes = {DTYPES[architecture]!r}
        launches = [l for dtype in dtypes for l in static.masked_norm_launches(dtype)]
        print(json.dumps([
            [launch.kernel.__name__, static.compiled(launch, {architecture!r})]
            for launch in launches
        ]))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: masks_compiled(architecture))
def test_masks_compile_now(architecture, ahead):
    """Two norms in an add and back, its mask as bits: no spills, wide accesses but to bits."""
    entries = ahead()
    names = ["normalize_kernel", *["backward_sums_kernel", "backward_input_kernel"] * 3]
    assert [name for name, _ in entries] == len(DTYPES[architecture]) * names
    for name, entry in entries:
        assert entry["spilled_bytes"] <= most_spilled(), (name, entry)
        warps = entry["programs_per_multiprocessor"] * 4
        assert warps >= least_warps(most_spilled()), (name, entry)
        assert entry["global_loads"]["LDG.128"] >= 4, (name, entry)
        if name != "backward_sums_kernel":
            assert entry["global_stores"]["STG.128"] >= 2, (name, entry)


def norms_in_loads_compiled(architecture: str) -> list:
    return found_by(
        f"""
        from fused_resnet.tuning import prologue

        made = [
            static.launches(problem, tile, prologue=True)
            for problem in static.prologue_problems()
            for tile in prologue.tiles(static.ARCHITECTURES[static.GPUS[{architecture!r}]])[1:]
        ]
        print(json.dumps([static.compiled(launch, {architecture!r}) for launch, in made]))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: norms_in_loads_compiled(architecture))
def test_norms_in_the_loads_of_convolutions(architecture, ahead):
    """The tiles that may be chosen: no spills, tensor cores, accesses of 16 bytes."""
    entries = ahead()
    assert entries
    for entry in entries:
        assert entry["spilled_bytes"] <= most_spilled(), entry
        assert entry["shared_bytes"] <= 1024 * SHARED_LIMIT[architecture], entry
        assert entry["programs_per_multiprocessor"] >= 1, entry
        assert entry["tensor_core"], entry
        assert entry["global_loads"]["LDGSTS.128"] > 0, entry
        assert entry["global_stores"]["STG.128"] > 0, entry


def stems_compiled(architecture: str) -> list:
    return found_by(
        f"""
        found = []
        for dtype in {DTYPES[architecture]!r}:
            for launch in static.stem_training_launches(dtype):
                entry = static.compiled(launch, {architecture!r})
                entry |= dict(kernel=launch.kernel.fn.__name__, dtype=dtype)
                found.append(entry | dict(num_warps=launch.num_warps))
        print(json.dumps(found))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: stems_compiled(architecture))
def test_stems_in_training_compile_now(architecture, ahead):
    """No spills, room for many programs; whole accesses to every pixel of a window."""
    entries = ahead()
    names = ["norm_pool_kernel", "pool_backward_kernel"]
    assert [entry["kernel"] for entry in entries] == len(DTYPES[architecture]) * names
    for entry in entries:
        assert entry["spilled_bytes"] <= most_spilled(), entry
        warps = entry["programs_per_multiprocessor"] * entry["num_warps"]
        assert warps >= least_warps(most_spilled()), entry
        # A thread's share of 2048 elements, for each of 9 pixels or 4 windows.
        share = 2048 // (32 * entry["num_warps"]) * (4 if entry["dtype"] == "float32" else 2) // 16
        taps = 9 if entry["kernel"] == "norm_pool_kernel" else 4
        # Offsets are half as wide as the 16 bits, a quarter as wide as the 32 bits beside them.
        offsets = {} if taps == 9 else {"LDG.64": taps}
        assert entry["global_loads"]["LDG.128"] >= taps * share, entry
        assert {k: v for k, v in entry["global_loads"].items() if k != "LDG.128"} == offsets, entry
        stored = {"STG.128": share} | ({"STG.64": 1} if taps == 9 else {})
        assert entry["global_stores"] == stored, entry


def norms_at_ends_compiled(architecture: str) -> list:
    return found_by(
        f"""
        found = static.training_conv_launches("float16")
        chosen = found["3x3, none"][-3:-1] + found["3x3, norm"][-1:] + found["1x1, gradient"][-1:]
        print(json.dumps([static.compiled(launch, {architecture!r}) for launch in chosen]))
        """
    )


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.ahead(lambda architecture: norms_at_ends_compiled(architecture))
def test_norms_at_the_ends_of_convolutions(architecture, ahead):
    """The largest tile of each kind: no spills, tensor cores, copies and accesses of 16 bytes."""
    entries = ahead()
    assert len(entries) == 4
    for entry in entries:
        assert entry["spilled_bytes"] <= most_spilled(), entry
        assert entry["shared_bytes"] <= 1024 * SHARED_LIMIT[architecture], entry
        assert entry["programs_per_multiprocessor"] >= 1, entry
        assert entry["tensor_core"], entry
        assert entry["global_loads"]["LDGSTS.128"] > 0, entry
        assert entry["global_stores"]["STG.128"] > 0, entry


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_norms_in_the_report(path):
    """Every kernel for each architecture and dtype, judged as above."""
    found = set()
    for entry in json.loads(path.read_text())["entries"]:
        if entry["layer"].startswith("norm"):
            judge_norm(entry)
            found.add((entry["kernel"], entry["architecture"], entry["dtype"]))
    dtypes = ["float16", "bfloat16", "float32"]
    assert found == set(itertools.product(NORM_KERNELS, ARCHITECTURES, dtypes))


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_all_that_can_be_chosen_is_in_the_report(path):
    """Every tile that is chosen with that Triton, for each architecture and dtype, judged so."""
    version = ".".join(json.loads(path.read_text())["triton"].split(".")[:2])
    listed = found_by(
        f"""
        from fused_resnet.tuning import compiler
        with compiler.as_of({version!r}):
            print(json.dumps([
                (architecture, dtype, layer, tile.split_k > 1, *(getattr(tile, n) for n in {TILE}))
                for architecture, gpu in static.GPUS.items()
                for dtype in static.DTYPES
                for layer, tile in static.configurations(dtype, static.ARCHITECTURES[gpu])
            ]))
        """
    )
    wanted = {tuple(key) for key in listed}
    found = set()
    names = ["architecture", "dtype", "layer", "split", *TILE]
    for entry in json.loads(path.read_text())["entries"]:
        key = tuple(entry[name] for name in names)
        if key in wanted:
            judge(entry)
            found.add(key)
    missing = sorted(wanted - found)
    assert not missing, f"{len(missing)} are missing, such as {missing[:3]}"


def test_there_is_a_report():
    assert REPORTS, "python bench/triton_resources.py has not been run"
