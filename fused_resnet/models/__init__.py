"""Networks that torchvision does not have, defined without anything fused; `fuse` knows them."""

from .cifar import cifar_resnet

__all__ = ["cifar_resnet"]
