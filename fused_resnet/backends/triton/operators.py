"""The kernels as `torch.library.triton_op`s, which is how `torch.compile` sees through them.

Eager calls do not come here: a call through these costs more than a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.library import triton_op

from . import conv

_CONVOLUTION = (
    "Tensor input, Tensor weight, Tensor running_mean, Tensor running_var, Tensor? bn_weight, "
    "Tensor? bn_bias, float eps, Tensor? bias, int[2] stride, int[2] padding, int[2] dilation"
)


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
    return conv.conv_bn_act(
        input,
        weight,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        eps,
        bias,
        stride,
        padding,
        dilation,
        groups,
        residual,
        activation,
    )


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
    """`conv.conv_bn_act_max_pool`."""
    return conv.conv_bn_act_max_pool(
        input,
        weight,
        running_mean,
        running_var,
        bn_weight,
        bn_bias,
        eps,
        bias,
        stride,
        padding,
        dilation,
        activation,
    )
