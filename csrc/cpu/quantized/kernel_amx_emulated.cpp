// The convolution of bytes on emulated tiles, for any processor.
#include "cpu/quantized/byte_tiles_emulated.h"
//
#include "cpu/quantized/tiles.inl"
//
#include "cpu/quantized/kernel.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAmxEmulated = {"amx_emulated", run, quantize, quantize_words, dequantize};
}
