"""Plans of the CUDA backend: a forward pass whose launches are started again by one native call.

On the host, where kernels run: what a plan computes is compared bit by bit with what the modules
launch, and each of its launches with theirs. tests/backends/triton/test_on_stub.py has such plans
on a device whose driver is a stub.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import cuda_on_host
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import _native, backends
from fused_resnet.backends import arranged, cuda, cuda_plans, self_check
from fused_resnet.modules import network, plans
from fused_resnet.testing import randomize_

if not backends.cuda.on_host():
    pytest.skip("runs CUDA kernels on the host", allow_module_level=True)

LAST = torch.channels_last
PARTS = network._RESNET_PARTS
# Of csrc/cuda/conv_tiles.h, 64 x 64.
SMALL_TILE = 4


@pytest.fixture(autouse=True)
def planned_on_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cuda, "plans_on_host", True)
    with fused_resnet.use_backend("cuda"), torch.no_grad():
        yield
    module = cuda_on_host.load()
    module.order_global_accesses(True)
    module.log_launches(False), module.launches()


def make_model(block: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> ResNet:
    """Two stages, the second of which projects; no library kernel at the end."""
    torch.manual_seed(0)
    model = ResNet(block, [1, 1, 1, 1])
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.avgpool, model.fc = nn.Identity(), nn.Identity()
    model = randomize_(model).to(dtype).to(memory_format=memory_format)
    return fused_resnet.fuse(model.eval())


def draw(dtype: torch.dtype, memory_format: torch.memory_format, size: int = 32) -> Tensor:
    return torch.randn(1, 3, size, size).to(dtype).to(memory_format=memory_format)


def ordinary(model: ResNet, x: Tensor) -> Tensor:
    """The pass without a plan."""
    return network._resnet_features(model, x)


def planned(model: ResNet, x: Tensor) -> Tensor:
    """The pass as a model's forward runs it, up to its head."""
    parts = [model._modules[name] for name in PARTS]
    return plans.planned(model, parts, x, network._resnet_features)


def plan_of(model: ResNet) -> Any:
    """The model's only plan, or why there is none."""
    (plan,) = plans._of_models[model].by_key.values()
    return plan


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()])


def launches_of(call: Callable[[], object]) -> list[tuple]:
    module = cuda_on_host.load()
    module.launches()
    module.log_launches(True)
    call()
    module.log_launches(False)
    return module.launches()


def case_of(
    block: Any = Bottleneck,
    dtype: torch.dtype = torch.float16,
    memory_format: torch.memory_format = LAST,
) -> tuple[ResNet, Tensor]:
    """A model that has a plan, and its input."""
    model, x = make_model(block, dtype, memory_format), draw(dtype, memory_format)
    planned(model, x)
    assert isinstance(plan_of(model), cuda_plans.Plan), plan_of(model)
    return model, x


CASES = [
    pytest.param(Bottleneck, torch.float16, LAST, id="bottleneck"),
    pytest.param(BasicBlock, torch.bfloat16, LAST, id="basic_block", marks=pytest.mark.whole),
    pytest.param(BasicBlock, torch.float32, LAST, id="float32"),
    pytest.param(BasicBlock, torch.float16, torch.contiguous_format, id="contiguous"),
]


@pytest.mark.parametrize(("block", "dtype", "memory_format"), CASES)
def test_the_same_bits(block, dtype, memory_format):
    """Of other inputs, with memory that holds NaN, and as often as it runs."""
    model, x = case_of(block, dtype, memory_format)
    plan = plan_of(model)
    for _ in range(2):
        x = draw(dtype, memory_format)
        expected = ordinary(model, x)
        with cuda_on_host.guarded():
            out = plan.run(x)
        assert (out.shape, out.stride(), out.dtype) == (
            expected.shape, expected.stride(), expected.dtype,
        )  # fmt: skip
        assert torch.equal(bits(out), bits(expected))
        assert torch.equal(bits(planned(model, x)), bits(expected))


