"""Activations other than ReLU in the operators: values, special values, gradients, texts."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from support import (
    ACTIVATIONS,
    DTYPES,
    OTHER_ACTIVATIONS,
    SAMPLE_SHAPES,
    STEM,
    STEM_POOL,
    ConvShape,
    assert_same_nonfinite,
    conv_of_taps,
    dtype_id,
    make_conv_case,
    make_norm_conv_case,
    rerun_on_instruction_set,
    unchanged,
)

from fused_resnet import backends, functional
from fused_resnet.layers import activation as activations
from fused_resnet.testing import assert_error_rule

pytestmark = pytest.mark.quick
ACTIVATION = pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
DTYPE = pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
CONV_ISA = torch.ops.fused_resnet.conv_isa()
# Where oneDNN has none for 16 bits, torch's own convolution multiplies padding's zeros.
LIBRARY_PADS = {
    torch.bfloat16: not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
FORMATS = [torch.channels_last, torch.contiguous_format]
INF, NAN = float("inf"), float("nan")
# Whole vectors and not, one vector and two, groups wide, narrow and of a channel each.
SHAPES = [
    ConvShape(16, 32, (1, 1)),
    ConvShape(32, 48, (3, 3), (1, 1), (1, 1)),
    ConvShape(64, 64, (3, 3), (2, 2), (1, 1), (1, 1), 4),
    ConvShape(24, 24, (3, 3), (1, 1), (1, 1), (1, 1), 24),
    ConvShape(13, 29, (3, 2), (2, 1), (0, 1), (1, 2)),
]


def check_rule(case):
    with unchanged(**case.tensors()):
        fused = case.fused()
    assert_error_rule(fused, case.eager(), case.double().eager(), what=case.activation)


@pytest.mark.pairs
@pytest.mark.interpreted
@DTYPE
@ACTIVATION
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend, shape, activation, dtype):
    """In both layouts, with and without a shortcut and a bias."""
    for memory_format in FORMATS:
        case = make_conv_case(
            shape,
            size=(7, 9),
            dtype=dtype,
            memory_format=memory_format,
            bias=memory_format is torch.channels_last,
            activation=activation,
            device=backend.device,
        )
        check_rule(case)
        check_rule(dataclasses.replace(case, residual=None))


@ACTIVATION
def test_float64(backend, activation):
    case = make_conv_case(
        SHAPES[1], dtype=torch.float64, activation=activation, device=backend.device
    )
    torch.testing.assert_close(case.fused(), case.eager(), rtol=1e-12, atol=1e-12)


@DTYPE
@ACTIVATION
def test_a_narrow_residual(backend, activation, dtype):
    """A shortcut of fewer channels is added before the activation."""
    case = make_conv_case(SHAPES[1], dtype=dtype, activation=activation, device=backend.device)
    full = torch.zeros_like(case.residual)
    full[:, 8:-8] = case.residual[:, 8:-8]
    narrow = case.residual[:, 8:-8].contiguous(memory_format=torch.channels_last)
    fused = dataclasses.replace(case, residual=narrow).fused()
    case.residual = full
    assert_error_rule(fused, case.eager(), case.double().eager(), what=activation)


@DTYPE
@ACTIVATION
def test_max_pool(backend, activation, dtype):
    """The stem's: hardswish and the like have negative values that a pool must not lose."""
    case = make_conv_case(
        STEM, size=(21, 17), dtype=dtype, pool=STEM_POOL, activation=activation,
        device=backend.device,
    )  # fmt: skip
    check_rule(case)
    case.bn_bias = torch.full_like(case.running_mean, -2.0)
    check_rule(case)


@DTYPE
@ACTIVATION
def test_a_norm_before_the_convolution(backend, activation, dtype):
    case = make_norm_conv_case(SHAPES[1], dtype=dtype, activation=activation, device=backend.device)
    check_rule(case)


def special_values(dtype):
    """What kernels get wrong first, and values between; an odd number of them."""
    limits = torch.finfo(dtype)
    values = [0.0, 1.0, 3.0, 6.0, 6.5, 20.0, 88.0, 90.0, 104.0, 150.0, limits.max / 8, INF]
    values += [limits.tiny, limits.tiny / 4, limits.eps, 0.5, 0.9, 1.3, 1.5, 2.0, 3.9, 5.5]
    return torch.tensor([NAN, *values, *(-value for value in values)], dtype=dtype)


def has_convolution(backend):
    """Whether the convolution is a kernel of ours, rather than torch's own operator."""
    if backend.name == "cpu":
        return bool(torch.ops.fused_resnet.conv_isa())
    return backend.name != "reference"


def has_kernel(backend, activation):
    """Whether the epilogue has it, rather than torch's own operator behind the kernel."""
    return has_convolution(backend) and backends.choose(backend.device).has_activation(activation)


