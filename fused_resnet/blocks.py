"""`BasicBlock`, `Bottleneck` and `ResNet` whose forward passes run fused.

They add nothing to a module but its class, so that `fuse` and `unfuse` need only assign classes.
What the fused way does not cover runs exactly as torchvision's, found out anew in every forward
pass: `obstacle` says what keeps a module from it, `input_obstacle` what keeps an input, and a
single convolution or norm whose arguments do not fit runs unfused inside `conv_norm_act`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.module import _has_any_global_hook
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

from . import backends, checks, functional, ops, reference
from .models import cifar

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

CONV_NORM_NAMES: dict[type[nn.Module], tuple[tuple[str, str], ...]] = {
    resnet.BasicBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    resnet.Bottleneck: (("conv1", "bn1"), ("conv2", "bn2"), ("conv3", "bn3")),
    resnet.ResNet: (("conv1", "bn1"),),
    cifar.PlainBlock: (("conv1", "bn1"), ("conv2", "bn2")),
    cifar.CifarResNet: (("conv1", "bn1"),),
}
"""Which attributes of torchvision's classes, and of those in `models`, are convolutions, and the
norms that follow them."""


def _named(function: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """A copy of a method that TorchScript can compile beside the one that overrides it."""
    copy = types.FunctionType(function.__code__, function.__globals__, name)
    return functools.update_wrapper(copy, function, ("__module__", "__annotations__"), ())


class _Fused(nn.Module):
    """What the fused classes have in common: they let go of what backends made of their tensors.

    Attributes:
        memory: "normal", or "low" to compute 1x1 convolutions twice in training rather than keep
            their outputs; `fuse` sets it.
    """

    memory = "normal"

    def train(self, mode: bool = True) -> nn.Module:
        _release(self)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        _release(self)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _release(self)
        super()._load_from_state_dict(*args, **kwargs)


class BasicBlock(_Fused, resnet.BasicBlock):
    """torchvision's `BasicBlock`, each convolution running with its norm, add and ReLU in one.

    Takes its arguments, has its parameters and buffers, and computes what it computes.
    """

    _unfused_forward = _named(resnet.BasicBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:  # TorchScript leaves out a branch, but not what follows a return
            return _block_forward(self, x)


class Bottleneck(_Fused, resnet.Bottleneck):
    """torchvision's `Bottleneck`, each convolution running with its norm, add and ReLU in one.

    Takes its arguments, has its parameters and buffers, and computes what it computes.
    """

    _unfused_forward = _named(resnet.Bottleneck.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _block_forward(self, x)


class ResNet(_Fused, resnet.ResNet):
    """torchvision's `ResNet`, the convolution, norm, ReLU and max-pool of its stem running in one.

    Whether its blocks are fused is up to them: `ResNet(fused_resnet.Bottleneck, [3, 4, 6, 3])`.
    """

    _unfused_forward_impl = _named(resnet.ResNet._forward_impl, "_unfused_forward_impl")

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._unfused_forward_impl(x)
        else:
            return _resnet_forward(self, x)


class PlainBlock(_Fused, cifar.PlainBlock):
    """`models.cifar`'s `PlainBlock`, each convolution running with its norm and ReLU in one."""

    _unfused_forward = _named(cifar.PlainBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _plain_block_forward(self, x)


class CifarResNet(_Fused, cifar.CifarResNet):
    """`models.cifar`'s `CifarResNet`, its first convolution, norm and ReLU running in one.

    Whether its blocks are fused is up to them: `fuse` fuses both.
    """

    _unfused_forward = _named(cifar.CifarResNet.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _cifar_resnet_forward(self, x)


def _block_forward(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    names = CONV_NORM_NAMES[_torchvision_class(block)]
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return block._unfused_forward(x)
    layers = _inference_layers(block, x)
    if layers is not None and (out := ops.residual_blocks(x, [layers])) is not None:
        return out
    if (out := _block_training(block, x)) is not None:
        return out
    modules = block._modules
    relu = modules["relu"]
    out = x
    for conv, norm in names[:-1]:
        out = conv_norm_act(modules[conv], modules[norm], out, None, relu)
    conv, norm = names[-1]
    last = modules[conv]
    if pads_channels(block.downsample) and block.downsample.padded_channels(x) == last.out_channels:
        shortcut = block.downsample.subsampled(x)
        return conv_norm_act(last, modules[norm], out, shortcut, relu, narrow=True)
    return conv_norm_act(last, modules[norm], out, _shortcut(block.downsample, x), relu)


def _inference_layers(block: BasicBlock | Bottleneck, x: Tensor) -> ops.BlockLayers | None:
    """A block without an obstacle as `ops.residual_blocks` takes it, or None where it cannot."""
    if torch.compiler.is_compiling():
        return None
    modules = block._modules
    pairs = [(modules[c], modules[n]) for c, n in CONV_NORM_NAMES[_torchvision_class(block)]]
    downsample = block.downsample
    if downsample is not None:
        if downsample_obstacle(downsample) is not None:
            return None
        pairs.append(tuple(downsample._modules.values()))
    layers = []
    for conv, norm in pairs:
        if uses_batch_statistics(norm) or not keeps_dtype(norm, x) or not norm.eps >= 0:
            return None
        layers.append(conv_arguments(conv, norm, x)[1:])
    return layers, downsample is not None


def _block_training(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor | None:
    """A block without an obstacle as one node of the graph, or None where it cannot be one."""
    pairs = [
        (block._modules[conv], block._modules[norm])
        for conv, norm in CONV_NORM_NAMES[_torchvision_class(block)]
    ]
    shapes = _trained_shapes(pairs, x)
    if shapes is None:
        return None
    downsample, shortcut_shape = block.downsample, x.shape
    if downsample is not None:
        if downsample_obstacle(downsample) is not None:
            return None
        projection = tuple(downsample._modules.values())
        projected = _trained_shapes([projection], x)
        if projected is None:
            return None
        pairs.append(projection)
        shapes.append(projected[0])
        shortcut_shape = projected[0]
    if shapes[-1 if downsample is None else -2] != shortcut_shape:
        return None
    layers = [conv_arguments(conv, norm, x)[1:] for conv, norm in pairs]
    groups = [sync_group(norm) for _, norm in pairs]
    low_memory = block.memory == "low"
    result = ops.residual_block_training(x, layers, groups, downsample is not None, low_memory)
    if result is None:
        return None
    out, statistics = result
    _count_batches([norm for _, norm in pairs], statistics, shapes)
    return out


def _trained_shapes(
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]], x: Tensor
) -> list[torch.Size] | None:
    """The shape of each convolution's output, on the one before, if its norm can be trained.

    None where a norm has no batch statistics, or something does not fit: the modules, run one by
    one, then say what.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not torch.is_grad_enabled():
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
    statistics: list[tuple[Tensor, Tensor, Tensor | None]],
    shapes: list[torch.Size],
) -> None:
    """Updates the norms' buffers as their forward passes would have."""
    for norm, (mean, var, shared), (N, _, P, Q) in zip(norms, statistics, shapes, strict=True):
        momentum = _momentum(norm)
        if norm.training and norm.track_running_stats:
            count = N * P * Q if shared is None else shared
            functional.update_running_statistics(
                norm.running_mean, norm.running_var, mean, var, count, momentum
            )


def _momentum(norm: nn.BatchNorm2d) -> float:
    """The weight of this batch in the running statistics, as `BatchNorm2d.forward` finds it."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if norm.momentum is None else norm.momentum


def _stages_forward(stages: list[nn.Module], x: Tensor) -> Tensor:
    """One stage after the other: all of their blocks in one call where nothing else is to be seen.

    Going through a block's modules in Python between two blocks would find the caches filled with
    the last one's weights, and takes twice as long as going through all blocks before.
    """
    blocks: list[ops.BlockLayers] | None = []
    for stage in stages:
        added = _stage_layers(stage, x)
        if added is None:
            blocks = None
            break
        blocks += added
    if blocks and (out := ops.residual_blocks(x, blocks)) is not None:
        return out
    for stage in stages:
        x = stage(x)
    return x


def _stage_layers(stage: nn.Module, x: Tensor) -> list[ops.BlockLayers] | None:
    """What calling a stage would run, or None where that is more than inference by its blocks."""
    if type(stage) is not nn.Sequential or _call_obstacle(stage) is not None:
        return None
    blocks = []
    for block in stage._modules.values():
        if (
            (type(block) is not Bottleneck and type(block) is not BasicBlock)
            or _call_obstacle(block) is not None
            or obstacle(block) is not None
        ):
            return None
        layers = _inference_layers(block, x)
        if layers is None:
            return None
        blocks.append(layers)
    return blocks


def _shortcut(downsample: nn.Module | None, x: Tensor) -> Tensor:
    if downsample is None:
        return x
    if downsample_obstacle(downsample) is not None:
        return downsample(x)
    conv, norm = downsample._modules.values()
    return conv_norm_act(conv, norm, x, None, None)


def _resnet_forward(model: ResNet, x: Tensor) -> Tensor:
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return model._unfused_forward_impl(x)
    modules = model._modules
    x = stem(modules["conv1"], modules["bn1"], modules["relu"], modules["maxpool"], x)
    x = _stages_forward([model.layer1, model.layer2, model.layer3, model.layer4], x)
    x = model.avgpool(x)
    return model.fc(torch.flatten(x, 1))


def _plain_block_forward(block: PlainBlock, x: Tensor) -> Tensor:
    if obstacle(block) is not None or input_obstacle(x) is not None:
        return block._unfused_forward(x)
    modules = block._modules
    for conv, norm in CONV_NORM_NAMES[cifar.PlainBlock]:
        x = conv_norm_act(modules[conv], modules[norm], x, None, modules["relu"])
    return x


def _cifar_resnet_forward(model: CifarResNet, x: Tensor) -> Tensor:
    if obstacle(model) is not None or input_obstacle(x) is not None:
        return model._unfused_forward(x)
    modules = model._modules
    x = conv_norm_act(modules["conv1"], modules["bn1"], x, None, modules["relu"])
    x = _stages_forward([model.layer1, model.layer2, model.layer3], x)
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
    result = ops.stem_training(x, arguments[1:], sync_group(norm), pool)
    if result is None:
        return None
    out, statistics = result
    _count_batches([norm], statistics, shapes)
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
        if narrow:
            residual = reference.pad_channels(residual, conv.out_channels)
        return _norm_act(norm, conv(x), residual, relu)
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


def _norm_act(
    norm: nn.BatchNorm2d, x: Tensor, residual: Tensor | None, relu: nn.ReLU | None
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
    if error is not None or x.dim() != 4 or (group is not None and torch.compiler.is_compiling()):
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
        type(norm) is not nn.SyncBatchNorm
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
    return structure_obstacle(module) or hook_obstacle(module)


def structure_obstacle(module: nn.Module) -> str | None:
    """What a block or a stem is made of that has no fused form, or None."""
    modules = module._modules
    for conv_name, norm_name in CONV_NORM_NAMES[_torchvision_class(module)]:
        reason = _conv_norm_obstacle(modules.get(conv_name), modules.get(norm_name))
        if reason is not None:
            conv_or_norm, reason = reason
            return f"{norm_name if conv_or_norm else conv_name} is {reason}"
    relu = modules.get("relu")
    if type(relu) is not nn.ReLU:
        return f"relu is {_a(relu)}"
    return None


def hook_obstacle(module: nn.Module) -> str | None:
    """Which hooks inside a block or a stem must fire, or None."""
    if _has_any_global_hook():
        return "global module hooks are registered"
    modules = module._modules
    for pair in CONV_NORM_NAMES[_torchvision_class(module)]:
        for name in pair:
            if reason := _call_obstacle(modules[name]):
                return f"{name} {reason}"
    if reason := _call_obstacle(modules["relu"]):
        return f"relu {reason}"
    return None


def downsample_obstacle(downsample: nn.Module) -> str | None:
    """Why a block's projection runs as the module it is, or None."""
    if type(downsample) is not nn.Sequential or len(downsample._modules) != 2:
        return f"downsample is {_a(downsample)}, not a convolution and a norm"
    conv, norm = downsample._modules.values()
    if reason := _conv_norm_obstacle(conv, norm):
        index, what = reason
        return f"downsample.{index} is {what}"
    for name, module in (("", downsample), (".0", conv), (".1", norm)):
        if reason := _call_obstacle(module):
            return f"downsample{name} {reason}"
    return None


def pads_channels(downsample: nn.Module | None) -> bool:
    """Whether a shortcut has no parameters, only zeros to add, and need not run as a module."""
    return type(downsample) is cifar.PaddedShortcut and _call_obstacle(downsample) is None


def pool_obstacle(maxpool: nn.Module) -> str | None:
    """Why a stem's pooling is not part of its convolution, or None."""
    if type(maxpool) is not nn.MaxPool2d:
        return f"maxpool is {_a(maxpool)}"
    if maxpool.ceil_mode or maxpool.return_indices or maxpool.dilation not in (1, (1, 1)):
        return "maxpool has ceil_mode, return_indices or dilation"
    if reason := _call_obstacle(maxpool):
        return f"maxpool {reason}"
    return None


def _conv_norm_obstacle(conv: nn.Module | None, norm: nn.Module | None) -> tuple[int, str] | None:
    """Which of the two (0 or 1) has no fused form, and what it is."""
    if type(conv) is not nn.Conv2d:
        return 0, _a(conv)
    if conv.padding_mode != "zeros":
        return 0, f"a Conv2d with padding_mode={conv.padding_mode!r}"
    if isinstance(conv.padding, str):
        return 0, f"a Conv2d with padding={conv.padding!r}"
    if type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d):
        return 1, _a(norm)
    return None


def _call_obstacle(module: nn.Module) -> str | None:
    """What besides the class's own forward calling this module would run."""
    state = module.__dict__
    for hooks in _HOOKS:
        if state[hooks]:
            return "carries hooks"
    return "has a forward of its own" if "forward" in state else None


def _torchvision_class(module: nn.Module) -> type[nn.Module]:
    for torchvision_class in CONV_NORM_NAMES:
        if isinstance(module, torchvision_class):
            return torchvision_class
    raise TypeError(f"{_a(module)} is not one of torchvision's residual modules")


def _a(module: nn.Module | None) -> str:
    if module is None:
        return "missing"
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _release(module: nn.Module) -> None:
    backends.release([*module.parameters(), *module.buffers()])
