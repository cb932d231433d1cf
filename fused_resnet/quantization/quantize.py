"""`quantize` and `dequantize`: eight bits for the residual blocks of a model, and back."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import blocks, forms, swap
from ..layers.quantized import EIGHT_BITS, FLOAT8
from ..layers.ranges import BlockRanges, HeadRanges, StemRanges
from ..modules import fake_quantized, quantized
from . import pt2e, qdq
from .calibrate import (
    HEAD,
    NOISE_IMAGES,
    NOT_FINITE,
    Calibration,
    Found,
    Settings,
    is_foldable,
    measure_noise,
)
from .observers import OBSERVERS, MinMaxObserver, PercentileObserver

STEMS = {"int16": 16, "int8": 8, "float": 0}
CLASSIFIERS = ("float", "int8")

_Ranges = TypeVar("_Ranges", BlockRanges, StemRanges, HeadRanges)


def quantize(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    scales: Any = None,
    dtype: str = "int8",
    stem: str | None = None,
    classifier: str = "float",
    observer: str = "minmax",
    percentile: float = 99.99,
    min_sqnr_db: float = 10.0,
    progress: bool = False,
) -> nn.Module:
    """Makes a model's residual blocks run in eight bits in inference, in place.

    The model is fused, runs the calibration batches in floating point (in inference mode, whatever
    mode it is in) while observers see each block's activations, and each block then carries the
    ranges of its own. Parameters, buffers, hooks and `state_dict` keys stay what they are; copies
    of weights in eight bits are made when a block first runs, and anew when a parameter changes.
    The ranges stay with copies and pickles of the model; `quantization_state` gives them alone.

    A quantized block runs in eight bits while it is in inference mode and nothing keeps it from
    running fused; its output then has no gradient. In training mode it runs in floating point. What
    is no residual block stays in floating point, as do blocks with a shortcut that pads channels,
    attention, or hooks inside; `report` names them. So do the first convolutions and classifiers of
    networks other than torchvision's ResNets and this package's for small images.

    A model that is quantized already is calibrated anew. One that was trained after `prepare_qat`
    has ranges, and needs no batches, and so do the `scales` of a model that others quantized.

    Args:
        model: any module with residual blocks that `fuse` knows.
        batches: inputs (N, C, H, W), or tuples or lists of an input and a target, on the model's
            device. They are read once. None for the ranges that training has left, or `scales`
            has; with `scales` the noise alone is measured on them.
        scales: what torchao's `convert_pt2e` made of the same network, or an exported program of
            that, or an ONNX model with QuantizeLinear and DequantizeLinear (a file's name, or what
            `onnx.load` returns): steps and zero points of activations are taken from it. A block at
            which it has none stays in floating point. Weights are rounded by steps of their own.
        dtype: "int8": unsigned activations of one step and zero point each, signed weights of one
            step a filter; or "float8_e4m3fn": activations and weights with four significant bits,
            steps likewise, and float32 sums. See docs/quantization.md.
        stem: what a network's first convolution runs in, with the norm, ReLU and max-pool behind
            it: "int16" or "int8", in integers as the blocks, or "float", as it is. By default
            "int16" on the CPU and "float" on a GPU, where the CUDA backend alone has kernels for
            the others. "float" as well where ranges are those of training or `scales`, and beside
            "float8_e4m3fn", which refuses the others.
        classifier: what a network's mean over pixels and linear layer run in: "float", as they are,
            or "int8", in integers, where what they read is a block in eight bits; the logits are
            floating-point numbers either way. "int8" needs `batches`, without `scales`.
        observer: how ranges are chosen: "minmax", "percentile", "mse" or "histogram".
        percentile: of "percentile", the share of values to cover at either end, in percent.
        min_sqnr_db: blocks whose output in eight bits has a lower signal-to-noise ratio than this,
            in decibels, on the first 64 images, stay in floating point. `-math.inf` for none.
        progress: whether to show a progress bar on standard error.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a module, a batch neither a tensor nor a pair, or `scales` no
            graph.
        ImportError: `scales` is an ONNX model, and `onnx` is not installed.
        ValueError: an argument is none of the above; there is no batch, or one on another device
            than the model; none is given and the model was not trained for it; an activation is NaN
            or infinite; or no block can run in eight bits. The model is then as it was.
    """
    make = _observer(dtype, observer, percentile)
    if stem is not None and stem not in STEMS:
        raise ValueError(f"quantize: stem is {stem!r}, must be one of {', '.join(STEMS)}")
    if classifier not in CLASSIFIERS:
        raise ValueError(
            f"quantize: classifier is {classifier!r}, must be one of {', '.join(CLASSIFIERS)}"
        )
    if classifier != "float" and (dtype == FLOAT8 or scales is not None or batches is None):
        raise ValueError(
            f"quantize: classifier is {classifier!r}, must be 'float' with dtype {FLOAT8!r}, with "
            "scales, and with the ranges that training leaves"
        )
    if dtype == FLOAT8:
        if stem not in (None, "float"):
            raise ValueError(f"quantize: stem is {stem!r}, must be 'float' with dtype {dtype!r}")
        if scales is not None or batches is None:
            raise ValueError(
                f"quantize: dtype {dtype!r} needs calibration batches; scales, and the ranges that "
                "training leaves, are of integers"
            )
        stem = "float"
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize: model is a {type(model).__name__}, must be a torch.nn.Module")
    if batches is not None and (
        isinstance(batches, (Tensor, str, bytes)) or not isinstance(batches, Iterable)
    ):
        raise TypeError(
            f"quantize: batches is a {type(batches).__name__}, must be an iterable of inputs or of "
            "(input, target) pairs"
        )
    with restored_on_error(model):
        if batches is None and scales is None:
            found = Found(_trained(model), {}, {})
        else:
            swap.fuse_remaining(model)
            dequantize(model)
            bits = STEMS[default_stem(model) if stem is None else stem]
            settings = Settings(make, bits, classifier == "int8", dtype)
            found = _found(model, settings, scales, batches, progress)
        found = Found(
            _without_noisy(found.blocks, min_sqnr_db),
            _without_noisy(found.stems, min_sqnr_db),
            _without_noisy(found.heads, min_sqnr_db),
        )
        if all(kept.reason for kept in found.blocks.values()):
            path, kept = next(iter(found.blocks.items()))
            raise ValueError(
                f"quantize: no residual block of the model can run in eight bits; {path!r}: "
                f"{kept.reason}"
            )
        set_ranges(model, found)
    return model


def default_stem(model: nn.Module) -> str:
    """What a model's first convolution runs in, unless its user says so."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return "int16" if first is None or first.device.type == "cpu" else "float"


