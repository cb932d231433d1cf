"""Single convolutions and norms of a module, in one with what is around them where that fits.

Where it does not, these call the modules, which then raise what they raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends, reference
from ..layers import checks
from ..layers.description import ConvNorm, Norm
from ..ops import running_statistics
from ..ops.conv_bn_act import conv_bn_act
from ..ops.gradients import trains_activation
from ..ops.norm_conv_bn_act import norm_conv_bn_act
from ..ops.registration import is_exporting, needs_grad, transforms_active
from ..originals import AnyNorm, Conv2d
from . import norms
from .activations import is_relu, text_of
from .buffers import momentum_of
from .read import bare_layer, keeps_dtype, layer_of, norm_of, sync_group, uses_batch_statistics


def conv_norm_act(
    conv: nn.Conv2d,
    norm: AnyNorm,
    x: Tensor,
    residual: Tensor | None,
    act: nn.Module | None,
    narrow: bool = False,
    weight: Tensor | None = None,
) -> Tensor:
    """`act(norm(conv(x)) + residual)`, in one where the arguments allow, without hooks.

    Where they do not, this calls the modules, which then raise what they raise. If `narrow`, a
    residual of fewer channels stands for one with as many zeros before as behind them. `weight`
    stands in for the convolution's.
    """
    activation = text_of(act)
    assert activation is not None
    if uses_batch_statistics(norm):
        return _norm_act(norm, _conv(conv, x, weight), residual, act, narrow)
    layer = layer_of(conv, norm)
    if weight is not None:
        layer = layer._replace(weight=weight)
    if (
        (narrow or residual is None or residual.shape[1:2] == layer.weight.shape[:1])
        and checks.conv_error("conv_bn_act", x, layer, residual, activation) is None
        and keeps_dtype(norm, x)
    ):
        return conv_bn_act(x, layer, residual, activation)
    if narrow and residual is not None:
        residual = reference.pad_channels(residual, conv.out_channels)
    return _unfused_norm_act(norm, _conv(conv, x, weight), residual, act)


def left_to_modules(convs: Sequence[Any], x: Tensor, activated: bool) -> bool:
    """Whether convolutions, their norms and what follows run as modules because that is faster."""
    return (
        type(x) is Tensor
        and not torch.is_grad_enabled()
        and not transforms_active()  # whose tensors do not say how they lie
        and not torch.compiler.is_compiling()
        and x.dim() == 4
        and all(type(conv) is Conv2d for conv in convs)
        and backends.choose(x.device.type).prefers_modules(
            x, [(conv.weight, conv.stride, conv.groups) for conv in convs], activated
        )
    )


def _conv(conv: nn.Conv2d, x: Tensor, weight: Tensor | None) -> Tensor:
    return conv(x) if weight is None else conv._conv_forward(x, weight, conv.bias)


def norm_act(norm: AnyNorm, x: Tensor, relu: nn.ReLU) -> Tensor:
    """`relu(norm(x))` in one where the arguments allow, without hooks."""
    if uses_batch_statistics(norm):
        return _norm_act(norm, x, None, relu)
    frozen = norms.is_frozen(norm)
    described = norm_of(norm)
    error = checks.batch_norm_error("batch_norm_act", x, described, False, 0.0, None, "relu")
    if error is not None or x.dim() != 4 or (frozen and norm.weight.dtype is not x.dtype):
        return _unfused_norm_act(norm, x, None, relu)
    return running_statistics.run_batch_norm_act(x, described, False, 0.0, None, "relu")


class NormAct:
    """`relu(norm(x))`, for convolutions that can make it themselves while they load x.

    In inference they do where their arguments allow. Otherwise it is computed once, when it is
    first needed. Training and gradients keep what a convolution reads, so it is computed for them.

    Args:
        norm: a batch norm without hooks.
        x: (N, C, H, W).
        relu: without hooks.
    """

    def __init__(self, norm: AnyNorm, x: Tensor, relu: nn.ReLU) -> None:
        self._norm, self._x, self._relu = norm, x, relu
        self._computed: Tensor | None = None

    def tensor(self) -> Tensor:
        """All of it, in memory."""
        if self._computed is None:
            self._computed = norm_act(self._norm, self._x, self._relu)
        return self._computed

    def conv_norm_act(self, conv: nn.Conv2d, norm: AnyNorm, act: nn.Module | None) -> Tensor:
        """`conv_norm_act` of it, without a residual."""
        activation = text_of(act)
        assert activation is not None
        out = None
        if not uses_batch_statistics(norm) and keeps_dtype(norm, self._x):
            out = self._in_one(layer_of(conv, norm), activation)
        return out if out is not None else conv_norm_act(conv, norm, self.tensor(), None, act)

    def conv(self, conv: nn.Conv2d) -> Tensor:
        """A convolution of it that no norm follows."""
        out = None
        if has_kernel(conv, self._x):
            out = self._in_one(bare_layer(conv, self._x), "none")
        return out if out is not None else bare_conv(conv, self.tensor())

    def _in_one(self, layer: ConvNorm, activation: str) -> Tensor | None:
        norm, x = self._norm, self._x
        if (
            self._computed is not None
            or uses_batch_statistics(norm)
            or (norms.is_frozen(norm) and norm.weight.dtype is not x.dtype)
        ):
            return None
        before, name = norm_of(norm), "norm_conv_bn_act"
        if (
            needs_grad(x, *before, *layer.flat())
            or checks.conv_error(name, x, layer, None, activation) is not None
            or checks.prologue_error(name, x, before) is not None
        ):
            return None
        return norm_conv_bn_act(x, before, layer, None, activation)


def bare_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """`conv(x)`, without hooks, by our kernel where there is one and no gradients are recorded."""
    if has_kernel(conv, x) and not needs_grad(x, conv.weight, conv.bias):
        layer = bare_layer(conv, x)
        if checks.conv_error("conv_bn_act", x, layer, None, "none") is None:
            return conv_bn_act(x, layer, None, "none")
    return conv(x)


def has_kernel(conv: nn.Conv2d, x: Tensor) -> bool:
    """See `backends.has_kernel`; `x` is like the convolution's input."""
    return backends.has_kernel(x.device.type, x.dtype, conv.weight.shape, conv.groups)


