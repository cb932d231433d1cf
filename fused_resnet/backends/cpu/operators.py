"""The native operators of `csrc/cpu/`, as the files of this folder call them."""

from __future__ import annotations

import torch

from ... import _native  # noqa: F401  (registers the operators)

_operators = torch.ops.fused_resnet

# `_op` is what the wrapper in Python calls, which these would feel.
conv_bn_act_packed = _operators.conv_bn_act_packed.default._op
norm_conv_bn_act_packed = _operators.norm_conv_bn_act_packed.default
residual_blocks_packed = _operators.residual_blocks_packed.default._op
pool_linear = _operators.pool_linear.default
squeeze_excitation = _operators.squeeze_excitation.default._op
pack_conv_weight = _operators.pack_conv_weight.default
conv_weight_is_packed = _operators.conv_weight_is_packed.default
batch_statistics = _operators.batch_statistics.default._op
train_batch_norm_act = _operators.train_batch_norm_act.default._op
batch_norm_act_backward = _operators.batch_norm_act_backward.default._op
batch_norm_act_backward_sums = _operators.batch_norm_act_backward_sums.default._op
batch_norm_act_backward_input = _operators.batch_norm_act_backward_input.default._op
conv_training = _operators.conv_training.default._op
conv_input_gradient = _operators.conv_input_gradient.default._op
conv_weight_gradient = _operators.conv_weight_gradient.default._op
max_pool_gradient = _operators.max_pool_gradient.default
quantized_kernels = _operators.quantized_kernels.default
pack_quantized_conv = _operators.pack_quantized_conv.default
quantized_residual_blocks_packed = _operators.quantized_residual_blocks_packed.default
quantized_pool_linear = _operators.quantized_pool_linear.default
quantized_stem_packed = _operators.quantized_stem_packed.default
normalize_act = _operators.normalize_act.default._op
normalize_act_backward = _operators.normalize_act_backward.default._op
norm_vectors = _operators.norm_vectors.default._op
pool_empty_like = _operators.pool_empty_like.default._op
conv_isa = _operators.conv_isa.default
conv_tile_isa = _operators.conv_tile_isa.default
conv_pair_isa = _operators.conv_pair_isa.default
float32_pixels_for_tiles = _operators.float32_pixels_for_tiles.default
tiles_for_winograd = _operators.tiles_for_winograd.default
set_float32_products = _operators.set_float32_products.default
cpu_pool_trim = _operators.cpu_pool_trim.default
