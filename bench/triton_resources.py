"""What can be known of the Triton kernels without a GPU: what every one of them compiles to.

Compiles each kernel with each tile that may be chosen for it, exactly as a launch on a residual
network's shapes would (dtypes, alignment, constants), and writes what came out to
`bench/results/static/triton-<version>.json`:

    {"schema": "fused_resnet.static/1", "triton": "3.9.0", "torch": "2.15.0", "entries": [{
        "kernel": "conv_kernel", "layer": "3x3", "dtype": "float16", "architecture": "sm_90",
        "block_m": 128, ..., "num_stages": 3, "split": false,
        "registers": 168, "spilled_bytes": 0, "shared_bytes": 98304,
        "programs_per_multiprocessor": 2, "occupancy": 0.25,
        "instructions": 1100, "tensor_core": {"HGMMA": 4},
        "global_loads": {"LDGSTS.128": 24, "LDG.128": 8}, "global_stores": {"STG.128": 8}}]}

A norm's `block_m` are rows (slabs, where these are combined), its `block_n` channels.
`spilled_bytes` is a thread's stack, and `occupancy` the share of a multiprocessor's threads that
registers, shared memory and threads allow to be resident. Loads and stores are counted by their
width in bits; those of 32 bits have no suffix.

    python bench/triton_resources.py [--architecture sm_90] [--dtype float16] [--missing]

Which tiles spill nothing is known only from compiling them: with `--tiles chain`, this compiles all
of `fused_resnet.tuning.chain.SHAPES`, with `--tiles pair` all of `PAIR_SHAPES`, with `--tiles conv`
the largest of `fused_resnet.tuning.estimate`, with `--tiles prologue` those of
`fused_resnet.tuning.prologue`, and writes what came out of it to
`fused_resnet/tuning/compiled/triton-<version>.json` (see `fused_resnet/tuning/compiler.py`). To be
run with every version of Triton that is supported; all four take a quarter of an hour.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.errors import OutOfResources

from fused_resnet.backends.triton import (
    bottleneck,
    chains,
    conv,
    folded,
    quantized,
    stem,
    training_conv,
)
from fused_resnet.backends.triton import launch as launcher
from fused_resnet.backends.triton import norm as batch_norm
from fused_resnet.backends.triton import problem as problems
from fused_resnet.backends.triton.problem import tile_for
from fused_resnet.backends.triton.training_conv import Ends
from fused_resnet.layers.description import ConvNorm, Norm, Sums
from fused_resnet.layers.quantized import Quantization, QuantizedBlock, QuantizedConv
from fused_resnet.tuning import chain, compiler, estimate, prologue, training
from fused_resnet.tuning.architecture import ARCHITECTURES, Architecture
from fused_resnet.tuning.choice import CHAIN, PAIR, Tile
from fused_resnet.tuning.estimate import best, candidates
from fused_resnet.tuning.problem import CHAIN_DTYPES, ChainProblem, ConvProblem, Problem

GPUS = {"sm_80": "A100", "sm_90": "H100", "sm_100": "B200", "sm_120": "RTX 5090"}
DTYPES = ("float16", "tfloat32", "float32", "bfloat16")
RESULTS = Path(__file__).parent / "results" / "static"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.uint8: "u8"}
_TYPES |= {torch.int8: "i8", torch.int32: "i32", torch.float8_e4m3fn: "fp8e4nv"}
_BATCHES = (1, 32, 256)
_POOL = (3, 3, 2, 2, 1, 1)
# Begins the names of what is compiled for launches in a row.
_ROW = "row, "
CONV = "conv"
PROLOGUE = "prologue"
# Of a thread in float16: with fewer, a tile does not spill in another type.
_SAFE_REGISTERS = 200
# Major compute capabilities whose pairs are compiled.
_PAIRS = (9,)


@dataclass(frozen=True)
class Layer:
    """A convolution as residual networks have it, on images of `size` squared."""

    C: int
    K: int
    size: int
    kernel: int
    stride: int = 1
    groups: int = 1
    residual: bool = False
    pool: bool = False

    def problem(self, batch: int, dtype: str) -> ConvProblem:
        """The layer at a batch size."""
        pair = (self.stride, self.stride)
        padding = (self.kernel // 2, self.kernel // 2)
        return ConvProblem(
            batch, self.C, self.size, self.size, self.K, self.kernel, self.kernel, pair, padding,
            (1, 1), self.groups, dtype, self.residual, _POOL if self.pool else None,
        )  # fmt: skip


# One of each way a kernel is compiled; tiles depend on channel counts too, hence the twins.
LAYERS = {
    "1x1": [Layer(64, 256, 56, 1, residual=True), Layer(512, 2048, 7, 1, residual=True)],
    "1x1, stride 2": [Layer(256, 512, 56, 1, stride=2), Layer(1024, 2048, 14, 1, stride=2)],
    "3x3": [Layer(64, 64, 56, 3, residual=True), Layer(512, 512, 7, 3, residual=True)],
    "wide groups": [Layer(1024, 1024, 14, 3, groups=32), Layer(2048, 2048, 7, 3, groups=32)],
    "groups of 4": [Layer(128, 128, 56, 3, groups=32)],
    "groups of 8": [Layer(256, 256, 28, 3, groups=32)],
    "groups of 16": [Layer(512, 512, 14, 3, groups=32)],
    "stem": [Layer(3, 64, 224, 7, stride=2)],
    "stem and pool": [Layer(3, 64, 224, 7, stride=2, pool=True)],
}


# Rows and columns of the images that a width meets in ResNet-50; a projection's are twice as many
# behind the first stage.
_SIZES = {64: 56, 128: 28, 256: 14, 512: 7}


def chain_problem(
    width: int, projected: bool, next_width: int, batch: int, dtype: str
) -> ChainProblem:
    """A block of ResNet-50, or one as much like it as can be."""
    K, size = 4 * width, _SIZES[width]
    stride = 2 if projected and width > 64 else 1
    C = 64 if width == 64 else K // 2
    size *= stride
    pair = (stride, stride)
    return ChainProblem(
        batch, width, size, size, K, pair, (1, 1), (1, 1), dtype,
        (C, size, size, *pair) if projected else None, next_width,
    )  # fmt: skip


def chain_kinds(kernel: str = CHAIN) -> Iterator[tuple[int, bool, int]]:
    """Width, whether the shortcut is projected, and next width: what a chain is compiled for."""
    for (width, projected), nexts in chain.NEXT_WIDTHS.items():
        for next_width in nexts:
            if kernel == CHAIN or (next_width and width in chain.PAIR_SHAPES):
                yield width, projected, next_width


def chain_name(problem: ChainProblem, kernel: str = CHAIN) -> str:
    """How the report names it: "chain 64, projected, next 64"."""
    projected = "" if problem.projection is None else ", projected"
    following = f", next {problem.next_width}" if problem.next_width else ""
    return f"{kernel} {problem.width}{projected}{following}"


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is compiled for."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True


def configurations(dtype: str, gpu: Architecture) -> dict[tuple[str, Tile], Problem]:
    """Every (layer, tile) to compile, with a problem that the tile may be chosen for.

    Every tile is compiled for 1x1 and 3x3 layers and for the stem. The other layers of
    `conv_kernel` differ from these in a few instructions of address arithmetic, and bfloat16 from
    float16 in the type of some, so of them only what the estimate picks is.
    All split sums of a tile count as one of four shares, and as the same for 1x1 and 3x3.
    """
    found: dict[tuple[str, Tile], Problem] = {}
    for kind in chain_kinds() if dtype in CHAIN_DTYPES else ():
        for batch in _BATCHES:
            problem = chain_problem(*kind, batch, dtype)
            picked = chain.untuned(problem, gpu).tile
            every = chain.tiles(problem, gpu)
            for tile in every if dtype == "float16" else [picked] * (picked in every):
                found[chain_name(problem), tile] = problem
            for tile in chain.pair_tiles(problem, gpu) if dtype == "float16" else ():
                shared = replace(tile, split_k=4 if tile.split_k > 1 else 1)
                found[chain_name(problem, PAIR), shared] = problem
    for name, layers in LAYERS.items():
        for layer in layers:
            for batch in _BATCHES:
                problem = layer.problem(batch, dtype)
                every = name in ("1x1", "3x3", "stem and pool") and dtype != "bfloat16"
                for tile in candidates(problem, gpu) if every else [best(problem, gpu)]:
                    values = asdict(tile_for(problem, tile))
                    if tile.split_k > 1:
                        if name == "1x1":
                            continue
                        values["split_k"] = 4
                    # The deepest problem is kept: its channels fill every block.
                    found[name, Tile(**values)] = problem
    if dtype in CHAIN_DTYPES and gpu.capability[0] in chain.OVERLAPPING:
        found |= row_configurations(dtype, gpu)
    return found


def row_configurations(dtype: str, gpu: Architecture) -> dict[tuple[str, Tile], Problem]:
    """What the estimate picks for launches in a row, which are compiled to wait for each other."""
    found: dict[tuple[str, Tile], Problem] = {}
    for kind in chain_kinds():
        for batch in range(1, chain.OVERLAPPED_IMAGES + 1):
            problem = chain_problem(*kind, batch, dtype)
            choice = chain.untuned(problem, gpu)
            if choice.kernel in (CHAIN, PAIR):
                split = 4 if choice.tile.split_k > 1 else 1
                name = f"{_ROW}{chain_name(problem, choice.kernel)}"
                found[name, replace(choice.tile, split_k=split)] = problem
            for part in problem.parts:
                tile = tile_for(part, best(part, gpu))
                split = 4 if tile.split_k > 1 else 1
                stride = ", stride 2" if part.stride != (1, 1) else ""
                name = f"{_ROW}{part.R}x{part.S}{stride}"
                found[name, replace(tile, split_k=split)] = part
    return found


def recorder(recorded: list[Launch], dependent: bool = False) -> Any:
    """What takes the place of the backend's `launch_kernel`, to record instead."""

    def record(
        _: Any, kernel: Any, grid: Any, arguments: tuple, num_warps: int, num_stages: int = 3,
        writes: Any = None, partly: Any = None, enable_fp_fusion: bool = True, **constants: Any,
    ) -> None:  # fmt: skip
        if "DEPENDENT" in kernel.arg_names:
            constants["DEPENDENT"] = dependent
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        signature, divisible = {}, []
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + _TYPES[value.dtype]
                divisible.append(name)
            elif value is None or (isinstance(value, int) and value == 1):
                constants[name] = value
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32" if value < 2**31 else "i64"
                if value % 16 == 0:
                    divisible.append(name)
        recorded.append(
            Launch(
                kernel, tuple(signature.items()), tuple(constants.items()), tuple(divisible),
                num_warps, num_stages, enable_fp_fusion,
            )
        )  # fmt: skip

    return record


