// What a thread does with the values of batch norm that it has: the arithmetic of statistics, of
// the norm, and of what is behind it, the same for all kernels, so that they agree to the bit where
// they are given the same statistics. The compiler joins a product and a sum to one multiply-add as
// it sees fit, differently in different instances of a kernel, so here each is written out: a
// product that is added to something is a `__fmul_rn` or part of a `__fmaf_rn`.
#pragma once

#include <type_traits>

#include "cuda/batch_norm.h"
#include "cuda/device/vector.cuh"

namespace fused_resnet {

using device::load_streaming;
using device::narrow;
using device::Vector;
using device::widen;

// ---- statistics ---------------------------------------------------------------------------------

// Mean, what rounding left out of it, and variance of `count` values; two become one after Chan,
// Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances"
// (1979), equation 2.1. Nothing in it is of the size of the mean squared, so nothing large cancels;
// and a variance, unlike a sum of squares, overflows only if it has to. Values are taken less an
// origin, so that the mean of many that lie far from zero is rounded to digits of its own.
struct Merge {
  float share, kept;

  // Of `added` values with `count` others.
  __device__ __forceinline__ Merge(float count, float added)
      : share(added / (count + added)), kept(count / (count + added)) {}

  __device__ __forceinline__ void operator()(float& mean, float& rest, float& var, float other_mean,
                                             float other_rest, float other_var) const {
    const float difference = (other_mean - mean) + (other_rest - rest);
    // First a share of it, which is nothing where there is nothing before: squares may overflow.
    const float within = __fmaf_rn(kept, var, __fmul_rn(share, other_var));
    var = __fmaf_rn(difference * (kept * share), difference, within);
    const float step = __fmul_rn(difference, share), sum = mean + step;
    // What the sum's rounding took (Knuth, The Art of Computer Programming, vol. 2, 4.2.2).
    const float of_step = sum - mean;
    const float lost = (mean - (sum - of_step)) + (step - of_step);
    // An infinite mean stays what it is, unless it meets its opposite.
    const bool is_finite = sum - sum == 0;
    rest = is_finite ? rest + lost : 0.f;
    mean = is_finite ? sum : mean + other_mean;
  }
};

// A thread's `values`: N means, N rests, N variances, and how many values they are of.
template <int N>
__device__ __forceinline__ void merge_moments(float (&values)[3 * N + 1],
                                              const float (&others)[3 * N + 1]) {
  float& count = values[3 * N];
  const float added = others[3 * N];
  if (added == 0) return;
  const Merge merge(count, added);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    merge(values[i], values[N + i], values[2 * N + i], others[i], others[N + i], others[2 * N + i]);
  }
  count += added;
}

// The sum of value(first) to value(first + kCount - 1), a power of two, in pairs: of equal values
// it is exact.
template <int kCount, typename Value>
__device__ __forceinline__ float sum_of(const Value& value, int first = 0) {
  if constexpr (kCount == 1) {
    return value(first);
  } else {
    return sum_of<kCount / 2>(value, first) + sum_of<kCount / 2>(value, first + kCount / 2);
  }
}

// merge_moments for values of kCount rows, less their channels' origins.
template <typename T, int N, int kCount>
__device__ __forceinline__ void add_rows(float (&moments)[3 * N + 1],
                                         const Vector<T, N> (&x)[kCount],
                                         const float (&origin)[N]) {
  constexpr float kShare = 1.f / kCount;  // exact
  float& count = moments[3 * N];
  const Merge merge(count, kCount);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const auto value = [&](int r) { return widen(x[r].values[i]) - origin[i]; };
    const float mean = __fmul_rn(sum_of<kCount>(value), kShare);
    const float squares = sum_of<kCount>([&](int r) {
      const float deviation = value(r) - mean;
      return __fmul_rn(deviation, deviation);
    });
    const float var = __fmul_rn(squares, kShare);
    merge(moments[i], moments[N + i], moments[2 * N + i], mean, 0.f, var);
  }
  count += kCount;
}

// What to take values less of, by three of them: zero, or a number near most of them.
//
// The median, since one of the three may be an outlier. A small origin would cost the mean digits,
// and so would one of more digits than the values have: both would round all values of a binade to
// the same side.
__device__ __forceinline__ float origin_of(float first, float second, float third) {
  const float low = fminf(first, second), high = fmaxf(first, second);
  const float median = fmaxf(low, fminf(high, third));
  const float apart = fmaxf(high, third) - fminf(low, third);
  // Rounds to a multiple of a quarter to a half of what is apart.
  const float large = __fmul_rn(apart, 0x1p22f);
  const float origin = fabsf(median) > 2 * apart ? (median + large) - large : 0.f;
  // That of infinite values would make NaN of the mean, which is infinite.
  return origin - origin == 0 ? origin : 0.f;
}

// The origin of N channels, by the tensor's first, middle and last row.
template <typename T, int N>
__device__ __forceinline__ void load_origin(float (&origin)[N], const T* input, int64_t rows,
                                            int channels, int channel) {
  const auto load = [&](int64_t row) {
    return device::load<T, N>(input + row * channels + channel);
  };
  const auto first = load(0), second = load(rows / 2), third = load(rows - 1);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    origin[i] = origin_of(widen(first.values[i]), widen(second.values[i]), widen(third.values[i]));
  }
}

