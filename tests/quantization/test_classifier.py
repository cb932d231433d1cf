"""Classifiers in eight bits: against integers, as settings, as data, in plans and graphs."""

import copy
import json

import numpy as np
import pytest
import torch
from support import assert_same_bits
from torchvision.models import resnet

import fused_resnet
from fused_resnet import backends
from fused_resnet.modules import network, plans
from fused_resnet.testing import randomize_, relative_error

pytestmark = pytest.mark.quick


def plain_network(seed=0, classes=37):
    torch.manual_seed(seed)
    model = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=classes)
    model.layer3, model.layer4 = torch.nn.Sequential(), torch.nn.Sequential()
    model.fc = torch.nn.Linear(128, classes)
    return randomize_(model, seed).eval()


def images(count=3):
    return torch.randn(count, 3, 40, 36, generator=torch.Generator().manual_seed(2))


def made(**settings):
    model, x = plain_network(), images()
    return fused_resnet.quantize(model, [x], **{"classifier": "int8", **settings}), x


def record_of(model):
    return next((r for r in fused_resnet.report(model) if r.kind == "classifier"), None)


def features(model, x):
    """What the classifier reads."""
    seen = []
    vars(model)["head_quantization"], kept = (
        lambda _, out: seen.append(out) or torch.zeros(1),
        model.head_quantization,
    )
    with torch.no_grad():
        model(x)
    vars(model)["head_quantization"] = kept
    return seen[0]


def outputs(model, x):
    with torch.no_grad():
        return network.network_head(model, x)


def by_hand(model, x):
    """The logits in NumPy's integers, of the model's own parameters and its state."""
    state = fused_resnet.quantization_state(model)["classifiers"][""]
    (step, zero), (pooled_step, pooled_zero) = state["ranges"]
    assert zero == pooled_zero == 0
    weight = model.fc.weight.detach().double().numpy()
    weight_step = np.abs(weight).max(1) / 127
    whole = np.rint(weight / weight_step[:, None]).astype(np.int64)
    values = np.clip(np.rint(x.numpy() * np.float32(1 / step)), 0, 255).astype(np.int64)
    sums = values.sum((2, 3)).astype(np.float32)
    factor = np.float32(step / (x.shape[2] * x.shape[3] * pooled_step))
    means = np.clip(np.rint(sums * factor), 0, 255).astype(np.int64)
    scale = (weight_step * pooled_step).astype(np.float32)
    logits = (means @ whole.T).astype(np.float32) * scale + model.fc.bias.detach().numpy()
    return torch.from_numpy(logits)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_logits_are_what_the_integers_say(backend_name):
    model, x = made()
    with backends.use_backend(backend_name):
        read = features(model, torch.cat([x, 3 * x]))  # beyond what was calibrated, too
        out = outputs(model, read)
    expected = by_hand(model, read)
    assert expected.unique().numel() > 200
    assert_same_bits(out, expected)


def test_the_noise_is_that_of_the_last_layer():
    """The classifier alone, against float64, and what the report says of it."""
    model, x = made()
    read = features(model, x)
    expected = torch.nn.functional.linear(
        read.double().mean((2, 3)), model.fc.weight.double(), model.fc.bias.double()
    )
    error = relative_error(outputs(model, read), expected)
    assert 1e-4 < error < 2e-2
    record = record_of(model)
    assert (record.path, record.precision, record.reason) == ("fc", "int8", "")
    assert record.backend.startswith("cpu: pooling + linear layer in eight bits (")
    assert record.sqnr_db == fused_resnet.quantization_state(model)["classifiers"][""]["sqnr_db"]
    assert 30 < record.sqnr_db < 80
    assert "the classifier too" not in str(fused_resnet.report(model))


def test_settings():
    float_model, x = made(classifier="float")
    assert record_of(float_model) is None
    assert "classifiers" not in fused_resnet.quantization_state(float_model)
    assert "all else, the classifier too, in floating" in str(fused_resnet.report(float_model))
    model, _ = made()
    read = features(model, x)
    assert not torch.equal(outputs(model, read), outputs(float_model, read))
    plain = fused_resnet.fuse(plain_network())
    assert_same_bits(outputs(fused_resnet.dequantize(model), read), outputs(plain, read))
    assert record_of(model) is None
    fused_resnet.quantize(model, [x], classifier="int8")
    fused_resnet.quantize(model, [x])
    assert record_of(model) is None
    fused_resnet.unfuse(fused_resnet.quantize(model, [x], classifier="int8"))
    assert "head_quantization" not in vars(model)


