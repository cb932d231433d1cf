// What the host hands to the Bottleneck chain for Hopper.
#pragma once

#include "cuda/conv_bn_act.h"
#include "cuda/device/tensor_map.h"

namespace fused_resnet {

// A batch norm, and the bias of the convolution before it.
struct BottleneckNorm {
  Parameter running_mean, running_var, bn_weight, bn_bias, bias;
  float eps;
};

// Sizes in elements. Pixels are those of the output, M = N P Q of them.
struct HopperBottleneck {
  // With 128 bytes of the innermost dimension at a time; of filters a block's share.
  device::TensorMap input;     // (width, W, H, N), windows
  device::TensorMap weight;    // (width, R S, width), one tap
  device::TensorMap expand;    // (width, 1, K)
  device::TensorMap reduce;    // (K, 1, next)
  device::TensorMap shortcut;  // (K, M), slabs of a consumer's rows
  device::TensorMap output;    // likewise
  device::TensorMap next;      // (next, M), likewise
  BottleneckNorm norm, expand_norm, reduce_norm;

  int M, P, Q, K, R, S;
  int next_width;  // 0: the block is the last one, and all that is said of the next undefined
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

// Runs instance kBottleneckTiles[tile] on as many blocks as there are multiprocessors.
template <typename T>
void launch_hopper_bottleneck(const HopperBottleneck& block, int tile, int multiprocessors,
                              cudaStream_t stream);

extern template void launch_hopper_bottleneck<__half>(const HopperBottleneck&, int, int,
                                                      cudaStream_t);
extern template void launch_hopper_bottleneck<__nv_bfloat16>(const HopperBottleneck&, int, int,
                                                             cudaStream_t);

}  // namespace fused_resnet
