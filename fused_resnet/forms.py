"""What `fuse` knows of a class: a `Form` each, registered by the file with its fused class.

Torchvision's residual networks are in `blocks.py`, other libraries' in `families/`, one file each,
which are imported when that library has been. The fused class is a subclass of the one it stands
for and adds nothing to a module but its class, under a name that stays: pickles refer to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import originals
from .layers import activation


@dataclass(frozen=True)
class Unit:
    """A convolution and what follows it, `after(act(between(norm(conv(x))) + shortcut))`.

    The shortcut is added in the last unit of a residual block only. Attributes are names of
    attributes of the module, with dots for those of its children.

    Attributes:
        conv: an `nn.Conv2d`.
        norm: an `nn.BatchNorm2d`, `FrozenBatchNorm2d` or a norm that `modules/norms.py` knows.
        act: a module of `modules/activations.py`, a function's name (`is_function`), or None where
            there is none.
        between: what is applied before the shortcut and the activation, if it is there, in order.
        after: what is applied to the activation's output, if it is there, in order.
        before: what is applied to the convolution's input, if it is there, in order.
    """

    conv: str
    norm: str
    act: str | None
    between: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    before: tuple[str, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is a convolution, a norm and an activation that are children of the module."""
        names = (self.conv, self.norm, self.act)
        return not (self.between or self.after or self.before) and not any(
            name is None or "." in name for name in names
        )


FUNCTION = "F."
"""What the name of an activation that is a function, not a child, begins with; its text follows."""
FUNCTIONAL_RELU = "F.relu"
"""The name of a ReLU that is a function."""


@functools.cache
def function(name: str) -> nn.Module | None:
    """The module that stands for an activation that is a function, or None if the name is none's.

    Args:
        name: `FUNCTION` and a text of `layers/activation.py`, but "none".
    """
    text = name.removeprefix(FUNCTION)
    if text == name or activation.error(text) is not None:
        return None
    kind, _, (first, second) = activation.read(text)
    modules: dict[str, Callable[[], nn.Module]] = {
        "relu": originals.ReLU,
        "hardtanh": lambda: originals.Hardtanh(first, second),
        "leaky_relu": lambda: originals.LeakyReLU(first),
        "silu": originals.SiLU,
        "hardswish": originals.Hardswish,
        "gelu": originals.GELU,
        "gelu_tanh": lambda: originals.GELU(approximate="tanh"),
    }
    return modules[kind]() if kind in modules else None


def is_function(name: str | None) -> bool:
    """Whether it is the name of an activation that is a function, not a child."""
    return name is not None and name.startswith(FUNCTION) and function(name) is not None


def _no_obstacle(module: nn.Module) -> None:
    return None


@dataclass(frozen=True, eq=False)
class Form:
    """How modules of one class are fused.

    Attributes:
        original: the class.
        fused: its subclass that runs fused.
        kind: what the report calls it.
        units: its convolutions, in order; or a function that says so for a module.
        norms: pairs of a norm and the ReLU on its output, where no convolution comes before.
        prologues: for each of these norms and each convolution of the module, which need not be
            there, that reads its output: pairs of the two.
        convs: convolutions that no norm follows.
        shortcut: the name of a residual block's projection, which may be None; None if it has none.
        pool: the name of a stem's max-pool.
        overrides: the methods that the fused class replaces.
        by_unit: whether a unit that cannot run fused keeps only itself from it, not the others.
        obstacle: what besides its parts keeps a module from being fused, or None.
        plain_names: of each unit the convolution, norm and activation, where it is nothing but
            these; None where there may be more to a module.
    """

    original: type[nn.Module]
    fused: type[nn.Module]
    kind: str
    units: tuple[Unit, ...] | Callable[[nn.Module], Sequence[Unit]]
    norms: tuple[tuple[str, str], ...] = ()
    prologues: tuple[tuple[str, str], ...] = ()
    convs: tuple[str, ...] = ()
    shortcut: str | None = None
    pool: str | None = None
    overrides: tuple[str, ...] = ("forward",)
    by_unit: bool = False
    obstacle: Callable[[nn.Module], str | None] = _no_obstacle
    plain_names: tuple[tuple[str, str, str], ...] | None = field(init=False, default=None)
    _names: Sequence[str] = field(init=False, repr=False, compare=False, default=())
    _methods: dict[str, Any] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.units, tuple):
            object.__setattr__(self, "_names", self._names_in(self.units))
            if all(unit.is_plain for unit in self.units):
                names = tuple((unit.conv, unit.norm, unit.act or "") for unit in self.units)
                object.__setattr__(self, "plain_names", names)
        methods = [name for name in self.overrides if name in vars(self.fused)]
        object.__setattr__(self, "_methods", {name: None for name in methods})
        self.replaced()

    def replaced(self) -> str | None:
        """Which of the methods that the fused class overrides is not the original, or None."""
        for name, method in self._methods.items():
            now = getattr(self.original, name)
            if now is not method:
                if not originals.is_own(self.original, name, now):
                    return f"{self.original.__name__}.{name}"
                self._methods[name] = now
        return None

    def pin(self) -> None:
        """Takes the methods that the fused class overrides for the original's, as they are."""
        for name in self._methods:
            self._methods[name] = getattr(self.original, name)

    def units_of(self, module: nn.Module) -> Sequence[Unit]:
        """The convolutions of a module of this form."""
        return self.units if isinstance(self.units, tuple) else self.units(module)

    def names_of(self, module: nn.Module) -> Sequence[str]:
        """The children that a fused forward pass goes around, and their parents, each once."""
        if isinstance(self.units, tuple):
            return self._names
        return self._names_in(self.units(module))

    def _names_in(self, units: Sequence[Unit]) -> tuple[str, ...]:
        names = [name for u in units for name in (u.conv, u.norm, u.act) if name is not None]
        names += [name for pair in self.norms for name in pair] + list(self.convs)
        names = [name for name in names if not is_function(name)]
        parents = [name[:i] for name in names for i, letter in enumerate(name) if letter == "."]
        return tuple(dict.fromkeys(names + parents))

    @property
    def has_layers(self) -> bool:
        """Whether it is more than the modules that its own calls."""
        return bool(self.units or self.norms or self.convs)

    @property
    def is_block(self) -> bool:
        """Whether it is nothing but its units and, in the last of them, the shortcut."""
        return self.shortcut is not None and not self.norms and not self.convs


