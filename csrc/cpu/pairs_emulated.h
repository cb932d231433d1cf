// The product of weight_gradient_tiles.inl in vectors, for any processor; see pairs_avx512bf16.h.
#pragma once

#include "cpu/tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {

template <int kM, int kN>
inline void multiply_pairs(const char* rows, const char* columns, const int64_t* steps,
                           int64_t count, int64_t half, float* sums) {
  const auto pair_at = [](const char* p) {
    uint32_t pair;
    memcpy(&pair, p, sizeof(pair));
    return pair;
  };
  for (int row = 0; row < kM * 16; ++row) {
    for (int k = 0; k < kN * 16; ++k) {
      float sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const char* x = rows + i * 2 * kTileBytes + row * 64;
        const char* w = columns + steps[i] + k / 16 * half + k % 16 * 4;
        for (int pair = 0; pair < 16; ++pair) {
          sum = add_pair(sum, pair_at(x + pair * 4), pair_at(w + pair * 64));
        }
      }
      sums[row * 32 + k] = sum;
    }
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
