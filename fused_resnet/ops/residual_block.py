"""`residual_block`: the convolutions of a block in one call, where the backend has such a kernel.

It is no operator of its own: to compilers, autograd and autocast a block is its `conv_bn_act`
calls, which compute the same. This only spares a plain inference pass the way through each of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import backends
from .registration import needs_grad, nothing_intercepts


def residual_block(input: Tensor, layers: Sequence[tuple], has_projection: bool) -> Tensor | None:
    """`relu(conv_bn(... relu(conv_bn(input))) + shortcut)`.

    Args:
        input: (N, C, H, W).
        layers: the arguments of `conv_bn_act` from `weight` to `groups`, for each convolution.
        has_projection: whether the last of `layers` makes the shortcut from `input`.

    Returns:
        (N, K, P, Q), or None where the block has to be run convolution by convolution: the backend
        does not do these, or something besides the kernel has to see each of them.
    """
    tensors = [input]
    for weight, running_mean, running_var, bn_weight, bn_bias, _, bias, *_ in layers:
        tensors += (weight, running_mean, running_var, bn_weight, bn_bias, bias)
    if not nothing_intercepts(*tensors) or needs_grad(*tensors):
        return None
    run = getattr(backends.choose(input.device.type), "residual_block", None)
    return None if run is None else run(input, layers, has_projection)
