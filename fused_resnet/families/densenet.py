"""The layers and transitions of torchvision's `DenseNet`.

    layer:      conv2(relu2(norm2(conv1(relu1(norm1(cat(features)))))))
    transition: pool(conv(relu(norm(x))))

Norm and ReLU before a convolution are one pass over its input, those between the two convolutions
of a layer are in the first one's epilogue. Only the concatenation and the first pass's output are
written between the convolutions of two layers.
"""

# Without `from __future__ import annotations`, which TorchScript's overloads do not read.
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import densenet

from .. import blocks, forms
from ..forms import Form, Unit


class DenseLayer(blocks.Fused, densenet._DenseLayer):
    """torchvision's `_DenseLayer`, its norms and ReLUs in one pass or in a convolution."""

    @torch.jit._overload_method
    def forward(self, input: list[Tensor]) -> Tensor:  # noqa: D102
        pass

    @torch.jit._overload_method
    def forward(self, input: Tensor) -> Tensor:  # noqa: D102, F811
        pass

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102, F811
        if torch.jit.is_scripting():
            features = [input] if isinstance(input, Tensor) else input
            x = self.conv2(self.relu2(self.norm2(self.bn_function(features))))
        else:
            x = _layer_forward(self, input)
        if self.drop_rate > 0:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x


def _layer_forward(layer: DenseLayer, input: Tensor | list[Tensor]) -> Tensor:
    """All of a layer but its dropout."""
    features = input if isinstance(input, list) else [input]
    if blocks.obstacle(layer) is not None or any(map(blocks.input_obstacle, features)):
        return layer.conv2(layer.relu2(layer.norm2(layer.bn_function(features))))
    x = features[0] if len(features) == 1 else torch.cat(features, 1)
    x = blocks.norm_act(layer.norm1, x, layer.relu1)
    x = blocks.conv_norm_act(layer.conv1, layer.norm2, x, None, layer.relu2)
    return layer.conv2(x)


class Transition(blocks.Fused, densenet._Transition):
    """torchvision's `_Transition`, its norm and ReLU in one pass."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:
            return _transition_forward(self, input)


def _transition_forward(transition: Transition, x: Tensor) -> Tensor:
    if blocks.obstacle(transition) is not None or blocks.input_obstacle(x) is not None:
        return densenet._Transition.forward(transition, x)
    x = blocks.norm_act(transition.norm, x, transition.relu)
    return transition.pool(transition.conv(x))


def _layer_obstacle(layer: densenet._DenseLayer) -> str | None:
    return "memory_efficient is set" if layer.memory_efficient else None


def _transition_obstacle(transition: densenet._Transition) -> str | None:
    names = list(transition._modules)
    return None if names == ["norm", "relu", "conv", "pool"] else f"its children are {names}"


forms.register(
    Form(
        densenet._DenseLayer,
        DenseLayer,
        "DenseLayer",
        units=(Unit("conv1", "norm2", "relu2"),),
        norms=(("norm1", "relu1"),),
        convs=("conv2",),
        overrides=("forward", "bn_function"),
        obstacle=_layer_obstacle,
    )
)
forms.register(
    Form(
        densenet._Transition,
        Transition,
        "Transition",
        units=(),
        norms=(("norm", "relu"),),
        convs=("conv",),
        obstacle=_transition_obstacle,
    )
)
