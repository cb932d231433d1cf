"""Forms of classes that are not imported: by the class's name, its children and what it computes.

A `Recipe` says of a class, by its name, in which order it applies its children, and, of a residual
block, which child is the shortcut and what follows the add. `found` makes a `Form` of it for a
module that has these children, with a fused class that derives from the module's own. Before the
first such module of a structure is fused, the recipe is tried on a small copy of it with random
numbers, in evaluation and in training: where the two differ, the module is left alone, and `report`
says by how much. So a library may change its classes, and a name may be used twice.

Besides what has a recipe, every `nn.Sequential` and every `torch.fx.GraphModule` has a form, where
there are convolutions and norms in it that can be one: there the order can be read.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
import itertools
import types
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from torch import Tensor, fx, nn

from . import backends, blocks, forms, originals
from .forms import Form, Unit
from .layers import watch
from .modules import chains, read, run, sequences, traced, trial
from .modules.conv_norm_act import left_to_modules
from .ops.registration import transforms_active
from .originals import Conv2d, Sequential


@dataclass(frozen=True)
class Recipe:
    """How a class computes, in names of its children, with dots for children of theirs.

    Attributes:
        name: the class's; behind a "*" only what it ends with.
        branch: what is applied one after the other; a Sequential, or a class that has a recipe of
            nothing but a branch, stands for its children. Those that a module lacks, being None,
            are left out; a name with a "?" behind it need not be an attribute at all. An activation
            that is no child has a function's name, as "F.relu": `forms.is_function`. Empty: the
            forward pass is traced.
        shortcut: of a residual block, what is applied to the block's input before it is added, in
            names as in `branch`; None where it is not such a block.
        act: what follows the add: a ReLU's name or "F.relu".
        idle: what has to do nothing, such as an observer.
        cls: the class itself, where a user has registered it.
        opened: of a traced forward pass, whether Sequentials and their like are gone into.
    """

    name: str
    branch: tuple[str, ...] = ()
    shortcut: str | None = None
    act: str | None = None
    idle: tuple[str, ...] = ()
    cls: type[nn.Module] | None = None
    opened: bool = False

    @property
    def children(self) -> tuple[str, ...]:
        """The names in `branch` that a module may have."""
        return tuple(name.removesuffix(_OPTIONAL) for name in self.branch)


_OPTIONAL = "?"

_by_name: dict[str, list[Recipe]] = {}
_by_ending: list[Recipe] = []
_by_class: dict[type, list[Recipe]] = {}

_Structure = tuple[Hashable, ...]
_made: dict[Hashable, Form] = {}
_tried: dict[Hashable, str | None] = {}


def add(recipe: Recipe) -> None:
    """Makes `found` know a recipe."""
    if recipe.cls is not None:
        _by_class[recipe.cls] = [recipe]
    elif recipe.name.startswith("*"):
        _by_ending.append(recipe)
    else:
        _by_name.setdefault(recipe.name, []).append(recipe)


def of(module: nn.Module) -> list[Recipe]:
    """The recipes there are for a module's class, unfused; a user's own first."""
    cls = type(module)
    if cls in _by_class:
        return _by_class[cls]
    endings = [recipe for recipe in _by_ending if cls.__name__.endswith(recipe.name[1:])]
    return _by_name.get(cls.__name__, []) + endings


def found(module: nn.Module) -> Form | None:
    """The form of a module that has not been fused, or None."""
    cls = type(module)
    if forms.of_fused(cls) is not None or forms.unsharded(cls) is not cls:
        return None
    if any(map(vars(module).__contains__, _SETTINGS)):
        return None
    if isinstance(module, fx.GraphModule):
        return _graph_form(module)
    for recipe in of(module):
        form = _form_of(module, recipe)
        if form is not None and _refusal(module, form, recipe) is None:
            return form
    if originals.applies_in_order(type(module)):
        return _sequence_form(module) or chain(module)
    return None


def chain(module: nn.Module) -> Form | None:
    """The form of an `nn.Sequential` of fused blocks of many small convolutions, or None."""
    children = module._modules.values()
    if type(module) is not Sequential or not any(map(_is_link, children)):
        return None
    if not all(_is_link(child) or _may_be_between(child) for child in children):
        return None
    if _CHAIN not in _made:
        fused = _fused_class(Sequential, chains.chain_forward)
        _made[_CHAIN] = Form(Sequential, fused, "Sequential", units=())
        forms.register_fused(_made[_CHAIN])
    return _made[_CHAIN]


_CHAIN = "chain"


def _is_link(child: nn.Module | None) -> bool:
    cls: Any = type(child)
    is_chain = getattr(cls, "_run", None) is chains.chain_forward
    return forms.of_fused(cls) is not None and (is_chain or getattr(cls, "_is_opened", False))


def _may_be_between(child: nn.Module | None) -> bool:
    cls: Any = type(child)
    return cls in forms.idle or getattr(cls, "_run", None) is sequences.sequence_forward


def refusal(module: nn.Module) -> str | None:
    """Why a module with a recipe that its children fit does not run by it; None if there is none.

    Of a class that a user has registered, also in what its children do not fit.
    """
    reasons = []
    for recipe in of(module):
        form = _form_of(module, recipe)
        if form is not None:
            reasons.append(_refusal(module, form, recipe))
        elif recipe.cls is not None:
            reasons.append(_misfit(module, recipe))
    return next(filter(None, reasons), None)


def _misfit(module: nn.Module, recipe: Recipe) -> str:
    absent = [name for name in _names(recipe) if not _has(module, name)]
    if absent:
        return f"its form names {absent[0]}, which it does not have"
    if not recipe.branch:
        return "its forward pass cannot be traced, or has no convolution with a norm behind it"
    if _parameter(type(module)) is None:
        return "its forward pass takes more than one argument"
    return "its form has no convolution with a norm behind it, or an activation before the add"


def unproven(module: nn.Module) -> list[tuple[str, str]]:
    """Children that look like a convolution and its norm, in a class that nothing is known of."""
    if read.is_container(module) or isinstance(module, fx.GraphModule):
        return []
    children = list(module._modules.items())
    return [
        (name, next_name)
        for (name, conv), (next_name, norm) in itertools.pairwise(children)
        if type(conv) is Conv2d
        and norm is not None
        and read.is_norm(norm)
        and getattr(norm, "num_features", conv.out_channels) == conv.out_channels
    ]


def _names(recipe: Recipe) -> list[str]:
    names = [*recipe.branch, recipe.shortcut, recipe.act]
    needed = [name for name in names if name is not None and not name.endswith(_OPTIONAL)]
    return [name for name in needed if not forms.is_function(name)]


def _has(module: nn.Module, name: str) -> bool:
    """Whether there is an attribute of this name, which may be None."""
    parent, _, last = name.rpartition(".")
    holder = forms.part(module, parent) if parent else module
    return hasattr(holder, last)


def _form_of(module: nn.Module, recipe: Recipe) -> Form | None:
    """What a recipe makes of a module, if its children fit."""
    if not all(_has(module, name) for name in _names(recipe)):
        return None
    if not recipe.branch:
        return _traced_form(module, _sequences_in(module) if recipe.opened else None)
    if _parameter(type(module)) is None:
        return None
    _learn_orders(module)
    parts: list[tuple[str, nn.Module | None]] = []
    for name in recipe.children:
        child = forms.part(module, name)
        parts += [(name, None)] if child is None else sequences.parts_of(child, name)
    units = sequences.units_in(parts)
    if not units:
        return None
    if recipe.shortcut is None and recipe.act is None:
        return _derived(module, units, recipe, "", _SEQUENCE)
    *inner, last = units
    if last.act is not None or recipe.act is None:
        return None
    last = Unit(last.conv, last.norm, recipe.act, last.after, (), last.before)
    shortcut = (recipe.shortcut or "").removesuffix(_OPTIONAL)
    return _derived(module, (*inner, last), recipe, shortcut, _BLOCK)


def _sequence_form(module: nn.Module) -> Form | None:
    units = sequences.units_in(sequences.own_parts(module))
    return _derived(module, units, None, "", _SEQUENCE) if units else None


# Fused classes ------------------------------------------------------------------------------------


@no_type_check  # TorchScript finds out by itself what it returns
def _template(self, input):
    if torch.jit.is_scripting():
        return self._unfused_forward(input)
    else:  # TorchScript leaves out a branch, but not what follows a return
        return self._run(self, input)


def _parameter(cls: type[nn.Module]) -> str | None:
    """The name of the only argument of a class's forward pass, or None if there are others."""
    try:
        _, *parameters = inspect.signature(cls.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    fits = len(parameters) == 1 and parameters[0].kind in kinds
    return parameters[0].name if fits else None


def _parameters(cls: type[nn.Module]) -> list[inspect.Parameter] | None:
    """What a class's forward pass takes, if all but the first may be left out and are None then."""
    try:
        _, *parameters = inspect.signature(cls.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
    fits = 0 < len(parameters) <= _MOST_PARAMETERS_OF_FORWARD and all(
        parameter.kind in kinds for parameter in parameters
    )
    return parameters if fits and all(p.default is None for p in parameters[1:]) else None


_MOST_PARAMETERS_OF_FORWARD = 4


def _fused_class(original: type[nn.Module], way: Callable[..., Any]) -> type[nn.Module]:
    """A class derived from another whose forward pass, of the same arguments, goes another way."""
    own = {
        "__module__": __name__,
        "__doc__": f"`{original.__name__}`, made by `fused_resnet.fuse`.",
        "_unfused_forward": blocks.named_copy(original.forward, "_unfused_forward"),
        "_run": staticmethod(way),
        "_original": original,
        "__reduce_ex__": _reduce,
    }
    parameters = _parameters(original) or []
    if len(parameters) > 1 or not _is_of_tensor(parameters):
        own["forward"] = _forward_of_several(parameters)
        own["__prepare_scriptable__"] = _prepare_scriptable
    else:
        # The argument may be given by its name.
        name = _parameter(original) or "input"
        code = _template.__code__.replace(co_varnames=("self", name))
        own["forward"] = types.FunctionType(code, _template.__globals__, "forward")
    return type(original.__name__, (blocks.Fused, original), own)


def _is_of_tensor(parameters: Sequence[inspect.Parameter]) -> bool:
    """Whether TorchScript may take the only argument for a tensor, as it does without a type."""
    known = (inspect.Parameter.empty, Tensor, "Tensor", "torch.Tensor", Any, "Any")
    return all(parameter.annotation in known for parameter in parameters)


def _forward_of_several(parameters: Sequence[inspect.Parameter]) -> Callable[..., Any]:
    """A forward pass whose arguments have these names, and are None where they are left out."""
    first, *others = (parameter.name for parameter in parameters)
    heads = ", ".join(["self", first, *(f"{name}=None" for name in others)])
    source = f"def forward({heads}):\n    return self._run(self, {', '.join([first, *others])})\n"
    namespace: dict[str, Any] = {}
    exec(compile(source, "<fused forward>", "exec"), namespace)
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _prepare_scriptable(self: Any) -> Any:
    """What TorchScript compiles, which reads the source of a forward pass: the unfused module."""
    shadow = self._original.__new__(self._original)
    shadow.__dict__.update(self.__dict__)
    return shadow


def _reduce(self: Any, protocol: int) -> Any:
    """A pickle that names the class the module had before, and is fused when it is read."""
    original = type(self)._original
    made, arguments, *rest = original.__reduce_ex__(self, max(protocol, 2))
    if made is not copyreg.__newobj__:  # type: ignore[attr-defined]
        return (made, arguments, *rest)
    return (_restored, (original,), *rest)


def _restored(original: type[nn.Module]) -> nn.Module:
    """An empty module that becomes one of a class, fused if it can be, with its state."""
    if original not in _restoring:
        own = {"__setstate__": _set_state, "__module__": __name__, "_original": original}
        _restoring[original] = type(original.__name__, (original,), own)
    cls = _restoring[original]
    return cls.__new__(cls)


_restoring: dict[type[nn.Module], type[nn.Module]] = {}


def _set_state(self: Any, state: dict[str, Any]) -> None:
    self.__class__ = type(self)._original
    self.__setstate__(state)
    settings = {name: vars(self).pop(name) for name in _SETTINGS if name in vars(self)}
    form = found(self)
    if form is not None:
        self.__class__ = form.fused
        vars(self).update(settings)
        watch.remember(self)


_SEQUENCE, _BLOCK = sequences.sequence_forward, run.block_forward


def _derived(
    module: nn.Module, units: tuple[Unit, ...], recipe: Recipe | None, shortcut: str, way: Any
) -> Form:
    """The form of modules of this class and structure, registered."""
    original = type(module)
    containers = tuple(_containers(module, units, recipe))
    idle = () if recipe is None else recipe.idle
    key = (original, units, containers, shortcut, idle)
    if key not in _made:
        form = Form(
            original,
            _fused_class(original, way),
            original.__name__,
            units=units,
            shortcut=shortcut or None,
            by_unit=way is _SEQUENCE,
            obstacle=_Structured(containers, idle).obstacle,
        )
        form.pin()
        _made[key] = form
        forms.register_fused(form)
    return _made[key]


class _Structured:
    """What has to be as it was when a form was made."""

    def __init__(self, containers: tuple[_Container, ...], idle: tuple[str, ...]) -> None:
        self._containers, self._idle = containers, idle

    def obstacle(self, module: nn.Module) -> str | None:
        """What besides its units keeps a module from being fused, or None."""
        for name, cls, children, forward in self._containers:
            container: Any = forms.part(module, name) if name else module
            if name and type(container) is not cls:
                return f"{name} is {read.described(container)}"
            if tuple(container._modules) != children:
                return f"{name or 'it'} has the children {list(container._modules)}"
            if name and (reason := read.call_obstacle(container)):
                return f"{name} {reason}"
            if cls.forward is not forward:
                return f"{cls.__name__}.forward has been replaced"
        for name in self._idle:
            part = forms.part(module, name)
            if part is not None and not read.passes_through(part):
                return f"{name} is {read.described(part)}"
        return None


_Container = tuple[str, type[nn.Module], tuple[str, ...], Any]


def _containers(
    module: nn.Module, units: tuple[Unit, ...], recipe: Recipe | None
) -> Iterator[_Container]:
    """What units lie in and may be gone around: name, class, names of children, forward pass."""
    if recipe is None:
        yield "", type(module), tuple(module._modules), type(module).forward
    names = set()
    for unit in units:
        for name in (unit.conv, unit.norm, *unit.between, *unit.after, *unit.before):
            names |= {name[:i] for i, letter in enumerate(name) if letter == "."}
    for name in sorted(names):
        container = forms.part(module, name)
        if container is not None and read.is_container(container):
            yield name, type(container), tuple(container._modules), type(container).forward


def _learn_orders(module: nn.Module) -> None:
    """Adds to `forms.in_order` what a module's children turn out to apply one after the other."""
    for child in module.modules():
        cls = type(child)
        known = cls in forms.in_order or cls in _unordered
        if child is module or known or forms.of_fused(cls) is not None:
            continue
        for recipe in of(child):
            is_order = recipe.branch and recipe.shortcut is None and recipe.act is None
            fits = is_order and all(_has(child, name) for name in recipe.branch)
            if fits and _applies(child, recipe.children):
                forms.in_order[cls] = recipe.children
                break
        else:
            _unordered.add(cls)


_unordered: set[type] = set()


# Traced forward passes ----------------------------------------------------------------------------


_Way = tuple[bool, tuple[bool, ...]]
"""A mode, training or not, and which of the arguments that may be left out are given."""


def _sequences_in(module: nn.Module) -> tuple[str, ...]:
    """The paths of the children that apply theirs in order, and of theirs that do."""
    found: list[str] = []
    for name, child in module._modules.items():
        if child is not None and read.is_container(child):
            found += [name, *(f"{name}.{inner}" for inner in _sequences_in(child))]
    return tuple(found)


def _traced_form(module: nn.Module, may_be_left: tuple[str, ...] | None) -> Form | None:
    """The form of a module whose forward pass can be traced, in both modes; registered."""
    original = type(module)
    attributes = _attributes(module)
    parameters = _parameters(original)
    if parameters is None:
        return None
    opened = may_be_left or ()
    ways: dict[_Way, fx.Graph] = {}
    units: tuple[Unit, ...] = ()
    for given in itertools.product((False, True), repeat=len(parameters) - 1):
        left_out = {
            p.name: None for p, is_given in zip(parameters[1:], given, strict=True) if not is_given
        }
        traces = _traces(module, left_out, opened)
        if traces is None:
            continue
        for training, (graph, found) in traces.items():
            own = tuple(one.unit for one in found)
            units = own if len(own) > len(units) else units
            ways[training, given] = traced.fused_graph(graph, found, module)
    if not ways:
        return None
    sources = {way: graph.python_code("self").src for way, graph in ways.items()}
    children = tuple((name, type(child)) for name, child in module._modules.items())
    containers = tuple(
        (name, type(child), tuple(child._modules), type(child).forward)
        for name in opened
        if (child := forms.part(module, name)) is not None
    )
    key = (original, *sources.items(), repr(attributes), children, containers)
    if key not in _made:
        fused: Any = _fused_class(original, _traced_forward)
        fused._graphs = {way: traced.compiled(graph) for way, graph in ways.items()}
        fused._takes = set()
        fused._is_opened = may_be_left is not None
        form = Form(
            original,
            fused,
            original.__name__,
            units=units,
            by_unit=True,
            obstacle=_Traced(attributes, children, _Structured(containers, ())).obstacle,
        )
        form.pin()
        _made[key] = form
        forms.register_fused(form)
    return _made[key]


def _traces(
    module: nn.Module, left_out: dict[str, None], opened: tuple[str, ...]
) -> dict[bool, tuple[fx.Graph, list[traced.Found]]] | None:
    """A module's graphs in training and evaluation, with their units; None where it has none."""
    traces = {}
    for training in (True, False):
        shadow = _shadow(module)
        vars(shadow)["training"] = training
        try:
            graph = traced.trace(shadow, left_out, opened)
        except Exception:  # whatever a foreign forward pass may raise
            return None
        found = traced.find(graph, shadow)
        if not found:
            return None
        traces[training] = graph, found
    return traces


_lefts: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, bool]] = weakref.WeakKeyDictionary()
_MOST_SHAPES = 64


