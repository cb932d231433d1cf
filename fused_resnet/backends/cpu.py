"""The CPU backend: a native convolution with everything after it in its epilogue.

What the native convolution does not cover goes to the library's, finished by `scale_shift_act`.
Batch norm's training has native statistics and a native backward.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native  # noqa: F401  (registers the operators)
from ..layers import watch
from ..layers.convolution import conv2d
from ..layers.description import Block, ConvNorm, Norm, Pool, Sums
from ..layers.memory import contiguous_like_eager
from ..layers.prepared import WeightCache, version_of
from ..layers.quantized import Quantization, QuantizedBlock, QuantizedConv, QuantizedStem
from . import cpu_plans, library
from .backend import Backend, Gradients
from .library import scale_shift_act
from .recording import Recorder

__all__ = [
    "Cpu",
    "batch_norm_act_backward",
    "batch_norm_act_backward_input",
    "batch_norm_act_backward_sums",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "batch_statistics",
    "conv_batch_norm_statistics",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "conv_input_gradient",
    "conv_weight_gradient",
    "convolution",
    "empty_cache",
    "explain",
    "has_kernel",
    "max_pool_backward",
    "norm_conv_bn_act",
    "pool_linear",
    "release",
    "residual_blocks",
    "tile_products",
]

_NATIVE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The filter's taps the kernel keeps offsets for, kMaxRuns in csrc/cpu/conv.h.
_MOST_TAPS = 1024
# Of the gradient in a weight on tiles.
_GRADIENTS_ON_TILES = (torch.bfloat16, torch.float32)
# Channels of a group with which tiles are half full, `fills_tiles()` in csrc/cpu/conv_layer.cpp.
_LEAST_ON_TILES = 16
# The images for which `pool_linear` is faster than torch's operators.
_MOST_IMAGES = 16
# And their pixels, kMostPixels in csrc/cpu/pool_linear.cpp.
_MOST_PIXELS = 2**24
# The largest window it pools, kLargestPool there.
_LARGEST_POOL = 1024

# Stands for a tensor that is not there, in a list of tensors.
_ABSENT = torch.empty(0, device="cpu")
_ISA: str = torch.ops.fused_resnet.conv_isa()
_TILE_ISA: str = torch.ops.fused_resnet.conv_tile_isa()
# `_op` is what the wrapper in Python calls, which these would feel.
_conv_bn_act_packed = torch.ops.fused_resnet.conv_bn_act_packed.default._op
_norm_conv_bn_act_packed = torch.ops.fused_resnet.norm_conv_bn_act_packed.default
_residual_blocks_packed = torch.ops.fused_resnet.residual_blocks_packed.default._op
_pool_linear = torch.ops.fused_resnet.pool_linear.default
_pack_conv_weight = torch.ops.fused_resnet.pack_conv_weight.default
_conv_weight_is_packed = torch.ops.fused_resnet.conv_weight_is_packed.default
_batch_statistics = torch.ops.fused_resnet.batch_statistics.default._op
_train_batch_norm_act = torch.ops.fused_resnet.train_batch_norm_act.default._op
_batch_norm_act_backward = torch.ops.fused_resnet.batch_norm_act_backward.default._op
_batch_norm_act_backward_sums = torch.ops.fused_resnet.batch_norm_act_backward_sums.default._op
_batch_norm_act_backward_input = torch.ops.fused_resnet.batch_norm_act_backward_input.default._op
_conv_training = torch.ops.fused_resnet.conv_training.default._op
_conv_input_gradient = torch.ops.fused_resnet.conv_input_gradient.default._op
_conv_weight_gradient = torch.ops.fused_resnet.conv_weight_gradient.default._op
_max_pool_gradient = torch.ops.fused_resnet.max_pool_gradient.default
_quantized_kernels = torch.ops.fused_resnet.quantized_kernels.default
_pack_quantized_conv = torch.ops.fused_resnet.pack_quantized_conv.default
_quantized_residual_blocks_packed = torch.ops.fused_resnet.quantized_residual_blocks_packed.default
_quantized_stem_packed = torch.ops.fused_resnet.quantized_stem_packed.default
_norm_vectors = torch.ops.fused_resnet.norm_vectors.default._op
_pool_empty_like = torch.ops.fused_resnet.pool_empty_like.default._op


def explain(
    operator: str,
    *,
    dtype: torch.dtype,
    weight_shape: Sequence[int] = (),
    input_shape: Sequence[int] = (),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    **_: object,
) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    if "conv_bn_act" in operator and _is_native(dtype, tuple(weight_shape), groups):
        pooled = operator == "conv_bn_act_max_pool"
        before = "norm + " if operator == "norm_conv_bn_act" else ""
        isa = _TILE_ISA if _on_tiles(dtype, weight_shape, groups) else _ISA
        if dtype in (torch.float32, torch.float16):
            outputs = None
            if input_shape:
                outputs = input_shape[0]
                for size, r, *geometry in zip(
                    input_shape[2:], weight_shape[2:], stride, padding, dilation, strict=True
                ):
                    outputs *= _outputs(size, r, *geometry)
            isa = _isa_in_parts(dtype, weight_shape, tuple(stride), groups, pooled, outputs)
        if not (pooled and groups > 1):
            return f"cpu: native {before}convolution ({isa})"
    if operator == "quantized_residual_blocks":
        fastest, *_ = _quantized_kernels().split(",")
        return f"cpu: whole blocks in eight bits ({fastest})"
    if operator == "quantized_stem":
        fastest, *_ = _quantized_kernels().split(",")
        return f"cpu: convolution in integers + pooling ({fastest})"
    if operator == "batch_norm_act_training":
        return "cpu: native statistics + scale_shift_act"
    return "cpu: " + library.explain(operator)


def _outputs(size: int, taps: int, stride: int, padding: int, dilation: int) -> int:
    """How many outputs a convolution has along an axis."""
    return (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1


def _isa_in_parts(
    dtype: torch.dtype,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    groups: int,
    pooled: bool,
    outputs: int | None,
) -> str:
    """What runs a convolution of float32 or float16 and so many output pixels, or any number."""
    least = torch.ops.fused_resnet.float32_pixels_for_tiles(weight_shape, stride, groups, pooled)
    if least < 0 or (outputs is not None and outputs < least):
        return _ISA
    products = tile_products(dtype)
    tiles = f"{_TILE_ISA}, {products} product{'s' if products != 1 else ''}"
    if outputs is not None or least <= 1:
        return tiles
    return f"{tiles}, from {least} output pixels on, else {_ISA}"


# Which of torch's settings for float32 convolutions lets them be less exact, and how many products
# of bfloat16 then stand for one of float32, instead of six.
_PRODUCTS = {"tf32": 3, "bf16": 1}
_products = 6
_products_lock = threading.Lock()
# The setting that was last followed.
_precision = ""
_float32_precision = functools.partial(torch._C._get_fp32_precision_getter, "mkldnn", "conv")


def _follow_precision() -> None:
    """Has the native kernels compute float32 as exactly as torch's setting says now."""
    global _precision
    precision = _float32_precision()
    if tile_products(torch.float32) != _products:
        _set_products()
    _precision = precision


