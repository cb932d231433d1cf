// The operator conv_input_gradient of the CPU backend: what a convolution passes back to its input.
//
//   grad_in[n,c,h,w] (+)= sum_{k,r,s} grad[n,k,p,q] w[k,c,r,s],   h = p*stride + r*dil - pad,
//                                                                w = q*stride + s*dil - pad
//
// With a stride of 1 this is the forward kernel on `grad`, with weights whose channels have changed
// places and whose taps run backwards, padded by dil * (R - 1) - pad. A pointwise convolution with
// a stride is one too, whose outputs lie `stride` pixels apart. Adding to what is there is the
// kernel's residual: each value is read and written once, by the tile that computes it.
//
// Memory traffic: grad once, the weight once to be packed, grad_in written, and read if added to.
// The packed weight lives for one call: a step of the optimizer follows before the next.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstring>

#include "cpu/conv_layer.h"

namespace fused_resnet::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// [blocks of C][R][S][K][block_k] float32, taps backwards, zero where C ends inside a block.
template <class T>
void pack_transposed(const T* source, const Tensor& weight, int64_t block_k, float* packed) {
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  const Strides stride = strides_of(weight);
  const int64_t blocks = div_up(C, block_k);
  // Each piece is one tap of one block.
  torch::stable::parallel_for(0, blocks * R * S, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t c0 = piece / (R * S) * block_k, valid = std::min(block_k, C - c0);
      const int64_t tap = R * S - 1 - piece % (R * S);
      const T* from = source + c0 * stride.c + tap / S * stride.h + tap % S * stride.w;
      float* to = packed + piece * K * block_k;
      for (int64_t k = 0; k < K; ++k, from += stride.n, to += block_k) {
        if (stride.c == 1) {
          for (int64_t c = 0; c < valid; ++c) to[c] = static_cast<float>(from[c]);
        } else {
          for (int64_t c = 0; c < valid; ++c) to[c] = static_cast<float>(from[c * stride.c]);
        }
        std::fill(to + valid, to + block_k, 0.0f);
      }
    }
  });
}

Tensor packed_transposed(const Tensor& weight) {
  const int64_t block_k = vector_isa()->block_k;
  Tensor packed = pool_tensor({div_up(weight.size(1), block_k) * weight.numel() /
                               std::max<int64_t>(weight.size(1), 1) * block_k},
                              {1}, ScalarType::Float);
  float* to = packed.mutable_data_ptr<float>();
  const void* from = weight.const_data_ptr();
  switch (weight.scalar_type()) {
    case ScalarType::Float:
      pack_transposed(static_cast<const float*>(from), weight, block_k, to);
      break;
    case ScalarType::BFloat16:
      pack_transposed(static_cast<const torch::headeronly::BFloat16*>(from), weight, block_k, to);
      break;
    default:
      pack_transposed(static_cast<const torch::headeronly::Half*>(from), weight, block_k, to);
  }
  return packed;
}

void fill_zero(const Tensor& tensor) {
  const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
  auto* data = static_cast<char*>(tensor.mutable_data_ptr());
  torch::stable::parallel_for(0, bytes, 1 << 20, [&](int64_t begin, int64_t end) {
    std::memset(data + begin, 0, static_cast<size_t>(end - begin));
  });
}

void conv_input_gradient(Tensor grad, Tensor weight, int64_t stride_h, int64_t stride_w,
                         int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w,
                         Tensor grad_input, bool accumulate) {
  constexpr const char* name = "conv_input_gradient";
  STD_TORCH_CHECK(grad.dim() == 4 && weight.dim() == 4 && grad_input.dim() == 4, name,
                  ": tensors must have 4 dimensions");
  const ScalarType dtype = grad.scalar_type();
  STD_TORCH_CHECK(weight.scalar_type() == dtype && grad_input.scalar_type() == dtype, name,
                  ": tensors must have one dtype");
  Conv conv{};
  conv.isa = conv_isa(dtype, 1, weight.size(0), weight.size(1));
  STD_TORCH_CHECK(conv.isa != nullptr, name, ": this processor has neither AVX2 nor AVX-512");
  conv.dtype = kernel_dtype(dtype);
  conv.N = grad.size(0);
  conv.C = grad.size(1);
  conv.H = grad.size(2);
  conv.W = conv.last_w = grad.size(3);
  conv.K = grad_input.size(1);
  conv.R = weight.size(2);
  conv.S = weight.size(3);
  STD_TORCH_CHECK(
      weight.size(0) == conv.C && weight.size(1) == conv.K && grad_input.size(0) == conv.N, name,
      ": shapes do not go together");
  STD_TORCH_CHECK(conv.R > 0 && conv.S > 0 && conv.R * conv.S <= kMaxRuns, name, ": weight has ",
                  conv.R * conv.S, " taps, at most ", kMaxRuns, " are supported");
  STD_TORCH_CHECK(stride_h > 0 && stride_w > 0 && dil_h > 0 && dil_w > 0, name,
                  ": stride and dilation must be positive");
  const auto outputs = [](int64_t size, int64_t pad, int64_t dil, int64_t taps, int64_t stride) {
    return (size + 2 * pad - dil * (taps - 1) - 1) / stride + 1;
  };
  STD_TORCH_CHECK(outputs(grad_input.size(2), pad_h, dil_h, conv.R, stride_h) == conv.H &&
                      outputs(grad_input.size(3), pad_w, dil_w, conv.S, stride_w) == conv.W,
                  name, ": grad does not have the size of the convolution's output");
  conv.stride_h = conv.stride_w = 1;
  conv.dil_h = dil_h;
  conv.dil_w = dil_w;
  conv.pad_h = dil_h * (conv.R - 1) - pad_h;
  conv.pad_w = dil_w * (conv.S - 1) - pad_w;
  conv.groups = 1;
  conv.in = strides_of(grad);
  conv.out = strides_of(grad_input);
  const bool strided = stride_h > 1 || stride_w > 1;
  if (strided) {
    STD_TORCH_CHECK(is_pointwise(conv) && pad_h == 0 && pad_w == 0, name,
                    ": with a stride, the convolution must be 1x1 without padding");
    conv.P = conv.H;
    conv.Q = conv.last_q = conv.W;
    conv.out.h *= stride_h;
    conv.out.w *= stride_w;
    if (!accumulate) fill_zero(grad_input);
  } else {
    STD_TORCH_CHECK(pad_h >= 0 && pad_w >= 0 && conv.pad_h >= 0 && conv.pad_w >= 0, name,
                    ": more padding than the filter is wide");
    conv.P = grad_input.size(2);
    conv.Q = conv.last_q = grad_input.size(3);
  }
  if (grad_input.numel() == 0) return;
  if (grad.numel() == 0 || weight.numel() == 0) {
    if (!accumulate) fill_zero(grad_input);
    return;
  }
  const Tensor packed =
      conv.isa == tile_isa() ? pack_transposed_tiles(weight) : packed_transposed(weight);
  conv.weight = packed.const_data_ptr();
  conv.input = grad.const_data_ptr();
  conv.output = grad_input.mutable_data_ptr();
  if (accumulate) {
    conv.residual = conv.output;
    conv.res = conv.out;
    conv.res_channels = conv.K;
  }
  run_conv(conv);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fused_resnet, CPU, m)
{
  m.impl("conv_input_gradient", TORCH_BOX(&conv_input_gradient));
}

}  // namespace fused_resnet::cpu
