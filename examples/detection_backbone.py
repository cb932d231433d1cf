"""A detector whose backbone runs fused: torchvision's Faster R-CNN on one image.

    python examples/detection_backbone.py --backbone resnet50 --height 480 --width 640

The weights are random, so what it finds means nothing; what is compared is each level of the
feature pyramid, with float64, and the time of the whole detector.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import fused_resnet
from fused_resnet.testing import relative_error


def detector(backbone: str) -> FasterRCNN:
    """With random weights and statistics, in eval mode."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name=backbone, weights=None)
    return fused_resnet.testing.randomize_(FasterRCNN(body, num_classes=91)).eval()


def errors(model: FasterRCNN, exact: FasterRCNN, image: Tensor) -> dict[str, float]:
    """Of each level of the feature pyramid, relative to float64."""
    features, expected = model.backbone(image[None]), exact.backbone(image[None].double())
    return {name: relative_error(features[name], expected[name]) for name in features}


def milliseconds(model: nn.Module, image: Tensor, rounds: int) -> float:
    """The median of some passes behind a first one."""
    times = []
    for _ in range(rounds + 1):
        since = time.perf_counter()
        model([image])
        times.append(1e3 * (time.perf_counter() - since))
    return statistics.median(times[1:])


def main(
    backbone: Annotated[str, typer.Option(help="One of torchvision's ResNets.")] = "resnet50",
    height: Annotated[int, typer.Option(min=64, help="Rows of the image.")] = 480,
    width: Annotated[int, typer.Option(min=64, help="Its columns.")] = 640,
    rounds: Annotated[int, typer.Option(min=1, help="Passes that are timed.")] = 5,
) -> None:
    """Compares a detector with and without `fuse`."""
    eager = detector(backbone)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    exact = copy.deepcopy(eager).double()
    print(fused_resnet.report(fused))
    image = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        own, theirs = errors(fused, exact, image), errors(eager, exact, image)
        for name in own:
            print(f"level {name}: error {own[name]:.1e}, eager's {theirs[name]:.1e}")
        for name, model in (("eager", eager), ("fused", fused)):
            print(f"{name}: {milliseconds(model, image, rounds):.0f} ms an image")


if __name__ == "__main__":
    typer.run(main)