def tile_products(dtype: torch.dtype) -> int | None:
    """How many products of bfloat16 tiles stand for one of such values; None where none do."""
    if dtype is not torch.float32:
        return {torch.bfloat16: 1, torch.float16: 3}.get(dtype)
    return _PRODUCTS.get(_float32_precision(), 6)


def _set_products() -> None:
    global _products
    with _products_lock:
        _products = _PRODUCTS.get(_float32_precision(), 6)
        torch.ops.fused_resnet.set_float32_products(_products)


def conv_bn_act(input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str) -> Tensor:
    """One pass: see csrc/cpu/conv.h for the formula and the memory traffic."""
    if not _is_native(input.dtype, layer.weight.shape, layer.groups):
        weight, norm, *rest = layer
        return batch_norm_act_inference(conv2d(input, weight, *rest), norm, residual, activation)
    return _convolve(_conv_bn_act_packed, (input,), layer, residual, activation == "relu", ())


def _convolve(
    operator: Callable[..., Tensor | None], before: tuple[Any, ...], layer: ConvNorm, *behind: Any
) -> Tensor:
    """A native operator, whose arguments come before and behind the layer."""
    weight, norm, bias, stride, padding, dilation, groups = layer
    if _TILE_ISA and _float32_precision() != _precision:
        _follow_precision()
    behind = (*norm, bias, *stride, *padding, *dilation, groups, *behind)
    out = operator(*before, weight, _packed(weight, groups), *behind)
    if out is None:
        out = operator(*before, weight, _packed_anew(weight, groups), *behind)
    if out is None:
        out = operator(*before, *_packed_copy(weight, groups), *behind)
        assert out is not None
    return out


