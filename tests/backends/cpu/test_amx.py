"""The convolution on tiles: on AMX where there is one, and over emulated tiles.

On AMX the float32 cases are those of the vector kernels, but where tiles are faster, until they run
again on all tiles.
"""

import contextlib
import ctypes
import mmap
import os

import pytest
import torch
import torch.nn.functional as F
from support import (
    STEM,
    ConvShape,
    assert_same_nonfinite,
    assert_within_bound,
    conv_digests,
    conv_units,
    make_conv_case,
    relative_error,
    rerun_on_instruction_set,
)
from support.threads import run_in_threads
from torchvision.models.resnet import BasicBlock

import fused_resnet

TILES = torch.ops.fused_resnet.conv_tile_isa()
# Then float32 is on tiles wherever they can run it.
IS_FORCED = bool(os.environ.get("FUSED_RESNET_CPU_ISA"))
needs_tiles = pytest.mark.skipif(not TILES, reason="no AMX; run again over emulated tiles")
DTYPES = [torch.bfloat16, torch.float32, torch.float16]
# Their digests are compared.
SETS = ("amx", "amx_emulated", "avx512")
needs_amx = pytest.mark.skipif(TILES != "amx", reason="this processor has no AMX")

# What each part of the kernel has to get right: planes of strided inputs, rows that share their
# padding, rows that may not, filters longer than the image, taps that are dense, chunks that end
# early, one tile of outputs and two.
SHAPES = [
    ConvShape(64, 64, (3, 3), padding=(1, 1)),
    ConvShape(64, 96, (3, 3), (2, 2), (1, 1)),
    ConvShape(40, 33, (3, 2), (3, 2), (1, 0)),
    ConvShape(33, 70, (3, 3), (3, 2), (2, 3), (2, 3)),
    ConvShape(32, 16, (2, 5), (2, 2), (3, 4), (4, 2)),
    ConvShape(64, 40, (1, 1), padding=(2, 3)),
    ConvShape(96, 64, (1, 1), (2, 3)),
    ConvShape(100, 24, (1, 1)),
    ConvShape(128, 7, (1, 1)),
    ConvShape(5, 48, (3, 3), (1, 2), (1, 1)),
    ConvShape(1, 32, (5, 5), padding=(2, 2), dilation=(1, 2)),
    ConvShape(31, 32, (2, 2)),
    ConvShape(96, 64, (3, 3), padding=(1, 1), groups=2),
    ConvShape(80, 96, (1, 1), groups=4),
    STEM,
]


@needs_tiles
@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(7, 7), (14, 9), (1, 37)], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts_and_sizes(shape, size, dtype):
    conv_units.check_layouts(shape, size, dtype)


@needs_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tasks(dtype):
    conv_units.check_many_tasks(dtype)


@needs_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [True, False])
def test_stem_with_its_pool(channels_last, dtype):
    conv_units.check_stem_with_its_pool(channels_last, dtype)


@needs_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prologue(dtype):
    for shape in (SHAPES[0], SHAPES[3], SHAPES[6], SHAPES[7], SHAPES[9]):
        conv_units.check_prologue(shape, dtype)


@needs_tiles
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [False, True])
def test_gradient_in_the_input(add, dtype):
    # float16's sums are without the products of second parts.
    conv_units.check_gradient_in_the_input(add, dtype, 1e-5 if dtype is torch.float16 else 2e-6)


@needs_tiles
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_forward_in_training(dtype):
    batch, size = (3, (19, 17)) if TILES == "amx" else (2, (9, 8))
    conv_units.check_forward_in_training(dtype, batch, size)


@needs_tiles
def test_statistics_that_float32_cannot_sum():
    """Squares that overflow or underflow, and what is not finite: as of the output by itself."""
    cpu = fused_resnet.backends.cpu
    x = torch.randn(2, 32, 9, 7).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(40, 32, 1, 1)
    geometry = ((1, 1), (0, 0), (1, 1), 1)
    for scale in (1e22, 1e-18, torch.inf, torch.nan):
        scaled = x * scale
        if not torch.isfinite(torch.tensor(scale)):
            scaled = x.clone(memory_format=torch.preserve_format)
            scaled[1, 3, 4, 5] = scale
        out, *found = cpu.conv_batch_norm_statistics(scaled, weight, None, geometry, None)
        for one, expected in zip(found, cpu.batch_statistics(out), strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-6, atol=0, equal_nan=True)


