"""Plans of inference passes on the CPU: when there is one, and that nothing is missed."""

import copy
import functools
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_bits, image_batch, small_resnet
from support.threads import run_in_threads, with_threads
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import backends, models
from fused_resnet.backends import cpu
from fused_resnet.modules import plans

pytestmark = pytest.mark.skipif(not cpu.isa.ISA, reason="plans are of native kernels: no AVX2 here")


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


@functools.cache
def template():
    return small_resnet(BasicBlock)


def make_model(dtype=torch.float32):
    return fused_resnet.fuse(copy.deepcopy(template()).to(dtype))


@torch.inference_mode()
def settle(model, x, ran):
    """Passes until a plan runs; its output."""
    for _ in range(3):
        model(x)
    count = len(ran)
    out = model(x)
    assert len(ran) == count + 1, [*plans._of_models[model].by_key.values()]
    return out


def as_eager(model, x):
    """What the unfused model computes, as it is now, hooks included."""
    with torch.no_grad():
        return fused_resnet.unfuse(copy.deepcopy(model))(x)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_plan_has_the_bits_of_the_pass(dtype, layout, ran):
    """From the third pass on, for each shape."""
    model = make_model(dtype)
    with torch.inference_mode():
        for batch, size in ((1, 32), (2, 48), (17, 32)):
            x = image_batch(batch, size, dtype).to(memory_format=layout)
            count = len(ran)
            first, second = model(x), model(x)
            assert len(ran) <= count + 1  # that which a plan has to pass
            count = len(ran)
            for _ in range(3):
                out = model(x)
                assert_same_bits(out, first)
                assert out.stride() == first.stride()
            assert_same_bits(second, first)
            assert len(ran) == count + 3
            other = image_batch(batch, size, dtype, seed=1).to(memory_format=layout)
            assert_same_bits(model(other), copy.deepcopy(model)(other))
            assert len(ran) == count + 4


@pytest.mark.parametrize("make", [lambda: models.cifar_resnet(8), lambda: small_resnet(groups=1)])
def test_every_network_that_knows_all_of_itself(make, ran):
    model = fused_resnet.fuse(make().eval())
    x = image_batch(2, 32)
    with torch.inference_mode():
        expected = copy.deepcopy(model)(x)
    assert_same_bits(settle(model, x, ran), expected)


def test_results_do_not_share_memory(ran):
    model, x = make_model(), image_batch()
    settle(model, x, ran)
    with torch.inference_mode():
        first, second = model(x), model(x)
    assert first.data_ptr() != second.data_ptr()
    assert first.is_inference()
    with torch.no_grad():
        third = model(x)
    assert not third.is_inference()
    assert not third.requires_grad
    assert_same_bits(third, first)


# ---- changes ----


def replace_weight(model):
    conv = model.layer2[0].conv1
    conv.weight = nn.Parameter(conv.weight.detach() * 2)


def replace_buffer(model):
    norm = model.layer3[0].bn1
    norm.running_mean = norm.running_mean + 1


def swap_tensors(model):
    conv = model.layer2[0].conv2
    torch.utils.swap_tensors(conv.weight, nn.Parameter(conv.weight.detach() * 2))


def other_memory(model):
    weight = model.layer1[0].conv2.weight
    weight.data = weight.data * 2


def other_strides(model):
    weight = model.layer1[0].conv2.weight
    weight.data = weight.data.transpose(2, 3)


def norm_in_other_memory(model):
    norm = model.layer1[0].bn2
    norm.weight.data = norm.weight.data * 2


def head_in_other_memory(model):
    model.fc.weight.data = model.fc.weight.data * 2


def write(model):
    with torch.no_grad():
        model.layer4[0].conv1.weight.mul_(2)


def write_one_value(model):
    with torch.no_grad():
        model.layer1[0].conv1.weight[0, 0, 1, 1] += 100


def write_unseen(model):
    model.layer4[0].conv1.weight.data.mul_(2)


def write_in_numpy(model):
    array = model.conv1.weight.detach().numpy()
    array *= 2


def write_norms(model):
    model.layer2[0].bn1.weight.data.mul_(2)
    model.layer2[0].bn2.running_var.data.mul_(2)


def write_head(model):
    model.fc.bias.data.add_(1)


def load(model):
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()})


