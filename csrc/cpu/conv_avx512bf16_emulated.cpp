// The kernel of conv_avx512bf16.cpp for any processor, each lane of its instructions a function. It
// is slow, and there to prove the kernel.

#include "cpu/conv.h"
#include "cpu/dot_emulated.h"

#define FR_VECTOR_BYTES 64
#define FR_TILE_GROUPS 2
#define FR_TILE_PIXELS 7
#define FR_NARROW_GROUPS 2
#define FR_NARROW_PIXELS 7
#define FR_UNROLLED_STEPS 1
#define FR_SUMMED_STEPS 128
#define FR_ITEM_CHANNELS 2

namespace fused_resnet::cpu {
namespace {

typedef float Vec __attribute__((vector_size(FR_VECTOR_BYTES)));

inline __attribute__((always_inline)) Vec broadcast(float x) {
  return Vec{} + x;
}

inline __attribute__((always_inline)) Vec broadcast(uint32_t pair) {
  typedef uint32_t Pairs __attribute__((vector_size(FR_VECTOR_BYTES)));
  return (Vec)(Pairs{} + pair);
}

inline __attribute__((always_inline)) Vec square_root(Vec x) {
  for (int i = 0; i < FR_VECTOR_BYTES / 4; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
}

inline Vec multiply_add(const Vec& sum, const Vec& x, const Vec& w) {
  typedef uint32_t Pairs __attribute__((vector_size(FR_VECTOR_BYTES)));
  const Pairs a = (Pairs)x, b = (Pairs)w;
  Vec result;
  for (int i = 0; i < FR_VECTOR_BYTES / 4; ++i) result[i] = add_pair(sum[i], a[i], b[i]);
  return result;
}

inline void store_bf16(uint16_t* p, const Vec& v) {
  for (int i = 0; i < FR_VECTOR_BYTES / 4; ++i) p[i] = rounded_to_bfloat16(v[i]);
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_kernel.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvAvx512Bf16Emulated = {"avx512bf16_emulated", kLanes, kBlockK,       2,
                                         2 * kTilePixels,       32,     scratch_bytes, run,
                                         WeightLayout::kPairs};
}
