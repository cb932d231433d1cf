"""A small U-Net with a fused ResNet-18 for an encoder learns to segment discs.

    python examples/segmentation_encoder.py --steps 60

The decoder reads what every stage of the encoder leaves, so each stage is called by itself. Images
are noise with a brighter disc; the mask is the disc.
"""

from __future__ import annotations

import itertools
import time
from typing import Annotated

import torch
import torch.nn.functional as F
import torchvision
import typer
from torch import Tensor, nn

import fused_resnet


class UNet(nn.Module):
    """Logits (N, 1, H, W) of images (N, 3, H, W) whose sides are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torchvision.models.resnet18()
        widths = [512, 256, 128, 64, 64]
        self.up = nn.ModuleList(
            nn.Conv2d(deep + shallow, shallow, 3, padding=1)
            for deep, shallow in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(64, 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        encoder, size = self.encoder, x.shape[2:]
        x = encoder.relu(encoder.bn1(encoder.conv1(x)))
        features = [x]
        x = encoder.maxpool(x)
        for stage in (encoder.layer1, encoder.layer2, encoder.layer3, encoder.layer4):
            x = stage(x)
            features.append(x)
        x = features.pop()
        for up in self.up:
            shallow = features.pop()
            x = torch.cat([F.interpolate(x, shallow.shape[2:]), shallow], 1)
            x = torch.relu(up(x))
        return F.interpolate(self.last(x), size, mode="bilinear")


def discs(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (N, 3, size, size), and masks (N, 1, size, size) of zeros and ones."""
    centres = torch.rand(count, 2, 1, 1, generator=generator) * size
    radii = (0.15 + 0.2 * torch.rand(count, 1, 1, generator=generator)) * size
    rows, columns = torch.arange(size).view(-1, 1), torch.arange(size).view(1, -1)
    distances = (rows - centres[:, 0]).square() + (columns - centres[:, 1]).square()
    masks = (distances < radii.square()).float()[:, None]
    noise = torch.randn(count, 3, size, size, generator=generator)
    return (noise + 1.5 * masks).contiguous(memory_format=torch.channels_last), masks


def overlap(model: nn.Module, images: Tensor, masks: Tensor) -> float:
    """Intersection over union of what the model marks and the masks."""
    with torch.inference_mode():
        marked = model.eval()(images) > 0
    masks = masks > 0
    return ((marked & masks).sum() / (marked | masks).sum().clamp(min=1)).item()


def main(
    steps: Annotated[int, typer.Option(min=1, help="Batches to train on.")] = 60,
    batch: Annotated[int, typer.Option(min=2, help="Images in each.")] = 8,
    size: Annotated[int, typer.Option(min=32, help="Rows and columns, a multiple of 32.")] = 64,
) -> None:
    """Trains it and prints how well discs are found before and after."""
    torch.manual_seed(0)
    model = fused_resnet.fuse(UNet().to(memory_format=torch.channels_last))
    generator = torch.Generator().manual_seed(0)
    tests = discs(32, size, generator)
    print(fused_resnet.report(model))
    print(f"intersection over union before: {overlap(model, *tests):.2f}")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    since = time.perf_counter()
    model.train()
    for _ in range(steps):
        images, masks = discs(batch, size, generator)
        loss = F.binary_cross_entropy_with_logits(model(images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - since
    print(f"intersection over union after:  {overlap(model, *tests):.2f}")
    print(f"{1e3 * seconds / steps:.0f} ms a step")


if __name__ == "__main__":
    typer.run(main)