def launches(
    problem: Problem,
    tile: Tile,
    kernel: str = CHAIN,
    dependent: bool = False,
    prologue: bool = False,
    together: bool = False,
    activation: str = "relu",
) -> list[Launch]:
    """What a call of the backend would launch, found by making one with fake tensors.

    Args:
        problem: to be run.
        tile: what with.
        kernel: of a chain's problem "chain" or "pair".
        dependent: whether the launches are those of a row; see `conv_kernels.py`.
        prologue: whether the input of a convolution is normalised on its way.
        together: whether it has norms that are folded, and tickets, as within `folded.shared`.
        activation: behind a convolution.
    """
    recorded: list[Launch] = []
    dtype = torch.float32 if problem.dtype == "tfloat32" else getattr(torch, problem.dtype)
    precision = "tf32" if problem.dtype == "tfloat32" else "ieee"
    asking = (conv, stem, problems)
    kept = launcher.launch_kernel, conv.precision
    token = folded.current.set(_Together() if together else None)
    launcher.launch_kernel = recorder(recorded, dependent)
    for module in asking:
        module.precision = lambda _: precision
    try:
        with FakeTensorMode(), torch.device("cuda"):
            if isinstance(problem, ChainProblem):
                _launch_chain(problem, tile, dtype, kernel)
                return recorded
            group_c = problem.C // problem.groups
            x = torch.empty(problem.N, problem.H, problem.W, problem.C, dtype=dtype)
            w = torch.empty(problem.K, problem.R, problem.S, group_c, dtype=dtype)
            per_channel = [torch.empty(problem.K) for _ in range(4)]
            geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
            norm = Norm(*per_channel, 1e-5)
            layer = ConvNorm(w.permute(0, 3, 1, 2), norm, None, *geometry)
            x = x.permute(0, 3, 1, 2)
            if problem.pool is not None:
                stem.conv_bn_act_max_pool(x, layer, activation, tile)
            else:
                residual = None
                if problem.residual:
                    shape = (problem.N, problem.P, problem.Q, problem.K)
                    residual = torch.empty(shape, dtype=dtype).permute(0, 3, 1, 2)
                table = torch.empty(3, problem.C) if prologue else None
                conv.conv_bn_act(x, layer, residual, activation, tile, table)
    finally:
        launcher.launch_kernel, library_precision = kept
        folded.current.reset(token)
        for module in asking:
            module.precision = library_precision
    return recorded


