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

namespace fused_resnet::cpu {
const ByteKernels kBytesAvx512Vnni = {"avx512 vnni", pieces,         run,
                                      quantize,      quantize_words, dequantize};
}

#endif
