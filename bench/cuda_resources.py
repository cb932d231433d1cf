"""What can be known of the CUDA C++ kernels without a GPU: what `_cuda` holds of every one of them.

Reads the installed library with `cuobjdump` and writes `bench/results/static/cuda.json`:

    {"schema": "fused_resnet.static_cuda/1", "nvcc": "13.0.88", "commit": "4bf3d42",
     "architectures": ["8.0", ...], "entries": [{
        "kernel": "conv_bn_act", "dtype": "float16", "architecture": "sm_90",
        "products": "tensor cores", "loads": "vectors",
        "block_m": 128, "block_n": 128, "block_k": 32, "num_warps": 4, "num_stages": 4,
        "registers": 168, "stack_bytes": 0, "shared_bytes": 66560, "threads": 128,
        "blocks_per_multiprocessor": 3, "occupancy": 0.1875, "instructions": 2400,
        "tensor_core": {"HMMA": 128}, "matrix_loads": 32,
        "global_loads": {"LDGSTS.128": 24, "LDG.128": 8}, "global_stores": {"STG.128": 33, ...}}]}

Fields are those of bench/triton_resources.py's report where it has them. `stack_bytes` is what a
thread keeps in local memory, spills included; `matrix_loads` counts LDSM, which is `ldmatrix`.
Entries of scale_shift_act's kernels say with or without a residual, and the elements of an access
or the index type, instead of a tile; those of basic_block's have the tile's pixels as `block_m`;
those of batch norm's the elements, and where the activation's mask comes from. `narrow` are kernels
for a residual of fewer channels than the output. `cluster` is of how many blocks; such kernels are
empty, and left out, where there are no clusters, and their shared memory is what one round takes.
Those of convolutions have `activations`: "plain" ones, ReLU and none, the "other" ones, or "all".
Those of the kernels for Hopper, `hopper_conv_bn_act` and `hopper_bottleneck`, are of sm_90a alone,
and their shared memory is what the most filters take. Those of the convolution have a `schedule`,
those of the Bottleneck chain `width`, and as `next_width` the most channels that may follow; and
besides the others' counts

    "loop_instructions": 57,
    "asynchronous": {"HGMMA": 4, "UTMALDG.3D.MULTICAST": 1, "UTMASTG.2D": 1, "STSM": 16, ...}

the instructions of the smallest loop that has all products, which each warp that multiplies goes
through for 128 bytes of one tap's channels, and those of Hopper's own. The chain has three such
loops, of which `loop_instructions` is a list: of the window, of a slice, and of what follows.
`commit` is the checkout's, with a plus where csrc differs from it.

    python bench/cuda_resources.py

Tables of the kernels for Hopper go to docs/hopper.md too, between its markers.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import fused_resnet
from fused_resnet import _native
from fused_resnet.tuning import basic_block, cluster_norm

ROOT = Path(__file__).resolve().parents[1]
REPORT = ROOT / "bench" / "results" / "static" / "cuda.json"
HOPPER_PAGE = ROOT / "docs" / "hopper.md"
HOPPER_BEGIN = "<!-- machine code: written by bench/cuda_resources.py -->"
HOPPER_END = "<!-- end of machine code -->"
LIBRARY = Path(fused_resnet.__file__).parent / "_cuda.abi3.so"
DTYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32", "double": "float64"}
PRODUCTS = ("tensor cores", "tensor cores, tf32", "multiply-adds")
LOADS = ("vectors", "elements", "diagonal")
CHAIN_BEGIN = "<!-- machine code of the chain: written by bench/cuda_resources.py -->"
CHAIN_END = "<!-- end of machine code of the chain -->"
HOPPER, HOPPER_CHAIN = "hopper_conv_bn_act", "hopper_bottleneck"
HOPPER_KERNELS = (HOPPER, HOPPER_CHAIN)
HOPPER_ARCHITECTURE = "sm_90a"
HOPPER_M, HOPPER_ROW_BYTES, HOPPER_WARPS = 128, 128, 12  # csrc/cuda/hopper/tiles.h
SCHEDULES = ("together", "turns")
ACTIVATIONS = ("plain", "other", "all")  # csrc/cuda/activation.cuh
DIAGONAL_BLOCK = 16  # csrc/cuda/conv_tiles.h
REGISTERS = 65536  # of a multiprocessor, on all of these
MOST_LANES = 32  # csrc/cuda/batch_norm.h, as are
MASKS = ("everywhere", "recomputed", "output", "bits")
RESIDUALS = ("none", "whole", "narrow")  # csrc/cuda/scale_shift_act.cu
# csrc/cuda/stem.h
STEM_PIXELS, STEM_FILTERS, STEM_WARPS, STEM_SHARED_BYTES = 224, 64, 7, 89344
ELEMENTWISE_THREADS = 256  # of scale_shift_act and of batch norm
DRIVERS_BYTES = 1024  # of every block's shared memory


@dataclass(frozen=True)
class Limits:
    """Of a multiprocessor: CUDA C++ Programming Guide, technical specifications."""

    threads: int
    shared_bytes: int
    shared_bytes_of_block: int
    blocks: int


LIMITS = {
    "sm_80": Limits(2048, 164 << 10, 163 << 10, 32),
    "sm_86": Limits(1536, 100 << 10, 99 << 10, 16),
    "sm_90": Limits(2048, 228 << 10, 227 << 10, 32),
    "sm_100": Limits(2048, 228 << 10, 227 << 10, 32),
    "sm_120": Limits(1536, 100 << 10, 99 << 10, 24),
}


LIMITS[HOPPER_ARCHITECTURE] = LIMITS["sm_90"]
WITHOUT_CLUSTERS = ("sm_80", "sm_86")


def find_cuobjdump() -> str | None:
    """The toolkit's, or the one that Triton ships."""
    triton = Path(torch.__file__).parents[1] / "triton" / "backends" / "nvidia" / "bin"
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ["PATH"], *(f"{home}/bin" for home in homes if home), str(triton)]
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def of_architecture(listing: str, architecture: str) -> str:
    """What `cuobjdump` lists of just this one: its -arch sm_90 lists sm_90a too."""
    parts = re.split(r"(?=^Fatbin elf code:)", listing, flags=re.MULTILINE)
    own = re.compile(rf"^arch = {architecture}$", re.MULTILINE)
    return "".join(part for part in parts if own.search(part))


