"""Convolutions and norms with known statistics: which kernel runs them, or the library."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from ... import tuning
from ...layers.activation import PLAIN
from ...layers.description import ConvNorm, Norm, Pool
from ...tuning import architecture
from ...tuning import prologue as prologue_choice
from ...tuning.choice import ESTIMATE, PROLOGUE, TILED, Choice, Tile
from ...tuning.estimate import kernel_for
from ...tuning.problem import ConvProblem
from .. import cuda, cudnn, library
from ..self_check import settled
from . import checks
from . import problem as problems
from .eligible import can_normalize, can_run, is_traced
from .lazy import graph_operators, launchers, norms, stems, training_convolutions
from .problem import out_of_resources, problem_of, run_chosen


def conv_bn_act(input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str) -> Tensor:
    """One launch (two where the sum is split): see `conv_kernels.py` for formula and traffic."""
    weight, norm, bias, stride, padding, dilation, groups = layer
    if can_run(input, weight, *norm[:4], bias, residual):
        problem = problem_of(input, weight, stride, padding, dilation, groups, residual is not None)
        run = functools.partial(_run, input, layer, residual, activation, problem)
        return run_chosen(problem, input.device, problems.choose(problem, input.device), run)
    return library.conv_bn_act(input, layer, residual, activation)


def _run(
    input: Tensor,
    layer: ConvNorm,
    residual: Tensor | None,
    activation: str,
    problem: ConvProblem,
    choice: Choice,
) -> Tensor:
    """`conv_bn_act` as chosen."""
    shared = launchers()
    where = (shared.launch.open_row.get() is None, shared.folded.current.get() is None)
    if not settled.get((problem, activation, choice, where, input.device)):
        choice = checks.trusted(problem, input, activation, choice)
    if choice.kernel in TILED and is_traced(input):
        operator = graph_operators().triton_conv_bn_act
        return operator(input, *layer.flat(), residual, activation)
    if choice.kernel == "triton":
        launch = launchers().conv_bn_act
        return launch(input, layer, residual, activation, choice.tile, None, problem)
    if choice.kernel == "cuda":
        return cuda.conv_bn_act(input, layer, residual, activation, choice.tile)
    is_narrow = residual is not None and residual.size(1) < layer.weight.size(0)
    if choice.kernel.startswith("cudnn") and not is_narrow and not is_traced(input):
        return cudnn.conv_bn_act(input, layer, residual, activation)
    return library.conv_bn_act(input, layer, residual, activation)


def norm_conv_bn_act(
    input: Tensor, before: Norm, layer: ConvNorm, residual: Tensor | None, activation: str
) -> Tensor:
    """The norm in the convolution's loads where that is predicted to be faster than before it."""
    weight, norm, bias, stride, padding, dilation, groups = layer
    tile = None
    if (
        groups == 1
        and not is_traced(input)
        and input.numel() > 0
        and can_run(input, weight, *before[:4], *norm[:4], bias, residual)
    ):
        problem = problem_of(input, weight, stride, padding, dilation, groups, residual is not None)
        tile = _prologue_tile(problem, input.device)
    if tile is not None:
        try:
            if settled.get(
                ("prologue", problem, activation, tile, input.device)
            ) or checks.trusts_prologue(problem, input, activation, tile):
                table = training_convolutions().table_of(before)
                return launchers().conv_bn_act(input, layer, residual, activation, tile, table)
        except out_of_resources() as error:
            choice = Choice(PROLOGUE, tile, ESTIMATE)
            tuning.leave_out(problem, input.device, choice, str(error))
    normalised = batch_norm_act_inference(input, before, None, "relu")
    return conv_bn_act(normalised, layer, residual, activation)


def _prologue_tile(problem: ConvProblem, device: torch.device) -> Tile | None:
    if device.type == "cuda":
        tile = prologue_choice.choose(problem, architecture.of_device(device))[0]
        return None if tuning.is_left_out(problem, device, PROLOGUE, tile) else tile
    return training_convolutions().INTERPRETED_TILE if kernel_for(problem) == "conv" else None


def conv_bn_act_max_pool(input: Tensor, layer: ConvNorm, activation: str, pool: Pool) -> Tensor:
    """One launch for a stem with its usual pool, else the convolution and the library's pool.

    The usual stem is the CUDA backend's, where that is built: predicted to take a third of the time
    of the kernel here, which has no way to load overlapping windows from shared memory.
    """
    weight, norm, bias, stride, padding, dilation, groups = layer
    if can_run(input, weight, *norm[:4], bias):
        windows = tuple(itertools.chain(*pool))
        problem = problem_of(input, weight, stride, padding, dilation, groups, False, windows)
        # It applies the activation to maxima, which is the same of none that falls anywhere.
        if kernel_for(problem) == "stem_pool" and activation in PLAIN:
            if (output := _in_cuda(input, layer, activation, pool, problem)) is not None:
                return output
            run = functools.partial(_run_with_pool, input, layer, activation, pool, problem)
            return run_chosen(problem, input.device, problems.choose(problem, input.device), run)
        return torch.max_pool2d(conv_bn_act(input, layer, None, activation), *pool)
    return library.conv_bn_act_max_pool(input, layer, activation, pool)


def _in_cuda(
    input: Tensor, layer: ConvNorm, activation: str, pool: Pool, problem: ConvProblem
) -> Tensor | None:
    """The usual stem on the CUDA backend's kernel; None where there is none, or a table is better.

    A table says what was measured, of the kernels that `tune` times.
    """
    if input.device.type != "cuda" or is_traced(input) or cuda.available() != "yes":
        return None
    if problems.choose(problem, input.device).source != ESTIMATE:
        return None
    return cuda.usual_stem(input, layer, activation, pool)


def _run_with_pool(
    input: Tensor,
    layer: ConvNorm,
    activation: str,
    pool: Pool,
    problem: ConvProblem,
    choice: Choice,
) -> Tensor:
    """`conv_bn_act_max_pool` of a stem as chosen."""
    shared = launchers()
    where = (shared.launch.open_row.get() is None, shared.folded.current.get() is None)
    if not settled.get((problem, activation, choice, where, input.device)):
        choice = checks.trusted(problem, input, activation, choice)
    if choice.kernel == "triton" and is_traced(input):
        operator = graph_operators().triton_conv_bn_act_max_pool
        return operator(input, *layer.flat()[:-1], activation)
    if choice.kernel == "triton":
        return stems().conv_bn_act_max_pool(input, layer, activation, choice.tile)
    return library.conv_bn_act_max_pool(input, layer, activation, pool)


def batch_norm_act_inference(
    input: Tensor, norm: Norm, residual: Tensor | None, activation: str
) -> Tensor:
    """Everything in one pass."""
    if can_normalize(input, *norm[:4], residual) and (
        settled.get((batch_norm_act_inference, input.dtype, input.is_contiguous(), input.device))
        or checks.trusts_norm(batch_norm_act_inference, input)
    ):
        return norms().batch_norm_act_inference(input, norm, residual, activation)
    return library.batch_norm_act_inference(input, norm, residual, activation)
