// The operator quantized_pool_linear of the CPU backend: a network's classifier in eight bits, as
// `reference.quantized_pool_linear` has it. With q the input's bytes, zero point 0,
//
//   pooled[n, c] = clamp(round to nearest even(float(sum over h, w of q[n, c, h, w]) * factor),
//                        0, 255),   factor = step / (H W pooled_step), rounded to float32 once,
//   out[n, k]    = float(sum over c of pooled[n, c] * w[k, c]) * scale[k] + bias[k],
//
// sums exact in 32 bits, each float32 operation rounded on its own.
//
// Memory traffic: the input is read once, the weight's bytes once for all images whose pooled bytes
// stay in the first-level cache; output and vectors once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"
#include "cpu/quantized/layers.h"
#include "memory_format.h"

namespace fused_resnet::cpu {
namespace {

constexpr const char* kOp = "quantized_pool_linear";

// Of an image, whose bytes' sum has 32 bits; LARGEST_POOL of layers/quantized.py.
constexpr int64_t kMostPixels = INT32_MAX / 255;

// Channels that a task pools.
constexpr int64_t kChannels = 256;

// Images whose sums with a row of weights are taken together.
constexpr int64_t kImages = 8;

class ByteHead : public PlanStep {
 public:
  ByteHead(const Tensor& input, Tensor weight, Tensor scale, Tensor bias, double step,
           double pooled_step, const std::string& kernels_name)
      : weight_(std::move(weight)),
        scale_(std::move(scale)),
        bias_(std::move(bias)),
        kernels_(byte_kernels(kOp, kernels_name)),
        inverse_(static_cast<float>(1 / step)) {
    check_rank(kOp, "input", input, 4);
    byte_float_type(kOp, input.scalar_type());
    check_rank(kOp, "weight", weight_, 2);
    const int64_t K = weight_.size(0), C = weight_.size(1), H = input.size(2), W = input.size(3);
    FR_CHECK(weight_.scalar_type() == ScalarType::Char && weight_.is_contiguous(), kOp,
             ": weight must be int8 and contiguous");
    FR_CHECK(input.size(1) == C, kOp, ": weight has ", C, " input features, input has ",
             input.size(1), " channels");
    FR_CHECK(C <= kMostPixels / 128, kOp, ": weight has ", C,
             " input features, too many for sums of 32 bits");
    FR_CHECK(H > 0 && W > 0 && H <= kMostPixels / W, kOp, ": input has shape ", shape_string(input),
             ", must have 1 to ", kMostPixels, " pixels an image");
    check_vector(kOp, "scale", scale_, K, ScalarType::Float);
    check_vector(kOp, "bias", bias_, K, ScalarType::Float);
    for (const double value : {step, pooled_step}) {
      FR_CHECK(std::isfinite(value) && value > 0, kOp, ": a step is ", value,
               ", must be finite and above zero");
    }
    factor_ = static_cast<float>(step / (static_cast<double>(H * W) * pooled_step));
  }

  Tensor run(const Tensor& input) const override {
    const int64_t N = input.size(0), C = weight_.size(1), K = weight_.size(0);
    Tensor output = pool_tensor({N, K}, {K, 1}, input.scalar_type());
    if (output.numel() == 0) return output;
    const int64_t pitch = bytes_round_up(C, kByteChunk);
    const Tensor pooled = pool_tensor({N, pitch}, {pitch, 1}, ScalarType::Byte);
    auto* x = static_cast<uint8_t*>(pooled.mutable_data_ptr());
    const int64_t parts = div_up(C, kChannels);
    torch::stable::parallel_for(0, N * parts, 2, [&](int64_t begin, int64_t end) {
      Pool pool(*this, input);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / parts, c = i % parts * kChannels;
        pool.run(n, c, std::min(kChannels, C - c), x + n * pitch + c);
      }
    });
    switch (input.scalar_type()) {
      case ScalarType::Half:
        multiply<torch::headeronly::Half>(x, pitch, output);
        break;
      case ScalarType::BFloat16:
        multiply<torch::headeronly::BFloat16>(x, pitch, output);
        break;
      default:
        multiply<float>(x, pitch, output);
    }
    return output;
  }

