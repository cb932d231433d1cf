"""Writes to weights that torch does not see: how closely the backends look for them.

A backend that keeps a copy of a weight in another layout knows by the storage and its version that
the weight is still the one it copied. `weight.data[...] = `, NumPy and other processes write
without a new version. By default each call compares a sample of the values, of what is watched it
compares all.
"""

from __future__ import annotations

import os
import sys
import weakref

from torch import Tensor, nn

VARIABLE = "FUSED_RESNET_WATCH"
CHOICES = ("sample", "full")

# None until the first use, so that a bad value does not break `import` and `doctor`.
_from_environment: str | None = None
_watched: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def checked(value: str, argument: str) -> str:
    """One of `CHOICES`, from any case.

    Raises:
        ValueError: it is none of them.
    """
    choice = value.lower() if isinstance(value, str) else value
    if choice not in CHOICES:
        raise ValueError(f"{argument} is {value!r}, must be one of {', '.join(CHOICES)}")
    return choice


def from_environment() -> str:
    """FUSED_RESNET_WATCH as it was at the first use; "sample" where it is not set.

    Raises:
        ValueError: it is none of `CHOICES`.
    """
    global _from_environment
    if _from_environment is None:
        _from_environment = checked(os.environ.get(VARIABLE) or CHOICES[0], VARIABLE)
    return _from_environment


def described() -> str:
    """What `doctor` says of it."""
    try:
        choice = from_environment()
    except ValueError as error:
        return str(error)
    if choice == "full":
        return "full: every call compares all values of every weight with the packed copy"
    return "sample: every call compares 70 values of each weight with the packed copy"


def set_watch(module: nn.Module, choice: str) -> bool:
    """Sets how closely the weights of one module are looked at, its children's included.

    Returns:
        Whether that is another choice than before.
    """
    before = vars(module).pop("watch", CHOICES[0])
    _watched.discard(module)
    if choice == "full":
        module.watch = choice  # type: ignore[assignment]  # stubs: attributes are tensors, modules
        _watched.add(module)
    return choice != before


def remember(module: nn.Module) -> None:
    """Watches a copied or unpickled module as the one it was made from."""
    if vars(module).get("watch") == "full":
        _watched.add(module)


def is_watched(weight: Tensor) -> bool:
    """Whether all of a weight is to be compared in every call."""
    if from_environment() == "full" or _is_gathered(weight):
        return True
    return any(weight is tensor for module in list(_watched) for tensor in _tensors(module))


def _is_gathered(weight: Tensor) -> bool:
    """Whether FSDP puts a weight together from shards: under one version, whatever its values."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    from torch.distributed._composable_state import _module_state_mapping

    for reference in list(_module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        for group in [getattr(state, "_fsdp_param_group", None)] if groups is None else groups:
            for parameter in getattr(group, "fsdp_params", ()):
                if getattr(parameter, "_unsharded_param", None) is weight:
                    return True
    return False


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
