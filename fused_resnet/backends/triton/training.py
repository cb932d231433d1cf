"""Training's norms and convolutions: which kernel runs them, or the library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...layers.description import Norm, Sums
from ...layers.memory import contiguous_like_eager
from ...tuning import architecture
from ...tuning import training as training_choice
from ...tuning.choice import ESTIMATE, Choice, Tile
from ...tuning.problem import ConvProblem
from .. import library, self_check
from ..backend import Gradients, NormGradients, NormSums, UnfoundNorm
from ..self_check import settled
from . import checks
from .eligible import can_normalize, can_train, is_channels_last
from .lazy import norms, stems, training_convolutions
from .problem import out_of_resources, problem_of

# What `tuning.leave_out` calls a convolution: by whether a norm is before it; and its gradient, by
# whether it has come through one (above), and whether it goes through one (below).
_FORWARD = {False: "training convolution", True: "training convolution behind a norm"}
_BACKWARD = {
    (above, below): "gradient of a convolution" + " behind a norm" * above + " before one" * below
    for above in (False, True)
    for below in (False, True)
}


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics in one pass, everything else in another: see `norm.py`."""
    arguments = (input, weight, bias, eps, residual, activation)
    if can_normalize(input, weight, bias, residual) and (
        settled.get((batch_norm_act_training, input.dtype, input.is_contiguous(), input.device))
        or checks.trusts_norm(batch_norm_act_training, input)
    ):
        return norms().batch_norm_act_training(*arguments)
    return library.batch_norm_act_training(*arguments)


def batch_norm_add_relu(
    input: Tensor, norm: UnfoundNorm, residual: Tensor, residual_norm: UnfoundNorm | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None:
    """Norm, shortcut with or without a norm, and ReLU in one pass: see `norm.py`.

    Returns:
        What is returned there, or None where the kernel cannot be had.
    """
    others = (*norm[:4], residual, *(residual_norm or ())[:4])
    if not can_normalize(input, *others) or not (
        settled.get((batch_norm_add_relu, input.dtype, input.is_contiguous(), input.device))
        or checks.trusts_norm(batch_norm_add_relu, input)
    ):
        return None
    return norms().batch_norm_add_relu(input, norm, residual, residual_norm)


def batch_norm_add_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    norm: Norm,
    residual: Tensor,
    residual_norm: Norm,
) -> tuple[NormGradients, NormGradients] | None:
    """Behind two norms, their add and its ReLU: see `norm.py`.

    Returns:
        What is returned there, or None where the kernel cannot be had.
    """
    others = (grad, *norm[:4], residual, *residual_norm[:4])
    if not can_normalize(input, *others) or not (
        settled.get(
            (batch_norm_add_relu_backward, input.dtype, input.is_contiguous(), input.device)
        )
        or checks.trusts_norm(batch_norm_add_relu_backward, input)
    ):
        return None
    return norms().batch_norm_add_relu_backward(grad, output, input, norm, residual, residual_norm)


def batch_norm_act_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    training: bool,
    need: Sequence[bool],
    overwrite: bool = False,
) -> Gradients:
    """A pass that reduces and one that does not."""
    leading = (grad, input, output, norm, activation, training, need)
    if can_normalize(input, grad, output, *norm[:4]) and (
        settled.get((batch_norm_act_backward, input.dtype, input.is_contiguous(), input.device))
        or checks.trusts_norm(batch_norm_act_backward, input)
    ):
        return norms().batch_norm_act_backward(*leading, overwrite)
    return library.batch_norm_act_backward(*leading)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of this tensor, (C,), in the accumulation dtype."""
    if can_normalize(input) and (
        settled.get((batch_statistics, input.dtype, input.is_contiguous(), input.device))
        or checks.trusts_norm(batch_statistics, input)
    ):
        return norms().batch_statistics(input)
    return library.batch_statistics(contiguous_like_eager(input))


def batch_norm_act_backward_sums(
    grad: Tensor, input: Tensor, output: Tensor | None, norm: Norm, activation: str
) -> tuple[Tensor, Tensor]:
    """`sum(g)` and `sum(g (input - mean))`, g the gradient behind the activation, of this tensor.

    `output` may be None where there was no residual. Shapes (C,), in the accumulation dtype.
    """
    arguments = (grad, input, output, norm, activation)
    if can_normalize(input, grad, output, *norm[:4]) and (
        settled.get(
            (batch_norm_act_backward_sums, input.dtype, input.is_contiguous(), input.device)
        )
        or checks.trusts_norm(batch_norm_act_backward_sums, input)
    ):
        total, dot, _ = norms().batch_norm_act_backward_sums(*arguments)
        return total, dot
    return library.batch_norm_act_backward_sums(*arguments)


def batch_norm_act_backward_input(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    sums: Sums,
    need_residual: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of input and residual, from the sums and the count of the joint batch."""
    leading = (grad, input, output, norm, activation, sums, need_residual)
    if can_normalize(input, grad, output, *norm[:4]) and (
        settled.get(
            (batch_norm_act_backward_input, input.dtype, input.is_contiguous(), input.device)
        )
        or checks.trusts_norm(batch_norm_act_backward_input, input)
    ):
        return norms().batch_norm_act_backward_input(*leading, overwrite)
    return library.batch_norm_act_backward_input(*leading)


