// The row kernels of scale_shift_act and the one loop they are instances of.
//
// No header but <cstdint>'s C twin is included and everything with a body is in an anonymous
// namespace, because the including files are compiled for different instruction sets (cpu/isa.h).
#pragma once

#include <stdint.h>

#include "cpu/activation.h"
#include "cpu/vectors.h"

namespace fused_resnet {

// output[i] = act(input[i] * scale[c] + shift[c] + residual[i]) for i < n, where c is i, or 0 when
// `one_channel`. All rows are dense; `residual` may be null. `scale` and `shift` are float, double
// for the float64 kernel. With `stream` the output goes past the caches, if it lies on a line's
// border. Where `passed` is given, n is a multiple of kMaskedAtOnce, `act` ReLU, and a bit is
// written for each value, the first one's the lowest: whether the ReLU let it pass. The float64
// kernel has no activations but ReLU. `output` may be `input`, without `stream`.
using ScaleShiftActRow = void (*)(const void* input, const void* scale, const void* shift,
                                  const void* residual, void* output, int64_t n, bool one_channel,
                                  const Activation& act, bool stream, uint8_t* passed);

struct ScaleShiftActRows {
  ScaleShiftActRow float16, bfloat16, float32, float64;
};

extern const ScaleShiftActRows scale_shift_act_baseline;
extern const ScaleShiftActRows scale_shift_act_avx2;
extern const ScaleShiftActRows scale_shift_act_avx512;

namespace {

// `V` is a vector of cpu/vectors.h.
template <class V, bool kOneChannel, bool kResidual, bool kRelu, bool kStream, bool kPassed>
void scale_shift_act_loop(const typename V::Element* input, const typename V::Parameter* scale,
                          const typename V::Parameter* shift, const typename V::Element* residual,
                          typename V::Element* output, int64_t n, uint8_t* passed) {
  const auto finish = [](typename V::Register x, typename V::Register scale_c,
                         typename V::Register shift_c, typename V::Register shortcut) {
    x = V::multiply_add(x, scale_c, shift_c);
    if (kResidual) x = V::add(x, shortcut);
    return x;
  };
  const auto activate = [](typename V::Register x) { return kRelu ? V::relu(x) : x; };
  const typename V::Register first_scale = V::broadcast(*scale), first_shift = V::broadcast(*shift);
  int64_t i = 0;
  const auto step = [&]() -> typename V::Register {
    const auto x = V::load(input + i);
    const auto y = finish(x, kOneChannel ? first_scale : V::load_parameter(scale + i),
                          kOneChannel ? first_shift : V::load_parameter(shift + i),
                          kResidual ? V::load(residual + i) : x);
    store_or_stream<V, kStream>(output + i, activate(y));
    i += V::width;
    return y;
  };
  if constexpr (kPassed) {
    for (; i + kMaskedAtOnce <= n; passed += kMaskedAtOnce / 8) {
      uint32_t bits = 0;
      for (int64_t k = 0; k < kMaskedAtOnce; k += V::width) bits |= V::passed(step()) << k;
      passed[0] = static_cast<uint8_t>(bits);
      passed[1] = static_cast<uint8_t>(bits >> 8);
    }
  }
  while (i + V::width <= n) step();
  const int64_t rest = n - i;
  if (rest > 0) {
    const auto x = V::load(input + i, rest);
    V::store(output + i,
             activate(finish(x, kOneChannel ? first_scale : V::load_parameter(scale + i, rest),
                             kOneChannel ? first_shift : V::load_parameter(shift + i, rest),
                             kResidual ? V::load(residual + i, rest) : x)),
             rest);
  }
}

// As many values at once as stay in the nearest cache, as float.
constexpr int64_t kActivatedAtOnce = 512;

template <class V>
void other_act_row(const void* input, const void* scale_in, const void* shift_in,
                   const void* residual_in, void* output, int64_t n, bool one_channel,
                   const Activation& act) {
  const auto* x = static_cast<const typename V::Element*>(input);
  const auto* residual = static_cast<const typename V::Element*>(residual_in);
  const auto *scale = static_cast<const float*>(scale_in),
             *shift = static_cast<const float*>(shift_in);
  auto* out = static_cast<typename V::Element*>(output);
  const auto first_scale = V::broadcast(*scale), first_shift = V::broadcast(*shift);
  alignas(64) float values[kActivatedAtOnce] = {};
  for (int64_t first = 0; first < n; first += kActivatedAtOnce) {
    const int64_t count = n - first < kActivatedAtOnce ? n - first : kActivatedAtOnce;
    for_each_vector<V>(count, [&](int64_t i, auto... rest) {
      const int64_t at = first + i;
      auto y = V::multiply_add(V::load(x + at, rest...),
                               one_channel ? first_scale : V::load_parameter(scale + at, rest...),
                               one_channel ? first_shift : V::load_parameter(shift + at, rest...));
      if (residual) y = V::add(y, V::load(residual + at, rest...));
      V::store_parameter(values + i, y, rest...);
    });
    cpu::activate<cpu::kBytesOfActivation<V::width>>(act, values, (count + 15) / 16 * 16);
    for_each_vector<V>(count, [&](int64_t i, auto... rest) {
      V::store(out + first + i, V::load_parameter(values + i, rest...), rest...);
    });
  }
}

template <class V>
void scale_shift_act_row(const void* input, const void* scale, const void* shift,
                         const void* residual, void* output, int64_t n, bool one_channel,
                         const Activation& act, bool stream, uint8_t* passed) {
  if constexpr (sizeof(typename V::Parameter) == sizeof(float)) {
    if (cpu::is_other(act)) {
      return other_act_row<V>(input, scale, shift, residual, output, n, one_channel, act);
    }
  }
  const bool relu = cpu::is_relu(act);
  using Loop = void (*)(const typename V::Element*, const typename V::Parameter*,
                        const typename V::Parameter*, const typename V::Element*,
                        typename V::Element*, int64_t, uint8_t*);
  // Of what the activation does: nothing, ReLU, ReLU with its mask kept.
#define FR_LOOPS(one_channel, residual)                                      \
  {                                                                          \
    {scale_shift_act_loop<V, one_channel, residual, false, false, false>,    \
     scale_shift_act_loop<V, one_channel, residual, false, true, false>},    \
        {scale_shift_act_loop<V, one_channel, residual, true, false, false>, \
         scale_shift_act_loop<V, one_channel, residual, true, true, false>}, \
    {                                                                        \
      scale_shift_act_loop<V, one_channel, residual, true, false, true>,     \
          scale_shift_act_loop<V, one_channel, residual, true, true, true>   \
    }                                                                        \
  }
  static constexpr Loop loops[2][2][3][2] = {{FR_LOOPS(false, false), FR_LOOPS(false, true)},
                                             {FR_LOOPS(true, false), FR_LOOPS(true, true)}};
#undef FR_LOOPS
  if (n <= 0) return;
  loops[one_channel][residual != nullptr][relu + (passed != nullptr)]
       [stream && is_streamable(output)](static_cast<const typename V::Element*>(input),
                                         static_cast<const typename V::Parameter*>(scale),
                                         static_cast<const typename V::Parameter*>(shift),
                                         static_cast<const typename V::Element*>(residual),
                                         static_cast<typename V::Element*>(output), n, passed);
}

}  // namespace
}  // namespace fused_resnet
