"""What a fused convolution is asked to do, and the ways to do it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import TypeAlias

from ..layers.description import output_size

DTYPES = ("float16", "bfloat16", "float32", "tfloat32")
CHAIN_DTYPES = ("float16", "bfloat16")

_KEY = re.compile(
    r"(\w+) (\d+)x(\d+)x(\d+)x(\d+) k(\d+) (\d+)x(\d+) s(\d+)x(\d+) p(\d+)x(\d+) d(\d+)x(\d+)"
    r" g(\d+)( residual)?(?: pool(\d+)x(\d+),(\d+)x(\d+),(\d+)x(\d+))?",
    re.ASCII,
)
_CHAIN_KEY = re.compile(
    r"chain (\w+) (\d+)x(\d+)x(\d+)x(\d+) k(\d+) s(\d+)x(\d+) p(\d+)x(\d+) d(\d+)x(\d+)"
    r"(?: project(\d+)x(\d+)x(\d+),(\d+)x(\d+))?(?: next(\d+))?",
    re.ASCII,
)
# What PyTorch takes for a size, a stride or a padding, products aside.
_LARGEST = 2**31 - 1
_BASIC_KEY = re.compile(r"basic (\w+) (\d+)x(\d+)x(\d+)x(\d+)", re.ASCII)


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
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    dtype: str
    residual: bool
    pool: tuple[int, ...] | None = None

    @property
    def P(self) -> int:  # noqa: N802
        """Output rows of the convolution."""
        return self._unpooled[0]

    @property
    def Q(self) -> int:  # noqa: N802
        """Output columns of the convolution."""
        return self._unpooled[1]

    @property
    def _unpooled(self) -> tuple[int, int]:
        filter = (self.R, self.S)
        return output_size((self.H, self.W), filter, self.stride, self.padding, self.dilation)

    @property
    def output_size(self) -> tuple[int, int]:
        """Rows and columns of what is written: pooled where there is a pool."""
        if self.pool is None:
            return self.P, self.Q
        return output_size(self._unpooled, self.pool[0:2], self.pool[2:4], self.pool[4:6])

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


@dataclass(frozen=True)
class ChainProblem:
    """A Bottleneck from its 3x3 convolution to the next block's first 1x1, in inference.

    Attributes:
        N: images.
        width: channels of the 3x3's input, and of its output.
        H: rows of the 3x3's input.
        W: its columns.
        K: output channels of the block.
        stride: of the 3x3, as are `padding` and `dilation`.
        padding: see `stride`.
        dilation: see `stride`.
        dtype: "float16" or "bfloat16".
        projection: of a shortcut that is one, the block's input and the strides: (C, H, W, stride
            of rows, of columns); None where the shortcut is the input itself.
        next_width: output channels of the next block's first convolution, a 1x1 of stride 1; 0
            where there is none, or it is none.
    """

    N: int
    width: int
    H: int
    W: int
    K: int
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    dtype: str
    projection: tuple[int, int, int, int, int] | None = None
    next_width: int = 0

    @property
    def convolution(self) -> ConvProblem:
        """The 3x3."""
        return ConvProblem(
            self.N, self.width, self.H, self.W, self.width, 3, 3, self.stride, self.padding,
            self.dilation, 1, self.dtype, False,
        )  # fmt: skip

    @property
    def P(self) -> int:  # noqa: N802
        """Output rows of the block."""
        return self.convolution.P

    @property
    def Q(self) -> int:  # noqa: N802
        """Output columns of the block."""
        return self.convolution.Q

    @property
    def expand(self) -> ConvProblem:
        """The 1x1 behind the 3x3, with the shortcut's addition."""
        return self._pointwise(self.width, self.P, self.Q, self.K, residual=True)

    @property
    def project(self) -> ConvProblem | None:
        """The shortcut's 1x1, if it has one."""
        if self.projection is None:
            return None
        C, H, W, *stride = self.projection
        return self._pointwise(C, H, W, self.K, (stride[0], stride[1]))

    @property
    def reduce(self) -> ConvProblem | None:
        """The next block's first 1x1, if that is here."""
        if not self.next_width:
            return None
        return self._pointwise(self.K, self.P, self.Q, self.next_width)

    @property
    def parts(self) -> tuple[ConvProblem, ...]:
        """The convolutions, as they would run one by one."""
        parts = (self.convolution, self.project, self.expand, self.reduce)
        return tuple(part for part in parts if part is not None)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the convolutions."""
        return sum(part.flops for part in self.parts)

    @property
    def bytes_once(self) -> int:
        """The 3x3's input, the shortcut, all parameters and both outputs, each moved once."""
        shortcut = self.expand.output_bytes if self.project is None else self.project.input_bytes
        parameters = sum(part.weight_bytes + 16 * part.K for part in self.parts)
        outputs = self.expand.output_bytes
        if self.reduce is not None:
            outputs += self.reduce.output_bytes
        return self.convolution.input_bytes + shortcut + parameters + outputs

    @property
    def bytes_of_pair(self) -> int:
        """The same of all that follows the 3x3, whose output then is the input."""
        return self.bytes_once - self.convolution.bytes_once + 2 * self.convolution.output_bytes

    def without_next(self) -> ChainProblem:
        """The block alone."""
        return dataclasses.replace(self, next_width=0)

    def __str__(self) -> str:
        """What tells one block of a network from another: "block 64x56x56 to 256, next 64"."""
        text = f"block {self.width}x{self.H}x{self.W} to {self.K}"
        for name, pair in (("stride", self.stride), ("dilation", self.dilation)):
            if pair != (1, 1):
                text += f", {name} {pair[0] if pair[0] == pair[1] else _pair(pair)}"
        if self.projection is not None:
            text += f", projection of {self.projection[0]}"
        return text + (f", next {self.next_width}" if self.next_width else "")

    @property
    def key(self) -> str:
        """The problem as a line of text, which `parse_problem` reads back.

        "chain float16 256x64x56x56 k256 s1x1 p1x1 d1x1 project64x56x56,1x1 next64": dtype, input of
        the 3x3, output channels, the 3x3's geometry, the projection and its strides, what follows.
        """
        text = (
            f"chain {self.dtype} {self.N}x{self.width}x{self.H}x{self.W} k{self.K}"
            f" s{_pair(self.stride)} p{_pair(self.padding)} d{_pair(self.dilation)}"
        )
        if self.projection is not None:
            C, H, W, *stride = self.projection
            text += f" project{C}x{H}x{W},{_pair(tuple(stride))}"
        return text + (f" next{self.next_width}" if self.next_width else "")

    def _pointwise(
        self, C: int, H: int, W: int, K: int, stride: tuple[int, int] = (1, 1),
        residual: bool = False,
    ) -> ConvProblem:  # fmt: skip
        return ConvProblem(
            self.N, C, H, W, K, 1, 1, stride, (0, 0), (1, 1), 1, self.dtype, residual
        )


