// What the host hands to the kernels of a network's first layers, and how they cut these up.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/conv_bn_act.h"
#include "cuda/recording.h"

namespace fused_resnet {

// The usual stem: 7 x 7 taps of 3 channels, stride 2, padding 3, then a pool of 3 x 3, stride 2,
// padding 1. A block of threads computes two rows of the convolution at a time, and from these and
// the one before them a pooled row.
struct StemTile {
  static constexpr int kChannels = 3, kTaps = 7, kStride = 2, kPadding = 3;
  static constexpr int kColumns = 112;  // of a convolution's row: all of an image of 224
  static constexpr int kFilters = 64;
  static constexpr int kWarps = kColumns / 16, kThreads = 32 * kWarps;
  static constexpr int kResident = 2;

  // A tap's row, 21 numbers, the one before them and two behind: 3 chunks of 16 bytes.
  static constexpr int kRowChunks = 3;
  static constexpr int kSteps = (kTaps * kRowChunks + 1) / 2;  // of two chunks, an mma's depth
  static constexpr int kDepth = 16 * kSteps;
  // From one window's first number to the next one's.
  static constexpr int kWindowBytes = kStride * kChannels * 2;

  // Of a row of the image: what the last window has behind the first one's greatest offset.
  static constexpr int kRowBytes = 12 + kWindowBytes * (kColumns - 1) + kRowChunks * 16;
  static constexpr int kRows = 16;  // in the ring; 9 are being read, 4 are on their way
  // An odd number of chunks, so that 8 filters have a column of them in 8 groups of banks.
  static constexpr int kFilterBytes = 16 * (2 * kSteps + 1);
  static constexpr int kPixelBytes = 2 * kFilters;
  static constexpr int kPooledRows = 3;

  static constexpr int filters_at() { return kRows * kRowBytes; }
  static constexpr int outputs_at() { return filters_at() + kFilters * kFilterBytes; }
  static constexpr int scale_at() { return outputs_at() + kPooledRows * kColumns * kPixelBytes; }
  static constexpr int shared_bytes() { return scale_at() + 2 * kFilters * 4; }

  // Strips of pooled columns: the first has one more, since nothing is left of it.
  static constexpr int kStripColumns = kColumns / 2 - 1;
  static constexpr int strips(int64_t pooled_columns) {
    const int64_t others = pooled_columns - kStripColumns - 1;
    return 1 + static_cast<int>(others > 0 ? (others + kStripColumns - 1) / kStripColumns : 0);
  }
};
static_assert(StemTile::kRowBytes % 16 == 0);

// Sizes and strides in elements.
struct Stem {
  const void* input;
  const void* weight;
  void* output;  // (N, pooled P, pooled Q, K), dense
  Parameter running_mean, running_var, bn_weight, bn_bias, bias;
  float eps;
  float floor;  // the activation is max(x, floor): 0 for relu, -inf for none

  int H, W, P, Q, K;
  int pooled_P, pooled_Q;
  int strips, row_groups, rows_each;  // of pooled rows
  int64_t input_n, input_h, input_w, input_c;
  int64_t weight_k, weight_c, weight_r, weight_s;

  // Whether rows of the image are whole chunks of 16 bytes at aligned addresses.
  int64_t rows_are_chunks;
};

template <>
struct Addresses<Stem> {
  static constexpr bool kKnown = true;
  static constexpr std::initializer_list<size_t> kOffsets{
      offsetof(Stem, input),
      offsetof(Stem, weight),
      offsetof(Stem, output),
      offsetof(Stem, running_mean.values),
      offsetof(Stem, running_var.values),
      offsetof(Stem, bn_weight.values),
      offsetof(Stem, bn_bias.values),
      offsetof(Stem, bias.values),
  };
};

// A max-pool of (N, H, W, C), dense.
struct MaxPool {
  const void* input;
  void* output;
  int64_t pixels;  // of the output
  int H, W, C, P, Q;
  int R, S, stride_h, stride_w, pad_h, pad_w;
  int unused = 0;
};

template <>
struct Addresses<MaxPool> {
  static constexpr bool kKnown = true;
  static constexpr std::initializer_list<size_t> kOffsets{offsetof(MaxPool, input),
                                                          offsetof(MaxPool, output)};
};

}  // namespace fused_resnet
