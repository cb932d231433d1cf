"""Blocks named, built and computing as classes of other libraries do, written for the tests.

Where the libraries are installed, their own classes are tested too: see
`tests/modules/test_other_libraries.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# transformers ------------------------------------------------------------------------------------


class ResNetConvLayer(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int = 3, stride: int = 1, act=nn.ReLU):
        super().__init__()
        self.convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
        self.normalization = nn.BatchNorm2d(outside)
        self.activation = act()

    def forward(self, input: Tensor) -> Tensor:
        return self.activation(self.normalization(self.convolution(input)))


class ResNetShortCut(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.convolution = nn.Conv2d(inside, outside, 1, stride, bias=False)
        self.normalization = nn.BatchNorm2d(outside)

    def forward(self, input: Tensor) -> Tensor:
        return self.normalization(self.convolution(input))


class ResNetEmbeddings(nn.Module):
    """The stem."""

    def __init__(self, outside: int):
        super().__init__()
        self.embedder = ResNetConvLayer(3, outside, 7, 2)
        self.pooler = nn.MaxPool2d(3, 2, 1)
        self.num_channels = 3

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError("channels")
        return self.pooler(self.embedder(pixel_values))


class ResNetBasicLayer(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else ResNetShortCut(inside, outside, stride)
        self.layer = nn.Sequential(
            ResNetConvLayer(inside, outside, stride=stride),
            ResNetConvLayer(outside, outside, act=nn.Identity),
        )
        self.activation = nn.ReLU()

    def forward(self, hidden_state: Tensor) -> Tensor:
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class ResNetBottleNeckLayer(nn.Module):
    """With the stride in the first convolution as in the paper, or in the second."""

    def __init__(self, inside: int, outside: int, stride: int = 1, first: bool = False):
        super().__init__()
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else ResNetShortCut(inside, outside, stride)
        self.layer = nn.Sequential(
            ResNetConvLayer(inside, outside // 4, 1, stride if first else 1),
            ResNetConvLayer(outside // 4, outside // 4, 3, 1 if first else stride),
            ResNetConvLayer(outside // 4, outside, 1, act=nn.Identity),
        )
        self.activation = nn.ReLU()

    forward = ResNetBasicLayer.forward


class RTDetrResNetShortCut(ResNetShortCut):
    pass


class RTDetrResNetConvLayer(ResNetConvLayer):
    pass


class RTDetrResNetBasicLayer(nn.Module):
    """With a pool before the projection."""

    def __init__(self, inside: int, outside: int):
        super().__init__()
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2, 2, 0, ceil_mode=True), RTDetrResNetShortCut(inside, outside, 1)
        )
        self.layer = nn.Sequential(
            RTDetrResNetConvLayer(inside, outside, stride=2),
            RTDetrResNetConvLayer(outside, outside, act=nn.Identity),
        )
        self.activation = nn.ReLU()

    forward = ResNetBasicLayer.forward


class RegNetSELayer(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.pooler = nn.AdaptiveAvgPool2d(1)
        self.attention = nn.Sequential(
            nn.Conv2d(channels, 4, 1), nn.ReLU(), nn.Conv2d(4, channels, 1), nn.Sigmoid()
        )

    def forward(self, hidden_state: Tensor) -> Tensor:
        return hidden_state * self.attention(self.pooler(hidden_state))


class RegNetYLayer(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        same = inside == outside and stride == 1
        self.shortcut = nn.Identity() if same else ResNetShortCut(inside, outside, stride)
        self.layer = nn.Sequential(
            ResNetConvLayer(inside, outside, 1),
            ResNetConvLayer(outside, outside, 3, stride),
            RegNetSELayer(outside),
            ResNetConvLayer(outside, outside, 1, act=nn.Identity),
        )
        self.activation = nn.ReLU()

    forward = ResNetBasicLayer.forward


class DetrFrozenBatchNorm2d(nn.Module):
    """With its epsilon in the forward pass."""

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        scale = weight * (self.running_var.reshape(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (bias - self.running_mean.reshape(1, -1, 1, 1) * scale)


# open_clip ----------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """CLIP's, which pools instead of a stride."""

    def __init__(self, inside: int, planes: int, stride: int = 1):
        super().__init__()
        outside = planes * 4
        self.conv1 = nn.Conv2d(inside, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.act2 = nn.ReLU(inplace=True)
        self.avgpool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.conv3 = nn.Conv2d(planes, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.act3 = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(inside, outside, 1, bias=False),
                nn.BatchNorm2d(outside),
            )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.act2(self.bn2(self.conv2(out)))
        out = self.avgpool(out)
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.act3(out)


class ModifiedResNet(nn.Module):
    def __init__(self, width: int = 16):
        super().__init__()
        for i, (inside, outside) in enumerate([(3, 8), (8, 8), (8, width)], 1):
            stride = 2 if i == 1 else 1
            setattr(self, f"conv{i}", nn.Conv2d(inside, outside, 3, stride, 1, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(outside))
            setattr(self, f"act{i}", nn.ReLU(inplace=True))
        self.avgpool = nn.AvgPool2d(2)
        self.layer1 = nn.Sequential(Bottleneck(width, 8), Bottleneck(32, 8))
        self.layer2 = nn.Sequential(Bottleneck(32, 16, 2))

    def stem(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.act2(self.bn2(self.conv2(x)))
        x = self.act3(self.bn3(self.conv3(x)))
        return self.avgpool(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.layer1(self.stem(x)))


# MONAI --------------------------------------------------------------------------------------------


class ResNetBottleneck(nn.Module):
    def __init__(self, inside: int, planes: int, stride: int = 1):
        super().__init__()
        outside = planes * 4
        self.conv1 = nn.Conv2d(inside, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.act = nn.ReLU(inplace=True)
        self.downsample = None
        if stride > 1 or inside != outside:
            self.downsample = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.act(out)


class Convolution(nn.Sequential):
    """MONAI's, whose norm and activation are a Sequential of their own."""

    def __init__(self, inside: int, outside: int, kernel: int = 3, act: bool = True):
        super().__init__()
        self.add_module("conv", nn.Conv2d(inside, outside, kernel, padding=kernel // 2))
        adn = [("N", nn.BatchNorm2d(outside))] + ([("A", nn.ReLU())] if act else [])
        self.add_module("adn", nn.Sequential())
        for name, module in adn:
            self.adn.add_module(name, module)


class SEBottleneck(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = Convolution(channels, channels // 2, 1)
        self.conv2 = Convolution(channels // 2, channels, 3)
        self.conv3 = Convolution(channels, channels, 1, act=False)
        self.se_layer = RegNetSELayer(channels)
        self.project = None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x if self.project is None else self.project(x)
        x = self.se_layer(self.conv3(self.conv2(self.conv1(x))))
        x += residual
        return self.act(x)


# fastai -------------------------------------------------------------------------------------------


class ConvLayer(nn.Sequential):
    def __init__(
        self, inside: int, outside: int, kernel: int = 3, stride: int = 1, act: bool = True
    ):
        layers = [
            nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outside),
        ]
        super().__init__(*layers, *([nn.ReLU()] if act else []))


class ResBlock(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.convpath = nn.Sequential(
            ConvLayer(inside, outside, stride=stride), ConvLayer(outside, outside, act=False)
        )
        idpath = [ConvLayer(inside, outside, 1, act=False)] if inside != outside else []
        if stride != 1:
            idpath.insert(0, nn.AvgPool2d(stride, ceil_mode=True))
        self.idpath = nn.Sequential(*idpath)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.convpath(x) + self.idpath(x))


# torchvision's GoogLeNet --------------------------------------------------------------------------


class BasicConv2d(nn.Module):
    def __init__(self, inside: int, outside: int, **arguments):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, bias=False, **arguments)
        self.bn = nn.BatchNorm2d(outside, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


# transformers' RT-DETR, beside the backbone -------------------------------------------------------


class RTDetrV2ConvNormLayer(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int, act: type[nn.Module] = nn.Identity):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.activation = act()

    def forward(self, hidden_state: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(hidden_state)))


class RTDetrV2RepVggBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = RTDetrV2ConvNormLayer(channels, channels, 3)
        self.conv2 = RTDetrV2ConvNormLayer(channels, channels, 1)
        self.activation = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv1(x) + self.conv2(x))


# pytorchcv ----------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """Without attributes for what it does not do."""

    def __init__(self, inside: int, outside: int, kernel: int, stride: int = 1, act: bool = True):
        super().__init__()
        self.use_pad, self.activate = kernel == 3, act
        if self.use_pad:
            self.pad = nn.ZeroPad2d((1, 1, 1, 1))
        self.conv = nn.Conv2d(inside, outside, kernel, stride, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        if act:
            self.activ = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.use_pad:
            x = self.pad(x)
        x = self.bn(self.conv(x))
        return self.activ(x) if self.activate else x


class ResBottleneck(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = ConvBlock(inside, outside // 4, 1)
        self.conv2 = ConvBlock(outside // 4, outside // 4, 3, stride)
        self.conv3 = ConvBlock(outside // 4, outside, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(self.conv2(self.conv1(x)))


class ResUnit(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.resize_identity = inside != outside or stride != 1
        self.body = ResBottleneck(inside, outside, stride)
        if self.resize_identity:
            self.identity_conv = ConvBlock(inside, outside, 1, stride, act=False)
        self.activ = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.identity_conv(x) if self.resize_identity else x
        return self.activ(self.body(x) + identity)


# lightly and pretrainedmodels ---------------------------------------------------------------------


class BasicBlock(nn.Module):
    """lightly's."""

    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class SEResNetBottleneck(nn.Module):
    """pretrainedmodels'."""

    def __init__(self, inside: int, planes: int):
        super().__init__()
        outside = planes * 4
        self.conv1 = nn.Conv2d(inside, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, outside, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.se_module = RegNetSELayer(outside)
        self.downsample = nn.Sequential(
            nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(self.se_module(out) + self.downsample(x))


# timm: forward passes of several arguments, and of a list -----------------------------------------


class DlaBasic(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)

    def forward(
        self, x: Tensor, shortcut: Tensor | None = None, children: list[Tensor] | None = None
    ) -> Tensor:
        if shortcut is None:
            shortcut = x
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += shortcut
        return self.relu(out)


class DlaRoot(nn.Module):
    def __init__(self, inside: int, outside: int, shortcut: bool):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 1, bias=False)
        self.bn = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut

    def forward(self, x_children: list[Tensor]) -> Tensor:
        x = self.bn(self.conv(torch.cat(x_children, 1)))
        if self.shortcut:
            x += x_children[0]
        return self.relu(x)


class DlaTree(nn.Module):
    def __init__(self, inside: int, outside: int, shortcut: bool):
        super().__init__()
        self.downsample = nn.MaxPool2d(2, 2)
        self.project = nn.Sequential(
            nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside)
        )
        self.tree1 = DlaBasic(inside, outside, 2)
        self.tree2 = DlaBasic(outside, outside)
        self.root = DlaRoot(2 * outside + inside, outside, shortcut)

    def forward(self, x: Tensor) -> Tensor:
        bottom = self.downsample(x)
        x1 = self.tree1(x, self.project(bottom))
        return self.root([self.tree2(x1, None, [bottom]), x1, bottom])


class DenseLayer(nn.Module):
    def __init__(self, inside: int):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inside), nn.ReLU()
        self.conv1 = nn.Conv2d(inside, 32, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(32), nn.ReLU()
        self.conv2 = nn.Conv2d(32, 8, 3, padding=1, bias=False)

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        x = torch.cat([x] if isinstance(x, Tensor) else x, 1)
        return self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))


class DenseBlock(nn.ModuleDict):
    def __init__(self, inside: int):
        super().__init__({f"{i}": DenseLayer(inside + 8 * i) for i in range(2)})

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


# Networks of 3-channel images.
NETWORKS = {
    "transformers ResNet": lambda: nn.Sequential(
        ResNetEmbeddings(16),
        ResNetBottleNeckLayer(16, 32),
        ResNetBottleNeckLayer(32, 32),
        ResNetBottleNeckLayer(32, 64, 2),
        ResNetBottleNeckLayer(64, 96, 2, first=True),
        ResNetBasicLayer(96, 96),
        ResNetBasicLayer(96, 64, 2),
    ),
    "transformers RT-DETR": lambda: nn.Sequential(
        ResNetConvLayer(3, 16), RTDetrResNetBasicLayer(16, 32)
    ),
    "transformers RegNet": lambda: nn.Sequential(
        ResNetConvLayer(3, 16, 3, 2), RegNetYLayer(16, 32, 2), RegNetYLayer(32, 32)
    ),
    "open_clip": lambda: ModifiedResNet(),
    "monai ResNet": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        ResNetBottleneck(16, 8), ResNetBottleneck(32, 8), ResNetBottleneck(32, 16, 2),
    ),
    "monai SEResNet": lambda: nn.Sequential(Convolution(3, 16), SEBottleneck(16)),
    "fastai": lambda: nn.Sequential(
        ConvLayer(3, 16, stride=2), ConvLayer(16, 16), nn.MaxPool2d(3, 2, 1),
        ResBlock(16, 16), ResBlock(16, 32, 2),
    ),
    "googlenet": lambda: nn.Sequential(
        BasicConv2d(3, 16, kernel_size=7, stride=2, padding=3), nn.MaxPool2d(3, 2),
        BasicConv2d(16, 24, kernel_size=1),
    ),
    "transformers RT-DETR's encoder": lambda: nn.Sequential(
        RTDetrV2ConvNormLayer(3, 16, 3, nn.SiLU), RTDetrV2RepVggBlock(16)
    ),
    "pytorchcv": lambda: nn.Sequential(
        ConvBlock(3, 16, 3, 2), ResUnit(16, 16), ResUnit(16, 32, 2)
    ),
    "lightly, pretrainedmodels": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), BasicBlock(16, 24, 2), BasicBlock(24, 24),
        SEResNetBottleneck(24, 8),
    ),
    "timm DLA": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), DlaTree(16, 24, False), DlaTree(24, 32, True)
    ),
    "timm DenseNet": lambda: nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), DenseBlock(16)
    ),
}  # fmt: skip
