"""Runs a model over calibration batches and looks on inside its residual blocks.

Each fused block is run convolution by convolution, as it runs in floating point, while its
observers see the block's input, what each convolution and its ReLU leave, and the block's output.
A block whose input is the very tensor that another one has returned reads in that one's steps, so
that blocks can run in one call, and give the same bits there as one by one (in bfloat16, whose
numbers do not hold 256 steps, nearly the same).
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from .. import forms
from ..layers.description import Block
from ..layers.quantized import FLOAT8, Quantization
from ..layers.quantized_copies import copies_of, copy_of_head, copy_of_stem
from ..layers.ranges import BlockRanges, HeadRanges, StemRanges, words_of
from ..modules import quantized, read, run
from ..modules.network import float_head, float_stem
from ..ops.conv_bn_act_max_pool_int8 import conv_bn_act_max_pool_int8
from ..ops.pool_linear_int8 import pool_linear_int8
from ..ops.residual_blocks_int8 import DTYPES
from .observers import MinMaxObserver

NOISE_IMAGES = 64
"""Of the first batches, how many images the noise is measured on."""

HEAD = "head_quantization"
"""Where a network keeps the ranges of its classifier."""

NOT_FINITE = "a weight, or what its norm and steps make of it, is not finite"


class _Sites:
    """A block's observers, and the blocks around it."""

    def __init__(self, path: str, block: nn.Module, make: Callable[[], MinMaxObserver]) -> None:
        self.path = path
        self.block = block
        self.reason = quantized.float_reason(block)
        units = len(forms.of(block).units_of(block))
        self.observers = [make() for _ in range(units + 1)]
        self.source: _Sites | None = None
        self.has_run = False

    def observe(self, source: _Sites | None, index: int, values: Tensor) -> None:
        """Sees the input (index 0), an inner activation or the output (the last)."""
        if index > 0:
            self.observers[index].update(values)
            return
        if not self.has_run:
            self.has_run, self.source = True, source
        elif source is not self.source and self.source is not None:
            # It has read what another block wrote, and so far that is all it has read.
            self.observers[0].merge(self.source.observers[-1])
            self.source = None
        if self.source is None:
            self.observers[0].update(values)


class _Stem:
    """What is seen of a network's first convolution.

    Attributes:
        path: the network's.
        observer: of its input.
        readers: the paths of the blocks that have read its output.
    """

    def __init__(self, path: str, network: nn.Module, observer: MinMaxObserver) -> None:
        self.path = path
        self.network = network
        self.observer = observer
        self.readers: set[str] = set()


class _Head:
    """What is seen of a network's classifier.

    Attributes:
        path: the network's.
        observer: of the mean over an image's pixels.
        writers: the paths of the blocks whose output it has read; None for anything else.
    """

    def __init__(self, path: str, network: nn.Module, observer: MinMaxObserver) -> None:
        self.path = path
        self.network = network
        self.observer = observer
        self.writers: set[str | None] = set()


class Settings(NamedTuple):
    """How what is seen will be stored.

    Attributes:
        make: a new observer.
        stem_bits: of networks' first convolutions; 0 for floating point.
        has_head: whether classifiers are to run in eight bits.
        dtype: of the blocks: "int8" or "float8_e4m3fn".
    """

    make: Callable[[], MinMaxObserver]
    stem_bits: int
    has_head: bool
    dtype: str


