// The kernel of weight_gradient_amx.cpp over emulated tiles.

#include "cpu/weight_gradient.h"

#include "cpu/transposed_tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {
using Element = Scalar<BFloat16, float>;
using Storage = uint16_t;  // a bfloat16's bits
constexpr int kParts = 1;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/weight_gradient_tiles.inl"

namespace fused_resnet::cpu {
const WeightGradientIsa kWeightGradientAmxEmulated = {kParts,     512, scratch_bytes,
                                                      slab_bytes, run, combine};
}
