// The convolution of bytes on AVX-512 with VNNI.
#if defined(__x86_64__)

#include "cpu/quantized/bytes_avx512.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotPixels = 6, kDotChannels = 64;

FR_BYTES_INLINE Ints dot(Ints sums, Ints pixels, Ints weights) {
  return _mm512_dpbusd_epi32(sums, pixels, weights);
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/dot.inl"
//
#include "cpu/quantized/ends.inl"
//
#include "cpu/quantized/linear.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAvx512Vnni = {
    .name = "avx512 vnni",
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
