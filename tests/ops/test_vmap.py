"""Vectorised Jacobians, batched gradients and `torch.func`: of modules, and of single operators."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
import torchvision.models.resnet as torchvision_resnet
from conftest import RUNNERS
from torch import nn
from torch.autograd.functional import hessian, jacobian

from fused_resnet import backends, functional, fuse, reference, report
from fused_resnet.models import cifar_resnet, preact

OPS = torch.ops.fused_resnet
RUNNER = next((runner for runner in RUNNERS if runner.name == "triton"), None)


def _projected(block, *arguments):
    shortcut = nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6))
    return block(4, *arguments, stride=2, downsample=shortcut)


def _network(block):
    model = torchvision_resnet.ResNet(block, [1, 1, 1, 1], num_classes=2)
    model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.fc = nn.Linear(64 * block.expansion, 2)
    return model


BLOCKS = {
    "basic": lambda: torchvision_resnet.BasicBlock(4, 4),
    "projected": lambda: _projected(torchvision_resnet.BasicBlock, 6),
    "bottleneck": lambda: torchvision_resnet.Bottleneck(8, 2),
    "pre-activation": lambda: preact.PreActBasicBlock(4, 4),
}
NETWORKS = {
    "padded shortcuts": lambda: cifar_resnet(8, 2),
    "pooled stem": lambda: _network(torchvision_resnet.BasicBlock),
}


def _pair(make, training, dtype, memory_format):
    torch.manual_seed(0)
    eager = make().to(dtype, memory_format=memory_format).train(training)
    channels = eager.conv1.in_channels
    size = (3, 2) if channels > 3 else (9, 5)
    x = torch.randn(2, channels, *size, dtype=dtype).to(memory_format=memory_format)
    fused = fuse(copy.deepcopy(eager))
    assert all(record.fused for record in report(fused) if record.kind != "stem")
    return eager, fused, x


def _jacobian(model, x):
    return [jacobian(lambda x: model(x).flatten()[::7], x, vectorize=True)]


def _batched_gradients(model, x):
    out = model(x.requires_grad_()).flatten()[::7]
    cotangents = torch.eye(out.numel(), dtype=out.dtype)
    inputs = (x, *model.parameters())
    return torch.autograd.grad(out, inputs, cotangents, is_grads_batched=True)


def _forward_mode(model, x):
    return [jacobian(model, x, vectorize=True, strategy="forward-mode")]


def _hessian(model, x):
    return [hessian(lambda x: model(x).square().sum(), x, vectorize=True)]


def _jacrev(model, x):
    return [torch.func.jacrev(model)(x)]


def _jacfwd(model, x):
    return [torch.func.jacfwd(model)(x)]


def _vmap(model, x):
    return [torch.vmap(model, in_dims=1, out_dims=2)(torch.stack([x, -x, x * x], 1))]


def _result(transform, model, x):
    try:
        return transform(model, x.clone())
    except RuntimeError as error:
        return error


def _assert_as_eager(eager, fused, x, transform, tolerance):
    """The same values, or the same error, and the same buffers afterwards."""
    expected, actual = (_result(transform, model, x) for model in (eager, fused))
    if isinstance(expected, RuntimeError):
        assert isinstance(actual, RuntimeError)
        assert str(actual) == str(expected)
        return
    assert not isinstance(actual, RuntimeError), actual
    # Some gradients are zero but for rounding: those of weights that a norm makes irrelevant.
    scale = max(tensor.abs().max().item() for tensor in expected)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)
    for ours, theirs in zip(fused.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


FORMATS = [torch.contiguous_format, torch.channels_last]
OF_BLOCKS = [_jacobian, _batched_gradients, _forward_mode, _hessian, _jacrev, _jacfwd, _vmap]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("block", BLOCKS)
def test_blocks(block, training, memory_format):
    """Every transform, in float64; in training some of them are errors, which are eager's too."""
    for transform in OF_BLOCKS:
        eager, fused, x = _pair(BLOCKS[block], training, torch.float64, memory_format)
        _assert_as_eager(eager, fused, x, transform, 1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("network", [*NETWORKS, "projected"])
def test_float32(network, training, memory_format):
    """Backward of what ran forward on kernels."""
    make = {**NETWORKS, **BLOCKS}[network]
    for transform in (_batched_gradients, _vmap):
        eager, fused, x = _pair(make, training, torch.float32, memory_format)
        _assert_as_eager(eager, fused, x, transform, 1e-4)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_kept_less_memory_and_frozen_norms():
    """Convolutions that backward computes again, and blocks of which each norm is a node."""
    for change in (lambda m: fuse(m, memory="low"), lambda m: m.bn1.eval()):
        for memory_format in FORMATS:
            eager, fused, x = _pair(BLOCKS["bottleneck"], True, torch.float64, memory_format)
            change(fused)
            eager.bn1.train(fused.bn1.training)
            _assert_as_eager(eager, fused, x, _batched_gradients, 1e-10)


def _tensor(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def _vectors(channels, affine=True):
    mean, var = _tensor(channels), torch.rand(channels, dtype=torch.float64) + 0.5
    return mean, var, *((_tensor(channels), _tensor(channels)) if affine else (None, None))


def _layer(k, c, size, stride=1, padding=0):
    return (_tensor(k, c, size, size), *_vectors(k), 1e-3, _tensor(k)), (stride, padding)


GEOMETRY = ((2, 2), (1, 1), (1, 1), 1)
SAME = ((1, 1), (1, 1), (1, 1), 1)
ONE = [1, 1, 0, 0, 1, 1, 1]
THREE = [1, 1, 1, 1, 1, 1, 1]


def _weights(k, c, size):
    mean, var, weight, bias = _vectors(k)
    return [_tensor(k, c, size, size), mean, var, weight, bias, _tensor(k)]


def _trained(k, c, size):
    return [_tensor(k, c, size, size), None, *_vectors(k)[2:]]


def _eager_layer(x, layer, padding):
    """A convolution and its norm: of a layer of six tensors with running statistics."""
    if len(layer) == 6:
        weight, mean, var, bn_weight, bn_bias, bias = layer
        out = F.conv2d(x, weight, bias, padding=padding)
        return F.batch_norm(out, mean, var, bn_weight, bn_bias, eps=1e-3)
    weight, bias, bn_weight, bn_bias = layer
    out = F.conv2d(x, weight, bias, padding=padding)
    return F.batch_norm(out, None, None, bn_weight, bn_bias, True, eps=1e-3)


def _eager_block(x, tensors, *described):
    count = len(tensors) // 3
    first, second, projection = (tensors[i * count : (i + 1) * count] for i in range(3))
    h = _eager_layer(_eager_layer(x, first, 1).relu(), second, 0)
    return (h + _eager_layer(x, projection, 0)).relu()


def _eager_stem(x, tensors, *described):
    return F.max_pool2d(_eager_layer(x, tensors, 1).relu(), 2)


def _cases():
    """For each operator: arguments, the reference, and which of them calls may have their own of.

    Those are places of tensors, in a list as (place, index).
    """
    torch.manual_seed(0)
    x, z = _tensor(2, 3, 5, 4), _tensor(2, 4, 3, 2)
    convolution = (_tensor(4, 3, 3, 3), *_vectors(4), 1e-3, _tensor(4), *GEOMETRY)
    norm = (*_vectors(3), 1e-3)
    blocks = (
        [*_weights(3, 3, 3), *_weights(4, 3, 1), *_weights(4, 3, 1)],
        [*THREE, *ONE, *ONE], [1e-3] * 3, [3], [True],
    )  # fmt: skip
    trained = (
        [*_trained(3, 3, 3), *_trained(4, 3, 1), *_trained(4, 3, 1)],
        [*THREE, *ONE, *ONE], [1e-3] * 3, True, False,
    )  # fmt: skip
    stem = (_trained(4, 3, 3), THREE, 1e-3, [2, 2, 2, 2, 0, 0])
    return {
        "conv_bn_act": ((x, *convolution, z, "relu"), reference.conv_bn_act, (0, 1, 12)),
        "norm_conv_bn_act": (
            (x, *norm, *convolution, z, "none"), reference.norm_conv_bn_act, (0, 6, 17),
        ),
        "conv_bn_act_max_pool": (
            (x, *convolution, "relu", (2, 2), (1, 1), (0, 0)),
            reference.conv_bn_act_max_pool,
            (0, 1, 4),
        ),
        "batch_norm_act_inference": (
            (z, *_vectors(4), 1e-3, z.flip(0), "relu"),
            reference.batch_norm_act_inference,
            (0, 3, 6),
        ),
        "batch_norm_act_training": (
            (z, *_vectors(4)[2:], 1e-3, z.flip(0), "relu"),
            reference.batch_norm_act_training,
            (0, 1, 4),
        ),
        "scale_shift_act": (
            (z, *_vectors(4)[2:], z.flip(0)[:, 1:3], "relu"), reference.scale_shift_act, (0, 1, 3),
        ),
        "residual_blocks": (
            (x, *blocks), _eager_block, (0, (1, 0)),
        ),
        "block_training": ((x, *trained), _eager_block, (0, (1, 4))),
        "stem_training": ((x, *stem), _eager_stem, (0, (1, 0))),
    }  # fmt: skip


def _get(arguments, place):
    return arguments[place[0]][place[1]] if isinstance(place, tuple) else arguments[place]


def _with(arguments, changes):
    arguments = [list(a) if isinstance(a, list) else a for a in arguments]
    for place, tensor in changes.items():
        if isinstance(place, tuple):
            arguments[place[0]][place[1]] = tensor
        else:
            arguments[place] = tensor
    return arguments


def _tuple(results):
    return (results,) if isinstance(results, torch.Tensor) else tuple(results)


def _close(actual, expected):
    for ours, theirs in zip(_tuple(actual), _tuple(expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", _cases())
def test_vmap_over_an_operator(name):
    """Any of the arguments may differ from call to call, in any dimension; also without a call."""
    operator = getattr(OPS, name)
    arguments, _, places = _cases()[name]
    for chosen in ([places[0]], [places[1]], places):
        for dim in (0, 1, -1):
            for size in (3, 1, 0):
                stacked = {}
                for place in chosen:
                    tensor = _get(arguments, place)
                    calls = [tensor * (0.5 + i) for i in range(size)]
                    empty = tensor.new_empty(0, *tensor.shape).movedim(0, dim)
                    stacked[place] = torch.stack(calls, dim) if calls else empty

                def run(*tensors, chosen=chosen):
                    changes = dict(zip(chosen, tensors, strict=True))
                    return _tuple(operator(*_with(arguments, changes)))

                batched = torch.vmap(run, in_dims=dim)(*stacked.values())
                calls = [run(*(t.select(dim, i) for t in stacked.values())) for i in range(size)]
                if size:
                    _close(batched, [torch.stack(parts) for parts in zip(*calls, strict=True)])
                else:
                    one = run(*(_get(arguments, place) for place in chosen))
                    assert [b.shape for b in batched] == [(0, *t.shape) for t in one]


@pytest.mark.parametrize("name", _cases())
def test_derivatives_of_an_operator(name):
    """As the reference's: forward, reverse, one in the other, over calls, and of batched calls."""
    operator = getattr(OPS, name)
    arguments, composite, places = _cases()[name]
    place = places[1]
    value = _get(arguments, place)
    values = torch.stack([value, 2 * value])

    def of(function):
        return lambda tensor: _tuple(function(*_with(arguments, {place: tensor})))[0].square().sum()

    fused, eager = of(operator), of(composite)
    func = torch.func
    for transform in (
        lambda f: func.jacrev(f)(value),
        lambda f: func.jacfwd(f)(value),
        lambda f: func.grad(lambda t: func.grad(f)(t).square().sum())(value),
        lambda f: func.vmap(func.grad(f))(values),
        lambda f: func.grad(lambda t: func.vmap(f)(t).sum())(values),
    ):
        _close(transform(fused), transform(eager))
    leaf = values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.vmap(fused)(leaf).sum(), leaf)
    _close(gradient, torch.func.vmap(torch.func.grad(eager))(values))


def test_backward_operators():
    """The gradients that compiled training asks for, of several cotangents at once."""
    cases = _cases()
    for name in ("block_training", "stem_training"):
        (x, parameters, *rest), _, _ = cases[name]
        out, *kept = getattr(OPS, name)(x, parameters, *rest)
        need = [True] + [p is not None for p in parameters]
        saved = (x, out, parameters) if name == "block_training" else (x, parameters)
        backward = getattr(OPS, f"{name}_backward")
        grads = torch.stack([out.cos(), out.sin()])
        run = lambda g: tuple(backward(g, *saved, kept, need, *rest))  # noqa: E731, B023
        calls = zip(*(run(g) for g in grads), strict=True)
        _close(torch.vmap(run)(grads), [torch.stack(parts) for parts in calls])


def test_every_operator_has_a_rule():
    """But those that write into a tensor, which only backends call."""
    if backends.available()["triton"] == "yes":
        backends.triton.lazy.graph_operators()  # registers its own
    names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fused_resnet::")]
    assert len(names) > len(_cases())
    for name in names:
        schema = getattr(OPS, name.removeprefix("fused_resnet::")).default._schema
        if not schema.is_mutable and any("Tensor" in str(a.type) for a in schema.arguments):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "FuncTorchBatched"), name


@pytest.mark.skipif(RUNNER is None, reason=backends.available()["triton"])
@pytest.mark.parametrize("pool", [False, True], ids=["convolution", "stem"])
@pytest.mark.single
def test_operators_of_triton(pool):
    """Those that compiled graphs hold, called by a graph that somebody maps over."""
    backends.triton.lazy.graph_operators()
    torch.manual_seed(0)
    K, C, size = (16, 3, 7) if pool else (16, 16, 1)
    statistics = [torch.randn(K), torch.rand(K) + 0.5, torch.randn(K), torch.randn(K), 1e-3, None]
    numbers = ([2, 2], [3, 3], [1, 1]) if pool else ([1, 1], [0, 0], [1, 1], 1)
    if pool:
        operator = OPS.triton_conv_bn_act_max_pool

        def run(x, weight, z):
            return operator(x, weight, *statistics, *numbers, "relu")

        def eager(x, weight, z):
            out = F.conv2d(x.double(), weight.double(), None, *numbers[:2]).float()
            out = F.batch_norm(out, *statistics[:4], eps=1e-3).relu()
            return F.max_pool2d(out, 3, 2, 1)
    else:
        operator = OPS.triton_conv_bn_act

        def run(x, weight, z):
            return operator(x, weight, *statistics, *numbers, z, "relu")

        def eager(x, weight, z):
            out = F.conv2d(x.double(), weight.double()).float()
            return (F.batch_norm(out, *statistics[:4], eps=1e-3) + z).relu()

    statistics[:4] = (t.to(RUNNER.device) for t in statistics[:4])
    for dims, calls in (((0, None, -1), 3), ((0, None, None), 3), ((None, 0, None), 2)):
        x = torch.randn(3, 2, C, 9, 8) if dims[0] == 0 else torch.randn(2, C, 9, 8)
        weight = torch.randn(2, K, C, size, size) if dims[1] == 0 else torch.randn(K, C, size, size)
        z = torch.randn(2, K, 9, 8, 3) if dims[2] == -1 else torch.randn(2, K, 9, 8)
        given = [t.to(RUNNER.device) for t in (x, weight, z)]
        batched = torch.vmap(run, in_dims=dims)(*given)
        for i in range(calls):
            one = (t if d is None else t.select(d, i) for t, d in zip(given, dims, strict=True))
            torch.testing.assert_close(batched[i], eager(*one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_functions(training):
    """Of `fused_resnet.functional`, of which the first call's gradients are batched."""
    torch.manual_seed(0)
    x, z, vectors = _tensor(2, 3, 4, 3), _tensor(2, 3, 4, 3), _vectors(3)
    weight = _tensor(3, 3, 1, 1)

    def norm(module, x):
        return module.batch_norm_act(
            x, *(v.clone() for v in vectors), training, residual=z, activation="relu"
        )

    def convolution(module, x):
        return module.conv_bn_act(x, weight, *vectors, residual=z)

    for function in (norm, convolution):
        results = []
        for module in (functional, reference):
            run = lambda x: function(module, x)  # noqa: E731, B023
            results.append(
                (
                    jacobian(run, x, vectorize=True),
                    torch.func.jacrev(run)(x),
                    torch.func.jacfwd(run)(x),
                    hessian(lambda x: run(x).square().sum(), x, vectorize=True),  # noqa: B023
                )
            )
        _close(*results)
