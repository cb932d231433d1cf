"""Times the ways to run a problem and finds the fastest that is right.

The candidates are Triton and CUDA tiles (those their estimates think most of), the library's
convolution with `scale_shift_act`, and cuDNN's fused operators. What would run without tuning and
the library are always among them and are timed to the end, so a choice is never slower than not
tuning.

Of a chain they are its tiles, with and without the next block's convolution, those of CUDA's chain
for Hopper, and its convolutions one by one, each as it is chosen by then; these take the library's
place. Of a BasicBlock they are CUDA's tiles and its convolutions one by one.

Every candidate is checked before it is timed: its error against float64 obeys the error rule of
`testing.py`, and NaN in the input and the residual reaches every output it should and no other
image. A candidate that fails, or raises, is reported and never chosen. That is how cuDNN's fused
operators are kept out wherever their ReLU turns NaN into zero.

Timing is successive halving (Jamieson and Talwalkar, AISTATS 2016): a few interleaved rounds of
all, twice as many of the better half, and so on; the last few are timed together at length and
compared by their medians of that last stage alone.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...backends import cuda, cudnn, library
from ...tuning import basic_block, chain, cuda_tiles, estimate, reload, table, untuned
from ...tuning.architecture import Architecture
from ...tuning.choice import (
    BASIC_BLOCK,
    CHAIN_KERNELS,
    CONVOLUTIONS,
    HOPPER_CHAINS,
    MEASURED,
    Choice,
)
from ...tuning.problem import BasicBlockProblem, ChainProblem, ConvProblem, Problem
from ..errors import first_line
from .cases import Case, ChainCase, Run, case_of, check, described, pooled, precision
from .race import Timer, race

MOST_TILES = 32
# CUDA's are compiled already, so there are few.
_MOST_CUDA_TILES = 8
# What has to be gained before something else than the estimate's choice is remembered.
_MARGIN = 0.99


@dataclass(frozen=True)
class Result:
    """What tuning found for one problem.

    Attributes:
        problem: the problem.
        choice: the fastest right candidate; what runs without tuning, if nothing was.
        microseconds: medians of the last stage by candidate, `choice`'s name among them; empty if
            every candidate failed.
        untuned: what runs without tuning.
        failures: why a candidate was not timed, by its name.
    """

    problem: Problem
    choice: Choice
    microseconds: dict[str, float]
    untuned: Choice
    failures: dict[str, str]

    def entry(self) -> table.Entry | None:
        """The line a table keeps of this; None if nothing was timed."""
        if not self.microseconds:
            return None

        def of(choice: Choice) -> float | None:
            time = self.microseconds.get(str(choice))
            return None if time is None else round(time, 3)

        return table.Entry(
            self.choice.kernel,
            self.choice.tile,
            round(self.microseconds[str(self.choice)], 3),
            of(self.untuned),
            of(baseline(self.problem)),
            datetime.date.today().isoformat(),
            _versions(),
        )


LIBRARY = Choice("library", None, MEASURED)
_ONE_BY_ONE = Choice(CONVOLUTIONS, None, MEASURED)


def baseline(problem: Problem) -> Choice:
    """What a problem's candidates are measured against: the library, or no chain."""
    return LIBRARY if isinstance(problem, ConvProblem) else _ONE_BY_ONE


def candidates(
    problem: Problem, architecture: Architecture, device: torch.device, most: int = MOST_TILES
) -> list[Choice]:
    """What is worth timing: what runs without tuning first, then the rest, the likeliest first.

    Args:
        problem: any.
        architecture: the GPU.
        device: where it will run; cuDNN's operators are candidates where torch has cuDNN.
        most: how many Triton tiles.
    """
    if not isinstance(problem, ConvProblem):
        kind = basic_block if isinstance(problem, BasicBlockProblem) else chain
        ways = kind.candidates(problem, architecture)
        if isinstance(problem, ChainProblem) and device.type == "cuda":
            ways = ways + cuda_tiles.hopper_chains(problem, architecture)
        first = replace(untuned(problem, architecture), source=MEASURED)
        return [first, *(choice for choice in ways if str(choice) != str(first))]
    tiles = sorted(
        estimate.candidates(problem, architecture),
        key=lambda tile: estimate.predicted(problem, architecture, tile),
    )
    found = [untuned(problem, architecture), LIBRARY]
    found += [Choice("triton", tile, MEASURED) for tile in tiles[:most]]
    if device.type == "cuda":
        tiles = cuda_tiles.candidates(problem, architecture)[:_MOST_CUDA_TILES]
        tiles += cuda_tiles.hopper_candidates(problem, architecture)
        found += [Choice("cuda", tile, MEASURED) for tile in tiles]
    if device.type == "cuda" and problem.pool is None and torch.backends.cudnn.is_available():
        fused = "cudnn_convolution_add_relu" if problem.residual else "cudnn_convolution_relu"
        found.append(Choice(fused, None, MEASURED))
    return list({str(choice): choice for choice in found}.values())


