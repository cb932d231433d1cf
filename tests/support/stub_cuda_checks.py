"""What test_cuda_on_stub.py runs where the CUDA kernels are started by a stub of the runtime.

As stub_checks.py: `python stub_cuda_checks.py FILE` runs each `check_` and writes how it ended.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torchvision
from cuda_stub import Launch, Stub
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

import fused_resnet
from fused_resnet.backends import cuda_plans
from fused_resnet.backends.triton import plans as triton_plans
from fused_resnet.modules import network, plans

stub = Stub()
# Nothing was computed, so no bits can be compared.
plans._gives = lambda plan, x, out: plan.run(x).stride() == out.stride()


def make_model(name: str) -> ResNet:
    """A whole network, without what the library runs at its end."""
    model = getattr(torchvision.models, name)().half().to(memory_format=torch.channels_last)
    model.avgpool, model.fc = nn.Identity(), nn.Identity()
    return fused_resnet.fuse(model.eval()).cuda()


def draw(batch: int = 1) -> Tensor:
    x = torch.randn(batch, 3, 224, 224).half()
    return x.to(memory_format=torch.channels_last).cuda()


def ordinary(model: ResNet, x: Tensor) -> Tensor:
    return network._resnet_features(model, x)


def planned(model: ResNet, x: Tensor) -> Tensor:
    parts = [model._modules[name] for name in network._RESNET_PARTS]
    return plans.planned(model, parts, x, network._resnet_features)


def plan_of(model: ResNet) -> Any:
    (plan,) = plans._of_models[model].by_key.values()
    assert isinstance(plan, cuda_plans.Plan), plan
    return plan


def recorded(
    model: ResNet, x: Tensor, cuda_only: bool = False
) -> list[tuple[int, list[int], list[bool]]]:
    """Of each launch of a pass: its function, words of each parameter, which are addresses.

    With `cuda_only`, of those that are kernels of csrc/cuda.
    """
    recorder = cuda_plans.Recorder(x, [])
    with recorder:
        ordinary(model, x)
    assert cuda_only or recorder._obstacle is None, recorder._obstacle
    rest = iter(recorder._numbers)

    def launch() -> tuple[int, list[int], list[bool]]:
        function, *_, count = (next(rest) for _ in range(7))
        sizes, addresses = [], []
        for _ in range(count):
            sizes.append(next(rest))
            for _ in range(sizes[-1]):
                addresses.append(bool(next(rest)))
                next(rest)
        return function, sizes, addresses

    def launches() -> Iterator[tuple[int, list[int], list[bool]]]:
        for kind in rest:
            if kind == cuda_plans._LAUNCH:
                yield launch()
            else:
                next(rest), next(rest)

    return list(launches())


taken: set[int] = set()


def launches_of(call: Callable[[], object]) -> tuple[list[Launch], int]:
    """What a call launches, and how often it clears memory."""
    before = stub.clearings()
    stub.reset()
    call()
    return stub.launches(), stub.clearings() - before


def _check_records(name: str) -> None:
    """Kernel, grid, block, shared memory, numbers, tensors that last; one clearing for all sums."""
    model, x = make_model(name), draw()
    planned(model, x)
    plan, kinds = plan_of(model), recorded(model, x)
    for function, sizes, _ in kinds:
        if function not in taken:
            stub.take(function, sizes)
            taken.add(function)
    own, clearings = launches_of(lambda: ordinary(model, x))
    theirs, cleared = launches_of(lambda: plan.run(x))
    assert len(own) == len(theirs) == plan.launch_count == len(kinds), (len(own), len(theirs))
    assert (clearings, cleared) == (clearings, 1)
    assert clearings > 5, "no sums are shared at batch 1"
    lasting = {t.data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    met = set()
    for one, other, (_, _, addresses) in zip(own, theirs, kinds, strict=True):
        assert one[:6] == other[:6], (one, other)
        assert len(one.parameters) == len(other.parameters) == len(addresses)
        for word, another, is_address in zip(
            one.parameters, other.parameters, addresses, strict=True
        ):
            if is_address and word and word not in lasting:
                assert another != 0
                assert another not in lasting
            else:
                assert word == another, (word, another)
            met.add(word)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {m.running_mean.data_ptr() for m in norms} <= met
    assert {m.weight.data_ptr() for m in convolutions} <= met


def check_launches_are_the_modules_own() -> None:
    _check_records("resnet18")


def check_launches_of_bottlenecks_are_the_modules_own() -> None:
    _check_records("resnet50")


def check_triton_s_plans_start_the_stem() -> None:
    """Triton's backend runs the stem on this kernel; its plan hands it to the driver."""
    with fused_resnet.use_backend("triton"):
        model, x = make_model("resnet18"), draw()
        ((function, sizes, _),) = (one for one in recorded(model, x, cuda_only=True))
        if function not in taken:
            stub.take(function, sizes)
            taken.add(function)
        own, _ = launches_of(lambda: ordinary(model, x))
        planned(model, x)
        (plan,) = plans._of_models[model].by_key.values()
        assert isinstance(plan, triton_plans.Plan), plan
        theirs, _ = launches_of(lambda: plan.run(x))
    assert len(own) == len(theirs) == plan.launch_count > 10
    stem, planned_stem = own[0], theirs[0]
    assert stem.function == function
    assert planned_stem.grid == stem.grid
    assert planned_stem.block == stem.block
    assert planned_stem.shared == stem.shared > 0
    lasting = {t.data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    different = [
        (one, other)
        for one, other in zip(stem.parameters, planned_stem.parameters, strict=True)
        if one != other
    ]
    assert len(different) == 1, "more than the output is elsewhere"
    assert not lasting & set(different[0])
    assert {x.data_ptr(), model.conv1.weight.data_ptr()} <= set(planned_stem.parameters)
    # What follows reads what it wrote.
    assert different[0][1] in {word for one in theirs[1:] for word in one.parameters}


def check_stream_and_memory() -> None:
    model, x = make_model("resnet18"), draw()
    planned(model, x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stub.reset()
        first, second = planned(model, x), planned(model, x)
    assert {one.stream for one in stub.launches()} == {stream.cuda_stream}
    assert first.data_ptr() != second.data_ptr(), "results share memory"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        stub.reset()
        planned(model, x)
        assert len(stub.launches()) == plan_of(model).launch_count


def _best(call: Callable[[], object], times: int = 300) -> float:
    """Seconds of the fastest of many calls."""
    taken = []
    stub.reset(record=False)
    for _ in range(times):
        begun = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begun)
        stub.reset(record=False)
    return min(taken)


def check_host_time() -> None:
    """At batch 1, from the model's call on: at most 0.15 ms of ResNet-18, 0.25 ms of ResNet-50."""
    for name, most in (("resnet18", 0.15e-3), ("resnet50", 0.25e-3)):
        model, x = make_model(name), draw()
        model(x)
        seconds = _best(lambda model=model, x=x: model(x))
        own = _best(lambda model=model, x=x: ordinary(model, x), 30)
        print(f"{name}: {1e6 * seconds:.0f} us planned, {1e6 * own:.0f} us through its modules")
        assert seconds <= most, seconds


def main(results: Path) -> None:
    outcome: dict[str, str | None] = {}
    with fused_resnet.use_backend("cuda"), torch.no_grad():
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                try:
                    check()
                    outcome[name] = None
                except Exception:
                    outcome[name] = traceback.format_exc()
    results.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
