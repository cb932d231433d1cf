// What the host hands to the convolution kernel.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "activations.h"
#include "cuda/narrow_residual.h"
#include "cuda/recording.h"

namespace fused_resnet {

// A vector of K numbers in whatever dtype it was found; null stands for a constant.
struct Parameter {
  enum class Type { kFloat32, kFloat16, kBFloat16, kFloat64 };
  const void* values;
  Type type;
  int unused = 0;  // see NarrowResidual
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
  int unused = 0;
  int64_t input_n, input_h, input_w, input_c;
  int64_t weight_k, weight_c, weight_r, weight_s;

  // Whether K / groups, residual and output allow 16-byte accesses.
  bool vector_output;
  char unused_too[7] = {};

  // Of a sum that several blocks share: their parts, and for each tile how many are there.
  float* partials;
  int* tickets;

  Activation activation;
};

template <>
struct Addresses<Conv> {
  static constexpr bool kKnown = true;
  static constexpr std::initializer_list<size_t> kOffsets{
      offsetof(Conv, input),
      offsetof(Conv, weight),
      offsetof(Conv, residual),
      offsetof(Conv, narrow.values),
      offsetof(Conv, output),
      offsetof(Conv, running_mean.values),
      offsetof(Conv, running_var.values),
      offsetof(Conv, bn_weight.values),
      offsetof(Conv, bn_bias.values),
      offsetof(Conv, bias.values),
      offsetof(Conv, partials),
      offsetof(Conv, tickets),
  };
};

// Runs instance kTiles[tile], `split` blocks sharing each tile's sum. T is the tensors' dtype.
template <typename T>
void launch_conv_bn_act(const Conv& conv, int tile, int split, cudaStream_t stream);

extern template void launch_conv_bn_act<__half>(const Conv&, int, int, cudaStream_t);
extern template void launch_conv_bn_act<__nv_bfloat16>(const Conv&, int, int, cudaStream_t);
extern template void launch_conv_bn_act<float>(const Conv&, int, int, cudaStream_t);

}  // namespace fused_resnet
