// The native convolution of float16, in two parts and three products, on AMX tiles.
#if defined(__x86_64__)

#include "cpu/tiles_amx.h"

namespace fused_resnet::cpu {
namespace {
using Element = Float16;
using Storage = uint16_t;  // a float16's bits
constexpr int kParts = 2;
}  // namespace
}  // namespace fused_resnet::cpu

#include "cpu/conv_tiles.inl"

namespace fused_resnet::cpu {
const ConvIsa kConvFloat16Amx = {"amx",        16,  kTileBlockK,   2 * kParts,
                                 kBlockPixels, 110, scratch_bytes, run};
}

#endif
