"""Runs the modules that `forms.py` knows, fused as far as `read.py` allows.

What the fused way does not cover runs exactly as the original class does: `obstacle` says what
keeps a module from it, `input_obstacle` what keeps an input, and a single convolution or norm whose
arguments do not fit runs unfused inside `conv_norm_act`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, forms, reference
from ..forms import Unit
from ..layers import checks
from ..layers.description import BlockLayers, ConvNorm, Norm
from ..ops import conv_bn_act_max_pool, running_statistics
from ..ops.conv_bn_act import conv_bn_act
from ..ops.gradients import has_norm_kernel
from ..ops.norm_conv_bn_act import norm_conv_bn_act
from ..ops.registration import needs_grad
from ..ops.residual_blocks import pads_shortcuts, residual_blocks
from ..ops.training.graphs import (
    block_training_in_graph,
    holds_training_in_graphs,
    stem_training_in_graph,
)
from ..ops.training.nodes import residual_block_training, stem_training
from ..originals import FrozenBatchNorm2d
from . import plans, quantized
from .read import (
    bare_layer,
    block_layers,
    calls_forward_alone,
    conv_norm,
    downsample_obstacle,
    inference_layers,
    input_obstacle,
    keeps_dtype,
    layer_of,
    norm_of,
    obstacle,
    obstacle_of_call,
    pads_channels,
    plain_layers,
    pool_obstacle,
    pool_of,
    split_downsample,
    stage_blocks,
    stage_layers,
    sync_group,
    uses_batch_statistics,
    working_parts,
)


def run_unfused(module: nn.Module, x: Any, method: str = "forward") -> Tensor:
    """What the class that a module had before runs, as it is now."""
    return getattr(forms.of(module).original, method)(module, x)


def block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A residual block of any form."""
    if block.quantization is not None and (out := quantized.block_output(block, x)) is not None:
        return out
    form = forms.of(block)
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        layers = None if obstacle_of_call(x) is not None else plain_layers(block, form, False)
        if layers is not None and (out := residual_blocks(x, [layers])) is not None:
            return out
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    layers = inference_layers(block, x)
    if layers is not None and (out := residual_blocks(x, [layers])) is not None:
        return out
    if (out := _block_training(block, x)) is not None:
        return out
    units = form.units_of(block)
    out = x
    for unit in units[:-1]:
        out = run_unit(block, unit, out)
    last, downsample = units[-1], getattr(block, form.shortcut)
    if not working_parts(block, last.between):
        channels = forms.part(block, last.conv).out_channels
        if pads_channels(downsample) and downsample.padded_channels(x) == channels:
            return run_unit(block, last, out, downsample.subsampled(x), narrow=True)
        return run_unit(block, last, out, shortcut_of(downsample, x))
    out = conv_norm_act(*conv_norm(block, last), out, None, None)
    for between in working_parts(block, last.between):
        out = between(out)
    out += shortcut_of(downsample, x)
    out = forms.part(block, last.act)(out)
    for after in working_parts(block, last.after):
        out = after(out)
    return out


def run_unit(
    module: nn.Module,
    unit: Unit,
    x: Tensor,
    residual: Tensor | None = None,
    narrow: bool = False,
) -> Tensor:
    """A unit of a module without an obstacle; with a residual, none of `between` is working.

    A `narrow` residual has fewer channels than the output: see `conv_norm_act`.
    """
    act = forms.part(module, unit.act)
    between = working_parts(module, unit.between)
    act_now = None if between else act
    x = conv_norm_act(*conv_norm(module, unit), x, residual, act_now, narrow=narrow)
    if between:
        for layer in between:
            x = layer(x)
        x = act(x)
    for layer in working_parts(module, unit.after):
        x = layer(x)
    return x


