"""What a fused convolution is asked to do, and the ways to do it."""

from __future__ import annotations

import re
from dataclasses import dataclass

DTYPES = ("float16", "bfloat16", "float32", "tfloat32")

_KEY = re.compile(
    r"(\w+) (\d+)x(\d+)x(\d+)x(\d+) k(\d+) (\d+)x(\d+) s(\d+)x(\d+) p(\d+)x(\d+) d(\d+)x(\d+)"
    r" g(\d+)( residual)?(?: pool(\d+)x(\d+),(\d+)x(\d+),(\d+)x(\d+))?",
    re.ASCII,
)


@dataclass(frozen=True)
class ConvProblem:
    """One fused convolution: `(N, C, H, W)` by `(K, C / groups, R, S)`, and what follows it.

    `dtype` is "float16", "bfloat16", "float32" (IEEE) or "tfloat32" (float32 tensors whose products
    may be TF32). `pool` is None, or the stem's max-pool: kernel, stride and padding, each of its
    rows and columns, six numbers.
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
    def P(self) -> int:  # noqa: N802
        """Output rows of the convolution."""
        return _steps(self.H, self.dilation[0] * (self.R - 1) + 1, self.stride[0], self.padding[0])

    @property
    def Q(self) -> int:  # noqa: N802
        """Output columns of the convolution."""
        return _steps(self.W, self.dilation[1] * (self.S - 1) + 1, self.stride[1], self.padding[1])

    @property
    def output_size(self) -> tuple[int, int]:
        """Rows and columns of what is written: pooled where there is a pool."""
        if self.pool is None:
            return self.P, self.Q
        rows, columns, row_stride, column_stride, row_padding, column_padding = self.pool
        return (
            _steps(self.P, rows, row_stride, row_padding),
            _steps(self.Q, columns, column_stride, column_padding),
        )

    @property
    def element_size(self) -> int:
        """Bytes of an element of input, weight, residual and output."""
        return 2 if self.dtype in ("float16", "bfloat16") else 4

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolution."""
        depth = self.C // self.groups * self.R * self.S
        return 2 * self.N * self.K * self.P * self.Q * depth

    @property
    def input_bytes(self) -> int:
        """Of the input's pixels that some filter tap reads."""
        rows = min(self.H, self.P * self.R)
        columns = min(self.W, self.Q * self.S)
        return self.element_size * self.N * self.C * rows * columns

    @property
    def weight_bytes(self) -> int:
        """Of the filters."""
        return self.element_size * self.K * (self.C // self.groups) * self.R * self.S

    @property
    def output_bytes(self) -> int:
        """Of what is written."""
        rows, columns = self.output_size
        return self.element_size * self.N * self.K * rows * columns

    @property
    def bytes_once(self) -> int:
        """Input, weight, residual, batch-norm parameters and output, each moved once."""
        residual = self.output_bytes if self.residual else 0
        return self.input_bytes + self.weight_bytes + residual + 16 * self.K + self.output_bytes

    def __str__(self) -> str:
        """What tells one layer of a network from another: "256x14x14 to 256, 3x3, stride 2"."""
        text = f"{self.C}x{self.H}x{self.W} to {self.K}, {self.R}x{self.S}"
        for name, pair in (("stride", self.stride), ("dilation", self.dilation)):
            if pair != (1, 1):
                text += f", {name} {pair[0] if pair[0] == pair[1] else _pair(pair)}"
        if self.groups > 1:
            text += f", {self.groups} groups"
        return text + ", residual" * self.residual + ", pool" * (self.pool is not None)

    @property
    def key(self) -> str:
        """The problem as a line of text, which `parse_problem` reads back.

        "float16 256x64x56x56 k256 1x1 s1x1 p0x0 d1x1 g1 residual": dtype, input, output channels,
        filter, stride, padding, dilation, groups, what follows.
        """
        text = (
            f"{self.dtype} {self.N}x{self.C}x{self.H}x{self.W} k{self.K} {self.R}x{self.S}"
            f" s{_pair(self.stride)} p{_pair(self.padding)} d{_pair(self.dilation)} g{self.groups}"
        )
        if self.residual:
            text += " residual"
        if self.pool is not None:
            text += " pool" + ",".join(_pair(self.pool[at : at + 2]) for at in (0, 2, 4))
        return text


def parse_problem(key: str) -> ConvProblem:
    """The problem whose `key` this is.

    Raises:
        ValueError: it is no problem's key.
    """
    match = _KEY.fullmatch(key)
    if match is None or match[1] not in DTYPES:
        raise ValueError(f"key is {key!r}, must be like {_EXAMPLE.key!r}")
    N, C, H, W, K, R, S, *pairs, groups = map(int, match.groups()[1:15])
    pool = None if match[17] is None else tuple(map(int, match.groups()[16:22]))
    return ConvProblem(
        N, C, H, W, K, R, S, (pairs[0], pairs[1]), (pairs[2], pairs[3]), (pairs[4], pairs[5]),
        groups, match[1], match[16] is not None, pool,
    )  # fmt: skip


def _steps(size: int, window: int, stride: int, padding: int) -> int:
    """How many windows fit into `size` padded on both sides."""
    return (size + 2 * padding - window) // stride + 1


def _pair(pair: tuple[int, ...]) -> str:
    return f"{pair[0]}x{pair[1]}"


_EXAMPLE = ConvProblem(1, 64, 56, 56, 256, 1, 1, (1, 1), (0, 0), (1, 1), 1, "float16", True)


@dataclass(frozen=True)
class Tile:
    """How a convolution, Triton's or CUDA's, cuts a problem up.

    A program (a block) computes `block_m` output pixels by `block_n` output channels, `block_k`
    products deep at a time, `split_k` programs sharing one such tile's sum.
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
MEASURED = "measured on this machine"
SHIPPED = "shipped table"
ESTIMATE = "estimate"


@dataclass(frozen=True)
class Choice:
    """The kernel that runs a problem, and where that is known from.

    Attributes:
        kernel: "triton" or "cuda"; "library", the library's convolution and then
            `scale_shift_act`; or the library's fused operator of that name.
        tile: of the Triton or CUDA kernel; None for the others.
        source: "measured on this machine", "shipped table" or "estimate".
    """

    kernel: str
    tile: Tile | None
    source: str

    def __str__(self) -> str:
        return self.kernel if self.tile is None else f"{self.kernel} {self.tile}"
