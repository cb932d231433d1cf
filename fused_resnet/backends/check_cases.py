"""What kernels are checked with: small inputs, and how the library computes the same.

A case is a smaller version of a call. It has the layout, filters and channels of that, so that a
compiler makes the same code of both, and images so small that tiles at their edges and tiles across
them are all there is. See `self_check.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..layers.convolution import conv2d
from ..layers.description import ConvNorm, Norm, Pool, Sums, output_size
from ..layers.memory import unpacked
from ..layers.quantized import (
    WORD_ZERO_POINT,
    Quantization,
    QuantizedBlock,
    QuantizedConv,
    QuantizedStem,
    interleaved,
)
from ..tuning.problem import BasicBlockProblem, ChainProblem, ConvProblem
from . import library
from .self_check import Case

_Cast = Callable[[Any], Any]

# What compilers for GPUs tell apart of a number.
_MULTIPLE = 16
_MOST_IMAGES = 16
# Output rows and columns of small images, at least.
_OUTPUTS = (3, 4, 6, 9, 13, 18)
# Images of norms, (N, H, W): with a multiple of 16 pixels each, and without.
_QUANTIZED_SIZE = (2, 13, 11)
# A neighbour is 2^-4 to 2^-3 of a number away; of a block's outputs some in a thousand may be one.
_FLOAT8_FLOOR = 2.0**-7
# Less than a program has, more, and as many as some.
_FOLDED_CHANNELS = (48, 300, 512)
_NORM_SIZES = {True: (3, 16, 19), False: (3, 17, 19)}


class _Draw:
    """Random numbers, the same for every case, that no generator of the user's gives."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(0)

    def values(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self._generator, device=self._device)
        return (drawn * scale).to(dtype or self.dtype)

    def images(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.values(*shape, scale=scale).contiguous(memory_format=torch.channels_last)

    def uniform(self, low: float, high: float, count: int, dtype: torch.dtype | None) -> Tensor:
        drawn = torch.rand(count, generator=self._generator, device=self._device)
        return (low + (high - low) * drawn).to(dtype or self.dtype)

    def norm(
        self, channels: int, dtype: torch.dtype | None = None, through_zero: bool = False
    ) -> Norm:
        """A norm; `through_zero` it keeps signs, whatever rounding does."""
        mean, bias = (self.values(channels, scale=0.5, dtype=dtype) for _ in range(2))
        if through_zero:
            mean, bias = torch.zeros_like(mean), torch.zeros_like(bias)
        var, weight = (self.uniform(0.5, 2.0, channels, dtype) for _ in range(2))
        return Norm(mean, var, weight, bias, 1e-5)

    def layer(self, problem: ConvProblem) -> ConvNorm:
        channels = problem.C // problem.groups
        depth = channels * problem.R * problem.S
        weight = self.images(problem.K, channels, problem.R, problem.S, scale=depth**-0.5)
        geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
        return ConvNorm(weight, self.norm(problem.K), None, *geometry)

    def bytes_layer(
        self, channels: int, filters: int, size: int = 1, stride: int = 1, groups: int = 1
    ) -> QuantizedConv:
        """A convolution in eight bits whose outputs reach from the smallest to the largest byte."""
        depth = channels // groups * size * size
        weight = self.values(filters, channels // groups, size, size, scale=60, dtype=torch.float32)
        weight = weight.round().clamp(-127, 127).to(torch.int8)
        scale = self.uniform(0.5, 1.5, filters, torch.float32) / (80 * depth**0.5)
        shift = self.values(filters, scale=80, dtype=torch.float32) + 60
        pair = (size // 2, size // 2)
        return QuantizedConv(weight, scale, shift, (stride, stride), pair, (1, 1), groups)


def dtype_of(name: str) -> torch.dtype:
    """The tensors' dtype of a problem's."""
    return torch.float32 if name == "tfloat32" else getattr(torch, name)


def _all(cast: _Cast, values: Any) -> Any:
    """`cast` of all tensors in tuples."""
    if isinstance(values, ConvNorm | Norm | Sums):
        return type(values)(*(_all(cast, value) for value in values))
    return tuple(_all(cast, v) for v in values) if isinstance(values, tuple) else cast(values)


def several(cases: Sequence[Case], names: Sequence[str]) -> Case:
    """Cases that differ in nothing but the kernel, which `names` tell apart, as one."""

    def by_kernels() -> list[Tensor]:
        return [result for case in cases for result in case.kernel()]

    def by_library(cast: _Cast) -> list[Tensor]:
        results = cases[0].library(cast)
        return [result for _ in cases for result in results]

    count = len(cases[0].library(lambda value: value))
    return Case(by_kernels, by_library, names=tuple(n for n in names for _ in range(count)))


# Smaller problems.


def smaller(problem: ConvProblem, pixels: int) -> ConvProblem:
    """A problem of the same kind with few output pixels, but more than `pixels`.

    Sizes that are multiples of 16 stay so, others do not become it, and rows and columns differ.
    """
    taps = ((problem.H, problem.P, problem.R), (problem.W, problem.Q, problem.S))
    axes = [
        _extents(*axis, stride, padding, dilation)
        for axis, stride, padding, dilation in zip(
            taps, problem.stride, problem.padding, problem.dilation, strict=True
        )
    ]
    alike = (problem.N * problem.P * problem.Q) % _MULTIPLE == 0
    found = []
    images = range(1, _MOST_IMAGES + 1)
    for N, (H, P), (W, Q) in itertools.product(images, axes[0], axes[1]):
        M = N * P * Q
        is_small, is_like = pixels >= M, (M % _MULTIPLE == 0) == alike
        found.append((is_small, not is_like, H == W, N * H * W, N, H, W))
    *_, N, H, W = min(found)
    return replace(problem, N=N, H=H, W=W)


def _extents(
    size: int, outputs: int, taps: int, stride: int, padding: int, dilation: int
) -> list[tuple[int, int]]:
    """Small sizes of an axis that are like `size`, and how many outputs they have."""
    if size == 1:
        return [(size, outputs)]
    found = []
    least = max(2, dilation * (taps - 1) + 1 - 2 * padding)
    for extent in range(least, least + 4 * _MULTIPLE):
        (made, _) = output_size((extent, 1), (taps, 1), (stride, 1), (padding, 0), (dilation, 1))
        pairs = ((extent, size), (made, outputs))
        if all((a % _MULTIPLE == 0) == (b % _MULTIPLE == 0) for a, b in pairs):
            found.append((extent, made))
    # A few of them: all that is wanted is a product of theirs of about the right size.
    few = dict.fromkeys(
        next(pair for pair in found if pair[1] >= least)
        for least in _OUTPUTS
        if found[-1:] and found[-1][1] >= least
    )
    return list(few) or [(size, outputs)]


def smaller_chain(problem: ChainProblem, pixels: int) -> ChainProblem:
    """`smaller` of the chain's first convolution, all else as large as that makes it."""
    small = smaller(problem.convolution, pixels)
    projection = problem.projection
    if projection is not None:
        C, _, _, down, right = projection
        projection = (C, small.P * down, small.Q * right, down, right)
    return replace(problem, N=small.N, H=small.H, W=small.W, projection=projection)


# Inference.


def convolution(
    problem: ConvProblem,
    activation: str,
    device: torch.device,
    run: Callable[[Tensor, ConvNorm, Tensor | None, str], Tensor],
) -> Case:
    """A convolution, its norm, residual and activation."""
    draw = _Draw(dtype_of(problem.dtype), device)
    input, layer = draw.images(problem.N, problem.C, problem.H, problem.W), draw.layer(problem)
    residual = None
    if problem.residual:
        residual = draw.images(problem.N, problem.K, problem.P, problem.Q)

    def by_library(cast: _Cast) -> list[Tensor]:
        arguments = map(cast, (input, *layer.flat(), residual, activation))
        return [reference.conv_bn_act(*arguments)]

    return Case(lambda: [run(input, layer, residual, activation)], by_library)


def normalised_convolution(
    problem: ConvProblem,
    activation: str,
    device: torch.device,
    run: Callable[[Tensor, Norm, ConvNorm, Tensor | None, str], Tensor],
) -> Case:
    """A convolution of `relu(batch_norm(input))`, and what follows it."""
    draw = _Draw(dtype_of(problem.dtype), device)
    input, layer = draw.images(problem.N, problem.C, problem.H, problem.W), draw.layer(problem)
    before = draw.norm(problem.C)
    residual = None
    if problem.residual:
        residual = draw.images(problem.N, problem.K, problem.P, problem.Q)

    def by_library(cast: _Cast) -> list[Tensor]:
        arguments = map(cast, (input, *before, *layer.flat(), residual, activation))
        return [reference.norm_conv_bn_act(*arguments)]

    return Case(lambda: [run(input, before, layer, residual, activation)], by_library)


def convolution_and_pool(
    problem: ConvProblem,
    activation: str,
    device: torch.device,
    run: Callable[[Tensor, ConvNorm, str, Pool], Tensor],
) -> Case:
    """A stem: a convolution, its norm, activation and max-pool."""
    assert problem.pool is not None
    draw = _Draw(dtype_of(problem.dtype), device)
    input, layer = draw.images(problem.N, problem.C, problem.H, problem.W), draw.layer(problem)
    pool = Pool(problem.pool[:2], problem.pool[2:4], problem.pool[4:6])

    def by_library(cast: _Cast) -> list[Tensor]:
        arguments: tuple[Any, ...] = (input, *layer.flat(), activation, *pool)
        return [reference.conv_bn_act_max_pool(*_all(cast, arguments))]

    return Case(lambda: [run(input, layer, activation, pool)], by_library)


def max_pool(
    channels: int, dtype: torch.dtype, device: torch.device, run: Callable[..., Tensor]
) -> Case:
    """A max-pool by itself, whose windows overlap and reach beyond the image."""
    input = _Draw(dtype, device).images(2, channels, 9, 12)
    pool = Pool((3, 3), (2, 2), (1, 1))

    def by_library(cast: _Cast) -> list[Tensor]:
        return [torch.max_pool2d(cast(input), *pool)]

    return Case(lambda: [run(input, [*itertools.chain(*pool)])], by_library)


def chain(
    problem: ChainProblem,
    device: torch.device,
    run: Callable[[Tensor, Tensor, Sequence[ConvNorm | None]], tuple[Tensor, Tensor | None]],
) -> Case:
    """A Bottleneck behind its first convolution, and the next one's first."""
    draw = _Draw(dtype_of(problem.dtype), device)
    reduced = draw.images(problem.N, problem.width, problem.H, problem.W)
    main = [draw.layer(part) for part in (problem.convolution, problem.expand)]
    projection = None if problem.project is None else draw.layer(problem.project)
    following = None if problem.reduce is None else draw.layer(problem.reduce)
    source = problem.expand if problem.project is None else problem.project
    channels = problem.K if problem.project is None else source.C
    x = draw.images(problem.N, channels, source.H, source.W)

    def by_library(cast: _Cast) -> list[Tensor]:
        def convolved(x: Tensor, layer: ConvNorm, *rest: Any) -> Tensor:
            return reference.conv_bn_act(x, *map(cast, layer.flat()), *rest)

        shortcut = cast(x) if projection is None else convolved(cast(x), projection, None, "none")
        hidden = convolved(cast(reduced), main[0], None, "relu")
        out = convolved(hidden, main[1], shortcut, "relu")
        return [out] if following is None else [out, convolved(out, following, None, "relu")]

    def by_kernel() -> list[Tensor]:
        return [t for t in run(reduced, x, (*main, projection, following)) if t is not None]

    return Case(by_kernel, by_library)


def folded_norms(
    dtype: torch.dtype,
    device: torch.device,
    table: Callable[[Sequence[ConvNorm]], Sequence[Tensor]],
) -> Case:
    """Scales and shifts of norms of several lengths behind convolutions with and without a bias.

    `table` returns these, layer after layer, and zeros.
    """
    draw = _Draw(dtype, device)
    layers = []
    for channels in _FOLDED_CHANNELS:
        bias = draw.values(channels) if channels % _MULTIPLE else None
        weight = draw.images(channels, 1, 1, 1)
        geometry = ((1, 1), (0, 0), (1, 1), 1)
        layers.append(ConvNorm(weight, draw.norm(channels), bias, *geometry))
    without = layers[0]
    layers.append(without._replace(norm=without.norm._replace(weight=None, bias=None)))

    def by_library(cast: _Cast) -> list[Tensor]:
        found = []
        for layer in layers:
            # Of what is stored, in float32 at least, as kernels compute.
            vectors = (*layer.norm[:4], layer.bias)
            given: list[Any] = [None if t is None else cast(t.float()) for t in vectors]
            mean, var, weight, bias, behind = given
            scale = (var + layer.norm.eps).rsqrt() * (1 if weight is None else weight)
            shift = (-mean if behind is None else behind - mean) * scale
            shift = shift if bias is None else shift + bias
            found += [scale, shift]
        return [*found, torch.ones(1, device=device)]

    def by_kernel() -> list[Tensor]:
        *vectors, zeros = table(layers)
        return [*vectors, 1 + zeros.abs().amax(0, keepdim=True).float()]

    return Case(by_kernel, by_library)


def basic_block(
    problem: BasicBlockProblem,
    device: torch.device,
    run: Callable[[Tensor, ConvNorm, ConvNorm], Tensor],
) -> Case:
    """A BasicBlock whose shortcut is its input."""
    draw = _Draw(dtype_of(problem.dtype), device)
    x = draw.images(problem.N, problem.C, problem.H, problem.W)
    first, second = map(draw.layer, problem.parts)

    def by_library(cast: _Cast) -> list[Tensor]:
        hidden = reference.conv_bn_act(*map(cast, (x, *first.flat(), None, "relu")))
        return [reference.conv_bn_act(hidden, *map(cast, (*second.flat(), x, "relu")))]

    return Case(lambda: [run(x, first, second)], by_library)


def quantized_blocks(
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    arguments: tuple[Sequence[QuantizedBlock], Quantization, Quantization],
    run: Callable[..., Tensor],
) -> Case:
    """Residual blocks in eight bits, the caller's own, whose bits are defined."""
    blocks, stored, output = arguments
    draw = _Draw(dtype, device)
    x = draw.images(*_QUANTIZED_SIZE[:1], channels, *_QUANTIZED_SIZE[1:], scale=50 * stored.step)

    def by_library(cast: _Cast) -> list[Tensor]:
        return [cast(reference.quantized_residual_blocks(x, blocks, stored, output))]

    return Case(lambda: [run(x, blocks, stored, output)], by_library)


def float8_blocks(
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    arguments: tuple[Sequence[QuantizedBlock], Quantization, Quantization],
    run: Callable[..., Tensor],
) -> Case:
    """Residual blocks in float8_e4m3fn, the caller's own, each by itself.

    Sums in another order round some numbers to a neighbour, and in the blocks behind those more.
    """
    blocks, stored, output = arguments
    draw = _Draw(dtype, device)
    given = []
    for block in blocks:
        N, H, W = _QUANTIZED_SIZE
        x = draw.images(N, channels, H, W, scale=50 * stored.step)
        given.append((x, [block], stored, output))
        # A projection, if there is one, has as many filters.
        channels, stored = block.convs[-1].weight.size(0), Quantization(1.0)

    def by_library(cast: _Cast) -> list[Tensor]:
        return [cast(reference.float8_residual_blocks(*each)) for each in given]

    names = tuple(f"block {i}" for i in range(len(given)))
    return Case(
        lambda: [run(*each) for each in given], by_library, (_FLOAT8_FLOOR,) * len(given), names
    )


def quantized_blocks_of_all_kinds(
    dtype: torch.dtype, device: torch.device, run: Callable[..., Tensor]
) -> Case:
    """Blocks in eight bits for kernels that are compiled for no shape.

    Channels fill chunks of 16 bytes, of 4, and none; each with and without a projection.
    """
    draw = _Draw(dtype, device)

    def block(*layers: tuple[int, ...], projection: tuple[int, ...] = ()) -> QuantizedBlock:
        convs = [draw.bytes_layer(*layer) for layer in (*layers, projection) if layer]
        return QuantizedBlock(tuple(convs), bool(projection), 0.7)

    blocks = [
        block((32, 16), (16, 16, 3), (16, 32)),
        block((32, 16), (16, 16, 3, 2), (16, 96), projection=(32, 96, 1, 2)),
        block((96, 48, 3, 1, 3), (48, 96, 1)),
        block((96, 32), (32, 32, 3, 1, 4), (32, 96)),
        block((96, 20), (20, 20, 3), (20, 24), projection=(96, 24)),
        block((24, 9), (9, 9, 3), (9, 24)),
        block((24, 9), (9, 7), projection=(24, 7)),
    ]
    stored = Quantization(0.05, 77)
    return quantized_blocks(32, dtype, device, (blocks, stored, Quantization(0.03)), run)


def quantized_stems(dtype: torch.dtype, device: torch.device, run: Callable[..., Tensor]) -> Case:
    """A stem in eight bits, and one in sixteen."""
    draw = _Draw(dtype, device)
    pool = Pool((3, 3), (2, 2), (1, 1))
    layer = draw.bytes_layer(3, 24, 7, 2)
    upper, low = draw.bytes_layer(3, 24, 7, 2), draw.bytes_layer(6, 24, 7, 2)
    upper = upper._replace(weight=interleaved(torch.zeros_like(upper.weight), upper.weight))
    low = low._replace(shift=torch.zeros_like(low.shift), scale=low.scale / 256)
    given = [
        (QuantizedStem(layer, None, pool), Quantization(0.02, 110)),
        (QuantizedStem(upper, low, pool), Quantization(1e-4, WORD_ZERO_POINT)),
    ]
    x = draw.images(2, 3, 27, 25)
    output = Quantization(0.03)

    def by_library(cast: _Cast) -> list[Tensor]:
        return [cast(reference.quantized_stem(x, stem, stored, output)) for stem, stored in given]

    return Case(
        lambda: [run(x, stem, stored, output) for stem, stored in given],
        by_library,
        names=("eight bits", "sixteen bits"),
    )


# Norms, by the name of what runs them.


def norm(name: str, function: Callable[..., Any], like: Tensor) -> Case:
    """What a method of `Backend` for norms computes, of a small tensor that lies as `like` does."""
    return _NORMS[name](function, _NormInputs(like))


class _NormInputs:
    """Tensors for norms, which lie as an input does."""

    def __init__(self, like: Tensor) -> None:
        self.channels = like.size(1)
        pixels = like[:1, :1].numel()
        N, H, W = _NORM_SIZES[pixels % _MULTIPLE == 0]
        self.shape = (N, self.channels, H, W)
        self._last = not like.is_contiguous()
        self.draw = _Draw(like.dtype, like.device)
        self.input, self.residual, self.grad = self.tensor(), self.tensor(), self.tensor()
        self.norm = self.draw.norm(self.channels, torch.float32)
        self.count = N * H * W

    def tensor(self) -> Tensor:
        drawn = self.draw.values(*self.shape)
        return drawn.contiguous(memory_format=torch.channels_last) if self._last else drawn

    def sums(self) -> Sums:
        total, dot = (self.draw.values(self.channels, dtype=torch.float32) for _ in range(2))
        return Sums(total * 10, dot * 10, self.count)


def _inference(function: Callable[..., Any], given: _NormInputs) -> Case:
    arguments = (given.input, given.norm, given.residual, "relu")

    def by_library(cast: _Cast) -> list[Tensor]:
        x, norm, residual, activation = _all(cast, arguments)
        norm = _in(x.dtype, norm)
        return [reference.batch_norm_act_inference(x, *norm, residual, activation)]

    return Case(lambda: [function(*arguments)], by_library)


def _in(dtype: torch.dtype, norm: Norm) -> Norm:
    """A norm as torch's own kernels take it with an input: float32, or float64 with float64."""
    wanted = torch.float64 if dtype is torch.float64 else torch.float32
    return _all(lambda t: t.to(wanted) if isinstance(t, Tensor) else t, norm)


def _training(function: Callable[..., Any], given: _NormInputs) -> Case:
    arguments = (given.input, *given.norm[2:], given.residual, "relu")

    def by_library(cast: _Cast) -> list[Tensor]:
        return list(reference.batch_norm_act_training(*_all(cast, arguments)))

    return Case(lambda: list(function(*arguments)), by_library)


def _statistics(function: Callable[..., Any], given: _NormInputs) -> Case:
    return Case(
        lambda: list(function(given.input)),
        lambda cast: list(reference.batch_statistics(cast(given.input))),
    )


def _add_relu(function: Callable[..., Any], given: _NormInputs) -> Case:
    """With its mask, whose bits may differ where the sum is nearly zero."""
    norm = (None, None, *given.norm[2:])

    def by_kernel() -> list[Tensor]:
        out, mask, statistics, _ = function(given.input, norm, given.residual, None)
        return [out, *statistics, *([] if mask is None else [unpacked(mask, given.input)])]

    def by_library(cast: _Cast) -> list[Tensor]:
        arguments = (given.input, *given.norm[2:], given.residual, "relu")
        out, *statistics = reference.batch_norm_act_training(*_all(cast, arguments))
        found = [out, *statistics]
        if given.channels % 8 == 0 and given.input.is_contiguous(memory_format=torch.channels_last):
            found.append((out > 0).to(out.dtype))
        return found

    return Case(by_kernel, by_library, (0.0, 0.0, 0.0, 0.05))


def _add_relu_backward(function: Callable[..., Any], given: _NormInputs) -> Case:
    other = given.draw.norm(given.channels, torch.float32)
    output = torch.relu(given.tensor())

    def by_kernel() -> list[Tensor]:
        found = function(given.grad, output, given.input, given.norm, given.residual, other)
        return list(itertools.chain(*found))

    def by_library(cast: _Cast) -> list[Tensor]:
        found: list[Tensor] = []
        for x, norm in ((given.input, given.norm), (given.residual, other)):
            arguments = (given.grad, x, output, norm, "relu", True, (True, True, True, False))
            found += library.batch_norm_act_backward(*_all(cast, arguments))[:3]  # type: ignore[arg-type]
        return found

    return Case(by_kernel, by_library)


def _backward(function: Callable[..., Any], given: _NormInputs) -> Case:
    output = torch.relu(given.tensor())
    rest = ("relu", True, (True,) * 4)
    # Where the sign is computed again, it is that of the input.
    plain = given.draw.norm(given.channels, torch.float32, through_zero=True)
    calls = ((given.norm, output, rest), (plain, None, ("relu", True, (True, True, True, False))))

    def by_kernel() -> list[Tensor]:
        found = [function(given.grad, given.input, out, norm, *rest) for norm, out, rest in calls]
        return [t for t in itertools.chain(*found) if t is not None]

    def by_library(cast: _Cast) -> list[Tensor]:
        found: list[Tensor | None] = []
        for norm, out, rest in calls:
            out = torch.relu(given.input) if out is None else out
            arguments = (given.grad, given.input, out, norm, *rest)
            found += library.batch_norm_act_backward(*_all(cast, arguments))
        return [t for t in found if t is not None]

    return Case(by_kernel, by_library)


def _backward_sums(function: Callable[..., Any], given: _NormInputs) -> Case:
    output = torch.relu(given.tensor())
    leading = (given.grad, given.input, output)

    def by_library(cast: _Cast) -> list[Tensor]:
        arguments: tuple[Any, ...] = (*leading, *given.norm, "relu")
        return list(reference.batch_norm_act_backward_sums(*_all(cast, arguments)))

    return Case(lambda: list(function(*leading, given.norm, "relu")), by_library)


def _backward_input(function: Callable[..., Any], given: _NormInputs) -> Case:
    output, sums = torch.relu(given.tensor()), given.sums()
    leading = (given.grad, given.input, output)

    def by_library(cast: _Cast) -> list[Tensor]:
        arguments: tuple[Any, ...] = (*leading, *given.norm, "relu", *sums, True)
        found = reference.batch_norm_act_backward_input(*_all(cast, arguments))
        return [t for t in found if t is not None]

    return Case(lambda: list(function(*leading, given.norm, "relu", sums, True)), by_library)


def norm_and_pool(
    forward: Callable[..., Any], backward: Callable[..., Tensor], like: Tensor
) -> Case:
    """`batch_norm_relu_max_pool`, and its backward from the places that it kept."""
    given, pool = _NormInputs(like), ((3, 3), (2, 2), (1, 1))

    def by_kernel() -> list[Tensor]:
        pooled, offsets, *statistics = forward(given.input, *given.norm[2:], pool)
        ones = _weights_like(pooled)
        return [pooled, *statistics, backward(ones, offsets, given.shape[2:], pool)]

    def by_library(cast: _Cast) -> list[Tensor]:
        arguments = (given.input, *given.norm[2:], None, "relu")
        out, *statistics = reference.batch_norm_act_training(*_all(cast, arguments))
        # What is equal after rounding has its maximum in the first place: as the kernel rounds.
        rounded = out.to(given.input.dtype).to(out.dtype)
        pooled, indices = F.max_pool2d(rounded, *pool, return_indices=True)
        weights = _weights_like(pooled)
        flat = weights.new_zeros(*weights.shape[:2], out[0, 0].numel())
        flat.scatter_add_(2, indices.flatten(2), weights.flatten(2))
        return [pooled, *statistics, flat.view_as(out)]

    # A maximum may be elsewhere where two values are nearly the same.
    return Case(by_kernel, by_library, (0.0, 0.0, 0.0, 0.1))


def _weights_like(pooled: Tensor) -> Tensor:
    steps = torch.arange(pooled.numel(), device=pooled.device) % 7 + 1
    return steps.view(pooled.shape).to(pooled.dtype)


_NORMS: dict[str, Callable[[Callable[..., Any], _NormInputs], Case]] = {
    "batch_norm_act_inference": _inference,
    "batch_norm_act_training": _training,
    "batch_statistics": _statistics,
    "batch_norm_add_relu": _add_relu,
    "batch_norm_add_relu_backward": _add_relu_backward,
    "batch_norm_act_backward": _backward,
    "batch_norm_act_backward_sums": _backward_sums,
    "batch_norm_act_backward_input": _backward_input,
}


# Training's convolutions.


def training_convolution(
    problem: ConvProblem,
    has_prologue: bool,
    device: torch.device,
    run: Callable[..., Sequence[Tensor]],
) -> Case:
    """`run(input, weight, None, geometry, prologue)`: a convolution and its statistics."""
    draw = _Draw(dtype_of(problem.dtype), device)
    input = draw.images(problem.N, problem.C, problem.H, problem.W)
    weight, _, bias, *rest = draw.layer(problem)
    geometry: Any = rest
    prologue = draw.norm(problem.C, torch.float32) if has_prologue else None

    def by_library(cast: _Cast) -> list[Tensor]:
        x = cast(input)
        if prologue is not None:
            x = reference.batch_norm_act_inference(
                x, *_in(x.dtype, _all(cast, prologue)), None, "relu"
            )
        out = conv2d(x, cast(weight), None, *geometry)
        return [out, *reference.batch_statistics(out)]

    return Case(lambda: list(run(input, weight, bias, geometry, prologue)), by_library)


def input_gradient(
    problem: ConvProblem,
    ends: tuple[bool, bool, bool],
    device: torch.device,
    run: Callable[..., Sequence[Tensor]],
) -> Case:
    """`run(grad, weight, size, geometry, residual, above, below)`: a convolution's backward.

    `problem` is the transposed convolution. `ends` is whether a residual is added, and whether a
    norm is gone back through before it (whose sums are known) and behind it.
    """
    draw = _Draw(dtype_of(problem.dtype), device)
    grad = draw.images(problem.N, problem.C, problem.H, problem.W)
    padding = [
        dilation * (taps - 1) - around
        for dilation, taps, around in zip(
            problem.dilation, (problem.R, problem.S), problem.padding, strict=True
        )
    ]
    geometry = ((1, 1), padding, problem.dilation, 1)
    scale = (problem.C * problem.R * problem.S) ** -0.5
    weight = draw.images(problem.C, problem.K, problem.R, problem.S, scale=scale)
    size = (problem.P, problem.Q)
    shape = (problem.N, problem.K, *size)
    residual = draw.images(*shape) if ends[0] else None
    above = below = None
    if ends[1]:
        total, dot = (draw.values(problem.C, dtype=torch.float32) for _ in range(2))
        count = grad.numel() // problem.C
        norm = draw.norm(problem.C, torch.float32)
        above = (draw.images(*grad.shape), norm, Sums(total * 10, dot * 10, count))
    if ends[2]:
        below = (draw.images(*shape), draw.norm(problem.K, torch.float32, through_zero=True))

    def by_library(cast: _Cast) -> list[Tensor]:
        found = []
        g = cast(grad)
        if above is not None:
            raw, norm, sums = _all(cast, above)
            behind: tuple[Any, ...] = (g, raw, None, *norm, "none", *sums, False)
            g, _ = reference.batch_norm_act_backward_input(*behind)
            found.append(g)
        out = F.conv_transpose2d(g, cast(weight), None, 1, padding, 0, 1, problem.dilation)
        if residual is not None:
            out = out + cast(residual)
        if below is not None:
            tensor, norm = _all(cast, below)
            out = out * (tensor > 0)
            wide = out.to(norm.mean.dtype)
            total, dot = wide.sum((0, 2, 3)), (wide * tensor).sum((0, 2, 3))
            found += [total, dot, dot * (norm.var + norm.eps).rsqrt()]
        return [out, *found]

    def by_kernel() -> list[Tensor]:
        return list(run(grad, weight, size, geometry, residual, above, below))

    return Case(by_kernel, by_library)
