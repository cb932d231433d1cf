// The operators conv_bn_act_packed and norm_conv_bn_act_packed of the CPU backend: one convolution
// with everything after it, and what is before it. See conv.h for the formula.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/buffer_pool.h"
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"

namespace fused_resnet::cpu {
namespace {

// `conv` is that of the layer prepared for inputs like this one.
Tensor convolve(Conv conv, const Tensor& input, const ConvLayer& layer, const InputNorm* input_norm,
                const std::optional<Tensor>& residual, const Activation& act,
                const std::vector<int64_t>& max_pool) {
  conv.act = act;
  conv.has_pool = !max_pool.empty();
  if (conv.has_pool) {
    FR_CHECK(layer.groups == 1 && !residual,
             "conv_bn_act: pooling goes with neither groups nor a residual");
    conv.pool = make_pool(max_pool, conv.P, conv.Q);
  }
  const int64_t P = conv.has_pool ? conv.pool.P : conv.P;
  const int64_t Q = conv.has_pool ? conv.pool.Q : conv.Q;
  Tensor output = empty_activation(conv.N, conv.K, P, Q, input.scalar_type(),
                                   is_channels_last(input) || is_channels_last(layer.weight));
  conv.input = input.const_data_ptr();
  conv.in = strides_of(input);
  conv.output = output.mutable_data_ptr();
  conv.out = strides_of(output);
  if (residual) {
    FR_CHECK(residual->dim() == 4 && residual->size(0) == conv.N && residual->size(1) <= conv.K &&
                 residual->size(2) == P && residual->size(3) == Q,
             "conv_bn_act: residual has shape ", shape_string(*residual), ", must have (", conv.N,
             ", ", conv.K, ", ", P, ", ", Q, "), or fewer channels");
    check_dtype("conv_bn_act", "residual", *residual, input.scalar_type());
    if (residual->size(1) > 0) conv.residual = residual->const_data_ptr();
    conv.res = strides_of(*residual);
    conv.res_skip = (conv.K - residual->size(1)) / 2;
    conv.res_channels = residual->size(1);
  }
  std::optional<Prologue> prologue;
  if (input_norm != nullptr) {
    prologue.emplace(*input_norm, conv.C, input.scalar_type());
    prologue->add_to(conv);
  }
  run_conv(conv);
  return output;
}

// A convolution without a prologue, in a plan.
class ConvStep : public PlanStep {
 public:
  ConvStep(PlanRecording& recording, const ConvLayer& layer, const Tensor& input,
           const Activation& act, const std::vector<int64_t>& max_pool)
      : layer_(lent(recording, layer)),
        prepared_(layer_, input.size(0), input.size(1), input.size(2), input.size(3),
                  input.scalar_type(), false),
        act_(act),
        max_pool_(max_pool) {}

  int64_t checks() const override { return 1; }
  bool is_current(int64_t) const override {
    return seems_current(layer_) && prepared_.has_norm_of(layer_);
  }
  Tensor run(const Tensor& input) const override {
    return convolve(prepared_.conv, input, layer_, nullptr, std::nullopt, act_, max_pool_);
  }
  Tensor run_adding(const Tensor& input, const Tensor& residual) const override {
    return convolve(prepared_.conv, input, layer_, nullptr, residual, act_, max_pool_);
  }

 private:
  const ConvLayer layer_;
  const PreparedLayer prepared_;
  const Activation act_;
  const std::vector<int64_t> max_pool_;
};

std::optional<Tensor> run(const Tensor& input, const ConvLayer& layer, const InputNorm* input_norm,
                          const std::optional<Tensor>& residual, const Activation& act,
                          const std::vector<int64_t>& max_pool) {
  check_rank("conv_bn_act", "input", input, 4);
  const PreparedLayer prepared(layer, input.size(0), input.size(1), input.size(2), input.size(3),
                               input.scalar_type());
  if (!prepared.is_current) return std::nullopt;
  Tensor output = convolve(prepared.conv, input, layer, input_norm, residual, act, max_pool);
  if (PlanRecording* recording = plan_recording(); recording && !input_norm) {
    recording->add(input, output,
                   std::make_unique<ConvStep>(*recording, layer, input, act, max_pool), residual);
  }
  return output;
}

Activation activation(int64_t kind, double first, double second) {
  FR_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Act::kGeluTanh), "conv_bn_act: activation is ",
           kind, ", must be one of those in activation.h");
  return {static_cast<Act>(kind), static_cast<float>(first), static_cast<float>(second)};
}

