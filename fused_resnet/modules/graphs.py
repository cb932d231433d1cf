"""CUDA graphs behind a network's forward pass, for `fuse(model, cuda_graphs=True)`.

The first inference pass for a shape runs as ever, the second is captured, and later ones are a copy
of the input to where the graph reads it, a replay, and a copy of what it wrote, so that results
stay theirs. A graph holds addresses: it is captured anew where a parameter has other memory, and is
not used where something is not as it was; see `plans.py` for what is looked at. Values that change
in place need nothing.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..ops.registration import nothing_intercepts
from .plans import Modules

# Shapes of a model that have a graph at a time, each with memory of its own for input and output;
# the oldest goes first.
MOST_GRAPHS = 8

Compute = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class _Graph:
    """A captured pass: where it reads, where it writes, and the parameters' addresses in it."""

    graph: Any
    input: Tensor
    output: Tensor
    addresses: list[int]

    def replay(self, x: Tensor) -> Tensor:
        """The pass of this input, in memory of its own, on the current stream."""
        # Written by whatever mode a call has, which an inference tensor would not be.
        with torch.no_grad():
            self.input.copy_(x)
            self.graph.replay()
            return self.output.clone()


class _Graphs:
    """The graphs of a model, by what they depend on; or why a pass has none."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = Modules(_parts(model))
        self.by_key: dict[Hashable, _Graph | str | None] = {}
        # Graphs that are replayed on one stream, one after the other, share their memory.
        self.pools: dict[int, Any] = {}
        self.lock = threading.Lock()

    def put(self, key: Hashable, graph: _Graph | str | None) -> None:
        while len(self.by_key) >= MOST_GRAPHS and key not in self.by_key:
            self.by_key.pop(next(iter(self.by_key)))
        self.by_key[key] = graph


_of_models: weakref.WeakKeyDictionary[nn.Module, _Graphs] = weakref.WeakKeyDictionary()


def captured(model: nn.Module, x: Tensor, compute: Compute) -> Tensor:
    """`compute(model, x)`, a graph's replay from the second time on where that was asked for.

    Args:
        model: a network that has no obstacle, nor has `x`.
        x: (N, C, H, W).
        compute: runs all of the model's children that matter.
    """
    if (
        torch.compiler.is_compiling()
        or not vars(model).get("cuda_graphs")
        or torch.is_grad_enabled()
        or model.training
        or not nothing_intercepts(x)
    ):
        return compute(model, x)
    own = backends.choose(x.device.type).graph_key(x)
    if own is None:
        return compute(model, x)
    graphs = _of_models.get(model)
    if graphs is None or not graphs.modules.are_same(_parts(model)):
        graphs = _of_models[model] = _Graphs(model)
    key = (x.shape, x.stride(), x.dtype, x.device, own)
    with graphs.lock:
        if key not in graphs.by_key:
            # What is compiled, chosen or set up in a first pass has no place in a graph.
            graphs.put(key, None if graphs.modules.are_plain() else "its modules do more")
            return compute(model, x)
        graph = graphs.by_key[key]
        if isinstance(graph, _Graph) and graph.addresses != _addresses(graphs.modules):
            graph = None
        if graph is None:
            graph = _capture(model, graphs, key, x, compute)
            graphs.put(key, graph)
        if isinstance(graph, _Graph):
            return graph.replay(x)
    return compute(model, x)


def _parts(model: nn.Module) -> list[nn.Module]:
    return [child for child in model._modules.values() if child is not None]


def _addresses(modules: Modules) -> list[int]:
    return [*map(Tensor.data_ptr, modules.tensors)]


def _capture(
    model: nn.Module, graphs: _Graphs, key: tuple[Any, ...], x: Tensor, compute: Compute
) -> _Graph | str:
    """A graph of a pass, or why it cannot be captured."""
    stream = torch.cuda.current_stream(x.device)
    pool = graphs.pools.setdefault(stream.cuda_stream, None)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(x.device), torch.inference_mode(False), torch.no_grad():
            input = torch.empty_like(x)
            if input.stride() != x.stride():
                return "its input has gaps"
            input.copy_(x)
            # Other threads may use the GPU for something that a capture does not allow.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                output = compute(model, input)
    except RuntimeError as error:
        warnings.warn(
            f"fused_resnet: no CUDA graph of a {type(model).__name__}'s pass, which runs without: "
            f"{error}",
            stacklevel=2,
        )
        return str(error)
    graphs.pools[stream.cuda_stream] = graph.pool()
    return _Graph(graph, input, output, _addresses(graphs.modules))


def forget(model: nn.Module) -> None:
    """Drops a model's graphs and their memory."""
    _of_models.pop(model, None)
