// The operator pool_linear of the CPU backend, a classifier: the mean over an image's pixels,
// rounded to its dtype as the tensor between torch's two operators is, and a linear layer.
//
//   out[n,k] = sum_c mean_hw(in[n,c,h,w]) * w[k,c]  +  bias[k]
//
// For few images, where reading the weight is what takes the time. Memory traffic: input and bias
// are read once, the weight once for kMostImages images, the output is written once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"
#include "cpu/isa.h"
#include "cpu/pool_linear.h"
#include "cpu/pool_linear_rows.h"

namespace fused_resnet::cpu {

const PoolLinearRows& pool_linear_rows_for(Dtype dtype) {
  const PoolLinearKernels* kernels = nullptr;
#if defined(__x86_64__)
  if (cpu_isa() == Isa::avx2) kernels = &pool_linear_avx2;
  if (cpu_isa() == Isa::avx512) kernels = &pool_linear_avx512;
#endif
  FR_CHECK(kernels != nullptr, "pool_linear: this processor has neither AVX2 nor AVX-512");
  switch (dtype) {
    case Dtype::kBFloat16:
      return kernels->bfloat16;
    case Dtype::kFloat16:
      return kernels->float16;
    default:
      return kernels->float32;
  }
}

namespace {

// Channels whose mean a task takes: two lines of the cache.
constexpr int64_t kChannels = 64;

Tensor pool_and_multiply(const Tensor& input, const Tensor& weight,
                         const std::optional<Tensor>& bias) {
  constexpr const char* op = "pool_linear";
  check_rank(op, "input", input, 4);
  check_rank(op, "weight", weight, 2);
  const ScalarType dtype = input.scalar_type();
  check_dtype(op, "weight", weight, dtype);
  const PoolLinearRows& rows = pool_linear_rows_for(kernel_dtype(dtype));
  const Strides in = strides_of(input);
  const int64_t N = input.size(0), C = input.size(1), K = weight.size(0);
  const int64_t item = static_cast<int64_t>(input.element_size());
  const PooledImage image{input.size(2), input.size(3), in.c, in.h, in.w};
  FR_CHECK(image.H > 0 && image.W > 0, op, ": input has shape ", shape_string(input),
           ", must have pixels");
  FR_CHECK(image.H <= kMostPooledPixels / image.W, op, ": input has shape ", shape_string(input),
           ", must have at most ", kMostPooledPixels, " pixels an image");
  FR_CHECK(in.c == 1 || in.w == 1, op, ": input has neither channels nor pixels side by side");
  FR_CHECK(weight.size(1) == C, op, ": weight has ", weight.size(1), " input features, input has ",
           C, " channels");
  FR_CHECK(weight.stride(1) == 1, op, ": weight's rows must be dense");
  if (bias) {
    check_dtype(op, "bias", *bias, dtype);
    FR_CHECK(bias->dim() == 1 && bias->size(0) == K && bias->stride(0) == 1, op,
             ": bias has shape ", shape_string(*bias), ", must be dense and have (", K, ",)");
  }
  Tensor output = pool_tensor({N, K}, {K, 1}, dtype);
  const Tensor mean = pool_tensor({N, C}, {C, 1}, ScalarType::Float);
  auto* x = static_cast<float*>(mean.mutable_data_ptr());
  const char* from = static_cast<const char*>(input.const_data_ptr());
  const int64_t parts = div_up(C, kChannels);
  torch::stable::parallel_for(0, N * parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts, c = i % parts * kChannels;
      rows.mean(from + (n * in.n + c * in.c) * item, image, std::min(kChannels, C - c),
                x + n * C + c);
    }
  });
  const char* w = static_cast<const char*>(weight.const_data_ptr());
  const char* b = bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr;
  char* out = static_cast<char*>(output.mutable_data_ptr());
  torch::stable::parallel_for(0, K, 16, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      for (int64_t n = 0; n < N; n += kMostImages) {
        rows.linear(x + n * C, std::min(kMostImages, N - n), C, w + k * weight.stride(0) * item,
                    b == nullptr ? nullptr : b + k * item, out + (n * K + k) * item, K);
      }
    }
  });
  return output;
}

class HeadStep : public PlanStep {
 public:
  HeadStep(PlanRecording& recording, const Tensor& weight, const std::optional<Tensor>& bias)
      : weight_(recording.lent(weight)), bias_(recording.lent(bias)) {}

  Tensor run(const Tensor& input) const override {
    return pool_and_multiply(input, weight_, bias_);
  }

 private:
  const Tensor weight_;
  const std::optional<Tensor> bias_;
};

Tensor pool_linear(Tensor input, Tensor weight, std::optional<Tensor> bias) {
  Tensor output = pool_and_multiply(input, weight, bias);
  if (PlanRecording* recording = plan_recording()) {
    recording->add(input, output, std::make_unique<HeadStep>(*recording, weight, bias));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("pool_linear", TORCH_BOX(&pool_linear));
}

}  // namespace fused_resnet::cpu
