"""What the estimate needs to know of a GPU.

Published figures, dense (without sparsity), with float32 accumulation for 16-bit products:

- A100: NVIDIA A100 Tensor Core GPU Architecture (whitepaper V1.0), table 1 and appendix;
  A100 80GB datasheet for its memory.
- H100 SXM5 and PCIe: NVIDIA H100 Tensor Core GPU Architecture (whitepaper V1.04), tables 1 to 3.
- H200: NVIDIA H200 datasheet; the chip is the H100's.
- B200: NVIDIA DGX B200 datasheet, an eighth of the system; multiprocessors, L2 and shared memory
  as measured by Chips and Cheese, "NVIDIA's B200: Keeping the CUDA Juggernaut Rolling" (2025).
- RTX 4090: NVIDIA Ada GPU Architecture (whitepaper V2.02), appendix A.
- RTX 5090: NVIDIA RTX Blackwell GPU Architecture (whitepaper V1.1), appendix A.
- Shared memory per block and per multiprocessor, registers: CUDA C++ Programming Guide, technical
  specifications per compute capability.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from dataclasses import dataclass
from typing import Any

import torch

KIB = 1024
MIB = 1024 * KIB

# Of the published figures, what one H100 reached: a device-to-device copy ran at 3.0 of 3.35 TB/s,
# an 8192-cubed bfloat16 matrix product at 798 of 989 TFLOP/s.
COPY_EFFICIENCY = 0.9
MATRIX_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Architecture:
    """A GPU as the estimate sees it.

    Attributes:
        name: what NVIDIA calls it.
        capability: compute capability.
        multiprocessors: how many are enabled.
        clock: that the tensor cores' rates are published for, Hz.
        shared_per_block: shared memory one program may have, bytes (the opt-in limit).
        shared_per_multiprocessor: shared memory of all programs on one, bytes.
        registers_per_multiprocessor: 32-bit registers.
        threads_per_multiprocessor: how many may be resident.
        l2_bytes: L2 cache.
        bandwidth: of the memory as published, bytes/s.
        float16: FLOP/s on tensor cores, bfloat16 alike.
        tfloat32: FLOP/s on tensor cores.
        float32: FLOP/s outside them.
    """

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    clock: float
    shared_per_block: int
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int
    threads_per_multiprocessor: int
    l2_bytes: int
    bandwidth: float
    float16: float
    tfloat32: float
    float32: float

    def rate(self, dtype: str) -> float:
        """FLOP/s to expect of a large matrix product in a problem's dtype."""
        published = {"tfloat32": self.tfloat32, "float32": self.float32}.get(dtype, self.float16)
        return MATRIX_EFFICIENCY * published

    @property
    def copy_bandwidth(self) -> float:
        """Bytes/s to expect of a kernel that only moves memory."""
        return COPY_EFFICIENCY * self.bandwidth


_HOPPER = (9, 0)
_H100 = Architecture(
    "H100", _HOPPER, 132, 1.83e9, 227 * KIB, 228 * KIB, 65536, 2048, 50 * MIB,
    3.35e12, 989.4e12, 494.7e12, 66.9e12,
)  # fmt: skip

ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "A100", (8, 0), 108, 1.41e9, 163 * KIB, 164 * KIB, 65536, 2048, 40 * MIB,
            2.039e12, 312e12, 156e12, 19.5e12,
        ),
        _H100,
        dataclasses.replace(
            _H100, name="H100 PCIe", multiprocessors=114, clock=1.62e9, bandwidth=2.0e12,
            float16=756e12, tfloat32=378e12, float32=51.2e12,
        ),
        dataclasses.replace(_H100, name="H200", bandwidth=4.8e12),
        Architecture(
            "B200", (10, 0), 148, 1.85e9, 227 * KIB, 228 * KIB, 65536, 2048, 126 * MIB,
            8.0e12, 2250e12, 1125e12, 75e12,
        ),
        Architecture(
            "RTX 4090", (8, 9), 128, 2.52e9, 99 * KIB, 100 * KIB, 65536, 1536, 72 * MIB,
            1.008e12, 165.2e12, 82.6e12, 82.6e12,
        ),
        Architecture(
            "RTX 5090", (12, 0), 170, 2.407e9, 99 * KIB, 100 * KIB, 65536, 1536, 96 * MIB,
            1.792e12, 209.5e12, 104.8e12, 104.8e12,
        ),
    )
}  # fmt: skip

# Of the names CUDA gives them; the first that matches.
_NAMES = (
    (r"A100", "A100"),
    (r"H100 PCIe", "H100 PCIe"),
    (r"H100", "H100"),
    (r"H200", "H200"),
    (r"B200", "B200"),
    (r"RTX 4090$", "RTX 4090"),
    (r"RTX 5090$", "RTX 5090"),
)


def named(name: str) -> Architecture:
    """One of `ARCHITECTURES`, case, spaces and dashes aside.

    Raises:
        ValueError: there is none of that name.
    """
    wanted = _plain(name)
    for architecture in ARCHITECTURES.values():
        if _plain(architecture.name) == wanted:
            return architecture
    raise ValueError(f"GPU is {name!r}, must be one of {', '.join(ARCHITECTURES)}")


def of_device(device: torch.device) -> Architecture:
    """The GPU a device is; for the CPU, where kernels are interpreted, the H100."""
    if device.type != "cuda":
        return _H100
    index = torch.cuda.current_device() if device.index is None else device.index
    return _of_index(index)


@functools.cache
def _of_index(index: int) -> Architecture:
    return of_properties(torch.cuda.get_device_properties(index))


def of_properties(properties: Any) -> Architecture:
    """The GPU that `torch.cuda.get_device_properties` describes.

    Sizes are the device's own. Speeds are the published ones of its product, scaled to the
    multiprocessors it has (a MIG slice has fewer); of an unknown product, those of the known one
    whose compute capability is closest, scaled to multiprocessors and clock.
    """
    known = next(
        (ARCHITECTURES[name] for pattern, name in _NAMES if re.search(pattern, properties.name)),
        None,
    )
    model = known or _closest(properties)
    scale = properties.multi_processor_count / model.multiprocessors
    clock = model.clock
    if known is None and properties.clock_rate > 0:
        clock = 1e3 * properties.clock_rate
        scale *= clock / model.clock
    # Two transfers a cycle. Some drivers report no clock.
    bandwidth = 2e3 * properties.memory_clock_rate * properties.memory_bus_width / 8
    if bandwidth <= 0:
        bandwidth = model.bandwidth * (1 if known else min(1.0, scale))
    return Architecture(
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        clock=clock,
        shared_per_block=properties.shared_memory_per_block_optin,
        shared_per_multiprocessor=properties.shared_memory_per_multiprocessor,
        registers_per_multiprocessor=properties.regs_per_multiprocessor,
        threads_per_multiprocessor=properties.max_threads_per_multi_processor,
        l2_bytes=properties.L2_cache_size,
        bandwidth=bandwidth,
        float16=scale * model.float16,
        tfloat32=scale * model.tfloat32,
        float32=scale * model.float32,
    )


def _closest(properties: Any) -> Architecture:
    """The known GPU of the same kind (server or desktop: as much shared memory) and nearest age."""

    def distance(one: Architecture) -> tuple[bool, int]:
        other_kind = one.shared_per_block != properties.shared_memory_per_block_optin
        major, minor = one.capability
        return other_kind, abs(10 * (properties.major - major) + properties.minor - minor)

    return min(ARCHITECTURES.values(), key=distance)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()
