// Outputs of a convolution that meet padding with a weight that is not finite. Padding is zeros in
// the kernels' memory, and zero times infinity is NaN; but padding takes no part. So these outputs,
// few of a network, are computed one by one of the taps that are in the image.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/conv.h"
#include "cpu/packed_layout.h"

namespace fused_resnet::cpu {

// The outputs of one image. Sums are float64, rounded to float32 before batch norm.
class BorderOutputs {
 public:
  // Computes them: before the kernel runs, since a residual may be where the output will be. `conv`
  // is as the kernel gets it, with N = 1.
  BorderOutputs(const Conv& conv, const PackedLayout& layout);

  // Writes them, after the kernel has run.
  void store(const Conv& conv) const;

 private:
  // In the output, which may be pooled.
  struct Output {
    int64_t k, p, q;
    float value;
  };
  std::vector<Output> outputs_;
};

}  // namespace fused_resnet::cpu
