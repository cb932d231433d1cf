// What the host hands to the convolution kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "activations.h"
#include "cuda/narrow_residual.h"

namespace fused_resnet {

// A vector of K numbers in whatever dtype it was found; null stands for a constant.
struct Parameter {
  enum class Type { kFloat32, kFloat16, kBFloat16, kFloat64 };
  const void* values;
  Type type;
};

// Sizes and strides in elements. Pixels are those of the output, M = N P Q of them.
struct Conv {
  const void* input;
  const void* weight;
  const void* residual;   // (N, P, Q, K), dense, or null
  NarrowResidual narrow;  // instead
  void* output;           // (N, P, Q, K), dense
  Parameter running_mean, running_var, bn_weight, bn_bias, bias;
  float eps;
  float floor;  // the activation is max(x, floor): 0 for relu, -inf for none

  int M, H, W, C, P, Q, K, R, S;
  int group_c, group_k;
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
  int64_t input_n, input_h, input_w, input_c;
  int64_t weight_k, weight_c, weight_r, weight_s;

  // Whether K / groups, residual and output allow 16-byte accesses.
  bool vector_output;

  // Of a sum that several blocks share: their parts, and for each tile how many are there.
  float* partials;
  int* tickets;

  Activation activation;
};

// Runs instance kTiles[tile], `split` blocks sharing each tile's sum. T is the tensors' dtype.
template <typename T>
void launch_conv_bn_act(const Conv& conv, int tile, int split, cudaStream_t stream);

extern template void launch_conv_bn_act<__half>(const Conv&, int, int, cudaStream_t);
extern template void launch_conv_bn_act<__nv_bfloat16>(const Conv&, int, int, cudaStream_t);
extern template void launch_conv_bn_act<float>(const Conv&, int, int, cudaStream_t);

}  // namespace fused_resnet
