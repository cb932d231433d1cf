"""`functional.batch_norm_act`: both statistics modes, running statistics, NaN, layouts."""

import copy
import itertools
import math

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from support import (
    DTYPES,
    accumulation_dtype,
    assert_same_bits,
    assert_same_nonfinite,
    dtype_id,
    unchanged,
)
from support.selection import examples
from torchvision.models.resnet import Bottleneck

import fused_resnet
from fused_resnet import functional
from fused_resnet.testing import assert_error_rule, relative_error


def make_inputs(
    shape=(4, 96, 9, 7),
    dtype=torch.float32,
    parameter_dtype=None,
    affine=True,
    residual=True,
    statistics=True,
    device="cpu",
    memory_format=torch.channels_last,
    seed=0,
):
    """Keyword arguments for `batch_norm_act`, far from zero mean and unit variance."""
    generator = torch.Generator().manual_seed(seed)
    parameter_dtype = parameter_dtype or accumulation_dtype(dtype)
    channels = shape[1]

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    x = (normal(*shape) * 2 + normal(channels, 1, 1)).to(dtype).to(memory_format=memory_format)
    arguments = {
        "input": x,
        "running_mean": normal(channels).mul(0.3).to(parameter_dtype) if statistics else None,
        "running_var": (torch.rand(channels, generator=generator) + 0.5).to(parameter_dtype)
        if statistics
        else None,
        "weight": (normal(channels) * 0.3 + 1).to(parameter_dtype) if affine else None,
        "bias": normal(channels).mul(0.3).to(parameter_dtype) if affine else None,
        "residual": normal(*shape).to(dtype).to(memory_format=memory_format) if residual else None,
    }
    return {n: t if t is None else t.to(device) for n, t in arguments.items()}


def eager(arguments, training, momentum=0.1, eps=1e-5, activation="relu"):
    """`F.batch_norm`, then the add, then the activation."""
    a = arguments
    out = F.batch_norm(
        a["input"],
        a["running_mean"],
        a["running_var"],
        a["weight"],
        a["bias"],
        training,
        momentum,
        eps,
    )
    if a["residual"] is not None:
        out = out + a["residual"]
    return F.relu(out) if activation == "relu" else out


def copied(arguments, dtype=None):
    """A deep copy, in another precision on request: running statistics are written to."""
    return {
        n: None if t is None else t.detach().clone().to(dtype or t.dtype)
        for n, t in arguments.items()
    }


def tensors(arguments):
    return {n: t for n, t in arguments.items() if t is not None}


@pytest.mark.pairs
@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_values_and_running_statistics(backend, dtype, training, activation):
    """Every mix of optional arguments, every memory format, BN parameters in both precisions."""
    for residual, affine, memory_format, parameter_dtype in itertools.product(
        [True, False],
        [True, False],
        [torch.contiguous_format, torch.channels_last],
        {accumulation_dtype(dtype), dtype},
    ):
        ours = make_inputs(
            dtype=dtype,
            parameter_dtype=parameter_dtype,
            residual=residual,
            affine=affine,
            memory_format=memory_format,
            device=backend.device,
        )
        theirs, exact = copied(ours), copied(ours, torch.float64)
        read_only = {
            n: t for n, t in tensors(ours).items() if not (training and n.startswith("running"))
        }
        with unchanged(**read_only):
            out = functional.batch_norm_act(**ours, training=training, activation=activation)
        expected = eager(theirs, training, activation=activation)
        reference = eager(exact, training, activation=activation)
        assert out.dtype == expected.dtype
        assert out.stride() == expected.stride()
        if dtype == torch.float64:
            assert relative_error(out, reference) < 1e-14
        else:
            assert_error_rule(out, expected, reference)
        for name in ("running_mean", "running_var"):
            if not training:
                assert_same_bits(ours[name], theirs[name], name)
            elif dtype == torch.float64:
                assert relative_error(ours[name], exact[name]) < 1e-14
            else:
                assert_error_rule(ours[name], theirs[name], exact[name])


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_momentum(backend, dtype, momentum):
    ours = make_inputs(dtype=dtype, device=backend.device)
    theirs, exact = copied(ours), copied(ours, torch.float64)
    before = copied(ours)
    functional.batch_norm_act(**ours, training=True, momentum=momentum)
    eager(theirs, True, momentum)
    eager(exact, True, momentum)
    for name in ("running_mean", "running_var"):
        if momentum == 0.0:
            assert_same_bits(ours[name], before[name], name)
        torch.testing.assert_close(ours[name], theirs[name])
        torch.testing.assert_close(ours[name].double(), exact[name], rtol=1e-5, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("momentum", [0.25, 0.75, 1.0])
def test_infinite_running_statistics(backend, momentum):
    """`(1 - momentum) running + momentum batch`, as `F.batch_norm`, where either is infinite."""
    ours = make_inputs((2, 5, 3, 2), device=backend.device, residual=False)
    ours["input"][:, 1] *= 1e30
    ours["running_mean"][2] = math.inf
    ours["running_mean"][3] = -math.inf
    ours["running_var"][1:3] = math.inf
    theirs = copied(ours)
    theirs["running_var"][1] = ours["running_var"][1] = 1.0
    functional.batch_norm_act(**ours, training=True, momentum=momentum)
    eager(theirs, True, momentum)
    assert theirs["running_var"][1] == math.inf
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True)


