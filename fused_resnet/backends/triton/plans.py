"""Plans of what Triton's kernels were launched with, issued again by `csrc/launch_plan.cpp`.

Triton's own launcher, from `kernel[grid](...)` on, takes some 30 microseconds of Python a launch,
and what prepares its arguments as much again, while a kernel at batch 1 takes 3. What all of that
comes to does not change from pass to pass, but for addresses: the compiled kernel, its grid, block,
shared memory and attribute, and the bits of each parameter that is no address.
"""

from __future__ import annotations

import contextlib
import functools
import re
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from .. import arranged, recording
from . import launch

_ALLOCATIONS = frozenset(
    {
        torch.ops.aten.empty.memory_format,
        torch.ops.aten.empty_like.default,
        torch.ops.aten.empty_strided.default,
        torch.ops.aten.new_empty.default,
        torch.ops.aten.new_empty_strided.default,
    }
)
_VIEWS = frozenset(
    {
        torch.ops.aten.alias.default,
        torch.ops.aten.as_strided.default,
        torch.ops.aten.detach.default,
        torch.ops.aten.expand.default,
        torch.ops.aten.permute.default,
        torch.ops.aten.select.int,
        torch.ops.aten.slice.Tensor,
        torch.ops.aten.transpose.int,
        torch.ops.aten.view.default,
    }
)

# As csrc/launch_plan.cpp counts them.
_CONSTANT, _WORKSPACE, _OUTPUT, _INPUT, _FIRST_PARAMETER = range(-1, 4)

# How Triton's launcher hands over a value of a type: `struct`'s letter, and PTX's type.
_FORMATS = {
    "i1": ("b", "u8"),
    "i8": ("b", "u8"),
    "u8": ("B", "u8"),
    "i16": ("h", "u16"),
    "u16": ("H", "u16"),
    "i32": ("i", "u32"),
    "u32": ("I", "u32"),
    "i64": ("q", "u64"),
    "u64": ("Q", "u64"),
    "fp32": ("f", "f32"),
    "fp64": ("d", "f64"),
}
_PTX_PARAMETER = re.compile(r"\.param\s+\.(\w+)\s+(?:\.ptr\s[^,)]*?)?\w+_param_\d+\s*[,)\n]")
_SCRATCH = 2  # addresses that Triton's launcher passes behind a kernel's own parameters

# Where the workspace's parts begin: as the caching allocator's blocks do.
_ALIGNMENT = 512


class _CannotPlanError(Exception):
    """Why a pass cannot become a plan."""


def is_watched() -> bool:
    """Whether something wants to see each launch by itself: a log, or Triton's own hooks."""
    runtime = knobs.runtime
    return (
        launch.is_logged()
        or bool(_calls(runtime.launch_enter_hook))
        or bool(_calls(runtime.launch_exit_hook))
    )


def _calls(hook: Any) -> Any:
    return getattr(hook, "calls", hook)


@dataclass
class _Part:
    """Memory that a pass allocated.

    Attributes:
        size: in bytes.
        first: the launch that addresses it first, from 0; -1 for none.
        last: the launch that does so last.
        at: where it is in the workspace.
    """

    size: int
    first: int = -1
    last: int = -1
    at: int = 0


@dataclass(frozen=True)
class _Launch:
    """One launch, its pointers as (base or a part's number from 0 and bytes behind it)."""

    compiled: Any
    grid: tuple[int, int, int]
    arguments: list[tuple[int | _Part, int]]


@dataclass(frozen=True)
class _Kept:
    """A tensor that was made of parameters before the pass, and may serve many.

    Attributes:
        tensor: what launches read.
        is_current: whether it is what would be read now.
        parameters: which must keep their form.
        on_capture: what keeps it for a graph that is captured; None where none may read it.
    """

    tensor: Tensor
    is_current: Callable[[], bool]
    parameters: tuple[Tensor, ...]
    on_capture: Callable[[], None] | None


