// Batch norm in training, with the residual add and the activation around it, forward and backward,
// for tensors whose channels lie innermost. With d = input - mean, scale = weight / sqrt(var +
// eps), n rows, and g the gradient behind the activation (Ioffe and Szegedy, "Batch Normalization"
// (2015), section 3):
//
//   output      = act(d scale + bias + residual)
//   grad_bias   = total = sum(g),  grad_weight = dot / sqrt(var + eps),  dot = sum(g d)
//   grad_input  = scale (g - total / n - d dot / (n (var + eps)))
//
// Forward is statistics, which reads the input, and normalize, which reads it again. Backward is
// gradient_sums, which reads gradient and input, and input_gradient, which reads them again. Of
// each pair the first leaves sums of every block behind, which a small kernel of few blocks
// combines in between; and the second goes through memory backwards, so that it finds in the L2
// cache what the first has read last.
//
// Where the activation lets gradients pass is kept as a bit a value, or its output is read or
// computed again in backward, to the same bits: each multiply-add that decides on its sign is
// written as one, not left to the compiler.
#pragma once

#include <type_traits>

#include "cuda/batch_norm.h"
#include "cuda/batch_norm_arithmetic.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/narrow_residual.cuh"

namespace fused_resnet {

constexpr int kThreads = Partition::kThreads;

constexpr int kResident = 2;  // blocks for whose sake the compiler keeps registers few

// Rows a thread loads before it uses the first, of one tensor and of several.
constexpr int kRows = Partition::kRowsAtOnce, kRowsOfSeveral = 2;

// A thread's part of a tensor: its first channel, its first row, and where its block's rows end,
// which for threads without work is no further.
struct Place {
  int lane, group, slab, row_block, channel;
  int64_t row, end;

  __device__ __forceinline__ Place(const Partition& p, unsigned block)
      : lane(threadIdx.x % p.lanes),
        group(threadIdx.x / p.lanes),
        slab(block % p.slabs),
        row_block(block / p.slabs),
        channel((slab * p.lanes + lane) * p.elements) {
    const int64_t first = row_block * p.rows_per_block;
    const bool has_work = group < p.groups && channel < p.channels;
    row = first + group;
    end = has_work ? min(first + p.rows_per_block, p.rows) : first;
  }
};

// Calls use(how_many, row) for a thread's rows, `kAtOnce` at a time while there are so many, each
// `groups` rows from the next.
template <int kAtOnce, typename Use>
__device__ __forceinline__ void for_each_row(int64_t row, int64_t end, int groups, const Use& use) {
  for (; row + (kAtOnce - 1) * groups < end; row += kAtOnce * groups) {
    use(std::integral_constant<int, kAtOnce>{}, row);
  }
  if constexpr (kAtOnce > 1) for_each_row<kAtOnce / 2>(row, end, groups, use);
}

// Combines the values of a block's groups in a fixed order into those of group 0: each half of the
// groups takes the other half's over.
template <int kValues, typename Combine>
__device__ __forceinline__ void combine_groups(float (&values)[kValues], int group, int groups,
                                               int lanes, const Combine& combine) {
  float* const mine = reinterpret_cast<float*>(device::shared_memory()) + threadIdx.x;
  for (int left = groups; left > 1;) {
    const int half = (left + 1) / 2;
    if (group >= half && group < left) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) mine[i * kThreads] = values[i];
    }
    __syncthreads();
    if (group + half < left) {
      float others[kValues];
#pragma unroll
      for (int i = 0; i < kValues; ++i) others[i] = mine[i * kThreads + half * lanes];
      combine(others);
    }
    left = half;
  }
}

// A share of the shared memory for combine_groups, in front of what else there is.
template <int kValues>
inline constexpr int kBytesToCombine = kValues * kThreads * static_cast<int>(sizeof(float));

// ---- statistics ---------------------------------------------------------------------------------

// Stores N numbers in accesses as wide as can be.
template <int N>
__device__ __forceinline__ void store_vector(float* target, const float* values) {
  constexpr int kWidth = N < 4 ? N : 4;
#pragma unroll
  for (int i = 0; i < N; i += kWidth) {
    Vector<float, kWidth> part;
#pragma unroll
    for (int e = 0; e < kWidth; ++e) part.values[e] = values[i + e];
    device::store(target + i, part);
  }
}

