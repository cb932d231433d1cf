// Small kernels that show what csrc/cuda_on_host does: the arithmetic of csrc/cuda/device, and
// every mistake it finds beside what would have been right.
#include <torch/csrc/stable/tensor.h>

#include <map>
#include <string>

#include "cuda/device/async_copy.cuh"
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

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_FRAGMENT(fused_resnet_on_host, m)
{
  m.def("test_multiply(Tensor a, Tensor b, Tensor(a!) d, bool transposed) -> ()");
  m.def("test_product(Tensor a, Tensor b, Tensor(a!) c, int mistake) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("test_multiply", TORCH_BOX(&fused_resnet::multiply));
  m.impl("test_product", TORCH_BOX(&fused_resnet::product));
}
