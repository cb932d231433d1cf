"""Training's norms and convolutions: which kernel runs them, or the library."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...layers.memory import contiguous_like_eager
from ...tuning import architecture
from ...tuning import training as training_choice
from ...tuning.choice import Tile
from .. import library
from .eligible import can_normalize, can_train, is_channels_last
from .lazy import norms, stems, training_convolutions
from .problem import problem_of


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
    if can_normalize(input, weight, bias, residual):
        return norms().batch_norm_act_training(*arguments)
    return library.batch_norm_act_training(*arguments)


def batch_norm_act_training_keeping_mask(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`batch_norm_act_training` with ReLU, and its mask, a bit a value; None where it has none."""
    found = batch_norm_add_relu(input, (None, None, weight, bias, eps), residual, None)
    if found is None:
        return *batch_norm_act_training(input, weight, bias, eps, residual, "relu"), None
    output, mask, (mean, var), _ = found
    return output, mean, var, mask


def batch_norm_add_relu(
    input: Tensor, norm: tuple, residual: Tensor, residual_norm: tuple | None
) -> tuple[Tensor, Tensor | None, tuple, tuple | None] | None:
    """Norm, shortcut with or without a norm, and ReLU in one pass: see `norm.py`.

    Returns:
        What is returned there, or None where the kernel cannot be had.
    """
    others = (*norm[:4], residual, *(residual_norm or ())[:4])
    if not can_normalize(input, *others):
        return None
    return norms().batch_norm_add_relu(input, norm, residual, residual_norm)


def batch_norm_add_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    norm: tuple,
    residual: Tensor,
    residual_norm: tuple,
) -> tuple[tuple, tuple] | None:
    """Behind two norms, their add and its ReLU: see `norm.py`.

    Returns:
        What is returned there, or None where the kernel cannot be had.
    """
    if not can_normalize(input, grad, *norm[:4], residual, *residual_norm[:4]):
        return None
    return norms().batch_norm_add_relu_backward(grad, output, input, norm, residual, residual_norm)


