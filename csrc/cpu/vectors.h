// What the vectors of the instruction sets have in common (vectors_avx512.h, _avx2.h, _baseline.h).
//
// A vector `V` holds V::width values as V::Register, on which + - * work: elements are V::Element
// in memory and V::Parameter in arithmetic. Partial loads and stores touch `count` elements only.
// V::stream is a store that does not bring the line it fills into the caches first: `p` must be a
// multiple of the vector's size, and the thread calls finish_streaming() (cpu/isa.h) before others
// read. V::where_positive(y, x) is x where not y <= 0, so also where y is NaN, and 0 elsewhere;
// V::where_exceeds(a, b, x, y) is x where a > b or a is NaN, and y elsewhere; V::where_equal(a, b,
// x) is x where a == b, and 0 elsewhere. V::passed(y) has a bit, the first lane's the lowest, where
// where_positive(y, x) is x, and where_bits(bits, x) is x there, and 0 elsewhere. load_wide(V(),
// p) loads doubles, a Wide, and widen(V(), x) makes them of a register.
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

// Calls step(i) for whole vectors of `columns` values and step(i, rest) for what remains.
template <class V, class Step>
void for_each_vector(int64_t columns, const Step& step) {
  int64_t i = 0;
  for (; i + V::width <= columns; i += V::width) step(i);
  if (i < columns) step(i, columns - i);
}

// Where streamed vectors of every type may begin.
inline bool is_streamable(const void* p) {
  return reinterpret_cast<uintptr_t>(p) % 64 == 0;
}

template <class V, bool kStream>
void store_or_stream(typename V::Element* p, typename V::Register x) {
  if constexpr (kStream) {
    V::stream(p, x);
  } else {
    V::store(p, x);
  }
}
template <class V, bool kStream>
void store_or_stream(typename V::Element* p, typename V::Register x, int64_t count) {
  V::store(p, x, count);
}

// The values of a vector in double, in N registers of `D`, the vector of doubles.
template <class D, int N>
struct Wide {
  static constexpr int64_t width = N * D::width;

  typename D::Register parts[N];

  static Wide load(const double* p) {
    Wide wide;
    for (int k = 0; k < N; ++k) wide.parts[k] = D::load(p + k * D::width);
    return wide;
  }
  static Wide broadcast(double value) {
    Wide wide;
    for (int k = 0; k < N; ++k) wide.parts[k] = D::broadcast(value);
    return wide;
  }
  void store(double* p) const {
    for (int k = 0; k < N; ++k) D::store(p + k * D::width, parts[k]);
  }
  Wide operator+(const Wide& x) const {
    Wide wide;
    for (int k = 0; k < N; ++k) wide.parts[k] = parts[k] + x.parts[k];
    return wide;
  }
  Wide operator-(const Wide& x) const {
    Wide wide;
    for (int k = 0; k < N; ++k) wide.parts[k] = parts[k] - x.parts[k];
    return wide;
  }
  Wide operator*(const Wide& x) const {
    Wide wide;
    for (int k = 0; k < N; ++k) wide.parts[k] = parts[k] * x.parts[k];
    return wide;
  }
  // The sum of all values, halves added to each other.
  double total() const {
    double values[width];
    store(values);
    for (int64_t lanes = width / 2; lanes > 0; lanes /= 2) {
      for (int64_t lane = 0; lane < lanes; ++lane) values[lane] += values[lane + lanes];
    }
    return values[0];
  }
};

template <class V, class D, int N>
Wide<D, N> widen(V, const Wide<D, N>& x) {
  return x;
}

// Bits of a mask are written for so many values at once, as many as the longest vector's.
constexpr int64_t kMaskedAtOnce = 16;

// The bits of V::width values from `element` on, a multiple of that.
template <class V>
uint32_t bits_at(const uint8_t* bits, int64_t element) {
  const uint8_t* byte = bits + element / 8;
  if constexpr (V::width == 16) return byte[0] | static_cast<uint32_t>(byte[1]) << 8;
  if constexpr (V::width == 8) return byte[0];
  return byte[0] >> element % 8 & ((1u << V::width) - 1);
}

// Elements of two bytes are told apart by type; the bits are IEEE binary16 and bfloat16.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace
}  // namespace fused_resnet
