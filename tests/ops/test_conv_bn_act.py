"""`functional.conv_bn_act` and `conv_bn_act_max_pool`: values, formats, NaN, determinism."""

import itertools
import math

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import (
    DTYPES,
    QUICK_SHAPES,
    SAMPLE_SHAPES,
    STEM,
    STEM_POOL,
    ConvCase,
    ConvShape,
    assert_same_bits,
    assert_same_nonfinite,
    assert_within_bound,
    conv_bn_exact,
    dtype_id,
    every_model_conv_shape,
    make_conv_case,
    rerun_on_instruction_set,
    run_python,
    unchanged,
    unwritten_zeros,
)
from support.selection import examples

from fused_resnet import functional
from fused_resnet.testing import assert_error_rule

TORCH_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def check_rule(case: ConvCase) -> None:
    """The error rule for one call; float64 itself is judged by extended precision."""
    with unchanged(**case.tensors()):
        fused = case.fused()
    eager = case.eager()
    assert fused.dtype == eager.dtype
    if case.input.dtype == torch.float64:
        exact = conv_bn_exact(case)
        fused_error = float(abs(fused.cpu().numpy() - exact).max() / abs(exact).max())
        eager_error = float(abs(eager.cpu().numpy() - exact).max() / abs(exact).max())
        floor = 4 * torch.finfo(torch.float64).eps
        assert fused_error <= max(1.5 * eager_error, floor), (fused_error, eager_error)
    else:
        assert_error_rule(fused, eager, case.double().eager())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", every_model_conv_shape(), ids=str)
def test_every_model_convolution(backend, shape, dtype):
    """Every distinct convolution of the supported models, on a reduced image."""
    if dtype == torch.float64 and math.prod((shape.out_channels, *shape.kernel_size)) > 8192:
        shape = ConvShape(**{**vars(shape), "out_channels": max(shape.groups, 64)})
    size = {7: (19, 19), 3: (7, 7), 1: (6, 6)}[shape.kernel_size[0]]
    batch = 1 if dtype == torch.float64 else 2
    check_rule(make_conv_case(shape, dtype=dtype, size=size, batch=batch, device=backend.device))


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", QUICK_SHAPES, ids=str)
def test_sample_shapes(backend, shape, dtype):
    check_rule(make_conv_case(shape, dtype=dtype, size=(9, 7), device=backend.device))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
@pytest.mark.parametrize(
    ("residual", "bias", "affine", "activation"),
    list(itertools.product([True, False], [True, False], [True, False], ["relu", "none"])),
)
def test_every_combination_of_options(backend, dtype, residual, bias, affine, activation):
    """Each optional argument alone and with the others, BN parameters in both precisions."""
    for shape, bn_dtype in itertools.product(QUICK_SHAPES[:2], {torch.float32, dtype}):
        case = make_conv_case(
            shape,
            dtype=dtype,
            bn_dtype=bn_dtype,
            residual=residual,
            bias=bias,
            affine=affine,
            activation=activation,
            device=backend.device,
        )
        check_rule(case)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=dtype_id)
@pytest.mark.parametrize("missing", ["bn_weight", "bn_bias"])
def test_one_affine_parameter_alone(backend, dtype, missing):
    case = make_conv_case(SAMPLE_SHAPES[2], dtype=dtype, device=backend.device)
    setattr(case, missing, None)
    check_rule(case)


@pytest.mark.interpreted
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-3, 10.0])
def test_eps(backend, eps):
    case = make_conv_case(SAMPLE_SHAPES[0], device=backend.device)
    case.eps = eps
    check_rule(case)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "pool",
    [
        STEM_POOL,
        {"kernel_size": 2, "stride": 2, "padding": 0},
        {"kernel_size": (3, 2), "stride": (1, 2), "padding": (1, 0)},
    ],
    ids=["stem", "2x2", "uneven"],
)
@pytest.mark.parametrize("size", [(32, 32), (21, 17), (7, 5)])
def test_max_pool(backend, dtype, pool, size):
    case = make_conv_case(STEM, size=size, dtype=dtype, pool=pool, device=backend.device)
    with unchanged(**case.tensors()):
        fused = case.fused()
    eager, reference = case.eager(), case.double().eager()
    if dtype == torch.float64:
        torch.testing.assert_close(fused, eager, rtol=1e-13, atol=1e-13)
    else:
        assert_error_rule(fused, eager, reference)


