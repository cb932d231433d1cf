"""The CUDA backend: kernels written in C++ (csrc/cuda), on a GPU.

Convolutions of float16, bfloat16 and float32 run on one implicit GEMM with everything after them in
its epilogue; of BasicBlocks with 64 channels both run in one launch, where that is faster, and of
Bottlenecks on Hopper all from the second on, where `tune` found that it is. Batch norm of the same
dtypes has kernels of its own for channels_last, forward and backward, in training and inference.
What these do not cover goes to the library. The tests run the same kernels on the CPU
(csrc/cuda_on_host).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Hashable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _native, tuning
from ..layers.activation import PLAIN, apply_, numbers_of
from ..layers.description import Block, ConvNorm, Norm, Pool, Sums
from ..layers.memory import contiguous_like_eager, memory_format_of
from ..layers.quantized import Quantization, QuantizedBlock, QuantizedStem
from ..tuning import architecture, basic_block, cuda_tiles
from ..tuning.choice import BASIC_BLOCK, Tile
from ..tuning.estimate import USUAL_POOL
from ..tuning.problem import BasicBlockProblem, ConvProblem
from . import (
    arranged,
    check_cases,
    cuda_plans,
    cuda_quantized,
    hopper_chains,
    library,
    recording,
    self_check,
)
from .backend import Backend, Gradients, UnfoundNorm
from .recording import Recorder
from .self_check import Case, Family

__all__ = [
    "Cuda",
    "available",
    "batch_norm_act_backward",
    "batch_norm_act_backward_input",
    "batch_norm_act_backward_sums",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "batch_norm_add_relu",
    "batch_statistics",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "explain",
    "on_host",
    "residual_blocks",
    "run_basic_block",
    "run_on_host",
]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_CAPABILITY = (8, 0)
# Limits of the kernel's grid and of its 32-bit pixel numbers (csrc/cuda/conv_bn_act.cu).
_MOST_GROUPS = 65535
_MOST_PIXELS = 2**31 - 2**16
# Of a stem's rows and columns (csrc/cuda/stem.cu).
_LONGEST_STEM = 2**24
# Of batch norm's, whose channels are numbered in 32 bits (csrc/cuda/batch_norm.cu).
_MOST_CHANNELS = 2**31 - 1 - 2**16
# And of pixels, which a residual of fewer channels has numbered so.
_MOST_NARROW_PIXELS = 2**32 - 1


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
    _basic_block.cache_clear()
    _batch_norm.cache_clear()
    _stem.cache_clear()
    cuda_plans.forget_operators()
    _hopper.cache_clear()
    cuda_quantized.forget_operators()
    cuda_tiles.instances.cache_clear()
    cuda_tiles.hopper_instances.cache_clear()
    hopper_chains.forget_operators()


def explain(operator: str, *, dtype: torch.dtype, **_: object) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    if operator == "norm_conv_bn_act":  # one after the other
        before, behind = (
            explain("batch_norm_act_inference", dtype=dtype),
            explain("conv_bn_act", dtype=dtype),
        )
        return before if before == behind else f"{before} + {behind.rpartition(': ')[2]}"
    backend = "cuda (on the host)" if on_host() else "cuda"
    if operator.startswith("conv_bn_act") and dtype in _DTYPES:
        pool = " + max-pool" if operator == "conv_bn_act_max_pool" else ""
        return f"{backend}: implicit GEMM{pool}"
    if operator in ("quantized_residual_blocks", "quantized_stem") and dtype in _DTYPES:
        return f"{backend}: implicit GEMM in eight bits"
    if operator.startswith("batch_norm_act") and dtype in _DTYPES:
        passes = "statistics + normalize" if operator.endswith("training") else "normalize"
        return f"{backend}: {passes}, where channels_last; else {library.explain(operator)}"
    return f"{backend}: {library.explain(operator)}"


def conv_bn_act(
    input: Tensor,
    layer: ConvNorm,
    residual: Tensor | None,
    activation: str,
    tile: Tile | None = None,
) -> Tensor:
    """One launch: see csrc/cuda/conv_bn_act.cuh for the formula and the memory traffic.

    `tile` is one of `tuning.cuda_tiles.candidates` or `hopper_candidates`; None leaves the choice
    to csrc/cuda/conv_heuristics.cpp.
    """
    weight, norm, bias, stride, padding, dilation, groups = layer
    if cuda_tiles.is_hopper(tile) and residual is not None and residual.size(1) < weight.size(0):
        tile = None  # which has no residual of fewer channels
    tensors = (weight, *norm[:4], bias, residual)
    if not _can_run(input, *tensors, padding=padding, groups=groups):
        return library.conv_bn_act(input, layer, residual, activation, finish=_finish())
    tf32 = library.precision(input) == "tf32"
    if cuda_tiles.is_hopper(tile) and input.dtype == torch.float32 and not tf32:
        raise ValueError(f"tile {tile} multiplies in tf32, which torch does not allow here")
    if not _trusts_convolution(input, layer, residual is not None, activation, tile):
        return library.conv_bn_act(input, layer, residual, activation)
    filters = _filters_of(weight, input)
    act = numbers_of(activation)
    if tile is not None and cuda_tiles.is_hopper(tile):
        output = _hopper()(
            input, filters, *norm, bias, *stride, *padding, *dilation, residual, *act,
            cuda_tiles.hopper_instances()[tile],
        )  # fmt: skip
    else:
        chosen = [] if tile is None else [cuda_tiles.index(tile, input.dtype, tf32), tile.split_k]
        output = _operator()(
            input, filters, *norm, bias, *stride, *padding, *dilation, groups, residual, *act,
            tf32, chosen,
        )  # fmt: skip
    if filters is weight or memory_format_of(input) is torch.channels_last:
        return output
    return output.contiguous()  # as it would be for the weight itself


def _filters_of(weight: Tensor, input: Tensor) -> Tensor:
    """The weight, or where the kernels would copy it in every call a copy that is kept."""
    if (
        weight.size(2) * weight.size(3) == 1
        or input.size(1) * input.element_size() % 16 > 0  # loaded as it lies, one by one
        or memory_format_of(weight) is torch.channels_last
    ):
        return weight
    rows = arranged.rows_of(weight)
    if (seen_by := recording.active()) is not None:
        seen_by.add_rows(weight, rows)
    return rows.permute(0, 3, 1, 2)


def usual_stem(
    input: Tensor, layer: ConvNorm, activation: str, pool: Pool, rows_each: int = 0
) -> Tensor | None:
    """A stem with its pool in one launch: see csrc/cuda/stem.cuh for formula and memory traffic.

    Args:
        input: (N, 3, H, W), on this backend's device.
        layer: 7 x 7, stride 2; see `_is_usual_stem` for all that it must be.
        activation: "relu" or "none".
        pool: 3 x 3, stride 2.
        rows_each: how many pooled rows a block computes; 0 leaves it to
            csrc/cuda/conv_heuristics.cpp.

    Returns:
        (N, K, pooled P, pooled Q) in the memory format `conv2d` would give it; None where this is
        no such stem, or the kernel is not trusted.
    """
    weight, norm, bias, *geometry = layer
    if (
        not _is_usual_stem(input, weight, geometry, activation, pool)
        or not _can_run(input, weight, *norm[:4], bias, padding=layer.padding, groups=1)
        or not _trusts_stem(input, weight)
    ):
        return None
    output = _stem("stem_max_pool")(input, weight, *norm, bias, activation == "relu", rows_each)
    last = torch.channels_last
    if memory_format_of(input) is last or memory_format_of(weight) is last:
        return output
    return output.contiguous()


def conv_bn_act_max_pool(input: Tensor, layer: ConvNorm, activation: str, pool: Pool) -> Tensor:
    """`usual_stem`; any other is `conv_bn_act`, and a pool by itself.

    That is the library's where its input does not lie as a convolution of this backend leaves it.
    """
    if (output := usual_stem(input, layer, activation, pool)) is not None:
        return output
    unpooled = conv_bn_act(input, layer, None, activation)
    if (
        not unpooled.numel()
        or unpooled.dtype not in _DTYPES
        or not unpooled.is_contiguous(memory_format=torch.channels_last)
        or not _trusts_pool(unpooled)
    ):
        return torch.max_pool2d(unpooled, *pool)
    return _stem("max_pool_channels_last")(unpooled, list(itertools.chain(*pool)))


def _is_usual_stem(
    input: Tensor, weight: Tensor, geometry: Sequence[Any], activation: str, pool: Pool
) -> bool:
    """Whether csrc/cuda/stem.cuh has a kernel for it, which pools what it has activated."""
    return (
        input.dtype in (torch.float16, torch.bfloat16)
        and input.numel() > 0
        and weight.shape[1:] == (3, 7, 7)
        and weight.size(0) % 8 == 0
        and tuple(map(_pair, geometry)) == ((2, 2), (3, 3), (1, 1), 1)
        and tuple(map(_pair, pool)) == ((3, 3), (2, 2), (1, 1))
        and activation in PLAIN
        and max(input.shape[2:]) <= _LONGEST_STEM
    )


def _pair(value: Any) -> Any:
    return value if isinstance(value, int) else tuple(value)


def residual_blocks(input: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """A BasicBlock in one launch, where `tuning` says so; see `ops.residual_blocks`.

    Bottlenecks: see `hopper_chains.py`.

    Returns:
        None for all that `tuning.basic_block.problem_of` has no problem for, and where two launches
        are faster; of Bottlenecks where a table has chosen no chain.
    """
    problem = basic_block.problem_of(input, blocks)
    if problem is None:
        return hopper_chains.residual_blocks(input, blocks, conv_bn_act)
    tile: Tile | None
    if on_host():
        tile = basic_block.tiles(problem, architecture.of_device(input.device))[0]
    else:
        tile = tuning.choose(problem, input.device).tile
    if tile is None or not trusts_basic_block(problem, tile, input.device):
        return None
    first, second = blocks[0].layers
    return run_basic_block(input, first, second, tile)


def run_basic_block(input: Tensor, first: ConvNorm, second: ConvNorm, tile: Tile) -> Tensor:
    """One launch: see csrc/cuda/basic_block.cuh for the formula and the memory traffic.

    Args:
        input: (N, 64, H, W), float16 or bfloat16, on this backend's device.
        first: 3x3, stride 1, padding 1, dilation 1.
        second: likewise.
        tile: one of `tuning.basic_block.tiles`.

    Returns:
        (N, 64, H, W), channels_last.
    """
    layers = (
        (_filters_of(layer.weight, input), *layer.norm, layer.bias) for layer in (first, second)
    )
    return _basic_block()(input, *itertools.chain(*layers), basic_block.index(tile))


def batch_norm_act_inference(
    input: Tensor, norm: Norm, residual: Tensor | None, activation: str
) -> Tensor:
    """One launch: see csrc/cuda/batch_norm.cuh for the formulas of this and the next.

    Activations but ReLU are torch's own, in place behind it.
    """
    if activation not in PLAIN:
        return apply_(batch_norm_act_inference(input, norm, residual, "none"), activation)
    input = contiguous_like_eager(input)
    *parameters, eps = norm
    if (
        not _can_normalize(input, *parameters, residual)
        or not _can_add(residual, input)
        or not _trusts_norm(batch_norm_act_inference, input)
    ):
        return library.batch_norm_act_inference(input, norm, residual, activation, finish=_finish())
    if residual is not None and residual.size(1) == input.size(1):
        residual = _alike(input, residual)
    return _batch_norm("normalize")(
        input, *_vectors(*parameters), eps, residual, activation == "relu"
    )


def batch_norm_act_training(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One launch where a cluster's shared memory holds what it normalises.

    Else three: statistics, a small one, and everything else.
    """
    input = contiguous_like_eager(input)
    if not _can_normalize(input, weight, bias, residual) or not _trusts_norm(
        batch_norm_act_training, input
    ):
        return library.batch_norm_act_training(
            input, weight, bias, eps, residual, activation, finish=_finish()
        )
    if residual is None or residual.size(1) == input.size(1):
        residual = _alike(input, residual)
        if _fits_cluster(1, input, residual):
            return _batch_norm("in_one_launch")(
                input, *_vectors(weight, bias), eps, residual, activation == "relu", None
            )
    mean, var = _batch_norm("statistics")(input)
    norm = Norm(mean, var, weight, bias, eps)
    output = batch_norm_act_inference(input, norm, residual, activation)
    return output, mean, var


