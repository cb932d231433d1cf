"""`fuse`, `unfuse` and `report`: which modules of a model run fused, changed and explained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import backends, blocks, families, forms, recipes
from .families import known  # noqa: F401  adds the recipes of other libraries' classes
from .forms import Form, Unit
from .layers import checks
from .layers import watch as watching
from .layers.quantized import EIGHT_BITS, FLOAT8
from .layers.ranges import BlockRanges, HeadRanges, StemRanges
from .modules import fake_quantized, graphs, plans, quantized, read, sequences
from .modules.activations import is_relu, text_of
from .modules.conv_norm_act import has_kernel
from .originals import Conv2d, Identity

_MEMORY = ("normal", "low")
# Of convolutions' inputs.
_Sizes: TypeAlias = Mapping[nn.Module, Sequence[int]]


@dataclass(frozen=True)
class Record:
    """How one residual block, or one network's stem, runs.

    Attributes:
        path: the module's path in the model, "" for the model itself.
        kind: "BasicBlock", "Bottleneck", "stem" or another `kind` in `forms.py`.
        fused: whether it runs fused as it is now: class, mode, hooks and dtypes.
        backend: the kernels that run it, such as "cpu: library convolution + scale_shift_act", or
            "eager".
        reason: why not, or which part not; "" where all of it is fused. In a quantized model also
            why it stays in floating point.
        precision: "int8" or "float8_e4m3fn" where it runs in eight bits, else the dtype of its
            first convolution's weight, such as "float32"; "float32, rounded to int8" after
            `prepare_qat`.
        sqnr_db: of a quantized block, its output's signal-to-noise ratio in decibels, as
            calibration saw it; None where that is not known or there was no noise.
    """

    path: str
    kind: str
    fused: bool
    backend: str
    reason: str
    precision: str = ""
    sqnr_db: float | None = None


class Report(Sequence[Record]):
    """A model's records, in the order of `named_modules`.

    Attributes:
        not_used: the kernels that differed from the library on the model's devices and so are not
            used there, whatever the records say, each with what the check found.
        unproven: classes of modules that have convolutions and norms among their children, where
            nothing says whether their forward pass applies one to the other; `register_form` does.
        other_norms: classes of norms over groups of channels, in modules that have no record:
            what they belong to stays as it is.
    """

    def __init__(
        self,
        records: Sequence[Record],
        not_used: Sequence[str] = (),
        unproven: Sequence[str] = (),
        other_norms: Sequence[str] = (),
    ) -> None:
        self._records = tuple(records)
        self.not_used = tuple(not_used)
        self.unproven = tuple(unproven)
        self.other_norms = tuple(other_norms)

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
        hints = [f"not fused, see fused_resnet.register_form: {text}" for text in self.unproven]
        hints += [f"not fused, for it is no batch norm: {text}" for text in self.other_norms]
        if not self._records:
            first = "nothing to fuse: the model has no residual block of a class that is known"
            return "\n".join([first, *hints])
        in_eight_bits = sum(record.precision in EIGHT_BITS for record in self._records)
        rows = [
            (
                record.path or "(model)",
                record.kind,
                "fused" if record.fused else "not fused",
                *([_precision(record)] if in_eight_bits else []),
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
        first = f"{fused} of {len(rows)} modules run fused"
        if in_eight_bits:
            classifier = "" if self._has_classifier() else ", the classifier too,"
            first += f", {in_eight_bits} in eight bits; all else{classifier} in floating point"
        found = [f"not used, for it differs from the library: {text}" for text in self.not_used]
        return "\n".join([first, *lines, *found, *hints])

    def _has_classifier(self) -> bool:
        return any(r.kind == "classifier" and r.precision in EIGHT_BITS for r in self._records)


def _precision(record: Record) -> str:
    if record.sqnr_db is None:
        return record.precision
    return f"{record.precision}, {record.sqnr_db:.1f} dB"


def fuse(
    model: nn.Module, memory: str = "normal", watch: str = "sample", cuda_graphs: bool = False
) -> nn.Module:
    """Makes a model's residual blocks and stem run fused, in place.

    Only modules of exactly the known classes change, and only their class: parameters, buffers,
    hooks and `state_dict` stay the objects they are. Known are torchvision's `BasicBlock`,
    `Bottleneck`, `ResNet` and `DenseNet` with its layers, timm's `BasicBlock`, `Bottleneck` and
    `ResNet`, the blocks of `fused_resnet.models`, and, by their structure, other libraries' blocks,
    Sequentials and `torch.fx` graphs: see docs/other_networks.md and `register_form`. A module
    whose parts have no fused form (other norms, rarer activations) is left alone; `report` says so.

    Args:
        model: any module, a block itself included.
        memory: "normal", or "low" to keep less for the backward pass: the last 1x1 convolution of
            each block, and its projection, are then computed twice. Of a module fused before, it
            changes the setting.
        watch: how to notice writes to weights that torch does not see (through `.data`, NumPy,
            another process): "sample" compares some values of each weight in every call, "full"
            all of them, as `FUSED_RESNET_WATCH=full` does for every model. It stays with copies
            and pickles of the model. Of a module fused before, it changes the setting.
        cuda_graphs: whether inference passes of the model's networks, torchvision's `ResNet` and
            `models.cifar`'s, become CUDA graphs on a GPU: the second pass for a shape is captured,
            later ones are replays on copies of input and output. Eight shapes a network at a time,
            each with memory of its own. Likewise it stays, and changes the setting.

    Returns:
        `model`.

    Raises:
        TypeError: it is not a module.
        ValueError: `memory` is neither "normal" nor "low", `watch` or FUSED_RESNET_WATCH neither
            "sample" nor "full", or there is no network for `cuda_graphs`.
    """
    if memory not in _MEMORY:
        raise ValueError(f"fuse: memory is {memory!r}, must be one of {', '.join(_MEMORY)}")
    watch = watching.checked(watch, "fuse: watch")
    watching.from_environment()
    families.load()
    if cuda_graphs and not any(map(_is_network, _modules(model, "fuse"))):
        raise ValueError(
            "fuse: cuda_graphs is True, must be False for a model without a network that is run as "
            "a whole: torchvision's ResNet or one of models.cifar"
        )
    modules = _modules(model, "fuse")
    _fuse_all(model)
    for module in modules:
        if forms.of_fused(forms.unsharded(type(module))) is not None:
            vars(module).pop("memory", None)
            if memory != "normal":
                vars(module)["memory"] = memory
            if watching.set_watch(module, watch):
                blocks.release(module)
        if isinstance(module, blocks.Network):
            vars(module).pop("cuda_graphs", None)
            if cuda_graphs:
                module.cuda_graphs = True
            else:
                graphs.forget(module)
    return model


def _is_network(module: nn.Module) -> bool:
    cls = forms.unsharded(type(module))
    form = forms.of_original(cls) or forms.of_fused(cls)
    return form is not None and issubclass(form.fused, blocks.Network)


def fuse_remaining(model: nn.Module) -> None:
    """Fuses what is not fused yet, with the default settings; the rest keeps its own."""
    watching.from_environment()
    families.load()
    _fuse_all(model)


def _fuse_all(model: nn.Module) -> None:
    for _, module, form in _modules_with_forms(model):
        if form is None or form.fused is forms.unsharded(type(module)):
            continue
        if read.structure_obstacle(module, form) is None or read.is_lazy(module):
            _assign_class(module, form.fused)
    for module in reversed(list(model.modules())):  # those inside of others first
        form = recipes.chain(module)
        if form is not None:
            _assign_class(module, form.fused)


def _modules_with_forms(model: nn.Module) -> Iterator[tuple[str, nn.Module, Form | None]]:
    """Modules, parents first, and what is known of their class, fused or not.

    Without those that a module before them goes around.
    """
    inside: set[int] = set()
    for path, module in model.named_modules():
        cls = forms.unsharded(type(module))
        form = forms.of_fused(cls) or forms.of_original(cls)
        if form is None:
            if id(module) in inside:
                continue
            form = recipes.found(module)
        if form is not None and (form.fused is cls or not read.structure_obstacle(module, form)):
            inside.update(id(part) for part in _parts_inside(module, form))
        yield path, module, form


def _parts_inside(module: nn.Module, form: Form) -> Iterator[nn.Module]:
    for name in form.names_of(module):
        part = forms.part(module, name)
        if part is not None:
            yield part
    shortcut = None if form.shortcut is None else getattr(module, form.shortcut, None)
    if isinstance(shortcut, nn.Module):
        yield from shortcut.modules()


def unfuse(model: nn.Module) -> nn.Module:
    """Gives a model's fused modules the classes they had, in place; what was quantized is not.

    Args:
        model: any module, fused or not.

    Returns:
        `model`.

    Raises:
        TypeError: it is not a module.
    """
    for module in _modules(model, "unfuse"):
        unfuse_one(module)
    return model


def unfuse_one(module: nn.Module) -> None:
    """`unfuse` of one module without its children."""
    form = forms.of_fused(forms.unsharded(type(module)))
    if form is not None:
        blocks.release(module)
        for setting in ("memory", "cuda_graphs", "quantization", "head_quantization"):
            vars(module).pop(setting, None)
        plans.forget(module)
        watching.set_watch(module, "sample")
        _assign_class(module, form.original)


def _assign_class(module: nn.Module, cls: type[nn.Module]) -> None:
    module.__class__ = forms.resharded(type(module), cls)
    # What torch.compile made of the module may be looked at again only if the dictionary changed.
    vars(module)["_changed"] = True
    del vars(module)["_changed"]


def report(model: nn.Module, input: Tensor | None = None) -> Report:
    """How each residual block and stem of a model would run now, and why.

    "Now" is the parameters' dtype and device, each norm's mode, the hooks, and the chosen backend;
    inputs are taken to have the parameters' dtype and device.

    Args:
        model: any module.
        input: what the model will run on. Which kernel runs a convolution may depend on its input's
            size; with an input the model runs once, unfused, and the report says which it is,
            without one how many pixels make a difference.

    Returns:
        A record for each module of a class that `fuse` knows, or of a subclass of one; and the
        kernels that are not used.

    Raises:
        TypeError: it is not a module.
        ValueError: there is an input, and a module in training mode.
    """
    modules = _modules(model, "report")
    families.load()
    sizes = _input_sizes(model, input)
    is_quantized = any(_ranges(module) is not None for module in modules)
    records, unproven, other_norms = [], _Unproven(), _OtherNorms()
    for path, module, form in _modules_with_forms(model):
        reason = recipes.refusal(module) if form is None else None
        form = form or forms.found(module)
        if reason is not None:
            records.append(Record(path, type(module).__name__, False, "eager", reason))
        elif form is not None and not form.has_layers:
            continue
        elif form is not None:
            records.append(_record_of(path, module, form, is_quantized, sizes))
            if (head := _head_record(path, module, form)) is not None:
                records.append(head)
        else:
            unproven.look(path, module)
            other_norms.look(path, module)
    return Report(
        records,
        [
            f"{family}: {verdict}"
            for device in {tensor.device for tensor in model.parameters()}
            for family, verdict in backends.self_check.failed(device).items()
        ],
        unproven.texts(),
        other_norms.texts(),
    )


class _Unproven:
    """Convolutions with norms in modules that nothing is known of, by class."""

    def __init__(self) -> None:
        self._paths: dict[tuple[type, tuple[tuple[str, str], ...]], list[str]] = {}

    def look(self, path: str, module: nn.Module) -> None:
        """At one module."""
        pairs = tuple(recipes.unproven(module))
        if pairs:
            self._paths.setdefault((type(module), pairs), []).append(path or "(model)")

    def texts(self) -> list[str]:
        """One for each class and structure."""
        found = []
        for (cls, pairs), paths in self._paths.items():
            names = ", ".join(f"{conv} and {norm}" for conv, norm in pairs)
            found.append(f"{cls.__name__} ({_first_of(paths)}): {names}")
        return found


class _OtherNorms:
    """Norms over groups of channels, by class."""

    def __init__(self) -> None:
        self._paths: dict[type, list[str]] = {}

    def look(self, path: str, module: nn.Module) -> None:
        """At one module."""
        if isinstance(module, nn.GroupNorm):
            self._paths.setdefault(type(module), []).append(path or "(model)")

    def texts(self) -> list[str]:
        """One for each class."""
        return [f"{cls.__name__} ({_first_of(paths)})" for cls, paths in self._paths.items()]


def _first_of(paths: Sequence[str]) -> str:
    return f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0]


def _modules(model: nn.Module, name: str) -> list[nn.Module]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model is a {type(model).__name__}, must be a torch.nn.Module")
    return list(model.modules())


def _ranges(module: nn.Module) -> BlockRanges | StemRanges | None:
    """What calibration left with a module."""
    has = quantized.is_quantizable(module) or quantized.has_stem(module)
    kept = module.quantization if has else None
    return kept if isinstance(kept, (BlockRanges, StemRanges)) else None


def _input_sizes(model: nn.Module, input: Tensor | None) -> _Sizes:
    """Of the convolutions, by a pass: not of those that saw several sizes."""
    if input is None:
        return {}
    if any(module.training for module in model.modules()):
        raise ValueError("report: model is in training mode, must be in eval mode beside an input")
    seen: dict[nn.Module, set[torch.Size]] = {}

    def look(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments:
            seen.setdefault(module, set()).add(arguments[0].shape)

    # Blocks whose convolutions carry hooks call them.
    convs = [module for module in model.modules() if isinstance(module, Conv2d)]
    handles = [conv.register_forward_pre_hook(look) for conv in convs]
    try:
        with torch.no_grad():
            model(input)
    finally:
        for handle in handles:
            handle.remove()
    return {conv: sizes.pop() for conv, sizes in seen.items() if len(sizes) == 1}


def _record_of(
    path: str, module: nn.Module, form: Form, is_quantized: bool, sizes: _Sizes
) -> Record:
    """A module's record, with its precision; `is_quantized` is whether a block of the model is."""
    record = _record(path, module, form, sizes)
    units = form.units_of(module)
    weight: Any = getattr(forms.part(module, units[0].conv), "weight", None) if units else None
    dtype = "" if weight is None else str(weight.dtype).removeprefix("torch.")
    if record.fused and (trained := fake_quantized.of(module)) is not None:
        if not trained.reason:
            return dataclasses.replace(record, precision=f"{dtype}, rounded to int8")
        reason = f"not rounded to int8: {trained.reason}"
        reason = "; ".join(filter(None, [record.reason, reason]))
        return dataclasses.replace(record, precision=dtype, reason=reason)
    if not is_quantized or not record.fused:
        return dataclasses.replace(record, precision=dtype)
    kept = _ranges(module)
    if kept is None:
        kind = "it is no residual block of a form that runs in eight bits"
        reason = "the stem" if form.kind == "stem" else kind
        reason = f"in floating point: {reason}"
    elif module.training:
        reason = "in floating point: it is in training mode"
    else:
        if isinstance(kept, StemRanges):
            operator, precision = "quantized_stem", f"int{kept.bits}"
            fits = quantized.stem_of(module, kept.bits) is not None
            why = kept.reason or (None if fits else "it is not as it was calibrated")
        else:
            operator = f"{'float8' if kept.dtype == FLOAT8 else 'quantized'}_residual_blocks"
            precision = kept.dtype
            why = kept.reason or quantized.float_reason(module)
        if why is None:
            backend = backends.explain(operator, device=weight.device, dtype=weight.dtype)
            return Record(path, form.kind, True, backend, "", precision, kept.sqnr_db)
        reason = f"in floating point: {why}"
    reason = "; ".join(filter(None, [record.reason, reason]))
    sqnr_db = None if kept is None else kept.sqnr_db
    return dataclasses.replace(record, reason=reason, precision=dtype, sqnr_db=sqnr_db)


