// What the host hands to the convolution for Hopper.
#pragma once

#include "cuda/conv_bn_act.h"
#include "cuda/device/tensor_map.h"

namespace fused_resnet {

// Sizes in elements. Pixels are those of the output, M = N P Q of them.
struct HopperConv {
  // With 128 bytes of the innermost dimension at a time.
  device::TensorMap input;     // (C, W, H, N), windows
  device::TensorMap weight;    // (C, R S, K), one tap of a block's share of filters
  device::TensorMap residual;  // (K, M), slabs of a consumer's rows
  device::TensorMap output;    // likewise
  bool has_residual;
  Parameter running_mean, running_var, bn_weight, bn_bias, bias;
  float eps;
  float floor;  // the activation is max(x, floor): 0 for relu, -inf for none

  int M, C, P, Q, K, R, S;
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;

  Activation activation;
};

// Runs instance kHopperTiles[tile] on as many blocks as there are multiprocessors. T is the
// tensors' dtype, whose tiles these are.
template <typename T>
void launch_hopper_conv(const HopperConv& conv, int tile, int multiprocessors, cudaStream_t stream);

extern template void launch_hopper_conv<__half>(const HopperConv&, int, int, cudaStream_t);
extern template void launch_hopper_conv<__nv_bfloat16>(const HopperConv&, int, int, cudaStream_t);
extern template void launch_hopper_conv<float>(const HopperConv&, int, int, cudaStream_t);

}  // namespace fused_resnet