def _block_training(block: nn.Module, x: Tensor) -> Tensor | None:
    """A block without an obstacle as one node of the graph, or None where it cannot be one."""
    if not _may_train_as_one(x) or (found := block_layers(block, may_pad=True)) is None:
        return None
    pairs, has_projection = found
    shapes = _trained_shapes(pairs[:-1] if has_projection else pairs, x)
    if shapes is None:
        return None
    shortcut_shape = x.shape
    step = 1
    downsample = getattr(block, forms.of(block).shortcut)
    if downsample is not None and not has_projection:
        step = downsample.stride
        N, _, *sizes = x.shape
        sizes = [(size + step - 1) // step for size in sizes]
        shortcut_shape = torch.Size((N, downsample.padded_channels(x), *sizes))
    elif has_projection:
        projected = _trained_shapes(pairs[-1:], x)
        if projected is None:
            return None
        shortcut_shape = projected[0]
    if shapes[-1] != shortcut_shape:
        return None
    if has_projection:
        shapes += projected
    layers = [layer_of(conv, norm) for conv, norm in pairs]
    groups = [sync_group(norm) for _, norm in pairs]
    low_memory = block.memory == "low"
    norms = [norm for _, norm in pairs]
    if not torch.compiler.is_compiling():
        keep = functools.partial(_count_batches, norms, shapes)
        return residual_block_training(x, layers, groups, has_projection, low_memory, keep, step)
    if (downsample is not None and not has_projection) or any(g is not None for g in groups):
        return None
    result = block_training_in_graph(x, layers, has_projection, low_memory)
    if result is None:
        return None
    out, statistics = result
    _count_batches(norms, shapes, statistics)
    return out


def _may_train_as_one(x: Tensor) -> bool:
    return torch.is_grad_enabled() and (has_norm_kernel(x) or holds_training_in_graphs(x))


def _trained_shapes(
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]], x: Tensor
) -> list[torch.Size] | None:
    """The shape of each convolution's output, on the one before, if its norm can be trained.

    None where a norm has no batch statistics, or something does not fit: the modules, run one by
    one, then say what.
    """
    if not _may_train_as_one(x):
        return None
    shapes = []
    for conv, norm in pairs:
        if not uses_batch_statistics(norm) or not norm.eps > 0:
            return None
        layer = layer_of(conv, norm)
        if checks.conv_error("conv_bn_act", x, layer, None, "relu") is not None:
            return None
        shape = torch.Size(layer.output_shape(x.shape))
        # Whether processes go this way must not depend on their own share of a common batch.
        if shape.numel() <= shape[1] and sync_group(norm) is None:
            return None
        shapes.append(shape)
        x = x.detach().new_empty(()).expand(shape)
    return shapes


def _count_batches(
    norms: list[nn.BatchNorm2d],
    shapes: list[torch.Size],
    statistics: list[tuple[Tensor, Tensor, Tensor | None]],
) -> None:
    """Updates the norms' buffers as their forward passes would have."""
    counts = [N * P * Q for N, _, P, Q in shapes]
    if _count_together(norms, statistics, counts):
        return
    for norm, (mean, var, shared), own in zip(norms, statistics, counts, strict=True):
        momentum = _momentum(norm)
        if norm.training and norm.track_running_stats:
            count = own if shared is None else shared
            running_statistics.update_running_statistics(
                norm.running_mean, norm.running_var, mean, var, count, momentum
            )


def _count_together(
    norms: list[nn.BatchNorm2d],
    statistics: list[tuple[Tensor, Tensor, Tensor | None]],
    counts: list[int],
) -> bool:
    """Whether it has done what `_count_batches` does, in five calls (launches) for all norms.

    Where these are alike, and no compiler looks on, which would rather see single operators.
    """
    momentum = norms[0].momentum
    if torch.compiler.is_compiling() or momentum is None or not all(counts):
        return False
    for norm, (mean, _, shared) in zip(norms, statistics, strict=True):
        if (
            not (norm.training and norm.track_running_stats)
            or norm.momentum != momentum
            or norm.num_batches_tracked is None
            or norm.running_mean is None
            or norm.running_var is None
            or not norm.running_mean.dtype is norm.running_var.dtype is mean.dtype
            or shared is not None
        ):
            return False
    with torch.no_grad():
        torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
        factors = [count / (count - 1) for count in counts]
        unbiased = torch._foreach_mul([var for _, var, _ in statistics], factors)
        running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
        batch = [mean for mean, _, _ in statistics] + list(unbiased)
        torch._foreach_mul_(running, 1 - momentum)
        # Not with `alpha`, whose product is not rounded as that of `F.batch_norm` is.
        torch._foreach_add_(running, torch._foreach_mul(batch, momentum))
    return True