def _head_record(path: str, module: nn.Module, form: Form) -> Record | None:
    """Of a network whose classifier was calibrated, what became of it."""
    kept = module.head_quantization if quantized.has_stem(module) else None
    if not isinstance(kept, HeadRanges):
        return None
    reason = kept.reason or read.obstacle(module)
    reason = reason or ("it is in training mode" if module.training else None)
    head = quantized.head_of(module)
    if head is None:
        reason = reason or "it is not as it was calibrated"
    weight: Any = getattr(module.fc, "weight", None) if head is None else head.weight
    path = f"{path}.fc" if path else "fc"
    if reason:
        dtype = "" if weight is None else str(weight.dtype).removeprefix("torch.")
        reason = f"in floating point: {reason}"
        return Record(path, "classifier", False, "eager", reason, dtype, kept.sqnr_db)
    how = backends.explain("quantized_pool_linear", device=weight.device, dtype=weight.dtype)
    return Record(path, "classifier", True, how, "", "int8", kept.sqnr_db)


def _record(path: str, module: nn.Module, form: Form, sizes: _Sizes) -> Record:
    reason = _class_obstacle(module, form) or read.obstacle(module)
    if reason is not None:
        return Record(path, form.kind, False, "eager", reason)
    ways, reasons = [], []
    for way, reason in _ways(module, form, sizes):
        if way not in ways:
            ways.append(way)
        if reason:
            reasons.append(reason)
    fused = any(not way.startswith("eager") or "," in way for way in ways)
    return Record(path, form.kind, fused, ", ".join(ways), "; ".join(reasons))


