"""Weights as GPU kernels read them, (K, R, S, C), copied once for models that lie otherwise.

A channels_last weight is its own arrangement. Any other is copied when it is first met and again
when torch has seen it change, as `layers/prepared.py` tells.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from ..layers import watch
from ..layers.prepared import WeightCache, version_of
from .recording import only_recorded


class _Kept(NamedTuple):
    """A copy, and on which stream it was made; None where tensors have no streams."""

    rows: Tensor
    stream: int | None
    made: torch.cuda.Event | None


_cache = WeightCache()


def rows_of(weight: Tensor) -> Tensor:
    """The weight as (K, R, S, C), dense; copied once per storage and version where it is not.

    A watched weight is copied in every call: to compare it would be to wait for the GPU. So is a
    weight in a graph that is captured, which would go on reading a kept copy when the weight has
    changed, or the copy has been released.
    """
    rows = weight.permute(0, 2, 3, 1)
    if rows.is_contiguous() or type(weight) not in (Tensor, Parameter):
        return rows.contiguous()
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        return rows.contiguous()
    if (kept := _found(weight)) is not None:
        return _seen_here(kept)
    version = version_of(weight)
    watched = watch.is_watched(weight)
    # A copy that is kept is no part of a pass that is recorded: see `is_kept`.
    hidden = version is not None and not watched and only_recorded()
    with _disable_current_modes() if hidden else contextlib.nullcontext():
        copy = rows.contiguous()
    _cache.put(weight, version, _marked(copy), _layout(weight), watched)
    return copy


def is_kept(weight: Tensor, rows: Tensor) -> bool:
    """Whether `rows` is the copy that `rows_of(weight)` would return now, ready on this stream."""
    kept = _found(weight)
    return kept is not None and kept.rows is rows and _seen_here(kept) is rows


def channels_last(weight: Tensor) -> Tensor:
    """`rows_of` as the weight that it is of, (K, C, R, S)."""
    return rows_of(weight).permute(0, 3, 1, 2)


def release(tensors: Iterable[Tensor]) -> None:
    """Drops the copies of these weights."""
    _cache.release(tensors)


def _found(weight: Tensor) -> _Kept | None:
    entry = _cache.find(weight, _layout(weight))
    if entry is None or entry.whole:
        return None
    kept: _Kept = entry.copy
    return kept


def _layout(weight: Tensor) -> tuple[object, ...]:
    return weight.data_ptr(), weight.dtype, weight.shape, weight.stride()


def _marked(copy: Tensor) -> _Kept:
    if not copy.is_cuda:
        return _Kept(copy, None, None)
    stream = torch.cuda.current_stream(copy.device)
    return _Kept(copy, stream.cuda_stream, stream.record_event())


def _seen_here(kept: _Kept) -> Tensor:
    """The copy, once the current stream waits for it, and its memory for the current stream."""
    rows, stream, made = kept
    if made is not None and torch._C._cuda_getCurrentRawStream(rows.device.index) != stream:
        current = torch.cuda.current_stream(rows.device)
        current.wait_event(made)
        rows.record_stream(current)
    return rows
