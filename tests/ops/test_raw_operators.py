"""Registered operators called directly, with arguments that nothing has checked before.

The fuzzer (tests/fuzz.py) draws such calls; here are those that once crashed or gave nonsense, each
kind of them, and a short run of the fuzzer itself.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest
import torch
import torch.nn.functional as F

import fused_resnet

OPS = torch.ops.fused_resnet
HUGE = 2**63 - 1
NATIVE = pytest.mark.skipif(not OPS.conv_isa(), reason="no native convolution on this processor")
NO_FLOATS = [torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


def refused(name, arguments, *words, kind=ValueError):
    """Calls an operator that must raise, naming these words; with a gradient wanted, too."""
    operator = getattr(OPS, name)
    for grad in (False, True):
        given = [
            a.detach().requires_grad_()
            if grad and i == 0 and isinstance(a, torch.Tensor) and a.is_floating_point()
            else a
            for i, a in enumerate(arguments)
        ]
        with pytest.raises(kind) as raised:
            operator(*given)
        for word in words:
            assert str(word) in str(raised.value), raised.value


def vectors(count, channels, dtype=torch.float32):
    return [torch.rand(channels, dtype=dtype) + 0.5 for _ in range(count)]


def changed(arguments, **changes):
    """`arguments` with those whose place is in a name, `_3`, replaced."""
    arguments = list(arguments)
    for place, value in changes.items():
        arguments[int(place[1:])] = value
    return arguments


# ---- batch norm ----------------------------------------------------------------------------------


def backward_arguments(dtype=torch.float32, C=8):
    x = torch.randn(3, C, 4, 4).to(dtype)
    accumulate = torch.float64 if dtype is torch.float64 else torch.float32
    return [x.clone(), x, None, *vectors(4, C, accumulate), 1e-5, True]


def backward_operators():
    """Each backward operator's name and valid arguments."""
    head = backward_arguments()
    x = head[1]
    yield "batch_norm_act_backward", [*head, True, x.clone(), x.clone()]
    yield "batch_norm_act_backward_sums", head
    yield "batch_norm_act_backward_input", [*head, *vectors(2, 8), 48.0, x.clone()]


@pytest.mark.parametrize("dtype", NO_FLOATS, ids=str)
def test_norms_of_other_dtypes(dtype):
    x = torch.ones(2, 8, 3, 3).to(dtype)
    refused("batch_norm_act_training", [x, None, None, 1e-5, None, "relu"], "input", kind=TypeError)
    norm = [*vectors(4, 8), 1e-5, None, "relu"]
    refused("batch_norm_act_inference", [x, *norm], "input", kind=TypeError)
    refused("batch_statistics", [x], "batch_statistics: input is")
    refused("train_batch_norm_act", [x, None, None, 1e-5, None, "relu", True], "input is")
    refused("pool_empty_like", [x], "like is")
    refused("scale_shift_act", [x, *vectors(2, 8), None, "relu"], "input is")
    for name, arguments in backward_operators():
        whole = [x if isinstance(a, torch.Tensor) and a.dim() == 4 else a for a in arguments]
        refused(name, whole, name, "input is")


def test_backward_of_norms_that_do_not_fit():
    for name, arguments in backward_operators():
        getattr(OPS, name)(*arguments)
        x = arguments[1]
        refused(name, changed(arguments, _0=x[:2].clone()), name, "grad has shape (2, 8, 4, 4)")
        refused(name, changed(arguments, _0=x.half()), name, "grad is float16")
        refused(name, changed(arguments, _0=x.flatten(1)), name, "grad has shape (3, 128)")
        transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
        refused(name, changed(arguments, _0=transposed), name, "grad has other strides")
        refused(name, changed(arguments, _1=torch.randn(8)), name, "input has shape (8,)")
        refused(name, changed(arguments, _2=x[:, :4].clone()), name, "output has shape")
        mask = torch.zeros(3, dtype=torch.uint8)
        refused(name, changed(arguments, _2=mask), name, "output", "(48,)")
        for place, what in ((3, "weight"), (4, "bias"), (5, "mean"), (6, "var")):
            if what == "mean":
                continue
            for bad in (torch.ones(7), torch.ones(1, 8), torch.ones(()), torch.ones(1).expand(8)):
                refused(name, changed(arguments, **{f"_{place}": bad}), what)
            refused(name, changed(arguments, **{f"_{place}": torch.ones(8).double()}), what)
        refused(name, changed(arguments, _5=torch.ones(9)), "9")
        refused(name, changed(arguments, _7=-1.0), "eps is -1")
        refused(name, changed(arguments, _7=math.nan), "eps is nan")
    name, arguments = list(backward_operators())[2]
    refused(name, changed(arguments, _11=0.0), "count is 0")
    refused(name, changed(arguments, _9=torch.ones(3)), "total has shape (3,)")
    refused(name, changed(arguments, _12=torch.zeros(1).expand(3, 8, 4, 4)), "grad_input")