def architectures() -> list[str]:
    """What the library was built for: "sm_80"; behind sm_90, what csrc/cuda/hopper is built for."""
    built = _native.build_info()["cuda"]["architectures"]
    names = ["sm_" + name.removesuffix("+PTX").replace(".", "") for name in built]
    if "sm_90" in names and HOPPER_ARCHITECTURE not in names:
        names.insert(names.index("sm_90") + 1, HOPPER_ARCHITECTURE)
    return names


@cache
def conv_tiles() -> list[list[int]]:
    """The rows of csrc/cuda/conv_tiles.h, as the operator of that name lists them."""
    assert _native.cuda_operators is not None, _native.cuda_status
    numbers = _native.cuda_operators.conv_tiles()
    return [numbers[at : at + 7] for at in range(0, len(numbers), 7)]


@cache
def byte_tiles() -> list[list[int]]:
    """The rows of csrc/cuda/byte_conv.h, as the operator byte_conv_tiles lists them."""
    assert _native.cuda_operators is not None, _native.cuda_status
    numbers = _native.cuda_operators.byte_conv_tiles()
    return [numbers[at : at + 7] for at in range(0, len(numbers), 7)]


def byte_kernel(kernel: str, arguments: list[str]) -> tuple[dict[str, Any], int, int]:
    """`description` of a kernel of csrc/cuda/byte_conv.cuh, by its arguments."""
    if kernel == "pool_bytes":
        fields = {"dtype": DTYPES[arguments[0]], "elements": int(arguments[1])}
        return {"kernel": kernel} | fields, ELEMENTWISE_THREADS, 0
    if kernel == "store_bytes":
        words, vectors = (argument == "true" for argument in arguments[1:])
        fields = {"dtype": DTYPES[arguments[0]], "loads": LOADS[0 if vectors else 1]}
        products = "uint16" if words else "uint8"
        return {"kernel": kernel, "products": products} | fields, ELEMENTWISE_THREADS, 0
    piece, m, n, depth, warps, stages, _ = byte_tiles()[int(arguments[0])]
    fields = {"kernel": kernel, "dtype": "uint8", "products": "int8", "elements": piece}
    fields |= {"block_m": m, "block_n": n, "block_k": depth}
    fields |= {"num_warps": warps, "num_stages": stages, "projects": arguments[1] == "true"}
    return fields, 32 * warps, stages * (m + n) * depth + m * n + n * 5 * 4


