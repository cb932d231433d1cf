// The instances of the Bottleneck chain for Hopper: for which channels, and how they cut it up.
#pragma once

#include <algorithm>

namespace fused_resnet {

// A tile is 128 output pixels with all of their channels: `width` behind the window, then the
// block's output, a slice at a time, then at most `next` of the next block's first convolution.
// Elements are of 16 bits.
struct BottleneckTile {
  int width, next, slice, stages, cluster;

  static constexpr int kM = 128;
  static constexpr int kRowBytes = 128;
  static constexpr int kRowElements = kRowBytes / 2;
  static constexpr int kConsumers = 2;  // warpgroups, behind the one that loads
  static constexpr int kRows = kM / kConsumers;
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kBuffers = 2;         // of each consumer, for what comes in and goes out
  static constexpr int kMostOutputs = 1024;  // whose scale and shift there is room for

  constexpr int pixel_bytes() const { return kM * kRowBytes; }  // of a stage
  // Windows and their filters; or filters alone, whose other operand lies in shared memory.
  constexpr int stage_bytes() const {
    return std::max(pixel_bytes() + width * kRowBytes, std::max(slice, next) * kRowBytes);
  }
  constexpr int hidden_bytes() const { return kM * width * 2; }  // of the window's outputs
  constexpr int buffer_bytes() const { return kRows * slice * 2; }
  constexpr int barriers() const { return 2 * stages + kConsumers * kBuffers; }
  // Of which there are a scale and a shift.
  constexpr int channels(int outputs) const { return width + outputs + next; }
  // Stages, the window's outputs and buffers from a multiple of 1024 on, then barriers, then scales
  // and shifts.
  constexpr int shared_bytes(int outputs) const {
    return 1024 + stages * stage_bytes() + hidden_bytes() + kConsumers * kBuffers * buffer_bytes() +
           barriers() * 8 + channels(outputs) * 2 * 4;
  }
};

inline constexpr BottleneckTile kBottleneckTiles[] = {
    // ResNet-50's first stage, and its last block, which the second stage's first convolution
    // follows. Alone for few pixels, else in pairs that load filters for each other.
    {64, 64, 128, 5, 1},
    {64, 64, 128, 5, 2},
    {64, 128, 128, 5, 2},
    // Its second stage.
    {128, 128, 128, 3, 2},
    {128, 256, 128, 3, 2},
    // Its third, whose sums leave room for slices of 64.
    {256, 256, 64, 2, 2},
};
inline constexpr int kBottleneckTileCount = sizeof(kBottleneckTiles) / sizeof(kBottleneckTiles[0]);

}  // namespace fused_resnet
