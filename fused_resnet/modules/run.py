"""Runs the modules that `forms.py` knows, fused as far as `read.py` allows.

What the fused way does not cover runs exactly as the original class does: `obstacle` says what
keeps a module from it, `input_obstacle` what keeps an input, and a single convolution or norm whose
arguments do not fit runs unfused inside `conv_norm_act`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import backends, forms, reference
from ..forms import Form, Unit
from ..layers import checks
from ..layers.description import Block, ConvNorm, Layer, Norm, TrainedBlock
from ..ops import conv_bn_act_max_pool, running_statistics
from ..ops.conv_bn_act import conv_bn_act
from ..ops.gradients import has_norm_kernel
from ..ops.norm_conv_bn_act import norm_conv_bn_act
from ..ops.pool_linear import pool_linear
from ..ops.registration import needs_grad
from ..ops.residual_blocks import pads_shortcuts, residual_blocks
from ..ops.training.graphs import (
    block_training_in_graph,
    holds_training_in_graphs,
    stem_training_in_graph,
)
from ..ops.training.nodes import residual_block_training, stem_training
from ..originals import FrozenBatchNorm2d
from . import graphs, metadata, plans, quantized
from .read import (
    bare_layer,
    block_layers,
    blocks_of_stage,
    calls_forward_alone,
    conv_norm,
    downsample_obstacle,
    head_obstacle,
    inference_block,
    input_obstacle,
    keeps_dtype,
    layer_of,
    norm_of,
    obstacle,
    obstacle_of_call,
    pads_channels,
    plain_block,
    plain_stages,
    pool_obstacle,
    pool_of,
    split_downsample,
    stage_blocks,
    sync_group,
    uses_batch_statistics,
    working_parts,
)


def run_unfused(module: nn.Module, x: Any, method: str = "forward") -> Tensor:
    """What the class that a module had before runs, as it is now.

    Unless the input is one on whose values the module runs fused: see `metadata.py`.
    """
    if (out := metadata.run_on_values(module, x, method)) is not None:
        return out
    return getattr(forms.of(module).original, method)(module, x)


def block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A residual block of any form."""
    if block.quantization is not None and (out := quantized.block_output(block, x)) is not None:
        return out
    form = forms.of(block)
    if not torch.compiler.is_compiling() and obstacle_of_call(x) is None:
        records = torch.is_grad_enabled()
        described = plain_block(block, form, records, records)
        if described is not None:
            out = (
                _plain_training(block, form, described, x)
                if records
                else residual_blocks(x, [described])
            )
            if out is not None:
                return out
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    described = inference_block(block, x)
    if described is not None and (out := residual_blocks(x, [described])) is not None:
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


def _plain_training(block: nn.Module, form: Form, described: Block, x: Tensor) -> Tensor | None:
    """A block that `plain_block` has described as one node of the graph, or None; see below."""
    plan = _plan_of(described, x)
    if plan is None:
        return None
    children = block._modules
    norms = []
    for _, norm, _ in form.plain_names:
        norms.append(children[norm])
    if described.has_projection:
        _, norm = children[form.shortcut]._modules.values()
        norms.append(norm)
    parameters: list[Tensor | None] = []
    for weight, norm, bias, _, _, _, _ in described.layers:
        parameters += (weight, bias, norm.weight, norm.bias)
    keep = functools.partial(_count_batches, norms, plan.counts)
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
    for (_, norm, _, *geometry), group in zip(block.layers, groups, strict=True):
        layers.append(Layer(tuple(geometry), norm.eps, group))
    trained = TrainedBlock(tuple(layers), *block[1:])
    return _Plan(trained, [N * P * Q for N, _, P, Q in shapes])


def _block_training(block: nn.Module, x: Tensor) -> Tensor | None:
    """A block without an obstacle as one node of the graph, or None where it cannot be one."""
    if not _may_train_as_one(x) or (found := block_layers(block, may_pad=True)) is None:
        return None
    pairs, has_projection = found
    norms = [norm for _, norm in pairs]
    if not all(map(uses_batch_statistics, norms)):
        return None
    layers = [layer_of(conv, norm) for conv, norm in pairs]
    groups = [sync_group(norm) for norm in norms]
    downsample, step = getattr(block, forms.of(block).shortcut), 0
    if downsample is not None and not has_projection:
        step = downsample.stride
        if downsample.padded_channels(x) != layers[-1].weight.size(0):
            return None
    described = Block(layers, has_projection, step, block.memory == "low")
    plan = _trained(described, groups, x)
    if plan is None:
        return None
    if not torch.compiler.is_compiling():
        keep = functools.partial(_count_batches, norms, plan.counts)
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
    _count_batches(norms, plan.counts, statistics)
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


def _count_batches(
    norms: list[nn.BatchNorm2d],
    counts: list[int],
    statistics: list[tuple[Tensor, Tensor, Tensor | None]],
) -> None:
    """Updates the norms' buffers as their forward passes would have."""
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
    batches, means, variances, batch_means, batch_variances = [], [], [], [], []
    for norm, (mean, var, shared) in zip(norms, statistics, strict=True):
        # Looked up where modules keep them: an attribute takes ten times as long.
        buffers = norm._buffers
        running_mean, running_var = buffers.get("running_mean"), buffers.get("running_var")
        tracked = buffers.get("num_batches_tracked")
        if (
            not (norm.training and norm.track_running_stats)
            or norm.momentum != momentum
            or tracked is None
            or running_mean is None
            or running_var is None
            or not running_mean.dtype is running_var.dtype is mean.dtype
            or shared is not None
        ):
            return False
        batches.append(tracked)
        means.append(running_mean)
        variances.append(running_var)
        batch_means.append(mean)
        batch_variances.append(var)
    factors = [count / (count - 1) for count in counts]
    with torch.no_grad():
        torch._foreach_add_(batches, 1)
        unbiased = torch._foreach_mul(batch_variances, factors)
        running = means + variances
        torch._foreach_mul_(running, 1 - momentum)
        # Not with `alpha`, whose product is not rounded as that of `F.batch_norm` is.
        batch = [*batch_means, *unbiased]
        torch._foreach_add_(running, torch._foreach_mul(batch, momentum))
    return True


