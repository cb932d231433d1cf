"""One kernel per Bottleneck, interpreted where there is no GPU, and how blocks become its launches.

Compared with float64 by the error rule, where eager rounds every tensor between two operators to 16
bits and the kernel only those it stores or multiplies.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib.util
import inspect
import math
import types
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torchvision
from conftest import RUNNERS
from support import (
    assert_same_bits,
    assert_same_nonfinite,
    double_copy,
    image_batch,
    small_resnet,
    unchanged,
)
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import backends
from fused_resnet.testing import assert_error_rule, randomize_
from fused_resnet.tuning import Choice, Tile, chain
from fused_resnet.tuning.architecture import ARCHITECTURES
from fused_resnet.tuning.choice import CHAIN, CHAIN_WITHOUT_NEXT, CONVOLUTIONS, PAIR
from fused_resnet.tuning.problem import ChainProblem

RUNNER = next((runner for runner in RUNNERS if runner.name == "triton"), None)

pytestmark = pytest.mark.skipif(RUNNER is None, reason=backends.available()["triton"])

if RUNNER is not None:
    backends.triton.launchers()
    from fused_resnet.backends import arranged
    from fused_resnet.backends.triton import bottleneck, chains, folded
    from fused_resnet.backends.triton import launch as launches

TILE = Tile(32, 32, 32, 1, 4, 2)
MEGABYTE = 1e6


@dataclass(frozen=True)
class Stage:
    """Bottlenecks in a row, smaller than those of the networks but of the same make."""

    width: int = 16
    outputs: int = 64
    inputs: int = 64
    blocks: int = 1
    stride: int = 1
    dilation: int = 1
    projected: bool = False
    next_width: int = 0
    size: tuple[int, int] = (5, 4)
    batch: int = 2


def bottlenecks(stage: Stage, bias: bool = False) -> nn.Sequential:
    """The blocks, and behind them, where there is a next width, a block that begins with it."""

    def block(inputs: int, width: int, outputs: int, first: bool) -> Bottleneck:
        stride = stage.stride if first else 1
        downsample = None
        if inputs != outputs or (first and (stage.projected or stride > 1)):
            downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=bias), nn.BatchNorm2d(outputs)
            )
        made = Bottleneck(inputs, outputs // 4, stride, downsample, dilation=stage.dilation)
        made.conv1 = nn.Conv2d(inputs, width, 1, bias=bias)
        dilation = stage.dilation
        made.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=bias)
        made.conv3 = nn.Conv2d(width, outputs, 1, bias=bias)
        made.bn1, made.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        made.bn3 = nn.BatchNorm2d(outputs)
        return made

    made = [block(stage.inputs, stage.width, stage.outputs, True)]
    for _ in range(stage.blocks - 1):
        made.append(block(stage.outputs, stage.width, stage.outputs, False))
    if stage.next_width:
        made.append(block(stage.outputs, stage.next_width, stage.outputs, False))
    return randomize_(nn.Sequential(*made).eval())


class Stages(ResNet):
    """A network of stages alone: what follows the stem and precedes the pool."""

    def __init__(self, *stages: nn.Sequential):
        nn.Module.__init__(self)
        for index in range(4):
            self.add_module(f"layer{index + 1}", stages[index] if index < len(stages) else None)

    def forward(self, x: Tensor) -> Tensor:
        from fused_resnet.modules.network import stages_forward

        return stages_forward([one for one in self._modules.values() if one], x)


def input_of(stage: Stage, dtype: torch.dtype, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(stage.batch, stage.inputs, *stage.size, generator=generator)
    return x.to(dtype).to(RUNNER.device, memory_format=torch.channels_last)


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, list]:
    """The model's stages on the backend, and its launches."""
    fused = fused_resnet.fuse(copy.deepcopy(model)).to(x.device, x.dtype)
    with (
        torch.no_grad(),
        unchanged(x=x),
        fused_resnet.use_backend("triton"),
        launches.logged() as log,
    ):
        return Stages(fused)(x), log


