"""The CUDA convolution's instances, splits, layouts and choices; on the host where there is no GPU.

What any backend promises of `conv_bn_act` is in test_conv_bn_act.py, which runs over this one too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import hypothesis
import pytest
import torch
from conftest import RUNNERS
from hypothesis import strategies as st
from ops.test_conv_bn_act import drawn_cases
from support import (
    OTHER_ACTIVATIONS,
    SAMPLE_SHAPES,
    STEM,
    ConvCase,
    ConvShape,
    assert_same_bits,
    assert_same_nonfinite,
    assert_within_bound,
    cuda_on_host,
    dtype_id,
    every_model_conv_shape,
    make_conv_case,
    unchanged,
)
from support.selection import examples, one_of_each

import fused_resnet
from fused_resnet import backends
from fused_resnet.backends import cuda, library
from fused_resnet.layers.description import ConvNorm, Norm
from fused_resnet.measure.tune import cases, tuner
from fused_resnet.testing import FACTOR, assert_error_rule, relative_error
from fused_resnet.tuning import Choice, ConvProblem, Tile, architecture, cuda_tiles, table

RUNNER = next((runner for runner in RUNNERS if runner.name == "cuda"), None)
ON_HOST = RUNNER is not None and RUNNER.device == "cpu"

pytestmark = [
    pytest.mark.skipif(RUNNER is None, reason=backends.available()["cuda"]),
    pytest.mark.usefixtures("guarded_tensors"),
]

VECTORS, ELEMENTS, DIAGONAL = range(3)  # Loads in csrc/cuda/conv_tiles.h
H100 = architecture.named("H100")
KINDS = {
    "3x3": (VECTORS, ConvShape(40, 72, (3, 3), (1, 1), (1, 1))),
    "pointwise": (VECTORS, ConvShape(96, 80, (1, 1))),
    "strided pointwise": (VECTORS, ConvShape(64, 136, (1, 1), (2, 2))),
    "uneven": (VECTORS, ConvShape(24, 40, (2, 3), (2, 1), (0, 3), (1, 2))),
    "wide groups": (VECTORS, ConvShape(128, 96, (3, 3), (1, 1), (1, 1), (1, 1), 2)),
    "odd outputs": (VECTORS, ConvShape(16, 29, (3, 3), (1, 1), (1, 1))),
    "stem": (ELEMENTS, STEM),
    "odd channels": (ELEMENTS, ConvShape(13, 29, (3, 2), (2, 1), (0, 1), (1, 2))),
    "odd groups": (ELEMENTS, ConvShape(35, 21, (3, 3), (2, 1), (1, 1), (1, 2), 7)),
    "groups of 16": (DIAGONAL, ConvShape(96, 96, (3, 3), (1, 1), (1, 1), (1, 1), 6)),
    "groups of 8": (DIAGONAL, ConvShape(64, 64, (3, 3), (2, 2), (1, 1), (1, 1), 8)),
    "groups of 4": (DIAGONAL, ConvShape(72, 72, (3, 3), (1, 1), (1, 1), (1, 1), 18)),
    "groups of 2": (DIAGONAL, ConvShape(32, 32, (1, 3), (1, 1), (0, 1), (1, 1), 16)),
    "depthwise": (DIAGONAL, ConvShape(24, 24, (3, 3), (1, 1), (2, 2), (2, 2), 24)),
}


@dataclasses.dataclass(frozen=True)
class Instance:
    """A row of csrc/cuda/conv_tiles.h, for one dtype."""

    index: int
    dtype: torch.dtype
    tf32: bool
    loads: int
    tile: Tile

    def __str__(self) -> str:
        kind = "tf32" if self.tf32 else dtype_id(self.dtype)
        return f"{self.index}-{kind}"


def instances() -> list[Instance]:
    if RUNNER is None:
        return []
    found = []
    numbers = fused_resnet._native.cuda_operators.conv_tiles()
    for index in range(len(numbers) // 7):
        products, loads, m, n, k, warps, stages = numbers[7 * index : 7 * index + 7]
        dtypes = [torch.float16, torch.bfloat16] if products == 0 else [torch.float32]
        tile = Tile(m, n, k, 1, warps, stages)
        found += [Instance(index, dtype, products == 1, loads, tile) for dtype in dtypes]
    return found


INSTANCES = instances()
# Without `--whole` one of each kind: test_cuda_conv_exact.py has them all.
EVERY_INSTANCE = one_of_each(INSTANCES, lambda one: (one.dtype, one.tf32, one.loads))


def case_of(shape: ConvShape, **arguments) -> ConvCase:
    return make_conv_case(shape, device=RUNNER.device, **arguments)


def run(case: ConvCase, tile: Tile | None = None, tf32: bool = False) -> torch.Tensor:
    """The backend's function, with a tile of the test's choice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "precision", lambda input: "tf32" if tf32 else "ieee")
        norm = Norm(case.running_mean, case.running_var, case.bn_weight, case.bn_bias, case.eps)
        layer = ConvNorm(
            case.weight, norm, case.bias, case.stride, case.padding, case.dilation, case.groups
        )
        return cuda.conv_bn_act(case.input, layer, case.residual, case.activation, tile)


