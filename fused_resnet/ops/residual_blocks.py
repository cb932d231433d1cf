"""`residual_blocks`: whole residual blocks in one call, where the backend has such a kernel.

A plain inference pass is spared the way through each convolution, and on the Triton backend the way
through memory between them. Compilers, autocast and dispatch modes see one operator, on backends
that `hold_blocks_in_graphs`; on others a block is to them its `conv_bn_act` calls, which compute
the same. To autograd it always is these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..layers import checks
from ..layers.description import TENSORS, Block, described_blocks, flattened_blocks, tensors_of
from ..layers.memory import lies_channels_last, memory_format_of
from . import operator_checks
from .conv_bn_act import conv_bn_act
from .registration import (
    autocast_tensor,
    has_foreign,
    is_plain,
    library,
    needs_grad,
    nothing_intercepts,
    register_autocast,
    register_fake,
    transforms_active,
)

library.define(
    "residual_blocks(Tensor input, Tensor?[] tensors, int[] numbers, float[] eps, "
    "int[] layer_counts, bool[] projections) -> Tensor"
)
_operator = torch.ops.fused_resnet.residual_blocks.default


def residual_blocks(input: Tensor, blocks: Sequence[Block]) -> Tensor | None:
    """Each block on the output of the last, `relu(conv_bn(... relu(conv_bn(x))) + shortcut)`.

    Args:
        input: (N, C, H, W), of the first block.
        blocks: in inference; those with a `step` only where `pads_shortcuts`.

    Returns:
        (N, K, P, Q), or None where the blocks have to be run convolution by convolution: the
        backend does not do these, or something besides the kernel has to see each of them.
    """
    tensors = tensors_of(blocks)
    if not nothing_intercepts(input, *tensors):
        if (
            _pads_a_shortcut(blocks)
            or has_foreign(input, *tensors)
            or not backends.hold_blocks_in_graphs(input.device.type)
            or not checks.blocks_fit(input, blocks)
        ):
            return None
        return _operator(input, *flattened_blocks(blocks))
    if needs_grad(input, *tensors):
        return None
    backend = backends.choose(input.device.type)
    given = input
    if backend.lays_channels_last and memory_format_of(input) is not torch.channels_last:
        input = backend.arranged(input)
    out = backend.residual_blocks(input, blocks)
    if out is None:
        if _pads_a_shortcut(blocks):
            return None
        # The modules' own way to a convolution takes as long as a small one.
        if len(blocks) == 1:
            fits = checks.plain_block_fits(input, blocks[0])
        else:
            fits = checks.blocks_fit(input, blocks)
        if not fits:
            return None
        out = input
        with torch._C._AutoDispatchBelowAutograd():
            for block in blocks:
                out = _by_convolutions(backend.conv_bn_act, out, block)
    if input is given or lies_channels_last(given, blocks):
        return out
    return out.contiguous()


def pads_shortcuts(input: Tensor) -> bool:
    """Whether `residual_blocks` takes shortcuts without parameters: `Block.step`."""
    return nothing_intercepts(input) and backends.choose(input.device.type).pads_shortcuts


def _pads_a_shortcut(blocks: Sequence[Block]) -> bool:
    for block in blocks:  # noqa: SIM110  (a generator is a call more)
        if block.step:
            return True
    return False


def _one_by_one(input: Tensor, blocks: Sequence[Block]) -> Tensor:
    """The blocks convolution by convolution."""
    for block in blocks:
        input = _by_convolutions(conv_bn_act, input, block)
    return input


def _by_convolutions(run: Callable[..., Tensor], input: Tensor, block: Block) -> Tensor:
    """A block by calls of `conv_bn_act`, the operator's or a backend's."""
    shortcut = input
    if block.has_projection:
        shortcut = run(input, block.layers[-1], None, "none")
    *first, last = block.main
    for layer in first:
        input = run(input, layer, None, "relu")
    return run(input, last, shortcut, "relu")


def _described(input: Tensor, *flat: Any) -> list[Block]:
    """The blocks, once nothing was found to be wrong with them."""
    blocks = operator_checks.described(input, *flat)
    if isinstance(blocks, Exception):
        raise blocks
    return blocks


def _run(input: Tensor, blocks: Sequence[Block]) -> Tensor:
    out = backends.choose(input.device.type).residual_blocks(input, blocks)
    return _one_by_one(input, blocks) if out is None else out


def _kernel(input: Tensor, *flat: Any) -> Tensor:
    return _run(input, _described(input, *flat))


library.impl("residual_blocks", _kernel, "CompositeExplicitAutograd")


@register_fake("residual_blocks", operator_checks.residual_blocks)
def blocks_output(
    input: Tensor,
    tensors: Sequence[Tensor | None],
    numbers: Sequence[int],
    eps: Sequence[float],
    layer_counts: Sequence[int],
    projections: Sequence[bool],
) -> Tensor:
    """A tensor like the blocks' output, for fake tensors."""
    for block in described_blocks(tensors, numbers, eps, layer_counts, projections):
        for weight, _, bias, stride, padding, dilation, groups in block.main:
            input = torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    return input


def _autograd(input: Tensor, tensors: Sequence[Tensor | None], *numbers: Any) -> Tensor:
    blocks = _described(input, tensors, *numbers)
    if transforms_active() or needs_grad(input, *tensors):
        return _one_by_one(input, blocks)
    # Another way through the dispatcher, with all these tensors, takes as long as the kernel's own.
    with torch._C._AutoDispatchBelowAutograd():
        if is_plain(input, *tensors):
            return _run(input, blocks)
        return _operator(input, tensors, *numbers)


library.impl("residual_blocks", _autograd, "Autograd")


def _cast(dtype: torch.dtype, device_type: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    input, tensors, *described = arguments
    tensors = [
        autocast_tensor(tensor, dtype, device_type) if i % TENSORS in (0, 5) else tensor
        for i, tensor in enumerate(tensors)
    ]
    return autocast_tensor(input, dtype, device_type), tensors, *described


register_autocast("residual_blocks", _cast)
