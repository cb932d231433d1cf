"""The CUDA convolution's instances, bit by bit, on every kind of problem they can be given.

Inputs are small integers and the scales powers of two, so every sum is exact in every dtype and the
result has to be the exact one rounded once: one element out of place, or counted twice, shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from support import OTHER_ACTIVATIONS, ConvShape, dtype_id
from support.exact_convolutions import (
    Problem,
    assert_exact,
    assert_rounded_once,
    small_integers,
)
from support.selection import one_of_each

from fused_resnet import _native, backends, reference
from fused_resnet.layers.activation import numbers_of

ON_HOST = backends.cuda.on_host()
if backends.cuda.available() != "yes":
    pytest.skip(f"cuda: {backends.cuda.available()}", allow_module_level=True)
if ON_HOST:
    from support import cuda_on_host

operators = _native.cuda_operators
DEVICE = "cpu" if ON_HOST else "cuda"
VECTORS, ELEMENTS, DIAGONAL = range(3)
TF32, IEEE = 1, 2


@dataclass(frozen=True)
class Instance:
    """A row of csrc/cuda/conv_tiles.h, for one dtype."""

    index: int
    dtype: torch.dtype
    products: int
    loads: int
    m: int
    n: int
    depth: int
    warps: int
    stages: int

    def __str__(self):
        loads = ("vectors", "elements", "diagonal")[self.loads]
        name = "tfloat32" if self.products == TF32 else dtype_id(self.dtype)
        return f"{name}-{loads}-{self.m}x{self.n}x{self.depth}-{self.warps}warps"

    @property
    def chunk(self):
        """Elements in 16 bytes."""
        return 16 // self.dtype.itemsize


def instances():
    """Of every dtype that an instance computes."""
    return list(_instances())


def _instances():
    numbers = operators.conv_tiles()
    for index, at in enumerate(range(0, len(numbers), 7)):
        row = numbers[at : at + 7]
        for dtype in [torch.float32] if row[0] else [torch.float16, torch.bfloat16]:
            yield Instance(index, dtype, *row)


def kinds():
    """Every instance; without `--whole` the first for each dtype and way to load."""
    return one_of_each(instances(), lambda tile: (tile.dtype, tile.products, tile.loads))


def first_of_each_kind():
    return [one.values[0] for one in kinds() if not one.marks]


def problems(tile):
    """Sizes beside every border of the tile: channels, filters, pixels, taps, steps and stages."""
    chunk, depth, n = tile.chunk, tile.depth, tile.n
    beyond = depth * (2 * tile.stages + 1)  # round the ring twice

    if tile.loads == DIAGONAL:
        channels = n + 16
        for width in (1, 2, 4, 8, 16):
            wide = ConvShape(channels, channels, (3, 3), (1, 1), (1, 1), (1, 1), channels // width)
            few = 16 if width < 16 else 32
            narrow = ConvShape(few, few, (2, 3), (2, 1), (1, 2), (1, 2), few // width)
            yield Problem(f"groups of {width}", wide, (9, 8))
            yield Problem(f"groups of {width}, less than a slab", narrow, (8, 9), 3)
        yield Problem("groups of 4, one tap", ConvShape(16, 16, (1, 1), groups=4), (3, 5))
        yield Problem("groups of 8, many taps", ConvShape(32, 32, (5, 3), groups=4), (9, 8))
        tall = ConvShape(16, 16, (3, 1), (1, 1), (2, 0), (2, 1), 4)
        yield Problem("dilated rows", tall, (7, 3))
        return

    if tile.loads == ELEMENTS:
        yield Problem("stem", ConvShape(3, n + 5, (7, 7), (2, 2), (3, 3)), (19, 17))
        odd = ConvShape(13, 29, (3, 2), (2, 1), (0, 1), (1, 2))
        yield Problem("odd channels", odd, (9, 7))
        grouped = ConvShape(10, 14, (3, 3), (1, 1), (1, 1), (1, 1), 2)
        yield Problem("odd groups", grouped, (7, 9))
        yield Problem("deep", ConvShape(beyond + 3, chunk, (1, 1)), (3, 5))
        yield Problem("aligned", ConvShape(2 * chunk, n + chunk, (1, 1)), (5, 7))
        tall = ConvShape(3, 5, (3, 1), (1, 1), (2, 0), (2, 1))
        yield Problem("dilated rows", tall, (7, 3))
        return

    yield Problem("one step", ConvShape(3 * chunk, n + chunk, (1, 1)), (7, 9), 3)
    window = ConvShape(depth + chunk, n // 2 + chunk, (3, 2), (2, 1), (1, 2), (1, 2))
    yield Problem("window", window, (11, 8))
    few = ConvShape(chunk, chunk, (5, 3), (1, 2), (2, 1))
    yield Problem("several taps in a step", few, (6, 11))
    groups = ConvShape(6 * chunk, 3 * n + 3 * chunk, (3, 3), (1, 1), (1, 1), (1, 1), 3)
    yield Problem("groups", groups, (5, 6))
    yield Problem("odd filters", ConvShape(2 * chunk, 13, (3, 3), (2, 2), (1, 1)), (9, 12), 3)
    odd_groups = ConvShape(2 * chunk, 10, (1, 3), (1, 1), (0, 1), (1, 1), 2)
    yield Problem("odd filters in groups", odd_groups, (4, 5))
    yield Problem("deep", ConvShape(beyond, chunk, (1, 1)), (3, 5))
    yield Problem("whole tiles", ConvShape(chunk, 2 * n, (1, 1)), (11, 13))  # in both directions
    tall = ConvShape(chunk, chunk, (3, 1), (1, 1), (2, 0), (2, 1))
    yield Problem("dilated rows", tall, (7, 3))


def cases():
    """Without `--whole` every tile on some problem, and every problem of each way to load."""
    return one_of_each(
        [
            pytest.param(tile, problem, id=f"{tile}-{problem.name}".replace(" ", "_"))
            for tile in instances()
            for problem in problems(tile)
        ],
        lambda tile, problem: tile,
        lambda tile, problem: (tile.loads, problem.name),
    )


def run(tile, case, split=1):
    """The operator, on copies of its tensors that end where accesses must."""
    guarded = cuda_on_host.guarded() if ON_HOST else contextlib.nullcontext()
    with guarded:
        placed = case.map(lambda t: t.to(DEVICE) if DEVICE != "cpu" else copy_of(t))
        out = operators.conv_bn_act_tiled(
            placed.input, placed.weight, placed.running_mean, placed.running_var, placed.bn_weight,
            placed.bn_bias, placed.eps, placed.bias, *case.stride, *case.padding, *case.dilation,
            case.groups, placed.residual, *numbers_of(case.activation), tile.products == TF32,
            [tile.index, split],
        )  # fmt: skip
    return out.cpu()


def copy_of(tensor):
    """The same strides, over a storage that ends with the tensor."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if tensor.storage_offset() or tensor.numel() == 0 or extent != tensor.numel():
        return tensor
    return torch.empty_like(tensor).copy_(tensor)


