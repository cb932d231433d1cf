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

Such a convolution is one of another shape as well, which these functions call instead: of the taps
and pixels that meet, without padding, in float32, of every stride-th pixel, with the usual strides.
The processor and the version of oneDNN are not asked for, so results are the same everywhere.

Padding is never written out as zeros, which an infinite weight would make NaN: what is outside of
the image takes no part.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .description import output_size

# What an operator's wrapper in Python calls.
_convolution_backward = torch.ops.aten.convolution_backward.default._op
# Channels of float32 in the widest vector.
_VECTOR = 16


class _Detour(NamedTuple):
    """What has to change before the library may have a convolution."""

    split: bool  # into runs of outputs that see the same taps
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
    if detour.widen:
        input, weight = input.float(), weight.float()
        bias = None if bias is None else bias.float()
    if detour.split:
        return _by_runs(input, weight, bias, stride, padding, dilation, groups).to(dtype)
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
    grad, input, weight = _usual(grad), _usual(input), _usual(weight)
    detour = _detour(input, weight, stride, padding, dilation)
    if detour is None:
        return _backward(grad, input, weight, stride, padding, dilation, groups, need)
    dtype = input.dtype
    if detour.widen:
        grad, input, weight = grad.float(), input.float(), weight.float()
    if detour.split:
        grads = _backward_by_runs(grad, input, weight, stride, padding, dilation, groups, need)
        return _in(dtype, grads)
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
    return _in(dtype, (grad_input, grad_weight, grad_bias))


