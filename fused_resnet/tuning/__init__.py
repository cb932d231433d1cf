"""Which kernel and tile run a convolution."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .estimate import best
from .problem import ConvProblem, Tile

__all__ = ["Choice", "ConvProblem", "Tile", "choose"]


@dataclass(frozen=True)
class Choice:
    """What runs a problem: "triton" with a tile or "library", and how that is known."""

    kernel: str
    tile: Tile | None
    source: str


def choose(problem: ConvProblem, device: torch.device) -> Choice:
    """The kernel and tile for a problem on a device."""
    return Choice("triton", best(problem), "estimate")
