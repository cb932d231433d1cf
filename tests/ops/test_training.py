"""Training on the CPU: statistics, blocks as one node of the graph, and what they keep."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from support import (
    BLOCKS,
    DTYPES,
    accumulation_dtype,
    assert_gradients_by_error_rule,
    assert_same_bits,
    dtype_id,
    image_batch,
    rerun_on_instruction_set,
    small_resnet,
)
from torch import nn
from torchvision.models import resnet
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet import backends, functional
from fused_resnet.layers.description import Norm, Sums
from fused_resnet.measure.clock import kept_bytes
from fused_resnet.models import cifar_resnet
from fused_resnet.modules import buffers
from fused_resnet.testing import assert_error_rule, relative_error

MEMORY = ["normal", "low"]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.quick
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_statistics_far_from_zero(dtype, memory_format):
    """A mean of 1e4 beside a deviation of 1 costs no digits of the variance."""
    mean = 1e4 if dtype in (torch.float32, torch.float64) else 1e2
    for shape in [(4, 33, 17, 19), (2, 3, 40, 70), (64, 20, 1, 1), (5, 130, 3, 2)]:
        x = (torch.randn(shape, dtype=torch.float64) + mean).to(dtype)
        x = x.to(memory_format=memory_format)
        x[0, 1] = 0  # as if one image were blank
        mean_, var = torch.ops.fused_resnet.batch_statistics(x)
        expected_var, expected_mean = torch.var_mean(x.double(), (0, 2, 3), unbiased=False)
        assert mean_.dtype == var.dtype == accumulation_dtype(dtype)
        unit = torch.finfo(var.dtype).eps
        assert_each_close(mean_, expected_mean, 16 * unit)
        # A shift that is far from the other 63 values of a piece costs a factor of 64, in sums that
        # are right to some units. What is left of float64 is what is left of the reference too.
        assert_each_close(var, expected_var, 256 * unit if unit > 1e-10 else 1e-10)


def assert_each_close(actual, expected, tolerance):
    """Every channel by itself: one of a large variance must not hide the others."""
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=0)


@pytest.mark.quick
@pytest.mark.parametrize("layout", ["expanded", "sliced", "other format"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradients_of_any_strides(activation, layout):
    """Of the output's gradient, the input and the residual, in float64 against torch."""
    shape = (3, 10, 6, 5)
    x, z, grad = torch.randn(3, *shape, dtype=torch.float64).unbind(0)
    if layout == "expanded":
        grad = grad[:, :1, :1].expand(shape)
    elif layout == "sliced":
        x, z, grad = (t.repeat_interleave(2, 3)[..., ::2] for t in (x, z, grad))
    else:
        grad = grad.to(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 10, dtype=torch.float64).unbind(0)
    results = []
    for fused in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (weight, bias)]
        leaves += [t.detach().requires_grad_() for t in (x, z)]
        if fused:
            out = functional.batch_norm_act(
                leaves[2], None, None, *leaves[:2], True, residual=leaves[3], activation=activation
            )
        else:
            out = F.batch_norm(leaves[2], None, None, *leaves[:2], True) + leaves[3]
            out = out.relu() if activation == "relu" else out
        results.append(torch.autograd.grad(out, leaves, grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.quick
@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_gradients_of_parts_of_a_batch(backend, activation, residual, dtype, memory_format):
    """The passes of the backward by themselves, on two parts of a batch, against all of it."""
    chosen = backends.choose(backend.device)
    shape, eps = (5, 21, 6, 7), 1e-5
    x, z, grad = (
        t.to(backend.device, memory_format=memory_format)
        for t in torch.randn(3, *shape, dtype=dtype).unbind(0)
    )
    weight, bias = torch.randn(2, 21, dtype=dtype, device=backend.device).unbind(0)
    x[:2] += 3  # so that a part's own statistics are others
    leaves = [t.double().clone().requires_grad_() for t in (x, weight, bias, z)]
    expected = F.batch_norm(leaves[0], None, None, *leaves[1:3], True, 0.0, eps)
    expected = expected + leaves[3] if residual else expected
    expected = expected.relu() if activation == "relu" else expected
    expected = torch.autograd.grad(expected, leaves, grad.double(), allow_unused=True)

    var, mean = torch.var_mean(x, (0, 2, 3), unbiased=False)
    norm = Norm(mean, var, weight, bias, eps)
    flat = (*norm, activation)
    parts = []
    for part in (slice(0, 2), slice(2, 5)):
        output = functional.batch_norm_act(
            x[part], mean, var, weight, bias, False, 0.0, eps,
            residual=z[part] if residual else None, activation=activation,
        )  # fmt: skip
        parts.append((grad[part], x[part], output if residual else None))
    count = x.numel() // 21
    if chosen.has_norm_kernels:
        found = [chosen.batch_norm_act_backward_sums(*part, norm, activation) for part in parts]
    else:  # the reference runs where a backend has none
        reference = fused_resnet.reference
        found = [reference.batch_norm_act_backward_sums(*part, *flat) for part in parts]
    total, dot = map(sum, zip(*found, strict=True))
    if chosen.has_norm_kernels:
        sums = (norm, activation, Sums(total, dot, count), residual)
        found = [chosen.batch_norm_act_backward_input(*part, *sums) for part in parts]
    else:
        sums = (*flat, total, dot, count, residual)
        found = [reference.batch_norm_act_backward_input(*part, *sums) for part in parts]
    inputs, residuals = zip(*found, strict=True)
    tolerance = 1e-4 if dtype is torch.float32 else 1e-9
    close = functools.partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
    close(torch.cat(inputs).double(), expected[0])
    close((dot * (var + eps).rsqrt()).double(), expected[1])
    close(total.double(), expected[2])
    if residual:
        close(torch.cat(residuals).double(), expected[3])
    assert_same_bits(grad, torch.cat([part[0] for part in parts]))


@pytest.mark.parametrize("memory_format", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=dtype_id)
def test_bits_do_not_depend_on_threads(dtype, memory_format):
    x = torch.randn(5, 70, 33, 31, dtype=dtype).to(memory_format=memory_format)
    grad = torch.randn_like(x)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        weight = torch.linspace(0.5, 1.5, 70, dtype=dtype).requires_grad_()
        bias = torch.linspace(-1, 1, 70, dtype=dtype).requires_grad_()
        out = functional.batch_norm_act(leaf, None, None, weight, bias, True)
        out.backward(grad)
        results.append([out.detach(), leaf.grad, weight.grad, bias.grad])
    for other in results[1:]:
        for ours, first in zip(other, results[0], strict=True):
            assert_same_bits(ours, first)


@pytest.mark.parametrize("isa", ["avx2", "none"])
@pytest.mark.ahead(
    lambda isa: rerun_on_instruction_set(isa, __file__, "far_from_zero or a_block_by_itself")
)
def test_other_instruction_sets(isa, ahead):
    ahead()


def set_parameters(block, names):
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))


