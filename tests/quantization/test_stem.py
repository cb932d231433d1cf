"""First convolutions in sixteen and eight bits: against integers, as settings, as data."""

import copy
import json

import numpy as np
import pytest
import torch
from support import assert_same_bits
from torchvision.models import resnet

import fused_resnet
from fused_resnet import backends
from fused_resnet.layers import quantized_copies
from fused_resnet.models import cifar_resnet
from fused_resnet.modules import network, plans
from fused_resnet.quantization.quantize import default_stem
from fused_resnet.testing import randomize_, relative_error

pytestmark = pytest.mark.quick


def torchvision_network():
    torch.manual_seed(0)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=5)
    model.layer3, model.layer4 = torch.nn.Sequential(), torch.nn.Sequential()
    model.fc = torch.nn.Linear(128, 5)
    return randomize_(model, 0).eval()


def cifar_network():
    torch.manual_seed(1)
    return randomize_(cifar_resnet(8, in_channels=1), 1).eval()


NETWORKS = {
    "torchvision": (torchvision_network, (2, 3, 40, 36)),
    "cifar": (cifar_network, (2, 1, 10, 12)),
}


def made(name="torchvision", stem="int16", **settings):
    make, size = NETWORKS[name]
    model, x = make(), torch.randn(size, generator=torch.Generator().manual_seed(2))
    return fused_resnet.quantize(model, [x], stem=stem, **settings), x


def stem_record(model):
    return next(record for record in fused_resnet.report(model) if record.kind == "stem")


def by_hand(model, x):
    """The stem's output in NumPy's integers, of the model's own float parameters and its state."""
    state = fused_resnet.quantization_state(model)["stems"][""]
    (step, zero_point), (output_step, output_zero) = state["ranges"]
    assert output_zero == 0
    conv, norm = model.conv1, model.bn1
    weight = conv.weight.detach().double().numpy()
    most = 127 if state["bits"] == 8 else 32639
    largest = np.abs(weight).reshape(len(weight), -1).max(1)
    weight_step = largest / most
    whole = np.rint(weight / weight_step[:, None, None, None]).astype(np.int64)
    inverse = np.float32(1 / step)
    steps = np.rint(x.numpy() * inverse)
    scale = norm.weight.detach().double().numpy() / np.sqrt(
        norm.running_var.double().numpy() + norm.eps
    )
    shift = norm.bias.detach().double().numpy() - norm.running_mean.double().numpy() * scale
    factor = weight_step * step * scale / output_step
    shift = (shift / output_step).astype(np.float32)

    def sums(values, filters):
        out = torch.conv2d(
            torch.from_numpy(values.astype(np.float64)),
            torch.from_numpy(filters.astype(np.float64)),
            None,
            conv.stride,
            conv.padding,
        )
        return out.numpy().astype(np.float32)

    def along(vector):
        return vector.astype(np.float32)[:, None, None]

    if state["bits"] == 8:
        values = np.clip(steps, -zero_point, 255 - zero_point)
        total = sums(values, whole) * along(factor) + along(shift)
    else:
        values = np.clip(steps, -32639, 32639).astype(np.int64)
        upper, lower = values + 128 >> 8, (values + 128) % 256 - 128
        w_upper, w_lower = whole + 128 >> 8, (whole + 128) % 256 - 128
        assert (256 * upper + lower == values).all()
        total = sums(upper, w_upper) * along(factor * 65536) + along(shift)
        crossed = sums(np.concatenate([upper, lower], 1), np.concatenate([w_lower, w_upper], 1))
        total = total + crossed * along(factor * 256)
    stored = np.abs(np.clip(np.rint(total), 0, 255)).astype(np.float32)  # -0
    if hasattr(model, "maxpool"):
        stored = torch.max_pool2d(torch.from_numpy(stored), 3, 2, 1).numpy()
    return torch.from_numpy(stored * np.float32(output_step))


def outputs(model, x):
    """What the stem gives, as the network runs it."""
    with torch.no_grad():
        return network.network_stem(model, x)


INTEGERS = ["cpu", "reference", *(["cuda"] if backends.cuda.on_host() else [])]


