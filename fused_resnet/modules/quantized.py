"""Which blocks run in eight bits now, and what keeps the others in floating point.

A block carries what calibration left with it in `block.quantization`: a `BlockRanges`, or, while
calibration is under way, a function that runs the block and looks on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .. import forms
from ..layers import checks
from ..layers.description import Block, Head, Pool, Stem
from ..layers.quantized import FLOAT8, LARGEST_REDUCTION, Quantization
from ..layers.ranges import BlockRanges, HeadRanges, StemRanges
from ..ops.conv_bn_act_max_pool_int8 import conv_bn_act_max_pool_int8
from ..ops.pool_linear_int8 import pool_linear_int8
from ..ops.residual_blocks_float8 import residual_blocks_float8
from ..ops.residual_blocks_int8 import DTYPES, residual_blocks_int8
from ..originals import Conv2d, MaxPool2d, Sequential
from . import read
from .activations import is_relu

Watcher: TypeAlias = Callable[[nn.Module, Tensor], "Tensor | None"]
"""Runs a block, stem or classifier that is being calibrated; None where it runs as it did."""

Part: TypeAlias = tuple[BlockRanges, Block]


def is_quantizable(module: nn.Module) -> bool:
    """Whether a module is a fused residual block, which may have ranges."""
    form = forms.of_fused(type(module))
    return form is not None and form.is_block


def has_stem(module: nn.Module) -> bool:
    """Whether a module is a fused network whose stem and classifier may have ranges."""
    form = forms.of_fused(type(module))
    return form is not None and form.kind == "stem" and getattr(module, "may_quantize_stem", False)


def stem_output(network: nn.Module, x: Tensor) -> Tensor | None:
    """What a stem with ranges computes, or None where it runs in floating point.

    Raises:
        ValueError: its convolution, or its input's channels, are not those it was calibrated with.
    """
    kept: Any = network.quantization
    if not isinstance(kept, StemRanges):
        return kept(network, x)
    if kept.reason or network.training:
        return None
    stem = stem_of(network, kept.bits, x)
    if stem is None:
        return None
    (layer,), *_ = stem
    if layer.weight.shape != kept.shape:
        raise ValueError(
            f"quantized stem {kept.path!r}: the convolution has a weight of shape "
            f"{tuple(layer.weight.shape)}, was calibrated with {kept.shape}"
        )
    return conv_bn_act_max_pool_int8(x, stem, *kept.ranges)


def stem_of(network: nn.Module, bits: int, x: Tensor | None = None) -> Stem | None:
    """A network's first convolution as it would run in eight or sixteen bits.

    None where it cannot, on such an input if there is one. The network has no obstacle.
    """
    form = forms.of(network)
    unit = form.units_of(network)[0]
    conv, norm = read.conv_norm(network, unit)
    if read.uses_batch_statistics(norm) or not is_relu(forms.part(network, unit.act)):
        return None
    pool = Pool((1, 1), (1, 1), (0, 0))
    if form.pool is not None:
        maxpool = forms.part(network, form.pool)
        if maxpool is None or read.pool_obstacle(maxpool) is not None:
            return None
        assert isinstance(maxpool, MaxPool2d)
        pool = read.pool_of(maxpool)
    layer = read.layer_of(conv, norm)
    # Twice, of the two parts that sixteen bits are.
    if layer.groups != 1 or 2 * layer.weight.shape[1:].numel() > LARGEST_REDUCTION:
        return None
    if x is not None:
        name = "conv_bn_act_max_pool_int8"
        alike = x
        if x.dtype is not layer.weight.dtype:  # under autocast
            alike = x.new_empty((), dtype=layer.weight.dtype).expand(x.shape)
        if checks.conv_error(name, alike, layer, None, "relu") is not None:
            return None
        if checks.pool_error(name, alike, layer, pool) is not None:
            return None
    return Stem((layer,), pool, bits)


def head_output(network: nn.Module, x: Tensor) -> Tensor | None:
    """What a classifier with ranges computes, or None where it runs in floating point.

    Raises:
        ValueError: its linear layer is not the one it was calibrated with.
    """
    kept: Any = network.head_quantization
    if not isinstance(kept, HeadRanges):
        return kept(network, x)
    if kept.reason or network.training or (head := head_of(network)) is None:
        return None
    if head.weight.shape != kept.shape:
        raise ValueError(
            f"quantized classifier of {kept.path!r}: the linear layer has a weight of shape "
            f"{tuple(head.weight.shape)}, was calibrated with {kept.shape}"
        )
    return pool_linear_int8(x, head, *kept.ranges)


def head_of(network: nn.Module) -> Head | None:
    """A network's classifier as it would run in eight bits, or None where it cannot."""
    children: dict[str, Any] = network._modules
    avgpool, fc = children["avgpool"], children["fc"]
    if read.head_obstacle(avgpool, fc) is not None:
        return None
    return Head(fc.weight, fc.bias) if 0 < fc.weight.shape[1] <= LARGEST_REDUCTION else None


def any_has_ranges(stages: Sequence[nn.Module]) -> bool:
    """Whether a block of these stages runs in eight bits, or is being calibrated."""
    return any(
        is_quantizable(block) and block.quantization is not None
        for stage in stages
        if type(stage) is Sequential
        for block in stage._modules.values()
        if block is not None
    )


