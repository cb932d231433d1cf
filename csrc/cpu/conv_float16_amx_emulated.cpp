// The kernel of conv_float16_amx.cpp over emulated tiles.

#include "cpu/tiles_emulated.h"

namespace fused_resnet::cpu {
namespace {
using Element = Scalar<Half, float>;
using Storage = uint16_t;  // a float16's bits
constexpr int kParts = 2;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvFloat16AmxEmulated = {"amx_emulated", 16,  kTileBlockK,   2 * kParts,
                                         kBlockPixels,   110, scratch_bytes, run};
}