def _class_obstacle(module: nn.Module, form: Form) -> str | None:
    cls = forms.unsharded(type(module))
    if cls is form.original:
        reason = read.structure_obstacle(module, form)
        return "not fused: call fused_resnet.fuse" if reason is None else reason
    if cls is not form.fused:
        base = form.original
        own = any(getattr(cls, n) is not getattr(base, n) for n in form.overrides)
        detail = " with a forward of its own" if own else ""
        return f"{cls.__name__} is a subclass of {base.__name__}{detail}"
    if any(name in vars(module) for name in form.overrides):
        return "the module has a forward of its own"
    return None


def _ways(module: nn.Module, form: Form, sizes: _Sizes) -> Iterator[tuple[str, str]]:
    """For each convolution, which kernels run it and its norm, and why if they are not fused."""
    units = form.units_of(module)
    reason = None
    if form.pool is not None:
        reason = read.pool_obstacle(forms.part(module, form.pool))
    inside = _prologues(module, form)
    for norm, _ in form.norms:
        readers = _readers(module, form, norm)
        if not readers or any(name not in inside for name in readers):
            yield _norm_way(forms.part(module, norm))
    followed = {unit.conv for unit in units}
    for name in inside:
        if name not in followed:
            yield _explained("norm_conv_bn_act", forms.part(module, name), sizes), ""
    for unit in units:
        pooled = form.pool is not None and reason is None and unit is units[-1]
        pool = None if form.pool is not None else sequences.pool_behind(module, unit)
        pooled = pooled or pool is not None
        operator = "conv_bn_act_max_pool" if pooled else "conv_bn_act"
        if unit.conv in inside:
            operator = "norm_conv_bn_act"
        if form.by_unit and (why := read.unit_obstacle(module, unit)) is not None:
            yield "eager", why
            continue
        conv, norm = forms.part(module, unit.conv), forms.part(module, unit.norm)
        yield _way(operator, unit.conv, conv, norm, sizes)
        if not read.working_parts(module, unit.between) and (why := _act_apart(module, unit)):
            yield f"eager {unit.act}", why
        for name in (*unit.before, *unit.between, *unit.after):
            part = forms.part(module, name)
            is_fused = part is not None and forms.of_fused(forms.unsharded(type(part))) is not None
            if name != pool and not is_fused and read.working_parts(module, (name,)):
                yield f"eager {name}", f"{name} is {read.described(part)}"
    if reason:
        yield "eager pooling", reason
    projected = form.shortcut
    downsample = None if projected is None else read.shortcut(module, form)
    if downsample is not None:
        if read.pads_channels(downsample):
            conv = forms.part(module, units[-1].conv)
            backend = backends.choose(conv.weight.device.type)
            if not backend.reads_narrow_residuals:
                yield "padded shortcut", ""
        elif why := read.downsample_obstacle(downsample, projected or ""):
            yield f"eager {projected}", why
        else:
            before, projection = read.split_downsample(downsample)
            yield _way("conv_bn_act", f"{projected}.{len(before)}", *projection, sizes)
            for index, first in enumerate(before):
                if type(first) is not Identity:
                    yield "eager pooling", f"{projected}.{index} is {read.described(first)}"


