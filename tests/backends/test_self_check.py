"""The check of kernels against the library: what is right passes, what is wrong is not used."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from conftest import RUNNERS, Runner
from hypothesis import strategies as st
from support import assert_same_bits
from support.threads import run_in_threads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck

import fused_resnet
from fused_resnet import backends, functional, reference
from fused_resnet.backends import (
    check_cases,
    cuda,
    cuda_quantized,
    hopper_chains,
    library,
    self_check,
)
from fused_resnet.backends.self_check import Case, Family, Verdict
from fused_resnet.layers.description import ConvNorm, Norm, Pool
from fused_resnet.layers.quantized import (
    Quantization,
    QuantizedBlock,
    QuantizedConv,
    QuantizedStem,
)
from fused_resnet.modules import network
from fused_resnet.testing import randomize_
from fused_resnet.tuning import (
    ChainProblem,
    Choice,
    ConvProblem,
    Tile,
    architecture,
    cuda_tiles,
)
from fused_resnet.tuning.choice import PAIR
from fused_resnet.tuning.problem import BasicBlockProblem

CPU = torch.device("cpu")
if "triton" in {runner.name for runner in RUNNERS}:
    import triton
    import triton.language as tl

    right_sum = None

    @triton.jit
    def short_sum(
        input_ptr, above_ptr, weight_ptr, table_ptr, side_ptr, rows, h, w, columns, first, last,
        *rest,
    ):  # fmt: skip
        return right_sum(
            input_ptr, above_ptr, weight_ptr, table_ptr, side_ptr, rows, h, w, columns, first,
            last - 1, *rest,
        )  # fmt: skip

    right_fold = None

    @triton.jit
    def misplaced_fold(
        rows_ptr, mean_ptr, table_ptr, ticket_ptr, count, length, tickets, FIELDS: tl.constexpr,
        BLOCK: tl.constexpr, DEPENDENT: tl.constexpr = False,
    ):  # fmt: skip
        right_fold(
            rows_ptr, mean_ptr, table_ptr, ticket_ptr, count, length - 16, tickets, FIELDS, BLOCK
        )

    @triton.jit
    def is_first(ticket_ptr, tile, sharing: tl.constexpr):
        return tl.atomic_add(ticket_ptr + tile, 1, sem="acq_rel", scope="gpu") == 0

    @triton.jit
    def small_product(x, invstd):
        return x * invstd * 0.98


KERNELS = [r for r in RUNNERS if r.name in ("triton", "cuda") and r.device == "cpu"]
TRITON = pytest.mark.skipif(
    not any(r.name == "triton" for r in KERNELS), reason="Triton's kernels are not interpreted"
)
CUDA = pytest.mark.skipif(
    not any(r.name == "cuda" for r in KERNELS), reason="CUDA's kernels do not run on the host"
)


@pytest.fixture(autouse=True)
def checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Checks are on, wherever kernels run, and nothing is known; returns the folder of verdicts."""
    monkeypatch.setenv("FUSED_RESNET_CACHE", str(tmp_path))
    monkeypatch.setattr(self_check, "_unwritable", None)
    before = self_check.setting()
    self_check.use("1")
    clear()
    yield tmp_path / "self_check"
    monkeypatch.undo()
    self_check.use(before)
    clear()


def clear() -> None:
    """What another process would know: nothing."""
    for known in (self_check._known, self_check.settled, self_check._warned):
        known.clear()


