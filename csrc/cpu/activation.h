// What is applied behind batch norm and the shortcut, on float32 in memory; for any instruction
// set.
//
//   hardtanh     x < first ? first : x > second ? second : x          (ReLU6 with 0 and 6)
//   leaky_relu   x > 0 ? x : x first
//   silu         x / (1 + exp(-x))
//   hardswish    x (hardtanh(x + 3, 0, 6) / 6)
//   gelu         x Phi(x), with Phi(x) = (1 + erf(x / sqrt(2))) / 2
//   gelu_tanh    x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))     (its tanh written out)
//
// NaN stays NaN. Where eager's formula is infinity times zero, so is this one, and NaN: the last
// four at -infinity.
//
// And the derivatives, as torch has them:
//
//   hardtanh     0 where x <= first or x >= second, else 1
//   leaky_relu   x > 0 ? 1 : first
//   silu         S + x S (1 - S), with S = 1 / (1 + exp(-x))
//   hardswish    x <= -3 ? 0 : x < 3 ? x / 3 + 1/2 : 1
//   gelu         Phi(x) + x exp(-x^2 / 2) / sqrt(2 pi)
//   gelu_tanh    S + x S (1 - S) t', with t = 2 sqrt(2 / pi) (x + 0.044715 x^3), S of t
//
// No standard header beyond <cstdint> is included and everything with a body is in an anonymous
// namespace or static, because the including files are compiled for different instruction sets.
#pragma once

#include <cstdint>

#include "activations.h"

namespace fused_resnet::cpu {

namespace {

inline bool is_relu(const Activation& act) {
  return act.kind == Act::kRelu;
}

// Whether kernels leave it to activate().
inline bool is_other(const Activation& act) {
  return act.kind > Act::kRelu;
}

// Vectors of so many bytes. On 16 bytes every compiler knows what to do, whatever the processor.
template <int kBytes>
struct ActivationVectors {
  typedef float Vec __attribute__((vector_size(kBytes)));
  typedef int32_t VecInt __attribute__((vector_size(kBytes)));
  static constexpr int kLanes = kBytes / 4;

#define FR_ACTIVATION static inline __attribute__((always_inline))

  // A NaN compares false and stays.
  FR_ACTIVATION Vec clamped(Vec x, float least, float most) {
    x = x < least ? Vec{} + least : x;
    return x > most ? Vec{} + most : x;
  }

  // Within 0.8 units in the last place, subnormal results and infinity included.
  FR_ACTIVATION Vec exponential(Vec x) {
    x = clamped(x, -104.0f, 89.0f);  // beyond which it is 0 and infinity
    // 1.5 * 2^23: the sum has no digits behind the point, and ends in n as an integer.
    const Vec shifted = x * 1.44269504f + 12582912.0f;
    const Vec n = shifted - 12582912.0f;
    // log(2) in two parts, of which the first has few digits: its product with n is exact.
    const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
    // exp(r) = 1 + r + r^2 q(r), minimax on |r| <= log(2) / 2.
    Vec q = Vec{} + 1.3814466e-3f;
    q = q * r + 8.3687805e-3f;
    q = q * r + 4.1668394e-2f;
    q = q * r + 0.16666520f;
    q = q * r + 0.49999993f;
    const Vec power = (q * r) * r + r + 1.0f;
    // 2^n in two factors: 2^-150 and 2^129 are no float32.
    const VecInt whole = (VecInt)shifted - 0x4b400000;
    const VecInt half = whole >> 1;
    const Vec low = (Vec)((half + 127) << 23);
    const Vec high = (Vec)((whole - half + 127) << 23);
    return power * low * high;
  }

  FR_ACTIVATION Vec silu(Vec x) { return x / (1.0f + exponential(-x)); }

  FR_ACTIVATION Vec hardswish(Vec x) { return x * (clamped(x + 3.0f, 0.0f, 6.0f) * 0.16666667f); }

  // Phi(x).
  FR_ACTIVATION Vec normal_distribution(Vec x) {
    const Vec z = x * 0.707106781f;
    const Vec magnitude = clamped(z < 0.0f ? -z : z, 0.0f, 10.0f);
    const Vec square = magnitude * magnitude;
    // erf(z) = z p(z^2), minimax up to 0.93.
    Vec p = Vec{} - 5.9537418e-4f;
    p = p * square + 4.9859406e-3f;
    p = p * square - 2.6761720e-2f;
    p = p * square + 0.11281683f;
    p = p * square - 0.37612481f;
    p = p * square + 1.1283791f;
    // log(erfc(z)) = g(z) - z^2 from 0.9 to 9.5, minimax in erfc itself: no digits are lost where
    // Phi is small.
    Vec g = Vec{} - 3.8419570e-8f;
    g = g * magnitude + 1.9076460e-6f;
    g = g * magnitude - 4.1512456e-5f;
    g = g * magnitude + 5.2506339e-4f;
    g = g * magnitude - 4.3367249e-3f;
    g = g * magnitude + 2.5088464e-2f;
    g = g * magnitude - 0.10765288f;
    g = g * magnitude + 0.36562491f;
    g = g * magnitude - 1.1288041f;
    g = g * magnitude - 1.0529239e-5f;
    const Vec tail = 0.5f * exponential(g - square);
    const Vec central = 0.5f + 0.5f * (z * p);
    const Vec outer = z < 0.0f ? tail : 1.0f - tail;
    return magnitude > 0.92f ? outer : central;
  }

