// A convolution's gradient in its weight, as a product over pixels:
//
//   grad_weight[k,c,r,s] = sum_{n,p,q} grad[n,k,p,q] in[n, c, p*stride+r*dil-pad,
//   q*stride+s*dil-pad]
//
// The files, in the order a call runs through them:
//   conv_weight_gradient.cpp    the operator: checks, the split into tasks, threads
//   weight_gradient_tiles.inl   one task on a unit that multiplies tiles of bfloat16, compiled by
//                               weight_gradient_amx.cpp and weight_gradient_float32_amx.cpp, or in
//                               pairs by weight_gradient_avx512bf16.cpp, and for any processor by
//                               those that end in _emulated.cpp
//   weight_gradient.h           what those share
//
// The order of every sum depends on the shape alone: over the steps of a chunk of pixels, over the
// chunks of a split, over the splits. Threads share splits and blocks of the result.
#pragma once

#include "cpu/conv.h"

namespace fused_resnet::cpu {

// Values of a block of the result.
constexpr int64_t kGradientBlock = 32 * 32;

struct WeightGradient {
  // C and K count channels of all groups.
  int64_t N, C, H, W, K, R, S, P, Q;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  // As in Conv: the last row of an image holds only so many pixels where rows are no image's.
  int64_t last_w, last_q;
  Strides grad_strides, in_strides;
  Strides out;  // of the gradient (K, C / groups, R, S)
  const void *grad, *input;
  void* output;
  // Output channels by input channels make a block, or, where `swapped`, the other way round: the
  // factor that gives a block its rows is transposed, which is slow, and only the other has taps.
  bool swapped;
  // Pixels of a chunk: so many rows of outputs of one image, or so many images with all their rows.
  int64_t chunk_rows, chunk_images;
  int64_t chunks, splits;
  // [splits][groups][blocks of rows][blocks of columns][taps][32][32], unless a task has all of the
  // pixels in one chunk.
  float* sums;
};

// How many channels of a group a block's rows, or columns, are taken from.
static inline int64_t row_channels(const WeightGradient& g) {
  return (g.swapped ? g.C : g.K) / g.groups;
}
static inline int64_t column_channels(const WeightGradient& g) {
  return (g.swapped ? g.K : g.C) / g.groups;
}
static inline int64_t row_blocks(const WeightGradient& g) {
  return div_up(row_channels(g), 32);
}
static inline int64_t column_blocks(const WeightGradient& g) {
  return div_up(column_channels(g), 32);
}
static inline int64_t sums_offset(const WeightGradient& g, int64_t split, int64_t group,
                                  int64_t row_block, int64_t column_block) {
  const int64_t block = (split * g.groups + group) * row_blocks(g) + row_block;
  return (block * column_blocks(g) + column_block) * g.R * g.S * kGradientBlock;
}

// Blocks of one group, over the pixels of one split.
struct GradientTask {
  int64_t group, split, row_begin, row_end, column_begin, column_end;
};

struct WeightGradientIsa {
  int64_t parts;         // of a value, in tiles
  int64_t chunk_pixels;  // how many a chunk should have
  int64_t (*scratch_bytes)(const WeightGradient&, const GradientTask&);
  // Bytes of the slab that a task keeps for one block of columns.
  int64_t (*slab_bytes)(const WeightGradient&);
  // Blocks' sums; and with one split, the result itself.
  void (*run)(const WeightGradient&, const GradientTask&, void* scratch);
  // The result of blocks from the sums of all splits.
  void (*combine)(const WeightGradient&, int64_t group, int64_t row_block);
};

#if defined(__x86_64__)
extern const WeightGradientIsa kWeightGradientAmx;
extern const WeightGradientIsa kWeightGradientFloat32Amx;
extern const WeightGradientIsa kWeightGradientAvx512Bf16;
#endif
extern const WeightGradientIsa kWeightGradientAmxEmulated;
extern const WeightGradientIsa kWeightGradientFloat32AmxEmulated;
extern const WeightGradientIsa kWeightGradientAvx512Bf16Emulated;

}  // namespace fused_resnet::cpu
