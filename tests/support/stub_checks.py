"""What test_on_stub.py runs in a process whose CUDA device is a stub: `python stub_checks.py FILE`.

Each function whose name begins with `check_` runs, and FILE becomes a JSON object of their names,
each with the error that it raised, or null.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import json
import re
import sys
import threading
import time
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from cuda_stub import Launch, Stub
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import Bottleneck, ResNet
from triton import compiler as triton_compiler
from triton import knobs
from triton.compiler import compiler

import fused_resnet
from fused_resnet import tuning
from fused_resnet.backends import arranged, launch_plans, triton
from fused_resnet.backends.triton import (
    ahead,
    bottleneck,
    chains,
    conv_kernels,
    folded,
    inference,
    launch,
    training,
    training_conv,
)
from fused_resnet.backends.triton import plans as triton_plans
from fused_resnet.layers import watch
from fused_resnet.layers.description import ConvNorm, Norm
from fused_resnet.measure.tune import cases, race
from fused_resnet.modules import graphs, network, plans
from fused_resnet.tuning import training as training_choice
from fused_resnet.tuning.choice import CONVOLUTIONS, Choice, Tile
from fused_resnet.tuning.problem import ChainProblem

stub = Stub()


def make_model(memory_format: torch.memory_format = torch.channels_last) -> ResNet:
    """Two stages of three Bottlenecks, one of them in one launch; no library kernel at the end."""
    torch.manual_seed(0)
    model = ResNet(Bottleneck, [2, 1, 1, 1]).half().to(memory_format=memory_format)
    model.layer3, model.layer4 = nn.Sequential(), nn.Sequential()
    model.avgpool, model.fc = nn.Identity(), nn.Identity()
    return fused_resnet.fuse(model.eval()).cuda()


def draw(*shape: int) -> Tensor:
    x = torch.randn(shape or (2, 3, 64, 64)).half()
    return x.to(memory_format=torch.channels_last).cuda()


model, x = make_model(), draw()
runs: list[Any] = []  # every plan that ran, in order
_run = triton_plans.Plan.run


def _counted(plan: Any, input: Tensor) -> Tensor | None:
    out = _run(plan, input)
    runs.append((plan, out is not None))
    return out


triton_plans.Plan.run = _counted
_gives = plans._gives


def _gives_on_stub(plan: Any, x: Tensor, out: Tensor) -> bool:
    """Nothing was computed, so no bits can be compared; the rest of `_gives` runs."""
    again = plan.run(x)
    return again.shape == out.shape and again.stride() == out.stride()


plans._gives = _gives_on_stub


def planned(call: Callable[[], Any]) -> bool:
    """Whether a call was a plan's run and nothing else."""
    runs.clear()
    stub.reset()
    call()
    return [done for _, done in runs] == [True] and len(stub.launches()) == runs[0][0].launch_count


def settled() -> None:
    """Makes a plan for `x`, which then runs."""
    plans.forget(model)
    with torch.no_grad():
        model(x)
        assert planned(lambda: model(x)), [*plans._of_models[model].by_key.values()]


# ---- The launches ----


class Names:
    """The names of a pass's pointer arguments, seen as `launch.recorder`."""

    def __init__(self) -> None:
        self.of_launches: list[list[str | None]] = []
        self.kept: dict[int, str] = {}

    def add(self, kernel: Any, compiled: Any, grid: Any, arguments: Any, constants: Any) -> None:
        """One launch: None for what is no pointer."""
        kinds = [(n, compiled.src.signature[n]) for n in kernel.arg_names]
        names = [n if k.startswith("*") else None for n, k in kinds if k != "constexpr"]
        self.of_launches.append([*names, None, None])  # Triton's scratch

    def add_rows(self, weight: Tensor, rows: Tensor) -> None:
        """What a launch reads instead of a weight."""

    def add_kept(self, tensor: Tensor, *_: Any) -> None:
        """What a launch reads that was made of parameters."""
        self.kept[tensor.data_ptr()] = "kept"


def followed(
    launches: list[Launch],
    names: list[list[str | None]],
    moved: list[launch.Launch],
    tensors: dict[int, str],
    output: int,
) -> list[tuple]:
    """Launches with an origin for each address: a tensor, or the launch that wrote what is there.

    Raises:
        AssertionError: something reads what was overwritten in part, or never written.
    """
    memory: list[tuple[int, int, str]] = []  # first byte, end, and who wrote it
    described = []
    for index, (one, of_one, sizes) in enumerate(zip(launches, names, moved, strict=True)):
        assert len(one.parameters) == len(of_one), (len(one.parameters), of_one)
        parameters: list[Any] = []
        for name, value in zip(of_one, one.parameters, strict=True):
            if name is None or sizes.reads.get(name) == 0:  # given, but left to a later launch
                parameters.append(name or value)
            elif name in sizes.writes:
                parameters.append(f"{name}{' -> result' if value == output else ''}")
            elif value in tensors:
                parameters.append(tensors[value])
            else:
                there = [part for part in memory if part[0] <= value < part[1]]
                assert there, f"{name} of launch {index} reads what nothing wrote"
                parameters.append(there[0][2])
        for name, value in zip(of_one, one.parameters, strict=True):
            if name in sizes.writes:
                end = value + sizes.writes[name]
                read = [
                    address
                    for other, address in zip(of_one, one.parameters, strict=True)
                    if other is not None and sizes.reads.get(other) and value <= address < end
                ]
                assert not read, f"launch {index} writes {name} where it reads"
                memory = [part for part in memory if part[1] <= value or end <= part[0]]
                memory.append((value, end, f"{index}.{name}"))
        described.append((one.function, *one[2:6], tuple(parameters)))
    return described


