// Batch norm in training as csrc/cuda/batch_norm.cuh has it, each direction in one launch, for
// tensors of which a cluster of blocks can keep some channels in shared memory. A cluster loads
// them once, combines its blocks' sums by reading each other's shared memory, and goes on from what
// it kept: two launches, a pass and the sums' way through memory less.
//
// A thread keeps what it loaded itself, `rounds` accesses of every tensor, each of 16 bytes: the
// channels of its lane, of every groups-th row of its block. Needs compute capability 9.0.
#pragma once

#include <type_traits>

#include "cuda/batch_norm_arithmetic.cuh"
#include "cuda/batch_norm_cluster.h"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/cluster.cuh"

namespace fused_resnet {

constexpr int kClusterThreads = ClusterPartition::kThreads;
constexpr int kClusterWarps = kClusterThreads / 32;

// Threads that combine a channel's sums, first those of the block's warps, then of the blocks.
constexpr int kCombiners = device::kMostBlocksOfCluster;
static_assert(ClusterPartition::kBlocks == kCombiners && kClusterWarps == kCombiners);

// Rounds that are loaded before sums begin, and of which several are waited for in turn.
constexpr int kStages = 4;

// Blocks for whose sake the compiler keeps registers few.
constexpr int kResidentInCluster = 2;

// Rounds of which a thread loads all there is at once, of what it keeps and of what it does not.
constexpr int kRoundsAtOnce = 4, kRoundsOfOthers = 2;

// A thread's part of a tensor, and where it keeps that.
template <typename T, int N>
struct ClusterPlace {
  const ClusterPartition& p;
  unsigned rank;
  int lane, channel;
  int64_t row;  // its first
  int rounds;   // that have a row of its block

  __device__ __forceinline__ explicit ClusterPlace(const ClusterPartition& p)
      : p(p),
        rank(device::rank_in_cluster()),
        lane(threadIdx.x % p.lanes),
        channel((static_cast<int>(blockIdx.x / ClusterPartition::kBlocks) * p.lanes + lane) * N) {
    const int64_t first = rank * p.rows_per_block, end = min(first + p.rows_per_block, p.rows);
    row = first + threadIdx.x / p.lanes;
    rounds = channel < p.channels && row < end
                 ? static_cast<int>((end - row + p.groups - 1) / p.groups)
                 : 0;
  }

