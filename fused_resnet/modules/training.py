"""Blocks and stems in training, each as one node of the autograd graph."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import forms
from ..forms import Form
from ..layers import checks
from ..layers.description import Block, ConvNorm, Layer, TrainedBlock
from ..ops.gradients import has_norm_kernel
from ..ops.training.graphs import (
    block_training_in_graph,
    holds_training_in_graphs,
    stem_training_in_graph,
)
from ..ops.training.nodes import residual_block_training, stem_training
from .buffers import count_batches
from .read import (
    block_layers,
    layer_of,
    pool_obstacle,
    pool_of,
    sync_group,
    uses_batch_statistics,
)


def plain_block_training(
    block: nn.Module, form: Form, described: Block, x: Tensor
) -> Tensor | None:
    """A block that `plain_block` has described as one node of the graph, or None; see below."""
    plan = _plan_of(described, x)
    if plan is None:
        return None
    children: dict[str, Any] = block._modules
    norms = []
    for _, name, _ in form.plain_names or ():
        norms.append(children[name])
    if described.has_projection:
        _, projected = children[form.shortcut or ""]._modules.values()
        norms.append(projected)
    parameters: list[Tensor | None] = []
    for weight, norm, bias, _, _, _, _ in described.layers:
        parameters += (weight, bias, norm.weight, norm.bias)
    keep = functools.partial(count_batches, norms, plan.counts)
    return residual_block_training(x, plan.block, parameters, keep)


class _Plan(NamedTuple):
    """What forward needs to know of a block in training, but for tensors.

    Attributes:
        block: what to compute.
        counts: of each norm, how many values a channel its batch has.
    """

    block: TrainedBlock
    counts: list[int]


# By all that decides about a block in training. Networks have few such blocks; whoever varies the
# size of the images has as many times more.
_plans: dict[tuple[Any, ...], _Plan | None] = {}
_MOST_PLANS = 2048


def _plan_of(block: Block, x: Tensor) -> _Plan | None:
    """How to train a block on such an input, found once; or None where it has to run by parts."""
    key = checks.block_key(x, block)
    if key not in _plans:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        _plans[key] = _trained(block, [None] * len(block.layers), x)
    return _plans[key]


def _trained(block: Block, groups: list[dist.ProcessGroup | None], x: Tensor) -> _Plan | None:
    """A block with batch statistics on such an input; None where something does not fit.

    The modules, run one by one, then say what.
    """
    count = len(block.main)
    shapes = _trained_shapes(block.main, groups[:count], x)
    if shapes is None:
        return None
    N, K, P, Q = shapes[-1]
    if block.has_projection:
        projected = _trained_shapes(block.layers[-1:], groups[-1:], x)
        if projected is None or projected[0] != shapes[-1]:
            return None
        shapes += projected
    elif block.step:
        _, _, H, W = x.shape
        if (-(-H // block.step), -(-W // block.step)) != (P, Q):
            return None
    elif tuple(x.shape) != (N, K, P, Q):
        return None
    layers = []
    for layer, group in zip(block.layers, groups, strict=True):
        _, norm, _, stride, padding, dilation, in_groups = layer
        layers.append(Layer((stride, padding, dilation, in_groups), norm.eps, group))
    trained = TrainedBlock(tuple(layers), *block[1:])
    return _Plan(trained, [N * P * Q for N, _, P, Q in shapes])


def block_training(block: nn.Module, x: Tensor) -> Tensor | None:
    """A block without an obstacle as one node of the graph, or None where it cannot be one."""
    if not _may_train_as_one(x) or (found := block_layers(block, may_pad=True)) is None:
        return None
    pairs, has_projection = found
    norms = [norm for _, norm in pairs]
    if not all(map(uses_batch_statistics, norms)):
        return None
    layers = [layer_of(conv, norm) for conv, norm in pairs]
    groups = [sync_group(norm) for norm in norms]
    downsample, step = getattr(block, forms.of(block).shortcut or ""), 0
    if downsample is not None and not has_projection:
        step = downsample.stride
        if downsample.padded_channels(x) != layers[-1].weight.size(0):
            return None
    described = Block(layers, has_projection, step, block.memory == "low")
    plan = _trained(described, groups, x)
    if plan is None:
        return None
    if not torch.compiler.is_compiling():
        keep = functools.partial(count_batches, norms, plan.counts)
        parameters: list[Tensor | None] = []
        for weight, norm, bias, *_ in layers:
            parameters += (weight, bias, norm.weight, norm.bias)
        return residual_block_training(x, plan.block, parameters, keep)
    if step or any(group is not None for group in groups):
        return None
    result = block_training_in_graph(x, layers, has_projection, described.low_memory)
    if result is None:
        return None
    out, statistics = result
    count_batches(norms, plan.counts, statistics)
    return out


def network_stem_training(
    conv: nn.Conv2d, norm: nn.BatchNorm2d, maxpool: nn.MaxPool2d, x: Tensor
) -> Tensor | None:
    """The stem as one node of the graph, or None where it cannot be one."""
    if not _may_train_as_one(x) or pool_obstacle(maxpool) is not None:
        return None
    if not uses_batch_statistics(norm):
        return None
    layer, pool, group = layer_of(conv, norm), pool_of(maxpool), sync_group(norm)
    if (shapes := _trained_shapes([layer], [group], x)) is None:
        return None
    if checks.pool_error("conv_bn_act_max_pool", x, layer, pool) is not None:
        return None
    ((N, _, P, Q),) = shapes
    counts = [N * P * Q]
    if not torch.compiler.is_compiling():
        keep = functools.partial(count_batches, [norm], counts)
        return stem_training(x, layer, group, pool, keep)
    result = stem_training_in_graph(x, layer, pool) if group is None else None
    if result is None:
        return None
    out, statistics = result
    count_batches([norm], counts, statistics)
    return out


def _may_train_as_one(x: Tensor) -> bool:
    return torch.is_grad_enabled() and (has_norm_kernel(x) or holds_training_in_graphs(x))


def _trained_shapes(
    layers: Sequence[ConvNorm], groups: Sequence[dist.ProcessGroup | None], x: Tensor
) -> list[tuple[int, int, int, int]] | None:
    """The shape of each convolution's output, on the one before, if its norm can be trained.

    None where something does not fit.
    """
    shapes: list[tuple[int, int, int, int]] = []
    shape: Sequence[int] | None = None
    for layer, group in zip(layers, groups, strict=True):
        if not layer.norm.eps > 0:
            return None
        if checks.conv_error("conv_bn_act", x, layer, None, "relu", shape) is not None:
            return None
        shape = N, _, P, Q = layer.output_shape(x.shape if shape is None else shape)
        # Whether processes go this way must not depend on their own share of a common batch.
        if N * P * Q <= 1 and group is None:
            return None
        shapes.append(shape)
    return shapes
