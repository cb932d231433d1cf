"""Times the ways to run a problem and finds the fastest that is right.

The candidates are Triton and CUDA tiles (those their estimates think most of), the library's
convolution with `scale_shift_act`, and cuDNN's fused operators. What would run without tuning and
the library are always among them and are timed to the end, so a choice is never slower than not
tuning.

Of a chain they are its tiles, with and without the next block's convolution, and its convolutions
one by one, each as it is chosen by then; these take the library's place. Of a BasicBlock they are
CUDA's tiles and its convolutions one by one.

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
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...backends import cuda, cudnn, library
from ...testing import FACTOR
from ...tuning import basic_block, chain, cuda_tiles, estimate, reload, table, untuned
from ...tuning.architecture import Architecture
from ...tuning.problem import (
    BASIC_BLOCK,
    CHAIN_KERNELS,
    CONVOLUTIONS,
    MEASURED,
    BasicBlockProblem,
    ChainProblem,
    Choice,
    ConvProblem,
    Problem,
)
from .. import clock
from ..inputs import first_line

Timer = Callable[[Mapping[str, Callable[[], object]], int], dict[str, list[float]]]
"""Takes calls by name and a number of rounds; returns each call's times in seconds."""

MOST_TILES = 32
# CUDA's are compiled already, so there are few.
_MOST_CUDA_TILES = 8
_FIRST_ROUNDS = 3
_LAST_ROUNDS = 25
_FINALISTS = 4
# What has to be gained before something else than the estimate's choice is remembered.
_MARGIN = 0.99
# Images whose float64 reference is computed at a time.
_IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class Case:
    """The tensors of a problem, as `backends` take them, with the reference for their result.

    Attributes:
        problem: what they are of.
        arguments: those of `conv_bn_act` from `input` to `activation`.
        expected: (N, K, P, Q) in float64, pooled if the problem is.
        allowed_error: relative to `expected`.
    """

    problem: ConvProblem
    arguments: tuple
    expected: Tensor
    allowed_error: float

    @property
    def residual(self) -> Tensor | None:
        """The argument of that name."""
        return self.arguments[12]


@dataclass(frozen=True)
class ChainCase:
    """The tensors of a chain or of a BasicBlock, with the references for its results.

    Attributes:
        problem: what they are of.
        arguments: the output of the block's first convolution, its input, and the arguments of
            `conv_bn_act` from `weight` to `groups` of the 3x3, the 1x1, the projection and the next
            block's first convolution, where there are these, else None. Of a BasicBlock its input
            and those of its two convolutions.
        expected: the block's output and the next one's 3x3 input, if it has one, in float64.
        allowed_errors: of these, relative.
    """

    problem: ChainProblem | BasicBlockProblem
    arguments: tuple
    expected: tuple[Tensor, ...]
    allowed_errors: tuple[float, ...]

    @property
    def images(self) -> int:
        """How many of the arguments, the first ones, are images."""
        return 1 if isinstance(self.problem, BasicBlockProblem) else 2


Run = Callable[[tuple, Problem], Any]
"""Runs a candidate on a case's arguments. Returns a tensor, pooled where the problem has a pool; of
a chain a tuple, as `ChainCase.expected`."""


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
            of(self.choice),
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
        return [
            replace(untuned(problem, architecture), source=MEASURED),
            *(
                choice
                for choice in kind.candidates(problem, architecture)
                if str(choice) != str(untuned(problem, architecture))
            ),
        ]
    tiles = sorted(
        estimate.candidates(problem, architecture),
        key=lambda tile: estimate.predicted(problem, architecture, tile),
    )
    found = [untuned(problem, architecture), LIBRARY]
    found += [Choice("triton", tile, MEASURED) for tile in tiles[:most]]
    if device.type == "cuda":
        tiles = cuda_tiles.candidates(problem, architecture)[:_MOST_CUDA_TILES]
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
            try:
                result = tune(
                    problem, architecture, device, timer, runner=runner,
                    progress=lambda share, at=index, what=problem: progress(what, at + share),
                )  # fmt: skip
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


