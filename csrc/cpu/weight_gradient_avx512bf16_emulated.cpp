// The kernel of weight_gradient_avx512bf16.cpp for any processor.

#include "cpu/weight_gradient.h"

#include "cpu/pairs_emulated.h"
#include "cpu/transposed_tiles_emulated.h"

#define FR_PAIRS

namespace fused_resnet::cpu {
namespace {
using Element = Scalar<BFloat16, float>;
using Storage = uint16_t;  // a bfloat16's bits
constexpr int kParts = 1;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/weight_gradient_tiles.inl"

namespace fused_resnet::cpu {
const WeightGradientIsa kWeightGradientAvx512Bf16Emulated = {kParts,     512, scratch_bytes,
                                                             slab_bytes, run, combine};
}