@dataclass(frozen=True)
class BasicBlockProblem:
    """A BasicBlock whose shortcut is its input, in inference: two 3x3 of stride 1, padding 1.

    Attributes:
        N: images.
        C: channels of everything.
        H: rows.
        W: columns.
        dtype: "float16" or "bfloat16".
    """

    N: int
    C: int
    H: int
    W: int
    dtype: str

    @property
    def parts(self) -> tuple[ConvProblem, ConvProblem]:
        """Its convolutions, the second with the shortcut's addition."""
        first = ConvProblem(
            self.N, self.C, self.H, self.W, self.C, 3, 3, (1, 1), (1, 1), (1, 1), 1, self.dtype,
            False,
        )  # fmt: skip
        return first, dataclasses.replace(first, residual=True)

    @property
    def flops(self) -> int:
        """Multiplications and additions of its convolutions."""
        return sum(part.flops for part in self.parts)

    @property
    def bytes_once(self) -> int:
        """Input, weights, batch-norm parameters and output, each moved once."""
        first, _ = self.parts
        return first.input_bytes + first.output_bytes + 2 * (first.weight_bytes + 16 * self.C)

    def __str__(self) -> str:
        """What tells it from others: "64x56x56, two 3x3"."""
        return f"{self.C}x{self.H}x{self.W}, two 3x3"

    @property
    def key(self) -> str:
        """The problem as a line of text, which `parse_problem` reads back: dtype and input."""
        return f"basic {self.dtype} {self.N}x{self.C}x{self.H}x{self.W}"


