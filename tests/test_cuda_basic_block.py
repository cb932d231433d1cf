"""BasicBlocks in one launch of the CUDA backend; on the host where there is no GPU."""

from __future__ import annotations

import contextlib
import dataclasses

import cuda_on_host
import pytest
import torch
import torch.nn.functional as F
from conftest import RUNNERS
from support import dtype_id, unchanged
from torch import Tensor

from fused_resnet import backends
from fused_resnet.backends import cuda
from fused_resnet.testing import assert_error_rule
from fused_resnet.tuning import Tile, basic_block

RUNNER = next((runner for runner in RUNNERS if runner.name == "cuda"), None)
ON_HOST = RUNNER is not None and RUNNER.device == "cpu"

pytestmark = pytest.mark.skipif(RUNNER is None, reason=backends.available()["cuda"])

C, COLUMNS = basic_block.CHANNELS, basic_block.COLUMNS
DTYPES = [torch.float16, torch.bfloat16]
TILES = [shape.tile for shape in basic_block.SHAPES]
SMALLEST = TILES[-1]
TILE_ID = [f"{shape.rows} rows, {shape.warps} warps" for shape in basic_block.SHAPES]


@pytest.fixture(autouse=True)
def guarded_tensors(request):
    """On the host, tensors end at a page that cannot be accessed."""
    request.node.user_properties.append(("backend", "cuda"))
    with cuda_on_host.guarded() if ON_HOST else contextlib.nullcontext():
        yield


@pytest.fixture
def set_seed():
    """Chooses the order of threads and when copies arrive; on a GPU that is as it is."""
    if not ON_HOST:
        yield lambda seed: None
        return
    module = cuda_on_host.load()
    yield module.set_seed
    module.set_seed(0)


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
            return cuda.run_basic_block(self.input, *self.layers, tile)


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
