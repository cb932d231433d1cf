"""Hard values, as in test_batch_norm_numerics.py, in the kernels that are written for GPUs.

Where there is none these are interpreted (Triton) and run on the host (CUDA).
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from conftest import RUNNERS
from support import assert_same_bits, dtype_id, triton_norms
from support.hard_batch_norms import HARD, check, fused, hard_input, results

import fused_resnet
from fused_resnet import backends, functional
from fused_resnet.backends import cuda
from fused_resnet.testing import relative_error

RUNNER = {runner.name: runner for runner in RUNNERS}
# Triton's in the interpreter's tiles and a GPU's; CUDA's with a launch a pass and in one launch.
KERNELS = {"triton": ["tiles", "gpu_tiles"], "cuda": ["launches", "cluster"]}
KERNELS = [(name, how) for name in KERNELS if name in RUNNER for how in KERNELS[name]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Blocks of whole rounds of rows, and a last one of a row; accesses of 16 bytes and of a value.
SHAPES = [(2, 12, 13, 31), (1, 16, 129, 65)]

# Weights of a 32nd, that many large values do not overflow, cost the mean of numbers next to the
# least ones half a unit of these. Taking such values larger makes Triton's kernel spill.
SUBNORMAL = "in Triton's kernels means of subnormal numbers are to a unit of these"

pytestmark = pytest.mark.skipif(not KERNELS, reason="neither Triton nor CUDA kernels run here")


@pytest.fixture
def use_kernels(monkeypatch):
    """Chooses the kernels of a backend."""

    def use(name, how):
        if how == "launches":
            monkeypatch.setattr(cuda, "_fits_cluster", lambda *_: False)
        elif how == "cluster" and RUNNER[name].device == "cuda":
            if torch.cuda.get_device_capability() < (9, 0):
                pytest.skip("the GPU has no clusters")
        elif how == "gpu_tiles" and RUNNER[name].device != "cuda":
            triton_norms.use_tiles_of_a_gpu(monkeypatch)

    return use


@pytest.mark.pairs
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize(("backend_name", "how"), KERNELS, ids=["_".join(k) for k in KERNELS])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_hard_values(dtype, backend_name, how, name, use_kernels):
    """Output, statistics and gradients against float64, the same bits each time."""
    if (backend_name, name) == ("triton", "subnormal_squares"):
        pytest.skip(SUBNORMAL)
    use_kernels(backend_name, how)
    device = RUNNER[backend_name].device
    cases = [(shape, torch.channels_last) for shape in SHAPES]
    if backend_name == "triton":
        cases[1:] = [((16, 12, 5, 5), torch.contiguous_format)]
    for seed, (shape, memory_format) in enumerate(cases):
        torch.manual_seed(seed)
        x = hard_input(name, shape, dtype, memory_format)
        if x is None:
            continue
        x = x.to(device)
        grad = torch.randn(shape).to(device, dtype).contiguous(memory_format=memory_format)
        with fused_resnet.use_backend(backend_name):
            ours = results(fused, x, grad)
            if backend_name == "cuda":
                for what, value in results(fused, x, grad).items():
                    assert_same_bits(value, ours[what], what)
        check(ours, x, grad)


@pytest.mark.skipif("triton" not in RUNNER, reason=backends.available()["triton"])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.single
def test_statistics_of_a_convolution(dtype, name):
    """Of outputs that are the hard values, by the epilogue; partial sums folded and not."""
    if name == "subnormal_squares":
        pytest.skip(SUBNORMAL)
    backends.triton.lazy.norms()
    convs = backends.triton.lazy.training_convolutions()
    shape = (1, 12, 65, 33)
    x = hard_input(name, shape, dtype, torch.channels_last)
    if x is None:
        return
    x = x.to(RUNNER["triton"].device)
    same = torch.eye(12, dtype=dtype, device=x.device).view(12, 12, 1, 1)
    geometry = ((1, 1), (0, 0), (1, 1))
    out, mean, var = convs.forward(x, same, None, (*geometry, 1), None, convs.INTERPRETED_TILE)
    rows = x.numel() // 12
    kept = {"running_mean": 0.1 * mean, "running_var": 0.1 * (var * (rows / (rows - 1)))}
    check(kept, out, torch.zeros_like(out))


@pytest.mark.skipif("triton" not in RUNNER, reason=backends.available()["triton"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("outlier_first", "mean_1e6") else pytest.mark.whole)
        for name in HARD
    ],
)
@pytest.mark.single
def test_folded_statistics(monkeypatch, name):
    """More slabs than the last kernel takes: those of several as one first."""
    if name == "subnormal_squares":
        pytest.skip(SUBNORMAL)
    backends.triton.lazy.norms()
    convs = backends.triton.lazy.training_convolutions()
    monkeypatch.setattr(convs, "MOST_SLABS", 16)
    monkeypatch.setattr(convs, "_FOLDED_SLABS", 8)
    x = hard_input(name, (1, 12, 65, 33), torch.float32, torch.channels_last)
    x = x.to(RUNNER["triton"].device)
    same = torch.eye(12, device=x.device).view(12, 12, 1, 1)
    geometry = ((1, 1), (0, 0), (1, 1))
    out, mean, var = convs.forward(x, same, None, (*geometry, 1), None, convs.INTERPRETED_TILE)
    rows = x.numel() // 12
    kept = {"running_mean": 0.1 * mean, "running_var": 0.1 * (var * (rows / (rows - 1)))}
    check(kept, out, torch.zeros_like(out))


@pytest.mark.skipif(not dist.is_available(), reason="torch has no collectives")
@pytest.mark.parametrize("backend_name", RUNNER)
def test_shared_statistics_where_squares_overflow(backend_name):
    """Of infinite variances: gradients of zero, also where sums over the batch are infinite."""
    device = RUNNER[backend_name].device
    torch.manual_seed(0)
    x = 0.1 * hard_input("squares_overflow", SHAPES[0], torch.float32, torch.channels_last)
    grad = 1e3 * torch.randn(SHAPES[0], device=device)
    x, weight, bias = (t.to(device).requires_grad_() for t in (x, *torch.randn(2, 12)))
    backend = "gloo" if device == "cpu" else "nccl"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        with fused_resnet.use_backend(backend_name):
            out = functional.sync_batch_norm_act(
                x, None, None, weight, bias, group=dist.group.WORLD, activation="none"
            )
            of_x, of_weight, of_bias = torch.autograd.grad(out, (x, weight, bias), grad)
    finally:
        dist.destroy_process_group()
    assert not of_x.any()
    assert not of_weight.any()
    assert relative_error(of_bias, grad.double().sum((0, 2, 3))) < 1e-6
