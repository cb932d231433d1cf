"""Accuracy: a network trained on scikit-learn's digits, in floating point and in eight bits."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_resnet
from fused_resnet.models import cifar_resnet


@functools.cache
def digits():
    """Images (N, 1, 8, 8) and labels: 1437 to train with, 360 to test."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8)
    images = (images - images.mean()) / images.std()
    labels = torch.tensor(labels)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[360:], order[:360]
    return images[train], labels[train], images[test], labels[test]


def trained(depth, epochs, shortcut):
    """A network fused and trained with Nesterov's momentum, one cycle."""
    torch.manual_seed(0)
    images, labels, _, _ = digits()
    model = fused_resnet.fuse(cifar_resnet(depth, shortcut=shortcut, in_channels=1))
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * -(-len(labels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    for _ in range(epochs):
        for indices in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[indices]), labels[indices]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def evaluated(model):
    """Logits of the test images, and the share that is right in percent."""
    _, _, images, labels = digits()
    with torch.no_grad():
        logits = model(images)
    return logits, 100 * (logits.argmax(1) == labels).double().mean().item()


def check(model, observers):
    images, _, _, _ = digits()
    plain, accuracy = evaluated(model)
    assert accuracy > 95
    for observer in observers:
        fused_resnet.quantize(model, images[:256].split(64), observer=observer)
        logits, in_eight_bits = evaluated(model)
        assert not torch.equal(logits, plain)
        assert in_eight_bits >= accuracy - 0.5, observer
        assert (logits.argmax(1) == plain.argmax(1)).double().mean() > 0.99
    # With ranges of other activations it is not so: what was calibrated is what counts.
    fused_resnet.quantize(model, [nn.functional.relu(images[:64]) * 1e-3], min_sqnr_db=0)
    _, without = evaluated(model)
    assert without < accuracy - 5


def test_digits():
    """Three blocks with projections, all of them in eight bits."""
    check(trained(8, 3, "B"), ["minmax", "mse"])


@pytest.mark.whole
@pytest.mark.parametrize("shortcut", ["A", "B"])
def test_digits_with_a_resnet20(shortcut):
    check(trained(20, 8, shortcut), ["minmax", "percentile", "mse", "histogram"])
