// The convolution of bytes on AMX tiles.
#if defined(__x86_64__)

#include "cpu/quantized/byte_tiles_amx.h"
//
#include "cpu/quantized/tiles.inl"
//
#include "cpu/quantized/tile_run.inl"
//
#include "cpu/quantized/ends.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAmx = {
    "amx", pieces, run, quantize, quantize_words, dequantize, ByteLayout::tiles, false};
}

#endif
