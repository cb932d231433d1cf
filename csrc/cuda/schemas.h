// Schemas of the operators that csrc/cuda implements, on a GPU and on the host.
#pragma once

namespace fused_resnet {

inline constexpr const char* kCudaSchemas[] = {
    "scale_shift_act(Tensor input, Tensor scale, Tensor shift, Tensor? residual=None, "
    "str activation=\"relu\") -> Tensor",

    // Internal: fused_resnet/backends/cuda.py is the only caller. `tile` is empty, or an index into
    // what conv_tiles lists and a split; `act` and its parameters are those of activations.h.
    "conv_bn_act_tiled(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, int stride_h, int stride_w, "
    "int pad_h, int pad_w, int dil_h, int dil_w, int groups, Tensor? residual, int act, "
    "float act_first, float act_second, bool tf32, int[] tile) -> Tensor",
    "conv_tiles() -> int[]",
    "conv_tiles_for(int[] problem, int[] gpu) -> int[]",

    // Internal likewise: csrc/cuda/hopper. `tile` is an index into what hopper_conv_tiles lists.
    "hopper_conv_bn_act(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, int stride_h, int stride_w, "
    "int pad_h, int pad_w, int dil_h, int dil_w, Tensor? residual, int act, "
    "float act_first, float act_second, int tile) -> Tensor",
    "hopper_conv_tiles() -> int[]",

    // Internal likewise. `tile` is an index into what hopper_bottleneck_tiles lists; without
    // next_weight the second output has no channels.
    "hopper_bottleneck(Tensor input, Tensor shortcut, Tensor weight, Tensor running_mean, "
    "Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, "
    "int stride_h, int stride_w, int pad_h, int pad_w, int dil_h, int dil_w, "
    "Tensor expand_weight, Tensor expand_running_mean, Tensor expand_running_var, "
    "Tensor? expand_bn_weight, Tensor? expand_bn_bias, float expand_eps, Tensor? expand_bias, "
    "Tensor? next_weight, Tensor? next_running_mean, Tensor? next_running_var, "
    "Tensor? next_bn_weight, Tensor? next_bn_bias, float next_eps, Tensor? next_bias, int tile) -> "
    "(Tensor output, Tensor next)",
    "hopper_bottleneck_tiles() -> int[]",

    // Internal likewise. `tile` is an index into what basic_block_tiles lists.
    "basic_block_tiled(Tensor input, Tensor weight1, Tensor running_mean1, Tensor running_var1, "
    "Tensor? bn_weight1, Tensor? bn_bias1, float eps1, Tensor? bias1, Tensor weight2, "
    "Tensor running_mean2, Tensor running_var2, Tensor? bn_weight2, Tensor? bn_bias2, float eps2, "
    "Tensor? bias2, int tile) -> Tensor",
    "basic_block_tiles() -> int[]",

    // Internal likewise, of csrc/cuda/stem.cu: a network's first convolution and its max-pool; and
    // a max-pool by itself, of kernel size, stride and padding.
    "stem_max_pool(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var, "
    "Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, bool relu, int rows_each) -> "
    "Tensor",
    "stem_rows_each(int[] problem, int[] gpu) -> int[]",
    "max_pool_channels_last(Tensor input, int[] pool) -> Tensor",

    // Internal likewise, of csrc/cuda/byte_conv.cu: a convolution is four tensors (packed weight,
    // sums of its filters, scale, shift) and eleven numbers. `tile` is an index into what
    // byte_conv_tiles lists, for the convolutions that it can run, or -1.
    "byte_blocks(Tensor input, Tensor[] tensors, int[] numbers, int[] layer_counts, "
    "int[] projections, float[] shortcut_scales, float step, int zero_point, float output_step, "
    "int tile) -> Tensor",
    "byte_stem(Tensor input, Tensor[] tensors, int[] numbers, int[] pool, float step, "
    "int zero_point, float output_step, int tile) -> Tensor",
    "byte_conv_tiles() -> int[]",

    // Internal likewise: csrc/cuda/launch_plan.cu.
    "begin_cuda_recording() -> ()",
    "end_cuda_recording() -> int[]",
    "make_cuda_plan(Tensor input, Tensor[] parameters, int[] fixed, int[] launches, "
    "int[] workspace, int[] output_sizes, int[] output_strides) -> int",
    "run_cuda_plan(int plan, Tensor input) -> Tensor?",
    "free_cuda_plan(int plan) -> ()",
    "driver_function(int function) -> int",

    // Internal too: see csrc/cuda/batch_norm.cu.
    "batch_norm_statistics(Tensor input) -> (Tensor mean, Tensor var)",
    "batch_norm_normalize(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
    "float eps, Tensor? residual, bool relu, Tensor(a!)? mask=None) -> Tensor",
    "batch_norm_gradient_sums(Tensor grad, Tensor input, Tensor? output, Tensor mean, Tensor var, "
    "Tensor? weight, Tensor? bias, float eps, bool relu, Tensor(a!)? masked) -> "
    "(Tensor total, Tensor dot, Tensor grad_weight)",
    "batch_norm_input_gradient(Tensor grad, Tensor input, Tensor? output, Tensor mean, Tensor var, "
    "Tensor? weight, Tensor? bias, float eps, bool relu, Tensor? total, Tensor? dot, float count, "
    "Tensor(a!)? masked, Tensor(b!) grad_input) -> ()",

    // The same in one launch, where that fits: see csrc/cuda/batch_norm_cluster.cu.
    "batch_norm_fits_cluster(Tensor input, int tensors) -> bool",
    "batch_norm_in_one_launch(Tensor input, Tensor? weight, Tensor? bias, float eps, "
    "Tensor? residual, bool relu, Tensor(a!)? mask) -> (Tensor output, Tensor mean, Tensor var)",
    "batch_norm_backward_in_one_launch(Tensor grad, Tensor input, Tensor? output, Tensor mean, "
    "Tensor var, Tensor? weight, Tensor? bias, float eps, bool relu, Tensor(a!)? masked, "
    "Tensor(b!) grad_input) -> (Tensor total, Tensor dot, Tensor grad_weight)",
};

}  // namespace fused_resnet
