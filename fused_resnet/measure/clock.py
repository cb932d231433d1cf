"""Measuring: interleaved timing with quantiles, and the peak memory of a call."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch


@dataclasses.dataclass(frozen=True)
class Latency:
    """Times of one call in milliseconds, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample, or the mean of the middle two."""
        return statistics.median(self.samples)

    def quantile(self, q: float) -> float:
        """The `q` quantile, 0 to 1, interpolated between neighbouring samples."""
        ordered = sorted(self.samples)
        position = q * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Runs torch's CPU operators on `count` threads inside the block; None leaves them alone."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def kept_bytes(call: Callable[[], object], apart: Iterable[torch.Tensor]) -> int:
    """What a call keeps for its backward pass, in bytes, each storage once.

    Args:
        call: runs the forward pass, and may run the backward pass too.
        apart: tensors whose storages are not counted, the parameters for example.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in apart}
    # Held, so that none is freed and another counted in its place.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in storages.values())


def synchronize(device: torch.device) -> None:
    """Waits for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    *,
    warmup: int = 2,
    settle: float = 0.0,
    on_round: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, Latency], bool]:
    """Times each call once a round, so that a slow spell of the machine falls on all alike.

    Every round starts with the next call in turn. The garbage collector is off meanwhile.
    `settle` is slept before each turn and lets the previous call's idle threads stop spinning,
    for calls that do not share one thread pool. Ctrl-C stops after the last full round.

    Returns:
        The latencies, and whether it was interrupted. Without one full round, KeyboardInterrupt is
        raised again.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    interrupted = False
    collect = gc.isenabled()
    try:
        for call in calls.values():
            for _ in range(warmup):
                call()
        synchronize(device)
        gc.collect()
        gc.disable()
        for done in range(rounds):
            turn = done % len(names)
            times = {}
            for name in names[turn:] + names[:turn]:
                if settle:
                    time.sleep(settle)
                synchronize(device)
                start = time.perf_counter()
                result = calls[name]()
                synchronize(device)
                times[name] = 1e3 * (time.perf_counter() - start)
                del result
            for name in names:
                samples[name].append(times[name])
            on_round(done + 1)
    except KeyboardInterrupt:
        if not all(samples.values()):
            raise
        interrupted = True
    finally:
        if collect:
            gc.enable()
    # A round is recorded whole, so only an interrupt between two appends can leave lengths uneven.
    full = min(map(len, samples.values()))
    return {name: Latency(tuple(times[:full])) for name, times in samples.items()}, interrupted


class PeakMemory:
    """Bytes that running something adds to the memory already held, at the highest point.

    On CUDA this is the caching allocator's count (`torch.cuda.max_memory_allocated`). On the CPU
    it is the process's resident set as Linux counts it (`VmHWM` of /proc/self/status, reset
    through /proc/self/clear_refs; elsewhere `ru_maxrss`, which cannot be reset): every allocator
    counts, torch's, a library's scratch memory and ours, at the price of counting whatever else
    the process does. So measure in a process that does nothing else.
    """

    def __init__(self, device: torch.device) -> None:
        """Takes what is held now as the floor."""
        self.device = device
        gc.collect()
        if device.type == "cuda":
            self.floor = torch.cuda.memory_allocated(device)
        else:
            self.floor = _status_bytes("VmRSS") or _max_rss()

    def restart(self) -> None:
        """Forgets the peak so far, not the floor; call it when one-time work is done."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak since `restart`, above the floor."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status_bytes("VmHWM") or _max_rss()
        return max(0, peak - self.floor)


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    return None


def _max_rss() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
