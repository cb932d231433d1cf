// Memory formats of (N, C, H, W) tensors.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>

namespace fused_resnet {

// Whether the strides are those of channels_last, ties broken as torch breaks them. A convolution's
// output is channels_last if its input or its weight is.
inline bool is_channels_last(const torch::stable::Tensor& t) {
  int64_t least = 0;
  if (t.stride(1) == 0) return false;
  for (const int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least) return false;
    // N x C x 1 x 1 with all strides alike is contiguous.
    if (d == 0 && least == t.stride(1)) return false;
    least = t.stride(d) * std::max<int64_t>(t.size(d), 1);
  }
  return true;
}

}  // namespace fused_resnet