class _Together:
    """`folded.Shared` of any norms."""

    taken = 0

    @property
    def tickets(self) -> torch.Tensor:
        return torch.empty(folded.TICKETS, dtype=torch.int32)

    def vectors(self, norm: Norm, _: object) -> tuple[torch.Tensor, torch.Tensor]:
        scale, shift = torch.empty(2, norm.mean.numel()).unbind()
        return scale, shift


def _launch_chain(problem: ChainProblem, tile: Tile, dtype: torch.dtype, kernel: str) -> None:
    """Calls the launcher of a chain with tensors of its sizes."""

    def pixels(N: int, C: int, H: int, W: int) -> torch.Tensor:
        return torch.empty(N, H, W, C, dtype=dtype).permute(0, 3, 1, 2)

    def layer(part: ConvProblem | None) -> ConvNorm | None:
        if part is None:
            return None
        norm = Norm(*(torch.empty(part.K) for _ in range(4)), 1e-5)
        weight = pixels(part.K, part.C, part.R, part.S)
        return ConvNorm(weight, norm, None, part.stride, part.padding, part.dilation, 1)

    of_input, last = problem.convolution, problem.expand
    shortcut = pixels(problem.N, problem.K, problem.P, problem.Q)
    if problem.projection is not None:
        shortcut = pixels(problem.N, *problem.projection[:3])
    size = (problem.H, problem.W)
    if kernel == PAIR:
        of_input, size = None, (problem.P, problem.Q)
    bottleneck.bottleneck(
        pixels(problem.N, problem.width, *size), shortcut, layer(of_input), layer(last),
        layer(problem.project), layer(problem.reduce), chains.tile_for(problem, tile),
    )  # fmt: skip


