// The convolution of bytes on emulated tiles, for any processor.
#include "cpu/quantized/byte_tiles_emulated.h"
//
#include "cpu/quantized/tiles.inl"
//
#include "cpu/quantized/tile_run.inl"
//
#include "cpu/quantized/ends.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAmxEmulated = {
    "amx_emulated", pieces, run, quantize, quantize_words, dequantize, ByteLayout::tiles, false};
}
