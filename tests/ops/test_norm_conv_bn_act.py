"""`functional.norm_conv_bn_act`: values, formats, NaN, gradients, on every backend."""

import functools
import itertools
import math

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import (
    DIFFERENTIABLE,
    DTYPES,
    QUICK_SHAPES,
    SAMPLE_SHAPES,
    ConvShape,
    assert_conv_gradients_by_error_rule,
    assert_same_bits,
    assert_same_nonfinite,
    assert_within_bound,
    conv_gradients,
    dtype_id,
    make_norm_conv_case,
    rerun_on_instruction_set,
    run_python,
    unchanged,
)
from support.selection import examples
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet
from fused_resnet import functional, reference
from fused_resnet.testing import assert_error_rule, relative_error

OURS = [*DIFFERENTIABLE, "in_weight", "in_bias"]
# Groups that share a vector of output channels, in more than one vector and the last one partly.
EXPANDED = [
    ConvShape(44, 44, (3, 3), (1, 1), (1, 1), (1, 1), 11),
    ConvShape(20, 40, (3, 3), (2, 2), (1, 1), (1, 1), 10),
]
# Groups of more than a vector of input channels, with a rest that is none.
UNEVEN = ConvShape(2 * 37, 2 * 32, (3, 2), (1, 1), (1, 0), (1, 1), 2)
FORMATS = [torch.channels_last, torch.contiguous_format]


def check_rule(case):
    """The error rule for one call, float64 by a thousandth of float32's rounding."""
    with unchanged(**case.tensors()):
        fused = case.fused()
    eager, exact = case.eager(), case.double().eager()
    assert fused.dtype == eager.dtype
    assert fused.shape == eager.shape
    if fused.dtype == torch.float64:
        assert relative_error(fused, exact) < 1e-13
    else:
        assert_error_rule(fused, eager, exact)


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", QUICK_SHAPES, ids=str)
def test_sample_shapes(backend, shape, dtype):
    check_rule(make_norm_conv_case(shape, dtype=dtype, size=(9, 7), device=backend.device))


@pytest.mark.pairs
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [*SAMPLE_SHAPES, *EXPANDED, UNEVEN], ids=str)
def test_every_kind_of_convolution(backend, shape, dtype, memory_format):
    case = make_norm_conv_case(
        shape, dtype=dtype, size=(17, 15), memory_format=memory_format, device=backend.device
    )
    check_rule(case)
    assert case.fused().stride() == case.eager().stride()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
@pytest.mark.parametrize(
    ("residual", "bias", "affine", "in_affine", "activation"),
    [
        *itertools.product(*[[True, False]] * 4, ["relu"]),
        (True, True, True, True, "none"),
        (False, False, False, False, "none"),
    ],
)
def test_every_combination_of_options(
    backend, dtype, residual, bias, affine, in_affine, activation
):
    for shape, bn_dtype in itertools.product(QUICK_SHAPES[:2], {torch.float32, dtype}):
        case = make_norm_conv_case(
            shape,
            dtype=dtype,
            bn_dtype=bn_dtype,
            residual=residual,
            bias=bias,
            affine=affine,
            in_affine=in_affine,
            activation=activation,
            device=backend.device,
        )
        check_rule(case)


@pytest.mark.interpreted
@pytest.mark.parametrize("missing", ["in_weight", "in_bias"])
def test_one_affine_parameter_alone(backend, missing):
    case = make_norm_conv_case(SAMPLE_SHAPES[2], device=backend.device)
    setattr(case, missing, None)
    check_rule(case)


@pytest.mark.interpreted
@pytest.mark.parametrize("in_eps", [0.0, 1e-3, 10.0])
def test_eps(backend, in_eps):
    case = make_norm_conv_case(SAMPLE_SHAPES[0], device=backend.device)
    case.in_eps = in_eps
    check_rule(case)


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("groups", [1, 8])
def test_padding_is_zero_behind_the_norm(backend, dtype, groups):
    """Of an image that the norm makes zero everywhere nothing reaches the output, beside it or in.

    Zeros put around the image before the norm would become its bias, 3.
    """
    shape = ConvShape(16, 24, (3, 3), (1, 1), (2, 2), (1, 1), groups)
    case = make_norm_conv_case(
        shape, dtype=dtype, size=(5, 4), residual=False, activation="none", device=backend.device
    )
    case.in_bias = torch.full_like(case.in_bias, 3.0)
    case.in_weight = torch.full_like(case.in_weight, 1.0)
    case.input = torch.full_like(case.input, -1000.0)
    out = case.fused()
    assert_same_bits(out, out[:, :, :1, :1].expand_as(out))
    check_rule(case)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=dtype_id)
