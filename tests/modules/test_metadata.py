"""Inputs whose classes carry metadata: the class and metadata of eager's output, computed fused."""

import copy

import pytest
import torch
from support import BLOCKS, double_copy, image_batch, small_resnet
from torch import Tensor, nn
from torchvision import tv_tensors

import fused_resnet
from fused_resnet.modules import metadata, run
from fused_resnet.testing import assert_error_rule


class Bare(Tensor):
    """No override: torch keeps the class of every result."""


class Meta(Tensor):
    """Hands a label on from operation to operation, as MONAI's `MetaTensor` does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        calls.append(function)
        out = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(out, Meta):
            out.label = next((a.label for a in args if isinstance(a, Meta)), None)
        return out


calls: list = []


@pytest.fixture
def known():
    """`Meta`, known to carry metadata."""
    fused_resnet.carries_metadata(Meta)
    yield
    metadata._registered.discard(Meta)
    metadata._is_carrier.cache_clear()


@pytest.fixture
def unfused(monkeypatch):
    """The classes of modules that ran as they did before `fuse`."""
    ran = []
    original = run.run_unfused

    def look(module, x, method="forward"):
        out = metadata.run_on_values(module, x, method)
        if out is None:
            ran.append(type(module).__name__)
            return original(module, x, method)
        return out

    monkeypatch.setattr(run, "run_unfused", look)
    return ran


def labelled(x):
    x = x.as_subclass(Meta)
    x.label = "scan 7"
    return x


INPUTS = {
    "tv_tensors.Image": tv_tensors.Image,
    "tv_tensors.Mask": tv_tensors.Mask,
    "no override": lambda x: x.as_subclass(Bare),
    "registered": labelled,
}


@pytest.mark.quick
@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.single
def test_they_run_fused_and_keep_their_class(block, kind, unfused):
    eager = small_resnet(BLOCKS[block])
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    x = image_batch(2, 40)
    given = INPUTS[kind](x)
    with torch.inference_mode():
        for path in ("", "layer1.0"):
            ours, theirs = (model.get_submodule(path) for model in (fused, eager))
            read = given if not path else INPUTS[kind](torch.randn(2, 64, 8, 8))
            expected = theirs(read)
            for _ in range(3):  # the modules' way, the pass that makes a plan, the plan
                out = ours(read)
                assert type(out) is type(expected)
                assert getattr(out, "label", None) == getattr(expected, "label", None)
                values = read.as_subclass(Tensor)
                exact = double_copy(eager).get_submodule(path)(values.double())
                assert_error_rule(out.as_subclass(Tensor), expected.as_subclass(Tensor), exact)
    assert unfused == []


@pytest.mark.usefixtures("known")
@pytest.mark.parametrize("kind", INPUTS)
def test_training(kind, unfused):
    results = []
    x = image_batch(3, 40).double()
    eager = small_resnet(stages=2).double().train()
    for model in (eager, fused_resnet.fuse(copy.deepcopy(eager))):
        read = x.clone().requires_grad_()
        out = model(INPUTS[kind](read) if kind != "tv_tensors.Mask" else tv_tensors.Image(read))
        out.square().sum().backward()
        results.append((type(out), [p.grad for p in model.parameters()]))
    (theirs_type, theirs), (ours_type, ours) = results
    assert ours_type is theirs_type
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-7, atol=1e-9)
    assert unfused == []


def test_one_call_for_a_whole_network(known):
    fused = fused_resnet.fuse(small_resnet())
    calls.clear()
    with torch.inference_mode():
        fused(labelled(image_batch(2, 40)))
    assert sum(getattr(call, "__name__", "") == "fused" for call in calls) == 1
    assert not any(getattr(call, "__name__", "") == "conv2d" for call in calls)


def test_others_see_every_operation(unfused):
    """What nobody said only carries metadata may do anything."""
    fused = fused_resnet.fuse(small_resnet())
    calls.clear()
    with torch.inference_mode():
        fused(labelled(image_batch(2, 40)))
    assert sum(getattr(call, "__name__", "") == "conv2d" for call in calls) == 17
    assert unfused[0] == "Bottleneck"


def test_a_subclass_with_its_own_override_is_another_matter(known):
    class Louder(Meta):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            heard.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    heard = []
    fused = fused_resnet.fuse(small_resnet())
    x = image_batch(2, 40).as_subclass(Louder)
    x.label = "scan 8"
    with torch.inference_mode():
        assert fused(x).label == "scan 8"
    assert sum(getattr(call, "__name__", "") == "conv2d" for call in heard) == 17


def test_hooks_and_foreign_modules_inside_get_the_class(known):
    """What eager hands them, they are handed; the blocks around them run fused."""
    seen = []

    class Reads(nn.Module):
        def forward(self, x):
            seen.append(x.label)
            return x

    with torch.inference_mode():
        fused = fused_resnet.fuse(small_resnet())
        handle = fused.layer2.register_forward_hook(lambda m, a, out: seen.append(out.label))
        fused(labelled(image_batch(2, 40)))
        handle.remove()
        fused.avgpool = nn.Sequential(Reads(), fused.avgpool)
        fused(labelled(image_batch(2, 40)))
    assert seen == ["scan 7", "scan 7"]


def test_eight_bits(known):
    """A quantized model computes what it computes of a plain input."""
    fused = fused_resnet.fuse(small_resnet())
    x = image_batch(4, 40)
    fused_resnet.quantize(fused, [x])
    with torch.inference_mode():
        out = fused(labelled(x))
        assert out.label == "scan 7"
        assert torch.equal(out.as_subclass(Tensor), fused(x))


def test_only_tensors_can_be_said_to():
    for what in (int, "Image", nn.Module):
        with pytest.raises(TypeError, match=r"carries_metadata: .* no subclass of torch\.Tensor"):
            fused_resnet.carries_metadata(what)


@pytest.mark.parametrize("library", ["monai", "fastai"])
def test_libraries(library, unfused):
    """The classes themselves, where they are installed."""
    pytest.importorskip(library)
    if library == "monai":
        from monai.data import MetaTensor

        x = MetaTensor(image_batch(2, 40), affine=torch.eye(4), meta={"name": "scan 9"})
    else:
        from fastai.vision.core import TensorImage

        x = TensorImage(image_batch(2, 40))
        x.img_name = "scan 9"
    eager = small_resnet()
    fused = fused_resnet.fuse(copy.deepcopy(eager))
    with torch.inference_mode():
        ours, theirs = fused(x), eager(x)
    assert type(ours) is type(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    assert getattr(ours, "meta", None) == getattr(theirs, "meta", None)
    values = [t.as_subclass(Tensor) for t in (ours, theirs, x)]
    assert_error_rule(*values[:2], double_copy(eager)(values[2].double()))
    assert unfused == []