def dequantize(model: nn.Module) -> nn.Module:
    """Makes a quantized model's blocks run in floating point again, fused, in place.

    Args:
        model: any module, quantized or not.

    Returns:
        `model`.

    Raises:
        TypeError: it is not a module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"dequantize: model is a {type(model).__name__}, must be a torch.nn.Module")
    for module in model.modules():
        if not (quantized.is_quantizable(module) or quantized.has_stem(module)):
            continue
        _drop(module)
    return model


def set_ranges(model: nn.Module, found: Found) -> None:
    """Gives each fused residual block, stem and classifier the ranges of its path.

    Other stems and classifiers lose theirs: they belong to the ranges that the blocks had.
    """
    drop_ends(model)
    for path, kept in (*found.stems.items(), *found.blocks.items()):
        block = model.get_submodule(path)
        vars(block)["quantization"] = kept
        blocks.release(block)
    for path, head in found.heads.items():
        network = model.get_submodule(path)
        vars(network)[HEAD] = head
        blocks.release(network)


def drop_ends(model: nn.Module) -> None:
    """Makes the first convolutions and classifiers of a model's networks run in floating point."""
    for module in model.modules():
        if quantized.has_stem(module):
            _drop(module)


def _drop(module: nn.Module) -> None:
    kept = [vars(module).pop(name, None) for name in ("quantization", HEAD)]
    if any(ranges is not None for ranges in kept):
        blocks.release(module)


def checked_dtype(name: str, dtype: str, dtypes: Sequence[str] = EIGHT_BITS) -> None:
    """Raises ValueError for a dtype that blocks do not run in."""
    if dtype not in dtypes:
        raise ValueError(f"{name}: dtype is {dtype!r}, must be {' or '.join(dtypes)}")


def _observer(dtype: str, observer: str, percentile: float) -> Callable[[], MinMaxObserver]:
    checked_dtype("quantize", dtype)
    if observer not in OBSERVERS:
        raise ValueError(
            f"quantize: observer is {observer!r}, must be one of {', '.join(OBSERVERS)}"
        )
    if not 50 < percentile <= 100:
        raise ValueError(f"quantize: percentile is {percentile}, must be above 50 and at most 100")
    if OBSERVERS[observer] is PercentileObserver:
        return functools.partial(PercentileObserver, percentile)
    return OBSERVERS[observer]


def _without_noisy(found: dict[str, _Ranges], limit: float) -> dict[str, _Ranges]:
    return {path: _unless_noisy(kept, limit) for path, kept in found.items()}


