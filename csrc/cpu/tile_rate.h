// How fast the unit that multiplies tiles, or pairs in vectors, is at best, for benchmarks.
#pragma once

#include <cstdint>

namespace fused_resnet::cpu {

// Steps of four products of tiles with the loads of conv_tiles.inl's: two tiles of pixels and two
// of weights, from 16 KiB in the first-level cache. Returns how many multiply-adds a step makes.
int64_t multiply_bfloat16_tiles(int64_t steps);
int64_t multiply_byte_tiles(int64_t steps);

// Steps of 32 pairs for 14 pixels and 32 output channels, with the loads of conv_kernel.inl's.
int64_t multiply_bfloat16_pairs(int64_t steps);

}  // namespace fused_resnet::cpu
