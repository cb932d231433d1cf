"""Residual networks with activation before the convolutions ("ResNet v2").

He et al., "Identity Mappings in Deep Residual Networks", figure 4 (e), where every unit computes

    h      = relu(bn1(x))
    output = conv2(relu(bn2(conv1(h)))) + x

and a Bottleneck has a third norm, ReLU and convolution before the add. Where shapes change the
shortcut is a 1x1 convolution of h. Everything is defined here without anything fused.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.models.resnet import conv1x1, conv3x3

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BLOCKS |= {152: (3, 8, 36, 3), 200: (3, 24, 36, 3)}


class PreActBasicBlock(nn.Module):
    """Two 3x3 convolutions, each behind its norm and ReLU, and the shortcut.

    Args:
        in_channels: of the input.
        channels: of both convolutions.
        stride: of the first convolution and of the shortcut.
    """

    expansion = 1

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, channels, stride)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        h = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(h)
        h = self.relu(self.bn2(self.conv1(h)))
        return self.conv2(h) + shortcut


class PreActBottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution, each behind its norm and ReLU, and the shortcut.

    Args:
        in_channels: of the input.
        channels: of the 3x3 convolution; the output has four times as many.
        stride: of the 3x3 convolution and of the shortcut.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv1x1(in_channels, channels)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = conv3x3(channels, channels, stride)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv3 = conv1x1(channels, out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 channels, H / stride, W / stride)."""
        h = self.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(h)
        h = self.relu(self.bn2(self.conv1(h)))
        h = self.relu(self.bn3(self.conv2(h)))
        return self.conv3(h) + shortcut


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return conv1x1(in_channels, out_channels, stride)


class PreActResNet(nn.Module):
    """See `preact_resnet`.

    Args:
        block: `PreActBasicBlock` or `PreActBottleneck`.
        layers: how many blocks each of the four stages has.
        num_classes: how many logits an image gets.
    """

    def __init__(
        self,
        block: type[PreActBasicBlock] | type[PreActBottleneck],
        layers: tuple[int, int, int, int],
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages, channels = [], 64
        for index, count in enumerate(layers):
            width, stage = 64 << index, []
            for position in range(count):
                stage.append(block(channels, width, 2 if index > 0 and position == 0 else 1))
                channels = width * block.expansion
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.bn = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, num_classes)."""
        x = self.maxpool(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.relu(self.bn(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def preact_resnet(depth: int, num_classes: int = 1000) -> PreActResNet:
    """A pre-activation residual network for images of ImageNet's size, with nothing fused.

    Its first convolution has neither norm nor activation, since the first block begins with them.

    Args:
        depth: 18, 34, 50, 101, 152 or 200; from 50 on with `PreActBottleneck`.
        num_classes: how many logits an image gets.

    Returns:
        A module that takes (N, 3, H, W) to (N, num_classes).

    Raises:
        ValueError: `depth` is none of the above.
    """
    if depth not in BLOCKS:
        raise ValueError(
            f"preact_resnet: depth is {depth!r}, must be one of {', '.join(map(str, BLOCKS))}"
        )
    block = PreActBasicBlock if depth < 50 else PreActBottleneck
    return PreActResNet(block, BLOCKS[depth], num_classes)