@DTYPE
@ACTIVATION
@pytest.mark.parametrize("dense", [False, True], ids=["depthwise", "dense"])
def test_special_values(backend, activation, dtype, dense):
    """NaN, infinities, zeros with their sign and subnormals, through a convolution with 1."""
    values = special_values(dtype).to(backend.device)
    channels = 1 if dense else 16
    outputs = 48 if dense else 16
    x = values.view(1, 1, 1, -1).expand(1, channels, 3, -1)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.ones(outputs, 1, 1, 1, dtype=dtype, device=backend.device)
    mean = torch.zeros(outputs, device=backend.device)
    eps = 2.0**-30  # nothing beside 1; none at all is refused by torch 2.11
    out = functional.conv_bn_act(
        x, weight, mean, torch.ones_like(mean), None, None, eps,
        groups=1 if dense else channels, activation=activation,
    )  # fmt: skip
    # Torch's own float32 overflows where the result does not, and has no tail of `gelu`; its
    # convolution may multiply an infinite neighbour by zero.
    native = has_kernel(backend, activation)
    exact = values.double().view(1, 1, 1, -1).expand(out.shape)
    if not has_convolution(backend):
        exact = F.conv2d(x, weight, groups=1 if dense else channels)
    elif not native:
        exact = exact.to(dtype)
    expected = ACTIVATIONS[activation](exact).double()
    if native or activation != "gelu":  # which torch's own is not, from one layout to the next
        assert_same_nonfinite(out, expected.to(dtype))
    # Kernels for pairs of bfloat16 take subnormals for zeros; the tail of `silu` comes to zero
    # where exp(-x) overflows.
    tiny = torch.finfo(dtype).tiny
    relative = torch.full_like(expected, 8 * torch.finfo(dtype).eps)
    if activation.startswith("gelu"):
        relative += 1e-4 * (values.double() <= -2)
    finite = expected.isfinite() & out.isfinite()
    difference = (out.double() - expected)[finite].abs()
    bound = relative * expected.abs() + 8 * tiny
    if not native:  # a part of what it is taken from, in either of torch's formulas
        bound += torch.finfo(dtype).eps * exact.double().abs()
    bound = bound[finite]
    assert (difference <= bound).all(), (activation, (difference - bound).max())
    if native:  # torch's own zeros have the sign of one layout or another
        # What is zero before the activation has no sign: it is a sum.
        zero = (expected == 0) & (out == 0) & (values != 0)
        assert zero.any() == (not activation.startswith(("hardtanh", "leaky_relu")))
        assert out.double()[zero].signbit().equal(expected[zero].signbit())


@DTYPE
@ACTIVATION
def test_infinite_weights_at_the_border(backend, activation, dtype):
    """Padding takes no part in a product with an infinite weight."""
    if backend.name == "cuda":
        pytest.skip("only the CPU promises that: on GPUs padding's zeros are multiplied")
    case = make_conv_case(
        SAMPLE_SHAPES[2], size=(5, 6), dtype=dtype, activation=activation, device=backend.device
    )
    case.weight.data[3, 0, 0, 0] = INF
    case.weight.data[5, 0, 2, 2] = NAN
    expected = case.double().eager(conv_of_taps).to(dtype)
    runs_library = backend.name == "reference" or not CONV_ISA
    if LIBRARY_PADS.get(dtype) and runs_library:
        expected = case.eager()
    assert not expected.isfinite().all()
    assert_same_nonfinite(case.fused(), expected)


@ACTIVATION
@pytest.mark.parametrize("training", [False, True])
def test_batch_norm_act(backend, activation, training):
    """Values, statistics and gradients, the residual's too."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(backend.device)

    x, z, cotangent = normal(3, 8, 5, 4), normal(3, 8, 5, 4), normal(3, 8, 5, 4)
    weight, bias = normal(8), normal(8)
    results = []
    for dtype in (torch.float32, torch.float32, torch.float64):
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias, z)]
        mean = torch.zeros(8, dtype=dtype, device=backend.device)
        var = torch.ones_like(mean)
        if not results:
            out = functional.batch_norm_act(
                leaves[0], mean, var, leaves[1], leaves[2], training,
                residual=leaves[3], activation=activation,
            )  # fmt: skip
        else:
            out = F.batch_norm(leaves[0], mean, var, leaves[1], leaves[2], training)
            out = ACTIVATIONS[activation](out + leaves[3])
        grads = torch.autograd.grad(out, leaves, cotangent.to(dtype))
        results.append([out, mean, var, *grads])
    for fused, eager, exact in zip(*results, strict=True):
        assert_error_rule(fused, eager, exact, what=activation)


def trained(x, residual, parameters, activation, run):
    """Output, gradients and statistics of a step, whose gradient is made of the output's shape."""
    leaves = [t.detach().clone().requires_grad_() for t in parameters]
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    if residual is not None:
        residual = residual.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    mean, var = torch.zeros_like(leaves[0]), torch.ones_like(leaves[0])
    out = run(x, residual, (mean, var, *leaves), activation)
    cotangent = torch.linspace(-2, 1, out.numel()).view(out.shape).to(out)
    wanted = [x, *leaves] + ([] if residual is None else [residual])
    return [out, mean, var, *torch.autograd.grad(out, wanted, cotangent)]


