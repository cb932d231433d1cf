"""`prepare_qat`: training with the rounding of eight bits, and what `quantize` makes of it."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_bits
from torch import nn
from torch.utils.checkpoint import checkpoint

import fused_resnet
from fused_resnet.models import cifar_resnet
from fused_resnet.testing import randomize_

pytestmark = pytest.mark.quick


def network(depth=8, shortcut="B", seed=1):
    torch.manual_seed(seed)
    return randomize_(cifar_resnet(depth, shortcut=shortcut, in_channels=1), seed)


def images(count=4, seed=0, size=10):
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def trained(model, steps=3, seed=0):
    """A few steps of gradient descent on nothing in particular."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        model(images(seed=seed + step)).square().mean().backward()
        optimizer.step()
    return model


def ranges_of(model):
    blocks = fused_resnet.quantization_state(model)["blocks"]
    return {path: [tuple(one) for one in block["ranges"]] for path, block in blocks.items()}


def rounded(values, step, zero_point, smallest, largest):
    """As read from bytes; the gradient is the identity's where nothing is clipped, zero else."""
    steps = values / step + zero_point
    inside = (steps.round() >= smallest) & (steps.round() <= largest)
    stored = (steps.round().clamp(smallest, largest) - zero_point) * step
    return torch.where(inside, values, 0) + (stored - torch.where(inside, values, 0)).detach()


def by_hand(block, x, ranges):
    """A `BasicBlock` in training mode with its rounding, of single operators in float64."""

    def weight(conv):
        step = conv.weight.abs().amax((1, 2, 3), keepdim=True).detach() / 127
        return rounded(conv.weight, step, 0, -127, 127)

    def conv_norm(conv, norm, x):
        out = F.conv2d(x, weight(conv), None, conv.stride, conv.padding)
        return F.batch_norm(out, None, None, norm.weight, norm.bias, True, 0.0, norm.eps)

    x = rounded(x, *ranges[0], 0, 255)
    out = rounded(conv_norm(block.conv1, block.bn1, x).relu(), *ranges[1], 0, 255)
    shortcut = x if block.downsample is None else conv_norm(*block.downsample, x)
    return rounded((conv_norm(block.conv2, block.bn2, out) + shortcut).relu(), *ranges[2], 0, 255)


@pytest.mark.parametrize("stage", ["layer1", "layer2"])
def test_gradients_go_straight_through(stage):
    """Output and all gradients are those of the formula, where ranges clip and where not."""
    model = fused_resnet.prepare_qat(network(14))
    trained(model)
    block = getattr(model, stage)[0]
    fused_resnet.prepare_qat(model, averaging_constant=0.0)
    ranges = ranges_of(model)[f"{stage}.0"]
    x = 2 * torch.randn(
        3, block.conv1.in_channels, 6, 6, generator=torch.Generator().manual_seed(5)
    )
    plain = copy.deepcopy(fused_resnet.unfuse(copy.deepcopy(block))).double().train()
    x, y = x.requires_grad_(), x.detach().double().requires_grad_()
    out, expected = block.train()(x), by_hand(plain, y, ranges)
    # A sum in float32 falls on the other side of a half now and then.
    off = (out - expected).abs() / ranges[-1][0]
    assert off.max() < 1.5
    assert (off > 1e-3).double().mean() < 0.01
    step, zero_point = ranges[0]
    assert (x > (255 - zero_point) * step).any(), "nothing is clipped"
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(6))
    out.backward(towards)
    expected.backward(towards.double())
    own = {"input": x, **dict(block.named_parameters())}
    for name, other in {"input": y, **dict(plain.named_parameters())}.items():
        assert (own[name].grad - other.grad).norm() < 0.02 * other.grad.norm(), name


def test_ranges_are_moving_averages():
    model = fused_resnet.prepare_qat(network(), averaging_constant=0.25)
    block = model.layer1[0].train()
    batches = [torch.randn(2, 16, 5, 5, generator=torch.Generator().manual_seed(i)) for i in (1, 2)]
    low = high = None
    for batch in batches:
        block(batch)
        ends = batch.min().item(), batch.max().item()
        low, high = (
            ends if low is None else (low + (ends[0] - low) / 4, high + (ends[1] - high) / 4)
        )
    step, zero_point = ranges_of(model)["layer1.0"][0]
    assert step == pytest.approx((high - low) / 255, rel=1e-6)
    assert zero_point == round(-low / step)
    before = ranges_of(model)
    block.eval()(100 * batches[0])
    assert ranges_of(model) == before, "ranges moved in inference"


def test_ranges_stay_where_they_are_told_to():
    model = trained(fused_resnet.prepare_qat(network()))
    before = ranges_of(model)
    trained(fused_resnet.prepare_qat(model, averaging_constant=0.0), seed=7)
    assert ranges_of(model) == before
    trained(fused_resnet.prepare_qat(model), seed=7)
    assert ranges_of(model) != before


def test_training_starts_from_calibrated_ranges():
    model = fused_resnet.quantize(network(), [images()])
    before = ranges_of(model)
    fused_resnet.prepare_qat(model, averaging_constant=0.0)
    assert ranges_of(model) == before
    x = images(seed=9)
    with torch.no_grad():
        simulated = model.eval()(x)
        stored = fused_resnet.quantize(model)(x)
    assert ranges_of(model) == before
    assert (simulated - stored).norm() < 1e-3 * stored.norm()


