"""Whole networks for the fuzzer (tests/fuzz.py): joined blocks, plans and training steps.

A drawn network is a torchvision `ResNet` of a few blocks with odd widths, fused, that lives
through a few passes: inference with images of changing sizes, weights written and replaced in
between, training steps. Each pass is compared with the same network, unfused, in float64.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet.testing import randomize_

# How far a pass may be from float64: this many times as far as eager is, and this much of the
# largest value (of one, if that is more), for tensors so small that eager's error is luck. Training
# in 16 bits is asked for finite numbers alone: statistics of two or three pixels make anything of a
# rounding.
TIMES_EAGER = 6
UNITS_IN_INFERENCE = 16
IN_TRAINING = {torch.float32: 5e-4, torch.bfloat16: math.inf, torch.float16: math.inf}


class Network:
    """A few passes of one fused network.

    `passes` are what is written before each one, how it runs ("inference_mode", "no_grad", "train",
    "autocast") and its images.
    """

    def __init__(self, model: ResNet, passes: list[tuple[str, str, Tensor]], seed: int) -> None:
        self.model, self.passes, self.seed = model, passes, seed

    def __str__(self) -> str:
        passes = [
            f"{write}, {how} {str(x.dtype)[6:]}{tuple(x.shape)}/{x.stride()}"
            for write, how, x in self.passes
        ]
        return "; ".join(passes) + f"\n{self.model}"

    def run(self) -> tuple[str, str | None]:
        """Makes the passes; what came of them, and what is wrong with that, if anything is."""
        torch.manual_seed(self.seed)
        fused = fused_resnet.fuse(copy.deepcopy(self.model))
        for i, (write, how, x) in enumerate(self.passes):
            WRITES[write](fused)
            eager = fused_resnet.unfuse(copy.deepcopy(fused))
            exact = copy.deepcopy(eager).double()
            run = _train if how in ("train", "autocast") else _infer
            wrong = run(fused, eager, exact, x, how)
            if wrong is not None:
                return f"wrong in {how}", f"pass {i}: {wrong}"
        return "ok", None


def _scale_in_place(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)


def _replace_data(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.flip(0).clone()


def _replace_parameters(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach() * 1.1)


def _load(model: nn.Module) -> None:
    model.load_state_dict(
        {name: t.roll(1, 0) if t.dim() else t for name, t in model.state_dict().items()}
    )


def _shift_statistics(model: nn.Module) -> None:
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer += 0.1


WRITES: dict[str, Callable[[nn.Module], None]] = {
    "nothing": lambda model: None,
    "scaled in place": _scale_in_place,
    "other data": _replace_data,
    "other parameters": _replace_parameters,
    "loaded": _load,
    "other statistics": _shift_statistics,
}


def _infer(fused: nn.Module, eager: nn.Module, exact: nn.Module, x: Tensor, how: str) -> str | None:
    for module in (fused, eager, exact):
        module.eval()
    mode: Callable[[], Any] = torch.inference_mode if how == "inference_mode" else torch.no_grad
    with mode():
        got = fused(x)
        again = fused(x)
        want, near = exact(x.double()), eager(x)
    if not torch.equal(torch.nan_to_num(got), torch.nan_to_num(again)):
        return "the same pass twice, other numbers"
    return _differs("output", got, [near], want, UNITS_IN_INFERENCE * torch.finfo(got.dtype).eps)


def _train(fused: nn.Module, eager: nn.Module, exact: nn.Module, x: Tensor, how: str) -> str | None:
    autocast = how == "autocast"
    untrained = copy.deepcopy(eager)
    direction = torch.randn(exact(x.double()).shape, dtype=torch.float64)
    exact.load_state_dict(untrained.state_dict())  # its statistics have moved
    want = _step(exact, x.double(), direction, False)
    got, near = (_step(module, x, direction, autocast) for module in (fused, eager))
    dtype = torch.bfloat16 if autocast else x.dtype
    for name in want:
        if name.endswith("num_batches_tracked"):
            if got[name] != want[name]:
                return f"{name}: {got[name]}, must be {want[name]}"
            continue
        if got[name] is None:
            return f"{name}: none"
        nears = [near[name]]
        wrong = _differs(name, got[name], nears, want[name], IN_TRAINING[dtype])
        if wrong is not None:
            # What eager makes of images as good as these, each value half a unit off: norms of two
            # values a channel make anything of a rounding, and one pass may have been lucky.
            for _ in range(8):
                moved = x * (1 + (torch.rand_like(x) - 0.5) * torch.finfo(x.dtype).eps)
                model = copy.deepcopy(untrained)
                nears.append(_step(model, moved, direction, autocast)[name])
            wrong = _differs(name, got[name], nears, want[name], IN_TRAINING[dtype])
        if wrong is not None:
            return wrong
    return None


def _step(module: nn.Module, x: Tensor, direction: Tensor, autocast: bool) -> dict[str, Any]:
    """What a training step leaves: the output, gradients and buffers, by name."""
    module.train()
    module.zero_grad()
    image = x.detach().clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(image)
    (output.double() * direction).sum().backward()
    tensors = {"output": output.detach(), "gradient of the input": image.grad}
    tensors |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    tensors |= {name: b.detach().clone() for name, b in module.named_buffers()}
    module.zero_grad()
    return tensors


def _differs(
    name: str, got: Tensor, nears: Sequence[Tensor], want: Tensor, share: float
) -> str | None:
    """What is wrong with `got`, where eager has one of `nears` and float64 `want`.

    `share` is how much of the largest value it may be off.
    """
    if got.shape != want.shape or got.dtype is not nears[0].dtype:
        return (
            f"{name}: {got.dtype} {tuple(got.shape)}, must be {nears[0].dtype} {tuple(want.shape)}"
        )
    if not got.numel():
        return None
    if not all(torch.isfinite(near).all() for near in nears):
        return None  # eager left the range of the dtype
    got = got.double()
    if not torch.isfinite(got).all():
        return f"{name}: not finite"
    if math.isinf(share):
        return None
    eager = max((near.double() - want).abs().max() for near in nears)
    limit = TIMES_EAGER * eager + share * want.abs().max().clamp(min=1)
    error = (got - want).abs().max()
    return None if error <= limit else f"{name}: error {float(error)}, allowed {float(limit)}"


def draw_network(rng: random.Random) -> Network:
    """A network, what is written into it, and its images."""
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    kind = rng.choice((BasicBlock, Bottleneck))
    model = ResNet(kind, [1, 1, 1, 1], num_classes=rng.choice((1, 7, 10)))
    channels = rng.choice((4, 8, 16, 24, 33))
    model.conv1 = nn.Conv2d(3, channels, rng.choice((3, 7)), 2, rng.choice((1, 3)), bias=False)
    model.bn1 = nn.BatchNorm2d(channels)
    for i in range(1, 5):
        blocks = []
        for _ in range(rng.choice((0, 1, 1, 2))):
            block = _block(kind, channels, rng)
            channels = _channels(block)
            blocks.append(block)
        setattr(model, f"layer{i}", nn.Sequential(*blocks))
    model.fc = nn.Linear(channels, model.fc.out_features)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and rng.random() < 0.05:
            module.eps = 1e-3
    model = randomize_(model, rng.getrandbits(30)).to(dtype)
    layout = torch.channels_last if rng.random() < 0.8 else torch.contiguous_format
    model = model.to(memory_format=layout)
    how = rng.choice(("inference_mode", "no_grad", "mixed"))
    size = [rng.randint(8, 40) for _ in range(2)]
    passes = []
    for _ in range(rng.choice((1, 2, 3))):
        if rng.random() < 0.3:
            size = [rng.randint(8, 40) for _ in range(2)]
        its = how
        if how == "mixed":
            training = ["train", "autocast"] if dtype is torch.float32 else ["train"]
            its = rng.choice(["inference_mode", *training])
        # Statistics of few values are of no use to judge by.
        count = rng.randint(0, 3) if its in ("inference_mode", "no_grad") else rng.randint(2, 4)
        image = torch.randn(count, 3, *size).to(dtype).contiguous(memory_format=layout)
        write = rng.choice(tuple(WRITES)) if passes else "nothing"
        passes.append((write, its, image))
    return Network(model, passes, rng.getrandbits(30))


def _block(kind: type[nn.Module], channels: int, rng: random.Random) -> nn.Module:
    """A block behind `channels` channels."""
    # The library's gradient in a strided projection's weight wants as many channels as a vector has
    # (fused_resnet/layers/convolution.py), and eager, beside which we look, asks it for that.
    stride = rng.choice((1, 1, 2)) if channels >= 16 else 1
    planes = rng.choice((4, 8, 16, 17, 32, 40))
    how: dict[str, Any] = {}
    if kind is Bottleneck:
        if rng.random() < 0.3:
            how = {"groups": rng.choice((2, 4)), "base_width": 64}
            planes = 4 * rng.choice((2, 4, 8))
        how["dilation"] = rng.choice((1, 1, 1, 2))
    out = planes * kind.expansion
    downsample = None
    if stride != 1 or out != channels or rng.random() < 0.3:
        convolution = nn.Conv2d(channels, out, 1, stride, bias=False)
        downsample = nn.Sequential(convolution, nn.BatchNorm2d(out))
    return kind(channels, planes, stride, downsample, **how)


def _channels(block: nn.Module) -> int:
    last = getattr(block, "bn3", None) or block.bn2
    return last.num_features
