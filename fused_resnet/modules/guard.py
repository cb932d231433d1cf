"""Whether modules are the very objects that they were, in a few microseconds.

`csrc/state_guard.cpp` walks through their dictionaries and compares addresses. What differs in
identity may still be equal, which is for `plans.Modules` to find out.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import _native

# In the order of csrc/state_guard.cpp.
_NEEDED = ("PyObject_Type", "PyObject_GenericGetDict", "Py_DecRef", "PyDict_Next", "PyDict_Size")
_DICTS = ("_parameters", "_buffers", "_modules")


def _functions() -> list[int]:
    """Addresses of what it needs of CPython; none where that is not to be had."""
    try:
        found = [getattr(ctypes.pythonapi, name) for name in _NEEDED]
    except AttributeError:
        return []
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found]


_FUNCTIONS = _functions()
# With the interpreter's lock held, unlike an operator.
_are_same = ctypes.PyDLL(str(Path(_native.__file__).parent / "_C.abi3.so"))[
    "fused_resnet_modules_are_same"
]
_are_same.argtypes, _are_same.restype = (ctypes.c_int64,), ctypes.c_int


class Guard:
    """Modules at this moment.

    Args:
        modules: of ordinary classes, with dictionaries.
        hooks: names of dictionaries that are empty and have to stay so.
    """

    def __init__(self, modules: Sequence[nn.Module], hooks: Sequence[str]) -> None:
        states = [*map(vars, modules)]
        dicts = states + [state[name] for state in states for name in _DICTS]
        empty = [state[name] for state in states for name in hooks]
        # Addresses mean something as long as these live.
        self._alive = (list(modules), [*map(type, modules)], dicts, [*map(dict, dicts)], empty)
        entries = [id(one) for copy in self._alive[3] for pair in copy.items() for one in pair]
        self._number = torch.ops.fused_resnet.make_module_guard.default(
            _FUNCTIONS,
            [
                id(one)
                for m, state in zip(modules, states, strict=True)
                for one in (m, type(m), state)
            ],
            [
                number
                for copy, own in zip(self._alive[3], dicts, strict=True)
                for number in (id(own), len(copy))
            ],
            entries,
            [*map(id, empty)],
        )
        weakref.finalize(self, torch.ops.fused_resnet.free_module_guard.default, self._number)

    def holds(self) -> bool:
        """Whether nothing has been replaced, added or removed."""
        return bool(_are_same(self._number))


def guard_of(modules: Sequence[nn.Module], hooks: Sequence[str]) -> Guard | None:
    """A guard, or None where these modules, or this Python, have no way to one."""
    states = [*map(vars, modules)]
    plain = all(isinstance(state.get(name), dict) for state in states for name in (*_DICTS, *hooks))
    if not _FUNCTIONS or not plain or any(state[name] for state in states for name in hooks):
        return None
    return Guard(modules, hooks)
