"""The Triton backend: convolution, batch norm, shortcut and ReLU in one kernel, on a GPU.

`inference.py` and `training.py` choose the kernel. `conv_kernels.py` has those of convolutions,
`conv.py` what launches them, `norm.py` both for norms by themselves, `stem.py` for a max-pool
behind either, `device.py` what kernels share. Triton is imported when one first runs: `lazy.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...layers.description import ConvNorm, Norm, Pool, Sums, described_blocks
from ...tuning import basic_block
from ...tuning.choice import ESTIMATE, Choice
from ...tuning.problem import ChainProblem
from .. import cuda, library
from ..backend import Backend, Gradients
from ..recording import Recorder
from .eligible import DTYPES, interpreted
from .inference import (
    batch_norm_act_inference,
    conv_bn_act,
    conv_bn_act_max_pool,
    norm_conv_bn_act,
)
from .lazy import launchers
from .training import (
    batch_norm_act_backward,
    batch_norm_act_backward_input,
    batch_norm_act_backward_sums,
    batch_norm_act_training,
    batch_norm_act_training_keeping_mask,
    batch_norm_add_relu,
    batch_norm_add_relu_backward,
    batch_norm_relu_max_pool,
    batch_statistics,
    conv_backward_input,
    conv_backward_input_runs,
    conv_batch_norm_statistics,
    max_pool_backward_from_offsets,
    norm_conv_backward_input,
)

__all__ = [
    "Triton",
    "available",
    "batch_norm_act_backward",
    "batch_norm_act_backward_input",
    "batch_norm_act_backward_sums",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "batch_norm_act_training_keeping_mask",
    "batch_norm_add_relu",
    "batch_norm_add_relu_backward",
    "batch_norm_relu_max_pool",
    "batch_statistics",
    "conv_backward_input",
    "conv_backward_input_runs",
    "conv_batch_norm_statistics",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "explain",
    "in_graphs",
    "interpreted",
    "launchers",
    "max_pool_backward_from_offsets",
    "norm_conv_backward_input",
    "norm_conv_bn_act",
    "release",
    "residual_blocks",
    "run_chain",
]

_CHAIN_DTYPES = (torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)


@functools.cache
def available() -> str:
    """Whether the kernels can run here: "yes" or the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted():
        return "yes"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < _LEAST_CAPABILITY:
        return "the GPU's compute capability is {}.{}, must be at least 8.0".format(*capability)
    return "yes"


def in_graphs(input: Tensor) -> bool:
    """Whether a compiler's graph should hold this backend's kernels instead of the operator."""
    return input.device.type == "cuda" and input.dtype in DTYPES


def explain(
    operator: str,
    *,
    dtype: torch.dtype,
    **_: object,
) -> str:
    """How this backend runs an operator; see `backends.explain`."""
    how = " (interpreted)" if interpreted() else ""
    if operator.startswith("conv_bn_act") and dtype in DTYPES:
        return f"triton: implicit GEMM{how}"
    if operator == "norm_conv_bn_act" and dtype in DTYPES:
        return f"triton: normalize + implicit GEMM, in one launch where that should pay{how}"
    if operator.startswith("batch_norm_act") and dtype in DTYPES:
        statistics = "statistics + " if operator == "batch_norm_act_training" else ""
        return f"triton: {statistics}normalize{how}"
    return "triton: " + library.explain(operator)


def residual_blocks(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
) -> Tensor | None:
    """Whole Bottlenecks in a launch each: see `blocks.residual_blocks`, `ops.residual_blocks`.

    A BasicBlock runs on the CUDA backend's kernel where that was measured to be the fastest.
    """
    if input.dtype not in _CHAIN_DTYPES:
        return None
    from . import chains

    described = list(described_blocks(tensors, numbers, eps, layer_counts, projections))
    if (problem := basic_block.problem_of(input, described)) is not None:
        if input.device.type != "cuda":
            return None
        choice = tuning.choose(problem, input.device)
        if choice.tile is None or choice.source == ESTIMATE:
            return None
        return cuda.run_basic_block(input, *described[0][0], choice.tile)
    launchers()
    return chains.residual_blocks(input, described)


