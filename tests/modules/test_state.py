"""Parameters that change between calls: a fused model never answers with yesterday's weights."""

import copy
import threading

import numpy as np
import pytest
import torch
from support import (
    BLOCKS,
    ConvShape,
    assert_same_bits,
    assert_within_bound,
    double_copy,
    dtype_id,
    image_batch,
    make_conv_case,
    run_python,
    small_resnet,
)
from support.threads import run_in_threads
from torch import nn

import fused_resnet
from fused_resnet.testing import assert_error_rule, randomize_


def weights(model):
    return [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]


def step(model, optimizer):
    """One optimizer step on gradients the parameters themselves define."""
    for parameter in model.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()


def reassign_data(model):
    for weight in weights(model):
        weight.data = weight.data * 1.25


def swap_data(model):
    """What EMA and weight-averaging helpers do: exchange storages, and back."""
    for weight in weights(model):
        other = torch.full_like(weight, 0.01)
        weight.data, other = other, weight.data


def new_parameters(model):
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.weight = nn.Parameter(module.weight.detach() * 1.5)


def to_vector_and_back(model):
    """`vector_to_parameters` makes every parameter a view of one vector."""
    vector = nn.utils.parameters_to_vector(model.parameters()) * 1.25
    nn.utils.vector_to_parameters(vector, model.parameters())


def changed_state(model):
    return {n: t * 1.25 if t.is_floating_point() else t + 1 for n, t in model.state_dict().items()}


def through_numpy(model):
    """A write torch cannot see: through memory that numpy shares."""
    for weight in weights(model):
        array = weight.detach().numpy()
        array *= np.float32(1.25)


def through_a_view(model):
    for weight in weights(model):
        weight.detach().view(-1)[::3].mul_(2.0)


def one_element(model):
    """The least visible change: one weight of one filter."""
    with torch.no_grad():
        for weight in weights(model):
            weight[-1, -1, -1, -1] += 0.5


def one_element_of_data(model):
    """The same through `.data`, which leaves no trace in the version counter."""
    for weight in weights(model):
        weight.data[0, 0, 0, 0] += 0.5