def rounded_to_tf32(case: ConvCase) -> ConvCase:
    """The case with the operands of its products as tf32, ties away from zero."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    return dataclasses.replace(case, input=rounded(case.input), weight=rounded(case.weight))


def check(case: ConvCase, instance: Instance, split: int = 1) -> torch.Tensor:
    """The error rule; products in tf32 are judged as those of operands rounded to it.

    Tensor cores cut off towards zero where eager rounds to nearest, once for each four products in
    tf32, by half a unit of 2^-23 on average.
    """
    with unchanged(**case.tensors()):
        out = run(case, dataclasses.replace(instance.tile, split_k=split), instance.tf32)
    eager = case.eager()
    if out[0, 0].numel() > 1:  # else the strides of rows and columns mean nothing
        assert out.stride() == eager.stride()
    if not instance.tf32:
        assert_error_rule(out, eager, case.double().eager())
        return out
    case = rounded_to_tf32(case)
    expected = case.double().eager()
    steps = -(-case.weight[0].numel() // 4)
    limit = max(FACTOR * relative_error(case.eager(), expected), (4 + steps) * 2.0**-24)
    assert relative_error(out, expected) <= limit
    return out


def problem_of(case: ConvCase, tf32: bool = False) -> ConvProblem:
    dtype = "tfloat32" if tf32 else dtype_id(case.input.dtype)
    return ConvProblem(
        *case.input.shape, case.weight.shape[0], *case.weight.shape[2:], case.stride, case.padding,
        case.dilation, case.groups, dtype, case.residual is not None,
    )  # fmt: skip


@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize("instance", EVERY_INSTANCE, ids=str)
def test_every_instance(instance, split, set_seed):
    """Edges of every tile, shares of a sum, in every dtype and kind of operand."""
    set_seed(instance.index)
    for loads, shape in KINDS.values():
        if loads != instance.loads:
            continue
        # More than a tile of pixels where that is cheap.
        size = (20, 19) if loads == ELEMENTS else (9, 8)
        check(case_of(shape, size=size, dtype=instance.dtype, bias=True), instance, split)


@pytest.mark.parametrize("instance", EVERY_INSTANCE, ids=str)
def test_every_instance_alone(instance):
    """Without a residual and anything else that may be left out, on one pixel."""
    for loads, shape in KINDS.values():
        if loads != instance.loads:
            continue
        size = tuple(
            max(1, d * (k - 1) - 1) for d, k in zip(shape.dilation, shape.kernel_size, strict=True)
        )
        shape = dataclasses.replace(shape, padding=(1, 1))
        case = case_of(
            shape, size=size, batch=1, dtype=instance.dtype, residual=False, affine=False,
            activation="none",
        )  # fmt: skip
        out = run(case, instance.tile, instance.tf32)
        if instance.tf32:
            case = rounded_to_tf32(case)
        assert_within_bound(out, case.double().eager(), case.rounding_bound())


def activated_cases() -> list:
    """Every instance and kind of convolution it runs, with every activation besides ReLU."""
    found = [
        (instance, kind, activation)
        for instance in INSTANCES
        for kind, (loads, _) in KINDS.items()
        if loads == instance.loads
        for activation in OTHER_ACTIVATIONS
    ]
    return one_of_each(
        [pytest.param(*one, id="-".join(map(str, one)).replace(" ", "_")) for one in found],
        lambda instance, kind, activation: instance,
        lambda instance, kind, activation: (instance.dtype, instance.tf32, kind),
        lambda instance, kind, activation: (instance.dtype, instance.loads, activation),
    )


@pytest.mark.parametrize(("instance", "kind", "activation"), activated_cases())
def test_other_activations(instance, kind, activation, set_seed):
    """Behind the residual and without one, of a block's own sum and of one that blocks share."""
    set_seed(instance.index)
    case = case_of(
        KINDS[kind][1], size=(7, 6), dtype=instance.dtype, activation=activation, bias=True
    )
    check(case, instance)
    check(dataclasses.replace(case, residual=None), instance, split=3)


