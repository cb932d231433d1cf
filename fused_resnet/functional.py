"""Differentiable functions on tensors: arguments are checked here and run by the operators."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from . import ops, reference
from .layers import checks
from .layers.description import ConvNorm, Norm, Pool
from .ops.conv_bn_act_max_pool import run_conv_bn_act_max_pool
from .ops.registration import transforms_active
from .ops.running_statistics import run_batch_norm_act, run_sync_batch_norm_act


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    pad_residual: bool = False,
    activation: str = "relu",
) -> Tensor:
    """Convolution, batch norm with running statistics, residual add and activation in one.

    `activation(bn_weight (conv2d(input, weight, bias) - running_mean) / sqrt(running_var + eps)
    + bn_bias + residual)`; differentiable, twice, in everything but the running statistics.

    Args:
        input: (N, C, H, W); float32, bfloat16, float16 or float64.
        weight: (K, C / groups, R, S), of the input's dtype.
        running_mean: (K,), of the input's dtype, or float32 beside a 16-bit input.
        running_var: as `running_mean`.
        bn_weight: as `running_mean`, or None for ones.
        bn_bias: as `running_mean`, or None for zeros.
        eps: added to the variance.
        bias: (K,), the convolution's own, of the input's dtype.
        stride: as `conv2d`'s.
        padding: as `conv2d`'s, in numbers.
        dilation: as `conv2d`'s.
        groups: as `conv2d`'s.
        residual: (N, K, P, Q), of the input's dtype; it is not broadcast.
        pad_residual: whether a residual may have fewer channels, at least one, and then stands for
            one that has them in the middle, between channels of zeros, of an odd number of these
            one more behind: a shortcut without parameters.
        activation: "none", "relu", "relu6", "hardtanh(-1, 1)", "leaky_relu(0.01)", "silu",
            "hardswish", "gelu" or "gelu_tanh": torch's functions of these names, the last one
            `gelu` with `approximate="tanh"`. The numbers in brackets are those that are meant
            without any, and may be others.

    Returns:
        (N, K, P, Q), in the dtype and memory format `conv2d` would return.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: a shape, device or number does not fit.
    """
    name = "conv_bn_act"
    norm = Norm(running_mean, running_var, bn_weight, bn_bias, eps)
    layer = _layer(name, weight, norm, bias, (stride, padding, dilation), groups)
    error = checks.conv_error(name, input, layer, residual, activation)
    if error is None:
        error = _padding_error(name, residual, weight.size(0), pad_residual)
    if error is not None:
        raise error
    if transforms_active():
        arguments = (*layer.flat(), residual, activation)
        return reference.conv_bn_act(input, *arguments)
    return ops.conv_bn_act.conv_bn_act(input, layer, residual, activation)


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
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    residual: Tensor | None = None,
    pad_residual: bool = False,
    activation: str = "relu",
) -> Tensor:
    """Batch norm and ReLU while a convolution loads its input, then all of `conv_bn_act`.

    `conv_bn_act(h, weight, ...)` of
    `h = relu(in_weight (input - in_mean) / sqrt(in_var + in_eps) + in_bias)`: what a
    pre-activation block (He et al., "Identity Mappings in Deep Residual Networks", figure 4 (e))
    or a layer of a DenseNet (Huang et al., "Densely Connected Convolutional Networks", section 3)
    has before its convolutions. h is rounded to the input's dtype, and the convolution pads h, not
    the input, with zeros. Differentiable, twice, in everything but the statistics; for backward h
    is not kept, but computed again.

    Where the backend has a kernel for it, input and residual are read and the output is written
    once, so h costs no memory traffic; elsewhere h is written once and read once besides.

    Args:
        input: (N, C, H, W); float32, bfloat16, float16 or float64.
        in_mean: (C,), of the input's dtype, or float32 beside a 16-bit input.
        in_var: as `in_mean`.
        in_weight: as `in_mean`, or None for ones.
        in_bias: as `in_mean`, or None for zeros.
        in_eps: added to `in_var`.
        weight: see `conv_bn_act`, as for all that follow.
        running_mean: see `conv_bn_act`.
        running_var: see `conv_bn_act`.
        bn_weight: see `conv_bn_act`.
        bn_bias: see `conv_bn_act`.
        eps: see `conv_bn_act`.
        bias: see `conv_bn_act`.
        stride: see `conv_bn_act`.
        padding: see `conv_bn_act`.
        dilation: see `conv_bn_act`.
        groups: see `conv_bn_act`.
        residual: see `conv_bn_act`.
        pad_residual: see `conv_bn_act`.
        activation: see `conv_bn_act`; what comes before the convolution is always a ReLU.

    Returns:
        (N, K, P, Q), in the dtype and memory format `conv2d` would return.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: a shape, device or number does not fit.
    """
    name = "norm_conv_bn_act"
    before = Norm(in_mean, in_var, in_weight, in_bias, in_eps)
    norm = Norm(running_mean, running_var, bn_weight, bn_bias, eps)
    layer = _layer(name, weight, norm, bias, (stride, padding, dilation), groups)
    error = checks.conv_error(name, input, layer, residual, activation)
    if error is None:
        error = checks.prologue_error(name, input, before)
    if error is None:
        error = _padding_error(name, residual, weight.size(0), pad_residual)
    if error is not None:
        raise error
    if transforms_active():
        arguments = (*before, *layer.flat(), residual, activation)
        return reference.norm_conv_bn_act(input, *arguments)
    return ops.norm_conv_bn_act.norm_conv_bn_act(input, before, layer, residual, activation)


def conv_bn_act_max_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None = None,
    bn_bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    activation: str = "relu",
    pool_kernel_size: int | Sequence[int],
    pool_stride: int | Sequence[int] | None = None,
    pool_padding: int | Sequence[int] = 0,
) -> Tensor:
    """`max_pool2d(conv_bn_act(...))`: a residual network's stem.

    Args:
        input: as the other unnamed ones, see `conv_bn_act`.
        weight: see `conv_bn_act`.
        running_mean: see `conv_bn_act`.
        running_var: see `conv_bn_act`.
        bn_weight: see `conv_bn_act`.
        bn_bias: see `conv_bn_act`.
        eps: see `conv_bn_act`.
        bias: see `conv_bn_act`.
        stride: see `conv_bn_act`.
        padding: see `conv_bn_act`.
        dilation: see `conv_bn_act`.
        groups: see `conv_bn_act`.
        activation: see `conv_bn_act`.
        pool_kernel_size: as `max_pool2d`'s `kernel_size`.
        pool_stride: as `max_pool2d`'s `stride`; None stands for `pool_kernel_size`.
        pool_padding: as `max_pool2d`'s `padding`, at most half of `pool_kernel_size`.

    Returns:
        What `max_pool2d(conv_bn_act(...))` would.

    Raises:
        TypeError: see `conv_bn_act`.
        ValueError: see `conv_bn_act`.
    """
    name = "conv_bn_act_max_pool"
    norm = Norm(running_mean, running_var, bn_weight, bn_bias, eps)
    layer = _layer(name, weight, norm, bias, (stride, padding, dilation), groups)
    kernel_size = checks.pair(pool_kernel_size, f"{name}: pool_kernel_size")
    pool = Pool(
        kernel_size,
        kernel_size if pool_stride is None else checks.pair(pool_stride, f"{name}: pool_stride"),
        checks.pair(pool_padding, f"{name}: pool_padding"),
    )
    error = checks.conv_error(name, input, layer, None, activation)
    if error is None:
        error = checks.pool_error(name, input, layer, pool)
    if error is not None:
        raise error
    return run_conv_bn_act_max_pool(input, layer, activation, pool)


def batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    pad_residual: bool = False,
    activation: str = "relu",
) -> Tensor:
    """Batch norm, residual add and activation in one: `activation(batch_norm(input) + residual)`.

    Differentiable, twice, in everything but the running statistics.

    Args:
        input: (N, C, *); float32, bfloat16, float16 or float64.
        running_mean: (C,), of the input's dtype, or float32 beside a 16-bit input; may be None
            when training. When training it is updated in place as `F.batch_norm` does.
        running_var: as `running_mean`.
        weight: as `running_mean`, or None for ones.
        bias: as `running_mean`, or None for zeros.
        training: normalise with the batch's statistics instead of the running ones.
        momentum: the weight of the batch in the running statistics.
        eps: added to the variance.
        residual: of the input's shape and dtype; it is not broadcast.
        pad_residual: see `conv_bn_act`.
        activation: see `conv_bn_act`.

    Returns:
        As `input`.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: a shape, device or number does not fit, or, as from `F.batch_norm`, training
            has one value per channel.
    """
    name = "batch_norm_act"
    norm = Norm(running_mean, running_var, weight, bias, eps)  # type: ignore[arg-type]  # now checked
    error = checks.batch_norm_error(name, input, norm, training, momentum, residual, activation)
    if error is None:
        error = _padding_error(name, residual, input.size(1), pad_residual)
    if error is not None:
        raise error
    return run_batch_norm_act(input, norm, training, momentum, residual, activation)


def sync_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    group: dist.ProcessGroup,
    residual: Tensor | None = None,
    pad_residual: bool = False,
    activation: str = "relu",
) -> Tensor:
    """`batch_norm_act` in training, with the statistics of all processes' batches together.

    Each process of `group` calls it with a batch of its own, which may be empty, and gets its own
    output. Differentiable once: the gradients of input and residual are those of the joint batch,
    those of weight and bias this process's part of them, as `nn.SyncBatchNorm`'s. Forward exchanges
    one message, and so does backward where the input's gradient is needed.

    Unlike `nn.SyncBatchNorm` it takes tensors of any device whose backend of `torch.distributed`
    gathers and reduces float64, so of the CPU too.

    Args:
        input: (N, C, *); float32, bfloat16, float16 or float64; N may differ between processes.
        running_mean: see `batch_norm_act`; updated in place, alike in all processes.
        running_var: as `running_mean`.
        weight: see `batch_norm_act`.
        bias: see `batch_norm_act`.
        momentum: see `batch_norm_act`.
        eps: see `batch_norm_act`.
        group: the processes.
        residual: see `batch_norm_act`.
        pad_residual: see `conv_bn_act`.
        activation: see `batch_norm_act`.

    Returns:
        As `input`.

    Raises:
        TypeError: see `batch_norm_act`.
        ValueError: see `batch_norm_act`; one value a channel is enough here.
        RuntimeError: a functorch transform or forward-mode differentiation is active.
    """
    name = "sync_batch_norm_act"
    norm = Norm(running_mean, running_var, weight, bias, eps)  # type: ignore[arg-type]  # now checked
    error = checks.batch_norm_error(
        name, input, norm, True, momentum, residual, activation, shared=True
    )
    if error is None:
        error = _padding_error(name, residual, input.size(1), pad_residual)
    if error is not None:
        raise error
    if transforms_active():
        raise RuntimeError(
            "sync_batch_norm_act: has no rule for functorch transforms or forward-mode "
            "differentiation"
        )
    return run_sync_batch_norm_act(input, norm, momentum, group, residual, activation)


def _layer(
    name: str,
    weight: Tensor,
    norm: Norm,
    bias: Tensor | None,
    geometry: tuple[int | Sequence[int], int | Sequence[int], int | Sequence[int]],
    groups: int,
) -> ConvNorm:
    """The layer that users' keywords describe, its stride, padding and dilation two numbers each.

    Raises:
        TypeError: one of these is neither a number nor a sequence.
        ValueError: it is a sequence of another length.
    """
    stride, padding, dilation = geometry
    return ConvNorm(
        weight,
        norm,
        bias,
        checks.pair(stride, f"{name}: stride"),
        checks.pair(padding, f"{name}: padding"),
        checks.pair(dilation, f"{name}: dilation"),
        groups,
    )


def _padding_error(
    name: str, residual: Tensor | None, channels: int, pad_residual: bool
) -> ValueError | None:
    """What is wrong with the number of channels of a residual that fits otherwise."""
    if residual is None or pad_residual or residual.size(1) == channels:
        return None
    return ValueError(
        f"{name}: residual has {residual.size(1)} channels, must have the output's {channels}, or "
        "pad_residual=True must say that zeros stand for the others"
    )