def check(model: nn.Module, x: Tensor) -> list:
    """The model's stages by the error rule; returns the launches."""
    out, log = run(model, x)
    with torch.no_grad():
        eager = copy.deepcopy(model).to(x.device, x.dtype)(x)
        exact = copy.deepcopy(model).to(x.device).double()(x.double())
    if eager[:, 0].numel() > eager.size(0):  # else the strides of rows and columns mean nothing
        assert out.stride() == eager.stride()
    assert_error_rule(out, eager, exact)
    return log


def names(log: list) -> Counter:
    return Counter(launch.kernel for launch in log)


@pytest.fixture
def tile(monkeypatch):
    """Every chain with one small tile, so that there are edges."""
    monkeypatch.setattr(chains, "choose", lambda *_: Choice(CHAIN, TILE, "test"))


@pytest.fixture
def apart(monkeypatch):
    """Norms are folded in each tile, and a sum that is shared takes a launch to be added up."""
    monkeypatch.setattr(chains, "together", lambda *_: contextlib.nullcontext())


STAGES = {
    "identity": Stage(),
    "two blocks": Stage(blocks=2),
    "projection": Stage(inputs=32, projected=True),
    "deep projection": Stage(inputs=64, outputs=96, projected=True, next_width=32),
    "stride": Stage(inputs=48, outputs=64, stride=2, blocks=2),
    "stride, odd": Stage(inputs=32, stride=2, size=(9, 4), batch=1),
    "dilation": Stage(dilation=2, blocks=2),
    "dilation, projected": Stage(dilation=4, projected=True, inputs=32),
    "wide": Stage(width=32, outputs=64, blocks=2),
    "next is wider": Stage(next_width=64),
    "next is narrower": Stage(width=32, outputs=128, inputs=128, next_width=16),
    "odd outputs": Stage(width=32, outputs=80, inputs=80, blocks=2),
    "one image": Stage(blocks=2, batch=1),
    "three images": Stage(blocks=2, batch=3, size=(3, 11)),
    "one pixel": Stage(blocks=2, size=(1, 1)),
    "stage 1": Stage(64, 256, 64, 2, projected=True, next_width=128, size=(4, 3), batch=1),
    "stage 2": Stage(128, 512, 256, 2, 2, next_width=256, size=(5, 4), batch=1),
    "stage 3": Stage(256, 1024, 512, 1, 2, size=(4, 4), batch=1),
    "stage 4": Stage(512, 2048, 2048, size=(2, 2), batch=1),
    "wide stage 1": Stage(128, 256, 64, 2, projected=True, size=(4, 3), batch=1),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.whole) if name in ("stage 2", "stage 3") else name
        for name in STAGES
    ],
)
@pytest.mark.single
def test_stages(tile, name):
    """All widths, shortcuts, strides and borders; one launch a block, and the first 1x1's."""
    stage = STAGES[name]
    log = check(bottlenecks(stage), input_of(stage, torch.float16))
    blocks = stage.blocks + bool(stage.next_width)
    assert +names(log) == Counter(
        bottleneck_kernel=blocks, conv_kernel=1, fold_norms_kernel=int(blocks > 1)
    )


@pytest.mark.quick
@pytest.mark.parametrize("name", ["two blocks", "stride", "deep projection"])
def test_bfloat16(tile, name):
    check(bottlenecks(STAGES[name]), input_of(STAGES[name], torch.bfloat16))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["dilation", "stride", "deep projection"])
def test_norms_that_are_folded_in_each_tile(tile, apart, name, dtype):
    log = check(bottlenecks(STAGES[name]), input_of(STAGES[name], dtype))
    assert names(log) == {"bottleneck_kernel": 2, "conv_kernel": 1}


@pytest.mark.parametrize("block_k", [16, 64])
@pytest.mark.parametrize("block_m", [16, 64, 256])
@pytest.mark.single
def test_tiles(monkeypatch, block_m, block_k):
    """Tiles larger than the tensor, slices of all its channels, one block deep."""
    tile = Tile(block_m, 64, block_k, 1, 4, 3)
    monkeypatch.setattr(chains, "choose", lambda *_: Choice(CHAIN, tile, "test"))
    stage = Stage(width=64, outputs=128, inputs=64, projected=True, blocks=2)
    check(bottlenecks(stage), input_of(stage, torch.float16))


