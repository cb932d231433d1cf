"""Bottlenecks in one launch each on Hopper: csrc/cuda/hopper/hopper_bottleneck.cuh.

Of both GPU backends, where a table says so: no GPU has measured the kernel, no model chooses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes

from .. import _native, tuning
from ..layers.memory import lies_channels_last
from ..tuning import architecture, chain, cuda_tiles
from ..tuning.choice import HOPPER_CHAIN, HOPPER_CHAINS, Choice, Tile
from ..tuning.problem import ChainProblem
from . import arranged, check_cases, self_check
from .self_check import Case, Family

if TYPE_CHECKING:
    import torch

    from ..layers.description import Block, ConvNorm

Convolve = Callable[..., Tensor]
"""A backend's `conv_bn_act`."""

_CAPABILITY = (9, 0)


def residual_blocks(input: Tensor, blocks: Sequence[Block], convolve: Convolve) -> Tensor | None:
    """Residual blocks of which `tuning` chose this kernel for some; see `ops.residual_blocks`.

    Returns:
        None where it chose it for none.
    """
    if (
        type(input) not in (Tensor, Parameter)
        or architecture.of_device(input.device).capability != _CAPABILITY
        or not any(map(chain.has_chain, blocks))
    ):
        return None
    with _disable_current_modes():  # nothing that a plan of this pass would have to do
        problems = chain.problems_of(input, blocks)
    if problems is None:
        return None
    choices = [None if one is None else tuning.choose(one, input.device) for one in problems]
    if not any(choice is not None and choice.kernel in HOPPER_CHAINS for choice in choices):
        return None
    x, reduced = input, None
    for index, (block, problem, choice) in enumerate(zip(blocks, problems, choices, strict=True)):
        first, *rest = block.main
        if reduced is None:
            reduced = convolve(x, first, None, "relu")
        chained = None
        if problem is not None and choice is not None and choice.kernel in HOPPER_CHAINS:
            following = blocks[index + 1].layers[0] if problem.next_width else None
            layers = (*rest, block.projection, following)
            chained = run(reduced, x, layers, problem, choice, convolve)
        if chained is None:
            shortcut = _shortcut(x, block.projection, convolve)
            for layer in rest[:-1]:
                reduced = convolve(reduced, layer, None, "relu")
            chained = convolve(reduced, rest[-1], shortcut, "relu"), None
        x, reduced = chained
    return x if lies_channels_last(input, blocks) else x.contiguous()


def run(
    reduced: Tensor,
    x: Tensor,
    layers: Sequence[ConvNorm | None],
    problem: ChainProblem,
    choice: Choice,
    convolve: Convolve,
) -> tuple[Tensor, Tensor | None] | None:
    """A block from its second convolution on, a projection in a launch before.

    Args:
        reduced: the output of its first convolution.
        x: its input.
        layers: its 3x3, its last 1x1, its projection or None, and the next block's first
            convolution or None.
        problem: what `tuning` calls it.
        choice: one of `cuda_tiles.hopper_chains`.
        convolve: what runs the projection.

    Returns:
        Its output, and where the choice has it the next block's convolution's; or None where the
        kernel may not run.
    """
    window, expand, projection, following = layers
    assert window is not None
    assert expand is not None
    assert choice.tile is not None
    if choice.kernel != HOPPER_CHAIN:
        problem, following = problem.without_next(), None
    if type(reduced) not in (Tensor, Parameter) or not trusts(problem, choice.tile, reduced.device):
        return None
    shortcut = _shortcut(x, projection, convolve)
    return bottleneck(reduced, shortcut, (window, expand, following), choice.tile)


def bottleneck(
    input: Tensor, shortcut: Tensor, layers: Sequence[ConvNorm | None], tile: Tile
) -> tuple[Tensor, Tensor | None]:
    """One launch: see csrc/cuda/hopper/hopper_bottleneck.cuh for the formula and the traffic.

    Args:
        input: (N, width, H, W), float16 or bfloat16, on a GPU of compute capability 9.0.
        shortcut: (N, K, P, Q), what is added to the output before its ReLU.
        layers: a convolution of `width` channels to as many, a 1x1 to K, and a 1x1 behind the
            output or None.
        tile: one of `cuda_tiles.hopper_chain_tiles`.

    Returns:
        (N, K, P, Q), and of the last layer (N, next width, P, Q) or None, both channels_last.
    """
    window, expand, following = layers
    assert window is not None
    assert expand is not None
    next_width = 0 if following is None else following.weight.size(0)
    index = cuda_tiles.hopper_chain_instances(window.weight.size(0), next_width)[tile]
    absent = (None, None, None, None, None, 0.0, None)
    output, next_input = _operator()(
        input, shortcut, arranged.rows_of(window.weight).permute(0, 3, 1, 2), *window.norm,
        window.bias, *window.stride, *window.padding, *window.dilation, expand.weight,
        *expand.norm, expand.bias,
        *(absent if following is None else (following.weight, *following.norm, following.bias)),
        index,
    )  # fmt: skip
    return output, None if following is None else next_input


def trusts(problem: ChainProblem, tile: Tile, device: torch.device) -> bool:
    """Whether the kernel may run: see `self_check`."""

    def family() -> Family:
        follows = f", next {problem.next_width}" if problem.next_width else ""
        kernel = f"bottleneck of width {problem.width} to {problem.K}{follows}, {tile}"
        return Family("cuda", kernel, problem.dtype)

    def case() -> Case:
        small = check_cases.smaller_chain(replace(problem, projection=None), tile.block_m)

        def kernel(reduced: Tensor, x: Tensor, layers: Sequence[Any]) -> Any:
            window, expand, _, following = layers
            return bottleneck(reduced, x, (window, expand, following), tile)

        return check_cases.chain(small, device, kernel)

    call = ("bottleneck", replace(problem, N=0, projection=None), tile, device)
    return self_check.trusts(call, device, family, case)


def _shortcut(x: Tensor, projection: ConvNorm | None, convolve: Convolve) -> Tensor:
    return x if projection is None else convolve(x, projection, None, "none")


@functools.cache
def _operator() -> Any:
    assert _native.cuda_operators is not None
    return _native.cuda_operators.hopper_bottleneck.default


def forget_operators() -> None:
    """Lets go of the operators, for `run_on_host`."""
    _operator.cache_clear()
    cuda_tiles.hopper_chain_instances.cache_clear()
