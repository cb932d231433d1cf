"""timm's residual blocks and the stem of its `ResNet`, from `timm.models.resnet`.

Imported once timm's own file is, by `fuse`, `unfuse`, `report` or a pickle. Of a block, fused are
the convolutions with their norms, ReLUs and, unless attention or drop path comes before the add,
the shortcut. Anti-aliasing, drop block, attention, drop path and the pooling in a ResNet-D shortcut
are called where timm calls them; while dropping does nothing (evaluation, a probability of zero)
the block runs as if it were not there. The stem may be one 7x7 convolution or timm's three 3x3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import DropBlock2d, DropPath
from timm.models import resnet
from torch import Tensor, nn

from .. import blocks, forms
from ..forms import Form, Unit
from ..modules import read
from ..modules.network import stages_forward, stem
from ..modules.run import block_forward, run_unfused, run_unit
from ..originals import Sequential


class BasicBlock(blocks.Fused, resnet.BasicBlock):
    """timm's `BasicBlock`, each convolution running with its norm and what may follow in one."""

    _unfused_forward = blocks.named_copy(resnet.BasicBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return block_forward(self, x)


class Bottleneck(blocks.Fused, resnet.Bottleneck):
    """timm's `Bottleneck`, each convolution running with its norm and what may follow in one."""

    _unfused_forward = blocks.named_copy(resnet.Bottleneck.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return block_forward(self, x)


class ResNet(blocks.Fused, resnet.ResNet):
    """timm's `ResNet`, the convolutions of its stem running with norm, ReLU and max-pool."""

    _unfused_forward_features = blocks.named_copy(
        resnet.ResNet.forward_features, "_unfused_forward_features"
    )

    def forward_features(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward_features(x)
        else:
            return _features(self, x)


def _features(model: ResNet, x: Tensor) -> Tensor:
    if (
        read.obstacle(model) is not None
        or read.input_obstacle(x) is not None
        or model.grad_checkpointing
    ):
        return run_unfused(model, x, "forward_features")
    *first, last = _stem_units(model)
    for unit in first:
        x = run_unit(model, unit, x)
    conv, norm, act = (forms.part(model, name) for name in (last.conv, last.norm, last.act))
    x = stem(conv, norm, act, model.maxpool, x)
    return stages_forward([model.layer1, model.layer2, model.layer3, model.layer4], x)


_DEEP_STEM = (
    Unit("conv1.0", "conv1.1", "conv1.2"),
    Unit("conv1.3", "conv1.4", "conv1.5"),
    Unit("conv1.6", "bn1", "act1"),
)
_STEM = (Unit("conv1", "bn1", "act1"),)


def _stem_units(model: nn.Module) -> Sequence[Unit]:
    conv = model._modules.get("conv1")
    deep = type(conv) is Sequential and list(conv._modules) == list("0123456")
    return _DEEP_STEM if deep else _STEM


forms.idle[DropPath] = lambda module: not module.training or bool(module.drop_prob == 0)
forms.idle[DropBlock2d] = lambda module: not module.training or not module.drop_prob
forms.register(
    Form(
        resnet.BasicBlock,
        BasicBlock,
        "BasicBlock",
        units=(
            Unit("conv1", "bn1", "act1", between=("drop_block",), after=("aa",)),
            Unit("conv2", "bn2", "act2", between=("se", "drop_path")),
        ),
        shortcut="downsample",
    )
)
forms.register(
    Form(
        resnet.Bottleneck,
        Bottleneck,
        "Bottleneck",
        units=(
            Unit("conv1", "bn1", "act1"),
            Unit("conv2", "bn2", "act2", between=("drop_block",), after=("aa",)),
            Unit("conv3", "bn3", "act3", between=("se", "drop_path")),
        ),
        shortcut="downsample",
    )
)
forms.register(
    Form(
        resnet.ResNet,
        ResNet,
        "stem",
        units=_stem_units,
        pool="maxpool",
        overrides=("forward", "forward_features"),
    )
)
