// The row kernels of scale_shift_act and the one loop they are instances of.
//
// No header but <cstdint>'s C twin is included and everything with a body is in an anonymous
// namespace, because the including files are compiled for different instruction sets (cpu/isa.h).
#pragma once

#include <stdint.h>

#include "cpu/vectors.h"

namespace fused_resnet {

// output[i] = act(input[i] * scale[c] + shift[c] + residual[i]) for i < n, where c is i, or 0 when
// `one_channel`. All rows are dense; `residual` may be null. `scale` and `shift` are float, double
// for the float64 kernel. With `stream` the output goes past the caches, if it lies on a line's
// border.
using ScaleShiftActRow = void (*)(const void* input, const void* scale, const void* shift,
                                  const void* residual, void* output, int64_t n, bool one_channel,
                                  bool relu, bool stream);

struct ScaleShiftActRows {
  ScaleShiftActRow float16, bfloat16, float32, float64;
};

extern const ScaleShiftActRows scale_shift_act_baseline;
extern const ScaleShiftActRows scale_shift_act_avx2;
extern const ScaleShiftActRows scale_shift_act_avx512;

namespace {

// `V` is a vector of cpu/vectors.h.
template <class V, bool kOneChannel, bool kResidual, bool kRelu, bool kStream>
void scale_shift_act_loop(const typename V::Element* input, const typename V::Parameter* scale,
                          const typename V::Parameter* shift, const typename V::Element* residual,
                          typename V::Element* output, int64_t n) {
  const auto finish = [](typename V::Register x, typename V::Register scale_c,
                         typename V::Register shift_c, typename V::Register shortcut) {
    x = V::multiply_add(x, scale_c, shift_c);
    if (kResidual) x = V::add(x, shortcut);
    return kRelu ? V::relu(x) : x;
  };
  const typename V::Register first_scale = V::broadcast(*scale), first_shift = V::broadcast(*shift);
  int64_t i = 0;
  for (; i + V::width <= n; i += V::width) {
    const auto x = V::load(input + i);
    store_or_stream<V, kStream>(output + i,
                                finish(x, kOneChannel ? first_scale : V::load_parameter(scale + i),
                                       kOneChannel ? first_shift : V::load_parameter(shift + i),
                                       kResidual ? V::load(residual + i) : x));
  }
  const int64_t rest = n - i;
  if (rest > 0) {
    const auto x = V::load(input + i, rest);
    V::store(output + i,
             finish(x, kOneChannel ? first_scale : V::load_parameter(scale + i, rest),
                    kOneChannel ? first_shift : V::load_parameter(shift + i, rest),
                    kResidual ? V::load(residual + i, rest) : x),
             rest);
  }
}

template <class V>
void scale_shift_act_row(const void* input, const void* scale, const void* shift,
                         const void* residual, void* output, int64_t n, bool one_channel, bool relu,
                         bool stream) {
  using Loop = void (*)(const typename V::Element*, const typename V::Parameter*,
                        const typename V::Parameter*, const typename V::Element*,
                        typename V::Element*, int64_t);
#define FR_LOOPS(one_channel, residual)                              \
  {                                                                  \
    {scale_shift_act_loop<V, one_channel, residual, false, false>,   \
     scale_shift_act_loop<V, one_channel, residual, false, true>},   \
    {                                                                \
      scale_shift_act_loop<V, one_channel, residual, true, false>,   \
          scale_shift_act_loop<V, one_channel, residual, true, true> \
    }                                                                \
  }
  static constexpr Loop loops[2][2][2][2] = {{FR_LOOPS(false, false), FR_LOOPS(false, true)},
                                             {FR_LOOPS(true, false), FR_LOOPS(true, true)}};
#undef FR_LOOPS
  if (n <= 0) return;
  loops[one_channel][residual != nullptr][relu][stream && is_streamable(output)](
      static_cast<const typename V::Element*>(input),
      static_cast<const typename V::Parameter*>(scale),
      static_cast<const typename V::Parameter*>(shift),
      static_cast<const typename V::Element*>(residual), static_cast<typename V::Element*>(output),
      n);
}

}  // namespace
}  // namespace fused_resnet