@pytest.mark.interpreted
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_max_pool_pads_with_minus_infinity(backend, activation):
    """Without a relu every value may be negative, and the border must not win with a zero."""
    case = make_conv_case(STEM, pool=STEM_POOL, activation=activation, device=backend.device)
    case.bn_bias = torch.full_like(case.running_mean, -50.0)
    fused, eager = case.fused(), case.eager()
    assert (eager < 0).all() if activation == "none" else (eager == 0).all()
    assert_error_rule(fused, eager, case.double().eager())


@st.composite
def drawn_cases(draw, device: str) -> ConvCase:
    """A call nobody planned: odd geometry, any strides, any mix of optional arguments."""
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, *DTYPES]))
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
    if TORCH_VERSION < (2, 15) and dtype in (torch.bfloat16, torch.float16):
        # There, the library's own 1x1 convolution with stride and padding can crash the process.
        hypothesis.assume(shape.kernel_size != (1, 1) or shape.padding == (0, 0))
    least = [
        max(1, d * (k - 1) + 1 - 2 * p)
        for d, k, p in zip(shape.dilation, shape.kernel_size, shape.padding, strict=True)
    ]
    size = tuple(draw(st.integers(low, low + 8)) for low in least)
    case = make_conv_case(
        shape,
        batch=draw(st.sampled_from([0, 1, 1, 2, 3])),
        size=size,
        dtype=dtype,
        bn_dtype=draw(st.sampled_from([None, dtype])),
        residual=draw(st.booleans()),
        bias=draw(st.booleans()),
        affine=draw(st.booleans()),
        activation=draw(st.sampled_from(["relu", "none"])),
        seed=draw(st.integers(0, 2**16)),
        device=device,
    )
    case.input = draw(relaid(case.input))
    case.weight = draw(relaid(case.weight))
    if case.residual is not None:
        case.residual = draw(relaid(case.residual))
    return case


def relaid(tensor: torch.Tensor) -> st.SearchStrategy[torch.Tensor]:
    """The same values under other strides: NCHW, NHWC, permuted, sliced, overlapping, flipped."""

    def spread(dims: tuple[int, ...]) -> torch.Tensor:
        padded = [2 * n if d in dims else n for d, n in enumerate(tensor.shape)]
        storage = torch.full(padded, float("nan"), dtype=tensor.dtype, device=tensor.device)
        view = storage[tuple(slice(None, None, 2 if d in dims else 1) for d in range(4))]
        return view.copy_(tensor)

    def offset() -> torch.Tensor:
        storage = torch.full(
            (tensor.numel() + 3,), float("nan"), dtype=tensor.dtype, device=tensor.device
        )
        return storage[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)

    layouts = [
        lambda: tensor.contiguous(),
        lambda: tensor.contiguous(memory_format=torch.channels_last),
        lambda: tensor.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
        lambda: tensor.transpose(2, 3).contiguous().transpose(2, 3),
        lambda: spread((1,)),
        lambda: spread((3,)),
        lambda: spread((0, 2)),
        lambda: offset(),
        lambda: tensor[:, :1].expand(tensor.shape),
        lambda: tensor[:, :, :1, :1].expand(tensor.shape),
    ]
    return st.sampled_from(range(len(layouts))).map(lambda i: layouts[i]())


@hypothesis.settings(max_examples=examples(400))
@hypothesis.given(data=st.data())
@pytest.mark.single
def test_drawn_cases(backend, data):
    """Any geometry and layout, every element within its a-priori rounding bound."""
    case = data.draw(drawn_cases(backend.device))
    with unchanged(**case.tensors()):
        fused = case.fused()
    eager = case.eager()
    assert fused.shape == eager.shape
    assert fused.dtype == eager.dtype
    assert_within_bound(fused, case.double().eager(), case.rounding_bound())


@pytest.mark.interpreted
@pytest.mark.quick
@hypothesis.settings(max_examples=examples(60))
@hypothesis.given(data=st.data())
def test_drawn_cases_quick(backend, data):
    case = data.draw(drawn_cases(backend.device))
    assert_within_bound(case.fused(), case.double().eager(), case.rounding_bound())