def race(
    calls: Mapping[str, Callable[[], object]],
    keep: set[str],
    timer: Timer,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Successive halving; see this module's docstring.

    Args:
        calls: by name.
        keep: names that stay to the end.
        timer: see `Timer`.
        progress: told which share is done, 0 to 1.

    Returns:
        The finalists' median seconds; empty if there are no calls.
    """
    alive, rounds, done = list(calls), _FIRST_ROUNDS, 0
    # Each stage has half the calls and twice the rounds of the one before.
    stages = math.log2(max(2, len(alive) / _FINALISTS))
    total = stages * len(alive) * _FIRST_ROUNDS + _FINALISTS * _LAST_ROUNDS
    while len(alive) > _FINALISTS:
        times = timer({name: calls[name] for name in alive}, rounds)
        done += len(alive) * rounds
        progress(min(1.0, done / total))
        best = sorted(alive, key=lambda name: statistics.median(times[name]))
        half = set(best[: max(_FINALISTS - 1, len(best) // 2)]) | keep
        if len(half) >= len(alive):
            break
        alive = [name for name in alive if name in half]
        rounds *= 2
    if not alive:
        return {}
    times = timer({name: calls[name] for name in alive}, _LAST_ROUNDS)
    progress(1.0)
    return {name: statistics.median(times[name]) for name in alive}


def case_of(problem: Problem, device: torch.device) -> Case | ChainCase:
    """Random tensors for a problem, channels_last, and their float64 results."""
    if isinstance(problem, ChainProblem):
        return make_chain_case(problem, device)
    if isinstance(problem, BasicBlockProblem):
        return make_basic_block_case(problem, device)
    return make_case(problem, device)


def make_basic_block_case(
    problem: BasicBlockProblem, device: torch.device, seed: int = 0
) -> ChainCase:
    """As `make_chain_case`, for a BasicBlock."""
    parts = [
        _random_arguments(part, device, seed + index) for index, part in enumerate(problem.parts)
    ]
    return _block_case(problem, (parts[0][0], *(one[1:12] for one in parts)), 1)


def make_chain_case(problem: ChainProblem, device: torch.device, seed: int = 0) -> ChainCase:
    """Random tensors for a chain, channels_last, and their float64 results."""
    parts = (problem.convolution, problem.expand, problem.project, problem.reduce)
    cases = [
        None if part is None else _random_arguments(part, device, seed + index)
        for index, part in enumerate(parts)
    ]
    reduced, shortcut = cases[0][0], cases[1][12]
    if cases[2] is not None:
        shortcut = cases[2][0]
    layers = (None if one is None else one[1:12] for one in cases)
    return _block_case(problem, (reduced, shortcut, *layers), 2)


def _block_case(
    problem: ChainProblem | BasicBlockProblem, arguments: tuple, images: int
) -> ChainCase:
    expected = _expected_block(arguments, images)
    floor = 4 * torch.finfo(torch.float32).eps
    allowed = (
        max(FACTOR * relative_error(eager, exact), floor)
        for eager, exact in zip(_eager_block(arguments, images), expected, strict=True)
    )
    return ChainCase(problem, arguments, expected, tuple(allowed))


def _eager_block(arguments: tuple, images: int) -> tuple[Tensor, ...]:
    return eager_chain(arguments) if images == 2 else eager_basic_block(arguments)


def eager_basic_block(arguments: tuple) -> tuple[Tensor, ...]:
    """A BasicBlock by operators of their own, in the dtype of its arguments."""
    x, first, second = arguments
    out = _eager_layer(_eager_layer(x, first, None, True), second, x, True)
    return (out,)


def eager_chain(arguments: tuple) -> tuple[Tensor, ...]:
    """A chain by operators of their own, in the dtype of its arguments."""
    reduced, x, convolution, expand, project, reduce = arguments

    shortcut = x if project is None else _eager_layer(x, project, None, False)
    out = _eager_layer(_eager_layer(reduced, convolution, None, True), expand, shortcut, True)
    return (out,) if reduce is None else (out, _eager_layer(out, reduce, None, True))


def _eager_layer(input: Tensor, layer: tuple, residual: Tensor | None, relu: bool) -> Tensor:
    weight, mean, var, bn_weight, bn_bias, eps, bias, *geometry = layer
    out = F.conv2d(input, weight, bias, *geometry)
    out = F.batch_norm(out, mean, var, bn_weight, bn_bias, False, 0.0, eps)
    if residual is not None:
        out += residual
    return F.relu(out) if relu else out


def _expected_block(arguments: tuple, images: int) -> tuple[Tensor, ...]:
    """`_eager_block` in float64, some images at a time."""
    layers = tuple(
        None
        if layer is None
        else tuple(one.double() if isinstance(one, Tensor) else one for one in layer)
        for layer in arguments[images:]
    )
    parts = [
        _eager_block((*(part.double() for part in group), *layers), images)
        for group in zip(*(one.split(_IMAGES_AT_ONCE) for one in arguments[:images]), strict=True)
    ]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def make_case(problem: ConvProblem, device: torch.device, seed: int = 0) -> Case:
    """Random tensors for a problem, channels_last, and their float64 result."""
    arguments = _random_arguments(problem, device, seed)
    expected = _expected(arguments, problem)
    eager = relative_error(_eager(arguments, problem), expected)
    floor = 4 * torch.finfo(torch.float32).eps
    return Case(problem, arguments, expected, max(FACTOR * eager, floor))


def _random_arguments(problem: ConvProblem, device: torch.device, seed: int) -> tuple:
    """Those of `conv_bn_act`."""
    dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(problem.dtype, torch.float32)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(problem.K, generator=generator, device=device) * (high - low) + low

    nhwc = {"memory_format": torch.channels_last, "dtype": dtype}
    channels = problem.C // problem.groups
    weight = normal(problem.K, channels, problem.R, problem.S)
    weight /= (channels * problem.R * problem.S) ** 0.5
    residual = None
    if problem.residual:
        residual = normal(problem.N, problem.K, problem.P, problem.Q).to(**nhwc)
    return (
        normal(problem.N, problem.C, problem.H, problem.W).to(**nhwc),
        weight.to(**nhwc),
        normal(problem.K).mul_(0.3),
        uniform(0.5, 2.0),
        uniform(0.5, 1.5),
        normal(problem.K).mul_(0.3),
        1e-5,
        None,
        problem.stride,
        problem.padding,
        problem.dilation,
        problem.groups,
        residual,
        "relu",
    )


def check(run: Run, case: Case | ChainCase) -> str | None:
    """What is wrong with a candidate's results, or None."""
    try:
        out = run(case.arguments, case.problem)
        if isinstance(case, ChainCase):
            return chain_error(out, case) or chain_nan_error(run, case)
        reason = _error(out, case) or nan_error(run, case)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    return reason


def run_of(choice: Choice) -> Run:
    """How this package runs a choice."""
    if choice.kernel == "triton":
        return lambda arguments, problem: _run_triton(arguments, problem, choice)
    if choice.kernel == BASIC_BLOCK:
        return lambda arguments, problem: (cuda.run_basic_block(*arguments, choice.tile),)
    if choice.kernel in CHAIN_KERNELS:
        return lambda arguments, problem: _run_chain(arguments, problem, choice)
    if choice.kernel == "cuda":
        return lambda arguments, problem: cuda.conv_bn_act(*arguments, tile=choice.tile)
    if choice.kernel == "library":
        return _run_library
    return lambda arguments, problem: cudnn.conv_bn_act(*arguments)


@contextlib.contextmanager
def precision(dtype: str) -> Iterator[None]:
    """Lets float32 convolutions use TF32, or not, as a problem's dtype says."""
    # Both, since torch refuses to say whether cuDNN may use TF32 where they differ.
    settings = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [setting.fp32_precision for setting in settings]
    for setting in settings:
        setting.fp32_precision = "tf32" if dtype == "tfloat32" else "ieee"
    try:
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


class EventTimer:
    """Times calls on a GPU by CUDA events, the L2 cache emptied before each.

    Writing `flush_bytes` takes the GPU longer than Python takes to queue the call behind it, so
    that what lies between the events is the GPU's time alone, as in a CUDA graph. In a network the
    weights are as cold; of the activations a part may still be in L2, which this does not credit.
    """

    def __init__(self, device: torch.device, flush_bytes: int) -> None:
        """`flush_bytes` should be several times the L2 cache."""
        self.device = device
        self.scratch = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def __call__(
        self, calls: Mapping[str, Callable[[], object]], rounds: int
    ) -> dict[str, list[float]]:
        """See `Timer`."""
        names = list(calls)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in names}
        with torch.cuda.device(self.device):
            for call in calls.values():
                call()
            for turn in range(rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    self.scratch.zero_()
                    start.record()
                    calls[name]()
                    end.record()
                    events[name].append((start, end))
                # Bounds the queue, and lets Ctrl-C in.
                torch.cuda.synchronize(self.device)
        return {
            name: [1e-3 * start.elapsed_time(end) for start, end in pairs]
            for name, pairs in events.items()
        }


def host_timer(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times calls on the CPU: for trying the tuner out, not for choosing anything."""
    latencies, interrupted = clock.interleave(calls, rounds, torch.device("cpu"), warmup=1)
    if interrupted:
        raise KeyboardInterrupt
    return {
        name: [1e-3 * sample for sample in latency.samples] for name, latency in latencies.items()
    }


def _call(run: Run, case: Case) -> Callable[[], object]:
    return lambda: run(case.arguments, case.problem)


def _run_triton(arguments: tuple, problem: ConvProblem, choice: Choice) -> Tensor:
    from ...backends import triton

    conv = triton.launchers()
    if estimate.kernel_for(problem) == "stem_pool":
        return conv.conv_bn_act_max_pool(*arguments[:11], arguments[13], choice.tile)
    return _pooled(conv.conv_bn_act(*arguments, tile=choice.tile), problem)


def _run_chain(
    arguments: tuple, problem: ChainProblem | BasicBlockProblem, choice: Choice
) -> tuple[Tensor, ...]:
    from ...backends import triton

    if isinstance(problem, BasicBlockProblem):
        x, first, second = arguments
        out = triton.conv_bn_act(x, *first, None, "relu")
        return (triton.conv_bn_act(out, *second, x, "relu"),)
    return triton.run_chain(arguments, problem, choice)


def _run_library(arguments: tuple, problem: ConvProblem) -> Tensor:
    return _pooled(library.conv_bn_act(*arguments), problem)


def _eager(arguments: tuple, problem: ConvProblem) -> Tensor:
    """Convolution, batch norm, add, ReLU and pooling as operators of their own."""
    input, weight, mean, var, bn_weight, bn_bias, eps, bias, *convolution, residual, _ = arguments
    out = F.conv2d(input, weight, bias, *convolution)
    out = F.batch_norm(out, mean, var, bn_weight, bn_bias, False, 0.0, eps)
    if residual is not None:
        out += residual
    return _pooled(F.relu(out), problem)


def _expected(arguments: tuple, problem: ConvProblem, images: int = _IMAGES_AT_ONCE) -> Tensor:
    """`_eager` in float64, some images at a time, since float64 convolutions need much memory."""
    doubled = [
        value.double() if isinstance(value, Tensor) and value.dim() != 4 else value
        for value in arguments
    ]
    doubled[1] = arguments[1].double()
    parts = []
    for first in range(0, problem.N, images):
        doubled[0] = arguments[0][first : first + images].double()
        if arguments[12] is not None:
            doubled[12] = arguments[12][first : first + images].double()
        parts.append(_eager(tuple(doubled), problem))
    return torch.cat(parts)


def _pooled(out: Tensor, problem: ConvProblem) -> Tensor:
    pool = problem.pool
    return out if pool is None else F.max_pool2d(out, pool[0:2], pool[2:4], pool[4:6])


def _error(out: Tensor, case: Case) -> str | None:
    if out.shape != case.expected.shape:
        return f"shape {tuple(out.shape)}, must be {tuple(case.expected.shape)}"
    if out.dtype is not case.arguments[0].dtype:
        return f"dtype {out.dtype}, must be {case.arguments[0].dtype}"
    error = relative_error(out, case.expected)
    if not error <= case.allowed_error:
        return f"error {error:.1e}, must be at most {case.allowed_error:.1e}"
    return None


def relative_error(out: Tensor, expected: Tensor) -> float:
    """`testing.relative_error` where the tensors are; NaN if there is any.

    Bringing every candidate's output to the host, as that does, would take minutes.
    """
    difference = torch.linalg.vector_norm(out.double() - expected)
    return (difference / torch.linalg.vector_norm(expected)).item()


def nan_error(run: Run, case: Case) -> str | None:
    """Whether NaN in one pixel of the last image, and in its shortcut, comes out where it should.

    Convolutions through transforms (Winograd, FFT) spread it further, within the image.
    """
    input, residual = case.arguments[0].clone(), case.residual
    input[-1, :, case.problem.H // 2, case.problem.W // 2] = float("nan")
    if residual is not None:
        residual = residual.clone()
        residual[-1, 0, 0, 0] = float("nan")
    arguments = (input, *case.arguments[1:12], residual, case.arguments[13])
    last = (input[-1:], *arguments[1:12], None if residual is None else residual[-1:], "relu")
    wanted = _expected(last, replace(case.problem, N=1)).isnan()
    found = run(arguments, case.problem).isnan()
    lost = int((wanted & ~found[-1:]).sum())
    if lost:
        return f"{lost} of {int(wanted.sum())} NaN lost"
    if found[:-1].any():
        return "NaN in an image that has none"
    return None


def chain_error(outputs: Sequence[Tensor], case: ChainCase) -> str | None:
    """What is wrong with a chain's outputs, but for NaN, or None."""
    for name, out, expected, allowed in zip(
        ("output", "next"), outputs, case.expected, case.allowed_errors, strict=False
    ):
        if out.shape != expected.shape:
            return f"{name}: shape {tuple(out.shape)}, must be {tuple(expected.shape)}"
        error = relative_error(out, expected)
        if not error <= allowed:
            return f"{name}: error {error:.1e}, must be at most {allowed:.1e}"
    if len(outputs) != len(case.expected):
        return f"{len(outputs)} outputs, must be {len(case.expected)}"
    return None


def chain_nan_error(run: Run, case: ChainCase) -> str | None:
    """As `nan_error`: NaN in a pixel of the last image, and in another of its shortcut."""
    images = [one.clone() for one in case.arguments[: case.images]]
    images[0][-1, :, images[0].size(2) // 2, images[0].size(3) // 2] = float("nan")
    for shortcut in images[1:]:
        shortcut[-1, 0, 0, 0] = float("nan")
    layers = case.arguments[case.images :]
    arguments = (*images, *layers)
    wanted = _expected_block((*(one[-1:] for one in images), *layers), case.images)
    for out, expected in zip(run(arguments, case.problem), wanted, strict=True):
        found = out.isnan()
        if lost := int((expected.isnan() & ~found[-1:]).sum()):
            return f"{lost} of {int(expected.isnan().sum())} NaN lost"
        if found[:-1].any():
            return "NaN in an image that has none"
    return None


def _versions() -> str:
    names = [f"torch {torch.__version__}"]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        names.append(f"triton {importlib.metadata.version('triton')}")
    return ", ".join(names)