def _is_left(module: nn.Module, x: Any) -> bool:
    """Whether a module runs as it is because that is faster for such an input; found once."""
    if (
        type(x) is not Tensor
        or torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or transforms_active()
    ):
        return False
    lefts = _lefts.get(module)
    if lefts is None:
        lefts = _lefts[module] = {}
    key = (type(module), x.shape, x.stride(), x.dtype, x.device, backends.chosen())
    if key not in lefts:
        if len(lefts) >= _MOST_SHAPES:
            lefts.clear()
        form = forms.of(module)
        convs = [forms.part(module, unit.conv) for unit in form.units_of(module)]
        lefts[key] = left_to_modules(convs, x, False)
    return lefts[key]


def _traced_forward(module: Any, x: Any, *others: Any) -> Any:
    cls = type(module)
    if cls._is_opened and _is_left(module, x):
        return cls._original.forward(module, x, *others)
    given = tuple(other is not None for other in others)
    if (
        (isinstance(x, (list, tuple)), given) not in cls._takes
        or read.obstacle(module) is not None
        or any(isinstance(value, fx.Proxy) for value in (x, *others))
    ):
        if any(given):
            return cls._original.forward(module, x, *others)
        return run.run_unfused(module, x)
    return cls._graphs[module.training, given](module, x, *others)