@pytest.mark.parametrize("backend_name", INTEGERS)
@pytest.mark.parametrize("stem", ["int16", "int8"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_stem_is_what_the_integers_say(name, stem, backend_name):
    model, x = made(name, stem)
    x = torch.cat([x, 3 * x])  # beyond what was calibrated, too
    with backends.use_backend(backend_name):
        out = outputs(model, x)
    expected = by_hand(model, x)
    assert expected.unique().numel() > 100
    assert_same_bits(out.contiguous(), expected)


def test_sixteen_bits_add_no_noise():
    """Against float64 the stem's error is that of storing its output in a byte."""
    errors = {}
    for stem in ("int16", "int8"):
        model, x = made(stem=stem)
        wide = fused_resnet.fuse(torchvision_network()).double()
        expected = outputs(wide, x.double())
        errors[stem] = relative_error(outputs(model, x), expected)
        (_, (step, _)) = fused_resnet.quantization_state(model)["stems"][""]["ranges"]
        stored = (expected / step).round().clamp(0, 255) * step
        storing = relative_error(stored, expected)
        assert errors[stem] >= 0.99 * storing
    assert errors["int16"] < 1.01 * storing
    assert errors["int8"] > 1.1 * errors["int16"]


def test_settings():
    float_model, x = made(stem="float")
    assert stem_record(float_model).precision == "float32"
    assert stem_record(float_model).reason == "in floating point: the stem"
    assert "stems" not in fused_resnet.quantization_state(float_model)
    plain = fused_resnet.fuse(torchvision_network())
    assert_same_bits(outputs(float_model, x), outputs(plain, x))
    for stem in ("int16", "int8"):
        model, x = made(stem=stem)
        record = stem_record(model)
        assert (record.precision, record.reason) == (stem, "")
        assert record.backend.startswith("cpu: convolution in integers + pooling (")
        assert record.sqnr_db == fused_resnet.quantization_state(model)["stems"][""]["sqnr_db"]
        assert 25 < record.sqnr_db < 70
    default = fused_resnet.quantize(torchvision_network(), [x])
    assert stem_record(default).precision == "int16"
    fused_resnet.dequantize(default)
    assert_same_bits(outputs(default, x), outputs(plain, x))
    with torch.device("meta"):  # as any device but the CPU
        elsewhere = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1])
    assert default_stem(elsewhere) == "float"
    with pytest.raises(ValueError, match="stem is 'int4', must be one of int16, int8, float"):
        made(stem="int4")


def test_the_stem_stays_in_float_where_its_reader_does():
    make, size = NETWORKS["torchvision"]
    model = make()
    handle = model.layer1[0].conv1.register_forward_hook(lambda module, inputs, out: None)
    fused_resnet.quantize(model, [torch.randn(size)])
    handle.remove()
    assert stem_record(model).precision == "float32"
    assert "what reads its output is not one block in eight bits" in stem_record(model).reason


def test_what_changes_is_noticed():
    model, x = made()
    before = outputs(model, x)
    for tensor in (model.conv1.weight, model.bn1.bias, model.bn1.running_mean):
        # Neither way counts as a version.
        tensor.detach().numpy()[0] += 1
        after = outputs(model, x)
        assert not torch.equal(after, before)
        assert_same_bits(after.contiguous(), by_hand(model, x))
        before = after


def test_copies_are_made_once_and_let_go(monkeypatch):
    model, x = made()
    calls = []
    make = quantized_copies.quantized_stem
    monkeypatch.setattr(
        quantized_copies, "quantized_stem", lambda *args: calls.append(0) or make(*args)
    )
    for _ in range(3):
        outputs(model, x)
    assert len(calls) <= 1
    calls.clear()
    model.train()
    model.eval()
    outputs(model, x)
    assert calls == [0]


def test_hooks_and_training_keep_it_in_float():
    model, x = made()
    plain = fused_resnet.fuse(torchvision_network())
    expected = outputs(model, x)
    with torch.no_grad():
        handle = model.conv1.register_forward_hook(lambda module, inputs, out: None)
        assert stem_record(model).precision != "int16"
        model(x)
        handle.remove()
    assert_same_bits(outputs(model, x), expected)
    assert_same_bits(outputs(model.train(), x), outputs(plain.train(), x))
    assert_same_bits(outputs(model.eval(), x).contiguous(), by_hand(model, x))


