"""Candidates timed against each other, those that lose left out early."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from .. import clock

Timer = Callable[[Mapping[str, Callable[[], object]], int], dict[str, list[float]]]
"""Takes calls by name and a number of rounds; returns each call's times in seconds."""

_FIRST_ROUNDS = 3
_LAST_ROUNDS = 25
_FINALISTS = 4
# How much longer than it took the host to queue a call its stream is held; and of what clock, more
# than which no GPU has.
_HOLD = 2
_CYCLES_PER_SECOND = 3e9


def race(
    calls: Mapping[str, Callable[[], object]],
    keep: set[str],
    timer: Timer,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, float]:
    """Successive halving; see this module's docstring.

    Args:
        calls: by name.
        keep: names that stay to the end.
        timer: see `Timer`.
        progress: told which share is done, 0 to 1.

    Returns:
        The finalists' median seconds; empty if there are no calls.
    """
    alive, rounds, done = list(calls), _FIRST_ROUNDS, 0
    # Each stage has half the calls and twice the rounds of the one before.
    stages = math.log2(max(2, len(alive) / _FINALISTS))
    total = stages * len(alive) * _FIRST_ROUNDS + _FINALISTS * _LAST_ROUNDS
    while len(alive) > _FINALISTS:
        times = timer({name: calls[name] for name in alive}, rounds)
        done += len(alive) * rounds
        progress(min(1.0, done / total))
        best = sorted(alive, key=lambda name: statistics.median(times[name]))
        half = set(best[: max(_FINALISTS - 1, len(best) // 2)]) | keep
        if len(half) >= len(alive):
            break
        alive = [name for name in alive if name in half]
        rounds *= 2
    if not alive:
        return {}
    times = timer({name: calls[name] for name in alive}, _LAST_ROUNDS)
    progress(1.0)
    return {name: statistics.median(times[name]) for name in alive}


class EventTimer:
    """Times calls on a GPU by CUDA events, the L2 cache emptied before each.

    What is timed is a replay of the call's CUDA graph, queued in one step while the GPU still
    writes `flush_bytes`: between the events is the GPU's time alone. Python takes longer to queue a
    call of several launches than the GPU to empty its cache, so calls that cannot be captured wait
    for a kernel that spins until all of theirs is queued. In a network the weights are as cold; of
    the activations a part may still be in L2, which this does not credit.
    """

    def __init__(self, device: torch.device, flush_bytes: int) -> None:
        """`flush_bytes` should be several times the L2 cache."""
        self.device = device
        self.scratch = torch.empty(flush_bytes, dtype=torch.uint8, device=device)

    def __call__(
        self, calls: Mapping[str, Callable[[], object]], rounds: int
    ) -> dict[str, list[float]]:
        """See `Timer`."""
        names = list(calls)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in names}
        with torch.cuda.device(self.device):
            queued = {name: self._in_one_step(call) for name, call in calls.items()}
            for turn in range(rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    call, hold_cycles = queued[name]
                    self.scratch.zero_()
                    if hold_cycles:
                        torch.cuda._sleep(hold_cycles)
                    start.record()
                    call()
                    end.record()
                    events[name].append((start, end))
                # Bounds the queue, and lets Ctrl-C in.
                torch.cuda.synchronize(self.device)
        return {
            name: [1e-3 * start.elapsed_time(end) for start, end in pairs]
            for name, pairs in events.items()
        }

    def _in_one_step(self, call: Callable[[], object]) -> tuple[Callable[[], object], int]:
        """What to queue for a call, and for how many cycles to hold the stream meanwhile."""
        call()
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU for something that a capture does not allow.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                call()
        except RuntimeError:
            torch.cuda.synchronize(self.device)
            begun = time.perf_counter()
            call()
            seconds = time.perf_counter() - begun
            torch.cuda.synchronize(self.device)
            return call, int(_HOLD * seconds * _CYCLES_PER_SECOND)
        return graph.replay, 0


def host_timer(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Times calls on the CPU: for trying the tuner out, not for choosing anything."""
    latencies, interrupted = clock.interleave(calls, rounds, torch.device("cpu"), warmup=1)
    if interrupted:
        raise KeyboardInterrupt
    return {
        name: [1e-3 * sample for sample in latency.samples] for name, latency in latencies.items()
    }
