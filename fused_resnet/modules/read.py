"""What a module is made of: its layers as operators take them, or what keeps it from running fused.

Found anew in every forward pass, since hooks and settings may come and go. An obstacle is a text
that names the part.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.module import _has_any_global_hook

from .. import forms, originals
from ..forms import Form, Unit
from ..layers.description import Block, ConvNorm, Norm, Pool
from ..models import cifar
from ..ops.registration import transforms_active
from ..originals import (
    AdaptiveAvgPool2d,
    AnyNorm,
    BatchNorm2d,
    Conv2d,
    FrozenBatchNorm2d,
    Identity,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    SyncBatchNorm,
)
from . import norms
from .activations import is_relu, text_of

_PLAIN_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_COUNTING_PACKAGES = frozenset({"ptflops"})

# How many `unfused()` are under way, in all threads.
_unfused = 0
_unfused_lock = threading.Lock()

_new = tuple.__new__

_NORMS = (BatchNorm2d, SyncBatchNorm, FrozenBatchNorm2d)

Layers = list[tuple[nn.Conv2d, Any]]
"""Convolutions, each with the norm behind it."""


def working_parts(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The children of these names that would now do something to a tensor, or carry hooks."""
    children = []
    for name in names:
        child = forms.part(module, name)
        if child is not None and not passes_through(child):
            children.append(child)
    return children


def passes_through(module: nn.Module) -> bool:
    """Whether a module would now return its input unchanged, and carries no hooks."""
    is_idle = forms.idle.get(type(module))
    return is_idle is not None and is_idle(module) and call_obstacle(module) is None


def conv_norm(module: nn.Module, unit: Unit) -> tuple[nn.Conv2d, Any]:
    """The convolution and the norm of a unit."""
    return forms.part(module, unit.conv), forms.part(module, unit.norm)


def shortcut(block: nn.Module, form: Form) -> Any:
    """A residual block's projection, or None where its shortcut is its input."""
    child = getattr(block, form.shortcut or "", None)
    return None if isinstance(child, nn.Module) and passes_through(child) else child


def block_layers(block: nn.Module, may_pad: bool = False) -> tuple[Layers, bool] | None:
    """A block's convolutions and norms, and whether the last are the shortcut's.

    None where the block has more to do than these, ReLUs and the add, or its shortcut has no fused
    form. Whether one that pads channels, and has no layers, counts as fused is up to `may_pad`.
    """
    form = forms.of(block)
    if not form.is_block:
        return None
    pairs = []
    for unit in form.units_of(block):
        around = (*unit.before, *unit.between, *unit.after)
        if not is_relu(forms.part(block, unit.act)) or working_parts(block, around):
            return None
        pairs.append(conv_norm(block, unit))
    downsample = shortcut(block, form)
    has_projection = downsample is not None and not (may_pad and pads_channels(downsample))
    if has_projection:
        if downsample_obstacle(downsample) is not None:
            return None
        before, projection = split_downsample(downsample)
        if any(not passes_through(module) for module in before):
            return None
        pairs.append(projection)
    return pairs, has_projection


def inference_block(block: nn.Module, x: Tensor) -> Block | None:
    """A block without an obstacle as `ops.residual_blocks` takes it, or None where it cannot."""
    if (found := block_layers(block)) is None:
        return None
    pairs, has_projection = found
    layers = []
    for conv, norm in pairs:
        layer = layer_of(conv, norm)
        if uses_batch_statistics(norm) or not keeps_dtype(norm, x) or not layer.norm.eps >= 0:
            return None
        layers.append(layer)
    return Block(layers, has_projection)


def stages_blocks(stages: list[nn.Module], x: Tensor) -> list[Block] | None:
    """The blocks of all stages, or None where calling some stage is more than inference by them."""
    blocks: list[Block] = []
    for stage in stages:
        added = stage_blocks(stage, x)
        if added is None:
            return None
        blocks += added
    return blocks


def stage_blocks(stage: nn.Module, x: Tensor, may_pad: bool = False) -> list[Block] | None:
    """What calling a stage would run, or None where that is more than inference by its blocks.

    The network around it has no obstacle. `may_pad`: see `ops.pads_shortcuts`.
    """
    if type(stage) is not Sequential or call_obstacle(stage) is not None:
        return None
    plain = None if torch.compiler.is_compiling() else plain_block
    blocks = []
    for block in stage._modules.values():
        form = forms.of_fused(type(block))
        if form is None or not form.is_block:
            return None
        described = plain and plain(block, form, may_pad)
        if described is None:
            if call_obstacle(block) is not None or own_obstacle(block) is not None:
                return None
            described = inference_block(block, x)
        if described is None:
            return None
        blocks.append(described)
    return blocks


