// The instances of the convolution kernel: how each cuts a problem up, and why it is there.
#pragma once

namespace fused_resnet {

// How operands are multiplied; sums are float32 always.
enum class Products {
  k16Bit,  // float16 or bfloat16 on tensor cores
  kTf32,   // float32 rounded to tf32 on tensor cores
  kIeee,   // float32 multiply-adds
};

// How they come to shared memory, in chunks of 16 bytes.
enum class Loads {
  kVectors,   // channels of a group fill whole aligned chunks: one cp.async each
  kElements,  // element by element, through registers: any channel count, strides and alignment
  kDiagonal,  // many narrow groups side by side: pixels as kVectors, filters on a block diagonal
};

// A block computes m pixels by n filters; a step of its loop goes `depth_bytes` along the sum, and
// the loads of `stages - 1` steps are under way. Warps share the tile as warps_m x warps_n.
struct Tile {
  Products products;
  Loads loads;
  int m, n, depth_bytes, stages, warps_m, warps_n;
  int resident;  // blocks for whose sake the compiler keeps registers few

  constexpr int threads() const { return 32 * warps_m * warps_n; }
  constexpr int element_bytes() const { return products == Products::k16Bit ? 2 : 4; }
  constexpr int depth() const { return depth_bytes / element_bytes(); }
  // Of one filter's row in a stage: on the diagonal, its own block of channels.
  constexpr int filter_bytes() const {
    return loads == Loads::kDiagonal ? kDiagonalBlock * element_bytes() : depth_bytes;
  }
  constexpr int stage_bytes() const { return m * depth_bytes + n * filter_bytes(); }
  // The stages, then scale and shift of every filter.
  constexpr int shared_bytes() const { return stages * stage_bytes() + n * 2 * 4; }

  // Whether activations besides ReLU have an instance of their own. In one with them, ReLU's main
  // loop would be other code, or take more registers.
  constexpr bool has_two_instances() const { return products != Products::k16Bit || n < 64; }

  // Filters and channels of a block on the diagonal: two tensor-core tiles wide, which is the
  // least that one ldmatrix of four loads.
  static constexpr int kDiagonalBlock = 16;
};

inline constexpr Tile kTiles[] = {
    // Large layers. Each warp has 64 x 64, for which it loads 8 times for 32 mma: enough to keep
    // Hopper's tensor cores from waiting for shared memory, and all the registers there are.
    {Products::k16Bit, Loads::kVectors, 128, 256, 64, 4, 2, 4, 1},
    {Products::k16Bit, Loads::kVectors, 128, 128, 64, 4, 2, 2, 2},
    // 64 filters (the first stage of every network), and layers of which larger tiles would leave
    // multiprocessors idle.
    {Products::k16Bit, Loads::kVectors, 128, 64, 64, 4, 2, 2, 3},
    // Few pixels, many filters: the last stages of a small batch.
    {Products::k16Bit, Loads::kVectors, 64, 128, 64, 4, 2, 2, 3},
    // Batch 1: twice as deep, so that half as many barriers are waited at.
    {Products::k16Bit, Loads::kVectors, 64, 64, 128, 4, 2, 2, 3},
    // Groups of 32, and the fewest pixels.
    {Products::k16Bit, Loads::kVectors, 64, 32, 128, 4, 4, 1, 4},
    // The stem's three channels; any count that does not fill chunks.
    {Products::k16Bit, Loads::kElements, 128, 64, 64, 3, 4, 2, 2},
    // ResNeXt's groups of 4, 8 and 16; depthwise.
    {Products::k16Bit, Loads::kDiagonal, 128, 64, 128, 3, 4, 1, 3},

    // The same in float32, of which a row of shared memory holds half as many.
    {Products::kTf32, Loads::kVectors, 128, 128, 128, 3, 2, 4, 1},
    {Products::kTf32, Loads::kVectors, 128, 64, 128, 3, 2, 2, 2},
    {Products::kTf32, Loads::kVectors, 64, 64, 128, 3, 2, 2, 3},
    {Products::kTf32, Loads::kElements, 64, 64, 128, 2, 2, 2, 2},
    {Products::kTf32, Loads::kDiagonal, 128, 32, 128, 3, 4, 1, 4},
    {Products::kIeee, Loads::kVectors, 128, 64, 128, 3, 2, 4, 1},
    {Products::kIeee, Loads::kVectors, 64, 64, 128, 3, 2, 2, 2},
    {Products::kIeee, Loads::kElements, 64, 64, 128, 2, 2, 2, 2},
    {Products::kIeee, Loads::kDiagonal, 128, 32, 128, 3, 4, 1, 3},
};
inline constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

}  // namespace fused_resnet