def _act_apart(module: nn.Module, unit: Unit) -> str | None:
    """Why a unit's activation is a pass of its own, or None where it is in the convolution's."""
    act = forms.part(module, unit.act)
    conv, norm = read.conv_norm(module, unit)
    if act is None or is_relu(act):
        return None
    what = f"{unit.act} is {read.described(act)}"
    text = text_of(act)
    backend = backends.choose(conv.weight.device.type)
    if read.uses_batch_statistics(norm):
        is_trained = text is not None and backend.trains_activation(text, conv.weight.dtype)
        alone = not is_trained or read.sync_group(norm) is not None
        return f"{what}, which runs by itself in training" if alone else None
    if text is None or backend.has_activation(text):
        return None
    return f"{what}, for which the backend {backend.name} has no kernel"


def _readers(module: nn.Module, form: Form, norm: str) -> list[str]:
    """The convolutions there are that read a norm's output, which no other comes before."""
    pairs = form.prologues
    return [name for n, name in pairs if n == norm and forms.part(module, name) is not None]


def _prologues(module: nn.Module, form: Form) -> list[str]:
    """The convolutions that apply the norm before them themselves, in inference."""
    behind = {unit.conv: unit.norm for unit in form.units_of(module)}
    inside = []
    for norm, _ in form.norms:
        for name in _readers(module, form, norm):
            conv = forms.part(module, name)
            if name in behind:
                norms = [norm, behind[name]]
                applied = read.keeps_dtype(forms.part(module, behind[name]), conv.weight)
            else:
                norms = [norm]
                applied = read.bare_conv_obstacle(conv) is None and has_kernel(conv, conv.weight)
            batch = any(read.uses_batch_statistics(forms.part(module, n)) for n in norms)
            if applied and not batch:
                inside.append(name)
    return inside


