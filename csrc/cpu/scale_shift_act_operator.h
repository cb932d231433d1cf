// The operator's CPU kernel, for the other kernels that end with it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>

namespace fused_resnet::cpu {

// See fused_resnet/reference.py, `scale_shift_act`. The output lies in the pool's memory.
torch::stable::Tensor scale_shift_act(const torch::stable::Tensor& input,
                                      const torch::stable::Tensor& scale,
                                      const torch::stable::Tensor& shift,
                                      const std::optional<torch::stable::Tensor>& residual,
                                      const std::string& activation);

}  // namespace fused_resnet::cpu
