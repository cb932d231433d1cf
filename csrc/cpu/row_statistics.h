// Mean and variance of a convolution's output channels, taken while a task's outputs are in the
// cache.
//
// A piece is one of the convolution's rows, which do not depend on who computes them: each has its
// own mean and sum of squared deviations from it, in float32, and those of all rows are merged in
// float64 in their order. So the result is the same for any number of threads.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <tuple>

#include "cpu/batch_norm_rows.h"
#include "cpu/conv.h"

namespace fused_resnet::cpu {

class RowStatistics {
 public:
  explicit RowStatistics(torch::headeronly::ScalarType dtype);

  // Before the first task, of the convolution as tasks see it. Its output is channels_last.
  void begin(const Conv& conv);
  // Of rows [row_begin, row_end) and output channels [begin, end), which have just been written.
  void add(const Conv& conv, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end);
  // Mean and biased variance (K,), float32. False where float32 was not enough for a row's sums:
  // squares that overflow or underflow, or outputs that are not finite; and where it never began.
  bool finish(float* mean, float* variance) const;

 private:
  // [rows][mean, what the mean leaves over, squares][K]
  float* row(int64_t index) const { return pieces_ + index * 3 * channels_; }

  const BatchNormRows& kernels_;
  torch::stable::Tensor memory_;
  float* pieces_ = nullptr;
  int64_t rows_ = 0, channels_ = 0;
  int64_t image_rows_ = 0, pixels_ = 0, last_pixels_ = 0;  // of a row, and of an image's last
};

}  // namespace fused_resnet::cpu