def _norm_way(norm: nn.Module) -> tuple[str, str]:
    training = read.uses_batch_statistics(norm)
    operator = "batch_norm_act_training" if training else "batch_norm_act_inference"
    like: Any = next(t for t in (norm.weight, norm.running_mean) if t is not None)
    return backends.explain(operator, device=like.device, dtype=like.dtype), ""


def _way(
    operator: str, name: str, conv: nn.Conv2d, norm: nn.Module, sizes: _Sizes
) -> tuple[str, str]:
    weight = conv.weight
    if read.uses_batch_statistics(norm):
        operator = "batch_norm_act_training"
        way = backends.explain(operator, device=weight.device, dtype=weight.dtype)
        group = read.sync_group(norm)
        shared = "" if group is None else f", statistics of {dist.get_world_size(group)} processes"
        return f"eager convolution, {way}{shared}", ""
    # The smallest input the convolution accepts, of no memory.
    size = [d * (r - 1) + 1 for d, r in zip(conv.dilation, conv.kernel_size, strict=True)]
    x = weight.detach().new_empty(()).expand(1, conv.in_channels, *size)
    error = checks.conv_error(name, x, read.layer_of(conv, norm), None, "relu")
    if error is not None:
        return "eager", str(error)
    if not read.keeps_dtype(norm, x):
        return "eager", f"{name}: a FrozenBatchNorm2d in {norm.weight.dtype} after {weight.dtype}"
    return _explained(operator, conv, sizes), ""


def _explained(operator: str, conv: nn.Conv2d, sizes: _Sizes) -> str:
    weight = conv.weight
    padding: Any = conv.padding  # no text, which is an obstacle
    return backends.explain(
        operator,
        device=weight.device,
        dtype=weight.dtype,
        weight_shape=tuple(weight.shape),
        input_shape=sizes.get(conv, ()),
        stride=conv.stride,
        padding=padding,
        dilation=conv.dilation,
        groups=conv.groups,
    )
