// How a cluster of blocks keeps some channels of a tensor in its shared memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace fused_resnet {

// A tensor's elements as `rows` x `channels`, cut into slabs of `lanes` accesses side by side, one
// a cluster, and into as many blocks of rows as a cluster has. A block goes through its rows in
// `rounds` of `groups` rows, an access a thread.
struct ClusterPartition {
  static constexpr int kBlocks = 8;
  static constexpr int kThreads = 256;
  static constexpr int kAccessBytes = 16;
  static constexpr int kMostLanes = 4;
  static constexpr int kLeastLanes = 2;  // a sector, the least that memory hands out

  // A block's shared memory begins with what its warps and blocks combine, up to 25 numbers a lane
  // and warp and three a channel of 16 bits, and up to five numbers a channel that follow from
  // that.
  static constexpr int kBytesOfSums = (25 * (kThreads / 32) + 24) * kMostLanes * 4;
  static constexpr int kBytesToCombine = kBytesOfSums + 5 * 8 * kMostLanes * 4;

  int64_t rows, rows_per_block;
  int channels, lanes, groups, rounds, slabs;

  unsigned blocks() const { return static_cast<unsigned>(slabs) * kBlocks; }
  int64_t shared_bytes(int tensors) const {
    return kBytesToCombine + int64_t{tensors} * rounds * kThreads * kAccessBytes;
  }
};

// The partition for `tensors` tensors whose accesses have `elements` channels each, of which a
// block can have `most_shared_bytes`; none where they do not fit. As wide as leaves enough blocks,
// two a multiprocessor.
inline std::optional<ClusterPartition> cluster_partition_of(int64_t rows, int64_t channels,
                                                            int elements, int tensors,
                                                            int64_t most_shared_bytes) {
  constexpr unsigned kEnoughBlocks = 128;
  constexpr int64_t kReservedBytes = 1024;  // of every block's shared memory
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  if (rows <= 0 || channels <= 0 || channels % elements != 0) return std::nullopt;
  const int64_t vectors = channels / elements;
  std::optional<ClusterPartition> found;
  for (int lanes = ClusterPartition::kMostLanes; lanes >= ClusterPartition::kLeastLanes;
       lanes /= 2) {
    ClusterPartition p{};
    p.rows = rows;
    p.rows_per_block = ceil_div(rows, ClusterPartition::kBlocks);
    p.channels = static_cast<int>(channels);
    p.lanes = lanes;
    p.groups = ClusterPartition::kThreads / lanes;
    const int64_t rounds = ceil_div(p.rows_per_block, p.groups);
    p.rounds = static_cast<int>(std::min<int64_t>(rounds, INT32_MAX));
    p.slabs = static_cast<int>(ceil_div(vectors, lanes));
    const int64_t bytes = p.shared_bytes(tensors);
    if (bytes > most_shared_bytes) continue;
    found = p;
    if (p.blocks() >= kEnoughBlocks &&
        2 * (bytes + kReservedBytes) <= most_shared_bytes + kReservedBytes) {
      break;
    }
  }
  return found;
}

}  // namespace fused_resnet
