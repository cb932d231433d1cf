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

from torch import Tensor, nn

from .. import forms
from ..layers.description import Block
from ..layers.quantized import FLOAT8, Quantization
from ..layers.quantized_copies import copies_of, copy_of_stem
from ..layers.ranges import BlockRanges, StemRanges, words_of
from ..modules import quantized, read, run
from ..modules.network import float_stem
from ..ops.conv_bn_act_max_pool_int8 import conv_bn_act_max_pool_int8
from .observers import MinMaxObserver

NOISE_IMAGES = 64
"""Of the first batches, how many images the noise is measured on."""

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


class Calibration:
    """What is seen of the blocks of a model.

    Args:
        model: with fused blocks, in inference mode.
        make: a new observer.
        stem_bits: of networks' first convolutions; 0 for floating point.
        dtype: of the blocks: "int8" or "float8_e4m3fn".

    Attributes:
        sites: of each fused residual block, in the order of `named_modules`.
    """

    def __init__(
        self,
        model: nn.Module,
        make: Callable[[], MinMaxObserver],
        stem_bits: int,
        dtype: str = "int8",
    ) -> None:
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
        self._written: list[tuple[weakref.ref[Tensor], int, _Sites | _Stem]] = []

    def observe(self, batch: Tensor) -> None:
        """Runs the model in floating point and shows the activations to the observers."""
        self._written = []
        with (
            _watched([sites.block for sites in self.sites], self._observed),
            _watched([stem.network for stem in self._stems], self._stem_observed),
        ):
            self._model(batch)

    def _stem_observed(self, network: nn.Module, x: Tensor) -> Tensor:
        (stem,) = (stem for stem in self._stems if stem.network is network)
        stem.observer.update(x)
        out = float_stem(network, x)
        self._written.append((weakref.ref(out), out._version, stem))
        return out

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


def measure_noise(
    model: nn.Module,
    ranges: dict[str, BlockRanges],
    stems: dict[str, StemRanges],
    batches: Iterable[Tensor],
) -> tuple[dict[str, BlockRanges], dict[str, StemRanges]]:
    """The ranges with each block's signal-to-quantization-noise ratio on these batches.

    Of each block on the activations of the model in floating point, `sum y^2 / sum (y' - y)^2`, y
    its output in floating point and y' in eight bits, its input included. So of stems.
    """
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

    blocks = [module for module in model.modules() if quantized.is_quantizable(module)]
    networks = [model.get_submodule(path) for path in stems]
    with _watched(blocks, measured), _watched(networks, stem_measured):
        for batch in batches:
            model(batch)
    found = {path: power.decibels() for path, power in sites.values()}
    return (
        {path: kept._replace(sqnr_db=found[path]) for path, kept in ranges.items()},
        {path: kept._replace(sqnr_db=found[path]) for path, kept in stems.items()},
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
def _watched(blocks: Sequence[nn.Module], watcher: quantized.Watcher) -> Iterator[None]:
    before = [vars(block).get("quantization") for block in blocks]
    try:
        for block in blocks:
            vars(block)["quantization"] = watcher
        yield
    finally:
        for block, kept in zip(blocks, before, strict=True):
            vars(block).pop("quantization")
            if kept is not None:
                vars(block)["quantization"] = kept
