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
from support import (
    OTHER_ACTIVATIONS,
    ConvShape,
    assert_same_nonfinite,
    cuda_on_host,
    dtype_id,
    make_conv_case,
)
from support.exact_convolutions import (
    Problem,
    assert_exact,
    assert_rounded_once,
    small_integers,
)
from support.selection import one_of_each

from fused_resnet import _native, backends, tuning
from fused_resnet.backends import library
from fused_resnet.layers.activation import numbers_of
from fused_resnet.layers.description import ConvNorm, Norm
from fused_resnet.measure.tune import tuner
from fused_resnet.testing import FACTOR, assert_error_rule, relative_error
from fused_resnet.tuning import architecture, cuda_tiles
from fused_resnet.tuning.problem import ConvProblem

ON_HOST = backends.cuda.on_host()
if backends.cuda.available() != "yes":
    pytest.skip(f"cuda: {backends.cuda.available()}", allow_module_level=True)
if not ON_HOST and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("not of compute capability 9.0", allow_module_level=True)

operators = _native.cuda_operators
DEVICE = "cpu" if ON_HOST else "cuda"
M = 128


@dataclass(frozen=True)
class Instance:
    """A row of csrc/cuda/hopper/tiles.h."""

    index: int
    size: int
    n: int
    stages: int
    cluster: int
    takes_turns: int

    def __str__(self):
        name = f"{self.n}x{self.stages}stages-cluster{self.cluster}" + "-turns" * self.takes_turns
        return f"tf32-{name}" if self.size == 4 else name

    @property
    def dtype(self):
        return torch.float32 if self.size == 4 else torch.float16

    @property
    def depth(self):
        """Channels of a step."""
        return 128 // self.size

    @property
    def least(self):
        """Channels and filters come in multiples of these."""
        return 16 // self.size


