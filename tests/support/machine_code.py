"""Kernels for Hopper, compiled by nvcc and listed by cuobjdump: neither needs a GPU."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import cuda_on_host, processes


def compiled_for_hopper(source: Path, cuobjdump: str) -> tuple[str, list[tuple[str, str, list]]]:
    """What the compiler says; of each kernel its mangled name, its listing and its instructions."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        said = _ran(
            "nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-DUSE_CUDA", "--expt-relaxed-constexpr",
            "-DTORCH_TARGET_VERSION=0x020b000000000000", "-arch=sm_90a", "-Xptxas=-v", "-cubin",
            f"-I{cuda_on_host.ROOT / 'csrc'}", "-isystem", cuda_on_host.TORCH / "include", source,
            "-o", cubin,
        )[1]  # fmt: skip
        listing = _ran(cuobjdump, "-sass", cubin)[0]
    found = []
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found.append((name.strip(), body, re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body)))
    return said, found


def _ran(*command: str | Path) -> tuple[str, str]:
    """What a command says on its output and on its error output."""
    environment = processes.current_environment()
    status, out, err = processes.run_command(command, 600, environment, processes.TESTS)
    assert status == 0, err
    return out, err


def opcodes(instructions: Sequence[str], *names: str) -> list[str]:
    """The instructions with one of these names, without predicate and operands."""
    found = (re.sub(r"^@\S+\s+", "", instruction).split()[0] for instruction in instructions)
    return [opcode for opcode in found if opcode.partition(".")[0] in names]
