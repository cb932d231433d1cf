"""BasicBlocks in one launch of the CUDA backend; on the host where there is no GPU."""

from __future__ import annotations

import copy
import dataclasses

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from conftest import RUNNERS
from hypothesis import strategies as st
from support import assert_same_bits, assert_same_nonfinite, cuda_on_host, dtype_id, unchanged
from support.selection import examples
from torch import Tensor
from torchvision.models.resnet import BasicBlock

import fused_resnet
from fused_resnet import backends, tuning
from fused_resnet.backends import cuda
from fused_resnet.layers.description import Block, ConvNorm, Norm, conv_norm_of
from fused_resnet.measure.tune import cases as tuned
from fused_resnet.measure.tune import tuner
from fused_resnet.testing import assert_error_rule, randomize_
from fused_resnet.tuning import BasicBlockProblem, Choice, Tile, basic_block
from fused_resnet.tuning.choice import BASIC_BLOCK

RUNNER = next((runner for runner in RUNNERS if runner.name == "cuda"), None)
ON_HOST = RUNNER is not None and RUNNER.device == "cpu"

pytestmark = [
    pytest.mark.skipif(RUNNER is None, reason=backends.available()["cuda"]),
    pytest.mark.usefixtures("guarded_tensors"),
]

C, COLUMNS = basic_block.CHANNELS, basic_block.COLUMNS
DTYPES = [torch.float16, torch.bfloat16]
TILES = [shape.tile for shape in basic_block.SHAPES]
SMALLEST = TILES[-1]
TILE_ID = [f"{shape.rows} rows, {shape.warps} warps" for shape in basic_block.SHAPES]


@dataclasses.dataclass(frozen=True)
class Case:
    """A block's input, and the arguments of `conv_bn_act` from `weight` to `groups`, twice."""

    input: Tensor
    layers: tuple[tuple, tuple]

    def double(self) -> Case:
        return Case(
            self.input.double(),
            tuple(
                tuple(x.double() if isinstance(x, Tensor) else x for x in layer)
                for layer in self.layers
            ),
        )

    def eager(self) -> Tensor:
        out = self.input
        for layer, residual in zip(self.layers, (None, self.input), strict=True):
            weight, mean, var, bn_weight, bn_bias, eps, bias, *geometry = layer
            out = F.conv2d(out, weight, bias, *geometry)
            out = F.batch_norm(out, mean, var, bn_weight, bn_bias, False, 0.0, eps)
            out = F.relu(out if residual is None else out + residual)
        return out

    def tensors(self) -> dict[str, Tensor]:
        found = {"input": self.input}
        for index, layer in enumerate(self.layers):
            found |= {f"{index}.{at}": x for at, x in enumerate(layer) if isinstance(x, Tensor)}
        return found

    def run(self, tile: Tile) -> Tensor:
        with unchanged(**self.tensors()):
            return cuda.run_basic_block(self.input, *map(conv_norm_of, self.layers), tile)


def case_of(
    size: tuple[int, int],
    batch: int = 1,
    dtype: torch.dtype = torch.float16,
    *,
    affine: bool = True,
    bias: bool = False,
    parameters: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    def layer(eps: float) -> tuple:
        weight = normal(C, C, 3, 3) / (9 * C) ** 0.5
        vectors = (
            0.3 * normal(C), 0.5 + normal(C).abs(), 1 + 0.3 * normal(C), 0.3 * normal(C),
        )  # fmt: skip
        mean, var, bn_weight, bn_bias = (v.to(RUNNER.device, parameters) for v in vectors)
        return (
            nhwc(weight), mean, var, bn_weight if affine else None, bn_bias if affine else None,
            eps, (0.3 * normal(C)).to(RUNNER.device, dtype) if bias else None, (1, 1), (1, 1),
            (1, 1), 1,
        )  # fmt: skip

    def nhwc(x: Tensor) -> Tensor:
        return x.to(RUNNER.device, dtype, memory_format=torch.channels_last)

    return Case(nhwc(normal(batch, C, *size)), (layer(1e-5), layer(1e-3)))


def check(case: Case, tile: Tile) -> Tensor:
    """The error rule, against float64 and with eager's own error as the measure."""
    out = case.run(tile)
    assert out.dtype is case.input.dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert_error_rule(out, case.eager(), case.double().eager())
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("shape", basic_block.SHAPES, ids=TILE_ID)
def test_every_tile(shape, dtype, set_seed):
    """More than one tile each way, none of them full at the end."""
    set_seed(shape.rows + shape.warps)
    check(case_of((shape.rows + 3, COLUMNS + 1), 1, dtype), shape.tile)


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 15), (6, 14), (7, 5)], ids=str)
def test_small_images(size):
    """Images of a pixel, of exactly a tile, and with a second one of a row or a column."""
    check(case_of(size, batch=2, bias=True), SMALLEST)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.single
