// What the vectors of the instruction sets have in common (vectors_avx512.h, _avx2.h, _baseline.h).
//
// A vector `V` holds V::width values as V::Register, on which + - * work: elements are V::Element
// in memory and V::Parameter in arithmetic. Partial loads and stores touch `count` elements only.
// V::where_positive(y, x) is x where not y <= 0, so also where y is NaN, and 0 elsewhere.
//
// No header but <cstdint>'s C twin is included and everything with a body is in an anonymous
// namespace, because the including files are compiled for different instruction sets (cpu/isa.h).
#pragma once

#include <stdint.h>

namespace fused_resnet {
namespace {

// Copies `count` < N elements into a zeroed vector's worth, for the vectors without masks.
template <typename T, int N>
struct Padded {
  alignas(64) T values[N] = {};
  Padded() = default;
  Padded(const T* source, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = source[i];
  }
  void copy_to(T* target, int64_t count) const {
    for (int64_t i = 0; i < count; ++i) target[i] = values[i];
  }
};

// Elements of two bytes are told apart by type; the bits are IEEE binary16 and bfloat16.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace
}  // namespace fused_resnet
