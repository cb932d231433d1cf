"""Models built around a residual network: extractors, detection and segmentation."""

import copy

import pytest
import torch
import torchvision
from support import BLOCKS, double_copy, image_batch, small_resnet
from torchvision.models import segmentation
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import fused_resnet
from fused_resnet.testing import assert_error_rule, randomize_


def fused_copy(model):
    """A fused deep copy; all of the residual blocks in it are."""
    fused = fused_resnet.fuse(copy.deepcopy(model))
    report = fused_resnet.report(fused)
    assert len(report) >= 4
    assert all(record.fused for record in report)
    return fused


def gradients_of(model, loss):
    """By name, of the parameters that have one."""
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(fused, eager):
    """Of float64 runs, and for the same parameters: frozen ones have none."""
    assert fused.keys() == eager.keys()
    assert fused
    largest = max(gradient.abs().max().item() for gradient in eager.values())
    for name, gradient in eager.items():
        limit = 1e-8 * (gradient.abs().max().item() + 1e-3 * largest)
        torch.testing.assert_close(fused[name], gradient, rtol=0, atol=limit, msg=name)


def sum_of_squares(features):
    return sum(feature.square().sum() for feature in features.values())


DETECTORS = ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "keypointrcnn_resnet50_fpn"]


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.single
def test_backbones_of_detectors(name):
    """The feature pyramids, by the error rule."""
    with torch.device("meta"):
        model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None)
    eager = model.backbone.to_empty(device="cpu")
    torch.manual_seed(1)
    for module in eager.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    randomize_(eager, seed=3).eval()
    fused = fused_copy(eager)
    assert len(fused_resnet.report(fused)) == 17  # with the stem
    x = image_batch(1, 64)
    with torch.inference_mode():
        ours, theirs, exact = fused(x), eager(x), double_copy(eager)(x.double())
    assert ours.keys() == theirs.keys()
    for level in exact:
        assert_error_rule(ours[level], theirs[level], exact[level], what=level)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, torch.nn.BatchNorm2d])
@pytest.mark.parametrize("trainable", [0, 2, 5])
@pytest.mark.single
def test_pyramids_with_frozen_layers(norm, trainable, mode):
    """The stages below the trainable ones get no gradient, and batch norm's statistics agree."""
    torch.manual_seed(1)
    eager = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=norm, trainable_layers=trainable
    )
    eager = randomize_(eager, seed=3).double().train(mode == "train")
    fused = fused_copy(eager)
    x = image_batch(2, 64).double()
    results = []
    for model in (fused, eager):
        features = model(x)
        results.append((features, gradients_of(model, sum_of_squares(features))))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=1e-10, atol=1e-10)
    assert_same_gradients(our_gradients, their_gradients)
    assert any("body" in name for name in our_gradients) == (trainable > 0)
    for (name, buffer), expected in zip(fused.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-10, atol=1e-10, msg=name)


def test_a_detector_from_images_to_losses_and_boxes():
    torch.manual_seed(1)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet18",
        weights=None,
        norm_layer=FrozenBatchNorm2d,
        trainable_layers=3,
    )
    heads = {"box_head": TwoMLPHead(256 * 7**2, 64), "box_predictor": FastRCNNPredictor(64, 4)}
    eager = randomize_(FasterRCNN(backbone, min_size=64, max_size=96, **heads), seed=3)
    eager = eager.double().train()
    fused = fused_copy(eager)
    images = list(image_batch(2, 64).double().abs())
    boxes = torch.tensor([[4.0, 6.0, 40.0, 50.0], [20.0, 10.0, 60.0, 60.0]]).double()
    targets = [{"boxes": boxes, "labels": torch.tensor([1, 3])}] * 2
    losses, gradients = [], []
    for model in (fused, eager):
        torch.manual_seed(3)  # which boxes are looked at is drawn
        losses.append(model(images, targets))
        gradients.append(gradients_of(model, sum(losses[-1].values())))
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    assert_same_gradients(*gradients)
    with torch.no_grad():
        ours, theirs = (model.eval()(images) for model in (fused, eager))
    assert sum(len(found["boxes"]) for found in theirs) > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "name",
    [
        "fcn_resnet50",
        "deeplabv3_resnet50",
        pytest.param("deeplabv3_resnet101", marks=pytest.mark.whole),
    ],
)
@pytest.mark.single
def test_segmentation(name):
    """With the auxiliary classifier, which reads a stage in the middle."""
    torch.manual_seed(1)
    build = getattr(segmentation, name)
    eager = build(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    eager = randomize_(eager, seed=3).eval()
    fused = fused_copy(eager)
    x = image_batch(1, 40)
    with torch.inference_mode():
        ours, theirs, exact = fused(x), eager(x), double_copy(eager)(x.double())
    for output in ("out", "aux"):
        assert_error_rule(ours[output], theirs[output], exact[output], what=output)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("extractor", ["create_feature_extractor", "IntermediateLayerGetter"])
@pytest.mark.single
def test_gradients_through_extractors(extractor, block, mode):
    """With a dilated stage and the first two frozen."""
    dilation = {} if block == "basic" else {"replace_stride_with_dilation": [False, False, True]}
    eager = small_resnet(BLOCKS[block], **dilation).double().train(mode == "train")
    for part in (eager.conv1, eager.bn1, eager.layer1):
        part.requires_grad_(False)
    layers = {"layer2": "a", "layer4": "b"}
    x = image_batch(3, 48).double()
    features, gradients = [], []
    for model in (fused_copy(eager), eager):
        if extractor == "IntermediateLayerGetter":
            extracted = IntermediateLayerGetter(model, layers)
        else:
            extracted = create_feature_extractor(model, layers)
        out = extracted(x)
        features.append(dict(out))
        gradients.append(gradients_of(extracted, sum_of_squares(out)))
    torch.testing.assert_close(*features, rtol=1e-10, atol=1e-10)
    assert_same_gradients(*gradients)
    assert not any(name.startswith(("conv1", "bn1", "layer1")) for name in gradients[0])
