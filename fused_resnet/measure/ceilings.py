"""What the device can do at best, measured in the run that is judged by it.

The roofline model (Williams, Waterman, Patterson, CACM 52(4), 2009): a kernel that moves B bytes
and computes F operations takes at least `max(B / copy bandwidth, F / matrix rate)`.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping

import torch

from ..backends import cpu
from ..tuning.problem import Problem
from .clock import synchronize

# On a CPU, data that was last used this many bytes ago is no longer in a core's own cache. The
# copy is measured at this size too, since that is where layers find their inputs.
COLD_BYTES = 64 * 2**20
_COPY_BYTES_GPU = 2 * 2**30
_MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
_ROUNDS = 100
# Calls between two looks at the clock on a GPU, so that waiting for it does not count.
_CALLS_GPU = 5
_SECONDS = 2.0
# Of four products of tiles, half a millisecond of them.
_STEPS = 20000


@dataclasses.dataclass(frozen=True)
class MatrixUnit:
    """A CPU's unit that multiplies tiles, or else pairs of bfloat16 in vectors.

    Attributes:
        name: "amx" or "avx512bf16".
        rates: operations/s, two for a multiply-add, of all threads with operands from the
            first-level cache, by their dtype: "bfloat16", and "int8" where the unit has that.
        products: how many of bfloat16 stand for one of the problem's dtype; None where the unit
            does not run it.
    """

    name: str
    rates: Mapping[str, float]
    products: int | None

    @property
    def rate(self) -> float | None:
        """FLOP/s of the problem's dtype."""
        return None if self.products is None else self.rates["bfloat16"] / self.products

    def better_of(self, other: MatrixUnit) -> MatrixUnit:
        """The higher of each of two measurements."""
        rates = {dtype: max(rate, other.rates[dtype]) for dtype, rate in self.rates.items()}
        return dataclasses.replace(self, rates=rates)


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """The two sides of the roofline.

    Attributes:
        copy_bandwidth: bytes/s, read and written, of a copy between two tensors of `copy_bytes`
            together.
        matrix_rate: FLOP/s of a square matrix product of `matrix_size` in the problem's dtype, on a
            CPU or in float32 where that is faster.
        copy_bytes: see `copy_bandwidth`.
        matrix_size: see `matrix_rate`.
        unit: the processor's matrix unit; None where there is none, or on a GPU.
    """

    copy_bandwidth: float
    matrix_rate: float
    copy_bytes: int
    matrix_size: int
    unit: MatrixUnit | None = None

    def better_of(self, other: Ceilings) -> Ceilings:
        """The higher of each of two measurements."""
        return dataclasses.replace(
            self,
            copy_bandwidth=max(self.copy_bandwidth, other.copy_bandwidth),
            matrix_rate=max(self.matrix_rate, other.matrix_rate),
            unit=self.unit and other.unit and self.unit.better_of(other.unit),
        )

    def least_seconds(self, problem: Problem) -> float:
        """The time that moving a layer's tensors once, and its products, take at the ceilings."""
        by_memory = problem.bytes_once / self.copy_bandwidth
        return max(by_memory, problem.flops / self.matrix_rate)

    def unit_seconds(self, problem: Problem) -> float | None:
        """The time that a layer's products take the matrix unit, with nothing in their way."""
        rate = None if self.unit is None else self.unit.rate
        return None if rate is None else problem.flops / rate


def measure(device: torch.device, dtype: str, *, scale: float = 1.0) -> Ceilings:
    """Measures both ceilings: the best of several runs after a warm-up.

    Args:
        device: where.
        dtype: see `ConvProblem`.
        scale: of both tensors and matrices; 1 but in tests.
    """
    size = max(64, int(scale * _MATRIX_SIZE[device.type]))
    # A CPU without instructions for a 16-bit dtype may compute in float32, and a kernel does.
    dtypes = {dtype, "float32"} if device.type == "cpu" else {dtype}
    rate = max(_matrix_rate(device, one, size) for one in dtypes)
    total = COLD_BYTES if device.type == "cpu" else _COPY_BYTES_GPU
    if device.type == "cuda":
        total = min(total, torch.cuda.mem_get_info(device)[0] // 2)
    length = max(64, int(scale * total / 2))
    source = torch.empty(length, dtype=torch.uint8, device=device).random_(256)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    unit = _matrix_unit(dtype, max(100, int(scale * _STEPS))) if device.type == "cpu" else None
    return Ceilings(bandwidth, rate, 2 * source.numel(), size, unit)


def _matrix_unit(dtype: str, steps: int) -> MatrixUnit | None:
    multiply = torch.ops.fused_resnet.multiply_tiles
    rates = {}
    for operands in ("bfloat16", "int8"):
        if products := multiply(operands, 1):
            products = multiply(operands, steps)
            seconds = _best(lambda: multiply(operands, steps), torch.device("cpu"))  # noqa: B023
            rates[operands] = 2 * products / seconds
    if not rates:
        return None
    element = _element(dtype)
    if tiles := torch.ops.fused_resnet.conv_tile_isa():
        return MatrixUnit(tiles, rates, cpu.tile_products(element))
    products = 1 if element is torch.bfloat16 else None
    return MatrixUnit(torch.ops.fused_resnet.conv_pair_isa(), rates, products)


def _matrix_rate(device: torch.device, dtype: str, size: int) -> float:
    left, right = torch.randn(2, size, size, device=device).to(_element(dtype))
    product = torch.empty_like(left)
    with _matrix_precision(dtype), torch.inference_mode():
        return 2 * size**3 / _best(lambda: torch.mm(left, right, out=product), device)


def _element(dtype: str) -> torch.dtype:
    return {"float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype, torch.float32)


class _matrix_precision:  # noqa: N801
    """Lets float32 matrix products use TF32, or not; `tuner.precision` is of convolutions."""

    def __init__(self, dtype: str) -> None:
        self.wanted = "tf32" if dtype == "tfloat32" else "ieee"

    def __enter__(self) -> None:
        self.before = torch.backends.cuda.matmul.fp32_precision
        torch.backends.cuda.matmul.fp32_precision = self.wanted

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.fp32_precision = self.before


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest run; slow ones are others' doing and say nothing of a ceiling."""
    call()
    calls = _CALLS_GPU if device.type == "cuda" else 1
    best, begin = float("inf"), time.perf_counter()
    for _ in range(_ROUNDS):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        now = time.perf_counter()
        best = min(best, (now - start) / calls)
        if now - begin > _SECONDS:
            break
    return best
