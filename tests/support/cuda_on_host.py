"""Builds and loads `csrc/cuda_on_host`: the CUDA kernels, compiled for the CPU.

Needs a C++ compiler, torch and the pybind11 headers torch comes with, no CUDA. Objects are kept
under build/ and compiled again when something that they were made of has changed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "cuda_on_host"
NAME = "fused_resnet_on_host"
TORCH = Path(torch.__file__).parent

# -g1: faults are told by source line.
FLAGS = [
    "-std=c++20", "-O2", "-g1", "-march=native", "-fPIC", "-fvisibility=hidden", "-Wall",
    "-ftls-model=initial-exec", "-fno-optimize-sibling-calls", "-fno-omit-frame-pointer",
]  # fmt: skip
# Without contraction: __fmul_rn and __fadd_rn round by themselves, as on a GPU.
# The compiler's calls of the thread sanitizer's functions are csrc/cuda_on_host's way to see a
# kernel's loads and stores; the sanitizer itself takes no part. Accesses stay as wide as they are
# written.
KERNEL_FLAGS = [
    "-ffp-contract=off", "-x", "c++", "-DFUSED_RESNET_ON_HOST", "-DNDEBUG",
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Wno-unknown-pragmas",
    "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-vectorize", "-fno-tree-sra",
]  # fmt: skip


def kernel_sources() -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def is_needed() -> bool:
    """Whether there is no GPU, and a compiler to do without."""
    return not torch.cuda.is_available() and shutil.which(_compiler()) is not None


@functools.cache
def load() -> ModuleType:
    """The module of csrc/cuda_on_host/module.cpp; its operators are registered then."""
    return load_library(build(sources()))


def load_library(library: Path) -> ModuleType:
    """The module in a library that `build` or `link` made."""
    spec = importlib.util.spec_from_file_location(NAME, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources() -> list[Path]:
    """All that the library is made of, kernels of the tests' own included."""
    own = sorted((ROOT / "csrc" / "cuda_on_host").glob("*.cpp"))
    host = sorted((ROOT / "csrc" / "cuda").rglob("*.cpp"))
    # Of a function that several of them have, such as a string's, the linker takes the first one:
    # not a kernel's, whose accesses would be taken for those of the thread that runs.
    return [*own, *host, *kernel_sources(), *sorted((ROOT / "tests").rglob("*.cu"))]


@contextlib.contextmanager
def guarded(end: str = "end") -> Iterator[None]:
    """Tensors made in here end (or "begin") at a page that cannot be accessed."""
    load().guard(end)
    try:
        yield
    finally:
        load().guard("off")


@contextlib.contextmanager
def drawn_from(name: str) -> Iterator[None]:
    """Guarded tensors and an order of threads that differ from test to test, by their names."""
    seed = zlib.crc32(name.encode())
    load().set_seed(seed)
    with guarded("begin" if seed % 4 == 0 else "end"):
        yield
    load().set_seed(0)


def build(sources: Sequence[Path]) -> Path:
    """Compiles what changed and returns the library."""
    BUILD.mkdir(parents=True, exist_ok=True)
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        objects = list(pool.map(compiled, sources))
    command = link_command(objects)
    library = BUILD / _digest(command) / f"{NAME}.so"
    if not library.is_file():
        library.parent.mkdir(exist_ok=True)
        _run([*command, "-o"], library)
    return library


def build_for_gpu(source: Path) -> Path:
    """A library of kernels of the tests' own, compiled by nvcc for compute capability 9.0a."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    BUILD.mkdir(parents=True, exist_ok=True)
    command = [
        nvcc, "-shared", "-std=c++20", "-O3", "-DUSE_CUDA", "--expt-relaxed-constexpr",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-gencode=arch=compute_90a,code=sm_90a",
        "-Xcompiler=-fPIC", f"-I{ROOT / 'csrc'}", "-isystem", str(TORCH / "include"), str(source),
        f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch_cuda", "-o",
    ]  # fmt: skip
    library = BUILD / f"{source.stem}.so"
    _run(command, library)
    return library


def link_command(objects: Sequence[Path]) -> list[str]:
    """What makes the library, but for `-o` and its path."""
    return [
        _compiler(), "-shared", *map(str, objects), f"-L{TORCH / 'lib'}",
        "-ltorch_cpu", "-lc10", "-ldl",
    ]  # fmt: skip


def compile_command(source: Path, *instead: Path) -> list[str]:
    """What makes an object, but for `-o` and its path.

    Headers in the folders `instead` are taken before those of csrc.
    """
    return [
        _compiler(), *FLAGS, *(KERNEL_FLAGS if source.suffix == ".cu" else []),
        *(f"-I{folder}" for folder in instead),
        f"-I{ROOT / 'csrc' / 'cuda_on_host' / 'include'}", f"-I{ROOT / 'csrc'}",
        "-isystem", str(TORCH / "include"),
        "-isystem", sysconfig.get_paths()["include"],
        "-c", str(source),
    ]  # fmt: skip


def compiled(source: Path) -> Path:
    """The object made of `source`, named by the command and all that it reads."""
    command = compile_command(source)
    key = _digest([*command, torch.__version__, _compiler_version(), _machine()])
    record = BUILD / f"{source.stem}-{key}.json"
    if record.is_file():
        made_of = json.loads(record.read_text())
        obj = BUILD / made_of["object"]
        inputs = made_of["inputs"].items()
        if obj.is_file() and all(_content(Path(path)) == digest for path, digest in inputs):
            return obj
    obj = BUILD / f"{source.stem}-{key}.{os.getpid()}.o"
    depfile = obj.with_suffix(".d")
    _run([*command, "-MMD", "-MF", str(depfile), "-o"], obj)
    rule = depfile.read_text().replace("\\\n", " ").replace("\\ ", "\0")
    # Absolute, as other processes are in other folders: a compiler cache may make them relative.
    inputs = [os.path.abspath(word.replace("\0", " ")) for word in rule.partition(":")[2].split()]
    depfile.unlink()
    digests = {path: _content(Path(path)) for path in inputs}
    named = BUILD / f"{source.stem}-{_digest([key, json.dumps(digests)])}.o"
    obj.replace(named)
    unfinished = record.with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"object": named.name, "inputs": digests}))
    unfinished.replace(record)
    return named


def _run(command: list[str], output: Path) -> None:
    """Runs a command that ends with its output, which appears whole or not at all."""
    unfinished = output.with_name(f"{output.name}.{os.getpid()}")
    done = subprocess.run(
        [*command, str(unfinished)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}")
    unfinished.replace(output)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([_compiler(), "--version"], capture_output=True, text=True).stdout


@functools.cache
def _machine() -> str:
    """What -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = ""
    if cpuinfo.is_file():
        flags = next((x for x in cpuinfo.read_text().splitlines() if x.startswith("flags")), "")
    return platform.machine() + flags


def _digest(words: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


@functools.cache
def _content(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else ""
