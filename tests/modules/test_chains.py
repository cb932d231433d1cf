"""`nn.Sequential`s of MobileNets' blocks: run as one on the CPU, and nothing is missed."""

import copy
import pickle

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from support import (
    assert_gradients_by_error_rule,
    assert_same_bits,
    double_copy,
    image_batch,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.efficientnet import MBConv, MBConvConfig
from torchvision.models.mobilenetv2 import InvertedResidual as Old
from torchvision.models.mobilenetv3 import InvertedResidual, InvertedResidualConfig
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation

import fused_resnet
from fused_resnet.backends import cpu
from fused_resnet.modules import chains, plans
from fused_resnet.testing import assert_error_rule, randomize_

pytestmark = pytest.mark.skipif(
    not cpu.isa.ISA, reason="no native kernels, or left out by FUSED_RESNET_CPU_ISA"
)

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def v3():
    """Its kinds of blocks: with squeeze-and-excitation or without, with a shortcut or without."""
    config = InvertedResidualConfig
    return nn.Sequential(
        Conv2dNormActivation(3, 16, stride=2, activation_layer=nn.Hardswish),
        InvertedResidual(config(16, 3, 16, 16, True, "RE", 2, 1, 1), nn.BatchNorm2d),
        InvertedResidual(config(16, 3, 48, 24, False, "RE", 1, 1, 1), nn.BatchNorm2d),
        InvertedResidual(config(24, 5, 64, 24, True, "HS", 1, 1, 1), nn.BatchNorm2d),
        Conv2dNormActivation(24, 48, kernel_size=1, activation_layer=nn.Hardswish),
    )


def v2():
    return nn.Sequential(
        Conv2dNormActivation(3, 16, stride=2, activation_layer=nn.ReLU6),
        nn.Sequential(Old(16, 24, 2, 6), Old(24, 24, 1, 6)),
        Old(24, 24, 1, 6),
    )


def efficientnet():
    configs = [MBConvConfig(1, 3, 2, 16, 16, 1), MBConvConfig(4, 5, 1, 16, 16, 1)]
    blocks = (MBConv(config, 0.2, nn.BatchNorm2d) for config in configs)
    return nn.Sequential(Conv2dNormActivation(3, 16), nn.Sequential(*blocks))


def of_timm():
    model = timm.create_model("mobilenetv3_small_050")
    return nn.Sequential(Conv2dNormActivation(3, 16, stride=2), *model.blocks[:3])


MAKES = {make.__name__: make for make in (v3, v2, efficientnet, of_timm)}


def make_pair(make=v3):
    torch.manual_seed(0)
    eager = randomize_(make(), seed=1).eval()
    return eager, fused_resnet.fuse(copy.deepcopy(eager))


@pytest.fixture
def ran(monkeypatch):
    """Grows by one with each pass that a plan ran."""
    passes = []

    def run(self, input, original=cpu.plans.Plan.run):
        out = original(self, input)
        if out is not None:
            passes.append(self)
        return out

    monkeypatch.setattr(cpu.plans.Plan, "run", run)
    return passes


@torch.inference_mode()
def settle(model, x, ran):
    """Passes until a plan runs; its output."""
    for _ in range(3):
        model(x)
    count = len(ran)
    out = model(x)
    assert len(ran) == count + 1, [*plans._of_models[model].by_key.values()]
    return out


@pytest.mark.quick
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_from_the_third_pass_on_it_is_one_call(make, layout, ran):
    """With the bits of the first pass, whose output lies as eager's does."""
    eager, fused = make_pair(make)
    fused, eager = fused.to(memory_format=layout), eager.to(memory_format=layout)
    with torch.inference_mode():
        for batch, size in ((1, 32), (3, 48)):
            x = image_batch(batch, size).to(memory_format=layout)
            first, expected = fused(x), eager(x)
            assert first.stride() == expected.stride()
            assert_error_rule(first, expected, double_copy(eager)(x.double()))
            assert_same_bits(settle(fused, x, ran), first)
            other = image_batch(batch, size, seed=1).to(memory_format=layout)
            count = len(ran)
            out = fused(other)
            assert len(ran) == count + 1
            assert out.stride() == first.stride()
            assert_same_bits(out, copy.deepcopy(fused)(other))
            assert_error_rule(out, eager(other), double_copy(eager)(other.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits(dtype, ran):
    eager, fused = make_pair()
    x = image_batch(2, 32, dtype).to(memory_format=torch.channels_last)
    exact = double_copy(eager.to(dtype))(x.double())
    fused.to(dtype)
    with torch.no_grad():
        assert_error_rule(settle(fused, x, ran), eager(x), exact)


def test_weights_that_lie_channels_last(ran):
    """Then so does eager's output, whatever the input."""
    eager, fused = make_pair()
    eager.to(memory_format=torch.channels_last)
    fused.to(memory_format=torch.channels_last)
    x = image_batch(2, 32).contiguous()
    out = settle(fused, x, ran)
    with torch.no_grad():
        assert out.stride() == eager(x).stride() != out.contiguous().stride()
        for model in (eager, fused):
            model.to(memory_format=torch.contiguous_format)
        assert fused(x).stride() == eager(x).stride()


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "timm mobilenetv3_small_050"])
@pytest.mark.single
def test_whole_networks(name, ran):
    torch.manual_seed(0)
    if name.startswith("timm "):
        eager = timm.create_model(name.removeprefix("timm "))
    else:
        eager = torchvision.models.get_model(name)
    eager = randomize_(eager, seed=1).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(1, 64)
    with torch.inference_mode():
        for _ in range(4):
            out = fused(x)
        assert len(ran) == 1 + 2  # that which a plan has to pass, and the last two
        assert_error_rule(out, eager(x), double_copy(eager)(x.double()))


# ---- changes ----


def first_of(model, cls):
    return next(module for module in model.modules() if type(module) is cls)


def write_conv(model):
    with torch.no_grad():
        model[2].block[0][0].weight.mul_(2)


def write_unseen(model):
    model[2].block[0][0].weight.data.mul_(2)


def write_squeeze(model):
    first_of(model, SqueezeExcitation).fc2.bias.data.add_(1)


def squeeze_in_other_memory(model):
    fc1 = first_of(model, SqueezeExcitation).fc1
    fc1.weight.data = fc1.weight.data * -2


def replace_parameter(model):
    fc1 = first_of(model, SqueezeExcitation).fc1
    fc1.weight = nn.Parameter(-2 * fc1.weight.detach())


def write_norm(model):
    model[3].block[1][1].running_var.data.mul_(4)


def set_eps(model):
    model[3].block[1][1].eps = 1.0


def set_stride(model):
    model[4][0].stride = (2, 2)


def replace_act(model):
    model[4][2] = nn.Sigmoid()


def replace_gate(model):
    first_of(model, SqueezeExcitation).scale_activation = nn.Tanh()


def no_shortcut(model):
    model[3].use_res_connect = False


def append(model):
    model.append(nn.Tanh())


def append_in_block(model):
    model[3].block.append(nn.Tanh())


def remove(model):
    del model[4]


def set_class(model):
    class Other(nn.Hardswish):
        def forward(self, input):
            return -super().forward(input)

    model[4][2].__class__ = Other


def own_forward(model):
    block = model[3]
    block.forward = lambda x: 2 * x


def own_forward_of_squeeze(model):
    first_of(model, SqueezeExcitation).forward = lambda x: 2 * x


def train_norm(model):
    model[3].block[1][1].train()


def hook(path):
    def register(model):
        module = model.get_submodule(path) if path else model
        module.register_forward_hook(lambda module, args, out: 2 * out)

    return register


def pre_hook(model):
    model[3].block[1][1].register_forward_pre_hook(lambda module, args: (2 * args[0],))


CHANGES = {
    change.__name__: change
    for change in (
        write_conv, write_unseen, write_squeeze, squeeze_in_other_memory, replace_parameter,
        write_norm, set_eps, set_stride, replace_act, replace_gate, no_shortcut, append,
        append_in_block, remove, set_class, own_forward, own_forward_of_squeeze, train_norm,
        pre_hook,
    )
} | {
    f"hook on {path}": hook(path)
    for path in ("", "0", "0.1", "1", "3.block", "3.block.1.0", "3.block.2", "3.block.2.fc1",
                 "3.block.2.avgpool", "3.block.2.scale_activation")
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed_at_once(change, ran):
    eager, fused = make_pair()
    x = image_batch(2, 32)
    before = settle(fused, x, ran)
    for model in (eager, fused):
        change(model)
    with torch.inference_mode():
        for i in range(4):
            expected, out = eager(x), fused(x)
            assert expected.shape != before.shape or not torch.allclose(expected, before, rtol=0.02)
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3, msg=f"pass {i}")


def test_what_a_block_holds_and_can_change_in_place():
    """A list may change without a trace in the module's dictionary: no plan."""
    eager, _ = make_pair()
    eager[3].widths = [1, 2]
    fused = fused_resnet.fuse(eager)
    assert fused_resnet.report(fused)[3].fused
    x = image_batch(2, 32)
    with torch.inference_mode():
        for _ in range(4):
            fused(x)
    assert all(isinstance(plan, str) for plan in plans._of_models[fused].by_key.values())


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv2d, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.Hardswish, "forward"),
        (nn.Hardsigmoid, "forward"),
        (nn.AdaptiveAvgPool2d, "forward"),
        (nn.Sequential, "forward"),
        (SqueezeExcitation, "forward"),
        (SqueezeExcitation, "_scale"),
        (InvertedResidual, "forward"),
        (F, "conv2d"),
        (F, "batch_norm"),
        (F, "hardswish"),
        (F, "hardsigmoid"),
        (F, "adaptive_avg_pool2d"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_replaced_function_runs(owner, name, ran, monkeypatch):
    _, fused = make_pair()
    x = image_batch(2, 32)
    before = settle(fused, x, ran)
    called, original = [], getattr(owner, name)

    def own(*args, **kwargs):
        called.append(None)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(owner, name, own)
        for _ in range(3):
            seen = len(called)
            torch.testing.assert_close(fused(x), before, rtol=1e-3, atol=1e-3)
            assert len(called) > seen
    settle(fused, x, ran)


def test_global_hooks_fire(ran):
    _, fused = make_pair()
    x = image_batch(2, 32)
    settle(fused, x, ran)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        with torch.inference_mode():
            fused(x)
    finally:
        handle.remove()
    assert first_of(fused, SqueezeExcitation).fc1 in seen
    settle(fused, x, ran)


# ---- what surrounds a call ----


class Seen(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_modes_transforms_and_gradients_have_their_say(ran):
    eager, fused = make_pair()
    x = image_batch(2, 32)
    before = settle(fused, x, ran)
    count = len(ran)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype is torch.bfloat16
        with Seen() as seen:
            torch.testing.assert_close(fused(x), before, rtol=1e-3, atol=1e-3)
        assert seen.count > 1
        torch.testing.assert_close(torch.func.vmap(fused)(x[None])[0], before, rtol=1e-3, atol=1e-3)
        traced = torch.jit.trace(fused, x, check_trace=False)
        assert "conv" in str(traced.inlined_graph)
        with fused_resnet.use_backend("reference"):
            torch.testing.assert_close(fused(x), before, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(fused(x.double().float()[:, :, :16]), eager(x[:, :, :16]))
        with fused_resnet.unfused():
            assert_same_bits(fused(x), eager(x))
        torch._dynamo.reset()
        compiled = torch.compile(fused, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), before, rtol=1e-3, atol=1e-3)
        torch._dynamo.reset()
    assert len(ran) == count, "a plan ran where something else had a say"
    assert_gradients_by_error_rule(copy.deepcopy(fused), copy.deepcopy(eager), x)
    for model in (eager, fused):
        model.train()(x)
        model.eval()
    assert len(ran) == count
    with torch.no_grad():
        torch.testing.assert_close(settle(fused, x, ran), eager(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(how, ran):
    _, fused = make_pair(v2)
    x = image_batch(2, 32)
    before = settle(fused, x, ran)
    other = how(fused)
    assert [*map(type, other.modules())] == [*map(type, fused.modules())]
    other[1][1].conv[0][0].weight.data.mul_(2)
    assert not torch.allclose(settle(other, x, ran), before)
    assert_same_bits(settle(fused, x, ran), before)


@pytest.mark.quick
def test_classes_and_reports():
    """Containers of blocks alone; unfuse gives all classes back."""
    eager, fused = make_pair(v2)
    ways = {path: getattr(type(m), "_run", None) for path, m in fused.named_modules()}
    assert [path for path, way in ways.items() if way is chains.chain_forward] == ["", "1"]
    assert isinstance(fused, nn.Sequential)
    assert isinstance(fused[:2], nn.Sequential)
    paths = [record.path for record in fused_resnet.report(fused) if record.fused]
    assert paths == ["0", "1.0", "1.1", "2"]
    x = image_batch(2, 32)
    with torch.no_grad():
        torch.testing.assert_close(fused[:2](x), eager[:2](x), rtol=1e-3, atol=1e-3)
    fused_resnet.unfuse(fused)
    assert [*map(type, fused.modules())] == [*map(type, eager.modules())]


def test_torchscript():
    eager, fused = make_pair(v2)
    x = image_batch(2, 32)
    with torch.no_grad():
        assert_same_bits(torch.jit.script(fused)(x), torch.jit.script(eager)(x))