def train_for_a_step(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(image_batch(4, 32, seed=9).to(model.conv1.weight.dtype)).sum().backward()
    optimizer.step()
    model.zero_grad()
    model.eval()


def update_statistics(model):
    """Forward passes in train mode change nothing but buffers."""
    model.train()
    with torch.no_grad():
        model(image_batch(4, 32, seed=9).to(model.conv1.weight.dtype))
    model.eval()


UPDATES = {
    "add_": lambda m: [w.detach().add_(0.01) for w in weights(m)],
    "data.mul_": lambda m: [w.data.mul_(1.25) for w in weights(m)],
    "data.copy_": lambda m: [w.data.copy_(w.data.flip(0)) for w in weights(m)],
    "data = new": reassign_data,
    "data swapped": swap_data,
    "new parameters": new_parameters,
    "foreach": lambda m: torch._foreach_mul_([w.detach() for w in weights(m)], 1.25),
    "numpy": through_numpy,
    "view": through_a_view,
    "one element": one_element,
    "one element of data": one_element_of_data,
    "init": lambda m: [nn.init.kaiming_normal_(w) for w in weights(m)],
    "randomize": lambda m: randomize_(m, seed=99),
    "vector": to_vector_and_back,
    "SGD": lambda m: step(m, torch.optim.SGD(m.parameters(), lr=0.5)),
    "Adam": lambda m: step(m, torch.optim.Adam(m.parameters(), lr=0.01)),
    "Adam foreach": lambda m: step(m, torch.optim.Adam(m.parameters(), lr=0.01, foreach=True)),
    "Adam fused": lambda m: step(m, torch.optim.Adam(m.parameters(), lr=0.01, fused=True)),
    "load_state_dict": lambda m: m.load_state_dict(changed_state(m)),
    "load_state_dict assign": lambda m: m.load_state_dict(changed_state(m), assign=True),
    "load_state_dict of a part": lambda m: m.layer1[0].conv2.load_state_dict(
        {"weight": m.layer1[0].conv2.weight.detach() * 2}
    ),
    "bn weight": lambda m: [b.weight.data.mul_(1.5) for b in norms(m)],
    "bn bias": lambda m: [b.bias.detach().add_(0.5) for b in norms(m)],
    "running_mean": lambda m: [b.running_mean.add_(0.5) for b in norms(m)],
    "running_var": lambda m: [b.running_var.mul_(2.0) for b in norms(m)],
    "running statistics by training": update_statistics,
    "reset_running_stats": lambda m: [b.reset_running_stats() for b in norms(m)],
    "new buffers": lambda m: [setattr(b, "running_var", b.running_var * 2) for b in norms(m)],
    "eps": lambda m: [setattr(b, "eps", 0.3) for b in norms(m)],
    "training step": train_for_a_step,
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "apply": lambda m: m._apply(lambda t: t * 1.25 if t.is_floating_point() else t),
    "there and back": lambda m: m.double().float(),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "transposed storage": lambda m: [
        setattr(w, "data", w.data.transpose(0, 1).contiguous().transpose(0, 1)) for w in weights(m)
    ],
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("gradients", ["inference_mode", "no_grad", "grad"])
@pytest.mark.parametrize("update", UPDATES)
def test_updates_between_calls(update, gradients):
    """After every kind of update: what a fresh copy gives, bit for bit, and what eager gives."""
    eager = small_resnet(stages=2)
    watch = "full" if update == "one element of data" else "sample"
    fused = fused_resnet.fuse(copy.deepcopy(eager), watch=watch)
    x = image_batch(2, 40)
    context = {
        "inference_mode": torch.inference_mode,
        "no_grad": torch.no_grad,
        "grad": torch.enable_grad,
    }[gradients]
    for attempt in range(2):
        with context():
            before = fused(x).clone()
            fused(x)
        for model in (fused, eager):
            torch.manual_seed(8)
            UPDATES[update](model)
        eager.load_state_dict(fused.state_dict())
        for ours, theirs in zip(norms(fused), norms(eager), strict=True):
            theirs.eps = ours.eps
        x = x.to(fused.conv1.weight.dtype)
        with context():
            after = fused(x)
            fresh = fused_resnet.fuse(copy.deepcopy(eager))(x)
            expected = eager(x)
        invisible = {"channels_last", "there and back", "transposed storage", "share_memory"}
        if attempt == 0 and update not in invisible:
            assert not torch.equal(before.to(after.dtype), after), "the update changed nothing"
        if update not in ("channels_last", "transposed storage"):
            assert_same_bits(after, fresh, "a fresh copy of the model")
        reference = double_copy(eager)(x.double())
        if after.dtype == torch.float64:
            torch.testing.assert_close(after, reference, rtol=1e-11, atol=1e-11)
        else:
            assert_error_rule(after.detach(), expected.detach(), reference.detach())


@pytest.mark.quick
@pytest.mark.parametrize("update", ["add_", "data.mul_", "data = new", "SGD", "load_state_dict"])
def test_updates_between_calls_quick(update):
    test_updates_between_calls(update, "no_grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=dtype_id)
@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "to dtype", "to format", "cpu"])
@pytest.mark.single
def test_conversions(change, dtype):
    """The fused model after a conversion equals a fused copy of the converted model."""
    conversions = {
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "double": lambda m: m.double(),
        "to dtype": lambda m: m.to(torch.float32),
        "to format": lambda m: m.to(memory_format=torch.channels_last),
        "cpu": lambda m: m.cpu(),
    }
    eager = small_resnet().to(dtype)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with torch.no_grad():
        fused(image_batch(2, 40, dtype))
        fused = conversions[change](fused)
        eager = conversions[change](eager)
        x = image_batch(2, 40, eager.conv1.weight.dtype)
        expected, reference = eager(x), double_copy(eager)(x.double())
        actual = fused(x)
    assert actual.dtype == expected.dtype
    for name, tensor in fused.state_dict().items():
        assert tensor.dtype == eager.state_dict()[name].dtype
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, reference, rtol=1e-12, atol=1e-12)
    else:
        assert_error_rule(actual, expected, reference)


