"""What counts operations sees those of a fused model: torch's profiler, and libraries' modes."""

import collections
import copy
import functools

import pytest
import torch
from support import BLOCKS, assert_same_bits, image_batch, small_resnet
from torch.utils._python_dispatch import TorchDispatchMode

import fused_resnet
from fused_resnet import functional
from fused_resnet.layers import counting

COUNTED = ("aten::conv2d", "aten::addmm")


def counted(run):
    """The operations that the profiler counts in one call, and how many events they are in."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_flops=True) as profile:
        run()
    events = [event for event in profile.events() if event.name in COUNTED]
    return sum(event.flops for event in events), len(events)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_profiler_counts_every_pass(block):
    """Through the modules, while a plan is made, and of the plan."""
    eager = small_resnet(BLOCKS[block])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with torch.inference_mode():
        expected = counted(lambda: eager(x))
        assert expected[0] > 1e7
        for _ in range(4):
            assert counted(lambda: fused(x)) == expected


def test_a_plan_made_without_a_profiler_is_counted():
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with torch.inference_mode():
        for _ in range(3):
            fused(x)
        assert counted(lambda: fused(x)) == counted(lambda: eager(x))


def test_blocks_and_functions_by_themselves():
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with torch.inference_mode():
        features = eager.maxpool(eager.relu(eager.bn1(eager.conv1(x))))
        for path in ("layer1", "layer1.0"):
            found, expected = (
                counted(functools.partial(model.get_submodule(path), features))
                for model in (fused, eager)
            )
            assert found == expected
        conv, norm = eager.conv1, eager.bn1
        arguments = (x, conv.weight, norm.running_mean, norm.running_var)
        found = counted(lambda: functional.conv_bn_act(*arguments, stride=2, padding=3))
        assert found == counted(lambda: conv(x))
        groups = torch.randn(64, 1, 3, 3)
        depthwise = (features, groups, *[torch.ones(64)] * 2)
        found = counted(lambda: functional.conv_bn_act(*depthwise, padding=1, groups=64))
        assert found == counted(lambda: torch.conv2d(features, groups, padding=1, groups=64))


def test_training_is_counted_as_eager_is():
    eager = small_resnet(stages=2).train()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    assert counted(lambda: fused(x)) == counted(lambda: eager(x))


def test_nothing_is_marked_where_nobody_counts(monkeypatch):
    fused = fused_resnet.fuse(small_resnet())
    x = image_batch(2, 40)

    def fail(operators):
        raise AssertionError("marked")

    with torch.inference_mode():
        for _ in range(2):  # the second pass makes the plan, with what is to be marked
            fused(x)
        monkeypatch.setattr(counting, "mark", fail)
        fused(x)
        fused.layer1(torch.randn(1, 64, 8, 8))


class _Counter(TorchDispatchMode):
    """Counts convolutions by torch's name for them, as ptflops does."""

    def __init__(self):
        super().__init__()
        self.seen = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen[operator.namespace, operator.overloadpacket.__name__] += 1
        return operator(*args, **(kwargs or {}))


def test_a_mode_that_counts_torchs_operators(monkeypatch):
    """Known by its package; any other sees what runs."""
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    with torch.inference_mode():
        expected = eager(x)
        with _Counter() as other:
            fused(x)
        assert any(namespace == "fused_resnet" for namespace, _ in other.seen)
        monkeypatch.setattr(_Counter, "__module__", "ptflops.aten_engine")
        with _Counter() as ours:
            out = fused(x)
        with _Counter() as theirs:
            eager(x)
    assert_same_bits(out, expected)
    assert ours.seen == theirs.seen
    assert sum(count for (_, name), count in ours.seen.items() if "conv" in name) == 17


def test_ptflops():
    """The library itself."""
    ptflops = pytest.importorskip("ptflops")
    found = [
        ptflops.get_model_complexity_info(
            model, (3, 64, 64), as_strings=False, backend="aten", print_per_layer_stat=False
        )[0]
        for model in (small_resnet(), fused_resnet.fuse(small_resnet()))
    ]
    assert found[0] == found[1] > 1e7