def plain_stages(stages: list[nn.Module]) -> list[Block] | None:
    """The blocks of all stages, or None unless all of them are plain; see `plain_block`."""
    if torch.compiler.is_compiling():
        return None
    blocks = []
    for stage in stages:
        if type(stage) is not Sequential or call_obstacle(stage) is not None:
            return None
        for block in stage._modules.values():
            form = forms.of_fused(type(block))
            if form is None or not form.is_block:
                return None
            described = plain_block(block, form, False)
            if described is None:
                return None
            blocks.append(described)
    return blocks


def blocks_of_stage(stage: nn.Module) -> list[nn.Module] | None:
    """The fused blocks that calling a stage calls one after the other, if it does nothing else."""
    if type(stage) is not Sequential or call_obstacle(stage) is not None:
        return None
    blocks = list(stage._modules.values())
    for block in blocks:
        form = forms.of_fused(type(block))
        if form is None or not form.is_block:
            return None
    return blocks


def calls_forward_alone(block: nn.Module) -> bool:
    """Whether calling a block runs the forward pass of its class and no hooks."""
    return call_obstacle(block) is None


def plain_block(
    block: nn.Module, form: Form, may_pad: bool, training: bool = False
) -> Block | None:
    """A block in which there is nothing out of the ordinary, in a tenth of the time.

    Nothing but what every module of these classes has: neither obstacles, hooks nor parts that may
    be idle. None says only that `own_obstacle`, `inference_block` and `block_layers` have to find
    out. Where `training`, its norms are `BatchNorm2d` that take the batch's statistics.
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
        layer = _plain_layer(children.get(conv_name), children.get(norm_name), training)
        if layer is None:
            return None
        layers.append(layer)
    downsample = children.get(form.shortcut)
    if downsample is None or (type(downsample) is Identity and passes_through(downsample)):
        # Whoever assigned something else than a module has it among the other attributes.
        name = form.shortcut
        if downsample is None and name is not None and getattr(block, name, None) is not None:
            return None
        return _new(Block, (layers, False, 0, training and block.memory == "low"))
    if may_pad and type(downsample) is cifar.PaddedShortcut:
        low_memory = training and block.memory == "low"
        return _with_padded_shortcut(layers, downsample, low_memory)
    if type(downsample) is not Sequential or _is_touched(downsample.__dict__):
        return None
    projection = [*downsample._modules.values()]
    if len(projection) != 2:
        return None
    layer = _plain_layer(projection[0], projection[1], training)
    if layer is None:
        return None
    layers.append(layer)
    return _new(Block, (layers, True, 0, training and block.memory == "low"))


def _with_padded_shortcut(
    layers: list[ConvNorm], shortcut: cifar.PaddedShortcut, low_memory: bool
) -> Block | None:
    first, last = layers[0], layers[-1]
    added = last.weight.size(0) - first.weight.size(1) * first.groups
    step = shortcut.stride
    if (
        _is_touched(shortcut.__dict__)
        or added < 0
        or added != shortcut.out_channels - shortcut.in_channels
        or type(step) is not int
        or step < 1
    ):
        return None
    return Block(layers, False, step, low_memory)


def _plain_layer(conv: nn.Module | None, norm: nn.Module | None, training: bool) -> ConvNorm | None:
    """`layer_of`; see `plain_block`."""
    if type(conv) is not Conv2d or type(norm) is not BatchNorm2d:
        return None
    of_conv, of_norm = conv.__dict__, norm.__dict__
    padding = of_conv["padding"]
    if (
        # `_is_touched`, twice: this is asked of every convolution in every call.
        of_conv["_forward_hooks"]
        or of_conv["_forward_pre_hooks"]
        or of_conv["_backward_hooks"]
        or of_conv["_backward_pre_hooks"]
        or "forward" in of_conv
        or "_conv_forward" in of_conv
        or "_compiled_call_impl" in of_conv
        or of_norm["_forward_hooks"]
        or of_norm["_forward_pre_hooks"]
        or of_norm["_backward_hooks"]
        or of_norm["_backward_pre_hooks"]
        or "forward" in of_norm
        or "_compiled_call_impl" in of_norm
        or of_norm["training"] is not training
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
        # `Norm(...)` and `ConvNorm(...)` without a call of Python's each.
        plain_norm = _new(Norm, (mean, var, affine["weight"], affine["bias"], eps))
        return _new(
            ConvNorm,
            (
                parameters["weight"],
                plain_norm,
                parameters["bias"],
                of_conv["stride"],
                padding,
                of_conv["dilation"],
                of_conv["groups"],
            ),
        )
    except KeyError:
        return None


def _is_touched(state: dict[str, Any]) -> bool:
    """`call_obstacle` of the module with this `__dict__`, for `plain_block`."""
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or "_conv_forward" in state
        or "_compiled_call_impl" in state
    )


def in_order(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """What a module applies one after the other, with the containers that are part of it before.

    Of `nn.Sequential` and the classes in `forms.in_order`; of others, the module itself.
    """
    names: Sequence[str] = ()
    if is_container(module):
        names = forms.in_order.get(type(module)) or tuple(module._modules)
    found = [(name, module)]
    for child_name in names:
        child = forms.part(module, child_name)
        if child is not None:
            found += in_order(child, f"{name}.{child_name}" if name else child_name)
    return found


def is_container(module: nn.Module) -> bool:
    """Whether a module does nothing but apply its children, each to what the last one made."""
    return type(module) in forms.in_order or originals.applies_in_order(type(module))


def split_downsample(
    downsample: nn.Module,
) -> tuple[list[nn.Module], tuple[nn.Conv2d, nn.Module]]:
    """What a projection without an obstacle does first, and its convolution and norm."""
    *before, (_, conv), (_, norm) = _projection(downsample, "")
    assert isinstance(conv, Conv2d)
    return [module for _, module in before], (conv, norm)


def _projection(downsample: nn.Module, what: str) -> list[tuple[str, nn.Module]]:
    """What a projection applies, without what is idle behind its norm."""
    children = downsample._modules
    if type(downsample) is Sequential and type(children.get("0")) is Conv2d and len(children) == 2:
        return [(f"{what}.{name}", child) for name, child in children.items() if child is not None]
    applied = [pair for pair in in_order(downsample, what) if not is_container(pair[1])]
    while len(applied) > 2 and passes_through(applied[-1][1]):
        applied.pop()
    return applied


def bare_layer(conv: nn.Conv2d, x: Tensor) -> ConvNorm:
    """`layer_of` without a norm: one with mean 0 and var + eps = 1, which changes no bit."""
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    zeros = x.new_zeros(conv.out_channels, dtype=dtype)
    # Not an eps of 0, which `F.batch_norm` refuses in some versions of torch.
    norm = Norm(zeros, torch.full_like(zeros, 0.5), None, None, 0.5)
    padding: Any = conv.padding  # no text, which is an obstacle
    geometry = (conv.stride, padding, conv.dilation, conv.groups)
    return ConvNorm(conv.weight, norm, conv.bias, *geometry)


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


def uses_batch_statistics(norm: AnyNorm) -> bool:
    """Whether the norm's next forward pass normalises with the batch's own statistics."""
    if type(norm) is not BatchNorm2d and norms.is_frozen(norm):
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
    if type(norm) is BatchNorm2d or not norms.is_frozen(norm):
        return True
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return norm.weight.dtype is (torch.get_autocast_dtype(device) if autocast else x.dtype)


def layer_of(conv: nn.Conv2d, norm: AnyNorm) -> ConvNorm:
    """A convolution and the norm behind it, as operators take them."""
    # Looked up where modules keep them: `module.weight` takes ten times as long.
    weight: Any
    bias: Tensor | None
    try:
        weight, bias = conv._parameters["weight"], conv._parameters["bias"]
    except KeyError:  # the parameters of nn.DataParallel's replicas are plain attributes
        weight, bias = conv.weight, conv.bias
    padding: Any = conv.padding  # no text, which is an obstacle
    geometry = (conv.stride, padding, conv.dilation, conv.groups)
    return ConvNorm(weight, norm_of(norm), bias, *geometry)


def norm_of(norm: AnyNorm) -> Norm:
    """A norm, as operators take it; its running statistics may be None."""
    buffers = norm._buffers
    frozen = norms.is_frozen(norm)
    eps = norms.eps_of(norm) if frozen else norm.eps
    affine = buffers if frozen else norm._parameters
    mean: Any
    var: Any
    try:
        mean, var = buffers["running_mean"], buffers["running_var"]
        return Norm(mean, var, affine["weight"], affine["bias"], eps)
    except KeyError:
        mean, var = norm.running_mean, norm.running_var
        return Norm(mean, var, norm.weight, norm.bias, eps)


def pool_of(maxpool: nn.MaxPool2d) -> Pool:
    """A max-pool without an obstacle."""
    values = (maxpool.kernel_size, maxpool.stride, maxpool.padding)
    return Pool(*(value if isinstance(value, tuple) else (value, value) for value in values))


@contextlib.contextmanager
def unfused() -> Iterator[None]:
    """Within it fused modules run, and are traced, exported and compiled, as before `fuse`.

    What looks for a model's own modules and operators finds them, as PT2E's quantizers do:

        with fused_resnet.unfused():
            program = torch.export.export(model, (x,), strict=True)

    It holds for all threads. Nothing about the model changes; blocks that have been quantized run
    in floating point.
    """
    global _unfused
    with _unfused_lock:
        _unfused += 1
    try:
        yield
    finally:
        with _unfused_lock:
            _unfused -= 1


def input_obstacle(x: Tensor) -> str | None:
    """Why an input makes a module run unfused, or None."""
    if _unfused:
        return "fused_resnet.unfused() is under way"
    if type(x) not in _PLAIN_TENSORS:
        return f"input is a {type(x).__name__}"
    if transforms_active():
        return "a functorch transform or forward-mode differentiation is active"
    compiling = torch.compiler.is_compiling()
    if torch.jit.is_tracing() or (compiling and torch.onnx.is_in_onnx_export()):
        return "the model is being traced for TorchScript or ONNX"
    if not compiling and torch._C._len_torch_dispatch_stack():
        package = counting_package()
        return None if package is None else f"{package} counts torch's own operators"
    return None


def counting_package() -> str | None:
    """The package of an active dispatch mode that counts torch's operators by name, or None.

    To these modes ours would be nothing. torch's own `FlopCounterMode` sees them all without this:
    it has global hooks.
    """
    for index in range(torch._C._len_torch_dispatch_stack()):
        mode = torch._C._get_dispatch_stack_at(index)
        package = type(mode).__module__.partition(".")[0]
        if package in _COUNTING_PACKAGES:
            return package
    return None


def obstacle_of_call(x: Tensor) -> str | None:
    """`input_obstacle`, or a function of torch's own that has been replaced."""
    if (reason := input_obstacle(x)) is not None:
        return reason
    name = originals.replaced()
    return None if name is None else f"{name} has been replaced"


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