def block_output(block: nn.Module, x: Tensor) -> Tensor | None:
    """What a block with ranges computes in eight bits, or None where it runs as without them."""
    kept: Any = block.quantization
    if not isinstance(kept, BlockRanges):
        return kept(block, x)
    part = part_of(block, x)
    return None if part is None else run_parts([part], x)


def part_of(block: nn.Module, x: Tensor) -> Part | None:
    """A block's ranges and layers if it runs in eight bits on an input like x, else None."""
    kept = block.quantization
    if not isinstance(kept, BlockRanges) or kept.reason or block.training:
        return None
    described = _described(block, x)
    return None if described is None else (kept, described)


def _described(block: nn.Module, x: Tensor) -> Block | None:
    if not torch.compiler.is_compiling() and read.obstacle_of_call(x) is None:
        described = read.plain_block(block, forms.of(block), False)
        if described is not None:
            return described
    if read.obstacle(block) is not None or read.input_obstacle(x) is not None:
        return None
    return read.inference_block(block, x)


def run_parts(parts: Sequence[Part], x: Tensor) -> Tensor | None:
    """Blocks one on the output of the other in eight bits, in one call if their ranges meet.

    None where they have to be run in floating point, whatever part of them it is.

    Raises:
        ValueError: a block's convolutions, or its input's channels, are not those it was calibrated
            with.
    """
    for kept, described in parts:
        layers = described.layers
        for i, (layer, shape) in enumerate(zip(layers, kept.shapes, strict=False)):
            if layer.weight.shape != shape:
                raise ValueError(
                    f"quantized block {kept.path!r}: convolution {i} has a weight of shape "
                    f"{tuple(layer.weight.shape)}, was calibrated with {shape}"
                )
        if len(layers) != len(kept.shapes):
            raise ValueError(
                f"quantized block {kept.path!r}: has {len(layers)} convolutions, was calibrated "
                f"with {len(kept.shapes)}"
            )
    kept, described = parts[0]
    first_layer = described.layers[0]
    channels = first_layer.weight.shape[1] * first_layer.groups
    if x.dim() == 4 and x.shape[1] != channels:
        raise ValueError(
            f"quantized block {kept.path!r}: input has {x.shape[1]} channels, was calibrated with "
            f"{channels}"
        )
    first = 0
    for i in range(1, len(parts) + 1):
        before = parts[i - 1][0]
        if i < len(parts) and (before.ranges[-1], before.dtype) == (
            parts[i][0].ranges[0],
            parts[i][0].dtype,
        ):
            continue
        blocks = [block for _, block in parts[first:i]]
        out = residual_blocks(x, blocks, [kept.ranges for kept, _ in parts[first:i]], before.dtype)
        if out is None:
            return None
        x, first = out, i
    return x


def residual_blocks(
    x: Tensor, blocks: Sequence[Block], ranges: Sequence[Sequence[Quantization]], dtype: str
) -> Tensor | None:
    """`residual_blocks_int8`, or `residual_blocks_float8`, as a `BlockRanges` names them."""
    return (residual_blocks_float8 if dtype == FLOAT8 else residual_blocks_int8)(x, blocks, ranges)


def float_reason(block: nn.Module) -> str | None:
    """Why a fused block cannot run in eight bits as it is now, whatever its ranges, or None."""
    if (reason := read.obstacle(block)) is not None:
        return reason
    form = forms.of(block)
    name = form.shortcut or ""
    shortcut = read.shortcut(block, form)
    if read.pads_channels(shortcut):
        return f"{name} pads channels"
    for unit in form.units_of(block):
        for part in (*unit.before, *unit.between, *unit.after):
            if read.working_parts(block, (part,)):
                return f"{part} is {read.described(forms.part(block, part))}"
        if read.uses_batch_statistics(forms.part(block, unit.norm)):
            return f"{unit.norm} uses the batch's statistics"
    if shortcut is not None:
        if (reason := read.downsample_obstacle(shortcut, name)) is not None:
            return reason
        before, (_, norm) = read.split_downsample(shortcut)
        if read.uses_batch_statistics(norm):
            return f"{name}'s norm uses the batch's statistics"
        working = [child for child in before if not read.passes_through(child)]
        if working:
            return f"{name} begins with {read.described(working[0])}"
    found = read.block_layers(block)
    for conv, _ in [] if found is None else found[0]:
        values = conv.weight.shape[1:].numel()
        if values > LARGEST_REDUCTION:
            return f"a filter has {values} values, at most {LARGEST_REDUCTION} fit 32-bit sums"
        if conv.weight.dtype not in DTYPES:
            return f"a weight has dtype {conv.weight.dtype}"
    return None if found is not None else "it has more to it than convolutions and norms"


def shapes_of(block: nn.Module) -> tuple[tuple[int, ...], ...]:
    """Of a block's weights, those of a projection last, as far as it has them."""
    form = forms.of(block)
    convs = [forms.part(block, unit.conv) for unit in form.units_of(block)]
    shortcut = read.shortcut(block, form)
    if isinstance(shortcut, nn.Module):
        convs += [child for child in shortcut.modules() if isinstance(child, Conv2d)]
    weights = [getattr(conv, "weight", None) for conv in convs]
    return tuple(tuple(weight.shape) for weight in weights if isinstance(weight, Tensor))


def names_of_activations(block: nn.Module) -> list[str]:
    """What messages call the input, each inner activation and the output."""
    units = forms.of(block).units_of(block)
    return ["the input", *(f"the output of {unit.conv}" for unit in units[:-1]), "the output"]
