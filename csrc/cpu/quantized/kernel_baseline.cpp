// The convolution of bytes for any processor.
#include "cpu/quantized/bytes_baseline.h"

namespace fused_resnet::cpu {
namespace {

constexpr int kDotPixels = 1, kDotChannels = 16;

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/dot.inl"
//
#include "cpu/quantized/ends.inl"
//
#include "cpu/quantized/linear.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesBaseline = {
    .name = "baseline",
    .pieces = pieces,
    .run = run,
    .quantize = quantize,
    .quantize_words = quantize_words,
    .dequantize = dequantize,
    .multiply_row = multiply_row,
    .add_bytes = add_bytes,
};
}