def test_several_images(dtype):
    """Each with its own neighbours: none sees the next one's pixels."""
    case = case_of((9, 16), 3, dtype)
    out = check(case, SMALLEST)
    for n in range(3):
        alone = dataclasses.replace(
            case, input=case.input[n : n + 1].clone(memory_format=torch.channels_last)
        )
        assert_same_bits(alone.run(SMALLEST), out[n : n + 1])


def test_all_tiles_compute_the_same():
    """The order of the sum does not depend on the tile, so neither do the bits."""
    case = case_of((17, 15))
    first, *others = [case.run(tile) for tile in TILES]
    for other in others:
        assert_same_bits(other, first)


def test_exact_numbers():
    """Integers whose sums neither type rounds: every product is there once, at its place."""
    generator = torch.Generator().manual_seed(1)

    def few(*sizes: int) -> Tensor:
        """Mostly zeros."""
        values = torch.randint(-1, 2, sizes, generator=generator)
        return (values * (torch.rand(sizes, generator=generator) < 0.1)).float()

    case = case_of((8, 15), 2)
    layers = []
    for at, layer in enumerate(case.layers):
        weight = few(C, C, 3, 3).to(case.input, memory_format=torch.channels_last)
        ones, zeros = layer[1].new_ones(C), layer[1].new_zeros(C)
        eps = 2.0**-10  # torch's batch norm did not always take 0
        vectors = (zeros + at, ones - eps, 2 * ones, zeros - 1, eps)
        layers.append((weight, *vectors, *layer[6:]))
    input = few(2, C, 8, 15).to(case.input, memory_format=torch.channels_last)
    case = Case(input, tuple(layers))
    exact = case.double().eager()
    assert exact.abs().max() < 2**11
    assert exact.count_nonzero() > exact.numel() // 4
    assert torch.equal(case.run(SMALLEST).double(), exact)


@pytest.mark.parametrize(
    "arguments",
    [
        {"affine": False},
        {"bias": True, "parameters": torch.float16},
        {"parameters": torch.bfloat16},
        {"parameters": torch.float64},
    ],
    ids=["not affine", "float16, with biases", "bfloat16", "float64"],
)
def test_parameters(arguments):
    """Left out, with the convolutions' own biases, in every dtype."""
    dtype = torch.bfloat16 if arguments.get("parameters") is torch.bfloat16 else torch.float16
    case = case_of((5, 6), 1, dtype, **arguments)
    out = case.run(SMALLEST)
    # Eager cannot mix all of these; what it computes of wider ones, it computes in float64.
    plain = Case(
        case.input,
        tuple(
            tuple(
                x.to(torch.float32) if isinstance(x, Tensor) and at in (1, 2, 3, 4) else x
                for at, x in enumerate(layer)
            )
            for layer in case.layers
        ),
    )
    assert_error_rule(out, plain.eager(), case.double().eager())


