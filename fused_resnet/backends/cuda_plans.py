"""Plans of what the kernels of csrc/cuda were launched with, started again in one call.

The native side writes down each launch of a pass, with the words of the structure that the kernel
takes and which of them are addresses, and each piece of memory that it allocates or clears
(csrc/cuda/recording.h). A plan has one workspace for all of these, and clears at once whatever is
to be zero.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import arranged, launch_plans, recording
from .launch_plans import CONSTANT, CannotPlanError, Kept, Launch, Memory, Operators, Part, Word

# Operators of torch's that make no new values.
_VIEWS = frozenset(
    {
        torch.ops.aten.alias.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.permute.default,
    }
)
# What may be recorded: these write themselves down.
_RECORDED = ("conv_bn_act_tiled", "basic_block_tiled", "stem_max_pool", "max_pool_channels_last")
# Questions that a pass may ask.
_QUERIES = ("conv_tiles", "conv_tiles_for", "basic_block_tiles")
_COPIES = frozenset({torch.ops.aten.clone.default, torch.ops.aten._to_copy.default})
# As csrc/cuda/recording.h has them.
_MEMORY, _CLEARING, _LAUNCH = range(3)


@functools.cache
def recorded() -> frozenset[Any]:
    """The operators that write down what they launch; none where they are not loaded."""
    return _named(_RECORDED)


@functools.cache
def queries() -> frozenset[Any]:
    """Those that launch nothing, likewise."""
    return _named(_QUERIES)


def _named(names: Sequence[str]) -> frozenset[Any]:
    operators = _native.cuda_operators
    return frozenset(() if operators is None else (getattr(operators, n).default for n in names))


def forget_operators() -> None:
    """Looks for them again."""
    recorded.cache_clear()
    queries.cache_clear()


@contextlib.contextmanager
def written_down() -> Iterator[list[int]]:
    """What native calls write down in here, there when it has ended; see csrc/cuda/recording.h."""
    numbers: list[int] = []
    _native.cuda_operators.begin_cuda_recording.default()
    try:
        yield numbers
    finally:
        numbers += _native.cuda_operators.end_cuda_recording.default()


class Recorder(recording.Recorder):
    """Lets native calls write themselves down, and sees what else is called."""

    def __init__(self, input: Tensor, parameters: Sequence[Tensor]) -> None:
        super().__init__(input, parameters)
        self._kept: list[Kept] = []
        self._copy: Tensor | None = None  # of the input, channels_last
        self._numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, and keeps in mind whether it takes part in plans."""
        if func in recorded():
            with written_down() as numbers:
                result = func(*args, **(kwargs or {}))
            if not numbers and self._obstacle is None:
                self._obstacle = f"{func} copies something"
            self._numbers += numbers
            return result
        result = func(*args, **(kwargs or {}))
        takes_none = func in queries() or func in _VIEWS or recording.only_frees(func)
        if takes_none or self._obstacle is not None:
            return result
        if (
            func in _COPIES
            and args[0] is self._input
            and self._copy is None
            and result.dtype is self._input.dtype
            and result.is_contiguous(memory_format=torch.channels_last)
        ):
            self._copy = result
        else:
            self._obstacle = f"it calls {func}"
        return result

    def add_rows(self, weight: Tensor, rows: Tensor) -> None:
        """Takes note of what a launch that follows reads instead of a weight."""
        is_current = functools.partial(arranged.is_kept, weight, rows)
        if is_current():
            self._kept.append(Kept(rows, is_current, (weight,), None, has_addresses=False))

    def plan(self, output: Tensor) -> Plan | str:
        """See `recording.Recorder.plan`."""
        if self._obstacle is not None:
            return self._obstacle
        input = self._input if self._copy is None else self._copy
        memory = Memory(input, self._parameters)
        if (obstacle := memory.obstacle()) is not None:
            return obstacle
        for kept in self._kept:
            memory.keep(kept)
        try:
            found = launches(self._numbers, memory)
        except CannotPlanError as error:
            return str(error)
        result = memory.result(output)
        if isinstance(result, str):
            return result
        return Plan(memory, found, output, self._input if self._copy is not None else None)


def launches(
    numbers: Sequence[int],
    memory: Memory,
    before: int = 0,
    handle_of: Callable[[int], int] | None = None,
) -> list[Launch]:
    """The launches in what csrc/cuda/recording.h has written down.

    Args:
        numbers: what that is.
        memory: of the pass, which gets the parts that were allocated.
        before: how many launches of the pass came before.
        handle_of: what a plan is to have for a kernel's address on the host, if it is one that
            clears no memory.

    Raises:
        CannotPlanError: something else was done, or it is not known what a kernel reads.
    """
    if not numbers:
        raise CannotPlanError("it copies something, or its kernel's parameters are not known")
    rest = iter(numbers)
    found: list[Launch] = []
    for kind in rest:
        if kind == _MEMORY:
            at = next(rest)
            # Where memory was freed and comes again, what is addressed is the later one.
            memory.parts[at] = Part(next(rest))
        elif kind == _CLEARING:
            if handle_of is not None:
                raise CannotPlanError("it clears memory")
            at, size = next(rest), next(rest)
            part = memory.parts.get(at)
            if part is None or part.size != size or part.first >= 0:
                raise CannotPlanError("it clears a part of its memory, or what it has written to")
            part.is_cleared = True
        else:
            assert kind == _LAUNCH, kind
            function, x, y, z, threads, shared, count = (next(rest) for _ in range(7))
            parameters = []
            for _ in range(count):
                words: list[Word] = []
                for _ in range(next(rest)):
                    is_address, value = next(rest), next(rest)
                    if is_address and value:
                        words.append(memory.place_of_address(value, before + len(found)))
                    else:
                        words.append((CONSTANT, value))
                parameters.append(words)
            function = function if handle_of is None else handle_of(function)
            found.append(Launch(function, (x, y, z), threads, shared, parameters))
    if not found:
        raise CannotPlanError("it launches nothing")
    return found


class Plan(launch_plans.Plan):
    """Launches as csrc/cuda starts them.

    Args:
        memory: of the pass.
        launches: in order.
        output: of the pass.
        copied: the input, if what the launches read is its copy, channels_last.
    """

    def __init__(
        self, memory: Memory, launches: Sequence[Launch], output: Tensor, copied: Tensor | None
    ) -> None:
        operators = _native.cuda_operators
        super().__init__(
            memory,
            launches,
            output,
            Operators(
                operators.make_cuda_plan.default,
                operators.run_cuda_plan.default,
                operators.free_cuda_plan.default,
            ),
        )
        self._copies = copied is not None
        # Around the dispatcher's own look at what is called, which takes as long as the plan.
        self._run = operators.run_cuda_plan.default._op

    def run(self, input: Tensor) -> Tensor | None:
        """See `recording.Plan.run`; on the current stream of the input's device."""
        if not self._reads_what_is_kept():
            return None
        with torch._C._AutoDispatchBelowAutograd():
            if self._copies:
                input = input.contiguous(memory_format=torch.channels_last)
            return self._run(self._plan, input)
