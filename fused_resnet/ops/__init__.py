"""The operators, one file each: schema, fake kernel, autograd, autocast, in that order.

Each file's function calls its operator; what an operator computes is in `reference.py` under the
same name, and what computes it is in `backends/`, again under the same name.
"""

from . import (
    batch_norm_act_inference,
    batch_norm_act_training,
    batching,
    conv_bn_act,
    conv_bn_act_max_pool,
    conv_bn_act_max_pool_int8,
    decompositions,
    norm_conv_bn_act,
    pool_linear_int8,
    quantized,
    residual_blocks,
    residual_blocks_float8,
    residual_blocks_int8,
    scale_shift_act,
    sync_batch_norm_act,
)
from .training import graphs, nodes

__all__ = [
    "batch_norm_act_inference",
    "batch_norm_act_training",
    "batching",
    "conv_bn_act",
    "conv_bn_act_max_pool",
    "conv_bn_act_max_pool_int8",
    "decompositions",
    "graphs",
    "nodes",
    "norm_conv_bn_act",
    "pool_linear_int8",
    "quantized",
    "residual_blocks",
    "residual_blocks_float8",
    "residual_blocks_int8",
    "scale_shift_act",
    "sync_batch_norm_act",
]

batching.register_batching()