  FR_ACTIVATION Vec gelu(Vec x) { return x * normal_distribution(x); }

  FR_ACTIVATION Vec gelu_tanh(Vec x) {
    const Vec inner = x * (1.59576912f + 0.0713548162f * (x * x));
    return x / (1.0f + exponential(-inner));
  }

  // (x S(t))' where t' is the derivative of t.
  FR_ACTIVATION Vec logistic_derivative(Vec x, Vec t, Vec derivative) {
    const Vec s = 1.0f / (1.0f + exponential(-t));
    return s * (1.0f + x * (1.0f - s) * derivative);
  }

  FR_ACTIVATION Vec silu_derivative(Vec x) { return logistic_derivative(x, x, Vec{} + 1.0f); }

  FR_ACTIVATION Vec hardswish_derivative(Vec x) {
    const Vec inner = x < 3.0f ? x * 0.33333333f + 0.5f : Vec{} + 1.0f;
    return x <= -3.0f ? Vec{} : inner;
  }

  FR_ACTIVATION Vec gelu_derivative(Vec x) {
    const Vec density = 0.39894228f * exponential(-0.5f * (x * x));
    return normal_distribution(x) + x * density;
  }

  FR_ACTIVATION Vec gelu_tanh_derivative(Vec x) {
    const Vec square = x * x;
    return logistic_derivative(x, x * (1.59576912f + 0.0713548162f * square),
                               1.59576912f + 0.214064449f * square);
  }

#undef FR_ACTIVATION

  template <class F>
  static void each_pair(const float* values, float* grads, int64_t count, const F& f) {
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec* at = reinterpret_cast<Vec*>(grads + i);
      *at = f(*reinterpret_cast<const Vec*>(values + i), *at);
    }
  }

  template <class F>
  static void each(float* values, int64_t count, const F& f) {
    for (int64_t i = 0; i < count; i += kLanes) {
      Vec* at = reinterpret_cast<Vec*>(values + i);
      *at = f(*at);
    }
  }
};

// Of `count` values, whole vectors of them at a multiple of a vector's size. Not inline: kernels
// have one copy of it, beside which a call is nothing.
template <int kBytes>
__attribute__((noinline)) void activate(const Activation& activation, float* values,
                                        int64_t count) {
  using V = ActivationVectors<kBytes>;
  using Vec = typename V::Vec;
  const float first = activation.first, second = activation.second;
  switch (activation.kind) {
    case Act::kNone:
      return;
    case Act::kRelu:
      return V::each(values, count, [](Vec x) { return x <= 0.0f ? Vec{} : x; });
    case Act::kHardtanh:
      return V::each(values, count, [=](Vec x) { return V::clamped(x, first, second); });
    case Act::kLeakyRelu:
      return V::each(values, count, [=](Vec x) { return x > 0.0f ? x : x * first; });
    case Act::kSilu:
      return V::each(values, count, [](Vec x) { return V::silu(x); });
    case Act::kHardswish:
      return V::each(values, count, [](Vec x) { return V::hardswish(x); });
    case Act::kGelu:
      return V::each(values, count, [](Vec x) { return V::gelu(x); });
    case Act::kGeluTanh:
      return V::each(values, count, [](Vec x) { return V::gelu_tanh(x); });
  }
}

// Multiplies `grads` by the activation's derivative at `values`, else as `activate`.
template <int kBytes>
__attribute__((noinline)) void multiply_by_derivative(const Activation& activation,
                                                      const float* values, float* grads,
                                                      int64_t count) {
  using V = ActivationVectors<kBytes>;
  using Vec = typename V::Vec;
  const float first = activation.first, second = activation.second;
  switch (activation.kind) {
    case Act::kNone:
      return;
    case Act::kRelu:
      return V::each_pair(values, grads, count, [](Vec x, Vec g) { return x <= 0.0f ? Vec{} : g; });
    case Act::kHardtanh:
      return V::each_pair(values, grads, count, [=](Vec x, Vec g) {
        const Vec below = x >= second ? Vec{} : g;
        return x <= first ? Vec{} : below;
      });
    case Act::kLeakyRelu:
      return V::each_pair(values, grads, count,
                          [=](Vec x, Vec g) { return x > 0.0f ? g : g * first; });
    case Act::kSilu:
      return V::each_pair(values, grads, count,
                          [](Vec x, Vec g) { return g * V::silu_derivative(x); });
    case Act::kHardswish:
      return V::each_pair(values, grads, count,
                          [](Vec x, Vec g) { return g * V::hardswish_derivative(x); });
    case Act::kGelu:
      return V::each_pair(values, grads, count,
                          [](Vec x, Vec g) { return g * V::gelu_derivative(x); });
    case Act::kGeluTanh:
      return V::each_pair(values, grads, count,
                          [](Vec x, Vec g) { return g * V::gelu_tanh_derivative(x); });
  }
}

// Of kernels whose vectors have so many floats.
template <int64_t kWidth>
constexpr int kBytesOfActivation = kWidth == 1 ? 16 : static_cast<int>(4 * kWidth);

}  // namespace
}  // namespace fused_resnet::cpu
