// Convolution of bytes with scale, shift, shortcut and ReLU in one pass:
//
//   sum[m, k] = sum over r, s, c of (input[pixel(m, r, s), c] - zero_point) weight[k, r, s, c]
//   steps[m, k] = float(sum) scale[k] + shift[k] (+ shortcut[m, k])
//   output[m, k] = clamp(round(steps), 0, 255), or, as a floating-point number, that times a step
//
// with m = (n P + p) Q + q a pixel of the output, and pixel(m, r, s) the input's under a tap, as in
// conv_bn_act.cuh. The shortcut is `(block[m, k] - zero_point) shortcut_scale`, block the bytes of
// the block's input, or `float(sum) scale` of a second convolution, the projection.
//
// These are the integers of fused_resnet/reference.py, `quantized_residual_blocks`: sums are exact,
// and what follows are float32 operations that each round by themselves, in its order; NaN becomes
// 0. With f[k] the sum of a filter, sum = sum of input weight - zero_point f[k], if what lies
// outside the image counts as the zero point: copies of it come from 16 bytes that hold nothing
// else.
//
// Reads weights and the shortcut and writes the output once, a byte an element; reads the input
// once from memory and once for every tap and column of tiles from the L2 cache.
//
// Implicit GEMM as conv_bn_act.cuh has it, with the same ring of stages in shared memory. One
// instruction multiplies 32 bytes of a row. Behind the ring lies the output's tile, [m][n] bytes:
// the shortcut is copied there before anything else, each thread puts its outputs where it read
// theirs, and they leave in 16-byte stores.
#pragma once

#include <utility>

#include "cuda/byte_conv.h"
#include "cuda/conv_bn_act.cuh"
#include "cuda/device/async_copy.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/device/vector.cuh"

