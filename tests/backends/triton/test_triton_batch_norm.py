"""The Triton kernels of `batch_norm_act` in both directions, interpreted where there is no GPU.

With the tiles that GPUs get, and others; the functions over all backends are tested in
test_batch_norm_act.py and test_gradients.py.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from conftest import RUNNERS
from ops.test_training import block_results, kept_by, make_block
from support import BLOCKS, assert_same_bits, assert_same_nonfinite, dtype_id, triton_norms
from support.selection import one_of_each

import fused_resnet
from fused_resnet import backends, functional
from fused_resnet.layers import description
from fused_resnet.layers.description import Norm, Sums
from fused_resnet.ops.training import passes
from fused_resnet.testing import assert_error_rule

RUNNER = next((runner for runner in RUNNERS if runner.name == "triton"), None)

pytestmark = pytest.mark.skipif(RUNNER is None, reason=backends.available()["triton"])

FORMATS = [torch.channels_last, torch.contiguous_format]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One channel, few, no power of two, and more than a tile has; rows fewer than a tile's, and prime.
SHAPES = [(13, 1, 3, 1), (7, 3, 1, 1), (1, 3, 1, 2), (2, 24, 11, 5), (1, 70, 1, 61)]


@pytest.fixture
def norms(monkeypatch):
    """`norm.py`, going through tensors as on a GPU."""
    module = backends.triton.lazy.norms()
    if RUNNER.device != "cuda":
        triton_norms.use_tiles_of_a_gpu(monkeypatch)
    with fused_resnet.use_backend("triton"):
        yield module


def drawn(shape, dtype, memory_format, count=1, mean=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = [
        (torch.randn(shape, generator=generator) + mean)
        .to(RUNNER.device, dtype)
        .contiguous(memory_format=memory_format)
        for _ in range(count)
    ]
    return made[0] if count == 1 else made


def vectors(channels, count):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, channels, generator=generator).to(RUNNER.device).unbind(0)


@pytest.mark.quick
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.single
def test_statistics_far_from_zero(norms, dtype, memory_format):
    """A mean of 1e4 beside a deviation of 1 costs no digits, whatever the first value is."""
    for shape in [(7, 3, 1, 1), (2, 24, 11, 5), (3, 5, 43, 37)]:
        x = drawn(shape, dtype, memory_format, mean=1e4 if dtype is torch.float32 else 1e2)
        x[0, 0, 0, 0] = 0
        mean, var = norms.batch_statistics(x)
        expected_var, expected_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
        unit = torch.finfo(torch.float32).eps
        torch.testing.assert_close(mean.double(), expected_mean, rtol=unit, atol=0)
        torch.testing.assert_close(var.double(), expected_var, rtol=32 * unit, atol=0)


@pytest.mark.parametrize("slabs", [1, 3, 1000])
def test_slabs(norms, monkeypatch, slabs):
    """One program for all rows, some for many each, and one for every tile."""
    monkeypatch.setattr(norms, "_PROGRAMS", slabs)
    monkeypatch.setattr(norms, "_LEAST_STEPS", 1000)
    x, grad = drawn((3, 5, 41, 37), torch.float32, torch.channels_last, 2)
    layout = norms.layout_of(x)
    steps, count = layout.reduction()
    assert layout.tiles_r > 6
    assert (count == 1) == (slabs == 1)
    assert (steps == 1) == (slabs == 1000)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
    results = norms.batch_statistics(x)
    for ours, expected in zip(results, (mean, var), strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-6, atol=1e-7)
    norm = Norm(*results, None, None, 1e-5)
    sums = norms.batch_norm_act_backward_sums(grad, x, None, norm, "none")
    g = grad.double()
    dot = (g * (x.double() - mean[:, None, None])).sum((0, 2, 3))
    expected = (g.sum((0, 2, 3)), dot, dot * (var + 1e-5).rsqrt())
    for ours, exact in zip(sums, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-4)


def gradients(evaluate, tensors, grad):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = evaluate(*leaves)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(t.grad for t in leaves if t is not None)]


def unfused(x, weight, bias, residual):
    out = F.batch_norm(x, None, None, weight, bias, True)
    return F.relu(out if residual is None else out + residual)


def fused(x, weight, bias, residual):
    return functional.batch_norm_act(x, None, None, weight, bias, True, residual=residual)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    ("shape", "memory_format", "with_residual"),
    one_of_each(
        [
            (shape, memory_format, with_residual)
            for shape, memory_format, with_residual in itertools.product(
                SHAPES, FORMATS, (True, False)
            )
            # In that format each channel is a program of its own.
            if memory_format is torch.channels_last or not (shape[1] > 24 or with_residual)
        ],
        lambda shape, *_: shape,
        lambda shape, *layout: tuple(layout),
    ),
    ids=str,
)
def test_shapes(norms, shape, memory_format, with_residual, dtype):
    """Output and gradients by the error rule, with and without a residual of other strides."""
    weight, bias = vectors(shape[1], 2)
    x, grad = drawn(shape, dtype, memory_format, 2)
    z = drawn(shape, dtype, torch.contiguous_format, seed=2) if with_residual else None
    tensors = (x, weight, bias, z)
    ours = gradients(fused, tensors, grad)
    theirs = gradients(unfused, tensors, grad)
    decided = ours[0] > 0

    def exact(*arguments, decided=decided):
        out = F.batch_norm(arguments[0], None, None, *arguments[1:3], True)
        out = out if arguments[3] is None else out + arguments[3]
        return torch.where(decided, out, 0.0)

    doubles = [t if t is None else t.double() for t in tensors]
    expected = gradients(exact, doubles, grad)
    if not with_residual:
        for a, b in zip(ours, gradients(fused, tensors, grad), strict=True):
            assert_same_bits(a, b)
    for a, b, c in zip(ours, theirs, expected, strict=True):
        if a.dim() > 1:
            assert_error_rule(a, b, c)
        else:  # the norm of few values is unsteady
            torch.testing.assert_close(a.double(), c, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_wide_offsets_give_the_same_bits(norms, monkeypatch, memory_format):
    x, z, grad = drawn((3, 7, 9, 7), torch.float16, memory_format, 3)
    weight, bias = vectors(7, 2)
    narrow = gradients(fused, (x, weight, bias, z), grad)
    layout_of = norms.layout_of
    monkeypatch.setattr(
        norms, "layout_of", lambda input: dataclasses.replace(layout_of(input), wide=True)
    )
    for a, b in zip(narrow, gradients(fused, (x, weight, bias, z), grad), strict=True):
        assert_same_bits(a, b)


@pytest.mark.quick
def test_which_tensors_are_wide():
    """Those of which some element, or a row counted on, is 2^31 or more from the first."""
    layout_of = backends.triton.lazy.norms().layout_of
    for rows, wide in [(2**22, False), (2**25 - 2**10, True), (2**25 + 5, True)]:
        shape = (rows, 64, 1, 1)
        x = torch.empty(1, dtype=torch.float16, device=RUNNER.device).expand(shape)
        stands = torch.empty_strided(shape, (64, 1, 64, 64), dtype=torch.float16, device="meta")
        assert x.numel() == stands.numel()
        assert layout_of(stands).wide == wide


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("memory_format", FORMATS, ids=str)
def test_the_mask_recomputed_is_the_one_used(norms, memory_format, dtype):
    """Backward from the input and from the output: the same bits, ReLUs next to zero included."""
    x, grad = drawn((2, 6, 11, 5), dtype, memory_format, 2)
    weight, bias = vectors(6, 2)
    mean, var = norms.batch_statistics(x)
    # Values whose norm is next to nothing: some come out on one side, some on the other.
    zero = (mean - bias * (var + 1e-5).sqrt() / weight)[:, None, None]
    steps = torch.linspace(-2, 2, 55, device=x.device).view(11, 5)
    x[0] = zero * (1 + steps * torch.finfo(dtype).eps)
    norm = Norm(mean, var, weight, bias, 1e-5)
    out = norms.batch_norm_act_inference(x, norm, None, "relu")
    assert (out[0] > 0).any()
    assert (out[0] == 0).any()
    for training in (True, False):
        arguments = (norm, "relu", training, (True, True, True, False))
        recomputed = norms.batch_norm_act_backward(grad, x, None, *arguments)
        from_output = norms.batch_norm_act_backward(grad, x, out, *arguments)
        for a, b in zip(recomputed[:3], from_output[:3], strict=True):
            assert_same_bits(a, b)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 24, 11, 5), marks=pytest.mark.whole),
        (1, 72, 1, 61),
        (3, 8, 1, 1),
        (1, 136, 4, 5),
    ],
)
@pytest.mark.single
def test_masks_and_two_norms(norms, shape, dtype):
    """Kept as bits: those of the output, and gradients to the bits of those from the output.

    And two norms in one add, to the bits of one after the other.
    """
    x, z, grad = drawn(shape, dtype, torch.channels_last, 3)
    x[0, 0, 0, 0] = math.nan
    z[-1, -1, -1, -1] = -math.inf
    C = shape[1]
    weight, bias, mean, var, other, offset = vectors(C, 6)
    known_norm, found_norm = (mean - 1, var**2 + 0.1, other, None, 1e-3), (None,) * 4 + (0.1,)
    both_norms = ((mean, var**2 + 0.1, weight, bias, 1e-5), (None, None, None, offset, 1e-5))
    residual_norms = (None, Norm(*known_norm), Norm(*found_norm))
    # Every combination on the smallest; each value on the others.
    small, both_norms = x.numel() < 100, [Norm(*norm) for norm in both_norms]
    pairs = itertools.product(residual_norms, both_norms)
    for residual_norm, norm in pairs if small else zip(residual_norms, itertools.cycle(both_norms)):
        out, mask, found, found_residual = norms.batch_norm_add_relu(x, norm, z, residual_norm)
        shortcut = z
        if residual_norm is not None:
            known = Norm(*found_residual, *residual_norm[2:])
            shortcut = norms.batch_norm_act_inference(z, known, None, "none")
            if residual_norm[0] is None:
                for a, b in zip(found_residual, norms.batch_statistics(z), strict=True):
                    assert_same_bits(a, b)
        known = Norm(*found, *norm[2:])
        assert_same_bits(out, norms.batch_norm_act_inference(x, known, shortcut, "relu"))
        passed = ~(out <= 0).permute(0, 2, 3, 1).reshape(-1, 8)
        bits = passed << torch.arange(8, device=x.device)
        assert torch.equal(mask, bits.sum(1).to(torch.uint8))
        assert 0 < passed.sum() < passed.numel()
        chosen = itertools.product([True, False], repeat=2)
        for training, residual in chosen if small else ((True, True), (False, False)):
            arguments = (known, "relu", training, (True, True, True, residual))
            from_bits = norms.batch_norm_act_backward(grad, x, mask, *arguments)
            from_output = norms.batch_norm_act_backward(grad, x, out, *arguments)
            for a, b in zip(from_bits, from_output, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    assert_same_bits(a, b)
        if residual_norm is None:
            continue
        other = Norm(*found_residual, *residual_norm[2:])
        both = norms.batch_norm_add_relu_backward(grad, mask, x, known, z, other)
        for tensor, of_norm, ours in ((x, known, both[0]), (z, other, both[1])):
            for kept in (mask, out):
                expected = norms.batch_norm_act_backward(
                    grad, tensor, kept, of_norm, "relu", True, (True, True, True, False)
                )
                for a, b in zip(ours, expected[:3], strict=True):
                    assert_same_bits(a, b)
        # Nothing that autograd hands on separately shares memory.
        places = [tensor.data_ptr() for side in both for tensor in side]
        assert len(set(places)) == 6


@pytest.mark.quick
def test_two_norms_against_float64(norms):
    """Gradients of both sides of the add, tensors in whatever memory format."""
    shape = (3, 24, 5, 7)
    x, z, grad = drawn(shape, torch.float32, torch.channels_last, 3)
    weight, bias, *others = vectors(24, 4)
    norm, other = (weight, bias, 1e-5), (*others, 1e-5)
    tensors = [t.double().requires_grad_() for t in (x, *norm[:2], z, *other[:2])]
    sides = [
        torch.nn.functional.batch_norm(t, None, None, w, b, True, eps=1e-5)
        for t, w, b in (tensors[:3], tensors[3:])
    ]
    exact = torch.autograd.grad(torch.relu(sides[0] + sides[1]), tensors, grad.double())
    for memory_format in FORMATS:
        residual, given = (t.contiguous(memory_format=memory_format) for t in (z, grad))
        out, mask, found, found_residual = norms.batch_norm_add_relu(
            x, Norm(None, None, *norm), residual, Norm(None, None, *other)
        )
        expected = torch.relu(sides[0] + sides[1]).detach()
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        both = norms.batch_norm_add_relu_backward(
            given, mask, x, Norm(*found, *norm), residual, Norm(*found_residual, *other)
        )
        for ours, expected in zip((*both[0], *both[1]), exact, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_two_norms_of_other_processes(norms):
    """No kernel takes both where the statistics of one are not this process's own."""
    x, z, grad = drawn((2, 16, 3, 5), torch.float32, torch.channels_last, 3)
    steps = []
    for group, raw in itertools.product((None, object()), (x, z)):
        layer = description.Layer((), 1e-5, group)
        kernels = backends.named("triton")
        steps.append(passes.Pass(layer, (None,) * 4, kernels, True))
        steps[-1].raw = raw
    last, projection, last_of_all, projection_of_all = steps
    with torch.no_grad():
        assert last_of_all.add_relu(z, projection) is None
        assert last.add_relu(z, projection_of_all) is None
        _, mask = last.add_relu(z, projection)
        assert last.add_relu_backward(grad, mask, projection) is not None
        for step in (last_of_all, projection_of_all):
            step.norm = last.norm
        assert last_of_all.add_relu_backward(grad, mask, projection) is None
        assert last.add_relu_backward(grad, mask, projection_of_all) is None


