// The native convolution of float32, rounded to bfloat16, on AMX tiles: for users who allow that.
#if defined(__x86_64__)

#include "cpu/tiles_amx.h"

namespace fused_resnet::cpu {
namespace {
using Element = Float32;
using Storage = float;
constexpr int kParts = 1;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvFloat32MediumAmx = {"amx",        16,  kTileBlockK,   2 * kParts,
                                       kBlockPixels, 180, scratch_bytes, run};
}

#endif
