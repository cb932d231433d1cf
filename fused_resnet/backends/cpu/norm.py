"""Batch norm: native statistics, everything else in one pass, and a native backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.activation import PLAIN, apply_, numbers_of
from ...layers.description import Norm, Sums
from ...layers.memory import contiguous_like_eager
from .. import library
from ..backend import Gradients
from ..library import scale_shift_act
from . import operators
from .isa import LARGEST_POOL


def batch_norm_act_inference(
    input: Tensor, norm: Norm, residual: Tensor | None, activation: str
) -> Tensor:
    """Everything in one pass; in float64 activations other than ReLU are another, in place."""
    input = contiguous_like_eager(input)
    if activation in PLAIN or _is_activated_apart(input):
        scale, shift = operators.norm_vectors(*in_accumulation_dtype(input, *norm[:4]), norm.eps)
        if activation in PLAIN:
            return scale_shift_act(input, scale, shift, residual, activation)
        return apply_(scale_shift_act(input, scale, shift, residual, "none"), activation)
    return _normalized(input, norm, residual, activation, operators.pool_empty_like(input))


def batch_norm_act_inference_(
    input: Tensor, norm: Norm, residual: Tensor | None, activation: str
) -> Tensor:
    """`batch_norm_act_inference` in place, of a dense tensor of the caller's own."""
    if _is_activated_apart(input):
        return batch_norm_act_inference(input, norm, residual, activation)
    return _normalized(input, norm, residual, activation, input)


def _is_activated_apart(input: Tensor) -> bool:
    return input.dtype is torch.float64 or input.numel() == 0


def _normalized(
    input: Tensor, norm: Norm, residual: Tensor | None, activation: str, output: Tensor
) -> Tensor:
    vectors = in_accumulation_dtype(input, *norm[:4])
    operators.normalize_act(input, *vectors, norm.eps, residual, *numbers_of(activation), output)
    return output


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,) each, float32 (float64 for float64), in one pass."""
    input = contiguous_like_eager(input)
    if input.numel() == 0:
        return library.batch_statistics(input)
    return operators.batch_statistics(input)


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics in one pass (csrc/cpu/batch_norm.cpp), everything else in another."""
    return _train(input, weight, bias, eps, residual, activation, False)[:3]


