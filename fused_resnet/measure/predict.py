"""What the model of `fused_resnet/tuning/estimate.py` predicts for GPUs: no measurement.

Predicts the time of whole networks on several GPUs, run in four ways, and of every layer, as data
of the schema "fused_resnet.predicted/3":

    {"schema": "fused_resnet.predicted/3", "kind": "prediction", "networks": [{
        "gpu": "H100", "model": "resnet50", "dtype": "float16", "batch": 256,
        "megabytes_per_image": {"eager": 165.0, "fused": 54.0, "chain": 42.0, "chained": 31.0},
        "microseconds": {"eager": 1.0, "compiled": 1.0, "fused": 1.0, "chain": 1.0},
        "layers": [{
            "problem": "float16 256x64x56x56 k256 1x1 s1x1 p0x0 d1x1 g1 residual", "count": 3,
            "choice": "triton 128x64x64, 4 warps, 4 stages", "megabytes": 2.0, "gigaflops": 3.0,
            "microseconds": 1.0, "eager_microseconds": 2.0,
            "share_of_copy_bandwidth": 0.9, "share_of_matrix_rate": 0.1}],
        "chains": [{
            "problem": "chain float16 256x64x56x56 k256 s1x1 p1x1 d1x1 next64", "count": 1,
            "choice": "chain 128x32x64, 8 warps, 4 stages", "megabytes": 2.0, "gigaflops": 3.0,
            "microseconds": 1.0, "fused_microseconds": 2.0}]}],
     "training": [...]}

`training` is described in `predict_training.py`.

- eager: the library's convolutions, every other operator a kernel of its own.
- compiled, as `torch.compile` does: all that follows a convolution is one kernel.
- fused: batch norm, add, ReLU and the stem's pool inside the convolution (epilogue fusion).
- chain: as fused, but each Bottleneck runs as `fused_resnet/tuning/chain.py` expects to be fastest:
  from its 3x3 convolution to the next block's first 1x1 in one kernel, without the latter, without
  the 3x3, or still convolution by convolution; small batches with launches that overlap. `chains`
  has the blocks, `microseconds` as chosen and `fused_microseconds` one by one, one after the
  other. `megabytes_per_image` of "chained" are those of the network with every block chained that
  can be, whether or not that is expected to be faster.

The library's convolutions are taken to be as good as the kernels here, so ratios show what fusing
saves and nothing else. Eager, every other operator takes as long as its tensors' bytes at copy
bandwidth, plus a launch. The host, which eager execution of small batches waits for, is left out,
so ratios to eager at batch 1 are those under a CUDA graph. `megabytes` are those of a launch, each
tensor once. `share_of_copy_bandwidth` is the time to move them, divided by the predicted time, and
`share_of_matrix_rate` likewise of its products. Tiles
are those that Triton 3.9 compiles without spilling. The published figures behind it all are cited
in `fused_resnet/tuning/architecture.py`.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..tuning import basic_block, chain, compiler, estimate, untuned
from ..tuning.architecture import ARCHITECTURES, Architecture
from ..tuning.choice import CHAIN_WITHOUT_NEXT, CONVOLUTIONS, ESTIMATE, PAIR, Choice
from ..tuning.problem import BasicBlockProblem, ChainProblem, ConvProblem
from . import documents, predict_training
from . import networks as layers

GPUS = ("A100", "H100", "H200", "B200", "RTX 4090")
NETWORKS = ("resnet50", "resnext50_32x4d")
BATCHES = (1, 32, 256)
DTYPE = "float16"
# The launch that folds all norms of a network: it waits for addresses, then for parameters.
_FOLDING = estimate.LAUNCH + 2 * estimate.LATENCY


class Recorder(TorchDispatchMode):
    """Adds up the bytes that the operators of a network on tensors without data read and write.

    Attributes:
        moved: bytes of the tensors of each operator that is no view, in order, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in tensors)
            if moved > 0:  # not an allocation
                self.moved.append((str(func), moved))
        return out