@hypothesis.settings(max_examples=examples(100))
@hypothesis.given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    batch=st.integers(0, 2),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    channels=st.sampled_from([(3, 64), (3, 17), (5, 8)]),
    contiguous=st.booleans(),
    data=st.data(),
)
def test_drawn_max_pools(backend, size, batch, kernel, stride, dtype, channels, contiguous, data):
    conv_size = [(n + 2 * 3 - 7) // 2 + 1 for n in size]
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    hypothesis.assume(
        all(n + 2 * p >= k for n, p, k in zip(conv_size, padding, kernel, strict=True))
    )
    case = make_conv_case(
        ConvShape(*channels, (7, 7), (2, 2), (3, 3)),
        size=size,
        batch=batch,
        dtype=dtype,
        memory_format=torch.contiguous_format if contiguous else torch.channels_last,
        pool={"kernel_size": kernel, "stride": stride, "padding": padding},
        device=backend.device,
    )
    fused = case.fused()
    assert fused.shape == case.eager().shape
    assert_within_bound(fused, case.double().eager(), case.rounding_bound())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pool", [None, STEM_POOL], ids=["", "pool"])
def test_output_format_is_conv2ds(backend, dtype, shape, memory_format, pool):
    case = make_conv_case(
        shape,
        size=(9, 12),
        dtype=dtype,
        memory_format=memory_format,
        pool=pool,
        device=backend.device,
    )
    assert case.fused().stride() == case.eager().stride()
    channels_last_weight = case.map(lambda t: t)
    channels_last_weight.weight = case.weight.contiguous(memory_format=torch.channels_last)
    assert channels_last_weight.fused().stride() == channels_last_weight.eager().stride()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", [*QUICK_SHAPES, STEM], ids=str)
def test_nan_and_infinity_stay_where_arithmetic_puts_them(backend, dtype, shape):
    """Non-finite values in the input and the residual come out where they do from eager.

    From eager in float64 or in the same dtype: oneDNN's bfloat16 convolution of an odd channel
    count multiplies infinities by the zeros it pads with, which makes NaN of them.
    """
    for value in (math.nan, math.inf, -math.inf):
        for pool in (None, STEM_POOL):
            case = make_conv_case(
                shape, batch=1, size=(15, 15), dtype=dtype, pool=pool, device=backend.device
            )
            case.input[0, 0, 6, 6] = value
            case.input[0, -1, 0, 14] = value
            if case.residual is not None:
                case.residual[0, 1, 2, 2] = value
                case.residual[0, -1, -1, 0] = -value
            expected = case.double().eager()
            assert not expected.isfinite().all()
            assert_same_nonfinite(case.fused(), expected, case.eager())


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "argument", ["weight", "bias", "running_mean", "running_var", "bn_weight", "bn_bias"]
)
def test_nonfinite_parameters(backend, dtype, argument, value):
    """A non-finite parameter spoils the channels it reaches and no other."""
    for shape in (QUICK_SHAPES[0], ConvShape(32, 48, (3, 3))):
        for activation in ("relu", "none"):
            case = make_conv_case(
                shape,
                dtype=dtype,
                bias=argument == "bias",
                activation=activation,
                device=backend.device,
            )
            getattr(case, argument)[5] = value
            eager = case.eager()
            if activation == "none" and (argument != "running_var" or value != math.inf):
                assert not eager[:, 5].isfinite().all()
            assert_same_nonfinite(case.fused(), eager)


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_impossible_variances(backend, dtype):
    """A negative variance and a zero one with eps=0 give what eager gives."""
    case = make_conv_case(SAMPLE_SHAPES[0], dtype=dtype, device=backend.device)
    case.eps = 0.0
    case.running_var[3] = -1.0
    case.running_var[4] = 0.0
    case.running_var[5], case.running_mean[5], case.bn_bias[5] = 0.0, 0.0, 0.0
    eager = case.eager()
    assert eager[:, 3].isnan().all()
    assert_same_nonfinite(case.fused(), eager)


@pytest.mark.interpreted
def test_overflow_to_infinity_is_eagers(backend):
    """float16 results beyond 65504 are inf, not saturated."""
    case = make_conv_case(
        SAMPLE_SHAPES[0], dtype=torch.float16, residual=False, device=backend.device
    )
    case.bn_weight = torch.full_like(case.bn_weight, 3e5)
    fused = case.fused()
    expected = case.double().eager()
    assert fused[expected > 70000].isposinf().all()
    assert (expected > 70000).any()
    assert fused[expected < 60000].isfinite().all()


@pytest.mark.interpreted
def test_signed_zero(backend):
    """relu of a negative number is zero, never a negative value."""
    case = make_conv_case(SAMPLE_SHAPES[2], device=backend.device)
    out = case.fused()
    assert (out >= 0).all()
    assert (out == 0).any()
    assert (out > 0).any()


@pytest.mark.pairs
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_same_inputs_give_same_bits(backend, dtype, shape, memory_format):
    """Run to run, and whatever the number of threads."""
    case = make_conv_case(
        shape, size=(17, 13), dtype=dtype, memory_format=memory_format, device=backend.device
    )
    first = case.fused().clone()
    for _ in range(3):
        assert_same_bits(case.fused(), first, "second run")
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert_same_bits(case.fused(), first, f"{threads} threads")