def test_its_launches_are_the_modules_own():
    """Kernel, grid, block, shared memory, each number, and each tensor that outlives the pass."""
    model, x = case_of()
    plan = plan_of(model)
    own = launches_of(lambda: ordinary(model, x))
    theirs = launches_of(lambda: plan.run(x))
    assert len(own) == len(theirs) == plan.launch_count > 8
    recorder = cuda_plans.Recorder(x, [])
    with recorder:
        ordinary(model, x)
    kinds = list(_words(recorder._numbers))
    lasting = {t.data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    compared = 0
    for one, other, of_one in zip(own, theirs, kinds, strict=True):
        assert one[:5] == other[:5]
        words, others = (_numbers(b"".join(each[5])) for each in (one, other))
        assert len(words) == len(others) == len(of_one)
        for word, another, is_address in zip(words, others, of_one, strict=True):
            if is_address and word not in lasting:
                assert (word == 0) == (another == 0)
                assert another not in lasting
            else:
                assert word == another
                compared += is_address and word != 0
    weights = len([m for m in model.modules() if isinstance(m, nn.Conv2d)])
    assert compared >= 5 * weights + 1  # each with its norm; and the input


def _numbers(data: bytes) -> list[int]:
    return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]


def _words(numbers: list[int]) -> Iterator[list[bool]]:
    """Which words of each launch are addresses, of what csrc/cuda/recording.h writes down."""
    rest = iter(numbers)
    for kind in rest:
        if kind != cuda_plans._LAUNCH:
            next(rest), next(rest)
            continue
        *_, count = (next(rest) for _ in range(7))
        found = []
        for _ in range(count):
            for _ in range(next(rest)):
                found.append(bool(next(rest)))
                next(rest)
        yield found


def test_sums_are_shared_and_cleared_once(monkeypatch):
    """All tickets lie side by side, so that one clearing does, and are nobody else's."""
    seen: list[Any] = []
    lay_out, convolve = cuda_plans.launch_plans.lay_out, cuda._operator()

    def shared(*arguments: Any) -> Tensor:
        *given, _ = arguments
        is_stem = arguments[0].size(1) == 3
        return convolve(*given, [] if is_stem else [SMALL_TILE, 3])

    def watched(parts: Any) -> tuple[int, int]:
        seen[:] = parts
        return lay_out(parts)

    monkeypatch.setattr(cuda_plans.launch_plans, "lay_out", watched)
    monkeypatch.setattr(cuda, "_operator", lambda: shared)
    model, x = case_of()
    with cuda_on_host.guarded():
        assert torch.equal(bits(plan_of(model).run(x)), bits(ordinary(model, x)))
    cleared = [part for part in seen if part.is_cleared]
    assert len(cleared) >= 5, "no sum is shared"
    total, end = lay_out(seen)
    assert end == max(part.at + part.size for part in cleared)
    assert all(part.at >= end for part in seen if not part.is_cleared)
    assert total < sum(part.size for part in seen)
    for one in seen:
        for other in seen:
            together = one.first <= other.last and other.first <= one.last
            if one is not other and (together or one.is_cleared):
                assert one.at + one.size <= other.at or other.at + other.size <= one.at


def test_parameters_are_read_in_every_run():
    model, x = case_of()
    plan = plan_of(model)
    model.layer1[0].conv2.weight.mul_(2)
    model.layer1[0].bn2.running_var.add_(1)
    weight = model.layer2[0].conv1.weight
    weight.data = weight.data.clone(memory_format=LAST)
    assert torch.equal(bits(planned(model, x)), bits(ordinary(model, x)))
    assert plan_of(model) is plan
    assert plan.run(x.to(torch.bfloat16)) is None
    weight.data = weight.data.float()
    assert plan.run(x) is None, "another dtype"