def batch_norm_act_training_keeping_mask(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """`batch_norm_act_training` with ReLU, and its mask, an eighth of a byte a value.

    Returns:
        The output, mean and variance, and what `batch_norm_act_backward` takes for the output:
        uint8, a bit for each value in memory order. None in its place where the channels, or in
        NCHW the pixels of an image, are not a multiple of 16.
    """
    return _train(input, weight, bias, eps, residual, "relu", True)


def _train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    input = contiguous_like_eager(input)
    if input.numel() == 0:
        mean, var = library.batch_statistics(input)
        out = scale_shift_act(input, mean, var, residual, "none")  # of which there is nothing
        return out, mean, var, None
    if activation not in PLAIN:
        mean, var = operators.batch_statistics(input)
        norm = Norm(mean, var, weight, bias, eps)
        output = operators.pool_empty_like(input)
        return _normalized(input, norm, residual, activation, output), mean, var, None
    weight, bias = in_accumulation_dtype(input, weight, bias)
    return operators.train_batch_norm_act(input, weight, bias, eps, residual, activation, keep_mask)


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
    """Gradients of `batch_norm_act`, in one pass that reduces and one that does not."""
    relu = activation == "relu"
    need_input, need_weight, need_bias, need_residual = need
    grad, input, output, copied = _lying_alike(grad, input, output)
    if activation not in PLAIN:
        masked = grad if overwrite or copied else operators.pool_empty_like(input)
        grad_input = None
        if need_input:  # which takes the place of the residual's, unless that is needed
            grad_input = operators.pool_empty_like(input) if need_residual else masked
        *parameters, mean, var, eps = _parameters(input, norm)
        grad_weight, grad_bias = operators.normalize_act_backward(
            grad, input, output, *parameters, mean, var, eps, *numbers_of(activation), training,
            grad_input, masked,
        )  # fmt: skip
        return (
            grad_input,
            grad_weight if need_weight else None,
            grad_bias if need_bias else None,
            masked if need_residual else None,
        )
    if copied:
        overwrite = relu or not need_residual  # whose gradient may be `grad` itself
    masked = operators.pool_empty_like(input) if need_residual and relu else None
    grad_input = None
    if need_input:
        grad_input = grad if overwrite else operators.pool_empty_like(input)
    grad_weight, grad_bias = operators.batch_norm_act_backward(
        grad, input, output, *_parameters(input, norm), relu, training, grad_input, masked
    )
    return (
        grad_input,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        (masked if relu else grad) if need_residual else None,
    )


def batch_norm_act_backward_sums(
    grad: Tensor, input: Tensor, output: Tensor | None, norm: Norm, activation: str
) -> tuple[Tensor, Tensor]:
    """The first pass of `batch_norm_act_backward`, for statistics that processes share.

    Args:
        grad: as the others, see `Backend.batch_norm_act_backward`; not empty.
        input: see `grad`.
        output: see `grad`.
        norm: its statistics those of the joint batch.
        activation: see `grad`.

    Returns:
        With g the gradient behind the activation, the sums of g and of g * (input - mean), (C,),
        in the accumulation dtype.
    """
    grad, input, output, _ = _lying_alike(grad, input, output)
    return operators.batch_norm_act_backward_sums(
        grad, input, output, *_parameters(input, norm), activation == "relu"
    )


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
    """The second pass of `batch_norm_act_backward`, for statistics that processes share.

    Args:
        grad: as up to `activation`, see `batch_norm_act_backward_sums`.
        input: see `grad`.
        output: see `grad`.
        norm: see `grad`.
        activation: see `grad`.
        sums: over the joint batch.
        need_residual: whether to return g, the gradient of a residual.
        overwrite: whether `grad` may be overwritten, by the input's gradient.

    Returns:
        The gradient of `input`, and g where it is needed.
    """
    relu = activation == "relu"
    if need_residual and relu:
        assert output is not None
        grad, relu, overwrite = torch.ops.aten.threshold_backward(grad, output, 0), False, False
    residual = grad if need_residual else None
    grad, input, output, copied = _lying_alike(grad, input, output)
    grad_input = (
        grad if copied or (overwrite and not need_residual) else operators.pool_empty_like(input)
    )
    total, dot, count = sums
    vectors = in_accumulation_dtype(input, total, dot)
    operators.batch_norm_act_backward_input(
        grad, input, output, *_parameters(input, norm), relu, *vectors, float(count), grad_input
    )
    return grad_input, residual


def max_pool_backward(
    grad: Tensor, input: Tensor, norm: Norm, pool: Sequence[Sequence[int]]
) -> Tensor | None:
    """The gradient that `max_pool2d(relu(batch_norm(input)), *pool)` passes to the ReLU's output.

    Args:
        grad: of the pooled tensor, (N, C, P, Q).
        input: (N, C, H, W).
        norm: of C channels.
        pool: kernel size, stride and padding, two numbers each.

    Returns:
        The gradient (N, C, H, W), or None where `input` is not channels_last, or the window large.
    """
    if (
        max(pool[0]) > LARGEST_POOL
        or input.is_contiguous()
        or not input.is_contiguous(memory_format=torch.channels_last)
    ):
        return None
    vectors = operators.norm_vectors(*in_accumulation_dtype(input, *norm[:4]), norm.eps)
    numbers = [number for pair in pool for number in pair]
    grad = grad.contiguous(memory_format=torch.channels_last)
    return operators.max_pool_gradient(grad, input, *vectors, numbers)


def _lying_alike(
    grad: Tensor, input: Tensor, output: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """The three in one dense layout, but for bits, and whether `grad` is a copy of our own."""
    input = contiguous_like_eager(input)
    copied = grad.stride() != input.stride()
    if copied:
        grad = operators.pool_empty_like(input).copy_(grad)
    is_mask = output is None or output.dtype is torch.uint8
    if output is not None and not is_mask and output.stride() != input.stride():
        output = operators.pool_empty_like(input).copy_(output)
    return grad, input, output, copied


def _parameters(input: Tensor, norm: Norm) -> tuple[Any, ...]:
    """Weight, bias, mean, variance and eps, as the native operators of backward take them."""
    mean, var, weight, bias, eps = norm
    return *in_accumulation_dtype(input, weight, bias, mean, var), eps


def in_accumulation_dtype(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """(C,) parameters as the native operators take them."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    result = []
    for p in parameters:
        if p is not None and not (p.dtype is dtype and p.is_contiguous()):
            p = p.to(dtype).contiguous()
        result.append(p)
    return tuple(result)
