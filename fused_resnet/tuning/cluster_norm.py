"""Batch norm in one launch by clusters of blocks: what fits, and how long it takes.

The kernels are those of csrc/cuda/batch_norm_cluster.cuh; `partition_of` is cluster_partition_of of
csrc/cuda/batch_norm_cluster.h in Python. Times are predicted: a launch, each tensor's bytes once at
copy bandwidth or, where that takes longer, the instructions for its values, and what it takes the
blocks of a cluster to exchange their sums.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import estimate
from .architecture import KIB, Architecture

BLOCKS = 8  # of a cluster
THREADS = 256
ACCESS_BYTES = 16
LANES = (4, 2)
_LEAST_CAPABILITY = (9, 0)
_ENOUGH_BLOCKS = 128
_RESERVED_BYTES = KIB
_WARPS, _CHANNELS_OF_ACCESS = THREADS // 32, 8
# What warps and blocks combine, and vectors that follow: see ClusterPartition.
_BYTES_TO_COMBINE = 4 * LANES[0] * ((25 * _WARPS + 24) + 5 * _CHANNELS_OF_ACCESS)

# Assumed, since no GPU has run it: two barriers of a cluster, loads from other blocks between them,
# and the way there through a block's own shared memory.
EXCHANGE = 1.0e-6
# Instructions a value, before the exchange and after it, forward and backward: conversions, the
# deviation and its square or product, the merge of rows; the norm, the add and the ReLU.
_INSTRUCTIONS = {"forward": (7, 6), "backward": (8, 7)}
_LANES_OF_MULTIPROCESSOR = 128
_ISSUE_EFFICIENCY = 0.5  # assumed


@dataclass(frozen=True)
class Partition:
    """A tensor's rows and channels, shared out among clusters."""

    lanes: int  # accesses side by side
    rounds: int  # accesses of a thread
    blocks: int
    shared_bytes: int  # of a block


def shared_bytes(tensors: int, rounds: int) -> int:
    """Shared memory of a block that keeps `rounds` accesses a thread of each tensor."""
    return _BYTES_TO_COMBINE + tensors * rounds * THREADS * ACCESS_BYTES


def partition_of(
    rows: int, channels: int, element_size: int, tensors: int, gpu: Architecture
) -> Partition | None:
    """How clusters share a tensor out, or None where they cannot.

    Args:
        rows: values a channel.
        channels: C, innermost in memory.
        element_size: bytes of a value.
        tensors: how many tensors a block keeps, 1 forward and 2 backward.
        gpu: where it runs.
    """
    elements = ACCESS_BYTES // element_size
    if gpu.capability < _LEAST_CAPABILITY or rows == 0 or channels % elements > 0:
        return None
    found = None
    for lanes in LANES:
        rounds = _ceil_div(_ceil_div(rows, BLOCKS), THREADS // lanes)
        blocks = BLOCKS * _ceil_div(channels // elements, lanes)
        shared = shared_bytes(tensors, rounds)
        if shared > gpu.shared_per_block:
            continue
        found = Partition(lanes, rounds, blocks, shared)
        resident = gpu.shared_per_block + _RESERVED_BYTES
        if blocks >= _ENOUGH_BLOCKS and 2 * (shared + _RESERVED_BYTES) <= resident:
            break
    return found


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def fits(rows: int, channels: int, element_size: int, tensors: int, gpu: Architecture) -> bool:
    """Whether a norm runs in one launch; see `partition_of`."""
    return partition_of(rows, channels, element_size, tensors, gpu) is not None


def predicted(
    rows: int,
    channels: int,
    element_size: int,
    passes: tuple[float, float],
    backward: bool,
    gpu: Architecture,
) -> float | None:
    """Seconds of a norm in one launch.

    Args:
        rows: values a channel.
        channels: C.
        element_size: bytes of a value.
        passes: over tensors of this size, before the exchange and after it.
        backward: which direction.
        gpu: where it runs.

    Returns:
        None where it does not run so.
    """
    partition = partition_of(rows, channels, element_size, 1 + backward, gpu)
    if partition is None:
        return None
    values = rows * channels
    used = min(partition.blocks, gpu.multiprocessors)
    rate = _ISSUE_EFFICIENCY * used * _LANES_OF_MULTIPROCESSOR * gpu.clock
    instructions = _INSTRUCTIONS["backward" if backward else "forward"]
    seconds = estimate.LAUNCH + EXCHANGE
    for count, per_value in zip(passes, instructions, strict=True):
        moved = count * values * element_size / gpu.copy_bandwidth
        seconds += max(moved, per_value * values / rate)
    return seconds
