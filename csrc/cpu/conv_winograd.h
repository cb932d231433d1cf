// The kernels of conv_winograd.inl, one for each of the vector kernels, whose packed weights they
// take. Their tasks' rows are of tiles of 2 x 2 outputs: row = n * div_up(P, kWinogradTile) + p.
// For files of any instruction set: see isa.h.
#pragma once

#include "cpu/conv.h"

namespace fused_resnet::cpu {

constexpr int64_t kWinogradTile = 2;

#if defined(__x86_64__)
extern const ConvIsa kConvWinogradAvx512;
extern const ConvIsa kConvWinogradAvx2;
#endif

}  // namespace fused_resnet::cpu
