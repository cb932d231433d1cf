"""How tensors lie in memory."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .. import reference


def contiguous_like_eager(input: Tensor) -> Tensor:
    """`input`, copied if its strides are not those `F.batch_norm` would give its output."""
    if input.is_contiguous():
        return input
    # What follows comes to the same, ten times as slowly.
    if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
        return input
    memory_format = suggest_memory_format(input)
    return input.contiguous(memory_format=memory_format)


def readable_residual(backend: ModuleType, residual: Tensor | None, channels: int) -> Tensor | None:
    """A residual, padded if it has fewer channels and the backend's kernels need all of them.

    Kernels that do not read it as if there were zeros around it.
    """
    if (
        residual is None
        or residual.size(1) == channels
        or getattr(backend, "reads_narrow_residuals", False)
    ):
        return residual
    return reference.pad_channels(residual, channels)
