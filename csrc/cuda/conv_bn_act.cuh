// Convolution with batch norm, residual and activation in one pass:
//
//   output[n, p, q, k] = act(scale[k] sum[n, p, q, k] + shift[k] + residual[n, p, q, k])
//   sum[n, p, q, k] = sum over r, s, c of
//       input[n, p stride_h + r dil_h - pad_h, q stride_w + s dil_w - pad_w, c] weight[k, r, s, c]
//   scale = bn_weight / sqrt(running_var + eps),  shift = bn_bias + (bias - running_mean) scale
//
// Implicit GEMM: a row of A is the window of one output pixel, a row of B is one filter, and both
// are R S C / groups deep, taps outside and channels inside. A is never written anywhere: a block
// gathers its tile of it, step by step, from the image.
//
// Reads weight and residual and writes the output once; reads the input once from memory and once
// for every tap and column of tiles from the L2 cache. Nothing else is written but, where blocks
// share a sum (split > 1), 4 bytes for each of them and output, which are read back.
//
// Shared memory is a ring of stages, each a step's rows of A and then of B. A row is 2, 4 or 8
// chunks of 16 bytes. Tensor cores load their operands as 8 rows by one chunk (ldmatrix), so chunks
// are permuted within their row (`swizzled`) such that any 8 rows have a column of chunks in 8
// different groups of banks. Everything but the arithmetic itself is the same for every dtype,
// since one tensor-core instruction takes 32 bytes of a row whatever they hold.
//
// The last step of the sum always lies in the ring's last stage. So the stages that loading is
// done with come free from the first one on, in order, while the sum is still being computed; the
// residual goes there, as a tile [m][n], and the output is put in its place and leaves in 16-byte
// stores. A residual of fewer channels goes there with zeros around it, but after the sum, when the
// registers are free that its addresses take.
#pragma once

#include <bit>
#include <utility>

#include "cuda/activation.cuh"
#include "cuda/conv_bn_act.h"
#include "cuda/conv_tiles.h"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/narrow_residual.cuh"
#include "cuda/parameter.cuh"

namespace fused_resnet {

using device::Vector;

// Where a chunk lies, in bytes, in rows of kChunks. Rows that share their place in 128 bytes of
// banks permute chunks differently; kStep 2 keeps pairs of chunks together.
template <int kChunks, int kStep = 1>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kRowsInLine = kChunks < 8 ? 8 / kChunks : 1;
  constexpr int kPlaces = kChunks < 8 ? kChunks : 8;
  return (row * kChunks + (chunk ^ (row / kRowsInLine * kStep % kPlaces))) * 16;
}

// A place along the sum. Steps are short of a tap's channels or a few taps long, so it advances
// without dividing.
struct Tap {
  int r, s, c;

  __device__ __forceinline__ void next(int channels, int S) {
    if (++c < channels) return;
    c = 0;
    next_tap(S);
  }

  __device__ __forceinline__ void advance(int by, int channels, int S) {
    c += by;
    while (c >= channels) {
      c -= channels;
      next_tap(S);
    }
  }

 private:
  __device__ __forceinline__ void next_tap(int S) {
    if (++s < S) return;
    s = 0;
    ++r;
  }
};

// The input under tap (0, 0) of an output pixel's window; above or left of the image in padding.
template <typename T>
struct Window {
  const T* origin;
  int h, w;
};

// Beyond the last pixel a window is so far above the image that no tap reaches it.
constexpr int kNowhere = -(1 << 30);

template <typename T>
__device__ __forceinline__ Window<T> window_of(const Conv& conv, int m, int channel) {
  if (m >= conv.M) return {nullptr, kNowhere, 0};
  const unsigned row = static_cast<unsigned>(m) / conv.Q, image = row / conv.P;
  const int n = image, p = row - image * conv.P, q = m - row * conv.Q;
  const int h = p * conv.stride_h - conv.pad_h, w = q * conv.stride_w - conv.pad_w;
  const int64_t offset =
      n * conv.input_n + h * conv.input_h + w * conv.input_w + channel * conv.input_c;
  return {static_cast<const T*>(conv.input) + offset, h, w};
}