// partials[block] = (mean - origin, what rounding left out of that, variance) of its rows, for
// every channel; after those of the last block comes the origin, see load_origin.
//
// Reads the input once, rows * C elements, and writes 12 bytes a channel and block of rows.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_statistics(const T* input, float* partials, Partition p) {
  const Place place(p, blockIdx.x);
  float origin[N] = {};
  if (place.channel < p.channels) {
    load_origin<T, N>(origin, input, p.rows, p.channels, place.channel);
  }
  float moments[3 * N + 1] = {};

  constexpr int kAtOnce = N < 8 ? kRows : kRows / 2;  // for which there are registers
  for_each_row<kAtOnce>(place.row, place.end, p.groups, [&](auto rows, int64_t row) {
    constexpr int kCount = rows;
    Vector<T, N> x[kCount];
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      x[r] = load_streaming<T, N>(input + (row + r * p.groups) * p.channels + place.channel);
    }
    add_rows(moments, x, origin);
  });

  combine_groups(moments, place.group, p.groups, p.lanes,
                 [&](const auto& others) { merge_moments<N>(moments, others); });
  if (place.group == 0 && place.channel < p.channels) {
    const int64_t row = 3 * place.row_block;
#pragma unroll
    for (int v = 0; v < 3; ++v) {
      store_vector<N>(partials + (row + v) * p.channels + place.channel, moments + v * N);
    }
    if (place.row_block == p.row_blocks - 1) {
      store_vector<N>(partials + (row + 3) * p.channels + place.channel, origin);
    }
  }
}

// The kernels that combine blocks' sums have few channels a block and many threads for each.
constexpr int kCombinedChannels = 8;  // 32 bytes, the least that memory hands out
constexpr int kCombiningGroups = kThreads / kCombinedChannels;
constexpr int kPartialsAtOnce = 8;

// Calls use(row_block, values) for a thread's blocks of rows, with a channel's kValues sums.
template <int kValues, typename Use>
__device__ __forceinline__ void for_each_partial(const float* partials, const Partition& p,
                                                 int channel, int group, const Use& use) {
  // Of three values half as many, for which there are registers.
  constexpr int kAtOnce = kValues > 2 ? kPartialsAtOnce / 2 : kPartialsAtOnce;
  for (int first = group; first < p.row_blocks; first += kAtOnce * kCombiningGroups) {
    float sums[kAtOnce][kValues];
    const auto row_block = [&](int i) { return first + i * kCombiningGroups; };
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row_block(i) >= p.row_blocks) continue;
      const float* partial = partials + int64_t{kValues} * row_block(i) * p.channels + channel;
#pragma unroll
      for (int v = 0; v < kValues; ++v) sums[i][v] = __ldg(partial + v * int64_t{p.channels});
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (row_block(i) < p.row_blocks) use(row_block(i), sums[i]);
    }
  }
}

// Mean and biased variance of every channel, from what batch_norm_statistics left behind.
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_combine_statistics(const float* partials, float* mean, float* var, Partition p) {
  const int group = threadIdx.x / kCombinedChannels;
  const int channel = blockIdx.x * kCombinedChannels + threadIdx.x % kCombinedChannels;
  float moments[4] = {};
  if (channel < p.channels) {
    for_each_partial<3>(partials, p, channel, group,
                        [&](int row_block, const float (&of_block)[3]) {
                          const int64_t rows_left = p.rows - row_block * p.rows_per_block;
                          const auto added = static_cast<float>(min(p.rows_per_block, rows_left));
                          const float others[4] = {of_block[0], of_block[1], of_block[2], added};
                          merge_moments<1>(moments, others);
                        });
  }
  combine_groups(moments, group, kCombiningGroups, kCombinedChannels,
                 [&](const auto& others) { merge_moments<1>(moments, others); });
  if (group == 0 && channel < p.channels) {
    const float origin = partials[int64_t{3} * p.row_blocks * p.channels + channel];
    mean[channel] = mean_of(origin, moments[0], moments[1]);
    var[channel] = moments[2];
  }
}

// ---- normalise ----------------------------------------------------------------------------------