_SIMPLE = (int, float, str, bool, type(None), torch.dtype, type, types.FunctionType)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The numbers, names and the like that a module holds."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("training", *_SETTINGS) and _is_simple(value)
    }


_SETTINGS = ("memory", "watch", "quantization", "head_quantization")


def _is_simple(value: object) -> bool:
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_simple, value))
    if isinstance(value, dict):
        return all(map(_is_simple, value.values()))
    return isinstance(value, _SIMPLE)


class _Traced:
    """What a traced forward pass depends on."""

    def __init__(
        self,
        attributes: dict[str, Any],
        children: tuple[tuple[str, type], ...],
        opened: _Structured,
    ) -> None:
        self._attributes = copy.deepcopy(attributes)
        self._children = children
        self._opened = opened

    def obstacle(self, module: nn.Module) -> str | None:
        """What has changed since, or None."""
        if torch.compiler.is_compiling():
            # Some torches' compilers cannot list a module's attributes: those there were, then.
            same = all(getattr(module, k, None) == v for k, v in self._attributes.items())
        else:
            same = _attributes(module) == self._attributes
        if not same:
            return "its attributes are not what they were when it was fused"
        for (name, child), (known, cls) in zip(
            module._modules.items(), self._children, strict=False
        ):
            fits = type(child) in (cls, _Stub) or _stands_for(type(child), cls)
            if name != known or not fits:
                return f"{name} is {read.described(child)}"
        if len(module._modules) != len(self._children):
            return f"it has the children {list(module._modules)}"
        return self._opened.obstacle(module)


