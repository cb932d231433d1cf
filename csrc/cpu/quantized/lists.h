// Weights packed as lists (ByteLayout::lists).
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "cpu/quantized/conv.h"

namespace fused_resnet::cpu {

// From a weight's tiles and the vectors behind them.
torch::stable::Tensor pack_lists(const char* op, const int8_t* tiles, const ByteFilter& filter);

// Whether they are lists of a weight of this filter, as far as reading them is safe.
void check_lists(const char* op, const torch::stable::Tensor& packed, const ByteFilter& filter);

// Where the segments of a filter's runs are, in bytes from the pixel under the first tap.
std::vector<int64_t> segment_offsets(const ByteFilter& filter, int64_t tap_h, int64_t tap_w);

}  // namespace fused_resnet::cpu
