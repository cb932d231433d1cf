// The operator conv_bn_act_tiled: what conv_bn_act.cuh computes, on tensors. With channels_last
// tensors it allocates the output, launches once and converts nothing; a shared sum takes two more
// allocations and a memset of a few bytes. Tensors that the chosen instance cannot load as they lie
// are copied first.
#include "cuda/conv_bn_act.h"

#include <limits>
#include <optional>
#include <vector>

#include "cuda/conv_heuristics.h"
#include "cuda/gpu_of.h"
#include "cuda/library.h"
#include "cuda/narrow_residual_of.h"
#include "cuda/tensors.h"
#include "memory_format.h"

namespace fused_resnet {
namespace {

constexpr int64_t kMostPixels = (int64_t{1} << 31) - (1 << 16);  // tiles may reach beyond M
constexpr int64_t kMostGroups = 65535;                           // CUDA's limit of gridDim.y
constexpr int kMostSplit = 64;

// How far from the first element that a window (or a filter) holds its last one lies: where
// elements are loaded one by one, 32 bits count that.
double window_span(const Tensor& tensor, int64_t channels, int64_t rows, int64_t columns) {
  // In doubles, for a stride along one pixel may be any number.
  const auto span = [&](int64_t dim, int64_t count) {
    return static_cast<double>(count - 1) * static_cast<double>(tensor.stride(dim));
  };
  return span(1, channels) + span(2, rows) + span(3, columns);
}

// The instance asked for, {} or {index, split}, if it can run the problem.
ConvChoice choice_of(const std::vector<int64_t>& tile, const ConvProblem& problem, int device) {
  if (tile.empty()) {
    const ConvChoice choice = choose_conv(problem, gpu_of(device));
    FR_CHECK(choice.tile >= 0, "conv_bn_act: no tile fits this GPU's shared memory");
    return choice;
  }
  FR_CHECK(tile.size() == 2 && tile[0] >= 0 && tile[0] < kTileCount && tile[1] >= 1 &&
               tile[1] <= kMostSplit,
           "conv_bn_act: tile must be [index, split], below ", kTileCount, " and ", kMostSplit + 1);
  const Tile& wanted = kTiles[tile[0]];
  FR_CHECK(wanted.products == problem.products &&
               (wanted.loads == loads_for(problem) || wanted.loads == Loads::kElements),
           "conv_bn_act: tile ", tile[0], " cannot run this problem");
  return {static_cast<int>(tile[0]), shares_of(problem, wanted, static_cast<int>(tile[1]))};
}

Tensor conv_bn_act_tiled(Tensor input, Tensor weight, Tensor running_mean, Tensor running_var,
                         std::optional<Tensor> bn_weight, std::optional<Tensor> bn_bias, double eps,
                         std::optional<Tensor> bias, int64_t stride_h, int64_t stride_w,
                         int64_t pad_h, int64_t pad_w, int64_t dil_h, int64_t dil_w, int64_t groups,
                         std::optional<Tensor> residual, int64_t act, double act_first,
                         double act_second, bool tf32, std::vector<int64_t> tile) {
  constexpr const char* op = "conv_bn_act";
  check_rank(op, "input", input, 4);
  check_rank(op, "weight", weight, 4);
  check_floating(op, "input", input, false);
  const ScalarType dtype = input.scalar_type();
  check_dtype(op, "weight", weight, dtype);
  check_device(op, "weight", weight, input);
  check_eps(op, eps);
  const Activation activation = activation_of(op, act, act_first, act_second);
  check_number(op, "groups", groups, 1, kMostGroups);
  const int64_t N = input.size(0), C = input.size(1), H = input.size(2), W = input.size(3);
  const int64_t K = weight.size(0), R = weight.size(2), S = weight.size(3);
  FR_CHECK(K > 0 && K % groups == 0 && weight.size(1) > 0 && C % groups == 0 &&
               C / groups == weight.size(1),
           op, ": weight has shape ", shape_string(weight), ", input has ", C,
           " channels (groups=", groups, ")");
  const int64_t P = FilterAxis(op, H, R, stride_h, pad_h, dil_h).outputs;
  const int64_t Q = FilterAxis(op, W, S, stride_w, pad_w, dil_w).outputs;
  const int64_t pixels = checked_product(op, "the output", {N, P, Q});
  FR_CHECK(pixels <= kMostPixels, op, ": the output has ", pixels, " pixels, must have at most ",
           kMostPixels);
  checked_product(op, "the output", {pixels, K, 8});
  FR_CHECK(
      checked_product(op, "weight", {C, R, S}) < kMostPixels && H < kMostPixels && W < kMostPixels,
      op, ": a size is over ", kMostPixels);

  const DeviceGuard guard(input.get_device_index());
  Tensor output = empty({N, K, P, Q}, {P * Q * K, 1, Q * K, K}, dtype, input);
  const bool channels_last = is_channels_last(input) || is_channels_last(weight);
  if (output.numel() == 0) return in_format(output, channels_last);

  const Products products = dtype != ScalarType::Float ? Products::k16Bit
                            : tf32                     ? Products::kTf32
                                                       : Products::kIeee;
  const ConvProblem problem{N * P * Q, C, K, R * S, groups, products, true};
  const ConvChoice choice = choice_of(tile, problem, input.get_device_index());
  const Loads loads = kTiles[choice.tile].loads;
  const int64_t chunk = dtype == ScalarType::Float ? 4 : 8;
  if (loads == Loads::kElements) {
    const auto too_long = [&](const Tensor& image) {
      return window_span(image, problem.group_c(), (R - 1) * dil_h + 1, (S - 1) * dil_w + 1) >
             INT32_MAX;
    };
    if (too_long(input)) input = aligned_copy(input);
    if (window_span(weight, problem.group_c(), R, S) > INT32_MAX) weight = aligned_copy(weight);
    FR_CHECK(!too_long(input), "conv_bn_act: a window spans 2^31 elements or more");
  } else {
    if (!has_aligned_pixels(input, chunk)) input = aligned_copy(input);
    if (!is_aligned(weight) || !is_dense_channels_last(weight)) weight = aligned_copy(weight);
  }
  NarrowResidual narrow{};
  if (residual) {
    check_device(op, "residual", *residual, input);
    FR_CHECK(residual->dim() == 4 && residual->size(0) == N && residual->size(1) >= 1 &&
                 residual->size(1) <= K && residual->size(2) == P && residual->size(3) == Q &&
                 residual->scalar_type() == dtype,
             "conv_bn_act: residual must have the output's shape, or fewer channels, and "
             "its dtype");
    if (residual->size(1) < K) {
      // Tiles begin with a group or, on the diagonal, at multiples of their filters.
      const bool anywhere = groups > 1 && loads != Loads::kDiagonal;
      const int64_t begins_at = anywhere ? problem.group_k() : chunk;
      narrow = narrow_residual_of(*residual, K, chunk, begins_at);
    } else if (!is_dense_channels_last(*residual) || !is_aligned(*residual)) {
      residual = aligned_copy(*residual);
    }
  }

  std::optional<Tensor> mean = running_mean, var = running_var;
  Conv conv{
      .input = input.const_data_ptr(),
      .weight = weight.const_data_ptr(),
      .residual = residual && !narrow.values ? residual->const_data_ptr() : nullptr,
      .narrow = narrow,
      .output = output.mutable_data_ptr(),
      .running_mean = parameter_of("running_mean", mean, K, input),
      .running_var = parameter_of("running_var", var, K, input),
      .bn_weight = parameter_of("bn_weight", bn_weight, K, input),
      .bn_bias = parameter_of("bn_bias", bn_bias, K, input),
      .bias = parameter_of("bias", bias, K, input),
      .eps = static_cast<float>(eps),
      .floor = activation.kind == Act::kRelu ? 0.f : -std::numeric_limits<float>::infinity(),
      .M = static_cast<int>(problem.M),
      .H = static_cast<int>(H),
      .W = static_cast<int>(W),
      .C = static_cast<int>(C),
      .P = static_cast<int>(P),
      .Q = static_cast<int>(Q),
      .K = static_cast<int>(K),
      .R = static_cast<int>(R),
      .S = static_cast<int>(S),
      .group_c = static_cast<int>(problem.group_c()),
      .group_k = static_cast<int>(problem.group_k()),
      .stride_h = static_cast<int>(stride_h),
      .stride_w = static_cast<int>(stride_w),
      .pad_h = static_cast<int>(pad_h),
      .pad_w = static_cast<int>(pad_w),
      .dil_h = static_cast<int>(dil_h),
      .dil_w = static_cast<int>(dil_w),
      .input_n = input.stride(0),
      .input_h = input.stride(2),
      .input_w = input.stride(3),
      .input_c = input.stride(1),
      .weight_k = weight.stride(0),
      .weight_c = weight.stride(1),
      .weight_r = weight.stride(2),
      .weight_s = weight.stride(3),
      .vector_output = (loads == Loads::kDiagonal ? K : problem.group_k()) % chunk == 0,
      .partials = nullptr,
      .tickets = nullptr,
      .activation = activation,
  };

  const cudaStream_t stream = current_stream(input.get_device_index());
  std::optional<Tensor> tickets, partials;
  if (choice.split > 1) {
    const Tile& shape = kTiles[choice.tile];
    const int64_t tiles = tiles_of(problem, shape);
    tickets = empty({tiles}, {1}, ScalarType::Int, input);
    partials = empty({tiles * choice.split * shape.m * shape.n}, {1}, ScalarType::Float, input);
    conv.tickets = static_cast<int*>(tickets->mutable_data_ptr());
    conv.partials = static_cast<float*>(partials->mutable_data_ptr());
    const int64_t bytes = tiles * static_cast<int64_t>(sizeof(int));
    if (recording != nullptr) recording->add_clearing(conv.tickets, bytes);
    STD_CUDA_CHECK(cudaMemsetAsync(conv.tickets, 0, bytes, stream));
  }
  switch (dtype) {
    case ScalarType::Half:
      launch_conv_bn_act<__half>(conv, choice.tile, choice.split, stream);
      break;
    case ScalarType::BFloat16:
      launch_conv_bn_act<__nv_bfloat16>(conv, choice.tile, choice.split, stream);
      break;
    default:
      launch_conv_bn_act<float>(conv, choice.tile, choice.split, stream);
  }
  return in_format(output, channels_last);
}

// Seven numbers for every instance, by index: products, loads, m, n, depth in elements, warps,
// stages.
std::vector<int64_t> conv_tiles() {
  std::vector<int64_t> numbers;
  for (const Tile& tile : kTiles) {
    numbers.insert(numbers.end(),
                   {static_cast<int64_t>(tile.products), static_cast<int64_t>(tile.loads), tile.m,
                    tile.n, tile.depth(), tile.warps_m * tile.warps_n, tile.stages});
  }
  return numbers;
}

// Pairs of an instance's index and a split that can run {M, C, K, taps, groups, products} on a GPU
// {multiprocessors, shared memory of a block, of a multiprocessor, bytes a cycle of its memory},
// the likely fastest first.
std::vector<int64_t> conv_tiles_for(std::vector<int64_t> problem, std::vector<int64_t> gpu) {
  FR_CHECK(problem.size() == 6 && gpu.size() == 4, "conv_tiles_for: takes six numbers and four");
  for (const int i : {0, 1, 2, 3, 4}) check_number("conv_tiles_for", "problem", problem[i], 1);
  check_number("conv_tiles_for", "products", problem[5], 0, static_cast<int64_t>(Products::kIeee));
  FR_CHECK(problem[1] % problem[4] == 0 && problem[2] % problem[4] == 0,
           "conv_tiles_for: groups is ", problem[4], ", must divide ", problem[1], " and ",
           problem[2], " channels");
  for (const int64_t number : gpu) check_number("conv_tiles_for", "gpu", number, 1);
  const ConvProblem conv{problem[0], problem[1], problem[2],
                         problem[3], problem[4], static_cast<Products>(problem[5]),
                         true};
  std::vector<int64_t> numbers;
  const Gpu asked{static_cast<int>(gpu[0]), static_cast<int>(gpu[1]), static_cast<int>(gpu[2]),
                  static_cast<int>(gpu[3])};
  for (const ConvChoice& choice : conv_choices(conv, asked)) {
    numbers.insert(numbers.end(), {choice.tile, choice.split});
  }
  return numbers;
}

}  // namespace
}  // namespace fused_resnet

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, FUSED_RESNET_DEVICE, m)
{
  m.impl("conv_bn_act_tiled", TORCH_BOX(&fused_resnet::conv_bn_act_tiled));
}

STABLE_TORCH_LIBRARY_IMPL(FUSED_RESNET_LIBRARY, CompositeExplicitAutograd, m)
{
  m.impl("conv_tiles", TORCH_BOX(&fused_resnet::conv_tiles));
  m.impl("conv_tiles_for", TORCH_BOX(&fused_resnet::conv_tiles_for));
}