@pytest.mark.single
def test_mixed_precision_by_hand(backend):
    """Half-precision convolutions with float32 norms, as apex and others keep them."""
    eager = small_resnet().bfloat16().to(backend.device)
    for module in norms(eager):
        module.float()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40, torch.bfloat16).to(backend.device)
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.single
def test_a_tensor_reallocated_at_the_same_address(backend, dtype):
    """A new weight where a dead one lay, with the same version: address is not identity."""
    shape = ConvShape(32, 64, (3, 3), (1, 1), (1, 1))
    case = make_conv_case(shape, dtype=dtype, device=backend.device)
    seen: dict[int, int] = {}
    reused = 0
    for seed in range(60):
        case.weight = None
        replacement = make_conv_case(shape, dtype=dtype, seed=seed, device=backend.device).weight
        case.weight = replacement.clone()
        pointer = case.weight.data_ptr()
        reused += pointer in seen
        seen[pointer] = seed
        with torch.no_grad():
            out = case.fused()
            case.fused()
        assert_within_bound(out, case.double().eager(), case.rounding_bound())
    assert reused > 5, "the allocator never reused an address, so this tested nothing"


@pytest.mark.quick
def test_a_model_reallocated_at_the_same_address():
    """Models made and dropped one after the other, with different weights."""
    x = image_batch(1, 32)
    for seed in range(6):
        eager = randomize_(small_resnet(BLOCKS["basic"]), seed)
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        with torch.no_grad():
            fused(x)
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))
        del fused, eager


def test_resized_and_restored_storage():
    """FSDP empties a parameter's storage between calls and fills it again at another time."""
    eager = small_resnet(BLOCKS["basic"])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(1, 32)
    with torch.no_grad():
        fused(x)
        for factor in (1.0, 2.0):
            for model in (eager, fused):
                for weight in weights(model):
                    values = weight.data.clone() * factor
                    storage = weight.untyped_storage()
                    size = storage.nbytes()
                    storage.resize_(0)
                    storage.resize_(size)
                    weight.data.copy_(values)
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


def test_updates_inside_inference_mode():
    """Inference tensors have no version counter at all."""
    with torch.inference_mode():
        eager = small_resnet()
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        assert fused.conv1.weight.is_inference()
        x = image_batch(2, 40)
        for _ in range(3):
            fused(x)
            assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))
            for model in (eager, fused):
                for weight in weights(model):
                    weight.mul_(1.1)
                for norm in norms(model):
                    norm.running_mean.add_(0.1)
    with torch.no_grad():
        assert_error_rule(fused(x), eager(x), double_copy(eager)(x.double()))


def test_inference_tensors_as_weights(backend):
    """Weights made under inference_mode, used outside and inside it, updated in between."""
    shape = ConvShape(32, 48, (3, 3), (1, 1), (1, 1))
    with torch.inference_mode():
        case = make_conv_case(shape, device=backend.device)
    for _ in range(3):
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_within_bound(case.fused(), case.double().eager(), case.rounding_bound())
        with torch.inference_mode():
            case.weight.neg_()
            case.bn_bias.add_(0.25)


@pytest.mark.whole_model
@pytest.mark.single
def test_functional_call(backend):
    """`torch.func.functional_call` with other parameters, in turn with the model's own."""
    eager = small_resnet().to(backend.device)
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40).to(backend.device)
    others = {n: t * 1.2 if t.is_floating_point() else t for n, t in eager.state_dict().items()}
    exact = double_copy(eager)
    with torch.no_grad():
        own = fused(x)
        for _ in range(2):
            ours = torch.func.functional_call(fused, others, (x,))
            theirs = torch.func.functional_call(eager, others, (x,))
            reference = torch.func.functional_call(
                exact,
                {n: t.double() if t.is_floating_point() else t for n, t in others.items()},
                (x.double(),),
            )
            assert_error_rule(ours, theirs, reference)
            assert_same_bits(fused(x), own, "the model's own parameters")