def norm_launches(dtype: str) -> dict[str, list[Launch]]:
    """What batch norm in training launches forward and backward, with a shortcut and without."""
    found: dict[str, list[Launch]] = {"norm": [], "norm, add": []}
    kept = batch_norm.launch_kernel
    try:
        with FakeTensorMode(), torch.device("cuda"):
            x, grad = torch.empty(2, 64, 56, 56, 256, dtype=getattr(torch, dtype)).unbind(0)
            x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
            vectors = [torch.empty(256) for _ in range(4)]
            norm = Norm(*vectors, 1e-5)
            for layer, recorded in found.items():
                batch_norm.launch_kernel = recorder(recorded)
                add = layer == "norm, add"
                residual = grad if add else None
                batch_norm.batch_norm_act_training(x, *vectors[:2], 1e-5, residual, "relu")
                batch_norm.batch_norm_act_backward(
                    grad, x, residual, norm, "relu", True, (True, True, True, add)
                )
    finally:
        batch_norm.launch_kernel = kept
    return found


def masked_norm_launches(dtype: str) -> list[Launch]:
    """What goes through tensors where two norms meet in an add whose mask is kept as bits."""
    recorded: list[Launch] = []
    kept = batch_norm.launch_kernel
    try:
        batch_norm.launch_kernel = recorder(recorded)
        with FakeTensorMode(), torch.device("cuda"):
            x, grad = torch.empty(2, 64, 56, 56, 256, dtype=getattr(torch, dtype)).unbind(0)
            x, grad = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
            norm = Norm(*(torch.empty(256) for _ in range(4)), 1e-5)
            _, mask, _, _ = batch_norm.batch_norm_add_relu(x, norm, grad, norm)
            for residual in (False, True):
                batch_norm.batch_norm_act_backward(
                    grad, x, mask, norm, "relu", True, (True, True, True, residual)
                )
            batch_norm.batch_norm_add_relu_backward(grad, mask, x, norm, grad, norm)
    finally:
        batch_norm.launch_kernel = kept
    return [launch for launch in recorded if "combine" not in launch.kernel.__name__]


def stem_training_launches(dtype: str) -> list[Launch]:
    """What a stem launches in training for its pool, beside the norm: forward, then backward."""
    recorded: list[Launch] = []
    pool = ((3, 3), (2, 2), (1, 1))
    kept = launcher.launch_kernel
    try:
        launcher.launch_kernel = recorder(recorded)
        with FakeTensorMode(), torch.device("cuda"):
            x = torch.empty(64, 112, 112, 64, dtype=getattr(torch, dtype)).permute(0, 3, 1, 2)
            norm = Norm(*(torch.empty(64) for _ in range(4)), 1e-5)
            out, offsets = stem.norm_relu_max_pool(x, norm, pool)
            stem.max_pool_backward(out, offsets, x.shape[2:], pool)
    finally:
        launcher.launch_kernel = kept
    return recorded


