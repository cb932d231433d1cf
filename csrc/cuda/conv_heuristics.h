// Which instance of the convolution kernel runs a problem, before anything has been timed.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/conv_tiles.h"

namespace fused_resnet {

// A convolution as far as the choice depends on it.
struct ConvProblem {
  int64_t M;  // output pixels, N P Q
  int64_t C, K, taps, groups;
  Products products;
  bool aligned;  // channels lie next to each other, from aligned addresses on

  int64_t group_c() const { return C / groups; }
  int64_t group_k() const { return K / groups; }
};

struct Gpu {
  int multiprocessors;
  int shared_per_block, shared_per_multiprocessor;  // bytes
  int memory_bytes_per_cycle;                       // of the multiprocessors' clock, of them all
};

struct ConvChoice {
  int tile;   // index into kTiles
  int split;  // blocks that share a tile's sum
};

// How a problem's operands are loaded; kElements where they are not aligned.
Loads loads_for(const ConvProblem& problem);

// Blocks of the kernel, if none share a sum.
int64_t tiles_of(const ConvProblem& problem, const Tile& tile);

// Steps of the kernel's loop over a whole sum.
int64_t steps_of(const ConvProblem& problem, const Tile& tile);

// `split` without blocks that would have no step.
int shares_of(const ConvProblem& problem, const Tile& tile, int split);

// Every instance that can run a problem, with each split worth trying, the likely fastest first.
// Empty where a block of none fits.
std::vector<ConvChoice> conv_choices(const ConvProblem& problem, const Gpu& gpu);

// The first of them; tile -1 where there is none.
ConvChoice choose_conv(const ConvProblem& problem, const Gpu& gpu);

// A stem with its pool, as far as the choice depends on it.
struct StemProblem {
  int64_t N, H, W, K;
};

struct StemChoice {
  int rows_each;  // pooled rows of a block
  double cycles;
};

// How many pooled rows a block is best given, and how many cycles that takes.
StemChoice choose_stem(const StemProblem& problem, const Gpu& gpu);

}  // namespace fused_resnet
