"""The residual networks for CIFAR-10 of "Deep Residual Learning for Image Recognition", 4.2.

    x = relu(bn(conv3x3(image)))                                  16 channels
    three stages of n blocks of two 3x3 convolutions              16, 32, 64 channels
    logits = fc(mean over the pixels)

The second and third stage begin with stride 2, so that with the first convolution and the last,
fully connected layer there are 6n + 2 layers. Everything is defined here without anything fused;
blocks with shortcuts are torchvision's `BasicBlock`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet

WIDTHS = (16, 32, 64)
SHORTCUTS = ("A", "B", "C")


class PaddedShortcut(nn.Module):
    """Option A: every `stride`-th pixel, and zeros for the channels there are more of.

    Half of the new channels come before the old ones, half behind, and of an odd number one more
    behind. There are no parameters.

    Args:
        in_channels: of the input.
        out_channels: of the output; at least as many.
        stride: between the pixels kept, in both directions.

    Raises:
        ValueError: there are fewer channels in the output.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        if out_channels < in_channels:
            raise ValueError(
                f"PaddedShortcut: out_channels is {out_channels}, must be at least in_channels, "
                f"{in_channels}"
            )
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stride = stride

    def subsampled(self, x: Tensor) -> Tensor:
        """The pixels kept, a view."""
        return x[:, :, :: self.stride, :: self.stride]

    def padded_channels(self, x: Tensor) -> int:
        """How many channels come out."""
        return x.size(1) + self.out_channels - self.in_channels

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        added = self.out_channels - self.in_channels
        return F.pad(self.subsampled(x), (0, 0, 0, 0, added // 2, added - added // 2))

    def extra_repr(self) -> str:  # noqa: D102
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}"


class PlainBlock(nn.Module):
    """Two 3x3 convolutions, each with batch norm and ReLU: a `BasicBlock` without its shortcut.

    Args:
        inplanes: channels of the input.
        planes: channels of both convolutions.
        stride: of the first convolution.
    """

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = resnet.conv3x3(inplanes, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = resnet.conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(x)))


class CifarResNet(nn.Module):
    """See `cifar_resnet`, which checks these arguments.

    Args:
        blocks: in each of the three stages.
        num_classes: as `cifar_resnet`'s, like those that follow.
        shortcut: "A", "B" or "C".
        plain: whether blocks have no shortcut.
        in_channels: of the images.
    """

    def __init__(
        self, blocks: int, num_classes: int, shortcut: str, plain: bool, in_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = resnet.conv3x3(in_channels, WIDTHS[0])
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        self.relu = nn.ReLU(inplace=True)
        stages, channels = [], WIDTHS[0]
        for index, width in enumerate(WIDTHS):
            stage = []
            for block in range(blocks):
                stride = 2 if index > 0 and block == 0 else 1
                if plain:
                    stage.append(PlainBlock(channels, width, stride))
                else:
                    downsample = _make_shortcut(shortcut, channels, width, stride)
                    stage.append(resnet.BasicBlock(channels, width, stride, downsample))
                channels = width
            stages.append(nn.Sequential(*stage))
        self.layer1, self.layer2, self.layer3 = stages
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _make_shortcut(option: str, channels: int, width: int, stride: int) -> nn.Module | None:
    changes = stride != 1 or channels != width
    if option == "C" or (option == "B" and changes):
        return nn.Sequential(resnet.conv1x1(channels, width, stride), nn.BatchNorm2d(width))
    return PaddedShortcut(channels, width, stride) if changes else None


def cifar_resnet(
    depth: int,
    num_classes: int = 10,
    shortcut: str = "A",
    plain: bool = False,
    *,
    in_channels: int = 3,
) -> CifarResNet:
    """A residual network for small images, as section 4.2 of the paper has them for CIFAR-10.

    It comes as its definition, with nothing fused; `fused_resnet.fuse(model)` makes it run fused.
    Convolutions and the last layer are initialised as in He et al., "Delving Deep into Rectifiers",
    equation 10: normal with variance 2 / (inputs of an output), biases zero.

    Args:
        depth: 6n + 2 layers; the paper has 20, 32, 44, 56, 110 and 1202.
        num_classes: how many logits an image gets.
        shortcut: where a block's input and output differ in shape, "A": every second pixel and
            zeros for the new channels, without parameters; "B": a projection, 1x1 convolution and
            batch norm; "C": a projection in every block.
        plain: whether blocks have no shortcut at all, whatever `shortcut` says.
        in_channels: of the images.

    Returns:
        A module that takes (N, in_channels, H, W) to (N, num_classes).

    Raises:
        TypeError: `depth` is not an int.
        ValueError: `depth` is not 6n + 2 with n >= 1, or `shortcut` is none of the above.
    """
    if not isinstance(depth, int):
        raise TypeError(f"cifar_resnet: depth is {depth!r}, must be an int")
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"cifar_resnet: depth is {depth}, must be 6n + 2: 8, 14, 20, 26, 32, ...")
    if shortcut not in SHORTCUTS:
        raise ValueError(f"cifar_resnet: shortcut is {shortcut!r}, must be one of A, B, C")
    return CifarResNet((depth - 2) // 6, num_classes, shortcut, plain, in_channels)
