"""The CUDA backend: kernels written in C++ (csrc/cuda), on a GPU.

Convolutions of float16, bfloat16 and float32 run on one implicit GEMM with everything after them in
its epilogue; what that does not cover goes to the library. The tests run the same kernels on the
CPU (csrc/cuda_on_host).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _native
from ..tuning import cuda_tiles
from ..tuning.problem import Tile
from . import library

__all__ = [
    "available",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "explain",
    "on_host",
    "run_on_host",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
# Limits of the kernel's grid and of its 32-bit pixel numbers (csrc/cuda/conv_bn_act.cu).
_MOST_GROUPS = 65535
_MOST_PIXELS = 2**31 - 2**16


def available() -> str:
    """Whether the CUDA kernels can run here: "yes" or the reason why not."""
    if on_host():
        return "yes"
    if _native.cuda_status != "yes":
        return _native.cuda_status
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return "the GPU's compute capability is {}.{}, must be at least 8.0".format(*capability)
    return "yes"


def on_host() -> bool:
    """Whether the kernels run on CPU tensors, compiled by a host compiler, for the tests."""
    return _native.cuda_operators is torch.ops.fused_resnet_on_host


def run_on_host() -> None:
    """Makes this backend run on CPU tensors, by `torch.ops.fused_resnet_on_host`, once loaded."""
    _native.cuda_operators = torch.ops.fused_resnet_on_host
    _operator.cache_clear()
    cuda_tiles.instances.cache_clear()


def explain(operator: str, *, dtype: torch.dtype, **_: object) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    backend = "cuda (on the host)" if on_host() else "cuda"
    if operator.startswith("conv_bn_act") and dtype in _DTYPES:
        pool = " + library pooling" if operator == "conv_bn_act_max_pool" else ""
        return f"{backend}: implicit GEMM{pool}"
    return f"{backend}: {library.explain(operator)}"


def conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    activation: str,
    tile: Tile | None = None,
) -> Tensor:
    """One launch: see csrc/cuda/conv_bn_act.cuh for the formula and the memory traffic.

    `tile` is one of `tuning.cuda_tiles.candidates`; None leaves the choice to
    csrc/cuda/conv_heuristics.cpp.
    """
    tensors = (weight, running_mean, running_var, bn_weight, bn_bias, bias, residual)
    if not _can_run(input, *tensors, padding=padding, groups=groups):
        return library.conv_bn_act(
            input, weight, running_mean, running_var, bn_weight, bn_bias, eps, bias, stride,
            padding, dilation, groups, residual, activation, finish=_finish(),
        )  # fmt: skip
    tf32 = library.precision(input) == "tf32"
    chosen = [] if tile is None else [cuda_tiles.index(tile, input.dtype, tf32), tile.split_k]
    return _operator()(
        input, weight, running_mean, running_var, bn_weight, bn_bias, eps, bias, *stride, *padding,
        *dilation, groups, residual, activation == "relu", tf32, chosen,
    )  # fmt: skip


def conv_bn_act_max_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str,
    pool_kernel_size: Sequence[int],
    pool_stride: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """`conv_bn_act`, then the library's pooling."""
    out = conv_bn_act(
        input, weight, running_mean, running_var, bn_weight, bn_bias, eps, bias, stride, padding,
        dilation, groups, None, activation,
    )  # fmt: skip
    return torch.max_pool2d(out, pool_kernel_size, pool_stride, pool_padding)


def batch_norm_act_inference(*arguments: Any) -> Tensor:
    """See `library.batch_norm_act_inference`."""
    return library.batch_norm_act_inference(*arguments, finish=_finish())


def batch_norm_act_training(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """See `library.batch_norm_act_training`."""
    return library.batch_norm_act_training(*arguments, finish=_finish())


def _can_run(
    input: Tensor,
    weight: Tensor,
    *others: Tensor | None,
    padding: Sequence[int],
    groups: int,
) -> bool:
    """Whether dtypes, devices and sizes are those the kernel takes."""
    N, _, H, W = input.shape
    return (
        input.dtype in _DTYPES
        and weight.dtype is input.dtype
        and all(t is None or t.device == input.device for t in (weight, *others))
        and groups <= _MOST_GROUPS
        and N * (H + 2 * padding[0]) * (W + 2 * padding[1]) <= _MOST_PIXELS  # or more than output
    )


def _finish() -> Any:
    assert _native.cuda_operators is not None
    return _native.cuda_operators.scale_shift_act


@functools.cache
def _operator() -> Any:
    assert _native.cuda_operators is not None
    return _native.cuda_operators.conv_bn_act_tiled.default
