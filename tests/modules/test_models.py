"""Every supported torchvision model, and every way torchvision lets one be built."""

import copy
import functools
import io

import pytest
import torch
import torchvision
from support import (
    BLOCKS,
    EVERY_MODEL,
    assert_errors_by_rule,
    assert_gradients_by_error_rule,
    assert_same_bits,
    assert_step_in_float64,
    double_copy,
    dtype_id,
    gradient_errors,
    image_batch,
    run_python,
    small_resnet,
)
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import functional
from fused_resnet.ops import gradients
from fused_resnet.testing import assert_error_rule, randomize_

BF16_AND_FP32 = [torch.float32, torch.bfloat16]

# Of one block a stage: the layers of networks that run with `--whole` alone.
SHORT = {
    "short resnext": {"groups": 32, "width_per_group": 4},
    "short wide resnet": {"width_per_group": 128},
}
NETWORKS = [*EVERY_MODEL, *SHORT]


def build(name, dtype=torch.float32, **arguments):
    """The network with seeded random weights and statistics, in eval mode."""
    if name in SHORT:
        model = ResNet(Bottleneck, [1, 1, 1, 1], **SHORT[name], **arguments)
    else:
        model = getattr(torchvision.models, name)(**arguments)
    randomize_(model, seed=2)
    return model.to(dtype).eval()


@pytest.mark.parametrize("dtype", BF16_AND_FP32, ids=dtype_id)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.single
def test_inference(name, dtype):
    """Fused against eager by the error rule, channels_last, on the backend a user gets."""
    eager = build(name, dtype).to(memory_format=torch.channels_last)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 64, dtype)
    with torch.inference_mode():
        reference = double_copy(eager)(x.double())
        assert_error_rule(fused(x), eager(x), reference)
        assert_same_bits(fused(x), fused(x), "second call")


def statistics(model):
    """The running means and variances, in order."""
    return {n: b for n, b in model.named_buffers() if not n.endswith("num_batches_tracked")}


@pytest.mark.pairs
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", BF16_AND_FP32, ids=dtype_id)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.single
def test_gradients(name, dtype, mode):
    """Gradients of every parameter and of the input by the error rule."""
    eager = build(name, dtype).train(mode == "train")
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert_gradients_by_error_rule(fused, eager, image_batch(4, 64, dtype))


def network_and_images(dtype):
    """An unfused network, and images."""
    torch.manual_seed(4)
    return small_resnet().to(dtype), image_batch(4, 64, dtype)


@functools.cache
def errors_of_eager(dtype):
    return gradient_errors(*network_and_images(dtype))


@pytest.mark.parametrize("dtype", BF16_AND_FP32, ids=dtype_id)
@pytest.mark.parametrize("layer", ["layer1.0.conv2", "layer3.0.conv1", "layer4.0.downsample.0"])
@pytest.mark.single
def test_the_rule_for_gradients_sees_a_fault_of_one_weight(monkeypatch, layer, dtype):
    """One part in 64 in 16 bits, whose roundings are half as large, and in 2^18 in float32."""
    eager, x = network_and_images(dtype)
    fused = fused_resnet.fuse(eager)
    assert_errors_by_rule(gradient_errors(fused, x), errors_of_eager(dtype))
    planted, right = fused.get_submodule(layer).weight, gradients.conv2d_backward
    wrong_by = 2**-6 if dtype is torch.bfloat16 else 2**-18

    def conv2d_backward(grad, input, weight, *arguments):
        grad_input, grad_weight, grad_bias = right(grad, input, weight, *arguments)
        if weight.data_ptr() == planted.data_ptr():
            grad_weight = grad_weight * (1 + wrong_by)
        return grad_input, grad_weight, grad_bias

    monkeypatch.setattr(gradients, "conv2d_backward", conv2d_backward)
    with pytest.raises(AssertionError, match=rf"{layer}\.weight: relative error"):
        assert_errors_by_rule(gradient_errors(fused, x), errors_of_eager(dtype))