# ---- convolutions --------------------------------------------------------------------------------


def conv_arguments(C=4, K=8, R=3, groups=1):
    x, weight = torch.randn(2, C, 6, 6), torch.randn(K, C // groups, R, R)
    geometry = [[1, 1], [0, 0], [1, 1], groups]
    return [x, weight, *vectors(4, K), 1e-5, None, *geometry, None, "relu"]


BAD_CONVOLUTIONS = {
    "no input channels": (dict(_0=torch.randn(2, 0, 6, 6), _1=torch.randn(8, 0, 3, 3)), "weight"),
    "no output channels": (dict(_1=torch.randn(0, 4, 3, 3)), "weight"),
    "stride 0": (dict(_8=[0, 1]), "stride"),
    "stride 2^62": (dict(_8=[2**62, 2**62]), "stride"),
    "padding 2^63 - 1": (dict(_9=[HUGE, HUGE]), "padding"),
    "padding -1": (dict(_9=[0, -1]), "padding"),
    "dilation 2^63 - 1": (dict(_10=[HUGE, HUGE]), "dilation"),
    "groups 0": (dict(_11=0), "groups"),
    "groups 2^40": (dict(_11=2**40), "weight"),
    "three strides": (dict(_8=[1, 1, 1]), "stride has 3 numbers"),
    "no strides": (dict(_8=[]), "stride has 0 numbers"),
    "eps nan": (dict(_6=math.nan), "eps is nan"),
    "activation": (dict(_13="mish"), "activation is 'mish'"),
    "wide residual": (dict(_12=torch.randn(2, 9, 4, 4)), "residual has shape (2, 9, 4, 4)"),
}


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS)
def test_bad_convolutions(case):
    changes, word = BAD_CONVOLUTIONS[case]
    arguments = changed(conv_arguments(), **changes)
    refused("conv_bn_act", arguments, "conv_bn_act", word)
    x, *rest = arguments
    C = x.size(1)
    refused("norm_conv_bn_act", [x, *vectors(4, C), 1e-5, *rest], "norm_conv_bn_act", word)
    if "residual" not in case:
        pooled = [*arguments[:12], arguments[13], [2, 2], [2, 2], [0, 0]]
        refused("conv_bn_act_max_pool", pooled, "conv_bn_act_max_pool", word)


def test_missing_tensors():
    for place, what in ((0, "input"), (1, "weight"), (2, "running_mean"), (3, "running_var")):
        arguments = changed(conv_arguments(), **{f"_{place}": None})
        with pytest.raises(TypeError, match=f"{what} is a NoneType"):
            OPS.conv_bn_act(*arguments)