  __device__ __forceinline__ int64_t offset_of(int round) const {
    return (row + int64_t{round} * p.groups) * p.channels + channel;
  }
  // What the thread keeps of a tensor in a round.
  __device__ __forceinline__ T* kept(int tensor, int round) const {
    char* const tiles = device::shared_memory() + ClusterPartition::kBytesToCombine;
    const int access = (tensor * p.rounds + round) * kClusterThreads + threadIdx.x;
    return reinterpret_cast<T*>(tiles + access * ClusterPartition::kAccessBytes);
  }
  __device__ __forceinline__ void start_copy(int tensor, int round, const T* source) const {
    device::copy_async_16(kept(tensor, round), source + offset_of(round), true);
  }
  // The first of a stage's rounds.
  __device__ __forceinline__ int begin_of(int stage) const {
    return min(stage * ((p.rounds + kStages - 1) / kStages), rounds);
  }
};

// Calls use(how_many, round) for rounds up to `end`, kAtOnce at a time while there are so many.
template <int kAtOnce, typename Use>
__device__ __forceinline__ void for_each_round(int round, int end, const Use& use) {
  for (; round + kAtOnce <= end; round += kAtOnce) {
    use(std::integral_constant<int, kAtOnce>{}, round);
  }
  if constexpr (kAtOnce > 1) for_each_round<kAtOnce / 2>(round, end, use);
}

// Calls use(first, end) for every stage's rounds once they have been copied.
template <int kStage, typename Place, typename Use>
__device__ __forceinline__ void for_each_stage(const Place& place, const Use& use) {
  if constexpr (kStage < kStages) {
    device::wait_for_copies<kStages - 1 - kStage>();
    use(place.begin_of(kStage), place.begin_of(kStage + 1));
    for_each_stage<kStage + 1>(place, use);
  }
}

// Combines the values of the threads of a segment of `width` lanes, `step` apart, into the first
// `step` of them, in a fixed order.
template <int kValues, typename Combine>
__device__ __forceinline__ void combine_lanes(float (&values)[kValues], int width, int step,
                                              const Combine& combine) {
  for (int delta = width / 2; delta >= step; delta /= 2) {
    float others[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      others[i] = __shfl_down_sync(~0u, values[i], delta, width);
    }
    combine(values, others);
  }
}

// Combines what a cluster's threads have of each channel. In every block, one thread a channel
// calls finish(channel, column, values), where `column` is the channel's place in the cluster's
// slab. All threads of the cluster have to call this, and a barrier of the block after it.
//
// `mine` are a thread's kEach values for each of its N channels, value by value, and kShared that
// hold for all of them; `combine_all` combines such with a neighbour's, `combine` those of a single
// channel, kEach + kShared; `of_block(rank)` is what is shared in a whole block.
template <int kEach, int kShared, int N, typename Place, typename CombineAll, typename Combine,
          typename OfBlock, typename Finish>
__device__ __forceinline__ void combine_cluster(float (&mine)[kEach * N + kShared],
                                                const Place& place, const CombineAll& combine_all,
                                                const Combine& combine, const OfBlock& of_block,
                                                const Finish& finish) {
  constexpr int kOfThread = kEach * N + kShared, kOfChannel = kEach + kShared;
  const int lanes = place.p.lanes, width = lanes * N;
  const int warp = threadIdx.x / 32;
  float* const of_warps = reinterpret_cast<float*>(device::shared_memory());
  float* const of_blocks = of_warps + kClusterWarps * kOfThread * lanes;

  combine_lanes(mine, 32, lanes, combine_all);
  if (threadIdx.x % 32 < static_cast<unsigned>(lanes)) {
#pragma unroll
    for (int i = 0; i < kOfThread; ++i) {
      of_warps[(warp * kOfThread + i) * lanes + place.lane] = mine[i];
    }
  }
  __syncthreads();

  // Of each column, kCombiners threads side by side.
  const int combiner = threadIdx.x % kCombiners, column = threadIdx.x / kCombiners;
  const bool helps = column < width;
  float values[kOfChannel] = {};
  if (helps) {
    const float* const of_warp = of_warps + combiner * kOfThread * lanes + column / N;
#pragma unroll
    for (int v = 0; v < kEach; ++v) values[v] = of_warp[(v * N + column % N) * lanes];
    if constexpr (kShared > 0) values[kEach] = of_warp[kEach * N * lanes];
  }
  combine_lanes(values, kCombiners, 1, combine);
  if (helps && combiner == 0) {
#pragma unroll
    for (int v = 0; v < kEach; ++v) of_blocks[v * width + column] = values[v];
  }
  device::synchronize_cluster();

  if (helps) {
#pragma unroll
    for (int v = 0; v < kEach; ++v) {
      values[v] = device::load_from_block(of_blocks + v * width + column, combiner);
    }
    if constexpr (kShared > 0) values[kEach] = of_block(combiner);
  }
  combine_lanes(values, kCombiners, 1, combine);
  const int channel = static_cast<int>(blockIdx.x / ClusterPartition::kBlocks) * width + column;
  if (helps && combiner == 0 && channel < place.p.channels) finish(channel, column, values);
}

// Hands each thread its lane's part of `kVectors` numbers a channel, which a block has in shared
// memory behind what it combines.
template <int kVectors, int N, typename Place>
__device__ __forceinline__ void load_vectors(float (&vectors)[kVectors][N], const float* shared,
                                             const Place& place) {
  const int width = place.p.lanes * N;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const auto part = device::load<float, 4>(shared + v * width + place.lane * N + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) vectors[v][i + e] = part.values[e];
    }
  }
}

