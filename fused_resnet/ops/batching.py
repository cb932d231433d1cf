"""The operators under `torch.vmap`."""

from __future__ import annotations

import torch

from ..layers.batching import rule_of
from .registration import library

_OF_IMAGES = {
    "batch_norm_act_inference": (0, 6),
    "conv_bn_act": (0, 12),
    "conv_bn_act_max_pool": (0,),
    "norm_conv_bn_act": (0, 17),
    "residual_blocks": (0,),
    "scale_shift_act": (0, 3),
}
"""The arguments that have an entry for each image, the input first."""


def register_batching() -> None:
    """Gives every operator its rule, but those that write to tensors, which only backends call."""
    prefix = f"{library.ns}::"
    for qualified in torch._C._dispatch_get_all_op_names():
        if qualified.startswith(prefix):
            name = qualified.removeprefix(prefix)
            operator = getattr(torch.ops.fused_resnet, name).default
            schema = operator._schema
            takes_tensors = any("Tensor" in str(argument.type) for argument in schema.arguments)
            if takes_tensors and not schema.is_mutable:
                rule = rule_of(operator, _OF_IMAGES.get(name, ()))
                torch.library.register_vmap(qualified, rule, lib=library)
