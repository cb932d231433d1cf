// The native convolution of bfloat16 for AVX-512 with AVX512_BF16, whose instruction adds the
// products of a pair of values to each lane: the tiles of conv_avx512.cpp with half the steps.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/conv.h"

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
  return (Vec)_mm512_set1_ps(x);
}

inline __attribute__((always_inline)) Vec broadcast(uint32_t pair) {
  return (Vec)_mm512_set1_epi32(static_cast<int>(pair));
}

inline __attribute__((always_inline)) Vec multiply_add(Vec sum, Vec x, Vec w) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)w);
}

inline __attribute__((always_inline)) Vec square_root(Vec x) {
  return (Vec)_mm512_sqrt_ps((__m512)x);
}

// To nearest even; subnormals become zero, as they are to the product.
inline __attribute__((always_inline)) void store_bf16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_kernel.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvAvx512Bf16 = {"avx512bf16",        kLanes, kBlockK,       2,
                                 2 * kTilePixels,     32,     scratch_bytes, run,
                                 WeightLayout::kPairs};
}

#endif