def test_a_noisy_classifier_stays_in_float():
    """Logits that a bias makes small, of as much noise as before."""
    model, x = plain_network(), images()
    with torch.no_grad():
        model.fc.bias -= model(x).mean(0)
    fused_resnet.quantize(model, [x], classifier="int8", min_sqnr_db=30.0)
    record = record_of(model)
    assert record.sqnr_db < 30
    assert f"signal to noise is {record.sqnr_db:.1f} dB, must be 30" in record.reason
    assert all(r.precision == "int8" for r in fused_resnet.report(model) if r.kind == "BasicBlock")
    with torch.no_grad():
        read = features(model, x)
        assert_same_bits(outputs(model, read), outputs(fused_resnet.dequantize(model), read))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"classifier": "int4"}, "classifier is 'int4', must be one of float, int8"),
        ({"dtype": "float8_e4m3fn"}, "classifier is 'int8', must be 'float' with dtype"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        made(**settings)
    with pytest.raises(ValueError, match="and with the ranges that training leaves"):
        fused_resnet.quantize(plain_network(), classifier="int8")


def test_it_stays_in_float_where_what_it_reads_does():
    model = plain_network()
    handle = model.layer2[0].conv1.register_forward_hook(lambda module, inputs, out: None)
    fused_resnet.quantize(model, [images()], classifier="int8")
    handle.remove()
    assert record_of(model).precision == "float32"
    assert "what it reads is not the output of one block" in record_of(model).reason
    other = plain_network()
    other.fc = torch.nn.Sequential(torch.nn.Dropout(), other.fc)
    fused_resnet.quantize(other, [images()], classifier="int8")
    assert "it has more to it than a mean" in record_of(other).reason
    broken = plain_network()
    broken.fc.bias.data[3] = torch.inf
    fused_resnet.quantize(broken, [images()], classifier="int8")
    assert "not finite" in record_of(broken).reason
    with torch.no_grad():
        assert broken(images())[0, 3] == torch.inf


def test_hooks_and_training_keep_it_in_float():
    model, x = made()
    read = features(model, x)
    plain = fused_resnet.fuse(plain_network())
    expected = outputs(model, read)
    handle = model.fc.register_forward_hook(lambda module, inputs, out: out + 1)
    assert "it is not as it was calibrated" in record_of(model).reason
    with torch.no_grad():
        assert_same_bits(outputs(model, read), plain.fc(read.mean((2, 3), True).flatten(1)) + 1)
    handle.remove()
    assert_same_bits(outputs(model.train(), read), outputs(plain, read))
    assert "training" in record_of(model).reason
    assert_same_bits(outputs(model.eval(), read), expected)


def test_what_changes_is_noticed():
    model, x = made()
    read = features(model, x)
    before = outputs(model, read)
    with torch.no_grad():
        model.fc.weight[1] *= 2  # a new version
    after = outputs(model, read)
    assert_same_bits(after, by_hand(model, read))
    assert not torch.equal(after, before)
    for tensor in (model.fc.weight, model.fc.bias):
        tensor.detach().numpy()[:] *= 0.5  # none
        assert_same_bits(outputs(model, read), by_hand(model, read))
    model.fc = torch.nn.Linear(128, 5)
    with pytest.raises(ValueError, match="classifier of '': the linear layer has a weight of"):
        outputs(model, read)


def test_state_and_copies(tmp_path):
    model, x = made()
    read = features(model, x)
    expected = outputs(model, read)
    path = tmp_path / "ranges.json"
    fused_resnet.save_quantization_state(model, path)
    other = fused_resnet.load_quantization_state(plain_network(), path)
    assert_same_bits(outputs(other, read), expected)
    assert fused_resnet.quantization_state(other) == fused_resnet.quantization_state(model)
    assert_same_bits(outputs(copy.deepcopy(model), read), expected)
    state = json.loads(path.read_text())
    del state["classifiers"]  # of an older version
    fused_resnet.load_quantization_state(other, state)
    assert record_of(other) is None
    fused_resnet.prepare_qat(model)
    assert record_of(model) is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s["classifiers"].update(x=s["classifiers"].pop("")), "a network 'x', which"),
        (lambda s: s["classifiers"][""]["ranges"].pop(), "is damaged"),
        (lambda s: s["classifiers"][""].update(ranges=[[0.5, 7], [0.5, 0]]), "is damaged"),
        (lambda s: s["classifiers"][""].update(weights=[[5, 1]]), "a weight of shape"),
        (lambda s: s.update(classifiers=3), "classifiers of the state are a int"),
        (lambda s: s["classifiers"][""].pop("reason"), "is damaged"),
        (lambda s: s.update(dtype="float8_e4m3fn", stems={}), "and classifiers, which are of int"),
    ],
)
def test_damaged_states(change, match):
    model, _ = made()
    state = json.loads(json.dumps(fused_resnet.quantization_state(model)))
    change(state)
    with pytest.raises(ValueError, match=match):
        fused_resnet.load_quantization_state(plain_network(), state)


def test_autocast_and_other_dtypes():
    model, x = made()
    read = features(model, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = network.network_head(model, read)
    assert out.dtype is torch.bfloat16
    assert_same_bits(out, outputs(model, read.bfloat16().float()).bfloat16())
    half = copy.deepcopy(model).half()
    assert outputs(half, read.half()).dtype is torch.float16
    plain = fused_resnet.fuse(plain_network()).double()
    assert_same_bits(outputs(model.double(), read.double()), outputs(plain, read.double()))


def test_a_plan_runs_it_and_sees_its_parameters_change():
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
        assert_same_bits(by_hand(model, features(copy.deepcopy(model), x)), first)
        for tensor in (model.fc.weight, model.fc.bias):
            tensor.detach().numpy()[:] *= 2
            assert plan.run(x) is None
            assert_same_bits(model(x), copy.deepcopy(model)(x))
            tensor.detach().numpy()[:] *= 0.5
        assert_same_bits(model(x), first)
        fused_resnet.quantize(model, [x])
        assert not torch.equal(model(x), first)


def test_compiled_and_exported_graphs_hold_the_operator():
    model, x = made()
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        nodes = [node for node in exported.graph.nodes if node.op == "call_function"]
        assert str(nodes[-1].target).startswith("fused_resnet.pool_linear_int8")
        assert_same_bits(exported.module()(x), expected)
        known = exported.run_decompositions(fused_resnet.decompositions())
        targets = {str(node.target) for node in known.graph.nodes if node.op == "call_function"}
        assert not any("fused_resnet" in target for target in targets)
        assert relative_error(known.module()(x), expected) < 2e-2
