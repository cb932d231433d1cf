"""Loads the compiled operators, `_C` always and `_cuda` where torch has CUDA.

They are plain shared libraries that register operators under `torch.ops.fused_resnet` when loaded;
there is nothing in them for Python to import.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).parent


def _how_to_build() -> str:
    root = _PACKAGE.parent
    if (root / "setup.py").is_file():
        return (
            f"run `pip install -e .` in {root}, or `pip install .` there and then start Python "
            "somewhere else"
        )
    return "run `pip install --force-reinstall --no-deps .` in the source directory of fused_resnet"


def _reason(error: OSError) -> str:
    # torch 2.15 raises its own error, which names the file only, from the loader's.
    return str(error.__cause__ or error).partition("\n")[0]


def _load_host() -> None:
    library = _PACKAGE / "_C.abi3.so"
    if not library.is_file():
        raise ImportError(f"fused_resnet: {library} is missing: {_how_to_build()}")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise ImportError(
            f"fused_resnet: torch {torch.__version__} cannot load {library} ({_reason(error)}): "
            f"{_how_to_build()}"
        ) from error


def _load_cuda() -> str:
    library = _PACKAGE / "_cuda.abi3.so"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} was built without CUDA"
    if not library.is_file():
        return f"built without CUDA kernels: {build_info().get('no_cuda_reason', 'unknown reason')}"
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return _reason(error)
    return "yes"


def build_info() -> dict[str, Any]:
    """What the compiled part was built with and for.

    Returns:
        `torch` and `compiler` (versions), `machine`, `cuda` (None, or a dict with `nvcc`, its
        version, and `architectures`, such as ["9.0", "12.0+PTX"]) and `no_cuda_reason` (None, or
        why there is no `_cuda`).
    """
    return json.loads((_PACKAGE / "_build_info.json").read_text())


_load_host()

cuda_status: str = _load_cuda()
"""Whether the CUDA kernels are loaded: "yes" or the reason why not."""

cuda_operators: Any = torch.ops.fused_resnet if cuda_status == "yes" else None
"""Where the CUDA kernels' operators are registered; None where they are not loaded."""
