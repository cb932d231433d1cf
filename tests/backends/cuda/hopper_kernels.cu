// Small kernels of Hopper's instructions. First one for each instruction and layout, which say of a
// GPU and of csrc/cuda_on_host alike what the instruction does; then a pipeline with every mistake
// that csrc/cuda_on_host finds in such a one, beside what would have been right.
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/device/cluster.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/tensor_copy.cuh"
#include "cuda/device/vector.cuh"
#include "cuda/device/warpgroup.cuh"
#include "cuda/library.h"

#ifdef FUSED_RESNET_ON_HOST
#include <atomic>
#include <thread>

#include "cuda/hopper/map_cache.h"
#include "cuda_on_host/tensor_map.h"
#endif

namespace fused_resnet {
namespace {

using device::Mbarrier;
using device::TensorMap;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kRowBytes = 128;

// Of the first thread; a barrier of the block has to follow.
__device__ __forceinline__ void make(Mbarrier* barrier, unsigned arrivals) {
  device::initialize(barrier, arrivals);
  device::publish_mbarriers();
}

device::TensorElement element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return device::TensorElement::kFloat16;
    case ScalarType::BFloat16:
      return device::TensorElement::kBFloat16;
    case ScalarType::Float:
      return device::TensorElement::kFloat32;
    default:
      return device::TensorElement::kByte;
  }
}

// A contiguous tensor, the innermost dimension first; float32 that loads round to tf32, or not.
device::TensorOf tensor_of(const Tensor& tensor, bool rounds = false) {
  device::TensorOf of{
      tensor.const_data_ptr(), element_of(tensor), static_cast<int>(tensor.dim()), {}, {}};
  int64_t bytes = of.element == device::TensorElement::kByte      ? 1
                  : of.element == device::TensorElement::kFloat32 ? 4
                                                                  : 2;
  if (rounds) of.element = device::TensorElement::kTf32;
  for (int i = 0; i < of.rank; ++i) {
    of.sizes[i] = tensor.size(of.rank - 1 - i);
    bytes *= of.sizes[i];
    if (i + 1 < of.rank) of.strides[i] = bytes;
  }
  return of;
}

device::Swizzle swizzle_of(bool swizzled) {
  return swizzled ? device::Swizzle::k128Bytes : device::Swizzle::kNone;
}

std::array<int, 4> four(const std::vector<int64_t>& numbers) {
  std::array<int, 4> found{1, 1, 1, 1};
  for (size_t i = 0; i < numbers.size(); ++i) found[i] = static_cast<int>(numbers[i]);
  return found;
}

cudaStream_t stream_of(const Tensor& tensor) {
  return current_stream(tensor.get_device_index());
}

// d = a b^T, a (64, depth) and b (kN, depth), 128 bytes of a row at a time, the second time onto
// the sums of the first.
template <typename T, int kN>
__global__ void __launch_bounds__(128)
    multiply(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, float* d,
             int steps) {
#if FUSED_RESNET_HAS_WARPGROUPS
  char* const rows_a = device::aligned<1024>(device::shared_memory());
  char* const rows_b = rows_a + 64 * kRowBytes;
  auto* const full = reinterpret_cast<Mbarrier*>(rows_b + kN * kRowBytes);
  if (threadIdx.x == 0) make(full, 1);
  __syncthreads();
  float sums[kN / 2];
  for (int step = 0; step < steps; ++step) {
    if (threadIdx.x == 0) {
      device::arrive_and_expect(full, (64 + kN) * kRowBytes);
      constexpr int kElements = kRowBytes / sizeof(T);
      device::load_tile(a, rows_a, full, {step * kElements, 0});
      device::load_tile(b, rows_b, full, {step * kElements, 0});
    }
    device::wait(full, step & 1);
    device::fence_sums();
    for (int byte = 0; byte < kRowBytes; byte += 32) {
      device::multiply_warpgroup<T, kN>(sums, device::rows_of_128_bytes(rows_a, byte),
                                        device::advanced(device::rows_of_128_bytes(rows_b), byte),
                                        step > 0 || byte > 0);
    }
    device::commit_products();
    device::wait_for_products<0>();
    __syncthreads();
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int i = 0; i < kN / 2; ++i) {
    const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
    d[row * kN + i / 4 * 8 + lane % 4 * 2 + i % 2] = sums[i];
  }
#endif
}

