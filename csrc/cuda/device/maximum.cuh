// The greater of two 16-bit numbers, two at a time. A NaN is greater than anything.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>
#include <type_traits>

#include "cuda/device/vector.cuh"

namespace fused_resnet::device {

// T is __half or __nv_bfloat16.
template <typename T>
__device__ __forceinline__ uint32_t greater_of_pairs(uint32_t a, uint32_t b) {
#ifdef FUSED_RESNET_ON_HOST
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    const auto number = [&](uint32_t bits) {
      return widen(std::bit_cast<T>(static_cast<uint16_t>(bits >> shift)));
    };
    const float x = number(a), y = number(b);
    const uint32_t chosen = x > y || x != x ? a : b;
    result |= chosen & 0xffffu << shift;
  }
  return result;
#else
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  Pair x, y;
  memcpy(&x, &a, sizeof(x));
  memcpy(&y, &b, sizeof(y));
  const Pair greater = __hmax2_nan(x, y);
  uint32_t result;
  memcpy(&result, &greater, sizeof(result));
  return result;
#endif
}

}  // namespace fused_resnet::device
