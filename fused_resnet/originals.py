"""The classes and functions of torch and torchvision that fused passes stand for.

Toolkits for quantisation, profiling or pruning put others in their place: a class in `torch.nn`, a
method of a class, a function in `torch.nn.functional`. What has been replaced has to run, so a
module is known by the class that torch itself defined, whatever `torch.nn` now has under its name,
and `replaced` says whether a method or a function is no longer torch's own.
"""

from __future__ import annotations

import sys
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import activation, batchnorm, container, conv, linear, pooling
from torchvision.ops import misc

_Module = TypeVar("_Module", bound=nn.Module)


def _defined(cls: type[_Module], module: Any, name: str) -> type[_Module]:
    """The class that `module` defined as `name`, even if `cls`, derived from it, replaces it."""
    for base in cls.__mro__:
        if (base.__module__, base.__name__) == (module.__name__, name):
            return base
    nobody: Any = type(name, (nn.Module,), {})  # which no module is of
    return nobody


Conv2d = _defined(conv.Conv2d, conv, "Conv2d")
BatchNorm2d = _defined(batchnorm.BatchNorm2d, batchnorm, "BatchNorm2d")
SyncBatchNorm = _defined(batchnorm.SyncBatchNorm, batchnorm, "SyncBatchNorm")
FrozenBatchNorm2d = _defined(misc.FrozenBatchNorm2d, misc, "FrozenBatchNorm2d")
ReLU = _defined(activation.ReLU, activation, "ReLU")
ReLU6 = _defined(activation.ReLU6, activation, "ReLU6")
Hardtanh = _defined(activation.Hardtanh, activation, "Hardtanh")
LeakyReLU = _defined(activation.LeakyReLU, activation, "LeakyReLU")
SiLU = _defined(activation.SiLU, activation, "SiLU")
Hardswish = _defined(activation.Hardswish, activation, "Hardswish")
GELU = _defined(activation.GELU, activation, "GELU")
MaxPool2d = _defined(pooling.MaxPool2d, pooling, "MaxPool2d")
Sequential = _defined(container.Sequential, container, "Sequential")
AdaptiveAvgPool2d = _defined(pooling.AdaptiveAvgPool2d, pooling, "AdaptiveAvgPool2d")
Linear = _defined(linear.Linear, linear, "Linear")
Sigmoid = _defined(activation.Sigmoid, activation, "Sigmoid")
Hardsigmoid = _defined(activation.Hardsigmoid, activation, "Hardsigmoid")
Identity = _defined(linear.Identity, linear, "Identity")

AnyNorm: TypeAlias = nn.BatchNorm2d | misc.FrozenBatchNorm2d
"""A norm that convolutions can have behind them."""


def applies_in_order(cls: type[nn.Module]) -> bool:
    """Whether a class is `nn.Sequential`, or derives from it and calls its children as it does."""
    return cls is Sequential or (
        issubclass(cls, Sequential)
        and cls.forward is Sequential.forward
        and cls.__iter__ is Sequential.__iter__
        and cls.__call__ is nn.Module.__call__
    )


_WHERE: tuple[tuple[Any, str], ...] = (
    (Conv2d, "forward"),
    (Conv2d, "_conv_forward"),
    (BatchNorm2d, "forward"),
    (SyncBatchNorm, "forward"),
    (FrozenBatchNorm2d, "forward"),
    (ReLU, "forward"),
    (MaxPool2d, "forward"),
    (Sequential, "forward"),
    (F, "conv2d"),
    (F, "batch_norm"),
    (F, "relu"),
    (F, "max_pool2d"),
)


def _now() -> tuple[Any, ...]:
    """What is in each of these places; written out, since every forward pass asks."""
    return (
        Conv2d.forward,
        Conv2d._conv_forward,
        BatchNorm2d.forward,
        SyncBatchNorm.forward,
        FrozenBatchNorm2d.forward,
        ReLU.forward,
        MaxPool2d.forward,
        Sequential.forward,
        F.conv2d,
        F.batch_norm,
        F.relu,
        F.max_pool2d,
    )


_WHERE_IN_HEADS: tuple[tuple[Any, str], ...] = (
    (AdaptiveAvgPool2d, "forward"),
    (Linear, "forward"),
    (F, "adaptive_avg_pool2d"),
    (F, "linear"),
)


