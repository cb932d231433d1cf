"""What a backend is: a class with a method for each thing that it may do in its own way.

What a backend has no kernel for it does not define: the methods here do it as the library does, or
return None ("not this one"), and the caller goes another way. Arguments have been checked before
they get here. To add a backend, derive from `Backend` and `register` an instance.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..layers.description import Block, ConvNorm, Norm, Pool, SqueezeExcitation, Sums
from ..layers.memory import memory_format_of
from ..layers.quantized import Quantization, QuantizedBlock, QuantizedLinear, QuantizedStem
from . import library
from .recording import Recorder

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of an input, a norm's weight and bias, and a residual."""

Convolution = tuple[Tensor, tuple[int, ...], int]
"""A weight, strides and a number of groups."""

UnfoundNorm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]
"""A `Norm` whose mean and variance may be None, of statistics that are still to be found."""

NormSums = tuple[Tensor, Tensor, Tensor]
"""Of a gradient behind a norm of `tensor`, (C,) each: its sum, its sum with `tensor - mean`, and
that over `sqrt(var + eps)`."""

NormGradients = tuple[Tensor, Tensor, Tensor]
"""Of a norm's input, weight and bias."""

_ARRANGED = (torch.float16, torch.bfloat16, torch.float32)


class Backend:
    """Kernels for one kind of device, and what they can do.

    Attributes:
        name: what `use_backend` calls it.
        device_type: of the tensors that it runs on; None for those of any device.
        reads_narrow_residuals: whether operators take a residual of fewer channels, without padding
            it in memory.
        pads_shortcuts: whether `residual_blocks` takes shortcuts without parameters.
        hold_blocks_in_graphs: whether compiled and exported graphs hold `residual_blocks`.
        has_norm_kernels: whether `batch_norm_act_backward` and the methods for shared statistics
            are to be used, rather than torch's own operators.
        plans_eight_bits: whether its plans know when an eight-bit copy of a block is out of date.
        lays_channels_last: whether its kernels read and write nothing else, so that what a network
            or a block is given is best copied to it once, and back at the end.
        recorded_pass: which pass for a shape is made a plan: the first, or a later one, where the
            first does what later ones don't.
    """

    name: str
    device_type: str | None = None
    reads_narrow_residuals = False
    pads_shortcuts = False
    hold_blocks_in_graphs = False
    has_norm_kernels = False
    plans_eight_bits = False
    lays_channels_last = False
    recorded_pass = 1

    def available(self) -> str:
        """Whether it can run here: "yes" or the reason why not."""
        return "yes"

    def is_default(self, device_type: str) -> bool:
        """Whether it runs tensors of this device where nobody chose a backend."""
        return False

    def explain(self, operator: str, *, dtype: torch.dtype, **arguments: Any) -> str:
        """How it runs an operator; see `backends.explain`."""
        return f"{self.name}: {library.explain(operator)}"

    def in_graphs(self, input: Tensor) -> bool:
        """Whether a compiler's graph should hold its kernels instead of the operator."""
        return False

    def has_kernel(self, dtype: torch.dtype, weight_shape: Sequence[int], groups: int) -> bool:
        """Whether it does what comes before and behind such a convolution for nothing."""
        return False

    def has_activation(self, activation: str) -> bool:
        """Whether inference's methods apply it; where not, operators do, behind them.

        See `layers/activation.py` for what there are. Every backend has "relu" and "none", and is
        asked for the others alone.
        """
        return False

    def prefers_modules(
        self, input: Tensor, convolutions: Sequence[Convolution], activated: bool
    ) -> bool:
        """Whether torch's modules, one after the other, are faster in inference than `conv_bn_act`.

        Args:
            input: (N, C, H, W).
            convolutions: on it, one after the other, each with a norm behind it.
            activated: whether an activation follows the last norm.
        """
        return False

    def trains_activation(self, activation: str, dtype: torch.dtype) -> bool:
        """Whether `batch_norm_act_training` and its backward apply it to tensors of a dtype.

        They are then given what was added to the norm, or None, as the output that backward reads.
        Asked for what is neither "relu" nor "none"; where not, torch's own operators do.
        """
        return False

    def release(self, tensors: Iterable[Tensor]) -> None:
        """Drops what was made of these parameters and buffers."""

    # Inference.

    def plan_key(self, input: Tensor) -> Hashable | None:
        """What a plan depends on besides its input and modules; None where none is to be made."""
        return None

    def plans_head(self, input: Tensor) -> bool:
        """Whether a plan includes the pool and the linear layer at a network's end."""
        return False

    def runs_chains(self, input: Tensor) -> bool:
        """Whether blocks of small convolutions, one after the other, are best run channels_last.

        In inference: an input that lies otherwise is copied, and so is what comes out.
        """
        return False

    def graph_key(self, input: Tensor) -> Hashable | None:
        """What a CUDA graph of a pass depends on, likewise, the current stream included."""
        return None

    def recorder(self, input: Tensor, parameters: Sequence[Tensor]) -> Recorder | None:
        """What makes a plan of a pass that it is active around; None where there can be none now.

        Args:
            input: of the pass.
            parameters: all other tensors that the pass may read.
        """
        return None

    def prepare(self, run: Callable[[], object]) -> None:
        """Does what would make the first of many passes slow; `run` is that pass."""

    def arranged(self, input: Tensor) -> Tensor:
        """The input of a network or a block, (N, C, H, W), copied if it is not channels_last.

        Only where `lays_channels_last`; what its kernels would not take is returned as it is.
        """
        if (
            input.dtype not in _ARRANGED
            or not input.numel()
            or memory_format_of(input) is torch.channels_last
        ):
            return input
        return self.to_channels_last(input)

    def to_channels_last(self, input: Tensor) -> Tensor:
        """A dense channels_last copy."""
        return input.contiguous(memory_format=torch.channels_last)

    def conv_bn_act(
        self, input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str
    ) -> Tensor:
        """See `reference.conv_bn_act`."""
        return library.conv_bn_act(input, layer, residual, activation)

    def norm_conv_bn_act(
        self,
        input: Tensor,
        before: Norm,
        layer: ConvNorm,
        residual: Tensor | None,
        activation: str,
    ) -> Tensor:
        """`conv_bn_act` of `relu(batch_norm(input))`, which need not be in memory."""
        normalised = self.batch_norm_act_inference(input, before, None, "relu")
        return self.conv_bn_act(normalised, layer, residual, activation)

    def conv_bn_act_max_pool(
        self, input: Tensor, layer: ConvNorm, activation: str, pool: Pool
    ) -> Tensor:
        """`conv_bn_act` without a residual, then a max-pool."""
        return F.max_pool2d(self.conv_bn_act(input, layer, None, activation), *pool)

    def batch_norm_act_inference(
        self, input: Tensor, norm: Norm, residual: Tensor | None, activation: str
    ) -> Tensor:
        """See `reference.batch_norm_act_inference`."""
        return library.batch_norm_act_inference(input, norm, residual, activation)

    def residual_blocks(self, input: Tensor, blocks: Sequence[Block]) -> Tensor | None:
        """Whole blocks in one call, or None where these are not covered.

        Args:
            input: (N, C, H, W), of the first block.
            blocks: each on the output of the last; those with a `step` only where `pads_shortcuts`.
                Whether they fit each other and the input is not checked: None where they do not.
        """
        return None

    def quantized_residual_blocks(
        self,
        input: Tensor,
        blocks: Sequence[QuantizedBlock],
        stored: Quantization,
        output: Quantization,
    ) -> Tensor:
        """See `reference.quantized_residual_blocks`: the same bits."""
        return reference.quantized_residual_blocks(input, blocks, stored, output)

    def float8_residual_blocks(
        self,
        input: Tensor,
        blocks: Sequence[QuantizedBlock],
        stored: Quantization,
        output: Quantization,
    ) -> Tensor:
        """See `reference.float8_residual_blocks`, which says how exact it has to be."""
        return reference.float8_residual_blocks(input, blocks, stored, output)

    def quantized_stem(
        self, input: Tensor, stem: QuantizedStem, stored: Quantization, output: Quantization
    ) -> Tensor:
        """See `reference.quantized_stem`: the same bits."""
        return reference.quantized_stem(input, stem, stored, output)

    def quantized_pool_linear(
        self, input: Tensor, linear: QuantizedLinear, stored: Quantization, pooled: Quantization
    ) -> Tensor:
        """See `reference.quantized_pool_linear`: the same bits."""
        return reference.quantized_pool_linear(input, linear, stored, pooled)

    def pool_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """A network's head in one call, or None where that is not covered: `ops.pool_linear`."""
        return None

    def squeeze_excitation(self, input: Tensor, layers: SqueezeExcitation) -> Tensor | None:
        """In one call, or None where that is not covered: `ops.squeeze_excitation`."""
        return None

    # Training, forward.

    def batch_norm_act_training(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor | None,
        activation: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `reference.batch_norm_act_training`."""
        return library.batch_norm_act_training(input, weight, bias, eps, residual, activation)

    def batch_norm_act_training_keeping_mask(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        residual: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """`batch_norm_act_training` with ReLU, and its mask, a bit a value in memory order (uint8).

        As `batch_norm_add_relu` does it; None where that is. A mask of None stands for the output.
        """
        norm = (None, None, weight, bias, eps)
        found = self.batch_norm_add_relu(input, norm, residual, None)
        if found is None:
            return None
        output, mask, (mean, var), _ = found
        return output, mean, var, mask

    def batch_norm_add_relu(
        self,
        input: Tensor,
        norm: UnfoundNorm,
        residual: Tensor,
        residual_norm: UnfoundNorm | None,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None:
        """`relu(batch_norm(input) + batch_norm(residual))` in one pass, and its mask as bits.

        Args:
            input: (N, C, *).
            norm: of the input.
            residual: as the input, or with fewer channels.
            residual_norm: likewise; or None for a residual that is added as it is.

        Returns:
            The output, its mask, mean and variance of the input, and of the residual; or None.
        """
        return None

    def batch_statistics(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance, (C,) each, float32 (float64 for float64)."""
        return library.batch_statistics(input)

    def conv_batch_norm_statistics(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Sequence[Any],
        prologue: Norm | None,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """A convolution, and the mean and biased variance (K,) of its output, in one pass.

        `geometry` is stride, padding, dilation and groups, here as below. `prologue` is a norm that
        the input, and then through a ReLU, goes through first.
        """
        return None

    def convolution(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Sequence[Any]
    ) -> Tensor | None:
        """The output of `conv_batch_norm_statistics` alone, to the same bits."""
        return None

    def batch_norm_relu_max_pool(
        self,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        pool: Sequence[Sequence[int]],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """`max_pool2d(relu(batch_norm(input)), *pool)` with batch statistics.

        Returns:
            The pooled tensor, the place of each maximum in its window (uint8), mean and biased
            variance; or None.
        """
        return None

    # Training, backward.

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
        """Gradients of batch norm, residual add and activation.

        Args:
            grad: of the output.
            input: the normalised tensor.
            output: what the activation returned, or its mask as bits; None where there is no
                residual and the sign is computed again from the input. Of an activation that the
                backend trains, the residual.
            norm: its statistics those of the batch when training.
            activation: "relu", "none" or what the backend trains.
            training: whether the statistics are functions of the input.
            need: which gradients to compute: the input's, the weight's, the bias's, the residual's.
            overwrite: whether `grad` may be overwritten, by the input's gradient.

        Returns:
            The gradients, None where not needed; of weight and bias in the accumulation dtype.
        """
        return library.batch_norm_act_backward(
            grad, input, output, norm, activation, training, need
        )

    def batch_norm_act_backward_sums(
        self, grad: Tensor, input: Tensor, output: Tensor | None, norm: Norm, activation: str
    ) -> tuple[Tensor, Tensor]:
        """With g the gradient behind the activation, the sums of g and g (input - mean), (C,)."""
        return library.batch_norm_act_backward_sums(grad, input, output, norm, activation)

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
        """The gradients of input and residual, from the sums over the joint batch."""
        return library.batch_norm_act_backward_input(
            grad, input, output, norm, activation, sums, need_residual
        )

    def batch_norm_add_relu_backward(
        self,
        grad: Tensor,
        output: Tensor,
        input: Tensor,
        norm: Norm,
        residual: Tensor,
        residual_norm: Norm,
    ) -> tuple[NormGradients, NormGradients] | None:
        """Behind two norms, their add and its ReLU: of each input, its gradient and its norm's."""
        return None

    def conv_input_gradient(
        self,
        grad: Tensor,
        input: Tensor,
        weight: Tensor,
        geometry: Sequence[Any],
        add_to: Tensor | None = None,
    ) -> Tensor | None:
        """A convolution's gradient in its input, added to `add_to` in place if there is one.

        Of `input` only shape, dtype and layout matter. None, with nothing done, where not covered.
        """
        return None

    def conv_weight_gradient(
        self, grad: Tensor, input: Tensor, weight: Tensor, geometry: Sequence[Any]
    ) -> Tensor | None:
        """A convolution's gradient in its weight, in the layout of that.

        Of `weight` only shape, dtype and layout matter. None where not covered.
        """
        return None

    def conv_backward_input(
        self,
        grad: Tensor,
        weight: Tensor,
        size: Sequence[int],
        geometry: Sequence[Any],
        residual: Tensor | None,
        below: tuple[Tensor, Norm] | None,
        residual_mask: Tensor | None = None,
    ) -> tuple[Tensor, NormSums | None] | None:
        """A convolution's gradient in its input, and what would follow it.

        Args:
            grad: (N, K, P, Q), of the convolution's output.
            weight: (K, C / groups, R, S).
            size: (H, W) of its input.
            geometry: see `conv_batch_norm_statistics`.
            residual: to be added, of the input's shape; or None.
            below: a tensor and its norm, where the convolution's input is
                `relu(batch_norm(tensor))`; or None.
            residual_mask: bits of `batch_norm_add_relu`, if the residual is to be masked by it.

        Returns:
            The gradient, with `below` behind that norm, and then its sums; or None.
        """
        return None

    def conv_backward_input_runs(
        self,
        grad: Tensor,
        weight: Tensor,
        size: Sequence[int],
        geometry: Sequence[Any],
        residual: Tensor | None,
    ) -> bool:
        """Whether `conv_backward_input` returns something, without `below`."""
        return False

    def norm_conv_backward_input(
        self,
        grad: Tensor,
        output: Tensor,
        behind: tuple[Tensor, Norm],
        weight: Tensor,
        size: Sequence[int],
        geometry: Sequence[Any],
        below: tuple[Tensor, Norm],
    ) -> tuple[Tensor, NormSums, Tensor, Tensor, tuple[Tensor, Tensor]] | None:
        """`conv_backward_input` of a 1x1 convolution, with the norm behind it and its shortcut.

        `grad` is of `output = relu(batch_norm(raw) + shortcut)`, `behind` is raw and that norm.

        Returns:
            What `conv_backward_input` does; the gradients of `raw` and of the shortcut; those of
            the norm's weight and bias, in float32; or None.
        """
        return None

    def max_pool_backward(
        self, grad: Tensor, input: Tensor, norm: Norm, pool: Sequence[Sequence[int]]
    ) -> Tensor | None:
        """The gradient that `max_pool2d(relu(batch_norm(input)), *pool)` passes to the ReLU."""
        return None

    def max_pool_backward_from_offsets(
        self, grad: Tensor, offsets: Tensor, size: Sequence[int], pool: Sequence[Sequence[int]]
    ) -> Tensor:
        """The gradient of the pool's input, of (H, W) `size`, from `batch_norm_relu_max_pool`."""
        raise NotImplementedError(f"the backend {self.name} keeps no places of maxima")