TRAINED = {
    "all": [""],
    "last convolution": ["conv2.weight"],
    "projection": ["downsample"],
    "norms": ["bn", "downsample.1"],
    "first norm": ["bn1"],
    "nothing but the input": ["nothing"],
}


def make_block(block, projection=True, dtype=torch.float64):
    downsample = None
    if projection:
        downsample = nn.Sequential(
            resnet.conv1x1(12, 4 * block.expansion, 2), nn.BatchNorm2d(4 * block.expansion)
        )
    width = 12 if projection else 4 * block.expansion
    made = block(width, 4, 2 if projection else 1, downsample).to(dtype).train()
    x = torch.randn(3, width, 7, 6, dtype=dtype).to(memory_format=torch.channels_last)
    return fused_resnet.testing.randomize_(made), x


def block_results(block, x, create_graph=False, input_grad=True):
    """Output, gradients and buffers of a block."""
    leaf = x.clone().requires_grad_(input_grad)
    block.zero_grad()
    out = block(leaf)
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).cos()
    loss = (out * weights).sum()
    if create_graph and loss.requires_grad:
        leaves = [t for t in (leaf, *block.parameters()) if t.requires_grad]
        loss = sum(g.square().sum() for g in torch.autograd.grad(loss, leaves, create_graph=True))
    if loss.requires_grad:
        loss.backward()
    # A second derivative that is zero may be missing.
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in (leaf, *block.parameters())]
    return [out.detach(), *grads, *(b.double() for b in block.buffers())]