def batch_norm_act_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    training: bool,
    need: Sequence[bool],
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """A pass that reduces and one that does not; the arguments are those of `cpu`'s."""
    leading = (grad, input, output, weight, bias, mean, var, eps, activation, training, need)
    if can_normalize(input, grad, output, weight, bias, mean, var):
        return norms().batch_norm_act_backward(*leading, overwrite)
    return library.batch_norm_act_backward(*leading)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of this tensor, (C,), in the accumulation dtype."""
    if can_normalize(input):
        return norms().batch_statistics(input)
    return library.batch_statistics(contiguous_like_eager(input))


def batch_norm_act_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """`sum(g)` and `sum(g (input - mean))`, g the gradient behind the activation, of this tensor.

    `output` may be None where there was no residual. Shapes (C,), in the accumulation dtype.
    """
    arguments = (grad, input, output, weight, bias, mean, var, eps, activation)
    if can_normalize(input, grad, output, weight, bias, mean, var):
        total, dot, _ = norms().batch_norm_act_backward_sums(*arguments)
        return total, dot
    return library.batch_norm_act_backward_sums(*arguments)


def batch_norm_act_backward_input(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    total: Tensor,
    dot: Tensor,
    count: int | float | Tensor,
    need_residual: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of input and residual, from the sums and the count of the joint batch."""
    leading = (grad, input, output, weight, bias, mean, var, eps, activation)
    sums = (total, dot, count, need_residual)
    if can_normalize(input, grad, output, weight, bias, mean, var):
        return norms().batch_norm_act_backward_input(*leading, *sums, overwrite)
    return library.batch_norm_act_backward_input(*leading, *sums)


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
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    prologue: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float] | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A convolution, and the mean and biased variance (K,) of its output, in one pass.

    Args:
        input: (N, C, H, W).
        weight: (K, C / groups, R, S).
        bias: (K,) or None.
        stride: of the convolution, as are `padding`, `dilation` and `groups`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: see `stride`.
        prologue: mean, biased variance, weight, bias and eps of a batch norm that the input, and
            then through a ReLU, goes through first; or None.

    Returns:
        None where other means are predicted to be as fast, or cannot be had.
    """
    if not can_train(input, weight, bias, groups):
        return None
    training = training_convolutions()
    tile = training.INTERPRETED_TILE
    if input.device.type == "cuda":
        problem = problem_of(input, weight, stride, padding, dilation, groups, False)
        gpu = architecture.of_device(input.device)
        tile, _ = training_choice.forward(problem, prologue is not None, gpu)
    if tile is None:
        return None
    norm = None if prologue is None else training.Norm(*prologue)
    return training.forward(input, weight, bias, stride, padding, dilation, norm, tile)


def conv_backward_input(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    below: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float] | None,
    residual_mask: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None] | None:
    """A convolution's gradient in its input, and what would follow it.

    Args:
        grad: (N, K, P, Q), of the convolution's output.
        weight: (K, C / groups, R, S).
        size: (H, W) of its input.
        stride: of the convolution, as are `padding`, `dilation` and `groups`.
        padding: see `stride`.
        dilation: see `stride`.
        groups: see `stride`.
        residual: to be added, of the input's shape; or None.
        below: a tensor and its batch norm's mean, biased variance, weight, bias and eps, where
            the convolution's input is `relu(batch_norm(below))`; or None.
        residual_mask: what `batch_norm_add_relu` returned, if the residual is to be masked by it.

    Returns:
        The gradient, with `below` behind that norm, and then its sum, its sum with `below - mean`
        and that over `sqrt(var + eps)`. None as in `conv_batch_norm_statistics`.
    """
    tile = _backward_tile(grad, weight, size, stride, padding, dilation, groups, residual, below)
    if tile is None:
        return None
    training = training_convolutions()
    behind = None if below is None else (below[0], training.Norm(*below[1:]))
    result, _, sums = training.backward_input(
        grad, weight, size, padding, dilation, residual, None, behind, tile, residual_mask
    )
    return result, sums


def conv_backward_input_runs(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    below: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float] | None,
) -> bool:
    """Whether `conv_backward_input` returns something; for arguments see there."""
    return (
        _backward_tile(grad, weight, size, stride, padding, dilation, groups, residual, below)
        is not None
    )


def norm_conv_backward_input(
    grad: Tensor,
    output: Tensor,
    raw: Tensor,
    norm: tuple[Tensor, Tensor, Tensor | None, Tensor | None, float],
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    below: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float],
) -> tuple[Tensor, tuple, Tensor, Tensor, tuple[Tensor, Tensor]] | None:
    """`conv_backward_input` of a 1x1 convolution, with the norm that follows it and its shortcut.

    Args:
        grad: of `output = relu(batch_norm(raw) + shortcut)`, (N, K, P, Q).
        output: see `grad`.
        raw: the convolution's output.
        norm: mean, biased variance, weight, bias and eps of that norm.
        weight: (K, C / groups, 1, 1).
        size: see `conv_backward_input`, as are those that follow.
        stride: see `size`.
        padding: see `size`.
        dilation: see `size`.
        groups: see `size`.
        below: see `size`.

    Returns:
        What `conv_backward_input` does; the gradients of `raw` and of the shortcut; those of the
        norm's weight and bias, in float32. None as there.
    """
    if weight.shape[2:].numel() != 1:
        return None
    tile = _backward_tile(
        raw, weight, size, stride, padding, dilation, groups, None, below, above=True
    )
    if tile is None:
        return None
    training = training_convolutions()
    mean, var, bn_weight, bn_bias, eps = norm
    raw = raw.contiguous(memory_format=torch.channels_last)
    masked = torch.empty_like(raw)
    total, dot, grad_weight = norms().batch_norm_act_backward_sums(
        grad, raw, output, bn_weight, bn_bias, mean, var, eps, "relu", masked
    )
    sums = training.Sums(total, dot, raw.numel() // raw.size(1))
    result, grad_raw, below_sums = training.backward_input(
        masked, weight, size, padding, dilation, None, (raw, training.Norm(*norm), sums),
        (below[0], training.Norm(*below[1:])), tile,
    )  # fmt: skip
    return result, below_sums, grad_raw, masked, (grad_weight, total)


def _backward_tile(
    grad: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    below: tuple | None,
    above: bool = False,
) -> Tile | None:
    """Of a transposed convolution, or None where the library's is to run."""
    _, C, R, S = weight.shape
    around = tuple(
        apart * (taps - 1) - before
        for taps, before, apart in zip((R, S), padding, dilation, strict=True)
    )
    if max(stride) > 1 or min(around) < 0 or not can_train(grad, weight, residual, groups):
        return None
    if grad.device.type != "cuda":
        return training_convolutions().INTERPRETED_TILE
    transposed = weight.new_empty((C, grad.size(1), R, S), device="meta")
    problem = problem_of(grad, transposed, stride, around, dilation, groups, residual is not None)
    gpu = architecture.of_device(grad.device)
    return training_choice.backward(problem, above, below is not None, gpu)[0]
