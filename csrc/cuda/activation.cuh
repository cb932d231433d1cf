// What is applied behind batch norm and the residual, on float32 in registers.
//
//   hardtanh     x < first ? first : x > second ? second : x          (ReLU6 with 0 and 6)
//   leaky_relu   x > 0 ? x : x first
//   silu         x S(x), with S(t) = 1 / (1 + exp(-t))
//   hardswish    x (hardtanh(x + 3, 0, 6) / 6)
//   gelu         x erfc(-x / sqrt(2)) / 2
//   gelu_tanh    x S(2 sqrt(2 / pi) (x + 0.044715 x^3))               (its tanh written out)
//
// NaN stays NaN. Where eager's formula is infinity times zero, so is this one, and NaN: the last
// four at -infinity. ReLU and none are not here: kernels have max(x, floor) for these, in the code
// that they run by themselves.
#pragma once

#include "activations.h"
#include "cuda/device/special_functions.cuh"
#include "cuda/device/vector.cuh"

namespace fused_resnet {

// Which activations a kernel's instance has: ReLU and none, which are max(x, floor), the others, or
// all.
enum class Activations { kPlain, kOther, kAll };

// A NaN compares false and stays.
__device__ __forceinline__ float clamped(float x, float least, float most) {
  x = x < least ? least : x;
  return x > most ? most : x;
}

// x S(t), of an exponential that cannot overflow and a divisor from 1 to 2.
__device__ __forceinline__ float times_logistic(float x, float t) {
  const float power = expf(-fabsf(t));
  return (t < 0.f ? x * power : x) * device::approximate_reciprocal(1.f + power);
}

// Moves kCount values to the left by kBy places, the first ones to the end.
template <int kBy, int kCount>
__device__ __forceinline__ void rotate(float* values) {
  float first[kBy];
#pragma unroll
  for (int i = 0; i < kBy; ++i) first[i] = values[i];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    values[i] = i + kBy < kCount ? values[i + kBy] : first[i + kBy - kCount];
  }
}

// The activation of each value, the same one for all threads.
//
// A few at a time, so that every kernel has all formulas and is not much larger for it. Registers
// have no computed index: values come past the code in turn.
template <int kCount>
__device__ __forceinline__ void activate(const Activation& activation, float (&values)[kCount]) {
  constexpr int kAtOnce = kCount < 4 ? kCount : 4;
  static_assert(kCount % kAtOnce == 0);
  const float first = activation.first, second = activation.second;
  const auto each = [&](const auto& formula) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) values[i] = formula(values[i]);
  };
#pragma unroll 1
  for (int turn = 0; turn < kCount / kAtOnce; ++turn) {
    switch (activation.kind) {
      case Act::kNone:
        break;
      case Act::kRelu:
        each([](float x) { return device::at_least(0.f, x); });
        break;
      case Act::kHardtanh:
        each([=](float x) { return clamped(x, first, second); });
        break;
      case Act::kLeakyRelu:
        each([=](float x) { return x > 0.f ? x : x * first; });
        break;
      case Act::kHardswish:
        each([](float x) { return x * (clamped(x + 3.f, 0.f, 6.f) * (1.f / 6.f)); });
        break;
      case Act::kGelu:
        each([](float x) { return x * (0.5f * erfcf(x * -0.707106781f)); });
        break;
      case Act::kSilu:
      case Act::kGeluTanh:
        const bool is_cubic = activation.kind == Act::kGeluTanh;
        each([=](float x) {
          const float t = x * (1.59576912f + 0.0713548162f * (x * x));
          return times_logistic(x, is_cubic ? t : x);
        });
        break;
    }
    rotate<kAtOnce, kCount>(values);
  }
}

}  // namespace fused_resnet
