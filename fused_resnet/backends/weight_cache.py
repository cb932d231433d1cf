"""Copies of weights in another layout, kept as long as the weights are what was copied."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Entry(NamedTuple):
    """A copy, and what tells that a weight is the one it was made from.

    Attributes:
        owner: the weight; None for a `Parameter`, which torch.utils.swap_tensors refuses to swap
            while there are weak references to it.
        storage: its memory. Its Python object lives as long as the memory does.
        layout: what `layout_of` says of it.
        copy: its values in another layout.
        whole: whether all values are compared in every call; see `watch`.
    """

    owner: weakref.ref[Tensor] | None
    storage: weakref.ref[torch.UntypedStorage]
    layout: tuple
    copy: Tensor
    whole: bool


def layout_of(weight: Tensor, groups: int = 1) -> tuple | None:
    """Where the values of a weight lie, how, and in which version; None where it has no version."""
    try:
        version = weight._version
    except RuntimeError:  # made in inference mode
        return None
    return version, weight.data_ptr(), groups, weight.dtype, weight.shape, weight.stride()


class WeightCache(dict[int, Entry]):
    """Entries by the identity of the weight. They go with its memory.

    A parameter that dies before its memory leaves its entry until the memory goes, another
    parameter takes its place, or `release`.
    """

    def find(self, weight: Tensor, groups: int = 1) -> Entry | None:
        """The entry made from a weight as it is now, as far as torch knows."""
        entry = self.get(id(weight))
        if entry is None or entry.storage() is not weight.untyped_storage():
            return None
        if entry.owner is None:
            if not isinstance(weight, Parameter):
                return None
        elif entry.owner() is not weight:
            return None
        return entry if entry.layout == layout_of(weight, groups) else None

    def put(self, weight: Tensor, layout: tuple | None, copy: Tensor, whole: bool = False) -> None:
        """Keeps a copy made of a weight; `layout` is that from before it was read."""
        if layout is None:
            return
        forget = functools.partial(self._forget, id(weight))
        owner = None if isinstance(weight, Parameter) else weakref.ref(weight, forget)
        storage = weakref.ref(weight.untyped_storage(), forget)
        self[id(weight)] = Entry(owner, storage, layout, copy, whole)

    def release(self, weights: Iterable[Tensor]) -> None:
        """Drops the copies of these weights."""
        for weight in weights:
            self.pop(id(weight), None)

    def _forget(self, key: int, dead: weakref.ref) -> None:
        entry = self.get(key)
        # The address may already belong to another weight.
        if entry is not None and (entry.owner is dead or entry.storage is dead):
            del self[key]
