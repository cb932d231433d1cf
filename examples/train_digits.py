"""Trains a CIFAR-style ResNet on scikit-learn's digits, fused and unfused from the same seeds.

    python examples/train_digits.py --output train_digits

Each seed gives both models the same weights, batches and shifts of the images, so that what is left
between their curves is rounding, which training amplifies. At the end there are a table,
`<output>.json` with every curve (described at `document`) and `<output>.png` with both curves.

The 1797 images of 8 x 8 pixels come with scikit-learn; a fifth of each digit's is kept for testing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.figure
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fused_resnet
from fused_resnet.measure import environment
from fused_resnet.measure.documents import write_json
from fused_resnet.models import cifar_resnet

SCHEMA = "fused_resnet.digits/1"
NAMES = ("eager", "fused")
COLOURS = {"eager": "#9a9a9a", "fused": "#1f6fb4"}
BATCH = 64
LEARNING_RATE = 0.05


@dataclass
class Run:
    """One training run: a value an epoch, and the time all of it took, evaluation included."""

    model: str
    seed: int
    train_loss: list[float]
    test_loss: list[float]
    test_accuracy: list[float]
    seconds: float


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 8, 8) with mean 0 and deviation 1, and labels (N,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """The data, split the same way in every run."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train, test = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 8, 8) for x in split[:2])
    mean, deviation = train.mean(), train.std()
    train_labels, test_labels = (torch.tensor(y, dtype=torch.int64) for y in split[2:])
    return Digits((train - mean) / deviation, train_labels, (test - mean) / deviation, test_labels)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to one pixel in both directions."""
    background = images.min().item()
    padded = F.pad(images, (1, 1, 1, 1), value=background)
    rows, columns = torch.randint(0, 3, (2, len(images), 1, 1), generator=generator).unbind(0)
    rows = rows + torch.arange(images.size(2)).view(1, -1, 1)
    columns = columns + torch.arange(images.size(3)).view(1, 1, -1)
    batch = torch.arange(len(images)).view(-1, 1, 1)
    return padded[batch, 0, rows, columns].unsqueeze(1)


def train(data: Digits, name: str, seed: int, epochs: int, depth: int, advance: Any) -> Run:
    """Trains one model; calls `advance()` after every epoch."""
    torch.manual_seed(seed)
    model: nn.Module = cifar_resnet(depth, in_channels=1).to(memory_format=torch.channels_last)
    if name == "fused":
        fused_resnet.fuse(model)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * -(-len(data.train_images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    run = Run(name, seed, [], [], [], 0.0)
    since = time.perf_counter()
    for _ in range(epochs):
        model.train()
        total = 0.0
        for indices in torch.randperm(len(data.train_images), generator=generator).split(BATCH):
            images = shifted(data.train_images[indices], generator)
            loss = F.cross_entropy(model(images), data.train_labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(indices)
        run.train_loss.append(total / len(data.train_images))
        model.eval()
        with torch.inference_mode():
            logits = model(data.test_images)
        run.test_loss.append(F.cross_entropy(logits, data.test_labels).item())
        hits = logits.argmax(1) == data.test_labels
        run.test_accuracy.append(hits.double().mean().item())
        advance()
    run.seconds = time.perf_counter() - since
    return run


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Final accuracies: mean and spread over the seeds, and whether the two models agree.

    They agree if their means are no further apart than the seeds: by at most the larger of the two
    standard deviations, or half an image where no run differs from another. One seed cannot tell.
    """
    finals = {n: [run.test_accuracy[-1] for run in runs if run.model == n] for n in NAMES}
    means = {name: statistics.mean(values) for name, values in finals.items()}
    spreads = {name: statistics.pstdev(values) for name, values in finals.items()}
    spread = max(*spreads.values(), 0.5 / len(digits().test_labels))
    agree = abs(means["fused"] - means["eager"]) <= spread
    return {
        "mean_accuracy": means,
        "deviation": spreads,
        "least_accuracy": {name: min(values) for name, values in finals.items()},
        "same_within_spread": agree if len(runs) > len(NAMES) else None,
    }