def test_parameters_that_are_not_dense():
    case = case_of((5, 6))
    layers = tuple(
        tuple(
            x.repeat_interleave(2)[::2] if isinstance(x, Tensor) and x.dim() == 1 else x
            for x in layer
        )
        for layer in case.layers
    )
    assert_same_bits(Case(case.input, layers).run(SMALLEST), case.run(SMALLEST))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_and_infinities(dtype):
    """They come out where eager has them: ReLU keeps NaN, and padding keeps none out."""
    case = case_of((9, 17), 2, dtype)
    for value, (n, c, h, w) in (
        (float("nan"), (0, 3, 0, 0)),
        (float("inf"), (0, 60, 8, 16)),
        (float("-inf"), (1, 0, 5, 13)),
        (float("nan"), (1, 63, 6, 14)),
    ):
        case.input[n, c, h, w] = value
    out = case.run(SMALLEST)
    # Where an infinity is beyond a type's largest number eager rounds it to one between kernels.
    assert_same_nonfinite(out, case.eager(), case.double().eager())
    assert out.isnan().any()
    assert out.isfinite().any()


def test_nan_in_weights_and_norms():
    """They come out where they do of two launches; padding times NaN is NaN there too."""
    case = case_of((3, 3))
    for layer, tensor, at in ((0, 0, (5, 6, 0, 0)), (1, 0, (9, 7, 2, 2)), (0, 1, (11,))):
        tensors = [list(one) for one in case.layers]
        tensors[layer][tensor] = tensors[layer][tensor].clone()
        tensors[layer][tensor][at] = float("nan")
        changed = Case(case.input, tuple(map(tuple, tensors)))
        out = changed.run(SMALLEST)
        first, second = map(conv_norm_of, changed.layers)
        middle = cuda.conv_bn_act(case.input, first, None, "relu")
        assert_same_nonfinite(out, cuda.conv_bn_act(middle, second, case.input, "relu"))
        assert (out.isnan() | ~changed.eager().isnan()).all()
        assert out.isnan().any()


def test_large_numbers_saturate_between_the_convolutions():
    """What the type cannot hold is an infinity there, as it is in memory."""
    case = case_of((4, 4))
    first = list(case.layers[0])
    first[3] = torch.full_like(first[3], 1e6)
    case = Case(case.input, (tuple(first), case.layers[1]))
    assert_same_nonfinite(case.run(SMALLEST), case.eager())


@pytest.mark.parametrize("tile", TILES, ids=TILE_ID)
@pytest.mark.single
def test_the_same_bits_in_any_order(tile, set_seed):
    """Threads, blocks and copies come in another order with each seed; the bits do not."""
    case = case_of((7, 15))
    first = case.run(tile)
    for seed in range(4):
        set_seed(seed)
        assert_same_bits(case.run(tile), first)


@hypothesis.settings(max_examples=examples(20))
@hypothesis.given(
    size=st.tuples(st.integers(1, 17), st.integers(1, 30)),
    batch=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    tile=st.sampled_from(TILES),
    seed=st.integers(0, 2**16),
    begin=st.booleans(),
)
def test_drawn_images(set_seed, size, batch, dtype, tile, seed, begin):
    """Any size, any tile, at either guard page."""
    if ON_HOST:
        cuda_on_host.load().guard("begin" if begin else "end")
    set_seed(seed)
    check(case_of(size, batch, dtype, seed=seed), tile)


def test_inputs_with_gaps():
    """Pixels, rows and images further apart than they need be; copied where chunks do not align."""
    case = case_of((5, 6), 2)
    expected = case.run(SMALLEST)
    N, _, H, W = case.input.shape
    for C_all, first in ((3 * C, C), (C + 8, 8), (C + 4, 4), (2 * C + 1, 1)):
        room = case.input.new_full((N + 1, H + 2, W + 3, C_all), float("nan"))
        view = room[1:, 1:-1, 2:-1, first : first + C].permute(0, 3, 1, 2)
        view.copy_(case.input)
        assert_same_bits(Case(view, case.layers).run(SMALLEST), expected)


def test_weights_in_any_format():
    case = case_of((5, 6))
    layers = tuple((layer[0].contiguous(), *layer[1:]) for layer in case.layers)
    assert_same_bits(Case(case.input, layers).run(SMALLEST), case.run(SMALLEST))


