"""How many Python functions one Bottleneck calls: what bounds small inputs.

One forward pass, in training with its backward pass; launches of Triton's kernels are counted up to
the launch. Of torch's own functions some versions call more than others, so the package's are
counted by themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from conftest import RUNNERS
from torchvision.models.resnet import Bottleneck

import fused_resnet
from fused_resnet import backends

PACKAGE = str(Path(fused_resnet.__file__).parent)

# Of the package's own functions, and of all together.
MOST = {
    ("cpu", "inference"): (30, 45),
    ("cpu", "training"): (153, 200),
    ("triton", "inference"): (95, 120),  # five for a weight whose copy is kept
    ("triton", "training"): (309, 400),
}


def calls_of(run: Callable[[], object]) -> tuple[int, int]:
    """Calls of the package's functions and of all, once what is found once is known."""
    for _ in range(3):
        run()
    own = count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal own, count
        if event == "call":
            count += 1
            own += frame.f_code.co_filename.startswith(PACKAGE)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return own, count - 1  # that of `run` itself


@pytest.mark.quick
@pytest.mark.parametrize(("name", "mode"), MOST, ids=" ".join)
def test_calls_of_a_bottleneck(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = next((runner for runner in RUNNERS if runner.name == name), None)
    if runner is None:
        pytest.skip(backends.available()[name])
    if name == "triton":
        backends.triton.lazy.training_convolutions()
        from fused_resnet.backends.triton import launch, norm

        for file in (launch, norm):
            monkeypatch.setattr(file, "launch_kernel", lambda *arguments, **constants: None)
    block = fused_resnet.fuse(Bottleneck(64, 16)).to(runner.device)
    block.train(mode == "training")
    x = torch.randn(2, 64, 8, 8, device=runner.device, requires_grad=mode == "training")
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_(x.requires_grad)
    # The graph's thread is another for a GPU, and is not counted.
    with fused_resnet.use_backend(name), torch.autograd.set_multithreading_enabled(False):
        if mode == "training":
            grad = torch.ones_like(x)
            calls = calls_of(lambda: torch.autograd.backward(block(x), grad))
        else:
            with torch.no_grad():
                calls = calls_of(lambda: block(x))
    own, every = MOST[name, mode]
    if torch.__version__ < "2.14":  # two of its releases compare as strings do
        every += 25  # torch 2.11 itself calls some twenty more in training
    assert calls[0] <= own, calls
    assert calls[1] <= every, calls


def test_the_count_sees_calls() -> None:
    def inner() -> None:
        pass

    def outer() -> None:
        inner()
        inner()

    assert calls_of(outer) == (0, 2)
