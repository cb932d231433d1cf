"""The build: what it decides, what it produces, and what it says when it cannot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import setuptools
import torch

import fused_resnet
from fused_resnet import _native

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "build_support"))

import backend  # noqa: E402  (found through the line above)
import native  # noqa: E402
import toolchain  # noqa: E402

PACKAGE = Path(fused_resnet.__file__).parent
TORCH = toolchain.Torch(Path("/nowhere"), "2.15.0+cu132", "13.2")
CPU_TORCH = toolchain.Torch(Path("/nowhere"), "2.15.0+cpu", None)
NVCC = toolchain.Nvcc("/nowhere/nvcc", "13.0.88", ("75", "80", "86", "90", "100", "120"))
OLD_NVCC = toolchain.Nvcc("/nowhere/nvcc", "12.4.131", ("75", "80", "86", "90"))


def libraries():
    return [file for file in (PACKAGE / "_C.abi3.so", PACKAGE / "_cuda.abi3.so") if file.is_file()]


def output(*command, **arguments):
    return subprocess.run(command, check=True, capture_output=True, text=True, **arguments).stdout


@pytest.fixture
def source_tree(tmp_path):
    """A copy of the sources, for commands that write into their working directory."""
    left_out = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
    return Path(shutil.copytree(ROOT, tmp_path / "source", ignore=left_out))


# Which torch


def fake_torch(folder, version):
    (folder / "include" / "torch").mkdir(parents=True)
    (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda = '13.0'\n")
    return folder


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0+cu130", "2.16.0a0+git1a2b3c4", "3.0.0"])
def test_supported_torch_is_used(tmp_path, version):
    found = toolchain.read_torch(fake_torch(tmp_path / "torch", version))
    assert found == toolchain.Torch(tmp_path / "torch", version, "13.0")


@pytest.mark.parametrize("version", ["2.10.1+cu128", "1.13.1"])
def test_old_torch_is_not_used(tmp_path, version):
    assert toolchain.read_torch(fake_torch(tmp_path / "torch", version)) is None


def test_torch_without_headers_is_not_used(tmp_path):
    folder = fake_torch(tmp_path / "torch", "2.15.0")
    shutil.rmtree(folder / "include")
    assert toolchain.read_torch(folder) is None


def test_isolated_build_finds_the_torch_outside(tmp_path):
    """As pip isolates: PYTHONPATH starts with a folder whose sitecustomize drops site-packages."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path = [p for p in sys.path if not p.endswith('site-packages')]\n"
    )
    (tmp_path / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    found = output(
        sys.executable,
        "-c",
        "import importlib.util, toolchain\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "print(toolchain.find_torch().root)",
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT / 'build_support'}"},
        cwd=tmp_path,
    )
    assert Path(found.strip()) == Path(torch.__file__).parent


@pytest.mark.parametrize(
    "hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"]
)
def test_torch_is_required_only_if_there_is_none(monkeypatch, hook):
    monkeypatch.setattr(backend.build_meta, hook, lambda settings: [])
    monkeypatch.setattr(backend, "find_torch", lambda: TORCH)
    assert getattr(backend, hook)() == []
    monkeypatch.setattr(backend, "find_torch", lambda: None)
    assert getattr(backend, hook)() == ["torch>=2.11"]


# Which CUDA


def test_cuda_is_built_where_it_can_be():
    assert toolchain.choose_cuda(TORCH, NVCC, {}) is None
    assert toolchain.choose_cuda(TORCH, NVCC, {"FUSED_RESNET_CUDA": "1"}) is None
    assert toolchain.choose_cuda(TORCH, NVCC, {"FUSED_RESNET_CUDA": "0"}) == "FUSED_RESNET_CUDA=0"
    assert "no nvcc" in toolchain.choose_cuda(TORCH, None, {})
    assert "2.15.0+cpu was built without CUDA" in toolchain.choose_cuda(CPU_TORCH, NVCC, {})


@pytest.mark.parametrize(("found_torch", "nvcc"), [(TORCH, None), (CPU_TORCH, NVCC)])
def test_cuda_that_cannot_be_built_is_an_error_when_asked_for(found_torch, nvcc):
    with pytest.raises(toolchain.BuildError, match="FUSED_RESNET_CUDA=1 asks for"):
        toolchain.choose_cuda(found_torch, nvcc, {"FUSED_RESNET_CUDA": "1"})


