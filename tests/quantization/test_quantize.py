"""`quantize`, `dequantize`, the ranges as data, and what happens to a quantized model."""

import copy
import io
import json
import math
import pickle

import pytest
import torch
from support import assert_same_bits
from torch import nn
from torchvision.models import resnet

import fused_resnet
from fused_resnet.layers import quantized_copies
from fused_resnet.models import cifar_resnet
from fused_resnet.modules import plans
from fused_resnet.testing import randomize_

pytestmark = pytest.mark.quick


def network(depth=8, shortcut="B", seed=1):
    torch.manual_seed(seed)
    return randomize_(cifar_resnet(depth, shortcut=shortcut, in_channels=1), seed).eval()


def images(count=2, seed=0, size=10):
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def run(model, x=None):
    with torch.no_grad():
        return model(images(seed=9) if x is None else x)


def precisions(model):
    return [record.precision for record in fused_resnet.report(model) if record.kind != "stem"]


@pytest.fixture
def quantized():
    return fused_resnet.quantize(network(), [images(4)])


def test_in_place_and_back():
    """The same objects before, under and after eight bits; float gives the bits it gave."""
    model = network()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    keys = list(model.state_dict())
    plain = run(model)
    fused = run(fused_resnet.fuse(model))
    assert fused_resnet.quantize(model, [images()]) is model
    assert precisions(model) == ["int8"] * 3
    assert not torch.equal(run(model), fused)
    assert list(model.state_dict()) == keys
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0]
        assert_same_bits(tensor, before[name][1])
    assert not model.training
    assert fused_resnet.dequantize(model) is model
    assert precisions(model) == ["float32"] * 3
    assert_same_bits(run(model), fused)
    fused_resnet.quantize(model, [images()])
    fused_resnet.unfuse(model)
    assert type(model.layer1[0]) is resnet.BasicBlock
    assert_same_bits(run(model), plain)
    assert not any("quantization" in vars(module) for module in model.modules())


def test_modes_and_settings_survive_calibration():
    model = network()
    fused_resnet.fuse(model.layer1, memory="low")
    model.train()
    model.layer2.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn1.running_mean.clone()
    fused_resnet.quantize(model, [images()])
    assert [module.training for module in model.modules()] == modes
    assert_same_bits(model.bn1.running_mean, statistics)
    assert model.layer1[0].memory == "low"


def test_training_mode_is_float_and_has_gradients(quantized):
    quantized.train()
    assert precisions(quantized) == ["float32"] * 3
    assert "training mode" in fused_resnet.report(quantized)[1].reason
    twin = fused_resnet.fuse(network()).train()
    for model in (twin, quantized):
        model(images(seed=9)).square().sum().backward()
    for own, other in zip(quantized.parameters(), twin.parameters(), strict=True):
        assert_same_bits(own.grad, other.grad)
    assert precisions(quantized.eval()) == ["int8"] * 3


def test_training_with_frozen_norms_is_float_too(quantized):
    """Whoever trains a block with its running statistics needs its gradients."""
    quantized.train()
    for module in quantized.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    quantized(images()).sum().backward()
    assert quantized.conv1.weight.grad is not None
    assert precisions(quantized) == ["float32"] * 3


def test_no_gradient_flows_through_eight_bits(quantized):
    x = images().requires_grad_()
    h = quantized.layer1[0](torch.rand(1, 16, 4, 4, requires_grad=True))
    assert not h.requires_grad
    out = quantized(x)
    assert out.requires_grad  # the classifier's
    out.sum().backward()
    assert x.grad is None
    assert quantized.conv1.weight.grad is None
    assert quantized.fc.weight.grad is not None


def test_one_image_or_pairs_or_a_generator():
    """Targets are not looked at, and batches are read once; splitting them changes nothing."""
    everything = images(6)
    states = []
    for batches in (
        [everything],
        [(everything[:2], torch.zeros(2)), [everything[2:], None]],
        (image for image in everything.split(1)),
    ):
        model = fused_resnet.quantize(network(), batches)
        states.append(fused_resnet.quantization_state(model))
    for state in states[1:]:
        for path, block in state["blocks"].items():
            expected = states[0]["blocks"][path]
            assert block["sqnr_db"] == pytest.approx(expected["sqnr_db"], abs=0.1)
            for one, other in zip(block["ranges"], expected["ranges"], strict=True):
                # Convolutions of other batch sizes may add in another order.
                assert one == [pytest.approx(other[0], rel=1e-5), other[1]]


