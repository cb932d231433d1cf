// How the kernels of batch norm share a tensor out, and what the host hands to them.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fused_resnet {

// A tensor's elements as `rows` x `channels`, dense, cut into blocks of rows and, where those are
// long, into slabs of channels. A thread has `elements` channels, those of one access, and every
// groups-th row of its block; `lanes` threads side by side have one row.
//
// All of it follows from the shape alone, and with it the order of every sum: a result has the same
// bits on every GPU.
struct Partition {
  static constexpr int kThreads = 256;  // of a block
  static constexpr int kMostLanes = 32;
  static constexpr int kBitsInByte = 8;
  static constexpr int kRowsAtOnce = 8;  // rows a thread may load before it uses the first

  int64_t rows, rows_per_block;
  int channels, elements, lanes, groups, slabs, row_blocks;

  unsigned blocks() const { return static_cast<unsigned>(slabs) * row_blocks; }
};

// Of a pass whose blocks each leave sums behind: enough blocks to keep memory busy on the largest
// GPUs, few enough that the sums are read in no time. The last is not at issue for others.
constexpr int kBlocksOfSums = 512;
constexpr int kBlocksOfElements = 1024;

inline Partition partition_of(int64_t rows, int64_t channels, int elements, int most_blocks) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  Partition p{};
  p.rows = rows;
  p.channels = static_cast<int>(channels);
  p.elements = elements;
  const int64_t vectors = ceil_div(channels, elements);
  p.lanes = static_cast<int>(ceil_div(vectors, ceil_div(vectors, Partition::kMostLanes)));
  if (vectors > p.lanes) {
    // Those that share a byte of a mask stay side by side.
    const int sharing = std::max(1, Partition::kBitsInByte / elements);
    p.lanes = static_cast<int>(ceil_div(p.lanes, sharing)) * sharing;
  }
  p.slabs = static_cast<int>(ceil_div(vectors, p.lanes));
  p.groups = Partition::kThreads / p.lanes;
  // Whole rounds of loads for every thread of every block but the last.
  const int64_t round = int64_t{p.groups} * Partition::kRowsAtOnce;
  const int64_t wanted = std::max<int64_t>(1, most_blocks / p.slabs);
  p.rows_per_block = std::max<int64_t>(1, ceil_div(ceil_div(rows, wanted), round)) * round;
  p.row_blocks = static_cast<int>(ceil_div(rows, p.rows_per_block));
  return p;
}

// The statistics that normalise and the parameters that follow, (C,) each.
struct Norm {
  const float* mean;
  const float* var;     // biased
  const float* weight;  // null for ones
  const float* bias;    // null for zeros
  float eps;
};

// Where the gradient passes the activation: everywhere, or where its output is not <= 0, which is
// computed again or read, or of which a bit a value has been kept, in the order of memory.
enum class Mask { kEverywhere, kRecomputed, kOutput, kBits };

}  // namespace fused_resnet