def test_state_and_copies(tmp_path):
    model, x = made()
    expected = outputs(model, x)
    path = tmp_path / "ranges.json"
    fused_resnet.save_quantization_state(model, path)
    other = fused_resnet.load_quantization_state(torchvision_network(), path)
    assert_same_bits(outputs(other, x), expected)
    assert fused_resnet.quantization_state(other) == fused_resnet.quantization_state(model)
    assert_same_bits(outputs(copy.deepcopy(model), x), expected)
    state = json.loads(path.read_text())
    del state["stems"]  # of an older version
    fused_resnet.load_quantization_state(other, state)
    assert stem_record(other).precision == "float32"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s["stems"].update(stem=s["stems"].pop("")), "a stem 'stem', which"),
        (lambda s: s["stems"][""].update(bits=12), "bits 12, must be 8 or 16"),
        (lambda s: s["stems"][""]["ranges"].pop(), "is damaged"),
        (lambda s: s["stems"][""].update(ranges=[[0.5, 7], [0.5, 0]]), "is damaged"),
        (lambda s: s["stems"][""].update(weights=[[64, 1, 7, 7]]), "a weight of shape"),
        (lambda s: s.update(stems=3), "stems of the state are a int"),
        (lambda s: s["stems"][""].pop("ranges"), "is damaged"),
    ],
)
def test_damaged_states(change, match):
    model, _ = made()
    state = json.loads(json.dumps(fused_resnet.quantization_state(model)))
    change(state)
    with pytest.raises(ValueError, match=match):
        fused_resnet.load_quantization_state(torchvision_network(), state)


def test_another_first_convolution():
    model, x = made()
    model.conv1 = torch.nn.Conv2d(3, 64, 5, 2, 3, bias=False)
    with pytest.raises(ValueError, match="quantized stem '': the convolution has a weight of"):
        outputs(model, x)


def test_autocast_and_other_dtypes():
    model, x = made()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = network.network_stem(model, x)
    assert out.dtype is torch.bfloat16
    expected = outputs(model, x.bfloat16().float())
    assert_same_bits(out, expected.bfloat16())
    plain = fused_resnet.fuse(torchvision_network()).double()
    assert_same_bits(outputs(model.double(), x.double()), outputs(plain, x.double()))


def test_compiled_and_exported_graphs_hold_the_operator():
    model, x = made()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
        assert names[0].startswith("fused_resnet.conv_bn_act_max_pool_int8")
        # But for the classifier, which is another kernel there.
        assert relative_error(exported.module()(x), expected) < 1e-6


def test_a_plan_runs_the_stem_and_sees_its_parameters_change():
    """Written to without a version: what the plan compares is then all there is to notice it."""
    model, x = made()
    x = x.contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    with torch.no_grad():
        first = model(x)
        for _ in range(2):
            assert_same_bits(model(x), first)
        (plan,) = plans._of_models[model].by_key.values()
        assert not isinstance(plan, str), plan
        assert_same_bits(plan.run(x), first)
        for tensor in (model.conv1.weight, model.bn1.bias):
            tensor.detach().numpy()[-1] += 1
            assert plan.run(x) is None
            assert_same_bits(model(x), copy.deepcopy(model)(x))
            tensor.detach().numpy()[-1] -= 1
        fused_resnet.quantize(model, [x], stem="int8")
        assert not torch.equal(model(x), first)


def test_training_drops_the_ranges_of_a_stem():
    """A block's range then moves, and a stem's output has to be in its steps."""
    make, _ = NETWORKS["cifar"]
    model, x = made("cifar")
    assert stem_record(model).precision == "int16"
    fused_resnet.prepare_qat(model)
    assert vars(model).get("quantization") is None
    fused_resnet.quantize(model)
    assert stem_record(model).precision == "float32"
    assert_same_bits(outputs(model, x), outputs(fused_resnet.fuse(make()), x))
    fused_resnet.quantize(model, [x])
    fused_resnet.quantize(model, [x], stem="float")
    assert stem_record(model).precision == "float32"