def origins(pass_: Callable[[], Tensor], names: Names, moved: list[launch.Launch]) -> list[tuple]:
    """`followed` of what a pass launches."""
    tensors = {t.data_ptr(): n for n, t in [*model.named_parameters(), *model.named_buffers()]}
    tensors |= names.kept | {x.data_ptr(): "input"}
    stub.reset()
    output = pass_().data_ptr()
    return followed(stub.launches(), names.of_launches, moved, tensors, output)


@torch.inference_mode()
def triton_s_own() -> tuple[list[tuple], Names, list[launch.Launch]]:
    """Of an ordinary pass, and what it calls its arguments."""
    names = Names()
    token = launch.recorder.set(names)
    with launch.logged() as moved:
        network._resnet_features(model, x)
    launch.recorder.reset(token)
    return origins(lambda: network._resnet_features(model, x), names, moved), names, moved


def check_launches_are_triton_s_own() -> None:
    """Kernel, grid, block, shared memory, attributes, numbers, and where each address leads."""
    settled()
    its, *called = triton_s_own()
    assert len(its) >= 10, len(its)
    assert any(attributes for *_, attributes, _ in its), "no launch overlaps another"
    with torch.inference_mode():
        ours = origins(lambda: plans.planned(model, parts(), x, network._resnet_features), *called)
        assert runs[-1][1]
        assert len(stub.launches()) == runs[-1][0].launch_count
        own, again = network._resnet_features(model, x), runs[-1][0].run(x)
    for one, other in zip(ours, its, strict=True):
        assert one == other, (one, other)
    assert "output_ptr -> result" in ours[-1][-1], ours[-1]
    assert (again.shape, again.stride(), again.dtype) == (own.shape, own.stride(), own.dtype)


def check_a_wrong_plan_would_be_seen() -> None:
    """Parts of the workspace that lie upon each other do not pass for Triton's own launches."""
    lay_out = launch_plans.lay_out

    def together(parts: Any) -> tuple[int, int]:
        lay_out(parts)
        for part in parts:
            part.at = 0
        return max(part.size for part in parts), 0

    its, *called = triton_s_own()
    with _set(launch_plans, "lay_out", together):
        settled()

    def compared() -> None:
        ours = origins(lambda: plans.planned(model, parts(), x, network._resnet_features), *called)
        assert ours == its, "differs"

    seen = r"where it reads|nothing wrote|differs"
    with torch.inference_mode(), pytest.raises(AssertionError, match=seen):
        compared()
    plans.forget(model)


def check_stream_and_memory() -> None:
    settled()
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        first = plans.planned(model, parts(), x, None)
        count = runs[-1][0].launch_count
        assert {one.stream for one in stub.launches()[-count:]} == {stream.cuda_stream}
        second = plans.planned(model, parts(), x, None)
    assert first.data_ptr() != second.data_ptr(), "results share memory"


def parts() -> list[nn.Module]:
    return [model._modules[name] for name in network._RESNET_PARTS]


def check_threads() -> None:
    """Each gets the launches of its own call, in order."""
    settled()
    stub.reset()
    with torch.inference_mode():
        model(x)
    expected = [one.function for one in stub.launches()]
    stub.reset()
    streams = [torch.cuda.Stream() for _ in range(4)]
    failed: list[BaseException] = []

    def work(stream: torch.cuda.Stream) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(stream):
                for _ in range(20):
                    model(x)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed
    for stream in streams:
        own = [one for one in stub.launches() if one.stream == stream.cuda_stream]
        assert [one.function for one in own] == expected * 20


def check_error_names_the_launch() -> None:
    settled()
    stub.fail(700)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"launch 1 of \d+: CUDA error 700"),
    ):
        model(x)
    stub.fail(0)


# ---- When there is a plan, and when a plan is used ----


def check_parameters_are_read_in_every_run() -> None:
    settled()
    weight = model.layer1[0].conv2.weight
    with torch.inference_mode(False), torch.no_grad():
        weight.mul_(2)
        assert planned(lambda: model(x)), "values changed in place"
        old = weight.data_ptr()
        weight.data = weight.data.clone()
        assert weight.data_ptr() != old
        assert planned(lambda: model(x)), "other memory"
        addresses = {value for one in stub.launches() for value in one.parameters}
        assert weight.data_ptr() in addresses
        assert old not in addresses
        weight.data = weight.data.contiguous()
        assert not planned(lambda: model(x)), "other strides"
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    settled()


def check_replaced_parameter() -> None:
    settled()
    conv = model.layer1[0].conv2
    conv.weight = nn.Parameter(conv.weight.detach().clone())
    with torch.no_grad():
        assert not planned(lambda: model(x))
        assert planned(lambda: model(x))
    assert conv.weight.data_ptr() in {v for one in stub.launches() for v in one.parameters}