@pytest.mark.interpreted
def test_running_statistics_use_the_unbiased_variance(backend):
    """An expectation that owes nothing to `F.batch_norm`."""
    ours = make_inputs((2, 5, 3, 2), device=backend.device, residual=False)
    before = copied(ours)
    functional.batch_norm_act(**ours, training=True, momentum=0.25)
    x = before["input"].double().transpose(0, 1).reshape(5, -1)
    mean = 0.75 * before["running_mean"].double() + 0.25 * x.mean(1)
    var = 0.75 * before["running_var"].double() + 0.25 * x.var(1, unbiased=True)
    torch.testing.assert_close(ours["running_mean"].double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours["running_var"].double(), var, rtol=1e-6, atol=1e-6)


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_without_running_statistics(backend, training):
    """Training needs none; inference without them is torch's error."""
    ours = make_inputs(statistics=False, device=backend.device)
    if training:
        out = functional.batch_norm_act(**ours, training=True)
        assert_error_rule(out, eager(ours, True), eager(copied(ours, torch.float64), True))
    else:
        with pytest.raises((ValueError, RuntimeError)):
            eager(ours, False)
        with pytest.raises((ValueError, TypeError), match="running_mean"):
            functional.batch_norm_act(**ours, training=False)


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("shape", [(1, 4, 1, 1)])
def test_one_value_per_channel_is_torchs_error(backend, shape):
    ours = make_inputs(shape, device=backend.device)
    with pytest.raises(ValueError) as theirs:
        eager(copied(ours), True)
    before = copied(ours)
    with pytest.raises(ValueError) as raised:
        functional.batch_norm_act(**ours, training=True)
    assert str(raised.value) == str(theirs.value)
    for name in ("running_mean", "running_var"):
        assert_same_bits(ours[name], before[name], name)
    assert functional.batch_norm_act(**ours, training=False).shape == shape


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nonfinite_values(backend, dtype, value, training):
    for place in ("input", "residual", "weight", "bias"):
        ours = make_inputs(dtype=dtype, device=backend.device)
        tensor = ours[place]
        tensor[(2, 3, 4, 5) if tensor.dim() == 4 else 3] = value
        theirs = copied(ours)
        out = functional.batch_norm_act(**ours, training=training)
        expected = eager(theirs, training)
        assert_same_nonfinite(out, expected)
        for name in ("running_mean", "running_var"):
            assert_same_nonfinite(ours[name], theirs[name])


@pytest.mark.interpreted
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_same_inputs_give_same_bits(backend, dtype, training):
    ours = make_inputs((3, 40, 17, 13), dtype=dtype, device=backend.device)
    first = functional.batch_norm_act(**copied(ours), training=training)
    for threads in (2, 1, 2):
        torch.set_num_threads(threads)
        again = copied(ours)
        for name in ("input", "residual"):
            again[name] = again[name].to(memory_format=torch.channels_last)
        out = functional.batch_norm_act(**again, training=training)
        if threads == 2 or not training:
            assert_same_bits(out, first, f"{threads} threads")


