// The operators stem_max_pool and max_pool_channels_last: what stem.cuh computes, on tensors. Both
// allocate the output, launch once and convert nothing.
#include "cuda/stem.cuh"

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#include "cuda/conv_heuristics.h"
#include "cuda/gpu_of.h"
#include "cuda/library.h"
#include "cuda/tensors.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMostBlocks = std::numeric_limits<int32_t>::max();  // CUDA's limit of gridDim.x
constexpr int64_t kMostSize = 1 << 24;  // of an image, whose rows are numbered in bytes of 32 bits
constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 16);
constexpr unsigned kPoolThreads = 256, kMostPoolBlocks = 1 << 20;

// `rows_each` is how many pooled rows a block computes, or 0 for what choose_stem says.
Tensor stem_max_pool_of(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var,
                        std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, double eps,
                        std::optional<Tensor> bias, bool relu, int64_t rows_each) {
  constexpr const char* op = "stem_max_pool";
  using Tile = StemTile;
  check_rank(op, "input", input, 4);
  check_rank(op, "weight", weight, 4);
  const ScalarType dtype = input.scalar_type();
  FR_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, op, ": input is ",
           dtype_string(input), ", must be float16 or bfloat16");
  check_dtype(op, "weight", weight, dtype);
  check_device(op, "weight", weight, input);
  check_eps(op, eps);
  const int64_t N = input.size(0), H = input.size(2), W = input.size(3), K = weight.size(0);
  FR_CHECK(input.size(1) == Tile::kChannels && weight.size(1) == Tile::kChannels &&
               weight.size(2) == Tile::kTaps && weight.size(3) == Tile::kTaps && K > 0 &&
               K % 8 == 0,
           op, ": weight has shape ", shape_string(weight),
           ", must be (K, 3, 7, 7), K a multiple "
           "of 8, of an input with 3 channels");
  check_number(op, "input's height", H, 1, kMostSize);
  check_number(op, "input's width", W, 1, kMostSize);
  check_number(op, "rows_each", rows_each, 0, kMostSize);
  const int64_t P = (H - 1) / 2 + 1, Q = (W - 1) / 2 + 1;
  const int64_t pooled_P = (P - 1) / 2 + 1, pooled_Q = (Q - 1) / 2 + 1;
  checked_product(op, "the output", {N, pooled_P, pooled_Q, K, 8});

  const DeviceGuard guard(input.get_device_index());
  Tensor output = empty({N, K, pooled_P, pooled_Q}, {pooled_P * pooled_Q * K, 1, pooled_Q * K, K},
                        dtype, input);
  if (output.numel() == 0) return output;
  if (rows_each == 0) {
    rows_each = choose_stem({N, H, W, K}, gpu_of(input.get_device_index())).rows_each;
  }
  const int64_t groups = (pooled_P + rows_each - 1) / rows_each;
  const int64_t blocks = checked_product(op, "the grid", {N, groups, Tile::strips(pooled_Q)});
  const int64_t slabs = (K + Tile::kFilters - 1) / Tile::kFilters;
  FR_CHECK(blocks <= kMostBlocks && slabs <= 65535, op, ": the input takes more than ", kMostBlocks,
           " blocks, or weight has too many filters");
  const auto is_in_chunks = [](int64_t elements) { return elements % 8 == 0; };
  const bool rows_are_chunks =
      is_aligned(input) && input.stride(1) == 1 && (W == 1 || input.stride(3) == Tile::kChannels) &&
      is_in_chunks(W * Tile::kChannels) && (H == 1 || is_in_chunks(input.stride(2))) &&
      (N == 1 || is_in_chunks(input.stride(0)));
  std::optional<Tensor> mean = running_mean, var = running_var;
  const Stem stem{
      .input = input.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .running_mean = parameter_of("running_mean", mean, K, input),
      .running_var = parameter_of("running_var", var, K, input),
      .bn_weight = parameter_of("bn_weight", bn_weight, K, input),
      .bn_bias = parameter_of("bn_bias", bn_bias, K, input),
      .bias = parameter_of("bias", bias, K, input),
      .eps = static_cast<float>(eps),
      .floor = relu ? 0.f : -std::numeric_limits<float>::infinity(),
      .H = static_cast<int>(H),
      .W = static_cast<int>(W),
      .P = static_cast<int>(P),
      .Q = static_cast<int>(Q),
      .K = static_cast<int>(K),
      .pooled_P = static_cast<int>(pooled_P),
      .pooled_Q = static_cast<int>(pooled_Q),
      .strips = Tile::strips(pooled_Q),
      .row_groups = static_cast<int>(groups),
      .rows_each = static_cast<int>(rows_each),
      .input_n = input.stride(0),
      .input_h = input.stride(2),
      .input_w = input.stride(3),
      .input_c = input.stride(1),
      .weight_k = weight.stride(0),
      .weight_c = weight.stride(1),
      .weight_r = weight.stride(2),
      .weight_s = weight.stride(3),
      .rows_are_chunks = rows_are_chunks,
  };
  const device::Grid grid{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(slabs)),
                          Tile::kThreads, Tile::shared_bytes(),
                          current_stream(input.get_device_index())};
  if (dtype == ScalarType::Half) {
    device::launch(stem_max_pool<__half>, grid, stem);
  } else {
    device::launch(stem_max_pool<__nv_bfloat16>, grid, stem);
  }
  return output;
}