// One step of the sum: the warp's rows of A by its rows of B, both in one stage. `meanwhile` is
// called once the first chunks' operands are on their way, between the first products and the rest.
template <typename T, int kIndex, int kTilesM, int kTilesN, typename Meanwhile>
__device__ __forceinline__ void multiply(float (&sums)[kTilesM][kTilesN][4], const char* pixels,
                                         const char* filters, int warp_m, int warp_n, int lane,
                                         const Meanwhile& meanwhile) {
  static constexpr Tile kTile = kTiles[kIndex];
  constexpr int kChunks = kTile.depth_bytes / 16;
  constexpr int kFilterChunks = kTile.filter_bytes() / 16;
  constexpr bool kDiagonal = kTile.loads == Loads::kDiagonal;
  const int first_m = warp_m * kTilesM * 16, first_n = warp_n * kTilesN * 8;
#pragma unroll
  for (int chunk = 0; chunk < kChunks; chunk += 2) {
    // On the diagonal, filters meet the channels of their own block only.
    const auto meets = [&](int pair) { return !kDiagonal || pair == chunk / kFilterChunks; };
    if constexpr (kTile.products == Products::kIeee) {
      // The thread has the outputs it would have of an mma: rows g and g + 8, columns 2t, 2t + 1.
      constexpr int N = device::kElementsIn16Bytes<float>;
      if (chunk == 0) meanwhile();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vector<float, N> a[kTilesM][2];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int row = first_m + i * 16 + j * 8 + lane / 4;
            a[i][j] = device::load<float, N>(
                reinterpret_cast<const float*>(pixels + swizzled<kChunks>(row, chunk + half)));
          }
        }
#pragma unroll
        for (int column = 0; column < kTilesN * 2; ++column) {
          if (!meets(column / 4)) continue;
          const int row = first_n + column / 2 * 8 + lane % 4 * 2 + column % 2;
          const auto b = device::load<float, N>(reinterpret_cast<const float*>(
              filters + swizzled<kFilterChunks>(row, (chunk + half) % kFilterChunks)));
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              float& sum = sums[i][column / 2][j * 2 + column % 2];
#pragma unroll
              for (int e = 0; e < N; ++e) sum += a[i][j].values[e] * b.values[e];
            }
          }
        }
      }
    } else {
      const auto convert = [](auto& fragment) {
        if constexpr (kTile.products == Products::kTf32) {
          for (uint32_t& bits : fragment) bits = device::to_tf32(std::bit_cast<float>(bits));
        }
      };
      // Rows 8 apart are permuted alike, and pairs of chunks stay together.
      const int a_offset = swizzled<kChunks>(first_m + lane % 16, lane / 16) ^ chunk * 16;
      const int b_offset =
          swizzled<kFilterChunks>(first_n + lane / 16 * 8 + lane % 8, lane / 8 % 2) ^
          chunk % kFilterChunks * 16;
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        device::load_matrix_x4(a[i], pixels + a_offset + i * 16 * kChunks * 16);
        convert(a[i]);
      }
#pragma unroll
      for (int pair = 0; pair < kTilesN / 2; ++pair) {
        if (!meets(pair)) continue;
        uint32_t b[4];
        device::load_matrix_x4(b, filters + b_offset + pair * 16 * kFilterChunks * 16);
        if (chunk == 0 && pair == (kDiagonal ? 0 : kTilesN / 2 - 1)) meanwhile();
        convert(b);
        const uint32_t columns[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float (&sum)[4] = sums[i][pair * 2 + j];
            if constexpr (kTile.products == Products::kTf32) {
              device::mma_16x8x8_tf32(sum, a[i], columns[j]);
            } else {
              device::mma_16x8x16<T>(sum, a[i], columns[j]);
            }
          }
        }
      }
    }
  }
}

// The sum of one output by itself.
template <typename T>
__device__ float sum_alone(const Conv& conv, int m, int k) {
  const Window<T> window = window_of<T>(conv, m, k / conv.group_k * conv.group_c);
  const T* filter = static_cast<const T*>(conv.weight) + k * conv.weight_k;
  float sum = 0;
#pragma unroll 1
  for (int r = 0; r < conv.R; ++r) {
    const int h = r * conv.dil_h;
    if (static_cast<unsigned>(window.h + h) >= static_cast<unsigned>(conv.H)) continue;
#pragma unroll 1
    for (int s = 0; s < conv.S; ++s) {
      const int w = s * conv.dil_w;
      if (static_cast<unsigned>(window.w + w) >= static_cast<unsigned>(conv.W)) continue;
#pragma unroll 1
      for (int c = 0; c < conv.group_c; ++c) {
        const T x = window.origin[h * conv.input_h + w * conv.input_w + c * conv.input_c];
        const T y = filter[r * conv.weight_r + s * conv.weight_s + c * conv.weight_c];
        sum += device::widen(x) * device::widen(y);
      }
    }
  }
  return sum;
}

