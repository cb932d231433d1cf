// What the host hands to the kernel of whole BasicBlocks, and the kernel's instances. How fast each
// is expected to be where is fused_resnet/tuning/basic_block.py's to say.
#pragma once

#include "cuda/conv_bn_act.h"

namespace fused_resnet {

// How an instance cuts an image up: a block of threads computes `rows` x kColumns output pixels, a
// stage of its ring of weights is one tap of one convolution.
struct BasicBlockTile {
  int rows, warps, stages;
  int resident;  // blocks for whose sake the compiler keeps registers few

  // Input, output and everything between have as many channels as a row of 128 bytes holds.
  static constexpr int kChannels = 64;
  static constexpr int kPixelBytes = kChannels * 2;
  // Of a tile, so that with a border of one the pixels between the convolutions come in rows of 16,
  // which is what one tensor-core instruction takes.
  static constexpr int kColumns = 14;
  static constexpr int kStageBytes = kChannels * kPixelBytes;

  constexpr int threads() const { return 32 * warps; }
  constexpr int input_bytes() const { return (rows + 4) * (kColumns + 4) * kPixelBytes; }
  constexpr int middle_bytes() const { return (rows + 2) * (kColumns + 2) * kPixelBytes; }
  // Input and middle, the ring, then scale and shift of both norms.
  constexpr int shared_bytes() const {
    return input_bytes() + middle_bytes() + stages * kStageBytes + 4 * kChannels * 4;
  }
};

// A quarter of the smallest stage there is, 56 x 56, is 28 x 28, so rows divide that.
inline constexpr BasicBlockTile kBasicBlockTiles[] = {
    // Two blocks in the 227 KB of Hopper and Blackwell: one loads while the other multiplies.
    {14, 4, 4, 2},
    // 99 KB, all that desktop GPUs have, hold one, with more warps to hide what it waits for.
    {14, 8, 2, 1},
    // The fewest pixels computed twice; one block in the 163 KB of an A100.
    {28, 8, 3, 1},
    // Small batches: more blocks.
    {6, 4, 3, 2},
};
inline constexpr int kBasicBlockTileCount = sizeof(kBasicBlockTiles) / sizeof(kBasicBlockTiles[0]);

// One convolution and its norm.
struct BasicBlockLayer {
  const void* weight;  // (K, R, S, C), dense
  Parameter running_mean, running_var, bn_weight, bn_bias, bias;
  float eps;
  int unused = 0;  // see NarrowResidual
};

// Sizes and strides in elements.
struct BasicBlock {
  const void* input;
  void* output;  // (N, H, W, C), dense
  BasicBlockLayer layers[2];
  int H, W;
  int tiles_h, tiles_w;  // of an image
  int64_t input_n, input_h, input_w;
};

template <>
struct Addresses<BasicBlock> {
  static constexpr bool kKnown = true;
  static constexpr std::initializer_list<size_t> kOffsets{
      offsetof(BasicBlock, input),
      offsetof(BasicBlock, output),
      offsetof(BasicBlock, layers[0].weight),
      offsetof(BasicBlock, layers[0].running_mean.values),
      offsetof(BasicBlock, layers[0].running_var.values),
      offsetof(BasicBlock, layers[0].bn_weight.values),
      offsetof(BasicBlock, layers[0].bn_bias.values),
      offsetof(BasicBlock, layers[0].bias.values),
      offsetof(BasicBlock, layers[1].weight),
      offsetof(BasicBlock, layers[1].running_mean.values),
      offsetof(BasicBlock, layers[1].running_var.values),
      offsetof(BasicBlock, layers[1].bn_weight.values),
      offsetof(BasicBlock, layers[1].bn_bias.values),
      offsetof(BasicBlock, layers[1].bias.values),
  };
};

}  // namespace fused_resnet
