// Small kernels that show what csrc/cuda_on_host does: the arithmetic of csrc/cuda/device, and
// every mistake it finds beside what would have been right.
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <map>
#include <string>

#include "cuda/device/async_copy.cuh"
#include "cuda/device/cluster.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/device/mma.cuh"
#include "cuda/device/vector.cuh"

namespace fused_resnet {
namespace {

using torch::stable::Tensor;

constexpr int kM = 16, kN = 8;

// d += a b for one tile, a (16, depth) and b (8, depth) of 16-bit elements, both row by row.
template <typename T>
__global__ void multiply_16_bits(const T* a, const T* b, float* d) {
  char* shared = device::shared_memory();
  char* shared_b = shared + kM * 32;
  const int lane = threadIdx.x;
  device::copy_async_16(shared + lane * 16, a + lane * 8, true);
  if (lane < 16) device::copy_async_16(shared_b + lane * 16, b + lane * 8, true);
  device::commit_copies();
  device::wait_for_copies<0>();
  __syncthreads();
  uint32_t fragment_a[4], fragment_b[2];
  device::load_matrix_x4(fragment_a, shared + lane % 16 * 32 + lane / 16 * 16);
  device::load_matrix_x2(fragment_b, shared_b + lane % 8 * 32 + lane / 8 % 2 * 16);
  const int g = lane / 4, t = lane % 4;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * kN + 2 * t + i % 2];
  device::mma_16x8x16<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * kN + 2 * t + i % 2] = sums[i];
}

// The same with b (depth, 8).
template <typename T>
__global__ void multiply_transposed(const T* a, const T* b, float* d) {
  char* shared = device::shared_memory();
  char* shared_b = shared + kM * 32;
  const int lane = threadIdx.x;
  device::store<uint4, 1>(reinterpret_cast<uint4*>(shared) + lane,
                          device::load<uint4, 1>(reinterpret_cast<const uint4*>(a) + lane));
  if (lane < 16) {
    device::store<uint4, 1>(reinterpret_cast<uint4*>(shared_b) + lane,
                            device::load<uint4, 1>(reinterpret_cast<const uint4*>(b) + lane));
  }
  __syncthreads();
  uint32_t fragment_a[4], fragment_b[2];
  device::load_matrix_x4(fragment_a, shared + lane % 16 * 32 + lane / 16 * 16);
  device::load_matrix_x2_transposed(fragment_b, shared_b + lane % 16 * 16);
  const int g = lane / 4, t = lane % 4;
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * kN + 2 * t + i % 2];
  device::mma_16x8x16<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * kN + 2 * t + i % 2] = sums[i];
}

// a (16, 8) and b (8, 8), row by row, d += a b^T.
__global__ void multiply_tf32(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) {
    fragment_a[i] = device::to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  }
  for (int i = 0; i < 2; ++i) fragment_b[i] = device::to_tf32(b[g * 8 + t + i * 4]);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * kN + 2 * t + i % 2];
  device::mma_16x8x8_tf32(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * kN + 2 * t + i % 2] = sums[i];
}

// a (16, 32) unsigned and b (8, 32) signed, row by row, d += a b^T.
__global__ void multiply_bytes(const uint8_t* a, const int8_t* b, int* d) {
  char* shared = device::shared_memory();
  char* shared_b = shared + kM * 32;
  const int lane = threadIdx.x;
  device::copy_async_16(shared + lane * 16, a + lane * 16, true);
  if (lane < 16) device::copy_async_16(shared_b + lane * 16, b + lane * 16, true);
  device::commit_copies();
  device::wait_for_copies<0>();
  __syncthreads();
  uint32_t fragment_a[4], fragment_b[2];
  device::load_matrix_x4(fragment_a, shared + lane % 16 * 32 + lane / 16 * 16);
  device::load_matrix_x2(fragment_b, shared_b + lane % 8 * 32 + lane / 8 % 2 * 16);
  const int g = lane / 4, t = lane % 4;
  int sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * kN + 2 * t + i % 2];
  device::mma_16x8x32_bytes(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * kN + 2 * t + i % 2] = sums[i];
}

