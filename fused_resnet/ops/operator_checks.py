"""What is wrong with the arguments of operators that are called as `torch.ops.fused_resnet.*`.

The functions in `ops/` are called with arguments that `functional` has checked; operators by
anyone, from a saved graph too. Each function here takes an operator's arguments and returns the
exception, or None.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layers import checks, quantized
from ..layers.description import Block, ConvNorm, Norm, Pool, conv_norm_of, output_size

Error = ValueError | TypeError | None

_INT8_INPUTS = (torch.float32, torch.float16, torch.bfloat16)
_BLOCK_TENSORS = 6  # a layer's: weight, running_mean, running_var, bn_weight, bn_bias, bias
_TRAINING_TENSORS = 4  # weight, bias, bn_weight, bn_bias
_NUMBERS = 7  # stride, padding and dilation, two each, and groups


def conv_bn_act(input: Tensor, *arguments: Any) -> Error:
    """See `ops.conv_bn_act`."""
    return checks.conv_error("conv_bn_act", input, conv_norm_of(arguments[:11]), *arguments[11:])


def norm_conv_bn_act(input: Tensor, *arguments: Any) -> Error:
    """See `ops.norm_conv_bn_act`."""
    name = "norm_conv_bn_act"
    error = checks.conv_error(name, input, conv_norm_of(arguments[5:16]), *arguments[16:])
    return error or checks.prologue_error(name, input, Norm(*arguments[:5]))


def conv_bn_act_max_pool(input: Tensor, *arguments: Any) -> Error:
    """See `ops.conv_bn_act_max_pool`."""
    name = "conv_bn_act_max_pool"
    layer, activation, pool = conv_norm_of(arguments[:11]), arguments[11], Pool(*arguments[12:])
    error = checks.conv_error(name, input, layer, None, activation)
    return error or checks.pool_error(name, input, layer, pool)


def conv_bn_act_max_pool_int8(input: Tensor, *arguments: Any) -> Error:
    """See `ops.conv_bn_act_max_pool_int8`."""
    name = "conv_bn_act_max_pool_int8"
    layer, pool = conv_norm_of(arguments[:11]), Pool(*arguments[11:14])
    bits, step, zero_point, output_step = arguments[14:]
    if input.dtype not in _INT8_INPUTS:
        return TypeError(
            f"{name}: input has dtype {input.dtype}, must be one of float32, float16, bfloat16"
        )
    # It is quantized as it is, whatever the parameters' dtype: under autocast they differ.
    alike = input.detach().new_empty((), dtype=layer.weight.dtype).expand(input.shape)
    error = checks.conv_error(name, alike, layer, None, "relu")
    error = error or checks.pool_error(name, alike, layer, pool)
    if error is not None:
        return error
    if layer.groups != 1:
        return ValueError(f"{name}: groups is {layer.groups}, must be 1")
    if bits not in (8, 16):
        return ValueError(f"{name}: bits is {bits}, must be 8 or 16")
    # Twice, of the two parts that sixteen bits are.
    if 2 * layer.weight.shape[1:].numel() > quantized.LARGEST_REDUCTION:
        return ValueError(
            f"{name}: weight has {layer.weight.shape[1:].numel()} values a filter, must have at "
            f"most {quantized.LARGEST_REDUCTION // 2} for sums of 32 bits"
        )
    for what, value in (("step", step), ("output_step", output_step)):
        if not (math.isfinite(value) and value > 0):
            return ValueError(f"{name}: {what} is {value}, must be finite and above zero")
    if bits == 16 and zero_point != quantized.WORD_ZERO_POINT:
        return ValueError(
            f"{name}: zero_point is {zero_point}, must be {quantized.WORD_ZERO_POINT} in 16 bits"
        )
    if not 0 <= zero_point <= quantized.LARGEST:
        return ValueError(f"{name}: zero_point is {zero_point}, must be 0 to {quantized.LARGEST}")
    return None


def pool_linear_int8(
    input: Tensor, weight: Tensor, bias: Tensor | None, step: float, pooled_step: float
) -> Error:
    """See `ops.pool_linear_int8`."""
    name = "pool_linear_int8"
    for what, tensor in (("input", input), ("weight", weight), ("bias", bias)):
        if tensor is None:
            if what == "bias":
                continue
            return TypeError(f"{name}: {what} is None, must be a tensor")
        if tensor.dtype not in _INT8_INPUTS:
            return TypeError(
                f"{name}: {what} has dtype {tensor.dtype}, must be one of float32, float16, "
                "bfloat16"
            )
        if tensor.device != input.device:
            return ValueError(f"{name}: {what} is on {tensor.device}, input is on {input.device}")
    if input.dim() != 4 or weight.dim() != 2 or weight.shape[1] != input.shape[1]:
        return ValueError(
            f"{name}: input has shape {tuple(input.shape)} and weight {tuple(weight.shape)}, must "
            "be (N, C, H, W) and (K, C)"
        )
    K, C = weight.shape
    if K == 0 or not 0 < C <= quantized.LARGEST_REDUCTION:
        return ValueError(
            f"{name}: weight has shape {(K, C)}, must have filters of 1 to "
            f"{quantized.LARGEST_REDUCTION} values for sums of 32 bits"
        )
    if bias is not None and bias.shape != (K,):
        return ValueError(f"{name}: bias has shape {tuple(bias.shape)}, must have {(K,)}")
    if not 0 < input.shape[2] * input.shape[3] <= quantized.LARGEST_POOL:
        return ValueError(
            f"{name}: input has shape {tuple(input.shape)}, must have 1 to "
            f"{quantized.LARGEST_POOL} pixels an image"
        )
    for what, value in (("step", step), ("pooled_step", pooled_step)):
        if not (math.isfinite(value) and value > 0):
            return ValueError(f"{name}: {what} is {value}, must be finite and above zero")
    return None


def batch_norm_act_inference(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Error:
    """See `ops.batch_norm_act_inference`."""
    norm = Norm(running_mean, running_var, weight, bias, eps)
    return checks.batch_norm_error(
        "batch_norm_act_inference", input, norm, False, 0.0, residual, activation
    )


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> Error:
    """See `ops.batch_norm_act_training`, which takes one value a channel."""
    norm = Norm(None, None, weight, bias, eps)  # type: ignore[arg-type]  # still to be found
    return checks.batch_norm_error(
        "batch_norm_act_training", input, norm, True, 0.0, residual, activation, shared=True
    )


def residual_blocks(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
) -> Error:
    """See `ops.residual_blocks`."""
    blocks = described(input, tensors, numbers, eps, layer_counts, projections)
    return blocks if isinstance(blocks, Exception) else None


def described(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
) -> list[Block] | ValueError | TypeError:
    """The blocks that `ops.residual_blocks` is called with, or what is wrong with them."""
    name = "residual_blocks"
    layers = _layers(name, tensors, _BLOCK_TENSORS, numbers, eps)
    if isinstance(layers, ValueError):
        return layers
    if not len(layer_counts) == len(projections) > 0:
        return ValueError(
            f"{name}: layer_counts has {len(layer_counts)} numbers, projections "
            f"{len(projections)}; they must have one for each block"
        )
    if min(layer_counts) < 1 or sum(layer_counts) != len(layers):
        return ValueError(
            f"{name}: layer_counts is {list(layer_counts)}, of {len(layers)} convolutions"
        )
    blocks = []
    shape: Sequence[int] | None = None
    first = 0
    for count, has_projection in zip(layer_counts, projections, strict=True):
        block = Block(layers[first : first + count], has_projection)
        error, shape = _block(name, input, shape, block.layers, has_projection)
        if error is not None:
            return error
        blocks.append(block)
        first += count
    return blocks


def quantized_residual_blocks(
    input: Tensor,
    tensors: Sequence[Tensor],
    numbers: Sequence[int],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    shortcut_scales: Sequence[float],
    step: float,
    zero_point: int,
    output_step: float,
) -> Error:
    """See `ops.quantized_residual_blocks`."""
    name = "quantized_residual_blocks"
    count = len(tensors) // quantized.TENSORS
    if count * quantized.TENSORS != len(tensors) or len(numbers) != count * quantized.NUMBERS:
        return ValueError(
            f"{name}: {len(tensors)} tensors and {len(numbers)} numbers; for each convolution "
            f"there must be {quantized.TENSORS} and {quantized.NUMBERS}"
        )
    if not len(layer_counts) == len(projections) == len(shortcut_scales):
        return ValueError(
            f"{name}: {len(layer_counts)} layer counts, {len(projections)} projections and "
            f"{len(shortcut_scales)} shortcut scales; there must be one of each for each block"
        )
    if sum(layer_counts) != count or min(layer_counts, default=1) < 1:
        return ValueError(f"{name}: layer_counts is {list(layer_counts)}, of {count} convolutions")
    blocks = quantized.blocks_of(tensors, numbers, layer_counts, projections, shortcut_scales)
    stored, output = quantized.Quantization(step, zero_point), quantized.Quantization(output_step)
    return quantized.blocks_error(name, input, blocks, stored, output)


def residual_blocks_int8(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
    zero_points: Sequence[int],
) -> Error:
    """See `ops.residual_blocks_int8`."""
    name = "residual_blocks_int8"
    if input.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return TypeError(
            f"{name}: input has dtype {input.dtype}, must be one of float32, float16, bfloat16"
        )
    # It is quantized as it is, whatever the parameters' dtype: under autocast they differ.
    dtype = tensors[0].dtype if tensors and tensors[0] is not None else input.dtype
    alike = input.detach().new_empty((), dtype=dtype).expand(input.shape)
    error = residual_blocks(alike, tensors, numbers, eps, layer_counts, projections)
    if isinstance(error, (ValueError, TypeError)):
        return type(error)(str(error).replace("residual_blocks", name, 1))
    needed = sum(layer_counts) - sum(projections) + len(layer_counts)
    if not len(steps) == len(zero_points) == needed:
        return ValueError(
            f"{name}: {len(steps)} steps and {len(zero_points)} zero points; there must be "
            f"{needed} of each, for every block one more than convolutions on its main path"
        )
    for step, zero_point in zip(steps, zero_points, strict=True):
        if not (math.isfinite(step) and step > 0):
            return ValueError(f"{name}: a step is {step}, must be finite and above zero")
        if not 0 <= zero_point <= quantized.LARGEST:
            return ValueError(
                f"{name}: a zero point is {zero_point}, must be 0 to {quantized.LARGEST}"
            )
    first = 0
    for i, (count, projection) in enumerate(zip(layer_counts, projections, strict=True)):
        last = first + count - projection
        if any(zero_points[first + 1 : last + 1]):
            return ValueError(f"{name}: block {i} has a zero point behind a ReLU, must be 0")
        if i + 1 < len(layer_counts) and (
            (steps[last], zero_points[last]) != (steps[last + 1], zero_points[last + 1])
        ):
            return ValueError(
                f"{name}: block {i} writes in steps of {steps[last]}, block {i + 1} reads in "
                f"steps of {steps[last + 1]}"
            )
        first = last + 1
    for weight in tensors[::_BLOCK_TENSORS]:
        values = 0 if weight is None else math.prod(weight.shape[1:])
        if values > quantized.LARGEST_REDUCTION:
            return ValueError(
                f"{name}: weight has {values} values a filter, must have at most "
                f"{quantized.LARGEST_REDUCTION} for sums of 32 bits"
            )
    return None


def residual_blocks_float8(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
    steps: Sequence[float],
) -> Error:
    """See `ops.residual_blocks_float8`."""
    zero_points = [0] * len(steps)
    error = residual_blocks_int8(
        input, tensors, numbers, eps, layer_counts, projections, steps, zero_points
    )
    if not isinstance(error, (ValueError, TypeError)):
        return error
    text = str(error).replace("residual_blocks_int8", "residual_blocks_float8", 1)
    return type(error)(text.replace(f" and {len(steps)} zero points", ""))


def block_training(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    has_projection: bool,
    low_memory: bool,
) -> Error:
    """See `ops.block_training`."""
    return _training_block("block_training", input, parameters, numbers, eps, has_projection)[0]


def block_training_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    parameters: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    need: Sequence[bool],
    numbers: Sequence[int],
    eps: Sequence[float],
    has_projection: bool,
    low_memory: bool,
) -> Error:
    """See `ops.block_training`."""
    name = "block_training_backward"
    error, shapes = _training_block(name, input, parameters, numbers, eps, has_projection)
    if error is not None:
        return error
    main = len(shapes) - has_projection
    # With low_memory the last convolution's output is computed again, and the projection's.
    again = []
    for i in range(len(shapes)):
        weight = parameters[_TRAINING_TENSORS * i]
        pointwise = weight is not None and weight.shape[2:] == (1, 1)
        again.append(low_memory and i >= main - 1 and pointwise)
    raws = [shape for shape, computed in zip(shapes, again, strict=True) if not computed]
    return (
        _like(name, "grad", grad, shapes[main - 1], input)
        or _like(name, "output", output, shapes[main - 1], input)
        or _kept(name, kept, [shape[1] for shape in shapes], raws, input)
        or _need(name, need, parameters)
    )


def stem_training(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    pool: Sequence[int],
) -> Error:
    """See `ops.stem_training`."""
    return _stem("stem_training", input, parameters, numbers, eps, pool)[0]


def stem_training_backward(
    grad: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    need: Sequence[bool],
    numbers: Sequence[int],
    eps: float,
    pool: Sequence[int],
) -> Error:
    """See `ops.stem_training`."""
    name = "stem_training_backward"
    error, shape = _stem(name, input, parameters, numbers, eps, pool)
    if error is not None:
        return error
    N, K, P, Q = shape
    pooled = output_size((P, Q), pool[0:2], pool[2:4], pool[4:6])
    return (
        _like(name, "grad", grad, (N, K, *pooled), input)
        or _kept(name, kept, [K], [shape], input)
        or _need(name, need, parameters)
    )


def _layers(
    name: str,
    tensors: Sequence[Tensor | None],
    per_layer: int,
    numbers: Sequence[int],
    eps: Sequence[float],
) -> list[ConvNorm] | ValueError:
    """The convolutions; in training without running statistics."""
    count = len(eps)
    if count == 0 or len(tensors) != per_layer * count or len(numbers) != _NUMBERS * count:
        return ValueError(
            f"{name}: {len(tensors)} tensors, {len(numbers)} numbers and {count} eps; for each "
            f"convolution there must be {per_layer}, {_NUMBERS} and one"
        )
    layers = []
    for i in range(count):
        t = tensors[per_layer * i : per_layer * (i + 1)]
        n = tuple(numbers[_NUMBERS * i : _NUMBERS * (i + 1)])
        if per_layer == _TRAINING_TENSORS:
            weight, bias, bn_weight, bn_bias = t
            running_mean = running_var = None
        else:
            weight, running_mean, running_var, bn_weight, bn_bias, bias = t
        # What is None and must not be is for `checks` to find.
        norm = Norm(running_mean, running_var, bn_weight, bn_bias, eps[i])  # type: ignore[arg-type]
        layer = ConvNorm(weight, norm, bias, n[0:2], n[2:4], n[4:6], n[6])  # type: ignore[arg-type]
        layers.append(layer)
    return layers


def _block(
    name: str,
    input: Tensor,
    shape: Sequence[int] | None,
    layers: Sequence[ConvNorm],
    has_projection: bool,
    statistics: bool = True,
) -> tuple[Error, Sequence[int] | None]:
    """What is wrong with one block on an input like `input`, of this shape, and its output's."""
    error, shapes = _block_shapes(name, input, shape, layers, has_projection, statistics)
    return error, None if error is not None else shapes[len(layers) - has_projection - 1]


