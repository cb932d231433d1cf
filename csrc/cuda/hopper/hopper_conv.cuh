// Convolution with batch norm, residual and activation in one pass, as conv_bn_act.cuh has it, for
// Hopper: one group, and channels and filters in multiples of 16 bytes.
//
//   output[n, p, q, k] = act(scale[k] sum[n, p, q, k] + shift[k] + residual[n, p, q, k])
//   sum[n, p, q, k] = sum over r, s, c of
//       input[n, p stride_h + r dil_h - pad_h, q stride_w + s dil_w - pad_w, c] weight[k, r, s, c]
//   scale = bn_weight / sqrt(running_var + eps),  shift = bn_bias + (bias - running_mean) scale
//
// Elements of 16 bits, or float32 whose products are of tf32: TMA rounds these operands on their
// way, by their maps (device::TensorElement::kTf32), since a product would cut them off.
//
// Reads weight and residual and writes the output once; reads the input once from memory and once
// for every tap and column of tiles from the L2 cache. Clusters of two read filters once for both.
//
// Blocks stay and take tile after tile. One thread loads, two warpgroups multiply:
//
//   loader     for each tile, for each step of its sum: wait until a stage is empty; TMA, 128
//              windows of one tap (im2col) and n filters, 128 bytes of each
//   consumer   for each of its tiles: let the residual come into the output's place; for each step:
//              wait until the stage is full; wgmma; give back the stage before. Then scale, shift,
//              residual, activation, one rounding, in that place; TMA stores it.
//
// The loader runs ahead into the next tile, as far as the ring of stages goes, so only a consumer's
// own work between two tiles is seen, and none where consumers take turns (Schedule). A stage is
// full when its bytes are there, and empty when each warp that reads it has waited for its
// products, in both blocks of a cluster where both are written to.
//
// An mbarrier tells the phase that is waited for from the one before, no more. So a consumer that
// takes turns begins a tile when the other has seen the stages of the tile before filled: else the
// phase it would find ended might be two before its own. That also keeps one consumer's products
// out of the other's way.
//
// Rows are 128 bytes everywhere in shared memory, permuted as TMA and wgmma permute them: chunk c
// of 16 bytes of row r lies at chunk c ^ r % 8.
#pragma once

#include <bit>
#include <limits>
#include <utility>

#include "cuda/activation.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/device/warpgroup.cuh"
#include "cuda/hopper/hopper_conv.h"
#include "cuda/hopper/pipeline.cuh"
#include "cuda/hopper/tiles.h"
#include "cuda/parameter.cuh"