def found() -> dict[str, Verdict]:
    return {str(family): verdict for (_, family), verdict in self_check._known.items()}


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def norm_of(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Mean, variance, weight and bias."""
    return [torch.rand(channels).to(dtype) + 0.5 for _ in range(4)]


def convolved(
    dtype: torch.dtype = torch.float32, taps: int = 3, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """What runs for a small convolution now, and the library's."""
    torch.manual_seed(1)
    x, weight = images(2, 16, 5, 6, dtype=dtype), images(24, 16, taps, taps, dtype=dtype) / 8
    norm = norm_of(24, dtype)
    arguments = {"padding": taps // 2, **arguments}
    ours = functional.conv_bn_act(x, weight, *norm, **arguments)
    with fused_resnet.use_backend("reference"):
        return ours, functional.conv_bn_act(x, weight, *norm, **arguments)


def are_close(ours: Tensor, library: Tensor) -> bool:
    return bool((ours - library).norm() < 0.01 * library.norm())


# What is right.


def calls(backend: str) -> dict[str, Callable[[], object]]:
    """Something for each kind of kernels."""
    x = images(2, 16, 5, 6).requires_grad_()
    mean, var, *affine = norm_of(16)
    residual = images(2, 16, 5, 6).requires_grad_()

    def trained(x: Tensor = x) -> None:
        with fused_resnet.use_backend(backend):
            out = functional.batch_norm_act(x, mean, var, *affine, True, residual=residual)
            out.backward(torch.ones_like(out))

    kernels = backends.named(backend)
    grad, fixed = images(2, 16, 5, 6), Norm(mean, var, *affine, 1e-5)
    plain = x.detach()
    sums = (torch.ones(16), torch.ones(16), 60)
    return {
        "conv": lambda: convolved(),
        "pointwise": lambda: convolved(taps=1),
        "strided": lambda: convolved(stride=2),
        "float16": lambda: convolved(torch.float16),
        "bfloat16": lambda: convolved(torch.bfloat16, activation="none"),
        "inference": lambda: kernels.batch_norm_act_inference(plain, fixed, None, "relu"),
        "training": lambda: kernels.batch_norm_act_training(plain, *fixed[2:], None, "relu"),
        "statistics": lambda: kernels.batch_statistics(plain),
        "with mask": lambda: kernels.batch_norm_add_relu(
            plain, (None, None, *fixed[2:]), residual.detach(), None
        ),
        "backward": lambda: kernels.batch_norm_act_backward(
            grad, plain, plain, fixed, "relu", True, (True,) * 4
        ),
        "backward sums": lambda: kernels.batch_norm_act_backward_sums(
            grad, plain, None, fixed, "relu"
        ),
        "backward input": lambda: kernels.batch_norm_act_backward_input(
            grad, plain, None, fixed, "relu", sums, True
        ),
        "through autograd": trained,
    }


@pytest.mark.parametrize("name", calls("reference"))
@pytest.mark.parametrize("runner", KERNELS, ids=lambda runner: runner.name)
def test_right_kernels_are_used(runner: Runner, name: str, checked: Path) -> None:
    with fused_resnet.use_backend(runner.name), warnings.catch_warnings():
        warnings.simplefilter("error")
        calls(runner.name)[name]()
    assert found(), "nothing was checked"
    for family, verdict in found().items():
        assert verdict.passed, f"{family}: {verdict}"
        assert family.startswith(runner.name)
        assert verdict.error is not None
        assert verdict.limit is not None
    (file,) = checked.glob("*.json")
    assert set(json.loads(file.read_text())["verdicts"]) == set(found())


@TRITON
@pytest.mark.parametrize(
    "name",
    ["stem", "prologue", "chain", "pair", "norms", "pool", "forward", "backward", "last backward"],
)
@pytest.mark.single
def test_right_kernels_of_triton_are_used(name: str) -> None:
    """Those that only Triton's backend has."""
    from fused_resnet.backends.triton import chains, checks
    from fused_resnet.backends.triton import training as trained

    triton = backends.named("triton")
    dtype = torch.float16
    x, norm = images(2, 16, 5, 6, dtype=dtype), Norm(*norm_of(16), 1e-5)
    layer = ConvNorm(images(16, 16, 1, 1, dtype=dtype), norm, None, (1, 1), (0, 0), (1, 1), 1)
    geometry = layer[3:]
    if name == "stem":
        weight = images(16, 3, 7, 7, dtype=dtype)
        stem = ConvNorm(weight, norm, None, (2, 2), (3, 3), (1, 1), 1)
        pool = ((3, 3), (2, 2), (1, 1))
        triton.conv_bn_act_max_pool(images(2, 3, 20, 22, dtype=dtype), stem, "relu", pool)
    elif name == "prologue":
        triton.norm_conv_bn_act(x, norm, layer, None, "relu")
    elif name in ("chain", "pair"):
        problem = ChainProblem(
            2, 16, 6, 5, 32, (2, 2), (1, 1), (1, 1), "float16", (16, 6, 5, 2, 2), 16
        )
        choice = dataclasses.replace(chains.choose(problem, CPU), kernel=name)
        assert checks.trusts_chain(problem, x, choice, chains)
    elif name == "norms":
        other = Norm(*norm_of(16), 1e-5)
        triton.batch_norm_add_relu_backward(x, x, x, norm, x, other)
    elif name == "pool":
        triton.batch_norm_relu_max_pool(x, *norm[2:], ((3, 3), (2, 2), (1, 1)))
    elif name == "forward":
        triton.conv_batch_norm_statistics(x, layer.weight, None, geometry, norm)
    elif name == "backward":
        triton.conv_backward_input(x, layer.weight, (5, 6), geometry, x, None)
    else:
        trained.norm_conv_backward_input(x, x, (x, norm), layer.weight, (5, 6), geometry, (x, norm))
    assert len(found()) == 1
    for family, verdict in found().items():
        assert verdict.passed, f"{family}: {verdict}"


def shared_pass(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Launches of blocks that share norms and sums, whose result is close to the library's."""
    backends.triton.launchers()
    from fused_resnet.backends.triton import chains, launch

    choice = Choice(PAIR, Tile(16, 16, 16, 2, 4, 2), "test")
    monkeypatch.setattr(chains, "choose", lambda *_: choice)
    torch.manual_seed(2)
    stage = randomize_(nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16)).eval())
    right = copy.deepcopy(stage)
    stage = fused_resnet.fuse(stage).half()
    x = images(2, 64, 5, 6, dtype=torch.float16)
    with torch.no_grad(), fused_resnet.use_backend("triton"), launch.logged() as log:
        ours = network.stages_forward([stage], x)
    with torch.no_grad():
        assert are_close(ours.float(), right(x.float()))
    return [one.kernel for one in log]


@TRITON
def test_right_shared_launches_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch that folds norms, and whatever reads its table and draws its tickets."""
    kernels = shared_pass(monkeypatch)
    assert kernels[0] == "fold_norms_kernel"
    assert "sum_partials_kernel" not in kernels
    parts = [family.kernel for _, family in self_check._known]
    assert parts[0] == "norms folded in one launch"
    assert all("norms folded before" in part for part in parts[1:]), parts
    assert {part.partition(" of ")[0] for part in parts} >= {"pair"}
    for family, verdict in found().items():
        assert verdict.passed, f"{family}: {verdict}"
    # By themselves they are compiled otherwise, and checked again.
    count = len(found())
    with fused_resnet.use_backend("triton"):
        convolved(torch.float16, taps=1)
    assert len(found()) == count + 1


@TRITON
def test_wrong_folding_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    backends.triton.launchers()
    from fused_resnet.backends.triton import folded

    monkeypatch.setitem(globals(), "right_fold", folded.fold_norms_kernel)
    monkeypatch.setattr(folded, "fold_norms_kernel", misplaced_fold)
    with pytest.warns(UserWarning, match=r"triton: norms folded in one launch.*relative error"):
        kernels = shared_pass(monkeypatch)
    assert "misplaced_fold" not in kernels
    assert kernels.count("sum_partials_kernel") == 1
    wrong = [family.kernel for (_, family), one in self_check._known.items() if not one.passed]
    assert wrong == ["norms folded in one launch"]


@TRITON
def test_wrong_tickets_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever adds up before the last has come adds what is not there."""
    backends.triton.launchers()
    from fused_resnet.backends.triton import device

    monkeypatch.setattr(device, "is_last", is_first)
    with pytest.warns(UserWarning, match=r"triton: pair of width 16.*(relative error|NaN)"):
        kernels = shared_pass(monkeypatch)
    # The last block's has no sum that is shared.
    assert kernels.count("bottleneck_kernel") == 1
    wrong = [family.kernel for (_, family), one in self_check._known.items() if not one.passed]
    assert len(wrong) == 1
    assert "norms folded before" in wrong[0]


@TRITON
def test_right_kernels_of_eight_bits_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And wrong ones are not: a step of one filter is enough."""
    from fused_resnet.backends.triton import quantized

    weight = torch.randint(-127, 128, (16, 16, 3, 3), dtype=torch.int8)
    conv = QuantizedConv(
        weight, torch.full((16,), 1e-3), torch.full((16,), 60.0), (1, 1), (1, 1), (1, 1), 1
    )
    blocks = [QuantizedBlock((conv, conv), False, 0.7)]
    arguments = (images(1, 16, 5, 4), blocks, Quantization(0.05, 128), Quantization(0.03))
    right = reference.quantized_residual_blocks(*arguments)
    triton_backend = backends.named("triton")
    assert_same_bits(triton_backend.quantized_residual_blocks(*arguments), right)
    assert [verdict.passed for verdict in found().values()] == [True]
    self_check.forget()
    kernels = quantized.residual_blocks

    def wrong(*arguments: Any) -> Tensor:
        out = kernels(*arguments).clone()
        out[:, 3, :, 2] += 0.03
        return out

    monkeypatch.setattr(quantized, "residual_blocks", wrong)
    with pytest.warns(UserWarning, match=r"eight bits.*relative error"):
        assert_same_bits(triton_backend.quantized_residual_blocks(*arguments), right)


@TRITON
def test_right_kernels_of_float8_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers whose sums round otherwise are let pass; one filter in another step is not."""
    from fused_resnet.backends.triton import quantized

    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (16, 16, 3, 3), generator=generator)
    conv = QuantizedConv(
        weight.float().to(torch.float8_e4m3fn),
        torch.full((16,), 1e-3), torch.full((16,), 60.0), (1, 1), (1, 1), (1, 1), 1,
    )  # fmt: skip
    blocks = [QuantizedBlock((conv, conv), False, 0.7)] * 2
    arguments = (images(1, 16, 5, 4), blocks, Quantization(0.05), Quantization(0.03))
    right = reference.float8_residual_blocks(*arguments)
    triton_backend = backends.named("triton")
    kernels = quantized.residual_blocks
    monkeypatch.setattr(
        backends.backend.Backend, "float8_residual_blocks", lambda *_: pytest.fail("not a kernel")
    )
    assert (triton_backend.float8_residual_blocks(*arguments) != right).double().mean() < 0.02
    assert [verdict.passed for verdict in found().values()] == [True]
    monkeypatch.undo()
    self_check.forget()

    def wrong(*arguments: Any) -> Tensor:
        out = kernels(*arguments).clone()
        out[:, 3] *= 1.125
        return out

    monkeypatch.setattr(quantized, "residual_blocks", wrong)
    with pytest.warns(UserWarning, match=r"float8_e4m3fn, 2 blocks.*relative error"):
        assert_same_bits(triton_backend.float8_residual_blocks(*arguments), right)