@pytest.mark.quick
def test_biases_and_norms_without_affine(tile, monkeypatch):
    stage = Stage(blocks=2, projected=True, next_width=32)
    model = bottlenecks(stage, bias=True)
    for name in ("bn1", "bn2", "bn3"):
        for parameter in ("weight", "bias"):
            setattr(getattr(model[1], name), parameter, None)
    model[1].bn2.eps = 0.1
    log = check(model, input_of(stage, torch.float16))
    assert names(log)["fold_norms_kernel"] == 1
    monkeypatch.setattr(chains, "together", lambda *_: contextlib.nullcontext())
    log = check(model, input_of(stage, torch.float16))
    assert names(log)["fold_norms_kernel"] == 0


@pytest.mark.quick
def test_sixty_four_bit_offsets(tile, monkeypatch):
    """The same bits as with 32."""
    stage = Stage(blocks=2, stride=2, next_width=32)
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    narrow, _ = run(model, x)
    monkeypatch.setattr(launches, "is_wide", lambda *_: True)
    wide, _ = run(model, x)
    assert_same_bits(wide, narrow)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["two blocks", "stride", "projection"])
def test_nonfinite_values_reach_what_they_should(tile, name, value):
    """No other pixel, and no ReLU turns NaN into zero."""
    stage = STAGES[name]
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    x[0, 3, 2, 2] = value
    x[1, 0, 0, 3] = -value
    out, log = run(model, x)
    assert "bottleneck_kernel" in names(log)
    with torch.no_grad():
        exact = copy.deepcopy(model).to(x.device).double()(x.double())
        eager = copy.deepcopy(model).to(x.device).half()(x)
    assert out.isnan().any()
    assert_same_nonfinite(out, exact, eager)


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(0, 5, 4), (2, 5, 4)])
def test_any_layout_and_empty_batches(tile, shape):
    """Outputs have eager's layout; what is not channels_last is copied to it, once."""
    batch, *size = shape
    stage = Stage(blocks=2, size=tuple(size), batch=batch)
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    views = [x, x.contiguous(), x.transpose(2, 3), x.repeat(1, 2, 1, 1)[:, ::2]]
    for view in views if batch else views[:1]:
        out, log = run(model, view)
        eager = copy.deepcopy(model).to(x.device).half()(view)
        assert out.shape == eager.shape
        copies = [] if view.is_contiguous(memory_format=torch.channels_last) else ["channels_last"]
        chain = ["fold_norms", "conv", "bottleneck", "bottleneck"]
        kernels = [f"{name}_kernel" for name in (copies + chain if batch else [])]
        assert [launch.kernel for launch in log] == kernels
        if batch:
            assert out.stride() == eager.stride()
            assert_error_rule(out, eager, copy.deepcopy(model).double()(view.double()))


@pytest.fixture(scope="module")
def resnet50():
    return randomize_(torchvision.models.resnet50().eval())


@pytest.mark.whole
def test_a_whole_resnet50(resnet50):
    """Stem to classifier against float64, every block in a launch."""
    x = image_batch(1, 32, torch.float16).to(RUNNER.device)
    fused = fused_resnet.fuse(copy.deepcopy(resnet50)).to(x.device).half()
    fused = fused.to(memory_format=torch.channels_last)
    with torch.no_grad():
        with fused_resnet.use_backend("triton"), launches.logged() as log:
            out = fused(x)
        eager = copy.deepcopy(resnet50).to(x.device).half()(x)
        assert_error_rule(out, eager, double_copy(resnet50).to(x.device)(x.double()))
    assert names(log)["bottleneck_kernel"] == 16
    assert names(log)["stem_pool_kernel"] == 1


WHOLE = {
    "thin": ({}, 64, torch.float16),
    "thin, bfloat16": ({}, 64, torch.bfloat16),
    "dilated": ({"replace_stride_with_dilation": [False, True, True]}, 48, torch.float16),
    "wide": ({"width_per_group": 32}, 48, torch.bfloat16),
}


