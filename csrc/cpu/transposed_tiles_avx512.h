// What weight_gradient_tiles.inl asks of tiles_avx512.h beyond that: factors of a product over
// pixels.
// Bit for bit as transposed_tiles_emulated.h has it.
#pragma once

#include "cpu/tiles_avx512.h"

namespace fused_resnet::cpu {
namespace {

// Sixteen rows of sixteen values of 32 bits become columns.
inline __attribute__((always_inline)) void transpose(__m512i* r) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  // Row i, element 4 m: of row i % 4 of the quarter of four rows that begins with i / 4 * 4.
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// The words of 16 channels of two pixels, pixel by pixel for each channel, first the lower half of
// the channels, then the upper.
inline __attribute__((always_inline)) void interleave(const uint16_t* first, const uint16_t* second,
                                                      __m512i& low, __m512i& high) {
  const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
  const __m512i even = _mm512_unpacklo_epi16(a, b), odd = _mm512_unpackhi_epi16(a, b);
  const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  low = _mm512_permutex2var_epi64(even, lower, odd);
  high = _mm512_permutex2var_epi64(even, upper, odd);
}

inline __attribute__((always_inline)) void pair_rows(uint16_t* dst, int64_t half, int64_t,
                                                     const uint16_t* first,
                                                     const uint16_t* second) {
  __m512i low, high;
  interleave(first, second, low, high);
  _mm512_storeu_si512(dst, low);
  _mm512_storeu_si512(dst + half, high);
}

inline __attribute__((always_inline)) void pair_rows(uint16_t* dst, int64_t half, int64_t part,
                                                     const float* first, const float* second) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const __m512 x[2] = {_mm512_loadu_ps(first + 16 * i), _mm512_loadu_ps(second + 16 * i)};
    split<3, false>(dst + i * half, part, x);
  }
}

inline void transpose_rows(uint16_t* dst, int64_t half, int64_t, const uint16_t* const* rows) {
  __m512i low[16], high[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) interleave(rows[i], rows[i + 16], low[i], high[i]);
  transpose(low);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(dst + i * 32, low[i]);
  transpose(high);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_storeu_si512(dst + half + i * 32, high[i]);
}

inline void transpose_rows(uint16_t* dst, int64_t half, int64_t part, const float* const* rows) {
  for (int j = 0; j < 2; ++j, dst += half) {
    __m512i first[16], second[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) first[i] = _mm512_loadu_si512(rows[i] + 16 * j);
    transpose(first);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) second[i] = _mm512_loadu_si512(rows[i + 16] + 16 * j);
    transpose(second);
    for (int i = 0; i < 16; ++i) {
      const __m512 x[2] = {_mm512_castsi512_ps(first[i]), _mm512_castsi512_ps(second[i])};
      split<3, true>(dst + i * 32, part, x);
    }
  }
}

inline void transpose_block(float* dst, const float* src) {
  for (int row = 0; row < 32; row += 16) {
    for (int column = 0; column < 32; column += 16) {
      __m512i r[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(src + (row + i) * 32 + column);
      transpose(r);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(dst + (column + i) * 32 + row, r[i]);
    }
  }
}

// Whether a value is infinite or NaN.
template <int kVectors>
inline __attribute__((always_inline)) bool has_nonfinite(const __m512* y) {
  constexpr int kNotFinite = 0x99;
  __mmask16 found = 0;
  for (int v = 0; v < kVectors; ++v) found |= _mm512_fpclass_ps_mask(y[v], kNotFinite);
  return found != 0;
}

}  // namespace
}  // namespace fused_resnet::cpu
