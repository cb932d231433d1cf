// What the host hands to the kernels of eight bits, and the instances of the convolution's.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fused_resnet {

// How an instance cuts a convolution up: a block of threads computes m pixels by n filters, a step
// of its loop goes `depth` bytes along the sum, and the loads of `stages - 1` steps are under way.
// Pixels come in pieces of `piece` bytes, each within one tap's channels.
struct ByteTile {
  int piece;
  int m, n, depth, stages, warps_m, warps_n;
  int resident;   // blocks for whose sake the compiler keeps registers few
  bool projects;  // whether there is an instance with the sums of two convolutions

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int stage_bytes() const { return (m + n) * depth; }
  // The stages, the output's bytes, then a filter's two integers and three factors.
  constexpr int shared_bytes() const { return stages * stage_bytes() + m * n + n * 5 * 4; }
};

inline constexpr ByteTile kByteTiles[] = {
    // Large layers: a warp has 64 x 64 sums, for which it loads 8 times for 32 mma.
    {16, 128, 128, 64, 4, 2, 2, 2, false},
    // 64 filters, and the sums of a block's last convolution and of its projection side by side.
    {16, 128, 64, 64, 4, 2, 2, 2, true},
    // Few pixels.
    {16, 64, 64, 128, 3, 2, 2, 3, true},
    // Groups of 32, and the fewest pixels.
    {16, 64, 32, 128, 4, 4, 1, 3, true},
    // A stem's pixel of 4 or 8 bytes; groups of 4 and 8.
    {4, 128, 64, 64, 3, 4, 2, 2, true},
    // Any count of channels, byte by byte.
    {1, 64, 32, 64, 3, 4, 1, 3, true},
};
inline constexpr int kByteTileCount = sizeof(kByteTiles) / sizeof(kByteTiles[0]);

// One convolution of bytes, each standing for itself less the zero point. Sizes in elements.
struct ByteOperand {
  const uint8_t* input;    // (N, H, W, C), dense
  const uint8_t* outside;  // 16 bytes of the zero point: what lies beyond the image's edges
  const int8_t* weight;    // (K, row_bytes): a filter's taps, channels inside, then zeros
  const int* filter_sums;  // of each filter
  const float* scale;      // (K,)
  int zero_point;
  int H, W, C, R, S;
  int group_c, row_bytes;  // bytes of a filter's row, a multiple of 16
  int stride_h, stride_w, pad_h, pad_w, dil_h, dil_w;
};

enum class ByteOutput { kBytes, kFloat32, kFloat16, kBFloat16 };

// A convolution with scale, shift, shortcut and ReLU. M = N P Q pixels of the output.
struct ByteConv {
  ByteOperand main;
  ByteOperand projection;   // where the instance projects
  const float* shift;       // (K,)
  const uint8_t* shortcut;  // (N, P, Q, K), dense, or null
  float shortcut_scale;
  int shortcut_zero_point;
  void* output;  // (N, P, Q, K), dense
  ByteOutput type;
  float output_step;  // of the floating-point types
  int M, P, Q, K, group_k;
  bool vector_output;  // whether K / groups allows 16-byte accesses
};

// (N, C, H, W) of any strides as bytes (N, H, W, pixel_bytes), pixels = N H W.
struct StoredInput {
  const void* input;
  uint8_t* output;
  uint8_t* outside;  // 32 bytes: 16 of the zero point, 16 zeros
  float inverse;     // of the step
  int zero_point;
  int64_t pixels;
  int C, H, W, pixel_bytes;
  int64_t stride_n, stride_c, stride_h, stride_w;
  bool channels_fastest;  // whether neighbouring threads have neighbouring channels
};

// The largest bytes of windows, as numbers.
struct BytePool {
  const uint8_t* input;  // (N, H, W, K), dense
  void* output;          // (N, P, Q, K), dense
  float step;
  int64_t pixels;  // of the output
  int H, W, K, P, Q, R, S, stride_h, stride_w, pad_h, pad_w;
};

}  // namespace fused_resnet
