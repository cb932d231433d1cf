"""fuse, unfuse and report: what changes, what must not, and what each says."""

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
import torchvision
from support import (
    BLOCKS,
    EVERY_MODEL,
    assert_same_bits,
    double_copy,
    image_batch,
    run_python,
    small_resnet,
)
from torch import nn
from torch.nn.utils import prune
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

import fused_resnet
from fused_resnet import backends, forms
from fused_resnet.modules import read
from fused_resnet.testing import assert_error_rule


class OwnForward(BasicBlock):
    """A block someone wrote: twice the residual branch."""

    def forward(self, x):
        return x + 2 * super().forward(x)


class OwnConstructor(Bottleneck):
    """A subclass that changes nothing about the forward pass."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.note = "mine"


class OwnResNet(ResNet):
    """A ResNet someone wrote, with its own forward."""

    def forward(self, x):
        return super().forward(x) * 3


def records(model):
    return {record.path: record for record in fused_resnet.report(model)}


def check_equals_eager(eager, fused, x=None):
    """Outputs by the error rule, under no_grad."""
    x = image_batch(2, 40) if x is None else x
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.quick
@pytest.mark.parametrize("block", BLOCKS)
def test_fuse_changes_classes_and_nothing_else(block):
    model = small_resnet(BLOCKS[block])
    parameters = {n: id(p) for n, p in model.named_parameters()}
    buffers = {n: id(b) for n, b in model.named_buffers()}
    attributes = {n: set(vars(m)) for n, m in model.named_modules()}
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    fused = fused_resnet.fuse(model)
    assert fused is model
    assert type(model) is fused_resnet.ResNet
    assert isinstance(model, ResNet)
    ours = {"basic": fused_resnet.BasicBlock, "bottleneck": fused_resnet.Bottleneck}[block]
    assert type(model.layer1[0]) is ours
    assert isinstance(model.layer1[0], BLOCKS[block])
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert {n: id(b) for n, b in model.named_buffers()} == buffers
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert repr(model) == text
    assert optimizer.param_groups[0]["params"][0] is model.conv1.weight
    assert list(model.state_dict()) == list(state)
    assert model.state_dict()._metadata == state._metadata
    for name, value in model.state_dict().items():
        assert_same_bits(value, state[name], name)

    assert fused_resnet.unfuse(model) is model
    assert type(model) is ResNet
    assert type(model.layer1[0]) is BLOCKS[block]
    assert {n: set(vars(m)) for n, m in model.named_modules()} == attributes
    assert {n: id(p) for n, p in model.named_parameters()} == parameters


@pytest.mark.parametrize("name", EVERY_MODEL)
@pytest.mark.single
def test_state_dicts_of_every_model(name):
    """Equal key by key before and after, loading strictly both ways, every block fused."""
    with torch.device("meta"):
        model = getattr(torchvision.models, name)()
    model = model.to_empty(device="cpu")
    for i, tensor in enumerate(model.state_dict().values()):
        tensor.fill_(i)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    fused_resnet.fuse(model)
    after = model.state_dict()
    assert list(before) == list(after)
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    blocks = [n for n, m in model.named_modules() if isinstance(m, BasicBlock | Bottleneck)]
    described = records(model)
    assert all(described[path].fused for path in blocks)
    with torch.device("meta"):
        other = getattr(torchvision.models, name)()
    other = other.to_empty(device="cpu")
    assert str(other.load_state_dict(after, strict=True)) == "<All keys matched successfully>"
    for tensor in model.state_dict().values():
        tensor.zero_()
    assert str(model.load_state_dict(before, strict=True)) == "<All keys matched successfully>"
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_loading_a_wrong_state_dict_complains_as_torch_does():
    model = fused_resnet.fuse(small_resnet())
    state = model.state_dict()
    state["layer1.0.conv9.weight"] = state.pop("layer1.0.conv1.weight")
    with pytest.raises(RuntimeError, match=r"Missing key.*layer1\.0\.conv1"):
        model.load_state_dict(state)


@pytest.mark.quick
def test_fusing_and_unfusing_twice():
    eager = small_resnet()
    model = copy.deepcopy(eager)
    fused_resnet.fuse(model)
    x = image_batch()
    with torch.no_grad():
        once = model(x)
        types = [type(m) for m in model.modules()]
        fused_resnet.fuse(model)
        assert [type(m) for m in model.modules()] == types
        assert_same_bits(model(x), once)
        for _ in range(2):
            fused_resnet.unfuse(model)
            assert [type(m) for m in model.modules()] == [type(m) for m in eager.modules()]
            assert_same_bits(model(x), eager(x))
        fused_resnet.unfuse(fused_resnet.fuse(model))
        assert_same_bits(model(x), eager(x))


@pytest.mark.quick
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Linear(4, 3),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 3)),
        lambda: torchvision.models.squeezenet1_1(),
        nn.Identity,
    ],
    ids=["linear", "sequential", "squeezenet", "identity"],
)
def test_a_model_without_residual_blocks(build):
    """Nothing to do is not an error; the report says so in words."""
    model = build()
    types = [type(m) for m in model.modules()]
    assert fused_resnet.fuse(model) is model
    assert [type(m) for m in model.modules()] == types
    report = fused_resnet.report(model)
    assert not any(record.fused for record in report)
    assert str(report).strip()
    assert fused_resnet.unfuse(model) is model


@pytest.mark.quick
def test_a_subclass_with_its_own_forward_is_left_alone():
    eager = ResNet(OwnForward, [1, 1, 1, 1], num_classes=100)
    fused_resnet.testing.randomize_(eager, seed=1)
    # Identity shortcuts only where shapes allow: the doubled branch needs equal shapes.
    eager = eager.eval()
    eager.layer2 = eager.layer3 = eager.layer4 = nn.Identity()
    eager.fc = nn.Linear(64, 10)
    model = fused_resnet.fuse(copy.deepcopy(eager))
    assert type(model.layer1[0]) is OwnForward
    record = records(model)["layer1.0"]
    assert not record.fused
    assert "forward" in record.reason
    assert "OwnForward" in str(record)
    check_equals_eager(eager, model)


def test_a_subclass_without_its_own_forward_keeps_its_type():
    """Left alone or fused, it stays an OwnConstructor, computes the same and is reported."""
    eager = small_resnet(OwnConstructor)
    model = fused_resnet.fuse(copy.deepcopy(eager))
    assert isinstance(model.layer1[0], OwnConstructor)
    assert model.layer1[0].note == "mine"
    assert "layer1.0" in records(model)
    check_equals_eager(eager, model)
    fused_resnet.unfuse(model)
    assert type(model.layer1[0]) is OwnConstructor


def test_a_resnet_with_its_own_forward():
    """Its blocks fuse; the class and its forward stay."""
    eager = OwnResNet(Bottleneck, [1, 1, 1, 1], num_classes=100)
    fused_resnet.testing.randomize_(eager, seed=1)
    eager = eager.eval()
    model = fused_resnet.fuse(copy.deepcopy(eager))
    assert isinstance(model, OwnResNet)
    assert type(model.layer1[0]) is fused_resnet.Bottleneck
    check_equals_eager(eager, model)


def test_quantizable_blocks():
    """torchvision's quantizable ResNet is fused until observers look on."""
    from torchvision.models.quantization import resnet18

    eager = resnet18(weights=None, quantize=False)
    fused_resnet.testing.randomize_(eager, seed=1)
    eager = eager.eval()
    model = fused_resnet.fuse(copy.deepcopy(eager))
    assert all(record.fused for record in fused_resnet.report(model))
    with torch.no_grad():
        x = image_batch()
        assert_error_rule(model(x), eager(x), double_copy(eager)(x.double()))
        for one in (model, eager):
            one.qconfig = torch.ao.quantization.get_default_qconfig("x86")
            torch.ao.quantization.prepare(one, inplace=True)
        reason = records(model)["layer1.0"].reason
        assert "conv1 carries hooks" in reason or "activation_post_process" in reason
        assert_same_bits(model(x), eager(x))