def _block_shapes(
    name: str,
    input: Tensor,
    shape: Sequence[int] | None,
    layers: Sequence[ConvNorm],
    has_projection: bool,
    statistics: bool = True,
) -> tuple[Error, list[Sequence[int]]]:
    """The same, with the shapes of all convolutions' outputs."""
    main = len(layers) - has_projection
    if main < 1:
        return ValueError(f"{name}: a block has no convolution beside the shortcut's"), []
    shapes: list[Sequence[int]] = []
    first = shape
    for i, layer in enumerate(layers):
        before = first if i in (0, main) else shapes[-1]
        error = checks.conv_error(name, input, layer, None, "relu", before, statistics)
        if error is not None:
            return error, []
        shapes.append(layer.output_shape(input.shape if before is None else before))
    shortcut = shapes[-1] if has_projection else (input.shape if first is None else first)
    if tuple(shortcut) != tuple(shapes[main - 1]):
        error = ValueError(
            f"{name}: the shortcut has shape {tuple(shortcut)}, the last convolution's output "
            f"{tuple(shapes[main - 1])}"
        )
        return error, []
    return None, shapes


def _training_block(
    name: str,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    has_projection: bool,
) -> tuple[Error, list[Sequence[int]]]:
    layers = _layers(name, parameters, _TRAINING_TENSORS, numbers, eps)
    if isinstance(layers, ValueError):
        return layers, []
    error = _eps(name, eps)
    if error is not None:
        return error, []
    return _block_shapes(name, input, None, layers, has_projection, statistics=False)


