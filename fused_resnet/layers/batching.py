"""An operator under `torch.vmap`: images of several calls as one batch, or call by call.

What treats each image by itself takes those of all calls in one batch, if nothing else differs from
call to call. Everything else, and statistics of a batch above all, is one call after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def rule_of(
    operator: Callable[..., Any], of_images: Sequence[int]
) -> Callable[..., tuple[Any, Any]]:
    """The rule to register for an operator that writes to none of its arguments.

    Args:
        operator: what is called with the arguments of one call, or of several as one batch.
        of_images: the arguments that have an entry for each image, the input first; none where
            images depend on each other.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        size = info.batch_size
        others = [dims for i, dims in enumerate(in_dims) if i not in of_images]
        if of_images and in_dims[0] is not None and _is_shared(others):
            images = arguments[0].size(0 if in_dims[0] else 1)
            joined = [
                _joined(argument, in_dims[i], size)
                if i in of_images and argument is not None
                else argument
                for i, argument in enumerate(arguments)
            ]
            return operator(*joined).unflatten(0, (size, images)), 0
        calls = [_of_call(arguments, in_dims, index) for index in range(size)]
        if size == 0:  # the shapes are those of any call
            calls = [_of_call(_padded(arguments, in_dims), in_dims, 0)]
        results = [operator(*call) for call in calls]
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        stacked = [
            None if parts[0] is None else torch.stack(parts)[:size]
            for parts in zip(*results, strict=True)
        ]
        return type(results[0])(stacked), 0

    return rule


def _is_shared(dims: Any) -> bool:
    """Whether tensors, or lists of them, are the same in all calls."""
    return all(map(_is_shared, dims)) if isinstance(dims, (list, tuple)) else dims is None


def _joined(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """All calls' images in one batch."""
    tensor = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return tensor.flatten(0, 1)


def _of_call(arguments: Any, dims: Any, index: int) -> Any:
    """The arguments of one of the calls."""
    if isinstance(dims, (list, tuple)):
        pairs = zip(arguments, dims, strict=True)
        return [_of_call(argument, dim, index) for argument, dim in pairs]
    return arguments if dims is None else arguments.select(dims, index)


def _padded(arguments: Any, dims: Any) -> Any:
    """The arguments of no call with zeros for one."""
    if isinstance(dims, (list, tuple)):
        return [_padded(argument, dim) for argument, dim in zip(arguments, dims, strict=True)]
    if dims is None:
        return arguments
    shape = list(arguments.shape)
    shape[dims] = 1
    return arguments.new_zeros(shape)