@CUDA
def test_right_basic_blocks_are_used() -> None:
    problem = BasicBlockProblem(2, 64, 9, 9, "float16")
    tile = backends.cuda.basic_block.tiles(problem, backends.cuda.architecture.of_device(CPU))[-1]
    assert cuda.trusts_basic_block(problem, tile, CPU)
    assert [verdict.passed for verdict in found().values()] == [True]


@CUDA
@pytest.mark.parametrize(("width", "next_width"), [(64, 128), (128, 0)])
def test_right_chains_for_hopper_are_used(
    monkeypatch: pytest.MonkeyPatch, width: int, next_width: int
) -> None:
    """And wrong ones are not: a step in one channel of the output, or of what follows."""
    projection = (width, 9, 9, 1, 1)
    problem = ChainProblem(
        2, width, 9, 9, 4 * width, (1, 1), (1, 1), (1, 1), "float16", projection, next_width
    )
    tiles = cuda_tiles.hopper_chain_tiles(problem, architecture.of_device(CPU))
    assert tiles
    assert all(hopper_chains.trusts(problem, tile, CPU) for tile in tiles)
    assert {verdict.passed for verdict in found().values()} == {True}
    assert len(found()) == len(tiles)
    operator = hopper_chains._operator()
    for part in range(2 if next_width else 1):
        self_check.forget()

        def wrong(*arguments: Any, part: int = part) -> list[Tensor]:
            outs = [out.clone() for out in operator(*arguments)]
            outs[part][:, 3, :, 2] += 0.5
            return outs

        monkeypatch.setattr(hopper_chains, "_operator", lambda wrong=wrong: wrong)
        with pytest.warns(UserWarning, match=f"bottleneck of width {width}.*relative error"):
            assert not hopper_chains.trusts(problem, tiles[0], CPU)


