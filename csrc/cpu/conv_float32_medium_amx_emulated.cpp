// The kernel of conv_float32_medium_amx.cpp over emulated tiles.

#include "cpu/tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {
using Element = Value;
using Storage = float;
constexpr int kParts = 1;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvFloat32MediumAmxEmulated = {"amx_emulated", 16,  kTileBlockK,   2 * kParts,
                                               kBlockPixels,   180, scratch_bytes, run};
}
