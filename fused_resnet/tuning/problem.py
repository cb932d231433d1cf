"""What a fused convolution is asked to do, and the ways to do it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvProblem:
    """One fused convolution: `(N, C, H, W)` by `(K, C / groups, R, S)`, in `dtype`, and what follows it.

    `dtype` is "float16", "bfloat16", "float32" (IEEE) or "tfloat32" (float32 tensors whose products
    may be TF32). `pool` is None, or the stem's max-pool as (kernel, stride, padding) of its rows and
    columns: six numbers.
    """

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    dtype: str
    residual: bool
    pool: tuple[int, ...] | None = None

    @property
    def P(self) -> int:
        """Output rows of the convolution."""
        extent = self.dilation[0] * (self.R - 1) + 1
        return (self.H + 2 * self.padding[0] - extent) // self.stride[0] + 1

    @property
    def Q(self) -> int:
        """Output columns of the convolution."""
        extent = self.dilation[1] * (self.S - 1) + 1
        return (self.W + 2 * self.padding[1] - extent) // self.stride[1] + 1


@dataclass(frozen=True)
class Tile:
    """How a Triton convolution cuts a problem up.

    A program computes `block_m` output pixels by `block_n` output channels, `block_k` products deep
    at a time, `split_k` programs sharing one such tile's sum.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int