@pytest.mark.parametrize(
    "name",
    [
        "thin",
        pytest.param("thin, bfloat16", marks=pytest.mark.whole),
        pytest.param("dilated", marks=pytest.mark.whole),
        pytest.param("wide", marks=pytest.mark.whole),
    ],
)
def test_whole_networks_on_larger_images(name):
    """Stem to classifier against float64, of 16 and 32 channels: borders within many tiles."""
    options, size, dtype = WHOLE[name]
    options = {"width_per_group": 16} | options
    torch.manual_seed(5)
    model = randomize_(ResNet(Bottleneck, [1, 2, 1, 1], num_classes=400, **options).eval())
    x = image_batch(1, size, dtype).to(RUNNER.device)
    fused = fused_resnet.fuse(copy.deepcopy(model)).to(x.device, dtype)
    fused = fused.to(memory_format=torch.channels_last)
    with torch.no_grad():
        with fused_resnet.use_backend("triton"), launches.logged() as log:
            out = fused(x)
        eager = copy.deepcopy(model).to(x.device, dtype)(x)
        assert_error_rule(out, eager, double_copy(model).to(x.device)(x.double()))
    assert names(log)["bottleneck_kernel"] == 5


def traffic(fused: nn.Module, widest: int) -> list:
    """The launches of a network on an image of 224 x 224, none of which is run.

    Blocks wider than `widest` run convolution by convolution.
    """
    x = torch.empty(1, 3, 224, 224, dtype=torch.float16, device=RUNNER.device)
    x = x.to(memory_format=torch.channels_last)

    def choose(problem, device):
        return Choice(CHAIN if problem.width <= widest else CONVOLUTIONS, TILE, "test")

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(chains, "choose", choose)
        with fused_resnet.use_backend("triton"), launches.logged(run=False) as log:
            fused(x)
    return log


def test_bytes_of_a_resnet50(resnet50):
    """What the launches read and write, of activations: at most 31 MB an image in float16.

    With the widest stage convolution by convolution, where the design leaves it, and less with it
    chained; epilogue fusion alone moves some 54.
    """
    fused = fused_resnet.fuse(copy.deepcopy(resnet50)).to(RUNNER.device).half()
    fused = fused.to(memory_format=torch.channels_last)
    per_image = {}
    for widest in (0, 256, 512):
        log = traffic(fused, widest)
        assert names(log)["bottleneck_kernel"] == {0: 0, 256: 13, 512: 16}[widest]
        per_image[widest] = sum(launch.activation_bytes for launch in log) / MEGABYTE
    assert per_image[512] < per_image[256] <= 31
    assert 50 < per_image[0] < 56


def test_the_log_counts_each_tensor_once(tile):
    """By hand, of two blocks with a strided projection: only pixels that are used."""
    stage = Stage(inputs=32, stride=2, blocks=2, size=(8, 6), batch=3)
    _, (folding, *log) = run(bottlenecks(stage), input_of(stage, torch.float16))
    assert [launch.kernel for launch in log] == ["conv_kernel", *["bottleneck_kernel"] * 2]
    channels = (16 + 16 + 64 + 64) + (16 + 16 + 64)
    assert folding.kernel == "fold_norms_kernel"
    assert folding.reads == {"rows_ptr": 7 * 8 * 8, "mean_ptr": 2 * 4 * channels}
    assert folding.writes == {"table_ptr": 2 * 4 * channels, "ticket_ptr": 4 * folded.TICKETS}
    pixels = 3 * 4 * 3
    first, projected, last = ([*one.reads.items(), *one.writes.items()] for one in log)
    assert dict(first)["input_ptr"] == 2 * 4 * pixels * 32
    assert log[0].writes == {"output_ptr": 2 * 4 * pixels * 16}
    assert dict(projected)["input_ptr"] == 2 * 4 * pixels * 16
    assert dict(projected)["shortcut_ptr"] == 2 * pixels * 32
    assert log[1].writes == {"output_ptr": 2 * pixels * 64, "next_ptr": 2 * pixels * 16}
    assert dict(last)["shortcut_ptr"] == 2 * pixels * 64
    assert log[2].writes == {"output_ptr": 2 * pixels * 64}
    assert log[2].activation_bytes == 2 * pixels * (16 + 64 + 64)
    assert log[1].reads["project_ptr"] == 2 * 32 * 64
    assert log[1].bytes == log[1].activation_bytes + sum(
        moved for name, moved in log[1].reads.items() if name not in ("input_ptr", "shortcut_ptr")
    )


