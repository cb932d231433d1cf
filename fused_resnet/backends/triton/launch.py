"""What launches move: a log that every launch of this backend's kernels reports to.

    with launches.logged() as log:
        model(x)
    sum(launch.bytes for launch in log)

Each tensor counts once a launch, with the bytes that some program of it addresses: of the input of
a strided 1x1 convolution only the pixels that are used. What a launch reads again comes from L2.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor

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


_row: ContextVar[list[int] | None] = ContextVar("fused_resnet_row", default=None)


@contextlib.contextmanager
def in_a_row() -> Iterator[None]:
    """Launches of this thread or task that may overlap with the ones before and behind them.

    Nothing but inference may launch here, and all of it on one stream. Other kernels may run
    between: they wait for what precedes them, and what follows waits for them.
    """
    token = _row.set([0])
    try:
        yield
    finally:
        _row.reset(token)


def next_in_row() -> int | None:
    """How many launches of the row came before the one that asks; None outside of rows."""
    row = _row.get()
    if row is None:
        return None
    row[0] += 1
    return row[0] - 1


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
