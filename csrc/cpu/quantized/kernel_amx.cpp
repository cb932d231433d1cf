// The convolution of bytes on AMX tiles.
#if defined(__x86_64__)

#include "cpu/quantized/byte_tiles_amx.h"

namespace fused_resnet::cpu {
namespace {

// Of linear.inl.
FR_BYTES_INLINE Ints dot(Ints sums, Ints inputs, Ints weights) {
  // In words, of which a product of two takes all: the even bytes and the odd ones.
  const Ints even = _mm512_madd_epi16(_mm512_and_si512(inputs, _mm512_set1_epi16(255)),
                                      _mm512_srai_epi16(_mm512_slli_epi16(weights, 8), 8));
  const Ints odd = _mm512_madd_epi16(_mm512_srli_epi16(inputs, 8), _mm512_srai_epi16(weights, 8));
  return add_ints(sums, add_ints(even, odd));
}

}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/quantized/tiles.inl"
//
#include "cpu/quantized/tile_run.inl"
//
#include "cpu/quantized/ends.inl"
//
#include "cpu/quantized/linear.inl"

namespace fused_resnet::cpu {
const ByteKernels kBytesAmx = {
    .name = "amx",
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

#endif