def _momentum(norm: nn.BatchNorm2d) -> float:
    """The weight of this batch in the running statistics, as `BatchNorm2d.forward` finds it."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def stages_forward(stages: list[nn.Module], x: Tensor) -> Tensor:
    """One stage after the other: all blocks in one call between what else is to be seen.

    Going through a block's modules in Python between two blocks would find the caches filled with
    the last one's weights, and takes twice as long as going through all blocks before. On a GPU it
    is what lets a block's kernel compute the next block's first convolution, in the next stage too.

    A stage called by itself, `model.layer1(x)`, is torchvision's `nn.Sequential`, so its blocks run
    one by one.
    """
    if quantized.any_has_ranges(stages):
        return _stages_in_parts(stages, x)
    together: list[nn.Module] = []
    blocks: list[BlockLayers] = []
    may_pad = pads_shortcuts(x)
    for stage in stages:
        layers = stage_layers(stage, x, may_pad)
        if layers is None:
            x = stage(_joined_stages(together, blocks, x))
            together, blocks = [], []
        else:
            together.append(stage)
            blocks += layers
    return _joined_stages(together, blocks, x)


def _joined_stages(stages: list[nn.Module], blocks: list[BlockLayers], x: Tensor) -> Tensor:
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
        blocks = stage_blocks(stage)
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


def shortcut_of(downsample: nn.Module | None, x: Tensor) -> Tensor:
    """What a block adds to its last convolution's output."""
    if downsample is None:
        return x
    if downsample_obstacle(downsample) is not None:
        return downsample(x)
    before, (conv, norm) = split_downsample(downsample)
    for module in before:
        x = module(x)
    return conv_norm_act(conv, norm, x, None, None)


def resnet_forward(model: nn.Module, x: Tensor) -> Tensor:
    """Torchvision's network: its stem, its stages in one call where possible, and the rest."""
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x, "_forward_impl")
    parts = [model._modules[name] for name in _RESNET_PARTS]
    x = plans.planned(model, parts, x, _resnet_features)
    x = model.avgpool(x)
    return model.fc(torch.flatten(x, 1))


_RESNET_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def _resnet_features(model: nn.Module, x: Tensor) -> Tensor:
    """All of it but the pool and the linear layer at the end."""
    conv, norm, relu, maxpool, *stages = (model._modules[name] for name in _RESNET_PARTS)
    return stages_forward(stages, stem(conv, norm, relu, maxpool, x))


_CIFAR_PARTS = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3")


def _cifar_features(model: nn.Module, x: Tensor) -> Tensor:
    conv, norm, relu, *stages = (model._modules[name] for name in _CIFAR_PARTS)
    return stages_forward(stages, conv_norm_act(conv, norm, x, None, relu))