@needs_tiles
@pytest.mark.quick
def test_explain_names_the_unit():
    conv_units.check_explanation(TILES)


@contextlib.contextmanager
def precision(value):
    """torch's setting for float32 convolutions on the CPU."""
    torch.backends.mkldnn.conv.fp32_precision = value
    try:
        yield
    finally:
        torch.backends.mkldnn.conv.fp32_precision = "none"


@needs_tiles
@pytest.mark.quick
@pytest.mark.parametrize("pixels", [(5, 6), (5, 7), (21, 23), (21, 24), (42, 47)], ids=str)
def test_explain_names_what_runs_float32(pixels):
    """Told by the error: only on tiles is it larger where the user allows bfloat16."""
    for shape in (
        ConvShape(64, 64, (3, 3), padding=(1, 1)),
        ConvShape(128, 300, (1, 1), (2, 2)),
        ConvShape(64, 64, (1, 1)),
        ConvShape(64, 32, (3, 3), padding=(1, 1)),
        ConvShape(64, 64, (3, 3), padding=(1, 1), groups=32),
    ):
        case = make_conv_case(shape, batch=1, size=pixels, residual=False)
        where = {
            "device": torch.device("cpu"),
            "dtype": torch.float32,
            "weight_shape": case.weight.shape,
            "stride": shape.stride,
            "padding": shape.padding,
            "groups": shape.groups,
        }
        with precision("bf16"):
            on_tiles = relative_error(case.fused(), case.double().eager()) > 1e-4
            text = fused_resnet.backends.explain(
                "conv_bn_act", input_shape=case.input.shape, **where
            )
            assert (f"({TILES}, 1 product)" in text) == on_tiles, (shape, text)
            assert ("(avx" in text) != on_tiles
        unsized = fused_resnet.backends.explain("conv_bn_act", **where)
        if " output pixels on" in unsized:
            least = int(unsized.split(" from ")[1].split()[0])
            outputs = (pixels[0] - 1) // shape.stride[0] + 1, (pixels[1] - 1) // shape.stride[1] + 1
            assert (outputs[0] * outputs[1] >= least) == on_tiles
        else:
            assert (TILES in unsized) == on_tiles


def two_blocks():
    """Fused, one with a projection, and an input of theirs."""
    norm = torch.nn.BatchNorm2d(128)
    projection = torch.nn.Sequential(torch.nn.Conv2d(64, 128, 1, 4, bias=False), norm)
    blocks = BasicBlock(64, 64), BasicBlock(64, 128, 4, projection)
    model = fused_resnet.fuse(torch.nn.Sequential(*blocks).eval())
    return model, torch.randn(1, 64, 8, 8).relu()


@needs_tiles
def test_report_names_what_runs_float32():
    model, x = two_blocks()
    expected = model(x)
    unsized, report = fused_resnet.report(model), fused_resnet.report(model, x)
    assert [r.path for r in report] == [r.path for r in unsized]
    assert all(r.fused for r in report)
    ways = {r.path: r.backend for r in report}
    # On the second block's 2 x 2 pixels tiles would not pay.
    assert ways["0"] == f"cpu: native convolution ({TILES}, 6 products)"
    last = "avx512" if TILES == "amx" and not IS_FORCED else f"{TILES}, 6 products"
    assert ways["1"] == f"cpu: native convolution ({last})"
    assert all("output pixels" not in r.backend for r in report)
    if last == "avx512":
        assert "from 32 output pixels on, else avx512" in unsized[-1].backend
    # No hook is left, and nothing else.
    assert torch.equal(model(x), expected)
    assert not any(m._forward_pre_hooks for m in model.modules())
    with pytest.raises(ValueError, match="training mode"):
        fused_resnet.report(model.train(), x)