def has_kernel(dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> bool:
    """Whether such a convolution is native, with what comes before and behind it."""
    return _is_native(dtype, tuple(weight_shape), groups)


def norm_conv_bn_act(
    input: Tensor, before: Norm, layer: ConvNorm, residual: Tensor | None, activation: str
) -> Tensor:
    """One pass: what the convolution reads is normalised on its way into the cache."""
    if not _is_native(input.dtype, layer.weight.shape, layer.groups):
        normalised = batch_norm_act_inference(input, before, None, "relu")
        return conv_bn_act(normalised, layer, residual, activation)
    return _convolve(
        _norm_conv_bn_act_packed, (input, *before), layer, residual, activation == "relu"
    )


def conv_bn_act_max_pool(input: Tensor, layer: ConvNorm, activation: str, pool: Pool) -> Tensor:
    """One pass: the convolution's rows are pooled while they are in the cache."""
    native = _is_native(input.dtype, layer.weight.shape, layer.groups)
    if layer.groups > 1 or max(pool.kernel_size) > _LARGEST_POOL or not native:
        return F.max_pool2d(conv_bn_act(input, layer, None, activation), *pool)
    kernel_size, stride, padding = pool
    numbers = (*kernel_size, *stride, *padding)
    return _convolve(_conv_bn_act_packed, (input,), layer, None, activation == "relu", numbers)


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
        return scale_shift_act(input, mean, var, residual, activation), mean, var, None
    weight, bias = _in_accumulation_dtype(input, weight, bias)
    return _train_batch_norm_act(input, weight, bias, eps, residual, activation, keep_mask)


def conv_batch_norm_statistics(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Sequence[Any],
    prologue: Norm | None,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """In one pass, where there are tiles: see csrc/cpu/conv_training.cpp."""
    stride, padding, dilation, groups = geometry
    if (
        not _TILE_ISA
        or not _trains(input.dtype, weight.shape, weight.stride(1), groups)
        or weight.dtype is not input.dtype
        or input.numel() == 0
        or not input.is_contiguous(memory_format=torch.channels_last)
        or (input.is_contiguous() and weight.is_contiguous())
    ):
        return None
    if input.dtype is torch.float32 and _float32_precision() != _precision:
        _follow_precision()
    if bias is not None:
        (bias,) = _in_accumulation_dtype(input, bias)
    norm = (None, None, None, None, 0.0) if prologue is None else prologue
    return _conv_training(
        input, weight, bias, *stride, *padding, *dilation, groups, *norm, statistics
    )


def convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any]
) -> Tensor | None:
    """The first of `conv_batch_norm_statistics`, to the same bits, or None where that is."""
    found = conv_batch_norm_statistics(input, weight, bias, geometry, None, False)
    return None if found is None else found[0]