@pytest.mark.parametrize("shape", [*QUICK_SHAPES, EXPANDED[0], UNEVEN], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS)
def test_the_normalised_input_is_rounded_once(backend, dtype, shape, memory_format):
    """To the input's dtype, as if it had been written: the convolution sees no finer values."""
    case = make_norm_conv_case(
        shape, dtype=dtype, size=(9, 8), memory_format=memory_format, device=backend.device
    )
    norm = (case.in_mean, case.in_var, case.in_weight, case.in_bias)
    written = functional.batch_norm_act(case.input, *norm, eps=case.in_eps)
    assert_same_bits(case.fused(), case.convolution(written).fused())


@st.composite
def drawn_cases(draw, device):
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]))
    small = st.integers(1, 3)
    pair = lambda values: st.tuples(values, values)  # noqa: E731
    shape = ConvShape(
        in_channels=groups * draw(st.sampled_from([1, 2, 3, 7, 8, 16, 17])),
        out_channels=groups * draw(st.sampled_from([1, 2, 5, 8, 15, 16, 33])),
        kernel_size=draw(st.one_of(st.just((1, 1)), st.just((3, 3)), pair(st.integers(1, 5)))),
        stride=draw(pair(small)),
        padding=draw(pair(st.integers(0, 3))),
        dilation=draw(pair(small)),
        groups=groups,
    )
    least = [
        max(1, d * (k - 1) + 1 - 2 * p)
        for d, k, p in zip(shape.dilation, shape.kernel_size, shape.padding, strict=True)
    ]
    case = make_norm_conv_case(
        shape,
        batch=draw(st.sampled_from([0, 1, 1, 2, 3])),
        size=tuple(draw(st.integers(low, low + 8)) for low in least),
        # The library's 16-bit 1x1 convolution with stride and padding, which judges, is unsafe in
        # torch before 2.15; test_conv_bn_act.py has the dtypes.
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        residual=draw(st.booleans()),
        bias=draw(st.booleans()),
        affine=draw(st.booleans()),
        in_affine=draw(st.booleans()),
        activation=draw(st.sampled_from(["relu", "none"])),
        memory_format=draw(st.sampled_from(FORMATS)),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )
    if draw(st.booleans()):
        # Channels, columns and images apart, between NaN.
        spread = torch.full([2 * n for n in case.input.shape], math.nan, dtype=case.input.dtype)
        spread = spread.to(device)[::2, ::2, ::2, ::2]
        case.input = spread.copy_(case.input)
    return case


@pytest.mark.interpreted
@hypothesis.settings(max_examples=examples(60))
@hypothesis.given(data=st.data())
def test_drawn_cases(backend, data):
    """Any geometry and layout, every element within its a-priori rounding bound."""
    case = data.draw(drawn_cases(backend.device))
    with unchanged(**case.tensors()):
        fused = case.fused()
    assert fused.shape == case.eager().shape
    assert_within_bound(fused, case.double().eager(), case.rounding_bound())


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [*QUICK_SHAPES, EXPANDED[0]], ids=str)
def test_nan_and_infinity_stay_where_arithmetic_puts_them(backend, dtype, shape):
    for value in (math.nan, math.inf, -math.inf):
        case = make_norm_conv_case(
            shape, batch=1, size=(15, 15), dtype=dtype, device=backend.device
        )
        case.in_weight = case.in_weight.abs() + 0.1
        case.input[0, 0, 6, 6] = value
        case.input[0, -1, 0, 14] = value
        expected = case.double().eager()
        assert expected.isfinite().all() == (value == -math.inf)
        assert_same_nonfinite(case.fused(), expected, case.eager())


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("argument", ["in_mean", "in_var", "in_weight", "in_bias"])
def test_nonfinite_parameters(backend, dtype, argument, value):
    """A non-finite parameter spoils what its channel's group makes and nothing else."""
    for shape in (QUICK_SHAPES[0], QUICK_SHAPES[2], EXPANDED[0]):
        case = make_norm_conv_case(shape, dtype=dtype, activation="none", device=backend.device)
        getattr(case, argument)[5] = value
        assert_same_nonfinite(case.fused(), case.eager())


