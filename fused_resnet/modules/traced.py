"""Units in `torch.fx` graphs: found where nothing else reads what is between, and run as one.

A convolution's only reader is a norm, that one's only reader an activation or the add of a residual
and so on; what is called between the first and the last of them writes to nothing. The graph that
runs fused calls `run_unit` in the place of the last one. Which modules these are, and whether they
carry hooks, is looked at in every call, as everywhere.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .. import forms
from ..forms import FUNCTION, FUNCTIONAL_RELU, Unit
from ..layers import activation, checks
from ..originals import Conv2d, MaxPool2d
from . import network, norms, read, squeeze_excitation
from .activations import text_of
from .conv_norm_act import conv_norm_act, left_to_modules
from .read import input_obstacle

# Activations that are functions: the name of each and of what follows the input, with its default.
_ACTS: dict[Any, tuple[str, dict[str, Any]]] = {
    F.relu: ("relu", {"inplace": False}),
    F.relu_: ("relu", {}),
    torch.relu: ("relu", {}),
    torch.relu_: ("relu", {}),
    F.relu6: ("relu6", {"inplace": False}),
    F.hardtanh: ("hardtanh", {"min_val": -1.0, "max_val": 1.0, "inplace": False}),
    F.hardtanh_: ("hardtanh", {"min_val": -1.0, "max_val": 1.0}),
    F.leaky_relu: ("leaky_relu", {"negative_slope": 0.01, "inplace": False}),
    F.leaky_relu_: ("leaky_relu", {"negative_slope": 0.01}),
    F.silu: ("silu", {"inplace": False}),
    F.hardswish: ("hardswish", {"inplace": False}),
    F.gelu: ("gelu", {"approximate": "none"}),
}
_GELUS = {"none": "gelu", "tanh": "gelu_tanh"}
_ADDS = (operator.add, torch.add)

# What may be called between a unit's modules: it writes to none of its inputs.
_PURE_METHODS = {
    "size", "dim", "flatten", "view", "reshape", "mean", "permute", "contiguous", "float", "to",
    "add", "mul", "relu", "sigmoid", "chunk", "split", "unsqueeze", "squeeze", "transpose",
}  # fmt: skip
_PURE_FUNCTIONS = {
    operator.add, operator.mul, operator.getitem, torch.add, torch.mul, torch.cat, torch.flatten,
    torch.relu, torch.split, torch.chunk, torch.sigmoid, F.adaptive_avg_pool2d, F.avg_pool2d,
    F.max_pool2d, getattr,
}  # fmt: skip
_PURE_MODULES = (
    nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.Linear, nn.AvgPool2d, nn.MaxPool2d,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Identity, nn.Flatten, nn.Sigmoid, nn.Tanh,
    nn.GELU, nn.Softmax, nn.GroupNorm, nn.LayerNorm, nn.ZeroPad2d,
)  # fmt: skip


@dataclass(frozen=True)
class Found:
    """A unit of a graph.

    Attributes:
        nodes: of the convolution, the norm and what follows, in order; the last one's output is
            the unit's.
        unit: the modules.
        residual: what is added before the activation, or None.
    """

    nodes: tuple[fx.Node, ...]
    unit: Unit
    residual: fx.Node | None


def find(graph: fx.Graph, root: nn.Module) -> list[Found]:
    """The units of a graph whose modules are `root`'s."""
    position = {node: i for i, node in enumerate(graph.nodes)}
    nodes = list(graph.nodes)
    found = []
    taken: set[fx.Node] = set()
    for node in nodes:
        if node not in taken and type(_module(node, root)) is Conv2d and _takes_one(node):
            one = _longest(node, root, nodes, position, taken)
            if one is not None:
                taken.update(one.nodes)
                found.append(one)
    return found


def _longest(
    conv: fx.Node,
    root: nn.Module,
    nodes: list[fx.Node],
    position: dict[fx.Node, int],
    taken: set[fx.Node],
) -> Found | None:
    """The longest unit that begins with a convolution and moves nothing past a write."""
    norm_node = _only_reader(conv)
    norm = None if norm_node is None else _module(norm_node, root)
    if norm_node is None or norm is None or not read.is_norm(norm) or not _takes_one(norm_node):
        return None
    unit = Unit(str(conv.target), str(norm_node.target), None)
    chain: tuple[fx.Node, ...] = (conv, norm_node)
    held = False
    if norms.has_act(norm):
        drop, act = norm._modules["drop"], norm._modules["act"]
        if drop is None or act is None or not read.passes_through(drop):
            return None
        held = text_of(act) is not None
        if held:
            unit = Unit(unit.conv, unit.norm, f"{unit.norm}.act")
        elif not read.passes_through(act):
            return None
    candidates = [Found(chain, unit, None)]
    reader = _only_reader(chain[-1])
    if not held and reader is not None and reader not in taken:
        idle = _idle_before_add(reader, root)
        residual = _added(*(idle or (reader, chain[-1])))
        if residual is not None:
            if idle is not None:
                chain, reader = (*chain, reader), idle[0]
                unit = Unit(unit.conv, unit.norm, None, between=(str(chain[-1].target),))
            chain = (*chain, reader)
            candidates.append(Found(chain, unit, residual))
            reader = _only_reader(reader)
    else:
        residual = None
    name = None if held or reader is None else _act(reader, root)
    if reader is not None and name is not None:
        chain = (*chain, reader)
        unit = Unit(unit.conv, unit.norm, name, unit.between)
        candidates.append(Found(chain, unit, residual))
        reader = _only_reader(reader)
    if reader is not None and unit.act is not None and residual is None:
        maxpool = _module(reader, root)
        if type(maxpool) is MaxPool2d and _takes_one(reader):
            pooled = Unit(unit.conv, unit.norm, unit.act, after=(str(reader.target),))
            candidates.append(Found((*chain, reader), pooled, None))
    for one in reversed(candidates):
        inside = nodes[position[conv] : position[one.nodes[-1]] + 1]
        others = [node for node in inside if node not in one.nodes]
        if all(_writes_nothing(node, root, one) for node in others):
            return one
    return None


