// Where each value of a convolution's weight is in its packed copy. For files of any instruction
// set: see isa.h.
#pragma once

#include <cstdint>

#include "cpu/conv.h"
#include "cpu/conv_tiles.h"

namespace fused_resnet::cpu {

struct PackedLayout {
  int64_t K, C, taps;       // C counts the channels of one group
  int64_t groups, block_k;  // expanded groups count as one
  WeightLayout kind;
  bool expanded;
  TiledWeight tiles;  // of one group

  PackedLayout(int64_t K_, int64_t C_, int64_t taps_, int64_t group_count, const ConvIsa& isa)
      : K(K_),
        C(C_),
        taps(taps_),
        groups(group_count),
        block_k(isa.block_k),
        kind(isa.layout),
        expanded(kind != WeightLayout::kTiles && is_expanded(groups, C, K / groups, isa.lanes)),
        tiles(tiled_weight(K / groups, C, taps)) {
    if (expanded) groups = 1, block_k = isa.lanes;
  }

  // Values are bfloat16, or else float32.
  bool is_bfloat16() const { return kind != WeightLayout::kVectors; }
  int64_t blocks() const { return div_up(K / groups, block_k); }
  // Values of a block, and of all.
  int64_t block_size() const {
    if (kind == WeightLayout::kTiles) return tiled_block_size(tiles);
    return taps * (kind == WeightLayout::kPairs ? div_up(C, 2) * 2 : C) * block_k;
  }
  int64_t packed_size() const { return groups * blocks() * block_size(); }

  // The place in its block of the block's output channel k, channel c of the group and a tap.
  int64_t place_in_block(int64_t k, int64_t c, int64_t tap) const {
    const int shift = __builtin_ctzll(static_cast<uint64_t>(block_k));  // a power of two
    switch (kind) {
      case WeightLayout::kTiles:
        return tiled_weight_offset(tiles, 0, k, c, tap);
      case WeightLayout::kPairs:
        return (((tap * div_up(C, 2) + c / 2) << shift) + k) * 2 + c % 2;
      default:
        return ((tap * C + c) << shift) + k;
    }
  }

  // The place of output channel k, channel c of its group and a tap.
  int64_t place(int64_t k, int64_t c, int64_t tap) const {
    const int64_t group_k = K / groups, group = groups == 1 ? 0 : k / group_k;
    const int64_t in_group = k - group * group_k;
    const int shift = __builtin_ctzll(static_cast<uint64_t>(block_k));
    const int64_t block = (group == 0 ? 0 : group * blocks()) + (in_group >> shift);
    return block * block_size() + place_in_block(in_group & (block_k - 1), c, tap);
  }
};

}  // namespace fused_resnet::cpu