def test_quantized_again_is_calibrated_again(quantized):
    first = fused_resnet.quantization_state(quantized)
    fused_resnet.quantize(quantized, [3 * images(4)])
    second = fused_resnet.quantization_state(quantized)
    expected = fused_resnet.quantization_state(fused_resnet.quantize(network(), [3 * images(4)]))
    assert second == expected
    assert second != first


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_their_ranges(quantized, how):
    expected = run(quantized)
    if how == "deepcopy":
        other = copy.deepcopy(quantized)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(quantized))
    else:
        file = io.BytesIO()
        torch.save(quantized, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    state = fused_resnet.quantization_state(quantized)
    assert fused_resnet.quantization_state(other) == state
    assert_same_bits(run(other), expected)
    fused_resnet.dequantize(other)
    assert precisions(quantized) == ["int8"] * 3


def test_ranges_by_themselves(quantized, tmp_path):
    """As data, through JSON and a file, into a model with the same weights that is not fused."""
    expected = run(quantized)
    state = fused_resnet.quantization_state(quantized)
    assert list(state["blocks"]) == ["layer1.0", "layer2.0", "layer3.0"]
    path = tmp_path / "ranges.json"
    fused_resnet.save_quantization_state(quantized, path)
    assert json.loads(path.read_text()) == state == json.loads(json.dumps(state))
    for given in (state, path, str(path)):
        other = network()
        assert fused_resnet.load_quantization_state(other, given) is other
        assert_same_bits(run(other), expected)
        assert fused_resnet.quantization_state(other) == state


def test_blocks_left_alone_are_in_the_state_too():
    model = fused_resnet.quantize(network(shortcut="A"), [images()])
    state = fused_resnet.quantization_state(model)
    assert state["blocks"]["layer2.0"]["reason"] == "downsample pads channels"
    assert state["blocks"]["layer2.0"]["ranges"] == []
    other = fused_resnet.load_quantization_state(network(shortcut="A"), state)
    assert_same_bits(run(other), run(model))
    assert fused_resnet.quantization_state(other) == state


def test_a_state_of_another_network(quantized):
    state = fused_resnet.quantization_state(quantized)

    def refused(model, state, match):
        with pytest.raises(ValueError, match=match):
            fused_resnet.load_quantization_state(model, state)
        assert type(model.layer1[0]) is resnet.BasicBlock

    refused(network(14), state, "the model has a block 'layer1.1', which the state has not")
    other = fused_resnet.quantization_state(fused_resnet.quantize(network(14), [images()]))
    refused(network(), other, "the state has a block 'layer1.1', which the model has not")
    refused(
        network(shortcut="C"),
        state,
        r"'layer1.0': convolution 2 has a weight of shape \(16, 16, 1, 1\), in the state no weight",
    )
    model = network()
    model.layer2[0].conv1 = nn.Conv2d(16, 32, 5, 2, 2, bias=False)
    refused(
        model,
        state,
        r"'layer2.0': convolution 0 has a weight of shape \(32, 16, 5, 5\), in the state a weight "
        r"of shape \(32, 16, 3, 3\)",
    )
    # A quantized model stays as it was.
    with pytest.raises(ValueError, match=r"layer1\.1"):
        fused_resnet.load_quantization_state(quantized, other)
    assert fused_resnet.quantization_state(quantized) == state


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": "other/1"}, "state has schema 'other/1', must be"),
        ({"dtype": "int4"}, "state has dtype 'int4', must be 'int8' or 'float8_e4m3fn'"),
        ({"blocks": None}, "state has no blocks"),
        ({"ranges": [[0.0, 0], [1.0, 0], [1.0, 0]]}, "step 0 is 0.0, must be a float32 number"),
        ({"ranges": [[0.1, 0], [1.0, 0], [1.0, 0]]}, "step 0 is 0.1, must be a float32 number"),
        ({"ranges": [[1.0, 300], [1.0, 0], [1.0, 0]]}, "zero point 0 is 300, out of range"),
        ({"ranges": [[1.0, 0], [1.0, 7], [1.0, 0]]}, "zero point 1 is 7, out of range"),
        ({"ranges": [[1.0, 0], [1.0, 0]]}, "of the state has 2 ranges, must have 3"),
        ({"ranges": [[1.0, 0]] * 4}, "of the state has 4 ranges, must have 3"),
        ({"ranges": "what"}, "block 'layer1.0' of the state is damaged: ValueError"),
        ({"reason": 3}, "is damaged: sqnr_db is .*, reason is 3"),
    ],
)
def test_a_damaged_state(quantized, change, match):
    state = json.loads(json.dumps(fused_resnet.quantization_state(quantized)))
    for key, value in change.items():
        (state if key in state else state["blocks"]["layer1.0"])[key] = value
    with pytest.raises(ValueError, match=match):
        fused_resnet.load_quantization_state(network(), state)