// Pooled rows of a block, and the cycles that all takes, of {N, H, W, K} on a GPU as in
// conv_tiles_for.
std::vector<int64_t> stem_rows_each(std::vector<int64_t> problem, std::vector<int64_t> gpu) {
  FR_CHECK(problem.size() == 4 && gpu.size() == 4, "stem_rows_each: takes four numbers and four");
  for (const int64_t number : problem) check_number("stem_rows_each", "problem", number, 1);
  for (const int64_t number : gpu) check_number("stem_rows_each", "gpu", number, 1);
  const Gpu asked{static_cast<int>(gpu[0]), static_cast<int>(gpu[1]), static_cast<int>(gpu[2]),
                  static_cast<int>(gpu[3])};
  const StemChoice choice = choose_stem({problem[0], problem[1], problem[2], problem[3]}, asked);
  return {choice.rows_each, static_cast<int64_t>(choice.cycles)};
}

template <typename T>
void launch_max_pool(const MaxPool& pool, bool whole, cudaStream_t stream) {
  constexpr int kChannels = 16 / sizeof(T);
  const int64_t threads = pool.pixels * (whole ? pool.C / kChannels : pool.C);
  const int64_t blocks = (threads + kPoolThreads - 1) / kPoolThreads;
  const device::Grid grid{static_cast<unsigned>(std::min<int64_t>(blocks, kMostPoolBlocks)),
                          kPoolThreads, 0, stream};
  device::launch(whole ? max_pool<T, kChannels> : max_pool<T, 1>, grid, pool);
}

// `pool` is kernel size, stride and padding, two numbers each. The input must be dense and
// channels_last, as a convolution here leaves it.
Tensor max_pool_channels_last(Tensor input, std::vector<int64_t> pool) {
  constexpr const char* op = "max_pool_channels_last";
  check_rank(op, "input", input, 4);
  check_floating(op, "input", input, false);
  FR_CHECK(pool.size() == 6, op, ": pool has ", pool.size(), " numbers, must have 6");
  FR_CHECK(is_dense_channels_last(input), op, ": input must be dense and channels_last");
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  for (const int i : {0, 1}) {
    check_number(op, "the pool's window", pool[i], 1);
    FR_CHECK(0 <= pool[i + 4] && pool[i + 4] <= pool[i] / 2, op, ": the pool's padding is ",
             pool[i + 4], ", must be at most half its window of ", pool[i]);
  }
  const int64_t P = FilterAxis(op, H, pool[0], pool[2], pool[4], 1).outputs;
  const int64_t Q = FilterAxis(op, W, pool[1], pool[3], pool[5], 1).outputs;
  FR_CHECK(
      H < kMostPixels && W < kMostPixels && C < kMostPixels && P < kMostPixels && Q < kMostPixels,
      op, ": a size is over ", kMostPixels);
  checked_product(op, "the output", {N, P, Q, C, 8});

  const DeviceGuard guard(input.get_device_index());
  Tensor output = empty({N, C, P, Q}, {P * Q * C, 1, Q * C, C}, input.scalar_type(), input);
  if (output.numel() == 0) return output;
  const MaxPool windows{
      .input = input.const_data_ptr(),
      .output = output.mutable_data_ptr(),
      .pixels = N * P * Q,
      .H = static_cast<int>(H),
      .W = static_cast<int>(W),
      .C = static_cast<int>(C),
      .P = static_cast<int>(P),
      .Q = static_cast<int>(Q),
      .R = static_cast<int>(pool[0]),
      .S = static_cast<int>(pool[1]),
      .stride_h = static_cast<int>(pool[2]),
      .stride_w = static_cast<int>(pool[3]),
      .pad_h = static_cast<int>(pool[4]),
      .pad_w = static_cast<int>(pool[5]),
  };
  const cudaStream_t stream = current_stream(input.get_device_index());
  const bool whole = is_aligned(input) && C * input.element_size() % 16 == 0;
  switch (input.scalar_type()) {
    case ScalarType::Half:
      launch_max_pool<__half>(windows, whole, stream);
      break;
    case ScalarType::BFloat16:
      launch_max_pool<__nv_bfloat16>(windows, whole, stream);
      break;
    default:
      launch_max_pool<float>(windows, whole, stream);
  }
  return output;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("stem_max_pool", TORCH_BOX(&fused_resnet::stem_max_pool_of));
  m.impl("max_pool_channels_last", TORCH_BOX(&fused_resnet::max_pool_channels_last));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, CompositeExplicitAutograd, m)
{
  m.impl("stem_rows_each", TORCH_BOX(&fused_resnet::stem_rows_each));
}
