// The operator's CPU kernel, for the other kernels that end with it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>

#include "activations.h"
#include "cpu/scale_shift_act_row.h"

namespace fused_resnet::cpu {

// This processor's loop.
ScaleShiftActRow scale_shift_act_row(torch::headeronly::ScalarType dtype);

// See fused_resnet/reference.py, `scale_shift_act`. The output lies in the pool's memory, and so
// does what `passed`, if it is not null, is set to where the kernel keeps ReLU's mask: for each
// value of the output in memory order, the first one's the lowest of its byte, a bit that is set
// where the gradient passes.
torch::stable::Tensor scale_shift_act(const torch::stable::Tensor& input,
                                      const torch::stable::Tensor& scale,
                                      const torch::stable::Tensor& shift,
                                      const std::optional<torch::stable::Tensor>& residual,
                                      const std::string& activation,
                                      std::optional<torch::stable::Tensor>* passed = nullptr);

// The same with any activation, of float64 with ReLU or none, into `output`, which is dense, lies
// as the input does and may be the input.
void scale_shift_act_into(const torch::stable::Tensor& input, const torch::stable::Tensor& scale,
                          const torch::stable::Tensor& shift,
                          const std::optional<torch::stable::Tensor>& residual,
                          const Activation& act, const torch::stable::Tensor& output);

}  // namespace fused_resnet::cpu