template <typename T, typename Kernel>
void run_multiply(Kernel kernel, const Tensor& a, const Tensor& b, const Tensor& d) {
  device::launch(kernel, {1, 32, (kM + kN) * 32}, static_cast<const T*>(a.const_data_ptr()),
                 static_cast<const T*>(b.const_data_ptr()),
                 static_cast<float*>(d.mutable_data_ptr()));
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& d, bool transposed) {
  switch (a.scalar_type()) {
    case torch::headeronly::ScalarType::Half:
      return run_multiply<__half>(
          transposed ? multiply_transposed<__half> : multiply_16_bits<__half>, a, b, d);
    case torch::headeronly::ScalarType::BFloat16:
      return run_multiply<__nv_bfloat16>(
          transposed ? multiply_transposed<__nv_bfloat16> : multiply_16_bits<__nv_bfloat16>, a, b,
          d);
    case torch::headeronly::ScalarType::Byte:
      device::launch(
          multiply_bytes, {1, 32, (kM + kN) * 32}, static_cast<const uint8_t*>(a.const_data_ptr()),
          static_cast<const int8_t*>(b.const_data_ptr()), static_cast<int*>(d.mutable_data_ptr()));
      return;
    default:
      return run_multiply<float>(multiply_tf32, a, b, d);
  }
}

constexpr int kTile = 64, kDepth = 32, kPitch = kDepth * 2 + 16, kStages = 3;

enum class Mistake { kNone, kNoWait, kNoBarrier, kEarlyCopy };

// c = a b^T by tiles of 64 x 64, a (M, depth) and b (N, depth), with copies two tiles ahead.
template <Mistake kMistake>
__global__ void __launch_bounds__(128)
    matrix_product(const __half* a, const __half* b, float* c, int depth) {
  char* shared = device::shared_memory();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = int64_t{blockIdx.x} * kTile, first_column = int64_t{blockIdx.y} * kTile;
  const int steps = depth / kDepth;
  const auto copy_tile = [&](int step) {
    char* stage = shared + step % kStages * 2 * kTile * kPitch;
    for (int v = threadIdx.x; step < steps && v < kTile * 4; v += 128) {
      const int row = v / 4, column = v % 4;
      const int64_t offset = step * kDepth + column * 8;
      char* target = stage + row * kPitch + column * 16;
      device::copy_async_16(target, a + (first_row + row) * depth + offset, true);
      device::copy_async_16(target + kTile * kPitch, b + (first_column + row) * depth + offset,
                            true);
    }
    device::commit_copies();
  };
  for (int step = 0; step < kStages - 1; ++step) copy_tile(step);

  float sums[kTile / 8][4] = {};
  for (int step = 0; step < steps; ++step) {
    if (kMistake != Mistake::kNoWait) device::wait_for_copies<kStages - 2>();
    if (kMistake == Mistake::kEarlyCopy) copy_tile(step + kStages - 1);
    if (kMistake != Mistake::kNoBarrier) __syncthreads();
    if (kMistake != Mistake::kEarlyCopy) copy_tile(step + kStages - 1);
    const char* stage_a = shared + step % kStages * 2 * kTile * kPitch;
    const char* stage_b = stage_a + kTile * kPitch;
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t rows[4], columns[4];
      device::load_matrix_x4(rows,
                             stage_a + (warp * 16 + lane % 16) * kPitch + k * 2 + lane / 16 * 16);
      for (int n = 0; n < kTile; n += 16) {
        device::load_matrix_x4(
            columns, stage_b + (n + lane / 16 * 8 + lane % 8) * kPitch + k * 2 + lane / 8 % 2 * 16);
        device::mma_16x8x16<__half>(sums[n / 8], rows, {columns[0], columns[1]});
        device::mma_16x8x16<__half>(sums[n / 8 + 1], rows, {columns[2], columns[3]});
      }
    }
  }
  const int64_t row = first_row + warp * 16 + lane / 4;
  for (int n = 0; n < kTile / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int64_t column = first_column + n * 8 + lane % 4 * 2 + i % 2;
      c[(row + i / 2 * 8) * (int64_t{gridDim.y} * kTile) + column] = sums[n][i];
    }
  }
}

void product(const Tensor& a, const Tensor& b, const Tensor& c, int64_t mistake) {
  using Kernel = void (*)(const __half*, const __half*, float*, int);
  constexpr Kernel kKernels[] = {matrix_product<Mistake::kNone>, matrix_product<Mistake::kNoWait>,
                                 matrix_product<Mistake::kNoBarrier>,
                                 matrix_product<Mistake::kEarlyCopy>};
  const dim3 blocks(a.size(0) / kTile, b.size(0) / kTile);
  device::launch(kKernels[mistake], {blocks, 128, kStages * 2 * kTile * kPitch},
                 static_cast<const __half*>(a.const_data_ptr()),
                 static_cast<const __half*>(b.const_data_ptr()),
                 static_cast<float*>(c.mutable_data_ptr()), a.size(1));
}

