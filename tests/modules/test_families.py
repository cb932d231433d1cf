"""Blocks that are not torchvision's ResNet's: pre-activation, the books' and DenseNet's."""

import collections
import copy
import pickle
import warnings

import pytest
import torch
from support import (
    assert_gradients_by_error_rule,
    assert_same_bits,
    assert_step_in_float64,
    double_copy,
    dtype_id,
    image_batch,
    run_python,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.densenet import DenseNet
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import families, forms, models
from fused_resnet.models.preact import PreActResNet
from fused_resnet.modules.conv_norm_act import NormAct
from fused_resnet.testing import assert_error_rule, randomize_


def materialised(*blocks):
    """Lazy blocks after their first call."""
    model = nn.Sequential(*blocks)
    with torch.no_grad():
        model(image_batch(1, 16))
    return model


# Networks of 3-channel images, with every option of every block. No strided 1x1 convolution reads
# fewer than 16 channels: in a network that is not fused, oneDNN 3.12 sums up the gradient in its
# weight beyond the end of its memory on AVX-512 (fused_resnet/layers/convolution.py).
NETWORKS = {
    "preact basic": lambda: PreActResNet(models.PreActBasicBlock, (1, 2, 1, 1), 10),
    "preact bottleneck": lambda: PreActResNet(models.PreActBottleneck, (1, 2, 1, 1), 10),
    "d2l": lambda: materialised(
        models.Residual(16, use_1x1conv=True),
        models.Residual(16),
        models.Residual(32, use_1x1conv=True, strides=2),
    ),
    "model garden": lambda: nn.Sequential(
        models.ResidualBlock(3, 16, use_projection=True),
        models.ResidualBlock(16, 16),
        models.ResidualBlock(16, 32, strides=2, use_projection=True),
    ),
    "squeeze and excitation": lambda: nn.Sequential(
        models.ResidualBlock(3, 16, use_projection=True, se_ratio=0.25),
        models.ResidualBlock(16, 16, se_ratio=0.5),
    ),
    "stochastic depth": lambda: nn.Sequential(
        models.ResidualBlock(3, 16, use_projection=True, stochastic_depth_drop_rate=0.5),
        models.ResidualBlock(16, 16, stochastic_depth_drop_rate=0.3, se_ratio=0.5),
    ),
    "resnet-d shortcut": lambda: nn.Sequential(
        models.ResidualBlock(3, 16, strides=2, use_projection=True, resnetd_shortcut=True),
        models.ResidualBlock(16, 32, use_projection=True, resnetd_shortcut=True),
    ),
    "densenet": lambda: DenseNet(12, (2, 2, 2, 2), 16, num_classes=10),
    "densenet with dropout": lambda: DenseNet(12, (1, 2, 1, 1), 16, drop_rate=0.3, num_classes=10),
}


def build(network):
    torch.manual_seed(1)
    return randomize_(NETWORKS[network](), seed=2).eval()


def records(model):
    return {record.path: record for record in fused_resnet.report(model)}


@pytest.mark.whole_model
@pytest.mark.parametrize("network", NETWORKS)
def test_in_evaluation(backend, network):
    """By the error rule, and back to the same bits."""
    eager = build(network).to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    report = fused_resnet.report(fused)
    assert len(report) >= 2
    assert all(record.fused for record in report)
    x = image_batch(2, 48).to(backend.device)
    with torch.inference_mode():
        expected = eager(x)
        assert_error_rule(fused(x), expected, double_copy(eager)(x.double()))
        assert_same_bits(fused_resnet.unfuse(fused)(x), expected)
    assert [type(m) for m in fused.modules()] == [type(m) for m in eager.modules()]


def called_operators(model, x):
    """How often each of our operators is called, by name."""
    counts = collections.Counter()

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            if operator.namespace == "fused_resnet":
                counts[operator._schema.name.partition("::")[2]] += 1
            return operator(*args, **(kwargs or {}))

    with Calls():
        model(x)
    return dict(counts)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("network", "inference", "recorded"),
    [
        # Blocks with a projection have two convolutions of what their first norm makes.
        (
            "preact basic",
            {"norm_conv_bn_act": 8, "conv_bn_act": 5},
            {"batch_norm_act_inference": 5, "conv_bn_act": 10},
        ),
        (
            "preact bottleneck",
            {"norm_conv_bn_act": 9, "conv_bn_act": 10},
            {"batch_norm_act_inference": 5, "conv_bn_act": 15},
        ),
        # Eight layers and three transitions, the second convolutions of layers, the last norm.
        (
            "densenet",
            {
                "conv_bn_act_max_pool": 1,
                "norm_conv_bn_act": 11,
                "conv_bn_act": 8,
                "batch_norm_act_inference": 1,
            },
            {"conv_bn_act": 9, "batch_norm_act_inference": 12},
        ),
    ],
)
def test_norms_are_inside_convolutions_in_inference(network, inference, recorded):
    """And before them where gradients are recorded, which keep what a convolution reads."""
    model, x = fused_resnet.fuse(build(network)), image_batch(2, 48)
    with torch.inference_mode():
        assert called_operators(model, x) == inference
    assert called_operators(model, x) == recorded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("network", ["preact basic", "densenet"])