def fused_step(x, residual, norm, activation):
    return functional.batch_norm_act(x, *norm, True, residual=residual, activation=activation)


def eager_step(x, residual, norm, activation):
    out = F.batch_norm(x, *norm, True)
    return ACTIVATIONS[activation](out if residual is None else out + residual)


# In the first a row has more values than the kernels take at once.
SIZES = [*zip(FORMATS * 2, [(600, 3), (70, 5), (33, 4), (48, 9)], strict=True)]


@DTYPE
@ACTIVATION
def test_trained_values(activation, dtype, monkeypatch):
    """By the CPU's own kernels, in both layouts, of rows longer than they take at once and not."""
    ran = []
    operators = backends.cpu.norm.operators
    native = operators.normalize_act_backward
    monkeypatch.setattr(
        operators, "normalize_act_backward", lambda *args: ran.append(1) or native(*args)
    )
    generator = torch.Generator().manual_seed(0)
    for memory_format, (channels, size) in SIZES:
        shape = (3, channels, size, size)
        x, residual = (
            torch.randn(shape, generator=generator).to(dtype).to(memory_format=memory_format)
            for _ in range(2)
        )
        parameters = [torch.rand(channels, generator=generator) + 0.5 for _ in range(2)]
        wide = [t.double() for t in parameters]
        for added in (None, residual):
            with unchanged(x=x, residual=residual):
                fused = trained(x, added, parameters, activation, fused_step)
            eager = trained(x, added, parameters, activation, eager_step)
            exact_added = None if added is None else added.double()
            exact = trained(x.double(), exact_added, wide, activation, eager_step)
            assert fused[0].stride() == eager[0].stride()
            for mine, its, reference in zip(fused, eager, exact, strict=True):
                assert_error_rule(mine, its, reference, what=activation)
    assert len(ran) == 8


@ACTIVATION
def test_derivatives_of_trained_values(activation):
    """What torch has for them, or nearer to float64, at limits, infinities and subnormals."""
    values = special_values(torch.float32)
    x = torch.cat([values, torch.tensor([0.2, 0.25, 0.75, -0.25, -1.0])]).view(1, 1, -1)
    ones, grad, out = torch.ones(1), torch.full_like(x, 3.0), torch.empty_like(x)
    torch.ops.fused_resnet.normalize_act_backward(
        grad, x, None, None, None, 0 * ones, ones, 2.0**-30,
        *activations.numbers_of(activation), False, None, out,
    )  # fmt: skip
    exact = activations.derived(grad.double(), x.double(), activation)
    theirs = activations.derived(grad, x, activation)
    eps = torch.finfo(torch.float32).eps
    # hardswish's is a difference that vanishes at -1.5.
    least = 0.1 if activation == "hardswish" else 1e-6
    bound = torch.maximum(1.5 * (theirs - exact).abs(), 32 * eps * exact.abs().clamp(min=least))
    # A NaN's own gradient is a NaN or not in torch too, by where it lies.
    is_finite = exact.isfinite() & (x.double().abs() < 1e30)
    assert ((out - exact).abs() <= bound)[is_finite].all(), (activation, out, exact)
    assert is_finite.sum() > 40


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "hardtanh(-0.25, 0.75)"])
def test_second_derivatives_in_training(activation):
    """Of what a kernel ran forward: backward is torch's own then, of the batch's statistics."""
    x = torch.randn(3, 4, 5, 5)
    results = []
    for run, dtype in (
        (fused_step, torch.float32),
        (eager_step, torch.float32),
        (eager_step, torch.float64),
    ):
        leaves = [x.to(dtype, copy=True), *torch.linspace(0.5, 1.5, 8, dtype=dtype).view(2, 4)]
        leaves = [t.detach().clone().requires_grad_() for t in leaves]
        norm = (torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype), *leaves[1:])
        out = run(leaves[0], leaves[0] * 2, norm, activation)
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        results.append([*grads, *torch.autograd.grad(grads[0].square().sum(), leaves)])
    for mine, its, exact in zip(*results, strict=True):
        assert_error_rule(mine, its, exact, what=activation)