def _stands_for(fused: type, cls: type) -> bool:
    """Whether a class is the fused one of another, or the other way around."""
    return any(
        form is not None and form.original is other
        for form, other in ((forms.of_fused(fused), cls), (forms.of_fused(cls), fused))
    )


def _shadow(module: nn.Module) -> Any:
    """Another module with the same attributes, children and tensors."""
    shadow = type(module).__new__(type(module))
    shadow.__dict__.update(module.__dict__)
    return shadow


# Graph modules ------------------------------------------------------------------------------------


class FusedGraph(blocks.Fused):
    """What the fused classes of `torch.fx.GraphModule`s, which have one each, have in common.

    The graph stays what it is; the forward pass is that of a copy with a call for each unit. What
    makes something of the graph is done by the class the module had before.
    """

    _original: type[fx.GraphModule]

    def recompile(self) -> Any:  # noqa: D102
        with _unfused(self) as module:
            return module.recompile()

    def __reduce__(self) -> Any:
        with _unfused(self) as module:
            return (_fused_again, module.__reduce__())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        with _unfused(self) as module:
            copied = module.__deepcopy__(memo)
        return _fuse_graph(copied)

    def __prepare_scriptable__(self) -> Any:
        # TorchScript reads the source of a forward pass, which this one has none of.
        shadow = self._original.__new__(self._original)
        shadow.__class__ = self._original
        shadow.__dict__.update(self.__dict__)
        return shadow