def test_the_report_is_data():
    """A list of frozen records whose string has one line for each."""
    model = fused_resnet.fuse(small_resnet())
    model.layer2[0].conv1.register_forward_hook(lambda *args: None)
    report = fused_resnet.report(model)
    assert isinstance(report, Sequence)
    assert len(report) >= 5
    by_path = {record.path: record for record in report}
    for record in report:
        assert dataclasses.is_dataclass(record)
        with pytest.raises(dataclasses.FrozenInstanceError):
            record.fused = None
        assert record.path in str(report)
        assert bool(record.reason) != record.fused or record.fused
        if not record.fused:
            assert record.reason
    assert by_path["layer1.0"].fused
    assert by_path["layer1.0"].backend
    assert not by_path["layer2.0"].fused
    assert "hook" in by_path["layer2.0"].reason
    assert by_path["layer2.0"].reason in str(report)


@pytest.mark.quick
def test_the_report_of_an_unfused_model():
    """Before fusing, nothing is fused, and the report says why."""
    model = small_resnet()
    report = fused_resnet.report(model)
    assert not any(record.fused for record in report)
    assert "layer1.0" in {record.path for record in report}
    assert all(record.reason for record in report)
    types = [type(m) for m in model.modules()]
    assert [type(m) for m in model.modules()] == types


