// A Bottleneck from its second convolution to the next one's first, in one pass, for Hopper: one
// group, `width` channels (64, 128 or 256) into as many, and 16 bits.
//
//   hidden = relu(norm(conv(input)))                     of a window, 3 x 3 mostly
//   output = relu(norm(hidden expand^T) + shortcut)      1 x 1
//   next   = relu(norm(output reduce^T))                 1 x 1, where there is a next block
//
// with norm(x)[k] = scale[k] x[k] + shift[k] as hopper_conv.cuh has them. What is stored, and what
// is multiplied, is rounded to 16 bits each time, as layer by layer it would be; sums are float32.
//
// Reads the shortcut and writes output and next once; reads the input once from memory and once for
// every tap from the L2 cache, and all filters once for every 128 pixels, or 256 in clusters of
// two, from there. What lies between the convolutions stays in shared memory; output is read by
// nobody.
//
// Blocks stay and take tile after tile of 128 pixels. One thread loads, two warpgroups have 64
// pixels each:
//
//   loader     for each tile: for each step of the window, 128 windows of one tap and its filters;
//              for each slice of the output, the filters of expand and those of reduce
//   consumer   for each of its tiles: the window's products; scale, shift, ReLU, one rounding, to
//              `hidden`. For each slice: hidden times expand; scale, shift, the shortcut that came
//              into the output's place meanwhile, ReLU, one rounding, in that place, from where TMA
//              stores it; and from there too, its products with reduce are added to next's sums.
//              Then next in slices, through the same places.
//
// A consumer reads its own rows alone, so nobody waits for the other: one multiplies while the
// other rounds. A slice has one of two buffers, so that the shortcut of the next comes during this
// one.
//
// Stages, rows of 128 bytes and how they are permuted are those of hopper_conv.cuh.
#pragma once

#include <bit>
#include <utility>

#include "cuda/device/cluster.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/device/warpgroup.cuh"
#include "cuda/hopper/bottleneck_tiles.h"
#include "cuda/hopper/hopper_bottleneck.h"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/parameter.cuh"

namespace fused_resnet {

// The scale and shift of `channels`, and zeros up to `padded`, by all threads of the block.
__device__ __forceinline__ void fold_norm(const BottleneckNorm& norm, int channels, int padded,
                                          float* scale, float* shift) {
  for (int k = threadIdx.x; k < padded; k += BottleneckTile::kThreads) {
    const bool exists = k < channels;
    const float deviation = exists ? sqrtf(read(norm.running_var, k, 1.f) + norm.eps) : 1.f;
    scale[k] = exists ? read(norm.bn_weight, k, 1.f) / deviation : 0.f;
    shift[k] = exists ? read(norm.bn_bias, k, 0.f) +
                            (read(norm.bias, k, 0.f) - read(norm.running_mean, k, 0.f)) * scale[k]
                      : 0.f;
  }
}

// relu(scale sums + shift), where kAdds of that plus what lies there already: a warp's 16 rows and
// kColumns columns, in slabs of 64.
template <typename T, int kColumns, bool kAdds>
__device__ __forceinline__ void write_rows(char* rows, int slab_bytes, const float* sums,
                                           const float* scale, const float* shift) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int round = 0; round < kColumns / 16; ++round) {
    // A lane's part in ldmatrix and stmatrix: a row, and the first or second chunk of two.
    const int chunk = round % 4 * 2 + lane / 16;
    char* const at = rows + round / 4 * slab_bytes + lane % 16 * BottleneckTile::kRowBytes +
                     (chunk ^ lane % 8) * 16;
    uint32_t values[4] = {};
    if constexpr (kAdds) device::load_matrix_x4(values, at);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = (round * 2 + i / 2) * 8 + lane % 4 * 2;
      float y[2];
      add_norm(y, sums + round * 8 + i * 2, scale + column, shift + column,
               std::bit_cast<device::Vector<T, 2>>(values[i]), kAdds);
      values[i] = std::bit_cast<uint32_t>(
          device::Vector<T, 2>{device::narrow<T>(device::at_least(0.f, y[0])),
                               device::narrow<T>(device::at_least(0.f, y[1]))});
    }
    device::store_matrix_x4(at, values);
  }
}