@contextlib.contextmanager
def _unfused(module: Any) -> Iterator[Any]:
    """A fused graph module with the class it had, and afterwards one made anew of its graph."""
    module.__class__ = type(module)._original
    try:
        yield module
    finally:
        _fuse_graph(module)


def _fuse_graph(module: Any) -> Any:
    form = _graph_form(module)
    if form is not None:
        module.__class__ = form.fused
    return module


def _fused_again(made: Callable[..., Any], arguments: tuple[Any, ...], *rest: Any) -> Any:
    return _fuse_graph(made(*arguments))


def _graph_form(module: fx.GraphModule) -> Form | None:
    """The form of one graph module; None where it does not run what its graph says."""
    original = type(module)
    if module.graph.python_code("self").src != module._code:
        return None
    found = traced.find(module.graph, module)
    if not found:
        return None
    own = {
        "__module__": __name__,
        "__doc__": "A `torch.fx.GraphModule`, made by `fused_resnet.fuse`.",
        "forward": traced.compiled(traced.fused_graph(module.graph, found)),
        "_original": original,
    }
    fused = type(original.__name__, (FusedGraph, original), own)
    units = tuple(one.unit for one in found)
    form = Form(original, fused, "GraphModule", units=units, by_unit=True)
    form.pin()
    fused._form_of_one = form  # type: ignore[attr-defined]
    return form


