"""Kernels whose blocks hand something on to others, several blocks at once.

They take turns at accesses to global memory, in an order drawn from a seed; what csrc/cuda_on_host
finds that way in kernels with planted faults is in test_cuda_on_host.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from support import ConvShape, cuda_on_host, dtype_id
from support.exact_convolutions import Problem, assert_exact, small_integers

from fused_resnet import _native, backends
from fused_resnet.backends import check_cases, cuda, hopper_chains
from fused_resnet.layers.activation import numbers_of
from fused_resnet.testing import assert_error_rule
from fused_resnet.tuning import ChainProblem, cluster_norm, cuda_tiles

if not backends.cuda.on_host():
    pytest.skip("runs CUDA kernels on the host", allow_module_level=True)

operators = _native.cuda_operators
module = cuda_on_host.load()
# Blocks (or clusters), and of how many accesses others run before one.
TURNS = [
    pytest.param((2, 2), marks=pytest.mark.whole),
    (4, 4),
    pytest.param((9, 3), marks=pytest.mark.whole),
]


@pytest.fixture(params=TURNS, ids=lambda turns: "{} blocks, {}".format(*turns))
def seeds(request: pytest.FixtureRequest) -> Iterator[Iterator[int]]:
    """Seeds, each set when it is drawn."""

    def drawn() -> Iterator[int]:
        for seed in itertools.count():
            module.set_seed(seed)
            yield seed

    module.set_at_once(*request.param)
    with cuda_on_host.guarded():
        yield drawn()
    module.set_at_once(0, 0)
    module.set_seed(0)


@pytest.mark.parametrize("split", [2, 5])
@pytest.mark.parametrize(("dtype", "tile"), [(torch.float16, 5), (torch.float32, 14)], ids=str)
def test_shared_sums(dtype, tile, split, seeds):
    """Each block that shares a tile's sum stores its part; the last adds them in their order."""
    shape = ConvShape(64, 72, (3, 3), (1, 1), (1, 1))
    case = small_integers(Problem("", shape, (9, 8), 1), dtype, bias=True)
    for seed in itertools.islice(seeds, 3):
        placed = case.map(torch.clone)
        out = operators.conv_bn_act_tiled(
            placed.input, placed.weight, placed.running_mean, placed.running_var, placed.bn_weight,
            placed.bn_bias, placed.eps, placed.bias, *case.stride, *case.padding, *case.dilation,
            case.groups, placed.residual, *numbers_of(case.activation), False, [tile, split],
        )  # fmt: skip
        assert_exact(out, case, seed)


def test_the_same_bits(seeds):
    """Whoever comes last."""
    shape = ConvShape(64, 72, (3, 3), (1, 1), (1, 1))
    case = small_integers(Problem("", shape, (9, 8), 1), torch.float16)
    case = dataclasses.replace(case, input=torch.randn_like(case.input))
    arguments = (
        case.input, case.weight, case.running_mean, case.running_var, None, None, case.eps, None,
        *case.stride, *case.padding, *case.dilation, 1, None, *numbers_of("none"), False, [5, 4],
    )  # fmt: skip
    results = [operators.conv_bn_act_tiled(*arguments) for _ in itertools.islice(seeds, 4)]
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=dtype_id)
def test_norms_of_clusters(dtype, seeds):
    """Blocks of a cluster read each other's sums from their shared memory; clusters are apart."""
    x = torch.randn(2, 24, 7, 9).to(dtype).to(memory_format=torch.channels_last)
    weight, bias = torch.rand(24) + 0.5, torch.randn(24)
    assert operators.batch_norm_fits_cluster(x, 1)

    def norm(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.batch_norm(x, None, None, *parameters, True).relu()

    eager = norm(x.float(), weight, bias).to(dtype)
    expected = norm(x.double(), weight.double(), bias.double())
    for _ in itertools.islice(seeds, 2):
        out, mean, _ = operators.batch_norm_in_one_launch(x, weight, bias, 1e-5, None, True, None)
        assert_error_rule(out, eager, expected)
        torch.testing.assert_close(mean, x.float().mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    assert cluster_norm.BLOCKS > 1


def test_clusters_of_hopper(seeds):
    """Blocks of a cluster load for each other; several clusters at once."""
    numbers = operators.hopper_conv_tiles()
    rows = [numbers[at : at + 6] for at in range(0, len(numbers), 6)]
    index, (_, n, *_) = next((i, row) for i, row in enumerate(rows) if row[0] == 2 and row[3] == 2)
    module.set_processors(6)
    case = small_integers(Problem("", ConvShape(64, n, (1, 2)), (64, 5), 1), torch.float16)
    for seed in itertools.islice(seeds, 2):
        out = operators.hopper_conv_bn_act(
            case.input, case.weight, case.running_mean, case.running_var, case.bn_weight,
            case.bn_bias, case.eps, case.bias, *case.stride, *case.padding, *case.dilation,
            case.residual, *numbers_of(case.activation), index,
        )  # fmt: skip
        assert_exact(out, case, seed)
    module.set_processors(4)


def test_chains_of_hopper(seeds):
    """The same of the Bottleneck chain, of which clusters take another tile after their first."""
    problem = ChainProblem(1, 64, 40, 20, 128, (1, 1), (1, 1), (1, 1), "float16", None, 64)
    tile = max(cuda_tiles.hopper_chain_instances(64, 64), key=lambda tile: tile.block_m)
    assert tile.block_m == 2 * 128

    def run(reduced, x, layers):
        window, expand, _, following = layers
        return hopper_chains.bottleneck(reduced, x, (window, expand, following), tile)

    def library(dtype):
        return case.library(lambda x: x.to(dtype) if isinstance(x, torch.Tensor) else x)

    case = check_cases.chain(problem, torch.device("cpu"), run)
    module.set_processors(6)
    first, *others = (case.kernel() for _ in itertools.islice(seeds, 3))
    module.set_processors(4)
    for out, eager, expected in zip(
        first, library(torch.float16), library(torch.float64), strict=True
    ):
        assert_error_rule(out, eager, expected)
    for other in others:
        assert all(map(torch.equal, first, other))


def test_stems(seeds):
    """Blocks share nothing but what they read."""
    shape = ConvShape(3, 8, (7, 7), (2, 2), (3, 3))
    case = small_integers(Problem("", shape, (21, 24)), torch.float16, residual=False)
    arguments = (
        case.input, case.weight, case.running_mean, case.running_var, case.bn_weight, case.bn_bias,
        case.eps, None, True,
    )  # fmt: skip
    run = cuda._stem("stem_max_pool")
    results = [run(*arguments, rows_each) for rows_each, _ in zip((1, 2, 5), seeds, strict=False)]
    expected = torch.max_pool2d(case.eager(), 3, 2, 1)
    assert all(torch.equal(result, expected) for result in results)
