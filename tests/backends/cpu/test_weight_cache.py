"""Packed weights and the CPU backend's memory: unseen writes, threads, forks, deletion."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from support import BLOCKS, assert_same_bits, double_copy, image_batch, run_python, small_resnet
from support.threads import run_in_threads
from torch import nn
from torchvision.models import resnet18
from typer.testing import CliRunner

import fused_resnet
from fused_resnet import cli
from fused_resnet.backends import cpu
from fused_resnet.functional import conv_bn_act
from fused_resnet.layers import watch
from fused_resnet.testing import assert_error_rule


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


def convolve(conv, weight, x):
    """A convolution with a norm that does nothing."""
    zeros, ones = torch.zeros(weight.size(0)), torch.ones(weight.size(0))
    return conv_bn_act(
        x, weight, zeros, ones, stride=conv.stride, padding=conv.padding, groups=conv.groups
    )


def reference(x, weight):
    zeros, ones = x.new_zeros(weight.size(0)), x.new_ones(weight.size(0))
    return F.relu(F.batch_norm(F.conv2d(x, weight), zeros, ones))


def at_random(values):
    """One value in a hundred, anywhere."""
    return torch.randperm(values.numel())[: max(1, values.numel() // 100)]


def together(values):
    """One in a hundred, which lie together."""
    count = max(1, values.numel() // 100)
    first = int(torch.randint(values.numel() - count, ()))
    return torch.arange(first, first + count)


def evenly_spaced(values):
    """Every hundredth."""
    return torch.arange(int(torch.randint(100, ())), values.numel(), 100)


@pytest.mark.quick
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("where", [at_random, together, evenly_spaced])
def test_one_percent_is_noticed_within_20_calls(where, layout):
    """In every layer of a ResNet-18; by chance a layer is missed once in a million times."""
    torch.manual_seed(5)
    for conv in convolutions(resnet18()):
        weight = nn.Parameter(conv.weight.detach().to(memory_format=layout))
        x = torch.randn(1, weight.size(1), 4, 4)
        with torch.no_grad():
            convolve(conv, weight, x)
            version = weight._version
            flat = weight.data.view(-1) if layout is torch.contiguous_format else None
            if flat is None:
                flat = weight.data.permute(0, 2, 3, 1).view(-1)
            flat[where(flat)] += 1.0
            assert weight._version == version
            expected = convolve(conv, nn.Parameter(weight.detach().clone()), x)
            assert any(torch.equal(convolve(conv, weight, x), expected) for _ in range(20))


def change_one_value(model):
    for conv in convolutions(model):
        conv.weight.data[-1, -1, -1, -1] += 3.0


def assert_follows(model, x):
    """The next call has the bits of a fresh copy's, after one value of each weight changed."""
    with torch.no_grad():
        before = model(x)
        change_one_value(model)
        after = model(x)
        assert not torch.equal(before, after), "the update changed nothing"
        fresh = fused_resnet.fuse(fused_resnet.unfuse(copy.deepcopy(model)))
        assert_same_bits(after, fresh(x))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def with_new_parameters(model):
    for conv in convolutions(model):
        conv.weight = nn.Parameter(conv.weight.detach() * 1.5)
    return model


def loaded(model):
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)
    return model


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "torch.save": saved,
    "to": lambda model: model.double().float(),
    "new parameters": with_new_parameters,
    "load_state_dict": loaded,
}


@pytest.mark.quick
@pytest.mark.parametrize("change", COPIES)
def test_watching_all_values_of_a_model(change):
    """`fuse(model, watch="full")`: a single value is seen at once, in copies of the model, too."""
    model = fused_resnet.fuse(small_resnet(BLOCKS["basic"]), watch="full")
    x = image_batch(1, 32)
    with torch.no_grad():
        model(x)
    model = COPIES[change](model)
    assert_follows(model, x)
    assert_follows(model, x)