@pytest.mark.skipif(RUNNER is None or RUNNER.device == "cuda", reason="for the interpreter")
def test_the_log_is_what_kernels_address(tile, monkeypatch):
    """Each launch's bytes against the addresses its programs loaded and stored, interpreted."""
    from triton.runtime import interpreter

    touched: list[dict[str, set[int]]] = []

    def watching(name, place, mask):
        original = getattr(interpreter.InterpreterBuilder, name)

        def watch(self, pointer, *rest):
            addresses, sizes = pointer.data, pointer.get_element_ty().primitive_bitwidth // 8
            chosen = rest[mask].data if mask is not None else np.ones_like(addresses, dtype=bool)
            addresses, chosen = np.broadcast_arrays(addresses, chosen)
            touched[-1][place].update((int(one), sizes) for one in np.unique(addresses[chosen]))
            return original(self, pointer, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, watch)

    watching("create_masked_load", "reads", 0)
    watching("create_masked_store", "writes", 1)
    launch = launches.launch_kernel

    def noted(*arguments, **constants):
        touched.append({"reads": set(), "writes": set()})
        launch(*arguments, **constants)

    monkeypatch.setattr(launches, "launch_kernel", noted)
    stage = Stage(inputs=32, stride=2, blocks=2, size=(9, 6), next_width=32)
    _, log = run(bottlenecks(stage), input_of(stage, torch.float16))
    assert len(log) == len(touched) == 5
    for reported, seen in zip(log, touched, strict=True):
        for place in ("reads", "writes"):
            moved = sum(size for _, size in seen[place])
            assert sum(getattr(reported, place).values()) == moved, (reported, place)


@pytest.mark.pairs
@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "shares"), [(torch.float16, True), (torch.bfloat16, True), (torch.float16, False)]
)
@pytest.mark.parametrize(
    "name",
    [
        "two blocks",
        "deep projection",
        "stride",
        "odd outputs",
        "three images",
        pytest.param("stage 2", marks=pytest.mark.whole),
    ],
)
@pytest.mark.single
def test_pairs(monkeypatch, name, dtype, shares, split):
    """The 3x3 by itself, then both 1x1s at once, their slices shared among programs or not."""
    tile = Tile(32, 16, 32, split, 4, 2)
    stage = STAGES[name]
    if stage.outputs % (16 * split):
        split = 1
        tile = Tile(32, 16, 32, 1, 4, 2)
    monkeypatch.setattr(chains, "choose", lambda *_: Choice(PAIR, tile, "test"))
    blocks = stage.blocks + bool(stage.next_width)
    if not shares:
        monkeypatch.setattr(chains, "together", lambda *_: contextlib.nullcontext())
    counted = names(check(bottlenecks(stage), input_of(stage, dtype)))
    # The last block has no next convolution: one program has all of a tile's slices there.
    assert +counted == +Counter(
        bottleneck_kernel=blocks,
        sum_partials_kernel=0 if shares or split == 1 else blocks - 1,
        conv_kernel=blocks + 1,
        fold_norms_kernel=int(shares and blocks > 1),
    )


@pytest.mark.quick
def test_a_shared_pair_is_deterministic_and_has_its_bytes(monkeypatch):
    """The same bits again; h, shortcut, output and float32 partial sums, each once."""
    tile = Tile(16, 16, 16, 2, 4, 2)
    monkeypatch.setattr(chains, "choose", lambda *_: Choice(PAIR, tile, "test"))
    stage = Stage(blocks=2, batch=3)
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    out, log = run(model, x)
    assert_same_bits(run(model, x)[0], out)
    monkeypatch.setattr(launches, "is_wide", lambda *_: True)
    assert_same_bits(run(model, x)[0], out)
    pair = next(launch for launch in log if launch.kernel == "bottleneck_kernel")
    pixels = 3 * 5 * 4
    assert pair.reads["input_ptr"] == 2 * pixels * 16
    assert pair.reads["shortcut_ptr"] == 2 * pixels * 64
    written = {"output_ptr": 2 * pixels * 64, "partial_ptr": 2 * 4 * pixels * 16}
    assert pair.writes == written | {"next_ptr": 2 * pixels * 16}


