"""The layers of a block in training: convolution, statistics, norm, and the gradients of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from ...layers.convolution import conv2d, conv2d_backward
from ...layers.description import PARAMETERS, Block, Layer, Norm, Sums
from ..batch_norm_act_inference import batch_norm_act_inference
from ..batch_norm_act_training import batch_norm_act_training
from ..gradients import norm_act_backward
from ..registration import gradients_batched, is_plain
from ..sync_batch_norm_act import Processes, normalize, shared_backward, shared_statistics

Statistics = tuple[Tensor, Tensor, Tensor | None]
"""A batch's mean and biased variance, (C,) each, and how many values a channel (): None stands for
this process's own."""


class Pass:
    """One layer's tensors, and its steps in both directions."""

    def __init__(self, layer: Layer, parameters: Sequence[Tensor | None]) -> None:
        self.layer = layer
        self.weight, self.bias, self.bn_weight, self.bn_bias = parameters
        self.raw: Tensor | None = None
        self.mean: Tensor | None = None
        self.var: Tensor | None = None
        self.count: Tensor | None = None
        self._asked = False
        self._runs_on: backends.Backend | None = None

    @property
    def norm(self) -> Norm:
        """The norm's statistics, weight, bias and eps, as backends take them."""
        return Norm(self.mean, self.var, self.bn_weight, self.bn_bias, self.layer.eps)

    def _backend(self, tensor: Tensor) -> backends.Backend | None:
        """Whose kernels may run it: statistics are our own, and nothing looks at single steps.

        Asked once, since a pass is made for one direction of one call.
        """
        if not self._asked:
            self._asked = True
            own = self.layer.group is None and not torch.is_grad_enabled()
            if own and not gradients_batched():
                self._runs_on = backends.choose(tensor.device.type)
        return self._runs_on

    def convolve_with_statistics(self, input: Tensor, before: Pass | None) -> bool:
        """In one, where the backend does; `before` is the layer whose norm the input lacks."""
        if (backend := self._backend(input)) is None:
            return False
        prologue = None if before is None else before.norm
        found = backend.conv_batch_norm_statistics(
            input, self.weight, self.bias, self.layer.geometry, prologue
        )
        if found is None:
            return False
        self.raw, self.mean, self.var = found
        return True

    def finish(self, residual: Tensor | None, activation: str) -> Tensor:
        """`normalize`, with the statistics that the convolution may have found."""
        if self.mean is None:
            return self.normalize(self.raw, residual, activation)
        return batch_norm_act_inference(self.raw, self.norm, residual, activation)

    def add_relu(
        self, shortcut: Tensor, projection: Pass | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """The block's output and its mask, if the backend has one kernel for both norms."""
        backend = self._backend(self.raw)
        if backend is None or (projection is not None and projection.layer.group is not None):
            return None
        norm = None if projection is None else projection.norm
        found = backend.batch_norm_add_relu(self.raw, self.norm, shortcut, norm)
        if found is None:
            return None
        output, mask, (self.mean, self.var), statistics = found
        if projection is not None:
            projection.mean, projection.var = statistics
        return output, mask

    def add_relu_backward(
        self, grad: Tensor, mask: Tensor, projection: Pass
    ) -> tuple[tuple, tuple] | None:
        """The gradients of both norms behind `add_relu`, from one kernel; or None."""
        backend = self._backend(grad)
        if backend is None or projection.layer.group is not None:
            return None
        return backend.batch_norm_add_relu_backward(
            grad, mask, self.raw, self.norm, projection.raw, projection.norm
        )

    def input_backward(
        self,
        grad: Tensor,
        size: Sequence[int],
        residual: Tensor | None,
        below: Pass | None,
        residual_mask: Tensor | None = None,
    ) -> tuple[Tensor, tuple | None] | None:
        """The backend's `conv_backward_input`, where it has one that runs this."""
        backend = (self if below is None else below)._backend(grad)
        if backend is None:
            return None
        behind = None if below is None else (below.raw, below.norm)
        geometry = self.layer.geometry
        return backend.conv_backward_input(
            grad, self.weight, size, geometry, residual, behind, residual_mask
        )

    def adds_to_input_gradient(self, grad: Tensor, size: Sequence[int], residual: Tensor) -> bool:
        """Whether `input_backward` runs a tensor like `residual` along."""
        backend = self._backend(grad)
        return backend is not None and backend.conv_backward_input_runs(
            grad, self.weight, size, self.layer.geometry, residual
        )

    def last_backward(self, grad: Tensor, output: Tensor, below: Pass) -> tuple | None:
        """The backend's `norm_conv_backward_input`, likewise."""
        backend = self._backend(grad)
        if backend is None or below.layer.group is not None:
            return None
        size, geometry = below.raw.shape[2:], self.layer.geometry
        behind = (self.raw, self.norm)
        return backend.norm_conv_backward_input(
            grad, output, behind, self.weight, size, geometry, (below.raw, below.norm)
        )

    def norm_backward_from(
        self, grad: Tensor, sums: tuple[Tensor, Tensor, Tensor], need: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The norm's gradients from that behind it, which it may overwrite, and its sums."""
        total, dot, grad_weight = sums
        grad_input = None
        if need[0]:
            batch = Sums(total, dot, grad.numel() // grad.size(1))
            grad_input, _ = backends.choose(grad.device.type).batch_norm_act_backward_input(
                grad, self.raw, None, self.norm, "none", batch, False, True
            )
        return (grad_input, *self.norm_gradients(grad_weight, total, need))

    def norm_gradients(
        self, grad_weight: Tensor, grad_bias: Tensor, need: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Those of the weight and the bias, in their dtypes, where `need[1:]` asks for them."""
        return (
            grad_weight.to(self.bn_weight.dtype) if need[1] else None,
            grad_bias.to(self.bn_bias.dtype) if need[2] else None,
        )

    def convolve(self, input: Tensor) -> Tensor:
        """The convolution's output, which it keeps."""
        self.raw = conv2d(input, self.weight, self.bias, *self.layer.geometry)
        return self.raw

    def normalize(self, raw: Tensor, residual: Tensor | None, activation: str) -> Tensor:
        """With the batch's statistics, which it keeps."""
        group = self.layer.group
        if group is not None:
            shared = self.mean, self.var, self.count = shared_statistics(raw, group)
            return normalize(
                raw, shared, self.bn_weight, self.bn_bias, self.layer.eps, residual, activation
            )
        out, self.mean, self.var = batch_norm_act_training(
            raw, self.bn_weight, self.bn_bias, self.layer.eps, residual, activation
        )
        return out

    def pool(self, raw: Tensor, pool: tuple) -> tuple[Tensor, Tensor | None]:
        """`max_pool2d(normalize(raw, None, "relu"), *pool)`.

        And the maxima's places in their windows, where the backend keeps them.
        """
        backend, found = self._backend(raw), None
        if backend is not None:
            found = backend.batch_norm_relu_max_pool(
                raw, self.bn_weight, self.bn_bias, self.layer.eps, pool
            )
        if found is None:
            return torch.max_pool2d(self.normalize(raw, None, "relu"), *pool), None
        out, offsets, self.mean, self.var = found
        return out, offsets

    def normalized(self) -> Tensor:
        """`relu(batch_norm(raw))` once more, to the same bits."""
        return batch_norm_act_inference(self.raw, self.norm, None, "relu")

    def saved(self, keep_raw: bool = True) -> tuple[Tensor | None, ...]:
        """What backward needs of it; see `restore`."""
        return (self.raw if keep_raw else None, self.mean, self.var, self.count)

    def restore(self, saved: Sequence[Tensor | None]) -> None:
        """Takes back what `saved` returned."""
        self.raw, self.mean, self.var, self.count = saved

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
            processes = Processes(group, self.count)
            return shared_backward(
                grad, self.raw, output, self.norm, processes, activation, need, overwrite
            )
        return norm_act_backward(
            grad, self.raw, output, self.norm, activation, True, tuple(need), overwrite
        )

    def conv_backward(
        self,
        grad: Tensor,
        input: Tensor,
        need: Sequence[bool],
        add_to: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of input, weight and bias; the first is added to `add_to`, maybe in place."""
        grad_input = grad_weight = grad_bias = None
        need_input, *need_parameters = need
        backend = backend_of(grad)
        if need_input and backend is not None:
            grad_input = backend.conv_input_gradient(
                grad, input, self.weight, self.layer.geometry, add_to
            )
            if grad_input is not None:
                need_input, add_to = False, None
        if need_input or any(need_parameters):
            by_library, grad_weight, grad_bias = conv2d_backward(
                grad, input, self.weight, *self.layer.geometry, (need_input, *need_parameters)
            )
            grad_input = by_library if need_input else grad_input
        if add_to is not None and grad_input is not None:
            again = torch.is_grad_enabled()
            grad_input = grad_input + add_to if again else grad_input.add_(add_to)
        return grad_input, grad_weight, grad_bias


def backend_of(grad: Tensor) -> backends.Backend | None:
    """Whose kernels may run a backward pass; None if that is to be differentiated again."""
    if torch.is_grad_enabled() or not is_plain(grad):
        return None
    return backends.choose(grad.device.type)


def passes_of(layers: Sequence[Layer], parameters: Sequence[Tensor | None]) -> list[Pass]:
    """A `Pass` for each layer, with its share of the parameters."""
    return [
        Pass(layer, parameters[PARAMETERS * i : PARAMETERS * (i + 1)])
        for i, layer in enumerate(layers)
    ]


def is_computed_again(block: Block, passes: Sequence[Pass], index: int) -> bool:
    """Whether backward computes the output of a convolution again that forward dropped."""
    return (
        block.low_memory and index >= block.main - 1 and passes[index].weight.shape[2:].numel() == 1
    )


def run_block(
    block: Block, passes: Sequence[Pass], input: Tensor, hidden: list[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """The block's output, and its mask as bits if the backend kept that.

    Appends the main convolutions' inputs to `hidden` if autograd records.
    """
    h, before = input, None
    for step in passes[: block.main]:
        if torch.is_grad_enabled():
            hidden.append(h)
        if not step.convolve_with_statistics(h, before):
            if before is not None:
                h, before = before.normalized(), None
            if not step.convolve_with_statistics(h, None):
                step.convolve(h)
                if step is not passes[block.main - 1]:
                    h = step.normalize(step.raw, None, "relu")
                continue
        h, before = step.raw, step
    del h
    if block.has_projection:
        projection = passes[-1]
        if not projection.convolve_with_statistics(input, None):
            projection.convolve(input)
        shortcut = projection.raw
    else:
        projection, shortcut = None, block.subsampled(input)
    last = passes[block.main - 1]
    found = last.add_relu(shortcut, projection)
    if found is None and projection is not None:
        shortcut = projection.finish(None, "none")
        found = last.add_relu(shortcut, None)
    return found or (last.finish(shortcut, "relu"), None)
