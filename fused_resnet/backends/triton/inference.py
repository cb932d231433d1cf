"""Convolutions and norms with known statistics: which kernel runs them, or the library."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...tuning import architecture
from ...tuning import prologue as prologue_choice
from ...tuning.choice import TILED, Choice, Tile
from ...tuning.estimate import kernel_for
from .. import cuda, cudnn, library
from . import problem as problems
from .eligible import can_normalize, can_run, is_traced
from .lazy import graph_operators, launchers, norms, stems, training_convolutions
from .problem import problem_of


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """One launch (two where the sum is split): see `conv_kernels.py` for formula and traffic."""
    arguments = (
        input,
        weight,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        eps,
        bias,
        stride,
        padding,
        dilation,
        groups,
        residual,
        activation,
    )
    tensors = (input, weight, running_mean, running_var, bn_weight, bn_bias, bias, residual)
    if can_run(*tensors):
        problem = problem_of(input, weight, stride, padding, dilation, groups, residual is not None)
        run = functools.partial(_run, arguments)
        return problems.run_chosen(problem, input.device, run, problems.choose)
    return library.conv_bn_act(*arguments)


def _run(arguments: tuple[Any, ...], choice: Choice) -> Tensor:
    """`conv_bn_act` as chosen."""
    input, weight, residual = arguments[0], arguments[1], arguments[12]
    if choice.kernel in TILED and is_traced(input):
        return graph_operators().triton_conv_bn_act(*arguments)
    if choice.kernel == "triton":
        return launchers().conv_bn_act(*arguments, tile=choice.tile)
    if choice.kernel == "cuda":
        return cuda.conv_bn_act(*arguments, tile=choice.tile)
    is_narrow = residual is not None and residual.size(1) < weight.size(0)
    if choice.kernel.startswith("cudnn") and not is_narrow and not is_traced(input):
        return cudnn.conv_bn_act(*arguments)
    return library.conv_bn_act(*arguments)


def norm_conv_bn_act(
    input: Tensor,
    in_mean: Tensor,
    in_var: Tensor,
    in_weight: Tensor | None,
    in_bias: Tensor | None,
    in_eps: float,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """The norm in the convolution's loads where that is predicted to be faster than before it."""
    norm = (in_mean, in_var, in_weight, in_bias)
    behind = (running_mean, running_var, bn_weight, bn_bias)
    geometry = (stride, padding, dilation)
    tile = None
    if (
        groups == 1
        and not is_traced(input)
        and input.numel() > 0
        and can_run(input, weight, *norm, *behind, bias, residual)
    ):
        tile = _prologue_tile(input, weight, *geometry, residual is not None)
    rest = (*behind, eps, bias, *geometry, groups, residual, activation)
    if tile is None:
        normalised = batch_norm_act_inference(input, *norm, in_eps, None, "relu")
        return conv_bn_act(normalised, weight, *rest)
    training = training_convolutions()
    table = training.table_of(training.Norm(*norm, in_eps))
    return launchers().conv_bn_act(input, weight, *rest, tile=tile, table=table)


def _prologue_tile(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    residual: bool,
) -> Tile | None:
    problem = problem_of(input, weight, stride, padding, dilation, 1, residual)
    if input.device.type == "cuda":
        return prologue_choice.choose(problem, architecture.of_device(input.device))[0]
    return training_convolutions().INTERPRETED_TILE if kernel_for(problem) == "conv" else None


def conv_bn_act_max_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """One launch for a stem with its usual pool, else the convolution and the library's pool."""
    leading = (input, weight, running_mean, running_var, bn_weight, bn_bias, eps, bias)
    geometry = (stride, padding, dilation)
    pools = (pool_kernel_size, pool_stride, pool_padding)
    pool = tuple(number for pair in pools for number in pair)
    if can_run(input, weight, running_mean, running_var, bn_weight, bn_bias, bias):
        problem = problem_of(input, weight, *geometry, groups, False, pool)
        if kernel_for(problem) == "stem_pool":
            arguments = (*leading, *geometry, activation)

            def run(choice: Choice) -> Tensor:
                if choice.kernel != "triton":
                    return library.conv_bn_act_max_pool(*arguments[:-1], groups, activation, *pools)
                if is_traced(input):
                    return graph_operators().triton_conv_bn_act_max_pool(*arguments)
                return stems().conv_bn_act_max_pool(*arguments, tile=choice.tile)

            return problems.run_chosen(problem, input.device, run, problems.choose)
        else:
            out = conv_bn_act(*leading, *geometry, groups, None, activation)
            return torch.max_pool2d(out, *pools)
    return library.conv_bn_act_max_pool(*leading, *geometry, groups, activation, *pools)


def batch_norm_act_inference(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """Everything in one pass."""
    arguments = (input, running_mean, running_var, weight, bias, eps, residual, activation)
    if can_normalize(input, running_mean, running_var, weight, bias, residual):
        return norms().batch_norm_act_inference(*arguments)
    return library.batch_norm_act_inference(*arguments)