def batch_norm_relu_max_pool(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pool: Sequence[Sequence[int]],
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """`max_pool2d(relu(batch_norm(input)), *pool)` with batch statistics; see `stem.py`.

    Args:
        input: (N, C, H, W).
        weight: (C,) or None.
        bias: (C,) or None.
        eps: added to the variance.
        pool: kernel size, stride and padding, two numbers each.

    Returns:
        The pooled tensor, the place of each maximum in its window (uint8), mean and biased
        variance; or None where the kernel cannot be had.
    """
    if not can_normalize(input, weight, bias) or not is_channels_last(input):
        return None
    stem = stems()
    window, stride, padding = pool
    if (
        window[0] * window[1] > stem.MOST_POSITIONS
        or any(2 * before > taps for before, taps in zip(padding, window, strict=True))
        or min(stride) < 1
        or min(padding) < 0
        or min(stem.pooled_size(input.shape[2:], pool)) < 1
    ):
        return None  # some of which `max_pool2d` refuses
    if not (
        settled.get((batch_norm_relu_max_pool, input.dtype, input.device))
        or checks.trusts_norm_and_pool(
            batch_norm_relu_max_pool, max_pool_backward_from_offsets, input
        )
    ):
        return None
    return stem.batch_norm_relu_max_pool(input, weight, bias, eps, pool)


def max_pool_backward_from_offsets(
    grad: Tensor, offsets: Tensor, size: Sequence[int], pool: Sequence[Sequence[int]]
) -> Tensor:
    """The gradient of the pool's input, of (H, W) `size`, from the places of the maxima.

    `offsets` and `pool` are those of `batch_norm_relu_max_pool`.
    """
    return stems().max_pool_backward(grad, offsets, size, pool)


def conv_batch_norm_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[Any],
    prologue: Norm | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A convolution, and the mean and biased variance (K,) of its output, in one pass.

    Args:
        input: (N, C, H, W).
        weight: (K, C / groups, R, S).
        bias: (K,) or None.
        geometry: stride, padding and dilation, two numbers each, and groups.
        prologue: a norm that the input, and then through a ReLU, goes through first; or None.

    Returns:
        None where other means are predicted to be as fast, or cannot be had.
    """
    if not can_train(input, weight, bias, geometry[-1]):
        return None
    training, device = training_convolutions(), input.device
    normalises, tile = prologue is not None, training.INTERPRETED_TILE
    if device.type != "cuda" and not self_check.everywhere:
        return training.forward(input, weight, bias, geometry, prologue, tile)
    stride, padding, dilation, groups = geometry
    problem = problem_of(input, weight, stride, padding, dilation, groups, False)
    while True:
        if device.type == "cuda":
            gpu = architecture.of_device(device)
            left_out = tuning.left_out(problem, device, _FORWARD[normalises])
            tile = training_choice.forward(problem, normalises, gpu, left_out)[0]
        if tile is None:
            return None
        try:
            if not (
                settled.get((problem, normalises, tile, device))
                or checks.trusts_training(problem, normalises, tile, device)
            ):
                return None
            return training.forward(input, weight, bias, geometry, prologue, tile)
        except out_of_resources() as error:
            choice = Choice(_FORWARD[normalises], tile, ESTIMATE)
            tuning.leave_out(problem, device, choice, str(error))


def conv_backward_input(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    geometry: Sequence[Any],
    residual: Tensor | None,
    below: tuple[Tensor, Norm] | None,
    residual_mask: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None] | None:
    """A convolution's gradient in its input, and what would follow it.

    Args:
        grad: (N, K, P, Q), of the convolution's output.
        weight: (K, C / groups, R, S).
        size: (H, W) of its input.
        geometry: stride, padding and dilation, two numbers each, and groups.
        residual: to be added, of the input's shape; or None.
        below: a tensor and its batch norm, where the convolution's input is
            `relu(batch_norm(tensor))`; or None.
        residual_mask: what `batch_norm_add_relu` returned, if the residual is to be masked by it.

    Returns:
        The gradient, with `below` behind that norm, and then its sum, its sum with `tensor - mean`
        and that over `sqrt(var + eps)`. None as in `conv_batch_norm_statistics`.
    """
    training = training_convolutions()
    ends = training.Ends(residual, residual_mask, None, below)
    while True:
        found = _backward_tile(grad, weight, geometry, residual, below is not None)
        if found is None:
            return None
        try:
            result, _, sums = training.backward_input(grad, weight, size, geometry, ends, found[0])
            return result, sums
        except out_of_resources() as error:
            _leave_out(grad.device, found, str(error))


def conv_backward_input_runs(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    geometry: Sequence[Any],
    residual: Tensor | None,
) -> bool:
    """Whether `conv_backward_input` returns something; for arguments see there."""
    return _backward_tile(grad, weight, geometry, residual, False) is not None


def norm_conv_backward_input(
    grad: Tensor,
    output: Tensor,
    behind: tuple[Tensor, Norm],
    weight: Tensor,
    size: Sequence[int],
    geometry: Sequence[Any],
    below: tuple[Tensor, Norm],
) -> tuple[Tensor, NormSums, Tensor, Tensor, tuple[Tensor, Tensor]] | None:
    """`conv_backward_input` of a 1x1 convolution, with the norm that follows it and its shortcut.

    Args:
        grad: of `output = relu(batch_norm(raw) + shortcut)`, (N, K, P, Q).
        output: see `grad`.
        behind: `raw`, the convolution's output, and that norm.
        weight: (K, C / groups, 1, 1).
        size: see `conv_backward_input`, as are those that follow.
        geometry: see `size`.
        below: see `size`.

    Returns:
        What `conv_backward_input` does; the gradients of `raw` and of the shortcut; those of the
        norm's weight and bias, in float32. None as there.
    """
    if weight.shape[2:].numel() != 1:
        return None
    raw, norm = behind
    training = training_convolutions()
    while True:
        found = _backward_tile(raw, weight, geometry, None, True, above=True)
        if found is None:
            return None
        dense = raw.contiguous(memory_format=torch.channels_last)
        masked = torch.empty_like(dense)
        total, dot, grad_weight = norms().batch_norm_act_backward_sums(
            grad, dense, output, norm, "relu", masked
        )
        sums = Sums(total, dot, dense.numel() // dense.size(1))
        ends = training.Ends(None, None, (dense, norm, sums), below)
        try:
            result, grad_raw, below_sums = training.backward_input(
                masked, weight, size, geometry, ends, found[0]
            )
            return result, below_sums, grad_raw, masked, (grad_weight, total)
        except out_of_resources() as error:
            _leave_out(raw.device, found, str(error))


def _backward_tile(
    grad: Tensor,
    weight: Tensor,
    geometry: Sequence[Any],
    residual: Tensor | None,
    below: bool,
    above: bool = False,
) -> tuple[Tile, ConvProblem | None, str] | None:
    """Of a transposed convolution, its problem and what `tuning` calls the kernel.

    None where the library's is to run. There is no problem where it is only interpreted.
    """
    stride, padding, dilation, groups = geometry
    _, C, R, S = weight.shape
    around = (dilation[0] * (R - 1) - padding[0], dilation[1] * (S - 1) - padding[1])
    if max(stride) > 1 or min(around) < 0 or not can_train(grad, weight, residual, groups):
        return None
    device, tile = grad.device, training_convolutions().INTERPRETED_TILE
    if device.type != "cuda" and not self_check.everywhere:
        return tile, None, ""
    transposed = weight.new_empty((C, grad.size(1), R, S), device="meta")
    problem = problem_of(grad, transposed, stride, around, dilation, groups, residual is not None)
    kernel, ends = _BACKWARD[above, below], (residual is not None, above, below)
    while True:
        if device.type == "cuda":
            gpu = architecture.of_device(device)
            left_out = tuning.left_out(problem, device, kernel)
            tile = training_choice.backward(problem, above, below, gpu, left_out)[0]
        if tile is None:
            return None
        try:
            if settled.get((problem, ends, tile, device)) or checks.trusts_input_gradient(
                problem, ends, tile, device
            ):
                return tile, problem, kernel
            return None
        except out_of_resources() as error:
            _leave_out(device, (tile, problem, kernel), str(error))


def _leave_out(
    device: torch.device, found: tuple[Tile, ConvProblem | None, str], reason: str
) -> None:
    """Has the next tile run, or nothing where there is none: see `tuning.leave_out`."""
    tile, problem, kernel = found
    assert problem is not None
    tuning.leave_out(problem, device, Choice(kernel, tile, ESTIMATE), reason)
