"""`block_training`, `stem_training`: with batch statistics, as operators of a compiler's graph.

What `nodes.py` makes one node of the autograd graph is one operator here, and another
for its backward, so that compiled training keeps what fused training keeps. Eager calls do not come
here. See there for the formulas.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...layers.description import NUMBERS, ConvNorm, Layer, TrainedBlock
from ...layers.memory import contiguous_like_eager
from .. import operator_checks
from ..gradients import accumulation_dtype
from ..registration import (
    has_foreign,
    is_exporting,
    library,
    needs_grad,
    register_fake,
    register_kernel,
    transforms_active,
)
from .backward import block_backward, stem_backward
from .nodes import as_autocast_casts
from .passes import Statistics, is_computed_again, kernels_for, passes_of, run_block

_BLOCK = "int[] numbers, float[] eps, bool has_projection, bool low_memory"

library.define(f"block_training(Tensor input, Tensor?[] parameters, {_BLOCK}) -> Tensor[]")
library.define(
    "block_training_backward(Tensor grad, Tensor input, Tensor output, Tensor?[] parameters, "
    f"Tensor[] kept, bool[] need, {_BLOCK}) -> Tensor[]"
)
library.define(
    "stem_training(Tensor input, Tensor?[] parameters, int[] numbers, float eps, int[] pool) "
    "-> Tensor[]"
)
library.define(
    "stem_training_backward(Tensor grad, Tensor input, Tensor?[] parameters, Tensor[] kept, "
    "bool[] need, int[] numbers, float eps, int[] pool) -> Tensor[]"
)
_operator = torch.ops.fused_resnet.block_training.default
_backward_operator = torch.ops.fused_resnet.block_training_backward.default
_stem_operator = torch.ops.fused_resnet.stem_training.default
_stem_backward_operator = torch.ops.fused_resnet.stem_training_backward.default


def holds_training_in_graphs(*tensors: Tensor | None) -> bool:
    """Whether a graph is being made that should hold whole blocks in training.

    Exported graphs do not: they are for other programs, and hold what those may know.
    """
    first = tensors[0]
    assert first is not None
    return (
        torch.compiler.is_dynamo_compiling()
        and not is_exporting()
        and not has_foreign(*tensors)
        and backends.hold_blocks_in_graphs(first.device.type)
    )


def block_training_in_graph(
    input: Tensor, layers: Sequence[ConvNorm], has_projection: bool, low_memory: bool
) -> tuple[Tensor, list[Statistics]] | None:
    """As `nodes.residual_block_training`, of statistics that no processes share."""
    arguments = _prepare(input, layers)
    if arguments is None:
        return None
    output, *kept = _operator(*arguments, has_projection, low_memory)
    return output, [(kept[2 * i], kept[2 * i + 1], None) for i in range(len(layers))]


def stem_training_in_graph(
    input: Tensor, layer: ConvNorm, pool: Sequence[Sequence[int]]
) -> tuple[Tensor, list[Statistics]] | None:
    """As `nodes.stem_training`, of statistics that no processes share."""
    arguments = _prepare(input, [layer])
    if arguments is None:
        return None
    input, parameters, numbers, (eps,) = arguments
    size, stride, padding = pool
    output, mean, var, _ = _stem_operator(
        input, parameters, numbers, eps, [*size, *stride, *padding]
    )
    return output, [(mean, var, None)]


def _prepare(
    input: Tensor, layers: Sequence[ConvNorm]
) -> tuple[Tensor, list[Tensor | None], list[int], list[float]] | None:
    """The operators' first arguments, or None where a graph is to hold something else."""
    parameters: list[Tensor | None] = []
    numbers: list[int] = []
    for weight, norm, bias, stride, padding, dilation, groups in layers:
        parameters += (weight, bias, norm.weight, norm.bias)
        numbers += (*stride, *padding, *dilation, groups)
    if not holds_training_in_graphs(input, *parameters) or not needs_grad(input, *parameters):
        return None
    return *as_autocast_casts(input, parameters), numbers, [layer.norm.eps for layer in layers]


