"""`fused-resnet doctor`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import _native, backends
from ..backends import self_check
from ..layers import watch
from ..measure import environment
from ..measure.text import plain
from ..modules import plans
from ..tuning import table as tables
from .console import fail


def doctor(
    recheck: Annotated[
        bool, typer.Option("--recheck", help="Forget which kernels were right, to check anew.")
    ] = False,
) -> None:
    """Shows versions, devices, and which backends work and why the others do not."""
    console = Console()
    if recheck:
        console.print(_forgotten(), style="bold")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")

    def section(title: str, rows: Mapping[str, object]) -> None:
        grid.add_row(title, "")
        for name, value in rows.items():
            grid.add_row(plain(f"  {name}"), plain("not found" if value is None else value))

    versions = environment.versions()
    versions["commit"] = environment.commit() or "not a checkout"
    section("versions", {**versions, **environment.compilers()})
    cpu: dict[str, Any] = dict(environment.describe_device(torch.device("cpu")))
    cpu["flags"] = " ".join(cpu["flags"]) or "none of those that matter"
    cpu["threads"] = torch.get_num_threads()
    ops = torch.ops.fused_resnet
    vectors, pairs, tiles = ops.conv_isa(), ops.conv_pair_isa(), ops.conv_tile_isa()
    cpu["convolutions"] = (vectors or "the library's") + (
        f", bfloat16 and large float32 {tiles}" if tiles else f", bfloat16 {pairs}" if pairs else ""
    )
    del cpu["type"]
    section("CPU", cpu)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = environment.describe_device(torch.device("cuda", index))
        del gpu["type"]
        section(f"cuda:{index}", gpu)
    if not count:
        built = torch.version.cuda
        reason = f"built for CUDA {built}, finds no GPU" if built else "built without CUDA"
        section("GPU", {"none": f"torch is {reason}"})
    section("backends", backends.available())
    section("kernels against the library", _checks(count))
    section("environment", _settings())
    section("compiled parts", _compiled_parts())
    console.print(grid)


def _settings() -> dict[str, object]:
    """The environment variables that are read, and what each comes to."""
    settings: dict[str, object] = {}
    for name, result in (
        ("FUSED_RESNET_BACKEND", lambda: backends.check_environment()),
        ("FUSED_RESNET_CPU_ISA", lambda: f"the CPU's kernels use {backends.cpu_isa()}"),
        (watch.VARIABLE, watch.described),
        (plans.VARIABLE, plans.described),
        (self_check.VARIABLE, self_check.described),
        ("FUSED_RESNET_CACHE", lambda: f"tuning tables are in {tables.cache_folder()}"),
    ):
        value = os.environ.get(name)
        text = "not set" if not value else f"{value}, forced" if "CACHE" not in name else value
        try:
            found = result()
        except (ValueError, OSError) as error:
            found = f"error: {error}"
        settings[name] = text if found is None else f"{text}; {found}"
    return settings


def _checks(gpus: int) -> dict[str, object]:
    """What the self-check has found on each device that has kernels to check, and what failed."""
    devices = [torch.device("cuda", index) for index in range(gpus)]
    if not gpus:
        devices = [torch.device("cpu")]
    try:
        found: dict[str, object] = {}
        for device in devices:
            found[str(device)] = self_check.summary(device)
            for family, verdict in self_check.failed(device).items():
                found[f"{device}, not used: {family}"] = verdict
    except ValueError as error:
        return {"error": error}
    return found


def _forgotten() -> str:
    try:
        count = self_check.forget()
    except OSError as error:
        fail(f"the verdicts on kernels cannot be forgotten: {error}", 1)
        raise typer.Exit(1) from None
    return f"forgot {count} verdicts: each kernel is checked again before its next use"


def _compiled_parts() -> dict[str, str]:
    info = _native.build_info()
    cuda = info["cuda"]
    parts = {"_C": f"for {info['machine']}, by {info['compiler']}, against torch {info['torch']}"}
    if cuda is None:
        parts["_cuda"] = f"not built: {info['no_cuda_reason']}"
    else:
        parts["_cuda"] = f"for {', '.join(cuda['architectures'])}, by nvcc {cuda['nvcc']}"
    parts["_cuda loaded"] = _native.cuda_status
    return parts