def release(tensors: Iterable[Tensor]) -> None:
    """Drops what was made of these weights; see `bottleneck._arranged`."""
    # Nothing was made where the module was never imported.
    module = sys.modules.get(f"{__name__}.bottleneck")
    if module is not None:
        module.release(tensors)


def run_chain(arguments: tuple, problem: ChainProblem, choice: Choice) -> tuple[Tensor, ...]:
    """All that a chain consists of, as chosen, for those who time it; see `tuner.ChainCase`."""
    launchers()
    from . import chains

    reduced, x, *layers = arguments
    with chains.row(x):
        out, following = chains.run(reduced, x, layers, problem, choice)
        if layers[-1] is None:
            return (out,)
        if following is None:
            following = conv_bn_act(out, *layers[-1], None, "relu")
    return out, following


class Triton(Backend):
    """The functions of this package."""

    name = "triton"
    reads_narrow_residuals = True
    has_norm_kernels = True

    @property
    def device_type(self) -> str:  # type: ignore[override]
        """Where its tensors are."""
        return "cpu" if interpreted() else "cuda"

    def is_default(self, device_type: str) -> bool:
        """See `Backend.is_default`."""
        return device_type == "cuda" and available() == "yes" and not interpreted()

    def available(self) -> str:
        """See `Backend.available`."""
        return available()

    def in_graphs(self, input: Tensor) -> bool:
        """See `Backend.in_graphs`."""
        return in_graphs(input)

    def explain(self, operator: str, **arguments: Any) -> str:
        """See `Backend.explain`."""
        return explain(operator, **arguments)

    def release(self, tensors: Iterable[Tensor]) -> None:
        """See `Backend.release`."""
        release(tensors)

    def plan_key(self, input: Tensor) -> Hashable | None:
        """See `Backend.plan_key`."""
        if interpreted() or input.device.type != "cuda" or not input.numel():
            return None
        launchers()
        from . import plans

        if plans.is_watched():
            return None
        return tuning.generation(), library.precision(input), input.data_ptr() % 16 == 0

    def recorder(self, input: Tensor, parameters: Sequence[Tensor]) -> Recorder | None:
        """See `Backend.recorder`."""
        # What is compiled, and whether it computes the same, is not to be found out in a graph.
        if torch.cuda.is_current_stream_capturing():
            return None
        from . import plans

        return plans.Recorder(input, parameters)

    def conv_bn_act(
        self, input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str
    ) -> Tensor:
        """See `Backend.conv_bn_act`."""
        return conv_bn_act(input, *layer.flat(), residual, activation)

    def norm_conv_bn_act(
        self,
        input: Tensor,
        before: Norm,
        layer: ConvNorm,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        """See `Backend.norm_conv_bn_act`."""
        return norm_conv_bn_act(input, *before, *layer.flat(), residual, activation)

    def conv_bn_act_max_pool(
        self, input: Tensor, layer: ConvNorm, activation: str, pool: Pool
    ) -> Tensor:
        """See `Backend.conv_bn_act_max_pool`."""
        return conv_bn_act_max_pool(input, *layer.flat(), activation, *pool)

    def batch_norm_act_inference(
        self, input: Tensor, norm: Norm, residual: Tensor | None, activation: str
    ) -> Tensor:
        """See `Backend.batch_norm_act_inference`."""
        return batch_norm_act_inference(input, *norm, residual, activation)

    def residual_blocks(self, input: Tensor, *described: Any) -> Tensor | None:
        """See `Backend.residual_blocks`."""
        return residual_blocks(input, *described)

    def batch_norm_act_training(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Backend.batch_norm_act_training`."""
        return batch_norm_act_training(input, weight, bias, eps, residual, activation)

    def batch_norm_act_training_keeping_mask(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """See `Backend.batch_norm_act_training_keeping_mask`."""
        return batch_norm_act_training_keeping_mask(input, weight, bias, eps, residual)

    def batch_statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """See `Backend.batch_statistics`."""
        return batch_statistics(input)

    def batch_norm_act_backward(
        self,
        grad: Tensor,
        input: Tensor,
        output: Tensor | None,
        norm: Norm,
        activation: str,
        training: bool,
        need: Sequence[bool],
        overwrite: bool = False,
    ) -> Gradients:
        """See `Backend.batch_norm_act_backward`."""
        vectors = (norm.weight, norm.bias, norm.mean, norm.var, norm.eps)
        return batch_norm_act_backward(
            grad, input, output, *vectors, activation, training, need, overwrite
        )

    def batch_norm_act_backward_sums(
        self, grad: Tensor, input: Tensor, output: Tensor | None, norm: Norm, activation: str
    ) -> tuple[Tensor, Tensor]:
        """See `Backend.batch_norm_act_backward_sums`."""
        vectors = (norm.weight, norm.bias, norm.mean, norm.var, norm.eps)
        return batch_norm_act_backward_sums(grad, input, output, *vectors, activation)

    def batch_norm_act_backward_input(
        self,
        grad: Tensor,
        input: Tensor,
        output: Tensor | None,
        norm: Norm,
        activation: str,
        sums: Sums,
        need_residual: bool,
        overwrite: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `Backend.batch_norm_act_backward_input`."""
        vectors = (norm.weight, norm.bias, norm.mean, norm.var, norm.eps)
        return batch_norm_act_backward_input(
            grad, input, output, *vectors, activation, *sums, need_residual, overwrite
        )

    def batch_norm_add_relu(
        self, input: Tensor, norm: tuple, residual: Tensor, residual_norm: tuple | None
    ) -> tuple[Tensor, Tensor | None, tuple, tuple | None] | None:
        """See `Backend.batch_norm_add_relu`."""
        return batch_norm_add_relu(input, norm, residual, residual_norm)

    def batch_norm_add_relu_backward(
        self,
        grad: Tensor,
        output: Tensor,
        input: Tensor,
        norm: Norm,
        residual: Tensor,
        residual_norm: Norm,
    ) -> tuple[tuple, tuple] | None:
        """See `Backend.batch_norm_add_relu_backward`."""
        return batch_norm_add_relu_backward(grad, output, input, norm, residual, residual_norm)

    def conv_batch_norm_statistics(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Sequence[Any],
        prologue: Norm | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """See `Backend.conv_batch_norm_statistics`."""
        return conv_batch_norm_statistics(input, weight, bias, *geometry, prologue)

    def batch_norm_relu_max_pool(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        pool: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """See `Backend.batch_norm_relu_max_pool`."""
        return batch_norm_relu_max_pool(input, weight, bias, eps, pool)

    def max_pool_backward_from_offsets(
        self, grad: Tensor, offsets: Tensor, size: Sequence[int], pool: Sequence[Sequence[int]]
    ) -> Tensor:
        """See `Backend.max_pool_backward_from_offsets`."""
        return max_pool_backward_from_offsets(grad, offsets, size, pool)

    def conv_backward_input(
        self,
        grad: Tensor,
        weight: Tensor,
        size: Sequence[int],
        geometry: Sequence[Any],
        residual: Tensor | None,
        below: tuple[Tensor, Norm] | None,
        residual_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None] | None:
        """See `Backend.conv_backward_input`."""
        behind = None if below is None else (below[0], *below[1])
        masked = () if residual_mask is None else (residual_mask,)
        return conv_backward_input(grad, weight, size, *geometry, residual, behind, *masked)

    def conv_backward_input_runs(
        self,
        grad: Tensor,
        weight: Tensor,
        size: Sequence[int],
        geometry: Sequence[Any],
        residual: Tensor | None,
    ) -> bool:
        """See `Backend.conv_backward_input_runs`."""
        return conv_backward_input_runs(grad, weight, size, *geometry, residual, None)

    def norm_conv_backward_input(
        self,
        grad: Tensor,
        output: Tensor,
        behind: tuple[Tensor, Norm],
        weight: Tensor,
        size: Sequence[int],
        geometry: Sequence[Any],
        below: tuple[Tensor, Norm],
    ) -> tuple[Tensor, tuple, Tensor, Tensor, tuple[Tensor, Tensor]] | None:
        """See `Backend.norm_conv_backward_input`."""
        return norm_conv_backward_input(
            grad, output, *behind, weight, size, *geometry, (below[0], *below[1])
        )
