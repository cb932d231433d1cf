"""Squeeze-and-excitation modules, known by their class's name and children, in one call.

What a class of such a name computes is found out with the block that it is a child of: see
`recipes.py`, whose trials run it by `reference.squeeze_excitation`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import originals
from ..layers.description import SqueezeExcitation
from ..ops.squeeze_excitation import squeeze_excitation
from ..originals import AdaptiveAvgPool2d, Conv2d, Hardsigmoid, Sigmoid
from .activations import text_of
from .read import call_obstacle, obstacle_of_call

# By class: the children that reduce, activate, expand and gate, and one that takes the mean.
_CHILDREN: dict[str, tuple[str, ...]] = {
    "SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation", "avgpool"),
    "SqueezeExcite": ("conv_reduce", "act1", "conv_expand", "gate"),
}
_METHODS = ("forward", "_scale")
_GATES = {Sigmoid: "sigmoid", Hardsigmoid: "hardsigmoid"}


def may_be(module: nn.Module | None) -> bool:
    """Whether a module is of such a class, by its name and children."""
    names = _CHILDREN.get(type(module).__name__)
    return module is not None and names is not None and module._modules.keys() == set(names)


def layers_of(module: nn.Module) -> SqueezeExcitation | None:
    """What a module that `may_be` one is made of, or None where it is to run as it is."""
    if not may_be(module) or originals.replaced_in_gates() is not None:
        return None
    cls = type(module)
    if any(hasattr(cls, m) and not originals.is_own(cls, m, getattr(cls, m)) for m in _METHODS):
        return None
    children: list[Any] = [module._modules[name] for name in _CHILDREN[cls.__name__]]
    reduce, act, expand, gate, *means = children
    activation = text_of(act)
    if (
        any(child is None or call_obstacle(child) is not None for child in (module, *children))
        or activation is None
        or type(gate) not in _GATES
        or not (_is_linear(reduce) and _is_linear(expand))
        or any(type(one) is not AdaptiveAvgPool2d or one.output_size != 1 for one in means)
    ):
        return None
    of_reduce, of_expand = reduce._parameters, expand._parameters
    try:
        weights = of_reduce["weight"], of_reduce["bias"], of_expand["weight"], of_expand["bias"]
    except KeyError:  # the parameters of nn.DataParallel's replicas are plain attributes
        return None
    return SqueezeExcitation(*weights, activation, _GATES[type(gate)])


def _is_linear(conv: Any) -> bool:
    return (
        type(conv) is Conv2d
        and conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding == (0, 0)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def run(x: Tensor, module: nn.Module) -> Tensor:
    """`module(x)`, in one call where module and tensor allow."""
    if (
        not torch.compiler.is_compiling()
        and isinstance(x, Tensor)
        and obstacle_of_call(x) is None
        and (layers := layers_of(module)) is not None
        and (found := squeeze_excitation(x, layers)) is not None
    ):
        return found
    out: Tensor = module(x)
    return out
