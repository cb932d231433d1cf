// float16, bfloat16 and tf32 as bits, rounded as the GPU's conversions round.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace fused_resnet::on_host {

inline float from_float16(uint16_t bits) {
#ifdef __F16C__
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t magnitude = bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  }
  // Scaling by a power of two also normalises what is subnormal in float16.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
#endif
}

inline uint16_t float16_bits(float x) {
#ifdef __F16C__
  return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
#else
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = bits >> 16 & 0x8000u;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return sign | 0x7e00u;
  if (magnitude >= 65520.0f) return sign | 0x7c00u;
  // Adding this leaves the digits that float16 keeps at the sum's end, rounded to nearest even.
  int exponent;
  std::frexp(magnitude, &exponent);
  const float anchor = std::ldexp(1.5f, std::max(exponent - 11, -24) + 23);
  const float rounded = (magnitude + anchor) - anchor;
  if (rounded < 0x1p-14f) return sign | static_cast<uint16_t>(rounded * 0x1p24f);
  return sign | static_cast<uint16_t>((std::bit_cast<uint32_t>(rounded) - 0x38000000u) >> 13);
#endif
}

inline float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

inline uint16_t bfloat16_bits(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return bits >> 16 | 0x40u;
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;  // to nearest, ties to even
}

// cvt.rna: to nearest, ties away from zero.
inline uint32_t to_tf32(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (!std::isfinite(x)) return bits;
  return (bits + 0x1000u) & ~0x1fffu;
}

// A tensor core reads the upper 19 bits only.
inline float from_tf32(uint32_t bits) {
  return std::bit_cast<float>(bits & ~0x1fffu);
}

}  // namespace fused_resnet::on_host
