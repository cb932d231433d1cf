#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/tile_rate.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kPixels = 14, kVectors = 2, kPairs = 32;

}  // namespace

int64_t multiply_bfloat16_pairs(int64_t steps) {
  alignas(64) uint16_t weights[kPairs][kVectors][32];
  alignas(64) uint32_t pixels[kPixels][kPairs];
  for (auto& pair : weights) {
    for (auto& vector : pair) {
      for (uint16_t& w : vector) w = 0x3f80;
    }
  }
  for (auto& pixel : pixels) {
    for (uint32_t& pair : pixel) pair = 0x3f803f80;
  }
  __m512 sums[kPixels][kVectors] = {};
  for (int64_t step = 0; step < steps; ++step) {
    for (int j = 0; j < kPairs; ++j) {
      const auto w0 = (__m512bh)_mm512_load_si512(weights[j][0]);
      const auto w1 = (__m512bh)_mm512_load_si512(weights[j][1]);
#pragma GCC unroll 14
      for (int i = 0; i < kPixels; ++i) {
        const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(pixels[i][j]));
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], x, w0);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], x, w1);
      }
    }
  }
  for (auto& pixel : sums) {
    for (__m512& sum : pixel) asm volatile("" : : "v"(sum));
  }
  return kPairs * kPixels * kVectors * 32;
}

}  // namespace fused_resnet::cpu

#endif
