"""Launchers of batch norm with batch statistics, shortcut and ReLU, forward and backward.

`norm_kernels.py` has the formulas. How many slabs of rows a reduction is cut into depends on the
shape alone, so that its bits do not depend on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import reference
from ...layers.description import Norm, Sums
from ...layers.memory import contiguous_like_eager, memory_format_of
from ..backend import Gradients
from .launch import acts, is_wide, launch_kernel
from .norm_kernels import (
    backward_input_kernel,
    backward_sums_kernel,
    combine_statistics_kernel,
    combine_sums_kernel,
    normalize_kernel,
    statistics_kernel,
)
from .problem import ceil_div

# Elements that a program has in hand at a time: two accesses of 16 bytes for each of 128 threads.
_STEP = 2048
_WARPS = 4
# A row's bytes that a program reads: a cache line.
_LINE = 128
# Enough to fill a GPU; and the least steps of a program where that makes more of them.
_PROGRAMS = 1024
_LEAST_STEPS = 16
# The second kernel's, which loads all slabs of its channels at once.
MOST_SLABS = 1024
_COMBINED_CHANNELS = 4
COMBINE_WARPS = 8
# Steps of a program that does not reduce: they share its per-channel vectors.
_ELEMENTWISE_STEPS = 4
# For the interpreter, whose time goes by the number of operations.
_INTERPRETED_STEP = 2**14
_INTERPRETED_CHANNELS = 128


@dataclass(frozen=True)
class Layout:
    """A dense tensor as rows of channels, and the tile that programs go through it with."""

    rows: int
    C: int
    S: int
    wide: bool
    block_r: int
    block_c: int

    @property
    def tiles_c(self) -> int:
        """How many tiles lie side by side in a row."""
        return ceil_div(self.C, self.block_c)

    @property
    def tiles_r(self) -> int:
        """How many tiles lie below each other."""
        return ceil_div(self.rows, self.block_r)

    def constants(self) -> dict[str, Any]:
        """What all kernels that go through a tensor are compiled for."""
        return {
            "CHANNELS_LAST": self.S == 1,
            "WIDE": self.wide,
            "BLOCK_R": self.block_r,
            "BLOCK_C": self.block_c,
            "num_warps": _WARPS,
        }

    def reduction(self) -> tuple[int, int]:
        """(steps of a program, slabs): a function of shape and dtype."""
        # Without `ceil_div`, here and below: these are asked for every launch.
        tiles_c, tiles_r = -(-self.C // self.block_c), -(-self.rows // self.block_r)
        wanted = max(-(-_PROGRAMS // tiles_c), tiles_r // _LEAST_STEPS)
        steps = -(-tiles_r // min(wanted, MOST_SLABS))
        return steps, -(-tiles_r // steps)

    def elementwise(self) -> tuple[int, int]:
        """(steps of a program, programs), where every element goes by itself."""
        tiles_c, tiles_r = -(-self.C // self.block_c), -(-self.rows // self.block_r)
        many = tiles_r * tiles_c >= _ELEMENTWISE_STEPS * _PROGRAMS
        steps = _ELEMENTWISE_STEPS if many else 1
        return steps, -(-tiles_r // steps) * tiles_c


def layout_of(input: Tensor) -> Layout:
    """Of a tensor from `contiguous_like_eager`, with at least one element."""
    C = input.size(1)
    rows = input.numel() // C
    pixels = rows // input.size(0)
    S = pixels if input.is_contiguous() and C > 1 else 1
    step, channels = _STEP, _LINE // input.element_size() if S == 1 else 1
    if input.device.type != "cuda":
        step, channels = _INTERPRETED_STEP, _INTERPRETED_CHANNELS
    # `triton.next_power_of_2` takes three calls for it.
    block_c = min(1 << (C - 1).bit_length(), channels)
    # Rows of the last step, which need not exist, are counted on.
    wide = input.numel() + _ELEMENTWISE_STEPS * step * C >= 2**31
    return Layout(rows, C, S, wide, step // block_c, block_c)


def _lying_like(tensor: Tensor, input: Tensor) -> Tensor:
    """`tensor`, copied if it does not lie in memory as `input` does."""
    channels_last = not input.is_contiguous()
    memory_format = memory_format_of(input) if channels_last else torch.contiguous_format
    if tensor.is_contiguous(memory_format=memory_format):
        return tensor
    return torch.empty_like(input).copy_(tensor)


def _sign_source(output: Tensor | None, input: Tensor, relu: bool) -> Tensor | None:
    """What kernels take for the output: lying as the input, or a mask, which does."""
    if output is None or not relu or output.dtype is torch.uint8:
        return output if relu else None
    return _lying_like(output, input)


def _is_image(tensor: Tensor) -> bool:
    """Whether it has pixels (H, W), whose offsets 32 bits hold."""
    return tensor.dim() == 4 and not is_wide(tensor)


def contiguous_vectors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """One value a channel, or None, side by side in memory as the kernels read them."""
    found = []
    for tensor in tensors:
        found.append(tensor if tensor is None else tensor.contiguous())
    return tuple(found)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all dimensions but the second.

    Args:
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.

    Returns:
        (C,) and (C,), float32.
    """
    input = contiguous_like_eager(input)
    layout = layout_of(input)
    steps, slabs = layout.reduction()
    partial, mean, var = new_partials(input, 3, slabs), *new_vectors(input, 2)
    block_c = combined_channels(input)
    launch_kernel(
        input,
        statistics_kernel,
        (slabs * layout.tiles_c,),
        (input, partial, layout.rows, layout.C, layout.S, steps, slabs),
        writes=("partial_ptr",),
        **layout.constants(),
    )
    launch_kernel(
        input,
        combine_statistics_kernel,
        (-(-layout.C // block_c),),
        (partial, mean, var, layout.rows, layout.C, steps * layout.block_r, slabs),
        writes=("mean_ptr", "var_ptr"),
        BLOCK_S=MOST_SLABS,
        BLOCK_C=block_c,
        num_warps=COMBINE_WARPS,
    )
    return mean, var


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three launches: see `reference.batch_norm_act_training` for what they compute.

    Args:
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        weight: (C,) of any floating dtype, or None.
        bias: see `weight`.
        eps: added to the variance.
        residual: of the input's shape and dtype, with any strides, or with fewer channels, see
            `reference.pad_channels`, or None.
        activation: "relu" or "none".

    Returns:
        The output, in the memory format `F.batch_norm` would give it, the batch's mean and biased
        variance.
    """
    input = contiguous_like_eager(input)
    mean, var = batch_statistics(input)
    norm = Norm(mean, var, weight, bias, eps)
    return batch_norm_act_inference(input, norm, residual, activation), mean, var


def batch_norm_act_inference(
    input: Tensor,
    norm: Norm,
    residual: Tensor | None,
    activation: str,
    residual_norm: Norm | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One launch; the arguments are those of `batch_norm_act_training`.

    With `residual_norm` the residual, of the input's shape, is normalized first and rounded, to the
    bits that a launch for it would write. `mask` is where to write the activation's, see
    `mask_for`.
    """
    input = contiguous_like_eager(input)
    layout = layout_of(input)
    steps, programs = layout.elementwise()
    output = torch.empty_like(input)
    channels: int | None = None
    size: Sequence[int] = (1, 1)
    strides: Sequence[int] = (0, 0, 0, 0)
    if residual is not None and residual.size(1) != layout.C and _is_image(residual):
        channels, size, strides = residual.size(1), residual.shape[2:], residual.stride()
    elif residual is not None:
        residual = _lying_like(reference.pad_channels(residual, layout.C), input)
    vectors = contiguous_vectors(*norm[:4])
    launch_kernel(
        input,
        normalize_kernel,
        (programs,),
        (
            input,
            *vectors,
            residual,
            output,
            mask,
            norm.eps,
            layout.rows,
            layout.C,
            layout.S,
            steps,
            *size,
            *strides,
            *contiguous_vectors(*(residual_norm or (None,) * 5)[:4]),
            None if residual_norm is None else residual_norm.eps,
        ),
        writes=("output_ptr", "mask_ptr"),
        RESIDUAL_CHANNELS=channels,
        **acts[activation],
        **layout.constants(),
    )
    return output


def mask_for(input: Tensor) -> Tensor | None:
    """Room for a bit a value in the memory order of `input`; None where kernels keep no mask."""
    if layout_of(input).S > 1 or input.size(1) % 8 > 0:
        return None
    return torch.empty(input.numel() // 8, dtype=torch.uint8, device=input.device)


def batch_norm_add_relu(
    input: Tensor, norm: Norm, residual: Tensor, residual_norm: Norm | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """`relu(batch_norm(input) + batch_norm(residual))`, and what its backward wants to know.

    Args:
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        norm: mean and biased variance, or None twice where they are still to be found, weight,
            bias and eps.
        residual: see `batch_norm_act_training`.
        residual_norm: as `norm`, or None where the residual is added as it is.

    Returns:
        The output; its mask, see `mask_for`; mean and variance of the input; and of the residual,
        if it has a norm.
    """
    input = contiguous_like_eager(input)
    if norm[0] is None:
        norm = Norm(*batch_statistics(input), *norm[2:])
    if residual_norm is not None and residual_norm[0] is None:
        residual_norm = Norm(*batch_statistics(residual), *residual_norm[2:])
    mask = mask_for(input)
    output = batch_norm_act_inference(input, norm, residual, "relu", residual_norm, mask)
    return output, mask, norm[:2], None if residual_norm is None else residual_norm[:2]


def batch_norm_act_backward_sums(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    masked: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the gradients of weight, bias and input need of all rows: two launches.

    Args:
        grad: of the output, with any strides.
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        output: what the activation returned, or its mask, see `mask_for`; or None where there was
            no residual.
        norm: its tensors of any floating dtype.
        activation: "relu" or "none".
        masked: where to write the gradient behind the activation, lying as the input; or None.

    Returns:
        Its sum, its sum with `input - mean`, and that over `sqrt(var + eps)`: (C,), float32.
    """
    input = contiguous_like_eager(input)
    grad = _lying_like(grad, input)
    total, dot, grad_weight = _sums_pass(grad, input, output, norm, activation == "relu", masked)
    return total, dot, grad_weight


_NO_NORM = Norm(None, None, None, None, 0.0)  # type: ignore[arg-type]


def _sums_pass(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    relu: bool,
    masked: Tensor | None,
    residual: Tensor | None = None,
    residual_norm: Norm = _NO_NORM,
) -> tuple[Tensor, ...]:
    """Launches `backward_sums_kernel` and what combines; all tensors lie as the input does.

    Returns:
        What `batch_norm_act_backward_sums` does, of the norm and of the residual's, if there.
    """
    output = _sign_source(output, input, relu)
    layout = layout_of(input)
    steps, slabs = layout.reduction()
    second = residual is not None
    partial, found = new_partials(input, 2 + second, slabs), new_vectors(input, 3 + 3 * second)
    block_c = combined_channels(input)
    mean, var, weight, bias = contiguous_vectors(*norm[:4])
    residual_mean, residual_var = contiguous_vectors(*residual_norm[:2])
    launch_kernel(
        input,
        backward_sums_kernel,
        (slabs * layout.tiles_c,),
        (
            grad, input, output, mean, var, weight, bias, masked, partial, norm.eps, layout.rows,
            layout.C, layout.S, steps, slabs, residual, residual_mean,
        ),
        writes=("masked_ptr", "partial_ptr"),
        RELU=relu,
        **layout.constants(),
    )  # fmt: skip
    launch_kernel(
        input,
        combine_sums_kernel,
        (-(-layout.C // block_c),),
        (
            partial, var, *found[:3], norm.eps, layout.C, slabs,
            residual_var, *(found[3:] or (None,) * 3), residual_norm.eps,
        ),
        writes=(
            "total_ptr", "dot_ptr", "grad_weight_ptr",
            "residual_total_ptr", "residual_dot_ptr", "residual_grad_weight_ptr",
        ),
        BLOCK_S=MOST_SLABS,
        BLOCK_C=block_c,
        num_warps=COMBINE_WARPS,
    )  # fmt: skip
    return found


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
    """The gradients that are as large as the input: one launch.

    Args:
        grad: see `batch_norm_act_backward_sums`, as are the arguments up to `activation`.
        input: see `grad`.
        output: see `grad`.
        norm: see `grad`.
        activation: see `grad`.
        sums: of the whole batch.
        need_residual: whether the residual's gradient is wanted.
        overwrite: whether `grad` may be overwritten, by the input's gradient.

    Returns:
        The gradients of the input and of the residual, None where not wanted.
    """
    input = contiguous_like_eager(input)
    relu = activation == "relu"
    given, grad = grad, _lying_like(grad, input)
    overwrite = (overwrite or grad is not given) and (relu or not need_residual)
    masked = torch.empty_like(input) if need_residual and relu else None
    grad_input = grad if overwrite else torch.empty_like(input)
    total, dot, count = sums
    if isinstance(count, Tensor):
        sums = Sums((total / count).float(), (dot / count).float(), 1)
    _input_pass(grad, input, output, norm, relu, sums, (grad_input, masked))
    return grad_input, (masked if relu else grad) if need_residual else None


def _input_pass(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    relu: bool,
    sums: Sums | None,
    results: tuple[Tensor | None, Tensor | None],
    second: Sequence[Any] = (None,) * 7,
) -> None:
    """Launches `backward_input_kernel`; `grad` and the results lie in memory as the input does.

    `sums` are None where the statistics are constants. `results` are the input's gradient and the
    residual's.
    `second` is the residual, its mean, variance, weight and dot, its gradient, and its norm's eps.
    """
    layout = layout_of(input)
    steps, programs = layout.elementwise()
    output = _sign_source(output, input, relu)
    total, dot, count = (None, None, 1) if sums is None else sums
    vectors = contiguous_vectors(*norm[:4], total, dot)
    launch_kernel(
        input,
        backward_input_kernel,
        (programs,),
        (
            grad, input, output, *vectors, *results, norm.eps, 1.0 / count, layout.rows, layout.C,
            layout.S, steps, *second,
        ),
        writes=("grad_input_ptr", "masked_ptr", "grad_residual_ptr"),
        RELU=relu,
        **layout.constants(),
    )  # fmt: skip


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
    """Gradients of `batch_norm_act` in input, weight, bias and residual: three launches.

    Where the residual's is wanted, the pass that adds up writes it, and the last pass reads it in
    place of `grad` and `output`. For the arguments see `Backend.batch_norm_act_backward`.
    """
    input = contiguous_like_eager(input)
    relu = activation == "relu"
    need_input, need_weight, need_bias, need_residual = need
    given, grad = grad, _lying_like(grad, input)
    overwrite = (overwrite or grad is not given) and (relu or not need_residual)
    grad_residual = None
    if need_residual:
        grad_residual = torch.empty_like(input) if relu else grad
    grad_input = None
    if need_input:
        grad_input = grad if overwrite else torch.empty_like(input)
    masked = grad_residual if relu else None
    total = dot = grad_weight = None
    if need_weight or need_bias or (training and need_input):
        total, dot, grad_weight = batch_norm_act_backward_sums(
            grad, input, output, norm, activation, masked
        )
        if masked is not None:
            grad, masked, relu = masked, None, False
    if grad_input is not None or masked is not None:
        sums = None
        if training and total is not None and dot is not None:
            sums = Sums(total, dot, input.numel() // input.size(1))
        _input_pass(grad, input, output, norm, relu, sums, (grad_input, masked))
    return (
        grad_input,
        grad_weight if need_weight else None,
        total if need_bias else None,
        grad_residual,
    )


def batch_norm_add_relu_backward(
    grad: Tensor,
    output: Tensor,
    input: Tensor,
    norm: Norm,
    residual: Tensor,
    residual_norm: Norm,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Gradients of `batch_norm_add_relu` where both sides have a norm: three launches.

    What two calls of `batch_norm_act_backward` return, to the bits, for one reading of `grad` less
    in both passes.

    Args:
        grad: of the output, with any strides.
        output: what `batch_norm_add_relu` returned, or its mask.
        input: (N, C, *), float16, bfloat16 or float32, with at least one element.
        norm: the batch's mean and biased variance, weight, bias and eps.
        residual: of the input's shape and dtype, with any strides.
        residual_norm: as `norm`.

    Returns:
        For the input, and for the residual, its gradient and those of weight and bias, float32.
    """
    input = contiguous_like_eager(input)
    grad, residual = _lying_like(grad, input), _lying_like(residual, input)
    total, dot, grad_weight, residual_total, residual_dot, residual_grad_weight = _sums_pass(
        grad, input, output, norm, True, None, residual, residual_norm
    )
    grad_input, grad_residual = torch.empty_like(input), torch.empty_like(input)
    residual_vectors = contiguous_vectors(*residual_norm[:3])
    _input_pass(
        grad, input, output, norm, True, Sums(total, dot, input.numel() // input.size(1)),
        (grad_input, None),
        (residual, *residual_vectors, residual_dot, grad_residual, residual_norm.eps),
    )  # fmt: skip
    of_residual = (grad_residual, residual_grad_weight, residual_total)
    return (grad_input, grad_weight, total), of_residual


def new_partials(input: Tensor, values: int, slabs: int) -> Tensor:
    """(values, slabs, C), float32: what programs leave for the kernel that combines them."""
    return torch.empty((values, slabs, input.size(1)), dtype=torch.float32, device=input.device)


def new_vectors(input: Tensor, count: int) -> tuple[Tensor, ...]:
    """So many tensors (C,), float32, with C the channels of `input`."""
    channels = input.size(1)
    found = []
    for _ in range(count):
        found.append(torch.empty(channels, dtype=torch.float32, device=input.device))
    return tuple(found)


def combined_channels(input: Tensor) -> int:
    """Channels of a program that combines."""
    return _COMBINED_CHANNELS if input.device.type == "cuda" else _INTERPRETED_CHANNELS