class Calibration:
    """What is seen of the blocks of a model.

    Args:
        model: with fused blocks, in inference mode.
        settings: see `Settings`.

    Attributes:
        sites: of each fused residual block, in the order of `named_modules`.
    """

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        make, stem_bits, has_head, dtype = settings
        self._model = model
        self._dtype = dtype
        self.sites = [
            _Sites(path, module, make)
            for path, module in model.named_modules()
            if quantized.is_quantizable(module)
        ]
        self._of = {id(sites.block): sites for sites in self.sites}
        self._stem_bits = stem_bits
        # Sixteen bits need no choice of a range.
        self._stems = [
            _Stem(path, module, make() if stem_bits == 8 else MinMaxObserver())
            for path, module in model.named_modules()
            if stem_bits and quantized.has_stem(module)
        ]
        self._heads = [
            _Head(path, module, make())
            for path, module in model.named_modules()
            if has_head and quantized.has_stem(module)
        ]
        self._written: list[tuple[weakref.ref[Tensor], int, _Sites | _Stem]] = []

    def observe(self, batch: Tensor) -> None:
        """Runs the model in floating point and shows the activations to the observers."""
        self._written = []
        with (
            _watched([sites.block for sites in self.sites], self._observed),
            _watched([stem.network for stem in self._stems], self._stem_observed),
            _watched([head.network for head in self._heads], self._head_observed, HEAD),
        ):
            self._model(batch)

    def _stem_observed(self, network: nn.Module, x: Tensor) -> Tensor:
        (stem,) = (stem for stem in self._stems if stem.network is network)
        stem.observer.update(x)
        out = float_stem(network, x)
        self._written.append((weakref.ref(out), out._version, stem))
        return out

    def _head_observed(self, network: nn.Module, x: Tensor) -> Tensor:
        (head,) = (head for head in self._heads if head.network is network)
        writer = self._writer(x)
        head.writers.add(writer.path if isinstance(writer, _Sites) else None)
        if x.dim() == 4 and x.numel() > 0:
            head.observer.update(F.adaptive_avg_pool2d(x, 1))
        return float_head(network, x)

    def _observed(self, block: nn.Module, x: Tensor) -> Tensor | None:
        sites = self._of[id(block)]
        if read.obstacle(block) is not None or read.input_obstacle(x) is not None:
            return None
        if read.block_layers(block) is None:
            return None
        writer = self._writer(x)
        if isinstance(writer, _Stem):
            writer.readers.add(sites.path)
            writer = None
        sites.observe(writer, 0, x)
        out = _in_float(block, x, lambda i, values: sites.observe(None, i + 1, values))
        self._written.append((weakref.ref(out), out._version, sites))
        return out

    def _writer(self, x: Tensor) -> _Sites | _Stem | None:
        """The block or stem that returned this tensor, if nothing has been written to it since."""
        for written, version, sites in reversed(self._written):
            if written() is x:
                return sites if x._version == version else None
        return None

    def ranges(self) -> dict[str, BlockRanges]:
        """The ranges of each block, or why it has none, by its path.

        Raises:
            ValueError: an activation was NaN or infinite.
        """
        return {sites.path: self._ranges_of(sites) for sites in self.sites}

    def stem_ranges(self, blocks: dict[str, BlockRanges]) -> dict[str, StemRanges]:
        """The ranges of each stem, or why it has none, by its network's path.

        Args:
            blocks: the blocks' ranges.

        Raises:
            ValueError: an input was NaN or infinite.
        """
        return {stem.path: self._stem_ranges_of(stem, blocks) for stem in self._stems}

    def _stem_ranges_of(self, stem: _Stem, blocks: dict[str, BlockRanges]) -> StemRanges:
        bits, observer = self._stem_bits, stem.observer
        unit = forms.of(stem.network).units_of(stem.network)[0]
        weight = getattr(forms.part(stem.network, unit.conv), "weight", None)
        shape = () if weight is None else tuple(weight.shape)

        def left(reason: str) -> StemRanges:
            return StemRanges(stem.path, shape, bits, (), None, reason)

        if (obstacle := read.obstacle(stem.network)) is not None:
            return left(obstacle)
        if (described := quantized.stem_of(stem.network, bits)) is None:
            return left("it has more to it than a convolution of one group, a norm and a pool")
        if observer.count == 0:
            return left("no calibration batch ran it")
        if not observer.is_finite:
            raise ValueError(
                f"quantize: the input of the stem {stem.path!r} has a value that is NaN or "
                "infinite in the calibration batches"
            )
        read_by = [blocks[path] for path in stem.readers]
        if len(read_by) != 1 or read_by[0].reason or read_by[0].ranges[0].zero_point:
            return left("what reads its output is not one block in eight bits")
        words = words_of(observer.low, observer.high)
        stored = observer.quantization() if bits == 8 else words
        if stored is None:
            return left("its input is zero in all calibration batches")
        ranges = (stored, read_by[0].ranges[0])
        if not copy_of_stem(described, *ranges).is_finite:
            return left(NOT_FINITE)
        return StemRanges(stem.path, shape, bits, ranges, None, "")

    def head_ranges(self, blocks: dict[str, BlockRanges]) -> dict[str, HeadRanges]:
        """The ranges of each classifier, or why it has none, by its network's path.

        Args:
            blocks: the blocks' ranges.

        Raises:
            ValueError: a mean over pixels was NaN or infinite.
        """
        return {head.path: self._head_ranges_of(head, blocks) for head in self._heads}

    def _head_ranges_of(self, head: _Head, blocks: dict[str, BlockRanges]) -> HeadRanges:
        described = quantized.head_of(head.network)
        shape = () if described is None else tuple(described.weight.shape)

        def left(reason: str) -> HeadRanges:
            return HeadRanges(head.path, shape, (), None, reason)

        if described is None:
            return left("it has more to it than a mean over all pixels and a linear layer")
        if described.weight.dtype not in DTYPES:
            return left(f"its weight has dtype {described.weight.dtype}")
        if head.observer.count == 0:
            return left("no calibration batch ran it")
        if not head.observer.is_finite:
            raise ValueError(
                f"quantize: the input of the classifier of {head.path!r} has a value that is NaN "
                "or infinite in the calibration batches"
            )
        read = [blocks[path] for path in head.writers if path is not None]
        if len(read) != len(head.writers) or len(read) != 1 or read[0].reason:
            return left("what it reads is not the output of one block in eight bits")
        pooled = head.observer.quantization()
        if pooled is None:
            return left("its input is zero in all calibration batches")
        ranges = (read[0].ranges[-1], pooled)
        if any(stored.zero_point for stored in ranges):
            return left("its input has values below zero")
        if not copy_of_head(described, pooled).is_finite:
            return left("a weight or bias of it is not finite")
        return HeadRanges(head.path, shape, ranges, None, "")

    def _ranges_of(self, sites: _Sites) -> BlockRanges:
        shapes = quantized.shapes_of(sites.block)
        observers = [*sites.observers]
        if sites.source is not None:
            observers[0] = sites.source.observers[-1]

        def left(reason: str) -> BlockRanges:
            return BlockRanges(sites.path, shapes, (), None, reason, self._dtype)

        if sites.reason is not None:
            return left(sites.reason)
        if not sites.has_run:
            return left("no calibration batch ran it")
        stored = [self._stored(observer) for observer in observers]
        placeholder = [Quantization(1.0) if one is None else one for one in stored]
        if not is_foldable(sites.block, placeholder, self._dtype):
            return left(NOT_FINITE)
        names = quantized.names_of_activations(sites.block)
        for what, observer in zip(names, observers, strict=True):
            if not observer.is_finite:
                raise ValueError(
                    f"quantize: {what} of block {sites.path!r} has a value that is NaN or infinite "
                    "in the calibration batches"
                )
        ranges: list[Quantization] = []
        for what, one in zip(names, stored, strict=True):
            if one is None:
                return left(f"{what} is zero in all calibration batches")
            ranges.append(one)
        return BlockRanges(sites.path, shapes, tuple(ranges), None, "", self._dtype)

    def _stored(self, observer: MinMaxObserver) -> Quantization | None:
        if not observer.is_finite:
            return None
        is_float8 = self._dtype == FLOAT8
        return observer.float8_quantization() if is_float8 else observer.quantization()


