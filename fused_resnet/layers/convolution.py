"""torch's convolution and its gradients, kept from the shapes that oneDNN gets wrong.

On a CPU torch leaves most convolutions to oneDNN, some versions of which fail for a few shapes (as
3.12 does, which comes with torch 2.14):

- Where an output sees no column, or no row, of the image, only padding, a kernel is called that was
  never made: a segmentation fault, in any dtype.
- In 16 bits on processors with matrix registers (AMX), an output one column wide whose columns have
  a stride, and rows with a stride beyond the filter's height, read memory nobody has written.
- The gradient in the weight of a strided 1x1 convolution of fewer channels than fill a vector is
  summed up beyond the end of its scratch memory.
- Of a channels_last weight or input with a dimension of one element whose stride is not the usual
  one (it addresses nothing) other values are multiplied, with groups; without, the gradient in the
  weight is refused. Of inputs this is what torch does by itself, in float64 and where oneDNN lacks
  float16 or bfloat16.

Such a convolution is one of another shape as well, which these functions call instead: with the
padding written out, in float32, of every stride-th pixel, with the usual strides. The processor and
the version of oneDNN are not asked for, so results are the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

_aten = torch.ops.aten
# Channels of float32 in the widest vector.
_VECTOR = 16


class _Detour(NamedTuple):
    """What has to change before the library may have a convolution."""

    pad: bool  # write the padding out
    widen: bool  # compute in float32
    sample: bool  # take every stride-th pixel first, for the weight's gradient


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`torch.conv2d`, in the same layout; differentiable likewise.

    Args:
        input: (N, C, H, W).
        weight: (K, C / groups, R, S).
        bias: (K,) or None.
        stride: two numbers, as are the next two.
        padding: see `stride`.
        dilation: see `stride`.
        groups: how many groups the channels are in.
    """
    input, weight = _usual(input), _usual(weight)
    detour = _detour(input, weight, stride, padding, dilation)
    if detour is None:
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    dtype = input.dtype
    if detour.pad:
        input, padding = _padded(input, padding), (0, 0)
    if detour.widen:
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    if detour.sample and not any(padding):
        input, stride = _sampled(input, stride), (1, 1)
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups).to(dtype)


def conv2d_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of `conv2d` in its input, weight and bias, each where `need` asks for it.

    Args:
        grad: of the output, (N, K, P, Q).
        input: as the others up to `groups`, what `conv2d` was called with.
        weight: see `input`.
        stride: see `input`.
        padding: see `input`.
        dilation: see `input`.
        groups: see `input`.
        need: three of them.
    """
    input, weight = _usual(input), _usual(weight)
    detour = _detour(input, weight, stride, padding, dilation)
    if detour is None:
        return _backward(grad, input, weight, stride, padding, dilation, groups, need)
    dtype, (before_h, before_w), (H, W) = input.dtype, padding, input.shape[2:]
    if detour.pad:
        input, padding = _padded(input, padding), (0, 0)
    if detour.widen:
        grad, input, weight = grad.float(), input.float(), weight.float()
    need_input, need_weight, need_bias = need
    by_sample = need_weight and detour.sample and not any(padding)
    need = (need_input, need_weight and not by_sample, need_bias)
    grad_input = grad_weight = grad_bias = None
    if any(need):
        grad_input, grad_weight, grad_bias = _backward(
            grad, input, weight, stride, padding, dilation, groups, need
        )
    if by_sample:
        sampled = _sampled(input, stride)
        once, only = (1, 1), (False, True, False)
        grad_weight = _backward(grad, sampled, weight, once, (0, 0), once, groups, only)[1]
    if detour.pad and grad_input is not None:
        grad_input = grad_input[:, :, before_h : before_h + H, before_w : before_w + W]
    grads = (grad_input, grad_weight, grad_bias)
    return tuple(g if g is None else g.to(dtype) for g in grads)


def is_sound(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> bool:
    """Whether `conv2d` hands this convolution to the library as it is."""
    if _usual(input) is not input or _usual(weight) is not weight:
        return False
    return _detour(input, weight, stride, padding, dilation) is None


def _usual(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it is channels_last but for a stride that addresses nothing."""
    if tensor.dim() != 4 or tensor.layout is not torch.strided or tensor.stride(1) != 1:
        return tensor
    _, C, H, W = tensor.shape
    if C == 1 or H == W == 1 or tensor.stride() == (H * W * C, 1, W * C, C):
        return tensor
    if tensor.device.type != "cpu" or not tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor
    return tensor.clone(memory_format=torch.channels_last)


def _detour(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> _Detour | None:
    if input.device.type != "cpu" or input.dim() != 4 or weight.dim() != 4:
        return None
    channels, R, S = weight.shape[1:]
    stride_h, stride_w = stride
    # All that most convolutions are asked, for it costs as much as a small one's arithmetic.
    strided = stride_h > 1 or stride_w > 1
    reach_h, reach_w = dilation[0] * (R - 1), dilation[1] * (S - 1)
    beyond = padding[0] > reach_h or padding[1] > reach_w
    dilated = dilation[0] > 1 or dilation[1] > 1
    if not (strided or beyond or dilated):
        return None
    if min(padding) < 0 or min(stride) < 1 or min(dilation) < 1:
        return None  # torch refuses it
    H, W = input.shape[2:]
    # With taps further apart than the image is large, an output can look past both sides of it.
    pad = beyond or (R > 1 and dilation[0] > H) or (S > 1 and dilation[1] > W)
    pointwise = R == S == 1
    widen = (
        strided
        and not pointwise
        and input.dtype in (torch.bfloat16, torch.float16)
        and (stride_h > R or (stride_w > 1 and (W + 2 * padding[1] - reach_w - 1) // stride_w == 0))
    )
    sample = strided and pointwise and channels < _VECTOR
    return _Detour(pad, widen, sample) if pad or widen or sample else None


def _padded(input: Tensor, padding: Sequence[int]) -> Tensor:
    pad_h, pad_w = padding
    return F.pad(input, (pad_w, pad_w, pad_h, pad_h))


def _sampled(input: Tensor, stride: Sequence[int]) -> Tensor:
    # In the layout of `input`, by which the library chooses that of its output.
    sampled = input[:, :, :: stride[0], :: stride[1]]
    return sampled.contiguous(memory_format=suggest_memory_format(input))


def _backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    geometry = (list(stride), list(padding), list(dilation), False, [0, 0], groups)
    return _aten.convolution_backward(grad, input, weight, [weight.size(0)], *geometry, list(need))
