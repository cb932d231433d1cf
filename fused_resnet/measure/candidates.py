"""The ways to run one layer, or one Bottleneck, that `bench kernels` puts side by side.

Each takes a layer's tensors (the arguments of `conv_bn_act`, see `cases.Case`; a Bottleneck's, see
`cases.ChainCase`) and returns the call to time, so that what happens once per model, not once per
pass, is outside of it: folding batch norm and prepacking for the libraries' fused operators,
compiling.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, functional
from ..backends import library, triton
from ..backends.triton import eligible
from ..layers.description import ConvNorm, Norm
from ..tuning import architecture, chain, choose
from ..tuning.choice import CHAINED, HOPPER_CHAINS
from ..tuning.problem import ChainProblem, ConvProblem
from . import norms
from .errors import InvalidArgumentError
from .tune import cases

Call = Callable[[], Any]
Prepare = Callable[[tuple[Any, ...], Any], Call]
"""Of a layer's or block's tensors and its problem, of the kind that the candidate is for."""

ONE_KERNEL = "fused, one kernel"


def eager(arguments: tuple[Any, ...], problem: ConvProblem) -> Call:
    """Convolution, batch norm, add, ReLU and pool as torchvision's blocks run them."""
    return lambda: cases.eager_conv(arguments, problem)


def compiled() -> Prepare:
    """The same under `torch.compile`; one program for all tensors of a layer."""
    current: ConvProblem | None = None
    program: Any = None

    def prepare(arguments: tuple[Any, ...], problem: ConvProblem) -> Call:
        nonlocal current, program
        if problem != current:
            # Layers share the code, and with it the limit of recompilations, after which a
            # program would be eager in silence.
            torch._dynamo.reset()
            current, program = problem, torch.compile(cases.eager_conv, dynamic=False)
        return lambda: program(arguments, problem)

    return prepare


def onednn_fused(arguments: tuple[Any, ...], problem: ConvProblem) -> Call:
    """Convolution, bias, add and ReLU as one oneDNN primitive, as Inductor's freezing calls it."""
    input, *_, stride, padding, dilation, groups, residual, activation = arguments
    weight, bias = _folded(arguments)
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, groups, input.shape
    )
    geometry = (padding, stride, dilation, groups)
    if residual is None:
        return lambda: cases.pooled(
            torch.ops.mkldnn._convolution_pointwise(
                input, packed, bias, *geometry, activation, [], ""
            ),
            problem,
        )
    return lambda: torch.ops.mkldnn._convolution_pointwise.binary(
        input, residual, packed, bias, *geometry, "add", 1.0, activation, [], ""
    )


def cudnn_fused(arguments: tuple[Any, ...], problem: ConvProblem) -> Call:
    """Convolution, bias, add and ReLU by cuDNN; may lose NaN (see backends/cudnn.py)."""
    input, *_, stride, padding, dilation, groups, residual, _ = arguments
    weight, bias = _folded(arguments)
    geometry = (bias, stride, padding, dilation, groups)
    if residual is None:
        run = torch.ops.aten.cudnn_convolution_relu
        return lambda: cases.pooled(run(input, weight, *geometry), problem)
    run = torch.ops.aten.cudnn_convolution_add_relu
    return lambda: run(input, weight, residual, 1.0, *geometry)


def fused(backend: str) -> Prepare:
    """This package's operator on one of its backends, on the raw batch-norm parameters.

    On "triton" that is what tuning chose for the layer, which may be another's kernel.
    """

    def prepare(arguments: tuple[Any, ...], problem: ConvProblem) -> Call:
        input = arguments[0]
        leading, (stride, padding, dilation, groups) = arguments[:7], arguments[8:12]
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}

        def call() -> Tensor:
            if problem.pool is None:
                return functional.conv_bn_act(*leading, residual=arguments[12], **geometry)
            size, pool_stride, pool_padding = (problem.pool[at : at + 2] for at in (0, 2, 4))
            return functional.conv_bn_act_max_pool(
                *leading, **geometry, pool_kernel_size=size, pool_stride=pool_stride,
                pool_padding=pool_padding,
            )  # fmt: skip

        return _on_backend(backend, input.device, call)

    return prepare


def eager_block(arguments: tuple[Any, ...], problem: ChainProblem) -> Call:
    """A Bottleneck from its 3x3 to the next one's first 1x1, by operators of their own."""
    return lambda: cases.eager_chain(arguments)