Problem: TypeAlias = ConvProblem | ChainProblem | BasicBlockProblem


def parse_problem(key: str) -> Problem:
    """The problem whose `key` this is.

    Raises:
        ValueError: it is no problem's key, or the problem's sizes do not fit together.
    """
    problem = _parsed(key)
    if isinstance(problem, ChainProblem):
        _check(problem.convolution, key)  # first: the other parts' sizes follow from its strides
    for part in (problem,) if isinstance(problem, ConvProblem) else problem.parts:
        _check(part, key)
    return problem


def _parsed(key: str) -> Problem:
    match = _CHAIN_KEY.fullmatch(key)
    if match is not None and match[1] in CHAIN_DTYPES:
        N, width, H, W, K, *pairs = map(int, match.groups()[1:12])
        projection = None
        if match[13] is not None:
            a, b, c, d, e = map(int, match.groups()[12:17])
            projection = (a, b, c, d, e)
        return ChainProblem(
            N, width, H, W, K, (pairs[0], pairs[1]), (pairs[2], pairs[3]), (pairs[4], pairs[5]),
            match[1], projection, int(match[18] or 0),
        )  # fmt: skip
    match = _BASIC_KEY.fullmatch(key)
    if match is not None and match[1] in CHAIN_DTYPES:
        N, C, H, W = map(int, match.groups()[1:])
        return BasicBlockProblem(N, C, H, W, match[1])
    match = _KEY.fullmatch(key)
    if match is None or match[1] not in DTYPES:
        raise ValueError(f"key is {key!r}, must be like {_EXAMPLE.key!r}")
    N, C, H, W, K, R, S, *pairs, groups = map(int, match.groups()[1:15])
    pool = None if match[17] is None else tuple(map(int, match.groups()[16:22]))
    return ConvProblem(
        N, C, H, W, K, R, S, (pairs[0], pairs[1]), (pairs[2], pairs[3]), (pairs[4], pairs[5]),
        groups, match[1], match[16] is not None, pool,
    )  # fmt: skip


def _check(problem: ConvProblem, key: str) -> None:
    """Raises ValueError unless there can be such a convolution."""
    positive = ("N", "C", "H", "W", "K", "R", "S", "groups")
    numbers = {name: getattr(problem, name) for name in positive}
    numbers |= {
        f"{name} of {axis}": value
        for name in ("stride", "dilation")
        for axis, value in zip(("rows", "columns"), getattr(problem, name), strict=True)
    }
    if problem.pool is not None:
        numbers |= {f"pool's number {at + 1}": problem.pool[at] for at in range(4)}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"key is {key!r}, whose {name} is {value}, must be at least 1")
    if max(*numbers.values(), *problem.padding, *(problem.pool or ())) > _LARGEST:
        raise ValueError(f"key is {key!r}, whose numbers must be at most {_LARGEST}")
    for name in ("C", "K"):
        if numbers[name] % problem.groups:
            raise ValueError(
                f"key is {key!r}, whose {problem.groups} groups do not divide {name}, "
                f"{numbers[name]}"
            )
    if min(problem.P, problem.Q, *problem.output_size) < 1:
        raise ValueError(f"key is {key!r}, whose output has no pixels")


def _pair(pair: tuple[int, ...]) -> str:
    return f"{pair[0]}x{pair[1]}"


_EXAMPLE = ConvProblem(1, 64, 56, 56, 256, 1, 1, (1, 1), (0, 0), (1, 1), 1, "float16", True)