@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
def test_an_image_does_not_depend_on_its_batch(backend, shape):
    """The first image alone and among others agrees to rounding."""
    case = make_conv_case(shape, batch=5, device=backend.device)
    single = case.map(lambda t: t[:1] if t.dim() == 4 and t is not case.weight else t)
    bound = single.rounding_bound()
    assert_within_bound(single.fused(), case.fused()[:1].double(), 2 * bound)


@pytest.mark.quick
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
def test_results_are_the_callers(backend, shape):
    """Later calls, on other data of the same shape, leave an earlier result alone."""
    cases = [make_conv_case(shape, seed=seed, device=backend.device) for seed in range(4)]
    results = [case.fused() for case in cases]
    kept = [result.clone() for result in results]
    for _ in range(3):
        for case in reversed(cases):
            case.fused()
    for result, copy in zip(results, kept, strict=True):
        assert_same_bits(result, copy, "earlier result")
    pointers = [result.data_ptr() for result in results]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", QUICK_SHAPES, ids=str)
def test_the_residual_may_be_the_input(backend, shape):
    """An identity shortcut passes one tensor twice."""
    shape = ConvShape(
        shape.in_channels, shape.in_channels, (3, 3), (1, 1), (1, 1), (1, 1), shape.groups
    )
    case = make_conv_case(shape, device=backend.device)
    case.residual = case.input
    check_rule(case)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