# Trials -------------------------------------------------------------------------------------------


def _structure(module: nn.Module) -> _Structure:
    parts: list[Hashable] = []
    for name, child in module.named_modules():
        geometry = (child.kernel_size, child.stride) if isinstance(child, Conv2d) else ()
        parts.append((name, type(child), geometry))
    return tuple(parts)


def _refusal(module: nn.Module, form: Form, recipe: Recipe) -> str | None:
    """What trying a form on a copy of a module has shown, once in a process."""
    if read.is_lazy(module):
        return "a child of it finds its number of channels in the first call"
    key = (recipe, form, _structure(module))
    if key not in _tried:
        _tried[key] = None
        _tried[key] = _tried_on_copy(module, form)
    return _tried[key]


def _tried_on_copy(module: nn.Module, form: Form) -> str | None:
    """Why a form is not what a module computes, on the module itself or with stubs in it."""
    stubbed = _with_stubs(module, "", form.names_of(module))
    copies = [module, stubbed]
    if sum(parameter.numel() for parameter in module.parameters()) > _MOST_PARAMETERS:
        copies.reverse()
    errors = []
    for one in copies:
        try:
            return _differs_in_some_mode(one, form)
        except Exception as error:  # whatever a foreign class may raise
            text = str(error).partition("\n")[0]
            errors.append(f"its form could not be tried: {type(error).__name__}: {text}")
    return errors[0]


# Of what is tried as it is, before it is tried with stubs.
_MOST_PARAMETERS = 3_000_000


