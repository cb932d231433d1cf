// The unit of conv_tiles.inl as tiles in memory, for any processor: what each instruction of AMX
// does is written out, to the bit, as Intel's manual defines it (Software Developer's Manual,
// volume 2, TDPBF16PS and VCVTNE2PS2BF16). It is slow, and there to prove the kernel.
#pragma once

#include "cpu/conv_tiles.h"
#include "cpu/dot_emulated.h"

namespace fused_resnet::cpu {
namespace {

using Value = Scalar<float, float>;

inline float square_root(float x) {
  return __builtin_sqrtf(x);
}

inline void copy(uint16_t* dst, const uint16_t* src, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = src[i];
}

inline void copy(float* dst, const float* src, int64_t count) {
  for (int64_t i = 0; i < count; ++i) dst[i] = src[i];
}

template <int kN>
inline void store_block(uint16_t* dst, const float* y) {
  for (int k = 0; k < kN * 16; ++k) dst[k] = rounded_to_bfloat16(y[k]);
}

template <int kN>
inline void store_block(float* dst, const float* y) {
  for (int k = 0; k < kN * 16; ++k) dst[k] = y[k];
}

template <int kVectors>
inline bool is_doubtful(const float* y) {
  for (int v = 0; v < kVectors; ++v) {
    const float magnitude = __builtin_fabsf(y[v]);
    if (!(magnitude <= __FLT_MAX__) || (magnitude < kLeastSum && magnitude != 0)) return true;
  }
  return false;
}

template <int kParts, bool kRounded>
inline void split(uint16_t* dst, int64_t part, const float* x) {
  for (int i = 0; i < 32; ++i) {
    float rest = x[i] != x[i] ? __builtin_nanf("") : x[i];
    const bool finite = __builtin_fabsf(rest) <= __FLT_MAX__;
    for (int p = 0; p < kParts; ++p) {
      uint32_t bits;
      memcpy(&bits, &rest, sizeof(bits));
      const bool rounded = p < 2 && (kRounded || p + 1 == kParts);
      if (rounded && finite) bits += 0x8000;
      const uint16_t upper = static_cast<uint16_t>(bits >> 16);
      dst[p * part + (i < 16 ? 2 * i + 1 : 2 * (i - 16))] = upper;
      rest = finite ? rest - to_float(BFloat16{upper}) : 0;
    }
  }
}

struct Unit {
  float sums[2][2][16][16];
  uint16_t pixels[2][16][32];
  uint16_t weights[2][16][32];  // pairs of the reduction, output channels, the two of a pair
};
thread_local Unit unit;

struct TileState {
  TileState() { memset(&unit, 0xff, sizeof(unit)); }  // NaN everywhere: nothing may rely on it
};

inline void zero_sums() {
  memset(unit.sums, 0, sizeof(unit.sums));
}

template <int i>
inline void load_pixels(const char* rows, int64_t stride) {
  for (int row = 0; row < 16; ++row) memcpy(unit.pixels[i][row], rows + row * stride, 64);
}

template <int j>
inline void load_weights(const char* rows) {
  memcpy(unit.weights[j], rows, kTileBytes);
}

// Of each pair of sums, even and odd members of the pairs, rounded to nearest even after every
// product.
template <int s, int i, int j>
inline void multiply_add_to() {
  for (int row = 0; row < 16; ++row) {
    float even[16] = {}, odd[16] = {};
    for (int pair = 0; pair < 16; ++pair) {
      float pixel[2];
      for (int part = 0; part < 2; ++part) {
        pixel[part] = flushed(to_float(BFloat16{unit.pixels[i][row][2 * pair + part]}));
      }
      for (int k = 0; k < 16; ++k) {
        const uint16_t* weight = &unit.weights[j][pair][2 * k];
        even[k] = fused_multiply_add(even[k], pixel[0], flushed(to_float(BFloat16{weight[0]})));
        odd[k] = fused_multiply_add(odd[k], pixel[1], flushed(to_float(BFloat16{weight[1]})));
      }
    }
    for (int k = 0; k < 16; ++k) {
      float& sum = unit.sums[s / 2][s % 2][row][k];
      sum = flushed(flushed(sum) + flushed(even[k] + odd[k]));
    }
  }
}

template <int i, int j>
inline void multiply_add() {
  multiply_add_to<2 * i + j, i, j>();
}

template <int i, int j>
inline void store_sums(float* rows, int64_t stride) {
  char* to = reinterpret_cast<char*>(rows);
  for (int row = 0; row < 16; ++row) memcpy(to + row * stride, unit.sums[i][j][row], 64);
}

}  // namespace
}  // namespace fused_resnet::cpu
