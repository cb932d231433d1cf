"""Blocks in float8_e4m3fn: the definition by hand, settings, states, what notices a change."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from quantization.test_numbers import BLOCKS, channels_of, make_block
from quantization.test_quantize import images, network, precisions, run
from support import assert_same_bits
from support.float8 import MIDDLES, NUMBERS, bounds, e4m3, float64_sums
from torchvision.models import resnet

import fused_resnet
from fused_resnet import reference
from fused_resnet.layers.quantized import Quantization, QuantizedBlock, QuantizedConv
from fused_resnet.modules import fake_quantized
from fused_resnet.testing import relative_error

pytestmark = pytest.mark.quick

DTYPE = "float8_e4m3fn"


def folded(conv, norm, step_in, step_out):
    """A weight in float8, and scale and shift as float64."""
    weight = conv.weight.detach().double().numpy()
    steps = np.abs(weight).reshape(len(weight), -1).max(1) / 448
    mean, var, gamma, beta = (
        t.detach().double().numpy()
        for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    scale = gamma / np.sqrt(var + norm.eps)
    stored = e4m3((weight / steps.reshape(-1, 1, 1, 1)).astype(np.float32))
    return stored, steps * scale * step_in / step_out, (beta - mean * scale) / step_out


def by_hand(block, x, steps):
    """The block's output from its definition, sums in float64."""
    column = lambda vector: vector.astype(np.float32).astype(np.float64).reshape(1, -1, 1, 1)  # noqa: E731
    scaled = (x * torch.tensor(1 / steps[0], dtype=torch.float64).float()).numpy()
    values = first = e4m3(np.clip(scaled, -448, 448))
    names = [i for i in (1, 2, 3) if hasattr(block, f"conv{i}")]
    for index, i in enumerate(names):
        conv, norm = getattr(block, f"conv{i}"), getattr(block, f"bn{i}")
        step_in, step_out = steps[index], steps[index + 1]
        weight, scale, shift = folded(conv, norm, step_in, step_out)
        total = float64_sums(values, weight, conv) * column(scale)
        if i == names[-1] and block.downsample is None:
            total = total + first * float(np.float32(steps[0] / step_out))
        elif i == names[-1]:
            weight, scale, more = folded(*block.downsample, steps[0], step_out)
            total = total + float64_sums(first, weight, block.downsample[0]) * column(scale)
            shift = shift + more
        values = e4m3(np.clip(total + column(shift), 0, 448))
    return torch.from_numpy(values.astype(np.float32) * np.float32(step_out))


def made(name="basic, projection", **settings):
    block = make_block(name)
    x = torch.randn(3, channels_of(block), 7, 6, generator=torch.Generator().manual_seed(5))
    return fused_resnet.quantize(block, [x[:2], x[2:]], dtype=DTYPE, **settings), x


def steps_of(model):
    (state,) = fused_resnet.quantization_state(model)["blocks"].values()
    assert all(zero_point == 0 for _, zero_point in state["ranges"])
    return [step for step, _ in state["ranges"]]


def test_by_hand_is_right():
    """The rounding of these tests against torch's, of every number, middle and neighbour."""
    values = np.concatenate([NUMBERS, MIDDLES, MIDDLES * (1 + 2.0**-20), MIDDLES * (1 - 2.0**-20)])
    values = np.concatenate([values, -values]).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).float()
    assert_same_bits(torch.from_numpy(e4m3(values).astype(np.float32)), expected)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_what_its_definition_says(name):
    """Nearly every number exactly; the few that sums in float32 round the other way, by a step."""
    block, x = made(name)
    with torch.no_grad():
        out = block(x)
    expected = by_hand(block, x, steps_of(block))
    assert expected.unique().numel() > 30
    assert out.dtype is torch.float32
    differs = out != expected
    assert differs.double().mean() < 0.01
    assert relative_error(out, expected) < 2**-7


