"""A ResNet-20 on scikit-learn's digits in float32, in eight bits, and trained for eight bits.

    python examples/quantize_digits.py

Trains in float32, fused; quantizes what came out, calibrated on training images, without and with
its classifier; then trains on with the rounding of eight bits and quantizes with the ranges that
this has left. Prints how many of the test images each of the four names rightly, and how long it
takes for all of them. Takes minutes on a CPU.
"""

from __future__ import annotations

import copy
import enum
import statistics
import time
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from train_digits import BATCH, LEARNING_RATE, Digits, digits, shifted

import fused_resnet
from fused_resnet.models import cifar_resnet

CALIBRATION_IMAGES = 512


class Observer(str, enum.Enum):
    """What `fused_resnet.quantize` knows."""

    minmax = "minmax"
    percentile = "percentile"
    mse = "mse"
    histogram = "histogram"


def train(model: nn.Module, data: Digits, epochs: int, rate: float, seed: int) -> float:
    """Trains a model, its rate rising and falling once; returns the last epoch's mean loss."""
    optimizer = torch.optim.SGD(
        model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * -(-len(data.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for indices in torch.randperm(len(data.train_images), generator=generator).split(BATCH):
            images = shifted(data.train_images[indices], generator)
            loss = F.cross_entropy(model(images), data.train_labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(indices)
    model.eval()
    return total / len(data.train_images)


@torch.inference_mode()
def logits_of(model: nn.Module, data: Digits) -> tuple[Tensor, float]:
    """Of the test images, and the milliseconds that it takes, the median of some passes."""
    seconds = []
    for _ in range(11):
        since = time.perf_counter()
        logits = model(data.test_images)
        seconds.append(time.perf_counter() - since)
    return logits, 1e3 * statistics.median(seconds)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Top-1: the share that is named rightly."""
    return (logits.argmax(1) == labels).double().mean().item()


def main(
    epochs: Annotated[int, typer.Option(min=1, help="In float32.")] = 20,
    more_epochs: Annotated[int, typer.Option(min=1, help="With the rounding.")] = 5,
    depth: Annotated[int, typer.Option(help="Layers, 6n + 2.")] = 20,
    observer: Annotated[Observer, typer.Option(help="How ranges are chosen.")] = Observer.mse,
    seed: Annotated[int, typer.Option(help="Of weights, batches and shifts.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Trains in float32, quantizes, trains on with the rounding, and compares what comes out."""
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    try:
        model: nn.Module = cifar_resnet(depth, shortcut="B", in_channels=1)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="depth") from None
    data = digits()
    calibration = data.train_images[:CALIBRATION_IMAGES].split(BATCH)
    model = fused_resnet.fuse(model.to(memory_format=torch.channels_last))
    results: list[tuple[str, float, Tensor, float]] = []

    loss = train(model, data, epochs, LEARNING_RATE, seed)
    results.append(("float32", loss, *logits_of(model, data)))

    quantized = fused_resnet.quantize(copy.deepcopy(model), calibration, observer=observer.value)
    results.append(("eight bits", loss, *logits_of(quantized, data)))

    whole = fused_resnet.quantize(
        copy.deepcopy(model), calibration, observer=observer.value, classifier="int8"
    )
    results.append(("classifier too", loss, *logits_of(whole, data)))

    trained = fused_resnet.prepare_qat(quantized)
    loss = train(trained, data, more_epochs, LEARNING_RATE / 10, seed + 1)
    trained = fused_resnet.quantize(trained)
    results.append(("trained on", loss, *logits_of(trained, data)))

    console = Console()
    console.print(fused_resnet.report(trained))
    console.print(table(results, data.test_labels))


def table(results: list[tuple[str, float, Tensor, float]], labels: Tensor) -> Table:
    """A row for each network: how often it is right, and names what the first one does."""
    rows = Table("", "top-1", "as in float32", "training loss", f"ms, {len(labels)} images")
    names = results[0][2].argmax(1)
    for name, loss, logits, milliseconds in results:
        rows.add_row(
            name,
            f"{100 * accuracy(logits, labels):.2f} %",
            f"{100 * accuracy(logits, names):.2f} %",
            f"{loss:.4f}",
            f"{milliseconds:.1f}",
        )
    return rows


if __name__ == "__main__":
    typer.run(main)
