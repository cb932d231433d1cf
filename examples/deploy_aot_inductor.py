"""Compiles a fused network ahead of time and runs the package in a process of its own.

    python examples/deploy_aot_inductor.py --model resnet18

AOTInductor makes a shared library of an exported program. The fused blocks are one call of our
operator in it, so whoever loads the package imports `fused_resnet`, and needs neither the model's
source nor Python's modules of it. The batch is dynamic.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer
from torch import Tensor, nn

import fused_resnet
from fused_resnet import testing
from fused_resnet.models import cifar_resnet

# What the process runs that has the package and nothing of the model.
SERVE = """
import sys
own, package, images, logits = sys.argv[1:]
sys.path.append(own)  # where fused_resnet is, which need not be installed
import torch
import fused_resnet  # the package's operators
with torch.inference_mode():
    out = torch._inductor.aoti_load_package(package)(torch.load(images))
torch.save(out, logits)
"""


def build(name: str) -> tuple[nn.Module, int]:
    """A fused network with random weights, and the rows and columns of its images."""
    torch.manual_seed(0)
    if name == "cifar":
        model, size = cifar_resnet(8), 32
    else:
        model, size = torchvision.models.get_model(name), 224
    return fused_resnet.fuse(testing.randomize_(model).eval()), size


def package(model: nn.Module, images: Tensor, path: Path) -> str:
    """Writes the package, for any batch up to 64; its path."""
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def main(
    model: Annotated[str, typer.Option(help="One of torchvision's, or cifar.")] = "resnet18",
    batch: Annotated[int, typer.Option(min=1, max=64, help="Images for the other process.")] = 5,
) -> None:
    """Compares what the other process computes with the model here."""
    network, size = build(model)
    images = torch.randn(batch, 3, size, size)
    with tempfile.TemporaryDirectory() as folder:
        made = package(network, torch.randn(2, 3, size, size), Path(folder) / "model.pt2")
        print(f"package: {Path(made).stat().st_size / 2**20:.1f} MiB")
        torch.save(images, f"{folder}/images.pt")
        own = str(Path(fused_resnet.__file__).parents[1])
        files = (made, f"{folder}/images.pt", f"{folder}/logits.pt")
        command = [sys.executable, "-I", "-c", SERVE, own, *files]
        subprocess.run(command, check=True)
        served = torch.load(f"{folder}/logits.pt")
    with torch.inference_mode():
        error = testing.relative_error(served, network(images))
    print(f"{batch} images: difference {error:.1e} relative to the model")


if __name__ == "__main__":
    typer.run(main)