class Recorder(recording.Recorder):
    """Sees allocations through the dispatcher, and launches through `launch.launch_kernel`."""

    def __init__(self, input: Tensor, parameters: Sequence[Tensor]) -> None:
        super().__init__(input, parameters)
        self._addresses = recording.address_of(self._parameters)
        self._parts: dict[int, _Part] = {}
        self._launches: list[_Launch] = []
        # What the backend made of parameters and keeps, by address, numbered behind these.
        self._numbers: dict[int, int] = {}
        self._kept: list[_Kept] = []
        if self._input_storage() in {p.untyped_storage().data_ptr() for p in self._parameters}:
            self._obstacle = "the input is part of a parameter"

    def __enter__(self) -> Any:
        """Sees launches from here on."""
        self._token = launch.recorder.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Sees no more."""
        launch.recorder.reset(self._token)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, and keeps in mind what it allocated."""
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            storage = result.untyped_storage()
            # Where memory was freed and comes again, what is addressed is the later one.
            self._parts[storage.data_ptr()] = _Part(storage.nbytes())
        elif func not in _VIEWS and self._obstacle is None:
            self._obstacle = f"it calls {func}"
        return result

    def add(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
    ) -> None:
        """Writes down a launch, right after it happened."""
        if self._obstacle is not None:
            return
        try:
            self._launches.append(self._described(kernel, compiled, grid, arguments, constants))
        except _CannotPlanError as error:
            self._obstacle = f"{kernel.fn.__name__}: {error}"

    def add_rows(self, weight: Tensor, rows: Tensor) -> None:
        """Takes note of what a launch that follows reads instead of a weight."""
        if arranged.is_kept(weight, rows):
            is_current = functools.partial(arranged.is_kept, weight, rows)
            self._keep(_Kept(rows, is_current, (weight,), None))

    def add_kept(
        self,
        tensor: Tensor,
        is_current: Callable[[], bool],
        parameters: Sequence[Tensor],
        on_capture: Callable[[], None],
    ) -> None:
        """Likewise of what holds addresses of parameters."""
        self._keep(_Kept(tensor, is_current, tuple(parameters), on_capture))

    def _keep(self, kept: _Kept) -> None:
        at = kept.tensor.data_ptr()
        if at not in self._addresses and at not in self._numbers:
            self._numbers[at] = len(self._parameters) + len(self._kept)
            self._kept.append(kept)

    def _described(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
    ) -> _Launch:
        metadata = compiled.metadata
        if (
            metadata.num_ctas != 1
            or metadata.launch_cooperative_grid
            or metadata.global_scratch_size
            or metadata.profile_scratch_size
            or getattr(metadata, "instrumentation_mode", "")
            or metadata.shared > 228 * 1024
        ):
            raise _CannotPlanError("its launch takes more than a grid, a block and shared memory")
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        signature = compiled.src.signature
        passed, expected = [], []
        for name in kernel.arg_names:
            kind = signature[name]
            if kind == "constexpr":
                continue
            value = values[name]
            if kind.startswith("*"):
                passed.append(self._address(name, value))
                expected.append("u64")
                continue
            if kind not in _FORMATS:
                raise _CannotPlanError(f"{name} is a {kind}")
            letter, ptx = _FORMATS[kind]
            bits = struct.pack(f"<{letter}", value).ljust(8, b"\0")
            passed.append((_CONSTANT, int.from_bytes(bits, "little", signed=True)))
            expected.append(ptx)
        passed += [(_CONSTANT, 0)] * _SCRATCH
        expected += ["u64"] * _SCRATCH
        entry = compiled.asm["ptx"].partition(".entry")[2].partition("{")[0]
        if (found := _PTX_PARAMETER.findall(entry)) != expected:
            raise _CannotPlanError(f"it takes {found}, Triton's launcher passes {expected}")
        x, y, z = (*grid, 1, 1)[:3]
        if min(x, y, z) < 1:
            raise _CannotPlanError(f"its grid is {grid}")
        return _Launch(compiled, (x, y, z), passed)

    def _address(self, name: str, tensor: Tensor) -> tuple[int | _Part, int]:
        at, storage = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
        if storage == self._input_storage():
            return _INPUT, at - self._input.data_ptr()
        index = self._numbers.get(at, self._addresses.get(at))
        if index is not None:
            return _FIRST_PARAMETER + index, 0
        part = self._parts.get(storage)
        if part is None or at in self._addresses:
            raise _CannotPlanError(f"{name} is neither the model's, nor made in this pass")
        if part.first < 0:
            part.first = len(self._launches)
        part.last = len(self._launches)
        return part, at - storage

    def _input_storage(self) -> int:
        return self._input.untyped_storage().data_ptr()

    def plan(self, output: Tensor) -> Plan | str:
        """See `recording.Recorder.plan`."""
        if self._obstacle is not None:
            return self._obstacle
        if not self._launches:
            return "it launches nothing"
        result = self._parts.get(output.untyped_storage().data_ptr())
        if result is None or result.first < 0:
            return "its output is not what one of its kernels wrote"
        if (
            output.storage_offset() != 0
            or output.dtype is not self._input.dtype
            or output.device != self._input.device
            or output.numel() * output.element_size() != result.size
        ):
            return "its output is only a part of what one of its kernels wrote"
        return Plan(self._input, self._parameters, self._kept, self._launches, output, result)