def _idle_before_add(node: fx.Node, root: nn.Module) -> tuple[fx.Node, fx.Node] | None:
    """The only reader of what may do nothing, such as stochastic depth in evaluation, and that."""
    module = _module(node, root)
    reader = _only_reader(node)
    may_be_idle = module is not None and type(module) in forms.idle and _takes_one(node)
    return (reader, node) if may_be_idle and reader is not None else None


def _module(node: fx.Node, root: nn.Module) -> nn.Module | None:
    if node.op != "call_module":
        return None
    return forms.part(root, str(node.target))


def _takes_one(node: fx.Node) -> bool:
    """Whether a module is called with one tensor and nothing else."""
    return len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)


def _only_reader(node: fx.Node) -> fx.Node | None:
    """The node that alone reads another's output."""
    if len(node.users) != 1:
        return None
    (reader,) = node.users
    return reader


def _added(add: fx.Node, term: fx.Node) -> fx.Node | None:
    """What else a node adds to a term, if that is all it does and the term may be written to."""
    in_place = add.target in (operator.iadd, "add_")
    is_add = add.op == "call_function" and (add.target in _ADDS or add.target is operator.iadd)
    if not is_add and not (add.op == "call_method" and add.target in ("add", "add_")):
        return None
    if len(add.args) != 2 or add.kwargs or (in_place and add.args[0] is not term):
        return None
    first, second = add.args
    other = second if first is term else first
    return other if isinstance(other, fx.Node) and other is not term else None


def _act(node: fx.Node, root: nn.Module) -> str | None:
    """The name of an activation that a node applies, or None."""
    if node.op == "call_module":
        module = _module(node, root)
        applies = module is not None and text_of(module) is not None and _takes_one(node)
        return str(node.target) if applies else None
    if node.op == "call_method":
        applies = node.target in ("relu", "relu_") and len(node.args) == 1 and not node.kwargs
        return FUNCTIONAL_RELU if applies else None
    text = _text(node) if node.op == "call_function" else None
    return None if text is None else FUNCTION + text


def _text(node: fx.Node) -> str | None:
    """The text of the activation that a function applies to its first argument, or None."""
    name, parameters = _ACTS.get(node.target, ("", {}))
    given = dict(zip(parameters, node.args[1:], strict=False)) | node.kwargs
    known = given.keys() <= parameters.keys() and len(node.args) - 1 <= len(parameters)
    if not name or not node.args or not known:
        return None
    values = parameters | given
    values.pop("inplace", None)
    if name == "gelu":
        return _GELUS.get(values["approximate"])
    if not all(isinstance(value, (int, float)) for value in values.values()):
        return None
    numbers = ", ".join(repr(float(value)) for value in values.values())
    text = f"{name}({numbers})" if numbers else name
    return text if activation.error(text) is None else None


def _writes_nothing(node: fx.Node, root: nn.Module, one: Found) -> bool:
    """Whether a unit may be computed after a node that came between its modules."""
    if node.op in ("placeholder", "get_attr", "output"):
        return node.op != "output"
    if node.op == "call_method":
        return node.target in _PURE_METHODS
    if node.op == "call_function":
        in_place = node.kwargs.get("inplace", False) or (node.target is F.relu)
        return (node.target in _PURE_FUNCTIONS or node.target is run_unit) and not in_place
    module = _module(node, root)
    own = {forms.part(root, one.unit.conv), forms.part(root, one.unit.norm)}
    if module is None or module in own:
        return False
    if text_of(module) is not None:
        return not getattr(module, "inplace", False)
    return isinstance(module, _PURE_MODULES) or norms.is_frozen(module)


