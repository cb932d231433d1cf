// The convolution of bytes for any processor.
#include "cpu/quantized/bytes_baseline.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotPixels = 1, kDotChannels = 16;

inline Ints dot(Ints sum, Ints pixels, Ints weights) {
  uint8_t x[4];
  int8_t w[4];
  memcpy(x, &pixels, 4);
  memcpy(w, &weights, 4);
  return sum + x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/dot.inl"
//
#include "cpu/quantized/ends.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesBaseline = {"baseline", pieces, run, quantize, quantize_words, dequantize};
}