def _layer(numbers: Sequence[int], eps: float) -> Layer:
    return Layer((numbers[0:2], numbers[2:4], numbers[4:6], numbers[6]), eps, None)


def _described(
    numbers: Sequence[int], eps: Sequence[float], has_projection: bool, low_memory: bool
) -> TrainedBlock:
    layers = [
        _layer(numbers[NUMBERS * i : NUMBERS * (i + 1)], layer_eps)
        for i, layer_eps in enumerate(eps)
    ]
    return TrainedBlock(tuple(layers), has_projection, 0, low_memory)


def _kernel(input: Tensor, parameters: Sequence[Tensor | None], *description: Any) -> list[Tensor]:
    with torch.no_grad():
        return _composite(input, parameters, *description)


def _composite(
    input: Tensor, parameters: Sequence[Tensor | None], *description: Any
) -> list[Tensor]:
    """The output, each norm's mean and variance, and the convolutions' outputs that are kept."""
    block = _described(*description)
    passes = passes_of(block.layers, parameters, kernels_for(input))
    with torch.autocast(input.device.type, enabled=False):
        output, _ = run_block(block, passes, input, [])
    statistics = [vector.detach() for step in passes for vector in step.norm[:2]]
    raws = [step.raw for i, step in enumerate(passes) if not is_computed_again(block, passes, i)]
    return [output, *statistics, *raws]


register_kernel("block_training", _kernel, operator_checks.block_training)


@register_fake("block_training", operator_checks.block_training)
def _fake(input: Tensor, parameters: Sequence[Tensor | None], *description: Any) -> list[Tensor]:
    block = _described(*description)
    passes = passes_of(block.layers, parameters, (None, False))
    output, statistics, h = input, [], input
    for i, step in enumerate(passes):
        raw = step.convolve(input if i == block.main else h)
        h = torch.empty_like(contiguous_like_eager(raw))
        if i == block.main - 1:
            output = h
        vector = input.new_empty(raw.size(1), dtype=accumulation_dtype(input.dtype))
        statistics += [vector, torch.empty_like(vector)]
    raws = [step.raw for i, step in enumerate(passes) if not is_computed_again(block, passes, i)]
    return [output, *statistics, *raws]


def _backward_kernel(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    parameters: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    need: Sequence[bool],
    *description: Any,
) -> list[Tensor]:
    """The gradients of input and parameters that are needed, lying in memory as these do."""
    block = _described(*description)
    passes = passes_of(block.layers, parameters, (None, False))
    statistics, raws = kept[: 2 * len(passes)], iter(kept[2 * len(passes) :])
    saved: list[Tensor | None] = []
    for i in range(len(passes)):
        raw = None if is_computed_again(block, passes, i) else next(raws)
        saved += (raw, statistics[2 * i], statistics[2 * i + 1], None)
    everything = (input, output, *parameters, *saved)
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        gradients = block_backward(block, everything, need, grad)
        return _needed(gradients, (input, *parameters), need)


