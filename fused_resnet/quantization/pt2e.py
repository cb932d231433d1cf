"""Ranges out of models that others quantized: graphs of PyTorch 2 export (PT2E).

What `torchao.quantization.pt2e.convert_pt2e` returns keeps, at each activation that is stored in
eight bits, a pair of `quantized_decomposed` operators with the step, the zero point and the ends of
the integers. A convolution's input has one, and so has what follows a block's last ReLU, wherever
the quantizer annotated the blocks. Which module a node came from says its `nn_module_stack`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..layers.quantized import LARGEST, Quantization
from ..layers.ranges import BlockRanges
from ..modules import quantized
from .scales import block_ranges, stored_as

_STORED = "quantized_decomposed.quantize_per_tensor"
_READ = "quantized_decomposed.dequantize_per_tensor"
_CONVOLUTIONS = ("aten.conv2d", "aten.convolution", "aten._convolution")
# What a block does between its last convolution and its output.
_FOLLOWERS = (
    "aten.add",
    "aten.relu",
    "aten.batch_norm",
    "aten._native_batch_norm",
    "aten.native_batch_norm",
    "aten.clone",
    "getitem",
)


def ranges_of(model: nn.Module, converted: Any) -> dict[str, BlockRanges]:
    """The ranges of a model's fused residual blocks, by their paths.

    Args:
        model: in inference mode, with fused blocks.
        converted: the `torch.fx.GraphModule` or `torch.export.ExportedProgram` that the same
            network became.

    Raises:
        TypeError: `converted` is neither.
        ValueError: it has none of the model's convolutions, or stores nothing in eight bits.
    """
    graph = getattr(converted, "graph", None)
    if not isinstance(graph, torch.fx.Graph):
        raise TypeError(
            f"quantize: scales is a {type(converted).__name__}, must be the torch.fx.GraphModule "
            "that convert_pt2e returned, a torch.export.ExportedProgram of it, or an ONNX model"
        )
    if not any(_is(node, _STORED) for node in graph.nodes):
        raise ValueError(f"quantize: scales has no {_STORED}: it was not converted by convert_pt2e")
    convolutions: dict[str, torch.fx.Node] = {}
    for node in graph.nodes:
        if _is(node, *_CONVOLUTIONS):
            convolutions.setdefault(_path(node), node)

    def of(path: str, how: Callable[[torch.fx.Node], Quantization | None]) -> Quantization | None:
        node = convolutions.get(path)
        return None if node is None else how(node)

    found = {
        path: block_ranges(path, block, lambda p: of(p, _input_of), lambda p: of(p, _output_of))
        for path, block in model.named_modules()
        if quantized.is_quantizable(block)
    }
    known = {name.rpartition(".")[0] for name in convolutions}
    if found and known.isdisjoint(found):
        raise ValueError(
            "quantize: scales is of another network: it has no convolution of block "
            f"{next(iter(found))!r}, its first one is {next(iter(convolutions), '')!r}"
        )
    return found


def _input_of(conv: torch.fx.Node) -> Quantization | None:
    """How a convolution's input is stored."""
    read = conv.args[0]
    if not isinstance(read, torch.fx.Node) or not _is(read, _READ):
        return None
    return _quantization(read)


def _output_of(conv: torch.fx.Node) -> Quantization | None:
    """How the output of the block that ends with this convolution is stored."""
    node = conv
    while True:
        stored = [user for user in node.users if _is(user, _STORED)]
        if stored:
            return _quantization(stored[0])
        followers = [user for user in node.users if _is(user, *_FOLLOWERS)]
        if len(followers) != 1 or len(node.users) != 1:
            return None
        node = followers[0]


def _quantization(node: torch.fx.Node) -> Quantization | None:
    """The step of a node's integers, and which of 256 from the smallest one on stands for zero."""
    step, zero_point, smallest, largest = node.args[1:5]
    if not isinstance(step, float) or not isinstance(zero_point, int):
        return None  # given by tensors: a dynamic quantizer
    assert isinstance(smallest, int)
    assert isinstance(largest, int)
    return None if largest - smallest > LARGEST else stored_as(step, zero_point - smallest)


def _is(node: torch.fx.Node, *operators: str) -> bool:
    """Whether a node calls one of these operators, in any overload, in place or not."""
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return "getitem" in operators
    namespace, _, rest = str(node.target).partition(".")
    return f"{namespace}.{rest.partition('.')[0].removesuffix('_')}" in operators


def _path(node: torch.fx.Node) -> str:
    """The module whose forward method a node is of, as `named_modules` calls it."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(next(reversed(stack.values()))[0]) if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L__self___")
