"""What every convolution on a unit of the CPU is held to: AMX's tiles, AVX512_BF16's pairs.

The test files of the units call these with their own shapes, dtypes and marks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import fused_resnet
from fused_resnet.layers.description import Norm

from . import (
    STEM,
    STEM_POOL,
    ConvShape,
    assert_within_bound,
    conv_layouts,
    make_conv_case,
    make_norm_conv_case,
)
from .threads import with_threads


def check_layouts(shape: ConvShape, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Inputs and residuals of every layout, images of `size` or what the filter needs."""
    reach = [d * (k - 1) + 1 for d, k in zip(shape.dilation, shape.kernel_size, strict=True)]
    size = (max(size[0], reach[0]), max(size[1], reach[1]))
    for batch, residual, activation in ((1, True, "none"), (3, False, "relu")):
        case = make_conv_case(
            shape, batch=batch, size=size, dtype=dtype, residual=residual, activation=activation
        )
        expected, bound = case.double().eager(), case.rounding_bound()
        for x in conv_layouts(case.input):
            case.input = x
            assert_within_bound(case.fused(), expected, bound)
        if residual:
            case.residual = case.residual.contiguous()
            assert_within_bound(case.fused(), expected, bound)


def check_many_tasks(dtype: torch.dtype) -> None:
    """More rows than a task takes, weights that do not stay in the cache, on any threads."""
    for shape, size, batch in (
        (ConvShape(64, 64, (3, 3), padding=(1, 1)), (40, 41), 4),
        (ConvShape(512, 1040, (3, 3), padding=(1, 1)), (3, 5), 2),
        (ConvShape(64, 256, (1, 1)), (40, 41), 3),
        (ConvShape(288, 64, (1, 1), (2, 2)), (21, 19), 5),
    ):
        case = make_conv_case(shape, batch=batch, size=size, dtype=dtype)
        one, three = with_threads(case.fused, 1, 3)
        assert torch.equal(one, three)
        assert_within_bound(one, case.double().eager(), case.rounding_bound())


def check_stem_with_its_pool(channels_last: bool, dtype: torch.dtype) -> None:
    """Of two sizes, channels_last or not."""
    for size in ((33, 70), (20, 9)):
        case = make_conv_case(STEM, size=size, batch=3, dtype=dtype, pool=STEM_POOL)
        if not channels_last:
            case.input = case.input.contiguous()
        # The pool takes the maximum of what was rounded, and rounding is monotonic.
        pool = case.pool
        case.pool = None
        expected, bound = case.double().eager(), case.rounding_bound()
        case.pool = pool
        most = F.max_pool2d(bound, **pool)
        assert_within_bound(case.fused(), F.max_pool2d(expected, **pool), most)


def check_prologue(shape: ConvShape, dtype: torch.dtype) -> None:
    """A norm and a ReLU before the convolution, on inputs of every layout."""
    case = make_norm_conv_case(shape, size=(11, 10), dtype=dtype)
    expected, bound = case.double().eager(), case.rounding_bound()
    for x in conv_layouts(case.input):
        case.input = x
        assert_within_bound(case.fused(), expected, bound)


def check_gradient_in_the_input(add: bool, dtype: torch.dtype, slack: float = 2e-6) -> None:
    """The forward's kernel with transposed weights, whose taps run backwards.

    Args:
        add: whether there is a gradient to add it to.
        dtype: of all tensors.
        slack: of sums in float32, by the largest value; they are rounded once.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        drawn = torch.randn(sizes, generator=generator).to(dtype)
        return drawn.to(memory_format=torch.channels_last)

    for c, k, taps, stride, padding, dilation in (
        (64, 96, (3, 3), 1, (1, 1), 1),
        (33, 20, (2, 3), 1, (1, 3), 2),
        (33, 21, (2, 3), 1, (1, 3), 2),
        (40, 64, (1, 1), 1, (0, 0), 1),
        (96, 32, (1, 1), 2, (0, 0), 1),
        (5, 7, (5, 1), 1, (2, 0), 1),
    ):
        weight, x = draw(k, c, *taps), draw(2, c, 11, 9)
        wide = x.double().requires_grad_()
        out = F.conv2d(wide, weight.double(), None, stride, padding, dilation)
        grad = draw(*out.shape)
        out.backward(grad.double())
        before = draw(*x.shape) if add else None
        expected = wide.grad + (before.double() if add else 0)
        actual = fused_resnet.backends.cpu.conv_input_gradient(
            grad, x, weight, ((stride,) * 2, padding, (dilation,) * 2, 1), before
        )
        error = (actual.double() - expected).abs()
        limit = expected.abs() * torch.finfo(dtype).eps + slack * expected.abs().max()
        assert (error <= limit).all()


def check_forward_in_training(dtype: torch.dtype, batch: int, size: tuple[int, int]) -> None:
    """The convolution, with a norm before it, and its output's statistics, on any threads."""
    cpu = fused_resnet.backends.cpu
    generator = torch.Generator().manual_seed(0)
    for c, k, taps, stride, padding, groups in (
        (64, 96, 3, 1, 1, 1),
        (33, 70, 3, 2, 1, 1),
        (64, 160, 1, 1, 0, 1),
        (3, 40, 7, 2, 3, 1),
        (64, 96, 3, 1, 1, 2),
    ):
        x = torch.randn(batch, c, *size, generator=generator) + 1
        weight = torch.randn(k, c // groups, taps, taps, generator=generator)
        x, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in (x, weight))
        bias = torch.randn(k, generator=generator).to(dtype) * 30  # a mean that is not near zero
        geometry = ((stride,) * 2, (padding,) * 2, (1, 1), groups)
        mean, bn_weight, bn_bias = torch.randn(3, c, generator=generator)
        norm = Norm(mean, torch.rand(c, generator=generator) + 0.5, bn_weight, bn_bias, 1e-5)
        for before in (None, norm):
            arguments = (x, weight, bias, geometry, before)
            one, three = with_threads(
                lambda arguments=arguments: cpu.conv_batch_norm_statistics(*arguments), 1, 3
            )
            assert all(map(torch.equal, one, three))
            out, mean, variance = one
            h = x if before is None else cpu.batch_norm_act_inference(x, norm, None, "relu")
            exact = F.conv2d(h.double(), weight.double(), bias.double(), stride, padding, 1, groups)
            error = (out.double() - exact).abs()
            limit = exact.abs() * torch.finfo(dtype).eps + 2e-6 * exact.abs().max()
            assert (error <= limit).all()
            values = out.double().transpose(0, 1).flatten(1)
            torch.testing.assert_close(mean.double(), values.mean(1), rtol=2e-7, atol=1e-6)
            expected = values.var(1, unbiased=False)
            torch.testing.assert_close(variance.double(), expected, rtol=1e-6, atol=0)
            if before is None:
                assert torch.equal(cpu.convolution(x, weight, bias, geometry), out)


def check_explanation(unit: str) -> None:
    """What `explain` says of bfloat16, whatever the image."""
    arguments = {"device": torch.device("cpu"), "dtype": torch.bfloat16}
    for operator, what in (
        ("conv_bn_act", "native convolution"),
        ("norm_conv_bn_act", "native norm + convolution"),
    ):
        text = fused_resnet.backends.explain(operator, weight_shape=(64, 64, 3, 3), **arguments)
        assert text == f"cpu: {what} ({unit})"