def _lay_out(parts: Sequence[_Part]) -> int:
    """Gives each part a place that no other has while it is in use; returns the bytes in all."""
    placed: list[_Part] = []
    total = 0
    for part in sorted(parts, key=lambda part: (-part.size, part.first)):
        others = sorted(
            (p for p in placed if p.first <= part.last and part.first <= p.last),
            key=lambda p: p.at,
        )
        at = 0
        for other in others:
            if at + part.size <= other.at:
                break
            at = max(at, -(-(other.at + other.size) // _ALIGNMENT) * _ALIGNMENT)
        part.at = at
        placed.append(part)
        total = max(total, at + part.size)
    return total


class Plan(recording.Plan):
    """What `Recorder` saw, in the form that csrc/launch_plan.cpp issues."""

    def __init__(
        self,
        input: Tensor,
        parameters: Sequence[Tensor],
        kept: Sequence[_Kept],
        launches: Sequence[_Launch],
        output: Tensor,
        result: _Part,
    ) -> None:
        self._are_current = [each.is_current for each in kept]
        self._on_capture = [each.on_capture for each in kept]
        places = {id(tensor): index for index, tensor in enumerate(parameters)}
        watched = {
            _FIRST_PARAMETER + places[id(tensor)]
            for each in kept
            for tensor in each.parameters
            if id(tensor) in places
        }
        parameters = [*parameters, *(each.tensor for each in kept)]
        # Unloaded with the last reference.
        self._kernels = [each.compiled for each in launches]
        parts = {id(base): base for each in launches for base, _ in each.arguments
                 if isinstance(base, _Part) and base is not result}  # fmt: skip
        workspace = _lay_out(list(parts.values()))
        used = sorted(
            {base for each in launches for base, _ in each.arguments
             if not isinstance(base, _Part) and base >= _FIRST_PARAMETER} | watched
        )  # fmt: skip
        place = {base: _FIRST_PARAMETER + index for index, base in enumerate(used)}
        numbers: list[int] = []
        for each in launches:
            metadata = each.compiled.metadata
            numbers += (
                each.compiled.function,
                *each.grid,
                metadata.num_warps * metadata.target.warp_size,
                metadata.shared,
                bool(metadata.launch_pdl),
                len(each.arguments),
            )
            for base, value in each.arguments:
                if base is result:
                    numbers += (_OUTPUT, value)
                elif isinstance(base, _Part):
                    numbers += (_WORKSPACE, base.at + value)
                else:
                    numbers += (place.get(base, base), value)
        operators = torch.ops.fused_resnet
        self.launch_count = len(launches)
        self.workspace_bytes = workspace
        self._plan = operators.make_launch_plan.default(
            input,
            [parameters[base - _FIRST_PARAMETER] for base in used],
            numbers,
            workspace,
            output.shape,
            output.stride(),
        )
        weakref.finalize(self, operators.free_launch_plan.default, self._plan)
        self._run = operators.run_launch_plan.default

    def can_run(self) -> bool:
        """See `recording.Plan.can_run`: copies have no place in a graph that is captured."""
        if not self._on_capture or not torch.cuda.is_current_stream_capturing():
            return True
        for keep in self._on_capture:
            if keep is None:
                return False
            keep()
        return True

    def run(self, input: Tensor) -> Tensor | None:
        """See `recording.Plan.run`; on the current stream of the input's device."""
        for is_current in self._are_current:
            if not is_current():
                return None
        index = input.device.index
        stream = torch._C._cuda_getCurrentRawStream(index)
        with (
            torch._C._AutoDispatchBelowAutograd(),
            contextlib.nullcontext()
            if index == torch.cuda.current_device()
            else torch.cuda.device(index),
        ):
            return self._run(self._plan, input, stream)
