"""Forward passes that a backend has written down, run again without going through the modules.

The first pass for a shape, or the second, runs as ever and is recorded; if the backend can make a
plan of it, later ones are one call, as long as nothing has changed that the modules' own way would
see: their classes, attributes, hooks and children, which tensors are their parameters, what of
torch's or this package's is replaced, chosen or active. What has become of a parameter's values and
address is for the plan to see: it reads them in every run, or says that it is out of date.
"""

from __future__ import annotations

import collections
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence
from operator import getitem, is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import dropout, flatten, linear, pooling
from torch.nn.modules.module import _has_any_global_hook

from .. import backends, forms, originals
from ..backends import Plan
from ..layers import counting
from ..layers.ranges import BlockRanges
from ..models.cifar import PaddedShortcut
from ..ops.registration import nothing_intercepts
from ..originals import (
    BatchNorm2d,
    Conv2d,
    FrozenBatchNorm2d,
    Identity,
    MaxPool2d,
    ReLU,
    Sequential,
)
from . import guard, norms, read, squeeze_excitation
from .activations import text_of
from .read import HOOKS, input_obstacle

VARIABLE = "FUSED_RESNET_PLANS"

# What a network keeps besides its children that says what they run in.
_RANGES = ("quantization", "head_quantization")

_PLAIN = frozenset(
    {Conv2d, BatchNorm2d, FrozenBatchNorm2d, MaxPool2d, ReLU, Sequential, Identity,
     PaddedShortcut, pooling.AdaptiveAvgPool2d, linear.Linear, dropout.Dropout, flatten.Flatten}
)  # fmt: skip
_GATES = frozenset({originals.Sigmoid, originals.Hardsigmoid})
# What a class runs when a module of it is called; `_scale` is a squeeze-and-excitation's.
_METHODS = ("__call__", "forward", "_scale")
# Attributes with which a module is called in a way of its own.
_OWN_CALLS = ("forward", "_conv_forward", "_compiled_call_impl")
# Shapes of a model that have a plan at a time; the oldest goes first.
_MOST_PLANS = 16
# Passes in a row that find modules changed, after which a model is taken to change in every pass.
_MOST_CHANGES = 8

_of_models: weakref.WeakKeyDictionary[nn.Module, _Plans] = weakref.WeakKeyDictionary()
# For what a backend has prepared a model, whatever has changed since.
_prepared: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


# None until the first use, as in `layers/watch.py`.
_from_environment: bool | None = None