void run_multiply(const Tensor& a, const Tensor& b, const Tensor& d, bool rounds) {
  const int n = static_cast<int>(b.size(0));
  const int elements = a.scalar_type() == ScalarType::Float ? 32 : 64;
  const auto map = [&](const Tensor& rows) {
    return device::map_of(device::Tiles{tensor_of(rows, rounds),
                                        {elements, static_cast<int>(rows.size(0))},
                                        device::Swizzle::k128Bytes});
  };
  const auto launch = [&](auto kernel) {
    device::launch(kernel,
                   {1, 128, static_cast<size_t>(1024 + (64 + n) * kRowBytes + 8), stream_of(a)},
                   map(a), map(b), static_cast<float*>(d.mutable_data_ptr()), a.size(1) / elements);
  };
  const auto of_type = [&]<typename T>(T) {
    if (n == 64) {
      launch(multiply<T, 64>);
    } else if (n == 128) {
      launch(multiply<T, 128>);
    } else if constexpr (sizeof(T) == 2) {
      launch(multiply<T, 256>);
    }
  };
  a.scalar_type() == ScalarType::Half       ? of_type(__half{})
  : a.scalar_type() == ScalarType::BFloat16 ? of_type(__nv_bfloat16{})
                                            : of_type(float{});
}

struct Numbers {
  int at[4], offset[2];
};

// Loads a box and writes out what lies in shared memory then.
template <int kRank, bool kIm2col>
__global__ void __launch_bounds__(32)
    load(const __grid_constant__ TensorMap map, uint4* out, const Numbers where, int bytes) {
#if FUSED_RESNET_HAS_WARPGROUPS
  char* const box = device::aligned<1024>(device::shared_memory());
  auto* const full = reinterpret_cast<Mbarrier*>(box + (bytes + 127) / 128 * 128);
  if (threadIdx.x == 0) make(full, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    device::prefetch(map);
    device::arrive_and_expect(full, bytes);
    if constexpr (kIm2col) {
      device::load_pixels(map, box, full, where.at, where.offset);
    } else {
      int at[kRank];
      for (int i = 0; i < kRank; ++i) at[i] = where.at[i];
      device::load_tile(map, box, full, at);
    }
  }
  device::wait(full, 0);
  for (int i = threadIdx.x; i < bytes / 16; i += 32) out[i] = reinterpret_cast<uint4*>(box)[i];
#endif
}

// `corners` are an im2col map's lower, upper and stride, or none.
void run_load(const Tensor& input, const Tensor& output, std::vector<int64_t> box,
              std::vector<int64_t> at, std::vector<int64_t> offset, std::vector<int64_t> corners,
              bool swizzled, bool rounds) {
  const bool is_im2col = !corners.empty();
  const std::array<int, 4> sides = four(box), from = four(at);
  TensorMap map;
  if (is_im2col) {
    const auto corner = [&](int i) {
      return std::array<int, 2>{static_cast<int>(corners[i]), static_cast<int>(corners[i + 1])};
    };
    map = device::map_of(device::Im2col{tensor_of(input, rounds), corner(0), corner(2), corner(4),
                                        sides[0], sides[1], swizzle_of(swizzled)});
  } else {
    map = device::map_of(device::Tiles{tensor_of(input, rounds), sides, swizzle_of(swizzled)});
  }
  Numbers where{};
  for (int i = 0; i < 4; ++i) where.at[i] = from[i];
  for (size_t i = 0; i < offset.size(); ++i) where.offset[i] = static_cast<int>(offset[i]);
  const int bytes = static_cast<int>(output.numel());
  const auto kernel = is_im2col          ? load<4, true>
                      : input.dim() == 2 ? load<2, false>
                      : input.dim() == 3 ? load<3, false>
                                         : load<4, false>;
  device::launch(kernel, {1, 32, static_cast<size_t>(bytes + 2048), stream_of(input)}, map,
                 static_cast<uint4*>(output.mutable_data_ptr()), where, bytes);
}