def _differs_in_some_mode(module: nn.Module, form: Form) -> str | None:
    with trial.quietly(), backends.use_backend("reference"):
        copy = trial.replica(module)
        takes = getattr(form.fused, "_takes", None)
        if takes is None:
            return _differs_on(copy, form, (trial.random((2, _channels(copy, form), 9, 9)),))
        return _differs_on_whatever_it_takes(copy, form, takes)


def _channels(module: nn.Module, form: Form) -> int:
    """Of the input of a form's first convolution."""
    first: nn.Conv2d = forms.part(module, form.units_of(module)[0].conv)
    return first.in_channels


def _differs_on_whatever_it_takes(
    copy: nn.Module, form: Form, takes: set[tuple[bool, tuple[bool, ...]]]
) -> str | None:
    """Of a traced form, which is run for those arguments alone with which it has been tried.

    None if there are some, which `takes` then has: whether the first one is a list of tensors, and
    which of the others are given.
    """
    reasons: list[str | None] = []
    errors: list[Exception] = []
    channels, graphs = _channels(copy, form), form.fused._graphs  # type: ignore[attr-defined]
    x = trial.random((2, channels, 9, 9))
    firsts: list[tuple[bool, Any]] = [(False, x)]
    if channels > 1:
        outside = forms.part(copy, form.units_of(copy)[-1].conv).out_channels
        part = outside if outside < channels else channels // 2
        firsts.append((True, list(x.split((part, channels - part), 1))))
    for is_list, first in firsts:
        other = trial.random(_output_shape(copy, form, first))
        for given in dict.fromkeys(given for _, given in graphs):
            try:
                values = (first, *(other if is_given else None for is_given in given))
                reasons.append(_differs_on(copy, form, values, takes))
            except Exception as error:  # whatever a foreign class may raise
                takes.discard((is_list, given))
                errors.append(error)
    if takes:
        return None
    if not reasons:
        raise errors[0]
    return reasons[0]


def _output_shape(copy: nn.Module, form: Form, first: Any) -> Sequence[int]:
    """Of a form's last convolution's norm, whatever happens behind it."""
    seen: list[Sequence[int]] = [(2, _channels(copy, form), 9, 9)]
    norm: nn.Module = forms.part(copy, form.units_of(copy)[-1].norm)
    handle = norm.register_forward_hook(lambda _, inputs, out: seen.append(out.shape))
    with contextlib.suppress(Exception):
        trial.twin(copy)(first)  # whose hooks are copies
    handle.remove()
    return seen[-1]


def _differs_on(
    copy: nn.Module, form: Form, values: Sequence[Any], takes: set[Any] | None = None
) -> str | None:
    if takes is not None:  # for which the form runs while it is tried
        key = isinstance(values[0], list), tuple(value is not None for value in values[1:])
        takes.add(key)
    for training in (False, True):
        if (reason := _differs(copy.train(training), form, values, training)) is not None:
            if takes is not None:
                takes.discard(key)
            return reason
    return None


class _Stub(nn.Module):
    """Stands for a child that a form calls as it is: another function of each tensor it is given.

    So that the stages of a network are not computed to find out about its stem, and need not fit.
    """

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Any) -> Any:
        if isinstance(x, (list, tuple)):
            return [self(one) for one in x]
        return x * self.factor


def _with_stubs(module: nn.Module, path: str, names: Sequence[str]) -> nn.Module:
    """A module like this one with stubs for the children with parameters that it does not name."""
    shadow: nn.Module = _shadow(module)
    vars(shadow)["_modules"] = dict(module._modules)
    for i, (name, child) in enumerate(module._modules.items()):
        whole = f"{path}.{name}" if path else name
        if child is None or (whole in names and not child._modules):
            continue
        if whole in names or any(other.startswith(f"{whole}.") for other in names):
            shadow._modules[name] = _with_stubs(child, whole, names)
        elif next(child.parameters(), None) is not None:
            shadow._modules[name] = _Stub(1.5 + 0.25 * i)
    return shadow


def _differs(copy: nn.Module, form: Form, values: Sequence[Any], training: bool) -> str | None:
    unfused, fused = trial.twin(copy), trial.twin(copy)
    fused.__class__ = form.fused
    results = []
    for one in (unfused, fused):
        torch.manual_seed(1)
        results.append(one(*map(_cloned, values)))
    if reason := read.obstacle(fused):
        return reason
    mode = "training" if training else "evaluation"
    error = trial.difference(results[1], results[0])
    if not error <= trial.TOLERANCE:
        return f"its form computes something else: in {mode} outputs differ by {error:.2g}"
    error = trial.difference([*fused.buffers()], [*unfused.buffers()])
    if not error <= trial.TOLERANCE:
        return f"its form computes something else: in {mode} buffers differ by {error:.2g}"
    return None


