// The operator squeeze_excitation of the CPU backend (Hu et al., "Squeeze-and-Excitation Networks",
// section 3), of each image
//
//   out[c,h,w] = in[c,h,w] * gate(expand act(reduce mean_hw(in)))[c]
//
// with two linear layers, every step rounded to the dtype as the tensors between torch's operators
// are. Memory traffic: the input is read twice, weights and biases once for kMostImages images, the
// output is written once.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/activation.h"
#include "cpu/conv_layer.h"
#include "cpu/inference_plan.h"
#include "cpu/pool_linear.h"
#include "cpu/pool_linear_rows.h"
#include "cpu/scale_shift_act_operator.h"
#include "cpu/scale_shift_act_row.h"

namespace fused_resnet::cpu {
namespace {

constexpr const char* kOp = "squeeze_excitation";

// Values that a thread should have to work on at least.
constexpr int64_t kGrain = 16384;
// Channels whose mean a task takes: two lines of the cache.
constexpr int64_t kChannels = 64;

// The numbers are those of fused_resnet/layers/description.py, GATES.
enum class Gate : int64_t { kSigmoid, kHardsigmoid };

struct Layers {
  Tensor reduce;
  std::optional<Tensor> reduce_bias;
  Tensor expand;
  std::optional<Tensor> expand_bias;
  Activation act;
  Gate gate;
};

float gated(float x, Gate gate) {
  if (gate == Gate::kSigmoid) return 1 / (1 + std::exp(-x));
  x += 3;  // a NaN compares false and stays
  x = x < 0 ? 0 : x;
  return (x > 6 ? 6 : x) / 6;
}

void check_linear(const char* what, const Tensor& weight, const std::optional<Tensor>& bias,
                  int64_t K, int64_t C, ScalarType dtype) {
  check_rank(kOp, what, weight, 4);
  check_dtype(kOp, what, weight, dtype);
  FR_CHECK(weight.size(0) == K && weight.size(1) == C && weight.size(2) == 1 && weight.size(3) == 1,
           kOp, ": ", what, " has shape ", shape_string(weight), ", must have (", K, ", ", C,
           ", 1, 1)");
  FR_CHECK(C == 1 || weight.stride(1) == 1, kOp, ": the rows of ", what, " must be dense");
  if (!bias) return;
  check_dtype(kOp, what, *bias, dtype);
  FR_CHECK(bias->dim() == 1 && bias->size(0) == K && (K == 1 || bias->stride(0) == 1), kOp,
           ": the bias of ", what, " has shape ", shape_string(*bias), ", must be dense and have (",
           K, ",)");
}

// finish(n, k, count, values) of parts of out[n,k] = sum_c x[n,c] weight[k,c] + bias[k].
template <class Element, class Finish>
void linear(const PoolLinearRows& rows, const float* x, int64_t N, const Tensor& weight,
            const std::optional<Tensor>& bias, const Finish& finish) {
  const int64_t K = weight.size(0), C = weight.size(1), item = sizeof(Element);
  const char* w = static_cast<const char*>(weight.const_data_ptr());
  const char* b = bias ? static_cast<const char*>(bias->const_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, K, kGrain / C + 1, [&](int64_t begin, int64_t end) {
    for (int64_t n = 0; n < N; n += kMostImages) {
      const int64_t images = std::min(kMostImages, N - n), count = end - begin;
      std::vector<Element> out(static_cast<size_t>(images * count));
      for (int64_t k = begin; k < end; ++k) {
        rows.linear(x + n * C, images, C, w + k * weight.stride(0) * item,
                    b == nullptr ? nullptr : b + k * item, out.data() + k - begin, count);
      }
      for (int64_t i = 0; i < images; ++i) finish(n + i, begin, count, out.data() + i * count);
    }
  });
}

// A number as memory keeps it.
template <class Element>
float rounded(float x) {
  return static_cast<float>(static_cast<Element>(x));
}

// gate(expand act(reduce mean)) of (N, C) means.
template <class Element>
void excite(const PoolLinearRows& rows, const float* mean, int64_t N, const Layers& layers,
            float* hidden, float* scale) {
  const int64_t R = layers.reduce.size(0), C = layers.expand.size(0);
  linear<Element>(rows, mean, N, layers.reduce, layers.reduce_bias,
                  [&](int64_t n, int64_t begin, int64_t count, const Element* out) {
                    // Activations are of sixteen at a time.
                    std::vector<float> values(static_cast<size_t>((count + 15) / 16 * 16));
                    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<float>(out[i]);
                    if (is_relu(layers.act)) {
                      for (float& x : values) x = x <= 0 ? 0 : x;
                    } else {
                      activate<16>(layers.act, values.data(), (count + 15) / 16 * 16);
                    }
                    float* to = hidden + n * R + begin;
                    for (int64_t i = 0; i < count; ++i) to[i] = rounded<Element>(values[i]);
                  });
  linear<Element>(rows, hidden, N, layers.expand, layers.expand_bias,
                  [&](int64_t n, int64_t begin, int64_t count, const Element* out) {
                    float* to = scale + n * C + begin;
                    for (int64_t i = 0; i < count; ++i) {
                      to[i] = rounded<Element>(gated(static_cast<float>(out[i]), layers.gate));
                    }
                  });
}

// output = input * scale, a scale for each image's channel.
void multiply(const Tensor& input, const float* scale, const Tensor& output) {
  const ScaleShiftActRow row = scale_shift_act_row(input.scalar_type());
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  const int64_t item = static_cast<int64_t>(input.element_size());
  const Strides in = strides_of(input), out = strides_of(output);
  const char* from = static_cast<const char*>(input.const_data_ptr());
  char* to = static_cast<char*>(output.mutable_data_ptr());
  if (in.c == 1 && out.c == 1) {
    const std::vector<float> zeros(static_cast<size_t>(C));
    torch::stable::parallel_for(0, N * H * W, kGrain / C + 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t n = i / (H * W), h = i / W % H, w = i % W;
        row(from + (n * in.n + h * in.h + w * in.w) * item, scale + n * C, zeros.data(), nullptr,
            to + (n * out.n + h * out.h + w * out.w) * item, C, false, {}, false, nullptr);
      }
    });
    return;
  }
  constexpr float kZero = 0;
  torch::stable::parallel_for(0, N * C, kGrain / (H * W) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / C, c = i % C;
      for (int64_t h = 0; h < H; ++h) {
        row(from + (n * in.n + c * in.c + h * in.h) * item, scale + i, &kZero, nullptr,
            to + (n * out.n + c * out.c + h * out.h) * item, W, true, {}, false, nullptr);
      }
    }
  });
}

