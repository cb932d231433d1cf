"""The Bottleneck chain for Hopper (csrc/cuda/hopper): every instance on every kind of problem.

On the host without a GPU, on one of compute capability 9.0 where there is one.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support import assert_same_bits, cuda_on_host, dtype_id, unchanged
from support.selection import one_of_each
from torch import Tensor
from torchvision.models.resnet import Bottleneck

import fused_resnet
from fused_resnet import _native, backends, tuning
from fused_resnet.backends import hopper_chains
from fused_resnet.measure.tune import cases as tuned
from fused_resnet.measure.tune import tuner
from fused_resnet.modules.network import stages_forward
from fused_resnet.testing import assert_error_rule, randomize_
from fused_resnet.tuning import ChainProblem, architecture, chain, cuda_tiles, table
from fused_resnet.tuning.choice import HOPPER_CHAIN, HOPPER_CHAIN_WITHOUT_NEXT

ON_HOST = backends.cuda.on_host()
if backends.cuda.available() != "yes":
    pytest.skip(f"cuda: {backends.cuda.available()}", allow_module_level=True)
if not ON_HOST and torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("not of compute capability 9.0", allow_module_level=True)

operators = _native.cuda_operators
DEVICE = "cpu" if ON_HOST else "cuda"
DTYPES = [torch.float16, torch.bfloat16]
LAST = torch.channels_last
M = 128


@dataclass(frozen=True)
class Instance:
    """A row of csrc/cuda/hopper/bottleneck_tiles.h."""

    index: int
    width: int
    next: int
    slice: int
    stages: int
    cluster: int

    def __str__(self) -> str:
        return f"{self.width}-next{self.next}-cluster{self.cluster}"


def every_instance() -> list[Instance]:
    numbers = operators.hopper_bottleneck_tiles()
    return [Instance(i // 6, *numbers[i : i + 5]) for i in range(0, len(numbers), 6)]


@dataclass
class Layer:
    """A convolution and its norm; of the first alone the geometry is looked at."""

    weight: Tensor
    mean: Tensor
    var: Tensor
    bn_weight: Tensor | None
    bn_bias: Tensor | None
    eps: float
    bias: Tensor | None = None

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.weight, self.mean, self.var, self.bn_weight, self.bn_bias, self.bias)

    def flat(self) -> tuple:
        return (self.weight, self.mean, self.var, self.bn_weight, self.bn_bias, self.eps, self.bias)

    def map(self, change) -> Layer:
        changed = [t if t is None else change(t) for t in self.tensors()]
        return Layer(*changed[:5], self.eps, changed[5])


@dataclass
class Case:
    """What the operator takes."""

    input: Tensor
    shortcut: Tensor
    window: Layer
    expand: Layer
    next: Layer | None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def layers(self) -> list[Layer]:
        return [layer for layer in (self.window, self.expand, self.next) if layer is not None]

    def map(self, change) -> Case:
        layers = (layer and layer.map(change) for layer in (self.window, self.expand, self.next))
        return dataclasses.replace(
            self,
            **dict(zip(("window", "expand", "next"), layers, strict=True)),
            input=change(self.input),
            shortcut=change(self.shortcut),
        )

    def eager(self, round_to=lambda x: x) -> list[Tensor]:
        """Layer by layer, each output rounded: the output, and what the next layer makes of it."""

        def run(x, layer, shortcut=None, **geometry):
            out = F.conv2d(x, layer.weight, layer.bias, **geometry)
            norm = (layer.mean, layer.var, layer.bn_weight, layer.bn_bias)
            out = F.batch_norm(out, *norm, False, 0.0, layer.eps)
            return round_to(F.relu(out if shortcut is None else out + shortcut))

        geometry = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        out = run(run(self.input, self.window, **geometry), self.expand, self.shortcut)
        return [out] if self.next is None else [out, run(out, self.next)]

    def exact(self) -> list[Tensor]:
        """In float64, rounded where a layer stores 16 bits."""
        dtype = self.input.dtype
        outs = self.map(Tensor.double).eager(lambda x: x.to(dtype).double())
        return [out.to(dtype) for out in outs]

    def run(self, tile: Instance) -> list[Tensor]:
        """The operator, on copies of its tensors that end where accesses must."""
        absent = (None, None, None, None, None, 0.0, None)
        with cuda_on_host.guarded() if ON_HOST else contextlib.nullcontext():
            placed = self.map(lambda t: t.to(DEVICE) if DEVICE != "cpu" else t.clone())
            named = {
                f"{i}.{j}": t
                for i, layer in enumerate(placed.layers)
                for j, t in enumerate(layer.tensors())
                if t is not None
            }
            with unchanged(input=placed.input, shortcut=placed.shortcut, **named):
                output, following = operators.hopper_bottleneck(
                    placed.input, placed.shortcut, *placed.window.flat(), *placed.stride,
                    *placed.padding, *placed.dilation, *placed.expand.flat(),
                    *(absent if placed.next is None else placed.next.flat()), tile.index,
                )  # fmt: skip
        assert output.is_contiguous(memory_format=LAST)
        if self.next is None:
            assert following.shape == (*output.shape[:1], 0, *output.shape[2:])
            return [output.cpu()]
        return [output.cpu(), following.cpu()]


@dataclass(frozen=True)
class Problem:
    """Sizes: of images, of the block's output and of the next layer's, and the window's."""

    name: str
    size: tuple[int, int]
    batch: int
    K: int
    next_width: int
    taps: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        return self.name


