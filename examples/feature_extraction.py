"""Features of every stage of a fused ResNet, by torchvision's feature extractor.

    python examples/feature_extraction.py --model resnet18

`create_feature_extractor` traces a model into a graph of its innermost modules. With the fused
blocks as leaves of the trace they stay whole, and run fused inside the extractor; what is left of
the graph, the stem, is fused after it.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Annotated

import torch
import torchvision
import typer
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import fused_resnet
from fused_resnet.testing import relative_error

STAGES = ["layer1", "layer2", "layer3", "layer4"]


def extractor(model: nn.Module) -> nn.Module:
    """What every stage leaves of an image, by the stage's name."""
    blocks = [fused_resnet.BasicBlock, fused_resnet.Bottleneck]
    return create_feature_extractor(model, STAGES, tracer_kwargs={"leaf_modules": blocks})


def milliseconds(model: nn.Module, images: Tensor, rounds: int) -> float:
    """The median of some passes behind a first one."""
    times = []
    for _ in range(rounds + 1):
        since = time.perf_counter()
        model(images)
        times.append(1e3 * (time.perf_counter() - since))
    return statistics.median(times[1:])


def main(
    model: Annotated[str, typer.Option(help="One of torchvision's ResNets.")] = "resnet18",
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 4,
    size: Annotated[int, typer.Option(min=32, help="Their rows and columns.")] = 224,
    rounds: Annotated[int, typer.Option(min=1, help="Passes that are timed.")] = 5,
) -> None:
    """Prints shapes, errors relative to float64, and times."""
    torch.manual_seed(0)
    network = fused_resnet.testing.randomize_(torchvision.models.get_model(model)).eval()
    network = network.to(memory_format=torch.channels_last)
    eager = extractor(network)
    exact = extractor(copy.deepcopy(network).double())
    fused = fused_resnet.fuse(extractor(fused_resnet.fuse(copy.deepcopy(network))))
    print(fused_resnet.report(fused))
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        own, theirs, expected = fused(images), eager(images), exact(images.double())
        for stage in STAGES:
            errors = (relative_error(found[stage], expected[stage]) for found in (own, theirs))
            shape = "x".join(map(str, own[stage].shape))
            print("{}: {}, error {:.1e}, eager's {:.1e}".format(stage, shape, *errors))
        for name, found in (("eager", eager), ("fused", fused)):
            print(f"{name}: {milliseconds(found, images, rounds):.1f} ms")


if __name__ == "__main__":
    typer.run(main)
