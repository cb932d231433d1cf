// The native convolution of float32, in three parts, on AMX tiles.
#if defined(__x86_64__)

#include "cpu/tiles_amx.h"

namespace fused_resnet::cpu {
namespace {
using Element = Float32;
using Storage = float;
constexpr int kParts = 3;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvFloat32Amx = {"amx",        16, kTileBlockK,   2 * kParts,
                                 kBlockPixels, 60, scratch_bytes, run};
}

#endif
