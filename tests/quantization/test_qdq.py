"""Scales out of ONNX models that store activations in eight bits."""

import io
import warnings

import numpy as np
import pytest
import torch
from torchvision.models import resnet

import fused_resnet
from fused_resnet.models import cifar_resnet
from fused_resnet.testing import randomize_

onnx = pytest.importorskip("onnx", reason="onnx, which reads the models, is not installed")
helper, numpy_helper = pytest.importorskip("onnx.helper"), pytest.importorskip("onnx.numpy_helper")


def float32(value):
    return torch.tensor(value).item()


def network():
    torch.manual_seed(1)
    return randomize_(cifar_resnet(8, shortcut="B", in_channels=1), 1).eval()


class Builder:
    """A graph of residual blocks by hand; only names, operators and steps are of any interest."""

    def __init__(self, signed=False, names="scopes"):
        self.nodes, self.constants = [], []
        self.signed, self.names = signed, names

    def add(self, kind, *inputs, name=""):
        output = f"{kind}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], name=name))
        return output

    def constant(self, name, array):
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def pair(self, x, stored):
        """QuantizeLinear and DequantizeLinear; nothing where `stored` is None."""
        if stored is None:
            return x
        step, zero_point = stored
        kind, shift = (np.int8, -128) if self.signed else (np.uint8, 0)
        count = len(self.constants)
        vectors = (
            self.constant(f"step_{count}", np.float32(step)),
            self.constant(f"zero_{count}", kind(zero_point + shift)),
        )
        return self.add("DequantizeLinear", self.add("QuantizeLinear", x, *vectors), *vectors)

    def conv(self, x, path):
        if self.names == "weights":
            weight = self.constant(f"{path}.weight_quantized", np.zeros((1, 1, 1, 1), np.int8))
            step = self.constant(f"{path}.step", np.float32(1))
            return self.add("Conv", x, self.add("DequantizeLinear", weight, step))
        stage, block, *rest = path.split(".")
        scopes = [stage, f"{stage}.{block}", rest[0]]
        if len(rest) > 1:
            scopes.append(".".join(rest))
        return self.add("Conv", x, "onnx::weight", name=f"/{'/'.join(scopes)}/Conv")

    def block(self, x, path, projects, hidden, output, before_adding=None):
        h = self.pair(self.add("Relu", self.conv(x, f"{path}.conv1")), hidden)
        h = self.pair(self.conv(h, f"{path}.conv2"), before_adding)
        if projects:
            x = self.pair(self.conv(x, f"{path}.downsample.0"), before_adding)
        return self.pair(self.add("Relu", self.add("Add", h, x)), output)

    def model(self):
        return helper.make_model(helper.make_graph(self.nodes, "by hand", [], [], self.constants))


def by_hand(last=(0.017, 0), input=(0.011, 3), **how):
    builder = Builder(**how)
    x = builder.pair("stem", input)
    x = builder.block(x, "layer1.0", False, (0.012, 0), (0.013, 0), (0.5, 100))
    x = builder.block(x, "layer2.0", True, (0.014, 5), (0.015, 0))
    builder.block(x, "layer3.0", True, (0.016, 0), last)
    return builder.model()


STORED = {
    "layer1.0": [(0.011, 3), (0.012, 0), (0.013, 0)],
    "layer2.0": [(0.013, 0), (0.014, 0), (0.015, 0)],
    "layer3.0": [(0.015, 0), (0.016, 0), (0.017, 0)],
}


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("names", ["scopes", "weights"])
def test_a_graph_by_hand(names, signed, tmp_path):
    """From a file or a model; what is stored before an addition is not the block's output."""
    made = by_hand(names=names, signed=signed)
    onnx.save(made, tmp_path / "int8.onnx")
    for scales in (made, tmp_path / "int8.onnx", str(tmp_path / "int8.onnx")):
        model = fused_resnet.quantize(network(), scales=scales)
        assert {
            path: [tuple(stored) for stored in model.get_submodule(path).quantization.ranges]
            for path in STORED
        } == {path: [(float32(s), z) for s, z in stored] for path, stored in STORED.items()}
    x = torch.randn(4, 1, 10, 10)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize(
    ("changes", "path", "reason"),
    [
        ({"last": None}, "layer3.0", "scales has none for the output"),
        ({"input": None}, "layer1.0", "scales has none for the input"),
        ({"last": (np.inf, 0)}, "layer3.0", "scales has none for the output"),
    ],
)
def test_blocks_without_scales(changes, path, reason):
    model = fused_resnet.quantize(network(), scales=by_hand(**changes))
    for other in STORED:
        kept = model.get_submodule(other).quantization
        assert (reason in kept.reason) if other == path else not kept.reason


def test_bad_models():
    for made, match in (
        (Builder().model(), "no QuantizeLinear"),
        (by_hand(), "another network"),
    ):
        model = resnet.resnet18().eval() if match == "another network" else network()
        if match == "another network":
            for conv in made.graph.node:
                conv.name = conv.name.replace("layer", "stage")
        with pytest.raises(ValueError, match=match):
            fused_resnet.quantize(model, scales=made)


@pytest.mark.slow
def test_what_onnx_runtime_quantizes(tmp_path):
    """All blocks of a torchvision ResNet, near what ONNX Runtime computes itself."""
    onnxruntime = pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    torch.manual_seed(0)
    model = randomize_(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10), 0).eval()
    batches = [torch.randn(2, 3, 64, 64) for _ in range(2)]
    exported = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (batches[0],), exported, dynamo=False, input_names=["input"],
            dynamic_axes={"input": {0: "batch"}},
        )  # fmt: skip
    source, prepared, written = (str(tmp_path / f"{i}.onnx") for i in range(3))
    (tmp_path / "0.onnx").write_bytes(exported.getvalue())
    quantization.quant_pre_process(source, prepared, skip_symbolic_shape=True)
    feeds = iter([{"input": batch.numpy()} for batch in batches])

    class Reader(quantization.CalibrationDataReader):
        def get_next(self):
            return next(feeds, None)

    quantization.quantize_static(
        prepared,
        written,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    with torch.no_grad():
        exact = model(batches[0])
        session = onnxruntime.InferenceSession(written, providers=["CPUExecutionProvider"])
        (theirs,) = session.run(None, {"input": batches[0].numpy()})
        fused_resnet.quantize(model, scales=written, min_sqnr_db=-np.inf)
        ours = model(batches[0])
    for stage in range(1, 5):
        kept = model.get_submodule(f"layer{stage}.0").quantization
        assert not kept.reason
        assert len(kept.ranges) == 4
    error = lambda x: ((x - exact).norm() / exact.norm()).item()  # noqa: E731
    assert error(ours) < 1.2 * error(torch.from_numpy(theirs))
