"""What results say about the machine they are from."""

from __future__ import annotations

import pytest
import torch

from fused_resnet.measure import environment

NUMBERS = {"cpu family": "25", "model": "17", "stepping": "1"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Intel(R) Xeon(R) Processor", "(family 25, model 17, stepping 1)"),
        ("AMD EPYC", "(family 25, model 17, stepping 1)"),
        ("AMD EPYC 9654 96-Core Processor", None),
        ("Intel(R) Xeon(R) Platinum 8488C", None),
    ],
)
def test_names_without_a_number(
    monkeypatch: pytest.MonkeyPatch, name: str, expected: str | None
) -> None:
    """A name that no product's number is in tells no two generations apart: numbers do."""
    monkeypatch.setattr(environment, "_cpu_info", lambda: {"model name": name, **NUMBERS})
    found = environment.describe_device(torch.device("cpu"))["name"]
    assert found == (name if expected is None else f"{name} {expected}")


def test_names_where_there_are_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other architectures' /proc/cpuinfo has neither a name nor families."""
    monkeypatch.setattr(environment, "_cpu_info", dict)
    monkeypatch.setattr(environment.platform, "processor", lambda: "aarch")
    assert environment.describe_device(torch.device("cpu"))["name"] == "aarch"
