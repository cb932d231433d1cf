// The gradient in a weight of bfloat16 in pairs, on AVX512_BF16.
#if defined(__x86_64__)

#include "cpu/weight_gradient.h"

#include "cpu/pairs_avx512bf16.h"
#include "cpu/transposed_tiles_avx512.h"

#define FR_PAIRS

namespace fused_resnet::cpu {
namespace {
using Element = Bfloat16;
using Storage = uint16_t;  // a bfloat16's bits
constexpr int kParts = 1;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/weight_gradient_tiles.inl"

namespace fused_resnet::cpu {
const WeightGradientIsa kWeightGradientAvx512Bf16 = {kParts,     512, scratch_bytes,
                                                     slab_bytes, run, combine};
}

#endif
