// The kernel of weight_gradient_float32_amx.cpp over emulated tiles.

#include "cpu/weight_gradient.h"

#include "cpu/transposed_tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {
using Element = Value;
using Storage = float;
constexpr int kParts = 3;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/weight_gradient_tiles.inl"

namespace fused_resnet::cpu {
const WeightGradientIsa kWeightGradientFloat32AmxEmulated = {kParts,     256, scratch_bytes,
                                                             slab_bytes, run, combine};
}