def test_states_that_are_none(quantized, tmp_path):
    with pytest.raises(ValueError, match="model is not quantized"):
        fused_resnet.quantization_state(network())
    with pytest.raises(TypeError, match="state is a list, must be a mapping or a file's path"):
        fused_resnet.load_quantization_state(network(), [])
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(ValueError, match="which is not JSON"):
        fused_resnet.load_quantization_state(network(), tmp_path / "no.json")
    for call in (
        fused_resnet.quantization_state,
        fused_resnet.dequantize,
        lambda model: fused_resnet.load_quantization_state(model, {}),
        lambda model: fused_resnet.quantize(model, []),
    ):
        with pytest.raises(TypeError, match=r"model is a int, must be a torch\.nn\.Module"):
            call(3)


def as_if_never_run(model, state):
    """The output of a model that has the same parameters and ranges and has not run before."""
    other = network()
    other.load_state_dict(model.state_dict())
    return run(fused_resnet.load_quantization_state(other, state))


CHANGES = {
    "in place": lambda block: block.conv1.weight.detach().mul_(1.1),
    "one value": lambda block: block.conv2.weight.detach()[3, 2, 1, 1].add_(5),
    "data in place": lambda block: block.conv1.weight.data.mul_(1.1),
    "data": lambda block: setattr(block.conv2.weight, "data", block.conv2.weight.data * 1.1),
    "numpy": lambda block: block.bn1.bias.detach().numpy().__iadd__(0.5),
    "statistics": lambda block: block.bn2.running_mean.add_(0.5),
    "projection": lambda block: block.downsample[0].weight.detach().mul_(0.5),
    "eps": lambda block: setattr(block.bn1, "eps", 0.5),
    "parameter": lambda block: setattr(
        block.conv1, "weight", nn.Parameter(block.conv1.weight.detach() * 1.1)
    ),
    "load_state_dict": lambda block: block.load_state_dict(
        {name: 1.1 * tensor for name, tensor in block.state_dict().items()}
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters_are_noticed(quantized, change):
    state = fused_resnet.quantization_state(quantized)
    before = run(quantized)
    CHANGES[change](quantized.layer2[0])
    after = run(quantized)
    if change == "eps":
        expected = network()
        expected.layer2[0].bn1.eps = 0.5
        expected = run(fused_resnet.load_quantization_state(expected, state))
    else:
        expected = as_if_never_run(quantized, state)
    assert not torch.equal(after, before)
    assert_same_bits(after, expected)


def test_watched_weights_are_compared_whole(quantized):
    """One value of many, written where torch does not see it."""
    state = fused_resnet.quantization_state(quantized)
    fused_resnet.fuse(quantized, watch="full")
    assert precisions(quantized) == ["int8"] * 3
    run(quantized)
    quantized.layer3[0].conv2.weight.data.view(-1)[11] = 2.0
    assert_same_bits(run(quantized), as_if_never_run(quantized, state))


def test_copies_are_made_once_and_let_go(quantized, monkeypatch):
    made = []
    make = quantized_copies._made

    def counted(*arguments):
        made.append(1)
        return make(*arguments)

    monkeypatch.setattr(quantized_copies, "_made", counted)
    before = len(quantized_copies._cache)
    with torch.inference_mode():
        quantized(images(3))
    assert len(made) == 3
    for x in (images(1), images(2, size=8)):
        run(quantized, x)
    assert len(made) == 3
    assert len(quantized_copies._cache) == before + 3
    quantized.eval()  # lets go, as of all copies of weights
    assert len(quantized_copies._cache) == before
    run(quantized)
    assert len(made) == 6
    with torch.no_grad():
        quantized.layer1[0].conv1.weight.mul_(2)
    run(quantized)
    assert len(made) == 7
    del quantized.layer3[0].conv1.weight
    with pytest.raises((AttributeError, KeyError)):  # a plan may have had it up to this pass
        run(quantized)
    assert len(quantized_copies._cache) == before + 2


def test_hooks(quantized):
    """Of a block they fire around eight bits; inside it they need float, and say so."""
    seen = []
    quantized.layer2[0].register_forward_hook(lambda module, inputs, out: seen.append(out))
    expected = run(quantized)
    assert len(seen) == 1
    handle = quantized.layer2[0].bn1.register_forward_hook(lambda module, inputs, out: None)
    assert precisions(quantized) == ["int8", "float32", "int8"]
    other = run(quantized)
    assert not torch.equal(other, expected)
    assert len(seen) == 2
    handle.remove()
    assert_same_bits(run(quantized), expected)


def test_a_hook_while_calibrating_and_none_afterwards():
    model = network()
    handle = model.layer1[0].conv1.register_forward_hook(lambda module, inputs, out: None)
    fused_resnet.quantize(model, [images()])
    handle.remove()
    assert precisions(model) == ["float32", "int8", "int8"]
    assert fused_resnet.report(model)[1].reason == "in floating point: conv1 carries hooks"


def test_float64_input_runs_in_float(quantized):
    plain = fused_resnet.fuse(network()).double()
    x = images(seed=3).double()
    assert_same_bits(run(quantized.double(), x), run(plain, x))
    assert precisions(quantized) == ["float64"] * 3


def test_report(quantized):
    report = fused_resnet.report(quantized)
    state = fused_resnet.quantization_state(quantized)
    stem, *blocks = report
    assert (stem.kind, stem.precision, stem.reason) == ("stem", "int16", "")
    assert stem.sqnr_db == state["stems"][""]["sqnr_db"]
    for record in blocks:
        assert (record.fused, record.precision, record.reason) == (True, "int8", "")
        assert record.sqnr_db == state["blocks"][record.path]["sqnr_db"]
        assert 25 < record.sqnr_db < 60
    first, *lines = str(report).splitlines()
    assert first.startswith("4 of 4 modules run fused, 3 in eight bits; all else, the classifier")
    assert f"int8, {blocks[0].sqnr_db:.1f} dB" in lines[1]
    plain = fused_resnet.report(fused_resnet.fuse(network()))
    assert "eight bits" not in str(plain)
    assert {record.precision for record in plain} == {"float32"}


def test_a_noisy_block_stays_in_float():
    """The limit is between the blocks' ratios: what is below it is named, the rest runs."""
    model = fused_resnet.quantize(network(), [images(4)])
    ratios = [record.sqnr_db for record in fused_resnet.report(model)[1:]]
    worst = min(ratios)
    limit = (worst + sorted(ratios)[1]) / 2
    fused_resnet.quantize(model, [images(4)], min_sqnr_db=limit)
    for ratio, record in zip(ratios, fused_resnet.report(model)[1:], strict=True):
        assert record.sqnr_db == ratio
        assert record.precision == ("float32" if ratio == worst else "int8")
        if ratio == worst:
            assert record.reason == (
                f"in floating point: signal to noise is {ratio:.1f} dB, must be {limit:g}"
            )
    with pytest.raises(ValueError, match=r"no residual block .* 'layer1.0': signal to noise"):
        fused_resnet.quantize(network(), [images(4)], min_sqnr_db=math.inf)


def test_a_block_that_does_not_fold_stays_in_float():
    """A filter of zeros and a scale that is, over a small step, beyond float32's numbers."""
    model = network()
    block = model.layer2[0]
    with torch.no_grad():
        for tensor in (block.bn1.weight, block.bn1.bias, block.bn1.running_mean):
            tensor.mul_(1e-4)
            tensor[5] = 0
        block.conv1.weight.mul_(1e-2)
        block.bn1.weight[5] = 1e38
        block.bn1.running_var[5] = 1
        block.conv1.weight[5] = 0
    fused_resnet.quantize(model, [images()])
    assert precisions(model) == ["int8", "float32", "int8"]
    assert (
        "what its norm and steps make of it, is not finite" in fused_resnet.report(model)[2].reason
    )


def test_a_dead_activation_keeps_its_block_in_float():
    model = network()
    with torch.no_grad():
        model.layer2[0].bn1.bias.fill_(-1e6)
    fused_resnet.quantize(model, [images()])
    assert precisions(model) == ["int8", "float32", "int8"]
    assert "the output of conv1 is zero in all calibration" in fused_resnet.report(model)[2].reason


def untouched(model):
    return type(model.layer1[0]) is resnet.BasicBlock and not any(
        "quantization" in vars(module) for module in model.modules()
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"batches": []}, ValueError, "batches has no batch"),
        ({"batches": 3}, TypeError, "batches is a int, must be an iterable of inputs"),
        ({"batches": images()}, TypeError, "batches is a Tensor, must be an iterable of inputs"),
        ({"batches": [images(), "x"]}, TypeError, "batch 1 is a str, must be a tensor or an"),
        ({"batches": [(images(),)]}, TypeError, "batch 0 is a tuple of 1, must be a tensor or an"),
        ({"batches": [(1, images())]}, TypeError, "batch 0 is a tuple of 2, must be a tensor or"),
        ({"batches": [images().to("meta")]}, ValueError, "batch 0 is on meta, the model is on cpu"),
        ({"batches": [images() * math.nan]}, ValueError, "the input of block 'layer1.0' has a val"),
        (
            {"batches": [images(), images() * math.inf]},
            ValueError,
            "'layer1.0' has a value that is",
        ),
        ({"dtype": "int4"}, ValueError, "dtype is 'int4', must be int8 or float8_e4m3fn"),
        (
            {"observer": "entropy"},
            ValueError,
            "observer is 'entropy', must be one of minmax, percentile, mse, histogram",
        ),
        ({"percentile": 50}, ValueError, "percentile is 50, must be above 50 and at most 100"),
    ],
)
def test_bad_arguments(arguments, error, match):
    model = network()
    arguments = {"batches": [images()]} | arguments
    with pytest.raises(error, match=match) as caught:
        fused_resnet.quantize(model, **arguments)
    assert str(caught.value).startswith("quantize: ")
    assert "\n" not in str(caught.value)
    assert untouched(model)


