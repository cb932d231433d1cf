// What pool_linear shares with squeeze_excitation.
#pragma once

#include <cstdint>

#include "cpu/conv.h"
#include "cpu/pool_linear_rows.h"

namespace fused_resnet::cpu {

// Of an image: as many as float32 counts. One that is expanded can have any number of pixels in no
// memory at all, and would be summed up for days.
constexpr int64_t kMostPooledPixels = int64_t{1} << 24;

// This processor's loops; fails where it has none.
const PoolLinearRows& pool_linear_rows_for(Dtype dtype);

}  // namespace fused_resnet::cpu
