"""Blocks in eight bits for backends whose bits are compared with the reference's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_resnet.layers.quantized import QuantizedBlock, QuantizedConv


def conv(
    rng: torch.Generator,
    filters: int,
    channels: int,
    size: int | tuple[int, int] = 3,
    stride: int | tuple[int, int] = 1,
    padding: tuple[int, int] | None = None,
    dilation: int = 1,
    groups: int = 1,
) -> QuantizedConv:
    """A convolution whose outputs fill the 256 steps and go beyond both ends."""
    R, S = (size, size) if isinstance(size, int) else size
    p, q = (dilation * (R // 2), dilation * (S // 2)) if padding is None else padding
    shape = (filters, channels // groups, R, S)
    weight = torch.randint(-127, 128, shape, generator=rng, dtype=torch.int8)
    depth = weight[0].numel()
    scale = (torch.rand(filters, generator=rng) + 0.5) / (depth**0.5 * 80)
    shift = 80 * torch.randn(filters, generator=rng) + 60
    step = (stride, stride) if isinstance(stride, int) else stride
    return QuantizedConv(weight, scale, shift, step, (p, q), (dilation, dilation), groups)


def images(rng: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (4 * torch.randn(shape, generator=rng)).to(dtype)


def laid_out_images(rng: torch.Generator, layout: str, dtype: torch.dtype) -> Tensor:
    """(2, 6, 7, 7), "channels_last", "every other" element of a larger tensor, or "expanded"."""
    if layout == "every other":
        return images(rng, 2, 12, 7, 14, dtype=dtype)[:, ::2, :, ::2]
    input = images(rng, 2, 6, 7, 7, dtype=dtype)
    if layout == "channels_last":
        return input.to(memory_format=torch.channels_last)
    return input[:1].expand(2, -1, -1, -1)


SHAPES: dict[str, Callable[[torch.Generator], tuple[Sequence[QuantizedBlock], tuple[int, ...]]]] = {
    "more channels than a step": lambda g: (
        [QuantizedBlock((conv(g, 150, 140, 1), conv(g, 140, 150, 1)), False, 0.7)],
        (2, 140, 3, 3),
    ),
    "more pixels than a tile": lambda g: (
        [QuantizedBlock((conv(g, 5, 3), conv(g, 3, 5)), False, 1.3)],
        (3, 3, 13, 11),
    ),
    "bottleneck with a projection": lambda g: (
        [
            QuantizedBlock(
                (conv(g, 8, 20, 1), conv(g, 8, 8, 3, 2), conv(g, 24, 8, 1), conv(g, 24, 20, 1, 2)),
                True,
                1.0,
            )
        ],
        (2, 20, 7, 9),
    ),
    "groups that fill no tile": lambda g: (
        [QuantizedBlock((conv(g, 12, 18, 3, groups=6), conv(g, 18, 12, 1)), False, 0.4)],
        (1, 18, 6, 5),
    ),
    "filters that are not square, dilation, uneven steps": lambda g: (
        [
            QuantizedBlock(
                (
                    conv(g, 6, 6, (1, 5), (1, 1), (0, 4), 2),
                    conv(g, 9, 6, (5, 2), (3, 2), (2, 1)),
                    conv(g, 9, 6, 1, (3, 2)),
                ),
                True,
                1.0,
            )
        ],
        (2, 6, 8, 9),
    ),
    "one block on the other": lambda g: (
        [
            QuantizedBlock((conv(g, 6, 6), conv(g, 6, 6)), False, 0.9),
            QuantizedBlock((conv(g, 8, 6, 3, 2), conv(g, 8, 8), conv(g, 8, 6, 1, 2)), True, 1.0),
            QuantizedBlock((conv(g, 8, 8),), False, 1.1),
        ],
        (2, 6, 7, 7),
    ),
}