@CUDA
def test_right_cuda_kernels_of_eight_bits_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """And wrong ones are not: a step in one channel, of a block or of a stem, is enough."""
    draw = check_cases._Draw(torch.float32, CPU)
    layer = draw.bytes_layer(16, 16, 3)
    blocks = [QuantizedBlock((layer, layer), False, 0.7)]
    of_blocks = (images(1, 16, 5, 4), blocks, Quantization(0.05, 128), Quantization(0.03))
    stem = QuantizedStem(draw.bytes_layer(3, 24, 7, 2), None, Pool((3, 3), (2, 2), (1, 1)))
    of_stem = (images(1, 3, 13, 14), stem, Quantization(0.02, 100), Quantization(0.03))
    right = reference.quantized_residual_blocks(*of_blocks)
    right_stem = reference.quantized_stem(*of_stem)
    backend = backends.named("cuda")
    assert_same_bits(backend.quantized_residual_blocks(*of_blocks), right)
    assert_same_bits(backend.quantized_stem(*of_stem), right_stem)
    assert [verdict.passed for verdict in found().values()] == [True, True]
    self_check.forget()

    def spoiled(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrong(*arguments: Any, **named: Any) -> Tensor:
            out = run(*arguments, **named).clone()
            out[:, 3, :, 2] += 0.03
            return out

        return wrong

    for name in ("residual_blocks", "stem"):
        monkeypatch.setattr(cuda_quantized, name, spoiled(getattr(cuda_quantized, name)))
    with pytest.warns(UserWarning, match=r"cuda: eight bits.*relative error"):
        assert_same_bits(backend.quantized_residual_blocks(*of_blocks), right)
    with pytest.warns(UserWarning, match=r"cuda: stem in eight and sixteen bits.*relative error"):
        assert_same_bits(backend.quantized_stem(*of_stem), right_stem)


# What is wrong.


@pytest.fixture
def wrong_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpreted convolutions whose sums leave out their last step."""
    backends.triton.launchers()
    from fused_resnet.backends.triton import conv_kernels

    monkeypatch.setitem(globals(), "right_sum", conv_kernels.conv_sum)
    monkeypatch.setattr(conv_kernels, "conv_sum", short_sum)


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, int], Tensor]) -> None:
    """Makes CUDA's convolution on the host return something else; `change` is told which call."""
    right, count = cuda._operator(), iter(range(10**6))
    monkeypatch.setattr(
        cuda, "_operator", lambda: lambda *arguments: change(right(*arguments), next(count))
    )


def one_wrong(out: Tensor, _: int) -> Tensor:
    """A tile's last row is not what it should be."""
    out = out.clone()
    out[-1, :, -1, -1] += 1
    return out


@TRITON
def test_wrong_triton_is_not_used(wrong_triton: None, checked: Path) -> None:
    with fused_resnet.use_backend("triton"):
        with pytest.warns(UserWarning, match=r"triton: convolution, 3x3.*relative error") as seen:
            ours, right = convolved()
        assert len(seen) == 1
        assert are_close(ours, right)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again, _ = convolved()
            # Another tile or shape of the same kind: not used either, nothing said twice.
            one_tap, right = convolved(taps=1)
    assert are_close(one_tap, right)
    assert_same_bits(again, ours)
    assert [verdict.passed for verdict in found().values()] == [False, False]


@TRITON
def test_wrong_is_wrong_without_the_check(
    wrong_triton: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is planted is seen in a result, or the tests around this one would show nothing."""
    self_check.use("0")
    with fused_resnet.use_backend("triton"):
        assert not are_close(*convolved())
    assert not found()


@TRITON
def test_wrong_norms_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training behind them goes on, the mask of a right forward pass in a library's backward."""
    backends.triton.lazy.norms()
    from fused_resnet.backends.triton import norm_kernels

    kernels = backends.named("triton")
    x, grad, residual = (images(2, 16, 5, 6) for _ in range(3))
    fixed = Norm(*norm_of(16), 1e-5)
    out, mask, _, _ = kernels.batch_norm_add_relu(x, fixed, residual, None)
    assert mask is not None
    assert mask.dtype is torch.uint8
    monkeypatch.setattr(norm_kernels, "times_invstd", small_product)
    arguments = (fixed, "relu", True, (True,) * 4)
    with pytest.warns(UserWarning, match="batch_norm_act_backward"):
        ours = kernels.batch_norm_act_backward(grad, x, mask, *arguments)
    right = library.batch_norm_act_backward(grad, x, out, *arguments)
    for one, other in zip(ours, right, strict=True):
        torch.testing.assert_close(one, other)


@CUDA
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_wrong, r"relative error \d"),
        (lambda out, count: out.clone().fill_(torch.nan), "NaN"),
        (lambda out, count: out * (1 + 5e-7 * count), "other bits the second time"),
        (lambda out, count: out[:, :-1], "has the shape"),
        (lambda out, count: exec("raise RuntimeError('no such kernel')"), "no such kernel"),
    ],
    ids=["wrong", "NaN", "changing", "shape", "error"],
)
def test_wrong_cuda_is_not_used(
    change: Callable[[Tensor, int], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, change)
    with fused_resnet.use_backend("cuda"), pytest.warns(UserWarning, match=reason):
        ours, right = convolved()
    assert are_close(ours, right)


@CUDA
def test_wrong_is_named_and_remembered(
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    """In the report and by `doctor`, with figures; by other processes, until `--recheck`."""
    with monkeypatch.context() as planted:
        spoil(planted, one_wrong)
        with fused_resnet.use_backend("cuda"), pytest.warns(UserWarning, match="differ"):
            convolved()
    (family,) = found()
    model = fused_resnet.fuse(BasicBlock(8, 8))
    for _ in range(2):
        text = str(fused_resnet.report(model))
        assert "not used" in text
        assert family in text
        assert "relative error" in text
        _, out, _ = run("doctor")
        assert "0 families of kernels agree with the library, 1 do not" in out
        assert "relative error" in out
        clear()
    # Right again, but that is not looked at.
    with fused_resnet.use_backend("cuda"):
        with pytest.warns(UserWarning, match="relative error"):
            convolved()
        code, out, err = run("doctor", "--recheck")
        assert code == 0, err
        assert "forgot 1 verdict" in out
        assert "nothing is checked yet" in out
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convolved()
    assert [verdict.passed for verdict in found().values()] == [True]
    assert "not used" not in str(fused_resnet.report(model))


# What a check does not do.


FAMILY = Family("triton", "some kernel", "float32")


def ask(case: Case, call: str = "one", family: Family = FAMILY) -> bool:
    return self_check.trusts((call,), CPU, lambda: family, lambda: case)


def case_of(wrong: float = 0.0, seen: list[str] | None = None) -> Case:
    x = torch.arange(1.0, 33.0)

    def kernel() -> list[Tensor]:
        if seen is not None:
            seen.append("kernel")
        return [x.sqrt() + wrong]

    return Case(kernel, lambda cast: [cast(x).sqrt()])


def test_known_is_not_checked_again() -> None:
    seen: list[str] = []
    assert ask(case_of(seen=seen))
    assert seen == ["kernel"] * 2
    assert ask(case_of(seen=seen))
    assert ask(case_of(seen=seen), "another call")
    clear()
    assert ask(case_of(seen=seen))
    assert seen == ["kernel"] * 2, "the verdict on disk was not used"
    self_check.forget()
    assert ask(case_of(seen=seen))
    assert seen == ["kernel"] * 4


def test_nothing_is_checked_while_graphs_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as capturing:
        capturing.setattr(self_check, "_cannot_run_now", lambda device: True)
        assert ask(case_of(wrong=1.0))
        assert not found()
    with pytest.warns(UserWarning, match="some kernel"):
        assert not ask(case_of(wrong=1.0))


def test_out_of_memory_is_no_verdict() -> None:
    def kernel() -> list[Tensor]:
        raise torch.OutOfMemoryError("planted")

    assert ask(case_of()._replace(kernel=kernel))
    assert not found()


def test_what_is_not_to_be_judged_comes_through() -> None:
    def kernel() -> list[Tensor]:
        raise KeyError("planted")

    with pytest.raises(KeyError):
        self_check.trusts(
            ("one",), CPU, lambda: FAMILY, lambda: case_of()._replace(kernel=kernel),
            lambda: (KeyError,),
        )  # fmt: skip
    assert not found()


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("runner", KERNELS, ids=lambda runner: runner.name)
def test_the_caller_is_not_disturbed(runner: Runner) -> None:
    """Neither by what a check draws and launches, nor the check by what the caller has set."""
    x = images(2, 16, 5, 6)
    norm = Norm(*norm_of(24), 1e-5)
    layer = ConvNorm(images(24, 16, 3, 3), norm, None, (1, 1), (1, 1), (1, 1), 1)

    def pass_() -> list[str]:
        with _Seen() as seen, fused_resnet.use_backend(runner.name):
            backends.named(runner.name).conv_bn_act(x, layer, None, "relu")
        return seen.operators

    state = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        first = pass_()
        assert [verdict.passed for verdict in found().values()] == [True]
        assert first == pass_()
    assert torch.equal(state, torch.get_rng_state())


@TRITON
def test_checks_are_no_launches_of_a_pass() -> None:
    launch = backends.triton.launchers().launch
    with fused_resnet.use_backend("triton"):
        with launch.logged() as first:
            convolved()
        assert found()
        with launch.logged() as second:
            convolved()
    assert [each.kernel for each in first] == [each.kernel for each in second]


# What is kept.


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b'{"format": "fused_resnet.self_check/1", "verdicts": {"a": 1}}',
     b'{"format": "fused_resnet.self_check/1", "verdicts": {"a": {"passed": "yes"}}}',
     b'{"format": "another", "verdicts": {}}'],
)  # fmt: skip
def test_damaged_files_are_written_anew(content: bytes, checked: Path) -> None:
    assert ask(case_of())
    (file,) = checked.glob("*.json")
    file.write_bytes(content)
    clear()
    seen: list[str] = []
    assert ask(case_of(seen=seen))
    assert seen, "nothing was checked"
    assert self_check._read(file)[str(FAMILY)].passed