@pytest.mark.parametrize("groups", [1, 2])
def test_every_number_is_within_the_bound(groups):
    """A layer's number is e4m3 of the exact one, but within `n 2^-23` of sums near a middle."""
    rng = torch.Generator().manual_seed(groups)
    weight = torch.randn(24, 24 // groups, 3, 3, generator=rng).mul(100).clamp(-448, 448)
    n = weight[0].numel()
    layer = QuantizedConv(
        weight.to(torch.float8_e4m3fn),
        (torch.rand(24, generator=rng) + 0.5) / (150 * n**0.5),
        30 * torch.randn(24, generator=rng),
        (1, 1),
        (1, 1),
        (1, 1),
        groups,
    )
    x = torch.randn(2, 24, 9, 8, generator=rng)
    block = QuantizedBlock((layer,), False, 0.75)
    out = reference.float8_residual_blocks(x, [block], Quantization(0.01), Quantization(1.0))
    low, high = bounds(x, block, 0.01)
    found = out.double().numpy()
    assert ((low <= found) & (found <= high)).all()
    assert (low == high).mean() > 0.95
    assert len(np.unique(found)) > 60


def test_rounding_and_what_is_not_finite():
    """To even, to subnormal numbers, never beyond 448; NaN stays NaN, here and behind the ReLU."""
    one = QuantizedConv(
        torch.ones(1, 1, 1, 1).to(torch.float8_e4m3fn),
        torch.ones(1),
        torch.zeros(1),
        (1, 1),
        (0, 0),
        (1, 1),
        1,
    )
    values = [17.0, 19.0, 2.0**-10, 3 * 2.0**-10, 464.0, 1e30, math.inf, -1.0, -math.inf, math.nan]
    expected = [16.0, 20.0, 0.0, 2.0**-8, 448.0, 448.0, 448.0, 0.0, 0.0, math.nan]
    x = torch.tensor(values).view(1, 1, 2, 5)
    for dtype in (torch.float32, torch.bfloat16):
        out = reference.float8_residual_blocks(
            x.to(dtype), [QuantizedBlock((one,), False, 0.0)], Quantization(1.0), Quantization(1.0)
        )
        expected_out = torch.tensor(expected).view(1, 1, 2, 5).to(dtype)
        torch.testing.assert_close(out, expected_out, rtol=0, atol=0, equal_nan=True)
    for scale, shift in ((math.inf, -math.inf), (math.nan, 0.0)):
        odd = one._replace(scale=torch.tensor([scale]), shift=torch.tensor([shift]))
        block = QuantizedBlock((odd, one), False, 0.0)
        out = reference.float8_residual_blocks(
            torch.ones(1, 1, 1, 1), [block], Quantization(1.0), Quantization(1.0)
        )
        assert out.isnan().all()


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_as_close_to_float64_as_its_definition(name):
    block = make_block(name)
    x = torch.randn(8, channels_of(block), 9, 9)
    with torch.no_grad():
        expected = copy.deepcopy(block).double()(x.double())
        fused_resnet.quantize(block, [x], dtype=DTYPE)
        error = relative_error(block(x), expected)
    own = relative_error(by_hand(block, x, steps_of(block)), expected)
    assert 2**-8 < own < 2**-4
    assert error < 1.02 * own
    (record,) = fused_resnet.report(block)
    assert record.sqnr_db == pytest.approx(-20 * np.log10(error), abs=0.5)


def test_report_names_it_and_back():
    model = network()
    plain = run(fused_resnet.fuse(model))
    fused_resnet.quantize(model, [images()], dtype=DTYPE)
    assert precisions(model) == [DTYPE] * 3
    assert "3 in eight bits" in str(fused_resnet.report(model))
    for record in fused_resnet.report(model):
        if record.kind == "stem":
            assert (record.precision, record.sqnr_db) == ("float32", None)
        else:
            assert record.backend.endswith(": float8_e4m3fn by torch's operators")
    in_eight_bits = run(model)
    assert 0 < relative_error(in_eight_bits, plain) < 0.2
    integers = fused_resnet.quantize(copy.deepcopy(model), [images()], stem="float")
    assert precisions(integers) == ["int8"] * 3
    assert not torch.equal(run(integers), in_eight_bits)
    assert precisions(fused_resnet.dequantize(model)) == ["float32"] * 3
    assert_same_bits(run(model), plain)


def test_one_call_and_many(monkeypatch):
    """In one call, block by block and in other dtypes."""
    model = fused_resnet.quantize(network(14), [images()], dtype=DTYPE)
    expected = run(model)
    model.layer1[1].register_forward_hook(lambda module, inputs, out: None)
    assert_same_bits(run(model), expected)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert run(model).dtype is torch.bfloat16
    with torch.no_grad():
        half = copy.deepcopy(model).half()
        assert relative_error(half(images(seed=9).half()), expected) < 0.1


def test_a_block_of_another_dtype_is_called_by_itself():
    """Beside a block in integers, whatever the steps."""
    model = fused_resnet.quantize(network(14), [images()], dtype=DTYPE)
    kept = model.layer1[1].quantization
    one_by_one = copy.deepcopy(model)
    vars(model.layer1[1])["quantization"] = kept._replace(dtype="int8")
    vars(one_by_one.layer1[1])["quantization"] = kept._replace(dtype="int8")
    for block in (block for i in (1, 2, 3) for block in getattr(one_by_one, f"layer{i}")):
        block.register_forward_hook(lambda module, inputs, out: None)
    assert_same_bits(run(model), run(one_by_one))


def test_changed_weights_are_noticed():
    """Written with a version and without one, a weight's and a norm's."""
    model, x = made()
    with torch.no_grad():
        before = model(x)
        for tensor in (model.conv1.weight, model.bn2.bias, model.downsample[0].weight):
            for write in (lambda t: t.add_(0.5), lambda t: t.numpy().__iadd__(-0.25)):
                write(tensor.detach().view(-1)[3:4])
                after = model(x)
                assert not torch.equal(after, before)
                assert_same_bits(after, copy.deepcopy(model)(x))
                before = after


def test_states(tmp_path):
    model = fused_resnet.quantize(network(), [images()], dtype=DTYPE)
    expected = run(model)
    state = fused_resnet.quantization_state(model)
    assert state["dtype"] == DTYPE
    assert "stems" not in state
    fused_resnet.save_quantization_state(model, tmp_path / "ranges.json")
    other = fused_resnet.load_quantization_state(network(), tmp_path / "ranges.json")
    assert precisions(other) == [DTYPE] * 3
    assert fused_resnet.quantization_state(other) == state
    for same in (other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(run(same), expected)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.update(dtype="float8_e5m2"), "must be 'int8' or 'float8_e4m3fn'"),
        (lambda s: s["blocks"]["layer1.0"]["ranges"][0].__setitem__(1, 3), "has a zero point"),
        (lambda s: s.update(stems={"": {}}), "and stems, which are of integers"),
    ],
)
def test_damaged_states(change, match):
    model = fused_resnet.quantize(network(), [images()], dtype=DTYPE)
    state = json.loads(json.dumps(fused_resnet.quantization_state(model)))
    change(state)
    other = network()
    with pytest.raises(ValueError, match=match):
        fused_resnet.load_quantization_state(other, state)
    assert type(other.layer1[0]) is resnet.BasicBlock


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"stem": "int8"}, "stem is 'int8', must be 'float' with dtype 'float8_e4m3fn'"),
        ({"batches": None}, "needs calibration batches"),
        ({"scales": object()}, "needs calibration batches"),
    ],
)
def test_bad_arguments(arguments, match):
    model = network()
    with pytest.raises(ValueError, match=match):
        fused_resnet.quantize(model, **{"batches": [images()], "dtype": DTYPE} | arguments)
    assert type(model.layer1[0]) is resnet.BasicBlock