def fused_graph(graph: fx.Graph, found: list[Found], root: nn.Module | None = None) -> fx.Graph:
    """A copy of a graph with one call for each unit.

    And, where the modules' `root` is given, for what may be squeeze-and-excitation.

    Raises:
        RuntimeError: it is not a graph that can be copied.
    """
    copies: dict[fx.Node, fx.Node] = {}
    fused = fx.Graph()
    output = fused.graph_copy(graph, copies)
    ends = [node for node in graph.nodes if node.op == "output"]
    fused.output(output, getattr(ends[0], "type", None) if ends else None)
    fused._codegen = graph._codegen
    for one in found:
        nodes = [copies[node] for node in one.nodes]
        unit, last = one.unit, nodes[-1]
        with fused.inserting_before(last):
            modules: list[fx.Node | str | None] = []
            for name in (
                *(unit.conv, unit.norm, unit.act),
                *(unit.after or (None,)),
                *(unit.between or (None,)),
            ):
                is_child = name is not None and not forms.is_function(name)
                modules.append(fused.get_attr(str(name)) if is_child else name)
            x = copies[_input(one)]
            residual = None if one.residual is None else copies[one.residual]
            call = fused.call_function(run_unit, (x, residual, *modules))
        last.replace_all_uses_with(call)
        for key, copied in copies.items():
            if copied is last:
                copies[key] = call
        for node in reversed(nodes):
            fused.erase_node(node)
    if root is not None:
        _call_squeeze_excitation(fused, root)
    return fused


def _call_squeeze_excitation(fused: fx.Graph, root: nn.Module) -> None:
    for node in list(fused.nodes):
        if squeeze_excitation.may_be(_module(node, root)) and _takes_one(node):
            with fused.inserting_before(node):
                module = fused.get_attr(str(node.target))
                call = fused.call_function(squeeze_excitation.run, (node.args[0], module))
            node.replace_all_uses_with(call)
            fused.erase_node(node)


def _input(one: Found) -> fx.Node:
    x = one.nodes[0].args[0]
    assert isinstance(x, fx.Node)
    return x


def run_unit(
    x: Tensor,
    residual: Tensor | None,
    conv: nn.Conv2d,
    norm: nn.Module,
    act: nn.Module | str | None,
    maxpool: nn.MaxPool2d | None,
    between: nn.Module | None = None,
) -> Tensor:
    """`maxpool(act(between(norm(conv(x))) + residual))`, in one where modules and tensors allow."""
    module: Any = forms.function(act) if isinstance(act, str) else act
    held = act is not None and norms.has_act(norm)
    if (
        (residual is None and left_to_modules((conv,), x, act is not None))
        or input_obstacle(x) is not None
        or read.obstacle_of_unit(conv, norm, module) is not None
        or not (residual is None or _fits(conv, norm, x, residual))
        or not (between is None or read.passes_through(between))
    ):
        x = norm(conv(x))
        x = x if between is None else between(x)
        if residual is not None:
            x = x + residual
        x = x if module is None or held else module(x)
        return x if maxpool is None else maxpool(x)
    if maxpool is not None:
        return network.stem(conv, norm, module, maxpool, x)
    return conv_norm_act(conv, norm, x, residual, module)


def _fits(conv: nn.Conv2d, norm: nn.Module, x: Tensor, residual: Tensor) -> bool:
    """Whether a residual is a tensor like the one it is added to."""
    if not isinstance(residual, Tensor) or input_obstacle(residual) is not None:
        return False
    layer = read.layer_of(conv, norm)
    if checks.conv_error("conv_bn_act", x, layer, None, "none") is not None:
        return False
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return residual.dtype is dtype and tuple(residual.shape) == tuple(layer.output_shape(x.shape))


class _Tracer(fx.Tracer):
    """Calls of children stay calls, but for those of what has been gone into by name."""

    def __init__(self, opened: Collection[str]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self._opened


def trace(
    module: nn.Module, left_out: dict[str, None] | None = None, opened: Collection[str] = ()
) -> fx.Graph:
    """What a module's forward pass calls, as it is now, where these arguments are left out.

    Of the descendants that are `opened`, what they call.

    Raises:
        Exception: it decides by values, or the like.
    """
    return _Tracer(opened).trace(module, concrete_args=left_out or None)


def compiled(graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the module and its inputs."""
    code = graph.python_code(root_module="self")
    namespace, source = dict(code.globals), code.src
    # Looked up where modules keep them, as by `forms.part`: attributes of attributes take longer
    # than all else that is asked about a unit.
    for node in graph.nodes:
        if node.op == "get_attr":
            names = str(node.target).split(".")
            source = source.replace(f" = {_attribute(names)}\n", f" = _part(self, {names})\n")
    namespace["_part"] = _part
    exec(compile(source, "<fused graph>", "exec"), namespace)  # as fx does
    forward: Callable[..., Any] = namespace["forward"]
    return forward


def _attribute(names: list[str]) -> str:
    """How fx writes a child of a child of `self`."""
    text = "self"
    for name in names:
        text = f"{text}.{name}" if name.isidentifier() else f'getattr({text}, "{name}")'
    return text


def _part(module: Any, names: list[str]) -> Any:
    for name in names:
        children = module._modules
        module = children[name] if name in children else getattr(module, name)
    return module
