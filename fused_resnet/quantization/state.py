"""The ranges of a quantized model by themselves: as data, and as a file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .. import files, forms, swap
from ..layers.quantized import EIGHT_BITS, FLOAT8, LARGEST, WORD_ZERO_POINT, Quantization, float32
from ..layers.ranges import BlockRanges, HeadRanges, StemRanges
from ..modules import quantized
from .calibrate import Found
from .quantize import dequantize, restored_on_error, set_ranges, trained_ranges

SCHEMA = "fused_resnet.quantization/1"


def quantization_state(model: nn.Module) -> dict[str, Any]:
    """The ranges of a quantized model, which `json.dump` writes and reads without loss.

    Args:
        model: that `quantize` or `load_quantization_state` has changed, or in training after
            `prepare_qat`, as its ranges are now.

    Returns:
        `{"schema": ..., "dtype": "int8", "blocks": {path: block}}` (or "float8_e4m3fn", whose zero
        points are 0), each block with the shapes of
        its `weights`, its `ranges` as pairs of a step and a zero point (input, inner activations,
        output), `sqnr_db` or None, and the `reason` why it stays in floating point or "". Where
        networks' stems have ranges, also `"stems": {path: stem}`, each with `bits` besides, and
        where classifiers have, `"classifiers": {path: classifier}`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it is not quantized.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"quantization_state: model is a {type(model).__name__}, must be a torch.nn.Module"
        )
    kept = {
        path: module.quantization
        for path, module in model.named_modules()
        if quantized.is_quantizable(module) and isinstance(module.quantization, BlockRanges)
    }
    kept |= trained_ranges(model)
    if not kept:
        raise ValueError("quantization_state: model is not quantized: call fused_resnet.quantize")
    stems = {
        path: module.quantization
        for path, module in model.named_modules()
        if quantized.has_stem(module) and isinstance(module.quantization, StemRanges)
    }
    state: dict[str, Any] = {
        "schema": SCHEMA,
        "dtype": next(iter(kept.values())).dtype,
        "blocks": {path: _as_data(ranges) for path, ranges in kept.items()},
    }
    if stems:
        state["stems"] = {
            path: {"bits": ranges.bits, **_as_data(ranges)} for path, ranges in stems.items()
        }
    heads = {
        path: module.head_quantization
        for path, module in model.named_modules()
        if quantized.has_stem(module) and isinstance(module.head_quantization, HeadRanges)
    }
    if heads:
        state["classifiers"] = {path: _as_data(ranges) for path, ranges in heads.items()}
    return state