// Each of these writes its input to its output, in blocks of kThreads, with the help of shared
// memory for kThreads floats. Where kWrong it makes one mistake, at the line that is marked with
// the kernel's name.
constexpr int kThreads = 64;

__device__ __forceinline__ float* shared_floats() {
  return reinterpret_cast<float*>(device::shared_memory());
}

__device__ __forceinline__ int this_element() {
  return blockIdx.x * kThreads + threadIdx.x;
}

template <bool kWrong>
__global__ void missing_barrier(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = 0;
  __syncthreads();
  const int mirrored = kThreads - 1 - threadIdx.x;
  shared[mirrored] = input[this_element() - threadIdx.x + mirrored];  // missing_barrier
  if (!kWrong) __syncthreads();
  output[this_element()] = shared[threadIdx.x];  // missing_barrier
}

// Threads of a warp need one too.
template <bool kWrong>
__global__ void missing_warp_barrier(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x ^ 1] = input[this_element() ^ 1];  // missing_warp_barrier
  if (!kWrong) __syncwarp();
  output[this_element()] = shared[threadIdx.x];  // missing_warp_barrier
}

// What was read may only be written again after a barrier.
template <bool kWrong>
__global__ void reused_early(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = input[this_element()];
  __syncthreads();
  const float mirrored = shared[kThreads - 1 - threadIdx.x];  // reused_early
  if (!kWrong) __syncthreads();
  shared[threadIdx.x] = mirrored;  // reused_early
  __syncthreads();
  output[this_element()] = shared[kThreads - 1 - threadIdx.x];
}

template <bool kWrong>
__global__ void missing_wait(const float* input, float* output) {
  float* shared = shared_floats();
  device::copy_async<4>(shared + threadIdx.x, input + this_element(), true);
  device::commit_copies();
  if (!kWrong) device::wait_for_copies<0>();
  __syncthreads();
  output[this_element()] = shared[threadIdx.x];  // missing_wait
}

// The group that is waited for is not the one that is read.
template <bool kWrong>
__global__ void wait_for_too_few(const float* input, float* output) {
  float* shared = shared_floats();
  if (threadIdx.x < 32) device::copy_async<4>(shared + threadIdx.x, input + this_element(), true);
  device::commit_copies();
  if (threadIdx.x >= 32) device::copy_async<4>(shared + threadIdx.x, input + this_element(), true);
  device::commit_copies();
  device::wait_for_copies<kWrong ? 1 : 0>();
  output[this_element()] = shared[threadIdx.x];  // wait_for_too_few
}

template <bool kWrong>
__global__ void load_past_end(const float* input, float* output) {
  const float next = input[this_element() + (kWrong ? 1 : 0)];  // load_past_end
  output[this_element()] = kWrong ? next : input[this_element()];
}

template <bool kWrong>
__global__ void load_before_begin(const float* input, float* output) {
  const float last = input[this_element() - (kWrong ? 1 : 0)];  // load_before_begin
  output[this_element()] = kWrong ? last : input[this_element()];
}

template <bool kWrong>
__global__ void store_past_end(const float* input, float* output) {
  output[this_element() + (kWrong ? 1 : 0)] = input[this_element()];  // store_past_end
}

template <bool kWrong>
__global__ void copy_past_end(const float* input, float* output) {
  float* shared = shared_floats();
  const float* source = input + this_element() + (kWrong ? 1 : 0);
  device::copy_async<4>(shared + threadIdx.x, source, true);  // copy_past_end
  device::commit_copies();
  device::wait_for_copies<0>();
  output[this_element()] = shared[threadIdx.x];
}

template <bool kWrong>
__global__ void shared_past_end(const float* input, float* output) {
  float* shared = shared_floats() + (kWrong ? 1 : 0);
  shared[threadIdx.x] = input[this_element()];  // shared_past_end
  output[this_element()] = shared[threadIdx.x];
}