@pytest.mark.quick
def test_where_there_is_no_mask(norms):
    """Channels that are no multiple of 8, and whatever is not channels_last."""
    for shape, memory_format in (((2, 12, 3, 5), FORMATS[0]), ((2, 16, 3, 5), FORMATS[1])):
        x, z = drawn(shape, torch.float32, memory_format, 2)
        out, mask, found, _ = norms.batch_norm_add_relu(x, Norm(*(None,) * 4, 1e-5), z, None)
        assert mask is None
        expected, *statistics = norms.batch_norm_act_training(x, None, None, 1e-5, z, "relu")
        for a, b in zip((out, *found), (expected, *statistics), strict=True):
            assert_same_bits(a, b)


@pytest.mark.quick
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_parts_of_a_batch(norms, activation):
    """Sums of two parts, added, then both parts' gradients: those of the whole."""
    whole, z, grad = drawn((5, 24, 3, 7), torch.float32, torch.channels_last, 3)
    weight, bias = vectors(24, 2)
    out, mean, var = norms.batch_norm_act_training(whole, weight, bias, 1e-5, z, activation)
    arguments = (Norm(mean, var, weight, bias, 1e-5), activation)
    expected = norms.batch_norm_act_backward(
        grad, whole, out, *arguments, True, (True, True, True, True)
    )
    parts = [tuple(t[:2] for t in (grad, whole, out)), tuple(t[2:] for t in (grad, whole, out))]
    triton = backends.triton
    sums = [triton.batch_norm_act_backward_sums(*part, *arguments) for part in parts]
    total, dot = (a + b for a, b in zip(*sums, strict=True))
    torch.testing.assert_close(total, expected[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dot * (var + 1e-5).rsqrt(), expected[1], rtol=1e-5, atol=1e-5)
    count = 5 * 3 * 7
    for number in (count, torch.tensor(count, device=whole.device)):
        results = [
            triton.batch_norm_act_backward_input(*p, *arguments, Sums(total, dot, number), True)
            for p in parts
        ]
        for ours, exact in zip(zip(*results, strict=True), expected[::3], strict=True):
            torch.testing.assert_close(torch.cat(ours), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("training", [True, False], ids=["training", "constant"])
def test_each_gradient_by_itself(norms, training, dtype):
    """Whatever is asked for, what is there is the same, and nothing is written that may not be."""
    triton = backends.triton
    x, z, grad = drawn((3, 20, 5, 4), torch.float32, torch.channels_last, 3)
    x, z, grad = (t.to(dtype) for t in (x, z, grad))
    weight, bias = (t.to(dtype) for t in vectors(20, 2))
    for activation in ("relu", "none"):
        out, mean, var = triton.batch_norm_act_training(x, weight, bias, 1e-5, z, activation)
        kept = grad.clone()

        arguments = (out, Norm(mean, var, weight, bias, 1e-5), activation, training)

        def backward(need, overwrite=False, arguments=arguments):
            given = grad.clone() if overwrite else grad
            return triton.batch_norm_act_backward(given, x, *arguments, need, overwrite)

        every = backward((True,) * 4)
        for need in itertools.product([True, False], repeat=4):
            for overwrite in (False, True):
                results = backward(need, overwrite)
                assert [r is not None for r in results] == list(need)
                for ours, expected in zip(results, every, strict=True):
                    if ours is not None:
                        assert_same_bits(ours, expected)
        assert_same_bits(grad, kept)


@pytest.mark.quick
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 1, 0, 0), (2, 1, 3, 2)])
@pytest.mark.single
def test_nonfinite(norms, place, value):
    """The statistics of a channel with such a value first or later; NaN lets gradients pass."""
    x, grad = drawn((3, 4, 43, 41), torch.float32, torch.channels_last, 2)
    x[place] = value
    mean, var = norms.batch_statistics(x)
    expected = x.double().mean((0, 2, 3))
    assert_same_nonfinite(mean, expected)
    assert_same_nonfinite(var, torch.where(expected.isfinite(), 1.0, math.nan))
    out, mean, var = norms.batch_norm_act_training(x, None, None, 1e-5, None, "relu")
    assert out[:, 1].isnan().all()
    results = norms.batch_norm_act_backward(
        grad, x, None, Norm(mean, var, None, None, 1e-5), "relu", True, (True,) * 3 + (False,)
    )
    torch.testing.assert_close(results[2][1], grad[:, 1].sum(), rtol=1e-4, atol=1e-3)
    assert results[0][:, 1].isnan().all()
    assert not results[0][:, 0].isnan().any()