@pytest.mark.single
def test_averaged_model(backend):
    """Weight averaging: copies, averages in place, recomputes the statistics."""
    from torch.optim.swa_utils import AveragedModel, update_bn

    eager = small_resnet(BLOCKS["basic"]).to(backend.device)
    results = []
    for model in (eager, fused_resnet.fuse(copy.deepcopy(eager))):
        model = model.double()
        average = AveragedModel(model)
        for seed in range(2):
            average.update_parameters(model)
            with torch.no_grad():
                average(image_batch(2, 32).double().to(backend.device))
                randomize_(model, seed)
        loader = [image_batch(4, 32, seed=s).double().to(backend.device) for s in range(3)]
        update_bn(loader, average)
        average.eval()
        with torch.no_grad():
            results.append(average(loader[0]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.single
def test_threads_share_a_model(dtype):
    """Several threads, different images and sizes, one model: the bits a single thread gets."""
    model = fused_resnet.fuse(small_resnet(layers=2)).to(dtype)
    model.fc = nn.Identity()  # the library's matrix product rounds by the number of threads
    jobs = [image_batch(1 + i % 3, 32 + 8 * (i % 4), dtype, seed=i) for i in range(12)]
    with torch.inference_mode():
        expected = [model(x).clone() for x in jobs]

    def work(offset):
        torch.set_num_threads(1 + offset % 2)
        with torch.inference_mode():
            for i in range(offset, offset + 3 * len(jobs)):
                i %= len(jobs)
                assert_same_bits(model(jobs[i]), expected[i], f"job {i} in thread {offset}")

    run_in_threads(work)


def test_threads_meet_a_cold_model():
    """Threads that make a model's first call together never see half-prepared weights."""
    for seed in range(5):
        model = small_resnet(BLOCKS["basic"])
        randomize_(model, seed)
        model.eval()
        twin = fused_resnet.fuse(copy.deepcopy(model))
        fused_resnet.fuse(model)
        x = image_batch(1, 32)
        with torch.no_grad():
            expected = twin(x)

        @torch.no_grad()
        def work(_, model=model, x=x):
            return model(x)

        for out in run_in_threads(work):
            assert_same_bits(out, expected)


@pytest.mark.parametrize("change", ["in place", "through data"])
@pytest.mark.single
def test_threads_after_an_update(change):
    """An update that ended before the threads started is seen by all of them, entirely."""
    model = fused_resnet.fuse(small_resnet())
    x = image_batch(1, 32)

    @torch.no_grad()
    def work(_):
        return model(x)

    for attempt in range(8):
        with torch.no_grad():
            for weight in weights(model):
                target = weight if change == "in place" else weight.data
                target.mul_(-1.0 if attempt % 2 else 1.01)
            expected = fused_resnet.fuse(copy.deepcopy(model))(x)
        for out in run_in_threads(work):
            assert_same_bits(out, expected)


def test_results_outlive_their_thread():
    """Outputs made in a thread that ended, freed in another."""
    model = fused_resnet.fuse(small_resnet())
    x = image_batch(2, 40)
    kept = []

    def work():
        with torch.inference_mode():
            kept.extend(model(x) for _ in range(5))

    for _ in range(3):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    with torch.inference_mode():
        expected = model(x)
    for out in kept:
        assert_same_bits(out, expected)
    kept.clear()
    with torch.inference_mode():
        assert_same_bits(model(x), expected)


@pytest.mark.ahead(
    lambda: run_python(
        """
        import threading, torch, fused_resnet, support
        model = fused_resnet.fuse(support.small_resnet())
        x = support.image_batch(2, 40)
        out = []
        def work():
            with torch.inference_mode():
                out.append(model(x))
        threads = [threading.Thread(target=work) for _ in range(3)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        keep_alive = [model, model.layer1(torch.randn(1, 64, 8, 8)), out]
        print("done")
        """
    )
)
def test_the_process_ends_quietly(ahead):
    """No crash while the interpreter takes models, caches and threads apart."""
    assert ahead().strip() == "done"


@pytest.mark.ahead(
    lambda: run_python(
        """
        import copy, os, torch, fused_resnet, support
        import torch.distributed as dist
        from torch.nn.parallel import DistributedDataParallel
        torch.manual_seed(0)
        torch.set_num_threads(2)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        eager = support.small_resnet().double().train()
        fused = fused_resnet.fuse(copy.deepcopy(eager))
        grads = []
        for model in (eager, fused):
            wrapped = DistributedDataParallel(model)
            wrapped(support.image_batch(4, 32).double()).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for a, b in zip(*grads):
            scale = a.abs().max().item()
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9 * scale)
        dist.destroy_process_group()
        print("same")
        """
    )
)
def test_data_parallel_on_one_process(ahead):
    """DistributedDataParallel sees ordinary parameters and buffers."""
    assert ahead().strip() == "same"