def set_eps(model):
    model.layer3[0].bn2.eps = 0.5


def set_stride(model):
    model.layer4[0].conv1.stride = (1, 1)
    model.layer4[0].downsample[0].stride = (1, 1)


def set_padding_mode(model):
    model.layer1[0].conv1.padding_mode = "circular"
    model.layer1[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


def replace_conv(model):
    torch.manual_seed(5)
    model.layer1[0].conv1 = nn.Conv2d(64, 64, 3, padding=1)


def replace_head(model):
    torch.manual_seed(5)
    model.fc = nn.Linear(512, 7)


def replace_pool(model):
    model.avgpool = nn.Sequential(model.avgpool, nn.Softplus())


def replace_relu(model):
    model.layer1[0].relu = nn.Sigmoid()


def append_block(model):
    model.layer1.append(nn.Hardtanh())


def remove_downsample(model):
    model.layer1[0].downsample = nn.Identity()
    model.layer2.insert(0, nn.Tanh())


class Negative(nn.ReLU):
    """Something else under a subclass."""

    def forward(self, input):
        return -super().forward(input)


def set_class(model):
    model.layer3[0].relu.__class__ = Negative


def own_forward(model):
    model.layer2[0].forward = lambda x: torch.zeros(x.shape[0], 128, 4, 4)


def own_conv_forward(model):
    conv = model.layer2[0].conv2
    conv._conv_forward = lambda input, weight, bias: F.conv2d(input, 2 * weight, bias, padding=1)


def hook(path):
    def register(model):
        model.get_submodule(path).register_forward_hook(lambda module, args, out: 2 * out)

    return register


def pre_hook(model):
    model.layer1[0].bn2.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def train_norm(model):
    model.layer1[0].bn1.train()


def move_and_back(model):
    model.double()
    with torch.no_grad():
        model.conv1.weight.mul_(2)
    model.float()


CHANGES = {
    function.__name__: function
    for function in (
        replace_weight, replace_buffer, swap_tensors, other_memory, other_strides,
        norm_in_other_memory, head_in_other_memory, write, write_one_value, write_unseen,
        write_in_numpy, write_norms, write_head, load, set_eps, set_stride, set_padding_mode,
        replace_conv, replace_head, replace_pool, replace_relu, append_block, remove_downsample,
        set_class, own_forward, own_conv_forward, pre_hook, train_norm, move_and_back,
    )
} | {
    f"hook on {path}": hook(path)
    for path in ("conv1", "maxpool", "layer1", "layer2.0", "layer3.0.conv1", "layer4.0.relu",
                 "layer2.0.downsample.1", "avgpool", "fc")
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed_at_once(change, ran):
    """And the pass after it, and what comes when there is a plan again, are as eager."""
    model, x = make_model(), image_batch(2, 32)
    before = settle(model, x, ran)
    change(model)
    expected = as_eager(model, x)
    assert expected.shape != before.shape or not torch.allclose(expected, before, rtol=0.02)
    with torch.inference_mode():
        for i in range(5):
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3, msg=f"pass {i}")
            if change is train_norm:  # whose statistics are those of the batch, and move
                expected = as_eager(model, x)


_HEADS = (nn.AdaptiveAvgPool2d, nn.Linear)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (nn.Conv2d, "forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.ReLU, "forward"),
        (nn.MaxPool2d, "forward"),
        (nn.AdaptiveAvgPool2d, "forward"),
        (nn.Linear, "forward"),
        (F, "conv2d"),
        (F, "batch_norm"),
        (F, "relu"),
        (F, "max_pool2d"),
        (F, "adaptive_avg_pool2d"),
        (F, "linear"),
        (BasicBlock, "forward"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_replaced_function_runs(owner, name, ran, monkeypatch):
    model, x = make_model(), image_batch()
    before = settle(model, x, ran)
    called = []
    original = getattr(owner, name)

    def own(*args, **kwargs):
        called.append(None)
        return original(*args, **kwargs)

    count = len(ran)
    with monkeypatch.context() as patch, torch.inference_mode():
        patch.setattr(owner, name, own)
        for _ in range(2):
            seen = len(called)
            torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
            assert len(called) > seen
    if name not in ("linear", "adaptive_avg_pool2d") and owner not in _HEADS:  # the rest has a plan
        assert len(ran) == count
    settle(model, x, ran)


def test_global_hooks_fire(ran):
    model, x = make_model(), image_batch()
    settle(model, x, ran)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(module)
    )
    try:
        with torch.inference_mode():
            model(x)
    finally:
        handle.remove()
    assert model.layer1[0].conv1 in seen
    settle(model, x, ran)


# ---- what surrounds a call ----


class Seen(TorchDispatchMode):
    """Counts operators."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_modes_transforms_and_gradients_have_their_say(ran):
    model, x = make_model(), image_batch()
    before = settle(model, x, ran)
    count = len(ran)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype is torch.bfloat16
    with torch.no_grad(), Seen() as seen:
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    assert seen.count > 1
    with torch.no_grad():
        batched = torch.func.vmap(model)(x[None])
        _, tangent = torch.func.jvp(model, (x,), (x,))
        traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x), before, rtol=1e-3, atol=1e-3)
        assert "conv" in str(traced.inlined_graph)
        assert model(x[..., :16, :]).shape == before.shape
        with backends.use_backend("reference"):
            torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batched[0], before, rtol=1e-3, atol=1e-3)
    assert tangent.abs().sum() > 0
    x.requires_grad_()
    out = model(x)
    assert out.requires_grad
    out.sum().backward()
    assert x.grad.abs().sum() > 0
    assert len(ran) == count, "a plan ran where something else had a say"
    x.requires_grad_(False)
    model.train()
    model(x)
    model.eval()
    assert len(ran) == count
    torch.testing.assert_close(settle(model, x, ran), as_eager(model, x), rtol=1e-3, atol=1e-3)


def test_compiled_graphs_hold_operators(ran):
    model, x = fused_resnet.fuse(models.cifar_resnet(8).eval()), image_batch(1, 32)
    before = settle(model, x, ran)
    count = len(ran)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), before)
    assert len(ran) == count
    torch.compiler.reset()


def test_another_number_of_threads_gives_the_same_bits(ran):
    model, x = make_model(), image_batch()
    before = settle(model, x, ran)
    for out in with_threads(lambda: settle(model, x, ran), 1, 2, 3):
        assert_same_bits(out, before)


def test_the_precision_that_torch_is_set_to_is_followed(ran):
    """On AMX tiles the bits differ; elsewhere they are the same."""
    model, x = make_model(), image_batch(2, 64)
    settle(model, x, ran)
    conv = torch.backends.mkldnn.conv
    before = conv.fp32_precision
    try:
        for precision in ("bf16", "ieee", "tf32"):
            conv.fp32_precision = precision
            with torch.inference_mode():
                outputs = [model(x) for _ in range(4)]
                expected = copy.deepcopy(model)(x)
            for out in outputs:
                assert_same_bits(out, expected, precision)
    finally:
        conv.fp32_precision = before


def test_threads_call_at_once(ran):
    model, inputs = make_model(), [image_batch(seed=seed) for seed in range(4)]
    expected = [settle(model, x, ran) for x in inputs]

    @torch.inference_mode()
    def work(i):
        for _ in range(10):
            assert_same_bits(model(inputs[i]), expected[i])

    run_in_threads(work)
    assert len(ran) >= 40


# ---- unseen writes, memory, copies ----


def test_one_percent_written_unseen_is_noticed_within_20_calls(ran):
    model, x = make_model(), image_batch(1, 32)
    settle(model, x, ran)
    torch.manual_seed(0)
    values = model.layer4[0].conv2.weight.data.view(-1)
    values[torch.randperm(values.numel())[: values.numel() // 100]] += 1
    expected = as_eager(model, x)
    with torch.inference_mode():
        assert any(torch.allclose(model(x), expected, rtol=1e-3, atol=1e-3) for _ in range(20))
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def test_watched_weights_have_no_plan(ran):
    """All of their values are compared in every call."""
    model, x = make_model(), image_batch(1, 32)
    settle(model, x, ran)
    fused_resnet.unfuse(model)
    fused_resnet.fuse(model, watch="full")
    count = len(ran)
    with torch.inference_mode():
        for _ in range(4):
            model(x)
        assert len(ran) == count
        model.layer4[0].conv2.weight.data[0, 0, 0, 0] += 100
        torch.testing.assert_close(model(x), as_eager(model, x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_norms_of_sixteen_bits_are_compared(name, ran):
    """Kernels read float32, which is made when the plan is."""
    model, x = make_model(torch.bfloat16), image_batch(2, 32, torch.bfloat16)
    before = settle(model, x, ran)
    getattr(model.layer2[0].bn1, name).data[:64] *= 3
    with torch.inference_mode():
        outputs = [model(x) for _ in range(4)]
        expected = copy.deepcopy(model)(x)
    assert not torch.equal(expected, before)
    for out in outputs:
        assert_same_bits(out, expected)


@pytest.mark.parametrize(
    "release", [lambda model: backends.release(model.parameters()), lambda model: cpu.empty_cache()]
)
def test_copies_are_given_back_on_demand(release, ran):
    model, x = make_model(), image_batch()
    settle(model, x, ran)
    model.layer1[0].conv1.weight.data[0, 0, 1, 1] += 100
    release(model)
    assert not any(id(weight) in cpu.plans._of_weights for weight in model.parameters())
    count = len(ran)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), as_eager(model, x), rtol=1e-3, atol=1e-3)
    assert len(ran) == count
    settle(model, x, ran)


def test_a_plan_goes_with_its_model(ran):
    model, x = make_model(), image_batch()
    settle(model, x, ran)
    plan = weakref.ref(ran[-1])
    storage = weakref.ref(model.layer1[0].conv1.weight.untyped_storage())
    keys = [id(parameter) for parameter in model.parameters()]
    ran.clear()
    del model
    gc.collect()
    assert plan() is None
    assert storage() is None
    assert not any(key in cpu.plans._of_weights for key in keys)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copied_models_have_plans_of_their_own(how, ran):
    model, x = make_model(), image_batch()
    before = settle(model, x, ran)
    other = how(model)
    with torch.no_grad():
        other.conv1.weight.mul_(2)
    out = settle(other, x, ran)
    assert not torch.allclose(out, before)
    assert ran[-1] is not next(iter(plans._of_models[model].by_key.values()))
    assert_same_bits(settle(model, x, ran), before)
    torch.save(model, io.BytesIO())


def test_models_that_change_in_every_pass_are_let_be(ran):
    model, x = make_model(), image_batch(1, 32)
    with torch.no_grad():
        for _ in range(40):
            model.conv1.weight.mul_(1.01)
            model(x)
        assert isinstance(next(iter(plans._of_models[model].by_key.values())), str)
        torch.testing.assert_close(model(x), as_eager(model, x), rtol=1e-3, atol=1e-3)


# ---- eight bits ----


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.single
def test_eight_bits(unseen, ran):
    model, x = copy.deepcopy(template()), image_batch(2, 32)
    fused_resnet.quantize(model, [x])
    before = settle(model, x, ran)
    with torch.inference_mode():
        assert_same_bits(copy.deepcopy(model)(x), before)
    for name in ("layer3.0.conv1.weight", "layer3.0.bn1.running_mean", "layer2.0.bn2.bias"):
        tensor = model.state_dict(keep_vars=True)[name]
        if unseen:
            tensor.data.mul_(3)
        else:
            with torch.no_grad():
                tensor.mul_(3)
        with torch.inference_mode():
            outputs = [model(x) for _ in range(4)]
            expected = copy.deepcopy(model)(x)
        assert not torch.equal(expected, before), name
        for out in outputs:
            assert_same_bits(out, expected, name)
        before = settle(model, x, ran)
    fused_resnet.dequantize(model)
    torch.testing.assert_close(settle(model, x, ran), as_eager(model, x), rtol=1e-3, atol=1e-3)


def test_garbage_that_is_collected_in_a_pass_is_no_obstacle(ran, monkeypatch):
    """A model that is gone takes its plan and guard with it whenever garbage is looked for."""
    operators = torch.ops.fused_resnet
    record = cpu.plans.Recorder.__enter__

    def collect(self):
        entered = record(self)
        operators.free_module_guard(2**40)  # nobody's
        operators.free_cpu_plan(2**40)
        return entered

    monkeypatch.setattr(cpu.plans.Recorder, "__enter__", collect)
    model = fused_resnet.fuse(small_resnet())
    x = image_batch(2, 32)
    with torch.no_grad():
        for _ in range(4):
            model(x)
    assert ran