@pytest.mark.parametrize("dtype", BF16_AND_FP32, ids=dtype_id)
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.single
def test_running_statistics(name, dtype):
    """A forward pass in train mode updates every buffer as eager does."""
    eager = build(name, dtype).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    exact = double_copy(eager)
    x = image_batch(4, 64, dtype)
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), exact(x.double()))
    expected, reference = statistics(eager), statistics(exact)
    for buffer, actual in statistics(fused).items():
        assert_error_rule(actual, expected[buffer], reference[buffer], what=buffer)
    for buffer, actual in fused.named_buffers():
        if buffer.endswith("num_batches_tracked"):
            assert actual == 1, buffer


@pytest.mark.whole_model
@pytest.mark.quick
@pytest.mark.parametrize("dtype", BF16_AND_FP32, ids=dtype_id)
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_quick_inference(backend, name, dtype):
    eager = build(name, dtype).to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = image_batch(2, 64, dtype).to(backend.device).to(memory_format=memory_format)
        with torch.no_grad():
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.parametrize("size", [33, 75, 224])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.single
def test_image_sizes(name, size):
    """Odd sizes reach every border case of the strided layers."""
    eager = build(name)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(1, size)[..., : size - 2]
    with torch.inference_mode():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.quick
def test_empty_batch(backend):
    for block in BLOCKS.values():
        eager = small_resnet(block).to(backend.device)
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        x = image_batch(1, 32)[:0].to(backend.device)
        with torch.no_grad():
            assert fused(x).shape == eager(x).shape == (0, 100)


VARIANTS = {
    "replace_stride_with_dilation": {"replace_stride_with_dilation": [False, True, True]},
    "zero_init_residual": {"zero_init_residual": True},
    "FrozenBatchNorm2d": {"norm_layer": FrozenBatchNorm2d},
    "GroupNorm": {"norm_layer": functools.partial(nn.GroupNorm, 8)},
    "InstanceNorm2d": {"norm_layer": nn.InstanceNorm2d},
    "Identity": {"norm_layer": nn.Identity},
    "affine=False": {},  # torchvision's constructor initialises weights, so they go afterwards
    "track_running_stats=False": {
        "norm_layer": functools.partial(nn.BatchNorm2d, track_running_stats=False)
    },
    "momentum=None": {"norm_layer": functools.partial(nn.BatchNorm2d, momentum=None)},
    "momentum=0.5 eps=1e-2": {
        "norm_layer": functools.partial(nn.BatchNorm2d, momentum=0.5, eps=1e-2)
    },
    "groups and width": {"groups": 4, "width_per_group": 8},
}
UNFUSED_NORMS = {"GroupNorm", "InstanceNorm2d", "Identity"}


def build_variant(variant):
    """A small Bottleneck ResNet built with the variant's arguments."""
    torch.manual_seed(4)
    if variant == "zero_init_residual":
        model = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=100, zero_init_residual=True)
        assert not any(m.bn3.weight.any() for m in model.modules() if isinstance(m, Bottleneck))
        return model.eval()
    if variant in UNFUSED_NORMS:
        return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=100, **VARIANTS[variant]).eval()
    model = small_resnet(Bottleneck, **VARIANTS[variant])
    if variant == "affine=False":
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight = module.bias = None
                module.affine = False
    return model


@pytest.mark.pairs
@pytest.mark.whole_model
@pytest.mark.parametrize("dtype", BF16_AND_FP32, ids=dtype_id)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.single
def test_variants(backend, variant, mode, dtype):
    """Outputs and running statistics by the error rule; the report says what was left alone."""
    eager = build_variant(variant).to(dtype).train(mode == "train").to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    exact = double_copy(eager)
    x = image_batch(4, 48, dtype).to(backend.device)
    for _ in range(2):
        with torch.no_grad():
            assert_error_rule(fused(x), eager(x), exact(x.double()))
    for (name, ours), theirs, reference in zip(
        fused.named_buffers(), eager.buffers(), exact.buffers(), strict=True
    ):
        if name.endswith("num_batches_tracked"):
            assert torch.equal(ours, theirs), name
        else:
            assert_error_rule(ours, theirs, reference)
    records = {r.path: r for r in fused_resnet.report(fused)}
    for path in ("layer1.0", "layer4.0"):
        if variant in UNFUSED_NORMS:
            kind = {"Identity": "Identity"}.get(variant, variant)
            assert not records[path].fused
            assert kind in records[path].reason
        else:
            assert records[path].fused, records[path].reason