def test_unknown_cuda_choice():
    with pytest.raises(toolchain.BuildError, match="FUSED_RESNET_CUDA is 'yes', must be 0, 1"):
        toolchain.choose_cuda(TORCH, NVCC, {"FUSED_RESNET_CUDA": "yes"})


def test_missing_nvcc_fails_in_one_line_when_asked_for(source_tree):
    code = (
        "import runpy, sys; sys.path.insert(0, 'build_support'); import native\n"
        "native.find_nvcc = lambda: None\n"
        "sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=source_tree,
        env={**os.environ, "FUSED_RESNET_CUDA": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    expected = "error: FUSED_RESNET_CUDA=1 asks for the CUDA kernels, but no nvcc in CUDA_HOME"
    assert result.stderr.strip().splitlines()[-1].startswith(expected)


def test_nvcc_is_looked_for_in_cuda_home_first(tmp_path):
    for name, version in (("home", "13.0.88"), ("path", "12.8.93")):
        compiler = tmp_path / name / "bin" / "nvcc"
        compiler.parent.mkdir(parents=True)
        compiler.write_text(
            f"#!/bin/sh\n[ $1 = --version ] && echo 'release, V{version}' || echo compute_90\n"
        )
        compiler.chmod(0o755)
    search = f"{tmp_path / 'path' / 'bin'}:{os.environ['PATH']}"
    found = toolchain.find_nvcc({"CUDA_HOME": str(tmp_path / "home"), "PATH": search})
    assert found.version == "13.0.88"
    assert toolchain.find_nvcc({"PATH": search}).version == "12.8.93"
    # One that does not run is passed over.
    (tmp_path / "home" / "bin" / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    found = toolchain.find_nvcc({"CUDA_HOME": str(tmp_path / "home"), "PATH": search})
    assert found.version == "12.8.93"


def test_architectures():
    default = ["8.0", "8.6", "9.0", "10.0+PTX", "12.0+PTX"]
    assert toolchain.cuda_architectures(NVCC, {}) == default
    assert toolchain.cuda_architectures(OLD_NVCC, {}) == ["8.0", "8.6", "9.0+PTX"]

    def requested(value):
        return toolchain.cuda_architectures(NVCC, {"TORCH_CUDA_ARCH_LIST": value})

    assert requested("") == default
    assert requested("8.0;9.0+PTX") == ["8.0", "9.0+PTX"]
    assert requested("9.0a 10.0") == ["9.0a", "10.0"]
    assert requested("Ampere;Hopper") == ["8.0", "8.6+PTX", "9.0+PTX"]


@pytest.mark.parametrize("value", ["12.1", "Kepler", "90", "9.0+ptx"])
def test_unknown_architecture(value):
    with pytest.raises(
        toolchain.BuildError, match=re.escape(f"TORCH_CUDA_ARCH_LIST has {value!r}")
    ):
        toolchain.cuda_architectures(NVCC, {"TORCH_CUDA_ARCH_LIST": value})


def test_architecture_flags():
    assert toolchain.gencode_flags(["9.0a", "12.0+PTX"]) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]


def test_hopper_architectures():
    """Hopper's kernels are 9.0a's alone; elsewhere they are compiled empty."""
    assert toolchain.hopper_architectures(["8.0", "9.0", "12.0+PTX"]) == ["9.0a"]
    assert toolchain.hopper_architectures(["9.0a"]) == ["9.0a"]
    assert toolchain.hopper_architectures(["8.0", "9.0+PTX"]) == ["9.0a"]
    assert toolchain.hopper_architectures(["8.6+PTX"]) == ["8.6+PTX"]


def test_sanitizers():
    flags = native.sanitizer_flags("address,undefined")
    assert "-fsanitize=address,undefined" in flags
    assert "-fno-sanitize-recover=all" in flags
    assert native.sanitizer_flags("") == []
    with pytest.raises(toolchain.BuildError, match="FUSED_RESNET_SANITIZE is 'adress'"):
        native.sanitizer_flags("adress")


def test_max_jobs():
    assert toolchain.max_jobs({}) == len(os.sched_getaffinity(0))
    assert toolchain.max_jobs({"MAX_JOBS": "3"}) == 3
    for value in ("0", "-1", "many", ""):
        with pytest.raises(toolchain.BuildError, match=f"MAX_JOBS is '{value}'"):
            toolchain.max_jobs({"MAX_JOBS": value})


# The command


def test_build_without_nvcc_records_why_and_leaves_no_old_library(tmp_path, monkeypatch, capsys):
    for name in ("FUSED_RESNET_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(native, "find_torch", lambda: TORCH)
    monkeypatch.setattr(native, "find_nvcc", lambda: None)
    built = []
    monkeypatch.setattr(
        native.BuildNative, "build_extension", lambda _, ext: built.append(ext.name)
    )
    names = ["fused_resnet._C", "fused_resnet._cuda"]
    extensions = [setuptools.Extension(name, [], py_limited_api=True) for name in names]
    command = native.BuildNative(setuptools.Distribution({"ext_modules": extensions}))
    command.build_lib = str(tmp_path)
    command.ensure_finalized()
    (tmp_path / "fused_resnet").mkdir()
    (tmp_path / "fused_resnet" / "_cuda.abi3.so").touch()
    command.run()
    assert built == ["fused_resnet._C"]
    assert not (tmp_path / "fused_resnet" / "_cuda.abi3.so").exists()
    assert [Path(file).name for file in command.get_outputs()] == ["_C.abi3.so"]
    info = json.loads((tmp_path / "fused_resnet" / "_build_info.json").read_text())
    assert info["cuda"] is None
    assert "no nvcc" in info["no_cuda_reason"]
    assert "building without CUDA kernels (_cuda): no nvcc" in capsys.readouterr().out


def test_only_what_changed_is_compiled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    header, obj = tmp_path / "a header.h", tmp_path / "a.o"
    header.touch()

    def is_stale(*flags):
        return native._is_stale(obj, obj, ["cc", "a.cpp", *flags], native._dependencies(obj))

    assert is_stale()
    obj.touch()
    assert is_stale()
    Path("a.o.d").write_text("a.o : \\\n a\\ header.h\n")
    Path("a.o.cmd").write_text("cc a.cpp")
    assert not is_stale()
    assert is_stale("-O0")
    later = obj.stat().st_mtime + 10
    os.utime(header, (later, later))
    assert is_stale()
    header.unlink()
    assert is_stale()


def test_failed_command_is_run_again(tmp_path):
    made = tmp_path / "made"
    with pytest.raises(toolchain.BuildError, match="false"):
        native._run(["false"], made)
    made.touch()
    assert native._is_stale(made, made, ["false"], [])
    native._run(["true"], made)
    assert not native._is_stale(made, made, ["true"], [])


def test_source_distribution_holds_everything_a_build_needs(source_tree):
    output(sys.executable, "setup.py", "-q", "sdist", cwd=source_tree)
    (archive,) = (source_tree / "dist").iterdir()
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {
        str(file.relative_to(source_tree))
        for folder in ("csrc", "build_support", "fused_resnet", "tests")
        for file in (source_tree / folder).rglob("*.*")
        if file.name != "_build_info.json"
    }
    assert needed | {"LICENSE", "pyproject.toml", "setup.py"} <= names
    assert not [name for name in names if name.endswith((".so", "_build_info.json"))]


# What was built


@pytest.mark.quick
def test_wheel_serves_every_python_from_3_10():
    wheel = importlib.metadata.distribution("fused_resnet").read_text("WHEEL")
    assert re.findall(r"^Tag: (\w+-\w+)-", wheel, re.MULTILINE) == ["cp310-abi3"]


@pytest.mark.quick
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_libraries_use_torch_through_its_c_interface_alone():
    for library in libraries():
        undefined = output("nm", "-D", "--undefined-only", str(library)).split()
        symbols = {word.partition("@")[0] for word in undefined}
        torch_symbols = {s for s in symbols if re.search("torch|c10|aten|at::|caffe", s)}
        assert torch_symbols
        assert not [s for s in torch_symbols if not re.match("(aoti_torch|torch)_", s)]
        assert not [s for s in symbols if s.startswith(("_ZN2at", "_ZNK2at", "Py", "_Py"))]
        assert not [s for s in symbols if re.match("GOMP|omp_|__kmpc", s)], "threads are torch's"


@pytest.mark.quick
@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf")
def test_libraries_need_only_torch_and_the_system():
    allowed = {"libtorch_cpu", "libtorch_cuda", "libstdc++", "libgcc_s", "libc", "libm", "libdl",
               "librt", "libpthread", "ld-linux-x86-64", "ld-linux-aarch64"}  # fmt: skip
    for library in libraries():
        needed = re.findall(r"NEEDED.*\[(.*?)\.so", output("readelf", "-d", str(library)))
        assert set(needed) <= allowed
        assert ("libtorch_cuda" in needed) == (library.name == "_cuda.abi3.so")


def weak_symbols():
    """Of every file for one instruction set, by its name."""
    include = ["-I", str(ROOT / "csrc"), "-isystem", str(Path(torch.__file__).parent / "include")]
    found = {}
    for source in (ROOT / "csrc").rglob("*.cpp"):
        if isa := native._isa_flags(source):
            with tempfile.TemporaryDirectory() as folder:
                obj = f"{folder}/object.o"
                flags = ["-std=c++20", native.TARGET, *isa, *include]
                output("c++", "-O0", *flags, "-c", str(source), "-o", obj)
                symbols = output("nm", "-C", obj)
            # DW.ref.* is a pointer to the unwinder's routine: data, the same for every processor.
            found[source.name] = re.findall(r"^\S* [WVu] (?!DW\.ref\.)(.*)$", symbols, re.MULTILINE)
    return found


@pytest.mark.skipif(not shutil.which("nm") or not shutil.which("c++"), reason="no compiler")
@pytest.mark.skipif(native.platform.machine() != "x86_64", reason="not an x86-64")
@pytest.mark.ahead(lambda: weak_symbols())
def test_files_for_newer_processors_share_no_functions_with_the_rest(ahead):
    """A weak symbol compiled for AVX-512 could be the copy that the linker keeps for everyone."""
    found = ahead()
    assert found
    assert not {name: weak for name, weak in found.items() if weak}


@pytest.mark.quick
def test_build_info():
    info = _native.build_info()
    assert set(info) == {"torch", "compiler", "machine", "cuda", "no_cuda_reason"}
    assert (info["cuda"] is None) == (info["no_cuda_reason"] is not None)
    assert (info["cuda"] is None) == (not (PACKAGE / "_cuda.abi3.so").is_file())


@pytest.mark.quick
def test_cuda_library_is_loaded_where_torch_has_cuda():
    """Loading needs neither a GPU nor a driver."""
    if (PACKAGE / "_cuda.abi3.so").is_file() and torch.backends.cuda.is_built():
        assert _native.cuda_status == "yes"
    else:
        assert _native.cuda_status != "yes"


@pytest.mark.quick
@pytest.mark.parametrize("place", ["checkout", "installation"])
def test_import_without_the_compiled_part_says_what_to_run(tmp_path, place):
    copy = shutil.copytree(
        PACKAGE, tmp_path / "fused_resnet", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    if place == "checkout":
        (tmp_path / "setup.py").touch()
    result = subprocess.run(
        [sys.executable, "-c", "import fused_resnet"], cwd=tmp_path, capture_output=True, text=True
    )
    *_, last = result.stderr.strip().splitlines()
    assert last.startswith(f"ImportError: fused_resnet: {copy}/_C.abi3.so is missing: run `pip ")
    assert "pip install -e ." in last if place == "checkout" else "pip install" in last


def test_import_of_a_broken_compiled_part_says_why_and_what_to_run(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / "fused_resnet")
    (copy / "_C.abi3.so").write_bytes(b"not a library")
    result = subprocess.run(
        [sys.executable, "-c", "import fused_resnet"], cwd=tmp_path, capture_output=True, text=True
    )
    *_, last = result.stderr.strip().splitlines()
    start = f"ImportError: fused_resnet: torch {torch.__version__} cannot load {copy}/_C.abi3.so ("
    assert last.startswith(start)
    assert "too short" in last or "ELF" in last
    assert "run `pip install" in last
