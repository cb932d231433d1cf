"""Plans of launches on a GPU, whoever's kernels they are: see csrc/launch_plan.h.

A recorder hands over what it saw as `Launch`es, whose words are constants, or addresses in one of
the model's tensors, in the input, or in memory that the pass allocated, a `Part`. Parts get places
in one workspace, those that are not in use at the same time the same ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import recording

# As csrc/launch_plan.h counts them.
CONSTANT, _WORKSPACE, _OUTPUT, INPUT, FIRST_PARAMETER = range(-1, 4)

# Where the workspace's parts begin: as the caching allocator's blocks do.
_ALIGNMENT = 512


class CannotPlanError(Exception):
    """Why a pass cannot become a plan."""


@dataclass
class Part:
    """Memory that a pass allocated.

    Attributes:
        size: in bytes.
        first: the launch that addresses it first, from 0; -1 for none.
        last: the launch that does so last.
        at: where it is in the workspace.
        is_cleared: whether it is zero before the first launch that addresses it.
    """

    size: int
    first: int = -1
    last: int = -1
    at: int = 0
    is_cleared: bool = False


Word = tuple[int | Part, int]
"""A base, or a part, and bytes behind it; or CONSTANT and bits."""


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        function: what starts it takes for the kernel.
        grid: blocks in x, y and z.
        threads: of a block.
        shared_bytes: dynamic shared memory of a block.
        parameters: each in words of eight bytes.
        overlaps: whether it may begin before the launch before it ends.
        kernel: what must live as long as the function is to be used.
    """

    function: int
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: Sequence[Sequence[Word]]
    overlaps: bool = False
    kernel: Any = None


@dataclass(frozen=True)
class Kept:
    """A tensor that was made of parameters before the pass, and may serve many.

    Attributes:
        tensor: what launches read.
        is_current: whether it is what would be read now, as far as addresses of parameters do not
            say so.
        parameters: which must keep their form.
        on_capture: what keeps it for a graph that is captured; None where none may read it.
        has_addresses: whether these parameters must stay where they are.
    """

    tensor: Tensor
    is_current: Callable[[], bool]
    parameters: tuple[Tensor, ...]
    on_capture: Callable[[], None] | None
    has_addresses: bool


class Operators(NamedTuple):
    """The native functions of a kind of plans."""

    make: Callable[..., int]
    run: Callable[..., Tensor | None]
    free: Callable[[int], None]


@dataclass
class Memory:
    """What a pass may read and write, by address.

    Args:
        input: of the pass.
        parameters: everything else that it may read and has not made.
    """

    input: Tensor
    parameters: list[Tensor]
    parts: dict[int, Part] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._addresses = recording.address_of(self.parameters)
        # What the backend made of parameters and keeps, by address, numbered behind these.
        self._numbers: dict[int, int] = {}

    def obstacle(self) -> str | None:
        """Why there can be no plan for this input."""
        if self._input_storage() in {p.untyped_storage().data_ptr() for p in self.parameters}:
            return "the input is part of a parameter"
        return None

    def keep(self, kept: Kept) -> None:
        """Takes note of a tensor that is kept."""
        at = kept.tensor.data_ptr()
        if at not in self._addresses and at not in self._numbers:
            self._numbers[at] = len(self.parameters) + len(self.kept)
            self.kept.append(kept)

    def place(self, tensor: Tensor, launch: int, name: str) -> Word:
        """Where a tensor lies that the launch of this number is given.

        Raises:
            CannotPlanError: nobody knows it.
        """
        return self._place(tensor.data_ptr(), tensor.untyped_storage().data_ptr(), launch, name)

    def _place(self, at: int, storage: int, launch: int, name: str) -> Word:
        if storage == self._input_storage():
            return INPUT, at - self.input.data_ptr()
        index = self._numbers.get(at, self._addresses.get(at))
        if index is not None:
            return FIRST_PARAMETER + index, 0
        part = self.parts.get(storage)
        if part is None or at in self._addresses:
            raise CannotPlanError(f"{name} is neither the model's, nor made in this pass")
        if part.first < 0:
            part.first = launch
        part.last = launch
        return part, at - storage

    def place_of_address(self, at: int, launch: int) -> Word:
        """`place` of an address by itself.

        Raises:
            CannotPlanError: nobody knows it.
        """
        storage = at
        if at != self.input.data_ptr() and at not in self.parts:
            around = [b for b, part in self.parts.items() if b < at < b + part.size]
            storage = around[0] if len(around) == 1 else at
        if at == self.input.data_ptr():
            storage = self._input_storage()
        return self._place(at, storage, launch, "an address")

    def _input_storage(self) -> int:
        return self.input.untyped_storage().data_ptr()

    def result(self, output: Tensor) -> Part | str:
        """The part that a pass returned, or why that is none."""
        part = self.parts.get(output.untyped_storage().data_ptr())
        if part is None or part.first < 0:
            return "its output is not what one of its kernels wrote"
        if (
            output.storage_offset() != 0
            or output.dtype is not self.input.dtype
            or output.device != self.input.device
            or output.numel() * output.element_size() != part.size
        ):
            return "its output is only a part of what one of its kernels wrote"
        return part


