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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs

from ... import _native
from .. import arranged, cuda_plans, launch_plans, recording
from ..launch_plans import CONSTANT, CannotPlanError, Kept, Launch, Memory, Operators, Part, Word
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


class Recorder(recording.Recorder):
    """Sees allocations through the dispatcher, and launches through `launch.launch_kernel`."""

    def __init__(self, input: Tensor, parameters: Sequence[Tensor]) -> None:
        super().__init__(input, parameters)
        self._memory = Memory(input, self._parameters)
        self._launches: list[Launch] = []
        self._obstacle = self._memory.obstacle()

    def __enter__(self) -> Any:
        """Sees launches from here on."""
        self._token = launch.recorder.set(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Sees no more."""
        launch.recorder.reset(self._token)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, and keeps in mind what it allocated or, of csrc/cuda, launched."""
        if func in cuda_plans.recorded():
            return self._of_cuda(func, args, kwargs or {})
        result = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            storage = result.untyped_storage()
            # Where memory was freed and comes again, what is addressed is the later one.
            self._memory.parts[storage.data_ptr()] = Part(storage.nbytes())
        elif (
            func not in _VIEWS
            and func not in cuda_plans.queries()
            and not recording.only_frees(func)
            and self._obstacle is None
        ):
            self._obstacle = f"it calls {func}"
        return result

    def _of_cuda(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator of csrc/cuda; its kernels have handles of the driver's, too."""
        with cuda_plans.written_down() as numbers:
            result = func(*args, **kwargs)
        if self._obstacle is not None:
            return result
        try:
            handle = _native.cuda_operators.driver_function.default
            self._launches += cuda_plans.launches(
                numbers, self._memory, len(self._launches), handle
            )
        except CannotPlanError as error:
            self._obstacle = f"{func}: {error}"
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
        except CannotPlanError as error:
            self._obstacle = f"{kernel.fn.__name__}: {error}"

    def add_rows(self, weight: Tensor, rows: Tensor) -> None:
        """Takes note of what a launch that follows reads instead of a weight."""
        if arranged.is_kept(weight, rows):
            is_current = functools.partial(arranged.is_kept, weight, rows)
            self._memory.keep(Kept(rows, is_current, (weight,), None, has_addresses=False))

    def add_kept(
        self,
        tensor: Tensor,
        is_current: Callable[[], bool],
        parameters: Sequence[Tensor],
        on_capture: Callable[[], None],
    ) -> None:
        """Likewise of what holds addresses of parameters."""
        self._memory.keep(
            Kept(tensor, is_current, tuple(parameters), on_capture, has_addresses=True)
        )

    def _described(
        self,
        kernel: Any,
        compiled: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: dict[str, Any],
    ) -> Launch:
        metadata = compiled.metadata
        if (
            metadata.num_ctas != 1
            or metadata.launch_cooperative_grid
            or metadata.global_scratch_size
            or metadata.profile_scratch_size
            or getattr(metadata, "instrumentation_mode", "")
            or metadata.shared > 228 * 1024
        ):
            raise CannotPlanError("its launch takes more than a grid, a block and shared memory")
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        signature = compiled.src.signature
        passed: list[Word] = []
        expected = []
        for name in kernel.arg_names:
            kind = signature[name]
            if kind == "constexpr":
                continue
            value = values[name]
            if kind.startswith("*"):
                passed.append(self._memory.place(value, len(self._launches), name))
                expected.append("u64")
                continue
            if kind not in _FORMATS:
                raise CannotPlanError(f"{name} is a {kind}")
            letter, ptx = _FORMATS[kind]
            bits = struct.pack(f"<{letter}", value).ljust(8, b"\0")
            passed.append((CONSTANT, int.from_bytes(bits, "little", signed=True)))
            expected.append(ptx)
        passed += [(CONSTANT, 0)] * _SCRATCH
        expected += ["u64"] * _SCRATCH
        entry = compiled.asm["ptx"].partition(".entry")[2].partition("{")[0]
        if (found := _PTX_PARAMETER.findall(entry)) != expected:
            raise CannotPlanError(f"it takes {found}, Triton's launcher passes {expected}")
        x, y, z = (*grid, 1, 1)[:3]
        if min(x, y, z) < 1:
            raise CannotPlanError(f"its grid is {grid}")
        return Launch(
            compiled.function,
            (x, y, z),
            metadata.num_warps * metadata.target.warp_size,
            metadata.shared,
            [[word] for word in passed],
            bool(metadata.launch_pdl),
            compiled,
        )

    def plan(self, output: Tensor) -> Plan | str:
        """See `recording.Recorder.plan`."""
        if self._obstacle is not None:
            return self._obstacle
        if not self._launches:
            return "it launches nothing"
        result = self._memory.result(output)
        if isinstance(result, str):
            return result
        return Plan(self._memory, self._launches, output)


class Plan(launch_plans.Plan):
    """Launches through the driver."""

    def __init__(self, memory: Memory, launches: Sequence[Launch], output: Tensor) -> None:
        operators = torch.ops.fused_resnet
        super().__init__(
            memory,
            launches,
            output,
            Operators(
                operators.make_launch_plan.default,
                operators.run_launch_plan.default,
                operators.free_launch_plan.default,
            ),
        )

    def run(self, input: Tensor) -> Tensor | None:
        """See `recording.Plan.run`; on the current stream of the input's device."""
        if not self._reads_what_is_kept():
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
