// The native convolution of the CPU backend: implicit GEMM with batch norm, shortcut and activation
// in the epilogue.
//
//   out[n,k,p,q] = act(scale[k] * sum_{c,r,s} in[n, c, p*stride+r*dil-pad, q*stride+s*dil-pad]
//                                             * w[k,c,r,s]  +  shift[k]  +  residual[n,k,p,q])
//   scale = bn_weight / sqrt(running_var + eps),  shift = bn_bias + (bias - running_mean) * scale
//   act: see activation.h
//
// With a prologue, in is relu(in_scale[c] * input + in_shift[c]), rounded to the input's dtype.
//
// Memory traffic: input, packed weight and residual are read once from memory (a weight that
// exceeds the second-level cache once per chunk of output rows), the output is written once.
//
// The files, in the order a call runs through them:
//   conv_bn_act.cpp   the operator: checks, and in conv_layer.cpp weights, the split into tasks,
//                     threads
//   conv_kernel.inl   one task in vectors: gather the input rows into a slab, then tiles of the
//                     product; compiled once per instruction set, by conv_avx512.cpp,
//                     conv_avx2.cpp and, for pairs of bfloat16, conv_avx512bf16.cpp and
//                     conv_avx512bf16_emulated.cpp
//   conv_tiles.inl    one task on a unit that multiplies tiles of bfloat16, compiled by
//                     conv_amx.cpp for bfloat16 and conv_float*amx.cpp for float16 and float32 in
//                     parts, and over emulated tiles by the files whose names end in
//                     _amx_emulated.cpp
//   conv_border.cpp   outputs at the image's border, of weights that are not finite
//   conv.h            what those share
#pragma once

#include <cstdint>

#include "cpu/activation.h"

namespace fused_resnet::cpu {

// The most taps of a filter that a task keeps offsets for.
constexpr int64_t kMaxRuns = 1024;

// The largest window of a pooling: tasks hold as many rows.
constexpr int64_t kLargestPool = 1024;

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// Element strides of a 4-d tensor, in the order (N, C, H, W), or (N, K, P, Q) for outputs.
struct Strides {
  int64_t n, c, h, w;
};

// Batch norm with running statistics; weight and bias may be null.
struct Norm {
  const float *mean, *var, *weight, *bias;
  float eps;
};

struct MaxPool {
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
  int64_t P, Q;  // size of the pooled output
};

// How many values behind the last channel's a prologue's scale and shift must have.
constexpr int64_t kPrologueSlack = 16;

struct ConvIsa;

struct Conv {
  const ConvIsa* isa;  // whose kernel runs, and whose layout the weight has
  // C and K count channels of all groups. P x Q is the convolution's own output, before any
  // pooling.
  int64_t N, C, H, W, K, R, S, P, Q;
  int64_t stride_h, stride_w, pad_h, pad_w, dil_h, dil_w, groups;
  int64_t batch;  // images of the whole call, of which N are run together; 0: those
  // A pointwise convolution whose pixels are evenly spaced in all three tensors is run over "rows"
  // of consecutive pixels, whatever the image's width: H, W, P and Q then describe those rows and
  // the last one of an image holds only last_w == last_q pixels. Otherwise last_w == W, last_q ==
  // Q.
  int64_t last_w, last_q;
  Strides in, out, res;
  const void* input;
  const void* weight;    // packed, see WeightLayout
  int64_t weight_block;  // of vectors' layout, be the kernel one on tiles in parts
  bool weight_is_finite;
  const float* bias;  // the convolution's own; may be null
  Norm norm;
  const void* residual;  // null: none
  // The prologue's, by input channel; null: none. Then comes kPrologueSlack times zero.
  const float *in_scale, *in_shift;
  // The residual is that of so many output channels, after so many that have none.
  int64_t res_channels, res_skip;
  void* output;
  // The packed weight that is wanted after this one, to be brought into the cache; may be null.
  const void* next_weight;
  int64_t next_weight_bytes;
  Dtype dtype;  // of input, residual and output; everything between is float32
  Activation act;
  // Whether a group's weights stay in the second-level cache when all of them are gone through.
  bool keeps_weight;
  // Groups of so few output channels that several share a vector. The slab then holds every input
  // value once for each lane it is multiplied in, and the groups count as one.
  bool expanded;
  bool has_pool;
  MaxPool pool;
};

// Functions here are static: files that include this one are compiled for different processors, and
// the linker must not pick one of their copies for all.
static inline int64_t div_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
static inline int64_t work_groups(const Conv& conv) {
  return conv.expanded ? 1 : conv.groups;
}
static inline int64_t group_c(const Conv& conv) {
  return conv.C / conv.groups;
}
static inline int64_t group_k(const Conv& conv) {
  return conv.K / work_groups(conv);
}
static inline int64_t reduction(const Conv& conv) {
  return conv.R * conv.S * group_c(conv);
}
static inline bool is_pointwise(const Conv& conv) {
  return conv.R == 1 && conv.S == 1;
}

// A unit of work: some output rows (counted over all images: row = n * P + p, or n * pool.P + p
// with pooling) times some blocks of output channels of one group.
struct Task {
  int64_t row_begin, row_end;
  int64_t block_begin, block_end;
  int64_t group;
  // How much of the next layer's weight the thread brings into its cache, being at its last task.
  int64_t ahead_bytes = 0;
};

// How a kernel wants its weight packed.
enum class WeightLayout : int {
  // [work_groups][blocks of K][R][S][C][block_k] float32, zero where K ends inside a block.
  // Expanded groups use blocks of one vector, others of ConvIsa::block_k.
  kVectors,
  // [work_groups][blocks of K][R][S][C / 2][block_k][2] bfloat16: the same with two input channels
  // side by side, the last one's partner zero where C is odd.
  kPairs,
  // See conv_tiles.h.
  kTiles,
};

// One instruction set's kernels.
struct ConvIsa {
  const char* name;
  int64_t lanes;     // of a vector of float32
  int64_t block_k;   // output channels computed together; the packed weight's innermost extent
  int64_t item;      // bytes of a weight and of a gathered input as the product reads them
  int64_t flat_row;  // consecutive pixels that make a row of a pointwise convolution
  double rate;       // multiply-adds a cycle, for the split into tasks
  // Bytes of scratch memory run() needs for a task.
  int64_t (*scratch_bytes)(const Conv&, const Task&);
  void (*run)(const Conv&, const Task&, void* scratch);
  WeightLayout layout = WeightLayout::kVectors;
};

#if defined(__x86_64__)
extern const ConvIsa kConvAvx512;
extern const ConvIsa kConvAvx2;
extern const ConvIsa kConvAvx512Bf16;
extern const ConvIsa kConvAmx;
extern const ConvIsa kConvFloat32Amx;
extern const ConvIsa kConvFloat16Amx;
extern const ConvIsa kConvFloat32HighAmx;
extern const ConvIsa kConvFloat32MediumAmx;
#endif
extern const ConvIsa kConvAvx512Bf16Emulated;
extern const ConvIsa kConvAmxEmulated;
extern const ConvIsa kConvFloat32AmxEmulated;
extern const ConvIsa kConvFloat16AmxEmulated;
extern const ConvIsa kConvFloat32HighAmxEmulated;
extern const ConvIsa kConvFloat32MediumAmxEmulated;

// Whether groups of c input and k output channels are expanded. Then a vector of output channels
// belongs to whole groups, whose input channels fit a vector too.
static inline bool is_expanded(int64_t groups, int64_t c, int64_t k, int64_t lanes) {
  return groups > 1 && k < lanes && lanes % k == 0 && c <= k;
}

}  // namespace fused_resnet::cpu
