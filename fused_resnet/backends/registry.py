"""The choice between the backends: who runs where."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from .backend import Backend

_registered: dict[str, Backend] = {}

_chosen: ContextVar[str | None] = ContextVar("fused_resnet_backend", default=None)
# None until the first use, so that a bad FUSED_RESNET_BACKEND does not break `import` and `doctor`.
_from_environment: str | None = None


def register(backend: Backend) -> None:
    """Makes `use_backend`, FUSED_RESNET_BACKEND and `available` know a backend.

    Args:
        backend: of a name that no other has. Where several are the default of a device, the first
            that was registered runs it.

    Raises:
        ValueError: there is one of this name.
    """
    if backend.name in _registered:
        raise ValueError(f"register: there is a backend {backend.name!r} already")
    _registered[backend.name] = backend


def named(name: str) -> Backend:
    """The backend of this name, a key of `available()`."""
    return _registered[name]


def available() -> dict[str, str]:
    """Every backend's name, mapped to "yes" or the reason why it cannot run here."""
    return {name: backend.available() for name, backend in _registered.items()}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes one backend run every operator it has a kernel for, in this thread or task.

    What it cannot run (tensors of another device) runs as the reference does.

    Args:
        name: a key of `available()`.

    Raises:
        ValueError: the name is unknown, or that backend cannot run here.
    """
    token = _chosen.set(_checked(name, "use_backend: name"))
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen() -> str | None:
    """The backend that `use_backend` has chosen here, if any, for `as_chosen`."""
    return _chosen.get()


@contextlib.contextmanager
def as_chosen(name: str | None) -> Iterator[None]:
    """Chooses in backward what `chosen()` was in forward, which may have been another thread."""
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def choose(device_type: str) -> Backend:
    """The backend that runs operators on tensors of a device type ("cpu", "cuda", ...)."""
    name = _chosen.get()
    if name is None:
        name = _environment_choice()
        if name == "":
            return _default(device_type)
    backend = _registered[name]
    return backend if backend.device_type in (device_type, None) else _registered["reference"]


@torch._dynamo.assume_constant_result
def hold_blocks_in_graphs(device_type: str) -> bool:
    """Whether a graph of operators should hold whole blocks, not their convolutions.

    A compiler takes the answer for a constant: an operator chooses anew whenever it runs.
    """
    return choose(device_type).hold_blocks_in_graphs


def in_graphs(input: Tensor) -> bool:
    """Whether a compiler's graph should hold the kernels `input` leads to, not the operator."""
    return choose(input.device.type).in_graphs(input)


def has_kernel(
    device_type: str, dtype: torch.dtype, weight_shape: Sequence[int], groups: int
) -> bool:
    """Whether a convolution without a norm of its own is better run by our operators.

    That is where the backend has a kernel that does what comes before and behind it for nothing.
    """
    # Answers are cached, where Dynamo will not follow; in its graphs the operator is right anyway.
    if torch.compiler.is_compiling():
        return _has_kernels(device_type)
    return choose(device_type).has_kernel(dtype, weight_shape, groups)


@torch._dynamo.assume_constant_result
def _has_kernels(device_type: str) -> bool:
    """For a compiler's graphs, see `hold_blocks_in_graphs`; older ones cannot read our choice."""
    return type(choose(device_type)).has_kernel is not Backend.has_kernel


def explain(
    operator: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weight_shape: Sequence[int] = (),
    input_shape: Sequence[int] = (),
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> str:
    """Which kernels would run an operator: "cpu: library convolution + scale_shift_act".

    Args:
        operator: the operator's name.
        device: where its tensors are.
        dtype: of its input.
        weight_shape: (K, C / groups, R, S) of a convolution.
        input_shape: (N, C, H, W); where it is not given and makes a difference, the answer says
            which.
        stride: of a convolution, as are the rest.
        padding: see `stride`.
        dilation: see `stride`.
        groups: see `stride`.
    """
    return choose(device.type).explain(
        operator,
        device=device,
        dtype=dtype,
        weight_shape=weight_shape,
        input_shape=input_shape,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


def cpu_isa() -> str:
    """The instruction set the CPU's kernels use: what the processor has, or less.

    FUSED_RESNET_CPU_ISA (in any case; docs/environment.md) says how much less.

    Raises:
        ValueError: FUSED_RESNET_CPU_ISA is something else.
    """
    try:
        return torch.ops.fused_resnet.cpu_isa()
    except RuntimeError as error:
        raise ValueError(str(error).partition("\n")[0]) from None


def release(tensors: Iterable[Tensor]) -> None:
    """Tells the backends to drop whatever they cached for these parameters and buffers."""
    tensors = list(tensors)
    for backend in _registered.values():
        backend.release(tensors)


def _checked(name: str, argument: str) -> str:
    if name not in _registered:
        raise ValueError(f"{argument} is {name!r}, must be one of {', '.join(_registered)}")
    status = _registered[name].available()
    if status != "yes":
        raise ValueError(f"{argument} is {name!r}, which cannot run here: {status}")
    return name


def check_environment() -> None:
    """Raises ValueError unless the environment variables read here say something possible."""
    _environment_choice()


def _environment_choice() -> str:
    """FUSED_RESNET_BACKEND as it was at the first use; "" where it is not set.

    Raises:
        ValueError: it names no backend that can run here, or FUSED_RESNET_CPU_ISA no instruction
            set.
    """
    global _from_environment
    if _from_environment is None:
        cpu_isa()
        name = os.environ.get("FUSED_RESNET_BACKEND", "").lower()
        _from_environment = _checked(name, "FUSED_RESNET_BACKEND") if name else ""
    return _from_environment


def _default(device_type: str) -> Backend:
    for backend in _registered.values():
        if backend.is_default(device_type):
            return backend
    return _registered["reference"]
