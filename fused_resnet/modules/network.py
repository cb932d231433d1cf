"""Whole networks: the stem, the stages in one call where that is possible, and the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, forms
from ..layers import checks
from ..layers.description import Block
from ..layers.memory import lies_channels_last, memory_format_of
from ..ops import conv_bn_act_max_pool
from ..ops.pool_linear import pool_linear
from ..ops.registration import nothing_intercepts
from ..ops.residual_blocks import pads_shortcuts, residual_blocks
from ..originals import AnyNorm, Sequential
from . import graphs, plans, quantized
from .activations import is_relu, text_of
from .conv_norm_act import conv_norm_act
from .read import (
    blocks_of_stage,
    calls_forward_alone,
    conv_norm,
    head_obstacle,
    input_obstacle,
    keeps_dtype,
    layer_of,
    obstacle,
    plain_stages,
    pool_obstacle,
    pool_of,
    stage_blocks,
    uses_batch_statistics,
)
from .run import run_unfused
from .training import network_stem_training


def resnet_forward(model: nn.Module, x: Tensor) -> Tensor:
    """Torchvision's network: its stem, its stages in one call where possible, and the rest."""
    if (out := plans.again(model, x)) is not None:
        return out
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x, "_forward_impl")
    return graphs.captured(model, x, _resnet)


def _resnet(model: nn.Module, x: Tensor) -> Tensor:
    return _planned(model, x, _RESNET_PARTS, _resnet_features)


_RESNET_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def _resnet_features(model: nn.Module, x: Tensor) -> Tensor:
    """All of it but the pool and the linear layer at the end; see `_arranged`."""
    children: dict[str, Any] = model._modules
    _, _, _, maxpool, *stages = (children[name] for name in _RESNET_PARTS)
    # Before the stem, which leaves nothing of these modules in the caches, and runs no hook.
    plain = None if pool_obstacle(maxpool) is not None else plain_stages(stages)
    if plain is not None:
        x = _arranged(model, x, stages)
    return stages_forward(stages, network_stem(model, x), plain)


def cifar_resnet_forward(model: nn.Module, x: Tensor) -> Tensor:
    """A network for small images: its first convolution, its stages and the rest."""
    if (out := plans.again(model, x)) is not None:
        return out
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x)
    return graphs.captured(model, x, _cifar_resnet)


def _cifar_resnet(model: nn.Module, x: Tensor) -> Tensor:
    return _planned(model, x, _CIFAR_PARTS, _cifar_features)


_CIFAR_PARTS = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3")


def _cifar_features(model: nn.Module, x: Tensor) -> Tensor:
    """Likewise."""
    children: dict[str, Any] = model._modules
    _, _, _, *stages = (children[name] for name in _CIFAR_PARTS)
    if all(stage_blocks(stage, x, may_pad=True) is not None for stage in stages):
        x = _arranged(model, x, stages)
    return stages_forward(stages, network_stem(model, x))


def _arranged(model: nn.Module, x: Tensor, stages: list[nn.Module]) -> Tensor:
    """The input of a network between whose layers nothing is seen, as its kernels want it.

    From channels_last everything up to the last block's output follows, so that nothing is copied
    between two layers; `_planned` hands what is behind the blocks the format that eager would.
    """
    return backends.choose(x.device.type).arranged(x) if _may_arrange(model, x, stages) else x


def _may_arrange(model: nn.Module, x: Tensor, parts: Sequence[nn.Module]) -> bool:
    # Compiled graphs leave the choice of a backend to the operators in them.
    return (
        not torch.compiler.is_compiling()
        and backends.choose(x.device.type).lays_channels_last
        and not torch.is_grad_enabled()
        and nothing_intercepts(x)
        and model.quantization is None
        and model.head_quantization is None
        and not quantized.any_has_ranges(parts)
    )