template <bool kWrong>
__global__ void wild_pointer(const float* input, float* output) {
  const int64_t far = kWrong && threadIdx.x == 7 ? int64_t{1} << 40 : 0;
  output[this_element()] = input[this_element() - far];  // wild_pointer
}

template <bool kWrong>
__global__ void barrier_after_exit(const float* input, float* output) {
  output[this_element()] = input[this_element()];
  if (kWrong && threadIdx.x == 5) return;
  __syncthreads();  // barrier_after_exit
}

template <bool kWrong>
__global__ void barrier_in_branch(const float* input, float* output) {
  output[this_element()] = input[this_element()];
  if (kWrong && threadIdx.x < 32) {
    __syncthreads();  // barrier_in_branch
  } else {
    __syncthreads();  // barrier_in_branch
  }
  if (!kWrong) __syncthreads();
}

template <bool kWrong>
__global__ void uninitialised(const float* input, float* output) {
  float* shared = shared_floats();
  if (!kWrong || threadIdx.x != 9) shared[threadIdx.x] = input[this_element()];
  __syncthreads();
  output[this_element()] = shared[threadIdx.x];  // uninitialised
}

template <bool kWrong>
__global__ void misaligned_load(const float* input, float* output) {
  if (threadIdx.x % 4 == 0) {
    const float* source = input + this_element() + (kWrong && threadIdx.x == 8 ? 2 : 0);
    const auto four = device::load<float, 4>(source);  // misaligned_load
    device::store(output + this_element(), four);
  }
}

template <bool kWrong>
__global__ void misaligned_store(const float* input, float* output) {
  if (threadIdx.x % 4 == 0) {
    const auto four = device::load<float, 4>(input + this_element());
    float* target = output + this_element() + (kWrong && threadIdx.x == 12 ? 1 : 0);
    device::store(target, four);  // misaligned_store
  }
}

template <bool kWrong>
__global__ void misaligned_plain_load(const float* input, float* output) {
  if (threadIdx.x % 2 == 0) {
    const float* source = input + this_element() + (kWrong && threadIdx.x == 6 ? 1 : 0);
    const float2 two = *reinterpret_cast<const float2*>(source);  // misaligned_plain_load
    output[this_element()] = two.x;
    output[this_element() + 1] = two.y;
  }
}

template <bool kWrong>
__global__ void misaligned_copy(const float* input, float* output) {
  float* shared = shared_floats();
  if (threadIdx.x % 4 == 0) {
    const float* source = input + this_element() - (kWrong && threadIdx.x == 16 ? 1 : 0);
    device::copy_async_16(shared + threadIdx.x, source, true);  // misaligned_copy
  }
  device::commit_copies();
  device::wait_for_copies<0>();
  __syncthreads();
  output[this_element()] = shared[threadIdx.x];
}

template <bool kWrong>
__global__ void shuffle_by_half_a_warp(const float* input, float* output) {
  float x = input[this_element()];
  if (!kWrong || threadIdx.x % 32 < 16) {
    x = __shfl_xor_sync(0xffffffffu, x, 1);  // shuffle_by_half_a_warp
    x = __shfl_xor_sync(0xffffffffu, x, 1);
  }
  output[this_element()] = x;
}

template <bool kWrong>
__global__ void mma_by_half_a_warp(const float* input, float* output) {
  float sums[4] = {input[this_element()]};
  const uint32_t a[4] = {}, b[2] = {};
  if (!kWrong || threadIdx.x % 32 < 16) {
    device::mma_16x8x16<__half>(sums, a, b);  // mma_by_half_a_warp
  }
  output[this_element()] = sums[0];
}

template <bool kWrong>
__global__ void shuffle_from_absent_lane(const float* input, float* output) {
  const float x = input[this_element()];
  float same = x;
  if (threadIdx.x % 32 < 16) {
    const int lane = threadIdx.x % 32 ^ (kWrong ? 16 : 0);
    same = __shfl_sync(0xffffu, x, lane);  // shuffle_from_absent_lane
  }
  output[this_element()] = same;
}

template <bool kWrong>
__global__ void operations_of_a_warp_differ(const float* input, float* output) {
  if (kWrong && threadIdx.x % 32 == 3) {
    __syncwarp();  // operations_of_a_warp_differ
  } else {
    __any_sync(0xffffffffu, 1);  // operations_of_a_warp_differ
  }
  output[this_element()] = input[this_element()];
}

