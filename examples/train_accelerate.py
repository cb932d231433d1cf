"""A fused network in a training loop of Hugging Face Accelerate, in two processes and bfloat16.

    pip install accelerate
    torchrun --nproc-per-node 2 examples/train_accelerate.py

On CPUs, over gloo; one process does too. Accelerate wraps the model (here in
DistributedDataParallel), autocasts its forward pass, splits the batches between the processes and
steps the optimizer every other one. Nothing of that has to know about fused blocks. At the end the
checkpoint that it writes is read by a network that is not fused.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset
from train_digits import digits

import fused_resnet
from fused_resnet.models import cifar_resnet


def main(
    depth: Annotated[int, typer.Option(help="6n + 2.")] = 8,
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    precision: Annotated[str, typer.Option(help="Accelerate's: no, bf16.")] = "bf16",
) -> None:
    """Trains and prints, in the first process, losses and accuracies."""
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    set_seed(0)
    data = digits()
    model = fused_resnet.fuse(cifar_resnet(depth, in_channels=1))
    accelerator.print(fused_resnet.report(model))

    training = TensorDataset(data.train_images, data.train_labels)
    testing = TensorDataset(data.test_images, data.test_labels)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    model, optimizer, batches, tests = accelerator.prepare(
        model,
        optimizer,
        DataLoader(training, 32, shuffle=True, drop_last=True),
        DataLoader(testing, 64),
    )
    losses = []
    for _ in range(epochs):
        model.train()
        for images, labels in batches:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())

    hits = []
    model.eval()
    with torch.inference_mode():
        for images, labels in tests:
            hit = (model(images).argmax(1) == labels).float()
            hits.append(accelerator.gather_for_metrics(hit))
    accuracy = torch.cat(hits).mean().item()
    accelerator.print(
        f"{accelerator.num_processes} processes, {accelerator.mixed_precision}: "
        f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last; {accuracy:.1%} right"
    )

    if accelerator.is_main_process:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.pt"
            accelerator.save(accelerator.unwrap_model(model).state_dict(), path)
            plain = cifar_resnet(depth, in_channels=1).eval()
            plain.load_state_dict(torch.load(path, weights_only=True))
        with torch.inference_mode():
            right = (plain(data.test_images).argmax(1) == data.test_labels).double().mean()
        print(f"its checkpoint in a network that is not fused: {right:.1%} right")
    accelerator.end_training()


if __name__ == "__main__":
    typer.run(main)