@pytest.mark.interpreted
def test_impossible_variances(backend):
    case = make_norm_conv_case(SAMPLE_SHAPES[2], device=backend.device)
    case.in_eps = 0.0
    case.in_var[3], case.in_var[4] = -1.0, 0.0
    eager = case.eager()
    assert not eager.isfinite().any()
    assert_same_nonfinite(case.fused(), eager)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("shape", [*SAMPLE_SHAPES[:3], EXPANDED[0]], ids=str)
def test_same_inputs_give_same_bits(backend, dtype, shape):
    case = make_norm_conv_case(shape, size=(17, 13), dtype=dtype, device=backend.device)
    first = case.fused().clone()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        assert_same_bits(case.fused(), first, f"{threads} threads")


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_empty_batch(backend, dtype):
    for shape in QUICK_SHAPES:
        case = make_norm_conv_case(shape, batch=0, dtype=dtype, device=backend.device)
        fused = case.fused()
        assert fused.shape == case.eager().shape
        assert fused.dtype == dtype


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("channels", [16, 24])
def test_the_residual_may_be_the_input_or_narrower(backend, dtype, channels):
    """The shortcut of a pre-activation block, and one of fewer channels between zeros."""
    shape = ConvShape(16, channels, (3, 3), (1, 1), (1, 1))
    case = make_norm_conv_case(shape, dtype=dtype, activation="none", device=backend.device)
    case.residual = case.input
    with unchanged(**case.tensors()):
        fused = case.fused()
    full = case.map(lambda t: t)
    full.residual = reference.pad_channels(case.residual, channels)
    assert_error_rule(fused, full.eager(), full.double().eager())


@pytest.mark.interpreted
@pytest.mark.quick
def test_against_a_matrix_product(backend):
    """An expectation that owes nothing to torch's norms and convolutions."""
    case = make_norm_conv_case(SAMPLE_SHAPES[0], device=backend.device)
    exact = case.double()

    def normalised(x, mean, var, weight, bias, eps):
        mean, var, weight, bias = (t[:, None, None] for t in (mean, var, weight, bias))
        return (x - mean) / (var + eps).sqrt() * weight + bias

    before = (exact.in_mean, exact.in_var, exact.in_weight, exact.in_bias, exact.in_eps)
    behind = (exact.running_mean, exact.running_var, exact.bn_weight, exact.bn_bias, exact.eps)
    h = normalised(exact.input, *before).clamp(min=0)
    assert 0.2 < (h == 0).double().mean() < 0.8
    product = torch.einsum("kc,nchw->nkhw", exact.weight[:, :, 0, 0], h)
    expected = F.relu(normalised(product, *behind) + exact.residual)
    assert_within_bound(case.fused(), expected, case.rounding_bound())


# ---- gradients ----

GRADIENT_SHAPES = [
    ConvShape(16, 24, (1, 1)),
    ConvShape(16, 16, (3, 3), (2, 2), (2, 1), (1, 2), 4),
]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradients(backend, shape, dtype, activation):
    """All at once, by the error rule."""
    make = lambda: make_norm_conv_case(  # noqa: E731
        shape,
        batch=3,
        size=(10, 9),
        dtype=dtype,
        bias=True,
        activation=activation,
        device=backend.device,
    )
    assert_conv_gradients_by_error_rule(make, OURS)


