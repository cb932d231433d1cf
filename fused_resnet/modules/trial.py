"""Copies of modules on which it is tried what their class computes: small, random, in float64.

A copy shares nothing with the module: its parameters and buffers are random numbers in the CPU's
memory whatever the module's are (on another device, in shards, without memory), and it carries no
hooks. Nothing of a trial is seen outside: neither the random state nor gradients nor autocast.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

TOLERANCE = 1e-6
"""The relative difference in float64 that two ways of computing the same may have.

Some modules compute a part in float32.
"""

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
)


def random(shape: Sequence[int]) -> Tensor:
    """Normal in float64, on the CPU, whatever the default device is."""
    return torch.randn(*shape, dtype=torch.float64, device="cpu")


@contextlib.contextmanager
def quietly(seed: int = 0) -> Iterator[None]:
    """The same random numbers in every trial, and nothing of it to be seen."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
    ):
        torch.manual_seed(seed)
        yield


def replica(module: nn.Module) -> nn.Module:
    """A copy with random parameters and buffers in float64 and without hooks."""
    memo: dict[int, object] = {}
    for child in module.modules():
        state = child.__dict__
        for name in _HOOKS:
            if name in state:
                memo[id(state[name])] = collections.OrderedDict()
        for tensor in state["_parameters"].values():
            if tensor is not None:
                memo[id(tensor)] = nn.Parameter(_like(tensor, ""), tensor.is_floating_point())
        for name, tensor in state["_buffers"].items():
            if tensor is not None:
                memo[id(tensor)] = _like(tensor, name)
    return copy.deepcopy(module, memo)


def twin(copied: nn.Module) -> nn.Module:
    """Another copy with the same values."""
    return copy.deepcopy(copied)


def _like(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")
    values = random(tensor.shape)
    if "var" in name:
        return values.abs_() + 0.5
    # As large as a layer's outputs stay near 1.
    return values.div_(max(tensor[0].numel(), 1) ** 0.5) if tensor.dim() > 1 else values


def difference(actual: object, expected: object) -> float:
    """The largest of `|actual - expected|` beside that of `|expected|`, of all tensors in both.

    Infinite where one is not made as the other is, or has NaN.
    """
    mine, others = _tensors(actual), _tensors(expected)
    if len(mine) != len(others):
        return float("inf")
    largest = 0.0
    for a, b in zip(mine, others, strict=True):
        if a.shape != b.shape or a.dtype != b.dtype:
            return float("inf")
        if a.numel() == 0:
            continue
        scale = b.abs().max().item() if b.is_floating_point() else 1.0
        error = (a.double() - b.double()).abs().max().item() / (scale or 1.0)
        largest = max(largest, error) if error == error else float("inf")
    return largest


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []
