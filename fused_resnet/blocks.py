"""`BasicBlock`, `Bottleneck` and `ResNet` whose forward passes run fused.

They add nothing to a module but its class, so that `fuse` and `unfuse` need only assign classes.
The functions after them run any module that `forms.py` knows. What the fused way does not cover
runs exactly as the original class does, found out anew in every forward pass: `obstacle` says what
keeps a module from it, `input_obstacle` what keeps an input, and a single convolution or norm whose
arguments do not fit runs unfused inside `conv_norm_act`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook
from torchvision.models import resnet

from . import backends, forms, functional, ops, originals, reference
from .forms import Form, Unit
from .layers import checks, watch
from .models import cifar
from .originals import (
    BatchNorm2d,
    Conv2d,
    FrozenBatchNorm2d,
    MaxPool2d,
    ReLU,
    Sequential,
    SyncBatchNorm,
)

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_NORMS = (BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d)

Layers = list[tuple[nn.Conv2d, nn.Module]]
"""Convolutions, each with the norm behind it."""


def named_copy(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """A copy of a method that TorchScript can compile beside the one that overrides it."""
    copy = types.FunctionType(function.__code__, function.__globals__, name)
    return functools.update_wrapper(copy, function, ("__module__", "__annotations__"), ())


class Fused(nn.Module):
    """What the fused classes have in common: they let go of what backends made of their tensors.

    Attributes:
        memory: "normal", or "low" to compute 1x1 convolutions twice in training rather than keep
            their outputs; `fuse` sets it.
        watch: "sample", or "full" to compare all values of the weights with the backend's copies
            in every call; `fuse` sets it.
    """

    memory = "normal"
    watch = "sample"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch.remember(self)

    def train(self, mode: bool = True) -> nn.Module:  # noqa: D102
        release(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        release(self)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        release(self)
        super()._load_from_state_dict(*args, **kwargs)


class BasicBlock(Fused, resnet.BasicBlock):
    """torchvision's `BasicBlock`, each convolution running with its norm, add and ReLU in one.

    Takes its arguments, has its parameters and buffers, and computes what it computes.
    """

    _unfused_forward = named_copy(resnet.BasicBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:  # TorchScript leaves out a branch, but not what follows a return
            return block_forward(self, x)


class Bottleneck(Fused, resnet.Bottleneck):
    """torchvision's `Bottleneck`, each convolution running with its norm, add and ReLU in one.

    Takes its arguments, has its parameters and buffers, and computes what it computes.
    """

    _unfused_forward = named_copy(resnet.Bottleneck.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return block_forward(self, x)


class ResNet(Fused, resnet.ResNet):
    """torchvision's `ResNet`, the convolution, norm, ReLU and max-pool of its stem running in one.

    Whether its blocks are fused is up to them: `ResNet(fused_resnet.Bottleneck, [3, 4, 6, 3])`.
    """

    _unfused_forward_impl = named_copy(resnet.ResNet._forward_impl, "_unfused_forward_impl")

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._unfused_forward_impl(x)
        else:
            return _resnet_forward(self, x)


class PlainBlock(Fused, cifar.PlainBlock):
    """`models.cifar`'s `PlainBlock`, each convolution running with its norm and ReLU in one."""

    _unfused_forward = named_copy(cifar.PlainBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _plain_block_forward(self, x)


class CifarResNet(Fused, cifar.CifarResNet):
    """`models.cifar`'s `CifarResNet`, its first convolution, norm and ReLU running in one.

    Whether its blocks are fused is up to them: `fuse` fuses both.
    """

    _unfused_forward = named_copy(cifar.CifarResNet.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _cifar_resnet_forward(self, x)


forms.register(
    Form(
        resnet.BasicBlock,
        BasicBlock,
        "BasicBlock",
        units=(Unit("conv1", "bn1", "relu"), Unit("conv2", "bn2", "relu")),
        shortcut="downsample",
    )
)
forms.register(
    Form(
        resnet.Bottleneck,
        Bottleneck,
        "Bottleneck",
        units=(
            Unit("conv1", "bn1", "relu"),
            Unit("conv2", "bn2", "relu"),
            Unit("conv3", "bn3", "relu"),
        ),
        shortcut="downsample",
    )
)
forms.register(
    Form(
        resnet.ResNet,
        ResNet,
        "stem",
        units=(Unit("conv1", "bn1", "relu"),),
        pool="maxpool",
        overrides=("forward", "_forward_impl"),
    )
)
forms.register(
    Form(
        cifar.PlainBlock,
        PlainBlock,
        "PlainBlock",
        units=(Unit("conv1", "bn1", "relu"), Unit("conv2", "bn2", "relu")),
    )
)
forms.register(Form(cifar.CifarResNet, CifarResNet, "stem", units=(Unit("conv1", "bn1", "relu"),)))


def run_unfused(module: nn.Module, x: Any, method: str = "forward") -> Tensor:
    """What the class that a module had before runs, as it is now."""
    return getattr(forms.of(module).original, method)(module, x)


def block_forward(block: nn.Module, x: Tensor) -> Tensor:
    """A residual block of any form."""
    form = forms.of(block)
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    layers = _inference_layers(block, x)
    if layers is not None and (out := ops.residual_blocks(x, [layers])) is not None:
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
        return run_unit(block, last, out, _shortcut(downsample, x))
    out = conv_norm_act(*_conv_norm(block, last), out, None, None)
    for between in working_parts(block, last.between):
        out = between(out)
    out += _shortcut(downsample, x)
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
    x = conv_norm_act(*_conv_norm(module, unit), x, residual, act_now, narrow=narrow)
    if between:
        for layer in between:
            x = layer(x)
        x = act(x)
    for layer in working_parts(module, unit.after):
        x = layer(x)
    return x


def working_parts(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The children of these names that would now do something to a tensor, or carry hooks."""
    children = []
    for name in names:
        child = forms.part(module, name)
        if child is not None and not _passes_through(child):
            children.append(child)
    return children


def _passes_through(module: nn.Module) -> bool:
    is_idle = forms.idle.get(type(module))
    return is_idle is not None and is_idle(module) and _call_obstacle(module) is None


def _conv_norm(module: nn.Module, unit: Unit) -> tuple[nn.Conv2d, nn.Module]:
    return forms.part(module, unit.conv), forms.part(module, unit.norm)


def _layers(block: nn.Module, may_pad: bool = False) -> tuple[Layers, bool] | None:
    """A block's convolutions and norms, and whether the last are the shortcut's.

    None where the block has more to do than these, ReLUs and the add, or its shortcut has no fused
    form. Whether one that pads channels, and has no layers, counts as fused is up to `may_pad`.
    """
    form = forms.of(block)
    if not form.is_block:
        return None
    pairs = []
    for unit in form.units_of(block):
        if working_parts(block, unit.between) or working_parts(block, unit.after):
            return None
        pairs.append(_conv_norm(block, unit))
    downsample = getattr(block, form.shortcut)
    has_projection = downsample is not None and not (may_pad and pads_channels(downsample))
    if has_projection:
        if downsample_obstacle(downsample) is not None:
            return None
        before, projection = split_downsample(downsample)
        if any(not _passes_through(module) for module in before):
            return None
        pairs.append(projection)
    return pairs, has_projection


def _inference_layers(block: nn.Module, x: Tensor) -> ops.BlockLayers | None:
    """A block without an obstacle as `ops.residual_blocks` takes it, or None where it cannot."""
    if (found := _layers(block)) is None:
        return None
    pairs, has_projection = found
    layers = []
    for conv, norm in pairs:
        if uses_batch_statistics(norm) or not keeps_dtype(norm, x) or not norm.eps >= 0:
            return None
        layers.append(conv_arguments(conv, norm, x)[1:])
    return layers, has_projection


def _block_training(block: nn.Module, x: Tensor) -> Tensor | None:
    """A block without an obstacle as one node of the graph, or None where it cannot be one."""
    if not _may_train_as_one(x) or (found := _layers(block, may_pad=True)) is None:
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
    layers = [conv_arguments(conv, norm, x)[1:] for conv, norm in pairs]
    groups = [sync_group(norm) for _, norm in pairs]
    low_memory = block.memory == "low"
    norms = [norm for _, norm in pairs]
    if not torch.compiler.is_compiling():
        keep = functools.partial(_count_batches, norms, shapes)
        return ops.residual_block_training(
            x, layers, groups, has_projection, low_memory, keep, step
        )
    if (downsample is not None and not has_projection) or any(g is not None for g in groups):
        return None
    result = ops.block_training_in_graph(x, layers, has_projection, low_memory)
    if result is None:
        return None
    out, statistics = result
    _count_batches(norms, shapes, statistics)
    return out


def _may_train_as_one(x: Tensor) -> bool:
    return torch.is_grad_enabled() and (ops.has_norm_kernel(x) or ops.holds_training_in_graphs(x))


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
        arguments = conv_arguments(conv, norm, x)
        if checks.conv_error("conv_bn_act", *arguments, None, "relu") is not None:
            return None
        N, _, *sizes = x.shape
        (K, _, *filter), (_, _, _, _, _, _, _, _, stride, padding, dilation, _) = (
            conv.weight.shape,
            arguments,
        )
        out = [
            (size + 2 * p - d * (r - 1) - 1) // s + 1
            for size, r, s, p, d in zip(sizes, filter, stride, padding, dilation, strict=True)
        ]
        shape = torch.Size((N, K, *out))
        # Whether processes go this way must not depend on their own share of a common batch.
        if shape.numel() <= K and sync_group(norm) is None:
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
            functional.update_running_statistics(
                norm.running_mean, norm.running_var, mean, var, count, momentum
            )


def _count_together(
    norms: list[nn.BatchNorm2d],
    statistics: list[tuple[Tensor, Tensor, Tensor | None]],
    counts: list[int],
) -> bool:
    """Whether it has done what `_count_batches` does, in four calls (launches) for all norms.

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
        torch._foreach_add_(running, batch, alpha=momentum)
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
    together: list[nn.Module] = []
    blocks: list[ops.BlockLayers] = []
    may_pad = ops.pads_shortcuts(x)
    for stage in stages:
        layers = _stage_layers(stage, x, may_pad)
        if layers is None:
            x = stage(_joined_stages(together, blocks, x))
            together, blocks = [], []
        else:
            together.append(stage)
            blocks += layers
    return _joined_stages(together, blocks, x)


def _joined_stages(stages: list[nn.Module], blocks: list[ops.BlockLayers], x: Tensor) -> Tensor:
    """Stages that consist of `blocks`, in one call where the backend has one."""
    if blocks and (out := ops.residual_blocks(x, blocks)) is not None:
        return out
    for stage in stages:
        x = stage(x)
    return x


def stages_layers(stages: list[nn.Module], x: Tensor) -> list[ops.BlockLayers] | None:
    """The blocks of all stages, or None where calling some stage is more than inference by them."""
    blocks: list[ops.BlockLayers] = []
    for stage in stages:
        added = _stage_layers(stage, x)
        if added is None:
            return None
        blocks += added
    return blocks


def _stage_layers(
    stage: nn.Module, x: Tensor, may_pad: bool = False
) -> list[ops.BlockLayers] | None:
    """What calling a stage would run, or None where that is more than inference by its blocks.

    The network around it has no obstacle. `may_pad`: see `ops.pads_shortcuts`.
    """
    if type(stage) is not Sequential or _call_obstacle(stage) is not None:
        return None
    plain = None if torch.compiler.is_compiling() else _plain_layers
    blocks = []
    for block in stage._modules.values():
        form = forms.of_fused(type(block))
        if form is None or not form.is_block:
            return None
        layers = plain and plain(block, form, may_pad)
        if layers is None:
            if _call_obstacle(block) is not None or own_obstacle(block) is not None:
                return None
            layers = _inference_layers(block, x)
        if layers is None:
            return None
        blocks.append(layers)
    return blocks


def _plain_layers(block: nn.Module, form: Form, may_pad: bool) -> ops.BlockLayers | None:
    """The layers of a block in which there is nothing out of the ordinary, in a tenth of the time.

    Nothing but what every module of these classes has: neither obstacles, hooks nor parts that may
    be idle. None says only that `own_obstacle` and `_inference_layers` have to find out.
    """
    if form.plain_names is None or form.replaced() is not None or _has_any_global_hook():
        return None
    state = block.__dict__
    children = state["_modules"]
    if _is_touched(state) or form.obstacle(block) is not None:
        return None
    act = None
    layers = []
    for conv_name, norm_name, act_name in form.plain_names:
        unit_act = children.get(act_name)
        if type(unit_act) is not ReLU:
            return None
        if unit_act is not act:
            act = unit_act
            if _is_touched(act.__dict__):
                return None
        layer = _plain_layer(children.get(conv_name), children.get(norm_name))
        if layer is None:
            return None
        layers.append(layer)
    downsample = children.get(form.shortcut)
    if downsample is None:
        # Whoever assigned something else than a module has it among the other attributes.
        return (layers, False) if getattr(block, form.shortcut) is None else None
    if may_pad and type(downsample) is cifar.PaddedShortcut:
        return _with_padded_shortcut(layers, downsample)
    if type(downsample) is not Sequential or _is_touched(downsample.__dict__):
        return None
    projection = [*downsample._modules.values()]
    layer = _plain_layer(*projection) if len(projection) == 2 else None
    if layer is None:
        return None
    layers.append(layer)
    return layers, True


def _with_padded_shortcut(
    layers: list[tuple], shortcut: cifar.PaddedShortcut
) -> ops.BlockLayers | None:
    added = layers[-1][0].size(0) - layers[0][0].size(1) * layers[0][-1]
    step = shortcut.stride
    if (
        _is_touched(shortcut.__dict__)
        or added < 0
        or added != shortcut.out_channels - shortcut.in_channels
        or type(step) is not int
        or step < 1
    ):
        return None
    return layers, -step


def _plain_layer(conv: nn.Module | None, norm: nn.Module | None) -> tuple | None:
    """`conv_arguments` but for the input; see `_plain_layers`."""
    if type(conv) is not Conv2d or type(norm) is not BatchNorm2d:
        return None
    of_conv, of_norm = conv.__dict__, norm.__dict__
    padding = of_conv["padding"]
    if (
        _is_touched(of_conv)
        or _is_touched(of_norm)
        or of_norm["training"]
        or of_conv["padding_mode"] != "zeros"
        or type(padding) is not tuple
    ):
        return None
    eps, parameters = of_norm["eps"], of_conv["_parameters"]
    buffers, affine = of_norm["_buffers"], of_norm["_parameters"]
    try:
        mean, var = buffers["running_mean"], buffers["running_var"]
        if mean is None or var is None or not eps >= 0:
            return None
        return (
            parameters["weight"],
            mean,
            var,
            affine["weight"],
            affine["bias"],
            eps,
            parameters["bias"],
            of_conv["stride"],
            padding,
            of_conv["dilation"],
            of_conv["groups"],
        )
    except KeyError:
        return None


def _is_touched(state: dict[str, Any]) -> bool:
    """`_call_obstacle` of the module with this `__dict__`, for `_plain_layers`."""
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_conv_forward" in state
    )


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    if downsample_obstacle(downsample) is not None:
        return downsample(x)
    before, (conv, norm) = split_downsample(downsample)
    for module in before:
        x = module(x)
    return conv_norm_act(conv, norm, x, None, None)


def split_downsample(
    downsample: nn.Sequential,
) -> tuple[list[nn.Module], tuple[nn.Conv2d, nn.Module]]:
    """What a projection without an obstacle does first, and its convolution and norm."""
    *before, conv, norm = downsample._modules.values()
    return before, (conv, norm)


def _resnet_forward(model: ResNet, x: Tensor) -> Tensor:
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x, "_forward_impl")
    modules = model._modules
    x = stem(modules["conv1"], modules["bn1"], modules["relu"], modules["maxpool"], x)
    x = stages_forward([model.layer1, model.layer2, model.layer3, model.layer4], x)
    x = model.avgpool(x)
    return model.fc(torch.flatten(x, 1))


def _plain_block_forward(block: PlainBlock, x: Tensor) -> Tensor:
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return run_unfused(block, x)
    for unit in forms.of(block).units_of(block):
        x = run_unit(block, unit, x)
    return x


def _cifar_resnet_forward(model: CifarResNet, x: Tensor) -> Tensor:
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return run_unfused(model, x)
    modules = model._modules
    x = conv_norm_act(modules["conv1"], modules["bn1"], x, None, modules["relu"])
    x = stages_forward([model.layer1, model.layer2, model.layer3], x)
    return model.fc(torch.flatten(model.avgpool(x), 1))


def stem(conv: nn.Conv2d, norm: nn.Module, relu: nn.ReLU, maxpool: nn.Module, x: Tensor) -> Tensor:
    """`maxpool(relu(norm(conv(x))))`."""
    if pool_obstacle(maxpool) is None and not uses_batch_statistics(norm):
        arguments = conv_arguments(conv, norm, x)
        pool = pool_arguments(maxpool)
        name = "conv_bn_act_max_pool"
        if (
            checks.conv_error(name, *arguments, None, "relu") is None
            and checks.pool_error(name, *arguments, *pool) is None
            and keeps_dtype(norm, x)
        ):
            return functional.run_conv_bn_act_max_pool(*arguments, "relu", *pool)
    if (out := _stem_training(conv, norm, maxpool, x)) is not None:
        return out
    return maxpool(conv_norm_act(conv, norm, x, None, relu))


def _stem_training(
    conv: nn.Conv2d, norm: nn.Module, maxpool: nn.MaxPool2d, x: Tensor
) -> Tensor | None:
    """The stem as one node of the graph, or None where it cannot be one."""
    if pool_obstacle(maxpool) is not None or (shapes := _trained_shapes([(conv, norm)], x)) is None:
        return None
    arguments, pool = conv_arguments(conv, norm, x), pool_arguments(maxpool)
    if checks.pool_error("conv_bn_act_max_pool", *arguments, *pool) is not None:
        return None
    group = sync_group(norm)
    if not torch.compiler.is_compiling():
        keep = functools.partial(_count_batches, [norm], shapes)
        return ops.stem_training(x, arguments[1:], group, pool, keep)
    result = ops.stem_training_in_graph(x, arguments[1:], pool) if group is None else None
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
    arguments = conv_arguments(conv, norm, x)
    if (
        (narrow or residual is None or residual.shape[1:2] == arguments[1].shape[:1])
        and checks.conv_error("conv_bn_act", *arguments, residual, activation) is None
        and keeps_dtype(norm, x)
    ):
        return ops.conv_bn_act(*arguments, residual, activation)
    if narrow:
        residual = reference.pad_channels(residual, conv.out_channels)
    return _unfused_norm_act(norm, conv(x), residual, relu)


def norm_act(norm: nn.BatchNorm2d | FrozenBatchNorm2d, x: Tensor, relu: nn.ReLU) -> Tensor:
    """`relu(norm(x))` in one where the arguments allow, without hooks."""
    if uses_batch_statistics(norm):
        return _norm_act(norm, x, None, relu)
    frozen = type(norm) is FrozenBatchNorm2d
    arguments = (x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    error = checks.batch_norm_error(
        "batch_norm_act", *arguments, False, 0.0, norm.eps, None, "relu"
    )
    if error is not None or x.dim() != 4 or (frozen and norm.weight.dtype is not x.dtype):
        return _unfused_norm_act(norm, x, None, relu)
    return functional.run_batch_norm_act(*arguments, False, 0.0, norm.eps, None, "relu")


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
        if not uses_batch_statistics(norm) and keeps_dtype(norm, self._x):
            _, *arguments = conv_arguments(conv, norm, self._x)
            if (out := self._in_one(*arguments, None, activation)) is not None:
                return out
        return conv_norm_act(conv, norm, self.tensor(), None, relu)

    def conv(self, conv: nn.Conv2d) -> Tensor:
        """A convolution of it that no norm follows."""
        if has_kernel(conv, self._x):
            _, *arguments = _bare_conv_arguments(conv, self._x)
            if (out := self._in_one(*arguments, None, "none")) is not None:
                return out
        return bare_conv(conv, self.tensor())

    def _in_one(self, *convolution: Any) -> Tensor | None:
        norm, x = self._norm, self._x
        if (
            self._computed is not None
            or uses_batch_statistics(norm)
            or (type(norm) is FrozenBatchNorm2d and norm.weight.dtype is not x.dtype)
        ):
            return None
        before = (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        name = "norm_conv_bn_act"
        if (
            ops.registration.needs_grad(x, *before, *convolution)
            or checks.conv_error(name, x, *convolution) is not None
            or checks.prologue_error(name, x, *before) is not None
        ):
            return None
        return ops.norm_conv_bn_act(x, *before, *convolution)


def bare_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`, without hooks, by our kernel where there is one and no gradients are recorded."""
    if has_kernel(conv, x) and not ops.registration.needs_grad(x, conv.weight, conv.bias):
        arguments = _bare_conv_arguments(conv, x)
        if checks.conv_error("conv_bn_act", *arguments, None, "none") is None:
            return ops.conv_bn_act(*arguments, None, "none")
    return conv(x)


def has_kernel(conv: nn.Conv2d, x: Tensor) -> bool:
    """See `backends.has_kernel`; `x` is like the convolution's input."""
    return backends.has_kernel(x.device.type, x.dtype, conv.weight.shape, conv.groups)


def conv_add(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """`conv(x) + residual` in one where the arguments allow, without hooks."""
    arguments = _bare_conv_arguments(conv, x)
    if checks.conv_error("conv_bn_act", *arguments, residual, "none") is None:
        return ops.conv_bn_act(*arguments, residual, "none")
    return conv(x) + residual


def _bare_conv_arguments(conv: nn.Conv2d, x: Tensor) -> tuple:
    """`conv_arguments` without a norm: one with mean 0 and var + eps = 1, which changes no bit."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    zeros = x.new_zeros(conv.out_channels, dtype=dtype)
    return (
        # Not an eps of 0, which `F.batch_norm` refuses in some versions of torch.
        *(x, conv.weight, zeros, torch.full_like(zeros, 0.5), None, None, 0.5),
        *(conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups),
    )


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
    tensors = (x, running_mean, running_var, norm.weight, norm.bias, True)
    error = checks.batch_norm_error(
        "batch_norm_act", *tensors, momentum, norm.eps, residual, activation, group is not None
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
        return functional.run_sync_batch_norm_act(
            *tensors[:-1], _momentum(norm), norm.eps, group, residual, activation
        )
    return functional.run_batch_norm_act(*tensors, _momentum(norm), norm.eps, residual, activation)


def _unfused_norm_act(
    norm: nn.Module, x: Tensor, residual: Tensor | None, relu: nn.ReLU | None
) -> Tensor:
    x = norm(x)
    if residual is not None:
        x += residual
    return x if relu is None else relu(x)


def sync_group(norm: nn.Module) -> dist.ProcessGroup | None:
    """The processes that share a norm's batch statistics, if it is such a norm and there are any.

    As `SyncBatchNorm.forward` decides: otherwise it is an ordinary batch norm.
    """
    if (
        type(norm) is not SyncBatchNorm
        or not norm.training
        or not dist.is_available()
        or not dist.is_initialized()
    ):
        return None
    group = norm.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def uses_batch_statistics(norm: nn.BatchNorm2d | FrozenBatchNorm2d) -> bool:
    """Whether the norm's next forward pass normalises with the batch's own statistics."""
    if type(norm) is FrozenBatchNorm2d:
        return False
    if norm.training:
        return True
    buffers = norm._buffers
    try:
        return buffers["running_mean"] is None and buffers["running_var"] is None
    except KeyError:  # someone made them parameters or plain attributes
        return norm.running_mean is None and norm.running_var is None


def keeps_dtype(norm: nn.Module, x: Tensor) -> bool:
    """Whether the norm's output has the dtype of the convolution's, as a fused one's has.

    `FrozenBatchNorm2d` multiplies and adds, so float32 buffers make a 16-bit tensor float32.
    """
    if type(norm) is not FrozenBatchNorm2d:
        return True
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return norm.weight.dtype is (torch.get_autocast_dtype(device) if autocast else x.dtype)


def conv_arguments(conv: nn.Conv2d, norm: nn.BatchNorm2d | FrozenBatchNorm2d, x: Tensor) -> tuple:
    """The first twelve arguments of the operator `conv_bn_act`."""
    # Looked up where modules keep them: `module.weight` takes ten times as long.
    buffers = norm._buffers
    affine = buffers if type(norm) is FrozenBatchNorm2d else norm._parameters
    try:
        return (
            x,
            conv._parameters["weight"],
            buffers["running_mean"],
            buffers["running_var"],
            affine["weight"],
            affine["bias"],
            norm.eps,
            conv._parameters["bias"],
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
    except KeyError:  # the parameters of nn.DataParallel's replicas are plain attributes
        return (
            x,
            conv.weight,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            norm.eps,
            conv.bias,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )


def pool_arguments(maxpool: nn.MaxPool2d) -> tuple[tuple[int, int], ...]:
    """Kernel size, stride and padding as pairs."""
    values = (maxpool.kernel_size, maxpool.stride, maxpool.padding)
    return tuple(value if isinstance(value, tuple) else (value, value) for value in values)


def input_obstacle(x: Tensor) -> str | None:
    """Why an input makes a module run unfused, or None."""
    if type(x) not in _PLAIN_TENSORS:
        return f"input is a {type(x).__name__}"
    if functional.transforms_active():
        return "a functorch transform or forward-mode differentiation is active"
    if torch.jit.is_tracing() or (torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()):
        return "the model is being traced for TorchScript or ONNX"
    return None


def obstacle(module: nn.Module) -> str | None:
    """Why a block or a network's stem runs unfused whatever its input, or None."""
    name = originals.replaced()
    return own_obstacle(module) if name is None else f"{name} has been replaced"


def own_obstacle(module: nn.Module) -> str | None:
    """The obstacles that are this module's, while torch's functions are known to be its own."""
    name = forms.of(module).replaced()
    if name is not None:
        return f"{name} has been replaced"
    return structure_obstacle(module) or hook_obstacle(module)


def structure_obstacle(module: nn.Module) -> str | None:
    """What a module that `forms` knows is made of that has no fused form, or None."""
    form = forms.of(module)
    for unit in form.units_of(module):
        conv, norm = _conv_norm(module, unit)
        if reason := _conv_obstacle(conv):
            return f"{unit.conv} is {reason}"
        if reason := _norm_obstacle(norm):
            return f"{unit.norm} is {reason}"
        if reason := _act_obstacle(forms.part(module, unit.act)):
            return f"{unit.act} is {reason}"
    for norm, act in form.norms:
        if reason := _norm_obstacle(forms.part(module, norm)):
            return f"{norm} is {reason}"
        if reason := _act_obstacle(forms.part(module, act)):
            return f"{act} is {reason}"
    for conv in form.convs:
        if reason := _conv_obstacle(forms.part(module, conv)):
            return f"{conv} is {reason}"
    return form.obstacle(module)


def is_lazy(module: nn.Module) -> bool:
    """Whether a child's class changes in the first call, which finds its number of channels.

    Until then it is an obstacle, and afterwards it may be none.
    """
    return any(isinstance(child, LazyModuleMixin) for child in module.modules())


def hook_obstacle(module: nn.Module) -> str | None:
    """Which hooks inside a module must fire, or None."""
    if _has_any_global_hook():
        return "global module hooks are registered"
    for name in forms.of(module).names_of(module):
        if reason := _call_obstacle(forms.part(module, name)):
            return f"{name} {reason}"
    return None


def downsample_obstacle(downsample: nn.Module, what: str = "downsample") -> str | None:
    """Why a block's projection runs as the module it is, or None; `what` is its name."""
    if type(downsample) is not Sequential or len(downsample._modules) not in (2, 3):
        return f"{what} is {described(downsample)}, not a convolution and a norm"
    first = len(downsample._modules) - 2
    _, (conv, norm) = split_downsample(downsample)
    if reason := _conv_obstacle(conv):
        return f"{what}.{first} is {reason}"
    if reason := _norm_obstacle(norm):
        return f"{what}.{first + 1} is {reason}"
    for name, module in (("", downsample), (f".{first}", conv), (f".{first + 1}", norm)):
        if reason := _call_obstacle(module):
            return f"{what}{name} {reason}"
    return None


def pads_channels(downsample: nn.Module | None) -> bool:
    """Whether a shortcut has no parameters, only zeros to add, and need not run as a module."""
    return type(downsample) is cifar.PaddedShortcut and _call_obstacle(downsample) is None


def pool_obstacle(maxpool: nn.Module) -> str | None:
    """Why a stem's pooling is not part of its convolution, or None."""
    if type(maxpool) is not MaxPool2d:
        return f"maxpool is {described(maxpool)}"
    if maxpool.ceil_mode or maxpool.return_indices or maxpool.dilation not in (1, (1, 1)):
        return "maxpool has ceil_mode, return_indices or dilation"
    if reason := _call_obstacle(maxpool):
        return f"maxpool {reason}"
    return None


def bare_conv_obstacle(conv: nn.Module | None) -> str | None:
    """Why a convolution that no norm follows runs as the module it is, or None."""
    return _conv_obstacle(conv) or _call_obstacle(conv)


def _conv_obstacle(conv: nn.Module | None) -> str | None:
    """Why a convolution has no fused form, or None."""
    if type(conv) is not Conv2d:
        return described(conv)
    if conv.padding_mode != "zeros":
        return f"a Conv2d with padding_mode={conv.padding_mode!r}"
    if isinstance(conv.padding, str):
        return f"a Conv2d with padding={conv.padding!r}"
    return None


def _norm_obstacle(norm: nn.Module | None) -> str | None:
    """Why a norm has no fused form, or None."""
    return None if type(norm) in _NORMS else described(norm)


def _act_obstacle(act: nn.Module | None) -> str | None:
    """Why an activation has no fused form, or None."""
    return None if type(act) is ReLU else described(act)


def _call_obstacle(module: nn.Module) -> str | None:
    """What besides the class's own forward calling this module would run."""
    state = module.__dict__
    compiling = torch.compiler.is_compiling()
    for hooks in _HOOKS:
        # A compiler guards on more than twice as much of what is reached through the dictionary.
        if getattr(module, hooks) if compiling else state[hooks]:
            return "carries hooks"
    own = "forward" in state or "_conv_forward" in state
    return "has a forward of its own" if own else None


def described(module: nn.Module | None) -> str:
    """A module's class with an article, for messages."""
    if module is None:
        return "missing"
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def release(module: nn.Module) -> None:
    """Lets go of what backends made of a module's tensors."""
    backends.release([*module.parameters(), *module.buffers()])
