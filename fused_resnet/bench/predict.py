"""What the model of `fused_resnet/tuning/estimate.py` predicts for GPUs: no measurement.

Predicts the time of whole networks on several GPUs, run in four ways, and of every layer, as data
of the schema "fused_resnet.predicted/2":

    {"schema": "fused_resnet.predicted/2", "kind": "prediction", "networks": [{
        "gpu": "H100", "model": "resnet50", "dtype": "float16", "batch": 256,
        "megabytes_per_image": {"eager": 165.0, "fused": 54.0, "chain": 31.0},
        "microseconds": {"eager": 1.0, "compiled": 1.0, "fused": 1.0, "chain": 1.0},
        "layers": [{
            "problem": "float16 256x64x56x56 k256 1x1 s1x1 p0x0 d1x1 g1 residual", "count": 3,
            "choice": "triton 128x64x64, 4 warps, 4 stages", "megabytes": 2.0, "gigaflops": 3.0,
            "microseconds": 1.0, "eager_microseconds": 2.0,
            "share_of_copy_bandwidth": 0.9, "share_of_matrix_rate": 0.1}],
        "chains": [{
            "stage": "layer1", "blocks": 3, "width": 64, "megabytes": 2.0, "gigaflops": 3.0,
            "microseconds": 1.0, "fused_microseconds": 2.0}]}],
     "training": [...]}

`training` is described in `predict_training.py`.

- eager: the library's convolutions, every other operator a kernel of its own.
- compiled, as `torch.compile` does: all that follows a convolution is one kernel.
- fused: batch norm, add, ReLU and the stem's pool inside the convolution (epilogue fusion).
- chain: as fused, but each Bottleneck of width up to 256 runs from its 3x3 convolution to the next
  block's first 1x1 in one kernel, which reads the 3x3's input, the shortcut and the weights once
  and writes the block's output and the next block's 3x3 input once. It stays within a stage, and
  projections are kernels of their own. No such kernel exists yet. Where `chain_seconds` is more
  than its layers take fused, they stay fused.

The library's convolutions are taken to be as good as the kernels here, so ratios show what fusing
saves and nothing else. Eager, every other operator takes as long as its tensors' bytes at copy
bandwidth, plus a launch. The host, which eager execution of small batches waits for, is left out,
so ratios to eager at batch 1 are those under a CUDA graph. `megabytes` are those of a launch, each
tensor once. `share_of_copy_bandwidth` is the time to move them, divided by the predicted time, and
`share_of_matrix_rate` likewise of its products. The published figures behind it all are cited in
`fused_resnet/tuning/architecture.py`.
"""

from __future__ import annotations

import functools
import itertools
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

from ..tuning import estimate, layers, untuned
from ..tuning.architecture import ARCHITECTURES, Architecture
from ..tuning.problem import ConvProblem
from . import documents, predict_training

GPUS = ("A100", "H100", "H200", "B200", "RTX 4090")
NETWORKS = ("resnet50", "resnext50_32x4d")
BATCHES = (1, 32, 256)
DTYPE = "float16"
# Widest Bottleneck whose inner activations stay in one multiprocessor's registers.
WIDEST_CHAIN = 256
# Of the matrix rate: that of a tile of 128 x 64, see `estimate._efficiency`, with its epilogues.
CHAIN_EFFICIENCY = 0.7
# Channels of one step of a product, and steps in flight.
_BLOCK = 64
_STAGES = 3


class Recorder(TorchDispatchMode):
    """Adds up the bytes that the operators of a network on tensors without data read and write.

    Attributes:
        moved: bytes of the tensors of each operator that is no view, in order, by its name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
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


@dataclass(frozen=True)
class Chain:
    """The Bottlenecks of one stage of a network, as the chain kernel would run them.

    Attributes:
        stage: its module's name.
        width: output channels of the 3x3 convolutions.
        blocks: for each, the problems that one launch does: 3x3, 1x1 with the shortcut and, unless
            it is the stage's last, the next block's first 1x1.
    """

    stage: str
    width: int
    blocks: tuple[tuple[ConvProblem, ...], ...]


@functools.lru_cache(maxsize=64)
def chains_of(name: str, batch: int, dtype: str) -> list[Chain]:
    """The stages of a network that the chain kernel fits; none for networks without Bottlenecks."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
        images = torch.empty(batch, 3, 224, 224)
    sizes: dict[torch.nn.Module, torch.Size] = {}
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    for module in convolutions:
        module.register_forward_pre_hook(lambda m, args: sizes.update({m: args[0].shape}))
    with torch.no_grad():
        model(images)

    def problem(conv: torch.nn.Conv2d, residual: bool = False) -> ConvProblem:
        R, S = conv.kernel_size
        return ConvProblem(
            *sizes[conv], conv.out_channels, R, S, conv.stride, conv.padding, conv.dilation,
            conv.groups, dtype, residual,
        )  # fmt: skip

    found = []
    for stage, blocks in model.named_children():
        if not stage.startswith("layer") or not hasattr(blocks[0], "conv3"):
            continue
        width = blocks[0].conv2.out_channels
        if width > WIDEST_CHAIN:
            continue
        launches = []
        for block, following in itertools.zip_longest(blocks, list(blocks)[1:]):
            launch = [problem(block.conv2), problem(block.conv3, residual=True)]
            if following is not None:
                launch.append(problem(following.conv1))
            launches.append(tuple(launch))
        found.append(Chain(stage, width, tuple(launches)))
    return found


