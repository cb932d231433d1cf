"""The Triton backend: convolution, batch norm, shortcut and ReLU in one kernel, on a GPU.

`conv_kernels.py` has the kernels of convolutions, `conv.py` what launches them, `norm.py` both for
norms by themselves, `stem.py` for norms that a max-pool follows. Triton is imported when
one first runs.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import Parameter

from ... import tuning
from ...layers.description import described_blocks
from ...layers.memory import contiguous_like_eager
from ...tuning import architecture, basic_block
from ...tuning import prologue as prologue_choice
from ...tuning import training as training_choice
from ...tuning.choice import ESTIMATE, TILED, Choice, Tile
from ...tuning.problem import ChainProblem
from .. import cuda, cudnn, library

__all__ = [
    "available",
    "batch_norm_act_backward",
    "batch_norm_act_backward_input",
    "batch_norm_act_backward_sums",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "batch_norm_relu_max_pool",
    "batch_statistics",
    "conv_backward_input",
    "conv_batch_norm_statistics",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "explain",
    "in_graphs",
    "interpreted",
    "launchers",
    "max_pool_backward_from_offsets",
    "norm_conv_backward_input",
    "norm_conv_bn_act",
    "release",
    "residual_blocks",
    "run_chain",
]

reads_narrow_residuals = True
"""Whether operators take a residual of fewer channels, without padding it in memory."""

_CHAIN_DTYPES = (torch.float16, torch.bfloat16)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def available() -> str:
    """Whether the kernels can run here: "yes" or the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return "yes"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return "the GPU's compute capability is {}.{}, must be at least 8.0".format(*capability)
    return "yes"


