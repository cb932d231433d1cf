// The instances of the convolution for Hopper: how each cuts a problem up, and why it is there.
#pragma once

namespace fused_resnet {

// Which of a block's two consuming warpgroups computes what.
enum class Schedule {
  kTogether,   // each half of the pixels of every tile
  kTakeTurns,  // every second tile as a whole: one stores while the other multiplies
};

// A tile is 128 output pixels by n filters, and a step of its loop 128 bytes of one tap's channels.
// `cluster` blocks work on as many tiles of the same filters, of which each loads a part for all.
struct HopperTile {
  int element_bytes;  // 2: float16 and bfloat16; 4: float32, whose products are of tf32
  int n, stages, cluster;
  Schedule schedule;

  static constexpr int kM = 128;
  static constexpr int kRowBytes = 128;
  static constexpr int kConsumers = 2;  // warpgroups, behind the one that loads
  static constexpr int kThreads = 128 * (1 + kConsumers);
  static constexpr int kMostFilters = 2048;  // whose scale and shift there is room for

  // Elements of a row: channels of a step, columns of a slab.
  constexpr int row_elements() const { return kRowBytes / element_bytes; }
  constexpr int rows_of_consumer() const {
    return schedule == Schedule::kTogether ? kM / kConsumers : kM;
  }
  constexpr int pixel_bytes() const { return kM * kRowBytes; }  // of a stage
  constexpr int filter_bytes() const { return n * kRowBytes; }
  constexpr int stage_bytes() const { return pixel_bytes() + filter_bytes(); }
  // A consumer's outputs on their way, in slabs of one row's columns.
  constexpr int output_bytes() const { return rows_of_consumer() * n * element_bytes; }
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
    {2, 256, 3, 1, Schedule::kTogether},
    {2, 256, 3, 2, Schedule::kTogether},
    // The same sums in registers, but what is stored hides behind the other tile's products: for
    // short sums, the 1x1 convolutions.
    {2, 128, 4, 1, Schedule::kTakeTurns},
    {2, 128, 4, 2, Schedule::kTakeTurns},
    // Layers of which larger tiles would leave multiprocessors idle.
    {2, 128, 5, 1, Schedule::kTogether},
    // 64 filters: the first stage of every network.
    {2, 64, 7, 1, Schedule::kTakeTurns},
    {2, 64, 8, 1, Schedule::kTogether},
    // In tf32, whose outputs take twice the room: no tile has more than 128 filters.
    {4, 128, 4, 1, Schedule::kTogether},
    {4, 128, 4, 2, Schedule::kTogether},
    {4, 64, 6, 1, Schedule::kTakeTurns},
};
inline constexpr int kHopperTileCount = sizeof(kHopperTiles) / sizeof(kHopperTiles[0]);

}  // namespace fused_resnet
