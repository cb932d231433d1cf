// The native convolution for AVX2 with FMA and F16C: tiles of 6 pixels by 16 output channels, 12 of
// the 16 registers. The pixels of a tile are anywhere, since there are general registers enough for
// their addresses: no row of an image leaves a rest. Layers of at most 8 output channels in a group
// have tiles of 4 x 3 pixels.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/conv.h"
#include "cpu/conv_winograd.h"

#define FR_VECTOR_BYTES 32
#define FR_TILE_GROUPS 6
#define FR_TILE_PIXELS 1
#define FR_NARROW_GROUPS 4
#define FR_NARROW_PIXELS 3
#define FR_UNROLLED_STEPS 4
#define FR_SUMMED_STEPS 256
#define FR_ITEM_CHANNELS 1

namespace fused_resnet::cpu {
namespace {

typedef float Vec __attribute__((vector_size(FR_VECTOR_BYTES)));

inline __attribute__((always_inline)) Vec broadcast(float x) {
  return (Vec)_mm256_set1_ps(x);
}

inline __attribute__((always_inline)) Vec multiply_add(Vec sum, Vec x, Vec w) {
  return sum + x * w;
}

inline __attribute__((always_inline)) Vec square_root(Vec x) {
  return (Vec)_mm256_sqrt_ps((__m256)x);
}

inline __attribute__((always_inline)) Vec load_f16(const uint16_t* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

inline __attribute__((always_inline)) void store_f16(uint16_t* p, Vec v) {
  const __m128i half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_kernel.inl"
//
#include "cpu/conv_winograd.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvAvx2 = {"avx2", kLanes, kBlockK, 4, 14, kBlockK, scratch_bytes, run};
const ConvIsa kConvWinogradAvx2 = {
    "avx2", kLanes, kBlockK, 4, 1, kBlockK, winograd_scratch_bytes, run_winograd};
}  // namespace fused_resnet::cpu

#endif
