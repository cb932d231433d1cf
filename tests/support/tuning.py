"""What the tests of tuning share: problems, GPUs, timers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from functools import cache

import torch
from hypothesis import strategies as st
from torch import Tensor

from fused_resnet import backends
from fused_resnet.measure import networks
from fused_resnet.measure.tune import cases, tuner
from fused_resnet.tuning import (
    Choice,
    ConvProblem,
    architecture,
    table,
)
from fused_resnet.tuning.problem import DTYPES
from support import MODELS

H100 = architecture.ARCHITECTURES["H100"]
GPUS = list(architecture.ARCHITECTURES.values())
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
SMALL = ConvProblem(2, 8, 6, 6, 16, 3, 3, (1, 1), (1, 1), (1, 1), 1, "float32", True)
STEM = ConvProblem(
    2, 3, 20, 20, 8, 7, 7, (2, 2), (3, 3), (1, 1), 1, "float32", False, (3, 3, 2, 2, 1, 1)
)


def pairs(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def problems(draw: st.DrawFn) -> ConvProblem:
    groups = draw(st.sampled_from([1, 1, 1, 2, 8, 32]))
    R, S = draw(pairs(1, 7))
    dilation, padding = draw(pairs(1, 2)), draw(pairs(0, 3))
    problem = ConvProblem(
        draw(st.integers(1, 300)),
        groups * draw(st.integers(1, 300)),
        draw(st.integers(dilation[0] * (R - 1) + 1, 300)),
        draw(st.integers(dilation[1] * (S - 1) + 1, 300)),
        groups * draw(st.integers(1, 300)),
        R,
        S,
        draw(pairs(1, 3)),
        padding,
        dilation,
        groups,
        draw(st.sampled_from(DTYPES)),
        draw(st.booleans()),
        draw(st.sampled_from([None, None, (3, 3, 2, 2, 1, 1), (2, 3, 1, 2, 0, 1)])),
    )
    fits = min(problem.output_size) >= 1
    return problem if fits else dataclasses.replace(problem, pool=None)


@cache
def model_problems() -> tuple[ConvProblem, ...]:
    """Every distinct layer of the supported models at batch 1, in float16."""
    found: dict[ConvProblem, None] = {}
    for name in MODELS:
        found.update(dict.fromkeys(networks.of_model(name, 1, "float16")))
    return tuple(found)


LIBRARY_ENTRY = table.Entry("library", None, 3.0)
GPU = "NVIDIA H100 80GB HBM3"


def document(**changed: object) -> str:
    fields = {"kernel": "library", "microseconds": 3.0}
    values = {"format": table.FORMAT, "gpu": GPU, "choices": {STEM.key: fields}}
    return json.dumps({**values, **changed})


class FakeTimer:
    """Answers with given seconds by candidate, and counts what it was asked."""

    def __init__(self, seconds: Callable[[str], float], stop_after: int | None = None) -> None:
        self.seconds = seconds
        self.rounds: dict[str, int] = {}
        self.asked: list[set[str]] = []
        self.stop_after = stop_after

    def __call__(
        self, calls: Mapping[str, Callable[[], object]], rounds: int
    ) -> dict[str, list[float]]:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(set(calls))
        for name in calls:
            self.rounds[name] = self.rounds.get(name, 0) + rounds
        return {name: [self.seconds(name)] * rounds for name in calls}


def run_pooled(arguments: tuple, problem: ConvProblem) -> Tensor:
    return tuner._run_library(arguments, problem)


def fake_runner(**changes: Callable[[Tensor], Tensor]) -> Callable[[Choice], cases.Run]:
    """Every candidate computes what the library does, those named otherwise changed afterwards.

    A name is the start of a candidate's, with _ for what cannot be in a Python name.
    """

    def runner(choice: Choice) -> cases.Run:
        name = "".join(c if c.isalnum() else "_" for c in str(choice))
        for start, change in changes.items():
            if name.startswith(start):
                return lambda arguments, problem: change(run_pooled(arguments, problem))
        return run_pooled

    return runner


def tune(
    problem: ConvProblem = SMALL, timer: FakeTimer | None = None, **named: object
) -> tuner.Result:
    named = {"runner": fake_runner(), **named}
    return tuner.tune(problem, H100, CPU, timer or FakeTimer(lambda name: 1e-5), **named)


def drops_nan(out: Tensor) -> Tensor:
    return out.nan_to_num(0.0)


TRITON = backends.available()["triton"]