def _planned(
    model: nn.Module,
    x: Tensor,
    names: tuple[str, ...],
    features: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """`features` of a network, by its children of these names, and its head, from plans."""
    children: dict[str, Any] = model._modules
    parts = [children[name] for name in names]
    avgpool, fc = children["avgpool"], children["fc"]
    if plans.include_heads(x) and head_obstacle(avgpool, fc) is None:

        def whole(model: Any, x: Tensor) -> Tensor:
            return network_head(model, features(model, x))

        return plans.planned(model, [*parts, avgpool, fc], x, whole, whole=True)
    out = plans.planned(model, parts, x, features)
    if head_obstacle(avgpool, fc) is not None and _lies_otherwise(model, x, parts, out):
        out = out.contiguous()
    return network_head(model, out)


def _lies_otherwise(model: nn.Module, x: Tensor, parts: Sequence[nn.Module], out: Tensor) -> bool:
    """Whether an output of the blocks is channels_last only because of `_arranged`."""
    if (
        not _may_arrange(model, x, parts)
        or memory_format_of(out) is not torch.channels_last
        or memory_format_of(x) is torch.channels_last
    ):
        return False
    described = [stage_blocks(part, x, may_pad=True) for part in parts if type(part) is Sequential]
    (unit,) = forms.of(model).units_of(model)
    if memory_format_of(forms.part(model, unit.conv).weight) is torch.channels_last:
        return False
    return not any(blocks is None or lies_channels_last(x, blocks) for blocks in described)


def network_stem(network: nn.Module, x: Tensor) -> Tensor:
    """A network's first convolution and what follows it, as its ranges say."""
    if network.quantization is not None and (out := quantized.stem_output(network, x)) is not None:
        return out
    return float_stem(network, x)


def float_stem(network: nn.Module, x: Tensor) -> Tensor:
    """A network's first convolution and what follows it in floating point."""
    form = forms.of(network)
    (unit,) = form.units_of(network)
    conv, norm = conv_norm(network, unit)
    act = forms.part(network, unit.act)
    if form.pool is None:
        return conv_norm_act(conv, norm, x, None, act)
    return stem(conv, norm, act, forms.part(network, form.pool), x)


def stem(
    conv: nn.Conv2d, norm: AnyNorm, act: nn.Module, maxpool: nn.MaxPool2d, x: Tensor
) -> Tensor:
    """`maxpool(act(norm(conv(x))))`."""
    activation = text_of(act)
    assert activation is not None
    if pool_obstacle(maxpool) is None and not uses_batch_statistics(norm):
        layer = layer_of(conv, norm)
        pool = pool_of(maxpool)
        name = "conv_bn_act_max_pool"
        if (
            checks.conv_error(name, x, layer, None, activation) is None
            and checks.pool_error(name, x, layer, pool) is None
            and keeps_dtype(norm, x)
        ):
            return conv_bn_act_max_pool.run_conv_bn_act_max_pool(x, layer, activation, pool)
    if is_relu(act) and (out := network_stem_training(conv, norm, maxpool, x)) is not None:
        return out
    return maxpool(conv_norm_act(conv, norm, x, None, act))


def stages_forward(stages: list[nn.Module], x: Tensor, plain: list[Block] | None = None) -> Tensor:
    """One stage after the other: all blocks in one call between what else is to be seen.

    `plain`: their blocks, if it has been found that there is nothing else.

    Going through a block's modules in Python between two blocks would find the caches filled with
    the last one's weights, and takes twice as long as going through all blocks before. On a GPU it
    is what lets a block's kernel compute the next block's first convolution, in the next stage too.

    A stage called by itself, `model.layer1(x)`, is torchvision's `nn.Sequential`, so its blocks run
    one by one.
    """
    if quantized.any_has_ranges(stages):
        return _stages_in_parts(stages, x)
    if plain is not None:
        return _joined_stages(stages, plain, x)
    together: list[nn.Module] = []
    blocks: list[Block] = []
    may_pad = pads_shortcuts(x)
    for stage in stages:
        described = stage_blocks(stage, x, may_pad)
        if described is None:
            x = stage(_joined_stages(together, blocks, x))
            together, blocks = [], []
        else:
            together.append(stage)
            blocks += described
    return _joined_stages(together, blocks, x)


def _joined_stages(stages: list[nn.Module], blocks: list[Block], x: Tensor) -> Tensor:
    """Stages that consist of `blocks`, in one call where the backend has one."""
    if blocks and (out := residual_blocks(x, blocks)) is not None:
        return out
    for stage in stages:
        x = stage(x)
    return x


def _stages_in_parts(stages: list[nn.Module], x: Tensor) -> Tensor:
    """`stages_forward` where blocks have ranges: those in eight bits that follow each other in one.

    The input of such a part is quantized once and its output read once. In float32 and float16 the
    blocks give the same bits when they are called one by one: see docs/quantization.md.
    """
    together: list[nn.Module] = []
    parts: list[quantized.Part] = []
    for stage in stages:
        blocks = blocks_of_stage(stage)
        for block in [stage] if blocks is None else blocks:
            part = None
            if blocks is not None and calls_forward_alone(block):
                part = quantized.part_of(block, x)
            if part is None:
                x = block(_joined_parts(together, parts, x))
                together, parts = [], []
            else:
                together.append(block)
                parts.append(part)
    return _joined_parts(together, parts, x)


def _joined_parts(blocks: list[nn.Module], parts: list[quantized.Part], x: Tensor) -> Tensor:
    """Blocks that consist of `parts`, in eight bits if they fit."""
    if parts and (out := quantized.run_parts(parts, x)) is not None:
        return out
    for block in blocks:
        x = block(x)
    return x


def network_head(network: nn.Module, x: Tensor) -> Tensor:
    """A network's pool and linear layer, as its ranges say."""
    if network.head_quantization is not None:
        out = quantized.head_output(network, x)
        if out is not None:
            return out
    return float_head(network, x)


def float_head(network: nn.Module, x: Tensor) -> Tensor:
    """A network's pool and linear layer in floating point."""
    children: dict[str, Any] = network._modules
    return head(children["avgpool"], children["fc"], x)


def head(avgpool: nn.AdaptiveAvgPool2d, fc: nn.Linear, x: Tensor) -> Tensor:
    """`fc(flatten(avgpool(x), 1))`."""
    if (
        not torch.compiler.is_compiling()
        and head_obstacle(avgpool, fc) is None
        and (out := pool_linear(x, fc.weight, fc.bias)) is not None
    ):
        return out
    return fc(torch.flatten(avgpool(x), 1))
