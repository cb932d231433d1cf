"""The convolution for Hopper (csrc/cuda/hopper): every instance on every kind of problem.

On the host without a GPU, on one of compute capability 9.0 where there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from support import ConvShape, cuda_on_host, dtype_id, make_conv_case
from support.exact_convolutions import Problem, assert_exact, small_integers

from fused_resnet import _native, backends, tuning
from fused_resnet.layers.description import ConvNorm, Norm
from fused_resnet.measure.tune import tuner
from fused_resnet.testing import assert_error_rule
from fused_resnet.tuning import architecture, cuda_tiles
from fused_resnet.tuning.problem import ConvProblem

ON_HOST = backends.cuda.on_host()
if backends.cuda.available() != "yes":
    pytest.skip(f"cuda: {backends.cuda.available()}", allow_module_level=True)
if not ON_HOST and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("not of compute capability 9.0", allow_module_level=True)

operators = _native.cuda_operators
DEVICE = "cpu" if ON_HOST else "cuda"
M, DEPTH = 128, 64


@dataclass(frozen=True)
class Instance:
    """A row of csrc/cuda/hopper/tiles.h."""

    index: int
    n: int
    stages: int
    cluster: int
    takes_turns: int

    def __str__(self):
        return f"{self.n}x{self.stages}stages-cluster{self.cluster}" + "-turns" * self.takes_turns


def instances():
    numbers = operators.hopper_conv_tiles()
    return [Instance(i // 4, *numbers[i : i + 4]) for i in range(0, len(numbers), 4)]


def problems(tile):
    """Sizes beside every border of the tile: channels, filters, pixels, taps, steps and stages."""
    yield Problem("one step", ConvShape(DEPTH, tile.n, (1, 1)), (7, 9), 1)
    yield Problem("few", ConvShape(8, 8, (1, 1)), (3, 1), 1)
    window = ConvShape(DEPTH + 8, tile.n // 2 + 8, (3, 2), (2, 1), (1, 2), (1, 2))
    yield Problem("window", window, (11, 8), 3)
    same = ConvShape(DEPTH, DEPTH, (3, 3), (1, 1), (1, 1))
    yield Problem("3x3", same, (6, 7), 4)
    strided = ConvShape(DEPTH, tile.n + 8, (3, 3), (2, 2), (1, 1))
    yield Problem("3x3, stride 2", strided, (13, 9), 3)
    yield Problem("1x1, stride 2", ConvShape(2 * DEPTH, 72, (1, 1), (2, 2)), (9, 11), 3)
    dilated = ConvShape(24, 40, (3, 3), (1, 1), (2, 3), (2, 3))
    yield Problem("dilated", dilated, (7, 9), 2)
    beyond = DEPTH * (2 * tile.stages + 1)  # round the ring twice
    yield Problem("deep", ConvShape(beyond, 16, (1, 1)), (3, 5), 1)
    # More tiles than the blocks take at first, and less depth than the ring has stages.
    yield Problem("many tiles", ConvShape(16, 2 * tile.n, (1, 1)), (M, 5), 1)
    yield Problem("many tiles, two steps", ConvShape(16, 3 * tile.n - 8, (1, 2)), (M, 4), 1)
    yield Problem("whole tiles", ConvShape(DEPTH, tile.n, (1, 1)), (16, 16), 2)
    yield Problem("far steps", ConvShape(16, 16, (2, 1), (8, 7), (2, 1)), (20, 18), 2)


def half_integers(problem, **options):
    return small_integers(problem, torch.float16, **options)


def run(tile, case):
    """The operator, on copies of its tensors that end where accesses must."""
    with cuda_on_host.guarded() if ON_HOST else contextlib.nullcontext():
        placed = case.map(lambda t: t.to(DEVICE) if DEVICE != "cpu" else t.clone())
        out = operators.hopper_conv_bn_act(
            placed.input, placed.weight, placed.running_mean, placed.running_var, placed.bn_weight,
            placed.bn_bias, placed.eps, placed.bias, *case.stride, *case.padding, *case.dilation,
            placed.residual, case.activation == "relu", tile.index,
        )  # fmt: skip
    return out.cpu()


def set_seed(seed):
    if ON_HOST:
        cuda_on_host.load().set_seed(seed)


@pytest.fixture(autouse=True)
def first_seed():
    yield
    set_seed(0)


def cases():
    for tile in instances():
        for problem in problems(tile):
            yield pytest.param(tile, problem, id=f"{tile}-{problem.name}".replace(" ", "_"))


@pytest.mark.parametrize(("tile", "problem"), list(cases()))
def test_exact(tile, problem):
    full = half_integers(problem, bias=True)
    bare = half_integers(problem, residual=False, affine=False, activation="none")
    for seed, case in enumerate((full, bare, full)):
        set_seed(seed)
        assert_exact(run(tile, case), case, f"{'everything' if case is full else 'bare'}, {seed}")


@pytest.mark.parametrize("tile", instances(), ids=str)
def test_exact_in_bfloat16(tile):
    problem = list(problems(tile))[2]
    case = small_integers(problem, torch.bfloat16, bias=True)
    assert_exact(run(tile, case), case)


# Of ResNet-50's kinds: 1x1 that widens, narrows and skips pixels, 3x3 with and without a step.
CLASSES = {
    "reduce": ConvShape(256, 64, (1, 1)),
    "expand": ConvShape(64, 256, (1, 1)),
    "3x3": ConvShape(64, 64, (3, 3), (1, 1), (1, 1)),
    "3x3, stride 2": ConvShape(128, 128, (3, 3), (2, 2), (1, 1)),
    "projection": ConvShape(256, 512, (1, 1), (2, 2)),
    "deep": ConvShape(512, 2048, (1, 1)),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("kind", CLASSES)
def test_error_rule(kind, dtype):
    """Against float64, at most 1.5 times eager's error, in every instance."""
    shape = CLASSES[kind]
    size = (8, 8) if shape.out_channels < 1024 else (4, 4)
    case = make_conv_case(shape, batch=1, size=size, dtype=dtype)
    expected, eager = case.double().eager(), case.eager()
    for seed, tile in enumerate(instances()):
        set_seed(seed)
        assert_error_rule(run(tile, case), eager, expected, what=str(tile))


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("tile", instances(), ids=str)
def test_nonfinite_values(tile, number):
    """Infinities and NaNs reach the outputs that they are summed into, and no others."""
    problem = list(problems(tile))[number]
    case = half_integers(problem, activation="none")
    case.input[0, 1, 2, 3] = math.nan
    case.input[1, -1, -1, -2] = math.inf
    case.input[1, 0, 0, 0] = -math.inf
    case.residual[0, -1, 1, 1] = math.nan
    case.residual[1, 0, -1, -1] = math.inf
    case.running_mean[2] = math.nan
    for activation in ("none", "relu"):
        case.activation = activation
        assert_exact(run(tile, case), case, activation)