def plain_block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A block of two convolutions without a shortcut."""
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    for unit in forms.of(block).units_of(block):
        x = run_unit(block, unit, x)
    return x


def cifar_resnet_forward(model: nn.Module, x: Tensor) -> Tensor:
    """A network for small images: its first convolution, its stages and the rest."""
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x)
    parts = [model._modules[name] for name in _CIFAR_PARTS]
    x = plans.planned(model, parts, x, _cifar_features)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def stem(conv: nn.Conv2d, norm: nn.Module, relu: nn.ReLU, maxpool: nn.Module, x: Tensor) -> Tensor:
    """`maxpool(relu(norm(conv(x))))`."""
    if pool_obstacle(maxpool) is None and not uses_batch_statistics(norm):
        layer = layer_of(conv, norm)
        pool = pool_of(maxpool)
        name = "conv_bn_act_max_pool"
        if (
            checks.conv_error(name, x, layer, None, "relu") is None
            and checks.pool_error(name, x, layer, pool) is None
            and keeps_dtype(norm, x)
        ):
            return conv_bn_act_max_pool.run_conv_bn_act_max_pool(x, layer, "relu", pool)
    if (out := _stem_training(conv, norm, maxpool, x)) is not None:
        return out
    return maxpool(conv_norm_act(conv, norm, x, None, relu))


def _stem_training(
    conv: nn.Conv2d, norm: nn.Module, maxpool: nn.MaxPool2d, x: Tensor
) -> Tensor | None:
    """The stem as one node of the graph, or None where it cannot be one."""
    if pool_obstacle(maxpool) is not None or (shapes := _trained_shapes([(conv, norm)], x)) is None:
        return None
    layer, pool = layer_of(conv, norm), pool_of(maxpool)
    if checks.pool_error("conv_bn_act_max_pool", x, layer, pool) is not None:
        return None
    group = sync_group(norm)
    if not torch.compiler.is_compiling():
        keep = functools.partial(_count_batches, [norm], shapes)
        return stem_training(x, layer, group, pool, keep)
    result = stem_training_in_graph(x, layer, pool) if group is None else None
    if result is None:
        return None
    out, statistics = result
    _count_batches([norm], shapes, statistics)
    return out


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | FrozenBatchNorm2d,
    x: Tensor,
    residual: Tensor | None,
    relu: nn.ReLU | None,
    narrow: bool = False,
) -> Tensor:
    """`relu(norm(conv(x)) + residual)`, in one where the arguments allow, without hooks.

    Where they do not, this calls the modules, which then raise what they raise. If `narrow`, a
    residual of fewer channels stands for one with as many zeros before as behind them.
    """
    activation = "none" if relu is None else "relu"
    if uses_batch_statistics(norm):
        return _norm_act(norm, conv(x), residual, relu, narrow)
    layer = layer_of(conv, norm)
    if (
        (narrow or residual is None or residual.shape[1:2] == layer.weight.shape[:1])
        and checks.conv_error("conv_bn_act", x, layer, residual, activation) is None
        and keeps_dtype(norm, x)
    ):
        return conv_bn_act(x, layer, residual, activation)
    if narrow:
        residual = reference.pad_channels(residual, conv.out_channels)
    return _unfused_norm_act(norm, conv(x), residual, relu)


def norm_act(norm: nn.BatchNorm2d | FrozenBatchNorm2d, x: Tensor, relu: nn.ReLU) -> Tensor:
    """`relu(norm(x))` in one where the arguments allow, without hooks."""
    if uses_batch_statistics(norm):
        return _norm_act(norm, x, None, relu)
    frozen = type(norm) is FrozenBatchNorm2d
    described = norm_of(norm)
    error = checks.batch_norm_error("batch_norm_act", x, described, False, 0.0, None, "relu")
    if error is not None or x.dim() != 4 or (frozen and norm.weight.dtype is not x.dtype):
        return _unfused_norm_act(norm, x, None, relu)
    return running_statistics.run_batch_norm_act(x, described, False, 0.0, None, "relu")


class NormAct:
    """`relu(norm(x))`, for convolutions that can make it themselves while they load x.

    In inference they do where their arguments allow. Otherwise it is computed once, when it is
    first needed. Training and gradients keep what a convolution reads, so it is computed for them.

    Args:
        norm: a batch norm without hooks.
        x: (N, C, H, W).
        relu: without hooks.
    """

    def __init__(self, norm: nn.BatchNorm2d | FrozenBatchNorm2d, x: Tensor, relu: nn.ReLU) -> None:
        self._norm, self._x, self._relu = norm, x, relu
        self._computed: Tensor | None = None

    def tensor(self) -> Tensor:
        """All of it, in memory."""
        if self._computed is None:
            self._computed = norm_act(self._norm, self._x, self._relu)
        return self._computed

    def conv_norm_act(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d | FrozenBatchNorm2d, relu: nn.ReLU | None
    ) -> Tensor:
        """`conv_norm_act` of it, without a residual."""
        activation = "none" if relu is None else "relu"
        out = None
        if not uses_batch_statistics(norm) and keeps_dtype(norm, self._x):
            out = self._in_one(layer_of(conv, norm), activation)
        return out if out is not None else conv_norm_act(conv, norm, self.tensor(), None, relu)

    def conv(self, conv: nn.Conv2d) -> Tensor:
        """A convolution of it that no norm follows."""
        out = None
        if has_kernel(conv, self._x):
            out = self._in_one(bare_layer(conv, self._x), "none")
        return out if out is not None else bare_conv(conv, self.tensor())

    def _in_one(self, layer: ConvNorm, activation: str) -> Tensor | None:
        norm, x = self._norm, self._x
        if (
            self._computed is not None
            or uses_batch_statistics(norm)
            or (type(norm) is FrozenBatchNorm2d and norm.weight.dtype is not x.dtype)
        ):
            return None
        before, name = norm_of(norm), "norm_conv_bn_act"
        if (
            needs_grad(x, *before, *layer.flat())
            or checks.conv_error(name, x, layer, None, activation) is not None
            or checks.prologue_error(name, x, before) is not None
        ):
            return None
        return norm_conv_bn_act(x, before, layer, None, activation)


def bare_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`, without hooks, by our kernel where there is one and no gradients are recorded."""
    if has_kernel(conv, x) and not needs_grad(x, conv.weight, conv.bias):
        layer = bare_layer(conv, x)
        if checks.conv_error("conv_bn_act", x, layer, None, "none") is None:
            return conv_bn_act(x, layer, None, "none")
    return conv(x)


