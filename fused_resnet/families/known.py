"""What other libraries' blocks compute, by the names of their classes; nothing is imported.

Each line was read from the library's source, and is tried on the module at hand before it is used:
see `recipes.py`. The classes that torchvision's, timm's and this package's own forms are made for
are elsewhere, by class.
"""

from __future__ import annotations

from ..forms import FUNCTIONAL_RELU
from ..recipes import Recipe, add


def _order(name: str, *branch: str) -> None:
    add(Recipe(name, branch))


def _block(name: str, *branch: str, shortcut: str, act: str, idle: tuple[str, ...] = ()) -> None:
    add(Recipe(name, branch, shortcut, act, idle))


def _traced(*names: str) -> None:
    for name in names:
        add(Recipe(name))


# torchvision: GoogLeNet and Inception, RegNet, networks prepared for quantization, backbones
_order("BasicConv2d", "conv", "bn", FUNCTIONAL_RELU)
_order("QuantizableBasicConv2d", "conv", "bn", "relu")
_block("ResBottleneckBlock", "f", shortcut="proj", act="activation")
_block(
    "QuantizableBasicBlock",
    *("conv1", "bn1", "relu", "conv2", "bn2"),
    shortcut="downsample",
    act=FUNCTIONAL_RELU,
    idle=("add_relu.activation_post_process",),
)
_block(
    "QuantizableBottleneck",
    *("conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "conv3", "bn3"),
    shortcut="downsample",
    act=FUNCTIONAL_RELU,
    idle=("skip_add_relu.activation_post_process",),
)
_traced("QuantizableResNet", "IntermediateLayerGetter")

# transformers: ResNet, RegNet, and the ResNet of RT-DETR, which D-FINE and others share
for _prefix in ("ResNet", "RegNet", "RTDetrResNet"):
    _order(f"{_prefix}ConvLayer", "convolution", "normalization", "activation")
    _order(f"{_prefix}ShortCut", "convolution", "normalization")
_order("ResNetEmbeddings", "embedder", "pooler")
_order("RTDetrResNetEmbeddings", "embedder", "pooler")
for _name in (
    *("ResNetBasicLayer", "ResNetBottleNeckLayer", "RegNetXLayer", "RegNetYLayer"),
    *("RTDetrResNetBasicLayer", "RTDetrResNetBottleNeckLayer"),
):
    _block(_name, "layer", shortcut="shortcut", act="activation")

# open_clip, CLIP: the pooling before a convolution stands for its stride
_block(
    "Bottleneck",
    *("conv1", "bn1", "act1", "conv2", "bn2", "act2", "avgpool", "conv3", "bn3"),
    shortcut="downsample",
    act="act3",
)
_block(
    "Bottleneck",
    *("conv1", "bn1", "relu1", "conv2", "bn2", "relu2", "avgpool", "conv3", "bn3"),
    shortcut="downsample",
    act="relu3",
)
_traced("ModifiedResNet")

# MONAI, in two dimensions
_traced("ResNet")
_block("ResNetBlock", "conv1", "bn1", "act", "conv2", "bn2", shortcut="downsample", act="act")
_block(
    "ResNetBottleneck",
    *("conv1", "bn1", "act", "conv2", "bn2", "act", "conv3", "bn3"),
    shortcut="downsample",
    act="act",
)
for _name in ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck"):
    _block(_name, "conv1", "conv2", "conv3", "se_layer", shortcut="project", act="act")

# fastai: xresnet
_block("ResBlock", "convpath", shortcut="idpath", act="act")

# timm
_order("ConvNormAct", "conv", "bn", "aa")
_order("DownsampleAvg", "pool", "conv")
_order("DownsampleConv", "conv", "norm")
_block(
    "Bottleneck",  # of RegNet
    *("conv1", "conv2", "se", "conv3", "drop_path"),
    shortcut="downsample",
    act="act3",
)
_block(
    "BasicBlock",  # of ByobNet, which GENet is
    *("conv1_kxk", "attn", "conv2_kxk", "attn_last", "drop_path"),
    shortcut="shortcut",
    act="act",
)
_block(
    "BottleneckBlock",
    *("conv1_1x1", "conv2_kxk", "conv2b_kxk", "attn", "conv3_1x1", "attn_last", "drop_path"),
    shortcut="shortcut",
    act="act",
)
_block(
    "SelectiveKernelBasic",
    *("conv1", "conv2", "se", "drop_path"),
    shortcut="downsample",
    act="act",
)
_block(
    "SelectiveKernelBottleneck",
    *("conv1", "conv2", "conv3", "se", "drop_path"),
    shortcut="downsample",
    act="act",
)
# EfficientNet, MobileNetV3 and their like: blocks, and the stem in front of them
_traced("ConvBnAct", "DepthwiseSeparableConv", "EdgeResidual", "InvertedResidual")
_traced("EfficientNet", "MobileNetV3")
_traced(
    *(
        "ResNestBottleneck",
        "Bottle2neck",
        "DlaRoot",
        "DenseLayer",
        "PreActBottleneck",
        "PreActBasic",
    ),
    *("FeatureListNet", "FeatureDictNet"),
)

# segmentation_models_pytorch
_traced("ResNetEncoder", "Conv2dReLU")