@pytest.mark.single
def test_norms_stay_inside_convolutions_in_a_graph(network, dtype):
    """Of whichever dtype: nothing that answers what runs is in the compiler's way."""
    model, x = fused_resnet.fuse(build(network)).to(dtype), image_batch(2, 48, dtype)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(model, backend=keep, fullgraph=True)(x)
        assert_same_bits(compiled, model(x))
    targets = [str(node.target) for node in graphs[0].graph.nodes]
    count = sum(target.startswith("fused_resnet.norm_conv_bn_act") for target in targets)
    assert count == {"preact basic": 8, "densenet": 11}[network]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("network", ["preact basic", "preact bottleneck", "densenet"])
def test_prologues_compute_what_separate_norms_do(network, dtype, monkeypatch):
    """To the bit: the normalised input is what would have been written."""
    model, x = fused_resnet.fuse(build(network)).to(dtype), image_batch(2, 48, dtype)
    with torch.inference_mode():
        inside = model(x)
        monkeypatch.setattr(NormAct, "_in_one", lambda *arguments: None)
        assert_same_bits(inside, model(x))


def test_a_hook_on_the_projection_of_a_preactivation_block_fires():
    """It sees the normalised input, and the other convolution reads that too."""
    model, x = build("preact basic"), image_batch(2, 48)
    expected = model(x)
    fused_resnet.fuse(model)
    seen = []
    model.layer2[0].downsample.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.inference_mode():
        out = model(x)
        calls = called_operators(model.layer2[0], x.new_zeros(1, 64, 8, 8))
    assert calls == {"batch_norm_act_inference": 1, "conv_bn_act": 2}
    assert (seen[0] >= 0).all()
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda m: m.features.norm5.register_forward_hook(lambda *_: None),
            "features.norm5 carries hooks",
        ),
        (lambda m: m.features.register_forward_hook(lambda *_: None), "features carries hooks"),
        (
            lambda m: setattr(m.features, "norm0", nn.Identity()),
            "features.norm0 is an Identity",
        ),
        (lambda m: m.features.add_module("more", nn.Identity()), "the children of features are"),
    ],
    ids=["norm5", "features", "norm0", "more"],
)
def test_what_keeps_the_stem_of_a_densenet(change, reason):
    model, x = build("densenet"), image_batch(2, 48)
    change(model)
    expected = model(x)
    fused_resnet.fuse(model)
    record = records(model)[""]
    assert not record.fused
    assert reason in record.reason
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", ["preact basic", "d2l", "model garden", "densenet"])
@pytest.mark.single
def test_gradients_by_the_error_rule(network):
    eager = build(network).train()
    assert_gradients_by_error_rule(
        fused_resnet.fuse(copy.deepcopy(eager)), eager, image_batch(4, 48)
    )