@functools.lru_cache(maxsize=1024)
def _trains(dtype: torch.dtype, weight_shape: torch.Size, c_stride: int, groups: int) -> bool:
    """Whether the native kernel, rather than the library's, is a convolution's forward pass."""
    K, C = weight_shape[:2]
    return (
        dtype in _GRADIENTS_ON_TILES
        and (groups == 1 or (C >= _LEAST_ON_TILES and K // groups >= _LEAST_ON_TILES))
        and _is_native(dtype, tuple(weight_shape), groups)
        # Packing a weight whose input channels do not lie together takes longer.
        and (c_stride == 1 or C == 1)
    )


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance, (C,) each, float32 (float64 for float64), in one pass."""
    input = contiguous_like_eager(input)
    return library.batch_statistics(input) if input.numel() == 0 else _batch_statistics(input)


def batch_norm_act_inference(
    input: Tensor, norm: Norm, residual: Tensor | None, activation: str
) -> Tensor:
    """Everything in one pass."""
    scale, shift = _norm_vectors(*_in_accumulation_dtype(input, *norm[:4]), norm.eps)
    return scale_shift_act(contiguous_like_eager(input), scale, shift, residual, activation)


def _in_accumulation_dtype(input: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """(C,) parameters as the native operators take them."""
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    result = []
    for p in parameters:
        if p is not None and not (p.dtype is dtype and p.is_contiguous()):
            p = p.to(dtype).contiguous()
        result.append(p)
    return tuple(result)


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
    if copied:
        overwrite = relu or not need_residual  # whose gradient may be `grad` itself
    masked = _pool_empty_like(input) if need_residual and relu else None
    grad_input = None
    if need_input:
        grad_input = grad if overwrite else _pool_empty_like(input)
    grad_weight, grad_bias = _batch_norm_act_backward(
        grad, input, output, *_parameters(input, norm), relu, training, grad_input, masked
    )
    return (
        grad_input,
        grad_weight if need_weight else None,
        grad_bias if need_bias else None,
        (masked if relu else grad) if need_residual else None,
    )


def _parameters(input: Tensor, norm: Norm) -> tuple[Any, ...]:
    """Weight, bias, mean, variance and eps, as the native operators of backward take them."""
    mean, var, weight, bias, eps = norm
    return *_in_accumulation_dtype(input, weight, bias, mean, var), eps


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
    return _batch_norm_act_backward_sums(
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
    grad_input = grad if copied or (overwrite and not need_residual) else _pool_empty_like(input)
    total, dot, count = sums
    vectors = _in_accumulation_dtype(input, total, dot)
    _batch_norm_act_backward_input(
        grad, input, output, *_parameters(input, norm), relu, *vectors, float(count), grad_input
    )
    return grad_input, residual


def conv_input_gradient(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    geometry: Sequence[Any],
    add_to: Tensor | None = None,
) -> Tensor | None:
    """The gradient of a convolution in its input, by the forward's own kernel.

    Args:
        grad: of the output, (N, K, P, Q).
        input: (N, C, H, W), of which only the shape, dtype and layout matter.
        weight: (K, C, R, S).
        geometry: stride, padding and dilation, two numbers each, and groups.
        add_to: a tensor like `input` to add the gradient to, in place; may be None.

    Returns:
        The gradient, `add_to` itself if there is one; None, with nothing done, where the kernel
        does not cover the convolution: with a stride it has to be 1x1 without padding.
    """
    stride, padding, dilation, groups = geometry
    _, C, R, S = weight.shape
    pointwise = R == S == 1
    if (
        groups != 1
        or not _is_native(input.dtype, weight.shape, 1)
        or not grad.dtype is weight.dtype is input.dtype
        or not (input.is_contiguous(memory_format=torch.channels_last) or input.is_contiguous())
        # Packing a weight whose input channels do not lie together takes longer than it saves.
        or (weight.stride(1) != 1 and C > 1)
    ):
        return None
    if tuple(stride) == (1, 1):
        covered = 0 <= padding[0] <= dilation[0] * (R - 1) and 0 <= padding[1] <= dilation[1] * (
            S - 1
        )
    else:
        covered = pointwise and not any(padding)
    if not covered or (add_to is not None and add_to.shape != input.shape):
        return None
    out = _pool_empty_like(input) if add_to is None else add_to
    if _TILE_ISA and _float32_precision() != _precision:
        _follow_precision()
    _conv_input_gradient(grad, weight, *stride, *padding, *dilation, out, add_to is not None)
    return out


def conv_weight_gradient(
    grad: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[Any]
) -> Tensor | None:
    """The gradient of a convolution in its weight, on tiles (csrc/cpu/weight_gradient.h).

    Sums are float32, in an order that the shapes alone decide.

    Args:
        grad: of the output, (N, K, P, Q).
        input: (N, C, H, W).
        weight: (K, C / groups, R, S), of which only the shape, dtype and layout matter.
        geometry: stride, padding and dilation, two numbers each, and groups.

    Returns:
        The gradient, in the weight's layout; None where there are no tiles, groups have so few
        channels that the library is faster, or the dtype is neither bfloat16 nor float32.
    """
    stride, padding, dilation, groups = geometry
    K, C, R, S = weight.shape
    if (
        not _TILE_ISA
        or input.dtype not in _GRADIENTS_ON_TILES
        or not grad.dtype is weight.dtype is input.dtype
        or C < _LEAST_ON_TILES
        or K // groups < _LEAST_ON_TILES
        or R * S > _MOST_TAPS
        or not _is_dense(weight)
    ):
        return None
    out = _pool_empty_like(weight)
    _conv_weight_gradient(grad, input, *stride, *padding, *dilation, groups, out)
    return out


def _is_dense(weight: Tensor) -> bool:
    return weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)


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
        max(pool[0]) > _LARGEST_POOL
        or input.is_contiguous()
        or not input.is_contiguous(memory_format=torch.channels_last)
    ):
        return None
    vectors = _norm_vectors(*_in_accumulation_dtype(input, *norm[:4]), norm.eps)
    numbers = [number for pair in pool for number in pair]
    grad = grad.contiguous(memory_format=torch.channels_last)
    return _max_pool_gradient(grad, input, *vectors, numbers)


def _lying_alike(
    grad: Tensor, input: Tensor, output: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, bool]:
    """The three in one dense layout, but for bits, and whether `grad` is a copy of our own."""
    input = contiguous_like_eager(input)
    copied = grad.stride() != input.stride()
    if copied:
        grad = _pool_empty_like(input).copy_(grad)
    is_mask = output is None or output.dtype is torch.uint8
    if not is_mask and output.stride() != input.stride():
        output = _pool_empty_like(input).copy_(output)
    return grad, input, output, copied


def residual_blocks(input: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """Whole blocks in one call: see csrc/cpu/residual_blocks.cpp, and `ops.residual_blocks`."""
    native: list[Tensor] = []
    numbers: list[int] = []
    eps: list[float] = []
    layer_counts: list[int] = []
    projections: list[int] = []
    dtype = input.dtype
    is_float32 = dtype is torch.float32
    if _TILE_ISA and _float32_precision() != _precision:
        _follow_precision()
    for layers, has_projection, step, _ in blocks:
        for weight, norm, bias, stride, padding, dilation, groups in layers:
            entry = _cache.find(weight) if is_float32 else None
            if entry is not None and not entry.whole:
                # Of this dtype all that is packed is native, if it lies as it did: the kernel says.
                packed = entry.copy
            elif _is_native(dtype, weight.shape, groups):
                packed = _packed(weight, groups)
            else:
                return None
            mean, var, bn_weight, bn_bias, bn_eps = norm
            native += (
                weight,
                packed,
                mean,
                var,
                _ABSENT if bn_weight is None else bn_weight,
                _ABSENT if bn_bias is None else bn_bias,
                _ABSENT if bias is None else bias,
            )
            numbers += (*stride, *padding, *dilation, groups)
            eps.append(bn_eps)
        layer_counts.append(len(layers))
        projections.append(-step if step else has_projection)
    described = (numbers, eps, layer_counts, projections)
    try:
        out = _residual_blocks_packed(input, native, *described)
        for pack in (_as_packed_anew, _packed_copy):
            if out is not None:
                break
            for i, groups in zip(range(0, len(native), 7), numbers[6::7], strict=True):
                if not _is_native(dtype, native[i].shape, groups):
                    return None
                native[i : i + 2] = pack(native[i], groups)
            out = _residual_blocks_packed(input, native, *described)
        return out
    except ValueError:
        # Shapes, dtypes or devices that do not go together: step by step the reason comes out.
        return None


def pool_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """A network's head: see csrc/cpu/pool_linear.cpp, and `ops.pool_linear`."""
    if not _ISA or input.dtype not in _NATIVE_DTYPES or not 0 < input.size(0) <= _MOST_IMAGES:
        return None
    _, C, H, W = input.shape
    # What does not go together is left to torch's operators, which say what.
    if (
        weight.dtype is not input.dtype
        or weight.device != input.device
        or not 0 < H * W <= _MOST_PIXELS
    ):
        return None
    if weight.dim() != 2 or weight.size(1) != C:
        return None
    if bias is not None and (bias.dtype is not input.dtype or bias.shape != weight.shape[:1]):
        return None
    side_by_side = input.stride(1) == 1 or input.stride(3) == 1
    dense = weight.stride(1) == 1 and (bias is None or bias.stride(0) == 1)
    return _pool_linear(input, weight, bias) if side_by_side and dense else None


def release(tensors: Iterable[Tensor]) -> None:
    """Drops the packed copies of these weights, and the plans that have some."""
    tensors = list(tensors)
    _cache.release(tensors)
    cpu_plans.release(tensors)


def empty_cache() -> None:
    """Returns to the system the memory kept for coming outputs, and drops every packed weight."""
    _cache.clear()
    cpu_plans.clear()
    torch.ops.fused_resnet.cpu_pool_trim()


def _on_tiles(dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> bool:
    """Whether the kernel multiplies tiles: `conv_isa()` in csrc/cpu/conv_layer.cpp."""
    if not _TILE_ISA or dtype is not torch.bfloat16:
        return False
    return groups == 1 or (weight_shape[1] >= 16 and weight_shape[0] // groups >= 16)


@functools.lru_cache(maxsize=1024)
def _is_native(dtype: torch.dtype, weight_shape: tuple[int, ...], groups: int) -> bool:
    """Whether the native kernel runs such convolutions."""
    if dtype not in _NATIVE_DTYPES:
        return False
    if _on_tiles(dtype, weight_shape, groups):
        return weight_shape[2] * weight_shape[3] <= _MOST_TAPS
    if not _ISA:
        return False
    K, group_c, R, S = weight_shape
    if R * S > _MOST_TAPS:
        return False
    group_k = K // groups
    lanes = 16 if _ISA == "avx512" else 8
    # Groups either fill vectors of output channels by themselves or share one evenly.
    shares_a_vector = group_k < lanes and lanes % group_k == 0 and group_c <= group_k
    return groups == 1 or group_k % lanes == 0 or shares_a_vector


_cache = WeightCache()


def _packed(weight: Tensor, groups: int) -> Tensor:
    """The weight in the kernel's layout, made once per storage and version of `weight`.

    Its values are the weight's own, since batch norm is applied in the epilogue; so nothing else
    can make a packed weight stale. Whether the weight still lies as it did, and has a sample of its
    values, is for the kernel to find out.
    """
    entry = _cache.find(weight)
    if entry is not None and (
        not entry.whole or _conv_weight_is_packed(weight, entry.copy, groups)
    ):
        return entry.copy
    return _packed_anew(weight, groups)


def _packed_anew(weight: Tensor, groups: int) -> Tensor:
    """For a weight that is not in the cache, or was written without a new version.

    What was packed before is not overwritten: another thread may be reading it.
    """
    version = version_of(weight)  # before the values, which another thread may change
    packed = _pack_conv_weight(weight, groups)
    # Other processes write without a version.
    whole = watch.is_watched(weight) or weight.untyped_storage().is_shared()
    _cache.put(weight, version, packed, whole=whole)
    return packed


def _as_packed_anew(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    return weight, _packed_anew(weight, groups)


def _packed_copy(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """A copy that nobody writes to, and that packed: for a weight that is being written to."""
    copy = weight.detach().clone()
    return copy, _pack_conv_weight(copy, groups)


def run_quantized_blocks(
    input: Tensor,
    blocks: Sequence[QuantizedBlock],
    stored: Quantization,
    output: Quantization,
    kernels: str = "",
) -> Tensor | None:
    """`reference.quantized_residual_blocks`, or None where a projection is more than a 1x1.

    Args:
        input: see there.
        blocks: see there.
        stored: see there.
        output: see there.
        kernels: one of `torch.ops.fused_resnet.quantized_kernels()`; "" for the fastest.
    """
    packed: list[Tensor] = []
    numbers: list[int] = []
    for block in blocks:
        for conv in block.convs:
            packed.append(_packed_quantized(conv))
            numbers += (*conv.weight.shape, *conv.stride, *conv.padding, *conv.dilation)
            numbers.append(conv.groups)
    counts = [len(block.convs) for block in blocks]
    projections = [int(block.has_projection) for block in blocks]
    scales = [block.shortcut_scale for block in blocks]
    return _quantized_residual_blocks_packed(
        input, packed, numbers, counts, projections, scales, *stored, output.step, kernels
    )


def run_quantized_stem(
    input: Tensor,
    stem: QuantizedStem,
    stored: Quantization,
    output: Quantization,
    kernels: str = "",
) -> Tensor:
    """`reference.quantized_stem`.

    Args:
        input: see there.
        stem: see there; it has one group.
        stored: see there.
        output: see there.
        kernels: see `run_quantized_blocks`.
    """
    conv, low, pool = stem
    channels = conv.weight.shape[1]
    unit = channels if channels <= _NARROW else _PIXEL
    packed = _packed_quantized(conv, unit)
    packed_low = None if low is None else _packed_quantized(low, unit)
    numbers = (*conv.weight.shape, *conv.stride, *conv.padding, *conv.dilation, conv.groups)
    pooling = (*pool.kernel_size, *pool.stride, *pool.padding)
    return _quantized_stem_packed(
        input, packed, packed_low, numbers, pooling, *stored, output.step, kernels
    )


_quantized_cache = WeightCache()
# What a pixel's bytes are a multiple of, kBytePixel in csrc/cpu/quantized/conv.h.
_PIXEL = 16
# Up to so many channels of a stem a pixel has no other bytes, kMostNarrow in stem.cpp.
_NARROW = 8


def _packed_quantized(conv: QuantizedConv, unit: int = _PIXEL) -> Tensor:
    layout = (conv.scale, conv.shift, conv.dilation[1], conv.groups, unit)
    entry = _quantized_cache.get(id(conv.weight))
    # Eight-bit copies are never written to, so who they are says what they hold.
    if (
        entry is not None
        and entry.owner() is conv.weight
        and all(a is b for a, b in zip(entry.layout, layout, strict=True))
    ):
        return entry.copy
    packed = _pack_quantized_conv(conv.weight, *layout)
    _quantized_cache.put(conv.weight, version_of(conv.weight), packed, layout)
    return packed


class Cpu(Backend):
    """This file's functions, for tensors on the CPU."""

    name = "cpu"
    device_type = "cpu"
    reads_narrow_residuals = True
    pads_shortcuts = True
    hold_blocks_in_graphs = True
    has_norm_kernels = True
    plans_eight_bits = True
    recorded_pass = 2

    def is_default(self, device_type: str) -> bool:
        """See `Backend.is_default`."""
        return device_type == "cpu"

    def plan_key(self, input: Tensor) -> Hashable | None:
        """See `Backend.plan_key`."""
        if input.dtype not in _NATIVE_DTYPES or input.layout is not torch.strided:
            return None
        if _TILE_ISA and input.dtype is torch.float32:
            if _float32_precision() != _precision:  # before a plan runs, too
                _follow_precision()
            return _products
        return ()

    def plans_head(self, input: Tensor) -> bool:
        """See `Backend.plans_head`."""
        return bool(_ISA) and input.size(0) <= _MOST_IMAGES

    def recorder(self, input: Tensor, parameters: Sequence[Tensor]) -> Recorder:
        """See `Backend.recorder`."""
        return cpu_plans.Recorder(input, parameters)

    explain = staticmethod(explain)
    has_kernel = staticmethod(has_kernel)
    release = staticmethod(release)
    conv_bn_act = staticmethod(conv_bn_act)
    norm_conv_bn_act = staticmethod(norm_conv_bn_act)
    conv_bn_act_max_pool = staticmethod(conv_bn_act_max_pool)
    batch_norm_act_inference = staticmethod(batch_norm_act_inference)
    residual_blocks = staticmethod(residual_blocks)
    pool_linear = staticmethod(pool_linear)
    batch_norm_act_training = staticmethod(batch_norm_act_training)
    batch_norm_act_training_keeping_mask = staticmethod(batch_norm_act_training_keeping_mask)
    batch_statistics = staticmethod(batch_statistics)
    conv_batch_norm_statistics = staticmethod(conv_batch_norm_statistics)
    convolution = staticmethod(convolution)
    batch_norm_act_backward = staticmethod(batch_norm_act_backward)
    batch_norm_act_backward_sums = staticmethod(batch_norm_act_backward_sums)
    batch_norm_act_backward_input = staticmethod(batch_norm_act_backward_input)
    conv_input_gradient = staticmethod(conv_input_gradient)
    conv_weight_gradient = staticmethod(conv_weight_gradient)
    max_pool_backward = staticmethod(max_pool_backward)

    def quantized_residual_blocks(
        self,
        input: Tensor,
        blocks: Sequence[QuantizedBlock],
        stored: Quantization,
        output: Quantization,
    ) -> Tensor:
        """In one call: see csrc/cpu/quantized/."""
        out = run_quantized_blocks(input, blocks, stored, output)
        if out is None:
            return super().quantized_residual_blocks(input, blocks, stored, output)
        return out

    def quantized_stem(
        self, input: Tensor, stem: QuantizedStem, stored: Quantization, output: Quantization
    ) -> Tensor:
        """In one call: see csrc/cpu/quantized/stem.cpp."""
        return run_quantized_stem(input, stem, stored, output)