idle: dict[type[nn.Module], Callable[[nn.Module], bool]] = {
    originals.Identity: lambda module: True,
    originals.Sequential: lambda module: not module._modules,
}
"""Modules that may return their input unchanged, and whether one of them would now."""

in_order: dict[type[nn.Module], tuple[str, ...]] = {}
"""Classes of other libraries that apply these children one after the other, besides Sequential."""

_by_original: dict[type[nn.Module], Form] = {}
_by_fused: dict[type[nn.Module], Form] = {}


def register(form: Form) -> None:
    """Makes `fuse`, `unfuse` and `report` know a class."""
    _by_original[form.original] = form
    _by_fused[form.fused] = form


def register_fused(form: Form) -> None:
    """Makes `of_fused` know the fused class of a form that is made for one module's structure."""
    _by_fused[form.fused] = form


def registered() -> list[Form]:
    """Every form there is now."""
    return list(_by_original.values())


def unsharded(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a module had before `fully_shard` derived one from it; else `cls`."""
    first, *rest = cls.__bases__
    is_sharded = first.__module__.startswith("torch.distributed.") and len(rest) == 1
    return rest[0] if is_sharded and "__deepcopy__" in vars(cls) else cls


def resharded(cls: type[nn.Module], target: type[nn.Module]) -> type[nn.Module]:
    """`target`, sharded as `cls` is, if it is."""
    if unsharded(cls) is cls:
        return target
    key = (cls.__bases__[0], target)
    if key not in _sharded:
        own = {name: vars(cls)[name] for name in ("__module__", "__deepcopy__")}
        prefix = cls.__name__.removesuffix(unsharded(cls).__name__)
        _sharded[key] = type(f"{prefix}{target.__name__}", key, own)
    return _sharded[key]


_sharded: dict[tuple[type, type[nn.Module]], type[nn.Module]] = {}


def of_original(cls: type[nn.Module]) -> Form | None:
    """The form of exactly this class, unfused."""
    return _by_original.get(cls)


def of_fused(cls: type[nn.Module]) -> Form | None:
    """The form whose fused class this is."""
    form = _by_fused.get(cls)
    if form is None:
        # Classes of one module each keep their form, and go with it.
        form = getattr(cls, "_form_of_one", None)
        form = form if form is not None and form.fused is cls else None
    return form


def of(module: nn.Module) -> Form:
    """The form of the class that a module is of or derives from, which has one."""
    form = _by_fused.get(type(module))
    if form is None:
        form = found(module)
        assert form is not None, type(module)
    return form


def found(module: nn.Module) -> Form | None:
    """The form of the class that a module is of or derives from, or None."""
    form = of_fused(type(module))
    if form is not None:
        return form
    for cls in type(module).__mro__:
        form = _by_original.get(cls) or of_fused(cls)
        if form is not None:
            return form
    return None


def part(module: nn.Module, name: str | None) -> Any:
    """The child of this name, of the class that the form says, or None if there is none."""
    # Looked up where modules keep them: an attribute takes ten times as long.
    children = module._modules
    if name in children:
        return children[name]
    if name is None:
        return None
    if is_function(name):
        return function(name)
    found: nn.Module | None = module
    for piece in name.split("."):
        found = getattr(found, piece, None)
    return found