// Stores a box that shared memory holds as it is given.
template <int kRank>
__global__ void __launch_bounds__(32) store(const __grid_constant__ TensorMap map,
                                            const uint4* values, const Numbers where, int bytes) {
#if FUSED_RESNET_HAS_WARPGROUPS
  char* const box = device::aligned<1024>(device::shared_memory());
  for (int i = threadIdx.x; i < bytes / 16; i += 32) reinterpret_cast<uint4*>(box)[i] = values[i];
  device::fence_for_copies();
  device::synchronize_threads<32>(1);
  if (threadIdx.x == 0) {
    int at[kRank];
    for (int i = 0; i < kRank; ++i) at[i] = where.at[i];
    device::store_tile(map, box, at);
    device::commit_stores();
    device::wait_for_stores<0>();
  }
#endif
}

void run_store(const Tensor& values, const Tensor& output, std::vector<int64_t> box,
               std::vector<int64_t> at, bool swizzled, bool rounds) {
  const TensorMap map =
      device::map_of(device::Tiles{tensor_of(output, rounds), four(box), swizzle_of(swizzled)});
  Numbers where{};
  for (int i = 0; i < 4; ++i) where.at[i] = four(at)[i];
  const int bytes = static_cast<int>(values.numel());
  const auto kernel = output.dim() == 2 ? store<2> : output.dim() == 3 ? store<3> : store<4>;
  device::launch(kernel, {1, 32, static_cast<size_t>(bytes + 1024), stream_of(values)}, map,
                 static_cast<const uint4*>(values.const_data_ptr()), where, bytes);
}

// Two blocks, each of which loads half of the rows for both; (2, rows, 64) out. The rows are also
// windows of one tap of an image of one row, of which im2col loads what tiles load.
template <bool kIm2col>
__global__ void __launch_bounds__(32)
    load_for_both(const __grid_constant__ TensorMap map, uint4* out, int rows) {
#if FUSED_RESNET_HAS_WARPGROUPS
  const int rank = static_cast<int>(device::rank_in_cluster()), half = rows / 2;
  char* const box = device::aligned<1024>(device::shared_memory());
  auto* const full = reinterpret_cast<Mbarrier*>(box + rows * kRowBytes);
  auto* const met = full + 1;
  if (threadIdx.x == 0) {
    device::initialize(full, 1);
    make(met, 2);
  }
  device::synchronize_cluster();
  if (threadIdx.x == 0) {
    device::arrive_and_expect(full, rows * kRowBytes);
    char* const part = box + rank * half * kRowBytes;
    if constexpr (kIm2col) {
      device::load_pixels_to_blocks(map, part, full, 3, {0, rank * half, 0, 0}, {0, 0});
    } else {
      device::load_tile_to_blocks(map, part, full, 3, {0, rank * half});
    }
  }
  device::wait(full, 0);
  if (threadIdx.x < 2) device::arrive_in_block(met, threadIdx.x);
  device::wait(met, 0);
  for (int i = threadIdx.x; i < rows * 8; i += 32) {
    out[rank * rows * 8 + i] = reinterpret_cast<uint4*>(box)[i];
  }
  __syncwarp();
  device::leave_cluster();
#endif
}

void run_load_for_both(const Tensor& input, const Tensor& output) {
  const bool is_im2col = input.dim() == 4;
  const int rows = static_cast<int>(input.size(is_im2col ? 2 : 0));
  const TensorMap map =
      is_im2col
          ? device::map_of(device::Im2col{
                tensor_of(input), {0, 0}, {0, 0}, {1, 1}, 64, rows / 2, device::Swizzle::k128Bytes})
          : device::map_of(
                device::Tiles{tensor_of(input), {64, rows / 2}, device::Swizzle::k128Bytes});
  device::launch(is_im2col ? load_for_both<true> : load_for_both<false>,
                 {2, 32, static_cast<size_t>(rows * kRowBytes + 1024 + 16), stream_of(input), 2},
                 map, static_cast<uint4*>(output.mutable_data_ptr()), rows);
}