def training_conv_launches(dtype: str) -> dict[str, list[Launch]]:
    """Convolutions of a training step with norms at their ends, with every tile for these ends."""
    made = getattr(torch, dtype)
    found: dict[str, list[Launch]] = {}
    C, K, one = 256, 512, (1, 1)

    def pixels(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=made).to(memory_format=torch.channels_last)

    kept = launcher.launch_kernel
    try:
        with FakeTensorMode(), torch.device("cuda"):
            low, high = (Norm(*(torch.empty(n) for _ in range(4)), 1e-5) for n in (C, K))
            sums = Sums(torch.empty(K), torch.empty(K), 7)
            x, y = pixels(32, C, 28, 28), pixels(32, K, 28, 28)
            for R in (1, 3):
                w, around = pixels(K, C, R, R), (R // 2, R // 2)
                for prologue, tiles in training.TILES.items():
                    name = f"{R}x{R}, {prologue}"
                    for tile in tiles:
                        recorded = found.setdefault(name, [])
                        launcher.launch_kernel = recorder(recorded)
                        geometry = (one, around, one, 1)
                        backward = functools.partial(
                            training_conv.backward_input, y, w, x.shape[2:], geometry, tile=tile
                        )
                        if prologue != "gradient":
                            norm = low if prologue == "norm" else None
                            training_conv.forward(x, w, None, geometry, norm, tile)
                        elif R == 1:
                            backward(ends=Ends(above=(y, high, sums), below=(x, low)))
                        if prologue == "none":
                            backward(ends=Ends(below=(x, low)))
                            mask = torch.empty(x.numel() // 8, dtype=torch.uint8)
                            backward(ends=Ends(x, mask))
    finally:
        launcher.launch_kernel = kept
    kernel = training_conv.training_conv_kernel
    return {
        name: [launch for launch in recorded if launch.kernel is kernel]
        for name, recorded in found.items()
    }


def byte_launches(batch: int, dtype: torch.dtype = torch.int8) -> list[Launch]:
    """What residual blocks in eight bits launch: ResNet-50's first two of each stage, alike once.

    In int8, or float8_e4m3fn, which Triton compiles for compute capability 8.9 and later.

    The last block's output is float16, as is the first one's input.
    """
    recorded: list[Launch] = []

    def conv(channels: int, filters: int, size: int, stride: int = 1) -> QuantizedConv:
        weight = torch.empty(filters, channels, size, size, dtype=dtype)
        vectors = torch.empty(2, filters).unbind()
        return QuantizedConv(weight, *vectors, (stride,) * 2, (size // 2,) * 2, (1, 1), 1)

    kept = launcher.launch_kernel
    try:
        launcher.launch_kernel = recorder(recorded)
        with FakeTensorMode(), torch.device("cuda"):
            x = torch.empty(batch, 64, 56, 56, dtype=torch.float16)
            x, blocks, channels = x.to(memory_format=torch.channels_last), [], 64
            for width in (64, 128, 256, 512):
                for stride in (1 if width == 64 else 2, 1):
                    has_projection = channels != 4 * width
                    convs = [conv(channels, width, 1), conv(width, width, 3, stride)]
                    convs.append(conv(width, 4 * width, 1))
                    if has_projection:
                        convs.append(conv(channels, 4 * width, 1, stride))
                    channels = 4 * width
                    blocks.append(QuantizedBlock(tuple(convs), has_projection, 0.5))
            stored = Quantization(0.125, 3 if dtype == torch.int8 else 0)
            quantized.residual_blocks(x, blocks, stored, Quantization(0.125))
    finally:
        launcher.launch_kernel = kept
    return list(dict.fromkeys(recorded))


def compiled(launch: Launch, architecture: str, order: bool = False) -> dict[str, Any]:
    """What a launch's kernel becomes on an architecture: see this module's docstring.

    With `order`, also what touches memory and what waits for other launches, as it stands in the
    machine code: see `order_of`.
    """
    kernel, registers, spilled = _built(launch, architecture)
    listing = _cuobjdump(kernel, "-sass")
    shared = kernel.metadata.shared
    programs = resident(ARCHITECTURES[GPUS[architecture]], launch.num_warps, registers, shared)
    threads = 32 * launch.num_warps
    return {
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": shared,
        "programs_per_multiprocessor": programs,
        "occupancy": programs
        * threads
        / ARCHITECTURES[GPUS[architecture]].threads_per_multiprocessor,
        **instructions(listing),
        **({} if launch.enable_fp_fusion else {"multiply_adds": listing.count(" FFMA")}),
        **({"order": order_of(listing)} if order else {}),
    }


def resources(launch: Launch, architecture: str) -> tuple[int, int, int]:
    """Registers, spilled bytes and bytes of shared memory of a launch's kernel."""
    kernel, registers, spilled = _built(launch, architecture)
    return registers, spilled, kernel.metadata.shared


def _built(launch: Launch, architecture: str) -> tuple[Any, int, int]:
    """A launch's kernel as compiled for an architecture, a thread's registers and its stack."""
    names = launch.kernel.arg_names
    place = {name: (names.index(name),) for name in names}
    constants = dict(launch.constants)
    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature) | dict.fromkeys(constants, "constexpr"),
        constexprs={place[name]: value for name, value in constants.items()},
        attrs={place[name]: [["tt.divisibility", 16]] for name in launch.divisible},
    )
    capability = int(architecture.removeprefix("sm_"))
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    options["enable_fp_fusion"] = launch.enable_fp_fusion
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _cuobjdump(kernel, "-res-usage")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    return kernel, registers, stack


def _cuobjdump(kernel: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [_TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def order_of(listing: str) -> list[str]:
    """The instructions of a listing that load, store, prefetch, trigger or wait, in its order.

    "prefetch" asks for memory in L2, "trigger" lets the next launch begin, "wait" waits for the
    last one.
    """
    kinds = {
        "UBLKPF": "prefetch", "PREEXIT": "trigger", "ACQBULK": "wait", "LDG": "load",
        "LDGSTS": "load", "UBLKCP": "load", "UTMALDG": "load", "STG": "store", "UTMASTG": "store",
    }  # fmt: skip
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+).*?;", listing)
    return [kinds[base] for name in found if (base := name.split(".")[0]) in kinds]


def resident(gpu: Architecture, num_warps: int, registers: int, shared: int) -> int:
    """Programs that one multiprocessor holds at once.

    Registers are handed out to a warp 256 at a time; the driver takes 1 KiB of every program's
    shared memory (CUDA C++ Programming Guide, technical specifications).
    """
    a_warp = -(-32 * registers // 256) * 256
    return min(
        gpu.threads_per_multiprocessor // (32 * num_warps),
        gpu.registers_per_multiprocessor // (a_warp * num_warps),
        gpu.shared_per_multiprocessor // (shared + 1024),
    )


def instructions(listing: str) -> dict[str, Any]:
    """Counts of what matters in a listing of machine code."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+).*?;", listing)
    counts: dict[str, Counter[str]] = {
        "tensor_core": Counter(),
        "global_loads": Counter(),
        "global_stores": Counter(),
    }
    for name in found:
        base = name.split(".")[0]
        width = re.search(r"\.(U?8|U?16|64|128)\b", name)
        wide = base + (f".{width[1]}" if width else "")
        if re.fullmatch(r"[HI]G?MMA|UTC\w*MMA", base):
            counts["tensor_core"][base] += 1
        elif base in ("LDG", "LDGSTS"):
            counts["global_loads"][wide] += 1
        elif base == "STG":
            counts["global_stores"][wide] += 1
    return {"instructions": len(found), **{k: dict(sorted(v.items())) for k, v in counts.items()}}


def entries(architecture: str, dtype: str, present: set[tuple[str, Tile]]) -> Any:
    """Yields the report's entries for an architecture and dtype, but for those present."""
    gpu = ARCHITECTURES[GPUS[architecture]]
    seen = set()
    for (layer, tile), problem in configurations(dtype, gpu).items():
        if (layer, tile) in present:
            continue
        kernel = PAIR if PAIR in layer.split() else CHAIN
        for launch in launches(problem, tile, kernel, dependent=layer.startswith(_ROW)):
            if launch in seen:
                continue
            seen.add(launch)
            values = asdict(tile)
            split = values.pop("split_k") > 1
            yield {
                "kernel": launch.kernel.fn.__name__,
                "layer": layer,
                "dtype": dtype,
                "architecture": architecture,
                **values,
                "split": split,
                **compiled(launch, architecture),
            }
    kept = {layer for layer, _ in present}
    yield from norm_entries(architecture, dtype, lambda layer: layer not in kept)


def norm_entries(architecture: str, dtype: str, wanted: Callable[[str], bool]) -> Any:
    """Yields the norms' entries, of the layers that are wanted."""
    if dtype == "tfloat32":  # norms have no products
        return
    seen = set()
    for layer, found in norm_launches(dtype).items():
        for launch in found:
            kernel, constants = launch.kernel.fn.__name__, dict(launch.constants)
            if launch in seen or not wanted(layer):
                continue
            seen.add(launch)
            yield {
                "kernel": kernel,
                "layer": layer,
                "dtype": dtype,
                "architecture": architecture,
                "block_m": constants.get("BLOCK_R") or constants["BLOCK_S"],
                "block_n": constants["BLOCK_C"],
                "block_k": 1,
                "num_warps": launch.num_warps,
                "num_stages": launch.num_stages,
                "split": False,
                **compiled(launch, architecture),
            }


def write_tiles(architectures: Iterable[str], kernels: Iterable[str]) -> None:
    """Compiles every tile of chains, of pairs or of convolutions and writes down what spills.

    What the record of the running Triton has of other architectures and kernels is kept.
    """
    version = ".".join(triton.__version__.split(".")[:2])
    kept = compiler.Compiled(
        version, dict.fromkeys((CHAIN, PAIR, CONV), frozenset()), {}, {}, frozenset()
    )
    if version in compiler.known():
        kept = compiler.recorded(version)
    gpus = {name: ARCHITECTURES[GPUS[name]] for name in architectures}
    majors = {gpu.capability[0] for gpu in gpus.values()}
    tables = {CHAIN: (chain.SHAPES, dict(kept.chain)), PAIR: (chain.PAIR_SHAPES, dict(kept.pair))}
    spilled = set(kept.spilled)
    path = compiler.FOLDER / f"triton-{version}.json"
    for kernel, (shapes, found) in tables.items():
        if kernel in kernels:
            for kind in [kind for kind in found if kind[0] in majors]:
                del found[kind]
            for name, gpu in gpus.items():
                if kernel == PAIR and gpu.capability[0] not in _PAIRS:
                    continue
                for kind in chain_kinds(kernel):
                    tiles = _chain_tiles(kind, kernel, shapes[kind[0]], name)
                    if tiles:
                        found[(gpu.capability[0], *kind)] = tiles
    if CONV in kernels:
        spilled = {key for key in spilled if key[0] not in majors}
        for name in gpus:
            spilled |= set(spilled_convolutions(name))
    in_loads = set(kept.prologue)
    if PROLOGUE in kernels:
        in_loads = {key for key in in_loads if key[0] not in majors}
        for name in gpus:
            in_loads |= set(spilled_prologues(name))
    compiled_for = {
        kernel: known | (majors if kernel in kernels else frozenset())
        for kernel, known in kept.majors.items()
    }
    compiled_for[PAIR] &= frozenset(_PAIRS)
    record = compiler.Compiled(
        version, compiled_for, tables[CHAIN][1], tables[PAIR][1], frozenset(spilled),
        frozenset(in_loads),
    )  # fmt: skip
    path.write_text(compiler.text(record))


def prologue_problems() -> list[ConvProblem]:
    """Convolutions with a norm in their loads that take the most registers.

    A 1x1 layer of channels that no block divides, and a padded 3x3 with a residual.
    """

    def of(C: int, K: int, taps: int, around: tuple[int, int], residual: bool) -> ConvProblem:
        return ConvProblem(
            64, C, 14, 14, K, taps, taps, (1, 1), around, (1, 1), 1, "float16", residual, None
        )

    return [of(352, 128, 1, (0, 0), False), of(128, 256, 3, (1, 1), True)]


def spilled_prologues(architecture: str) -> Iterator[tuple[int, int, int, int, int]]:
    """The tiles of convolutions with a norm in their loads that spill."""
    major = ARCHITECTURES[GPUS[architecture]].capability[0]
    for tile in prologue.TILES:
        for problem in prologue_problems():
            launch, *_ = launches(problem, tile, prologue=True)
            registers, spilled, _ = resources(launch, architecture)
            made = f"{registers} registers, {spilled} bytes spilled"
            print(f"{architecture} prologue {tile}: {made}", flush=True)
            if spilled:
                yield major, tile.block_m, tile.block_n, tile.block_k, tile.num_warps
                break


def spilled_convolutions(architecture: str) -> Iterator[compiler.Spilled]:
    """The tiles that the estimate takes for the largest that do not spill, and that do.

    Those of fewer registers than `_SAFE_REGISTERS` are compiled if some other version spills them.
    """
    gpu = ARCHITECTURES[GPUS[architecture]]
    suspects = {key for version in compiler.known() for key in compiler.recorded(version).spilled}
    found: dict[compiler.Spilled, list[tuple[ConvProblem, Tile]]] = {}
    with compiler.as_of(compiler.NOTHING):
        for dtype in ("float16", "tfloat32", "float32"):
            for (layer, tile), problem in configurations(dtype, gpu).items():
                if layer not in ("1x1", "3x3"):
                    continue
                key = estimate.spilling_key(problem, gpu, tile)
                if estimate.registers(problem, gpu, tile) >= _SAFE_REGISTERS or key in suspects:
                    found.setdefault(key, []).append((problem, tile))
    for key, alike in found.items():
        # The deepest pipelines and the most address arithmetic first.
        for problem, tile in sorted(alike, key=lambda one: -one[1].num_stages):
            launch, *_ = launches(problem, tile)
            registers, spilled, _ = resources(launch, architecture)
            made = f"{registers} registers, {spilled} bytes spilled"
            print(f"{architecture} {key} {tile}: {made}", flush=True)
            if spilled:
                yield key
                break


def _chain_tiles(
    kind: tuple[int, bool, int], kernel: str, shapes: Iterable[tuple[int, ...]], architecture: str
) -> dict[tuple[int, ...], tuple[int, int]]:
    """Registers and shared memory of the shapes that spill nothing, as `compiler.py` has them.

    Those of a pair are the most that it takes with slices shared and without.
    """
    warp_groups = ARCHITECTURES[GPUS[architecture]].capability[0] in (9, 10)
    found = {}
    for shape in shapes:
        if shape[0] < 64 and warp_groups:
            continue  # what warp-group instructions need
        splits = (1, 4) if kernel == PAIR else (1,)
        of_float16 = [
            _compiled_chain(kind, kernel, "float16", shape, split, architecture) for split in splits
        ]
        if None in of_float16:
            continue
        registers, shared = (max(sizes) for sizes in zip(*of_float16, strict=True))
        # Of bfloat16 a few instructions are others, which matters where few registers are left.
        if registers >= _SAFE_REGISTERS and None in (
            _compiled_chain(kind, kernel, "bfloat16", shape, split, architecture)
            for split in splits
        ):
            continue
        found[shape] = (registers, shared)
    return found


def _compiled_chain(
    kind: tuple[int, bool, int],
    kernel: str,
    dtype: str,
    shape: tuple[int, ...],
    split: int,
    architecture: str,
) -> tuple[int, int] | None:
    """Registers and shared memory of a chain's tile; None where it spills or does not fit."""
    problem = chain_problem(*kind, 32, dtype)
    launch, *_ = launches(problem, Tile(*shape[:3], split, *shape[3:]), kernel)
    label = f"{architecture} {dtype} {chain_name(problem, kernel)} {shape}, split {split}"
    try:
        registers, spilled, shared = resources(launch, architecture)
    except OutOfResources as error:
        print(f"{label}: {error}", flush=True)
        return None
    print(f"{label}: {registers} registers, {spilled} bytes spilled, {shared} shared", flush=True)
    if spilled or shared > ARCHITECTURES[GPUS[architecture]].shared_per_block:
        return None
    return registers, shared


def tile_of(entry: dict[str, Any]) -> Tile:
    """An entry's tile, as `configurations` has it."""
    names = ("block_m", "block_n", "block_k", "num_warps", "num_stages")
    return Tile(split_k=4 if entry["split"] else 1, **{name: entry[name] for name in names})


def report_path() -> Path:
    """Where the report of the installed Triton lies."""
    return RESULTS / f"triton-{triton.__version__}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architecture", choices=GPUS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--missing", action="store_true", help="keep what the report has")
    parser.add_argument(
        "--tiles", choices=(CHAIN, PAIR, CONV, PROLOGUE), action="append", help="see above"
    )
    arguments = parser.parse_args()
    if arguments.tiles:
        return write_tiles(arguments.architecture or GPUS, arguments.tiles)
    path = report_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"schema": "fused_resnet.static/1", "entries": []}
    if path.exists():
        report = json.loads(path.read_text())
    report |= {"triton": triton.__version__, "torch": torch.__version__.split("+")[0]}
    for dtype in arguments.dtype or DTYPES:
        for architecture in arguments.architecture or GPUS:
            mine = {"architecture": architecture, "dtype": dtype}
            old = [e for e in report["entries"] if mine.items() <= e.items()]
            if not arguments.missing:
                report["entries"] = [e for e in report["entries"] if e not in old]
                old = []
            present = {(e["layer"], tile_of(e)) for e in old}
            for entry in entries(architecture, dtype, present):
                report["entries"].append(entry)
                tile = "x".join(str(entry[n]) for n in ("block_m", "block_n", "block_k"))
                print(
                    f"{architecture} {dtype} {entry['kernel']} {entry['layer']} {tile}: "
                    f"{entry['registers']} registers, {entry['spilled_bytes']} bytes spilled, "
                    f"{entry['shared_bytes']} shared",
                    flush=True,
                )
            lines = ",\n  ".join(json.dumps(entry) for entry in report["entries"])
            head = {k: v for k, v in report.items() if k != "entries"}
            path.write_text(json.dumps(head)[:-1] + f', "entries": [\n  {lines}\n]}}\n')


if __name__ == "__main__":
    main()
