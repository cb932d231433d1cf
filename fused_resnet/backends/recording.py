"""What a backend writes down of a forward pass, to run it again in one call: a plan.

`modules/plans.py` decides when, and when a plan is still what the modules would do.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Plan(abc.ABC):
    """A forward pass, for inputs like the one it was made with."""

    def can_run(self) -> bool:
        """Whether it may be used at this moment; where not, it stays what later passes use."""
        return True

    @abc.abstractmethod
    def run(self, input: Tensor) -> Tensor | None:
        """What the pass returned, of this input and of the parameters as they are now.

        None where input or parameters are not like those that it was made with.
        """


def only_frees(func: Any) -> bool:
    """Whether an operator gives back what nobody has any more: garbage is found in a pass, too."""
    return str(func).startswith("fused_resnet.free_")


class Recorder(TorchDispatchMode):
    """Active around a pass, sees each operator of torch's that it calls.

    It changes nothing, so nothing in the pass goes another way because of it: see
    `ops.registration.is_plain`.

    Args:
        input: of the pass.
        parameters: everything else that the pass may read, each once.
    """

    def __init__(self, input: Tensor, parameters: Sequence[Tensor]) -> None:
        super().__init__()
        self._input, self._parameters = input, list(parameters)
        self._obstacle: str | None = None  # why there can be no plan

    def add_rows(self, weight: Tensor, rows: Tensor) -> None:
        """Takes note of what the pass reads instead of a weight: see `arranged.py`."""

    @abc.abstractmethod
    def plan(self, output: Tensor) -> Plan | str:
        """A plan of what was seen, whose result was `output`; or why there can be none."""


def only_recorded() -> bool:
    """Whether the one dispatch mode that is active is a `Recorder`."""
    return active() is not None


def active() -> Recorder | None:
    """The `Recorder` that is the one dispatch mode that is active, if it is."""
    if torch._C._len_torch_dispatch_stack() != 1:
        return None
    mode = torch._C._get_dispatch_stack_at(0)
    return mode if isinstance(mode, Recorder) else None


def address_of(tensors: Sequence[Tensor]) -> dict[int, int | None]:
    """Where each tensor begins, mapped to its index, or to None where several begin there."""
    found: dict[int, int | None] = {}
    for index, tensor in enumerate(tensors):
        at = tensor.data_ptr()
        found[at] = None if at in found else index
    return found
