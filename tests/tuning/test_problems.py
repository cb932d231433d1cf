"""Problems and GPUs: keys, sizes, what a model's layers are, what is known of a GPU."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from support import MODELS
from support.tuning import CPU, GPUS, H100, SMALL, STEM, problems
from torch import nn

from fused_resnet.measure import networks
from fused_resnet.tuning import (
    ConvProblem,
    architecture,
)
from fused_resnet.tuning.problem import parse_problem

pytestmark = pytest.mark.quick


@given(problems())
def test_key_round_trip(problem: ConvProblem) -> None:
    assert parse_problem(problem.key) == problem
    assert "\n" not in problem.key


def test_key_is_stable() -> None:
    """What is on users' disks has to stay readable."""
    assert SMALL.key == "float32 2x8x6x6 k16 3x3 s1x1 p1x1 d1x1 g1 residual"
    assert STEM.key == "float32 2x3x20x20 k8 7x7 s2x2 p3x3 d1x1 g1 pool3x3,2x2,1x1"
    assert str(STEM) == "3x20x20 to 8, 7x7, stride 2, pool"


@pytest.mark.parametrize(
    "key", ["", "float32", SMALL.key + " ", SMALL.key.replace("float32", "float64"), "x" + STEM.key]
)
def test_what_is_no_key(key: str) -> None:
    with pytest.raises(ValueError, match="key is"):
        parse_problem(key)


@given(problems())
@settings(max_examples=50)
def test_sizes_are_torchs(problem: ConvProblem) -> None:
    with torch.device("meta"):
        input = torch.empty(problem.N, problem.C, problem.H, problem.W)
        weight = torch.empty(problem.K, problem.C // problem.groups, problem.R, problem.S)
        convolution = (problem.stride, problem.padding, problem.dilation, problem.groups)
        out = F.conv2d(input, weight, None, *convolution)
    assert out.shape[2:] == (problem.P, problem.Q)
    pool = problem.pool
    if pool is not None and min(problem.P, problem.Q) >= 3:
        pooled = F.max_pool2d(out, pool[0:2], pool[2:4], pool[4:6])
        assert pooled.shape[2:] == problem.output_size


def test_bytes_and_flops() -> None:
    problem = ConvProblem(2, 4, 8, 8, 6, 1, 1, (2, 2), (0, 0), (1, 1), 2, "float16", True)
    assert problem.flops == 2 * 2 * 6 * 4 * 4 * 2
    # A quarter of the pixels, the filters, shortcut and output, four float32 parameters a channel.
    assert problem.bytes_once == 2 * (2 * 4 * 16 + 6 * 2 + 2 * (2 * 6 * 16)) + 4 * 4 * 6


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_the_models_convolutions(name: str) -> None:
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    found = networks.of_model(name, 4, "bfloat16")
    assert sum(found.values()) == len(convolutions)
    assert {(p.C, p.K, p.R, p.groups) for p in found} == {
        (c.in_channels, c.out_channels, c.kernel_size[0], c.groups) for c in convolutions
    }
    assert {(p.N, p.dtype) for p in found} == {(4, "bfloat16")}
    assert [p.output_size for p in found if p.pool is not None] == [(56, 56)]
    blocks = sum(type(m).__name__ in ("BasicBlock", "Bottleneck") for m in model.modules())
    assert sum(runs for p, runs in found.items() if p.residual) == blocks


def properties(name: str, **changed: object) -> SimpleNamespace:
    """As `torch.cuda.get_device_properties` of an H100 has them."""
    values = {
        "name": name,
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "clock_rate": 1980000,
        "memory_clock_rate": 2619000,
        "memory_bus_width": 5120,
        "shared_memory_per_block_optin": 227 * 1024,
        "shared_memory_per_multiprocessor": 228 * 1024,
        "regs_per_multiprocessor": 65536,
        "max_threads_per_multi_processor": 2048,
        "L2_cache_size": 50 * 2**20,
    }
    return SimpleNamespace(**{**values, **changed})


def test_known_gpus_have_their_published_figures() -> None:
    found = architecture.of_properties(properties("NVIDIA H100 80GB HBM3"))
    assert found.name == "NVIDIA H100 80GB HBM3"
    assert found.bandwidth == pytest.approx(H100.bandwidth, rel=1e-3)
    unnamed = dataclasses.replace(found, name="H100", bandwidth=H100.bandwidth)
    assert unnamed == H100
    # A slice has its share of the arithmetic; the driver here tells no memory clock.
    slice = properties(
        "NVIDIA H100 80GB HBM3 MIG 3g", multi_processor_count=66, memory_clock_rate=0
    )
    assert architecture.of_properties(slice).float16 == H100.float16 / 2
    pcie = architecture.of_properties(properties("NVIDIA H100 PCIe", multi_processor_count=114))
    assert pcie.float16 == 756e12


def test_unknown_gpus_are_like_their_kin() -> None:
    server = architecture.of_properties(properties("NVIDIA X", major=10, minor=3))
    assert server.float16 > H100.float16
    desktop = properties(
        "NVIDIA GeForce RTX 3090",
        major=8,
        minor=6,
        multi_processor_count=82,
        clock_rate=1695000,
        shared_memory_per_block_optin=99 * 1024,
    )
    # NVIDIA's Ampere GA102 whitepaper says 71 TFLOP/s.
    assert architecture.of_properties(desktop).float16 == pytest.approx(71e12, rel=0.05)


def test_names_of_gpus() -> None:
    assert architecture.named("h100") is H100
    assert architecture.named("rtx4090").name == "RTX 4090"
    assert architecture.named("H100-PCIe").multiprocessors == 114
    with pytest.raises(ValueError, match=r"'V100'.*A100"):
        architecture.named("V100")
    assert architecture.of_device(CPU) is H100


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_figures_are_plausible(gpu: architecture.Architecture) -> None:
    assert gpu.float16 >= 1.9 * gpu.tfloat32 >= 1.9 * gpu.float32
    assert gpu.shared_per_block < gpu.shared_per_multiprocessor <= 228 * 1024
    # Tensor cores do 512 to 8192 multiply-adds' worth of FLOP a cycle, always a power of two.
    a_cycle = gpu.float16 / gpu.multiprocessors / gpu.clock
    assert math.log2(a_cycle) == pytest.approx(round(math.log2(a_cycle)), abs=0.03)
