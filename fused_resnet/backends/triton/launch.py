"""What launches move: a log that every launch of this backend's kernels reports to.

    with launches.logged() as log:
        model(x)
    sum(launch.bytes for launch in log)

Each tensor counts once a launch, with the bytes that some program of it addresses: of the input of
a strided 1x1 convolution only the pixels that are used. What a launch reads again comes from L2.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import Parameter

from ...layers.activation import PLAIN, numbers_of
from ...layers.memory import memory_format_of
from ...tuning import chain
from .. import arranged

_PARAMETERS = ("weight", "expand", "project", "reduce", "mean", "var", "bias")


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: its name.
        reads: bytes of each tensor that is read, by the kernel's name for it.
        writes: bytes of each tensor that is written, likewise.
    """

    kernel: str
    reads: dict[str, int]
    writes: dict[str, int]

    @property
    def bytes(self) -> int:
        """All that is moved."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def activation_bytes(self) -> int:
        """What is moved of tensors that are no parameters or statistics of a model."""
        parameters = (
            moved for name, moved in self.reads.items() if any(part in name for part in _PARAMETERS)
        )
        return self.bytes - sum(parameters)


@dataclass
class _Log:
    run: bool
    launches: list[Launch]


_log: ContextVar[_Log | None] = ContextVar("fused_resnet_launches", default=None)


@contextlib.contextmanager
def logged(run: bool = True) -> Iterator[list[Launch]]:
    """Collects the launches of this thread or task, in order.

    Args:
        run: whether they happen, too. Without, outputs are what memory had in it, and what a
            network on large images would move is known in no time.
    """
    log = _Log(run, [])
    token = _log.set(log)
    try:
        yield log.launches
    finally:
        _log.reset(token)


def is_logged() -> bool:
    """Whether `logged` is active here."""
    return _log.get() is not None


recorder: ContextVar[Any] = ContextVar("fused_resnet_recorder", default=None)
"""Who is told of each launch, right after it: see `plans.Recorder`."""


Wanted = tuple[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]]
"""A launch that did not happen: kernel, grid, arguments and constants."""

_collected: ContextVar[list[Wanted] | None] = ContextVar("fused_resnet_collected", default=None)


@contextlib.contextmanager
def collected() -> Iterator[list[Wanted]]:
    """Collects the launches of this thread or task, none of which happens."""
    wanted: list[Wanted] = []
    token = _collected.set(wanted)
    try:
        yield wanted
    finally:
        _collected.reset(token)


open_row: ContextVar[list[int] | None] = ContextVar("fused_resnet_row", default=None)
"""How many launches the row that is open here has had, if one is: see `in_a_row`."""


@contextlib.contextmanager
def in_a_row() -> Iterator[None]:
    """Launches of this thread or task that may overlap with the ones before and behind them.

    Nothing but inference may launch here, and all of it on one stream. Other kernels may run
    between: they wait for what precedes them, and what follows waits for them.
    """
    token = open_row.set([0])
    try:
        yield
    finally:
        open_row.reset(token)


def next_in_row() -> int | None:
    """How many launches of the row came before the one that asks; None outside of rows."""
    row = open_row.get()
    if row is None:
        return None
    row[0] += 1
    return row[0] - 1


def is_in_row(input: Tensor) -> bool:
    """Whether launches for this input are such, on a device where they may overlap."""
    return open_row.get() is not None and can_depend(input)


def report(
    kernel: str,
    tensors: Mapping[str, object],
    writes: Sequence[str],
    partly: Mapping[str, Callable[[], int]],
) -> bool:
    """Tells the log, if there is one, of a launch; returns whether it is to happen.

    Args:
        kernel: its name.
        tensors: its arguments by name; those that are no tensors do not count.
        writes: names of those that are written.
        partly: how many elements are addressed of those that are not addressed as a whole.
    """
    log = _log.get()
    if log is None:
        return True
    moved = {
        name: (partly[name]() if name in partly else value.numel()) * value.element_size()
        for name, value in tensors.items()
        if isinstance(value, Tensor)
    }
    log.launches.append(
        Launch(
            kernel,
            {name: size for name, size in moved.items() if name not in writes},
            {name: size for name, size in moved.items() if name in writes},
        )
    )
    return log.run


def addressed(
    shape: Sequence[int],
    output_size: Sequence[int],
    taps: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> int:
    """Elements of an (N, C, H, W) input that some tap of a filter meets.

    Args:
        shape: of the input.
        output_size: (P, Q).
        taps: (R, S).
        stride: of the convolution, as are the rest.
        padding: see `stride`.
        dilation: see `stride`.
    """
    count = shape[0] * shape[1]
    geometry = zip(shape[2:], output_size, taps, stride, padding, dilation, strict=True)
    for size, steps, filter, step, before, apart in geometry:
        met = {at * step - before + tap * apart for at in range(steps) for tap in range(filter)}
        count *= sum(0 <= place < size for place in met)
    return count


# Tiles in a column before the next column starts: see `device.tile_of`.
BAND = 8


def launch_kernel(
    input: Tensor,
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    writes: Sequence[str] = ("output_ptr",),
    partly: Mapping[str, Callable[[], int]] = MappingProxyType({}),
    **constants: Any,
) -> None:
    """Launches a kernel on the input's device and that device's current stream.

    Args:
        input: any of its tensors.
        kernel: what to launch.
        grid: how many programs.
        arguments: those that are no constants, in order.
        writes: the names of those that the kernel writes to; see `report`.
        partly: see `report`.
        constants: arguments that are compiled in, and the number of warps and stages.
    """
    if not report(
        kernel.fn.__name__, dict(zip(kernel.arg_names, arguments, strict=False)), writes, partly
    ):
        return
    constants |= dependence(input, kernel)
    if (wanted := _collected.get()) is not None:
        wanted.append((kernel, grid, arguments, constants))
        return
    if type(input) not in (Tensor, Parameter):
        # In graphs a kernel is called with all of its arguments.
        for name, parameter in inspect.signature(kernel.fn).parameters.items():
            if parameter.default is not parameter.empty:
                constants.setdefault(name, parameter.default)
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
        return
    if input.device.type == "cuda" and input.device.index != torch.cuda.current_device():
        with torch.cuda.device(input.device):
            compiled = kernel[grid](*arguments, **constants)
    else:
        compiled = kernel[grid](*arguments, **constants)
    if (seen_by := recorder.get()) is not None:
        seen_by.add(kernel, compiled, grid, arguments, constants)


def dependence(input: Tensor, kernel: Any) -> dict[str, bool]:
    """The constants of a launch in a row, with which it may begin before the one before ends.

    The first of a row waits for all before it, as any launch does, but lets the next one begin.
    See `conv_kernels.py` for what the kernels do about it.
    """
    place = next_in_row()
    if place is None or not can_depend(input) or "DEPENDENT" not in kernel.arg_names:
        return {}
    return {"DEPENDENT": True, "launch_pdl": place > 0}


def can_depend(input: Tensor) -> bool:
    """Whether a device's launches may overlap."""
    if input.device.type != "cuda":
        return False
    major, _ = capability(input.device.index)
    return major in chain.OVERLAPPING


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Major and minor of a device."""
    return torch.cuda.get_device_capability(index)


def skew(input: Tensor, stride: Sequence[int], padding: Sequence[int]) -> int:
    """See `row_conv_kernel`: 1 where that makes the offsets of 16-bit values even."""
    C = input.size(1)
    return int(input.element_size() == 2 and stride[1] * C % 2 == 0 and padding[1] * C % 2 == 1)


def row_block(length: int) -> int:
    """The block that holds a row and the pixel after it."""
    return max(16, triton.next_power_of_2(length + 1))


def channels_last(input: Tensor) -> Tensor:
    """`input` with channels next to each other, copied if need be."""
    if input.stride(1) == 1 or input.size(1) == 1:
        return input
    return input.contiguous(memory_format=torch.channels_last)


def filter_rows(weight: Tensor) -> Tensor:
    """`weight` as (K, R, S, C / groups) without gaps, copied if need be."""
    return weight.permute(0, 2, 3, 1).contiguous()


def kept_rows(weight: Tensor) -> Tensor:
    """`filter_rows`, copied once: see `arranged.rows_of`."""
    rows = weight.permute(0, 2, 3, 1)
    if rows.is_contiguous():
        return rows
    rows = arranged.rows_of(weight)
    if (seen_by := recorder.get()) is not None:
        seen_by.add_rows(weight, rows)
    return rows


def residual_channels(residual: Tensor, output: Tensor) -> int | None:
    """How many channels it has, None if it has the strides and channels of the output.

    That is (N, P, Q, K) and dense, the residual (N, K, P, Q).
    """
    alike = residual.size(1) == output.size(3) and residual.permute(0, 2, 3, 1).is_contiguous()
    return None if alike else residual.size(1)


def has_dense_rows(pixels: Tensor) -> bool:
    """Whether pixel after pixel, row after row and image after image is one stride apart."""
    N, _, H, W = pixels.shape
    return (H == 1 or pixels.stride(2) == W * pixels.stride(3)) and (
        N == 1 or pixels.stride(0) == H * W * pixels.stride(3)
    )


def _act_of(activation: str) -> dict[str, Any]:
    return dict(zip(("ACT", "FIRST", "SECOND"), numbers_of(activation), strict=True))


class _Acts(dict[str, dict[str, Any]]):
    def __missing__(self, activation: str) -> dict[str, Any]:
        return _act_of(activation)


acts = _Acts({activation: _act_of(activation) for activation in PLAIN})
"""What the kernels' epilogues are told of an activation, by its text."""


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether some element is 2^31 or more elements away from its tensor's first."""
    for tensor in tensors:
        if tensor is None:
            continue
        last = 0
        for n, s in zip(tensor.shape, tensor.stride(), strict=True):
            last += (n - 1) * s
        # Rows above an image and past the last tile are counted on, though not read.
        if last + 2**24 >= 2**31:
            return True
    return False


def as_conv2d_would(output: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """(N, P, Q, K) as (N, K, P, Q) in the memory format of `conv2d`'s output."""
    output = output.permute(0, 3, 1, 2)
    last = torch.channels_last
    if memory_format_of(input) is last or memory_format_of(weight) is last:
        return output
    return output.contiguous()
