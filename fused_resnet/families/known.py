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


def _traced(*names: str, opened: bool = False) -> None:
    for name in names:
        add(Recipe(name, opened=opened))


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

# transformers, which copies a class under the name of each model that has it: ResNet, RegNet, the
# ResNet of RT-DETR, and the encoders of RT-DETR and its kin
for _name in ("ResNetConvLayer", "RegNetConvLayer"):
    _order(f"*{_name}", "convolution", "normalization", "activation")
for _name in ("ResNetShortCut", "RegNetShortCut"):
    _order(f"*{_name}", "convolution", "normalization")
_order("*ResNetEmbeddings", "embedder", "pooler")
for _name in ("*ResNetBasicLayer", "*ResNetBottleNeckLayer", "RegNetXLayer", "RegNetYLayer"):
    _block(_name, "layer", shortcut="shortcut", act="activation")
_order("HGNetV2ConvLayer", "convolution", "normalization", "activation", "lab")
_order("*ConvNormLayer", "conv", "norm", "activation")
_block("*RepVggBlock", "conv1", shortcut="conv2", act="activation")

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

# lightly
_block(
    "BasicBlock",
    *("conv1", "bn1", FUNCTIONAL_RELU, "conv2", "bn2"),
    shortcut="shortcut",
    act=FUNCTIONAL_RELU,
)
_block(
    "Bottleneck",
    *("conv1", "bn1", FUNCTIONAL_RELU, "conv2", "bn2", FUNCTIONAL_RELU, "conv3", "bn3"),
    shortcut="shortcut",
    act=FUNCTIONAL_RELU,
)

# pretrainedmodels; the SENets of timm and segmentation_models_pytorch are these
for _name in ("SEBottleneck", "SEResNetBottleneck", "SEResNeXtBottleneck"):
    _block(
        _name,
        *("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3", "se_module"),
        shortcut="downsample",
        act="relu",
    )
_traced("SEResNetBlock", "FBResNet")
for _name, _branch in (
    ("BasicBlock", ("conv1", "bn1", "relu", "conv2", "bn2")),
    ("Bottleneck", ("conv1", "bn1", "relu", "conv2", "bn2", "relu", "conv3", "bn3")),
):
    _block(_name, *_branch, shortcut="downsample", act="relu")

# pytorchcv, whose layers have only the attributes that they use
_order("ConvBlock", "pad?", "conv", "bn?", "activ?")
_order("ResBlock", "conv1", "conv2")
for _name in ("ResBottleneck", "ResNeXtBottleneck", "SENetBottleneck", "DLABottleneck"):
    _order(_name, "conv1", "conv2", "conv3")
_order("RegNetBottleneck", "conv1", "conv2", "se?", "conv3")
_order("ResADownBlock", "pool", "conv")
_order("ResInitBlock", "conv", "pool")
_order("PreResInitBlock", "conv", "bn", "activ", "pool")
_order("SEInitBlock", "conv1", "conv2", "conv3", "pool")
_order("DLAInitBlock", "conv1", "conv2", "conv3")
for _name in ("ResUnit", "ResNeXtUnit", "SENetUnit", "SEResUnit", "SEResNeXtUnit", "RegNetUnit"):
    _block(_name, "body", "se?", shortcut="identity_conv?", act="activ")

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
# EfficientNet, MobileNetV3 and their like: blocks, and the stem in front of them. Torchvision's
# blocks of the same names are Sequentials with an add behind them.
_traced("ConvBnAct", "EdgeResidual")
_traced("DepthwiseSeparableConv", "InvertedResidual", opened=True)
_traced("QuantizableInvertedResidual", "_InvertedResidual", opened=True)
_traced("MBConv", "FusedMBConv", opened=True)
_traced("EfficientNet", "MobileNetV3")
_traced(
    *(
        "ResNestBottleneck",
        "SplitAttn",
        "SeparableConv2d",
        "SeparableConvNormAct",
        "Bottle2neck",
        "DlaBasic",
        "DlaBottleneck",
        "DlaBottle2neck",
        "DlaRoot",
        "DenseLayer",
        "PreActBottleneck",
        "PreActBasic",
    ),
    *("FeatureListNet", "FeatureDictNet"),
)

# segmentation_models_pytorch
_traced("ResNetEncoder", "Conv2dReLU")
