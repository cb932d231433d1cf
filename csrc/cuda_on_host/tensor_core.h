// What a tensor core computes of numbers, for instructions of a warp and of a warpgroup.
#pragma once

#include <cstdint>

#include "cuda_on_host/execution.h"

namespace fused_resnet::on_host {

// A 16-bit element.
float widened(Element element, uint16_t bits);

// sums += a b, a (rows, 16) and b (16, columns) row by row, columns a multiple of 64.
void multiply_rows(Element element, float* sums, const float* a, const float* b, int rows,
                   int columns);

}  // namespace fused_resnet::on_host