def _momentum(norm: nn.BatchNorm2d) -> float:
    """The weight of this batch in the running statistics, as `BatchNorm2d.forward` finds it."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


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
    if (out := plans.again(model, x)) is not None:
        return out
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x, "_forward_impl")
    return graphs.captured(model, x, _resnet)


def _resnet(model: nn.Module, x: Tensor) -> Tensor:
    return _planned(model, x, _RESNET_PARTS, _resnet_features)


def _planned(
    model: nn.Module,
    x: Tensor,
    names: tuple[str, ...],
    features: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """`features` of a network, by its children of these names, and its head, from plans."""
    children = model._modules
    parts = [children[name] for name in names]
    avgpool, fc = children["avgpool"], children["fc"]
    if plans.include_heads(x) and head_obstacle(avgpool, fc) is None:
        return plans.planned(
            model,
            [*parts, avgpool, fc],
            x,
            lambda model, x: head(model.avgpool, model.fc, features(model, x)),
            whole=True,
        )
    return head(avgpool, fc, plans.planned(model, parts, x, features))


_RESNET_PARTS = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


def _resnet_features(model: nn.Module, x: Tensor) -> Tensor:
    """All of it but the pool and the linear layer at the end."""
    _, _, _, maxpool, *stages = (model._modules[name] for name in _RESNET_PARTS)
    # Before the stem, which leaves nothing of these modules in the caches, and runs no hook.
    plain = None if pool_obstacle(maxpool) is not None else plain_stages(stages)
    return stages_forward(stages, network_stem(model, x), plain)


_CIFAR_PARTS = ("conv1", "bn1", "relu", "layer1", "layer2", "layer3")


def _cifar_features(model: nn.Module, x: Tensor) -> Tensor:
    _, _, _, *stages = (model._modules[name] for name in _CIFAR_PARTS)
    return stages_forward(stages, network_stem(model, x))


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
    relu = forms.part(network, unit.act)
    if form.pool is None:
        return conv_norm_act(conv, norm, x, None, relu)
    return stem(conv, norm, relu, forms.part(network, form.pool), x)


def plain_block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A block of two convolutions without a shortcut."""
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    for unit in forms.of(block).units_of(block):
        x = run_unit(block, unit, x)
    return x


def cifar_resnet_forward(model: nn.Module, x: Tensor) -> Tensor:
    """A network for small images: its first convolution, its stages and the rest."""
    if (out := plans.again(model, x)) is not None:
        return out
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x)
    return graphs.captured(model, x, _cifar_resnet)


def _cifar_resnet(model: nn.Module, x: Tensor) -> Tensor:
    return _planned(model, x, _CIFAR_PARTS, _cifar_features)


def head(avgpool: nn.Module, fc: nn.Module, x: Tensor) -> Tensor:
    """`fc(flatten(avgpool(x), 1))`."""
    if (
        not torch.compiler.is_compiling()
        and head_obstacle(avgpool, fc) is None
        and (out := pool_linear(x, fc.weight, fc.bias)) is not None
    ):
        return out
    return fc(torch.flatten(avgpool(x), 1))


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
        keep = functools.partial(_count_batches, [norm], counts)
        return stem_training(x, layer, group, pool, keep)
    result = stem_training_in_graph(x, layer, pool) if group is None else None
    if result is None:
        return None
    out, statistics = result
    _count_batches([norm], counts, statistics)
    return out


def conv_norm_act(
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d | FrozenBatchNorm2d,
    x: Tensor,
    residual: Tensor | None,
    relu: nn.ReLU | None,
    narrow: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """`relu(norm(conv(x)) + residual)`, in one where the arguments allow, without hooks.

    Where they do not, this calls the modules, which then raise what they raise. If `narrow`, a
    residual of fewer channels stands for one with as many zeros before as behind them. `weight`
    stands in for the convolution's.
    """
    activation = "none" if relu is None else "relu"
    if uses_batch_statistics(norm):
        return _norm_act(norm, _conv(conv, x, weight), residual, relu, narrow)
    layer = layer_of(conv, norm)
    if weight is not None:
        layer = layer._replace(weight=weight)
    if (
        (narrow or residual is None or residual.shape[1:2] == layer.weight.shape[:1])
        and checks.conv_error("conv_bn_act", x, layer, residual, activation) is None
        and keeps_dtype(norm, x)
    ):
        return conv_bn_act(x, layer, residual, activation)
    if narrow:
        residual = reference.pad_channels(residual, conv.out_channels)
    return _unfused_norm_act(norm, _conv(conv, x, weight), residual, relu)


def _conv(conv: nn.Conv2d, x: Tensor, weight: Tensor | None) -> Tensor:
    return conv(x) if weight is None else conv._conv_forward(x, weight, conv.bias)


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
        # Whoever exports a model to train it looks for torch's own norms.
        or torch.compiler.is_exporting()
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
