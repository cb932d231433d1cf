"""The Triton kernels, interpreted where there is no GPU: every tile, every shape, and graphs."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import inspect
import math
import textwrap

import hypothesis
import pytest
import torch
from conftest import RUNNERS
from hypothesis import strategies as st
from ops.test_conv_bn_act import drawn_cases
from support import (
    SAMPLE_SHAPES,
    STEM,
    STEM_POOL,
    ConvShape,
    assert_same_bits,
    assert_same_nonfinite,
    assert_within_bound,
    double_copy,
    dtype_id,
    every_model_conv_shape,
    image_batch,
    make_conv_case,
    run_python,
    small_resnet,
    unchanged,
)
from support.selection import examples, one_of_each
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import backends
from fused_resnet.testing import assert_error_rule
from fused_resnet.tuning import Choice, Tile
from fused_resnet.tuning.estimate import PACKED, USUAL_POOL, special_tiles

RUNNER = next((runner for runner in RUNNERS if runner.name == "triton"), None)
if RUNNER is not None:
    backends.triton.launchers()
    from fused_resnet.backends.triton import conv_kernels, device, launch, problem, stem

pytestmark = pytest.mark.skipif(RUNNER is None, reason=backends.available()["triton"])

KINDS = {
    "conv": ConvShape(40, 72, (3, 3), (1, 1), (1, 1)),
    "pointwise": ConvShape(96, 80, (1, 1)),
    "strided pointwise": ConvShape(64, 80, (1, 1), (2, 2)),
    "padded pointwise": ConvShape(24, 40, (1, 1), (1, 1), (1, 1)),
    "wide groups": ConvShape(128, 128, (3, 3), (1, 1), (1, 1), (1, 1), 2),
    "packed groups": ConvShape(64, 64, (3, 3), (1, 1), (1, 1), (1, 1), 16),
    "odd packed groups": ConvShape(35, 21, (3, 3), (2, 1), (1, 1), (1, 2), 7),
    "row": STEM,
}
TILES = [
    Tile(16, 32, 16, 1, 4, 1),
    Tile(32, 64, 32, 3, 4, 3),
    Tile(128, 128, 64, 16, 8, 3),
    Tile(32, 256, 64, 1, 8, 3),
]


@pytest.fixture
def triton(monkeypatch):
    """The backend, chosen; `triton(tile)` makes it run that tile."""

    def use(tile: Tile) -> None:
        monkeypatch.setattr(problem, "choose", lambda *_: Choice("triton", tile, "test"))

    with fused_resnet.use_backend("triton"):
        yield use


def check(case) -> torch.Tensor:
    with unchanged(**case.tensors()):
        fused = case.fused()
    eager = case.eager()
    if fused[0, 0].numel() > 1:  # else the strides of rows and columns mean nothing
        assert fused.stride() == eager.stride()
    assert_error_rule(fused, eager, case.double().eager())
    return fused


def case_of(shape, **arguments):
    return make_conv_case(shape, device=RUNNER.device, **arguments)


@pytest.mark.parametrize("tile", TILES, ids=lambda t: "x".join(map(str, dataclasses.astuple(t))))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.single
def test_tiles(triton, kind, tile):
    """Edges of every block size, shares of a sum, tiles beyond the tensor."""
    triton(tile)
    memory_format = torch.contiguous_format if tile.split_k == 3 else torch.channels_last
    case = case_of(KINDS[kind], size=(6, 4), dtype=torch.float16, bias=True)
    case.residual = case.residual.contiguous(memory_format=memory_format)
    check(case)


def reduced(shape: ConvShape) -> ConvShape:
    """A model's convolution with as many groups, of the same width, as two tiles have."""
    width = shape.out_channels // shape.groups
    groups = min(shape.groups, 2 * max(1, PACKED.block_n // width))
    scale = shape.groups // groups
    return dataclasses.replace(
        shape,
        in_channels=shape.in_channels // scale,
        out_channels=shape.out_channels // scale,
        groups=groups,
    )


@pytest.mark.parametrize("shape", every_model_conv_shape(), ids=str)
def test_every_model_convolution(triton, shape):
    """Every distinct convolution of the supported models on a small image, all channels.

    Of grouped ones, two tiles of groups.
    """
    size = {7: (19, 19), 3: (5, 4), 1: (4, 4)}[shape.kernel_size[0]]
    check(case_of(reduced(shape), size=size, batch=1, dtype=torch.bfloat16))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("shape", SAMPLE_SHAPES, ids=str)
def test_each_kernel_in_each_dtype(triton, shape, dtype):
    check(case_of(shape, size=(6, 5), dtype=dtype))


@pytest.mark.parametrize("split_k", [2, 5])
@pytest.mark.single
def test_a_split_sum_has_one_value(triton, split_k):
    """Shares are added in one order: the same bits again, and the error rule holds."""
    triton(Tile(32, 64, 32, split_k, 4, 2))
    case = case_of(KINDS["conv"], size=(5, 4), dtype=torch.float16)
    first = check(case)
    for _ in range(2):
        assert_same_bits(case.fused(), first)


def test_shares_of_a_split_sum_are_not_empty():
    conv = backends.triton.launchers()
    for steps in range(1, 40):
        for split_k in range(1, 17):
            shares = conv._shares(Tile(64, 64, 64, split_k, 4, 3), steps)
            each = math.ceil(steps / shares)
            assert 1 <= shares <= split_k
            assert (shares - 1) * each < steps <= shares * each


@pytest.mark.parametrize(("rows", "channels"), [(1, 32), (3, 64), (8, 32)])
@pytest.mark.parametrize(
    ("size", "dtype", "activation"),
    [
        ((1, 1), torch.float32, "none"),
        ((13, 10), torch.bfloat16, "none"),
        ((22, 17), torch.float16, "relu"),
    ],
    ids=str,
)
def test_stem_with_its_pool(triton, monkeypatch, rows, channels, size, dtype, activation):
    """Strips over several images, rows of programs that meet, odd and even sizes, both tiles."""
    monkeypatch.setattr(stem, "pooled_rows_each", lambda programs: rows)
    case = case_of(STEM, size=size, batch=3, dtype=dtype, pool=STEM_POOL, activation=activation)
    pooled = problem.problem_of(
        case.input, case.weight, case.stride, case.padding, (1, 1), 1, False, USUAL_POOL
    )
    tiles = {tile.block_n: tile for tile in special_tiles(pooled)}
    if dtype is torch.float32:
        assert tiles.keys() == {32}
        channels = 32
    triton(tiles[channels])
    check(case)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", [*KINDS, "stem and pool"])
@pytest.mark.single
def test_nonfinite_values_reach_no_other_group_or_pixel(triton, kind, value):
    """What a tile multiplies by a zero of its own making must not become NaN."""
    triton(TILES[2])
    pool = STEM_POOL if kind == "stem and pool" else None
    case = case_of(KINDS.get(kind, STEM), size=(9, 9), dtype=torch.float16, pool=pool)
    case.input[0, 0, 4, 4] = value
    case.input[1, -1, 3, 8] = value
    if case.residual is not None:
        case.residual[0, 1, 2, 2] = value
    assert_same_nonfinite(case.fused(), case.double().eager(), case.eager())


@pytest.mark.skipif(RUNNER is None or RUNNER.device == "cuda", reason="for the interpreter")
def test_tf32_is_what_torch_asks_for(triton, monkeypatch):
    """TF32 products when torch would use them, and only then; the interpreter rounds as they do."""
    conv = backends.triton.launchers()
    case = case_of(KINDS["pointwise"])
    exact = case.double().eager()
    triton(TILES[2])
    errors = {}
    for setting in ("ieee", "tf32"):
        monkeypatch.setattr(conv, "precision", lambda input, setting=setting: setting)
        errors[setting] = fused_resnet.testing.relative_error(case.fused(), exact)
    assert errors["ieee"] < 1e-6
    assert 1e-5 < errors["tf32"] < 1e-3


def test_precision_follows_torchs_setting():
    conv = backends.triton.launchers()
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision
    with torch._subclasses.fake_tensor.FakeTensorMode():
        x = torch.empty(1, device="cuda")
    try:
        cudnn.conv.fp32_precision = "ieee"
        assert conv.precision(x) == "ieee"
        cudnn.conv.fp32_precision = "tf32"
        assert conv.precision(x) == "tf32"
        assert conv.precision(x.half()) == "ieee"
        cudnn.allow_tf32 = False
        assert conv.precision(x) == "ieee"
        cudnn.allow_tf32 = True
        assert conv.precision(x) == "tf32"
    finally:
        cudnn.conv.fp32_precision = before


@pytest.mark.skipif(RUNNER is None or RUNNER.device == "cuda", reason="for the interpreter")
def test_the_interpreter_rounds_as_hardware_does():
    from fused_resnet.backends.triton import interpreter

    values = torch.cat([torch.randn(4000) * 10.0**e for e in range(-40, 39, 6)])
    special = [0.0, -0.0, math.inf, -math.inf, math.nan, 3.4e38, 1.00390625, 1.01171875]
    values = torch.cat([values, torch.tensor(special)])
    expected = values.bfloat16()
    ours = interpreter.to_bfloat16(values.numpy())
    ours = torch.from_numpy(interpreter.from_bfloat16(ours))
    assert torch.equal(ours.nan_to_num(7.0), expected.float().nan_to_num(7.0))
    rounded = torch.from_numpy(interpreter.to_tfloat32(values.numpy()).copy())
    finite = values.isfinite()
    assert ((rounded - values).abs()[finite] <= values.abs()[finite] * 2**-11 + 1e-41).all()
    assert (rounded.view(torch.int32)[finite] & 0x1FFF == 0).all()


@hypothesis.settings(max_examples=examples(20))
@hypothesis.given(
    data=st.data(),
    tile=st.sampled_from(TILES[1:]),
    wide=st.booleans(),
)
def test_drawn_tiles(triton, data, tile, wide):
    """Any geometry and layout under any tile, with 32 and 64-bit offsets."""
    case = data.draw(drawn_cases(RUNNER.device))
    hypothesis.assume(case.input.dtype != torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(problem, "choose", lambda *_: Choice("triton", tile, "test"))
        if wide:
            patch.setattr(launch, "is_wide", lambda *_: True)
        with unchanged(**case.tensors()):
            fused = case.fused()
    assert fused.shape == case.eager().shape
    assert_within_bound(fused, case.double().eager(), case.rounding_bound())


@pytest.mark.quick
def test_a_model(triton):
    """A fused network, stem to last block."""
    model = small_resnet(BasicBlock)
    fused = fused_resnet.fuse(copy.deepcopy(model)).to(RUNNER.device)
    x = image_batch(1, 33)
    with torch.no_grad():
        out = fused(x.to(RUNNER.device)).cpu()
        assert_error_rule(out, model(x), double_copy(model)(x.double()))


@pytest.mark.quick
def test_what_it_cannot_run_is_the_librarys(triton, monkeypatch):
    monkeypatch.setattr(launch, "launch_kernel", None)
    case = case_of(SAMPLE_SHAPES[2], dtype=torch.float64)
    assert case.fused().dtype == torch.float64
    assert "library" in backends.explain(
        "conv_bn_act", device=case.input.device, dtype=torch.float64
    )
    assert "implicit GEMM" in backends.explain(
        "conv_bn_act", device=case.input.device, dtype=torch.float16
    )
    monkeypatch.setattr(
        problem, "choose", lambda *_: Choice("library", None, "measured on this machine")
    )
    case_of(SAMPLE_SHAPES[2]).fused()


def test_the_interpreter_is_only_for_who_asks():
    """With TRITON_INTERPRET set, CPU tensors still run on the CPU backend by default."""
    if RUNNER.device == "cpu":
        assert backends.choose("cpu").name == "cpu"
        assert backends.choose("cuda").name != "triton"


# Broken kernels: the case that must object, a line of a kernel, and what it becomes.
MUTATIONS = {
    "last block dropped": ("conv", "last = R * S * c_blocks", "last = R * S * c_blocks - 1"),
    "residual forgotten": ("conv", "acc += residual.to(tl.float32)", "acc += 0.0"),
    "relu kills NaN": ("spoiled", "propagate_nan=tl.PropagateNan.ALL)", ")"),
    "mean ignored": ("conv", "shift = shift * scale", "shift = shift * 0.0"),
    "eps ignored": ("conv", "tl.rsqrt(var + tl.cast(eps, tl.float32))", "tl.rsqrt(var)"),
    "border wraps": (
        "conv",
        "inside &= (w + s * DILATION_W >= 0) & (w + s * DILATION_W < W)",
        "inside &= w + s * DILATION_W < W",
    ),
    "share lost": ("split", "in tl.static_range(SPLIT_K):", "in tl.static_range(SPLIT_K - 1):"),
    "diagonal blurred": (
        "packed",
        "(own_row[:, None] == own_column[None, :])",
        "(own_row[:, None] >= own_column[None, :])",
    ),
    "NaN leaks": ("spoiled", "if tl.max((acc != acc).to(tl.int32)) > 0:", "if BLOCK_M == 0:"),
    "pool forgets a column": (
        "pool",
        "value = tl.maximum(value, left, propagate_nan=tl.PropagateNan.ALL)",
        "value = value",
    ),
    "shared row lost": ("pool", "            best = value\n", "            best = value - 9.0\n"),
    "dilation ignored": (
        "dilated",
        "shift = r * DILATION_H * input_stride_h",
        "shift = r * input_stride_h",
    ),
    "quarters exchanged": (
        "wide",
        "at = 64 * (2 * i + j)",
        "at = 64 * (i + 2 * j)",
    ),
    "second half lost": ("half", "first_k + 64 * j,", "first_k,"),
    "rows past the end": ("conv", "row_exists = m < M\n", "row_exists = m < M - 1\n"),
}


def mutation_case(name: str):
    """A case, and the tile it runs with."""
    if name == "pool":
        return case_of(STEM, size=(11, 9), pool=STEM_POOL, batch=1, activation="none"), TILES[0]
    if name in ("half", "wide"):
        tile = TILES[2] if name == "half" else TILES[3]
        return case_of(ConvShape(16, 200, (1, 1)), size=(4, 3)), tile
    if name == "dilated":
        dilated = ConvShape(16, 16, (3, 3), (1, 1), (2, 2), (2, 2))
        return case_of(dilated, size=(6, 5)), TILES[0]
    if name == "spoiled":
        case = case_of(KINDS["packed groups"], size=(4, 4), batch=1)
        case.input[0, 0, 1, 1] = math.inf
        case.residual[0, 1, 2, 2] = math.nan
        return case, TILES[0]
    kind = "packed groups" if name == "packed" else "conv"
    case = case_of(KINDS[kind], size=(4, 3))
    case.eps = 1e-2
    return case, Tile(32, 64, 32, 3 if name == "split" else 1, 4, 1)


@pytest.mark.skipif(RUNNER is None or RUNNER.device == "cuda", reason="for the interpreter")
@pytest.mark.parametrize("mutation", one_of_each(MUTATIONS, lambda name: MUTATIONS[name][0]))
@pytest.mark.single
def test_broken_kernels_are_noticed(triton, monkeypatch, tmp_path, mutation):
    """The checks object to each wrong kernel, and do not to the right one."""
    if mutation == "relu kills NaN" and importlib.metadata.version("triton").startswith("3.6."):
        pytest.skip("the interpreter of Triton 3.6 keeps NaN in every maximum")
    name, right, wrong = MUTATIONS[mutation]
    files = (device, conv_kernels, stem)
    found = [file for file in files if right in inspect.getsource(file)]
    assert found

    case, tile = mutation_case(name)
    triton(tile)
    exact, eager = case.double().eager(), case.eager()

    def examine() -> None:
        fused = case.fused()
        assert_same_nonfinite(fused, exact, eager)
        finite = exact.isfinite() & fused.isfinite()
        assert_within_bound(
            *(torch.where(finite, t.double(), 0.0) for t in (fused, exact, case.rounding_bound()))
        )

    examine()
    for file in found:
        path = tmp_path / f"{file.__name__}.py"
        path.write_text(inspect.getsource(file).replace(right, wrong))
        spec = importlib.util.spec_from_file_location(f"{file.__name__}_broken", path)
        broken = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(broken)
        for kernel, known in dict(vars(file)).items():
            if isinstance(known, type(conv_kernels.conv_kernel)):
                for other in files:
                    if getattr(other, kernel, None) is known:
                        monkeypatch.setattr(other, kernel, getattr(broken, kernel))
    # Fills new tensors with NaN: what a kernel leaves out must not be what the right one wrote.
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(AssertionError):
            examine()
    finally:
        torch.use_deterministic_algorithms(False)


GRAPH_OF_A_MODEL = """
    from collections import Counter
    import torch, triton
    from torchvision.models.resnet import Bottleneck, ResNet
    from torch._dynamo.backends.common import aot_autograd
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from triton.backends.compiler import GPUTarget
    import fused_resnet
    from fused_resnet import tuning

    class Driver:  # what torch asks to find out which arguments a kernel writes to
        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    if not torch.cuda.is_available():
        triton.runtime.driver.set_active(Driver())
        fused_resnet.backends.triton.available = lambda: "yes"
        h100 = tuning.architecture.ARCHITECTURES["H100"]
        tuning.architecture.of_device = lambda device: h100

    if {cuda}:  # as if tuning had found the CUDA kernel the fastest
        tile = tuning.Tile(128, 64, 32, 1, 4, 4)
        fused_resnet.backends.triton.problem.choose = lambda problem, device: tuning.Choice(
            "library" if problem.pool else "cuda", None if problem.pool else tile, "test"
        )

    graphs = []

    def collect(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.set_default_dtype(torch.float16)
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()), torch.device("cuda"):
        model = ResNet(Bottleneck, [2, 1, 1, 1], groups={groups}, width_per_group=4).eval()
        fused_resnet.fuse(model)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                K, C, R, S = parameter.shape
                parameter.data = torch.empty(K, R, S, C).permute(0, 3, 1, 2)
        x = torch.empty(4, 64, 64, 3).permute(0, 3, 1, 2)
        if {dynamic}:
            torch._dynamo.mark_dynamic(x, 0)
        compiled = torch.compile(
            model, fullgraph=True, backend=aot_autograd(fw_compiler=collect)
        )
        with torch.no_grad():
            out = compiled(x)
    assert len(graphs) == 1
    assert out.shape == (4, 1000) and out.device.type == "cuda"
    nodes = [n for n in graphs[0].graph.nodes if n.op == "call_function"]
    counts = Counter(str(n.target) for n in nodes)
    launches = [n for n in nodes if "triton_kernel_wrapper_functional" in str(n.target)]
    writes = {{tuple(n.kwargs["tensors_to_clone"]) for n in launches}}
    assert writes <= {{("output_ptr",), ("partial_ptr",)}}, writes
    ours = {{name for name in counts if "fused_resnet" in name}}
    assert ours == ({{"fused_resnet.scale_shift_act.default"}} if {cuda} else set()), counts
    assert sum("convolution" in name for name in counts) == {cuda}, counts
    assert "aten.clone.default" not in counts, counts
    batch = [n for n in graphs[0].graph.nodes if n.op == "placeholder" and n.users]
    symbolic = [n for n in batch if isinstance(n.meta.get("val"), torch.SymInt)]
    assert bool(symbolic) == {dynamic}
    print(len(launches))
"""


def launches_in_a_graph(groups: int, dynamic: bool, cuda: bool) -> int:
    code = textwrap.dedent(GRAPH_OF_A_MODEL).format(groups=groups, dynamic=dynamic, cuda=cuda)
    return int(run_python(code, TRITON_INTERPRET="0").split()[-1])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("groups", "dynamic", "cuda"), [(16, False, False), (32, True, False), (1, False, True)]
)
@pytest.mark.ahead(lambda groups, dynamic, cuda: launches_in_a_graph(groups, dynamic, cuda))
def test_compiled_graphs_hold_the_kernels(groups, dynamic, cuda, ahead):
    """AOT autograd's graph: launches instead of our operators, nothing copied, one graph.

    Traced with fake CUDA tensors, in a process where kernels are not interpreted; needs no GPU. A
    symbolic batch stays symbolic, or `mark_dynamic` would raise. Layers that the CUDA kernel is the
    fastest for are Triton's in graphs, and the stem is what was chosen, here the library's.
    """
    convolutions = (not cuda) + 5 * 3 + 4
    assert ahead() >= convolutions
