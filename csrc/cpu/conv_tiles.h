// What the tile kernels (conv_tiles.inl) and those who pack weights for them share.
//
// A tile is 16 rows of 64 bytes. A product of tiles adds to 16 x 16 float32 sums, pixels by output
// channels, the products of 32 bfloat16 values: one row of the first tile for each pixel, and
// sixteen rows of the second that hold two values of each output channel.
#pragma once

#include "cpu/conv.h"

namespace fused_resnet::cpu {

constexpr int64_t kTileRows = 16;
constexpr int64_t kTileBytes = 1024;
// How many values of the reduction a product of tiles takes, and output channels in a block, which
// is two tiles wide.
constexpr int64_t kTileDepth = 32;
constexpr int64_t kTileBlockK = 32;

// The least sum of float32 in parts that the unit, to which subnormals are zeros, is trusted with.
constexpr float kLeastSum = 0x1p-90f;
constexpr uint32_t kLeastSumBits = (127 - 90) << 23;

// The weight of bfloat16 as tiles: [groups][blocks of K][chunks][2][16][16][2] bfloat16, zero where
// K or a chunk ends early. The last three are pairs of the reduction, output channels and the two
// of a pair.
//
// A chunk is 32 input channels of one tap, and all taps of the same 32 channels follow each other:
// the taps of a pixel's neighbours read the same few lines of the input, which then still are in
// the first-level cache. With so few channels that most of a chunk would be padding, a chunk is any
// 32 consecutive values of [R][S][C] ("dense"), and the input is gathered so.
struct TiledWeight {
  int64_t K, C, taps;  // K and C of one group
  bool dense;
  int64_t chunks, blocks;  // of one group
};

static inline TiledWeight tiled_weight(int64_t K, int64_t C, int64_t taps) {
  TiledWeight w{K, C, taps, false, 0, div_up(K, kTileBlockK)};
  w.dense = taps > 1 && C < kTileDepth;
  w.chunks = w.dense ? div_up(taps * C, kTileDepth) : taps * div_up(C, kTileDepth);
  return w;
}

// bfloat16 values of a block of output channels.
static inline int64_t tiled_block_size(const TiledWeight& w) {
  return w.chunks * kTileDepth * kTileBlockK;
}

// Where the weight of the group's output channel k, channel c and tap is.
static inline int64_t tiled_weight_offset(const TiledWeight& w, int64_t group, int64_t k, int64_t c,
                                          int64_t tap) {
  const int64_t j = tap * w.C + c;
  const int64_t chunk = w.dense ? j / kTileDepth : c / kTileDepth * w.taps + tap;
  const int64_t in_chunk = (w.dense ? j : c) % kTileDepth;
  const int64_t block = group * w.blocks + k / kTileBlockK, column = k % kTileBlockK;
  const int64_t tile = (block * w.chunks + chunk) * 2 + column / 16;
  return tile * (kTileBytes / 2) + in_chunk / 2 * 32 + column % 16 * 2 + in_chunk % 2;
}

}  // namespace fused_resnet::cpu