def rounded_to_tf32(x):
    """To 10 bits of mantissa, to nearest even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32).view_as(x)


@needs_tiles
@pytest.mark.parametrize("shape", [SHAPES[0], ConvShape(128, 512, (1, 1)), STEM], ids=str)
def test_error_of_less_exact_float32(shape):
    """At most what rounding the operands alone does, and no better than it must be."""
    case = bare_case(shape, (18, 18))
    exact, default = case.double().eager(), case.fused()
    with precision("ieee"):
        assert torch.equal(case.fused(), default)
    for allowed, rounded, least in (
        ("tf32", rounded_to_tf32, 1e-6),
        ("bf16", lambda x: x.bfloat16().float(), 5e-4),
    ):
        x, w = rounded(case.input).double(), rounded(case.weight).double()
        bound = relative_error(F.conv2d(x, w, None, shape.stride, shape.padding), exact)
        with precision(allowed):
            error = relative_error(case.fused(), exact)
        assert error <= 1.1 * bound
        if TILES in explained(case, shape):
            assert error > least
    assert torch.equal(case.fused(), default)


def explained(case, shape):
    return fused_resnet.backends.explain(
        "conv_bn_act",
        device=torch.device("cpu"),
        dtype=torch.float32,
        weight_shape=case.weight.shape,
        input_shape=case.input.shape,
        stride=shape.stride,
        padding=shape.padding,
    )


@needs_tiles
@pytest.mark.quick
def test_which_settings_are_followed():
    """Those that torch's own convolutions follow, wherever they are set."""
    case = bare_case(SHAPES[0], (9, 9))
    default = case.fused()
    model, x = two_blocks()
    logits = model(x)
    for settings in (torch.backends.mkldnn.conv, torch.backends):
        before = settings.fp32_precision
        try:
            settings.fp32_precision = "bf16"
            assert not torch.equal(case.fused(), default)
            assert not torch.equal(model(x), logits)
        finally:
            settings.fp32_precision = before
        assert torch.equal(case.fused(), default)
        assert torch.equal(model(x), logits)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # of matrix products only, says torch
        assert torch.equal(case.fused(), default)
    finally:
        torch.set_float32_matmul_precision(before)


def bare_case(shape, size, scale=1.0, dtype=torch.float32):
    """A convolution and nothing else."""
    case = make_conv_case(
        shape, size=size, dtype=dtype, activation="none", affine=False, residual=False
    )
    case.input *= scale
    case.weight *= scale
    case.running_mean.zero_()
    case.running_var.fill_(1.0)
    case.eps = 0.0
    return case


@needs_tiles
def test_error_of_float32_in_parts():
    """Six products of parts are nearer to float64 than one of float32 is, and than eager's."""
    for channels, taps in ((64, 1), (512, 1), (64, 3), (512, 3)):
        case = bare_case(ConvShape(channels, 64, (taps, taps)), (9, 9))
        exact = case.double().eager()
        columns = F.unfold(case.input, taps).transpose(1, 2).double()
        weight = case.weight.reshape(64, -1).double()
        chain = torch.zeros(*columns.shape[:2], 64)
        for j in range(weight.shape[1]):  # A product of float32 is exact in float64.
            chain = (chain.double() + columns[..., j : j + 1] * weight[:, j]).float()
        fused = relative_error(case.fused(), exact)
        assert fused <= relative_error(chain.transpose(1, 2).reshape(exact.shape), exact)
        assert fused <= relative_error(case.eager(), exact)


@needs_tiles
@pytest.mark.parametrize("allowed", ["none", "tf32", "bf16"])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[7], STEM], ids=str)
def test_float32_that_is_not_finite(shape, allowed):
    """Infinity times a part that is zero is NaN: such sums are taken again."""
    bound = {"none": 1e-5, "tf32": 1e-3, "bf16": 3e-2}[allowed]
    for value in (torch.inf, -torch.inf, torch.nan, 3e38):
        case = make_conv_case(shape, size=(23, 21), activation="none")
        case.input.permute(0, 2, 3, 1)[:, 2, 1::9, 0] = value
        # A NaN whose payload is in the half that is cut off.
        case.input.permute(0, 2, 3, 1).view(torch.int32)[1, 20, 3, 0] = 0x7F800001
        expected = case.double().eager()
        with precision(allowed):
            actual = case.fused()
        assert_same_nonfinite(actual, case.eager())
        finite = actual.isfinite()
        assert finite.any()
        assert not finite.all()
        error = (actual.double() - expected).abs()[finite]
        assert (error <= bound * expected[finite].abs() + bound).all()


