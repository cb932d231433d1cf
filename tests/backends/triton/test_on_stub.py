"""Plans: a forward pass of Triton's kernels, launched again by csrc/launch_plan.cpp.

The checks are in tests/support/stub_checks.py. They run in a process of their own, on a device
whose driver and runtime are a stub: tensors, streams, Triton's compiler and its launcher are real,
no kernel runs, and what is launched is compared.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fused_resnet.modules import plans
from tests.support import cuda_stub

_CHECKS = Path(cuda_stub.__file__).with_name("stub_checks.py")
_NAMES = [
    node.name
    for node in ast.parse(_CHECKS.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    if (reason := cuda_stub.missing()) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("stub")
    results = folder / "results.json"
    run = subprocess.run(
        [sys.executable, _CHECKS, results],
        env=cuda_stub.environment(folder),
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(results.read_text())


@pytest.mark.parametrize("name", _NAMES)
def test_on_a_stub(outcome: dict[str, str | None], name: str) -> None:
    assert outcome[name] is None, outcome[name]


def test_operators_say_what_is_wrong() -> None:
    operators = torch.ops.fused_resnet
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="launches end after 2 numbers"):
        operators.make_launch_plan(x, [], [1, 1], 0, [1], [1])
    with pytest.raises(ValueError, match="no tensor 4 among 1 parameters"):
        operators.make_launch_plan(x, [x], [1, 1, 1, 1, 32, 0, 0, 1, 4, 0], 0, [1], [1])
    with pytest.raises(ValueError, match="has 0 for a size, must be positive"):
        operators.make_launch_plan(x, [], [1, 0, 1, 1, 32, 0, 0, 0], 0, [1], [1])
    with pytest.raises(ValueError, match="there is no plan -1"):
        operators.run_launch_plan(-1, x, 0)
    plan = operators.make_launch_plan(x, [], [], 0, [2, 3], [3, 1])
    assert operators.run_launch_plan(plan, x.half(), 0) is None
    operators.free_launch_plan(plan)
    with pytest.raises(ValueError, match="there is no plan"):
        operators.run_launch_plan(plan, x, 0)


def test_the_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_from_environment", None)
    monkeypatch.setenv("FUSED_RESNET_PLANS", "no")
    with pytest.raises(ValueError, match="FUSED_RESNET_PLANS is 'no', must be one of 0, 1"):
        plans.enabled()
    monkeypatch.setenv("FUSED_RESNET_PLANS", "0")
    assert not plans.enabled()