def _needed(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None], need: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, as their fake ones lie in memory."""
    found = []
    for grad, tensor, needed in zip(gradients, tensors, need, strict=True):
        if needed:
            assert grad is not None
            assert tensor is not None
            alike = grad.stride() == tensor.stride()
            found.append(grad if alike else torch.empty_like(tensor).copy_(grad))
    return found


register_kernel(
    "block_training_backward", _backward_kernel, operator_checks.block_training_backward
)


@register_fake("block_training_backward", operator_checks.block_training_backward)
def _backward_fake(
    grad: Tensor,
    input: Tensor,
    output: Tensor,
    parameters: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    need: Sequence[bool],
    *description: Any,
) -> list[Tensor]:
    tensors = zip((input, *parameters), need, strict=True)
    return [torch.empty_like(t) for t, needed in tensors if needed and t is not None]


class _BlockTraining(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, description: tuple[Any, ...], input: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output, *kept = _operator(input, parameters, *description)
        ctx.description, ctx.count = description, len(parameters)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(input, output, *parameters, *kept)
        return output, *kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, output, *saved = ctx.saved_tensors
        need = ctx.needs_input_grad[1:]
        gradients = iter(
            _backward_operator(
                grad, input, output, saved[: ctx.count], saved[ctx.count :], need, *ctx.description
            )
        )
        return None, *(next(gradients) if needed else None for needed in need)


def _autograd(
    input: Tensor, parameters: Sequence[Tensor | None], *description: Any
) -> Sequence[Tensor]:
    if transforms_active():
        return _composite(input, parameters, *description)
    if needs_grad(input, *parameters):
        return list(_BlockTraining.apply(description, input, *parameters))
    with torch._C._AutoDispatchBelowAutograd():
        return _operator(input, parameters, *description)


library.impl("block_training", _autograd, "Autograd")


def _stem_kernel(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    pool: list[int],
) -> list[Tensor]:
    with torch.no_grad():
        return _stem_composite(input, parameters, numbers, eps, pool)


def _stem_composite(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    pool: list[int],
) -> list[Tensor]:
    """The output, the norm's mean and variance, and the convolution's output."""
    (step,) = passes_of([_layer(numbers, eps)], parameters, kernels_for(input))
    with torch.autocast(input.device.type, enabled=False):
        out = step.normalize(step.convolve(input), None, "relu")
        mean, var = step.norm[:2]
        return [torch.max_pool2d(out, *_pool(pool)), mean.detach(), var.detach(), step.raw]


def _pool(numbers: list[int]) -> tuple[list[int], list[int], list[int]]:
    return numbers[0:2], numbers[2:4], numbers[4:6]


register_kernel("stem_training", _stem_kernel, operator_checks.stem_training)


@register_fake("stem_training", operator_checks.stem_training)
def _stem_fake(
    input: Tensor,
    parameters: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: float,
    pool: list[int],
) -> list[Tensor]:
    (step,) = passes_of([_layer(numbers, eps)], parameters, (None, False))
    raw = step.convolve(input)
    mean = input.new_empty(raw.size(1), dtype=accumulation_dtype(input.dtype))
    out = torch.max_pool2d(torch.empty_like(contiguous_like_eager(raw)), *_pool(pool))
    return [out, mean, torch.empty_like(mean), raw]


def _stem_backward_kernel(
    grad: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    need: Sequence[bool],
    numbers: Sequence[int],
    eps: float,
    pool: list[int],
) -> list[Tensor]:
    """The gradients of input and parameters that are needed, lying in memory as these do."""
    mean, var, raw = kept
    everything = (input, *parameters, raw, mean, var, None, None)
    layer = _layer(numbers, eps)
    with torch.no_grad(), torch.autocast(grad.device.type, enabled=False):
        gradients = stem_backward(layer, _pool(pool), everything, need, grad)
        return _needed(gradients, (input, *parameters), need)


register_kernel(
    "stem_training_backward", _stem_backward_kernel, operator_checks.stem_training_backward
)


@register_fake("stem_training_backward", operator_checks.stem_training_backward)
def _stem_backward_fake(
    grad: Tensor,
    input: Tensor,
    parameters: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    need: Sequence[bool],
    *description: Any,
) -> list[Tensor]:
    tensors = zip((input, *parameters), need, strict=True)
    return [torch.empty_like(t) for t, needed in tensors if needed and t is not None]


class _StemTraining(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, description: tuple[Any, ...], input: Tensor, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            output, *kept = _stem_operator(input, parameters, *description)
        ctx.description, ctx.count = description, len(parameters)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(input, *parameters, *kept)
        return output, *kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        input, *saved = ctx.saved_tensors
        need = ctx.needs_input_grad[1:]
        gradients = iter(
            _stem_backward_operator(
                grad, input, saved[: ctx.count], saved[ctx.count :], need, *ctx.description
            )
        )
        return None, *(next(gradients) if needed else None for needed in need)


def _stem_autograd(
    input: Tensor, parameters: Sequence[Tensor | None], *description: Any
) -> Sequence[Tensor]:
    if transforms_active():
        return _stem_composite(input, parameters, *description)
    if needs_grad(input, *parameters):
        return list(_StemTraining.apply(description, input, *parameters))
    with torch._C._AutoDispatchBelowAutograd():
        return _stem_operator(input, parameters, *description)


library.impl("stem_training", _stem_autograd, "Autograd")
