"""The state of the device around a measurement: clocks, temperature, load, energy.

GPU readings come from NVML through `pynvml` (`pip install nvidia-ml-py`); without it, or where a
device does not give a figure, it is None. Nothing here changes a setting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def snapshot(device: torch.device) -> dict[str, float | None]:
    """What the device reports now.

    CPU: `clock_mhz` (mean over processors) and `load_average` (one minute; far above what the
    benchmark itself needs, something else was running).
    CUDA: `clock_mhz`, `memory_clock_mhz`, `temperature_celsius`, `power_watts`, `throttled` (1 if
    the clock is held down by heat or power, else 0).
    """
    if device.type == "cpu":
        return {"clock_mhz": _cpu_clock(), "load_average": _load_average()}
    return {
        "clock_mhz": _nvml(device, lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, 1)),
        "memory_clock_mhz": _nvml(device, lambda nvml, gpu: nvml.nvmlDeviceGetClockInfo(gpu, 2)),
        "temperature_celsius": _nvml(
            device, lambda nvml, gpu: nvml.nvmlDeviceGetTemperature(gpu, 0)
        ),
        "power_watts": _nvml(device, lambda nvml, gpu: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3),
        "throttled": _nvml(device, _throttled),
    }


def joules(call: Callable[[], object], device: torch.device, seconds: float) -> float | None:
    """Energy of one call in joules, from the GPU's counter over `seconds` of calls; or None."""
    before = _millijoules(device)
    if before is None:
        return None
    calls, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        call()
        torch.cuda.synchronize(device)
        calls += 1
    after = _millijoules(device)
    return None if after is None else 1e-3 * (after - before) / calls


def _millijoules(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    return _nvml(device, lambda nvml, gpu: nvml.nvmlDeviceGetTotalEnergyConsumption(gpu))


def _throttled(nvml: Any, gpu: Any) -> float:
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu)
    held_down = (
        nvml.nvmlClocksThrottleReasonSwPowerCap
        | nvml.nvmlClocksThrottleReasonHwSlowdown
        | nvml.nvmlClocksThrottleReasonSwThermalSlowdown
        | nvml.nvmlClocksThrottleReasonHwThermalSlowdown
        | nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown
    )
    return float(bool(reasons & held_down))


def _nvml(device: torch.device, read: Callable[[Any, Any], float]) -> float | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By UUID: NVML numbers the machine's GPUs, torch those of CUDA_VISIBLE_DEVICES.
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return float(read(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    # Not every device, driver and version of pynvml has everything; none may end a benchmark.
    except (pynvml.NVMLError, AttributeError, TypeError, RuntimeError):
        return None


def _cpu_clock() -> float | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return None