@pytest.mark.whole_model
@pytest.mark.quick
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_and_statistics(network, mode):
    """In float64, where a wrong formula shows."""
    eager = build(network).double().train(mode == "train")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(4, 40).double()
    assert_step_in_float64(fused, eager, x)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("network", "mode", "path", "reason"),
    [
        ("d2l", "eval", "0", "conv3 is a Conv2d, not a convolution and a norm"),
        ("d2l", "eval", "1", ""),
        ("squeeze and excitation", "eval", "1", "squeeze_excitation is a SqueezeExcitation"),
        ("stochastic depth", "train", "0", "stochastic_depth is a StochasticDepth"),
        ("stochastic depth", "eval", "0", ""),
        ("resnet-d shortcut", "eval", "0", "shortcut.0 is an AvgPool2d"),
        ("resnet-d shortcut", "eval", "1", ""),
        ("preact basic", "eval", "layer2.0", ""),
        ("densenet", "eval", "features.denseblock1.denselayer1", ""),
    ],
)
def test_the_report_names_what_stays_eager(network, mode, path, reason):
    record = records(fused_resnet.fuse(build(network).train(mode == "train")))[path]
    assert record.fused
    assert record.reason == reason


def replaced(path, module):
    def change(model):
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


def hooked(path):
    return lambda model: model.get_submodule(path).register_forward_hook(
        lambda module, args, output: output * 0.5
    )


LAYER = "features.denseblock1.denselayer1"
CHANGES = {
    "preact norm": (
        "preact basic",
        "layer1.0",
        replaced("layer1.0.bn1", nn.GroupNorm(4, 64)),
        "bn1",
    ),
    "preact act": ("preact basic", "layer1.0", replaced("layer1.0.relu", nn.GELU()), "GELU"),
    "preact last convolution": (
        "preact basic",
        "layer1.0",
        replaced("layer1.0.conv2", nn.Identity()),
        "conv2 is an Identity",
    ),
    "preact hook": (
        "preact bottleneck",
        "layer2.1",
        hooked("layer2.1.conv3"),
        "conv3 carries hooks",
    ),
    "dense norm": ("densenet", LAYER, replaced(f"{LAYER}.norm2", nn.Identity()), "norm2"),
    "dense act": ("densenet", LAYER, replaced(f"{LAYER}.relu1", nn.SiLU()), "relu1 is a SiLU"),
    "dense hook": ("densenet", LAYER, hooked(f"{LAYER}.norm1"), "norm1 carries hooks"),
    "transition": (
        "densenet",
        "features.transition1",
        lambda model: model.features.transition1.append(nn.Hardtanh()),
        "its children are",
    ),
    "memory_efficient": (
        "densenet",
        LAYER,
        lambda model: setattr(model.get_submodule(LAYER), "memory_efficient", True),
        "memory_efficient",
    ),
    "d2l norm": ("d2l", "1", replaced("1.bn2", nn.Identity()), "bn2 is an Identity"),
}


