// A residual BasicBlock whose shortcut is its input, of 64 channels, in one pass:
//
//   middle = relu(scale1 conv3x3(input, weight1) + shift1), rounded to the tensors' dtype
//   output = relu(scale2 conv3x3(middle, weight2) + shift2 + input)
//   scale = bn_weight / sqrt(running_var + eps),  shift = bn_bias + (bias - running_mean) scale
//
// Both convolutions have stride 1 and pad with one pixel of zeros.
//
// Reads the input once from memory, its border of two pixels around every tile more often from the
// L2 cache, and writes the output once; every block of threads reads the weights, 147 KB, from L2.
// The tensor between the convolutions never leaves the chip, but one pixel around every tile of it
// is computed by the neighbours too: docs/basic_block_chain.md has the arithmetic.
//
// Shared memory holds the tile of the input with a border of two, the tile of the middle with a
// border of one, and a ring of stages, each the weights of one tap. A pixel and a filter's tap are
// 64 channels, a row of 8 chunks of 16 bytes, permuted such that any 8 consecutive pixels have a
// column of chunks in 8 different groups of banks (`swizzled`). A tap moves the rows that a
// tensor-core instruction takes by whole pixels, so all nine read the same tile: nothing is copied
// between loading and multiplying.
//
// A warp has every kWarps-th row of pixels, 16 of them an instruction, and all channels: for 64 x
// 64 outputs it loads 8 times for 32 mma. Of the output's 16 columns the last two are beyond the
// tile and not stored. The output takes the residual's place in the input's tile and leaves in
// 16-byte stores.
#pragma once

#include <utility>

#include "cuda/basic_block.h"
#include "cuda/conv_bn_act.cuh"