def test_watching_begins_and_ends():
    """It may be asked for later, and ends with another `fuse` or with `unfuse`."""
    model = fused_resnet.fuse(small_resnet(BLOCKS["basic"]))
    x = image_batch(1, 32)
    weight = model.layer1[0].conv1.weight

    def watched():
        with torch.no_grad():
            model(x)
        return cpu.weights.cache.find(weight).whole

    assert not watched()
    fused_resnet.fuse(model, watch="full")
    assert watched()
    assert_follows(model, x)
    fused_resnet.fuse(model)
    assert not watched()
    fused_resnet.fuse(model, watch="FULL")
    assert watched()
    fused_resnet.unfuse(model)
    assert not any("watch" in vars(module) for module in model.modules())
    fused_resnet.fuse(model)
    assert not watched()


@pytest.mark.ahead(
    lambda: run_python(
        """
        import os, torch, fused_resnet, support
        torch.set_num_threads(1)
        model = fused_resnet.fuse(support.small_resnet(support.BLOCKS["basic"]))
        x = support.image_batch(1, 32)
        model.share_memory()
        with torch.no_grad():
            before = model(x)
        if (child := os.fork()) == 0:
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.weight.data[-1, -1, -1, -1] += 3.0
            os._exit(0)
        os.waitpid(child, 0)
        with torch.no_grad():
            after = model(x)
            fused_resnet.backends.release(model.parameters())
            print(torch.equal(before, after), torch.equal(after, model(x)))
        """
    )
)
def test_what_is_shared_is_compared_whole(ahead):
    """Another process changes one value of each weight, in memory both have."""
    assert ahead().split() == ["False", "True"]


@pytest.mark.ahead(
    lambda: run_python(
        """
        import torch, fused_resnet, support
        model = fused_resnet.fuse(support.small_resnet(support.BLOCKS["basic"]))
        x = support.image_batch(1, 32)
        with torch.no_grad():
            model(x)
            for module in model.modules():
                if isinstance(module, torch.nn.Conv2d):
                    module.weight.data[-1, -1, -1, -1] += 3.0
            after = model(x)
            fused_resnet.backends.release(model.parameters())
            print(torch.equal(after, model(x)))
        """,
        FUSED_RESNET_WATCH="Full",
    )
)
def test_the_environment_watches_every_model(ahead):
    assert ahead().strip() == "True"


def test_unknown_choices_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="fuse: watch is 'some', must be one of sample, full"):
        fused_resnet.fuse(small_resnet(BLOCKS["basic"]), watch="some")
    monkeypatch.setattr(watch, "_from_environment", None)
    monkeypatch.setenv("FUSED_RESNET_WATCH", "half")
    message = "FUSED_RESNET_WATCH is 'half', must be one of sample, full"
    weight = nn.Parameter(torch.randn(8, 8, 3, 3))
    with pytest.raises(ValueError, match=message):
        conv_bn_act(torch.randn(1, 8, 4, 4), weight, torch.zeros(8), torch.ones(8))
    assert message in " ".join(CliRunner().invoke(cli.app, ["doctor"]).output.split())


@pytest.mark.parametrize("choice", ["sample", "full"])
def test_doctor_says_what_is_compared(monkeypatch, choice):
    monkeypatch.setattr(watch, "_from_environment", None)
    monkeypatch.setenv("FUSED_RESNET_WATCH", choice)
    assert f"FUSED_RESNET_WATCH {choice}, forced; {choice}: every call" in " ".join(
        CliRunner().invoke(cli.app, ["doctor"]).output.split()
    )


@pytest.mark.quick
def test_swapped_tensors():
    """`torch.utils.swap_tensors` refuses a tensor that has weak references."""
    weight = nn.Parameter(torch.randn(16, 8, 3, 3))
    other = nn.Parameter(torch.randn(16, 8, 3, 3))
    conv, x = nn.Conv2d(8, 16, 3), torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        first, second = convolve(conv, weight, x), convolve(conv, other, x)
        torch.utils.swap_tensors(weight, other)
        assert_same_bits(convolve(conv, weight, x), second)
        assert_same_bits(convolve(conv, other, x), first)


