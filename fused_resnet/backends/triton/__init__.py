"""The Triton backend: convolution, batch norm, shortcut and ReLU in one kernel, on a GPU.

`inference.py` and `training.py` choose the kernel. `conv_kernels.py` has those of convolutions,
`conv.py` what launches them, `norm_kernels.py` and `norm.py` the same for norms by themselves,
`stem.py` both for a max-pool behind either, `device.py` what kernels share. Triton is imported when
one first runs: `lazy.py`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import tuning
from ...layers.description import Block
from ...layers.quantized import Quantization, QuantizedBlock
from ...tuning import basic_block
from ...tuning.choice import ESTIMATE, Choice
from ...tuning.problem import ChainProblem
from .. import arranged, cuda, library
from ..backend import Backend
from ..recording import Recorder
from . import checks
from .eligible import DTYPES, interpreted, is_traced
from .inference import (
    batch_norm_act_inference,
    conv_bn_act,
    conv_bn_act_max_pool,
    norm_conv_bn_act,
)
from .lazy import launchers, layouts
from .training import (
    batch_norm_act_backward,
    batch_norm_act_backward_input,
    batch_norm_act_backward_sums,
    batch_norm_act_training,
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
    "residual_blocks",
    "run_chain",
]

_CHAIN_DTYPES = (torch.float16, torch.bfloat16)
_LEAST_CAPABILITY = (8, 0)
_FLOAT8_CAPABILITY = (8, 9)


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
    if operator == "quantized_residual_blocks" and dtype in DTYPES:
        return f"triton: implicit GEMM in eight bits{how}"
    if operator == "float8_residual_blocks" and dtype in DTYPES and _knows_float8():
        return f"triton: implicit GEMM of float8_e4m3fn activations{how}"
    if operator.startswith("batch_norm_act") and dtype in DTYPES:
        statistics = "statistics + " if operator == "batch_norm_act_training" else ""
        return f"triton: {statistics}normalize{how}"
    return "triton: " + library.explain(operator)


def residual_blocks(input: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """Whole Bottlenecks in a launch each: see `chains.residual_blocks`, `ops.residual_blocks`.

    A BasicBlock runs on the CUDA backend's kernel where that was measured to be the fastest.
    """
    if input.dtype not in _CHAIN_DTYPES:
        return None
    from . import chains

    if (problem := basic_block.problem_of(input, blocks)) is not None:
        if input.device.type != "cuda":
            return None
        choice = tuning.choose(problem, input.device)
        if choice.tile is None or choice.source == ESTIMATE:
            return None
        if not cuda.trusts_basic_block(problem, choice.tile, input.device):
            return None
        first, second = blocks[0].layers
        return cuda.run_basic_block(input, first, second, choice.tile)
    launchers()
    return chains.residual_blocks(input, blocks)


def _in_eight_bits(
    input: Tensor, blocks: Sequence[QuantizedBlock], stored: Quantization, output: Quantization
) -> Tensor | None:
    """Residual blocks in int8 or float8_e4m3fn, or None where these are not covered."""
    launchers()
    from . import quantized

    run = quantized.residual_blocks
    if (
        input.dtype in DTYPES
        and not is_traced(input)
        and quantized.covers(blocks)
        and checks.trusts_quantized(input, blocks, stored, output, run)
    ):
        return run(input, blocks, stored, output)
    return None


def _knows_float8(device: torch.device | None = None) -> bool:
    """Whether a GPU, the current one if None, converts float8_e4m3fn; Triton's interpreter does."""
    return interpreted() or torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def run_chain(
    arguments: tuple[Any, ...], problem: ChainProblem, choice: Choice
) -> tuple[Tensor, ...]:
    """All that a chain consists of, as chosen, for those who time it; see `cases.ChainCase`."""
    launchers()
    from . import chains

    reduced, x, *layers = arguments
    with chains.row(x):
        out, following = chains.run(reduced, x, layers, problem, choice)
        if layers[-1] is None:
            return (out,)
        if following is None:
            following = conv_bn_act(out, layers[-1], None, "relu")
    return out, following


