"""What a measurement must say about where it was taken: versions, device, commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("fused_resnet", "torch", "torchvision", "triton")
# The instruction sets that decide which CPU kernels run, by Linux's names for them.
CPU_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that shape the timings; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    # The wheel's metadata lacks the local part ("+cpu", "+cu130") that tells builds apart.
    found["torch"] = torch.__version__
    return found


def provenance(
    schema: str, command: str, device: torch.device, root: Path = ROOT
) -> dict[str, object]:
    """What every result file starts with.

    `schema`, `date` (UTC, ISO 8601), `command`, `commit` (of `root`; null when not known, "-dirty"
    when the sources differed from it), `versions` (name to version or null), `device`
    (`describe_device`).
    """
    return {
        "schema": schema,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "commit": commit(root),
        "versions": versions(),
        "device": describe_device(device),
    }


def compilers() -> dict[str, str | None]:
    """First line of `--version` of the host compiler and of nvcc; None where there is none."""
    host = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    lines = {}
    for name, program, pattern in (("c++", host, r".+"), ("nvcc", "nvcc", r".*release.*")):
        text = _output([*program.split(), "--version"]) if program else ""
        match = re.search(pattern, text)
        lines[name] = match.group(0) if match else None
    return lines


def describe_device(device: torch.device) -> dict[str, object]:
    """The device as the result files name it.

    CPU: `type`, `name`, `isa` (what torch dispatches to), `flags`, `cores` (this process may use).
    CUDA: `type`, `name`, `capability`, `memory_bytes`, `multiprocessors`, `driver`.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return {
            "type": "cuda",
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": _driver(),
        }
    return {
        "type": "cpu",
        "name": _cpu_name(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "flags": [flag for flag in CPU_FLAGS if flag in _cpu_info().get("flags", "").split()],
        "cores": usable_cores(),
    }


def _driver() -> str | None:
    """The GPU driver's version."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = _output(query).split()
    return lines[0] if lines else None


def usable_cores() -> int:
    """How many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit(root: Path = ROOT) -> str | None:
    """Short hash of the checkout at `root`, with `-dirty` when its sources have changed since.

    None when `root` is not a checkout of this package (site-packages, say).
    """
    if not (root / ".git").exists() or not (root / "csrc").is_dir():
        return None
    # Not the program that a repository's own configuration may name for `status` to run.
    git = ["git", "-c", "core.fsmonitor=false", "-C", str(root)]
    head = _output([*git, "rev-parse", "--short=10", "HEAD"]).strip()
    if not head:
        return None
    sources = ["csrc", "fused_resnet", "setup.py", "pyproject.toml"]
    changed = _output([*git, "status", "--porcelain", "--untracked-files=no", "--", *sources])
    return head + ("-dirty" if changed.strip() else "")


def _cpu_info() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_name() -> str:
    info = _cpu_info()
    name = info.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    if "model" in info and not re.search(r"\d", name):
        # Virtual machines hide the product's name; family and model still tell generations apart.
        name += (
            f" (family {info['cpu family']}, model {info['model']}, stepping {info['stepping']})"
        )
    return name


def _output(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout if result.returncode == 0 else ""
