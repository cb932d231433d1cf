"""Triton's batch norm, interpreted, in tiles of a GPU's size."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import pytest

from fused_resnet import backends


def use_tiles_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Makes `norm.py` go through tensors as on a GPU, in slabs of a few steps; the module.

    Interpreted it takes much larger tiles, since each costs as much.
    """
    module = backends.triton.lazy.norms()
    original = module.layout_of

    def as_on_a_gpu(input: Any) -> Any:
        layout = original(input)
        channels = module._LINE // input.element_size() if layout.S == 1 else 1
        block_c = min(1 << (layout.C - 1).bit_length(), channels)
        return dataclasses.replace(layout, block_r=module._STEP // block_c, block_c=block_c)

    monkeypatch.setattr(module, "layout_of", as_on_a_gpu)
    return module
