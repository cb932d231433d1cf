"""The CUDA backend's stem with its pool, and its max-pool; on the host where there is no GPU.

Sums of small integers are exact, so that one element out of place shows; the rest is judged by
eager's error against float64.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import RUNNERS
from support import ConvCase, ConvShape, cuda_on_host, dtype_id, make_conv_case, unchanged
from support.exact_convolutions import Problem, small_integers
from torch import Tensor

from fused_resnet import _native, backends
from fused_resnet.backends import cuda
from fused_resnet.layers.description import Pool, conv_norm_of
from fused_resnet.testing import assert_error_rule
from fused_resnet.tuning import architecture, cuda_tiles
from fused_resnet.tuning.estimate import USUAL_POOL
from fused_resnet.tuning.problem import ConvProblem

RUNNER = next((runner for runner in RUNNERS if runner.name == "cuda"), None)

pytestmark = [
    pytest.mark.skipif(RUNNER is None, reason=backends.available()["cuda"]),
    pytest.mark.usefixtures("guarded_tensors"),
]

POOL = Pool((3, 3), (2, 2), (1, 1))
DTYPES = [torch.float16, torch.bfloat16]


def shape_of(filters: int) -> ConvShape:
    return ConvShape(3, filters, (7, 7), (2, 2), (3, 3))


def placed(case: ConvCase) -> ConvCase:
    return case.map(lambda t: t.to(RUNNER.device) if RUNNER.device != "cpu" else copy_of(t))


def copy_of(tensor: Tensor) -> Tensor:
    """The same strides, over a storage that ends with the tensor."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.empty_like(tensor).copy_(tensor) if extent == tensor.numel() else tensor


def run(case: ConvCase, rows_each: int = 0) -> Tensor:
    guarded = cuda_on_host.guarded() if RUNNER.device == "cpu" else contextlib.nullcontext()
    with guarded:
        case = placed(case)
        arguments = (
            case.weight, case.running_mean, case.running_var, case.bn_weight, case.bn_bias,
            case.eps, case.bias, case.stride, case.padding, case.dilation, case.groups,
        )  # fmt: skip
        layer = conv_norm_of(arguments)
        with unchanged(input=case.input, weight=case.weight):
            out = cuda.usual_stem(case.input, layer, case.activation, POOL, rows_each)
    return out.cpu()


def pooled(case: ConvCase) -> Tensor:
    """What eager makes of it, in the case's dtype."""
    return F.max_pool2d(case.eager(), *POOL)


def exact(case: ConvCase) -> Tensor:
    """Of exact sums, each rounded once before they are compared."""
    return F.max_pool2d(case.double().eager().to(case.input.dtype).double(), *POOL)


def assert_exact(case: ConvCase, rows_each: int = 0) -> None:
    out = run(case, rows_each)
    expected = exact(case)
    assert out.shape == expected.shape
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=0, equal_nan=True)


