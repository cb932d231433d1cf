// The tiles of tiles.inl: AMX-TILE and AMX-INT8, with AVX-512 around them.
#pragma once

#include "cpu/quantized/bytes_avx512.h"
#include "cpu/tile_state.h"

namespace fused_resnet::cpu {
namespace {

using UnitState = TileState;

FR_BYTES_INLINE void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

template <int i>
FR_BYTES_INLINE void load_pixels(const uint8_t* rows, int64_t stride) {
  if constexpr (i == 0) _tile_loadd(4, rows, stride);
  if constexpr (i == 1) _tile_loadd(5, rows, stride);
}

template <int j>
FR_BYTES_INLINE void load_weights(const int8_t* rows) {
  if constexpr (j == 0) _tile_loadd(6, rows, 64);
  if constexpr (j == 1) _tile_loadd(7, rows, 64);
}

template <int i, int j>
FR_BYTES_INLINE void multiply_add() {
  if constexpr (i == 0 && j == 0) _tile_dpbusd(0, 4, 6);
  if constexpr (i == 0 && j == 1) _tile_dpbusd(1, 4, 7);
  if constexpr (i == 1 && j == 0) _tile_dpbusd(2, 5, 6);
  if constexpr (i == 1 && j == 1) _tile_dpbusd(3, 5, 7);
}

template <int i, int j>
FR_BYTES_INLINE void store_sums(int32_t* rows) {
  constexpr int64_t kStride = kByteBlockK * 4;
  if constexpr (i == 0 && j == 0) _tile_stored(0, rows, kStride);
  if constexpr (i == 0 && j == 1) _tile_stored(1, rows, kStride);
  if constexpr (i == 1 && j == 0) _tile_stored(2, rows, kStride);
  if constexpr (i == 1 && j == 1) _tile_stored(3, rows, kStride);
}

}  // namespace
}  // namespace fused_resnet::cpu
