// The instances of the convolution for Hopper: how each cuts a problem up, and why it is there.
#pragma once

namespace fused_resnet {

// Which of a block's two consuming warpgroups computes what.
enum class Schedule {
  kTogether,   // each half of the pixels of every tile
  kTakeTurns,  // every second tile as a whole: one stores while the other multiplies
};

// A tile is 128 output pixels by n filters, and a step of its loop 64 channels of one tap.
// `cluster` blocks work on as many tiles of the same filters, of which each loads a part for all.
struct HopperTile {
  int n, stages, cluster;
  Schedule schedule;

  static constexpr int kM = 128;
  static constexpr int kDepth = 64;  // 16-bit elements: rows of 128 bytes
  static constexpr int kRowBytes = 128;
  static constexpr int kConsumers = 2;  // warpgroups, behind the one that loads
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kMostFilters = 2048;  // whose scale and shift there is room for

  constexpr int rows_of_consumer() const {
    return schedule == Schedule::kTogether ? kM / kConsumers : kM;
  }
  constexpr int pixel_bytes() const { return kM * kRowBytes; }  // of a stage
  constexpr int filter_bytes() const { return n * kRowBytes; }
  constexpr int stage_bytes() const { return pixel_bytes() + filter_bytes(); }
  // A consumer's outputs on their way, in slabs of 64 columns.
  constexpr int output_bytes() const { return rows_of_consumer() * n * 2; }
  constexpr int barriers() const { return 2 * stages + 2 * kConsumers; }
  constexpr int columns(int filters) const { return (filters + n - 1) / n; }
  // Stages and outputs from a multiple of 1024 on, then barriers, then scale and shift.
  constexpr int shared_bytes(int filters) const {
    return 1024 + stages * stage_bytes() + kConsumers * output_bytes() + barriers() * 8 +
           columns(filters) * n * 2 * 4;
  }
};

inline constexpr HopperTile kHopperTiles[] = {
    // Large layers: the widest product there is, which reads shared memory least.
    {256, 3, 1, Schedule::kTogether},
    {256, 3, 2, Schedule::kTogether},
    // The same sums in registers, but what is stored hides behind the other tile's products: for
    // short sums, the 1x1 convolutions.
    {128, 4, 1, Schedule::kTakeTurns},
    {128, 4, 2, Schedule::kTakeTurns},
    // Layers of which larger tiles would leave multiprocessors idle.
    {128, 5, 1, Schedule::kTogether},
    // 64 filters: the first stage of every network.
    {64, 7, 1, Schedule::kTakeTurns},
    {64, 8, 1, Schedule::kTogether},
};
inline constexpr int kHopperTileCount = sizeof(kHopperTiles) / sizeof(kHopperTiles[0]);

}  // namespace fused_resnet
