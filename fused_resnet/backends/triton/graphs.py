"""The kernels as `torch.library.triton_op`s, which is how `torch.compile` sees through them.

Eager calls do not come here: a call through these costs more than a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import triton_op

from ...layers import checks
from ...layers.activation import PLAIN
from ...layers.batching import rule_of
from ...layers.description import ConvNorm, Norm
from ...tuning.estimate import USUAL_POOL, kernel_for
from . import conv, stem
from .eligible import interpreted
from .problem import problem_of

_CONVOLUTION = (
    "Tensor input, Tensor weight, Tensor running_mean, Tensor running_var, Tensor? bn_weight, "
    "Tensor? bn_bias, float eps, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation"
)


_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def _check_convolution(
    name: str, input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str
) -> None:
    """Raises what is wrong with the arguments: a saved graph's, or anyone's.

    The kernels look at nothing, and would read and write where they are told to.
    """
    error = checks.conv_error(name, input, layer, residual, activation)
    if error is not None:
        raise error
    if input.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: input has dtype {input.dtype}, must have float16, bfloat16 or float32"
        )
    if input.device.type != "cuda" and not interpreted():
        raise ValueError(f"{name}: input is on {input.device}, must be on a GPU")


@triton_op(
    "fused_resnet::triton_conv_bn_act",
    mutates_args=(),
    schema=f"({_CONVOLUTION}, int groups, Tensor? residual, str activation) -> Tensor",
)
def triton_conv_bn_act(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    residual: Tensor | None,
    activation: str,
) -> Tensor:
    """`conv.conv_bn_act`."""
    norm = Norm(running_mean, running_var, bn_weight, bn_bias, eps)
    layer = ConvNorm(weight, norm, bias, stride, padding, dilation, groups)
    _check_convolution("triton_conv_bn_act", input, layer, residual, activation)
    return conv.conv_bn_act(input, layer, residual, activation)


@triton_op(
    "fused_resnet::triton_conv_bn_act_max_pool",
    mutates_args=(),
    schema=f"({_CONVOLUTION}, str activation) -> Tensor",
)
def triton_conv_bn_act_max_pool(
    input: Tensor,
    weight: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    bn_weight: Tensor | None,
    bn_bias: Tensor | None,
    eps: float,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """`stem.conv_bn_act_max_pool`."""
    name = "triton_conv_bn_act_max_pool"
    norm = Norm(running_mean, running_var, bn_weight, bn_bias, eps)
    layer = ConvNorm(weight, norm, bias, stride, padding, dilation, 1)
    _check_convolution(name, input, layer, None, activation)
    if activation not in PLAIN:
        raise ValueError(f"{name}: activation is {activation!r}, must be one of {', '.join(PLAIN)}")
    problem = problem_of(input, weight, stride, padding, dilation, 1, False, USUAL_POOL)
    if kernel_for(problem) != "stem_pool":
        raise ValueError(
            f"{name}: weight has shape {tuple(weight.shape)}, which is not that of a stem"
        )
    return stem.conv_bn_act_max_pool(input, layer, activation)


triton_conv_bn_act.register_vmap(rule_of(triton_conv_bn_act, (0, 12)))
triton_conv_bn_act_max_pool.register_vmap(rule_of(triton_conv_bn_act_max_pool, (0,)))