def fused_block(backend: str) -> Prepare:
    """The same, one of this package's convolutions after the other."""

    def run(input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str) -> Tensor:
        *norm, bias, stride, padding, dilation, groups = layer.flat()
        return functional.conv_bn_act(
            input, *norm, bias=bias, stride=stride, padding=padding, dilation=dilation,
            groups=groups, residual=residual, activation=activation,
        )  # fmt: skip

    def prepare(arguments: tuple[Any, ...], problem: ChainProblem) -> Call:
        reduced, x, convolution, expand, project, reduce = arguments

        def call() -> tuple[Tensor, ...]:
            shortcut = x if project is None else run(x, project, None, "none")
            out = run(run(reduced, convolution, None, "relu"), expand, shortcut, "relu")
            return (out,) if reduce is None else (out, run(out, reduce, None, "relu"))

        return _on_backend(backend, reduced.device, call)

    return prepare


def one_kernel(arguments: tuple[Any, ...], problem: ChainProblem) -> Call:
    """The same in one launch, two where the next block's convolution is better left out.

    With the tile that tuning chose; where it chose convolutions, with the likeliest tile.
    """
    device = arguments[0].device
    if device.type != "cuda" and not eligible.interpreted():
        raise NotImplementedError("runs on a GPU only")
    choice = choose(problem, device)
    if choice.kernel not in CHAINED + HOPPER_CHAINS:
        gpu = architecture.of_device(device)
        chains = [one for one in chain.candidates(problem, gpu) if one.kernel in CHAINED]
        if not chains:
            raise NotImplementedError(f"no tile is known to compile for {gpu.name}")
        choice = min(chains, key=lambda one: chain.predicted(problem, gpu, one))
    return lambda: triton.run_chain(arguments, problem, choice)


def _on_backend(backend: str, device: torch.device, call: Call) -> Call:
    with backends.use_backend(backend):
        here = backends.choose(device.type)
    if here is backends.choose(device.type):
        return call  # chosen anyway, without the cost of asking for it

    def on_backend() -> Any:
        with backends.use_backend(backend):
            return call()

    return on_backend


def for_device(
    device: torch.device, wanted: Sequence[str] = (), without: Collection[str] = ()
) -> dict[str, Prepare]:
    """The candidates on a device, by name, "eager" first.

    Args:
        device: where they run.
        wanted: this package's backends; those that run on the device when empty.
        without: names to leave out.

    Raises:
        InvalidArgumentError: a name is not known.
    """
    available = backends.available()
    for name in wanted:
        if name not in available:
            known = ", ".join(available)
            raise InvalidArgumentError(f"--backend is {name!r}, must be one of {known}")
    own = {"cpu": ("cpu",), "cuda": ("triton", "cuda")}[device.type]
    found: dict[str, Prepare] = {"eager": eager}
    if device.type == "cuda":
        found["cuDNN, fused"] = cudnn_fused
    else:
        found["oneDNN, fused"] = onednn_fused
    found["torch.compile"] = compiled()
    found |= {f"fused, {name}": fused(name) for name in wanted or own}
    for name in without:
        if name not in (*found, ONE_KERNEL):
            known = ", ".join((*found, ONE_KERNEL))
            raise InvalidArgumentError(f"--without is {name!r}, must be one of {known}")
    return {name: prepare for name, prepare in found.items() if name not in without}


def for_blocks(found: Collection[str], without: Collection[str] = ()) -> dict[str, Prepare]:
    """The candidates on Bottlenecks that go with those on layers, by name, "eager" first.

    Args:
        found: the names that `for_device` gave.
        without: names to leave out.
    """
    own = [name.removeprefix("fused, ") for name in found if name.startswith("fused, ")]
    blocks: dict[str, Prepare] = {"eager": eager_block}
    blocks |= {f"fused, {name}": fused_block(name) for name in own}
    blocks[ONE_KERNEL] = one_kernel
    return {name: prepare for name, prepare in blocks.items() if name not in without}


def for_norms(found: Collection[str]) -> dict[str, norms.Prepare]:
    """The candidates on norms in training that go with those on layers, by name, "eager" first.

    Args:
        found: the names that `for_device` gave.
    """
    ways: dict[str, norms.Prepare] = {}
    for name in found:
        if name == "eager":
            ways[name] = norms.eager
        elif name == "torch.compile":
            ways[name] = norms.compiled()
        elif name.startswith("fused, "):
            ways[name] = norms.fused(functools.partial(_on_backend, name.removeprefix("fused, ")))
    return ways


def _folded(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """Weight and bias with batch norm in them, folded in float32."""
    weight, *norm = arguments[1:7]
    scale, shift = library.scale_and_shift(Norm(*norm), weight.dtype)
    folded = (weight.float() * scale[:, None, None, None]).to(weight.dtype)
    return folded.contiguous(memory_format=torch.channels_last), shift.to(weight.dtype)