@pytest.mark.quick
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_by_itself(name, trained, memory):
    """In float64, with all and with some gradients asked for, twice and once differentiated."""
    for projection in (True, False):
        eager, x = make_block(BLOCKS[name], projection)
        set_parameters(eager, TRAINED[trained])
        fused = fused_resnet.fuse(copy.deepcopy(eager), memory=memory)
        for input_grad in (True, False):
            for create_graph in (False, True):
                theirs = block_results(eager, x, create_graph, input_grad)
                ours = block_results(fused, x, create_graph, input_grad)
                assert len(ours) == len(theirs)
                for a, b in zip(ours, theirs, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_against_finite_differences(name):
    block, x = make_block(BLOCKS[name])
    fused_resnet.fuse(block, memory="low")
    names = [n for n, _ in block.named_parameters()]

    def evaluate(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    leaves = [x[:2, :, :4, :4], *block.parameters()]
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(evaluate, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(evaluate, leaves, fast_mode=True)


def kept_by(model, x):
    """What is kept for backward, parameters, buffers and the input left out, in bytes."""
    return kept_bytes(lambda: model(x), (*model.parameters(), *model.buffers(), x))


@pytest.mark.quick
def test_what_a_block_keeps():
    """In units of the block's width: raw outputs and the block's own."""
    for name, memory, expected in [
        ("basic", "normal", 3),
        ("bottleneck", "normal", 10),
        ("bottleneck", "low", 6),
    ]:
        block, x = make_block(BLOCKS[name], projection=False, dtype=torch.float32)
        x = x.repeat(4, 1, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
        kept = kept_by(fused_resnet.fuse(block, memory=memory), x)
        unit = x.numel() // x.size(1) * 4 * 4
        assert expected <= kept / unit < expected + 0.1, (name, memory)


@pytest.mark.quick
def test_what_a_stem_keeps():
    """The raw output; the pooled one belongs to what follows."""
    model = fused_resnet.fuse(small_resnet()).train()
    model.layer1 = model.layer2 = model.layer3 = model.layer4 = nn.Identity()
    model.avgpool = model.fc = nn.Identity()
    x = image_batch(4, 64)
    kept = kept_by(model, x)
    raw = 4 * 64 * 32 * 32 * 4
    assert raw <= kept < 1.02 * raw


def freeze(block, kind):
    """Running statistics: of batch norms in eval mode, or of `FrozenBatchNorm2d`."""
    if kind == "eval mode":
        return block.eval()
    norms = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.BatchNorm2d)]
    for name, norm in norms:
        frozen = FrozenBatchNorm2d(norm.num_features).to(norm.weight.dtype)
        frozen.load_state_dict(norm.state_dict())
        block.set_submodule(name, frozen)
    return block


@pytest.mark.quick
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("kind", ["eval mode", "frozen"])
@pytest.mark.parametrize("name", BLOCKS)
def test_what_frozen_statistics_keep(name, kind, projection):
    """Each rectified output and nothing else, whether or not weight and bias of norms are trained.

    Eager keeps the raw outputs too if the norms are batch norms, and as much if they are frozen:
    then the raw ones, by which a weight's gradient would be multiplied, are not needed.
    """
    block, x = make_block(BLOCKS[name], projection, dtype=torch.float32)
    freeze(block, kind)
    x = x.repeat(4, 1, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    fused = fused_resnet.fuse(copy.deepcopy(block))
    outputs = []
    for module in (block.conv1, block.conv2, getattr(block, "conv3", None)):
        if module is not None:
            module.register_forward_hook(lambda _, __, out: outputs.append(out.nbytes))
    eager_kept = kept_by(block, x)
    for trained in (True, False):
        for parameter in (p for n, p in fused.named_parameters() if "conv" not in n):
            parameter.requires_grad_(trained)
        kept = kept_by(fused, x)
        assert kept == sum(outputs)
    assert kept < 0.6 * eager_kept if kind == "eval mode" else kept <= eager_kept


@pytest.mark.quick
@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("kind", ["eval mode", "frozen"])
@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_with_frozen_statistics(name, kind, trained):
    """Of everything that requires one, in float64; the buffers stay what they are."""
    eager, x = make_block(BLOCKS[name])
    freeze(eager, kind)
    set_parameters(eager, TRAINED[trained])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    before = [b.clone() for b in fused.buffers()]
    for create_graph in (False, True):
        theirs = block_results(eager, x, create_graph)
        ours = block_results(fused, x, create_graph)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    for buffer, old in zip(fused.buffers(), before, strict=True):
        assert_same_bits(buffer, old)


@pytest.mark.parametrize(
    ("dtype", "memory"), [(torch.float16, "normal"), (torch.bfloat16, "low")], ids=dtype_id
)
def test_autocast_with_a_gradient_scaler(dtype, memory):
    """Accumulated gradients, a step that overflows and is skipped, and steps that are taken."""
    eager = fused_resnet.testing.randomize_(cifar_resnet(8, shortcut="B")).train()
    models = {
        "exact": copy.deepcopy(eager).double(),
        "fused": fused_resnet.fuse(copy.deepcopy(eager), memory=memory),
        "eager": eager,
    }
    before = torch.nn.utils.parameters_to_vector(eager.parameters()).detach().double()
    updates, scales = {}, {}
    for name, model in models.items():
        low = name != "exact"
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=low)
        scales[name] = []
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                x = image_batch(16, 8, model.fc.weight.dtype, seed=2 * step + part)
                with torch.autocast("cpu", dtype, enabled=low):
                    loss = F.cross_entropy(model(x), torch.arange(16) % 10)
                scaler.scale(loss).backward()
            if low and step == 1:
                model.conv1.weight.grad[0, 0, 0, 0] = math.inf
            if low or step != 1:
                scaler.step(optimizer)
            scaler.update()
            scales[name].append(scaler.get_scale())
        assert all(p.grad.dtype is p.dtype for p in model.parameters())
        updates[name] = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - before
    assert scales["fused"] == scales["eager"] == [2.0**10, 2.0**9, 2.0**9]
    errors = {n: relative_error(updates[n], updates["exact"]) for n in ("fused", "eager")}
    assert errors["fused"] <= 1.5 * errors["eager"] < 0.5


@pytest.mark.pairs
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.single
def test_a_network_by_the_error_rule(name, dtype, memory):
    eager = small_resnet(BLOCKS[name], layers=2).to(dtype).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager), memory=memory)
    assert_gradients_by_error_rule(fused, eager, image_batch(4, 48, dtype))