@pytest.mark.parametrize("change", ["double", "bfloat16", "load_state_dict"])
def test_conversions_that_swap(change):
    eager = small_resnet(BLOCKS["basic"])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    other = copy.deepcopy(eager)
    for parameter in other.parameters():
        parameter.data.mul_(1.25)
    x = image_batch(1, 32)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for model in (eager, fused):
            with torch.no_grad():
                model(x)
            identities = [id(p) for p in model.parameters()]
            if change == "load_state_dict":
                model.load_state_dict(other.state_dict())
            else:
                model.to(getattr(torch, change))
            assert [id(p) for p in model.parameters()] == identities
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    x = x.to(eager.conv1.weight.dtype)
    with torch.no_grad():
        exact = double_copy(eager)(x.double())
        if change == "double":
            torch.testing.assert_close(fused(x), exact, rtol=1e-11, atol=1e-11)
        else:
            assert_error_rule(fused(x), eager(x), exact)


VIEWS = {
    "first half of K": lambda w: w[:16],
    "most of K": lambda w: w[:31],
    "first half of C": lambda w: w[:, :16],
    "one tap": lambda w: w[:, :, :1, :1],
    "transposed": lambda w: w.transpose(0, 1),
    "taps transposed": lambda w: w.transpose(2, 3),
    "another dtype": lambda w: w.view(torch.bfloat16)[..., ::2],
}


@pytest.mark.quick
@pytest.mark.parametrize("view", VIEWS)
def test_data_of_another_shape(view):
    """`weight.data = ` a view of what it was: same memory, same version."""
    weight = nn.Parameter(torch.randn(32, 32, 3, 3))
    conv, x = nn.Conv2d(32, 32, 3), torch.randn(1, 32, 6, 6)
    with torch.no_grad():
        convolve(conv, weight, x)
        data = VIEWS[view](weight.data)
        if data.dtype is torch.bfloat16:
            data = data.nan_to_num_(0, 0, 0).clamp_(-1, 1)
        weight.data = data
        x = x[:, : weight.size(1)].to(weight.dtype)
        actual, eager = convolve(conv, weight, x), reference(x, weight)
        exact = reference(x.double(), weight.double())
    assert actual.shape == exact.shape
    assert_error_rule(actual, eager, exact)


def test_threads_after_an_unseen_write():
    """Six threads at once find a weight changed; none may read what another is writing."""
    torch.manual_seed(0)
    x = torch.randn(1, 256, 3, 3)
    conv = nn.Conv2d(256, 256, 3, padding=1)
    weight = nn.Parameter(torch.randn(256, 256, 3, 3))
    with torch.no_grad():
        expected = [convolve(conv, nn.Parameter(sign * weight.detach()), x) for sign in (1, -1)]
        convolve(conv, weight, x)

    @torch.no_grad()
    def work(_):
        torch.set_num_threads(1)
        return convolve(conv, weight, x)

    wrong = 0
    for attempt in range(150):
        weight.data.mul_(-1)
        right = expected[(attempt + 1) % 2]
        wrong += sum(not torch.equal(out, right) for out in run_in_threads(work, 6))
    assert not wrong


@pytest.mark.ahead(
    lambda: run_python(
        """
        import os, signal, threading, time, torch, fused_resnet
        torch.set_num_threads(1)
        like = torch.empty(100)
        stop = False
        def allocate():
            while not stop:
                torch.ops.fused_resnet.pool_empty_like(like)
        threads = [threading.Thread(target=allocate, daemon=True) for _ in range(3)]
        [t.start() for t in threads]
        weight, x = torch.nn.Parameter(torch.randn(8, 8, 3, 3)), torch.randn(1, 8, 4, 4)
        arguments = (x, weight, torch.zeros(8), torch.ones(8))
        right = fused_resnet.functional.conv_bn_act(*arguments).detach()
        hangs = wrong = 0
        for _ in range(40):
            if (child := os.fork()) == 0:
                signal.alarm(20)
                fused_resnet.backends.cpu.empty_cache()
                same = torch.equal(fused_resnet.functional.conv_bn_act(*arguments), right)
                os._exit(0 if same else 1)
            _, status = os.waitpid(child, 0)
            hangs += os.WIFSIGNALED(status)
            wrong += not os.WIFSIGNALED(status) and status != 0
            if hangs:
                break
        stop = True
        [t.join() for t in threads]
        print(hangs, wrong)
        """
    )
)
def test_forks_while_threads_allocate(ahead):
    """A child may use the library, whatever lock a thread of its parent held."""
    assert ahead().split() == ["0", "0"]


