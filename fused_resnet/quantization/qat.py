"""`prepare_qat`: training with the rounding of eight bits."""

from __future__ import annotations

from torch import nn

from .. import blocks, swap
from ..layers.quantized import LARGEST
from ..layers.ranges import BlockRanges
from ..modules import fake_quantized, quantized
from ..modules.fake_quantized import FakeQuantization, MovingRange
from .quantize import NO_BLOCK, checked_dtype, drop_ends, in_inference_mode, restored_on_error


def prepare_qat(
    model: nn.Module, *, dtype: str = "int8", averaging_constant: float = 0.01
) -> nn.Module:
    """Makes a model's residual blocks train, and infer, with the rounding of eight bits, in place.

    The model is fused. Its blocks then run in floating point, convolution by convolution, with
    every activation and weight rounded where `quantize` will round it; gradients go straight
    through the rounding, and are zero where a value is beyond its range. Ranges follow the batches
    in training mode, as moving averages of their smallest and largest values, and stay in
    inference mode. Parameters and `state_dict` keys stay what they are. When the model is trained,
    `quantize(model)` switches to eight bits with these ranges.

    Training starts from the ranges of a model that is quantized, or prepared already. The usual
    recipe: train in floating point, quantize with a few batches, call this, and train on with a
    small learning rate.

    Args:
        model: any module with residual blocks that `fuse` knows.
        dtype: "int8"; see `quantize`.
        averaging_constant: how far a batch moves a range towards its own, 0 (not at all) to 1 (all
            the way); torch.ao's 0.01.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: an argument is none of the above, or there is no residual block. The model is
            then as it was.
    """
    checked_dtype("prepare_qat", dtype, ("int8",))
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"prepare_qat: model is a {type(model).__name__}, must be a torch.nn.Module"
        )
    if not 0 <= averaging_constant <= 1:
        raise ValueError(f"prepare_qat: averaging_constant is {averaging_constant}, must be 0 to 1")
    with restored_on_error(model):
        swap.fuse_remaining(model)
        found = [
            (path, block)
            for path, block in model.named_modules()
            if quantized.is_quantizable(block)
        ]
        if not found:
            raise ValueError(NO_BLOCK.format("prepare_qat"))
        together: list[FakeQuantization] = []
        with in_inference_mode(model):
            for path, block in found:
                together.append(_prepared(path, block, averaging_constant, together))
        for (_, block), kept in zip(found, together, strict=True):
            vars(block)["quantization"] = kept
            blocks.release(block)
        drop_ends(model)  # whose ranges meet those of blocks, which training moves
    return model


def _prepared(
    path: str, block: nn.Module, averaging_constant: float, together: list[FakeQuantization]
) -> FakeQuantization:
    before = block.quantization
    reason = quantized.float_reason(block) or ""
    ranges = [MovingRange() for _ in quantized.names_of_activations(block)]
    if (trained := fake_quantized.of(block)) is not None:
        ranges = trained.ranges_read()
    elif isinstance(before, BlockRanges) and before.ranges and before.dtype == "int8":
        ranges = [
            MovingRange(
                (-stored.zero_point * stored.step, (LARGEST - stored.zero_point) * stored.step)
            )
            for stored in before.ranges
        ]
    shapes = quantized.shapes_of(block)
    return FakeQuantization(path, shapes, reason, ranges, averaging_constant, together)
