"""Two processes train one fused network, its parameters sharded between them by FSDP2.

    torchrun --nproc-per-node 2 examples/train_sharded.py

On CPUs, over gloo. Each process has half of every parameter and of the optimizer's state; a block's
weights are gathered while it runs. `--data-parallel` keeps them whole, under
DistributedDataParallel. The images are scikit-learn's digits, half of every batch each process's.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.distributed as dist
import torch.nn.functional as F
import typer
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from train_digits import digits

import fused_resnet
from fused_resnet.models import cifar_resnet


def build(depth: int, data_parallel: bool) -> nn.Module:
    """A fused network, the same in each process, sharded block by block or wrapped as a whole."""
    torch.manual_seed(0)
    # Not channels_last: FSDP2 takes parameters that are contiguous.
    model = fused_resnet.fuse(cifar_resnet(depth, in_channels=1))
    wrapped = DistributedDataParallel(model) if data_parallel else None
    # Statistics are of both halves of a batch. Afterwards, for DDP refuses such norms on a CPU.
    nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if wrapped is not None:
        return wrapped
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def held(model: nn.Module) -> int:
    """The bytes of parameters that this process has."""
    total = 0
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        total += local.numel() * local.element_size()
    return total


def main(
    depth: Annotated[int, typer.Option(help="6n + 2.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Batches of 64 images.")] = 40,
    data_parallel: Annotated[bool, typer.Option(help="DDP in place of FSDP2.")] = False,
) -> None:
    """Trains and prints, in the first process, the loss and the accuracy."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(depth, data_parallel)
    if rank == 0:
        print(fused_resnet.report(model))
    data = digits()
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(len(data.train_images), (64,), generator=generator)
        own = chosen.tensor_split(world)[rank]
        loss = F.cross_entropy(model(data.train_images[own]), data.train_labels[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        logits = model.eval()(data.test_images)
    hits = (logits.argmax(1) == data.test_labels).double().mean()
    if rank == 0:
        print(f"{held(model) / 2**10:.0f} KiB of parameters in this process")
        print(f"loss {losses[0]:.2f} at first, {losses[-1]:.2f} at last; {hits:.1%} right")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
