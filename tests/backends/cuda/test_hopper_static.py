"""The machine code of the convolution for Hopper, compiled here: it needs no GPU."""

from __future__ import annotations

import functools
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
        "dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.whole), "float32"]
    ),
    pytest.mark.ahead(lambda dtype: compiled(dtype)),
]

REGISTERS = 168  # of each of 384 threads, which leaves the consumers 232


@dataclass(frozen=True)
class Kernel:
    """An instance of csrc/cuda/hopper/tiles.h."""

    size: int
    n: int
    cluster: int
    takes_turns: bool
    is_plain: bool  # whether it has the activations ReLU and none, or the others
    name: str
    listing: str
    instructions: list[str]

    @property
    def parts(self):
        """Products of 64 rows side by side."""
        return 2 if self.takes_turns else 1


def tiles():
    source = (ROOT / "csrc" / "cuda" / "hopper" / "tiles.h").read_text()
    rows = re.findall(r"^ +\{(\d), (\d+), \d+, (\d), Schedule::(\w+)\}", source, re.MULTILINE)
    return [
        (int(size), int(n), int(cluster), how == "kTakeTurns") for size, n, cluster, how in rows
    ]


@functools.cache
def compiled(dtype: str) -> tuple[str, list[Kernel]]:
    """What the compiler said, and every instance."""
    source = ROOT / "csrc" / "cuda" / "hopper" / f"hopper_conv_{dtype}.cu"
    said, parts = machine_code.compiled_for_hopper(source, CUOBJDUMP)
    found = {}
    for name, body, instructions in parts:
        index, activations = re.search(
            r"hopper_conv_bn_act\w*?Li(\d+)ELNS_11ActivationsE(\d)E", name
        ).groups()
        index, is_plain = int(index), activations == "0"
        found[index, is_plain] = Kernel(*tiles()[index], is_plain, name, body, instructions)
    size = 4 if dtype == "float32" else 2
    assert sorted({index for index, _ in found}) == [
        i for i, tile in enumerate(tiles()) if tile[0] == size
    ]
    assert {(index, not is_plain) for index, is_plain in found} == found.keys()
    return said, list(found.values())


def test_the_compiler_has_nothing_to_say(dtype, ahead):
    """Products are not serialised (C7510), nothing is spilled, and registers are as planned."""
    said, kernels = ahead()
    assert not re.findall(r"C75\d\d|warning|Warning", said), said
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes", said)
    assert spills == [("0", "0", "0")] * len(kernels)
    assert set(re.findall(r"Used (\d+) registers", said)) == {str(REGISTERS)}
    for kernel in kernels:
        assert not opcodes(kernel.instructions, "LDL", "STL")
        assert REGISTERS * 384 >= 40 * 128 + 232 * 256
        registers = [i.split()[-1] for i in kernel.instructions if "USETMAXREG" in i]
        assert sorted(map(lambda r: int(r, 0), registers)) == [40, 232]


def test_the_loop_only_multiplies_and_waits(dtype, ahead):
    """128 bytes of channels: four products of each part behind one fence, and one wait for all but
    these.
    """
    _, kernels = ahead()
    for kernel in kernels:
        code = kernel.instructions
        products = opcodes(code, "HGMMA")
        kind = {"float16": "16.F32", "bfloat16": "16.F32.BF16", "float32": "8.F32.TF32"}[dtype]
        assert products == [f"HGMMA.64x{kernel.n}x{kind}"] * (4 * kernel.parts)
        places = [i for i, x in enumerate(code) if "HGMMA" in x]
        last = next(i for i, x in enumerate(code) if "WARPGROUP.DEPBAR" in x)
        loop = code[places[0] : last + 1]
        assert "gsb0, 0x1" in code[last]
        assert not opcodes(loop, "LDS", "STS", "LDG", "STG", "BAR", "MEMBAR", "WARPSYNC", "BRA")
        assert len([x for x in loop if "WARPGROUP" in x]) == 1
        assert len([x for x in code if "WARPGROUP.ARRIVE" in x]) == 1
        # All issued in one go: what stands between costs less than a product takes.
        assert len(loop) < 24 * len(places)


def test_copies_are_the_hardwares(dtype, ahead):
    """TMA loads windows, filters and residual and stores outputs; threads load parameters alone."""
    _, kernels = ahead()
    for kernel in kernels:
        code = kernel.instructions
        loads = opcodes(code, "UTMALDG")
        multicast = ".MULTICAST" if kernel.cluster > 1 else ""
        assert sorted(loads) == ["UTMALDG.2D", f"UTMALDG.3D{multicast}", "UTMALDG.4D.IM2COL"]
        assert set(opcodes(code, "UTMASTG")) == {"UTMASTG.2D"}
        assert not opcodes(code, "STG", "LDGSTS")
        # Activations but the plain ones have a loop over columns.
        rounds = kernel.parts * (kernel.n // 16 if kernel.is_plain else 1)
        if dtype == "float32":
            # Two neighbours at a time, in both halves of 16 rows: stmatrix moves 16-bit elements.
            pairs = [store for store in opcodes(code, "STS") if store == "STS.64"]
            columns = kernel.n if kernel.is_plain else 8
            assert len(pairs) == kernel.parts * columns // 4
            assert not opcodes(code, "STSM", "LDSM")
        else:
            assert opcodes(code, "STSM") == ["STSM.16.M88.4"] * rounds
            assert opcodes(code, "LDSM") == ["LDSM.16.M88.4"] * rounds
        clusters = opcodes(code, "UCGABAR_ARV")
        assert len(clusters) == (2 if kernel.cluster > 1 else 0)


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
    entries = [e for e in report["entries"] if e["kernel"] == cuda_resources.HOPPER]
    for kernel in kernels:
        fields, threads, shared = cuda_resources.description(cuda_resources.demangled(kernel.name))
        fields |= {"architecture": cuda_resources.HOPPER_ARCHITECTURE}
        (entry,) = [e for e in entries if cuda_resources.identity(e) == fields]
        assert entry["registers"] == REGISTERS
        assert entry["stack_bytes"] == 0
        assert (entry["threads"], entry["shared_bytes"]) == (threads, shared)
        counted = cuda_resources.instructions(kernel.listing)
        counted |= cuda_resources.hopper_instructions(kernel.listing)
        assert {key: entry[key] for key in own} == {key: counted[key] for key in own}, fields