def problems(tile: Instance) -> list[Problem]:
    """Sizes beside every border of the tile: pixels, slices, what follows, windows, images."""
    pixels, one, wide = M * tile.cluster, (1, 1), 4 * tile.width
    plain = {"taps": one, "padding": (0, 0)}
    return [
        Problem("few", (3, 5), 1, tile.slice, 8),
        Problem("stride 2", (13, 18), 3, 2 * tile.slice, tile.next, stride=(2, 2)),
        Problem("none follows", (9, 15), 1, wide, 0),
        Problem("dilated", (7, 9), 2, tile.slice, tile.next - 8, padding=(2, 3), dilation=(2, 3)),
        Problem("window", (10, 8), 2, tile.slice, 16, (3, 2), (2, 1), (0, 1), (1, 2)),
        Problem("whole tiles", (16, 8), tile.cluster, tile.slice, tile.next, **plain),
        Problem("a pixel more", (1, pixels + 1), 1, tile.slice, 8, **plain),
        # More than two for a block or a pair of them, and not as many for each.
        Problem("many tiles", (pixels, 9), 1, 2 * tile.slice, tile.next, **plain),
        Problem("many tiles, none follows", (pixels, 9), 1, tile.slice, 0, **plain),
    ]


def layer(shape, options, dtype, generator) -> Layer:
    """Of whole numbers, mostly zeros, with scales that are powers of two: sums are exact."""
    K, C, R, S = shape
    present = torch.rand(shape, generator=generator) < min(1.0, 24 / (C * R * S))
    weight = torch.randint(-2, 3, shape, generator=generator) * present

    def drawn(values):
        return torch.tensor(values)[torch.randint(len(values), (K,), generator=generator)]

    affine, bias = options
    return Layer(
        weight.to(dtype, memory_format=LAST),
        drawn([-2.0, -1.0, 0.0, 1.0]),
        drawn([0.0, 0.75, 3.75]),  # with eps, the squares of 1/2, 1 and 2
        drawn([-1.0, 0.5, 1.0]) if affine else None,
        drawn([-2.0, 0.0, 1.0, 3.0]) if affine else None,
        0.25,
        drawn([-1.0, 0.0, 2.0]).to(dtype) if bias else None,
    )