def set_seed(seed):
    if ON_HOST:
        cuda_on_host.load().set_seed(seed)


@pytest.fixture(autouse=True)
def first_seed():
    yield
    set_seed(0)


@pytest.mark.parametrize(("tile", "problem"), cases())
def test_exact(tile, problem):
    full = small_integers(problem, tile.dtype, bias=True)
    bare = small_integers(problem, tile.dtype, residual=False, affine=False, activation="none")
    for seed, (case, split) in enumerate([(full, 1), (bare, 1), (full, 3), (bare, 2)]):
        set_seed(seed)
        options = "everything" if case is full else "no options"
        assert_exact(run(tile, case, split), case, f"{options}, split {split}, seed {seed}")


@pytest.mark.parametrize("activation", OTHER_ACTIVATIONS)
@pytest.mark.parametrize("tile", kinds(), ids=str)
def test_other_activations_are_rounded_once(tile, activation):
    for problem, split in zip(list(problems(tile))[1:3], (1, 3), strict=True):
        case = small_integers(problem, tile.dtype, activation=activation)
        assert_rounded_once(run(tile, case, split), case)
        bare = dataclasses.replace(case, residual=None)
        assert_rounded_once(run(tile, bare, split), bare)


@pytest.mark.parametrize("number", [0, 1, 3])
@pytest.mark.parametrize("tile", kinds(), ids=str)
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

    # Without padding, since whether a zero beside an image meets an infinite weight is not defined.
    case = small_integers(problem, tile.dtype)
    case.padding = (0, 0)
    case.weight[1, 0, 0, 0] = math.nan
    case.weight[-1, -1, -1, -1] = math.inf
    case.residual = None
    assert_exact(run(tile, case), case, "weights")


