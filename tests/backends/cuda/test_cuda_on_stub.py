"""Plans of the CUDA backend on a device whose runtime is a stub: see cuda_stub.c.

Tensors, streams, the caching allocator and this package's library are real there, but for the
runtime that it is linked with; no kernel runs, and what is launched is compared. What plans compute
is tested where kernels run on the host: test_cuda_plans.py.
"""

from __future__ import annotations

import ast
import functools
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import cuda_stub, processes

_CHECKS = Path(cuda_stub.__file__).with_name("stub_cuda_checks.py")
_NAMES = [
    node.name
    for node in ast.parse(_CHECKS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@functools.cache
def outcomes() -> dict[str, str | None]:
    if (reason := cuda_stub.missing()) is not None:
        pytest.skip(reason)
    if not (parts := cuda_stub.objects()):
        pytest.skip("the CUDA kernels were not built here")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuda_stub.package(folder, parts)
        environment = cuda_stub.environment(folder, processes.current_environment())
        environment["PYTHONPATH"] = str(folder)
        command = [sys.executable, _CHECKS, folder / "results.json"]
        status, out, err = processes.run_command(command, 300, environment, folder)
        assert status == 0, err[-4000:]
        print(out)
        return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.ahead(lambda: outcomes())
def test_on_a_stub(ahead: Callable[[], dict[str, str | None]], name: str) -> None:
    outcome = ahead()
    assert outcome[name] is None, outcome[name]
