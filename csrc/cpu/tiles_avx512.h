// What conv_tiles.inl and weight_gradient_tiles.inl ask of vectors around their unit, for AVX-512
// (F, BW, DQ, VL, BF16).
#pragma once

#include <immintrin.h>

#include "cpu/conv_tiles.h"
#include "cpu/vectors_avx512.h"

namespace fused_resnet::cpu {
namespace {

using Value = Float32;

inline __attribute__((always_inline)) __m512 square_root(__m512 x) {
  return _mm512_sqrt_ps(x);
}

inline __attribute__((always_inline)) void copy(uint16_t* dst, const uint16_t* src, int64_t count) {
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) _mm512_storeu_si512(dst + i, _mm512_loadu_si512(src + i));
  if (i == count) return;
  const __mmask32 rest = static_cast<__mmask32>((1u << (count - i)) - 1);
  _mm512_mask_storeu_epi16(dst + i, rest, _mm512_maskz_loadu_epi16(rest, src + i));
}

inline __attribute__((always_inline)) void copy(float* dst, const float* src, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(dst + i, _mm512_loadu_ps(src + i));
  if (i < count) Float32::store(dst + i, Float32::load(src + i, count - i), count - i);
}

// Rounded to nearest even; subnormals become zero, as they do in the tiles.
template <int kN>
inline __attribute__((always_inline)) void store_block(uint16_t* dst, const __m512* y) {
  if constexpr (kN == 2) {
    _mm512_storeu_si512(dst, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
  } else {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), (__m256i)_mm512_cvtneps_pbh(y[0]));
  }
}

template <int kN>
inline __attribute__((always_inline)) void store_block(float* dst, const __m512* y) {
  for (int v = 0; v < kN; ++v) _mm512_storeu_ps(dst + v * 16, y[v]);
}

// Whether a sum is not finite, or below kLeastSum but not zero.
template <int kVectors>
inline __attribute__((always_inline)) bool is_doubtful(const __m512* y) {
  // As integers without a sign, magnitudes in question and zero lie above all others.
  const __m512i least = _mm512_set1_epi32(static_cast<int>(kLeastSumBits << 1));
  constexpr uint32_t kRange = (0x7f800000u - kLeastSumBits) << 1;
  __m512i most = _mm512_sub_epi32(_mm512_slli_epi32(_mm512_castps_si512(y[0]), 1), least);
  for (int v = 1; v < kVectors; ++v) {
    most = _mm512_max_epu32(
        most, _mm512_sub_epi32(_mm512_slli_epi32(_mm512_castps_si512(y[v]), 1), least));
  }
  if (__builtin_expect(
          _mm512_cmpge_epu32_mask(most, _mm512_set1_epi32(static_cast<int>(kRange))) == 0, 1)) {
    return false;
  }
  bool found = false;
  for (int v = 0; v < kVectors; ++v) {
    constexpr int kNotFinite = 0x99;  // quiet and signalling NaN, infinities
    const __m512 magnitude = _mm512_abs_ps(y[v]);
    found |= _mm512_fpclass_ps_mask(y[v], kNotFinite) != 0;
    found |= (_mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(kLeastSum), _CMP_LT_OQ) &
              _mm512_cmp_ps_mask(magnitude, _mm512_setzero_ps(), _CMP_NEQ_UQ)) != 0;
  }
  return found;
}

// The first parts of 32 values, so many apart: see InParts in conv_tiles.inl. All but the last of
// three are cut off, or rounded, and the last that is not all that is left is rounded.
template <int kParts, bool kRounded>
inline __attribute__((always_inline)) void split(uint16_t* dst, int64_t part, const __m512* x) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  const auto part_of = [&](__m512 y, bool rounded) {
    __m512i bits = _mm512_castps_si512(y);
    if (rounded) bits = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    return _mm512_castsi512_ps(_mm512_and_si512(bits, upper));
  };
  // The upper halves of a behind those of b.
  const auto put = [&](int p, __m512 a, __m512 b) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(b), 16);
    const __m512i both = _mm512_or_si512(_mm512_and_si512(_mm512_castps_si512(a), upper), low);
    _mm512_storeu_si512(dst + p * part, both);
  };
  constexpr int kNotFinite = 0x99;
  const __mmask16 odd_a = _mm512_fpclass_ps_mask(x[0], kNotFinite);
  const __mmask16 odd_b = _mm512_fpclass_ps_mask(x[1], kNotFinite);
  __m512 a = part_of(x[0], kRounded || kParts == 1), b = part_of(x[1], kRounded || kParts == 1);
  __m512 rest_a = _mm512_sub_ps(x[0], a), rest_b = _mm512_sub_ps(x[1], b);
  if (__builtin_expect((odd_a | odd_b) != 0, 0)) {
    // A NaN whose payload is in its lower half is none in the upper.
    const auto keep = [&](__m512& first, __m512& rest, __m512 y, __mmask16 odd) {
      const __m512 nan = _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000));
      first = _mm512_mask_mov_ps(first, odd, y);
      first = _mm512_mask_mov_ps(first, _mm512_cmp_ps_mask(y, y, _CMP_UNORD_Q), nan);
      rest = _mm512_maskz_mov_ps(static_cast<__mmask16>(~odd), rest);
    };
    keep(a, rest_a, x[0], odd_a);
    keep(b, rest_b, x[1], odd_b);
  }
  put(0, a, b);
  if constexpr (kParts > 1) {
    a = part_of(rest_a, kRounded || kParts == 2), b = part_of(rest_b, kRounded || kParts == 2);
    put(1, a, b);
  }
  if constexpr (kParts > 2) put(2, _mm512_sub_ps(rest_a, a), _mm512_sub_ps(rest_b, b));
}

}  // namespace
}  // namespace fused_resnet::cpu
