"""Networks that torchvision does not have, defined without anything fused; `fuse` knows them."""

from .cifar import cifar_resnet
from .preact import PreActBasicBlock, PreActBottleneck, preact_resnet
from .residual import Residual, ResidualBlock

__all__ = [
    "PreActBasicBlock",
    "PreActBottleneck",
    "Residual",
    "ResidualBlock",
    "cifar_resnet",
    "preact_resnet",
]
