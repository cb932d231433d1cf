#include "cpu/conv_border.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>

namespace fused_resnet::cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

namespace {

float load(const void* tensor, int64_t place, Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return static_cast<const float*>(tensor)[place];
    case Dtype::kBFloat16:
      return static_cast<float>(static_cast<const BFloat16*>(tensor)[place]);
    default:
      return static_cast<float>(static_cast<const Half*>(tensor)[place]);
  }
}

void store(void* tensor, int64_t place, Dtype dtype, float value) {
  switch (dtype) {
    case Dtype::kFloat32:
      static_cast<float*>(tensor)[place] = value;
      return;
    case Dtype::kBFloat16:
      static_cast<BFloat16*>(tensor)[place] = static_cast<BFloat16>(value);
      return;
    default:
      static_cast<Half*>(tensor)[place] = static_cast<Half>(value);
  }
}

float rounded(float value, Dtype dtype) {
  float result;
  store(&result, 0, dtype, value);
  return load(&result, 0, dtype);
}

// NaN compares false and stays.
float relu(float x) {
  return x <= 0 ? 0 : x;
}

// A convolution and what its outputs are made of.
struct Terms {
  const Conv& conv;
  const PackedLayout& layout;

  int64_t row(int64_t p, int64_t tap) const {
    return p * conv.stride_h - conv.pad_h + tap / conv.S * conv.dil_h;
  }
  int64_t column(int64_t q, int64_t tap) const {
    return q * conv.stride_w - conv.pad_w + tap % conv.S * conv.dil_w;
  }
  bool is_inside(int64_t p, int64_t q, int64_t tap) const {
    const int64_t h = row(p, tap), w = column(q, tap);
    return h >= 0 && h < conv.H && w >= 0 && w < conv.W;
  }

  float weight(int64_t k, int64_t c, int64_t tap) const {
    const int64_t place = layout.place(k, c, tap);
    return layout.is_bfloat16()
               ? static_cast<float>(static_cast<const BFloat16*>(conv.weight)[place])
               : static_cast<const float*>(conv.weight)[place];
  }

  float input(int64_t c, int64_t h, int64_t w) const {
    const int64_t place = c * conv.in.c + h * conv.in.h + w * conv.in.w;
    const float x = load(conv.input, place, conv.dtype);
    if (conv.in_scale == nullptr) return x;
    return rounded(relu(std::fma(x, conv.in_scale[c], conv.in_shift[c])), conv.dtype);
  }

  // The taps of an output channel with a weight that is not finite.
  std::vector<int64_t> infinite_taps(int64_t k) const {
    std::vector<int64_t> taps;
    for (int64_t tap = 0; tap < layout.taps; ++tap) {
      for (int64_t c = 0; c < layout.C; ++c) {
        if (std::isfinite(weight(k, c, tap))) continue;
        taps.push_back(tap);
        break;
      }
    }
    return taps;
  }

  // Of the convolution, behind batch norm, residual and activation. See conv.h.
  float output(int64_t k, int64_t p, int64_t q) const {
    const int64_t first = k / (conv.K / conv.groups) * layout.C;
    double sum = 0;
    // A sum that is NaN stays so: in a network without a finite weight most end at once.
    for (int64_t tap = 0; tap < layout.taps && sum == sum; ++tap) {
      if (!is_inside(p, q, tap)) continue;
      const int64_t h = row(p, tap), w = column(q, tap);
      for (int64_t c = 0; c < layout.C && sum == sum; ++c) {
        sum += static_cast<double>(input(first + c, h, w)) * static_cast<double>(weight(k, c, tap));
      }
    }
    const Norm& norm = conv.norm;
    const float scale =
        (norm.weight ? norm.weight[k] : 1) / std::sqrt((norm.var ? norm.var[k] : 1) + norm.eps);
    const float bias = conv.bias ? conv.bias[k] : 0;
    // As in the kernels an infinite scale gets the bias before it.
    const bool infinite = !std::isfinite(scale);
    const float centre = (infinite ? 0 : bias) - (norm.mean ? norm.mean[k] : 0);
    const float shift = std::fma(centre, scale, norm.bias ? norm.bias[k] : 0);
    float y = std::fma(static_cast<float>(sum) + (infinite ? bias : 0), scale, shift);
    const int64_t channel = k - conv.res_skip;
    if (conv.residual != nullptr && channel >= 0 && channel < conv.res_channels) {
      const int64_t place = channel * conv.res.c + p * conv.res.h + q * conv.res.w;
      y += load(conv.residual, place, conv.dtype);
    }
    // Vectors of 16 bytes need no instructions that are asked for at run time.
    alignas(16) float values[4] = {y};
    activate<16>(conv.act, values, 4);
    return values[0];
  }
};

// The outputs of the convolution in one window of the pool: one, if there is none.
struct Window {
  int64_t p_begin, p_end, q_begin, q_end;

  Window(const Conv& conv, int64_t p, int64_t q)
      : p_begin(p), p_end(p + 1), q_begin(q), q_end(q + 1) {
    if (!conv.has_pool) return;
    const MaxPool& pool = conv.pool;
    p_begin = p * pool.stride_h - pool.pad_h;
    q_begin = q * pool.stride_w - pool.pad_w;
    p_end = std::min(p_begin + pool.kernel_h, conv.P);
    q_end = std::min(q_begin + pool.kernel_w, conv.Q);
    p_begin = std::max<int64_t>(p_begin, 0);
    q_begin = std::max<int64_t>(q_begin, 0);
  }

  // Whether f(p, q) holds for one of them.
  template <class F>
  bool any(F&& f) const {
    for (int64_t p = p_begin; p < p_end; ++p) {
      for (int64_t q = q_begin; q < q_end; ++q) {
        if (f(p, q)) return true;
      }
    }
    return false;
  }
};

}  // namespace

BorderOutputs::BorderOutputs(const Conv& conv, const PackedLayout& layout) {
  const Terms terms{conv, layout};
  const int64_t P = conv.has_pool ? conv.pool.P : conv.P;
  const int64_t Q = conv.has_pool ? conv.pool.Q : conv.Q;
  for (int64_t k = 0; k < conv.K; ++k) {
    const std::vector<int64_t> taps = terms.infinite_taps(k);
    const auto meets_padding = [&](int64_t p, int64_t q) {
      return std::any_of(taps.begin(), taps.end(),
                         [&](int64_t tap) { return !terms.is_inside(p, q, tap); });
    };
    if (taps.empty()) continue;
    for (int64_t p = 0; p < P; ++p) {
      for (int64_t q = 0; q < Q; ++q) {
        if (Window(conv, p, q).any(meets_padding)) outputs_.push_back({k, p, q, 0});
      }
    }
  }
  const auto count = static_cast<int64_t>(outputs_.size());
  torch::stable::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Output& output = outputs_[static_cast<size_t>(i)];
      output.value = -INFINITY;
      // Up to a NaN, which is the largest.
      Window(conv, output.p, output.q).any([&](int64_t p, int64_t q) {
        const float value = terms.output(output.k, p, q);
        if (!(value <= output.value)) output.value = value;
        return value != value;
      });
    }
  });
}

void BorderOutputs::store(const Conv& conv) const {
  for (const Output& output : outputs_) {
    const int64_t place = output.k * conv.out.c + output.p * conv.out.h + output.q * conv.out.w;
    cpu::store(conv.output, place, conv.dtype, output.value);
  }
}

}  // namespace fused_resnet::cpu
