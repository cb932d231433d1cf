"""`fuse`, `unfuse` and `report`: which modules of a model run fused, changed and explained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch.distributed as dist
from torch import nn
from torchvision.models import resnet

from . import backends, blocks, checks
from .models import cifar

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    resnet.BasicBlock: blocks.BasicBlock,
    resnet.Bottleneck: blocks.Bottleneck,
    resnet.ResNet: blocks.ResNet,
    cifar.PlainBlock: blocks.PlainBlock,
    cifar.CifarResNet: blocks.CifarResNet,
}
_STEMS = (resnet.ResNet, cifar.CifarResNet)
_UNFUSED = {fused: unfused for unfused, fused in _FUSED.items()}
_MEMORY = ("normal", "low")


@dataclass(frozen=True)
class Record:
    """How one residual block, or one network's stem, runs.

    Attributes:
        path: the module's path in the model, "" for the model itself.
        kind: "BasicBlock", "Bottleneck", "PlainBlock" or "stem".
        fused: whether it runs fused as it is now: class, mode, hooks and dtypes.
        backend: the kernels that run it, such as "cpu: library convolution + scale_shift_act", or
            "eager".
        reason: why not, or which part not; "" where all of it is fused.
    """

    path: str
    kind: str
    fused: bool
    backend: str
    reason: str


class Report(Sequence[Record]):
    """A model's records, in the order of `named_modules`."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = tuple(records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Record, ...]: ...
    def __getitem__(self, index: int | slice) -> Record | tuple[Record, ...]:
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def __repr__(self) -> str:
        return f"Report({list(self._records)!r})"

    def __str__(self) -> str:
        if not self._records:
            return "nothing to fuse: the model has none of torchvision's residual blocks"
        rows = [
            (
                record.path or "(model)",
                record.kind,
                "fused" if record.fused else "not fused",
                record.backend,
                record.reason,
            )
            for record in self._records
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        fused = sum(record.fused for record in self._records)
        return "\n".join([f"{fused} of {len(rows)} modules run fused", *lines])


def fuse(model: nn.Module, memory: str = "normal") -> nn.Module:
    """Makes a model's residual blocks and stem run fused, in place.

    Only modules that are exactly torchvision's `BasicBlock`, `Bottleneck` or `ResNet`, or one of
    the classes in `models`, change, and only their class: parameters, buffers, hooks and
    `state_dict` stay the objects they are. A module whose parts have no fused form (other norms or
    activations) is left alone; `report` says so.

    Args:
        model: any module, a block itself included.
        memory: "normal", or "low" to keep less for the backward pass: the last 1x1 convolution of
            each block, and its projection, are then computed twice. Of a module fused before, it
            changes the setting.

    Returns:
        `model`.

    Raises:
        TypeError: it is not a module.
        ValueError: `memory` is neither "normal" nor "low".
    """
    if memory not in _MEMORY:
        raise ValueError(f"fuse: memory is {memory!r}, must be one of {', '.join(_MEMORY)}")
    for module in _modules(model, "fuse"):
        fused = _FUSED.get(type(module))
        if fused is not None and blocks.structure_obstacle(module) is None:
            module.__class__ = fused
        if type(module) in _UNFUSED:
            vars(module).pop("memory", None)
            if memory != "normal":
                module.memory = memory
    return model


def unfuse(model: nn.Module) -> nn.Module:
    """Gives a model's fused modules the classes back that they had, in place.

    Args:
        model: any module, fused or not.

    Returns:
        `model`.

    Raises:
        TypeError: it is not a module.
    """
    for module in _modules(model, "unfuse"):
        unfused = _UNFUSED.get(type(module))
        if unfused is not None:
            backends.release([*module.parameters(), *module.buffers()])
            vars(module).pop("memory", None)
            module.__class__ = unfused
    return model


def report(model: nn.Module) -> Report:
    """How each residual block and stem of a model would run now, and why.

    "Now" is the parameters' dtype and device, each norm's mode, the hooks, and the chosen backend;
    inputs are taken to have the parameters' dtype and device.

    Args:
        model: any module.

    Returns:
        A record for each of torchvision's `BasicBlock`, `Bottleneck` and `ResNet`, for those in
        `models`, and for subclasses.

    Raises:
        TypeError: it is not a module.
    """
    _modules(model, "report")
    return Report(
        [
            _record(path, module)
            for path, module in model.named_modules()
            if isinstance(module, tuple(_FUSED))
        ]
    )


def _modules(model: nn.Module, name: str) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model is a {type(model).__name__}, must be a torch.nn.Module")
    return list(model.modules())


def _record(path: str, module: nn.Module) -> Record:
    base = next(base for base in _FUSED if isinstance(module, base))
    kind = "stem" if base in _STEMS else base.__name__
    reason = _class_obstacle(module, base) or blocks.obstacle(module)
    if reason is not None:
        return Record(path, kind, False, "eager", reason)
    ways, reasons = [], []
    for way, reason in _ways(module, base):
        if way not in ways:
            ways.append(way)
        if reason:
            reasons.append(reason)
    fused = ways != ["eager"]
    return Record(path, kind, fused, ", ".join(ways), "; ".join(reasons))


def _class_obstacle(module: nn.Module, base: type[nn.Module]) -> str | None:
    if type(module) is base:
        reason = blocks.structure_obstacle(module)
        return "not fused: call fused_resnet.fuse" if reason is None else reason
    if type(module) is not _FUSED[base]:
        own = "forward" in vars(type(module)) or type(module).forward is not base.forward
        detail = " with a forward of its own" if own else ""
        return f"{type(module).__name__} is a subclass of {base.__name__}{detail}"
    if "forward" in vars(module) or "_forward_impl" in vars(module):
        return "the module has a forward of its own"
    return None


def _ways(module: nn.Module, base: type[nn.Module]) -> Iterator[tuple[str, str]]:
    """For each convolution, which kernels run it and its norm, and why if they are not fused."""
    children = module._modules
    if base is resnet.ResNet:
        reason = blocks.pool_obstacle(children["maxpool"])
        operator = "conv_bn_act" if reason else "conv_bn_act_max_pool"
        yield _way(operator, "conv1", children["conv1"], children["bn1"])
        if reason:
            yield "eager pooling", reason
        return
    for conv, norm in blocks.CONV_NORM_NAMES[base]:
        yield _way("conv_bn_act", conv, children[conv], children[norm])
    downsample = getattr(module, "downsample", None)
    if downsample is not None:
        reason = blocks.downsample_obstacle(downsample)
        if blocks.pads_channels(downsample):
            backend = backends.choose(children[conv].weight.device.type)
            in_place = getattr(backend, "reads_narrow_residuals", False)
            if not in_place or blocks.uses_batch_statistics(children[norm]):
                yield "padded shortcut", ""
        elif reason:
            yield "eager downsample", reason
        else:
            yield _way("conv_bn_act", "downsample.0", *downsample._modules.values())


def _way(operator: str, name: str, conv: nn.Conv2d, norm: nn.Module) -> tuple[str, str]:
    weight = conv.weight
    where = {"device": weight.device, "dtype": weight.dtype}
    if blocks.uses_batch_statistics(norm):
        way = backends.explain("batch_norm_act_training", **where)
        group = blocks.sync_group(norm)
        shared = "" if group is None else f", statistics of {dist.get_world_size(group)} processes"
        return f"eager convolution, {way}{shared}", ""
    # The smallest input the convolution accepts, of no memory.
    size = [d * (r - 1) + 1 for d, r in zip(conv.dilation, conv.kernel_size, strict=True)]
    x = weight.detach().new_empty(()).expand(1, conv.in_channels, *size)
    error = checks.conv_error(name, *blocks.conv_arguments(conv, norm, x), None, "relu")
    if error is not None:
        return "eager", str(error)
    if not blocks.keeps_dtype(norm, x):
        return "eager", f"{name}: a FrozenBatchNorm2d in {norm.weight.dtype} after {weight.dtype}"
    way = backends.explain(
        operator,
        **where,
        weight_shape=tuple(weight.shape),
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )
    return way, ""