@pytest.mark.quick
def test_launches_in_a_row(monkeypatch):
    """Of few pixels, all but the first may begin early; of many, or on older GPUs, none."""
    stage = Stage(blocks=3, inputs=32)
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    constants = []
    dependence = launches.dependence

    def noted(*arguments):
        constants.append(dependence(*arguments))
        return {}  # the interpreter has no such thing

    monkeypatch.setattr(launches, "dependence", noted)
    monkeypatch.setattr(launches, "can_depend", lambda _: True)
    monkeypatch.setattr(chains, "choose", lambda *_: Choice(CHAIN, TILE, "test"))
    run(model, x)
    first, *others = constants
    assert first == {"DEPENDENT": True, "launch_pdl": False}
    assert others == [{"DEPENDENT": True, "launch_pdl": True}] * 4
    assert launches.next_in_row() is None
    constants.clear()
    monkeypatch.setattr(chains.chain, "OVERLAPPED_IMAGES", 1)
    run(model, x)
    assert constants == [{}] * 5
    monkeypatch.setattr(chains.chain, "OVERLAPPED_IMAGES", 2)
    monkeypatch.setattr(launches, "can_depend", lambda _: False)
    constants.clear()
    run(model, x)
    assert constants == [{}] * 5


@pytest.mark.quick
def test_which_devices_launches_overlap_on(monkeypatch):
    """Those for which the estimate counts on it."""
    device = types.SimpleNamespace(type="cuda", index=0)
    for gpu in ARCHITECTURES.values():
        monkeypatch.setattr(launches, "capability", lambda _, gpu=gpu: gpu.capability)
        overlap = launches.can_depend(types.SimpleNamespace(device=device))
        assert overlap == (gpu.capability[0] in (9, 10)), gpu
        problem = ChainProblem(8, 64, 56, 56, 256, (1, 1), (1, 1), (1, 1), "float16", None, 64)
        assert chain.overlaps(problem, gpu) == overlap
        assert not chain.overlaps(replace(problem, N=9), gpu)
    assert not launches.can_depend(torch.empty(0))


@pytest.mark.quick
def test_convolutions_in_a_row(monkeypatch):
    """Where no block is chained, a small batch's convolutions overlap all the same."""
    stage = Stage(blocks=2)
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    rows = []
    dependence = launches.dependence

    def noted(*arguments):
        rows.append(launches.next_in_row())
        return dependence(*arguments)

    monkeypatch.setattr(launches, "dependence", noted)
    monkeypatch.setattr(chains, "choose", lambda *_: Choice(CONVOLUTIONS, None, "test"))
    log = check(model, x)
    assert names(log) == {"conv_kernel": 6, "fold_norms_kernel": 1}
    assert None not in rows
    monkeypatch.setattr(chains.chain, "OVERLAPPED_IMAGES", 0)
    rows.clear()
    check(model, x)
    assert set(rows) == {None}


def test_choices_are_followed(monkeypatch):
    """Without the next 1x1, convolution by convolution, and chained."""
    stage = Stage(blocks=3, inputs=32)
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    seen = []

    def choose(problem, device):
        seen.append(problem)
        kernel = (CONVOLUTIONS, CHAIN_WITHOUT_NEXT, CHAIN)[len(seen) - 1]
        return Choice(kernel, None if kernel == CONVOLUTIONS else TILE, "test")

    monkeypatch.setattr(chains, "choose", choose)
    log = check(model, x)
    assert [launch.kernel for launch in log] == [
        "fold_norms_kernel",
        *["conv_kernel"] * 4,  # with the projection
        *["conv_kernel", "bottleneck_kernel"],
        *["conv_kernel", "bottleneck_kernel"],
    ]
    assert [problem.next_width for problem in seen] == [16, 16, 0]
    assert seen[0].projection == (32, 5, 4, 1, 1)
    assert seen[1].projection is None


