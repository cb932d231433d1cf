// What batch norm's training shares with the convolutions in front of it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "cpu/batch_norm_rows.h"

namespace fused_resnet::cpu {

// This machine's loops for tensors of a dtype.
const BatchNormRows& rows_for(torch::headeronly::ScalarType dtype);

// Mean and biased variance of each channel, float32 (float64 for float64).
std::tuple<torch::stable::Tensor, torch::stable::Tensor> batch_statistics(
    torch::stable::Tensor input);

}  // namespace fused_resnet::cpu
