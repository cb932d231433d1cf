"""Backends of other packages: registered, chosen, explained, and the library's way by default."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import ConvShape, image_batch, make_conv_case, small_resnet
from torch import Tensor

import fused_resnet
from fused_resnet import backends
from fused_resnet.backends import registry
from fused_resnet.layers.description import ConvNorm
from fused_resnet.testing import assert_error_rule


class Counting(backends.Backend):
    """The library's way in everything; counts its convolutions."""

    name = "counting"
    device_type = "cpu"

    def __init__(self) -> None:
        self.convolutions = 0

    def conv_bn_act(
        self, input: Tensor, layer: ConvNorm, residual: Tensor | None, activation: str
    ) -> Tensor:
        self.convolutions += 1
        return super().conv_bn_act(input, layer, residual, activation)


class Absent(backends.Backend):
    name = "absent"

    def available(self) -> str:
        return "there is no such machine"


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    backend = Counting()
    backends.register(backend)
    backends.register(Absent())
    return backend


def test_a_backend_from_outside(counting: Counting) -> None:
    assert backends.available()["counting"] == "yes"
    assert backends.available()["absent"] == "there is no such machine"
    assert backends.named("counting") is counting
    assert backends.choose("cpu").name == "cpu"
    with fused_resnet.use_backend("counting"):
        assert backends.choose("cpu") is counting
        assert backends.choose("cuda").name == "reference"
        how = backends.explain("conv_bn_act", device=torch.device("cpu"), dtype=torch.float32)
        assert how == "counting: library convolution + scale_shift_act"
    with (
        pytest.raises(ValueError, match="'absent', which cannot run here: there is no such mach"),
        fused_resnet.use_backend("absent"),
    ):
        pass
    with pytest.raises(ValueError, match="there is a backend 'counting' already"):
        backends.register(Counting())


def test_it_runs_a_model(counting: Counting) -> None:
    """Inference and a training step by the defaults alone, to the error rule."""
    model = small_resnet(stages=2)
    fused = fused_resnet.fuse(copy.deepcopy(model))
    x = image_batch(2, 33)

    def gradients(network: Any, images: Tensor) -> Tensor:
        network.train().zero_grad()
        network(images).square().sum().backward()
        return torch.cat([p.grad.double().flatten() for p in network.parameters()])

    exact = copy.deepcopy(model).double()
    with fused_resnet.use_backend("counting"):
        with torch.no_grad():
            assert_error_rule(fused(x), model(x), exact(x.double()))
        assert counting.convolutions == 9
        theirs, ours = gradients(model, x), gradients(fused, x)
    assert_error_rule(ours, theirs, gradients(exact, x.double()))


def test_release_reaches_it(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[Tensor] = []
    monkeypatch.setattr(counting, "release", released.extend)
    weight = make_conv_case(ConvShape(4, 4, (1, 1))).weight
    backends.release([weight])
    assert len(released) == 1
    assert released[0] is weight
