"""Plans of the native calls that a forward pass on the CPU came down to.

Where kernels take milliseconds, going through modules and looking at each weight's copy takes a
share that can be felt. `csrc/cpu/inference_plan.cpp` keeps each call as it was prepared, and
compares copies with their weights, as the calls do, before it runs them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from ...layers.prepared import version_of
from .. import recording

_operators = torch.ops.fused_resnet
# They add themselves to the recording of their thread.
_RECORDED = frozenset(
    {
        _operators.conv_bn_act_packed.default,
        _operators.residual_blocks_packed.default,
        _operators.quantized_copies_match.default,
        _operators.quantized_residual_blocks_packed.default,
        _operators.quantized_pool_linear.default,
        _operators.quantized_stem_packed.default,
        _operators.pool_linear.default,
        _operators.squeeze_excitation.default,
    }
)
_VIEWS = frozenset({torch.ops.aten.alias.default, torch.ops.aten.detach.default})
_run = _operators.run_cpu_plan.default._op
_base: Any = torch._C.TensorBase
_identity = _base._cdata.__get__
_storage = _base.untyped_storage
_version = _base._version.__get__

# The plans that have copies of a weight, by the weight's identity.
_of_weights: dict[int, weakref.WeakSet[Plan]] = {}


class Recorder(recording.Recorder):
    """Lets native calls write themselves down, and sees what else is called."""

    def __init__(self, input: Tensor, parameters: Sequence[Tensor]) -> None:
        super().__init__(input, parameters)
        # From before the pass: another thread may write to a weight while it is being copied.
        self._versions = [*map(version_of, parameters)]
        if any(p.device.type != "cpu" or p.layout is not torch.strided for p in parameters):
            self._obstacle = "a parameter is not an ordinary tensor on the CPU"

    def __enter__(self) -> Any:
        """Sees calls from here on."""
        _operators.begin_cpu_plan()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Sees no more."""
        super().__exit__(*error)
        if error[0] is not None:
            _operators.discard_cpu_plan()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, and keeps in mind whether it takes part in plans."""
        takes_part = func in _RECORDED or func in _VIEWS or recording.only_frees(func)
        if not takes_part and self._obstacle is None:
            self._obstacle = f"it calls {func}"
        return func(*args, **(kwargs or {}))

    def plan(self, output: Tensor) -> Plan | str:
        """See `recording.Recorder.plan`."""
        if self._obstacle is not None:
            _operators.discard_cpu_plan()
            return self._obstacle
        parameters = self._parameters
        with torch.no_grad():
            found = _operators.end_cpu_plan(
                self._input,
                output,
                parameters,
                [*map(id, parameters)],
                [*map(id, map(type, parameters))],
                [*map(_identity, parameters)],
            )
        if not found:
            return "it reads more than its input and parameters, or its calls are no chain"
        number, *copied = found
        versions = [self._versions[index] for index in copied]
        plan = Plan(number, parameters, [parameters[index] for index in copied], versions)
        if None in versions:
            plan.drop()
            return "a weight was made in inference mode, so that its changes are not counted"
        return plan


class Plan(recording.Plan):
    """The calls, and whose memory they read.

    Args:
        number: the native plan's.
        parameters: all that it may read.
        weights: those of which it has copies.
        versions: of these, when they were copied.
    """

    def __init__(
        self,
        number: int,
        parameters: Sequence[Tensor],
        weights: Sequence[Tensor],
        versions: Sequence[int | None],
    ) -> None:
        self._free = weakref.finalize(self, _free, number, [*map(id, weights)])
        self._number = number
        self._parameters = list(parameters)  # whose addresses the native plan has
        self._weights = list(weights)
        self._versions = list(versions)
        # Their Python objects live as long as the memory does.
        self._storages = [weakref.ref(weight.untyped_storage()) for weight in weights]
        for weight in weights:
            _of_weights.setdefault(id(weight), weakref.WeakSet()).add(self)

    def run(self, input: Tensor) -> Tensor | None:
        """See `recording.Plan.run`."""
        if [*map(_version, self._weights)] != self._versions or not all(
            map(is_, [ref() for ref in self._storages], map(_storage, self._weights))
        ):
            return None
        return _run(self._number, input)

    def drop(self) -> None:
        """Gives back its copies; it does not run again."""
        self._free()


def _free(number: int, weights: Iterable[int]) -> None:
    _operators.free_cpu_plan.default(number)
    for weight in weights:
        if not _of_weights.get(weight, True):
            _of_weights.pop(weight, None)


def release(tensors: Iterable[Tensor]) -> None:
    """Drops the plans that have copies of these weights."""
    if _of_weights:
        for tensor in tensors:
            for plan in list(_of_weights.pop(id(tensor), ())):
                plan.drop()


def clear() -> None:
    """Drops all plans."""
    while _of_weights:
        _, plans = _of_weights.popitem()
        for plan in list(plans):
            plan.drop()
