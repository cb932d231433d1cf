"""How exactly the native kernels compute float32 on tiles: as torch's setting says."""

from __future__ import annotations

import functools
import threading

import torch

from . import operators

# Which of torch's settings for float32 convolutions lets them be less exact, and how many products
# of bfloat16 then stand for one of float32, instead of six.
_PRODUCTS = {"tf32": 3, "bf16": 1}
_lock = threading.Lock()

current = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "conv")
"""Torch's setting."""

followed = ""
"""The setting that was last followed."""

products = 6
"""How many products of bfloat16 stand for one of float32 since then."""


def follow() -> None:
    """Has the native kernels compute float32 as exactly as torch's setting says now."""
    global followed
    precision = current()
    if tile_products(torch.float32) != products:
        _set_products()
    followed = precision


def tile_products(dtype: torch.dtype) -> int | None:
    """How many products of bfloat16 tiles stand for one of such values; None where none do."""
    if dtype is not torch.float32:
        return {torch.bfloat16: 1, torch.float16: 3}.get(dtype)
    return _PRODUCTS.get(current(), 6)


def _set_products() -> None:
    global products
    with _lock:
        products = _PRODUCTS.get(current(), 6)
        operators.set_float32_products(products)
