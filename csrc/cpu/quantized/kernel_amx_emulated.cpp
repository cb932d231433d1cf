// The convolution of bytes on emulated tiles, for any processor.
#include "cpu/quantized/byte_tiles_emulated.h"
//
#include "cpu/quantized/tiles.inl"
//
#include "cpu/quantized/tile_run.inl"
//
#include "cpu/quantized/ends.inl"
//
#include "cpu/quantized/linear.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAmxEmulated = {
    .name = "amx_emulated",
    .pieces = pieces,
    .run = run,
    .quantize = quantize,
    .quantize_words = quantize_words,
    .dequantize = dequantize,
    .multiply_row = multiply_row,
    .add_bytes = add_bytes,
    .shares = false,
};
}
