// A network's first convolution, its batch norm, ReLU and max-pool in one pass:
//
//   output[n, p, q, k] = max over i, j in {-1, 0, 1} of y[n, 2p + i, 2q + j, k], of those there are
//   y[n, h, w, k]      = act(scale[k] sum[n, h, w, k] + shift[k]), rounded to the tensors' dtype
//   sum[n, h, w, k]    = sum over r, s in 0..6 and c in 0..2 of
//                        input[n, 2h + r - 3, 2w + s - 3, c] weight[k, r, s, c]
//   scale = bn_weight / sqrt(running_var + eps),  shift = bn_bias + (bias - running_mean) scale
//
// Reads the input once from memory, and one more time in the L2 cache 7 rows in `4 rows_each`;
// reads the weights once a block, from L2; writes the pooled output once. y never leaves the chip,
// which saves 10 bytes of memory for each of its numbers, those of a pass that pools.
//
// Three channels fill no 16 bytes, but the windows of a row of pixels need none that do: a tap's
// row is 21 numbers that lie next to each other, and the next output's are 12 bytes further. So
// rows of the image lie in shared memory as they do in global memory, copied 16 bytes at a time
// into a ring while earlier ones are multiplied, and an mma's operand is loaded from where it lies,
// 4 bytes a lane: 8 windows have their words in 25 banks. 4 bytes are two numbers, and a window
// begins with the second of two; so its row is taken with the number before it, and with two
// behind, 24 in all, of which the three that are not the window's are masked: whatever they are,
// NaN too, they do not count. Seven such rows are 21 chunks of 16 bytes, a sum's depth of 176 where
// 147 would do; with channels padded to four it would be 224.
//
// Rows that are no whole chunks, or begin anywhere, are copied number by number into the same ring.
#pragma once

#include <type_traits>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/maximum.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/shared_memory.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/parameter.cuh"
#include "cuda/stem.h"

namespace fused_resnet {

using device::Vector;

// Grid: (strips of pooled columns x groups of pooled rows x images; slabs of kFilters filters).
template <typename T>
__global__ void __launch_bounds__(StemTile::kThreads, StemTile::kResident)
    stem_max_pool(const Stem stem) {
  using Tile = StemTile;
  constexpr int kThreads = Tile::kThreads, kColumns = Tile::kColumns;
  constexpr int kTilesN = Tile::kFilters / 8;
  constexpr int kWords = Tile::kRowBytes / 4;
  static_assert(sizeof(T) == 2);

  char* const ring = device::shared_memory();
  char* const filters = ring + Tile::filters_at();
  char* const outputs = ring + Tile::outputs_at();
  float* const scale = reinterpret_cast<float*>(ring + Tile::scale_at());
  float* const shift = scale + Tile::kFilters;

  // What this block computes: pooled rows from p0 to p_end, pooled columns from q0 on, of image n.
  const int strip = blockIdx.x % stem.strips;
  const unsigned group_of_image = blockIdx.x / stem.strips;
  const int64_t n = group_of_image / stem.row_groups;
  const int p0 = group_of_image % stem.row_groups * stem.rows_each;
  const int p_end = min(p0 + stem.rows_each, stem.pooled_P);
  const int q0 = strip == 0 ? 0 : strip * Tile::kStripColumns + 1;
  const int q_count = min(Tile::kStripColumns + (strip == 0), stem.pooled_Q - q0);
  const int column0 = strip == 0 ? 0 : 2 * q0 - 1;  // of the convolution's output
  const int k0 = blockIdx.y * Tile::kFilters;

  // Where a row's first window begins, in bytes from the image's first column, its number before
  // included; and the chunk that is the first of a row in the ring.
  const int begin = Tile::kWindowBytes * column0 - 2 * (Tile::kPadding * Tile::kChannels + 1);
  const int origin = begin & ~15, lead = begin - origin;
  const T* const image = static_cast<const T*>(stem.input) + n * stem.input_n;
  const int row_elements = stem.W * Tile::kChannels;

  // Rows above the image, at most 3, lie there too.
  const auto row_of_ring = [&](int h) {
    return ring + static_cast<unsigned>(h + Tile::kRows) % Tile::kRows * Tile::kRowBytes;
  };

  // Loads `count` rows of the image, of which h0 is the first.
  const auto load_rows = [&](int h0, int count) {
    if (stem.rows_are_chunks) {
      constexpr int kChunks = Tile::kRowBytes / 16;
#pragma unroll 1
      for (int i = threadIdx.x; i < count * kChunks; i += kThreads) {
        const int h = h0 + i / kChunks, chunk = i % kChunks;
        const int at = origin + chunk * 16;
        const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(stem.H) && at >= 0 &&
                            at < 2 * row_elements;
        device::copy_async_16(row_of_ring(h) + chunk * 16, image + h * stem.input_h + at / 2,
                              exists);
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < count * kWords; i += kThreads) {
        const int h = h0 + i / kWords, word = i % kWords;
        Vector<T, 2> pair;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int element = origin / 2 + word * 2 + e;
          const int w = element / Tile::kChannels, c = element - w * Tile::kChannels;
          const bool exists = static_cast<unsigned>(h) < static_cast<unsigned>(stem.H) &&
                              static_cast<unsigned>(element) < static_cast<unsigned>(row_elements);
          pair.values[e] = exists ? image[h * stem.input_h + w * stem.input_w + c * stem.input_c]
                                  : device::narrow<T>(0.f);
        }
        device::store(reinterpret_cast<T*>(row_of_ring(h) + word * 4), pair);
      }
    }
    device::commit_copies();
  };

