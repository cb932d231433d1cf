"""The checks can fail: each is shown a wrong implementation and has to object."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from support import (
    DIFFERENTIABLE,
    ConvShape,
    assert_same_bits,
    assert_same_nonfinite,
    assert_within_bound,
    conv_gradients,
    image_batch,
    make_conv_case,
    small_resnet,
    unchanged,
)

import fused_resnet
from fused_resnet import backends, reference
from fused_resnet.testing import assert_error_rule

SHAPE = ConvShape(32, 32, (3, 3), (1, 1), (1, 1))
NAMES = list(inspect.signature(reference.conv_bn_act).parameters)


def without_residual(a):
    return reference.conv_bn_act(**{**a, "residual": None})


def without_bias(a):
    return reference.conv_bn_act(**{**a, "bias": None})


def without_activation(a):
    return reference.conv_bn_act(**{**a, "activation": "none"})


def relu_that_kills_nan(a):
    out = reference.conv_bn_act(**{**a, "activation": "none"})
    return torch.where(out > 0, out, torch.zeros_like(out))


def relu_before_add(a):
    return F.relu(reference.conv_bn_act(**{**a, "residual": None})) + a["residual"]


def without_eps(a):
    return reference.conv_bn_act(**{**a, "eps": 0.0})


def biased_mean(a):
    return reference.conv_bn_act(**{**a, "running_mean": a["running_mean"] * 1.01})


def last_channel_dropped(a):
    out = reference.conv_bn_act(**a).clone()
    out[:, -1] = 0
    return out


def last_pixel_wrong(a):
    out = reference.conv_bn_act(**a).clone()
    out[-1, :, -1, -1] += 0.05
    return out


def half_precision_accumulation(a):
    half = {n: v.bfloat16() if isinstance(v, torch.Tensor) else v for n, v in a.items()}
    return reference.conv_bn_act(**half).to(a["input"].dtype)


def padding_of_ones(a):
    x = F.pad(a["input"], (1, 1, 1, 1), value=1.0)
    return reference.conv_bn_act(**{**a, "input": x, "padding": [0, 0]})


def dilation_ignored(a):
    out = reference.conv_bn_act(**{**a, "weight": a["weight"].flip(2)})
    return out


WRONG = [
    without_residual,
    without_bias,
    without_activation,
    relu_before_add,
    without_eps,
    biased_mean,
    last_channel_dropped,
    last_pixel_wrong,
    half_precision_accumulation,
    padding_of_ones,
    dilation_ignored,
]


class Break:
    """Puts a wrong `conv_bn_act` into the CPU backend, and knows whether it was called."""

    def __init__(self, monkeypatch, wrong):
        self.calls = 0

        def broken(input, layer, *others):
            self.calls += 1
            return wrong(dict(zip(NAMES, (input, *layer.flat(), *others), strict=True)))

        monkeypatch.setattr(backends.cpu.Cpu, "conv_bn_act", staticmethod(broken))


def case_with_everything(dtype=torch.float32):
    case = make_conv_case(SHAPE, dtype=dtype, bias=True)
    case.eps = 1e-2
    return case


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_the_error_rule_notices(monkeypatch, wrong):
    case = case_with_everything()
    broken = Break(monkeypatch, wrong)
    with pytest.raises(AssertionError):
        assert_error_rule(case.fused(), case.eager(), case.double().eager())
    assert broken.calls == 1


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_the_rounding_bound_notices(monkeypatch, wrong):
    case = case_with_everything()
    broken = Break(monkeypatch, wrong)
    with pytest.raises(AssertionError):
        assert_within_bound(case.fused(), case.double().eager(), case.rounding_bound())
    assert broken.calls == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_checks_accept_the_reference(monkeypatch, dtype):
    """The counterpart: what is right passes the same checks."""
    case = case_with_everything(dtype)
    broken = Break(monkeypatch, lambda a: reference.conv_bn_act(**a))
    out = case.fused()
    assert broken.calls == 1
    assert_error_rule(out, case.eager(), case.double().eager())
    assert_within_bound(out, case.double().eager(), case.rounding_bound())


def test_nan_check_notices_a_relu_that_kills_nan(monkeypatch):
    case = case_with_everything()
    case.input[0, 0, 0, 0] = math.nan
    Break(monkeypatch, relu_that_kills_nan)
    with pytest.raises(AssertionError, match="instead of nan"):
        assert_same_nonfinite(case.fused(), case.eager())


def test_staleness_check_notices_a_stale_weight(monkeypatch):
    """A cache of packed weights that nothing ever invalidates."""
    weights = backends.cpu.weights
    pack, kept = weights.packed_copy, {}

    def never_again(weight, groups):
        if id(weight) not in kept:
            kept[id(weight)] = pack(weight, groups)
        return kept[id(weight)]

    model = fused_resnet.fuse(small_resnet())
    x = image_batch(2, 40)
    with torch.no_grad():
        monkeypatch.setattr(weights, "packed", lambda *weight: never_again(*weight)[1])
        monkeypatch.setattr(weights, "as_packed_anew", never_again)
        monkeypatch.setattr(weights, "packed_anew", lambda *weight: never_again(*weight)[1])
        monkeypatch.setattr(weights, "packed_copy", never_again)
        model(x)
        assert kept
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter[1, 0, 0, 0] += 1.0
        stale = model(x)
        monkeypatch.undo()
        with pytest.raises(AssertionError):
            assert_same_bits(stale, fused_resnet.fuse(copy.deepcopy(model))(x))


def test_purity_check_notices_writes():
    tensor, other = torch.zeros(4), torch.zeros(4)
    with (
        pytest.raises(AssertionError, match="other was written"),
        unchanged(tensor=tensor, other=other),
    ):
        other.data[2] = 1.0
    with pytest.raises(AssertionError, match="in place"), unchanged(tensor=tensor):
        tensor.mul_(1.0)
    with unchanged(tensor=tensor):
        tensor.clone().add_(1.0)


def test_bit_check_sees_signed_zeros_and_nan():
    zero = torch.zeros(3)
    with pytest.raises(AssertionError):
        assert_same_bits(-zero, zero)
    nan = torch.full((3,), math.nan)
    assert_same_bits(nan, nan.clone())
    with pytest.raises(AssertionError):
        assert_same_bits(zero.double(), zero)


def test_gradient_check_notices_a_wrong_derivative(monkeypatch):
    """A backward that forgets the activation's mask."""
    from fused_resnet.ops import conv_bn_act as operator_module

    case = make_conv_case(SHAPE, bias=True)
    monkeypatch.setattr(operator_module, "act_backward", lambda grad, output, activation: grad)
    _, ours = conv_gradients(make_conv_case(SHAPE, bias=True), lambda c: c.fused(), DIFFERENTIABLE)
    _, theirs = conv_gradients(
        make_conv_case(SHAPE, bias=True), lambda c: c.eager(), DIFFERENTIABLE
    )
    _, exact = conv_gradients(case.double(), lambda c: c.eager(), DIFFERENTIABLE)
    for name in DIFFERENTIABLE:
        with pytest.raises(AssertionError):
            assert_error_rule(ours[name], theirs[name], exact[name])
    assert operator_module is not None


def test_the_error_rule_needs_the_reference():
    """It objects to NaN, to infinities and to another shape, too."""
    exact = torch.randn(50, dtype=torch.float64)
    eager = exact.float()
    assert_error_rule(eager.clone(), eager, exact)
    for spoiled in (math.nan, math.inf):
        bad = eager.clone()
        bad[3] = spoiled
        with pytest.raises(AssertionError):
            assert_error_rule(bad, eager, exact)
    with pytest.raises((AssertionError, ValueError, RuntimeError)):
        assert_error_rule(eager[:10], eager, exact)


def test_the_error_rule_is_one_and_a_half():
    """Twice eager's error fails and 1.4 times passes, whatever the scale."""
    exact = torch.randn(1000, dtype=torch.float64)
    noise = torch.randn(1000, dtype=torch.float64) * 1e-3
    for scale in (1e-6, 1.0, 1e6):
        reference_, eager = exact * scale, ((exact + noise) * scale).float()
        assert_error_rule(((exact + 1.4 * noise) * scale).float(), eager, reference_)
        with pytest.raises(AssertionError):
            assert_error_rule(((exact + 1.6 * noise) * scale).float(), eager, reference_)
