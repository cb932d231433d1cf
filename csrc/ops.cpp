// Schemas of the native operators. The implementations register themselves beside their kernels,
// with STABLE_TORCH_LIBRARY_IMPL in csrc/cpu and csrc/cuda.
#include <torch/csrc/stable/library.h>

#include "cuda/schemas.h"

STABLE_TORCH_LIBRARY(fused_resnet, m)
{
  for (const char* schema : fused_resnet::kCudaSchemas) m.def(schema);

  m.def("cpu_isa() -> str");
  // The CPU backend's convolution. Internal: fused_resnet/backends/cpu/ is the only caller. Those
  // that take a packed weight return nothing where it seems not to be made of the weight's present
  // values.
  m.def("conv_isa() -> str");
  m.def("conv_tile_isa() -> str");
  m.def("conv_pair_isa() -> str");
  m.def(
      "float32_pixels_for_tiles(int[] weight_shape, int[] stride, int groups, bool has_pool) -> "
      "int");
  m.def(
      "tiles_for_winograd(int[] weight_shape, int[] stride, int[] dilation, int groups, "
      "bool has_pool) -> int");
  m.def("set_float32_products(int products) -> ()");
  m.def("multiply_tiles(str dtype, int steps) -> int");
  m.def("pack_conv_weight(Tensor weight, int groups) -> Tensor");
  m.def("conv_weight_is_packed(Tensor weight, Tensor packed, int groups) -> bool");
  m.def(
      "conv_bn_act_packed(Tensor input, Tensor weight, Tensor packed, Tensor running_mean, "
      "Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, "
      "int stride_h, int stride_w, int pad_h, int pad_w, int dil_h, int dil_w, int groups, "
      "Tensor? residual, int act, float act_first, float act_second, int[] max_pool) -> Tensor?");
  m.def(
      "norm_conv_bn_act_packed(Tensor input, Tensor in_mean, Tensor in_var, Tensor? in_weight, "
      "Tensor? in_bias, float in_eps, Tensor weight, Tensor packed, Tensor running_mean, "
      "Tensor running_var, Tensor? bn_weight, Tensor? bn_bias, float eps, Tensor? bias, "
      "int stride_h, int stride_w, int pad_h, int pad_w, int dil_h, int dil_w, int groups, "
      "Tensor? residual, int act, float act_first, float act_second) -> Tensor?");
  m.def(
      "residual_blocks_packed(Tensor input, Tensor[] tensors, int[] numbers, float[] eps, "
      "int[] layer_counts, int[] shortcuts) -> Tensor?");

  // Eight bits, internal too, see csrc/cpu/quantized/: the packed weight of a convolution with its
  // scale and shift, for the kernels that will take it ("": the default); and the names of the
  // kernels that run here, the default first.
  m.def(
      "pack_quantized_conv(Tensor weight, Tensor scale, Tensor shift, int dilation_w, int groups, "
      "int unit=16, str kernels='') -> Tensor");
  m.def(
      "quantized_residual_blocks_packed(Tensor input, Tensor[] packed, int[] numbers, "
      "int[] layer_counts, int[] projections, float[] shortcut_scales, float step, "
      "int zero_point, float output_step, str kernels) -> Tensor?");
  m.def(
      "quantized_stem_packed(Tensor input, Tensor packed, Tensor? packed_low, int[] numbers, "
      "int[] pool, float step, int zero_point, float output_step, str kernels) -> Tensor");
  m.def(
      "quantized_pool_linear(Tensor input, Tensor weight, Tensor scale, Tensor bias, float step, "
      "float pooled_step, str kernels) -> Tensor");
  m.def("quantized_kernels() -> str");
  m.def(
      "quantized_copies_match(Tensor[] weights, Tensor[] quantized, Tensor[] steps, "
      "Tensor[] vectors, Tensor[] copies) -> bool");

  m.def("pool_linear(Tensor input, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "squeeze_excitation(Tensor input, Tensor reduce_weight, Tensor? reduce_bias, "
      "Tensor expand_weight, Tensor? expand_bias, int act, float act_first, float act_second, "
      "int gate) -> Tensor");

  // The CPU backend's training: internal too, see csrc/cpu/batch_norm.cpp.
  m.def("batch_statistics(Tensor input) -> (Tensor mean, Tensor var)");
  m.def(
      "train_batch_norm_act(Tensor input, Tensor? weight, Tensor? bias, float eps, "
      "Tensor? residual, str activation, bool keep_mask) -> (Tensor output, Tensor mean, "
      "Tensor var, Tensor? mask)");
  m.def(
      "batch_norm_act_backward(Tensor grad, Tensor input, Tensor? output, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor var, float eps, bool relu, bool training, "
      "Tensor(a!)? grad_input, Tensor(b!)? masked) -> (Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "batch_norm_act_backward_sums(Tensor grad, Tensor input, Tensor? output, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor var, float eps, bool relu) -> (Tensor total, Tensor dot)");
  m.def(
      "batch_norm_act_backward_input(Tensor grad, Tensor input, Tensor? output, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor var, float eps, bool relu, Tensor total, Tensor dot, "
      "float count, Tensor(a!) grad_input) -> ()");
  m.def(
      "normalize_act(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, "
      "float eps, Tensor? residual, int act, float act_first, float act_second, "
      "Tensor(a!) output) -> ()");
  m.def(
      "normalize_act_backward(Tensor grad, Tensor input, Tensor? residual, Tensor? weight, "
      "Tensor? bias, Tensor mean, Tensor var, float eps, int act, float act_first, "
      "float act_second, bool training, Tensor(a!)? grad_input, Tensor(b!) masked) -> "
      "(Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "norm_vectors(Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps) -> "
      "(Tensor scale, Tensor shift)");
  m.def(
      "conv_training(Tensor input, Tensor weight, Tensor? bias, int stride_h, int stride_w, "
      "int pad_h, int pad_w, int dil_h, int dil_w, int groups, Tensor? in_mean, Tensor? in_var, "
      "Tensor? in_weight, Tensor? in_bias, float in_eps, bool statistics) -> "
      "(Tensor output, Tensor? mean, Tensor? var)");
  m.def(
      "conv_input_gradient(Tensor grad, Tensor weight, int stride_h, int stride_w, int pad_h, "
      "int pad_w, int dil_h, int dil_w, Tensor(a!) grad_input, bool accumulate) -> ()");
  m.def(
      "conv_weight_gradient(Tensor grad, Tensor input, int stride_h, int stride_w, int pad_h, "
      "int pad_w, int dil_h, int dil_w, int groups, Tensor(a!) grad_weight) -> ()");
  m.def(
      "max_pool_gradient(Tensor grad, Tensor input, Tensor scale, Tensor shift, int[] max_pool) -> "
      "Tensor");
  m.def("pool_empty_like(Tensor like) -> Tensor");

  // Plans of launches: internal, see csrc/launch_plan.cpp and
  // fused_resnet/backends/triton/plans.py.
  m.def(
      "make_launch_plan(Tensor input, Tensor[] parameters, int[] fixed, int[] launches, "
      "int[] workspace, int[] output_sizes, int[] output_strides) -> int");
  m.def("run_launch_plan(int plan, Tensor input, int stream) -> Tensor?");
  m.def("free_launch_plan(int plan) -> ()");

  // Plans of inference passes: internal, see csrc/cpu/inference_plan.cpp and
  // fused_resnet/backends/cpu/plans.py.
  m.def("begin_cpu_plan() -> ()");
  m.def("discard_cpu_plan() -> ()");
  m.def(
      "end_cpu_plan(Tensor input, Tensor output, Tensor[] parameters, int[] objects, int[] types, "
      "int[] cdatas) -> int[]");
  m.def("run_cpu_plan(int plan, Tensor input) -> Tensor?");
  m.def("free_cpu_plan(int plan) -> ()");

  // Whether modules have changed: internal, see csrc/state_guard.cpp and
  // fused_resnet/modules/guard.py.
  m.def(
      "make_module_guard(int[] functions, int[] modules, int[] dicts, int[] entries, int[] empty) "
      "-> int");
  m.def("free_module_guard(int guard) -> ()");

  m.def("cpu_pool_statistics() -> int[]");
  m.def("cpu_pool_trim() -> ()");
}