def has_kernel(conv: nn.Conv2d, x: Tensor) -> bool:
    """See `backends.has_kernel`; `x` is like the convolution's input."""
    return backends.has_kernel(x.device.type, x.dtype, conv.weight.shape, conv.groups)


def conv_add(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """`conv(x) + residual` in one where the arguments allow, without hooks."""
    layer = bare_layer(conv, x)
    if checks.conv_error("conv_bn_act", x, layer, residual, "none") is None:
        return conv_bn_act(x, layer, residual, "none")
    return conv(x) + residual


def _norm_act(
    norm: nn.BatchNorm2d,
    x: Tensor,
    residual: Tensor | None,
    relu: nn.ReLU | None,
    narrow: bool = False,
) -> Tensor:
    """`relu(norm(x) + residual)` with batch statistics, kept as `BatchNorm2d.forward` does."""
    activation = "none" if relu is None else "relu"
    tracks = not norm.training or norm.track_running_stats
    running_mean = norm.running_mean if tracks else None
    running_var = norm.running_var if tracks else None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    group = sync_group(norm)
    described = Norm(running_mean, running_var, norm.weight, norm.bias, norm.eps)
    error = checks.batch_norm_error(
        "batch_norm_act", x, described, True, momentum, residual, activation, group is not None
    )
    if (
        error is not None
        or x.dim() != 4
        or (group is not None and torch.compiler.is_compiling())
        or not (narrow or residual is None or residual.shape == x.shape)
    ):
        if narrow:
            residual = reference.pad_channels(residual, x.size(1))
        return _unfused_norm_act(norm, x, residual, relu)
    if group is not None:
        return running_statistics.run_sync_batch_norm_act(
            x, described, _momentum(norm), group, residual, activation
        )
    return running_statistics.run_batch_norm_act(
        x, described, True, _momentum(norm), residual, activation
    )


def _unfused_norm_act(
    norm: nn.Module, x: Tensor, residual: Tensor | None, relu: nn.ReLU | None
) -> Tensor:
    x = norm(x)
    if residual is not None:
        x += residual
    return x if relu is None else relu(x)
