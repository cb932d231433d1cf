"""Ranges out of ONNX models with QuantizeLinear and DequantizeLinear at their activations.

ONNX Runtime's static quantization writes such graphs, and other tools do. A convolution that is
multiplied in eight bits reads what a DequantizeLinear gives it; a block's output is what the first
QuantizeLinear behind its last addition stores. Which module a convolution was, torch's exporter
says in the node's name, or in that of its weight.
"""

from __future__ import annotations

import os
from collections import defaultdict
from typing import Any

from torch import nn

from ..layers.quantized import Quantization
from ..layers.ranges import BlockRanges
from ..modules import quantized
from .scales import block_ranges, stored_as

# What is between a block's last convolution and its output, up to the addition.
_FOLLOWERS = frozenset({"BatchNormalization", "QuantizeLinear", "DequantizeLinear", "Add", "Relu"})


def is_onnx(scales: Any) -> bool:
    """Whether that is the name of a file, or a model that `onnx` has loaded."""
    return isinstance(scales, (str, os.PathLike)) or type(scales).__module__.startswith("onnx")


def ranges_of(model: nn.Module, scales: Any) -> dict[str, BlockRanges]:
    """The ranges of a model's fused residual blocks, by their paths.

    Args:
        model: in inference mode, with fused blocks.
        scales: an ONNX file's name, or an `onnx.ModelProto`, of the same network.

    Raises:
        ImportError: `onnx` is not installed.
        ValueError: it has none of the model's convolutions, or stores nothing in eight bits.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("quantize: scales is an ONNX model, onnx is not installed") from error
    if isinstance(scales, (str, os.PathLike)):
        scales = onnx.load(os.fspath(scales), load_external_data=False)
    graph = _Graph(scales)
    if not any(node.op_type == "QuantizeLinear" for node in scales.graph.node):
        raise ValueError("quantize: scales has no QuantizeLinear: nothing in it is in eight bits")
    blocks = {
        path: block for path, block in model.named_modules() if quantized.is_quantizable(block)
    }
    known = {path.rpartition(".")[0] for path in graph.convolutions}
    if blocks and known.isdisjoint(blocks):
        raise ValueError(
            "quantize: scales is of another network: it has no convolution of block "
            f"{next(iter(blocks))!r}, its first one is {next(iter(graph.convolutions), '')!r}"
        )
    return {
        path: block_ranges(path, block, graph.input_of, graph.output_of)
        for path, block in blocks.items()
    }


class _Graph:
    """An ONNX model's nodes by what they read and write, and its convolutions by their paths."""

    def __init__(self, model: Any) -> None:
        self._constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self._writers: dict[str, Any] = {}
        self._readers: dict[str, list[Any]] = defaultdict(list)
        for node in model.graph.node:
            for name in node.output:
                self._writers[name] = node
            for name in node.input:
                self._readers[name].append(node)
            if node.op_type == "Constant":
                self._constants[node.output[0]] = node.attribute[0].t
        self.convolutions: dict[str, Any] = {}
        for node in model.graph.node:
            if node.op_type == "Conv":
                self.convolutions.setdefault(self._path(node), node)

    def input_of(self, path: str) -> Quantization | None:
        """How this convolution's input is stored."""
        conv = self.convolutions.get(path)
        read = None if conv is None else self._writers.get(conv.input[0])
        if read is None or read.op_type != "DequantizeLinear":
            return None
        return self._quantization(read)

    def output_of(self, path: str) -> Quantization | None:
        """How the output of the block that ends with this convolution is stored."""
        node = self.convolutions.get(path)
        added = False
        while node is not None:
            readers = self._readers[node.output[0]]
            stored = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
            if added and stored:
                return self._quantization(stored[0])
            if len(readers) != 1 or readers[0].op_type not in _FOLLOWERS:
                return None
            node = readers[0]
            added = added or node.op_type == "Add"
        return None

    def _quantization(self, node: Any) -> Quantization | None:
        from onnx import TensorProto, numpy_helper

        if not self._constants.keys() >= {*node.input[1:]}:
            return None  # worked out anew for each input
        constants = [self._constants[name] for name in node.input[1:]]
        step, *zero_points = map(numpy_helper.to_array, constants)
        kind = constants[1].data_type if zero_points else TensorProto.UINT8
        if kind not in (TensorProto.UINT8, TensorProto.INT8) or step.size != 1:
            return None
        smallest = 0 if kind == TensorProto.UINT8 else -128
        zero_point = int(zero_points[0].item()) if zero_points else 0
        return stored_as(float(step.item()), zero_point - smallest)

    def _path(self, conv: Any) -> str:
        """The module that a convolution was, as `named_modules` calls it."""
        weight = conv.input[1]
        while weight in self._writers:
            weight = self._writers[weight].input[0]
        path, _, name = weight.removesuffix("_quantized").rpartition(".")
        return path if name == "weight" else _path_of_scope(conv.name)


def _path_of_scope(name: str) -> str:
    """`/layer1/layer1.0/conv1/Conv` is of `layer1.0.conv1`."""
    *scopes, _ = name.strip("/").split("/")
    path: list[str] = []
    for scope in scopes:
        if path and scope.startswith(f"{path[-1]}."):
            path.pop()
        path.append(scope)
    return ".".join(path)