@pytest.mark.parametrize("name", OURS)
def test_one_gradient_alone(backend, name):
    make = lambda: make_norm_conv_case(  # noqa: E731
        GRADIENT_SHAPES[1], bias=True, device=backend.device
    )
    _, everything = conv_gradients(make(), lambda c: c.fused(), OURS)
    _, alone = conv_gradients(make(), lambda c: c.fused(), [name])
    assert list(alone) == [name]
    assert relative_error(alone[name], everything[name].double()) < 1e-6


@pytest.mark.parametrize(
    "shape", [ConvShape(2, 3, (1, 1)), ConvShape(2, 4, (3, 2), (2, 1), (1, 2), (1, 2), 2)], ids=str
)
@pytest.mark.parametrize(
    "check", [gradcheck, functools.partial(gradgradcheck, fast_mode=True)], ids=["first", "second"]
)
def test_against_finite_differences(backend, shape, check):
    case = make_norm_conv_case(
        shape, batch=2, size=(5, 4), dtype=torch.float64, bias=True, device=backend.device
    )
    leaves = [case.tensors()[name].requires_grad_() for name in OURS]

    def evaluate(*values):
        for name, value in zip(OURS, values, strict=True):
            setattr(case, name, value)
        return case.fused()

    assert check(evaluate, leaves)


def test_what_is_kept_for_backward(backend):
    """The input and the output, not what lies between them."""
    case = make_norm_conv_case(ConvShape(64, 8, (1, 1)), residual=False, device=backend.device)
    case.weight.requires_grad_()
    kept = {}
    keep = lambda t: kept.setdefault(t.data_ptr(), t.numel() * (t.dim() == 4))  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (keep(t), t)[1], lambda t: t):
        out = case.fused()
    assert sum(kept.values()) == case.input.numel() + out.numel() + case.weight.numel()


# ---- compilers, autocast, transforms ----


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_stands_in_a_compiled_graph(backend, dynamic):
    case = make_norm_conv_case(SAMPLE_SHAPES[2], device=backend.device)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    out = torch.compile(case.fused.__func__, backend=keep, fullgraph=True, dynamic=dynamic)(case)
    assert_same_bits(out, case.fused())
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    ours = [name for name in called if name.startswith(("aten", "fused_resnet", "conv", "batch"))]
    assert ours == ["fused_resnet.norm_conv_bn_act.default"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_autocast(backend, dtype):
    """The norm in its input's dtype and the convolution in autocast's, as eager has them."""
    case = make_norm_conv_case(SAMPLE_SHAPES[2], residual=False, device=backend.device)
    case.input = case.input.to(dtype)
    with torch.autocast(backend.device, torch.bfloat16):
        fused, eager = case.fused(), case.eager()
    assert fused.dtype == eager.dtype == torch.bfloat16
    assert_error_rule(fused, eager, case.double().eager())


def test_vmap_and_forward_mode_run_as_the_reference_does(backend):
    case = make_norm_conv_case(SAMPLE_SHAPES[2], device=backend.device)
    expected = case.eager()

    def of(image, residual):
        single = case.map(lambda t: t)
        single.input, single.residual = image[None], residual[None]
        return single.fused()[0]

    out = torch.func.vmap(of)(case.input, case.residual)
    assert_within_bound(out, expected.double(), 2 * case.rounding_bound())


# ---- bad input ----


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "change", "error", "words"),
    [
        ("in_mean", lambda t: t[:-1], ValueError, ["in_mean", "(31,)", "(32,)"]),
        ("in_var", lambda t: t.double(), TypeError, ["in_var", "torch.float64", "torch.float32"]),
        ("in_weight", lambda t: t.tolist(), TypeError, ["in_weight", "list"]),
        ("in_bias", lambda t: t.to("meta"), ValueError, ["in_bias", "meta", "cpu"]),
        ("in_mean", lambda t: None, TypeError, ["in_mean", "NoneType"]),
        ("in_eps", lambda e: -1.0, ValueError, ["in_eps", "-1.0"]),
        ("in_eps", lambda e: "1", TypeError, ["in_eps", "'1'"]),
        ("in_var", lambda t: t.requires_grad_(), ValueError, ["in_var", "gradient"]),
        ("weight", lambda t: t[:, :-1], ValueError, ["weight", "31", "input", "32"]),
        ("activation", lambda a: "mish", ValueError, ["activation", "'mish'"]),
    ],
)
def test_bad_input(name, change, error, words):
    case = make_norm_conv_case(SAMPLE_SHAPES[2])
    setattr(case, name, change(getattr(case, name)))
    with pytest.raises(error, match=r"^norm_conv_bn_act: ") as raised:
        case.fused()
    for word in words:
        assert word in str(raised.value)


