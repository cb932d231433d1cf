"""Plans of the CUDA backend on a device whose runtime is a stub: see cuda_stub.c.

Tensors, streams, the caching allocator and this package's library are real there, but for the
runtime that it is linked with; no kernel runs, and what is launched is compared. What plans compute
is tested where kernels run on the host: test_cuda_plans.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from support import cuda_stub

_CHECKS = "stub_cuda_checks.py"


@functools.cache
def outcomes() -> dict[str, str | None]:
    if (reason := cuda_stub.missing()) is not None:
        pytest.skip(reason)
    if not (parts := cuda_stub.objects()):
        pytest.skip("the CUDA kernels were not built here")
    return cuda_stub.outcomes_of(_CHECKS, parts, 300)


@pytest.mark.parametrize("name", cuda_stub.names_of(_CHECKS))
@pytest.mark.ahead(lambda: outcomes())
def test_on_a_stub(ahead: Callable[[], dict[str, str | None]], name: str) -> None:
    outcome = ahead()
    assert outcome[name] is None, outcome[name]
