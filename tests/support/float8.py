"""float8_e4m3fn by hand: its numbers, rounding to them, and what a layer of a block may give."""

import numpy as np
import torch

# Every number of the format, in order; between neighbours lies the middle.
NUMBERS = np.array(
    sorted(
        {0.0, *(m * 2.0**-9 for m in range(8))}
        | {(8 + m) * 2.0 ** (e - 3) for e in range(-6, 9) for m in range(8) if (e, m) != (8, 7)}
    )
)
MIDDLES = (NUMBERS[1:] + NUMBERS[:-1]) / 2


def e4m3(values):
    """The nearest number of the format, of two the one whose last bit is zero."""
    size = np.abs(np.asarray(values, np.float64))
    above = np.searchsorted(MIDDLES, size, side="left")
    is_middle = (above < len(MIDDLES)) & (MIDDLES[np.minimum(above, len(MIDDLES) - 1)] == size)
    above = above + (is_middle & (above % 2 == 1))
    return np.copysign(NUMBERS[above], values)


def float64_sums(values, weight, conv):
    geometry = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return torch.conv2d(torch.from_numpy(values), torch.from_numpy(weight), None, *geometry).numpy()


def bounds(x, block, step):
    """The least and the largest that the output of a block of one layer may be, in its steps.

    e4m3 of the exact number, give or take what `reference.float8_residual_blocks` allows: of a sum
    of n products `n 2^-23` times the sum of their magnitudes, and 2^-22 of each term behind it.

    Args:
        x: (N, C, H, W), float32.
        block: of one convolution, or one and a projection.
        step: how `x` is stored.
    """
    column = lambda vector: vector.double().numpy().reshape(1, -1, 1, 1)  # noqa: E731
    stored = e4m3(np.clip((x * np.float32(1 / step)).numpy(), -448, 448))

    def summed(layer):
        weight = layer.weight.double().numpy()
        size = float64_sums(np.abs(stored), np.abs(weight), layer) * column(layer.scale.abs())
        room = layer.weight[0].numel() * 2.0**-23 * size
        return float64_sums(stored, weight, layer) * column(layer.scale), room

    layer = block.convs[0]
    own, room = summed(layer)
    terms = [own, column(layer.shift)]
    if block.has_projection:
        other, more = summed(block.convs[1])
        terms.append(other)
        room = room + more
    else:
        terms.append(stored * block.shortcut_scale)
    room = room + 2.0**-22 * sum(map(np.abs, terms))
    return tuple(e4m3(np.clip(sum(terms) + side * room, 0, 448)) for side in (-1, 1))
