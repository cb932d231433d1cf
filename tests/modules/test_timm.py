"""timm's residual networks: the error rule, what stays eager and why, and timm's absence."""

import copy
import pickle
import warnings
from collections import defaultdict

import pytest
import torch
from support import (
    Decisions,
    assert_gradients_by_error_rule,
    assert_same_bits,
    assert_step_in_float64,
    double_copy,
    image_batch,
    parameter_gradients,
    run_python,
)
from torch import nn

import fused_resnet
from fused_resnet.testing import FACTOR, assert_error_rule, randomize_, relative_error

timm = pytest.importorskip("timm", reason="timm is not installed: pip install '.[test]'")
from timm.layers import BatchNormAct2d, BlurPool2d, SEModule  # noqa: E402
from timm.models.resnet import BasicBlock, Bottleneck, ResNet  # noqa: E402

from fused_resnet.families import timm as family  # noqa: E402

MODELS = [
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "wide_resnet50_2",
    "resnet50d",
    "seresnet50",
    "resnetblur50",
]

# Small networks, one for each thing a block or a stem may have besides convolutions.
VARIANTS = {
    "plain": {},
    "bottleneck": {"block": Bottleneck},
    "deep stem": {"stem_type": "deep", "stem_width": 32},
    "tiered stem": {"stem_type": "deep_tiered", "stem_width": 32},
    "convolution for max-pool": {"replace_stem_pool": True},
    "average-pool shortcut": {"avg_down": True},
    "3x3 shortcut": {"down_kernel_size": 3, "block_reduce_first": 2},
    "dilated": {"output_stride": 8, "avg_down": True},
    "anti-aliased": {"block": Bottleneck, "aa_layer": BlurPool2d},
    "average anti-aliased": {"aa_layer": nn.AvgPool2d},
    "squeeze and excitation": {"block_args": {"attn_layer": "se"}},
    "efficient attention": {"block": Bottleneck, "block_args": {"attn_layer": "eca"}},
    "drop path": {"drop_path_rate": 0.5},
    "drop block": {"block": Bottleneck, "drop_block_rate": 0.3},
    "everything": {
        "block": Bottleneck,
        "stem_type": "deep",
        "stem_width": 32,
        "avg_down": True,
        "aa_layer": BlurPool2d,
        "drop_path_rate": 0.5,
        "drop_block_rate": 0.3,
        "block_args": {"attn_layer": "se"},
    },
}


SMALL = {
    "block": BasicBlock,
    "layers": (1, 2, 1, 1),
    "channels": (16, 32, 48, 64),
    "num_classes": 10,
}


def build(variant):
    torch.manual_seed(1)
    return randomize_(ResNet(**SMALL | VARIANTS[variant]), seed=2).eval()


def create(name, **arguments):
    torch.manual_seed(1)
    model = timm.create_model(name, pretrained=False, num_classes=10, **arguments)
    return randomize_(model, seed=2).eval()


def records(model):
    return {record.path: record for record in fused_resnet.report(model)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.single
def test_models_in_evaluation(name):
    """By the error rule; every block and the stem is fused. The large ones are not as deep."""
    eager = create(name, **({} if name in ("resnet18", "resnet50") else {"layers": (1, 2, 2, 1)}))
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    blocks = [m for m in eager.modules() if isinstance(m, (BasicBlock, Bottleneck, ResNet))]
    assert sum(record.fused for record in fused_resnet.report(fused)) == len(blocks)
    assert list(fused.state_dict()) == list(eager.state_dict())
    x = image_batch(2, 64)
    with torch.inference_mode():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "resnet50d"])
def test_models_in_training(name):
    """Output and gradients by the error rule, of fewer and narrower blocks."""
    eager = create(name, layers=(1, 1, 2, 1), channels=(32, 64, 64, 96)).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert_gradients_by_error_rule(fused, eager, image_batch(4, 48))


