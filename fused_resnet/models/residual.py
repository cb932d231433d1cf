"""Residual blocks as two widely read code bases write them, defined without anything fused.

`Residual` is the block of the book "Dive into Deep Learning", `ResidualBlock` has the options of
the one in TensorFlow's model garden. Both compute relu(bn2(conv2(relu(bn1(conv1(x))))) + shortcut).
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation, StochasticDepth


class Residual(nn.Module):
    """Two 3x3 convolutions with biases; input channels are found in the first call.

    The parameters have the names they have in the book, `conv3` being the shortcut's.

    Args:
        num_channels: of every convolution.
        use_1x1conv: whether the shortcut is a 1x1 convolution, without a norm.
        strides: of the first convolution and of the shortcut.
    """

    def __init__(self, num_channels: int, use_1x1conv: bool = False, strides: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1, stride=strides)
        self.conv2 = nn.LazyConv2d(num_channels, kernel_size=3, padding=1)
        self.conv3 = nn.LazyConv2d(num_channels, 1, stride=strides) if use_1x1conv else None
        self.bn1 = nn.LazyBatchNorm2d()
        self.bn2 = nn.LazyBatchNorm2d()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, num_channels, H / strides, W / strides)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x if self.conv3 is None else self.conv3(x)
        return self.relu(y + shortcut)


class ResidualBlock(nn.Module):
    """A residual block of two 3x3 convolutions, with the options of TensorFlow's model garden.

    Args:
        in_channels: of the input.
        filters: of both convolutions.
        strides: of the first convolution and of the shortcut.
        use_projection: whether the shortcut is a 1x1 convolution and batch norm.
        se_ratio: channels of squeeze-and-excitation's inner layer over `filters`; None for none.
            See Hu et al., "Squeeze-and-Excitation Networks".
        resnetd_shortcut: whether the projection's stride is that of a 2x2 average pooling before
            it, as He et al., "Bag of Tricks", figure 2 (c).
        stochastic_depth_drop_rate: the probability of leaving out an image's residual branch in
            training, as Huang et al., "Deep Networks with Stochastic Depth"; None for none.
        norm_momentum: the weight of the old running statistics, TensorFlow's `momentum`.
        norm_epsilon: added to the variance.

    Raises:
        ValueError: shapes change and there is no projection, or `se_ratio` or
            `stochastic_depth_drop_rate` is not between 0 and 1.
    """

    def __init__(
        self,
        in_channels: int,
        filters: int,
        strides: int = 1,
        use_projection: bool = False,
        se_ratio: float | None = None,
        resnetd_shortcut: bool = False,
        stochastic_depth_drop_rate: float | None = None,
        norm_momentum: float = 0.99,
        norm_epsilon: float = 0.001,
    ) -> None:
        if not use_projection and (strides != 1 or in_channels != filters):
            raise ValueError(
                f"ResidualBlock: {in_channels} channels become {filters} at stride {strides}, "
                "which needs use_projection"
            )
        if se_ratio is not None and not 0 < se_ratio <= 1:
            raise ValueError(f"ResidualBlock: se_ratio is {se_ratio}, must be in (0, 1]")
        rate = stochastic_depth_drop_rate
        if rate is not None and not 0 <= rate < 1:
            raise ValueError(
                f"ResidualBlock: stochastic_depth_drop_rate is {rate}, must be in [0, 1)"
            )
        super().__init__()
        norm = functools.partial(
            nn.BatchNorm2d, filters, eps=norm_epsilon, momentum=1 - norm_momentum
        )
        self.conv1 = nn.Conv2d(in_channels, filters, 3, stride=strides, padding=1, bias=False)
        self.bn1 = norm()
        self.conv2 = nn.Conv2d(filters, filters, 3, padding=1, bias=False)
        self.bn2 = norm()
        self.relu = nn.ReLU(inplace=True)
        self.squeeze_excitation = (
            None
            if se_ratio is None
            else SqueezeExcitation(filters, max(8, round(filters * se_ratio / 8) * 8))
        )
        self.stochastic_depth = None if rate is None else StochasticDepth(rate, "row")
        self.shortcut = None
        if use_projection:
            pooled = resnetd_shortcut and strides > 1
            pool = [nn.AvgPool2d(2, strides, ceil_mode=True, count_include_pad=False)]
            stride = 1 if pooled else strides
            self.shortcut = nn.Sequential(
                *(pool if pooled else []),
                nn.Conv2d(in_channels, filters, 1, stride=stride, bias=False),
                norm(),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, filters, H / strides, W / strides)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.squeeze_excitation is not None:
            y = self.squeeze_excitation(y)
        if self.stochastic_depth is not None:
            y = self.stochastic_depth(y)
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.relu(y + shortcut)
