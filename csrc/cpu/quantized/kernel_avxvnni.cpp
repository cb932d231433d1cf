// The convolution of bytes on AVX-VNNI: AVX-512's instruction on vectors of 256 bits, for
// processors without AVX-512.
#if defined(__x86_64__)

#include "cpu/quantized/bytes_avx2.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotPixels = 6, kDotChannels = 16;

FR_BYTES_INLINE Ints dot(Ints sums, Ints pixels, Ints weights) {
  return _mm256_dpbusd_avx_epi32(sums, pixels, weights);
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/dot.inl"
//
#include "cpu/quantized/ends.inl"
//
#include "cpu/quantized/linear.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAvxVnni = {
    .name = "avx vnni",
    .pieces = pieces,
    .run = run,
    .quantize = quantize,
    .quantize_words = quantize_words,
    .dequantize = dequantize,
    .multiply_row = multiply_row,
    .add_bytes = add_bytes,
};
}

#endif