namespace fused_resnet {

// From here on float32 numbers are integers, and the sum of one of them and a number of a magnitude
// below 2^22 is the nearest of them, to even: the number's integer is in its lower bits.
constexpr float kRoundingAnchor = 12582912.f;  // 1.5 * 2^23
constexpr int kAnchorBits = 0x4b400000;

// Of `x` clamped, NaN being the least.
__device__ __forceinline__ int rounded_within(float x, float least, float largest) {
  const float clamped = fminf(fmaxf(x, least), largest);
  return __float_as_int(__fadd_rn(clamped, kRoundingAnchor)) - kAnchorBits;
}

// The pixel under tap (0, 0) of an output pixel's window.
__device__ __forceinline__ Window<uint8_t> byte_window(const ByteOperand& operand, int m, int M,
                                                       int P, int Q, int channel) {
  if (m >= M) return {nullptr, kNowhere, 0};
  const unsigned row = static_cast<unsigned>(m) / Q, image = row / P;
  const int n = image, p = row - image * P, q = m - row * Q;
  const int h = p * operand.stride_h - operand.pad_h, w = q * operand.stride_w - operand.pad_w;
  const int64_t pixel = (static_cast<int64_t>(n) * operand.H + h) * operand.W + w;
  return {operand.input + pixel * operand.C + channel, h, w};
}

// sums += the products of the block's pixels, from m0 on, and filters, from k0 to k_end of a group,
// without the zero point's. The ring is free before and after.
template <int kIndex, int kTilesM, int kTilesN>
__device__ __forceinline__ void add_products(int (&sums)[kTilesM][kTilesN][4],
                                             const ByteOperand& operand, const ByteConv& conv,
                                             char* ring, int m0, int k0, int k_end, int group) {
  static constexpr ByteTile kTile = kByteTiles[kIndex];
  constexpr int kChunks = kTile.depth / 16;
  constexpr int kThreads = kTile.threads();
  constexpr int kStages = kTile.stages;
  constexpr int kStageBytes = kTile.stage_bytes();
  constexpr int kRowsAtOnce = kThreads / kChunks;  // that the threads copy, a chunk each
  constexpr int kPixels = kTile.m / kRowsAtOnce;   // rows of A and of B that a thread copies
  constexpr int kFilters = kTile.n / kRowsAtOnce;
  static_assert(kTile.m % kRowsAtOnce == 0 && kTile.n % kRowsAtOnce == 0 && kTilesN % 2 == 0);
  static_assert(kRowsAtOnce % 8 == 0, "the rows that a thread copies are permuted alike");

  const int channels = operand.group_c;  // of a tap
  const int depth = operand.R * operand.S * channels;
  const int steps = (depth + kTile.depth - 1) / kTile.depth;

  // What this thread copies: one chunk of every kRowsAtOnce-th row.
  const int row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
  int offset = chunk * 16;  // along the sum
  Tap tap{offset / channels / operand.S, offset / channels % operand.S, offset % channels};
  Window<uint8_t> windows[kPixels];
#pragma unroll
  for (int i = 0; i < kPixels; ++i) {
    windows[i] =
        byte_window(operand, m0 + row + i * kRowsAtOnce, conv.M, conv.P, conv.Q, group * channels);
  }
  const int8_t* first_filter =
      operand.weight + static_cast<int64_t>(k0 + row) * operand.row_bytes + offset;
  const int64_t next_filter = static_cast<int64_t>(kRowsAtOnce) * operand.row_bytes;

  // The byte under a tap, or one of the zero point. Beyond the last tap weights are zeros, so that
  // anything does.
  const auto source = [&](const Window<uint8_t>& window, const Tap& tap, int64_t in_window) {
    const bool reaches =
        tap.r < operand.R &&
        static_cast<unsigned>(window.h + tap.r * operand.dil_h) <
            static_cast<unsigned>(operand.H) &&
        static_cast<unsigned>(window.w + tap.s * operand.dil_w) < static_cast<unsigned>(operand.W);
    return reaches ? window.origin + in_window : operand.outside;
  };
  const auto offset_in_window = [&](const Tap& tap) {
    const int64_t down = static_cast<int64_t>(tap.r) * operand.dil_h * operand.W;
    return (down + static_cast<int64_t>(tap.s) * operand.dil_w) * operand.C + tap.c;
  };

  // Loads the step that `tap` is at and goes on to the next.
  const int target = swizzled<kChunks>(row, chunk);
  constexpr int kNextTarget = kRowsAtOnce * kTile.depth;
  const auto load_step = [&](char* stage) {
    char* const a = stage + target;
    char* const b = stage + kTile.m * kTile.depth + target;
    if constexpr (kTile.piece == 16) {
      const int64_t in_window = offset_in_window(tap);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        device::copy_async_16(a + i * kNextTarget, source(windows[i], tap, in_window), true);
      }
      tap.advance(kTile.depth, channels, operand.S);
    } else if constexpr (kTile.piece == 4) {
#pragma unroll
      for (int e = 0; e < 16; e += 4) {
        const int64_t in_window = offset_in_window(tap);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          device::copy_async<4>(a + i * kNextTarget + e, source(windows[i], tap, in_window), true);
        }
        tap.advance(4, channels, operand.S);
      }
      tap.advance(kTile.depth - 16, channels, operand.S);
    } else {
      Vector<uint8_t, 16> bytes[kPixels];
#pragma unroll
      for (int e = 0; e < 16; ++e) {
        const int64_t in_window = offset_in_window(tap);
#pragma unroll
        for (int i = 0; i < kPixels; ++i) {
          bytes[i].values[e] = *source(windows[i], tap, in_window);
        }
        tap.next(channels, operand.S);
      }
      tap.advance(kTile.depth - 16, channels, operand.S);
#pragma unroll
      for (int i = 0; i < kPixels; ++i) {
        device::store(reinterpret_cast<uint8_t*>(a + i * kNextTarget), bytes[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < kFilters; ++i) {
      const bool exists = offset < operand.row_bytes && k0 + row + i * kRowsAtOnce < k_end;
      device::copy_async_16(b + i * kNextTarget, first_filter + i * next_filter, exists);
    }
    first_filter += kTile.depth;
    offset += kTile.depth;
  };

  int load_stage = 0;
  const auto load = [&](int step) {
    if (step < steps) {
      load_step(ring + load_stage * kStageBytes);
      load_stage = load_stage + 1 == kStages ? 0 : load_stage + 1;
    }
    device::commit_copies();
  };
#pragma unroll 1
  for (int step = 0; step < kStages - 1; ++step) load(step);

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_m = warp / kTile.warps_n * kTilesM * 16;
  const int first_n = warp % kTile.warps_n * kTilesN * 8;
  // Rows 8 apart are permuted alike, and pairs of chunks stay together.
  const int a_place = swizzled<kChunks>(first_m + lane % 16, lane / 16);
  const int b_place = swizzled<kChunks>(first_n + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  int stage = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    device::wait_for_copies<kStages - 2>();
    __syncthreads();  // this step is there for all, and all are done with the one before
    load(step + kStages - 1);
    const char* const pixels = ring + stage * kStageBytes;
    const char* const filters = pixels + kTile.m * kTile.depth;
#pragma unroll
    for (int pair = 0; pair < kChunks; pair += 2) {
      uint32_t a[kTilesM][4];
#pragma unroll
      for (int i = 0; i < kTilesM; ++i) {
        device::load_matrix_x4(a[i], pixels + (a_place ^ pair * 16) + i * 16 * kTile.depth);
      }
#pragma unroll
      for (int j = 0; j < kTilesN; j += 2) {
        uint32_t b[4];
        device::load_matrix_x4(b, filters + (b_place ^ pair * 16) + j * 8 * kTile.depth);
#pragma unroll
        for (int i = 0; i < kTilesM; ++i) {
          device::mma_16x8x32_bytes(sums[i][j], a[i], {b[0], b[1]});
          device::mma_16x8x32_bytes(sums[i][j + 1], a[i], {b[2], b[3]});
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }
  device::wait_for_copies<0>();
  __syncthreads();
}

// Writes a tile of bytes, [kRows][kColumns] in shared memory, as T times a step.
template <typename T, int kRows, int kColumns, int kThreads>
__device__ __forceinline__ void store_tile(const ByteConv& conv, const char* tile, int m0, int k0,
                                           int k_end) {
  constexpr int kElements = 16 / sizeof(T);
  constexpr int kStores = kColumns / kElements;  // of a row
  T* const output = static_cast<T*>(conv.output);
  const auto as_output = [&](uint8_t byte) {
    if constexpr (sizeof(T) == 1) {
      return byte;
    } else {
      return device::narrow<T>(__fmul_rn(static_cast<float>(byte), conv.output_step));
    }
  };
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * kStores; i += kThreads) {
    const int row = i / kStores, column = i % kStores * kElements;
    const int m = m0 + row, k = k0 + column;
    if (m >= conv.M || k >= k_end) continue;
    const auto bytes = device::load<uint8_t, kElements>(reinterpret_cast<const uint8_t*>(
        tile + swizzled<kColumns / 16>(row, column / 16) + column % 16));
    T* const target = output + static_cast<int64_t>(m) * conv.K + k;
    if (conv.vector_output) {
      Vector<T, kElements> values;
#pragma unroll
      for (int e = 0; e < kElements; ++e) values.values[e] = as_output(bytes.values[e]);
      device::store(target, values);
    } else {
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        if (k + e < k_end) target[e] = as_output(bytes.values[e]);
      }
    }
  }
}

// Grid: (tiles of pixels x tiles of filters, the latter consecutive since they share pixels;
// groups).
template <int kIndex, bool kProjects>
__global__ void __launch_bounds__(kByteTiles[kIndex].threads(), kByteTiles[kIndex].resident)
    byte_conv(const ByteConv conv) {
  static constexpr ByteTile kTile = kByteTiles[kIndex];
  constexpr int kThreads = kTile.threads();
  constexpr int kTilesM = kTile.m / kTile.warps_m / 16;  // of 16 x 8 outputs, in a warp
  constexpr int kTilesN = kTile.n / kTile.warps_n / 8;
  constexpr int kOutChunks = kTile.n / 16;

  char* const ring = device::shared_memory();
  char* const tile = ring + kTile.stages * kTile.stage_bytes();
  int* const offsets = reinterpret_cast<int*>(tile + kTile.m * kTile.n);
  float* const scale = reinterpret_cast<float*>(offsets + kTile.n);
  float* const shift = scale + kTile.n;
  int* const projection_offsets = reinterpret_cast<int*>(shift + kTile.n);
  float* const projection_scale = reinterpret_cast<float*>(projection_offsets + kTile.n);

  const int columns = (conv.group_k + kTile.n - 1) / kTile.n;
  const int m0 = blockIdx.x / columns * kTile.m;
  const int k0 = blockIdx.y * conv.group_k + blockIdx.x % columns * kTile.n;
  const int k_end = (blockIdx.y + 1) * conv.group_k;

  if (conv.shortcut != nullptr) {
    for (int i = threadIdx.x; i < kTile.m * kOutChunks; i += kThreads) {
      const int m = m0 + i / kOutChunks, k = k0 + i % kOutChunks * 16;
      const uint8_t* source = conv.shortcut + static_cast<int64_t>(m) * conv.K + k;
      char* const target = tile + swizzled<kOutChunks>(i / kOutChunks, i % kOutChunks);
      if (conv.vector_output) {
        device::copy_async_16(target, source, m < conv.M && k < k_end);
      } else {
#pragma unroll 1
        for (int e = 0; e < 16; ++e) {
          target[e] = m < conv.M && k + e < k_end ? source[e] : 0;
        }
      }
    }
  }
  for (int i = threadIdx.x; i < kTile.n; i += kThreads) {
    const int k = k0 + i;
    const bool exists = k < k_end;
    offsets[i] = exists ? conv.main.zero_point * conv.main.filter_sums[k] : 0;
    scale[i] = exists ? conv.main.scale[k] : 0.f;
    shift[i] = exists ? conv.shift[k] : 0.f;
    if constexpr (kProjects) {
      projection_offsets[i] =
          exists ? conv.projection.zero_point * conv.projection.filter_sums[k] : 0;
      projection_scale[i] = exists ? conv.projection.scale[k] : 0.f;
    }
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = warp / kTile.warps_n * kTilesM * 16 + lane / 4;
  const int first_column = warp % kTile.warps_n * kTilesN * 8 + lane % 4 * 2;
  int sums[kTilesM][kTilesN][4] = {};
  int projected[kProjects ? kTilesM : 1][kProjects ? kTilesN : 1][4] = {};
  if constexpr (kProjects) {
    add_products<kIndex>(projected, conv.projection, conv, ring, m0, k0, k_end, blockIdx.y);
  }
  add_products<kIndex>(sums, conv.main, conv, ring, m0, k0, k_end, blockIdx.y);

#pragma unroll
  for (int j = 0; j < kTilesN; ++j) {
    const int column = first_column + j * 8;
    const auto terms = device::load<int, 2>(offsets + column);
    const auto factors = device::load<float, 2>(scale + column);
    const auto shifts = device::load<float, 2>(shift + column);
#pragma unroll
    for (int i = 0; i < kTilesM * 2; ++i) {
      uint8_t* const place = reinterpret_cast<uint8_t*>(
          tile + swizzled<kOutChunks>(first_row + i * 8, column / 16) + column % 16);
      Vector<uint8_t, 2> bytes{};
      if (conv.shortcut != nullptr) bytes = device::load<uint8_t, 2>(place);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int at = i % 2 * 2 + e;
        const int sum = sums[i / 2][j][at] - terms.values[e];
        float steps =
            __fadd_rn(__fmul_rn(__int2float_rn(sum), factors.values[e]), shifts.values[e]);
        if constexpr (kProjects) {
          const int other = projected[i / 2][j][at] - projection_offsets[column + e];
          steps = __fadd_rn(steps, __fmul_rn(__int2float_rn(other), projection_scale[column + e]));
        } else if (conv.shortcut != nullptr) {
          const int byte = bytes.values[e] - conv.shortcut_zero_point;
          steps = __fadd_rn(steps, __fmul_rn(__int2float_rn(byte), conv.shortcut_scale));
        }
        bytes.values[e] = static_cast<uint8_t>(rounded_within(steps, 0.f, 255.f));
      }
      device::store(place, bytes);
    }
  }
  __syncthreads();

  switch (conv.type) {
    case ByteOutput::kBytes:
      return store_tile<uint8_t, kTile.m, kTile.n, kThreads>(conv, tile, m0, k0, k_end);
    case ByteOutput::kFloat32:
      return store_tile<float, kTile.m, kTile.n, kThreads>(conv, tile, m0, k0, k_end);
    case ByteOutput::kFloat16:
      return store_tile<__half, kTile.m, kTile.n, kThreads>(conv, tile, m0, k0, k_end);
    case ByteOutput::kBFloat16:
      return store_tile<__nv_bfloat16, kTile.m, kTile.n, kThreads>(conv, tile, m0, k0, k_end);
  }
}

// output[n, h, w, c] = clamp(round(input inverse) + zero_point, 0, 255), NaN being 0; or, of
// kWords, the two bytes of `clamp(round(input inverse), -32639, 32639)`, 256 (upper - 128) + lower
// - 128, the lower first and NaN being the least. Bytes beyond a pixel's channels are the zero
// point.
//
// Reads the input and writes the output once. A thread has kChannels of a pixel, which lie side by
// side where kVector says so.
template <typename T, bool kWords, bool kVector>
__global__ void __launch_bounds__(256) store_bytes(const StoredInput stored) {
  constexpr int kChannels = kVector ? 16 / sizeof(T) : 4;
  constexpr int kBytes = kWords ? 2 : 1;
  constexpr int kLargestWord = 127 * 256 + 127;
  if (blockIdx.x == 0 && threadIdx.x < 32) {
    stored.outside[threadIdx.x] = threadIdx.x < 16 ? stored.zero_point : 0;
  }
  const int parts = (stored.pixel_bytes / kBytes + kChannels - 1) / kChannels;
  const int64_t count = stored.pixels * parts;
  const float least = static_cast<float>(-stored.zero_point);
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const unsigned pixel =
        static_cast<unsigned>(stored.channels_fastest ? i / parts : i % stored.pixels);
    const int part = static_cast<int>(stored.channels_fastest ? i % parts : i / stored.pixels);
    const unsigned row = pixel / stored.W;
    const int c = part * kChannels;
    const T* const source = static_cast<const T*>(stored.input) + row / stored.H * stored.stride_n +
                            row % stored.H * stored.stride_h + pixel % stored.W * stored.stride_w +
                            c * stored.stride_c;
    Vector<T, kChannels> numbers;
    if constexpr (kVector) {
      numbers = device::load<T, kChannels>(source);
    } else {
#pragma unroll
      for (int e = 0; e < kChannels; ++e) {
        numbers.values[e] = device::narrow<T>(0.f);
        if (c + e < stored.C) numbers.values[e] = source[e * stored.stride_c];
      }
    }
    Vector<uint8_t, kChannels * kBytes> bytes;
#pragma unroll
    for (int e = 0; e < kChannels; ++e) {
      const float x = __fmul_rn(device::widen(numbers.values[e]), stored.inverse);
      if constexpr (kWords) {
        const int word = rounded_within(x, -kLargestWord, kLargestWord);
        const int upper = (word + 128) >> 8;
        bytes.values[2 * e] = static_cast<uint8_t>(word - upper * 256 + 128);
        bytes.values[2 * e + 1] = static_cast<uint8_t>(upper + 128);
      } else {
        bytes.values[e] =
            static_cast<uint8_t>(rounded_within(x, least, 255.f + least) + stored.zero_point);
      }
    }
    uint8_t* const target =
        stored.output + static_cast<int64_t>(pixel) * stored.pixel_bytes + c * kBytes;
    if (kVector || stored.pixel_bytes % (kChannels * kBytes) == 0) {
      device::store(target, bytes);
    } else {
#pragma unroll
      for (int e = 0; e < kChannels * kBytes; ++e) {
        if (c * kBytes + e < stored.pixel_bytes) target[e] = bytes.values[e];
      }
    }
  }
}

// output[n, p, q, k] = step times the largest of input[n, h, w, k] in a window.
//
// Reads the input once from memory and writes the output once. A thread has kChannels of a pixel.
template <typename T, int kChannels>
__global__ void __launch_bounds__(256) pool_bytes(const BytePool pool) {
  const int parts = pool.K / kChannels;
  const int64_t count = pool.pixels * parts;
#pragma unroll 1
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const unsigned pixel = static_cast<unsigned>(i / parts), row = pixel / pool.Q;
    const int64_t n = row / pool.P;
    const int k = static_cast<int>(i % parts) * kChannels;
    const int h0 = static_cast<int>(row % pool.P) * pool.stride_h - pool.pad_h;
    const int w0 = static_cast<int>(pixel % pool.Q) * pool.stride_w - pool.pad_w;
    Vector<uint8_t, kChannels> largest{};
#pragma unroll 1
    for (int h = max(h0, 0); h < min(h0 + pool.R, pool.H); ++h) {
#pragma unroll 1
      for (int w = max(w0, 0); w < min(w0 + pool.S, pool.W); ++w) {
        const auto bytes = device::load<uint8_t, kChannels>(
            pool.input + ((n * pool.H + h) * pool.W + w) * pool.K + k);
#pragma unroll
        for (int e = 0; e < kChannels; ++e) {
          largest.values[e] = max(largest.values[e], bytes.values[e]);
        }
      }
    }
    Vector<T, kChannels> values;
#pragma unroll
    for (int e = 0; e < kChannels; ++e) {
      values.values[e] =
          device::narrow<T>(__fmul_rn(static_cast<float>(largest.values[e]), pool.step));
    }
    device::store(static_cast<T*>(pool.output) + static_cast<int64_t>(pixel) * pool.K + k, values);
  }
}

}  // namespace fused_resnet