// Four matrices of 8 x 8 through registers, the first and the last changing places.
__global__ void __launch_bounds__(32) move_matrices(const uint4* input, uint4* output) {
#if FUSED_RESNET_HAS_WARPGROUPS
  auto* const rows = reinterpret_cast<uint4*>(device::shared_memory());
  rows[threadIdx.x] = input[threadIdx.x];
  __syncwarp();
  uint32_t values[4];
  device::load_matrix_x4(values, rows + threadIdx.x);
  __syncwarp();
  device::store_matrix_x4(rows + threadIdx.x, {values[3], values[1], values[2], values[0]});
  __syncwarp();
  output[threadIdx.x] = rows[threadIdx.x];
#endif
}

void run_move_matrices(const Tensor& input, const Tensor& output) {
  device::launch(move_matrices, {1, 32, 512, stream_of(input)},
                 static_cast<const uint4*>(input.const_data_ptr()),
                 static_cast<uint4*>(output.mutable_data_ptr()));
}

// c = a b^T in 16 bits, a and b (64, depth), loaded by one warpgroup, multiplied by another, stored
// by TMA, in a ring of two stages; and one mistake in it where kWrong.
enum class Mistake {
  kNoWaitForLoad,
  kWrongParity,
  kNoWaitForEmpty,
  kEarlyRelease,
  kFewBytes,
  kManyBytes,
  kMissingArrival,
  kManyArrivals,
  kNoWaitForProducts,
  kNoFenceOfSums,
  kNoFenceForCopies,
  kNoBarrierBeforeStore,
  kNoWaitForStore,
  kNotPublished,
  kNotInitialised,
  kMisalignedLoad,
  kLoadBeyondEnd,
  kLoadOverMbarrier,
  kStoreOverMbarrier,
  kRowsBeginWithinEight,
  kRowsBeyondEnd,
  kRowsNotLoaded,
  kWarpsDiffer,
  kLanesDiffer,
  kHalfAWarp,
  kFewWarps,
  kManyRegisters,
  kLessIsMore,
  kOneWarpsRegisters,
  kWrongRank,
  kNoMap,
  kMissingThread,
  kOtherCount,
};

