"""Modules that apply their children one after the other: their units, and running them.

`nn.Sequential`, the classes that derive from it without a forward pass of their own, such as
torchvision's `Conv2dNormActivation`, and the classes of other libraries in `forms.in_order`. What
one child makes is read by the next and by nothing else, so a convolution, the norm behind it and
the activation behind that can be one pass, whatever the module is part of.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from .. import forms
from ..forms import Unit
from ..originals import Conv2d
from . import network, norms, read, run
from .activations import text_of
from .conv_norm_act import left_to_modules

Parts = Sequence[tuple[str, "nn.Module | None"]]
"""Modules in the order in which they are applied, by name; None where there is none."""


def parts_of(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module | None]]:
    """What a module applies, one after the other, without the containers."""
    return [pair for pair in read.in_order(module, name) if not read.is_container(pair[1])]


def own_parts(module: nn.Module) -> list[tuple[str, nn.Module | None]]:
    """`parts_of` a module, of which containers that have units by themselves stay one part.

    Unless the activation that belongs to the last of them is behind the container.
    """
    names = forms.in_order.get(type(module)) or tuple(module._modules)
    children = [(name, forms.part(module, name)) for name in names]
    found: list[tuple[str, nn.Module | None]] = []
    for i, (name, child) in enumerate(children):
        if child is None or not read.is_container(child):
            found.append((name, child))
            continue
        parts = parts_of(child, name)
        units = units_in(parts)
        behind = children[i + 1] if i + 1 < len(children) else ("", None)
        ends_open = bool(units) and not (units[-1].act or units[-1].after)
        if not units or (ends_open and _is_act(*behind)):
            found += parts
        else:
            found.append((name, child))
    return found


def units_in(parts: Parts) -> tuple[Unit, ...]:
    """Each convolution with a norm behind it, and what is applied until the next one."""
    parts = _with_acts(parts)
    starts = [i for i in range(len(parts) - 1) if _is_pair(parts[i][1], parts[i + 1][1])]
    units: list[Unit] = []
    for start, end in itertools.pairwise([*starts, len(parts)]):
        names = [name for name, _ in parts[start:end]]
        conv, norm, *rest = names
        acts = [name for name, module in parts[start + 2 : end] if _is_act(name, module)]
        act = acts[0] if acts else None
        position = rest.index(act) if act is not None else 0
        between, after = tuple(rest[:position]), tuple(rest[position + (act is not None) :])
        before = tuple(name for name, _ in parts[: starts[0]]) if not units else ()
        units.append(Unit(conv, norm, act, between, after, before))
    return tuple(units)


def _with_acts(parts: Parts) -> list[tuple[str, nn.Module | None]]:
    """Norms that apply an activation, behind a convolution, and what they apply."""
    found: list[tuple[str, nn.Module | None]] = []
    for name, module in parts:
        behind_conv = bool(found) and type(found[-1][1]) is Conv2d
        found.append((name, module))
        if behind_conv and module is not None and norms.has_act(module):
            found += [(f"{name}.{child}", module._modules[child]) for child in ("drop", "act")]
    return found


def _is_pair(conv: nn.Module | None, norm: nn.Module | None) -> bool:
    return type(conv) is Conv2d and norm is not None and read.is_norm(norm)


def _is_act(name: str, module: nn.Module | None) -> bool:
    return forms.is_function(name) or (module is not None and text_of(module) is not None)


def sequence_forward(module: nn.Module, x: Tensor) -> Tensor:
    """A module that applies its children one after the other."""
    if read.obstacle(module) is not None or read.input_obstacle(x) is not None:
        return run.run_unfused(module, x)
    form = forms.of(module)
    for unit in form.units_of(module) if form is not None else ():
        left = not unit.before and left_to_modules(
            (forms.part(module, unit.conv),), x, unit.act is not None
        )
        if not left and read.unit_obstacle(module, unit) is None:
            x = unit_forward(module, unit, x)
        else:
            x = _unfused_unit(module, unit, x)
    return x


def pool_behind(module: nn.Module, unit: Unit) -> str | None:
    """The name of a max-pool that runs in one with the unit before it, or None."""
    if unit.act is None or read.working_parts(module, unit.between):
        return None
    working = [name for name in unit.after if read.working_parts(module, (name,))]
    pool = forms.part(module, working[0]) if working else None
    return working[0] if pool is not None and read.pool_obstacle(pool) is None else None


def unit_forward(module: nn.Module, unit: Unit, x: Tensor) -> Tensor:
    """`run.run_unit`, with the max-pool behind it in one where there is one."""
    pool = pool_behind(module, unit)
    if pool is None:
        return run.run_unit(module, unit, x)
    for part in read.working_parts(module, unit.before):
        x = part(x)
    maxpool: Any
    maxpool, *rest = read.working_parts(module, unit.after)
    act: Any = forms.part(module, unit.act)
    x = network.stem(*read.conv_norm(module, unit), act, maxpool, x)
    for part in rest:
        x = part(x)
    return x


def _unfused_unit(module: nn.Module, unit: Unit, x: Tensor) -> Tensor:
    """The unit's modules as they are, called one after the other."""
    norm = forms.part(module, unit.norm)
    held = (f"{unit.norm}.drop", f"{unit.norm}.act") if norms.has_act(norm) else ()
    names = (*unit.before, unit.conv, unit.norm, *unit.between, unit.act, *unit.after)
    for name in names:
        part = None if name is None or name in held else forms.part(module, name)
        if part is not None:
            x = part(x)
    return x
