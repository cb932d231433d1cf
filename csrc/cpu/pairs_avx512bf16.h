// The product of weight_gradient_tiles.inl in vectors, on AVX512_BF16.
#pragma once

#include "cpu/tiles_avx512.h"

namespace fused_resnet::cpu {
namespace {

// Sums of kM * 16 channels of rows by kN * 16 of columns, 32 apart, of `count` steps of 16 pairs.
// Eight rows at a time go through all steps in 8 * kN registers.
template <int kM, int kN>
inline void multiply_pairs(const char* rows, const char* columns, const int64_t* steps,
                           int64_t count, int64_t half, float* sums) {
  constexpr int kRows = 8, kRowBytes = 64;
  for (int first = 0; first < kM * 16; first += kRows) {
    const char* row = rows + first * kRowBytes;
    __m512 sum[kRows][kN];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kN; ++v) sum[r][v] = _mm512_setzero_ps();
    }
    for (int64_t i = 0; i < count; ++i, row += 2 * kTileBytes) {
      const char* column = columns + steps[i];
      for (int pair = 0; pair < 16; ++pair, column += kRowBytes) {
        __m512bh w[kN];
#pragma GCC unroll 2
        for (int v = 0; v < kN; ++v) w[v] = (__m512bh)_mm512_loadu_si512(column + v * half);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int x;
          __builtin_memcpy(&x, row + r * kRowBytes + pair * 4, 4);
#pragma GCC unroll 2
          for (int v = 0; v < kN; ++v) {
            sum[r][v] = _mm512_dpbf16_ps(sum[r][v], (__m512bh)_mm512_set1_epi32(x), w[v]);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kN; ++v) _mm512_storeu_ps(sums + (first + r) * 32 + v * 16, sum[r][v]);
    }
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
