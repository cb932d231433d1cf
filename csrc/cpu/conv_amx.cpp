// The native convolution of bfloat16 on AMX tiles.
#if defined(__x86_64__)

#include "cpu/tiles_amx.h"

namespace fused_resnet::cpu {
namespace {
using Element = Bfloat16;
using Storage = uint16_t;  // a bfloat16's bits
constexpr int kParts = 1;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvAmx = {"amx",         16,  kTileBlockK,         2, kBlockPixels, 256,
                          scratch_bytes, run, WeightLayout::kTiles};
}

#endif