def enabled() -> bool:
    """Whether FUSED_RESNET_PLANS, as it was at the first use, allows plans.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    global _from_environment
    if _from_environment is None:
        value = os.environ.get(VARIABLE) or "1"
        if value not in ("0", "1"):
            raise ValueError(f"{VARIABLE} is {value!r}, must be one of 0, 1")
        _from_environment = value == "1"
    return _from_environment


def described() -> str:
    """What FUSED_RESNET_PLANS comes to.

    Raises:
        ValueError: see `enabled`.
    """
    return "inference passes become plans" if enabled() else "every pass goes through its modules"


class Modules:
    """Modules as they were when a pass was recorded.

    Args:
        parts: of which they are the descendants, in the order in which the pass is given them.
    """

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        self.parts = tuple(parts)
        modules = list(dict.fromkeys(m for part in parts for m in part.modules()))
        self._modules = modules
        self._types = [*map(type, modules)]
        states = [*map(vars, modules)]
        self._states = [dict(state) for state in states]
        self._hook_states = [state for state in states for _ in HOOKS]
        self._hook_names = [*HOOKS] * len(states)
        # Which dictionary, under which name, of which module.
        self._tensor_states: list[dict[str, Any]] = []
        self._kinds: list[str] = []
        self._names: list[str] = []
        for state in states:
            for kind in ("_parameters", "_buffers"):
                for name in state[kind]:
                    self._tensor_states.append(state)
                    self._kinds.append(kind)
                    self._names.append(name)
        self._slots = self._now()
        # Their parameters and buffers, each once.
        self.tensors = list({id(t): t for t in self._slots if t is not None}.values())
        parents = [state for state in states if state["_modules"]]
        self._parents = parents
        self._children = [dict(state["_modules"]) for state in parents]
        self._forms = [form for cls in set(self._types) if (form := forms.of_fused(cls))]
        # What other classes run, which they may be given anew.
        self._others = [
            cls for cls in set(self._types) if cls not in _PLAIN and forms.of_fused(cls) is None
        ]
        self._methods = self._methods_now()
        self._guard = guard.guard_of(modules, HOOKS)
        self._guards_left = _MOST_CHANGES

    def are_plain(self, eight_bits: bool = False, others: bool = False) -> bool:
        """Whether calling them does nothing but compute, in a way that states and types settle.

        Args:
            eight_bits: whether that includes blocks that have been calibrated.
            others: whether that includes what chains are made of: see `chains.py`.
        """
        return (
            all(
                cls in _PLAIN or _is_block(cls) or (others and _computes(module))
                for cls, module in zip(self._types, self._modules, strict=True)
            )
            and not any(state["training"] for state in self._states)
            and all(
                eight_bits and isinstance(state["quantization"], BlockRanges)
                for state in self._states
                if "quantization" in state
            )
            and not any(name in state for state in self._states for name in _OWN_CALLS)
            and self._have_no_hooks()
        )

    def are_same(self, parts: Sequence[nn.Module]) -> bool:
        """Whether nothing about them has changed, in some microseconds for a ResNet-50."""
        if len(parts) != len(self.parts) or not all(map(is_, parts, self.parts)):
            return False
        if any(form.replaced() for form in self._forms):
            return False
        if self._others and self._methods_now() != self._methods:
            return False
        if self._guard is not None and self._guard.holds():
            return True
        if not self._are_equal():
            return False
        # Other objects, which are equal.
        self._guards_left -= 1
        self._guard = guard.guard_of(self._modules, HOOKS) if self._guards_left > 0 else None
        return True

    def _are_equal(self) -> bool:
        """`are_same`, in some tens of microseconds."""
        try:
            return (
                [*map(type, self._modules)] == self._types
                and self._have_no_hooks()
                and [state["_modules"] for state in self._parents] == self._children
                and all(map(is_, self._now(), self._slots))
                and [*map(vars, self._modules)] == self._states
            )
        except (KeyError, TypeError, ValueError, RuntimeError):
            # A name is gone, or a new value, such as a tensor, cannot be compared.
            return False

    def _have_no_hooks(self) -> bool:
        return not any(map(getitem, self._hook_states, self._hook_names))

    def _methods_now(self) -> list[Any]:
        return [
            originals.replaced_activation(),
            originals.replaced_in_gates(),
            *[getattr(cls, name, None) for cls in self._others for name in _METHODS],
        ]

    def _now(self) -> list[Tensor | None]:
        return [*map(getitem, map(getitem, self._tensor_states, self._kinds), self._names)]


def _is_block(cls: type) -> bool:
    form = forms.of_fused(cls)
    return form is not None and form.is_block


def _computes(module: nn.Module) -> bool:
    """Whether a module is what chains are made of, and holds nothing that can change in place."""
    cls = type(module)
    form = forms.of_fused(cls)
    known = (
        (form is not None and (form.by_unit or not form.has_layers))
        or cls in _GATES
        or cls in forms.idle
        or text_of(module) is not None
        or read.is_container(module)
        or norms.has_act(module)
        or squeeze_excitation.may_be(module)
    )
    public = [value for name, value in vars(module).items() if not name.startswith("_")]
    return known and not any(isinstance(value, (list, dict, set)) for value in public)


class _Plans:
    """The plans of a model, by what they depend on; or why a pass cannot become one."""

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module], others: bool) -> None:
        self.modules = Modules(parts)
        self.others = others
        # What `again` looks at, for which these must be plans of the whole model.
        self.type = type(model)
        self.state = dict(vars(model))
        self.children = dict(model._modules)
        self.is_whole = False
        self.by_key: dict[Hashable, Plan | str] = {}
        # What profilers are to count of each.
        self.marked: dict[Hashable, list[counting.Marked]] = {}
        # Passes through the modules since there was last a plan, and plans in a row that were out
        # of date when they were to run.
        self.passes: collections.Counter[Hashable] = collections.Counter()
        self.lost = 0
        self.changes = 0

    def are_of(self, model: nn.Module) -> bool:
        """Whether nothing about a model has changed, itself included."""
        try:
            if model._modules != self.children or vars(model) != self.state:
                return False
        except (TypeError, ValueError, RuntimeError):
            return False
        form = forms.found(model)
        if form is None or form.replaced() is not None:
            return False
        return self.modules.are_same(self.modules.parts)

    def put(self, key: Hashable, plan: Plan | str) -> None:
        while len(self.by_key) >= _MOST_PLANS:
            oldest = next(iter(self.by_key))
            self.by_key.pop(oldest, None)
            self.marked.pop(oldest, None)
        self.by_key[key] = plan
        self.passes.clear()


def again(model: nn.Module, x: Tensor) -> Tensor | None:
    """The output of a model of which there is a plan, if nothing has changed; else None.

    Args:
        model: not yet looked at. It has been when the plan was made.
        x: likewise.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    plans = _of_models.get(model)
    if (
        plans is None
        or not plans.is_whole
        or plans.type is not type(model)
        or not nothing_intercepts(x)
        or input_obstacle(x) is not None
        or originals.replaced() is not None
        or originals.replaced_in_heads() is not None
        or _has_any_global_hook()
    ):
        return None
    backend = backends.choose(x.device.type)
    key = _key(backend, x)
    plan = plans.by_key.get(key)
    if plan is None or isinstance(plan, str) or not plan.can_run() or not plans.are_of(model):
        return None
    out = plan.run(x)
    if out is not None:
        plans.changes = plans.lost = 0
        if counting.is_wanted():
            counting.mark(plans.marked[key])
    return out