# ---- one launch ----


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=dtype_id)
@pytest.mark.parametrize("padding", [0, 1])
def test_one_launch_has_the_bits_of_two(backend, dtype, padding):
    """Dilated, of channels that no block divides; Triton writes a table and no normalised input."""
    shape = ConvShape(40, 24, (3, 3), (2, 1), (padding, 1), (1, 2))
    case = make_norm_conv_case(shape, dtype=dtype, size=(9, 8), device=backend.device)
    norm = (case.in_mean, case.in_var, case.in_weight, case.in_bias)
    written = functional.batch_norm_act(case.input, *norm, eps=case.in_eps)
    assert_same_bits(case.fused(), case.convolution(written).fused())
    if backend.name == "triton":
        from fused_resnet.backends.triton import launch as launches

        with launches.logged() as log:
            case.fused()
        assert [launch.kernel for launch in log] == ["table_kernel", "conv_kernel"]


# ---- the CPU's kernel ----


@pytest.mark.ahead(
    lambda: run_python(
        """
        import torch
        import support
        from support import SAMPLE_SHAPES, ConvShape
        from support.guard_pages import at_the_edge

        expanded = ConvShape(44, 44, (3, 3), (1, 1), (1, 1), (1, 1), 11)
        for shape in [*SAMPLE_SHAPES, expanded]:
            for dtype in support.DTYPES[:3]:
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    case = support.make_norm_conv_case(
                        shape, size=(9, 7), dtype=dtype, memory_format=memory_format, batch=1
                    )
                    moved = case.map(at_the_edge)
                    support.assert_within_bound(
                        moved.fused(), case.double().eager(), case.rounding_bound()
                    )
        print("inside")
        """
    )
)
def test_reads_stay_inside_their_tensors(ahead):
    """Every tensor ends where unreadable memory begins: an overread kills the child process."""
    assert ahead().strip() == "inside"


def test_a_pointwise_convolution_of_many_tasks():
    """More rows than a task takes, over several images, channels that no vector divides."""
    for size, C, K in (((28, 28), 300, 40), ((7, 7), 1025, 128), ((1, 1), 64, 1024)):
        case = make_norm_conv_case(ConvShape(C, K, (1, 1)), size=size, batch=9)
        check_rule(case)


MAIN_CASES = "sample_shapes or every_kind or nan_and_infinity or rounded_once"


@pytest.mark.slow
@pytest.mark.ahead(
    lambda: rerun_on_instruction_set("avx2", __file__, f"cpu and ({MAIN_CASES} or drawn_cases)")
)
def test_avx2(ahead):
    """The main cases again, on the kernels for processors without AVX-512."""
    ahead()


@pytest.mark.parametrize("isa", ["amx_emulated", "avx512bf16_emulated"])
@pytest.mark.ahead(
    lambda isa: rerun_on_instruction_set(
        isa, __file__, f"cpu and bfloat16 and ({MAIN_CASES}) and not emulated"
    )
)
def test_emulated(isa, ahead):
    """The main cases again, on the kernels for AMX and for AVX512_BF16, emulated."""
    ahead()


@pytest.mark.quick
def test_explain_says_what_runs():
    arguments = {"device": torch.device("cpu"), "dtype": torch.float32}
    arguments["weight_shape"] = (32, 16, 3, 3)
    explain = functools.partial(fused_resnet.backends.explain, "norm_conv_bn_act", **arguments)
    with fused_resnet.use_backend("reference"):
        assert explain() == "reference"
    assert explain().startswith("cpu: native norm + convolution (")
    assert explain(dtype=torch.float64) == (
        "cpu: scale_shift_act + library convolution + scale_shift_act"
    )
