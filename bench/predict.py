"""What the model of `fused_resnet/tuning/estimate.py` predicts for GPUs: no measurement.

Predicts the time of whole networks on several GPUs, eager, as `torch.compile` would run them and
with the Triton kernels, and of every fused layer, and writes
`bench/results/static/predicted.json`:

    {"schema": "fused_resnet.predicted/1", "kind": "prediction", "networks": [{
        "gpu": "H100", "model": "resnet50", "dtype": "float16", "batch": 256,
        "megabytes_per_image": {"eager": 165.0, "fused": 54.0},
        "microseconds": {"eager": 1.0, "compiled": 1.0, "fused": 1.0},
        "layers": [{
            "problem": "float16 256x64x56x56 k256 1x1 s1x1 p0x0 d1x1 g1 residual", "count": 3,
            "choice": "triton 128x64x64, 4 warps, 4 stages", "microseconds": 1.0,
            "share_of_copy_bandwidth": 0.9, "share_of_matrix_rate": 0.1}]}]}

The library's convolutions are taken to be as good as the kernels here, so ratios show what fusing
saves and nothing else. Eager, every other operator takes as long as its tensors' bytes at copy
bandwidth, plus a launch; compiled, all that follows a convolution is one operator. The host, which
eager execution of small batches waits for, is left out, so ratios to eager at batch 1 are those
under a CUDA graph. `share_of_copy_bandwidth` is the time to move each
of the layer's tensors once, divided by the predicted time, and `share_of_matrix_rate` likewise of
its products. The published figures behind it all are in `fused_resnet/tuning/architecture.py`.

    python bench/predict.py
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_resnet.tuning import estimate, layers, untuned
from fused_resnet.tuning.architecture import ARCHITECTURES, Architecture
from fused_resnet.tuning.problem import ConvProblem

PATH = Path(__file__).parent / "results" / "static" / "predicted.json"
SCHEMA = "fused_resnet.predicted/1"
GPUS = ("A100", "H100", "H200", "B200", "RTX 4090")
NETWORKS = ("resnet50", "resnext50_32x4d")
BATCHES = (1, 32, 256)
DTYPE = "float16"


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


def predicted_layer(problem: ConvProblem, count: int, gpu: Architecture) -> dict[str, Any]:
    """A fused layer's entry: see this module's docstring."""
    choice = untuned(problem, gpu)
    seconds = estimate.predicted_choice(problem, gpu, choice)
    return {
        "problem": problem.key,
        "count": count,
        "choice": str(choice),
        "microseconds": round(1e6 * seconds, 2),
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
    fused_bytes = sum(n * p.bytes_once for p, n in problems.items()) + sum(outside)
    return {
        "gpu": gpu.name,
        "model": name,
        "dtype": DTYPE,
        "batch": batch,
        "megabytes_per_image": {
            "eager": round(sum(moved for _, moved in operators) / batch / 1e6, 1),
            "fused": round(fused_bytes / batch / 1e6, 1),
        },
        "microseconds": {how: round(1e6 * value, 1) for how, value in seconds.items()},
        "layers": entries,
    }


def document() -> dict[str, Any]:
    """All of the predictions."""
    networks = [
        predicted_network(name, batch, ARCHITECTURES[gpu])
        for gpu in GPUS
        for name in NETWORKS
        for batch in BATCHES
    ]
    return {"schema": SCHEMA, "kind": "prediction", "networks": networks}


def text(content: dict[str, Any]) -> str:
    """The file's text: one line a layer."""
    lines = []
    for network in content["networks"]:
        head = json.dumps({k: v for k, v in network.items() if k != "layers"})
        rows = ",\n    ".join(json.dumps(layer) for layer in network["layers"])
        lines.append(f'  {head[:-1]}, "layers": [\n    {rows}]}}')
    head = json.dumps({k: v for k, v in content.items() if k != "networks"})
    return f'{head[:-1]}, "networks": [\n' + ",\n".join(lines) + "\n]}\n"


def main() -> None:
    content = document()
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_text(text(content))
    print("predicted, not measured:")
    for network in content["networks"]:
        times = network["microseconds"]
        print(
            f"{network['gpu']:<9} {network['model']:<16} batch {network['batch']:>3}: "
            f"{times['fused']:9.1f} us, {times['eager'] / times['fused']:.2f} times eager, "
            f"{times['compiled'] / times['fused']:.2f} times torch.compile"
        )


if __name__ == "__main__":
    main()