@pytest.mark.parametrize("when", ["before fuse", "after fuse"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_fused_computes_what_it_did(change, when):
    """It is named in the report with the attribute that stopped it."""
    network, path, apply, word = CHANGES[change]
    eager = build(network).train(change == "memory_efficient")
    fused = copy.deepcopy(eager)
    if when == "after fuse":
        fused_resnet.fuse(fused)
    apply(eager)
    apply(fused)
    fused_resnet.fuse(fused)
    record = records(fused)[path]
    assert not record.fused
    assert word in record.reason
    x = image_batch(3, 48).requires_grad_()
    torch.testing.assert_close(fused(x), eager(x), rtol=2e-4, atol=2e-4)


@pytest.mark.quick
def test_lazy_blocks_are_fused_from_the_second_call_on():
    """Whose number of channels nobody knows before the first."""
    fused = fused_resnet.fuse(nn.Sequential(models.Residual(8, True, 2), models.Residual(8)))
    for record in fused_resnet.report(fused):
        assert not record.fused
        assert "LazyConv2d" in record.reason
    x = image_batch(2, 16)
    first = fused(x)
    assert all(record.fused for record in fused_resnet.report(fused))
    fused_resnet.unfuse(fused)
    for norm in (m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
    torch.testing.assert_close(fused(x), first, rtol=1e-4, atol=1e-4)


def test_frozen_norms():
    """FrozenBatchNorm2d in place of every batch norm, the one without a convolution included."""

    def freeze(module):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                frozen = FrozenBatchNorm2d(child.num_features)
                frozen.load_state_dict(
                    {n: t for n, t in child.state_dict().items() if n != "num_batches_tracked"}
                )
                setattr(module, name, frozen)
            else:
                freeze(child)

    for network in ("preact basic", "densenet"):
        eager = build(network)
        freeze(eager)
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        assert all(record.fused for record in fused_resnet.report(fused))
        x = image_batch(2, 48)
        with torch.no_grad():
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))
            # Their float32 parameters make 16-bit tensors float32, fused or not.
            with torch.autocast("cpu", torch.bfloat16):
                ours, theirs = fused(x), eager(x)
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("network", ["preact bottleneck", "densenet"])
def test_16_bit(network, dtype):
    eager = build(network).to(dtype)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 48, dtype)
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "network",
    [
        "preact bottleneck",
        "stochastic depth",
        "densenet",
        pytest.param("d2l", marks=pytest.mark.whole),
        pytest.param("resnet-d shortcut", marks=pytest.mark.whole),
    ],
)
@pytest.mark.single
def test_tracers(network):
    """torch.compile's front end in one graph, torch.export, TorchScript, fx, make_fx."""
    eager = build(network)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 48)
    with torch.no_grad():
        expected, exact = eager(x), double_copy(eager)(x.double())
        program = torch.export.export(fused, (x,))
        assert any("fused_resnet.conv_bn_act" in str(node.target) for node in program.graph.nodes)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch._dynamo.mark_dynamic(x, 0)
        made = torch.fx.experimental.proxy_tensor.make_fx(fused)(x)
        assert any("fused_resnet.conv_bn_act" in str(node.target) for node in made.graph.nodes)
        for run in (program.module(), compiled, torch.jit.script(fused), made):
            assert_error_rule(run(x), expected, exact)
    torch._dynamo.reset()
    ours, theirs = torch.fx.symbolic_trace(fused), torch.fx.symbolic_trace(eager)
    assert [n.name for n in ours.graph.nodes] == [n.name for n in theirs.graph.nodes]


@pytest.mark.parametrize("network", ["preact basic", "d2l", "squeeze and excitation", "densenet"])
def test_pickles(network, tmp_path):
    model = fused_resnet.fuse(build(network))
    x = image_batch(2, 48)
    twin = pickle.loads(pickle.dumps(model))
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        assert_same_bits(twin(x), model(x))


def test_fused_classes_keep_their_names():
    """A pickle names them; one made by this version has to load in the next."""
    families.load()
    names = {
        f"{form.fused.__module__}.{form.fused.__qualname__}"
        for form in forms.registered()
        if "timm" not in form.fused.__module__
    }
    assert names == {
        "fused_resnet.blocks.BasicBlock",
        "fused_resnet.blocks.Bottleneck",
        "fused_resnet.blocks.CifarResNet",
        "fused_resnet.blocks.PlainBlock",
        "fused_resnet.blocks.ResNet",
        "fused_resnet.families.densenet.DenseLayer",
        "fused_resnet.families.densenet.DenseNet",
        "fused_resnet.families.densenet.Transition",
        "fused_resnet.families.models.PreActBasicBlock",
        "fused_resnet.families.models.PreActBottleneck",
        "fused_resnet.families.models.Residual",
        "fused_resnet.families.models.ResidualBlock",
    }


def test_a_pickle_of_a_dense_layer_loads_in_a_fresh_process(tmp_path):
    torch.save(fused_resnet.fuse(build("densenet")), tmp_path / "model.pt")
    run_python(
        f"""
        import torch
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        import fused_resnet
        assert all(record.fused for record in fused_resnet.report(model))
        with torch.no_grad():
            assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
        """
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.preact_resnet(20), "depth is 20, must be one of 18"),
        (lambda: models.ResidualBlock(8, 16), "needs use_projection"),
        (lambda: models.ResidualBlock(8, 8, strides=2), "needs use_projection"),
        (lambda: models.ResidualBlock(8, 8, se_ratio=2.0), "se_ratio is 2.0"),
        (
            lambda: models.ResidualBlock(8, 8, stochastic_depth_drop_rate=1.0),
            "stochastic_depth_drop_rate is 1.0",
        ),
    ],
)
def test_arguments_that_do_not_fit(build, message):
    with pytest.raises(ValueError, match=message):
        build()
