"""What test_distributed.py runs in two processes: `python two_processes.py RANK FOLDER`.

Every function of `SCENARIOS` runs in both processes and returns what test_distributed.py compares
with a single process; its result, or the error it raised, becomes FOLDER/<name>.<rank>.pt.
"""

from __future__ import annotations

import copy
import datetime
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

import fused_resnet
from fused_resnet import functional
from fused_resnet.models import cifar_resnet
from fused_resnet.testing import randomize_

WORLD = 2
RANK = -1  # until main() knows

# (N, H, W) of each rank's share of a batch; the last ones have a single value, or none.
SHARES = {
    "even": [(3, 5, 4), (3, 5, 4)],
    "uneven": [(5, 6, 7), (2, 6, 7)],
    "empty first": [(0, 4, 4), (6, 4, 4)],
    "empty last": [(6, 4, 4), (0, 4, 4)],
    "one value": [(1, 1, 1), (4, 1, 1)],
}
CHANNELS = 33
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def function_case(share: str, dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Inputs, residuals and gradients of both ranks, far from zero in one channel."""
    shapes = [(n, CHANNELS, h, w) for n, h, w in SHARES[share]]
    case = {}
    for seed, name in enumerate(("input", "residual", "grad")):
        whole = draw(sum(n for n, *_ in shapes), *shapes[0][1:], seed=seed)
        if name == "input":
            whole[:, 1] += 3
        case[name] = list(whole.to(dtype).split([n for n, *_ in shapes]))
    return case


def vectors(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Running mean and variance, weight and bias."""
    dtype = torch.float64 if dtype is torch.float64 else torch.float32
    mean, var, weight, bias = draw(4, CHANNELS, seed=9).unbind(0)
    return tuple(t.to(dtype).clone() for t in (mean, var.abs(), weight, bias))


def run_function(share, dtype, residual=True, activation="relu", channels_last=False):
    case = function_case(share, dtype)
    input, z, grad = (case[n][RANK].clone() for n in ("input", "residual", "grad"))
    if channels_last:
        input = input.contiguous(memory_format=torch.channels_last)
    mean, var, weight, bias = vectors(dtype)
    leaves = {"input": input, "weight": weight, "bias": bias}
    if residual:
        leaves["residual"] = z
    for leaf in leaves.values():
        leaf.requires_grad_()
    out = functional.sync_batch_norm_act(
        input, mean, var, weight, bias, 0.3, group=dist.group.WORLD, activation=activation,
        residual=z if residual else None,
    )  # fmt: skip
    gradients = torch.autograd.grad(out, list(leaves.values()), grad)
    return {
        "output": out.detach(),
        "running_mean": mean,
        "running_var": var,
        **{f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)},
    }


def functions():
    """Every share of a batch in float32 and float64, with and without residual and ReLU."""
    results = {}
    for backend in ("cpu", "reference"):
        with fused_resnet.use_backend(backend):
            for share in SHARES:
                for name, dtype in DTYPES.items():
                    for residual, activation in ((True, "relu"), (False, "relu"), (True, "none")):
                        key = (backend, share, name, residual, activation)
                        results[key] = run_function(
                            share, dtype, residual, activation, share == "uneven"
                        )
    return results


MODELS = {
    "basic": lambda: block(resnet.BasicBlock),
    "bottleneck": lambda: block(resnet.Bottleneck),
    "cifar A": lambda: cifar_resnet(8),
    "cifar plain": lambda: cifar_resnet(8, plain=True),
}


def block(kind):
    out = 4 * kind.expansion
    downsample = nn.Sequential(resnet.conv1x1(3, out, 2), nn.BatchNorm2d(out))
    return kind(3, 4, 2, downsample)


def make_model(name: str) -> nn.Module:
    torch.manual_seed(1)
    return randomize_(MODELS[name]()).double().train()


def images(name: str) -> list[torch.Tensor]:
    """Both ranks' images: five and two, or none at the first rank."""
    counts = (0, 4) if name == "empty" else (5, 2)
    return list(draw(sum(counts), 3, 8, 8, seed=4).split(counts))