@pytest.mark.parametrize("tile", instances()[:3], ids=str)
def test_parameters_of_any_dtype(tile):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        case = half_integers(list(problems(tile))[3], bias=True)
        for name in ("running_mean", "running_var", "bn_weight", "bn_bias", "bias"):
            setattr(case, name, getattr(case, name).to(dtype))
        assert_exact(run(tile, case), case, dtype)


def test_options_alone():
    """Every optional tensor without the others."""
    tile = instances()[0]
    every = half_integers(list(problems(tile))[2], bias=True)
    optional = {"bn_weight", "bn_bias", "bias", "residual"}
    for kept in optional:
        case = dataclasses.replace(every, **dict.fromkeys(optional - {kept}))
        assert_exact(run(tile, case), case, f"only {kept}")


def test_layouts():
    """Tensors that do not lie densely channels_last are copied."""
    tile = instances()[0]
    case = half_integers(list(problems(tile))[2])
    for name in ("input", "weight", "residual"):
        tensor = getattr(case, name)
        wide = tensor.new_full([2 * size for size in tensor.shape], math.nan)
        strided = wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)
        for changed in (tensor.contiguous(), strided):
            assert_exact(run(tile, dataclasses.replace(case, **{name: changed})), case, name)


def test_no_images():
    case = half_integers(Problem("", ConvShape(16, 16, (1, 1)), (3, 3), 1))
    empty = dataclasses.replace(case, input=case.input[:0], residual=case.residual[:0])
    assert run(instances()[0], empty).shape == (0, 16, 3, 3)


def conv_problem(shape, batch, size, dtype="float16"):
    r, s = shape.kernel_size
    return ConvProblem(
        batch, shape.in_channels, *size, shape.out_channels, r, s, shape.stride, shape.padding,
        shape.dilation, shape.groups, dtype, True,
    )  # fmt: skip