def structure_obstacle(module: nn.Module, form: Form | None = None) -> str | None:
    """What a module of a form, by default that of its class, is made of that cannot be fused."""
    form = form or forms.of(module)
    for unit in () if form.by_unit else form.units_of(module):
        if reason := _parts_obstacle(module, unit):
            return reason
    for norm, act in form.norms:
        if reason := _norm_obstacle(forms.part(module, norm)):
            return f"{norm} is {reason}"
        if not is_relu(forms.part(module, act)):
            return f"{act} is {described(forms.part(module, act))}"
    for conv in form.convs:
        if reason := _conv_obstacle(forms.part(module, conv)):
            return f"{conv} is {reason}"
    return form.obstacle(module)


def _parts_obstacle(module: nn.Module, unit: Unit) -> str | None:
    """What a unit is made of that has no fused form, or None."""
    conv, norm = conv_norm(module, unit)
    if reason := _conv_obstacle(conv):
        return f"{unit.conv} is {reason}"
    if not _applies_act(norm, unit) and (reason := _norm_obstacle(norm)):
        return f"{unit.norm} is {reason}"
    if unit.act is not None and (reason := _act_obstacle(forms.part(module, unit.act))):
        return f"{unit.act} is {reason}"
    return None


def _applies_act(norm: nn.Module | None, unit: Unit) -> bool:
    """Whether a norm's activation is among what a unit applies."""
    name = f"{unit.norm}.act"
    return name in (unit.act, *unit.between, *unit.after) and norms.has_act(norm)


