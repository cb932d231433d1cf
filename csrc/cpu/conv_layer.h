// A convolution and its batch norm as the operators receive them, and what the kernel makes of
// them.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/conv.h"
#include "cpu/inference_plan.h"
#include "memory_format.h"

namespace fused_resnet::cpu {

struct ConvLayer {
  torch::stable::Tensor weight, packed, running_mean, running_var;
  std::optional<torch::stable::Tensor> bn_weight, bn_bias, bias;
  double eps;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
};

// A layer for a step of a plan to keep.
ConvLayer lent(PlanRecording& recording, const ConvLayer& layer);

// Batch norm with running statistics and ReLU on a convolution's input: the prologue.
struct InputNorm {
  torch::stable::Tensor mean, var;
  std::optional<torch::stable::Tensor> weight, bias;
  double eps;
};

// Its factors and addends, as the kernel takes them and as batch_norm_act has them, to the bit.
class Prologue {
 public:
  Prologue(const InputNorm& norm, int64_t C, torch::headeronly::ScalarType dtype);
  // `conv` points into this object from then on.
  void add_to(Conv& conv) const;

 private:
  std::vector<float> scale_, shift_;
};

// This machine's vector kernels, or null.
const ConvIsa* vector_isa();

// This machine's kernels on tiles, or null.
const ConvIsa* tile_isa();

// This machine's kernels on pairs of bfloat16, or null.
const ConvIsa* pair_isa();

// The kernels that run a convolution whose groups have c input and k output channels, or null.
const ConvIsa* conv_isa(torch::headeronly::ScalarType dtype, int64_t groups, int64_t c, int64_t k);

// How many products of bfloat16 stand for one of float32 on tiles from now on: 6, 3 or 1.
void set_float32_products(int64_t products);

// From how many output pixels on, of all images, a float32 convolution with such a weight
// (K, C / groups, R, S) runs on tiles; -1: it never does.
int64_t float32_pixels_for_tiles(std::vector<int64_t> weight_shape, std::vector<int64_t> stride,
                                 int64_t groups, bool has_pool);

// From how many tiles of 2 x 2 outputs on, of all images, a convolution with such a weight that is
// on vectors takes fewer products, by Winograd's filtering; -1: it never does.
int64_t tiles_for_winograd(std::vector<int64_t> weight_shape, std::vector<int64_t> stride,
                           std::vector<int64_t> dilation, int64_t groups, bool has_pool);

// A weight (K, C / groups, R, S) in the layout of the kernel that will read it: its WeightLayout.
torch::stable::Tensor pack_conv_weight(torch::stable::Tensor weight, int64_t groups);

// A weight that is packed for one call, since it changes before the next, in the pool's memory.
struct PackedWeight {
  torch::stable::Tensor packed;
  bool is_finite;
};
PackedWeight pack_for_one_call(torch::stable::Tensor weight, int64_t groups);

// The weight of the convolution that passes a gradient back, for kernels on tiles or pairs: input
// and output channels have changed places and the taps run backwards.
PackedWeight pack_transposed_bfloat16(torch::stable::Tensor weight);

// Whether `packed` is `weight` in the kernel's layout, value by value.
bool conv_weight_is_packed(torch::stable::Tensor weight, torch::stable::Tensor packed,
                           int64_t groups);

// Whether the layer's packed weight has the weight's values, as far as a sample tells.
bool seems_current(const ConvLayer& layer);

// A layer's kernel and geometry, checked, for inputs of one size. Of `layer` the weight and what
// follows the bias are read; what is missing is the identity's.
Conv conv_geometry(const ConvLayer& layer, int64_t N, int64_t C, int64_t H, int64_t W,
                   torch::headeronly::ScalarType dtype);

// A layer on inputs of one size: geometry checked, batch-norm tensors in float32. `conv` lacks only
// its tensors, strides, ReLU and pooling.
class PreparedLayer {
 public:
  PreparedLayer(const ConvLayer& layer, int64_t N, int64_t C, int64_t H, int64_t W,
                torch::headeronly::ScalarType dtype, bool compares = true);
  PreparedLayer(PreparedLayer&&) = default;
  PreparedLayer(const PreparedLayer&) = delete;  // `conv` points into copies_
  // Whether batch-norm tensors that had to be copied still have the values they had.
  bool has_norm_of(const ConvLayer& layer) const;
  Conv conv;
  // Whether the packed weight seems to be made of the weight's present values, unless it is left to
  // the caller to compare them. It is not written to, since another thread may be reading it.
  bool is_current;

 private:
  std::vector<float> copies_[5];
};

// Fails unless the kernels keep offsets for all taps of a (K, C, R, S) weight.
void check_taps(const char* op, const torch::stable::Tensor& weight);

// Fails unless the bytes that a convolution reads, writes and keeps fit 64 bits, all sizes known.
void check_memory(const char* op, const Conv& conv);

// {kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w} over a P x Q image.
MaxPool make_pool(const std::vector<int64_t>& numbers, int64_t P, int64_t Q);

Dtype kernel_dtype(torch::headeronly::ScalarType dtype);

class RowStatistics;

// Runs the convolution on torch's threads, and takes its outputs' statistics along, but where the
// weight is not finite.
void run_conv(Conv conv, RowStatistics* statistics = nullptr);

// How many bytes of the second-level cache a core has.
int64_t l2_bytes();

// Whether a tensor that is written cannot still be in the second-level cache when it is read.
bool exceeds_caches(const torch::stable::Tensor& tensor);

// A 4-d tensor's strides in a layout.
Strides dense_strides(int64_t C, int64_t H, int64_t W, bool channels_last);
Strides strides_of(const torch::stable::Tensor& tensor);

// An uninitialised tensor in the pool's memory.
torch::stable::Tensor pool_tensor(const std::vector<int64_t>& sizes,
                                  const std::vector<int64_t>& strides,
                                  torch::headeronly::ScalarType dtype);
torch::stable::Tensor empty_activation(int64_t N, int64_t C, int64_t H, int64_t W,
                                       torch::headeronly::ScalarType dtype, bool channels_last);

}  // namespace fused_resnet::cpu