@pytest.mark.quick
def test_what_is_no_chain_runs_by_convolutions(tile):
    """Grouped 3x3, odd widths, basic blocks, float32: no launch of the chain, the right numbers."""
    grouped = bottlenecks(Stage(width=32, blocks=2))
    for block in grouped:
        block.conv2 = nn.Conv2d(32, 32, 3, padding=1, groups=4, bias=False)
    odd = bottlenecks(Stage(width=24))
    basic = randomize_(nn.Sequential(BasicBlock(64, 64), BasicBlock(64, 64)).eval())
    for model in (grouped, odd, basic):
        log = check(model, input_of(Stage(), torch.float16))
        assert log
        assert "bottleneck_kernel" not in names(log)
    log = check(bottlenecks(Stage()), input_of(Stage(), torch.float32))
    assert names(log) == {"conv_kernel": 3}


@pytest.mark.quick
def test_a_chain_beside_blocks_that_are_none(tile):
    """A grouped block between two that are not, and a next width that is too odd."""
    model = bottlenecks(Stage(blocks=3))
    model[1].conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=2, bias=False)
    log = check(randomize_(model), input_of(Stage(), torch.float16))
    assert names(log)["bottleneck_kernel"] == 2
    model = bottlenecks(Stage(next_width=24))
    log = check(model, input_of(Stage(), torch.float16))
    assert names(log) == {"conv_kernel": 4, "bottleneck_kernel": 1, "fold_norms_kernel": 1}


def fall_backs():
    """Ways to keep a network's stages from running as one call, and the chains that are left."""

    def hook_inside(model):
        model.layer1[1].bn2.register_forward_hook(lambda *_: None)

    def hook_on_block(model):
        model.layer1[1].register_forward_hook(lambda *_: None)

    def partly(model):
        fused_resnet.unfuse(model.layer2)

    def trained_norm(model):
        model.layer1[0].bn2.train()

    def needs_grad(model):
        for parameter in model.parameters():
            parameter.requires_grad_()

    return {
        "hook inside": (hook_inside, True),
        "hook on a block": (hook_on_block, True),
        "partly fused": (partly, True),
        "train mode": (trained_norm, True),
        "gradients": (needs_grad, False),
    }


@pytest.mark.parametrize("name", fall_backs())
@pytest.mark.single
def test_fall_back(name):
    """The same numbers but for rounding, whatever keeps blocks from running together."""
    change, chained = fall_backs()[name]
    model = small_resnet(layers=2, stages=2, width_per_group=16).half()
    x = image_batch(1, 16, torch.float16).to(RUNNER.device)
    fused = fused_resnet.fuse(copy.deepcopy(model)).to(x.device)
    plain = copy.deepcopy(model).to(x.device)
    exact = copy.deepcopy(model).to(x.device).double()
    for parameter in fused.parameters():
        parameter.requires_grad_(False)
    for one in (fused, plain, exact):
        change(one)
    with fused_resnet.use_backend("triton"), launches.logged() as log:
        out = fused(x)
    assert ("bottleneck_kernel" in names(log)) == chained
    with torch.no_grad():
        assert_error_rule(out.detach(), plain(x), exact(x.double()))


@pytest.mark.quick
def test_a_block_or_a_stage_by_itself(tile):
    """A block alone is a chain without a next 1x1; torchvision's stage calls its blocks so."""
    stage = Stage(blocks=2)
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    fused = fused_resnet.fuse(copy.deepcopy(model)).to(x.device).half()
    with torch.no_grad(), fused_resnet.use_backend("triton"), launches.logged() as log:
        out = fused(x)
    assert names(log) == {"conv_kernel": 2, "bottleneck_kernel": 2}
    exact = copy.deepcopy(model).to(x.device).double()(x.double())
    assert_error_rule(out, copy.deepcopy(model).to(x.device).half()(x), exact)


@pytest.mark.quick
def test_wrong_arguments_raise_what_the_modules_raise(tile):
    """A weight of another dtype, a shortcut of another size: found before anything runs."""
    stage = Stage(blocks=2)
    x = input_of(stage, torch.float16)
    for spoil in (
        lambda model: model[1].conv3.float(),
        lambda model: setattr(model[1].conv2, "stride", (2, 2)),
        lambda model: setattr(model[1].conv1, "weight", nn.Parameter(torch.ones(16, 9, 1, 1))),
    ):
        model = bottlenecks(stage).to(x.device).half()
        fused = fused_resnet.fuse(copy.deepcopy(model))
        spoil(model)
        spoil(fused)
        with torch.no_grad(), pytest.raises(RuntimeError) as theirs:
            model(x)
        with (
            torch.no_grad(),
            fused_resnet.use_backend("triton"),
            launches.logged() as log,
            pytest.raises(RuntimeError) as ours,
        ):
            Stages(fused)(x)
        assert type(ours.value) is type(theirs.value)
        assert names(log)["bottleneck_kernel"] <= 1


