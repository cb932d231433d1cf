"""What may be chosen for a problem: a kernel, its tile, and who says so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """How a convolution, Triton's or CUDA's, cuts a problem up.

    A program (a block) computes `block_m` output pixels by `block_n` output channels, `block_k`
    products deep at a time, `split_k` programs sharing one such tile's sum. A chain's program
    computes all channels of its pixels, of the block's output `block_n` at a time; in a pair,
    `split_k` programs share these. Where clusters load for each other, `block_m` pixels are a
    cluster's.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        split = f", split {self.split_k}" if self.split_k > 1 else ""
        return (
            f"{self.block_m}x{self.block_n}x{self.block_k}{split}, "
            f"{self.num_warps} warps, {self.num_stages} stages"
        )


TILED = ("triton", "cuda")
KERNELS = (*TILED, "library", "cudnn_convolution_relu", "cudnn_convolution_add_relu")
# A convolution with a norm and ReLU in its loads, among what cannot run.
PROLOGUE = "prologue"
CHAIN, CHAIN_WITHOUT_NEXT = "chain", "chain without next"
PAIR = "pair"
CONVOLUTIONS = "convolutions"
CHAINED = (CHAIN, CHAIN_WITHOUT_NEXT, PAIR)
HOPPER_CHAIN, HOPPER_CHAIN_WITHOUT_NEXT = "hopper chain", "hopper chain without next"
HOPPER_CHAINS = (HOPPER_CHAIN, HOPPER_CHAIN_WITHOUT_NEXT)
CHAIN_KERNELS = (*CHAINED, CONVOLUTIONS)
BASIC_BLOCK = "basic block"
BASIC_BLOCK_KERNELS = (BASIC_BLOCK, CONVOLUTIONS)
MEASURED = "measured on this machine"
SHIPPED = "shipped table"
ESTIMATE = "estimate"


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a problem, and where that is known from.

    Attributes:
        kernel: of a convolution "triton" or "cuda"; "library", the library's convolution and then
            `scale_shift_act`; or the library's fused operator of that name. Of a `ChainProblem`
            "chain"; "chain without next", the same but for the next block's convolution; "pair",
            the 3x3 by itself and all else in one launch; "hopper chain" and "hopper chain without
            next", CUDA's kernel of the first two for that GPU, a projection by itself; or
            "convolutions", each as it was chosen for itself. Of a `BasicBlockProblem` "basic
            block", CUDA's kernel of both convolutions, or "convolutions".
        tile: of the Triton or CUDA kernel, the chain or the block; None for the others.
        source: "measured on this machine", "shipped table" or "estimate".
    """

    kernel: str
    tile: Tile | None
    source: str

    def __str__(self) -> str:
        return self.kernel if self.tile is None else f"{self.kernel} {self.tile}"