// output = act(batch_norm(input) + residual) with the statistics of the batch, which it returns;
// `mask` as in batch_norm_normalize.
//
// Reads input and residual and writes the output once, rows * C elements each, and rows * C / 8
// bytes of a mask.
template <typename T, int N, bool kMasks>
__global__ void __launch_bounds__(kClusterThreads, kResidentInCluster)
    batch_norm_in_one_launch(const T* input, const T* residual, T* output, uint8_t* mask,
                             float* mean, float* var, Norm norm, float floor, ClusterPartition p) {
  if constexpr (device::kHasClusters) {
    const ClusterPlace<T, N> place(p);
    for (int stage = 0; stage < kStages; ++stage) {
      const int end = place.begin_of(stage + 1);
      for (int round = place.begin_of(stage); round < end; ++round) {
        place.start_copy(0, round, input);
      }
      device::commit_copies();
    }
    float origin[N] = {};
    if (place.channel < p.channels) {
      load_origin<T, N>(origin, input, p.rows, p.channels, place.channel);
    }
    float moments[3 * N + 1] = {};
    for_each_stage<0>(place, [&](int begin, int end) {
      for_each_round<kRoundsAtOnce>(begin, end, [&](auto rounds, int round) {
        Vector<T, N> x[rounds];
#pragma unroll
        for (int r = 0; r < rounds; ++r) x[r] = device::load<T, N>(place.kept(0, round + r));
        add_rows(moments, x, origin);
      });
    });

    enum { kScale, kShift, kVectors };
    const int width = p.lanes * N;
    float* const shared =
        reinterpret_cast<float*>(device::shared_memory() + ClusterPartition::kBytesOfSums);
    combine_cluster<3, 1, N>(
        moments, place, [](auto& values, const auto& others) { merge_moments<N>(values, others); },
        [](auto& values, const auto& others) { merge_moments<1>(values, others); },
        [&](int rank) {
          const int64_t rows = min(p.rows_per_block, p.rows - rank * p.rows_per_block);
          return static_cast<float>(max(rows, int64_t{0}));
        },
        [&](int channel, int column, const float (&of_channel)[4]) {
          float own_origin[1];
          load_origin<T, 1>(own_origin, input, p.rows, p.channels, channel);
          const float channel_mean = mean_of(own_origin[0], of_channel[0], of_channel[1]);
          const float channel_var = of_channel[2];
          const Affine affine = affine_of(channel_mean, channel_var, norm, channel);
          shared[kScale * width + column] = affine.scale;
          shared[kShift * width + column] = affine.shift;
          if (place.rank == 0) {
            mean[channel] = channel_mean;
            var[channel] = channel_var;
          }
        });
    __syncthreads();
    float vectors[kVectors][N];
    if (place.channel < p.channels) load_vectors(vectors, shared, place);

    for_each_round<kRoundsOfOthers>(0, place.rounds, [&](auto rounds, int round) {
      Vector<T, N> shortcut[rounds];
#pragma unroll
      for (int r = 0; r < rounds; ++r) {
        if (residual != nullptr) {
          shortcut[r] = load_streaming<T, N>(residual + place.offset_of(round + r));
        }
      }
#pragma unroll
      for (int r = 0; r < rounds; ++r) {
        auto x = device::load<T, N>(place.kept(0, round + r));
#pragma unroll
        for (int i = 0; i < N; ++i) {
          float y = __fmaf_rn(widen(x.values[i]), vectors[kScale][i], vectors[kShift][i]);
          if (residual != nullptr) y += widen(shortcut[r].values[i]);
          x.values[i] = narrow<T>(device::at_least(floor, y));
        }
        device::store(output + place.offset_of(round + r), x);
        if constexpr (kMasks) store_bits(mask, place.offset_of(round + r), x);
      }
    });
    device::leave_cluster();
  }
}