 private:
  // The pooled bytes of some channels of an image.
  class Pool {
   public:
    Pool(const ByteHead& head, const Tensor& input)
        : head_(head),
          type_(byte_float_type(kOp, input.scalar_type())),
          strides_(strides_of(input)),
          item_(static_cast<int64_t>(input.element_size())),
          H_(input.size(2)),
          W_(input.size(3)),
          data_(static_cast<const char*>(input.const_data_ptr())),
          bytes_(static_cast<size_t>(std::max(kChannels, W_))),
          elements_(static_cast<size_t>(std::max(kChannels, W_) * item_)) {}

    void run(int64_t n, int64_t c, int64_t count, uint8_t* target) {
      int32_t sums[kChannels] = {};
      const char* source = data_ + (n * strides_.n + c * strides_.c) * item_;
      // Channels or a line's pixels at a time, whichever lie side by side.
      if (strides_.w == 1 && strides_.c != 1) {
        for (int64_t k = 0; k < count; ++k, source += strides_.c * item_) {
          for (int64_t h = 0; h < H_; ++h) {
            quantize(source + h * strides_.h * item_, 1, W_);
            for (int64_t w = 0; w < W_; ++w) sums[k] += bytes_[w];
          }
        }
      } else {
        for (int64_t h = 0; h < H_; ++h) {
          for (int64_t w = 0; w < W_; ++w) {
            quantize(source + (h * strides_.h + w * strides_.w) * item_, strides_.c, count);
            head_.kernels_.add_bytes(bytes_.data(), count, sums);
          }
        }
      }
      for (int64_t k = 0; k < count; ++k) {
        const float steps = std::nearbyint(static_cast<float>(sums[k]) * head_.factor_);
        target[k] = static_cast<uint8_t>(std::min(steps, 255.0f));
      }
    }

   private:
    void quantize(const char* source, int64_t stride, int64_t count) {
      const void* from = source;
      if (stride != 1) {
        gather_elements(source, stride, count, item_, elements_.data());
        from = elements_.data();
      }
      head_.kernels_.quantize(type_, from, count, head_.inverse_, 0, bytes_.data());
    }

    const ByteHead& head_;
    ByteFloats type_;
    Strides strides_;
    int64_t item_, H_, W_;
    const char* data_;
    std::vector<uint8_t> bytes_;
    std::vector<char> elements_;
  };

  template <class T>
  void multiply(const uint8_t* pooled, int64_t pitch, Tensor& output) const {
    const int64_t N = output.size(0), K = output.size(1), C = weight_.size(1);
    const auto* weight = static_cast<const int8_t*>(weight_.const_data_ptr());
    const auto* scale = static_cast<const float*>(scale_.const_data_ptr());
    const auto* bias = static_cast<const float*>(bias_.const_data_ptr());
    auto* out = static_cast<T*>(output.mutable_data_ptr());
    torch::stable::parallel_for(0, K, 16, [&](int64_t begin, int64_t end) {
      int32_t sums[kImages];
      for (int64_t n = 0; n < N; n += kImages) {
        const int64_t images = std::min(kImages, N - n);
        for (int64_t k = begin; k < end; ++k) {
          kernels_.multiply_row(pooled + n * pitch, images, pitch, weight + k * C, C, sums);
          for (int64_t i = 0; i < images; ++i) {
            const float scaled = static_cast<float>(sums[i]) * scale[k];
            out[(n + i) * K + k] = static_cast<T>(scaled + bias[k]);
          }
        }
      }
    });
  }

  const Tensor weight_, scale_, bias_;
  const ByteKernels& kernels_;
  const float inverse_;
  float factor_;
};

Tensor quantized_pool_linear(Tensor input, Tensor weight, Tensor scale, Tensor bias, double step,
                             double pooled_step, std::string kernels_name) {
  auto head = std::make_unique<ByteHead>(input, std::move(weight), std::move(scale),
                                         std::move(bias), step, pooled_step, kernels_name);
  Tensor output = head->run(input);
  if (PlanRecording* recording = plan_recording()) {
    recording->add(input, output, std::move(head));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("quantized_pool_linear", TORCH_BOX(&quantized_pool_linear));
}

}  // namespace fused_resnet::cpu
