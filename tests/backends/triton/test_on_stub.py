"""Plans: a forward pass of Triton's kernels, launched again by csrc/launch_plan.cpp.

The checks are in tests/support/stub_checks.py. They run in a process of their own, on a device
whose driver and runtime are a stub: tensors, streams, Triton's compiler and its launcher are real,
no kernel runs, and what is launched is compared.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from support import cuda_stub
from torch import Tensor

from fused_resnet.modules import plans

_CHECKS = "stub_checks.py"


@functools.cache
def outcomes() -> dict[str, str | None]:
    if (reason := cuda_stub.missing()) is not None:
        pytest.skip(reason)
    # Kernels of csrc/cuda have a runtime of their own, which finds no driver here.
    return cuda_stub.outcomes_of(_CHECKS, [], 600)


@pytest.mark.parametrize("name", cuda_stub.names_of(_CHECKS))
@pytest.mark.ahead(lambda: outcomes())
def test_on_a_stub(ahead: Callable[[], dict[str, str | None]], name: str) -> None:
    outcome = ahead()
    assert outcome[name] is None, outcome[name]


def test_operators_say_what_is_wrong() -> None:
    operators = torch.ops.fused_resnet
    x = torch.zeros(1, 3, 4, 4)

    def make(launches: list[int], parameters: Sequence[Tensor] = (), fixed: Sequence[int] = ()):
        return operators.make_launch_plan(x, parameters, fixed, launches, [0, 0], [2, 3], [3, 1])

    with pytest.raises(ValueError, match="launches end after 2 numbers"):
        make([1, 1])
    with pytest.raises(ValueError, match="no tensor 4 among 1 parameters"):
        make([1, 1, 1, 1, 32, 0, 0, 1, 1, 4, 0], [x])
    with pytest.raises(ValueError, match="has 0 for a size, must be positive"):
        make([1, 0, 1, 1, 32, 0, 0, 0])
    with pytest.raises(ValueError, match="no parameter 1 among 1"):
        make([], [x], [1])
    with pytest.raises(ValueError, match="workspace must be bytes, and 0 of them cleared"):
        operators.make_launch_plan(x, [], [], [], [8, 8], [1], [1])
    with pytest.raises(ValueError, match="there is no plan -1"):
        operators.run_launch_plan(-1, x, 0)
    plan = make([])
    assert operators.run_launch_plan(plan, x.half(), 0) is None
    assert operators.run_launch_plan(plan, x, 0).stride() == (3, 1)
    operators.free_launch_plan(plan)
    with pytest.raises(ValueError, match="there is no plan"):
        operators.run_launch_plan(plan, x, 0)


def test_parameters_that_must_stay_where_they_are() -> None:
    """Of those that a kernel finds by an address in memory; others may move."""
    operators = torch.ops.fused_resnet
    x, fixed, free = (torch.zeros(1, 3, 4, 4) for _ in range(3))
    plan = operators.make_launch_plan(x, [free, fixed], [1], [], [0, 0], [1], [1])
    free.data = free.data.clone()
    assert operators.run_launch_plan(plan, x, 0) is not None
    before, fixed.data = fixed.data, fixed.data.clone()
    assert operators.run_launch_plan(plan, x, 0) is None
    fixed.data = before
    assert operators.run_launch_plan(plan, x, 0) is not None


def test_the_variable_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_from_environment", None)
    monkeypatch.setenv("FUSED_RESNET_PLANS", "no")
    with pytest.raises(ValueError, match="FUSED_RESNET_PLANS is 'no', must be one of 0, 1"):
        plans.enabled()
    monkeypatch.setenv("FUSED_RESNET_PLANS", "0")
    assert not plans.enabled()