# Rows that are whole chunks and such that are not; edges beside every border of a tile; more strips
# than one, in which rows begin at every offset from a chunk.
SIZES = [(1, 1), (2, 8), (7, 16), (9, 13), (21, 24), (6, 233), (5, 464), (4, 905)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_exact(dtype, size, set_seed):
    for seed, (filters, rows_each) in enumerate([(64, 1), (8, 2), (72, 0)]):
        set_seed(seed)
        full = small_integers(
            Problem("stem", shape_of(filters), size), dtype, bias=True, residual=False
        )
        assert_exact(full, rows_each)
        if seed == 0:
            bare = small_integers(
                Problem("stem", shape_of(filters), size),
                dtype,
                residual=False,
                affine=False,
                activation="none",
            )
            assert_exact(bare, 3)


@pytest.mark.parametrize("layout", ["contiguous", "cut out", "sliced", "reversed"])
def test_any_strides(layout, set_seed):
    """Read where they lie, number by number where rows are no chunks."""
    case = small_integers(Problem("stem", shape_of(8), (11, 16)), torch.float16, residual=False)
    x = case.input
    if layout == "contiguous":
        x = x.contiguous()
    elif layout == "cut out":  # rows of chunks that are longer than the image
        wide = torch.full((2, 11, 24, 3), math.nan, dtype=x.dtype)
        x = wide[:, :, :16].permute(0, 3, 1, 2).copy_(x)
    elif layout == "sliced":  # at an odd address
        wide = torch.full((2, 11, 17, 3), math.nan, dtype=x.dtype)
        x = wide[:, :, 1:].permute(0, 3, 1, 2).copy_(x)
    else:
        x = torch.empty(16, 11, 2, 3, dtype=x.dtype).permute(2, 3, 1, 0).copy_(x)
    for seed in range(2):
        set_seed(seed)
        assert_exact(dataclasses.replace(case, input=x, weight=case.weight.contiguous()))


@pytest.mark.parametrize("size", [(9, 24), (10, 11)], ids=str)
def test_nonfinite_values(size):
    """They reach the outputs of their windows alone: what lies beside a window is masked."""
    problem = Problem("stem", shape_of(8), size)
    for activation in ("none", "relu"):
        case = small_integers(problem, torch.float16, residual=False, activation=activation)
        case.input[0, 0, 3, 5] = math.nan
        case.input[0, 2, 6, 2] = math.inf
        case.input[1, 2, 0, size[1] - 1] = math.nan
        case.input[1, 0, size[0] - 1, 0] = -math.inf
        assert_exact(case)
    # The number before a window and the two behind it, which are loaded with it.
    for number, w in ((2, 2), (0, 6), (1, 6), (0, 8)):
        case = small_integers(problem, torch.float16, residual=False)
        case.input[0, number, 4, w] = math.nan
        assert_exact(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("parameters", [torch.float32, torch.float16, torch.float64], ids=dtype_id)
def test_error_rule(dtype, parameters):
    case = make_conv_case(shape_of(16), batch=2, size=(30, 40), dtype=dtype, residual=False)
    vectors = ("running_mean", "running_var", "bn_weight", "bn_bias")
    case = dataclasses.replace(case, **{n: getattr(case, n).to(parameters) for n in vectors})
    single = dataclasses.replace(case, **{n: getattr(case, n).float() for n in vectors})
    assert_error_rule(run(case), pooled(single), pooled(case.double()))


def test_the_same_bits_in_any_order(set_seed):
    case = make_conv_case(shape_of(64), batch=2, size=(21, 32), dtype=torch.float16, residual=False)
    results = []
    for seed in range(3):
        set_seed(seed)
        results += [run(case, rows_each) for rows_each in (1, 4)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_what_is_no_usual_stem_is_pooled_by_itself():
    """Another pool, another window, another activation; with the same formula as ever."""
    x = torch.randn(1, 3, 15, 17).half().to(memory_format=torch.channels_last)
    for shape, pool, activation in (
        (shape_of(8), Pool((2, 2), (2, 2), (0, 0)), "relu"),
        (ConvShape(3, 12, (3, 3), (1, 1), (1, 1)), POOL, "relu"),
        (shape_of(8), POOL, "silu"),
    ):
        case = make_conv_case(
            shape, batch=1, size=(15, 17), dtype=torch.float16, residual=False,
            activation=activation,
        )  # fmt: skip
        case = placed(dataclasses.replace(case, input=x))
        layer = conv_norm_of(
            (
                case.weight, case.running_mean, case.running_var, case.bn_weight, case.bn_bias,
                case.eps, case.bias, case.stride, case.padding, case.dilation, case.groups,
            )
        )  # fmt: skip
        out = cuda.conv_bn_act_max_pool(case.input, layer, activation, pool)
        expected = F.max_pool2d(cuda.conv_bn_act(case.input, layer, None, activation), *pool)
        assert torch.equal(out, expected)
        assert out.stride() == expected.stride()


@pytest.mark.parametrize("channels", [5, 24])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=dtype_id)
def test_max_pool(dtype, channels, set_seed):
    operator = _native.cuda_operators.max_pool_channels_last
    x = torch.randn(2, channels, 9, 14)
    x[0, 1, 4, 4], x[1, 0, 0, 0], x[1, 2] = math.nan, math.inf, -math.inf
    x = x.to(dtype).to(memory_format=torch.channels_last).to(RUNNER.device)
    for seed, pool in enumerate([[3, 3, 2, 2, 1, 1], [2, 5, 1, 3, 1, 2], [4, 2, 3, 2, 0, 0]]):
        set_seed(seed)
        expected = F.max_pool2d(x, pool[:2], pool[2:4], pool[4:])
        torch.testing.assert_close(operator(x, pool), expected, rtol=0, atol=0, equal_nan=True)


def test_refusals():
    operators = _native.cuda_operators
    x = torch.zeros(1, 3, 8, 8, device=RUNNER.device).half()
    vectors = [torch.ones(8, device=RUNNER.device) for _ in range(4)]

    def stem(x: Tensor = x, filters: int = 8, taps: int = 7, rows_each: int = 0) -> Tensor:
        weight = torch.zeros(filters, 3, taps, taps, device=RUNNER.device).half()
        return operators.stem_max_pool(x, weight, *vectors, 1e-5, None, True, rows_each)

    stem()
    with pytest.raises(ValueError, match="must be float16 or bfloat16"):
        stem(x.float())
    with pytest.raises(ValueError, match=r"must be \(K, 3, 7, 7\)"):
        stem(filters=12)
    with pytest.raises(ValueError, match=r"must be \(K, 3, 7, 7\)"):
        stem(taps=5)
    with pytest.raises(ValueError, match="running_mean must have 16 elements"):
        stem(filters=16)
    with pytest.raises(ValueError, match="rows_each"):
        stem(rows_each=-1)
    with pytest.raises(ValueError, match="dense and channels_last"):
        operators.max_pool_channels_last(
            torch.zeros(1, 4, 4, 4).half().to(x.device), [2] * 4 + [0] * 2
        )
    with pytest.raises(ValueError, match="at most half its window"):
        operators.max_pool_channels_last(x[:, :1], [2, 2, 1, 1, 2, 0])


def test_predicted_time():
    """What says how many rows a block is given: more than memory takes, at most 0.25 ms of 256."""
    gpu = architecture.named("H100")

    def seconds(batch: int) -> float:
        problem = ConvProblem(
            batch, 3, 224, 224, 64, 7, 7, (2, 2), (3, 3), (1, 1), 1, "float16", False, USUAL_POOL
        )
        return cuda_tiles.predicted_stem(problem, gpu)

    memory = 256 * 2 * (224 * 224 * 3 + 56 * 56 * 64) / gpu.copy_bandwidth
    assert memory < seconds(256) <= 0.25e-3, seconds(256)
    assert seconds(1) < seconds(32) < seconds(256) / 6
