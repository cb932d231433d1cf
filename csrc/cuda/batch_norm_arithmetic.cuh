// What a thread does with the values of batch norm that it has: the arithmetic of statistics, of
// the norm, and of what is behind it, the same for all kernels, so that they agree to the bit where
// they are given the same statistics.
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

// Mean and sum of squared deviations from it, of `count` values; two become one after Chan, Golub
// and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979),
// equation 2.1. Nothing in it is of the size of the mean squared, so nothing large cancels; and the
// values are taken from an origin near their mean, so that a mean is rounded to digits of its own.
struct Merge {
  float share, product;

  // Of `added` values with `count` others.
  __device__ __forceinline__ Merge(float count, float added)
      : share(added / (count + added)), product(count * share) {}

  __device__ __forceinline__ void operator()(float& mean, float& squares, float other_mean,
                                             float other_squares) const {
    const float difference = other_mean - mean;
    squares += other_squares + difference * product * difference;
    // An infinite mean stays what it is, unless it meets its opposite.
    mean = mean - mean == 0 ? mean + difference * share : mean + other_mean;
  }
};

// A thread's `values`: N means, N sums of squares, and how many values they are of.
template <int N>
__device__ __forceinline__ void merge_moments(float (&values)[2 * N + 1],
                                              const float (&others)[2 * N + 1]) {
  float& count = values[2 * N];
  const float added = others[2 * N];
  if (added == 0) return;
  const Merge merge(count, added);
#pragma unroll
  for (int i = 0; i < N; ++i) merge(values[i], values[N + i], others[i], others[N + i]);
  count += added;
}

// The same for values of kCount rows, less their channels' origins.
template <typename T, int N, int kCount>
__device__ __forceinline__ void add_rows(float (&moments)[2 * N + 1],
                                         const Vector<T, N> (&x)[kCount],
                                         const float (&origin)[N]) {
  float& count = moments[2 * N];
  const Merge merge(count, kCount);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float sum = 0, squares = 0;
#pragma unroll
    for (int r = 0; r < kCount; ++r) sum += widen(x[r].values[i]) - origin[i];
    const float mean = sum / kCount;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const float deviation = widen(x[r].values[i]) - origin[i] - mean;
      squares += deviation * deviation;
    }
    merge(moments[i], moments[N + i], mean, squares);
  }
  count += kCount;
}

// The origin of N channels: their first values, or 0 for infinite ones, since infinity less
// infinity would be no number.
template <typename T, int N>
__device__ __forceinline__ void load_origin(float (&origin)[N], const T* first_row) {
  const auto first = device::load<T, N>(first_row);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = widen(first.values[i]);
    origin[i] = x - x == 0 ? x : 0.f;
  }
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
    sums[N + i] += gradient * (value - mean[i]);
  }
}

}  // namespace fused_resnet