// Computes kVectors values for every channel of the block, once, and hands each thread its own.
// `compute(channel, values)`; the shared memory begins `offset` bytes in.
template <int kVectors, int N, typename Compute>
__device__ __forceinline__ void fill_vectors(float (&vectors)[kVectors][N], const Partition& p,
                                             const Place& place, int offset,
                                             const Compute& compute) {
  float* const shared = reinterpret_cast<float*>(device::shared_memory() + offset);
  const int width = p.lanes * N;
  const int channel = place.slab * width + threadIdx.x;
  if (static_cast<int>(threadIdx.x) < width && channel < p.channels) {
    float values[kVectors];
    compute(channel, values);
#pragma unroll
    for (int v = 0; v < kVectors; ++v) shared[v * width + threadIdx.x] = values[v];
  }
  __syncthreads();
  if (place.channel >= p.channels) return;
  constexpr int kWidth = N < 4 ? N : 4;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
#pragma unroll
    for (int i = 0; i < N; i += kWidth) {
      const auto part = device::load<float, kWidth>(shared + v * width + place.lane * N + i);
#pragma unroll
      for (int e = 0; e < kWidth; ++e) vectors[v][i + e] = part.values[e];
    }
  }
}

template <int kVectors, int N>
inline constexpr int kBytesOfVectors =
    kVectors * Partition::kMostLanes * N * static_cast<int>(sizeof(float));

// output = act(input * scale + shift + residual), where act(x) = max(x, floor). Rows are pixels of
// a residual of fewer channels. If kMasks `mask` gets a bit for each output that lets its gradient
// pass; the channels are a multiple of 8 then.
//
// Reads input and residual and writes the output once, rows * C elements each, and rows * C / 8
// bytes of a mask.
template <typename T, int N, bool kNarrow, bool kMasks>
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_normalize(const T* input, ResidualOf<T, kNarrow> residual, T* output, uint8_t* mask,
                         Norm norm, float floor, Partition p) {
  const Place place(p, gridDim.x - 1 - blockIdx.x);
  enum { kScale, kShift, kVectors };
  float vectors[kVectors][N];
  fill_vectors(vectors, p, place, 0, [&](int channel, float (&values)[kVectors]) {
    const Affine affine = affine_of(norm, channel);
    values[kScale] = affine.scale;
    values[kShift] = affine.shift;
  });

  for_each_row<kRowsOfSeveral>(place.row, place.end, p.groups, [&](auto rows, int64_t row) {
    constexpr int kCount = rows;
    Vector<T, N> x[kCount], shortcut[kCount];
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const int64_t offset = (row + r * p.groups) * p.channels + place.channel;
      x[r] = load_streaming<T, N>(input + offset);
      if constexpr (kNarrow) {
        const T* pixel = pixel_of<T>(residual, static_cast<unsigned>(row + r * p.groups));
        shortcut[r] = load_narrow<T, N>(residual, pixel, place.channel);
      } else if (residual != nullptr) {
        shortcut[r] = load_streaming<T, N>(residual + offset);
      }
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float y = __fmaf_rn(widen(x[r].values[i]), vectors[kScale][i], vectors[kShift][i]);
        if (is_there(residual)) y += widen(shortcut[r].values[i]);
        x[r].values[i] = narrow<T>(device::at_least(floor, y));
      }
      const int64_t offset = (row + r * p.groups) * p.channels + place.channel;
      device::store(output + offset, x[r]);
      if constexpr (kMasks) store_bits(mask, offset, x[r]);
    }
  });
}

// ---- backward -----------------------------------------------------------------------------------

// partials[block] = (sum of g, sum of g (input - mean)) of its rows, for every channel, where g is
// the gradient if it passes the activation and 0 elsewhere; `masked` = g, unless null.
//
// Reads gradient and input, and the output or its bits where `signs` are these, and writes `masked`
// once, rows * C elements each; writes 8 bytes a channel and block of rows.
template <typename T, int N, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_gradient_sums(const T* grad, const T* input, const void* signs, T* masked, Norm norm,
                             float* partials, Partition p) {
  const Place place(p, blockIdx.x);
  enum { kMean, kScale, kShift, kVectors };
  float vectors[kVectors][N];
  fill_vectors(vectors, p, place, kBytesToCombine<2 * N>,
               [&](int channel, float (&values)[kVectors]) {
                 const Affine affine = affine_of(norm, channel);
                 values[kMean] = affine.mean;
                 values[kScale] = affine.scale;
                 values[kShift] = affine.shift;
               });

  float sums[2 * N] = {};
  for_each_row<kRowsOfSeveral>(place.row, place.end, p.groups, [&](auto rows, int64_t row) {
    constexpr int kCount = rows;
    Vector<T, N> g[kCount], x[kCount];
    Signs<T, N, kMask> y[kCount];
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const int64_t offset = (row + r * p.groups) * p.channels + place.channel;
      g[r] = load_streaming<T, N>(grad + offset);
      x[r] = load_streaming<T, N>(input + offset);
      y[r].load(signs, offset);
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      mask_and_add(sums, g[r], x[r], y[r], vectors[kMean], vectors[kScale], vectors[kShift]);
      if (masked != nullptr) {
        device::store(masked + (row + r * p.groups) * p.channels + place.channel, g[r]);
      }
    }
  });

  combine_groups(sums, place.group, p.groups, p.lanes, [&](const auto& others) {
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) sums[i] += others[i];
  });
  if (place.group == 0 && place.channel < p.channels) {
    const int64_t row = 2 * place.row_block;
    store_vector<N>(partials + row * p.channels + place.channel, sums);
    store_vector<N>(partials + (row + 1) * p.channels + place.channel, sums + N);
  }
}

