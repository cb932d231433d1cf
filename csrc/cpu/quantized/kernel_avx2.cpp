// The convolution of bytes on AVX2.
#if defined(__x86_64__)

#include "cpu/quantized/bytes_avx2.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotPixels = 10;

FR_BYTES_INLINE Ints multiply_bytes(Ints pixel, Ints weights) {
  return _mm256_maddubs_epi16(pixel, weights);
}
FR_BYTES_INLINE Ints add_words(Ints a, Ints b) {
  return _mm256_add_epi16(a, b);
}
FR_BYTES_INLINE Ints add_widened(Ints sums, Ints words) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/lists.inl"
//
#include "cpu/quantized/ends.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAvx2 = {"avx2",     pieces,           run, quantize, quantize_words,
                                dequantize, ByteLayout::lists};
}

#endif