@cache
def hopper_tiles() -> list[list[int]]:
    """The rows of csrc/cuda/hopper/tiles.h, as the operator of that name lists them."""
    assert _native.cuda_operators is not None, _native.cuda_status
    numbers = _native.cuda_operators.hopper_conv_tiles()
    return [numbers[at : at + 6] for at in range(0, len(numbers), 6)]


@cache
def chain_tiles() -> list[list[int]]:
    """The rows of csrc/cuda/hopper/bottleneck_tiles.h, as their operator lists them."""
    assert _native.cuda_operators is not None, _native.cuda_status
    numbers = _native.cuda_operators.hopper_bottleneck_tiles()
    return [numbers[at : at + 6] for at in range(0, len(numbers), 6)]


def description(name: str) -> tuple[dict[str, Any], int, int]:
    """A kernel's own fields by its demangled name; its threads and dynamic shared memory."""
    match = re.search(r"(\w+)(?:<(.*?)>)?\(", name)
    assert match, name
    kernel, arguments = match[1], (match[2] or "float").split(", ")
    if kernel in ("byte_conv", "pool_bytes", "store_bytes"):
        return byte_kernel(kernel, arguments)
    fields: dict[str, Any] = {"kernel": kernel, "dtype": DTYPES[arguments[0]]}
    if kernel == "max_pool":
        return fields | {"elements": int(arguments[1])}, ELEMENTWISE_THREADS, 0
    if kernel == "stem_max_pool":
        fields |= {"products": PRODUCTS[0], "block_m": STEM_PIXELS, "block_n": STEM_FILTERS}
        fields |= {"num_warps": STEM_WARPS}
        return fields, 32 * STEM_WARPS, STEM_SHARED_BYTES
    if kernel.startswith("batch_norm"):
        own_fields, threads, shared = batch_norm(kernel, arguments[1:])
        return fields | own_fields, threads, shared
    if kernel == HOPPER:
        size, n, stages, cluster, turns, shared = hopper_tiles()[int(arguments[1])]
        fields |= {"products": PRODUCTS[size == 4], "block_m": HOPPER_M, "block_n": n}
        fields |= {"block_k": HOPPER_ROW_BYTES // size, "num_warps": HOPPER_WARPS}
        fields |= {"num_stages": stages}
        fields |= {"cluster": cluster, "schedule": SCHEDULES[turns]}
        fields["activations"] = activations(arguments[2])
        return fields, 32 * HOPPER_WARPS, shared
    if kernel == HOPPER_CHAIN:
        width, following, columns, stages, cluster, shared = chain_tiles()[int(arguments[1])]
        fields |= {"products": PRODUCTS[0], "width": width, "next_width": following}
        fields |= {"block_m": HOPPER_M, "block_n": columns, "block_k": HOPPER_ROW_BYTES // 2}
        fields |= {"num_warps": HOPPER_WARPS, "num_stages": stages, "cluster": cluster}
        return fields, 32 * HOPPER_WARPS, shared
    if kernel == "basic_block":
        shape = basic_block.SHAPES[int(arguments[1])]
        names = ("block_m", "block_n", "block_k", "split_k", "num_warps", "num_stages")
        tile = dict(zip(names, dataclasses.astuple(shape.tile), strict=True))
        del tile["split_k"]
        return fields | {"products": PRODUCTS[0]} | tile, 32 * shape.warps, shape.shared_bytes
    if kernel != "conv_bn_act":
        fields["residual"] = arguments[-1] == "true"
        if kernel == "scale_shift_act_channels_last":
            kind = RESIDUALS[int(arguments[1].rpartition(")")[2])]
            fields["residual"] = kind != "none"
            fields |= {"narrow": True} if kind == "narrow" else {}
        elif kernel == "scale_shift_act_strided":
            fields["index"] = {"unsigned int": "int32", "long": "int64"}[arguments[1]]
        elif kernel == "scale_shift_act_dense":
            fields["elements"] = int(arguments[1])
        return fields, ELEMENTWISE_THREADS, 0
    products, loads, m, n, depth, warps, stages = conv_tiles()[int(arguments[1])]
    size = 4 if products else 2
    filter_depth = DIAGONAL_BLOCK if LOADS[loads] == "diagonal" else depth
    shared = stages * (m * depth + n * filter_depth) * size + n * 2 * 4
    fields |= {"products": PRODUCTS[products], "loads": LOADS[loads]}
    fields |= {"block_m": m, "block_n": n, "block_k": depth}
    fields |= {"num_warps": warps, "num_stages": stages}
    return fields | {"activations": activations(arguments[2])}, 32 * warps, shared


def activations(argument: str) -> str:
    """Which ones an instance of a convolution has, by its last argument."""
    return ACTIVATIONS[int(argument.rpartition(")")[2])]


def batch_norm(kernel: str, arguments: list[str]) -> tuple[dict[str, Any], int, int]:
    """The same for a kernel of csrc/cuda/batch_norm.cuh, by the arguments behind its dtype."""
    of_channels = {"batch_norm_combine_statistics": 4, "batch_norm_combine_sums": 2}
    if kernel in of_channels:
        return {}, ELEMENTWISE_THREADS, of_channels[kernel] * ELEMENTWISE_THREADS * 4
    elements = int(arguments[0])
    fields: dict[str, Any] = {"elements": elements}
    if kernel.endswith("in_one_launch"):
        backward = "backward" in kernel
        fields["cluster"] = cluster_norm.BLOCKS
        if backward:
            fields["mask"] = MASKS[int(arguments[1].rpartition(")")[2])]
        elif arguments[1] == "true":
            fields["mask"] = "bits"
        return fields, cluster_norm.THREADS, cluster_norm.shared_bytes(1 + backward, rounds=1)
    if kernel == "batch_norm_normalize":
        fields |= {"narrow": True} if arguments[1] == "true" else {}
        fields |= {"mask": "bits"} if arguments[2] == "true" else {}
    elif len(arguments) > 1:
        fields["mask"] = MASKS[int(arguments[1].rpartition(")")[2])]
    # Values of every thread that are combined, and values of every channel of the block.
    values, vectors = {
        "batch_norm_statistics": (3 * elements + 1, 0),
        "batch_norm_normalize": (0, 2),
        "batch_norm_gradient_sums": (2 * elements, 3),
        "batch_norm_input_gradient": (0, 5),
    }[kernel]
    shared = values * ELEMENTWISE_THREADS * 4 + vectors * MOST_LANES * elements * 4
    return fields, ELEMENTWISE_THREADS, shared


def resident(limits: Limits, threads: int, registers: int, shared: int) -> int:
    """Blocks that one multiprocessor holds at once.

    Registers are handed out to a warp 256 at a time; the driver takes `DRIVERS_BYTES` of every
    block's shared memory.
    """
    of_warp = -(-32 * registers // 256) * 256
    return min(
        limits.blocks,
        limits.threads // threads,
        REGISTERS // (of_warp * threads // 32),
        limits.shared_bytes // (shared + DRIVERS_BYTES),
    )


def instructions(listing: str) -> dict[str, Any]:
    """Counts of what matters in a listing of machine code."""
    found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+).*?;", listing)
    counts = {name: Counter() for name in ("tensor_core", "global_loads", "global_stores")}
    matrix_loads = 0
    for name in found:
        base = name.split(".")[0]
        width = re.search(r"\.(U?8|U?16|64|128)\b", name)
        wide = base + (f".{width[1]}" if width else "")
        if base in ("HMMA", "IMMA", "HGMMA"):
            counts["tensor_core"][name] += 1
        elif base in ("LDG", "LDGSTS"):
            counts["global_loads"][wide] += 1
        elif base == "STG":
            counts["global_stores"][wide] += 1
        matrix_loads += base == "LDSM"
    return {
        "instructions": len(found),
        "matrix_loads": matrix_loads,
        **{name: dict(sorted(count.items())) for name, count in counts.items()},
    }


def hopper_instructions(listing: str, kernel: str = HOPPER) -> dict[str, Any]:
    """Counts of what only Hopper's kernels have."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;", listing)
    own = ("HGMMA", "WARPGROUP", "UTMALDG", "UTMASTG", "SYNCS", "STSM", "LDSM", "USETMAXREG")
    counts = Counter()
    for _, text in found:
        name = text.split()[0]
        if name.split(".")[0] in own:
            # Of products and barriers the kind is enough.
            short = (
                name.split(".")[0] if name.startswith(("HGMMA", "SYNCS", "STSM", "LDSM")) else name
            )
            counts[short] += 1
    lengths = loop_lengths(found) if kernel == HOPPER_CHAIN else loop_length(found)
    return {"loop_instructions": lengths, "asynchronous": dict(sorted(counts.items()))}


def loop_lengths(code: Sequence[tuple[str, str]]) -> list[int]:
    """The same of each four products in a row."""
    products = [at for at, (_, text) in enumerate(code) if "HGMMA" in text]
    return [loop_length(code, products[i : i + 4]) for i in range(0, len(products), 4)]


def loop_length(code: Sequence[tuple[str, str]], around: Sequence[int] = ()) -> int:
    """How many instructions the smallest loop around all products has, of (address, text).

    Or around those that are where `around` says.
    """
    addresses = [int(address, 16) for address, _ in code]
    products = [at for at, (_, text) in zip(addresses, code, strict=True) if "HGMMA" in text]
    if around:
        products = [addresses[at] for at in around]
    loops = []
    for at, (_, text) in zip(addresses, code, strict=True):
        target = re.match(r"BRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) <= products[0] and at > products[-1]:
            begin = int(target[1], 16)
            loops.append(sum(begin <= address <= at for address in addresses))
    assert loops, "no loop around the products"
    return min(loops)


@cache
def entries(architecture: str, library: Path = LIBRARY) -> list[dict[str, Any]]:
    """The report's entries for one architecture."""
    usage = _cuobjdump("-res-usage", architecture, library)
    listing = _cuobjdump("-sass", architecture, library)
    bodies = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        bodies[name.strip()] = body
    used = re.findall(r"Function (\S+):\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert {name for name, *_ in used} == bodies.keys()
    found = []
    for mangled, *numbers in used:
        registers, stack, static, local = map(int, numbers)
        fields, threads, shared = description(demangled(mangled))
        if "cluster" in fields and architecture in WITHOUT_CLUSTERS:
            continue
        is_hopper = fields["kernel"] in HOPPER_KERNELS
        if is_hopper and architecture != HOPPER_ARCHITECTURE:
            continue
        limits = LIMITS[architecture]
        # From 9.0 on the compiler counts the driver's, where a kernel has any of its own.
        counts_drivers = static >= DRIVERS_BYTES and architecture not in WITHOUT_CLUSTERS
        shared += static - DRIVERS_BYTES * counts_drivers
        blocks = resident(limits, threads, registers, shared)
        if shared > limits.shared_bytes_of_block:
            blocks = 0
        found.append(
            fields
            | {
                "architecture": architecture,
                "registers": registers,
                "stack_bytes": stack + local,
                "shared_bytes": shared,
                "threads": threads,
                "blocks_per_multiprocessor": blocks,
                "occupancy": round(blocks * threads / limits.threads, 4),
            }
            | instructions(bodies[mangled])
            | (hopper_instructions(bodies[mangled], fields["kernel"]) if is_hopper else {})
        )
    return sorted(found, key=lambda entry: json.dumps(identity(entry)))


def identity(entry: dict[str, Any]) -> dict[str, Any]:
    """Which kernel an entry is about."""
    names = (
        "kernel", "dtype", "architecture", "products", "loads", "block_m", "block_n", "block_k",
        "num_warps", "num_stages", "residual", "narrow", "elements", "index", "mask",
        "cluster", "projects", "schedule", "activations", "width", "next_width",
    )  # fmt: skip
    return {name: entry[name] for name in names if name in entry}


def _cuobjdump(option: str, architecture: str, library: Path) -> str:
    tool = find_cuobjdump()
    assert tool, "no cuobjdump"
    command = [tool, option, "-arch", architecture, str(library)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return of_architecture(listing, architecture)


@cache
def demangled(name: str) -> str:
    """A kernel's name as C++ has it."""
    command = ["c++filt", name]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def hopper_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What docs/hopper.md says of the convolution for Hopper, from the report's entries.

    Of the instances for ReLU and for no activation.
    """
    lines = [
        "| filters, stages, cluster, schedule | products of a step | instructions of its loop "
        "| of the kernel | registers | stack | shared memory, KiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    own = [
        entry
        for entry in found
        if entry["kernel"] == HOPPER
        and (entry["dtype"] != "bfloat16" and entry["activations"] == "plain")
    ]
    for entry in sorted(own, key=lambda entry: (entry["dtype"], -entry["block_n"])):
        tf32 = ", tf32" if entry["dtype"] == "float32" else ""
        ((product, count),) = entry["tensor_core"].items()
        cells = [
            f"{entry['block_n']}, {entry['num_stages']}, {entry['cluster']}, "
            f"{entry['schedule']}{tf32}",
            f"{count} `{product}`", entry["loop_instructions"], entry["instructions"],
            entry["registers"], entry["stack_bytes"], f"{entry['shared_bytes'] / 1024:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def chain_table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """What docs/hopper.md says of the Bottleneck chain, from the report's entries."""
    lines = [
        "| width, next, slice, stages, cluster | products of a step: window, slice, next "
        "| instructions of their loops | of the kernel | registers | stack | shared memory, KiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    own = [e for e in found if e["kernel"] == HOPPER_CHAIN and e["dtype"] == "float16"]
    for entry in sorted(own, key=lambda e: (e["width"], e["next_width"], e["cluster"])):
        sizes = (entry["width"], entry["block_n"], entry["next_width"])
        cells = [
            ", ".join(
                str(entry[name])
                for name in ("width", "next_width", "block_n", "num_stages", "cluster")
            ),
            "4 `HGMMA.64x{}x16.F32`, {}, {}".format(*sizes),
            ", ".join(map(str, entry["loop_instructions"])), entry["instructions"],
            entry["registers"], entry["stack_bytes"], f"{entry['shared_bytes'] / 1024:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def write_hopper_page(found: Sequence[Mapping[str, Any]], page: Path = HOPPER_PAGE) -> None:
    """Writes both tables between their markers."""
    text = page.read_text()
    for first, last, lines in (
        (HOPPER_BEGIN, HOPPER_END, hopper_table(found)),
        (CHAIN_BEGIN, CHAIN_END, chain_table(found)),
    ):
        before, begin, rest = text.partition(first)
        _, end, behind = rest.partition(last)
        assert end, f"{page} has no {first}"
        text = before + begin + "\n" + "\n".join(lines) + "\n" + end + behind
    page.write_text(text)


def main() -> None:
    info = _native.build_info()["cuda"]
    assert info is not None, "built without CUDA kernels"
    commit = _git("rev-parse", "--short", "HEAD")
    if _git("status", "--porcelain", "--", "csrc"):
        commit += "+"
    head = {
        "schema": "fused_resnet.static_cuda/1",
        "nvcc": info["nvcc"],
        "commit": commit,
        "architectures": info["architectures"],
    }
    found = [entry for architecture in architectures() for entry in entries(architecture)]
    lines = ",\n  ".join(json.dumps(entry) for entry in found)
    REPORT.write_text(json.dumps(head)[:-1] + f', "entries": [\n  {lines}\n]}}\n')
    write_hopper_page(found)
    for entry in found:
        what = " ".join(str(value) for value in identity(entry).values())
        print(
            f"{what}: {entry['registers']} registers, {entry['stack_bytes']} bytes of stack, "
            f"{entry['shared_bytes']} shared, {entry['blocks_per_multiprocessor']} blocks"
        )


if __name__ == "__main__":
    main()
