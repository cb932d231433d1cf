"""Batch norm in training where digits are easily lost: outliers, far means, huge values."""

import pytest
import torch
from support import assert_same_bits, dtype_id, rerun_on_instruction_set
from support.hard_batch_norms import HARD, check, eager, fused, hard_input, results

import fused_resnet

C = 12


SHAPES = [
    ((2, C, 13, 31), torch.contiguous_format),
    ((2, C, 13, 31), torch.channels_last),
    ((1, C, 129, 65), torch.contiguous_format),
    ((1, C, 129, 65), torch.channels_last),
    ((16, C, 5, 5), torch.contiguous_format),
]


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
def test_hard_values(dtype, name):
    """Output, statistics and gradients against float64, whatever the number of threads."""
    for shape, memory_format in SHAPES:
        x = hard_input(name, shape, dtype, memory_format)
        if x is None:
            continue
        grad = torch.randn(shape).to(dtype).contiguous(memory_format=memory_format)
        with fused_resnet.use_backend("cpu"):
            ours = results(fused, x, grad)
            torch.set_num_threads(1)
            again = results(fused, x, grad)
            torch.set_num_threads(2)
        for what, value in ours.items():
            assert_same_bits(value, again[what], what)
        check(ours, x, grad)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float64_squares_that_overflow(memory_format):
    """Infinite variances, as eager's, not NaN."""
    x = 1e160 * torch.randn(2, C, 13, 31, dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format)
    with fused_resnet.use_backend("cpu"):
        ours = results(fused, x, torch.ones_like(x))
    theirs = results(eager, x, torch.ones_like(x))
    for what in ("output", "running_mean", "running_var"):
        torch.testing.assert_close(ours[what], theirs[what])


@pytest.mark.parametrize("isa", ["avx2", "none"])
@pytest.mark.ahead(lambda isa: rerun_on_instruction_set(isa, __file__, "hard_values or overflow"))
def test_other_instruction_sets(isa, ahead):
    ahead()
