"""Tensors of the CPU that end where unreadable memory begins: for a process that may be killed."""

from __future__ import annotations

import ctypes
import math
import mmap

import torch
from torch import Tensor

_READ_AND_WRITE, _PRIVATE_AND_ANONYMOUS = 3, 0x22


def at_the_edge(tensor: Tensor) -> Tensor:
    """A copy between two pages that cannot be read, right in front of the second."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    integers = [ctypes.c_int] * 3
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *integers, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    size = tensor.untyped_storage().nbytes()
    room = math.ceil(size / page) * page
    start = libc.mmap(None, room + 2 * page, _READ_AND_WRITE, _PRIVATE_AND_ANONYMOUS, -1, 0)
    assert libc.mprotect(start, page, 0) == 0
    assert libc.mprotect(start + page + room, page, 0) == 0
    raw = (ctypes.c_char * size).from_address(start + page + room - size)
    flat = torch.frombuffer(raw, dtype=tensor.dtype)
    return flat.as_strided(tensor.shape, tensor.stride(), 0).copy_(tensor)