@pytest.mark.parametrize("projection", [True, False], ids=["projection", "identity"])
@pytest.mark.parametrize(("name", "memory"), [("basic", "normal"), ("bottleneck", "low")])
@pytest.mark.single
def test_blocks(name, memory, projection):
    """One node of the graph, by the error rule; under autocast with its dtypes."""
    eager, x = make_block(BLOCKS[name], projection, torch.float32)
    eager, x = eager.to(RUNNER.device), x.to(RUNNER.device)
    unused = fused_resnet.fuse(copy.deepcopy(eager), memory=memory)
    with fused_resnet.use_backend("triton"):
        kept, out = kept_by(unused, x.requires_grad_()), unused(x)
        unit = x.numel() // x.size(1) * 4 * 4
        assert "ResidualBlock" in out.grad_fn.name()
        if not projection:
            # The mask's bits stand for the output, a unit of a BasicBlock, four of the other;
            # where channels are not a multiple of 8 there is none.
            most = {"basic": 3, "bottleneck": 6}[name]
            bits = x.size(1) % 8 == 0
            expected = most - bits * {"basic": 1, "bottleneck": 4}[name]
            assert expected <= kept / unit < expected + 2
    x = x.detach()
    exact = block_results(copy.deepcopy(eager).double(), x.double())
    for dtype in (None, torch.float16):
        fused = fused_resnet.fuse(copy.deepcopy(eager), memory=memory)
        with torch.autocast(RUNNER.device, dtype=dtype, enabled=dtype is not None):
            theirs = block_results(copy.deepcopy(eager), x)
            with fused_resnet.use_backend("triton"):
                ours = block_results(fused, x)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
        assert_error_rule(ours[0], theirs[0], exact[0])
        if dtype is None:
            for a, c in zip(ours, exact, strict=True):
                torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-4)