def unit_obstacle(module: nn.Module, unit: Unit) -> str | None:
    """Why a unit of a module that runs `by_unit` is not fused, or None."""
    if reason := _parts_obstacle(module, unit):
        return reason
    for name in (unit.conv, unit.norm, unit.act):
        if name is not None and (reason := call_obstacle(forms.part(module, name))):
            return f"{name} {reason}"
    return None


def obstacle_of_unit(conv: nn.Module, norm: nn.Module, act: nn.Module | None) -> str | None:
    """`unit_obstacle` of modules by themselves, and what of torch's has been replaced."""
    if name := originals.replaced():
        return f"{name} has been replaced"
    if _has_any_global_hook():
        return "global module hooks are registered"
    reason = _conv_obstacle(conv)
    if act is None or act is not norm._modules.get("act") or not norms.has_act(norm):
        reason = reason or _norm_obstacle(norm)
    if act is not None:
        reason = reason or _act_obstacle(act) or call_obstacle(act)
    return reason or call_obstacle(conv) or call_obstacle(norm)


def is_lazy(module: nn.Module) -> bool:
    """Whether a child's class changes in the first call, which finds its number of channels.

    Until then it is an obstacle, and afterwards it may be none.
    """
    return any(isinstance(child, LazyModuleMixin) for child in module.modules())