def test_the_report_names_the_backend(backend):
    model = fused_resnet.fuse(small_resnet()).to(backend.device)
    fused = [record for record in fused_resnet.report(model) if record.fused]
    assert fused
    assert all(backend.name in record.backend for record in fused)


def test_a_block_alone():
    """fuse takes a bare block, and the path of the root is its own."""
    for name, block in BLOCKS.items():
        eager = small_resnet(block).layer1[0]
        model = fused_resnet.fuse(copy.deepcopy(eager))
        assert type(model).__module__.startswith("fused_resnet"), name
        assert len(records(model)) >= 1
        check_equals_eager(eager, model, torch.randn(2, 64, 8, 8))
        assert type(fused_resnet.unfuse(model)) is block


def test_a_wrapped_model():
    """DataParallel, Sequential, attribute: wherever the blocks sit."""
    eager = nn.Sequential(nn.Identity(), nn.ModuleDict({"trunk": small_resnet()})["trunk"])
    model = fused_resnet.fuse(copy.deepcopy(eager))
    assert type(model[1].layer1[0]) is fused_resnet.Bottleneck
    assert "1.layer1.0" in records(model)
    check_equals_eager(eager, model)


def test_deepcopy():
    model = fused_resnet.fuse(small_resnet())
    x = image_batch()
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert twin.conv1.weight is not model.conv1.weight
        assert_same_bits(twin(x), expected)
        for parameter in twin.parameters():
            parameter.mul_(1.5)
        assert_same_bits(model(x), expected, "the original after the copy changed")
        assert not torch.equal(twin(x), expected)


@pytest.mark.quick
@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
@pytest.mark.single
def test_pickle(protocol):
    model = fused_resnet.fuse(small_resnet())
    x = image_batch()
    with torch.no_grad():
        expected = model(x)
        twin = pickle.loads(pickle.dumps(model, protocol=protocol))
        assert type(twin) is type(model)
        assert type(twin.layer1[0]) is type(model.layer1[0])
        assert_same_bits(twin(x), expected)


def test_torch_save_and_load(tmp_path):
    """The module in this process and in a fresh one, and its state dict with weights_only."""
    eager = small_resnet()
    model = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch()
    with torch.no_grad():
        expected = model(x)
        torch.save(model, tmp_path / "module.pt")
        loaded = torch.load(tmp_path / "module.pt", weights_only=False)
        assert_same_bits(loaded(x), expected)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    fresh = ResNet(Bottleneck, [1] * 4, num_classes=100).eval()
    fresh.load_state_dict(state, strict=True)
    with torch.no_grad():
        assert_same_bits(fresh(x), eager(x))
    torch.save({"x": x, "expected": expected}, tmp_path / "tensors.pt")
    run_python(
        f"""
        import torch
        torch.set_num_threads(2)
        model = torch.load({str(tmp_path / "module.pt")!r}, weights_only=False)
        data = torch.load({str(tmp_path / "tensors.pt")!r})
        with torch.no_grad():
            assert torch.equal(model(data["x"]), data["expected"])
        """
    )


def hooked_sites(model):
    """Every module inside and around the fused parts."""
    return [n for n, _ in model.named_modules() if n.startswith(("layer1", "layer2"))] + [
        "",
        "conv1",
        "bn1",
        "relu",
        "maxpool",
    ]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("fuse_first", [True, False])