@functools.lru_cache(maxsize=64)
def operators_of(name: str, batch: int) -> list[tuple[str, int]]:
    """The operators of a network in eval mode on images of 224 x 224, each with its bytes."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval().half()
        images = torch.empty(batch, 3, 224, 224, dtype=torch.half)
    with torch.no_grad(), Recorder() as recorder:
        model(images)
    return recorder.moved


def _is_fused(operator: str) -> bool:
    """Whether a fused network does an operator's work inside a convolution."""
    return re.match(r"aten\.(convolution|\w*batch_norm|relu|add|max_pool2d)", operator) is not None


@functools.lru_cache(maxsize=64)
def chains_of(name: str, batch: int, dtype: str) -> Counter[ChainProblem]:
    """The blocks of a network that the chain kernel takes, and how often it has each."""
    return Counter(one for one in layers.chains_of_model(name, batch, dtype) if one is not None)


def bytes_chosen(problem: ChainProblem, choice: Choice) -> int:
    """What the launches of a choice move, each tensor once a launch."""
    if choice.kernel == CONVOLUTIONS:
        return sum(part.bytes_once for part in problem.parts)
    if choice.kernel == CHAIN_WITHOUT_NEXT:
        assert problem.reduce is not None
        return problem.without_next().bytes_once + problem.reduce.bytes_once
    if choice.kernel == PAIR:
        return problem.convolution.bytes_once + problem.bytes_of_pair
    return problem.bytes_once


def predicted_chain(problem: ChainProblem, count: int, gpu: Architecture) -> dict[str, Any]:
    """A block's entry: see this module's docstring."""
    choice = untuned(problem, gpu)
    one_by_one = chain.predicted_convolutions(problem, gpu, in_row=False)
    return {
        "problem": problem.key,
        "count": count,
        "choice": str(choice),
        "megabytes": round(bytes_chosen(problem, choice) / 1e6, 2),
        "gigaflops": round(problem.flops / 1e9, 3),
        "microseconds": round(1e6 * chain.predicted(problem, gpu, choice), 2),
        "fused_microseconds": round(1e6 * one_by_one, 2),
    }


@dataclass(frozen=True)
class BasicBlock:
    """A BasicBlock's two 3x3 convolutions on a GPU, in a launch each and in one.

    Attributes:
        batch: images.
        width: channels.
        size: rows and columns of an image.
        rows: of the tile of output pixels a program computes, the fastest one.
        columns: of the tile.
        apart: seconds of two launches.
        chained: seconds of one.
    """

    batch: int
    width: int
    size: int
    rows: int
    columns: int
    apart: float
    chained: float

    @property
    def recomputed(self) -> float:
        """How often a pixel between the convolutions is computed: in its tile and in halos."""
        return (self.rows + 2) * (self.columns + 2) / (self.rows * self.columns)

    @property
    def map_bytes(self) -> int:
        """Of the activations of one tensor."""
        return 2 * self.batch * self.width * self.size**2

    @property
    def fewer_bytes(self) -> int:
        """What is not moved: the tensor between, twice, and the input again as the shortcut."""
        return 3 * self.map_bytes