template <Mistake kMistake, bool kWrong>
__global__ void __launch_bounds__(384, 1)
    pipeline(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b,
             const __grid_constant__ TensorMap c, int steps) {
#if FUSED_RESNET_HAS_WARPGROUPS
  constexpr auto is = [](Mistake mistake) { return kWrong && kMistake == mistake; };
  constexpr int kTile = 64 * kRowBytes;
  char* const ring = device::aligned<1024>(device::shared_memory());
  char* const out = ring + 4 * kTile;
  auto* const full = reinterpret_cast<Mbarrier*>(out + kTile);
  Mbarrier* const empty = full + 2;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      device::initialize(full + i, 1);
      if (!is(Mistake::kNotInitialised)) device::initialize(empty + i, 4);
    }
    if (!is(Mistake::kNotPublished)) device::publish_mbarriers();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp < 4) {
    constexpr int kRegisters = is(Mistake::kManyRegisters) ? 160 : 40;
    if (!is(Mistake::kOneWarpsRegisters) || warp == 0) device::give_registers<kRegisters>();
    if (is(Mistake::kLessIsMore)) device::give_registers<64>();
    if (threadIdx.x == 0) {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % 2, parity = step / 2 & 1;
        char* const rows = ring + stage * 2 * kTile + (is(Mistake::kMisalignedLoad) ? 64 : 0);
        if (!is(Mistake::kNoWaitForEmpty)) device::wait(empty + stage, parity ^ 1);
        device::arrive_and_expect(full + stage, is(Mistake::kFewBytes)    ? kTile
                                                : is(Mistake::kManyBytes) ? 3 * kTile
                                                                          : 2 * kTile);
        if (is(Mistake::kWrongRank)) {
          device::load_tile(a, rows, full + stage, {step * 64, 0, 0});
        } else {
          device::load_tile(a, rows, full + stage, {step * 64, 0});
        }
        char* const other = is(Mistake::kLoadBeyondEnd)      ? out + kTile
                            : is(Mistake::kLoadOverMbarrier) ? out + kRowBytes
                                                             : rows + kTile;
        device::load_tile(is(Mistake::kNoMap) ? *reinterpret_cast<const TensorMap*>(&steps) : b,
                          other, full + stage, {step * 64, 0});
      }
    }
  } else if (warp < 8) {  // the others are there for their registers
    device::take_registers<232>();
    if (is(Mistake::kStoreOverMbarrier) && threadIdx.x == 128) full[1].state = 0;
    float sums[32];
    for (int step = 0; step < steps; ++step) {
      const int stage = step % 2, parity = step / 2 & 1;
      if (!is(Mistake::kNoWaitForLoad)) {
        device::wait(full + stage, is(Mistake::kWrongParity) ? parity ^ 1 : parity);
      }
      const char* const rows = ring + stage * 2 * kTile;
      if (step == 0 || !is(Mistake::kNoFenceOfSums)) device::fence_sums();
      const char* const first = is(Mistake::kRowsBeginWithinEight) ? rows + kRowBytes
                                : is(Mistake::kRowsBeyondEnd)      ? rows + 8 * kTile
                                : is(Mistake::kRowsNotLoaded)      ? out
                                                                   : rows;
      for (int byte = 0; byte < kRowBytes; byte += 32) {
        if (is(Mistake::kHalfAWarp) && lane >= 16) break;
        if (is(Mistake::kFewWarps) && warp == 7) break;
        const bool differs =
            (is(Mistake::kWarpsDiffer) && warp == 6) || (is(Mistake::kLanesDiffer) && lane == 6);
        device::multiply_warpgroup<__half, 64>(
            sums, device::rows_of_128_bytes(first, differs ? 96 - byte : byte),
            device::rows_of_128_bytes(rows + kTile, byte), step > 0 || byte > 0);
      }
      device::commit_products();
      if (!is(Mistake::kEarlyRelease) && !is(Mistake::kNoWaitForProducts)) {
        device::wait_for_products<0>();
      }
      const bool arrives = is(Mistake::kManyArrivals)     ? lane < 2
                           : is(Mistake::kMissingArrival) ? lane == 0 && warp != 7
                                                          : lane == 0;
      if (arrives) device::arrive(empty + stage);
      if (is(Mistake::kEarlyRelease)) device::wait_for_products<0>();
    }
    char* const row = out + (warp % 4 * 16 + lane % 16) * kRowBytes;
    for (int j = 0; j < 8; j += 2) {
      uint32_t values[4];
      for (int i = 0; i < 4; ++i) {
        const float* const pair = sums + (j + i / 2) * 4 + i % 2 * 2;
        values[i] = std::bit_cast<uint32_t>(device::Vector<__half, 2>{
            device::narrow<__half>(pair[0]), device::narrow<__half>(pair[1])});
      }
      device::store_matrix_x4(row + ((j + lane / 16) ^ lane % 8) * 16, values);
    }
    if (!is(Mistake::kNoFenceForCopies)) device::fence_for_copies();
    if (is(Mistake::kOtherCount) && warp == 7) {
      device::synchronize_threads<64>(1);
    } else if (!is(Mistake::kNoBarrierBeforeStore) && !(is(Mistake::kMissingThread) && warp == 7)) {
      device::synchronize_threads<128>(1);
    }
    if (threadIdx.x == 128) {
      device::store_tile(c, out, {0, 0});
      device::commit_stores();
      if (!is(Mistake::kNoWaitForStore)) device::wait_until_stores_have_read<0>();
    }
  }
#endif
}

// Each of two blocks loads half of the rows for both.
enum class ClusterMistake {
  kEarlyEnd,
  kNoBarrier,
  kAbsentBlock,
  kAbsentArrival,
  kNotPublished,
  kAlone
};

