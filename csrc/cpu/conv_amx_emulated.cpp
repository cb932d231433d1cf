// The kernel of conv_amx.cpp over emulated tiles.

#include "cpu/tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {
using Element = Scalar<BFloat16, float>;
using Storage = uint16_t;  // a bfloat16's bits
constexpr int kParts = 1;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvAmxEmulated = {"amx_emulated", 16,  kTileBlockK,         2, kBlockPixels, 256,
                                  scratch_bytes,  run, WeightLayout::kTiles};
}
