"""Eight-bit copies of blocks' weights, kept as long as the weights are what was copied.

A copy is made when it is first needed, and anew when a tensor it was made from has another storage
or version, or a setting differs. Of writes that torch does not see, on the CPU, each call compares
the norms' vectors and 70 values of each weight, at other places every time, with what the copy says
of them, or all values of the weights: see `watch.py`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from . import watch
from .description import Block, Stem
from .prepared import WeightCache, version_of
from .quantized import (
    FLOAT8,
    Quantization,
    QuantizedBlock,
    QuantizedStem,
    quantized_block,
    quantized_stem,
    quantized_weight,
)

_serials = itertools.count()


# Storage and version of a tensor that a copy was made from.
Source: TypeAlias = tuple[weakref.ref[torch.UntypedStorage], int | None]


@dataclass(frozen=True)
class Copy:
    """A block in eight bits, and what tells that it is still the one.

    Attributes:
        block: the copy.
        is_finite: whether all its steps, scales and shifts are finite numbers.
        sources: storage and version of each tensor it was made from, None for None.
        steps: of each weight's filters, float64.
        vectors: copies of the norms' vectors and of the biases; None where nothing is compared.
        values: copies of the weights, where all of their values are compared.
        serial: of this copy alone.
    """

    block: QuantizedBlock
    is_finite: bool
    sources: tuple[Source | None, ...]
    steps: tuple[Tensor, ...]
    vectors: tuple[Tensor, ...] | None
    values: tuple[Tensor, ...]
    serial: int = field(default_factory=lambda: next(_serials))


class StemCopy(NamedTuple):
    """A stem in eight or sixteen bits, and what tells that it is still the one.

    Attributes:
        block: the copy.
        is_finite: see `Copy`, as for the others.
        sources: see `is_finite`.
        values: copies of all its tensors; empty where nothing is compared.
    """

    block: QuantizedStem
    is_finite: bool
    sources: tuple[Source | None, ...]
    values: tuple[Tensor, ...]


_cache = WeightCache()
_stems = WeightCache()


def copies_of(
    blocks: Sequence[Block], ranges: Sequence[Sequence[Quantization]], dtype: str = "int8"
) -> list[Copy]:
    """The blocks in eight bits.

    Args:
        blocks: with weights that are not None; none pads its shortcut.
        ranges: of each, see `quantized.quantized_block`.
        dtype: "int8" or "float8_e4m3fn", of which all values of the weights are compared.
    """
    copies = []
    for block, own in zip(blocks, ranges, strict=True):
        copy = _find(block, own, dtype)
        copies.append(_made(block, own, dtype) if copy is None else copy)
    if not _same_values(blocks, copies):
        for i, block in enumerate(blocks):
            if not _same_values([block], [copies[i]]):
                copies[i] = _made(block, ranges[i], dtype)
    return copies


def release(tensors: Iterable[Tensor]) -> None:
    """Drops the copies of blocks whose first weight is among these, and of such stems."""
    tensors = list(tensors)
    _cache.release(tensors)
    _stems.release(tensors)


def copy_of_stem(stem: Stem, stored: Quantization, output: Quantization) -> StemCopy:
    """A stem in eight or sixteen bits. All values of its few tensors are compared in every call.

    Args:
        stem: with one group.
        stored: see `quantized.quantized_stem`, as for `output`.
        output: see `stored`.
    """
    (layer,), pool, bits = stem
    layout = (stored, output, bits, pool, layer.norm.eps, layer.weight.shape, *layer[3:])
    tensors = list(_tensors([stem]))
    entry = _stems.find(layer.weight, layout)
    if entry is not None:
        copy: StemCopy = entry.copy
        if _are_sources(tensors, copy.sources) and _have_values(tensors, copy.values):
            return copy
    versions = [None if tensor is None else version_of(tensor) for tensor in tensors]
    with torch.inference_mode(False), torch.no_grad():
        values: tuple[Tensor, ...] = ()
        if layer.weight.device.type == "cpu":
            values = tuple(t.detach().clone() for t in tensors if t is not None)
        made = quantized_stem(layer, pool, bits, stored, output)
        is_finite = layer.weight.is_meta or _is_finite(made)
    copy = StemCopy(made, is_finite, _sources(tensors, versions), values)
    if all(t is None or v is not None for t, v in zip(tensors, versions, strict=True)):
        _stems.put(layer.weight, versions[0], copy, layout)
    return copy


def _have_values(tensors: Sequence[Tensor | None], values: Sequence[Tensor]) -> bool:
    if not values:
        return True
    now = [t.detach() for t in tensors if t is not None]
    # A copy is dense, so a tensor with its strides is, too.
    pairs = [
        (t, value) if t.stride() == value.stride() else (t.reshape(-1), value.reshape(-1))
        for t, value in zip(now, values, strict=True)
    ]
    with torch.no_grad():
        return torch.ops.fused_resnet.quantized_copies_match(
            [], [], [], [t for t, _ in pairs], [value for _, value in pairs]
        )


def _layout(block: Block, ranges: Sequence[Quantization], dtype: str) -> tuple[Any, ...]:
    settings = tuple((layer.norm.eps, layer.weight.shape, *layer[3:]) for layer in block.layers)
    return tuple(ranges), block.has_projection, settings, dtype


def _find(block: Block, ranges: Sequence[Quantization], dtype: str) -> Copy | None:
    entry = _cache.find(block.layers[0].weight, _layout(block, ranges, dtype))
    if entry is None:
        return None
    copy: Copy = entry.copy
    return copy if _are_sources(_tensors([block]), copy.sources) else None


def _are_sources(tensors: Iterable[Tensor | None], sources: Sequence[Source | None]) -> bool:
    for tensor, source in zip(tensors, sources, strict=True):
        if tensor is None or source is None:
            if (tensor is None) != (source is None):
                return False
        elif source[0]() is not tensor.untyped_storage() or source[1] != version_of(tensor):
            return False
    return True


def _sources(
    tensors: Sequence[Tensor | None], versions: Sequence[int | None]
) -> tuple[Source | None, ...]:
    return tuple(
        None if tensor is None else (weakref.ref(tensor.untyped_storage()), version)
        for tensor, version in zip(tensors, versions, strict=True)
    )


def _made(block: Block, ranges: Sequence[Quantization], dtype: str) -> Copy:
    tensors = list(_tensors([block]))
    weights = [layer.weight for layer in block.layers]
    # Before the values, which another thread may change.
    versions = [None if tensor is None else version_of(tensor) for tensor in tensors]
    whole = dtype == FLOAT8 or any(
        watch.is_watched(w) or w.untyped_storage().is_shared() for w in weights
    )
    # Copies made in inference mode would have no version, by which backends know them again.
    with torch.inference_mode(False), torch.no_grad():
        compared = all(weight.device.type == "cpu" for weight in weights)
        vectors = tuple(v.detach().clone() for v in _vectors(block)) if compared else None
        values = tuple(w.detach().clone() for w in weights) if whole and compared else ()
        steps = tuple(quantized_weight(weight)[1] for weight in weights)
        made = quantized_block(block.layers, block.has_projection, ranges, dtype)
        is_finite = weights[0].is_meta or _is_finite(made)
    copy = Copy(made, is_finite, _sources(tensors, versions), steps, vectors, values)
    if all(t is None or v is not None for t, v in zip(tensors, versions, strict=True)):
        _cache.put(weights[0], versions[0], copy, _layout(block, ranges, dtype))
    return copy


def _is_finite(block: QuantizedBlock | QuantizedStem) -> bool:
    vectors = [vector for conv in block.convs for vector in (conv.scale, conv.shift)]
    return bool(torch.cat(vectors).isfinite().all())


def _tensors(blocks: Sequence[Block | Stem]) -> Iterator[Tensor | None]:
    """Every layer's weight, mean, var, scale and shift of the norm, and bias."""
    for block in blocks:
        for layer in block.layers:
            yield layer.weight
            yield from layer.norm[:4]
            yield layer.bias


def _vectors(block: Block) -> list[Tensor]:
    """Every layer's norm and bias, as far as they are there."""
    return [v for layer in block.layers for v in (*layer.norm[:4], layer.bias) if v is not None]


def _same_values(blocks: Sequence[Block], copies: Sequence[Copy]) -> bool:
    weights: list[Tensor] = []
    quantized: list[Tensor] = []
    steps: list[Tensor] = []
    vectors: list[Tensor] = []
    kept: list[Tensor] = []
    for block, copy in zip(blocks, copies, strict=True):
        if copy.vectors is None:
            continue
        vectors += _vectors(block)
        kept += copy.vectors
        if copy.values:
            vectors += [layer.weight.detach().reshape(-1) for layer in block.layers]
            kept += [weight.reshape(-1) for weight in copy.values]
        else:
            weights += [layer.weight for layer in block.layers]
            quantized += [conv.weight for conv in copy.block.convs]
            steps += copy.steps
    if not vectors:
        return True
    with torch.no_grad():
        return torch.ops.fused_resnet.quantized_copies_match(
            weights, quantized, steps, vectors, kept
        )