def narrow_residual(full, channels, layout):
    """The middle channels of a residual, in a storage that ends with them, other values around."""
    N, K, P, Q = full.shape
    values = full.narrow(1, (K - channels) // 2, channels)
    if layout == "subsampled":  # every second pixel of a shortcut
        wide = torch.full((N, 2 * P, 2 * Q, channels), math.nan, dtype=full.dtype)
        part = wide[:, 1::2, 1::2]
    elif layout == "gaps":
        part = torch.full((N, P, Q, channels + 3), math.nan, dtype=full.dtype)[..., 3:]
    elif layout == "reversed":
        part = torch.empty(Q, P, N, channels, dtype=full.dtype).permute(2, 1, 0, 3)
    else:
        part = torch.empty(N, channels, P, Q, dtype=full.dtype).permute(0, 2, 3, 1)
    return part.permute(0, 3, 1, 2).copy_(values)


def narrow_channels(K, chunk):
    """As many as accesses of each width can have, with an odd number before them, and one."""
    fewer = [2 * chunk, chunk, chunk // 2, 4, 3, 2, 1, K - 1]
    return sorted({K - n for n in fewer if n < K})


def assert_narrow_exact(tile, case, channels, layout, split=1):
    guarded = cuda_on_host.guarded() if ON_HOST else contextlib.nullcontext()
    with guarded:
        narrow = narrow_residual(case.residual, channels, layout)
    before = narrow.clone()
    out = run(tile, dataclasses.replace(case, residual=narrow), split)
    assert torch.equal(narrow.nan_to_num(), before.nan_to_num())
    padded = reference.pad_channels(narrow, case.residual.size(1))
    assert_exact(out, dataclasses.replace(case, residual=padded), f"{channels}, {layout}, {split}")


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("tile", kinds(), ids=str)
def test_narrow_residual(tile, number):
    """A residual of fewer channels is read where it lies, as if there were zeros around it."""
    layouts = ("gaps", "contiguous", "reversed")
    problem = list(problems(tile))[number]
    case = small_integers(problem, tile.dtype)
    case.activation = ("relu", "none")[number % 2]
    for seed, channels in enumerate(narrow_channels(problem.shape.out_channels, tile.chunk)):
        set_seed(seed)
        assert_narrow_exact(tile, case, channels, "subsampled", 1 + 2 * (seed % 2))
        if seed % 4 == number:
            assert_narrow_exact(tile, case, channels, layouts[(seed + number) % 3])


@pytest.mark.parametrize("tile", kinds(), ids=str)
def test_nonfinite_values_of_a_narrow_residual(tile):
    """They reach their own outputs and no others, also where outputs are summed again."""
    problem = list(problems(tile))[1]
    case = small_integers(problem, tile.dtype, activation="none")
    case.input[0, 0, 1, 2] = math.nan
    case.input[1, -1, -1, -2] = math.inf
    K = problem.shape.out_channels
    for channels in (K - 2, 3):
        begin = (K - channels) // 2
        case.residual[0, begin, 1, 1] = math.nan
        case.residual[1, begin + channels - 1, -1, -1] = math.inf
        case.residual[0, begin + 1, 0, 2] = -math.inf
        for activation in ("none", "relu"):
            case.activation = activation
            assert_narrow_exact(tile, case, channels, "subsampled")


@pytest.mark.skipif(not ON_HOST, reason="counts what the host's kernels load")
@pytest.mark.parametrize("tile", first_of_each_kind(), ids=str)
def test_widths_of_accesses_to_a_narrow_residual(tile):
    """The widest that channels, strides and address allow."""
    K, pixels, element = 4 * tile.chunk, 2 * 3 * 5, tile.dtype.itemsize
    groups = K // 8 if tile.loads == DIAGONAL else 1
    shape = ConvShape(K, K, (1, 1), groups=groups)
    case = small_integers(Problem("", shape, (3, 5)), tile.dtype)

    def loaded(residual):
        before = cuda_on_host.load().loads()
        run(tile, dataclasses.replace(case, residual=residual))
        after = cuda_on_host.load().loads()
        return Counter({size: after[size] - before[size] for size in after})

    # Without the residual itself, which is in 16 bytes where it has all channels.
    others = loaded(case.residual) - Counter({16: pixels * K // tile.chunk})
    width = tile.chunk
    while width * element >= 4:  # less is copied without asking csrc/cuda/device
        channels = K - 2 * width
        narrow = narrow_residual(case.residual, channels, "subsampled")
        expected = others + Counter({width * element: pixels * channels // width})
        assert loaded(narrow) == expected, width
        width //= 2
    for layout in ("gaps", "contiguous"):
        narrow = narrow_residual(case.residual, K - 2 * tile.chunk, layout)
        assert loaded(narrow)[16] == others[16], layout


@pytest.mark.parametrize("tile", first_of_each_kind(), ids=str)
def test_narrow_residuals_that_do_not_fit(tile):
    case = small_integers(list(problems(tile))[1], tile.dtype)
    N, K, P, Q = case.residual.shape
    for shape in ((N, K + 1, P, Q), (N, 0, P, Q), (N, K - 1, P, Q + 1), (N + 1, K - 1, P, Q)):
        residual = torch.zeros(shape, dtype=tile.dtype)
        with pytest.raises(ValueError, match="residual must have the output's shape"):
            run(tile, dataclasses.replace(case, residual=residual))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("tile", first_of_each_kind(), ids=str)
def test_parameters_of_any_dtype(tile, dtype):
    case = small_integers(list(problems(tile))[1], tile.dtype, bias=True)
    for name in ("running_mean", "running_var", "bn_weight", "bn_bias", "bias"):
        setattr(case, name, getattr(case, name).to(dtype))
    assert_exact(run(tile, case), case)


@pytest.mark.parametrize("tile", first_of_each_kind(), ids=str)
def test_options_alone(tile):
    """Every optional tensor without the others."""
    problem = list(problems(tile))[1]
    every = small_integers(problem, tile.dtype, bias=True)
    optional = {"bn_weight", "bn_bias", "bias", "residual"}
    for kept in optional:
        case = dataclasses.replace(every, **dict.fromkeys(optional - {kept}))
        assert_exact(run(tile, case), case, f"only {kept}")


def layouts(tensor):
    """The same values, contiguous, in every second element, with gaps, and off the alignment."""
    yield "contiguous", tensor.contiguous()
    wide = tensor.new_full([2 * size for size in tensor.shape], math.nan)
    part = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
    yield "strided", part.copy_(tensor)
    N, C, H, W = tensor.shape
    for name, gap in (("gaps", 16), ("misaligned gaps", 3)):
        rows = tensor.new_full((N, H + 1, W, C + gap), math.nan)
        yield name, rows[:, 1:, :, :C].permute(0, 3, 1, 2).copy_(tensor)
    flat = tensor.new_full((tensor.numel() + 1,), math.nan)[1:]
    flat = flat.view(N, H, W, C).permute(0, 3, 1, 2)
    yield "misaligned", flat.copy_(tensor)


@pytest.mark.parametrize("tile", first_of_each_kind(), ids=str)
def test_layouts(tile):
    case = small_integers(list(problems(tile))[1], tile.dtype)
    for name in ("input", "weight", "residual"):
        for layout, tensor in layouts(getattr(case, name)):
            changed = dataclasses.replace(case, **{name: tensor})
            assert_exact(run(tile, changed), changed, f"{layout} {name}")