def _stem(
    name: str,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    pool: Sequence[int],
) -> tuple[Error, Sequence[int]]:
    """What is wrong, and the shape of the convolution's output."""
    layers = _layers(name, parameters, _TRAINING_TENSORS, numbers, [eps])
    if isinstance(layers, ValueError):
        return layers, ()
    (layer,) = layers
    error = _eps(name, [eps]) or checks.conv_error(
        name, input, layer, None, "relu", statistics=False
    )
    if error is None and len(pool) != 6:
        error = ValueError(f"{name}: pool has {len(pool)} numbers, must have 6")
    if error is None:
        windows = Pool(tuple(pool[0:2]), tuple(pool[2:4]), tuple(pool[4:6]))
        error = checks.pool_error(name, input, layer, windows)
    return error, () if error is not None else layer.output_shape(input.shape)


def _eps(name: str, eps: Sequence[float]) -> Error:
    for value in eps:
        if not value > 0:
            return ValueError(f"{name}: eps is {value}, must be positive when training")
    return None


def _like(name: str, what: str, tensor: Tensor, shape: Sequence[int], input: Tensor) -> Error:
    """A tensor of this shape, and of the input's dtype and device."""
    if not isinstance(tensor, Tensor):
        return TypeError(f"{name}: {what} is a {type(tensor).__name__}, must be a Tensor")
    if tuple(tensor.shape) != tuple(shape):
        return ValueError(
            f"{name}: {what} has shape {tuple(tensor.shape)}, must have {tuple(shape)}"
        )
    if tensor.dtype is not input.dtype:
        return TypeError(f"{name}: {what} has dtype {tensor.dtype}, must have {input.dtype}")
    if tensor.device != input.device:
        return ValueError(f"{name}: {what} is on {tensor.device}, input is on {input.device}")
    return None


