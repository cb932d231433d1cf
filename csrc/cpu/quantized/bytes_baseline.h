// Vectors of one for tile_run.inl, dot.inl and ends.inl, for any processor.
#pragma once

#include "cpu/quantized/conv.h"
#include "cpu/vectors_baseline.h"

namespace fused_resnet::cpu {
namespace {

using Floats = float;
using Ints = int32_t;
using FloatValues = Scalar<float, float>;
using HalfValues = Scalar<Half, float>;
using Bfloat16Values = Scalar<BFloat16, float>;
constexpr int64_t kLanes = 1;

inline Floats broadcast(float x) {
  return x;
}
inline Ints broadcast_int(int32_t x) {
  return x;
}
inline Floats load_floats(const float* p) {
  return *p;
}
inline Ints load_ints(const int32_t* p) {
  return *p;
}
inline void store_ints(int32_t* p, Ints x) {
  *p = x;
}
inline Ints load_bytes(const uint8_t* p) {
  return *p;
}
inline Floats to_floats(Ints x) {
  return static_cast<float>(x);
}
inline Ints subtract(Ints a, Ints b) {
  return a - b;
}
inline Ints add_ints(Ints a, Ints b) {
  return a + b;
}
inline Floats add(Floats a, Floats b) {
  return a + b;
}
inline Floats multiply(Floats a, Floats b) {
  return a * b;
}
// NaN becomes the least.
inline Ints round_between(Floats x, Floats least, Floats most) {
  x = x > least ? x : least;
  x = x < most ? x : most;
  return static_cast<Ints>(__builtin_rintf(x));
}
inline void store_bytes(uint8_t* p, Ints x) {
  *p = static_cast<uint8_t>(x);
}
inline void store_words(uint16_t* p, Ints x) {
  *p = static_cast<uint16_t>(x);
}

// Of four unsigned and four signed bytes.
inline Ints dot(Ints sum, Ints pixels, Ints weights) {
  uint8_t x[4];
  int8_t w[4];
  memcpy(x, &pixels, 4);
  memcpy(w, &weights, 4);
  return sum + x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
}

// Rounded, clamped to 0 and 255, and stored as bytes; NaN becomes 0.
template <int kVectors>
inline void store_rounded(uint8_t* p, const Floats (&x)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) store_bytes(p + v, round_between(x[v], 0.0f, 255.0f));
}

}  // namespace
}  // namespace fused_resnet::cpu
