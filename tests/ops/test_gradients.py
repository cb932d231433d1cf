"""Gradients of functions and modules: error rule, gradcheck, double backward, autocast."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from support import (
    BLOCKS,
    DIFFERENTIABLE,
    DTYPES,
    STEM_POOL,
    ConvShape,
    assert_conv_gradients_by_error_rule,
    assert_gradients_by_error_rule,
    assert_same_bits,
    assert_same_nonfinite,
    conv_gradients,
    dtype_id,
    image_batch,
    make_conv_case,
    parameter_gradients,
    rerun_on_instruction_set,
    small_resnet,
)
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

import fused_resnet
from fused_resnet import backends, functional
from fused_resnet.testing import assert_error_rule, relative_error

SHAPES = [
    ConvShape(16, 24, (1, 1)),
    ConvShape(16, 24, (3, 3), (2, 2), (1, 1)),
    ConvShape(16, 16, (3, 3), (1, 1), (2, 2), (2, 2), 4),
]


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("pool", [None, STEM_POOL], ids=["", "pool"])
def test_conv_bn_act(backend, shape, dtype, activation, pool):
    """All gradients at once, by the error rule."""
    make = lambda: make_conv_case(  # noqa: E731
        shape,
        batch=3,
        size=(10, 9),
        dtype=dtype,
        bias=True,
        activation=activation,
        pool=pool,
        device=backend.device,
    )
    names = [n for n in DIFFERENTIABLE if n in make().tensors()]
    assert_conv_gradients_by_error_rule(make, names)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_gradient_alone(backend, name):
    """Asking for one gradient gives that one, the same as when all are asked for."""
    make = lambda: make_conv_case(SHAPES[1], bias=True, device=backend.device)  # noqa: E731
    _, everything = conv_gradients(make(), lambda c: c.fused(), DIFFERENTIABLE)
    _, alone = conv_gradients(make(), lambda c: c.fused(), [name])
    assert list(alone) == [name]
    assert relative_error(alone[name], everything[name].double()) < 1e-6


def test_running_statistics_get_no_gradient(backend):
    """They are buffers, as in `F.batch_norm`."""
    case = make_conv_case(SHAPES[0], device=backend.device)
    case.weight.requires_grad_()
    out = case.fused()
    out.sum().backward()
    assert case.running_mean.grad is None
    assert case.running_var.grad is None


def test_gradient_of_a_nan_output(backend):
    """A NaN passes relu's backward exactly as torch's threshold_backward lets it."""
    make = lambda: make_conv_case(SHAPES[0], device=backend.device)  # noqa: E731
    results = []
    for evaluate in (lambda c: c.fused(), lambda c: c.eager()):
        case = make()
        case.input[0, 0, 2, 3] = math.nan
        case.residual[1, 4, 1, 1] = math.nan
        results.append(conv_gradients(case, evaluate, DIFFERENTIABLE)[1])
    for name in results[0]:
        assert_same_nonfinite(results[0][name], results[1][name])


def test_gradients_are_reproducible(backend):
    for shape in SHAPES:
        make = lambda: make_conv_case(shape, batch=4, bias=True, device=backend.device)  # noqa: B023, E731
        _, first = conv_gradients(make(), lambda c: c.fused(), DIFFERENTIABLE)
        _, second = conv_gradients(make(), lambda c: c.fused(), DIFFERENTIABLE)
        for name in first:
            assert_same_bits(first[name], second[name], name)


def test_the_output_may_be_changed_in_place_afterwards(backend):
    """Like any operator that saves its output: autograd notices instead of computing nonsense."""
    case = make_conv_case(SHAPES[0], device=backend.device)
    case.weight.requires_grad_()
    case.activation = "relu"
    out = case.fused()
    out.mul_(-1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inputs_changed_in_place_before_backward(backend):
    """A weight stepped between forward and backward is noticed too."""
    case = make_conv_case(SHAPES[0], device=backend.device)
    case.input.requires_grad_()
    case.weight.requires_grad_()
    out = case.fused()
    with torch.no_grad():
        case.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def small_double(shape, pool=None, seed=3):
    """A float64 case small enough for finite differences."""
    return make_conv_case(
        shape,
        batch=2,
        size=(5, 4),
        dtype=torch.float64,
        bias=True,
        pool=pool,
        seed=seed,
    )


CHECKS = [gradcheck, functools.partial(gradgradcheck, fast_mode=True)]
CHECKED = [
    ConvShape(2, 3, (1, 1)),
    ConvShape(2, 4, (3, 3), (2, 1), (1, 1), (1, 1), 2),
    ConvShape(2, 3, (3, 2), (1, 1), (2, 1), (2, 1)),
]


@pytest.mark.parametrize("shape", CHECKED, ids=str)
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize(
    "pool", [None, {"kernel_size": 2, "stride": 1, "padding": 0}], ids=["", "pool"]
)
@pytest.mark.parametrize("check", CHECKS, ids=["first", "second"])
def test_conv_bn_act_against_finite_differences(backend, shape, activation, pool, check):
    case = small_double(shape, pool)
    case.activation = activation
    names = [n for n in DIFFERENTIABLE if n in case.tensors()]
    leaves = [case.tensors()[n].to(backend.device).requires_grad_() for n in names]

    def evaluate(*values):
        for name, value in zip(names, values, strict=True):
            setattr(case, name, value)
        return case.fused()

    assert check(evaluate, leaves)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("check", CHECKS, ids=["first", "second"])
def test_batch_norm_act_against_finite_differences(backend, training, activation, residual, check):
    torch.manual_seed(5)
    x, z = torch.randn(2, 2, 2, 3, 3, dtype=torch.float64, device=backend.device).unbind(0)
    weight, bias = torch.randn(2, 2, dtype=torch.float64, device=backend.device).unbind(0)
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias, z)]
    mean = torch.zeros(2, dtype=torch.float64, device=backend.device)
    var = torch.ones(2, dtype=torch.float64, device=backend.device)

    def evaluate(x, weight, bias, z):
        return functional.batch_norm_act(
            x,
            mean.clone(),
            var.clone(),
            weight,
            bias,
            training,
            residual=z if residual else None,
            activation=activation,
        )

    assert check(evaluate, leaves if residual else [*leaves[:3], z.clone()])


def batch_norm_gradients(
    evaluate, dtype, parameter_dtype, device, affine=True, residual=True,
    memory_format=torch.contiguous_format,
):  # fmt: skip
    """Gradients of a projection of `evaluate(x, mean, var, weight, bias, residual)`."""
    generator = torch.Generator().manual_seed(11)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator)

    channels, shape = 96, (4, 96, 7, 6)
    x = (normal(*shape) * 2 + normal(channels, 1, 1)).bfloat16()
    z, cotangent = normal(*shape).bfloat16(), normal(*shape).bfloat16()
    weight, bias = (normal(channels) * 0.3 + 1).bfloat16(), normal(channels).bfloat16()
    leaves = {
        "input": x.to(dtype),
        "weight": weight.to(parameter_dtype) if affine else None,
        "bias": bias.to(parameter_dtype) if affine else None,
        "residual": z.to(dtype) if residual else None,
    }
    for name in ("input", "residual"):
        if leaves[name] is not None:
            leaves[name] = leaves[name].to(memory_format=memory_format)
    leaves = {n: t if t is None else t.to(device).requires_grad_() for n, t in leaves.items()}
    mean = torch.full((channels,), 0.125, dtype=parameter_dtype, device=device)
    var = torch.full((channels,), 1.5, dtype=parameter_dtype, device=device)
    out = evaluate(leaves["input"], mean, var, leaves["weight"], leaves["bias"], leaves["residual"])
    out.backward(cotangent.to(out))
    return {n: t.grad for n, t in leaves.items() if t is not None}


@pytest.mark.pairs
@pytest.mark.interpreted
@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.single
def test_batch_norm_act(backend, training, dtype, activation):
    def ours(x, mean, var, weight, bias, z):
        return functional.batch_norm_act(
            x, mean, var, weight, bias, training, residual=z, activation=activation
        )

    def theirs(x, mean, var, weight, bias, z):
        out = F.batch_norm(x, mean, var, weight, bias, training)
        out = out if z is None else out + z
        return F.relu(out) if activation == "relu" else out

    parameters = {dtype} if dtype == torch.float64 else {dtype, torch.float32}
    for parameter_dtype, affine, residual, memory_format in itertools.product(
        parameters, [True, False], [True, False], [torch.contiguous_format, torch.channels_last]
    ):
        options = (backend.device, affine, residual, memory_format)
        actual = batch_norm_gradients(ours, dtype, parameter_dtype, *options)
        eager = batch_norm_gradients(theirs, dtype, parameter_dtype, *options)
        exact = batch_norm_gradients(theirs, torch.float64, torch.float64, *options)
        assert actual.keys() == eager.keys()
        for name in actual:
            assert actual[name].dtype == eager[name].dtype, name
            if dtype == torch.float64:
                assert relative_error(actual[name], exact[name]) < 1e-12, name
            else:
                assert_error_rule(actual[name], eager[name], exact[name])


MASKED_SHAPES = {
    "nhwc": ((3, 48, 5, 3), torch.channels_last),
    "nchw": ((3, 5, 4, 8), torch.contiguous_format),
    "rows": ((6, 32), torch.contiguous_format),
}


def masked_gradients(shape, memory_format, dtype, channels=None):
    """What `batch_norm_act` keeps, its output, often just zero, and the gradients."""
    generator = torch.Generator().manual_seed(23)

    def leaf(*sizes):
        tensor = torch.randn(sizes, generator=generator).mul(2).round().to(dtype)
        return (
            tensor.to(memory_format=memory_format) if len(sizes) == 4 else tensor
        ).requires_grad_()

    x, weight, bias = leaf(*shape), leaf(shape[1]), leaf(shape[1])
    residual = leaf(shape[0], channels or shape[1], *shape[2:])
    with torch.no_grad():
        x.flatten()[0], residual.flatten()[-1] = math.nan, math.inf
        weight[1], weight[2], bias[2] = 0.0, -0.0, 0.0
    cotangent = torch.randn(shape, generator=generator).to(dtype)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = functional.batch_norm_act(
            x, None, None, weight, bias, True, residual=residual, pad_residual=True
        )
    gradients = torch.autograd.grad(out, (x, weight, bias, residual), cotangent)
    return kept, out, gradients


@pytest.mark.quick
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("layout", MASKED_SHAPES)
@pytest.mark.parametrize("narrow", [False, True], ids=["", "narrow"])
def test_the_cpu_keeps_masks_as_bits(monkeypatch, layout, dtype, narrow):
    """An eighth of a byte a value, and the gradients that the output itself would have led to."""
    shape, memory_format = MASKED_SHAPES[layout]
    channels = shape[1] - 3 if narrow else None
    kept, out, gradients = masked_gradients(shape, memory_format, dtype, channels)
    (mask,) = (tensor for tensor in kept if tensor.dtype is torch.uint8)
    assert mask.numel() * 8 == out.numel()
    assert all(tensor.data_ptr() != out.data_ptr() for tensor in kept)
    monkeypatch.delattr(backends.cpu.Cpu, "batch_norm_act_training_keeping_mask")
    kept, out, expected = masked_gradients(shape, memory_format, dtype, channels)
    assert any(tensor.data_ptr() == out.data_ptr() for tensor in kept)
    for name, actual, gradient in zip("xwbr", gradients, expected, strict=True):
        assert_same_nonfinite(actual, gradient)
        assert_same_bits(actual.nan_to_num(), gradient.nan_to_num(), name)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [((2, 24, 4, 4), torch.channels_last), ((2, 16, 7, 7), torch.contiguous_format)],
    ids=["24 channels", "49 pixels"],
)
def test_masks_that_no_bits_are_kept_of(shape, memory_format):
    kept, out, _ = masked_gradients(shape, memory_format, torch.float32)
    assert all(tensor.dtype is not torch.uint8 for tensor in kept)
    assert any(tensor.data_ptr() == out.data_ptr() for tensor in kept)


@pytest.mark.parametrize("isa", ["avx2", "none"])
@pytest.mark.ahead(lambda isa: rerun_on_instruction_set(isa, __file__, "keeps_masks_as_bits"))
def test_masks_as_bits_on_other_instruction_sets(isa, ahead):
    ahead()


@pytest.mark.parametrize("check", CHECKS, ids=["first", "second"])
@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
def test_masks_as_bits_against_finite_differences(check, strided):
    torch.manual_seed(6)
    x, z = torch.randn(2, 2, 16, 1, 2, dtype=torch.float64).unbind(0)
    x, z = (t.contiguous(memory_format=torch.channels_last).requires_grad_() for t in (x, z))
    weight, bias = (t.requires_grad_() for t in torch.randn(2, 16, dtype=torch.float64).unbind(0))

    def evaluate(x, z, weight, bias):
        if strided:  # as the kernel then copies it
            x = torch.stack((x, x), -1)[..., 0]
        return functional.batch_norm_act(x, None, None, weight, bias, True, residual=z)

    assert check(evaluate, (x, z, weight, bias))


def model_and_images(backend, block, dtype=torch.float32):
    """A model of two stages and a batch, smaller for kernels on the host, which take long."""
    model = small_resnet(BLOCKS[block], stages=2)
    on_host = backend.how == "on the host"
    images = image_batch(3, 32, dtype) if on_host else image_batch(4, 40, dtype)
    return model.to(dtype).to(backend.device), images.to(backend.device)


def set_mode(model, mode):
    """Training, inference, frozen statistics with trained parameters, or half of each."""
    stages = [s for s in (model.layer1, model.layer2, model.layer3, model.layer4) if len(s)]
    if mode == "train":
        model.train()
    elif mode == "eval":
        model.eval()
    elif mode == "frozen statistics":
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    elif mode == "frozen parameters":
        set_mode(model, "frozen statistics")
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
    elif mode == "half and half":
        model.train()
        for stage in stages[::2]:
            stage.eval()
        for stage in stages[1::2]:
            stage[0].bn1.eval()
            stage[0].downsample[1].eval()
    elif mode == "frozen trunk":
        model.eval()
        stages[-1].train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith((f"layer{len(stages)}", "fc")))
    else:
        raise ValueError(mode)


MODES = ["train", "eval", "frozen statistics", "frozen parameters", "half and half", "frozen trunk"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("block", BLOCKS)
def test_small_model_in_float64(backend, block, mode):
    """Every gradient and every buffer, exactly enough that a wrong formula cannot hide."""
    eager, x = model_and_images(backend, block, torch.float64)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        set_mode(model, mode)
    out, ours = parameter_gradients(fused, x)
    expected, theirs = parameter_gradients(eager, x)
    assert ours.keys() == theirs.keys()
    assert relative_error(out, expected) < 1e-12
    for name in theirs:
        assert relative_error(ours[name], theirs[name]) < 1e-9, name
    for (name, ours_buffer), theirs_buffer in zip(
        fused.named_buffers(), eager.buffers(), strict=True
    ):
        torch.testing.assert_close(ours_buffer, theirs_buffer, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.pairs
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_small_model_by_the_error_rule(backend, block, mode, dtype):
    eager, x = model_and_images(backend, block, dtype)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        set_mode(model, mode)
    assert_gradients_by_error_rule(fused, eager, x)


@pytest.mark.quick
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_autocast(backend, block, training):
    """Under autocast: eager's dtypes everywhere, and errors by the rule."""
    eager, x = model_and_images(backend, block)
    eager.train(training)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    exact = copy.deepcopy(eager).double()
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        out, ours = parameter_gradients(fused, x)
        expected, theirs = parameter_gradients(eager, x)
    reference, _ = parameter_gradients(exact, x.double())
    assert out.dtype == expected.dtype == torch.bfloat16
    assert_error_rule(out, expected, reference)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype == torch.float32
    for ours_buffer, theirs_buffer in zip(fused.buffers(), eager.buffers(), strict=True):
        assert ours_buffer.dtype == theirs_buffer.dtype


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_id)
def test_autocast_of_the_functions(backend, dtype):
    """conv_bn_act casts like conv2d, batch_norm_act like batch_norm; BN parameters stay float32."""
    case = make_conv_case(SHAPES[1], bias=True, device=backend.device)
    with torch.autocast(backend.device, dtype=dtype):
        out, eager = case.fused(), case.eager()
    assert out.dtype == dtype
    assert_error_rule(out, eager, case.double().eager())
    for training in (True, False):
        x = torch.randn(4, 6, 5, 5, device=backend.device)
        for operand in (x, x.to(dtype)):
            mean, var = torch.zeros(6, device=x.device), torch.ones(6, device=x.device)
            with torch.autocast(backend.device, dtype=dtype):
                ours = functional.batch_norm_act(
                    operand, mean.clone(), var.clone(), training=training
                )
                theirs = F.batch_norm(operand, mean.clone(), var.clone(), training=training)
            assert ours.dtype == theirs.dtype


