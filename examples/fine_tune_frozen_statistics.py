"""Fine-tunes a fused network in small batches, with its batch norms frozen and without.

    python examples/fine_tune_frozen_statistics.py

A CIFAR-style ResNet learns five of scikit-learn's digits. Then it is to learn the other five from
batches of two images: once with its norms in training mode, once with them in eval mode and their
parameters fixed. A norm in eval mode is an affine map, so the fused
block keeps less for the backward pass, and the running statistics stay what they were.
"""

from __future__ import annotations

import copy
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from train_digits import Digits, digits

import fused_resnet
from fused_resnet.models import cifar_resnet


def of_classes(data: Digits, first: int) -> Digits:
    """The images of five digits, labelled 0 to 4."""
    train = (data.train_labels >= first) & (data.train_labels < first + 5)
    test = (data.test_labels >= first) & (data.test_labels < first + 5)
    return Digits(
        data.train_images[train],
        data.train_labels[train] - first,
        data.test_images[test],
        data.test_labels[test] - first,
    )


def freeze_statistics(model: nn.Module) -> None:
    """Norms use their running statistics, and keep them and their parameters."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval().requires_grad_(False)


def train(model: nn.Module, data: Digits, batch: int, steps: int, rate: float) -> None:
    """SGD on random batches; norms are in whatever mode they are in."""
    generator = torch.Generator().manual_seed(0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, rate, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(len(data.train_images), (batch,), generator=generator)
        loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """On images, in eval mode; the modules' modes stay."""
    model = copy.deepcopy(model).eval()
    with torch.inference_mode():
        return (model(images).argmax(1) == labels).double().mean().item()


def main(
    depth: Annotated[int, typer.Option(help="6n + 2.")] = 14,
    steps: Annotated[int, typer.Option(min=1, help="Batches of 64 at first.")] = 200,
    small_steps: Annotated[int, typer.Option(min=1, help="Batches of two afterwards.")] = 200,
) -> None:
    """Prints accuracies on images that were not trained with."""
    data = digits()
    torch.manual_seed(0)
    model: nn.Module = cifar_resnet(depth, in_channels=1, num_classes=5)
    model = fused_resnet.fuse(model.to(memory_format=torch.channels_last))
    first, second = of_classes(data, 0), of_classes(data, 5)
    train(model.train(), first, 64, steps, 0.05)
    print(f"digits 0 to 4: {accuracy(model, first.test_images, first.test_labels):.1%}")
    for frozen in (False, True):
        tuned = copy.deepcopy(model).train()
        if frozen:
            freeze_statistics(tuned)
        before = copy.deepcopy(tuned.bn1.running_mean)
        train(tuned, second, 2, small_steps, 0.005)
        kept = "kept" if torch.equal(before, tuned.bn1.running_mean) else "changed"
        found = accuracy(tuned, second.test_images, second.test_labels)
        norms = "frozen" if frozen else "trained"
        print(f"digits 5 to 9, norms {norms}: {found:.1%}, statistics {kept}")


if __name__ == "__main__":
    typer.run(main)
