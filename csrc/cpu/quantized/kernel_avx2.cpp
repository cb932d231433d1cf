// The convolution of bytes on AVX2.
#if defined(__x86_64__)

#include "cpu/quantized/bytes_avx2.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotPixels = 4, kDotChannels = 16, kDotHeld = 2;

// Two products of a byte below 128, or of 128, and a weight fit 16 bits together; of two larger
// bytes they may not.
FR_BYTES_INLINE Ints dot(Ints sums, Ints pixels, Ints weights) {
  const Ints ones = _mm256_set1_epi16(1), upper = _mm256_set1_epi8(static_cast<char>(0x80));
  const Ints high = _mm256_maddubs_epi16(_mm256_and_si256(pixels, upper), weights);
  const Ints low = _mm256_maddubs_epi16(_mm256_andnot_si256(upper, pixels), weights);
  sums = _mm256_add_epi32(sums, _mm256_madd_epi16(high, ones));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(low, ones));
}

FR_BYTES_INLINE Ints dot_memory(Ints sums, Ints pixels, const int8_t* weights) {
  return dot(sums, pixels, load_ints(reinterpret_cast<const int32_t*>(weights)));
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/dot.inl"
//
#include "cpu/quantized/ends.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAvx2 = {"avx2", pieces, run, quantize, quantize_words, dequantize};
}

#endif
