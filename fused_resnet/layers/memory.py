"""How tensors lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format


def contiguous_like_eager(input: Tensor) -> Tensor:
    """`input`, copied if its strides are not those `F.batch_norm` would give its output."""
    if input.is_contiguous():
        return input
    # What follows comes to the same, ten times as slowly.
    if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
        return input
    memory_format = suggest_memory_format(input)
    return input.contiguous(memory_format=memory_format)
