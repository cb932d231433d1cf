// Reading a residual of fewer channels than the output as if there were zeros around it.
#pragma once

#include <type_traits>

#include "cuda/device/vector.cuh"
#include "cuda/narrow_residual.h"

namespace fused_resnet {

// What a kernel is given, by which of the two it is for.
template <typename T, bool kNarrow>
using ResidualOf = std::conditional_t<kNarrow, NarrowResidual, const T*>;

__device__ __forceinline__ bool is_there(const void* residual) {
  return residual != nullptr;
}
__device__ __forceinline__ bool is_there(const NarrowResidual&) {
  return true;
}

// The residual's first channel at a pixel of the output, which are numbered through.
template <typename T>
__device__ __forceinline__ const T* pixel_of(const NarrowResidual& residual, unsigned pixel) {
  const unsigned row = pixel / residual.Q, image = row / residual.P;
  return static_cast<const T*>(residual.values) + image * residual.n +
         (row - image * residual.P) * residual.h + (pixel - row * residual.Q) * residual.w;
}

__device__ __forceinline__ bool has_channel(const NarrowResidual& residual, int channel) {
  return static_cast<unsigned>(channel - residual.begin) < static_cast<unsigned>(residual.channels);
}

// How far a channel of the output is from the residual's first; accesses of several have them side
// by side.
template <int kWidth>
__device__ __forceinline__ int64_t channel_offset(const NarrowResidual& residual, int channel) {
  const int there = channel - residual.begin;
  return kWidth == 1 ? there * residual.c : there;
}

// Calls use(width) with the width of the residual's accesses, at most kMost, as a constant.
template <int kMost, typename Use>
__device__ __forceinline__ void for_width(const NarrowResidual& residual, const Use& use) {
  if constexpr (kMost == 1) {
    use(std::integral_constant<int, 1>{});
  } else if (residual.width == kMost) {
    use(std::integral_constant<int, kMost>{});
  } else {
    for_width<kMost / 2>(residual, use);
  }
}

// N channels of a pixel, from a multiple of N on.
template <typename T, int N>
__device__ __forceinline__ device::Vector<T, N> load_narrow(const NarrowResidual& residual,
                                                            const T* pixel, int channel) {
  device::Vector<T, N> loaded;
  for_width<N>(residual, [&](auto width) {
    constexpr int kWidth = width;
#pragma unroll
    for (int i = 0; i < N; i += kWidth) {
      device::Vector<T, kWidth> part{};  // zeros
      if (has_channel(residual, channel + i)) {
        part = device::load_streaming<T, kWidth>(pixel +
                                                 channel_offset<kWidth>(residual, channel + i));
      }
#pragma unroll
      for (int e = 0; e < kWidth; ++e) loaded.values[i + e] = part.values[e];
    }
  });
  return loaded;
}

}  // namespace fused_resnet
