"""Which problems a model's forward pass consists of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import swap
from ..layers.description import Block
from ..modules import read
from ..modules.network import stem
from ..tuning import basic_block, chain
from ..tuning.problem import CHAIN_DTYPES, BasicBlockProblem, ChainProblem, ConvProblem


def of_model(name: str, batch: int, dtype: str, size: int = 224) -> Counter[ConvProblem]:
    """The fused convolutions of one of torchvision's models in eval mode, and how often each runs.

    The model runs once, on tensors without data.

    Args:
        name: a torchvision residual network.
        batch: images in the input.
        dtype: the problems' dtype; see `ConvProblem`.
        size: rows and columns of an image.
    """
    with torch.device("meta"):
        model = swap.fuse(torchvision.models.get_model(name).eval())
        images = torch.empty(batch, 3, size, size)
    recorder = _Recorder(dtype)
    with torch.no_grad(), recorder:
        model(images)
    return recorder.found


def chains_of_model(
    name: str, batch: int, dtype: str, size: int = 224
) -> list[ChainProblem | None]:
    """What a chain can do of each block of one of torchvision's models, in their order.

    None stands for a block that has to run convolution by convolution; so do all in other dtypes
    than `CHAIN_DTYPES`. Arguments as of `of_model`.
    """
    problems = chain.problems_of(*_first_input_and_blocks(name, batch, dtype, size))
    assert problems is not None, "Bottlenecks that follow each other"
    return problems


def basic_blocks_of_model(
    name: str, batch: int, dtype: str, size: int = 224
) -> Counter[BasicBlockProblem]:
    """The BasicBlocks that one kernel can run, and how often a model has each.

    None in other dtypes than `CHAIN_DTYPES`. Arguments as of `of_model`.
    """
    x, blocks = _first_input_and_blocks(name, batch, dtype, size)
    found: Counter[BasicBlockProblem] = Counter()
    for block in blocks:
        x = x.to(memory_format=torch.channels_last)
        problem = basic_block.problem_of(x, [block])
        if problem is not None:
            found[problem] += 1
        for weight, _, bias, stride, padding, dilation, groups in block.main:
            x = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return found


def _first_input_and_blocks(
    name: str, batch: int, dtype: str, size: int
) -> tuple[Tensor, list[Block]]:
    """What a model's stem hands on, and the blocks behind it, on tensors without data."""
    with torch.device("meta"):
        model: Any = swap.fuse(torchvision.models.get_model(name).eval())
        images = torch.empty(batch, 3, size, size)
    if dtype in CHAIN_DTYPES:
        model.to(getattr(torch, dtype))
        images = images.to(getattr(torch, dtype))
    with torch.no_grad():
        x = stem(model.conv1, model.bn1, model.relu, model.maxpool, images)
    stages = [model.layer1, model.layer2, model.layer3, model.layer4]
    blocks = read.stages_blocks(stages, x)
    assert blocks is not None, "a fused model in eval mode"
    return x, blocks


class _Recorder(TorchDispatchMode):
    """Counts the fused convolutions that pass through the dispatcher."""

    def __init__(self, dtype: str) -> None:
        super().__init__()
        self.dtype = dtype
        self.found: Counter[ConvProblem] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        operators = torch.ops.fused_resnet
        if func is operators.conv_bn_act.default:
            self.found[problem_of(args, self.dtype, args[12] is not None)] += 1
        elif func is operators.conv_bn_act_max_pool.default:
            pool = (*args[13], *args[14], *args[15])
            self.found[problem_of(args, self.dtype, False, pool)] += 1
        return func(*args, **(kwargs or {}))


def problem_of(
    arguments: Sequence[Any], dtype: str, residual: bool, pool: tuple[int, ...] | None = None
) -> ConvProblem:
    """The problem that an operator's arguments, from `input` to `groups`, are of."""
    input: Tensor = arguments[0]
    weight: Tensor = arguments[1]
    stride, padding, dilation, groups = arguments[8:12]
    N, C, H, W = input.shape
    K, _, R, S = weight.shape
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    return ConvProblem(N, C, H, W, K, R, S, *geometry, dtype, residual, pool)