def every_instance():
    numbers = operators.hopper_conv_tiles()
    return [Instance(i // 6, *numbers[i : i + 5]) for i in range(0, len(numbers), 6)]


def instances(size=2):
    return [tile for tile in every_instance() if tile.size == size]


def problems(tile):
    """Sizes beside every border of the tile: channels, filters, pixels, taps, steps and stages."""
    depth, least = tile.depth, tile.least
    yield Problem("one step", ConvShape(depth, tile.n, (1, 1)), (7, 9), 1)
    yield Problem("few", ConvShape(least, least, (1, 1)), (3, 1), 1)
    window = ConvShape(depth + least, tile.n // 2 + least, (3, 2), (2, 1), (1, 2), (1, 2))
    yield Problem("window", window, (11, 8), 3)
    same = ConvShape(depth, 64, (3, 3), (1, 1), (1, 1))
    yield Problem("3x3", same, (6, 7), 4)
    strided = ConvShape(depth, tile.n + least, (3, 3), (2, 2), (1, 1))
    yield Problem("3x3, stride 2", strided, (13, 9), 3)
    yield Problem("1x1, stride 2", ConvShape(2 * depth, 72, (1, 1), (2, 2)), (9, 11), 3)
    dilated = ConvShape(24, 40, (3, 3), (1, 1), (2, 3), (2, 3))
    yield Problem("dilated", dilated, (7, 9), 2)
    beyond = depth * (2 * tile.stages + 1)  # round the ring twice
    yield Problem("deep", ConvShape(beyond, 16, (1, 1)), (3, 5), 1)
    # More tiles than the blocks take at first, and less depth than the ring has stages.
    yield Problem("many tiles", ConvShape(16, 2 * tile.n, (1, 1)), (M, 5), 1)
    yield Problem("many tiles, two steps", ConvShape(16, 3 * tile.n - least, (1, 2)), (M, 4), 1)
    yield Problem("whole tiles", ConvShape(depth, tile.n, (1, 1)), (16, 16), 2)
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
            placed.residual, *numbers_of(case.activation), tile.index,
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
    """Without `--whole` every tile on some problem, and every problem in 16 bits and in 32."""
    return one_of_each(
        [
            pytest.param(tile, problem, id=f"{tile}-{problem.name}".replace(" ", "_"))
            for tile in every_instance()
            for problem in problems(tile)
        ],
        lambda tile, problem: tile,
        lambda tile, problem: (tile.size, problem.name),
    )


@pytest.mark.parametrize(("tile", "problem"), cases())
def test_exact(tile, problem):
    full = small_integers(problem, tile.dtype, bias=True)
    bare = small_integers(problem, tile.dtype, residual=False, affine=False, activation="none")
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
@pytest.mark.single
def test_error_rule(kind, dtype):
    """Against float64, at most 1.5 times eager's error, in every instance."""
    shape = CLASSES[kind]
    size = (8, 8) if shape.out_channels < 1024 else (4, 4)
    case = make_conv_case(shape, batch=1, size=size, dtype=dtype)
    expected, eager = case.double().eager(), case.eager()
    for seed, tile in enumerate(instances()):
        set_seed(seed)
        assert_error_rule(run(tile, case), eager, expected, what=str(tile))


def rounded(case, unit):
    """The case with the operands of its products as tf32: to nearest, or cut off."""

    def as_tf32(x):
        bits = x.contiguous().view(torch.int32)
        return ((bits + unit + (bits >> 13 & 1) * (unit > 0)) & ~0x1FFF).view(torch.float32)

    return dataclasses.replace(case, input=as_tf32(case.input), weight=as_tf32(case.weight))


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.single
def test_error_rule_in_tf32(kind):
    """At most 1.5 times the error that rounding the operands makes, as torch's TF32 rounds them.

    Against what was rounded the error is a sum's in float32, but for what tensor cores cut off,
    once for each four products. Operands that are cut off in place of rounded would be over both.
    """
    shape = CLASSES[kind]
    size = (8, 8) if shape.out_channels < 1024 else (4, 4)
    case = make_conv_case(shape, batch=1, size=size, dtype=torch.float32)
    near, cut = rounded(case, 0xFFF), rounded(case, 0)
    expected, of_near = case.double().eager(), near.double().eager()
    limit = FACTOR * relative_error(near.eager(), expected)
    steps = -(-case.weight[0].numel() // 4)
    near_limit = max(FACTOR * relative_error(near.eager(), of_near), (4 + steps) * 2.0**-24)
    for seed, tile in enumerate(instances(4)):
        set_seed(seed)
        out = run(tile, case)
        assert out.dtype == torch.float32
        assert relative_error(out, expected) <= limit, str(tile)
        assert relative_error(out, of_near) <= near_limit, str(tile)
    assert relative_error(cut.eager(), of_near) > 2 * near_limit
    assert relative_error(cut.eager(), expected) > limit


@pytest.mark.parametrize("number", [2, 3])
@pytest.mark.parametrize("tile", every_instance(), ids=str)
def test_nonfinite_values(tile, number):
    """Infinities and NaNs reach the outputs that they are summed into, and no others."""
    problem = list(problems(tile))[number]
    case = small_integers(problem, tile.dtype, activation="none")
    case.input[0, 1, 2, 3] = math.nan
    case.input[1, -1, -1, -2] = math.inf
    case.input[1, 0, 0, 0] = -math.inf
    case.residual[0, -1, 1, 1] = math.nan
    case.residual[1, 0, -1, -1] = math.inf
    case.running_mean[2] = math.nan
    for activation in ("none", "relu"):
        case.activation = activation
        assert_exact(run(tile, case), case, activation)


def activated_cases():
    """Every tile with every activation besides ReLU."""
    return one_of_each(
        [
            pytest.param(tile, activation, id=f"{tile}-{activation}".replace(" ", "_"))
            for tile in every_instance()
            for activation in OTHER_ACTIVATIONS
        ],
        lambda tile, activation: tile,
        lambda tile, activation: (tile.size, activation),
    )


@pytest.mark.parametrize(("tile", "activation"), activated_cases())
def test_other_activations(tile, activation):
    """Behind the residual and without one, in tiles that are full and that are not.

    Sums are exact, so that the error is the epilogue's alone.
    """
    full = list(problems(tile))[0 if tile.n < 256 else 3]
    for seed, problem in enumerate((full, list(problems(tile))[2])):
        set_seed(seed)
        case = small_integers(problem, tile.dtype, bias=True, activation=activation)
        for residual in (case.residual, None):
            each = dataclasses.replace(case, residual=residual)
            assert_rounded_once(run(tile, each), each)


@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=dtype_id)
def test_nonfinite_values_and_other_activations(dtype, activation):
    """NaN and infinities are what eager makes of them: NaN where it multiplies one by zero."""
    tile = instances(dtype.itemsize)[-1]
    case = small_integers(list(problems(tile))[2], dtype, activation=activation)
    for n, value in enumerate((math.nan, math.inf, -math.inf)):
        case.residual[n, 1, 2, 1] = value
    assert_same_nonfinite(run(tile, case), case.double().eager(), case.eager())


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


@pytest.mark.skipif(not ON_HOST, reason="counts what the host's driver is asked for")
def test_maps_are_encoded_once():
    """Of the same tensors; and again of what differs in any way that a map knows of."""
    outputs = []
    try:
        check_encoded_maps(outputs)
    except AssertionError:
        # Other tests' maps may have made these too many, which does not happen twice in a row.
        check_encoded_maps(outputs)


def check_encoded_maps(outputs):
    shape = ConvShape(16, 16, (3, 3), (1, 1), (1, 1))
    case = half_integers(Problem("", shape, (6, 8), 2), bias=True)
    case = case.map(
        lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
    )

    tile = instances()[0]

    def encoded(tile=tile, **changes):
        """How many maps one more call makes, but for that of its output, which lies elsewhere."""
        changed = dataclasses.replace(case, activation="relu", **changes)
        before = cuda_on_host.load().encoded_maps()
        out = operators.hopper_conv_bn_act(
            changed.input, changed.weight, changed.running_mean, changed.running_var,
            changed.bn_weight, changed.bn_bias, changed.eps, changed.bias, *changed.stride,
            *changed.padding, *changed.dilation, changed.residual, *numbers_of("relu"),
            tile.index,
        )  # fmt: skip
        assert_exact(out, changed)
        outputs.append(out)
        return cuda_on_host.load().encoded_maps() - before - 1

    assert encoded() == 3
    assert encoded() == 0
    # Other values at the same addresses.
    case.weight.neg_()
    case.input.add_(1)
    assert encoded() == 0
    assert encoded(input=case.input.clone()) == 1
    # Windows in other places.
    assert encoded(dilation=(2, 2), padding=(2, 2)) == 1
    # The same pixels in rows of another length: the residual is rows of pixels all the same.
    turned = {
        name: getattr(case, name).permute(0, 2, 3, 1).reshape(2, 8, 6, 16).permute(0, 3, 1, 2)
        for name in ("input", "residual")
    }
    assert encoded(**turned) == 1
    # A tile of other boxes: of rows of pixels, and maybe of filters.
    other = next(one for one in instances() if one.takes_turns != tile.takes_turns)
    assert encoded(other) == 1 + (other.n // other.cluster != tile.n // tile.cluster)
    assert encoded() == 0


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
    in_tf32 = dataclasses.replace(problem, dtype="tfloat32", C=60)
    others = cuda_tiles.hopper_candidates(in_tf32, hopper)
    assert sorted(map(str, tiles + others)) == sorted(map(str, cuda_tiles.hopper_instances()))
    assert len(set(map(str, tiles))) == len(instances())
    assert len(set(map(str, others))) == len(instances(4))
    raced = tuner.candidates(in_tf32, hopper, torch.device("cuda"))
    assert {choice.tile for choice in raced if choice.kernel == "cuda"} > set(others)
    assert not cuda_tiles.is_hopper(tuning.untuned(in_tf32, hopper).tile)
    assert not cuda_tiles.hopper_candidates(dataclasses.replace(in_tf32, C=62), hopper)
    assert all(map(cuda_tiles.is_hopper, tiles))
    assert not any(map(cuda_tiles.is_hopper, cuda_tiles.candidates(problem, hopper)))
    raced = tuner.candidates(problem, hopper, torch.device("cuda"))
    assert {choice.tile for choice in raced if choice.kernel == "cuda"} > set(tiles)
    assert not cuda_tiles.is_hopper(tuning.untuned(problem, hopper).tile)
    ampere = dataclasses.replace(gpu, capability=(8, 0))
    assert not cuda_tiles.hopper_candidates(problem, ampere)
    for changes in (
        {"C": 12}, {"K": 12}, {"K": 2056}, {"groups": 2}, {"dtype": "float32"},
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


def test_the_backend_multiplies_in_tf32_only_where_torch_does(monkeypatch):
    case = small_integers(list(problems(instances(4)[0]))[3], torch.float32)
    norm = Norm(case.running_mean, case.running_var, case.bn_weight, case.bn_bias, case.eps)
    layer = ConvNorm(
        case.weight, norm, case.bias, case.stride, case.padding, case.dilation, case.groups
    )
    layer = layer._replace(weight=case.weight.to(DEVICE))
    tile = next(
        t for t, index in cuda_tiles.hopper_instances().items() if index == instances(4)[0].index
    )
    call = (case.input.to(DEVICE), layer, case.residual.to(DEVICE), case.activation, tile)
    monkeypatch.setattr(library, "precision", lambda input: "tf32")
    assert_exact(backends.cuda.conv_bn_act(*call).cpu(), case)
    monkeypatch.setattr(library, "precision", lambda input: "ieee")
    with pytest.raises(ValueError, match="tf32"):
        backends.cuda.conv_bn_act(*call)


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
        (
            {"input": case.input.float(), "weight": case.weight.float()},
            "tile 0 is of 2 bytes an element, input is float32",
        ),
        ({"input": case.input.double(), "weight": case.weight.double()}, "input is float64"),
        ({"residual": case.residual[:, :8]}, "residual has shape .*, must have the output's"),
        ({"residual": case.residual.bfloat16()}, "residual"),
        ({"weight": case.weight[:, :8]}, "weight has shape"),
    ]:
        with pytest.raises(ValueError, match=said):
            run(tile, dataclasses.replace(case, **changes))
    with pytest.raises(ValueError, match="tile"):
        run(dataclasses.replace(tile, index=99), case)