@pytest.mark.quick
def test_weights_are_arranged_once(tile):
    """Where they do not lie channels last; anew when changed, gone when released or dead."""
    stage = Stage()
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    fused = fused_resnet.fuse(model).to(x.device).half()
    arranged._cache.clear()
    weight = fused[0].conv2.weight
    with torch.no_grad(), fused_resnet.use_backend("triton"):
        before = fused(x)
        assert list(arranged._cache) == [id(weight)]
        kept = arranged._cache[id(weight)]
        assert_same_bits(fused(x), before)
        assert arranged._cache[id(weight)] is kept
        weight[0] += 1.0
        after = fused(x)
        assert arranged._cache[id(weight)] is not kept
        assert not torch.equal(after, before)
        fused.to(memory_format=torch.channels_last)
        assert not arranged._cache
        assert_same_bits(fused(x), after)
        assert not arranged._cache
        fused.to(memory_format=torch.contiguous_format)
        fused(x)
        assert len(arranged._cache) == 1
        del weight, kept, fused, model
    gc.collect()
    assert not arranged._cache


# Broken kernels: a line of bottleneck.py, and what it becomes.
MUTATIONS = {
    "last tap lost": ("range(R * S * (WIDTH", "range((R * S - 1) * (WIDTH"),
    "wraps at the border": ("(w + s * DILATION_W < W)", "(w + s * DILATION_W < W + 1)"),
    "first norm forgotten": ("relu(acc * scale[None, :] + offset[None, :])", "relu(acc)"),
    "no ReLU between": ("return device.relu(acc", "return (acc"),
    "shortcut forgotten": ("out = shortcut.to(tl.float32)", "out = 0.0 * shortcut.to(tl.float32)"),
    "projection's norm forgotten": ("out = out * factor[None, :] + term[None, :]", "out = out"),
    "projection reads every pixel": ("p * PROJECT_STRIDE_H *", "p *"),
    "output not activated": ("out = device.relu(out).to(dtype)", "out = out.to(dtype)"),
    "first slice again": ("k = first + tl.arange", "k = 0 * first + tl.arange"),
    "last row lost": ("row = tl.minimum(m, M - 1)", "row = tl.minimum(m, M - 2)"),
    "next weight's rows": ("(following * K)[None, :]", "(following * NEXT)[None, :]"),
    "dilation ignored": ("shift = r * DILATION_H *", "shift = r *"),
    "eps of another": ("project_eps,\n            )", "eps,\n            )"),
    "projection one block deep": ("range(0, SHORTCUT_C, BLOCK_K)", "range(0, BLOCK_K, BLOCK_K)"),
}


@pytest.mark.skipif(RUNNER is None or RUNNER.device == "cuda", reason="for the interpreter")
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.single
def test_broken_kernels_are_noticed(tile, apart, monkeypatch, tmp_path, mutation):
    right, wrong = MUTATIONS[mutation]
    source = inspect.getsource(bottleneck)
    assert right in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(right, wrong))
    name = f"fused_resnet.backends.triton.broken_{sum(map(ord, mutation))}"
    spec = importlib.util.spec_from_file_location(name, path)
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)

    stage = Stage(blocks=2, inputs=64, stride=2, dilation=2, size=(7, 5))
    model, x = bottlenecks(stage), input_of(stage, torch.float16)
    model[0].downsample[1].eps = 0.3
    check(model, x)
    monkeypatch.setattr(bottleneck, "bottleneck_kernel", broken.bottleneck_kernel)
    torch.use_deterministic_algorithms(True)  # new tensors are full of NaN
    try:
        with pytest.raises(AssertionError):
            check(model, x)
    finally:
        torch.use_deterministic_algorithms(False)
