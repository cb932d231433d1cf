"""A process whose CUDA device is `cuda_stub.c`: builds it, and reads what was launched there.

    environment = cuda_stub.environment(folder, os.environ)  # in the parent
    cuda_stub.Stub().launches()                  # in the child

Tensors of the device "cuda", streams, the caching allocator, Triton's compiler and launcher are the
real ones there; only no kernel runs, so that values mean nothing.
"""

from __future__ import annotations

import ast
import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import fused_resnet

_SOURCE = Path(__file__).with_name("cuda_stub.c")
_NAME = "libcuda.so.1"
_COUNTERS = (
    "launch_count", "runtime_launches", "graph_launches", "captures", "freed_graphs", "clearings",
)  # fmt: skip


def missing() -> str | None:
    """Why there can be no such process here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if (torch.version.cuda or "0").partition(".")[0] != "13":
        return (
            f"torch is built for CUDA {torch.version.cuda}; the stub's runtime is that of CUDA 13"
        )
    if shutil.which("gcc") is None:
        return "no gcc, which Triton builds its launcher with"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        return "no Python.h, which Triton builds its launcher with"
    return None


def environment(folder: Path, others: Mapping[str, str]) -> dict[str, str]:
    """Builds the library in a folder; the variables of a process that takes it for a device.

    Args:
        folder: of the library, and of what such a process writes.
        others: variables that it has besides.

    Raises:
        RuntimeError: it does not compile.
    """
    headers = [Path(spec) / "cu13/include" for spec in _locations("nvidia")]
    headers += [Path(spec) / "backends/nvidia/include" for spec in _locations("triton")]
    library = folder / _NAME
    command = ["gcc", "-O1", "-shared", "-fPIC", "-Wall", f"-Wl,-soname,{_NAME}"]
    command += [f"-I{path}" for path in headers if path.is_dir()]
    run = subprocess.run(
        [*command, "-o", library, _SOURCE], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise RuntimeError(run.stderr)
    cleared = ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "FUSED_RESNET_BACKEND")
    kept = {name: value for name, value in others.items() if name not in cleared}
    return kept | {
        "LD_PRELOAD": str(library),
        "TRITON_LIBCUDA_PATH": str(folder),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "FUSED_RESNET_CACHE": str(folder / "cache"),
        # Its kernels compute nothing.
        "FUSED_RESNET_SELF_CHECK": "0",
    }


def names_of(checks: str) -> list[str]:
    """The checks in a file of this folder, which are its functions `check_...`."""
    tree = ast.parse(Path(__file__).with_name(checks).read_text())
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [name for name in functions if name.startswith("check_")]


def outcomes_of(checks: str, parts: Sequence[Path], seconds: float) -> dict[str, str | None]:
    """Runs such a file in a process on the stub: what each check found wrong, or None.

    Args:
        checks: the file's name.
        parts: of the CUDA library: see `package`.
        seconds: which it may take.
    """
    from support import processes  # which a process on the stub, that imports this file, lacks

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        package(folder, parts)
        variables = environment(folder, processes.current_environment())
        variables["PYTHONPATH"] = str(folder)
        results = folder / "results.json"
        command = [sys.executable, Path(__file__).with_name(checks), results]
        status, out, err = processes.run_command(command, seconds, variables, folder)
        assert status == 0, err[-4000:]
        print(out)
        return json.loads(results.read_text())


def objects() -> list[Path]:
    """What the build of the CUDA kernels that is tested here has left of their files; or nothing.

    The library itself has a runtime of its own, which nothing can stand in for. Linked without it,
    these call the stub's.
    """
    root = Path(fused_resnet.__file__).parents[1]
    sources = {p.name for p in (root / "csrc" / "cuda").rglob("*") if p.suffix in (".cu", ".cpp")}
    found = [p for p in root.glob("build/temp*/fused_resnet._cuda/**/*.o") if p.stem in sources]
    built = Path(fused_resnet.__file__).with_name("_cuda.abi3.so")
    if not found or len(found) != len(sources) or not built.is_file():
        return []
    return [] if max(p.stat().st_mtime for p in found) > built.stat().st_mtime + 60 else found


def package(folder: Path, parts: Sequence[Path]) -> None:
    """Makes a package `fused_resnet` in a folder, like this one but for its CUDA library.

    It is linked of parts, if there are any; without, there is none.

    Raises:
        RuntimeError: it does not link.
    """
    own, torch_libraries = Path(fused_resnet.__file__).parent, Path(torch.__file__).parent / "lib"
    made = folder / "fused_resnet"
    made.mkdir()
    for path in own.iterdir():
        if path.name not in ("_cuda.abi3.so", "__pycache__"):
            (made / path.name).symlink_to(path)
    if not parts:
        return
    command = ["g++", "-shared", *parts, "-o", made / "_cuda.abi3.so", f"-L{torch_libraries}"]
    command += ["-ltorch_cuda", "-ltorch_cpu"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(run.stderr)


def _locations(package: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    return [] if spec is None else list(spec.submodule_search_locations or ())


class Launch(NamedTuple):
    """One launch through the driver; parameters as the bits that the kernel takes of each."""

    function: int
    stream: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    attributes: tuple[tuple[int, ...], ...]
    parameters: tuple[int, ...]


class _Record(ctypes.Structure):
    _fields_ = (
        ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attribute_count", ctypes.c_uint32),
        ("parameter_count", ctypes.c_uint32),
        ("attributes", ctypes.c_int32 * 4 * 8),
        ("parameters", ctypes.c_uint64 * 96),
    )


class Stub:
    """The library, in a process that it was preloaded into."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(_NAME)
        self.library.stub_launches.restype = ctypes.POINTER(_Record)
        for name in _COUNTERS:
            getattr(self.library, f"stub_{name}").restype = ctypes.c_uint64

    def reset(self, record: bool = True) -> None:
        """Forgets all launches."""
        self.library.stub_reset(int(record))

    def fail(self, status: int) -> None:
        """Makes launches through the driver return an error, or 0 for none."""
        self.library.stub_fail(status)

    def launches(self) -> list[Launch]:
        """All since `reset`, in order."""
        records = self.library.stub_launches()
        return [
            Launch(
                record.function,
                record.stream,
                tuple(record.grid),
                tuple(record.block),
                record.shared,
                tuple(tuple(a) for a in record.attributes[: record.attribute_count]),
                tuple(record.parameters[: record.parameter_count]),
            )
            for record in records[: self.library.stub_launch_count()]
        ]

    def take(self, function: int, words: Sequence[int]) -> None:
        """Keeps launches of a kernel through the runtime, too.

        Args:
            function: its address on the host.
            words: of eight bytes, of each of its parameters.
        """
        sizes = (ctypes.c_uint32 * len(words))(*words)
        assert self.library.stub_takes(ctypes.c_void_p(function), len(words), sizes)

    def clearings(self) -> int:
        """How often memory was set."""
        return self.library.stub_clearings()

    def runtime_launches(self) -> int:
        """How many of torch's own kernels were launched."""
        return self.library.stub_runtime_launches()

    def graph_launches(self) -> int:
        """How many captured graphs were launched."""
        return self.library.stub_graph_launches()

    def captures(self) -> int:
        """How many captures began."""
        return self.library.stub_captures()

    def freed_graphs(self) -> int:
        """How many graphs that could be launched are gone."""
        return self.library.stub_freed_graphs()
