"""Fused forms of the blocks in `fused_resnet.models` that are not torchvision's.

A pre-activation block is convolutions with the next norm and ReLU, then one with the add. In
inference the first of them, and the projection, do the first norm and ReLU while they load the
block's input; where gradients are recorded these are a pass of their own. They cannot be in the
last epilogue of the block before, which stores one output while two are needed.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import StochasticDepth

from .. import blocks, forms
from ..forms import Form, Unit
from ..models import preact, residual
from ..modules import read
from ..modules.conv_norm_act import NormAct, conv_add
from ..modules.run import block_forward, run_unfused, run_unit


class PreActBasicBlock(blocks.Fused, preact.PreActBasicBlock):
    """`models.PreActBasicBlock` in one pass for each convolution."""

    _unfused_forward = blocks.named_copy(preact.PreActBasicBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return _preact_forward(self, x)


class PreActBottleneck(blocks.Fused, preact.PreActBottleneck):
    """`models.PreActBottleneck` in one pass for each convolution."""

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
            return block_forward(self, x)


class ResidualBlock(blocks.Fused, residual.ResidualBlock):
    """`models.ResidualBlock`, each convolution running with its norm and what may follow in one."""

    _unfused_forward = blocks.named_copy(residual.ResidualBlock.forward, "_unfused_forward")

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if torch.jit.is_scripting():
            return self._unfused_forward(x)
        else:
            return block_forward(self, x)


def _preact_forward(block: PreActBasicBlock | PreActBottleneck, x: Tensor) -> Tensor:
    if read.obstacle(block) is not None or read.input_obstacle(x) is not None:
        return run_unfused(block, x)
    form = forms.of(block)
    normalised = NormAct(block.bn1, x, block.relu)
    shortcut = x
    if block.downsample is not None:
        if read.bare_conv_obstacle(block.downsample) is None:
            shortcut = normalised.conv(forms.part(block, "downsample"))
        else:
            shortcut = block.downsample(normalised.tensor())
    first, *units = form.units_of(block)
    conv, norm = forms.part(block, first.conv), forms.part(block, first.norm)
    h = normalised.conv_norm_act(conv, norm, forms.part(block, first.act))
    for unit in units:
        h = run_unit(block, unit, h)
    return conv_add(forms.part(block, form.convs[0]), h, shortcut)


_TWO_UNITS = (Unit("conv1", "bn1", "relu"), Unit("conv2", "bn2", "relu"))

forms.idle[StochasticDepth] = lambda module: not module.training or bool(module.p == 0)
forms.register(
    Form(
        preact.PreActBasicBlock,
        PreActBasicBlock,
        "PreActBasicBlock",
        units=(Unit("conv1", "bn2", "relu"),),
        norms=(("bn1", "relu"),),
        prologues=(("bn1", "downsample"), ("bn1", "conv1")),
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
        prologues=(("bn1", "downsample"), ("bn1", "conv1")),
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
