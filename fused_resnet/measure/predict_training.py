"""What byte counts predict for a training step on a GPU: no measurement.

    {"gpu": "H100", "model": "resnet50", "dtype": "float16", "batch": 64,
     "microseconds": {"eager": 2.0, "compile": 1.5, "fused": 1.2, "with_ends": 1.1},
     "terms": {"eager": {"convolutions": 1.0, "norms": 0.7, "gradient sums": 0.1,
                         "stem's pool": 0.1, "parameters": 0.1, "running statistics": 0.0,
                         "at convolutions' ends": 0.0}},
     "megabytes_per_image": {"eager": 2.0, "compile": 1.5, "fused": 1.0},
     "norms": [{
        "shape": [64, 64, 56, 56], "kind": "inner", "count": 6,
        "eager_megabytes": 2.0, "fused_megabytes": 1.0,
        "forward_share_of_copy_bandwidth": 0.9, "backward_share_of_copy_bandwidth": 0.9}],
     "blocks": [{"block": "layer1.0", "eager_megabytes": 2.0, "fused_megabytes": 1.0}]}

A batch's step under autocast. The convolutions are the same for all, a product forward and two
backward (the stem has one), all as fast as the best of our tiles. Everything else takes as long as
its tensors' bytes at copy bandwidth, plus its launches; caches and the head are left out. `PASSES`
says how often each kind of norm, with what follows it, goes through a tensor of its output's size;
`POOL_PASSES` how often the stem's pool does. The sum of a block's two input gradients is a pass of
its own, but for `torch.compile`, which adds up where it reads. Parameters are cast for the forward
pass, their gradients cast back, unscaled, and the optimizer, SGD with momentum, steps.

What `torch.compile` does is what Inductor's decompositions allow at best: statistics and sums read
their tensors once each, everything elementwise between two convolutions is one kernel, a
projection's norm is part of the add behind it in both directions, and the mask comes from the
output that the next convolution keeps anyway.

"with_ends" is "fused" with what the chosen convolutions of `backends/triton/training_conv.py` are
predicted to save (`tuning/training.py`): statistics, masks, sums and norms at their ends instead of
in passes. The bytes are those of norms, adds and ReLUs, without convolutions' ends. A share is the
bytes that an operator cannot do without at copy bandwidth, over its predicted time; what a block's
backward computes again is not in it. Two norms that meet in an add are one operator.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torchvision

from ..tuning import cluster_norm, compiler, estimate
from ..tuning import training as ends
from ..tuning.architecture import Architecture
from ..tuning.problem import ConvProblem
from . import networks

BATCHES = (64, 256)
DTYPE = "float16"
_BYTES = 2
# A mask of a bit a value, in passes over a tensor.
_BITS = 1 / (8 * _BYTES)


@dataclass(frozen=True)
class Passes:
    """Reads and writes of a whole tensor, forward, backward and again; and launches of all."""

    forward: float
    backward: float
    again: int
    forward_launches: int
    backward_launches: int


# Eager's norm reads its input twice and writes once, backward it reads two tensors twice and writes
# one; ReLU in place is 2 and 3, an add in place 3. Fused: `backends/triton/norm.py`.
PASSES: dict[str, dict[str, Passes]] = {
    # relu(norm): the convolution behind it needs it once more in backward. Inductor keeps it, and
    # reads it for its mask both times.
    "inner": {
        "eager": Passes(5, 8, 0, 3, 3),
        "compile": Passes(3, 7, 0, 3, 3),
        "fused": Passes(3, 5, 2, 3, 4),
    },
    # relu(norm) with a pool behind it: fused, the pool's kernel normalises what it reads.
    "stem": {
        "eager": Passes(5, 8, 0, 3, 3),
        "compile": Passes(3, 7, 0, 3, 3),
        "fused": Passes(1, 5, 0, 2, 3),
    },
    # relu(norm + shortcut): fused, the mask is kept as bits; the sums' pass writes the shortcut's
    # gradient, and the last reads it. Inductor's sums' pass reads the two gradients that meet here,
    # instead of their sum.
    "last": {
        "eager": Passes(8, 8, 0, 4, 3),
        "compile": Passes(4, 8, 0, 3, 3),
        "fused": Passes(4 + _BITS, 6 + _BITS, 0, 3, 3),
    },
    # The same with a projection: fused, both norms' backward goes from the mask.
    "joined": {
        "eager": Passes(8, 8, 0, 4, 3),
        "compile": Passes(4, 8, 0, 3, 3),
        "fused": Passes(4 + _BITS, 5 + 2 * _BITS, 0, 3, 3),
    },
    # What its norm adds to that: the launches behind its statistics are those of the other.
    "projection": {
        "eager": Passes(3, 5, 0, 2, 2),
        "compile": Passes(1, 3, 0, 2, 0),
        "fused": Passes(1, 3, 0, 2, 0),
    },
}
# Of the unpooled tensor, for a pool of a quarter of its pixels: forward reads it and writes the
# values and their places (8 bytes each in eager, else one), backward reads both and writes one like
# the unpooled.
_INDEXED, _OFFSETS = 1.25 + 1.0, 1.25 + 0.125
POOL_PASSES = {"eager": 2 * _INDEXED, "compile": 2 * _OFFSETS, "fused": 2 * _OFFSETS}
_POOL_LAUNCHES = {"eager": 2, "compile": 2, "fused": 2}
# Bytes a parameter: cast to 16 bits (4 + 2), its gradient cast back (2 + 4) and unscaled (4 + 4);
# the optimizer reads parameter, gradient and momentum and writes two of them.
_PARAMETER_BYTES = 6 + 6 + 8 + 20
ENGINES = ("eager", "compile", "fused")
# Eager's norms update their statistics in passing, and count batches; Inductor does both so;
# a fused block does both for all its norms in three launches, and so does the stem.
_COUNTING_LAUNCHES = {"eager": (1, 0), "compile": (0, 0), "fused": (0, 3)}  # a norm's, a block's


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
        kind = "inner" if block else "stem"
        if "downsample" in path:
            block, kind = block.removesuffix(".downsample"), "projection"
        elif block and norm == ("bn3" if hasattr(model.get_submodule(block), "bn3") else "bn2"):
            kind = "last" if model.get_submodule(block).downsample is None else "joined"
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
    kinds = ("joined", "projection") if norm.kind in ("joined", "projection") else (norm.kind,)
    passes = [PASSES[kind]["fused"] for kind in kinds]
    count = sum(p.backward if backward else p.forward for p in passes)
    launches = sum(
        p.backward_launches - (p.again > 0) if backward else p.forward_launches for p in passes
    )
    ideal = count * norm.bytes_once / gpu.copy_bandwidth
    return ideal / (ideal + launches * estimate.LAUNCH)


# Of `batch_norm_act` alone, without and with an add: passes before a batch's sums are known and
# after, forward and backward. Launches of their own read their tensors twice; one for all
# (csrc/cuda/batch_norm_cluster.cuh) has kept them in shared memory.
_APART = {False: ((1, 2), (2, 3)), True: ((1, 3 + _BITS), (3 + _BITS, 3))}
_IN_ONE = {False: ((1, 1), (2, 1)), True: ((1, 2 + _BITS), (2 + _BITS, 2))}


def batch_norm_act_seconds(
    norm: Norm, backward: bool, in_one_launch: bool, gpu: Architecture
) -> float | None:
    """Of the operator in one direction, behind a projection without a ReLU.

    Returns:
        None where one launch cannot do it.
    """
    adds = norm.kind in ("last", "joined")
    if not in_one_launch:
        moved = sum(_APART[adds][backward]) * norm.bytes_once
        return moved / gpu.copy_bandwidth + 3 * estimate.LAUNCH
    N, C, H, W = norm.shape
    passes = _IN_ONE[adds][backward]
    return cluster_norm.predicted(N * H * W, C, _BYTES, passes, backward, gpu)


def copy_seconds(norm: Norm, backward: bool, gpu: Architecture) -> float:
    """Of a copy that moves what `batch_norm_act` does that reads its tensors twice."""
    moved = sum(_APART[norm.kind in ("last", "joined")][backward]) * norm.bytes_once
    return moved / gpu.copy_bandwidth + estimate.LAUNCH


def share_of_a_copy(norm: Norm, backward: bool, gpu: Architecture) -> float:
    """The time of such a copy over that of the CUDA backend, which has one launch where it fits."""
    found = batch_norm_act_seconds(norm, backward, True, gpu)
    if found is None:
        found = batch_norm_act_seconds(norm, backward, False, gpu)
    assert found is not None
    return copy_seconds(norm, backward, gpu) / found


def one_launch_table(batch: int, gpu: Architecture, name: str = "resnet50") -> str:
    """`batch_norm_act` in three launches and in one, every shape of a network, as Markdown.

    Microseconds, and how long a copy would take over that.
    """
    lines = [
        "| | forward, three launches | one | backward, three launches | one |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    rows: dict[str, Norm] = {}
    for norm in norms_of(name, batch):
        what = {"last": " + add", "joined": " + add"}.get(norm.kind, "")
        rows.setdefault("x".join(map(str, norm.shape)) + what, norm)
    for title, norm in rows.items():
        cells = []
        for backward, in_one_launch in itertools.product((False, True), repeat=2):
            seconds = batch_norm_act_seconds(norm, backward, in_one_launch, gpu)
            if seconds is None:
                cells.append("-")
            else:
                share = copy_seconds(norm, backward, gpu) / seconds
                cells.append(f"{1e6 * seconds:.1f} ({100 * share:.0f} %)")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


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
        N, C, H, W = inputs[0].shape
        K, (R, S) = conv.out_channels, conv.kernel_size
        assert not isinstance(conv.padding, str)
        (u, v), (p, q), (d, e) = conv.stride, conv.padding, conv.dilation
        found[conv] = ConvProblem(
            N, C, H, W, K, R, S, (u, v), (p, q), (d, e), conv.groups, DTYPE, False
        )

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


def _transposed(problem: ConvProblem, residual: bool) -> ConvProblem:
    """A convolution of stride 1 whose output is the gradient in the problem's input."""
    return dataclasses.replace(problem, C=problem.K, K=problem.C, residual=residual)


