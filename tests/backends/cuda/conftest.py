"""Fixtures of the tests of CUDA kernels, which run on a GPU or on the host."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from support import cuda_on_host

from fused_resnet import backends


@pytest.fixture
def guarded_tensors(request: pytest.FixtureRequest) -> Iterator[None]:
    """On the host, tensors end at a page that cannot be accessed."""
    request.node.user_properties.append(("backend", "cuda"))
    with cuda_on_host.guarded() if backends.cuda.on_host() else contextlib.nullcontext():
        yield


@pytest.fixture
def set_seed() -> Iterator[Callable[[int], None]]:
    """Chooses the order of threads and blocks, and when copies arrive; a GPU's is as it is."""
    if not backends.cuda.on_host():
        yield lambda seed: None
        return
    module = cuda_on_host.load()
    yield module.set_seed
    module.set_seed(0)
