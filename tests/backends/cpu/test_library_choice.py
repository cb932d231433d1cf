"""Which convolutions the CPU backend leaves to the library, and that they come to the same."""

import copy

import pytest
import torch
import torchvision
from support import assert_same_bits, double_copy

import fused_resnet
from fused_resnet.backends import cpu, explain
from fused_resnet.backends.cpu import inference, isa
from fused_resnet.backends.cpu.inference import prefers_modules
from fused_resnet.layers.description import ConvNorm, Norm
from fused_resnet.testing import assert_error_rule, randomize_

pytestmark = [
    pytest.mark.quick,
    pytest.mark.skipif(
        not isa.ISA or bool(isa.TILE_ISA), reason="what was measured ran on vectors"
    ),
]
LAST, FIRST = torch.channels_last, torch.contiguous_format
# Input channels, filters, their size, the stride, groups, pixels a side; and whether the library's
# convolution is used in NCHW.
LAYERS = {
    "pointwise": ((8, 16, 1, 1, 1, 28), False),
    "depthwise": ((16, 16, 3, 1, 16, 28), True),
    "depthwise of few pixels": ((16, 16, 3, 1, 16, 7), True),
    "strided depthwise": ((16, 16, 3, 2, 16, 14), True),
    "3x3": ((8, 16, 3, 1, 1, 28), False),
    "of groups": ((16, 16, 3, 1, 4, 28), False),
}


def layer_of(geometry, memory_format):
    C, K, size, stride, groups, side = geometry
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, C, side, side, generator=generator).to(memory_format=memory_format)
    weight = torch.randn(K, C // groups, size, size, generator=generator) / (C * size) ** 0.5
    norm = Norm(*torch.rand(4, K, generator=generator), 1e-5)
    padding = (size // 2, size // 2)
    return x, ConvNorm(weight, norm, None, (stride, stride), padding, (1, 1), groups)


@pytest.mark.parametrize("memory_format", [LAST, FIRST], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_choice(name, memory_format, monkeypatch):
    """With and without a residual, of which there are no copies; and what `explain` says."""
    geometry, is_left = LAYERS[name]
    called = []
    library = inference.conv2d
    monkeypatch.setattr(inference, "conv2d", lambda *args: called.append(1) or library(*args))
    x, layer = layer_of(geometry, memory_format)
    weight, norm, _, *shape = layer

    def run(x, weight, norm, residual):
        out = torch.conv2d(x, weight, None, *shape)
        out = torch.nn.functional.batch_norm(out, *norm[:4], False, 0.1, norm.eps)
        return torch.nn.functional.silu(out if residual is None else out + residual)

    residual = torch.randn_like(run(x, weight, norm, None))
    wide = Norm(*(t.double() for t in norm[:4]), norm.eps)
    for added in (None, residual):
        with torch.inference_mode():
            out = cpu.conv_bn_act(x, layer, added, "silu")
        expected = run(x, weight, norm, added)
        exact = run(x.double(), weight.double(), wide, None if added is None else added.double())
        assert_error_rule(out, expected, exact)
        assert out.stride() == expected.stride()
    assert len(called) == 2 * (is_left and memory_format is FIRST)
    text = explain(
        "conv_bn_act", device=x.device, dtype=x.dtype, weight_shape=weight.shape,
        groups=layer.groups, input_shape=x.shape, stride=layer.stride, padding=layer.padding,
    )  # fmt: skip
    assert ("in NCHW the library's" in text) is is_left


INVERTED = [((96, 64, 1, 1), 1, 1), ((96, 1, 3, 3), 1, 96), ((64, 96, 1, 1), 1, 1)]
SMALL = [((16, 8, 1, 1), 1, 1), ((16, 1, 3, 3), 1, 16), ((8, 16, 1, 1), 1, 1)]


@pytest.mark.parametrize(
    ("convolutions", "memory_format", "activated", "expected"),
    [
        ([((64, 64, 3, 3), 1, 1)], LAST, True, False),
        ([((8, 8, 1, 1), 1, 1)], LAST, False, False),
        ([((8, 8, 1, 1), 1, 1)], FIRST, False, True),
        ([((8, 8, 1, 1), 1, 1)], FIRST, True, False),
        ([((256, 64, 1, 1), 1, 1)], FIRST, True, False),
        ([((16, 3, 3, 3), 2, 1)], FIRST, True, True),
        (INVERTED, LAST, False, False),
        (INVERTED, FIRST, False, True),
        (SMALL, LAST, False, False),
        (SMALL, FIRST, False, True),
    ],
)  # fmt: skip
def test_what_runs_as_modules(convolutions, memory_format, activated, expected):
    """Small ones, of which it takes longer to see that they can be fused, and what NCHW delays."""
    weights = [
        (torch.empty(shape), (stride, stride), groups) for shape, stride, groups in convolutions
    ]
    channels = convolutions[0][0][1]
    x = torch.empty(1, channels, 30, 30).to(memory_format=memory_format)
    assert prefers_modules(x, weights, activated) is expected
    assert not prefers_modules(x.bfloat16(), weights, activated)


def test_modules_that_are_left_have_the_bits_of_eager():
    """With gradients, in compilers' graphs and on other backends they run fused."""
    torch.manual_seed(0)
    eager = randomize_(torchvision.models.mobilenetv2.InvertedResidual(24, 24, 1, 4), seed=1).eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = torch.randn(1, 24, 12, 12)
    with torch.no_grad():
        assert_same_bits(fused(x), eager(x))
        with fused_resnet.use_backend("reference"):
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))
        seen = []

        def backend(graph, _):
            seen.extend(str(node.target) for node in graph.graph.nodes)
            return graph.forward

        torch._dynamo.reset()
        torch.compile(fused, backend=backend, fullgraph=True)(x)
    assert any("fused_resnet" in name for name in seen), seen
