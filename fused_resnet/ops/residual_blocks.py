"""`residual_blocks`: whole residual blocks in one call, where the backend has such a kernel.

It is no operator of its own: to compilers, autograd and autocast a block is its `conv_bn_act`
calls, which compute the same, and under autocast, `torch.compile` and `torch.export` it runs as
these. Elsewhere a plain inference pass is spared the way through each of them, and on the Triton
backend the way through memory between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import Tensor

from .. import backends
from .registration import needs_grad, nothing_intercepts

BlockLayers: TypeAlias = tuple[Sequence[tuple], bool]
"""The arguments of `conv_bn_act` from `weight` to `groups`, for each convolution of a block, and
whether the last of them makes the shortcut from the block's input."""


def residual_blocks(input: Tensor, blocks: Sequence[BlockLayers]) -> Tensor | None:
    """Each block on the output of the last, `relu(conv_bn(... relu(conv_bn(x))) + shortcut)`.

    Args:
        input: (N, C, H, W), of the first block.
        blocks: see `BlockLayers`.

    Returns:
        (N, K, P, Q), or None where the blocks have to be run convolution by convolution: the
        backend does not do these, or something besides the kernel has to see each of them.
    """
    tensors = [input]
    for layers, _ in blocks:
        for weight, running_mean, running_var, bn_weight, bn_bias, _, bias, *_ in layers:
            tensors += (weight, running_mean, running_var, bn_weight, bn_bias, bias)
    if not nothing_intercepts(*tensors) or needs_grad(*tensors):
        return None
    run = getattr(backends.choose(input.device.type), "residual_blocks", None)
    return None if run is None else run(input, blocks)