// An origin and a mean less it, as one number, rounded once.
__device__ __forceinline__ float mean_of(float origin, float mean, float rest) {
  const float sum = origin + mean, of_mean = sum - origin;
  const float lost = (origin - (sum - of_mean)) + (mean - of_mean);
  return sum - sum == 0 ? sum + (lost + rest) : sum;
}

// ---- normalise ----------------------------------------------------------------------------------

// A channel's batch norm as one multiply-add. The shift belongs to the scale as it was rounded.
struct Affine {
  float mean, invstd, scale, shift;
};

__device__ __forceinline__ Affine affine_of(float mean, float var, const Norm& norm, int channel) {
  const float invstd = 1.f / sqrtf(var + norm.eps);
  const float scale = norm.weight != nullptr ? norm.weight[channel] * invstd : invstd;
  const float bias = norm.bias != nullptr ? norm.bias[channel] : 0.f;
  return {mean, invstd, scale, __fmaf_rn(-mean, scale, bias)};
}

__device__ __forceinline__ Affine affine_of(const Norm& norm, int channel) {
  return affine_of(norm.mean[channel], norm.var[channel], norm, channel);
}

// Stores a bit for each value of an access: whether a gradient passes there, as it does at NaN.
// `offset` is the first one's in the tensor. Threads side by side put a byte together.
template <typename T, int N>
__device__ __forceinline__ void store_bits(uint8_t* mask, int64_t offset, const Vector<T, N>& y) {
  unsigned bits = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) bits |= static_cast<unsigned>(!(widen(y.values[i]) <= 0)) << i;
  if constexpr (N < Partition::kBitsInByte) {
    constexpr unsigned kSharing = Partition::kBitsInByte / N;
    const unsigned first = threadIdx.x % warpSize / kSharing * kSharing;
    const unsigned place = static_cast<unsigned>(offset) % Partition::kBitsInByte;
    bits <<= place;
#pragma unroll
    for (unsigned step = 1; step < kSharing; step *= 2) {
      bits |= __shfl_xor_sync(((1u << kSharing) - 1) << first, bits, step);
    }
    if (place > 0) return;
  }
  device::store(mask + offset / Partition::kBitsInByte,
                Vector<uint8_t, 1>{{static_cast<uint8_t>(bits)}});
}

// ---- backward -----------------------------------------------------------------------------------

// The gradient of an input, from that of its output, `through` the statistics or without.
__device__ __forceinline__ float input_gradient_of(bool through, float grad, float value,
                                                   float scale, float mean, float slope,
                                                   float offset) {
  const float direct = __fmul_rn(grad, scale);
  return through ? direct + __fmaf_rn(value - mean, slope, offset) : direct;
}

// x * invstd, zero where a variance is infinite, and with it perhaps x.
__device__ __forceinline__ float times_invstd(float x, float invstd) {
  return invstd == 0 ? 0.f : x * invstd;
}

// What a gradient has of the input's deviation through the statistics.
__device__ __forceinline__ float slope_of(float per_value, float dot, float invstd) {
  return times_invstd(per_value * dot, invstd) * invstd;
}

// The largest number that T stores as zero: half of the least that it has, since ties go to even.
template <typename T>
inline constexpr float kRoundsToZero = 0;
template <>
inline constexpr float kRoundsToZero<__half> = 0x1p-25f;
template <>
inline constexpr float kRoundsToZero<__nv_bfloat16> = 0x1p-134f;

// What tells of an access whether its gradients pass the activation, as far as it is in memory.
template <typename T, int N, Mask kMask>
struct Signs {
  Vector<T, N> outputs;
  unsigned bits;

  // Of the outputs or the bits, the first one's `offset` in.
  __device__ __forceinline__ void load(const void* signs, int64_t offset) {
    if constexpr (kMask == Mask::kOutput) {
      outputs = load_streaming<T, N>(static_cast<const T*>(signs) + offset);
    } else if constexpr (kMask == Mask::kBits) {
      const auto* byte = static_cast<const uint8_t*>(signs) + offset / Partition::kBitsInByte;
      bits = device::load<uint8_t, 1>(byte).values[0] >> offset % Partition::kBitsInByte;
    }
  }

  // Whether the i-th gradient passes. NaN lets it pass, as torch does.
  __device__ __forceinline__ bool passes(int i, float input, float scale, float shift) const {
    if constexpr (kMask == Mask::kEverywhere) {
      return true;
    } else if constexpr (kMask == Mask::kOutput) {
      return !(widen(outputs.values[i]) <= 0);
    } else if constexpr (kMask == Mask::kBits) {
      return (bits >> i & 1) != 0;
    } else {
      return !(__fmaf_rn(input, scale, shift) <= kRoundsToZero<T>);
    }
  }
};

// sums += (g, g (x - mean)) for each of N channels, where g, the gradient, becomes 0 where it does
// not pass the activation.
template <typename T, int N, Mask kMask>
__device__ __forceinline__ void mask_and_add(float (&sums)[2 * N], Vector<T, N>& g,
                                             const Vector<T, N>& x, const Signs<T, N, kMask>& y,
                                             const float (&mean)[N], const float (&scale)[N],
                                             const float (&shift)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float value = widen(x.values[i]);
    if (!y.passes(i, value, scale[i], shift[i])) g.values[i] = narrow<T>(0.f);
    const float gradient = widen(g.values[i]);
    sums[i] += gradient;
    sums[N + i] = __fmaf_rn(gradient, value - mean[i], sums[N + i]);
  }
}

}  // namespace fused_resnet
