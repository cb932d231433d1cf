"""Eight-bit copies of blocks' weights, kept as long as the weights are what was copied.

A copy is made when it is first needed, and anew when a tensor it was made from has another storage
or version, or a setting differs. Of writes that torch does not see, on the CPU, each call compares
the norms' vectors and 70 values of each weight, at other places every time, with what the copy says
of them, or all values of the weights: see `watch.py`.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor

from . import watch
from .description import Block, Head, Stem
from .prepared import WeightCache, version_of
from .quantized import (
    FLOAT8,
    Quantization,
    QuantizedBlock,
    QuantizedLinear,
    QuantizedStem,
    quantized_block,
    quantized_linear,
    quantized_stem,
    quantized_weight,
)

_serials = itertools.count()


# Storage and version of a tensor that a copy was made from.
Source: TypeAlias = tuple[weakref.ref[torch.UntypedStorage], int | None]


_Made = TypeVar("_Made", QuantizedBlock, QuantizedLinear)


@dataclass(frozen=True)
class Copy(Generic[_Made]):
    """A block or a classifier in eight bits, and what tells that it is still the one.

    Attributes:
        block: the copy.
        is_finite: whether all its steps, scales and shifts are finite numbers.
        sources: storage and version of each tensor it was made from, None for None.
        steps: of each weight's filters, float64.
        vectors: copies of the norms' vectors and of the biases; None where nothing is compared.
        values: copies of the weights, where all of their values are compared.
        serial: of this copy alone.
    """

    block: _Made
    is_finite: bool
    sources: tuple[Source | None, ...]
    steps: tuple[Tensor, ...]
    vectors: tuple[Tensor, ...] | None
    values: tuple[Tensor, ...]
    serial: int = field(default_factory=lambda: next(_serials))


BlockCopy: TypeAlias = Copy[QuantizedBlock]


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
_heads = WeightCache()


def copies_of(
    blocks: Sequence[Block], ranges: Sequence[Sequence[Quantization]], dtype: str = "int8"
) -> list[BlockCopy]:
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
    """Drops the copies of what has its first weight among these."""
    tensors = list(tensors)
    for cache in (_cache, _stems, _heads):
        cache.release(tensors)


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


def copy_of_head(head: Head, pooled: Quantization) -> Copy[QuantizedLinear]:
    """A classifier in eight bits, looked at in every call as blocks are.

    Args:
        head: its parameters.
        pooled: see `quantized.quantized_linear`.
    """
    layout = (pooled, head.weight.shape)
    entry = _heads.find(head.weight, layout)
    if entry is not None:
        kept: Copy[QuantizedLinear] = entry.copy
        if _are_sources(_tensors([head]), kept.sources) and _same_values([head], [kept]):
            return kept
    copy, version = _copied(
        head, lambda: quantized_linear(head.weight, head.bias, pooled), whole=False
    )
    if version is not None:
        _heads.put(head.weight, version, copy, layout)
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


def _find(block: Block, ranges: Sequence[Quantization], dtype: str) -> BlockCopy | None:
    entry = _cache.find(block.layers[0].weight, _layout(block, ranges, dtype))
    if entry is None:
        return None
    copy: BlockCopy = entry.copy
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


def _made(block: Block, ranges: Sequence[Quantization], dtype: str) -> BlockCopy:
    copy, version = _copied(
        block,
        lambda: quantized_block(block.layers, block.has_projection, ranges, dtype),
        whole=dtype == FLOAT8,
    )
    if version is not None:
        _cache.put(block.layers[0].weight, version, copy, _layout(block, ranges, dtype))
    return copy


def _copied(
    block: Block | Head, make: Callable[[], _Made], *, whole: bool
) -> tuple[Copy[_Made], int | None]:
    """A copy, and its first weight's version, or None where it cannot be kept."""
    tensors, weights = list(_tensors([block])), _weights(block)
    # Before the values, which another thread may change.
    versions = [None if tensor is None else version_of(tensor) for tensor in tensors]
    whole |= any(watch.is_watched(w) or w.untyped_storage().is_shared() for w in weights)
    # Copies made in inference mode would have no version, by which backends know them again.
    with torch.inference_mode(False), torch.no_grad():
        compared = all(weight.device.type == "cpu" for weight in weights)
        vectors = tuple(v.detach().clone() for v in _vectors(block)) if compared else None
        values = tuple(w.detach().clone() for w in weights) if whole and compared else ()
        steps = tuple(quantized_weight(weight)[1] for weight in weights)
        made = make()
        is_finite = weights[0].is_meta or _is_finite(made)
    copy = Copy(made, is_finite, _sources(tensors, versions), steps, vectors, values)
    is_kept = all(t is None or v is not None for t, v in zip(tensors, versions, strict=True))
    return copy, versions[0] if is_kept else None


def _is_finite(block: QuantizedBlock | QuantizedStem | QuantizedLinear) -> bool:
    if isinstance(block, QuantizedLinear):
        vectors = [block.scale, block.bias]
    else:
        vectors = [vector for conv in block.convs for vector in (conv.scale, conv.shift)]
    return bool(torch.cat(vectors).isfinite().all())


def _tensors(blocks: Sequence[Block | Stem | Head]) -> Iterator[Tensor | None]:
    """Every layer's weight, mean, var, scale and shift of the norm, and bias."""
    for block in blocks:
        if isinstance(block, Head):
            yield from block
            continue
        for layer in block.layers:
            yield layer.weight
            yield from layer.norm[:4]
            yield layer.bias


def _weights(block: Block | Head) -> list[Tensor]:
    return [block.weight] if isinstance(block, Head) else [layer.weight for layer in block.layers]


def _quantized_weights(made: QuantizedBlock | QuantizedLinear) -> list[Tensor]:
    return [part.weight for part in ([made] if isinstance(made, QuantizedLinear) else made.convs)]


def _vectors(block: Block | Head) -> list[Tensor]:
    """Every layer's norm and bias, as far as they are there."""
    if isinstance(block, Head):
        return [] if block.bias is None else [block.bias]
    return [v for layer in block.layers for v in (*layer.norm[:4], layer.bias) if v is not None]


def _same_values(blocks: Sequence[Block | Head], copies: Sequence[Copy[Any]]) -> bool:
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
            vectors += [weight.detach().reshape(-1) for weight in _weights(block)]
            kept += [weight.reshape(-1) for weight in copy.values]
        else:
            weights += _weights(block)
            quantized += _quantized_weights(copy.block)
            steps += copy.steps
    if not vectors and not weights:
        return True
    with torch.no_grad():
        return torch.ops.fused_resnet.quantized_copies_match(
            weights, quantized, steps, vectors, kept
        )