@functools.cache
def interpreted() -> bool:
    """Whether TRITON_INTERPRET asks for kernels to be computed by NumPy, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def in_graphs(input: Tensor) -> bool:
    """Whether a compiler's graph should hold this backend's kernels instead of the operator."""
    return input.device.type == "cuda" and input.dtype in _DTYPES


def explain(
    operator: str,
    *,
    dtype: torch.dtype,
    **_: object,
) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    how = " (interpreted)" if interpreted() else ""
    if operator.startswith("conv_bn_act") and dtype in _DTYPES:
        return f"triton: implicit GEMM{how}"
    if operator == "norm_conv_bn_act" and dtype in _DTYPES:
        return f"triton: normalize + implicit GEMM, in one launch where that should pay{how}"
    if operator.startswith("batch_norm_act") and dtype in _DTYPES:
        statistics = "statistics + " if operator == "batch_norm_act_training" else ""
        return f"triton: {statistics}normalize{how}"
    return "triton: " + library.explain(operator)


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
    if _can_run(*tensors):
        conv = launchers()
        problem = conv.problem_of(
            input, weight, stride, padding, dilation, groups, residual is not None
        )
        choice = conv.choose(problem, input.device)
        if choice.kernel in TILED and _is_traced(input):
            return _operators().triton_conv_bn_act(*arguments)
        if choice.kernel == "triton":
            return conv.conv_bn_act(*arguments, tile=choice.tile)
        if choice.kernel == "cuda":
            return cuda.conv_bn_act(*arguments, tile=choice.tile)
        is_narrow = residual is not None and residual.size(1) < weight.size(0)
        if choice.kernel.startswith("cudnn") and not is_narrow and not _is_traced(input):
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
        and not _is_traced(input)
        and input.numel() > 0
        and _can_run(input, weight, *norm, *behind, bias, residual)
    ):
        tile = _prologue_tile(input, weight, *geometry, residual is not None)
    rest = (*behind, eps, bias, *geometry, groups, residual, activation)
    if tile is None:
        normalised = batch_norm_act_inference(input, *norm, in_eps, None, "relu")
        return conv_bn_act(normalised, weight, *rest)
    training = _training()
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
    conv = launchers()
    problem = conv.problem_of(input, weight, stride, padding, dilation, 1, residual)
    if input.device.type == "cuda":
        return prologue_choice.choose(problem, architecture.of_device(input.device))[0]
    return _training().INTERPRETED_TILE if conv.kernel_for(problem) == "conv" else None


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
    pool = (*pool_kernel_size, *pool_stride, *pool_padding)
    if _can_run(input, weight, running_mean, running_var, bn_weight, bn_bias, bias):
        conv = launchers()
        problem = conv.problem_of(input, weight, *geometry, groups, False, pool)
        if conv.kernel_for(problem) == "stem_pool":
            choice = conv.choose(problem, input.device)
            if choice.kernel == "triton":
                arguments = (*leading, *geometry, activation)
                if _is_traced(input):
                    return _operators().triton_conv_bn_act_max_pool(*arguments)
                return conv.conv_bn_act_max_pool(*arguments, tile=choice.tile)
        else:
            out = conv_bn_act(*leading, *geometry, groups, None, activation)
            return torch.max_pool2d(out, pool_kernel_size, pool_stride, pool_padding)
    return library.conv_bn_act_max_pool(
        *leading, *geometry, groups, activation, pool_kernel_size, pool_stride, pool_padding
    )


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
    if _can_normalize(input, weight, bias, residual):
        return _norms().batch_norm_act_training(*arguments)
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
    if not _can_normalize(input, *others):
        return None
    return _norms().batch_norm_add_relu(input, norm, residual, residual_norm)


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
    if not _can_normalize(input, grad, *norm[:4], residual, *residual_norm[:4]):
        return None
    return _norms().batch_norm_add_relu_backward(grad, output, input, norm, residual, residual_norm)


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
    if _can_normalize(input, running_mean, running_var, weight, bias, residual):
        return _norms().batch_norm_act_inference(*arguments)
    return library.batch_norm_act_inference(*arguments)


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
    if _can_normalize(input, grad, output, weight, bias, mean, var):
        return _norms().batch_norm_act_backward(*leading, overwrite)
    return library.batch_norm_act_backward(*leading)


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of this tensor, (C,), in the accumulation dtype."""
    if _can_normalize(input):
        return _norms().batch_statistics(input)
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
    if _can_normalize(input, grad, output, weight, bias, mean, var):
        total, dot, _ = _norms().batch_norm_act_backward_sums(*arguments)
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
    if _can_normalize(input, grad, output, weight, bias, mean, var):
        return _norms().batch_norm_act_backward_input(*leading, *sums, overwrite)
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
    if not _can_normalize(input, weight, bias) or not _is_channels_last(input):
        return None
    stem = _stem()
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
    return _stem().max_pool_backward(grad, offsets, size, pool)


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
    if not _can_train(input, weight, bias, groups):
        return None
    conv, training = launchers(), _training()
    tile = training.INTERPRETED_TILE
    if input.device.type == "cuda":
        problem = conv.problem_of(input, weight, stride, padding, dilation, groups, False)
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
    training = _training()
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
    training = _training()
    mean, var, bn_weight, bn_bias, eps = norm
    raw = raw.contiguous(memory_format=torch.channels_last)
    masked = torch.empty_like(raw)
    total, dot, grad_weight = _norms().batch_norm_act_backward_sums(
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
    if max(stride) > 1 or min(around) < 0 or not _can_train(grad, weight, residual, groups):
        return None
    if grad.device.type != "cuda":
        return _training().INTERPRETED_TILE
    transposed = weight.new_empty((C, grad.size(1), R, S), device="meta")
    problem = launchers().problem_of(
        grad, transposed, stride, around, dilation, groups, residual is not None
    )
    gpu = architecture.of_device(grad.device)
    return training_choice.backward(problem, above, below is not None, gpu)[0]


def _can_train(input: Tensor, weight: Tensor, other: Tensor | None, groups: int) -> bool:
    """Whether the kernels of `training_conv.py` take a convolution: channels_last, one group."""
    dtypes = _DTYPES if input.device.type != "cuda" else (torch.float16, torch.bfloat16)
    return (
        groups == 1
        and input.dtype in dtypes
        and _can_run(input, weight, other)
        and not _is_traced(input)
        and input.numel() > 0
        and weight.numel() > 0
        and suggest_memory_format(input) is torch.channels_last
    )


def _can_normalize(input: Tensor, *others: Tensor | None) -> bool:
    """Whether dtype, size and devices are those the kernels of `norm.py` take."""
    return (
        input.dtype in _DTYPES
        and not _is_traced(input)
        and input.numel() > 0
        and all(t is None or t.device == input.device for t in others)
    )


def _is_channels_last(input: Tensor) -> bool:
    """Whether it is dense, and what follows it would lie likewise."""
    return (
        input.dim() == 4
        and suggest_memory_format(input) is torch.channels_last
        and input.is_contiguous(memory_format=torch.channels_last)
    )


def residual_blocks(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
) -> Tensor | None:
    """Whole Bottlenecks in a launch each: see `blocks.residual_blocks`, `ops.residual_blocks`.

    A BasicBlock runs on the CUDA backend's kernel where that was measured to be the fastest.
    """
    if input.dtype not in _CHAIN_DTYPES:
        return None
    from . import chains

    described = list(described_blocks(tensors, numbers, eps, layer_counts, projections))
    if (problem := basic_block.problem_of(input, described)) is not None:
        if input.device.type != "cuda":
            return None
        choice = tuning.choose(problem, input.device)
        if choice.tile is None or choice.source == ESTIMATE:
            return None
        return cuda.run_basic_block(input, *described[0][0], choice.tile)
    launchers()
    return chains.residual_blocks(input, described)


def release(tensors: Iterable[Tensor]) -> None:
    """Drops what was made of these weights; see `bottleneck._arranged`."""
    # Nothing was made where the module was never imported.
    module = sys.modules.get(f"{__name__}.bottleneck")
    if module is not None:
        module.release(tensors)


def run_chain(arguments: tuple, problem: ChainProblem, choice: Choice) -> tuple[Tensor, ...]:
    """All that a chain consists of, as chosen, for those who time it; see `tuner.ChainCase`."""
    launchers()
    from . import chains

    reduced, x, *layers = arguments
    out, following = chains.run(reduced, x, layers, problem, choice)
    if layers[-1] is None:
        return (out,)
    if following is None:
        following = conv_bn_act(out, *layers[-1], None, "relu")
    return out, following


def _can_run(input: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Whether dtypes and devices are those the kernels take."""
    return (
        input.dtype in _DTYPES
        and weight.dtype is input.dtype
        and all(t is None or t.device == input.device for t in (weight, *others))
    )


def _is_traced(input: Tensor) -> bool:
    return type(input) not in (Tensor, Parameter)


@functools.cache
def _operators() -> Any:
    from . import graphs

    return graphs


@functools.cache
def launchers() -> ModuleType:
    """`conv.py`, imported when it is first needed, since it needs Triton."""
    if interpreted():
        from .interpreter import repair

        repair()
    from . import conv

    return conv


@functools.cache
def _norms() -> ModuleType:
    """`norm.py`, imported likewise."""
    launchers()
    from . import norm as batch_norm

    return batch_norm


@functools.cache
def _training() -> ModuleType:
    """`training_conv.py`, imported likewise."""
    launchers()
    from . import training_conv

    return training_conv


@functools.cache
def _stem() -> ModuleType:
    """`stem.py`, imported likewise."""
    launchers()
    from . import stem as stem_training

    return stem_training