namespace fused_resnet {

// Grid: clusters, each of which takes every gridDim.x / cluster-th group of as many tiles; those of
// the same pixels are consecutive.
template <typename T, int kIndex, Activations kActivations>
__global__ void __launch_bounds__(HopperTile::kThreads, 1)
    hopper_conv_bn_act(const __grid_constant__ HopperConv conv) {
#if FUSED_RESNET_HAS_WARPGROUPS
  static constexpr HopperTile kTile = kHopperTiles[kIndex];
  constexpr int kM = HopperTile::kM, kN = kTile.n;
  constexpr int kRowElements = kTile.row_elements();  // channels of a step, columns of a slab
  constexpr int kStages = kTile.stages, kCluster = kTile.cluster;
  constexpr int kRowBytes = HopperTile::kRowBytes;
  constexpr bool kTakeTurns = kTile.schedule == Schedule::kTakeTurns;
  constexpr int kRows = kTile.rows_of_consumer();
  constexpr int kSlabBytes = kRows * kRowBytes;  // of a consumer's outputs
  constexpr int kParts = kRows / 64;             // products side by side
  constexpr int kReaders = (kTakeTurns ? 1 : HopperTile::kConsumers) * 4 * kCluster;  // warps
  static_assert(sizeof(T) == kTile.element_bytes);
  static_assert(kN % (64 * kCluster) == 0 && kParts * kN <= 256);

  char* const ring = device::aligned<1024>(device::shared_memory());
  char* const outputs = ring + kStages * kTile.stage_bytes();
  auto* const full =
      reinterpret_cast<device::Mbarrier*>(outputs + HopperTile::kConsumers * kTile.output_bytes());
  device::Mbarrier* const empty = full + kStages;
  device::Mbarrier* const output_free = empty + kStages;
  device::Mbarrier* const turn = output_free + HopperTile::kConsumers;
  const int columns = kTile.columns(conv.K);
  float* const scale = reinterpret_cast<float*>(turn + HopperTile::kConsumers);
  float* const shift = scale + columns * kN;

  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      device::initialize(full + i, 1);
      device::initialize(empty + i, kReaders);
    }
    for (int i = 0; i < HopperTile::kConsumers; ++i) {
      device::initialize(output_free + i, 1);
      device::initialize(turn + i, 4);  // warps of the other consumer
    }
    device::publish_mbarriers();
  }
  for (int k = threadIdx.x; k < columns * kN; k += HopperTile::kThreads) {
    const bool exists = k < conv.K;
    const float deviation = exists ? sqrtf(read(conv.running_var, k, 1.f) + conv.eps) : 1.f;
    scale[k] = exists ? read(conv.bn_weight, k, 1.f) / deviation : 0.f;
    shift[k] = exists ? read(conv.bn_bias, k, 0.f) +
                            (read(conv.bias, k, 0.f) - read(conv.running_mean, k, 0.f)) * scale[k]
                      : 0.f;
  }
  __syncthreads();
  unsigned rank = 0;
  if constexpr (kCluster > 1) {
    rank = device::rank_in_cluster();
    device::synchronize_cluster();
  }

  const int first = blockIdx.x / kCluster, clusters = gridDim.x / kCluster;
  const int rows = (conv.M + kM * kCluster - 1) / (kM * kCluster);
  const int tiles = rows * columns;
  const int depths = (conv.C + kRowElements - 1) / kRowElements;
  const int steps = conv.R * conv.S * depths;
  const auto first_pixel = [&](int tile) { return (tile / columns * kCluster + rank) * kM; };
  const auto first_filter = [&](int tile) { return tile % columns * kN; };

  // From one lane, so that the compiler sees that it is the warp's.
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (warp < 4) {
    device::give_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) {
      device::prefetch(conv.input);
      device::prefetch(conv.weight);
      RingPlace<kStages> place;
      for (int tile = first; tile < tiles; tile += clusters) {
        const int row = first_pixel(tile) / conv.Q, image = row / conv.P;
        const int w = (first_pixel(tile) - row * conv.Q) * conv.stride_w - conv.pad_w;
        const int h = (row - image * conv.P) * conv.stride_h - conv.pad_h;
        for (int r = 0; r < conv.R; ++r) {
          for (int s = 0; s < conv.S; ++s) {
            for (int c = 0; c < conv.C; c += kRowElements) {
              char* const pixels = ring + place.stage * kTile.stage_bytes();
              char* const filters = pixels + kTile.pixel_bytes();
              device::Mbarrier* const barrier = full + place.stage;
              device::wait(empty + place.stage, place.parity ^ 1);
              device::arrive_and_expect(barrier, kTile.stage_bytes());
              device::load_pixels(conv.input, pixels, barrier, {c, w, h, image},
                                  {s * conv.dil_w, r * conv.dil_h});
              if constexpr (kCluster == 1) {
                device::load_tile(conv.weight, filters, barrier,
                                  {c, r * conv.S + s, first_filter(tile)});
              } else {
                constexpr int kShare = kN / kCluster;
                const int part = static_cast<int>(rank) * kShare;
                device::load_tile_to_blocks(conv.weight, filters + part * kRowBytes, barrier,
                                            (1 << kCluster) - 1,
                                            {c, r * conv.S + s, first_filter(tile) + part});
              }
              place.advance();
            }
          }
        }
      }
    }
  } else {
    device::take_registers<kConsumerRegisters>();
    const int consumer = warp / 4 - 1;
    const bool is_first = threadIdx.x % 128 == 0;
    const int first_row = kTakeTurns ? 0 : consumer * kRows;  // of the tile
    char* const own_outputs = outputs + consumer * kTile.output_bytes();
    char* const own_rows = own_outputs + warp % 4 * 16 * kRowBytes;  // 16 of each 64
    RingPlace<kStages> place;
    unsigned tile_parity = 0;  // of this consumer's tiles so far
    if (kTakeTurns && consumer == 1) place.advance(steps);

    for (int tile = first + (kTakeTurns ? consumer * clusters : 0); tile < tiles;
         tile += (kTakeTurns ? HopperTile::kConsumers : 1) * clusters) {
      const int m0 = first_pixel(tile) + first_row, k0 = first_filter(tile);
      const int slabs = min(kN, conv.K - k0 + kRowElements - 1) / kRowElements;
      if (is_first) {
        device::wait_until_stores_have_read<0>();
        device::arrive_and_expect(output_free + consumer,
                                  conv.has_residual ? slabs * kSlabBytes : 0);
        for (int slab = 0; conv.has_residual && slab < slabs; ++slab) {
          device::load_tile(conv.residual, own_outputs + slab * kSlabBytes, output_free + consumer,
                            {k0 + slab * kRowElements, m0});
        }
      }

      const auto release = [&](int stage) {
        if constexpr (kCluster == 1) {
          if (lane == 0) device::arrive(empty + stage);
        } else {
          if (lane < kCluster) device::arrive_in_block(empty + stage, lane);
        }
      };
      if constexpr (kTakeTurns) {
        // The first consumer's first turn comes by itself.
        device::wait(turn + consumer, consumer == 0 ? tile_parity ^ 1 : tile_parity);
      }
      float sums[kParts][kN / 2];
      int last_stage = 0;
      for (int step = 0; step < steps; ++step) {
        device::wait(full + place.stage, place.parity);
        const char* const stage = ring + place.stage * kTile.stage_bytes();
        const uint64_t pixels = device::rows_of_128_bytes(stage + first_row * kRowBytes);
        const uint64_t filters = device::rows_of_128_bytes(stage + kTile.pixel_bytes());
        device::fence_sums();
#pragma unroll
        for (int depth = 0; depth < kRowBytes; depth += 32) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            device::multiply_warpgroup<T, kN>(
                sums[part], device::advanced(pixels, part * 64 * kRowBytes + depth),
                device::advanced(filters, depth), step > 0 || depth > 0);
          }
        }
        device::commit_products();
        device::wait_for_products<1>();
        if (step > 0) release(last_stage);
        last_stage = place.stage;
        place.advance();
      }
      if constexpr (kTakeTurns) {
        if (lane == 0) device::arrive(turn + (consumer ^ 1));
        place.advance(steps);
      }
      device::wait_for_products<0>();
      release(last_stage);

      device::wait(output_free + consumer, tile_parity);
      tile_parity ^= 1;
      // A round is 64 rows of a slab by 32 bytes, in the products' fragments: rows lane / 4 and 8
      // further, columns lane % 4 * 2 and the next, of every 8. Plain activations take two
      // neighbours at a time, the others all of the thread's.
      constexpr int kRounds = kRowBytes / 32, kSums = 16 / sizeof(T);
      constexpr int kPairs = kActivations == Activations::kPlain ? 1 : kSums / 2;
      const auto narrowed = [](const float* y) {
        return device::Vector<T, 2>{device::narrow<T>(y[0]), device::narrow<T>(y[1])};
      };
      const auto finish = [&](int slab, int part, int round, const float* own_sums,
                              const auto& activation) {
        char* const rows = own_rows + slab * kSlabBytes + part * 64 * kRowBytes;
        const int k = k0 + slab * kRowElements + lane % 4 * 2;
        if constexpr (sizeof(T) == 2) {
          // A lane's part in ldmatrix and stmatrix: a row, and the first or second chunk of two.
          char* const at = rows + lane % 16 * kRowBytes + ((round * 2 + lane / 16) ^ lane % 8) * 16;
          uint32_t values[4] = {};
          if (conv.has_residual) device::load_matrix_x4(values, at);
#pragma unroll
          for (int first = 0; first < 4; first += kPairs) {
            float y[kPairs * 2];
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              const int i = first + pair, column = (round * 2 + i / 2) * 8;
              add_norm(y + pair * 2, own_sums + i * 2, scale + k + column, shift + k + column,
                       std::bit_cast<device::Vector<T, 2>>(values[i]), conv.has_residual);
            }
            activation(y);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              values[first + pair] = std::bit_cast<uint32_t>(narrowed(y + pair * 2));
            }
          }
          device::store_matrix_x4(at, values);
        } else {
#pragma unroll
          for (int first = 0; first < 2; first += kPairs) {
            T* places[kPairs];
            float y[kPairs * 2];
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              const int i = first + pair;
              const int row = lane / 4 + i * 8, chunk = round * 2 + lane % 4 / 2;
              places[pair] = reinterpret_cast<T*>(rows + row * kRowBytes + (chunk ^ row % 8) * 16) +
                             lane % 2 * 2;
              device::Vector<T, 2> residual{};
              if (conv.has_residual) residual = device::load<T, 2>(places[pair]);
              add_norm(y + pair * 2, own_sums + i * 2, scale + k + round * 8, shift + k + round * 8,
                       residual, conv.has_residual);
            }
            activation(y);
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair) {
              device::store(places[pair], narrowed(y + pair * 2));
            }
          }
        }
      };
      if constexpr (kActivations == Activations::kPlain) {
#pragma unroll
        for (int slab = 0; slab < kN / kRowElements; ++slab) {
          if (slab >= slabs) break;
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
#pragma unroll
            for (int round = 0; round < kRounds; ++round) {
              finish(slab, part, round, sums[part] + (slab * kRounds + round) * kSums,
                     [&](auto& values) {
#pragma unroll
                       for (float& y : values) y = device::at_least(conv.floor, y);
                     });
            }
          }
        }
      } else {
#pragma unroll 1
        for (int round = 0; round < slabs * kRounds; ++round) {
#pragma unroll
          for (int part = 0; part < kParts; ++part) {
            finish(round / kRounds, part, round % kRounds, sums[part],
                   [&](auto& values) { activate(conv.activation, values); });
            rotate<kSums, kN / 2>(sums[part]);
          }
        }
      }
      device::fence_for_copies();
      device::synchronize_threads<128>(1 + consumer);
      if (is_first) {
        for (int slab = 0; slab < slabs; ++slab) {
          device::store_tile(conv.output, own_outputs + slab * kSlabBytes,
                             {k0 + slab * kRowElements, m0});
        }
        device::commit_stores();
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
void launch_hopper_conv(const HopperConv& conv, int tile, int multiprocessors,
                        cudaStream_t stream) {
  const auto launch = [&](auto index) {
    constexpr HopperTile kTile = kHopperTiles[index];
    const int rows =
        (conv.M + HopperTile::kM * kTile.cluster - 1) / (HopperTile::kM * kTile.cluster);
    const int clusters =
        std::min(rows * kTile.columns(conv.K), std::max(1, multiprocessors / kTile.cluster));
    const device::Grid grid{dim3(clusters * kTile.cluster), HopperTile::kThreads,
                            static_cast<size_t>(kTile.shared_bytes(conv.K)), stream,
                            static_cast<unsigned>(kTile.cluster)};
    if (is_plain(conv.activation)) {
      device::launch(hopper_conv_bn_act<T, index, Activations::kPlain>, grid, conv);
    } else {
      device::launch(hopper_conv_bn_act<T, index, Activations::kOther>, grid, conv);
    }
  };
  const auto launch_if = [&](auto index) {
    if constexpr (kHopperTiles[index].element_bytes == sizeof(T)) {
      if (index == tile) launch(index);
    }
  };
  const auto launch_at = [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    (launch_if(std::integral_constant<int, kIndices>{}), ...);
  };
  launch_at(std::make_integer_sequence<int, kHopperTileCount>{});
}

}  // namespace fused_resnet
