"""Which of this backend's kernels `self_check` is asked about, and what each is checked with."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...layers.description import ConvNorm, Norm, Pool, Sums
from ...layers.quantized import Quantization, QuantizedBlock
from ...tuning.choice import PAIR, Choice, Tile
from ...tuning.problem import ChainProblem, ConvProblem
from .. import check_cases, self_check
from ..self_check import Case, Family, settled
from .eligible import is_traced
from .lazy import launchers, stems, training_convolutions
from .problem import out_of_resources

if TYPE_CHECKING:
    from types import ModuleType

_NAME = "triton"
# What runs where the chosen kernel is not trusted.
_LIBRARY = Choice("library", None, "self-check")


def _let_through() -> tuple[type[Exception], ...]:
    return (out_of_resources(),)


def trusted(problem: ConvProblem, input: Tensor, activation: str, choice: Choice) -> Choice:
    """`choice`, or the library where that is a kernel of this backend that turned out to be wrong.

    Args:
        problem: a convolution, with a pool or without.
        input: its input.
        activation: see `layers/activation.py`.
        choice: what `tuning` said.
    """
    tile, device = choice.tile, input.device
    if choice.kernel != _NAME or is_traced(input):
        return choice
    assert tile is not None
    launch, folded = launchers().launch, launchers().folded
    call = (problem, activation, choice, folded.surroundings(), device)
    in_row, shares = launch.is_in_row(input), folded.is_shared()

    def family() -> Family:
        kernel = _described(problem, tile, activation, in_row, shares)
        return Family(_NAME, kernel, problem.dtype)

    def case() -> Case:
        small = check_cases.smaller(problem, tile.block_m)
        conv, stem = launchers(), stems()

        def run(x: Tensor, layer: ConvNorm, residual: Tensor | None, act: str) -> Tensor:
            with _row(in_row), _shared(shares, x, [layer]):
                if in_row:  # so that what is compared may have begun before this ended
                    conv.conv_bn_act(x, layer, residual, act, tile, None, small)
                return conv.conv_bn_act(x, layer, residual, act, tile, None, small)

        def run_with_pool(x: Tensor, layer: ConvNorm, act: str, _: Pool) -> Tensor:
            return stem.conv_bn_act_max_pool(x, layer, act, tile)

        if problem.pool is None:
            return check_cases.convolution(small, activation, device, run)
        return check_cases.convolution_and_pool(small, activation, device, run_with_pool)

    return choice if self_check.trusts(call, device, family, case, _let_through) else _LIBRARY


def trusts_prologue(problem: ConvProblem, input: Tensor, activation: str, tile: Tile) -> bool:
    """Whether the convolution with a norm in its loads may run."""
    device = input.device

    def family() -> Family:
        kernel = _described(problem, tile, activation, False)
        return Family(_NAME, f"norm and {kernel}", problem.dtype)

    def case() -> Case:
        small = check_cases.smaller(problem, tile.block_m)

        def run(x: Tensor, before: Norm, layer: ConvNorm, *rest: Any) -> Tensor:
            table = training_convolutions().table_of(before)
            return launchers().conv_bn_act(x, layer, *rest, tile, table)

        return check_cases.normalised_convolution(small, activation, device, run)

    call = ("prologue", problem, activation, tile, device)
    return self_check.trusts(call, device, family, case, _let_through)


def trusts_chain(problem: ChainProblem, input: Tensor, choice: Choice, chains: ModuleType) -> bool:
    """Whether a chain, or a pair, may run as chosen; `chains` is that file."""
    device = input.device
    launch, folded = launchers().launch, launchers().folded
    in_row, shares = launch.is_in_row(input), folded.is_shared()

    def family() -> Family:
        parts = [f"{choice.kernel} of width {problem.width} to {problem.K}"]
        convolution = problem.convolution
        parts += [] if choice.kernel == PAIR else _geometry(convolution)
        if problem.projection is not None:
            parts.append(f"projection of {problem.projection[0]} stride {problem.projection[3:]}")
        if problem.next_width:
            parts.append(f"next {problem.next_width}")
        parts += _surroundings(in_row, shares)
        return Family(_NAME, ", ".join([*parts, str(choice.tile)]), problem.dtype)

    def case() -> Case:
        assert choice.tile is not None
        small = check_cases.smaller_chain(problem, choice.tile.block_m)

        def run(reduced: Tensor, x: Tensor, layers: Sequence[ConvNorm | None]) -> Any:
            given = [layer for layer in layers if layer is not None]
            with _row(in_row), _shared(shares, x, given):
                return chains.run(reduced, x, layers, small, choice)

        return check_cases.chain(small, device, run)

    call = (problem, choice, folded.surroundings(), device)
    return self_check.trusts(call, device, family, case, _let_through)


def trusts_folding(mean: Tensor) -> bool:
    """Whether one launch may fold all norms of a pass; `mean` is one's, and says of which dtype."""
    device, dtype = mean.device, mean.dtype
    call = ("folding", dtype, device)
    if settled.get(call):
        return True

    def case() -> Case:
        return check_cases.folded_norms(dtype, device, launchers().folded.table)

    family = Family(_NAME, "norms folded in one launch", _dtype_name(mean))
    return self_check.trusts(call, device, lambda: family, case, _let_through)


def trusts_norm(function: Callable[..., Any], input: Tensor) -> bool:
    """Whether the kernels behind one of this backend's functions for norms may run."""
    device = input.device
    if is_traced(input):
        return True
    name, is_contiguous = function.__name__, input.is_contiguous()

    def family() -> Family:
        layout = "contiguous" if is_contiguous else "channels_last"
        return Family(_NAME, f"{name}, {layout}", _dtype_name(input))

    def case() -> Case:
        return check_cases.norm(name, function, input)

    call = (function, input.dtype, is_contiguous, device)
    return self_check.trusts(call, device, family, case, _let_through)


