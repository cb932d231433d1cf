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
#include <atomic>
#include <cstring>

#include "checks.h"
#include "cpu/conv_layer.h"
#include "cpu/finite.h"
#include "scale_shift_act.h"

namespace fused_resnet::cpu {
namespace {

// [blocks of C][R][S][K][block_k] float32, taps backwards, zero where C ends inside a block.
// Returns whether all values are finite.
template <class T>
bool pack_transposed(const T* source, const Tensor& weight, int64_t block_k, float* packed) {
  const int64_t K = weight.size(0), C = weight.size(1), R = weight.size(2), S = weight.size(3);
  const Strides stride = strides_of(weight);
  const int64_t blocks = div_up(C, block_k);
  std::atomic<bool> finite{true};
  // Each piece is one tap of one block.
  torch::stable::parallel_for(0, blocks * R * S, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t c0 = piece / (R * S) * block_k, valid = std::min(block_k, C - c0);
      const int64_t tap = R * S - 1 - piece % (R * S);
      const T* from = source + c0 * stride.c + tap / S * stride.h + tap % S * stride.w;
      float* to = packed + piece * K * block_k;
      uint32_t carries = 0;
      for (int64_t k = 0; k < K; ++k, from += stride.n, to += block_k) {
        const auto put = [&](int64_t c, T value) {
          to[c] = static_cast<float>(value);
          carries |= carry_of_infinity(to[c]);
        };
        if (stride.c == 1) {
          for (int64_t c = 0; c < valid; ++c) put(c, from[c]);
        } else {
          for (int64_t c = 0; c < valid; ++c) put(c, from[c * stride.c]);
        }
        std::fill(to + valid, to + block_k, 0.0f);
      }
      if (is_infinity_among(carries)) finite.store(false, std::memory_order_relaxed);
    }
  });
  return finite.load();
}

PackedWeight packed_transposed(const Tensor& weight) {
  const int64_t block_k = vector_isa()->block_k;
  const int64_t C = div_up(weight.size(1), block_k) * block_k;
  const int64_t bytes = checked_product("conv_input_gradient", "weight",
                                        {C, weight.size(0), weight.size(2), weight.size(3), 4});
  Tensor packed = pool_tensor({bytes / 4}, {1}, ScalarType::Float);
  float* to = packed.mutable_data_ptr<float>();
  const void* from = weight.const_data_ptr();
  const bool finite = [&] {
    switch (weight.scalar_type()) {
      case ScalarType::Float:
        return pack_transposed(static_cast<const float*>(from), weight, block_k, to);
      case ScalarType::BFloat16:
        return pack_transposed(static_cast<const torch::headeronly::BFloat16*>(from), weight,
                               block_k, to);
      default:
        return pack_transposed(static_cast<const torch::headeronly::Half*>(from), weight, block_k,
                               to);
    }
  }();
  return {packed, finite};
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
  check_rank(name, "grad", grad, 4);
  check_rank(name, "weight", weight, 4);
  check_rank(name, "grad_input", grad_input, 4);
  check_floating(name, "grad", grad, false);
  const ScalarType dtype = grad.scalar_type();
  check_dtype(name, "weight", weight, dtype);
  check_dtype(name, "grad_input", grad_input, dtype);
  FR_CHECK(is_non_overlapping_and_dense(grad_input), name, ": grad_input must be dense");
  Conv conv{};
  conv.isa = conv_isa(dtype, 1, weight.size(0), weight.size(1));
  FR_CHECK(conv.isa != nullptr, name, ": this processor has neither AVX2 nor AVX-512");
  conv.dtype = kernel_dtype(dtype);
  conv.N = grad.size(0);
  conv.C = grad.size(1);
  conv.H = grad.size(2);
  conv.W = conv.last_w = grad.size(3);
  conv.K = grad_input.size(1);
  conv.R = weight.size(2);
  conv.S = weight.size(3);
  FR_CHECK(weight.size(0) == conv.C && weight.size(1) == conv.K && grad_input.size(0) == conv.N,
           name, ": weight has shape ", shape_string(weight), ", grad ", shape_string(grad),
           " and grad_input ", shape_string(grad_input), ", which do not go together");
  check_taps(name, weight);
  const FilterAxis rows(name, grad_input.size(2), conv.R, stride_h, pad_h, dil_h);
  const FilterAxis columns(name, grad_input.size(3), conv.S, stride_w, pad_w, dil_w);
  FR_CHECK(rows.outputs == conv.H && columns.outputs == conv.W, name,
           ": grad does not have the size of the convolution's output, ", rows.outputs, " x ",
           columns.outputs);
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
    FR_CHECK(is_pointwise(conv) && pad_h == 0 && pad_w == 0, name,
             ": with a stride, the convolution must be 1x1 without padding");
    conv.P = conv.H;
    conv.Q = conv.last_q = conv.W;
    // Where there is one row or column its stride may be any number.
    conv.out.h = conv.P > 1 ? conv.out.h * stride_h : 0;
    conv.out.w = conv.Q > 1 ? conv.out.w * stride_w : 0;
    if (!accumulate) fill_zero(grad_input);
  } else {
    FR_CHECK(conv.pad_h >= 0 && conv.pad_w >= 0, name, ": padding is ", pad_h, " x ", pad_w,
             ", wider than weight spans");
    conv.P = grad_input.size(2);
    conv.Q = conv.last_q = grad_input.size(3);
  }
  if (grad_input.numel() == 0) return;
  if (grad.numel() == 0 || weight.numel() == 0) {
    if (!accumulate) fill_zero(grad_input);
    return;
  }
  check_memory(name, conv);
  const auto [packed, finite] =
      conv.isa == vector_isa() ? packed_transposed(weight) : pack_transposed_bfloat16(weight);
  conv.weight = packed.const_data_ptr();
  conv.weight_is_finite = finite;
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
