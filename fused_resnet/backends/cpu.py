"""The CPU backend: a native convolution with everything after it in its epilogue.

What the native convolution does not cover goes to the library's, finished by `scale_shift_act`.
Batch norm's training has native statistics and a native backward.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.layout import contiguous_like_eager
from ..ops.scale_shift_act import scale_shift_act
from . import library

__all__ = [
    "available",
    "batch_norm_act_backward",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "empty_cache",
    "explain",
    "release",
    "residual_blocks",
]

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The filter's taps the kernel keeps offsets for, kMaxRuns in csrc/cpu/conv.h.
_MOST_TAPS = 1024

# Stands for a tensor that is not there, in a list of tensors.
_ABSENT = torch.empty(0, device="cpu")
_ISA: str = torch.ops.fused_resnet.conv_isa()
_conv_bn_act_packed = torch.ops.fused_resnet.conv_bn_act_packed.default
_residual_blocks_packed = torch.ops.fused_resnet.residual_blocks_packed.default
_pack_conv_weight = torch.ops.fused_resnet.pack_conv_weight.default
_batch_statistics = torch.ops.fused_resnet.batch_statistics.default
_batch_norm_act_backward = torch.ops.fused_resnet.batch_norm_act_backward.default
_norm_vectors = torch.ops.fused_resnet.norm_vectors.default
_pool_empty_like = torch.ops.fused_resnet.pool_empty_like.default


def available() -> str:
    """Always "yes": the package does not import without its host library."""
    return "yes"


def explain(
    operator: str,
    *,
    dtype: torch.dtype,
    weight_shape: Sequence[int] = (),
    groups: int = 1,
    **_: object,
) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    if operator.startswith("conv_bn_act"):
        pooled = operator == "conv_bn_act_max_pool"
        if _is_native(dtype, tuple(weight_shape), groups) and not (pooled and groups > 1):
            return f"cpu: native convolution ({_ISA})"
    if operator == "batch_norm_act_training":
        return "cpu: native statistics + scale_shift_act"
    return "cpu: " + library.explain(operator)


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
    """One pass: see csrc/cpu/conv.h for the formula and the memory traffic."""
    if not _is_native(input.dtype, weight.shape, groups):
        return library.conv_bn_act(
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
    return _conv_bn_act_packed(
        input,
        weight,
        _packed(weight, groups),
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        eps,
        bias,
        *stride,
        *padding,
        *dilation,
        groups,
        residual,
        activation == "relu",
        (),
    )


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
    """One pass: the convolution's rows are pooled while they are in the cache."""
    if groups > 1 or not _is_native(input.dtype, weight.shape, groups):
        return library.conv_bn_act_max_pool(
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
            activation,
            pool_kernel_size,
            pool_stride,
            pool_padding,
        )
    return _conv_bn_act_packed(
        input,
        weight,
        _packed(weight, groups),
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        eps,
        bias,
        *stride,
        *padding,
        *dilation,
        groups,
        None,
        activation == "relu",
        (*pool_kernel_size, *pool_stride, *pool_padding),
    )


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics in one pass (csrc/cpu/batch_norm.cpp), everything else in another."""
    input = contiguous_like_eager(input)
    if input.numel() == 0:
        mean, var = library.batch_statistics(input)
    else:
        mean, var = _batch_statistics(input)
    scale, shift, _ = _vectors(mean, var, weight, bias, eps, input.dtype)
    return scale_shift_act(input, scale, shift, residual, activation), mean, var


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
    scale, shift, _ = _vectors(running_mean, running_var, weight, bias, eps, input.dtype)
    return scale_shift_act(contiguous_like_eager(input), scale, shift, residual, activation)


def _vectors(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """`library.scale_and_shift`'s two, and `1 / sqrt(var + eps)`, in one call.

    Forward and backward must come to the same bits: where they do not, a mask is not the one used.
    """
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    tensors = (t if t is None else t.to(accumulate).contiguous() for t in (mean, var, weight, bias))
    return _norm_vectors(*tensors, eps)


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
    """Gradients of `batch_norm_act`, in one pass that reduces and one that does not.

    Args:
        grad: of the output.
        input: the normalised tensor.
        output: what the activation returned; may be None where there is no residual, since the sign
            of that is then computed again from the input.
        weight: (C,) or None.
        bias: (C,) or None.
        mean: (C,), of the batch when training.
        var: (C,), biased, of the batch when training.
        eps: added to `var`.
        activation: "relu" or "none".
        training: whether `mean` and `var` are functions of the input.
        need: which gradients to compute: the input's, the weight's, the bias's, the residual's.
        overwrite: whether `grad` may be overwritten, by the input's gradient.

    Returns:
        The gradients, None where not needed; those of weight and bias in the accumulation dtype.
    """
    input = contiguous_like_eager(input)
    relu = activation == "relu"
    need_input, need_weight, need_bias, need_residual = need
    if grad.stride() != input.stride():
        grad = _pool_empty_like(input).copy_(grad)
        overwrite = relu or not need_residual  # whose gradient may be `grad` itself
    if output is not None and output.stride() != input.stride():
        output = _pool_empty_like(input).copy_(output)
    scale, shift, invstd = _vectors(mean, var, weight, bias, eps, input.dtype)
    mean = mean.to(scale.dtype).contiguous()
    masked = _pool_empty_like(input) if need_residual and relu else None
    grad_input = None
    if need_input:
        grad_input = grad if overwrite else _pool_empty_like(input)
    total, dot = _batch_norm_act_backward(
        grad, input, output, mean, invstd if training else None, scale, shift, relu, grad_input,
        masked,
    )  # fmt: skip
    return (
        grad_input,
        dot.mul_(invstd) if need_weight else None,
        total if need_bias else None,
        (masked if relu else grad) if need_residual else None,
    )


def residual_blocks(input: Tensor, blocks: Sequence[tuple[Sequence[tuple], bool]]) -> Tensor | None:
    """Whole blocks in one call: see csrc/cpu/residual_blocks.cpp, and `ops.residual_blocks`."""
    tensors: list[Tensor] = []
    numbers: list[int] = []
    epsilons: list[float] = []
    layer_counts: list[int] = []
    projections: list[int] = []
    dtype = input.dtype
    for layers, has_projection in blocks:
        for (
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
        ) in layers:
            if not _is_native(dtype, weight.shape, groups):
                return None
            tensors += (
                weight,
                _packed(weight, groups),
                running_mean,
                running_var,
                _ABSENT if bn_weight is None else bn_weight,
                _ABSENT if bn_bias is None else bn_bias,
                _ABSENT if bias is None else bias,
            )
            numbers += (*stride, *padding, *dilation, groups)
            epsilons.append(eps)
        layer_counts.append(len(layers))
        projections.append(int(has_projection))
    try:
        return _residual_blocks_packed(input, tensors, numbers, epsilons, layer_counts, projections)
    except RuntimeError:
        # Shapes, dtypes or devices that do not go together: step by step the reason comes out.
        return None


def release(tensors: Iterable[Tensor]) -> None:
    """Drops the packed copies of these weights."""
    for tensor in tensors:
        _cache.pop(id(tensor), None)


def empty_cache() -> None:
    """Returns to the system the memory kept for coming outputs, and drops every packed weight."""
    _cache.clear()
    torch.ops.fused_resnet.cpu_pool_trim()


@functools.lru_cache(maxsize=1024)
def _is_native(dtype: torch.dtype, weight_shape: tuple[int, ...], groups: int) -> bool:
    if not _ISA or dtype not in _NATIVE_DTYPES:
        return False
    if dtype is torch.bfloat16 and torch.cpu._is_amx_tile_supported():
        # The library multiplies bfloat16 in matrix registers, the native kernel in vectors.
        return False
    K, group_c, R, S = weight_shape
    if R * S > _MOST_TAPS:
        return False
    group_k = K // groups
    lanes = 16 if _ISA == "avx512" else 8
    # Groups either fill vectors of output channels by themselves or share one evenly.
    shares_a_vector = group_k < lanes and lanes % group_k == 0 and group_c <= group_k
    return groups == 1 or group_k % lanes == 0 or shares_a_vector


class _Entry(NamedTuple):
    weight: weakref.ref[Tensor]
    # Held so that no other weight can come to lie at the same address while the entry lives.
    storage: torch.UntypedStorage
    pointer: int
    version: int
    groups: int
    packed: Tensor


_cache: dict[int, _Entry] = {}


def _packed(weight: Tensor, groups: int) -> Tensor:
    """The weight in the kernel's layout, made once per storage and version of `weight`.

    Its values are the weight's own, since batch norm is applied in the epilogue; so nothing else
    can make a packed weight stale.
    """
    key = id(weight)
    entry = _cache.get(key)
    if (
        entry is not None
        and entry.weight() is weight
        and entry.pointer == weight.data_ptr()
        and entry.groups == groups
        and not weight.is_inference()
        and entry.version == weight._version
    ):
        return entry.packed
    packed = _pack_conv_weight(weight, groups)
    if not weight.is_inference():  # such a tensor has no version to tell changes by
        forget = functools.partial(_forget, key)
        _cache[key] = _Entry(
            weakref.ref(weight, forget),
            weight.untyped_storage(),
            weight.data_ptr(),
            weight._version,
            groups,
            packed,
        )
    return packed


def _forget(key: int, dead: weakref.ref[Tensor]) -> None:
    entry = _cache.get(key)
    # The address may already belong to another weight.
    if entry is not None and entry.weight is dead:
        del _cache[key]