def conv_add(conv: nn.Conv2d, x: Tensor, residual: Tensor) -> Tensor:
    """`conv(x) + residual` in one where the arguments allow, without hooks."""
    layer = bare_layer(conv, x)
    if checks.conv_error("conv_bn_act", x, layer, residual, "none") is None:
        return conv_bn_act(x, layer, residual, "none")
    return conv(x) + residual


def _norm_act(
    norm: nn.BatchNorm2d,
    x: Tensor,
    residual: Tensor | None,
    act: nn.Module | None,
    narrow: bool = False,
) -> Tensor:
    """`act(norm(x) + residual)` with batch statistics, kept as `BatchNorm2d.forward` does."""
    group = sync_group(norm)
    activation = text_of(act)
    assert activation is not None
    if act is not None and not is_relu(act):
        padded = narrow and residual is not None and residual.size(1) != x.size(1)
        if padded or group is not None or not trains_activation(x, residual, activation):
            return act(_norm_act(norm, x, residual, None, narrow))  # whose gradient is torch's own
    tracks = not norm.training or norm.track_running_stats
    running_mean = norm.running_mean if tracks else None
    running_var = norm.running_var if tracks else None
    momentum = 0.0 if norm.momentum is None else norm.momentum
    # `Norm(...)`, which may lack statistics.
    described = tuple.__new__(Norm, (running_mean, running_var, norm.weight, norm.bias, norm.eps))
    error = checks.batch_norm_error(
        "batch_norm_act", x, described, True, momentum, residual, activation, group is not None
    )
    if (
        error is not None
        or x.dim() != 4
        or (group is not None and torch.compiler.is_compiling())
        # Whoever exports a model to train it looks for torch's own norms.
        or is_exporting()
        or not (narrow or residual is None or residual.shape == x.shape)
    ):
        if narrow and residual is not None:
            residual = reference.pad_channels(residual, x.size(1))
        return _unfused_norm_act(norm, x, residual, act)
    if group is not None:
        return running_statistics.run_sync_batch_norm_act(
            x, described, momentum_of(norm), group, residual, activation
        )
    return running_statistics.run_batch_norm_act(
        x, described, True, momentum_of(norm), residual, activation
    )


def _unfused_norm_act(
    norm: nn.Module, x: Tensor, residual: Tensor | None, act: nn.Module | None
) -> Tensor:
    x = norms.alone(norm, x)
    if residual is not None:
        x += residual
    return x if act is None else act(x)
