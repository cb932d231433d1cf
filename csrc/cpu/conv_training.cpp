// The operator conv_training of the CPU backend: a convolution's forward pass in training.
//
//   out = conv(x, weight) + bias, and mean and biased variance of each of its channels
//   x   = input, or relu(in_weight * (input - in_mean) / sqrt(in_var + in_eps) + in_bias), rounded
//         to the input's dtype
//
// The norm and ReLU of the layer before are the kernel's prologue, applied while pixels are
// gathered; the statistics are taken of a task's outputs while these are in its cache.
//
// Memory traffic: input, weight and output once, the weight twice more to be packed. The packed
// weight lives for one call: a step of the optimizer follows before the next.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "checks.h"
#include "cpu/batch_norm.h"
#include "cpu/conv_layer.h"
#include "cpu/row_statistics.h"

namespace fused_resnet::cpu {
namespace {

std::tuple<Tensor, std::optional<Tensor>, std::optional<Tensor>> conv_training(
    Tensor input, Tensor weight, std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w,
    int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w, int64_t groups,
    std::optional<Tensor> in_mean, std::optional<Tensor> in_var, std::optional<Tensor> in_weight,
    std::optional<Tensor> in_bias, double in_eps, bool statistics) {
  constexpr const char* name = "conv_training";
  check_rank(name, "input", input, 4);
  check_rank(name, "weight", weight, 4);
  const ScalarType dtype = input.scalar_type();
  check_floating(name, "input", input, false);
  const ConvLayer layer{weight,   {},       {},    {},    {},    {},    {},    0,
                        stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups};
  Conv conv =
      conv_geometry(layer, input.size(0), input.size(1), input.size(2), input.size(3), dtype);
  const bool empty = conv.N == 0 || conv.P == 0 || conv.Q == 0;
  FR_CHECK(!empty || !statistics, name, ": an empty output has no statistics");
  if (bias) {
    check_vector(name, "bias", *bias, conv.K, ScalarType::Float);
    conv.bias = bias->const_data_ptr<float>();
  }
  Tensor output = empty_activation(conv.N, conv.K, conv.P, conv.Q, dtype, true);
  conv.input = input.const_data_ptr();
  conv.in = strides_of(input);
  conv.output = output.mutable_data_ptr();
  conv.out = dense_strides(conv.K, conv.P, conv.Q, true);
  std::optional<Prologue> prologue;
  FR_CHECK(in_mean.has_value() == in_var.has_value(), name,
           ": in_mean and in_var must be given together");
  if (in_mean) {
    check_eps(name, in_eps);
    prologue.emplace(InputNorm{*in_mean, *in_var, in_weight, in_bias, in_eps}, conv.C, dtype);
    prologue->add_to(conv);
  }
  const auto [packed, finite] = pack_for_one_call(weight, groups);
  conv.weight_is_finite = finite;
  conv.weight = packed.const_data_ptr();
  if (!statistics) {
    run_conv(conv);
    return {output, std::nullopt, std::nullopt};
  }
  RowStatistics rows(dtype);
  run_conv(conv, &rows);
  const Tensor mean = pool_tensor({conv.K}, {1}, ScalarType::Float);
  const Tensor variance = pool_tensor({conv.K}, {1}, ScalarType::Float);
  if (rows.finish(mean.mutable_data_ptr<float>(), variance.mutable_data_ptr<float>())) {
    return {output, mean, variance};
  }
  const auto [again_mean, again_variance] = batch_statistics(output);
  return {output, again_mean, again_variance};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("conv_training", TORCH_BOX(&conv_training));
}

}  // namespace fused_resnet::cpu
