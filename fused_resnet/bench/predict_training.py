"""What byte counts predict for a training step on a GPU: no measurement.

    {"gpu": "H100", "model": "resnet50", "dtype": "float16", "batch": 64,
     "microseconds": {"eager": 2.0, "fused": 1.0, "with_ends": 0.9, "convolutions": 0.5},
     "megabytes_per_image": {"eager": 2.0, "fused": 1.0},
     "norms": [{
        "shape": [64, 64, 56, 56], "kind": "inner", "count": 6,
        "eager_megabytes": 2.0, "fused_megabytes": 1.0,
        "forward_share_of_copy_bandwidth": 0.9, "backward_share_of_copy_bandwidth": 0.9}],
     "blocks": [{"block": "layer1.0", "eager_megabytes": 2.0, "fused_megabytes": 1.0}]}

Forward and backward of a batch under autocast, without the optimizer. The convolutions are the same
for both, a product forward and two backward (the stem has one). Everything else takes as long as
its tensors' bytes at copy bandwidth, plus its launches; `PASSES` says how often each kind of norm,
with what follows it, goes through a tensor of its output's size. The stem's pool, the head, casts
of weights are the same for both and left out; so are caches. The sum of a block's two input
gradients is a pass of its own for both. "with_ends" is "fused" with what the chosen convolutions of
`backends/triton/training_conv.py` are predicted to save (`tuning/training.py`): statistics, masks,
sums and norms at their ends instead of in passes. The bytes are those of "fused". A share is the
bytes that an operator cannot do without at copy bandwidth, over its predicted time; what a block's
backward computes again is not in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torchvision

from ..tuning import estimate, layers
from ..tuning import training as ends
from ..tuning.architecture import Architecture
from ..tuning.problem import ConvProblem

BATCHES = (64, 256)
DTYPE = "float16"
_BYTES = 2
# What adds up, what combines the sums, and what goes through all elements again.
_REDUCING_LAUNCHES = 3


@dataclass(frozen=True)
class Passes:
    """Reads and writes of a whole tensor, forward, backward and again; and launches of all."""

    forward: int
    backward: int
    again: int
    forward_launches: int
    backward_launches: int


# Eager's norm reads its input twice and writes once, backward it reads two tensors twice and writes
# one; ReLU in place is 2 and 3, an add in place 3. Fused: `backends/triton/batch_norm.py`.
PASSES: dict[str, dict[str, Passes]] = {
    # relu(norm): the convolution behind it needs it once more in backward.
    "inner": {"eager": Passes(5, 8, 0, 3, 3), "fused": Passes(3, 5, 2, 3, 4)},
    # relu(norm + shortcut): the sums' pass writes the shortcut's gradient, and the last reads it.
    "last": {"eager": Passes(8, 8, 0, 4, 3), "fused": Passes(4, 7, 0, 3, 3)},
    "projection": {"eager": Passes(3, 5, 0, 2, 2), "fused": Passes(3, 5, 0, 3, 3)},
}


@dataclass(frozen=True)
class Norm:
    """A batch norm: the block it is in, its kind in `PASSES`, its output's shape."""

    block: str
    kind: str
    shape: tuple[int, int, int, int]

    @property
    def bytes_once(self) -> int:
        """Of one tensor."""
        N, C, H, W = self.shape
        return _BYTES * N * C * H * W


@functools.lru_cache(maxsize=16)
def norms_of(name: str, batch: int) -> tuple[Norm, ...]:
    """The norms of one of torchvision's networks on images of 224 x 224, in order."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
        images = torch.empty(batch, 3, 224, 224)
    found: list[Norm] = []

    def record(path: str) -> Any:
        block, _, norm = path.rpartition(".")
        kind = "inner"
        if "downsample" in path:
            block, kind = block.removesuffix(".downsample"), "projection"
        elif block and norm == ("bn3" if hasattr(model.get_submodule(block), "bn3") else "bn2"):
            kind = "last"
        return lambda module, inputs, out: found.append(
            Norm(block or "stem", kind, tuple(out.shape))
        )

    for path, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(record(path))
    with torch.no_grad():
        model(images)
    return tuple(found)


def megabytes(norm: Norm, how: str) -> float:
    """What a norm, and what follows it, moves forward and backward."""
    passes = PASSES[norm.kind][how]
    return (passes.forward + passes.backward + passes.again) * norm.bytes_once / 1e6


def seconds(norm: Norm, how: str, gpu: Architecture) -> float:
    """Of a norm, and what follows it, forward and backward."""
    passes = PASSES[norm.kind][how]
    launches = passes.forward_launches + passes.backward_launches
    return 1e6 * megabytes(norm, how) / gpu.copy_bandwidth + launches * estimate.LAUNCH


def share_of_copy_bandwidth(norm: Norm, backward: bool, gpu: Architecture) -> float:
    """Of a fused norm in one direction: see this module's docstring."""
    passes = PASSES[norm.kind]["fused"]
    count = passes.backward if backward else passes.forward
    ideal = count * norm.bytes_once / gpu.copy_bandwidth
    return ideal / (ideal + _REDUCING_LAUNCHES * estimate.LAUNCH)


