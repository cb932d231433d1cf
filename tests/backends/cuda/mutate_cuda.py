"""Breaks the CUDA kernels one line at a time and asks the suite whether it notices.

A mutant is one change of one line of a kernel: a comparison one further, an operator for another, a
condition forced, a statement left out, a wait for one copy fewer. It is compiled for the host
(csrc/cuda_on_host) and judged by the tests in `SUITES`, in a process of its own, which stop at
the first that fails. The report is `bench/results/static/cuda-mutants.json`:

    {"schema": "fused_resnet.mutants/1", "seed": 0, "entries": [{
        "file": "csrc/cuda/conv_bn_act.cuh", "line": "if (m >= conv.M || k >= k_end) continue;",
        "occurrence": 0, "mutant": "if (m > conv.M || k >= k_end) continue;", "outcome": "caught",
        "by": "test_exact[...]", "how": "cuda_on_host: out of bounds: ..."}]}

`outcome` is "caught", "survived" (then `why` says what is legitimate about it), "same code" (the
compiler makes the same machine code of it), "does not compile" or "does not load"; the last three
are no mutants of what runs, and count neither way. `how` is an exception's first line, a signal or
a time limit. Before any mutant, the unbroken kernels have to pass the same tests in the same way:
what is not a test that ran and failed is an error, not a mutant that was caught.

    python tests/backends/cuda/mutate_cuda.py [--count 100] [--seed 0] [--file NAME]
        [--only TEXT] [--survivors]
    python tests/backends/cuda/mutate_cuda.py --check 3

Entries are added to the report as they come; a run goes on where another stopped. The second form
judges a few of the report's mutants again and fails if one is caught no more.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fused_resnet import backends

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "tests"))

from support import cuda_on_host  # noqa: E402  (found through the line above)

REPORT = ROOT / "bench" / "results" / "static" / "cuda-mutants.json"
CONV = "csrc/cuda/conv_bn_act.cuh"
ACTIVATION = "csrc/cuda/activation.cuh"
SCALE_SHIFT_ACT = "csrc/cuda/scale_shift_act.cu"
BATCH_NORM = "csrc/cuda/batch_norm.cuh"
BATCH_NORM_ARITHMETIC = "csrc/cuda/batch_norm_arithmetic.cuh"
BATCH_NORM_CLUSTER = "csrc/cuda/batch_norm_cluster.cuh"
BASIC_BLOCK = "csrc/cuda/basic_block.cuh"
BYTE_CONV = "csrc/cuda/byte_conv.cuh"
HOPPER_CONV = "csrc/cuda/hopper/hopper_conv.cuh"
HOPPER_BOTTLENECK = "csrc/cuda/hopper/hopper_bottleneck.cuh"
HOPPER_PIPELINE = "csrc/cuda/hopper/pipeline.cuh"
NARROW_RESIDUAL = "csrc/cuda/narrow_residual.cuh"
TIME_LIMIT = 45  # seconds of computing for the tests of one mutant; unbroken, a third of it
PATIENCE = 180  # seconds after which tests that computed nothing meanwhile will not end
DOES_NOT_LOAD = 99  # exit code of a process of tests, beside pytest's own


class VerdictError(Exception):
    """Tests that ended in a way that says nothing about a kernel."""


@dataclass(frozen=True)
class Suite:
    """A source that compiles what a mutant changes, and the tests that run it.

    Those of a file are thinned as `pytest` thins them, those of a function that is named are not.
    """

    source: str
    file: str
    selected: str


OF_BATCH_NORM = [
    Suite(
        "batch_norm.cu",
        "backends/cuda/test_cuda_batch_norm.py",
        "not float16 and not bfloat16 and not parameters_of_any and not bad_input "
        "and not explained and not converts and not schemas and not cluster",
    ),
]

OF_HOPPERS_CHAIN = Suite(
    "hopper/hopper_bottleneck_float16.cu",
    "backends/cuda/test_hopper_bottleneck.py",
    "not bfloat16 and not error_rule and not tune and not table and not refuse "
    "and not choice and not takes_none and not other_blocks and not gradients",
)

# Another only for what those before compile to the same code, and for survivors judged again.
SUITES = {
    CONV: [
        Suite(
            "conv_bn_act_float16.cu",
            "backends/cuda/test_cuda_conv_exact.py",
            "[float16 and (elements or not layouts)",
        ),
        Suite(
            "conv_bn_act_float32.cu",
            "backends/cuda/test_cuda_conv_exact.py",
            "float32- and (elements or not layouts)",
        ),
        # Several blocks a sum: what one writes and another reads has to be in order.
        Suite(
            "conv_bn_act_float16.cu",
            "backends/cuda/test_cuda_conv.py::test_the_same_bits_in_any_order",
            "[float16-3x3-4]",
        ),
    ],
    ACTIVATION: [
        Suite(
            "conv_bn_act_float32.cu",
            "backends/cuda/test_cuda_conv_exact.py",
            "rounded_once and float32-",
        ),
        Suite(
            "conv_bn_act_float32.cu",
            "ops/test_activations.py",
            "special_values and cuda and float32",
        ),
    ],
    SCALE_SHIFT_ACT: [
        Suite(
            "scale_shift_act.cu",
            "ops/test_scale_shift_act.py",
            "on_host and not bfloat16 and not float64",
        ),
    ],
    BATCH_NORM: OF_BATCH_NORM,
    BATCH_NORM_ARITHMETIC: OF_BATCH_NORM,
    BATCH_NORM_CLUSTER: [
        Suite(
            "batch_norm_cluster.cu",
            "backends/cuda/test_cuda_batch_norm.py",
            "cluster and not float16 and not bfloat16 and not 2603x512 and not 75x2048",
        ),
    ],
    # Of which each takes other parts.
    NARROW_RESIDUAL: [
        Suite("batch_norm.cu", "backends/cuda/test_cuda_batch_norm.py", "narrow and float32"),
        Suite(
            "conv_bn_act_float16.cu", "backends/cuda/test_cuda_conv_exact.py", "narrow and [float16"
        ),
    ],
    HOPPER_CONV: [
        Suite(
            "hopper/hopper_conv_float16.cu",
            "backends/cuda/test_hopper_conv.py",
            "not tf32 and not bfloat16 and not tune and not the_backend and not refuse",
        ),
        Suite(
            "hopper/hopper_conv_float32.cu",
            "backends/cuda/test_hopper_conv.py",
            "tf32 and not the_backend",
        ),
    ],
    HOPPER_BOTTLENECK: [OF_HOPPERS_CHAIN],
    HOPPER_PIPELINE: [OF_HOPPERS_CHAIN],
    BYTE_CONV: [
        Suite("byte_conv.cu", "backends/cuda/test_cuda_quantized.py", "not refuse and not module"),
    ],
    BASIC_BLOCK: [
        Suite(
            "basic_block.cu",
            "backends/cuda/test_cuda_basic_block.py",
            "not bfloat16 and not float64 and not run and not other_blocks and not tuner",
        ),
    ],
}

# Sources that share a table of instances, by how their names begin.
FAMILIES = ("conv_", "hopper_conv", "hopper_bottleneck")

KEY = ("file", "line", "occurrence", "mutant")  # of an entry

# Why a mutant that survives is no gap in the tests, by the line and what it is changed to.
EXPLANATIONS: dict[tuple[str, str], str] = {
    (
        "target[e] = m < conv.M && k + e < k_end ? source[e] : device::narrow<T>(0.f);",
        "target[e] = m < conv.M && k + e < k_end ? source[e] : device::narrow<T>(1.f);",
    ): "equivalent: outputs beyond the last pixel and the last filter are not stored",
    (
        "for (int i = threadIdx.x; i < kTile.n; i += kThreads) {",
        "for (int i = threadIdx.x; i < kTile.n; i = kThreads) {",
    ): "equivalent: no instance has more filters than threads, so this loops once",
    (
        "for (int piece = 0; piece < kStages - 1; ++piece) load_residual(piece);",
        "for (int piece = 0; piece <= kStages - 1; ++piece) load_residual(piece);",
    ): "equivalent: the pieces before hold all of the residual, by a static_assert",
    (
        "for (; row + (kRowsInFlight - 1) * row_step < rows; row += kRowsInFlight * row_step) {",
        "for (; row + (kRowsInFlight) * row_step < rows; row += kRowsInFlight * row_step) {",
    ): "performance: the loop after it takes the last rows one by one",
    (
        "if (e + 1 < N && ++current_place == plane) {",
        "if (e < N && ++current_place == plane) {",
    ): "equivalent: after a vector's last element it loads a scale and a shift that nothing uses",
    (
        "const int tile_n = kDiagonal ? 0 : blockIdx.x % columns;",
        "const int tile_n = blockIdx.x % columns;",
    ): "equivalent: on the diagonal there is one column of tiles",
    (
        "if (old == old) continue;",
        "if (false) continue;",
    ): "performance: numbers beside a NaN are summed again too, to the same",
    (
        "scale[i] = exists ? read(conv.bn_weight, k, 1.f) / deviation : 0.f;",
        "scale[i] = exists ? read(conv.bn_weight, k, 1.f) / deviation : 1.f;",
    ): "equivalent: outputs beyond the last filter are not stored",
    (
        "const float deviation = exists ? sqrtf(read(conv.running_var, k, 1.f) + conv.eps) : 1.f;",
        "const float deviation = exists ? sqrtf(read(conv.running_var, k, 0.f) + conv.eps) : 1.f;",
    ): "equivalent: the variance is never left out, so nothing stands for it",
    (
        "(read(conv.bias, k, 0.f) - read(conv.running_mean, k, 0.f)) * scale[i]",
        "(read(conv.bias, k, 0.f) - read(conv.running_mean, k, 1.f)) * scale[i]",
    ): "equivalent: the mean is never left out, so nothing stands for it",
    (
        "if constexpr (kCluster > 1) {",
        "if constexpr (kCluster >= 1) {",
    ): "performance: a block that is a cluster by itself waits for itself",
    (
        "const int end = min(kTile.m, (piece + 1) * kPieceRows) * kOutChunks;",
        "const int end = ((piece + 1) * kPieceRows) * kOutChunks;",
    ): "performance: loads rows of the residual that nothing reads, into a stage that is free",
    (
        "const int share = (all_steps + gridDim.z - 1) / gridDim.z;",
        "const int share = (all_steps + gridDim.z) / gridDim.z;",
    ): "performance: the first shares are longer, and the last shorter or none",
    (
        "constexpr int kPlaces = kChunks < 8 ? kChunks : 8;",
        "constexpr int kPlaces = kChunks;",
    ): "equivalent: another permutation, of as many banks",
    (
        "constexpr int kOutStep = sizeof(T) / 2;  "
        "// keeps a warp's stores of two elements free of conflict",
        "constexpr int kOutStep = sizeof(T) * 2;",
    ): "performance: another permutation, of fewer banks",
    (
        "if (conv.group_c >= kElements) {",
        "if (conv.group_c > kElements) {",
    ): "performance: chunks that could be copied whole are copied in pieces",
    (
        "const int lanes = min(vectors, kThreads);",
        "const int lanes = (kThreads);",
    ): "performance: a block has one row, and threads beyond it nothing to do",
    (
        "for (int i = 0; i < 2 * N; ++i) sums[i] += others[i];",
        "for (int i = 0; i <= 2 * N; ++i) sums[i] += others[i];",
    ): "local memory: what a thread writes beyond an array of its own is not watched on the host",
    (
        "through_statistics ? per_value * dot[channel] * affine.invstd * affine.invstd : 0.f;",
        "through_statistics ? per_value * dot[channel] * affine.invstd * affine.invstd : 1.f;",
    ): "equivalent: a slope that is not through the statistics is not added",
    (
        "values[kOffset] = through_statistics ? per_value * total[channel] : 0.f;",
        "values[kOffset] = through_statistics ? per_value * total[channel] : 1.f;",
    ): "equivalent: an offset that is not through the statistics is not added",
    (
        "for (int i = 0; i < N; i += kWidth) {",
        "for (int i = 0; i < N; i = kWidth) {",
    ): "equivalent in float32, of which mutants are compiled: one access has all N numbers",
    (
        "if (channel < p.channels) {",
        "if (channel <= p.channels) {",
    ): "equivalent: what is combined of a channel beyond the last is not stored",
    (
        "if (kMask == Mask::kRecomputed || through_statistics) {",
        "if (true) {",
    ): "performance: loads an input on which nothing depends",
    (
        "convolve(middle_tile, min(lane % 16, kTile.kColumns - 1),",
        "convolve(middle_tile, min(lane % 16, kTile.kColumns),",
    ): (
        "equivalent: a column beyond the tile, of which nothing is stored, reads one more pixel, "
        "which is the next row's or the ring's"
    ),
    (
        "const float deviation = sqrtf(read(layer.running_var, k, 1.f) + layer.eps);",
        "const float deviation = sqrtf(read(layer.running_var, k, 0.f) + layer.eps);",
    ): "equivalent: the variance is never left out, so nothing stands for it",
    (
        "(read(norm.bias, k, 0.f) - read(norm.running_mean, k, 0.f)) * scale[k]",
        "(read(norm.bias, k, 0.f) - read(norm.running_mean, k, 1.f)) * scale[k]",
    ): "equivalent: the mean is never left out, so nothing stands for it",
    (
        "const float deviation = exists ? sqrtf(read(norm.running_var, k, 1.f) + norm.eps) : 1.f;",
        "const float deviation = exists ? sqrtf(read(norm.running_var, k, 0.f) + norm.eps) : 1.f;",
    ): "equivalent: the variance is never left out, so nothing stands for it",
    (
        ": 0.f;",
        ": 1.f;",
    ): "equivalent: outputs beyond the last filter are not stored",
    (
        "if (has_residual) y[e] += device::widen(residual.values[e]);",
        "if (true) y[e] += device::widen(residual.values[e]);",
    ): "equivalent: without a residual zeros are added",
    (
        "const int tiles = (block.M + kM * kCluster - 1) / (kM * kCluster);",
        "const int tiles = (block.M + kM * kCluster) / (kM * kCluster);",
    ): "performance: a tile behind the last pixel, of which nothing is stored",
    (
        "__syncwarp();",
        ";",
    ): "convergence: a warp's threads arrive one by one on the host, those that loop later",
    (
        "return (i + 1) * kWarps <= rows || warp + i * kWarps < rows;",
        "return (i + 1) * kWarps < rows || warp + i * kWarps < rows;",
    ): "equivalent: the second comparison alone is right, the first is for the compiler to see",
}
HARMLESS = ("equivalent: ", "performance: ")  # how the explanation of no mistake begins


@dataclass(frozen=True)
class Mutant:
    """One changed line."""

    file: str
    number: int  # of the line, from 0
    occurrence: int  # of the same line before it
    line: str
    changed: str
    operator: int  # index into OPERATORS

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.file, self.line.strip(), self.occurrence, self.changed.strip()


# What is replaced by what. Each occurrence in a line makes a mutant of its own.
OPERATORS = [
    (r" < (?!float|uint|T\b)", [" <= "]),
    (r" <= ", [" < "]),
    (r" > ", [" >= "]),
    (r" >= ", [" > "]),
    (r" == ", [" != "]),
    (r" != ", [" == "]),
    (r" && ", [" || "]),
    (r" \|\| ", [" && "]),
    (r" \+ 1\b", [""]),
    (r" - 1\b", [""]),
    (r" \+ (?!1\b)", [" - "]),
    (r" - (?!1\b)", [" + "]),
    (r" \* (?!const)", [" / "]),
    (r" / ", [" * "]),
    (r" % \w+(\.\w+)?", [""]),
    (r" \^ \(", [" & ("]),
    (r" \+= ", [" -= ", " = "]),
    (r" -= ", [" += "]),
    (r"(?<=[\w\])]) \+ [\w.]+(?=[;,)\]])", [""]),
    (r"\+\+(?=\w+\b[;)])", ["--"]),
    (r"\b0\.f\b", ["1.f"]),
    (r"\b1\.f\b", ["0.f"]),
    (r"\bmin\((.+?), (.+)\)(?=;| \*)", [r"(\1)", r"(\2)"]),
    (r"<kStages - 2>", ["<kStages - 1>"]),
    (r"\bfor_copies<0>", ["for_copies<1>"]),
    (r"\bwait_for_products<0>", ["wait_for_products<1>"]),
    (r"\bwait_for_products<1>", ["wait_for_products<2>"]),
    (r"\b(empty|full) \+ place\.stage, ", [r"\1, "]),
    (r"\bif \((.+)\) (?=\{|return|continue)", ["if (true) ", "if (false) "]),
    (r"\bif \((.+)\)(?= \w)", ["if (true)", "if (false)"]),
    (r"(?<== )([^=;]+?) \? ((?:[^:;]|::)+) : ([^;]+);", [r"\2;", r"\3;"]),
    (r"^\s*(__syncthreads|__threadfence|device::commit_copies|device::wait_\S*)\(\);", [";"]),
    (r"^\s*(__syncwarp|device::(wait|fence|commit|publish|synchronize|leave)\w*)\b[^;]*\);", [";"]),
    (r"^\s*(?!__|device::(commit|wait))[^\s/][^{}]*;\s*$", [";"]),
]

# Declarations cannot be left out, and none of these is about a kernel's work.
UNTOUCHED = re.compile(
    r"^\s*(//|#|static_assert|using |template|}|namespace|constexpr int k\w+ = -)"
)
DECLARATION = re.compile(
    r"^\s*(const |constexpr |static |char\*|float\*? |int\d*(_t)? |T\* |auto |bool |Vector|Window|"
    r"Tap |A |Index |uint32_t |\[\[|return [^;]|Loop |float \()"
)


def mutants(file: str) -> list[Mutant]:
    """Every mutant of a file's kernels."""
    found: dict[tuple[str, str, int, str], Mutant] = {}
    lines = (ROOT / file).read_text().splitlines()
    for number in kernel_lines(lines):
        line = lines[number]
        code = line.partition("//")[0]
        if UNTOUCHED.match(line) or not code.strip():
            continue
        occurrence = lines[:number].count(line)
        for operator, (pattern, replacements) in enumerate(OPERATORS):
            for match in re.finditer(pattern, code):
                for replacement in replacements:
                    text = match.expand(replacement)
                    changed = code[: match.start()] + text + code[match.end() :]
                    if changed.strip() == ";" and not complete(lines, number):
                        continue
                    mutant = Mutant(file, number, occurrence, line, changed, operator)
                    found.setdefault(mutant.key, mutant)
    return list(found.values())