@contextlib.contextmanager
def _set(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _own_forward(module: nn.Module) -> Iterator[None]:
    module.forward = type(module).forward.__get__(module)
    try:
        yield
    finally:
        del module.forward


def _nothing(*_: Any) -> None:
    pass


def _changes() -> dict[str, Callable[[], Any]]:
    """What a plan does not know of, each as a context that ends as it began."""
    block = model.layer1[1]
    register = nn.modules.module.register_module_forward_hook
    return {
        "a norm's hook": lambda: _hook(block.bn2.register_forward_hook(_nothing)),
        "a ReLU's hook": lambda: _hook(block.relu.register_forward_pre_hook(_nothing)),
        "a block's hook": lambda: _hook(block.register_forward_hook(_nothing)),
        "a stage's hook": lambda: _hook(model.layer1.register_forward_hook(_nothing)),
        "a projection's hook": lambda: _hook(
            model.layer1[0].downsample.register_forward_hook(_nothing)
        ),
        "a global hook": lambda: _hook(register(_nothing)),
        "a backward hook": lambda: _hook(block.conv1.register_full_backward_hook(_nothing)),
        "a forward of its own": lambda: _own_forward(block.conv3),
        "training": lambda: _mode(model),
        "a norm in training": lambda: _mode(block.bn1),
        "another stride": lambda: _set(model.layer2[0].conv2, "stride", (1, 1)),
        "another eps": lambda: _set(block.bn1, "eps", 1e-3),
        "another module": lambda: _set(block, "bn3", copy.deepcopy(block.bn3)),
        "another class": lambda: _set(block.bn3, "__class__", _OtherNorm),
        "a function replaced": lambda: _set(F, "conv2d", _conv2d),
        "autocast": lambda: torch.autocast("cuda"),
        "gradients": torch.enable_grad,
        "a mode": lambda: FlopCounterMode(display=False),
        "another backend": lambda: fused_resnet.use_backend("reference"),
        "a log": launch.logged,
        "a hook of Triton's": _triton_hook,
    }


class _OtherNorm(nn.BatchNorm2d):
    pass


def _conv2d(*arguments: Any, **keywords: Any) -> Tensor:
    return torch.conv2d(*arguments, **keywords)


@contextlib.contextmanager
def _mode(module: nn.Module) -> Iterator[None]:
    module.train()
    try:
        yield
    finally:
        module.eval()


@contextlib.contextmanager
def _triton_hook() -> Iterator[None]:
    hooks = knobs.runtime.launch_enter_hook
    hooks.add(_nothing)
    try:
        yield
    finally:
        hooks.remove(_nothing)


def check_changes() -> None:
    """Where something is not as it was, the modules decide what runs."""
    for what, context in _changes().items():
        settled()
        with torch.no_grad(), context():
            asked: list[Tensor] = []

            def ordinary(_: nn.Module, input: Tensor, asked: list[Tensor] = asked) -> Tensor:
                asked.append(input)
                return input

            runs.clear()
            with (
                _set(network, "_resnet_features", ordinary),
                _set(network, "run_unfused", _unfused(asked)),
            ):
                model(x)
            assert (len(asked), runs) == (1, []), what
    settled()


def _unfused(asked: list[Tensor]) -> Callable[..., Tensor]:
    def run_unfused(_: nn.Module, input: Tensor, method: str = "forward") -> Tensor:
        asked.append(input)
        return input

    return run_unfused


def check_inputs() -> None:
    settled()
    with torch.inference_mode():
        other = draw(3, 3, 64, 64)
        assert not planned(lambda: model(other))
        assert planned(lambda: model(other))
        assert planned(lambda: model(x))
        other = x.contiguous()  # which a launch of the plan copies
        assert not planned(lambda: model(other))
        assert planned(lambda: model(other))
        # At an odd address, for which other kernels were compiled.
        memory = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
        odd = memory[1:].as_strided(x.shape, x.stride())
        assert odd.data_ptr() % 16 != 0
        assert not planned(lambda: model(odd))
        assert planned(lambda: model(odd))
        assert planned(lambda: model(x))


def check_capture() -> None:
    """What is captured may be a plan's launches, but no plan is made there."""
    settled()
    other = draw(3, 3, 64, 64)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        model(draw(3, 3, 64, 64)), plans.forget(model)
        with torch.cuda.graph(graph):
            assert not planned(lambda: model(other))
            assert not planned(lambda: model(other))
        assert not planned(lambda: model(other))
        assert planned(lambda: model(other))
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            assert planned(lambda: model(other))
        assert {one.stream for one in stub.launches()} != {0}


# ---- What the launches of a pass share ----


def kept_of(net: ResNet) -> folded._Kept:
    """What is kept for the norms of a model's blocks."""
    return folded._kept[id(net.layer1[0].bn1.running_mean)]


def rows_of(net: ResNet) -> folded.Rows:
    """Those that were made last."""
    return [*kept_of(net).rows.values()][-1]


@torch.no_grad()
def check_sums_and_norms_take_one_launch() -> None:
    """Instead of one for each shared sum; no launch reads a norm's parameters but that one."""
    with launch.logged() as log:
        network._resnet_features(model, x)
    with launch.logged() as alone, _set(chains, "together", lambda *_: contextlib.nullcontext()):
        network._resnet_features(model, x)
    kernels = [one.kernel for one in log]
    sums = [one.kernel for one in alone].count("sum_partials_kernel")
    assert sums >= 1, [one.kernel for one in alone]
    assert "sum_partials_kernel" not in kernels
    assert kernels.count("fold_norms_kernel") == 1
    assert len(kernels) == len(alone) - sums + 1, (kernels, len(alone))
    settled()
    with torch.inference_mode():
        assert planned(lambda: model(x))
    launches = stub.launches()
    place = kernels.index("fold_norms_kernel")
    norms = [
        tensor.data_ptr()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.dim() == 1 and name.startswith("layer")
    ]
    later = {value for one in launches[place:] for value in one.parameters}
    # Its one norm says what dtype the others have.
    assert later & set(norms) == {model.layer1[0].bn1.running_mean.data_ptr()}
    rows = rows_of(model).values.cpu()
    assert set(norms) <= set(rows[:, :4].flatten().tolist())


@torch.no_grad()
def check_launches_of_whole_networks() -> None:
    """At batch 1, none of which happens: what is compiled for them takes long."""
    images = draw(1, 3, 224, 224)
    counts = {}
    for make in (torchvision.models.resnet18, torchvision.models.resnet50):
        net = fused_resnet.fuse(make().half().to(memory_format=torch.channels_last).eval().cuda())
        for together in (True, False):
            with contextlib.ExitStack() as stack:
                if not together:
                    alone = lambda *_: contextlib.nullcontext()  # noqa: E731
                    stack.enter_context(_set(chains, "together", alone))
                log = stack.enter_context(launch.logged(run=False))
                network._resnet_features(net, images)
            kernels = [one.kernel for one in log]
            counts[make.__name__, together] = len(kernels), kernels.count("sum_partials_kernel")
    for name in ("resnet18", "resnet50"):
        (few, none), (many, sums) = counts[name, True], counts[name, False]
        assert none == 0, counts
        assert few == many - sums + 1, counts
    assert counts["resnet50", False] == (74, 28), counts
    assert counts["resnet50", True] == (47, 0), counts


@torch.no_grad()
def check_norms_that_move_are_found_again() -> None:
    """The addresses that a plan reads from the device are those of now, or it is not used."""
    net = make_model()
    net(x)
    assert planned(lambda: net(x))
    norm = net.layer1[0].bn2
    norm.running_var.mul_(2)
    assert planned(lambda: net(x)), "values changed in place"
    norm.running_var.data = norm.running_var.data.clone()
    assert not planned(lambda: net(x)), "another address"
    assert planned(lambda: net(x))
    rows = rows_of(net)
    assert norm.running_var.data_ptr() in rows.values.cpu().flatten().tolist()
    norm.weight.data = norm.weight.data[:1].expand(norm.num_features)
    assert not planned(lambda: net(x)), "other strides, where nothing else is different"


@torch.no_grad()
def check_addresses_go_with_their_parameters() -> None:
    """Whatever a pass and its plan have kept of them."""

    def run() -> tuple[int, weakref.ref[Tensor]]:
        net = make_model()
        net(x)
        assert planned(lambda: net(x))
        runs.clear()
        return id(net.layer1[0].bn1.running_mean), weakref.ref(rows_of(net).values)

    name, values = run()
    gc.collect()
    assert name not in folded._kept
    assert values() is None


@torch.no_grad()
def check_addresses_that_a_graph_reads_are_kept() -> None:
    """A graph of a caller's own may be replayed when the parameters have moved."""
    net = make_model()
    net(x), net(x)
    kept, rows = kept_of(net), rows_of(net)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert planned(lambda: net(x))
    assert any(values is rows.values for values in kept.captured)
    kept.captured.clear()
    plans.forget(net)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        with launch.logged() as log:
            network._resnet_features(net, x)
        assert "fold_norms_kernel" in [one.kernel for one in log]
    assert rows_of(net) is rows
    assert any(values is rows.values for values in kept.captured)
    net.layer1[0].bn1.weight.data = net.layer1[0].bn1.weight.data.clone()
    net(x)
    assert rows_of(net).values is not rows.values
    assert any(values is rows.values for values in kept_of(net).captured)


@torch.no_grad()
def check_addresses_stay_for_streams_that_read_them() -> None:
    """Their memory is not given away before another stream than that of their making is done."""
    net = make_model()
    recorded: list[tuple[Tensor, torch.cuda.Stream]] = []
    record = Tensor.record_stream
    stream = torch.cuda.Stream()
    with _set(Tensor, "record_stream", lambda t, s: recorded.append((t, s)) or record(t, s)):
        network._resnet_features(net, x)
        values = rows_of(net).values
        assert not recorded, "it is of this stream"
        with torch.cuda.stream(stream):
            network._resnet_features(net, x)
        assert [(t is values, s) for t, s in recorded] == [(True, stream)]
        recorded.clear()
        net(x), net(x)
        assert not recorded
        with torch.cuda.stream(stream):
            assert planned(lambda: net(x))
        assert [(t is values, s) for t, s in recorded] == [(True, stream)]


@torch.no_grad()
def check_norms_that_move_often_are_not_shared() -> None:
    """No more is kept of them than of a few places, and the pass runs without."""
    net = make_model()

    def shares() -> bool:
        with launch.logged() as log:
            network._resnet_features(net, x)
        kernels = [one.kernel for one in log]
        assert ("fold_norms_kernel" in kernels) != ("sum_partials_kernel" in kernels), kernels
        return "fold_norms_kernel" in kernels

    old: list[nn.Parameter] = []
    with _set(folded, "_MOST_MADE", 3):
        for _ in range(3):
            assert shares()
            # Another parameter is another list, beside those that there are.
            old.append(net.layer1[0].bn2.weight)
            net.layer1[0].bn2.weight = nn.Parameter(old[-1].detach().clone())
        assert not shares()
        assert len(kept_of(net).rows) == 3
        net.layer1[0].bn2.weight = old[0]
        assert shares(), "where rows are, they are used"


# ---- Models that are not channels_last ----


def contiguous_model() -> tuple[ResNet, Tensor]:
    """Such a model and input; what has a head that may not be planned is copied back by torch."""
    return make_model(torch.contiguous_format), x.contiguous()


def convolutions_to_arrange(net: ResNet) -> list[Tensor]:
    return [m.weight for m in net.modules() if isinstance(m, nn.Conv2d) and m.kernel_size > (1, 1)]


@torch.no_grad()
def check_contiguous_models_copy_once() -> None:
    """One launch for the input, one copy of each weight in the first pass, of the output none."""
    net, images = contiguous_model()
    plans.forget(net)
    before = stub.runtime_launches()
    with launch.logged() as log:
        network._resnet_features(net, images)
    weights = convolutions_to_arrange(net)
    assert stub.runtime_launches() - before == len(weights) == 4
    before = stub.runtime_launches()
    with launch.logged() as again:
        out = network._resnet_features(net, images)
    assert stub.runtime_launches() == before, "something was copied by torch"
    kernels = [one.kernel for one in again]
    assert kernels == [one.kernel for one in log]
    assert kernels[0] == "channels_last_kernel"
    assert kernels.count("channels_last_kernel") == 1
    with launch.logged() as usual:
        network._resnet_features(model, x)
    assert kernels[1:] == [one.kernel for one in usual]
    assert out.is_contiguous(memory_format=torch.channels_last)


def check_contiguous_models_are_planned() -> None:
    """Launched as Triton would, each copy read where it lies, until a weight changes."""
    net, images = contiguous_model()
    with torch.no_grad():
        assert not planned(lambda: net(images))
        assert planned(lambda: net(images)), [*plans._of_models[net].by_key.values()]
        expected = stub.launches()
        stub.reset()
        with launch.logged():
            net(images)
        own = stub.launches()
        assert [one[:1] + one[2:6] for one in expected] == [one[:1] + one[2:6] for one in own]
        weights = convolutions_to_arrange(net)
        kept = {arranged.rows_of(weight).data_ptr() for weight in weights}
        read = {value for one in expected for value in one.parameters}
        assert kept <= read
        assert not {weight.data_ptr() for weight in weights} & read
        assert images.data_ptr() in expected[0].parameters
        weights[1].mul_(2)
        assert not planned(lambda: net(images)), "a weight has changed"
        assert planned(lambda: net(images))
        again = {value for one in stub.launches() for value in one.parameters}
        assert {arranged.rows_of(weight).data_ptr() for weight in weights} <= again
        weights[2].data = weights[2].data.clone()
        assert not planned(lambda: net(images)), "a weight has moved"
        assert planned(lambda: net(images))
        arranged.release(weights)
        assert not planned(lambda: net(images)), "the copies are gone"
        assert planned(lambda: net(images))
        for weight in weights:  # as `fuse` would for a model with watch="full"
            arranged.release([weight])
        with _set(watch, "is_watched", lambda weight: True):
            for _ in range(3):
                assert not planned(lambda: net(images)), "watched weights are copied in every pass"


def check_contiguous_models_in_a_capture() -> None:
    """The graph holds the copying of weights, and the plan is there afterwards."""
    net, images = contiguous_model()
    with torch.inference_mode():
        assert [planned(lambda: net(images)) for _ in range(2)] == [False, True]
        weights = convolutions_to_arrange(net)
        with torch.inference_mode(False):
            kept = {arranged.rows_of(weight).data_ptr() for weight in weights}
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            before = stub.runtime_launches()
            assert not planned(lambda: net(images))
            assert stub.runtime_launches() - before >= len(weights)
            read = {value for one in stub.launches() for value in one.parameters}
            assert not read & kept
        assert planned(lambda: net(images))


def check_copies_of_weights_are_waited_for() -> None:
    """A stream that did not make a copy waits for it, and its memory is not given away."""
    weight = torch.randn(64, 64, 3, 3).half().cuda()
    rows = arranged.rows_of(weight)
    waited, kept = [], []
    wait, record = torch.cuda.Stream.wait_event, Tensor.record_stream
    stream = torch.cuda.Stream()
    with (
        _set(torch.cuda.Stream, "wait_event", lambda s, e: waited.append(s) or wait(s, e)),
        _set(Tensor, "record_stream", lambda t, s: kept.append((t, s)) or record(t, s)),
    ):
        assert arranged.rows_of(weight) is rows
        assert arranged.is_kept(weight, rows)
        assert not waited
        with torch.cuda.stream(stream):
            assert arranged.rows_of(weight) is rows
            assert arranged.is_kept(weight, rows)
    assert waited == [stream] * 2
    assert [(id(t), s) for t, s in kept] == [(id(rows), stream)] * 2


def check_captured_weights_are_arranged_in_the_graph() -> None:
    """A kept copy would stay what it was, and its memory need not stay at all."""
    weight = torch.randn(64, 64, 3, 3).half().cuda()
    kept = arranged.rows_of(weight)
    assert arranged.rows_of(weight) is kept
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        before = stub.runtime_launches()
        copy = arranged.rows_of(weight)
        assert copy is not kept
        assert copy.data_ptr() != kept.data_ptr()
        assert stub.runtime_launches() == before + 1, "it is not copied in the graph"
    assert arranged.rows_of(weight) is kept


def check_reloaded_tables() -> None:
    settled()
    tuning.reload()
    with torch.inference_mode():
        assert not planned(lambda: model(x))
        assert planned(lambda: model(x))


def check_functional_call() -> None:
    settled()
    others = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        stub.reset()
        torch.func.functional_call(model, others, (x,))
        addresses = {value for one in stub.launches() for value in one.parameters}
        assert others["layer1.0.conv1.weight"].data_ptr() in addresses
        assert model.layer1[0].conv1.weight.data_ptr() not in addresses
        model(x)
        assert planned(lambda: model(x))


def check_models_are_freed() -> None:
    short = make_model()
    with torch.inference_mode():
        short(x), short(x)
    plan = weakref.ref(next(iter(plans._of_models[short].by_key.values())))
    weight = weakref.ref(short.layer1[0].conv1.weight)
    assert plan() is not None
    runs.clear()
    del short
    gc.collect()
    assert plan() is None
    assert weight() is None


def check_copies_have_their_own() -> None:
    settled()
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        assert not planned(lambda: twin(x))
        assert planned(lambda: twin(x))
    addresses = {value for one in stub.launches() for value in one.parameters}
    assert twin.conv1.weight.data_ptr() in addresses
    assert model.conv1.weight.data_ptr() not in addresses


def check_a_plan_that_differs_is_not_used() -> None:
    plans.forget(model)
    plans._gives = lambda *_: False
    try:
        with warnings.catch_warnings(record=True) as caught, torch.inference_mode():
            warnings.simplefilter("always")
            model(x)
            for _ in range(2):
                assert not planned(lambda: model(x))
        assert len([w for w in caught if "launched from its plan" in str(w.message)]) == 1
    finally:
        plans._gives = _gives_on_stub
        plans.forget(model)


def check_not_where_switched_off() -> None:
    plans.forget(model)
    enabled, plans.enabled = plans.enabled, lambda: False
    try:
        with torch.inference_mode():
            for _ in range(3):
                assert not planned(lambda: model(x))
    finally:
        plans.enabled = enabled


def check_models_that_change_in_every_pass() -> None:
    plans.forget(model)
    with torch.inference_mode():
        for count in range(20):
            model.layer1[0].seen = count
            model(x)
        runs.clear()
        model.layer1[0].seen = -1
        model(x)
        assert not runs, "still recorded"
    del model.layer1[0].seen
    plans.forget(model)


# ---- CUDA graphs ----


def graphed() -> tuple[ResNet, Callable[[Tensor], str]]:
    """A model with `cuda_graphs`, and what calls it and says how it ran."""
    net = make_model()
    fused_resnet.fuse(net, cuda_graphs=True)

    def call(input: Tensor) -> str:
        before, captures = stub.graph_launches(), stub.captures()
        stub.reset()
        net(input)
        if stub.graph_launches() == before:
            assert stub.captures() == captures
            return "ordinary"
        assert stub.graph_launches() == before + 1
        if stub.captures() == captures:
            assert not stub.launches(), "a replay launches"
            return "replay"
        return "capture"

    return net, call


@torch.no_grad()
def check_graphs_are_captured_and_replayed() -> None:
    net, call = graphed()
    assert [call(x) for _ in range(4)] == ["ordinary", "capture", "replay", "replay"]
    first, second = net(x), net(x)
    graph = next(iter(graphs._of_models[net].by_key.values()))
    memory = {t.untyped_storage().data_ptr() for t in (first, second, graph.output)}
    assert len(memory) == 3, "results share memory"
    assert (first.shape, first.stride()) == (graph.output.shape, graph.output.stride())
    with torch.inference_mode():
        assert call(x) == "replay"
        assert net(x).is_inference()
    assert not net(x).is_inference()
    # Its own memory, for its own stream.
    with torch.cuda.stream(torch.cuda.Stream()):
        assert [call(x) for _ in range(3)] == ["ordinary", "capture", "replay"]
    assert call(x) == "replay"


@torch.no_grad()
def check_graphs_read_the_input_and_write_the_output() -> None:
    """What is captured reads the graph's own input, and what it wrote is copied out."""
    net, call = graphed()
    call(x)
    stub.reset()
    net(x)
    graph = next(iter(graphs._of_models[net].by_key.values()))
    addresses = {value for one in stub.launches() for value in one.parameters}
    assert graph.input.data_ptr() in addresses
    assert graph.output.data_ptr() in addresses
    assert x.data_ptr() not in addresses
    # On the stub no kernel runs, but copies do.
    x.fill_(0), graph.output.copy_(torch.randn(graph.output.shape).half())
    other = draw()
    out = net(other)
    assert torch.equal(graph.input.cpu(), other.cpu())
    assert torch.equal(out.cpu(), graph.output.cpu())


@torch.no_grad()
def check_graphs_follow_parameters() -> None:
    net, call = graphed()
    weight = net.layer1[0].conv2.weight
    assert [call(x) for _ in range(3)] == ["ordinary", "capture", "replay"]
    weight.mul_(2)
    assert call(x) == "replay", "values in place"
    weight.data = weight.data.clone()
    assert [call(x) for _ in range(2)] == ["capture", "replay"], "other memory"
    net.layer1[0].conv2.weight = nn.Parameter(weight.detach().clone())
    assert [call(x) for _ in range(3)] == ["ordinary", "capture", "replay"], "another parameter"


@torch.no_grad()
def check_graphs_are_bounded_and_freed() -> None:
    net, call = graphed()
    # Shapes that other checks have compiled kernels for.
    images = [x, draw(3, 3, 64, 64), draw(4, 3, 64, 64)]
    with _set(graphs, "MOST_GRAPHS", 2):
        for image in images:
            assert [call(image) for _ in range(3)] == ["ordinary", "capture", "replay"]
            assert len(graphs._of_models[net].by_key) <= 2
        assert call(images[0]) == "ordinary", "the oldest went first"
        assert call(image) == "replay"
    freed = stub.freed_graphs()
    net.train()
    assert stub.freed_graphs() - freed == 1
    net.eval()
    assert [call(image) for _ in range(3)] == ["ordinary", "capture", "replay"]
    freed, weight = stub.freed_graphs(), weakref.ref(net.layer1[0].conv1.weight)
    runs.clear()
    del net, call
    gc.collect()
    assert stub.freed_graphs() == freed + 1
    assert weight() is None


@torch.no_grad()
def check_graphs_are_left_alone_where_something_is_seen() -> None:
    net, call = graphed()
    global model
    before, model = model, net
    try:
        for what, context in _changes().items():
            net.train(), net.eval()
            assert [call(x) for _ in range(3)] == ["ordinary", "capture", "replay"], what
            asked: list[Tensor] = []

            def ordinary(_: nn.Module, input: Tensor, asked: list[Tensor] = asked) -> Tensor:
                asked.append(input)
                return input

            launched = stub.graph_launches()
            with (
                _set(network, "_resnet", ordinary),
                _set(network, "run_unfused", _unfused(asked)),
                context(),
            ):
                net(x)
            assert (len(asked), stub.graph_launches()) == (1, launched), what
    finally:
        model = before


@torch.no_grad()
def check_graphs_of_usual_heads() -> None:
    """Dropout is idle in inference; a module that nobody knows may do anything."""
    net, call = graphed()
    net.fc = nn.Sequential(nn.Dropout(), nn.Identity()).eval()
    assert [call(x) for _ in range(3)] == ["ordinary", "capture", "replay"]
    net.fc = nn.Sequential(_OtherNorm(1), nn.Identity()).eval()
    net.fc[0].forward = lambda input: input
    assert [call(x) for _ in range(3)] == ["ordinary"] * 3


@torch.no_grad()
def check_graphs_in_a_graph() -> None:
    """Whoever captures a pass gets its launches, not a replay."""
    net, call = graphed()
    assert [call(x) for _ in range(3)] == ["ordinary", "capture", "replay"]
    launched = stub.graph_launches()
    stub.reset()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        net(x)
    assert stub.launches()
    assert stub.graph_launches() == launched


@torch.no_grad()
def check_what_cannot_be_captured_runs_without() -> None:
    net, _ = graphed()
    calls = []

    def compute(_: nn.Module, input: Tensor) -> Tensor:
        calls.append(torch.cuda.is_current_stream_capturing())
        if calls[-1]:
            raise RuntimeError("operation not permitted when stream is capturing")
        return input

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            assert graphs.captured(net, x, compute) is x
    assert calls == [False, True, False, False, False]
    assert len([w for w in caught if "no CUDA graph" in str(w.message)]) == 1


def check_graphs_are_asked_for() -> None:
    with pytest.raises(ValueError, match="cuda_graphs is True, must be False"):
        fused_resnet.fuse(nn.Sequential(Bottleneck(64, 16)), cuda_graphs=True)
    net, call = graphed()
    with torch.no_grad():
        twin = copy.deepcopy(net)
        assert twin.cuda_graphs
        assert [call(x) for _ in range(2)] == ["ordinary", "capture"]
        fused_resnet.fuse(net)
        assert not net.cuda_graphs
        assert [call(x) for _ in range(4)] == ["ordinary"] * 4
    fused_resnet.fuse(net, cuda_graphs=True)
    fused_resnet.unfuse(net)
    assert "cuda_graphs" not in vars(net)


# ---- How kernels are timed ----


def check_timer_queues_in_one_step() -> None:
    """Graphs are replayed; what cannot be captured waits behind a kernel that spins."""
    timer = race.EventTimer(torch.device("cuda", 0), 1 << 20)
    graphs = stub.graph_launches()
    seen: dict[str, list[bool]] = {"one": [], "other": [], "uncaptured": []}

    def call(name: str) -> None:
        capturing = torch.cuda.is_current_stream_capturing()
        seen[name].append(capturing)
        if name == "uncaptured" and capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        torch.empty(1, device="cuda").zero_()

    cycles: list[int] = []
    with _set(torch.cuda, "_sleep", cycles.append):
        times = timer({name: functools.partial(call, name) for name in seen}, 5)
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys(seen, 5)
    assert seen["one"] == seen["other"] == [False, True], seen
    assert stub.graph_launches() - graphs == 10
    assert seen["uncaptured"] == [False, True] + [False] * 6, seen
    assert len(cycles) == 5
    assert min(cycles) > 0


# ---- The first pass ----


@torch.no_grad()
def check_first_passes_compile_side_by_side() -> None:
    """In threads, all of it before the pass; with a line where it takes long, which is the last."""
    by_thread: list[tuple[str, int]] = []
    kernels = (conv_kernels.conv_kernel, bottleneck.bottleneck_kernel)
    fresh = make_model()

    def watched(source: Any, *arguments: Any, **keywords: Any) -> Any:
        by_thread.append((source.fn.fn.__name__, threading.get_ident()))
        return compiler.compile(source, *arguments, **keywords)

    with contextlib.ExitStack() as stack:
        # Where kernels take it from that know of no compiled ones.
        stack.enter_context(_set(triton_compiler, "compile", watched))
        for kernel in kernels:
            kernel.device_caches.clear()
        stack.enter_context(_set(ahead, "PATIENCE", 0.0))
        said = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        stub.reset()
        with launch.logged(run=False) as log:
            network._resnet_features(fresh, x)
        fresh(x)
        launched, compiled = len(stub.launches()), list(by_thread)
        assert len({name for name, _ in compiled}) == len(kernels), compiled
        assert threading.get_ident() not in {thread for _, thread in compiled}
        # The pass, and the plan's first run.
        assert launched == 2 * len(log), (launched, len(log))
        assert re.fullmatch(
            r"fused_resnet: compiling \d+ Triton kernels for this GPU, kept for later: \d+ s\n",
            said.getvalue(),
        ), said.getvalue()
        assert planned(lambda: fresh(x))
        assert by_thread == compiled
        plans.forget(fresh)
        fresh(x)
        assert by_thread == compiled, "something was compiled again"
        assert said.getvalue().count("\n") == 1


# ---- Kernels that ask for more than there is ----


def check_out_of_resources_runs_the_next_tile() -> None:
    """Triton refuses to load what takes more shared memory than a program may have."""
    most, tried = 48 << 10, []
    before = launch.launch_kernel

    def launch_kernel(*arguments: Any, **constants: Any) -> None:
        tried.append(constants)
        before(*arguments, **constants)

    small = draw(4, 3, 64, 64)
    fresh = make_model()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_set(compiler, "max_shared_mem", lambda device: most))
        stack.enter_context(_set(launch, "launch_kernel", launch_kernel))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        stack.enter_context(torch.inference_mode())
        warnings.simplefilter("always")
        # Kernels that are loaded already have been found to fit.
        for kernel in (conv_kernels.conv_kernel, bottleneck.bottleneck_kernel):
            kernel.device_caches.clear()
        stub.reset()
        out = network._resnet_features(fresh, small)
        first = len(tried)
        launched = stub.launches()
        assert out.shape == (4, 512, 8, 8)
        assert first > len(launched), "everything fitted"
        assert max(one.shared for one in launched[1:]) <= most, [one.shared for one in launched]
        messages = [
            str(w.message) for w in caught if "the next best runs instead" in str(w.message)
        ]
        assert len(messages) == 1, messages
        assert "shared memory" in messages[0], messages
        # The second pass knows.
        tried.clear()
        stub.reset()
        network._resnet_features(fresh, small)
        assert len(tried) == len(stub.launches()) == len(launched)
        _check_prologue()
    tuning._left_out.clear()
    tuning.reload()


