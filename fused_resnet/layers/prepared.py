"""Copies of weights in another layout, kept as long as the weights are what was copied."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter


class Entry(NamedTuple):
    """A copy, and what tells that a weight is the one it was made from.

    Attributes:
        storage: the weight's memory. Its Python object lives as long as the memory does.
        version: the weight's.
        owner: the weight; None for a `Parameter`, which torch.utils.swap_tensors refuses to swap
            while there are weak references to it.
        layout: what else must be as it was; see `find`.
        copy: its values in another layout, or something made of them.
        whole: whether all values are compared in every call; see `watch`.
    """

    storage: weakref.ref[torch.UntypedStorage]
    version: int
    owner: weakref.ref[Tensor] | None
    layout: Any
    copy: Any
    whole: bool


class WeightCache(dict[int, Entry]):
    """Entries by the identity of the weight. They go with its memory.

    A parameter that dies before its memory leaves its entry until the memory goes, another
    parameter takes its place, or `release`.
    """

    def find(self, weight: Tensor, layout: object = None) -> Entry | None:
        """The entry made from a weight as it is now, as far as torch knows.

        Args:
            weight: a tensor with memory of its own.
            layout: anything that was given to `put` and must be equal. That a `weight.data = ...`
                gave the same memory another shape shows nowhere else.
        """
        entry = self.get(id(weight))
        if entry is None:
            return None
        try:
            version = weight._version
        except RuntimeError:  # made in inference mode: see `version_of`
            return None
        if (
            entry.storage() is not weight.untyped_storage()
            or entry.version != version
            or entry.layout != layout
        ):
            return None
        if entry.owner is None:
            return entry if isinstance(weight, Parameter) else None
        return entry if entry.owner() is weight else None

    def put(
        self,
        weight: Tensor,
        version: int | None,
        copy: Any,
        layout: object = None,
        whole: bool = False,
    ) -> None:
        """Keeps a copy made of a weight; `version` is that from before it was read.

        Copies go whose weights have given back their memory and not themselves, as those that FSDP
        gathers do when they are sharded again.
        """
        if version is None:
            return
        for key, entry in list(self.items()):
            if _is_empty(entry.storage()):
                self.pop(key, None)
        forget = functools.partial(self._forget, id(weight))
        owner = None if isinstance(weight, Parameter) else weakref.ref(weight, forget)
        storage = weakref.ref(weight.untyped_storage(), forget)
        self[id(weight)] = Entry(storage, version, owner, layout, copy, whole)

    def release(self, weights: Iterable[Tensor]) -> None:
        """Drops the copies of these weights."""
        for weight in weights:
            self.pop(id(weight), None)

    def _forget(self, key: int, dead: weakref.ref[Any]) -> None:
        entry = self.get(key)
        # The address may already belong to another weight.
        if entry is not None and (entry.owner is dead or entry.storage is dead):
            del self[key]


def _is_empty(storage: torch.UntypedStorage | None) -> bool:
    return storage is not None and storage.nbytes() == 0


def version_of(weight: Tensor) -> int | None:
    """How often torch has seen a weight change; None where it does not count."""
    try:
        return weight._version
    except RuntimeError:  # made in inference mode
        return None
