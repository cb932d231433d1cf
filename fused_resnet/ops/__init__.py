"""The operators, one file each: schema, fake kernel, autograd, autocast, in that order.

Each file's function calls its operator; what an operator computes is in `reference.py` under the
same name, and what computes it is in `backends/`, again under the same name.
"""

from .batch_norm_act_inference import batch_norm_act_inference
from .batch_norm_act_training import batch_norm_act_training
from .batching import register_batching
from .conv_bn_act import conv_bn_act
from .conv_bn_act_max_pool import conv_bn_act_max_pool
from .gradients import has_norm_kernel
from .norm_conv_bn_act import norm_conv_bn_act
from .residual_blocks import BlockLayers, pads_shortcuts, residual_blocks
from .scale_shift_act import scale_shift_act
from .sync_batch_norm_act import sync_batch_norm_act
from .training.graphs import (
    block_training_in_graph,
    holds_training_in_graphs,
    stem_training_in_graph,
)
from .training.nodes import residual_block_training, stem_training

register_batching()

__all__ = [
    "BlockLayers",
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "block_training_in_graph",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "has_norm_kernel",
    "holds_training_in_graphs",
    "norm_conv_bn_act",
    "pads_shortcuts",
    "residual_block_training",
    "residual_blocks",
    "scale_shift_act",
    "stem_training",
    "stem_training_in_graph",
    "sync_batch_norm_act",
]