// Grid: (tiles of pixels x tiles of filters, the latter consecutive since they share pixels;
// groups, or on the diagonal slabs of n channels; blocks that share a sum).
template <typename T, int kIndex, Activations kActivations>
__global__ void __launch_bounds__(kTiles[kIndex].threads(), kTiles[kIndex].resident)
    conv_bn_act(const Conv conv) {
  static constexpr Tile kTile = kTiles[kIndex];
  constexpr bool kDiagonal = kTile.loads == Loads::kDiagonal;
  constexpr int kElements = 16 / sizeof(T);  // of a chunk
  constexpr int kChunks = kTile.depth_bytes / 16;
  constexpr int kFilterChunks = kTile.filter_bytes() / 16;
  constexpr int kDepth = kTile.depth();
  constexpr int kThreads = kTile.threads();
  constexpr int kStages = kTile.stages;
  constexpr int kStageBytes = kTile.stage_bytes();
  constexpr int kRowsAtOnce = kThreads / kChunks;  // that the threads copy, a chunk each
  constexpr int kPixels = kTile.m / kRowsAtOnce;   // rows of A and of B that a thread copies
  constexpr int kFilters = kTile.n / kRowsAtOnce;
  constexpr int kTilesM = kTile.m / kTile.warps_m / 16;  // of 16 x 8 outputs, in a warp
  constexpr int kTilesN = kTile.n / kTile.warps_n / 8;
  constexpr int kOutChunks = kTile.n / kElements;
  constexpr int kOutStep = sizeof(T) / 2;  // keeps a warp's stores of two elements free of conflict
  constexpr int kPieceRows = kStageBytes / (kOutChunks * 16);  // of the residual in a stage
  static_assert(sizeof(T) == kTile.element_bytes());
  static_assert(kTile.m % kRowsAtOnce == 0 && kTile.n % kRowsAtOnce == 0 && kTilesN % 2 == 0);
  static_assert(kPixels + kFilters <= 32, "a bit for each");
  static_assert(kRowsAtOnce % 8 == 0, "the rows that a thread copies are permuted alike");
  static_assert(kStageBytes % (kOutChunks * 16) == 0, "a row of the output is within a stage");
  static_assert(kTile.m <= kPieceRows * (kStages - 1), "the output leaves the last stage alone");
  static_assert(!kDiagonal ||
                (kTile.n == kDepth && kTile.warps_n == 1 && kTile.n * kFilterChunks == kThreads));

  char* const ring = device::shared_memory();
  float* const scale = reinterpret_cast<float*>(ring + kStages * kStageBytes);
  float* const shift = scale + kTile.n;

  // What this block computes: pixels from m0, filters from k0 of a group (or slab).
  const int columns = (conv.group_k + kTile.n - 1) / kTile.n;
  const int tile_n = kDiagonal ? 0 : blockIdx.x % columns;
  const int m0 = (kDiagonal ? blockIdx.x : blockIdx.x / columns) * kTile.m;
  const int k0 = kDiagonal ? blockIdx.y * kTile.n : blockIdx.y * conv.group_k + tile_n * kTile.n;
  const int k_end = kDiagonal ? conv.K : (blockIdx.y + 1) * conv.group_k;
  const int channel = kDiagonal ? k0 : blockIdx.y * conv.group_c;
  const int channels = kDiagonal ? kDepth : conv.group_c;  // of a tap

  // Which steps of the sum are this block's. The last lies in the ring's last stage.
  const int depth = conv.R * conv.S * channels;
  const int all_steps = (depth + kDepth - 1) / kDepth;
  const int share = (all_steps + gridDim.z - 1) / gridDim.z;
  const int first_step = blockIdx.z * share;
  const int steps = min(share, all_steps - first_step);
  const int first_stage = (kStages - steps % kStages) % kStages;

  // What this thread copies: one chunk of every kRowsAtOnce-th row.
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  const int offset = first_step * kDepth + chunk * kElements;
  Tap tap{offset / channels / conv.S, offset / channels % conv.S, offset % channels};
  Window<T> windows[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    windows[i] = window_of<T>(conv, m0 + row + i * kRowsAtOnce, channel);
  }
  const T* const weight = static_cast<const T*>(conv.weight);

  const auto reaches = [&](const Window<T>& window, const Tap& tap) {
    return tap.r < conv.R &&
           static_cast<unsigned>(window.h + tap.r * conv.dil_h) < static_cast<unsigned>(conv.H) &&
           static_cast<unsigned>(window.w + tap.s * conv.dil_w) < static_cast<unsigned>(conv.W);
  };
  const auto input_offset = [&](const Tap& tap) {
    return tap.r * conv.dil_h * conv.input_h + tap.s * conv.dil_w * conv.input_w +
           tap.c * conv.input_c;
  };

  // What only a new tap changes: where it is in a window, and which chunks exist, a bit for each of
  // the thread's windows and then filters. Chunks beyond the sum's depth are zeros in A and in B,
  // so that nothing there, not even NaN, counts.
  const T* first_filter = weight + (k0 + row) * conv.weight_k;
  int64_t in_window = 0;
  unsigned exists = 0;
  const auto enter_tap = [&] {
    in_window = input_offset(tap);
    exists = 0;
    if (tap.r >= conv.R || (kDiagonal && channel + chunk * kElements >= conv.C)) return;
#pragma unroll
    for (int i = 0; i < kPixels; ++i) exists |= reaches(windows[i], tap) << i;
#pragma unroll
    for (int i = 0; i < kFilters; ++i) {
      exists |= (k0 + row + i * kRowsAtOnce < k_end) << (kPixels + i);
    }
  };
  if constexpr (kTile.loads != Loads::kElements) {
    enter_tap();
    first_filter += offset;
  }

  // Loads one tap of a block diagonal: a chunk of channels by one filter for each thread, of which
  // only a piece is the filter's where groups are narrow.
  const auto load_diagonal = [&](char* stage) {
    const int filter = threadIdx.x / kFilterChunks, part = threadIdx.x % kFilterChunks;
    const int group = filter % Tile::kDiagonalBlock / conv.group_c;
    const T* source =
        weight + (k0 + filter) * conv.weight_k + tap.r * conv.weight_r + tap.s * conv.weight_s;
    T* target = reinterpret_cast<T*>(stage + swizzled<kFilterChunks>(filter, part));
    const auto copy_pieces = [&]<int kPiece>(std::integral_constant<int, kPiece>) {
#pragma unroll
      for (int e = 0; e < kElements; e += kPiece) {
        const int c = part * kElements + e;
        const bool exists = k0 + filter < k_end && c / conv.group_c == group;
        if constexpr (kPiece * sizeof(T) < 4) {
          target[e] = exists ? source[c % conv.group_c] : device::narrow<T>(0.f);
        } else {
          device::copy_async<kPiece * sizeof(T)>(target + e, source + c % conv.group_c, exists);
        }
      }
    };
    if (conv.group_c >= kElements) {
      copy_pieces(std::integral_constant<int, kElements>{});
    } else if (conv.group_c == 4) {
      copy_pieces(std::integral_constant<int, 4>{});
    } else if (conv.group_c == 2) {
      copy_pieces(std::integral_constant<int, 2>{});
    } else {
      copy_pieces(std::integral_constant<int, 1>{});
    }
  };

  // Loads the step that `tap` is at and goes on to the next.
  const int target = swizzled<kChunks>(row, chunk);
  constexpr int kNextTarget = kRowsAtOnce * kTile.depth_bytes;
  const auto load_step = [&](char* stage) {
    char* const a = stage + target;
    char* const b = stage + kTile.m * kTile.depth_bytes + target;
    if constexpr (kTile.loads == Loads::kElements) {
      Vector<T, kElements> x[kPixels], y[kFilters];
      const T zero = device::narrow<T>(0.f);
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        // The host sees to it that 32 bits hold these.
        const int in_window = static_cast<int>(input_offset(tap));
        const int in_filter =
            static_cast<int>(tap.r * conv.weight_r + tap.s * conv.weight_s + tap.c * conv.weight_c);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          const T* source = windows[i].origin + in_window;
          x[i].values[e] = reaches(windows[i], tap) ? *source : zero;
        }
#pragma unroll
        for (int i = 0; i < kFilters; ++i) {
          const T* source = first_filter + i * kRowsAtOnce * conv.weight_k + in_filter;
          y[i].values[e] = tap.r < conv.R && k0 + row + i * kRowsAtOnce < k_end ? *source : zero;
        }
        tap.next(channels, conv.S);
      }
      tap.advance(kDepth - kElements, channels, conv.S);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        device::store(reinterpret_cast<T*>(a + i * kNextTarget), x[i]);
      }