# Stages of a ResNet-18: width, and rows and columns of an image.
_BASIC_STAGES = ((64, 56), (128, 28), (256, 14), (512, 7))
# What the kernel could be for more channels: sums of at most 128 registers a thread, of which a
# multiprocessor then holds 8 warps. Nothing but 64 channels is built.
_UNBUILT = tuple(
    basic_block.Shape(rows, 8, stages, 255, channels)
    for channels in (128, 256, 512)
    for rows in (2, 6, 14)
    for stages in (2, 3, 4)
    if -(-(rows + 2) // 8) * channels // 2 <= 128
)


@compiler.as_of(compiler.PREDICTED)
def basic_blocks(gpu: Architecture, batches: Sequence[int] = BATCHES) -> list[BasicBlock]:
    """The BasicBlocks of a ResNet-18 of stride 1: see docs/basic_block_chain.md for the model."""
    found = []
    for width, size in _BASIC_STAGES:
        for batch in batches:
            problem = BasicBlockProblem(batch, width, size, size, DTYPE)
            apart = basic_block.predicted(problem, gpu, Choice(CONVOLUTIONS, None, ESTIMATE))
            shapes = [
                (basic_block.predicted_shape(problem, gpu, shape), shape.rows)
                for shape in (*basic_block.SHAPES, *_UNBUILT)
                if shape.channels == width and shape.shared_bytes <= gpu.shared_per_block
            ]
            chained, rows = min(shapes) if shapes else (math.inf, 0)
            columns = basic_block.COLUMNS if rows else 0
            found.append(BasicBlock(batch, width, size, rows, columns, apart, chained))
    return found


def first_stage_table(gpus: Sequence[str], batches: Sequence[int] = (1, 8, *BATCHES[1:])) -> str:
    """One launch over two, of the first stage's blocks, by GPU and batch."""
    lines = [
        "| GPU | " + " | ".join(f"batch {batch}" for batch in batches) + " |",
        "| --- |" + " --- |" * len(batches),
    ]
    for name in gpus:
        blocks = basic_blocks(ARCHITECTURES[name], batches)[: len(batches)]
        ratios = [f"{one.chained / one.apart:.2f}" for one in blocks]
        lines.append(f"| {name} | " + " | ".join(ratios) + " |")
    return "\n".join(lines) + "\n"


def basic_block_table(blocks: Sequence[BasicBlock]) -> str:
    """The table of docs/basic_block_chain.md."""
    lines = [
        "| stage | batch | tile | pixels computed / needed | bytes saved / moved | apart, us "
        "| in one, us | one / two |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for one in blocks:
        stage = f"{one.width} channels, {one.size} x {one.size}"
        if not one.rows:
            two = f"{1e6 * one.apart:.1f}"
            lines.append(f"| {stage} | {one.batch} | none fits | | | {two} | | |")
            continue
        lines.append(
            f"| {stage} | {one.batch} | {one.rows} x {one.columns} | {one.recomputed:.2f} | "
            f"{one.fewer_bytes / (5 * one.map_bytes):.0%} | {1e6 * one.apart:.1f} | "
            f"{1e6 * one.chained:.1f} | {one.chained / one.apart:.2f} |"
        )
    return "\n".join(lines) + "\n"


def small_batch_table(gpu: Architecture, batches: Sequence[int] = (1, 2, 4, 8, 256)) -> str:
    """The table of docs/small_batches.md."""
    lines = [
        "| batch | epilogue fusion | as chosen | times as long |",
        "| ---: | ---: | ---: | ---: |",
    ]
    for batch in batches:
        times = predicted_network("resnet50", batch, gpu)["microseconds"]
        fused, chosen = times["fused"], times["chain"]
        lines.append(f"| {batch} | {fused:.0f} | {chosen:.0f} | {fused / chosen:.2f} |")
    return "\n".join(lines) + "\n"


def eager_seconds(problem: ConvProblem, gpu: Architecture) -> float:
    """A layer's convolution, batch norm, add, ReLU and pool as kernels of their own."""
    unpooled = problem.element_size * problem.N * problem.K * problem.P * problem.Q
    moved = [2 * unpooled, 2 * unpooled]  # batch norm, ReLU
    if problem.residual:
        moved.append(3 * unpooled)
    if problem.pool is not None:
        moved.append(unpooled + problem.output_bytes)
    after = sum(one / gpu.copy_bandwidth + estimate.LAUNCH for one in moved)
    return estimate.predicted_convolution(problem, gpu) + after


def predicted_layer(problem: ConvProblem, count: int, gpu: Architecture) -> dict[str, Any]:
    """A fused layer's entry: see this module's docstring."""
    choice = untuned(problem, gpu)
    seconds = estimate.predicted_choice(problem, gpu, choice)
    return {
        "problem": problem.key,
        "count": count,
        "choice": str(choice),
        "megabytes": round(problem.bytes_once / 1e6, 3),
        "gigaflops": round(problem.flops / 1e9, 4),
        "microseconds": round(1e6 * seconds, 2),
        "eager_microseconds": round(1e6 * eager_seconds(problem, gpu), 2),
        "share_of_copy_bandwidth": round(problem.bytes_once / gpu.copy_bandwidth / seconds, 3),
        "share_of_matrix_rate": round(problem.flops / gpu.rate(DTYPE) / seconds, 3),
    }


@compiler.as_of(compiler.PREDICTED)
def predicted_network(name: str, batch: int, gpu: Architecture) -> dict[str, Any]:
    """A network's entry: see this module's docstring."""
    problems: Counter[ConvProblem] = layers.of_model(name, batch, DTYPE)
    entries = [predicted_layer(problem, count, gpu) for problem, count in problems.items()]
    operators = operators_of(name, batch)
    outside = [moved for operator, moved in operators if not _is_fused(operator)]
    between = [
        moved
        for operator, moved in operators
        if _is_fused(operator) and not operator.startswith("aten.convolution")
    ]
    head = sum(moved / gpu.copy_bandwidth + estimate.LAUNCH for moved in outside)
    convolutions = sum(n * estimate.predicted_convolution(p, gpu) for p, n in problems.items())
    seconds = {
        "eager": head
        + convolutions
        + sum(moved / gpu.copy_bandwidth + estimate.LAUNCH for moved in between),
        "compiled": head
        + sum(n * estimate.predicted_compiled(p, gpu) for p, n in problems.items()),
        "fused": head + _FOLDING + sum(1e-6 * e["microseconds"] * e["count"] for e in entries),
    }
    blocks = chains_of(name, batch, DTYPE)
    chains = [predicted_chain(problem, count, gpu) for problem, count in blocks.items()]
    saved = sum(one["count"] * (one["fused_microseconds"] - one["microseconds"]) for one in chains)
    seconds["chain"] = seconds["fused"] - 1e-6 * saved
    fused_bytes = sum(n * p.bytes_once for p, n in problems.items()) + sum(outside)
    return {
        "gpu": gpu.name,
        "model": name,
        "dtype": DTYPE,
        "batch": batch,
        "megabytes_per_image": {
            "eager": round(sum(moved for _, moved in operators) / batch / 1e6, 1),
            "fused": round(fused_bytes / batch / 1e6, 1),
            "chain": round((fused_bytes - saved_bytes(blocks, gpu)) / batch / 1e6, 1),
            "chained": round((fused_bytes - saved_bytes(blocks, None)) / batch / 1e6, 1),
        },
        "microseconds": {how: round(1e6 * value, 1) for how, value in seconds.items()},
        "layers": entries,
        "chains": chains,
    }


def saved_bytes(blocks: Counter[ChainProblem], gpu: Architecture | None) -> int:
    """Bytes that blocks as chosen for a GPU, or all of them chained, move less than one by one."""
    saved = 0
    for problem, count in blocks.items():
        moved = problem.bytes_once if gpu is None else bytes_chosen(problem, untuned(problem, gpu))
        saved += count * (sum(part.bytes_once for part in problem.parts) - moved)
    return saved


def document(models: Sequence[str] = NETWORKS, batches: Sequence[int] = BATCHES) -> dict[str, Any]:
    """All of the predictions."""
    networks = [
        predicted_network(name, batch, ARCHITECTURES[gpu])
        for gpu in GPUS
        for name in models
        for batch in batches
    ]
    training = [
        predict_training.predicted_step(name, batch, ARCHITECTURES[gpu])
        for gpu in GPUS
        for name in models
        for batch in predict_training.BATCHES
    ]
    return {
        "schema": documents.PREDICTED,
        "kind": "prediction",
        "networks": networks,
        "training": training,
    }


def text(content: dict[str, Any]) -> str:
    """The file's text: one line a layer."""
    parts = [json.dumps({k: v for k, v in content.items() if k not in ("networks", "training")})]
    for name, lists in (("networks", ("layers", "chains")), ("training", ("norms", "blocks"))):
        lines = []
        for network in content[name]:
            head = json.dumps({k: v for k, v in network.items() if k not in lists})
            for key in lists:
                rows = ",\n    ".join(json.dumps(row) for row in network[key])
                head = f'{head[:-1]}, "{key}": [\n    {rows}]}}'
            lines.append(f"  {head}")
        parts.append(f'"{name}": [\n' + ",\n".join(lines) + "\n]")
    return parts[0][:-1] + ", " + ", ".join(parts[1:]) + "}\n"
