// The native convolution of float32, in two parts and three products, on AMX tiles: for users who
// allow TensorFloat-32.
#if defined(__x86_64__)

#include "cpu/tiles_amx.h"

namespace fused_resnet::cpu {
namespace {
using Element = Float32;
using Storage = float;
constexpr int kParts = 2;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvFloat32HighAmx = {"amx",        16,  kTileBlockK,   2 * kParts,
                                     kBlockPixels, 110, scratch_bytes, run};
}

#endif
