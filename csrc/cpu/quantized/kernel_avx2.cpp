// The convolution of bytes on AVX2.
#if defined(__x86_64__)

#include "cpu/quantized/bytes_avx2.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotPixels = 12;

FR_BYTES_INLINE Ints add_bytes(Ints sums, Ints pixel, Ints weights) {
  const Ints pairs = _mm256_maddubs_epi16(pixel, weights);
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
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