def plain_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d` of strided tensors of no class of their own, which is asked for once a shape.

    To be called where nothing traces or records.
    """
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    key = (input.shape, input.stride(), input.dtype, input.device, weight.shape, weight.stride())
    sound = _sound.get((*key, *geometry))
    if sound is None:
        sound = _remembered((*key, *geometry), is_sound(input, weight, *geometry))
    run = torch.conv2d if sound else conv2d
    return run(input, weight, bias, stride, padding, dilation, groups)


def plain_conv2d_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`conv2d_backward`, where `plain_conv2d` is what may be called."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    key = (input.shape, input.stride(), input.dtype, input.device, weight.shape, weight.stride())
    sound = _sound.get((*key, *geometry))
    if sound is None:
        sound = _remembered((*key, *geometry), is_sound(input, weight, *geometry))
    if not sound:
        return conv2d_backward(grad, input, weight, *geometry, groups, need)
    return _convolution_backward(
        grad, input, weight, [weight.size(0)], *geometry, False, [0, 0], groups, need
    )


# Of shapes, strides, dtype, device and geometry: what `is_sound` said.
_sound: dict[tuple[Any, ...], bool] = {}
_MOST_SOUND = 4096


def _remembered(key: tuple[Any, ...], sound: bool) -> bool:
    if len(_sound) >= _MOST_SOUND:
        _sound.clear()
    _sound[key] = sound
    return sound


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
    split = beyond or (R > 1 and dilation[0] > H) or (S > 1 and dilation[1] > W)
    pointwise = R == S == 1
    one_column = stride_w > 1 and (W + 2 * padding[1] - reach_w - 1) // stride_w == 0
    narrow = strided and not pointwise and (stride_h > R or one_column)
    # Runs add up to a gradient, which is rounded once.
    widen = (split or narrow) and input.dtype in (torch.bfloat16, torch.float16)
    sample = strided and pointwise and channels < _VECTOR
    return _Detour(split, widen, sample) if split or widen or sample else None


class _Run(NamedTuple):
    """Outputs next to each other in one dimension that see the same taps, or none."""

    outputs: tuple[int, int]  # the first, and the first after these, as in the next two
    taps: tuple[int, int]
    pixels: tuple[int, int]
    padding: int


def _runs(
    outputs: int, size: int, taps: int, stride: int, padding: int, dilation: int
) -> list[_Run]:
    """A convolution's outputs in one dimension, in order."""
    ordinary = padding <= dilation * (taps - 1) and (taps == 1 or dilation <= size)
    if ordinary or outputs < 1:  # torch refuses the latter
        return [_Run((0, outputs), (0, taps), (0, size), padding)]
    seen = []  # the outputs for which each tap is in the image
    for tap in range(taps):
        first = -((dilation * tap - padding) // stride)
        last = (size - 1 + padding - dilation * tap) // stride
        seen.append((min(max(first, 0), outputs), min(max(last + 1, 0), outputs)))
    ends = sorted({0, outputs, *(end for pair in seen for end in pair)})
    runs = []
    for start, stop in itertools.pairwise(ends):
        here = [tap for tap, (first, end) in enumerate(seen) if first <= start < end]
        if not here:
            runs.append(_Run((start, stop), (0, 0), (0, 0), 0))
            continue
        first, last = here[0], here[-1]
        begin = start * stride - padding + dilation * first
        end = (stop - 1) * stride - padding + dilation * last + 1
        runs.append(_Run((start, stop), (first, last + 1), (begin, end), 0))
    return runs


def _both_runs(
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[list[_Run], list[_Run]]:
    size, taps = input.shape[2:], weight.shape[2:]
    outputs = output_size(size, taps, stride, padding, dilation)
    rows, columns = map(_runs, outputs, size, taps, stride, padding, dilation)
    return rows, columns


def _cut(tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """A copy: the library mistakes strides of what is left of a channels_last tensor, see above."""
    part = tensor[:, :, rows[0] : rows[1], columns[0] : columns[1]]
    return part.clone(memory_format=torch.contiguous_format)


def _put_back(
    part: Tensor, whole: Tensor, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor:
    """`part` where `_cut` took it from `whole`, among zeros."""
    H, W = whole.shape[2:]
    return F.pad(part, (columns[0], W - columns[1], rows[0], H - rows[1]))


def _by_runs(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """`conv2d`, each run of rows and columns by itself; its arguments."""
    rows, columns = _both_runs(input, weight, stride, padding, dilation)
    # What sees nothing is no function of the input and the weight, but has gradients: zero.
    nothing = (input[:0].sum() + weight[:0].sum()).expand(1, weight.size(0), 1, 1)
    if bias is not None:
        nothing = nothing + bias.view(1, -1, 1, 1)
    parts = []
    for row in rows:
        along = []
        for column in columns:
            height, width = (end - start for start, end in (row.outputs, column.outputs))
            if row.taps[1] == 0 or column.taps[1] == 0:
                along.append(nothing.expand(input.size(0), -1, height, width))
                continue
            pixels = _cut(input, row.pixels, column.pixels)
            taps = _cut(weight, row.taps, column.taps)
            around = (row.padding, column.padding)
            along.append(conv2d(pixels, taps, bias, stride, around, dilation, groups))
        parts.append(torch.cat(along, 3))
    formats = {suggest_memory_format(tensor) for tensor in (input, weight)}
    last = torch.channels_last in formats
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.cat(parts, 2).contiguous(memory_format=memory_format)


def _backward_by_runs(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`conv2d_backward`, each run of rows and columns by itself; its arguments."""
    need_input, need_weight, need_bias = need
    grad_input = torch.zeros_like(input) if need_input else None
    grad_weight = torch.zeros_like(weight) if need_weight else None
    rows, columns = _both_runs(input, weight, stride, padding, dilation)
    for row, column in itertools.product(rows, columns):
        if row.taps[1] == 0 or column.taps[1] == 0 or not (need_input or need_weight):
            continue
        of_pixels, of_taps, _ = conv2d_backward(
            _cut(grad, row.outputs, column.outputs),
            _cut(input, row.pixels, column.pixels),
            _cut(weight, row.taps, column.taps),
            stride,
            (row.padding, column.padding),
            dilation,
            groups,
            (need_input, need_weight, False),
        )
        if of_pixels is not None and grad_input is not None:
            grad_input = grad_input + _put_back(of_pixels, input, row.pixels, column.pixels)
        if of_taps is not None and grad_weight is not None:
            grad_weight = grad_weight + _put_back(of_taps, weight, row.taps, column.taps)
    return grad_input, grad_weight, grad.sum((0, 2, 3)) if need_bias else None


def _in(
    dtype: torch.dtype, grads: Sequence[Tensor | None]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_input, of_weight, of_bias = (grad if grad is None else grad.to(dtype) for grad in grads)
    return of_input, of_weight, of_bias


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
    backward = torch.ops.aten.convolution_backward
    return backward(grad, input, weight, [weight.size(0)], *geometry, list(need))