def _key(backend: backends.Backend, x: Tensor) -> Hashable:
    own = backend.plan_key(x)
    return None if own is None else (x.shape, x.stride(), x.dtype, x.device, backend.name, own)


def planned(
    model: nn.Module,
    parts: Sequence[nn.Module],
    x: Tensor,
    compute: Callable[[nn.Module, Tensor], Tensor],
    whole: bool = False,
    others: bool = False,
) -> Tensor:
    """`compute(model, x)`, in one call from the second time on where the backend can plan it.

    Args:
        model: whose plans these are. It has no obstacle, nor has `x`.
        parts: all modules, with their descendants, that `compute` runs, but for the model.
        x: (N, C, H, W).
        compute: what to run.
        whole: whether that is all of the model, so that later passes may begin with `again`.
        others: see `Modules.are_plain`.

    Returns:
        What `compute` returns.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training:
        return compute(model, x)
    backend = backends.choose(x.device.type)
    if type(backend).plan_key is backends.Backend.plan_key or not nothing_intercepts(x):
        return compute(model, x)
    key = _key(backend, x)
    if key is None:
        return compute(model, x)
    plans = _of_models.get(model)
    if plans is None:
        if not enabled() or not all(isinstance(part, nn.Module) for part in parts):
            return compute(model, x)
        plans = _of_models[model] = _Plans(model, parts, others)
    elif not (
        plans.modules.are_same(parts)
        and all(vars(model).get(name) is plans.state.get(name) for name in _RANGES)
    ):
        changes = plans.changes + 1
        if changes > _MOST_CHANGES:
            return compute(model, x)
        plans = _of_models[model] = _Plans(model, parts, others)
        plans.changes = changes
    else:
        plans.changes = 0
    plans.is_whole = whole
    plan = plans.by_key.get(key)
    if isinstance(plan, str):
        return compute(model, x)
    if plan is not None and not plan.can_run():
        return compute(model, x)
    if plan is not None:
        out = plan.run(x)
        if out is not None:
            plans.lost = 0
            if counting.is_wanted():
                counting.mark(plans.marked[key])
            return out
        plans.by_key.pop(key, None)
        plans.lost += 1
        if plans.lost > _MOST_CHANGES:
            plans.put(key, "what it reads changes in every pass")
            return compute(model, x)
    plans.passes[key] += 1
    if plans.passes[key] < backend.recorded_pass:
        return compute(model, x)
    return _recorded(model, plans, key, x, compute)


def include_heads(x: Tensor) -> bool:
    """Whether a plan for such an input may include what comes behind the blocks."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return backends.choose(x.device.type).plans_head(x)


def _recorded(
    model: nn.Module,
    plans: _Plans,
    key: Hashable,
    x: Tensor,
    compute: Callable[[nn.Module, Tensor], Tensor],
) -> Tensor:
    """An ordinary pass, of which a plan is made if that is possible."""
    tensors = plans.modules.tensors
    backend = backends.choose(x.device.type)
    is_plain = plans.modules.are_plain(backend.plans_eight_bits, plans.others)
    if not is_plain or not nothing_intercepts(*tensors):
        plans.put(key, "it is more than inference by torch's own modules")
        return compute(model, x)
    recorder = backend.recorder(x, tensors)
    if recorder is None:
        return compute(model, x)
    prepared = _prepared.setdefault(model, set())
    if key not in prepared:
        if len(prepared) >= _MOST_PLANS:
            prepared.clear()
        prepared.add(key)
        with counting.collected():
            backend.prepare(functools.partial(compute, model, x))
    with counting.collected() as plans.marked[key], recorder:
        out = compute(model, x)
    plan = recorder.plan(out)
    if not isinstance(plan, str) and not _gives(plan, x, out):
        warnings.warn(
            "fused_resnet: a forward pass launched from its plan differs from the pass it was made "
            "of, so it is not used; please report this, and set FUSED_RESNET_PLANS=0",
            stacklevel=2,
        )
        plan = "its first run differed from the pass it was made of"
    plans.put(key, plan)
    return out


def _gives(plan: Plan, x: Tensor, out: Tensor) -> bool:
    """Whether a plan's first run has the bits of the pass that it was made of."""
    again = plan.run(x)
    if again is None or again.shape != out.shape or again.stride() != out.stride():
        return False
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[out.element_size()]
    return torch.equal(again.view(bits), out.view(bits))


def forget(model: nn.Module) -> None:
    """Drops a model's plans, and with them what they hold of its parameters."""
    _of_models.pop(model, None)