def hook_obstacle(module: nn.Module) -> str | None:
    """Which hooks inside a module must fire, or None."""
    if _has_any_global_hook():
        return "global module hooks are registered"
    form = forms.of(module)
    for name in () if form.by_unit else form.names_of(module):
        if reason := call_obstacle(forms.part(module, name)):
            return f"{name} {reason}"
    return None


def downsample_obstacle(downsample: nn.Module, what: str = "downsample") -> str | None:
    """Why a block's projection runs as the module it is, or None; `what` is its name."""
    applied = _projection(downsample, what) if is_container(downsample) else []
    if len(applied) not in (2, 3):
        return f"{what} is {described(downsample)}, not a convolution and a norm"
    *_, (conv_name, conv), (norm_name, norm) = applied
    if reason := _conv_obstacle(conv):
        return f"{conv_name} is {reason}"
    if reason := _norm_obstacle(norm):
        return f"{norm_name} is {reason}"
    for name, module in ((what, downsample), (conv_name, conv), (norm_name, norm)):
        if reason := call_obstacle(module):
            return f"{name} {reason}"
    if conv in downsample.children():
        return None
    for name, module in in_order(downsample, what):
        if is_container(module) and (reason := call_obstacle(module)):
            return f"{name} {reason}"
    return None


def pads_channels(downsample: nn.Module | None) -> bool:
    """Whether a shortcut has no parameters, only zeros to add, and need not run as a module."""
    return type(downsample) is cifar.PaddedShortcut and call_obstacle(downsample) is None


def pool_obstacle(maxpool: nn.Module) -> str | None:
    """Why a stem's pooling is not part of its convolution, or None."""
    if type(maxpool) is not MaxPool2d:
        return f"maxpool is {described(maxpool)}"
    if maxpool.ceil_mode or maxpool.return_indices or maxpool.dilation not in (1, (1, 1)):
        return "maxpool has ceil_mode, return_indices or dilation"
    if reason := call_obstacle(maxpool):
        return f"maxpool {reason}"
    return None


def head_obstacle(avgpool: nn.Module, fc: nn.Module) -> str | None:
    """What keeps a network's last two modules from running as one, or None."""
    if type(avgpool) is not AdaptiveAvgPool2d or avgpool.output_size not in (1, (1, 1), [1, 1]):
        return f"avgpool is {described(avgpool)}"
    if type(fc) is not Linear:
        return f"fc is {described(fc)}"
    if _has_any_global_hook():
        return "global module hooks are registered"
    if name := originals.replaced_in_heads():
        return f"{name} has been replaced"
    return call_obstacle(avgpool) or call_obstacle(fc)


def bare_conv_obstacle(conv: nn.Module | None) -> str | None:
    """Why a convolution that no norm follows runs as the module it is, or None."""
    if conv is None:
        return described(conv)
    return _conv_obstacle(conv) or call_obstacle(conv)


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
    if type(norm) in _NORMS:
        return None
    known = norms.known(norm)
    if norm is None or known is None:
        return described(norm)
    return None if known.frozen or all(map(passes_through, norm.children())) else described(norm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that operators know."""
    return type(module) in _NORMS or norms.known(module) is not None


def _act_obstacle(act: nn.Module | None) -> str | None:
    """Why an activation has no fused form, or None."""
    if act is not None and text_of(act) is not None:
        return None
    return described(act)


def call_obstacle(module: nn.Module) -> str | None:
    """What besides the class's own forward calling this module would run."""
    state = module.__dict__
    compiling = torch.compiler.is_compiling()
    for hooks in HOOKS:
        # A compiler guards on more than twice as much of what is reached through the dictionary.
        if getattr(module, hooks) if compiling else state[hooks]:
            return "carries hooks"
    if "_compiled_call_impl" in state:
        return "is compiled by itself"
    own = "forward" in state or "_conv_forward" in state
    return "has a forward of its own" if own else None


def described(module: nn.Module | None) -> str:
    """A module's class with an article, for messages."""
    if module is None:
        return "missing"
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
