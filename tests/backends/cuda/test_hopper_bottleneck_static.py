"""The machine code of the Bottleneck chain for Hopper, compiled here: it needs no GPU."""

from __future__ import annotations

import functools
import itertools
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from support import load_script, machine_code
from support.machine_code import opcodes

from fused_resnet import _native

ROOT = Path(__file__).parents[3]
cuda_resources = load_script(ROOT / "bench" / "cuda_resources.py")
CUOBJDUMP = cuda_resources.find_cuobjdump()

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump"),
    pytest.mark.parametrize(
        "dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.whole)]
    ),
    pytest.mark.ahead(lambda dtype: compiled(dtype)),
]

REGISTERS = 168  # of each of 384 threads, which leaves the consumers 232


@dataclass(frozen=True)
class Kernel:
    """An instance of csrc/cuda/hopper/bottleneck_tiles.h."""

    width: int
    next: int
    slice: int
    cluster: int
    name: str
    listing: str
    instructions: list[str]


def tiles():
    source = (ROOT / "csrc" / "cuda" / "hopper" / "bottleneck_tiles.h").read_text()
    rows = re.findall(r"^ +\{(\d+), (\d+), (\d+), \d+, (\d)\},", source, re.MULTILINE)
    return [tuple(map(int, row)) for row in rows]


@functools.cache
def compiled(dtype: str) -> tuple[str, list[Kernel]]:
    """What the compiler said, and every instance."""
    source = ROOT / "csrc" / "cuda" / "hopper" / f"hopper_bottleneck_{dtype}.cu"
    said, parts = machine_code.compiled_for_hopper(source, CUOBJDUMP)
    found = {}
    for name, body, instructions in parts:
        index = int(re.search(r"hopper_bottleneck\w*?Li(\d+)E", name)[1])
        found[index] = Kernel(*tiles()[index], name, body, instructions)
    assert sorted(found) == list(range(len(tiles())))
    return said, list(found.values())


def test_the_compiler_has_nothing_to_say(dtype, ahead):
    """Products are not serialised (C7510), nothing is spilled, and registers are as planned."""
    said, kernels = ahead()
    assert not re.findall(r"C75\d\d|warning|Warning", said), said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spills == [("0", "0", "0")] * len(kernels)
    assert set(re.findall(r"Used (\d+) registers", said)) == {str(REGISTERS)}
    assert REGISTERS * 384 >= 40 * 128 + 232 * 256
    for kernel in kernels:
        assert not opcodes(kernel.instructions, "LDL", "STL")
        code = kernel.instructions
        places = [i for i, x in enumerate(code) if "USETMAXREG" in x]
        parts = [code[begin:end] for begin, end in itertools.pairwise([*places, None])]
        budgets = {int(part[0].split()[-1], 0): part for part in parts}
        assert sorted(budgets) == [40, 232]
        for budget, part in budgets.items():
            named = (int(r) for x in part for r in re.findall(r"\bR(\d+)\b", x))
            assert max(named) < budget


def test_the_loops_only_multiply_and_wait(dtype, ahead):
    """Three of them: of the window, of a slice, and of what follows; four products in each.

    Behind one fence, and with one wait for all but these.
    """
    _, kernels = ahead()
    kind = {"float16": "16.F32", "bfloat16": "16.F32.BF16"}[dtype]
    for kernel in kernels:
        code = kernel.instructions
        sizes = [kernel.width, kernel.slice, kernel.next]
        products = opcodes(code, "HGMMA")
        assert products == [f"HGMMA.64x{n}x{kind}" for n in sizes for _ in range(4)]
        places = [i for i, x in enumerate(code) if "HGMMA" in x]
        for first, last_product in zip(places[::4], places[3::4], strict=True):
            last = next(
                i for i, x in enumerate(code) if i > last_product and "WARPGROUP.DEPBAR" in x
            )
            loop = code[first : last + 1]
            assert "gsb0, 0x1" in code[last]
            assert not opcodes(loop, "LDS", "STS", "LDG", "STG", "BAR", "MEMBAR", "WARPSYNC", "BRA")
            assert len([x for x in loop if "WARPGROUP" in x]) == 1
            assert len(loop) < 24 * 4
        assert len([x for x in code if "WARPGROUP.ARRIVE" in x]) == 3


def test_copies_are_the_hardwares(dtype, ahead):
    """TMA loads windows, filters and shortcut and stores outputs; threads load parameters alone."""
    _, kernels = ahead()
    for kernel in kernels:
        code = kernel.instructions
        multicast = ".MULTICAST" if kernel.cluster > 1 else ""
        loads = opcodes(code, "UTMALDG")
        assert set(loads) == {"UTMALDG.2D", f"UTMALDG.3D{multicast}", "UTMALDG.4D.IM2COL"}
        assert loads.count(f"UTMALDG.3D{multicast}") >= 3  # of the window, of a slice, of next
        assert set(opcodes(code, "UTMASTG")) == {"UTMASTG.2D"}
        assert not opcodes(code, "STG", "LDGSTS")
        # 16 columns at a time; what lies there is added to a slice alone.
        columns = kernel.width + kernel.slice + kernel.next
        assert opcodes(code, "STSM") == ["STSM.16.M88.4"] * (columns // 16)
        assert opcodes(code, "LDSM") == ["LDSM.16.M88.4"] * (kernel.slice // 16)
        assert len(opcodes(code, "UCGABAR_ARV")) == (2 if kernel.cluster > 1 else 0)


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
@pytest.mark.skipif(_native.cuda_operators is None, reason="no CUDA kernels to list tiles")
def test_the_report_is_of_these_kernels(dtype, ahead):
    """`bench/results/static/cuda.json`, which docs/hopper.md has its numbers from.

    Another compiler may make other code, but for the instructions that the source names.
    """
    _, kernels = ahead()
    report = json.loads(cuda_resources.REPORT.read_text())
    version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True)
    own = ["tensor_core"]
    if f"V{report['nvcc']}" in version.stdout:
        own += ["instructions", "loop_instructions", "asynchronous", "matrix_loads"]
        own += ["global_loads", "global_stores"]
    entries = [e for e in report["entries"] if e["kernel"] == cuda_resources.HOPPER_CHAIN]
    for kernel in kernels:
        fields, threads, shared = cuda_resources.description(cuda_resources.demangled(kernel.name))
        fields |= {"architecture": cuda_resources.HOPPER_ARCHITECTURE}
        (entry,) = [e for e in entries if cuda_resources.identity(e) == fields]
        assert entry["registers"] == REGISTERS
        assert entry["stack_bytes"] == 0
        assert (entry["threads"], entry["shared_bytes"]) == (threads, shared)
        counted = cuda_resources.instructions(kernel.listing)
        counted |= cuda_resources.hopper_instructions(kernel.listing, cuda_resources.HOPPER_CHAIN)
        assert {key: entry[key] for key in own} == {key: counted[key] for key in own}, fields
