// The kernel of conv_float32_high_amx.cpp over emulated tiles.

#include "cpu/tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {
using Element = Value;
using Storage = float;
constexpr int kParts = 2;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvFloat32HighAmxEmulated = {"amx_emulated", 16,  kTileBlockK,   2 * kParts,
                                             kBlockPixels,   110, scratch_bytes, run};
}
