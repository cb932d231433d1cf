"""How tensors lie in memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import Parameter

from .description import Block

# What `suggest_memory_format` said, by shape and strides; it calls fifty functions.
_formats: dict[tuple[torch.Size, tuple[int, ...]], torch.memory_format] = {}
_MOST_FORMATS = 4096


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """`suggest_memory_format(tensor)`; not for what a compiler traces."""
    if type(tensor) not in (Tensor, Parameter):
        return suggest_memory_format(tensor)
    key = (tensor.shape, tensor.stride())
    found = _formats.get(key)
    if found is None:
        if len(_formats) >= _MOST_FORMATS:
            _formats.clear()
        found = _formats[key] = suggest_memory_format(tensor)
    return found


def contiguous_like_eager(input: Tensor) -> Tensor:
    """`input`, copied if its strides are not those `F.batch_norm` would give its output."""
    if input.is_contiguous():
        return input
    # What follows comes to the same, ten times as slowly.
    if input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last):
        return input
    memory_format = suggest_memory_format(input)
    return input.contiguous(memory_format=memory_format)


def lies_channels_last(input: Tensor, blocks: Sequence[Block]) -> bool:
    """Whether eager's blocks would return channels_last: once a convolution does, all do."""
    if memory_format_of(input) is torch.channels_last:
        return True
    return any(
        memory_format_of(layer.weight) is torch.channels_last
        for block in blocks
        for layer in block.main
    )


def unpacked(mask: Tensor, like: Tensor) -> Tensor:
    """A mask's bits, 0 or 1 each, as a tensor (uint8) of the shape and strides of `like`.

    Args:
        mask: (values / 8,), uint8, a bit a value in the memory order of `like`, the lowest first.
        like: dense.
    """
    bits = mask.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.as_strided(like.shape, like.stride())