def document(runs: Sequence[Run], arguments: Mapping[str, int], command: str) -> dict[str, Any]:
    """What the JSON file has.

    What `environment.provenance` gives; `arguments` (epochs, depth, threads); `summary`, see there;
    `runs`: `model`, `seed`, `seconds`, and lists of one value an epoch, `train_loss` (mean over the
    epoch), `test_loss` and `test_accuracy` (after it).
    """
    return {
        **environment.provenance(SCHEMA, command, torch.device("cpu")),
        "arguments": dict(arguments),
        "summary": summary(runs),
        "runs": [asdict(run) for run in runs],
    }


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Loss and accuracy over the epochs: each run thin, the mean of each model thick."""
    figure = matplotlib.figure.Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for name, style in zip(NAMES, ("-", (0, (4, 2))), strict=True):
        runs = [run for run in document["runs"] if run["model"] == name]
        for axes, key, scale in zip(panels, ("train_loss", "test_accuracy"), (1, 100), strict=True):
            curves = [[scale * value for value in run[key]] for run in runs]
            epochs = range(1, len(curves[0]) + 1)
            for curve in curves:
                axes.plot(epochs, curve, color=COLOURS[name], linewidth=0.7, alpha=0.35)
            mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
            axes.plot(epochs, mean, color=COLOURS[name], linewidth=2, linestyle=style, label=name)
    loss, accuracy = panels
    loss.set_yscale("log")
    loss.set_title("training loss", fontsize=10, loc="left")
    accuracy.set_ylim(90, 100.2)
    accuracy.set_title("test accuracy in %", fontsize=10, loc="left")
    accuracy.legend(frameon=False, loc="lower right")
    for axes in panels:
        axes.set_xlabel("epoch", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    depth, device = document["arguments"]["depth"], document["device"]["name"]
    seeds = len(document["runs"]) // len(NAMES)
    figure.suptitle(
        f"ResNet-{depth} on scikit-learn's digits, {seeds} seeds, {device}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    figure.savefig(path, dpi=150, format="png")


def table(document: Mapping[str, Any]) -> Table:
    """Final accuracies and times, a row a seed, and their means."""
    rows = Table("seed", *(f"{n}: {c}" for n in NAMES for c in ("accuracy", "loss", "s")))
    runs = {(run["model"], run["seed"]): run for run in document["runs"]}
    for seed in sorted({seed for _, seed in runs}):
        cells = [str(seed)]
        for name in NAMES:
            run = runs[name, seed]
            cells += [
                f"{100 * run['test_accuracy'][-1]:.2f} %",
                f"{run['train_loss'][-1]:.4f}",
                f"{run['seconds']:.1f}",
            ]
        rows.add_row(*cells)
    rows.add_section()
    summary, cells = document["summary"], ["mean"]
    for name in NAMES:
        own = [run for run in document["runs"] if run["model"] == name]
        mean, deviation = summary["mean_accuracy"][name], summary["deviation"][name]
        cells += [
            f"{100 * mean:.2f} ± {100 * deviation:.2f} %",
            f"{statistics.mean(run['train_loss'][-1] for run in own):.4f}",
            f"{statistics.mean(run['seconds'] for run in own):.1f}",
        ]
    rows.add_row(*cells)
    return rows


def main(
    seeds: Annotated[int, typer.Option(min=1, help="How many, from 0 on.")] = 5,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 20,
    depth: Annotated[int, typer.Option(help="Layers, 6n + 2.")] = 20,
    output: Annotated[
        Path, typer.Option(help="Where the results go, .json and .png being added.")
    ] = Path("train_digits"),
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
) -> None:
    """Trains fused and unfused models from the same seeds and compares their curves."""
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {str(output.parent)!r}", param_hint="output")
    try:
        cifar_resnet(depth)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="depth") from None
    torch.set_num_threads(threads)
    data = digits()
    runs: list[Run] = []
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("epochs"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=seeds * len(NAMES) * epochs)
        for seed in range(seeds):
            # In turn, and first one, then the other first: a machine that slows down hits both.
            for name in NAMES if seed % 2 == 0 else NAMES[::-1]:
                progress.update(task, description=f"seed {seed}, {name}")
                runs.append(train(data, name, seed, epochs, depth, lambda: progress.advance(task)))
    arguments = {"epochs": epochs, "depth": depth, "threads": threads}
    options = " ".join(
        f"--{name} {value}" for name, value in ({"seeds": seeds} | arguments).items()
    )
    results = document(runs, arguments, f"python examples/train_digits.py {options}")
    write_json(results, output.with_name(output.name + ".json"))
    draw(results, output.with_name(output.name + ".png"))
    out = Console()
    out.print(table(results))
    if (same := results["summary"]["same_within_spread"]) is not None:
        verdict = "as" if same else "NOT as"
        out.print(f"Fused and eager end {verdict} close to each other as the seeds.")


if __name__ == "__main__":
    typer.run(main)
