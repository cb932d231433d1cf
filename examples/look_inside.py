"""What shortcuts do, in three experiments with CIFAR-style networks on scikit-learn's digits.

    python examples/look_inside.py depth       # train plain and residual networks, ever deeper
    python examples/look_inside.py gradients   # what reaches each block at initialisation
    python examples/look_inside.py drop        # leave out one block of a trained network at a time

The first is section 4.2 of He et al., "Deep Residual Learning for Image Recognition", in small; the
third is Veit et al., "Residual Networks Behave Like Ensembles of Relatively Shallow Networks". Each
prints a table and writes a plot and its numbers; each takes minutes on a CPU.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import matplotlib.figure
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from train_digits import Digits, digits, shifted

import fused_resnet
from fused_resnet.models import cifar_resnet

BATCH = 64
LEARNING_RATE = 0.05
COLOURS = {"residual": "#1f6fb4", "plain": "#c0504d"}

app = typer.Typer(help=__doc__, rich_markup_mode=None, add_completion=False)
console = Console()
Output = Annotated[Path, typer.Option(help="Of the plot and the numbers, without ending.")]


def build(depth: int, plain: bool, seed: int) -> nn.Module:
    """A fused network for one-channel images; the same weights for the same seed."""
    torch.manual_seed(seed)
    model = cifar_resnet(depth, in_channels=1, plain=plain)
    return fused_resnet.fuse(model.to(memory_format=torch.channels_last))


def train(
    model: nn.Module, data: Digits, epochs: int, seed: int, step: Callable[[], None]
) -> float:
    """Trains a model and returns the last epoch's mean loss; calls `step()` after every epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    batches = -(-len(data.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * batches
    )
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
        step()
    return total / len(data.train_images)


def accuracy(model: nn.Module, data: Digits) -> float:
    """The share of the test images it gets right."""
    model.eval()
    with torch.inference_mode():
        return (model(data.test_images).argmax(1) == data.test_labels).double().mean().item()


def blocks_of(model: nn.Module) -> list[tuple[nn.Sequential, int]]:
    """Each block, as the stage it is in and its place there."""
    return [(s, i) for s in (model.layer1, model.layer2, model.layer3) for i in range(len(s))]