  // Pooled row p needs rows 2p and 2p + 1 of the convolution, and the one before that the turn
  // before has computed; so the first turn is one earlier, but at the image's top.
  const int first = max(p0 - 1, 0);
  const auto first_input_row = [](int p) { return 4 * p - Tile::kPadding; };
  load_rows(first_input_row(first), Tile::kTaps + 2);

  // A filter's tap row in 3 chunks: loaded first, then stored.
  const T* const weight = static_cast<const T*>(stem.weight);
  for (int i = threadIdx.x; i < Tile::kFilters * Tile::kTaps; i += kThreads) {
    const int k = i / Tile::kTaps, r = i - k * Tile::kTaps;
    Vector<T, 8> chunks[Tile::kRowChunks];
    const T* const row = weight + (k0 + k) * stem.weight_k + r * stem.weight_r;
#pragma unroll
    for (int e = 0; e < 8 * Tile::kRowChunks; ++e) {
      const int s = (e - 1) / Tile::kChannels, c = (e - 1) % Tile::kChannels;
      const bool exists = e > 0 && s < Tile::kTaps && k0 + k < stem.K;
      chunks[e / 8].values[e % 8] =
          exists ? row[s * stem.weight_s + c * stem.weight_c] : device::narrow<T>(0.f);
    }
    char* const target = filters + k * Tile::kFilterBytes + r * Tile::kRowChunks * 16;
#pragma unroll
    for (int j = 0; j < Tile::kRowChunks; ++j) {
      device::store(reinterpret_cast<T*>(target + j * 16), chunks[j]);
    }
  }
  // What fills the last step.
  for (int k = threadIdx.x; k < Tile::kFilters; k += kThreads) {
    Vector<T, 8> zeros;
#pragma unroll
    for (int e = 0; e < 8; ++e) zeros.values[e] = device::narrow<T>(0.f);
    device::store(reinterpret_cast<T*>(filters + k * Tile::kFilterBytes +
                                       Tile::kTaps * Tile::kRowChunks * 16),
                  zeros);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < Tile::kFilters; i += kThreads) {
    const int k = k0 + i;
    const bool exists = k < stem.K;
    const float deviation = exists ? sqrtf(read(stem.running_var, k, 1.f) + stem.eps) : 1.f;
    scale[i] = exists ? read(stem.bn_weight, k, 1.f) / deviation : 0.f;
    shift[i] = exists ? read(stem.bn_bias, k, 0.f) +
                            (read(stem.bias, k, 0.f) - read(stem.running_mean, k, 0.f)) * scale[i]
                      : 0.f;
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = warp * 16 + lane / 4;  // and the one 8 further
  const int a_offset = lead + column * Tile::kWindowBytes + lane % 4 * 4;
  const char* const b_row =
      filters + (lane / 16 * 8 + lane % 8) * Tile::kFilterBytes + lane / 8 % 2 * 16;
  // The number before a window, in the low half of its first word, and the two behind it.
  const uint32_t masks[Tile::kRowChunks] = {lane % 4 == 0 ? 0xffff0000u : ~0u, ~0u,
                                            lane % 4 == 3 ? 0u : ~0u};
  // Rows of the convolution take turns in `outputs`, each chunk at another place of its pixel.
  const auto output_row = [&](int h) {
    return outputs + static_cast<unsigned>(h) % Tile::kPooledRows * (kColumns * Tile::kPixelBytes);
  };
  const auto output_chunk = [](int column, int chunk) {
    return column * Tile::kPixelBytes + (chunk ^ column % 8) * 16;
  };

#pragma unroll 1
  for (int p = first; p < p_end; ++p) {
    device::wait_for_copies<0>();
    __syncthreads();  // this turn's rows are there for all, and all are done with the one before
    if (p + 1 < p_end) load_rows(first_input_row(p + 1) + Tile::kTaps - 2, 4);

    float sums[2][kTilesN][4] = {};
    // As many steps from the tap row r0 on, which begins a step.
    const auto multiply = [&]<int kSteps>(int r0, std::integral_constant<int, kSteps>) {
      const char* const b_step = b_row + r0 * Tile::kRowChunks * 16;
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[2][4] = {};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int r = (2 * step + half) / Tile::kRowChunks;
          const int j = (2 * step + half) % Tile::kRowChunks;
          if (kSteps < 3 && r > 0) continue;  // behind the last row
#pragma unroll
          for (int y = 0; y < 2; ++y) {
            const char* const source =
                row_of_ring(first_input_row(p) + 2 * y + r0 + r) + a_offset + j * 16;
#pragma unroll
            for (int eight = 0; eight < 2; ++eight) {
              const auto word = device::load<uint32_t, 1>(
                  reinterpret_cast<const uint32_t*>(source + eight * 8 * Tile::kWindowBytes));
              a[y][2 * half + eight] = word.values[0] & masks[j];
            }
          }
        }
#pragma unroll
        for (int pair = 0; pair < kTilesN / 2; ++pair) {
          uint32_t b[4];
          device::load_matrix_x4(b, b_step + pair * 16 * Tile::kFilterBytes + step * 32);
          const uint32_t halves[2][2] = {{b[0], b[1]}, {b[2], b[3]}};
#pragma unroll
          for (int y = 0; y < 2; ++y) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              device::mma_16x8x16<T>(sums[y][pair * 2 + i], a[y], halves[i]);
            }
          }
        }
      }
    };
    // Two tap rows are three steps. They are not unrolled: addresses would take too many registers.
