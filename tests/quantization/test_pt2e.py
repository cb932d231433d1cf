"""Scales out of models that torchao's PT2E flow has converted."""

import warnings

import pytest
import torch

import fused_resnet
from fused_resnet.models import cifar_resnet
from fused_resnet.testing import randomize_


class Operator:
    """What stands in a graph for a `quantized_decomposed` operator, which torchao registers."""

    def __init__(self, name):
        self.name = self.__name__ = name

    def __call__(self, *args):
        raise AssertionError("graphs are read, not run")

    def __str__(self):
        return f"quantized_decomposed.{self.name}.default"


def network(depth=8, shortcut="B", seed=1):
    torch.manual_seed(seed)
    return randomize_(cifar_resnet(depth, shortcut=shortcut, in_channels=1), seed).eval()


def images(seed=0):
    return torch.randn(4, 1, 10, 10, generator=torch.Generator().manual_seed(seed))


def converted(model, steps, smallest=0, without=()):
    """An exported program of the model with a pair of operators behind what `steps` names.

    Steps and zero points by a convolution's path, of its input, or a block's, of its output.
    """
    program = torch.export.export(model, (images(),))
    graph = program.graph
    nodes = {}
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        if stack and node.op == "call_function":
            path = str(stack[-1][0])
            if "conv2d" in str(node.target):
                nodes[path] = node.args[0]
            elif "relu" in str(node.target):
                nodes[path.rpartition(".")[0]] = node  # the block's last ReLU comes last
    for path, (step, zero_point) in steps.items():
        if path in without:
            continue
        source = nodes[path]
        arguments = (step, zero_point + smallest, smallest, smallest + 255, torch.uint8)
        with graph.inserting_after(source):
            stored = graph.call_function(Operator("quantize_per_tensor"), (source, *arguments))
        with graph.inserting_after(stored):
            read = graph.call_function(Operator("dequantize_per_tensor"), (stored, *arguments))
        for user in list(source.users):
            if user is not stored:
                user.replace_input_with(source, read)
        nodes.update({other: read for other, node in nodes.items() if node is source})
    return program


STEPS = {
    "layer1.0.conv1": (0.011, 3),
    "layer1.0.conv2": (0.012, 0),
    "layer1.0": (0.013, 0),
    "layer2.0.conv2": (0.014, 0),
    "layer2.0": (0.015, 0),
    "layer3.0.conv2": (0.016, 0),
    "layer3.0": (0.017, 0),
}


def float32(value):
    return torch.tensor(value).item()


@pytest.mark.quick
@pytest.mark.parametrize("smallest", [0, -128])
def test_steps_are_taken(smallest):
    """From unsigned and signed integers, of inputs, inner activations and outputs."""
    model = network()
    program = converted(model, STEPS, smallest)
    fused_resnet.quantize(model, scales=program)
    blocks = fused_resnet.quantization_state(model)["blocks"]
    expected = {
        "layer1.0": [(0.011, 3), (0.012, 0), (0.013, 0)],
        "layer2.0": [(0.013, 0), (0.014, 0), (0.015, 0)],
        "layer3.0": [(0.015, 0), (0.016, 0), (0.017, 0)],
    }
    for path, ranges in expected.items():
        assert [tuple(one) for one in blocks[path]["ranges"]] == [
            (float32(step), zero_point) for step, zero_point in ranges
        ], path
    assert [record.precision for record in fused_resnet.report(model)][1:] == ["int8"] * 3
    with torch.no_grad():
        assert model(images()).isfinite().all()


@pytest.mark.quick
def test_noise_is_measured_on_batches():
    model = network()
    program = converted(model, STEPS)
    fused_resnet.quantize(model, [images()], scales=program, min_sqnr_db=0)
    noise = [record.sqnr_db for record in fused_resnet.report(model)][1:]
    assert all(0 < one < 60 for one in noise)


@pytest.mark.quick
def test_a_block_without_a_scale_stays_in_floating_point():
    model = network()
    program = converted(model, STEPS, without=["layer3.0"])
    fused_resnet.quantize(model, scales=program)
    *_, last = fused_resnet.report(model)
    assert last.precision == "float32"
    assert "scales has none for the output" in last.reason
    assert [record.precision for record in fused_resnet.report(model)][1:3] == ["int8"] * 2


@pytest.mark.quick
def test_bad_scales():
    model = network()
    with pytest.raises(TypeError, match="scales is a dict"):
        fused_resnet.quantize(model, scales={})
    with pytest.raises(ValueError, match="was not converted by convert_pt2e"):
        fused_resnet.quantize(model, scales=torch.export.export(model, (images(),)))
    program = converted(model, STEPS)
    stem_alone = torch.nn.Sequential(fused_resnet.fuse(network()).layer1)
    with pytest.raises(ValueError, match="of another network"):
        fused_resnet.quantize(stem_alone, scales=program)
    assert not any("quantization" in vars(module) for module in model.modules())


def test_torchao():
    """The real thing: torchao's quantizer for x86 annotates, calibrates and converts."""
    reason = "torchao is not installed"
    warnings.simplefilter("ignore")
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e", reason=reason)
    x86 = pytest.importorskip(
        "torchao.quantization.pt2e.quantizer.x86_inductor_quantizer", reason=reason
    )
    model, x = network(14), images()
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (x,), strict=True).module(), quantizer)
    prepared(x)
    program = pt2e.convert_pt2e(prepared)
    theirs = program(x)
    with torch.no_grad():
        expected = model.double()(x.double())
        model.float()
        fused_resnet.quantize(model, [x], scales=program)
        own = model(x)
    assert [record.precision for record in fused_resnet.report(model)][1:] == ["int8"] * 6
    assert (own - expected).norm() <= 1.5 * (theirs - expected).norm()
    assert (own - expected).norm() < 0.1 * expected.norm()