def test_tune_races_them_and_nobody_else_has_them():
    """On a GPU of compute capability 9.0, for what they can run."""
    gpu = architecture.of_device(torch.device(DEVICE))
    hopper = dataclasses.replace(gpu, capability=(9, 0))
    problem = conv_problem(ConvShape(64, 256, (3, 3), (1, 1), (1, 1)), 8, (28, 28))
    tiles = cuda_tiles.hopper_candidates(problem, hopper)
    assert sorted(map(str, tiles)) == sorted(map(str, cuda_tiles.hopper_instances()))
    assert len(set(map(str, tiles))) == len(instances())
    assert all(map(cuda_tiles.is_hopper, tiles))
    assert not any(map(cuda_tiles.is_hopper, cuda_tiles.candidates(problem, hopper)))
    raced = tuner.candidates(problem, hopper, torch.device("cuda"))
    assert {choice.tile for choice in raced if choice.kernel == "cuda"} > set(tiles)
    assert not cuda_tiles.is_hopper(tuning.untuned(problem, hopper).tile)
    ampere = dataclasses.replace(gpu, capability=(8, 0))
    assert not cuda_tiles.hopper_candidates(problem, ampere)
    for changes in (
        {"C": 12}, {"K": 12}, {"K": 2056}, {"groups": 2}, {"dtype": "tfloat32"},
        {"stride": (9, 1)}, {"padding": (1, 128)}, {"dilation": (1, 128)}, {"dilation": (66, 1)},
    ):  # fmt: skip
        other = dataclasses.replace(problem, **changes)
        assert not cuda_tiles.hopper_candidates(other, hopper), changes


@pytest.mark.parametrize("residual", ["whole", "narrow", "none"])
def test_the_backend_runs_a_tile_of_them(residual):
    """And what has a residual of fewer channels as today's kernel does."""
    case = half_integers(list(problems(instances()[0]))[3])
    case.activation = "none"
    shortcut = {"whole": case.residual, "narrow": case.residual[:, :32], "none": None}[residual]
    norm = Norm(case.running_mean, case.running_var, case.bn_weight, case.bn_bias, case.eps)
    layer = ConvNorm(
        case.weight, norm, case.bias, case.stride, case.padding, case.dilation, case.groups
    )
    placed = (t if t is None else t.to(DEVICE) for t in (case.input, shortcut))
    tile = next(iter(cuda_tiles.hopper_instances()))
    image, shortcut = placed
    out = backends.cuda.conv_bn_act(image, layer, shortcut, "none", tile)
    wide = None if residual == "none" else case.residual.clone()
    if residual == "narrow":
        wide[:, :16], wide[:, 16:48], wide[:, 48:] = 0, case.residual[:, :32], 0
    assert_exact(out.cpu(), dataclasses.replace(case, residual=wide), residual)


REFUSED = [
    (ConvShape(12, 16, (1, 1)), "has 12 channels and 16 filters, must have multiples of 8"),
    (ConvShape(16, 12, (1, 1)), "has 16 channels and 12 filters, must have multiples of 8"),
    (ConvShape(8, 2056, (1, 1)), "at most 2048 filters"),
    (
        ConvShape(8, 8, (1, 1), (9, 1)),
        "h has 1 taps, stride 9, padding 0 and dilation 1",
    ),
    (ConvShape(8, 8, (1, 3), (1, 1), (0, 200), (1, 128)), "w has 3 taps, stride 1, padding 200"),
]


@pytest.mark.parametrize(("shape", "said"), REFUSED)
def test_what_it_refuses(shape, said):
    case = make_conv_case(shape, batch=1, size=(9, 9), dtype=torch.float16)
    with pytest.raises(ValueError, match=said):
        run(instances()[0], case)


def test_it_refuses_other_tensors():
    tile = instances()[0]
    case = half_integers(list(problems(tile))[3])
    for changes, said in [
        ({"input": case.input.float(), "weight": case.weight.float()}, "input is float32"),
        ({"residual": case.residual[:, :8]}, "residual has shape .*, must have the output's"),
        ({"residual": case.residual.bfloat16()}, "residual"),
        ({"weight": case.weight[:, :8]}, "weight has shape"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(tile, dataclasses.replace(case, **changes))
    with pytest.raises(ValueError, match="tile"):
        run(dataclasses.replace(tile, index=99), case)