Tensor run(const Tensor& input, const Layers& layers) {
  check_rank(kOp, "input", input, 4);
  const ScalarType dtype = input.scalar_type();
  const int64_t N = input.size(0), C = input.size(1), R = layers.reduce.size(0);
  FR_CHECK(C > 0 && R > 0, kOp, ": input has ", C, " channels and reduce_weight leaves ", R,
           ", must be at least one each");
  check_linear("reduce_weight", layers.reduce, layers.reduce_bias, R, C, dtype);
  check_linear("expand_weight", layers.expand, layers.expand_bias, C, R, dtype);
  const PoolLinearRows& rows = pool_linear_rows_for(kernel_dtype(dtype));
  const Strides in = strides_of(input);
  const PooledImage image{input.size(2), input.size(3), in.c, in.h, in.w};
  FR_CHECK(image.H > 0 && image.W > 0 && image.H <= kMostPooledPixels / image.W, kOp,
           ": input has shape ", shape_string(input), ", must have 1 to ", kMostPooledPixels,
           " pixels an image");
  FR_CHECK(in.c == 1 || in.w == 1, kOp, ": input has neither channels nor pixels side by side");
  const bool last = in.c == 1 && is_channels_last(input);
  FR_CHECK(last || in.w == 1, kOp, ": input must be dense in a line of pixels or channels_last");
  const Tensor means = pool_tensor({N, C}, {C, 1}, ScalarType::Float);
  const Tensor hidden = pool_tensor({N, R}, {R, 1}, ScalarType::Float);
  const Tensor scales = pool_tensor({N, C}, {C, 1}, ScalarType::Float);
  auto* mean = static_cast<float*>(means.mutable_data_ptr());
  auto* scale = static_cast<float*>(scales.mutable_data_ptr());
  const char* from = static_cast<const char*>(input.const_data_ptr());
  const int64_t item = static_cast<int64_t>(input.element_size());
  const int64_t parts = div_up(C, kChannels);
  const int64_t grain = kGrain / (kChannels * image.H * image.W) + 1;
  torch::stable::parallel_for(0, N * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = i / parts, c = i % parts * kChannels;
      rows.mean(from + (n * in.n + c * in.c) * item, image, std::min(kChannels, C - c),
                mean + n * C + c);
    }
  });
  auto* reduced = static_cast<float*>(hidden.mutable_data_ptr());
  switch (dtype) {
    case ScalarType::BFloat16:
      excite<torch::headeronly::BFloat16>(rows, mean, N, layers, reduced, scale);
      break;
    case ScalarType::Half:
      excite<torch::headeronly::Half>(rows, mean, N, layers, reduced, scale);
      break;
    default:
      excite<float>(rows, mean, N, layers, reduced, scale);
  }
  // Of one pixel torch's product with the factors is contiguous.
  const bool lies_last = last && image.H * image.W > 1;
  Tensor output = empty_activation(N, C, image.H, image.W, dtype, lies_last);
  multiply(input, scale, output);
  return output;
}

class SqueezeExcitationStep : public PlanStep {
 public:
  SqueezeExcitationStep(PlanRecording& recording, const Layers& layers)
      : layers_{recording.lent(layers.reduce),
                recording.lent(layers.reduce_bias),
                recording.lent(layers.expand),
                recording.lent(layers.expand_bias),
                layers.act,
                layers.gate} {}

  Tensor run(const Tensor& input) const override { return cpu::run(input, layers_); }

 private:
  const Layers layers_;
};

Tensor squeeze_excitation(Tensor input, Tensor reduce_weight, std::optional<Tensor> reduce_bias,
                          Tensor expand_weight, std::optional<Tensor> expand_bias, int64_t act,
                          double act_first, double act_second, int64_t gate) {
  FR_CHECK(act >= 0 && act <= static_cast<int64_t>(Act::kGeluTanh), kOp, ": activation is ", act,
           ", must be one of those in activations.h");
  FR_CHECK(gate == 0 || gate == 1, kOp, ": gate is ", gate, ", must be 0 or 1");
  check_rank(kOp, "reduce_weight", reduce_weight, 4);
  const Layers layers{
      reduce_weight,
      reduce_bias,
      expand_weight,
      expand_bias,
      {static_cast<Act>(act), static_cast<float>(act_first), static_cast<float>(act_second)},
      static_cast<Gate>(gate)};
  Tensor output = run(input, layers);
  if (PlanRecording* recording = plan_recording()) {
    recording->add(input, output, std::make_unique<SqueezeExcitationStep>(*recording, layers));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("squeeze_excitation", TORCH_BOX(&squeeze_excitation));
}

}  // namespace fused_resnet::cpu