#pragma unroll 1
    for (int r = 0; r + 1 < Tile::kTaps; r += 2) {
      multiply(r, std::integral_constant<int, Tile::kRowChunks>{});
    }
    multiply(Tile::kTaps - 1, std::integral_constant<int, (Tile::kRowChunks + 1) / 2>{});

#pragma unroll
    for (int j = 0; j < kTilesN; ++j) {
      const int k = j * 8 + lane % 4 * 2;
      const auto factors = device::load<float, 2>(scale + k);
      const auto terms = device::load<float, 2>(shift + k);
#pragma unroll
      for (int y = 0; y < 2; ++y) {
        char* const row = output_row(2 * p + y);
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          Vector<T, 2> values;
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float sum = sums[y][j][eight * 2 + e] * factors.values[e] + terms.values[e];
            values.values[e] = device::narrow<T>(device::at_least(stem.floor, sum));
          }
          device::store(
              reinterpret_cast<T*>(row + output_chunk(column + eight * 8, j)) + lane % 4 * 2,
              values);
        }
      }
    }
    __syncthreads();  // both rows are there for all
    if (p < p0) continue;

    // Beyond an edge the nearest pixel is taken once more, which changes no maximum.
    for (int i = threadIdx.x; i < q_count * kTilesN; i += kThreads) {
      const int q = q0 + i / kTilesN, chunk = i % kTilesN;
      const int columns[3] = {max(2 * q - 1, 0) - column0, 2 * q - column0,
                              min(2 * q + 1, stem.Q - 1) - column0};
      const int rows[3] = {max(2 * p - 1, 0), 2 * p, min(2 * p + 1, stem.P - 1)};
      Vector<uint32_t, 4> best;
#pragma unroll
      for (int at = 0; at < 9; ++at) {
        const auto values = device::load<uint32_t, 4>(reinterpret_cast<const uint32_t*>(
            output_row(rows[at / 3]) + output_chunk(columns[at % 3], chunk)));
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          best.values[e] = at == 0 ? values.values[e]
                                   : device::greater_of_pairs<T>(best.values[e], values.values[e]);
        }
      }
      const int k = k0 + chunk * 8;
      if (k >= stem.K) continue;
      T* const target =
          static_cast<T*>(stem.output) + ((n * stem.pooled_P + p) * stem.pooled_Q + q) * stem.K + k;
      device::store(reinterpret_cast<uint32_t*>(target), best);
    }
  }
}

// A max-pool by itself, kChannels at a time:
//
//   output[n, p, q, c] = max over r, s of
//       input[n, p stride_h + r - pad_h, q stride_w + s - pad_w, c], of those there are
//
// A NaN is greater than anything. Reads the input once from memory, what windows share again from
// the caches, and writes the output once.
template <typename T, int kChannels>
__global__ void max_pool(const MaxPool pool) {
  const int pieces = pool.C / kChannels;
  const int64_t count = pool.pixels * pieces, step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t pixel = i / pieces, row = pixel / pool.Q, n = row / pool.P;
    const int c = static_cast<int>(i - pixel * pieces) * kChannels;
    const int top = static_cast<int>(row - n * pool.P) * pool.stride_h - pool.pad_h;
    const int left = static_cast<int>(pixel - row * pool.Q) * pool.stride_w - pool.pad_w;
    const T* const image = static_cast<const T*>(pool.input) + n * pool.H * pool.W * pool.C + c;
    float best[kChannels];
#pragma unroll
    for (float& value : best) value = -__int_as_float(0x7f800000);
    for (int h = max(top, 0); h < min(top + pool.R, pool.H); ++h) {
      for (int w = max(left, 0); w < min(left + pool.S, pool.W); ++w) {
        const auto values =
            device::load<T, kChannels>(image + (static_cast<int64_t>(h) * pool.W + w) * pool.C);
#pragma unroll
        for (int e = 0; e < kChannels; ++e) {
          const float x = device::widen(values.values[e]);
          best[e] = x > best[e] || x != x ? x : best[e];
        }
      }
    }
    Vector<T, kChannels> result;
#pragma unroll
    for (int e = 0; e < kChannels; ++e) result.values[e] = device::narrow<T>(best[e]);
    device::store(static_cast<T*>(pool.output) + pixel * pool.C + c, result);
  }
}

}  // namespace fused_resnet
