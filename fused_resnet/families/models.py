"""Fused forms of the blocks in `fused_resnet.models` that are not torchvision's.

A pre-activation block is one pass for its first norm and ReLU, whose output the convolution and
the block's own input, kept for the add, both need; then convolutions with the next norm and ReLU;
then a convolution with the add. The norm and ReLU that the next block begins with cannot be in that
last epilogue, which stores one output while two are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import StochasticDepth

from .. import blocks, forms
from ..forms import Form, Unit
from ..models import preact, residual


class PreActBasicBlock(blocks.Fused, preact.PreActBasicBlock):
    """`models.PreActBasicBlock` in one pass for its first norm and one for each convolution."""

    _unfused_forward = blocks.named_copy(preact.PreActBasicBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _preact_forward(self, x)


class PreActBottleneck(blocks.Fused, preact.PreActBottleneck):
    """`models.PreActBottleneck` in one pass for its first norm and one for each convolution."""

    _unfused_forward = blocks.named_copy(preact.PreActBottleneck.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _preact_forward(self, x)


class Residual(blocks.Fused, residual.Residual):
    """`models.Residual`, each convolution running with its bias, norm, add and ReLU in one."""

    _unfused_forward = blocks.named_copy(residual.Residual.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return blocks.block_forward(self, x)


class ResidualBlock(blocks.Fused, residual.ResidualBlock):
    """`models.ResidualBlock`, each convolution running with its norm and what may follow in one."""

    _unfused_forward = blocks.named_copy(residual.ResidualBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return blocks.block_forward(self, x)


def _preact_forward(block: PreActBasicBlock | PreActBottleneck, x: Tensor) -> Tensor:
    if blocks.obstacle(block) is not None or blocks.input_obstacle(x) is not None:
        return block._unfused_forward(x)
    form = forms.of(block)
    h = blocks.norm_act(block.bn1, x, block.relu)
    shortcut = x if block.downsample is None else block.downsample(h)
    for unit in form.units_of(block):
        h = blocks.run_unit(block, unit, h)
    return blocks.conv_add(forms.part(block, form.convs[0]), h, shortcut)


_TWO_UNITS = (Unit("conv1", "bn1", "relu"), Unit("conv2", "bn2", "relu"))

forms.idle[StochasticDepth] = lambda module: not module.training or module.p == 0
forms.register(
    Form(
        preact.PreActBasicBlock,
        PreActBasicBlock,
        "PreActBasicBlock",
        units=(Unit("conv1", "bn2", "relu"),),
        norms=(("bn1", "relu"),),
        convs=("conv2",),
    )
)
forms.register(
    Form(
        preact.PreActBottleneck,
        PreActBottleneck,
        "PreActBottleneck",
        units=(Unit("conv1", "bn2", "relu"), Unit("conv2", "bn3", "relu")),
        norms=(("bn1", "relu"),),
        convs=("conv3",),
    )
)
forms.register(Form(residual.Residual, Residual, "Residual", units=_TWO_UNITS, shortcut="conv3"))
forms.register(
    Form(
        residual.ResidualBlock,
        ResidualBlock,
        "ResidualBlock",
        units=(
            _TWO_UNITS[0],
            Unit("conv2", "bn2", "relu", between=("squeeze_excitation", "stochastic_depth")),
        ),
        shortcut="shortcut",
    )
)