def test_residual_layouts(backend, dtype):
    """Residuals of every layout give one result."""
    case = make_conv_case(SAMPLE_SHAPES[2], dtype=dtype, device=backend.device)
    expected = case.fused().clone()
    n, k, p, q = case.residual.shape
    storage = torch.full((n, 2 * k, p, q + 1), math.nan, dtype=dtype, device=backend.device)
    for view in (
        case.residual.contiguous(),
        case.residual.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        storage[:, ::2, :, 1:].copy_(case.residual),
    ):
        case.residual = view
        assert_within_bound(case.fused(), expected.double(), case.rounding_bound())


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=dtype_id)
@pytest.mark.parametrize("apart", ["input", "residual"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_images_that_do_not_follow_each_other(backend, dtype, apart, kernel):
    """Every other image of a batch, and one image in the place of all."""
    shape = ConvShape(32, 64, (kernel, kernel), (1, 1), (kernel // 2, kernel // 2))
    case = make_conv_case(shape, batch=3, size=(7, 7), dtype=dtype, device=backend.device)
    images = getattr(case, apart)
    spread = images.repeat_interleave(2, 0).to(memory_format=torch.channels_last)
    spread[1::2] = 7.0
    for layout in (spread[::2], spread[:1].expand_as(images)):
        setattr(case, apart, layout)
        assert layout.stride(1) == 1
        check_rule(case)


@pytest.mark.quick
@pytest.mark.parametrize("pool", [None, STEM_POOL], ids=["", "pool"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_empty_batch(backend, dtype, pool):
    case = make_conv_case(
        STEM, batch=0, size=(32, 32), dtype=dtype, pool=pool, device=backend.device
    )
    fused, eager = case.fused(), case.eager()
    assert fused.shape == eager.shape
    assert fused.numel() == 0
    assert fused.dtype == dtype


@pytest.mark.quick
def test_activation_none_keeps_negative_values(backend):
    case = make_conv_case(SAMPLE_SHAPES[2], activation="none", device=backend.device)
    out = case.fused()
    assert (out < 0).any()
    assert_error_rule(out, case.eager(), case.double().eager())


def test_integer_and_pair_geometry_mean_the_same(backend):
    case = make_conv_case(SAMPLE_SHAPES[3], device=backend.device)
    expected = case.fused().clone()
    case.stride, case.padding, case.dilation = 2, 1, 1
    assert_same_bits(case.fused(), expected)
    case.stride, case.padding, case.dilation = [2, 2], [1, 1], [1, 1]
    assert_same_bits(case.fused(), expected)


def test_recording_gradients_changes_no_number(backend):
    """The same numbers with and without gradients being recorded."""
    case = make_conv_case(SAMPLE_SHAPES[2], device=backend.device)
    expected = case.fused().clone()
    recorded = case.map(lambda t: t.clone().requires_grad_(t.dtype.is_floating_point))
    recorded.running_mean, recorded.running_var = case.running_mean, case.running_var
    out = recorded.fused()
    assert out.requires_grad
    assert not expected.requires_grad
    assert_error_rule(out.detach(), case.eager(), case.double().eager())
    with torch.no_grad():
        assert not recorded.fused().requires_grad
    with torch.inference_mode():
        assert recorded.fused().is_inference()


def test_complex_numbers_run_as_torch_runs_them(backend):
    """conv2d takes complex tensors but batch norm does not, so neither do we."""
    case = make_conv_case(SAMPLE_SHAPES[2], device=backend.device)
    case.input, case.weight = case.input.to(torch.complex64), case.weight.to(torch.complex64)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        case.eager()
    with pytest.raises((TypeError, ValueError), match="complex"):
        case.fused()


@pytest.mark.ahead(
    lambda: run_python(
        """
        import torch
        import support
        from support import SAMPLE_SHAPES, STEM, STEM_POOL
        from support.guard_pages import at_the_edge

        torch.set_num_threads(2)
        for shape in [*SAMPLE_SHAPES, STEM]:
            for dtype in support.DTYPES:
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    for size in ((9, 7), (16, 16), (7, 8)):
                        for pool in (None, STEM_POOL):
                            case = support.make_conv_case(
                                shape, size=size, dtype=dtype, memory_format=memory_format,
                                pool=pool, bias=True, batch=1,
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


@pytest.mark.parametrize("channels_last", [True, pytest.param(False, marks=pytest.mark.whole)])
def test_more_than_2_31_elements(channels_last):
    """Offsets beyond 32 bits: an input of 2^31 + elements, checked at both ends."""
    channels, height, width = 64, 8192, 4098
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    zeros = unwritten_zeros(channels * height * width, torch.bfloat16)
    x = zeros.view(1, channels, height, width)
    assert x.numel() > 2**31
    if channels_last:
        x = x.view(1, height, width, channels).permute(0, 3, 1, 2)
    ends = torch.randn(1, channels, 2, width).bfloat16()
    x[:, :, 0], x[:, :, -1] = ends[:, :, 0], ends[:, :, 1]
    case = make_conv_case(
        ConvShape(channels, 2, (1, 1)),
        size=(2, width),
        batch=1,
        dtype=torch.bfloat16,
        residual=False,
    )
    case.input = ends.to(memory_format=memory_format)
    expected, bound = case.double().eager(), case.rounding_bound()
    case.input = x
    out = case.fused()
    assert_within_bound(out[:, :, [0, -1]], expected, bound)
    nothing = out[:, :, 1:-1]
    assert_same_bits(nothing, nothing[:, :, :1, :1].expand_as(nothing))


MAIN_CASES = "sample_shapes or drawn_cases_quick or nan_and_infinity or max_pool"


@pytest.mark.slow
@pytest.mark.ahead(
    lambda: rerun_on_instruction_set(
        "avx2", __file__, f"cpu and ({MAIN_CASES} or residual_layouts)"
    )
)
def test_avx2(ahead):
    """This file's main cases again, on the kernels for processors without AVX-512."""
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


def test_functional_has_the_designs_signature():
    import inspect

    conv = inspect.signature(functional.conv_bn_act).parameters
    assert list(conv)[:13] == [
        "input",
        "weight",
        "running_mean",
        "running_var",
        "bn_weight",
        "bn_bias",
        "eps",
        "bias",
        "stride",
        "padding",
        "dilation",
        "groups",
        "residual",
    ]
    assert conv["eps"].default == 1e-5
    assert conv["activation"].default == "relu"
    assert conv["bias"].kind is inspect.Parameter.KEYWORD_ONLY
    norm = inspect.signature(functional.batch_norm_act).parameters
    assert list(norm) == [
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
        "residual",
        "pad_residual",
        "activation",
    ]
    assert norm["training"].default is False
    assert norm["momentum"].default == 0.1


@pytest.mark.interpreted
def test_conv_without_padding_matches_a_matrix_product(backend):
    """An expectation that owes nothing to conv2d: a 1x1 convolution is a matrix product."""
    case = make_conv_case(SAMPLE_SHAPES[0], device=backend.device)
    x, w = case.input.double(), case.weight.double()[:, :, 0, 0]
    product = torch.einsum("kc,nchw->nkhw", w, x)
    scale = case.bn_weight.double() / (case.running_var.double() + case.eps).sqrt()
    shift = case.bn_bias.double() - case.running_mean.double() * scale
    expected = (
        product * scale[:, None, None] + shift[:, None, None] + case.residual.double()
    ).clamp(min=0)
    assert_within_bound(case.fused(), expected, case.rounding_bound())
    assert F.relu(expected).equal(expected)
