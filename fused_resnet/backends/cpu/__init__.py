"""The CPU backend: a native convolution with everything after it in its epilogue.

What the native convolution does not cover goes to the library's, finished by `scale_shift_act`.
Batch norm's training has native statistics and a native backward. `isa.py` says what is covered and
by which instructions; `inference.py`, `norm.py`, `training_conv.py` and `quantized.py` call the
kernels; `weights.py` keeps copies of weights, and `plans.py` the calls of whole passes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import torch
from torch import Tensor

from ...layers.quantized import Quantization, QuantizedBlock, QuantizedLinear, QuantizedStem
from ..backend import Backend
from ..recording import Recorder
from . import operators, plans, precision, weights
from .inference import (
    MOST_IMAGES,
    conv_bn_act,
    conv_bn_act_max_pool,
    norm_conv_bn_act,
    pool_linear,
    prefers_modules,
    residual_blocks,
    runs_chains,
    squeeze_excitation,
)
from .isa import ISA, NATIVE_DTYPES, TILE_ISA, explain, has_kernel
from .norm import (
    batch_norm_act_backward,
    batch_norm_act_backward_input,
    batch_norm_act_backward_sums,
    batch_norm_act_inference,
    batch_norm_act_training,
    batch_norm_act_training_keeping_mask,
    batch_statistics,
    max_pool_backward,
)
from .precision import tile_products
from .quantized import run_quantized_blocks, run_quantized_head, run_quantized_stem
from .training_conv import (
    conv_batch_norm_statistics,
    conv_input_gradient,
    conv_weight_gradient,
    convolution,
)

__all__ = [
    "Cpu",
    "batch_norm_act_backward",
    "batch_norm_act_backward_input",
    "batch_norm_act_backward_sums",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "batch_statistics",
    "conv_batch_norm_statistics",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "conv_input_gradient",
    "conv_weight_gradient",
    "convolution",
    "empty_cache",
    "explain",
    "has_kernel",
    "max_pool_backward",
    "norm_conv_bn_act",
    "pool_linear",
    "release",
    "residual_blocks",
    "squeeze_excitation",
    "tile_products",
]


def release(tensors: Iterable[Tensor]) -> None:
    """Drops the packed copies of these weights, and the plans that have some."""
    tensors = list(tensors)
    weights.cache.release(tensors)
    plans.release(tensors)


def empty_cache() -> None:
    """Returns to the system the memory kept for coming outputs, and drops every packed weight."""
    weights.cache.clear()
    plans.clear()
    operators.cpu_pool_trim()


class Cpu(Backend):
    """The functions of this package, for tensors on the CPU."""

    name = "cpu"
    device_type = "cpu"
    reads_narrow_residuals = True
    pads_shortcuts = True
    hold_blocks_in_graphs = True
    has_norm_kernels = True
    plans_eight_bits = True
    recorded_pass = 2

    def is_default(self, device_type: str) -> bool:
        """See `Backend.is_default`."""
        return device_type == "cpu"

    def has_activation(self, activation: str) -> bool:
        """See `Backend.has_activation`."""
        return True

    def trains_activation(self, activation: str, dtype: torch.dtype) -> bool:
        """See `Backend.trains_activation`."""
        return dtype in NATIVE_DTYPES

    def plan_key(self, input: Tensor) -> Hashable | None:
        """See `Backend.plan_key`."""
        if input.dtype not in NATIVE_DTYPES or input.layout is not torch.strided:
            return None
        if TILE_ISA and input.dtype is torch.float32:
            if precision.current() != precision.followed:  # before a plan runs, too
                precision.follow()
            return precision.products
        return ()

    def plans_head(self, input: Tensor) -> bool:
        """See `Backend.plans_head`."""
        return bool(ISA) and input.size(0) <= MOST_IMAGES

    def recorder(self, input: Tensor, parameters: Sequence[Tensor]) -> Recorder:
        """See `Backend.recorder`."""
        return plans.Recorder(input, parameters)

    explain = staticmethod(explain)
    has_kernel = staticmethod(has_kernel)
    release = staticmethod(release)
    conv_bn_act = staticmethod(conv_bn_act)
    norm_conv_bn_act = staticmethod(norm_conv_bn_act)
    prefers_modules = staticmethod(prefers_modules)
    conv_bn_act_max_pool = staticmethod(conv_bn_act_max_pool)
    batch_norm_act_inference = staticmethod(batch_norm_act_inference)
    residual_blocks = staticmethod(residual_blocks)
    pool_linear = staticmethod(pool_linear)
    squeeze_excitation = staticmethod(squeeze_excitation)
    runs_chains = staticmethod(runs_chains)
    batch_norm_act_training = staticmethod(batch_norm_act_training)
    batch_norm_act_training_keeping_mask = staticmethod(batch_norm_act_training_keeping_mask)
    batch_statistics = staticmethod(batch_statistics)
    conv_batch_norm_statistics = staticmethod(conv_batch_norm_statistics)
    convolution = staticmethod(convolution)
    batch_norm_act_backward = staticmethod(batch_norm_act_backward)
    batch_norm_act_backward_sums = staticmethod(batch_norm_act_backward_sums)
    batch_norm_act_backward_input = staticmethod(batch_norm_act_backward_input)
    conv_input_gradient = staticmethod(conv_input_gradient)
    conv_weight_gradient = staticmethod(conv_weight_gradient)
    max_pool_backward = staticmethod(max_pool_backward)

    def quantized_residual_blocks(
        self,
        input: Tensor,
        blocks: Sequence[QuantizedBlock],
        stored: Quantization,
        output: Quantization,
    ) -> Tensor:
        """In one call: see csrc/cpu/quantized/."""
        out = run_quantized_blocks(input, blocks, stored, output)
        if out is None:
            return super().quantized_residual_blocks(input, blocks, stored, output)
        return out

    def quantized_stem(
        self, input: Tensor, stem: QuantizedStem, stored: Quantization, output: Quantization
    ) -> Tensor:
        """In one call: see csrc/cpu/quantized/stem.cpp."""
        return run_quantized_stem(input, stem, stored, output)

    def quantized_pool_linear(
        self, input: Tensor, linear: QuantizedLinear, stored: Quantization, pooled: Quantization
    ) -> Tensor:
        """In one call: see csrc/cpu/quantized/head.cpp."""
        return run_quantized_head(input, linear, stored, pooled)