class Triton(Backend):
    """The functions of this package."""

    name = "triton"
    reads_narrow_residuals = True
    has_norm_kernels = True
    lays_channels_last = True

    @property
    def device_type(self) -> str:  # type: ignore[override]
        """Where its tensors are."""
        return "cpu" if interpreted() else "cuda"

    def quantized_residual_blocks(
        self,
        input: Tensor,
        blocks: Sequence[QuantizedBlock],
        stored: Quantization,
        output: Quantization,
    ) -> Tensor:
        """A launch for each convolution: see `quantized.py`."""
        out = _in_eight_bits(input, blocks, stored, output)
        if out is None:
            return super().quantized_residual_blocks(input, blocks, stored, output)
        return out

    def float8_residual_blocks(
        self,
        input: Tensor,
        blocks: Sequence[QuantizedBlock],
        stored: Quantization,
        output: Quantization,
    ) -> Tensor:
        """As in int8, on GPUs of compute capability 8.9 and later, which know these numbers."""
        known = _knows_float8(input.device)
        out = _in_eight_bits(input, blocks, stored, output) if known else None
        return super().float8_residual_blocks(input, blocks, stored, output) if out is None else out

    def has_activation(self, activation: str) -> bool:
        """See `Backend.has_activation`."""
        return True

    def is_default(self, device_type: str) -> bool:
        """See `Backend.is_default`."""
        return device_type == "cuda" and available() == "yes" and not interpreted()

    def plan_key(self, input: Tensor) -> Hashable | None:
        """See `Backend.plan_key`."""
        if interpreted() or input.device.type != "cuda" or not input.numel():
            return None
        launchers()
        from . import plans

        if plans.is_watched():
            return None
        return tuning.generation(), library.precision(input), input.data_ptr() % 16 == 0

    def to_channels_last(self, input: Tensor) -> Tensor:
        """See `Backend.to_channels_last`."""
        if is_traced(input):
            return super().to_channels_last(input)
        return layouts().channels_last(input)

    def graph_key(self, input: Tensor) -> Hashable | None:
        """See `Backend.graph_key`."""
        own, key = self.plan_key(input), cuda.graph_key(input)
        return None if own is None or key is None else (own, key)

    def recorder(self, input: Tensor, parameters: Sequence[Tensor]) -> Recorder | None:
        """See `Backend.recorder`."""
        # What is compiled, and whether it computes the same, is not to be found out in a graph.
        if torch.cuda.is_current_stream_capturing():
            return None
        from . import plans

        return plans.Recorder(input, parameters)

    def prepare(self, run: Callable[[], object]) -> None:
        """See `Backend.prepare`."""
        launchers()
        from . import ahead

        ahead.compile_ahead(run)

    available = staticmethod(available)
    in_graphs = staticmethod(in_graphs)
    explain = staticmethod(explain)
    release = staticmethod(arranged.release)
    conv_bn_act = staticmethod(conv_bn_act)
    norm_conv_bn_act = staticmethod(norm_conv_bn_act)
    conv_bn_act_max_pool = staticmethod(conv_bn_act_max_pool)
    batch_norm_act_inference = staticmethod(batch_norm_act_inference)
    residual_blocks = staticmethod(residual_blocks)
    batch_norm_act_training = staticmethod(batch_norm_act_training)
    batch_statistics = staticmethod(batch_statistics)
    batch_norm_act_backward = staticmethod(batch_norm_act_backward)
    batch_norm_act_backward_sums = staticmethod(batch_norm_act_backward_sums)
    batch_norm_act_backward_input = staticmethod(batch_norm_act_backward_input)
    batch_norm_add_relu = staticmethod(batch_norm_add_relu)
    batch_norm_add_relu_backward = staticmethod(batch_norm_add_relu_backward)
    conv_batch_norm_statistics = staticmethod(conv_batch_norm_statistics)
    batch_norm_relu_max_pool = staticmethod(batch_norm_relu_max_pool)
    max_pool_backward_from_offsets = staticmethod(max_pool_backward_from_offsets)
    conv_backward_input = staticmethod(conv_backward_input)
    conv_backward_input_runs = staticmethod(conv_backward_input_runs)
    norm_conv_backward_input = staticmethod(norm_conv_backward_input)
