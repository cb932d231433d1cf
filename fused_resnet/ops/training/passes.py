"""The layers of a block in training: convolution, statistics, norm, and the gradients of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ... import backends
from ...backends.backend import NormGradients, NormSums
from ...layers.convolution import (
    conv2d,
    conv2d_backward,
    plain_conv2d,
    plain_conv2d_backward,
)
from ...layers.description import PARAMETERS, SAVED, Layer, Norm, Pool, Sums, TrainedBlock
from ..batch_norm_act_inference import batch_norm_act_inference
from ..batch_norm_act_training import batch_norm_act_training
from ..gradients import norm_act_backward
from ..registration import gradients_batched, is_plain
from ..sync_batch_norm_act import Processes, normalize, shared_backward, shared_statistics

Statistics = tuple[Tensor, Tensor, Tensor | None]
"""A batch's mean and biased variance, (C,) each, and how many values a channel (): None stands for
this process's own."""

# `Norm(...)` without a call of Python's.
_new = tuple.__new__


class Pass:
    """One layer's tensors, and its steps in both directions.

    Attributes:
        weight: of the convolution.
        bias: of the convolution, or None.
        raw: the convolution's output; None before forward, and in backward where forward did not
            keep it.
        count: how many values a channel the norm's batch has, where processes share it.

    Args:
        layer: what it computes.
        parameters: weight and bias of the convolution, then of the norm.
        kernels: the backend that may run several steps in one; None where single steps are looked
            at. See `kernels_for`.
        is_direct: whether it also runs single steps, without the operators' way to it.
        saved: what `saved` returned, in backward.
    """

    weight: Tensor
    bias: Tensor | None
    raw: Tensor
    norm: Norm
    count: Tensor | None

    def __init__(
        self,
        layer: Layer,
        parameters: Sequence[Any],
        kernels: backends.Backend | None,
        is_direct: bool,
        saved: Sequence[Any] = (None,) * SAVED,
    ) -> None:
        self.layer = layer
        self.weight, self.bias, bn_weight, bn_bias = parameters
        self.raw, mean, var, self.count = saved
        self.norm = _new(Norm, (mean, var, bn_weight, bn_bias, layer.eps))
        # Statistics that processes share are no kernel's to find.
        self._kernels = kernels if layer.group is None else None
        self._direct = kernels if is_direct else None
        self._norms = self._kernels if is_direct else None

    def convolve_with_statistics(self, input: Tensor, before: Pass | None) -> bool:
        """In one, where the backend does; `before` is the layer whose norm the input lacks."""
        if self._kernels is None:
            return False
        prologue = None if before is None else before.norm
        found = self._kernels.conv_batch_norm_statistics(
            input, self.weight, self.bias, self.layer.geometry, prologue
        )
        if found is None:
            return False
        self.raw, mean, var = found
        self.norm = _new(Norm, (mean, var, *self.norm[2:]))
        return True

    def finish(self, residual: Tensor | None, activation: str) -> Tensor:
        """`normalize`, with the statistics that the convolution may have found."""
        if self.norm.mean is None:
            return self.normalize(self.raw, residual, activation)
        return self._normalized(residual, activation)

    def add_relu(
        self, shortcut: Tensor, projection: Pass | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """The block's output and its mask, if the backend has one kernel for both norms."""
        if self._kernels is None or (projection is not None and projection._kernels is None):
            return None
        norm = None if projection is None else projection.norm
        found = self._kernels.batch_norm_add_relu(self.raw, self.norm, shortcut, norm)
        if found is None:
            return None
        output, mask, statistics, of_shortcut = found
        self.norm = _new(Norm, (*statistics, *self.norm[2:]))
        if projection is not None and of_shortcut is not None:
            projection.norm = _new(Norm, (*of_shortcut, *projection.norm[2:]))
        return output, mask

    def add_relu_backward(
        self, grad: Tensor, mask: Tensor, projection: Pass
    ) -> tuple[NormGradients, NormGradients] | None:
        """The gradients of both norms behind `add_relu`, from one kernel; or None."""
        if self._kernels is None or projection._kernels is None:
            return None
        return self._kernels.batch_norm_add_relu_backward(
            grad, mask, self.raw, self.norm, projection.raw, projection.norm
        )

    def input_backward(
        self,
        grad: Tensor,
        size: Sequence[int],
        residual: Tensor | None,
        below: Pass | None,
        residual_mask: Tensor | None = None,
    ) -> tuple[Tensor, NormSums | None] | None:
        """The backend's `conv_backward_input`, where it has one that runs this."""
        kernels = self._kernels if below is None else below._kernels
        if kernels is None:
            return None
        behind = None if below is None else (below.raw, below.norm)
        return kernels.conv_backward_input(
            grad, self.weight, size, self.layer.geometry, residual, behind, residual_mask
        )

    def adds_to_input_gradient(self, grad: Tensor, size: Sequence[int], residual: Tensor) -> bool:
        """Whether `input_backward` runs a tensor like `residual` along."""
        return self._kernels is not None and self._kernels.conv_backward_input_runs(
            grad, self.weight, size, self.layer.geometry, residual
        )

    def last_backward(
        self, grad: Tensor, output: Tensor, below: Pass
    ) -> tuple[Tensor, NormSums, Tensor, Tensor, tuple[Tensor, Tensor]] | None:
        """The backend's `norm_conv_backward_input`, likewise."""
        if self._kernels is None or below._kernels is None:
            return None
        return self._kernels.norm_conv_backward_input(
            grad,
            output,
            (self.raw, self.norm),
            self.weight,
            below.raw.shape[2:],
            self.layer.geometry,
            (below.raw, below.norm),
        )

    def norm_backward_from(
        self, grad: Tensor, sums: NormSums, need: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The norm's gradients from that behind it, which it may overwrite, and its sums."""
        total, dot, grad_weight = sums
        grad_input = None
        if need[0]:
            assert self._kernels is not None  # which found the sums
            batch = Sums(total, dot, grad.numel() // grad.size(1))
            grad_input, _ = self._kernels.batch_norm_act_backward_input(
                grad, self.raw, None, self.norm, "none", batch, False, True
            )
        return (grad_input, *self.norm_gradients(grad_weight, total, need))

    def norm_gradients(
        self, grad_weight: Tensor | None, grad_bias: Tensor | None, need: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of the weight and the bias, in their dtypes, where `need[1:]` asks for them."""
        _, _, weight, bias, _ = self.norm
        if not need[1] or weight is None or grad_weight is None:
            grad_weight = None
        else:
            grad_weight = grad_weight.to(weight.dtype)
        if not need[2] or bias is None or grad_bias is None:
            grad_bias = None
        else:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_weight, grad_bias

    def convolve(self, input: Tensor, by_library: bool = False) -> Tensor:
        """The convolution's output, which it keeps; where no kernel has it, by the library."""
        raw = None
        if self._direct is not None and not by_library:
            raw = self._direct.convolution(input, self.weight, self.bias, self.layer.geometry)
        if raw is None:
            run = conv2d if self._direct is None else plain_conv2d
            raw = run(input, self.weight, self.bias, *self.layer.geometry)
        self.raw = raw
        return raw

    def normalize(self, raw: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """With the batch's statistics, which it keeps."""
        _, _, weight, bias, eps = self.norm
        group = self.layer.group
        if group is not None:
            shared = mean, var, self.count = shared_statistics(raw, group)
            out = normalize(raw, shared, weight, bias, eps, residual, activation)
        else:
            run: Callable[..., tuple[Tensor, Tensor, Tensor]] = batch_norm_act_training
            if self._norms is not None:
                run = self._norms.batch_norm_act_training
            out, mean, var = run(raw, weight, bias, eps, residual, activation)
        self.norm = _new(Norm, (mean, var, weight, bias, eps))
        return out

    def pool(self, raw: Tensor, pool: Pool) -> tuple[Tensor, Tensor | None]:
        """`max_pool2d(normalize(raw, None, "relu"), *pool)`.

        And the maxima's places in their windows, where the backend keeps them.
        """
        found = None
        if self._kernels is not None:
            _, _, weight, bias, eps = self.norm
            found = self._kernels.batch_norm_relu_max_pool(raw, weight, bias, eps, pool)
        if found is None:
            return torch.max_pool2d(self.normalize(raw, None, "relu"), *pool), None
        out, offsets, mean, var = found
        self.norm = _new(Norm, (mean, var, *self.norm[2:]))
        return out, offsets

    def normalized(self) -> Tensor:
        """`relu(batch_norm(raw))` once more, to the same bits."""
        return self._normalized(None, "relu")

    def _normalized(self, residual: Tensor | None, activation: str) -> Tensor:
        run = batch_norm_act_inference
        if self._direct is not None:
            run = self._direct.batch_norm_act_inference
        return run(self.raw, self.norm, residual, activation)

    def saved(self, keep_raw: bool = True) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """What backward needs of it."""
        mean, var, _, _, _ = self.norm
        return (self.raw if keep_raw else None, mean, var, self.count)

    def norm_backward(
        self,
        grad: Tensor,
        output: Tensor | None,
        activation: str,
        need: Sequence[bool],
        overwrite: bool = False,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of the norm: of its input, weight, bias and residual."""
        group = self.layer.group
        if group is not None:
            assert self.count is not None
            processes = Processes(group, self.count)
            return shared_backward(
                grad, self.raw, output, self.norm, processes, activation, need, overwrite
            )
        if self._norms is None or grad.numel() == 0:
            return norm_act_backward(
                grad, self.raw, output, self.norm, activation, True, need, overwrite
            )
        grad_input, grad_weight, grad_bias, grad_residual = self._norms.batch_norm_act_backward(
            grad, self.raw, output, self.norm, activation, True, need, overwrite
        )
        return grad_input, *self.norm_gradients(grad_weight, grad_bias, need), grad_residual

    def conv_backward(
        self,
        grad: Tensor,
        input: Tensor,
        need: Sequence[bool],
        add_to: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias; the first is added to `add_to`, maybe in place."""
        grad_input = grad_weight = grad_bias = None
        need_input, need_weight, need_bias = need
        if need_input and self._direct is not None:
            grad_input = self._direct.conv_input_gradient(
                grad, input, self.weight, self.layer.geometry, add_to
            )
            if grad_input is not None:
                need_input, add_to = False, None
        if need_weight and self._direct is not None:
            grad_weight = self._direct.conv_weight_gradient(
                grad, input, self.weight, self.layer.geometry
            )
            need_weight = grad_weight is None
        if need_input or need_weight or need_bias:
            run = conv2d_backward if self._direct is None else plain_conv2d_backward
            by_library, weight_by_library, grad_bias = run(
                grad, input, self.weight, *self.layer.geometry, (need_input, need_weight, need_bias)
            )
            grad_input = by_library if need_input else grad_input
            grad_weight = weight_by_library if need_weight else grad_weight
        if add_to is not None and grad_input is not None:
            again = torch.is_grad_enabled()
            grad_input = grad_input + add_to if again else grad_input.add_(add_to)
        return grad_input, grad_weight, grad_bias


def kernels_for(tensor: Tensor) -> tuple[backends.Backend | None, bool]:
    """A `Pass`'s `kernels` and `is_direct`, where tensors are of this one's kind.

    Nothing that is to be differentiated again is a kernel's, nor are gradients of several
    cotangents at once.
    """
    if torch.is_grad_enabled() or gradients_batched():
        return None, False
    backend = backends.choose(tensor.device.type)
    return backend, backend.has_norm_kernels and is_plain(tensor)


def passes_of(
    layers: Sequence[Layer],
    parameters: Sequence[Any],
    kernels: tuple[backends.Backend | None, bool],
    saved: Sequence[Any] = (),
) -> list[Pass]:
    """A `Pass` for each layer, with its share of the parameters and of what was saved."""
    passes = []
    for i, layer in enumerate(layers):
        own = parameters[PARAMETERS * i : PARAMETERS * (i + 1)]
        kept: Any = (saved[SAVED * i : SAVED * (i + 1)],) if saved else ()
        passes.append(Pass(layer, own, *kernels, *kept))
    return passes


def is_computed_again(block: TrainedBlock, passes: Sequence[Pass], index: int) -> bool:
    """Whether backward computes the output of a convolution again that forward dropped."""
    return (
        block.low_memory and index >= block.main - 1 and passes[index].weight.shape[2:].numel() == 1
    )


def run_block(
    block: TrainedBlock, passes: Sequence[Pass], input: Tensor, hidden: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The block's output, and its mask as bits if the backend kept that.

    Appends the main convolutions' inputs to `hidden` if autograd records.
    """
    h = input
    before: Pass | None = None
    records = torch.is_grad_enabled()
    projection = passes[-1] if block.has_projection else None
    last = passes[block.main - 1]
    for step in passes:
        if step is projection:
            break
        if records:
            hidden.append(h)
        found = step.convolve_with_statistics(h, before)
        if not found and before is not None:
            h, before = before.normalized(), None
            found = step.convolve_with_statistics(h, None)
        if found:
            h, before = step.raw, step
            continue
        # Kernels that are not asked for statistics, being shared ones, may have the convolution.
        step.convolve(h, step.layer.group is None)
        if step is not last:
            h = step.normalize(step.raw, None, "relu")
    del h
    if projection is not None:
        if not projection.convolve_with_statistics(input, None):
            projection.convolve(input, projection.layer.group is None)
        shortcut = projection.raw
    else:
        shortcut = block.subsampled(input)
    both = last.add_relu(shortcut, projection)
    if both is None and projection is not None:
        shortcut = projection.finish(None, "none")
        both = last.add_relu(shortcut, None)
    return both or (last.finish(shortcut, "relu"), None)