std::optional<Tensor> conv_bn_act_packed(
    Tensor input, Tensor weight, Tensor packed, Tensor running_mean, Tensor running_var,
    std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, double eps,
    std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
    int64_t dil_h, int64_t dil_w, int64_t groups, std::optional<Tensor> residual, int64_t act,
    double act_first, double act_second, std::vector<int64_t> max_pool) {
  return run(input,
             {weight, packed, running_mean, running_var, bn_weight, bn_bias, bias, eps, stride_h,
              stride_w, pad_h, pad_w, dil_h, dil_w, groups},
             nullptr, residual, activation(act, act_first, act_second), max_pool);
}

std::optional<Tensor> norm_conv_bn_act_packed(
    Tensor input, Tensor in_mean, Tensor in_var, std::optional<Tensor> in_weight,
    std::optional<Tensor> in_bias, double in_eps, Tensor weight, Tensor packed, Tensor running_mean,
    Tensor running_var, std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, double eps,
    std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w, int64_t pad_h, int64_t pad_w,
    int64_t dil_h, int64_t dil_w, int64_t groups, std::optional<Tensor> residual, int64_t act,
    double act_first, double act_second) {
  const InputNorm norm{in_mean, in_var, in_weight, in_bias, in_eps};
  return run(input,
             {weight, packed, running_mean, running_var, bn_weight, bn_bias, bias, eps, stride_h,
              stride_w, pad_h, pad_w, dil_h, dil_w, groups},
             &norm, residual, activation(act, act_first, act_second), {});
}

// "" where FUSED_RESNET_CPU_ISA is no instruction set, too: Python asks while it imports, and the
// first use is what is to fail.
std::string name_of(const ConvIsa* (*isa)()) {
  try {
    return isa() ? isa()->name : "";
  } catch (const std::exception&) {
    return "";
  }
}

std::string vector_isa_name() {
  return name_of(vector_isa);
}

std::string tile_isa_name() {
  return name_of(tile_isa);
}

std::string pair_isa_name() {
  return name_of(pair_isa);
}

std::vector<int64_t> cpu_pool_statistics() {
  const PoolStatistics s = pool_statistics();
  return {s.live_bytes, s.cached_bytes, s.system_allocations};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CompositeExplicitAutograd, m)
{
  m.impl("conv_isa", TORCH_BOX(&vector_isa_name));
  m.impl("conv_tile_isa", TORCH_BOX(&tile_isa_name));
  m.impl("conv_pair_isa", TORCH_BOX(&pair_isa_name));
  m.impl("float32_pixels_for_tiles", TORCH_BOX(&float32_pixels_for_tiles));
  m.impl("tiles_for_winograd", TORCH_BOX(&tiles_for_winograd));
  m.impl("set_float32_products", TORCH_BOX(&set_float32_products));
  m.impl("cpu_pool_statistics", TORCH_BOX(&cpu_pool_statistics));
  m.impl("cpu_pool_trim", TORCH_BOX(&pool_trim));
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("pack_conv_weight", TORCH_BOX(&pack_conv_weight));
  m.impl("conv_weight_is_packed", TORCH_BOX(&conv_weight_is_packed));
  m.impl("conv_bn_act_packed", TORCH_BOX(&conv_bn_act_packed));
  m.impl("norm_conv_bn_act_packed", TORCH_BOX(&norm_conv_bn_act_packed));
}

}  // namespace fused_resnet::cpu