@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
@pytest.mark.parametrize("kind", ["3x3", "stem", "groups of 4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=dtype_id)
def test_nonfinite_values_and_other_activations(dtype, kind, activation):
    """NaN and infinities are what eager makes of them: NaN where it multiplies one by zero."""
    loads, shape = KINDS[kind]
    case = case_of(shape, size=(5, 6), dtype=dtype, activation=activation)
    case.input[0, 0, 3, 3] = math.nan
    case.input[1, -1, 1, 4] = math.inf
    for n, value in ((0, math.nan), (1, math.inf), (0, -math.inf)):
        case.residual[n, 1, 2, n] = value
    expected = case.double().eager(), case.eager()
    assert_same_nonfinite(run(case, smallest(loads, dtype).tile), *expected)


@pytest.mark.parametrize("activation", ["silu", "leaky_relu(0.2)"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_no_images_and_other_activations(dtype, activation):
    case = case_of(KINDS["3x3"][1], dtype=dtype, activation=activation)
    empty = dataclasses.replace(case, input=case.input[:0], residual=case.residual[:0])
    assert run(empty).shape == (0, *case.eager().shape[1:])


def smallest(loads: int, dtype: torch.dtype, tf32: bool = False) -> Instance:
    """The instance with the fewest outputs."""
    found = [i for i in INSTANCES if (i.loads, i.dtype, i.tf32) == (loads, dtype, tf32)]
    return min(found, key=lambda i: i.tile.block_m * i.tile.block_n)


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("kind", ["3x3", "stem", "groups of 4"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_the_same_bits_in_any_order(kind, dtype, split, set_seed):
    """Threads, blocks and copies come in another order with each seed; the bits do not."""
    loads, shape = KINDS[kind]
    case = case_of(shape, size=(9, 8), dtype=dtype)
    tile = dataclasses.replace(smallest(loads, dtype).tile, split_k=split)
    first = run(case, tile)
    for seed in range(6):
        set_seed(seed)
        assert_same_bits(run(case, tile), first)


@hypothesis.settings(max_examples=examples(100))
@hypothesis.given(data=st.data(), seed=st.integers(0, 2**16), begin=st.booleans())
def test_drawn_tiles(data, set_seed, seed, begin):
    """Any geometry and layout, with any tile and split that can run it, at either guard page."""
    if ON_HOST:
        cuda_on_host.load().guard("begin" if begin else "end")
    case = data.draw(drawn_cases(RUNNER.device))
    hypothesis.assume(case.input.dtype != torch.float64)
    tf32 = case.input.dtype == torch.float32 and data.draw(st.booleans())
    tile = None
    if case.input.size(0) > 0:
        tile = data.draw(st.sampled_from(cuda_tiles.candidates(problem_of(case, tf32), H100)))
        tile = dataclasses.replace(tile, split_k=data.draw(st.sampled_from([1, 2, 7])))
    set_seed(seed)
    with unchanged(**case.tensors()):
        out = run(case, tile, tf32)
    assert out.shape == case.eager().shape
    if tf32:
        case = rounded_to_tf32(case)
    assert_within_bound(out, case.double().eager(), case.rounding_bound())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_nonfinite_values_reach_no_other_group_or_pixel(kind, dtype, value):
    """What a tile multiplies by a zero of its own making must not become NaN."""
    loads, shape = KINDS[kind]
    case = case_of(shape, size=(9, 9), dtype=dtype)
    case.input[0, 0, 4, 4] = value
    case.input[1, -1, 3, 8] = value
    case.residual[0, 1, 2, 2] = value
    case.residual[1, 0, 0, 0] = -value
    expected = case.double().eager(), case.eager()
    for split in (1, 2):
        tile = dataclasses.replace(smallest(loads, dtype).tile, split_k=split)
        assert_same_nonfinite(run(case, tile), *expected)


def test_an_infinite_sum_in_its_own_group():
    """What overflows is infinite, on the diagonal too, where NaN alone is computed again."""
    case = case_of(KINDS["groups of 4"][1], size=(5, 5), dtype=torch.float16)
    case.input.fill_(6e4)
    case.weight.copy_(case.weight.abs())
    out = run(case)
    assert out.isposinf().any()
    assert_same_nonfinite(out, case.double().eager().half())


@pytest.mark.parametrize("layout", ["rows apart", "images apart", "both formats", "misaligned"])
@pytest.mark.parametrize("kind", ["3x3", "stem", "groups of 8"])
def test_layouts(kind, layout):
    """Rows and images with something between them, and what has to be copied first."""
    case = case_of(KINDS[kind][1], size=(9, 8), dtype=torch.float16)
    exact = case.double().eager()

    def spread(tensor: torch.Tensor) -> torch.Tensor:
        N, C, H, W = tensor.shape
        if layout == "misaligned":
            storage = tensor.new_full((tensor.numel() + 1,), math.nan)[1:]
            return storage.view(N, H, W, C).permute(0, 3, 1, 2).copy_(tensor)
        between = [8, 0] if layout == "images apart" else [0, 8]
        storage = tensor.new_full((N, H + between[0], W + between[1], C), math.nan)
        return storage[:, :H, :W].permute(0, 3, 1, 2).copy_(tensor)

    if layout == "both formats":
        case.residual = case.residual.contiguous()
        case.weight = case.weight.contiguous(memory_format=torch.channels_last)
    else:
        case.input, case.residual = spread(case.input), spread(case.residual)
    with unchanged(**case.tensors()):
        out = run(case)
    assert out.stride() == case.eager().stride()
    assert_error_rule(out, case.eager(), exact)


@pytest.mark.parametrize("bn_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_of_any_dtype_and_stride(bn_dtype):
    case = case_of(KINDS["pointwise"][1], dtype=torch.float16, bn_dtype=bn_dtype, bias=True)
    apart = {
        name: value.repeat_interleave(2)[::2]
        for name, value in case.tensors().items()
        if value.dim() == 1
    }
    out = run(dataclasses.replace(case, **apart))
    assert_within_bound(out, case.double().eager(), case.rounding_bound())


def test_offsets_beyond_32_bits():
    """Rows and images 2^31 elements and more away from the first; what is between is not touched.

    The operating system gives memory to what is touched alone.
    """
    if ON_HOST:
        cuda_on_host.load().guard("off")
    images_apart, rows_apart = (2**31 + 8, 1, 64, 16), (2**27, 1, 2**30 + 8, 16)
    for channels, dtype, strides in itertools.product(
        (16, 5), (torch.float16, torch.float32), (images_apart, rows_apart)
    ):
        shape = ConvShape(channels, 24, (3, 3), (1, 1), (1, 1))
        case = case_of(shape, size=(5, 4), dtype=dtype)
        length = sum((n - 1) * s for n, s in zip(case.input.shape, strides, strict=True)) + 1
        storage = torch.empty(length, dtype=dtype, device=RUNNER.device)
        far = storage.as_strided(case.input.shape, strides).copy_(case.input)
        near = run(case)
        assert_same_bits(run(dataclasses.replace(case, input=far)), near)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("split", [1, 2])
def test_host_path_converts_nothing(split, activation):
    """No operator of torch's runs but to allocate, unless a layout must change."""
    instance = smallest(VECTORS, torch.float16)
    tile = dataclasses.replace(instance.tile, split_k=split)
    case = case_of(KINDS["3x3"][1], dtype=torch.float16, bias=True, activation=activation)
    case.weight = case.weight.contiguous(memory_format=torch.channels_last)

    def operators() -> set[str]:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as profile:
            run(case, tile)
        names = {event.name for event in profile.events() if event.name.startswith("aten::")}
        # The stable ABI's way to memory, which some versions of torch show on a GPU.
        return names - {"aten::empty_strided"}

    assert operators() == set()
    case.input = case.input.contiguous()
    assert "aten::contiguous" in operators()


def test_the_operator_keeps_to_its_schema(monkeypatch):
    """It writes to and aliases nothing it should not."""
    operator = fused_resnet._native.cuda_operators.conv_bn_act_tiled.default
    calls = []

    def record(*arguments):
        calls.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(cuda, "_operator", lambda: record)
    for layout in (torch.contiguous_format, torch.channels_last):
        run(case_of(KINDS["3x3"][1], dtype=torch.float16, bias=True, memory_format=layout))
    for arguments in calls:
        torch.library.opcheck(operator, arguments, test_utils=["test_schema"])


@pytest.mark.parametrize("shape", every_model_conv_shape(), ids=str)
def test_choices_for_the_models(shape):
    """Every layer has tiles on every GPU, of the kind that fits it, none larger than the GPU."""
    R, S = shape.kernel_size
    size = {7: 224, 3: 28, 1: 28}[R]
    width = shape.in_channels // shape.groups
    for gpu, N, dtype in itertools.product(
        architecture.ARCHITECTURES.values(), (1, 32, 256), ("float16", "tfloat32", "float32")
    ):
        problem = ConvProblem(
            N, shape.in_channels, size, size, shape.out_channels, R, S, shape.stride, shape.padding,
            shape.dilation, shape.groups, dtype, True,
        )  # fmt: skip
        tiles = cuda_tiles.candidates(problem, gpu)
        assert tiles
        assert len(tiles) == len(set(tiles))
        chunk = 16 // problem.element_size
        loads = ELEMENTS if width % chunk else VECTORS
        if shape.groups > 1 and width == shape.out_channels // shape.groups and width <= 16:
            loads = DIAGONAL
        for tile in tiles:
            index = cuda_tiles.index(tile, getattr(torch, dtype.replace("tf", "f")), "tf" in dtype)
            assert loads == next(i.loads for i in INSTANCES if i.index == index)
            output = problem.element_size * tile.block_m * tile.block_n
            assert output <= gpu.shared_per_block
            depth = R * S * (width if loads != DIAGONAL else tile.block_k)
            steps = math.ceil(depth / tile.block_k)
            each = math.ceil(steps / tile.split_k)
            assert (tile.split_k - 1) * each < steps, "a block without a step"


def test_small_problems_are_shared_and_large_ones_are_not():
    def first(N: int, C: int, H: int, K: int, R: int) -> Tile:
        padding = (R // 2, R // 2)
        problem = ConvProblem(
            N, C, H, H, K, R, R, (1, 1), padding, (1, 1), 1, "float16", False
        )  # fmt: skip
        return cuda_tiles.candidates(problem, H100)[0]

    assert first(1, 512, 7, 512, 3).split_k > 1
    assert first(1, 2048, 7, 512, 1).split_k > 1
    for layer in ((64, 56, 64, 3), (64, 56, 256, 1), (256, 14, 256, 3), (2048, 7, 512, 1)):
        tile = first(256, *layer)
        assert tile.split_k == 1
        assert tile.block_m * tile.block_n >= 128 * 64


def test_tiles_that_cannot_run_a_problem_are_refused():
    case = case_of(KINDS["stem"][1], size=(9, 9), dtype=torch.float16)
    with pytest.raises(ValueError, match="cannot run"):
        run(case, smallest(VECTORS, torch.float16).tile)
    with pytest.raises(ValueError, match="cannot run"):
        run(case, smallest(DIAGONAL, torch.float16).tile)
    with pytest.raises(ValueError, match="tile must be"):
        run(case, dataclasses.replace(smallest(ELEMENTS, torch.float16).tile, split_k=0))


def test_what_it_cannot_run_is_the_librarys(monkeypatch):
    monkeypatch.setattr(cuda, "_operator", None)
    case = case_of(SAMPLE_SHAPES[2], dtype=torch.float64)
    assert run(case).dtype == torch.float64
    monkeypatch.setattr(cuda, "_MOST_GROUPS", 7)
    run(case_of(SAMPLE_SHAPES[5]))
    device = torch.device(RUNNER.device)
    with fused_resnet.use_backend("cuda"):
        explain = {
            dtype: backends.explain("conv_bn_act", device=device, dtype=dtype)
            for dtype in (torch.float64, torch.float16)
        }
    assert "library" in explain[torch.float64]
    assert "implicit GEMM" in explain[torch.float16]


def test_tables_keep_cuda_tiles(tmp_path, monkeypatch):
    """A choice of the CUDA kernel goes to disk and back; a tile there is none of is ignored."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    problem = problem_of(case_of(KINDS["3x3"][1], dtype=torch.float16))
    tile = cuda_tiles.candidates(problem, H100)[0]
    path = table.user_path(H100.name)
    for wanted, kernel in ((tile, "cuda"), (dataclasses.replace(tile, block_m=48), None)):
        entry = table.Entry("cuda", wanted, 12.5)
        table.merge(path, H100.name, {problem: entry})
        assert table.read(path) == {problem: entry}
        fused_resnet.tuning.reload()
        choice = fused_resnet.tuning._from_tables(problem, H100)
        assert (choice and choice.kernel) == kernel
    fused_resnet.tuning.reload()


def test_the_tuner_may_choose_it():
    """Candidates on a GPU, that run and are right."""
    problem = problem_of(case_of(KINDS["3x3"][1], dtype=torch.float16))
    choices = tuner.candidates(problem, H100, torch.device("cuda"))
    ours = [choice for choice in choices if choice.kernel == "cuda"]
    hopper = cuda_tiles.hopper_candidates(problem, H100)
    assert [choice.tile for choice in ours[-len(hopper) :]] == hopper
    assert 1 <= len(ours) - len(hopper) <= tuner._MOST_CUDA_TILES
    assert ours[0].tile == cuda_tiles.candidates(problem, H100)[0]
    case = cases.make_case(problem, torch.device(RUNNER.device))
    for choice in ours[:2]:
        assert cases.check(tuner.run_of(choice), case) is None


@pytest.mark.skipif(not ON_HOST, reason="for the kernels on the host")
def test_the_triton_backend_runs_the_tuners_choice(monkeypatch):
    if backends.available()["triton"] != "yes":
        pytest.skip(backends.available()["triton"])
    case = case_of(KINDS["3x3"][1], dtype=torch.float16)
    tile = cuda_tiles.candidates(problem_of(case), H100)[0]
    backends.triton.launchers()
    monkeypatch.setattr(backends.triton.problem, "choose", lambda *_: Choice("cuda", tile, "test"))
    with fused_resnet.use_backend("triton"):
        assert_same_bits(case.fused(), run(case, tile))
