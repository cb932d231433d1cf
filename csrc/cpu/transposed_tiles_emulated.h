// What weight_gradient_tiles.inl asks of tiles_emulated.h beyond that: factors of a product over
// pixels. See transposed_tiles_avx512.h.
#pragma once

#include "cpu/tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {

// A row of the second factor's tiles: 16 channels of two pixels, channel by channel, in both of two
// tiles `half` apart.
inline void pair_rows(uint16_t* dst, int64_t half, int64_t, const uint16_t* first,
                      const uint16_t* second) {
  for (int c = 0; c < 32; ++c) {
    uint16_t* to = dst + c / 16 * half + c % 16 * 2;
    to[0] = first[c], to[1] = second[c];
  }
}

// The same in parts.
inline void pair_rows(uint16_t* dst, int64_t half, int64_t part, const float* first,
                      const float* second) {
  for (int i = 0; i < 2; ++i) {
    float x[32];
    memcpy(x, first + 16 * i, 64);
    memcpy(x + 16, second + 16 * i, 64);
    split<3, false>(dst + i * half, part, x);
  }
}

// Two tiles of the first factor: a row for each channel of 32, in it 32 pixels, the i-th and the
// (i + 16)-th of them side by side.
inline void transpose_rows(uint16_t* dst, int64_t half, int64_t, const uint16_t* const* rows) {
  for (int c = 0; c < 32; ++c) {
    uint16_t* to = dst + c / 16 * half + c % 16 * 32;
    for (int i = 0; i < 16; ++i) to[2 * i] = rows[i][c], to[2 * i + 1] = rows[i + 16][c];
  }
}

inline void transpose_rows(uint16_t* dst, int64_t half, int64_t part, const float* const* rows) {
  for (int c = 0; c < 32; ++c) {
    float x[32];
    for (int i = 0; i < 32; ++i) x[i] = rows[i][c];
    split<3, true>(dst + c / 16 * half + c % 16 * 32, part, x);
  }
}

inline void transpose_block(float* dst, const float* src) {
  for (int i = 0; i < 32; ++i) {
    for (int j = 0; j < 32; ++j) dst[j * 32 + i] = src[i * 32 + j];
  }
}

template <int kVectors>
inline bool has_nonfinite(const float* y) {
  bool found = false;
  for (int v = 0; v < kVectors; ++v) found |= !(__builtin_fabsf(y[v]) <= __FLT_MAX__);
  return found;
}

}  // namespace
}  // namespace fused_resnet::cpu