@pytest.mark.parametrize("depth", [8, 14])
def test_inference_of_a_prepared_model_is_that_of_the_quantized_one(depth):
    """But for sums that float32 puts on the other side of a half."""
    model = trained(fused_resnet.prepare_qat(network(depth))).eval()
    x = images(8, seed=9)
    with torch.no_grad():
        simulated = model(x)
        stored = fused_resnet.quantize(model)(x)
        plain = fused_resnet.dequantize(model)(x)
    assert (simulated - stored).norm() < 0.1 * (plain - stored).norm()
    assert (plain - stored).norm() > 1e-3 * plain.norm()


def test_blocks_read_in_the_steps_of_the_one_before():
    ranges = list(ranges_of(trained(fused_resnet.prepare_qat(network(14)))).values())
    for (*_, written), (read, *_) in itertools.pairwise(ranges):
        assert written == read


def test_a_block_that_is_called_alone_has_a_range_of_its_own():
    model = trained(fused_resnet.prepare_qat(network(14)), steps=1)
    model.layer1[1](torch.randn(2, 16, 5, 5))
    assert ranges_of(model)["layer1.1"][0][1] > 0, "the input has negative numbers"
    x = images(seed=9)
    with torch.no_grad():
        assert fused_resnet.quantize(model.eval())(x).isfinite().all()


def test_nothing_but_the_ranges_changes():
    model = network()
    keys = list(model.state_dict())
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    assert fused_resnet.prepare_qat(model) is model
    assert list(model.state_dict()) == keys
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == tensors
    batches = model.layer1[0].bn1.num_batches_tracked.clone()
    trained(model, steps=2)
    assert model.layer1[0].bn1.num_batches_tracked == batches + 2
    twin = fused_resnet.fuse(network())
    twin.load_state_dict(model.state_dict())
    x = images(seed=9)
    with torch.no_grad():
        assert_same_bits(fused_resnet.dequantize(model).eval()(x), twin.eval()(x))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_on_by_themselves(again):
    model = trained(fused_resnet.prepare_qat(network()))
    twin = again(model)
    x = images(seed=9)
    with torch.no_grad():
        assert_same_bits(twin.eval()(x), model.eval()(x))
    before = ranges_of(model)
    trained(twin, seed=20)
    assert ranges_of(model) == before
    assert ranges_of(twin) != before


def test_unfuse_ends_it():
    model = fused_resnet.unfuse(trained(fused_resnet.prepare_qat(network())))
    assert not any("quantization" in vars(module) for module in model.modules())


def test_report_says_what_is_rounded():
    model = fused_resnet.prepare_qat(network(shortcut="A"))
    stem, first, second, _ = fused_resnet.report(model)
    assert stem.precision == "float32"
    assert first.precision == "float32, rounded to int8"
    assert second.precision == "float32"
    assert "not rounded to int8: downsample pads channels" in second.reason
    assert "rounded to int8" in str(fused_resnet.report(model))


def test_checkpointing():
    model = fused_resnet.prepare_qat(network()).train()
    h = checkpoint(model.layer1, torch.rand(2, 16, 5, 5, requires_grad=True), use_reentrant=False)
    h.sum().backward()
    assert model.layer1[0].conv1.weight.grad.norm() > 0


def test_autocast():
    model = fused_resnet.prepare_qat(network()).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images()).float().square().mean()
    loss.backward()
    assert model.layer2[0].conv2.weight.grad.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_seen_and_leaves_no_trace(value):
    model = trained(fused_resnet.prepare_qat(network()))
    before = ranges_of(model)["layer1.0"]
    h = torch.rand(2, 16, 5, 5)
    h[1, 3, 2, 2] = value
    assert model.layer1[0](h).isnan().all()
    assert ranges_of(model)["layer1.0"][0] == before[0]
    # The first batch of all was one of these: the next one counts as the first.
    model = fused_resnet.prepare_qat(network()).train()
    model.layer1[0](h)
    fine = torch.rand(2, 16, 5, 5)
    model.layer1[0](fine)
    step, _ = ranges_of(model)["layer1.0"][0]
    assert step == pytest.approx(fine.max().item() / 255, rel=1e-6)


def test_empty_batch():
    model = fused_resnet.prepare_qat(network()).eval()
    assert model(images(0)).shape == (0, 10)


def test_bad_arguments():
    with pytest.raises(ValueError, match="was not trained for eight bits"):
        fused_resnet.quantize(network())
    model = fused_resnet.prepare_qat(network())
    with pytest.raises(ValueError, match="no batch was trained with it"):
        fused_resnet.quantize(model)
    assert fused_resnet.report(model)[1].precision == "float32, rounded to int8"
    with pytest.raises(TypeError, match="prepare_qat: model is a int"):
        fused_resnet.prepare_qat(3)
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        fused_resnet.prepare_qat(model, dtype="int4")
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="averaging_constant is"):
            fused_resnet.prepare_qat(model, averaging_constant=wrong)
    with pytest.raises(ValueError, match="no residual block"):
        fused_resnet.prepare_qat(nn.Linear(2, 2))


def test_a_model_in_training_mode_is_calibrated_as_in_inference():
    model = fused_resnet.quantize(network().train(), [images()])
    twin = fused_resnet.quantize(network().eval(), [images()])
    assert model.training
    assert ranges_of(model) == ranges_of(twin)
    assert ranges_of(model)["layer1.0"]
