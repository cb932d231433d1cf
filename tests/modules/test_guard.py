"""What tells whether modules have changed since a plan was made."""

import gc
import weakref

import pytest
import torch
from torch import nn

from fused_resnet.modules import guard, plans
from fused_resnet.modules.read import HOOKS


def make_parts():
    return [nn.Conv2d(3, 4, 3), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())]


class Other(nn.ReLU):
    """Another class."""


def replaced_dict(parts):
    object.__setattr__(parts[1][1], "__dict__", dict(vars(parts[1][1])))


def set_weight(parts):
    parts[0].weight = nn.Parameter(parts[0].weight.detach().clone())


def set_buffer(parts):
    parts[1][0].running_var = parts[1][0].running_var + 1


def no_bias(parts):
    parts[0].bias = None


def delete(parts):
    del parts[0].transposed


def add(parts):
    parts[1].note = "mine"


def set_child(parts):
    parts[1][1] = nn.Sigmoid()


def add_child(parts):
    parts[1].append(nn.ReLU())


def remove_child(parts):
    del parts[1][1]


def set_class(parts):
    parts[1][1].__class__ = Other


def set_eps(parts):
    parts[1][0].eps = 0.25


def train(parts):
    parts[1][0].training = False


def hook(name):
    def register(parts):
        getattr(parts[1][0], f"register_{name}")(lambda *args: None)

    return register


CHANGES = {
    change.__name__: change
    for change in (
        set_weight, set_buffer, no_bias, delete, add, set_child, add_child, remove_child,
        set_class, set_eps, train,
    )
} | {name: hook(name) for name in (
    "forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"
)}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changes_are_seen(change, native, monkeypatch):
    """With the native guard, and without one where there is no way to it."""
    if not native:
        monkeypatch.setattr(guard, "guard_of", lambda modules, hooks: None)
    parts = make_parts()
    modules = plans.Modules(parts)
    assert (modules._guard is not None) == native
    assert modules.are_same(parts)
    change(parts)
    assert not modules.are_same(parts)


@pytest.mark.parametrize("change", [*CHANGES.values(), replaced_dict], ids=[*CHANGES, "dict"])
def test_a_guard_sees_other_objects(change):
    parts = make_parts()
    found = guard.guard_of(list(nn.ModuleList(parts).modules())[1:], HOOKS)
    assert found is not None
    for _ in range(3):
        assert found.holds()
    change(parts)
    assert not found.holds()


def test_equal_objects_are_the_same():
    """They are compared once, by value, and are what is looked for from then on."""
    parts = make_parts()
    modules = plans.Modules(parts)
    first = modules._guard
    parts[1][0].eps = float("1e-05")
    assert not first.holds()
    assert modules.are_same(parts)
    assert modules._guard is not first
    assert modules._guard.holds()
    for _ in range(20):  # who does that in every pass is compared by value
        parts[1][0].eps = float("1e-05")
        assert modules.are_same(parts)
    assert modules._guard is None


def test_values_that_cannot_be_compared_are_others():
    parts = make_parts()
    parts[0].seen = torch.zeros(2)
    modules = plans.Modules(parts)
    assert modules.are_same(parts)
    parts[0].seen = torch.zeros(2)
    assert not modules.are_same(parts)


def test_other_parts_are_others():
    parts = make_parts()
    modules = plans.Modules(parts)
    assert not modules.are_same(parts[:1])
    assert not modules.are_same([*parts, nn.ReLU()])
    assert not modules.are_same(parts[::-1])


def test_a_guard_keeps_what_it_knows_no_longer_than_itself():
    parts = make_parts()
    module = weakref.ref(parts[0])
    modules = plans.Modules(parts)
    number = modules._guard._number
    del parts, modules
    gc.collect()
    assert module() is None
    torch.ops.fused_resnet.free_module_guard(number)  # which has been freed: nothing to do
    with pytest.raises(ValueError, match="make_module_guard: 0 functions"):
        torch.ops.fused_resnet.make_module_guard([], [], [], [], [])