def _now_in_heads() -> tuple[Any, ...]:
    return (AdaptiveAvgPool2d.forward, Linear.forward, F.adaptive_avg_pool2d, F.linear)


_WHERE_OF_ACTIVATIONS: tuple[tuple[Any, str], ...] = (
    (Hardtanh, "forward"),
    (ReLU6, "forward"),
    (LeakyReLU, "forward"),
    (SiLU, "forward"),
    (Hardswish, "forward"),
    (GELU, "forward"),
    (F, "hardtanh"),
    (F, "leaky_relu"),
    (F, "silu"),
    (F, "hardswish"),
    (F, "gelu"),
)


def _now_of_activations() -> tuple[Any, ...]:
    return (
        Hardtanh.forward,
        ReLU6.forward,
        LeakyReLU.forward,
        SiLU.forward,
        Hardswish.forward,
        GELU.forward,
        F.hardtanh,
        F.leaky_relu,
        F.silu,
        F.hardswish,
        F.gelu,
    )


_WHERE_IN_GATES: tuple[tuple[Any, str], ...] = (
    (Sigmoid, "forward"),
    (Hardsigmoid, "forward"),
    (AdaptiveAvgPool2d, "forward"),
    (F, "hardsigmoid"),
    (F, "adaptive_avg_pool2d"),
)


def _now_in_gates() -> tuple[Any, ...]:
    return (
        Sigmoid.forward,
        Hardsigmoid.forward,
        AdaptiveAvgPool2d.forward,
        F.hardsigmoid,
        F.adaptive_avg_pool2d,
    )


_known: tuple[Any, ...] = ()
_known_in_heads: tuple[Any, ...] = ()
_known_of_activations: tuple[Any, ...] = ()
_known_in_gates: tuple[Any, ...] = ()


def replaced() -> str | None:
    """Which method or function is not torch's own at the moment, or None."""
    global _known
    now = _now()
    if now == _known:
        return None
    which = _which(_WHERE, now)
    if which is None:
        _known = now
    return which


def replaced_in_heads() -> str | None:
    """`replaced`, of what a network's head runs."""
    global _known_in_heads
    now = _now_in_heads()
    if now == _known_in_heads:
        return None
    which = _which(_WHERE_IN_HEADS, now)
    if which is None:
        _known_in_heads = now
    return which


def replaced_activation() -> str | None:
    """`replaced`, of the activations that are no ReLU."""
    global _known_of_activations
    now = _now_of_activations()
    if now == _known_of_activations:
        return None
    which = _which(_WHERE_OF_ACTIVATIONS, now)
    if which is None:
        _known_of_activations = now
    return which


def replaced_in_gates() -> str | None:
    """`replaced`, of what squeezes and excites."""
    global _known_in_gates
    now = _now_in_gates()
    if now == _known_in_gates:
        return None
    which = _which(_WHERE_IN_GATES, now)
    if which is None:
        _known_in_gates = now
    return which


# Compilers take the answer as it is when they trace, as they take the functions themselves.
replaced._dynamo_marked_constant = True  # type: ignore[attr-defined]
replaced_in_heads._dynamo_marked_constant = True  # type: ignore[attr-defined]
replaced_in_gates._dynamo_marked_constant = True  # type: ignore[attr-defined]
replaced_activation._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _which(where: tuple[tuple[Any, str], ...], now: tuple[Any, ...]) -> str | None:
    for (owner, name), function in zip(where, now, strict=True):
        if not is_own(owner, name, function):
            return f"{owner.__name__}.{name}"
    return None


def is_own(owner: Any, name: str, function: Any) -> bool:
    """Whether a function is the one that the file of `owner`, a class or module, defines.

    By the file its code is from: at import it may be replaced already, and later be put back.
    """
    if type(function) is BuiltinFunctionType:
        return function.__name__ == name
    if type(function) is not FunctionType:
        return False
    file = function.__code__.co_filename
    if owner is F and name == "max_pool2d":
        # What chooses between returning indices and not is made elsewhere.
        return file == torch._jit_internal.boolean_dispatch.__code__.co_filename
    if not isinstance(owner, type):
        return file == owner.__file__
    definers = [base for base in owner.__mro__ if name in vars(base)]
    module = sys.modules.get(definers[0].__module__)
    return file == getattr(module, "__file__", None) and definers[0].__module__ != "__main__"
