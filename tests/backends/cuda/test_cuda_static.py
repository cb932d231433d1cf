"""What can be known of the CUDA kernels without a GPU: the machine code of every architecture."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from support import cuda_on_host, load_script, processes

import fused_resnet
from fused_resnet import _native
from fused_resnet.tuning import basic_block

LIBRARY = Path(fused_resnet.__file__).parent / "_cuda.abi3.so"
CUDA = _native.build_info()["cuda"]
cuda_resources = load_script(Path(__file__).parents[3] / "bench" / "cuda_resources.py")
CUOBJDUMP = cuda_resources.find_cuobjdump()

pytestmark = [
    pytest.mark.skipif(CUDA is None, reason="built without CUDA kernels"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="no cuobjdump"),
]

BUILT_FOR = CUDA["architectures"] if CUDA else []
NAMES = ["sm_" + arch.removesuffix("+PTX").replace(".", "") for arch in BUILT_FOR]
# Hopper and one that is older stand for all, whose listings take ten seconds each.
ARCHITECTURES = [
    pytest.param(name, marks=[] if name in ("sm_80", "sm_90") else pytest.mark.whole)
    for name in NAMES
]


@cache
def kernels(architecture: str) -> dict[str, list[str]]:
    """The instructions of every kernel, by mangled name."""
    command = [CUOBJDUMP, "-sass", "-arch", architecture, str(LIBRARY)]
    environment = processes.current_environment()
    status, listing, err = processes.run_command(command, 600, environment, processes.TESTS)
    assert status == 0, err
    listing = cuda_resources.of_architecture(listing, architecture)
    found = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        # Kernels have most instructions in common.
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body)
        found[name.strip()] = [sys.intern(instruction) for instruction in instructions]
    return found


@pytest.fixture
def listed(ahead: Callable[[], object]) -> None:
    """What a test looks at is there."""
    ahead()


def of_each_architecture(test: Callable) -> Callable:
    """Marks a test of `kernels`, which are listed ahead."""
    marks = (
        pytest.mark.usefixtures("listed"),
        pytest.mark.ahead(lambda architecture: kernels(architecture)),
        pytest.mark.parametrize("architecture", ARCHITECTURES),
    )
    for mark in marks:
        test = mark(test)
    return test


def opcodes(instructions: list[str], *names: str) -> list[str]:
    """The instructions with one of these names, without predicate and operands: "LDG.E.128"."""
    found = (re.sub(r"^@\S+\s+", "", instruction).split()[0] for instruction in instructions)
    return [opcode for opcode in found if opcode.partition(".")[0] in names]


@dataclass(frozen=True)
class Convolution:
    """An instance of the convolution's kernel in one library: a row of csrc/cuda/conv_tiles.h."""

    dtype: str  # "half", "bfloat16" or "f"
    products: int
    loads: int
    m: int
    n: int
    depth: int
    warps: int
    stages: int
    instructions: list[str]


@cache
def conv_tiles() -> list[list[int]]:
    """The numbers that the operator of that name lists, by instance."""
    if _native.cuda_operators is None:
        if not cuda_on_host.is_needed():
            pytest.skip("nothing to read csrc/cuda/conv_tiles.h with")
        cuda_on_host.load()
    operators = _native.cuda_operators or torch.ops.fused_resnet_on_host
    numbers = operators.conv_tiles()
    return [numbers[at : at + 7] for at in range(0, len(numbers), 7)]


def convolutions(architecture: str) -> dict[str, Convolution]:
    """Every instance of the convolution's kernel, by mangled name."""
    found = {}
    for name, instructions in kernels(architecture).items():
        if match := re.search(r"conv_bn_actI(?:\d+__)?(?:nv_)?(half|bfloat16|f)Li(\d+)E", name):
            found[name] = Convolution(match[1], *conv_tiles()[int(match[2])], instructions)
    return found


def basic_blocks(architecture: str) -> dict[str, tuple[str, basic_block.Shape, list[str]]]:
    """Every instance of the BasicBlocks' kernel: its dtype, shape and instructions."""
    found = {}
    for name, instructions in kernels(architecture).items():
        if match := re.search(r"basic_blockI(?:\d+__)?(?:nv_)?(half|bfloat16)Li(\d+)E", name):
            found[name] = match[1], basic_block.SHAPES[int(match[2])], instructions
    return found


@dataclass(frozen=True)
class ByteConvolution:
    """An instance of the kernel of bytes: a row of csrc/cuda/byte_conv.h, with one sum or two."""

    piece: int
    m: int
    n: int
    depth: int
    warps: int
    stages: int
    sums: int
    instructions: list[str]