@pytest.mark.parametrize("padding", [2**31 - 1, 2**30])
@pytest.mark.ahead(
    lambda padding: run_python(
        f"""
        import torch, fused_resnet
        one = torch.ones(1)
        live = torch.ops.fused_resnet.cpu_pool_statistics()[0]
        try:
            fused_resnet.functional.conv_bn_act(
                torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), one, one, padding={padding}
            )
        except (RuntimeError, ValueError, MemoryError) as error:
            print("refused")
        assert torch.ops.fused_resnet.cpu_pool_statistics()[0] - live < 10000
        """,
        timeout=60,
    )
)
def test_an_output_larger_than_memory(padding, ahead):
    """Refused at once; a size that overflowed was searched for without an end."""
    assert ahead().strip() == "refused"


def test_scratch_memory_is_given_back():
    """What a far dilation needs of it, tens of megabytes a thread, is not kept by the threads."""
    x = torch.randn(1, 64, 32, 32).to(memory_format=torch.channels_last)
    weight = nn.Parameter(torch.randn(64, 64, 3, 3))
    cpu.empty_cache()
    live = torch.ops.fused_resnet.cpu_pool_statistics()[0]
    with torch.no_grad():
        out = conv_bn_act(x, weight, torch.zeros(64), torch.ones(64), padding=300, dilation=300)
    assert out.shape == x.shape
    del out
    after, cached, _ = torch.ops.fused_resnet.cpu_pool_statistics()
    assert after - live < 2 << 20
    assert cached > 10 << 20, "there was no large scratch memory, so this tested nothing"
    cpu.empty_cache()
    after, cached, _ = torch.ops.fused_resnet.cpu_pool_statistics()
    assert (after, cached) == (live, 0) or after < live


@pytest.mark.parametrize("end", ["del", "meta"])
@pytest.mark.ahead(
    lambda end: run_python(
        f"""
        import ctypes, gc, torch, fused_resnet, torchvision
        def resident():
            # What malloc keeps of freed memory, a matter of its fragments, is not what is asked.
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 >> 20
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            warm = fused_resnet.fuse(torchvision.models.resnet18().eval())
            warm(x)
            del warm
            gc.collect()
            model = fused_resnet.fuse(torchvision.models.resnet18().eval())
            before = resident()
            model(x)
            packed = resident()
            if {end!r} == "del":
                del model
            else:
                model.to("meta")
        gc.collect()
        print(len(fused_resnet.backends.cpu.weights.cache), packed - before, packed - resident())
        """
    )
)
def test_a_dead_models_memory_goes_back(end, ahead):
    """The packed weights, 40 MB, return to the system with the weights."""
    entries, packed, freed = map(int, ahead().split())
    assert entries == 0
    assert packed > 30
    assert freed > packed + 30, "the weights and their packed copies are about 43 MB each"


def resized_with_each_choice():
    """Without the pool, with it, and what is said of another choice."""
    code = """
        import hashlib, torch, fused_resnet, support
        torch.manual_seed(0)
        model = fused_resnet.fuse(support.small_resnet(support.BLOCKS["basic"]))
        model.fc = torch.nn.Identity()
        with torch.no_grad():
            out = model.layer1(torch.randn(1, 64, 8, 8, generator=torch.manual_seed(3)))
        print(hashlib.sha256(out.clone().numpy().tobytes()).hexdigest())
        try:
            out.resize_(out.numel() * 2)
            print("resized")
        except RuntimeError:
            print("refused")
        """
    wrong = """
        import torch, fused_resnet
        try:
            torch.ops.fused_resnet.pool_empty_like(torch.empty(3))
        except RuntimeError as error:
            print(error)
        """
    choices = ((code, "0"), (code, "1"), (wrong, "no"))
    return [run_python(what, FUSED_RESNET_CPU_POOL=choice) for what, choice in choices]


@pytest.mark.ahead(lambda: resized_with_each_choice())
def test_outputs_can_be_resized_without_the_pool(ahead):
    """FUSED_RESNET_CPU_POOL=0: outputs in torch's own memory, with the same bits."""
    own, pooled, message = ahead()
    assert own.split() == [pooled.split()[0], "resized"]
    assert "FUSED_RESNET_CPU_POOL is 'no', must be 0 or 1" in message
