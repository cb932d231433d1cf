"""How the operators are registered and called.

An operator's kernels are plain Python functions put into the dispatcher by `Library.impl`. A call
through it costs some 10 microseconds, which 53 convolutions a forward pass would feel, so the
functions in `ops/` go around it where nothing in it has a say (`nothing_intercepts`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.autograd import forward_ad
from torch.nn import Parameter

from .. import backends, reference

library = torch.library.Library("fused_resnet", "FRAGMENT")

_VMAP_MODE = torch._C._dispatch_key_parse("VmapMode")
_in_batched_gradients = torch._C._dispatch_tls_is_dispatch_key_included

_PLAIN_TYPES = frozenset({Tensor, Parameter, type(None)})
_TRACING_TYPES = (Tensor, Parameter, type(None), FakeTensor, FunctionalTensor)


def is_exporting() -> bool:
    """`torch.compiler.is_exporting()`, which to the compiler of torch 2.11 is always True.

    What it returns elsewhere, and in graphs of later versions, is this flag.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def nothing_intercepts(*tensors: Tensor | None) -> bool:
    """Whether the dispatcher would do no more than call autograd and the kernel."""
    return not torch._C._is_any_autocast_enabled() and is_plain(*tensors)


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors and nothing watches what is done with them."""
    return (
        not torch.compiler.is_compiling()
        and (not torch._C._len_torch_dispatch_stack() or backends.only_recorded())
        and not _in_batched_gradients(_VMAP_MODE)
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN_TYPES.issuperset(map(type, tensors))
    )


def gradients_batched() -> bool:
    """Whether a backward pass is for several cotangents at once, so that kernels cannot run it.

    `torch.autograd.grad(..., is_grads_batched=True)` and vectorised Jacobians have a vmap of their
    own, which no other function tells of.
    """
    return _in_batched_gradients(_VMAP_MODE) or torch._C._are_functorch_transforms_active()


def transforms_active() -> bool:
    """Whether a functorch transform or forward-mode differentiation is under way.

    The kernels have no rule for either; the reference consists of operators that do. An operator
    below the transforms' own dispatch is called with plain tensors again, and none is active.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def has_foreign(*tensors: Tensor | None) -> bool:
    """Whether a tensor's class (`DTensor`, quantised weights) knows only torch's own operators.

    Such a call goes to the reference, which consists of them.
    """
    return any(type(tensor) not in _TRACING_TYPES for tensor in tensors)


def needs_grad(*arguments: Any) -> bool:
    """Whether autograd has to record a call with these arguments."""
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


class Operator:
    """The way to an operator from Python: around the dispatcher where nothing in it has a say.

    Args:
        name: of the operator, and of the reference's function, which runs what knows only torch's
            own operators.
        tensors: which of its arguments are tensors, or None in a tensor's place.
        kernel: what it runs, below autograd.
        apply: of the autograd function that records it.
    """

    def __init__(
        self,
        name: str,
        tensors: Sequence[int],
        kernel: Callable[..., Any],
        apply: Callable[..., Any],
    ) -> None:
        self._tensors = tuple(tensors)
        self._kernel, self._apply = kernel, apply
        self._operator = getattr(torch.ops.fused_resnet, name).default
        self._reference = getattr(reference, name)

    @staticmethod
    def is_direct(*tensors: Tensor | None) -> bool:
        """Whether a call with these is one of the backend's method and nothing else."""
        return nothing_intercepts(*tensors) and not needs_grad(*tensors)

    def __call__(self, *arguments: Any) -> Any:
        """Its result; the arguments are those of the schema, in order and all of them."""
        tensors = [arguments[index] for index in self._tensors]
        if not nothing_intercepts(*tensors):
            if has_foreign(*tensors):
                return self._reference(*arguments)
            return self._operator(*arguments)
        if needs_grad(*tensors):
            return self._apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return self._kernel(*arguments)


def register_kernel(
    name: str, kernel: Callable[..., Any], check: Callable[..., Exception | None]
) -> None:
    """Makes `kernel` what the operator runs, with arguments that `check` finds nothing wrong with.

    See `operator_checks.py`: who comes through the dispatcher may have checked nothing.
    """
    library.impl(name, _checked(kernel, check), "CompositeExplicitAutograd")


def _checked(
    function: Callable[..., Any], check: Callable[..., Exception | None]
) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        error = check(*arguments)
        if error is not None:
            raise error
        return function(*arguments)

    return run


