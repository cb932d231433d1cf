"""torchvision's `DenseNet`: its stem, its layers and its transitions.

    stem:       pool0(relu0(norm0(conv0(x))))
    layer:      conv2(relu2(norm2(conv1(relu1(norm1(cat(features)))))))
    transition: pool(conv(relu(norm(x))))

In inference the norm and ReLU before a convolution are applied while it loads its input, so that
between the convolutions of two layers only the concatenation is written; where gradients are
recorded they are one pass over that. The norm and ReLU between the two convolutions of a layer are
in the first one's epilogue.
"""

# ruff: noqa: D102, F811  # TorchScript takes no comment behind the one for mypy.
# Without `from __future__ import annotations`, which TorchScript's overloads do not read.
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import densenet

from .. import blocks, forms
from ..forms import Form, Unit
from ..modules import read
from ..modules.conv_norm_act import NormAct, bare_conv, norm_act
from ..modules.network import stem
from ..modules.run import run_unfused
from ..originals import Sequential


class DenseLayer(blocks.Fused, densenet._DenseLayer):
    """torchvision's `_DenseLayer`, its norms and ReLUs in one pass or in a convolution."""

    @torch.jit._overload_method
    def forward(self, input: list[Tensor]) -> Tensor:
        pass

    @torch.jit._overload_method  # type: ignore[no-redef]
    def forward(self, input: Tensor) -> Tensor:
        pass

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[no-redef]
        if torch.jit.is_scripting():
            features = [input] if isinstance(input, Tensor) else input
            x = self.conv2(self.relu2(self.norm2(self.bn_function(features))))
            if self.drop_rate > 0:
                x = F.dropout(x, p=self.drop_rate, training=self.training)
            return x
        else:
            return _layer_forward(self, input)


def _layer_forward(layer: DenseLayer, input: Tensor | list[Tensor]) -> Tensor:
    features = input if isinstance(input, list) else [input]
    if read.obstacle(layer) is not None or any(map(read.input_obstacle, features)):
        return run_unfused(layer, input)
    x = features[0] if len(features) == 1 else torch.cat(features, 1)
    normalised = NormAct(layer.norm1, x, layer.relu1)
    h = normalised.conv_norm_act(layer.conv1, layer.norm2, layer.relu2)
    x = bare_conv(layer.conv2, h)
    return F.dropout(x, p=layer.drop_rate, training=layer.training) if layer.drop_rate > 0 else x


class Transition(blocks.Fused, densenet._Transition):
    """torchvision's `_Transition`, its norm and ReLU in one pass or in its convolution."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            for module in self:
                input = module(input)
            return input
        else:
            return _transition_forward(self, input)


def _transition_forward(transition: Transition, x: Tensor) -> Tensor:
    if read.obstacle(transition) is not None or read.input_obstacle(x) is not None:
        return run_unfused(transition, x)
    normalised = NormAct(transition.norm, x, transition.relu)
    return transition.pool(normalised.conv(transition.conv))


class DenseNet(blocks.Fused, densenet.DenseNet):
    """torchvision's `DenseNet`, the norms and ReLUs of its stem and of its end in one pass each.

    Whether its layers are fused is up to them: `fuse` fuses both.
    """

    _unfused_forward = blocks.named_copy(densenet.DenseNet.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _network_forward(self, x)


def _network_forward(model: DenseNet, x: Tensor) -> Tensor:
    if read.obstacle(model) is not None or read.input_obstacle(x) is not None:
        return run_unfused(model, x)
    conv0, norm0, relu0, pool0, *middle, norm5 = model.features._modules.values()
    x = stem(conv0, norm0, relu0, pool0, x)
    for module in middle:
        x = module(x)
    x = norm_act(norm5, x, relu0)
    return model.classifier(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1))


def _network_obstacle(model: densenet.DenseNet) -> str | None:
    # Fused by itself while the network could not be.
    form = forms.of_fused(type(model.features))
    if (type(model.features) if form is None else form.original) is not Sequential:
        return f"features is {read.described(model.features)}"
    names = list(model.features._modules)
    if names[:4] != ["conv0", "norm0", "relu0", "pool0"] or names[-1] != "norm5":
        return f"the children of features are {names}"
    return None


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
        prologues=(("norm1", "conv1"),),
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
        prologues=(("norm", "conv"),),
        convs=("conv",),
        obstacle=_transition_obstacle,
    )
)
forms.register(
    Form(
        densenet.DenseNet,
        DenseNet,
        "stem",
        units=(Unit("features.conv0", "features.norm0", "features.relu0"),),
        # The ReLU behind the last norm is a function; this one does the same.
        norms=(("features.norm5", "features.relu0"),),
        pool="features.pool0",
        obstacle=_network_obstacle,
    )
)
