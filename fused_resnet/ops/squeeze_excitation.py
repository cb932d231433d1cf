"""`squeeze_excitation`: factors for channels, in one call where the backend has a kernel.

It is for plain inference only. To autograd, compilers, autocast and dispatch modes they are torch's
own operators.
"""

from __future__ import annotations

from torch import Tensor

from .. import backends
from ..layers.description import SqueezeExcitation
from .registration import needs_grad, nothing_intercepts


def squeeze_excitation(input: Tensor, layers: SqueezeExcitation) -> Tensor | None:
    """See `reference.squeeze_excitation`.

    Args:
        input: (N, C, H, W).
        layers: of C channels.

    Returns:
        As the input, or None where torch's operators have to run one by one: the backend does not
        do these, or something besides the kernel has to see each of them.
    """
    tensors = (input, *layers[:4])
    if input.dim() != 4 or not nothing_intercepts(*tensors) or needs_grad(*tensors):
        return None
    return backends.choose(input.device.type).squeeze_excitation(input, layers)
