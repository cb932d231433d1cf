"""The kernels of a network's first pass, compiled side by side before it runs.

Otherwise each is compiled when it is first launched, one after the other: of a ResNet-50 some 20
that take half a second each.
"""

from __future__ import annotations

import concurrent.futures
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import triton

from .. import self_check
from . import launch

# Seconds after which somebody who waits is told what for.
PATIENCE = 2.0
_MOST_THREADS = 8


def compile_ahead(run: Callable[[], object]) -> int:
    """Compiles what a pass will launch; what does not compile, the pass itself will say.

    Args:
        run: the pass. It goes through here once with launches left out, so that its values mean
            nothing, and without the self-check of kernels.

    Returns:
        How many kernels were compiled, or found in Triton's cache on disk.
    """
    with launch.collected() as wanted, self_check.postponed():
        run()
    begun = time.monotonic()
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with (
        ThreadPoolExecutor(threads, "fused_resnet") as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True) as mode,
    ):
        for kernel, grid, arguments, constants in wanted:
            kernel.warmup(*arguments, grid=grid, **constants)
        count = len(mode.raw_futures)
        if concurrent.futures.wait(mode.raw_futures, PATIENCE).not_done:
            print(
                f"fused_resnet: compiling {count} Triton kernels for this GPU, kept for later",
                end="", file=sys.stderr, flush=True,
            )  # fmt: skip
            concurrent.futures.wait(mode.raw_futures)
            print(f": {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    return count