@pytest.mark.single
def test_forward_hooks_fire_everywhere(block, fuse_first):
    """Same modules, same order, same shapes, and outputs that follow the error rule."""
    eager = small_resnet(BLOCKS[block])
    x = image_batch(2, 40)
    calls = {}
    models = {"eager": eager, "fused": copy.deepcopy(eager), "exact": double_copy(eager)}
    for kind, model in models.items():
        if kind == "fused" and fuse_first:
            fused_resnet.fuse(model)
        calls[kind] = []
        for name in hooked_sites(model):
            module = model.get_submodule(name)
            module.register_forward_pre_hook(
                lambda m, args, k=kind, n=name: calls[k].append(("pre", n, args[0].clone()))
            )
            module.register_forward_hook(
                lambda m, args, out, k=kind, n=name: calls[k].append(("post", n, out.clone()))
            )
        if kind == "fused":
            fused_resnet.fuse(model)
        with torch.no_grad():
            model(x.double() if kind == "exact" else x)
    assert len(calls["eager"]) > 20
    assert [c[:2] for c in calls["fused"]] == [c[:2] for c in calls["eager"]]
    for ours, theirs, reference in zip(calls["fused"], calls["eager"], calls["exact"], strict=True):
        assert_error_rule(ours[2], theirs[2], reference[2])


HOOKS = {
    "forward": lambda m, log: m.register_forward_hook(lambda *a: log.append("forward")),
    "forward pre": lambda m, log: m.register_forward_pre_hook(lambda *a: log.append("pre")),
    "forward kwargs": lambda m, log: m.register_forward_hook(
        lambda *a: log.append("kwargs"), with_kwargs=True
    ),
    "forward always": lambda m, log: m.register_forward_hook(
        lambda *a: log.append("always"), always_call=True
    ),
    "full backward": lambda m, log: m.register_full_backward_hook(
        lambda *a: log.append("backward")
    ),
    "full backward pre": lambda m, log: m.register_full_backward_pre_hook(
        lambda *a: log.append("backward pre")
    ),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    "site", ["conv1", "maxpool", "layer1.0", "layer1.0.conv2", "layer1.0.bn1", "layer1.0.relu"]
)
def test_each_kind_of_hook(kind, site):
    """A hook fires as often as in eager; removing it lets the block fuse again."""
    counts = []
    eager = small_resnet(stages=2)
    for model in (eager, fused_resnet.fuse(copy.deepcopy(eager))):
        log = []
        # relu is applied in place inside torchvision's blocks, which backward hooks refuse.
        model.layer1[0].relu.inplace = False
        handle = HOOKS[kind](model.get_submodule(site), log)
        x = image_batch(1, 32).requires_grad_()
        if "backward" in kind and site == "layer1.0":
            model.layer1[0].relu = nn.ReLU()
        model(x).sum().backward()
        counts.append(list(log))
        handle.remove()
    assert counts[0]
    assert counts[0] == counts[1]
    inner = site.startswith("layer1.0.")
    handle = HOOKS[kind](model.get_submodule(site), [])
    if inner:
        assert not records(model)["layer1.0"].fused
        assert "hook" in records(model)["layer1.0"].reason
    handle.remove()
    assert records(model)["layer1.0"].fused


def test_a_hook_that_replaces_the_output():
    """Hooks may return a value; a fused block must use it."""
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        model.layer1[0].bn2.register_forward_hook(lambda m, args, out: out * 3)
        model.layer2[0].conv1.register_forward_pre_hook(lambda m, args: (args[0] + 1,))
        model.layer3[0].register_forward_hook(lambda m, args, out: out.clamp(max=1))
        model.bn1.register_forward_hook(lambda m, args, out: out - 0.5)
    x = image_batch(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-4)


def test_global_hooks():
    """Hooks for every module of the process see the inner modules of fused blocks."""
    from torch.nn.modules import module as module_hooks

    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    seen = []
    handle = module_hooks.register_module_forward_hook(
        lambda m, args, out: seen.append(type(m).__name__)
    )
    try:
        with torch.no_grad():
            eager(image_batch())
            theirs = list(seen)
            seen.clear()
            fused(image_batch())
    finally:
        handle.remove()
    assert seen == theirs
    seen.clear()
    with torch.no_grad():
        fused(image_batch())
    assert not seen