def chain_bytes(launch: Sequence[ConvProblem]) -> int:
    """Of one launch: the 3x3's input, shortcut, both outputs, weights and batch norms."""
    first, last = launch[0], launch[1]
    weights = sum(problem.weight_bytes + 16 * problem.K for problem in launch)
    following = launch[2].output_bytes if len(launch) == 3 else 0
    return first.input_bytes + 2 * last.output_bytes + following + weights


def chain_seconds(launch: Sequence[ConvProblem], gpu: Architecture) -> float:
    """Of one launch, by the rules of `estimate.predicted` with one program a multiprocessor.

    A program has all channels of its pixels, so small images fill few multiprocessors.
    """
    first, last = launch[0], launch[1]
    pixels = first.N * first.P * first.Q
    rows = 128 if first.K <= 128 else 64  # what leaves the registers room at this width
    waves = math.ceil(math.ceil(pixels / rows) / gpu.multiprocessors)
    # Narrow groups share a block of 64 channels, most of whose products are with zeros.
    dense = max(1.0, _BLOCK * first.groups / first.C) if first.groups > 1 else 1.0
    products = dense * first.flops + sum(problem.flops for problem in launch[1:])
    rate = CHAIN_EFFICIENCY * gpu.rate(first.dtype) / gpu.multiprocessors
    following = launch[2].K if len(launch) == 3 else 0
    depth = first.R * first.S * max(_BLOCK, first.C // first.groups)
    steps = depth / _BLOCK + last.K / _BLOCK * (first.K + following) / _BLOCK
    latency = estimate.LATENCY
    terms = (
        waves * products * rows / pixels / rate,
        chain_bytes(launch) / gpu.copy_bandwidth,
        waves * steps * latency / (_STAGES - 1),
    )
    hidden = estimate.IMPERFECT * (sum(terms) - max(terms))
    return max(terms) + hidden + 2 * waves * latency + estimate.LAUNCH


def predicted_chain(chain: Chain, gpu: Architecture) -> dict[str, Any]:
    """A stage's entry: see this module's docstring."""
    seconds, fused, moved, flops = 0.0, 0.0, 0, 0
    for launch in chain.blocks:
        layer_by_layer = sum(
            estimate.predicted_choice(problem, gpu, untuned(problem, gpu)) for problem in launch
        )
        seconds += min(chain_seconds(launch, gpu), layer_by_layer)
        fused += layer_by_layer
        moved += chain_bytes(launch)
        flops += sum(problem.flops for problem in launch)
    return {
        "stage": chain.stage,
        "blocks": len(chain.blocks),
        "width": chain.width,
        "megabytes": round(moved / 1e6, 2),
        "gigaflops": round(flops / 1e9, 3),
        "microseconds": round(1e6 * seconds, 2),
        "fused_microseconds": round(1e6 * fused, 2),
    }


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
        "fused": head + sum(1e-6 * e["microseconds"] * e["count"] for e in entries),
    }
    chains = [predicted_chain(chain, gpu) for chain in chains_of(name, batch, DTYPE)]
    saved = sum(one["fused_microseconds"] - one["microseconds"] for one in chains)
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
            "chain": round((fused_bytes - _chain_savings(name, batch)) / batch / 1e6, 1),
        },
        "microseconds": {how: round(1e6 * value, 1) for how, value in seconds.items()},
        "layers": entries,
        "chains": chains,
    }


def _chain_savings(name: str, batch: int) -> int:
    """Bytes that the chain kernel does not move and its layers, fused one by one, do."""
    return sum(
        sum(problem.bytes_once for problem in launch) - chain_bytes(launch)
        for chain in chains_of(name, batch, DTYPE)
        for launch in chain.blocks
    )


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