@dataclass(frozen=True)
class Block:
    """A residual block's convolutions in order, and its projection's."""

    main: tuple[ConvProblem, ...]
    projection: ConvProblem | None


@functools.lru_cache(maxsize=16)
def blocks_of(name: str, batch: int) -> tuple[Block, ...]:
    """The blocks of one of torchvision's networks on images of 224 x 224, in order."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
        images = torch.empty(batch, 3, 224, 224)
    found: dict[torch.nn.Module, ConvProblem] = {}

    def record(conv: torch.nn.Conv2d, inputs: tuple[torch.Tensor], _: torch.Tensor) -> None:
        K, _, R, S = conv.weight.shape
        found[conv] = ConvProblem(
            *inputs[0].shape, K, R, S, conv.stride, conv.padding, conv.dilation, conv.groups,
            DTYPE, False,
        )  # fmt: skip

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(images)
    blocks = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            convs = [block.conv1, block.conv2]
            convs += [block.conv3] if hasattr(block, "conv3") else []
            projection = None if block.downsample is None else found[block.downsample[0]]
            blocks.append(Block(tuple(found[conv] for conv in convs), projection))
    return tuple(blocks)


def gradient_sum(block: Block, gpu: Architecture) -> float:
    """Seconds for adding the shortcut's gradient to the other one."""
    return 3 * block.main[0].input_bytes / gpu.copy_bandwidth + estimate.LAUNCH


def saved_by_ends(block: Block, gpu: Architecture) -> float:
    """Seconds that norms at the ends of a block's convolutions save.

    In the order in which `ops/training_blocks.py` asks for them.
    """
    saved, before = 0.0, False
    for problem in block.main:
        if problem.groups > 1:
            before = False
            continue
        tile, seconds = ends.forward(problem, before, gpu)
        if tile is None and before:
            tile, seconds = ends.forward(problem, False, gpu)
        saved, before = saved + seconds, tile is not None
    if block.projection is not None:
        saved += ends.forward(block.projection, False, gpu)[1]
    for index, problem in enumerate(block.main):
        if problem.groups > 1 or problem.stride != (1, 1):
            continue
        transposed = dataclasses.replace(
            problem, C=problem.K, K=problem.C, residual=index == 0 and block.projection is None
        )
        if index == 0:
            if transposed.residual:
                saved += ends.backward(transposed, False, False, gpu)[1]
            continue
        seconds = 0.0
        if index == len(block.main) - 1 and problem.R * problem.S == 1:
            seconds = ends.backward(transposed, True, True, gpu)[1]
        saved += seconds or ends.backward(transposed, False, True, gpu)[1]
    return saved


def predicted_step(name: str, batch: int, gpu: Architecture) -> dict[str, Any]:
    """A network's entry: see this module's docstring."""
    norms = norms_of(name, batch)
    convolutions = 0.0
    for problem, count in layers.of_model(name, batch, DTYPE).items():
        products = 2 if problem.C == 3 else 3
        convolutions += products * count * estimate.predicted_convolution(problem, gpu)
    times = {
        how: convolutions + sum(seconds(norm, how, gpu) for norm in norms)
        for how in ("eager", "fused")
    }
    network = blocks_of(name, batch)
    for how in times:
        times[how] += sum(gradient_sum(block, gpu) for block in network)
    times["with_ends"] = times["fused"] - sum(saved_by_ends(block, gpu) for block in network)
    times["convolutions"] = convolutions
    blocks = dict.fromkeys(norm.block for norm in norms)
    return {
        "gpu": gpu.name,
        "model": name,
        "dtype": DTYPE,
        "batch": batch,
        "microseconds": {how: round(1e6 * value, 1) for how, value in times.items()},
        "megabytes_per_image": {
            how: round(sum(megabytes(norm, how) for norm in norms) / batch, 1)
            for how in ("eager", "fused")
        },
        "norms": [
            {
                "shape": list(norm.shape),
                "kind": norm.kind,
                "count": count,
                "eager_megabytes": round(megabytes(norm, "eager"), 1),
                "fused_megabytes": round(megabytes(norm, "fused"), 1),
                "forward_share_of_copy_bandwidth": round(
                    share_of_copy_bandwidth(norm, False, gpu), 3
                ),
                "backward_share_of_copy_bandwidth": round(
                    share_of_copy_bandwidth(norm, True, gpu), 3
                ),
            }
            for norm, count in Counter(Norm("", n.kind, n.shape) for n in norms).items()
        ],
        "blocks": [
            {
                "block": block,
                **{
                    f"{how}_megabytes": round(
                        sum(megabytes(norm, how) for norm in norms if norm.block == block), 1
                    )
                    for how in ("eager", "fused")
                },
            }
            for block in blocks
        ],
    }