def test_training_with_rounding_is_of_integers():
    """It refuses the dtype, and does not take steps of 448 for those of 255."""
    with pytest.raises(ValueError, match="dtype is 'float8_e4m3fn', must be int8"):
        fused_resnet.prepare_qat(network(), dtype=DTYPE)
    model = fused_resnet.quantize(network(), [images()], dtype=DTYPE)
    fused_resnet.prepare_qat(model)
    kept = fake_quantized.of(model.layer1[0])
    assert all(moving.quantization() is None for moving in kept.ranges_read())
    model.train()(images())
    fused_resnet.quantize(model.eval())
    assert precisions(model) == ["int8"] * 3


def test_compiled_and_exported():
    """One operator; taken apart, torch's own, with the same bits."""
    model = fused_resnet.quantize(network(), [images()], dtype=DTYPE)
    x = images(seed=9)
    with torch.no_grad():
        expected = model(x)
        exported = torch.export.export(model, (x,))
        names = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
        assert any(name.startswith("fused_resnet.residual_blocks_float8") for name in names)
        assert relative_error(exported.module()(x), expected) < 1e-6
        apart = exported.run_decompositions(fused_resnet.decompositions())
        names = [str(n.target) for n in apart.graph.nodes if n.op == "call_function"]
        assert not any(name.startswith("fused_resnet.") for name in names)
        assert relative_error(apart.module()(x), expected) < 0.02


def test_zero_weights_and_small_ones():
    """A filter of nothing, or of nearly nothing, has a step of one."""
    block = make_block("basic")
    with torch.no_grad():
        block.conv1.weight[0] = 0
        block.conv2.weight[1] = 1e-40
    x = torch.randn(2, 6, 7, 7)
    fused_resnet.quantize(block, [x], dtype=DTYPE)
    with torch.no_grad():
        out = block(x)
        plain = fused_resnet.dequantize(block)(x)
    assert out.isfinite().all()
    assert relative_error(out, plain) < 0.1