@pytest.mark.parametrize("case", BAD_CONVOLUTIONS)
def test_bad_convolutions_of_fake_tensors(case):
    changes, word = BAD_CONVOLUTIONS[case]
    arguments = changed(conv_arguments(), **changes)
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    x, *rest = meta
    refused("conv_bn_act", meta, "conv_bn_act", word)
    norm = [torch.ones(x.size(1), device="meta")] * 4
    refused("norm_conv_bn_act", [x, *norm, 1e-5, *rest], "norm_conv_bn_act", word)
    fakes = torch._subclasses.FakeTensorMode()
    with fakes:
        fake = [fakes.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        with pytest.raises(ValueError, match="conv_bn_act"):
            OPS.conv_bn_act(*fake)


@pytest.mark.parametrize("stride", [0, 2**61, HUGE])
def test_bad_pooling(stride):
    arguments = conv_arguments()
    head = [*arguments[:12], "relu"]
    refused("conv_bn_act_max_pool", [*head, [2, 2], [stride, 1], [0, 0]], "pool_stride")
    refused("conv_bn_act_max_pool", [*head, [2, 2], [1, 1], [stride or -1, 1]], "pool_padding")
    refused("conv_bn_act_max_pool", [*head, [stride, 1], [1, 1], [0, 0]], "pool_kernel_size")
    x = torch.randn(2, 8, 6, 6).to(memory_format=torch.channels_last)
    grad = x[:, :, :3, :3].contiguous(memory_format=torch.channels_last)
    pools = [[2, 2, stride, 2, 0, 0], [stride, 2, 2, 2, 0, 0], [2, 2, 2, 2, stride or -1, 0]]
    for numbers in pools:
        refused("max_pool_gradient", [grad, x, *vectors(2, 8), numbers], "max_pool's")


@pytest.mark.parametrize("interpreted", [True, False])
def test_triton_operators(monkeypatch, interpreted):
    """A compiler's graph calls them after our checks; whoever else does has checked nothing."""
    operators = pytest.importorskip("fused_resnet.backends.triton.graphs")
    monkeypatch.setattr(operators, "interpreted", lambda: interpreted)
    arguments = conv_arguments()
    stem = [*changed(arguments, _8=[2, 2])[:11], "relu"]
    for case, (changes, word) in BAD_CONVOLUTIONS.items():
        given = changed(arguments, **changes)
        with pytest.raises(ValueError, match="triton_conv_bn_act") as raised:
            OPS.triton_conv_bn_act(*given)
        assert word in str(raised.value), case
        if not changes.keys() & {"_11", "_12"}:
            given = [*given[:11], given[13]]
            with pytest.raises(ValueError, match="triton_conv_bn_act_max_pool") as raised:
                OPS.triton_conv_bn_act_max_pool(*given)
            assert word in str(raised.value), case
    for name, given in (("triton_conv_bn_act", arguments), ("triton_conv_bn_act_max_pool", stem)):
        double = [a.double() if isinstance(a, torch.Tensor) else a for a in given]
        refused(name, double, name, "input has dtype torch.float64", kind=TypeError)
        refused(name, changed(given, _2=torch.ones(7)), "running_mean has shape (7,)")
        refused(name, changed(given, _7=torch.ones(9)), "bias has shape (9,)")
        with pytest.raises(TypeError, match="weight is a NoneType"):
            getattr(OPS, name)(*changed(given, _1=None))
        if not interpreted:
            refused(name, given, name, "input is on cpu, must be on a GPU")
    if interpreted:
        wide = [torch.randn(2, 64, 6, 6), torch.randn(8, 64, 3, 3), *stem[2:]]
        refused("triton_conv_bn_act_max_pool", wide, "weight has shape (8, 64, 3, 3)")


def packed_arguments(groups=1, C=8, K=16):
    x, weight = torch.randn(2, C, 6, 6), torch.randn(K, C // groups, 3, 3)
    packed = OPS.pack_conv_weight(weight, groups)
    numbers = [1, 1, 0, 0, 1, 1, groups]
    return [x, weight, packed, *vectors(4, K), 1e-5, None, *numbers, None, 1, 0.0, 0.0, []]


@NATIVE
def test_packed_weights_that_do_not_fit():
    arguments = packed_arguments()
    packed = arguments[2]
    OPS.conv_bn_act_packed(*arguments)
    for bad in (
        torch.zeros(1).expand(packed.shape),
        packed.half(),
        packed.double(),
        packed.view(2, -1),
        torch.zeros(2 * packed.numel())[::2],
    ):
        refused("conv_bn_act_packed", changed(arguments, _2=bad), "packed")
    # Those are none of the weight's: nothing is computed.
    for bad in (
        packed[:-1],
        packed.bfloat16(),
        packed[..., :-1],
        torch.cat([packed, packed]),
        torch.zeros(packed.shape),
        torch.as_strided(packed, packed.shape, [*packed.stride()[:-3], 5, 1, 1]),
    ):
        assert OPS.conv_bn_act_packed(*changed(arguments, _2=bad)) is None


@NATIVE
@pytest.mark.parametrize("number", [2**31, 2**61, 2**62, HUGE, -1, -(2**63)])
def test_numbers_of_native_convolutions(number):
    arguments = packed_arguments()
    what_numbers_are = ((9, "stride"), (11, "padding"), (14, "dilation"), (15, "groups"))
    for place, what in (*what_numbers_are, (17, "activation")):
        refused("conv_bn_act_packed", changed(arguments, **{f"_{place}": number}), what)
    grad, weight, out = torch.randn(2, 16, 4, 4), torch.randn(16, 8, 3, 3), torch.zeros(2, 8, 6, 6)
    gradient = [grad, weight, 1, 1, 0, 0, 1, 1, out, False]
    OPS.conv_input_gradient(*gradient)
    for place, what in ((2, "stride"), (5, "padding"), (6, "dilation")):
        refused("conv_input_gradient", changed(gradient, **{f"_{place}": number}), what)
    training = training_arguments()
    OPS.conv_training(*training)
    for place, what in ((3, "stride"), (5, "padding"), (7, "dilation"), (9, "groups")):
        refused("conv_training", changed(training, **{f"_{place}": number}), what)


def training_arguments():
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(16, 8, 3, 3)
    return [x, weight, None, 1, 1, 0, 0, 1, 1, 1, *vectors(4, 8), 1e-5, True]


@NATIVE
def test_native_convolutions_of_odd_tensors():
    arguments = packed_arguments()
    refused("conv_bn_act_packed", changed(arguments, _0=torch.randn(2, 8, 6)), "input has 3")
    refused("conv_bn_act_packed", changed(arguments, _1=torch.randn(16, 0, 3, 3)), "weight")
    refused("conv_bn_act_packed", changed(arguments, _1=torch.ones(16, 8, 3, 3).int()), "weight is")
    refused("conv_bn_act_packed", changed(arguments, _3=torch.ones(15)), "running_mean", "(15,)")
    refused("conv_bn_act_packed", changed(arguments, _3=torch.ones(16, 1)), "running_mean")
    refused("pack_conv_weight", [torch.randn(16, 8, 3), 1], "weight has 3")
    refused("pack_conv_weight", [torch.randn(1).expand(2**40, 2**20, 1, 1), 1], "64 bits")
    grad, weight, out = torch.randn(2, 16, 4, 4), torch.randn(16, 8, 3, 3), torch.zeros(2, 8, 6, 6)
    gradient = [grad, weight, 1, 1, 0, 0, 1, 1, out, False]
    expanded = torch.zeros(1).expand(2, 8, 6, 6)
    refused("conv_input_gradient", changed(gradient, _8=expanded), "grad_input must be dense")
    refused("conv_input_gradient", changed(gradient, _8=out.double()), "grad_input is float64")
    refused("conv_input_gradient", changed(gradient, _1=weight[0]), "weight has 3")
    training = training_arguments()
    refused("conv_training", changed(training, _0=torch.randn(2, 8, 6)), "input has 3")
    refused("conv_training", changed(training, _0=torch.randn(2, 7, 6, 6)), "input channels")
    refused("conv_training", changed(training, _0=torch.randn(0, 8, 6, 6)), "no statistics")
    refused("conv_training", changed(training, _1=weight.half()), "float16")
    refused("conv_training", changed(training, _2=torch.ones(15)), "bias", "(15,)")
    refused("conv_training", changed(training, _11=None), "together")
    refused("conv_training", changed(training, _10=torch.ones(9)), "in_mean", "(9,)")
    refused("conv_training", changed(training, _14=-1.0), "eps")


@NATIVE
def test_images_without_columns():
    """All padding: a task's rows have no bytes of input."""
    x, weight = torch.randn(1, 4, 5, 0), torch.randn(8, 4, 3, 3)
    ones, zeros = torch.ones(8), torch.zeros(8)
    shift = torch.rand(8)
    y = OPS.conv_bn_act(
        x, weight, zeros, ones, None, shift, 0.0, None, [1, 1], [2, 2], [1, 1], 1, None, "relu"
    )
    assert y.shape == (1, 8, 7, 2)
    assert torch.equal(y, shift.view(1, -1, 1, 1).expand_as(y))


def test_large_strides_and_windows():
    """They go beyond the image after one step: no reason for memory or time."""
    x, weight = torch.randn(4, 3, 9, 9), torch.randn(8, 3, 3, 3)
    norm = [*vectors(4, 8), 1e-5, None]
    large = 2**31 - 1
    y = OPS.conv_bn_act(x, weight, *norm, [large, large], [1, 1], [1, 1], 1, None, "relu")
    every = OPS.conv_bn_act(x, weight, *norm, [1, 1], [1, 1], [1, 1], 1, None, "relu")
    torch.testing.assert_close(y, every[:, :, :1, :1])
    geometry = [[1, 1], [1, 1], [1, 1], 1, "relu"]
    y = OPS.conv_bn_act_max_pool(x, weight, *norm, *geometry, [9, 9], [large, large], [4, 4])
    torch.testing.assert_close(y, F.max_pool2d(every, 9, 100, 4))
    y = OPS.conv_bn_act_max_pool(x, weight, *norm, *geometry, [2001, 9], [1, 1], [1000, 0])
    torch.testing.assert_close(y, F.max_pool2d(every, (2001, 9), 1, (1000, 0)))


def test_a_residual_of_one_channel_with_any_stride():
    x, scale, shift = torch.randn(2, 7, 3, 3), torch.ones(7), torch.zeros(7)
    residual = torch.randn(2, 1, 3, 3)
    odd = residual.as_strided(residual.shape, (9, 2**61, 3, 1))
    y = OPS.scale_shift_act(x, scale, shift, odd, "none")
    expected = x.clone()
    expected[:, 3:4] += residual
    assert torch.equal(y, expected)


# ---- lists of tensors ----------------------------------------------------------------------------


def block_arguments(per_layer):
    tensors = []
    for _ in range(2):
        mean, var, bn_weight, bn_bias = vectors(4, 8)
        weight, bias = torch.randn(8, 8, 3, 3), torch.randn(8)
        tensors += {
            4: [weight, bias, bn_weight, bn_bias],
            6: [weight, mean, var, bn_weight, bn_bias, bias],
        }[per_layer]
    return [torch.randn(2, 8, 5, 5), tensors, [1, 1, 1, 1, 1, 1, 1] * 2, [1e-5] * 2]


def without(values, place=0):
    return [*values[:place], None, *values[place + 1 :]]


def test_blocks_that_do_not_fit():
    blocks = [*block_arguments(6), [2], [False]]
    training = [*block_arguments(4), False, True]
    OPS.residual_blocks(*blocks)
    output, *kept = OPS.block_training(*training)
    need = [True] * 9
    backward = [output, training[0], output, training[1], kept, need, *training[2:]]
    OPS.block_training_backward(*backward)
    for name, arguments, first in (
        ("residual_blocks", blocks, 0),
        ("block_training", training, 0),
        ("block_training_backward", backward, 1),
    ):
        tensors, numbers = arguments[1 + 2 * (first > 0)], arguments[2 + 4 * (first > 0)]
        places = {"tensors": 1 + 2 * (first > 0), "numbers": 2 + 4 * (first > 0)}

        def bad(what, value, arguments=arguments, places=places):
            return changed(arguments, **{f"_{places[what]}": value})

        with pytest.raises(TypeError, match="weight is a NoneType"):
            getattr(OPS, name)(*bad("tensors", without(tensors)))
        for what, value in (
            ("tensors", tensors[:-1]),
            ("tensors", []),
            ("numbers", numbers[:-1]),
            ("numbers", []),
        ):
            refused(name, bad(what, value), name, "for each convolution")
        refused(name, bad("numbers", [0, *numbers[1:]]), name, "stride")
        refused(name, bad("numbers", [*numbers[:6], 0, *numbers[7:]]), name, "groups")
        refused(name, bad("numbers", [2, 2, *numbers[2:]]), name, "shortcut has shape")
    refused("residual_blocks", changed(blocks, _4=[3]), "layer_counts is [3]")
    refused("residual_blocks", changed(blocks, _4=[]), "layer_counts")
    refused("residual_blocks", changed(blocks, _4=[2**40]), "layer_counts")
    refused("residual_blocks", changed(blocks, _5=[]), "projections")
    refused("block_training_backward", changed(backward, _0=output[:1]), "grad has shape")
    refused("block_training_backward", changed(backward, _2=output[:1]), "output has shape")
    refused("block_training_backward", changed(backward, _4=kept[:-1]), "kept has")
    short = [kept[0][:-1], *kept[1:]]
    refused("block_training_backward", changed(backward, _4=short), "kept[0] has shape (7,)")
    refused("block_training_backward", changed(backward, _5=need[:-1]), "need has 8")


def test_stems_that_do_not_fit():
    x, parameters, numbers, _ = block_arguments(4)
    stem = [x, parameters[:4], numbers[:7], 1e-5, [3, 3, 2, 2, 1, 1]]
    output, *kept = OPS.stem_training(*stem)
    backward = [output, x, parameters[:4], kept, [True] * 5, *stem[2:]]
    OPS.stem_training_backward(*backward)
    refused("stem_training", changed(stem, _4=[3, 3, 2, 2, 1]), "pool has 5")
    refused("stem_training", changed(stem, _4=[3, 3, 2**61, 2, 1, 1]), "pool_stride")
    refused("stem_training", changed(stem, _1=parameters[:3]), "for each convolution")
    refused("stem_training_backward", changed(backward, _3=kept[:2]), "kept has 2")
    refused("stem_training_backward", changed(backward, _0=output[:, :4]), "grad has shape")


# ---- the one wrong number ------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("groups", [1, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("infinite", ["no variance and no eps", "weight"])
def test_an_infinite_scale(infinite, dtype, groups, pooled):
    """An infinite scale: what is NaN, and which sign infinity has, is as in eager."""
    torch.manual_seed(0)
    K = 16
    # Multiples of 1/4: every sum is exact, and so is its sign.
    draw = lambda *shape: torch.randint(-8, 9, shape).div(4).to(dtype)  # noqa: E731
    x, weight = draw(3, 16, 5, 5), draw(K, 16 // groups, 3, 3)
    mean, bias, bn_bias = draw(K), draw(K), draw(K)
    var, bn_weight = (torch.arange(K) % 3).to(dtype), torch.ones(K, dtype=dtype)
    if infinite == "weight":
        bn_weight = torch.where(var == 0, math.inf, bn_weight)
        bn_weight[6] = -math.inf
        var = torch.ones(K, dtype=dtype)
    conv = F.conv2d(x.float(), weight.float(), bias.float(), padding=1, groups=groups)
    norm = [t.float() for t in (bn_weight, bn_bias, mean, var)]
    # F.batch_norm of torch 2.11 refuses this eps; the operator behind it computes.
    expected = torch.batch_norm(conv, *norm, False, 0.1, 0.0, False)
    geometry = [[1, 1], [1, 1], [1, 1], groups]
    head = [x, weight, mean, var, bn_weight, bn_bias, 0.0, bias, *geometry]
    if pooled:
        y = OPS.conv_bn_act_max_pool(*head, "none", [2, 2], [2, 2], [0, 0])
        expected = F.max_pool2d(expected, 2)
    else:
        y = OPS.conv_bn_act(*head, None, "none")
    assert expected.isnan().any()
    assert expected.isinf().any()
    torch.testing.assert_close(
        y.float(),
        expected,
        equal_nan=True,
        rtol=1e-5 if dtype is torch.float32 else 4e-3,
        atol=1e-3,
    )


# ---- the fuzzer ----------------------------------------------------------------------------------


def run_fuzzer(*arguments):
    """Runs the fuzzer on the package that is under test, which need not be the source tree's."""
    path = [str(Path(fused_resnet.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, fuzz.__file__, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))},
        timeout=600,
    )


def test_the_fuzzer_finds_nothing():
    done = run_fuzzer("--calls", "300", "--seed", "7", "--kinds", "raw", "--isa", "avx512")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "300 calls, 0 findings" in done.stdout


def test_the_fuzzer_sees_what_goes_wrong(tmp_path, monkeypatch):
    """A crash, a hang and an exception nobody expects, each with the call that made it."""
    script = tmp_path / "fuzz.py"
    script.write_text(
        Path(fuzz.__file__)
        .read_text()
        .replace(
            'if __name__ == "__main__":',
            "import ctypes\n"
            "class Planted(Raw):\n"
            "    def run(self):\n"
            "        if self.name == 'dies': ctypes.string_at(0)\n"
            "        if self.name == 'hangs': time.sleep(600)\n"
            "        if self.name == 'raises': return 'raises KeyError', 'here'\n"
            "        return 'ok', None\n"
            "def draw(seed, index, kinds):\n"
            "    names = {1: 'dies', 2: 'hangs', 4: 'raises'}\n"
            "    return Planted(names.get(index, 'fine'), [], [])\n"
            'if __name__ == "__main__":',
        )
    )
    monkeypatch.setattr(fuzz, "__file__", str(script))
    done = run_fuzzer("--calls", "6", "--timeout", "3", "--isa", "avx2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "6 calls, 3 findings" in done.stdout
    for call, what in ((1, "SIGSEGV"), (2, "hangs"), (4, "raises KeyError")):
        assert f"FINDING {what}" in done.stdout
        assert f"--first {call} --calls 1" in done.stdout


def test_the_fuzzer_draws_networks(monkeypatch):
    """Some live through their passes; all of them are findings where a forward pass is wrong."""
    options = fuzz.parsed(["--seed", "5", "--kinds", "networks"])
    outcomes = {index: fuzz.run_call(options, index)[1:] for index in range(12)}
    assert set(outcomes.values()) == {("ok", None)}
    forward = fused_resnet.blocks.ResNet.forward
    monkeypatch.setattr(fused_resnet.blocks.ResNet, "forward", lambda *a: 1.2 * forward(*a))
    found = {fuzz.run_call(options, index)[1] for index in range(12)}
    assert {"wrong in inference_mode", "wrong in no_grad", "wrong in train"} <= found


def test_the_fuzzer_knows_the_library_by_another_convolution(monkeypatch):
    options = fuzz.parsed(["--seed", "3", "--kinds", "public"])

    def is_librarys(call):
        return (
            call.name == "conv_bn_act"
            and call.tensors["input"].dtype is torch.float64
            and call.numbers["activation"] == "none"
            and all(t is None or torch.isfinite(t).all() for t in call.tensors.values())
        )

    index = next(i for i in range(1000) if is_librarys(fuzz.draw(3, i, "public")))
    assert fuzz.run_call(options, index)[1:] == ("ok", None)
    convolution, call = torch.conv2d, fuzz.Public.call
    with monkeypatch.context() as planted:
        planted.setattr(torch, "conv2d", lambda *arguments: convolution(*arguments) + 1)
        assert fuzz.run_call(options, index)[1] == "wrong number"
        with fuzz.another_convolution():
            assert fuzz.run_call(options, index)[1:] == ("ok", None)
    assert torch.conv2d is convolution
    monkeypatch.setattr(fuzz.Public, "call", lambda *arguments: call(*arguments) + 1)
    with fuzz.another_convolution():
        assert fuzz.run_call(options, index)[1] == "wrong number"


def test_a_call_follows_from_its_index():
    for index in range(40):
        first, second = (str(fuzz.draw(3, index, "all")) for _ in range(2))
        assert first == second