#pragma unroll
      for (int i = 0; i < kFilters; ++i) {
        device::store(reinterpret_cast<T*>(b + i * kNextTarget), y[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        device::copy_async_16(a + i * kNextTarget, windows[i].origin + in_window, exists >> i & 1);
      }
      if constexpr (kDiagonal) {
        load_diagonal(stage + kTile.m * kTile.depth_bytes);
      } else {
#pragma unroll
        for (int i = 0; i < kFilters; ++i) {
          device::copy_async_16(b + i * kNextTarget, first_filter + i * kRowsAtOnce * conv.weight_k,
                                exists >> (kPixels + i) & 1);
        }
        first_filter += kDepth;
      }
      in_window += kDepth;
      tap.c += kDepth;
      if (tap.c >= channels) {
        tap.advance(0, channels, conv.S);
        enter_tap();
      }
    }
  };

  // Loads the part of the residual that goes into one stage.
  const auto load_residual = [&](int piece) {
    const T* const residual = static_cast<const T*>(conv.residual);
    const int end = min(kTile.m, (piece + 1) * kPieceRows) * kOutChunks;
    for (int i = piece * kPieceRows * kOutChunks + threadIdx.x; i < end; i += kThreads) {
      const int m = m0 + i / kOutChunks, k = k0 + i % kOutChunks * kElements;
      const T* source = residual + static_cast<int64_t>(m) * conv.K + k;
      T* target = reinterpret_cast<T*>(
          ring + swizzled<kOutChunks, kOutStep>(i / kOutChunks, i % kOutChunks));
      if (conv.vector_output) {
        device::copy_async_16(target, source, m < conv.M && k < k_end);
      } else {
#pragma unroll 1
        for (int e = 0; e < kElements; ++e) {
          target[e] = m < conv.M && k + e < k_end ? source[e] : device::narrow<T>(0.f);
        }
      }
    }
  };

  // What follows the steps of the sum in the ring are the pieces of the residual, which of blocks
  // that share a sum only the last one needs.
  int load_stage = first_stage;
  const auto load = [&](int step) {
    if (step < steps) {
      load_step(ring + load_stage * kStageBytes);
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    } else if (conv.residual != nullptr && gridDim.z == 1) {
      load_residual(step - steps);
    }
    device::commit_copies();
  };