def _unless_noisy(kept: _Ranges, limit: float) -> _Ranges:
    if kept.reason or kept.sqnr_db is None or kept.sqnr_db >= limit:
        return kept
    return kept._replace(reason=f"signal to noise is {kept.sqnr_db:.1f} dB, must be {limit:g}")


def _found(
    model: nn.Module,
    settings: Settings,
    scales: Any,
    batches: Iterable[Any] | None,
    progress: bool,
) -> Found:
    """The ranges of `scales`, or else after all batches, with the noise on the first images."""
    if not any(map(quantized.is_quantizable, model.modules())):
        raise ValueError(NO_BLOCK.format("quantize"))
    with in_inference_mode(model):
        calibration = None if scales is not None else Calibration(model, settings)
        first: list[Tensor] = []
        for input in [] if batches is None else _inputs(model, batches, progress):
            missing = NOISE_IMAGES - sum(len(images) for images in first)
            if missing > 0 and input.dim() > 0:
                first.append(input[:missing].clone())
            if calibration is not None:
                calibration.observe(input)
        if batches is not None and not first:
            raise ValueError("quantize: batches has no batch")
        if calibration is not None:
            ranges = calibration.ranges()
            stems, heads = calibration.stem_ranges(ranges), calibration.head_ranges(ranges)
            found = Found(ranges, stems, heads)
        else:
            read = qdq if qdq.is_onnx(scales) else pt2e
            found = Found(_foldable(model, read.ranges_of(model, scales)), {}, {})
        return measure_noise(model, found, first) if first else found


def _foldable(model: nn.Module, ranges: dict[str, BlockRanges]) -> dict[str, BlockRanges]:
    """The ranges without those of blocks that cannot run in eight bits, in inference mode."""
    checked = {}
    for path, kept in ranges.items():
        block = model.get_submodule(path)
        reason = kept.reason or quantized.float_reason(block) or ""
        if not reason and not is_foldable(block, kept.ranges):
            reason = NOT_FINITE
        checked[path] = kept._replace(reason=reason)
    return checked


NO_BLOCK = "{}: model has no residual block to quantize: none of a class that is known"


def _trained(model: nn.Module) -> dict[str, BlockRanges]:
    """The ranges that training has left."""
    ranges = trained_ranges(model)
    if not ranges:
        raise ValueError(
            "quantize: batches is None, and the model was not trained for eight bits: give "
            "calibration batches, or call fused_resnet.prepare_qat and train"
        )
    with in_inference_mode(model):
        return _foldable(model, ranges)


def trained_ranges(model: nn.Module) -> dict[str, BlockRanges]:
    """Of each block that `prepare_qat` has prepared, the ranges training has left, by its path."""
    return {
        path: kept.found(block)
        for path, block in model.named_modules()
        if (kept := fake_quantized.of(block)) is not None
    }


def _inputs(model: nn.Module, batches: Iterable[Any], progress: bool) -> Iterator[Tensor]:
    device = next((t.device for t in itertools.chain(model.parameters(), model.buffers())), None)
    for index, batch in enumerate(_shown(batches, progress)):
        yield _input(batch, index, device)


def _shown(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from rich.console import Console
    from rich.progress import track

    return track(batches, "calibration", console=Console(stderr=True), transient=True)


def _input(batch: Any, index: int, device: torch.device | None) -> Tensor:
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    input = batch[0] if pair else batch
    if not isinstance(input, Tensor):
        what = (
            f"{type(batch).__name__} of {len(batch)}"
            if isinstance(batch, (tuple, list))
            else (type(batch).__name__)
        )
        raise TypeError(
            f"quantize: batch {index} is a {what}, must be a tensor or an (input, target) pair"
        )
    if device is not None and input.device != device:
        raise ValueError(f"quantize: batch {index} is on {input.device}, the model is on {device}")
    return input


@contextlib.contextmanager
def in_inference_mode(model: nn.Module) -> Iterator[None]:
    """Every module in inference mode, and back in its own; no gradients are recorded."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        # Not torch.inference_mode(), whose tensors do not count the writes to them.
        with torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Classes and ranges as they were, if there is an exception."""
    names = ("quantization", HEAD)
    before = [
        (m, forms.of_fused(type(m)) is not None, {n: vars(m)[n] for n in names if n in vars(m)})
        for m in model.modules()
    ]
    try:
        yield
    except BaseException:
        for module, was_fused, kept in before:
            if not was_fused and forms.of_fused(type(module)) is not None:
                swap.unfuse_one(module)
            else:
                vars(module).update(kept)
        raise
