// float16 as a kernel sees it.
#pragma once

#include <cuda_runtime.h>

#include "cuda_on_host/number_formats.h"

struct alignas(2) __half {
  uint16_t bits;

  __half() = default;
  explicit __half(float x) : bits(fused_resnet::on_host::float16_bits(x)) {}
  explicit operator float() const { return fused_resnet::on_host::from_float16(bits); }
};
struct alignas(4) __half2 {
  __half x, y;
};

inline float __half2float(__half x) {
  return float(x);
}
inline __half __float2half_rn(float x) {
  return __half(x);
}
inline __half __float2half(float x) {
  return __half(x);
}
inline __half __ushort_as_half(uint16_t bits) {
  return std::bit_cast<__half>(bits);
}
inline uint16_t __half_as_ushort(__half x) {
  return x.bits;
}
inline __half2 __floats2half2_rn(float x, float y) {
  return {__half(x), __half(y)};
}
inline float2 __half22float2(__half2 x) {
  return {float(x.x), float(x.y)};
}
