// The tiles of tiles.inl in memory, for any processor: what each instruction of AMX-INT8 does, as
// Intel's manual defines it (Software Developer's Manual, volume 2, TDPBUSD). Integers are exact,
// so the order of a row's products does not matter.
#pragma once

#include "cpu/quantized/bytes_baseline.h"

namespace fused_resnet::cpu {
namespace {

struct ByteUnit {
  int32_t sums[2][2][16][16];
  uint8_t pixels[2][16][64];
  int8_t weights[2][16][64];  // fours of the reduction, output channels, the four
};
thread_local ByteUnit unit;

struct UnitState {
  UnitState() { memset(&unit, 0x5a, sizeof(unit)); }  // nothing may rely on what was there
};

inline void zero_sums() {
  memset(unit.sums, 0, sizeof(unit.sums));
}

template <int i>
inline void load_pixels(const uint8_t* rows, int64_t stride) {
  for (int row = 0; row < 16; ++row) memcpy(unit.pixels[i][row], rows + row * stride, 64);
}

template <int j>
inline void load_weights(const int8_t* rows) {
  memcpy(unit.weights[j], rows, kByteTile);
}

template <int i, int j>
inline void multiply_add() {
  for (int row = 0; row < 16; ++row) {
    for (int four = 0; four < 16; ++four) {
      const uint8_t* x = &unit.pixels[i][row][4 * four];
      for (int k = 0; k < 16; ++k) {
        const int8_t* w = &unit.weights[j][four][4 * k];
        unit.sums[i][j][row][k] += x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
      }
    }
  }
}

template <int i, int j>
inline void store_sums(int32_t* rows) {
  for (int row = 0; row < 16; ++row) {
    memcpy(rows + row * kByteBlockK, unit.sums[i][j][row], 64);
  }
}

}  // namespace
}  // namespace fused_resnet::cpu
