"""`nn.Sequential`s of blocks that are many small convolutions: MobileNets, EfficientNets.

Going through such blocks in Python takes as long as some of their kernels. Where the backend says
so, all of them run channels_last, whatever the input, and from plans: see `plans.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import backends
from ..layers.memory import memory_format_of
from ..ops.registration import nothing_intercepts
from ..originals import Conv2d
from . import plans, read, run


def chain_forward(module: nn.Module, x: Any) -> Any:
    """A Sequential's children, each on the output of the one before."""
    if read.obstacle(module) is not None or read.input_obstacle(x) is not None:
        return run.run_unfused(module, x)
    if not _runs_as_one(module, x):
        return _in_order(module, x)
    laid = x if _last_anyway(module, x) else backends.choose(x.device.type).arranged(x)
    children = [child for child in module._modules.values() if child is not None]
    out = plans.planned(module, children, laid, _in_order, others=True)
    return out if laid is x else out.contiguous()


def _runs_as_one(module: nn.Module, x: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and not module.training
        and x.dim() == 4
        and nothing_intercepts(x)
        and not backends.only_recorded()  # around more than this
        and plans.enabled()
        and backends.choose(x.device.type).runs_chains(x)
    )


def _last_anyway(module: nn.Module, x: Tensor) -> bool:
    """Whether the output of the first convolution is channels_last, as it is."""
    if memory_format_of(x) is torch.channels_last:
        return True
    first = next((child for child in module.modules() if type(child) is Conv2d), None)
    weight = None if first is None else first._parameters.get("weight")
    return weight is not None and memory_format_of(weight) is torch.channels_last


def _in_order(module: nn.Module, x: Any) -> Any:
    for child in module._modules.values():
        assert child is not None
        goes_on = getattr(type(child), "_run", None) is chain_forward
        goes_on = goes_on and read.call_obstacle(child) is None
        x = _in_order(child, x) if goes_on else child(x)
    return x
