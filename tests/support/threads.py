"""Functions called by several threads at once, and with another number of torch's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


def run_in_threads(function: Callable[[int], Any], count: int = 4) -> list[Any]:
    """What `function(0)`, `function(1)` and so on return, begun together, each in a thread.

    Raises:
        BaseException: what the first of them to fail raised.
    """
    results: list[Any] = [None] * count
    failures: list[BaseException] = []
    begin = threading.Barrier(count)

    def work(index: int) -> None:
        try:
            begin.wait()
            results[index] = function(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results


def with_threads(function: Callable[[], Any], *counts: int) -> list[Any]:
    """What a function returns with so many threads of torch's each."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
    finally:
        torch.set_num_threads(before)
    return results