@pytest.mark.whole_model
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
@pytest.mark.single
def test_gradients_of_variants(backend, variant, mode):
    """In float64, where a wrong formula shows."""
    eager = build_variant(variant).double().train(mode == "train").to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(3, 40).double().to(backend.device)
    assert_step_in_float64(fused, eager, x, outputs=1e-11, buffers=1e-12)


@pytest.mark.single
def test_momentum_none_is_a_cumulative_average(backend):
    """Three different batches weigh equally, and the counter counts them."""
    eager = build_variant("momentum=None").double().train().to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for seed in range(3):
        x = image_batch(4, 32, seed=seed).double().to(backend.device)
        fused(x)
        eager(x)
    assert fused.layer1[0].bn1.num_batches_tracked == 3
    for (name, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.single
def test_blocks_take_torchvisions_constructor_arguments(backend):
    """`ResNet(fused_resnet.Bottleneck, ...)` is the fused model."""
    for name, block in BLOCKS.items():
        ours = {"basic": fused_resnet.BasicBlock, "bottleneck": fused_resnet.Bottleneck}[name]
        eager = small_resnet(block).to(backend.device)
        built = ResNet(ours, [1, 1, 1, 1], num_classes=100).eval().to(backend.device)
        built.load_state_dict(eager.state_dict(), strict=True)
        assert isinstance(built.layer1[0], block)
        assert type(built.layer1[0]) is ours
        x = image_batch(4, 32).to(backend.device)  # one image's error is luck
        with torch.no_grad():
            assert_error_rule(built(x), eager(x), double_copy(eager)(x.double()))
            same = fused_resnet.fuse(copy.deepcopy(eager)).layer1
            features = torch.randn(2, 64, 8, 8, device=backend.device)
            assert_same_bits(built.layer1(features), same(features))
    whole = fused_resnet.ResNet(fused_resnet.BasicBlock, [1, 1, 1, 1], num_classes=100).eval()
    eager = small_resnet(BLOCKS["basic"])
    whole.load_state_dict(eager.state_dict(), strict=True)
    with torch.no_grad():
        x = image_batch(2, 40)
        assert_error_rule(whole(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.parametrize(
    "arguments",
    [
        {"groups": 2, "error": ValueError},
        {"dilation": 2, "error": NotImplementedError},
        {"base_width": 32, "error": ValueError},
    ],
    ids=lambda a: next(iter(a)),
)
def test_basic_block_refuses_what_torchvisions_refuses(arguments):
    error = arguments.pop("error")
    with pytest.raises(error):
        fused_resnet.BasicBlock(64, 64, **arguments)


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
@pytest.mark.single
def test_models_built_around_a_resnet(name):
    """A segmentation model takes the layers without the ResNet class; its blocks still fuse."""
    model = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None)
    randomize_(model, seed=3)
    eager = model.eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert sum(record.fused for record in fused_resnet.report(fused)) >= 16
    x = image_batch(1, 48)
    with torch.inference_mode():
        assert_error_rule(fused(x)["out"], eager(x)["out"], double_copy(eager)(x.double())["out"])


def test_detection_backbone():
    """FrozenBatchNorm2d inside a feature pyramid."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    eager = resnet_fpn_backbone(backbone_name="resnet18", weights=None)
    randomize_(eager, seed=3)
    eager = eager.eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert sum(record.fused for record in fused_resnet.report(fused)) >= 8
    x = image_batch(1, 64)
    with torch.inference_mode():
        reference = double_copy(eager)(x.double())
        ours, theirs = fused(x), eager(x)
    for level in reference:
        assert_error_rule(ours[level], theirs[level], reference[level])


def test_layer_outputs_belong_to_the_caller():
    """What hooks on blocks and stages collected is not overwritten by later layers or calls."""
    model = fused_resnet.fuse(small_resnet(Bottleneck, layers=2))
    kept = []

    def keep(module, args, output):
        kept.append((output, output.clone(), args[0], args[0].clone()))

    for module in [*model.layer1, *model.layer2, *model.layer3, *model.layer4, model.layer2]:
        module.register_forward_hook(keep)
    with torch.inference_mode():
        for seed in range(3):
            model(image_batch(2, 48, seed=seed))
    assert len(kept) == 27
    for output, output_copy, argument, argument_copy in kept:
        assert_same_bits(output, output_copy, "block output")
        assert_same_bits(argument, argument_copy, "block input")


def test_outputs_are_ordinary_tensors():
    """They save as many bytes as they have, share their memory, and go to numpy and back."""
    block = fused_resnet.fuse(small_resnet()).layer1[0]
    x = torch.randn(2, 64, 8, 8)
    with torch.no_grad():
        out = block(x)
        expected = out.clone()
        file = io.BytesIO()
        torch.save(out, file)
        assert len(file.getvalue()) < 4 * out.numel() + 8192
        assert out._version == 0
        assert out.storage_offset() == 0
        assert_same_bits(torch.from_dlpack(out.detach()), expected)
        array = out.numpy()
        del out
        block(x)
        assert_same_bits(torch.from_numpy(array), expected)
        assert_same_bits(block(x).share_memory_(), expected)
        assert_same_bits(block(x).mul_(2.0).div_(2.0), expected)
    assert_same_bits(block(x.clone().requires_grad_()).detach().relu_(), expected)


def test_without_mkldnn():
    """oneDNN switched off: slower, the same numbers."""
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with torch.backends.mkldnn.flags(enabled=False), torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


def test_blocks_leave_their_input_alone():
    """The identity shortcut most of all."""
    for block in BLOCKS.values():
        model = fused_resnet.fuse(small_resnet(block, layers=2))
        expansion = block.expansion
        for memory_format in (torch.channels_last, torch.contiguous_format):
            for layer, channels in ((model.layer1[0], 64), (model.layer1[1], 64 * expansion)):
                x = torch.randn(2, channels, 9, 9).to(memory_format=memory_format)
                before = x.clone()
                version = x._version
                with torch.inference_mode():
                    out = layer(x)
                assert_same_bits(x, before, "input")
                assert x._version == version
                assert out.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("dtype", BF16_AND_FP32, ids=dtype_id)
@pytest.mark.ahead(
    lambda dtype: run_python(
        f"""
        import torch, fused_resnet, support
        model = fused_resnet.fuse(support.small_resnet()).to({dtype})
        sizes = (32, 48, 40, 64)
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        with torch.inference_mode():
            for i in range(24):
                model(support.image_batch(2, sizes[i % 4], {dtype}))
            before = resident()
            for i in range(100):
                model(support.image_batch(2, sizes[i % 4], {dtype}))
            print(resident() - before)
        """
    )
)
def test_memory_does_not_grow(dtype, ahead):
    """A hundred calls of changing sizes need no more memory at the end than after a few."""
    assert int(ahead()) < 8 * 2**20


@pytest.mark.quick
def test_the_functional_stem_is_the_models(backend):
    """The stem through the public function equals the module's four layers."""
    model = small_resnet(BLOCKS["basic"]).to(backend.device)
    x = image_batch(2, 37).to(backend.device)
    bn = model.bn1
    with torch.no_grad():
        ours = functional.conv_bn_act_max_pool(
            x,
            model.conv1.weight,
            bn.running_mean,
            bn.running_var,
            bn.weight,
            bn.bias,
            bn.eps,
            stride=2,
            padding=3,
            pool_kernel_size=3,
            pool_stride=2,
            pool_padding=1,
        )
        theirs = model.maxpool(model.relu(bn(model.conv1(x))))
        exact = copy.deepcopy(model).double()
        reference = exact.maxpool(exact.relu(exact.bn1(exact.conv1(x.double()))))
    assert_error_rule(ours, theirs, reference)