def test_gradients_around_attention():
    """By the error rule over many draws: attention's own are sums of a few values, so unsteady."""
    errors = defaultdict(lambda: {"fused": [], "eager": []})
    for seed in range(24):
        torch.manual_seed(seed)
        eager = randomize_(Bottleneck(64, 16, attn_layer=SEModule), seed).train()
        x = torch.randn(4, 64, 8, 8).to(memory_format=torch.channels_last)
        models = {"fused": fused_resnet.fuse(copy.deepcopy(eager)), "eager": eager}
        for name, model in models.items():
            exact = double_copy(model)
            with Decisions() as decisions:
                out, gradients = parameter_gradients(model, x)
            with Decisions(decisions.record):
                exact_out, exact_gradients = parameter_gradients(exact, x.double())
            errors["output"][name].append(relative_error(out, exact_out))
            for tensor, gradient in gradients.items():
                error = relative_error(gradient, exact_gradients[tensor])
                errors["se" if tensor.startswith("se.") else tensor][name].append(error)
    assert len(errors) == 12
    for tensor, found in errors.items():
        ours, theirs = (
            sum(error**2 for error in found[name]) ** 0.5 for name in ("fused", "eager")
        )
        assert ours <= FACTOR * theirs, f"{tensor}: {ours:.3g}, eager has {theirs:.3g}"


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, mode):
    """Outputs, gradients and statistics in float64, where a wrong formula shows."""
    eager = build(variant).double().train(mode == "train")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert all(record.fused for record in fused_resnet.report(fused))
    x = image_batch(4, 64).double()
    assert_step_in_float64(fused, eager, x, gradients=1e-8, buffers=1e-10)


@pytest.mark.parametrize(
    ("variant", "mode", "path", "reason"),
    [
        ("plain", "train", "layer2.0", ""),
        ("squeeze and excitation", "eval", "layer2.0", "se is a SEModule"),
        ("drop path", "train", "layer4.0", "drop_path is a DropPath"),
        ("drop path", "eval", "layer4.0", ""),
        ("drop block", "train", "layer4.0", "drop_block is a DropBlock2d"),
        ("drop block", "eval", "layer4.0", ""),
        ("anti-aliased", "eval", "layer2.0", "aa is a BlurPool2d"),
        ("anti-aliased", "eval", "layer2.1", ""),
        ("anti-aliased", "eval", "", "maxpool is a Sequential"),
        ("average-pool shortcut", "eval", "layer2.0", "downsample.0 is an AvgPool2d"),
        ("average-pool shortcut", "eval", "layer1.0", ""),
        ("deep stem", "eval", "", ""),
    ],
)
def test_the_report_names_what_stays_eager(variant, mode, path, reason):
    """And what was idle anyway is not in it."""
    model = fused_resnet.fuse(build(variant).train(mode == "train"))
    record = records(model)[path]
    assert record.fused
    assert record.reason == reason


