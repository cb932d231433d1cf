"""The CIFAR networks of the paper: their definition, and that fusing changes nothing."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from support import (
    DTYPES,
    ConvShape,
    accumulation_dtype,
    assert_gradients_by_error_rule,
    assert_same_bits,
    double_copy,
    image_batch,
    make_conv_case,
    make_norm_conv_case,
    rerun_on_instruction_set,
    unchanged,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import resnet

import fused_resnet
from fused_resnet import backends, blocks, reference
from fused_resnet.backends import cudnn
from fused_resnet.models import cifar, cifar_resnet
from fused_resnet.modules.network import stages_forward
from fused_resnet.testing import assert_error_rule, randomize_
from fused_resnet.tuning import Choice

pytestmark = pytest.mark.quick

# Depth, parameters, and what Table 6 of the paper says in millions.
SIZES = [
    (20, 269722, 0.27),
    (32, 464154, 0.46),
    (44, 658586, 0.66),
    (56, 853018, 0.85),
    (110, 1727962, 1.7),
    (1202, 19421274, 19.4),
]
VARIANTS = {
    "A": {"shortcut": "A"},
    "B": {"shortcut": "B"},
    "C": {"shortcut": "C"},
    "plain": {"plain": True},
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def make(variant, depth=8, **arguments):
    return randomize_(cifar_resnet(depth, **VARIANTS[variant], **arguments), seed=2)


@pytest.mark.parametrize(("depth", "expected", "table"), SIZES)
def test_parameter_counts(depth, expected, table):
    """Convolutions, two values a channel of each norm, and the last layer."""
    with torch.device("meta"):
        model = cifar_resnet(depth)
    n = (depth - 2) // 6
    convolutions = 9 * (3 * 16 + 2 * n * 16**2)
    for width in (32, 64):
        convolutions += 9 * (width // 2 * width + (2 * n - 1) * width**2)
    norms = 2 * (16 + 2 * n * (16 + 32 + 64))
    assert parameters(model) == expected == convolutions + norms + 65 * 10
    assert round(expected / 1e6, 2 if table < 1 else 1) == table
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth


def test_parameter_counts_of_the_options():
    """A projection has a weight for each pair of channels and two values a channel of its norm."""
    a, b, c, plain = (parameters(cifar_resnet(20, **v)) for v in VARIANTS.values())
    projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
    others = 16 * 16 + 2 * 16 + 2 * sum(w * w + 2 * w for w in (16, 32, 64))
    assert (b, c, plain) == (a + projections, a + projections + others, a)


@pytest.mark.parametrize("depth", [2, 7, 18, 51, -4])
def test_other_depths(depth):
    with pytest.raises(ValueError, match=rf"depth is {depth}, must be 6n \+ 2"):
        cifar_resnet(depth)


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"depth is 20\.0, must be an int"):
        cifar_resnet(20.0)
    with pytest.raises(ValueError, match="shortcut is 'D', must be one of A, B, C"):
        cifar_resnet(20, shortcut="D")
    with pytest.raises(ValueError, match="out_channels is 15, must be at least in_channels, 16"):
        cifar.PaddedShortcut(16, 15, 2)


def test_shapes_of_the_stages():
    """32 x 32 with 16 channels, 16 x 16 with 32, 8 x 8 with 64, as the paper's table says."""
    model = make("A", num_classes=7).eval()
    x = model.relu(model.bn1(model.conv1(image_batch(2, 32))))
    shapes = [tuple(x.shape[1:])]
    for stage in (model.layer1, model.layer2, model.layer3):
        x = stage(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert model(image_batch(2, 32)).shape == (2, 7)
    assert make("A", in_channels=1)(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_option_a_keeps_every_second_pixel():
    x = torch.randn(2, 4, 5, 6)
    out = cifar.PaddedShortcut(4, 10, 2)(x)
    assert out.shape == (2, 10, 3, 3)
    for k in range(10):
        expected = x[:, k - 3, ::2, ::2] if 3 <= k < 7 else torch.zeros(2, 3, 3)
        assert_same_bits(out[:, k], expected)


def test_an_odd_number_of_new_channels():
    x = torch.randn(2, 4, 5, 6)
    out = cifar.PaddedShortcut(4, 9, 1)(x)
    assert_same_bits(out[:, 2:6], x)
    assert out.shape == (2, 9, 5, 6)
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_which_blocks_have_which_shortcut():
    """Option A where the shape changes, B a projection there, C everywhere, plain nowhere."""
    kinds = {}
    for name, arguments in VARIANTS.items():
        model = cifar_resnet(14, **arguments)
        kinds[name] = [
            type(getattr(block, "downsample", None)).__name__
            for stage in (model.layer1, model.layer2, model.layer3)
            for block in stage
        ]
    none, pad, projection = "NoneType", "PaddedShortcut", "Sequential"
    assert kinds == {
        "A": [none, none, pad, none, pad, none],
        "B": [none, none, projection, none, projection, none],
        "C": [projection] * 6,
        "plain": [none] * 6,
    }
    assert not any(isinstance(m, cifar.PlainBlock) for m in cifar_resnet(14).modules())
    plain = cifar_resnet(14, plain=True)
    assert sum(isinstance(m, cifar.PlainBlock) for m in plain.modules()) == 6


def test_initialisation():
    """Variance 2 / fan_in, which the last stage's 36864 weights show to a few percent."""
    model = cifar_resnet(20)
    weight = model.layer3[1].conv1.weight
    assert abs(weight.var().item() * (64 * 9) / 2 - 1) < 0.05
    assert abs(weight.mean().item()) < 4 * (2 / (64 * 9) / weight.numel()) ** 0.5
    assert not model.fc.bias.any()
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_by_the_error_rule(variant):
    eager = make(variant, 14).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = image_batch(3, 17).contiguous(memory_format=memory_format)
        with torch.no_grad():
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_in_float64(variant, training):
    eager = make(variant).double().train(training)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    results = []
    for model in (eager, fused):
        x = image_batch(3, 12, torch.float64).requires_grad_()
        model(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["A", "plain"])
def test_training_by_the_error_rule(variant):
    eager = make(variant).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    assert_gradients_by_error_rule(fused, eager, image_batch(8, 16))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", VARIANTS)
def test_fuse_and_unfuse(variant):
    model = make(variant).eval()
    types = [type(m) for m in model.modules()]
    keys = list(model.state_dict())
    fused_resnet.fuse(model)
    block = blocks.PlainBlock if variant == "plain" else blocks.BasicBlock
    assert type(model) is blocks.CifarResNet
    assert [type(b) for stage in (model.layer1, model.layer2, model.layer3) for b in stage] == [
        block
    ] * 3
    assert list(model.state_dict()) == keys
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is blocks.CifarResNet
    x = image_batch(2, 16)
    with torch.no_grad():
        assert_same_bits(again(x), model(x))
        assert_same_bits(torch.jit.script(model)(x), torch.jit.script(copy.deepcopy(model))(x))
    fused_resnet.unfuse(model)
    assert [type(m) for m in model.modules()] == types


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_report(variant):
    model = make(variant).eval()
    assert not any(record.fused for record in fused_resnet.report(model))
    report = fused_resnet.report(fused_resnet.fuse(model))
    kinds = ["stem"] + ["PlainBlock" if variant == "plain" else "BasicBlock"] * 3
    assert [record.kind for record in report] == kinds
    assert all(record.fused for record in report)


def test_hooks_keep_a_block_from_fusing():
    model = fused_resnet.fuse(make("plain")).eval()
    seen = []
    model.layer1[0].bn2.register_forward_hook(lambda *_: seen.append("norm"))
    model.conv1.register_forward_hook(lambda *_: seen.append("stem"))
    with torch.no_grad():
        model(image_batch(1, 16))
    assert seen == ["stem", "norm"]
    reasons = {r.path: r.reason for r in fused_resnet.report(model) if not r.fused}
    assert reasons == {"": "conv1 carries hooks", "layer1.0": "bn2 carries hooks"}


@pytest.mark.parametrize("variant", ["A", "plain"])
@pytest.mark.single
def test_no_graph_breaks(variant):
    model = fused_resnet.fuse(make(variant)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = image_batch(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_network_by_hand():
    """Option A's network written down with functions, from the paper's text."""
    model = make("A", 14).double().eval()
    x = image_batch(2, 12, torch.float64)

    def conv_bn(conv, norm, x):
        x = F.conv2d(x, conv.weight, None, conv.stride, 1)
        x = (x - norm.running_mean[:, None, None]) / (
            norm.running_var[:, None, None] + norm.eps
        ).sqrt()
        return x * norm.weight[:, None, None] + norm.bias[:, None, None]

    h = conv_bn(model.conv1, model.bn1, x).relu()
    for index, stage in enumerate((model.layer1, model.layer2, model.layer3)):
        for number, block in enumerate(stage):
            inner = conv_bn(block.conv1, block.bn1, h).relu()
            shortcut = h
            if index > 0 and number == 0:
                zeros = torch.zeros_like(h[:, : h.size(1) // 2, ::2, ::2])
                shortcut = torch.cat([zeros, h[:, :, ::2, ::2], zeros], 1)
            h = (conv_bn(block.conv2, block.bn2, inner) + shortcut).relu()
    expected = F.linear(h.mean((2, 3)), model.fc.weight, model.fc.bias)
    for network in (model, fused_resnet.fuse(model)):
        with torch.no_grad():
            torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)


# Output channels, the residual's, and whether its pixels and channels are dense. Blocks of a kernel
# have 16 or 32 channels: all, some or none of one have a residual.
NARROW = [
    (32, 16, True),
    (64, 32, True),
    (96, 32, True),
    (160, 32, True),
    (64, 62, True),
    (48, 2, False),
    (29, 13, True),
    (33, 16, True),
    (40, 1, False),
    (64, 20, False),
]


def assert_narrow_like_padded(K, channels, subsampled, memory_format, device, geometries):
    for filter, padding, stride, groups in geometries:
        shape = ConvShape(
            2 * channels, K, filter, (stride, stride), (padding, padding), groups=groups
        )
        case = make_conv_case(shape, size=(9, 7), residual=False, device=device)
        P, Q = case.eager().shape[2:]
        narrow = torch.randn(2, channels, 2 * P, 2 * Q, device=device)
        narrow = narrow.contiguous(memory_format=memory_format)
        narrow = narrow[:, :, ::2, ::2] if subsampled else narrow[:, :, :P, -Q:]
        for dtype in (torch.float32, torch.bfloat16):
            for activation in ("relu", "none"):
                low = case.map(lambda t, dtype=dtype: t.to(dtype))
                low.activation = activation
                low.residual = reference.pad_channels(narrow.to(dtype), K)
                assert low.residual.shape[1] == K
                expected = low.fused()
                low.residual = narrow.to(dtype)
                with unchanged(residual=low.residual):
                    assert torch.equal(low.fused(), expected)


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"]
)
@pytest.mark.parametrize(("K", "channels", "subsampled"), NARROW)
def test_a_narrow_residual(K, channels, subsampled, memory_format):
    """It is read as if it lay between zeros, with any strides, and is not written to."""
    geometries = [((3, 3), 1, 1, 1), ((1, 1), 0, 1, 1), ((3, 3), 1, 2, 1)]
    if K % channels == 0:
        geometries.append(((3, 3), 1, 1, channels))
    with fused_resnet.use_backend("cpu"):
        assert_narrow_like_padded(K, channels, subsampled, memory_format, "cpu", geometries)


# Channels of the shortcut and of the output, and the image's size, where CIFAR's networks halve it.
OPTION_A = {"layer2": (16, 32, 16), "layer3": (32, 64, 8)}


@pytest.mark.parametrize("stage", OPTION_A)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_option_a_of_the_paper(backend, dtype, stage):
    """Its shapes by the error rule, also of no images, an odd one and channels that do not pair."""
    channels, K, size = OPTION_A[stage]
    shape = ConvShape(K, K, (3, 3), (1, 1), (1, 1))
    device = backend.device
    for batch, extent, kept in (
        (2, (size, size), channels),
        (0, (size, size), channels),
        (1, (5, 3), channels - 3),
    ):
        case = make_conv_case(
            shape, batch=batch, size=extent, dtype=dtype, residual=False, device=device
        )
        wide = torch.randn(batch, kept, 2 * extent[0], 2 * extent[1] - 1, device=device).to(dtype)
        wide = wide.contiguous(memory_format=torch.channels_last)
        case.residual = wide[:, :, ::2, ::2]
        with unchanged(**case.tensors()):
            fused = case.fused()
        padded = case.map(lambda t: t)
        padded.residual = reference.pad_channels(case.residual, K)
        assert fused.shape == padded.residual.shape
        if batch:
            assert_error_rule(fused, padded.eager(), padded.double().eager())


@pytest.mark.interpreted
def test_a_narrow_residual_everywhere(backend):
    geometries = [((1, 1), 0, 1, 1)]
    assert_narrow_like_padded(16, 8, True, torch.channels_last, backend.device, geometries)


@pytest.mark.ahead(
    lambda: rerun_on_instruction_set("avx2", __file__, "test_a_narrow_residual and nhwc")
)
def test_a_narrow_residual_on_another_instruction_set(ahead):
    ahead()


def test_gradients_of_a_narrow_residual(backend):
    shape = ConvShape(6, 16, (3, 3), (1, 1), (1, 1))
    results = []
    for fused in (True, False):
        case = make_conv_case(shape, residual=False, dtype=torch.float64, device=backend.device)
        z = torch.randn(2, 8, 16, 16, dtype=torch.float64, device=backend.device)
        z = torch.arange(z.numel(), dtype=z.dtype, device=z.device).view(z.shape).sin()
        leaves = [z.requires_grad_(), case.weight.requires_grad_(), case.input.requires_grad_()]
        case.residual = z[:, :, ::2, ::2]
        if not fused:
            case.residual = F.pad(case.residual, (0, 0, 0, 0, 4, 4))
        out = case.fused() if fused else case.eager()
        results.append(torch.autograd.grad(out.square().sum(), leaves))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


# Channels of a norm, and of its residual.
NARROW_NORMS = [(32, 16), (33, 16), (29, 13), (8, 1), (600, 530), (1100, 3)]


def subsampled_residual(channels, memory_format, dtype, device):
    wide = torch.randn(2, channels, 9, 12, device=device).to(dtype)
    wide = wide.contiguous(memory_format=memory_format).requires_grad_()
    return wide, wide[:, :, ::2, ::2]


def norm_results(residual, leaves, x, vectors, training, activation):
    """Outputs, running statistics and gradients."""
    mean, var, weight, bias = (v.detach().clone() for v in vectors)
    leaves = (x, weight.requires_grad_(), bias.requires_grad_(), *leaves)
    out = fused_resnet.functional.batch_norm_act(
        x, mean, var, weight, bias, training, residual=residual, pad_residual=True,
        activation=activation,
    )  # fmt: skip
    grad = torch.arange(out.numel(), device=x.device).view_as(out).sin().to(x.dtype)
    return out, mean, var, *torch.autograd.grad(out, leaves, grad)


def assert_narrow_norm_like_padded(C, channels, formats, dtype, device):
    x = torch.randn(2, C, 5, 6, device=device).to(dtype).contiguous(memory_format=formats[0])
    x.requires_grad_()
    parameters = torch.float64 if dtype is torch.float64 else torch.float32
    vectors = [torch.rand(C, device=device).to(parameters) + 0.5 for _ in range(4)]
    for training in (True, False):
        for activation in ("relu", "none"):
            results = []
            for pad in (False, True):
                torch.manual_seed(0)
                leaf, residual = subsampled_residual(channels, formats[1], dtype, device)
                before = leaf.detach().clone()
                if pad:
                    residual = reference.pad_channels(residual, C)
                case = (x, vectors, training, activation)
                results.append(norm_results(residual, [leaf], *case))
                assert torch.equal(leaf, before)
            for ours, padded in zip(*results, strict=True):
                assert torch.equal(ours, padded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("C", "channels"), NARROW_NORMS)
def test_a_narrow_residual_of_a_norm(C, channels, dtype):
    """As if it lay between zeros: output and all gradients, in every memory format."""
    nhwc, nchw = torch.channels_last, torch.contiguous_format
    with fused_resnet.use_backend("cpu"):
        for formats in ((nhwc, nhwc), (nchw, nchw), (nhwc, nchw), (nchw, nhwc)):
            assert_narrow_norm_like_padded(C, channels, formats, dtype, "cpu")


@pytest.mark.interpreted
def test_a_narrow_residual_of_a_norm_everywhere(backend, monkeypatch):
    """As if it lay between zeros, by kernels that take both: those of clusters do not."""
    monkeypatch.setattr(backends.cuda, "_fits_cluster", lambda *_: False)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        for C, channels in ((16, 8), (19, 6)):
            formats = (memory_format, memory_format)
            assert_narrow_norm_like_padded(C, channels, formats, torch.float32, backend.device)


def test_a_narrow_residual_has_to_be_asked_for():
    """A mistake in the number of channels must not become a number."""
    case = make_norm_conv_case(ConvShape(8, 16, (1, 1)))
    z, vectors = case.residual[:, :4], [torch.ones(16)] * 4
    norm = (case.in_mean, case.in_var, case.in_weight, case.in_bias, case.in_eps)
    calls = {
        "conv_bn_act": (case.input, case.weight, *vectors),
        "norm_conv_bn_act": (case.input, *norm, case.weight, *vectors),
        "batch_norm_act": (case.residual, *vectors),
        "sync_batch_norm_act": (case.residual, *vectors),
    }
    for name, arguments in calls.items():
        function = getattr(fused_resnet.functional, name)
        options = {"group": None} if name.startswith("sync") else {}
        with pytest.raises(ValueError, match=f"^{name}: residual has 4 channels, .* pad_residual"):
            function(*arguments, residual=z, **options)
        if not options:
            expected = function(*arguments, residual=reference.pad_channels(z, 16))
            assert torch.equal(function(*arguments, residual=z, pad_residual=True), expected)
            assert not torch.equal(function(*arguments), expected)


def test_residuals_of_a_norm_that_do_not_fit():
    x, ones = torch.randn(2, 8, 4, 4), torch.ones(8)
    for shape in ((2, 9, 4, 4), (2, 0, 4, 4), (2, 6, 4, 3), (1, 6, 4, 4), (2, 6, 4)):
        with pytest.raises(ValueError, match=r"residual has shape .* must have"):
            fused_resnet.functional.batch_norm_act(
                x, ones, ones, residual=torch.randn(shape), pad_residual=True
            )
        with pytest.raises(ValueError, match="residual has shape"):
            torch.ops.fused_resnet.scale_shift_act(x, ones, ones, torch.randn(shape), "relu")


@pytest.mark.parametrize("channels", [18, 0])
def test_residuals_that_do_not_fit(channels):
    case = make_conv_case(ConvShape(8, 16, (1, 1)), residual=False)
    case.residual = torch.randn(2, channels, 8, 8)
    with pytest.raises(ValueError, match=r"residual has shape .* must have"):
        case.fused()
    case.residual = torch.randn(2, 14, 8, 7)
    with pytest.raises(ValueError, match=r"residual has shape .* must have"):
        case.fused()


def test_option_a_is_not_padded_in_memory():
    """On the CPU nothing is padded, copied or scattered, in inference and in training."""
    model = fused_resnet.fuse(make("A")).eval()
    block = model.layer2[0]
    x = torch.randn(2, 16, 12, 12).to(memory_format=torch.channels_last)

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            names.append(operator.overloadpacket.__name__)
            return operator(*args, **(kwargs or {}))

    names = []
    with torch.no_grad(), Seen():
        block(x)
    assert names.count("conv_bn_act") == 2
    copies = {"constant_pad_nd", "cat", "clone", "copy_", "new_zeros", "zeros_like", "zeros"}
    assert not copies & set(names)
    model.train()
    x.requires_grad_()
    ones = torch.ones(2, 32, 6, 6).to(memory_format=torch.channels_last)
    with torch.autograd.profiler.profile() as profile:
        torch.autograd.grad(block(x), (x, *block.parameters()), ones)
    names = [event.name.removeprefix("aten::") for event in profile.function_events]
    assert names.count("convolution_backward") == 2
    assert not {"constant_pad_nd", "cat", "zeros", "slice_backward"} & set(names)
    for training in (True, False):
        ways = {r.path: r.backend for r in fused_resnet.report(model.train(training))}
        # With more channels one of its convolutions may be one with fewer products.
        without, padded = (
            set(re.sub(", Winograd[^)]*", "", ways[f"layer{i}.0"]).split(", cpu: ")) for i in (1, 2)
        )
        assert {way.removeprefix("cpu: ") for way in padded} == {
            way.removeprefix("cpu: ") for way in without
        }
    with fused_resnet.use_backend("reference"):
        assert "padded shortcut" in fused_resnet.report(model)[2].backend


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_backend_pads_option_a(backend, dtype):
    """But for the definition: zeros are made nowhere, and kernels get the shortcut's own pixels."""

    def image(channels, *size):
        x = torch.randn(2, channels, *size, device=backend.device).to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    shape = ConvShape(8, 16, (1, 1))
    case = make_conv_case(shape, residual=False, size=(2, 3), device=backend.device)
    case = case.map(lambda t: t.to(dtype))
    shortcut, x = image(8, 4, 6)[:, :, ::2, ::2], image(16, 2, 3)
    case.residual = shortcut
    vectors = [torch.rand(16, device=backend.device) + 0.5 for _ in range(4)]
    vectors = [t.to(accumulation_dtype(dtype)) for t in vectors]
    leaves = [t.detach().requires_grad_() for t in (shortcut, x)]
    grad = torch.ones_like(x)

    def norm(training):
        return fused_resnet.functional.batch_norm_act(
            x, *vectors, training, residual=shortcut, pad_residual=True
        )

    def backward():
        operator = torch.ops.fused_resnet.batch_norm_act_training
        out, *_ = operator(leaves[1], *vectors[2:], 1e-5, leaves[0], "relu")
        grads = torch.autograd.grad(out, leaves, grad)
        assert [g.shape for g in grads] == [t.shape for t in leaves]

    for call in (case.fused, lambda: norm(True), lambda: norm(False), backward):
        with torch.autograd.profiler.profile(record_shapes=True) as profile:
            call()
        events = profile.function_events
        names = {event.name.rpartition("::")[2] for event in events}
        padded = {"constant_pad_nd", "cat"}
        # Autograd makes gradients of the statistics, which are zero; torch's own start from zeros.
        if call is not backward and dtype is not torch.float64:
            padded |= {"zeros", "zeros_like", "new_zeros", "zero_", "fill_"}
        assert bool(names & padded) == (backend.name == "reference"), names
        if backend.name == "cuda":
            adding = ("conv_bn_act_tiled", "batch_norm_normalize", "on_host::scale_shift_act")
            (kernel,) = (event for event in events if event.name.endswith(adding))
            assert list(shortcut.shape) in kernel.input_shapes, kernel


@pytest.mark.quick
@pytest.mark.skipif(backends.available()["triton"] != "yes", reason=backends.available()["triton"])
def test_what_cannot_read_option_a_is_not_given_it(monkeypatch):
    """Where tuning chose the library's fused operator, which adds none of fewer channels."""
    triton = backends.triton
    choice = Choice("cudnn_convolution_add_relu", None, "measured on this machine")
    triton.launchers()
    monkeypatch.setattr(triton.problem, "choose", lambda problem, device: choice)
    monkeypatch.setattr(cudnn, "conv_bn_act", None)
    case = make_conv_case(ConvShape(8, 16, (1, 1)), residual=False)
    case.residual = torch.randn(2, 8, 16, 16)[:, :, ::2, ::2]
    with fused_resnet.use_backend("triton"):
        fused = case.fused()
    padded = case.map(lambda t: t)
    padded.residual = reference.pad_channels(case.residual, 16)
    assert_error_rule(fused, padded.eager(), padded.double().eager())


@pytest.mark.parametrize("planes", [33, 32, 17, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_blocks_with_option_a(planes, stride):
    """In training one node of the graph; its gradients, those of its gradients, and inference."""
    shortcut = cifar.PaddedShortcut(16, planes, stride)
    block = resnet.BasicBlock(16, planes, stride, shortcut).double()
    fused = fused_resnet.fuse(copy.deepcopy(block))
    x = torch.randn(2, 16, 7, 8, dtype=torch.float64)
    results = []
    for module in (block, fused):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        assert ("_ResidualBlock" in type(out.grad_fn).__name__) == (module is fused)
        weights = (leaf, *module.parameters())
        once = torch.autograd.grad(out.square().sum(), weights, create_graph=True)
        twice = torch.autograd.grad(once[0].square().sum(), weights)
        plain = torch.autograd.grad(module(x.clone().requires_grad_()).square().sum(), weights[1:])
        with torch.no_grad():
            inference = module.eval()(x)
        buffers = [b for b in module.buffers() if b.dim()]
        results.append((out, *once, *twice, *plain, inference, *buffers))
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("planes", [33, 32, 17, 16])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_blocks_with_option_a_in_one_call(stride, planes, layout, monkeypatch):
    """With what comes before and behind them, on sizes that the stride does not divide."""
    torch.manual_seed(4)
    widths = [(12, 16, None), (16, planes, stride), (planes, planes, None)]
    eager = []
    for inplanes, planes, step in widths:
        shortcut = cifar.PaddedShortcut(inplanes, planes, step or 1)
        if inplanes == planes and step is None:
            shortcut = None
        eager.append(resnet.BasicBlock(inplanes, planes, step or 1, shortcut))
    eager = randomize_(nn.Sequential(*eager), seed=2).eval().to(memory_format=layout)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    native, calls = backends.cpu.operators.residual_blocks_packed, []

    def counted(*arguments):
        calls.append(arguments[-1])
        return native(*arguments)

    monkeypatch.setattr(backends.cpu.operators, "residual_blocks_packed", counted)
    x = torch.randn(3, 12, 7, 8).contiguous(memory_format=layout)
    with torch.no_grad():
        out = stages_forward([fused], x)
        if torch.ops.fused_resnet.conv_isa():
            assert calls == [[-1, -stride, 0]]
        assert_error_rule(out, eager(x), double_copy(eager)(x.double()))
        assert out.stride() == eager(x).stride()


def test_a_network_with_option_a_is_one_call(monkeypatch):
    """Unless one of its shortcuts has a hook, which fires."""
    model = fused_resnet.fuse(make("A")).eval()
    run, calls = backends.cpu.residual_blocks, []

    def counted(input, blocks):
        calls.append([block.step for block in blocks])
        return run(input, blocks)

    monkeypatch.setattr(backends.cpu.Cpu, "residual_blocks", staticmethod(counted))
    x = image_batch(2, 16)
    with torch.no_grad():
        before = model(x)
        assert calls == [[0, 2, 2]]
        fired = []
        model.layer2[0].downsample.register_forward_hook(lambda *_: fired.append(1))
        assert_same_bits(model(x), before)
    assert fired
    assert calls[1:] == [[0], [2]]


@pytest.mark.parametrize("shortcut", [2, 3, -(2**31), -(2**63), 2**63 - 1])
def test_a_number_that_says_nothing_of_a_shortcut(shortcut):
    """What the native operator is called with, past all checks."""
    if not torch.ops.fused_resnet.conv_isa():
        pytest.skip("this processor has no native convolution")
    weight = torch.randn(16, 16, 3, 3)
    packed = torch.ops.fused_resnet.pack_conv_weight(weight, 1)
    tensors = [weight, packed, *torch.rand(4, 16), torch.empty(0)]
    call = torch.ops.fused_resnet.residual_blocks_packed
    with pytest.raises(ValueError, match="a shortcut is"):
        call(torch.randn(1, 16, 4, 4), tensors, [1] * 7, [1e-5], [1], [shortcut])


@pytest.mark.parametrize("training", [True, False])
def test_a_shortcut_that_does_not_fit_the_block(training):
    """It fails as it does unfused: zeros are not added to make it fit."""
    for shortcut in (cifar.PaddedShortcut(32, 48, 2), nn.Conv2d(32, 62, 1, 2)):
        for fuse in (False, True):
            model = make("A").train(training)
            model.layer3[0].downsample = shortcut
            if fuse:
                fused_resnet.fuse(model)
            with pytest.raises(RuntimeError, match="must match"):
                model(image_batch(2, 16))


def test_a_shortcut_of_one_channel_is_broadcast():
    """As `+=` does, also where it would do as a narrow residual."""
    block = resnet.BasicBlock(5, 5, 1, nn.Conv2d(5, 1, 1)).eval()
    fused = fused_resnet.fuse(copy.deepcopy(block))
    x = torch.randn(2, 5, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), block(x))