#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) load(step);

  for (int i = threadIdx.x; i < kTile.n; i += kThreads) {
    const int k = k0 + i;
    const bool exists = k < k_end;
    const float deviation = exists ? sqrtf(read(conv.running_var, k, 1.f) + conv.eps) : 1.f;
    scale[i] = exists ? read(conv.bn_weight, k, 1.f) / deviation : 0.f;
    shift[i] = exists ? read(conv.bn_bias, k, 0.f) +
                            (read(conv.bias, k, 0.f) - read(conv.running_mean, k, 0.f)) * scale[i]
                      : 0.f;
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_m = warp / kTile.warps_n, warp_n = warp % kTile.warps_n;
  float sums[kTilesM][kTilesN][4] = {};

  int stage = first_stage;
  for (int step = 0; step < steps; ++step) {
    device::wait_for_copies<kStages - 2>();
    __syncthreads();  // this step is there for all, and all are done with the one before
    const char* const a = ring + stage * kStageBytes;
    multiply<T, kIndex>(sums, a, a + kTile.m * kTile.depth_bytes, warp_m, warp_n, lane,
                        [&] { load(step + kStages - 1); });
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // The last of the blocks that share a sum adds their parts, in their order and not that of their
  // coming, and goes on alone.
  if (gridDim.z > 1) {
    constexpr int kSums = kTilesM * kTilesN, kPart = kTile.m * kTile.n;
    const int64_t tile = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    float* const first_part = conv.partials + tile * gridDim.z * kPart + threadIdx.x * 4;
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      float (&sum)[4] = sums[i / kTilesN][i % kTilesN];
      device::store(first_part + blockIdx.z * kPart + i * kThreads * 4,
                    Vector<float, 4>{sum[0], sum[1], sum[2], sum[3]});
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[e] = 0;
    }
    __syncthreads();  // the parts of all threads come before the ticket
    bool is_last = false;
    if (threadIdx.x == 0) {
      // What the barrier has gathered is seen by whoever sees the ticket, and what came before the
      // others' tickets by all threads behind the next barrier: one fence does for a block.
      __threadfence();
      is_last = atomicAdd(conv.tickets + tile, 1) == static_cast<int>(gridDim.z) - 1;
      __threadfence();
    }
    if (!__syncthreads_or(is_last)) return;
    if (conv.residual != nullptr) {
#pragma unroll 1
      for (int piece = 0; piece < kStages - 1; ++piece) load_residual(piece);
    }
    const float* part = first_part;
#pragma unroll 1
    for (int z = 0; z < static_cast<int>(gridDim.z); ++z, part += kPart) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        float (&sum)[4] = sums[i / kTilesN][i % kTilesN];
        const auto other = device::load<float, 4>(part + i * kThreads * 4);
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[e] += other.values[e];
      }
    }
  }

  if (conv.narrow.values != nullptr) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kTile.m * kOutChunks; i += kThreads) {
      const int m = m0 + i / kOutChunks, k = k0 + i % kOutChunks * kElements;
      const T* pixel = pixel_of<T>(conv.narrow, m);
      T* target = reinterpret_cast<T*>(
          ring + swizzled<kOutChunks, kOutStep>(i / kOutChunks, i % kOutChunks));
      for_width<kElements>(conv.narrow, [&](auto width) {
        constexpr int kWidth = width;
#pragma unroll
        for (int e = 0; e < kElements; e += kWidth) {
          const bool exists = m < conv.M && has_channel(conv.narrow, k + e);
          const T* source = pixel + channel_offset<kWidth>(conv.narrow, k + e);
          if constexpr (kWidth * sizeof(T) < 4) {
            target[e] = exists ? *source : device::narrow<T>(0.f);
          } else {
            device::copy_async<kWidth * sizeof(T)>(target + e, source, exists);
          }
        }
      });
    }
  }

  // The output takes the residual's place. Without a residual nothing is waited for: the last
  // stage, which others may still be reading, is not touched.
  const bool has_residual = conv.residual != nullptr || conv.narrow.values != nullptr;
  if (has_residual) {
    device::commit_copies();
    device::wait_for_copies<0>();
    __syncthreads();
  }
  // The j-th column of the warp's tiles, whose sums are at `at`. Where all activations are plain
  // they take two neighbouring outputs at a time, else all that the thread has of the column.
  constexpr int kPairs = kActivations == Activations::kPlain ? 1 : kTilesM * 2;
  const auto finish_column = [&](int j, int at, const auto& activation) {
    const int column = (warp_n * kTilesN + j) * 8 + lane % 4 * 2;
    const auto factors = device::load<float, 2>(scale + column);
    const auto terms = device::load<float, 2>(shift + column);
#pragma unroll
    for (int first = 0; first < kTilesM * 2; first += kPairs) {
      T* places[kPairs];
      float y[kPairs * 2];
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const int i = first + pair, out_row = (warp_m * kTilesM * 2 + i) * 8 + lane / 4;
        places[pair] = reinterpret_cast<T*>(
                           ring + swizzled<kOutChunks, kOutStep>(out_row, column / kElements)) +
                       column % kElements;
        Vector<T, 2> values;
        if (has_residual) values = device::load<T, 2>(places[pair]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& sum = y[pair * 2 + e];
          sum = sums[i / 2][at][i % 2 * 2 + e] * factors.values[e] + terms.values[e];
          if (has_residual) sum += device::widen(values.values[e]);
        }
      }
      activation(y);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        device::store(places[pair], Vector<T, 2>{device::narrow<T>(y[pair * 2]),
                                                 device::narrow<T>(y[pair * 2 + 1])});
      }
    }
  };
  if (kActivations == Activations::kPlain ||
      (kActivations == Activations::kAll && is_plain(conv.activation))) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      finish_column(j, j, [&](auto& values) {
#pragma unroll
        for (float& y : values) y = device::at_least(conv.floor, y);
      });
    }
  } else {
#pragma unroll 1
    for (int j = 0; j < kTilesN; ++j) {
      finish_column(j, 0, [&](auto& values) { activate(conv.activation, values); });
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) rotate<4, kTilesN * 4>(sums[i][0]);
    }
  }
  __syncthreads();

  T* const output = static_cast<T*>(conv.output);
  for (int i = threadIdx.x; i < kTile.m * kOutChunks; i += kThreads) {
    const int m = m0 + i / kOutChunks, k = k0 + i % kOutChunks * kElements;
    if (m >= conv.M || k >= k_end) continue;
    T* source =
        reinterpret_cast<T*>(ring + swizzled<kOutChunks, kOutStep>(i / kOutChunks, i % kOutChunks));
    const int64_t target = static_cast<int64_t>(m) * conv.K + k;
    auto values = device::load<T, kElements>(source);
    if constexpr (kDiagonal) {
      // An infinity or NaN of one group times a zero off the diagonal is a NaN in another.
      bool any_nan = false;
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        const float y = device::widen(values.values[e]);
        any_nan = any_nan || y != y;
      }
      if (any_nan) {
#pragma unroll 1
        for (int e = 0; e < kElements && k + e < k_end; ++e) {
          const float old = device::widen(source[e]);
          if (old == old) continue;
          float y[] = {sum_alone<T>(conv, m, k + e) * scale[k + e - k0] + shift[k + e - k0]};
          if (conv.residual != nullptr) {
            y[0] += device::widen(static_cast<const T*>(conv.residual)[target + e]);
          }
          if (conv.narrow.values != nullptr && has_channel(conv.narrow, k + e)) {
            y[0] +=
                device::widen(pixel_of<T>(conv.narrow, m)[channel_offset<1>(conv.narrow, k + e)]);
          }
          if constexpr (kActivations == Activations::kPlain) {
            y[0] = device::at_least(conv.floor, y[0]);
          } else {
            activate(conv.activation, y);
          }
          source[e] = device::narrow<T>(y[0]);
        }
        values = device::load<T, kElements>(source);
      }
    }
    if (conv.vector_output) {
      device::store(output + target, values);
    } else {
#pragma unroll 1
      for (int e = 0; e < kElements && k + e < k_end; ++e) output[target + e] = source[e];
    }
  }
}