def loss_of(out: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(out.shape[1:].numel(), dtype=out.dtype).view(1, *out.shape[1:]).cos()
    return (out * weights).sum() + out.square().sum() / 8


def model_results(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    loss_of(out).backward()
    return {
        "output": out.detach(),
        "grad_input": x.grad,
        **{f"grad {n}": p.grad.clone() for n, p in model.named_parameters()},
        **{f"buffer {n}": b.clone() for n, b in model.named_buffers()},
    }


def models():
    """Whole blocks, as one node and operator by operator, converted before and after `fuse`."""
    results = {}
    for name in MODELS:
        for share in ("uneven", "empty"):
            for memory in ("normal", "low"):
                for order in ("fuse first", "convert first"):
                    model = make_model(name)
                    if order == "fuse first":
                        fused_resnet.fuse(model, memory=memory)
                    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
                    if order == "convert first":
                        fused_resnet.fuse(model, memory=memory)
                    results[name, share, memory, order] = model_results(model, images(share)[RANK])
    return results


def stem():
    """A torchvision network, its stem included."""
    model = fused_resnet.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(network()))
    return model_results(model, draw(4, 3, 32, 32, seed=4).split((3, 1))[RANK])


def autocast():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fused_resnet.fuse(make_model("basic").float()))
    x = images("uneven")[RANK].float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    loss_of(out.float()).backward()
    return {"output": out.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def momentum():
    """Three steps with cumulative averages."""
    model = fused_resnet.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(make_model("basic")))
    for norm in (model.bn1, model.bn2, model.downsample[1]):
        norm.momentum = None
    for step in range(3):
        model(images("uneven")[RANK] + step)
    return {n: b.clone() for n, b in model.named_buffers()}


def not_shared():
    """Eval mode, and a group of this process alone, are ordinary batch norm, with its bits."""
    differences = {}
    alone = [dist.new_group([rank]) for rank in range(WORLD)][RANK]
    eager = make_model("bottleneck")
    x = images("uneven")[RANK]
    for name, training, group in (("eval", False, None), ("alone", True, alone)):
        plain, model = copy.deepcopy(eager).train(training), copy.deepcopy(eager)
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, group).train(training)
        results = (
            model_results(fused_resnet.fuse(plain), x),
            model_results(fused_resnet.fuse(model), x),
        )
        differences[name] = [
            key for key, ours in results[1].items() if not torch.equal(ours, results[0][key])
        ]
    return differences


def group_argument():
    """A group of both processes with another order of its own collectives."""
    group = dist.new_group([0, 1])
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model("basic"), group)
    return model_results(fused_resnet.fuse(model), images("uneven")[RANK])


def all_empty():
    """No process has a value: nothing is updated, nothing is NaN."""
    mean, var, weight, bias = vectors(torch.float32)
    before = mean.clone(), var.clone()
    input = torch.empty(0, CHANNELS, 3, 3, requires_grad=True)
    weight.requires_grad_()
    out = functional.sync_batch_norm_act(
        input, mean, var, weight, bias, 0.3, group=dist.group.WORLD
    )
    out.sum().backward()
    return {
        "shape": tuple(out.shape),
        "unchanged": torch.equal(mean, before[0]) and torch.equal(var, before[1]),
        "grad_weight": weight.grad,
        "grad_input": tuple(input.grad.shape),
    }


def collectives():
    """How often each is called, forward and backward, of one norm and of a bottleneck."""
    calls = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counted(name):
        def call(*arguments, **keywords):
            calls.append(name)
            return originals[name](*arguments, **keywords)

        return call

    counts = {}
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model("bottleneck"))
    fused_resnet.fuse(model)
    try:
        for name in originals:
            setattr(dist, name, counted(name))
        run_function("uneven", torch.float32)
        counts["function"] = list(calls)
        calls.clear()
        model_results(model, images("uneven")[RANK])
        counts["bottleneck"] = list(calls)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


def twice():
    """Differentiating again is refused, by the function and by a block."""
    messages = []
    block = fused_resnet.fuse(nn.SyncBatchNorm.convert_sync_batchnorm(make_model("basic")))
    plain = nn.SyncBatchNorm.convert_sync_batchnorm(make_model("cifar plain"))
    for model in (block, fused_resnet.fuse(plain)):
        x = images("uneven")[RANK].requires_grad_()
        try:
            torch.autograd.grad(model(x).sum(), x, create_graph=True)
        except RuntimeError as error:
            messages.append(str(error))
    return messages


def report():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(make_model("cifar A"))
    records = fused_resnet.report(fused_resnet.fuse(model))
    return [(record.fused, record.backend) for record in records]


def network(stages: int = 2) -> nn.Module:
    torch.manual_seed(2)
    model = resnet.ResNet(resnet.BasicBlock, [1] * 4, num_classes=4)
    for number in range(stages + 1, 5):
        setattr(model, f"layer{number}", nn.Sequential())
    model.fc = nn.Linear(64 * 2 ** (stages - 1), 4)
    return randomize_(model).double().train()


