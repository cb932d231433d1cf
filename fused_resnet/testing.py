"""How errors are measured, and the weights they are measured with."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

FACTOR = 1.5


def randomize_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every batch norm of a model random parameters and statistics, in place.

    A fresh model's (ones and zeros) would let a kernel that ignores them pass. The values keep the
    activations of a deep network in range: the last norm of a residual branch is scaled down as
    `zero_init_residual` would, but not to nothing.

    Args:
        model: any module; its other parameters stay as they are.
        seed: of the generator the values are drawn with.

    Returns:
        `model`.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float, like: Tensor) -> Tensor:
        values = torch.rand(like.shape, generator=generator, dtype=torch.float64)
        return (low + (high - low) * values).to(like)

    with torch.no_grad():
        for name, module in model.named_modules():
            if not isinstance(module, (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)):
                continue
            low, high = (0.2, 0.6) if _ends_branch(model, name) else (0.5, 1.5)
            for tensor, bounds in (
                (module.weight, (low, high)),
                (module.bias, (-0.5, 0.5)),
                (module.running_mean, (-0.5, 0.5)),
                (module.running_var, (0.5, 2.0)),
            ):
                if tensor is not None:
                    tensor.copy_(draw(*bounds, tensor))
    return model


def _ends_branch(model: nn.Module, name: str) -> bool:
    """Whether a norm's path is that of the last one of a residual branch."""
    block, _, attribute = name.rpartition(".")
    return attribute == ("bn3" if hasattr(model.get_submodule(block), "bn3") else "bn2")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64; NaN if a NaN is in one of them alone.

    Args:
        actual: any shape and dtype.
        expected: as `actual`, usually in float64.
    """
    if actual.shape != expected.shape:
        raise ValueError(
            f"relative_error: actual has shape {tuple(actual.shape)}, "
            f"expected has {tuple(expected.shape)}"
        )
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    equal = (actual == expected) | (actual.isnan() & expected.isnan())
    zero = torch.zeros((), dtype=torch.float64)
    difference = torch.linalg.vector_norm(torch.where(equal, zero, actual - expected))
    norm = torch.linalg.vector_norm(expected.nan_to_num(0.0, 0.0, 0.0))
    return (difference / norm).item() if difference != 0 else 0.0


def assert_error_rule(
    fused: Tensor, eager: Tensor, expected: Tensor, factor: float = FACTOR, what: str = "output"
) -> None:
    """Asserts that `fused` is as close to float64 as eager PyTorch is, within a factor.

    A floor of four float32 units (float64 for float64 tensors) stands in where eager is exact.

    Args:
        fused: the result under test.
        eager: eager PyTorch's result in the same dtype on the same inputs.
        expected: the same in float64.
        factor: how much larger the error of `fused` may be.
        what: how the message names the tensor.

    Raises:
        AssertionError: naming both errors.
    """
    assert fused.dtype == eager.dtype, f"{what}: dtype {fused.dtype}, eager has {eager.dtype}"
    unit = torch.finfo(torch.float64 if fused.dtype == torch.float64 else torch.float32).eps
    error, eager_error = relative_error(fused, expected), relative_error(eager, expected)
    limit = max(factor * eager_error, 4 * unit)
    assert error <= limit, (
        f"{what}: relative error {error:.3g} in {fused.dtype}, eager has {eager_error:.3g}, "
        f"the limit is {limit:.3g}"
    )
