// Vectors for tile_run.inl, dot.inl and ends.inl: AVX-512 (F, BW, DQ, VL).
#pragma once

#include "cpu/quantized/conv.h"
#include "cpu/vectors_avx512.h"

namespace fused_resnet::cpu {
namespace {

using Floats = __m512;
using Ints = __m512i;
using FloatValues = Float32;
using HalfValues = Float16;
using Bfloat16Values = Bfloat16;
constexpr int64_t kLanes = 16;

FR_BYTES_INLINE Floats broadcast(float x) {
  return _mm512_set1_ps(x);
}
FR_BYTES_INLINE Ints broadcast_int(int32_t x) {
  return _mm512_set1_epi32(x);
}
FR_BYTES_INLINE Floats load_floats(const float* p) {
  return _mm512_loadu_ps(p);
}
FR_BYTES_INLINE Ints load_ints(const int32_t* p) {
  return _mm512_loadu_si512(p);
}
FR_BYTES_INLINE void store_ints(int32_t* p, Ints x) {
  _mm512_storeu_si512(p, x);
}
FR_BYTES_INLINE Ints load_bytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FR_BYTES_INLINE Floats to_floats(Ints x) {
  return _mm512_cvtepi32_ps(x);
}
FR_BYTES_INLINE Ints subtract(Ints a, Ints b) {
  return _mm512_sub_epi32(a, b);
}
FR_BYTES_INLINE Ints add_ints(Ints a, Ints b) {
  return _mm512_add_epi32(a, b);
}
FR_BYTES_INLINE Floats add(Floats a, Floats b) {
  return _mm512_add_ps(a, b);
}
FR_BYTES_INLINE Floats multiply(Floats a, Floats b) {
  return _mm512_mul_ps(a, b);
}
// max returns its second operand when the first is NaN.
FR_BYTES_INLINE Ints round_between(Floats x, Floats least, Floats most) {
  return _mm512_cvtps_epi32(_mm512_min_ps(_mm512_max_ps(x, least), most));
}
FR_BYTES_INLINE void store_bytes(uint8_t* p, Ints x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
FR_BYTES_INLINE void store_words(uint16_t* p, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(x));
}

// Up to four vectors rounded, clamped to 0 and 255, and stored as so many times 16 bytes. NaN and
// what is below all integers become the least integer, which saturation then makes 0. min returns
// its second operand when one is NaN.
template <int kVectors>
FR_BYTES_INLINE void store_rounded(uint8_t* p, const Floats (&x)[kVectors]) {
  static_assert(kVectors == 1 || kVectors == 2 || kVectors == 4);
  const Floats most = broadcast(255.0f);
  Ints q[4];
  for (int v = 0; v < 4; ++v) q[v] = _mm512_cvtps_epi32(_mm512_min_ps(most, x[v % kVectors]));
  // A lane of 128 bits now has four bytes of each vector.
  const Ints lanes =
      _mm512_packus_epi16(_mm512_packus_epi32(q[0], q[1]), _mm512_packus_epi32(q[2], q[3]));
  const Ints order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const Ints bytes = _mm512_permutexvar_epi32(order, lanes);
  if constexpr (kVectors == 4) _mm512_storeu_si512(p, bytes);
  if constexpr (kVectors == 2) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(bytes));
  }
  if constexpr (kVectors == 1) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(bytes));
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