def tune(
    problem: Problem,
    architecture: Architecture,
    device: torch.device,
    timer: Timer,
    *,
    choices: Sequence[Choice] | None = None,
    runner: Callable[[Choice], Run] | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Result:
    """Checks and times the candidates for a problem.

    Args:
        problem: what to tune.
        architecture: the GPU it is tuned for.
        device: where to run.
        timer: see `Timer`; `EventTimer(device)` on a GPU.
        choices: the candidates; those of `candidates` by default.
        runner: how a candidate is run; by this package's backends by default.
        progress: told which share of the work is done, 0 to 1.

    Raises:
        torch.OutOfMemoryError: the problem's tensors do not fit.
        KeyboardInterrupt: nothing is known of this problem yet; what other problems gave is intact.
    """
    choices = list(choices or candidates(problem, architecture, device))
    default = untuned(problem, architecture)
    runner = runner or run_of
    with precision(problem.dtype), torch.inference_mode():
        case = case_of(problem, device)
        calls: dict[str, Callable[[], object]] = {}
        failures: dict[str, str] = {}
        for done, choice in enumerate(choices):
            run = runner(choice)
            reason = check(run, case)
            if reason is None:
                calls[str(choice)] = _call(run, case)
            else:
                failures[str(choice)] = reason
            progress(0.6 * (done + 1) / len(choices))
        keep = {str(default), str(baseline(problem))}
        medians = race(calls, keep, timer, lambda share: progress(0.6 + 0.4 * share))
    if not medians:
        return Result(problem, default, {}, default, failures)
    by_name = {str(choice): choice for choice in choices}
    fastest = min(medians, key=medians.__getitem__)
    if str(default) in medians and medians[fastest] > _MARGIN * medians[str(default)]:
        fastest = str(default)
    chosen = replace(by_name[fastest], source=MEASURED)
    microseconds = {name: 1e6 * seconds for name, seconds in medians.items()}
    return Result(problem, chosen, microseconds, default, failures)


@dataclass
class Session:
    """The results of several problems, each written to a table as soon as it is there.

    Attributes:
        results: in the order they were found.
        interrupted: Ctrl-C ended it before the last problem.
        unsaved: why some result is not in the table, or None.
        skipped: why a problem has no result, by problem.
    """

    results: list[Result] = field(default_factory=list)
    interrupted: bool = False
    unsaved: str | None = None
    skipped: dict[Problem, str] = field(default_factory=dict)


def tune_all(
    problems: Sequence[Problem],
    architecture: Architecture,
    device: torch.device,
    timer: Timer,
    path: Path,
    *,
    progress: Callable[[Problem, float], None] = lambda problem, done: None,
    runner: Callable[[Choice], Run] | None = None,
) -> Session:
    """Tunes problems one after another; see `tune`. Ctrl-C keeps what was found until then.

    Args:
        problems: what to tune.
        architecture: the GPU; its name is the table's.
        device: where to run.
        timer: see `Timer`.
        path: the table to add to.
        progress: told the problem at hand and how many are done, fractions included.
        runner: see `tune`.
    """
    session = Session()
    try:
        for index, problem in enumerate(problems):
            progress(problem, index)

            def tell(share: float, at: int = index, what: Problem = problem) -> None:
                progress(what, at + share)

            try:
                result = tune(problem, architecture, device, timer, runner=runner, progress=tell)
            except (torch.OutOfMemoryError, MemoryError) as error:
                session.skipped[problem] = f"out of memory: {first_line(error)}"
                continue
            session.results.append(result)
            entry = result.entry()
            if entry is None:
                session.skipped[problem] = "no candidate is right"
                continue
            try:
                table.merge(path, architecture.name, {problem: entry})
            except OSError as error:
                session.unsaved = str(error)
            reload()  # a chain's convolutions run as they were just found to be fastest
    except KeyboardInterrupt:
        session.interrupted = True
    reload()
    return session


def run_of(choice: Choice) -> Run:
    """How this package runs a choice."""
    if choice.kernel == "triton":
        return lambda arguments, problem: _run_triton(arguments, problem, choice)
    if choice.kernel == BASIC_BLOCK:
        tile = choice.tile
        assert tile is not None

        def run(arguments: tuple[Any, ...], problem: object) -> tuple[Tensor]:
            x, first, second = arguments
            return (cuda.run_basic_block(x, first, second, tile),)

        return run
    if choice.kernel in CHAIN_KERNELS + HOPPER_CHAINS:
        return lambda arguments, problem: _run_chain(arguments, problem, choice)
    if choice.kernel == "cuda":
        return lambda arguments, problem: cuda.conv_bn_act(*described(arguments), choice.tile)
    if choice.kernel == "library":
        return _run_library
    return lambda arguments, problem: cudnn.conv_bn_act(*described(arguments))


def _call(run: Run, case: Case | ChainCase) -> Callable[[], object]:
    return lambda: run(case.arguments, case.problem)


def _run_triton(arguments: tuple[Any, ...], problem: ConvProblem, choice: Choice) -> Tensor:
    from ...backends.triton import lazy

    if estimate.kernel_for(problem) == "stem_pool":
        input, layer, _, activation = described(arguments)
        return lazy.stems().conv_bn_act_max_pool(input, layer, activation, choice.tile)
    return pooled(lazy.launchers().conv_bn_act(*described(arguments), choice.tile), problem)


def _run_chain(
    arguments: tuple[Any, ...], problem: ChainProblem | BasicBlockProblem, choice: Choice
) -> tuple[Tensor, ...]:
    from ...backends import triton
    from ...backends.triton import inference

    if isinstance(problem, BasicBlockProblem):
        x, first, second = arguments
        out = inference.conv_bn_act(x, first, None, "relu")
        return (inference.conv_bn_act(out, second, x, "relu"),)
    return triton.run_chain(arguments, problem, choice)


def _run_library(arguments: tuple[Any, ...], problem: ConvProblem) -> Tensor:
    return pooled(library.conv_bn_act(*described(arguments)), problem)


def _versions() -> str:
    names = [f"torch {torch.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        names.append(f"triton {importlib.metadata.version('triton')}")
    return ", ".join(names)