@needs_tiles
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[7], STEM], ids=str)
def test_float16_in_parts(shape):
    """Subnormals are as good as other values, and what is not finite comes out as it should."""
    for scale in (1.0, 2e-7):
        case = bare_case(shape, (13, 11), dtype=torch.float16)
        case.input *= scale  # With 2e-7 all are subnormal.
        case.weight *= 1024
        exact = case.double().eager()
        error = relative_error(case.fused(), exact)
        assert error <= 1e-3
        assert error <= 1.5 * relative_error(case.eager(), exact)
    for value in (torch.inf, -torch.inf, torch.nan):
        case = bare_case(shape, (23, 21), dtype=torch.float16)
        case.input.permute(0, 2, 3, 1)[:, 2, 1::9, 0] = value
        actual, expected = case.fused(), case.double().eager()
        assert_same_nonfinite(actual, expected.half())
        finite = actual.isfinite()
        assert finite.any()
        assert not finite.all()
        error = (actual.double() - expected).abs()[finite]
        assert (error <= 1e-3 * expected[finite].abs() + 1e-3).all()


@needs_tiles
def test_float32_that_is_nearly_subnormal():
    """The unit takes subnormals for zeros, and so the last part of what is not much larger."""
    for scale in (1e-14, 1e-16, 1e-18):
        case = bare_case(SHAPES[0], (13, 11), scale)
        exact = case.double().eager()
        assert relative_error(case.fused(), exact) <= 1.5 * relative_error(case.eager(), exact)


@needs_amx
@pytest.mark.parametrize(
    ("dtype", "allowed"),
    [
        ("bfloat16", "none"),
        ("float16", "none"),
        ("float32", "none"),
        ("float32", "tf32"),
        ("float32", "bf16"),
    ],
)
@pytest.mark.ahead(lambda dtype, allowed: conv_digests(SETS, dtype, allowed))
def test_emulated_tiles_have_the_units_bits(dtype, allowed, ahead):
    """Rounding, subnormals and the order of sums: what the emulation says is what the unit does."""
    unit, emulated, vectors = ahead()
    assert unit == emulated
    # And the comparison can fail: vectors add in another order.
    assert unit != vectors


@pytest.mark.ahead(
    lambda: rerun_on_instruction_set("amx_emulated", __file__, "not threads and not bits")
)
def test_over_emulated_tiles(ahead):
    """This file's cases again, on any processor."""
    ahead()


@needs_amx
@pytest.mark.ahead(lambda: rerun_on_instruction_set("amx", __file__, "float32 or float16"))
def test_all_on_tiles(ahead):
    """And where there is the unit, what is in parts on it even where vectors are faster."""
    ahead()


def machine_code(code: bytes):
    """A function without arguments, of these instructions."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(code)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    function = ctypes.CFUNCTYPE(ctypes.c_uint32)(address)
    function.memory = memory
    return function


def tiles_in_use() -> bool:
    """Whether this thread has tiles configured or in them anything (XINUSE bits 17 and 18)."""
    # mov ecx, 1; xgetbv; ret
    return bool(machine_code(b"\xb9\x01\x00\x00\x00\x0f\x01\xd0\xc3")() & 0x60000)


@needs_amx
def test_threads_are_left_alone():
    """No tile state in a thread before a convolution, nor behind it."""
    cases = [make_conv_case(s, dtype=torch.bfloat16) for s in (SHAPES[0], SHAPES[7], STEM)]

    def check(i):
        assert not tiles_in_use()
        for case in cases:
            case.fused()
            assert not tiles_in_use()

    run_in_threads(check)


@needs_amx
def test_threads_keep_the_librarys_tiles():
    """oneDNN remembers which configuration a thread has: it must still be there."""
    case = make_conv_case(SHAPES[0], dtype=torch.bfloat16)
    expected, bound = case.double().eager(), case.rounding_bound()

    def check(i):
        sizes = [(64, 64, 64), (48 + i, 96, 33), (17, 128, 80)]
        for round in range(6):
            m, k, n = sizes[round % 3]
            a, b = torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16()
            product = torch.mm(a, b).double()
            exact = a.double() @ b.double()
            assert (product - exact).norm() <= 5e-3 * exact.norm()
            assert_within_bound(case.fused(), expected, bound)

    run_in_threads(check, 6)