namespace fused_resnet {

template <typename T, int kIndex>
__global__ void __launch_bounds__(kBasicBlockTiles[kIndex].threads(),
                                  kBasicBlockTiles[kIndex].resident)
    basic_block(const BasicBlock block) {
  static constexpr BasicBlockTile kTile = kBasicBlockTiles[kIndex];
  constexpr int kElements = 16 / sizeof(T);  // of a chunk
  constexpr int kChannels = kTile.kChannels;
  constexpr int kChunks = kTile.kPixelBytes / 16;
  constexpr int kThreads = kTile.threads();
  constexpr int kWarps = kTile.warps;
  constexpr int kStages = kTile.stages;
  constexpr int kTaps = 9, kSteps = 2 * kTaps;
  constexpr int kInputRows = kTile.rows + 4, kInputColumns = kTile.kColumns + 4;
  constexpr int kMiddleRows = kTile.rows + 2, kMiddleColumns = 16;
  constexpr int kTilesM = (kMiddleRows + kWarps - 1) / kWarps;  // of 16 x 8 outputs, in a warp
  constexpr int kTilesN = kChannels / 8;
  static_assert(sizeof(T) == 2 && kChunks == 8);
  static_assert(kTile.kColumns + 2 == kMiddleColumns);
  static_assert(kWarps % 4 == 0, "a warp's rows of the input are permuted alike");
  static_assert(kTile.kStageBytes % (kThreads * 16) == 0, "threads copy as many chunks each");

  char* const input_tile = device::shared_memory();
  char* const middle_tile = input_tile + kTile.input_bytes();
  char* const ring = middle_tile + kTile.middle_bytes();
  float* const scale = reinterpret_cast<float*>(ring + kStages * kTile.kStageBytes);
  float* const shift = scale + 2 * kChannels;

  // What this block computes: output pixels from (h0, w0) of image n on.
  const unsigned strip = blockIdx.x / block.tiles_w;
  const int w0 = (blockIdx.x - strip * block.tiles_w) * kTile.kColumns;
  const int64_t n = strip / block.tiles_h;
  const int h0 = strip % block.tiles_h * kTile.rows;
  const auto is_inside = [&](int h, int w) {
    return static_cast<unsigned>(h) < static_cast<unsigned>(block.H) &&
           static_cast<unsigned>(w) < static_cast<unsigned>(block.W);
  };

  // Beyond the image there are zeros, which is what pads the first convolution.
  const T* const image = static_cast<const T*>(block.input) + n * block.input_n;
  for (int i = threadIdx.x; i < kInputRows * kInputColumns * kChunks; i += kThreads) {
    const int pixel = i / kChunks, chunk = i % kChunks;
    const int h = h0 - 2 + pixel / kInputColumns, w = w0 - 2 + pixel % kInputColumns;
    device::copy_async_16(input_tile + swizzled<kChunks>(pixel, chunk),
                          image + h * block.input_h + w * block.input_w + chunk * kElements,
                          is_inside(h, w));
  }

  // Loads the weights of one step, a tap of the first convolution or of the second.
  int load_stage = 0;
  const auto load = [&](int step) {
    if (step < kSteps) {
      const bool second = step >= kTaps;
      const T* const weight = static_cast<const T*>(block.layers[second].weight) +
                              (second ? step - kTaps : step) * kChannels;
      char* const stage = ring + load_stage * kTile.kStageBytes;
#pragma unroll
      for (int i = 0; i < kTile.kStageBytes / 16 / kThreads; ++i) {
        const int at = threadIdx.x + i * kThreads;
        const int filter = at / kChunks, chunk = at % kChunks;
        device::copy_async_16(stage + swizzled<kChunks>(filter, chunk),
                              weight + filter * kTaps * kChannels + chunk * kElements, true);
      }
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    device::commit_copies();
  };

  // The first of these groups has the input too.
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) load(step);

  for (int i = threadIdx.x; i < 2 * kChannels; i += kThreads) {
    const BasicBlockLayer& layer = block.layers[i / kChannels];
    const int k = i % kChannels;
    const float deviation = sqrtf(read(layer.running_var, k, 1.f) + layer.eps);
    scale[i] = read(layer.bn_weight, k, 1.f) / deviation;
    shift[i] = read(layer.bn_bias, k, 0.f) +
               (read(layer.bias, k, 0.f) - read(layer.running_mean, k, 0.f)) * scale[i];
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float sums[kTilesM][kTilesN][4];
  int step = 0, stage = 0;

  // Whether there is an i-th row of pixels for the warp.
  const auto has_row = [&](int i, int rows) {
    return (i + 1) * kWarps <= rows || warp + i * kWarps < rows;
  };

  // One convolution of a tile in shared memory, of kRows rows of output.
  const auto convolve = [&]<int kRows, int kWidth>(const char* tile, int column,
                                                   std::integer_sequence<int, kRows, kWidth>) {
#pragma unroll
    for (int i = 0; i < kTilesM * kTilesN * 4; ++i) {
      sums[i / 4 / kTilesN][i / 4 % kTilesN][i % 4] = 0;
    }
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap, ++step) {
      device::wait_for_copies<kStages - 2>();
      __syncthreads();  // this step is there for all, and all are done with the one before
      load(step + kStages - 1);
      const char* const filters = ring + stage * kTile.kStageBytes;
      stage = stage + 1 == kStages ? 0 : stage + 1;
      // The warp's rows of pixels are permuted alike, and so are filters 8 apart.
      const int pixel = (warp + tap / 3) * kWidth + column + tap % 3;
      const int a_offset = swizzled<kChunks>(pixel, lane / 16);
      const int b_offset = swizzled<kChunks>(lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll
      for (int chunk = 0; chunk < kChunks; chunk += 2) {
        uint32_t a[kTilesM][4];
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          if (!has_row(i, kRows)) continue;
          device::load_matrix_x4(
              a[i], tile + (a_offset ^ chunk * 16) + i * kWarps * kWidth * kTile.kPixelBytes);
        }
#pragma unroll
        for (int pair = 0; pair < kTilesN / 2; ++pair) {
          uint32_t b[4];
          device::load_matrix_x4(b,
                                 filters + (b_offset ^ chunk * 16) + pair * 16 * kTile.kPixelBytes);
          const uint32_t columns[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
          for (int i = 0; i < kTilesM; ++i) {
            if (!has_row(i, kRows)) continue;
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              device::mma_16x8x16<T>(sums[i][pair * 2 + j], a[i], columns[j]);
            }
          }
        }
      }
    }
  };

  // Hands each pair of neighbouring channels of a pixel that the thread has to `finish`: its row
  // and column, the pair's place in a pixel, and the sums times scale plus shift.
  const auto for_each_pair = [&]<int kRows>(int layer, const auto& finish,
                                            std::integral_constant<int, kRows>) {
#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int channel = j * 8 + lane % 4 * 2;
      const auto factors = device::load<float, 2>(scale + layer * kChannels + channel);
      const auto terms = device::load<float, 2>(shift + layer * kChannels + channel);
#pragma unroll
      for (int i = 0; i < kTilesM * 2; ++i) {
        const int row = warp + i / 2 * kWarps, column = i % 2 * 8 + lane / 4;
        if (!has_row(i / 2, kRows)) continue;
        float y[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          y[e] = sums[i / 2][j][i % 2 * 2 + e] * factors.values[e] + terms.values[e];
        }
        finish(row, column, channel, y);
      }
    }
  };