@pytest.mark.parametrize(
    ("arguments", "path", "word"),
    [
        ({"act_layer": nn.Mish}, "layer1.0", "act1 is a Mish"),
        ({"act_layer": nn.Mish, "stem_type": "deep", "stem_width": 32}, "", "conv1.2 is a Mish"),
        (
            {"norm_layer": "groupnorm", "channels": (32, 32, 64, 64)},
            "layer2.0",
            "bn1 is a GroupNorm",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_has_no_fused_form_is_left_alone(arguments, path, word):
    torch.manual_seed(1)
    eager = randomize_(ResNet(**SMALL | arguments), seed=2).eval()
    model = fused_resnet.fuse(copy.deepcopy(eager))
    # Convolutions and norms in a Sequential are something else.
    for ours, theirs in zip(model.modules(), eager.modules(), strict=True):
        assert type(ours) is type(theirs) or type(theirs) is nn.Sequential
    record = records(model)[path]
    assert not record.fused
    assert word in record.reason
    x = image_batch(2, 40)
    with torch.no_grad():
        assert_error_rule(model(x), eager(x), double_copy(eager)(x.double()))


def test_batch_norm_with_an_activation_of_its_own():
    """timm's BatchNormAct2d is a BatchNorm2d by class, and computes more."""
    eager = build("bottleneck")
    eager.layer1[0].bn3 = randomize_(nn.Sequential(BatchNormAct2d(64)), seed=5)[0].eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert records(fused)["layer1.0"].reason == "bn3 is a BatchNormAct2d"
    x = image_batch(2, 40)
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.parametrize(
    "site", ["layer2.0.se", "layer2.0.aa", "layer2.0.drop_path", "layer1.0.aa"]
)
def test_hooks_on_what_is_between_convolutions(site):
    """They fire, on attention and on what does nothing, without stopping the convolutions."""
    eager = build("everything")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    calls = []
    for model in (eager, fused):
        model.get_submodule(site).register_forward_hook(lambda m, args, out: calls.append(out))
    x = image_batch(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    torch.testing.assert_close(*calls, rtol=1e-4, atol=1e-4)
    assert records(fused)[site.rpartition(".")[0]].fused


@pytest.mark.parametrize("site", ["conv1", "conv1.4", "act1", "layer2.0.conv2", "layer2.0.act3"])
def test_hooks_on_convolutions(site):
    eager = build("everything")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    calls = []
    for model in (eager, fused):
        model.get_submodule(site).register_forward_hook(
            lambda m, args, out: calls.append(out.clone())
        )
    x = image_batch(2, 64)
    with torch.no_grad():
        fused(x)
        eager(x)
    torch.testing.assert_close(*calls, rtol=1e-4, atol=1e-4)
    path = "layer2.0" if site.startswith("layer2") else ""
    assert f"{site.removeprefix('layer2.0.')} carries hooks" in records(fused)[path].reason


def test_features_only():
    """timm's extractor takes the children out of the network; its blocks and stem are fused."""
    eager = create("resnet18", features_only=True)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert sum(record.fused for record in fused_resnet.report(fused)) == 9
    x = image_batch(2, 64)
    with torch.no_grad():
        for ours, theirs, exact in zip(
            fused(x), eager(x), double_copy(eager)(x.double()), strict=True
        ):
            assert_error_rule(ours, theirs, exact)


def test_intermediates_and_gradient_checkpointing():
    """The stem then runs as timm's, and the blocks stay fused."""
    eager = build("bottleneck").double()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 64).double()
    with torch.no_grad():
        ours, theirs = fused.forward_intermediates(x), eager.forward_intermediates(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    eager.train()
    fused.train().set_grad_checkpointing()
    out, gradients = parameter_gradients(fused, x)
    expected, expected_gradients = parameter_gradients(eager, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().item() or 1.0
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-8 * scale, msg=name)


def test_frozen_by_timm():
    """timm's own freezing puts FrozenBatchNorm2d into the blocks."""
    from timm.utils import freeze

    eager = build("bottleneck")
    freeze(eager)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert all(record.fused for record in fused_resnet.report(fused))
    x = image_batch(2, 64)
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tracers():
    """torch.export, torch.compile's front end in one graph, TorchScript, fx extraction."""
    eager = build("everything")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 64)
    with torch.no_grad():
        expected, exact = eager(x), double_copy(eager)(x.double())
        program = torch.export.export(fused, (x,))
        assert any("fused_resnet.conv_bn_act" in str(node.target) for node in program.graph.nodes)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch._dynamo.mark_dynamic(x, 0)
        for run in (program.module(), torch.jit.script(fused), compiled):
            assert_error_rule(run(x), expected, exact)
    torch._dynamo.reset()
    from torchvision.models.feature_extraction import create_feature_extractor

    eager = build("anti-aliased")  # timm's drop block cannot be traced by fx, fused or not
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    nodes = ["maxpool", "layer2.0.aa", "layer3"]
    with torch.no_grad():
        ours, theirs = (create_feature_extractor(m, nodes)(x) for m in (fused, eager))
    for node in nodes:
        torch.testing.assert_close(ours[node], theirs[node], rtol=1e-4, atol=1e-4)


def test_pickles(tmp_path):
    """A fused model loads in a process that has imported neither library, and stays what it was."""
    model = fused_resnet.fuse(build("everything"))
    x = image_batch(2, 64)
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin.layer1[0]) is family.Bottleneck
    with torch.no_grad():
        expected = model(x)
        assert_same_bits(twin(x), expected)
    torch.save({"model": model, "x": x, "expected": expected}, tmp_path / "model.pt")
    run_python(
        f"""
        import torch
        torch.set_num_threads(2)
        saved = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        with torch.no_grad():
            assert torch.equal(saved["model"](saved["x"]), saved["expected"])
        import fused_resnet
        from timm.models.resnet import Bottleneck
        assert type(fused_resnet.unfuse(saved["model"]).layer1[0]) is Bottleneck
        """
    )
    fused_resnet.unfuse(model)
    assert type(model) is ResNet
    assert type(model.layer1[0]) is Bottleneck


@pytest.mark.ahead(
    lambda: run_python(
        """
        import sys
        sys.modules["timm"] = None
        import torch, torchvision, fused_resnet
        model = fused_resnet.fuse(torchvision.models.resnet18())
        assert fused_resnet.report(model)[0].fused
        assert "fused_resnet.families.timm" not in sys.modules
        """
    )
)
def test_timm_is_not_imported_for_others(ahead):
    """Nor looked for: a model of torchvision's is fused where importing timm fails."""
    ahead()


def test_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = fused_resnet.fuse(build("everything"))
        with torch.no_grad():
            model(image_batch(2, 64))
        str(fused_resnet.report(model))