@dataclass
class _Power:
    signal: float = 0.0
    noise: float = 0.0

    def decibels(self) -> float | None:
        """10 log10(signal / noise); None without noise."""
        if self.noise == 0.0:
            return None
        return 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf

    def see(self, out: Tensor, stored: Tensor) -> None:
        expected = out.double()
        self.signal += expected.square().sum().item()
        self.noise += (stored.double() - expected).square().sum().item()


class Found(NamedTuple):
    """What calibration has come to, each by its path, a stem or classifier by its network's."""

    blocks: dict[str, BlockRanges]
    stems: dict[str, StemRanges]
    heads: dict[str, HeadRanges]


def measure_noise(model: nn.Module, found: Found, batches: Iterable[Tensor]) -> Found:
    """The ranges with each block's signal-to-quantization-noise ratio on these batches.

    Of each block on the activations of the model in floating point, `sum y^2 / sum (y' - y)^2`, y
    its output in floating point and y' in eight bits, its input included. So of stems, and of
    classifiers.
    """
    ranges, stems, heads = found
    powers = {path: _Power() for path in heads}
    sites = {
        id(module): (path, _Power())
        for path, module in model.named_modules()
        if quantized.is_quantizable(module) or path in stems
    }

    def measured(block: nn.Module, x: Tensor) -> Tensor | None:
        path, power = sites[id(block)]
        kept = ranges[path]
        described = None if kept.reason else read.inference_block(block, x)
        if described is None:
            return None
        stored = quantized.residual_blocks(x, [described], [kept.ranges], kept.dtype)
        if stored is None:
            return None
        out = _in_float(block, x, lambda index, values: None)
        power.see(out, stored)
        return out

    def stem_measured(network: nn.Module, x: Tensor) -> Tensor | None:
        path, power = sites[id(network)]
        kept = stems[path]
        described = None if kept.reason else quantized.stem_of(network, kept.bits, x)
        if described is None:
            return None
        stored = conv_bn_act_max_pool_int8(x, described, *kept.ranges)
        if stored is None:
            return None
        out = float_stem(network, x)
        power.see(out, stored)
        return out

    paths = {id(model.get_submodule(path)): path for path in heads}

    def head_measured(network: nn.Module, x: Tensor) -> Tensor:
        path = paths[id(network)]
        kept, described = heads[path], quantized.head_of(network)
        out = float_head(network, x)
        if not kept.reason and described is not None:
            stored = pool_linear_int8(x, described, *kept.ranges)
            if stored is not None:
                powers[path].see(out, stored)
        return out

    blocks = [module for module in model.modules() if quantized.is_quantizable(module)]
    with (
        _watched(blocks, measured),
        _watched([model.get_submodule(path) for path in stems], stem_measured),
        _watched([model.get_submodule(path) for path in heads], head_measured, HEAD),
    ):
        for batch in batches:
            model(batch)
    decibels = {path: power.decibels() for path, power in sites.values()}
    return Found(
        {path: kept._replace(sqnr_db=decibels[path]) for path, kept in ranges.items()},
        {path: kept._replace(sqnr_db=decibels[path]) for path, kept in stems.items()},
        {path: kept._replace(sqnr_db=powers[path].decibels()) for path, kept in heads.items()},
    )