@pytest.mark.quick
def test_backward_in_another_thread(norms, monkeypatch):
    """On a GPU autograd runs backward in a thread of its own, which knows no `use_backend`."""
    ran = []
    backward = backends.triton.batch_norm_act_backward

    def record(*arguments):
        ran.append(threading.current_thread())
        return backward(*arguments)

    name = "batch_norm_act_backward"
    monkeypatch.setattr(backends.triton.Triton, name, staticmethod(record))
    x, z = drawn((2, 4, 3, 3), torch.float32, torch.channels_last, 2)
    weight, bias = vectors(4, 2)
    outs = [fused(x.requires_grad_(), weight, bias, z)]
    one = torch.ones_like(weight)
    outs.append(functional.batch_norm_act(x, weight, one, one.clone().requires_grad_(), bias))
    block, image = make_block(BLOCKS["basic"], dtype=torch.float32)
    outs.append(fused_resnet.fuse(block).to(x.device)(image.to(x.device)))
    for number, out in enumerate(outs):
        ran.clear()
        thread = threading.Thread(target=lambda out=out: out.sum().backward())
        thread.start()
        thread.join()
        assert ran, number


@pytest.mark.quick
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_what_the_launches_move(norms, residual):
    """Counted by the launches: the passes over tensors that the kernels' docstrings name."""
    from fused_resnet.backends.triton import launch as launches

    x, z, grad = drawn((64, 256, 28, 28), torch.float16, torch.channels_last, 3)
    z, output = (z, x) if residual else (None, None)
    with launches.logged(run=False) as log:
        _, mean, var = norms.batch_norm_act_training(x, None, None, 1e-5, z, "relu")
        forward = sum(launch.bytes for launch in log) / x.nbytes
        log.clear()
        need = (True, True, True, residual)
        of_batch = Norm(mean, var, None, None, 1e-5)
        norms.batch_norm_act_backward(grad, x, output, of_batch, "relu", True, need)
        backward = sum(launch.bytes for launch in log) / x.nbytes
        log.clear()
        if residual:
            norm = Norm(None, None, None, None, 1e-5)
            _, mask, _, _ = norms.batch_norm_add_relu(x, norm, z, norm)
            of_two = sum(launch.bytes for launch in log) / x.nbytes
            log.clear()
            norms.batch_norm_act_backward(
                grad, x, mask, of_batch, "relu", True, (True, True, True, False)
            )
            behind_mask = sum(launch.bytes for launch in log) / x.nbytes
            log.clear()
            known = Norm(*norms.batch_statistics(x), None, None, 1e-5)
            log.clear()
            norms.batch_norm_add_relu_backward(grad, mask, x, known, z, known)
            behind_both = sum(launch.bytes for launch in log) / x.nbytes
            assert len(log) == 3
            assert 8 + 2 / 16 < behind_both < 8.26
            # Statistics of both, the add; then each tensor twice, one written; the bits every time.
            assert 5 + 1 / 16 < of_two < 5.12 + 1 / 16
            assert 5 + 2 / 16 < behind_mask < 5.2
    # Beside these, the slabs' partial sums, written and read.
    assert 3 + residual < forward < 3.06 + residual
    assert 5 + 2 * residual < backward < 5.06 + 2 * residual