def _kept(
    name: str,
    kept: Sequence[Tensor],
    channels: Sequence[int],
    raws: Sequence[Sequence[int]],
    input: Tensor,
) -> Error:
    """Means and variances of so many channels, then convolutions' outputs of these shapes."""
    vectors = [(count,) for count in channels for _ in range(2)]
    if len(kept) != len(vectors) + len(raws):
        return ValueError(
            f"{name}: kept has {len(kept)} tensors, must have {len(vectors) + len(raws)}"
        )
    dtype = torch.float64 if input.dtype is torch.float64 else torch.float32
    accumulated = torch.empty(0, dtype=dtype, device=input.device)
    for i, (tensor, shape) in enumerate(zip(kept, (*vectors, *raws), strict=True)):
        like = accumulated if i < len(vectors) else input
        error = _like(name, f"kept[{i}]", tensor, shape, like)
        if error is not None:
            return error
    return None


def _need(name: str, need: Sequence[bool], parameters: Sequence[Tensor | None]) -> Error:
    if len(need) != 1 + len(parameters):
        return ValueError(f"{name}: need has {len(need)} values, must have {1 + len(parameters)}")
    for i, (needed, parameter) in enumerate(zip(need[1:], parameters, strict=True)):
        if needed and parameter is None:
            return ValueError(f"{name}: need[{i + 1}] is true, parameters[{i}] is None")
    return None