@pytest.mark.quick
@pytest.mark.parametrize("memory", MEMORY)
@pytest.mark.parametrize("name", BLOCKS)
def test_autocast_of_a_block(name, memory):
    eager, x = make_block(BLOCKS[name], dtype=torch.float32)
    fused = fused_resnet.fuse(copy.deepcopy(eager), memory=memory)
    exact = block_results(copy.deepcopy(eager).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs, ours = block_results(eager, x), block_results(fused, x)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
    # Gradients in 16 bits, of few values, scatter: the error rule is for the output.
    assert_error_rule(ours[0], theirs[0], exact[0])


@pytest.mark.parametrize("memory", MEMORY)
def test_checkpoint_and_accumulation(memory):
    block, x = make_block(BLOCKS["bottleneck"])
    fused_resnet.fuse(block, memory=memory)
    checkpoint = functools.partial(
        torch.utils.checkpoint.checkpoint, block, use_reentrant=False, preserve_rng_state=False
    )
    gradients = []
    for run, times in ((block, 1), (checkpoint, 1), (block, 2)):
        block.zero_grad()
        for _ in range(times):
            run(x).square().sum().backward()
        gradients.append([p.grad / times for p in block.parameters()])
    for others in gradients[1:]:
        for ours, plain in zip(others, gradients[0], strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.quick
def test_a_changed_tensor_is_noticed():
    """Backward refuses to compute with an input or an output that is not what it was."""
    for change in ("input", "output", "weight"):
        block, x = make_block(BLOCKS["basic"])
        fused_resnet.fuse(block)
        leaf = x.clone().requires_grad_()
        inner = leaf * 1
        out = block(inner)
        with torch.no_grad():
            {"input": inner, "output": out, "weight": block.conv2.weight}[change].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


@pytest.mark.quick
def test_memory_argument():
    """It is a property of the block that copies and pickles keep, and `unfuse` takes back."""
    model = small_resnet()
    before = [dict(vars(m)) for m in model.modules()]
    fused_resnet.fuse(model, memory="low")
    assert copy.deepcopy(model).layer1[0].memory == "low"
    fused_resnet.fuse(model)
    assert model.layer1[0].memory == "normal"
    fused_resnet.unfuse(fused_resnet.fuse(model, memory="low"))
    assert [vars(m).keys() for m in model.modules()] == [v.keys() for v in before]
    with pytest.raises(ValueError, match="memory is 'least'"):
        fused_resnet.fuse(model, memory="least")


@pytest.mark.quick
def test_norms_that_are_alike_are_updated_together(monkeypatch):
    """Five launches a block on a GPU, not four a norm."""
    eager, x = make_block(BLOCKS["bottleneck"])
    fused, calls = fused_resnet.fuse(eager), []
    for name in ("_foreach_add_", "_foreach_mul", "_foreach_mul_"):
        function = getattr(torch, name)

        def counted(*arguments, n=name, f=function, **keywords):
            calls.append((n, len(arguments[0])))
            return f(*arguments, **keywords)

        monkeypatch.setattr(torch, name, counted)
    fused(x)
    count, factors = ("_foreach_add_", 4), ("_foreach_mul", 4)
    share, old, sums = ("_foreach_mul", 8), ("_foreach_mul_", 8), ("_foreach_add_", 8)
    assert calls == [count, factors, old, share, sums]


@pytest.mark.quick
def test_running_statistics_are_rounded_as_eager_rounds_them(monkeypatch):
    """Together or one by one: the bits of `F.batch_norm`, of means that are the same."""
    generator = torch.Generator().manual_seed(0)
    norms = [nn.BatchNorm2d(512, momentum=0.3) for _ in range(2)]
    for norm in norms:
        norm.running_mean.copy_(torch.randn(512, generator=generator))
    one_by_one, eager = copy.deepcopy(norms), copy.deepcopy(norms)
    # Two equal values have an exact mean and variance.
    values = torch.randn(2, 512, 1, 1, generator=generator)
    statistics = []
    for norm, value in zip(eager, values, strict=True):
        norm(torch.stack([value, value]))
        statistics.append((value.flatten(), torch.zeros(512), None))
    counts = [2] * 2
    buffers.count_batches(norms, counts, statistics)
    with monkeypatch.context() as patch:
        patch.setattr(buffers, "_count_together", lambda *_: False)
        buffers.count_batches(one_by_one, counts, statistics)
    for found in (norms, one_by_one):
        for ours, theirs in zip(found, eager, strict=True):
            assert_same_bits(ours.running_mean, theirs.running_mean)
            assert_same_bits(ours.running_var, theirs.running_var)


@pytest.mark.quick
@pytest.mark.parametrize("momentum", [None, 0.0, 0.3, 1.0, (0.3, None), (0.1, 0.3)], ids=str)
@pytest.mark.parametrize("without", ["", "running statistics", "training"])
def test_running_statistics_of_a_block(momentum, without):
    """Of norms that are alike, which are updated together, and of those that are not."""
    eager, x = make_block(BLOCKS["bottleneck"])
    first, last = momentum if isinstance(momentum, tuple) else (momentum, momentum)
    eager.bn1.momentum = eager.downsample[1].momentum = first
    eager.bn2.momentum = eager.bn3.momentum = last
    if without == "running statistics":
        eager.bn3.track_running_stats = False
        eager.bn3.running_mean = eager.bn3.running_var = eager.bn3.num_batches_tracked = None
    elif without == "training":
        eager.bn1.eval()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    for step in range(3):
        for block in (eager, fused):
            block(x + step)
    for (name, ours), theirs in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)
