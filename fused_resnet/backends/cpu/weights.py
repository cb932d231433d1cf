"""Weights in the layout of the native convolution, made once and kept."""

from __future__ import annotations

from torch import Tensor

from ...layers import watch
from ...layers.prepared import WeightCache, version_of
from . import operators

cache = WeightCache()


def packed(weight: Tensor, groups: int) -> Tensor:
    """The weight in the kernel's layout, made once per storage and version of `weight`.

    Its values are the weight's own, since batch norm is applied in the epilogue; so nothing else
    can make a packed weight stale. Whether the weight still lies as it did, and has a sample of its
    values, is for the kernel to find out.
    """
    entry = cache.find(weight)
    if entry is not None and (
        not entry.whole or operators.conv_weight_is_packed(weight, entry.copy, groups)
    ):
        return entry.copy
    return packed_anew(weight, groups)


def packed_anew(weight: Tensor, groups: int) -> Tensor:
    """For a weight that is not in the cache, or was written without a new version.

    What was packed before is not overwritten: another thread may be reading it.
    """
    version = version_of(weight)  # before the values, which another thread may change
    copy = operators.pack_conv_weight(weight, groups)
    # Other processes write without a version.
    whole = watch.is_watched(weight) or weight.untyped_storage().is_shared()
    cache.put(weight, version, copy, whole=whole)
    return copy


def as_packed_anew(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The weight, and it packed, as `packed_copy` gives both."""
    return weight, packed_anew(weight, groups)


def packed_copy(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A copy that nobody writes to, and that packed: for a weight that is being written to."""
    copy = weight.detach().clone()
    return copy, operators.pack_conv_weight(copy, groups)