def test_where_nothing_can_be_kept(checked: Path) -> None:
    checked.write_text("a file where the folder should be")
    seen: list[str] = []
    assert ask(case_of(seen=seen))
    assert ask(case_of(seen=seen))
    assert seen == ["kernel"] * 2
    assert "verdicts cannot be kept" in self_check.summary(CPU)


def test_several_processes_at_once(checked: Path) -> None:
    """No verdict is lost: writers take turns."""
    families = [Family("triton", f"kernel {index}", "float32") for index in range(24)]

    def write(at: int) -> None:
        for family in families[at::4]:
            self_check._write(CPU, family, Verdict(True, 0.0, 1.0))

    run_in_threads(write)
    assert set(self_check._read(self_check._path(CPU))) == set(map(str, families))


def test_verdicts_are_of_one_driver_and_package(
    checked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    for name, value in (("_driver", "driver 1"), ("_driver", "driver 2"), ("_package", "other")):
        monkeypatch.setattr(self_check, name, lambda value=value: value)
        self_check._file_name.cache_clear()
        clear()
        ask(case_of(seen=seen))
    monkeypatch.undo()
    self_check._file_name.cache_clear()
    assert len(seen) == 6


@pytest.mark.parametrize(("value", "applies"), [("", False), ("0", False), ("1", True)])
def test_variable(value: str, applies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.VARIABLE, value)
    monkeypatch.setattr(self_check, "_from_environment", None)
    assert self_check.applies(CPU) is applies
    assert self_check.applies(torch.device("cuda", 0)) is (value != "0")
    monkeypatch.setenv(self_check.VARIABLE, "yes")
    monkeypatch.setattr(self_check, "_from_environment", None)
    with pytest.raises(ValueError, match="FUSED_RESNET_SELF_CHECK is 'yes', must be one of 0, 1"):
        self_check.applies(CPU)


# What it is checked with.


@hypothesis.given(
    H=st.integers(8, 300), W=st.integers(8, 300), N=st.integers(1, 256),
    taps=st.sampled_from([1, 3, 7]), stride=st.sampled_from([1, 2]),
    block=st.sampled_from([16, 64, 128, 256]),
)  # fmt: skip
@hypothesis.settings(max_examples=60)
def test_smaller_problems_are_compiled_alike(
    H: int, W: int, N: int, taps: int, stride: int, block: int
) -> None:
    problem = ConvProblem(
        N, 64, H, W, 64, taps, taps, (stride, stride), (taps // 2,) * 2, (1, 1), 1, "float16", True
    )
    small = check_cases.smaller(problem, block)
    assert dataclasses.replace(small, N=N, H=H, W=W) == problem
    sizes = [(small.P, problem.P), (small.Q, problem.Q), (small.H, H), (small.W, W)]
    assert all((one % 16 == 0) == (other % 16 == 0) for one, other in sizes)
    assert small.H != small.W
    assert block < small.N * small.P * small.Q < 2 * block + 1100


def test_blocks_of_other_backends_are_not_asked_about() -> None:
    """The CPU's kernels are no part of this."""
    block = fused_resnet.fuse(BasicBlock(8, 8)).eval()
    with torch.no_grad():
        block(images(1, 8, 5, 5))
    assert not found()
