"""Arithmetic whose bits are promised leaves nothing for the compiler to join."""

from __future__ import annotations

import collections
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]


def tool(name: str) -> str | None:
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ["PATH"], *(f"{home}/bin" for home in homes if home)]
    if (triton := importlib.util.find_spec("triton")) is not None:
        folders += [f"{path}/backends/nvidia/bin" for path in triton.submodule_search_locations]
    return shutil.which(name, path=os.pathsep.join(folders))


def operations(source: str, multiply_add: bool, folder: Path) -> dict[str, list[int]]:
    """How many FFMA, FMUL and FADD each kernel of a file has, compiled for sm_90."""
    cubin = folder / f"{multiply_add}.cubin"
    flags = ["-std=c++20", "-O3", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += ["-DUSE_CUDA", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"]
    flags += ["-isystem", str(Path(torch.__file__).parent / "include"), "-arch=sm_90", "-cubin"]
    flags += [f"-fmad={str(multiply_add).lower()}", "-o", str(cubin)]
    subprocess.run([tool("nvcc"), *flags, ROOT / "csrc/cuda" / source], check=True)
    listing = subprocess.run(
        [tool("cuobjdump"), "-sass", cubin], check=True, capture_output=True, text=True
    ).stdout
    found = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        count = collections.Counter(re.findall(r"\*/\s+(?:@\S+\s+)?(FFMA|FMUL|FADD)\b", body))
        found[name.strip()] = [count["FFMA"], count["FMUL"], count["FADD"]]
    return found


@pytest.mark.whole
@pytest.mark.skipif(tool("nvcc") is None, reason="no nvcc")
@pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump")
@pytest.mark.parametrize("source", ["batch_norm.cu", "batch_norm_cluster.cu"])
def test_batch_norm_is_the_same_without_contraction(source: str, tmp_path: Path) -> None:
    """Instances of a kernel agree to the bit, as no product and sum are left to be joined."""
    joined, apart = (operations(source, choice, tmp_path) for choice in (True, False))
    assert len(joined) >= 18
    assert sum(sum(count) for count in joined.values()) > 1000
    assert {name for name in joined if joined[name] != apart[name]} == set()
