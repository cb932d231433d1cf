// Vectors for dot.inl, lists.inl and ends.inl: AVX2.
#pragma once

#include "cpu/quantized/conv.h"
#include "cpu/vectors_avx2.h"

namespace fused_resnet::cpu {
namespace {

using Floats = __m256;
using Ints = __m256i;
using FloatValues = Float32;
using HalfValues = Float16;
using Bfloat16Values = Bfloat16;
constexpr int64_t kLanes = 8;

FR_BYTES_INLINE Floats broadcast(float x) {
  return _mm256_set1_ps(x);
}
FR_BYTES_INLINE Ints broadcast_int(int32_t x) {
  return _mm256_set1_epi32(x);
}
FR_BYTES_INLINE Floats load_floats(const float* p) {
  return _mm256_loadu_ps(p);
}
FR_BYTES_INLINE Ints load_ints(const int32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
FR_BYTES_INLINE void store_ints(int32_t* p, Ints x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x);
}
FR_BYTES_INLINE Ints load_bytes(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
FR_BYTES_INLINE Floats to_floats(Ints x) {
  return _mm256_cvtepi32_ps(x);
}
FR_BYTES_INLINE Ints subtract(Ints a, Ints b) {
  return _mm256_sub_epi32(a, b);
}
FR_BYTES_INLINE Ints add_ints(Ints a, Ints b) {
  return _mm256_add_epi32(a, b);
}
FR_BYTES_INLINE Floats add(Floats a, Floats b) {
  return _mm256_add_ps(a, b);
}
FR_BYTES_INLINE Floats multiply(Floats a, Floats b) {
  return _mm256_mul_ps(a, b);
}
// max returns its second operand when the first is NaN.
FR_BYTES_INLINE Ints round_between(Floats x, Floats least, Floats most) {
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(x, least), most));
}
FR_BYTES_INLINE void store_bytes(uint8_t* p, Ints x) {
  const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
  const __m128i words = _mm_packus_epi32(low, high);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
FR_BYTES_INLINE void store_words(uint16_t* p, Ints x) {
  const __m128i low = _mm256_castsi256_si128(x), high = _mm256_extracti128_si256(x, 1);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packus_epi32(low, high));
}

// Vectors rounded, clamped to 0 and 255, and stored as bytes. NaN and what is below
// all integers become the least integer, which saturation then makes 0. min returns its second
// operand when one is NaN.
template <int kVectors>
FR_BYTES_INLINE void store_rounded(uint8_t* p, const Floats (&x)[kVectors]) {
  if constexpr (kVectors == 1) {
    store_bytes(p, _mm256_cvtps_epi32(_mm256_min_ps(broadcast(255.0f), x[0])));
  } else {
    static_assert(kVectors % 2 == 0);
    const Floats most = broadcast(255.0f);
    for (int v = 0; v < kVectors; v += 2) {
      const Ints words = _mm256_packus_epi32(_mm256_cvtps_epi32(_mm256_min_ps(most, x[v])),
                                             _mm256_cvtps_epi32(_mm256_min_ps(most, x[v + 1])));
      const __m128i bytes =
          _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + v * kLanes), _mm_shuffle_epi32(bytes, 0xd8));
    }
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
