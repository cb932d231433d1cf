// A model of the kernel's time in a multiprocessor's cycles. It takes as long as the slowest of the
// arithmetic of the busiest multiprocessor, what that loads from the L2 cache, and waiting: a block
// with `stages - 1` steps under way takes one at most every latency / (stages - 1), however empty
// the GPU is. The figures are round ones for Ampere to Blackwell, not fitted.
#include "cuda/conv_heuristics.h"

#include <algorithm>
#include <utility>

namespace fused_resnet {
namespace {

constexpr double kLatency = 800;       // from asking for a step to having it
constexpr double kBytesPerCycle = 48;  // out of the L2 cache
constexpr double kMemoryBytesPerCycle = 16;
constexpr int kSharedPerBlock = 1024;  // what the driver takes
constexpr int kMostWarps = 48;         // of a multiprocessor; some have 64
constexpr int kSplits[] = {1, 2, 4, 8, 16};

int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// Multiply-adds a cycle.
double rate(Products products) {
  switch (products) {
    case Products::k16Bit:
      return 1024;
    case Products::kTf32:
      return 512;
    default:
      return 64;
  }
}

double cycles(const ConvProblem& problem, const Gpu& gpu, const Tile& tile, int split) {
  const int64_t blocks = tiles_of(problem, tile) * split;
  const int64_t steps = ceil_div(steps_of(problem, tile), split);
  const int64_t resident =
      std::min<int64_t>({gpu.shared_per_multiprocessor / (tile.shared_bytes() + kSharedPerBlock),
                         tile.resident, 32 * kMostWarps / tile.threads()});
  const int64_t busiest = ceil_div(blocks, gpu.multiprocessors);
  const int64_t waves = ceil_div(busiest, std::max<int64_t>(1, resident));

  // Short sides of a tile make it wait for shared memory; on the diagonal most is left out.
  const double width = tile.loads == Loads::kDiagonal ? Tile::kDiagonalBlock : tile.n;
  const double efficiency = 1 / (1 + 16.0 / tile.m + 16.0 / tile.n);
  const double products = width * tile.m * tile.depth() * steps;
  const double arithmetic = busiest * products / (rate(problem.products) * efficiency);

  const double output = static_cast<double>(tile.m) * tile.n * tile.element_bytes();
  const double cache = busiest * (1.0 * tile.stage_bytes() * steps + 2 * output) / kBytesPerCycle;
  const double waiting = waves * (2 + 1.0 * steps / (tile.stages - 1)) * kLatency;
  double sum = std::max({arithmetic, cache, waiting}) + 0.1 * (arithmetic + cache + waiting);
  if (split > 1) {
    const double partials = 2.0 * busiest * tile.m * tile.n * sizeof(float);
    sum += partials / kMemoryBytesPerCycle + 3 * kLatency;
  }
  return sum;
}

template <typename Visit>
void for_each_choice(const ConvProblem& problem, const Gpu& gpu, const Visit& visit) {
  const Loads loads = loads_for(problem);
  for (int index = 0; index < kTileCount; ++index) {
    const Tile& tile = kTiles[index];
    if (tile.products != problem.products || tile.loads != loads ||
        tile.shared_bytes() > gpu.shared_per_block) {
      continue;
    }
    int last = 0;
    for (const int wanted : kSplits) {
      const int split = shares_of(problem, tile, wanted);
      // Sharing pays where there are too few tiles for the GPU, and a block keeps some steps.
      const bool worthwhile = tiles_of(problem, tile) * wanted <= 4 * gpu.multiprocessors &&
                              steps_of(problem, tile) >= 4 * wanted;
      if (split == last || (wanted > 1 && !worthwhile)) break;
      last = split;
      visit(ConvChoice{index, split}, cycles(problem, gpu, tile, split));
    }
  }
}

}  // namespace

Loads loads_for(const ConvProblem& problem) {
  const int64_t chunk = problem.products == Products::k16Bit ? 8 : 4;
  const int64_t group_c = problem.group_c();
  if (!problem.aligned) return Loads::kElements;
  if (problem.groups > 1 && group_c == problem.group_k() && problem.C % chunk == 0 &&
      Tile::kDiagonalBlock % group_c == 0) {
    return Loads::kDiagonal;
  }
  return group_c % chunk == 0 ? Loads::kVectors : Loads::kElements;
}

int64_t tiles_of(const ConvProblem& problem, const Tile& tile) {
  const int64_t rows = ceil_div(problem.M, tile.m);
  if (tile.loads == Loads::kDiagonal) return rows * ceil_div(problem.K, tile.n);
  return rows * problem.groups * ceil_div(problem.group_k(), tile.n);
}

int64_t steps_of(const ConvProblem& problem, const Tile& tile) {
  if (tile.loads == Loads::kDiagonal) return problem.taps;
  return ceil_div(problem.taps * problem.group_c(), tile.depth());
}

int shares_of(const ConvProblem& problem, const Tile& tile, int split) {
  const int64_t steps = steps_of(problem, tile);
  const int64_t each = ceil_div(steps, std::min<int64_t>(split, steps));
  return static_cast<int>(ceil_div(steps, each));
}

std::vector<ConvChoice> conv_choices(const ConvProblem& problem, const Gpu& gpu) {
  std::vector<std::pair<double, ConvChoice>> timed;
  for_each_choice(problem, gpu,
                  [&](ConvChoice choice, double time) { timed.emplace_back(time, choice); });
  std::stable_sort(timed.begin(), timed.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<ConvChoice> choices;
  for (const auto& [time, choice] : timed) choices.push_back(choice);
  return choices;
}

ConvChoice choose_conv(const ConvProblem& problem, const Gpu& gpu) {
  ConvChoice best{-1, 1};
  double least = 0;
  for_each_choice(problem, gpu, [&](ConvChoice choice, double time) {
    if (best.tile >= 0 && time >= least) return;
    best = choice;
    least = time;
  });
  return best;
}

}  // namespace fused_resnet
