// A model of the kernel's time in a multiprocessor's cycles, that of
// fused_resnet/tuning/estimate.py. It takes as long as the slowest of
// - the arithmetic of the busiest multiprocessor;
// - the instructions it issues;
// - what it loads from the L2 cache, and what all together load from memory, each tensor once;
// - waiting: a block with `stages - 1` steps under way takes one at most every
//   latency / (stages - 1), however empty the GPU is.
// A block that a multiprocessor holds alone fills its pipeline and stores while nothing else runs.
// The figures are round ones for Ampere to Blackwell, not fitted.
#include "cuda/conv_heuristics.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "cuda/stem.h"

namespace fused_resnet {
namespace {

constexpr double kLatency = 800;  // from asking for a step to having it
// Out of the L2 cache, of one multiprocessor by itself, and of each when all ask at once, as on an
// H100.
constexpr double kBytesPerCycle = 32;
constexpr double kSharedBytesPerCycle = 24;
constexpr double kIssuedPerCycle = 4;  // instructions of warps
// Of a step, of each copy of 16 bytes, and of the epilogue for each 32 outputs.
constexpr double kStepInstructions = 24;
constexpr double kCopyInstructions = 4;
constexpr double kOutputInstructions = 5;
constexpr double kMmaInstructions = 1.5;  // of an mma.sync with its share of ldmatrix
constexpr int kSharedPerBlock = 1024;     // what the driver takes
constexpr int kMostWarps = 48;            // of a multiprocessor; some have 64
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

// Instructions of a block's warps.
double instructions(const Tile& tile, double products, int64_t steps) {
  const int each = tile.loads == Loads::kElements ? tile.element_bytes() : 16;
  double sum = kStepInstructions * tile.threads() / 32 * steps +
               kCopyInstructions * tile.stage_bytes() * steps / (32 * each);
  switch (tile.products) {
    case Products::k16Bit:
      sum += kMmaInstructions * products / (16 * 8 * 16);
      break;
    case Products::kTf32:
      sum += kMmaInstructions * products / (16 * 8 * 8);
      break;
    default:
      sum += products / 32;
  }
  return sum + kOutputInstructions * tile.m * tile.n / 32;
}

// Bytes of the input, the filters and the output, each once.
double bytes_once(const ConvProblem& problem) {
  const double values = 1.0 * problem.M * (problem.C + problem.K) +
                        1.0 * problem.K * problem.taps * problem.group_c();
  return values * (problem.products == Products::k16Bit ? 2 : 4);
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
  const double share = std::min<int64_t>(blocks, gpu.multiprocessors) * kBytesPerCycle;
  const double all = gpu.multiprocessors * kSharedBytesPerCycle;
  const double cache =
      blocks * (1.0 * tile.stage_bytes() * steps + 2 * output) / std::min(share, all);
  const double memory = bytes_once(problem) / gpu.memory_bytes_per_cycle;
  const double issue = busiest * instructions(tile, products, steps) / kIssuedPerCycle;
  const double waiting = waves * steps * kLatency / (tile.stages - 1);
  const double terms[] = {arithmetic, cache, memory, issue, waiting};
  double sum = 0.9 * *std::max_element(std::begin(terms), std::end(terms));
  for (const double term : terms) sum += 0.1 * term;
  sum += resident == 1 ? waves * (2 * kLatency + 2 * output / kBytesPerCycle)
                       : std::min<int64_t>(waves, 2) * kLatency;
  if (split > 1) {
    const double partials = 2.0 * blocks * tile.m * tile.n * sizeof(float);
    sum += partials / std::min(share, all) + 3 * kLatency;
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

// A block's turn multiplies two rows of the convolution. Beside what an mma takes, a warp loads its
// operand of pixels word by word and masks two words of three, and pools: 9 loads, 32 maxima and
// a store for 8 numbers.
constexpr double kStemWordInstructions = 5.0 / 3;
constexpr double kPoolInstructions = 60;
constexpr int kStemRows[] = {56, 28, 14, 8, 4, 2, 1};

double stem_cycles(const StemProblem& problem, const Gpu& gpu, int rows_each) {
  using Tile = StemTile;
  const auto halved = [](int64_t size) { return (size - 1) / 2 + 1; };
  const int64_t P = halved(problem.H), Q = halved(problem.W);
  const int64_t pooled_P = halved(P), pooled_Q = halved(Q);
  const int64_t blocks = problem.N * Tile::strips(pooled_Q) * ceil_div(pooled_P, rows_each) *
                         ceil_div(problem.K, Tile::kFilters);
  const int64_t resident = std::min<int64_t>(
      Tile::kResident, gpu.shared_per_multiprocessor / (Tile::shared_bytes() + kSharedPerBlock));
  const int64_t busiest = ceil_div(blocks, gpu.multiprocessors);
  const int64_t waves = ceil_div(busiest, std::max<int64_t>(1, resident));
  // One turn more than there are pooled rows, but at the image's top.
  const int64_t turns = rows_each + (rows_each < pooled_P);

  constexpr double kPixels = 2.0 * Tile::kColumns;
  constexpr double kProducts = kPixels * Tile::kFilters * Tile::kDepth;
  constexpr double kEfficiency = 1 / (1 + 16.0 / kPixels + 16.0 / Tile::kFilters);
  const double arithmetic =
      1.0 * busiest * turns * kProducts / (rate(Products::k16Bit) * kEfficiency);

  constexpr double kWords = kPixels * Tile::kDepth / 2;
  constexpr double kPooled = Tile::kColumns / 2.0 * Tile::kFilters / 8;
  constexpr double kInstructions =
      kMmaInstructions * kProducts / (16 * 8 * 16) + kStemWordInstructions * kWords / 32 +
      kOutputInstructions * kPixels * Tile::kFilters / 32 + kPoolInstructions * kPooled / 32 +
      kCopyInstructions * 4.0 * Tile::kRowBytes / (32 * 16) + kStepInstructions * Tile::kWarps;
  const double issue = busiest * turns * kInstructions / kIssuedPerCycle;

  const double all = gpu.multiprocessors * kSharedBytesPerCycle;
  const double share = std::min<int64_t>(blocks, gpu.multiprocessors) * kBytesPerCycle;
  const double weights = 2.0 * Tile::kFilters * Tile::kTaps * Tile::kTaps * Tile::kChannels;
  const double output = 2.0 * problem.N * pooled_P * pooled_Q * problem.K;
  const double cache =
      (blocks * (4.0 * Tile::kRowBytes * turns + weights) + output) / std::min(share, all);
  const double input = 2.0 * problem.N * problem.H * problem.W * Tile::kChannels;
  const double memory = (input + output) / gpu.memory_bytes_per_cycle;
  const double waiting = 1.0 * waves * turns * kLatency;
  const double terms[] = {arithmetic, cache, memory, issue, waiting};
  double sum = 0.9 * *std::max_element(std::begin(terms), std::end(terms));
  for (const double term : terms) sum += 0.1 * term;
  // The weights are loaded, then stored, before the first turn.
  return sum + (resident == 1 ? waves : std::min<int64_t>(waves, 2)) * 3 * kLatency;
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

StemChoice choose_stem(const StemProblem& problem, const Gpu& gpu) {
  StemChoice best{1, 0};
  for (const int rows : kStemRows) {
    const double cycles = stem_cycles(problem, gpu, rows);
    if (best.cycles == 0 || cycles < best.cycles) best = {rows, cycles};
  }
  return best;
}

}  // namespace fused_resnet