// The others run in clusters of two blocks, each of which writes what the other has in its shared
// memory.
__device__ __forceinline__ int element_of_other_block() {
  return this_element() + (blockIdx.x % 2 == 0 ? kThreads : -kThreads);
}

__device__ __forceinline__ unsigned other_rank() {
  return 1 - device::rank_in_cluster();
}

template <bool kWrong>
__global__ void cluster_missing_barrier(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = 0;
  device::synchronize_cluster();
  shared[threadIdx.x] = input[this_element()];
  if (kWrong) {
    __syncthreads();
  } else {
    device::synchronize_cluster();
  }
  const float value =
      device::load_from_block(shared + threadIdx.x, other_rank());  // cluster_missing_barrier
  output[element_of_other_block()] = value;
  device::leave_cluster();
}

// What another block reads may only be written again after a barrier of the cluster.
template <bool kWrong>
__global__ void cluster_reused_early(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = input[this_element()];
  device::synchronize_cluster();
  const float value =
      device::load_from_block(shared + threadIdx.x, other_rank());  // cluster_reused_early
  if (!kWrong) device::synchronize_cluster();
  shared[threadIdx.x] = value;
  __syncthreads();
  output[element_of_other_block()] = shared[threadIdx.x];
  device::leave_cluster();
}

// The block that comes last reads what the other one has stored. Two blocks a grid.
enum class Handover {
  kRight,
  kNoBarrierBefore,
  kNoFenceBefore,
  kLateFence,
  kNoFenceBehind,
  kFenceBehindBarrier,
  kEarlyTicket,
  kNoTicket
};

__device__ unsigned tickets = 0;

template <Handover kKind>
__device__ __forceinline__ float taken_over(float value, float* output) {
  if (kKind != Handover::kEarlyTicket) output[this_element()] = value;  // handover
  if (kKind != Handover::kNoBarrierBefore) __syncthreads();
  bool is_last = kKind == Handover::kNoTicket && blockIdx.x == 1;
  if (kKind != Handover::kNoTicket && threadIdx.x == 0) {
    if (kKind != Handover::kNoFenceBefore && kKind != Handover::kLateFence) __threadfence();
    is_last = atomicAdd(&tickets, 1u) % 2 == 1;
    if (kKind == Handover::kLateFence) __threadfence();
    if (kKind != Handover::kNoFenceBehind && kKind != Handover::kFenceBehindBarrier) {
      __threadfence();
    }
  }
  is_last = __syncthreads_or(is_last) != 0;
  if (kKind == Handover::kEarlyTicket) output[this_element()] = value;  // handover
  if (kKind == Handover::kFenceBehindBarrier && threadIdx.x == 0) __threadfence();
  return is_last ? output[element_of_other_block()] : value;  // handover
}

template <Handover kKind>
__device__ __forceinline__ void hand_over(const float* input, float* output) {
  const float value = input[this_element()];
  const float taken = taken_over<kKind>(value, output);
  // Whoever took over puts the other's there again. What was no number then shows in its own.
  if (taken != value) {
    output[element_of_other_block()] = taken;  // handover
    output[this_element()] = value + 0.f * taken;
  }
}

#define HANDOVER(name, kind)                                              \
  template <bool kWrong>                                                  \
  __global__ void name(const float* input, float* output) {               \
    hand_over<kWrong ? Handover::kind : Handover::kRight>(input, output); \
  }

HANDOVER(handover_without_barrier, kNoBarrierBefore)
HANDOVER(handover_without_fence, kNoFenceBefore)
HANDOVER(handover_fenced_late, kLateFence)
HANDOVER(handover_without_second_fence, kNoFenceBehind)
HANDOVER(handover_fenced_behind_barrier, kFenceBehindBarrier)
// A ticket that says what has not been stored yet; and one block that takes the other to be done.
HANDOVER(handover_with_early_ticket, kEarlyTicket)
HANDOVER(handover_without_ticket, kNoTicket)

// Blocks that run side by side may store in any order.
template <bool kWrong>
__global__ void stored_by_two_blocks(const float* input, float* output) {
  if (kWrong) output[threadIdx.x] = input[threadIdx.x];  // stored_by_two_blocks
  output[this_element()] = input[this_element()];        // stored_by_two_blocks
}

