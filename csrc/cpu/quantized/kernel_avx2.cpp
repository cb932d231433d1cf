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
// Of linear.inl.
FR_BYTES_INLINE Ints dot(Ints sums, Ints inputs, Ints weights) {
  // In words, of which a product of two takes all: the even bytes and the odd ones.
  const Ints even = _mm256_madd_epi16(_mm256_and_si256(inputs, _mm256_set1_epi16(255)),
                                      _mm256_srai_epi16(_mm256_slli_epi16(weights, 8), 8));
  const Ints odd = _mm256_madd_epi16(_mm256_srli_epi16(inputs, 8), _mm256_srai_epi16(weights, 8));
  return add_ints(sums, add_ints(even, odd));
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/lists.inl"
//
#include "cpu/quantized/ends.inl"
//
#include "cpu/quantized/linear.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAvx2 = {
    .name = "avx2",
    .pieces = pieces,
    .run = run,
    .quantize = quantize,
    .quantize_words = quantize_words,
    .dequantize = dequantize,
    .multiply_row = multiply_row,
    .add_bytes = add_bytes,
    .layout = ByteLayout::lists,
};
}

#endif