def byte_convolutions(architecture: str) -> dict[str, ByteConvolution]:
    """Every instance of it, by mangled name."""
    found = {}
    tiles = cuda_resources.byte_tiles()
    for name, instructions in kernels(architecture).items():
        if match := re.search(r"byte_convILi(\d+)ELb([01])E", name):
            *tile, _ = tiles[int(match[1])]
            found[name] = ByteConvolution(*tile, 1 + int(match[2]), instructions)
    return found


@of_each_architecture
def test_bytes_are_multiplied_on_tensor_cores(architecture):
    """As many instructions as one step of a warp's tile takes, for each sum."""
    found = byte_convolutions(architecture)
    projecting = sum(tile[-1] for tile in cuda_resources.byte_tiles())
    assert len(found) == len(cuda_resources.byte_tiles()) + projecting
    for name, conv in found.items():
        matrix = opcodes(conv.instructions, "IMMA")
        expected = conv.m * conv.n * conv.depth // (16 * 8 * 32) // conv.warps * conv.sums
        assert matrix == ["IMMA.16832.U8.S8"] * expected, name
        loads = opcodes(conv.instructions, "LDSM")
        assert set(loads) == {"LDSM.16.M88.4"}, name
        assert len(loads) < len(matrix), name


@of_each_architecture
def test_bytes_are_accessed_16_at_a_time(architecture):
    """The weights always; pixels where they come in pieces of 16 bytes; outputs of each dtype."""
    for name, conv in byte_convolutions(architecture).items():
        copies = opcodes(conv.instructions, "LDGSTS")
        whole = [copy for copy in copies if copy.startswith("LDGSTS.E.BYPASS.128")]
        pixels, filters = (rows * conv.depth // (16 * 32 * conv.warps) for rows in (conv.m, conv.n))
        # Before the loop and in it; a shortcut's besides.
        assert len(whole) >= 2 * conv.sums * (filters + pixels * (conv.piece == 16)), name
        assert (whole == copies) == (conv.piece != 4), name
        narrow = 2 * conv.sums * 4 * pixels if conv.piece == 4 else 0
        assert len(copies) - len(whole) == narrow, name
        stores = opcodes(conv.instructions, "STG")
        assert sum(store.endswith(".128") for store in stores) == 4, name


@of_each_architecture
def test_bytes_round_every_operation(architecture):
    """No product is joined with a sum; each output has as many of both as its definition."""
    for name, conv in byte_convolutions(architecture).items():
        assert not opcodes(conv.instructions, "FFMA"), name
        outputs = conv.m * conv.n // (32 * conv.warps)
        products, sums = (opcodes(conv.instructions, x) for x in ("FMUL", "FADD"))
        # Behind them the output's step, of 16 bytes of a dtype at once, or of one byte.
        assert outputs * conv.sums <= len(products), name
        assert outputs * (1 + conv.sums) <= len(sums), name


@of_each_architecture
def test_basic_blocks_multiply_on_tensor_cores(architecture):
    """As many instructions as two taps of a warp's rows take, four and two loads for each 8."""
    for name, (dtype, shape, instructions) in basic_blocks(architecture).items():
        matrix = opcodes(instructions, "HMMA")
        opcode = {"half": "HMMA.16816.F32", "bfloat16": "HMMA.16816.F32.BF16"}[dtype]
        steps = basic_block.CHANNELS // 16  # of a tap
        warp_rows = -(-(shape.rows + 2) // shape.warps) + -(-shape.rows // shape.warps)
        assert matrix == [opcode] * (steps * warp_rows * basic_block.CHANNELS // 8), name
        loads = opcodes(instructions, "LDSM")
        assert loads == ["LDSM.16.M88.4"] * (steps * (warp_rows + 2 * 4)), name


@of_each_architecture
def test_basic_blocks_access_16_bytes(architecture):
    """The input once and weights before and in both loops, asynchronously; the output."""
    for name, (_, shape, instructions) in basic_blocks(architecture).items():
        stores = opcodes(instructions, "STG")
        assert stores, name
        assert all(store.endswith(".128") for store in stores), name
        copies = opcodes(instructions, "LDGSTS")
        each = basic_block.CHANNELS * 8 // (32 * shape.warps)  # of a tap, by a thread
        assert len(copies) >= 1 + 3 * each, name
        assert all(copy.startswith("LDGSTS.E.BYPASS.128") for copy in copies), name
        # Copies come between the products, not before or behind all of them.
        places = [i for i, x in enumerate(instructions) if "LDGSTS" in x]
        products = [i for i, x in enumerate(instructions) if "HMMA" in x]
        assert any(products[0] < i < products[-1] for i in places), name


@of_each_architecture
def test_every_architecture_has_every_kernel(architecture):
    def names(architecture: str) -> set[str]:
        # An anonymous namespace's name differs from compilation to compilation.
        return {re.sub(r"\d*_GLOBAL__N_\w*?_cu_\w{8}_\d+", "", n) for n in kernels(architecture)}

    assert names(architecture) == names(NAMES[0])
    # Four dtypes, without a residual, with one and with one of fewer channels.
    assert sum("act_channels_last" in name for name in names(architecture)) == 12
    # Tiles of 16-bit elements for float16 and bfloat16; those of float32 and with few filters once
    # with the activations that are plain, and once with the others.
    twice = sum(products == 0 and n < 64 for products, _, _, n, *_ in conv_tiles())
    assert len(convolutions(architecture)) == 2 * (len(conv_tiles()) + twice)
    assert len(basic_blocks(architecture)) == 2 * len(basic_block.SHAPES)


@of_each_architecture
def test_nothing_is_spilled(architecture):
    for name, instructions in kernels(architecture).items():
        local = [i for i in instructions if re.search(r"\b(LDL|STL)\b", i)]
        assert not local, f"{name}: {local[:3]}"


@of_each_architecture
def test_nothing_is_kept_in_local_memory(architecture):
    command = [CUOBJDUMP, "-res-usage", "-arch", architecture, str(LIBRARY)]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = cuda_resources.of_architecture(usage, architecture)
    bytes_used = re.findall(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert len(bytes_used) == len(kernels(architecture))
    assert set(bytes_used) == {("0", "0")}


@of_each_architecture
def test_convolutions_multiply_on_tensor_cores(architecture):
    """As many instructions as one step of a warp's tile takes: each once, all in the loop."""
    for name, conv in convolutions(architecture).items():
        matrix = opcodes(conv.instructions, "HMMA")
        if conv.products == 2:
            assert not matrix, name
            assert not opcodes(conv.instructions, "LDSM"), name
            continue
        opcode = {
            "half": "HMMA.16816.F32",
            "bfloat16": "HMMA.16816.F32.BF16",
            "f": "HMMA.1688.F32.TF32",
        }[conv.dtype]
        tile_depth = 8 if conv.dtype == "f" else 16
        width = 16 if conv.loads == 2 else conv.n  # on the diagonal, a block's own filters
        expected = conv.m * width * conv.depth // (16 * 8 * tile_depth) // conv.warps
        assert matrix == [opcode] * expected, name
        loads = opcodes(conv.instructions, "LDSM")
        assert set(loads) == {"LDSM.16.M88.4"}, name
        assert len(loads) < len(matrix), name


@of_each_architecture
def test_convolutions_load_while_they_multiply(architecture):
    """The loop has the asynchronous copies of a later step, 16 bytes each, and waits for some."""
    for name, conv in convolutions(architecture).items():
        if conv.loads == 1:  # element by element, through registers
            continue
        # From the first wait to where blocks that share a sum take their tickets.
        first = next(i for i, x in enumerate(conv.instructions) if "DEPBAR.LE SB0" in x)
        last = next(i for i, x in enumerate(conv.instructions) if "ATOM" in x)
        loop = conv.instructions[first:last]
        assert opcodes(loop, "FFMA" if conv.products == 2 else "HMMA"), name
        copies = opcodes(loop, "LDGSTS")
        rows = conv.m + (0 if conv.loads == 2 else conv.n)
        row_bytes = conv.depth * (4 if conv.dtype == "f" else 2)
        whole = [copy for copy in copies if copy.startswith("LDGSTS.E.BYPASS.128")]
        assert len(whole) >= rows * row_bytes // (16 * 32 * conv.warps), name
        assert conv.loads == 2 or whole == copies, f"{name}: {set(copies) - set(whole)}"
        assert opcodes(loop, "LDGDEPBAR"), name


@of_each_architecture
def test_convolutions_begin_to_multiply_behind_the_barrier(architecture):
    """Operands are loaded first, the first products follow, and copies come between products.

    Each warp's own 16 bytes a lane, then what rounds them in float32. On the diagonal a block's
    first operands are all that there are in a chunk, so that its copies come first.
    """
    checked = 0
    for name, conv in convolutions(architecture).items():
        if conv.products == 2 or conv.loads == 2:
            continue
        products = [i for i, x in enumerate(conv.instructions) if "HMMA" in x]
        loads = [i for i, x in enumerate(conv.instructions) if "LDSM" in x]
        barrier = max(
            i for i, x in enumerate(conv.instructions) if "BAR.SYNC" in x and i < products[0]
        )
        assert loads[0] - barrier <= 16, (name, loads[0] - barrier)
        # 8 loads of a warp's 64 x 64, and 4 instructions for each in float32.
        limit = 64 if conv.dtype == "f" else 24
        assert products[0] - barrier <= limit, (name, products[0] - barrier)
        copies = [i for i, x in enumerate(conv.instructions) if "LDGSTS" in x or "LDG" in x]
        assert not [i for i in copies if barrier < i < products[0]], name
        assert [i for i in copies if products[0] < i < products[-1]], name
        checked += 1
    assert checked


@of_each_architecture
def test_convolutions_store_16_bytes(architecture):
    """One narrower store, in a loop of its own for channel counts that fill no 16 bytes."""
    for name, conv in convolutions(architecture).items():
        stores = opcodes(conv.instructions, "STG")
        narrow = [store for store in stores if not store.endswith(".128")]
        # Parts of shared sums, 4 numbers of each lane at a time; and the output itself.
        parts = conv.m * conv.n // (4 * 32 * conv.warps)
        assert len(stores) - len(narrow) == parts + 1, name
        assert len(narrow) == 1, name


@of_each_architecture
def test_the_stem_multiplies_and_loads(architecture):
    """Of a turn's 11 steps the three of two tap rows, which are a loop, and the last two."""
    found = {n: k for n, k in kernels(architecture).items() if "stem_max_pool" in n}
    assert len(found) == 2
    for name, instructions in found.items():
        opcode = "HMMA.16816.F32" + (".BF16" if "bfloat16" in name else "")
        # Two rows of pixels by eight of filters in each of three and two steps.
        assert opcodes(instructions, "HMMA") == [opcode] * (5 * 2 * 8), name
        assert opcodes(instructions, "LDSM") == ["LDSM.16.M88.4"] * (5 * 4), name
        products = [i for i, x in enumerate(instructions) if "HMMA" in x]
        turn = instructions[products[0] : products[-1]]
        # Operands of pixels are words as they lie, four lanes' of each of 9 chunks. The last
        # products are among what follows them.
        words = [x for x in opcodes(instructions, "LDS") if x == "LDS"]
        assert len(words) >= 4 * 9, (name, len(words))
        assert not opcodes(turn, "LDG"), name
        assert len(turn) < 7 * len(products), (name, len(turn))
        copies = opcodes(instructions, "LDGSTS")
        # Before the first turn, and in each.
        assert copies == ["LDGSTS.E.BYPASS.128"] * len(copies), name
        assert len(copies) >= 2, name
        assert opcodes(instructions, "STG") == ["STG.E.128"], name


@of_each_architecture
def test_aligned_paths_access_16_bytes(architecture):
    checked = 0
    for name, instructions in kernels(architecture).items():
        straddling = re.search(r"scale_shift_act_denseI\S*?Li(\d+)E", name)
        if "act_channels_last" not in name and not (straddling and int(straddling.group(1)) > 1):
            continue
        loads = [i for i in instructions if re.search(r"\bLDG\b.*\.128\b", i)]
        stores = [i for i in instructions if re.search(r"\bSTG\b.*\.128\b", i)]
        if "ResidualE2E" in name:
            assert_every_width(name, instructions)
            checked += 1
            continue
        with_residual = "Lb1E" in name or "ResidualE1E" in name
        assert len(loads) == (2 if with_residual else 1) * len(stores) > 0, name
        if "act_channels_last" in name:
            narrow = [i for i in instructions if re.search(r"\bSTG\b", i) and ".128" not in i]
            assert not narrow, f"{name}: {narrow[:3]}"
        checked += 1
    assert checked == 20


@pytest.mark.usefixtures("listed")
@pytest.mark.ahead(lambda: kernels(NAMES[0]))
@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_the_report_is_of_these_kernels():
    """`bench/results/static/cuda.json` lists what the library holds for the first architecture."""
    report = json.loads(cuda_resources.REPORT.read_text())
    architecture = NAMES[0]
    names = map(cuda_resources.demangled, kernels(architecture))
    own = [cuda_resources.description(name) for name in names]
    if architecture in cuda_resources.WITHOUT_CLUSTERS:
        own = [described for described in own if "cluster" not in described[0]]
    own = sorted(json.dumps(fields, sort_keys=True) for fields, _, _ in own)
    listed = [cuda_resources.identity(e) for e in report["entries"]]
    listed = [e for e in listed if e.pop("architecture") == architecture]
    assert sorted(json.dumps(fields, sort_keys=True) for fields in listed) == own


def assert_every_width(name: str, instructions: list[str]) -> None:
    """A kernel has loads of a residual of fewer channels in every width that there is."""
    widths = [re.search(r"\.(U16|64|128)\b", load) for load in opcodes(instructions, "LDG")]
    found = {match[1] if match else "32" for match in widths}
    has_16_bits = "half" in name or "bfloat16" in name
    expected = {"U16", "32", "64", "128"} if has_16_bits else {"64", "128"}  # of elements too
    assert found >= expected, name
    stores = set(opcodes(instructions, "STG"))
    assert all(store.endswith((".128", ".U8")) for store in stores), name


@of_each_architecture
def test_batch_norm_accesses_16_bytes(architecture):
    """What the kernels of whole accesses read and write of tensors, but for values of a channel."""
    found = {
        name: instructions
        for name, instructions in kernels(architecture).items()
        if "batch_norm" in name and "in_one_launch" not in name
    }
    # Statistics, normalize for two kinds of residual with and without a mask, and two with four
    # kinds of mask, in three dtypes and two widths; and two that combine.
    assert len(found) == 3 * 2 * (1 + 4 + 2 * 4) + 2
    whole = {name: k for name, k in found.items() if re.search(r"Li[48]E", name)}
    assert len(whole) == 3 * (1 + 4 + 2 * 4)
    for name, instructions in whole.items():
        if re.search(r"normalize.*Li\d+ELb1E", name):
            assert_every_width(name, instructions)
            continue
        loads, stores = opcodes(instructions, "LDG"), opcodes(instructions, "STG")
        wide = [load for load in loads if ".128" in load]
        # A mask's bits are read, or written where a mask is wanted, a byte at a time.
        assert any(".U8" in load for load in loads) == ("MaskE3E" in name), name
        masks = re.search(r"normalize.*Lb[01]ELb1E", name) is not None
        assert any(".U8" in store for store in stores) == masks, name
        loads, stores = ([op for op in ops if ".U8" not in op] for ops in (loads, stores))
        # The statistics, parameters and sums that a thread reads of one channel.
        assert len(loads) - len(wide) <= 6, name
        assert len(wide) >= 2, name
        assert all(store.endswith(".128") for store in stores), name
        assert stores, name
        assert not opcodes(instructions, "RED", "ATOM", "ATOMG"), name


@of_each_architecture
def test_batch_norm_in_clusters(architecture):
    """Every tensor asynchronously or in 16 bytes; others' sums from their blocks' shared memory."""
    found = {name: k for name, k in kernels(architecture).items() if "in_one_launch" in name}
    # Forward with and without a mask, backward with four kinds of mask, in three dtypes.
    assert len(found) == 3 * (2 + 4)
    for name, instructions in found.items():
        if architecture in cuda_resources.WITHOUT_CLUSTERS:
            assert not opcodes(instructions, "LDG", "STG", "LDGSTS", "BAR"), name
            continue
        backward = "backward" in name
        copies = opcodes(instructions, "LDGSTS")
        assert len(copies) >= 1 + backward, name
        assert all(copy.endswith(".128") for copy in copies), name
        loads, stores = opcodes(instructions, "LDG"), opcodes(instructions, "STG")
        narrow = [load for load in loads if ".128" not in load and ".U8" not in load]
        assert any(".U8" in load for load in loads) == ("MaskE3E" in name), name
        masks = not backward and "Lb1E" in name
        assert any(".U8" in store for store in stores) == masks, name
        # What a thread reads and writes of one channel, before the exchange and after it.
        assert len(narrow) <= 8, name
        of_channel = [store for store in stores if ".128" not in store and ".U8" not in store]
        assert len(of_channel) == 2 + backward, name
        assert any(".128" in store for store in stores), name
        # Others' sums and the barriers before and after.
        remote = [i for i in instructions if re.search(r"\bLD(\.E)?\b|LDS\.?.*cluster|MAPA", i)]
        assert remote, name
        assert len(opcodes(instructions, "UCGABAR_ARV")) == 2, name
        assert not opcodes(instructions, "RED", "ATOM", "ATOMG", "LDL", "STL"), name
