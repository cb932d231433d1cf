// The native convolution for AVX-512 (F, BW, DQ, VL): tiles of 2 x 7 pixels by 32 output channels,
// 28 of the 32 registers.
#if defined(__x86_64__)

#include <immintrin.h>

#include "cpu/conv.h"
#include "cpu/conv_winograd.h"

#define FR_VECTOR_BYTES 64
#define FR_TILE_GROUPS 2
#define FR_TILE_PIXELS 7
#define FR_NARROW_GROUPS 2
#define FR_NARROW_PIXELS 7
#define FR_UNROLLED_STEPS 1
#define FR_SUMMED_STEPS 128
#define FR_ITEM_CHANNELS 1

namespace fused_resnet::cpu {
namespace {

typedef float Vec __attribute__((vector_size(FR_VECTOR_BYTES)));

inline __attribute__((always_inline)) Vec broadcast(float x) {
  return (Vec)_mm512_set1_ps(x);
}

inline __attribute__((always_inline)) Vec multiply_add(Vec sum, Vec x, Vec w) {
  return sum + x * w;
}

inline __attribute__((always_inline)) Vec square_root(Vec x) {
  return (Vec)_mm512_sqrt_ps((__m512)x);
}

inline __attribute__((always_inline)) Vec load_f16(const uint16_t* p) {
  return (Vec)_mm512_maskz_cvtph_ps(0xffff,
                                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

inline __attribute__((always_inline)) void store_f16(uint16_t* p, Vec v) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_kernel.inl"
//
#include "cpu/conv_winograd.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvAvx512 = {"avx512",        kLanes,  kBlockK,       4,
                             2 * kTilePixels, kBlockK, scratch_bytes, run};
const ConvIsa kConvWinogradAvx512 = {
    "avx512", kLanes, kBlockK, 4, 1, kBlockK, winograd_scratch_bytes, run_winograd};
}  // namespace fused_resnet::cpu

#endif
