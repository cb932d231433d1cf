"""`csrc/cuda_on_host` itself: it computes what a GPU does, and finds the mistakes it says it does."""

from __future__ import annotations

import cuda_on_host
import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU", allow_module_level=True)

module = cuda_on_host.load()
operators = torch.ops.fused_resnet_on_host
SEEDS = range(8)


def tf32(x):
    """Rounded to 10 explicit bits, ties away from zero."""
    bits = x.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_fragments(dtype, transposed):
    """mma, ldmatrix and cp.async against a plain product."""
    depth = 8 if dtype == torch.float32 else 16
    a, b = torch.randn(16, depth).to(dtype), torch.randn(8, depth).to(dtype)
    d = torch.randn(16, 8)
    a_wide, b_wide = (tf32(x) if dtype == torch.float32 else x for x in (a, b))
    expected = d.double() + a_wide.double() @ b_wide.double().T
    transposed = transposed and dtype != torch.float32
    for seed in SEEDS:
        module.set_seed(seed)
        out = d.clone()
        operators.test_multiply(a, b.T.contiguous() if transposed else b, out, transposed)
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
