"""Norms of other libraries that compute what torch's or torchvision's do, known by doing it.

Two kinds are looked for among classes that `read.py` does not know. A *frozen* norm has the buffers
of torchvision's `FrozenBatchNorm2d` and computes, in training too,

    (x - running_mean) / sqrt(running_var + eps) * weight + bias

with its attribute `eps` or a constant of its class. A *norm with its activation* derives from
`nn.BatchNorm2d` and has two children: it computes `act(drop(batch_norm(x)))`.

Whether a class does is found out once in a process, on random input in float64; its instances are
then told apart by nothing but what they hold. Nothing is imported for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import originals
from . import trial

_TENSORS = ("weight", "bias", "running_mean", "running_var")
_CONSTANTS = (1e-5, 1e-3, 1e-6, 0.0)


class Known(NamedTuple):
    """What is known of a class.

    Attributes:
        forward: its forward pass, which another that takes its place is not.
        frozen: whether it is a frozen norm, and else one with its activation.
        eps: what a frozen norm adds to the variance; None where its attribute `eps` says so.
    """

    forward: object
    frozen: bool
    eps: float | None


_ORIGINALS = (originals.BatchNorm2d, originals.SyncBatchNorm, originals.FrozenBatchNorm2d)
_verdicts: dict[type, Known | None] = {}

# What the instances of a class may differ in.
_ATTRIBUTES = {"training", "eps", "n", "num_features", "momentum", "affine", "track_running_stats"}
_ATTRIBUTES |= set(vars(nn.Module()))
_ATTRIBUTES |= {"_is_hf_initialized"}  # with which transformers marks every module of a model


def known(norm: nn.Module | None) -> Known | None:
    """What is known of a norm that is of another library, or None."""
    if norm is None:
        return None
    cls = type(norm)
    if cls in _ORIGINALS:
        return None
    if cls not in _verdicts:
        if torch.compiler.is_compiling():
            return None
        # Not again for what a trial runs, and not for a module without any channels.
        _verdicts[cls] = None
        _verdicts[cls] = _tried(norm)
    verdict = _verdicts[cls]
    if verdict is None or cls.forward is not verdict.forward:
        return None
    # Compilers guard on what they have seen.
    fits = torch.compiler.is_compiling() or vars(norm).keys() <= _ATTRIBUTES
    return verdict if fits else None


def is_frozen(norm: nn.Module) -> bool:
    """Whether a norm has nothing to learn and no batch statistics."""
    if type(norm) is originals.FrozenBatchNorm2d:
        return True
    found = known(norm)
    return found is not None and found.frozen


def has_act(norm: nn.Module | None) -> bool:
    """Whether a norm applies its children `drop` and `act` itself."""
    found = known(norm)
    return found is not None and not found.frozen


def eps_of(norm: nn.Module) -> float:
    """What is added to the variance."""
    found = _verdicts.get(type(norm))
    constant = None if found is None else found.eps
    return float(norm.eps) if constant is None else constant  # type: ignore[arg-type]


def alone(norm: Any, x: Tensor) -> Tensor:
    """A norm's output without the activation that it may hold; no hooks but its own."""
    return originals.BatchNorm2d.forward(norm, x) if has_act(norm) else norm(x)


def _tried(norm: nn.Module) -> Known | None:
    """What a class turns out to compute, or None."""
    frozen = _is_like_frozen(norm)
    if not frozen and not _is_like_norm_with_act(norm):
        return None
    with contextlib.suppress(Exception), trial.quietly():
        copy = trial.replica(norm)
        if frozen:
            return _tried_frozen(norm, copy)
        if all(_agree_with_act(copy.train(mode)) for mode in (False, True)):
            return Known(type(norm).forward, False, None)
    return None


def _is_like_frozen(norm: nn.Module) -> bool:
    tensors = [getattr(norm, name, None) for name in _TENSORS]
    return (
        not norm._modules
        and not isinstance(norm, nn.modules.batchnorm._NormBase)
        and all(isinstance(tensor, Tensor) and tensor.dim() == 1 for tensor in tensors)
        and len(norm._parameters) + len(norm._buffers) - len(_TENSORS)
        == ("num_batches_tracked" in norm._buffers)
    )


def _is_like_norm_with_act(norm: nn.Module) -> bool:
    return isinstance(norm, originals.BatchNorm2d) and list(norm._modules) == ["drop", "act"]


def _tried_frozen(norm: nn.Module, copy: Any) -> Known | None:
    own = getattr(norm, "eps", None)
    variance = copy.running_var
    # Small, so that another eps shows.
    variance.data.copy_(trial.random(variance.shape).abs() * 1e-4 + 1e-5)
    for eps in _CONSTANTS if own is None else (float(own),):
        if all(_agree_frozen(copy.train(mode), eps) for mode in (False, True)):
            return Known(type(norm).forward, True, eps if own is None else None)
    return None


def _agree_frozen(norm: nn.Module, eps: float) -> bool:
    before = [getattr(norm, name).clone() for name in _TENSORS]
    for x in _inputs(len(before[0])):
        weight, bias, mean, var = (tensor.view(-1, 1, 1) for tensor in before)
        # `F.batch_norm` refuses an eps of 0 in some versions of torch.
        expected = (x - mean) / (var + eps).sqrt() * weight + bias
        if trial.difference(norm(x), expected) > trial.TOLERANCE:
            return False
    return all(torch.equal(getattr(norm, n), t) for n, t in zip(_TENSORS, before, strict=True))


def _agree_with_act(norm: Any) -> bool:
    twin: Any = trial.twin(norm)
    for x in _inputs(norm.num_features):
        expected = originals.BatchNorm2d.forward(twin, x)
        expected = twin.act(twin.drop(expected))
        if trial.difference(norm(x), expected) > trial.TOLERANCE:
            return False
    buffers = zip(norm.buffers(), twin.buffers(), strict=True)
    return all(trial.difference(mine, other) <= trial.TOLERANCE for mine, other in buffers)


def _inputs(channels: int) -> Iterator[Tensor]:
    yield trial.random((2, channels, 4, 5))
    yield 3 * trial.random((3, channels, 2, 2))
