"""Batch norm's inputs in training where digits are easily lost, and how results are judged."""

import math

import torch
import torch.nn.functional as F

from fused_resnet import functional
from fused_resnet.testing import FACTOR, relative_error


def outlier(place, value):
    """Normal values, all channels' first, middle or last of them replaced."""

    def values(x):
        x[:, place] = value
        return x

    return values


HARD = {
    "normal": lambda x: x,
    "positive": torch.abs,
    "outlier_first": outlier(0, 1e6),
    "outlier_middle": outlier(150, 1e6),
    "outlier_last": outlier(-1, 1e6),
    "small_outlier_first": outlier(0, 1e3),
    "squares_overflow_together": outlier(150, 1e19),
    "square_overflows": outlier(0, 3e37),
    "squares_overflow": lambda x: x * 1e37,
    "sum_of_squares_overflows": lambda x: x * 1e18,
    "subnormal_squares": lambda x: x * 1e-37,
    "mean_1e4": lambda x: x + 1e4,
    "mean_1e6": lambda x: x + 1e6,
    "little_variance": lambda x: 1 + x * 1e-6,
    "constant": lambda x: x * 0 + 1e6 / 3,
}


def hard_input(name, shape, dtype, memory_format):
    """Values as `name` says in each channel, or None where `dtype` has no such values."""
    N, channels, H, W = shape
    x = HARD[name](torch.randn(channels, N * H * W, dtype=torch.float64)).view(channels, N, H, W)
    x = x.transpose(0, 1).to(dtype).contiguous(memory_format=memory_format)
    return x if x.isfinite().all() else None


def results(function, x, grad):
    """Output, running statistics and gradients, with statistics in the accumulation dtype."""
    kept = torch.float64 if x.dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(1)
    x = x.detach().clone().requires_grad_()
    weight, bias = (
        torch.randn(x.size(1), generator=generator).to(x.device, kept).requires_grad_()
        for _ in "wb"
    )
    running = torch.zeros(2, x.size(1), dtype=kept, device=x.device).unbind(0)
    out = function(x, *running, weight, bias)
    gradients = torch.autograd.grad(out, (x, weight, bias), grad.to(out.dtype))
    names = ("output", "running_mean", "running_var", "grad_input", "grad_weight", "grad_bias")
    return dict(zip(names, (out.detach(), *running, *gradients), strict=True))


def fused(x, mean, var, weight, bias):
    return functional.batch_norm_act(
        x, mean, var, weight, bias, training=True, momentum=0.1, activation="none"
    )


def eager(x, mean, var, weight, bias):
    return F.batch_norm(x, mean, var, weight, bias, True, 0.1)


def rounded_parameters(x):
    """What rounding mean and shift to float32 does to normalised values, at most.

    Far from zero for the values' spread this is all there is of an error, and in which of two
    implementations it is the larger is chance.
    """
    var, mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
    return (torch.finfo(torch.float32).eps * mean.abs() * (var + 1e-5).rsqrt()).max().item()


def check(ours, x, grad):
    """The error rule for all of `results`, with what rounding parameters may do beside it."""
    theirs, exact = results(eager, x, grad), results(eager, x.double(), grad.double())
    for what, value in ours.items():
        error, eager_error = (relative_error(t, exact[what]) for t in (value, theirs[what]))
        limit = max(FACTOR * eager_error, 4 * torch.finfo(torch.float32).eps)
        if not what.startswith("running"):
            limit = max(limit, rounded_parameters(x))
        assert error <= limit or math.isnan(eager_error), (
            f"{what} of {tuple(x.shape)}, strides {x.stride()}: relative error {error:.3g}, "
            f"eager has {eager_error:.3g}, the limit is {limit:.3g}"
        )