def _cloned(value: Any) -> Any:
    if isinstance(value, list):
        return [one.clone() for one in value]
    return None if value is None else value.clone()


def _applies(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module applies its children of these names one after the other."""
    try:
        with trial.quietly():
            copy = trial.replica(module)
            convs = [child for child in copy.modules() if isinstance(child, Conv2d)]
            x = trial.random((2, convs[0].in_channels, 9, 9))
            for training in (False, True):
                one, other = trial.twin(copy.train(training)), trial.twin(copy)
                torch.manual_seed(1)
                expected = one(x.clone())
                torch.manual_seed(1)
                out = x.clone()
                for name in names:
                    child = forms.part(other, name)
                    out = out if child is None else child(out)
                if not trial.difference(out, expected) <= trial.TOLERANCE:
                    return False
    except Exception:  # whatever a foreign class may raise
        return False
    return True


# What users call ----------------------------------------------------------------------------------


def register_form(
    cls: type[nn.Module] | None = None,
    *,
    branch: Sequence[str] = (),
    shortcut: str | None = None,
    act: str | None = None,
    idle: Sequence[str] = (),
    example: nn.Module | None = None,
) -> Any:
    """Tells `fuse` how modules of a class of yours compute; also a decorator of the class.

    A residual block, a module that applies its children one after the other, and one whose forward
    pass is to be traced:

        @fused_resnet.register_form(
            branch=("conv1", "bn1", "relu", "conv2", "bn2"), shortcut="downsample", act="relu"
        )
        class Block(nn.Module): ...

        fused_resnet.register_form(ConvLayer, branch=("conv", "norm", "F.relu"))
        fused_resnet.register_form(Stem)

    The first computes `act(branch(x) + shortcut(x))`. Names are those of children, with dots for
    children of theirs; those that a module has set to None are left out, so one form does for
    blocks with and without a projection. A "?" behind a name says that a module need not have the
    attribute at all. "F.relu" is a ReLU that is no child; likewise "F.silu",
    "F.leaky_relu(0.2)" and all that `functional` has. A traced forward pass is what `torch.fx` sees
    of it, with the children as they are: say so of a class only if what it calls depends on nothing
    but its attributes.

    When `fuse` first meets a module of some structure, it runs the class's forward pass and the
    form's on the same random numbers, in evaluation and in training. If they differ, the module is
    left alone, and `report` says by how much.

    Args:
        cls: the class; without it, a decorator is returned.
        branch: what is applied one after the other; empty for a forward pass that is traced.
        shortcut: of a residual block, what is applied to its input before that is added.
        act: of a residual block, the ReLU behind the add.
        idle: what has to do nothing for the form to hold, such as an observer.
        example: a module of the class to try the form on at once. It stays as it is.

    Returns:
        `cls`.

    Raises:
        TypeError: `cls` is not a module's class, or a name is not a string.
        ValueError: there is a shortcut without `act` or the reverse, or the form computes something
            else than the example.
    """
    if cls is None:
        return functools.partial(
            register_form, branch=branch, shortcut=shortcut, act=act, idle=idle, example=example
        )
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"register_form: cls is {cls!r}, must be a class of modules")
    if isinstance(branch, str) or not all(
        isinstance(name, str) for name in (*branch, shortcut or "", act or "", *idle)
    ):
        raise TypeError("register_form: branch and idle must be sequences of names, the rest names")
    if (shortcut is None) != (act is None) or (act is not None and not branch):
        raise ValueError(
            f"register_form: shortcut is {shortcut!r} and act is {act!r}: "
            "a residual block has both, and a branch"
        )
    recipe = Recipe(cls.__name__, tuple(branch), shortcut, act, tuple(idle), cls)
    if example is not None:
        form = _form_of(example, recipe)
        reason = _misfit(example, recipe) if form is None else _refusal(example, form, recipe)
        if reason is not None:
            raise ValueError(f"register_form: {cls.__name__}: {reason}")
    add(recipe)
    return cls
