"""Models that are not channels_last: copied to it once, as weights are; results lie as eager's."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from typing import Any

import pytest
import torch
from support import assert_same_bits, image_batch, small_resnet, unchanged
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet.backends import arranged
from fused_resnet.backends.recording import Recorder
from fused_resnet.models.cifar import cifar_resnet
from fused_resnet.testing import assert_error_rule, randomize_

BLOCKS = {"basic": BasicBlock, "bottleneck": Bottleneck}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
pytestmark = pytest.mark.interpreted
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.copy_.default)


class Copies(Recorder):
    """Counts the tensors of four dimensions that are copied, by shape; it makes no plan."""

    def __init__(self) -> None:
        super().__init__(torch.empty(0), [])
        self.shapes: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES and out.dim() == 4:
            self.shapes[tuple(out.shape)] += 1
        return out

    def plan(self, output: Tensor) -> str:
        return "it only counts"


def launched_copies(stack: contextlib.ExitStack, backend) -> list:
    """The log of launches of a backend whose copies are launches of its own."""
    if backend.name != "triton":
        return []
    from fused_resnet.backends.triton import launch

    return stack.enter_context(launch.logged())


def counted(backend, call) -> tuple[Tensor, Counter]:
    """What a call returns, and the copies that it took."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        log = launched_copies(stack, backend)
        copies = stack.enter_context(Copies())
        out = call()
    for one in log:
        if one.kernel == "channels_last_kernel":
            copies.shapes["launched"] += 1
    return out, copies.shapes


def model_of(block: str, dtype: torch.dtype, device: str) -> nn.Module:
    return small_resnet(BLOCKS[block], stages=2).to(device, dtype)


@pytest.mark.lays_channels_last
@pytest.mark.parametrize("block", list(BLOCKS))
@pytest.mark.single
def test_a_network_is_copied_once(backend, block):
    """The input, and nothing else from the second pass on; the first copies weights, each once."""
    model = model_of(block, torch.float16, backend.device)
    x = image_batch(1, 16, torch.float16).contiguous().to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(model))
    arranged._cache.clear()
    with unchanged(x=x):
        first, copies = counted(backend, lambda: fused(x))
    weights = {
        id(m.weight): m.weight
        for m in fused.modules()
        if isinstance(m, nn.Conv2d)
        and max(m.kernel_size) > 1
        and (backend.name == "triton" or m.in_channels % 8 == 0)
    }
    kept = dict(arranged._cache)
    assert kept.keys() == weights.keys()
    image = Counter({"launched": 1} if backend.name == "triton" else {(1, 3, 16, 16): 1})
    assert copies == image
    second, copies = counted(backend, lambda: fused(x))
    assert copies == image
    assert arranged._cache == kept
    assert_same_bits(second, first)
    with torch.no_grad():
        assert_error_rule(first, model(x), copy.deepcopy(model).double()(x.double()))
        changed = fused.layer1[0].conv2.weight
        changed.mul_(0.5)
        model.layer1[0].conv2.weight.mul_(0.5)
        third, copies = counted(backend, lambda: fused(x))
        assert copies == image
        assert [key for key, entry in arranged._cache.items() if entry is not kept[key]] == [
            id(changed)
        ]
        assert_error_rule(third, model(x), copy.deepcopy(model).double()(x.double()))


@pytest.mark.lays_channels_last
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_networks_for_small_images(backend, shortcut):
    eager = randomize_(cifar_resnet(8, shortcut=shortcut)).eval().to(backend.device).half()
    x = image_batch(1, 8, torch.float16).contiguous().to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    counted(backend, lambda: fused(x))
    out, copies = counted(backend, lambda: fused(x))
    image = {"launched": 1} if backend.name == "triton" else {tuple(x.shape): 1}
    assert copies == image
    with torch.no_grad():
        assert_error_rule(out, eager(x), copy.deepcopy(eager).double()(x.double()))


@pytest.mark.parametrize("weights", list(FORMATS))
@pytest.mark.parametrize("images", list(FORMATS))
@pytest.mark.parametrize("block", list(BLOCKS))
@pytest.mark.single
def test_formats_are_eager_s(backend, block, images, weights):
    """Of blocks, of stages, and of what a head that may look at it is given."""
    model = model_of(block, torch.float32, backend.device).to(memory_format=FORMATS[weights])
    x = image_batch(2, 16).contiguous(memory_format=FORMATS[images]).to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(model))
    seen: dict[str, list[tuple[int, ...]]] = {"fused": [], "eager": []}
    values: dict[str, list[Tensor]] = {"fused": [], "eager": []}

    def look(name: str, net: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            seen[name].append(inputs[0].stride())
            values[name].append(inputs[0])

        net.avgpool.register_forward_pre_hook(hook)

    look("fused", fused)
    look("eager", model)
    with torch.no_grad():
        fused(x), model(x)
        inner = torch.randn(2, 64, 6, 5, device=backend.device)
        inner = inner.contiguous(memory_format=FORMATS[images])
        for name, net in (("fused", fused), ("eager", model)):
            for part in (net.layer1, net.layer2[0]):
                inputs = inner if part is net.layer1 else net.layer1(inner)
                values[name].append(part(inputs))
                seen[name].append(values[name][-1].stride())
    assert seen["fused"] == seen["eager"]
    exact = copy.deepcopy(model).double()
    exact.avgpool._forward_pre_hooks.clear()
    with torch.no_grad():
        found = exact.layer1(inner.double())
        assert_error_rule(values["fused"][1], values["eager"][1], found)
        assert_error_rule(values["fused"][2], values["eager"][2], exact.layer2[0](found))


def test_a_hook_between_layers_sees_eager_s_format(backend):
    """Then each stage is copied by itself."""
    model = model_of("bottleneck", torch.float32, backend.device)
    x = image_batch(2, 16).contiguous().to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(model))
    seen: dict[nn.Module, tuple[int, ...]] = {}
    for net in (model, fused):
        net.layer1.register_forward_hook(lambda m, _, out: seen.__setitem__(m, out.stride()))
    with torch.no_grad():
        fused(x), model(x)
    assert seen[fused.layer1] == seen[model.layer1]


def test_weights_are_kept_by_version():
    weight = torch.randn(8, 4, 3, 3)
    rows = arranged.rows_of(weight)
    assert arranged.rows_of(weight) is rows
    assert arranged.is_kept(weight, rows)
    assert_same_bits(rows, weight.permute(0, 2, 3, 1))
    weight.mul_(2)
    assert not arranged.is_kept(weight, rows)
    assert_same_bits(arranged.rows_of(weight), weight.permute(0, 2, 3, 1))
    arranged.release([weight])
    assert id(weight) not in arranged._cache
    last = weight.to(memory_format=torch.channels_last)
    assert arranged.rows_of(last).data_ptr() == last.data_ptr()
    assert id(last) not in arranged._cache
