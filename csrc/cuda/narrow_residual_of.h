// A tensor as the kernels take a residual of fewer channels than the output.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "cuda/narrow_residual.h"

namespace fused_resnet {

// Whether a tensor's elements lie as (N, *, C) without gaps, so that its pixels are numbered as
// they lie.
inline bool has_pixels_in_order(const torch::stable::Tensor& tensor) {
  int64_t expected = 1;
  const auto lies_next = [&](int64_t dim) {
    const bool next = tensor.size(dim) == 1 || tensor.stride(dim) == expected;
    expected *= tensor.size(dim);
    return next;
  };
  bool in_order = lies_next(1);
  for (int64_t dim = tensor.dim() - 1; dim > 1; --dim) in_order = in_order && lies_next(dim);
  return in_order && lies_next(0);
}

// The residual, (N, C), (N, C, W) or (N, C, H, W), of an output of `channels` channels. Kernels
// access `most` elements at once, a power of two, and begin at channels that are multiples of
// `begins_at`.
inline NarrowResidual narrow_residual_of(const torch::stable::Tensor& residual, int64_t channels,
                                         int64_t most, int64_t begins_at) {
  const int64_t dims = residual.dim(), begin = (channels - residual.size(1)) / 2;
  const auto size = [&](int64_t dim) { return dim < dims ? residual.size(dim) : 1; };
  const auto stride = [&](int64_t dim) { return size(dim) > 1 ? residual.stride(dim) : 0; };
  const int64_t rows = dims > 3 ? 2 : dims, columns = dims > 3 ? 3 : 2;  // beyond the last: one

  const auto address = reinterpret_cast<uintptr_t>(residual.const_data_ptr());
  const auto elements = static_cast<int64_t>(address / residual.element_size());
  int64_t width = stride(1) == 1 ? most : 1;
  for (const int64_t multiple :
       {elements, begin, size(1), stride(0), stride(rows), stride(columns), begins_at}) {
    while (multiple % width != 0) width /= 2;
  }
  return {
      .values = residual.const_data_ptr(),
      .begin = static_cast<int>(begin),
      .channels = static_cast<int>(size(1)),
      .P = static_cast<unsigned>(size(rows)),
      .Q = static_cast<unsigned>(size(columns)),
      .n = stride(0),
      .h = stride(rows),
      .w = stride(columns),
      .c = stride(1),
      .width = static_cast<int>(width),
  };
}

}  // namespace fused_resnet