def gradient_norms(model: nn.Module, images: Tensor, labels: Tensor) -> list[float]:
    """The norm of the loss's gradient with respect to each block's output, first block first."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple, output: Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    handles = [stage[i].register_forward_hook(keep) for stage, i in blocks_of(model)]
    F.cross_entropy(model(images), labels).backward()
    for handle in handles:
        handle.remove()
    return [output.grad.norm().item() for output in outputs]


def accuracy_without(model: nn.Module, data: Digits) -> list[float | None]:
    """Test accuracy without each block in turn; None for those that change the shape."""
    accuracies: list[float | None] = []
    for stage, index in blocks_of(model):
        block = stage[index]
        if block.conv1.in_channels != block.conv2.out_channels:
            accuracies.append(None)
            continue
        stage[index] = nn.Identity()
        accuracies.append(accuracy(model, data))
        stage[index] = block
    return accuracies


@app.command()
def depth(
    depths: Annotated[list[int], typer.Option(help="6n + 2; give it again for each.")] = [  # noqa: B006
        8,
        20,
        32,
        56,
    ],
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    output: Output = Path("depth"),
) -> None:
    """Trains networks with and without shortcuts at growing depth."""
    data, rows = digits(), []
    with progress() as bar:
        task = bar.add_task("training", total=2 * epochs * len(depths))
        for layers in depths:
            for name in COLOURS:
                model = build(layers, name == "plain", seed=0)
                loss = train(model, data, epochs, 0, lambda: bar.advance(task))
                rows.append((name, layers, loss, accuracy(model, data)))
    table = Table("network", "layers", "training loss", "test accuracy")
    for name, layers, loss, right in rows:
        table.add_row(name, str(layers), f"{loss:.3f}", f"{right:.1%}")
    console.print(table)
    figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
    for axes, column, what in zip(
        figure.subplots(1, 2), (2, 3), ("training loss", "test accuracy"), strict=True
    ):
        for name in COLOURS:
            own = [row for row in rows if row[0] == name]
            x, y = [row[1] for row in own], [row[column] for row in own]
            axes.plot(x, y, "o-", color=COLOURS[name], label=name)
        axes.set(xlabel="layers", ylabel=what, xticks=depths)
        axes.legend(frameon=False)
    write(output, figure, {"network, layers, training loss, test accuracy": rows})


@app.command()
def gradients(
    depth: Annotated[int, typer.Option(help="6n + 2.")] = 56,
    seeds: Annotated[int, typer.Option(min=1, help="Initialisations to draw.")] = 5,
    output: Output = Path("gradients"),
) -> None:
    """Gradient norm per block at initialisation, with and without shortcuts."""
    data = digits()
    images, labels = data.train_images[:BATCH], data.train_labels[:BATCH]
    norms: dict[str, list[list[float]]] = {name: [] for name in COLOURS}
    with progress() as bar:
        for seed in bar.track(range(seeds), description="initialisations"):
            for name, found in norms.items():
                model = build(depth, name == "plain", seed).train()
                found.append(gradient_norms(model, images, labels))
    medians = {name: medians_of(found) for name, found in norms.items()}
    table = Table("network", "first block", "last block", "first / last")
    for name, values in medians.items():
        first, last = values[0], values[-1]
        table.add_row(name, f"{first:.3g}", f"{last:.3g}", f"{first / last:.3g}")
    console.print(table)
    figure = matplotlib.figure.Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in medians.items():
        axes.semilogy(range(1, len(values) + 1), values, "o-", color=COLOURS[name], label=name)
    axes.set(xlabel="block", ylabel="norm of the gradient at its output")
    axes.legend(frameon=False)
    write(output, figure, norms)


@app.command()
def drop(
    depth: Annotated[int, typer.Option(help="6n + 2.")] = 32,
    epochs: Annotated[int, typer.Option(min=1)] = 10,
    output: Output = Path("drop"),
) -> None:
    """Test accuracy of trained networks without one of their blocks."""
    data, whole, without = digits(), {}, {}
    with progress() as bar:
        task = bar.add_task("training", total=2 * epochs)
        for name in COLOURS:
            model = build(depth, name == "plain", seed=0)
            train(model, data, epochs, 0, lambda: bar.advance(task))
            whole[name], without[name] = accuracy(model, data), accuracy_without(model, data)
    table = Table("network", "whole", "median without one", "worst without one")
    figure = matplotlib.figure.Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, found in without.items():
        known = [value for value in found if value is not None]
        cells = (whole[name], statistics.median(known), min(known))
        table.add_row(name, *(f"{cell:.1%}" for cell in cells))
        places = [i + 1 for i, value in enumerate(found) if value is not None]
        axes.plot(places, known, "o-", color=COLOURS[name], label=name)
        axes.axhline(whole[name], color=COLOURS[name], linestyle=":")
    console.print(table)
    axes.set(xlabel="block left out", ylabel="test accuracy")
    axes.legend(frameon=False)
    write(output, figure, {"whole": whole, "without": without})


def medians_of(runs: Sequence[Sequence[float]]) -> list[float]:
    """Place by place."""
    return [statistics.median(values) for values in zip(*runs, strict=True)]


def progress() -> Progress:
    """A bar that says what is left."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def write(output: Path, figure: matplotlib.figure.Figure, numbers: dict) -> None:
    """`<output>.png` and `<output>.json`."""
    figure.savefig(f"{output}.png", dpi=150)
    Path(f"{output}.json").write_text(json.dumps(numbers, indent=1) + "\n")
    console.print(f"{output}.png, {output}.json")


if __name__ == "__main__":
    app()