@compiler.as_of(compiler.PREDICTED)
def saved_by_ends(block: Block, gpu: Architecture) -> float:
    """Seconds that norms at the ends of a block's convolutions save.

    In the order in which `ops/training/nodes.py` asks for them.
    """
    saved, before = 0.0, False
    masked = block.projection is not None
    if not masked and _adds_in_convolution(block, gpu):
        # Its epilogue masks the shortcut's gradient, which is not written then.
        masked, last = True, block.main[-1]
        saved += (1 - 2 * _BITS) * last.output_bytes / gpu.copy_bandwidth
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
        transposed = _transposed(problem, index == 0)
        if index == 0:
            saved += ends.backward(transposed, False, False, gpu)[1]
            continue
        seconds = 0.0
        if not masked and index == len(block.main) - 1 and problem.R * problem.S == 1:
            seconds = ends.backward(transposed, True, True, gpu)[1]
        saved += seconds or ends.backward(transposed, False, True, gpu)[1]
    return saved


@functools.lru_cache(maxsize=16)
def parameters_of(name: str) -> int:
    """How many parameters one of torchvision's networks has."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


@compiler.as_of(compiler.PREDICTED)
def terms(name: str, batch: int, gpu: Architecture) -> dict[str, dict[str, float]]:
    """Seconds of a step, by engine ("with_ends" too) and what they go into."""
    norms, network = norms_of(name, batch), blocks_of(name, batch)
    convolutions = 0.0
    for problem, count in networks.of_model(name, batch, DTYPE).items():
        products = 2 if problem.C == 3 else 3
        convolutions += products * count * estimate.predicted_convolution(problem, gpu)
    unpooled = norms[0].bytes_once / gpu.copy_bandwidth
    parameters = _PARAMETER_BYTES * parameters_of(name) / gpu.copy_bandwidth
    summed = sum(gradient_sum(block, gpu) for block in network)
    units = 1 + len(network)
    result = {
        how: {
            "convolutions": convolutions,
            "norms": sum(seconds(norm, how, gpu) for norm in norms),
            "gradient sums": 0.0 if how == "compile" else summed,
            "stem's pool": POOL_PASSES[how] * unpooled + _POOL_LAUNCHES[how] * estimate.LAUNCH,
            "parameters": parameters,
            "running statistics": estimate.LAUNCH
            * (_COUNTING_LAUNCHES[how][0] * len(norms) + _COUNTING_LAUNCHES[how][1] * units),
            "at convolutions' ends": 0.0,
        }
        for how in ENGINES
    }
    saved = sum(saved_by_ends(block, gpu) for block in network)
    result["with_ends"] = {**result["fused"], "at convolutions' ends": -saved}
    return result


def terms_table(batch: int, gpu: Architecture, name: str = "resnet50") -> str:
    """`terms` in microseconds, as Markdown."""
    found = terms(name, batch, gpu)
    lines = [
        "| | eager | torch.compile | fused | with convolutions' ends |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for term in found["eager"]:
        cells = (f"{1e6 * found[how][term]:.0f}" for how in found)
        lines.append(f"| {term} | {' | '.join(cells)} |")
    totals = [sum(found[how].values()) for how in found]
    lines.append("| **step** | " + " | ".join(f"{1e6 * total:.0f}" for total in totals) + " |")
    ratios = " | ".join(f"{totals[0] / total:.2f}" for total in totals)
    lines.append(f"| eager's time over this | {ratios} |")
    return "\n".join(lines) + "\n"


@compiler.as_of(compiler.PREDICTED)
def _adds_in_convolution(block: Block, gpu: Architecture) -> bool:
    """Whether the first convolution's backward is ours, so that it adds the shortcut's gradient."""
    first = block.main[0]
    if first.groups > 1 or first.stride != (1, 1):
        return False
    return ends.backward(_transposed(first, True), False, False, gpu)[0] is not None


@compiler.as_of(compiler.PREDICTED)
def if_free(name: str, batch: int, gpu: Architecture) -> dict[str, float]:
    """Seconds that "with_ends" would lose at most, by what would have to cost nothing for that.

    The inner norms' second application is what weight gradients with a prologue could save.
    """
    step = terms(name, batch, gpu)["with_ends"]
    inner = [norm for norm in norms_of(name, batch) if norm.kind == "inner"]
    again = PASSES["inner"]["fused"].again
    strided = [
        problem
        for block in blocks_of(name, batch)
        for problem in block.main[1:]
        if problem.stride != (1, 1)
    ]
    return {
        "inner norms once more in backward": sum(
            again * norm.bytes_once / gpu.copy_bandwidth + estimate.LAUNCH for norm in inner
        ),
        "sums behind strided convolutions": sum(
            problem.input_bytes / gpu.copy_bandwidth + estimate.LAUNCH for problem in strided
        ),
        "stem's pool": step["stem's pool"],
        "gradient sums left": sum(
            gradient_sum(block, gpu)
            for block in blocks_of(name, batch)
            if not _adds_in_convolution(block, gpu)
        ),
        "all but the convolutions": sum(step.values()) - step["convolutions"],
    }


def if_free_table(batches: tuple[int, ...], gpu: Architecture, name: str = "resnet50") -> str:
    """`if_free` in microseconds, and eager's time over what is left, as Markdown."""
    columns = []
    for batch in batches:
        found = terms(name, batch, gpu)
        eager, ours = (sum(found[how].values()) for how in ("eager", "with_ends"))
        saved = if_free(name, batch, gpu) | {"**asked for**": ours - eager / 1.3}
        columns.append({k: (1e6 * v, eager / (ours - v)) for k, v in saved.items()})
    heads = "".join(f" batch {batch} | ratio |" for batch in batches)
    lines = [f"| |{heads}", "| --- |" + " ---: |" * (2 * len(batches))]
    for key in columns[0]:
        cells = "".join(f" {c[key][0]:.0f} | {c[key][1]:.2f} |" for c in columns)
        lines.append(f"| {key} |{cells}")
    return "\n".join(lines) + "\n"


@compiler.as_of(compiler.PREDICTED)
def predicted_step(name: str, batch: int, gpu: Architecture) -> dict[str, Any]:
    """A network's entry: see this module's docstring."""
    norms = norms_of(name, batch)
    found = terms(name, batch, gpu)
    blocks = dict.fromkeys(norm.block for norm in norms)
    return {
        "gpu": gpu.name,
        "model": name,
        "dtype": DTYPE,
        "batch": batch,
        "microseconds": {how: round(1e6 * sum(parts.values()), 1) for how, parts in found.items()},
        "terms": {
            how: {term: round(1e6 * value, 1) for term, value in parts.items()}
            for how, parts in found.items()
        },
        "megabytes_per_image": {
            how: round(sum(megabytes(norm, how) for norm in norms) / batch, 1) for how in ENGINES
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