def trusts_norm_and_pool(forward: Any, backward: Any, input: Tensor) -> bool:
    """Likewise of a norm and a max-pool behind it, and of their backward."""
    device = input.device

    def case() -> Case:
        return check_cases.norm_and_pool(forward, backward, input)

    call = (forward, input.dtype, device)
    family = Family(_NAME, forward.__name__, _dtype_name(input))
    return self_check.trusts(call, device, lambda: family, case, _let_through)


def trusts_training(
    problem: ConvProblem, has_prologue: bool, tile: Tile, device: torch.device
) -> bool:
    """Whether a convolution with its statistics may run in training."""

    def family() -> Family:
        before = "norm and " if has_prologue else ""
        kernel = _described(problem, tile, "statistics", False)
        return Family(_NAME, f"training: {before}{kernel}", problem.dtype)

    def case() -> Case:
        small = check_cases.smaller(problem, tile.block_m)

        def run(*arguments: Any) -> Sequence[Tensor]:
            return training_convolutions().forward(*arguments, tile)

        return check_cases.training_convolution(small, has_prologue, device, run)

    call = (problem, has_prologue, tile, device)
    return self_check.trusts(call, device, family, case, _let_through)


def trusts_input_gradient(
    problem: ConvProblem, ends: tuple[bool, bool, bool], tile: Tile, device: torch.device
) -> bool:
    """Whether a convolution's backward may run; for `ends` see `check_cases.input_gradient`."""

    def family() -> Family:
        words = ("residual", "norm behind it", "norm before it")
        with_ = [word for word, is_there in zip(words, ends, strict=True) if is_there]
        kernel = _described(problem, tile, "none", False)
        return Family(_NAME, ", ".join([f"gradient of {kernel}", *with_]), problem.dtype)

    def case() -> Case:
        small = check_cases.smaller(problem, tile.block_m)
        training = training_convolutions()

        def run(
            grad: Tensor, weight: Tensor, size: Any, geometry: Any, residual: Tensor | None,
            above: tuple[Tensor, Norm, Sums] | None, below: tuple[Tensor, Norm] | None,
        ) -> list[Tensor]:  # fmt: skip
            ends = training.Ends(residual, None, above, below)
            out, side, sums = training.backward_input(grad, weight, size, geometry, ends, tile)
            return [out, *([] if side is None else [side]), *(sums or ())]

        return check_cases.input_gradient(small, ends, device, run)

    call = (problem, ends, tile, device)
    return self_check.trusts(call, device, family, case, _let_through)


def trusts_quantized(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
    run: Callable[..., Tensor],
) -> bool:
    """Whether `run`, the kernels for residual blocks in int8 or float8_e4m3fn, may run."""
    device, channels = input.device, input.size(1)
    is_exact = blocks[0].convs[0].weight.dtype == torch.int8
    # Whatever a kernel is compiled for.
    shapes = tuple(
        (conv.weight.shape, tuple(conv.stride), tuple(conv.padding), tuple(conv.dilation))
        for block in blocks
        for conv in block.convs
    )
    kind = "eight bits" if is_exact else "float8_e4m3fn"
    call = (kind, channels, shapes, input.dtype, device)

    def family() -> Family:
        digest = hashlib.sha256(repr(call[:4]).encode()).hexdigest()[:8]
        filters = blocks[-1].convs[-1].weight.size(0)
        kernel = f"{kind}, {len(blocks)} blocks of {channels} to {filters}, {digest}"
        return Family(_NAME, kernel, _dtype_name(input))

    def case() -> Case:
        arguments = (blocks, stored, output)
        make = check_cases.quantized_blocks if is_exact else check_cases.float8_blocks
        return make(channels, input.dtype, device, arguments, run)

    return self_check.trusts(call, device, family, case, _let_through)


def _described(
    problem: ConvProblem, tile: Tile, activation: str, in_row: bool, shares: bool = False
) -> str:
    """What makes a compiler generate code of its own for a convolution, sizes aside."""
    parts = ["convolution" if problem.pool is None else "convolution and pool"]
    parts += _geometry(problem)
    if problem.groups > 1:
        channels = (problem.C // problem.groups, problem.K // problem.groups)
        parts.append("groups of {} to {}".format(*channels))
    if problem.C // problem.groups % tile.block_k:
        parts.append("ragged depth")
    parts += ["residual"] if problem.residual else []
    parts += [] if activation == "relu" else [f"then {activation}"]
    parts += _surroundings(in_row, shares)
    return ", ".join([*parts, str(tile)])


def _surroundings(in_row: bool, shares: bool) -> list[str]:
    return ["in a row"] * in_row + ["norms folded before"] * shares


def _geometry(problem: ConvProblem) -> list[str]:
    parts = [f"{problem.R}x{problem.S}"]
    for name, pair, usual in (
        ("stride", problem.stride, (1, 1)),
        ("padding", problem.padding, (problem.R // 2, problem.S // 2)),
        ("dilation", problem.dilation, (1, 1)),
    ):
        if pair != usual:
            parts.append("{} {}x{}".format(name, *pair))
    return parts


def _dtype_name(input: Tensor) -> str:
    return str(input.dtype).removeprefix("torch.")


def _shared(
    shares: bool, input: Tensor, layers: Sequence[ConvNorm]
) -> AbstractContextManager[None]:
    if not shares:
        return contextlib.nullcontext()
    return launchers().folded.shared(input, layers, lasting=False)


def _row(in_row: bool) -> AbstractContextManager[None]:
    return launchers().launch.in_a_row() if in_row else contextlib.nullcontext()