template <ClusterMistake kMistake, bool kWrong>
__global__ void __launch_bounds__(32)
    exchange(const __grid_constant__ TensorMap map, uint4* out, int rows) {
#if FUSED_RESNET_HAS_WARPGROUPS
  constexpr auto is = [](ClusterMistake mistake) { return kWrong && kMistake == mistake; };
  const int rank = static_cast<int>(device::rank_in_cluster()), half = rows / 2;
  char* const box = device::aligned<1024>(device::shared_memory());
  auto* const full = reinterpret_cast<Mbarrier*>(box + rows * kRowBytes);
  auto* const met = full + 1;
  if (threadIdx.x == 0) {
    device::initialize(full, 1);
    device::initialize(met, 2);
    if (!is(ClusterMistake::kNotPublished)) device::publish_mbarriers();
  }
  if (is(ClusterMistake::kNoBarrier)) {
    __syncthreads();
  } else {
    device::synchronize_cluster();
  }
  if (is(ClusterMistake::kEarlyEnd) && rank == 1) return;
  if (threadIdx.x == 0) {
    device::arrive_and_expect(full, rows * kRowBytes);
    const uint16_t blocks = is(ClusterMistake::kAbsentBlock) ? 5
                            : is(ClusterMistake::kAlone)     ? 1
                                                             : 3;
    device::load_tile_to_blocks(map, box + rank * half * kRowBytes, full, blocks, {0, rank * half});
  }
  device::wait(full, 0);
  if (threadIdx.x < 2) {
    device::arrive_in_block(met, threadIdx.x + (is(ClusterMistake::kAbsentArrival) ? 1 : 0));
  }
  device::wait(met, 0);
  for (int i = threadIdx.x; i < rows * 8; i += 32) {
    out[rank * rows * 8 + i] = reinterpret_cast<uint4*>(box)[i];
  }
  __syncwarp();
  device::leave_cluster();
#endif
}

#ifdef FUSED_RESNET_ON_HOST
#define BOTH(name)                                                  \
  {                                                                 \
    #name, {                                                        \
      pipeline<Mistake::name, false>, pipeline<Mistake::name, true> \
    }                                                               \
  }
using Pipeline = void (*)(const TensorMap, const TensorMap, const TensorMap, int);
const std::map<std::string, std::array<Pipeline, 2>> kPipelines = {
    BOTH(kNoWaitForLoad),
    BOTH(kWrongParity),
    BOTH(kNoWaitForEmpty),
    BOTH(kEarlyRelease),
    BOTH(kFewBytes),
    BOTH(kManyBytes),
    BOTH(kMissingArrival),
    BOTH(kManyArrivals),
    BOTH(kNoWaitForProducts),
    BOTH(kNoFenceOfSums),
    BOTH(kNoFenceForCopies),
    BOTH(kNoBarrierBeforeStore),
    BOTH(kNoWaitForStore),
    BOTH(kNotPublished),
    BOTH(kNotInitialised),
    BOTH(kMisalignedLoad),
    BOTH(kLoadBeyondEnd),
    BOTH(kLoadOverMbarrier),
    BOTH(kStoreOverMbarrier),
    BOTH(kRowsBeginWithinEight),
    BOTH(kRowsBeyondEnd),
    BOTH(kRowsNotLoaded),
    BOTH(kWarpsDiffer),
    BOTH(kLanesDiffer),
    BOTH(kHalfAWarp),
    BOTH(kFewWarps),
    BOTH(kManyRegisters),
    BOTH(kLessIsMore),
    BOTH(kOneWarpsRegisters),
    BOTH(kWrongRank),
    BOTH(kNoMap),
    BOTH(kMissingThread),
    BOTH(kOtherCount),
};
#undef BOTH
#define BOTH(name)                                                                \
  {                                                                               \
    #name, {                                                                      \
      exchange<ClusterMistake::name, false>, exchange<ClusterMistake::name, true> \
    }                                                                             \
  }
using Exchange = void (*)(const TensorMap, uint4*, int);
const std::map<std::string, std::array<Exchange, 2>> kExchanges = {
    BOTH(kEarlyEnd),      BOTH(kNoBarrier),    BOTH(kAbsentBlock),
    BOTH(kAbsentArrival), BOTH(kNotPublished), BOTH(kAlone),
};
#undef BOTH

void run_pipeline(const std::string& mistake, const Tensor& a, const Tensor& b, const Tensor& c,
                  bool wrong) {
  const auto map = [](const Tensor& rows) {
    return device::map_of(device::Tiles{tensor_of(rows), {64, 64}, device::Swizzle::k128Bytes});
  };
  device::launch(kPipelines.at(mistake)[wrong], {1, 384, 1024 + 5 * 64 * kRowBytes + 32}, map(a),
                 map(b), map(c), a.size(1) / 64);
}