def described(block: BasicBlock) -> Block:
    """A block as `ops.residual_blocks` takes it."""
    layers = []
    for conv, norm in ((block.conv1, block.bn1), (block.conv2, block.bn2)):
        described = Norm(norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
        geometry = conv.stride, conv.padding, conv.dilation, conv.groups
        layers.append(ConvNorm(conv.weight, described, conv.bias, *geometry))
    return Block(layers, False)


def block(channels: int = C, dtype: torch.dtype = torch.float16, **arguments) -> BasicBlock:
    made = randomize_(BasicBlock(channels, channels, **arguments), 3).eval()
    return made.to(RUNNER.device, dtype, memory_format=torch.channels_last)


@pytest.fixture
def launches(monkeypatch):
    """The tiles of the blocks that were launched."""
    found = []
    run = cuda.run_basic_block

    def counted(input, first, second, tile):
        found.append(tile)
        return run(input, first, second, tile)

    monkeypatch.setattr(cuda, "run_basic_block", counted)
    if not ON_HOST:
        choice = Choice(BASIC_BLOCK, SMALLEST, "chosen by the test")
        monkeypatch.setattr(tuning, "choose", lambda problem, device: choice)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_blocks_run_it(dtype, launches):
    """A fused stage of BasicBlocks on the CUDA backend: a launch a block, and the error rule."""
    eager = torch.nn.Sequential(block(dtype=dtype), block(dtype=dtype))
    x = torch.randn(2, C, 9, 15, generator=torch.Generator().manual_seed(0))
    x = x.to(RUNNER.device, dtype, memory_format=torch.channels_last)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with torch.inference_mode(), backends.use_backend("cuda"):
        out = fused(x)
        assert len(launches) == 2
        assert_error_rule(out, eager(x), copy.deepcopy(eager).double()(x.double()))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_other_blocks_do_not(launches):
    """What the kernel does not take runs convolution by convolution, to eager's numbers."""
    projected = torchvision_block(C, 2 * C, 2)
    cases = {
        "strided": (projected, C, torch.float16),
        "other channels": (block(32), 32, torch.float16),
        "float32": (block(dtype=torch.float32), C, torch.float32),
    }
    for name, (eager, channels, dtype) in cases.items():
        x = torch.randn(1, channels, 5, 6, generator=torch.Generator().manual_seed(0))
        x = x.to(RUNNER.device, dtype).contiguous(memory_format=torch.channels_last)
        check_in_eager_s_format(eager, x)
        assert not launches, name


def test_contiguous_blocks_are_copied_to_it(launches):
    eager = block().to(memory_format=torch.contiguous_format)
    x = torch.randn(1, C, 5, 6, generator=torch.Generator().manual_seed(0))
    check_in_eager_s_format(eager, x.to(RUNNER.device, torch.float16))
    assert len(launches) == 1


def check_in_eager_s_format(eager, x):
    """Fused, a block computes eager's numbers in eager's memory format."""
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with torch.inference_mode():
        with backends.use_backend("cuda"):
            out = fused(x)
        reference, expected = eager(x), copy.deepcopy(eager).double()(x.double())
    assert_error_rule(out, reference, expected)
    assert out.stride() == reference.stride()


def torchvision_block(channels: int, outputs: int, stride: int) -> BasicBlock:
    """A block with a projected shortcut."""
    downsample = torch.nn.Sequential(
        torch.nn.Conv2d(channels, outputs, 1, stride, bias=False), torch.nn.BatchNorm2d(outputs)
    )
    made = randomize_(BasicBlock(channels, outputs, stride, downsample), 4).eval()
    return made.to(RUNNER.device, torch.float16, memory_format=torch.channels_last)


def test_empty_batches_and_gradients_go_around_it(launches):
    fused = fused_resnet.fuse(block())
    empty = torch.empty(0, C, 5, 6, dtype=torch.float16, device=RUNNER.device)
    with backends.use_backend("cuda"):
        with torch.inference_mode():
            assert fused(empty.contiguous(memory_format=torch.channels_last)).shape == empty.shape
        x = torch.randn(1, C, 5, 6, device=RUNNER.device).half().requires_grad_()
        fused(x.contiguous(memory_format=torch.channels_last)).sum().backward()
    assert x.grad is not None
    assert not launches


def test_what_it_takes():
    """`tuning.basic_block.problem_of`, by one argument after the other."""
    whole = described(block())
    layers = whole.layers
    x = torch.randn(2, C, 5, 6, device=RUNNER.device).half()
    x = x.contiguous(memory_format=torch.channels_last)
    problem = BasicBlockProblem(2, C, 5, 6, "float16")
    assert basic_block.problem_of(x, [whole]) == problem

    def without(**changes: object) -> list[Block]:
        return [Block([layers[0], layers[1]._replace(**changes)], False)]

    weight, norm, *_ = layers[1]
    refused = {
        "two blocks": [whole] * 2,
        "projection": [Block([*layers, layers[1]], True)],
        "one convolution": [Block(layers[:1], False)],
        "a padded shortcut": [Block(layers, False, 1)],
        "stride": without(stride=(2, 2)),
        "padding": without(padding=(0, 0)),
        "dilation": without(dilation=(2, 2)),
        "groups": without(groups=2),
        "filter": without(weight=weight[:, :, :1, :1]),
        "outputs": without(weight=weight[:32]),
        "dtype": without(weight=weight.bfloat16()),
        "statistics": without(norm=norm._replace(mean=norm.mean[:32])),
    }
    for name, blocks in refused.items():
        assert basic_block.problem_of(x, blocks) is None, name
    for name, other in {
        "contiguous": x.contiguous(),
        "empty": x[:0],
        "float32": x.float(),
        "channels": x[:, :32],
    }.items():
        assert basic_block.problem_of(other, [whole]) is None, name


def test_bad_arguments():
    """Python checks before; what the operator itself would read beyond, it refuses."""
    case = case_of((3, 3))
    first, second = case.layers
    operator = cuda._basic_block()

    def run(x: Tensor, one: tuple, other: tuple, tile: int = 0) -> None:
        operator(x, *one[:7], *other[:7], tile)

    with pytest.raises(ValueError, match="tile is 4, must be at least 0 and below 4"):
        run(case.input, first, second, len(TILES))
    with pytest.raises(ValueError, match="tile is -1"):
        run(case.input, first, second, -1)
    with pytest.raises(ValueError, match="input must be"):
        run(case.input[:, :32], first, second)
    with pytest.raises(ValueError, match="float16 or bfloat16"):
        run(case.input.float(), first, second)
    with pytest.raises(ValueError, match="weights must be"):
        run(case.input, (first[0][:, :, :2], *first[1:]), second)
    with pytest.raises(ValueError, match="weights must be"):
        run(case.input, first, (second[0].bfloat16(), *second[1:]))
    with pytest.raises(ValueError, match="running_mean must have 64 elements"):
        run(case.input, first, (second[0], second[1][:63], *second[2:]))
    empty = operator(case.input[:0], *first[:7], *second[:7], 0)
    assert empty.shape == (0, C, 3, 3)


def test_shapes_are_those_of_the_kernel():
    """`tuning.basic_block.SHAPES` is what csrc/cuda/basic_block.h lists."""
    numbers = fused_resnet._native.cuda_operators.basic_block_tiles()
    listed = [tuple(numbers[at : at + 4]) for at in range(0, len(numbers), 4)]
    assert listed == [(s.rows, COLUMNS, s.warps, s.stages) for s in basic_block.SHAPES]
    assert [basic_block.index(tile) for tile in TILES] == list(range(len(TILES)))


def test_the_tuner_accepts_it():
    """Its checks, NaN among them, on every tile; and what they say to a wrong one."""
    problem = BasicBlockProblem(2, C, 7, 15, "float16")
    case = tuned.make_basic_block_case(problem, torch.device(RUNNER.device))
    for tile in TILES:
        run = tuner.run_of(Choice(BASIC_BLOCK, tile, "chosen by the test"))
        assert tuned.check(run, case) is None

    def without_shortcut(arguments: tuple, problem: BasicBlockProblem) -> tuple[Tensor]:
        x, first, second = arguments
        return (tuned.eager_basic_block((x, first, second))[0].sub(x).relu(),)

    assert "error" in tuned.check(without_shortcut, case)
