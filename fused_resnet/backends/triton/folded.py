"""What the launches of one pass share: a table of their norms' scales and shifts, and tickets.

    with folded.shared(input, layers):
        ...  # launches of convolutions that have these norms

Without it every program folds its channels' norm for itself, in each slice of a chain, and a sum
that several programs share takes a launch of its own to be added up. In here one small launch at
the beginning folds all norms, anew in every pass, so that nothing is stale; and of the programs
that share a sum the last adds the parts, in their order and not in that of their coming.

The table's kernel finds the parameters by their addresses, of which a tensor on the device is kept
as long as they are these.
"""

from __future__ import annotations

import contextlib
import functools
import struct
import weakref
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ...layers.description import ConvNorm, Norm
from ..recording import only_recorded
from . import launch

# Channels a program. A layer's part of the table is a multiple of as many as 64 bytes hold.
_BLOCK = 256
_STEP = 16
# Programs that may share sums in a pass, by tile; where they are more, a launch adds up.
TICKETS = 8192
_FIELDS = 8


@triton.jit
def fold_norms_kernel(
    rows_ptr,
    mean_ptr,
    table_ptr,
    ticket_ptr,
    count,
    length,
    tickets,
    FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr = False,
):
    """`table[0] = weight / sqrt(var + eps)`, `table[1] = bn_bias + (bias - mean) table[0]`.

    A row of `rows` says what a program folds, in 64-bit numbers: addresses of the first mean,
    variance, weight, norm's bias and convolution's bias, of `mean`'s dtype, the last three 0 where
    there is none; how many channels; where in the table; and eps as a float32's bits. Programs
    write zeros to `ticket` besides.
    """
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    program = tl.program_id(0)
    j = tl.arange(0, BLOCK)
    ticket = program * BLOCK + j
    tl.store(ticket_ptr + ticket, tl.zeros((BLOCK,), dtype=tl.int32), mask=ticket < tickets)
    if program < count:
        row = rows_ptr + program * FIELDS
        weight = tl.load(row + 2)
        bn_bias = tl.load(row + 3)
        bias = tl.load(row + 4)
        exists = j < tl.load(row + 5)
        places = tl.load(row + 6) + j
        eps = tl.load(row + 7 + tl.zeros((BLOCK,), dtype=tl.int32)).to(tl.int32)
        eps = eps.to(tl.float32, bitcast=True)
        pointer: tl.constexpr = mean_ptr.dtype
        var = tl.load(tl.load(row + 1).to(pointer) + j, mask=exists, other=1.0).to(tl.float32)
        given = exists & (tl.zeros((BLOCK,), dtype=tl.int64) + weight != 0)
        factor = tl.load(weight.to(pointer) + j, mask=given, other=1.0).to(tl.float32)
        scale = tl.rsqrt(var + eps) * factor
        shift = -tl.load(tl.load(row).to(pointer) + j, mask=exists, other=0.0).to(tl.float32)
        given = exists & (tl.zeros((BLOCK,), dtype=tl.int64) + bias != 0)
        shift += tl.load(bias.to(pointer) + j, mask=given, other=0.0).to(tl.float32)
        given = exists & (tl.zeros((BLOCK,), dtype=tl.int64) + bn_bias != 0)
        term = tl.load(bn_bias.to(pointer) + j, mask=given, other=0.0).to(tl.float32)
        tl.store(table_ptr + places, scale, mask=exists)
        tl.store(table_ptr + length + places, shift * scale + term, mask=exists)


@dataclass(eq=False)
class Rows:
    """What the kernel reads of a list of norms, and of what it was made.

    Attributes:
        values: (programs, FIELDS), int64, on the device.
        places: where each norm's part of the table begins.
        length: of a row of the table.
        described: what was looked at of each parameter.
        stream: on which the values were allocated; None where tensors have no streams.
    """

    values: Tensor
    places: list[int]
    length: int
    described: list[tuple[Any, ...]]
    stream: int | None

    def stay_for_this_stream(self) -> None:
        """Keeps the values' memory, should they be dropped, until the current stream is done."""
        if self.stream is None:
            return
        device = self.values.device
        if torch._C._cuda_getCurrentRawStream(device.index) != self.stream:
            self.values.record_stream(torch.cuda.current_stream(device))