def register_fake(
    name: str, check: Callable[..., Exception | None]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes the decorated function what the operator's output is like, for fake tensors.

    Of shapes that are symbols `check` would make guards, so it sees only arguments without any.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(fake)

        @functools.wraps(fake)
        def run(*arguments: Any, **keywords: Any) -> Any:
            if keywords:
                arguments = signature.bind(*arguments, **keywords).args
            if not _has_symbols(arguments):
                error = check(*arguments)
                if error is not None:
                    raise error
            return fake(*arguments)

        torch.library.register_fake(f"fused_resnet::{name}", run, lib=library)
        return fake

    return register


def _has_symbols(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not all(type(size) is int for size in value.shape)
    if isinstance(value, (list, tuple)):
        return any(map(_has_symbols, value))
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def register_autograd(
    name: str, apply: Callable[..., Any], check: Callable[..., Exception | None]
) -> None:
    """Makes `apply`, of an autograd function whose arguments are the operator's, its derivative.

    Transforms differentiate the reference.

    It is applied to arguments that `check` finds nothing wrong with, as the kernel is.
    `torch.library.register_autograd` does the same at five times the cost of a call.
    """
    operator = getattr(torch.ops.fused_resnet, name).default
    apply = _checked(apply, check)
    composite = _checked(getattr(reference, name), check)

    def autograd(*arguments: Any) -> Any:
        if transforms_active():
            return composite(*arguments)
        if needs_grad(*arguments):
            return apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    library.impl(name, autograd, "Autograd")


def register_autocast(
    name: str,
    cast: Callable[[torch.dtype, str, tuple[Any, ...]], tuple[Any, ...] | None],
    otherwise: Callable[..., Any] | None = None,
) -> None:
    """Makes `cast(dtype, device_type, arguments)` prepare the arguments under autocast.

    Where it returns None, `otherwise`, still under autocast, takes the place of the operator.
    """
    operator = getattr(torch.ops.fused_resnet, name).default
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def autocast(*arguments: Any, device_type: str = device_type, keys: Any = keys) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            prepared = cast(dtype, device_type, arguments)
            if prepared is None:
                assert otherwise is not None
                return otherwise(*arguments)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return operator(*prepared)

        library.impl(name, autocast, key)


def register_in_graphs(name: str, kernel: Callable[..., Any]) -> None:
    """Lets compilers see what an operator calls where `backends.in_graphs(input)` says so.

    AOT autograd functionalizes what it traces; there the call is replaced by `kernel(*arguments)`,
    as `torch.library.triton_op` replaces itself. `torch.export` keeps the operator.
    """

    def rule(
        mode: Any,
        operator: Any,
        types: Any,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
    ) -> Any:
        # Here, since it imports half of torch.
        from torch.export._trace import custom_triton_ops_decomposition_disabled

        if (
            keywords
            or custom_triton_ops_decomposition_disabled()
            or not all(t in _TRACING_TYPES for t in types)
            or not backends.in_graphs(arguments[0])
        ):
            return mode.__torch_dispatch__(operator, types, arguments, keywords)
        with mode:
            return kernel(*arguments)

    torch.library.register_torch_dispatch(
        f"fused_resnet::{name}", FunctionalTensorMode, rule, lib=library
    )


@overload
def autocast_tensor(tensor: Tensor, dtype: torch.dtype, device_type: str) -> Tensor: ...


@overload
def autocast_tensor(
    tensor: Tensor | None, dtype: torch.dtype, device_type: str
) -> Tensor | None: ...


def autocast_tensor(tensor: Tensor | None, dtype: torch.dtype, device_type: str) -> Tensor | None:
    """`tensor` as autocast hands it to `conv2d`: not cast if float64 or on another device."""
    if (
        tensor is None
        or not tensor.is_floating_point()
        or tensor.dtype is torch.float64
        or tensor.device.type != device_type
    ):
        return tensor
    return tensor.to(dtype)


def autocast_residual(
    index: int,
) -> Callable[[torch.dtype, str, tuple[Any, ...]], tuple[Any, ...]]:
    """The preparation of an operator that, like `batch_norm`, computes in its input's dtype.

    `index` is the residual's, which an in-place add would bring to the input's dtype too.
    """

    def cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        input, residual = arguments[0], arguments[index]
        if residual is None or residual.dtype is input.dtype:
            return arguments
        return *arguments[:index], residual.to(input.dtype), *arguments[index + 1 :]

    return cast
