"""The problem that a convolution is to `tuning`, and the tile it runs with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from ... import tuning
from ...tuning.choice import Choice, Tile
from ...tuning.estimate import special_tiles
from ...tuning.problem import ConvProblem, Problem
from ..library import precision

Result = TypeVar("Result")

# For the interpreter, whose time goes by the number of operations.
_INTERPRETED = Choice("triton", Tile(128, 256, 256, 1, 4, 1), "interpreted")


def choose(problem: ConvProblem, device: torch.device) -> Choice:
    """Which kernel and tile run a problem: what `tuning` says, on a GPU."""
    if device.type != "cuda":
        return _INTERPRETED
    return tuning.choose(problem, device)


def run_chosen(
    problem: Problem, device: torch.device, choice: Choice, run: Callable[[Choice], Result]
) -> Result:
    """`run(choice)`; where that asks for more than there is, what `tuning` says then.

    Triton says so when it loads a kernel, before that is launched.
    """
    while True:
        try:
            return run(choice)
        except out_of_resources() as error:
            if choice.tile is None:
                raise
            tuning.leave_out(problem, device, choice, str(error))
            choice = tuning.choose(problem, device)


def out_of_resources() -> type[Exception]:
    """What Triton raises then; only asked for when something was raised."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def chosen_tile(problem: ConvProblem, device: torch.device) -> Tile:
    """The chosen tile; the estimate's where the choice is a kernel that graphs cannot hold."""
    choice = choose(problem, device)
    return choice.tile if choice.kernel == "triton" else tuning.untuned_tile(problem, device)


def tile_for(problem: ConvProblem, tile: Tile) -> Tile:
    """`tile` as the problem's kernel takes it: no wider than a group, or one of its own."""
    if special := special_tiles(problem):
        return tile if tile in special else special[0]
    if problem.groups == 1:
        return tile
    group_k = problem.K // problem.groups
    block_n = min(tile.block_n, max(16, 1 << (group_k - 1).bit_length()))
    return replace(tile, block_n=block_n)


def problem_of(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: bool,
    pool: Sequence[int] | None = None,
) -> ConvProblem:
    """A call as `tuning` sees it; symbolic sizes stand for the values they were traced with."""
    dtype = _TF32 if precision(input) == "tf32" else input.dtype
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    if type(input) not in (Tensor, Parameter):
        return _problem(input.shape, weight.shape, geometry, dtype, residual, pool)
    key = (input.shape, weight.shape, geometry, dtype, residual, pool)
    found = _problems.get(key)
    if found is None:
        if len(_problems) >= _MOST_PROBLEMS:
            _problems.clear()
        found = _problems[key] = _problem(*key)
    return found


_TF32 = "tfloat32"
# By what they are made of.
_problems: dict[tuple[Any, ...], ConvProblem] = {}
_MOST_PROBLEMS = 4096


def _problem(
    shape: Sequence[int],
    weight_shape: Sequence[int],
    geometry: tuple[Any, ...],
    dtype: torch.dtype | str,
    residual: bool,
    pool: Sequence[int] | None,
) -> ConvProblem:
    N, C, H, W = map(hint_of, shape)
    K, _, R, S = weight_shape
    name = str(dtype).removeprefix("torch.")
    windows = None if pool is None else tuple(pool)
    return ConvProblem(N, C, H, W, K, R, S, *geometry, name, residual, windows)


def hint_of(size: int | torch.SymInt) -> int:
    """A size as a number; of a symbolic one, an example, on which nothing may depend but speed."""
    if isinstance(size, torch.SymInt):
        hint = size.node.hint
        return 1 if hint is None else int(hint)
    return size


def ceil_div(count: int, size: int) -> int:
    """How many of `size` hold `count`; `triton.cdiv` takes eight calls for it."""
    return (count + size - 1) // size