@dataclass(eq=False)
class _Kept:
    """What is kept for the lists of norms that begin with the same one, as long as it lives.

    Attributes:
        rows: by the names of a list's norms.
        made: how often rows were made.
        captured: values that a CUDA graph may still read, of rows that may be out of date.
    """

    rows: dict[tuple[Any, ...], Rows]
    made: int
    captured: list[Tensor]

    def keep(self, values: Tensor) -> None:
        """Keeps values for a graph."""
        if not any(each is values for each in self.captured):
            self.captured.append(values)


@dataclass
class Shared:
    """What a pass shares.

    Attributes:
        table: (2, channels), float32; see `fold_norms_kernel`.
        places: of a norm, by what `_name` calls it, where its part begins and how long it is.
        tickets: (TICKETS,), int32, zero until a launch takes some.
        taken: how many launches have taken.
    """

    table: Tensor
    places: dict[tuple[Any, ...], tuple[int, int]]
    tickets: Tensor
    taken: int = 0

    def vectors(self, norm: Norm, bias: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """Scale and shift of a norm behind a convolution with this bias, (K,), float32."""
        place = self.places.get(_name(norm, bias))
        if place is None:
            return None
        first, count = place
        part = self.table[:, first : first + count]
        return part[0], part[1]


current: ContextVar[Shared | None] = ContextVar("fused_resnet_shared", default=None)
"""What launches here share, if they do."""

# By the first norm's mean.
_kept: dict[int, _Kept] = {}
# Norms that move, or come in other lists, more often than this are folded in each tile.
_MOST_MADE = 16


def is_shared() -> bool:
    """Whether launches here share something."""
    return current.get() is not None


def surroundings() -> tuple[bool, bool]:
    """Whether launches here are in no row, and share nothing: kernels are compiled for either.

    Who asks in every call writes it out.
    """
    return launch.open_row.get() is None, current.get() is None


def parameters_of(norm: Norm, bias: Tensor | None) -> tuple[tuple[Any, ...], float]:
    """A norm as kernels take it: mean, variance, weight, bias, the convolution's bias; and eps.

    Of a shared norm (scale, None, None, shift, None): see `device.affine`.
    """
    shared = current.get()
    if shared is not None and (vectors := shared.vectors(norm, bias)) is not None:
        scale, shift = vectors
        return (scale, None, None, shift, None), 0.0
    return (*norm[:4], bias), norm.eps


def table(layers: Sequence[ConvNorm]) -> list[Tensor]:
    """Scale and shift of each layer's norm as launches in a pass find them; and all tickets.

    Raises:
        RuntimeError: these norms cannot be folded in one launch.
    """
    with shared(layers[0].weight, layers, lasting=False):
        found = current.get()
        if found is None:
            raise RuntimeError("the norms have several dtypes, devices or strides")
        vectors = [found.vectors(layer.norm, layer.bias) for layer in layers]
        return [t for pair in vectors if pair is not None for t in pair] + [found.tickets]


def take_tickets(count: int) -> Tensor | None:
    """As many zeros (int32) that no other launch has; None where there are none."""
    shared = current.get()
    if shared is None or shared.taken + count > TICKETS:
        return None
    first = shared.taken
    # The next ones begin where they can be specialised alike.
    shared.taken += -(-count // _STEP) * _STEP
    return shared.tickets[first : first + count]


@contextlib.contextmanager
def shared(input: Tensor, layers: Sequence[ConvNorm], lasting: bool = True) -> Iterator[None]:
    """Launches what its block's launches share; nothing where that cannot be.

    Args:
        input: any tensor of the pass.
        layers: that are launched in here.
        lasting: whether such a pass will come again, with the same parameters.
    """
    token = current.set(_launched(input, layers, lasting))
    try:
        yield
    finally:
        current.reset(token)


def _launched(input: Tensor, layers: Sequence[ConvNorm], lasting: bool) -> Shared | None:
    rows = _rows_of(input, layers) if lasting else _rows_once(input, layers)
    if rows is None:
        return None
    table = input.new_empty((2, rows.length), dtype=torch.float32)
    tickets = input.new_empty((TICKETS,), dtype=torch.int32)
    count = rows.values.size(0)
    launch.launch_kernel(
        input,
        fold_norms_kernel,
        (max(count, TICKETS // _BLOCK),),
        (rows.values, layers[0].norm.mean, table, tickets, count, rows.length, TICKETS),
        writes=("table_ptr", "ticket_ptr"),
        # All norms are read, of which the launch is given one.
        partly={"mean_ptr": lambda: sum(t.numel() for t in _tensors(layers))},
        FIELDS=_FIELDS,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    places = {
        _name(layer.norm, layer.bias): (place, layer.weight.size(0))
        for layer, place in zip(layers, rows.places, strict=True)
    }
    return Shared(table, places, tickets)


def _name(norm: Norm, bias: Tensor | None) -> tuple[Any, ...]:
    mean, var, weight, bn_bias, eps = norm
    return id(mean), id(var), id(weight), id(bn_bias), id(bias), eps


def _tensors(layers: Sequence[ConvNorm]) -> list[Tensor]:
    return [t for layer in layers for t in (*layer.norm[:4], layer.bias) if t is not None]


def _described(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _is_read(rows: Rows) -> bool:
    """Keeps rows for what is about to read them.

    That tensors still begin where they say, the plan itself sees to: `launch_plans.Kept`.
    """
    rows.stay_for_this_stream()
    return True


def _rows_of(input: Tensor, layers: Sequence[ConvNorm]) -> Rows | None:
    """The kernel's rows, kept while the parameters are where they were; None where there are none.

    None are made of tensors that nobody calls parameters, which come and go, or in a graph that is
    captured, where nothing can be copied from the host.
    """
    if type(input) not in (Tensor, Parameter):
        return None
    tensors = _tensors(layers)
    first = layers[0].norm
    key = tuple(_name(layer.norm, layer.bias) for layer in layers)
    described = [*map(_described, tensors)]
    kept = _kept.get(id(first.mean))
    rows = None if kept is None else kept.rows.get(key)
    captures = input.is_cuda and torch.cuda.is_current_stream_capturing()
    if kept is None or rows is None or rows.described != described:
        if (
            captures
            or type(first.weight) is not Parameter
            or (kept is not None and kept.made >= _MOST_MADE)
            or not _can_all_be_read(input, layers)
        ):
            return None
        if kept is None:
            kept = _kept.setdefault(id(first.mean), _Kept({}, 0, []))
            weakref.finalize(first.mean, _kept.pop, id(first.mean), None)
        kept.made += 1
        rows = kept.rows[key] = _made(input, layers, described)
    if captures:
        kept.keep(rows.values)
    else:
        rows.stay_for_this_stream()
    if (seen_by := launch.recorder.get()) is not None:
        keep = functools.partial(kept.keep, rows.values)
        seen_by.add_kept(rows.values, functools.partial(_is_read, rows), tensors, keep)
    return rows


def _rows_once(input: Tensor, layers: Sequence[ConvNorm]) -> Rows | None:
    """`_rows_of`, of any tensors, for the current stream alone."""
    if not _can_all_be_read(input, layers):
        return None
    return _made(input, layers, [])


def _can_all_be_read(input: Tensor, layers: Sequence[ConvNorm]) -> bool:
    dtype = layers[0].norm.mean.dtype
    return all(_can_be_read(tensor, input, dtype) for tensor in _tensors(layers))


def _can_be_read(tensor: Tensor, input: Tensor, dtype: torch.dtype) -> bool:
    return (
        type(tensor) in (Tensor, Parameter)
        and tensor.dtype is dtype
        and tensor.device == input.device
        and tensor.stride() == (1,)
    )


def _made(input: Tensor, layers: Sequence[ConvNorm], described: list[tuple[Any, ...]]) -> Rows:
    numbers: list[int] = []
    places: list[int] = []
    length = 0
    for layer in layers:
        places.append(length)
        vectors = (*layer.norm[:4], layer.bias)
        eps = int.from_bytes(struct.pack("<f", layer.norm.eps), "little", signed=True)
        channels = layer.weight.size(0)
        for first in range(0, channels, _BLOCK):
            numbers += (
                0 if t is None else t.data_ptr() + first * t.element_size() for t in vectors
            )
            numbers += (min(_BLOCK, channels - first), length + first, eps)
        length += -(-channels // _STEP) * _STEP
    # No part of a pass that is recorded: it is made once. The copy from the host is waited for, so
    # that every stream may read it.
    with _disable_current_modes() if only_recorded() else contextlib.nullcontext():
        values = torch.tensor(numbers, dtype=torch.int64).view(-1, _FIELDS).to(input.device)
    stream = None
    if values.is_cuda:
        stream = torch._C._cuda_getCurrentRawStream(values.device.index)
    return Rows(values, places, length, described, stream)