def lay_out(parts: Sequence[Part]) -> tuple[int, int]:
    """Gives each part a place that no other has while it is in use.

    Those that are cleared come first, and are in use all the time: one clearing does for all.

    Returns:
        The bytes in all, and how many of the first are to be cleared.
    """
    cleared = 0
    for part in parts:
        if part.is_cleared:
            part.at = _aligned(cleared)
            cleared = part.at + part.size
    placed: list[Part] = []
    total = begin = _aligned(cleared)
    others = (part for part in parts if not part.is_cleared)
    for part in sorted(others, key=lambda part: (-part.size, part.first)):
        at = begin
        for other in sorted(
            (p for p in placed if p.first <= part.last and part.first <= p.last),
            key=lambda p: p.at,
        ):
            if at + part.size <= other.at:
                break
            at = max(at, _aligned(other.at + other.size))
        part.at = at
        placed.append(part)
        total = max(total, at + part.size)
    return total, cleared


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Plan(recording.Plan):
    """What a recorder saw, in the form that csrc/launch_plan.h issues.

    Args:
        memory: of the pass.
        launches: in order.
        output: of the pass.
        operators: what makes and runs such plans.
    """

    def __init__(
        self, memory: Memory, launches: Sequence[Launch], output: Tensor, operators: Operators
    ) -> None:
        result = memory.result(output)
        assert isinstance(result, Part), result
        kept = memory.kept
        self._are_current = [each.is_current for each in kept]
        # Where kernels run on the host, nothing is captured.
        self._on_capture = [each.on_capture for each in kept if memory.input.is_cuda]
        parameters = [*memory.parameters, *(each.tensor for each in kept)]
        places = {id(tensor): index for index, tensor in enumerate(memory.parameters)}
        watched, fixed = set(), set()
        for made in kept:
            for tensor in made.parameters:
                if id(tensor) not in places:  # something that was made of one
                    places[id(tensor)] = len(parameters)
                    parameters.append(tensor)
                watched.add(FIRST_PARAMETER + places[id(tensor)])
                if made.has_addresses:
                    fixed.add(FIRST_PARAMETER + places[id(tensor)])
        # Unloaded with the last reference.
        self._kernels = [each.kernel for each in launches]
        words = [word for each in launches for words in each.parameters for word in words]
        parts = {
            id(base): base for base, _ in words if isinstance(base, Part) and base is not result
        }
        workspace = lay_out(list(parts.values()))
        used = sorted(
            {b for b, _ in words if not isinstance(b, Part) and b >= FIRST_PARAMETER} | watched
        )
        place = {base: FIRST_PARAMETER + index for index, base in enumerate(used)}
        numbers: list[int] = []
        for each in launches:
            numbers += (each.function, *each.grid, each.threads, each.shared_bytes)
            numbers += (each.overlaps, len(each.parameters))
            for parameter in each.parameters:
                numbers.append(len(parameter))
                for base, value in parameter:
                    if base is result:
                        numbers += (_OUTPUT, value)
                    elif isinstance(base, Part):
                        numbers += (_WORKSPACE, base.at + value)
                    else:
                        numbers += (place.get(base, base), value)
        self.launch_count = len(launches)
        self.workspace_bytes = workspace[0]
        self._plan = operators.make(
            memory.input,
            [parameters[base - FIRST_PARAMETER] for base in used],
            [place[base] - FIRST_PARAMETER for base in sorted(fixed)],
            numbers,
            workspace,
            output.shape,
            output.stride(),
        )
        weakref.finalize(self, operators.free, self._plan)
        self._run = operators.run

    def can_run(self) -> bool:
        """See `recording.Plan.can_run`: copies have no place in a graph that is captured."""
        if not self._on_capture or not torch.cuda.is_current_stream_capturing():
            return True
        for keep in self._on_capture:
            if keep is None:
                return False
            keep()
        return True

    def _reads_what_is_kept(self) -> bool:
        return all(is_current() for is_current in self._are_current)