@ACTIVATION
def test_gradients(backend, activation):
    """Of everything that has one, under the statistics of inference."""
    case = make_conv_case(SHAPES[1], bias=True, activation=activation, device=backend.device)
    names = ("input", "weight", "bn_weight", "bn_bias", "bias", "residual")

    def gradients(case, run):
        leaves = [getattr(case, name).detach().requires_grad_() for name in names]
        out = run(dataclasses.replace(case, **dict(zip(names, leaves, strict=True))))
        generator = torch.Generator().manual_seed(1)
        cotangent = torch.randn(out.shape, generator=generator).to(out)
        return torch.autograd.grad(out, leaves, cotangent)

    fused = gradients(case, type(case).fused)
    eager = gradients(case, type(case).eager)
    exact = gradients(case.double(), type(case).eager)
    for name, *three in zip(names, fused, eager, exact, strict=True):
        assert_error_rule(*three, what=f"{activation}: {name}")


@pytest.mark.parametrize("activation", ["silu", "gelu", "leaky_relu(0.2)"])
def test_second_derivatives(activation):
    case = make_conv_case(
        ConvShape(2, 3, (3, 3)), batch=1, size=(4, 4), dtype=torch.float64, activation=activation
    )
    x, weight = case.input.requires_grad_(), case.weight.requires_grad_()

    def run(x, weight):
        return dataclasses.replace(case, input=x, weight=weight, residual=None).fused()

    assert torch.autograd.gradgradcheck(run, (x, weight))


@pytest.mark.parametrize("activation", ["silu", "leaky_relu(0.2)"])
@pytest.mark.single
def test_operators_are_operators(activation):
    """Schema, fake kernel, autograd: what compilers rely on."""
    case = make_conv_case(SHAPES[1], activation=activation)
    norm = (case.running_mean, case.running_var, case.bn_weight, case.bn_bias, case.eps)
    x, weight = case.input.requires_grad_(), case.weight.requires_grad_()
    geometry = ([1, 1], [1, 1], [1, 1], 1)
    operators = torch.ops.fused_resnet
    torch.library.opcheck(
        operators.conv_bn_act.default,
        (x, weight, *norm, None, *geometry, case.residual, activation),
    )
    pool = ([3, 3], [2, 2], [1, 1])
    torch.library.opcheck(
        operators.conv_bn_act_max_pool.default,
        (x, weight, *norm, None, *geometry, activation, *pool),
    )
    norm = (*torch.rand(4, 32), 1e-5)
    torch.library.opcheck(operators.batch_norm_act_inference.default, (x, *norm, None, activation))
    torch.library.opcheck(
        operators.batch_norm_act_training.default, (x, *norm[2:], None, activation)
    )


def test_texts():
    """Names, their numbers, and what torch means where there are none."""
    assert activations.read("relu6") == activations.read("hardtanh(0, 6)")
    assert activations.read("leaky_relu") == activations.read("leaky_relu(1e-2)")
    assert activations.read("hardtanh").parameters == (-1.0, 1.0)
    assert activations.numbers_of("leaky_relu(-0.5)")[1:] == (-0.5, 0.0)
    assert len({activations.read(name).number for name in activations.NAMES}) == 8
    for text in activations.NAMES:
        assert activations.error(text) is None


@pytest.mark.parametrize(
    ("text", "must"),
    [
        ("SiLU", "one of none, relu"),
        ("silu()", "numbers in its brackets"),
        ("silu(1)", "no numbers"),
        ("leaky_relu(a)", "numbers in its brackets"),
        ("leaky_relu(1, 2)", "must have 1 numbers"),
        ("leaky_relu(inf)", "finite"),
        ("leaky_relu(0.1", "one of none, relu"),
        ("hardtanh(1)", "must have 2 numbers"),
        ("hardtanh(1, 0)", "smaller number first"),
        ("", "one of none, relu"),
        (0.1, "one of none, relu"),
        (["relu"], "one of none, relu"),
    ],
)
def test_bad_texts(text, must):
    case = make_conv_case(SHAPES[0], activation="relu")
    case.activation = text
    with pytest.raises(ValueError, match="activation is") as raised:
        case.fused()
    assert must in str(raised.value)


@pytest.mark.slow
@pytest.mark.ahead(lambda: rerun_on_instruction_set("avx2", __file__, CPU_CASES))
def test_avx2(ahead):
    """This file's main cases again, on the kernels for processors without AVX-512."""
    ahead()


@pytest.mark.parametrize("isa", ["none", "amx_emulated", "avx512bf16_emulated"])
@pytest.mark.ahead(lambda isa: rerun_on_instruction_set(isa, __file__, CPU_CASES))
def test_other_instruction_sets(isa, ahead):
    """Likewise without vectors, and on the kernels for units that may not be here, emulated."""
    ahead()


CPU_CASES = "cpu and (values or residual or max_pool or before or border) or trained_values"