// total, dot and grad_weight of every channel, from what batch_norm_gradient_sums left behind.
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_combine_sums(const float* partials, float* total, float* dot, float* grad_weight,
                            Norm norm, Partition p) {
  const int group = threadIdx.x / kCombinedChannels;
  const int channel = blockIdx.x * kCombinedChannels + threadIdx.x % kCombinedChannels;
  float sums[2] = {};
  if (channel < p.channels) {
    for_each_partial<2>(partials, p, channel, group, [&](int, const float (&of_block)[2]) {
      sums[0] += of_block[0];
      sums[1] += of_block[1];
    });
  }
  combine_groups(sums, group, kCombiningGroups, kCombinedChannels, [&](const auto& others) {
    sums[0] += others[0];
    sums[1] += others[1];
  });
  if (group == 0 && channel < p.channels) {
    total[channel] = sums[0];
    dot[channel] = sums[1];
    grad_weight[channel] = times_invstd(sums[1], affine_of(norm, channel).invstd);
  }
}

// grad_input = g scale + d slope + offset, where slope = -scale dot / (count (var + eps)) and
// offset = -scale total / count; g scale alone where `total` is null, as it is for statistics that
// are no function of the input. `masked` = g, unless null. grad_input may be grad.
//
// Reads gradient and input (which it leaves alone where nothing depends on it), and the output or
// its bits where `signs` are these, and writes grad_input and `masked` once, rows * C elements
// each.
template <typename T, int N, Mask kMask>
__global__ void __launch_bounds__(kThreads, kResident)
    batch_norm_input_gradient(const T* grad, const T* input, const void* signs, const float* total,
                              const float* dot, float count, T* masked, T* grad_input, Norm norm,
                              Partition p) {
  const Place place(p, gridDim.x - 1 - blockIdx.x);
  const bool through_statistics = total != nullptr;
  enum { kMean, kScale, kShift, kSlope, kOffset, kVectors };
  float vectors[kVectors][N];
  fill_vectors(vectors, p, place, 0, [&](int channel, float (&values)[kVectors]) {
    const Affine affine = affine_of(norm, channel);
    const float per_value = -affine.scale / count;
    values[kMean] = affine.mean;
    values[kScale] = affine.scale;
    values[kShift] = affine.shift;
    values[kSlope] = through_statistics ? slope_of(per_value, dot[channel], affine.invstd) : 0.f;
    values[kOffset] = through_statistics ? per_value * total[channel] : 0.f;
  });

  for_each_row<kRowsOfSeveral>(place.row, place.end, p.groups, [&](auto rows, int64_t row) {
    constexpr int kCount = rows;
    Vector<T, N> g[kCount], x[kCount];
    Signs<T, N, kMask> y[kCount];
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const int64_t offset = (row + r * p.groups) * p.channels + place.channel;
      g[r] = device::load<T, N>(grad + offset);  // it may be written to
      if (kMask == Mask::kRecomputed || through_statistics) {
        x[r] = load_streaming<T, N>(input + offset);
      }
      y[r].load(signs, offset);
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const int64_t offset = (row + r * p.groups) * p.channels + place.channel;
      Vector<T, N> result;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float value = widen(x[r].values[i]);
        if (!y[r].passes(i, value, vectors[kScale][i], vectors[kShift][i])) {
          g[r].values[i] = narrow<T>(0.f);
        }
        result.values[i] = narrow<T>(input_gradient_of(through_statistics, widen(g[r].values[i]),
                                                       value, vectors[kScale][i], vectors[kMean][i],
                                                       vectors[kSlope][i], vectors[kOffset][i]));
      }
      device::store(grad_input + offset, result);
      if (masked != nullptr) device::store(masked + offset, g[r]);
    }
  });
}

}  // namespace fused_resnet
