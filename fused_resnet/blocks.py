"""`BasicBlock`, `Bottleneck` and `ResNet` whose forward passes run fused.

They add nothing to a module but its class, so that `fuse` and `unfuse` need only assign classes.
What they run is in `modules/`. What the fused way does not cover runs exactly as the original class
does, found out anew in every forward pass: `obstacle` says what keeps a module from it,
`input_obstacle` what keeps an input, and a single convolution or norm whose arguments do not fit
runs unfused inside `conv_norm_act`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torchvision.models import resnet

from . import backends, forms
from .forms import Form, Unit
from .layers import quantized_copies, watch
from .layers.ranges import BlockRanges, HeadRanges, StemRanges
from .models import cifar
from .modules import graphs, plans
from .modules.network import cifar_resnet_forward, resnet_forward
from .modules.quantized import Watcher
from .modules.run import block_forward, plain_block_forward


def named_copy(function: Any, name: str) -> Callable[..., Tensor]:
    """A copy of a method that TorchScript can compile beside the one that overrides it."""
    copy = types.FunctionType(
        function.__code__, function.__globals__, name, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(copy, function, ("__module__", "__annotations__"), ())


_Self = TypeVar("_Self", bound="Fused")


class Fused(nn.Module):
    """What the fused classes have in common: they let go of what backends made of their tensors.

    Attributes:
        memory: "normal", or "low" to compute 1x1 convolutions twice in training rather than keep
            their outputs; `fuse` sets it.
        watch: "sample", or "full" to compare all values of the weights with the backend's copies
            in every call; `fuse` sets it.
        quantization: the ranges of a block, or of a network's stem; `quantize` sets it.
    """

    memory = "normal"
    watch = "sample"
    quantization: BlockRanges | StemRanges | Watcher | None = None

    if TYPE_CHECKING:
        # Its children are those of the class that it stands for.
        def __getattr__(self, name: str) -> Any: ...

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        watch.remember(self)

    def train(self: _Self, mode: bool = True) -> _Self:  # noqa: D102
        release(self)
        return super().train(mode)

    def _apply(self: _Self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Self:
        release(self)
        plans.forget(self)  # which hold the parameters that others will take the place of
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        release(self)
        super()._load_from_state_dict(*args, **kwargs)


class Network(Fused):
    """A fused network that knows how to run all of itself.

    Attributes:
        cuda_graphs: whether its inference passes on a GPU become CUDA graphs; `fuse` sets it.
        may_quantize_stem: whether its first convolution can run in eight or sixteen bits, and its
            classifier in eight.
        head_quantization: the ranges of its classifier; `quantize` sets it.
    """

    cuda_graphs = False
    may_quantize_stem = False
    head_quantization: HeadRanges | Watcher | None = None


class BasicBlock(Fused, resnet.BasicBlock):
    """torchvision's `BasicBlock`, each convolution running with its norm, add and ReLU in one.

    Takes its arguments, has its parameters and buffers, and computes what it computes.
    """

    _unfused_forward = named_copy(resnet.BasicBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:  # TorchScript leaves out a branch, but not what follows a return
            return block_forward(self, x)


class Bottleneck(Fused, resnet.Bottleneck):
    """torchvision's `Bottleneck`, each convolution running with its norm, add and ReLU in one.

    Takes its arguments, has its parameters and buffers, and computes what it computes.
    """

    _unfused_forward = named_copy(resnet.Bottleneck.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return block_forward(self, x)


class ResNet(Network, resnet.ResNet):
    """torchvision's `ResNet`, the convolution, norm, ReLU and max-pool of its stem running in one.

    Whether its blocks are fused is up to them: `ResNet(fused_resnet.Bottleneck, [3, 4, 6, 3])`.
    """

    may_quantize_stem = True

    _unfused_forward_impl = named_copy(resnet.ResNet._forward_impl, "_unfused_forward_impl")

    def _forward_impl(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._unfused_forward_impl(x)
        else:
            return resnet_forward(self, x)


class PlainBlock(Fused, cifar.PlainBlock):
    """`models.cifar`'s `PlainBlock`, each convolution running with its norm and ReLU in one."""

    _unfused_forward = named_copy(cifar.PlainBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return plain_block_forward(self, x)


class CifarResNet(Network, cifar.CifarResNet):
    """`models.cifar`'s `CifarResNet`, its first convolution, norm and ReLU running in one.

    Whether its blocks are fused is up to them: `fuse` fuses both.
    """

    may_quantize_stem = True

    _unfused_forward = named_copy(cifar.CifarResNet.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return cifar_resnet_forward(self, x)


forms.register(
    Form(
        resnet.BasicBlock,
        BasicBlock,
        "BasicBlock",
        units=(Unit("conv1", "bn1", "relu"), Unit("conv2", "bn2", "relu")),
        shortcut="downsample",
    )
)
forms.register(
    Form(
        resnet.Bottleneck,
        Bottleneck,
        "Bottleneck",
        units=(
            Unit("conv1", "bn1", "relu"),
            Unit("conv2", "bn2", "relu"),
            Unit("conv3", "bn3", "relu"),
        ),
        shortcut="downsample",
    )
)
forms.register(
    Form(
        resnet.ResNet,
        ResNet,
        "stem",
        units=(Unit("conv1", "bn1", "relu"),),
        pool="maxpool",
        overrides=("forward", "_forward_impl"),
    )
)
forms.register(
    Form(
        cifar.PlainBlock,
        PlainBlock,
        "PlainBlock",
        units=(Unit("conv1", "bn1", "relu"), Unit("conv2", "bn2", "relu")),
    )
)
forms.register(Form(cifar.CifarResNet, CifarResNet, "stem", units=(Unit("conv1", "bn1", "relu"),)))


def release(module: nn.Module) -> None:
    """Lets go of what backends made of a module's tensors, and of their eight-bit copies."""
    tensors = [*module.parameters(), *module.buffers()]
    quantized_copies.release(tensors)
    backends.release(tensors)
    graphs.forget(module)