def test_tensor_hooks_on_parameters():
    model = fused_resnet.fuse(small_resnet())
    calls = []
    model.layer1[0].conv2.weight.register_hook(lambda g: calls.append(g.shape))
    model.layer1[0].conv2.weight.register_post_accumulate_grad_hook(lambda p: calls.append(p.shape))
    model(image_batch()).sum().backward()
    assert calls == [model.layer1[0].conv2.weight.shape] * 2


def replace(path, make):
    """A change that puts `make(old module)` at `path`."""

    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))

    return change


def reflect(conv):
    conv.padding_mode = "reflect"
    conv._reversed_padding_repeated_twice = [1, 1, 1, 1]
    return conv


def rebuilt_conv(**changes):
    """A convolution like the old one but for some constructor arguments, with new weights."""

    def make(conv):
        arguments = {
            "stride": conv.stride,
            "padding": conv.padding,
            "dilation": conv.dilation,
            "groups": conv.groups,
            "bias": conv.bias is not None,
            "kernel_size": conv.kernel_size,
        }
        torch.manual_seed(9)
        return nn.Conv2d(conv.in_channels, conv.out_channels, **{**arguments, **changes})

    return make


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class LowRank(nn.Module):
    """An adapter around a convolution."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.extra = nn.Conv2d(conv.in_channels, conv.out_channels, 1)

    def forward(self, x):
        return self.conv(x) + self.extra(x)


def instance_forward(path):
    """A forward method patched onto one instance."""

    def change(model):
        module = model.get_submodule(path)
        original = module.forward
        module.forward = lambda *args: original(*args) * 0.5

    return change


def own_call(path):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    def change(model):
        model.get_submodule(path).__class__ = Doubled

    return change


CHANGES = {
    "gelu": replace("layer1.0.relu", lambda m: nn.GELU()),
    "leaky relu": replace("layer1.0.relu", lambda m: nn.LeakyReLU(0.1)),
    "relu6": replace("layer1.0.relu", lambda m: nn.ReLU6()),
    "mish": replace("layer1.0.relu", lambda m: nn.Mish()),
    "stem mish": replace("relu", lambda m: nn.Mish()),
    "no activation": replace("layer1.0.relu", lambda m: nn.Identity()),
    "stem gelu": replace("relu", lambda m: nn.GELU()),
    "bn identity": replace("layer1.0.bn2", lambda m: nn.Identity()),
    "stem bn identity": replace("bn1", lambda m: nn.Identity()),
    "layer norm like": replace("layer1.0.bn2", lambda m: nn.GroupNorm(4, m.num_features)),
    "batch norm subclass": own_call("layer1.0.bn2"),
    "stem batch norm subclass": own_call("bn1"),
    "sync batch norm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "conv with bias": replace("layer1.0.conv2", rebuilt_conv(bias=True)),
    "stem conv with bias": replace("conv1", rebuilt_conv(bias=True)),
    "reflect padding": replace("layer1.0.conv2", reflect),
    "circular padding": replace("layer1.0.conv2", rebuilt_conv(padding_mode="circular")),
    "same padding": replace("layer1.0.conv2", rebuilt_conv(padding="same")),
    "valid padding": replace("layer1.0.conv1", rebuilt_conv(padding="valid")),
    "conv subclass": lambda m: setattr(m.layer1[0].conv2, "__class__", ScaledConv),
    "adapter": replace("layer1.0.conv2", LowRank),
    "asymmetric kernel": replace(
        "layer1.0.conv2", rebuilt_conv(kernel_size=(1, 5), padding=(0, 2))
    ),
    "avg pool shortcut": replace(
        "layer2.0.downsample",
        lambda m: nn.Sequential(nn.AvgPool2d(2, 2), rebuilt_conv(stride=1)(m[0]), m[1]),
    ),
    "shortcut with relu": replace("layer2.0.downsample", lambda m: nn.Sequential(*m, nn.ReLU())),
    "shortcut without norm": replace("layer2.0.downsample", lambda m: nn.Sequential(m[0])),
    "shortcut is a conv": replace("layer2.0.downsample", lambda m: m[0]),
    "shortcut in a subclass": replace(
        "layer2.0.downsample", lambda m: type("Shortcut", (nn.Sequential,), {})(*m)
    ),
    "no max pool": replace("maxpool", lambda m: nn.Identity()),
    "average pool": replace("maxpool", lambda m: nn.AvgPool2d(3, 2, 1)),
    "ceil mode": replace("maxpool", lambda m: nn.MaxPool2d(3, 2, 1, ceil_mode=True)),
    "dilated max pool": replace("maxpool", lambda m: nn.MaxPool2d(3, 2, 1, dilation=2)),
    "other max pool": replace("maxpool", lambda m: nn.MaxPool2d(2)),
    "small stem": replace("conv1", rebuilt_conv(kernel_size=3, stride=1, padding=1)),
    "grey images": lambda m: None,
    "instance forward of a conv": instance_forward("layer1.0.conv2"),
    "instance forward of a norm": instance_forward("layer1.0.bn2"),
    "instance forward of a block": instance_forward("layer1.0"),
    "instance forward of the stem": instance_forward("conv1"),
    "instance forward of the shortcut": instance_forward("layer2.0.downsample"),
    "instance forward of the model": instance_forward(""),
    "no block": replace("layer3.0", lambda m: rebuilt_conv()(m.downsample[0])),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.layer1[0].conv2),
    "spectral norm": lambda m: nn.utils.parametrizations.spectral_norm(m.layer1[0].conv2),
    "old weight norm": lambda m: nn.utils.weight_norm(m.layer1[0].conv2),
    "stem weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.conv1),
    "parametrized norm": lambda m: nn.utils.parametrize.register_parametrization(
        m.layer1[0].bn1, "weight", nn.Softplus()
    ),
    "pruned": lambda m: prune.l1_unstructured(m.layer1[0].conv2, "weight", 0.5),
    "different eps": lambda m: setattr(m.layer1[0].bn1, "eps", 0.5),
    "half frozen": lambda m: m.layer1.requires_grad_(False),
    "no running statistics": lambda m: [
        setattr(m.layer1[0].bn1, n, None) for n in ("running_mean", "running_var")
    ],
    "plain tensor weight": lambda m: (
        (w := m.layer1[0].conv2.weight.detach().clone()),
        delattr(m.layer1[0].conv2, "weight"),
        setattr(m.layer1[0].conv2, "weight", w),
    ),
    "stride attribute": lambda m: setattr(m.layer1[0], "stride", 7),
    "shared relu": lambda m: setattr(m.layer1[0], "relu", m.layer2[0].relu),
    "conv stride": lambda m: [
        setattr(m.layer2[0].conv2, "stride", (1, 1)),
        setattr(m.layer2[0].downsample[0], "stride", (1, 1)),
    ],
    "not inplace": lambda m: [setattr(b.relu, "inplace", False) for b in (m.layer1[0], m)],
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("when", ["before fuse", "after fuse", "after a call"])
@pytest.mark.parametrize("change", CHANGES)
def test_modified_models_compute_what_eager_computes(change, when):
    """Whatever someone did to the modules, before or after `fuse`."""
    eager = small_resnet(stages=3)
    fused = copy.deepcopy(eager)
    x = image_batch(2, 40)
    if when != "before fuse":
        fused_resnet.fuse(fused)
    if when == "after a call":
        with torch.no_grad():
            fused(x)
    for model in (eager, fused):
        torch.manual_seed(3)
        CHANGES[change](model)
    if change == "sync batch norm":
        eager = nn.SyncBatchNorm.convert_sync_batchnorm(eager)
        fused = nn.SyncBatchNorm.convert_sync_batchnorm(fused)
    eager.eval()
    fused.eval()
    if when == "before fuse":
        fused_resnet.fuse(fused)
    with torch.no_grad():
        expected = eager(x)
        actual = fused(x)
    torch.testing.assert_close(actual, expected, rtol=3e-4, atol=3e-4)
    assert str(fused_resnet.report(fused))
    fused_resnet.unfuse(fused)
    if change != "instance forward of a block":  # which keeps the fused forward it wrapped
        with torch.no_grad():
            assert_same_bits(fused(x), expected, "after unfuse")


@pytest.mark.parametrize(
    ("change", "path", "word"),
    [
        ("mish", "layer1.0", "Mish"),
        ("batch norm subclass", "layer1.0", "Doubled"),
        ("circular padding", "layer1.0", "circular"),
        ("same padding", "layer1.0", "same"),
        ("conv subclass", "layer1.0", "ScaledConv"),
        ("adapter", "layer1.0", "LowRank"),
        ("weight norm", "layer1.0", "conv2"),
        ("instance forward of a conv", "layer1.0", "forward"),
        ("instance forward of a block", "layer1.0", "forward"),
        ("stem mish", "", "Mish"),
    ],
)
def test_the_report_explains_what_runs_unfused(change, path, word):
    model = fused_resnet.fuse(small_resnet())
    assert records(model)[path].fused
    CHANGES[change](model)
    record = records(model)[path]
    assert not record.fused
    assert word in record.reason


@pytest.mark.parametrize(
    "change", ["avg pool shortcut", "shortcut with relu", "shortcut is a conv"]
)
def test_the_report_explains_what_runs_partly_fused(change):
    """The block's own convolutions fuse, its shortcut does not, and the reason names it."""
    model = fused_resnet.fuse(small_resnet())
    assert not records(model)["layer2.0"].reason
    CHANGES[change](model)
    assert "downsample" in records(model)["layer2.0"].reason


