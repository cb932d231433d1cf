"""Which tensors the kernels take, and where they are interpreted."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from ...layers.memory import memory_format_of

_PLAIN = (Tensor, Parameter)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@functools.cache
def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for kernels to be computed by NumPy, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def can_train(input: Tensor, weight: Tensor, other: Tensor | None, groups: int) -> bool:
    """Whether the kernels of `training_conv.py` take a convolution: channels_last, one group."""
    dtypes = DTYPES if input.device.type != "cuda" else (torch.float16, torch.bfloat16)
    return (
        groups == 1
        and input.dtype in dtypes
        and can_run(input, weight, other)
        and type(input) in _PLAIN
        and input.numel() > 0
        and weight.numel() > 0
        and memory_format_of(input) is torch.channels_last
    )


def can_normalize(input: Tensor, *others: Tensor | None) -> bool:
    """Whether dtype, size and devices are those the kernels of `norm.py` take."""
    return (
        input.dtype in DTYPES
        and type(input) in _PLAIN
        and input.numel() > 0
        and _are_on(input.device, others)
    )


def is_channels_last(input: Tensor) -> bool:
    """Whether it is dense, and what follows it would lie likewise."""
    return (
        input.dim() == 4
        and memory_format_of(input) is torch.channels_last
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def can_run(input: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether dtypes and devices are those the kernels take."""
    return (
        input.dtype in DTYPES
        and weight.dtype is input.dtype
        and _are_on(input.device, (weight, *others))
    )


def _are_on(device: torch.device, tensors: Sequence[Tensor | None]) -> bool:
    for tensor in tensors:  # noqa: SIM110  (a generator is a call for each of them)
        if tensor is not None and tensor.device != device:
            return False
    return True


def is_traced(input: Tensor) -> bool:
    """Whether a tensor stands for one that a kernel cannot read."""
    return type(input) not in _PLAIN
