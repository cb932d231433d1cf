"""What can be known of the CUDA kernels without a GPU: the machine code of every architecture."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

import fused_resnet
from fused_resnet import _native

LIBRARY = Path(fused_resnet.__file__).parent / "_cuda.abi3.so"
CUDA = _native.build_info()["cuda"]


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton ships."""
    triton = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin"
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ["PATH"], *(f"{home}/bin" for home in homes if home), str(triton)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


CUOBJDUMP = find_cuobjdump()

pytestmark = [
    pytest.mark.skipif(CUDA is None, reason="built without CUDA kernels"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump"),
]

BUILT_FOR = CUDA["architectures"] if CUDA else []
ARCHITECTURES = ["sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in BUILT_FOR]


@cache
def kernels(architecture: str) -> dict[str, list[str]]:
    """The instructions of every kernel, by mangled name."""
    command = [CUOBJDUMP, "-sass", "-arch", architecture, str(LIBRARY)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        found[name.strip()] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body)
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_every_kernel(architecture):
    names = {name.split("scale_shift_act_")[-1] for name in kernels(architecture)}
    first = {name.split("scale_shift_act_")[-1] for name in kernels(ARCHITECTURES[0])}
    assert names == first
    # Four dtypes, with and without a residual.
    assert sum("channels_last" in name for name in names) == 8


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_is_spilled(architecture):
    for name, instructions in kernels(architecture).items():
        local = [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)]
        assert not local, f"{name}: {local[:3]}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_aligned_paths_access_16_bytes(architecture):
    checked = 0
    for name, instructions in kernels(architecture).items():
        straddling = re.search(r"scale_shift_act_denseI\S*?Li(\d+)E", name)
        if "channels_last" not in name and not (straddling and int(straddling.group(1)) > 1):
            continue
        loads = [i for i in instructions if re.search(r"\bLDG\b.*\.128\b", i)]
        stores = [i for i in instructions if re.search(r"\bSTG\b.*\.128\b", i)]
        with_residual = "Lb1E" in name
        assert len(loads) == (2 if with_residual else 1) * len(stores) > 0, name
        if "channels_last" in name:
            narrow = [i for i in instructions if re.search(r"\bSTG\b", i) and ".128" not in i]
            assert not narrow, f"{name}: {narrow[:3]}"
        checked += 1
    assert checked == 16
