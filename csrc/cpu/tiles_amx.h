// The unit of conv_tiles.inl on AMX tiles (AMX-TILE, AMX-BF16), with AVX-512 around them.
#pragma once

#include <immintrin.h>

#include "cpu/tile_state.h"
#include "cpu/tiles_avx512.h"

namespace fused_resnet::cpu {
namespace {

inline __attribute__((always_inline)) void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int i>
inline __attribute__((always_inline)) void load_pixels(const char* rows, int64_t stride) {
  if constexpr (i == 0) _tile_loadd(4, rows, stride);
  if constexpr (i == 1) _tile_loadd(5, rows, stride);
}

template <int j>
inline __attribute__((always_inline)) void load_weights(const char* rows) {
  if constexpr (j == 0) _tile_loadd(6, rows, 64);
  if constexpr (j == 1) _tile_loadd(7, rows, 64);
}

// Adds to sums `s`, of which multiply_add<i, j>() has 2 * i + j.
template <int s, int i, int j>
inline __attribute__((always_inline)) void multiply_add_to() {
  constexpr int kOperands = 2 * i + j;
#define FR_MULTIPLY_ADD(sums)                                            \
  if constexpr (s == sums && kOperands == 0) _tile_dpbf16ps(sums, 4, 6); \
  if constexpr (s == sums && kOperands == 1) _tile_dpbf16ps(sums, 4, 7); \
  if constexpr (s == sums && kOperands == 2) _tile_dpbf16ps(sums, 5, 6); \
  if constexpr (s == sums && kOperands == 3) _tile_dpbf16ps(sums, 5, 7);
  FR_MULTIPLY_ADD(0)
  FR_MULTIPLY_ADD(1)
  FR_MULTIPLY_ADD(2)
  FR_MULTIPLY_ADD(3)
#undef FR_MULTIPLY_ADD
}

template <int i, int j>
inline __attribute__((always_inline)) void multiply_add() {
  multiply_add_to<2 * i + j, i, j>();
}

template <int i, int j>
inline __attribute__((always_inline)) void store_sums(float* rows, int64_t stride) {
  if constexpr (i == 0 && j == 0) _tile_stored(0, rows, stride);
  if constexpr (i == 0 && j == 1) _tile_stored(1, rows, stride);
  if constexpr (i == 1 && j == 0) _tile_stored(2, rows, stride);
  if constexpr (i == 1 && j == 1) _tile_stored(3, rows, stride);
}

}  // namespace
}  // namespace fused_resnet::cpu
