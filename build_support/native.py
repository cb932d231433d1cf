"""The `build_ext` command that compiles `fused_resnet._C` and, where nvcc is found, `_cuda`.

Both are plain shared libraries on the LibTorch stable ABI and the C++ standard library: no Python
symbols, so one file serves every CPython, and no C++ symbols of torch, so one file serves every
torch from 2.11. `torch.utils.cpp_extension` is not used because it needs an importable torch, takes
CUDA_HOME from the folder of whatever `nvcc` is on PATH, and refuses an nvcc of another CUDA
release; the stable ABI and a static CUDA runtime make the last a non-issue.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from toolchain import (
    OLDEST_TORCH,
    BuildError,
    Nvcc,
    Torch,
    choose_cuda,
    cuda_architectures,
    find_nvcc,
    find_torch,
    gencode_flags,
    hopper_architectures,
    max_jobs,
)

TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # 2.11
CXX_FLAGS = ["-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# A file whose stem ends so is compiled for these instructions and must be entered only after a
# run-time check (csrc/cpu/isa.h); everything else runs on any x86-64. GCC's own AVX-512 header sets
# off its warnings about uninitialised variables (GCC bug 105593).
_AVX512_FLAGS = [
    "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
    "-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized",
]  # fmt: skip
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avxvnni": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
    "_avx512": _AVX512_FLAGS,
    "_avx512vnni": [*_AVX512_FLAGS, "-mavx512vnni"],
    # Nothing there throws, and the handler of a class with a destructor is a shared symbol.
    "_avx512bf16": [*_AVX512_FLAGS, "-mavx512bf16", "-fno-exceptions"],
    # Vectors of a size that the target has no registers for, in functions that are all inline.
    "_avx512bf16_emulated": ["-Wno-psabi"],
    "_amx": [
        *_AVX512_FLAGS,
        "-mavx512bf16",
        "-mamx-tile",
        "-mamx-bf16",
        "-mamx-int8",
        "-fno-exceptions",
    ],
}


class BuildNative(build_ext):
    """Compiles each source that changed since the last build, MAX_JOBS at a time."""

    def run(self) -> None:
        """Find the tools, build what can be built, and record what was."""
        torch = find_torch()
        if torch is None:
            raise BuildError(f"fused_resnet needs torch >= {OLDEST_TORCH} to build, found none")
        self.torch: Torch = torch
        self.nvcc: Nvcc | None = find_nvcc()
        self.cxx = shlex.split(os.environ.get("CXX", "c++"))
        self.jobs = max_jobs()
        self.sanitizers = sanitizer_flags(os.environ.get("FUSED_RESNET_SANITIZE", ""))
        reason = choose_cuda(torch, self.nvcc)
        self.architectures = [] if reason or not self.nvcc else cuda_architectures(self.nvcc)
        if reason:
            self._leave_out("fused_resnet._cuda")
            print(f"fused_resnet: building without CUDA kernels (_cuda): {reason}", flush=True)
        super().run()
        self._write_build_info(reason)

    def _leave_out(self, name: str) -> None:
        # An earlier build may have left its library where this one's files are collected from.
        for folder in (Path(self.build_lib), Path(self.get_ext_fullpath(name)).parents[1]):
            (folder / self.get_ext_filename(name)).unlink(missing_ok=True)
        self.extensions = [ext for ext in self.extensions if ext.name != name]

    def _write_build_info(self, reason: str | None) -> None:
        info = {
            "torch": self.torch.version,
            "compiler": _first_line([*self.cxx, "--version"]),
            "machine": platform.machine(),
            "cuda": None
            if reason or not self.nvcc
            else {"nvcc": self.nvcc.version, "architectures": self.architectures},
            "no_cuda_reason": reason,
        }
        package = Path(self.get_ext_fullpath("fused_resnet._C")).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")

    def build_extension(self, ext: Extension) -> None:
        """Compile and link one library."""
        is_cuda = ext.name.endswith("_cuda")
        folder = Path(self.build_temp) / ext.name
        compile_command = self._nvcc_command if is_cuda else self._cxx_command
        chosen = [source for source in map(Path, ext.sources) if _runs_here(source)]
        # nvcc compiles for several architectures at a time; its threads share the jobs.
        self.threads_per_file = max(1, self.jobs // max(1, len(chosen)))

        def compile_one(source: Path) -> Path:
            obj = folder / source.with_suffix(source.suffix + ".o")
            command = compile_command(source, obj)
            if _is_stale(obj, obj, command, _dependencies(obj)):
                print(f"fused_resnet: {ext.name}: compiling {source}", flush=True)
                _run(command, obj)
            return obj

        with ThreadPoolExecutor(self.jobs) as pool:
            objects = list(pool.map(compile_one, chosen))
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        command = self._link_command(objects, output, is_cuda)
        # nvcc links no two files alike, so linking again would make a library that was not tested.
        if _is_stale(output, folder / "library", command, objects):
            _run(command, folder / "library")

    def _common_flags(self, source: Path, obj: Path) -> list[str]:
        # -isystem keeps warnings in torch's headers out of the log.
        return [
            "-std=c++20", "-O3", "-DNDEBUG", TARGET, "-Icsrc",
            "-isystem", str(self.torch.root / "include"),
            "-MMD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj),
        ]  # fmt: skip

    def _cxx_command(self, source: Path, obj: Path) -> list[str]:
        flags = [*CXX_FLAGS, *_isa_flags(source), *_rounding_flags(source)]
        flags += self._common_flags(source, obj)
        return [*self.cxx, *flags, *self.sanitizers]

    def _nvcc_command(self, source: Path, obj: Path) -> list[str]:
        assert self.nvcc is not None
        host = ["-ccbin", self.cxx[0]] if "CXX" in os.environ else []
        architectures = self.architectures
        if source.parent.name == "hopper":
            architectures = hopper_architectures(architectures)
        return [
            self.nvcc.path, *host, *NVCC_FLAGS, f"--threads={self.threads_per_file}",
            *gencode_flags(architectures), *self._common_flags(source, obj),
        ]  # fmt: skip

    def _link_command(self, objects: list[Path], output: Path, is_cuda: bool) -> list[str]:
        common = ["-shared", *map(str, objects), "-o", str(output), f"-L{self.torch.root / 'lib'}"]
        if not is_cuda:
            return [*self.cxx, *common, "-ltorch_cpu", *self.sanitizers]
        assert self.nvcc is not None
        # nvcc knows where its own runtime is. The static one makes the library independent of the
        # CUDA release torch was built with, and loadable without a driver.
        return [self.nvcc.path, *common, "-ltorch_cuda", "-ltorch_cpu", "--cudart=static"]


def sanitizer_flags(names: str) -> list[str]:
    """What `FUSED_RESNET_SANITIZE` adds to the host library's compilation and linking.

    Args:
        names: "" or sanitizers of GCC and Clang, "address,undefined". A library built with
            "address" loads only where libasan was loaded first; `tests/fuzz.py` sees to it.

    Raises:
        BuildError: a name is neither "address" nor "undefined".
    """
    chosen = [name for name in names.split(",") if name]
    unknown = set(chosen) - {"address", "undefined"}
    if unknown:
        raise BuildError(
            f"FUSED_RESNET_SANITIZE is {names!r}, must name sanitizers among address and undefined"
        )
    if not chosen:
        return []
    # Types of other libraries, which -fsanitize=vptr asks for, are no part of the stable ABI.
    return [
        f"-fsanitize={','.join(chosen)}", "-fno-sanitize=vptr", "-fno-sanitize-recover=all",
        "-fno-omit-frame-pointer", "-g1", "-O1",
    ]  # fmt: skip


def _runs_here(source: Path) -> bool:
    return platform.machine() in ("x86_64", "AMD64") or not _isa_flags(source)


def _isa_flags(source: Path) -> list[str]:
    return next((flags for end, flags in ISA_FLAGS.items() if source.stem.endswith(end)), [])


def _rounding_flags(source: Path) -> list[str]:
    # A product and a sum, each promised to be rounded, must not become one instruction.
    return ["-ffp-contract=off"] if source.parent.name == "quantized" else []


def _is_stale(target: Path, stamp: Path, command: list[str], inputs: list[Path]) -> bool:
    """Whether `target` is not what `command`, recorded beside `stamp`, made of `inputs`."""
    record = Path(f"{stamp}.cmd")
    if not target.exists() or not record.exists() or record.read_text() != shlex.join(command):
        return True
    built = target.stat().st_mtime
    return any(not path.exists() or path.stat().st_mtime > built for path in inputs)


def _dependencies(obj: Path) -> list[Path]:
    """The files that the compiler read to make `obj`."""
    depfile = Path(f"{obj}.d")
    if not depfile.exists():
        return [depfile]
    # "object: dependency dependency \": spaces inside a path are escaped.
    rule = depfile.read_text().replace("\\\n", " ").replace("\\ ", "\0")
    _, _, files = rule.partition(":")
    return [Path(word.replace("\0", " ")) for word in files.split()]


def _run(command: list[str], stamp: Path) -> None:
    record = Path(f"{stamp}.cmd")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.unlink(missing_ok=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise BuildError(f"{shlex.join(command)}\n{done.stdout}")
    print(done.stdout, end="", flush=True)
    record.write_text(shlex.join(command))


def _first_line(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.partition("\n")[0]