def test_an_error_leaves_a_quantized_model_quantized(quantized):
    expected = run(quantized)
    state = fused_resnet.quantization_state(quantized)
    with pytest.raises(ValueError, match="has no batch"):
        fused_resnet.quantize(quantized, [])
    assert fused_resnet.quantization_state(quantized) == state
    assert_same_bits(run(quantized), expected)


def test_nothing_to_quantize():
    plain = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    with pytest.raises(ValueError, match="model has no residual block to quantize"):
        fused_resnet.quantize(plain, [images()])
    model = network()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    with pytest.raises(ValueError, match=r"'layer1.0': bn1 uses the batch's statistics"):
        fused_resnet.quantize(model, [images()])
    assert untouched(model)


def test_zero_everywhere():
    model = network()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.zero_()
                norm.bias.zero_()
    with pytest.raises(ValueError, match=r"'layer1\.0': the input is zero in all calibration"):
        fused_resnet.quantize(model, [images()])
    assert untouched(model)


def test_structure_changed_since_calibration(quantized):
    with pytest.raises(ValueError, match=r"'layer1\.0': input has 3 channels, was calibrated"):
        quantized.layer1[0](torch.randn(1, 3, 4, 4))
    quantized.layer1[0].conv1 = nn.Conv2d(16, 16, 1, bias=False)
    with pytest.raises(
        ValueError,
        match=r"'layer1.0': convolution 0 has a weight of shape \(16, 16, 1, 1\), was calibrated "
        r"with \(16, 16, 3, 3\)",
    ):
        run(quantized)
    quantized.layer1[0].conv1 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
    quantized.layer1[0].downsample = nn.Sequential(nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)).eval()
    with pytest.raises(ValueError, match="has 3 convolutions, was calibrated with 2"):
        run(quantized)