def test_kept_copies_of_weights_are_the_weights_now():
    """A model that is not channels_last: its copies are made anew, and so is the plan."""
    model, x = case_of(memory_format=torch.contiguous_format)
    plan = plan_of(model)
    assert plan.run(x) is not None
    model.layer1[0].conv2.weight.mul_(2)
    assert plan.run(x) is None
    for _ in range(2):
        assert torch.equal(bits(planned(model, x)), bits(ordinary(model, x)))
    assert plan_of(model) is not plan
    arranged.release(model.parameters())
    assert plan_of(model).run(x) is None


def test_what_is_no_plan():
    """Copies, the library's operators, and kernels whose parameters nobody has described."""
    model = make_model(BasicBlock, torch.float16, LAST)
    x = draw(torch.float16, LAST)
    view = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())
    model.conv1.padding = (2, 2)  # no usual stem: its convolution loads element by element
    planned(model, view)
    assert isinstance(plan_of(model), cuda_plans.Plan)
    plans.forget(model)
    model.layer1[0].bn1.eval().running_mean.data = torch.zeros(128).half()[::2]
    planned(model, x)
    assert "copies something" in plan_of(model)
    plans.forget(model)
    model = make_model(BasicBlock, torch.float64, LAST)
    planned(model, draw(torch.float64, LAST))
    assert "it calls aten" in plan_of(model)


def test_passes_in_which_kernels_are_checked(monkeypatch, tmp_path):
    """What that launches is no part of the pass, which is a plan as any other."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setattr(self_check, "_from_environment", "1")
    monkeypatch.setattr(self_check, "everywhere", True)
    monkeypatch.setattr(self_check, "_known", {})
    monkeypatch.setattr(self_check, "settled", {})
    model, x = make_model(BasicBlock, torch.float16, LAST), draw(torch.float16, LAST)
    model.layer2 = nn.Sequential().eval()
    planned(model, x)
    assert self_check._known, "nothing was checked"
    assert all(verdict.passed for verdict in self_check._known.values())
    assert isinstance(plan_of(model), cuda_plans.Plan), plan_of(model)
    assert plan_of(model).launch_count == len(launches_of(lambda: ordinary(model, x)))


def test_a_wrong_plan_is_seen(monkeypatch, recwarn):
    """Parts of the workspace that lie upon each other give other bits, and no plan."""
    lay_out = cuda_plans.launch_plans.lay_out

    def together(parts: Any) -> tuple[int, int]:
        total, cleared = lay_out(parts)
        for part in parts:
            part.at = part.at if part.is_cleared else -(-cleared // 512) * 512
        return total + max(part.size for part in parts), cleared

    monkeypatch.setattr(cuda_plans.launch_plans, "lay_out", together)
    model, x = make_model(Bottleneck, torch.float16, LAST), draw(torch.float16, LAST)
    expected = ordinary(model, x)
    with pytest.raises(RuntimeError, match="cuda_on_host: race"):
        planned(model, x)
    cuda_on_host.load().order_global_accesses(False)  # as on a GPU, where nobody says so
    assert torch.equal(bits(planned(model, x)), bits(expected))
    assert "differed" in plan_of(model)
    assert "differs from the pass it was made of" in str(recwarn.pop(UserWarning).message)


def test_operators_say_what_is_wrong():
    operators = _native.cuda_operators
    x = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="nothing is recorded on this thread"):
        operators.end_cuda_recording()
    with pytest.raises(ValueError, match="workspace must be bytes"):
        operators.make_cuda_plan(x, [], [], [], [8, 16], [1], [1])
    with pytest.raises(ValueError, match="no parameter 1 among 1"):
        operators.make_cuda_plan(x, [x], [1], [], [0, 0], [1], [1])
    plan = operators.make_cuda_plan(x, [], [], [], [0, 0], [2, 3], [3, 1])
    assert operators.run_cuda_plan(plan, x.half()) is None
    operators.free_cuda_plan(plan)
    with pytest.raises(ValueError, match="there is no plan"):
        operators.run_cuda_plan(plan, x)
