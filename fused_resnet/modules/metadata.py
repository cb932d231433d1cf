"""Inputs of classes that carry something beside their values, and compute as tensors do.

Of torchvision's `tv_tensors`, MONAI's `MetaTensor` and fastai's `TensorBase`, `__torch_function__`
runs a function on the values and decides of which class, and with which metadata, the result is. To
it a fused module is such a function: the module runs on the values as a plain tensor, and the class
makes of its output what it makes of any. Without an override of its own a class does as `Tensor`'s
default says. Others may do more, count or log or compute, and see torch's operators one by one.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from . import read

_Class = TypeVar("_Class", bound=type)

# Classes whose `__torch_function__` is known, as they name themselves.
_KNOWN = frozenset(
    {
        ("torchvision.tv_tensors._tv_tensor", "TVTensor"),
        ("monai.data.meta_tensor", "MetaTensor"),
        ("fastai.torch_core", "TensorBase"),
    }
)
_registered: weakref.WeakSet[type] = weakref.WeakSet()
# Whose modules hand on what they are given, and look at nothing but its values.
_PLAIN_PACKAGES = frozenset({"torch", "torchvision", "timm", __name__.partition(".")[0]})


def carries_metadata(cls: _Class) -> _Class:
    """Says of a subclass of `Tensor` that its `__torch_function__` only carries metadata along.

    Fused modules then run on its values, and call its `__torch_function__` once, with themselves as
    the function, rather than for each of torch's functions. Of torchvision's `tv_tensors`, MONAI's
    `MetaTensor`, fastai's `TensorBase`, what derives from them, and classes without an override of
    their own this is known.

    Args:
        cls: the class. It may be used as a decorator.

    Returns:
        `cls`.

    Raises:
        TypeError: it is no subclass of `Tensor`.
    """
    if not (isinstance(cls, type) and issubclass(cls, Tensor)):
        raise TypeError(f"carries_metadata: {cls!r} is no subclass of torch.Tensor")
    _registered.add(cls)
    _is_carrier.cache_clear()
    return cls


@functools.lru_cache(maxsize=256)
def _is_carrier(cls: type[Any]) -> bool:
    if not issubclass(cls, Tensor) or cls in (Tensor, nn.Parameter):
        return False
    if cls.__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return False
    definer = next(base for base in cls.__mro__ if "__torch_function__" in vars(base))
    if definer is Tensor or (definer.__module__, definer.__name__) in _KNOWN:
        return True
    return any(base in _registered and issubclass(base, definer) for base in cls.__mro__)


def run_on_values(module: nn.Module, x: Any, method: str) -> Any:
    """What a module's `method` returns of such an input, computed from its values.

    None where the input is nothing of the kind, or something inside the module would see it.
    """
    cls: Any = type(x)
    if torch.compiler.is_compiling() or not _is_carrier(cls):
        return None
    _, *inside = module.modules()
    if (
        read.input_obstacle(_values(x)) is not None
        or read.obstacle(module) is not None
        or not all(map(_looks_at_values, inside))
    ):
        return None

    def fused(values: Tensor) -> Tensor:
        return getattr(module, method)(_values(values))

    return cls.__torch_function__(fused, (cls,), (x,), {})


def _values(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return x.as_subclass(Tensor)


def _looks_at_values(module: nn.Module) -> bool:
    package = type(module).__module__.partition(".")[0]
    return package in _PLAIN_PACKAGES and read.calls_forward_alone(module)
