// The gradient in a weight of float32, in three parts, on AMX tiles.
#if defined(__x86_64__)

#include "cpu/weight_gradient.h"

#include "cpu/tiles_amx.h"
#include "cpu/transposed_tiles_avx512.h"

namespace fused_resnet::cpu {
namespace {
using Element = Float32;
using Storage = float;
constexpr int kParts = 3;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/weight_gradient_tiles.inl"

namespace fused_resnet::cpu {
const WeightGradientIsa kWeightGradientFloat32Amx = {kParts,     256, scratch_bytes,
                                                     slab_bytes, run, combine};
}

#endif