// The launch of every instance for T, picked by its index.
template <typename T>
void launch_conv_bn_act(const Conv& conv, int tile, int split, cudaStream_t stream) {
  const auto launch = [&](auto index) {
    constexpr Tile kTile = kTiles[index];
    if constexpr (sizeof(T) == kTile.element_bytes()) {
      const bool diagonal = kTile.loads == Loads::kDiagonal;
      const unsigned rows = (conv.M + kTile.m - 1) / kTile.m;
      const unsigned columns = diagonal ? 1 : (conv.group_k + kTile.n - 1) / kTile.n;
      const unsigned slabs = diagonal ? (conv.K + kTile.n - 1) / kTile.n : conv.K / conv.group_k;
      const device::Grid grid{dim3(rows * columns, slabs, split), kTile.threads(),
                              kTile.shared_bytes(), stream};
      if constexpr (!kTile.has_two_instances()) {
        device::launch(conv_bn_act<T, index, Activations::kAll>, grid, conv);
      } else if (is_plain(conv.activation)) {
        device::launch(conv_bn_act<T, index, Activations::kPlain>, grid, conv);
      } else {
        device::launch(conv_bn_act<T, index, Activations::kOther>, grid, conv);
      }
    }
  };
  const auto launch_at = [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    ((kIndices == tile ? launch(std::integral_constant<int, kIndices>{}) : void()), ...);
  };
  launch_at(std::make_integer_sequence<int, kTileCount>{});
}

}  // namespace fused_resnet