// Grid: clusters, each of which takes every gridDim.x / cluster-th group of as many tiles.
template <typename T, int kIndex>
__global__ void __launch_bounds__(BottleneckTile::kThreads, 1)
    hopper_bottleneck(const __grid_constant__ HopperBottleneck block) {
#if FUSED_RESNET_HAS_WARPGROUPS
  static constexpr BottleneckTile kTile = kBottleneckTiles[kIndex];
  constexpr int kM = BottleneckTile::kM, kRows = BottleneckTile::kRows;
  constexpr int kRowBytes = BottleneckTile::kRowBytes;
  constexpr int kRowElements = BottleneckTile::kRowElements;
  constexpr int kWidth = kTile.width, kNext = kTile.next, kSlice = kTile.slice;
  constexpr int kStages = kTile.stages, kCluster = kTile.cluster;
  constexpr int kConsumers = BottleneckTile::kConsumers, kBuffers = BottleneckTile::kBuffers;
  constexpr int kReaders = kConsumers * 4 * kCluster;  // warps, of a stage
  constexpr int kSlabBytes = kRows * kRowBytes;        // of a buffer
  constexpr int kPiece = kNext < kSlice ? kNext : kSlice;
  static_assert(sizeof(T) == 2);
  static_assert(kWidth % kRowElements == 0 && kSlice % kRowElements == 0 && kNext % kPiece == 0);
  static_assert(kTile.shared_bytes(BottleneckTile::kMostOutputs) <= 227 << 10);

  char* const ring = device::aligned<1024>(device::shared_memory());
  char* const hidden = ring + kStages * kTile.stage_bytes();
  char* const buffers = hidden + kTile.hidden_bytes();
  auto* const full =
      reinterpret_cast<device::Mbarrier*>(buffers + kConsumers * kBuffers * kTile.buffer_bytes());
  device::Mbarrier* const empty = full + kStages;
  device::Mbarrier* const ready = empty + kStages;
  float* const scale = reinterpret_cast<float*>(ready + kConsumers * kBuffers);
  float* const shift = scale + kTile.channels(block.K);

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      device::initialize(full + i, 1);
      device::initialize(empty + i, kReaders);
    }
    for (int i = 0; i < kConsumers * kBuffers; ++i) device::initialize(ready + i, 1);
    device::publish_mbarriers();
  }
  const bool has_next = block.next_width > 0;
  const int next_at = kWidth + block.K;  // of scale and shift
  fold_norm(block.norm, kWidth, kWidth, scale, shift);
  fold_norm(block.expand_norm, block.K, block.K, scale + kWidth, shift + kWidth);
  if (has_next) {
    fold_norm(block.reduce_norm, block.next_width, kNext, scale + next_at, shift + next_at);
  }
  __syncthreads();
  unsigned rank = 0;
  if constexpr (kCluster > 1) {
    rank = device::rank_in_cluster();
    device::synchronize_cluster();
  }

  const int first = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  const int tiles = (block.M + kM * kCluster - 1) / (kM * kCluster);
  const int taps = block.R * block.S;
  constexpr int kDepths = kWidth / kRowElements;
  const auto first_pixel = [&](int tile) {
    return (tile * kCluster + static_cast<int>(rank)) * kM;
  };

  // From one lane, so that the compiler sees that it is the warp's.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp < 4) {
    device::give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) {
      device::prefetch(block.input);
      device::prefetch(block.weight);
      device::prefetch(block.expand);
      RingPlace<kStages> place;
      // The next stage, once it is empty, for so many bytes.
      const auto begin = [&](int bytes) {
        device::wait(empty + place.stage, place.parity ^ 1);
        device::arrive_and_expect(full + place.stage, bytes);
        return ring + place.stage * kTile.stage_bytes();
      };
      // The rest of a stage: 128 bytes of one tap of `filters` from the first one on.
      const auto load_filters = [&](const device::TensorMap& map, char* target, int filters,
                                    int depth, int tap, int first_filter) {
        if constexpr (kCluster == 1) {
          device::load_tile(map, target, full + place.stage, {depth, tap, first_filter});
        } else {
          const int part = static_cast<int>(rank) * (filters / kCluster);
          device::load_tile_to_blocks(map, target + part * kRowBytes, full + place.stage,
                                      (1 << kCluster) - 1, {depth, tap, first_filter + part});
        }
        place.advance();
      };
      for (int tile = first; tile < tiles; tile += clusters) {
        const int row = first_pixel(tile) / block.Q, image = row / block.P;
        const int w = (first_pixel(tile) - row * block.Q) * block.stride_w - block.pad_w;
        const int h = (row - image * block.P) * block.stride_h - block.pad_h;
        for (int r = 0; r < block.R; ++r) {
          for (int s = 0; s < block.S; ++s) {
            for (int c = 0; c < kWidth; c += kRowElements) {
              char* const pixels = begin(kTile.pixel_bytes() + kWidth * kRowBytes);
              device::load_pixels(block.input, pixels, full + place.stage, {c, w, h, image},
                                  {s * block.dil_w, r * block.dil_h});
              load_filters(block.weight, pixels + kTile.pixel_bytes(), kWidth, c, r * block.S + s,
                           0);
            }
          }
        }
        for (int k0 = 0; k0 < block.K; k0 += kSlice) {
          for (int c = 0; c < kWidth; c += kRowElements) {
            load_filters(block.expand, begin(kSlice * kRowBytes), kSlice, c, 0, k0);
          }
          for (int c = 0; has_next && c < kSlice; c += kRowElements) {
            load_filters(block.reduce, begin(kNext * kRowBytes), kNext, k0 + c, 0, 0);
          }
        }
      }
    }
  } else {
    device::take_registers<kConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    const bool is_first = threadIdx.x % 128 == 0;
    const int own_rows = warp % 4 * 16 * kRowBytes;
    char* const own_hidden = hidden + consumer * kSlabBytes;
    char* const own_buffers = buffers + consumer * kBuffers * kTile.buffer_bytes();
    device::Mbarrier* const own_ready = ready + consumer * kBuffers;
    const int slices = block.K / kSlice;
    const int pieces = slices + (has_next ? kNext / kPiece : 0);
    RingPlace<kStages> place;
    RingPlace<kBuffers> buffer;

    // By the first thread: makes a buffer ready for a piece of a tile, once what it held before has
    // been stored, and lets the shortcut come there.
    const auto prepare = [&](int tile, int piece) {
      device::wait_until_stores_have_read<kBuffers - 1>();
      const bool adds = piece < slices;
      device::arrive_and_expect(own_ready + buffer.stage, adds ? kTile.buffer_bytes() : 0);
      for (int slab = 0; adds && slab < kSlice / kRowElements; ++slab) {
        device::load_tile(
            block.shortcut, own_buffers + buffer.stage * kTile.buffer_bytes() + slab * kSlabBytes,
            own_ready + buffer.stage,
            {piece * kSlice + slab * kRowElements, first_pixel(tile) + consumer * kRows});
      }
    };
    const auto release = [&](int stage) {
      if constexpr (kCluster == 1) {
        if (lane == 0) device::arrive(empty + stage);
      } else {
        if (lane < kCluster) device::arrive_in_block(empty + stage, lane);
      }
    };
    // Adds the products of the next `steps` stages to sums. The pixels are in the stage, or where
    // `rows` lie, slab after slab. Sums begin as zeros, not by a product that takes their place:
    // what a product may read would be kept in registers from tile to tile.
    const auto multiply = [&](auto& sums, int steps, const char* rows, int slab_bytes) {
      constexpr int kN = sizeof(sums) / sizeof(float) * 2;
      int last_stage = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        device::wait(full + place.stage, place.parity);
        const char* const stage = ring + place.stage * kTile.stage_bytes();
        const uint64_t pixels = device::rows_of_128_bytes(rows ? rows + step * slab_bytes
                                                               : stage + consumer * kSlabBytes);
        const uint64_t filters =
            device::rows_of_128_bytes(rows ? stage : stage + kTile.pixel_bytes());
        device::fence_sums();
#pragma unroll
        for (int depth = 0; depth < kRowBytes; depth += 32) {
          device::multiply_warpgroup<T, kN>(sums, device::advanced(pixels, depth),
                                            device::advanced(filters, depth), true);
        }
        device::commit_products();
        device::wait_for_products<1>();
        if (step > 0) release(last_stage);
        last_stage = place.stage;
        place.advance();
      }
      device::wait_for_products<0>();
      release(last_stage);
    };

    if (is_first) prepare(first, 0);  // there are no more clusters than tiles
    for (int tile = first; tile < tiles; tile += clusters) {
      {
        float sums[kWidth / 2] = {};
        multiply(sums, taps * kDepths, nullptr, 0);
        write_rows<T, kWidth, false>(own_hidden + own_rows, kM * kRowBytes, sums, scale, shift);
        device::fence_for_copies();
        device::synchronize_threads<128>(1 + consumer);
      }

      int piece = 0;
      // Stores what all threads have written to the buffer, and prepares the next one.
      const auto store = [&](const device::TensorMap& map, int columns, int column) {
        device::fence_for_copies();
        device::synchronize_threads<128>(1 + consumer);
        const char* const values = own_buffers + buffer.stage * kTile.buffer_bytes();
        buffer.advance();
        ++piece;
        if (is_first) {
          for (int slab = 0; slab < columns / kRowElements; ++slab) {
            device::store_tile(
                map, values + slab * kSlabBytes,
                {column + slab * kRowElements, first_pixel(tile) + consumer * kRows});
          }
          device::commit_stores();
          if (piece < pieces) {
            prepare(tile, piece);
          } else if (tile + clusters < tiles) {
            prepare(tile + clusters, 0);
          }
        }
        return values;
      };

      float next_sums[kNext / 2] = {};
#pragma unroll 1
      for (int k0 = 0; k0 < block.K; k0 += kSlice) {
        float sums[kSlice / 2] = {};
        multiply(sums, kDepths, own_hidden, kM * kRowBytes);
        device::wait(own_ready + buffer.stage, buffer.parity);
        write_rows<T, kSlice, true>(own_buffers + buffer.stage * kTile.buffer_bytes() + own_rows,
                                    kSlabBytes, sums, scale + kWidth + k0, shift + kWidth + k0);
        const char* const values = store(block.output, kSlice, k0);
        if (has_next) multiply(next_sums, kSlice / kRowElements, values, kSlabBytes);
      }
      if (has_next) {
#pragma unroll
        for (int k0 = 0; k0 < kNext; k0 += kPiece) {
          device::wait(own_ready + buffer.stage, buffer.parity);
          write_rows<T, kPiece, false>(own_buffers + buffer.stage * kTile.buffer_bytes() + own_rows,
                                       kSlabBytes, next_sums + k0 / 2, scale + next_at + k0,
                                       shift + next_at + k0);
          store(block.next, kPiece, k0);
        }
      }
    }
    if (is_first) device::wait_until_stores_have_read<0>();
  }
  if constexpr (kCluster > 1) {
    // Another block may still write here, and arrive at this one's barriers.
    __syncwarp();
    device::leave_cluster();
  }
#endif
}

template <typename T>
void launch_hopper_bottleneck(const HopperBottleneck& block, int tile, int multiprocessors,
                              cudaStream_t stream) {
  const auto launch = [&](auto index) {
    constexpr BottleneckTile kTile = kBottleneckTiles[index];
    constexpr int kPixels = BottleneckTile::kM * kTile.cluster;
    const int tiles = (block.M + kPixels - 1) / kPixels;
    const int clusters = std::min(tiles, std::max(1, multiprocessors / kTile.cluster));
    const device::Grid grid{dim3(clusters * kTile.cluster), BottleneckTile::kThreads,
                            static_cast<size_t>(kTile.shared_bytes(block.K)), stream,
                            static_cast<unsigned>(kTile.cluster)};
    device::launch(hopper_bottleneck<T, index>, grid, block);
  };
  const auto launch_at = [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    ((kIndices == tile ? launch(std::integral_constant<int, kIndices>{}) : void()), ...);
  };
  launch_at(std::make_integer_sequence<int, kBottleneckTileCount>{});
}

}  // namespace fused_resnet