def test_weights_shared_between_blocks():
    """Two blocks with one set of parameters, and one block used twice."""
    eager = small_resnet(BasicBlock, layers=2)
    eager.layer1[1].conv1.weight = eager.layer1[0].conv1.weight
    eager.layer1[1].bn1 = eager.layer1[0].bn1
    eager.layer2[1].conv2 = eager.layer2[1].conv1
    eager.layer3.append(eager.layer3[1])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert fused.layer1[1].conv1.weight is fused.layer1[0].conv1.weight
    check_equals_eager(eager, fused)
    with torch.no_grad():
        for model in (eager, fused):
            model.layer1[0].conv1.weight.mul_(0.5)
            model.layer2[1].conv1.weight.neg_()
    check_equals_eager(eager, fused)


def test_one_module_in_two_models():
    """Unfusing through one owner unfuses for the other, and both keep working."""
    shared = small_resnet()
    a, b = nn.Sequential(shared), nn.Sequential(shared)
    x = image_batch()
    with torch.no_grad():
        expected = shared(x)
        fused_resnet.fuse(a)
        torch.testing.assert_close(b(x), expected, rtol=1e-4, atol=1e-4)
        fused_resnet.unfuse(b)
        assert_same_bits(a(x), expected)


@pytest.mark.parametrize("argument", [None, "resnet50", 3, [], torch.zeros(1), Bottleneck])
@pytest.mark.parametrize("function", ["fuse", "unfuse", "report"])
def test_not_a_module(function, argument):
    with pytest.raises(TypeError, match="model") as raised:
        getattr(fused_resnet, function)(argument)
    assert type(argument).__name__ in str(raised.value)


