// The loops of max-pooling's backward over dense channels-last rows, and the tables of them
// (cpu/isa.h).
#pragma once

#include <stdint.h>

#include "cpu/vectors.h"

namespace fused_resnet {

// One row of pooled pixels and the `kernel_h` rows under its windows, `W` pixels of `channels`.
struct PooledRow {
  const void* const* values;  // what was pooled; null for a row outside the image
  void* const* sums;          // their gradients, added to; float, double for float64; may be null
  const void* grad;           // the Q pooled pixels' gradients
  int64_t kernel_h, kernel_w, stride_w, pad_w, W, Q, channels;
};

struct MaxPoolRows {
  // Adds each pooled gradient to the first of its window's largest values, or to its last NaN, as
  // torch's max_pool2d does.
  void (*add_gradients)(const PooledRow& row);
  // The sums, rounded.
  void (*store)(const void* sums, int64_t count, void* out, bool stream);
};

struct MaxPoolKernels {
  MaxPoolRows float16, bfloat16, float32, float64;
};

extern const MaxPoolKernels max_pool_baseline;
extern const MaxPoolKernels max_pool_avx2;
extern const MaxPoolKernels max_pool_avx512;

namespace {

template <class V>
void add_pooled_gradients(const PooledRow& row) {
  using Element = typename V::Element;
  using P = typename V::Parameter;
  const int64_t C = row.channels;
  for (int64_t q = 0; q < row.Q; ++q) {
    const int64_t left = q * row.stride_w - row.pad_w;
    const int64_t begin = left > 0 ? left : 0;
    const int64_t end = left + row.kernel_w < row.W ? left + row.kernel_w : row.W;
    const auto* grad = static_cast<const Element*>(row.grad) + q * C;
    for_each_vector<V>(C, [&](int64_t i, auto... rest) {
      auto best = V::broadcast(-__builtin_inff()), place = V::broadcast(-1);
      for (int64_t h = 0; h < row.kernel_h; ++h) {
        if (!row.values[h]) continue;
        const auto* values = static_cast<const Element*>(row.values[h]) + i;
        for (int64_t w = begin; w < end; ++w) {
          const auto x = V::load(values + w * C, rest...);
          const auto here = V::broadcast(static_cast<P>(h * row.kernel_w + w - left));
          place = V::where_exceeds(x, best, here, place);
          best = V::where_exceeds(x, best, x, best);
        }
      }
      const auto g = V::load(grad + i, rest...);
      for (int64_t h = 0; h < row.kernel_h; ++h) {
        if (!row.values[h] || !row.sums[h]) continue;
        P* sums = static_cast<P*>(row.sums[h]) + i;
        for (int64_t w = begin; w < end; ++w) {
          const auto here = V::broadcast(static_cast<P>(h * row.kernel_w + w - left));
          const auto sum = V::load_parameter(sums + w * C, rest...);
          V::store_parameter(sums + w * C, sum + V::where_equal(place, here, g), rest...);
        }
      }
    });
  }
}

template <class V, bool kStream>
void store_sums_loop(const typename V::Parameter* sums, int64_t count, typename V::Element* out) {
  for_each_vector<V>(count, [&](int64_t i, auto... rest) {
    store_or_stream<V, kStream>(out + i, V::load_parameter(sums + i, rest...), rest...);
  });
}

template <class V>
void store_sums(const void* sums_in, int64_t count, void* out_in, bool stream) {
  const auto* sums = static_cast<const typename V::Parameter*>(sums_in);
  auto* out = static_cast<typename V::Element*>(out_in);
  if (stream && is_streamable(out)) {
    store_sums_loop<V, true>(sums, count, out);
  } else {
    store_sums_loop<V, false>(sums, count, out);
  }
}

template <class V>
constexpr MaxPoolRows max_pool_rows = {add_pooled_gradients<V>, store_sums<V>};

}  // namespace
}  // namespace fused_resnet