  const auto place = [&](char* tile, int pixel, int channel) {
    return reinterpret_cast<T*>(tile + swizzled<kChunks>(pixel, channel / kElements)) +
           channel % kElements;
  };

  convolve(input_tile, lane % 16, std::integer_sequence<int, kMiddleRows, kInputColumns>{});
  for_each_pair(
      0,
      [&](int row, int column, int channel, const float (&y)[2]) {
        // Beyond the image the second convolution is padded: these are no outputs of the first.
        const bool inside = is_inside(h0 - 1 + row, w0 - 1 + column);
        Vector<T, 2> values;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          values.values[e] = device::narrow<T>(inside ? device::at_least(0.f, y[e]) : 0.f);
        }
        device::store(place(middle_tile, row * kMiddleColumns + column, channel), values);
      },
      std::integral_constant<int, kMiddleRows>{});

  // What the last two columns would read is beyond their row.
  convolve(middle_tile, min(lane % 16, kTile.kColumns - 1),
           std::integer_sequence<int, kTile.rows, kMiddleColumns>{});
  for_each_pair(
      1,
      [&](int row, int column, int channel, const float (&y)[2]) {
        if (column >= kTile.kColumns) return;
        T* const residual = place(input_tile, (row + 2) * kInputColumns + column + 2, channel);
        auto values = device::load<T, 2>(residual);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float sum = y[e] + device::widen(values.values[e]);
          values.values[e] = device::narrow<T>(device::at_least(0.f, sum));
        }
        device::store(residual, values);
      },
      std::integral_constant<int, kTile.rows>{});
  __syncthreads();

  T* const output = static_cast<T*>(block.output);
  for (int i = threadIdx.x; i < kTile.rows * kTile.kColumns * kChunks; i += kThreads) {
    const int chunk = i % kChunks, pixel = i / kChunks;
    const int row = pixel / kTile.kColumns, column = pixel % kTile.kColumns;
    const int h = h0 + row, w = w0 + column;
    if (h >= block.H || w >= block.W) continue;
    const int at = (row + 2) * kInputColumns + column + 2;
    device::store(output + ((n * block.H + h) * block.W + w) * kChannels + chunk * kElements,
                  device::load<T, kElements>(
                      reinterpret_cast<const T*>(input_tile + swizzled<kChunks>(at, chunk))));
  }
}

// The launch of every instance for T, picked by its index.
template <typename T>
void launch_basic_block(const BasicBlock& block, int64_t images, int tile, cudaStream_t stream) {
  const auto launch = [&](auto index) {
    constexpr BasicBlockTile kTile = kBasicBlockTiles[index];
    const auto blocks = static_cast<unsigned>(images * block.tiles_h * block.tiles_w);
    const device::Grid grid{dim3(blocks), kTile.threads(), kTile.shared_bytes(), stream};
    device::launch(basic_block<T, index>, grid, block);
  };
  const auto launch_at = [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) {
    ((kIndices == tile ? launch(std::integral_constant<int, kIndices>{}) : void()), ...);
  };
  launch_at(std::make_integer_sequence<int, kBasicBlockTileCount>{});
}

}  // namespace fused_resnet