// A barrier of the cluster orders stores to global memory too.
template <bool kWrong>
__global__ void cluster_reads_global(const float* input, float* output) {
  output[this_element()] = input[this_element()];
  if (kWrong) {
    __syncthreads();
  } else {
    device::synchronize_cluster();
  }
  const float other = output[element_of_other_block()];  // cluster_reads_global
  device::synchronize_cluster();
  output[element_of_other_block()] = other;
}

template <bool kWrong>
__global__ void cluster_early_end(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = input[this_element()];
  device::synchronize_cluster();
  const float value =
      device::load_from_block(shared + threadIdx.x, other_rank());  // cluster_early_end
  output[element_of_other_block()] = value;
  if (!kWrong) device::leave_cluster();
}

template <bool kWrong>
__global__ void cluster_uninitialised(const float* input, float* output) {
  float* shared = shared_floats();
  if (!kWrong || threadIdx.x != 9) shared[threadIdx.x] = input[this_element()];
  device::synchronize_cluster();
  const float value =
      device::load_from_block(shared + threadIdx.x, other_rank());  // cluster_uninitialised
  output[element_of_other_block()] = value;
  device::leave_cluster();
}

template <bool kWrong>
__global__ void cluster_missing_wait(const float* input, float* output) {
  float* shared = shared_floats();
  device::copy_async<4>(shared + threadIdx.x, input + this_element(), true);
  device::commit_copies();
  if (!kWrong) device::wait_for_copies<0>();
  device::synchronize_cluster();
  const float value =
      device::load_from_block(shared + threadIdx.x, other_rank());  // cluster_missing_wait
  output[element_of_other_block()] = value;
  device::leave_cluster();
}

template <bool kWrong>
__global__ void cluster_past_end(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = input[this_element()];
  device::synchronize_cluster();
  const float* source = shared + threadIdx.x + (kWrong ? 1 : 0);
  const float value = device::load_from_block(source, other_rank());  // cluster_past_end
  output[element_of_other_block()] = value;
  device::leave_cluster();
}

template <bool kWrong>
__global__ void cluster_misaligned(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = input[this_element()];
  device::synchronize_cluster();
  const char* address = reinterpret_cast<char*>(shared + threadIdx.x);
  const auto* source =
      reinterpret_cast<const float*>(address + (kWrong && threadIdx.x == 6 ? 2 : 0));
  const float value = device::load_from_block(source, other_rank());  // cluster_misaligned
  output[element_of_other_block()] = value;
  device::leave_cluster();
}

template <bool kWrong>
__global__ void cluster_absent_block(const float* input, float* output) {
  float* shared = shared_floats();
  shared[threadIdx.x] = input[this_element()];
  device::synchronize_cluster();
  const unsigned rank = kWrong && threadIdx.x == 3 ? 2 : other_rank();
  const float value = device::load_from_block(shared + threadIdx.x, rank);  // cluster_absent_block
  output[element_of_other_block()] = value;
  device::leave_cluster();
}

template <bool kWrong>
__global__ void cluster_barrier_after_exit(const float* input, float* output) {
  output[this_element()] = input[this_element()];
  if (kWrong && threadIdx.x == 5) return;
  device::synchronize_cluster();  // cluster_barrier_after_exit
}

template <bool kWrong>
__global__ void cluster_barrier_in_branch(const float* input, float* output) {
  output[this_element()] = input[this_element()];
  if (kWrong && threadIdx.x < 32) {
    device::synchronize_cluster();  // cluster_barrier_in_branch
  } else {
    device::synchronize_cluster();  // cluster_barrier_in_branch
  }
}

// Of two kinds, neither of which all threads come to.
template <bool kWrong>
__global__ void cluster_barriers_differ(const float* input, float* output) {
  output[this_element()] = input[this_element()];
  if (kWrong && threadIdx.x < 32) {
    __syncthreads();  // cluster_barriers_differ
  } else {
    device::synchronize_cluster();  // cluster_barriers_differ
  }
}

template <bool kWrong>
__global__ void cluster_block_ends(const float* input, float* output) {
  output[this_element()] = input[this_element()];
  if (kWrong && device::rank_in_cluster() == 1) return;
  device::synchronize_cluster();  // cluster_block_ends
}

using Copying = void (*)(const float*, float*);

#define BOTH(kernel)              \
  {                               \
    #kernel, {                    \
      kernel<false>, kernel<true> \
    }                             \
  }