def test_a_class_count_is_the_classifiers(quantized):
    """The classifier is in floating point, so it may change, as may the image size."""
    quantized.fc = nn.Linear(64, 3)
    assert run(quantized, images(size=16)).shape == (2, 3)


def test_no_plan_is_made_of_eight_bits(quantized):
    """A backend's plan holds what it launched for float; see modules/plans.py."""
    parts = [quantized.layer1, quantized.layer2, quantized.layer3]
    assert not plans.Modules(parts).are_plain()
    fused_resnet.dequantize(quantized)
    assert plans.Modules(parts).are_plain()


def test_progress(capfd):
    fused_resnet.quantize(network(), [images()], progress=True)
    assert capfd.readouterr().out == ""
    fused_resnet.quantize(network(), [images()])
    assert capfd.readouterr() == ("", "")


def test_timm():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    for name, expected in (("resnet18", 8), ("seresnext26d_32x4d", 0)):
        model = randomize_(timm.create_model(name, num_classes=4)).eval()
        x = torch.randn(1, 3, 48, 48)
        if expected == 0:
            with pytest.raises(ValueError, match=r"'layer1\.0': se is a"):
                fused_resnet.quantize(model, [x])
            continue
        plain = run(model, x)
        fused_resnet.quantize(model, [x])
        assert precisions(model) == ["int8"] * expected
        assert (run(model, x) - plain).norm() < 0.05 * plain.norm()
