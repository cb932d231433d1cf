// What the instructions of AVX512_BF16 and AMX-BF16 do to single values, to the bit, as Intel's
// manual defines them (Software Developer's Manual, volume 2, VDPBF16PS, TDPBF16PS and
// VCVTNEPS2BF16), for any processor.
#pragma once

#include "cpu/vectors_baseline.h"

namespace fused_resnet::cpu {
namespace {

// Subnormals are zeros, whether they are read or written.
inline float flushed(float x) {
  return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x;
}

// A product of two bfloat16 is exact in double, and a sum of two float32 rounded to double rounds
// to float32 as the exact sum does.
inline float fused_multiply_add(float sum, float a, float b) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  return flushed(static_cast<float>(static_cast<double>(sum) + product));
}

// VDPBF16PS: the products of two pairs, first of their odd members, then of the even ones, each sum
// rounded to nearest even.
inline float add_pair(float sum, uint32_t a, uint32_t b) {
  const auto member = [](uint32_t pair, int shift) {
    return flushed(to_float(BFloat16{static_cast<uint16_t>(pair >> shift)}));
  };
  const float odd = fused_multiply_add(flushed(sum), member(a, 16), member(b, 16));
  return fused_multiply_add(odd, member(a, 0), member(b, 0));
}

// To bfloat16, to nearest even.
inline uint16_t rounded_to_bfloat16(float x) {
  uint32_t bits;
  x = flushed(x);
  memcpy(&bits, &x, sizeof(bits));
  // A NaN keeps what it can of its payload and becomes quiet.
  return x != x ? static_cast<uint16_t>(bits >> 16 | 0x40)
                : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace
}  // namespace fused_resnet::cpu
