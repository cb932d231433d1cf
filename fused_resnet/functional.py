"""Differentiable functions on tensors: arguments are checked here and run by the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference

ACTIVATIONS = ("relu", "none")
_REDUCED = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        activation: "relu" or "none".

    Returns:
        (N, K, P, Q), in the dtype and memory format `conv2d` would return.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: a shape, device or number does not fit.
    """
    name = "conv_bn_act"
    stride = _pair(stride, f"{name}: stride")
    padding = _pair(padding, f"{name}: padding")
    dilation = _pair(dilation, f"{name}: dilation")
    error = conv_error(
        name,
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
    if error is not None:
        raise error
    function = reference.conv_bn_act if transforms_active() else ops.conv_bn_act
    return function(
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
    stride = _pair(stride, f"{name}: stride")
    padding = _pair(padding, f"{name}: padding")
    dilation = _pair(dilation, f"{name}: dilation")
    pool_kernel_size = _pair(pool_kernel_size, f"{name}: pool_kernel_size")
    pool_stride = (
        pool_kernel_size if pool_stride is None else _pair(pool_stride, f"{name}: pool_stride")
    )
    pool_padding = _pair(pool_padding, f"{name}: pool_padding")
    convolution = (
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
    )
    pool = (pool_kernel_size, pool_stride, pool_padding)
    error = conv_error(name, *convolution, None, activation)
    if error is None:
        error = pool_error(name, *convolution, *pool)
    if error is not None:
        raise error
    return run_conv_bn_act_max_pool(*convolution, activation, *pool)


def run_conv_bn_act_max_pool(
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
    *pool: Sequence[int],
) -> Tensor:
    """`conv_bn_act_max_pool` with its arguments checked and in the operator's order."""
    convolution = (
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
    )
    if transforms_active():
        return reference.conv_bn_act_max_pool(*convolution, activation, *pool)
    if ops.registration.needs_grad(input, weight, bn_weight, bn_bias, bias):
        # What the pooling's backward needs is then kept, not computed again.
        return F.max_pool2d(ops.conv_bn_act(*convolution, None, activation), *pool)
    return ops.conv_bn_act_max_pool(*convolution, activation, *pool)


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
        activation: "relu" or "none".

    Returns:
        As `input`.

    Raises:
        TypeError: an argument's type or dtype is not one of the above.
        ValueError: a shape, device or number does not fit, or, as from `F.batch_norm`, training
            has one value per channel.
    """
    error = batch_norm_error(
        "batch_norm_act",
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
    )
    if error is not None:
        raise error
    return run_batch_norm_act(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        training,
        momentum,
        eps,
        residual,
        activation,
    )


def run_batch_norm_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`batch_norm_act` with its arguments checked."""
    if transforms_active():
        return reference.batch_norm_act(
            input,
            running_mean,
            running_var,
            weight,
            bias,
            training,
            momentum,
            eps,
            residual=residual,
            activation=activation,
        )
    if not training:
        return ops.batch_norm_act_inference(
            input, running_mean, running_var, weight, bias, eps, residual, activation
        )
    output, mean, var = ops.batch_norm_act_training(
        input, weight, bias, eps, residual, activation
    )
    count = input.numel() // max(input.size(1), 1)
    if count > 0:
        with torch.no_grad():
            if running_mean is not None:
                _update(running_mean, mean, momentum)
            if running_var is not None:
                _update(running_var, var * (count / (count - 1)), momentum)
    return output


def _update(running: Tensor, batch: Tensor, momentum: float) -> None:
    """`running = (1 - momentum) running + momentum batch`, rounded once."""
    if running.dtype is batch.dtype:
        running.lerp_(batch, momentum)
    else:
        running.copy_(torch.lerp(running.to(batch.dtype), batch, momentum))


def transforms_active() -> bool:
    """Whether a functorch transform or forward-mode differentiation is under way.

    The operators have no rule for either; the reference consists of operators that do.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _pair(value: int | Sequence[int], what: str) -> tuple[int, int]:
    if type(value) is tuple and len(value) == 2:
        return value
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 1:
            return (value[0], value[0])
        if len(value) == 2:
            return tuple(value)
        raise ValueError(f"{what} has {len(value)} numbers, must be one or two: {value}")
    raise TypeError(f"{what} is {value!r}, must be an int or a pair of ints")


def conv_error(
    name: str,
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    residual: Tensor | None,
    activation: str,
) -> ValueError | TypeError | None:
    """What is wrong with the arguments of `conv_bn_act`, or None; it is returned, not raised."""
    for what, tensor in (("input", input), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            return _not_a_tensor(name, what, tensor)
        if tensor.dim() != 4:
            return ValueError(f"{name}: {what} has {tensor.dim()} dimensions, must have 4")
        if tensor.layout is not torch.strided:
            return _layout_error(name, what, tensor)
    N, C, _, _ = input.shape
    K, group_channels, R, S = weight.shape
    if not isinstance(groups, int):
        return TypeError(f"{name}: groups is {groups!r}, must be an int")
    if groups < 1:
        return ValueError(f"{name}: groups is {groups}, must be at least 1")
    if C != group_channels * groups:
        return ValueError(
            f"{name}: weight has {group_channels * groups} input channels, input has {C} "
            f"(groups={groups})"
        )
    if K % groups:
        return ValueError(
            f"{name}: groups is {groups}, which does not divide the {K} output channels of weight"
        )
    for what, (first, second), least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if first < least or second < least:
            return ValueError(f"{name}: {what} is {(first, second)}, must be at least {least}")
    P, Q = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    if P < 1 or Q < 1 or not (K and C and R and S):
        return ValueError(
            f"{name}: weight {tuple(weight.shape)} with dilation {dilation} does not fit into input "
            f"{tuple(input.shape)} with padding {padding}"
        )
    dtype, device = input.dtype, input.device
    if weight.dtype is not dtype and not _autocasts(device):
        return _dtype_error(name, "weight", weight, f"that of input, {dtype}")
    if weight.device != device:
        return _device_error(name, "weight", weight, device)
    if bias is not None:
        if not isinstance(bias, Tensor):
            return _not_a_tensor(name, "bias", bias)
        if bias.shape != (K,):
            return _shape_error(name, "bias", bias, (K,))
        if bias.dtype is not weight.dtype:
            return _dtype_error(name, "bias", bias, f"that of weight, {weight.dtype}")
        if bias.device != device:
            return _device_error(name, "bias", bias, device)
    return (
        _norm_error(
            name,
            input,
            K,
            ("running_mean", "running_var", "bn_weight", "bn_bias"),
            (running_mean, running_var, bn_weight, bn_bias),
            2,
        )
        or _eps_error(name, eps)
        or _act_error(name, input, residual, (N, K, P, Q), activation)
    )


def pool_error(
    name: str,
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    pool_kernel_size: tuple[int, int],
    pool_stride: tuple[int, int],
    pool_padding: tuple[int, int],
) -> ValueError | None:
    """What is wrong with the pooling that follows a convolution without errors, or None."""
    for what, (first, second), least in (
        ("pool_kernel_size", pool_kernel_size, 1),
        ("pool_stride", pool_stride, 1),
        ("pool_padding", pool_padding, 0),
    ):
        if first < least or second < least:
            return ValueError(f"{name}: {what} is {(first, second)}, must be at least {least}")
    P, Q = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    for kernel, pad in zip(pool_kernel_size, pool_padding, strict=True):
        if 2 * pad > kernel:
            return ValueError(
                f"{name}: pool_padding is {pool_padding}, must be at most half of "
                f"pool_kernel_size, {pool_kernel_size}"
            )
    if P + 2 * pool_padding[0] < pool_kernel_size[0] or Q + 2 * pool_padding[1] < pool_kernel_size[1]:
        return ValueError(
            f"{name}: pool_kernel_size {pool_kernel_size} does not fit into the convolution's output "
            f"of {P} x {Q} with pool_padding {pool_padding}"
        )
    return None


def conv_output_size(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """(P, Q) of a convolution of (N, C, H, W) with (K, C / groups, R, S)."""
    _, _, H, W = input_shape
    _, _, R, S = weight_shape
    P = (H + 2 * padding[0] - dilation[0] * (R - 1) - 1) // stride[0] + 1
    Q = (W + 2 * padding[1] - dilation[1] * (S - 1) - 1) // stride[1] + 1
    return P, Q


def batch_norm_error(
    name: str,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> ValueError | TypeError | None:
    """What is wrong with the arguments of `batch_norm_act`, or None; it is returned, not raised."""
    if not isinstance(input, Tensor):
        return _not_a_tensor(name, "input", input)
    shape = input.shape
    if len(shape) < 2:
        return ValueError(f"{name}: input has {len(shape)} dimensions, must have at least 2")
    if input.layout is not torch.strided:
        return _layout_error(name, "input", input)
    if not isinstance(momentum, (int, float)):
        return TypeError(f"{name}: momentum is {momentum!r}, must be a number")
    if training:
        if shape[0] * math.prod(shape[2:]) == 1:
            return ValueError(
                f"Expected more than 1 value per channel when training, got input size {shape}"
            )
        if eps == 0:
            return ValueError(f"{name}: eps is {eps}, must be positive when training")
    return (
        _norm_error(
            name,
            input,
            shape[1],
            ("running_mean", "running_var", "weight", "bias"),
            (running_mean, running_var, weight, bias),
            0 if training else 2,
        )
        or _eps_error(name, eps)
        or _act_error(name, input, residual, shape, activation)
    )


def _norm_error(
    name: str,
    input: Tensor,
    channels: int,
    names: Sequence[str],
    tensors: Sequence[Tensor | None],
    required: int,
) -> ValueError | TypeError | None:
    """What is wrong with a batch norm's tensors, of which the first `required` may not be None."""
    device, input_dtype = input.device, input.dtype
    if input_dtype not in _FLOATING:
        return _dtype_error(name, "input", input, " or ".join(map(str, _FLOATING)))
    shared = None
    for index, tensor in enumerate(tensors):
        if tensor is None and index >= required:
            continue
        if not isinstance(tensor, Tensor):
            return _not_a_tensor(name, names[index], tensor)
        if tensor.shape != (channels,):
            return _shape_error(name, names[index], tensor, (channels,))
        if tensor.device != device:
            return _device_error(name, names[index], tensor, device)
        dtype = tensor.dtype
        if dtype is shared:
            continue
        if shared is not None:
            return _dtype_error(
                name, names[index], tensor, f"{shared} as the other batch-norm tensors"
            )
        shared = dtype
        if dtype is not input_dtype and not (
            dtype is torch.float32 and (input_dtype in _REDUCED or _autocasts(device))
        ):
            return _dtype_error(
                name,
                names[index],
                tensor,
                f"that of input, {input_dtype}, or float32 if that has 16 bits",
            )
    return None


def _eps_error(name: str, eps: float) -> ValueError | TypeError | None:
    if not isinstance(eps, (int, float)):
        return TypeError(f"{name}: eps is {eps!r}, must be a number")
    if not eps >= 0:
        return ValueError(f"{name}: eps is {eps}, must not be negative")
    return None


def _act_error(
    name: str, input: Tensor, residual: Tensor | None, shape: Sequence[int], activation: str
) -> ValueError | TypeError | None:
    if activation not in ACTIVATIONS:
        return ValueError(
            f"{name}: activation is {activation!r}, must be one of {', '.join(ACTIVATIONS)}"
        )
    if residual is not None:
        if not isinstance(residual, Tensor):
            return _not_a_tensor(name, "residual", residual)
        if residual.shape != shape:
            return _shape_error(name, "residual", residual, shape)
        if residual.dtype is not input.dtype and not _autocasts(input.device):
            return _dtype_error(name, "residual", residual, f"that of input, {input.dtype}")
        if residual.device != input.device:
            return _device_error(name, "residual", residual, input.device)
        if residual.layout is not torch.strided:
            return _layout_error(name, "residual", residual)
    return None


def _autocasts(device: torch.device) -> bool:
    return torch.is_autocast_enabled(device.type)


def _not_a_tensor(name: str, what: str, value: object) -> TypeError:
    return TypeError(f"{name}: {what} is a {type(value).__name__}, must be a Tensor")


def _layout_error(name: str, what: str, tensor: Tensor) -> TypeError:
    return TypeError(f"{name}: {what} has layout {tensor.layout}, must have {torch.strided}")


def _shape_error(name: str, what: str, tensor: Tensor, shape: Sequence[int]) -> ValueError:
    return ValueError(f"{name}: {what} has shape {tuple(tensor.shape)}, must have {tuple(shape)}")


def _dtype_error(name: str, what: str, tensor: Tensor, expected: str) -> TypeError:
    return TypeError(f"{name}: {what} has dtype {tensor.dtype}, must have {expected}")


def _device_error(name: str, what: str, tensor: Tensor, device: torch.device) -> ValueError:
    return ValueError(f"{name}: {what} is on {tensor.device}, input is on {device}")