def integers(tile, problem, dtype=torch.float16, affine=True, bias=True, seed=0) -> Case:
    generator = torch.Generator().manual_seed(seed)
    options = (affine, bias)
    width, K = tile.width, problem.K

    def images(*shape):
        values = torch.randint(-3, 4, shape, generator=generator)
        return values.to(dtype).contiguous(memory_format=LAST)

    window = layer((width, width, *problem.taps), options, dtype, generator)
    expand = layer((K, width, 1, 1), options, dtype, generator)
    following = None
    if problem.next_width:
        following = layer((problem.next_width, K, 1, 1), options, dtype, generator)
    input = images(problem.batch, width, *problem.size)
    geometry = (problem.stride, problem.padding, problem.dilation)
    P, Q = F.conv2d(input[:, :1].float(), window.weight[:1, :1].float(), None, *geometry).shape[2:]
    shortcut = images(problem.batch, K, P, Q)
    return Case(input, shortcut, window, expand, following, *geometry)


def assert_exact(outs, case, what="") -> None:
    for name, out, exact in zip(("output", "next"), outs, case.exact(), strict=False):
        torch.testing.assert_close(
            out, exact, rtol=0, atol=0, equal_nan=True,
            msg=lambda m, name=name: f"{what}, {name}: {m}",
        )  # fmt: skip
    assert len(outs) == len(case.exact())


def cases():
    """Without `--whole` every tile on some problem, and every problem."""
    return one_of_each(
        [
            pytest.param(tile, problem, id=f"{tile}-{problem}".replace(" ", "_"))
            for tile in every_instance()
            for problem in problems(tile)
        ],
        lambda tile, problem: tile,
        lambda tile, problem: (tile.cluster, problem.name),
    )


@pytest.mark.parametrize(("tile", "problem"), cases())
def test_exact(tile, problem, set_seed):
    """Rounded where a layer's output would be, and nowhere else."""
    full, bare = integers(tile, problem), integers(tile, problem, affine=False, bias=False, seed=1)
    for seed, case in enumerate((full, bare, full)):
        set_seed(seed)
        assert_exact(case.run(tile), case, f"{'everything' if case is full else 'bare'}, {seed}")
    for out in full.exact():
        assert out.count_nonzero() > out.numel() // 4
        assert out.isfinite().all()


@pytest.mark.parametrize("tile", every_instance(), ids=str)
def test_exact_in_bfloat16(tile):
    case = integers(tile, problems(tile)[1], torch.bfloat16)
    assert_exact(case.run(tile), case)