def save_quantization_state(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes `quantization_state(model)` to a file, as JSON.

    Args:
        model: a quantized model.
        path: of the file, which is replaced.

    Raises:
        OSError: the file cannot be written.
        TypeError: see `quantization_state`.
        ValueError: see `quantization_state`.
    """
    text = json.dumps(quantization_state(model), indent=1, allow_nan=False)
    files.replace(Path(path), text.encode() + b"\n")


def load_quantization_state(
    model: nn.Module, state: Mapping[str, Any] | str | os.PathLike[str]
) -> nn.Module:
    """Makes a model run in eight bits with ranges found earlier, in place; fuses it if needed.

    Args:
        model: with the blocks of the model the ranges are of: the same paths, weights of the same
            shapes.
        state: what `quantization_state` returned, or the path of a file with it.

    Returns:
        `model`.

    Raises:
        OSError: the file cannot be read.
        TypeError: `model` is not a module, or `state` neither a mapping nor a path.
        ValueError: the state is damaged, or of another network; the message names the first
            difference. The model is then as it was.
    """
    name = "load_quantization_state"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name}: model is a {type(model).__name__}, must be a torch.nn.Module")
    if isinstance(state, (str, os.PathLike)):
        state = _read(Path(state))
    if not isinstance(state, Mapping):
        raise TypeError(
            f"{name}: state is a {type(state).__name__}, must be a mapping or a file's path"
        )
    if state.get("schema") != SCHEMA:
        raise ValueError(f"{name}: state has schema {state.get('schema')!r}, must be {SCHEMA!r}")
    dtype = state.get("dtype")
    if dtype not in EIGHT_BITS:
        expected = " or ".join(map(repr, EIGHT_BITS))
        raise ValueError(f"{name}: state has dtype {dtype!r}, must be {expected}")
    for ends in ("stems", "classifiers"):
        if dtype == FLOAT8 and state.get(ends):
            raise ValueError(
                f"{name}: state has dtype {dtype!r}, and {ends}, which are of integers"
            )
    with restored_on_error(model):
        swap.fuse_remaining(model)
        ranges = _matched(model, state.get("blocks"))
        for path, kept in ranges.items():
            ranges[path] = kept._replace(dtype=dtype)
            if dtype == FLOAT8 and any(stored.zero_point for stored in kept.ranges):
                raise ValueError(
                    f"{name}: block {path!r} of the state has a zero point, in {dtype!r}"
                )
        stems = _matched_stems(model, state.get("stems", {}))
        heads = _matched_heads(model, state.get("classifiers", {}))
        dequantize(model)
        set_ranges(model, Found(ranges, stems, heads))
    return model


def _as_data(kept: BlockRanges | StemRanges | HeadRanges) -> dict[str, Any]:
    decibels = kept.sqnr_db
    shapes = kept.shapes if isinstance(kept, BlockRanges) else (kept.shape,)
    return {
        "weights": [list(shape) for shape in shapes],
        "ranges": [[stored.step, stored.zero_point] for stored in kept.ranges],
        "sqnr_db": decibels if decibels is not None and math.isfinite(decibels) else None,
        "reason": kept.reason,
    }


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:  # bytes that are no UTF-8 among them
        raise ValueError(
            f"load_quantization_state: state is {str(path)!r}, which is not JSON: {error}"
        ) from None


def _matched(model: nn.Module, blocks: Any) -> dict[str, BlockRanges]:
    """The state's blocks, which are those of the model, by their paths."""
    name = "load_quantization_state"
    if not isinstance(blocks, Mapping):
        raise ValueError(f"{name}: state has no blocks")
    own = {
        path: module for path, module in model.named_modules() if quantized.is_quantizable(module)
    }
    for path in own:
        if path not in blocks:
            raise ValueError(f"{name}: the model has a block {path!r}, which the state has not")
    ranges = {}
    for path, data in blocks.items():
        if path not in own:
            raise ValueError(f"{name}: the state has a block {path!r}, which the model has not")
        kept = _from_data(path, data)
        shapes = quantized.shapes_of(own[path])
        if kept.shapes != shapes:
            index, (has, had) = next(
                (i, pair)
                for i, pair in enumerate(_pairs(shapes, kept.shapes))
                if pair[0] != pair[1]
            )
            raise ValueError(
                f"{name}: block {path!r}: convolution {index} has {_described(has)}, in the state "
                f"{_described(had)}"
            )
        form = forms.found(own[path])
        needed = 1 + len(form.units_of(own[path])) if form else 0
        if not kept.reason and len(kept.ranges) != needed:
            raise ValueError(
                f"{name}: block {path!r} of the state has {len(kept.ranges)} ranges, must have "
                f"{needed}"
            )
        ranges[path] = kept
    return ranges


def _matched_stems(model: nn.Module, stems: Any) -> dict[str, StemRanges]:
    """The state's stems, which are of the model, by their networks' paths."""
    name = "load_quantization_state"
    if not isinstance(stems, Mapping):
        raise ValueError(f"{name}: stems of the state are a {type(stems).__name__}")
    own = {path: module for path, module in model.named_modules() if quantized.has_stem(module)}
    found = {}
    for path, data in stems.items():
        if path not in own:
            raise ValueError(f"{name}: the state has a stem {path!r}, which the model has not")
        kept = _from_data(path, data, "stem")
        bits = data.get("bits")
        what = f"{name}: stem {path!r} of the state"
        if bits not in (8, 16):
            raise ValueError(f"{what} has bits {bits!r}, must be 8 or 16")
        if not kept.reason and (
            len(kept.ranges) != 2 or (bits == 16 and kept.ranges[0].zero_point != WORD_ZERO_POINT)
        ):
            raise ValueError(f"{what} is damaged: ranges are {data['ranges']}")
        unit = forms.of(own[path]).units_of(own[path])[0]
        shape = tuple(getattr(forms.part(own[path], unit.conv), "weight").shape)  # noqa: B009
        if kept.shapes != (shape,):
            raise ValueError(
                f"{name}: stem {path!r} has {_described(shape)}, in the state "
                f"{', '.join(map(_described, kept.shapes)) or 'none'}"
            )
        found[path] = StemRanges(path, shape, bits, kept.ranges, kept.sqnr_db, kept.reason)
    return found


def _matched_heads(model: nn.Module, heads: Any) -> dict[str, HeadRanges]:
    """The state's classifiers, which are of the model, by their networks' paths."""
    name = "load_quantization_state"
    if not isinstance(heads, Mapping):
        raise ValueError(f"{name}: classifiers of the state are a {type(heads).__name__}")
    own = {path: module for path, module in model.named_modules() if quantized.has_stem(module)}
    found = {}
    for path, data in heads.items():
        if path not in own:
            raise ValueError(
                f"{name}: the state has the classifier of a network {path!r}, which the model has "
                "not"
            )
        kept = _from_data(path, data, "classifier")
        if not kept.reason and (
            len(kept.ranges) != 2 or any(stored.zero_point for stored in kept.ranges)
        ):
            raise ValueError(
                f"{name}: classifier {path!r} of the state is damaged: ranges are {data['ranges']}"
            )
        head = quantized.head_of(own[path])
        shape = () if head is None else tuple(head.weight.shape)
        if kept.shapes != (shape,) and not kept.reason:
            raise ValueError(
                f"{name}: classifier {path!r} has {_described(shape)}, in the state "
                f"{', '.join(map(_described, kept.shapes)) or 'none'}"
            )
        found[path] = HeadRanges(path, shape, kept.ranges, kept.sqnr_db, kept.reason)
    return found


def _pairs(left: tuple[Any, ...], right: tuple[Any, ...]) -> list[tuple[Any, Any]]:
    length = max(len(left), len(right))
    padded = [[*side, *[None] * (length - len(side))] for side in (left, right)]
    return list(zip(*padded, strict=True))


def _described(shape: tuple[int, ...] | None) -> str:
    return "no weight" if shape is None else f"a weight of shape {shape}"


def _from_data(path: str, data: Any, kind: str = "block") -> BlockRanges:
    """A block or a stem of a state, every value checked."""
    what = f"load_quantization_state: {kind} {path!r} of the state"
    try:
        shapes = tuple(tuple(int(size) for size in shape) for shape in data["weights"])
        ranges = tuple(Quantization(float(step), int(zero)) for step, zero in data["ranges"])
        decibels, reason = data["sqnr_db"], data["reason"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{what} is damaged: {type(error).__name__}: {error}") from None
    if not isinstance(reason, str) or not isinstance(decibels, (int, float, type(None))):
        raise ValueError(f"{what} is damaged: sqnr_db is {decibels!r}, reason is {reason!r}")
    for index, (step, zero_point) in enumerate(ranges):
        if not (math.isfinite(step) and step > 0 and float32(step) == step):
            raise ValueError(f"{what}: step {index} is {step}, must be a float32 number above zero")
        if not 0 <= zero_point <= (LARGEST if index == 0 else 0):
            raise ValueError(f"{what}: zero point {index} is {zero_point}, out of range")
    return BlockRanges(path, shapes, ranges, decibels, reason)