def test_autocast_gradients_of_the_function(backend):
    """Leaves in float32 get float32 gradients through the cast."""
    make = lambda: make_conv_case(SHAPES[1], bias=True, device=backend.device)  # noqa: E731
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        _, ours = conv_gradients(make(), lambda c: c.fused(), DIFFERENTIABLE)
        _, theirs = conv_gradients(make(), lambda c: c.eager(), DIFFERENTIABLE)
    _, exact = conv_gradients(make().double(), lambda c: c.eager(), DIFFERENTIABLE)
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype == torch.float32
        assert_error_rule(ours[name], theirs[name], exact[name])


def test_accumulation_and_retained_graphs(backend):
    """Two backwards through one graph add up, as they do in eager."""
    case = make_conv_case(SHAPES[0], dtype=torch.float64, device=backend.device)
    case.weight.requires_grad_()
    loss = case.fused().sum()
    loss.backward(retain_graph=True)
    once = case.weight.grad.clone()
    loss.backward()
    torch.testing.assert_close(case.weight.grad, 2 * once)


def test_checkpointing(backend):
    """torch.utils.checkpoint recomputes a fused block and gets the same gradients."""
    from torch.utils.checkpoint import checkpoint

    model = fused_resnet.fuse(small_resnet(BLOCKS["bottleneck"])).to(backend.device)
    block = model.layer2[0]
    x = torch.randn(2, 256, 8, 8, device=backend.device)
    results = []
    for run in (lambda t: block(t), lambda t: checkpoint(block, t, use_reentrant=False)):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert_same_bits(plain, recomputed)


def test_training_converges_like_eager(backend):
    """Five optimizer steps in float64 leave the same parameters and buffers."""
    eager = small_resnet(BLOCKS["basic"], stages=2).double().to(backend.device).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for model in (eager, fused):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
        for step in range(5):
            x = image_batch(4, 32, seed=step).double().to(backend.device)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), torch.arange(4, device=backend.device))
            loss.backward()
            optimizer.step()
    for (name, ours), theirs in zip(
        fused.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8, msg=name)
