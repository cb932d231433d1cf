// Single values as vectors of one; see vectors.h.
#pragma once

#include <string.h>

#include "cpu/vectors.h"

namespace fused_resnet {
namespace {

inline float to_float(float x) {
  return x;
}
inline float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // infinity or NaN
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x0400) {  // normal: the exponent bias grows from 15 to 127
    bits = (magnitude << 13) + (112u << 23);
  } else {  // subnormal: an integer count of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    memcpy(&bits, &value, sizeof(bits));
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline void from_float(float x, float* out) {
  *out = x;
}
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void from_float(float x, Half* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  uint32_t rounded;
  if (bits > 0x7f800000) {
    rounded = 0x7e00;
  } else if (bits >= 0x47800000) {  // 2^16 and up; the values between 65504 and that round below
    rounded = 0x7c00;
  } else if (bits >= 0x38800000) {  // normal, 2^-14 and up
    rounded = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
  } else {  // subnormal: adding 0.5 leaves the count of 2^-24, rounded, in the low bits
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    memcpy(&rounded, &magnitude, sizeof(rounded));
    rounded -= 0x3f000000;
  }
  out->bits = static_cast<uint16_t>(sign | rounded);
}

inline double to_float(double x) {
  return x;
}
inline void from_float(double x, double* out) {
  *out = x;
}

// One element wide: the compiler vectorises the loop as far as the target allows.
template <typename T, typename P>
struct Scalar {
  using Element = T;
  using Parameter = P;
  using Register = P;
  static constexpr int64_t width = 1;

  static Register load(const T* p) { return to_float(*p); }
  static Register load(const T* p, int64_t) { return load(p); }
  static Register load_parameter(const P* p) { return *p; }
  static Register load_parameter(const P* p, int64_t) { return *p; }
  static void store_parameter(P* p, Register x) { *p = x; }
  static void store_parameter(P* p, Register x, int64_t) { *p = x; }
  static Register broadcast(P value) { return value; }
  static void store(T* p, Register x) { from_float(x, p); }
  static void stream(T* p, Register x) { store(p, x); }
  static void store(T* p, Register x, int64_t) { store(p, x); }
  // Rounded once, like the others': what is lost of a product much larger than its sum with `c` is
  // the same for a whole channel. Twice where P is double, without an instruction for it.
  static Register multiply_add(Register a, Register b, Register c) {
    return static_cast<P>(static_cast<double>(a) * static_cast<double>(b) + static_cast<double>(c));
  }
  static Register add(Register a, Register b) { return a + b; }
  static Register relu(Register x) { return x < 0 ? 0 : x; }
  static Register where_positive(Register y, Register x) { return y <= 0 ? 0 : x; }
  static uint32_t passed(Register y) { return !(y <= 0); }
  static Register where_bits(uint32_t bits, Register x) { return bits ? x : 0; }
  static Register where_exceeds(Register a, Register b, Register x, Register y) {
    return a > b || a != a ? x : y;
  }
  static Register where_equal(Register a, Register b, Register x) { return a == b ? x : 0; }
};

template <typename T, typename P>
Wide<Scalar<double, double>, 1> widen(Scalar<T, P>, P x) {
  return {x};
}
template <class V, class... Rest>
Wide<Scalar<double, double>, 1> load_wide(V, const typename V::Element* p, Rest...) {
  return widen(V(), V::load(p));
}

}  // namespace
}  // namespace fused_resnet