def kernel_lines(lines: list[str]) -> Iterator[int]:
    """The lines of functions that run on the device."""
    inside = False
    for number, line in enumerate(lines):
        if "__device__" in line or "__global__" in line or line.startswith("struct Tap"):
            inside = True
        if inside:
            yield number
        if line.startswith("}"):
            inside = False


def complete(lines: list[str], number: int) -> bool:
    """Whether a line is a whole statement that declares nothing."""
    before = lines[number - 1].strip()
    starts = before.endswith((";", "{", "}", ":")) or before.startswith(("#", "//"))
    return starts and not DECLARATION.match(lines[number])


def sample(seed: int) -> list[Mutant]:
    """All mutants in an order that the seed draws, as many of each operator as there are."""
    every = [mutant for file in SUITES for mutant in mutants(file)]
    random.Random(seed).shuffle(every)
    drawn: Counter[int] = Counter()
    rounds = {}
    for mutant in every:
        rounds[mutant.key] = drawn[mutant.operator]
        drawn[mutant.operator] += 1
    return sorted(every, key=lambda mutant: rounds[mutant.key])


def judge(mutant: Mutant, thorough: bool = False) -> dict[str, Any]:
    """Compiles and tests a mutant, thoroughly in every suite; its entry in the report."""
    entry = dict(zip(KEY, mutant.key, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(few_instances() / "cuda", Path(folder) / "cuda")
        changed = Path(folder) / Path(mutant.file).relative_to("csrc")
        lines = (ROOT / mutant.file).read_text().splitlines()
        lines[mutant.number] = mutant.changed
        changed.write_text("\n".join(lines) + "\n")

        same = True
        broken: list[Path] = []
        # Who survived has passed the first ones before.
        for suite in reversed(SUITES[mutant.file]) if thorough else SUITES[mutant.file]:
            if not same and not thorough:
                break
            source = ROOT / "csrc" / "cuda" / suite.source
            if (changed.parent / source.name).is_file():  # as it was changed, or in fewer dtypes
                source = changed.parent / source.name
            broken.append(Path(folder) / f"{source.stem}.o")
            complaint = compile_source(source, Path(folder), broken[-1])
            if complaint is not None:
                return entry | {"outcome": "does not compile"}
            if machine_code(broken[-1]) == unbroken_code(suite.source):
                continue
            same = False
            library = link(broken, Path(folder))
            outcome, noticed = run_suite(suite, library) if library else ("does not load", {})
            if outcome != "survived":
                return entry | {"outcome": outcome} | noticed
    # On the host a fence is no instruction, but on a GPU it is one.
    if same and "__threadfence" not in mutant.line:
        return entry | {"outcome": "same code"}
    return entry | {"outcome": "survived"}


def compile_source(source: Path, folder: Path, target: Path) -> str | None:
    """Compiles for the host, what is in `folder` first; returns the compiler's complaint."""
    command = cuda_on_host.compile_command(source, folder)
    command[command.index("-O2")] = "-O1"
    command += ["-g0", f"-ffile-prefix-map={folder}={ROOT / 'csrc'}", "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else None


@functools.cache
def few_instances() -> Path:
    """A folder with sources of fewer instances.

    Of the convolutions, for each way to multiply and load and each length of a row of shared memory
    the smallest; of batch norm, those for float32; of Hopper's convolution, one of each schedule,
    one of these in clusters, and one for float32; of its chain, one alone and one in clusters.
    """
    folder = Path(tempfile.mkdtemp(prefix="cuda-mutants-"))
    atexit.register(_remove, folder, os.getpid())
    lines = (ROOT / "csrc" / "cuda" / "conv_tiles.h").read_text().splitlines()
    row = re.compile(r"\s*\{(Products::\w+, Loads::\w+), (\d+), (\d+), (\d+), ")
    smallest: dict[tuple[str, str], tuple[int, str]] = {}
    for line in lines:
        if match := row.match(line):
            kind, size = (match[1], match[4]), int(match[2]) * int(match[3])
            if kind not in smallest or size < smallest[kind][0]:
                smallest[kind] = (size, line)
    kept = {line for _, line in smallest.values()}
    (folder / "cuda").mkdir()
    text = "\n".join(line for line in lines if not row.match(line) or line in kept)
    (folder / "cuda" / "conv_tiles.h").write_text(text + "\n")
    (folder / "cuda" / "hopper").mkdir()
    text = (ROOT / "csrc" / "cuda" / "hopper" / "tiles.h").read_text()
    kept_tiles = re.compile(r"\{(2, 128, 4, 2|2, 64, 8, 1|4, 64, 6, 1), Schedule")
    rows = [
        line for line in text.splitlines() if ", Schedule::k" not in line or kept_tiles.search(line)
    ]
    (folder / "cuda" / "hopper" / "tiles.h").write_text("\n".join(rows) + "\n")
    text = (ROOT / "csrc" / "cuda" / "hopper" / "bottleneck_tiles.h").read_text()
    left_out = re.compile(
        r"^ +\{(?!64, 64, 128, 5, 1|64, 128, 128, 5, 2)[\d, ]+\},\n", re.MULTILINE
    )
    (folder / "cuda" / "hopper" / "bottleneck_tiles.h").write_text(left_out.sub("", text))
    operands = (ROOT / "csrc" / "cuda" / "batch_norm_operands.cuh").read_text()
    left_out = re.compile(r"return run\(__(half|nv_bfloat16)\(\)\);")
    assert len(left_out.findall(operands)) == 2
    reduced = folder / "cuda" / "batch_norm_operands.cuh"
    reduced.write_text(left_out.sub('fail("float32 alone");', operands))
    return folder


def compile_few_instances(file: str) -> None:
    """Makes the objects that mutants of a file are linked with or compared to."""
    folder = few_instances()
    stems = {Path(suite.source).stem for suite in SUITES[file]}
    families = tuple(
        next((family for family in FAMILIES if stem.startswith(family)), stem) for stem in stems
    )
    for source in cuda_on_host.sources():
        if source.stem.startswith(families):
            complaint = compile_source(source, folder, folder / f"{source.stem}.o")
            assert complaint is None, complaint


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(folder)


@functools.cache
def unbroken_code(source: str) -> str:
    """The machine code of a source as it is, compiled as mutants are."""
    return machine_code(few_instances() / f"{Path(source).stem}.o")


def machine_code(obj: Path) -> str:
    """Instructions and constants; not the strings and columns that faults are told by."""
    sections = [f"-j.rodata.cst{size}" for size in (4, 8, 16, 32)]
    listings = (["-d", "-r", "--no-show-raw-insn"], ["-s", *sections])
    return "".join(
        subprocess.run(["objdump", *options, obj.name], cwd=obj.parent, capture_output=True,
                       text=True).stdout.replace(obj.name, "")
        for options in listings
    )  # fmt: skip


def link(broken: list[Path], folder: Path) -> Path | None:
    """The library of broken objects, and unbroken ones for the rest; None if it has gaps."""
    few = {obj.stem: obj for obj in few_instances().glob("*.o")}
    few |= {obj.stem: obj for obj in broken}
    others = [
        few.get(source.stem) or cuda_on_host.compiled(source) for source in cuda_on_host.sources()
    ]
    others = [obj for obj in others if obj not in broken]
    library = folder / f"{cuda_on_host.NAME}.so"
    # Of what several objects define, the first is taken.
    command = [*cuda_on_host.link_command([*broken, *others]), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    return library if done.returncode == 0 else None


class FirstFailure:
    """A plugin of pytest that writes down what runs and why it failed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, Any] = {"passed": 0}

    def write(self, **values: Any) -> None:
        self.found |= values
        self.path.write_text(json.dumps(self.found))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        random.Random(0).shuffle(items)  # kinds of tests mixed, so that one fails soon

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(by=nodeid.partition("::")[2])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self.write(passed=self.found["passed"] + 1)

    def pytest_exception_interact(self, call: Any) -> None:
        lines = str(call.excinfo.value).strip().splitlines()
        said = " ".join(line.strip() for line in lines if line.strip())
        said = re.sub(r"/[\w./]*/", "", said)
        self.write(how=f"{call.excinfo.typename}: {said}"[:160])


def run_suite(suite: Suite, library: Path) -> tuple[str, dict[str, str]]:
    """The outcome of a library's tests; where it is "caught", by which test and how.

    Raises VerdictError where no test ran, or pytest itself failed.
    """
    record = library.with_suffix(".json")
    child = multiprocessing.get_context("fork").Process(target=_test, args=(suite, library, record))
    child.start()
    computed = None
    while child.is_alive():
        if computed == (computed := _cpu_ticks(child.pid)):
            child.kill()
        child.join(PATIENCE)
    code = child.exitcode
    if code == DOES_NOT_LOAD:
        return "does not load", {}
    noticed = json.loads(record.read_text()) if record.is_file() else {}
    said = f"{suite.file} -k '{suite.selected}': exit code {code}, {noticed}"
    passed = noticed.pop("passed", 0)
    if code == pytest.ExitCode.OK and passed:
        return "survived", {}
    if "by" not in noticed or (code >= 0 and code != pytest.ExitCode.TESTS_FAILED):
        raise VerdictError(said)
    if code < 0:
        name = signal.Signals(-code).name
        limits = (signal.SIGXCPU, signal.SIGKILL)
        noticed["how"] = "time limit" if -code in limits else name
    return "caught", noticed


def _cpu_ticks(process: int) -> int:
    """How long a process has computed: on a busy machine it may be long under way for that."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])  # of the user's and of the system's time


def _test(suite: Suite, library: Path, record: Path) -> None:
    """Runs the tests on a library, in a process of their own; exits with pytest's code."""
    resource.setrlimit(resource.RLIMIT_CPU, (TIME_LIMIT, TIME_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(os.devnull, "w") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    try:
        module = cuda_on_host.load_library(library)
    except ImportError:
        os._exit(DOES_NOT_LOAD)
    cuda_on_host.load = lambda: module
    tests = ROOT / "tests"
    options = ["-x", "-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-k", suite.selected]
    code = pytest.main([*options, str(tests / suite.file)], plugins=[FirstFailure(record)])
    os._exit(int(code))


def check_unbroken(suite: Suite) -> None:
    """Raises VerdictError unless the tests pass on unbroken kernels, built as mutants are."""
    with tempfile.TemporaryDirectory() as folder:
        library = link([few_instances() / f"{Path(suite.source).stem}.o"], Path(folder))
        if library is None:
            raise VerdictError(f"{suite.source}: the unbroken objects cannot be linked")
        outcome, noticed = run_suite(suite, library)
    if outcome != "survived":
        raise VerdictError(f"{suite.source}, unbroken: {outcome} {noticed}")


def read_report(path: Path = REPORT) -> dict[str, Any]:
    """The report, or an empty one."""
    if path.is_file():
        return json.loads(path.read_text())
    return {"schema": "fused_resnet.mutants/1", "entries": []}


def key_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in KEY)


def write_report(report: dict[str, Any], path: Path = REPORT) -> None:
    entries = sorted(report["entries"], key=key_of)
    for entry in entries:
        why = EXPLANATIONS.get((entry["line"], entry["mutant"]))
        if entry["outcome"] == "survived" and why:
            entry["why"] = why
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    head = {k: v for k, v in report.items() if k != "entries"}
    path.write_text(json.dumps(head)[:-1] + f', "entries": [\n  {lines}\n]}}\n')


def is_harmless(entry: dict[str, Any]) -> bool:
    """Whether a mutant survives because what it computes is right."""
    return entry.get("why", "").startswith(HARMLESS)


def share_caught(entries: list[dict[str, Any]]) -> float:
    """Of the mutants that are mistakes."""
    counted = [e for e in entries if e["outcome"] in ("caught", "survived") and not is_harmless(e)]
    return sum(entry["outcome"] == "caught" for entry in counted) / max(1, len(counted))


def score(entries: list[dict[str, Any]]) -> str:
    """What the report says, in words."""
    counts = Counter(entry["outcome"] for entry in entries)
    harmless = sum(map(is_harmless, entries))
    return (
        f"{counts['caught']} caught, {counts['survived']} survived, of which {harmless} compute "
        f"what they should; {share_caught(entries):.1%} of the others caught"
    )


def still_true(
    entries: list[dict[str, Any]],
    current: set[tuple[Any, ...]],
    file: str,
    only: str,
    survivors: bool,
) -> list[dict[str, Any]]:
    """The entries but, of those asked for, such as are of no mutant any more or judged again."""

    def is_asked_for(entry: dict[str, Any]) -> bool:
        return entry["file"].endswith(file) and only in entry["line"]

    def goes(entry: dict[str, Any]) -> bool:
        return key_of(entry) not in current or (survivors and entry["outcome"] == "survived")

    return [entry for entry in entries if not (is_asked_for(entry) and goes(entry))]


def check(count: int) -> None:
    """Judges some of the report's mutants again."""
    caught = {key_of(e) for e in read_report()["entries"] if e["outcome"] == "caught"}
    order = [mutant for mutant in sample(0) if mutant.key in caught and mutant.file == CONV]
    assert len(order) >= count, "the report is about other kernels than these"
    for mutant in order[:count]:
        entry = judge(mutant)
        print(f"{entry['outcome']}: {entry['mutant']}  [{entry.get('how', '')}]")
        assert entry["outcome"] == "caught", entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="mutants that compile to other code")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--file", default="", help="mutants of the file of this name")
    parser.add_argument("--only", default="", help="mutants whose line has this text")
    parser.add_argument("--survivors", action="store_true", help="judge those again")
    parser.add_argument("--check", type=int, default=0, help="judge so many caught ones again")
    arguments = parser.parse_args()
    if arguments.check:
        prepare([CONV])
        check(arguments.check)
        return
    prepare(file for file in SUITES if file.endswith(arguments.file))
    report = read_report()
    report |= {"seed": arguments.seed, "compiler": compiler()}
    order = [mutant for mutant in sample(arguments.seed) if arguments.only in mutant.line]
    order = [mutant for mutant in order if mutant.file.endswith(arguments.file)]
    current = {mutant.key for mutant in order}
    kept = still_true(
        report["entries"], current, arguments.file, arguments.only, arguments.survivors
    )
    report["entries"] = kept
    present = {key_of(entry) for entry in kept}
    todo = [mutant for mutant in order if mutant.key not in present]

    def enough() -> bool:
        entries = [e for e in report["entries"] if e["file"].endswith(arguments.file)]
        return sum(e["outcome"] in ("caught", "survived") for e in entries) >= arguments.count

    fork = multiprocessing.get_context("fork")
    jobs = int(os.environ.get("MAX_JOBS") or 2)
    with ProcessPoolExecutor(jobs, mp_context=fork) as pool:
        running = set()
        while running or (todo and not enough()):
            while todo and len(running) < jobs and not enough():
                running.add(pool.submit(judge, todo.pop(0), arguments.survivors))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                entry = future.result()
                report["entries"].append(entry)
                write_report(report)
                told = entry.get("how", "")
                print(f"{entry['outcome']}: {entry['mutant']}  [{told}]", flush=True)
    write_report(report)
    print(score(report["entries"]))


def prepare(files: Iterable[str]) -> None:
    """What is the same for every mutant of these files, before processes are forked."""
    os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    cuda_on_host.build(cuda_on_host.sources())
    backends.available()
    for file in files:
        compile_few_instances(file)
        for suite in SUITES[file]:
            check_unbroken(suite)


def compiler() -> str:
    command = [cuda_on_host.compile_command(ROOT / "x.cu")[0], "--version"]
    return subprocess.run(command, capture_output=True, text=True).stdout.partition("\n")[0]


if __name__ == "__main__":
    main()
