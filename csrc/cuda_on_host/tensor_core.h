// What a tensor core computes of numbers, for instructions of a warp and of a warpgroup.
#pragma once

#include <cstdint>

#include "cuda_on_host/execution.h"

namespace fused_resnet::on_host {

// A 16-bit element.
float widened(Element element, uint16_t bits);

// Elements of 32 bytes of a row, which a product takes.
inline int depth_of(Element element) {
  return element == Element::kTf32 ? 8 : 16;
}

// The elements in 16 bytes, each as the product reads it; returns how many.
int read_chunk(Element element, const void* chunk, float* wide, int step);

// sums += a b, a (rows, depth) and b (depth, columns) row by row, columns a multiple of 64.
void multiply_rows(Element element, float* sums, const float* a, const float* b, int rows,
                   int columns);

}  // namespace fused_resnet::on_host