def _check_prologue() -> None:
    """A norm that does not fit into a convolution's loads is a pass of its own."""
    norms = [Norm(*(torch.ones(64).cuda() for _ in range(4)), 1e-5) for _ in range(2)]
    weight = torch.randn(64, 64, 1, 1).half().cuda()
    layer = ConvNorm(weight, norms[1], None, (1, 1), (0, 0), (1, 1), 1)
    asked = []

    def tile_of(*_: Any) -> tuple[Tile, float]:
        asked.append(True)
        return Tile(128, 128, 64, 1, 8, 3), 1.0

    with _set(inference.prologue_choice, "choose", tile_of):
        for _ in range(2):
            with launch.logged() as log:
                inference.norm_conv_bn_act(draw(2, 64, 8, 8), norms[0], layer, None, "relu")
            kernels = [one.kernel for one in log]
            assert "conv_kernel" in kernels
            assert any("norm" in kernel for kernel in kernels[:-1]), kernels
            asked.append(False)
    assert asked == [True, False] * 2


def check_out_of_resources_in_training() -> None:
    """The next tile runs, with one warning; where none fits, nothing does."""
    norms = [Norm(*(torch.ones(64).cuda() for _ in range(4)), 1e-5) for _ in range(2)]
    x, geometry = draw(8, 64, 56, 56), ((1, 1), (0, 0), (1, 1), 1)
    weight = torch.randn(64, 64, 1, 1).half().cuda().to(memory_format=torch.channels_last)

    def forward() -> object:
        return training.conv_batch_norm_statistics(x, weight, None, geometry, norms[0])

    def backward() -> object:
        return training.conv_backward_input(x, weight, (56, 56), geometry, None, (x, norms[1]))

    def last() -> object:
        args = (x, x, (x, norms[0]), weight, (56, 56), geometry, (x, norms[1]))
        return training.norm_conv_backward_input(*args)

    def seconds(*arguments: Any) -> float:
        """Ends always pay, those of larger tiles more."""
        return 1e-6 / (arguments[-1].block_m * arguments[-1].block_n)

    kernel = training_conv.training_conv_kernel
    for most, runs in ((64 << 10, True), (8 << 10, False)):
        tuning._left_out.clear()
        tuning._warned = False
        with contextlib.ExitStack() as stack:
            stack.enter_context(_set(compiler, "max_shared_mem", lambda device, m=most: m))
            stack.enter_context(_set(training_choice, "_seconds", seconds))
            for choose in (training_choice.forward, training_choice.backward):  # as if never asked
                stack.enter_context(_set(training_choice, choose.__name__, choose.__wrapped__))
            stack.enter_context(
                _set(training_choice.estimate, "predicted_convolution", lambda *_: 100.0)
            )
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            kernel.device_caches.clear()
            for call in (forward, backward, last):
                for _ in range(2):
                    stub.reset()
                    assert (call() is not None) == runs, (call.__name__, most)
                    own = [one for one in stub.launches() if one.shared > 4096]
                    assert all(one.shared <= most for one in own), own
            messages = [str(w.message) for w in caught if "the next best" in str(w.message)]
        assert len(messages) == 1, messages
        assert "training convolution behind a norm 128x128x64" in messages[0], messages
    tuning._left_out.clear()
    tuning.reload()


def check_chains_are_timed_in_a_row() -> None:
    """As they run in a network."""
    problem = ChainProblem(
        1, 64, 8, 8, 256, (1, 1), (1, 1), (1, 1), "float16", next_width=64
    )  # fmt: skip
    case = cases.make_chain_case(problem, torch.device("cpu"))
    arguments = _moved(case.arguments)
    choice = Choice(CONVOLUTIONS, None, "test")
    with torch.no_grad():
        stub.reset()
        triton.run_chain(arguments, problem, choice)
        few = [one.attributes for one in stub.launches()]
        assert few[0] == ()
        assert few[1:]
        assert all(few[1:]), few


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if hasattr(value, "_fields"):
        return type(value)(*map(_moved, value))
    return tuple(map(_moved, value)) if isinstance(value, tuple | list) else value


def main(results: Path) -> None:
    outcome: dict[str, str | None] = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            plans.forget(model)
            begun = time.perf_counter()
            try:
                check()
                outcome[name] = None
            except Exception:
                outcome[name] = traceback.format_exc()
            print(f"{time.perf_counter() - begun:.1f} s {name}", flush=True)
    results.write_text(json.dumps(outcome))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
