"""What is wrong with the arguments of the functions in `functional.py`.

The functions return the exception instead of raising it, or None: `functional` raises it, a fused
module runs unfused and so raises what an unfused one raises. They run before every convolution, so
they look at each tensor once and build messages only where one is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import activation as activations
from .activation import PLAIN
from .description import Block, ConvNorm, Norm, Pool, output_size

_REDUCED = (torch.float16, torch.bfloat16)
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# No stride, padding or dilation is larger, so that sizes computed from them fit into 64 bits.
_LARGEST = 2**31 - 1


def pair(value: int | Sequence[int], what: str) -> tuple[int, int]:
    """One or two numbers as two; unlike the others, this raises.

    Raises:
        TypeError: `value` is neither a number nor a sequence.
        ValueError: it is a sequence of another length.
    """
    if type(value) is tuple and len(value) == 2:
        return value
    if isinstance(value, int):
        return (value, value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) == 1:
            return (value[0], value[0])
        if len(value) == 2:
            return (value[0], value[1])
        raise ValueError(f"{what} has {len(value)} numbers, must be one or two: {value}")
    raise TypeError(f"{what} is {value!r}, must be an int or a pair of ints")


def conv_error(
    name: str,
    input: Tensor,
    layer: ConvNorm,
    residual: Tensor | None,
    activation: str,
    shape: Sequence[int] | None = None,
    statistics: bool = True,
) -> ValueError | TypeError | None:
    """What is wrong with the arguments of `conv_bn_act`, or None; it is returned, not raised.

    A `shape` stands for the input's own, so that there need not be a tensor of it. Without
    `statistics`, those of the batch will do and the running ones may be None.
    """
    weight, norm, bias, stride, padding, dilation, groups = layer
    for what, tensor in (("input", input), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            return _not_a_tensor(name, what, tensor)
        if tensor.dim() != 4:
            return ValueError(f"{name}: {what} has {tensor.dim()} dimensions, must have 4")
        if tensor.layout is not torch.strided:
            return _layout_error(name, what, tensor)
    N, C, H, W = input.shape if shape is None else shape
    K, group_channels, R, S = weight.shape
    if not isinstance(groups, int):
        return TypeError(f"{name}: groups is {groups!r}, must be an int")
    if groups < 1:
        return ValueError(f"{name}: groups is {groups}, must be at least 1")
    if group_channels * groups != C:
        return ValueError(
            f"{name}: weight has {group_channels * groups} input channels, input has {C} "
            f"(groups={groups})"
        )
    if K % groups:
        return ValueError(
            f"{name}: groups is {groups}, which does not divide the {K} output channels of weight"
        )
    error = (
        _numbers_error(name, "stride", stride, 1)
        or _numbers_error(name, "padding", padding, 0)
        or _numbers_error(name, "dilation", dilation, 1)
    )
    if error is not None:
        return error
    if not (K and C and R and S):
        return ValueError(
            f"{name}: weight has shape {(K, group_channels, R, S)}, must not be empty"
        )
    P, Q = output_size((H, W), (R, S), stride, padding, dilation)
    if P < 1 or Q < 1:
        return ValueError(
            f"{name}: weight of {R} x {S} with dilation {dilation} does not fit into input of "
            f"{H} x {W} with padding {padding}"
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
            norm[:4],
            2 if statistics else 0,
        )
        or _eps_error(name, norm.eps)
        or _act_error(name, input, residual, (N, K, P, Q), activation)
    )


def prologue_error(name: str, input: Tensor, before: Norm) -> ValueError | TypeError | None:
    """What is wrong with the norm before a convolution without errors of its own, or None."""
    names = ("in_mean", "in_var", "in_weight", "in_bias")
    error = _norm_error(name, input, input.size(1), names, before[:4], 2)
    return error or _eps_error(name, before.eps, "in_eps")


def blocks_fit(input: Tensor, blocks: Sequence[Block]) -> bool:
    """Whether no convolution of these blocks has an error; see `ops.residual_blocks`."""
    shape: Sequence[int] | None = tuple(input.shape)
    for block in blocks:
        shortcut = shape
        if block.has_projection and shape is not None:
            shortcut = _conv_shape(input, shape, block.layers[-1])
        for layer in block.main:
            shape = None if shape is None else _conv_shape(input, shape, layer)
        if shape is None or shape != shortcut:
            return False
    return True


def block_key(input: Tensor, block: Block) -> tuple[Any, ...]:
    """All of a block and its input that `conv_error` looks at, of plain tensors with strides."""
    device = input.device
    key: list[Any] = [input.shape, input.dtype, device, input.layout, *block[1:]]
    key += (torch.is_autocast_enabled(device.type), torch.is_grad_enabled())
    for weight, norm, bias, stride, padding, dilation, groups in block.layers:
        mean, var, bn_weight, bn_bias, eps = norm
        key += (tuple(stride), tuple(padding), tuple(dilation), groups, eps)
        for tensor in (weight, mean, var, bn_weight, bn_bias, bias):
            if tensor is None:
                key.append(None)
            else:
                key += (tensor.shape, tensor.dtype, tensor.device, tensor.layout)
        key += (mean is not None and mean.requires_grad, var is not None and var.requires_grad)
    return tuple(key)


_fits: dict[tuple[Any, ...], bool] = {}
_MOST_FITS = 2048


def plain_block_fits(input: Tensor, block: Block) -> bool:
    """`blocks_fit(input, [block])` of plain tensors, found once."""
    key = block_key(input, block)
    fits = _fits.get(key)
    if fits is None:
        if len(_fits) >= _MOST_FITS:
            _fits.clear()
        fits = _fits[key] = blocks_fit(input, [block])
    return fits


def _conv_shape(input: Tensor, shape: Sequence[int], layer: ConvNorm) -> Sequence[int] | None:
    """The output's shape where `shape` is the input's, or None if something does not fit."""
    if conv_error("conv_bn_act", input, layer, None, "relu", shape) is not None:
        return None
    return layer.output_shape(shape)


def pool_error(
    name: str, input: Tensor, layer: ConvNorm, pool: Pool
) -> ValueError | TypeError | None:
    """What is wrong with the pooling that follows a convolution without errors, or None."""
    pool_kernel_size, pool_stride, pool_padding = pool
    error = (
        _numbers_error(name, "pool_kernel_size", pool_kernel_size, 1)
        or _numbers_error(name, "pool_stride", pool_stride, 1)
        or _numbers_error(name, "pool_padding", pool_padding, 0)
    )
    if error is not None:
        return error
    if any(2 * p > k for p, k in zip(pool_padding, pool_kernel_size, strict=True)):
        return ValueError(
            f"{name}: pool_padding is {pool_padding}, must be at most half of pool_kernel_size, "
            f"{pool_kernel_size}"
        )
    _, _, P, Q = layer.output_shape(input.shape)
    if (
        P + 2 * pool_padding[0] < pool_kernel_size[0]
        or Q + 2 * pool_padding[1] < pool_kernel_size[1]
    ):
        return ValueError(
            f"{name}: pool_kernel_size {pool_kernel_size} does not fit into the convolution's "
            f"output of {P} x {Q} with pool_padding {pool_padding}"
        )
    return None


def batch_norm_error(
    name: str,
    input: Tensor,
    norm: Norm,
    training: bool,
    momentum: float,
    residual: Tensor | None,
    activation: str,
    shared: bool = False,
) -> ValueError | TypeError | None:
    """What is wrong with the arguments of `batch_norm_act`, or None; it is returned, not raised.

    `shared` says that other processes add their values to the batch.
    """
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
        if not shared and shape[0] * math.prod(shape[2:]) == 1:
            return ValueError(
                f"Expected more than 1 value per channel when training, got input size {shape}"
            )
        if norm.eps == 0:
            return ValueError(f"{name}: eps is {norm.eps}, must be positive when training")
    return (
        _norm_error(
            name,
            input,
            shape[1],
            ("running_mean", "running_var", "weight", "bias"),
            norm[:4],
            0 if training else 2,
        )
        or _eps_error(name, norm.eps)
        or _act_error(name, input, residual, shape, activation)
    )


def _numbers_error(
    name: str, what: str, numbers: Sequence[int], least: int
) -> ValueError | TypeError | None:
    if len(numbers) != 2:
        return ValueError(f"{name}: {what} has {len(numbers)} numbers, must have two")
    first, second = numbers
    if not (isinstance(first, int) and isinstance(second, int)):
        return TypeError(f"{name}: {what} is {numbers}, must be ints")
    if least <= first <= _LARGEST and least <= second <= _LARGEST:
        return None
    return ValueError(f"{name}: {what} is {numbers}, must be at least {least} and below 2^31")


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
        if index < 2 and tensor.requires_grad and torch.is_grad_enabled():
            return ValueError(
                f"{name}: {names[index]} requires a gradient, but statistics get none"
            )
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


def _eps_error(name: str, eps: float, what: str = "eps") -> ValueError | TypeError | None:
    if not isinstance(eps, (int, float)):
        return TypeError(f"{name}: {what} is {eps!r}, must be a number")
    if not eps >= 0:
        return ValueError(f"{name}: {what} is {eps}, must not be negative")
    return None


def _act_error(
    name: str,
    input: Tensor,
    residual: Tensor | None,
    shape: Sequence[int],
    activation: str,
) -> ValueError | TypeError | None:
    if activation not in PLAIN and (wrong := activations.error(activation)) is not None:
        return ValueError(f"{name}: activation is {activation!r}, {wrong}")
    if residual is not None:
        if not isinstance(residual, Tensor):
            return _not_a_tensor(name, "residual", residual)
        if residual.shape != shape and not _is_narrower(residual.shape, shape):
            return _shape_error(name, "residual", residual, shape)
        if residual.dtype is not input.dtype and not _autocasts(input.device):
            return _dtype_error(name, "residual", residual, f"that of input, {input.dtype}")
        if residual.device != input.device:
            return _device_error(name, "residual", residual, input.device)
        if residual.layout is not torch.strided:
            return _layout_error(name, "residual", residual)
    return None


def _is_narrower(shape: Sequence[int], full: Sequence[int]) -> bool:
    """Whether only channels are missing."""
    return (
        len(shape) == len(full)
        and (shape[0], *shape[2:]) == (full[0], *full[2:])
        and 0 < shape[1] < full[1]
    )


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