def test_fused_models_are_collected():
    """Neither fusing nor running keeps a model or its weights alive."""
    model = fused_resnet.fuse(small_resnet())
    with torch.no_grad():
        model(image_batch())
    references = [weakref.ref(model), weakref.ref(model.layer1[0].conv1.weight)]
    del model
    gc.collect()
    assert [r() for r in references] == [None, None]


def test_fuse_on_other_devices():
    """A model on the meta device fuses and computes shapes."""
    with torch.device("meta"):
        model = fused_resnet.fuse(torchvision.models.resnet18()).eval()
        out = model(torch.empty(2, 3, 64, 64))
    assert out.shape == (2, 1000)
    assert out.device.type == "meta"


def test_apply_and_named_modules():
    eager = small_resnet()
    model = fused_resnet.fuse(copy.deepcopy(eager))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in eager.named_modules()]
    visited = []
    model.apply(lambda m: visited.append(type(m).__name__))
    expected = []
    eager.apply(lambda m: expected.append(type(m).__name__))
    assert visited == expected


def test_channels_last_and_contiguous_models_agree():
    eager = small_resnet()
    for model_format in (torch.channels_last, torch.contiguous_format):
        for input_format in (torch.channels_last, torch.contiguous_format):
            fused = fused_resnet.fuse(copy.deepcopy(eager)).to(memory_format=model_format)
            check_equals_eager(eager, fused, image_batch().contiguous(memory_format=input_format))


