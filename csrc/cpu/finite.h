// Whether all of many values are finite. For files of any instruction set: see isa.h.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>
#include <cstring>

namespace fused_resnet::cpu {

// The sign's bit is set where `x` is not finite, all of its exponent's bits being set. Of many
// values these are put together without a comparison, in vectors.
inline uint32_t carry_of_infinity(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return (bits & 0x7f800000u) + 0x00800000u;
}

inline bool is_infinity_among(uint32_t carries) {
  return (carries & 0x80000000u) != 0;
}

inline bool all_finite(const float* values, int64_t count) {
  uint32_t carries = 0;
  for (int64_t i = 0; i < count; ++i) carries |= carry_of_infinity(values[i]);
  return !is_infinity_among(carries);
}

inline bool all_finite(const torch::headeronly::BFloat16* values, int64_t count) {
  uint16_t carries = 0;
  for (int64_t i = 0; i < count; ++i) {
    carries = static_cast<uint16_t>(carries | ((values[i].x & 0x7f80u) + 0x0080u));
  }
  return (carries & 0x8000u) == 0;
}

}  // namespace fused_resnet::cpu
