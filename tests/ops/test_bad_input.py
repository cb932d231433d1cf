"""Wrong input: the exception's type, and a message naming the argument and both values."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import BLOCKS, ConvShape, image_batch, make_conv_case, run_python, small_resnet

import fused_resnet
from fused_resnet import functional

CONV = ConvShape(8, 12, (3, 3), (1, 1), (1, 1))
POOL = {"pool_kernel_size": 3, "pool_stride": 2, "pool_padding": 1}


def conv_arguments(pool=False, **changes):
    """Arguments of a call that works, but for `changes`: values, or functions of the old value."""
    case = make_conv_case(CONV, size=(6, 6), bias=True)
    arguments = {
        **case.tensors(),
        "eps": case.eps,
        "stride": 1,
        "padding": 1,
        "dilation": 1,
        "groups": 1,
        "activation": "relu",
    }
    if pool:
        arguments.pop("residual")
        arguments.update(POOL)
    for name, change in changes.items():
        arguments[name] = change(arguments.get(name)) if callable(change) else change
    return arguments


def norm_arguments(**changes):
    torch.manual_seed(0)
    arguments = {
        "input": torch.randn(2, 6, 4, 4),
        "running_mean": torch.zeros(6),
        "running_var": torch.ones(6),
        "weight": torch.ones(6),
        "bias": torch.zeros(6),
        "training": False,
        "momentum": 0.1,
        "eps": 1e-5,
        "residual": torch.randn(2, 6, 4, 4),
        "activation": "relu",
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def check_message(raised, words):
    """One line that contains every word."""
    message = str(raised.value)
    assert "\n" not in message, message
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


# Changes to the arguments, the exception, and what its message has to name.
BAD_CONVOLUTIONS = {
    "input channels": (
        dict(input=torch.randn(2, 5, 6, 6)),
        ValueError,
        ["weight", "8", "input", "5"],
    ),
    "input channels with groups": (
        dict(groups=2),
        ValueError,
        ["weight", "16", "input", "8", "groups=2"],
    ),
    "groups do not divide the output": (
        dict(weight=torch.randn(12, 1, 3, 3), groups=8),
        ValueError,
        ["groups", "8", "12"],
    ),
    "groups zero": (dict(groups=0), ValueError, ["groups", "0"]),
    "groups negative": (dict(groups=-2), ValueError, ["groups", "-2"]),
    "groups a float": (dict(groups=1.0), (TypeError, ValueError), ["groups", "1.0"]),
    "groups a bool-like string": (dict(groups="1"), (TypeError, ValueError), ["groups", "'1'"]),
    "input 3-d": (dict(input=torch.randn(8, 6, 6)), ValueError, ["input", "3", "4"]),
    "input 5-d": (dict(input=torch.randn(2, 8, 1, 6, 6)), ValueError, ["input", "5", "4"]),
    "input 0-d": (dict(input=torch.tensor(1.0)), ValueError, ["input", "0", "4"]),
    "weight 3-d": (dict(weight=torch.randn(12, 8, 3)), ValueError, ["weight", "3", "4"]),
    "weight 5-d": (dict(weight=torch.randn(12, 8, 3, 3, 1)), ValueError, ["weight", "5", "4"]),
    "no filters": (dict(weight=torch.randn(0, 8, 3, 3)), ValueError, ["weight", "0"]),
    "empty filters": (dict(weight=torch.randn(12, 8, 0, 3)), ValueError, ["weight", "0"]),
    "input float64": (
        dict(input=torch.Tensor.double),
        TypeError,
        ["weight", "torch.float32", "input", "torch.float64"],
    ),
    "weight bfloat16": (
        dict(weight=torch.Tensor.bfloat16),
        TypeError,
        ["weight", "torch.bfloat16", "input", "torch.float32"],
    ),
    "bias float16": (
        dict(bias=torch.Tensor.half),
        TypeError,
        ["bias", "torch.float16", "torch.float32"],
    ),
    "residual bfloat16": (
        dict(residual=torch.Tensor.bfloat16),
        TypeError,
        ["residual", "torch.bfloat16", "torch.float32"],
    ),
    "running_mean float64": (
        dict(running_mean=torch.Tensor.double),
        TypeError,
        ["running_mean", "torch.float64", "torch.float32"],
    ),
    "bn_weight bfloat16 beside float32": (
        dict(bn_weight=torch.Tensor.bfloat16),
        TypeError,
        ["bn_weight", "torch.bfloat16", "torch.float32"],
    ),
    "integers": (
        dict(input=torch.Tensor.int, weight=torch.Tensor.int, bias=None, residual=None),
        TypeError,
        ["input", "torch.int32"],
    ),
    "booleans": (
        dict(input=torch.Tensor.bool, weight=torch.Tensor.bool, bias=None, residual=None),
        TypeError,
        ["input", "torch.bool"],
    ),
    "complex": (
        dict(
            input=lambda t: t.to(torch.complex64),
            weight=lambda t: t.to(torch.complex64),
            bias=None,
            residual=None,
        ),
        TypeError,
        ["input", "torch.complex64"],
    ),
    "input on another device": (
        dict(input=lambda t: t.to("meta")),
        ValueError,
        ["input", "meta", "cpu"],
    ),
    "weight on another device": (
        dict(weight=lambda t: t.to("meta")),
        ValueError,
        ["weight", "meta", "input", "cpu"],
    ),
    "running_var on another device": (
        dict(running_var=lambda t: t.to("meta")),
        ValueError,
        ["running_var", "meta", "cpu"],
    ),
    "bn_bias on another device": (
        dict(bn_bias=lambda t: t.to("meta")),
        ValueError,
        ["bn_bias", "meta", "cpu"],
    ),
    "residual on another device": (
        dict(residual=lambda t: t.to("meta")),
        ValueError,
        ["residual", "meta", "cpu"],
    ),
    "residual of another image size": (
        dict(residual=torch.randn(2, 12, 5, 6)),
        ValueError,
        ["residual", "2, 12, 5, 6", "2, 12, 6, 6"],
    ),
    "residual to broadcast": (
        dict(residual=torch.randn(1, 12, 1, 1)),
        ValueError,
        ["residual", "1, 12, 1, 1", "2, 12, 6, 6"],
    ),
    "residual of more channels": (
        dict(residual=torch.randn(2, 13, 6, 6)),
        ValueError,
        ["residual", "2, 13, 6, 6", "2, 12, 6, 6"],
    ),
    "residual of fewer channels": (
        dict(residual=torch.randn(2, 11, 6, 6)),
        ValueError,
        ["residual", "11 channels", "12", "pad_residual"],
    ),
    "residual 3-d": (
        dict(residual=torch.randn(12, 6, 6)),
        ValueError,
        ["residual", "12, 6, 6", "2, 12, 6, 6"],
    ),
    "running_mean size": (
        dict(running_mean=torch.zeros(8)),
        ValueError,
        ["running_mean", "8", "12"],
    ),
    "running_var size": (dict(running_var=torch.ones(13)), ValueError, ["running_var", "13", "12"]),
    "bn_weight size": (dict(bn_weight=torch.ones(1)), ValueError, ["bn_weight", "1", "12"]),
    "bn_bias 2-d": (dict(bn_bias=torch.ones(12, 1)), ValueError, ["bn_bias", "12, 1", "12"]),
    "bn_bias 0-d": (dict(bn_bias=torch.tensor(1.0)), ValueError, ["bn_bias", "12"]),
    "bias size": (dict(bias=torch.ones(11)), ValueError, ["bias", "11", "12"]),
    "eps negative": (dict(eps=-1e-5), ValueError, ["eps", "-1e-05"]),
    "eps NaN": (dict(eps=math.nan), ValueError, ["eps", "nan"]),
    "eps a string": (dict(eps="small"), (TypeError, ValueError), ["eps", "small"]),
    "eps None": (dict(eps=None), (TypeError, ValueError), ["eps", "None"]),
    "unknown activation": (
        dict(activation="mish"),
        ValueError,
        ["activation", "mish", "relu", "none"],
    ),
    "activation None": (dict(activation=None), ValueError, ["activation", "None", "relu"]),
    "activation a function": (
        dict(activation=lambda _: F.relu),
        ValueError,
        ["activation", "relu"],
    ),
    "stride zero": (dict(stride=0), ValueError, ["stride", "0", "1"]),
    "stride negative": (dict(stride=(1, -2)), ValueError, ["stride", "-2", "1"]),
    "stride of three": (dict(stride=(1, 1, 1)), ValueError, ["stride", "3"]),
    "stride of none": (dict(stride=()), ValueError, ["stride", "0"]),
    "stride a float": (dict(stride=1.5), TypeError, ["stride", "1.5"]),
    "stride of floats": (dict(stride=(1.0, 2.0)), TypeError, ["stride", "1.0"]),
    "stride None": (dict(stride=None), TypeError, ["stride", "None"]),
    "padding negative": (dict(padding=-1), ValueError, ["padding", "-1", "0"]),
    "padding a string": (dict(padding="same"), TypeError, ["padding", "same"]),
    "dilation zero": (dict(dilation=(0, 1)), ValueError, ["dilation", "0", "1"]),
    "dilation negative": (dict(dilation=-1), ValueError, ["dilation", "-1", "1"]),
    "image smaller than the filter": (
        dict(input=torch.randn(2, 8, 2, 6), padding=0),
        ValueError,
        ["weight", "3 x 3", "input", "2 x 6"],
    ),
    "empty image": (
        dict(input=torch.randn(2, 8, 0, 6), padding=0),
        ValueError,
        ["input", "0 x 6"],
    ),
    "input None": (dict(input=None), TypeError, ["input", "None"]),
    "input a list": (dict(input=[[1.0]]), TypeError, ["input", "list"]),
    "input an array": (
        dict(input=np.zeros((2, 8, 6, 6), np.float32)),
        TypeError,
        ["input", "ndarray"],
    ),
    "weight None": (dict(weight=None), TypeError, ["weight", "None"]),
    "running_mean None": (dict(running_mean=None), TypeError, ["running_mean", "None"]),
    "running_var a float": (dict(running_var=1.0), TypeError, ["running_var", "float"]),
    "residual a float": (dict(residual=1.0), TypeError, ["residual", "float"]),
    "bias a list": (dict(bias=[1.0] * 12), TypeError, ["bias", "list"]),
    "a huge stride": (dict(stride=2**70), (ValueError, TypeError, OverflowError), []),
    "a huge padding": (
        dict(padding=2**62),
        (ValueError, TypeError, OverflowError, RuntimeError),
        [],
    ),
}

NOT_OF_A_POOL = {n for n, (changes, *_) in BAD_CONVOLUTIONS.items() if "residual" in n}


@pytest.mark.quick
@pytest.mark.parametrize("what", BAD_CONVOLUTIONS)
def test_conv_bn_act(backend, what):
    changes, error, words = BAD_CONVOLUTIONS[what]
    arguments = conv_arguments(**changes)
    with pytest.raises(error) as raised:
        functional.conv_bn_act(**arguments)
    assert type(raised.value) in (error if isinstance(error, tuple) else (error,))
    check_message(raised, words)


@pytest.mark.parametrize("what", sorted(set(BAD_CONVOLUTIONS) - NOT_OF_A_POOL))
def test_conv_bn_act_max_pool(backend, what):
    changes, error, words = BAD_CONVOLUTIONS[what]
    changes = {n: change for n, change in changes.items() if n != "residual"}
    with pytest.raises(error) as raised:
        functional.conv_bn_act_max_pool(**conv_arguments(pool=True, **changes))
    check_message(raised, words)


@pytest.mark.parametrize("what", ["input channels", "stride zero", "unknown activation"])
def test_messages_name_the_function(what):
    changes, error, _ = BAD_CONVOLUTIONS[what]
    with pytest.raises(error, match=r"^conv_bn_act: "):
        functional.conv_bn_act(**conv_arguments(**changes))
    with pytest.raises(error, match=r"^conv_bn_act_max_pool: "):
        functional.conv_bn_act_max_pool(**conv_arguments(pool=True, **changes))


BAD_POOLS = {
    "padding over half": (dict(pool_padding=2), ["pool_padding", "2", "3"]),
    "padding negative": (dict(pool_padding=-1), ["pool_padding", "-1"]),
    "stride zero": (dict(pool_stride=0), ["pool_stride", "0"]),
    "kernel zero": (dict(pool_kernel_size=0), ["pool_kernel_size", "0"]),
    "kernel over the image": (
        dict(pool_kernel_size=40, pool_padding=0),
        ["pool_kernel_size", "40", "6"],
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("what", BAD_POOLS)
def test_pools(backend, what):
    changes, words = BAD_POOLS[what]
    with pytest.raises(ValueError) as raised:
        functional.conv_bn_act_max_pool(**conv_arguments(pool=True, **changes))
    check_message(raised, words)


BAD_NORMS = {
    "running_mean size": (
        dict(running_mean=torch.zeros(5)),
        ValueError,
        ["running_mean", "5", "6"],
    ),
    "running_var size": (dict(running_var=torch.ones(7)), ValueError, ["running_var", "7", "6"]),
    "weight size": (dict(weight=torch.ones(2)), ValueError, ["weight", "2", "6"]),
    "bias 2-d": (dict(bias=torch.ones(6, 6)), ValueError, ["bias", "6, 6", "6"]),
    "input 1-d": (dict(input=torch.randn(6), residual=None), ValueError, ["input", "1"]),
    "input integers": (
        dict(input=torch.Tensor.long, residual=None),
        TypeError,
        ["input", "torch.int64"],
    ),
    "input None": (dict(input=None), TypeError, ["input", "None"]),
    "weight a list": (dict(weight=[1.0] * 6), TypeError, ["weight", "list"]),
    "weight float64": (
        dict(weight=torch.Tensor.double),
        TypeError,
        ["weight", "torch.float64", "torch.float32"],
    ),
    "residual shape": (
        dict(residual=torch.randn(2, 6, 4, 5)),
        ValueError,
        ["residual", "2, 6, 4, 5", "2, 6, 4, 4"],
    ),
    "residual of fewer channels": (
        dict(residual=torch.randn(2, 4, 4, 4)),
        ValueError,
        ["residual", "4 channels", "6", "pad_residual"],
    ),
    "residual dtype": (
        dict(residual=torch.Tensor.half),
        TypeError,
        ["residual", "torch.float16", "torch.float32"],
    ),
    "residual device": (
        dict(residual=lambda t: t.to("meta")),
        ValueError,
        ["residual", "meta", "cpu"],
    ),
    "running_mean device": (
        dict(running_mean=lambda t: t.to("meta")),
        ValueError,
        ["running_mean", "meta", "cpu"],
    ),
    "eps negative": (dict(eps=-1.0), ValueError, ["eps", "-1.0"]),
    "momentum a string": (dict(momentum="fast"), (TypeError, ValueError), ["momentum", "fast"]),
    "unknown activation": (
        dict(activation="mish"),
        ValueError,
        ["activation", "mish", "relu", "none"],
    ),
}


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("what", BAD_NORMS)
def test_batch_norm_act(backend, what, training):
    changes, error, words = BAD_NORMS[what]
    arguments = norm_arguments(training=training, **changes)
    with pytest.raises(error) as raised:
        functional.batch_norm_act(**arguments)
    check_message(raised, words)


@pytest.mark.parametrize(
    "missing", [("running_mean",), ("running_var",), ("running_mean", "running_var")]
)
def test_inference_needs_running_statistics(missing):
    with pytest.raises((ValueError, TypeError), match=missing[0]):
        functional.batch_norm_act(**norm_arguments(**dict.fromkeys(missing)))


@pytest.mark.parametrize("pool", [False, True], ids=["", "pool"])
def test_the_good_call_works(pool):
    """The arguments the bad calls start from are fine: the errors above are about the change."""
    function = functional.conv_bn_act_max_pool if pool else functional.conv_bn_act
    assert function(**conv_arguments(pool=pool)).isfinite().all()
    assert functional.batch_norm_act(**norm_arguments()).isfinite().all()
    assert functional.batch_norm_act(**norm_arguments(training=True)).isfinite().all()


def test_bad_calls_leave_running_statistics_alone():
    for changes in (
        dict(residual=torch.randn(2, 6, 4, 5)),
        dict(eps=-1.0),
        dict(activation="mish"),
        dict(weight=torch.ones(2)),
    ):
        arguments = norm_arguments(training=True, **changes)
        with pytest.raises(ValueError):
            functional.batch_norm_act(**arguments)
        assert not arguments["running_mean"].any()
        assert (arguments["running_var"] == 1).all()


BAD_IMAGES = {
    "channels": torch.randn(2, 4, 32, 32),
    "3-d": torch.randn(3, 32, 32),
    "5-d": torch.randn(1, 2, 3, 32, 32),
    "2-d": torch.randn(32, 32),
    "float64": torch.randn(2, 3, 32, 32).double(),
    "bfloat16": torch.randn(2, 3, 32, 32).bfloat16(),
    "integers": torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    "complex": torch.zeros(2, 3, 32, 32, dtype=torch.complex64),
    "meta": torch.empty(2, 3, 32, 32, device="meta"),
    "no pixels": torch.randn(2, 3, 0, 32),
    "sparse": torch.randn(2, 3, 32, 32).to_sparse(),
    "array": np.zeros((2, 3, 32, 32), np.float32),
    "none": None,
    "text": "image",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("what", BAD_IMAGES)
def test_models(what, training):
    """A fused model refuses what the model refused, and computes what it computed."""
    eager = small_resnet(BLOCKS["basic"]).train(training)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with torch.no_grad():
        try:
            expected = eager(BAD_IMAGES[what])
        except Exception:
            with pytest.raises((ValueError, TypeError, RuntimeError, NotImplementedError)):
                fused(BAD_IMAGES[what])
        else:
            torch.testing.assert_close(fused(BAD_IMAGES[what]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.quick
@pytest.mark.parametrize("block", BLOCKS)
def test_training_with_one_value_per_channel(block):
    """A single 1-pixel image in train mode: `F.batch_norm`'s own error from inside the model."""
    eager = small_resnet(BLOCKS[block]).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(1, 32)
    with pytest.raises(ValueError) as theirs:
        eager(x)
    with pytest.raises(ValueError) as ours:
        fused(x)
    assert str(ours.value) == str(theirs.value)
    for (name, a), b in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@pytest.mark.ahead(
    lambda: run_python(
        """
        import torch, support
        from ops import test_bad_input as bad
        from ops.test_operators import PUBLIC, samples
        survived = 0
        wrong = [
            None, 1.0, "x", torch.empty(0), torch.randn(3), torch.randn(2, 3),
            torch.randn(1, 1, 1, 1), torch.randn(2, 8, 9, 10, 2), torch.randn(2, 8, 9, 10).double(),
            torch.randn(2, 8, 9, 10).bfloat16(), torch.randn(2, 8, 9, 10, device="meta"),
            torch.zeros(2, 8, 9, 10, dtype=torch.long), [0, 0], [-1, -1], [2**40, 2**40], -1, 2**40,
            torch.randn(1, 1, 1, 1).expand(2, 8, 9, 10), torch.randn(12).to_sparse(),
        ]
        for name in PUBLIC:
            operator = getattr(torch.ops.fused_resnet, name).default
            for arguments in samples(name, "cpu", torch.float32):
                for i in range(len(arguments)):
                    for value in wrong:
                        changed = list(arguments)
                        changed[i] = value
                        try:
                            with torch.no_grad():
                                operator(*changed)
                        except Exception:
                            pass
                        survived += 1
        print(survived)
        """,
        timeout=600,
    )
)
def test_the_process_survives_everything(ahead):
    """All bad calls again, straight at the operators that do no checking in Python."""
    assert int(ahead()) > 1000
