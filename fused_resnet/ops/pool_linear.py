"""`pool_linear`: a network's head in one call, where the backend has such a kernel.

It is for plain inference only. To autograd, compilers, autocast and dispatch modes the head is
torch's own operators.
"""

from __future__ import annotations

from torch import Tensor

from .. import backends
from .registration import needs_grad, nothing_intercepts


def pool_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`linear(flatten(adaptive_avg_pool2d(input, 1), 1), weight, bias)`.

    Args:
        input: (N, C, H, W).
        weight: (K, C).
        bias: (K,) or None.

    Returns:
        (N, K), or None where torch's operators have to run one by one: the backend does not do
        these, or something besides the kernel has to see each of them.
    """
    tensors = (input, weight, bias)
    if input.dim() != 4 or not nothing_intercepts(*tensors) or needs_grad(*tensors):
        return None
    return backends.choose(input.device.type).pool_linear(*tensors)