@hypothesis.settings(max_examples=examples(150))
@hypothesis.given(
    shape=st.tuples(
        st.sampled_from([1, 2, 3]),
        st.sampled_from([1, 2, 7, 16, 33]),
        st.integers(2, 9),
        st.integers(1, 9),
    ),
    layout=st.sampled_from(["nchw", "nhwc", "sliced", "transposed", "expanded residual"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    training=st.booleans(),
    residual=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_drawn_layouts(backend, shape, layout, dtype, training, residual, affine, seed):
    """Any strides: each element within the rounding of a few operations of its magnitude."""
    ours = make_inputs(
        shape,
        dtype,
        residual=residual,
        affine=affine,
        seed=seed,
        device=backend.device,
        memory_format=torch.contiguous_format if layout == "nchw" else torch.channels_last,
    )
    for name in ("input", "residual"):
        tensor = ours[name]
        if tensor is None:
            continue
        if layout == "sliced":
            wide = torch.full(
                (*shape[:3], 2 * shape[3]), math.nan, dtype=dtype, device=tensor.device
            )
            ours[name] = wide[..., 1::2].copy_(tensor)
        elif layout == "transposed":
            ours[name] = tensor.transpose(0, 2).contiguous().transpose(0, 2)
        elif layout == "expanded residual" and name == "residual":
            ours[name] = tensor[:, :1, :1].expand(shape)
    exact = copied(ours, torch.float64)
    out = functional.batch_norm_act(**ours, training=training)
    reference = eager(exact, training)
    x = exact["input"]
    if training:
        var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False, keepdim=True)
    else:
        mean, var = (exact_t[:, None, None] for exact_t in running(exact, ours))
    scale = (var + 1e-5).rsqrt()
    spread = (x.abs() + mean.abs()) * scale
    # Batch statistics carry the relative rounding of mean and variance into every element.
    if training:
        spread = spread * (1 + (x.square().mean((0, 2, 3), keepdim=True) + mean**2) * scale**2)
    if affine:
        spread = spread * exact["weight"].abs()[:, None, None] + exact["bias"].abs()[:, None, None]
    if residual:
        spread = spread + exact["residual"].abs()
    terms = x.numel() // shape[1] if training else 1
    unit = torch.finfo(dtype).eps / 2
    unit_accumulated = torch.finfo(accumulation_dtype(dtype)).eps / 2
    allowed = ((terms + 16) * unit_accumulated + 4 * unit) * spread + 1e-30
    assert ((out.double() - reference).abs() <= allowed).all()


def running(exact, ours):
    """The running statistics an inference call used (training overwrote none of them)."""
    assert ours["running_mean"] is not None
    return exact["running_mean"], exact["running_var"]


@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_empty_batch(backend, training):
    ours = make_inputs((0, 6, 4, 4), device=backend.device)
    theirs = copied(ours)
    try:
        expected = eager(theirs, training)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:20]):
            functional.batch_norm_act(**ours, training=training)
        return
    out = functional.batch_norm_act(**ours, training=training)
    assert out.shape == expected.shape
    for name in ("running_mean", "running_var"):
        assert_same_nonfinite(ours[name], theirs[name])
        torch.testing.assert_close(ours[name], theirs[name], equal_nan=True)


@pytest.mark.interpreted
def test_the_residual_may_be_the_input(backend):
    for training in (True, False):
        ours = make_inputs(device=backend.device)
        ours["residual"] = ours["input"]
        theirs, exact = copied(ours), copied(ours, torch.float64)
        with unchanged(input=ours["input"]):
            out = functional.batch_norm_act(**ours, training=training)
        assert_error_rule(out, eager(theirs, training), eager(exact, training))


@pytest.mark.quick
@pytest.mark.parametrize("momentum", [0.25, 0.75, 1.0])
def test_infinite_running_statistics_of_a_block(momentum):
    """The norms of a block are updated together."""
    eager_block = Bottleneck(64, 16).train().to(memory_format=torch.channels_last)
    for norm in (eager_block.bn1, eager_block.bn2, eager_block.bn3):
        norm.momentum = momentum
        norm.running_mean[0] = norm.running_var[1] = math.inf
    fused_block = fused_resnet.fuse(copy.deepcopy(eager_block))
    x = torch.randn(2, 64, 6, 6).to(memory_format=torch.channels_last)
    with fused_resnet.use_backend("cpu"):
        fused_block(x)
    eager_block(x)
    for name, buffer in fused_block.named_buffers():
        expected = eager_block.get_buffer(name)
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