void run_exchange(const std::string& mistake, const Tensor& input, const Tensor& output,
                  bool wrong) {
  const int rows = static_cast<int>(input.size(0));
  const TensorMap map =
      device::map_of(device::Tiles{tensor_of(input), {64, rows / 2}, device::Swizzle::k128Bytes});
  device::launch(kExchanges.at(mistake)[wrong],
                 {2, 32, static_cast<size_t>(rows * kRowBytes + 1024 + 16), nullptr, 2}, map,
                 static_cast<uint4*>(output.mutable_data_ptr()), rows);
}

// Asks a cache for the map of each number of rows of 64 elements of `tensor`, one after the other,
// in so many threads at once. Returns how many maps there were encoded by the time that the first
// thread had its i-th, then by the end, and how many of all threads' maps were not what encoding
// makes.
std::vector<int64_t> run_recall(const Tensor& tensor, std::vector<int64_t> rows, int64_t threads) {
  const auto described = [&](int64_t count) {
    device::Tiles tiles{tensor_of(tensor), {64, 8}, device::Swizzle::k128Bytes};
    tiles.tensor.sizes[1] = count;
    return tiles;
  };
  std::vector<TensorMap> right;
  for (const int64_t count : rows) right.push_back(device::map_of(described(count)));
  MapCache<device::Tiles> cache;
  const int64_t before = on_host::encoded_maps();
  std::vector<int64_t> encoded(rows.size());
  std::atomic<int64_t> wrong{0};
  std::atomic<bool> may_begin{false};
  const auto ask = [&](bool is_first) {
    while (!may_begin) {
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      const TensorMap map = cache.map_of(described(rows[i]));
      if (is_first) encoded[i] = on_host::encoded_maps() - before;
      if (std::memcmp(&map, &right[i], sizeof(map)) != 0) ++wrong;
    }
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(ask, false);
  may_begin = true;
  ask(true);
  for (std::thread& other : others) other.join();
  encoded.push_back(on_host::encoded_maps() - before);
  encoded.push_back(wrong);
  return encoded;
}
#endif

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_hopper, m)
{
  m.def("multiply(Tensor a, Tensor b, Tensor(a!) d, bool rounds=False) -> ()");
  m.def(
      "load(Tensor input, Tensor(a!) output, int[] box, int[] at, int[] offset, int[] corners, "
      "bool swizzled, bool rounds=False) -> ()");
  m.def(
      "store(Tensor values, Tensor(a!) output, int[] box, int[] at, bool swizzled, "
      "bool rounds=False) -> ()");
  m.def("load_for_both(Tensor input, Tensor(a!) output) -> ()");
  m.def("move_matrices(Tensor input, Tensor(a!) output) -> ()");
#ifdef FUSED_RESNET_ON_HOST
  m.def("pipeline(str mistake, Tensor a, Tensor b, Tensor(a!) c, bool wrong) -> ()");
  m.def("exchange(str mistake, Tensor input, Tensor(a!) output, bool wrong) -> ()");
  m.def("recall(Tensor tensor, int[] rows, int threads) -> int[]");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fused_resnet_hopper, FUSED_RESNET_DEVICE, m)
{
  m.impl("multiply", TORCH_BOX(&fused_resnet::run_multiply));
  m.impl("load", TORCH_BOX(&fused_resnet::run_load));
  m.impl("store", TORCH_BOX(&fused_resnet::run_store));
  m.impl("load_for_both", TORCH_BOX(&fused_resnet::run_load_for_both));
  m.impl("move_matrices", TORCH_BOX(&fused_resnet::run_move_matrices));
#ifdef FUSED_RESNET_ON_HOST
  m.impl("pipeline", TORCH_BOX(&fused_resnet::run_pipeline));
  m.impl("exchange", TORCH_BOX(&fused_resnet::run_exchange));
  m.impl("recall", TORCH_BOX(&fused_resnet::run_recall));
#endif
}