def is_foldable(block: nn.Module, ranges: Sequence[Quantization], dtype: str = "int8") -> bool:
    """Whether the eight-bit copy of a block without `float_reason` has finite scales."""
    found = read.block_layers(block)
    assert found is not None
    pairs, has_projection = found
    layers = [read.layer_of(conv, norm) for conv, norm in pairs]
    copies = copies_of([Block(layers, has_projection)], [ranges], dtype)
    return all(copy.is_finite for copy in copies)


def _in_float(block: nn.Module, x: Tensor, see: Callable[[int, Tensor], None]) -> Tensor:
    """A block of nothing but convolutions, norms and ReLUs; `see` what each one leaves."""
    form = forms.of(block)
    *units, last = form.units_of(block)
    out = x
    for i, unit in enumerate(units):
        out = run.run_unit(block, unit, out)
        see(i, out)
    shortcut = run.shortcut_of(read.shortcut(block, form), x)
    out = run.run_unit(block, last, out, shortcut)
    see(len(units), out)
    return out


@contextlib.contextmanager
def _watched(
    modules: Sequence[nn.Module], watcher: quantized.Watcher, name: str = "quantization"
) -> Iterator[None]:
    """With `watcher` in the place of the ranges that the modules have under this name."""
    before = [vars(module).get(name) for module in modules]
    try:
        for module in modules:
            vars(module)[name] = watcher
        yield
    finally:
        for module, kept in zip(modules, before, strict=True):
            vars(module).pop(name)
            if kept is not None:
                vars(module)[name] = kept