def test_block_output_format_is_eagers():
    """A fused block in the middle of a model leaves the strides eager leaves."""
    for block in BLOCKS.values():
        eager = small_resnet(block)
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        for memory_format in (torch.channels_last, torch.contiguous_format):
            x = torch.randn(2, 64, 9, 8).to(memory_format=memory_format)
            with torch.no_grad():
                assert fused.layer1(x).stride() == eager.layer1(x).stride()
                image = image_batch(2, 33).contiguous(memory_format=memory_format)
                stems = []
                for model in (fused, eager):
                    handle = model.layer1.register_forward_pre_hook(
                        lambda m, args, stems=stems: stems.append(args[0].stride())
                    )
                    model(image)
                    handle.remove()
            assert stems[0] == stems[1]


@pytest.mark.quick
@pytest.mark.parametrize("change", ["nothing", *CHANGES])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_quick_look_at_a_block_sees_what_the_long_one_sees(change):
    """Where it says that there is nothing unusual, that finds the same tensors and numbers."""
    torch.manual_seed(3)
    found = 0
    for kind in BLOCKS.values():
        with torch.device("meta"):
            model = fused_resnet.fuse(ResNet(kind, [1] * 4))
            if change != "nothing":
                CHANGES[change](model)
        x = image_batch(2, 8)
        for block in (b for i in range(1, 5) for b in getattr(model.eval(), f"layer{i}")):
            form = forms.of_fused(type(block))
            quick = form and read.plain_block(block, form, False)
            if not quick:
                continue
            found += 1
            assert read.call_obstacle(block) is None
            assert read.own_obstacle(block) is None
            long = read.inference_block(block, x)
            assert quick[1:] == long[1:]
            assert type(quick) is type(long)
            for ours, theirs in zip(quick.layers, long.layers, strict=True):
                assert all(a is b for a, b in zip(ours.flat(), theirs.flat(), strict=True))
                assert type(ours) is type(theirs)
                assert type(ours.norm) is type(theirs.norm)
    assert found == 8 or change != "nothing"


def test_functional_relu_is_not_confused_with_the_module():
    """A relu shared with the outside keeps its own behaviour."""
    model = fused_resnet.fuse(small_resnet())
    x = torch.randn(4)
    assert torch.equal(model.relu(x.clone()), F.relu(x))


@pytest.mark.quick
@pytest.mark.parametrize("block", BLOCKS)
def test_all_blocks_run_in_one_call(block, monkeypatch):
    """And one by one, to the same bits, where there is something between them to be seen."""
    model = fused_resnet.fuse(small_resnet(BLOCKS[block], layers=2))
    native, calls = backends.cpu.residual_blocks, []

    def counted(input, blocks):
        calls.append(len(blocks))
        return native(input, blocks)

    monkeypatch.setattr(backends.cpu.Cpu, "residual_blocks", staticmethod(counted))
    x = image_batch(3, 40)

    def calls_of(x):
        calls.clear()
        with torch.no_grad():
            out = model(x)
        return out, list(calls)

    together, calls_together = calls_of(x)
    assert calls_together == [8]

    handle = model.layer3.register_forward_pre_hook(lambda module, args: None)
    apart, calls_apart = calls_of(x)
    assert calls_apart == [4, 1, 1, 2]
    assert_same_bits(apart, together)
    handle.remove()
    assert calls_of(x)[1] == [8]

    model.layer2[1].forward = lambda x: type(model.layer2[1]).forward(model.layer2[1], x) * 2
    doubled, calls_doubled = calls_of(x)
    assert calls_doubled == [2, 1, 1, 4]
    assert not torch.equal(doubled, together)
    del model.layer2[1].forward

    model.layer4[0].train()
    assert calls_of(x)[1] == [6, 1]
    model.eval()

    model.layer4 = nn.Sequential()
    model.fc = nn.Identity()
    assert calls_of(x)[1] == [6]
    model.layer4 = nn.Identity()
    assert calls_of(x)[1] == [6]