def batch_norm_add_relu(
    input: Tensor, norm: UnfoundNorm, residual: Tensor, residual_norm: UnfoundNorm | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], None] | None:
    """`relu(batch_norm(input) + residual)`, and a mask of what its backward lets pass.

    Args:
        input: (N, C, *), with at least one element.
        norm: of the input.
        residual: see `batch_norm_act_training`.
        residual_norm: one of the residual's own, which these kernels do not apply; or None.

    Returns:
        The output, the mask, a bit a value in memory order (uint8), mean and variance, and None;
        or None where there is no mask: C is not a multiple of 8, or the kernels do not run this.
    """
    input = contiguous_like_eager(input)
    if (
        residual_norm is not None
        or input.size(1) % 8 > 0
        or not _can_normalize(input, *norm[:4], residual)
        or not _can_add(residual, input)
        or not _trusts_norm(batch_norm_add_relu, input)
    ):
        return None
    is_narrow, eps = residual.size(1) != input.size(1), norm[4]
    mask = torch.empty(input.numel() // 8, dtype=torch.uint8, device=input.device)
    if not is_narrow:
        residual = _alike(input, residual)
    if norm[0] is None and not is_narrow and _fits_cluster(1, input, residual):
        output, mean, var = _batch_norm("in_one_launch")(
            input, *_vectors(*norm[2:4]), eps, residual, True, mask
        )
        return output, mask, (mean, var), None
    mean, var, weight, bias, _ = norm
    if mean is None or var is None:
        mean, var = _batch_norm("statistics")(input)
    vectors = _vectors(mean, var, weight, bias)
    output = _batch_norm("normalize")(input, *vectors, eps, residual, True, mask)
    return output, mask, (mean, var), None


def batch_statistics(input: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over all dimensions but the second, in float32 (float64)."""
    input = contiguous_like_eager(input)
    if not _can_normalize(input) or not _trusts_norm(batch_statistics, input):
        return library.batch_statistics(input)
    return _batch_norm("statistics")(input)


def batch_norm_act_backward(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    training: bool,
    need: Sequence[bool],
    overwrite: bool = False,
) -> Gradients:
    """One launch or three, as forward.

    `output` may be the mask that `batch_norm_add_relu` returned.

    The residual's gradient is written by the pass that sums, so that the next need not find out
    once more where the gradient passes the activation.
    """
    input = contiguous_like_eager(input)
    *parameters, eps = norm
    if not _can_normalize(input, grad, output, *parameters) or not _trusts_norm(
        batch_norm_act_backward, input
    ):
        return library.batch_norm_act_backward(
            grad, input, output, norm, activation, training, need, finish=_finish()
        )
    relu = activation == "relu"
    need_input, need_weight, need_bias, need_residual = need
    if grad.stride() != input.stride():
        grad = _alike(input, grad)
        overwrite = True
    overwrite = overwrite and (relu or not need_residual)  # whose gradient may be `grad` itself
    output = _alike(input, output)
    vectors = (*_vectors(*parameters), eps)
    masked = torch.empty_like(input) if need_residual and relu else None
    total = dot = grad_weight = grad_input = None
    if need_input:
        grad_input = grad if overwrite else torch.empty_like(input)
    kept = None if output is None or output.dtype is torch.uint8 else output
    in_one_launch = training and need_input and _fits_cluster(2, input, grad, kept)
    if in_one_launch:
        total, _, grad_weight = _batch_norm("backward_in_one_launch")(
            grad, input, output, *vectors, relu, masked, grad_input
        )
    elif training or need_weight or need_bias or not need_input:
        total, dot, grad_weight = _batch_norm("gradient_sums")(
            grad, input, output, *vectors, relu, masked
        )
    grad_residual = (masked if relu else grad) if need_residual else None
    if need_input and not in_one_launch:
        through = (total, dot) if training else (None, None)
        done = total is not None and masked is not None
        _batch_norm("input_gradient")(
            masked if done else grad, input, None if done else output, *vectors, relu and not done,
            *through, input.numel() // input.size(1), None if done else masked, grad_input,
        )  # fmt: skip
    return (
        grad_input,
        grad_weight if need_weight else None,
        total if need_bias else None,
        grad_residual,
    )


def batch_norm_act_backward_sums(
    grad: Tensor, input: Tensor, output: Tensor | None, norm: Norm, activation: str
) -> tuple[Tensor, Tensor]:
    """Two launches; see `library.batch_norm_act_backward_sums` for what it returns."""
    input = contiguous_like_eager(input)
    *parameters, eps = norm
    if not _can_normalize(input, grad, output, *parameters) or not _trusts_norm(
        batch_norm_act_backward_sums, input
    ):
        return library.batch_norm_act_backward_sums(
            grad, input, output, norm, activation, finish=_finish()
        )
    total, dot, _ = _batch_norm("gradient_sums")(
        _alike(input, grad), input, _alike(input, output), *_vectors(*parameters), eps,
        activation == "relu", None,
    )  # fmt: skip
    return total, dot


def batch_norm_act_backward_input(
    grad: Tensor,
    input: Tensor,
    output: Tensor | None,
    norm: Norm,
    activation: str,
    sums: Sums,
    need_residual: bool,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One launch; see `library.batch_norm_act_backward_input` for what it returns."""
    input = contiguous_like_eager(input)
    *parameters, eps = norm
    total, dot, count = sums
    if not _can_normalize(input, grad, output, *parameters, total, dot) or not _trusts_norm(
        batch_norm_act_backward_input, input
    ):
        return library.batch_norm_act_backward_input(
            grad, input, output, norm, activation, sums, need_residual, finish=_finish()
        )
    relu = activation == "relu"
    if isinstance(count, Tensor):  # which may be on the GPU: nobody waits for it
        total, dot, count = total / count, dot / count, 1
    if grad.stride() != input.stride():
        grad = _alike(input, grad)
        overwrite = True
    overwrite = overwrite and (relu or not need_residual)  # whose gradient may be `grad` itself
    masked = torch.empty_like(input) if need_residual and relu else None
    grad_input = grad if overwrite else torch.empty_like(input)
    _batch_norm("input_gradient")(
        grad, input, _alike(input, output), *_vectors(*parameters), eps, relu,
        *_vectors(total, dot), count, masked, grad_input,
    )  # fmt: skip
    return grad_input, (masked if relu else grad) if need_residual else None


def _can_normalize(input: Tensor, *others: Tensor | None) -> bool:
    """Whether an input, laid out as eager lays out its output, is one for batch norm's kernels."""
    return (
        input.dtype in _DTYPES
        and input.numel() > 0
        and (input.stride(1) == 1 or input.size(1) == 1)
        and input.size(1) <= _MOST_CHANNELS
        and all(t is None or t.device == input.device for t in others)
    )


def _fits_cluster(tensors: int, input: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels of csrc/cuda/batch_norm_cluster.cuh take these tensors, laid out alike.

    They keep `tensors` of them in shared memory.
    """
    return (
        input.size(1) * input.element_size() % 16 == 0
        and all(t is None or t.data_ptr() % 16 == 0 for t in (input, *others))
        and _batch_norm("fits_cluster")(input, tensors)
    )


def _can_add(residual: Tensor | None, input: Tensor) -> bool:
    """Whether batch norm's kernels can add a residual, which may have fewer channels."""
    return (
        residual is None
        or residual.size(1) == input.size(1)
        or (input.dim() <= 4 and input.numel() // input.size(1) <= _MOST_NARROW_PIXELS)
    )


@overload
def _alike(input: Tensor, tensor: Tensor) -> Tensor: ...


@overload
def _alike(input: Tensor, tensor: Tensor | None) -> Tensor | None: ...


def _alike(input: Tensor, tensor: Tensor | None) -> Tensor | None:
    """`tensor`, copied if its strides are not those of `input`; masks are in that order."""
    if tensor is None or tensor.dtype is torch.uint8 or tensor.stride() == input.stride():
        return tensor
    return torch.empty_like(input).copy_(tensor)


def _vectors(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Values of one a channel as the kernels take them."""
    return tuple(
        t
        if t is None or (t.dtype is torch.float32 and t.is_contiguous())
        else t.to(torch.float32).contiguous()
        for t in tensors
    )


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


def _trusts_convolution(
    input: Tensor, layer: ConvNorm, residual: bool, activation: str, tile: Tile | None
) -> bool:
    """Whether the kernel may run with a tile; without, with all that it may be given."""
    device = input.device
    if type(input) not in (Tensor, Parameter):
        return True
    weight, _, _, stride, padding, dilation, groups = layer
    tf32 = library.precision(input) == "tf32"
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    call = (input.shape, weight.shape, geometry, input.dtype, tf32, residual, activation, tile)

    def problem() -> ConvProblem:
        dtype = "tfloat32" if tf32 else _name_of(input.dtype)
        N, C, H, W = input.shape
        K, _, R, S = weight.shape
        return ConvProblem(N, C, H, W, K, R, S, *geometry, dtype, residual)

    def family() -> Family:
        given = problem()
        channels = (given.C // groups, given.K // groups)
        parts = ["pointwise convolution" if given.R * given.S == 1 else "convolution"]
        if groups > 1:
            parts.append("groups of {} to {}".format(*channels))
        elif any(count * given.element_size % 16 for count in channels):
            parts.append("channel by channel")
        parts += [] if max(stride) == 1 else ["stride {}x{}".format(*stride)]
        parts += ["residual"] if residual else []
        parts += [] if activation == "relu" else [f"then {activation}"]
        return Family(Cuda.name, ", ".join([*parts, str(tile or "every tile")]), given.dtype)

    def case() -> Case:
        given = problem()
        tiles = [tile] if tile else _tiles(given, architecture.of_device(device))
        small = check_cases.smaller(given, max(each.block_m for each in tiles))
        runs = [functools.partial(conv_bn_act, tile=each) for each in tiles]
        cases = [check_cases.convolution(small, activation, device, run) for run in runs]
        return check_cases.several(cases, [str(each) for each in tiles])

    return self_check.trusts((Cuda.name, call, device), device, family, case)


def _tiles(problem: ConvProblem, gpu: architecture.Architecture) -> list[Tile]:
    """Every tile that csrc/cuda/conv_heuristics.cpp may choose, one of them with a shared sum."""
    found = cuda_tiles.candidates(problem, gpu)
    shared = [tile for tile in found if tile.split_k > 1][:1]
    return [*dict.fromkeys(dataclasses.replace(tile, split_k=1) for tile in found), *shared]


def trusts_basic_block(problem: BasicBlockProblem, tile: Tile, device: torch.device) -> bool:
    """Whether `run_basic_block` may run with a tile: see `self_check`."""

    def case() -> Case:
        small = dataclasses.replace(problem, N=2, H=tile.block_m // 14 + 3, W=17)
        return check_cases.basic_block(small, device, functools.partial(run_basic_block, tile=tile))

    call = ("basic block", problem.dtype, tile, device)
    family = Family(Cuda.name, f"{BASIC_BLOCK}, {tile}", problem.dtype)
    return self_check.trusts(call, device, lambda: family, case)


def _trusts_stem(input: Tensor, weight: Tensor) -> bool:
    """Whether the kernel of the usual stem may run."""
    device = input.device
    if type(input) not in (Tensor, Parameter):
        return True
    # Rows in pieces of 16 bytes, or number by number.
    K, whole = weight.size(0), input.size(3) % 8 == 0 and input.stride(1) == 1

    def case() -> Case:
        size = (37, 16 if whole else 19)
        small = ConvProblem(
            2, 3, *size, K, 7, 7, (2, 2), (3, 3), (1, 1), 1, _name_of(input.dtype), False,
            USUAL_POOL,
        )  # fmt: skip

        def run(x: Tensor, layer: ConvNorm, activation: str, pool: Pool) -> Tensor:
            output = usual_stem(x, layer, activation, pool)
            assert output is not None
            return output

        return check_cases.convolution_and_pool(small, "relu", device, run)

    call = ("stem", K, input.dtype, whole, device)
    kind = "" if whole else ", number by number"
    family = Family(Cuda.name, f"stem and its pool, {K} filters{kind}", _name_of(input.dtype))
    return self_check.trusts(call, device, lambda: family, case)


def _trusts_pool(input: Tensor) -> bool:
    """Whether the kernel of a max-pool by itself may run."""
    device = input.device
    if type(input) not in (Tensor, Parameter):
        return True
    wide = input.size(1) * input.element_size() % 16 == 0
    kind = "" if wide else ", channel by channel"
    family = Family(Cuda.name, f"max-pool{kind}", _name_of(input.dtype))
    call = ("max-pool", input.dtype, wide, device)

    def case() -> Case:
        channels = 24 if wide else 5
        return check_cases.max_pool(channels, input.dtype, device, _stem("max_pool_channels_last"))

    return self_check.trusts(call, device, lambda: family, case)


def _trusts_norm(function: Callable[..., Any], input: Tensor) -> bool:
    """Whether one of this file's functions for norms may run its kernels."""
    device, name = input.device, function.__name__
    if type(input) not in (Tensor, Parameter):
        return True
    # Channels in pieces of 16 bytes, or one by one.
    wide = input.size(1) * input.element_size() % 16 == 0
    last = not input.is_contiguous()
    call = ("cuda", name, input.dtype, wide, last, device)

    def family() -> Family:
        parts = [name, *([] if wide else ["channel by channel"]), *([] if last else ["dense"])]
        return Family(Cuda.name, ", ".join(parts), _name_of(input.dtype))

    return self_check.trusts(call, device, family, lambda: check_cases.norm(name, function, input))


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _finish() -> Any:
    assert _native.cuda_operators is not None
    return _native.cuda_operators.scale_shift_act


@functools.cache
def _operator() -> Any:
    assert _native.cuda_operators is not None
    return _native.cuda_operators.conv_bn_act_tiled.default


@functools.cache
def _hopper() -> Any:
    assert _native.cuda_operators is not None
    return _native.cuda_operators.hopper_conv_bn_act.default


@functools.cache
def _basic_block() -> Any:
    assert _native.cuda_operators is not None
    return _native.cuda_operators.basic_block_tiled.default


@functools.cache
def _stem(name: str) -> Any:
    """An operator of csrc/cuda/stem.cu."""
    assert _native.cuda_operators is not None
    return getattr(_native.cuda_operators, name).default


@functools.cache
def _batch_norm(name: str) -> Any:
    """The operator `batch_norm_` and so on of csrc/cuda/batch_norm.cu or batch_norm_cluster.cu."""
    assert _native.cuda_operators is not None
    return getattr(_native.cuda_operators, f"batch_norm_{name}").default


plans_on_host = False
"""Whether passes become plans where kernels run on the host, which tests ask for."""


def plan_key(input: Tensor) -> Hashable | None:
    """See `Backend.plan_key`."""
    if not input.numel() or not (plans_on_host if on_host() else input.device.type == "cuda"):
        return None
    return tuning.generation(), library.precision(input), input.data_ptr() % 16 == 0


def recorder(input: Tensor, parameters: Sequence[Tensor]) -> Recorder | None:
    """See `Backend.recorder`."""
    # Whether kernels compute the same is not to be found out in a graph.
    if input.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    return cuda_plans.Recorder(input, parameters)


def graph_key(input: Tensor) -> Hashable | None:
    """What a CUDA graph of a pass depends on; None where there can be none. See `Backend`."""
    if input.device.type != "cuda" or not input.numel():
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    return (
        torch.cuda.current_stream(input.device).cuda_stream,
        library.precision(input),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
    )


class Cuda(Backend):
    """This file's functions."""

    name = "cuda"
    reads_narrow_residuals = True
    has_norm_kernels = True
    lays_channels_last = True

    @property
    def device_type(self) -> str:  # type: ignore[override]
        """Where its tensors are."""
        return "cpu" if on_host() else "cuda"

    def has_activation(self, activation: str) -> bool:
        """See `Backend.has_activation`."""
        return True

    def is_default(self, device_type: str) -> bool:
        """See `Backend.is_default`."""
        return device_type == "cuda" and available() == "yes" and not on_host()

    def quantized_residual_blocks(
        self,
        input: Tensor,
        blocks: Sequence[QuantizedBlock],
        stored: Quantization,
        output: Quantization,
    ) -> Tensor:
        """A launch for each convolution: see `cuda_quantized.py`."""
        run = cuda_quantized.residual_blocks
        if (
            input.dtype in _DTYPES
            and cuda_quantized.covers(input, blocks)
            and cuda_quantized.trusts(self.name, input, run, None)
        ):
            return run(input, blocks, stored, output)
        return super().quantized_residual_blocks(input, blocks, stored, output)

    def quantized_stem(
        self, input: Tensor, stem: QuantizedStem, stored: Quantization, output: Quantization
    ) -> Tensor:
        """Three launches: see `cuda_quantized.py`."""
        run = cuda_quantized.stem
        if (
            input.dtype in _DTYPES
            and cuda_quantized.covers_stem(input, stem)
            and cuda_quantized.trusts(self.name, input, cuda_quantized.residual_blocks, run)
        ):
            return run(input, stem, stored, output)
        return super().quantized_stem(input, stem, stored, output)

    available = staticmethod(available)
    plan_key = staticmethod(plan_key)
    recorder = staticmethod(recorder)
    graph_key = staticmethod(graph_key)
    explain = staticmethod(explain)
    release = staticmethod(arranged.release)
    conv_bn_act = staticmethod(conv_bn_act)
    conv_bn_act_max_pool = staticmethod(conv_bn_act_max_pool)
    batch_norm_act_inference = staticmethod(batch_norm_act_inference)
    residual_blocks = staticmethod(residual_blocks)
    batch_norm_act_training = staticmethod(batch_norm_act_training)
    batch_statistics = staticmethod(batch_statistics)
    batch_norm_act_backward = staticmethod(batch_norm_act_backward)
    batch_norm_act_backward_sums = staticmethod(batch_norm_act_backward_sums)
    batch_norm_act_backward_input = staticmethod(batch_norm_act_backward_input)
    batch_norm_add_relu = staticmethod(batch_norm_add_relu)