// Total, dot and grad_weight of every channel, grad_input through the statistics and `masked`, as
// batch_norm_gradient_sums and batch_norm_input_gradient have them. grad_input may be grad.
//
// Reads gradient and input, and the output or its bits where `signs` are these, and writes
// grad_input and `masked` once, rows * C elements each.
template <typename T, int N, Mask kMask>
__global__ void __launch_bounds__(kClusterThreads, kResidentInCluster)
    batch_norm_backward_in_one_launch(const T* grad, const T* input, const void* signs, T* masked,
                                      T* grad_input, float* total, float* dot, float* grad_weight,
                                      Norm norm, ClusterPartition p) {
  if constexpr (device::kHasClusters) {
    const ClusterPlace<T, N> place(p);
    enum { kGrad, kInput };
    for (int stage = 0; stage < kStages; ++stage) {
      const int end = place.begin_of(stage + 1);
      for (int round = place.begin_of(stage); round < end; ++round) {
        place.start_copy(kGrad, round, grad);
        place.start_copy(kInput, round, input);
      }
      device::commit_copies();
    }
    enum { kMean, kScale, kShift, kSlope, kOffset, kVectors };
    const int width = p.lanes * N;
    float* const shared =
        reinterpret_cast<float*>(device::shared_memory() + ClusterPartition::kBytesOfSums);
    const int column = threadIdx.x;
    const int of_column = static_cast<int>(blockIdx.x / ClusterPartition::kBlocks) * width + column;
    if (column < width && of_column < p.channels) {
      const Affine affine = affine_of(norm, of_column);
      shared[kMean * width + column] = affine.mean;
      shared[kScale * width + column] = affine.scale;
      shared[kShift * width + column] = affine.shift;
    }
    __syncthreads();
    float known[kSlope][N];
    if (place.channel < p.channels) load_vectors(known, shared, place);

    float sums[2 * N] = {};
    for_each_stage<0>(place, [&](int begin, int end) {
      for_each_round<kRoundsOfOthers>(begin, end, [&](auto rounds, int round) {
        Signs<T, N, kMask> y[rounds];
#pragma unroll
        for (int r = 0; r < rounds; ++r) y[r].load(signs, place.offset_of(round + r));
#pragma unroll
        for (int r = 0; r < rounds; ++r) {
          auto g = device::load<T, N>(place.kept(kGrad, round + r));
          const auto x = device::load<T, N>(place.kept(kInput, round + r));
          mask_and_add(sums, g, x, y[r], known[kMean], known[kScale], known[kShift]);
          if constexpr (kMask != Mask::kEverywhere) {
            device::store(place.kept(kGrad, round + r), g);
          }
        }
      });
    });

    combine_cluster<2, 0, N>(
        sums, place,
        [](auto& values, const auto& others) {
#pragma unroll
          for (int i = 0; i < 2 * N; ++i) values[i] += others[i];
        },
        [](auto& values, const auto& others) {
          values[0] += others[0];
          values[1] += others[1];
        },
        [](int) { return 0.f; },
        [&](int channel, int column, const float (&of_channel)[2]) {
          const Affine affine = affine_of(norm, channel);
          const float per_value = -affine.scale / static_cast<float>(p.rows);
          shared[kSlope * width + column] = slope_of(per_value, of_channel[1], affine.invstd);
          shared[kOffset * width + column] = per_value * of_channel[0];
          if (place.rank == 0) {
            total[channel] = of_channel[0];
            dot[channel] = of_channel[1];
            grad_weight[channel] = times_invstd(of_channel[1], affine.invstd);
          }
        });
    __syncthreads();
    float vectors[kVectors][N];
    if (place.channel < p.channels) load_vectors(vectors, shared, place);

    // Stores come after the cluster's barrier, which would have waited for them.
    for (int round = 0; round < place.rounds; ++round) {
      const auto g = device::load<T, N>(place.kept(kGrad, round));
      auto x = device::load<T, N>(place.kept(kInput, round));
      if (masked != nullptr) device::store(masked + place.offset_of(round), g);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        x.values[i] = narrow<T>(input_gradient_of(true, widen(g.values[i]), widen(x.values[i]),
                                                  vectors[kScale][i], vectors[kMean][i],
                                                  vectors[kSlope][i], vectors[kOffset][i]));
      }
      device::store(grad_input + place.offset_of(round), x);
    }
    device::leave_cluster();
  }
}

}  // namespace fused_resnet