const std::map<std::string, std::array<Copying, 2>> kCopying = {
    BOTH(missing_barrier),
    BOTH(missing_warp_barrier),
    BOTH(reused_early),
    BOTH(missing_wait),
    BOTH(wait_for_too_few),
    BOTH(load_past_end),
    BOTH(load_before_begin),
    BOTH(store_past_end),
    BOTH(copy_past_end),
    BOTH(shared_past_end),
    BOTH(wild_pointer),
    BOTH(barrier_after_exit),
    BOTH(barrier_in_branch),
    BOTH(uninitialised),
    BOTH(misaligned_load),
    BOTH(misaligned_store),
    BOTH(misaligned_plain_load),
    BOTH(misaligned_copy),
    BOTH(shuffle_by_half_a_warp),
    BOTH(mma_by_half_a_warp),
    BOTH(shuffle_from_absent_lane),
    BOTH(operations_of_a_warp_differ),
    BOTH(handover_without_barrier),
    BOTH(handover_without_fence),
    BOTH(handover_fenced_late),
    BOTH(handover_without_second_fence),
    BOTH(handover_fenced_behind_barrier),
    BOTH(handover_with_early_ticket),
    BOTH(handover_without_ticket),
    BOTH(stored_by_two_blocks),
    BOTH(cluster_reads_global),
    BOTH(cluster_missing_barrier),
    BOTH(cluster_reused_early),
    BOTH(cluster_early_end),
    BOTH(cluster_uninitialised),
    BOTH(cluster_missing_wait),
    BOTH(cluster_past_end),
    BOTH(cluster_misaligned),
    BOTH(cluster_absent_block),
    BOTH(cluster_barrier_after_exit),
    BOTH(cluster_barrier_in_branch),
    BOTH(cluster_barriers_differ),
    BOTH(cluster_block_ends),
};

void copy(const std::string& kernel, const Tensor& input, const Tensor& output, bool wrong) {
  const unsigned blocks = input.numel() / kThreads;
  const unsigned cluster = kernel.starts_with("cluster_") ? 2 : 1;
  device::launch(kCopying.at(kernel)[wrong],
                 {blocks, kThreads, kThreads * sizeof(float), nullptr, cluster},
                 static_cast<const float*>(input.const_data_ptr()),
                 static_cast<float*>(output.mutable_data_ptr()));
}

// output[0]: sums of every element's index, over atomics; output[1 + i]: what collectives say.
__global__ void collectives(const int* input, int* output) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, lane = threadIdx.x % 32;
  const int x = input[i];
  int* row = output + 1 + i * 12;
  row[0] = atomicAdd(output, x) >= 0;
  row[1] = __shfl_xor_sync(0xffffffffu, x, 5);
  row[2] = __shfl_down_sync(0xffffffffu, x, 3);
  row[3] = __shfl_up_sync(0xffffffffu, x, 3, 16);
  row[4] = __shfl_sync(0xffffffffu, x, 7, 8);
  row[5] = static_cast<int>(__ballot_sync(0xffffffffu, x % 2));
  row[6] = __any_sync(0xffffffffu, x == 3);
  row[7] = __all_sync(0xffffffffu, x >= 0);
  row[8] = __syncthreads_or(x == 3);
  row[9] = __syncthreads_count(x % 2);
  row[10] = -1;
  if (lane >= 24) row[10] = __shfl_xor_sync(0xff000000u, x, 1);
  row[11] = __syncthreads_and(x >= 0);
}

void run_collectives(const Tensor& input, const Tensor& output) {
  const unsigned blocks = input.numel() / kThreads;
  device::launch(collectives, {blocks, kThreads}, static_cast<const int*>(input.const_data_ptr()),
                 static_cast<int*>(output.mutable_data_ptr()));
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_on_host, m)
{
  m.def("test_multiply(Tensor a, Tensor b, Tensor(a!) d, bool transposed) -> ()");
  m.def("test_product(Tensor a, Tensor b, Tensor(a!) c, int mistake) -> ()");
  m.def("test_copy(str kernel, Tensor input, Tensor(a!) output, bool wrong) -> ()");
  m.def("test_collectives(Tensor input, Tensor(a!) output) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("test_multiply", TORCH_BOX(&fused_resnet::multiply));
  m.impl("test_product", TORCH_BOX(&fused_resnet::product));
  m.impl("test_copy", TORCH_BOX(&fused_resnet::copy));
  m.impl("test_collectives", TORCH_BOX(&fused_resnet::run_collectives));
}