def data_parallel():
    """Two steps of DistributedDataParallel: unfused, fused, and fused with shared statistics."""
    results = {}
    for name in ("eager", "fused", "shared"):
        model = network()
        if name != "eager":
            fused_resnet.fuse(model)
        wrapped = DistributedDataParallel(model)
        if name == "shared":  # afterwards, for it refuses SyncBatchNorm on a CPU
            nn.SyncBatchNorm.convert_sync_batchnorm(model)
        results[name] = two_steps(model, wrapped, RANK)
    return results


def two_steps(model: nn.Module, wrapped: nn.Module, rank: int | None) -> dict[str, torch.Tensor]:
    """Gradients of the second step and the parameters and buffers after it.

    A rank of None stands for a single process that has both ranks' images.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(2):
        x = draw(4, 3, 32, 32, seed=10 + step)
        y = torch.arange(4)
        if rank is not None:
            x, y = x.chunk(WORLD)[rank], y.chunk(WORLD)[rank]
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
    return {
        **{f"grad {n}": p.grad.clone() for n, p in model.named_parameters()},
        **{n: t.detach().clone() for n, t in model.state_dict().items()},
    }


def shard(model: nn.Module) -> nn.Module:
    """FSDP2 over both processes: each block by itself, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (WORLD,))
    for module in list(model.modules()):
        if isinstance(module, resnet.BasicBlock):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t for n, t in tensors.items()}


def sharded():
    """Two steps under FSDP2, fused before or after, and what the report says of it."""
    results = {}
    for name in ("eager", "fuse first", "shard first"):
        model = network()
        if name == "fuse first":
            fused_resnet.fuse(model, memory="low")
        shard(model)
        if name == "shard first":
            fused_resnet.fuse(model, memory="low")
        results[name] = whole(two_steps(model, model, RANK))
        if name != "eager":
            block = model.layer1[0]
            results[f"{name}: class"] = [cls.__name__ for cls in type(block).__mro__[:3]]
            results[f"{name}: memory"] = block.memory
            records = fused_resnet.report(model)
            results[f"{name}: report"] = [(r.fused, r.backend, r.reason) for r in records]
            fused_resnet.unfuse(model)
            results[f"{name}: unfused"] = [cls.__name__ for cls in type(block).__mro__[:3]]
            results[f"{name}: training again"] = whole(two_steps(model, model, RANK))
    return results


def gathered():
    """Inference on native kernels: the copies that are kept of gathered weights, and a change.

    One weight of a filter changes, in the shard of the process that has it.
    """
    cache = fused_resnet.backends.cpu.weights.cache
    fused_resnet.backends.cpu.empty_cache()
    plain = network(stages=4).float().eval()
    model = shard(fused_resnet.fuse(copy.deepcopy(plain)))
    x = draw(2, 3, 32, 32, seed=20).float()
    results = {"weights": sum(p.numel() * 4 for p in plain.parameters() if p.dim() == 4)}
    with torch.no_grad():
        results["first"] = (model(x), plain(x))
        results["kept"] = sum(entry.copy.nbytes for entry in cache.values())
        model(x)
        results["kept later"] = sum(entry.copy.nbytes for entry in cache.values())
        for changed in (plain.layer4[0].conv2.weight, plain.conv1.weight):
            changed[1, 2, 1, 0] += 30
        for name in ("layer4.0.conv2.weight", "conv1.weight"):
            model.reshard()
            local = model.get_parameter(name).to_local()
            if RANK == 0:  # the first half of the filters
                local[1, 2, 1, 0] += 30
        results["second"] = (model(x), plain(x))
    return results


def compiled():
    """A step under torch.compile of DDP's and FSDP2's wrapped networks."""
    results = {}
    for name in ("eager", "data parallel", "sharded"):
        model = network()
        if name != "eager":
            fused_resnet.fuse(model)
        wrapped = shard(model) if name == "sharded" else DistributedDataParallel(model)
        if name != "eager":
            torch._dynamo.reset()
            wrapped = torch.compile(wrapped, backend="aot_eager")
        results[name] = whole(two_steps(model, wrapped, RANK))
    return results


SCENARIOS = (
    functions,
    models,
    stem,
    autocast,
    momentum,
    not_shared,
    group_argument,
    all_empty,
    collectives,
    twice,
    report,
    data_parallel,
    sharded,
    gathered,
    compiled,
)


def main(rank: str, folder: str) -> None:
    global RANK
    RANK = int(rank)
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=RANK, world_size=WORLD, timeout=datetime.timedelta(seconds=120)
    )
    for scenario in SCENARIOS:
        try:
            result = scenario()
        except Exception:
            result = traceback.format_exc()
        torch.save(result, Path(folder) / f"{scenario.__name__}.{RANK}.pt")
        if isinstance(result, str):  # the processes may be at different collectives now
            break
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