def random_case(width, K, next_width, size, stride=1, dtype=torch.float16, batch=1) -> Case:
    """Of usual numbers."""
    generator = torch.Generator().manual_seed(width + K + next_width)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    def images(*shape):
        return normal(*shape).to(dtype).contiguous(memory_format=LAST)

    def random_layer(filters, channels, taps):
        weight = images(filters, channels, taps, taps) / (channels * taps * taps) ** 0.5
        vectors = (0.3 * normal(filters), 0.5 + normal(filters).abs())
        affine = (1 + 0.3 * normal(filters), 0.3 * normal(filters))
        return Layer(weight, *vectors, *affine, 1e-5)

    H, W = size
    return Case(
        images(batch, width, H, W), images(batch, K, -(-H // stride), -(-W // stride)),
        random_layer(width, width, 3), random_layer(K, width, 1),
        random_layer(next_width, K, 1) if next_width else None, (stride, stride),
    )  # fmt: skip


# Of ResNet-50: width, output, next width, stride; the last one of each stage but the last.
BLOCKS = {
    "stage 1": (64, 256, 64, 1),
    "stage 1, last": (64, 256, 128, 1),
    "stage 2, first": (128, 512, 128, 2),
    "stage 2, last": (128, 512, 256, 1),
    "stage 3, first": (256, 1024, 256, 2),
    "stage 3, last": (256, 1024, 0, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.single
def test_error_rule(name, dtype, set_seed):
    """Against float64, at most 1.5 times eager's error, in every instance that can run it."""
    width, K, next_width, stride = BLOCKS[name]
    case = random_case(width, K, next_width, (12, 13), stride, dtype)
    expected, eager = case.map(Tensor.double).eager(), case.eager()
    tiles = [t for t in every_instance() if t.width == width and t.next >= next_width]
    for seed, tile in enumerate(tiles):
        set_seed(seed)
        outs = case.run(tile)
        for out, *others in zip(outs, eager, expected, strict=True):
            assert_error_rule(out, *others, what=f"{tile}")


@pytest.mark.parametrize("tile", every_instance(), ids=str)
def test_nonfinite_values(tile):
    """Infinities and NaNs reach what they are summed into, and nothing else."""
    case = integers(tile, problems(tile)[1])
    case.input[0, 1, 2, 3] = math.nan
    case.input[1, -1, -1, -2] = math.inf
    case.input[2, 0, 0, 0] = -math.inf
    case.shortcut[0, -1, 1, 1] = math.nan
    case.shortcut[1, 0, -1, -1] = math.inf
    case.shortcut[2, 0, 3, 3] = -math.inf
    outs = case.run(tile)
    assert_exact(outs, case)
    for out in outs:
        assert out.isnan().any()
        assert out.isfinite().any()
    case = integers(tile, problems(tile)[0])
    case.window.mean[5], case.expand.mean[2], case.next.bn_bias[3] = math.inf, math.nan, math.nan
    assert_exact(case.run(tile), case, "norms")


def test_what_overflows_between_layers_is_infinite():
    tile = every_instance()[0]
    case = random_case(64, 256, 64, (5, 6))
    case.window.bn_weight.fill_(1e6)
    case.expand.weight.abs_()
    outs, exact = case.run(tile), case.eager()
    for out, eager in zip(outs, exact, strict=True):
        assert torch.equal(out.isinf(), eager.isinf())
        assert torch.equal(out.isnan(), eager.isnan())
    assert outs[0].isinf().any()


def test_parameters_of_any_dtype():
    tile = every_instance()[1]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        case = integers(tile, problems(tile)[0])
        for one in case.layers:
            for name in ("mean", "var", "bn_weight", "bn_bias", "bias"):
                setattr(one, name, getattr(one, name).to(dtype))
        exact = case.exact()
        for out, expected in zip(case.run(tile), exact, strict=True):
            assert torch.equal(out, expected), dtype


def test_options_alone():
    """Every optional tensor of a layer without the others."""
    tile = every_instance()[0]
    for kept, at in itertools.product(("bn_weight", "bn_bias", "bias"), range(3)):
        case = integers(tile, problems(tile)[0], affine=False, bias=False)
        setattr(case.layers[at], kept, getattr(integers(tile, problems(tile)[0]).layers[at], kept))
        assert_exact(case.run(tile), case, f"only {kept} of layer {at}")


def test_layouts():
    """Tensors that do not lie densely channels_last are copied."""
    tile = every_instance()[0]
    case = integers(tile, problems(tile)[4])

    def strided(tensor):
        wide = tensor.new_full([2 * size for size in tensor.shape], math.nan)
        return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)

    for change in (lambda t: t.contiguous(), strided):
        assert_exact(dataclasses.replace(case, input=change(case.input)).run(tile), case)
        assert_exact(dataclasses.replace(case, shortcut=change(case.shortcut)).run(tile), case)
        changed = [
            dataclasses.replace(one, weight=change(one.weight), mean=strided(one.mean))
            for one in case.layers
        ]
        window, expand, following = changed
        other = dataclasses.replace(case, window=window, expand=expand, next=following)
        assert_exact(other.run(tile), case)


@pytest.mark.parametrize("tile", every_instance()[::3], ids=str)
def test_the_same_bits_in_any_order(tile, set_seed):
    """Threads, blocks and copies come in another order with each seed; the bits do not."""
    case = random_case(tile.width, 4 * tile.width, tile.next, (7, 23))
    first = case.run(tile)
    for seed in range(3):
        set_seed(seed)
        for out, before in zip(case.run(tile), first, strict=True):
            assert_same_bits(out, before)


def test_no_images():
    tile = every_instance()[0]
    case = integers(tile, problems(tile)[0])
    empty = dataclasses.replace(case, input=case.input[:0], shortcut=case.shortcut[:0])
    assert [out.shape for out in empty.run(tile)] == [(0, 128, 3, 5), (0, 8, 3, 5)]


def test_what_it_refuses():
    """Each argument by its name."""
    tile = every_instance()[0]
    case = integers(tile, problems(tile)[0])

    def of(name, **changes):
        return {name: dataclasses.replace(getattr(case, name), **changes)}

    weight, expand, following = (one.weight for one in case.layers)
    for changes, said in [
        ({"input": case.input[0]}, "input has 3 dimensions"),
        ({"input": case.input.float()}, "input is float32, must be float16 or bfloat16"),
        ({"input": case.input[:, :32]}, "input has 32 channels, tile 0 is of 64"),
        ({"shortcut": case.shortcut[0]}, "shortcut has 3 dimensions"),
        ({"shortcut": case.shortcut[:, :64]}, "shortcut has shape .*, must have the output's"),
        ({"shortcut": case.shortcut[..., :2]}, "shortcut has shape"),
        ({"shortcut": case.shortcut.bfloat16()}, "shortcut is bfloat16, must be float16"),
        (of("window", weight=weight[0]), "weight has 3 dimensions"),
        (of("window", weight=weight[:, :32]), "weight has shape .*, its input has 64 channels"),
        (of("window", weight=weight[:32]), "weight has shape .*, tile 0 is of 64 filters"),
        (of("window", weight=weight.bfloat16()), "weight is bfloat16"),
        (of("window", mean=case.window.mean[:5]), "running_mean must have 64 elements"),
        (of("window", eps=-1.0), "eps is -1"),
        (of("expand", weight=expand[:, :32]), "expand_weight has shape"),
        (of("expand", weight=expand[:72]), "expand_weight has 72 filters"),
        (of("expand", weight=expand.repeat(9, 1, 1, 1)), "expand_weight has 1152 filters"),
        (of("expand", weight=expand[:0]), "expand_weight has 0 filters"),
        (of("expand", weight=weight), "expand_weight has shape .*, must be of a 1x1"),
        (of("expand", bn_bias=case.expand.bn_bias.long()), "bn_bias is .*, must be floating"),
        (of("next", weight=following[:, :32]), "next_weight has shape .*, its input has 128"),
        (of("next", weight=following[:5]), "next_weight has 5 filters"),
        (of("next", weight=following.repeat(9, 1, 1, 1)), "next_weight has 72 filters"),
        (of("next", mean=None), "the norm of next_weight has no statistics"),
        ({"stride": (9, 1)}, "h has 3 taps, stride 9, padding 1 and dilation 1"),
        ({"padding": (1, 200)}, "w has 3 taps, stride 1, padding 200"),
        ({"stride": (0, 1)}, "stride"),
    ]:
        with pytest.raises(ValueError, match=f"^(hopper_bottleneck|conv_bn_act): .*{said}"):
            dataclasses.replace(case, **changes).run(tile)
    for index in (-1, len(every_instance())):
        with pytest.raises(ValueError, match="tile is"):
            case.run(dataclasses.replace(tile, index=index))


BLOCK = ChainProblem(2, 64, 9, 7, 256, (1, 1), (1, 1), (1, 1), "float16", None, 64)
GPU = architecture.ARCHITECTURES["H100"]


def test_tune_races_them_and_nobody_else_has_them(monkeypatch):
    """On a GPU of compute capability 9.0, with what follows and without."""
    raced = tuner.candidates(BLOCK, GPU, torch.device("cuda"))
    own = [one for one in raced if one.kernel.startswith("hopper")]
    assert own == cuda_tiles.hopper_chains(BLOCK, GPU)
    assert {one.kernel for one in own} == {HOPPER_CHAIN, HOPPER_CHAIN_WITHOUT_NEXT}
    assert len(own) == len(set(map(str, own))) == 4  # alone and in clusters
    assert len(set(map(str, raced))) == len(raced)
    assert not tuning.untuned(BLOCK, GPU).kernel.startswith("hopper")
    every = chain.candidates(BLOCK, GPU) + tuning._alternatives(BLOCK, GPU)
    assert not any(one.kernel.startswith("hopper") for one in every)
    for name in ("A100", "B200"):
        assert not cuda_tiles.hopper_chains(BLOCK, architecture.ARCHITECTURES[name])
    for changes in (
        {"width": 32}, {"width": 512}, {"K": 192}, {"K": 2048}, {"stride": (9, 1)},
        {"padding": (1, 128)}, {"dilation": (128, 1)}, {"N": 2**26},
    ):  # fmt: skip
        assert not cuda_tiles.hopper_chains(dataclasses.replace(BLOCK, **changes), GPU), changes
    wide = dataclasses.replace(BLOCK, next_width=256)
    assert {c.kernel for c in cuda_tiles.hopper_chains(wide, GPU)} == {HOPPER_CHAIN_WITHOUT_NEXT}
    for instance in every_instance():
        found = cuda_tiles.hopper_chain_instances(instance.width, instance.next)
        assert instance.index in found.values()
    monkeypatch.setattr(_native, "cuda_operators", None)
    assert not cuda_tiles.hopper_chains(BLOCK, GPU)


def test_tables_name_them(tmp_path, monkeypatch):
    """What a table says is followed, on a GPU that can."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    device = torch.device("cuda", 0)
    chosen = cuda_tiles.hopper_chains(BLOCK, GPU)[1]
    path = table.user_path(GPU.name)
    table.merge(path, GPU.name, {BLOCK: table.Entry(chosen.kernel, chosen.tile, 5.0)})
    for name, followed in ((GPU.name, True), ("A100", False)):
        gpu = dataclasses.replace(architecture.ARCHITECTURES[name], name=GPU.name)
        monkeypatch.setattr(architecture, "of_device", lambda device, gpu=gpu: gpu)
        tuning.reload()
        assert (tuning.choose(BLOCK, device) == chosen) == followed
    tuning.reload()


@pytest.fixture
def launches(monkeypatch):
    """What was launched, where a table has it for every block that it can run.

    The width of each, and whether the next block's first convolution was with it.
    """
    found = []
    run = hopper_chains.bottleneck

    def counted(input, shortcut, layers, tile):
        found.append((input.size(1), layers[-1] is not None))
        return run(input, shortcut, layers, tile)

    def choose(problem, device):
        ways = cuda_tiles.hopper_chains(problem, GPU)
        return ways[0] if ways else tuning.untuned(problem, GPU)

    monkeypatch.setattr(hopper_chains, "bottleneck", counted)
    monkeypatch.setattr(tuning, "choose", choose)
    return found


def stage(dtype=torch.float16) -> torch.nn.Sequential:
    """Two Bottlenecks, the first one with a projection, and one of the next stage."""

    def projection(channels, outputs, stride):
        convolution = torch.nn.Conv2d(channels, outputs, 1, stride, bias=False)
        return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(outputs))

    blocks = torch.nn.Sequential(
        Bottleneck(64, 64, 1, projection(64, 256, 1)),
        Bottleneck(256, 64),
        Bottleneck(256, 128, 2, projection(256, 512, 2)),
    )
    return randomize_(blocks, 5).eval().to(DEVICE, dtype, memory_format=LAST)


BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            backends.available()[name] != "yes", reason=f"{name}: {backends.available()[name]}"
        ),
    )
    for name in ("cuda", "triton")
]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_backends_run_what_a_table_says(kind, dtype, launches, monkeypatch):
    """A fused network of Bottlenecks: a launch a block, and the error rule."""
    if kind == "triton":
        from fused_resnet.backends.triton import chains

        monkeypatch.setattr(
            chains, "choose", lambda problem, device: tuning.choose(problem, device)
        )
    eager = stage(dtype)
    x = torch.randn(1, 64, 9, 7, generator=torch.Generator().manual_seed(0))
    x = x.to(DEVICE, dtype, memory_format=LAST)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with torch.inference_mode(), backends.use_backend(kind):
        out = stages_forward([fused], x)
        assert_error_rule(out, eager(x), copy.deepcopy(eager).double()(x.double()))
        # A block alone ends with its output, and a contiguous one with eager's format.
        alone = fused_resnet.fuse(copy.deepcopy(eager[1]).to(memory_format=torch.contiguous_format))
        y = torch.randn(1, 256, 5, 6, device=DEVICE).to(dtype)
        assert_error_rule(alone(y), eager[1](y), copy.deepcopy(eager[1]).double()(y.double()))
        assert alone(y).stride() == eager[1].to(memory_format=torch.contiguous_format)(y).stride()
    assert launches == [(64, True), (64, True), (128, False), (64, False), (64, False)]
    assert out.is_contiguous(memory_format=LAST)


@pytest.mark.parametrize("kind", BACKENDS)
def test_the_default_takes_none(kind, monkeypatch):
    monkeypatch.setattr(hopper_chains, "bottleneck", lambda *_: pytest.fail("not measured"))
    eager = stage()
    x = torch.randn(1, 64, 5, 6, device=DEVICE).half().to(memory_format=LAST)
    with torch.inference_mode(), backends.use_backend(kind):
        stages_forward([fused_resnet.fuse(copy.deepcopy(eager))], x)


def test_a_choice_without_what_follows(launches, monkeypatch):
    """The next block's first convolution runs by itself."""
    pick = {True: HOPPER_CHAIN_WITHOUT_NEXT, False: HOPPER_CHAIN}

    def choose(problem, device):
        ways = cuda_tiles.hopper_chains(problem, GPU)
        return next(one for one in ways if one.kernel == pick[problem.next_width > 0])

    monkeypatch.setattr(tuning, "choose", choose)
    eager = stage()
    x = torch.randn(1, 64, 5, 6, device=DEVICE).half().to(memory_format=LAST)
    with torch.inference_mode(), backends.use_backend("cuda"):
        out = stages_forward([fused_resnet.fuse(copy.deepcopy(eager))], x)
        assert_error_rule(out, eager(x), copy.deepcopy(eager).double()(x.double()))
    assert launches == [(64, False), (64, False), (128, False)]


def test_other_blocks_do_not(launches):
    """Widths there is no instance for, and float32, run convolution by convolution."""
    for block, dtype in (
        (Bottleneck(128, 32), torch.float16),
        (Bottleneck(256, 64), torch.float32),
        (Bottleneck(256, 64, groups=2), torch.float16),
    ):
        eager = randomize_(block, 6).eval().to(DEVICE, dtype, memory_format=LAST)
        x = torch.randn(1, block.conv1.in_channels, 5, 6, device=DEVICE).to(dtype)
        x = x.contiguous(memory_format=LAST)
        with torch.inference_mode(), backends.use_backend("cuda"):
            out = fused_resnet.fuse(copy.deepcopy(eager))(x)
            assert_error_rule(out, eager(x), copy.deepcopy(eager).double()(x.double()))
    assert not launches


def test_empty_batches_and_gradients_go_around_it(launches):
    fused = fused_resnet.fuse(stage())
    with backends.use_backend("cuda"):
        with torch.inference_mode():
            empty = torch.empty(0, 64, 5, 6, device=DEVICE).half()
            assert stages_forward([fused], empty).shape == (0, 512, 3, 3)
        launches.clear()
        x = torch.randn(1, 64, 5, 6, device=DEVICE).half().requires_grad_()
        fused(x.contiguous(memory_format=LAST)).sum().backward()
    assert x.grad is not None
    assert not launches


@pytest.mark.skipif(
    backends.available()["triton"] != "yes", reason="tune runs chains by Triton: not available"
)
def test_the_tuner_accepts_it():
    """Its checks, NaN among them, on every kind of candidate; and what they say to a wrong one."""
    case = tuned.make_chain_case(BLOCK, torch.device(DEVICE))
    ways = cuda_tiles.hopper_chains(BLOCK, GPU)
    with backends.use_backend("triton"):
        for choice in ways:
            assert tuned.check(tuner.run_of(choice), case) is None, str(choice)
