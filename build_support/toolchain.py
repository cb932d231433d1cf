"""What a build finds on the machine: torch, nvcc, the CUDA architectures and the number of jobs."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools.errors import BaseError

OLDEST_TORCH = "2.11"
# 11.0 runs none of the others' machine code, and no PTX but that of 10.0 or before.
DEFAULT_ARCHITECTURES = "8.0 8.6 9.0 10.0+PTX 12.0+PTX"

# torch.utils.cpp_extension's names for TORCH_CUDA_ARCH_LIST.
NAMED_ARCHITECTURES = {
    "Volta": "7.0+PTX",
    "Turing": "7.5+PTX",
    "Ampere": "8.0 8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 12.0+PTX",
}


class BuildError(BaseError):
    """A build that cannot go on; the message says what to change. Shown without a traceback."""


@dataclass(frozen=True)
class Torch:
    """A torch to build against: its directory, which holds include/ and lib/, and its versions."""

    root: Path
    version: str
    cuda: str | None

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor version."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler that runs, its version and the virtual architectures it knows ("90")."""

    path: str
    version: str
    architectures: tuple[str, ...]


def read_torch(root: Path) -> Torch | None:
    """The torch in `root`, or None if it is too old or has no headers.

    Reads `version.py` alone: importing torch would need everything torch itself imports, which an
    isolated build does not have.
    """
    if not (root / "version.py").is_file() or not (root / "include" / "torch").is_dir():
        return None
    values = runpy.run_path(str(root / "version.py"))
    torch = Torch(root, values["__version__"], values.get("cuda"))
    oldest = tuple(int(part) for part in OLDEST_TORCH.split("."))
    return torch if torch.release >= oldest else None


def find_torch() -> Torch | None:
    """The torch of this interpreter, or that of the environment around an isolated build.

    pip isolates a build through PYTHONPATH, so the same interpreter with `-I` sees the outer
    environment.
    """
    spec = importlib.util.find_spec("torch")
    roots = list(spec.submodule_search_locations or []) if spec else []
    if not roots:
        probe = (
            "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
        )
        outer = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True)
        roots = [outer.stdout.strip()] if outer.returncode == 0 else []
    return read_torch(Path(roots[0])) if roots else None


def find_nvcc(environ: Mapping[str, str] = os.environ) -> Nvcc | None:
    """The first nvcc that runs: $CUDA_HOME's, $CUDA_PATH's, PATH's, /usr/local/cuda's."""
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home]
    candidates += [shutil.which("nvcc", path=environ.get("PATH")), "/usr/local/cuda/bin/nvcc"]
    for candidate in filter(None, candidates):
        try:
            version = _output(candidate, "--version")
            architectures = _output(candidate, "--list-gpu-arch")
        except (OSError, subprocess.CalledProcessError):
            continue
        match = re.search(r"\bV([\d.]+)", version)
        known = tuple(re.findall(r"compute_(\w+)", architectures))
        return Nvcc(candidate, match.group(1) if match else "unknown", known)
    return None


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def choose_cuda(
    torch: Torch, nvcc: Nvcc | None, environ: Mapping[str, str] = os.environ
) -> str | None:
    """None if `_cuda` is to be built, else the reason why not.

    Raises:
        BuildError: FUSED_RESNET_CUDA=1 asks for what cannot be built, or is neither 0 nor 1.
    """
    choice = environ.get("FUSED_RESNET_CUDA", "")
    if choice not in ("", "0", "1"):
        raise BuildError(f"FUSED_RESNET_CUDA is {choice!r}, must be 0, 1 or unset")
    if choice == "0":
        return "FUSED_RESNET_CUDA=0"
    reason = None
    if nvcc is None:
        reason = "no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    elif torch.cuda is None:
        reason = f"torch {torch.version} was built without CUDA"
    if reason and choice == "1":
        raise BuildError(f"FUSED_RESNET_CUDA=1 asks for the CUDA kernels, but {reason}")
    return reason


def cuda_architectures(nvcc: Nvcc, environ: Mapping[str, str] = os.environ) -> list[str]:
    """Architectures to compile for, as TORCH_CUDA_ARCH_LIST writes them: "9.0", "12.0+PTX".

    Without TORCH_CUDA_ARCH_LIST these are the default ones that `nvcc` knows, the last with PTX so
    that later GPUs can run it.

    Raises:
        BuildError: TORCH_CUDA_ARCH_LIST names something that this nvcc does not know.
    """
    requested = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if not requested:
        known = [
            arch
            for arch in DEFAULT_ARCHITECTURES.split()
            if _digits(arch.removesuffix("+PTX")) in nvcc.architectures
        ]
        return [*known[:-1], known[-1].removesuffix("+PTX") + "+PTX"]
    architectures = " ".join(NAMED_ARCHITECTURES.get(arch, arch) for arch in requested).split()
    for arch in architectures:
        match = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", arch)
        if not match or _digits(match.group(1)) not in nvcc.architectures:
            known_list = " ".join(f"{known[:-1]}.{known[-1]}" for known in nvcc.architectures)
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {arch!r}, nvcc {nvcc.version} knows {known_list}"
            )
    return list(dict.fromkeys(architectures))


def hopper_architectures(architectures: list[str]) -> list[str]:
    """What `csrc/cuda/hopper` is compiled for, of what `cuda_architectures` returned.

    Its instructions are 9.0a's alone, which no other GPU runs; without 9.0 its kernels are empty.
    """
    names = {arch.removesuffix("+PTX") for arch in architectures}
    return ["9.0a"] if names & {"9.0", "9.0a"} else architectures


def gencode_flags(architectures: list[str]) -> list[str]:
    """The nvcc flags for what `cuda_architectures` returned."""
    flags = []
    for arch in architectures:
        number = _digits(arch.removesuffix("+PTX"))
        codes = [f"sm_{number}"] + ([f"compute_{number}"] if arch.endswith("+PTX") else [])
        flags += [f"-gencode=arch=compute_{number},code={code}" for code in codes]
    return flags


def _digits(arch: str) -> str:
    return arch.replace(".", "")


def max_jobs(environ: Mapping[str, str] = os.environ) -> int:
    """Compilers to run at a time: MAX_JOBS, else the number of cores this process may use."""
    value = environ.get("MAX_JOBS")
    if value is None:
        return len(os.sched_getaffinity(0))
    if not value.isdecimal() or int(value) < 1:
        raise BuildError(f"MAX_JOBS is {value!r}, must be a positive number")
    return int(value)
