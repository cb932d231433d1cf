// The convolution of bytes on AMX tiles.
#if defined(__x86_64__)

#include "cpu/quantized/byte_tiles_amx.h"
//
#include "cpu/quantized/tiles.inl"
//
#include "cpu/quantized/kernel.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAmx = {"amx", run, quantize, quantize_words, dequantize};
}

#endif
